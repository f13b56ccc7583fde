"""A trained network as it is on disk: a run's checkpoint, an exported folder, or a file of Atari Agents.

An exported folder (`model_card.export`) has ``model.safetensors``, the parameters by their path, and ``config.json``.

Atari Agents (Gogianu et al., 2022, github.com/floringogianu/atari-agents) are DQN, M-DQN and C51 agents of 60 games,
51 checkpoints a seed: files ``GAME/SEED/model_STEP.gz``, gzip over what PyTorch saved, whose ``estimator_state`` holds
Mnih et al.'s (2015) network. They are read by PyTorch's loader of weights, which is meant to execute nothing of a file.
Ways around that were found (CVE-2025-32434, CVE-2026-24747); versions that are older than the remedies are refused.
Their frames were scaled down before the maximum over two was taken, ours are after it.
"""

import gzip
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scaled_ql import parameters, runs, training
from scaled_ql.games import NUM_ACTIONS, UnknownGame, action_names
from scaled_ql.training import CheckpointError

FORMAT, FORMAT_VERSION = "scaled-ql model", 1
CONFIG, TENSORS = "config.json", "model.safetensors"
NEEDED = {"name", "step", "games", "about", "parameters", "sha256"}  # of a configuration, to open the model
SAFE_TORCH = (2, 10)  # the first version without known ways to execute code from weights
PUBLISHED = re.compile(r"model_(\d+)\.gz")  # of Atari Agents


class Trained(NamedTuple):
    """A trained network.

    Attributes:
        name: notebook and run, or the end of a file's path.
        where: the checkpoint's folder, the exported folder, or the file.
        step: gradient steps; in a file of Atari Agents, the number in its name.
        about: how the network was built: `about` of `training.Checkpoints`, ``games`` among it.
        params: arrays by their path, as of `training.flat_params`.
        parameters: of its run, as stored, and where they stand.
        checkpoints: steps of all checkpoints that are there, ascending.
    """

    name: str
    where: Path
    step: int
    about: dict[str, Any]
    params: dict[str, np.ndarray]
    parameters: tuple[dict[str, Any], Path]
    checkpoints: list[int]

    @property
    def notebook(self) -> str:
        """The notebook that trained it."""
        if "learner" in self.about:
            return "02_online_agents"
        return "06_transfer" if "initial" in self.parameters[0] else "04_scaled_training"

    def checked(self) -> parameters.Parameters:
        """The parameters of its run.

        Raises:
            ParameterError: they are not valid.
        """
        values, file = self.parameters
        return parameters.check(self.notebook, values, str(file))


def find(run: str | Path, home: Path) -> Path:
    """A run's folder, an exported folder or a file, given as such or by its name below the outputs folder `home`.

    Raises:
        RunError: there is none; the message suggests near ones.
    """
    for place in (Path(run), home / run):
        if place.is_file() or any((place / name).exists() for name in ("parameters.yaml", CONFIG)):
            return place.resolve()
    return runs.find(home, str(run), "checkpoints")


def read(place: Path, step: int | None = None) -> Trained:
    """Read what `find` found.

    Args:
        place: a run's folder, an exported folder or a file.
        step: gradient steps of the checkpoint; None: the newest.

    Raises:
        CheckpointError: there is no checkpoint, or none of that step; it names no games, or is damaged.
        ParameterError: the run's parameters cannot be read.
    """
    if not (place / "parameters.yaml").exists():
        trained = _published(place) if place.is_file() else _exported(place)
        if step not in (None, trained.step):
            raise CheckpointError(f"{place}: there is no checkpoint of step {step}, only of {trained.step}. Choose it.")
        return trained
    where, about, params = training.read_params(place / "checkpoints", step)
    if "games" not in about:
        raise CheckpointError(
            f"{where}: does not name the games of its heads. Choose a run of 04_scaled_training, 06_transfer or "
            "02_online_agents."
        )
    file, kept = place / "parameters.yaml", training.checkpoint_steps(where.parent)
    stored = parameters.load(file)
    return Trained(f"{place.parent.name}/{place.name}", where, int(where.name), about, params, (stored, file), kept)


def read_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of an exported folder; None if its ``config.json`` is of something else.

    Raises:
        CheckpointError: it cannot be read, or is of another version.
    """
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}). Export the model again.") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        return None
    if config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: is of version {config.get('format_version')}, expected {FORMAT_VERSION}. Export the model again."
        )
    if missing := NEEDED - config.keys():
        raise CheckpointError(f"{file}: does not say {', '.join(sorted(missing))}. Export the model again.")
    return config


def _exported(folder: Path) -> Trained:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    config = read_config(folder)
    if config is None:
        raise CheckpointError(f"{folder / CONFIG}: not of a model that `scaled-ql export model` wrote.")
    file = folder / TENSORS
    try:
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != config["sha256"]:
            raise ValueError("its contents differ from their SHA-256")
        params = load(content)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}). Copy or export the model again.") from error
    about, step = config["about"], config["step"]
    return Trained(config["name"], folder, step, about, params, (config["parameters"], folder / CONFIG), [step])


def _published(file: Path) -> Trained:
    """A file of Atari Agents: an agent of `02_online_agents` that was never run here."""
    named, game = PUBLISHED.fullmatch(file.name), file.parent.parent.name
    try:
        num_actions = len(action_names(game))
    except UnknownGame:
        named = None
    if named is None:
        raise CheckpointError(f"{file}: not named as Atari Agents name their files, GAME/SEED/model_STEP.gz.")
    params, atoms = from_atari_agents(_load_weights(file), num_actions, str(file))
    head = {"head": "mse"} if atoms is None else {"head": "c51", "num_atoms": len(atoms), "v_max": float(atoms[-1])}
    settings = {"run": file.name, "games": [game], "encoder": "nature", "hidden_sizes": [512], **head}
    about, step = settings | {"learner": "independent"}, int(named[1])
    return Trained("/".join(file.parts[-4:]), file, step, about, params, (settings, file), [step])


def _load_weights(file: Path) -> dict[str, np.ndarray]:
    """``estimator_state`` of a file of Atari Agents."""
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{file}: reading what PyTorch saved needs PyTorch ({error}); pip install -e 'lib[torch]'."
        ) from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < SAFE_TORCH:
        raise CheckpointError(
            f"{file}: PyTorch {torch.__version__} can be made to execute what a file of weights says; expected at "
            "least 2.10. pip install -e 'lib[torch]'."
        )
    try:
        with gzip.open(file) as stream:
            stored = torch.load(io.BytesIO(stream.read()), map_location="cpu", weights_only=True)
        return {name: tensor.numpy() for name, tensor in stored["estimator_state"].items()}
    except Exception as error:  # PyTorch raises many kinds
        raise CheckpointError(
            f"{file}: cannot be read as weights alone ({type(error).__name__}: {error}). It is damaged, or holds "
            "more than weights, which is not executed. Download it again, or leave it out."
        ) from error


def from_atari_agents(
    state: Mapping[str, np.ndarray], num_actions: int, where: str
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """The parameters of Atari Agents' network as those of ours.

    Theirs has channels before rows and columns, and a head as wide as the game's minimal action set.

    Args:
        state: their arrays by their names in PyTorch.
        num_actions: size of the game's minimal set.
        where: for the message of an error.

    Returns:
        arrays [1, ...] by their path, of a network of `online.agents.independent_learners`; the support of C51, None
        for DQN.

    Raises:
        CheckpointError: the arrays have other names or shapes; the support is not one of C51.
    """
    short = {name.removeprefix("_AtariNet__"): np.asarray(array, np.float32) for name, array in state.items()}
    atoms = short.pop("support", None)
    if atoms is not None and not _is_support(atoms):
        raise CheckpointError(f"{where}: support is {atoms}, expected ascending numbers at equal distances around 0.")
    width = 1 if atoms is None else len(atoms)
    shapes = {"features.0": (32, 4, 8, 8), "features.2": (64, 32, 4, 4), "features.4": (64, 64, 3, 3)}
    shapes |= {"head.0": (512, 64 * 7 * 7), "head.2": (num_actions * width, 512)}
    expected = {f"{name}.weight": shape for name, shape in shapes.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    for name in sorted(expected.keys() | short.keys()):
        ours, theirs = expected.get(name), short[name].shape if name in short else None
        if ours != theirs:
            raise CheckpointError(
                f"{where}: {name} is {theirs or 'absent'} there, expected {ours or 'none'} for {num_actions} actions. "
                "Only DQN, M-DQN and C51 agents with the game's minimal action set can be read."
            )
    params = {"embedding/kernel": np.ones((7, 7, 64), np.float32)}
    for number in (0, 2, 4):
        params[f"encoder/layers/layers/{number}/kernel"] = short[f"features.{number}.weight"].transpose(2, 3, 1, 0)
        params[f"encoder/layers/layers/{number}/bias"] = short[f"features.{number}.bias"]
    by_place = short["head.0.weight"].reshape(512, 64, 7, 7).transpose(2, 3, 1, 0)
    params |= {"hidden/0/kernel": by_place.reshape(-1, 512), "hidden/0/bias": short["head.0.bias"]}
    unused = (NUM_ACTIONS - num_actions) * width
    params["head_kernel"] = np.pad(short["head.2.weight"].T, ((0, 0), (0, unused)))[:, None]
    params["head_bias"] = np.pad(short["head.2.bias"], (0, unused))[None]
    return {path: np.ascontiguousarray(array)[None] for path, array in params.items()}, atoms


def _is_support(atoms: np.ndarray) -> bool:
    """Whether they are what `losses.support` makes of the last of them."""
    if atoms.ndim != 1 or len(atoms) < 2 or not 0 < atoms[-1] < np.inf:
        return False
    return np.allclose(atoms, np.linspace(-atoms[-1], atoms[-1], len(atoms)), rtol=0, atol=1e-5 * atoms[-1])


def find_agents(folder: Path, game: str) -> list[Path]:
    """Agents that play a game, exported or Atari Agents, anywhere in a folder, by gradient steps, then by path.

    Hidden files and folders, such as half-written exports, are left out.

    Raises:
        RunError: there are none, and the message names the games of which there are; or both kinds.
        CheckpointError: an exported folder's configuration cannot be read.
    """
    found: dict[str, list[tuple[int, Path]]] = {}

    def shown(pattern: str) -> Iterator[Path]:
        for file in folder.rglob(pattern):
            if not any(part.startswith(".") for part in file.relative_to(folder).parts):
                yield file

    for file in shown("model_*.gz"):
        if named := PUBLISHED.fullmatch(file.name):
            found.setdefault(file.parent.parent.name, []).append((int(named[1]), file))
    for file in shown(CONFIG):
        config = read_config(file.parent)
        for name in config["games"] if config else ():
            found.setdefault(name, []).append((config["step"], file.parent))
    if game not in found:
        there = f"there are agents of {', '.join(sorted(found))}" if found else "there are none"
        raise runs.RunError(
            f"{folder}: no agent of {game}; {there}. Expected folders of `scaled-ql export model`, or files "
            f"{game}/SEED/model_STEP.gz of Atari Agents."
        )
    if len({place.is_file() for _, place in found[game]}) > 1:
        raise runs.RunError(
            f"{folder}: has exported agents of {game} and files of Atari Agents, whose numbers count different steps: "
            "their order is not known. Keep them in two folders, and record from each."
        )
    return [place for _, place in sorted(found[game])]
