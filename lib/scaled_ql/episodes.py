"""One episode under the loupe: played in the emulator by whoever chooses the actions, or read from a recording."""

from collections.abc import Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from scaled_ql.environments import MAX_STEPS, STACK_SIZE, make_vector_environment
from scaled_ql.evaluation import QFunction
from scaled_ql.games import action_names
from scaled_ql.replay import Replay
from scaled_ql.trained_agent import Agent, Look

WATCHED = 1_024  # steps whose stacks are in memory together, 29 MB


class Episode(NamedTuple):
    """The first T steps of an episode.

    Attributes:
        game: name as in the paper.
        title: whose episode it is, in words.
        frames: uint8 [T, 84, 84], each seen before the action of its step.
        actions: int [T], in the game's minimal set.
        rewards: float32 [T], raw.
        by: who chose each action: ``agent``, ``chance`` (a random move), ``you`` or ``data``.
        ending: how it goes on after the last step, in words.
    """

    game: str
    title: str
    frames: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    by: Sequence[str]
    ending: str

    def stacks(self, steps: np.ndarray | slice = np.s_[:]) -> np.ndarray:
        """Observations at steps, uint8 [N, 4, 84, 84], oldest frame first, black before the episode."""
        steps = np.arange(len(self.frames))[steps]
        black = np.zeros((STACK_SIZE - 1, *self.frames.shape[1:]), np.uint8)
        padded = np.concatenate([black, self.frames])
        return padded[steps[:, None] + np.arange(STACK_SIZE)]


class Emulation:
    """An episode in progress: one agent step at a time, by any player. Close it in the end.

    Attributes:
        game: name as in the paper.
        stack: uint8 [4, 84, 84], the observation now.
        over: how the episode ended, in words; "" while it goes on.
    """

    def __init__(
        self,
        game: str,
        seed: int,
        *,
        sticky_actions: float = 0.0,
        max_steps: int = MAX_STEPS,
        mode: int | None = None,
        difficulty: int | None = None,
    ):
        """Start an emulator; arguments as of `make_vector_environment`, `seed` is the emulator's."""
        rules = {"sticky_actions": sticky_actions, "max_steps": max_steps, "mode": mode, "difficulty": difficulty}
        self.game, self.over = game, ""
        self._environment = make_vector_environment(game, 1, num_threads=1, **rules)
        stacks, _ = self._environment.reset(seed=seed)
        self.stack = stacks[0]
        self._frames: list[np.ndarray] = []
        self._steps: list[tuple[int, float, str]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def step(self, action: int, by: str) -> float:
        """Take an action; returns its raw reward.

        Raises:
            ValueError: the episode is over.
            UnknownAction: it is outside the game's set.
        """
        if self.over:
            raise ValueError(f"{self.game}: this episode is over ({self.over}) after {len(self)} steps. Start another.")
        frame = self.stack[-1].copy()
        stacks, reward, terminated, truncated, _ = self._environment.step(np.array([action]))
        self._frames.append(frame)
        self._steps.append((int(action), float(reward[0]), by))
        self.stack = stacks[0]
        self.over = "the game ended" if terminated[0] else "the step limit ended it" if truncated[0] else ""
        return float(reward[0])

    def episode(self, title: str) -> Episode:
        """The steps so far."""
        actions, rewards, by = zip(*self._steps) if self._steps else ((), (), ())
        frames = np.array(self._frames, np.uint8).reshape(-1, *self.stack.shape[1:])
        ending = self.over or "the rest was not played"
        return Episode(self.game, title, frames, np.array(actions, int), np.array(rewards, np.float32), by, ending)

    def close(self) -> None:
        """End the emulator."""
        self._environment.close()


class Chance:
    """The random choices of an episode, drawn as `evaluation.evaluate` draws them with one environment.

    Attributes:
        emulator_seed: seed of the emulator.
    """

    def __init__(self, seed: int, epsilon: float, num_actions: int):
        self._rng, self._epsilon, self._num_actions = np.random.default_rng(seed), epsilon, num_actions
        self.emulator_seed = int(self._rng.integers(2**30))

    def choose(self, greedy: int) -> tuple[int, str]:
        """The action to take, and who chose it: ``chance`` or ``agent``."""
        by_chance, random = self._rng.random() < self._epsilon, int(self._rng.integers(self._num_actions))
        return (random, "chance") if by_chance else (greedy, "agent")


def play(
    q_function: QFunction, game: str, *, seed: int, epsilon: float = 0.0, title: str = "agent", **rules: Any
) -> Episode:
    """Play one episode epsilon-greedily: the one that `evaluation.evaluate` plays with this seed and one environment.

    Args:
        q_function: uint8 [1, 4, 84, 84] -> [1, actions].
        game: name as in the paper.
        seed: seed of the random moves and of the emulator.
        epsilon: probability of a random move.
        title: see `Episode`.
        rules: as of `Emulation`.
    """
    chance = Chance(seed, epsilon, len(action_names(game)))
    with closing(Emulation(game, chance.emulator_seed, **rules)) as emulation:
        while not emulation.over:
            emulation.step(*chance.choose(int(q_function(emulation.stack[None])[0].argmax())))
    return emulation.episode(f"{title}, seed {seed}")


def recorded(replay: Replay, game: str, number: int, max_steps: int = MAX_STEPS) -> Episode:
    """An episode of a recording, its first `max_steps` steps.

    Args:
        replay: an open store.
        game: one of its games.
        number: row of its episode table.
        max_steps: steps to read.
    """
    row, read = replay.episodes(game).iloc[number], replay.episode(game, number)
    actions, rewards = read["action"][:max_steps].astype(int), read["reward"][:max_steps]
    lost = ", beginning lost" if row["continued"] else ""
    ending = "the game ended" if row["terminal"] else "it was truncated"
    if row["length"] > max_steps:
        ending = f"{row['length'] - max_steps:,} more steps are not shown"
    title = f"recording, run {row['run']}, episode {number}{lost}"
    return Episode(game, title, read["observation"][: len(actions)], actions, rewards, ["data"] * len(actions), ending)


def watch(agent: Agent, episode: Episode) -> Look:
    """What an agent makes of every state of an episode, whoever played it."""
    starts = range(0, len(episode.actions), WATCHED)
    looks = [agent.look(episode.game, episode.stacks(np.s_[first : first + WATCHED])) for first in starts]
    return Look(*(None if column[0] is None else np.concatenate(column) for column in zip(*looks)))


def telling_moments(episode: Episode, look: Look) -> dict[str, int]:
    """A few steps that show an agent at work, by what they are, in the order of the episode.

    Returns:
        the step before the first reward, and those where the greedy action's return distribution (without
        distributions: its lead over the second) is widest and narrowest.
    """
    best = look.best
    if look.entropy is not None:
        doubt = look.entropy[np.arange(len(best)), best]
    else:
        ranked = np.sort(look.values, axis=1)
        doubt = ranked[:, -2] - ranked[:, -1]
    rewarded = np.flatnonzero(episode.rewards)
    moments = {"most certain": int(doubt.argmin()), "least certain": int(doubt.argmax())}
    if len(rewarded):
        moments["before the first reward"] = int(rewarded[0])
    return dict(sorted(moments.items(), key=lambda item: item[1]))


def disagreements(episode: Episode, first: Look, second: Look, apart: int = 8) -> pd.DataFrame:
    """Where two agents would act differently on the same states, the clearest case first.

    A case is clear if each agent thinks that the other's action costs much: cases are ordered by the product of the two
    costs, which does not depend on the scale of either's values.

    Args:
        episode: whose states they are.
        first, second: from `watch`.
        apart: of cases less than so many steps apart, only the clearest is listed.

    Returns:
        columns step, first, second (names of their actions), first_cost, second_cost: by the agent's own values, of its
        best action less that of the other's best action.
    """
    names, steps = np.array(action_names(episode.game)), np.flatnonzero(first.best != second.best)

    def cost(own: Look, other: Look) -> np.ndarray:
        return own.values[steps, own.best[steps]] - own.values[steps, other.best[steps]]

    table = pd.DataFrame(
        {
            "step": steps,
            "first": names[first.best[steps]],
            "second": names[second.best[steps]],
            "first_cost": cost(first, second),
            "second_cost": cost(second, first),
        }
    )
    table = table.iloc[np.argsort(-(table["first_cost"] * table["second_cost"]), kind="stable")]
    kept: list[int] = []
    for step in table["step"]:
        if all(abs(step - other) >= apart for other in kept):
            kept.append(step)
    return table[table["step"].isin(kept)].reset_index(drop=True)
