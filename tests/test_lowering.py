"""Steps for devices that are not here lower for CUDA and TPU; and the paper's network takes one."""

from collections import Counter
from collections.abc import Iterator
from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stacks import windows

from scaled_ql import defaults, losses, methods, networks, parameters, training, transfer
from scaled_ql.online import agents
from scaled_ql.replay.batch import Batch


def make_batch(size: int, games: int, n_step: int = 3) -> Batch:
    rng = np.random.default_rng(0)
    return Batch(
        frames=rng.integers(0, 256, (size, 4 + n_step, 84, 84), np.uint8),
        next_stack=np.tile(np.arange(n_step, n_step + 4, dtype=np.int32), (size, 1)),
        action=rng.integers(3, size=size).astype(np.int32),
        reward=rng.normal(size=size).astype(np.float32),
        discount=np.full(size, 0.97, np.float32),
        game=(np.arange(size) % games).astype(np.int32),
    )


def traced(encoder: str, games: int = 2, **values: object) -> jax.stages.Traced:
    """A step, traced abstractly."""
    p = parameters.check("04_scaled_training", {"encoder": encoder, "hidden_sizes": [32, 32], **values})
    method = methods.make(p)
    architecture = {name: getattr(p, name) for name in ("heads", "hidden_sizes", "num_atoms", "dtype", "remat")}
    build = partial(method.build, encoder, games, **architecture)
    optimizer = training.make_optimizer(frozen=tuple(method.before))
    graph, _ = nnx.split(nnx.eval_shape(build), nnx.Param)
    state = jax.eval_shape(lambda: training.init_state(build(), optimizer)[1])
    update = training.make_update(method.objective(graph, [4, 6] * (games // 2)), optimizer, accumulate=p.accumulate)
    batch = windows(4, p.sequence_length) if "sequences" in method.batches else make_batch(4, games)
    return jax.jit(update, donate_argnums=0).trace(state, batch, jax.random.key(0))


def lowers(encoder: str, **values: object) -> None:
    """Lower a step of two games for both platforms."""
    traced(encoder, **values).lower(lowering_platforms=("cuda", "tpu"))


def equations(jaxpr: jax.extend.core.Jaxpr) -> Iterator[jax.extend.core.JaxprEqn]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("encoder", ["resnet50", "vit_base"])
def test_a_bfloat16_step_has_nothing_that_accelerators_are_slow_at(encoder: str) -> None:
    """Products in float32 but for those of the loss, images transposed more than once, calls of the host."""
    hidden = list(defaults.HIDDEN_SIZES)
    step = traced(encoder, 40, dtype="bfloat16", hidden_sizes=hidden).jaxpr.jaxpr
    flops: Counter[bool] = Counter()
    for equation in equations(step):
        kind, operands = equation.primitive.name, [variable.aval for variable in equation.invars]
        assert "callback" not in kind and "infeed" not in kind, equation
        if kind == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            number = equation.outvars[0].aval.size * np.prod([operands[0].shape[axis] for axis in contracted])
        elif kind == "conv_general_dilated":
            outputs = equation.params["dimension_numbers"].rhs_spec[0]
            number = equation.outvars[0].aval.size * operands[1].size / operands[1].shape[outputs]
        else:
            continue
        flops[all(operand.dtype == jnp.bfloat16 for operand in operands)] += number
    # The heads' product is not rounded, so that its gradient is in float32; likewise attention's softmax.
    assert flops[True] > 0.95 * flops.total(), flops
    images = [e for e in equations(step) if e.primitive.name == "transpose" and e.invars[0].aval.dtype == jnp.uint8]
    assert len(images) == 2, "each of the two stacks is transposed once, as bytes"


# The others of a family have more blocks, or wider ones: `pytest -m slow -n 0 tests/test_lowering.py`.
SMALLEST = {"resnet_narrow", "resnet50", "impala_x1", "nature", "nature_narrow", "vit_narrow"}


@pytest.mark.parametrize(
    "encoder", [pytest.param(name, marks=[] if name in SMALLEST else [pytest.mark.slow]) for name in defaults.ENCODERS]
)
def test_every_encoders_step_lowers_for_accelerators(encoder: str) -> None:
    lowers(encoder, dtype="bfloat16", remat=not encoder.startswith("nature"))


def test_a_small_encoder_of_each_family_lowers_in_every_run_of_the_tests() -> None:
    assert {defaults.ENCODERS[name][0] for name in SMALLEST} == {family for family, *_ in defaults.ENCODERS.values()}


@pytest.mark.parametrize("method", defaults.METHODS)
def test_every_methods_step_lowers_for_accelerators(method: str) -> None:
    lowers("vit_narrow" if method == "mae" else "nature_narrow", method=method, random_shift=4, accumulate=2)


def test_a_step_with_a_shared_head_and_held_attention_lowers_for_accelerators() -> None:
    lowers("vit_narrow", heads="shared", attention_temperature=0.1, dtype="bfloat16", remat=True, accumulate=2)


@pytest.mark.parametrize("head", ["hl_gauss", "two_hot", "mse"])
def test_every_heads_step_lowers_for_accelerators(head: str) -> None:
    lowers("nature_narrow", head=head, dr3=0.1, double_q=True)


PLATFORMS = {"lowering_platforms": ("cuda", "tpu")}


@pytest.mark.parametrize("shared", [False, True])
def test_online_agents_steps_and_choices_lower_for_accelerators(shared: bool, monkeypatch) -> None:
    """One program over stacked parameters, mapped as it is on accelerators, and a network of all games."""
    monkeypatch.setattr(agents, "_one_by_one", jax.vmap)
    atoms, sizes = losses.support(-10, 10), [4, 6]
    build = partial(networks.make_q_network, "nature_narrow", 2 if shared else 1, "c51", hidden_sizes=(16,))
    make = agents.multi_task_learner if shared else agents.independent_learners
    learner = make(lambda seed: build(seed=seed), sizes, training.make_optimizer(), seed=0, head="c51", atoms=atoms)
    batch = make_batch(4, 2)
    if not shared:
        batch = jax.tree.map(lambda x: np.stack([x, x]), batch)._replace(game=np.zeros((2, 4), np.int32))
    stacks = np.zeros((2, 3, 4, 84, 84), np.uint8)
    jax.jit(learner.update).trace(learner.state, batch).lower(**PLATFORMS)
    jax.jit(learner.greedy).trace(learner.state.params, stacks).lower(**PLATFORMS)


def test_several_steps_a_dispatch_and_frozen_ones_lower_for_accelerators() -> None:
    p = parameters.check("04_scaled_training", {"encoder": "nature_narrow", "hidden_sizes": [16]})
    method, optimizer = methods.make(p), training.make_optimizer(frozen=("encoder",))
    graph, state = training.init_state(method.build(p.encoder, 2, hidden_sizes=(16,)), optimizer)
    step = training.make_train_step(method.objective(graph, [4, 6]), optimizer)
    for count in (1, 3):
        jax.jit(step).trace(state, *[make_batch(4, 2)] * count).lower(**PLATFORMS)
    prefer = method.preferences(graph, [4, 6])
    stacks, game = np.zeros((3, 84, 84, 4), np.uint8), np.zeros(3, np.int32)
    jax.jit(lambda params: prefer(params, stacks, game)).trace(state.params).lower(**PLATFORMS)


@pytest.mark.slow
def test_resnet_101_is_transferred_and_takes_a_step_offline_and_online(tmp_path) -> None:
    """The paper's network: grafted, its memory estimated, one step each; some GB of memory."""
    p = parameters.check("04_scaled_training", {})
    method, trained = methods.make(p), training.make_optimizer()
    checkpoints = training.Checkpoints(
        tmp_path / "run" / "checkpoints", training.about_run(p, ["Breakout"], "of a test")
    )
    checkpoints.save(training.init_state(method.build(p.encoder, 1, 1), trained)[1])
    checkpoints.close()
    source, batch = transfer.load(tmp_path / "run"), make_batch(2, 1)
    frozen = source.names("encoder + embedding")
    needed = {}
    for names in ((), frozen):
        network, optimizer = (
            method.build(num_games=1, seed=2, **source.architecture),
            training.make_optimizer(frozen=names),
        )
        graph, state = transfer.init_state(network, optimizer, source, "encoder + embedding")
        objective = method.objective(graph, [4])
        needed[names] = training.memory_needed(objective, state, batch, frozen=names)
        if names:
            state, metrics = training.make_train_step(objective, optimizer)(state, batch)
            assert np.isfinite(float(metrics["loss"]))
            after = training.flat_params(state.params)
            assert all(
                np.array_equal(after[path], source.params[path]) for path in after if training.is_part(path, frozen)
            )
    encoder = sum(x.nbytes for path, x in source.params.items() if training.is_part(path, frozen))
    assert encoder > 150e6, "ResNet-101 and its embedding, float32"
    assert needed[()]["state"] - needed[frozen]["state"] == 2 * encoder, "Adam's two moments"
    assert needed[()]["gradients"] - needed[frozen]["gradients"] == encoder
    assert needed[frozen]["activations"] < needed[()]["activations"]
    optimizer = training.make_optimizer()
    learner = agents.multi_task_learner(lambda _: network, [4], optimizer, seed=0)
    learner = learner._replace(state=transfer.init_state(network, optimizer, source, "encoder")[1])
    state, metrics = learner.update(learner.state, jax.tree.map(jnp.asarray, batch))
    assert np.isfinite(float(metrics["loss"])) and int(state.step) == 1
    assert networks.count_parameters(network.encoder) == pytest.approx(42.5e6, rel=0.05)
