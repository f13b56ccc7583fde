"""A trained agent, read from its run.

::

    agent = load_agent("04_scaled_training/quickstart")
    agent.look(agent.games[0], stacks).values

Most see a stack of frames. A transformer sees a window of its episode's last steps, actions and rewards included: what
it makes of a state depends on how the episode came there.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from scaled_ql import losses, methods, networks, parameters, replay, runs, training, transfer, weights
from scaled_ql.collect import Policy, TrainedPlayer
from scaled_ql.defaults import EVAL_EPSILON
from scaled_ql.evaluation import MemoryPlayer, QFunction
from scaled_ql.games import action_names
from scaled_ql.methods import Method, PyTree
from scaled_ql.replay.sequences import Sequences
from scaled_ql.training import CheckpointError

TOGETHER = 64  # states of one call of the network; one size is one compiled program
# What a player sees of N states: uint8 [N, 4, 84, 84] stacks, oldest frame first; or, with a memory, windows and their
# `draw`, as of `evaluation.MemoryPlayer`.
Seen = tuple[np.ndarray] | tuple[Sequences, np.ndarray]


class Look(NamedTuple):
    """What an agent makes of N states of one game, whose minimal set has A actions.

    Attributes:
        values: float32 [N, A], the largest is played, or likeliest; -inf for actions that the agent never plays.
        probabilities: float32 [N, A, atoms], the return distributions of a categorical head; float32 [N, 2, atoms], of
            a decision transformer, of the return from the window's first step on: as predicted, and the one from which
            the return to ask for is drawn; None for others.
        features: float32 [N, F], the representation before the heads, or before a transformer's head of actions.
        policy: float32 [N, A], probabilities with which a transformer draws its action; None for others.
        asked: float32 [N], the return that a decision transformer asks for; None for others.
    """

    values: np.ndarray
    probabilities: np.ndarray | None
    features: np.ndarray
    policy: np.ndarray | None = None
    asked: np.ndarray | None = None

    @property
    def best(self) -> np.ndarray:
        """int [N], the greedy actions; of a policy the likeliest."""
        return self.values.argmax(1)

    @property
    def shown(self) -> np.ndarray:
        """float32 [N, A], what is shown of actions: probabilities of a policy, else values."""
        return self.values if self.policy is None else self.policy

    @property
    def doubtful(self) -> np.ndarray | None:
        """float32 [N, outcomes], distribution of a policy's actions, else of the best action's return, if any."""
        if self.policy is not None or self.probabilities is None:
            return self.policy
        return self.probabilities[np.arange(len(self.best)), self.best]

    @property
    def entropy(self) -> np.ndarray | None:
        """float32 [N], entropies of the `doubtful` distributions in nats, at most log(outcomes); None without."""
        p = self.doubtful
        return None if p is None else -(p * np.log(np.maximum(p, np.finfo(p.dtype).tiny))).sum(-1)


class _Built(NamedTuple):
    """A network without its parameters, and which of them play a game.

    Attributes:
        method: the method that trained it.
        graph, abstract: the network, and the shapes of its parameters.
        atoms: [N], support of its distributions, or returns of a decision transformer; None if it has none.
        own_networks: whether each game has its own network with one head; parameters are then stacked over games.
    """

    method: Method
    graph: nnx.GraphDef
    abstract: PyTree
    atoms: np.ndarray | None
    own_networks: bool


class Agent:
    """A playing policy: the parameters of one checkpoint; see `load_agent`.

    Attributes:
        name: notebook and name of its run, and the checkpoint's step, in words.
        step: gradient steps of the checkpoint.
        checkpoints: steps of all checkpoints of its run when this one was read, ascending.
        games: games that it was trained on.
        atoms: float32 [N], the support of its return distributions; None if it has none.
        memory: how many of its episode's last steps it sees; 0: a stack of frames alone.
        values_name: what `Look.shown` is, such as ``Q(s, a)``.
        protocol: how its run evaluates: epsilon, temperature, sticky_actions, max_steps, mode, difficulty; for
            `episodes.play`.
        discount: per step, of the returns that it predicts; a transformer's are undiscounted.
        dataset, view: what it was trained on, as its run names it; "" if it made its own experience.
    """

    def __init__(
        self, name: str, step: int, games: Sequence[str], built: _Built, params: PyTree, p: parameters.Parameters,
        checkpoints: Sequence[int],
    ):  # fmt: skip
        self.name, self.step, self.games = f"{name}, step {step:,}", step, list(games)
        self.checkpoints = sorted(checkpoints)
        self.atoms, self.memory = built.atoms, built.method.memory
        self.values_name = built.method.values.removeprefix("log " if self.memory else "")
        self.protocol = _protocol(p) | {"temperature": built.method.temperature}
        self.discount: float = 1.0 if self.memory else p.discount
        online = getattr(p, "setting", "") == "online"
        self.dataset, self.view = ("" if online else getattr(p, name, "") for name in ("dataset", "view"))
        own = built.own_networks
        self._parts = {
            game: (jax.tree.map(lambda x, number=number: x[number], params), 0) if own else (params, number)
            for number, game in enumerate(self.games)
        }
        make, sizes = _make_decide if self.memory else _make_forward, [len(action_names(game)) for game in self.games]
        shared = None if own else make(built, sizes)
        self._forwards = {game: shared or make(built, [size]) for game, size in zip(self.games, sizes)}

    def __repr__(self) -> str:
        return f"Agent({self.name}; {', '.join(self.games)})"

    def look(self, game: str, *seen: Any) -> Look:
        """What it makes of states.

        Args:
            game: one of its games.
            seen: `Seen`: uint8 [N, 4, 84, 84]; with a `memory`, windows and their `draw`. `episodes.seen` gives them.

        Raises:
            ValueError: a game that it was not trained on, or stacks where it sees windows, or the other way round.
        """
        self._check(game)
        if len(seen) != 1 + bool(self.memory):
            what = f"the last {self.memory} steps of an episode" if self.memory else "stacks of frames alone"
            raise ValueError(f"{self.name} sees {what}: pass on all that episodes.seen(agent, episode) returns.")
        of_game, number = self._of_windows if self.memory else self._of_stacks, len(seen[-1])
        size = 1 if number == 1 else TOGETHER
        padded = jax.tree.map(lambda x: np.concatenate([x, np.zeros((-number % size, *x.shape[1:]), x.dtype)]), seen)
        parts = [
            of_game(game, *jax.tree.map(lambda x, first=first: x[first : first + size], padded))
            for first in range(0, number, size)
        ]
        return jax.tree.map(lambda *part: np.concatenate(part)[:number], *parts)

    def player(self, game: str) -> QFunction | MemoryPlayer:
        """Its policy for one game, for `evaluation.evaluate` and `evaluation.record_film`; raises like `look`."""
        self._check(game)
        if not self.memory:
            return lambda stacks: self.look(game, stacks).values
        decide, (params, number) = self._forwards[game], self._parts[game]
        return MemoryPlayer(lambda *seen: decide(*seen).log_policy, params, number, action_names(game), self.memory)

    def expectation(self, look: Look) -> tuple[str, np.ndarray]:
        """What it expects of each state, in words and float32 [N].

        The mean of the return that a decision transformer predicts; of others the largest of `Look.shown`.
        """
        if look.asked is None:
            return f"largest {self.values_name}", look.shown.max(1)
        return "predicted return", look.probabilities[:, 0] @ self.atoms

    def _check(self, game: str) -> None:
        if game not in self._forwards:
            raise ValueError(f"{self.name} does not play {game!r}; it was trained on {', '.join(self.games)}.")

    def _of_stacks(self, game: str, stacks: np.ndarray) -> Look:
        params, head = self._parts[game]
        heads, used = np.full(len(stacks), head, np.int32), np.s_[:, : len(action_names(game))]
        values, probabilities, features = self._forwards[game](params, np.moveaxis(stacks, 1, -1), heads)
        return Look(values[used], None if probabilities is None else probabilities[used], features)

    def _of_windows(self, game: str, windows: Sequences, draw: np.ndarray) -> Look:
        params, number = self._parts[game]
        windows = windows._replace(game=np.full(len(draw), number, np.int32))
        decision = self._forwards[game](params, windows, draw)
        values = self.player(game).in_game(decision.log_policy)
        if decision.token is None:
            return Look(values, None, decision.features, policy=np.exp(values))
        returns = np.stack([decision.predicted, decision.offered], axis=1)
        return Look(values, returns, decision.features, np.exp(values), self.atoms[decision.token])


def _make_forward(built: _Built, num_actions: list[int]) -> Any:
    """Compiled (params, uint8 [B, 84, 84, 4], heads int32 [B]) -> values, probabilities or None, features."""
    prefer = built.method.preferences(built.graph, num_actions)

    @jax.jit
    def forward(params: PyTree, observation: jax.Array, head: jax.Array) -> tuple:
        network = nnx.merge(built.graph, nnx.State(params))
        network = getattr(network, "q", network)  # of bcq's two
        features = network.features(observation, head)
        probabilities = None if built.atoms is None else jax.nn.softmax(network.heads(features, head))
        return prefer(params, observation, head), probabilities, features.astype("float32")

    return lambda *arguments: jax.tree.map(np.asarray, forward(*arguments))


def _make_decide(built: _Built, num_actions: list[int]) -> Any:
    """Compiled (params, windows, their `draw`) -> `methods.decision_transformer.Decision`."""
    decide = jax.jit(built.method.decisions(built.graph, num_actions))
    return lambda *arguments: jax.tree.map(np.asarray, decide(*arguments))


def _protocol(p: parameters.Parameters) -> dict[str, Any]:
    """How a run evaluates, as keyword arguments of `episodes.play`."""
    if isinstance(p, parameters.OnlineAgents):
        protocol = {"epsilon": EVAL_EPSILON, "sticky_actions": p.sticky_actions, "max_steps": p.max_steps}
    else:
        names = ("epsilon", "sticky_actions", "max_steps")
        protocol = {name: getattr(p, f"eval_{name}") for name in names}
    variant = {name: getattr(p, name, -1) for name in ("mode", "difficulty")}
    return protocol | {name: None if value < 0 else value for name, value in variant.items()}


def load_agent(run: str | Path, step: int | None = None, outputs: str | Path = "") -> Agent:
    """Read the agent of a run of `04_scaled_training`, `06_transfer` or `02_online_agents`, finished or running.

    Args:
        run: its folder, or its name below the outputs folder: ``04_scaled_training/quickstart``; or an exported folder,
            or a file of Atari Agents (`weights`).
        step: gradient steps of the checkpoint; None: the newest.
        outputs: the outputs folder; "" is the workspace's.

    Raises:
        RunError: there is no such run; its network cannot play; how it plays cannot be told, since the run that a
            transformer of `06_transfer` began with, or with ``target_return`` "data" the dataset, is gone.
        CheckpointError: it has no checkpoint, or none of that step; it names no games, is damaged, or of another
            network than the run's parameters describe.
        ParameterError: its parameters cannot be read.
    """
    trained = weights.read(weights.find(run, Path(outputs) if outputs else runs.workspace() / "outputs"), step)
    name, where, about, p = trained.name, trained.where, trained.about, trained.checked()
    if trained.parameters[1].name == "parameters.yaml":
        p = p.model_copy(update={"outputs": str(trained.parameters[1].parents[2])})  # wherever its workspace is now
    built = _online(p) if "learner" in about else _offline(p, transfer.Source(where, about, trained.params))
    filled = _fill(where, built, trained.params, len(about["games"]))
    return Agent(name, trained.step, about["games"], built, filled, p, trained.checkpoints)


def players(folder: str | Path, games: Sequence[str]) -> dict[str, list[TrainedPlayer]]:
    """The agents of a folder as players of recordings (`collect.record`), by game, in the order of their training.

    Each is read here, so that a damaged one is found before hours of recording; JAX does not start.

    Args:
        folder: with exported agents or Atari Agents; see `weights.find_agents`.
        games: to be played.

    Raises:
        RunError, CheckpointError, ParameterError: see `weights.find_agents`, `load_agent`; a transformer is among them.
    """
    folder = Path(folder).resolve()

    @cache  # one may play several games
    def identity(place: Path, name: str) -> str:
        trained = weights.read(place)
        trained.checked()
        if "transformer" in trained.about:
            raise runs.RunError(
                f"{place}: a transformer sees the last steps of its episode, a player of recordings one state alone. "
                "Take it out of the folder."
            )
        files = [place] if place.is_file() else [place / weights.CONFIG, place / weights.TENSORS]
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        return hashlib.sha256("\n".join([name, *digests]).encode()).hexdigest()

    def player(place: Path, game: str) -> TrainedPlayer:
        name = folder.name if place == folder else str(place.relative_to(folder))
        return TrainedPlayer(name, identity(place, name), partial(_policy, place, game))

    return {game: [player(place, game) for place in weights.find_agents(folder, game)] for game in games}


def _policy(place: Path, game: str) -> Policy:
    """The greedy policy of an agent, loaded in a process that records."""
    training.cache_compiled_programs()
    agent = load_agent(place)
    return lambda stack: int(agent.look(game, stack[None]).best[0])


def _offline(p: Any, source: transfer.Source) -> _Built:
    """The network of a run of `04_scaled_training` or `06_transfer`, as its parameters and checkpoint describe it."""
    settings, games = p, source.about["games"]
    if isinstance(p, parameters.Transfer):
        # A transformer plays as the one that the run began with, whose parameters say which returns it asks for.
        like = transfer.sources(p, partial(runs.trained_run, p))[1] if source.is_transformer else source
        settings = transfer.training_parameters(p, like)
    method = methods.make(settings)
    if method.preferences is None:
        raise runs.RunError(
            f"{source.folder}: {settings.method} trains an encoder on images alone, no player. Choose a run of "
            "06_transfer that this encoder went into, or one of another method."
        )
    if settings.target_return == "data":
        try:
            data = runs.open_dataset(p, games)
        except replay.ReplayError as error:
            message = f"{source.folder}: target_return = 'data', the returns that it asks for are those of its data"
            raise runs.RunError(f"{message}. {error}") from error
        expected = replay.expert_returns(data, settings.return_low, settings.return_high)
        method = methods.make(settings, expert_returns=expected)
    names = ("heads", "num_atoms", "hidden_sizes", "embedding", "normalize_features", "group_size", "dtype")
    architecture = {name: getattr(settings, name) for name in names}
    if settings.subtract_mean_frames:
        architecture["mean_frames"] = np.zeros((len(games), 84, 84), np.float32)  # the checkpoint has them
    build = partial(method.build, settings.encoder, len(games), **architecture)
    atoms = None
    if method.distributions:
        atoms = np.asarray(losses.support(settings.v_min, settings.v_max, settings.num_atoms))
    elif method.batches == "sequences with returns":
        atoms = np.arange(settings.return_low, settings.return_high + 1, dtype=np.float32)
    return _abstract(method, build, atoms, own_networks=False)


def _online(p: parameters.OnlineAgents) -> _Built:
    """The network of a run of `02_online_agents`."""
    atoms, own = losses.support(-p.v_max, p.v_max, p.num_atoms), p.learner == "independent"
    plain = {"normalize_features": False, "layer_norm": False, "dtype": p.dtype, "hidden_sizes": p.hidden_sizes}
    heads = 1 if own else len(p.games)
    build = partial(networks.make_q_network, p.encoder, heads, p.head, num_atoms=p.num_atoms, **plain)
    method = methods.q_learning(head=p.head, alpha=0.0, atoms=atoms)
    return _abstract(method, build, np.asarray(atoms) if method.distributions else None, own)


def _abstract(method: Method, build: Any, atoms: np.ndarray | None, own_networks: bool) -> _Built:
    graph, variables = nnx.split(nnx.eval_shape(build), nnx.Param)  # nothing is drawn or compiled
    return _Built(method, graph, nnx.to_pure_dict(variables), atoms, own_networks)


def _fill(where: Path, built: _Built, read: Mapping[str, np.ndarray], games: int) -> PyTree:
    """The network's tree with the arrays of a checkpoint in place of their shapes.

    Raises:
        CheckpointError: they have other names or shapes.
    """
    stacked = (games,) if built.own_networks else ()
    expected = {path: (*stacked, *leaf.shape) for path, leaf in training.flat_params(built.abstract).items()}
    for path in sorted(expected.keys() | read.keys()):
        ours, theirs = expected.get(path), read[path].shape if path in read else None
        if ours != theirs:
            raise CheckpointError(
                f"{where}: {path} is {theirs or 'absent'} there, {ours or 'absent'} in the network that the run's "
                "parameters describe. Was it built by a cell of its own? Load it there."
            )
    return jax.tree.unflatten(jax.tree.structure(built.abstract), [jax.numpy.asarray(read[path]) for path in expected])
