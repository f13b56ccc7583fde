"""The games: the paper's 40 for training and 5 held out, their action sets, ROMs and reference scores."""

import csv
import difflib
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

TRAINING_GAMES: tuple[str, ...] = (
    "Amidar", "Assault", "Asterix", "Atlantis", "BankHeist", "BattleZone", "BeamRider", "Boxing",
    "Breakout", "Carnival", "Centipede", "ChopperCommand", "CrazyClimber", "DemonAttack", "DoubleDunk",
    "Enduro", "FishingDerby", "Freeway", "Frostbite", "Gopher", "Gravitar", "Hero", "IceHockey",
    "Jamesbond", "Kangaroo", "Krull", "KungFuMaster", "NameThisGame", "Phoenix", "Pooyan", "Qbert",
    "Riverraid", "Robotank", "Seaquest", "TimePilot", "UpNDown", "VideoPinball", "WizardOfWor",
    "YarsRevenge", "Zaxxon",
)  # fmt: skip
HELD_OUT_GAMES: tuple[str, ...] = ("Alien", "MsPacman", "Pong", "SpaceInvaders", "StarGunner")
# New in what is to be done, not only in looks (Atari-PB, Kim et al., 2024: "far" out of distribution).
FAR_GAMES: tuple[str, ...] = ("BasicMath", "HumanCannonball", "Klax", "Othello", "Surround")

# ALE lists their ROMs, but ends the process when one player alone starts them.
NEEDS_TWO_PLAYERS: frozenset[str] = frozenset(("Combat", "Joust", "MazeCraze", "Warlords"))

# Games whose ROM in the published DQN-Replay and RL Unplugged data (atari-py up to 0.2.5) differs from ale-py's.
OTHER_ROM_IN_PUBLISHED_DATA: frozenset[str] = frozenset((
    "Amidar", "Assault", "Atlantis", "BankHeist", "BattleZone", "Carnival", "Centipede", "DemonAttack",
    "DoubleDunk", "Gopher", "Gravitar", "IceHockey", "Krull", "KungFuMaster", "MsPacman", "NameThisGame", "Pooyan",
    "Riverraid", "SpaceInvaders", "VideoPinball", "WizardOfWor", "YarsRevenge",
))  # fmt: skip
PUBLISHED_SOURCES: tuple[str, ...] = ("DQN-Replay", "RL Unplugged")  # as manifests name them

FULL_ACTIONS: tuple[str, ...] = (  # ALE's full set, in its order
    "NOOP", "FIRE", "UP", "RIGHT", "LEFT", "DOWN", "UPRIGHT", "UPLEFT", "DOWNRIGHT", "DOWNLEFT", "UPFIRE",
    "RIGHTFIRE", "LEFTFIRE", "DOWNFIRE", "UPRIGHTFIRE", "UPLEFTFIRE", "DOWNRIGHTFIRE", "DOWNLEFTFIRE",
)  # fmt: skip
NUM_ACTIONS = len(FULL_ACTIONS)  # rows of every head; a game's minimal set uses the first few

RULES: dict[str, str] = {  # of recording or play, as manifests name them; None: unknown
    "rewards": "rewards",  # "raw" or "clipped"
    "life_loss_terminal": "end of an episode at a lost life",  # bool
    "frame_skip": "frame skip",  # emulator frames per step, or [low, high), drawn at each step
    "sticky_actions": "sticky actions",  # probability
    "mode": "mode",  # ALE's number, or "default"
    "difficulty": "difficulty",  # likewise
    "action_set": "action set",  # "minimal" or "full", what the player chose from
    "observation": "observation",  # in words
    "max_steps": "step limit",  # of an episode
}


class UnknownGame(ValueError):
    """A game missing from ALE or from the table of reference scores."""


@functools.cache
def _all_roms() -> dict[str, str]:
    from ale_py import roms

    return {"".join(w.capitalize() for w in rom.split("_")): rom for rom in roms.get_all_rom_ids()}


def rom_name(game: str) -> str:
    """ALE's name of a game: ``"SpaceInvaders"`` -> ``"space_invaders"``.

    Raises:
        UnknownGame: ALE has no such game (the message suggests the nearest names), or it needs two players.
    """
    roms = _all_roms()
    if game not in roms:
        folded = {name.lower(): name for name in roms}
        key = re.sub(r"[^a-z0-9]", "", game.lower())
        near = [folded[name] for name in difflib.get_close_matches(key, folded, n=3, cutoff=0.5)]
        hint = f"Did you mean {', '.join(near)}?" if near else "Names are written as in the paper: SpaceInvaders."
        raise UnknownGame(f"ALE does not know the game {game!r}. {hint}")
    if game in NEEDS_TWO_PLAYERS:
        raise UnknownGame(f"{game} needs two players; choose a game that ALE can play with one.")
    return roms[game]


def rom_md5(game: str) -> str:
    """MD5 (hex) of the installed ROM; replays recorded with another ROM show other frames."""
    from ale_py import roms

    return hashlib.md5(Path(roms.get_rom_path(rom_name(game))).read_bytes()).hexdigest()


def rom_badge(game: str, manifests: Iterable[Mapping[str, str]]) -> str:
    """Whether a game was recorded with the installed ROM.

    Args:
        game: name of the game.
        manifests: manifests of its recordings; reads `rom_md5` ("" if unknown) and `source`.

    Returns:
        ``"same"`` or ``"other"`` by MD5; for published logs, which do not record their ROM, ``"same (published data)"``
        or ``"other (published data)"`` by `OTHER_ROM_IN_PUBLISHED_DATA`; otherwise ``"unknown"``. Among several
        recordings the most doubtful badge counts.
    """
    published = "other (published data)" if game in OTHER_ROM_IN_PUBLISHED_DATA else "same (published data)"
    badges = set()
    for manifest in manifests:
        if manifest["rom_md5"]:
            installed = rom_md5(game) if game in _all_roms() else ""
            badges.add("same" if manifest["rom_md5"] == installed else "other")
        else:
            badges.add(published if manifest["source"] in PUBLISHED_SOURCES else "unknown")
    order = ("other", "other (published data)", "unknown", "same (published data)", "same")
    return next((badge for badge in order if badge in badges), "unknown")


@functools.cache
def action_names(game: str) -> tuple[str, ...]:
    """The minimal action set, in ALE's order: an action is an index into this tuple everywhere.

    The paper's games are in a table: ALE answers only after it has loaded a ROM, a twelfth of a second for each game.
    """
    known = _minimal_actions()
    return known[game] if game in known else tuple(action.name for action in _loaded(game).getMinimalActionSet())


@functools.cache
def _minimal_actions() -> dict[str, tuple[str, ...]]:
    return {row["game"]: tuple(row["actions"].split()) for row in _table("minimal_actions")}


def _loaded(game: str) -> Any:
    """ALE with a game's ROM."""
    import ale_py
    from ale_py import roms

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ale = ale_py.ALEInterface()
    ale.loadROM(roms.get_rom_path(rom_name(game)))
    return ale


def _table(name: str) -> Iterator[dict[str, str]]:
    """Rows of one of this package's tables."""
    table = resources.files("scaled_ql") / "data" / f"{name}.csv"
    return csv.DictReader(table.read_text(encoding="utf-8").splitlines())


def full_actions(names: Sequence[str]) -> np.ndarray:
    """Where actions stand in the full joystick: int32 [actions], indices into `FULL_ACTIONS`, by their names.

    Raises:
        OtherActions: a name that no joystick has.
    """
    unknown = [name for name in names if name not in FULL_ACTIONS]
    if unknown:
        raise OtherActions(
            f"the joystick has no action {', '.join(unknown)}; its actions are {', '.join(FULL_ACTIONS)}. Methods that "
            "see all games' actions in one list need ALE's names: record or import the data with them."
        )
    return np.array([FULL_ACTIONS.index(name) for name in names], np.int32)


class OtherActions(ValueError):
    """A recording whose actions index another list than the game's minimal set."""


def check_actions(game: str, actions: Sequence[str]) -> None:
    """Check a recording's action names against the game's; games that ALE lacks are not checked.

    Raises:
        OtherActions: they differ.
    """
    if game in _all_roms() and tuple(actions) != action_names(game):
        names = action_names(game)
        raise OtherActions(
            f"its {len(actions)} actions are {', '.join(actions)}, but {game} has {len(names)}: {', '.join(names)}. A "
            "stored action is an index into that list, so in the game it would mean another one. Record it again with "
            'the game\'s list, or import it again (if its actions index the full set of 18, with actions="full" or, '
            "on the command line, --actions full)."
        )


class UnknownVariant(ValueError):
    """A mode or difficulty that a game's ROM does not offer."""


@functools.cache
def _variants(game: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    ale = _loaded(game)
    return tuple(ale.getAvailableModes()), tuple(ale.getAvailableDifficulties())


def check_variant(game: str, mode: int | None, difficulty: int | None) -> None:
    """Check that a game offers a mode and a difficulty; None, the default, always exists.

    Raises:
        UnknownVariant: it does not; the message lists what the ROM offers.
    """
    modes, difficulties = _variants(game)
    if mode not in (None, *modes) or difficulty not in (None, *difficulties):
        asked = " and ".join(
            f"{name} {value}"
            for name, value, offered in (("mode", mode, modes), ("difficulty", difficulty, difficulties))
            if value not in (None, *offered)
        )
        raise UnknownVariant(
            f"{game} has no {asked}. Its modes are {', '.join(map(str, modes))}; its difficulties "
            f"{', '.join(map(str, difficulties))}."
        )


@functools.cache
def _reference_scores() -> dict[str, dict[str, str]]:
    return {row["game"]: row for row in _table("reference_scores")}


def reference_score(game: str, player: str) -> float:
    """Mean raw episode return of a reference player.

    Args:
        game: a training or held-out game.
        player: ``"random"``, ``"human"`` or ``"dqn_50m"`` (DQN after 50M frames).

    Source: the paper's Tables C.1/C.2 (human, training games); DQN Zoo's table (human of the held-out games, random);
    Atari-PB and JOWA (random of Carnival and Pooyan); Atari-PB (dqn_50m).

    Raises:
        UnknownGame: the game has no reference scores.
    """
    scores = _reference_scores()
    if game not in scores:
        near = difflib.get_close_matches(game, scores, n=3, cutoff=0.5)
        hint = f"Did you mean {', '.join(near)}?" if near else f"There are scores for {len(scores)} games."
        raise UnknownGame(f"no reference scores for the game {game!r}. {hint}")
    return float(scores[game][player])
