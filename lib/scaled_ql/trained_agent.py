"""A trained agent, read from its run.

::

    agent = load_agent("04_scaled_training/quickstart")
    agent.look(agent.games[0], stacks).values
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from scaled_ql import losses, methods, networks, parameters, runs, training, transfer, weights
from scaled_ql.collect import Policy, TrainedPlayer
from scaled_ql.defaults import EVAL_EPSILON
from scaled_ql.evaluation import QFunction
from scaled_ql.games import action_names
from scaled_ql.methods import Method, PyTree
from scaled_ql.training import CheckpointError

TOGETHER = 64  # states of one call of the network; one size is one compiled program


class Look(NamedTuple):
    """What an agent makes of N states of one game, whose minimal set has A actions.

    Attributes:
        values: float32 [N, A], the largest is played; -inf for actions that the agent never plays.
        probabilities: float32 [N, A, atoms], the return distributions of a categorical head; None for other heads.
        features: float32 [N, F], the representation before the heads.
    """

    values: np.ndarray
    probabilities: np.ndarray | None
    features: np.ndarray

    @property
    def best(self) -> np.ndarray:
        """int [N], the greedy actions."""
        return self.values.argmax(1)

    @property
    def entropy(self) -> np.ndarray | None:
        """float32 [N, A], entropies of the return distributions in nats; None without distributions."""
        if self.probabilities is None:
            return None
        p = self.probabilities
        return -(p * np.log(np.maximum(p, np.finfo(p.dtype).tiny))).sum(-1)


class _Built(NamedTuple):
    """A network without its parameters, and which of them play a game.

    Attributes:
        method: the method that trained it.
        graph, abstract: the network, and the shapes of its parameters.
        atoms: [N], support of its distributions; None if it has none.
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
        values_name: what its values are, such as ``Q(s, a)``.
        protocol: how its run evaluates: epsilon, sticky_actions, max_steps, mode, difficulty; for `episodes.play`.
        discount: per step, of the returns that it predicts.
        dataset, view: what it was trained on, as its run names it; "" if it made its own experience.
    """

    def __init__(
        self, name: str, step: int, games: Sequence[str], built: _Built, params: PyTree, p: parameters.Parameters,
        checkpoints: Sequence[int],
    ):  # fmt: skip
        self.name, self.step, self.games = f"{name}, step {step:,}", step, list(games)
        self.checkpoints = sorted(checkpoints)
        self.atoms, self.values_name, self.protocol = built.atoms, built.method.values, _protocol(p)
        self.discount: float = p.discount
        online = getattr(p, "setting", "") == "online"
        self.dataset, self.view = ("" if online else getattr(p, name, "") for name in ("dataset", "view"))
        own = built.own_networks
        self._parts = {
            game: (jax.tree.map(lambda x, number=number: x[number], params), 0) if own else (params, number)
            for number, game in enumerate(self.games)
        }
        sizes = [len(action_names(game)) for game in self.games]
        shared = None if own else _make_forward(built, sizes)
        self._forwards = {game: shared or _make_forward(built, [size]) for game, size in zip(self.games, sizes)}

    def __repr__(self) -> str:
        return f"Agent({self.name}; {', '.join(self.games)})"

    def look(self, game: str, stacks: np.ndarray) -> Look:
        """What it makes of states.

        Args:
            game: one of its games.
            stacks: uint8 [N, 4, 84, 84], oldest frame first, as environments give them.

        Raises:
            ValueError: a game that it was not trained on.
        """
        if game not in self._forwards:
            raise ValueError(f"{self.name} does not play {game!r}; it was trained on {', '.join(self.games)}.")
        params, head = self._parts[game]
        size = 1 if len(stacks) == 1 else TOGETHER
        padded = np.concatenate([stacks, np.zeros((-len(stacks) % size, *stacks.shape[1:]), np.uint8)])
        heads = np.full(size, head, np.int32)
        parts = [
            self._forwards[game](params, np.moveaxis(padded[first : first + size], 1, -1), heads)
            for first in range(0, len(padded), size)
        ]
        joined = [None if part[0] is None else np.concatenate(part)[: len(stacks)] for part in zip(*parts)]
        values, probabilities, features = joined
        used = slice(len(action_names(game)))
        return Look(values[:, used], None if probabilities is None else probabilities[:, used], features)

    def q_function(self, game: str) -> QFunction:
        """Its values for one game, for `evaluation.evaluate`."""
        return lambda stacks: self.look(game, stacks).values


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
        RunError: there is no such run; its network cannot play, or sees more than one state (transformers).
        CheckpointError: it has no checkpoint, or none of that step; it names no games, is damaged, or of another
            network than the run's parameters describe.
        ParameterError: its parameters cannot be read.
    """
    trained = weights.read(weights.find(run, Path(outputs) if outputs else runs.workspace() / "outputs"), step)
    name, where, about = trained.name, trained.where, trained.about
    p = trained.checked()
    built = _online(p) if "learner" in about else _offline(p, transfer.Source(where, about, trained.params))
    if built.method.preferences is None:
        raise runs.RunError(f"{name}: a network trained by {about['method']} cannot play. Choose another run.")
    if built.method.memory:
        raise runs.RunError(
            f"{name}: a network trained by {about['method']} sees the last {built.method.memory} steps of an episode, "
            "an agent here one state alone. Its run evaluates and films it. Choose a run of a Q-network or a clone."
        )
    filled = _fill(where, built, trained.params, len(about["games"]))
    return Agent(name, trained.step, about["games"], built, filled, p, trained.checkpoints)


def players(folder: str | Path, games: Sequence[str]) -> dict[str, list[TrainedPlayer]]:
    """The agents of a folder as players of recordings (`collect.record`), by game, in the order of their training.

    Args:
        folder: with exported agents, Atari Agents, or both; see `weights.find_agents`.
        games: to be played.

    Raises:
        RunError, CheckpointError: see `weights.find_agents`.
    """
    folder = Path(folder).resolve()

    def player(place: Path, game: str) -> TrainedPlayer:
        with (place if place.is_file() else place / weights.TENSORS).open("rb") as file:
            identity = hashlib.file_digest(file, "sha256").hexdigest()
        name = folder.name if place == folder else str(place.relative_to(folder))
        return TrainedPlayer(name, identity, partial(_policy, place, game))

    return {game: [player(place, game) for place in weights.find_agents(folder, game)] for game in games}


def _policy(place: Path, game: str) -> Policy:
    """The greedy policy of an agent, loaded in a process that records."""
    training.cache_compiled_programs()
    agent = load_agent(place)
    return lambda stack: int(agent.look(game, stack[None]).best[0])


def _offline(p: Any, source: transfer.Source) -> _Built:
    """The network of a run of `04_scaled_training` or `06_transfer`, as its parameters and checkpoint describe it."""
    settings = transfer.training_parameters(p, source) if isinstance(p, parameters.Transfer) else p
    method, games = methods.make(settings), source.about["games"]
    names = ("heads", "num_atoms", "hidden_sizes", "embedding", "normalize_features", "group_size", "dtype")
    architecture = {name: getattr(settings, name) for name in names}
    if settings.subtract_mean_frames:
        architecture["mean_frames"] = np.zeros((len(games), 84, 84), np.float32)  # the checkpoint has them
    build = partial(method.build, settings.encoder, len(games), **architecture)
    atoms = losses.support(settings.v_min, settings.v_max, settings.num_atoms)
    return _abstract(method, build, atoms, own_networks=False)


def _online(p: parameters.OnlineAgents) -> _Built:
    """The network of a run of `02_online_agents`."""
    atoms, own = losses.support(-p.v_max, p.v_max, p.num_atoms), p.learner == "independent"
    plain = {"normalize_features": False, "layer_norm": False, "dtype": p.dtype, "hidden_sizes": p.hidden_sizes}
    heads = 1 if own else len(p.games)
    build = partial(networks.make_q_network, p.encoder, heads, p.head, num_atoms=p.num_atoms, **plain)
    return _abstract(methods.q_learning(head=p.head, alpha=0.0, atoms=atoms), build, atoms, own)


def _abstract(method: Method, build: Any, atoms: jax.Array, own_networks: bool) -> _Built:
    graph, variables = nnx.split(nnx.eval_shape(build), nnx.Param)  # nothing is drawn or compiled
    support = np.asarray(atoms) if method.distributions else None
    return _Built(method, graph, nnx.to_pure_dict(variables), support, own_networks)


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
