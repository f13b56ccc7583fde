"""A dataset in memory as it lies on disk: compressed chunks, decoded when a batch needs them. No disk is read again."""

from functools import cached_property, partial

import numpy as np

from scaled_ql.replay.chunks import Chunks, read_memory
from scaled_ql.replay.store import Replay, Run

BYTES_PER_FRAME = 150  # to reckon with: compressed frame, action, reward, index
FILES_AT_ONCE = 16  # that are read together while loading


def to_memory(replay: Replay) -> Replay:
    """The same dataset, or view, with all that it shows in memory: about 100 bytes a transition of a usual game.

    Raises:
        ReplayError: a damaged file.
    """
    runs = {
        game: [MemoryRun(run, *replay.rows_in_use(game, number)) for number, run in enumerate(replay.runs(game))]
        for game in replay.games
    }
    return Replay(replay.path, runs, replay.view)


class MemoryRun(Run):
    """A run whose frames, still compressed, actions and rewards are in memory.

    Args:
        run: on disk or behind a URL.
        first, frames: int64 [episodes], the rows that are needed: frames[i] rows from first[i] on.
    """

    def __init__(self, run: Run, first: np.ndarray, frames: np.ndarray):
        super().__init__(run.kvstore, run.manifest, run.table)
        order = np.argsort(first)
        self._first = first[order]
        self._place = np.cumsum(frames[order]) - frames[order] - self._first  # of a row in the columns: row + this
        self._columns = {
            "action": run.stretches("action", self._first, frames[order]),
            "reward": run.stretches("reward", self._first, frames[order]),
        }
        shard = run.arrays["observation"].chunk_layout.write_chunk.shape[0]
        needed = [np.arange(a // shard, (a + n - 1) // shard + 1) for a, n in zip(first, frames)]
        self._files = self._load(np.unique(np.concatenate(needed)).tolist())

    def _load(self, numbers: list[int]) -> dict[int, bytes]:
        files = {}
        for begin in range(0, len(numbers), FILES_AT_ONCE):
            group = numbers[begin : begin + FILES_AT_ONCE]
            reads = [self.kvstore.read(f"observation/c/{number}/0/0") for number in group]
            files |= {number: read.result().value for number, read in zip(group, reads)}
        return files

    @cached_property
    def chunks(self) -> dict[str, Chunks]:
        """The frames, chunk by chunk."""
        return {"observation": self._chunks("observation", partial(read_memory, self._files))}

    def values(self, name: str, first: np.ndarray, last: np.ndarray, width: int = 1) -> np.ndarray:
        """One column at rows first[i]..last[i], inclusive, at most `width` of them: [B, width], zeros behind them."""
        place = first + self._place[np.searchsorted(self._first, first, side="right") - 1]
        steps = np.arange(width)
        inside = first[:, None] + steps <= last[:, None]
        column = self._columns[name]
        values = column[np.minimum(place[:, None] + steps, len(column) - 1)]
        return np.where(inside, values, column.dtype.type(0))
