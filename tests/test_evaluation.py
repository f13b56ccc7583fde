"""Evaluation: whole episodes by the paper's protocol, none favoured; videos that play."""

from pathlib import Path

import av
import jax.numpy as jnp
import numpy as np
import pytest

from scaled_ql import evaluation, losses, networks, objectives, training
from scaled_ql.environments import make_environment
from scaled_ql.games import action_names


def always(action: int, num_actions: int = 4) -> evaluation.QFunction:
    return lambda stacks: np.tile(np.eye(num_actions, dtype=np.float32)[action], (len(stacks), 1))


def test_returns_and_lengths_equal_a_plain_loop_over_one_environment() -> None:
    """A deterministic player without stickiness: every episode is the same, and is ALE's."""
    environment = make_environment("Breakout", sticky_actions=0.0)
    serve = action_names("Breakout").index("FIRE")
    environment.reset(seed=0)
    total, length, ended = 0.0, 0, False
    while not ended:
        _, reward, terminated, truncated, _ = environment.step(serve)
        total, length, ended = total + reward, length + 1, terminated or truncated
    played = evaluation.evaluate(always(serve), "Breakout", episodes=5, seed=0, epsilon=0.0, num_environments=2)
    assert len(played) == 5
    assert (played["episode_return"] == total).all()
    assert (played["length"] == length).all()
    assert not played["truncated"].any()


def test_every_environment_plays_its_fixed_share() -> None:
    played = evaluation.evaluate(
        evaluation.play_randomly, "Breakout", episodes=7, seed=1, epsilon=1.0, num_environments=3
    )
    assert played["environment"].value_counts().to_dict() == {0: 3, 1: 2, 2: 2}
    assert played["length"].nunique() > 1


def test_the_cap_truncates_an_idle_player() -> None:
    played = evaluation.evaluate(always(0), "Breakout", episodes=2, seed=0, epsilon=0.0, max_steps=60)
    assert played["truncated"].all()
    assert (played["length"] == 60).all()


def test_evaluation_is_a_function_of_its_seed() -> None:
    def play(seed: int) -> list[float]:
        played = evaluation.evaluate(evaluation.play_randomly, "Pong", episodes=2, seed=seed, epsilon=1.0)
        return [*played["episode_return"], *played["length"]]

    assert play(0) == play(0)
    assert play(0) != play(1)


@pytest.mark.parametrize("head", ["c51", "mse"])
def test_the_q_function_is_the_networks_expected_value_of_the_games_own_actions(head: str) -> None:
    network = networks.make_q_network("nature", 2, head, hidden_sizes=(16, 16))
    graph, state = training.init_state(network, training.make_optimizer())
    stacks = np.random.default_rng(0).integers(256, size=(3, 4, 84, 84), dtype=np.uint8)
    prefer = objectives.preferences(graph, [3, 4], head=head)
    q = evaluation.make_q_function(prefer, state.params, 1, 4)(stacks)
    outputs = network(jnp.asarray(stacks.transpose(0, 2, 3, 1)), jnp.ones(3, int))
    expected = losses.expected_q(outputs, losses.support()) if head == "c51" else outputs
    np.testing.assert_allclose(q, expected[:, :4], rtol=1e-5, atol=1e-5)


def test_the_interval_covers_the_mean_and_shrinks_with_the_data() -> None:
    returns = np.random.default_rng(0).normal(5, 2, 400)
    low, high = evaluation.mean_interval(returns)
    assert low < returns.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * returns.std() / 20, rel=0.1)


def test_a_video_plays_and_has_the_frames_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "play.mp4"
    score = evaluation.record_video(always(1), "Breakout", file, seed=0, num_steps=25)
    assert score >= 0
    with av.open(str(file)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].codec_context.name == "h264"
    assert len(frames) == 25
    assert frames[0].shape == (420, 640, 3)
    assert frames[0][:, :320].std() > 5, "the game's screen is not empty"
