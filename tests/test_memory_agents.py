"""Transformers under the loupe: what they see of an episode is what they saw in evaluation, whoever played."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from scipy.ndimage import gaussian_filter
from written import save, write_run

from scaled_ql import (
    browsers,
    defaults,
    documents,
    episodes,
    evaluation,
    explore,
    methods,
    model_card,
    parameters,
    runs,
    saliency,
    state_map,
    training,
    transfer,
)  # fmt: skip
from scaled_ql.games import FULL_ACTIONS, action_names
from scaled_ql.replay import open_replay, returns_to_go
from scaled_ql.trained_agent import Agent

GAMES = ["Breakout", "Freeway"]  # those of the recording
DT = {"method": "dt", "transformer": "tiny", "sequence_length": 3, "return_low": -2, "return_high": 7}
DT |= {"subtract_mean_frames": False, "action_percentile": 0.0}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:  # one layer, which compiles sooner
        patch.setitem(defaults.TRANSFORMERS, "tiny", (1, 32, 2))
        yield tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def written(outputs: Path) -> tuple[Agent, nnx.Module]:
    (network,) = write_run(outputs / "04_scaled_training" / "dt", GAMES, **DT)
    return explore.load_agent("04_scaled_training/dt", outputs=outputs), network


@pytest.fixture(scope="module")
def agent(written: tuple) -> Agent:
    return written[0]


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(np.float64(logits) - np.max(logits, -1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), length=st.integers(1, 5), steps=st.integers(1, 8), seed=st.integers(0, 2**40))
def test_an_episodes_windows_are_those_of_its_history_in_play(data: Any, length: int, steps: int, seed: int) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    rewards = np.float32(
        data.draw(st.lists(st.sampled_from([-7, -0.5, 0, 0.25, 1, 30]), min_size=steps, max_size=steps))
    )
    frames, actions = rng.integers(0, 256, (steps, 84, 84), np.uint8), rng.integers(4, size=steps)
    episode = episodes.Episode("Breakout", "", frames, actions, rewards, ["agent"] * steps, "", seed)
    player = evaluation.MemoryPlayer(None, None, 0, action_names("Breakout"), length)
    history = evaluation.History(player, np.zeros(1, int), seed)
    for step in range(steps):
        in_play = history.see(frames[step : step + 1], np.array([step == 0]))
        ours = episode.windows(np.s_[step : step + 1], length)
        for expected, found in zip(jax.tree.leaves(in_play), jax.tree.leaves(ours), strict=True):
            assert expected.dtype == found.dtype
            np.testing.assert_array_equal(expected, found)
        history.act(actions[step : step + 1], rewards[step : step + 1])
    together = episode.windows(np.s_[:], length)
    for whole, last in zip(jax.tree.leaves(together), jax.tree.leaves(ours), strict=True):
        np.testing.assert_array_equal(whole[-1:], last)


def test_the_policy_at_each_step_is_the_one_that_evaluation_played(outputs: Path, written: tuple) -> None:
    """Evaluated as the training notebook does it, without what is tested here."""
    agent, network = written
    p = parameters.check(
        "04_scaled_training", parameters.load(outputs / "04_scaled_training" / "dt" / "parameters.yaml")
    )
    method, (graph, variables) = methods.make(p), nnx.split(network, nnx.Param)
    prefer, played = method.preferences(graph, [4, 3]), []

    def remembered(*seen: Any) -> jax.Array:
        played.append(np.asarray(prefer(*seen))[0])
        return played[-1][None]

    rules = {"epsilon": 0.3, "sticky_actions": 0.25, "max_steps": 50, "temperature": method.temperature}
    player = evaluation.make_player(method, remembered, nnx.to_pure_dict(variables), 1, action_names("Freeway"))
    evaluated = evaluation.evaluate(player, "Freeway", episodes=1, seed=5, keep_actions=True, **rules).iloc[0]
    assert agent.protocol["temperature"] == rules["temperature"] == 1
    episode = episodes.play(agent.player("Freeway"), "Freeway", seed=5, **rules)
    assert "".join(chr(ord("a") + action) for action in episode.actions) == evaluated["actions"][1:]
    assert set(episode.by) == {"chance", "agent"} and len(set(episode.actions)) > 1
    look, used = episodes.watch(agent, episode), [FULL_ACTIONS.index(name) for name in action_names("Freeway")]
    expected = np.exp(np.float64(played[:50]))
    rest = 1 - expected[:, used].sum(1)  # of actions that the game does not have: NOOP
    expected = expected[:, used]
    expected[:, 0] += rest
    np.testing.assert_allclose(look.policy, expected, atol=1e-5)
    np.testing.assert_allclose(np.exp(look.values), expected, atol=1e-5)
    assert np.ptp(look.policy, axis=0).max() > 0.01, "it depends on the state"


def test_what_is_shown_is_what_the_network_says_of_a_window_made_by_hand(written: tuple) -> None:
    agent, network = written
    episode = episodes.play(agent.player("Breakout"), "Breakout", seed=1, epsilon=0.2, temperature=1, max_steps=30)
    episode = episode._replace(rewards=np.random.default_rng(0).integers(-2, 3, 30).astype(np.float32))
    look = episodes.watch(agent, episode)
    with pytest.raises(ValueError, match=r"sees the last 3 steps of an episode: pass on all that episodes\.seen"):
        agent.look("Breakout", episode.stacks())
    assert agent.atoms.tolist() == list(range(-2, 8)) and agent.memory == 3 and agent.values_name == "π(a|s, R)"
    names = action_names("Breakout")
    for step in (0, 1, 17, 29):
        frames, done, gave = [], [], []
        for time in range(step - 2, step + 1):
            frames.append(episode.frames[time] if time >= 0 else np.zeros((84, 84), np.uint8))
            past = 0 <= time < step
            done.append(FULL_ACTIONS.index(names[episode.actions[time]]) if past else 0)
            gave.append([0, 1, 3][int(np.sign(episode.rewards[time]))] if past else 0)
        token = np.int32([look.asked[step] + 2])
        window = np.array(frames)[None], token, np.int32([done]), np.int32([gave])
        predictions = network(*window)
        first = np.float64(predictions.returns[0, 0])
        np.testing.assert_allclose(look.probabilities[step, 0], softmax(first), atol=1e-5)
        below = np.cumsum(np.append(0, softmax(0.75 * first)))
        np.testing.assert_allclose(look.probabilities[step, 1], np.diff(below**128), atol=1e-4)
        assert look.probabilities[step, 1, token[0]] > 0
        np.testing.assert_allclose(look.features[step], predictions.features[0, -1], atol=1e-5)
        policy = softmax(predictions.actions[0, -1])[[FULL_ACTIONS.index(name) for name in names]]
        np.testing.assert_allclose(look.policy[step, 1:], policy[1:], atol=1e-5)
        assert look.policy[step].sum() == pytest.approx(1, abs=1e-5)
        assert look.entropy[step] == pytest.approx(-(look.policy[step] * look.values[step]).sum(), abs=1e-5)
        name, expected = agent.expectation(look)
        assert name == "predicted return" and expected[step] == pytest.approx(softmax(first) @ agent.atoms, abs=1e-4)


def test_what_you_did_is_in_the_past_when_you_hand_back(agent: Agent) -> None:
    along = explore.play_along(agent, max_steps=40, epsilon=0.1, sticky_actions=0.25)
    along.by_agent(12)
    along.by_you("LEFT", 2)
    now, _ = along._emulation.seen
    assert now.action[0].tolist() == [FULL_ACTIONS.index("LEFT")] * 2 + [0] and now.mask.all()
    np.testing.assert_array_equal(now.frames[0, :2], along.episode.frames[-2:])
    along.by_agent(12)
    episode, chance = along.episode, episodes.Chance(0, 0.1, 4, 1.0)
    look = episodes.watch(agent, episode)
    for step, (action, by) in enumerate(zip(episode.actions, episode.by)):
        if by != "you":
            assert (action, by) == chance.choose(look.values[step])
    blind = episodes.watch(agent, episode._replace(actions=np.where(np.array(episode.by) == "you", 0, episode.actions)))
    changed = np.abs(blind.policy - look.policy).max(1) > 1e-6
    assert changed[[13, 14, 15]].all() and not changed[:13].any() and not changed[16:].any(), (
        "for as long as it sees it"
    )
    assert "the agent would most likely play" in along.words.value
    likeliest = int(along._look.best[0])
    assert along.moves.children[likeliest].description.endswith(f"{along._look.policy[0, likeliest]:.2f}")


def test_alone_it_plays_the_same_episode_in_every_view_of_it(agent: Agent, tmp_path: Path) -> None:
    browser = explore.agent_browser(agent, max_steps=20)
    alone = episodes.play(agent.player("Breakout"), "Breakout", seed=0, **agent.protocol | {"max_steps": 20})
    along = explore.play_along(agent, max_steps=20)
    along.by_agent(20)
    for episode in (browser.episode, along.episode):
        np.testing.assert_array_equal(episode.actions, alone.actions)
        np.testing.assert_array_equal(episode.frames, alone.frames)
    how = agent.protocol | {"max_steps": 20, "seed": 0}
    played = evaluation.evaluate(agent.player("Breakout"), "Breakout", episodes=1, keep_actions=True, **how)
    rules = {name: how[name] for name in ("seed", "max_steps", "sticky_actions")}
    film = tmp_path / "film.mp4"
    assert evaluation.record_film(agent.player("Breakout"), "Breakout", played, 0, film, **rules) == alone.rewards.sum()
    assert film.stat().st_size > 1_000


def test_the_browser_shows_the_window_and_the_returns(agent: Agent, recording: Path) -> None:
    browser = explore.agent_browser(agent, data=open_replay(recording), max_steps=30)
    browser.source.value = "recording"
    browser.steps.slider.value = 9
    moments, (look,), episode = browser._moments, browser._looks, browser.episode
    shown = np.stack([picture.get_array()[..., 0] for picture in moments._frames])
    np.testing.assert_array_equal(shown, episode.frames[7:10])
    names = action_names("Breakout")
    captions = [caption.get_text() for caption in moments._ages]
    assert captions[2] == "now" and names[episode.actions[7]] in captions[0] and "1 before" in captions[1]
    for row, line in enumerate(moments._lines[0]):
        np.testing.assert_array_equal(line.get_ydata(), look.probabilities[9, row])
    np.testing.assert_array_equal([bar.get_width() for bar in moments._bars[0]], look.policy[9])
    assert f"asking for a return of {look.asked[9]:g}" in browser.words.value
    assert f"of at most {np.log(4):.2f} nats" in browser.words.value
    before = bytes(browser.picture.value)
    browser.looks_at.value = True
    assert bytes(browser.picture.value) != before
    browser.steps.slider.value = 0
    assert moments._ages[0].get_text() == "2 before: nothing"


def test_a_transformer_and_a_q_network_are_compared_on_the_episodes_own_history(agent: Agent, outputs: Path) -> None:
    write_run(outputs / "04_scaled_training" / "mse", GAMES, head="mse", subtract_mean_frames=False)
    other = explore.load_agent("04_scaled_training/mse", outputs=outputs)
    browser = explore.agent_browser(other, agent, max_steps=30, seed=3)
    episode = browser.episode
    assert set(episode.by) <= {"agent", "chance"} and len(browser._moments._frames) == 4
    looks = episodes.watch(other, episode), episodes.watch(agent, episode)
    assert looks[0].best.tolist() == [
        action if by == "agent" else best for action, by, best in zip(episode.actions, episode.by, looks[0].best)
    ], "the Q-network played"
    cases = episodes.disagreements(episode, *looks)
    assert np.isfinite(cases[["first_cost", "second_cost"]]).all(axis=None) and (cases["second_cost"] <= 1).all()
    assert "asking for a return" in browser.words.value and "Q(s, a)" in browser.words.value


def test_saliency_blurs_the_newest_frame_of_a_window(agent: Agent) -> None:
    frames = np.random.default_rng(1).integers(0, 256, (4, 84, 84), np.uint8)
    nothing = np.zeros(4, int), np.zeros(4, np.float32)
    episode = episodes.Episode("Breakout", "", frames, *nothing, ["data"] * 4, "", seed=2)
    scores, changed = saliency.saliency(agent, episode, 3, grid=3), frames.copy()
    soft = gaussian_filter(frames[3].astype(float), 3)
    for y in range(84):
        for x in range(84):
            share = np.exp(-((y - 13.5) ** 2 + (x - 69.5) ** 2) / 50)
            changed[3, y, x] = round((1 - share) * frames[3, y, x] + share * soft[y, x])
    before, after = (episodes.watch(agent, episode._replace(frames=x)) for x in (frames, changed))
    np.testing.assert_array_equal(before.asked, after.asked)
    difference = np.float64(before.policy[3]) - after.policy[3]
    assert scores[0, 2] == pytest.approx(0.5 * np.square(difference).sum(), rel=0.02) and scores[0, 2] > 0


def test_a_map_shows_states_as_their_episodes_do(agent: Agent, recording: Path) -> None:
    data = open_replay(recording)
    states = state_map.map_states(agent, data, 80, seed=4)
    whole, collected = {game: [episodes.recorded(data, game, n) for n in range(2)] for game in GAMES}, 0
    for row in states.table.to_dict("records"):
        lengths = data.episodes(row["game"])["length"].to_numpy()
        number = int(np.searchsorted(lengths.cumsum(), row["time"], side="right"))
        if number < 2:
            step, rewards = row["time"] - lengths[:number].sum(), whole[row["game"]][number].rewards.clip(-1, 1)
            assert row["return"] == rewards[max(step - 2, 0) :].sum(), "from the window's first step on"
            collected += rewards[max(step - 2, 0) : step].any()
    assert collected, "or it would be the same from the last step on"
    for game in GAMES:
        rows, lengths = states.table[states.table["game"] == game], data.episodes(game)["length"].to_numpy()
        for row in rows.iloc[[0, 3, 7]].itertuples():
            number = int(np.searchsorted(lengths.cumsum(), row.time, side="right"))
            step = row.time - lengths[:number].sum()
            episode = episodes.recorded(data, game, number)
            look = agent.look(game, *episodes.seen(agent, episode, np.s_[step : step + 1]))
            assert row.value == pytest.approx(agent.expectation(look)[1][0], abs=1e-4)
    time = np.sort(data.draw("Breakout", np.random.default_rng(0).random(20), n_step=1))
    windows, draw = state_map._windows(data, "Breakout", time, 3)
    lengths = data.episodes("Breakout")["length"].to_numpy()
    assert np.any(windows.return_to_go < 0), "something was collected"
    for row, moment in enumerate(time):
        number = int(np.searchsorted(lengths.cumsum(), moment, side="right"))
        step = moment - lengths[:number].sum()
        expected, same = episodes.recorded(data, "Breakout", number).windows(np.s_[step : step + 1], 3)
        np.testing.assert_array_equal(draw[row], same[0])
        for name in ("frames", "return_to_go", "mask"):
            np.testing.assert_array_equal(getattr(windows, name)[row], getattr(expected, name)[0])
        for name in ("action", "reward"):
            np.testing.assert_array_equal(getattr(windows, name)[row, :-1], getattr(expected, name)[0, :-1])


def test_a_moments_figure_says_in_words_what_it_shows(agent: Agent) -> None:
    episode = episodes.play(agent.player("Freeway"), "Freeway", seed=0, temperature=1.0, max_steps=10)
    InteractiveShell.instance()  # which collects what is displayed
    with capture_output(stdout=False, stderr=False) as captured:
        explore.show_moments([agent], episode)
    InteractiveShell.clear_instance()
    shown = [output.data["text/html"] for output in captured.outputs]
    assert shown and all("asking for a return of" in words and "π(a|s, R)" in words for words in shown)
    assert browsers.moment_in_words([agent], episode, [episodes.watch(agent, episode)], 4).count("nats") == 1


def test_a_cloning_transformer_has_a_policy_and_no_returns(outputs: Path) -> None:
    plain = {name: DT[name] for name in ("transformer", "sequence_length", "subtract_mean_frames")}
    (network,) = write_run(outputs / "04_scaled_training" / "clone", GAMES, method="bc_transformer", **plain)
    agent = explore.load_agent("04_scaled_training/clone", outputs=outputs)
    episode = episodes.play(agent.player("Breakout"), "Breakout", seed=1, temperature=1.0, max_steps=6)
    look = episodes.watch(agent, episode)
    windows, _ = episode.windows(np.s_[:], 3)
    inputs = windows.frames, None, windows.action, np.zeros_like(windows.action)
    expected = softmax(network(*inputs).actions[:, -1])[
        :, [FULL_ACTIONS.index(name) for name in action_names("Breakout")]
    ]
    assert not episode.rewards.any()
    np.testing.assert_allclose(look.policy[:, 1:], expected[:, 1:], atol=1e-5)
    assert look.probabilities is None and look.asked is None and agent.atoms is None
    assert agent.expectation(look)[0] == "largest π(a|s)" and look.entropy.shape == (6,)


@pytest.mark.parametrize("initial", ["dt", "cpc"])
def test_a_fine_tuned_transformer_asks_as_the_run_that_it_began_with(outputs: Path, initial: str) -> None:
    """Its own parameters do not say how; and where an encoder of `cpc` went into it, another run says."""
    home = outputs / f"from_{initial}"
    origin, target = home / "04_scaled_training" / "asking", home / "06_transfer" / "fine"
    write_run(origin, GAMES, **DT | {"target_return": 5.0})
    (origin / "status.json").write_text('{"state": "finished"}')
    values = {"initial": "04_scaled_training/asking", "built_like": "04_scaled_training/asking", "parts": "all"}
    if initial == "cpc":
        folder = home / "04_scaled_training" / "cpc"
        write_run(folder, GAMES, method="cpc", subtract_mean_frames=False)
        (folder / "status.json").write_text('{"state": "finished"}')
        values |= {"initial": "04_scaled_training/cpc", "parts": "encoder"}
    p = parameters.check("06_transfer", values | {"run": "fine", "game": "Pong", "outputs": str(home)})
    like = transfer.sources(p, lambda name: runs.trained_run(p, name))[1]
    settings = transfer.training_parameters(p, like)
    network = methods.make(settings).build(settings.encoder, 1, 3, group_size=settings.group_size)
    stored = p.model_copy(update={"outputs": "/where/it/was"})
    save(target, stored, network, training.about_run(settings, ["Pong"], "of a test"), (20,), 0)
    agent = explore.load_agent("06_transfer/fine", outputs=home)
    frames = np.random.default_rng(0).integers(0, 256, (6, 84, 84), np.uint8)
    nothing = np.zeros(6, int), np.float32([0, 1, 1, 0, 1, 0])
    episode = episodes.Episode("Pong", "", frames, *nothing, ["data"] * 6, "")
    assert episodes.watch(agent, episode).asked.tolist() == [5, 5, 5, 5, 4, 3], "of each window's first step"
    with pytest.raises(runs.RunError, match=r"as the run that it began with, .* Export that run"):
        model_card.export("06_transfer/fine", home / "exported", outputs=home)
    assert not (home / "exported").exists()
    (origin / "status.json").unlink()
    with pytest.raises(runs.RunError, match=r"= '04_scaled_training/asking': no such run below"):
        explore.load_agent(target)


def test_returns_asked_for_as_the_data_has_them_need_the_data(outputs: Path, recording: Path) -> None:
    folder = outputs / "04_scaled_training" / "expert"
    write_run(folder, GAMES, **DT | {"target_return": "data", "dataset": str(recording)})
    agent = explore.load_agent(folder)
    data = open_replay(recording)
    episode = episodes.recorded(data, "Freeway", 1, max_steps=1)
    look = episodes.watch(agent, episode)
    lengths, returns = data.episodes("Freeway")["length"].to_numpy(), returns_to_go(data, "Freeway", 1.0)
    whole = np.array([returns[start] for start in np.append(0, lengths.cumsum()[:-1])])
    best = returns[np.repeat(whole >= np.sort(whole)[-1], lengths)]  # a tenth of the few episodes: the best one
    share = [np.bincount(np.int64(x.clip(-2, 7) + 2), minlength=10) / len(x) for x in (best, returns)]
    weight = np.divide(*share, out=np.zeros(10), where=share[1] > 0)
    expected = look.probabilities[0, 0] * weight
    np.testing.assert_allclose(look.probabilities[0, 1], expected / expected.sum(), atol=1e-5)
    values = documents.load(folder / "parameters.yaml")
    (folder / "parameters.yaml").write_text(documents.dump(values | {"dataset": str(recording / "gone")}))
    with pytest.raises(runs.RunError, match=r"target_return = 'data', .* those of its data\. .*gone"):
        explore.load_agent(folder)
