"""The cost of training: estimated, measured, and compared with the device's limits, for `09_performance`.

Each time is a median over calls on random data, after two warm-up calls. Compile times are those of `lower` and
`compile`; where JAX_COMPILATION_CACHE_DIR names a cache, they say nothing, and are left out.
"""

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax import nnx

from scaled_ql import devices, evaluation, methods, networks, training
from scaled_ql.games import TRAINING_GAMES, action_names
from scaled_ql.methods import Method, Objective
from scaled_ql.replay import Batch, Replay, sample_batches
from scaled_ql.replay.sequences import Sequences


class DataSheet(NamedTuple):
    """Peak rates as a device's maker states them: dense bfloat16 FLOP/s, and bytes per second of its memory."""

    flops: float
    bytes: float


# For estimates about other devices. Of NVIDIA's data sheets (A100: SXM, 80 GB; H100 and H200: SXM, half of the FLOP/s
# "with sparsity"), its white paper on Ada (accumulation in float32), and Google's pages on Cloud TPUs, per chip.
DATA_SHEETS = {
    "NVIDIA A100": DataSheet(312e12, 2.039e12),
    "NVIDIA H100": DataSheet(989e12, 3.35e12),
    "NVIDIA H200": DataSheet(989e12, 4.8e12),
    "NVIDIA RTX 4090": DataSheet(165e12, 1.008e12),
    "TPU v4": DataSheet(275e12, 1.2e12),
    "TPU v5e": DataSheet(197e12, 0.819e12),
}
# For each parameter: it reads gradient, parameter and two moments, and writes the latter three, all in float32.
ADAM_BYTES = 7 * 4
# (encoder, gradient steps, transitions a step) of the paper: appendix B.1, A (50 epochs of 62,500 steps), B.4.
WORKLOADS = {
    "main run, 10M steps": ("resnet101", 10_000_000, 512),
    "six-game ablation, 3.125M steps": ("resnet101", 3_125_000, 512),
    "fine-tuning to a game, 300k steps": ("resnet101", 300_000, 32),
}


def median_seconds(work: Callable[[], Any], seconds: float, least: int = 3) -> float:
    """Median time of a call of `work`, after two warm-up calls.

    Calls of less than 50 ms are timed several at once, and only the last is waited for: a training loop does not wait
    for each step either, and waiting takes up to half a millisecond on an accelerator.

    Args:
        work: function that returns arrays of a device, or anything else.
        seconds: duration of the measurement.
        least: minimum number of timings.
    """

    def timed(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            result = work()
        jax.block_until_ready(result)
        return (time.perf_counter() - began) / calls

    timed(1)
    calls = max(1, round(0.05 / max(timed(1), 1e-5)))
    durations, until = [], time.perf_counter() + seconds
    while len(durations) < least or time.perf_counter() < until:
        durations.append(timed(calls))
    return float(np.median(durations))


class Ceilings(NamedTuple):
    """Measured peak rates of a device.

    Attributes:
        flops: FLOP/s of square matrix products, by dtype.
        copy_bytes: bytes read and written per second by adding 1 to a large array.
        upload_bytes: bytes per second from the host's memory to the device's.
    """

    flops: dict[str, float]
    copy_bytes: float
    upload_bytes: float


def ceilings(dtypes: tuple[str, ...] = ("float32", "bfloat16"), size: int = 0, seconds: float = 2.0) -> Ceilings:
    """Measure the first device's limits.

    Args:
        dtypes: dtypes of the matrix products.
        size: side of the matrices; 0: 2,048 on a CPU, 8,192 elsewhere.
        seconds: duration of each measurement.
    """
    side = size or (2_048 if jax.default_backend() == "cpu" else 8_192)
    product = jax.jit(jnp.matmul)
    flops = {}
    for dtype in dtypes:
        matrix = jax.random.normal(jax.random.key(0), (side, side), dtype)
        flops[dtype] = 2 * side**3 / median_seconds(partial(product, matrix, matrix), seconds)
    large = jnp.zeros(4 * side**2, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    host = np.zeros(16 * side**2, np.uint8)
    moved = 2 * large.nbytes / median_seconds(partial(copy, large), seconds)
    return Ceilings(flops, moved, host.nbytes / median_seconds(lambda: jnp.array(host), seconds))


# Arithmetic.


class Forward(NamedTuple):
    """Cost of one observation in a network's convolutions and matrix products.

    Attributes:
        flops: 2 for each multiply-add. Normalisations and rectifiers cost memory traffic, not arithmetic.
        images: bytes of the observation's activations that the products read and write, each once: as if everything
            between them were fused.
        kernels: bytes of their parameters.
        parameters: number of parameters of the whole network.
    """

    flops: float
    images: float
    kernels: float
    parameters: int


@functools.cache
def forward_cost(encoder: str, num_games: int, **architecture: Any) -> Forward:
    """Estimate the cost of a network's forward pass.

    Args:
        encoder, num_games: as in `networks.make_q_network`.
        architecture: its other arguments.
    """
    network = jax.eval_shape(lambda: networks.make_q_network(encoder, num_games, **architecture))

    def cost(size: int) -> np.ndarray:
        inputs = jax.ShapeDtypeStruct((size, 84, 84, 4), jnp.uint8), jax.ShapeDtypeStruct((size,), jnp.int32)
        return _products(jax.make_jaxpr(lambda net, *inputs: net(*inputs))(network, *inputs).jaxpr)

    flops, images = cost(2) - cost(1)  # the cost of one more observation; kernels are read once
    return Forward(flops, images, cost(1)[1] - images, networks.count_parameters(network))


def _products(jaxpr: Any) -> np.ndarray:
    """(FLOPs, bytes of operands and results) of all products of a program and of the programs in it."""
    total = np.zeros(2)
    for equation in jaxpr.eqns:
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            total += _products(inner)
        if equation.primitive.name not in ("dot_general", "conv_general_dilated"):
            continue
        left, right, output = (variable.aval for variable in [*equation.invars, *equation.outvars])
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            products = np.prod([left.shape[axis] for axis in contracted])
        else:
            products = right.size / right.shape[equation.params["dimension_numbers"].rhs_spec[0]]
            products /= np.prod(equation.params["lhs_dilation"])  # zeros, in a strided convolution's gradient
        total += 2.0 * output.size * products, sum(x.size * x.dtype.itemsize for x in (left, right, output))
    return total


def step_flops(encoder: str, batch_size: int, num_games: int, **architecture: Any) -> float:
    """FLOPs of a training step: forward, and backward twice that, of the online network; forward of the target."""
    return 4 * batch_size * forward_cost(encoder, num_games, **architecture).flops


def step_bytes(encoder: str, batch_size: int, num_games: int, **architecture: Any) -> float:
    """Bytes that a step moves if each product moves its own once: its four passes, as in `step_flops`, and Adam's.

    See `ADAM_BYTES`.
    """
    forward = forward_cost(encoder, num_games, **architecture)
    return 4 * (batch_size * forward.images + forward.kernels) + ADAM_BYTES * forward.parameters


def system_costs(systems: Sequence[str], batch_size: int, num_games: int = 40, **architecture: Any) -> pd.DataFrame:
    """Size and cost of whole systems, by tracing alone: nothing is allocated, compiled or run.

    Args:
        systems: method and size, ``cql resnet101``, ``mae vit_base``, ``dt 200M``; `parameters.System` lists them.
        batch_size: transitions, or windows of the method's length.
        num_games: games, which are heads of a Q-network.
        architecture: further arguments of `methods.Method.build`, such as dtype.

    Returns:
        index system; columns parameters, millions (in all); as published, millions (what the source counts);
        step, GFLOP (of one transition or window: forward and backward, target network included, Adam not);
        decision, GFLOP (of a move in play; NaN where the network cannot play); and of a step `moved, GB` (as
        `step_bytes` counts), `state, GB` (parameters, target, moments), `activations, GB`, `memory, GB` (with
        gradients and batch), see `training.memory_needed`.
    """
    rows = {}
    for system in systems:
        name, size = system.split()
        method = methods.METHODS[name](**({"transformer": size} if size in networks.TRANSFORMERS else {}))
        network = nnx.eval_shape(partial(method.build, size, num_games, **architecture))
        graph, variables = nnx.split(network, nnx.Param)
        params, sizes = nnx.to_pure_dict(variables), [len(action_names(game)) for game in TRAINING_GAMES[:num_games]]
        moments = jax.eval_shape(training.make_optimizer().init, params)
        state = training.TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, params, moments)
        objective = method.objective(graph, sizes)
        gradient = jax.grad(lambda *inputs, objective=objective: objective(*inputs, jax.random.key(0))[0])
        batch, decision = _abstract_batch(method, batch_size), np.nan
        flops, moved = _traced_cost(gradient, params, params, batch)
        if method.preferences:
            one, stack = _abstract_batch(method, 1), jax.ShapeDtypeStruct((1, 84, 84, 4), jnp.uint8)
            seen = (one, jax.ShapeDtypeStruct((1, 3), jnp.int32)) if method.memory else (stack, one.game)
            decision, _ = _traced_cost(method.preferences(graph, sizes), params, *seen)
        needed = training.memory_needed(objective, state, batch)
        number = networks.count_parameters(network)
        rows[system] = {
            "parameters, millions": number / 1e6,
            "as published, millions": networks.count_parameters(*network.published) / 1e6,
            "step, GFLOP": flops / batch_size / 1e9,
            "decision, GFLOP": decision / 1e9,
            "moved, GB": (moved + ADAM_BYTES * number) / 1e9,
            "state, GB": needed["state"] / 1e9,
            "activations, GB": needed["activations"] / 1e9,
            "memory, GB": needed["total"] / 1e9,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("system")


def _traced_cost(function: Callable, *inputs: Any) -> tuple[float, float]:
    """(FLOPs, bytes) of a function's products, see `_products`."""
    flops, moved = _products(jax.make_jaxpr(function)(*inputs).jaxpr)
    return float(flops), float(moved)


def roofline(costs: pd.DataFrame, batch_size: int) -> pd.DataFrame:
    """A floor under a training step's time on devices of `DATA_SHEETS` (Williams et al., 2009): computed, not measured.

    It is the least time if every product's operands and results pass through memory once. A step that keeps some of
    them on the chip between two products may be faster, where memory is what limits it.

    Args:
        costs: from `system_costs`, in bfloat16, with the same batch size.
        batch_size: transitions or windows.

    Returns:
        index system; columns `TFLOP` and `GB` of a step; `FLOP/byte`, its arithmetic intensity; and for each device
        `ms`, the longer of the times for its FLOPs and for its bytes at the peak rates.
    """
    flops, moved = costs["step, GFLOP"] * 1e9 * batch_size, costs["moved, GB"] * 1e9
    table = pd.DataFrame({"TFLOP": flops / 1e12, "GB": moved / 1e9, "FLOP/byte": flops / moved})
    for device, peak in DATA_SHEETS.items():
        table[f"{device}, ms"] = 1e3 * np.maximum(flops / peak.flops, moved / peak.bytes)
    return table


def _abstract_batch(method: Method, size: int) -> Batch | Sequences:
    """The shapes of a method's batch."""
    if "sequences" not in method.batches:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), random_batch(1, 1))
    steps = (size, method.memory)
    frames, game = jax.ShapeDtypeStruct((*steps, 84, 84), jnp.uint8), jax.ShapeDtypeStruct((size,), jnp.int32)
    action, reward, flag = (jax.ShapeDtypeStruct(steps, dtype) for dtype in (jnp.int32, jnp.float32, bool))
    return Sequences(frames, action, reward, reward, flag, flag, game)


# The step.


def random_batch(size: int, num_games: int, n_step: int = 3, seed: int = 0) -> Batch:
    """Transitions of noise, of games in turn."""
    rng = np.random.default_rng(seed)
    num_actions = np.array([len(action_names(game)) for game in TRAINING_GAMES[:num_games]])
    game = np.arange(size, dtype=np.int32) % num_games
    return Batch(
        frames=rng.integers(0, 256, (size, 4 + n_step, 84, 84), np.uint8),
        next_stack=np.tile(np.arange(n_step, 4 + n_step, dtype=np.int32), (size, 1)),
        action=rng.integers(num_actions[game]).astype(np.int32),
        reward=rng.normal(size=size).astype(np.float32),
        discount=np.full(size, 0.99**n_step, np.float32),
        game=game,
    )


class TrainingStep(NamedTuple):
    """A training step to be measured, of C51 and CQL."""

    objective: Objective
    update: Callable
    state: training.TrainState


def make_step(encoder: str, num_games: int = 40, *, seed: int = 0, **architecture: Any) -> TrainingStep:
    """A fresh network of `networks.make_q_network` with the paper's objective and optimizer."""
    network = networks.make_q_network(encoder, num_games, "c51", seed, **architecture)
    optimizer = training.make_optimizer()
    graph, state = training.init_state(network, optimizer)
    objective = methods.q_learning().objective(graph, [len(action_names(game)) for game in TRAINING_GAMES[:num_games]])
    return TrainingStep(objective, training.make_update(objective, optimizer), state)


def measure_step(
    encoder: str, batch_size: int, limits: Ceilings, *, num_games: int = 40, seconds: float = 5.0, **architecture: Any
) -> dict[str, Any]:
    """One training step of C51 and CQL, estimated and measured, its batch already on the device.

    Args:
        encoder, num_games, architecture: as in `networks.make_q_network`.
        batch_size: transitions.
        limits: limits of this device.
        seconds: duration of the measurement.

    Returns:
        `ms`, `transitions/s`; `GFLOP` estimated (`step_flops`) and `GFLOP, compiled`, the compiler's count, which is
        left out on a GPU, as it misses cuDNN's convolutions; `share of peak`: estimated FLOP/s relative to a matrix
        product's in the same dtype; `floor, ms`: minimum time, with products at that peak; `moved, GB` estimated
        (`step_bytes`) and `moved, GB, compiled`; `floor of memory, ms`: minimum time to move that estimate, at the
        speed of a copy; `memory, GB` estimated (`training.memory_needed`) and `memory, GB, compiled`; `compile, s`.
    """
    dtype = architecture.get("dtype", "float32")
    step, batch = make_step(encoder, num_games, **architecture), random_batch(batch_size, num_games)
    flops, moved = (cost(encoder, batch_size, num_games, **architecture) for cost in (step_flops, step_bytes))
    needed = training.memory_needed(step.objective, step.state, batch)
    training.check_memory(needed, jax.devices()[0])
    batch, began = jax.device_put(batch), time.perf_counter()
    compiled = jax.jit(step.update, donate_argnums=0).lower(step.state, batch, jax.random.key(0)).compile()
    compiling = time.perf_counter() - began
    duration = median_seconds(_repeat(compiled, step.state, batch), seconds)
    counted = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    held = memory.temp_size_in_bytes + memory.argument_size_in_bytes if memory else np.nan
    return {
        "encoder": encoder,
        "dtype": dtype,
        "batch": batch_size,
        "games": num_games,
        "ms": 1e3 * duration,
        "transitions/s": batch_size / duration,
        "GFLOP": flops / 1e9,
        "GFLOP, compiled": np.nan if jax.default_backend() == "gpu" else counted.get("flops", np.nan) / 1e9,
        "share of peak": flops / duration / limits.flops[dtype],
        "floor, ms": 1e3 * flops / limits.flops[dtype],
        "moved, GB": moved / 1e9,
        "moved, GB, compiled": counted.get("bytes accessed", np.nan) / 1e9,
        "floor of memory, ms": 1e3 * moved / limits.copy_bytes,
        "memory, GB": needed["total"] / 1e9,
        "memory, GB, compiled": held / 1e9,
        "compile, s": np.nan if os.environ.get("JAX_COMPILATION_CACHE_DIR") else compiling,
    }


def _repeat(update: Callable, state: training.TrainState, batch: Batch) -> Callable[[], jax.Array]:
    """A function that does one more step with the same batch, and returns its loss; `state` is donated."""
    key = jax.random.key(0)

    def work() -> jax.Array:
        nonlocal state
        state, metrics = update(state, batch, key)
        return metrics["loss"]

    return work


def measure_steps(
    encoders: list[str], dtypes: list[str], batch_sizes: list[int], limits: Ceilings, **options: Any
) -> tuple[pd.DataFrame, list[str]]:
    """`measure_step` of every combination; the second result describes those that do not fit."""
    rows, refused = [], []
    for encoder, dtype, size in itertools.product(encoders, dtypes, batch_sizes):
        try:
            rows.append(measure_step(encoder, size, limits, dtype=dtype, **options))
        except (devices.OutOfMemory, jax.errors.JaxRuntimeError) as error:
            if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refused.append(f"{encoder}, {dtype}, batch {size}: {str(error).splitlines()[0]}")
    return pd.DataFrame(rows), refused


def compare_dtypes(encoder: str, batch_size: int, steps: int, num_games: int = 40, **architecture: Any) -> pd.DataFrame:
    """Losses of the same steps on the same noise, computed in float32 and in bfloat16.

    Returns:
        columns step, float32, bfloat16.
    """
    losses = {}
    for dtype in ("float32", "bfloat16"):
        step, key = make_step(encoder, num_games, dtype=dtype, **architecture), jax.random.key(0)
        update, state, values = jax.jit(step.update, donate_argnums=0), step.state, []
        for number in range(steps):
            state, metrics = update(state, random_batch(batch_size, num_games, seed=number % 8), key)
            values.append(metrics["loss"])
        losses[dtype] = np.array(jax.device_get(values))
    return pd.DataFrame({"step": np.arange(1, steps + 1)} | losses)


def measure_heads(
    encoder: str, batch_size: int, num_games: tuple[int, ...], *, seconds: float = 5.0, rounds: int = 3, **architecture
) -> pd.DataFrame:
    """The same step with heads for more and more games, each measured `rounds` times in turn, as speed drifts.

    Returns:
        a row per number of games: `ms`; as compiled `working memory, GB` (besides the step's arguments) and `memory,
        GB` (with parameters, target, Adam's moments and batch); and all three relative to the first row.
    """
    programs, rows = {}, {}
    for games in num_games:
        step, batch = make_step(encoder, games, **architecture), jax.device_put(random_batch(batch_size, games))
        compiled = jax.jit(step.update, donate_argnums=0).lower(step.state, batch, jax.random.key(0)).compile()
        memory = compiled.memory_analysis()
        working, given = memory.temp_size_in_bytes / 1e9, memory.argument_size_in_bytes / 1e9
        rows[games] = {"working memory, GB": working, "memory, GB": working + given}
        programs[games] = _repeat(compiled, step.state, batch)
    times = {games: [] for games in num_games}
    for _ in range(rounds):
        for games, program in programs.items():
            times[games].append(median_seconds(program, seconds / rounds))
    table = pd.DataFrame(rows).T.rename_axis("games")
    table.insert(0, "ms", {games: 1e3 * float(np.median(values)) for games, values in times.items()})
    for name in ("ms", "working memory, GB", "memory, GB"):
        table[f"{name}, of the first"] = table[name] / table[name].iloc[0]
    return table


# The input pipeline, and playing.


def measure_pipeline(
    data: Replay, encoder: str, games_per_batch: int, transitions_per_game: int, *, seconds: float = 10.0,
    processes: int = 0, **architecture: Any,
) -> pd.DataFrame:  # fmt: skip
    """Measure batches alone, steps alone, and steps on fresh batches, as in `04_scaled_training`, in turn.

    Returns:
        rows batches alone, step alone, together: `ms` a batch; `added`: the pipeline's share of the step alone.
    """
    shape = {"games_per_batch": games_per_batch, "transitions_per_game": transitions_per_game, "n_step": 3}
    step = make_step(encoder, len(data.games), **architecture)
    compiled, key = jax.jit(step.update, donate_argnums=0), jax.random.key(0)
    mesh = devices.make_mesh(1)

    @contextlib.contextmanager
    def sampled(first: int) -> Iterator[Iterator[Batch]]:
        batches = sample_batches(data, 0, first, first + 10**9, processes=processes, **shape)
        with contextlib.closing(batches):
            yield batches

    state = jax.tree.map(jnp.copy, step.state)

    def together(batches: Iterator[Batch], count: int) -> float:
        nonlocal state
        began = time.perf_counter()
        for batch in islice(batches, count):
            state, metrics = compiled(state, batch, key)
        metrics["loss"].block_until_ready()
        return (time.perf_counter() - began) / count

    with sampled(0) as batches:
        one = next(devices.place_batches(islice(batches, 4), mesh))
        together(iter([one] * 3), 3)
        alone = together(iter([one] * 4), 4)
        count = max(int(seconds / 6 / alone), 3)
        steps, both, reading = [], [], []
        for _ in range(3):  # in turn, as the machine's speed drifts
            steps.append(together(iter([one] * count), count))
            placed = devices.place_batches(batches, mesh)
            together(placed, 3)
            both.append(together(placed, count))
    with sampled(10**6) as batches:
        for _ in islice(batches, 4):
            pass
        for _ in range(3):
            began = time.perf_counter()
            for _ in islice(batches, count):
                pass
            reading.append((time.perf_counter() - began) / count)
    rows = {"batches alone": reading, "step alone": steps, "together": both}
    table = pd.DataFrame({"ms": {name: 1e3 * float(np.median(times)) for name, times in rows.items()}})
    table["added"] = [np.nan, np.nan, float(np.median(np.array(both) / np.array(steps))) - 1]
    return table


def measure_evaluation(game: str, encoder: str, episodes: int = 64, max_steps: int = 200, **architecture: Any) -> dict:
    """Agent steps per second of `evaluation.evaluate`, for an untrained network and for random moves (the limit).

    Both are differences of a long and a short evaluation, which exclude the making of environments.
    """
    network = networks.make_q_network(encoder, 1, "c51", **architecture)
    graph, state = training.init_state(network, training.make_optimizer())
    size, slots = len(action_names(game)), min(episodes, 16)
    prefer = methods.q_learning().preferences(graph, [size])
    players = {"network": evaluation.make_q_function(prefer, state.params, 0, size)}
    players["random moves"] = evaluation.play_randomly

    def play(player: evaluation.QFunction, most: int) -> np.ndarray:
        began = time.perf_counter()
        shared = {"seed": 0, "epsilon": 1.0, "num_environments": slots}
        played = evaluation.evaluate(player, game, episodes=episodes, max_steps=most, **shared)
        return np.array([played["length"].sum(), time.perf_counter() - began])

    rates = {}
    for name, player in players.items():
        for few_or_all in evaluation.batch_sizes(slots):
            player(np.zeros((few_or_all, 4, 84, 84), np.uint8))  # compiles
        steps, seconds = play(player, max_steps) - play(player, 5)
        rates[f"{name}, steps/s"] = steps / seconds
    return {"game": game, "encoder": encoder} | rates


# Whole runs.


def hours(devices_flops: dict[str, float], share: float | dict[str, float]) -> pd.DataFrame:
    """Estimated hours of the paper's runs (`WORKLOADS`).

    Args:
        devices_flops: peak FLOP/s by device.
        share: share of the peak that the step reaches, one for all or by device.
    """
    rows = {}
    for device, peak in devices_flops.items():  # architectures by their defaults, the paper's
        reached = peak * (share[device] if isinstance(share, dict) else share)
        rows[device] = {
            name: steps * step_flops(encoder, batch, 40) / reached / 3_600
            for name, (encoder, steps, batch) in WORKLOADS.items()
        }
    return pd.DataFrame(rows).T
