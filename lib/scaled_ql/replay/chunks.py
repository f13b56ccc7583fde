"""Reading single chunks of a store's arrays straight from their files: random access without anything in between.

An array's file begins with an index, (offset, size) for each of its chunks; a chunk ends with its CRC-32C. That is
zarr's sharding format. Nothing is kept but a few open files, so a store of any size takes the same memory.
"""

import os
import struct
import threading
from collections.abc import Callable
from functools import lru_cache

import google_crc32c
import numpy as np
import zstandard

from scaled_ql.replay.format import ReplayError

ABSENT = 2**64 - 1
OPEN_FILES = 512
Read = Callable[[int, int, int], memoryview | bytes]  # (number of the file, offset, size) -> content


class Chunks:
    """Chunks of one array.

    Args:
        name: of the array, for messages.
        read: reads from one of its files.
        dtype: of the array.
        tail: shape of a row.
        chunk: rows of a chunk.
        shard: rows of a file.
    """

    def __init__(self, name: str, read: Read, dtype: np.dtype, tail: tuple[int, ...], chunk: int, shard: int):
        self.chunk, self._tail, self._dtype = chunk, tail, dtype
        self._name, self._read, self._per_file = name, read, shard // chunk
        self._largest = 2 * chunk * int(np.prod(tail)) * np.dtype(dtype).itemsize + 1_024  # bytes; more is an error
        self._local = threading.local()

    def __getitem__(self, number: int) -> np.ndarray:
        """The number-th chunk, [chunk, ...]; not to be written to.

        Raises:
            ReplayError: it is damaged or missing.
        """
        file, place = divmod(number, self._per_file)
        try:
            offset, size = struct.unpack("<QQ", self._read(file, 16 * place, 16))
            if offset == ABSENT:
                raise ValueError("it was never written")
            if size > self._largest:
                raise ValueError("the file's index is damaged")
            content = self._read(file, offset, size)
            body = content[:-4]
            if len(content) != size or google_crc32c.value(body).to_bytes(4, "little") != content[-4:]:
                raise ValueError("its checksum is wrong")
            return np.frombuffer(self._decompressor().decompress(body), self._dtype).reshape(self.chunk, *self._tail)
        except (OSError, ValueError, OverflowError, struct.error, zstandard.ZstdError) as error:
            raise ReplayError(
                f"{self._name}: a chunk is damaged or missing (chunk {place} of file {file}: {error}). Restore the "
                "folder from a copy, or delete it and record or import it again."
            ) from error

    def _decompressor(self) -> zstandard.ZstdDecompressor:
        if not hasattr(self._local, "decompressor"):  # not to be shared among threads
            self._local.decompressor = zstandard.ZstdDecompressor()
        return self._local.decompressor

    def pieces(self, first: int, last: int) -> list[np.ndarray]:
        """Rows first..last, inclusive, as they lie in their chunks."""
        size = self.chunk
        return [
            self[number][max(first - number * size, 0) : last + 1 - number * size]
            for number in range(first // size, last // size + 1)
        ]


def read_files(before: str, after: str) -> Read:
    """Read from the files of an array on a local disk, whose paths are `before`, the file's number, `after`.

    A file that a writer replaces later is read as it was when it was first needed.
    """
    reader = object()

    def read(number: int, offset: int, size: int) -> bytes:
        return os.pread(_open(f"{before}{number}{after}", reader).descriptor, size, offset)

    return read


class _OpenFile:
    """Closed when nobody uses it any more, so another thread may forget it meanwhile."""

    def __init__(self, path: str, reader: object):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


_open = lru_cache(maxsize=OPEN_FILES)(_OpenFile)


def read_memory(files: dict[int, bytes]) -> Read:
    """Read from files that are in memory."""
    return lambda number, offset, size: files[number][offset : offset + size]
