"""One episode under the loupe: played in the emulator by whoever chooses the actions, or read from a recording."""

from collections.abc import Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from scaled_ql.environments import MAX_STEPS, STACK_SIZE, make_vector_environment
from scaled_ql.evaluation import History, MemoryPlayer, QFunction
from scaled_ql.games import action_names, full_actions
from scaled_ql.replay import Replay
from scaled_ql.replay.sequences import Sequences
from scaled_ql.trained_agent import Agent, Look, Seen

WATCHED = 1_024  # steps whose stacks, or windows of four steps, are in memory together, 29 MB


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
        seed: of what a player with a memory draws at each step, see `History`; 0 where none played.
    """

    game: str
    title: str
    frames: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    by: Sequence[str]
    ending: str
    seed: int = 0

    def stacks(self, steps: np.ndarray | slice = np.s_[:], size: int = STACK_SIZE) -> np.ndarray:
        """Observations at steps, uint8 [N, size, 84, 84], oldest frame first, black before the episode."""
        steps = np.arange(len(self.frames))[steps]
        black = np.zeros((size - 1, *self.frames.shape[1:]), np.uint8)
        padded = np.concatenate([black, self.frames])
        return padded[steps[:, None] + np.arange(size)]

    def windows(self, steps: np.ndarray | slice, length: int) -> tuple[Sequences, np.ndarray]:
        """What a player with a memory of so many steps sees at steps, as `History.see` gives it in play."""
        steps = np.arange(len(self.frames))[steps]
        time = steps[:, None] + np.arange(1 - length, 1)
        mask, known, at = time >= 0, (time >= 0) & (time < steps[:, None]), np.maximum(time, 0)
        reward = self.rewards.clip(-1, 1)
        collected = np.cumsum(np.append(np.float32(0), reward))  # before each step
        full = full_actions(action_names(self.game))
        windows = Sequences(
            frames=self.stacks(steps, length),
            action=np.where(known, full[self.actions[at]], 0).astype(np.int32),
            reward=np.where(known, reward[at], np.float32(0)),
            return_to_go=np.where(mask, -collected[at], np.float32(0)),
            terminal=np.zeros(time.shape, bool),
            mask=mask,
            game=np.zeros(len(steps), np.int32),
        )
        return windows, np.stack([np.full(len(steps), self.seed % 2**31), 0 * steps, steps], 1).astype(np.int32)


class Emulation:
    """An episode in progress: one agent step at a time, by any player. Close it in the end.

    Attributes:
        game: name as in the paper.
        stack: uint8 [4, 84, 84], the observation now.
        seen: what its player sees now, with the history if there is one.
        over: how the episode ended, in words; "" while it goes on.
    """

    def __init__(
        self,
        game: str,
        seed: int,
        *,
        history: History | None = None,
        sticky_actions: float = 0.0,
        max_steps: int = MAX_STEPS,
        mode: int | None = None,
        difficulty: int | None = None,
    ):
        """Start an emulator.

        Args:
            game: name as in the paper.
            seed: seed of the emulator.
            history: a new one, of a player with a memory.
            sticky_actions, max_steps, mode, difficulty: as of `make_vector_environment`.
        """
        rules = {"sticky_actions": sticky_actions, "max_steps": max_steps, "mode": mode, "difficulty": difficulty}
        self.game, self.over = game, ""
        self._environment = make_vector_environment(game, 1, num_threads=1, **rules)
        stacks, _ = self._environment.reset(seed=seed)
        self._frames: list[np.ndarray] = []
        self._steps: list[tuple[int, float, str]] = []
        self._history = history
        self._see(stacks)

    def __len__(self) -> int:
        return len(self._steps)

    def _see(self, stacks: np.ndarray) -> None:
        self.stack, begins = stacks[0], np.array([not self._steps])
        self.seen: Seen = self._history.see(stacks[:, -1], begins) if self._history else (stacks,)

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
        if self._history:
            self._history.act(np.array([action]), reward)
        self._see(stacks)
        self.over = "the game ended" if terminated[0] else "the step limit ended it" if truncated[0] else ""
        return float(reward[0])

    def episode(self, title: str, seed: int = 0) -> Episode:
        """The steps so far; for title and seed see `Episode`."""
        actions, rewards, by = zip(*self._steps) if self._steps else ((), (), ())
        frames = np.array(self._frames, np.uint8).reshape(-1, *self.stack.shape[1:])
        ending = self.over or "the rest was not played"
        numbers = np.array(actions, int), np.array(rewards, np.float32)
        return Episode(self.game, title, frames, *numbers, by, ending, seed)

    def close(self) -> None:
        """End the emulator."""
        self._environment.close()


class Chance:
    """The random choices of an episode, drawn as `evaluation.evaluate` draws them with one environment.

    Attributes:
        emulator_seed: seed of the emulator.
    """

    def __init__(self, seed: int, epsilon: float, num_actions: int, temperature: float = 0.0):
        """Begin an episode; for epsilon and temperature see `evaluation.evaluate`."""
        self._rng, self._epsilon, self._num_actions = np.random.default_rng(seed), epsilon, num_actions
        self._temperature, self.emulator_seed = temperature, int(self._rng.integers(2**30))

    def choose(self, values: np.ndarray) -> tuple[int, str]:
        """From the values of the actions, [A], the one to take, and who chose it: ``chance`` or ``agent``."""
        if self._temperature > 0:
            values = values / self._temperature + self._rng.gumbel(size=values.shape)
        by_chance, random = self._rng.random() < self._epsilon, int(self._rng.integers(self._num_actions))
        return (random, "chance") if by_chance else (int(values.argmax()), "agent")


def begin(
    player: QFunction | MemoryPlayer,
    game: str,
    seed: int,
    *,
    epsilon: float = 0.0,
    temperature: float = 0.0,
    **rules: Any,
) -> tuple[Emulation, Chance]:
    """An episode before its first step, and the random choices of its player.

    Args:
        player: uint8 [1, 4, 84, 84] -> [1, actions]; or one with a memory.
        game: name as in the paper.
        seed: seed of the player's random choices and of the emulator.
        epsilon, temperature: see `evaluation.evaluate`.
        rules: as of `Emulation`.
    """
    chance = Chance(seed, epsilon, len(action_names(game)), temperature)
    history = History(player, np.zeros(1, int), seed) if isinstance(player, MemoryPlayer) else None
    return Emulation(game, chance.emulator_seed, history=history, **rules), chance


def play(player: QFunction | MemoryPlayer, game: str, *, seed: int, title: str = "agent", **protocol: Any) -> Episode:
    """Play one episode: the one that `evaluation.evaluate` plays with this seed and one environment.

    Args:
        player, game, seed, protocol: as of `begin`.
        title: see `Episode`.
    """
    emulation, chance = begin(player, game, seed, **protocol)
    with closing(emulation):
        while not emulation.over:
            emulation.step(*chance.choose(player(*emulation.seen)[0]))
    return emulation.episode(f"{title}, seed {seed}", seed)


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


def seen(agent: Agent, episode: Episode, steps: np.ndarray | slice = np.s_[:]) -> Seen:
    """What an agent sees at steps of an episode, for `Agent.look`: a transformer what others did before, too."""
    return episode.windows(steps, agent.memory) if agent.memory else (episode.stacks(steps),)


def watch(agent: Agent, episode: Episode) -> Look:
    """What an agent makes of every state of an episode, whoever played it."""
    starts = range(0, len(episode.actions), WATCHED)
    looks = [agent.look(episode.game, *seen(agent, episode, np.s_[first : first + WATCHED])) for first in starts]
    return Look(*(None if column[0] is None else np.concatenate(column) for column in zip(*looks)))


def telling_moments(episode: Episode, look: Look) -> dict[str, int]:
    """A few steps that show an agent at work, by what they are, in the order of the episode.

    Returns:
        the step before the first reward, and those where the greedy action's return distribution, or a transformer's
        policy (without distributions: the lead over the second action), is widest and narrowest.
    """
    doubt = look.entropy
    if doubt is None:
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
    costs, which does not depend on the scale of either's values. A policy's costs are differences of probabilities.

    Args:
        episode: whose states they are.
        first, second: from `watch`.
        apart: of cases less than so many steps apart, only the clearest is listed.

    Returns:
        columns step, first, second (names of their actions), first_cost, second_cost: by the agent's own `Look.shown`,
        of its best action less that of the other's best action.
    """
    names, steps = np.array(action_names(episode.game)), np.flatnonzero(first.best != second.best)

    def cost(own: Look, other: Look) -> np.ndarray:
        return own.shown[steps, own.best[steps]] - own.shown[steps, other.best[steps]]

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
