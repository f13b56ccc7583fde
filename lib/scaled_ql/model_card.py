"""A trained agent as a folder to share: its parameters, what it needs to play, and a model card.

::

    FOLDER/
      model.safetensors   parameters by their path
      config.json         games and their actions, architecture, preprocessing, support, protocol, the run's parameters
      README.md           the card, with NumPy code that computes the action values of a convolutional network
"""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from scaled_ql import runs, weights
from scaled_ql.defaults import ENCODERS, GROUP_SIZE
from scaled_ql.environments import FRAME_SKIP, OBSERVATION, STACK_SIZE
from scaled_ql.evaluation import mean_interval
from scaled_ql.games import action_names
from scaled_ql.metrics import digits
from scaled_ql.trained_agent import Agent, load_agent
from scaled_ql.weights import Trained

TRANSFORMER = ("transformer", "sequence_length", "tokenizer", "group_size", "dtype")
ARCHITECTURE = (
    "encoder", "hidden_sizes", "embedding", "normalize_features", "group_size", "subtract_mean_frames", "head", "heads",
    "num_atoms", "dtype",
)  # fmt: skip
CLONES = ("bc", "return_bc")  # whose head is the method's, whatever the parameter says


def export(run: str | Path, folder: str | Path, step: int | None = None, outputs: str | Path = "") -> Path:
    """Write the agent of a run to a new folder, which `trained_agent.load_agent` opens like the run.

    Args:
        run: of `04_scaled_training`, `06_transfer` or `02_online_agents`; see `load_agent`.
        folder: to write; its parents are made.
        step: gradient steps of the checkpoint; None: the newest.
        outputs: the outputs folder; "" is the workspace's.

    Raises:
        RunError: the folder exists; what is named is no run, cannot play, or plays only as another run does.
        CheckpointError, ParameterError: see `load_agent`.
    """
    from safetensors.numpy import save

    folder = Path(folder).resolve()
    if folder.exists():
        raise runs.RunError(f"{folder}: exists. Choose another folder, or delete it.")
    source = weights.find(run, Path(outputs) if outputs else runs.workspace() / "outputs")
    if not (source / "parameters.yaml").exists():
        raise runs.RunError(f"{source}: not a run's folder, so nothing is known of how it was trained. Name a run.")
    trained = weights.read(source, step)
    agent = load_agent(source, trained.step)
    if agent.memory and trained.notebook == "06_transfer":
        raise runs.RunError(
            f"{source}: a transformer of 06_transfer asks for returns as the run that it began with, which an exported "
            "folder does not have. Export that run, or share both runs' folders."
        )
    content = save(trained.params)
    config = describe(trained, agent) | {"sha256": hashlib.sha256(content).hexdigest()}
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        (partial / weights.TENSORS).write_bytes(content)
        runs.write_json(partial / weights.CONFIG, config)
        (partial / "README.md").write_text(card(trained, agent, config), encoding="utf-8")
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def describe(trained: Trained, agent: Agent) -> dict[str, Any]:
    """The contents of ``config.json``, without the checksum of the parameters."""
    stored, about = dict(trained.parameters[0]), trained.about
    stored.pop("outputs", None)  # a path of this machine
    known = stored | about
    if "learner" in about:  # of `02_online_agents`
        known |= {"embedding": "pointwise", "normalize_features": False, "heads": "per_game", "group_size": GROUP_SIZE}
    names = TRANSFORMER if agent.memory else ARCHITECTURE
    architecture = {name: known[name] for name in names if name in known and name not in _absent(known, agent)}
    if not agent.memory:
        architecture["layer_norm"] = any("layer_norm/" in path for path in trained.params)
    sees = {"window": agent.memory} if agent.memory else {"stack_size": STACK_SIZE}
    return {
        "format": weights.FORMAT,
        "format_version": weights.FORMAT_VERSION,
        "name": trained.name,
        "step": trained.step,
        "games": agent.games,
        "actions": {game: action_names(game) for game in agent.games},
        "architecture": architecture,
        "values": agent.values_name,
        "support": None if agent.atoms is None else agent.atoms.tolist(),
        "preprocessing": {"observation": OBSERVATION, "frame_skip": FRAME_SKIP} | sees,
        "protocol": agent.protocol,
        "about": about,
        "parameters": stored,
    }


def _absent(known: dict[str, Any], agent: Agent) -> set[str]:
    """Names of an architecture, of which parameters have a value, that stand for nothing in this network."""
    frames = known["tokenizer"] if agent.memory else known["encoder"]
    absent = set() if ENCODERS.get(frames, ("patches",))[0].startswith("resnet") else {"group_size"}
    absent |= {"num_atoms"} if agent.atoms is None else set()
    return absent | ({"head"} if known.get("method") in CLONES else set())


def card(trained: Trained, agent: Agent, config: dict[str, Any]) -> str:
    """The model card, Markdown."""
    folder = trained.parameters[1].parent
    made, summary = (runs.read_json(folder / f"{name}.json") for name in ("provenance", "summary"))
    about, architecture = trained.about, config["architecture"]
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates", encoding="utf-8")
    how = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, **how)
    return environment.get_template("model_card.md.j2").render(
        name=trained.name,
        step=trained.step,
        games=agent.games,
        facts=_facts(trained, agent, made, summary),
        command=runs.command(trained.notebook, trained.checked()),
        table=_scores(folder, trained, summary),
        protocol=_protocol(agent),
        preprocessing=config["preprocessing"],
        action_names=config["actions"],
        method=about.get("method", ""),
        architecture=architecture,
        family="transformer" if agent.memory else ENCODERS[architecture["encoder"]][0],
        mean_frames="mean_frames" in trained.params,
        shared=architecture.get("heads") == "shared",
        independent=about.get("learner") == "independent",
        distributions=agent.atoms is not None,
    )


def _facts(trained: Trained, agent: Agent, made: dict[str, Any], summary: dict[str, Any]) -> dict[str, str]:
    """What the card says of the training, in the order of its list."""
    about, p = trained.about, trained.checked()
    network = f"transformer {about['transformer']}, {agent.memory} steps" if agent.memory else about["encoder"]
    size = sum(array.size for array in trained.params.values())
    data, values = "what it experienced while it learned", agent.values_name
    if agent.dataset:
        data = agent.dataset + (f", view {agent.view}" if agent.view else "")
        data += f"; contents' id {made['dataset']}" if made.get("dataset") else ""
    if "learner" in about:
        method = f"online Q-learning, {about['learner']} learner, sticky actions {p.sticky_actions}"
    else:
        method = about["method"] + (f"; minimised {made['minimises']}" if "minimises" in made else "")
        method += f"; {about['rewards']} rewards" if about.get("rewards", "real") != "real" else ""
    if trained.notebook == "06_transfer":
        transferred = f"{p.parts} from {p.initial}{', frozen' if p.freeze else ''}"
        method += "; from scratch" if p.initial == "scratch" else f"; {transferred}"
    if agent.memory and agent.atoms is not None:
        values += f", of the return R that it asks for (target_return {p.target_return}), undiscounted, of rewards "
        values += "clipped to ±1"
    elif not agent.memory and about.get("method") not in CLONES:
        method += f"; head {about['head']}"
        values += f", discount {agent.discount} a step, of rewards clipped to ±1"
        scaled = {"auto": about["head"] == "mse", "yes": True, "no": False}[getattr(p, "scale_rewards", "auto")]
        values += " and divided by their standard deviation in the game's data" if scaled and "method" in about else ""
    if summary.get("as_parameters_say") is False:
        method += ". **Its notebook trained it with a loss of its own**, which its parameters do not tell"
    dirty = ", with changes that were not committed" if made.get("git_dirty") else ""
    return {
        "Games": ", ".join(agent.games),
        "Data": data,
        "Method": method,
        "Network": f"{network}, {size:,} parameters",
        "Seed": f"{p.seed}; one training run",
        "Values": values,
        "Code": f"commit {made['git_commit']}{dirty}" if made.get("git_commit") else "commit not known",
        "Licence": _licence(),
    }


def _licence() -> str:
    for file in sorted(runs.workspace().glob("LICEN[CS]E*")):
        lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
        return next(filter(None, lines), file.name)
    return "the workspace that made it states none; ask its authors before you pass it on"


def _scores(folder: Path, trained: Trained, summary: dict[str, Any]) -> str:
    """Mean raw returns with intervals, a Markdown table; games that were not evaluated at this step have dashes."""
    newest = trained.step == trained.checkpoints[-1]
    evaluated: int | None = trained.step
    if getattr(trained.checked(), "setting", "") == "online":  # its evaluations are named by transitions, not by steps
        measured = newest and summary.get("updates") == trained.step
        evaluated = summary["steps"] if measured else None
    rows, known = [], summary.get("games", {})
    for game in trained.about["games"]:
        file = folder / "evaluation" / f"step-{evaluated}" / f"{game}.csv"
        file = folder / "evaluation" / f"{game}.csv" if newest and not file.exists() else file
        row = dict.fromkeys(("mean return", "95% interval", "episodes", "truncated"), "–")
        if file.exists():
            played = pd.read_csv(file)
            low, high = mean_interval(played["episode_return"])
            row = {"mean return": digits(played["episode_return"].mean())}
            row |= {"95% interval": f"{digits(low)} to {digits(high)}"}
            row |= {"episodes": str(len(played)), "truncated": f"{played['truncated'].mean():.0%}"}
        of_game = known.get(game, {}) if isinstance(known, dict) else {}
        for title, name in (("data", "dataset_return"), ("random", "random_return")):
            row[title] = "–" if of_game.get(name) is None else digits(of_game[name])
        rows.append({"game": game} | row)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _protocol(agent: Agent) -> str:
    p = agent.protocol
    variant = "".join(f", {name} {p[name]}" for name in ("mode", "difficulty") if p[name] is not None)
    drawn = "actions drawn from its policy, " if p["temperature"] else ""
    return (
        f"Mean raw returns of whole episodes, {drawn}{p['epsilon']:.4g} of the moves random, sticky actions "
        f"{p['sticky_actions']:g}, at most {p['max_steps']:,} steps{variant}. Intervals are bootstraps over these "
        "episodes: how well this agent was measured, not how well training repeats. *Data* and *random* are the mean "
        "returns of the training data and of random play. A dash: not measured."
    )
