"""Windows of successive steps, for methods that see a stretch of an episode and not one stack of frames."""

from typing import NamedTuple

import numpy as np

from scaled_ql.games import full_actions
from scaled_ql.replay.format import ReplayError
from scaled_ql.replay.sampling import sample_indices, share_of
from scaled_ql.replay.store import Replay


class Sequences(NamedTuple):
    """B windows of T successive steps (a pytree, like `Batch`), of which the last is a transition of the dataset.

    Where a window begins before its episode, its first steps are padding, as at the beginning of play: frame, action
    and reward are zero, and what is still to come is the whole episode's return.

    Attributes:
        frames: uint8 [B, T, 84, 84], one a step, oldest first.
        action: int32 [B, T], index in the full joystick (`games.FULL_ACTIONS`), the same for all games.
        reward: float32 [B, T], of the step itself, clipped to [-1, 1].
        return_to_go: float32 [B, T], undiscounted sum of the clipped rewards from the step to its episode's last
            recorded one: of an episode that was truncated, or whose recording breaks off, what was obtained by then,
            and so a lower bound where rewards are positive. NaN until `label_with_returns` fills it in.
        terminal: bool [B, T], the episode ends in the game with this step; a truncated one has no such step.
        mask: bool [B, T], false for padding; the last step is never padding.
        game: int32 [B], index into the replay's `games`.
    """

    frames: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    return_to_go: np.ndarray
    terminal: np.ndarray
    mask: np.ndarray
    game: np.ndarray


def sample_sequences(
    replay: Replay,
    seed: int,
    step: int,
    *,
    games_per_batch: int = 128,
    transitions_per_game: int = 4,
    length: int = 4,
    shard: tuple[int, int] = (0, 1),
    out: np.ndarray | None = None,
) -> Sequences:
    """Batch number `step` of windows, drawn as `sample_batch` draws transitions: each ends with a sampled transition.

    Every transition may be the last of a window, be its episode terminated or truncated; where an episode's beginning
    was lost, only those that have a whole window, since what preceded it is not known. A uniform view thins out the
    windows: each ends with one of its transitions, and shows those before it.

    Args:
        games_per_batch, transitions_per_game: games, and windows of each; see `sample_indices`.
        length: steps of a window, T; a window longer than its episode is padded.
        shard, out: see `sample_batch`.

    Raises:
        ReplayError: damaged data; `length` below 1; no window to draw.
        ValueError: the batch does not divide evenly into shares.
    """
    if length < 1:
        raise ReplayError(f"length must be at least 1 step, got {length}.")
    shape = {"games_per_batch": games_per_batch, "transitions_per_game": transitions_per_game}
    game, index = sample_indices(replay, seed, step, n_step=0, stack_size=length, **shape)
    mine = share_of(len(game), shard)
    return gather_sequences(replay, game[mine], index[mine], length, out)


def gather_sequences(
    replay: Replay, games: np.ndarray, indices: np.ndarray, length: int = 4, out: np.ndarray | None = None
) -> Sequences:
    """The windows that end with given transitions.

    Args:
        replay: an open dataset or view.
        games: int32 [B], numbers in its `games`.
        indices: int [B], time indices of the windows' last transitions.
        length: steps of a window, T.
        out: uint8 [B, T, 84, 84] that the frames are written to; see `Replay.gather`.

    Raises:
        ReplayError: an index out of range, or damaged data.
    """
    shape = (len(indices), length)
    action, reward = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    terminal, mask = np.zeros(shape, bool), np.zeros(shape, bool)
    spans = replay.spans(games, indices, 0, length)
    for span in spans:
        places, padding = span.places[:, None], (length - 1 - (span.now - span.earliest))[:, None]
        steps = np.arange(length) - padding  # number of the step among those read; negative: padding
        mask[span.places] = steps >= 0
        for name, column in (("action", action), ("reward", reward)):
            read = span.recording.values(name, span.earliest, span.now, length)
            column[span.places] = np.where(steps >= 0, np.take_along_axis(read, np.maximum(steps, 0), 1), 0)
        terminal[places, length - 1] = (span.terminal & (span.now == span.last))[:, None]
    for number in np.unique(games):
        full, rows = full_actions(replay.action_names(replay.games[number])), games == number
        action[rows] = np.where(mask[rows], full[action[rows]], 0)
    frames = replay.read_frames(spans, shape, length, out)
    unknown = np.full(shape, np.nan, np.float32)
    return Sequences(frames, action, reward.clip(-1, 1), unknown, terminal, mask, games)
