"""Names, action sets and reference scores of the games, and the scores built on them."""

import hashlib
from pathlib import Path

import ale_py
import numpy as np
import pytest
from ale_py import roms
from hypothesis import given, settings
from hypothesis import strategies as st

from scaled_ql import games, metrics
from scaled_ql.replay.formats import dqn_replay, rl_unplugged

ALL_GAMES = games.TRAINING_GAMES + games.HELD_OUT_GAMES


def test_forty_games_train_and_five_are_held_out():
    assert len(games.TRAINING_GAMES) == 40
    assert len(games.HELD_OUT_GAMES) == 5
    assert len(set(ALL_GAMES)) == 45


@pytest.mark.parametrize("game", ALL_GAMES)
def test_ale_knows_every_game(game):
    assert games.rom_name(game) in roms.get_all_rom_ids()
    assert len(games.rom_md5(game)) == 32


@pytest.mark.parametrize("game", (*ALL_GAMES, "Tetris"))
def test_action_sets_are_ales_minimal_sets(game):
    """Those of the table, too; they start with NOOP and fit a head."""
    actions = games.action_names(game)
    ale = ale_py.ALEInterface()
    ale.loadROM(roms.get_rom_path(games.rom_name(game)))
    assert actions == tuple(action.name for action in ale.getMinimalActionSet())
    assert actions[0] == "NOOP"
    assert len(set(actions)) == len(actions) <= games.NUM_ACTIONS


def test_action_sets_by_hand():
    assert games.action_names("Pong") == ("NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE")
    assert games.action_names("Freeway") == ("NOOP", "UP", "DOWN")
    assert games.action_names("Alien") == tuple(ale_py.Action.__members__)


def test_rom_md5_is_that_of_the_file():
    content = Path(roms.get_rom_path("space_invaders")).read_bytes()
    assert games.rom_md5("SpaceInvaders") == hashlib.md5(content).hexdigest()


def test_twenty_training_games_and_two_held_out_have_another_rom_in_the_published_data():
    assert len(games.OTHER_ROM_IN_PUBLISHED_DATA & set(games.TRAINING_GAMES)) == 20
    assert games.OTHER_ROM_IN_PUBLISHED_DATA - set(games.TRAINING_GAMES) == {"MsPacman", "SpaceInvaders"}


def test_published_sources_are_what_imports_write():
    assert games.PUBLISHED_SOURCES == (dqn_replay.SOURCE, rl_unplugged.SOURCE)


OWN, PONG = {"source": "random player"}, games.rom_md5("Pong")


@pytest.mark.parametrize(
    "game, recordings, badge",
    [
        ("Pong", [OWN | {"rom_md5": PONG}], "same"),
        ("Pong", [OWN | {"rom_md5": PONG}, OWN | {"rom_md5": "0" * 32}], "other"),
        ("Pong", [OWN | {"rom_md5": ""}], "unknown"),
        ("Pong", [OWN | {"rom_md5": PONG}, OWN | {"rom_md5": ""}], "unknown"),
        ("Pong", [{"source": "DQN-Replay", "rom_md5": ""}], "same (published data)"),
        ("Pong", [{"source": "DQN-Replay", "rom_md5": ""}, OWN | {"rom_md5": PONG}], "same (published data)"),
        ("Amidar", [{"source": "RL Unplugged", "rom_md5": ""}], "other (published data)"),
        ("Amidar", [{"source": "DQN-Replay", "rom_md5": ""}, OWN | {"rom_md5": ""}], "other (published data)"),
        ("Amidar", [{"source": "DQN-Replay", "rom_md5": games.rom_md5("Amidar")}], "same"),
        ("NoSuchGame", [OWN | {"rom_md5": PONG}], "other"),
        ("Pong", [], "unknown"),
    ],
)
def test_rom_badge(game, recordings, badge):
    assert games.rom_badge(game, recordings) == badge


@pytest.mark.parametrize(
    "misspelt, meant",
    [
        ("spaceinvader", "SpaceInvaders"),
        ("space_invaders", "SpaceInvaders"),
        ("SpaceInvadersNoFrameskip-v4", "SpaceInvaders"),
        ("ms_pacman", "MsPacman"),
        ("PONG", "Pong"),
        ("Q*bert", "Qbert"),
        ("Battlezone", "BattleZone"),
    ],
)
def test_unknown_game_suggests_the_near_name(misspelt, meant):
    for look_up in (games.rom_name, games.rom_md5, games.action_names):
        with pytest.raises(games.UnknownGame, match=rf"\b{meant}\b"):
            look_up(misspelt)


@pytest.mark.parametrize("game", ["Combat", "Joust", "MazeCraze", "Warlords"])
def test_a_game_for_two_is_refused_by_name_before_ale_ends_the_process(game):
    for look_up in (games.rom_name, games.rom_md5, games.action_names):
        with pytest.raises(games.UnknownGame, match=f"{game} needs two players"):
            look_up(game)


def test_unknown_game_unlike_any_other():
    with pytest.raises(games.UnknownGame, match="'%%%%'"):
        games.rom_name("%%%%")


@pytest.mark.parametrize("game", ALL_GAMES)
def test_every_game_has_reference_scores(game):
    random, human, dqn = (games.reference_score(game, player) for player in ("random", "human", "dqn_50m"))
    assert np.isfinite([random, human, dqn]).all()
    assert random < human
    assert metrics.human_normalized(game, random) == 0
    assert metrics.human_normalized(game, human) == 1


def test_human_normalized_by_hand():
    # Pong: random -20.7, human 14.6
    assert metrics.human_normalized("Pong", 21.0) == pytest.approx((21.0 + 20.7) / (14.6 + 20.7))


def test_game_without_reference_scores():
    with pytest.raises(games.UnknownGame, match=r"spaceinvaders.*SpaceInvaders"):
        games.reference_score("spaceinvaders", "human")
    with pytest.raises(games.UnknownGame, match="Tetris"):
        metrics.human_normalized("Tetris", 1.0)


def test_iqm_by_hand():
    assert metrics.iqm(np.array([9.0, 1.0, 2.0, 4.0, 100.0, -50.0, 3.0, 5.0])) == pytest.approx((2 + 3 + 4 + 5) / 4)
    # runs x games: the middle half of all entries together, here 3..6 of 1..8
    assert metrics.iqm(np.array([[1, 8, 3, 6], [2, 7, 4, 5]])) == 4.5


@settings(deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=40), st.randoms())
def test_iqm_ignores_order_and_extremes(scores, random):
    ordered = sorted(scores)
    quarter = len(scores) // 4
    wilder = [-1e6] * quarter + ordered[quarter : len(scores) - quarter] + [1e6] * quarter
    random.shuffle(wilder)
    assert metrics.iqm(np.array(wilder)) == pytest.approx(metrics.iqm(np.array(scores)), abs=1e-9)
