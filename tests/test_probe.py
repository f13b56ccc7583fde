"""What an encoder knows: the read-out against an independent one, its controls, and what is observed in real ALE."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scaled_ql import networks, probe
from scaled_ql.environments import make_environment


@pytest.fixture(scope="module")
def observed():
    return probe.observe("Pong", 160, seed=3, every=4)


def test_moments_are_whole_stacks_with_the_memory_of_their_last_frame(observed):
    again = probe.observe("Pong", 40, seed=3, every=4)
    first = observed.episode == 0
    assert first.sum() == 20 and len(np.unique(observed.episode)) == 8
    np.testing.assert_array_equal(again.stacks[:5], observed.stacks[:5])  # an eighth of 40
    environment, rng, t = make_environment("Pong", sticky_actions=0.0), np.random.default_rng(3), 0
    frames = [environment.reset(seed=int(rng.integers(2**31)))[0]]
    for number in range(20):
        while t < 4 * (number + 1):
            frames.append(environment.step(int(rng.integers(environment.action_space.n)))[0])
            t += 1
        np.testing.assert_array_equal(observed.stacks[number], np.stack(frames[t - 3 : t + 1], axis=-1))
        np.testing.assert_array_equal(observed.ram[number], environment.unwrapped.ale.getRAM())


def test_another_variant_is_another_game():
    default, variant = (probe.observe("Freeway", 8, seed=0, mode=mode) for mode in (0, 1))
    assert (default.stacks != variant.stacks).any()


def test_the_read_out_is_ridge_regression():
    rng = np.random.default_rng(0)
    episode = np.repeat(np.arange(8), 30)
    features = rng.normal(size=(240, 12)) + 3
    values = np.stack([features @ rng.normal(size=12) + rng.normal(size=240), np.full(240, 7.0)], axis=1)
    fit, test, penalty = episode < 6, episode >= 6, 0.3
    x, y = features[fit] - features[fit].mean(0), values[fit] - values[fit].mean(0)
    strength = penalty * np.square(x).sum() / len(x)  # in units of the features' variance
    rows, right = np.vstack([x, np.sqrt(strength) * np.eye(12)]), np.vstack([y, np.zeros((12, 2))])
    weights = np.linalg.lstsq(rows, right, rcond=None)[0]
    predicted = (features[test] - features[fit].mean(0)) @ weights + values[fit].mean(0)
    expected = 1 - np.square(values[test] - predicted)[:, 0].sum() / (values[test, 0].var() * test.sum())
    r2 = probe._ridge(features, values, fit, test, penalty)
    assert r2[0] == pytest.approx(expected, rel=1e-9)
    assert np.isnan(r2[1]), "what does not vary is not explained"


def test_what_is_linear_is_read_and_what_is_not_there_is_not():
    rng = np.random.default_rng(1)
    episode, features = np.repeat(np.arange(8), 25), rng.normal(size=(200, 300))
    signal, noise = features[:, :3].sum(1) + 5, rng.normal(size=200)
    easy = np.concatenate([features[:, :3], 0.01 * features[:, 3:]], axis=1)
    r2 = probe.read_out(easy, np.stack([signal, noise], axis=1), episode)
    assert r2[0] > 0.9 and r2[1] < 0.2
    shuffled = rng.permutation(signal)[:, None]
    assert probe.read_out(easy, shuffled, episode)[0] < 0.2
    with pytest.raises(ValueError, match="3 episodes; a read-out needs four"):
        probe.read_out(features, signal[:, None], np.repeat([0, 1, 2, 2], 50))


def test_a_network_that_sees_knows_more_than_one_that_does_not(observed):
    network = networks.make_q_network("nature_narrow", 1, hidden_sizes=(8,))
    graph, variables = nnx.split(network, nnx.Param)
    params, features = nnx.to_pure_dict(variables), probe.make_features(graph)
    seen = features(params, observed.stacks)
    np.testing.assert_allclose(  # blocks of 64, the last one padded
        seen, np.asarray(network.embedded(jnp.asarray(observed.stacks), jnp.zeros(160, jnp.int32))), atol=1e-4
    )
    blind = features(params, np.random.default_rng(0).permutation(observed.stacks))
    table = probe.compare(observed, {"seen": seen, "blind": blind}, "Pong")
    assert list(table.index[:4]) == ["ball x", "enemy y", "player y", "ball y"]
    assert table.loc["player y", "seen"] > 0.5 > table.loc["player y", "blind"]
    assert table.index[-1].startswith("mean of ") and table["seen"].iloc[-1] > table["blind"].iloc[-1]


def test_time_alone_says_much_where_episodes_begin_alike(observed):
    time = probe.time_features(observed.step)
    assert observed.step[:3].tolist() == [4, 8, 12] and time.shape == (160, 64)
    table = probe.compare(observed, {"time": time}, "Pong")
    assert table.loc["enemy y", "time"] > 0.9 > 0.5 > table.loc["player y", "time"]
