"""Devices: one mesh with an axis `data`, on one accelerator or on many, of one host or of several.

A batch is split along the axis, parameters are on every device (or split along it, too), and the compiler does the
rest: the train step is the same program text everywhere.
"""

import os
import warnings
from collections import deque
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax._src import xla_bridge  # no public function says whether JAX has started its devices
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from scaled_ql.processes import accelerators
from scaled_ql.replay.batch import Batch

PyTree = Any
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"  # includes xla_gpu_exclude_nondeterministic_ops, and no autotuning
SILENT_SECONDS = 60  # a host silent for longer counts as dead, and the others stop


class DeviceError(ValueError):
    """A choice of devices that does not work; the message names one that does."""


class OutOfMemory(MemoryError):
    """Not enough memory; the message has the numbers, and the parameters to lower."""


def join_cluster(distributed: bool) -> None:
    """Join the other processes of a distributed run; to be called before any device is touched.

    The environment names them: under Slurm, Open MPI, Kubernetes and on Cloud TPUs by itself; elsewhere set
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    A process that is alone on its host takes all of the host's accelerators; several take one each.

    Raises:
        DeviceError: the environment names no other processes.
    """
    if not distributed or jax.distributed.is_initialized():
        return
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: int(os.environ[name]) for name in names if name in os.environ}
    arguments = {"num_processes": given.get(names[0]), "process_id": given.get(names[1])}
    if _alone_on_host() and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        arguments["local_device_ids"] = []  # no restriction; by default JAX takes one device a process
    how = (
        "Set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID for each, or start them by Slurm, Open MPI "
        "or Kubernetes. For one process set distributed = False."
    )
    if given.get(names[0]) == 1:
        raise DeviceError(f"distributed is set, but JAX_NUM_PROCESSES is 1. {how}")
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=SILENT_SECONDS)
    except (ValueError, RuntimeError) as error:
        raise DeviceError(f"distributed is set, but the processes cannot find one another ({error}). {how}") from error
    if jax.process_count() == 1:
        jax.distributed.shutdown()
        raise DeviceError(f"distributed is set, but this is a single process. {how}")


def _alone_on_host() -> bool:
    """Whether Open MPI or Slurm started one process on each host; Open MPI's word counts where both have been at work.

    Under Slurm, Open MPI starts one daemon on each host, and what these start inherits the daemons' variables.
    """
    if local_size := os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        return local_size == "1"
    slurm = [os.environ.get(name) for name in ("SLURM_STEP_NUM_NODES", "SLURM_NTASKS")]
    return None not in slurm and slurm[0] == slurm[1]


def make_deterministic(deterministic: bool) -> None:
    """Have GPUs repeat programs bit for bit, as CPUs do; to be called before any device is touched.

    By default XLA chooses a GPU's kernels by timing them, and may choose others in the process that resumes a run; and
    some kernels sum in whatever order their threads come. With the flag that is set here XLA does neither, in all
    programs of this process, at the price of speed. On a CPU it changes nothing. That it suffices on a GPU is what XLA
    says, and has not been tested. False leaves the flags as they are: it does not take back an earlier True of this
    process, nor what XLA_FLAGS had before.

    Raises:
        DeviceError: JAX has started its devices, and read its flags, before.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    if not deterministic or DETERMINISTIC in flags:
        return
    if xla_bridge.backends_are_initialized():
        raise DeviceError(
            "deterministic = True, but JAX has started in this process without it. Restart the kernel and run the "
            "notebook from its beginning."
        )
    os.environ["XLA_FLAGS"] = " ".join([*flags, DETERMINISTIC])


def make_mesh(num_devices: int = 0) -> Mesh:
    """Make a mesh of the first `num_devices` devices (0: all), with one axis, `data`.

    Warns if this machine has an NVIDIA device that JAX does not see, unless JAX_PLATFORMS excludes it.

    Raises:
        DeviceError: too few devices, or none of the platform in JAX_PLATFORMS.
    """
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter from a jaxlib without accelerators
        platforms = jax.config.jax_platforms or "any"
        raise DeviceError(
            f"JAX_PLATFORMS = {platforms}, but the installed jaxlib has no such device ({error or 'CPU only'}). "
            "Install jax for it, as in pip install -e 'lib[cuda13]', or unset JAX_PLATFORMS."
        ) from error
    if devices[0].platform == "cpu" and not jax.config.jax_platforms and accelerators():
        warnings.warn(
            f"this machine has {len(accelerators())} NVIDIA device(s), but JAX computes on the CPU. Install JAX for "
            "CUDA: pip install -e 'lib[cuda13]', or 'lib[cuda12]' where the driver is older than CUDA 13's (580).",
            stacklevel=2,
        )
    if num_devices > len(devices):
        kinds = ", ".join(sorted({device.device_kind for device in devices}))
        raise DeviceError(
            f"num_devices = {num_devices}, but there are {len(devices)} ({kinds}). Use 0 for all of them."
        )
    if num_devices and jax.process_count() > 1 and num_devices != len(devices):
        raise DeviceError(
            f"num_devices = {num_devices}: several processes use all their {len(devices)} devices; use 0."
        )
    return Mesh(np.array(devices[: num_devices or None]), ("data",))


def describe(mesh: Mesh) -> list[str]:
    """Platform and kind of each device."""
    return [f"{device.platform}:{device.device_kind}" for device in mesh.devices.flat]


def check_batch(size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Check that a batch can be split over the mesh, and each part into `accumulate` equal ones.

    Raises:
        DeviceError: the size is not divisible.
    """
    parts = mesh.size * accumulate
    if size % parts:
        into = f"{mesh.size} devices" + (f" x {accumulate} accumulated parts" if accumulate > 1 else "")
        raise DeviceError(
            f"a batch of {size} transitions (games_per_batch x transitions_per_game) cannot be split over {into}. "
            f"Use a multiple of {parts}, such as {max(size // parts, 1) * parts}, or other devices."
        )


def state_shardings(state: PyTree, mesh: Mesh, split: bool = False) -> PyTree:
    """Sharding of each array of a training state: replicated, or with `split` its longest divisible axis on `data`.

    Splitting is ZeRO (Rajbhandari et al., 2020) by annotation alone: parameters, target and Adam's moments take a share
    of the memory on each device, and are gathered where they are used.
    """

    def sharding(leaf: Any) -> NamedSharding:
        axes = [axis for axis, size in enumerate(np.shape(leaf)) if split and size % mesh.size == 0]
        if not axes:
            return NamedSharding(mesh, P())
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, P(*[None] * longest, "data"))

    return jax.tree.map(sharding, state)


def place_state(state: PyTree, shardings: PyTree) -> PyTree:
    """Put a state, which every process holds in full, onto its shardings."""

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, state, shardings)


def place_batches(batches: Iterator[Batch], mesh: Mesh, ahead: int = 2) -> Iterator[Batch]:
    """Send batches, or this process's shares of them, to the mesh, `ahead` of them before they are needed."""
    sharding, waiting = NamedSharding(mesh, P("data")), deque()

    def place(batch: Batch) -> Batch:
        if jax.process_count() == 1:
            return jax.device_put(batch, sharding)
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch)

    for batch in batches:
        waiting.append(place(batch))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def whole(tree: PyTree) -> PyTree:
    """Gather a tree on a mesh as whole NumPy arrays; if other processes hold parts, all must call this."""

    def fetch(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            from jax.experimental import multihost_utils

            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)


def on_device(tree: PyTree) -> PyTree:
    """Gather a tree on a mesh onto the default device; all processes must call this."""
    return jax.device_put(whole(tree))


def free_bytes(device: jax.Device) -> int:
    """Memory that a device offers: an accelerator's limit, or the machine's free memory."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return psutil.virtual_memory().available


def tree_bytes(tree: PyTree) -> int:
    """Bytes of all arrays of a tree, which may be abstract."""
    return sum(int(np.prod(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
