"""Finished training runs, gathered and compared: what they differ in, how well they play, how sure that is.

Runs are compared only where all that matters is equal but what a comparison names: the same data, the same evaluation,
the same steps. Seeds are what they are averaged over.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from scaled_ql import metrics, parameters, runs
from scaled_ql.games import UnknownGame
from scaled_ql.parameters import INCIDENTAL, ParameterError, Parameters

NOTEBOOK = "02_scaled_training"
VERDICT_COLUMNS = ("claim", "difference", "low", "high", "improvement", "verdict")


class GatherError(ValueError):
    """Runs that cannot stand in one table; the message names them."""


class Gathered(NamedTuple):
    """Runs of an outputs folder.

    Attributes:
        runs: index name of the run; all parameters, `data_id`, `num_parameters`.
        scores: columns run, game, agent_return (raw), human_normalized (a fraction, NaN where not known), episodes.
        left_out: columns run, why: unfinished, failed or unreadable runs.
    """

    runs: pd.DataFrame
    scores: pd.DataFrame
    left_out: pd.DataFrame


def gather(folder: Path) -> Gathered:
    """Read all runs of `02_scaled_training` below an outputs folder, which may have none."""
    found, scores, left_out = {}, [], []
    for place in sorted((folder / NOTEBOOK).glob("*/parameters.yaml")):
        name = place.parent.name
        try:
            status = runs.read_json(place.parent / "status.json")
        except runs.RunError as error:
            left_out.append({"run": name, "why": str(error)})
            continue
        if status.get("state") == "failed" and not runs.holds_results(place.parent):
            continue  # it reserves nothing, and is no run
        if status.get("state") != "finished":
            error = f": {status['error']}" if "error" in status else ""
            left_out.append({"run": name, "why": f"{status.get('state', 'not started')}{error}"})
            continue
        try:
            values = parameters.check(NOTEBOOK, parameters.load(place), f"{name}/{place.name}").model_dump()
        except ParameterError as error:
            left_out.append({"run": name, "why": f"made by another version: {error}"})
            continue
        summary = runs.read_json(place.parent / "summary.json")
        found[name] = values | {"data_id": summary["dataset"], "num_parameters": summary["parameters"]}
        for game, row in summary["games"].items():
            score = {"run": name, "game": game, "agent_return": row["agent_return"], "episodes": row["agent_episodes"]}
            scores.append(score | {"human_normalized": _normalized(game, row["agent_return"])})
    return Gathered(
        pd.DataFrame.from_dict(found, orient="index"),
        pd.DataFrame(scores, columns=["run", "game", "agent_return", "human_normalized", "episodes"]),
        pd.DataFrame(left_out, columns=["run", "why"]),
    )


def _normalized(game: str, score: float) -> float:
    try:
        return metrics.human_normalized(game, score)
    except UnknownGame:
        return float("nan")


def select(gathered: Gathered, base: Parameters, changes: Mapping[str, Any]) -> pd.DataFrame:
    """The finished runs that are `base` with some parameters changed, one per seed, sorted by seed.

    Raises:
        GatherError: two runs of one seed, or of different contents of the dataset.
    """
    wanted = base.model_dump() | dict(changes)
    chosen = gathered.runs
    for name in wanted.keys() - INCIDENTAL:
        if len(chosen):
            chosen = chosen[[value == wanted[name] for value in chosen[name]]]
    if not len(chosen):
        return chosen
    twice = chosen[chosen["seed"].duplicated(keep=False)]
    if len(twice):
        raise GatherError(f"runs {', '.join(twice.index)} have equal parameters and seeds; delete or move one of them.")
    _same_data(chosen)
    return chosen.sort_values("seed")


def _same_data(chosen: pd.DataFrame) -> None:
    contents = chosen.groupby("data_id").groups
    if len(contents) > 1:
        named = "; ".join(f"{key}: {', '.join(names)}" for key, names in contents.items())
        raise GatherError(
            f"runs trained on different contents of the dataset {chosen['dataset'].iloc[0]!r} ({named}). "
            "Compare runs of one recording: delete the others, or point outputs at a folder with one kind."
        )


def score_matrix(gathered: Gathered, names: Sequence[str], column: str = "human_normalized") -> pd.DataFrame:
    """Scores [runs, games] of some runs; games without reference scores have no human-normalised one and are left out.

    Raises:
        GatherError: runs of different games.
    """
    rows = gathered.scores[gathered.scores["run"].isin(names)]
    matrix = rows.pivot(index="run", columns="game", values=column).dropna(axis="columns", how="all").loc[list(names)]
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
    """An aggregate score, with its 95% interval, of each variant.

    Args:
        gathered: all runs.
        base: parameters that the variants change.
        variants: by label, the changes; ``{}`` is the base itself.
        across: one more parameter and its values, each combined with each variant.
        statistic: of `metrics`, of human-normalised scores [runs, games].
        replicates: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        columns variant, the parameter of `across`, runs (how many), seeds, score, low, high, over (``runs``, or
        ``tasks`` where there is one run), names (of the runs), num_parameters. Without runs: score and interval NaN.

    Raises:
        GatherError: see `select` and `score_matrix`.
    """
    ((axis, values),) = across.items() if across else (("", [None]),)
    rows, everyone = [], []
    for value, (label, changes) in product(values, variants.items()):
        chosen = select(gathered, base, dict(changes) | ({axis: value} if axis else {}))
        row = {"variant": label} | ({axis: value} if axis else {})
        row |= {"runs": len(chosen), "seeds": ", ".join(map(str, chosen["seed"])) if len(chosen) else ""}
        row |= {"score": np.nan, "low": np.nan, "high": np.nan, "over": "", "names": list(chosen.index)}
        if len(chosen):
            everyone.append(chosen)
            scores = score_matrix(gathered, chosen.index).to_numpy()
            over = "runs" if len(scores) > 1 else "tasks"
            low, high = metrics.interval(scores, statistic, replicates, seed=seed, over=over)
            row |= {"score": float(statistic(scores)), "low": float(low), "high": float(high), "over": over}
            row["num_parameters"] = int(chosen["num_parameters"].iloc[0])
        rows.append(row)
    if everyone:
        _same_data(pd.concat(everyone))
    return pd.DataFrame(rows)


def shown(compared: pd.DataFrame, paper: pd.DataFrame | None = None) -> pd.DataFrame:
    """The table of `compare` for people: percent, interval, number of runs; "missing" where there is no run.

    Args:
        compared: from `compare`.
        paper: from `paper_table`, matching in variant and, where there is one, encoder: a column of its own.
    """
    percent = 100 * compared[["score", "low", "high"]]
    table = compared[[name for name in compared.columns[:2] if name != "runs"]].copy()
    table["score, %"] = [f"{score:.1f}" if score == score else "missing" for score in percent["score"]]
    limits = zip(percent["low"], percent["high"])
    table["95% interval"] = [f"{low:.1f} to {high:.1f}" if low == low else "" for low, high in limits]
    counts = zip(compared["runs"], compared["over"])
    table["of"] = [f"{n} run{'s' if n > 1 else ''}, over {over}" if n else "" for n, over in counts]
    if paper is not None:
        keys = [name for name in paper if name in table]
        others = paper[~paper.set_index(keys).index.isin(table.set_index(keys).index)]  # that were not tried here
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
    """Of two variants, how much better the first is, with a 95% interval over runs, and a verdict.

    Args:
        gathered, compared: as given to, and returned by, `compare`.
        first, second: labels of variants.
        statistic, replicates, seed: as for `compare`.

    Returns:
        a row for each value of the other parameter (one row without): difference, low, high, improvement (probability
        that a run of the first beats one of the second in a game), verdict: ``yes`` (the first is better: the interval
        lies above 0), ``no`` (below 0), ``cannot tell``, or ``missing``.
    """
    axis = [name for name in compared.columns[1:2] if name != "runs"]
    rows = []
    for value in compared[axis[0]].unique() if axis else [None]:
        here = compared[compared[axis[0]] == value] if axis else compared
        one, other = (here.loc[here["variant"] == label, "names"].iloc[0] for label in (first, second))
        row = dict(zip(axis, [value])) | {"claim": f"{first} > {second}", "verdict": "missing"}
        if len(one) > 1 and len(other) > 1:
            pair = [score_matrix(gathered, names) for names in (one, other)]
            if list(pair[0].columns) != list(pair[1].columns):
                raise GatherError(f"{first} and {second} were not measured in the same games.")
            scores, others = (matrix.to_numpy() for matrix in pair)
            low, high = metrics.difference_interval(scores, others, statistic, replicates, seed=seed)
            row |= {"difference": float(statistic(scores) - statistic(others)), "low": float(low), "high": float(high)}
            row["improvement"] = float(metrics.probability_of_improvement(scores, others))
            row["verdict"] = "yes" if low > 0 else "no" if high < 0 else "cannot tell"
        rows.append(row)
    return pd.DataFrame(rows, columns=[*axis, *VERDICT_COLUMNS])


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
        compared, base, variants: as given to, and returned by, `compare`.
        source: the file of `params/02_scaled_training/` that holds `base`.
        axis: the parameter of `across`, or "".
        seeds: that every variant should have.
    """
    commands = []
    for row in compared.to_dict("records"):
        there = row["seeds"].split(", ")
        for seed in (seed for seed in seeds if str(seed) not in there):
            changes = dict(variants[row["variant"]]) | ({axis: row[axis]} if axis else {}) | {"seed": seed}
            changes = {name: value for name, value in changes.items() if getattr(base, name) != value}
            options = "".join(f" -p {name} {value}" for name, value in changes.items())
            name = runs.cell_name(base, changes)
            commands.append(f"scaled-ql run {NOTEBOOK} params/{NOTEBOOK}/{source}{options} -p run {name}")
    return commands


def base(source: str) -> Parameters:
    """The checked parameters of a file of `params/02_scaled_training/`."""
    file = runs.workspace() / "params" / NOTEBOOK / source
    return parameters.check(NOTEBOOK, parameters.load(file), str(file))


def per_game(gathered: Gathered, compared: pd.DataFrame) -> pd.DataFrame:
    """Mean raw return per game (rows) of each variant of `compare` that has runs (columns)."""
    means = {
        row["variant"]: score_matrix(gathered, row["names"], "agent_return").mean()
        for row in compared.to_dict("records")
        if row["names"]
    }
    return pd.DataFrame(means).rename_axis("game")


def verdicts(differences: pd.DataFrame) -> list[str]:
    """What `difference` found, a sentence each."""
    words = {
        "yes": "supported here",
        "no": "contradicted here",
        "cannot tell": "cannot be told from these runs",
        "missing": "not tried here, runs are missing",
    }
    sentences = []
    for row in differences.to_dict("records"):
        where = next((f" ({row[name]})" for name in row if name not in VERDICT_COLUMNS), "")
        sentence = f"**{row['claim']}**{where}: {words[row['verdict']]}"
        if row["verdict"] != "missing":
            low, value, high = (100 * row[name] for name in ("low", "difference", "high"))
            sentence += f"; difference {value:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}"
        sentences.append(sentence + ".")
    return sentences
