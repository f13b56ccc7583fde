"""The paper's systems compared with ours: raw scores, printed numbers, and the tables behind its figures.

Scores are tidy: a row per system, run and game, columns system, run, game, agent_return and human_normalized (a
fraction). The paper has one run of each system, so its intervals can only come from resampling games.
"""

import functools
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from scaled_ql import defaults, metrics
from scaled_ql.games import TRAINING_GAMES, reference_score
from scaled_ql.parameters import INCIDENTAL

Setting = Literal["sub_optimal", "near_optimal"]
SETTINGS: dict[str, str] = {"sub_optimal": "Sub-optimal data", "near_optimal": "Near-optimal data"}
SCALED_QL, DT, BEHAVIOUR = "Scaled QL (80M)", "DT (200M)", "Behaviour policy"
STATISTICS = {"median": metrics.median, "IQM": metrics.iqm}
PRINTED: dict[tuple[str, str, str], float] = {
    ("sub_optimal", BEHAVIOUR, "IQM"): 0.51,  # section 3; the caption of Table C.1
    ("sub_optimal", DT, "IQM"): 0.306,  # the caption of Figure 5, here and below
    ("sub_optimal", SCALED_QL, "IQM"): 0.778,
    ("near_optimal", BEHAVIOUR, "IQM"): 0.935,  # section 3
    ("near_optimal", DT, "median"): 0.782,  # the caption of Figure A.2, here and below
    ("near_optimal", DT, "IQM"): 1.118,
    ("near_optimal", SCALED_QL, "median"): 0.989,
    ("near_optimal", SCALED_QL, "IQM"): 1.141,
}

METHODS = {
    "cql": "Scaled QL", "bcq": "Discrete BCQ", "bc": "BC", "return_bc": "Return-conditioned BC", "dt": "DT",
    "bc_transformer": "BC transformer", "mae": "MAE", "cpc": "CPC",
}  # fmt: skip
# Two runs that differ only in these are one system; `data_id`, not the path, identifies the data.
NO_PART_OF_A_SYSTEM = INCIDENTAL | {
    "dataset", "view", "num_parameters", "paper_parameters", "training_minutes", "device",
}  # fmt: skip


class Comparison(NamedTuple):
    """Systems of the paper and of ours that can be compared, as all have the same games.

    Attributes:
        title: description of the games, for a caption.
        games: games in the paper's order.
        scores: tidy scores, the paper's systems first.
    """

    title: str
    games: tuple[str, ...]
    scores: pd.DataFrame

    @property
    def own(self) -> list[str]:
        """Our systems."""
        return [system for system in self.scores["system"].unique() if system.endswith(", here")]


@functools.cache
def _tables() -> pd.DataFrame:
    table = pd.read_csv(resources.files("scaled_ql") / "data" / "paper_scores.csv")
    normalized = [metrics.human_normalized(game, score) for game, score in zip(table["game"], table["score"])]
    return table.rename(columns={"method": "system", "score": "agent_return"}).assign(
        run="paper", human_normalized=normalized
    )


def published(setting: Setting) -> pd.DataFrame:
    """Tidy scores of the paper's systems in all 40 games: Table C.1 (sub-optimal) or C.2 (near-optimal)."""
    table = _tables()
    rows = table.loc[table["dataset"] == setting, ["system", "run", "game", "agent_return", "human_normalized"]]
    systems = list(rows["system"].unique())
    order = sorted(systems, key=lambda system: (system == SCALED_QL, systems.index(system)))
    return rows.sort_values("system", key=lambda column: column.map(order.index), kind="stable", ignore_index=True)


def systems(runs: pd.DataFrame, view: str) -> pd.DataFrame:
    """Runs of a view with a further column, `system`: equal for runs that differ only in their seed.

    Its name has method and encoder, or the transformer's size, and, if those are not unique, the other differences.

    Args:
        runs: `ablations.Gathered.runs`; index the run's name, a column for each parameter, data_id,
            num_parameters, paper_parameters.
        view: view of the runs.
    """
    if runs.empty:
        return pd.DataFrame(columns=[*runs.columns, "system"])
    chosen = runs[runs["view"] == view].copy()
    what = chosen.drop(columns=[name for name in NO_PART_OF_A_SYSTEM if name in chosen]).map(_words)
    transformers = chosen["method"].isin([name for name, (_, own) in defaults.METHODS.items() if "transformer" in own])
    short = chosen["method"].map(METHODS) + ", " + chosen["encoder"].where(~transformers, chosen["transformer"])
    chosen["system"] = ""
    for name, rows in what.groupby(short, sort=False):
        differ = [column for column in rows if rows[column].nunique() > 1]
        for run, row in rows.iterrows():
            more = [f"{column.removesuffix('_id')} {row[column][:16]}" for column in differ]
            chosen.loc[run, "system"] = ", ".join([name, *more, "here"])
    return chosen


def _words(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def own_scores(runs: pd.DataFrame, scores: pd.DataFrame, view: str) -> pd.DataFrame:
    """Tidy scores of our systems trained on a view, in those of the paper's games that all runs of the system have.

    Args:
        runs: see `systems`.
        scores: `ablations.Gathered.scores`; columns run, game, agent_return, human_normalized.
        view: see `systems`.
    """
    columns = ["system", "run", "game", "agent_return", "human_normalized"]
    named = systems(runs, view)["system"]
    if named.empty:
        return pd.DataFrame(columns=columns)
    rows = scores[scores["run"].isin(named.index) & scores["game"].isin(TRAINING_GAMES)]
    rows = rows.dropna(subset="human_normalized").assign(system=lambda table: table["run"].map(named))
    common = rows.groupby(["system", "game"])["run"].transform("nunique") == rows["system"].map(named.value_counts())
    return rows.loc[common, columns].sort_values(["system", "run", "game"], ignore_index=True)


def describe(runs: pd.DataFrame, scores: pd.DataFrame, view: str) -> pd.DataFrame:
    """Describe our systems of a view: index system; the runs, their seeds, size, training, data and games.

    Sizes are counted as in the paper, encoder and first dense layer, and in all.

    Args:
        runs: see `systems`.
        scores: see `own_scores`.
        view: see `systems`.
    """
    compared = own_scores(runs, scores, view)
    rows = {}
    for system, table in systems(runs, view).groupby("system"):
        games = compared.loc[compared["system"] == system, "game"].unique()
        measured = scores[scores["run"].isin(table.index)]
        others = set(measured["game"]) - set(games)
        rows[system] = {
            "runs": ", ".join(map(str, table.index)),
            "seeds": ", ".join(map(str, sorted(table["seed"]))),
            "parameters, millions": table["paper_parameters"].iloc[0] / 1e6,
            "in all, millions": table["num_parameters"].iloc[0] / 1e6,
            "gradient steps": table["num_steps"].iloc[0],
            "data": str(table["data_id"].iloc[0]),
            "games compared": f"{len(games)} of {len(TRAINING_GAMES)}",
            "its other games": ", ".join(sorted(others)) or "–",
            "episodes a game": measured["episodes"].min(),
            "truncated, %": 100 * measured["truncated"].mean(),
            "ε": f"{table['eval_epsilon'].iloc[0]:g}",
            "steps an episode, at most": table["eval_max_steps"].iloc[0],
        }
    return pd.DataFrame(rows).T.infer_objects().rename_axis("system")


def compare(theirs: pd.DataFrame, own: pd.DataFrame) -> list[Comparison]:
    """Group the paper's systems with ours by set of games: scores in different games are never mixed.

    Args:
        theirs: from `published`.
        own: from `own_scores`; may be empty.

    Returns:
        first the comparison in all 40 games, even if none of our systems has them; then the others, largest first.
    """
    games = own.groupby("system")["game"].agg(frozenset)
    whole = frozenset(TRAINING_GAMES)
    found: list[Comparison] = []
    for subset in sorted({whole, *games}, key=lambda some: (-len(some), sorted(some))):
        rows = own[own["system"].isin(games.index[games == subset])]
        some = tuple(game for game in TRAINING_GAMES if game in subset)
        title = f"all {len(some)} games" if subset == whole else f"{len(some)} of {len(whole)} games"
        if len(some) <= 4:
            title += f" ({', '.join(some)})"
        same = sum(other.title.startswith(title) for other in found)
        parts = [theirs[theirs["game"].isin(subset)], *([rows] if len(rows) else [])]
        found.append(Comparison(f"{title}, set {same + 1}" if same else title, some, pd.concat(parts)))
    return found


def _runs_and_games(rows: pd.DataFrame, value: str = "human_normalized") -> np.ndarray:
    """One system's values as [runs, games]."""
    return rows.pivot(index="run", columns="game", values=value).to_numpy(np.float64)


def aggregates(
    scores: pd.DataFrame,
    replicates: int = 50_000,
    seed: int = 0,
    statistics: Mapping[str, metrics.Statistic] = STATISTICS,
) -> pd.DataFrame:
    """Median and IQM of each system, or other statistics, with 95% bootstrap intervals over games.

    Args:
        scores: tidy, all systems in the same games.
        replicates: see `metrics.interval`.
        seed: see `metrics.interval`.
        statistics: by name.

    Returns:
        columns system, statistic, value, low, high (fractions), games, runs.

    Raises:
        ValueError: systems with different games.
    """
    if scores.groupby("system")["game"].agg(frozenset).nunique() > 1:
        raise ValueError("these systems were not measured in the same games; see `compare`")
    rows = []
    for system, table in scores.groupby("system", sort=False):
        values = _runs_and_games(table)
        for name, statistic in statistics.items():
            low, high = metrics.interval(values, statistic, replicates, seed=seed, over="tasks")
            row = {"system": system, "statistic": name, "value": statistic(values), "low": low, "high": high}
            rows.append(row | {"games": values.shape[1], "runs": values.shape[0]})
    return pd.DataFrame(rows)


def with_printed(table: pd.DataFrame, setting: Setting) -> pd.DataFrame:
    """Aggregates in all 40 games with the paper's printed values in a separate column, and its behaviour policy last.

    No scores of single games are published for the behaviour policy: its `value` is the printed one.

    Args:
        table: from `aggregates`.
        setting: the paper's data.
    """
    keys = zip(table["system"], table["statistic"])
    table = table.assign(printed=[PRINTED.get((setting, *key), np.nan) for key in keys])
    value = PRINTED[setting, BEHAVIOUR, "IQM"]
    behaviour = {
        "system": BEHAVIOUR,
        "statistic": "IQM",
        "value": value,
        "printed": value,
        "games": len(TRAINING_GAMES),
    }
    return pd.concat([table, pd.DataFrame([behaviour])], ignore_index=True)


def profiles(
    scores: pd.DataFrame,
    thresholds: Sequence[float] | np.ndarray,
    value: str = "human_normalized",
    replicates: int = 50_000,
    seed: int = 0,
) -> pd.DataFrame:
    """The fraction of games (and runs) in which each system's value is above each threshold, with 95% intervals.

    Args:
        scores: tidy scores.
        thresholds: thresholds of the value.
        value: column of the value.
        replicates: see `metrics.interval`; pointwise, over games.
        seed: see `metrics.interval`.

    Returns:
        columns system, threshold, fraction, low, high.
    """

    def above(values: np.ndarray) -> np.ndarray:  # one threshold at a time: all at once take gigabytes
        return np.stack([(values > threshold).mean((-2, -1)) for threshold in thresholds], axis=-1)

    parts = []
    for system, table in scores.groupby("system", sort=False):
        values = _runs_and_games(table, value)
        low, high = metrics.interval(values, above, replicates, seed=seed, over="tasks")
        parts.append(
            pd.DataFrame(
                {"system": system, "threshold": thresholds, "fraction": above(values), "low": low, "high": high}
            )
        )
    return pd.concat(parts, ignore_index=True)


def improvement(scores: pd.DataFrame, system: str, other: str = DT) -> pd.DataFrame:
    """Differences of two systems' human-normalised scores, game by game.

    A difference (0.5: half of a human's lead over a random player), not a ratio: the other's score may be near zero or
    negative.

    Args:
        scores: tidy scores of both systems in the same games.
        system: a system of `scores`; several runs are averaged.
        other: a system of `scores`.

    Returns:
        columns system, run, game, improvement; a row per game.
    """
    means = scores.groupby(["system", "game"])["human_normalized"].mean()
    gain = (means[system] - means[other]).rename("improvement").reset_index()
    return gain.assign(system=f"{system} over {other}", run="mean")[["system", "run", "game", "improvement"]]


def raw_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """Raw scores as Tables C.1 and C.2 show them: index game; a column per system (of several runs the mean), human."""
    names = list(scores["system"].unique())
    table = scores.pivot_table(index="game", columns="system", values="agent_return")[names]
    return table.assign(Human=[reference_score(game, "human") for game in table.index]).rename_axis(columns=None)


def claims() -> pd.DataFrame:
    """The paper's statements about these figures, recomputed from its own tables: columns claim, paper, recomputed."""
    scores = {setting: published(setting).groupby("system")["human_normalized"] for setting in SETTINGS}
    sub, near = ({name: scores[setting].get_group(name) for name in (SCALED_QL, DT)} for setting in SETTINGS)
    times = metrics.iqm(sub[SCALED_QL]) / metrics.iqm(sub[DT])
    more = {name: 100 * (best(near[SCALED_QL]) - best(near[DT])) for name, best in STATISTICS.items()}
    rows = [
        ("Sub-optimal data: IQM of Scaled QL, relative to DT (200M)", "about 2.5×", f"{times:.2f}×"),
        (
            "Sub-optimal data: games that Scaled QL plays better than a human",
            "40%",
            f"{(sub[SCALED_QL] > 1).mean():.1%}",
        ),
        ("Near-optimal data: IQM of Scaled QL above that of DT (200M)", "3%", f"{more['IQM']:.1f} points"),
        ("Near-optimal data: median of Scaled QL above that of DT (200M)", "20%", f"{more['median']:.1f} points"),
    ]
    return pd.DataFrame(rows, columns=["claim", "paper", "recomputed"])
