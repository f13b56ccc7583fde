"""Training: state, the jitted step, the loop as a generator, checkpoints."""

import contextlib
import json
import logging
import math
import shutil
import signal
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pandas as pd
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scaled_ql import devices, replay
from scaled_ql.defaults import ADAM_EPSILON, LEARNING_RATE, METHODS, TARGET_UPDATE_PERIOD
from scaled_ql.methods.common import MethodError, Metrics, Objective, PyTree, checked_objective
from scaled_ql.replay.batch import Batch
from scaled_ql.replay.sequences import Sequences
from scaled_ql.replay.store import Replay

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs every save


# In the parameters of a `QNetwork`, a `BCQNetwork`, a decision transformer, and what `mae` and `cpc` train.
HEADS = {"head_kernel", "q/head_kernel", "action_head/kernel", "painting/kernel", "bilinear/kernel"}


class TrainState(NamedTuple):
    """Everything that a step changes; with the data's seed it determines the rest of the run.

    Attributes:
        step: int32 scalar, steps done.
        params: parameters of the online network.
        target_params: parameters of the target network.
        opt_state: state of the optimizer.
    """

    step: jax.Array
    params: PyTree
    target_params: PyTree
    opt_state: PyTree


class Diverged(RuntimeError):
    """A loss or gradient is not finite."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or is not of this run."""


class Optimizer(NamedTuple):
    """An `optax.GradientTransformation` that also names the frozen parameters.

    Attributes:
        init, update: as in Optax; gradients and parameters may have `optax.MaskedNode` in place of frozen ones.
        frozen: see `make_optimizer`.
    """

    init: Callable
    update: Callable
    frozen: tuple[str, ...] = ()


def is_part(path: str, names: Sequence[str]) -> bool:
    """Whether a parameter's path (``q/encoder/conv/kernel``) is, or lies below, one of the names (``q/encoder``)."""
    return any(f"{path}/".startswith(f"{name}/") for name in names)


def flat_params(params: PyTree) -> dict[str, Any]:
    """Parameters by their path, such as ``hidden/0/kernel``; `trained_part` leaves a `MaskedNode` for frozen ones."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_masked)
    return {_path_name(path): leaf for path, leaf in leaves}


def trained_part(params: PyTree, frozen: Sequence[str]) -> PyTree:
    """`params` with `optax.MaskedNode`, which has no arrays, in place of each frozen one.

    Gradients are taken with respect to this tree, so none is computed, or stored, for frozen parameters.
    """

    def masked(path: tuple, leaf: Any) -> Any:
        return optax.MaskedNode() if is_part(_path_name(path), frozen) else leaf

    return jax.tree_util.tree_map_with_path(masked, params)


def joined(trained: PyTree, params: PyTree) -> PyTree:
    """All parameters: those of `trained`, a `trained_part`, and of `params` those that it leaves out."""
    return jax.tree.map(lambda ours, all_: all_ if _is_masked(ours) else ours, trained, params, is_leaf=_is_masked)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _path_name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def make_optimizer(
    learning_rate: float = LEARNING_RATE,
    adam_epsilon: float = ADAM_EPSILON,
    decay_steps: int = 0,
    frozen: tuple[str, ...] = (),
    *,
    kind: Literal["adam", "lamb"] = "adam",
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 0.0,
) -> Optimizer:
    """Adam or LAMB; the learning rate is constant, or falls linearly to 0 until `decay_steps`, after a warm-up.

    The paper does not give epsilon. Its single-game ancestors use 0.01 / 32 at batch 32; the same rule gives 0.01 / 512
    for the paper's batch. Either can exceed the head's gradients by far: see `epsilon_warning`.

    Args:
        learning_rate: initial, or after the warm-up, learning rate.
        adam_epsilon: added to the root of the second moment.
        decay_steps: the step at which the learning rate is 0 again; 0: it stays constant.
        frozen: names of parameters, or of parts of the network, that are not updated and have neither gradients nor
            moments: ``("behaviour",)`` in BCQ, ``("encoder", "embedding")`` or ``("q/encoder",)`` in transfer.
        kind: ``lamb`` scales Adam's step of each array by the array's norm (You et al., 2020), for the large batches of
            transformers.
        warmup_steps: steps over which the learning rate rises linearly from 0.
        weight_decay: share of a kernel that is subtracted from it in every step, times the learning rate (AdamW,
            Loshchilov & Hutter, 2019); what is not named a kernel keeps its size: biases, scales, mean frames.
        max_grad_norm: longer gradients, of all trained parameters together, are shortened to it; 0: none is.

    Raises:
        ValueError: when the state is made, a frozen name is not among the parameters, or all of them are frozen.
    """
    rate: Any = optax.linear_schedule(learning_rate, 0.0, decay_steps - warmup_steps) if decay_steps else learning_rate
    if warmup_steps:
        after = rate if decay_steps else optax.constant_schedule(learning_rate)
        rate = optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup_steps), after], [warmup_steps])
    decay = {}
    if weight_decay:
        kernels = partial(jax.tree_util.tree_map_with_path, lambda path, _: _path_name(path).endswith("kernel"))
        decay = {"weight_decay": weight_decay, "mask": kernels}
    adam = {"adam": optax.adamw if decay else optax.adam, "lamb": optax.lamb}[kind](rate, eps=adam_epsilon, **decay)
    if max_grad_norm:
        adam = optax.chain(optax.clip_by_global_norm(max_grad_norm), adam)
    if not frozen:
        return Optimizer(*adam)

    def labels(params: PyTree) -> PyTree:
        paths = flat_params(params)
        missing = [name for name in frozen if not any(is_part(path, [name]) for path in paths)]
        if missing:
            raise ValueError(f"nothing to freeze by the name of {', '.join(sorted(missing))} in {', '.join(params)}.")
        if all(is_part(path, frozen) for path in paths):
            raise ValueError(f"everything is frozen ({', '.join(params)}): nothing is left to train. Freeze less.")
        label = lambda path, _: "frozen" if is_part(_path_name(path), frozen) else "trained"  # noqa: E731
        return jax.tree_util.tree_map_with_path(label, params)

    return Optimizer(*optax.partition({"trained": adam, "frozen": optax.set_to_zero()}, labels), frozen)


def epsilon_warning(head_grad_rms: float, adam_epsilon: float) -> str:
    """Warning for a run in which epsilon dominates Adam's step; otherwise an empty string.

    Adam divides a gradient's mean by the root of its mean square plus epsilon. An epsilon far above that root removes
    the normalisation: all steps shrink by the ratio of the two. The threshold is a ratio of 10.

    Args:
        head_grad_rms: from `make_update`, an average over a run's early steps. Gradients shrink as a run converges, so
            late ones do not show how it learned.
        adam_epsilon: see `make_optimizer`.
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


def init_state(network: nnx.Module, optimizer: optax.GradientTransformation) -> tuple[nnx.GraphDef, TrainState]:
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
    target_update_period: int = TARGET_UPDATE_PERIOD,
    accumulate: int = 1,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """One step as a pure function: the objective's gradient, Adam, and a periodic copy to the target network.

    Args:
        objective: (params, target_params, batch, key) -> (loss, metrics), of a method or your own;
            `methods.common.checked_objective` specifies the metrics.
        optimizer: the optimizer that made the state.
        target_update_period: steps between copies of the online to the target network.
        accumulate: parts of the batch whose gradients are taken one after another and averaged: the memory of one part,
            the result of the whole.

    Returns:
        (state, batch, key of the run) -> (state, metrics): the objective's metrics, `grad_norm`, and for a `QNetwork`
        or a `BCQNetwork`'s Q-network `head_grad_rms`, the root of the mean square of the head kernel's gradient,
        including outputs that no game of the batch has. Parameters that the optimizer has `frozen` have no gradient.

    Raises:
        MethodError: the objective returns something else; raised when traced.
    """
    objective = checked_objective(objective)
    frozen = getattr(optimizer, "frozen", ())  # Optax's own optimizers train everything

    def loss(trained: PyTree, params: PyTree, target_params: PyTree, batch: Batch, key: jax.Array) -> tuple:
        return objective(joined(trained, params), target_params, batch, key)

    gradient = jax.grad(loss, has_aux=True)

    def of_parts(trained: PyTree, params: PyTree, target_params: PyTree, batch: Batch, key: jax.Array) -> tuple:
        # Every accumulate-th transition, so that each device has its share of each part.
        parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(total: tuple, part: tuple[Batch, jax.Array]) -> tuple[tuple, None]:
            return jax.tree.map(jnp.add, total, gradient(trained, params, target_params, *part)), None

        keys = jax.random.split(key, accumulate)
        first = jax.tree.map(lambda x: x[0], (parts, keys))
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, trained, params, target_params, *first)
        )
        (gradients, metrics), _ = jax.lax.scan(add, zeros, (parts, keys))
        summed = ("_sum", "_count")
        metrics = {name: x if name.endswith(summed) else x / accumulate for name, x in metrics.items()}
        return jax.tree.map(lambda x: x / accumulate, gradients), metrics

    def update(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        take = gradient if accumulate == 1 else of_parts
        trained = trained_part(state.params, frozen)
        gradients, metrics = take(trained, state.params, state.target_params, batch, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
        params = joined(optax.apply_updates(trained, updates), state.params)
        step = state.step + 1
        target_params = optax.periodic_update(params, state.target_params, step, target_update_period)
        # Row by row: as one sum, XLA takes 2 s on a CPU for 40 games' heads (40 x 918 is no multiple of 32).
        squares = {
            _path_name(path): (jax.lax.optimization_barrier(jnp.square(x).sum(-1)).sum(), x.size)
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
    target_update_period: int = TARGET_UPDATE_PERIOD,
    seed: int = 0,
    accumulate: int = 1,
    shardings: PyTree = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Compile `make_update`, for one batch or for several in a row.

    Several steps of one program are the same steps but for rounding, since XLA fuses the end of one with the beginning
    of the next. On a CPU their loop is unrolled, and takes the longer to compile: left as a loop, a step of the
    quickstart's network took two to three times as long there.

    Args:
        objective, optimizer, target_update_period, accumulate: see `make_update`.
        seed: seed of an objective's randomness; step t's is a function of (seed, t).
        shardings: shardings of the state on a mesh (`devices.state_shardings`); batches are split along it.

    Returns:
        (state, *batches) -> (state, metrics), a step for each batch. The state passed in is donated: use the one
        returned. The metrics of several batches have a leading axis of steps.
    """
    update, run_key = make_update(objective, optimizer, target_update_period, accumulate), jax.random.key(seed)

    def updates(state: TrainState, batches: tuple[Batch, ...], key: jax.Array) -> tuple[TrainState, Metrics]:
        if len(batches) == 1:
            return update(state, *batches, key)
        stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
        unroll = jax.default_backend() == "cpu"
        return jax.lax.scan(lambda state, batch: update(state, batch, key), state, stack, unroll=unroll)

    where = {}
    if shardings is not None:
        everywhere = NamedSharding(jax.tree.leaves(shardings)[0].mesh, PartitionSpec())
        where = {"out_shardings": (shardings, everywhere)}
    compiled = jax.jit(updates, donate_argnums=0, **where)
    return lambda state, *batches: compiled(state, batches, run_key)  # an argument: one program for all seeds


def memory_needed(
    objective: Objective,
    state: TrainState,
    batch: Batch,
    accumulate: int = 1,
    parts: int = 1,
    split: bool = False,
    frozen: tuple[str, ...] = (),
    steps_per_dispatch: int = 1,
) -> dict[str, int]:
    """Estimate the bytes that a step takes on a device, before anything is compiled.

    Args:
        objective: objective of the step.
        state: state of the run; may be abstract, and so may `batch`, the whole batch.
        accumulate: see `make_update`.
        parts: devices that share the batch.
        split: whether they share the state, too.
        frozen: see `make_optimizer`.
        steps_per_dispatch: see `train`.

    Returns:
        `state` (parameters, target, Adam's moments) and `gradients`; `activations`: residuals of the forward pass that
        automatic differentiation keeps for the backward pass (a compiler may keep less, or briefly need more);
        `batches` of a dispatch, those of several steps twice, as `make_train_step` stacks them; `total`.
    """
    rows = len(batch.game) // accumulate // parts
    part = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)

    def kept(params: PyTree, target_params: PyTree, part: Batch) -> Any:
        loss = lambda trained: objective(joined(trained, params), target_params, part, jax.random.key(0))[0]  # noqa: E731
        return jax.vjp(loss, trained_part(params, frozen))[1]

    residuals = jax.tree.leaves(jax.eval_shape(kept, state.params, state.target_params, part))
    needed = {
        "state": devices.tree_bytes(state) // (parts if split else 1),
        "gradients": devices.tree_bytes(trained_part(state.params, frozen)) * (2 if accumulate > 1 else 1),
        "activations": _bytes_without(residuals, state.params),
        "batches": devices.tree_bytes(batch) // parts * (1 if steps_per_dispatch == 1 else 2 * steps_per_dispatch),
    }
    return needed | {"total": sum(needed.values())}


def _bytes_without(residuals: list[jax.ShapeDtypeStruct], params: PyTree) -> int:
    """Bytes of residuals except parameters, which are counted elsewhere and recognised by shape and dtype."""
    kinds = Counter((tuple(x.shape), jnp.dtype(x.dtype)) for x in residuals)
    kinds -= Counter((tuple(x.shape), jnp.dtype(x.dtype)) for x in jax.tree.leaves(params))
    return sum(count * math.prod(shape) * dtype.itemsize for (shape, dtype), count in kinds.items())


def check_memory(needed: dict[str, int], device: jax.Device) -> None:
    """Refuse a step that exceeds a device's free memory.

    Raises:
        OutOfMemory: the estimate exceeds it; the message has the numbers of `memory_needed`.
    """
    free = devices.free_bytes(device)
    if needed["total"] > free:
        numbers = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in needed.items() if name != "total")
        raise devices.OutOfMemory(
            f"a step is estimated to take {needed['total'] / 1e9:.1f} GB ({numbers}); {device.device_kind} has "
            f"{free / 1e9:.1f} GB free. Raise accumulate, set remat, shard_parameters (several devices) or dtype "
            "bfloat16, lower steps_per_dispatch, use a smaller encoder, or lower games_per_batch (which is another "
            "experiment)."
        )


def cache_compiled_programs() -> None:
    """Keep compiled programs in ~/.cache, or in JAX_COMPILATION_CACHE_DIR, so that later runs start sooner."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "scaled-ql" / "xla"))


def train(
    state: TrainState,
    train_step: Callable[..., tuple[TrainState, Metrics]],
    batches: Iterator[Batch],
    games: list[str],
    *,
    log_every: int,
    checkpoint_every: int,
    steps_per_dispatch: int = 1,
    checkpoints: "Checkpoints",
) -> Iterator[tuple[TrainState, dict[str, float]]]:
    """Run a step per batch; a generator, so that logging and display stay the caller's.

    Every step's loss is checked, one dispatch behind the device so that it never waits. Checkpoints are written every
    `checkpoint_every` steps, after all steps up to there were checked, and at the end: of the batches, or of an
    interrupted run (also if the data fails), unless several processes train together. A consumer that may be
    interrupted closes the generator (`contextlib.closing`).

    Args:
        state: initial state; donated.
        train_step: from `make_train_step`.
        batches: one per step, beginning with the one after `state.step`.
        games: names, for per-game metrics and errors.
        log_every: steps averaged into one row of metrics.
        checkpoint_every: steps between checkpoints.
        steps_per_dispatch: steps that the device is given at once, with their batches; fewer, which is another program
            to compile, where a row or a checkpoint is due before. Python's share of a step is then paid once for all of
            them: on two cores a step of the quickstart took a tenth less CPU time with 2 or 4, and no less with 10.
            Rounding depends on what is dispatched together (see `make_train_step`), so a run is repeated bit for bit
            with the same steps_per_dispatch, log_every and checkpoint_every only. An interrupted run resumes from its
            last dispatch.
        checkpoints: destination of checkpoints, and the origin of a resumed run's `state`.

    Yields:
        (state, row) every `log_every` steps, and at the end if steps are left: `step`, the metrics of
        `make_train_step` averaged over the row's steps, `td_loss/<game>` or `nll/<game>` (NaN where a game was not
        drawn), `steps_per_second`, `transitions_per_second`.

    Raises:
        Diverged: a loss or gradient is NaN or infinite; names the step, the games in its batch and the last checkpoint.
    """
    window = list(checkpoints.window)
    unchecked: tuple[range, Metrics, int] | None = None
    step = saved = int(state.step)
    clock, intact = time.perf_counter(), True  # `state` is that of `step`, and no loss up to it is known to be bad

    def check() -> None:
        nonlocal unchecked, clock, intact
        if unchecked is None:
            return
        (steps, metrics, transitions), unchecked = unchecked, None
        metrics = jax.device_get(metrics)
        each = [metrics]
        if len(steps) > 1:
            each = [{name: x[i] for name, x in metrics.items()} for i in range(len(steps))]
        for step, values in zip(steps, each):
            (counts,) = (value for name, value in values.items() if name.endswith("_count"))
            if len(counts) != len(games):
                raise MethodError(f"an objective's sums per game must have {len(games)} numbers, got {len(counts)}.")
            if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                intact = False
                names = ", ".join(game for game, count in zip(games, counts) if count)
                raise Diverged(
                    f"the loss is {values['loss']} at step {step} ({_scalars(values)}). "
                    f"Games in the batch: {names}. {checkpoints.describe_latest()} Lower learning_rate, "
                    "or look at the data of these games, and start again under another run name."
                )
        now = time.perf_counter()
        took = {"seconds": (now - clock) / len(steps), "transitions": transitions}
        window.extend(values | took for values in each)
        clock = now

    def row() -> dict[str, float]:
        means = _average(window, games)
        per_second = 1 / means.pop("seconds")
        rates = {"steps_per_second": per_second, "transitions_per_second": per_second * means.pop("transitions")}
        return means | {"step": step} | rates

    def save() -> None:
        nonlocal saved
        with _interrupts_deferred():
            check()
            if step > saved:
                checkpoints.save(state, window)
                saved = step

    try:
        if window and step % log_every == 0:  # it was interrupted before the consumer surely had this row
            yield state, row()
            window.clear()
            clock = time.perf_counter()
        for stack in _stacks(batches, step, steps_per_dispatch, (log_every, checkpoint_every)):
            intact = False
            with _interrupts_deferred():  # a step donates its input: its result is the only state
                try:
                    state, metrics = train_step(state, *stack)
                except jax.errors.JaxRuntimeError as error:
                    if "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    raise devices.OutOfMemory(
                        f"step {step + 1} does not fit into the device's memory ({str(error).splitlines()[0]}). Raise "
                        "accumulate, set remat or shard_parameters, or lower steps_per_dispatch, or games_per_batch "
                        f"(which is another experiment). {checkpoints.describe_latest()}"
                    ) from error
                steps, intact = range(step + 1, step + 1 + len(stack)), True
                step = steps[-1]
                check()
                unchecked = (steps, metrics, len(stack[0].game))
                if step % log_every == 0:
                    check()
            if step % log_every == 0:
                yield state, row()
                window.clear()  # not before the row is the consumer's
                clock = time.perf_counter()
            if step % checkpoint_every == 0:
                save()
        check()
        if window:
            yield state, row()
            window.clear()
        save()
    except BaseException:
        if intact and jax.process_count() == 1:  # a save needs all processes, an interrupt reaches one
            save()
            checkpoints.wait()
        raise


def _stacks(batches: Iterator[Batch], done: int, size: int, periods: Sequence[int]) -> Iterator[list[Batch]]:
    """Batches of the steps after `done`, in groups of `size`; fewer where a period, or the last step, ends one.

    After `done` that is a group's end, the groups are those of an undisturbed run.
    """
    stack = []
    for step, batch in enumerate(batches, done + 1):
        stack.append(batch)
        if len(stack) == size or any(step % period == 0 for period in periods):
            yield stack
            stack = []
    if stack:
        yield stack


def resume(
    state: TrainState,
    train_step: Callable[..., tuple[TrainState, Metrics]],
    batches_from: Callable[[int], Iterator[Batch]],
    games: list[str],
    *,
    checkpoints: "Checkpoints",
    log_file: Path,
    tensorboard: bool = False,
    shardings: PyTree,
    log_every: int,
    checkpoint_every: int,
    steps_per_dispatch: int = 1,
) -> Iterator[tuple[TrainState, "MetricsLog"]]:
    """Train from the newest checkpoint to the last batch, or from `state` if there is none; see `train`.

    A consumer that may be interrupted closes this generator (`contextlib.closing`): it then leaves a checkpoint.

    Args:
        state: state of a fresh run.
        train_step, games, log_every, checkpoint_every, steps_per_dispatch: see `train`.
        batches_from: (steps done) -> the batches of the remaining steps, or this process's shares of them.
        checkpoints: checkpoints of the run, closed at the end.
        log_file, tensorboard: where the rows of metrics go, see `MetricsLog`.
        shardings: shardings of the state (`devices.state_shardings`).

    Yields:
        (state, log): once before the first step, so that a finished run yields, too; then after every row.

    Raises:
        CheckpointError: the checkpoint is from another run, or damaged.
        Diverged: see `train`.
    """
    state = checkpoints.restore(devices.place_state(state, shardings))
    log = MetricsLog(log_file, int(state.step), tensorboard)
    yield state, log
    batches = devices.place_batches(batches_from(int(state.step)), jax.tree.leaves(shardings)[0].mesh)
    periods = {"log_every": log_every, "checkpoint_every": checkpoint_every, "steps_per_dispatch": steps_per_dispatch}
    steps = train(state, train_step, batches, games, checkpoints=checkpoints, **periods)
    with contextlib.closing(steps), contextlib.closing(log):
        for state, row in steps:
            log.append(row)
            yield state, log
    checkpoints.close()


# Parameters saved with a checkpoint: architecture, objective, and the meaning of the outputs.
ABOUT = (
    "method", "encoder", "head", "rewards", "hidden_sizes", "embedding", "normalize_features", "group_size",
    "subtract_mean_frames", "narrow_start", "num_atoms", "v_min", "v_max", "dtype", "seed",
)  # fmt: skip
ABOUT_TRANSFORMER = ("transformer", "sequence_length", "return_low", "return_high")
# likewise, but not written where it is what it was before there was a choice
LATER = {"heads": "per_game", "tokenizer": "patches"}


def about_run(p: Any, games: list[str], dataset: str) -> dict[str, Any]:
    """`Checkpoints.about` of a run with the parameters of `04_scaled_training`, its games in the order of the heads."""
    own = [name for name in ABOUT_TRANSFORMER if name in METHODS[p.method][1]]
    own += [name for name, before in LATER.items() if getattr(p, name) != before]
    return {name: getattr(p, name) for name in (*ABOUT, *own)} | {"games": games, "dataset": dataset}


def start_devices(p: Any) -> Mesh:
    """Join the other processes, if any, and make the mesh for a notebook's parameters; before any device is touched.

    Raises:
        DeviceError: there are no such devices, the batch cannot be split over them, or JAX has started already and the
            run is to be deterministic.
    """
    devices.make_deterministic(p.deterministic)
    devices.join_cluster(p.distributed)
    mesh = devices.make_mesh(p.num_devices)
    devices.check_batch(p.games_per_batch * p.transitions_per_game, mesh, p.accumulate)
    cache_compiled_programs()
    return mesh


class Trainer:
    """A training loop's context besides network and objective: batches, devices, checkpoints and a log.

    Attributes:
        share: (number of this process, processes).
    """

    def __init__(self, p: Any, data: Replay, mesh: Mesh, folder: Path, own: Path):
        """Read and write nothing yet.

        Args:
            p: parameters like those of `04_scaled_training`.
            data: an open store.
            mesh: from `start_devices`.
            folder: folder of the run, for checkpoints that all its processes share.
            own: folder of this process, for its log.
        """
        self.p, self.data, self.mesh, self.folder, self.own = p, data, mesh, folder, own
        self.share = (jax.process_index(), jax.process_count())
        self._shape = {name: getattr(p, name) for name in ("games_per_batch", "transitions_per_game")}
        # Of each game, by discount; all rewards are read for them.
        self._returns_to_go = cache(
            lambda discount: [replay.returns_to_go(data, game, discount) for game in data.games]
        )

    def batch(self, kind: str = "transitions", step: int = 0) -> Batch | Sequences:
        """A step's whole batch; for `kind` see `Method.batches`."""
        sample, how = self._sampling(kind)
        batch = sample(self.data, self.p.seed, step, **how)
        return next(self._labelled(iter([batch]), kind, step, np.s_[:])) if "returns" in kind else batch

    def batches(self, kind: str, first: int) -> Iterator[Batch | Sequences]:
        """This process's shares of the batches of steps `first` to the last."""
        sample, how = self._sampling(kind)
        how |= {"processes": self.p.sampling_processes, "shard": self.share}
        batches = replay.sample_batches(self.data, self.p.seed, first, self.p.num_steps, sample=sample, **how)
        mine = replay.share_of(self.p.games_per_batch * self.p.transitions_per_game, self.share)
        return self._labelled(batches, kind, first, mine) if "returns" in kind else batches

    def _sampling(self, kind: str) -> tuple[Callable[..., Batch | Sequences], dict[str, Any]]:
        """What samples batches of a kind, and its arguments."""
        if "sequences" in kind:
            return replay.sample_sequences, self._shape | {"length": self.p.sequence_length}
        return replay.sample_batch, self._shape | {"n_step": self.p.n_step, "discount": self.p.discount}

    def _labelled(
        self, batches: Iterator[Batch | Sequences], kind: str, first: int, mine: slice
    ) -> Iterator[Batch | Sequences]:
        """Batches with their returns to go: transitions with discounted ones, windows with undiscounted ones."""
        windows = "sequences" in kind
        drawn = {"n_step": 0, "stack_size": self.p.sequence_length} if windows else {"n_step": self.p.n_step}
        returns = self._returns_to_go(1.0 if windows else self.p.discount)
        for step, batch in enumerate(batches, first):
            index = replay.sample_indices(self.data, self.p.seed, step, **drawn, **self._shape)[1][mine]
            yield replay.label_with_returns(batch, index, returns)

    def check_memory(
        self, objective: Objective, optimizer: Optimizer, state: TrainState, kind: str = "transitions"
    ) -> dict[str, int]:
        """Return `memory_needed`, after checking it against a device's free memory; for `kind` see `Method.batches`.

        Raises:
            OutOfMemory: see the function `check_memory`.
        """
        p = self.p
        sample, how = self._sampling(kind)
        batch = sample(self.data, p.seed, 0, **how)  # its shapes; labels change none
        split = {"accumulate": p.accumulate, "parts": self.mesh.size, "split": p.shard_parameters}
        more = {"frozen": optimizer.frozen, "steps_per_dispatch": p.steps_per_dispatch}
        needed = memory_needed(objective, state, batch, **split, **more)
        check_memory(needed, self.mesh.local_devices[0])
        return needed

    def steps(
        self, objective: Objective, optimizer: Optimizer, state: TrainState, kind: str = "transitions", part: str = ""
    ) -> Iterator[tuple[TrainState, "MetricsLog"]]:
        """Train, or resume, to the last step; yields and raises like `resume`, and is closed like it.

        Args:
            objective: objective of a step.
            optimizer: the optimizer that made `state`.
            state: state of an untrained network.
            kind: see `Method.batches`.
            part: folder below the run's, for a network that is trained before the one that plays.
        """
        p = self.p
        shardings = devices.state_shardings(state, self.mesh, split=p.shard_parameters)
        options = {"target_update_period": p.target_update_period, "accumulate": p.accumulate, "seed": p.seed}
        train_step = make_train_step(objective, optimizer, shardings=shardings, **options)
        about = about_run(p, self.data.games, self.data.identity())
        checkpoints = Checkpoints(self.folder / part / "checkpoints", about, p.keep_checkpoint_every)
        kept = {"checkpoints": checkpoints, "log_file": self.own / part / "metrics.jsonl", "tensorboard": p.tensorboard}
        periods = {name: getattr(p, name) for name in ("log_every", "checkpoint_every", "steps_per_dispatch")}
        batches = partial(self.batches, kind)
        return resume(state, train_step, batches, self.data.games, shardings=shardings, **kept, **periods)


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Defer Ctrl-C, or JupyterLab's interrupt, until the end of the block."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    waiting: list[tuple] = []
    signal.signal(signal.SIGINT, lambda *arguments: waiting.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if waiting:
        handler(*waiting[0])


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
    """Rows of metrics in a JSON-lines file; a resumed run continues after its checkpoint's step."""

    def __init__(self, file: str | Path, step: int, tensorboard: bool = False):
        """Keep the rows up to `step`; later steps will be repeated.

        Args:
            file: JSON lines, a row each.
            step: the restored checkpoint's.
            tensorboard: mirror the rows in TensorBoard's files, in the folder `tensorboard` beside the file, which is
                written anew.

        Raises:
            ModuleNotFoundError: tensorboardX is not installed.
        """
        self.file = Path(file)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True) if self.file.exists() else []
        complete = [json.loads(line) for line in lines if line.endswith("\n")]
        self.rows = [row for row in complete if row["step"] <= step]
        partial = self.file.with_name(f".{self.file.name}.partial")
        partial.write_text("".join(map(self._line, self.rows)), encoding="utf-8")
        partial.replace(self.file)
        self._mirror = tensorboard_writer(self.file.parent / "tensorboard") if tensorboard else None
        for row in self.rows:
            self._show(row)

    @staticmethod
    def _line(row: dict[str, float]) -> str:
        known = {name: value if value is not None and math.isfinite(value) else None for name, value in row.items()}
        return json.dumps(known, allow_nan=False) + "\n"

    def append(self, row: dict[str, float]) -> None:
        """Add a row, unless its step is there: an interrupted run repeats its last. Non-finite values become null."""
        if self.rows and self.rows[-1]["step"] == row["step"]:
            return
        with self.file.open("a", encoding="utf-8") as file:
            file.write(self._line(row))
        self.rows.append(row)
        self._show(row)

    def _show(self, row: dict[str, float]) -> None:
        for name, value in row.items() if self._mirror else ():
            if name != "step" and value is not None and math.isfinite(value):
                self._mirror.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Write what the mirror still holds."""
        if self._mirror:
            self._mirror.close()

    def table(self) -> pd.DataFrame:
        """All rows."""
        return pd.DataFrame(self.rows).astype(float)


def tensorboard_writer(folder: Path) -> Any:
    """A `tensorboardX.SummaryWriter` of a folder, which is emptied first.

    Raises:
        ModuleNotFoundError: tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        message = (
            "tensorboard = True, but tensorboardX is not installed. Install it, pip install -e 'lib[tensorboard]', or "
            "set tensorboard = False."
        )
        raise ModuleNotFoundError(message) from error
    shutil.rmtree(folder, ignore_errors=True)
    return SummaryWriter(str(folder), flush_secs=5)


class Checkpoints:
    """Checkpoints of one run, written asynchronously; a checkpoint is complete or absent.

    Keeps the newest two (the newest may be found damaged) and every `keep_period`-th step.

    Attributes:
        folder, about: as given.
        window: metrics of the restored checkpoint's steps since the log's last row.
    """

    def __init__(self, folder: str | Path, about: dict[str, Any], keep_period: int | None = None):
        """Open a folder of checkpoints, creating it where needed.

        Args:
            folder: folder for checkpoints only.
            about: JSON values that identify the run (architecture, games, dataset); saved with each checkpoint, and
                compared when one is loaded.
            keep_period: steps whose multiples are never deleted.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        policies: list[Any] = [ocp.checkpoint_managers.LatestN(2)]
        if keep_period:
            policies.append(ocp.checkpoint_managers.EveryNSteps(keep_period))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )
        self.folder, self.window = Path(folder).resolve(), []
        self.about = json.loads(json.dumps(about))  # as read back: tuples become lists
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "about"))
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: checkpoints cannot be written here ({error}). Make the folder writable, or set "
                "outputs to one that is."
            ) from error

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

    def save(self, state: TrainState, window: Sequence[dict[str, Any]] = ()) -> None:
        """Save a state; returns while it is being written.

        Args:
            state: state of the run.
            window: metrics of its steps since the log's last row, so that a resumed run averages the same steps.

        Raises:
            CheckpointError: this save, or the previous one, failed.
        """
        steps = [
            {name: [np.asarray(x).dtype.name, np.asarray(x).tolist()] for name, x in row.items()} for row in window
        ]
        step, about = int(state.step), {"run": self.about, "crc32": _crc32(state, steps), "window": steps}
        about["params_crc32"] = _crc32(state.params, [])  # for those who read nothing else: `transfer.load`
        items = ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()), about=ocp.args.JsonSave(about))
        self._writing(lambda: self._manager.save(step, args=items, force=True), step)

    def wait(self) -> None:
        """Return when all is on disk."""
        self._writing(self._manager.wait_until_finished, "in progress")

    def close(self) -> None:
        """Finish writing and release the folder."""
        self.wait()
        self._manager.close()

    def _writing(self, write: Callable[[], Any], step: int | str) -> None:
        try:
            write()
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.folder}: checkpoint {step} could not be written ({error}). Make room on the disk and run "
                "again: training resumes from the last complete checkpoint."
            ) from error

    def restore(self, state: TrainState) -> TrainState:
        """Load the newest checkpoint, or return `state` if there is none.

        Args:
            state: a state of the right structure and shapes; its values are not used.

        Raises:
            CheckpointError: the checkpoint has another architecture, games, data or dtypes, or is damaged.
        """
        step = self.latest_step()
        if step is None:
            return state
        where = self.folder / str(step)
        try:
            stored = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
            theirs, crc32, window = stored["run"], stored["crc32"], stored.get("window", [])
            self.window = [{name: np.array(x, dtype) for name, (dtype, x) in row.items()} for row in window]
        except Exception as error:  # Orbax raises many kinds
            raise self._unreadable(where, error) from error
        differences = [
            f"{key}: {theirs.get(key)!r} in the checkpoint, {self.about.get(key)!r} here"
            for key in sorted(theirs.keys() | self.about.keys())
            if theirs.get(key) != self.about.get(key)
        ]
        if differences:
            raise CheckpointError(
                f"{where} is a checkpoint of another run: {'; '.join(differences)}. Choose another run name, "
                "or delete the run's folder to start it again."
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state._asdict())
        try:
            self._compare_arrays(where, ocp.StandardCheckpointer().metadata(where / "state").item_metadata, abstract)
            items = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        except CheckpointError:
            raise
        except Exception as error:
            raise self._unreadable(where, error) from error
        loaded = TrainState(**items["state"])
        if _crc32(loaded, window) != crc32:
            raise self._unreadable(where, "its contents differ from their CRC-32")
        return loaded

    @staticmethod
    def _unreadable(where: Path, error: object) -> CheckpointError:
        return CheckpointError(
            f"{where}: cannot be loaded ({error}). If another attempt fails, too, move this folder elsewhere: training "
            "then resumes from the checkpoint before it."
        )

    @staticmethod
    def _compare_arrays(where: Path, metadata: PyTree, abstract: PyTree) -> None:
        """Refuse arrays of other names, shapes or dtypes than stored, before anything is read or cast."""
        stored, expected = (
            {_path_name(path): f"{np.dtype(x.dtype).name} {list(x.shape)}"
             for path, x in jax.tree_util.tree_leaves_with_path(tree)}
            for tree in (metadata, abstract)
        )  # fmt: skip
        if not stored:
            raise ValueError("it lists no arrays")
        different = [name for name in sorted(stored.keys() | expected.keys()) if stored.get(name) != expected.get(name)]
        if different:
            name = different[0]
            more = f", and {len(different) - 1} more" if len(different) > 1 else ""
            x64 = "float64" in stored.get(name, "") and "float32" in expected.get(name, "")
            remedy = "Run with JAX_ENABLE_X64=1, as it was written" if x64 else "Run with the settings that wrote it"
            raise CheckpointError(
                f"{where}: cannot be loaded here: {name} is {stored.get(name, 'absent')} in the checkpoint, "
                f"{expected.get(name, 'absent')} is expected{more}. {remedy}, or choose another run name."
            )


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder of `Checkpoints`, ascending; none if it does not exist."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def read_params(folder: str | Path, step: int | None = None) -> tuple[Path, dict[str, Any], dict[str, np.ndarray]]:
    """A checkpoint's parameters, whatever network they are of; the folder may be a running run's.

    Args:
        folder: of `Checkpoints`.
        step: of the checkpoint; None: the newest.

    Returns:
        the checkpoint's folder, named after its step; `about` of `Checkpoints`; arrays by their path, as of
        `flat_params`.

    Raises:
        CheckpointError: there is none, or none of that step; it is not one of ours, or it is damaged.
    """
    folder = Path(folder).resolve()
    steps = checkpoint_steps(folder)
    if not steps:
        raise CheckpointError(f"{folder}: there is no checkpoint. Name a run that has trained until its first one.")
    if step is not None and step not in steps:
        kept = ", ".join(map(str, steps))
        raise CheckpointError(f"{folder}: there is no checkpoint of step {step}, only of {kept}. Choose one of these.")
    where = folder / str(steps[-1] if step is None else step)
    try:
        stored = json.loads((where / "about" / "metadata").read_text(encoding="utf-8"))
        about = LATER | stored["run"]
        metadata = ocp.StandardCheckpointer().metadata(where / "state").item_metadata["params"]
        abstract = {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), metadata)}
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract)
        how = ocp.args.PyTreeRestore(item=abstract, restore_args=on_host, partial_restore=True)
        params = ocp.PyTreeCheckpointer().restore(where / "state", args=how)["params"]
    except Exception as error:  # Orbax raises many kinds
        raise CheckpointError(
            f"{where}: cannot be read as a checkpoint of a training run ({type(error).__name__}: {error}). Choose "
            "another run, or move this folder elsewhere: the checkpoint before it is then read."
        ) from error
    params = _numbered(params)
    if _crc32(params, []) != stored.get("params_crc32", _crc32(params, [])):  # older checkpoints do not have it
        raise CheckpointError(
            f"{where}: its parameters differ from their CRC-32. Move this folder elsewhere: the checkpoint before it "
            "is then read."
        )
    return where, about, flat_params(params)


def _numbered(tree: PyTree) -> PyTree:
    """A tree read without its structure, the numbers of layers as integers again: as strings, 10 comes before 2."""
    if not isinstance(tree, dict):
        return tree
    return {int(name) if name.isdigit() else name: _numbered(branch) for name, branch in tree.items()}


def _crc32(state: PyTree, window: list) -> int:
    crc = zlib.crc32(json.dumps(window).encode()) if window else 0
    for leaf in jax.tree.leaves(devices.whole(state)):
        crc = zlib.crc32(np.ascontiguousarray(leaf), crc)
    return crc
