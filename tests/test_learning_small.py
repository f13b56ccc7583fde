"""What C51 needs at small scale: an Adam epsilon below its gradients, and a start narrower than its support."""

import functools
import math

import catch
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stacks import batch_of_stacks

from scaled_ql import losses, methods, training
from scaled_ql.games import NUM_ACTIONS
from scaled_ql.networks.q_network import normalize_features

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
    return batch_of_stacks(
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
    objective, batch = methods.q_learning(atoms=ATOMS).objective(graph, [2]), jax.device_put(corridor())

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


@pytest.mark.usefixtures("optimized")
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


# Catch, offline: an agent that has only seen random moves, whose mean return is -3.5, catches five of five balls.
# Support and weight of CQL are the paper's, the discount is the quickstart's.

BALLS, SEEN, CATCH_STEPS, BATCH = 5, 6_000, 6_000, 32


class CatchNetwork(CorridorNetwork):
    """The same last layers above a dense layer that sees the grid."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.hidden = nnx.Linear(catch.ROWS * catch.COLUMNS, 64, rngs=rngs)

    def features(self, observation, game, augment=None):
        return normalize_features(nnx.relu(self.hidden(observation.reshape(len(observation), -1) / 255)))


def grid(frame):
    """uint8 [84, 84] -> [7, 7, 1], a value per square."""
    return frame[:: catch.PIXELS, :: catch.PIXELS, None]


@functools.cache
def random_play():
    """Transitions of random moves, one step each."""
    env, rng, rows = catch.Catch(BALLS), np.random.default_rng(0), []
    frame, _ = env.reset(seed=0)
    for action in rng.integers(3, size=SEEN):
        before = grid(frame)
        frame, reward, ended, _, _ = env.step(action)
        rows.append((before, action, reward, 0.0 if ended else 0.97, grid(frame)))
        if ended:
            frame, _ = env.reset()
    observation, action, reward, discount, then = map(np.array, zip(*rows))
    return batch_of_stacks(
        observation=observation,
        action=action.astype(np.int32),
        reward=reward.astype(np.float32),
        discount=discount.astype(np.float32),
        next_observation=then,
        game=np.zeros(SEEN, np.int32),
    )


@functools.cache
def catch_training():
    """(parameters, Adam's epsilon) -> (trained parameters, metrics [steps]); one program for all."""
    graph, _ = nnx.split(CatchNetwork(nnx.Rngs(0)), nnx.Param)
    objective, data = methods.q_learning(atoms=ATOMS).objective(graph, [3]), jax.device_put(random_play())

    @jax.jit
    def run(params, epsilon):
        optimizer = training.make_optimizer(1e-3, epsilon)
        update = training.make_update(objective, optimizer, target_update_period=50)
        state = training.TrainState(jnp.int32(0), params, params, optimizer.init(params))

        def step(state, key):
            rows = jax.random.randint(key, (BATCH,), 0, SEEN)
            return update(state, jax.tree.map(lambda x: x[rows], data), key)

        state, metrics = jax.lax.scan(step, state, jax.random.split(jax.random.key(0), CATCH_STEPS))
        return state.params, metrics

    return run


def caught(params, episodes=20):
    """Mean return of the greedy player; the best is 5."""
    graph, _ = nnx.split(CatchNetwork(nnx.Rngs(0)), nnx.Param)
    prefer = methods.q_learning(atoms=ATOMS).preferences(graph, [3])
    playing, total, over = [catch.Catch(BALLS) for _ in range(episodes)], 0.0, False
    frames = [env.reset(seed=seed)[0] for seed, env in enumerate(playing)]
    while not over:  # all episodes are equally long
        values = prefer(params, np.stack(list(map(grid, frames))), jnp.zeros(episodes, jnp.int32))
        steps = [env.step(action) for env, action in zip(playing, np.asarray(values).argmax(1))]
        frames, rewards, ended, *_ = zip(*steps)
        assert all(ended) == any(ended)
        total, over = total + sum(rewards), all(ended)
    return total / episodes


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("seed", range(2))
def test_an_epsilon_below_the_gradients_learns_catch_from_random_play_and_one_above_them_does_not(seed):
    params = nnx.to_pure_dict(nnx.split(CatchNetwork(nnx.Rngs(seed)), nnx.Param)[1])
    params["head_bias"] = jnp.tile(losses.unit_normal_logits(ATOMS), NUM_ACTIONS)
    trained, metrics = catch_training()(params, 1e-8)
    assert caught(trained) > 4.5
    early = float(metrics["head_grad_rms"][:EARLY].mean())
    assert not training.epsilon_warning(early, 1e-8)

    trained, metrics = catch_training()(params, 3.125e-4)
    assert caught(trained) < 1
    early = float(metrics["head_grad_rms"][:EARLY].mean())
    assert "learns hardly anything" in training.epsilon_warning(early, 3.125e-4)
