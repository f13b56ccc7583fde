"""The paper's claims on runs made here, rung by rung of a ladder of scales.

A rung is a base, a file of `params/04_scaled_training/`, and runs that differ from it in what a claim is about. Their
scores are one CSV with the command of each run (`save`, `scaled-ql runs scores`), from which everything here is
rebuilt without the runs.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from scaled_ql import ablations, batches, documents, metrics, parameters, runs, transfer_report
from scaled_ql.ablations import NOTEBOOK, PROTOCOL, Gathered, GatherError
from scaled_ql.defaults import ENCODERS

OF_A_RUN = ("data_id", "num_parameters", "paper_parameters", "training_minutes", "device")
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
    "unlearned": "no verdict: perhaps no better than without rewards",
    "control": "a control",
    "missing": "not tried",
}


class Claim(NamedTuple):
    """A statement about the score of some arms, which holds if a contrast of their means is above 0.

    Attributes:
        name: the letter of the claim, and what it says.
        arms: weights, and changes of the base. The first is the one whose control has zero rewards. A tuple of views
            stands for one network for each of them: what those of a seed score is one score in all their games.
        against: column of scores measured once, whose mean is subtracted; "" for none.
        column: of the returns of all arms but the first.
        printed: what the paper found.
        report: file of the gallery that shows the runs.
    """

    name: str
    arms: tuple[tuple[float, Mapping[str, Any]], ...]
    against: str = ""
    column: str = "agent_return"
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
    """All claims but those of `growing`, about the size of networks, and of `together`, about the number of games."""
    reward, cql = "learning_from_reward.html", {"method": "cql"}
    normalised = _printed("2", "median", "with", "without")
    six, forty = (_printed(table, "iqm", "with", "without") for table in ("A.2", "A.3"))
    tiny = ablations.imitation_by_transformers("tiny")
    return [
        Claim("a: better than its data", ((1, {}),), "dataset_return", printed="IQM 77.8% and 51%", report=reward),
        Claim("a: better than the best constant action", ((1, {}),), "constant_return", report=reward),
        _versus("b: better than cloning", cql, {"method": "bc"}, "IQM, Figure 2", report=reward),
        _versus("b: better than a clone that samples", cql, {"method": "bc"}, column="sampled_return", report=reward),
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


def growing(gathered: Gathered, source: str) -> list[Claim]:
    """Claims about size, of each family of encoders the largest with runs of two seeds against the smallest.

    Without such runs of two sizes a family's claims are about its first and its last.
    """
    base = ablations.base(source)
    sizes = gathered.runs.dropna(subset="paper_parameters").groupby("encoder")["paper_parameters"].max().sort_values()
    trained = [name for name in sizes.index if len(ablations.select(gathered, base, {"encoder": name})) > 1]
    found = []
    for family in ("resnet", "impala"):
        ordered = [name for name in trained if ENCODERS[name][0].startswith(family)]
        named = f"{ordered[0]} to {ordered[-1]}" if len(ordered) > 1 else family
        if len(ordered) < 2:  # a claim that was not tried
            ordered = [name for name, (kind, *_) in ENCODERS.items() if kind.startswith(family)]
        small, large = {"encoder": ordered[0]}, {"encoder": ordered[-1]}
        expected = "rises" if family == "resnet" else "does not rise"
        found.append(_versus(f"g: score rises with size, {named}", large, small, f"Figure 6: {expected}"))
        arms = ((1, large), (-1, large | {"head": "mse"}), (-1, small), (1, small | {"head": "mse"}))
        found.append(Claim(f"c: C51's lead grows with size, {named}", arms, printed="+27.0, resnet50 to resnet101"))
    return found


def together(gathered: Gathered, source: str) -> list[Claim]:
    """Claims about one network for all games, beside one for each, where the runs have a view of each game.

    All are trained for as many steps, of batches as large.
    """
    base = ablations.base(source)
    games = gathered.scores.join(gathered.runs["view"], on="run").groupby("view")["game"].unique()
    single = tuple(view for view, own in games.items() if view != base.view and len(own) == 1)
    here = games.get(base.view, ())
    if sorted(games[view][0] for view in single) != sorted(here) or len(single) < 2:
        single = ("each game alone",)  # of which there are no runs
    alone, named = {"view": single}, f"one network for {len(here)} games"
    arms = ((1, {}), (-1, {"alpha": 0.0}), (-1, alone), (1, alone | {"alpha": 0.0}))
    return [
        Claim(
            f"f: pessimism helps more in {named} than in one for each", arms, printed="+35.1 six games, +100.6 forty"
        ),
        _versus(f"beyond: {named} better than one for each", {}, alone),
    ]


def test(gathered: Gathered, source: str, which: list[Claim] | None = None) -> pd.DataFrame:
    """Each claim on the runs of a rung, once for every encoder that has two runs or more of each of its arms.

    Args:
        gathered: from `read`, or `ablations.gather`.
        source: the base, a file of `params/04_scaled_training/`.
        which: claims; None: `claims`, `growing` and `together`.

    Returns:
        columns claim, encoder ("" where the claim names them), effect, low, high (points of human-normalised score,
        see `overall`, with a 95% Welch interval over training seeds), control, control low, control high (the first
        arm's score less that of the same training with zero rewards, or of the base's without it; likewise), seeds
        (of each arm), verdict (a key of `VERDICTS`; ``unlearned``: the arm that would win may be no better than its
        control, or has none), without (games left out, see `ablations.cut_games`), minutes (of training, all runs of
        all arms), devices (that these were trained on), spread (standard deviation between seeds, pooled), weights (of
        the arms), paper, report.

    Raises:
        GatherError: see `ablations.select`; arms with different games or different contents of the dataset.
    """
    base, rows = ablations.base(source), []
    for claim in which if which is not None else [*claims(), *growing(gathered, source), *together(gathered, source)]:
        found = list(_tested(gathered, base, claim))
        lacking = {"claim": claim.name, "verdict": "missing", "paper": claim.printed, "report": claim.report}
        rows += found or [lacking]
    columns = ["claim", "encoder", "effect", "low", "high", "control", "control low", "control high", "seeds"]
    columns += ["verdict", "without", "minutes", "devices", "spread", "weights", "paper", "report"]
    words = {"encoder": "", "seeds": "", "without": "", "devices": ""}
    return pd.DataFrame(rows, columns=columns).fillna(words)


def _tested(gathered: Gathered, base: parameters.Parameters, claim: Claim) -> Iterator[dict[str, Any]]:
    named = any("encoder" in changes for _, changes in claim.arms)
    for encoder in [""] if named else sorted(gathered.runs["encoder"].unique()):
        given = {"encoder": encoder} if encoder else {}
        chosen = [_arm(gathered, base, given | dict(changes)) for _, changes in claim.arms]
        if any(len(runs) < 2 for arm in chosen for runs in arm):
            continue
        controls = [_control(gathered, base, given, changes) for _, changes in claim.arms]
        every = pd.concat([runs for arm in [*chosen, *controls] for runs in arm])
        for _, same in every.groupby("view"):
            ablations.same_data(same)
        used = pd.concat([runs for arm in chosen for runs in arm])
        cut = ablations.cut_games(gathered, used.index)
        columns = ["agent_return", *[claim.column] * (len(chosen) - 1)]
        scores = [points(gathered, arm, cut, column) for arm, column in zip(chosen, columns)]
        fixed = points(gathered, chosen[0], cut, claim.against) if claim.against else 0 * scores[0]
        if any(list(table.columns) != list(scores[0].columns) for table in [*scores[1:], fixed]):
            raise GatherError(f"{claim.name}: runs {', '.join(chosen[0][0].index)} and others have different games.")
        if scores[0].empty:
            continue
        weights, arms = [weight for weight, _ in claim.arms], [overall(table) for table in scores]
        effect, low, high = (value - overall(fixed).mean() for value in metrics.contrast(weights, arms))
        above = [_above(gathered, arm, zero) for arm, zero in zip(chosen, controls)]
        row = {"claim": claim.name, "encoder": encoder, "effect": effect, "low": low, "high": high}
        row |= dict(zip(("control", "control low", "control high"), above[0]))
        row["verdict"] = "yes" if low > 0 else "no" if high < 0 else "inconclusive"
        winner = next((i for i, weight in enumerate(weights) if weight < 0), None) if high < 0 else 0
        if winner is not None and not above[winner][1] > 0:  # the data, if they win, need no control
            row["verdict"] = "unlearned"
        row |= {"seeds": " + ".join(str(len(arm)) for arm in arms), "without": ", ".join(cut), "weights": weights}
        row |= {"minutes": used["training_minutes"].sum(), "devices": ", ".join(sorted(set(used["device"]) - {""}))}
        row["spread"] = np.sqrt(np.mean([arm.var(ddof=1) for arm in arms]))
        yield row | {"paper": claim.printed, "report": claim.report}


def _arm(gathered: Gathered, base: parameters.Parameters, changes: Mapping[str, Any]) -> list[pd.DataFrame]:
    """The runs of an arm, one per seed; of several views those of each, with the seeds that all have."""
    views = changes["view"] if isinstance(changes.get("view"), tuple) else None
    if views is None:
        return [ablations.select(gathered, base, changes)]
    arm = [ablations.select(gathered, base, {**changes, "view": view}) for view in views]
    common = set.intersection(*(set(runs["seed"]) for runs in arm))
    return [runs[runs["seed"].isin(common)] for runs in arm]


def _control(
    gathered: Gathered, base: parameters.Parameters, given: Mapping[str, Any], changes: Mapping[str, Any]
) -> list[pd.DataFrame]:
    """Runs with zero rewards of an arm, or, where it has no two, of the base with the arm's encoder."""
    own = _arm(gathered, base, {**given, **changes, "rewards": "zero"})
    encoder = {name: changes[name] for name in ("encoder", "embedding") if name in changes}
    return own if len(own[0]) > 1 else _arm(gathered, base, {**given, **encoder, "rewards": "zero"})


def _above(gathered: Gathered, arm: list[pd.DataFrame], control: list[pd.DataFrame]) -> tuple[float, float, float]:
    """An arm's lead over its control, with its interval; NaN without a control or a game in common."""
    cut = ablations.cut_games(gathered, [name for runs in [*arm, *control] for name in runs.index])
    first, second = (points(gathered, some, cut) for some in (arm, control))
    common = [game for game in first if game in second]
    if len(second) < 2 or not common:
        return (np.nan,) * 3
    return metrics.contrast([1, -1], [overall(table[common]) for table in (first, second)])


def overall(table: pd.DataFrame) -> np.ndarray:
    """One score a seed, [seeds], from `points`: the IQM over games, which is their mean where there are two or three.

    A mean over more games would be that of the game in which human players are the least above random play.
    """
    return metrics.iqm(table.to_numpy()[:, None])


def points(
    gathered: Gathered, arm: list[pd.DataFrame], without: Sequence[str], column: str = "agent_return"
) -> pd.DataFrame:
    """Human-normalised scores in points of an arm, [seeds, games of all its views], of a column of raw returns.

    Games without reference scores, games that `without` names, and games in which no run has that return are left out.

    Raises:
        GatherError: the runs of a view have different games.
    """
    if arm[0].empty:
        return pd.DataFrame()
    tables = []
    for view in arm:
        known = ablations.score_matrix(gathered, view.index, "human_normalized", without).columns
        table = ablations.score_matrix(gathered, view.index, column, without).set_axis(view["seed"], axis=0)
        tables.append(table[[game for game in table if game in known]])
    table = pd.concat(tables, axis=1).sort_index(axis=1)
    return table.apply(lambda returns: 100 * returns.map(partial(metrics.human_normalized, returns.name)))


def players(gathered: Gathered, source: str) -> pd.DataFrame:
    """Mean raw returns in the games of a rung's base.

    Returns:
        index game; columns random, best constant action, data, zero rewards, agent (the base and its control, over
        training seeds); and data, % and agent, %, human-normalised.
    """
    base = ablations.base(source)
    agent = ablations.select(gathered, base, {})
    control = ablations.select(gathered, base, {"rewards": "zero"})
    columns = {"random": "random_return", "best constant action": "constant_return", "data": "dataset_return"}
    found = {title: ablations.score_matrix(gathered, agent.index, column).mean() for title, column in columns.items()}
    for title, runs_of in (("zero rewards", control), ("agent", agent)):
        found[title] = ablations.score_matrix(gathered, runs_of.index, "agent_return").mean()
    table = pd.DataFrame(found).rename_axis("game")
    known = gathered.scores.dropna(subset="human_normalized")["game"].unique()  # with reference scores
    for title in ("data", "agent"):
        returns = table.loc[table.index.isin(known), title]
        table[f"{title}, %"] = pd.Series({game: 100 * metrics.human_normalized(game, x) for game, x in returns.items()})
    return table


def data_of(source: str) -> str:
    """The data of a rung, in words."""
    base = ablations.base(source)
    return f"{base.dataset}, {f'view {base.view}' if base.view else 'all of it'}"


def budget(tested: pd.DataFrame, effect: float = 5.0) -> pd.DataFrame:
    """What comparisons cost, and what they can detect: for planning, before further seeds are trained.

    A t test at 5% of a contrast of means with weights w has a power of 80% for an effect of about (t_0.975 + t_0.8) s
    √(Σw²/n), s the standard deviation between seeds and n the seeds of an arm.

    Args:
        tested: from `test`, the pilot.
        effect: effect to be detected, points.

    Returns:
        columns claim, encoder, minutes a run (mean over arms), devices, spread (points), seeds (the fewest of an arm),
        detects (points, with as many), and the seeds an arm that `effect` needs; the last is NaN where the spread is
        known from fewer than four degrees of freedom.
    """
    rows = []
    for row in tested[tested["verdict"] != "missing"].to_dict("records"):
        counts, weights, spread = [int(n) for n in row["seeds"].split(" + ")], row["weights"], row["spread"]
        needed = next((n for n in range(2, 1_000) if detectable(spread, n, weights) <= effect), np.nan)
        known = sum(counts) - len(counts) >= 4
        rows.append({
            "claim": row["claim"], "encoder": row["encoder"], "minutes a run": row["minutes"] / sum(counts),
            "devices": row["devices"], "spread": spread, "seeds": min(counts),
            "detects": detectable(spread, min(counts), weights),
            f"seeds for {effect:g} points": float(needed) if known else np.nan,
        })  # fmt: skip
    return pd.DataFrame(rows)


def detectable(spread: float, seeds: int, weights: Sequence[float] = (1, -1)) -> float:
    """The contrast of arms that a t test finds in 80% of trials; see `budget`."""
    from scipy import stats

    freedom = len(weights) * (seeds - 1)
    error = spread * np.sqrt(sum(weight**2 for weight in weights) / seeds)
    return float((stats.t.ppf(0.975, freedom) + stats.t.ppf(POWER, freedom)) * error)


def transferred(scores: pd.DataFrame) -> pd.DataFrame:
    """Claims h and i, pre-training helps, from scores of `transfer_report.siblings`.

    Returns:
        columns claim (with the target), arm, effect, low, high (gain over scratch, raw returns, 95% Welch intervals
        over seeds), control, control low, control high (what the arm has above the same one after pre-training with
        zero rewards), seeds, verdict (as in `test`; ``control`` of arms with zero rewards), report.
    """
    columns = ["claim", "arm", "effect", "low", "high", "control", "control low", "control high", "seeds", "verdict"]
    rows, offline = [], scores["dataset_return"].notna()
    for (game, mode, difficulty, known), here in scores.groupby(["game", "mode", "difficulty", offline], sort=False):
        claim, report = ("h", "06_transfer.html") if known else ("i", "06_transfer_online.html")
        variant = [f"{name} {value}" for name, value in (("mode", mode), ("difficulty", difficulty)) if value >= 0]
        target = ", ".join([game, *variant, "offline" if known else "online"])
        best = transfer_report.best_learning_rates(here)
        returns = {arm: each["agent_return"].to_numpy() for arm, each in best.groupby("arm")}
        for arm, row in transfer_report.compare(here).dropna(subset="gain low").iterrows():
            low, high = row["gain low"], row["gain high"]
            found = {
                "claim": f"{claim}: {target}",
                "arm": arm,
                "effect": row["gain over scratch"],
                "low": low,
                "high": high,
            }
            found |= {"seeds": str(row["seeds"]), "report": report}
            verdict = "yes" if low > 0 else "no" if high < 0 else "inconclusive"
            control = returns.get(", zero rewards, ".join(arm.rsplit(", ", 1)), np.empty(0))
            if "zero rewards" in arm:
                verdict = "control"
            elif len(control) > 1:
                over = metrics.contrast([1, -1], [returns[arm], control])
                found |= dict(zip(("control", "control low", "control high"), over))
                verdict = "unlearned" if verdict == "yes" and not over[1] > 0 else verdict
            rows.append(found | {"verdict": verdict})
    return pd.DataFrame(rows, columns=[*columns, "report"])


def shown(tested: pd.DataFrame) -> pd.DataFrame:
    """The tables of `test` and `transferred` for people: intervals and verdicts in words."""

    def spread(effect: float, low: float, high: float) -> str:
        return f"{effect:+.1f} ({low:+.1f} to {high:+.1f})" if effect == effect else ""

    table = tested.copy()
    table.insert(2, "effect, 95% interval", [spread(*row) for row in tested[["effect", "low", "high"]].to_numpy()])
    controls = tested[["control", "control low", "control high"]].to_numpy()
    table.insert(3, "above zero rewards", [spread(*row) for row in controls])
    table["verdict"] = tested["verdict"].map(VERDICTS)
    hidden = ["effect", "low", "high", "control", "control low", "control high", "minutes", "spread", "weights"]
    empty = [name for name in ("without",) if name in table and not table[name].any()]
    return table.drop(columns=[*hidden, *empty], errors="ignore")


def verdict(tested: pd.DataFrame) -> str:
    """Which claims hold, which not, and which cannot be told: a sentence each kind, Markdown."""
    told = []
    for key, words in VERDICTS.items():
        here = tested[tested["verdict"] == key].groupby("claim", sort=False)["encoder"].agg(list)
        names = [claim + (f" ({', '.join(which)})" if any(which) else "") for claim, which in here.items()]
        told += [f"**{words.capitalize()}**: {'; '.join(names)}."] if names else []
    return "\n\n".join(told)


def save(gathered: Gathered, source: str) -> pd.DataFrame:
    """The scores of a rung's runs, those that share the base's dataset, steps and evaluation.

    Returns:
        columns `SCORE_COLUMNS`.
    """
    base = ablations.base(source)
    shared = {*PROTOCOL, "dataset", "num_steps"}
    commands = {}
    for name, how in ablations.differences_from(gathered, base, {}).items():
        if not shared & how.keys():
            changes = {field: gathered.runs.loc[name, field] for field in (*how, "seed")}
            changes = {field: x.item() if isinstance(x, np.generic) else x for field, x in changes.items()}
            changes = {field: x for field, x in changes.items() if x != getattr(base, field)}
            values = parameters.check(NOTEBOOK, base.model_dump() | changes | {"run": batches.cell_name(base, changes)})
            commands[name] = runs.command(NOTEBOOK, values, base, f"params/{NOTEBOOK}/{source}")
    if not commands:
        return pd.DataFrame(columns=list(SCORE_COLUMNS))
    table = gathered.scores[gathered.scores["run"].isin(commands)].join(gathered.runs[["seed", *OF_A_RUN]], on="run")
    table = table.assign(command=table["run"].map(commands)).reindex(columns=list(SCORE_COLUMNS))
    return table.sort_values(["run", "game"], ignore_index=True)


def read(file: Path) -> tuple[Gathered, str]:
    """What `ablations.gather` found when `save` was called, and the base; the actions that agents chose are not kept.

    Raises:
        ParameterError: a command is not one of this version, or the file has runs of two bases.
        ValueError: a column is missing.
    """
    table = pd.read_csv(file)
    table = table.assign(device=table["device"].fillna("")) if "device" in table else table
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
