"""Random access to single chunks of a store's arrays, straight from their files.

An array's file begins with an index, (offset, size) for each of its chunks; a chunk ends with its CRC-32C. That is
zarr's sharding format. Only open files are kept, `OPEN_FILES` at most, so memory does not grow with the store.
"""

import os
import resource
import struct
import threading
from collections.abc import Callable
from functools import lru_cache

import google_crc32c
import numpy as np
import zstandard

from scaled_ql.replay.format import ReplayError

ABSENT = 2**64 - 1
OPEN_FILES = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 16_384)  # kept open: half of what is allowed
DAMAGE = (OSError, ValueError, struct.error, zstandard.ZstdError)
ENTRY = struct.Struct("<QQ")  # of an index: (offset, size)
Read = Callable[[int, int], bytes]  # (number of the file, place of the chunk in it) -> the chunk as it is stored


class Chunks:
    """Chunks of one array.

    Args:
        name: name of the array, for messages.
        read: reads from its files; see `read_files` and `read_memory`.
        dtype: dtype of the array.
        tail: shape of a row.
        chunk: rows of a chunk.
        shard: rows of a file.
    """

    def __init__(self, name: str, read: Read, dtype: np.dtype, tail: tuple[int, ...], chunk: int, shard: int):
        self.rows, self._shape, self._dtype = chunk, (chunk, *tail), np.dtype(dtype)
        self._name, self._read, self._per_file = name, read, shard // chunk
        self._local = threading.local()  # a decompressor is not thread-safe

    def __getitem__(self, number: int) -> np.ndarray:
        """The number-th chunk, [rows, ...].

        Raises:
            ReplayError: it is damaged or missing.
        """
        try:
            decompressor, body = self._stored(number)
            return np.frombuffer(decompressor.decompress(body), self._dtype).reshape(self._shape)
        except DAMAGE as error:
            raise self._damaged(number, error) from error

    def read_into(self, number: int, target: np.ndarray) -> None:
        """Decode the number-th chunk into a contiguous array of its shape: large ones cost less this way.

        Raises:
            ReplayError: it is damaged or missing.
        """
        try:
            decompressor, body = self._stored(number)
            if decompressor.stream_reader(body).readinto(target) != target.nbytes:
                raise ValueError("it is too short")
        except DAMAGE as error:
            raise self._damaged(number, error) from error

    def _stored(self, number: int) -> tuple[zstandard.ZstdDecompressor, bytes]:
        """This thread's decompressor, and a chunk as it is stored."""
        try:
            decompressor = self._local.decompressor
        except AttributeError:
            decompressor = self._local.decompressor = zstandard.ZstdDecompressor()
        content = self._read(*divmod(number, self._per_file))
        body = content[:-4]
        if google_crc32c.value(body) != int.from_bytes(content[-4:], "little"):
            raise ValueError("its checksum is wrong")
        return decompressor, body

    def _damaged(self, number: int, error: Exception) -> ReplayError:
        file, place = divmod(number, self._per_file)
        return ReplayError(
            f"{self._name}: a chunk is damaged or missing (chunk {place} of file {file}: {error}). Restore the folder "
            "from a copy, or delete it and record or import it again."
        )


def _check(offset: int, size: int, largest: int) -> None:
    if offset == ABSENT:
        raise ValueError("it was never written")
    if size > largest or offset >= 2**63:  # beyond what the system can seek to
        raise ValueError("the file's index is damaged")


def read_files(path: Callable[[int], str], largest: int) -> Read:
    """Read from the files of an array on a local disk, `path(0)`, `path(1)`, ...

    A file that a writer replaces later is read as it was on first use. No chunk is larger than `largest`.
    """
    reader = object()

    def read(file: int, place: int) -> bytes:
        opened = _open(path(file), reader)  # held: it would be closed once nothing refers to it
        offset, size = ENTRY.unpack(os.pread(opened.descriptor, 16, 16 * place))
        _check(offset, size, largest)
        return os.pread(opened.descriptor, size, offset)

    return read


class _OpenFile:
    """Closes with its last reference, so the cache may drop it while another thread reads."""

    def __init__(self, path: str, reader: object):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


_open = lru_cache(maxsize=OPEN_FILES)(_OpenFile)


def read_memory(files: dict[int, bytes], largest: int) -> Read:
    """Read from files held in memory."""

    def read(file: int, place: int) -> bytes:
        offset, size = ENTRY.unpack_from(files[file], 16 * place)
        _check(offset, size, largest)
        return files[file][offset : offset + size]

    return read
