"""Was it learned from reward? A method compared with its controls: zero rewards, cloning, one constant action.

A run is in one of three arms, identified by `method` and `rewards`: the agent, the same training with its rewards
zeroed or shuffled, and behaviour cloning. They share data, steps and evaluation; otherwise, or if their episodes were
cut short, there is no verdict.
"""

import numpy as np
import pandas as pd

from scaled_ql import metrics
from scaled_ql.ablations import Gathered, otherwise_evaluated, select
from scaled_ql.parameters import Parameters

ARM_PARAMETERS = ("method", "rewards")
SCORE_COLUMNS = (
    "run", "method", "rewards", "seed", "game", "random_return", "constant_return", "dataset_return", "agent_return",
    "sampled_return", "agent_episodes", "truncated_share", "cut", "dataset_truncated_percent", "actions",
)  # fmt: skip
DIFFERENCE_COLUMNS = ("game", "better than", "difference", "low", "high", "refused", "verdict")


def scores(gathered: Gathered, base: Parameters) -> pd.DataFrame:
    """Runs that differ from `base` only in arm and seed, a row per run and game.

    Args:
        gathered: from `ablations.gather`.
        base: parameters of the agent.

    Returns:
        columns `SCORE_COLUMNS`; returns are raw means over episodes. `sampled_return` is that of a clone that samples
        actions from its policy, NaN for others; `dataset_return` is NaN if no whole game was recorded. `cut`: whether
        most episodes were truncated below the paper's limit.

    Raises:
        GatherError: two runs of one arm and seed, or runs of different contents of the dataset.
    """
    arms = select(gathered, base, {}, ARM_PARAMETERS).reindex(columns=[*ARM_PARAMETERS, "seed"])
    played = gathered.scores[gathered.scores["run"].isin(arms.index)].rename(columns={"truncated": "truncated_share"})
    table = played.join(arms, on="run").reindex(columns=list(SCORE_COLUMNS)).astype({"dataset_return": float})
    return table.sort_values([*ARM_PARAMETERS, "seed", "game"], ignore_index=True)


def evaluated_otherwise(gathered: Gathered, base: Parameters) -> pd.DataFrame:
    """Runs that `scores` leaves out only because of their evaluation.

    Returns:
        columns run, method, rewards, why: "eval_episodes 3, not 10".
    """
    why = otherwise_evaluated(gathered, base, {}, ARM_PARAMETERS)
    arms = gathered.runs.reindex(columns=list(ARM_PARAMETERS)).loc[list(why)]
    return arms.assign(why=list(why.values())).rename_axis("run").reset_index()


def players(table: pd.DataFrame, method: str, control: str = "zero") -> pd.DataFrame:
    """Mean raw returns of the agent and of the players it has to beat, a row per game.

    Args:
        table: from `scores`.
        method: method of the agent.
        control: `rewards` of its control.

    Returns:
        index game; columns random, best constant action, data, cloning, cloning (sampled), control, agent; own actions
        (the agent's most frequent ones, in percent of its own choices, mean over seeds); truncated (shares of the
        episodes behind those means); seeds.
    """
    rows = {}
    for game, here in table.groupby("game"):
        agent, zero, clone = _arms(here, method, control)
        rows[game] = {
            "random": here["random_return"].iloc[0],
            "best constant action": here["constant_return"].iloc[0],
            "data": here["dataset_return"].iloc[0],
            "cloning": clone["agent_return"].mean(),
            "cloning, sampled": clone["sampled_return"].mean(),
            f"{control} rewards": zero["agent_return"].mean(),
            "agent": agent["agent_return"].mean(),
            "own actions": _most_frequent(agent["actions"]),
            f"own actions, {control} rewards": _most_frequent(zero["actions"]),
            "truncated %": 100 * agent["truncated_share"].mean(),
            f"truncated %, {control} rewards": 100 * zero["truncated_share"].mean(),
            "truncated %, cloning": 100 * clone["truncated_share"].mean(),
            "truncated %, data": here["dataset_truncated_percent"].iloc[0],
            "seeds": len(agent),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("game")


def _most_frequent(actions: pd.Series, number: int = 3) -> str:
    shares = pd.DataFrame(actions.tolist()).mean().sort_values(ascending=False, kind="stable")
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.head(number).items())


def differences(
    table: pd.DataFrame, method: str, control: str = "zero", otherwise: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Differences of the agent's return from each player it has to beat, with 95% intervals over training seeds.

    Welch's t interval if both have seeds, the one-sample t interval if the other is a number.

    Args:
        table, method, control: see `players`.
        otherwise: from `evaluated_otherwise`; refused runs of an arm without two seeds.

    Returns:
        columns game, better than, difference, low, high (raw returns; NaN with fewer than two seeds), verdict: ``yes``
        (the interval lies above 0), ``no`` (it lies below), ``inconclusive``, ``missing``, ``refused`` (runs of either
        side are cut, or evaluated differently), and refused: these runs and the reasons.
    """
    rows = []
    for game, here in table.groupby("game"):
        agent, zero, clone = _arms(here, method, control)
        mine = agent["agent_return"].to_numpy()
        arms = dict(zip(("agent", f"{control} rewards", "cloning"), (agent, zero, clone)))
        foreign = dict(zip(arms, (None, None, None) if otherwise is None else _arms(otherwise, method, control)))
        refused = {name: _refused(arm, foreign[name]) for name, arm in arms.items()}
        others = {
            f"{control} rewards": zero["agent_return"].to_numpy(),
            "cloning": clone["agent_return"].to_numpy(),
            "cloning, sampled": clone["sampled_return"].dropna().to_numpy(),
            "data": here["dataset_return"].to_numpy()[:1],
            "best constant action": here["constant_return"].to_numpy()[:1],
        }
        for name, other in others.items():
            measured_once = name in ("data", "best constant action")
            row = {"game": game, "better than": name, "difference": np.nan, "low": np.nan, "high": np.nan}
            why = refused["agent"] + refused.get(name.removesuffix(", sampled"), [])
            row["refused"] = "; ".join(why)
            if why:
                row["verdict"] = "refused"
            elif len(mine) > 1 and (measured_once or len(other) > 1) and np.isfinite(other).all():
                value, low, high = metrics.contrast([1, -1], [mine, other])
                row |= {"difference": value, "low": low, "high": high}
                row["verdict"] = "yes" if low > 0 else "no" if high < 0 else "inconclusive"
            rows.append(row | {"verdict": row.get("verdict", "missing")})
    return pd.DataFrame(rows, columns=list(DIFFERENCE_COLUMNS))


def _refused(arm: pd.DataFrame, foreign: pd.DataFrame | None) -> list[str]:
    """Runs, in words, that leave an arm without a score: cut ones, or ones evaluated differently."""
    cut = arm[arm["cut"].astype(bool)]
    named = [f"{run} ({share:.0%} of its episodes truncated)" for run, share in zip(cut["run"], cut["truncated_share"])]
    if foreign is not None and len(arm) < 2:
        named += [f"{run} ({why})" for run, why in zip(foreign["run"], foreign["why"])]
    return named


def verdict(compared: pd.DataFrame, control: str = "zero") -> list[str]:
    """A sentence per game: was it learned from reward, and what does the agent beat?"""
    sentences = []
    for game, here in compared.groupby("game"):
        rows = here.set_index("better than")
        own = rows.loc[f"{control} rewards"]
        if own["verdict"] == "missing":
            sentences.append(f"**{game}**: learned from reward: runs are missing.")
            continue
        if own["verdict"] == "refused":
            sentences.append(
                f"**{game}**: learned from reward: no verdict, these runs have no score: {own['refused']}."
            )
            continue
        beaten = [name for name, row in rows.iterrows() if row["verdict"] == "yes"]
        limits = f"{own['low']:+.1f} to {own['high']:+.1f}"
        sentences.append(
            f"**{game}**: learned from reward: **{own['verdict']}** (real minus {control} rewards "
            f"{own['difference']:+.1f}, 95% interval {limits}). Better than: {', '.join(beaten) or 'nothing'}."
        )
    return sentences


def _arms(table: pd.DataFrame, method: str, control: str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    own = table["method"] == method
    return (
        table[own & (table["rewards"] == "real")],
        table[own & (table["rewards"] == control)],
        table[table["method"] == "bc"],
    )
