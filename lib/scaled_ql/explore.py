"""Interactive views for notebooks; each widget has a static twin for rendered reports."""

import asyncio
import base64
import contextlib
import html
import io
import json
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import av
import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML, DisplayHandle, Image, Video, display
from matplotlib.figure import Figure
from tqdm import tqdm

from scaled_ql import plots, run_table
from scaled_ql.controls import Steps
from scaled_ql.environments import in_words
from scaled_ql.games import PUBLISHED_SOURCES, RULES, UnknownGame, rom_badge
from scaled_ql.metrics import human_normalized_mean, iqm
from scaled_ql.replay import Replay
from scaled_ql.replay.views import View
from scaled_ql.runs import Run

# They need JAX, which notebooks about data do not load.
AGENTS = (
    "agent_browser", "load_agent", "play_along", "show_figure", "show_moments", "show_state_map", "state_map_browser",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """What notebooks call of `browsers` and `play_along`."""
    if name in AGENTS:
        from scaled_ql import browsers, play_along

        return getattr(play_along if name == "play_along" else browsers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def to_png(figure: Figure) -> bytes:
    """Render and close a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


class Progress:
    """One progress line and one picture, updated in place: live in JupyterLab, a single output in a report."""

    def __init__(self, run: Run, unit: str, seconds_between_pictures: float = 20, first: str = ""):
        """Show nothing yet; `run` records the progress for its runner; `first` describes the first phase."""
        self.run, self.unit, self.period, self.first = run, unit, seconds_between_pictures, first
        self._line: DisplayHandle | None = None
        self._picture: DisplayHandle | None = None
        self._started = self._drawn = time.monotonic()
        self._initial = 0

    def update(
        self, done: int, total: int, draw: Callable[[], Figure] | None = None, final: bool | None = None
    ) -> None:
        """Update the line, and from time to time the picture.

        Args:
            done, total: units of work.
            draw: function that makes the picture.
            final: whether the picture is the last one, which is always drawn; None: whether `total` is reached.
        """
        now = time.monotonic()
        if self._line is None:
            self._initial = done
        line = tqdm.format_meter(done, total, now - self._started, unit=self.unit, initial=self._initial, ncols=100)
        if self._line is None and done < total and self.first:
            line += f"  {self.first}"
        self._line = _put(self._line, {"text/plain": line}, raw=True)
        final = done >= total if final is None else final
        if draw is not None and (self._picture is None or final or now - self._drawn > self.period):
            self._picture = _put(self._picture, Image(to_png(draw())))
            self._drawn = now
        self.run.progress(done, total)


def _put(handle: DisplayHandle | None, content: object, raw: bool = False) -> DisplayHandle:
    """Show something in place of a handle's content."""
    if handle is None:
        handle = DisplayHandle()
        handle.display(content, raw=raw)
    else:
        handle.update(content, raw=raw)
    return handle


def film(file: str | Path) -> Video:
    """Embed an MP4 with controls in the notebook; until it plays, or if it cannot, its middle frame is shown."""
    with av.open(str(file)) as container:
        middle = container.streams.video[0].frames // 2
        picture = next(frame for number, frame in enumerate(container.decode(video=0)) if number >= middle).to_image()
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    poster = base64.b64encode(buffer.getvalue()).decode()
    attributes = f'controls muted loop poster="data:image/jpeg;base64,{poster}"'
    return Video(str(file), embed=True, html_attributes=attributes)


def episode_view(replay: Replay, game: str, episode: int, step: int, stack_size: int = 4) -> Figure:
    """One moment of an episode: the frame stack the agent sees, the action by name, the reward, the return so far.

    Args:
        replay: an open store.
        game: one of its games.
        episode: row of its episode table.
        step: step within the episode.
        stack_size: frames shown, oldest first.
    """
    row = replay.episodes(game).iloc[episode]
    t, start = int(row["start"]) + step, int(row["start"])
    first = max(t - stack_size + 1, start)
    frames = replay.frames_at(game, np.arange(first, t + 1))
    stack = np.concatenate([np.zeros((stack_size - len(frames), 84, 84), np.uint8), frames])
    recording = next(one for one in replay.recordings(game) if one.manifest["run"] == row["run"])
    steps = np.array([row["row"]]), np.array([step + 1])
    rewards, action = recording.stretches("reward", *steps), recording.stretches("action", *steps)[-1]
    missing = [word for word, there in (("beginning lost", row["continued"]), ("truncated", row["truncated"])) if there]
    figure, axes = plt.subplots(1, stack_size, figsize=(2.1 * stack_size, 2.7))
    for age, (axis, frame) in enumerate(zip(np.atleast_1d(axes), stack)):
        axis.imshow(frame, cmap="gray", vmin=0, vmax=255)
        axis.set_axis_off()
        axis.set_title("now" if age == stack_size - 1 else f"{stack_size - 1 - age} before", fontsize="small")
    figure.suptitle(
        f"{game}, episode {', '.join([str(episode), *missing])}, step {step} of {int(row['length']) - 1}: "
        f"{replay.action_names(game)[action]}, "
        f"reward {rewards[-1]:g}, return so far {rewards[:-1].sum():g} (at the end {row['episode_return']:g})",
        fontsize="medium",
    )
    return figure


def episode_browser(replay: Replay) -> widgets.Widget:
    """Controls over game, episode and step around `episode_view`, for JupyterLab; keys as in `agent_browser`."""
    game = widgets.Dropdown(options=replay.games, description="game")
    episode = widgets.IntSlider(description="episode", min=0, max=0, continuous_update=False)
    words, picture = widgets.HTML(), widgets.Image(format="png")

    def set_game(_: object = None) -> None:
        episode.unobserve(set_episode, "value")  # shown once, below
        episode.value, episode.max = 0, len(replay.episodes(game.value)) - 1
        episode.observe(set_episode, "value")
        set_episode()

    def set_episode(_: object = None) -> None:
        rewards = replay.episode(game.value, episode.value)["reward"]
        steps.set_episode(len(rewards), {"reward": np.flatnonzero(rewards)})

    def show() -> None:
        figure = episode_view(replay, game.value, episode.value, steps.slider.value)
        words.value = f'<div role="status">{html.escape(figure.get_suptitle())}</div>'
        figure.suptitle("")
        picture.value = to_png(figure)

    steps = Steps(show)
    game.observe(set_game, "value")
    set_game()
    return widgets.VBox([widgets.HBox([game, episode]), steps, words, picture])


def sliders(
    draw: Callable[..., Figure], choices: Mapping[str, Sequence], start: Mapping[str, object]
) -> widgets.Widget:
    """Sliders for the arguments of a drawing function, with its figure, for JupyterLab.

    Args:
        draw: function that makes the figure, with the choices as keyword arguments.
        choices: values of each argument, in the order of its slider.
        start: initial value of each argument.
    """
    picture = widgets.Image(format="png")
    controls = {
        name: widgets.SelectionSlider(options=values, value=start[name], description=name, continuous_update=False)
        for name, values in choices.items()
    }

    def show(_: object = None) -> None:
        picture.value = to_png(draw(**{name: control.value for name, control in controls.items()}))

    for control in controls.values():
        control.observe(show, "value")
    show()
    return widgets.VBox([widgets.HBox(list(controls.values())), picture])


def values(named: Mapping[str, object]) -> None:
    """Print named values, one per line: numbers and arrays to six digits, anything else unchanged."""
    width = max(map(len, named))
    for name, value in named.items():
        number = np.asarray(value)
        shown = f"{number.item():.6g}" if number.ndim == 0 and number.dtype.kind == "f" else value
        if number.ndim and number.dtype.kind == "f":
            shown = ", ".join(f"{x:.6g}" for x in number.ravel())
        print(f"{name:{width}}  {shown}")


def table(
    data: pd.DataFrame, decimals: int = 1, caption: str = "", none: Sequence[Hashable] = (),
    links: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Show a table, numbers rounded, readable in a report; a long or wide one scrolls.

    Args:
        data: table to show; missing values are dashes.
        decimals: decimals of numbers.
        caption: caption above the table.
        none: columns whose missing values are findings, not gaps, and are shown as the word "none".
        links: columns that name runs, separated by commas, and the notebook of each: names lead to the runs' reports.
            A column of files of the gallery is linked by ``gallery``.
    """
    display(HTML(_styled(data, decimals, caption, none, links)))


def _styled(
    data: pd.DataFrame,
    decimals: int,
    caption: str,
    none: Sequence[Hashable] = (),
    links: Mapping[str, str] | None = None,
) -> str:
    floats = data.select_dtypes("float").columns
    data = data.copy()
    data[floats] = data[floats].round(decimals) + 0.0  # no -0.0
    style = data.style.format(precision=decimals, thousands=",", na_rep="–", escape="html")
    style = style.set_caption(html.escape(caption, quote=False))
    style = style.format_index(escape="html", axis=0).format_index(escape="html", axis=1)
    if len(none):
        style = style.format(precision=decimals, thousands=",", na_rep="none", escape="html", subset=list(none))
    for column, notebook in (links or {}).items():
        style = style.format(partial(_report_links, notebook), subset=[column])
    words = [i for i, column in enumerate(data.columns) if not pd.api.types.is_numeric_dtype(data[column])]
    looks = {"caption": "text-align: left; white-space: pre-line; min-width: 20em"}
    looks |= {f".col{i}": "text-align: left" for i in words}
    style = style.set_table_styles([{"selector": key, "props": value} for key, value in looks.items()])
    if isinstance(data.index, pd.RangeIndex):
        style = style.hide(axis="index")
    style = style.set_table_attributes('class="tex2jax_ignore mathjax_ignore"')  # names of files have dollar signs
    return f'<div style="max-height: 110em; overflow: auto">{style.to_html()}</div>'


def _report_links(notebook: str, names: str) -> str:
    """Runs' names, each a link from a report of the same outputs folder; `site` finds and changes them."""
    page = "" if notebook == "gallery" else "/run.html"
    return ", ".join(f'<a href="../../{notebook}/{name}{page}">{name}</a>' for name in names.split(", "))


def records(data: pd.DataFrame) -> list[dict]:
    """Rows as JSON values: plain numbers, None if missing; an index becomes columns."""
    flat = data.set_axis([" ".join(name) if isinstance(name, tuple) else name for name in data.columns], axis=1)
    return json.loads(flat.reset_index().to_json(orient="records"))


_refreshing: list[asyncio.Task] = []  # of `watch_runs`, at most one


def watch_runs(outputs: str | Path, seconds: float = 10, limit: int = 8) -> widgets.Widget:
    """Runs below an outputs folder, wherever they were started, in JupyterLab: states, progress, scores, curves.

    It refreshes itself whenever no cell is running; of several in one kernel, the last one does.

    Args:
        outputs: an outputs folder.
        seconds: between two refreshments.
        limit: runs whose curves are drawn, the ones updated last.
    """
    named = widgets.Text(description="runs", placeholder="part of notebook/run")
    live = widgets.ToggleButton(value=True, description="refresh")
    rows = widgets.HTML(layout=widgets.Layout(max_height="24em", overflow="auto"))
    picture = widgets.Image(format="png")

    def show(_: object = None) -> None:
        found = run_table.gather(Path(outputs))
        meant = (found["notebook"] + "/" + found["run"]).str.contains(named.value, regex=False)
        found = found[meant].reset_index(drop=True)
        shown = run_table.in_words(found, time.time()).drop(columns="differs")
        rows.value = _styled(shown, 1, f"{len(found)} runs at {time.strftime('%H:%M:%S')}")
        logged = [Path(outputs, row.notebook, row.run) for row in found.itertuples()]
        logged = [folder for folder in logged if (folder / "metrics.jsonl").exists()][:limit]
        picture.value = to_png(plots.compare_curves(run_table.learning_curves(logged)))

    async def refresh() -> None:
        while True:
            await asyncio.sleep(seconds)
            with contextlib.suppress(FileNotFoundError):  # a run that is being deleted
                if live.value:
                    show()

    named.observe(show, "value")
    show()
    while _refreshing:
        _refreshing.pop().cancel()
    with contextlib.suppress(RuntimeError):  # a program without an event loop, unlike a kernel
        _refreshing.append(asyncio.get_running_loop().create_task(refresh()))
    return widgets.VBox([widgets.HBox([named, live]), rows, picture])


def sources(replay: Replay) -> pd.DataFrame:
    """Origin and missing parts of each recording, whole, whatever the view shows.

    Returns:
        index game, run; columns source, transitions, episodes, gaps (number), gap rows (rows of the log that no file
        holds, unknown for whole files), excluded (rows), left out (files or ends of files), rewards ("raw" or
        "clipped"), complete. Columns that only imports have are NA for other recordings.
    """
    rows = []
    for game in replay.games:
        reports = {report["run"]: report for report in replay.import_reports(game)}
        for recording in replay.recordings(game):
            report = reports.get(recording.manifest["run"])
            published = recording.manifest["source"] in PUBLISHED_SOURCES  # without a report: its import was killed
            rows.append(
                {"game": game, "run": recording.manifest["run"], "source": recording.manifest["source"],
                 "transitions": recording.num_transitions, "episodes": len(recording.starts),
                 **(_counts(report) if report else dict.fromkeys(("gaps", "gap rows", "excluded", "left out"), pd.NA)),
                 "rewards": recording.manifest["rewards"],
                 "complete": ("yes" if report["complete"] else "no") if report else ("no" if published else pd.NA)}
            )  # fmt: skip
    counts = dict.fromkeys(("gaps", "gap rows", "excluded", "left out"), "Int64")
    return pd.DataFrame(rows).astype(counts).set_index(["game", "run"])


def recorded_rules(replay: Replay) -> pd.DataFrame:
    """The rules of play of each recording, in words; "not known" if its manifest lacks one.

    Returns:
        index game, run; a column for each of `games.RULES`, named by its words.
    """
    rows = {
        (game, manifest["run"]): {words: in_words(manifest[name]) for name, words in RULES.items()}
        for game in replay.games
        for manifest in replay.manifests(game)
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["game", "run"])


def _counts(report: dict) -> dict[str, object]:
    rows = [gap["last"] - gap["first"] + 1 for gap in report["gaps"] if "last" in gap]
    known = len(rows) == len(report["gaps"])
    return {
        "gaps": len(report["gaps"]), "gap rows": sum(rows) if known else pd.NA,
        "excluded": len(report["excluded"]), "left out": len(report["left_out"]),
    }  # fmt: skip


def findings(replay: Replay, kind: str) -> pd.DataFrame:
    """Missing or bad data found by imports: one row per entry of `import.json`, files without their folder.

    Args:
        replay: an open store.
        kind: ``"gaps"``, ``"excluded"`` or ``"left_out"``.
    """
    rows = []
    for game in replay.games:
        for report in replay.import_reports(game):
            for entry in report[kind]:
                folder = str(entry.get("file") or entry.get("before") or "").rpartition("/")[0] + "/"
                plain = {
                    name: value.replace(folder, "") if isinstance(value, str) and folder != "/" else value
                    for name, value in entry.items()
                }
                rows.append({"game": game, "run": report["run"], **plain})
    return pd.DataFrame(rows).rename(columns={"first": "first row", "last": "last row", "before": "found before"})


def show_findings(replay: Replay, limit: int = 20) -> None:
    """Show the first rows of each table of `findings`; nothing if imports found no problem."""
    titles = {"gaps": "Gaps: missing rows or files", "excluded": "Excluded: invalid rows",
              "left_out": "Left out: files, or the rest of files, that could not be read"}  # fmt: skip
    for kind, title in titles.items():
        found = findings(replay, kind)
        if len(found):
            shown = f"the first {limit} of {len(found):,}" if len(found) > limit else f"all {len(found)}"
            table(
                found.head(limit).convert_dtypes(),
                caption=f"{title}; {shown}. The full list is in import.json of each game and run",
            )


def recorded_episodes(replay: Replay) -> pd.DataFrame:
    """All episodes of the view's games and recordings, including those that the view does not show.

    Returns:
        columns game, run, start (transitions before it in its recording), length, fraction (of its recording, in
        [0, 1)), episode_return, terminal, truncated, continued, incomplete, clipped, in_view.

        An episode is incomplete, so that its return is not a game's, if its beginning was lost; if the next one's
        beginning was lost; if the recording ends episodes at a lost life; and, in a DQN-Replay log, if it does not
        end, at the end of the log or of its readable part. Other truncated episodes reached a time limit: their return
        counts, but `metrics.human_normalized_mean` gives no score if most were cut short.
    """
    tables = []
    for game in replay.games:
        for number, recording in enumerate(replay.recordings(game)):
            names = ["start", "length", "episode_return", "terminal", "truncated", "continued"]
            episodes = recording.table.select(names).to_pandas()
            cut = recording.manifest["source"] == "DQN-Replay"
            broken = np.append(episodes["continued"].to_numpy()[1:], False) | cut
            by_life = recording.manifest["life_loss_terminal"] is True
            episodes["incomplete"] = episodes["continued"] | (episodes["truncated"] & broken) | by_life
            episodes["fraction"] = recording.starts / recording.num_transitions
            episodes["clipped"] = recording.manifest["rewards"] == "clipped"
            episodes["in_view"] = np.isin(recording.table["row"].to_numpy(), replay.rows_in_use(game, number)[0])
            tables.append(episodes.assign(game=game, run=recording.manifest["run"]))
    return pd.concat(tables, ignore_index=True)


def overview(replay: Replay, episodes: pd.DataFrame) -> pd.DataFrame:
    """Summarise a view, one row per game: amount, returns, ROM.

    Args:
        replay: an open store.
        episodes: its `recorded_episodes`.
    """
    shown = episodes[episodes["in_view"]]
    games = shown.groupby("game")
    columns = games.agg(transitions=("length", "sum"), episodes=("length", "size"))
    columns["truncated"] = games["truncated"].sum()
    columns["beginning lost"] = games["continued"].sum()
    returns = shown[~shown["incomplete"]].groupby("game")["episode_return"].agg(["min", "mean", "max"])
    columns = columns.join(returns.add_prefix("return "))
    if not replay.view.runs:  # bytes are known only for all recordings together
        held = {game: sum(recording.num_transitions for recording in replay.recordings(game)) for game in replay.games}
        stored = pd.Series({game: replay.stored_bytes(game) / held[game] for game in replay.games})
        columns["bytes per transition"] = stored.replace(0, np.nan)
    columns["sticky actions, %"] = [
        np.nan if (sticky := replay.manifests(game)[0]["sticky_actions"]) is None else 100 * sticky
        for game in columns.index
    ]
    columns["ROM"] = [rom_badge(game, replay.manifests(game)) for game in columns.index]
    return columns


def describe_view(view: View) -> str:
    """Describe a view in words."""
    runs = f"run {', '.join(map(str, view.runs))}" if view.runs else "all runs"
    words = [f"{', '.join(view.games) or 'all games'}, {runs} of each"]
    if view.first < 1:
        words.append(f"of each run the trajectories that begin in the first {100 * view.first:.4g}% of its transitions")
    if view.between:
        first, stop = view.between
        words.append(f"of each run the trajectories that begin at its transitions {first:,} to {stop - 1:,}")
    if view.uniform < 1:
        words.append(
            f"of these {100 * view.uniform:.4g}% of each game's transitions, drawn uniformly (seed {view.seed})"
        )
    return "; ".join(words) + "."


def view_shares(replay: Replay, whole: Replay) -> pd.DataFrame:
    """Number of transitions of each game that a view keeps; 0 for games that it leaves out.

    Args:
        replay: the view of it.
        whole: the dataset without the view.

    Returns:
        index game; columns transitions (of the dataset), in its trajectories, drawn, share (%).
    """
    rows = {}
    for game in whole.games:
        total = whole.num_transitions(game)
        kept = replay.num_transitions(game) if game in replay.games else 0
        drawn = max(1, round(replay.view.uniform * kept)) if kept else 0
        rows[game] = {
            "transitions": total,
            "in its trajectories": kept,
            "drawn": drawn,
            "share, %": 100 * drawn / total,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("game")


def begins_in_first(episodes: pd.DataFrame, fraction: float) -> pd.Series:
    """Whether an episode begins in this first fraction of its recording's transitions, bool; see `View.first`."""
    end = episodes["start"] + episodes["length"]
    total = end.groupby([episodes["game"], episodes["run"]]).transform("max")
    return episodes["start"] < (fraction * total).round()


def quality_over_time(episodes: pd.DataFrame, bins: int = 20) -> pd.DataFrame:
    """Human-normalised score of each game's player in equal parts of its recordings.

    The score is of the mean return of the episodes, over all recordings, that begin in a part; a part in which none
    begins repeats the previous score. Incomplete episodes do not count; if most others were cut short, there is none.

    Args:
        episodes: from `recorded_episodes`.
        bins: number of parts.

    Returns:
        columns game, fraction (the part's middle), human_normalized (NaN if unknown), clipped (whether rewards are);
        `bins` rows a game.
    """
    tables = []
    for game, table in episodes.groupby("game", sort=False):
        whole = table[~table["incomplete"]]
        parts = whole.groupby((whole["fraction"] * bins).astype(int))
        scores = pd.Series({number: _mean_or_nan(game, part) for number, part in parts}, dtype=float)
        scores = scores.reindex(np.arange(bins), method="ffill")  # a part without a score keeps none
        quality = {"game": game, "fraction": (np.arange(bins) + 0.5) / bins, "clipped": bool(table["clipped"].any())}
        tables.append(pd.DataFrame(quality | {"human_normalized": scores.to_numpy()}))
    return pd.concat(tables, ignore_index=True)


def compare_parts(episodes: pd.DataFrame, parts: Mapping[str, pd.Series]) -> pd.DataFrame:
    """Amount and quality of the data in parts of recordings.

    Args:
        episodes: from `recorded_episodes`.
        parts: masks of their episodes by name, bool [episodes].

    Returns:
        index game, run; for each part the columns transitions, episodes, truncated (share of its episodes, in %), mean
        return (of complete ones; NaN without any) and score (that return, human-normalised, in %; NaN if most of them
        were cut short). The last row holds sums, and the IQM of the scores over games.
    """
    columns = {}
    for name, mask in parts.items():
        part = episodes[mask]
        runs, whole = part.groupby(["game", "run"]), part[~part["incomplete"]]
        recordings = whole.groupby(["game", "run"])
        table = runs.agg(transitions=("length", "sum"), episodes=("length", "size"))
        table["truncated, %"] = 100 * runs["truncated"].mean()
        table["mean return"] = recordings["episode_return"].mean()
        scores = {key: 100 * _mean_or_nan(key[0], recording) for key, recording in recordings}
        table["score, %"] = pd.Series(scores, dtype=float)
        columns[name] = table
    compared = pd.concat(columns, axis=1)
    counts = [(part, name) for part in parts for name in ("transitions", "episodes")]
    compared[counts] = compared[counts].fillna(0)
    last = {column: compared[column].sum() for column in counts}
    last |= {(part, "score, %"): 100 * iqm_over_games(episodes[mask]) for part, mask in parts.items()}
    compared.loc[("all; IQM", ""), :] = pd.Series(last)
    return compared.astype(dict.fromkeys(counts, "int64"))


def iqm_over_games(episodes: pd.DataFrame) -> float:
    """IQM over games of the human-normalised mean return; NaN if no game has one."""
    whole = episodes[~episodes["incomplete"]]
    scores = [_mean_or_nan(game, played) for game, played in whole.groupby("game")]
    known = [score for score in scores if np.isfinite(score)]
    return iqm(np.array(known)) if known else float("nan")


def _mean_or_nan(game: str, episodes: pd.DataFrame) -> float:
    """`human_normalized_mean`; NaN for a game without reference scores."""
    try:
        return human_normalized_mean(game, episodes)
    except UnknownGame:
        return float("nan")
