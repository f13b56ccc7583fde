"""Transfer: parts of a trained network go into a new one, for games that it has never seen (section 5.2, appendix B.4).

::

    source = transfer.load(run_folder)
    network = networks.make_q_network(num_games=1, head="c51", seed=seed, **source.architecture)
    optimizer = training.make_optimizer(5e-5, frozen=source.names("encoder"))  # or () to fine-tune all of it
    graph, state = transfer.init_state(network, optimizer, source, "encoder")

The paper transfers the visual encoder and begins the feed-forward part again. It does not say to which of the two the
spatial embedding belongs. Per-game mean frames are constants of the old network's games and stay with it, and so do the
embeddings of its games, where it has a shared head: they count as part of the head, and a new game has a new one.
"""

from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from flax import nnx

from scaled_ql import parameters, training
from scaled_ql.defaults import Parts
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


class TransferError(ValueError):
    """A part that does not fit the new network; the message names it, and both shapes."""


class Source(NamedTuple):
    """A trained Q-network, cloning network or masked autoencoder.

    Attributes:
        folder: of the checkpoint, named after its step.
        about: of the run: how the network was built, `games` and `dataset` that it was trained on, `method`, `seed`.
        params: arrays by their path in a `QNetwork`'s parameters, such as ``hidden/0/kernel``.
    """

    folder: Path
    about: dict[str, Any]
    params: dict[str, np.ndarray]

    @property
    def architecture(self) -> dict[str, Any]:
        """Keyword arguments of `networks.make_q_network` that build such a network, but for its games and its head."""
        return {name: self.about[name] for name in ARCHITECTURE}

    def in_words(self, game: str) -> str:
        """What it learned, from what, and whether the target game was part of that; a sentence or two."""
        about, games = self.about, self.about["games"]
        rewards = "" if about.get("rewards", "real") == "real" else f" with {about['rewards']} rewards"
        seen = f" **{game} is one of them**: this is no transfer to an unseen game." if game in games else ""
        return (
            f"{about['encoder']} trained by {about['method']}{rewards} on {', '.join(games)} for "
            f"{int(self.folder.name):,} steps, seed {about['seed']}.{seen}"
        )

    def names(self, parts: Parts) -> tuple[str, ...]:
        """The names of parameters to freeze, for `training.make_optimizer`; an embedding may have none.

        Raises:
            ValueError: no such parts.
        """
        return tuple(name for name in _modules(parts) if any(training.is_part(path, [name]) for path in self.params))


def _modules(parts: Parts) -> tuple[str, ...]:
    if parts not in MODULES:
        raise ValueError(f"parts = {parts!r}; there are {', '.join(map(repr, get_args(Parts)))}.")
    return MODULES[parts]


def load(run: str | Path) -> Source:
    """Read the network of a run's newest checkpoint; of ``bcq`` the Q-network.

    A masked autoencoder (``mae``) has no more than the encoder in common with a Q-network: `graft` refuses other parts.

    Args:
        run: the folder of a run of `04_scaled_training`, or of its checkpoints.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or it is not of a network that can be read here.
    """
    folder = Path(run)
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    where, about, params = training.read_params(folder)
    if "transformer" in about:
        raise CheckpointError(
            f"{where}: holds a transformer that {about['method']} trained; it has no Q-values, and no encoder that a "
            "Q-network could take. Choose a run of 04_scaled_training with another method, such as cql or bc."
        )
    missing = [name for name in (*ARCHITECTURE, "games", "method") if name not in about]
    if missing:
        raise CheckpointError(
            f"{where}: does not say how its network was built ({', '.join(missing)} missing). Choose a run of "
            "04_scaled_training."
        )
    if any(path.startswith("q/") for path in params):
        params = {path.removeprefix("q/"): leaf for path, leaf in params.items() if path.startswith("q/")}
    if not any(training.is_part(path, ["encoder"]) for path in params):
        raise CheckpointError(f"{where}: holds no encoder, only {', '.join(params)}. Choose another run.")
    return Source(where, about, params)


def training_of(source: Source) -> dict[str, Any]:
    """How a network was trained: its run's parameters, what its checkpoint says, and `steps`; for comparisons."""
    file = source.folder.parent.parent / "parameters.yaml"
    # A parameter that came after the run had its default's effect.
    stored = parameters.ScaledTraining().model_dump() | parameters.load(file) if file.exists() else {}
    learned = {name: value for name, value in stored.items() if name not in parameters.INCIDENTAL}
    return learned | source.about | {"steps": int(source.folder.name)}


def training_parameters(p: parameters.Transfer, source: Source) -> parameters.ScaledTraining:
    """The parameters of `04_scaled_training` that describe what a run of `06_transfer` trains: the source's network.

    Args:
        p: parameters of `06_transfer`; what both notebooks have is taken from here, online with `alpha` 0.
        source: of the new network's architecture.

    Raises:
        CheckpointError: the checkpoint was written by a version that did not say all of it.
    """
    names = type(p).model_fields.keys() & parameters.ScaledTraining.model_fields.keys()
    values = {name: getattr(p, name) for name in names}
    if missing := [name for name in FORM if name not in source.about]:
        raise CheckpointError(f"{source.folder}: does not say {', '.join(missing)}. Train the run again.")
    values |= {name: source.about[name] for name in FORM}
    values |= {"games_per_batch": 1, "transitions_per_game": p.batch_size}
    if p.setting == "online":
        values |= {"alpha": 0.0, "num_steps": p.updates, "eval_every": 0}
    return parameters.ScaledTraining.model_validate(values)


def graft(params: PyTree, source: Source, parts: Parts) -> PyTree:
    """Parameters of a new network with parts of an old one in place of its own.

    Args:
        params: of a new `QNetwork`, with any games and any head; not changed.
        source: from `load`.
        parts: ``encoder``, ``encoder + embedding`` (spatial), ``all but the head``.

    Returns:
        a new tree. What was not taken is that of `params`, mean frames in any case.

    Raises:
        ValueError: no such parts.
        TransferError: a part has other arrays in the two networks.
    """
    ours = training.flat_params(params)
    for name in _modules(parts):
        for path in sorted(path for path in ours.keys() | source.params.keys() if training.is_part(path, [name])):
            theirs, own = _shape(source.params.get(path)), _shape(ours.get(path))
            if theirs != own:
                raise TransferError(
                    f"part {name!r} does not fit: {path} is {theirs} in {source.folder}, {own} in the new network. "
                    "Build the new network as that one was, or take fewer parts."
                )
    taken = {path for path in ours if training.is_part(path, _modules(parts))}
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
    taken = _modules(parts) if source else ()
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
    network: QNetwork, optimizer: optax.GradientTransformation, source: Source | None, parts: Parts
) -> tuple[nnx.GraphDef, TrainState]:
    """`training.init_state`, with parts of an old network in the new one; without a source, from scratch.

    Raises:
        ValueError: no such parts.
        TransferError: as `graft`; or the networks' modules compute something else with the same arrays.
    """
    if source is None:
        return training.init_state(network, optimizer)
    own = {module.group_size for _, module in nnx.iter_modules(network) if isinstance(module, GroupNorm)}
    if own - {source.about["group_size"]}:
        raise TransferError(
            f"part 'encoder' does not fit: group_size is {source.about['group_size']} in {source.folder}, "
            f"{', '.join(map(str, own))} in the new network. Build the new network as that one was."
        )
    if parts == "all but the head" and network.normalize != source.about["normalize_features"]:
        raise TransferError(
            f"the features do not fit: normalize_features is {source.about['normalize_features']} in {source.folder}, "
            f"{network.normalize} in the new network. Build the new network as that one was, or take fewer parts."
        )
    graph, state = training.init_state(network, optimizer)
    return graph, graft_state(state, source, parts)
