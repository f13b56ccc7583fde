"""One transition's pull, checked against the losses, the formulas and finite steps."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaled_ql import losses, methods, networks, training, walkthrough
from scaled_ql.replay import open_replay

ATOMS = losses.support(-3.0, 3.0, 21)
MASK = jnp.arange(18) < 4
LOGITS, TARGET_LOGITS = jax.random.normal(jax.random.key(0), (2, 18, 21))
TRANSITION = (LOGITS, jnp.int32(2), jnp.float32(0.8), jnp.float32(0.7), TARGET_LOGITS, MASK, ATOMS)


def scalar_target() -> float:
    q = losses.expected_q(TARGET_LOGITS, ATOMS)
    return float(0.8 + 0.7 * q[losses.greedy_action(q, MASK)])


@pytest.mark.parametrize("head", ["c51", "two_hot", "hl_gauss"])
def test_a_categorical_target_is_a_distribution_around_the_scalar_one(head: str) -> None:
    pull = walkthrough.pull(*TRANSITION, head, 0.05)
    assert pull.action == 2
    np.testing.assert_allclose(pull.target.sum(), 1, atol=1e-6)
    assert pull.target.min() > -1e-6
    slack = {"c51": 0.02, "two_hot": 1e-5, "hl_gauss": 1e-3}[head]  # of c51, what is beyond the support is clipped
    assert pull.target_mean == pytest.approx(scalar_target(), abs=slack)
    np.testing.assert_allclose(pull.td_gradient[2], pull.predicted - pull.target, atol=1e-7)
    assert not np.delete(pull.td_gradient, 2, axis=0).any(), "the TD error is of the data's action"


def test_c51s_target_is_the_projection() -> None:
    q = losses.expected_q(TARGET_LOGITS, ATOMS)
    probabilities = jax.nn.softmax(TARGET_LOGITS[losses.greedy_action(q, MASK)])
    expected = losses.project_categorical(0.8 + 0.7 * ATOMS, probabilities, ATOMS)
    np.testing.assert_allclose(walkthrough.pull(*TRANSITION).target, expected, atol=1e-6)


def test_mse_has_a_scalar_target_only() -> None:
    pull = walkthrough.pull(*TRANSITION, "mse", 0.05)
    assert pull.target is None
    assert pull.target_mean == pytest.approx(scalar_target(), abs=1e-6)
    probabilities = np.asarray(jax.nn.softmax(LOGITS[2]))
    mean = probabilities @ ATOMS
    expected = 2 * (mean - pull.target_mean) * probabilities * (ATOMS - mean)
    np.testing.assert_allclose(pull.td_gradient[2], expected, atol=1e-6)


def test_cql_pushes_the_datas_action_up_and_leaves_masked_ones_alone() -> None:
    pull, twice = (walkthrough.pull(*TRANSITION, "c51", alpha) for alpha in (0.05, 0.1))
    assert pull.cql_push[2] > 0 and (pull.cql_push[[0, 1, 3]] < 0).all()
    assert not pull.cql_push[4:].any() and not pull.cql_gradient[4:].any()
    np.testing.assert_allclose(twice.cql_gradient, 2 * pull.cql_gradient, rtol=1e-5)
    np.testing.assert_array_equal(twice.td_gradient, pull.td_gradient)


def test_a_push_is_what_a_small_step_does_to_q() -> None:
    with jax.enable_x64(True):
        logits, atoms = np.asarray(LOGITS, np.float64), np.asarray(ATOMS, np.float64)
        gradient = np.random.default_rng(0).normal(size=logits.shape)
        steps = [losses.expected_q(logits + size * gradient, atoms) for size in (-1e-5, 1e-5)]
        push = walkthrough.push_on_q(jnp.asarray(logits), jnp.asarray(gradient), jnp.asarray(atoms))
        np.testing.assert_allclose(push, (steps[0] - steps[1]) / 2e-5, rtol=1e-6)


def test_the_exercise_pulls_at_the_heads_bias_as_training_does(recording: Path) -> None:
    data = open_replay(recording)
    network = networks.make_q_network("nature_narrow", 2, "c51", 0, num_atoms=21, hidden_sizes=(16, 16))
    graph, state = training.init_state(network, training.make_optimizer())
    forward = jax.jit(partial(training.apply, graph, state.params))
    pull = walkthrough.what_if(data, "Freeway", 20, forward, forward, ATOMS, n_step=5, discount=0.97, alpha=0.3)
    objective = methods.q_learning(alpha=0.3, atoms=ATOMS).objective(graph, [4, 3])
    batch = data.batch("Freeway", [20], 5, 0.97)
    # Selected within what is compiled: nobody waits for the other gradients.
    gradient_of = jax.jit(lambda *inputs: jax.grad(objective, has_aux=True)(*inputs)[0]["head_bias"])
    of_bias = gradient_of(state.params, state.target_params, batch, jax.random.key(0)).reshape(2, 18, 21)
    np.testing.assert_allclose(pull.td_gradient + pull.cql_gradient, of_bias[1], atol=1e-7)
    assert not of_bias[0].any()
