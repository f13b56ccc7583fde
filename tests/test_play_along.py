"""Playing along: whose turn it is, and what is played."""

from pathlib import Path

import numpy as np
import pytest
from written import write_run

from scaled_ql import episodes, explore, plots
from scaled_ql.games import HELD_OUT_GAMES, TRAINING_GAMES, action_names
from scaled_ql.play_along import KEYS, PlayAlong


@pytest.fixture
def along(tmp_path: Path) -> PlayAlong:
    write_run(tmp_path / "c51", ["Breakout", "Freeway"], eval_sticky_actions=0.25)
    return explore.play_along(explore.load_agent(tmp_path / "c51"), max_steps=40, epsilon=0.0)


def test_agent_and_you_play_in_turns(along: PlayAlong) -> None:
    along.by_agent(3)
    along.moves.children[1].click()
    along.one.click()  # yours, since you took over: the same action again
    along.player.value = "agent"
    along.one.click()
    along.by_you("LEFT", 2)
    episode = along.episode
    assert list(episode.by) == ["agent"] * 3 + ["you"] * 2 + ["agent"] + ["you"] * 2
    names = action_names("Breakout")
    assert [names[action] for action in episode.actions[[3, 4, 6, 7]]] == ["FIRE", "FIRE", "LEFT", "LEFT"]
    own = [0, 1, 2, 5]
    np.testing.assert_array_equal(episode.actions[own], episodes.watch(along._agent, episode).best[own])
    seed = episodes.Chance(0, 0.0, len(names)).emulator_seed
    again = episodes.Emulation("Breakout", seed, sticky_actions=0.25, max_steps=40)
    for action in episode.actions:
        again.step(int(action), "data")
    np.testing.assert_array_equal(again.episode("").frames, episode.frames)
    again.close()


def test_keys_are_held_until_they_are_released(along: PlayAlong) -> None:
    along.pressed.value = "ArrowLeft 1"
    along.pressed.value = "ArrowLeft 2"
    along.pressed.value = "KeyQ 3"  # means nothing
    along.pressed.value = "ArrowUp 4"  # an action that the game does not have
    along.play.playing = True
    along.pressed.value = "Space 5"  # waits for the next tick
    assert len(along.episode.actions) == 2
    along.play.value = 1
    along.play.value = 2
    along.pressed.value = "released 6"
    along.play.value = 3
    along.play.value = 0  # the stop button
    names = action_names("Breakout")
    assert [names[action] for action in along.episode.actions] == ["LEFT", "LEFT", "FIRE", "FIRE", "NOOP"]
    assert set(KEYS.values()) <= set(action_names("Boxing"))


def test_the_episode_ends_and_begins_again(along: PlayAlong) -> None:
    along.play.playing = True
    along.by_agent(50)
    assert len(along.episode.actions) == 40 and "Over: the step limit ended it" in along.words.value
    along.play.value = 1
    along.moves.children[0].click()
    assert len(along.episode.actions) == 40 and not along.play.playing
    along.again.click()
    assert len(along.episode.actions) == 0 and along.player.value == "agent"
    along.game.value = "Freeway"
    best = [button.button_style for button in along.moves.children].index("success")
    look = along._agent.look("Freeway", along._emulation.stack[None])
    assert best == look.best[0] and len(along.moves.children) == 3
    assert along.moves.children[best].description.endswith(f"{look.values[0, best]:.2f}")


def test_the_agents_random_moves_are_those_of_its_protocol(along: PlayAlong) -> None:
    moving = explore.play_along(along._agent, max_steps=40)
    moving.by_agent(40)
    assert 0 < np.mean([by == "chance" for by in moving.episode.by]) < 0.3, "eval_epsilon is 0.1"
    agent, protocol = along._agent, along._agent.protocol | {"max_steps": 40}
    alone = episodes.play(agent.player("Breakout"), "Breakout", seed=0, **protocol)
    for _ in range(2):  # and once more from the beginning
        np.testing.assert_array_equal(moving.episode.actions, alone.actions)
        np.testing.assert_array_equal(moving.episode.frames, alone.frames)
        moving.again.click()
        moving.by_agent(40)


def test_no_key_is_no_action_in_every_game() -> None:
    assert {action_names(game)[0] for game in TRAINING_GAMES + HELD_OUT_GAMES} == {"NOOP"}


def test_the_part_that_you_played_is_shaded() -> None:
    by = ["agent", "you", "you", "agent", "you"]
    (axis,) = plots.taken_over(np.arange(5.0), np.zeros(5), by, "Q(s, a)").axes
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axis.patches]
    assert spans == [(0.5, 2.5), (3.5, 4.5)]
    plots.plt.close("all")
