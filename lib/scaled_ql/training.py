"""Training: state, the jitted step, the loop as a generator, checkpoints."""

import json
import logging
import math
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pandas as pd
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from scaled_ql import devices
from scaled_ql.networks import BCQNetwork, QNetwork
from scaled_ql.objectives import Metrics, Objective, PyTree
from scaled_ql.replay.store import Batch

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every save there


HEADS = {"head_kernel", "q/head_kernel"}  # in the parameters of a `QNetwork`, of a `BCQNetwork`


class TrainState(NamedTuple):
    """All that a step changes; with the data's seed it determines the rest of the run.

    Attributes:
        step: int32 scalar, steps done.
        params: the online network's parameters.
        target_params: the target network's.
        opt_state: of the optimizer.
    """

    step: jax.Array
    params: PyTree
    target_params: PyTree
    opt_state: PyTree


class Diverged(RuntimeError):
    """The loss is not finite any more."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or is not of this run."""


def make_optimizer(
    learning_rate: float = 2e-4, adam_epsilon: float = 3.125e-4, decay_steps: int = 0
) -> optax.GradientTransformation:
    """Adam; its learning rate is constant, or falls linearly to 0 over `decay_steps`.

    The paper does not say epsilon. 0.01 / 32 is what its single-game ancestors use at batch 32; the same rule gives
    0.01 / 512 for the paper's batch. Either can exceed the head's gradients by far: see `epsilon_warning`.
    """
    rate = optax.linear_schedule(learning_rate, 0.0, decay_steps) if decay_steps else learning_rate
    return optax.adam(rate, eps=adam_epsilon)


def epsilon_warning(head_grad_rms: float, adam_epsilon: float) -> str:
    """What to say of a run whose Adam is ruled by its epsilon; an empty string of another.

    Adam divides a gradient's mean by the root of its mean square plus epsilon. An epsilon far above that root takes the
    normalisation out: all steps shrink by the ratio of the two. Here the line is drawn at 10.

    Args:
        head_grad_rms: of `make_update`, an average over a run's early steps. Gradients shrink as a run converges, and
            a late one says nothing of how it learned.
        adam_epsilon: of `make_optimizer`.
    """
    if head_grad_rms == 0:
        return "The head has no gradient: this run learns nothing."
    ratio = adam_epsilon / head_grad_rms
    if not ratio > 10:
        return ""
    return (
        f"Adam's epsilon ({adam_epsilon:.1e}) is {ratio:,.0f} times the head's gradient ({head_grad_rms:.1e} RMS): "
        "this run learns hardly anything."
    )


def init_state(
    network: QNetwork | BCQNetwork, optimizer: optax.GradientTransformation
) -> tuple[nnx.GraphDef, TrainState]:
    """Split a network once into a static graph definition and the state of a fresh run."""
    graph, variables = nnx.split(network, nnx.Param)
    params = jax.tree.map(jnp.copy, nnx.to_pure_dict(variables))  # steps donate them; the network keeps its own
    state = TrainState(jnp.int32(0), params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    return graph, state


def apply(graph: nnx.GraphDef, params: PyTree, observation: jax.Array, game: jax.Array) -> jax.Array:
    """The network as a pure function of its parameters; see `QNetwork.__call__`."""
    return nnx.merge(graph, nnx.State(params))(observation, game)


def make_update(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    target_update_period: int = 2_000,
    accumulate: int = 1,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """One step as a pure function: the objective's gradient, Adam, and now and then a copy to the target network.

    Args:
        objective: from `objectives`.
        optimizer: the one that made the state.
        target_update_period: steps between copies of the online to the target network.
        accumulate: parts of the batch whose gradients are taken one after another and averaged: the memory of one part,
            the result of the whole.

    Returns:
        (state, batch, key of the run) -> (state, metrics): the objective's, `grad_norm`, and of a `QNetwork` or a
        `BCQNetwork`'s Q-network `head_grad_rms`, the root of the mean square of the head kernel's gradient, those
        outputs included that no game of the batch has.
    """
    gradient = jax.grad(objective, has_aux=True)

    def of_parts(params: PyTree, target_params: PyTree, batch: Batch, key: jax.Array) -> tuple[PyTree, Metrics]:
        # Every accumulate-th transition, so that each device has its share of each part.
        parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(total: tuple, part: tuple[Batch, jax.Array]) -> tuple[tuple, None]:
            return jax.tree.map(jnp.add, total, gradient(params, target_params, *part)), None

        keys = jax.random.split(key, accumulate)
        first = jax.tree.map(lambda x: x[0], (parts, keys))
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, target_params, *first)
        )
        (gradients, metrics), _ = jax.lax.scan(add, zeros, (parts, keys))
        summed = ("_sum", "_count")
        metrics = {name: x if name.endswith(summed) else x / accumulate for name, x in metrics.items()}
        return jax.tree.map(lambda x: x / accumulate, gradients), metrics

    def update(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        take = gradient if accumulate == 1 else of_parts
        gradients, metrics = take(state.params, state.target_params, batch, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        target_params = optax.periodic_update(params, state.target_params, step, target_update_period)
        # Row by row: as one sum, XLA takes 2 s on a CPU for 40 games' heads (40 x 918 is no multiple of 32).
        squares = {
            jax.tree_util.keystr(path, simple=True, separator="/"): (
                jax.lax.optimization_barrier(jnp.square(x).sum(-1)).sum(),
                x.size,
            )
            for path, x in jax.tree_util.tree_leaves_with_path(gradients)
        }
        metrics["grad_norm"] = jnp.sqrt(sum(total for total, _ in squares.values()))
        for name in HEADS & squares.keys():
            total, size = squares[name]
            metrics["head_grad_rms"] = jnp.sqrt(total / size)
        return TrainState(step, params, target_params, opt_state), metrics

    return update


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    target_update_period: int = 2_000,
    seed: int = 0,
    accumulate: int = 1,
    shardings: PyTree = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Compile `make_update`.

    Args:
        objective, optimizer, target_update_period, accumulate: as there.
        seed: of an objective's own randomness; step t's is a function of (seed, t).
        shardings: where the state lies on a mesh (`devices.state_shardings`), and stays; batches are split along it.

    Returns:
        (state, batch) -> (state, metrics). The state passed in is donated: use the one returned.
    """
    update, run_key = make_update(objective, optimizer, target_update_period, accumulate), jax.random.key(seed)
    where = {}
    if shardings is not None:
        everywhere = NamedSharding(jax.tree.leaves(shardings)[0].mesh, PartitionSpec())
        where = {"out_shardings": (shardings, everywhere)}
    compiled = jax.jit(update, donate_argnums=0, **where)
    return lambda state, batch: compiled(state, batch, run_key)  # an argument: one program for all seeds


def memory_needed(
    objective: Objective,
    state: TrainState,
    batch: Batch,
    accumulate: int = 1,
    parts: int = 1,
    split: bool = False,
) -> dict[str, int]:
    """Bytes that a step takes on a device, reckoned before anything is compiled.

    Args:
        objective: of the step.
        state: of the run; may be abstract, and so may `batch`, the whole batch.
        accumulate: as in `make_update`.
        parts: devices that share the batch.
        split: they share the state, too.

    Returns:
        `state` (parameters, target, Adam's moments) and `gradients`; `activations`: what the backward pass needs of
        the forward pass, as automatic differentiation keeps it (a compiler may keep less, or need more for a moment);
        `total`.
    """
    rows = len(batch.game) // accumulate // parts
    part = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)

    def kept(params: PyTree, target_params: PyTree, part: Batch) -> Any:
        loss = lambda params: objective(params, target_params, part, jax.random.key(0))[0]  # noqa: E731
        return jax.vjp(loss, params)[1]

    residuals = jax.tree.leaves(jax.eval_shape(kept, state.params, state.target_params, part))
    params = devices.tree_bytes(state.params)
    needed = {
        "state": devices.tree_bytes(state) // (parts if split else 1),
        "gradients": params * (2 if accumulate > 1 else 1),
        "activations": max(devices.tree_bytes(residuals) - params, 0),
    }
    return needed | {"total": sum(needed.values())}


def check_memory(needed: dict[str, int], device: jax.Device) -> None:
    """Refuse a step that a device has not the memory for.

    Raises:
        OutOfMemory: with the numbers of `memory_needed`.
    """
    free = devices.free_bytes(device)
    if needed["total"] > free:
        numbers = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in needed.items() if name != "total")
        raise devices.OutOfMemory(
            f"a step is reckoned to take {needed['total'] / 1e9:.1f} GB ({numbers}); {device.device_kind} has "
            f"{free / 1e9:.1f} GB free. Raise accumulate, set remat, shard_parameters (several devices) or dtype "
            "bfloat16, use a smaller encoder, or lower games_per_batch (which is another experiment)."
        )


def cache_compiled_programs() -> None:
    """Keep compiled programs in ~/.cache, or where JAX_COMPILATION_CACHE_DIR says: later runs start sooner."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "scaled-ql" / "xla"))


def train(
    state: TrainState,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    batches: Iterator[Batch],
    games: list[str],
    *,
    log_every: int,
    checkpoint_every: int,
    checkpoints: "Checkpoints",
) -> Iterator[tuple[TrainState, dict[str, float]]]:
    """Run a step per batch; a generator, so that logging and display stay the caller's.

    Checks every step's loss, one step behind the device so that it never waits, and writes a checkpoint every
    `checkpoint_every` steps, after all steps up to it were checked.

    Args:
        state: to start from; donated.
        train_step: from `make_train_step`.
        batches: one per step, beginning with the one after `state.step`; a multiple of `log_every` in all.
        games: names, for per-game metrics and errors.
        log_every: steps averaged into one row of metrics.
        checkpoint_every: a multiple of `log_every`.
        checkpoints: where to write them.

    Yields:
        (state, row) every `log_every` steps: `step`, the metrics of `make_train_step` averaged over the rows'
        steps, `td_loss/<game>` or `nll/<game>` (NaN where a game was not drawn), `steps_per_second`,
        `transitions_per_second`.

    Raises:
        Diverged: a loss or gradient is NaN or infinite; names the step, the games in its batch and the last checkpoint.
    """
    window: list[dict[str, np.ndarray]] = []
    unchecked: tuple[int, Metrics] | None = None

    def check() -> None:
        step, metrics = unchecked
        values = jax.device_get(metrics)
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            (counts,) = (value for name, value in values.items() if name.endswith("_count"))
            names = ", ".join(game for game, count in zip(games, counts) if count)
            raise Diverged(
                f"the loss is {values['loss']} at step {step} ({_scalars(values)}). "
                f"Games in the batch: {names}. {checkpoints.describe_latest()} Lower learning_rate, "
                "or look at the data of these games, and start again under another run name."
            )
        window.append(values)

    step, started = int(state.step), time.perf_counter()
    for batch in batches:
        try:
            state, metrics = train_step(state, batch)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise devices.OutOfMemory(
                f"step {step + 1} does not fit into the device's memory ({str(error).splitlines()[0]}). Raise "
                "accumulate, set remat or shard_parameters, or lower games_per_batch (which is another experiment). "
                f"{checkpoints.describe_latest()}"
            ) from error
        step += 1
        if unchecked is not None:
            check()
        unchecked = (step, metrics)
        if step % log_every == 0:
            check()
            unchecked = None
            row = _average(window, games)
            seconds = time.perf_counter() - started
            row |= {
                "step": step,
                "steps_per_second": len(window) / seconds,
                "transitions_per_second": len(window) * len(batch.game) / seconds,
            }
            window.clear()
            if step % checkpoint_every == 0:
                checkpoints.save(state)
            yield state, row
            started = time.perf_counter()


def _scalars(metrics: dict[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {value}" for name, value in metrics.items() if name != "loss" and not np.ndim(value))


def _average(window: list[dict[str, np.ndarray]], games: list[str]) -> dict[str, float]:
    sums = {name: sum(row[name] for row in window) for name in window[0]}
    row = {name: float(total / len(window)) for name, total in sums.items() if not np.ndim(total)}
    for name in [name.removesuffix("_sum") for name in sums if name.endswith("_sum")]:
        parts = zip(games, sums[f"{name}_sum"], sums[f"{name}_count"])
        row |= {f"{name}/{game}": float(total / count) if count else math.nan for game, total, count in parts}
    return row


class MetricsLog:
    """Rows of metrics in a JSON-lines file; a resumed run goes on behind its checkpoint's step."""

    def __init__(self, file: str | Path, step: int):
        """Keep the rows up to `step`: what came after it will be done again."""
        self.file = Path(file)
        lines = self.file.read_text().splitlines(keepends=True) if self.file.exists() else []
        complete = [json.loads(line) for line in lines if line.endswith("\n")]
        self.rows = [row for row in complete if row["step"] <= step]
        partial = self.file.with_name(f".{self.file.name}.partial")
        partial.write_text("".join(map(self._line, self.rows)))
        partial.replace(self.file)

    @staticmethod
    def _line(row: dict[str, float]) -> str:
        return json.dumps({name: None if value != value else value for name, value in row.items()}) + "\n"

    def append(self, row: dict[str, float]) -> None:
        """Add a row; NaN is written as null."""
        with self.file.open("a") as file:
            file.write(self._line(row))
        self.rows.append(row)

    def table(self) -> pd.DataFrame:
        """All rows."""
        return pd.DataFrame(self.rows).astype(float)


class Checkpoints:
    """Checkpoints of one run, written asynchronously; a checkpoint is complete or absent.

    Keeps the newest two (the newest may be found damaged) and every `keep_period`-th step.
    """

    def __init__(self, folder: str | Path, about: dict[str, Any], keep_period: int | None = None):
        """Open a folder of checkpoints, creating it where needed.

        Args:
            folder: for the checkpoints alone.
            about: JSON values that make a checkpoint of this run (architecture, games, dataset); saved with
                each, and compared when one is loaded.
            keep_period: steps whose multiples are never deleted.
        """
        policies: list[Any] = [ocp.checkpoint_managers.LatestN(2)]
        if keep_period:
            policies.append(ocp.checkpoint_managers.EveryNSteps(keep_period))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )
        self.folder, self.about = Path(folder).absolute(), about
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "about"))

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None; waits for one that is being written."""
        self.wait()
        self._manager.reload()
        return self._manager.latest_step()

    def describe_latest(self) -> str:
        """A sentence for error messages."""
        try:
            step = self.latest_step()
        except CheckpointError as error:
            return str(error)
        return "There is no checkpoint yet." if step is None else f"Last good checkpoint: {self.folder / str(step)}."

    def save(self, state: TrainState) -> None:
        """Save a state; returns while it is being written.

        Raises:
            CheckpointError: the disk does not take it (also for the save before this one).
        """
        step, about = int(state.step), {"run": self.about, "crc32": _crc32(state)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()), about=ocp.args.JsonSave(about))
        self._writing(lambda: self._manager.save(step, args=items, force=True), step)

    def wait(self) -> None:
        """Return when all is on disk."""
        self._writing(self._manager.wait_until_finished, "in progress")

    def close(self) -> None:
        """Finish writing and let go of the folder."""
        self.wait()
        self._manager.close()

    def _writing(self, write: Callable[[], Any], step: int | str) -> None:
        try:
            write()
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.folder}: checkpoint {step} could not be written ({error}). Make room on the disk and run "
                "again: training goes on from the last complete checkpoint."
            ) from error

    def restore(self, state: TrainState) -> TrainState:
        """Load the newest checkpoint, or return `state` where there is none.

        Args:
            state: a state of the right structure and shapes; its values are not used.

        Raises:
            CheckpointError: the checkpoint is of another architecture, other games or other data, or damaged.
        """
        step = self.latest_step()
        if step is None:
            return state
        where = self.folder / str(step)
        damaged = f"{where}: cannot be loaded (%s). Delete this folder to go on from the checkpoint before it."
        try:
            stored = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
            theirs = stored["run"]
        except Exception as error:  # Orbax raises many kinds
            raise CheckpointError(damaged % error) from error
        differences = [
            f"{key}: {theirs.get(key)!r} in the checkpoint, {self.about.get(key)!r} here"
            for key in sorted(theirs.keys() | self.about.keys())
            if theirs.get(key) != self.about.get(key)
        ]
        if differences:
            raise CheckpointError(
                f"{where} is a checkpoint of something else: {'; '.join(differences)}. Choose another run name, "
                "or delete the run's folder to start it anew."
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state._asdict())
        try:
            items = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        except Exception as error:
            raise CheckpointError(damaged % error) from error
        loaded = TrainState(**items["state"])
        if _crc32(loaded) != stored["crc32"]:
            raise CheckpointError(damaged % "its contents differ from their CRC-32")
        return loaded


def _crc32(state: TrainState) -> int:
    crc = 0
    for leaf in jax.tree.leaves(devices.whole(state)):
        crc = zlib.crc32(np.ascontiguousarray(leaf), crc)
    return crc
