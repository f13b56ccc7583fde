"""Memory shared by several processes, and the transfer of values that refer to it."""

import mmap
import os
import pickle
import tempfile
from functools import cached_property
from typing import Any


class SharedMemory:
    """Anonymous memory: the system frees it with the last process that holds it, however that process ends.

    Unlike a file below /dev/shm it is not limited by the size that a container gives that folder.

    Args:
        descriptor: descriptor inherited from the process that made the memory; by default the memory is new and empty.
    """

    def __init__(self, descriptor: int | None = None):
        if descriptor is None:
            try:
                descriptor = os.memfd_create("scaled_ql")
            except AttributeError:  # only Linux has it; elsewhere a file that was deleted
                with tempfile.TemporaryFile() as file:
                    descriptor = os.dup(file.fileno())
        self.descriptor = descriptor

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def __reduce__(self) -> tuple:
        raise TypeError("shared memory is inherited, not copied: see `pack`.")

    def append(self, content: bytes) -> int:
        """Append content; returns its offset, a multiple of 64."""
        begin = end = -(-os.fstat(self.descriptor).st_size // 64) * 64
        rest = memoryview(content)
        while len(rest):
            written = os.pwrite(self.descriptor, rest, end)  # at most 2 GB at once
            end, rest = end + written, rest[written:]
        return begin

    def grow(self, size: int) -> None:
        """Make it at least `size` bytes long; new bytes are zero and take no memory until written."""
        if os.fstat(self.descriptor).st_size < size:
            os.ftruncate(self.descriptor, size)

    def map(self, begin: int, size: int) -> mmap.mmap:
        """Map a part, from a multiple of the page size on, for reading and writing."""
        return mmap.mmap(self.descriptor, size, offset=begin)

    @cached_property
    def content(self) -> mmap.mmap:
        """All of it, mapped on first use, after the last `append`. A slice of it is bytes."""
        return self.map(0, 0)


class _Pickler(pickle.Pickler):
    """Leaves shared memory out: another process inherits it, under the same descriptor."""

    def __init__(self, file: Any):
        super().__init__(file, protocol=5)
        self.descriptors: set[int] = set()

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, SharedMemory):
            return None
        self.descriptors.add(value.descriptor)
        return value.descriptor


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any):
        super().__init__(file)
        self._inherited: dict[int, SharedMemory] = {}

    def persistent_load(self, descriptor: int) -> SharedMemory:
        if descriptor not in self._inherited:
            self._inherited[descriptor] = SharedMemory(descriptor)
        return self._inherited[descriptor]


def pack(value: Any) -> tuple[SharedMemory, list[int]]:
    """Pickle a value into shared memory; shared memory that it refers to is not copied.

    Returns:
        the pickle, and the descriptors that a process must inherit to `unpack` it, the pickle's own among them.
    """
    packed = SharedMemory()
    with open(packed.descriptor, "wb", closefd=False) as file:
        pickler = _Pickler(file)
        pickler.dump(value)
    return packed, sorted(pickler.descriptors | {packed.descriptor})


def unpack(descriptor: int) -> Any:
    """Load what `pack` packed, in a process that inherited its descriptors; closes the pickle's own."""
    packed = SharedMemory(descriptor).content  # mapped: a position in the file would be shared with other processes
    return _Unpickler(packed).load()
