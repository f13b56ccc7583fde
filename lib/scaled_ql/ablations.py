"""Finished training runs, gathered and compared: differences in parameters, scores and their uncertainty.

Runs are compared only if they share data, evaluation and steps, and everything else relevant that a comparison does not
name. Scores are averaged over seeds.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from scaled_ql import batches, metrics, parameters, runs
from scaled_ql.environments import MAX_STEPS
from scaled_ql.games import UnknownGame
from scaled_ql.parameters import INCIDENTAL, ParameterError, Parameters

NOTEBOOK = "04_scaled_training"
# Runs that differ in one of these are not comparable and never share a table.
PROTOCOL = frozenset((
    "eval_episodes", "eval_min_steps", "eval_epsilon", "eval_sticky_actions", "eval_max_steps", "eval_seed",
))  # fmt: skip
SCORE_COLUMNS = ("run", "game", "agent_return", "human_normalized", "episodes", "truncated", "cut")
# Rows of every comparison of Q-learning: neither learns from reward.
CONTROLS = {"zero rewards": {"rewards": "zero"}, "cloning": {"method": "bc"}}
# How Lee et al. (2022) train transformers, from memory of their paper: 2,048 windows a batch.
LEE = {
    "optimizer": "lamb", "learning_rate": 3.0e-4, "adam_epsilon": 1.0e-6, "warmup_steps": 4_000, "max_grad_norm": 1.0,
    "games_per_batch": 128, "transitions_per_game": 16, "random_shift": 4,
}  # fmt: skip
VERDICT_COLUMNS = ("claim", "difference", "low", "high", "improvement", "verdict", "refused")


class GatherError(ValueError):
    """Runs that cannot share a table; the message names them."""


class Gathered(NamedTuple):
    """Runs of an outputs folder.

    Attributes:
        runs: index name of the run; all parameters, `data_id`, `num_parameters` (in all), `paper_parameters` (as the
            paper counts, encoder and first dense layer), `training_minutes`; NaN of a run that did not record them;
            `device`, the kind of its devices, "" likewise.
        scores: columns run, game, agent_return (raw), human_normalized (a fraction, NaN where not known or cut),
            episodes, truncated (share of them), cut (whether most were truncated before the protocol's limit), actions
            (by name, their shares of the agent's own choices; empty where there is no table of its episodes), and
            whatever else the run's summary says of the game.
        left_out: columns run, why: unfinished, failed or unreadable runs, those with a loss of their own, those whose
            network cannot play.
    """

    runs: pd.DataFrame
    scores: pd.DataFrame
    left_out: pd.DataFrame


def gather(folder: Path, notebook: str = NOTEBOOK, asking: str = "") -> Gathered:
    """Read all runs of a notebook that trains, `04_scaled_training` or `06_transfer`, below an outputs folder.

    Args:
        folder: outputs folder.
        notebook: its name without ``.ipynb``.
        asking: the run that gathers; it counts as finished once it has a summary.
    """
    found, scores, left_out = {}, [], []
    for place in sorted((folder / notebook).glob("*/parameters.yaml")):
        name = place.parent.name
        try:
            status = runs.read_json(place.parent / "status.json")
        except runs.RunError as error:
            left_out.append({"run": name, "why": str(error)})
            continue
        if status.get("state") == "failed" and not runs.holds_results(place.parent):
            continue  # it recorded nothing
        if status.get("state") != "finished" and not (name == asking and (place.parent / "summary.json").exists()):
            error = f": {status['error']}" if "error" in status else ""
            left_out.append({"run": name, "why": f"{status.get('state', 'not started')}{error}"})
            continue
        try:
            values = parameters.check(notebook, parameters.load(place), f"{name}/{place.name}").model_dump()
        except ParameterError as error:
            left_out.append({"run": name, "why": f"made by another version: {error}"})
            continue
        summary = runs.read_json(place.parent / "summary.json")
        if not summary.get("as_parameters_say", True):
            left_out.append({"run": name, "why": "trained with a loss that its parameters do not name"})
            continue
        if not summary["games"]:
            left_out.append({"run": name, "why": "its network cannot play"})
            continue
        sizes = {"num_parameters": summary["parameters"], "paper_parameters": summary.get("paper_parameters", np.nan)}
        sizes["training_minutes"] = summary["steps"] / (summary.get("steps_per_second") or np.nan) / 60
        about = place.parent / "provenance.json"
        devices = runs.read_json(about).get("devices", []) if about.exists() else []
        sizes["device"] = ", ".join(sorted({one.partition(":")[2] for one in devices}))
        found[name] = values | {"data_id": summary["dataset"]} | sizes
        for game, row in summary["games"].items():
            score = row | {"run": name, "game": game, "episodes": row["agent_episodes"]}
            truncated = row.get("truncated_percent", 0) / 100
            cut = truncated > metrics.MOSTLY and values["eval_max_steps"] < MAX_STEPS
            normalized = float("nan") if cut else _normalized_or_nan(game, row["agent_return"])
            score |= {"human_normalized": normalized, "truncated": truncated, "cut": cut}
            scores.append(score | {"actions": _own_actions(place.parent, summary["steps"], game)})
    return Gathered(
        pd.DataFrame.from_dict(found, orient="index"),
        pd.DataFrame(scores, columns=None if scores else list(SCORE_COLUMNS)),
        pd.DataFrame(left_out, columns=["run", "why"]),
    )


def _own_actions(folder: Path, step: int, game: str) -> dict[str, float]:
    file = folder / "evaluation" / f"step-{step}" / f"{game}.csv"
    if not file.exists():
        return {}
    counts = pd.read_csv(file).filter(like="action_").sum()
    return {name.removeprefix("action_"): n / counts.sum() for name, n in counts.items()}


def _normalized_or_nan(game: str, score: float) -> float:
    try:
        return metrics.human_normalized(game, score)
    except UnknownGame:
        return float("nan")


def differences_from(
    gathered: Gathered, base: Parameters, changes: Mapping[str, Any], free: Iterable[str] = ()
) -> dict[str, dict[str, str]]:
    """Differences of each run from `base` with some parameters changed, except in name, folder, seed and the like.

    Args:
        gathered: all runs.
        base, changes: parameters of the wanted runs.
        free: parameters that may differ.

    Returns:
        by run, by parameter: "eval_episodes 3, not 10"; empty for a wanted run.
    """
    wanted = base.model_dump() | dict(changes)
    compared = sorted(wanted.keys() - INCIDENTAL - set(free))
    return {
        name: {field: f"{field} {run[field]}, not {wanted[field]}" for field in compared if run[field] != wanted[field]}
        for name, run in gathered.runs.iterrows()
    }


def select(gathered: Gathered, base: Parameters, changes: Mapping[str, Any], free: Sequence[str] = ()) -> pd.DataFrame:
    """The finished runs that are `base` with some parameters changed, one per seed, sorted by `free` and seed.

    Args:
        gathered: all runs.
        base, changes: parameters of the wanted runs.
        free: parameters that may differ, such as those of arms; then one run per seed and values of these.

    Raises:
        GatherError: two runs of one seed, or of different contents of the dataset.
    """
    differ, one_each = differences_from(gathered, base, changes, free), [*free, "seed"]
    chosen = gathered.runs.loc[[name for name, how in differ.items() if not how]]
    if not len(chosen):
        return chosen
    same_data(chosen)
    twice = chosen[chosen[one_each].duplicated(keep=False)]
    if len(twice):
        raise GatherError(f"runs {', '.join(twice.index)} have equal parameters and seeds; delete or move one of them.")
    return chosen.sort_values(one_each)


def otherwise_evaluated(
    gathered: Gathered, base: Parameters, changes: Mapping[str, Any], free: Sequence[str] = ()
) -> dict[str, str]:
    """Runs that differ from those of `select` only in their evaluation, and how: "eval_episodes 3, not 10"."""
    differ = differences_from(gathered, base, changes, free)
    return {name: ", ".join(how.values()) for name, how in differ.items() if how and how.keys() <= PROTOCOL}


def same_data(chosen: pd.DataFrame) -> None:
    """Refuse rows of `Gathered.runs` whose datasets have different contents.

    Raises:
        GatherError: they have.
    """
    contents = chosen.groupby("data_id").groups
    if len(contents) > 1:
        named = "; ".join(f"{key}: {', '.join(names)}" for key, names in contents.items())
        raise GatherError(
            f"runs trained on different contents of the dataset {chosen['dataset'].iloc[0]!r} ({named}). "
            "Compare runs of one recording: delete the others, or point outputs at a folder with one kind."
        )


def cut_games(gathered: Gathered, names: Sequence[str]) -> list[str]:
    """Games in which one of these runs has no score because most of its episodes were cut short."""
    scores = gathered.scores
    return sorted(scores.loc[scores["run"].isin(names) & scores["cut"].astype(bool), "game"].unique())


def score_matrix(
    gathered: Gathered, names: Sequence[str], column: str = "human_normalized", without: Sequence[str] = ()
) -> pd.DataFrame:
    """Scores [runs, games] of some runs; games without reference scores have no human-normalised one and are left out.

    Args:
        gathered: all runs.
        names: names of the runs.
        column: column of `Gathered.scores`.
        without: games to leave out, such as `cut_games`.

    Raises:
        GatherError: the runs have different games.
    """
    rows = gathered.scores[gathered.scores["run"].isin(names) & ~gathered.scores["game"].isin(without)]
    matrix = rows.pivot(index="run", columns="game", values=column).dropna(axis="columns", how="all")
    matrix = matrix.reindex(list(names))
    if matrix.isna().any(axis=None):
        raise GatherError(f"runs {', '.join(names)} were not measured in the same games.")
    return matrix


def compare(
    gathered: Gathered,
    base: Parameters,
    variants: Mapping[str, Mapping[str, Any]],
    across: Mapping[str, Sequence[Any]] | None = None,
    *,
    statistic: Callable[[np.ndarray], np.ndarray] = metrics.iqm,
    replicates: int = 50_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Aggregate score of each variant, with its 95% interval.

    Args:
        gathered: all runs.
        base: parameters that the variants change.
        variants: changes by label; ``{}`` is the base.
        across: one more parameter and its values, each combined with each variant.
        statistic: statistic from `metrics`, applied to human-normalised scores [runs, games].
        replicates: bootstrap replicates.
        seed: bootstrap seed.

    Returns:
        columns variant, the parameter of `across`, runs (number), seeds, score, low, high, over (``runs``, or ``tasks``
        for one run), names (of the runs), truncated (mean share of their episodes),
        top_action (share of the most frequent of their own actions, mean over runs and games), without (games left out
        of all scores, see `cut_games`), paper_parameters, num_parameters (see `Gathered`), otherwise (the runs of
        `otherwise_evaluated`, in words). Without runs or games, score and interval are NaN.

    Raises:
        GatherError: see `select` and `score_matrix`.
    """
    ((axis, values),) = across.items() if across else (("", [None]),)
    found = [
        ({"variant": label} | given, select(gathered, base, dict(changes) | given))
        for value, (label, changes) in product(values, variants.items())
        for given in [{axis: value} if axis else {}]
    ]
    without = cut_games(gathered, [name for _, chosen in found for name in chosen.index])
    rows, everyone = [], []
    for row, chosen in found:
        row |= {"runs": len(chosen), "seeds": ", ".join(map(str, chosen["seed"])) if len(chosen) else ""}
        row |= {"score": np.nan, "low": np.nan, "high": np.nan, "over": "", "names": list(chosen.index)}
        row |= {"truncated": np.nan, "top_action": np.nan, "without": ", ".join(without)}
        row |= {"paper_parameters": np.nan, "num_parameters": np.nan}
        changes = variants[row["variant"]] | ({axis: row[axis]} if axis else {})
        row["otherwise"] = [f"{name} ({how})" for name, how in otherwise_evaluated(gathered, base, changes).items()]
        if len(chosen):
            everyone.append(chosen)
            scores = score_matrix(gathered, chosen.index, without=without).to_numpy()
            row |= chosen[["paper_parameters", "num_parameters"]].iloc[0].to_dict()
            row["truncated"] = score_matrix(gathered, chosen.index, "truncated").to_numpy().mean()
            actions = gathered.scores.loc[gathered.scores["run"].isin(chosen.index), "actions"]
            row["top_action"] = actions.map(lambda shares: max(shares.values(), default=np.nan)).mean()
        if len(chosen) and scores.size:
            over = "runs" if len(scores) > 1 else "tasks"
            low, high = metrics.interval(scores, statistic, replicates, seed=seed, over=over)
            row |= {"score": float(statistic(scores)), "low": float(low), "high": float(high), "over": over}
        rows.append(row)
    if everyone:
        same_data(pd.concat(everyone))
    return pd.DataFrame(rows)


def shown(compared: pd.DataFrame, paper: pd.DataFrame | None = None) -> pd.DataFrame:
    """The table of `compare` for people: percent, interval, number of runs, truncated episodes, most frequent action.

    A score is "missing" without a run, "none" if most episodes were cut short in every game. Parameters are counted as
    in the paper, encoder and first dense layer, and in all.

    Args:
        compared: from `compare`.
        paper: from `paper_table`; shown in a separate column, matched by variant and, if there is one, encoder.
    """
    percent = 100 * compared[["score", "low", "high"]]
    table = compared[[name for name in compared.columns[:2] if name != "runs"]].copy()
    absent = ["none" if runs else "missing" for runs in compared["runs"]]
    table["score, %"] = [f"{score:.1f}" if score == score else no for score, no in zip(percent["score"], absent)]
    limits = zip(percent["low"], percent["high"])
    table["95% interval"] = [f"{low:.1f} to {high:.1f}" if low == low else "" for low, high in limits]
    counts = zip(compared["runs"], compared["over"])
    table["of"] = [
        f"{n} run{'s' if n > 1 else ''}{f', over {over}' if over else ''}" if n else "" for n, over in counts
    ]
    for name, title in {"paper_parameters": "parameters, millions", "num_parameters": "in all, millions"}.items():
        table[title] = [f"{size / 1e6:.1f}" if size == size else "" for size in compared[name]]
    for name, title in {"truncated": "truncated, %", "top_action": "most frequent action, %"}.items():
        table[title] = [f"{100 * share:.0f}" if share == share else "" for share in compared[name]]
    if compared["without"].any():
        table["without, as cut short"] = compared["without"]
    if paper is not None:
        keys = [name for name in paper if name in table]
        others = paper[~paper.set_index(keys).index.isin(table.set_index(keys).index)]  # not tried here
        table = (
            pd.concat([table.merge(paper, how="left", on=keys), others], ignore_index=True).astype(object).fillna("")
        )
    return table


def paper_table(table: str, statistic: str) -> pd.DataFrame:
    """A table of the paper: columns variant, encoder, "paper, %"."""
    with resources.files("scaled_ql").joinpath("data/paper_ablations.csv").open(encoding="utf-8") as file:
        rows = pd.read_csv(file, comment="#")
    rows = rows[(rows["table"].astype(str) == table) & (rows["statistic"] == statistic)]
    return rows[["variant", "encoder", "percent"]].rename(columns={"percent": "paper, %"}).reset_index(drop=True)


def difference(
    gathered: Gathered,
    compared: pd.DataFrame,
    first: str,
    second: str,
    *,
    statistic: Callable[[np.ndarray], np.ndarray] = metrics.iqm,
    replicates: int = 50_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Difference of two variants' scores, with a 95% interval over runs, and a verdict.

    Args:
        gathered, compared: argument and result of `compare`.
        first, second: labels of variants.
        statistic, replicates, seed: see `compare`.

    Returns:
        a row for each value of the other parameter (one row without): difference, low, high, improvement (probability
        that a run of the first beats one of the second in a game), verdict: ``yes`` (the first is better: the interval
        lies above 0), ``no`` (below 0), ``inconclusive``, ``missing``, ``refused`` (the missing runs were evaluated
        differently) or ``no score`` (most episodes were cut short), and refused (the runs of the last two, in words).
    """
    axis = [name for name in compared.columns[1:2] if name != "runs"]
    rows, without = [], cut_games(gathered, [name for names in compared["names"] for name in names])
    for value in compared[axis[0]].unique() if axis else [None]:
        here = compared[compared[axis[0]] == value] if axis else compared
        one, other = (here.loc[here["variant"] == label, "names"].iloc[0] for label in (first, second))
        row = dict(zip(axis, [value])) | {"claim": f"{first} > {second}", "verdict": "missing", "refused": ""}
        lacking = [label for label, names in ((first, one), (second, other)) if len(names) < 2]
        refused = sorted({run for runs in here.loc[here["variant"].isin(lacking), "otherwise"] for run in runs})
        if refused:
            row |= {"verdict": "refused", "refused": "; ".join(refused)}
        if len(one) > 1 and len(other) > 1:
            pair = [score_matrix(gathered, names, without=without) for names in (one, other)]
            if list(pair[0].columns) != list(pair[1].columns):
                raise GatherError(f"{first} and {second} were not measured in the same games.")
            if pair[0].empty:
                cut = [name for name in (*one, *other) if cut_games(gathered, [name])]
                rows.append(row | {"verdict": "no score", "refused": ", ".join(cut)})
                continue
            scores, others = (matrix.to_numpy() for matrix in pair)
            low, high = metrics.difference_interval(scores, others, statistic, replicates, seed=seed)
            row |= {"difference": float(statistic(scores) - statistic(others)), "low": float(low), "high": float(high)}
            row["improvement"] = float(metrics.probability_of_improvement(scores, others))
            row["verdict"] = "yes" if low > 0 else "no" if high < 0 else "inconclusive"
        rows.append(row)
    return pd.DataFrame(rows, columns=[*axis, *VERDICT_COLUMNS])


def imitation_by_transformers(size: str) -> dict[str, dict[str, Any]]:
    """Variants of `compare`: a decision and a cloning transformer of a size.

    Of a published size they are trained as `LEE` says, a ``tiny`` one as the base is.
    """
    how = {"transformer": size} | ({} if size == "tiny" else LEE)
    return {"decision transformer": {"method": "dt"} | how, "cloning transformer": {"method": "bc_transformer"} | how}


def transformer_q_learning(vit: str, resnet: str) -> dict[str, dict[str, Any]]:
    """Variants of `compare`: Q-learning with a ViT, and a ResNet beside it; with controls of the ViT.

    Args:
        vit: encoder; with attention pooling, encoder and first dense layer should have as many parameters as
        resnet: another encoder's.
    """
    pooled = {"encoder": vit, "embedding": "attention"}
    return {
        "ResNet": {"encoder": resnet},
        "ViT": pooled,
        "ViT, attention held": pooled | {"attention_temperature": 0.1},
        "ViT, pointwise embedding": {"encoder": vit},
        "zero rewards": pooled | {"rewards": "zero"},
        "cloning": {"encoder": vit, "method": "bc"},
    }


def missing(
    compared: pd.DataFrame,
    base: Parameters,
    source: str,
    variants: Mapping[str, Mapping[str, Any]],
    axis: str,
    seeds: Sequence[int],
) -> list[str]:
    """The commands that fill a table's missing runs.

    Args:
        compared, base, variants: result and arguments of `compare`.
        source: file of `params/04_scaled_training/` that holds `base`.
        axis: parameter of `across`, or "".
        seeds: seeds that every variant should have.
    """
    commands = []
    for row in compared.to_dict("records"):
        there = row["seeds"].split(", ")
        for seed in (seed for seed in seeds if str(seed) not in there):
            changes = dict(variants[row["variant"]]) | ({axis: row[axis]} if axis else {}) | {"seed": seed}
            changes = {name: value for name, value in changes.items() if getattr(base, name) != value}
            options = "".join(f" -p {name} {value}" for name, value in changes.items())
            name = batches.cell_name(base, changes)
            commands.append(f"scaled-ql run {NOTEBOOK} params/{NOTEBOOK}/{source}{options} -p run {name}")
    return commands


def base(source: str) -> Parameters:
    """The checked parameters of a file of `params/04_scaled_training/`."""
    file = runs.workspace() / "params" / NOTEBOOK / source
    return parameters.check(NOTEBOOK, parameters.load(file), str(file))


def per_game(gathered: Gathered, compared: pd.DataFrame) -> pd.DataFrame:
    """Mean raw return per game (rows) of each variant of `compare` that has runs (columns).

    If episodes were truncated, each variant has a further column, their share in percent.
    """
    means, cut = {}, bool((compared["truncated"] > 0).any())
    for row in compared.to_dict("records"):
        if row["names"]:
            means[row["variant"]] = score_matrix(gathered, row["names"], "agent_return").mean()
        if row["names"] and cut:
            share = score_matrix(gathered, row["names"], "truncated").mean()
            means[f"{row['variant']}, truncated %"] = 100 * share
    return pd.DataFrame(means).rename_axis("game")


def points(differences: pd.DataFrame) -> pd.DataFrame:
    """The table of `difference` for people: in points, as scores are in percent, without empty columns."""
    table = differences.copy()
    scores = ["difference", "low", "high"]
    table[scores] = 100 * table[scores].astype(float)
    table["improvement"] = [f"{share:.2f}" if share == share else "" for share in table["improvement"].astype(float)]
    return table if table["refused"].any() else table.drop(columns="refused")


def verdicts(differences: pd.DataFrame) -> list[str]:
    """The verdicts of `difference`, a sentence each."""
    words = {
        "yes": "supported here",
        "no": "contradicted here",
        "inconclusive": "inconclusive",
        "missing": "not tried here, runs are missing",
        "refused": "no verdict, these runs were evaluated otherwise: ",
        "no score": "no verdict, most episodes were cut short in ",
    }
    sentences = []
    for row in differences.to_dict("records"):
        where = next((f" ({row[name]})" for name in row if name not in VERDICT_COLUMNS), "")
        sentence = f"**{row['claim']}**{where}: {words[row['verdict']]}{row['refused']}"
        if row["verdict"] not in ("missing", "refused", "no score"):
            low, value, high = (100 * row[name] for name in ("low", "difference", "high"))
            sentence += f"; difference {value:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}"
        sentences.append(sentence + ".")
    return sentences
