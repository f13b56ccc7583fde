"""ALE environments with the preprocessing of the data and of the paper's evaluation (Table B.1).

Grey frames, maximum over the last two of 4 emulator frames, area resize to 84 x 84, no no-op start, no fire on
reset, game over (not a lost life) ends an episode, 27,000 agent steps (108,000 frames) truncate it.
"""

import multiprocessing.connection
from functools import partial
from typing import Any

import ale_py
import ale_py.vector_env
import gymnasium
import numpy as np

from scaled_ql.games import check_variant, rom_name

FRAME_SKIP = 4
STACK_SIZE = 4
MAX_STEPS = 27_000  # agent steps, Table B.1: 108K frames
STEP_SECONDS = 120.0  # a process that takes longer for one step will not come back

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)


class EnvironmentDied(RuntimeError):
    """A process that plays ended, or does not answer."""


def make_environment(
    game: str,
    *,
    sticky_actions: float = 0.25,
    max_steps: int = MAX_STEPS,
    mode: int | None = None,
    difficulty: int | None = None,
) -> gymnasium.Env:
    """One environment; observations are single frames, uint8 [84, 84], rewards are raw.

    Args:
        game: name as in the paper.
        sticky_actions: probability that the emulator repeats the previous action, at every emulator frame.
        max_steps: agent steps after which an episode is truncated.
        mode: game mode of ALE (None: the default).
        difficulty: game difficulty of ALE (None: the default).

    Raises:
        UnknownGame: ALE does not have it.
        UnknownVariant: the game does not have that mode or difficulty.
    """
    check_variant(game, mode, difficulty)
    environment = ale_py.AtariEnv(
        rom_name(game),
        mode=mode,
        difficulty=difficulty,
        frameskip=1,
        repeat_action_probability=sticky_actions,
        max_num_frames_per_episode=FRAME_SKIP * max_steps,
    )
    return gymnasium.wrappers.AtariPreprocessing(environment, noop_max=0, frame_skip=FRAME_SKIP)


class ProcessVectorEnv(gymnasium.vector.AsyncVectorEnv):
    """Environments of `make_environment` with stacked frames, a process each; as `AtariVectorEnv`, but slower.

    `send` begins a step of all environments, `recv` returns what it led to.

    Raises:
        EnvironmentDied: from `recv`.
    """

    def __init__(self, game: str, num_environments: int, **options: Any):
        self._game = game
        make = partial(_make_stacked, game, options)
        super().__init__([make] * num_environments, context="forkserver")  # a fork of a program with threads may hang

    def send(self, actions: np.ndarray) -> None:
        """Begin a step with integer actions [N]."""
        try:
            self.step_async(actions)
        except OSError as error:
            raise self._died(error) from error

    def recv(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """(stacks, rewards, terminated, truncated, info) of the step that `send` began."""
        try:
            return self.step_wait(STEP_SECONDS)
        except (EOFError, OSError, TimeoutError) as error:
            raise self._died(error) from error

    def _died(self, error: Exception) -> EnvironmentDied:
        if not isinstance(error, TimeoutError):
            multiprocessing.connection.wait(
                [process.sentinel for process in self.processes], timeout=5
            )  # a pipe ends first
        dead = [str(number) for number, process in enumerate(self.processes) if not process.is_alive()]
        what = f"environment {', '.join(dead)} of {self.num_envs} ended" if dead else "an environment does not answer"
        self.close(terminate=True)
        return EnvironmentDied(f"{self._game}: {what} ({type(error).__name__}: {error}). Run again to go on.")


def _make_stacked(game: str, options: dict[str, Any]) -> gymnasium.Env:
    environment = make_environment(game, **options)
    return gymnasium.wrappers.FrameStackObservation(environment, STACK_SIZE, padding_type="zero")


VectorEnvironment = ale_py.vector_env.AtariVectorEnv | ProcessVectorEnv


def make_vector_environment(
    game: str,
    num_environments: int,
    *,
    sticky_actions: float = 0.0,
    max_steps: int = MAX_STEPS,
    num_threads: int = 0,
    mode: int | None = None,
    difficulty: int | None = None,
) -> VectorEnvironment:
    """Many environments of one game, frames and rewards bit-identical to `make_environment`'s without sticky actions.

    Observations are stacks, uint8 [N, 4, 84, 84], oldest frame first, frames before an episode's start zero.
    An environment that ended resets on its next step, whose action is ignored and whose reward is 0. Where game over
    and the step limit meet, `truncated` may be set beside `terminated`.

    The default variant is played on C++ threads. These know no mode and difficulty, so another variant is played
    by a process for each environment.

    Args:
        game: name as in the paper.
        num_environments: side by side.
        sticky_actions: as in `make_environment`.
        max_steps: as in `make_environment`.
        num_threads: of the default variant; 0: one per core.
        mode: as in `make_environment`.
        difficulty: as in `make_environment`.

    Raises:
        UnknownGame: ALE does not have it.
        UnknownVariant: the game does not have that mode or difficulty.
    """
    if mode is not None or difficulty is not None:
        check_variant(game, mode, difficulty)
        options = {"sticky_actions": sticky_actions, "max_steps": max_steps, "mode": mode, "difficulty": difficulty}
        return ProcessVectorEnv(game, num_environments, **options)
    return ale_py.vector_env.AtariVectorEnv(
        rom_name(game),
        num_environments,
        num_threads=num_threads,
        max_num_frames_per_episode=FRAME_SKIP * max_steps,
        repeat_action_probability=sticky_actions,
        stack_num=STACK_SIZE,
        frameskip=FRAME_SKIP,
        noop_max=0,
        use_fire_reset=False,
        reward_clipping=False,
    )
