"""A dataset in memory as on disk, in compressed chunks that are decoded when a batch needs them."""

from functools import cached_property

import numpy as np

from scaled_ql.replay.chunks import Chunks, Read, read_memory
from scaled_ql.replay.format import ARRAYS, file_name
from scaled_ql.replay.recording import ChunkedRecording, Recording
from scaled_ql.replay.shared import SharedMemory
from scaled_ql.replay.store import Replay

BYTES_PER_FRAME = 150  # an estimate: compressed frame, action, reward, index
FILES_AT_ONCE = 16  # read concurrently while loading


def to_memory(replay: Replay) -> Replay:
    """Load a dataset or view into memory: about 100 bytes per transition of a typical game.

    Sampling processes (`scaled_ql.replay.workers`) share that memory.

    Raises:
        ReplayError: a damaged file.
    """
    memory = SharedMemory()
    recordings = {
        game: [
            MemoryRecording(recording, *replay.rows_in_use(game, number), memory)
            for number, recording in enumerate(replay.recordings(game))
        ]
        for game in replay.games
    }
    return Replay(replay.path, recordings, replay.view)


class MemoryRecording(ChunkedRecording):
    """A recording whose frames, still compressed, actions and rewards are in memory.

    Args:
        recording: a recording on disk or behind a URL.
        first, frames: int64 [episodes], the rows to load: frames[i] rows from first[i] on.
        memory: memory to load them into.
    """

    def __init__(self, recording: Recording, first: np.ndarray, frames: np.ndarray, memory: SharedMemory):
        super().__init__(recording.kvstore, recording.manifest, recording.table)
        order = np.argsort(first)
        self._first = first[order]
        self._place = np.cumsum(frames[order]) - frames[order] - self._first  # place of row r: r + this
        self._memory = memory
        self._stored_columns = {}  # (offset, length) of each
        for name in ("action", "reward"):
            column = recording.stretches(name, self._first, frames[order])
            self._stored_columns[name] = memory.append(column.tobytes()), len(column)
        shard = recording.arrays["observation"].chunk_layout.write_chunk.shape[0]
        needed = {number for a, n in zip(first, frames) for number in range(a // shard, (a + n - 1) // shard + 1)}
        self._stored_files = self._store(sorted(needed))

    def _store(self, numbers: list[int]) -> dict[int, tuple[int, int]]:
        """Read files of frames into memory; returns (offset, size) of each."""
        stored = {}
        for begin in range(0, len(numbers), FILES_AT_ONCE):
            group = numbers[begin : begin + FILES_AT_ONCE]
            reads = [self.kvstore.read(file_name("observation", number)) for number in group]
            for number, read in zip(group, reads):
                content = self.reading(lambda read=read: read.result().value, "observation")
                stored[number] = self._memory.append(content), len(content)
        return stored

    @cached_property
    def chunks(self) -> dict[str, Chunks]:
        """The frames, chunk by chunk."""
        content = memoryview(self._memory.content)
        files = {number: content[begin : begin + size] for number, (begin, size) in self._stored_files.items()}

        def make_read(largest: int) -> Read:
            read = read_memory(files, largest)
            return lambda file, place: bytes(read(file, place))  # of which checksums are made

        return {"observation": self._open_chunks("observation", make_read)}

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        return {
            name: np.frombuffer(self._memory.content, ARRAYS[name], length, begin)
            for name, (begin, length) in self._stored_columns.items()
        }

    def values(self, name: str, first: np.ndarray, last: np.ndarray, width: int = 1) -> np.ndarray:
        """See `Recording.values`; actions and rewards only."""
        place = first + self._place[np.searchsorted(self._first, first, side="right") - 1]
        steps = np.arange(width)
        inside = first[:, None] + steps <= last[:, None]
        column = self._columns[name]
        values = column[np.minimum(place[:, None] + steps, len(column) - 1)]
        return np.where(inside, values, column.dtype.type(0))
