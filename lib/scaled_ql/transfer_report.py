"""Runs of `06_transfer` on one target, compared: from scratch, fine-tuned, frozen, from other initialisations.

Runs are siblings if they differ in nothing but where their network came from, which parts of it were taken or frozen,
the learning rate, and the seed. Equal in all of these but the seed, they are one *arm*.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scaled_ql import ablations, evaluation, metrics, parameters, runs
from scaled_ql.ablations import Gathered
from scaled_ql.games import FAR_GAMES, UnknownGame
from scaled_ql.paper import METHODS
from scaled_ql.parameters import INCIDENTAL, Parameters

NOTEBOOK = "06_transfer"
FREE = ("initial", "built_like", "parts", "freeze", "learning_rate")  # what siblings may differ in
SCRATCH = "scratch"
SCORE_COLUMNS = (
    "arm", "learning_rate", "run", "seed", "game", "mode", "difficulty", "agent_return", "random_return",
    "dataset_return", "truncated_share", "cut", "distance", "network",
)  # fmt: skip
# Of how the initial network was trained, what an arm's name always says, or never.
NAMED, UNNAMED = {"method", "rewards"}, {"seed", "initial", "built_like", "num_steps"} | INCIDENTAL  # `steps` says it


def gather(folder: Path, asking: str = "") -> Gathered:
    """The finished runs of `06_transfer` below an outputs folder, and the one asking; see `ablations.gather`.

    `Gathered.runs` has two more columns: `pretrained`, how the initial network was trained, None from scratch;
    `network`, its architecture. Parameters without effect are made equal: `built_like`, and from scratch `parts`.
    """
    gathered = ablations.gather(folder, NOTEBOOK, asking)
    if gathered.runs.empty:
        return gathered
    summaries = [runs.read_json(folder / NOTEBOOK / name / "summary.json") for name in gathered.runs.index]
    table = gathered.runs.assign(built_like="")
    before = parameters.ScaledTraining().model_dump()  # a parameter that came after a run had its default's effect
    table["pretrained"] = [summary["pretrained"] and before | summary["pretrained"] for summary in summaries]
    table["network"] = [json.dumps(summary["network"], sort_keys=True) for summary in summaries]
    table.loc[table["pretrained"].isna(), "parts"] = ""
    return gathered._replace(runs=table)


def siblings(gathered: Gathered, base: Parameters) -> pd.DataFrame:
    """Scores of all finished runs on the target of one of them, a row per run.

    Args:
        gathered: from `gather`.
        base: parameters of any of them; if that run is among `gathered`, the others have its architecture.

    Returns:
        columns `SCORE_COLUMNS`, sorted by arm, scratch first, and seed. Returns are raw means over episodes.
        `distance` of the target from the games of the pre-training: ``same`` where it is one of them, ``far`` where it
        is one of `games.FAR_GAMES`, else ``near``; "" from scratch. `network`: `network_in_words`.

    Raises:
        GatherError: two runs of one arm and seed, or runs of different contents of the dataset.
    """
    if base.run in gathered.runs.index:  # only networks of its architecture
        network = gathered.runs.loc[base.run, "network"]
        gathered = gathered._replace(runs=gathered.runs[gathered.runs["network"] == network])
    chosen = ablations.select(gathered, base, {}, FREE)
    if chosen.empty:
        return nothing()
    table = gathered.scores[gathered.scores["run"].isin(chosen.index)].rename(columns={"truncated": "truncated_share"})
    about = chosen[["learning_rate", "seed", "mode", "difficulty"]].assign(arm=arm_names(chosen))
    about["distance"] = [
        "" if not origin else "same" if game in origin["games"] else "far" if game in FAR_GAMES else "near"
        for origin, game in zip(chosen["pretrained"], chosen["game"])
    ]
    about["network"] = [network_in_words(json.loads(network)) for network in chosen["network"]]
    table = table.join(about, on="run").reindex(columns=list(SCORE_COLUMNS))
    order = table["arm"] != SCRATCH
    return table.assign(order=order).sort_values(["order", "arm", "learning_rate", "seed"], ignore_index=True)[
        list(SCORE_COLUMNS)
    ]


def nothing() -> pd.DataFrame:
    """The table of `siblings` where there are none."""
    return pd.DataFrame(columns=list(SCORE_COLUMNS))


def network_in_words(network: Mapping[str, Any]) -> str:
    """Which network it is, from `transfer.built`: resnet101; DT 40M; DT 40M on resnet101, its tokenizer."""
    if "transformer" not in network:
        return network["encoder"]
    kind = METHODS["dt" if "return_low" in network else "bc_transformer"]
    tokenizer = network.get("tokenizer", "patches")
    return f"{kind} {network['transformer']}" + (f" on {tokenizer}" if tokenizer != "patches" else "")


def arm_names(chosen: pd.DataFrame) -> list[str]:
    """What each run's network is, in words that tell the arms apart: scratch; Scaled QL, fine-tuned; ...

    Args:
        chosen: rows of `Gathered.runs`.
    """
    origins = [origin or {} for origin in chosen["pretrained"]]
    parts = [parts if origin else None for parts, origin in zip(chosen["parts"], origins)]
    known = dict.fromkeys(name for origin in origins for name in origin if name not in NAMED | UNNAMED)
    differ = [name for name in known if len({str(o.get(name)) for o in origins if o}) > 1]
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

    The best of several noisy means is an optimistic estimate; it is taken for every arm alike. Rates with fewer seeds
    than others of the arm are not considered.
    """
    rates = scores.groupby(["game", "arm", "learning_rate"], sort=False)["agent_return"].agg(["mean", "count"])
    most = rates.groupby(["game", "arm"], sort=False)["count"].transform("max")  # one lucky seed is no sweep
    best = rates.loc[rates["count"] == most, "mean"].groupby(["game", "arm"], sort=False).idxmax()
    keys = pd.MultiIndex.from_frame(scores[["game", "arm", "learning_rate"]])
    return scores[keys.isin(list(best))].reset_index(drop=True)


def compare(scores: pd.DataFrame) -> pd.DataFrame:
    """Each arm's score on one target and its gain over scratch, with 95% t intervals over seeds.

    Args:
        scores: from `siblings`, of one target; each arm's best learning rate is taken.

    Returns:
        index arm; columns learning rate, seeds, mean return, low, high, DQN-normalised % (NaN where unknown or not the
        default variant), gain over scratch (raw), gain low, gain high (Welch's interval), truncated %, distance.
        Intervals are NaN with fewer than two seeds; the gain is NaN where either arm is cut.
    """
    best, rows = best_learning_rates(scores), {}
    scratch = best[best["arm"] == SCRATCH]
    for arm, here in best.groupby("arm", sort=False):
        returns, row = here["agent_return"].to_numpy(), {}
        row["learning rate"], row["seeds"] = f"{here['learning_rate'].iloc[0]:g}", len(here)
        row["mean return"] = returns.mean()
        row["low"], row["high"] = metrics.contrast([1], [returns])[1:] if len(returns) > 1 else (np.nan, np.nan)
        row["DQN-normalised %"] = 100 * dqn_normalized(here)
        row |= dict.fromkeys(("gain over scratch", "gain low", "gain high"), np.nan)
        if arm != SCRATCH and len(scratch) and not (here["cut"].any() or scratch["cut"].any()):
            gain = returns.mean() - scratch["agent_return"].mean()
            row["gain over scratch"] = gain
            if min(len(here), len(scratch)) > 1:
                _, *limits = metrics.contrast([1, -1], [returns, scratch["agent_return"].to_numpy()])
                row["gain low"], row["gain high"] = limits
        row["truncated %"] = 100 * here["truncated_share"].mean()
        rows[arm] = row | {"distance": here["distance"].iloc[0]}
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
    silent = [arm for arm in compared.index if arm != SCRATCH and arm not in judged.index]
    parts = [
        f"{words}: " + "; ".join(
            f"{arm} ({row['gain over scratch']:+.1f}, {row['gain low']:+.1f} to {row['gain high']:+.1f})"
            for arm, row in judged[chosen].iterrows()
        )
        for words, chosen in told.items() if chosen.any()
    ]  # fmt: skip
    if silent:
        parts.append(f"no verdict, cut short or without two seeds: {'; '.join(silent)}")
    return f"**{name}**: {'; '.join(parts)}."


def tally(compared: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """On how many targets each arm is better than scratch, near and far ones apart; any score's unit will do.

    Args:
        compared: tables of `compare`, by target.

    Returns:
        index setting, distance, arm; columns targets (with a verdict), better, worse, inconclusive: numbers of them.
    """
    rows = []
    for name, table in compared.items():
        setting = "offline" if ", offline" in name else "online"
        for arm, row in table.dropna(subset=["gain low"]).iterrows() if len(table) else ():
            better, worse = row["gain low"] > 0, row["gain high"] < 0
            verdicts = {"targets": 1, "better": better, "worse": worse, "inconclusive": not (better or worse)}
            rows.append({"setting": setting, "distance": row["distance"], "arm": arm} | verdicts)
    columns = ["setting", "distance", "arm", "targets", "better", "worse", "inconclusive"]
    return pd.DataFrame(rows, columns=columns).groupby(columns[:3]).sum().astype(int)


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


def by_target(folder: Path) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """Scores of all finished runs of `06_transfer` below an outputs folder, a table of `siblings` per target.

    Returns:
        tables by `target`, in alphabetical order; where runs on one target differ in their architecture, or in settings
        that siblings share, they are several sets, the second named ``..., set 2``. And what is left out: columns run
        (or target), why.
    """
    gathered = gather(folder)
    shared = [name for name in parameters.Transfer.model_fields if name not in {*INCIDENTAL, *FREE}]
    found: dict[str, pd.DataFrame] = {}
    left_out = gathered.left_out.to_dict("records")
    settings = gathered.runs.reindex(columns=[*shared, "network"]).astype(str)
    for _, names in settings.groupby(list(settings)).groups.items():
        file = folder / NOTEBOOK / names[0] / "parameters.yaml"
        base = parameters.check(NOTEBOOK, parameters.load(file), str(file))
        name = target(base)
        number = sum(other == name or other.startswith(f"{name}, set ") for other in found)
        name += f", set {number + 1}" if number else ""
        try:
            found[name] = siblings(gathered, base)
        except ablations.GatherError as error:
            left_out.append({"run": name, "why": str(error)})
    return dict(sorted(found.items())), pd.DataFrame(left_out, columns=["run", "why"])


def mean_gain(compared: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Each arm's gain over scratch in mean DQN-normalised score over targets, offline and online apart (Figure 7).

    Args:
        compared: tables of `compare`, by target. Left out are targets without such scores, such as variants, and all
            but the first of several sets.

    Returns:
        index setting, arm; columns scratch and score (mean DQN-normalised %, over the same targets), gain % (NaN unless
        scratch is above 0), targets (their names).
    """
    rows = []
    for name, table in compared.items():
        scores = table["DQN-normalised %"].dropna() if len(table) else pd.Series(dtype=float)
        if SCRATCH in scores and ", set " not in name:
            setting = "offline" if name.endswith(", offline") else "online"
            rows += [
                {"setting": setting, "arm": arm, "scratch": scores[SCRATCH], "score": score, "targets": name}
                for arm, score in scores.drop(SCRATCH).items()
            ]
    table = pd.DataFrame(rows, columns=["setting", "arm", "scratch", "score", "targets"]).groupby(["setting", "arm"])
    means = table[["scratch", "score"]].mean()
    means["gain %"] = (100 * (means["score"] / means["scratch"] - 1)).where(means["scratch"] > 0)
    return means.assign(targets=table["targets"].agg("; ".join))


def offline_scores(found: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """DQN-normalised scores, %, of all arms offline, whatever their networks: the bars of Figure 7.

    Args:
        found: tables of `siblings`, by target. Of several sets that have a network in common the first counts.

    Returns:
        index network, arm; a column per game that has such scores, means over seeds; `mean` over the games, NaN of an
        arm that lacks one.
    """
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for name, scores in found.items():
        if ", offline" in name and len(scores):
            for key, table in best_learning_rates(scores).groupby(["network", "arm"], sort=False):
                rows.setdefault(key, {}).setdefault(table["game"].iloc[0], 100 * dqn_normalized(table))
    index = pd.MultiIndex.from_tuples(list(rows), names=["network", "arm"]) if rows else None
    table = pd.DataFrame(list(rows.values()), index=index).dropna(axis=1, how="all").sort_index(axis=1)
    return table.assign(mean=table.mean(axis=1, skipna=False))


def target(p: Parameters) -> str:
    """The game, its variant where it is not the default, and the setting: ``Breakout, mode 12, online``."""
    variant = [f"{name} {value}" for name, value in p.variant.items() if value is not None]
    return ", ".join([p.game, *variant, p.setting])
