"""Losses against references written as explicit loops in float64, hand-computed numbers, and gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from stacks import batch_of_stacks

from scaled_ql import losses, methods, training
from scaled_ql.games import NUM_ACTIONS

ATOMS = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
PRECISIONS = pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-4), ("float64", 1e-10)])
hunt = settings(max_examples=40, deadline=None)


# The references: plain Python floats, one number at a time.


def reference_softmax(logits):
    highest = max(float(x) for x in logits)
    weights = [math.exp(float(x) - highest) for x in logits]
    return [weight / sum(weights) for weight in weights]


def reference_entropy(rows):
    """Mean over the rows of a softmax's entropy."""
    return sum(-p * math.log(p) for row in rows for p in reference_softmax(row) if p) / len(rows)


def reference_expected_q(logits, atoms):
    return sum(p * float(z) for p, z in zip(reference_softmax(logits), atoms))


def reference_greedy(q, mask):
    best = None
    for action, allowed in enumerate(mask):
        if allowed and (best is None or q[action] > q[best]):
            best = action
    return best


def reference_projection(target_atoms, probabilities, atoms):
    low, high, last = float(atoms[0]), float(atoms[-1]), len(atoms) - 1
    projected = [0.0] * len(atoms)
    for z, p in zip(target_atoms, probabilities):
        position = min((min(max(float(z), low), high) - low) / (high - low) * last, last)
        below, above = math.floor(position), math.ceil(position)
        if below == above:
            projected[below] += float(p)
        else:
            projected[below] += float(p) * (above - position)
            projected[above] += float(p) * (position - below)
    return projected


def reference_c51(logits, action, reward, discount, target_logits, selector_q, mask, atoms):
    probabilities = reference_softmax(target_logits[reference_greedy(selector_q, mask)])
    target = reference_projection([float(reward) + float(discount) * float(z) for z in atoms], probabilities, atoms)
    highest = max(float(x) for x in logits[action])
    normalizer = highest + math.log(sum(math.exp(float(x) - highest) for x in logits[action]))
    return sum(p * (normalizer - float(x)) for p, x in zip(target, logits[action]))


def reference_mse(q, action, reward, discount, target_q, selector_q, mask):
    target = float(reward) + float(discount) * float(target_q[reference_greedy(selector_q, mask)])
    return (float(q[action]) - target) ** 2


def reference_cql(q, action, mask):
    allowed = [float(value) for value, keep in zip(q, mask) if keep]
    highest = max(allowed)
    return highest + math.log(sum(math.exp(value - highest) for value in allowed)) - float(q[action])


def reference_batch(outputs, target_outputs, selector_outputs, batch, masks, atoms, alpha):
    """TD and CQL of each transition, and the loss, from network outputs at s_t, and twice at s_{t+n}."""
    td, cql = [], []
    for row, game in enumerate(batch.game):
        mask, one = masks[game], (batch.action[row], batch.reward[row], batch.discount[row], target_outputs[row])
        if outputs.ndim == 3:
            q, selector_q = ([reference_expected_q(x, atoms) for x in o[row]] for o in (outputs, selector_outputs))
            td.append(reference_c51(outputs[row], *one, selector_q, mask, atoms))
        else:
            q = outputs[row]
            td.append(reference_mse(q, *one, selector_outputs[row], mask))
        cql.append(reference_cql(q, batch.action[row], mask))
    return np.array(td), np.array(cql), np.mean(td) + alpha * np.mean(cql)


# Agreement with the references.

project, c51, mse, cql, expected_q, greedy = map(
    jax.jit,
    (
        losses.project_categorical,
        losses.c51_loss,
        losses.mse_loss,
        losses.cql_loss,
        losses.expected_q,
        losses.greedy_action,
    ),
)


def arrays(shape, size):
    # No subnormal numbers: XLA takes them for zero on a CPU, NumPy does not.
    return hnp.arrays(np.float32, shape, elements=st.floats(-size, size, width=32, allow_subnormal=False))


masks = hnp.arrays(bool, NUM_ACTIONS).filter(np.any) | st.integers(1, NUM_ACTIONS).map(
    lambda n: np.arange(NUM_ACTIONS) < n
)


def draw_allowed(data, mask):
    return data.draw(st.sampled_from(np.flatnonzero(mask).tolist()))


@PRECISIONS
@hunt
@given(data=st.data(), num_atoms=st.sampled_from([2, 5, 51]), low=st.floats(-30, 0), width=st.floats(1, 60))
def test_project_categorical_equals_floor_and_ceil_neighbours(dtype, tolerance, data, num_atoms, low, width):
    atoms = np.linspace(low, low + width, num_atoms).astype(dtype)
    target_atoms = data.draw(arrays(7, 100)).astype(dtype)
    probabilities = data.draw(arrays(7, 1).map(np.abs)).astype(dtype)
    with jax.enable_x64(dtype == "float64"):
        projected = np.asarray(project(target_atoms, probabilities, atoms))
    assert projected.dtype == dtype and (projected >= 0).all()
    np.testing.assert_allclose(projected, reference_projection(target_atoms, probabilities, atoms), atol=tolerance)
    np.testing.assert_allclose(projected.sum(), probabilities.sum(), atol=tolerance)


@PRECISIONS
@hunt
@given(
    data=st.data(), mask=masks, seed=st.integers(0, 2**32 - 1), size=st.floats(0, 5), num_atoms=st.sampled_from([5, 51])
)
def test_c51_loss_and_expected_q_equal_references(dtype, tolerance, data, mask, seed, size, num_atoms):
    rng = np.random.default_rng(seed)
    atoms = np.linspace(-20, 20, num_atoms).astype(dtype)
    logits, target_logits = (size * rng.normal(size=(2, NUM_ACTIONS, num_atoms))).astype(dtype)
    selector_q = data.draw(arrays(NUM_ACTIONS, 1e6)).astype(dtype)
    reward = np.asarray(data.draw(st.floats(-50, 50, width=32)), dtype)
    discount = np.asarray(data.draw(st.sampled_from([0.0, 0.99**3]) | st.floats(0, 1, width=32)), dtype)
    arguments = (logits, draw_allowed(data, mask), reward, discount, target_logits, selector_q, mask, atoms)
    with jax.enable_x64(dtype == "float64"):
        loss, q = c51(*arguments), expected_q(logits, atoms)
    assert loss.dtype == q.dtype == dtype and q.shape == (NUM_ACTIONS,)
    np.testing.assert_allclose(loss, reference_c51(*arguments), rtol=1e-5, atol=tolerance)
    np.testing.assert_allclose(q, [reference_expected_q(row, atoms) for row in logits], atol=tolerance)


@PRECISIONS
@hunt
@given(data=st.data(), mask=masks, q=arrays(NUM_ACTIONS, 50), target_q=arrays(NUM_ACTIONS, 50))
def test_mse_cql_and_greedy_equal_references(dtype, tolerance, data, mask, q, target_q):
    q, target_q = q.astype(dtype), target_q.astype(dtype)
    action, selector_q = draw_allowed(data, mask), data.draw(arrays(NUM_ACTIONS, 1e6)).astype(dtype)
    reward, discount = (np.asarray(data.draw(st.floats(*ends, width=32)), dtype) for ends in ((-50, 50), (0, 1)))
    arguments = (q, action, reward, discount, target_q, selector_q, mask)
    with jax.enable_x64(dtype == "float64"):
        results = jax.device_get((mse(*arguments), cql(q, action, mask), greedy(selector_q, mask)))
    assert results[0].dtype == results[1].dtype == dtype
    np.testing.assert_allclose(results[0], reference_mse(*arguments), rtol=1e-5, atol=tolerance)
    np.testing.assert_allclose(results[1], reference_cql(q, action, mask), rtol=1e-6, atol=tolerance)
    assert results[2] == reference_greedy(selector_q, mask)
    assert results[1] > -tolerance  # a log-sum-exp is at least each of its terms


entropies = jax.jit(jax.vmap(losses.entropy))


@PRECISIONS
@hunt
@given(logits=arrays((4, 51), 80))
def test_entropy_equals_reference_within_0_and_the_uniform_distributions(dtype, tolerance, logits):
    with jax.enable_x64(dtype == "float64"):
        nats = np.asarray(entropies(logits.astype(dtype)))
    assert nats.dtype == dtype and (nats > -tolerance).all() and (nats < math.log(51) + tolerance).all()
    np.testing.assert_allclose(nats.mean(), reference_entropy(logits), atol=tolerance)


# Hand-computed numbers.


def test_entropy_by_hand():
    np.testing.assert_allclose(losses.entropy(jnp.zeros(51)), 3.9318, atol=1e-4)
    np.testing.assert_allclose(losses.entropy(jnp.log(jnp.array([1.0, 2, 1]))), 1.5 * math.log(2), rtol=1e-6)
    np.testing.assert_allclose(losses.entropy(jnp.array([1e4, 0, 0])), 0, atol=1e-6)


def test_unit_normal_logits_are_scipys_density_on_the_atoms():
    atoms = losses.support()
    density = scipy.stats.norm.pdf(np.linspace(-20, 20, 51))
    np.testing.assert_allclose(jax.nn.softmax(losses.unit_normal_logits(atoms)), density / density.sum(), atol=1e-6)
    spread = math.log(math.sqrt(2 * math.pi * math.e) / 0.8)  # a unit normal's entropy, in atoms 0.8 apart
    np.testing.assert_allclose(losses.entropy(losses.unit_normal_logits(atoms)), spread, atol=1e-4)


def test_support_is_the_papers():
    atoms = losses.support()
    assert atoms.shape == (51,) and atoms[0] == -20 and atoms[-1] == 20
    np.testing.assert_allclose(np.diff(atoms), 0.8, atol=1e-5)


def test_projection_by_hand():
    # Beyond both ends: 0.1 and 0.2. On the atom 1: 0.3. Half way below 0: 0.1 + 0.1. A quarter above 0: 0.15 + 0.05.
    projected = project(jnp.array([-5, 2.5, 1, -0.5, 0.25]), jnp.array([0.1, 0.2, 0.3, 0.2, 0.2]), jnp.array(ATOMS))
    np.testing.assert_allclose(projected, [0.1, 0.1, 0.25, 0.35, 0.2], atol=1e-6)
    on_the_ends = project(jnp.array([-2.0, 2.0]), jnp.array([0.4, 0.6]), jnp.array(ATOMS))
    np.testing.assert_array_equal(on_the_ends, np.float32([0.4, 0, 0, 0, 0.6]))


@pytest.mark.parametrize(
    "reward, expected",
    [(1.0, math.log(2)), (7.0, math.log(8)), (-7.0, math.log(8)), (0.5, (math.log(8) + math.log(2)) / 2)],
)
def test_c51_after_termination_puts_all_mass_at_the_reward(reward, expected):
    logits = jnp.zeros((2, 5)).at[1, 3].set(math.log(4))  # action 1: 1/8, 1/8, 1/8, 4/8, 1/8
    target_logits = jnp.array(np.random.default_rng(0).normal(size=(2, 5)))
    loss = c51(logits, 1, reward, 0.0, target_logits, jnp.zeros(2), jnp.array([True, True]), jnp.array(ATOMS))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_td_losses_by_hand_follow_the_selector():
    mask = jnp.array([True, True, False])
    q, target_q = jnp.array([9.0, 1.5, 9.0]), jnp.array([1.0, 3.0, 100.0])
    # Its own choice is action 1: target 0.5 + 0.9 * 3 = 3.2. A selector that prefers action 0: 0.5 + 0.9 * 1 = 1.4.
    np.testing.assert_allclose(mse(q, 1, 0.5, 0.9, target_q, target_q, mask), 1.7**2, rtol=1e-5)
    selector_q = jnp.array([2.0, 1.0, 100.0])
    np.testing.assert_allclose(mse(q, 1, 0.5, 0.9, target_q, selector_q, mask), 0.1**2, rtol=1e-4)

    # Nearly all mass at 2, at -2 and at 0; the target is 0 + 0.5 z: 1, -1 and 0.
    target_logits = jnp.full((3, 5), -100.0).at[[0, 1, 2], [4, 0, 2]].set(100.0)
    logits = jnp.log(jnp.array([[1.0] * 5, [1.0, 2.0, 3.0, 4.0, 6.0], [1.0] * 5]))  # action 1: i / 16
    atoms = jnp.array(ATOMS)
    own = expected_q(target_logits, atoms)
    np.testing.assert_allclose(own, [2, -2, 0], atol=1e-5)
    loss = c51(logits, 1, 0.0, 0.5, target_logits, own, mask, atoms)
    np.testing.assert_allclose(loss, math.log(16 / 4), rtol=1e-5)
    loss = c51(logits, 1, 0.0, 0.5, target_logits, jnp.array([1.0, 2.0, 100.0]), mask, atoms)
    np.testing.assert_allclose(loss, math.log(16 / 2), rtol=1e-5)


def test_cql_by_hand():
    q = jnp.log(jnp.array([1.0, 2.0, 5.0, 1e30]))
    loss = cql(q, 1, jnp.array([True, True, True, False]))
    np.testing.assert_allclose(loss, math.log(8 / 2), rtol=1e-6)
    alone = cql(q, 1, jnp.array([False, True, False, False]))
    np.testing.assert_allclose(alone, 0, atol=1e-6)


# Masks and gradients.


@given(mask=masks, huge=st.sampled_from([1.0, 1e8, 3e38, math.inf]), q=arrays(NUM_ACTIONS, 50))
@hunt
def test_masked_actions_are_never_chosen(mask, huge, q):
    chosen = greedy(np.where(mask, q, np.float32(huge)), mask)
    assert mask[chosen] and q[chosen] == q[mask].max()


@given(data=st.data(), mask=masks, seed=st.integers(0, 2**32 - 1), masked=st.sampled_from([0.0, 50.0, 1e30, -1e30]))
@hunt
def test_masked_outputs_get_no_gradient_and_change_nothing(data, mask, seed, masked):
    rng, action = np.random.default_rng(seed), draw_allowed(data, mask)
    atoms = losses.support(-2, 2, 5)
    plain = rng.normal(size=(3, NUM_ACTIONS, 5)).astype(np.float32)
    outputs, target, selector = np.where(mask[:, None], plain, np.float32(masked))
    gradients = gradients_of_all(outputs, target, selector, action, mask, atoms)
    for gradient in gradients:
        assert np.isfinite(gradient).all() and (np.asarray(gradient)[~mask] == 0).all()
        assert np.asarray(gradient)[action].any() or mask.sum() == 1
    for gradient, unmasked in zip(gradients, gradients_of_all(*plain, action, mask, atoms)):
        np.testing.assert_array_equal(gradient, unmasked)


@jax.jit
def gradients_of_all(outputs, target, selector, action, mask, atoms):
    """Gradients of C51, of C51's CQL, of MSE and of its CQL with respect to the outputs."""
    return (
        jax.grad(losses.c51_loss)(outputs, action, 0.3, 0.9, target, selector[:, 0], mask, atoms),
        jax.grad(lambda x: losses.cql_loss(losses.expected_q(x, atoms), action, mask))(outputs),
        jax.grad(losses.mse_loss)(outputs[:, 0], action, 0.3, 0.9, target[:, 0], selector[:, 0], mask),
        jax.grad(lambda x: losses.cql_loss(x[:, 0], action, mask))(outputs),
    )


def test_targets_get_no_gradient():
    rng = np.random.default_rng(0)
    logits, target = jnp.array(rng.normal(size=(2, NUM_ACTIONS, 5)))
    mask, atoms = jnp.arange(NUM_ACTIONS) < 6, losses.support(-2, 2, 5)
    with_respect_to = (0, 2, 3, 4, 5)  # the prediction; reward, discount, target network, selector
    gradients = jax.jit(jax.grad(losses.c51_loss, with_respect_to))(
        logits, 3, 0.3, 0.9, target, target[:, 0], mask, atoms
    )
    gradients += jax.jit(jax.grad(losses.mse_loss, with_respect_to))(
        logits[:, 0], 3, 0.3, 0.9, target[:, 0], target[:, 0], mask
    )
    assert [bool(np.any(gradient)) for gradient in gradients] == [True] + 4 * [False] + [True] + 4 * [False]


# The whole batch, as the train step computes it.

NUM_GAME_ACTIONS = [3, 18, 7]
GAME_MASKS = np.array([[action < n for action in range(NUM_ACTIONS)] for n in NUM_GAME_ACTIONS])


def reference_metrics(outputs, target_outputs, selector_outputs, batch, atoms, alpha):
    td, cql, loss = reference_batch(outputs, target_outputs, selector_outputs, batch, GAME_MASKS, atoms, alpha)
    game, action = batch.game, batch.action
    q = outputs if outputs.ndim == 2 else np.array([[reference_expected_q(x, atoms) for x in row] for row in outputs])
    return {
        "loss": loss,
        "td_loss": td.mean(),
        "cql_loss": cql.mean(),
        "q_data": np.mean([q[row, action] for row, action in enumerate(batch.action)]),
        "q_greedy": np.mean([max(q[row, : NUM_GAME_ACTIONS[game]]) for row, game in enumerate(batch.game)]),
        "td_loss_sum": [sum(td[batch.game == game]) for game in range(3)],
        "td_loss_count": [sum(batch.game == game) for game in range(3)],
        **({} if outputs.ndim == 2 else {"entropy": reference_entropy(outputs[range(len(game)), action])}),
    }


def assert_metrics(metrics, expected, tolerance):
    assert metrics.keys() == expected.keys() | {"grad_norm"}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=tolerance, atol=tolerance, err_msg=name)
    mean = metrics["td_loss_sum"].sum() / metrics["td_loss_count"].sum()
    np.testing.assert_allclose(mean, metrics["td_loss"], rtol=1e-5)


class Table(nnx.Module):
    """A network whose parameters are its outputs: a state's number is its one pixel."""

    def __init__(self, table):
        self.table = nnx.Param(jnp.array(table))

    def features(self, observation, game, augment=None):
        return self.table[...][game, observation[:, 0, 0, 0]]

    def heads(self, features, game):
        return features

    def __call__(self, observation, game):
        return self.features(observation, game)


@pytest.mark.parametrize("double_q", [False, True])
@pytest.mark.parametrize("head", ["c51", "mse"])
def test_batch_loss_and_its_gradient_equal_the_references(head, double_q):
    rng, alpha, atoms = np.random.default_rng(1), 0.3, np.linspace(-2, 2, 3)
    game, now, later = np.array([0, 1, 2, 0], np.int32), [0, 0, 1, 1], [1, 1, 0, 0]
    batch = batch_of_stacks(
        observation=np.array(now, np.uint8).reshape(4, 1, 1, 1),
        action=np.array([2, 14, 6, 0], np.int32),
        reward=rng.normal(size=4),
        discount=np.array([0.9, 0.0, 0.7, 0.9]),
        next_observation=np.array(later, np.uint8).reshape(4, 1, 1, 1),
        game=game,
    )
    table, target_table = rng.normal(size=(2, 3, 2, NUM_ACTIONS, *([3] if head == "c51" else [])))

    def outputs(table, selector_table):
        return table[game, now], target_table[game, later], selector_table[game, later]

    def loss(table):
        values = outputs(table, table if double_q else target_table)
        return reference_batch(*values, batch, GAME_MASKS, atoms, alpha)[2]

    gradient = np.zeros_like(table)
    for index in np.ndindex(table.shape):  # central differences
        step = np.zeros_like(table)
        step[index] = 1e-5
        gradient[index] = (loss(table + step) - loss(table - step)) / 2e-5

    with jax.enable_x64(True):
        optimizer = optax.sgd(1.0)  # its step is the gradient
        graph, state = training.init_state(Table(table), optimizer)
        state = state._replace(target_params={"table": jnp.array(target_table)})
        settings = {"head": head, "alpha": alpha, "atoms": jnp.array(atoms), "double_q": double_q}
        objective = methods.q_learning(**settings).objective(graph, NUM_GAME_ACTIONS)
        train_step = training.make_train_step(objective, optimizer)
        state, metrics = jax.device_get(train_step(state, batch))
    expected = reference_metrics(*outputs(table, table if double_q else target_table), batch, atoms, alpha)
    assert_metrics(metrics, expected, 1e-10)
    step = table - state.params["table"]
    np.testing.assert_allclose(step, gradient, atol=1e-9)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-6)
    visited = np.zeros(step.shape[:3], bool)
    visited[game, now] = GAME_MASKS[game]
    assert (step[~visited] == 0).all() and (step[visited] != 0).all()


@PRECISIONS
@hunt
@given(seed=st.integers(0, 2**32 - 1), layers=st.integers(1, 5), target=st.floats(0, 1))
def test_attention_loss_is_a_lagrangian_whose_multipliers_climb(dtype, tolerance, seed, layers, target):
    rng = np.random.default_rng(seed)
    entropies, logs = rng.uniform(size=layers), rng.normal(size=layers)
    expected = sum(math.exp(a) * (target - h) for h, a in zip(entropies.tolist(), logs.tolist()))
    with jax.enable_x64(dtype == "float64"):
        inputs = jnp.array(entropies, dtype), jnp.array(logs, dtype)
        loss, gradients = jax.value_and_grad(losses.attention_loss, argnums=(0, 1))(*inputs, target)
    np.testing.assert_allclose(loss, expected, atol=10 * tolerance)
    np.testing.assert_allclose(gradients[0], -np.exp(logs), rtol=tolerance)
    np.testing.assert_allclose(gradients[1], -np.exp(logs) * (target - entropies), atol=10 * tolerance)
