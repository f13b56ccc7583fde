"""Subsets of a dataset without copying: a few lines of YAML that select the transitions to sample."""

from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pydantic
from pydantic import Field

from scaled_ql import documents
from scaled_ql.replay.format import ReplayError

Fraction = Annotated[float, Field(gt=0, le=1)]


class View(pydantic.BaseModel):
    """A part of a dataset; the default is all of it.

    Trajectories stay whole: each belongs to the stretch of time in which it begins.
    """

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)

    games: list[str] = []  # those of the dataset to use; [] is all
    runs: list[Annotated[int, Field(ge=0)]] = []  # recordings of each game; [] is all
    first: Fraction = 1.0  # trajectories that begin in this first fraction of each recording's transitions
    between: list[Annotated[int, Field(ge=0)]] = []  # [a, b]: those that begin at its transitions a .. b - 1
    uniform: Fraction = 1.0  # of what is left, this fraction of each game's transitions, drawn uniformly
    seed: Annotated[int, Field(ge=0)] = 0  # seed of that draw

    @pydantic.model_validator(mode="after")
    def _between_is_a_range(self) -> "View":
        if self.between and (len(self.between) != 2 or self.between[0] >= self.between[1]):
            raise ValueError(f"between is [a, b] with a < b, got {self.between}")
        return self


def load_view(file: str | Path) -> View:
    """Read a view from YAML (or JSON, which is YAML).

    Raises:
        ReplayError: not readable, or not a view; the message lists all mistakes.
    """
    try:
        values = documents.load(file)
    except documents.DocumentError as error:
        raise ReplayError(str(error)) from error
    try:
        return View.model_validate({} if values is None else values)
    except pydantic.ValidationError as error:
        mistakes = "; ".join(
            f"{'.'.join(map(str, mistake['loc'])) or 'together'}: {mistake['msg']}, got {mistake['input']!r}"
            for mistake in error.errors()
        )
        fields = ", ".join(View.model_fields)
        raise ReplayError(f"{file}: not a view of a dataset ({mistakes}). It may set {fields}.") from None


class Episodes(NamedTuple):
    """A game's episodes in time order, one array per column, [episodes].

    Attributes:
        run: number of the recording in the game's list of recordings.
        entry: number of the episode in that recording's table.
        start: index t of the first transition within the view.
        length: transitions.
        row: row of the first transition in the recording's arrays.
        frames: frames from there on, one more than `length` where the state after the last action is stored.
        terminal: the episode ended in the game.
        continued: its beginning was lost.
    """

    run: np.ndarray
    entry: np.ndarray
    start: np.ndarray
    length: np.ndarray
    row: np.ndarray
    frames: np.ndarray
    terminal: np.ndarray
    continued: np.ndarray


def select_episodes(view: View, start: np.ndarray, length: np.ndarray) -> slice:
    """Select the trajectories of one recording that begin in a view's stretch of time.

    Args:
        view: part of the dataset.
        start: int64 [episodes], index of the first transition, from 0, increasing.
        length: int64 [episodes], transitions.
    """
    total = int(start[-1] + length[-1]) if len(start) else 0
    low, high = view.between or (0, total)
    high = min(high, round(view.first * total)) if view.first < 1 else high
    first, last = np.searchsorted(start, [low, high])
    return slice(int(first), int(last))


def drawn_transitions(view: View, game: str, num_transitions: int) -> np.ndarray:
    """Sorted int64 indices of the transitions that `view.uniform` keeps of a game, without replacement."""
    rng = np.random.default_rng([view.seed, *game.encode()])
    count = max(1, round(view.uniform * num_transitions))
    return np.sort(rng.choice(num_transitions, count, replace=False, shuffle=False).astype(np.int64))
