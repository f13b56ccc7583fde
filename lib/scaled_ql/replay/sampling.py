"""The transitions of batch i: a pure function of (replay, seed, i), so a run resumes from one integer."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from scaled_ql.replay.batch import Batch
from scaled_ql.replay.store import Replay
from scaled_ql.replay.views import drawn_transitions

T = TypeVar("T")


def sample_indices(
    replay: Replay,
    seed: int,
    step: int,
    *,
    games_per_batch: int = 128,
    transitions_per_game: int = 4,
    n_step: int = 3,
    stack_size: int = 4,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw batch number `step`, stratified by game (appendix B.3).

    `games_per_batch` games are drawn with replacement, then `transitions_per_game` transitions from each,
    uniformly over all transitions of that game that may be sampled (`Replay.sampleable`).

    Returns:
        (game, index): int32 [B] into `replay.games` and int64 [B] time indices of that game, with
        B = games_per_batch * transitions_per_game.
    """
    rng = np.random.default_rng([seed, step])
    game = rng.integers(len(replay.games), size=games_per_batch).repeat(transitions_per_game).astype(np.int32)
    uniform = rng.random(len(game))
    index = np.empty(len(game), np.int64)
    for number in np.unique(game):
        rows = np.flatnonzero(game == number)
        name = replay.games[number]
        index[rows] = replay.draw(name, uniform[rows], n_step, stack_size)
    return game, index


def sample_batch(
    replay: Replay,
    seed: int,
    step: int,
    *,
    games_per_batch: int = 128,
    transitions_per_game: int = 4,
    n_step: int = 3,
    discount: float = 0.99,
    stack_size: int = 4,
    shard: tuple[int, int] = (0, 1),
    out: np.ndarray | None = None,
) -> Batch:
    """Batch number `step` of a training run, rewards clipped; see `sample_indices` and `Replay.batch`.

    Args:
        shard: (i, n): the i-th of n equal, disjoint shares of the batch, for one of n processes; together, in
            order, they are the whole batch.
        out: memory for the frames; see `Replay.gather`.

    Raises:
        ValueError: the batch does not divide evenly into shares.
    """
    game, index = sample_indices(
        replay,
        seed,
        step,
        games_per_batch=games_per_batch,
        transitions_per_game=transitions_per_game,
        n_step=n_step,
        stack_size=stack_size,
    )
    mine = share_of(len(game), shard)
    return replay.gather(game[mine], index[mine], n_step, discount, stack_size, out=out)


def share_of(size: int, shard: tuple[int, int]) -> slice:
    """The i-th of n equal shares of a batch of `size` transitions, for shard = (i, n).

    Raises:
        ValueError: there is no such share.
    """
    number, shards = shard
    if size % shards or not 0 <= number < shards:
        raise ValueError(f"a batch of {size} transitions has no share {number} of {shards} equal ones")
    return slice(number * size // shards, (number + 1) * size // shards)


def mean_frames(replay: Replay, seed: int, num_frames: int = 1_000) -> np.ndarray:
    """Mean of `num_frames` random frames of each game, float32 [games, 84, 84], from 0 to 255."""
    means = []
    for number, game in enumerate(replay.games):
        total, rng = replay.num_transitions(game), np.random.default_rng([seed, number])
        if replay.view.uniform < 1:  # of what the view keeps
            drawn = drawn_transitions(replay.view, game, total)
            times = drawn[rng.integers(len(drawn), size=num_frames)]
        else:
            times = rng.integers(total, size=num_frames)
        means.append(replay.frames_at(game, times).mean(0, dtype=np.float64))
    return np.stack(means).astype(np.float32)


def prefetch(load: Callable[[int], T], start: int, stop: int, *, depth: int = 4, threads: int = 2) -> Iterator[T]:
    """Yield load(start), ..., load(stop - 1) in order, reading up to `depth` ahead on `threads` threads.

    For any `load`; `sample_batches` samples in processes, which is faster if cores are free.

    Two threads measured best: only decoding releases Python's lock. On two cores one, two and three threads gave
    7,600, 11,200 and 10,000 transitions/s from memory, and 4,800, 4,300 and less from disk (`scaled-ql benchmark
    sampling`).
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="prefetch") as pool:
        pending: deque = deque()
        try:
            for step in range(start, stop):
                pending.append(pool.submit(load, step))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
