"""Learning from data without one good trajectory: Q-learning joins the good halves of two, cloning cannot."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stacks import batch_of_stacks

from scaled_ql import methods, training
from scaled_ql.games import NUM_ACTIONS
from scaled_ql.networks import BCQNetwork

# Two halves. At the start (state 0) and in the middle (state 3) action 1 costs 1/4 and leads to 1, by states 1 and 4;
# action 0 leads to 1/4, by states 2 and 5. Between these, action 0 goes on. All other actions end the episode.
END, START, MIDDLE = 6, 0, 3
NEXT = np.full((END, 3), END)
REWARD = np.zeros((END, 3))
NEXT[START, :2], NEXT[MIDDLE, :2], NEXT[[1, 2], 0] = [2, 1], [5, 4], MIDDLE
REWARD[[START, MIDDLE], 1], REWARD[[1, 4], 0], REWARD[[2, 5], 0] = -0.25, 1, 0.25
DATA = [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]  # well in the first half, in the second, in neither
TAU = 0.3  # the good actions' likelihood is 1/2 of the bad ones'
ATOMS = np.linspace(-1, 2, 13)  # all returns lie on them
SEEDS = pytest.mark.parametrize("seed", range(3))


class Steps(NamedTuple):
    state: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    following: np.ndarray
    return_to_go: np.ndarray


def follow(actions):
    """The chain's states and rewards under a list of actions."""
    states, rewards = [START], []
    for action in actions:
        rewards.append(REWARD[states[-1], action])
        states.append(NEXT[states[-1], action])
    assert states[-1] == END and END not in states[:-1]
    return states, rewards


def recorded():
    rows = []
    for actions in DATA:
        states, rewards = follow(actions)
        to_go = np.cumsum(rewards[::-1])[::-1]
        rows += zip(states[:-1], actions, rewards, states[1:], to_go)
    return Steps(*map(np.array, zip(*rows)))


def roll(policy):
    """The return of a deterministic policy [states], and its actions."""
    state, actions = START, []
    while state != END:
        actions.append(int(policy[state]))
        state = NEXT[state, policy[state]]
    return sum(follow(actions)[1]), actions


def optimal_q():
    """Value iteration; there is no discount."""
    q = np.zeros((END, 3))
    for _ in range(END):
        q = REWARD + np.append(q.max(1), 0)[NEXT]
    return q


def empirical_policy(kappa=0.0):
    """p(a|s) in the data, [states, 3], where a step counts exp(kappa * return to go)."""
    steps, policy = recorded(), np.zeros((END, 3))
    np.add.at(policy, (steps.state, steps.action), np.exp(kappa * steps.return_to_go))
    return policy / policy.sum(1, keepdims=True)


def conditional_entropy(returns=False):
    """The data's mean -log p(a|s), or -log p(a, return|s), in nats: the least negative log-likelihood there is."""
    steps = recorded()
    outcomes = list(zip(steps.action, steps.return_to_go if returns else steps.action))
    rows = list(zip(steps.state, outcomes))
    return -np.mean([np.log(rows.count(row) / list(steps.state).count(row[0])) for row in rows])


# Learning from images of the states.


def images():
    """One bright block a state; the end is dark."""
    frames = np.zeros((END + 1, 84, 84, 4), np.uint8)
    for state in range(END):
        frames[state, 14 * state : 14 * state + 14, 28:56] = 255
    return frames


def to_batch(steps, reward):
    return batch_of_stacks(
        observation=images()[steps.state],
        action=steps.action.astype(np.int32),
        reward=reward.astype(np.float32),
        discount=(steps.following != END).astype(np.float32),
        next_observation=images()[steps.following],
        game=np.zeros(len(steps.state), np.int32),
    )


class Pixels(nnx.Module):
    """A small network with the interface of `QNetwork`: every seventh pixel, one hidden layer."""

    def __init__(self, num_outputs, seed):
        rngs = nnx.Rngs(seed)
        self.num_outputs = num_outputs
        self.hidden = nnx.Linear(12 * 12 * 4, 64, rngs=rngs)
        self.head = nnx.Linear(64, NUM_ACTIONS * num_outputs, rngs=rngs)

    def features(self, observation, game, augment=None):
        pixels = observation[:, ::7, ::7].astype(jnp.float32) / 255
        return nnx.relu(self.hidden(pixels.reshape(len(pixels), -1)))

    def heads(self, features, game):
        shape = (NUM_ACTIONS,) if self.num_outputs == 1 else (NUM_ACTIONS, self.num_outputs)
        return self.head(features).reshape(-1, *shape)

    def __call__(self, observation, game):
        return self.heads(self.features(observation, game), game)


def make_network(method, head, seed):
    network = Pixels(1 if head == "mse" else len(ATOMS), seed)
    if method != "bcq":
        return network
    behaviour = Pixels(1, seed + 100)
    params, metrics = train("bc", "mse", behaviour)
    assert metrics["nll"] == pytest.approx(conditional_entropy(), abs=0.01)
    nnx.update(behaviour, params)
    return BCQNetwork(network, behaviour)


def make_optimizer(method):
    return training.make_optimizer(0.01, frozen=("behaviour",) if method == "bcq" else ())


@functools.cache
def compiled(method, head, settings, acting):
    """The training step and the preferences; networks of all seeds share them."""
    optimizer = make_optimizer(method)
    graph, _ = training.init_state(make_network(method, head, 0), optimizer)
    atoms = jnp.array(ATOMS, jnp.float32)
    own = {"bc": {}, "return_bc": {"atoms": atoms}}.get(method, {"head": head, "atoms": atoms})
    trained = methods.METHODS[method](**own, **dict(settings))
    train_step = training.make_train_step(trained.objective(graph, [3]), optimizer, target_update_period=20)
    return train_step, methods.METHODS[method](**own, **dict(acting)).preferences(graph, [3])


def train(method, head, network, settings=(), acting=()):
    """Train on all of the data at every step: the parameters and the last metrics."""
    train_step, _ = compiled(method, head, settings, acting)
    state, steps = training.init_state(network, make_optimizer(method))[1], recorded()
    batch = jax.device_put(to_batch(steps, steps.return_to_go if method == "return_bc" else steps.reward))
    for _ in range(300):
        state, metrics = train_step(state, batch)
    return state.params, jax.device_get(metrics)


def learn(method, head, seed, settings=(), acting=()):
    """What is preferred in each state after training, [states, 3], and the last metrics."""
    params, metrics = train(method, head, make_network(method, head, seed), settings, acting)
    _, prefer = compiled(method, head, settings, acting)
    preferred = np.asarray(prefer(params, images()[:END], np.zeros(END, np.int32)))
    assert (preferred[:, 3:] == -np.inf).all()
    return preferred[:, :3], metrics


# What the chain and the data are.


def test_no_recorded_trajectory_is_optimal_but_the_halves_of_two_are():
    q = optimal_q()
    assert q[START].max() == 1.5 and roll(q.argmax(1)) == (1.5, [1, 0, 1, 0])
    assert [sum(follow(actions)[1]) for actions in DATA] == [1.0, 1.0, 0.5]
    assert DATA[0][:2] + DATA[1][2:] == [1, 0, 1, 0]


def test_the_likeliest_action_is_the_wrong_one_and_the_right_one_is_likely_enough():
    q, policy = optimal_q(), empirical_policy()
    for state in (START, MIDDLE):
        best = q[state].argmax()
        assert policy[state].argmax() != best
        assert policy[state, best] / policy[state].max() == pytest.approx(0.5)
    assert roll(policy.argmax(1)) == (0.5, [0, 0, 0, 0])


# What the methods make of it.


@SEEDS
@pytest.mark.parametrize(
    "head, settings",
    [("c51", {"alpha": 0.05}), ("mse", {"alpha": 0.1}), ("hl_gauss", {"alpha": 0.05, "double_q": True})],
)
def test_cql_stitches_the_optimal_policy(head, settings, seed):
    preferred, _ = learn("cql", head, seed, tuple(settings.items()))
    assert roll(preferred.argmax(1)) == (1.5, [1, 0, 1, 0])
    taken = empirical_policy() > 0
    np.testing.assert_allclose(preferred[taken], optimal_q()[taken], atol=0.1)
    assert (np.where(taken, -np.inf, preferred).max(1) < preferred.max(1) - 0.25).all()


@SEEDS
@pytest.mark.parametrize("head", ["c51", "mse"])
def test_bcq_stitches_the_optimal_policy_without_cqls_help(head, seed):
    preferred, _ = learn("bcq", head, seed, (("tau", TAU),), (("tau", TAU),))
    assert roll(preferred.argmax(1)) == (1.5, [1, 0, 1, 0])
    taken = empirical_policy() > 0
    np.testing.assert_allclose(preferred[taken], optimal_q()[taken], atol=0.05)
    assert (preferred[~taken] == -np.inf).all()


@SEEDS
def test_bcq_whose_threshold_is_too_high_values_the_likeliest_actions_alone(seed):
    tau = 0.7  # the good actions have 1/2
    preferred, _ = learn("bcq", "mse", seed, (("tau", tau),), (("tau", tau),))
    assert roll(preferred.argmax(1)) == (0.5, [0, 0, 0, 0])
    np.testing.assert_allclose(preferred[:, 0], [0.5, 1.25, 0.5, 0.25, 1, 0.25], atol=0.05)
    assert (preferred[:, 1:] == -np.inf).all()


@SEEDS
def test_cloning_learns_the_datas_policy_and_so_takes_the_worse_actions(seed):
    preferred, metrics = learn("bc", "mse", seed)
    assert metrics["nll"] == pytest.approx(conditional_entropy(), abs=0.01)
    np.testing.assert_allclose(jax.nn.softmax(preferred), empirical_policy(), atol=0.03)
    assert roll(preferred.argmax(1)) == (0.5, [0, 0, 0, 0])


@SEEDS
def test_cloning_with_returns_gets_the_second_half_right_but_does_not_stitch(seed):
    """The return that followed the start's good action is no higher than one that followed its bad action.

    That one owes its return to its second half, which a clone cannot know: whatever kappa, it prefers the bad action.
    """
    kappa = 2.0
    for weight in (kappa, 5.0):
        expert = empirical_policy(weight)
        assert roll(expert.argmax(1)) == (1.0, [0, 0, 1, 0])
    preferred, metrics = learn("return_bc", "c51", seed, acting=(("kappa", kappa),))
    np.testing.assert_allclose(jax.nn.softmax(preferred), empirical_policy(kappa), atol=0.03)
    assert metrics["nll"] == pytest.approx(conditional_entropy(returns=True), abs=0.01)
    assert roll(preferred.argmax(1)) == (1.0, [0, 0, 1, 0])
