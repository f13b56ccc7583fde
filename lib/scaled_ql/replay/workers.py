"""Batches sampled ahead by separate processes, which do not contend for Python's lock as threads do.

A worker is a fresh Python that the program starts (a fork of one that has loaded JAX may hang). It reads the same
files or the same shared memory as the program, takes batch numbers from a pipe that all workers share, and writes
the frames to shared memory that the program's arrays view: no frame is copied. When the program ends, even killed, the
pipes close, the workers exit, and nothing is left behind.
"""

import math
import mmap
import os
import signal
import struct
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

import numpy as np

from scaled_ql.replay.batch import Batch
from scaled_ql.replay.format import FRAME_SHAPE
from scaled_ql.replay.sampling import prefetch, sample_batch
from scaled_ql.replay.sequences import Sequences
from scaled_ql.replay.shared import SharedMemory, pack, unpack
from scaled_ql.replay.store import Replay

Sample = Callable[..., Batch | Sequences]  # (replay, seed, step, **sampling)
TASK = struct.Struct("qq")  # number of a batch, place for it
WORKER = """
import sys
sys.path[:] = {path}
from scaled_ql.replay.workers import work
work{descriptors}
"""


def sample_batches(
    replay: Replay,
    seed: int,
    start: int,
    stop: int,
    *,
    sample: Sample = sample_batch,
    processes: int = 0,
    depth: int = 4,
    **sampling: Any,
) -> Iterator[Batch | Sequences]:
    """Yield sample(replay, seed, step, **sampling) for step = start, ..., stop - 1, `depth` of them ahead.

    Args:
        sample: `sample_batch` or `sample_sequences`.
        processes: number of processes, at most the cores that training leaves free; each takes a core and samples about
            6,000 transitions/s from disk or 10,000 from memory (measure with `scaled-ql benchmark sampling`). 0: two
            threads of this process (`prefetch`), as always for a dataset on a device.
        depth: batches prepared while the caller works on one.
        sampling: arguments of `sample` except `out`.

    A batch's memory is reused only once no array refers to it, so batches may be kept. Closing the iterator ends the
    processes.

    Raises:
        ReplayError: damaged data, when its batch's turn comes, like any other error of `sample`.
        RuntimeError: a process died.
    """
    if not processes or not replay.is_shareable:
        return prefetch(partial(sample, replay, seed, **sampling), start, stop, depth=depth)
    return _sample_in_workers(replay, seed, range(start, stop), sample, processes, depth, sampling)


def _sample_in_workers(
    replay: Replay, seed: int, steps: range, sample: Sample, processes: int, depth: int, sampling: dict[str, Any]
) -> Iterator[Batch | Sequences]:
    options = sample.__kwdefaults__ | sampling
    size = options["games_per_batch"] * options["transitions_per_game"] // options["shard"][1]
    width = options["length"] if "length" in options else options["stack_size"] + options["n_step"]
    places = _Places((size, width, *FRAME_SHAPE))
    used: dict[int, int] = {}  # place of each batch under way
    ahead = iter(steps)
    with _Workers(partial(sample, replay, seed, **sampling), places, processes) as workers:
        for step in steps:
            while len(used) <= depth and (later := next(ahead, None)) is not None:
                used[later] = places.take()
                workers.begin(later, used[later])
            batch = workers.result(step)
            batch = batch._replace(frames=places.lend(used.pop(step)))
            yield batch
            del batch  # else the last batch's memory would still be in use


class _Places:
    """Places for batches' frames in shared memory, each reused once nothing refers to it.

    Args:
        shape: shape of a batch's frames, uint8.
    """

    def __init__(self, shape: tuple[int, ...]):
        self._memory, self._shape = SharedMemory(), shape
        self._size = max(-(-math.prod(shape) // mmap.ALLOCATIONGRANULARITY), 1) * mmap.ALLOCATIONGRANULARITY
        self._count, self._free, self._maps = 0, deque(), {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_free": deque(), "_maps": {}}

    def take(self) -> int:
        """Take a free place, or a new one."""
        if self._free:
            return self._free.popleft()
        self._count += 1
        self._memory.grow((2 ** self._count.bit_length() - 1) * self._size)  # only written pages take memory
        return self._count - 1

    def array(self, place: int) -> np.ndarray:
        """The frames at a place."""
        block = (place + 1).bit_length() - 1  # mapped together: one place, then two, four, ...; each costs a descriptor
        first = 2**block - 1
        if block not in self._maps:
            self._maps[block] = self._memory.map(first * self._size, 2**block * self._size)
        return np.ndarray(self._shape, np.uint8, self._maps[block], (place - first) * self._size)

    def lend(self, place: int) -> np.ndarray:
        """The frames at a place, which is freed when this array and all views of it are gone."""
        array = self.array(place)
        weakref.finalize(array, self._free.append, place).atexit = False
        return array


class _Workers:
    """Processes that sample; leaving the context ends them.

    Args:
        load: called with a batch number and `out`.
        places: destination of the frames.
        processes: number of processes.
    """

    def __init__(self, load: partial, places: _Places, processes: int):
        packed, descriptors = pack((load, places))
        tasks, self._tasks = os.pipe()
        self._processes: dict[Connection, subprocess.Popen] = {}
        self._results: dict[int, tuple[Batch | Sequences | None, Exception | None]] = {}
        try:
            for _ in range(processes):
                results, sender = Pipe(duplex=False)
                given = packed.descriptor, tasks, sender.fileno()
                code = WORKER.format(path=sys.path, descriptors=given)
                self._processes[results] = subprocess.Popen(
                    [sys.executable, "-c", code],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[*descriptors, tasks, sender.fileno()],
                    process_group=0,  # Ctrl-C is for the program
                )
                sender.close()  # so that the pipe ends with the process
        except BaseException:
            self.__exit__()
            raise
        finally:
            os.close(tasks)

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._tasks)
        for results, process in self._processes.items():
            results.close()
            process.kill()  # it only reads
        for process in self._processes.values():
            process.wait()

    def begin(self, step: int, place: int) -> None:
        """Request batch number `step`."""
        with suppress(BrokenPipeError):  # all are dead, which `result` reports
            os.write(self._tasks, TASK.pack(step, place))

    def result(self, step: int) -> Batch | Sequences:
        """Wait for batch number `step`; its frames are None, they lie in their place."""
        while step not in self._results:
            for results in wait(list(self._processes)):
                try:
                    number, *result = results.recv()
                except EOFError:
                    status = self._processes[results].wait()
                    raise RuntimeError(
                        f"a sampling process ended with status {status}. Its own message, if any, is above or in this "
                        "program's log; -9 often means out of memory: use fewer processes."
                    ) from None
                self._results[number] = result
        batch, error = self._results.pop(step)
        if error is not None:
            raise error
        return batch


def work(packed: int, tasks: int, results: int) -> None:
    """Run a worker, given the descriptors of its packed work and its two pipes, until one of these closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    load, places = unpack(packed)
    with Connection(results, readable=False) as sender, suppress(BrokenPipeError):
        while task := os.read(tasks, TASK.size):
            step, place = TASK.unpack(task)
            try:
                batch, error = load(step, out=places.array(place))._replace(frames=None), None
            except Exception as caught:
                batch, error = None, caught
            sender.send((step, batch, error))
