"""The loop of acting, learning and logging, in which environments step while the learner works."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import psutil

from scaled_ql.devices import OutOfMemory
from scaled_ql.environments import MAX_STEPS, VectorEnvironment, make_vector_environment, rules
from scaled_ql.games import action_names, check_variant, rom_md5
from scaled_ql.online.agents import Learner
from scaled_ql.online.log import EpisodeLog, EpisodeMirror, logged_episodes
from scaled_ql.online.ring import Ring, ring_bytes, sample_rings
from scaled_ql.replay.batch import Batch
from scaled_ql.replay.store import open_replay
from scaled_ql.replay.writer import ReplayWriter
from scaled_ql.training import Checkpoints, Diverged, TrainState

THREAD_BYTES, PROCESS_BYTES = 4_000_000, 130_000_000  # measured per environment, as a thread and as a process
# Arguments of `play` with the names of the notebook's parameters.
PLAYING = (
    "num_transitions", "seed", "environments", "num_threads", "sticky_actions", "max_steps", "capacity", "compressed",
    "batch_size", "n_step", "discount", "min_history", "update_period", "final_epsilon", "epsilon_decay",
    "checkpoint_every",
)  # fmt: skip


def exploration_rate(step: int, min_history: int, decay: int, final: float) -> float:
    """Probability of a random action after `step` transitions: 1 before learning begins, then linearly to final."""
    return final + (1.0 - final) * min(max(1.0 - (step - min_history) / decay, 0.0), 1.0)


def memory_bytes(
    num_games: int, environments: int, capacity: int, max_steps: int, compressed: bool, variant: bool
) -> int:
    """Bytes of memory that rings and environments take."""
    rings = ring_bytes(environments, capacity, max_steps, compressed)
    machines = environments * (PROCESS_BYTES if variant else THREAD_BYTES)
    return num_games * (rings + machines)


def check_memory(*arguments: Any) -> int:
    """Return `memory_bytes`, after checking that it is free.

    Raises:
        OutOfMemory: less is free.
    """
    needed, free = memory_bytes(*arguments), psutil.virtual_memory().available
    if needed > free:
        num_games, environments, capacity, max_steps, compressed, variant = arguments
        smallest = memory_bytes(num_games, 1, 1, max_steps, True, variant)
        raise OutOfMemory(
            f"{num_games} games x {environments} environments with a replay of {capacity:,} transitions each, "
            f"{'compressed' if compressed else 'uncompressed'}, take {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are "
            f"free. An environment keeps at least an episode of {max_steps:,} steps. Use fewer environments or games, "
            f"a smaller replay{'' if compressed else ' or a compressed one'}, or a lower step limit (minimum, "
            f"with one environment a game and hardly any replay: {smallest / 1e9:.1f} GB)."
        )
    return needed


class _Game:
    """One game being played: its environments, in parts that step in turn, and its ring.

    Attributes:
        steps: transitions played so far, those under way included.
        stacks: of each part uint8 [E', 4, 84, 84], its environments' observations.
    """

    def __init__(self, parts: list[VectorEnvironment], ring: Ring, steps: int, seed: list[int]):
        self._parts, self.ring, self.steps = parts, ring, steps
        first = int(np.random.default_rng(seed).integers(2**30))
        places = np.cumsum([0] + [part.num_envs for part in parts[:-1]]).tolist()
        self.stacks = [part.reset(seed=first + place)[0] for part, place in zip(parts, places)]
        ring.begin(self._frames())
        self._resetting = [np.zeros(part.num_envs, bool) for part in parts]
        self._sent: list[np.ndarray | None] = [None] * len(parts)
        self._new: list[tuple] = [()] * len(parts)

    def _frames(self) -> np.ndarray:
        return np.concatenate([stacks[:, -1] for stacks in self.stacks])

    def send(self, part: int, actions: np.ndarray) -> None:
        """Begin a step of a part."""
        self.steps += int((~self._resetting[part]).sum())
        self._sent[part] = actions
        self._parts[part].send(actions)

    def receive(self, part: int) -> None:
        """Wait for its end."""
        if self._sent[part] is None:
            return
        self.stacks[part], reward, terminated, truncated, _ = self._parts[part].recv()
        self._resetting[part] = (terminated | truncated) & ~self._resetting[part]
        self._new[part] = self._sent[part], reward, terminated, truncated

    def remember(self) -> list[dict[str, Any]]:
        """Put the step that all parts received last into the ring; returns the episodes that it ended."""
        ended = self.ring.add(self._frames(), *map(np.concatenate, zip(*self._new)))
        return [self.ring.episode(number) for number in ended.tolist()]


class _Choice(NamedTuple):
    """How a step's actions were chosen: the share of random ones, [G], and the updates behind the parameters."""

    epsilon: np.ndarray
    learner_step: int


class _Learning:
    """A learner at work: its state, the updates that are due, its checkpoints."""

    def __init__(self, learner: Learner, checkpoints: Checkpoints, games: list[str]):
        self._learner, self._checkpoints, self._games = learner, checkpoints, games
        self.state = checkpoints.restore(learner.state)
        self.updates = self._saved = int(self.state.step)
        self.losses = np.full(len(games), np.nan)  # from the last check
        self._unchecked: tuple | None = None

    def due(self, steps: np.ndarray, min_history: int, update_period: int) -> int:
        """Updates that should have been made after the given transitions, [G], of each game."""
        history = steps - min_history
        enough = history.sum() if self._learner.shared else history.min()
        return int(max(enough, 0)) // update_period

    def update(self, batch: Batch) -> None:
        """One step; it may still be under way on the accelerator when this returns."""
        self.state, metrics = self._learner.update(self.state, batch)
        self.updates += 1
        self._unchecked = metrics["loss"], metrics["grad_norm"]

    def check(self) -> None:
        """Wait for the last update and look at its losses.

        Raises:
            Diverged: a non-finite loss or gradient norm.
        """
        if self._unchecked is None:
            return
        loss, grad_norm = (np.atleast_1d(value) for value in jax.device_get(self._unchecked))
        bad = ~(np.isfinite(loss) & np.isfinite(grad_norm))
        if bad.any():
            one_each = len(bad) == len(self._games)
            names = ", ".join(np.array(self._games)[bad]) if one_each else "the network of all games"
            raise Diverged(
                f"the loss of {names} is {loss[bad].tolist()} at update {self.updates} (norm of the gradient "
                f"{grad_norm[bad].tolist()}). All episodes that ended before are logged. "
                f"{self._checkpoints.describe_latest()} Lower learning_rate and start again under another run name."
            )
        self.losses[:] = loss

    def save(self, every: int = 1) -> None:
        """Check, and write a checkpoint, if the number of updates passed a multiple of `every` since the last one."""
        if self.updates // every > self._saved // every:
            self.check()
            self._checkpoints.save(self.state)
            self._saved = self.updates


class _Meter:
    """Decides when a report is due, and measures rates since the last one."""

    def __init__(self, period: float, *counts: int):
        self._period, self._counts, self._began = period, counts, time.perf_counter()

    def is_due(self) -> bool:
        """Whether the period since the last report is over."""
        return time.perf_counter() - self._began > self._period

    def rates(self, *counts: int) -> list[float]:
        """Counts per second since the last call."""
        now = time.perf_counter()
        rates = [(new - old) / (now - self._began) for new, old in zip(counts, self._counts)]
        self._counts, self._began = counts, now
        return rates


def play(
    path: str | Path,
    games: list[str],
    learner: Learner,
    checkpoints: Checkpoints,
    *,
    num_transitions: int,
    seed: int,
    source: str,
    run: int = 1,
    environments: int = 32,
    num_threads: int = 0,
    sticky_actions: float = 0.25,
    max_steps: int = MAX_STEPS,
    mode: int | None = None,
    difficulty: int | None = None,
    make: Callable[..., VectorEnvironment] = make_vector_environment,
    capacity: int = 1_000_000,
    compressed: bool = False,
    batch_size: int = 32,
    n_step: int = 1,
    discount: float = 0.99,
    min_history: int = 20_000,
    update_period: int = 4,
    final_epsilon: float = 0.01,
    epsilon_decay: int = 250_000,
    checkpoint_every: int = 10_000,
    report_seconds: float = 2.0,
    tensorboard: Path | None = None,
) -> Iterator[tuple[TrainState, dict[str, Any]]]:
    """Act, learn and log until the store holds at least `num_transitions` of every game.

    All games advance together. Environments step on separate threads while the learner works, on the parameters of
    one step ago, and half of each game's while the network chooses for the other half. Episodes are logged whole, in
    the order in which they end, with raw rewards; unfinished ones at the end are not. A stopped run, even a killed one,
    resumes from the logged episodes (which also refill the replay), the last checkpoint, and the updates due since.
    They are written once a second: a killed run lacks those that waited.

    Args:
        path: the dataset's folder.
        games: names of the games.
        learner: agents of these games.
        checkpoints: this run's checkpoints.
        num_transitions: transitions to log of each game.
        seed: seed of everything random.
        source: description of the player, for the manifest. A recording is continued only if its manifest has the same.
        run: number of the recording.
        environments: environments per game.
        num_threads: threads per game for each half of its environments; 0: one per core that the process may use.
        sticky_actions, max_steps, mode, difficulty: see `make_vector_environment`.
        make: factory of environments; others than ALE's need the name and action set of a game that ALE has.
        capacity: transitions per game in the replay: 7.1 GB a million, compressed at most 0.5 GB.
        compressed: keep these frames compressed; sampling takes longer (`scaled-ql benchmark online`).
        batch_size: transitions of an update, per game; for a shared learner, over all games.
        n_step: steps summed before bootstrapping.
        discount: discount per step.
        min_history: transitions per game before learning begins.
        update_period: transitions between updates, per game; for a shared learner, over all games.
        final_epsilon: final share of random actions.
        epsilon_decay: transitions of a game over which that share falls from 1.
        checkpoint_every: updates between checkpoints.
        report_seconds: seconds between reports.
        tensorboard: folder for `EpisodeMirror`; None: there is none.

    Yields:
        (state, report) every `report_seconds` and at the end. A report has `logged`, `played` and `epsilon` by game,
        `updates`, `loss` by game (a shared learner's is the same for all), `steps_per_second`, `updates_per_second`.

    Raises:
        UnknownGame, UnknownVariant, OutOfMemory, ModuleNotFoundError: before anything is played.
        ReplayError: another recording is there, or an episode could not be written.
        EnvironmentDied: an environment ended.
        Diverged: a non-finite loss. Episodes logged before are intact.
    """
    num_actions = np.array([len(action_names(game)) for game in games])
    for game in games:
        check_variant(game, mode, difficulty)
    check_memory(len(games), environments, capacity, max_steps, compressed, mode is not None or difficulty is not None)
    options = {"sticky_actions": sticky_actions, "max_steps": max_steps, "mode": mode, "difficulty": difficulty}
    sampling = {"shared": learner.shared, "n_step": n_step, "discount": discount}
    learning = _Learning(learner, checkpoints, games)
    with ExitStack() as stack:
        stack.callback(checkpoints.wait)
        pool = stack.enter_context(ThreadPoolExecutor(thread_name_prefix="sample"))
        split = partial(np.array_split, indices_or_sections=min(2, environments), axis=-1)
        mirror = stack.enter_context(closing(EpisodeMirror(tensorboard))) if tensorboard else None
        writers, players = {}, {}
        for number, game in enumerate(games):
            about = {"actions": action_names(game), "source": source, "rom_md5": rom_md5(game)} | rules(**options)
            writers[game] = writer = stack.enter_context(ReplayWriter(path, game, run, **about))
            ring = Ring(environments, capacity, max_steps, compressed=compressed)
            if writer.num_transitions:
                logged = open_replay(path)
                ring.fill(logged_episodes(logged, game, run, capacity))
                for row in logged.episodes(game).itertuples() if mirror else ():
                    if row.run == run:
                        mirror.add(game, row.episode_return, row.length, row.epsilon)
            halves = []
            for half in split(np.arange(environments)):
                halves.append(make(game, len(half), num_threads=num_threads, **options))
                stack.callback(halves[-1].close)
            numbers = [seed, run, number, writer.num_transitions]
            players[game] = _Game(halves, ring, writer.num_transitions, numbers)
        rings = [player.ring for player in players.values()]
        log = stack.enter_context(EpisodeLog(writers))

        def count_steps() -> np.ndarray:
            return np.array([player.steps for player in players.values()])

        def explore(steps: np.ndarray) -> np.ndarray:
            return np.array([exploration_rate(step, min_history, epsilon_decay, final_epsilon) for step in steps])

        def step(steps: np.ndarray) -> _Choice:
            """Receive, choose and send, half by half: one half's environments step while the other's are asked."""
            epsilon, rng = explore(steps), np.random.default_rng([seed, run, 1, int(steps.sum())])
            shape = len(games), environments
            actions = rng.integers(np.broadcast_to(num_actions[:, None], shape))
            exploit = rng.random(shape) >= epsilon[:, None]
            for half, (own, greedily) in enumerate(zip(split(actions), split(exploit))):
                for player in players.values():
                    player.receive(half)
                if greedily.any():
                    stacks = [player.stacks[half] for player in players.values()]
                    stacks = stacks[0][None] if len(stacks) == 1 else np.stack(stacks)
                    own = np.where(greedily, np.asarray(learner.greedy(learning.state.params, stacks)), own)
                for player, sent in zip(players.values(), own):
                    player.send(half, sent)
            return _Choice(epsilon, learning.updates)

        def log_episodes(choice: _Choice) -> None:
            for (game, player), epsilon in zip(players.items(), choice.epsilon.tolist()):
                for episode in player.remember():
                    if log.transitions[game] < num_transitions:
                        log.append(game, episode, epsilon=epsilon, learner_step=choice.learner_step)
                        if mirror:
                            mirror.add(game, episode["reward"].sum(), len(episode["reward"]), epsilon)
            log.write_if_due()

        def draw_batch() -> Batch:
            return sample_rings(rings, [seed, run, 2, learning.updates], batch_size, pool, **sampling)

        meter = _Meter(report_seconds, int(count_steps().sum()), learning.updates)

        def report() -> tuple[TrainState, dict[str, Any]]:
            steps = count_steps()
            steps_per_second, updates_per_second = meter.rates(int(steps.sum()), learning.updates)
            return learning.state, {
                "logged": {game: writer.num_transitions for game, writer in writers.items()},
                "played": dict(zip(games, steps.tolist())),
                "epsilon": dict(zip(games, explore(steps).tolist())),
                "loss": dict(zip(games, learning.losses.tolist())),
                "updates": learning.updates,
                "due": learning.due(steps, min_history, update_period),
                "steps_per_second": steps_per_second,
                "updates_per_second": updates_per_second,
            }

        def learn(steps: np.ndarray) -> Iterator[tuple[TrainState, dict[str, Any]]]:
            due = learning.due(steps, min_history, update_period)
            while learning.updates < due:
                learning.update(draw_batch())
                learning.save(checkpoint_every)
                if meter.is_due():  # there may be many after resuming
                    learning.check()
                    yield report()

        choice = None
        while min(log.transitions.values()) < num_transitions:
            steps = count_steps()
            before, choice = choice, step(steps)

            # All environments step from here on, while everything that they do not need is done.
            if before is not None:
                log_episodes(before)
            learning.check()
            yield from learn(steps)
            if meter.is_due():
                yield report()
        yield from learn(count_steps())  # many, where the last episodes outlived the last checkpoint
        learning.check()
        log.wait()
        learning.save()
        yield report()
