"""What C51 needs at small scale: an Adam epsilon below its gradients, and a start narrower than its support."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scaled_ql import losses, objectives, training
from scaled_ql.games import NUM_ACTIONS
from scaled_ql.networks.q_network import normalize_features
from scaled_ql.replay.store import Batch

# A corridor: action 1 leads to the right, where a reward of 1 ends the episode; action 0 to the left.

LENGTH, GAMES, STEPS, EARLY = 10, 40, 2_000, 500
ATOMS = losses.support()


class CorridorNetwork(nnx.Module):
    """The paper's last layers: normalised features, one of 40 heads, which sees one batch's fortieth."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(LENGTH, 64, rngs=rngs)
        self.head_kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (64, NUM_ACTIONS * len(ATOMS))))
        self.head_bias = nnx.Param(jnp.zeros(NUM_ACTIONS * len(ATOMS)))

    def features(self, observation, game, augment=None):
        return normalize_features(nnx.relu(self.hidden(jax.nn.one_hot(observation[:, 0, 0, 0], LENGTH))))

    def heads(self, features, game):
        kernel, bias = (x / GAMES + jax.lax.stop_gradient(x - x / GAMES) for x in (self.head_kernel, self.head_bias))
        return (features @ kernel + bias).reshape(-1, NUM_ACTIONS, len(ATOMS))

    def __call__(self, observation, game):
        return self.heads(self.features(observation, game), game)


def corridor():
    """Every action once in every place."""
    place, action = np.divmod(np.arange(2 * LENGTH), 2)
    then = np.maximum(place + 2 * action - 1, 0)
    ends = then == LENGTH
    as_image = lambda x: np.minimum(x, LENGTH - 1).astype(np.uint8).reshape(-1, 1, 1, 1)  # noqa: E731
    return Batch.of_stacks(
        observation=as_image(place),
        action=action.astype(np.int32),
        reward=ends.astype(np.float32),
        discount=np.where(ends, 0, 0.99).astype(np.float32),
        next_observation=as_image(then),
        game=np.zeros(2 * LENGTH, np.int32),
    )


@functools.cache
def corridor_training():
    """(parameters, Adam's epsilon) -> (Q [places, 2], metrics [steps]); one program for all."""
    graph, _ = nnx.split(CorridorNetwork(nnx.Rngs(0)), nnx.Param)
    objective, batch = objectives.q_learning(graph, [2], atoms=ATOMS), jax.device_put(corridor())

    @jax.jit
    def run(params, epsilon):
        optimizer = training.make_optimizer(1e-3, epsilon)
        update = training.make_update(objective, optimizer, target_update_period=50)
        state = training.TrainState(jnp.int32(0), params, params, optimizer.init(params))
        step = lambda state, _: update(state, batch, jax.random.key(0))  # noqa: E731
        state, metrics = jax.lax.scan(step, state, length=STEPS)
        outputs = training.apply(graph, state.params, batch.observation[::2], batch.game[::2])
        return losses.expected_q(outputs, ATOMS)[:, :2], metrics

    return run


@pytest.mark.parametrize("seed", range(3))
def test_an_epsilon_below_the_gradients_solves_a_corridor_and_one_above_them_does_not(seed):
    params = nnx.to_pure_dict(nnx.split(CorridorNetwork(nnx.Rngs(seed)), nnx.Param)[1])
    q, metrics = corridor_training()(params, 1e-8)
    assert (q[:, 1] > q[:, 0]).all(), "to the right everywhere"
    np.testing.assert_allclose(q[-1, 1], 1, atol=0.05)
    assert metrics["entropy"][0] == pytest.approx(math.log(51), abs=0.05), "C51 begins nearly uniform"
    assert metrics["entropy"][-1] < 1.5
    early = float(metrics["head_grad_rms"][:EARLY].mean())
    assert not training.epsilon_warning(early, 1e-8)

    q, metrics = corridor_training()(params, 3.125e-4)
    assert not (q[:, 1] > q[:, 0]).all()
    assert metrics["entropy"][-1] > 3
    early = float(metrics["head_grad_rms"][:EARLY].mean())
    assert "learns hardly anything" in training.epsilon_warning(early, 3.125e-4)
