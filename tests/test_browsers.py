"""Episodes of agents and of recordings, and the widgets and figures that show them."""

import re
from pathlib import Path

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from scipy.ndimage import gaussian_filter
from written import write_run

from scaled_ql import browsers, environments, episodes, evaluation, explore, saliency, state_map
from scaled_ql.controls import Steps, next_event
from scaled_ql.games import action_names
from scaled_ql.replay import View, open_replay
from scaled_ql.replay.returns import returns_to_go
from scaled_ql.trained_agent import Agent, Look

GAMES = ["Breakout", "Freeway"]  # those of the recording


@pytest.fixture(scope="module")
def agents(tmp_path_factory: pytest.TempPathFactory) -> list[Agent]:
    """Two checkpoints of a run with distributions, and a run of values that plays another game, too."""
    folder = tmp_path_factory.mktemp("outputs") / "04_scaled_training"
    write_run(folder / "c51", GAMES, steps=(10, 20))
    write_run(folder / "mse", ["Breakout", "Pong"], head="mse", subtract_mean_frames=False)
    return [explore.load_agent(folder / "c51", step) for step in (10, 20)] + [explore.load_agent(folder / "mse")]


def test_play_is_the_evaluation_of_one_episode(agents: list[Agent]) -> None:
    q, rules = agents[0].player("Breakout"), {"epsilon": 0.3, "sticky_actions": 0.25, "max_steps": 70}
    episode = episodes.play(q, "Breakout", seed=5, **rules)
    evaluated = evaluation.evaluate(q, "Breakout", episodes=1, seed=5, keep_actions=True, **rules).iloc[0]
    assert "".join(chr(ord("a") + action) for action in episode.actions) == evaluated["actions"][1:]
    assert (len(episode.frames), episode.rewards.sum()) == (evaluated["length"], evaluated["episode_return"])
    assert 0.1 < np.mean([by == "chance" for by in episode.by]) < 0.5 and set(episode.by) == {"chance", "agent"}
    assert episode.ending == "the step limit ended it" and episode.title == "agent, seed 5"
    own = np.array([by == "agent" for by in episode.by])
    look = episodes.watch(agents[0], episode)
    np.testing.assert_array_equal(look.best[own], episode.actions[own])


def test_long_episodes_are_watched_in_parts(agents: list[Agent], monkeypatch: pytest.MonkeyPatch) -> None:
    episode = episodes.play(agents[0].player("Breakout"), "Breakout", seed=1, max_steps=20)
    whole = episodes.watch(agents[0], episode)
    monkeypatch.setattr(episodes, "WATCHED", 7)
    parts = episodes.watch(agents[0], episode)
    for name in ("values", "probabilities", "features"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), atol=1e-6)


def test_a_recorded_episode_has_the_stacks_that_batches_have(recording: Path) -> None:
    data = open_replay(recording)
    episode, row = episodes.recorded(data, "Breakout", 1), data.episodes("Breakout").iloc[1]
    batch = data.batch("Breakout", row["start"] + np.arange(row["length"]), n_step=1, clip_rewards=False)
    np.testing.assert_array_equal(np.moveaxis(episode.stacks(), 1, -1), batch.observation)
    np.testing.assert_array_equal(episode.stacks(np.s_[3:5]), episode.stacks()[3:5])
    np.testing.assert_array_equal(episode.actions, batch.action)
    np.testing.assert_array_equal(episode.rewards, batch.reward)
    assert episode.ending == "the game ended" and set(episode.by) == {"data"}
    part = episodes.recorded(data, "Breakout", 1, max_steps=5)
    assert len(part.frames) == len(part.actions) == 5
    assert part.ending == f"{row['length'] - 5} more steps are not shown"


def test_an_emulation_ends_with_its_episode() -> None:
    emulation = episodes.Emulation("Breakout", 0, max_steps=2)
    assert len(emulation.episode("nothing yet").frames) == 0
    emulation.step(1, "you")
    first = emulation.stack[-2].copy()
    assert not emulation.over
    with pytest.raises(environments.UnknownAction):
        emulation.step(4, "you")
    emulation.step(0, "you")
    np.testing.assert_array_equal(emulation.episode("mine").frames[0], first)
    with pytest.raises(ValueError, match=r"over .* after 2 steps"):
        emulation.step(0, "you")
    emulation.close()


def test_telling_moments_are_where_the_numbers_say(agents: list[Agent]) -> None:
    for agent in agents[1:]:
        episode = episodes.play(agent.player("Breakout"), "Breakout", seed=2, epsilon=0.5, max_steps=60)
        episode = episode._replace(rewards=np.eye(60, dtype=np.float32)[33])
        look = episodes.watch(agent, episode)
        moments = episodes.telling_moments(episode, look)
        assert list(moments.values()) == sorted(moments.values()) and moments["before the first reward"] == 33
        if agent.atoms is None:
            lead = [row[-1] - row[-2] for row in np.sort(look.values, axis=1)]
            expected = int(np.argmin(lead)), int(np.argmax(lead))
        else:
            spread = [-(p * np.log(p)).sum() for p in np.float64(look.probabilities[np.arange(60), look.best])]
            expected = int(np.argmax(spread)), int(np.argmin(spread))
        assert (moments["least certain"], moments["most certain"]) == expected


def test_jumps_go_to_the_next_event_and_stay_after_the_last() -> None:
    assert [next_event(np.array([3, 7]), now) for now in (0, 3, 7, 9)] == [3, 7, 7, 9]
    shown = []
    steps = Steps(lambda: shown.append(steps.slider.value))
    steps.set_episode(10, {"reward": np.array([3, 7]), "disagreement": np.array([], int)})
    (reward, disagreement), visited = steps.jumps.children, []
    for _ in range(3):
        reward.click()
        visited.append(steps.slider.value)
    assert visited == [3, 7, 7] and not reward.disabled and disagreement.disabled
    steps.set_episode(5, {"reward": np.array([1])})
    assert (steps.slider.value, steps.slider.max, steps.play.max) == (0, 4, 4)
    assert [button.description for button in steps.jumps.children] == ["next reward"]
    assert shown == [0, 3, 7, 0], "each step once"


def test_the_browser_shows_the_episode_that_its_controls_name(agents: list[Agent], recording: Path) -> None:
    data = open_replay(recording)
    browser = explore.agent_browser(agents[1], data=data, max_steps=50)
    played = browser.episode
    assert played.title == "04_scaled_training/c51, step 20, seed 0" and len(played.actions) == 50
    pictures = {bytes(browser.picture.value)}
    browser.steps.slider.value = 7
    pictures.add(bytes(browser.picture.value))
    names = action_names("Breakout")
    assert f"step 7 of 49: {names[played.actions[7]]}, chosen by {played.by[7]}" in browser.words.value
    browser.number.value = 1
    assert not np.array_equal(browser.episode.actions, played.actions) and browser.steps.slider.value == 0
    browser.source.value = "recording"
    assert browser.episode.title == "recording, run 1, episode 0" and browser.number.description == "episode"
    assert browser.number.max == len(data.episodes("Breakout")) - 1
    browser.game.value = "Freeway"
    assert (browser.episode.game, browser.source.value, browser.number.value) == ("Freeway", "recording", 0)
    np.testing.assert_array_equal(browser.episode.actions, data.episode("Freeway", 0)["action"][:50])
    pictures.add(bytes(browser.picture.value))
    assert len(pictures) == 3


def test_two_agents_are_browsed_where_they_disagree(agents: list[Agent]) -> None:
    browser = explore.agent_browser(agents[0], agents[2], max_steps=40)
    assert browser.game.options == ("Breakout",) and list(browser.source.options) == ["agent"]
    looks = [episodes.watch(agent, browser.episode) for agent in (agents[0], agents[2])]
    different = np.flatnonzero(looks[0].best != looks[1].best)
    assert len(different)
    _, disagreement = browser.steps.jumps.children
    disagreement.click()
    assert browser.steps.slider.value == different[different > 0][0]
    assert agents[0].name in browser.words.value and agents[2].name in browser.words.value
    cases = episodes.disagreements(browser.episode, *looks)
    assert [step for _, step in browser.cases.options] == cases["step"].tolist() and browser.cases.value is None
    browser.cases.value = int(cases["step"].iloc[-1])
    assert browser.steps.slider.value == cases["step"].iloc[-1]


def test_the_clearest_disagreement_comes_first_whatever_the_scale(agents: list[Agent]) -> None:
    rng, frames = np.random.default_rng(0), np.zeros((200, 84, 84), np.uint8)
    episode = episodes.Episode("Breakout", "", frames, np.zeros(200, int), np.zeros(200), ["data"] * 200, "")
    first, second = (Look(rng.normal(size=(200, 4)), None, np.zeros((200, 1))) for _ in range(2))
    table = episodes.disagreements(episode, first, second, apart=1)
    expected = []
    for step in range(200):
        a, b = max(range(4), key=first.values[step].__getitem__), max(range(4), key=second.values[step].__getitem__)
        costs = first.values[step][a] - first.values[step][b], second.values[step][b] - second.values[step][a]
        if a != b:
            expected.append((step, action_names("Breakout")[a], action_names("Breakout")[b], *costs))
    expected.sort(key=lambda row: -row[3] * row[4])
    assert [tuple(row) for row in table.to_numpy()] == expected
    scaled = episodes.disagreements(episode, first, second._replace(values=7 * second.values - 3), apart=1)
    assert scaled["step"].tolist() == table["step"].tolist()
    spread = episodes.disagreements(episode, first, second)["step"].to_numpy()
    assert spread[0] == expected[0][0] and np.diff(np.sort(spread)).min() >= 8
    assert all(np.abs(spread - step).min() < 8 for step, *_ in expected)
    assert not len(episodes.disagreements(episode, first, first))


def still(frames: np.ndarray) -> episodes.Episode:
    """An episode of Pong with such frames in which nothing is done."""
    nothing = np.zeros(len(frames), int), np.zeros(len(frames), np.float32)
    return episodes.Episode("Pong", "", frames, *nothing, ["data"] * len(frames), "")


def test_saliency_is_what_blurring_each_spot_changes(agents: list[Agent]) -> None:
    stack = np.random.default_rng(1).integers(0, 256, (4, 84, 84), np.uint8)
    scores = saliency.saliency(agents[2], still(stack), 3, grid=3)
    assert scores.shape == (3, 3)
    before = np.float64(agents[2].look("Pong", stack[None]).values[0])
    for row, column in ((0, 0), (1, 2)):
        changed = stack.copy()
        for age, frame in enumerate(stack.astype(float)):
            soft = gaussian_filter(frame, 3)
            for y in range(84):
                for x in range(84):
                    share = np.exp(-((y - 13.5 - 28 * row) ** 2 + (x - 13.5 - 28 * column) ** 2) / 50)
                    changed[age, y, x] = round((1 - share) * frame[y, x] + share * soft[y, x])
        after = np.float64(agents[2].look("Pong", changed[None]).values[0])
        assert scores[row, column] == pytest.approx(0.5 * ((after - before) ** 2).sum(), rel=0.02)
    flat = saliency.saliency(agents[2], still(np.full((4, 84, 84), 7, np.uint8)), 3, grid=3)
    np.testing.assert_allclose(flat, 0, atol=1e-9)


def test_what_is_looked_at_is_red() -> None:
    score = np.zeros((3, 3))
    score[0, 2] = 5
    picture = saliency.highlight(np.full((84, 84), 100, np.uint8), score).astype(int)
    redness = picture[..., 0] - picture[..., 1]
    assert redness[5, 78] > 150 and abs(redness[78, 5]) == 0
    assert (saliency.highlight(np.full((84, 84), 9, np.uint8), np.zeros((3, 3))) == 9).all()


def test_the_browser_shows_where_the_agent_looks(agents: list[Agent]) -> None:
    browser = explore.agent_browser(agents[1], max_steps=10)
    before = bytes(browser.picture.value)
    browser.looks_at.value = True
    assert bytes(browser.picture.value) != before
    browser.looks_at.value = False
    assert bytes(browser.picture.value) == before


def test_agents_without_a_common_game_are_refused(agents: list[Agent], tmp_path: Path) -> None:
    write_run(tmp_path / "pong", ["Pong"], head="mse", subtract_mean_frames=False)
    with pytest.raises(ValueError, match=r"no game together .*c51.*: Breakout, Freeway; .*pong.*: Pong"):
        explore.agent_browser(agents[0], explore.load_agent(tmp_path / "pong"))
    with pytest.raises(ValueError, match="one agent or two"):
        explore.agent_browser(data=None)


def test_the_figure_moves_to_what_it_is_told(agents: list[Agent]) -> None:
    episode = episodes.play(agents[1].player("Freeway"), "Freeway", seed=0, max_steps=30)
    look = episodes.watch(agents[1], episode)
    moments = browsers.Moments([agents[1]], episode, [look])
    blits = []
    for step in (0, 12, 0):
        moments.set_step(step)
        shown = np.stack([picture.get_array()[..., 0] for picture in moments._frames])
        np.testing.assert_array_equal(shown, episode.stacks()[step])
        for action, (line, bar) in enumerate(zip(moments._lines[0], moments._bars[0])):
            np.testing.assert_allclose(line.get_ydata(), look.probabilities[step, action])
            np.testing.assert_allclose(bar.get_width(), look.values[step, action], rtol=1e-6)
        assert "best" in moments._marks[0][look.best[step]].get_text()
        assert "chosen" in moments._marks[0][episode.actions[step]].get_text()
        blits.append(moments.png())
    assert blits[0] == blits[2] != blits[1], "nothing is left behind"


def test_the_static_twin_has_an_alternative_text(agents: list[Agent]) -> None:
    episode = episodes.play(agents[2].player("Pong"), "Pong", seed=0, max_steps=30)
    InteractiveShell.instance()  # which collects what is displayed
    with capture_output(stdout=False, stderr=False) as captured:
        explore.show_moments([agents[2]], episode, [3, 4])
    InteractiveShell.clear_instance()
    shown = [
        re.search('base64,([^"]*)" alt="([^"]*)"', output.data["text/html"]).groups() for output in captured.outputs
    ]
    assert [f"step {step} of 29" in words for step, (_, words) in zip((3, 4), shown)] == [True, True]
    assert shown[0][0] != shown[1][0]


def test_principal_components_are_those_of_the_covariance() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(50, 6)) * [5, 3, 1, 1, 0.5, 0.1] @ np.linalg.qr(rng.normal(size=(6, 6)))[0] + 7
    places, explained = state_map.principal_components(x.astype(np.float32))
    variances, axes = np.linalg.eigh(np.cov(x.T))
    for column in (0, 1):
        along = (x - x.mean(0)) @ axes[:, -1 - column]
        assert abs(np.corrcoef(places[:, column], along)[0, 1]) == pytest.approx(1, abs=1e-6)
        assert places[:, column].std(ddof=1) == pytest.approx(np.sqrt(variances[-1 - column]), rel=1e-4)
        assert explained[column] == pytest.approx(variances[-1 - column] / variances.sum(), rel=1e-4)


def test_a_map_holds_what_agent_and_recording_say_of_its_states(agents: list[Agent], recording: Path) -> None:
    data = open_replay(recording)
    states = state_map.map_states(agents[1], data, 30, seed=4)
    table = states.table
    assert table["game"].value_counts().to_dict() == {"Breakout": 15, "Freeway": 15}
    last = table.iloc[-1]
    batch = data.batch("Freeway", [last["time"]], n_step=1)
    np.testing.assert_array_equal(np.moveaxis(states.stacks[-1], 0, -1), batch.observation[0])
    assert last["value"] == pytest.approx(agents[1].look("Freeway", states.stacks[-1:]).values.max(), abs=1e-5)
    assert last["return"] == returns_to_go(data, "Freeway", agents[1].discount)[last["time"]]
    with pytest.raises(ValueError, match=r"has Freeway; .* plays Breakout, Pong\."):
        state_map.map_states(agents[2], open_replay(recording, View(games=["Freeway"])), 30, seed=0)


def test_states_far_apart_cover_the_map() -> None:
    places = np.array([[0, 0], [0.1, 0], [9, 0], [-1, 0], [9, 0.1]])
    assert state_map.far_apart(places, 3) == [1, 4, 3]
    assert len(state_map.far_apart(places, 9)) == 5


def test_a_click_on_the_map_opens_the_state_under_it(agents: list[Agent], recording: Path) -> None:
    states = state_map.map_states(agents[1], open_replay(recording), 30, seed=4)
    browser = explore.state_map_browser(states)
    browser.by.value = "game"
    before, row = bytes(browser.view.value), int((browser.state.value + 7) % 30)
    width, height = browser._canvas.get_width_height()
    x, y = browser._axis.transData.transform(states.table[["x", "y"]].iloc[row])
    browser.clicked.value = f"{x / width} {1 - y / height}"
    place = states.table[["x", "y"]]
    np.testing.assert_allclose(place.iloc[browser.state.value], place.iloc[row])
    assert f"transition {states.table['time'].iloc[browser.state.value]:,}" in browser.words.value
    assert bytes(browser.view.value) != before and "alt=" in browser.picture.value
