"""Agents that learn online in ALE while everything they experience is logged: C51 and DQN, for one game or many.

`independent_learners` are single-game agents, trained together as one program over stacked parameters;
`multi_task_learner` is one network with a head per game, the paper's online multi-task Impala-DQN (appendix B.5).
`play` lets either act, learn and log.

Defaults are the settings of Dopamine's C51 (Castro et al., 2018): support, optimizer, replay, periods, exploration,
protocol. What differs from its agents: the Nature network has no padding, as in Mnih et al. (2015), where Dopamine's
pads (``SAME``), and its initial kernels are He et al.'s normal ones where Dopamine's are uniform; many environments
step side by side, on parameters of one step ago. With ``mse`` the optimizer and the squared error are C51's and
`methods.q_learning`'s; Dopamine's DQN minimises Huber's loss with Adam (learning rate 6.25e-5, epsilon 1.5e-4) or,
in TensorFlow, RMSProp.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil
from flax import nnx

from scaled_ql import methods
from scaled_ql.defaults import TARGET_UPDATE_PERIOD
from scaled_ql.devices import OutOfMemory
from scaled_ql.environments import MAX_STEPS, STACK_SIZE, VectorEnvironment, make_vector_environment, rules
from scaled_ql.evaluation import QFunction, make_q_function
from scaled_ql.games import action_names, check_variant, rom_md5
from scaled_ql.networks.q_network import Head, QNetwork
from scaled_ql.replay.format import FRAME_SHAPE
from scaled_ql.replay.ring import Ring, ring_bytes
from scaled_ql.replay.store import Batch, Replay, open_replay
from scaled_ql.replay.writer import ReplayWriter
from scaled_ql.training import Checkpoints, Diverged, PyTree, TrainState, make_update

THREAD_BYTES, PROCESS_BYTES = 4_000_000, 130_000_000  # that an environment takes: measured, on a thread, as a process
EPISODES_WAITING = 64  # to be written, before playing waits for the disk
WRITERS = 4
# What `play` takes under the names that the notebook's parameters have.
PLAYING = (
    "capacity", "compressed", "batch_size", "n_step", "discount", "min_history", "update_period", "epsilon_decay",
    "checkpoint_every",
)  # fmt: skip


class Learner(NamedTuple):
    """Agents of G games.

    Attributes:
        state: to begin with.
        update: (state, batch) -> (state, metrics); donates the state. A batch has [G, B] transitions, or of a learner
            that is `shared` [B], and metrics have [G] losses, or one.
        greedy: (params, uint8 [G, E, 4, 84, 84]) -> int32 [G, E], the best actions.
        q_function: (params, number of a game) -> its agent's values, for `evaluation.evaluate`.
        shared: whether all games have one network.
    """

    state: TrainState
    update: Callable[[TrainState, Batch], tuple[TrainState, methods.Metrics]]
    greedy: Callable[[PyTree, np.ndarray], jax.Array]
    q_function: Callable[[PyTree, int], QFunction]
    shared: bool


def independent_learners(
    build: Callable[[jax.Array], QNetwork],
    num_actions: list[int],
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    head: Head = "c51",
    atoms: jax.Array | None = None,
    double_q: bool = False,
    target_update_period: int = TARGET_UPDATE_PERIOD,
) -> Learner:
    """An agent per game, each with its own network: parameters are stacked, and one program is mapped over games.

    Args:
        build: makes a network with one head from a seed, an int32 scalar.
        num_actions: size of each game's minimal action set.
        optimizer: of each.
        seed: game g begins with `build(seed + g)`.
        head: ``c51``, ``mse`` (plain DQN), or another of `methods.q_learning`.
        atoms: of a categorical head.
        double_q: as in `methods.q_learning`.
        target_update_period: updates between copies to the target networks.
    """

    method = methods.q_learning(head=head, alpha=0.0, atoms=atoms, double_q=double_q, scale_rewards="no")

    def parameters(seed: jax.Array) -> PyTree:
        return nnx.to_pure_dict(nnx.split(build(seed), nnx.Param)[1])

    graph, _ = nnx.split(nnx.eval_shape(lambda: build(jnp.int32(0))), nnx.Param)
    params = jax.jit(jax.vmap(parameters))(seed + jnp.arange(len(num_actions), dtype=jnp.int32))
    state = TrainState(jnp.int32(0), params, jax.tree.map(jnp.copy, params), jax.vmap(optimizer.init)(params))
    sizes, key = jnp.array(num_actions), jax.random.key(seed)

    def update(state: TrainState, batch: Batch, size: jax.Array, key: jax.Array) -> tuple:
        objective = method.objective(graph, size[None])
        return make_update(objective, optimizer, target_update_period)(state, batch, key)

    def greedy(params: PyTree, stacks: jax.Array, size: jax.Array) -> jax.Array:
        prefer = method.preferences(graph, size[None])
        game = jnp.zeros(len(stacks), jnp.int32)
        return prefer(params, stacks.transpose(0, 2, 3, 1), game).argmax(-1)

    def q_function(params: PyTree, number: int) -> QFunction:
        prefer = method.preferences(graph, [num_actions[number]])
        own = jax.tree.map(lambda leaf: leaf[number], params)
        return make_q_function(prefer, own, 0, num_actions[number])

    axes = TrainState(None, 0, 0, 0)  # they count steps together
    over_games = _one_by_one if jax.default_backend() == "cpu" else jax.vmap
    update = over_games(update, in_axes=(axes, 0, 0, None), out_axes=(axes, 0))
    greedy = over_games(greedy, in_axes=(0, 0, 0), out_axes=0)
    compiled, compiled_greedy = jax.jit(update, donate_argnums=0), jax.jit(greedy)
    return Learner(
        state,
        lambda state, batch: compiled(state, batch, sizes, key),
        lambda params, stacks: compiled_greedy(params, stacks, sizes),
        q_function,
        shared=False,
    )


def _one_by_one(function: Callable, in_axes: tuple, out_axes: PyTree) -> Callable:
    """What `jax.vmap` computes, as one program without batched operations.

    On a CPU, convolutions that are mapped over their kernels take two to three times as long as one after the other.
    """

    def change(each: Callable, axes: PyTree, *trees: PyTree) -> PyTree:
        return jax.tree.map(
            lambda axis, *parts: parts[0] if axis is None else jax.tree.map(each, *parts),
            axes,
            *trees,
            is_leaf=lambda axis: axis is None,
        )

    def mapped(*arguments: PyTree) -> PyTree:
        count = next(len(jax.tree.leaves(a)[0]) for a, axis in zip(arguments, in_axes) if axis == 0)
        results = [function(*change(lambda leaf, i=i: leaf[i], in_axes, arguments)) for i in range(count)]
        return change(lambda *leaves: jnp.stack(leaves), out_axes, *results)

    return mapped


def multi_task_learner(
    build: Callable[[jax.Array], QNetwork],
    num_actions: list[int],
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    head: Head = "c51",
    atoms: jax.Array | None = None,
    double_q: bool = False,
    target_update_period: int = TARGET_UPDATE_PERIOD,
) -> Learner:
    """One agent for all games, with a head for each; arguments as of `independent_learners`, `build` with G heads."""
    graph, variables = nnx.split(build(jnp.int32(seed)), nnx.Param)
    params = jax.tree.map(jnp.copy, nnx.to_pure_dict(variables))
    state = TrainState(jnp.int32(0), params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    method = methods.q_learning(head=head, alpha=0.0, atoms=atoms, double_q=double_q, scale_rewards="no")
    objective = method.objective(graph, num_actions)
    compiled = jax.jit(make_update(objective, optimizer, target_update_period), donate_argnums=0)
    prefer, key = method.preferences(graph, num_actions), jax.random.key(seed)

    @jax.jit
    def greedy(params: PyTree, stacks: jax.Array) -> jax.Array:
        games, environments = stacks.shape[:2]
        together = stacks.reshape(-1, *stacks.shape[2:]).transpose(0, 2, 3, 1)
        game = jnp.repeat(jnp.arange(games, dtype=jnp.int32), environments)
        return prefer(params, together, game).argmax(-1).reshape(games, environments)

    return Learner(
        state,
        lambda state, batch: compiled(state, batch, key),
        greedy,
        lambda params, number: make_q_function(prefer, params, number, num_actions[number]),
        shared=True,
    )


def epsilon_at(step: int, min_history: int, decay: int, final: float) -> float:
    """Probability of a random action after `step` transitions: 1 while none is learned from, then linearly to final."""
    return final + (1.0 - final) * min(max(1.0 - (step - min_history) / decay, 0.0), 1.0)


def memory_bytes(
    num_games: int, environments: int, capacity: int, max_steps: int, compressed: bool, variant: bool
) -> int:
    """Bytes of memory that rings and environments take."""
    rings = ring_bytes(environments, capacity, max_steps, compressed)
    machines = environments * (PROCESS_BYTES if variant else THREAD_BYTES)
    return num_games * (rings + machines)


def check_memory(*arguments: Any) -> int:
    """As `memory_bytes`.

    Raises:
        OutOfMemory: more than is free.
    """
    needed, free = memory_bytes(*arguments), psutil.virtual_memory().available
    if needed > free:
        num_games, environments, capacity, max_steps, compressed, variant = arguments
        smallest = memory_bytes(num_games, 1, 1, max_steps, True, variant)
        raise OutOfMemory(
            f"{num_games} games x {environments} environments with a replay of {capacity:,} transitions each, "
            f"{'compressed' if compressed else 'uncompressed'}, take {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are "
            f"free. An environment keeps an episode of {max_steps:,} steps at least. Use fewer environments or games, "
            f"a smaller replay{'' if compressed else ' or a compressed one'}, or a lower step limit (with one "
            f"environment a game and no replay to speak of: {smallest / 1e9:.1f} GB)."
        )
    return needed


class _Game:
    """One game being played: its environments, its ring, its log."""

    def __init__(self, name: str, environments: VectorEnvironment, ring: Ring, writer: ReplayWriter, seed: list[int]):
        self.name, self.environments, self.ring, self.writer = name, environments, ring, writer
        self.steps = self.logged = writer.num_transitions  # played; played and handed to the log
        self.stacks, _ = environments.reset(seed=int(np.random.default_rng(seed).integers(2**30)))
        ring.begin(self.stacks[:, -1])
        self._resetting, self._new = np.zeros(ring.num_environments, bool), None

    def send(self, actions: np.ndarray) -> None:
        """Begin a step of all environments."""
        self._actions = actions
        self.environments.send(actions)

    def receive(self) -> None:
        """Wait for its end."""
        self.steps += int((~self._resetting).sum())
        self.stacks, reward, terminated, truncated, _ = self.environments.recv()
        self._resetting = (terminated | truncated) & ~self._resetting
        self._new = self.stacks[:, -1], self._actions, reward, terminated, truncated

    def remember(self) -> list[dict[str, Any]]:
        """Put the step that was received last into the ring; returns the episodes that it ended."""
        if self._new is None:
            return []
        ended, self._new = self.ring.add(*self._new), None
        return [self.ring.episode(number) for number in ended.tolist()]


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
) -> Iterator[tuple[TrainState, dict[str, Any]]]:
    """Act, learn and log until the store holds at least `num_transitions` of every game.

    All games advance together. Environments step on threads of their own while the learner works, on the parameters of
    one step ago. Episodes are logged whole, in the order in which they end, with raw rewards; what is under way at the
    end is not. A run that was stopped, however roughly, goes on: with the episodes that were logged (which also
    refill the replay), the last checkpoint, and the updates that are due since then.

    Args:
        path: the dataset's folder.
        games: names.
        learner: of those games.
        checkpoints: of this run.
        num_transitions: logged, of each game.
        seed: of everything random.
        source: who plays, in words; goes into the manifest. A store of the same game and run is continued only if it
            says the same.
        run: number of the recording.
        environments: of each game.
        num_threads: of each game's environments; 0: one per core.
        sticky_actions, max_steps, mode, difficulty: see `make_vector_environment`.
        make: makes the environments; others than ALE's need a game that ALE has, for its name and action set.
        capacity: transitions that can be learned from, of each game: 7.1 GB a million, compressed at most 0.5 GB.
        compressed: keep these frames compressed; sampling takes longer (`scaled-ql benchmark online`).
        batch_size: transitions of an update, of each game, or of a shared learner of all.
        n_step: steps summed before bootstrapping.
        discount: per step.
        min_history: transitions of each game before anything is learned.
        update_period: transitions between updates, of each game, or of a shared learner of all games together.
        final_epsilon: share of random actions in the end.
        epsilon_decay: transitions of a game over which it falls from 1.
        checkpoint_every: updates between checkpoints.
        report_seconds: between reports.

    Yields:
        (state, report) now and then and at the end. A report has `logged`, `played` and `epsilon` by game, `updates`,
        `loss` by game (a shared learner's is the same for all), `steps_per_second`, `updates_per_second`.

    Raises:
        UnknownGame, UnknownVariant: before anything is played.
        OutOfMemory: likewise.
        ReplayError: a store of something else, or a disk that does not take an episode.
        EnvironmentDied: an environment ended.
        Diverged: a loss is not finite. What was logged before is whole.
    """
    num_actions = np.array([len(action_names(game)) for game in games])
    for game in games:
        check_variant(game, mode, difficulty)
    check_memory(len(games), environments, capacity, max_steps, compressed, mode is not None or difficulty is not None)
    options = {"sticky_actions": sticky_actions, "max_steps": max_steps, "mode": mode, "difficulty": difficulty}
    state = checkpoints.restore(learner.state)
    sampling = {"n_step": n_step, "discount": discount}
    with ExitStack() as stack:
        stack.callback(checkpoints.wait)
        pool = stack.enter_context(ThreadPoolExecutor(thread_name_prefix="sample"))
        log = stack.enter_context(_Log())
        players = []
        for number, game in enumerate(games):
            about = {"actions": action_names(game), "source": source, "rom_md5": rom_md5(game)} | rules(**options)
            writer = stack.enter_context(ReplayWriter(path, game, run, **about))
            ring = Ring(environments, capacity, max_steps, compressed=compressed)
            if writer.num_transitions:
                ring.fill(logged_episodes(open_replay(path), game, run, capacity))
            vector = make(game, environments, num_threads=num_threads, **options)
            stack.callback(vector.close)
            players.append(_Game(game, vector, ring, writer, [seed, run, number, writer.num_transitions]))
        log.begin(players)

        updates, saved = int(state.step), int(state.step)
        began, last = time.perf_counter(), (sum(player.steps for player in players), updates)
        losses_seen = np.full(len(games), np.nan)

        def report() -> dict[str, Any]:
            nonlocal began, last
            now, steps = time.perf_counter(), sum(player.steps for player in players)
            rates = [(new - old) / (now - began) for new, old in zip((steps, updates), last)]
            began, last = now, (steps, updates)
            return {
                "logged": {player.name: player.writer.num_transitions for player in players},
                "played": {player.name: player.steps for player in players},
                "epsilon": {p.name: epsilon_at(p.steps, min_history, epsilon_decay, final_epsilon) for p in players},
                "loss": dict(zip(games, losses_seen.tolist())),
                "updates": updates,
                "steps_per_second": rates[0],
                "updates_per_second": rates[1],
            }

        unchecked, acted = None, {"epsilon": np.ones(len(games)), "learner_step": updates}
        while any(player.logged < num_transitions for player in players):
            steps = np.array([player.steps for player in players])
            epsilon = np.array([epsilon_at(step, min_history, epsilon_decay, final_epsilon) for step in steps])
            rng = np.random.default_rng([seed, run, 1, int(steps.sum())])
            shape = len(games), environments
            actions = rng.integers(np.broadcast_to(num_actions[:, None], shape))
            exploit = rng.random(shape) >= epsilon[:, None]
            if exploit.any():
                greedy = learner.greedy(state.params, np.stack([player.stacks for player in players]))
                actions = np.where(exploit, np.asarray(greedy), actions)
            for player, row in zip(players, actions):
                player.send(row)

            # From here on the environments step: all that they do not need is done meanwhile.
            for player, gap in zip(players, acted["epsilon"].tolist()):
                for episode in player.remember():
                    if player.logged < num_transitions:
                        log.append(player, episode, epsilon=gap, learner_step=acted["learner_step"])
            acted = {"epsilon": epsilon, "learner_step": updates}
            if unchecked is not None:
                losses_seen[:] = _check(unchecked, games, updates, checkpoints)
            history = steps - min_history
            due = int(max(history.sum() if learner.shared else history.min(), 0)) // update_period
            while updates < due:
                batch = sample(players, learner.shared, [seed, run, 2, updates], batch_size, pool, sampling)
                state, metrics = learner.update(state, batch)
                updates += 1
                unchecked = metrics["loss"], metrics["grad_norm"]
                if time.perf_counter() - began > report_seconds:  # after a resumption there may be many
                    losses_seen[:] = _check(unchecked, games, updates, checkpoints)
                    yield state, report()
            if updates // checkpoint_every > saved // checkpoint_every:
                checkpoints.save(state)
                saved = updates
            for player in players:
                player.receive()
            if time.perf_counter() - began > report_seconds:
                yield state, report()
        if unchecked is not None:
            losses_seen[:] = _check(unchecked, games, updates, checkpoints)
        log.wait()
        if updates > saved:
            checkpoints.save(state)
        yield state, report()


def sample(
    players: list[Any],
    shared: bool,
    seed: list[int],
    batch_size: int,
    pool: ThreadPoolExecutor,
    sampling: dict[str, Any],
) -> Batch:
    """A batch from the rings of all games: [G, B] transitions, or with `shared` [B], games drawn uniformly."""
    rng = np.random.default_rng(seed)
    width = STACK_SIZE + sampling["n_step"]
    if shared:
        counts = np.bincount(rng.integers(len(players), size=batch_size), minlength=len(players))
        frames = np.empty((batch_size, width, *FRAME_SHAPE), np.uint8)
        parts = np.split(frames, np.cumsum(counts)[:-1])
    else:
        counts = np.full(len(players), batch_size)
        frames = np.empty((len(players), batch_size, width, *FRAME_SHAPE), np.uint8)
        parts = list(frames)
    jobs = [
        (partial(player.ring.sample, own, count, out=part, **sampling))
        for player, own, count, part in zip(players, rng.spawn(len(players)), counts.tolist(), parts)
        if count
    ]
    drawn = [jobs[0]()] if len(jobs) == 1 else list(pool.map(lambda job: job(), jobs))
    join = np.concatenate if shared else np.stack
    rest = {name: join([getattr(batch, name) for batch in drawn]) for name in Batch._fields[1:]}
    if shared:
        rest["game"] = np.repeat(np.arange(len(players), dtype=np.int32), counts)
    return Batch(frames, **rest)


def logged_episodes(replay: Replay, game: str, run: int, capacity: int) -> Iterator[dict[str, Any]]:
    """A recording's last episodes, about `capacity` transitions, oldest first, as `ReplayWriter.append` takes them."""
    table = replay.episodes(game)
    table = table[table["run"] == run]
    end = table["length"].cumsum()
    for number in table.index[(end.iloc[-1] - end) < capacity]:
        episode = replay.episode(game, int(number))
        frames, length = episode.pop("observation"), len(episode["action"])
        final = frames[length] if len(frames) > length else np.zeros(FRAME_SHAPE, np.uint8)
        terminal = bool(table.loc[number, "terminal"])
        yield episode | {"observation": frames[:length], "final_observation": final, "terminal": terminal}


def _check(unchecked: tuple, games: list[str], updates: int, checkpoints: Checkpoints) -> np.ndarray:
    """The losses, [G] or one.

    Raises:
        Diverged: one of them, or of the gradients' norms, is not finite.
    """
    loss, grad_norm = (np.atleast_1d(value) for value in jax.device_get(unchecked))
    bad = ~(np.isfinite(loss) & np.isfinite(grad_norm))
    if bad.any():
        names = ", ".join(np.array(games)[bad]) if len(bad) == len(games) else "the network of all games"
        raise Diverged(
            f"the loss of {names} is {loss[bad].tolist()} at update {updates} (norm of the gradient "
            f"{grad_norm[bad].tolist()}). All episodes that ended before are logged. {checkpoints.describe_latest()} "
            "Lower learning_rate and start again under another run name."
        )
    return loss


class _Log:
    """Episodes on their way to the store, written on threads; a game's in the order in which they came."""

    def __init__(self):
        self._pools = [ThreadPoolExecutor(1, thread_name_prefix="log") for _ in range(WRITERS)]
        self._waiting: deque[Future] = deque()
        self._lane: dict[str, ThreadPoolExecutor] = {}

    def begin(self, players: list[_Game]) -> None:
        """Say whose episodes will come."""
        self._lane = {player.name: self._pools[number % WRITERS] for number, player in enumerate(players)}

    def append(self, player: _Game, episode: dict[str, Any], **columns: float) -> None:
        """Have an episode written; waits where too many are waiting.

        Raises:
            ReplayError: an earlier one could not be written.
        """
        player.logged += len(episode["action"])
        self._waiting.append(self._lane[player.name].submit(partial(player.writer.append, **episode, **columns)))
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > EPISODES_WAITING):
            self._waiting.popleft().result()

    def wait(self) -> None:
        """Return when all are on disk."""
        while self._waiting:
            self._waiting.popleft().result()

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools:
            pool.shutdown()  # what was handed over is written, whatever else went wrong
