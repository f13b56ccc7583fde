"""Episodes of agents and of recordings, and the widgets and figures that show them."""

from pathlib import Path

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from written import write_run

from scaled_ql import browsers, environments, episodes, evaluation, explore
from scaled_ql.controls import Steps, next_event
from scaled_ql.games import action_names
from scaled_ql.replay import open_replay
from scaled_ql.trained_agent import Agent

GAMES = ["Breakout", "Freeway"]  # those of the recording


@pytest.fixture(scope="module")
def agents(tmp_path_factory: pytest.TempPathFactory) -> list[Agent]:
    """Two checkpoints of a run with distributions, and a run of values that plays another game, too."""
    folder = tmp_path_factory.mktemp("outputs") / "04_scaled_training"
    write_run(folder / "c51", GAMES, steps=(10, 20))
    write_run(folder / "mse", ["Breakout", "Pong"], head="mse", subtract_mean_frames=False)
    return [explore.load_agent(folder / "c51", step) for step in (10, 20)] + [explore.load_agent(folder / "mse")]


def test_play_is_the_evaluation_of_one_episode(agents: list[Agent]) -> None:
    q, rules = agents[0].q_function("Breakout"), {"epsilon": 0.3, "sticky_actions": 0.25, "max_steps": 70}
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
    episode = episodes.play(agents[0].q_function("Breakout"), "Breakout", seed=1, max_steps=20)
    whole = episodes.watch(agents[0], episode)
    monkeypatch.setattr(episodes, "WATCHED", 7)
    for ours, theirs in zip(episodes.watch(agents[0], episode), whole):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


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
        episode = episodes.play(agent.q_function("Breakout"), "Breakout", seed=2, epsilon=0.5, max_steps=60)
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
    steps = Steps()
    steps.set_episode(10, {"reward": np.array([3, 7]), "disagreement": np.array([], int)})
    (reward, disagreement), visited = steps.jumps.children, []
    for _ in range(3):
        reward.click()
        visited.append(steps.slider.value)
    assert visited == [3, 7, 7] and not reward.disabled and disagreement.disabled
    steps.set_episode(5, {"reward": np.array([1])})
    assert (steps.slider.value, steps.slider.max, steps.play.max) == (0, 4, 4)
    assert [button.description for button in steps.jumps.children] == ["next reward"]


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


def test_agents_without_a_common_game_are_refused(agents: list[Agent], tmp_path: Path) -> None:
    write_run(tmp_path / "pong", ["Pong"], head="mse", subtract_mean_frames=False)
    with pytest.raises(ValueError, match=r"no game together .*c51.*: Breakout, Freeway; .*pong.*: Pong"):
        explore.agent_browser(agents[0], explore.load_agent(tmp_path / "pong"))
    with pytest.raises(ValueError, match="one agent or two"):
        explore.agent_browser(data=None)


def test_the_figure_moves_to_what_it_is_told(agents: list[Agent]) -> None:
    episode = episodes.play(agents[1].q_function("Freeway"), "Freeway", seed=0, max_steps=30)
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
    episode = episodes.play(agents[2].q_function("Pong"), "Pong", seed=0, max_steps=30)
    InteractiveShell.instance()  # which collects what is displayed
    with capture_output(stdout=False, stderr=False) as captured:
        explore.show_moments([agents[2]], episode, [3, 4])
    InteractiveShell.clear_instance()
    shown = [(output.data["image/png"], output.metadata["image/png"]["alt"]) for output in captured.outputs]
    assert [f"step {step} of 29" in words for step, (_, words) in zip((3, 4), shown)] == [True, True]
    assert shown[0][0] != shown[1][0]
