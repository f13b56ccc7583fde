"""The paper's claims on runs made here, rung by rung of a ladder of scales.

A rung is a base, a file of `params/04_scaled_training/`, and runs that differ from it in what a claim is about. Their
scores are one CSV with the command of each run (`save`, `scaled-ql runs scores`), from which everything here is
rebuilt without the runs.
"""

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from scaled_ql import ablations, batches, documents, metrics, parameters, transfer_report
from scaled_ql.ablations import NOTEBOOK, PROTOCOL, Gathered
from scaled_ql.defaults import ENCODERS

OF_A_RUN = ("data_id", "num_parameters", "paper_parameters", "training_minutes")
OF_A_GAME = (
    "agent_return", "sampled_return", "random_return", "constant_return", "dataset_return", "human_normalized",
    "episodes", "truncated", "cut",
)  # fmt: skip
SCORE_COLUMNS = ("command", "run", "seed", "game", *OF_A_GAME, *OF_A_RUN)
POWER = 0.8  # of `budget`
VERDICTS = {
    "yes": "supported",
    "no": "contradicted",
    "inconclusive": "inconclusive",
    "unlearned": "no verdict: not above zero rewards",
    "missing": "not tried",
}


class Claim(NamedTuple):
    """A statement about the score of some arms, which holds if a contrast of their means is above 0.

    Attributes:
        name: the letter of the claim, and what it says.
        arms: weights, and changes of the base. The first is the one whose control has zero rewards.
        against: column of scores measured once, whose mean is subtracted; "" for none.
        printed: what the paper found.
        report: file of the gallery that shows the runs.
    """

    name: str
    arms: tuple[tuple[float, Mapping[str, Any]], ...]
    against: str = ""
    printed: str = ""
    report: str = "05_ablations.html"


def _versus(name: str, first: Mapping[str, Any], second: Mapping[str, Any], printed: str = "", **more: Any) -> Claim:
    return Claim(name, ((1, first), (-1, second)), printed=printed, **more)


def _printed(table: str, statistic: str, first: str, second: str) -> str:
    """The difference in a table of the paper: "+39.4 resnet101, +12.4 resnet50"."""
    rows = ablations.paper_table(table, statistic).pivot(index="encoder", columns="variant", values="paper, %")
    gains = (rows[first] - rows[second]).iloc[::-1]
    return ", ".join(f"{gain:+.1f} {encoder}" for encoder, gain in gains.items())


def claims() -> list[Claim]:
    """All claims but those about the size of networks, which are `growing`'s."""
    reward, cql = "learning_from_reward.html", {"method": "cql"}
    normalised = _printed("2", "median", "with", "without")
    six, forty = (_printed(table, "iqm", "with", "without") for table in ("A.2", "A.3"))
    tiny = ablations.imitation_by_transformers("tiny")
    return [
        Claim("a: better than its data", ((1, {}),), "dataset_return", "IQM 77.8% and 51%", reward),
        Claim("a: better than the best constant action", ((1, {}),), "constant_return", report=reward),
        _versus("b: better than cloning", cql, {"method": "bc"}, "IQM, Figure 2", report=reward),
        _versus("b: better than return-conditioned cloning", cql, {"method": "return_bc"}),
        _versus("b: better than a decision transformer", cql, tiny["decision transformer"], "IQM 77.8% and 30.6%"),
        _versus("b: better than a cloning transformer", cql, tiny["cloning transformer"], "IQM, Figure 2"),
        _versus("c: C51 better than MSE", {}, {"head": "mse"}, _printed("1", "median", "C51", "MSE")),
        _versus("d: feature normalisation helps", {}, {"normalize_features": False}, normalised),
        _versus("e: spatial embedding helps", {}, {"embedding": "none"}, _printed("A.1", "median", "with", "without")),
        _versus("f: pessimism helps", {}, {"alpha": 0.0}, f"six games: {six}; forty: {forty}"),
        _versus("beyond: HL-Gauss better than C51", {"head": "hl_gauss"}, {}),
        _versus("beyond: two-hot better than C51", {"head": "two_hot"}, {}),
        _versus("beyond: random shift helps", {"random_shift": 4}, {}),
        _versus("beyond: DR3 helps besides", {"dr3": 0.03}, {}),
        _versus("beyond: a shared head better than one per game", {"heads": "shared"}, {}),
        _versus("beyond: ViT better than ResNet", {"encoder": "vit_narrow", "embedding": "attention"},
                {"encoder": "resnet_narrow"}),
    ]  # fmt: skip


def growing(gathered: Gathered) -> list[Claim]:
    """Claims about size, of each family of encoders the largest with runs against the smallest."""
    sizes = gathered.runs.groupby("encoder")["paper_parameters"].max().sort_values()
    found = []
    for family in ("resnet", "impala"):
        ordered = [name for name in sizes.index if ENCODERS[name][0].startswith(family)]
        if len(ordered) < 2:
            continue
        small, large = {"encoder": ordered[0]}, {"encoder": ordered[-1]}
        named = f"{ordered[0]} to {ordered[-1]}"
        expected = "rises" if family == "resnet" else "does not rise"
        found.append(_versus(f"g: score rises with size, {named}", large, small, f"Figure 6: {expected}"))
        arms = ((1, large), (-1, large | {"head": "mse"}), (-1, small), (1, small | {"head": "mse"}))
        found.append(Claim(f"c: C51's lead grows with size, {named}", arms, printed="+27.0, resnet50 to resnet101"))
    return found


def test(gathered: Gathered, source: str, which: list[Claim] | None = None) -> pd.DataFrame:
    """Each claim on the runs of a rung, once for every encoder that has runs of all its arms.

    Args:
        gathered: from `read`, or `ablations.gather`.
        source: the base, a file of `params/04_scaled_training/`.
        which: claims; None: `claims` and `growing`.

    Returns:
        columns claim, encoder ("" where the claim names them), effect, low, high (points of human-normalised score,
        mean over games, with a 95% Welch interval over training seeds), control, control low, control high (the first
        arm's score less that of the same training with zero rewards, likewise; NaN without such runs), seeds (of each
        arm), verdict (a key of `VERDICTS`; ``unlearned``: not contradicted, but the first arm may be no better than
        its control), minutes (of training, all runs of all arms), spread (standard deviation between seeds, pooled),
        paper, report.
    """
    base, rows = ablations.base(source), []
    for claim in which if which is not None else [*claims(), *growing(gathered)]:
        found = list(_tested(gathered, base, claim))
        lacking = {"claim": claim.name, "verdict": "missing", "paper": claim.printed, "report": claim.report}
        rows += found or [lacking]
    columns = ["claim", "encoder", "effect", "low", "high", "control", "control low", "control high", "seeds"]
    columns += ["verdict", "minutes", "spread", "paper", "report"]
    return pd.DataFrame(rows, columns=columns).fillna({"encoder": "", "seeds": ""})


def _tested(gathered: Gathered, base: parameters.Parameters, claim: Claim) -> Iterator[dict[str, Any]]:
    named = any("encoder" in changes for _, changes in claim.arms)
    for encoder in [""] if named else sorted(gathered.runs["encoder"].unique()):
        given = {"encoder": encoder} if encoder else {}
        chosen = [ablations.select(gathered, base, given | dict(changes)) for _, changes in claim.arms]
        if any(len(runs) < 2 for runs in chosen):
            continue
        names = [name for runs in chosen for name in runs.index]
        control = given | dict(claim.arms[0][1]) | {"rewards": "zero"}
        zero = ablations.select(gathered, base, control)
        cut = ablations.cut_games(gathered, [*names, *zero.index])
        arms = [points(gathered, runs.index, cut) for runs in chosen]
        weights = [weight for weight, _ in claim.arms]
        fixed = points(gathered, chosen[0].index, cut, claim.against).mean() if claim.against else 0.0
        effect, low, high = (value - fixed for value in metrics.contrast(weights, arms))
        row = {"claim": claim.name, "encoder": encoder, "effect": effect, "low": low, "high": high}
        row["verdict"] = "yes" if low > 0 else "no" if high < 0 else "inconclusive"
        if len(zero) > 1:
            over = metrics.contrast([1, -1], [arms[0], points(gathered, zero.index, cut)])
            row |= dict(zip(("control", "control low", "control high"), over))
            row["verdict"] = row["verdict"] if over[1] > 0 or high < 0 else "unlearned"
        row["seeds"] = " + ".join(str(len(arm)) for arm in arms)
        row["minutes"] = gathered.runs.loc[names, "training_minutes"].sum()
        row["spread"] = np.sqrt(np.mean([arm.var(ddof=1) for arm in arms]))
        yield row | {"paper": claim.printed, "report": claim.report}


def points(gathered: Gathered, names: pd.Index, without: list[str], column: str = "agent_return") -> np.ndarray:
    """Human-normalised score in points of each run, mean over games; [runs] of a column of raw returns."""
    matrix = ablations.score_matrix(gathered, names, column, without)
    return 100 * np.mean([[metrics.human_normalized(game, x) for x in matrix[game]] for game in matrix], axis=0)


def budget(tested: pd.DataFrame, effect: float = 5.0) -> pd.DataFrame:
    """What comparisons cost, and what they can detect: for planning, before further seeds are trained.

    A t test of two arms at 5% has a power of 80% for a difference of (t_0.975 + t_0.8) s √(2/n), s the standard
    deviation between seeds and n the seeds of an arm.

    Args:
        tested: from `test`, the pilot.
        effect: difference to be detected, points.

    Returns:
        columns claim, encoder, minutes a run, spread (points), seeds, detects (points, with these seeds), and the seeds
        an arm that `effect` needs.
    """
    rows = []
    for row in tested[tested["verdict"] != "missing"].to_dict("records"):
        counts = [int(count) for count in row["seeds"].split(" + ")]
        fewest = min(counts)
        needed = next((n for n in range(2, 1_000) if detectable(row["spread"], n) <= effect), np.nan)
        rows.append({
            "claim": row["claim"], "encoder": row["encoder"], "minutes a run": row["minutes"] / sum(counts),
            "spread": row["spread"], "seeds": fewest, "detects": detectable(row["spread"], fewest),
            f"seeds for {effect:g} points": needed,
        })  # fmt: skip
    return pd.DataFrame(rows)


def detectable(spread: float, seeds: int) -> float:
    """The difference of two arms that a t test finds in 80% of trials; see `budget`."""
    from scipy import stats

    freedom = 2 * (seeds - 1)
    return float((stats.t.ppf(0.975, freedom) + stats.t.ppf(POWER, freedom)) * spread * np.sqrt(2 / seeds))


def transferred(scores: pd.DataFrame) -> pd.DataFrame:
    """Claims h and i, pre-training helps, from scores of `transfer_report.siblings`.

    Returns:
        columns claim (with the target), arm, effect, low, high (gain over scratch, raw returns, 95% Welch intervals
        over seeds), seeds, verdict, report.
    """
    rows = []
    for (game, mode, _), here in scores.groupby(["game", "mode", "difficulty"], sort=False):
        offline = here["dataset_return"].notna().all()
        claim, report = ("h", "06_transfer.html") if offline else ("i", "06_transfer_online.html")
        target = game + (f", mode {mode}" if mode >= 0 else "") + (", offline" if offline else ", online")
        for arm, row in transfer_report.compare(here).dropna(subset="gain low").iterrows():
            low, high = row["gain low"], row["gain high"]
            found = {
                "claim": f"{claim}: {target}",
                "arm": arm,
                "effect": row["gain over scratch"],
                "low": low,
                "high": high,
            }
            found["seeds"], found["report"] = row["seeds"], report
            rows.append(found | {"verdict": "yes" if low > 0 else "no" if high < 0 else "inconclusive"})
    return pd.DataFrame(rows)


def shown(tested: pd.DataFrame) -> pd.DataFrame:
    """The tables of `test` and `transferred` for people: intervals and verdicts in words."""

    def spread(effect: float, low: float, high: float) -> str:
        return f"{effect:+.1f} ({low:+.1f} to {high:+.1f})" if effect == effect else ""

    table = tested.copy()
    table.insert(2, "effect, 95% interval", [spread(*row) for row in tested[["effect", "low", "high"]].to_numpy()])
    if "control" in tested:
        controls = tested[["control", "control low", "control high"]].to_numpy()
        table.insert(3, "above zero rewards", [spread(*row) for row in controls])
    table["verdict"] = tested["verdict"].map(VERDICTS)
    hidden = ["effect", "low", "high", "control", "control low", "control high", "minutes", "spread"]
    return table.drop(columns=hidden, errors="ignore")


def verdict(tested: pd.DataFrame) -> str:
    """Which claims hold, which not, and which cannot be told: a sentence each kind, Markdown."""
    told = []
    for key, words in VERDICTS.items():
        here = tested[tested["verdict"] == key].groupby("claim", sort=False)["encoder"].agg(list)
        names = [claim + (f" ({', '.join(which)})" if any(which) else "") for claim, which in here.items()]
        told += [f"**{words.capitalize()}**: {'; '.join(names)}."] if names else []
    return "\n\n".join(told)


def save(gathered: Gathered, source: str) -> pd.DataFrame:
    """The scores of a rung's runs, those that share the base's data, steps and evaluation; columns `SCORE_COLUMNS`."""
    base = ablations.base(source)
    differ = ablations.differences_from(gathered, base, {})
    shared = {*PROTOCOL, "dataset", "view", "num_steps"}
    commands = {}
    for name in (name for name, how in differ.items() if not shared & how.keys()):
        run = gathered.runs.loc[name]
        changes = {field: run[field] for field in [*differ[name], "seed"] if run[field] != getattr(base, field)}
        given = {"run": batches.cell_name(base, changes)} | changes
        options = [word for field, value in given.items() for word in ("-p", field, _yaml(value))]
        commands[name] = shlex.join(["scaled-ql", "run", NOTEBOOK, f"params/{NOTEBOOK}/{source}", *options])
    table = gathered.scores[gathered.scores["run"].isin(commands)].join(gathered.runs[["seed", *OF_A_RUN]], on="run")
    table = table.assign(command=table["run"].map(commands)).reindex(columns=list(SCORE_COLUMNS))
    return table.sort_values(["run", "game"], ignore_index=True)


def _yaml(value: Any) -> str:
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, str) else json.dumps(value)


def read(file: Path) -> tuple[Gathered, str]:
    """What `ablations.gather` found when `save` was called, and the base; the actions that agents chose are not kept.

    Raises:
        ParameterError: a command is not one of this version, or the file has runs of two bases.
        ValueError: a column is missing.
    """
    table = pd.read_csv(file)
    lacking = [name for name in SCORE_COLUMNS if name not in table]
    if lacking:
        raise ValueError(f"{file}: no columns {', '.join(lacking)}; write it with scaled-ql runs scores.")
    found, sources = {}, set()
    for row in table.drop_duplicates("run").to_dict("records"):
        words = shlex.split(row["command"])
        sources.add(source := Path(words[3]).name)
        given = {name: documents.parse(text) for name, text in zip(words[5::3], words[6::3])}
        values = ablations.base(source).model_dump() | given
        checked = parameters.check(NOTEBOOK, values, f"{file}: {row['run']}").model_dump()
        found[row["run"]] = checked | {name: row[name] for name in OF_A_RUN}
    if len(sources) != 1:
        raise parameters.ParameterError(f"{file}: runs of {', '.join(sorted(sources))}; a rung has one base.")
    scores = table[["run", "game", *OF_A_GAME]].assign(actions=[{}] * len(table))
    nothing = pd.DataFrame(columns=["run", "why"])
    return Gathered(pd.DataFrame.from_dict(found, orient="index"), scores, nothing), sources.pop()
