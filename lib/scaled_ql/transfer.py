"""Transfer: parts of a trained network go into a new one, for games that it has never seen (section 5.2, appendix B.4).

::

    source = transfer.load(run_folder)
    network = networks.make_q_network(num_games=1, head="c51", seed=seed, **source.architecture)
    optimizer = training.make_optimizer(5e-5, frozen=source.names("encoder"))  # or () to fine-tune all of it
    graph, state = transfer.init_state(network, optimizer, source, "encoder")

The paper transfers the visual encoder and begins the feed-forward part again. It does not say to which of the two the
spatial embedding belongs. Per-game mean frames are constants of the old network's games and stay with it, and so do the
embeddings of its games, where it has a shared head: they count as part of the head, and a new game has a new one. A
decision transformer, the same for all games, is transferred as a whole (Lee et al., 2022); an encoder that `cpc`
trained goes into a fresh one.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from flax import nnx

from scaled_ql import parameters, training
from scaled_ql.defaults import METHODS, Parts
from scaled_ql.networks import QNetwork
from scaled_ql.networks.encoders import GroupNorm
from scaled_ql.training import CheckpointError, PyTree, TrainState

MODULES: dict[Parts, tuple[str, ...]] = {  # of a `QNetwork`
    "encoder": ("encoder",),
    "encoder + embedding": ("encoder", "embedding"),
    "all but the head": ("encoder", "embedding", "hidden", "layer_norm", "game_layer"),
}
# What a checkpoint's `about` says of how the network was built: arguments of `networks.make_q_network`.
ARCHITECTURE = ("encoder", "heads", "num_atoms", "hidden_sizes", "embedding", "normalize_features", "group_size")
FORM = (*ARCHITECTURE, "subtract_mean_frames", "dtype")  # and of what the network sees and how it computes


def _form(method: str) -> tuple[str, ...]:
    """Parameters of `04_scaled_training` that say how a method's network is built: a transformer, or a Q-network."""
    own = [name for name in (*training.ABOUT_TRANSFORMER, *training.LATER) if name in METHODS[method][1]]
    return (*own, "group_size", "dtype") if own else FORM


def built(settings: parameters.ScaledTraining) -> dict[str, Any]:
    """How the network is built that such parameters describe; networks that differ in it are not compared."""
    return {name: getattr(settings, name) for name in _form(settings.method)}


class TransferError(ValueError):
    """A part that does not fit the new network; the message names it, and both shapes."""


class Source(NamedTuple):
    """A trained Q-network, cloning network, transformer, or encoder in what pre-trained it.

    Attributes:
        folder: of the checkpoint, named after its step.
        about: of the run: how the network was built, `games` and `dataset` that it was trained on, `method`, `seed`.
        params: arrays by their path in a `QNetwork`'s, or that network's, parameters, such as ``hidden/0/kernel``.
    """

    folder: Path
    about: dict[str, Any]
    params: dict[str, np.ndarray]

    @property
    def is_transformer(self) -> bool:
        """Whether it is a decision transformer, or a cloning one."""
        return "transformer" in self.about

    @property
    def architecture(self) -> dict[str, Any]:
        """Keyword arguments of `Method.build` that build such a network, but for its games; heads are the method's."""
        return {name: self.about[name] for name in ARCHITECTURE}

    def in_words(self, game: str) -> str:
        """What it learned, from what, and whether the target game was part of that; a sentence or two."""
        about, games = self.about, self.about["games"]
        rewards = "" if about.get("rewards", "real") == "real" else f" with {about['rewards']} rewards"
        seen = f" **{game} is one of them**: this is no transfer to an unseen game." if game in games else ""
        network = f"Transformer {about['transformer']}" if self.is_transformer else about["encoder"]
        return (
            f"{network} trained by {about['method']}{rewards} on {', '.join(games)} for "
            f"{int(self.folder.name):,} steps, seed {about['seed']}.{seen}"
        )

    def names(self, parts: Parts) -> tuple[str, ...]:
        """The names of parameters to freeze, for `training.make_optimizer`; an embedding may have none.

        Raises:
            ValueError: no such parts.
        """
        modules = _modules(parts, self.params)
        return tuple(name for name in modules if any(training.is_part(path, [name]) for path in self.params))


def _modules(parts: Parts, paths: Iterable[str]) -> tuple[str, ...]:
    """The names of the parts in networks with parameters of such paths; mean frames are none."""
    if parts == "all":
        return tuple(dict.fromkeys(name for path in paths if (name := path.split("/")[0]) != "mean_frames"))
    if parts not in MODULES:
        raise ValueError(f"parts = {parts!r}; there are {', '.join(map(repr, get_args(Parts)))}.")
    return MODULES[parts]


def load(run: str | Path) -> Source:
    """Read the network of a run's newest checkpoint; of ``bcq`` the Q-network.

    A masked autoencoder (``mae``) has no more than the encoder in common with a Q-network: `graft` refuses other parts.
    So has what ``cpc`` trained with a decision transformer.

    Args:
        run: the folder of a run of `04_scaled_training`, or of its checkpoints.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or it is not of a network that can be read here.
    """
    folder = Path(run)
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    where, about, params = training.read_params(folder)
    missing = [name for name in (*ARCHITECTURE, "games", "method") if name not in about]
    if missing:
        raise CheckpointError(
            f"{where}: does not say how its network was built ({', '.join(missing)} missing). Choose a run of "
            "04_scaled_training."
        )
    if any(path.startswith("q/") for path in params):
        params = {path.removeprefix("q/"): leaf for path, leaf in params.items() if path.startswith("q/")}
    if "transformer" not in about and not any(training.is_part(path, ["encoder"]) for path in params):
        raise CheckpointError(f"{where}: holds no encoder, only {', '.join(params)}. Choose another run.")
    return Source(where, about, params)


def sources(p: parameters.Transfer, find: Callable[[str], Path]) -> tuple[Source | None, Source]:
    """What a run of `06_transfer` begins with: the trained network, and the one that the new network is built like.

    They are the same, but for a network from scratch, which has no trained one, and for an encoder that ``cpc``
    trained: that becomes the tokenizer of a decision transformer that is else built like `built_like`.

    Args:
        p: its parameters.
        find: name of a parameter -> the folder of the run that it names: `runs.trained_run`.

    Raises:
        CheckpointError: as `load`.
        TransferError: no network that plays can be built like that.
    """
    source = None if p.initial == "scratch" else load(find("initial"))
    if source and source.about["method"] != "cpc":
        return source, source
    like = load(find("built_like"))
    if like.about["method"] == "cpc" or (source and like.about["method"] != "dt"):
        raise TransferError(
            f"built_like = {p.built_like!r}: a network of {like.about['method']}. An encoder that cpc trained sees "
            "single frames, and goes into a decision transformer: name a run of method dt, for its size."
        )
    if source:
        tokenizer = {"tokenizer": source.about["encoder"], "group_size": source.about["group_size"]}
        like = like._replace(about=like.about | tokenizer)
    return source, like


def training_of(source: Source) -> dict[str, Any]:
    """How a network was trained: its run's parameters, what its checkpoint says, and `steps`; for comparisons."""
    file = source.folder.parent.parent / "parameters.yaml"
    # A parameter that came after the run had its default's effect.
    stored = parameters.ScaledTraining().model_dump() | parameters.load(file) if file.exists() else {}
    learned = {name: value for name, value in stored.items() if name not in parameters.INCIDENTAL}
    return learned | source.about | {"steps": int(source.folder.name)}


def training_parameters(p: parameters.Transfer, source: Source) -> parameters.ScaledTraining:
    """The parameters of `04_scaled_training` that describe what a run of `06_transfer` trains: the source's network.

    Transformers are trained by their own method, and play as the source does (`target_return` and the like); all other
    networks are trained by Q-learning.

    Args:
        p: parameters of `06_transfer`; what both notebooks have is taken from here, online with `alpha` 0.
        source: of the new network's architecture.

    Raises:
        CheckpointError: the checkpoint was written by a version that did not say all of it.
        TransferError: a transformer online.
    """
    names = type(p).model_fields.keys() & parameters.ScaledTraining.model_fields.keys()
    values = {name: getattr(p, name) for name in names}
    if source.is_transformer:
        if p.setting == "online":
            raise TransferError(
                f"{source.folder}: holds a transformer that {source.about['method']} trained, which learns from a "
                "dataset. Set setting to offline, or choose a run of a Q-network or a clone."
            )
        values["method"] = source.about["method"]
        known = parameters.ScaledTraining().model_dump() | training_of(source)
        values |= {name: known[name] for name in METHODS[values["method"]][1] if name != "rewards"}
    own = _form(values.get("method", "cql"))
    if missing := [name for name in own if name not in source.about | values]:
        raise CheckpointError(f"{source.folder}: does not say {', '.join(missing)}. Train the run again.")
    values |= {name: source.about[name] for name in own if name in source.about}
    values |= {"games_per_batch": 1, "transitions_per_game": p.batch_size}
    if p.setting == "online":
        values |= {"alpha": 0.0, "num_steps": p.updates, "eval_every": 0}
    return parameters.ScaledTraining.model_validate(values)


def graft(params: PyTree, source: Source, parts: Parts) -> PyTree:
    """Parameters of a new network with parts of an old one in place of its own.

    Args:
        params: of a new `QNetwork`, with any games and any head; not changed.
        source: from `load`.
        parts: ``encoder``, ``encoder + embedding`` (spatial), ``all but the head``, ``all``: of a transformer, or of a
            Q-network of as many games.

    Returns:
        a new tree. What was not taken is that of `params`, mean frames in any case.

    Raises:
        ValueError: no such parts.
        TransferError: a part has other arrays in the two networks.
    """
    ours = training.flat_params(params)
    modules = _modules(parts, ours | source.params)
    for name in modules:
        for path in sorted(path for path in ours.keys() | source.params.keys() if training.is_part(path, [name])):
            theirs, own = _shape(source.params.get(path)), _shape(ours.get(path))
            if theirs != own:
                raise TransferError(
                    f"part {name!r} does not fit: {path} is {theirs} in {source.folder}, {own} in the new network. "
                    "Build the new network as that one was, or take fewer parts."
                )
    taken = {path for path in ours if training.is_part(path, modules)}
    if not taken:
        raise TransferError(
            f"parts = {parts!r}: {source.folder} has nothing by the name of {', '.join(modules)}. A transformer is "
            "transferred as a whole: set parts to all."
        )
    leaves = [jnp.array(source.params[path]) if path in taken else leaf for path, leaf in ours.items()]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _shape(leaf: Any) -> str:
    return "absent" if leaf is None else f"{np.dtype(leaf.dtype).name} {list(leaf.shape)}"


def overview(params: PyTree, source: Source | None, parts: Parts, frozen: tuple[str, ...]) -> pd.DataFrame:
    """The parts of a new network, a row each.

    Args:
        params: of the new network.
        source, parts: as for `graft`; None of a network from scratch.
        frozen: as of `training.make_optimizer`.

    Returns:
        index part; columns parameters (how many numbers), from (``transferred`` or ``fresh``), trained (bool).
    """
    taken = _modules(parts, source.params) if source else ()
    rows: dict[str, dict[str, Any]] = {}
    for path, leaf in training.flat_params(params).items():
        part = path.split("/")[0]
        row = rows.setdefault(part, {"parameters": 0})
        row["parameters"] += leaf.size
        row["from"] = "transferred" if training.is_part(path, taken) else "fresh"
        row["trained"] = part != "mean_frames" and not training.is_part(path, frozen)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("part")


def graft_state(state: TrainState, source: Source, parts: Parts) -> TrainState:
    """The state of a run that has not begun, with parts of an old network in its own and its target network.

    Args, raises: as of `graft`.
    """
    params = graft(state.params, source, parts)
    return state._replace(params=params, target_params=jax.tree.map(jnp.copy, params))  # steps donate both


def init_state(
    network: nnx.Module, optimizer: optax.GradientTransformation, source: Source | None, parts: Parts
) -> tuple[nnx.GraphDef, TrainState]:
    """`training.init_state`, with parts of an old network in the new one; without a source, from scratch.

    Raises:
        ValueError: no such parts.
        TransferError: as `graft`; or the networks' modules compute something else with the same arrays.
    """
    if source is None:
        return training.init_state(network, optimizer)
    if isinstance(network, QNetwork) and source.is_transformer:
        raise TransferError(
            f"{source.folder}: holds a transformer that {source.about['method']} trained; it has no Q-values, and no "
            "encoder that a Q-network could take. Choose a run with another method, such as cql or bc."
        )
    own = {module.group_size for _, module in nnx.iter_modules(network) if isinstance(module, GroupNorm)}
    if own - {source.about["group_size"]}:
        raise TransferError(
            f"part 'encoder' does not fit: group_size is {source.about['group_size']} in {source.folder}, "
            f"{', '.join(map(str, own))} in the new network. Build the new network as that one was."
        )
    whole = isinstance(network, QNetwork) and parts in ("all but the head", "all")
    if whole and network.normalize != source.about["normalize_features"]:
        raise TransferError(
            f"the features do not fit: normalize_features is {source.about['normalize_features']} in {source.folder}, "
            f"{network.normalize} in the new network. Build the new network as that one was, or take fewer parts."
        )
    graph, state = training.init_state(network, optimizer)
    return graph, graft_state(state, source, parts)
