"""Evaluation: whole episodes by the paper's protocol, none favoured; videos that play."""

from pathlib import Path
from types import SimpleNamespace

import av
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaled_ql import collect, evaluation, losses, methods, networks, replay, training
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


class Scripted:
    """Environments whose k-th episode in slot i has lengths[i][k] steps, and as much reward; they reset as ALE's do."""

    def __init__(self, lengths: list[list[int]], num_actions: int = 4):
        self.lengths, self.single_action_space = lengths, SimpleNamespace(n=num_actions)
        self.episode, self.left = np.zeros(len(lengths), int), np.array([row[0] for row in lengths])
        self.resetting, self.sent, self.closed = np.zeros(len(lengths), bool), [], False

    def reset(self, seed: int) -> tuple[np.ndarray, dict]:
        return np.zeros((len(self.lengths), 4, 84, 84), np.uint8), {}

    def send(self, actions: np.ndarray) -> None:
        self.sent.append((actions.copy(), self.resetting.copy()))

    def recv(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        self.left -= ~self.resetting
        reward = np.where(self.resetting, 1e6, 1.0)  # that of a reset step counts nowhere
        ended = ~self.resetting & (self.left == 0)
        self.episode += ended
        for slot in np.flatnonzero(ended):
            self.left[slot] = self.lengths[slot][self.episode[slot] % len(self.lengths[slot])]
        self.resetting = ended
        return self.reset(0)[0], reward, ended, np.zeros_like(ended), {}

    def close(self) -> None:
        self.closed = True


def play_scripted(
    lengths: list[list[int]], q_function: evaluation.QFunction = evaluation.play_randomly, **protocol: object
) -> tuple[pd.DataFrame, Scripted]:
    environments = Scripted(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "make_vector_environment", lambda game, slots, **options: environments)
        protocol = {"seed": 0, "epsilon": 0.0, "num_environments": len(lengths)} | protocol
        played = evaluation.evaluate(q_function, "Breakout", **protocol)
    assert environments.closed
    return played, environments


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4),
    episodes=st.integers(0, 6),
    min_steps=st.integers(0, 60),
)
def test_every_slot_plays_the_shortest_run_of_episodes_that_covers_its_shares(
    lengths: list[list[int]], episodes: int, min_steps: int
) -> None:
    slots = min(len(lengths), max(episodes, min_steps))
    if not slots:
        return
    played, environments = play_scripted(lengths[:slots], episodes=episodes, min_steps=min_steps)
    expected, last = [], 0
    for slot in range(slots):
        quota = len(range(slot, episodes, slots))  # as cards are dealt
        share = len(range(slot, min_steps, slots))
        own: list[int] = []
        while len(own) < quota or sum(own) < share:
            own.append(lengths[slot][len(own) % len(lengths[slot])])
        expected.append(own)
        last = max(last, sum(own) + len(own) - 1)
    for slot, own in enumerate(expected):
        rows = played[played["environment"] == slot]
        assert rows["length"].tolist() == own
        assert rows["episode_return"].tolist() == own
    assert len(played) == sum(map(len, expected)) >= episodes
    assert played["length"].sum() >= min_steps
    assert len(environments.sent) == last, "nothing is played after the last episode that counts"


def test_neither_long_nor_short_episodes_are_favoured() -> None:
    """Lengths of 1 and 19, equally likely, return = length: sums over counts converge to 10, whatever the share."""
    rng = np.random.default_rng(0)
    total, count = 0, 0
    for _ in range(150):
        lengths = rng.choice([1, 19], (4, 60)).tolist()
        played, _ = play_scripted(lengths, episodes=0, min_steps=100)
        total, count = total + played["episode_return"].sum(), count + len(played)
    assert total / count == pytest.approx(10, abs=4 * 9 / np.sqrt(count))


def test_a_row_counts_the_players_own_choices() -> None:
    choices = iter(np.random.default_rng(0).integers(4, size=(1_000, 2)))

    def choose(stacks: np.ndarray) -> np.ndarray:
        return np.eye(4, dtype=np.float32)[next(choices)[: len(stacks)]]

    played, environments = play_scripted([[5, 3], [4]], choose, episodes=4)
    counts = played.filter(like="action_")
    assert list(counts) == [f"action_{name}" for name in action_names("Breakout")]
    assert counts.sum(axis=1).tolist() == played["length"].tolist()
    sent = [actions[slot] for actions, resetting in environments.sent for slot in (0, 1) if not resetting[slot]]
    assert counts.sum().tolist() == np.bincount(sent[: counts.to_numpy().sum()], minlength=4).tolist()
    first = [actions[0] for actions, _ in environments.sent[:5]]
    own = played[played["environment"] == 0].filter(like="action_").iloc[0]
    assert own.tolist() == np.bincount(first, minlength=4).tolist()


def test_random_actions_are_nobodys_choice() -> None:
    played, environments = play_scripted([[400], [400]], always(2), episodes=2, epsilon=0.5)
    sent = np.concatenate([actions for actions, _ in environments.sent])
    assert set(sent) == {0, 1, 2, 3}
    assert played["action_RIGHT"].sum() == pytest.approx(400, abs=60)
    assert played.filter(like="action_").drop(columns="action_RIGHT").to_numpy().sum() == 0
    played, _ = play_scripted([[50]], evaluation.play_randomly, episodes=1, epsilon=1.0)
    assert played.filter(like="action_").to_numpy().sum() == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_sampled_player_plays_its_softmax(temperature: float) -> None:
    values = np.float32([0.3, -np.inf, 1.2, -0.7])

    def preferences(stacks: np.ndarray) -> np.ndarray:
        return np.tile(values, (len(stacks), 1))

    played, _ = play_scripted([[2_000]] * 4, preferences, episodes=4, temperature=temperature)
    share = played.filter(like="action_").sum().to_numpy() / 8_000
    weights = [np.exp(float(value) / temperature) for value in values]
    np.testing.assert_allclose(share, weights / np.sum(weights), atol=4 * 0.5 / np.sqrt(8_000))
    assert share[1] == 0, "what is not allowed is never drawn"


def test_an_action_that_the_game_does_not_have_is_refused() -> None:
    for action in (4, 17):
        with pytest.raises(ValueError, match=rf"Breakout has 4 actions, 0 to 3; the player chose action {action}\."):
            evaluation.evaluate(evaluation.constant_action(action), "Breakout", episodes=2, seed=0)


def test_the_best_constant_action_is_the_largest_of_plain_loops() -> None:
    """Each action alone in one environment without sticky actions: the same returns."""
    table = evaluation.best_constant_action("Freeway", episodes=2, seed=0, epsilon=0.0, max_steps=120)
    expected = {}
    for number, name in enumerate(action_names("Freeway")):
        environment = make_environment("Freeway", sticky_actions=0.0, max_steps=120)
        environment.reset(seed=0)
        expected[name] = sum(float(environment.step(number)[1]) for _ in range(120))
    assert table.set_index("action")["episode_return"].to_dict() == expected
    assert table["action"].iloc[0] == "UP" and table["episode_return"].iloc[0] > 0
    assert (table["truncated"] == 1).all() and (table["steps"] == 240).all() and (table["episodes"] == 2).all()


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
    prefer = methods.q_learning(head=head).preferences(graph, [3, 4])
    q = evaluation.make_q_function(prefer, state.params, 1, 4)(stacks)
    outputs = network(jnp.asarray(stacks.transpose(0, 2, 3, 1)), jnp.ones(3, int))
    expected = losses.expected_q(outputs, losses.support()) if head == "c51" else outputs
    np.testing.assert_allclose(q, expected[:, :4], rtol=1e-5, atol=1e-5)


def test_the_interval_covers_the_mean_and_shrinks_with_the_data() -> None:
    returns = np.random.default_rng(0).normal(5, 2, 400)
    low, high = evaluation.mean_interval(returns)
    assert low < returns.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * returns.std() / 20, rel=0.1)


def test_copies_of_an_episode_are_counted() -> None:
    table = pd.DataFrame({"episode_return": [5.0] * 10, "length": [7] * 6 + [8, 9, 10, 11], "truncated": False})
    assert "Different episodes: Pong 5 of 10;" in evaluation.repeated({"Qbert": table[5:], "Pong": table})
    assert evaluation.repeated({"Pong": table.assign(truncated=True)}) == ""
    assert evaluation.repeated({"Pong": table[4:]}) == ""


def test_a_verdict_says_what_the_interval_lies_above_and_below() -> None:
    scores = {"agent": 5.0, "low": 4.0, "high": 6.0, "dataset": 3.9, "random": 6.1, "best constant action": 4.0}
    said = evaluation.verdict(pd.DataFrame({"Pong": scores, "Qbert": scores | {"dataset": np.nan}}).T)
    assert said.splitlines() == [
        "- **Pong: 5** (4 to 6), above dataset (3.9); below random (6.1); not told apart from best constant action (4)",
        "- **Qbert: 5** (4 to 6), below random (6.1); not told apart from best constant action (4)",
    ]


def test_the_score_curve_is_in_order_of_steps_and_knows_complete_plain_evaluations_only(tmp_path: Path) -> None:
    for step, game, returns in ((1000, "Pong", [1, 3]), (200, "Pong", [0]), (200, "Breakout", [2, 2, 8])):
        (tmp_path / f"step-{step}").mkdir(exist_ok=True)
        table = pd.DataFrame({"episode_return": returns, "truncated": [value == 8 for value in returns]})
        table.to_csv(tmp_path / f"step-{step}" / f"{game}.csv")
    for other in ("Pong_sampled.csv", ".Qbert.csv.7.partial"):
        (tmp_path / "step-200" / other).write_text("episode_return\n9\n")
    rows = [("Breakout", 200, 4.0, 3, 1 / 3), ("Pong", 200, 0.0, 1, 0.0), ("Pong", 1000, 2.0, 2, 0.0)]
    assert list(evaluation.score_curve(tmp_path).itertuples(index=False, name=None)) == rows
    assert evaluation.score_curve(tmp_path / "nothing").empty


def of_pixels(stacks: np.ndarray) -> np.ndarray:
    """A player whose choice depends on what it sees, and on nothing else."""
    return np.stack([stacks[:, :, row::7, 3::5].sum((1, 2, 3)) % 97 for row in range(4)], 1).astype(np.float32)


def test_a_film_is_the_evaluations_episode(tmp_path: Path) -> None:
    """With sticky and random actions, also where it is not its environment's first one."""
    played = evaluation.evaluate(
        of_pixels, "Breakout", episodes=5, seed=4, epsilon=0.2, sticky_actions=0.25, max_steps=250,
        num_environments=2, keep_actions=True,
    )  # fmt: skip
    assert (played["actions"].str.len() == 1 + played["length"]).all()
    assert (played["environment"] == played.loc[4, "environment"]).sum() > 1
    shared = {"seed": 4, "sticky_actions": 0.25, "max_steps": 250}
    for number in played.index:
        file = tmp_path / f"{number}.mp4"
        score = evaluation.record_film(of_pixels, "Breakout", played, number, file, num_steps=20, **shared)
        assert score == played.loc[number, "episode_return"]
        with av.open(str(file)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert container.streams.video[0].codec_context.name == "h264"
        assert len(frames) == 20 and frames[0].shape == (420, 640, 3)
        assert frames[0][:, :320].std() > 5, "the game's screen is not empty"


def everybody_asked(
    player: object, game: str, *, episodes: int, seed: int, epsilon: float, temperature: float, num_environments: int,
    **rules: object,
) -> list[tuple]:  # fmt: skip
    """`evaluate`, asking about all environments in every step: (environment, return, length, actions) in its order."""
    rng, slots = np.random.default_rng(seed), num_environments
    environments = evaluation.make_vector_environment(game, slots, **rules)
    num_actions, memory = environments.single_action_space.n, isinstance(player, evaluation.MemoryPlayer)
    stacks, _ = environments.reset(seed=int(rng.integers(2**30)))
    history = evaluation.History(player, np.arange(slots), seed) if memory else None
    playing: list[list] = [[] for _ in range(slots)]  # (action, reward) of each step of an episode
    begins, ended, rows = [True] * slots, [False] * slots, []
    left = [len(range(slot, episodes, slots)) for slot in range(slots)]
    while any(left):
        values = player(*history.see(stacks[:, -1], np.array(begins))) if memory else player(stacks)
        if temperature:
            values = values / temperature + rng.gumbel(size=values.shape)
        explore, best = rng.random(slots) < epsilon, values.argmax(1)
        actions = np.where(explore, rng.integers(num_actions, size=slots), best)
        stacks, rewards, terminated, truncated, _ = environments.step(actions)
        if memory:
            history.act(actions, rewards)
        begins, ended = ended, [False] * slots  # one that ended resets in the next step
        for slot in range(slots):
            if not begins[slot]:
                playing[slot].append((actions[slot], rewards[slot]))
                ended[slot] = bool(terminated[slot] or truncated[slot])
            if ended[slot]:
                taken, received = zip(*playing[slot])
                if left[slot]:
                    letters = ":" + "".join(chr(ord("a") + action) for action in taken)
                    rows.append((slot, sum(received), len(taken), letters))
                    left[slot] -= 1
                playing[slot] = []
    environments.close()
    return rows


def of_memory(params: None, windows: object, draw: np.ndarray) -> np.ndarray:
    """Preferences of all 18 actions that depend on all that a player with a memory sees, row by row."""
    seen = sum(x.reshape(len(draw), -1) @ np.arange(1, x[0].size + 1) for x in windows if x.ndim > 1)
    return (((seen + draw @ [3, 5, 7])[:, None] * np.arange(3, 21)) % 101).astype(np.float32)


@pytest.mark.parametrize("kind", ["stacks", "memory", "variant"])
def test_whom_nobody_asks_about_plays_no_part(kind: str) -> None:
    """The same episodes, step by step, as when the player is asked about all environments until the end."""
    sizes = []

    def counted(*seen: object) -> np.ndarray:
        sizes.append(len(seen[-1]))
        return of_memory(*seen) if kind == "memory" else of_pixels(*seen)

    player = counted
    if kind == "memory":
        player = evaluation.MemoryPlayer(counted, None, 0, action_names("Breakout"), 3)
    rules = {"sticky_actions": 0.25, "max_steps": 400} | ({"mode": 4, "difficulty": 0} if kind == "variant" else {})
    how = {"episodes": 8, "seed": 3, "epsilon": 0.1, "num_environments": 6, "temperature": 2.0} | rules
    played = evaluation.evaluate(player, "Breakout", keep_actions=True, **how)
    assert sizes == sorted(sizes, reverse=True) and set(sizes) == evaluation.batch_sizes(6) == {6, 2}
    assert played["length"].nunique() > 3
    expected = everybody_asked(player, "Breakout", **how)
    columns = ["environment", "episode_return", "length", "actions"]
    assert list(played[columns].itertuples(index=False, name=None)) == expected


def test_on_an_accelerator_one_size_of_batch_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation.jax, "default_backend", lambda: "gpu")
    sizes = set()
    play_scripted([[9], [2], [2], [2]], lambda stacks: sizes.add(len(stacks)) or always(0)(stacks), episodes=4)
    assert sizes == evaluation.batch_sizes(4) == {4}


def test_the_episode_to_film_is_the_longest_of_those_next_to_the_median() -> None:
    played = pd.DataFrame({"episode_return": [9.0, 2.0, 3.0, 0.0, 2.0], "length": [5, 1, 9, 3, 4]})
    assert evaluation.representative(played) == 4


def test_a_film_skips_what_is_still_and_what_is_far_from_a_reward() -> None:
    rewards, still = np.zeros(100), np.zeros(100, bool)
    rewards[60] = 1
    assert evaluation.eventful(rewards, still, 100).tolist() == list(range(100))
    assert evaluation.eventful(rewards, still, 9).tolist() == [0, 1, 2, 58, 59, 60, 61, 98, 99]
    still[10:40] = True  # frames 10 to 39 are frame 9 again
    assert evaluation.eventful(rewards, still, 100).tolist() == [*range(24), *range(40, 100)]


def test_the_mean_frame_of_random_play_is_that_of_a_random_players_recording(tmp_path: Path) -> None:
    collect.record_game(tmp_path / "replay", "SpaceInvaders", 1_500, seed=3)  # no script plays it: at random
    recorded = replay.mean_frames(replay.open_replay(tmp_path / "replay"), seed=0)[0]
    played, again = (
        evaluation.mean_random_frame("SpaceInvaders", seed=1, num_frames=400, sticky_actions=0.25) for _ in range(2)
    )
    assert played.shape == (84, 84) and played.dtype == np.float32
    assert np.abs(played - recorded).mean() < 3 < np.abs(played - played.mean()).mean()
    np.testing.assert_array_equal(played, again)
