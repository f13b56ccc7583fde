"""A small game with the screen and the interface of ALE's: catch what falls, for tests of online learning."""

import gymnasium
import numpy as np

from scaled_ql.environments import STACK_SIZE

COLUMNS, ROWS, PIXELS = 7, 7, 12


class Catch(gymnasium.Env):
    """A ball falls, a paddle moves left, stays or moves right (actions modulo 3); +1 for a catch, -1 for a miss.

    Five balls an episode, so the best return is 5. Frames are uint8 [84, 84]: a grid of 7 x 7 squares.
    """

    observation_space = gymnasium.spaces.Box(0, 255, (84, 84), np.uint8)
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, balls=5):
        self.balls = balls

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.paddle = self.balls, COLUMNS // 2
        self._drop()
        return self._frame(), {}

    def _drop(self):
        self.ball, self.row = int(self.np_random.integers(COLUMNS)), 0

    def step(self, action):
        self.paddle = min(max(self.paddle + int(action) % 3 - 1, 0), COLUMNS - 1)
        self.row += 1
        reward = 0.0
        if self.row == ROWS - 1:
            reward = 1.0 if self.ball == self.paddle else -1.0
            self.left -= 1
            if self.left:
                self._drop()
        return self._frame(), reward, self.left == 0, False, {}

    def _frame(self):
        frame = np.zeros((84, 84), np.uint8)
        for row, column, value in ((self.row, self.ball, 255), (ROWS - 1, self.paddle, 160)):
            frame[row * PIXELS : (row + 1) * PIXELS, column * PIXELS : (column + 1) * PIXELS] = value
        return frame


class CatchVector(gymnasium.vector.SyncVectorEnv):
    """Side by side, with `send` and `recv`."""

    def __init__(self, num_environments):
        def make():
            return gymnasium.wrappers.FrameStackObservation(Catch(), STACK_SIZE, padding_type="zero")

        super().__init__([make] * num_environments)

    def send(self, actions):
        self.sent = actions

    def recv(self):
        return self.step(self.sent)


def make_catch(game, num_environments, **options):
    """In place of `make_vector_environment`."""
    return CatchVector(num_environments)
