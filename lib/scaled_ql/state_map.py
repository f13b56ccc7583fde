"""A map of states: an agent's features of a recording's states, in two dimensions."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from scaled_ql.environments import STACK_SIZE
from scaled_ql.replay import Replay
from scaled_ql.replay.returns import label_with_returns, returns_to_go
from scaled_ql.replay.sequences import gather_sequences
from scaled_ql.trained_agent import Agent, Seen


class StateMap(NamedTuple):
    """N states of a recording.

    Attributes:
        table: a row per state: game, time (index of its transition), x, y (place on the map), value (what the agent
            expects, `Agent.expectation`), return (sum of the clipped rewards that followed in the recording, discounted
            as the agent's values are). A decision transformer predicts the return from its window's first step on, so
            both are from there.
        explained: float64 [2], share of the features' variance along x and along y.
        stacks: uint8 [N, 4, 84, 84].
    """

    table: pd.DataFrame
    explained: np.ndarray
    stacks: np.ndarray


def principal_components(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first two principal components, from [N, F], N and F at least 2.

    Returns:
        places float64 [N, 2], and the share of the variance along each. Of each axis the feature with the largest
        weight has a positive one, so that the map does not flip.
    """
    centred = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    _, scale, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    axes *= np.sign(axes[np.arange(2), np.abs(axes).argmax(1)])[:, None]
    return centred @ axes.T, np.square(scale[:2]) / max(np.square(scale).sum(), 1e-300)


def map_states(agent: Agent, data: Replay, number: int, seed: int) -> StateMap:
    """Draw states uniformly from each game that agent and recording share, and map them together.

    Args:
        agent: from `load_agent`.
        data: an open store.
        number: states in all, shared equally by the games.
        seed: seed of the draw.

    Raises:
        ValueError: they share no game.
    """
    games = [game for game in agent.games if game in data.games]
    if not games:
        raise ValueError(f"{data.path} has {', '.join(data.games)}; {agent.name} plays {', '.join(agent.games)}.")
    rng, tables, stacks, features = np.random.default_rng(seed), [], [], []
    for game in games:
        past = max(agent.memory, STACK_SIZE)
        time = np.sort(data.draw(game, rng.random(max(2, number // len(games))), n_step=1, stack_size=past))
        stacks.append(np.moveaxis(data.batch(game, time, n_step=1).observation, -1, 1))
        seen = _windows(data, game, time, agent.memory) if agent.memory else (stacks[-1],)
        look = agent.look(game, *seen)
        features.append(look.features)
        since = time  # steps from which on the returns are predicted
        if look.asked is not None:  # of a window the first, but not before its episode
            since = time - np.minimum(seen[1][:, 2], agent.memory - 1)
        known = {"value": agent.expectation(look)[1], "return": returns_to_go(data, game, agent.discount)[since]}
        tables.append(pd.DataFrame({"game": game, "time": time} | known))
    places, explained = principal_components(np.concatenate(features))
    table = pd.concat(tables, ignore_index=True).assign(x=places[:, 0], y=places[:, 1])
    return StateMap(table, explained, np.concatenate(stacks))


def _windows(data: Replay, game: str, time: np.ndarray, length: int) -> Seen:
    """What a transformer would see at transitions, int [N], of a recording, as `Episode.windows` of their episodes."""
    games, draw = np.full(len(time), data.games.index(game), np.int32), np.zeros((len(time), 3), np.int32)
    windows = gather_sequences(data, games, time, length)._replace(game=0 * games)
    to_go = returns_to_go(data, game, 1.0)
    ends = data.episodes(game)["length"].to_numpy().cumsum()
    first = np.append(0, ends)[np.searchsorted(ends, time, side="right")]
    still = label_with_returns(windows, time, [to_go]).return_to_go
    draw[:, 2] = time - first
    return windows._replace(return_to_go=still - to_go[first, None]), draw  # less what the whole episode gives


def far_apart(places: np.ndarray, number: int) -> list[int]:
    """Rows of places [N, 2] that cover a map: the nearest to its middle, then each the farthest from those before."""
    distance = np.linalg.norm(places - places.mean(0), axis=1)
    rows = [int(distance.argmin())]
    while len(rows) < min(number, len(places)):
        nearest = np.linalg.norm(places[:, None] - places[rows], axis=-1).min(1)
        rows.append(int(nearest.argmax()))
    return rows
