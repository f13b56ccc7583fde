"""A dataset in memory as it lies on disk: compressed chunks, decoded when a batch needs them. No disk is read again."""

import threading
from collections.abc import Iterator

import google_crc32c
import numpy as np
import zstandard

from scaled_ql.replay.format import FRAME_SHAPE, ReplayError
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
            "action": run.stretches("action", self._first, frames[order]).astype(np.uint8),
            "reward": run.stretches("reward", self._first, frames[order]),
        }
        layout = run.arrays["observation"].chunk_layout
        self._chunk, self._shard = layout.read_chunk.shape[0], layout.write_chunk.shape[0]
        stretches = zip(first // self._shard, (first + frames - 1) // self._shard + 1)
        needed = np.unique(np.concatenate([np.arange(a, b) for a, b in stretches]))
        self._files = self._load(needed.tolist())
        self._local = threading.local()

    def _load(self, numbers: list[int]) -> dict[int, tuple[memoryview, np.ndarray]]:
        """Files of compressed chunks by number: (content, offset and size of each chunk, uint64 [chunks, 2])."""
        files = {}
        for begin in range(0, len(numbers), FILES_AT_ONCE):
            group = numbers[begin : begin + FILES_AT_ONCE]
            reads = [self.kvstore.read(f"observation/c/{number}/0/0") for number in group]
            for number, read in zip(group, reads):
                files[number] = self._check_file(number, read.result().value)
        return files

    def _check_file(self, number: int, content: bytes) -> tuple[memoryview, np.ndarray]:
        """A zarr shard ends with its index and the CRC-32C of that; each chunk ends with its own."""
        view, chunks = memoryview(content), self._shard // self._chunk
        index = view[-16 * chunks - 4 : -4]
        sound = len(view) >= 16 * chunks + 4 and _crc32c(index) == view[-4:]
        places = np.frombuffer(index, "<u8").reshape(-1, 2) if sound else np.empty((0, 2), np.uint64)
        for offset, size in places.tolist():
            if offset == 2**64 - 1:  # no such chunk
                continue
            chunk = view[offset : offset + size]
            sound = sound and len(chunk) == size and _crc32c(chunk[:-4]) == chunk[-4:]
        if not sound:
            raise ReplayError(
                f"{self.kvstore.url}observation/c/{number}/0/0: damaged or missing (its checksums are wrong). Restore "
                "the folder from a copy, or delete it and record or import it again."
            )
        return view, places

    def values_at(self, name: str, rows: np.ndarray) -> np.ndarray:
        """One column at any rows, in their shape."""
        place = self._place[np.searchsorted(self._first, rows, side="right") - 1]
        return self._columns[name][rows + place]

    def windows(self, first: np.ndarray, last: np.ndarray) -> list[np.ndarray]:
        """Frames first[i]..last[i], inclusive."""
        return [np.concatenate(pieces) for pieces in self.pieces(first, last)]

    def pieces(self, first: np.ndarray, last: np.ndarray) -> Iterator[list[np.ndarray]]:
        """Frames first[i]..last[i], inclusive, as they lie in their chunks."""
        for a, b in zip(first.tolist(), last.tolist()):
            chunks = range(a // self._chunk, b // self._chunk + 1)
            yield [self._decode(c)[max(a - c * self._chunk, 0) : b + 1 - c * self._chunk] for c in chunks]

    def _decode(self, chunk: int) -> np.ndarray:
        if not hasattr(self._local, "decompressor"):  # not to be shared among threads
            self._local.decompressor = zstandard.ZstdDecompressor()
        content, places = self._files[chunk * self._chunk // self._shard]
        offset, size = places[chunk % len(places)].tolist()
        frames = self._local.decompressor.decompress(content[offset : offset + size - 4])
        return np.frombuffer(frames, np.uint8).reshape(self._chunk, *FRAME_SHAPE)


def _crc32c(content: memoryview) -> bytes:
    return google_crc32c.value(bytes(content)).to_bytes(4, "little")
