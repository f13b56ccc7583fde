"""The runs of an outputs folder: a table of them, two or more compared, and what may be deleted."""

import json
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from scaled_ql import metrics, parameters, runs
from scaled_ql.metrics import digits

UNIMPORTANT = (parameters.INCIDENTAL - {"seed"}) | {"built_like"}


def last_score(folder: Path) -> str:
    """IQM over games of a finished run's human-normalised scores, in percent; "" without scores.

    A game whose episodes were mostly truncated has no score.
    """
    return _score(runs.read_json(folder / "summary.json"))


def _score(summary: dict[str, Any]) -> str:
    games = _games(summary)
    scores = [row.get("human-normalised %") for row in games.values()]
    known = [score for score in scores if score is not None]
    return f"{metrics.iqm(known):.1f}%" if known else ""


def _games(summary: dict[str, Any]) -> dict[str, dict]:
    """What a summary says of each game that was played; reports about data list games otherwise."""
    games = summary.get("games", {})
    return games if isinstance(games, dict) else {}


def describe(folder: Path) -> dict[str, str]:
    """State of an unfinished run, from the files of its folder: state, step, steps/s, loss, time left."""
    status = runs.read_json(folder / "status.json")
    row = {"state": status.get("state", "waiting")}
    if not status.get("total"):
        return row
    left = status["total"] - status["done"]
    row |= {"step": f"{status['done']:,} of {status['total']:,}", "state": row["state"] if left else "evaluating"}
    last = runs.last_line(folder / "metrics.jsonl")
    if last and left:
        seconds = left / last["steps_per_second"]
        row |= {"steps/s": f"{last['steps_per_second']:.1f}", "loss": f"{last['loss']:.3f}"}
        row["time left"] = f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
    return row


def gather(outputs: Path) -> pd.DataFrame:
    """All runs below an outputs folder, the one updated last first.

    Returns:
        columns notebook, run, state (finished, running, failed, interrupted; stopped: killed), done, total (steps or
        transitions; NaN where unknown), updated (seconds since 1970), score (`last_score`), returns (mean raw return by
        game), parameters (as stored), error (of a failed run).
    """
    rows = []
    for file in sorted(outputs.glob("*/*/parameters.yaml")):
        folder = file.parent
        row: dict[str, Any] = {"notebook": folder.parent.name, "run": folder.name, "error": ""}
        try:
            status = runs.read_json(folder / "status.json")
            summary = runs.read_json(folder / "summary.json")
            row |= {"state": state(folder), "score": _score(summary), "parameters": parameters.load(file)}
        except (runs.RunError, parameters.ParameterError) as error:
            rows.append(
                row | {"state": "unreadable", "error": str(error), "score": "", "parameters": {}, "returns": {}}
            )
            continue
        played = {game: of.get("agent_return") for game, of in _games(summary).items()}
        row |= {name: status.get(name) for name in ("done", "total", "updated")} | {"error": status.get("error", "")}
        rows.append(row | {"returns": {game: mean for game, mean in played.items() if mean is not None}})
    columns = ["notebook", "run", "state", "done", "total", "updated", "score", "returns", "parameters", "error"]
    table = pd.DataFrame(rows, columns=columns).astype({"done": float, "total": float, "updated": float})
    return table.sort_values("updated", ascending=False, kind="stable", ignore_index=True)


def state(folder: Path) -> str:
    """A run's state as its status file says, but ``stopped`` where it says running and no process holds its lock."""
    said = runs.read_json(folder / "status.json").get("state", "not started")
    return "stopped" if said == "running" and not runs.is_locked(folder / ".lock") else said


def in_words(table: pd.DataFrame, now: float) -> pd.DataFrame:
    """The table of `gather` for people.

    Args:
        table: some of its rows.
        now: seconds since 1970.

    Returns:
        columns notebook, run, state, progress, age, score, differs: the parameters in which runs of a notebook differ.
    """
    shown = table[["notebook", "run", "state"]].copy()
    known = table["total"].notna() & (table["state"] != "finished")
    steps = [f"{done:,.0f} of {total:,.0f}" for done, total in zip(table["done"], table["total"])]
    shown["progress"] = pd.Series(steps, table.index, dtype=object).where(known, "")
    shown["age"] = [age(now - updated) if updated == updated else "" for updated in table["updated"]]
    raw = [", ".join(f"{game} {digits(mean)}" for game, mean in returns.items()) for returns in table["returns"]]
    shown["score"] = [score or (text if len(text) < 40 else "") for score, text in zip(table["score"], raw)]
    shown["differs"] = ""
    for _, group in table.groupby("notebook"):
        names = differing(group["parameters"])
        shown.loc[group.index, "differs"] = [
            ", ".join(f"{name} {given.get(name)}" for name in names if name in given) for given in group["parameters"]
        ]
    return shown


def age(seconds: float) -> str:
    """Seconds in the largest fitting unit: 40 s, 5 min, 3 h, 2 d."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def differing(several: Iterable[dict[str, Any]]) -> list[str]:
    """Names of the parameters in which runs differ, but for those that affect neither learning nor evaluation."""
    several = list(several)
    names = dict.fromkeys(name for given in several for name in given if name not in UNIMPORTANT)
    return [name for name in names if len({json.dumps(given.get(name)) for given in several}) > 1]


def compare_parameters(folders: Sequence[Path]) -> pd.DataFrame:
    """The parameters in which runs differ: index parameter, a column per run; "" where a run has no such parameter."""
    given = {_name(folder): parameters.load(folder / "parameters.yaml") for folder in folders}
    rows = {name: {run: values.get(name, "") for run, values in given.items()} for name in differing(given.values())}
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(given), dtype=object).rename_axis("parameter")


def compare_scores(folders: Sequence[Path]) -> pd.DataFrame:
    """Mean raw returns of runs with 95% bootstrap intervals over episodes: how well each agent was measured.

    Returns:
        index game, a column per run, such as "9.2 (8.1 to 10.4), 16 episodes"; "" where a run has no such game.
    """
    from scaled_ql import evaluation

    rows: dict[str, dict[str, str]] = {}
    for folder in folders:
        summary = runs.read_json(folder / "summary.json")
        for game in _games(summary):
            played = folder / "evaluation"
            file = played / f"step-{summary['steps']}" / f"{game}.csv" if "steps" in summary else played / f"{game}.csv"
            if file.exists():
                returns = pd.read_csv(file)["episode_return"]
                low, high = evaluation.mean_interval(returns)
                text = f"{digits(returns.mean())} ({digits(low)} to {digits(high)}), {len(returns)} episodes"
                rows.setdefault(game, {})[_name(folder)] = text
    names = [_name(folder) for folder in folders]
    return pd.DataFrame.from_dict(rows, orient="index", columns=names).fillna("").rename_axis("game")


def learning_curves(folders: Sequence[Path]) -> pd.DataFrame:
    """Logged metrics of runs that train: columns run, step, and all scalars of their logs."""
    tables = []
    for folder in folders:
        file = folder / "metrics.jsonl"
        if file.exists():
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            complete = [json.loads(line) for line in lines if line.endswith("\n")]  # a process may be writing the last
            tables.append(pd.DataFrame(complete).assign(run=_name(folder)))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["run", "step"])


def _name(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def leftovers(outputs: Path) -> dict[Path, str]:
    """What may be deleted: failed runs that recorded nothing, and files that stopped processes did not finish writing.

    Returns:
        path -> why, in words. Runs that hold a result or a checkpoint are never among them, nor anything of a run that
        another process is executing.
    """
    found: dict[Path, str] = {}
    for file in sorted(outputs.glob("*/*/parameters.yaml")):
        folder = file.parent
        if runs.is_locked(folder / ".lock") or runs.is_locked(folder / ".runner.lock"):
            continue
        if not runs.holds_results(folder):
            error = runs.read_json(folder / "status.json").get("error", "")
            found[folder] = f"{state(folder)}, recorded nothing{f': {error}' if error else ''}"
            continue
        for partial in sorted({*folder.rglob(".*.partial"), *folder.glob(".run.ipynb")}):
            found[partial] = "half-written"
    return found


def delete(paths: Iterable[Path]) -> None:
    """Delete files and folders."""
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The table of `gather` as JSON values, with `updated` as ISO 8601 in UTC."""
    rows = []
    for row in table.to_dict("records"):
        updated = row["updated"]
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(updated)) if updated == updated else None
        numbers = {name: int(row[name]) if row[name] == row[name] else None for name in ("done", "total")}
        rows.append(row | numbers | {"updated": stamp})
    return rows
