"""ALE environments with the preprocessing of the data and of the paper's evaluation (Table B.1).

Grey frames, maximum over the last two of 4 emulator frames, area resize to 84 x 84, no no-op start, no fire on
reset, game over (not a lost life) ends an episode, 27,000 agent steps (108,000 frames) truncate it.
"""

from typing import TYPE_CHECKING

import ale_py
import gymnasium

from scaled_ql.games import rom_name

if TYPE_CHECKING:
    from ale_py.vector_env import AtariVectorEnv

FRAME_SKIP = 4
STACK_SIZE = 4
MAX_STEPS = 27_000  # agent steps, Table B.1: 108K frames

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)


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
    """
    environment = ale_py.AtariEnv(
        rom_name(game),
        mode=mode,
        difficulty=difficulty,
        frameskip=1,
        repeat_action_probability=sticky_actions,
        max_num_frames_per_episode=FRAME_SKIP * max_steps,
    )
    return gymnasium.wrappers.AtariPreprocessing(environment, noop_max=0, frame_skip=FRAME_SKIP)


def make_vector_environment(
    game: str,
    num_environments: int,
    *,
    sticky_actions: float = 0.0,
    max_steps: int = MAX_STEPS,
    num_threads: int = 0,
) -> "AtariVectorEnv":
    """Many environments of one game on C++ threads, frames and rewards bit-identical to `make_environment`'s.

    Observations are stacks, uint8 [N, 4, 84, 84], oldest frame first, frames before an episode's start zero.
    An environment that ended resets on its next step, whose action is ignored and whose reward is 0.
    """
    from ale_py.vector_env import AtariVectorEnv

    return AtariVectorEnv(
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
