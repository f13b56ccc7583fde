"""The methods' losses, objectives and preferences against plain float64 Python, and the limits in which they agree."""

import functools
import math
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from stacks import batch_of_stacks, windows
from test_losses import (
    PRECISIONS,
    arrays,
    draw_allowed,
    hunt,
    masks,
    reference_c51,
    reference_cql,
    reference_entropy,
    reference_expected_q,
    reference_greedy,
    reference_mse,
    reference_softmax,
)

from scaled_ql import losses, methods, parameters, training
from scaled_ql.games import NUM_ACTIONS
from scaled_ql.methods import common
from scaled_ql.networks import BCQNetwork, make_q_network, q_network

ATOMS = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])


# The references: plain Python floats, one number at a time.


def reference_two_hot(value, atoms):
    value = min(max(float(value), float(atoms[0])), float(atoms[-1]))
    weights = [0.0] * len(atoms)
    for left in range(len(atoms) - 1):
        low, high = float(atoms[left]), float(atoms[left + 1])
        if low <= value <= high:
            weights[left], weights[left + 1] = (high - value) / (high - low), (value - low) / (high - low)
            return weights


def reference_hl_gauss(value, atoms, sigma=0.75):
    width = (float(atoms[-1]) - float(atoms[0])) / (len(atoms) - 1)
    value = min(max(float(value), float(atoms[0])), float(atoms[-1]))
    scale = sigma * width * math.sqrt(2)
    masses = []
    for atom in atoms:
        low, high = ((float(atom) + side * width / 2 - value) / scale for side in (-1, 1))
        # From the side where the tail is, so that small masses are not differences of large ones.
        masses.append((math.erfc(low) - math.erfc(high) if low > 0 else math.erfc(-high) - math.erfc(-low)) / 2)
    return [mass / math.fsum(masses) for mass in masses]


def reference_log_sum_exp(values):
    highest = max(map(float, values))
    return highest + math.log(math.fsum(math.exp(float(value) - highest) for value in values))


def reference_cross_entropy(target, logits):
    normalizer = reference_log_sum_exp(logits)
    return math.fsum(p * (normalizer - float(x)) for p, x in zip(target, logits))


def reference_histogram(encode, logits, action, reward, discount, target_logits, selector_q, allowed, atoms):
    q = reference_expected_q(target_logits[reference_greedy(selector_q, allowed)], atoms)
    return reference_cross_entropy(encode(float(reward) + float(discount) * q, atoms), logits[action])


def reference_likely(logits, mask, tau):
    """By probabilities, not their logarithms."""
    actions = [action for action, has in enumerate(mask) if has]
    policy = dict(zip(actions, reference_softmax([logits[action] for action in actions])))
    return [has and policy[action] >= tau * max(policy.values()) for action, has in enumerate(mask)]


def reference_bc(logits, action, mask):
    actions = [number for number, has in enumerate(mask) if has]
    return -math.log(reference_softmax([logits[number] for number in actions])[actions.index(action)])


def reference_joint(logits, mask):
    """p(a, R|s): {(action, atom's number): probability}."""
    cells = [(action, atom) for action, has in enumerate(mask) if has for atom in range(logits.shape[1])]
    return dict(zip(cells, reference_softmax([logits[cell] for cell in cells])))


def reference_return_bc(logits, action, return_to_go, mask, atoms):
    joint = reference_joint(logits, mask)
    weights = reference_two_hot(return_to_go, atoms)
    return -sum(weight * math.log(joint[action, atom]) for atom, weight in enumerate(weights) if weight)


def reference_expert(logits, mask, atoms, kappa):
    """p(a|s, expert): the sum over R of p(a|s, R) p(R|s, expert), where p(R|s, expert) ~ p(R|s) exp(kappa R)."""
    joint, number = reference_joint(logits, mask), range(len(atoms))
    of_return = [sum(joint[action, atom] for action, has in enumerate(mask) if has) for atom in number]
    expert_return = [p * math.exp(kappa * float(z)) for p, z in zip(of_return, atoms)]
    expert_return = [p / sum(expert_return) for p in expert_return]
    return [
        sum(joint[action, atom] / of_return[atom] * expert_return[atom] for atom in number) if has else 0.0
        for action, has in enumerate(mask)
    ]


def reference_shift(image, offset):
    height, width, _ = image.shape
    moved = np.empty_like(image)
    for i in range(height):
        for j in range(width):
            row, column = i - offset[0], j - offset[1]
            moved[i, j] = image[min(max(row, 0), height - 1), min(max(column, 0), width - 1)]
    return moved


def central_differences(function, x, step=1e-5):
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        change = np.zeros_like(x)
        change[index] = step
        gradient[index] = (function(x + change) - function(x - change)) / (2 * step)
    return gradient


# Scalars as distributions.

two_hot, hl_gauss = jax.jit(losses.two_hot), jax.jit(losses.hl_gauss)
supports = {"num_atoms": st.sampled_from([2, 51]), "low": st.floats(-30, 0), "width": st.floats(1, 60)}


@PRECISIONS
@hunt
@given(value=st.floats(-100, 100, width=32, allow_subnormal=False), **supports)
def test_encodings_equal_references_and_are_distributions(dtype, tolerance, value, num_atoms, low, width):
    atoms = np.linspace(low, low + width, num_atoms).astype(dtype)
    value = np.asarray(value, dtype)
    with jax.enable_x64(dtype == "float64"):
        weights, histogram = (np.asarray(encode(value, atoms)) for encode in (two_hot, hl_gauss))
        mirrored = np.asarray(hl_gauss(-value, -atoms[::-1]))
    for encoded, reference in ((weights, reference_two_hot), (histogram, reference_hl_gauss)):
        assert encoded.dtype == dtype and encoded.shape == atoms.shape and (encoded >= 0).all()
        np.testing.assert_allclose(encoded.sum(), 1, atol=tolerance)
        np.testing.assert_allclose(encoded, reference(value, atoms), atol=tolerance)
    clipped = np.clip(value, atoms[0], atoms[-1])
    np.testing.assert_allclose(weights @ atoms, clipped, atol=100 * tolerance)
    nonzero = np.flatnonzero(weights)
    assert len(nonzero) <= 2 and np.ptp(nonzero) <= 1
    np.testing.assert_allclose(mirrored[::-1], histogram, atol=tolerance)


def test_hl_gauss_equals_scipys_truncated_normal_and_is_symmetric_around_its_value():
    atoms, sigma = np.linspace(-20, 20, 51), 0.75
    with jax.enable_x64(True):
        histogram = np.asarray(hl_gauss(jnp.array(3.1), jnp.array(atoms)))
        around_atom = np.asarray(hl_gauss(jnp.array(atoms[25]), jnp.array(atoms)))
        between = np.asarray(hl_gauss(jnp.array((atoms[24] + atoms[25]) / 2), jnp.array(atoms)))
    edges = np.append(atoms - 0.4, 20.4)
    ends = (edges[[0, -1]] - 3.1) / (sigma * 0.8)
    expected = np.diff(scipy.stats.truncnorm.cdf(edges, *ends, loc=3.1, scale=sigma * 0.8))
    np.testing.assert_allclose(histogram, expected, atol=1e-12)
    np.testing.assert_allclose(histogram @ atoms, 3.1, atol=1e-3)  # far from the ends its mean is nearly the value
    np.testing.assert_allclose(around_atom, around_atom[::-1], atol=1e-14)
    np.testing.assert_allclose(between[:50], between[:50][::-1], atol=1e-14)


@pytest.mark.parametrize("value", [-5.0, -2.0, -1.0, 0.0, 2.0, 7.0])
def test_narrow_hl_gauss_on_an_atom_is_two_hot(value):
    narrow = hl_gauss(jnp.float32(value), jnp.array(ATOMS), 1e-3)
    np.testing.assert_array_equal(narrow, two_hot(jnp.float32(value), jnp.array(ATOMS)))


def test_narrow_hl_gauss_is_a_one_at_the_nearest_atom():
    for value, nearest in ((0.4, 2), (0.6, 3), (-1.7, 0), (-1.4, 1)):
        np.testing.assert_array_equal(hl_gauss(jnp.float32(value), jnp.array(ATOMS), 1e-3), np.eye(5)[nearest])


histogram = {
    encode.__name__: jax.jit(functools.partial(losses.histogram_loss, encode=encode))
    for encode in (losses.two_hot, losses.hl_gauss)
}
c51 = jax.jit(losses.c51_loss)


@PRECISIONS
@pytest.mark.parametrize("encode, reference", [("two_hot", reference_two_hot), ("hl_gauss", reference_hl_gauss)])
@hunt
@given(data=st.data(), mask=masks, seed=st.integers(0, 2**32 - 1), size=st.floats(0, 5))
def test_histogram_loss_equals_reference(encode, reference, dtype, tolerance, data, mask, seed, size):
    rng = np.random.default_rng(seed)
    atoms = np.linspace(-20, 20, 51).astype(dtype)
    logits, target_logits = (size * rng.normal(size=(2, NUM_ACTIONS, 51))).astype(dtype)
    selector_q = data.draw(arrays(NUM_ACTIONS, 1e6)).astype(dtype)
    reward = np.asarray(data.draw(st.floats(-50, 50, width=32)), dtype)
    discount = np.asarray(data.draw(st.sampled_from([0.0, 0.99**3]) | st.floats(0, 1, width=32)), dtype)
    arguments = (logits, draw_allowed(data, mask), reward, discount, target_logits, selector_q, mask, atoms)
    with jax.enable_x64(dtype == "float64"):
        loss = histogram[encode](*arguments)
    assert loss.dtype == dtype
    expected = reference_histogram(reference, *arguments)
    np.testing.assert_allclose(loss, expected, rtol=1e-4 if dtype == "float32" else 1e-10, atol=2 * tolerance)


@hunt
@given(data=st.data(), mask=masks, seed=st.integers(0, 2**32 - 1), reward=st.floats(-3, 3, width=32))
def test_two_hot_loss_is_c51s_without_a_next_state_or_with_a_certain_one(data, mask, seed, reward):
    rng = np.random.default_rng(seed)
    logits, target_logits = rng.normal(size=(2, NUM_ACTIONS, 5)).astype(np.float32)
    action, selector_q = draw_allowed(data, mask), target_logits[:, 0]
    rest = (selector_q, mask, ATOMS.astype(np.float32))
    last = (logits, action, np.float32(reward), np.float32(0), target_logits, *rest)
    np.testing.assert_allclose(histogram["two_hot"](*last), c51(*last), rtol=1e-5)
    certain = np.where(np.arange(5) == rng.integers(5, size=(NUM_ACTIONS, 1)), np.float32(200), np.float32(-200))
    certain = (logits, action, np.float32(reward), np.float32(0.9), certain, *rest)
    np.testing.assert_allclose(histogram["two_hot"](*certain), c51(*certain), rtol=1e-5)


@functools.cache
def encoded_gradients(encode):
    """With respect to the prediction; reward, discount, target network and selector."""
    return jax.jit(jax.grad(functools.partial(losses.histogram_loss, encode=getattr(losses, encode)), (0, 2, 3, 4, 5)))


@pytest.mark.parametrize("encode, reference", [("two_hot", reference_two_hot), ("hl_gauss", reference_hl_gauss)])
def test_histogram_losses_gradient_is_the_predictions_alone(encode, reference):
    rng = np.random.default_rng(0)
    logits, target_logits = rng.normal(size=(2, 4, 5))
    selector_q, mask = rng.normal(size=4), np.array([True, True, True, False])

    def loss(logits):
        return reference_histogram(reference, logits, 1, 0.3, 0.9, target_logits, selector_q, mask, ATOMS)

    with jax.enable_x64(True):
        numbers = jnp.array(0.3), jnp.array(0.9)
        gradients = encoded_gradients(encode)(logits, 1, *numbers, target_logits, selector_q, mask, ATOMS)
        np.testing.assert_allclose(gradients[0], central_differences(loss, logits), atol=1e-9)
    assert not any(np.any(gradient) for gradient in gradients[1:])


# Policies.

likely, bc = jax.jit(losses.likely_actions), jax.jit(losses.bc_loss)
return_bc, expert = jax.jit(losses.return_bc_loss), jax.jit(losses.expert_action_logits)


@hunt
@given(mask=masks, logits=arrays(NUM_ACTIONS, 20), tau=st.floats(0.001, 0.999), constant=st.floats(-50, 50))
def test_likely_actions_equal_the_reference_whatever_the_masked_logits(mask, logits, tau, constant):
    with jax.enable_x64(True):
        logits = logits.astype(np.float64)
        allowed = np.asarray(likely(logits, mask, tau))
        policy = np.array(reference_softmax(np.where(mask, logits, -np.inf)))
        close = np.isclose(policy, tau * policy.max(), rtol=1e-5)  # either is right
        np.testing.assert_array_equal(allowed[~close], np.array(reference_likely(logits, mask, tau))[~close])
        assert allowed[np.where(mask, logits, -np.inf).argmax()] and not allowed[~mask].any()
        for masked in (-1e30, 1e30, np.inf, -np.inf):
            np.testing.assert_array_equal(likely(np.where(mask, logits, masked), mask, tau), allowed)
        np.testing.assert_array_equal(np.asarray(likely(logits + constant, mask, tau))[~close], allowed[~close])


@hunt
@given(mask=masks, logits=arrays(NUM_ACTIONS, 20), low=st.sampled_from([0.0, -1e4, -1e30, -np.inf]), data=st.data())
def test_threshold_0_allows_the_games_actions_and_1_the_likeliest(mask, logits, low, data):
    unlikely = data.draw(masks)
    logits = np.where(unlikely & (np.arange(NUM_ACTIONS) != draw_allowed(data, mask)), np.float32(low), logits)
    np.testing.assert_array_equal(likely(logits, mask, 0.0), mask)
    np.testing.assert_array_equal(likely(logits, mask, 1.0), mask & (logits == logits[mask].max()))


def test_likely_actions_by_hand():
    logits = jnp.log(jnp.array([0.5, 0.16, 0.14, 0.2, 10.0]))
    mask = jnp.arange(5) < 4
    assert likely(logits, mask, 0.3).tolist() == [True, True, False, True, False]
    assert likely(logits, mask).tolist() == [True, True, False, True, False]


@PRECISIONS
@hunt
@given(data=st.data(), mask=masks, seed=st.integers(0, 2**32 - 1), size=st.floats(0, 5), kappa=st.floats(0, 4))
def test_cloning_losses_equal_references(dtype, tolerance, data, mask, seed, size, kappa):
    logits = (size * np.random.default_rng(seed).normal(size=(NUM_ACTIONS, 5))).astype(dtype)
    action, atoms = draw_allowed(data, mask), ATOMS.astype(dtype)
    return_to_go = np.asarray(data.draw(st.floats(-4, 4, width=32)), dtype)
    with jax.enable_x64(dtype == "float64"):
        nll, joint_nll = bc(logits[:, 0], action, mask), return_bc(logits, action, return_to_go, mask, atoms)
        preferred = np.asarray(expert(logits, atoms, np.asarray(kappa, dtype)))
        marginal = np.asarray(expert(logits, atoms, np.asarray(0, dtype)))
    assert nll.dtype == joint_nll.dtype == preferred.dtype == dtype
    np.testing.assert_allclose(nll, reference_bc(logits[:, 0], action, mask), rtol=1e-5, atol=tolerance)
    wanted = reference_return_bc(logits, action, return_to_go, mask, atoms)
    np.testing.assert_allclose(joint_nll, wanted, rtol=1e-5, atol=tolerance)
    for values, weight in ((preferred, kappa), (marginal, 0.0)):
        policy = reference_softmax(np.where(mask, values, -np.inf))
        np.testing.assert_allclose(policy, reference_expert(logits, mask, atoms, weight), atol=tolerance)
    joint = reference_joint(logits, mask)
    of_action = [sum(joint[number, atom] for atom in range(5)) if mask[number] else 0 for number in range(NUM_ACTIONS)]
    np.testing.assert_allclose(policy, of_action, atol=tolerance)  # kappa = 0


def test_return_cloning_is_the_returns_likelihood_and_the_actions_given_it():
    mask = np.arange(4) < 3
    logits = np.random.default_rng(0).normal(size=(4, 5))
    weights = np.exp(np.where(mask[:, None], logits, -np.inf))
    for atom, value in enumerate(ATOMS):
        of_return, of_action = weights[:, atom].sum() / weights.sum(), weights[1, atom] / weights[:, atom].sum()
        with jax.enable_x64(True):
            loss = return_bc(logits, 1, jnp.array(value), mask, ATOMS)
        np.testing.assert_allclose(loss, -math.log(of_return) - math.log(of_action), rtol=1e-12)


@jax.jit
def cloning_gradients(logits, action, return_to_go, mask, atoms):
    """Of both losses, and of the loss of returns with respect to the return."""
    both = jax.grad(losses.return_bc_loss)(logits, action, return_to_go, mask, atoms)
    return jax.grad(losses.bc_loss)(logits[:, 0], action, mask), both


@hunt
@given(data=st.data(), mask=masks, seed=st.integers(0, 2**32 - 1), masked=st.sampled_from([0.0, 80.0, 1e30, -1e30]))
def test_masked_logits_get_no_gradient_and_change_nothing(data, mask, seed, masked):
    plain = np.random.default_rng(seed).normal(size=(NUM_ACTIONS, 5)).astype(np.float32)
    changed, action = np.where(mask[:, None], plain, np.float32(masked)), draw_allowed(data, mask)
    rest = (action, np.float32(0.3), mask, ATOMS.astype(np.float32))
    for gradient, unmasked in zip(cloning_gradients(changed, *rest), cloning_gradients(plain, *rest)):
        assert np.isfinite(gradient).all() and (np.asarray(gradient)[~mask] == 0).all()
        np.testing.assert_array_equal(gradient, unmasked)


def test_cloning_gradients_equal_central_differences():
    logits, mask = np.random.default_rng(0).normal(size=(4, 5)), np.array([True, True, True, False])
    with jax.enable_x64(True):
        of_bc, of_returns = cloning_gradients(logits, 1, jnp.array(0.3), mask, ATOMS)
    numerical = central_differences(lambda x: reference_bc(x, 1, mask), logits[:, 0])
    np.testing.assert_allclose(of_bc, numerical, atol=1e-9)
    numerical = central_differences(lambda x: reference_return_bc(x, 1, 0.3, mask, ATOMS), logits)
    np.testing.assert_allclose(of_returns, numerical, atol=1e-9)


def test_dr3_is_a_dot_product_with_gradients_to_both():
    now, then = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
    value, gradients = jax.value_and_grad(losses.dr3_penalty, (0, 1))(now, then)
    np.testing.assert_allclose(value, sum(float(a) * float(b) for a, b in zip(now, then)), rtol=1e-5)
    np.testing.assert_array_equal(gradients, (then, now))


# Shifted images.


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("pixels", [1, 4])
def test_vmapped_shifts_equal_a_loop_over_pixels(dtype, pixels):
    offsets = np.array([(i, j) for i in range(-pixels, pixels + 1) for j in range(-pixels, pixels + 1)], np.int32)
    images = np.random.default_rng(0).integers(0, 256, (len(offsets), 9, 7, 2)).astype(dtype)
    moved = jax.jit(jax.vmap(functools.partial(losses.shift_image, pixels=pixels)))(images, offsets)
    assert moved.dtype == dtype
    np.testing.assert_array_equal(moved, [reference_shift(*pair) for pair in zip(images, offsets)])
    assert np.array_equal(moved[len(offsets) // 2], images[len(offsets) // 2])  # by (0, 0)


def test_offsets_are_uniform_over_the_square():
    draw = jax.jit(losses.random_offsets, static_argnums=1)
    offsets = np.asarray(draw(jax.random.key(0), 9_000, 1))
    assert offsets.shape == (9_000, 2) and offsets.dtype == np.int32
    counts = np.bincount(3 * (offsets[:, 0] + 1) + offsets[:, 1] + 1, minlength=9)
    assert len(counts) == 9 and scipy.stats.chisquare(counts).pvalue > 1e-3
    assert set(np.unique(np.asarray(draw(jax.random.key(1), 9_000, 4)))) == set(range(-4, 5))


def test_the_two_observations_and_the_rows_of_a_batch_are_shifted_independently():
    rows, columns = np.mgrid[:9, :9]
    images = np.broadcast_to(np.stack([rows, columns], -1).astype(np.float32), (3_000, 9, 9, 2))

    @jax.jit
    def both(key):
        return [4 - shift(images)[:, 4, 4] for shift in common.shifts(key, 3_000, 2)]

    now, then = jax.device_get(both(jax.random.key(0)))
    for offsets in (now, then):
        assert set(map(tuple, offsets)) == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}
    correlations = np.corrcoef(np.concatenate([now, then], 1).T)
    assert np.abs(correlations - np.eye(4)).max() < 0.07  # four standard errors
    assert np.abs(np.corrcoef(now[1:, 0], now[:-1, 0])[0, 1]) < 0.07
    assert common.shifts(jax.random.key(0), 3, 0) == (None, None)


# Objectives, of a network small enough for central differences.

NUM_GAME_ACTIONS = [2, 3]
GAME_MASKS = np.arange(NUM_ACTIONS) < np.array(NUM_GAME_ACTIONS)[:, None]
NUM_STATES, ROWS = 3, 5


class Linear(nnx.Module):
    """A representation per state, whose number is its one pixel, and a linear head per game."""

    def __init__(self, embedding, kernel):
        self.embedding, self.kernel = nnx.Param(jnp.array(embedding)), nnx.Param(jnp.array(kernel))

    def features(self, observation, game, augment=None):
        return self.embedding[...][observation[:, 0, 0, 0]]

    def heads(self, features, game):
        return jnp.einsum("bf,bf...->b...", features, self.kernel[...][game])

    def __call__(self, observation, game):
        return self.heads(self.features(observation, game), game)


def linear_params(seed, head="mse"):
    """Float64; an action that neither game has gets large outputs."""
    rng, atoms = np.random.default_rng(seed), () if head == "mse" else (len(ATOMS),)
    kernel = rng.normal(size=(2, 2, NUM_ACTIONS, *atoms))
    kernel[:, :, 3:] *= 10
    return {"embedding": rng.normal(size=(NUM_STATES, 2)), "kernel": kernel}


def linear_batch(reward=None):
    rng = np.random.default_rng(7)
    game = np.array([0, 1, 1, 0, 1], np.int32)
    return batch_of_stacks(
        observation=np.array([0, 1, 2, 1, 0], np.uint8).reshape(ROWS, 1, 1, 1),
        action=np.array([1, 2, 0, 0, 1], np.int32),
        reward=rng.normal(size=ROWS) if reward is None else reward,
        discount=np.array([0.9, 0.0, 0.7, 0.9, 0.8]),
        next_observation=np.array([1, 2, 0, 2, 1], np.uint8).reshape(ROWS, 1, 1, 1),
        game=game,
    )


def show(batch, observation, next_observation):
    """The same transitions between other images."""
    return batch_of_stacks(observation, batch.action, batch.reward, batch.discount, next_observation, batch.game)


def to_network(params):
    return BCQNetwork(*map(to_network, (params["q"], params["behaviour"]))) if "q" in params else Linear(**params)


def graph_of(params):
    return training.init_state(to_network(params), optax.sgd(1.0))[0]


def single(tree):
    return jax.tree.map(lambda x: np.float32(x) if x.dtype == np.float64 else x, tree)


def reference_outputs(params, observation, game):
    features = [params["embedding"][state] for state in observation[:, 0, 0, 0]]
    return features, [np.tensordot(x, params["kernel"][number], 1) for x, number in zip(features, game)]


REFERENCES = {
    "c51": functools.partial(reference_c51, atoms=ATOMS),
    "two_hot": functools.partial(reference_histogram, reference_two_hot, atoms=ATOMS),
    "hl_gauss": functools.partial(reference_histogram, reference_hl_gauss, atoms=ATOMS),
    "mse": reference_mse,
}


def reference_q_learning(
    params, target_params, batch, *, head, alpha, double_q=False, tau=None, reward_scale=(1, 1), dr3=0.0
):
    def to_q(outputs):
        return outputs if head == "mse" else [reference_expected_q(row, ATOMS) for row in outputs]

    network, target = (tree if tau is None else tree["q"] for tree in (params, target_params))
    features, now = reference_outputs(network, batch.observation, batch.game)
    features_then, then = reference_outputs(network, batch.next_observation, batch.game)
    _, later = reference_outputs(target, batch.next_observation, batch.game)
    rows = {name: [] for name in ("td", "cql", "data", "greedy", "share", "dr3")}
    for row, (game, action) in enumerate(zip(batch.game, batch.action)):
        mask = allowed = GAME_MASKS[game]
        if tau is not None:
            _, (logits,) = reference_outputs(params["behaviour"], batch.next_observation[row : row + 1], [game])
            allowed = reference_likely(logits, mask, tau)
            rows["share"].append(sum(allowed) / sum(mask))
        selector_q, q = (to_q(values[row][:3]) for values in (then if double_q else later, now))
        reward = batch.reward[row] / reward_scale[game]
        rows["td"].append(
            REFERENCES[head](now[row], action, reward, batch.discount[row], later[row], selector_q, allowed)
        )
        rows["cql"].append(reference_cql(q, action, mask))
        rows["data"].append(q[action])
        rows["greedy"].append(q[reference_greedy(q, mask)])
        rows["dr3"].append(sum(a * b for a, b in zip(features[row], features_then[row])))
    mean = {name: sum(values) / ROWS for name, values in rows.items() if values}
    return {
        "loss": mean["td"] + alpha * mean["cql"] + dr3 * mean["dr3"],
        "td_loss": mean["td"],
        "cql_loss": mean["cql"],
        "q_data": mean["data"],
        "q_greedy": mean["greedy"],
        "td_loss_sum": [sum(rows["td"][row] for row in range(ROWS) if batch.game[row] == game) for game in (0, 1)],
        "td_loss_count": [2, 3],
        **({} if tau is None else {"allowed_share": mean["share"]}),
        **({"dr3_penalty": mean["dr3"]} if dr3 else {}),
        **({} if head == "mse" else {"entropy": reference_entropy(np.array(now)[range(ROWS), batch.action])}),
    }


def reference_cloning(params, batch, returns):
    _, outputs = reference_outputs(params, batch.observation, batch.game)
    nll, right = [], []
    for logits, action, reward, game in zip(outputs, batch.action, batch.reward, batch.game):
        mask = GAME_MASKS[game]
        if returns:
            nll.append(reference_return_bc(logits, action, reward, mask, ATOMS))
            logits = reference_expert(logits, mask, ATOMS, 0.0)
        else:
            nll.append(reference_bc(logits, action, mask))
        right.append(reference_greedy(logits, mask) == action)
    sums = [sum(value for value, number in zip(nll, batch.game) if number == game) for game in (0, 1)]
    return {
        "loss": sum(nll) / ROWS, "nll": sum(nll) / ROWS, "accuracy": sum(right) / ROWS,
        "nll_sum": sums, "nll_count": [2, 3],
    }  # fmt: skip


def assert_equals_reference(objective, params, target_params, reference, single_precision=False):
    """Metrics, and the gradient by central differences; in a 64-bit context."""
    batch = linear_batch()
    gradients, metrics = jax.jit(jax.grad(objective, has_aux=True))(params, target_params, batch, jax.random.key(0))
    expected = reference(params)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 1e-6 if single_precision or name in ("accuracy", "allowed_share") else 1e-9
        np.testing.assert_allclose(metrics[name], value, rtol=tolerance, atol=1e-10, err_msg=name)
    leaves, structure = jax.tree.flatten(params)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for number, (name, leaf, gradient) in enumerate(zip(names, leaves, jax.tree.leaves(gradients))):
        has = np.s_[:, :, :3] if leaf.ndim > 2 else np.s_[:]  # of all games' actions

        def loss(part, number=number, leaf=leaf, has=has):
            changed = leaf.copy()
            changed[has] = part
            return reference(structure.unflatten([*leaves[:number], changed, *leaves[number + 1 :]]))["loss"]

        tolerance = 1e-6 if single_precision else 1e-8
        np.testing.assert_allclose(np.asarray(gradient)[has], central_differences(loss, leaf[has]), atol=tolerance)
        rest = np.array(gradient)
        rest[has] = 0
        assert (rest == 0).all() and np.any(gradient) == ("behaviour" not in name)


@pytest.mark.parametrize("head", ["c51", "hl_gauss", "two_hot", "mse"])
def test_q_learning_with_everything_equals_the_reference(head):
    params, target_params = ({"q": linear_params(seed, head), "behaviour": linear_params(seed + 10)} for seed in (0, 1))
    settings = {"head": head, "alpha": 0.3, "double_q": True, "tau": 0.4, "dr3": 0.2}
    reference = functools.partial(
        reference_q_learning, target_params=target_params, batch=linear_batch(), reward_scale=(2.0, 0.5), **settings
    )
    assert 0 < reference(params)["allowed_share"] < 1
    with jax.enable_x64(True):
        method = methods.bcq(atoms=jnp.array(ATOMS), **settings)
        objective = method.objective(graph_of(params), NUM_GAME_ACTIONS, jnp.array([2.0, 0.5]))
        assert_equals_reference(objective, params, target_params, reference, True)  # DR3 is in float32


@pytest.mark.parametrize("head", ["c51", "mse"])
def test_bcq_by_default_equals_the_reference_without_cql(head):
    params, target_params = ({"q": linear_params(seed, head), "behaviour": linear_params(seed + 10)} for seed in (0, 1))
    reference = functools.partial(
        reference_q_learning, target_params=target_params, batch=linear_batch(), head=head, alpha=0.0, tau=0.3
    )
    assert 0 < reference(params)["allowed_share"] < 1
    with jax.enable_x64(True):
        settings = {"head": head, "tau": 0.3, "atoms": jnp.array(ATOMS)}
        objective = methods.bcq(**settings).objective(graph_of(params), NUM_GAME_ACTIONS)
        assert_equals_reference(objective, params, target_params, reference)


def test_q_learning_by_default_equals_the_reference():
    params, target_params = linear_params(0, "c51"), linear_params(1, "c51")
    reference = functools.partial(
        reference_q_learning, target_params=target_params, batch=linear_batch(), head="c51", alpha=0.05
    )
    with jax.enable_x64(True):
        objective = methods.q_learning(atoms=jnp.array(ATOMS)).objective(graph_of(params), NUM_GAME_ACTIONS)
        assert_equals_reference(objective, params, target_params, reference)


@pytest.mark.parametrize("returns", [False, True])
def test_cloning_equals_the_reference(returns):
    params = linear_params(0, "c51" if returns else "mse")
    reference = functools.partial(reference_cloning, batch=linear_batch(), returns=returns)
    with jax.enable_x64(True):
        method = methods.return_bc(atoms=jnp.array(ATOMS)) if returns else methods.bc()
        objective = method.objective(graph_of(params), NUM_GAME_ACTIONS)
        assert_equals_reference(objective, params, {}, reference)


@pytest.mark.parametrize(
    ("method", "settings"), [("cql", {"head": "mse"}), ("cql", {"head": "hl_gauss"}), ("bcq", {"head": "c51"})]
)
def test_a_shared_head_learns_what_only_the_game_tells(method, settings):
    """The same images and actions are worth 1 in one game and -1 in the other; of BCQ both networks have such heads."""
    method = methods.METHODS[method](atoms=jnp.array(ATOMS), scale_rewards="no", **settings)
    how = {"heads": "shared", "num_atoms": len(ATOMS), "hidden_sizes": (16,)}
    network, game = method.build("nature_narrow", 2, 0, **how), np.array([0, 0, 1, 1], np.int32)
    images = np.tile(np.random.default_rng(0).integers(0, 256, (2, 84, 84, 4), np.uint8), (2, 1, 1, 1))
    action, reward, discount = np.array([0, 1, 0, 1], np.int32), np.float32(1 - 2 * game), np.zeros(4, np.float32)
    batch = batch_of_stacks(images, action, reward, discount, images, game)
    optimizer = training.make_optimizer(3e-3, 1e-8, frozen=tuple(method.before))
    graph, state = training.init_state(network, optimizer)
    step = training.make_train_step(method.objective(graph, [2, 2]), optimizer)
    for _ in range(150):
        state, metrics = step(state, batch)
    assert metrics["head_grad_rms"] > 0
    values = method.preferences(graph, [2, 2])(state.params, images, game)
    taken = np.take_along_axis(np.asarray(values), action[:, None], 1)[:, 0]
    np.testing.assert_allclose(taken, reward, atol=0.5)
    assert (np.asarray(values)[:, 2:] == -np.inf).all()


# Limits. Thresholds and scales are traced here, so that one program serves them all.


@functools.cache
def bcq_with_threshold(head):
    graph = graph_of({"q": linear_params(0, head), "behaviour": linear_params(0)})

    def loss(params, target_params, batch, tau):
        settings = {"head": head, "alpha": 0.3, "atoms": jnp.array(ATOMS, jnp.float32), "likely": tau}
        return methods.q_learning(**settings).objective(graph, NUM_GAME_ACTIONS)(params, target_params, batch, None)

    return jax.jit(jax.grad(loss, has_aux=True))


def with_behaviour(head, behaviour, seed=0):
    return single({"q": linear_params(seed, head), "behaviour": behaviour})


@pytest.mark.parametrize("head", ["c51", "mse"])
def test_bcq_without_a_threshold_is_cql_however_unlikely_an_action(head):
    behaviour, batch = linear_params(10), single(linear_batch())
    params, target_params = with_behaviour(head, behaviour), with_behaviour(head, behaviour, seed=1)
    method = methods.q_learning(head=head, alpha=0.3, atoms=jnp.array(ATOMS, jnp.float32))
    objective = method.objective(graph_of(params["q"]), NUM_GAME_ACTIONS)
    of_cql, wanted = jax.jit(jax.grad(objective, has_aux=True))(params["q"], target_params["q"], batch, None)
    for size in (1.0, 1e6, 1e30):
        params = with_behaviour(head, behaviour | {"kernel": size * behaviour["kernel"]})
        of_bcq, metrics = bcq_with_threshold(head)(params, target_params, batch, 0.0)
        assert metrics["allowed_share"] == 1
        for name in ("td_loss", "cql_loss", "td_loss_sum", "q_data"):
            np.testing.assert_array_equal(metrics[name], wanted[name])
        jax.tree.map(np.testing.assert_array_equal, of_bcq["q"], of_cql)


def test_bcq_at_threshold_1_backs_up_the_likeliest_action_alone():
    params, batch = with_behaviour("mse", linear_params(10)), single(linear_batch())
    target_params = with_behaviour("mse", linear_params(11), seed=1)
    _, metrics = bcq_with_threshold("mse")(params, target_params, batch, 1.0)
    td, better = [], 0
    for row, game in enumerate(batch.game):
        now, then = batch.observation[row, 0, 0, 0], batch.next_observation[row, 0, 0, 0]
        size = NUM_GAME_ACTIONS[game]
        likeliest = (params["behaviour"]["embedding"][then] @ params["behaviour"]["kernel"][game])[:size].argmax()
        q = params["q"]["embedding"][now] @ params["q"]["kernel"][game]
        target_q = target_params["q"]["embedding"][then] @ target_params["q"]["kernel"][game]
        td.append((q[batch.action[row]] - batch.reward[row] - batch.discount[row] * target_q[likeliest]) ** 2)
        better += target_q[:size].max() > target_q[likeliest]
    assert better  # the threshold makes a difference
    np.testing.assert_allclose(metrics["td_loss"], np.mean(td), rtol=1e-5)
    np.testing.assert_allclose(metrics["allowed_share"], (2 * 1 / 2 + 3 * 1 / 3) / 5, rtol=1e-6)


def test_bcqs_two_networks_do_not_train_each_other():
    """The policy gets no gradient and matters by what it allows alone; cloning, which trains it, knows no Q-network."""
    batch, behaviour = single(linear_batch()), linear_params(10)
    params, target_params = with_behaviour("mse", behaviour), with_behaviour("mse", behaviour, seed=1)
    gradients, metrics = bcq_with_threshold("mse")(params, target_params, batch, 1.0)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients["behaviour"]))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients["q"]))

    sharper = with_behaviour("mse", behaviour | {"kernel": 2 * behaviour["kernel"]})  # the same likeliest actions
    other, other_metrics = bcq_with_threshold("mse")(sharper, target_params, batch, 1.0)
    jax.tree.map(np.testing.assert_array_equal, other, gradients)
    jax.tree.map(np.testing.assert_array_equal, other_metrics, metrics)

    _, other_metrics = bcq_with_threshold("mse")(with_behaviour("mse", linear_params(12)), target_params, batch, 1.0)
    assert other_metrics["td_loss"] != metrics["td_loss"]


def joint_and_alone(tau):
    """Steps of a `BCQNetwork` whose policy is frozen, and of its Q-network without one; a few batches of rewards."""
    optimizer, atoms = training.make_optimizer(0.01, frozen=("behaviour",)), jnp.array(ATOMS, jnp.float32)
    params = with_behaviour("c51", linear_params(10))
    settings = {"alpha": 0.3, "atoms": atoms}
    graph, state = training.init_state(to_network(params), optimizer)
    objective = methods.bcq(tau=tau, **settings).objective(graph, NUM_GAME_ACTIONS)
    joint = training.make_train_step(objective, optimizer, target_update_period=3), state
    optimizer = training.make_optimizer(0.01)
    graph, state = training.init_state(to_network(params["q"]), optimizer)
    objective = methods.q_learning(**settings).objective(graph, NUM_GAME_ACTIONS)
    alone = training.make_train_step(objective, optimizer, target_update_period=3), state
    batches = [single(linear_batch(np.random.default_rng(seed).normal(size=ROWS))) for seed in range(8)]
    return params, joint, alone, batches


@pytest.mark.parametrize("tau", [0.0, 0.9])
def test_a_frozen_policy_keeps_its_bits_and_the_q_network_trains_as_if_alone(tau):
    params, (joint_step, joint), (alone_step, alone), batches = joint_and_alone(tau)
    assert len(jax.tree.leaves(joint.opt_state)) == len(jax.tree.leaves(alone.opt_state)), (
        "a frozen part has no moments"
    )
    for batch in batches:
        joint, _ = joint_step(joint, batch)
        alone, _ = alone_step(alone, batch)
    for tree in (joint.params, joint.target_params):
        for leaf, before in zip(jax.tree.leaves(tree["behaviour"]), jax.tree.leaves(params["behaviour"])):
            assert np.asarray(leaf).tobytes() == before.tobytes()
    same = [np.array_equal(*pair) for pair in zip(*(jax.tree.leaves(x) for x in (joint.params["q"], alone.params)))]
    assert all(same) == (tau == 0), "without a threshold it is plain Q-learning, bit for bit"


def test_a_resumed_bcq_run_is_bit_identical(tmp_path):
    _, (step, state), _, batches = joint_and_alone(0.9)
    start = jax.device_get(state)
    whole = jax.tree.map(jnp.array, start)
    for batch in batches:
        whole, _ = step(whole, batch)
    part = jax.tree.map(jnp.array, start)
    for batch in batches[:3]:
        part, _ = step(part, batch)
    checkpoints = training.Checkpoints(tmp_path, {})
    checkpoints.save(part)
    part = checkpoints.restore(start)
    checkpoints.close()
    for batch in batches[3:]:
        part, _ = step(part, batch)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(part), jax.device_get(whole))


def test_what_is_not_there_cannot_be_frozen():
    optimizer = training.make_optimizer(frozen=("behaviour", "encoder"))
    with pytest.raises(ValueError, match="nothing to freeze by the name of encoder in behaviour, q"):
        training.init_state(to_network(with_behaviour("mse", linear_params(1))), optimizer)


def test_without_the_regulariser_it_is_distributional_q_learning():
    params, target_params, batch = (
        single(x) for x in (linear_params(0, "c51"), linear_params(1, "c51"), linear_batch())
    )
    graph, atoms = graph_of(params), jnp.array(ATOMS, jnp.float32)
    objective = methods.q_learning(alpha=0.0, atoms=atoms).objective(graph, NUM_GAME_ACTIONS)

    def plain(params):
        now = training.apply(graph, params, batch.observation, batch.game)
        later = training.apply(graph, target_params, batch.next_observation, batch.game)
        rest = (
            batch.action,
            batch.reward,
            batch.discount,
            later,
            losses.expected_q(later, atoms),
            GAME_MASKS[batch.game],
        )
        return jax.vmap(losses.c51_loss, (0,) * 7 + (None,))(now, *rest, atoms).mean()

    gradients, metrics = jax.jit(jax.grad(objective, has_aux=True))(params, target_params, batch, None)
    value, expected = jax.jit(jax.value_and_grad(plain))(params)
    np.testing.assert_allclose([metrics["loss"], metrics["td_loss"]], [value, value], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), gradients, expected)


def test_a_reward_scale_divides_the_rewards_and_nothing_else():
    params, batch = single(linear_params(0)), single(linear_batch())
    graph = graph_of(params)

    @jax.jit
    def loss(params, batch, scale):
        objective = methods.q_learning(head="mse").objective(graph, NUM_GAME_ACTIONS, scale)
        return objective(params, params, batch, None)

    scale = np.float32([4.0, 0.5])
    scaled = loss(params, batch, scale)
    divided = loss(params, batch._replace(reward=batch.reward / scale[batch.game]), scale**0)
    jax.tree.map(np.testing.assert_array_equal, scaled, divided)
    assert scaled[0] != loss(params, batch, scale**0)[0]


def test_weights_of_zero_leave_the_program_as_it_is():
    params, batch = single(linear_params(0)), single(linear_batch())
    graph = graph_of(params)

    def program(**settings):
        objective = methods.q_learning(head="mse", **settings).objective(graph, NUM_GAME_ACTIONS)
        return str(jax.make_jaxpr(objective)(params, params, batch, jax.random.key(0)))

    assert program() == program(dr3=0.0) == program(random_shift=0) == program(likely=None)
    assert program() != program(dr3=0.1)


# Random shifts in training.


class Middle(nnx.Module):
    """A network that sees a 9 x 9 image's middle pixel."""

    def __init__(self):
        self.weight = nnx.Param(jnp.linspace(0.5, 1, NUM_ACTIONS))

    def features(self, observation, game, augment=None):
        x = observation.astype(jnp.float32)
        return (augment(x) if augment else x)[:, 4, 4, :1]

    def heads(self, features, game):
        return features * self.weight[...]


def test_random_shifts_are_a_function_of_the_step_and_change_with_it():
    rng, optimizer = np.random.default_rng(0), optax.sgd(0.0)
    graph, state = training.init_state(Middle(), optimizer)
    state = jax.device_get(state)
    images = rng.uniform(size=(2, ROWS, 9, 9, 1)).astype(np.float32)
    batch = show(single(linear_batch()), *images)
    objective = methods.q_learning(head="mse", random_shift=2).objective(graph, NUM_GAME_ACTIONS)
    train_step = training.make_train_step(objective, optimizer, seed=3)

    def metrics(first, last):
        after, rows = jax.tree.map(jnp.array, state._replace(step=np.int32(first))), []
        for _ in range(first, last):
            after, row = train_step(after, batch)
            rows.append(jax.device_get(row))
        return rows

    whole = metrics(0, 6)
    jax.tree.map(np.testing.assert_array_equal, whole, metrics(0, 6))
    jax.tree.map(np.testing.assert_array_equal, whole[2:], metrics(2, 6))  # as after a checkpoint
    for name in ("q_data", "td_loss"):
        assert len({float(row[name]) for row in whole}) == 6


def test_an_objectives_key_is_of_seed_and_step():
    def reveal(params, target_params, batch, key):
        loss, ones = 0 * params.sum(), jnp.ones(1)
        halves = {f"key_{name}": half for name, half in zip("ab", jax.random.key_data(key))}
        return loss, {"loss": loss, "of_sum": ones, "of_count": ones} | halves

    optimizer, keys = optax.sgd(0.0), []
    for seed in (0, 1, 0):
        train_step = training.make_train_step(reveal, optimizer, seed=seed)
        state = training.TrainState(jnp.int32(0), jnp.zeros(1), jnp.zeros(1), optimizer.init(jnp.zeros(1)))
        for _ in range(3):
            state, metrics = train_step(state, None)
            keys.append((int(metrics["key_a"]), int(metrics["key_b"])))
    assert keys[:3] == keys[6:] and len(set(keys)) == 6


def test_cloning_shifts_its_images():
    graph, state = training.init_state(Middle(), optax.sgd(0.0))
    images = np.random.default_rng(0).uniform(size=(ROWS, 9, 9, 1)).astype(np.float32)
    batch = show(single(linear_batch()), images, images)
    objective = methods.bc(random_shift=2).objective(graph, NUM_GAME_ACTIONS)

    @jax.jit
    def loss_and_middles(key):
        return objective(state.params, {}, batch, key)[0], common.shifts(key, ROWS, 2)[0](images)[:, 4, 4]

    loss, middle = jax.device_get(loss_and_middles(jax.random.key(5)))
    assert (middle != images[:, 4, 4]).any()
    logits = middle * np.linspace(0.5, 1, NUM_ACTIONS)
    expected = [reference_bc(*row) for row in zip(logits, batch.action, GAME_MASKS[batch.game])]
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)


class Sparse(nnx.Module):
    """In place of an encoder: some of the pixels."""

    def __call__(self, x):
        return x[:, 2::21, 2::21]


def test_the_q_network_shifts_both_observations_after_the_mean_was_taken_off(monkeypatch):
    monkeypatch.setattr(q_network, "make_encoder", lambda *args, **kwargs: Sparse())
    rng, size, pixels, key = np.random.default_rng(0), 3, 4, jax.random.key(11)
    mean_frames = rng.uniform(0, 255, (2, 84, 84)).astype(np.float32)
    images = rng.integers(0, 256, (2, size, 84, 84, 4), np.uint8)
    batch = jax.tree.map(lambda x: x[:size], single(linear_batch()))
    build = functools.partial(make_q_network, "nature", 2, "mse", hidden_sizes=(16,))
    graph, state = training.init_state(build(mean_frames=mean_frames), optax.sgd(0.0))
    plain_graph = nnx.split(nnx.eval_shape(build), nnx.Param)[0]
    plain = {name: value for name, value in state.params.items() if name != "mean_frames"}

    settings = {"head": "mse", "alpha": 0.1}
    objective = methods.q_learning(random_shift=pixels, **settings).objective(graph, NUM_GAME_ACTIONS)
    batch = show(batch, *images)
    where = np.broadcast_to(np.indices((84, 84)).transpose(1, 2, 0).astype(np.float32), (size, 84, 84, 2))

    @jax.jit
    def metrics_and_offsets(params, batch):
        offsets = [40 - shift(where)[:, 40, 40].astype(int) for shift in common.shifts(key, size, pixels)]
        return objective(params, params, batch, key)[1], offsets

    shifted, offsets = jax.device_get(metrics_and_offsets(state.params, batch))
    assert len({tuple(offset) for both in offsets for offset in both}) > 1
    mean = mean_frames[batch.game][..., None]
    plain_loss = jax.jit(methods.q_learning(**settings).objective(plain_graph, NUM_GAME_ACTIONS))

    def loss(change):
        pair = [np.stack(list(map(change, image, mean, offset))) for image, offset in zip(images, offsets)]
        return plain_loss(plain, plain, show(batch, *pair), key)[1]

    right = loss(lambda image, mean, offset: reference_shift(image.astype(np.float32) - mean, offset))
    wrong = loss(lambda image, mean, offset: reference_shift(image.astype(np.float32), offset) - mean)
    for name, value in right.items():
        np.testing.assert_allclose(shifted[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    for name in ("q_data", "td_loss"):
        assert abs(wrong[name] - right[name]) > 1e-3 * abs(right[name])


# Preferences.


@pytest.mark.parametrize(
    "method, head", [("cql", "c51"), ("cql", "mse"), ("bcq", "c51"), ("bc", "mse"), ("return_bc", "c51")]
)
def test_preferences_are_the_methods_numbers_within_the_allowed_actions(method, head):
    tau, kappa = 0.5, 0.7
    params = linear_params(0, head)
    params = {"q": params, "behaviour": linear_params(10)} if method == "bcq" else params
    batch = linear_batch()
    with jax.enable_x64(True):
        atoms = {"atoms": jnp.array(ATOMS)}
        own = {"cql": {"head": head} | atoms, "bcq": {"head": head, "tau": tau} | atoms, "bc": {}}
        made = methods.METHODS[method](**own.get(method, {"kappa": kappa} | atoms))
        prefer = made.preferences(graph_of(params), NUM_GAME_ACTIONS)
        preferred = np.asarray(prefer(params, batch.observation, batch.game))
    assert preferred.shape == (ROWS, NUM_ACTIONS)
    _, outputs = reference_outputs(params["q"] if method == "bcq" else params, batch.observation, batch.game)
    forbidden = 0
    for row, (values, game) in enumerate(zip(outputs, batch.game)):
        allowed = GAME_MASKS[game]
        if method == "bcq":
            logits = reference_outputs(params["behaviour"], batch.observation, batch.game)[1][row]
            allowed = np.array(reference_likely(logits, allowed, tau))
            forbidden += sum(GAME_MASKS[game]) - sum(allowed)
        np.testing.assert_array_equal(np.isneginf(preferred[row]), ~allowed)
        if method == "return_bc":
            policy = reference_expert(values, allowed, ATOMS, kappa)
            np.testing.assert_allclose(reference_softmax(preferred[row]), policy, atol=1e-12)
            continue
        expected = values if head == "mse" else np.array([reference_expected_q(x, ATOMS) for x in values])
        np.testing.assert_allclose(preferred[row][allowed], expected[allowed], atol=1e-12)
    assert forbidden or method != "bcq"


# The record.


def weight(method):
    """The weight of CQL in what a method's objective minimises."""
    params, batch = single(linear_params(0, "mse")), single(linear_batch())
    loss, metrics = method.objective(graph_of(params), NUM_GAME_ACTIONS)(params, params, batch, None)
    return float((loss - metrics["td_loss"]) / metrics["cql_loss"])


def test_the_papers_alpha_is_table_b1s_and_none_with_bcq():
    assert weight(methods.q_learning(head="mse")) == pytest.approx(0.1, abs=1e-6)
    assert weight(methods.q_learning(head="mse", alpha=0.3)) == pytest.approx(0.3, abs=1e-6)
    assert r"0.05 \left(" in methods.q_learning().minimises and r"\left(" not in methods.q_learning(alpha=0).minimises
    assert r"\left(" not in methods.bcq().minimises, "BCQ replaces CQL"
    assert r"0.05 \left(" in methods.bcq(alpha=0.05).minimises, "unless both are asked for"


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_gives_the_metrics_that_it_names_and_builds_its_network_from_parameters(name):
    values = {
        "encoder": "vit_narrow" if name == "mae" else "nature_narrow",
        "v_min": -2.0,
        "v_max": 2.0,
        "num_atoms": 5,
    }
    p = parameters.check("04_scaled_training", values | {"method": name})
    method = methods.make(p)
    network = nnx.eval_shape(lambda: method.build(p.encoder, 2, 3, num_atoms=5, hidden_sizes=(4,)))
    graph, variables = nnx.split(network, nnx.Param)
    params = nnx.to_pure_dict(variables)
    images = np.zeros((ROWS, 84, 84, 4), np.uint8)
    batch = show(single(linear_batch()), images, images)
    batch = windows(ROWS, 4, games=len(NUM_GAME_ACTIONS)) if "sequences" in method.batches else batch
    objective = common.checked_objective(method.objective(graph, NUM_GAME_ACTIONS))
    _, metrics = jax.eval_shape(objective, params, params, batch, jax.random.key(0))
    summed = {name for name, value in metrics.items() if value.shape}
    assert summed == {f"{next(iter(method.metrics))}{suffix}" for suffix in ("_sum", "_count")}
    assert metrics.keys() & method.metrics.keys() >= method.metrics.keys() - {"dr3_penalty", "attention_entropy"}
    assert bool(method.preferences) == (name not in ("mae", "cpc")), "what makes no player"
    if method.preferences:
        seen = (batch, np.zeros((ROWS, 3), np.int32)) if method.memory else (images, batch.game)
        preferred = jax.eval_shape(method.preferences(graph, NUM_GAME_ACTIONS), params, *seen)
        assert preferred.shape == (ROWS, NUM_ACTIONS)
    assert [folder for folder, *_ in method.stages(network)] == (["behaviour", ""] if name == "bcq" else [""])
    assert method.scales_rewards == (name in ("cql", "bcq") and p.head == "mse")


def huber(outputs_t, action_t, reward, discount, target_outputs_tn, selector_q_tn, allowed):
    best = losses.greedy_action(selector_q_tn, allowed)
    target = jax.lax.stop_gradient(reward + discount * target_outputs_tn[best])
    return optax.losses.huber_loss(outputs_t[action_t], target)


def test_a_td_loss_of_ones_own_is_minimised():
    params, batch = single(linear_params(0)), single(linear_batch())
    method = methods.q_learning(head="mse", td_loss=huber, alpha=0.0)
    assert "huber" in method.minimises
    loss, metrics = method.objective(graph_of(params), NUM_GAME_ACTIONS)(params, params, batch, None)
    q, then = (reference_outputs(params, x, batch.game)[1] for x in (batch.observation, batch.next_observation))
    best = [then[row][: NUM_GAME_ACTIONS[game]].max() for row, game in enumerate(batch.game)]
    errors = np.abs(np.array(q)[range(ROWS), batch.action] - batch.reward - batch.discount * best)
    np.testing.assert_allclose(loss, np.mean([min(e, 1) * (e - min(e, 1) / 2) for e in errors]), rtol=1e-5)
    assert loss == metrics["td_loss"]


@pytest.mark.parametrize(
    "td_loss, words",
    [
        (lambda q, action: q[action], r"td_loss must take \(outputs_t, .*this one takes \(q, action\): too many"),
        (lambda q, *rest: q, r"td_loss must return a float scalar for one transition, got float32\[18\]\."),
        (lambda q, action, *rest: action, r"one transition, got int32\[\]\."),
        (lambda q, action, *rest: (q[action], 0.0), r"one transition, got tuple\."),
    ],
)
def test_a_wrong_td_loss_is_refused_in_one_sentence(td_loss, words):
    params, batch = single(linear_params(0)), single(linear_batch())
    with pytest.raises(methods.MethodError, match=words) as raised:
        method = methods.q_learning(head="mse", td_loss=td_loss)
        method.objective(graph_of(params), NUM_GAME_ACTIONS)(params, params, batch, None)
    assert "\n" not in str(raised.value)


ONES, ZERO = jnp.ones(2), jnp.float32(0)


@pytest.mark.parametrize(
    "returned, words",
    [
        (ZERO, r"must return \(loss, metrics\)"),
        ((ONES, {}), r"loss must be a float scalar, got float32\[2\]"),
        ((ZERO, {"nll": ZERO}), r"have a scalar loss, got only nll"),
        ((ZERO, {"loss": ZERO}), r"one pair of sums per game, .* got the arrays none"),
        ((ZERO, {"loss": ZERO, "td_sum": ONES}), r"got the arrays td_sum"),
        ((ZERO, {"loss": ZERO, "a": ONES, "td_sum": ONES, "td_count": ONES}), r"got the arrays a, td_count, td_sum"),
    ],
)
def test_a_wrong_objective_is_refused_in_one_sentence_before_anything_is_compiled(returned, words):
    optimizer = optax.sgd(0.0)
    train_step = training.make_train_step(lambda *_: returned, optimizer)
    state = training.TrainState(jnp.int32(0), ONES, ONES, optimizer.init(ONES))
    with pytest.raises(methods.MethodError, match=words) as raised:
        train_step(state, None)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("head", ["c51", "two_hot", "hl_gauss"])
def test_predicted_and_target_distributions_are_those_of_the_loss(head):
    """Their cross-entropy is the loss, and the target has no part in the prediction."""
    params, target_params, batch = (single(x) for x in (linear_params(0, head), linear_params(1, head), linear_batch()))
    method = methods.q_learning(head=head, alpha=0.0, atoms=jnp.array(ATOMS, jnp.float32))
    _, metrics = method.objective(graph_of(params), NUM_GAME_ACTIONS)(params, target_params, batch, None)
    predicted, target = method.distributions(graph_of(params), NUM_GAME_ACTIONS)(params, target_params, batch)
    np.testing.assert_allclose(np.stack([predicted, target]).sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(-(target * np.log(predicted)).sum(-1).mean(), metrics["td_loss"], rtol=1e-4)
    assert (np.asarray(target) > -1e-6).all() and np.abs(target - predicted).max() > 0.01


def test_what_a_loss_of_ones_own_aims_at_is_not_shown():
    """Of a loss that is no cross-entropy, prediction less gradient sums to 1 like a distribution, and is none."""
    assert methods.q_learning(head="c51", td_loss=losses.c51_loss).distributions is None
    assert methods.q_learning(head="c51").distributions is not None


MADE_UP = """
from scaled_ql.methods import cloning


def parrot(*, random_shift=0):
    return cloning.bc(random_shift=random_shift)._replace(minimises="what a parrot minds")
"""


def test_adding_a_method_is_one_file_and_a_name_in_a_table(tmp_path, workspace):
    package = tmp_path / "scaled_ql"
    shutil.copytree(workspace / "lib" / "scaled_ql", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "methods" / "parrot.py").write_text(MADE_UP)
    table = package / "defaults.py"
    line = '    "parrot": ("parrot", ("random_shift",)),\n'
    table.write_text(table.read_text().replace("METHODS = {\n", "METHODS = {\n" + line))
    code = (
        "from scaled_ql import methods, parameters\n"
        "p = parameters.check('04_scaled_training', {'method': 'parrot'})\n"
        "print(methods.make(p).minimises)\n"
        "try: parameters.check('04_scaled_training', {'method': 'parrot', 'head': 'mse'})\n"
        "except parameters.ParameterError as error: print(error)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[0] == "what a parrot minds", done.stderr
    assert "head: without effect in method 'parrot'" in done.stdout
