"""Runs of `06_transfer` on one target, compared: from scratch, fine-tuned, frozen, from other initialisations.

Runs are siblings if they differ in nothing but where their network came from, which parts of it were taken or frozen,
the learning rate, and the seed. Equal in all of these but the seed, they are one *arm*.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scaled_ql import ablations, evaluation, metrics, parameters
from scaled_ql.ablations import Gathered
from scaled_ql.games import UnknownGame
from scaled_ql.paper import METHODS
from scaled_ql.parameters import INCIDENTAL, Parameters
from scaled_ql.reward_control import interval

NOTEBOOK = "06_transfer"
FREE = ("initial", "built_like", "parts", "freeze", "learning_rate")  # what siblings may differ in
SCRATCH = "scratch"
SCORE_COLUMNS = (
    "arm", "learning_rate", "run", "seed", "game", "mode", "difficulty", "agent_return", "random_return",
    "dataset_return", "truncated_share", "cut", "pretrained_on_target",
)  # fmt: skip
# What tells one pre-training from another, seeds apart; the first two are always named.
PRETRAINING = ("method", "rewards", "encoder", "hidden_sizes", "games", "dataset", "steps")


def gather(folder: Path, asking: str = "") -> Gathered:
    """The finished runs of `06_transfer` below an outputs folder, and the one asking; see `ablations.gather`."""
    return ablations.gather(folder, NOTEBOOK, asking)


def siblings(gathered: Gathered, base: Parameters) -> pd.DataFrame:
    """Scores of all finished runs on the target of one of them, a row per run.

    Args:
        gathered: from `gather`.
        base: parameters of any of them.

    Returns:
        columns `SCORE_COLUMNS`, sorted by arm, scratch first, and seed. Returns are raw means over episodes.
        `pretrained_on_target`: whether the target game was among those of the pre-training.

    Raises:
        GatherError: two runs of one arm and seed, or runs of different contents of the dataset.
    """
    chosen = ablations.select(gathered, base, {}, FREE)
    if chosen.empty:
        return nothing()
    table = gathered.scores[gathered.scores["run"].isin(chosen.index)].rename(columns={"truncated": "truncated_share"})
    about = chosen[["learning_rate", "seed", "mode", "difficulty"]].assign(arm=arm_names(chosen))
    about["pretrained_on_target"] = [
        bool(origin) and row["game"] in origin["games"]
        for origin, (_, row) in zip(chosen["pretrained"], chosen.iterrows())
    ]
    table = table.join(about, on="run").reindex(columns=list(SCORE_COLUMNS))
    order = table["arm"] != SCRATCH
    return table.assign(order=order).sort_values(["order", "arm", "learning_rate", "seed"], ignore_index=True)[
        list(SCORE_COLUMNS)
    ]


def nothing() -> pd.DataFrame:
    """The table of `siblings` where there are none."""
    return pd.DataFrame(columns=list(SCORE_COLUMNS))


def arm_names(chosen: pd.DataFrame) -> list[str]:
    """What each run's network is, in words that tell the arms apart: scratch; Scaled QL, fine-tuned; ...

    Args:
        chosen: rows of `Gathered.runs`.
    """
    origins = [origin or {} for origin in chosen["pretrained"]]
    parts = [parts if origin else None for parts, origin in zip(chosen["parts"], origins)]
    differ = [name for name in PRETRAINING[2:] if len({str(o.get(name)) for o in origins if o}) > 1]
    several = len({some for some in parts if some}) > 1
    names = []
    for origin, taken, freeze in zip(origins, parts, chosen["freeze"]):
        if not origin:
            names.append(SCRATCH)
            continue
        words = [METHODS.get(origin["method"], origin["method"])]
        words += [] if origin["rewards"] == "real" else [f"{origin['rewards']} rewards"]
        words += [f"{name} {_short(origin.get(name))}" for name in differ]
        words += [taken] if several else []
        names.append(", ".join([*words, "frozen" if freeze else "fine-tuned"]))
    return names


def _short(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def best_learning_rates(scores: pd.DataFrame) -> pd.DataFrame:
    """The rows of each arm's best learning rate, by mean return over seeds, as the paper reports online runs (B.4).

    The best of several noisy means is an optimistic estimate; it is taken for every arm alike.
    """
    means = scores.groupby(["game", "arm", "learning_rate"], sort=False)["agent_return"].mean()
    best = means.groupby(["game", "arm"], sort=False).idxmax()
    keys = pd.MultiIndex.from_frame(scores[["game", "arm", "learning_rate"]])
    return scores[keys.isin(list(best))].reset_index(drop=True)


def compare(scores: pd.DataFrame) -> pd.DataFrame:
    """Each arm's score on one target and its gain over scratch, with 95% t intervals over seeds.

    Args:
        scores: from `siblings`, of one target; each arm's best learning rate is taken.

    Returns:
        index arm; columns learning rate, seeds, mean return, low, high, DQN-normalised % (NaN where unknown or not the
        default variant), gain over scratch (raw), gain low, gain high (Welch's interval), gain %, truncated %.
        Intervals are NaN with fewer than two seeds; the gain is NaN where either arm is cut.
    """
    best, rows = best_learning_rates(scores), {}
    scratch = best[best["arm"] == SCRATCH]
    for arm, here in best.groupby("arm", sort=False):
        returns, row = here["agent_return"].to_numpy(), {}
        row["learning rate"], row["seeds"] = f"{here['learning_rate'].iloc[0]:g}", len(here)
        row["mean return"] = returns.mean()
        row["low"], row["high"] = interval(returns, np.zeros(1)) if len(returns) > 1 else (np.nan, np.nan)
        row["DQN-normalised %"] = 100 * dqn_normalized(here)
        row |= dict.fromkeys(("gain over scratch", "gain low", "gain high", "gain %"), np.nan)
        if arm != SCRATCH and len(scratch) and not (here["cut"].any() or scratch["cut"].any()):
            gain = returns.mean() - scratch["agent_return"].mean()
            row |= {"gain over scratch": gain, "gain %": 100 * gain / abs(scratch["agent_return"].mean() or np.nan)}
            if min(len(here), len(scratch)) > 1:
                row["gain low"], row["gain high"] = interval(returns, scratch["agent_return"].to_numpy())
        rows[arm] = row | {"truncated %": 100 * here["truncated_share"].mean()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("arm")


def dqn_normalized(scores: pd.DataFrame) -> float:
    """Mean DQN-normalised score of some rows of `siblings`; NaN where it is not known, or of another variant."""
    if (scores[["mode", "difficulty"]] >= 0).any(axis=None) or scores["cut"].any():
        return float("nan")
    try:
        return float(np.mean([metrics.dqn_normalized(*row) for row in zip(scores["game"], scores["agent_return"])]))
    except UnknownGame:
        return float("nan")


def verdict(compared: pd.DataFrame, name: str) -> str:
    """A sentence: which arms are better than a network from scratch, which worse, and which cannot be told.

    Args:
        compared: from `compare`.
        name: target.
    """
    judged = compared.dropna(subset=["gain low"]) if len(compared) else compared
    if judged.empty:
        return f"**{name}**: no verdict; it takes two seeds of a network from scratch and of another arm."
    told = {
        "better than scratch": judged["gain low"] > 0,
        "worse": judged["gain high"] < 0,
        "inconclusive": (judged["gain low"] <= 0) & (judged["gain high"] >= 0),
    }
    parts = [
        f"{words}: " + "; ".join(
            f"{arm} ({row['gain over scratch']:+.1f}, {row['gain low']:+.1f} to {row['gain high']:+.1f})"
            for arm, row in judged[chosen].iterrows()
        )
        for words, chosen in told.items() if chosen.any()
    ]  # fmt: skip
    return f"**{name}**: {'; '.join(parts)}."


def curves(folder: Path, scores: pd.DataFrame) -> pd.DataFrame:
    """Score against training steps of the runs in `scores`, each arm's best learning rate.

    Args:
        folder: outputs folder.
        scores: from `siblings`.

    Returns:
        columns arm, run, step, agent_return, truncated.
    """
    parts = []
    for row in best_learning_rates(scores).itertuples():
        curve = evaluation.score_curve(folder / NOTEBOOK / row.run / "evaluation")
        parts.append(curve[["step", "agent_return", "truncated"]].assign(arm=row.arm, run=row.run))
    columns = ["arm", "run", "step", "agent_return", "truncated"]
    return pd.concat(parts)[columns] if parts else pd.DataFrame(columns=columns)


def by_target(folder: Path) -> dict[str, pd.DataFrame]:
    """Scores of all finished runs of `06_transfer` below an outputs folder, a table of `siblings` per target.

    Returns:
        by `target`, in alphabetical order; where runs on one target differ in settings that siblings share, they are
        several sets, the second named ``..., set 2``.
    """
    gathered = gather(folder)
    shared = [name for name in parameters.Transfer.model_fields if name not in {*INCIDENTAL, *FREE}]
    found: dict[str, pd.DataFrame] = {}
    if gathered.runs.empty:
        return found
    for _, alike in gathered.runs.groupby(gathered.runs[shared].astype(str).agg(tuple, axis=1), sort=True):
        file = folder / NOTEBOOK / str(alike.index[0]) / "parameters.yaml"
        base = parameters.check(NOTEBOOK, parameters.load(file), str(file))
        number = sum(name == target(base) or name.startswith(f"{target(base)}, set ") for name in found)
        found[f"{target(base)}, set {number + 1}" if number else target(base)] = siblings(gathered, base)
    return dict(sorted(found.items()))


def mean_gain(compared: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Each arm's gain over scratch in percent, averaged over the targets that have it, offline and online apart.

    Args:
        compared: tables of `compare`, by target.

    Returns:
        index setting and arm; columns mean gain %, targets (how many).
    """
    rows = [
        {"setting": "offline" if ", offline" in name else "online", "arm": arm, "gain %": gain}
        for name, table in compared.items()
        for arm, gain in table["gain %"].dropna().items()
    ]
    table = pd.DataFrame(rows, columns=["setting", "arm", "gain %"]).groupby(["setting", "arm"])["gain %"]
    return table.agg(["mean", "count"]).rename(columns={"mean": "mean gain %", "count": "targets"})


def target(p: Parameters) -> str:
    """The game, its variant where it is not the default, and the setting: ``Breakout, mode 12, online``."""
    variant = [f"{name} {value}" for name, value in p.variant.items() if value is not None]
    return ", ".join([p.game, *variant, p.setting])
