"""Figures: a tidy DataFrame or arrays in, a matplotlib figure out; colour-blind-safe, a game always one colour."""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from scaled_ql.games import FULL_ACTIONS
from scaled_ql.metrics import MOSTLY, iqm

PLAYERS = {
    "random": "#999999",
    "best constant action": "#cc79a7",
    "dataset": "#0072b2",
    "agent": "#d55e00",
    "human": "#009e73",
}


def set_style() -> None:
    """Set the style of all figures; called once per notebook."""
    import seaborn as sns  # slow to import

    sns.set_theme(style="whitegrid", context="notebook", palette="colorblind")
    plt.rcParams |= {
        "figure.dpi": 90,
        "savefig.dpi": 90,
        "axes.titlesize": "medium",
        "figure.constrained_layout.use": True,
    }


def game_colors(games: list[str]) -> dict[str, tuple[float, float, float]]:
    """A colour per game: ten told apart by hue, then the cycle repeats."""
    import seaborn as sns

    return dict(zip(games, sns.color_palette("colorblind", 10) * (len(games) // 10 + 1)))


def action_colors(names: Sequence[str]) -> list[tuple[float, float, float]]:
    """A colour per action of a game: up to ten are safe for the colour-blind, more are told apart by hue."""
    import seaborn as sns

    return sns.color_palette("colorblind" if len(names) <= 10 else "husl", len(names))


def _grid(number: int, width: float = 4.2, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    columns = min(number, 3 if number <= 9 else 4)
    rows = -(-number // columns)
    width = min(width, 12.8 / columns)  # more would shrink the letters in a report
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for axis in axes.flat:
        axis.xaxis.set_major_locator(MaxNLocator(4))
    for spare in axes.flat[number:]:
        spare.set_visible(False)
    return figure, list(axes.flat[:number])


def returns_over_time(episodes: pd.DataFrame) -> Figure:
    """Raw return of each episode over collection time, with a running mean over a tenth of a run's episodes.

    Args:
        episodes: columns game, start, episode_return; with a column run, each run has a separate line; with a column
            incomplete, those episodes are crosses and in no mean.
    """
    games = list(episodes["game"].unique())
    figure, axes = _grid(len(games))
    colors = game_colors(games)
    episodes = pd.DataFrame({"run": 1, "incomplete": False}, index=episodes.index).assign(**episodes)
    for axis, (game, table) in zip(axes, episodes.groupby("game", sort=False)):
        whole, cut = table[~table["incomplete"]], table[table["incomplete"]]
        size = 12 if len(table) < 1_000 else 3
        axis.scatter(whole["start"], whole["episode_return"], s=size, alpha=0.5, color=colors[game])
        for _, run in whole.groupby("run"):
            window = max(len(run) // 10, 1)
            smooth = run["episode_return"].rolling(window, min_periods=1, center=True).mean()
            axis.plot(run["start"], smooth, color="black", lw=1.5)
        if len(cut):
            axis.scatter(cut["start"], cut["episode_return"], s=30, marker="x", color="#666666", label="incomplete")
            axis.legend(fontsize="x-small")
        axis.set(title=game, xlabel="transitions before the episode", ylabel="episode return (raw)")
    return figure


def quality_over_time(quality: pd.DataFrame) -> Figure:
    """Human-normalised score of the player against the fraction of the recording: each game, and their IQM.

    Up to ten games have a colour each, more are grey; where they are many, lines far above the IQM leave the figure.

    Args:
        quality: columns game, fraction, human_normalized, clipped; see `explore.quality_over_time`.
    """
    known = quality.dropna(subset="human_normalized")
    games = list(known["game"].unique())
    figure, axis = plt.subplots(figsize=(8.5, 4.2))
    few, colors = len(games) <= 10, game_colors(games)
    name = f"IQM over {len(games)} games" if len(games) != 1 else games[0]
    for game, table in known.groupby("game", sort=False):
        look = {"color": colors[game], "label": game if game != name else ""} if few else {"color": "#cccccc"}
        axis.plot(table["fraction"], table["human_normalized"], lw=1, **look)
    middle = known.groupby("fraction")["human_normalized"].agg(iqm)
    axis.plot(middle.index, middle, color="black", lw=3, label=name)
    if not few:
        _limit_to_the_middle(axis, known["human_normalized"], middle)
    axis.axvline(0.2, color="black", ls="--", lw=1)
    top = ("data", "axes fraction")
    axis.annotate("first 20%", (0.2, 1), (0, 3), top, "offset points", ha="center", fontsize="small")
    axis.set(xlim=(0, 1), xlabel="fraction of the recording", ylabel="human-normalised score")
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    clipped = quality.loc[quality["clipped"], "game"].nunique()
    if clipped:
        axis.set_title(
            f"rewards are clipped in {clipped} of {quality['game'].nunique()} games: see the text below", pad=20
        )
    axis.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _limit_to_the_middle(axis: Axes, scores: pd.Series, middle: pd.Series) -> None:
    """Cut off extreme scores, so that one game does not flatten all others."""
    low, high = min(scores.quantile(0.05), middle.min()), max(scores.quantile(0.9), 1.2 * middle.max())
    margin = 0.05 * (high - low)
    axis.set_ylim(low - margin, high + margin)


def action_histograms(actions: dict[str, np.ndarray], names: dict[str, list[str]]) -> Figure:
    """Share of each action in a game's transitions; arguments by game."""
    figure, axes = _grid(len(actions))
    colors = game_colors(list(actions))
    for axis, (game, taken) in zip(axes, actions.items()):
        share = np.bincount(taken, minlength=len(names[game])) / len(taken)
        axis.barh(names[game], share, color=colors[game])
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize="small" if len(share) <= 9 else "xx-small")
        axis.set(title=game, xlabel="share of transitions")
    return figure


def reward_density(rewards: dict[str, np.ndarray], bins: int = 20) -> Figure:
    """Rewards per 1,000 transitions over collection time, gains and losses separately; rewards by game."""
    figure, axes = _grid(len(rewards))
    for axis, (game, reward) in zip(axes, rewards.items()):
        edges = np.linspace(0, len(reward), bins + 1).astype(int)
        middles = (edges[:-1] + edges[1:]) / 2
        for sign, label, color in ((1, "gain", PLAYERS["human"]), (-1, "loss", PLAYERS["agent"])):
            rate = [1_000 * np.mean(np.sign(reward[a:b]) == sign) if b > a else 0 for a, b in pairwise(edges)]
            axis.plot(middles, rate, label=label, color=color)
        axis.set(title=game, xlabel="transition", ylabel="per 1,000 transitions", ylim=(0, None))
    axes[0].legend()
    return figure


def episode_lengths(episodes: pd.DataFrame) -> Figure:
    """Histogram of episode lengths per game, stacked by how an episode begins and ends in the recording.

    Args:
        episodes: columns game, length and, if known, truncated and continued.
    """
    games = list(episodes["game"].unique())
    figure, axes = _grid(len(games))
    colors = game_colors(games)
    episodes = pd.DataFrame({"truncated": False, "continued": False}, index=episodes.index).assign(**episodes)
    for axis, (game, table) in zip(axes, episodes.groupby("game", sort=False)):
        lost, cut = table["continued"], table["truncated"] & ~table["continued"]
        kinds = {
            "ended in the game": (~lost & ~cut, colors[game], ""),
            "truncated": (cut, "white", "////"),
            "beginning lost": (lost, "#666666", ""),
        }
        kinds = {kind: look for kind, look in kinds.items() if look[0].any()}
        here, color, hatch = zip(*kinds.values())
        lengths, looks = [table.loc[mask, "length"] for mask in here], {"color": color, "hatch": hatch}
        axis.hist(lengths, bins=15, stacked=True, label=list(kinds), edgecolor=colors[game], **looks)
        if list(kinds) != ["ended in the game"]:
            axis.legend(fontsize="x-small", loc="upper right")
            axis.set_ylim(0, 1.4 * axis.get_ylim()[1])  # room for the legend
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.set(title=game, xlabel="agent steps", ylabel="episodes")
    return figure


def contact_sheet(rows: dict[str, np.ndarray]) -> Figure:
    """Frames in rows: uint8 [N, 84, 84] under a title each, all of equal N."""
    columns = max(len(frames) for frames in rows.values())
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.35 * columns, 1.6 * len(rows)), squeeze=False)
    for line, (title, frames) in zip(axes, rows.items()):
        for axis in line:
            axis.set_axis_off()
        for axis, frame in zip(line, frames):
            axis.imshow(frame, cmap="gray", vmin=0, vmax=255)
        line[0].set_title(title, loc="left")
    return figure


def learning_curves(metrics: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """Training against steps: the first metric per game, the others over all, then gradients.

    Args:
        metrics: rows of `training.train`.
        titles: names of metrics and their titles; see `methods.Method.metrics`. Absent metrics are skipped.
    """
    main = next(iter(titles))
    games = [name.removeprefix(f"{main}/") for name in metrics if name.startswith(f"{main}/")]
    titles = {**titles, "grad_norm": "gradient norm", "head_grad_rms": "head's gradient, RMS"}
    titles = {name: title for name, title in titles.items() if name in metrics}
    figure, axes = plt.subplots(1, len(titles), figsize=(15, 3.2), squeeze=False)
    few = {"marker": "o", "ms": 3} if len(metrics) <= 30 else {}  # a single row is a point
    for axis, (name, title) in zip(axes.flat, titles.items()):
        if name == main:
            for game, color in list(game_colors(games).items())[:10]:
                axis.plot(metrics["step"], metrics[f"{main}/{game}"], color=color, label=game, alpha=0.8, **few)
            axis.plot(metrics["step"], metrics[name], color="black", lw=2, label="all", **few)
        elif name == "q_data":
            axis.plot(metrics["step"], metrics["q_data"], color=PLAYERS["dataset"], label="actions of the data", **few)
            axis.plot(metrics["step"], metrics["q_greedy"], color=PLAYERS["agent"], label="greedy actions", **few)
        else:
            blocks = [column for column in metrics if re.fullmatch(rf"{name}_\d+", column)]  # the first is darkest
            for column, color in zip(blocks, plt.get_cmap("viridis")(np.linspace(0, 0.9, len(blocks)))):
                axis.plot(metrics["step"], metrics[column], color=color, alpha=0.8, **few)
            axis.plot(metrics["step"], metrics[name], color="black", **few)
        axis.set(title=title, xlabel="gradient step", yscale="log" if "grad" in name else "linear")
        if name in (main, "q_data"):
            axis.legend(fontsize="x-small")
    return figure


def compare_curves(curves: pd.DataFrame) -> Figure:
    """Learning curves of several runs.

    Args:
        curves: columns run, step, and metrics; losses, values and the gradient's norm are drawn if all runs have them,
            and without any a sentence says so.
    """
    import seaborn as sns

    wanted = ("loss", "td_loss", "cql_loss", "nll", "accuracy", "q_data", "entropy", "grad_norm")
    names = [name for name in wanted if name in curves and curves.groupby("run")[name].count().all()]
    if not names:
        figure = plt.figure(figsize=(6, 0.5))
        figure.text(0, 0.5, "These runs have logged no metric that all of them have.")
        return figure
    figure, axes = _grid(len(names))
    for axis, name in zip(axes, names):
        sns.lineplot(curves, x="step", y=name, hue="run", ax=axis, legend=name == names[0], errorbar=None)
    lines, labels = axes[0].get_legend_handles_labels()
    axes[0].get_legend().remove()
    figure.legend(lines, labels, loc="outside upper left", frameon=False)
    return figure


def transitions(batch: Any, games: list[str], action_names: Mapping[str, Sequence[str]]) -> Figure:
    """Each transition of a small batch: the last frame of the stack above, that of the stack n steps later below.

    Args:
        batch: a `replay.Batch`.
        games: names by number.
        action_names: action names of each game.
    """
    figure, axes = plt.subplots(2, len(batch.game), figsize=(2.1 * len(batch.game), 5), squeeze=False)
    for row, (above, below) in enumerate(axes.T):
        game, discount = games[batch.game[row]], float(batch.discount[row])
        above.imshow(batch.observation[row, :, :, -1], cmap="gray", vmin=0, vmax=255)
        above.set_title(f"{game}\n{action_names[game][batch.action[row]]}", fontsize="small")
        below.imshow(batch.next_observation[row, :, :, -1], cmap="gray", vmin=0, vmax=255)
        after = f"discount {discount:.3f}" if discount else "terminal: no bootstrap"
        below.set_title(f"reward {float(batch.reward[row]):g}\n{after}", fontsize="small")
        for axis in (above, below):
            axis.set_axis_off()
    return figure


def windows(batch: Any, games: list[str]) -> Figure:
    """Each window of a small batch, a row of its frames with each step's action, reward and, if known, return to go.

    Args:
        batch: a `replay.Sequences`.
        games: names by number.
    """
    rows, length = batch.action.shape
    figure, axes = plt.subplots(rows, length, figsize=(2.1 * length, 2.6 * rows), squeeze=False)
    for row, column in np.ndindex(rows, length):
        axis = axes[row, column]
        axis.imshow(batch.frames[row, column], cmap="gray", vmin=0, vmax=255)
        axis.set_axis_off()
        action = FULL_ACTIONS[batch.action[row, column]] if batch.mask[row, column] else "before the episode"
        given = f"reward {float(batch.reward[row, column]):g}{', end' if batch.terminal[row, column] else ''}"
        to_go = float(batch.return_to_go[row, column])  # NaN where the method does not ask for returns
        game = f"{games[batch.game[row]]}\n" if column == 0 else ""
        axis.set_title(f"{game}{action}\n{given}{'' if np.isnan(to_go) else f', to go {to_go:g}'}", fontsize="small")
    return figure


def batch(few: Any, games: list[str], action_names: Mapping[str, Sequence[str]]) -> Figure:
    """A small batch of either kind: `windows` or `transitions`."""
    return windows(few, games) if hasattr(few, "return_to_go") else transitions(few, games, action_names)


def predicted_and_target(predicted: np.ndarray, target: np.ndarray, atoms: np.ndarray, titles: Sequence[str]) -> Figure:
    """Return distributions of single transitions: what the network predicts, and its target, means as dashed lines.

    Args:
        predicted: [B, N].
        target: [B, N].
        atoms: [N].
        titles: [B].
    """
    figure, axes = _grid(len(titles), height=2.6)
    for axis, title, ours, wanted in zip(axes, titles, predicted, target):
        _distribution(axis, atoms, ours, PREDICTED, "predicted")
        _distribution(axis, atoms, wanted, TARGET, "target")
        known = np.flatnonzero(np.maximum(ours, wanted) > 1e-3)
        axis.set(title=title, xlabel="return z", xlim=(atoms[known[0]], atoms[known[-1]]))
        axis.legend(fontsize="x-small")
    return figure


def scores(table: pd.DataFrame, episodes: pd.DataFrame) -> Figure:
    """Mean raw return per game and player, the agent's single episodes as dots.

    Args:
        table: index game; columns random, dataset, agent and, where known, human.
        episodes: the agent's episodes, columns game, episode_return.
    """
    figure, axes = _grid(len(table), width=3.6)
    for axis, (game, row) in zip(axes, table.iterrows()):
        known = row[[player for player in PLAYERS if player in row and pd.notna(row[player])]].astype(float)
        axis.bar(known.index, known, color=[PLAYERS[player] for player in known.index])
        axis.set_xticks(range(len(known)), [player.replace(" action", "").replace(" ", "\n") for player in known.index])
        dots = episodes.loc[episodes["game"] == game, "episode_return"]
        axis.scatter(["agent"] * len(dots), dots, color="black", s=8, alpha=0.6, zorder=3)
        axis.axhline(0, color="black", lw=0.8)
        axis.set(title=game, ylabel="episode return (raw)")
    return figure


def score_curve(curve: pd.DataFrame, dataset: pd.Series) -> Figure:
    """The agent's mean raw return against gradient steps, a panel per game, with the data's mean as a dashed line.

    Points whose episodes were mostly truncated are hollow.

    Args:
        curve: from `evaluation.score_curve`.
        dataset: index game; mean return of the data.
    """
    games = list(curve["game"].unique())
    figure, axes = _grid(len(games), width=3.6)
    for axis, (game, rows) in zip(axes, curve.groupby("game", sort=False)):
        axis.plot(rows["step"], rows["agent_return"], color=PLAYERS["agent"], marker="o", ms=4, label="agent")
        axis.axhline(dataset[game], color=PLAYERS["dataset"], ls="--", lw=1, label="dataset")
        cut = rows[rows["truncated"] > MOSTLY]
        axis.plot(cut["step"], cut["agent_return"], "o", color=PLAYERS["agent"], mfc="white", ms=4)
        axis.set(title=game, xlabel="gradient step", ylabel="episode return (raw)")
    axes[0].legend(fontsize="x-small")
    return figure


def reward_control(table: pd.DataFrame, method: str, control: str) -> Figure:
    """Mean raw returns per game: a row per arm, a dot per training seed; lines for the data and the constant action.

    Args:
        table: from `reward_control.scores`; may be empty.
        method: method of the agent.
        control: `rewards` of its control.
    """
    games = sorted(table["game"].unique())
    figure, axes = _grid(max(len(games), 1), width=4.8)
    for axis, game in zip(axes, games):
        here = table[table["game"] == game]
        clones = here[here["method"] == "bc"]
        own = here[here["method"] == method]
        arms = {
            "agent": own.loc[own["rewards"] == "real", "agent_return"],
            f"{control} rewards": own.loc[own["rewards"] == control, "agent_return"],
            "cloning": clones["agent_return"],
            "cloning, sampled": clones["sampled_return"].dropna(),
        }
        for number, (name, values) in enumerate(arms.items()):
            color = PLAYERS["agent"] if name == "agent" else PLAYERS["random"]
            axis.scatter(values, np.full(len(values), number), color=color, s=28, alpha=0.8, zorder=3)
        axis.set_yticks(range(len(arms)), arms)
        axis.set_ylim(len(arms) - 0.5, -0.5)
        axis.axvline(here["dataset_return"].iloc[0], color="black", lw=1, label="data")
        axis.axvline(here["constant_return"].iloc[0], color="black", lw=1, ls=":", label="best constant action")
        axis.set(title=game, xlabel="mean episode return (raw)")
        axis.legend(fontsize=8, loc="best")
    return figure


def arms(table: pd.DataFrame, title: str) -> Figure:
    """Mean raw returns of the arms of a comparison: a row each, a dot per training seed, a bar for their mean.

    Args:
        table: columns arm, agent_return, random_return, dataset_return (missing where there is no dataset).
        title: target.
    """
    names = list(dict.fromkeys(table["arm"]))
    figure, axis = plt.subplots(figsize=(7.5, 1.1 + 0.45 * len(names)))
    colors = _arm_colors(names)
    for number, name in enumerate(names):
        returns = table.loc[table["arm"] == name, "agent_return"]
        axis.scatter(returns, np.full(len(returns), number), color=colors[name], s=28, alpha=0.8, zorder=3)
        axis.plot([returns.mean()] * 2, [number - 0.3, number + 0.3], color=colors[name], lw=2)
    for column, label, style in (("dataset_return", "data", "-"), ("random_return", "random play", ":")):
        if table[column].notna().any():
            axis.axvline(table[column].mean(), color="black", lw=1, ls=style, label=label)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set(title=title, xlabel="mean episode return (raw)")
    if axis.get_legend_handles_labels()[0]:  # beside the points, which may lie anywhere
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def arm_curves(curves: pd.DataFrame, title: str, xlabel: str) -> Figure:
    """Mean raw return against training steps: a thin line per run, a thick one for each arm's mean over seeds.

    Args:
        curves: from `transfer_report.curves`.
        title: target.
        xlabel: unit of `step`.
    """
    names = list(dict.fromkeys(curves["arm"]))
    figure, axis = plt.subplots(figsize=(7.5, 3.6))
    for name, color in _arm_colors(names).items():
        here = curves[curves["arm"] == name]
        for _, run in here.groupby("run"):
            axis.plot(run["step"], run["agent_return"], color=color, lw=0.7, alpha=0.45)
        mean = here.groupby("step")["agent_return"].mean()
        axis.plot(mean.index, mean, color=color, lw=2, marker="o", ms=4, label=name)
    axis.set(title=title, xlabel=xlabel, ylabel="episode return (raw)")
    if names:
        axis.legend(fontsize=8, loc="best")
    return figure


def _arm_colors(names: Sequence[str]) -> dict[str, str]:
    """Scratch is grey; others cycle."""
    others = [name for name in names if name != "scratch"]
    colors = dict(zip(others, ("#d55e00", "#0072b2", *OTHER_SYSTEMS) * len(others)))
    return {name: colors.get(name, "#777777") for name in names}


# One hue per family of systems, darker for the larger member; a system has the same colour in every figure.
SYSTEMS = {
    "DT (200M)": "#0072b2", "DT (40M)": "#7cc4ee", "BC (200M)": "#a8417c", "BC (80M)": "#dd9cc2",
    "MT Impala-DQN": "#999999", "Scaled QL (80M)": "#d55e00", "Behaviour policy": "#000000",
}  # fmt: skip
PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
OTHER_SYSTEMS = ("#009e73", "#e6b000", "#5d3a9b", "#7f4f24", "#4d5b66")


def system_colors(systems: Iterable[str]) -> dict[str, str]:
    """A colour per system: those of `SYSTEMS`, and distinct ones for others, by name."""
    others = sorted({*systems} - SYSTEMS.keys())
    return SYSTEMS | dict(zip(others, OTHER_SYSTEMS * (len(others) // len(OTHER_SYSTEMS) + 1)))


def system_bars(table: pd.DataFrame, colors: Mapping[str, str] = SYSTEMS) -> Figure:
    """Aggregate human-normalised scores: a panel each, a bar per system with its interval, hatched if not the paper's.

    "Behaviour policy" is a dashed line; a diamond is the paper's printed value.

    Args:
        table: columns panel, system, value, low, high (fractions) and, if known, printed.
        colors: from `system_colors`.
    """
    panels = list(table["panel"].unique())
    columns = min(len(panels), 2)
    longest = table[table["system"] != "Behaviour policy"].groupby("panel").size().max()
    size = (12.4, (0.46 * longest + 1.3) * -(-len(panels) // columns) + 0.4)
    figure, axes = plt.subplots(-(-len(panels) // columns), columns, figsize=size, squeeze=False)
    table = pd.DataFrame({"printed": np.nan}, index=table.index).assign(**table)
    for axis, (panel, rows) in zip(axes.flat, table.groupby("panel", sort=False)):
        bars, line = rows[rows["system"] != "Behaviour policy"], rows[rows["system"] == "Behaviour policy"]
        places = np.arange(len(bars))
        reach = np.abs(bars[["low", "high"]].sub(bars["value"], axis=0).to_numpy().T)
        fill = {"color": [colors[system] for system in bars["system"]], "edgecolor": "white"}
        hatch = ["" if system in SYSTEMS else "//" for system in bars["system"]]
        axis.barh(places, bars["value"], xerr=reach, hatch=hatch, error_kw={"lw": 1.2, "capsize": 3}, **fill)
        axis.scatter(bars["printed"], places, marker="D", s=26, color="white", edgecolor="black", zorder=3)
        # With few games a whisker can be many times as long as all bars; it then leaves the panel.
        right = max(0.01, line["value"].max(), min(bars["high"].max(), 2.5 * bars["value"].max()))
        for place, value, high in zip(places, bars["value"], bars["high"]):
            where = (min(max(high, 0), right), place), (6, 0), "data", "offset points"
            axis.annotate(f"{value:.1%}", *where, va="center", fontsize="small", bbox=PLAIN, zorder=4)
        axis.set_yticks(places, [textwrap.fill(system, 34) for system in bars["system"]], fontsize="small")
        for value in line["value"]:
            axis.axvline(value, color=colors["Behaviour policy"], ls="--", lw=1.3)
        axis.invert_yaxis()
        axis.set_xlim(max(1.05 * min(0.0, bars["low"].min()), -right), 1.25 * right)
        axis.grid(False, axis="y")
        axis.axvline(0, color="black", lw=0.8)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(PercentFormatter(1))
        axis.set(title=textwrap.fill(panel, 44, break_on_hyphens=False), xlabel="human-normalised score")
    for spare in axes.flat[len(panels) :]:
        spare.set_visible(False)
    _explain_bars(figure, table)
    return figure


def _explain_bars(figure: Figure, table: pd.DataFrame) -> None:
    """Add a legend of the marks in use above the panels."""
    policy = table.loc[table["system"] == "Behaviour policy", "value"].map("{:.1%}".format).unique()
    marks = {
        "95% interval over games": Line2D([], [], color="black", marker="|", lw=1.2),
        "as the paper prints it": Line2D([], [], color="white", marker="D", mec="black", ms=5, lw=0),
        f"behaviour policy ({', '.join(policy)}, as printed)": Line2D([], [], color="black", ls="--", lw=1.3),
    }
    there = (True, table["printed"].notna().any(), len(policy) > 0)
    known = {label: mark for (label, mark), show in zip(marks.items(), there) if show}
    figure.legend(known.values(), known, loc="outside upper center", ncols=len(known), fontsize="small", frameon=False)


def performance_profile(
    table: pd.DataFrame,
    colors: Mapping[str, str] = SYSTEMS,
    xlabel: str = "human-normalised score τ",
    ylabel: str = "fraction of games with score > τ",
    mark: float | None = 1.0,
) -> Figure:
    """The fraction of games above each threshold, a line with its band per system.

    Args:
        table: columns system, threshold, fraction, low, high.
        colors: from `system_colors`; "A over B" has the colour of A.
        xlabel: label of the threshold.
        ylabel: label of the fraction.
        mark: threshold to mark, by default human play.
    """
    figure, axis = plt.subplots(figsize=(10.5, 4.6))
    for system, rows in table.groupby("system", sort=False):
        first = system.split(" over ")[0]
        color = colors[first]
        look = {"color": color, "lw": 2, "ls": "-" if first in SYSTEMS else "--", "drawstyle": "steps-post"}
        axis.plot(rows["threshold"], rows["fraction"], label=textwrap.fill(system, 30), **look)
        axis.fill_between(rows["threshold"], rows["low"], rows["high"], step="post", color=color, alpha=0.13, lw=0)
    if mark is not None:
        axis.axvline(mark, color="black", ls=":", lw=1.2)
    axis.set(xlim=(table["threshold"].min(), table["threshold"].max()), ylim=(0, 1), xlabel=xlabel, ylabel=ylabel)
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def improvements(table: pd.DataFrame, colors: Mapping[str, str] = SYSTEMS) -> Figure:
    """How much higher one system's human-normalised score is than another's, a bar per game, sorted, on a log scale.

    Args:
        table: columns system ("A over B": a panel each), game, improvement (a fraction).
        colors: from `system_colors`; a bar has the colour of the better system.
    """
    panels = list(table["system"].unique())
    columns = min(len(panels), 2)
    sizes = [len(games) for _, games in table.groupby("system", sort=False)]
    heights = [0.215 * max(sizes[i : i + columns]) + 1.3 for i in range(0, len(sizes), columns)]
    size = (9.5 if columns == 1 else 12.4, sum(heights))
    figure, axes = plt.subplots(len(heights), columns, figsize=size, squeeze=False, height_ratios=heights)
    low, high = (1.6 * edge for edge in (min(table["improvement"].min(), -0.1), max(table["improvement"].max(), 0.1)))
    ticks = [tick for tick in (-10, -1, -0.1, -0.01, 0, 0.01, 0.1, 1, 10) if low <= tick <= high]
    for axis, (panel, games) in zip(axes.flat, table.groupby("system", sort=False)):
        games = games.sort_values("improvement", ascending=False)
        first, second = panel.split(" over ")
        color = [colors[first] if value > 0 else colors[second] for value in games["improvement"]]
        axis.barh(games["game"], games["improvement"], color=color, edgecolor="none")
        axis.invert_yaxis()
        axis.set_xscale("symlog", linthresh=0.01, linscale=0.5)
        axis.set_xlim(low, high)
        axis.set_xticks(ticks, [f"{tick:+,.0%}" if tick else "0" for tick in ticks], fontsize="small")
        axis.set_xticks([], minor=True)
        axis.tick_params(axis="y", labelsize="small", pad=2)
        axis.axvline(0, color="black", lw=0.8)
        axis.grid(False, axis="y")
        axis.margins(y=0.01)
        better = (games["improvement"] > 0).sum()
        axis.set_title(f"{textwrap.fill(panel, 52)}\nhigher in {better} of {len(games)} games")
        axis.set_xlabel("difference of human-normalised scores (log scale)", fontsize="small")
    for spare in axes.flat[len(panels) :]:
        spare.set_visible(False)
    return figure


# A variant has the same colour in every figure; the base, Scaled QL, has the agent's.
VARIANTS = {
    "Scaled QL": PLAYERS["agent"], "C51": PLAYERS["agent"], "with": PLAYERS["agent"], "CQL": PLAYERS["agent"],
    "without": "#999999", "MSE": "#009e73", "BCQ": "#e69f00", "cloning": "#cc79a7", "zero rewards": "black",
    "return-conditioned cloning": "#56b4e9", "HL-Gauss": "#f0e442", "two-hot": "#332288", "DR3 besides": "#661100",
    "random shift": "#44aa99", "shared head": "#999933", "decision transformer": "#0072b2",
    "cloning transformer": "#882255", "ResNet": PLAYERS["agent"], "ViT": "#117733", "ViT, attention held": "#88ccee",
    "ViT, pointwise embedding": "#ddcc77",
}  # fmt: skip


def ablation(compared: pd.DataFrame, label: str = "human-normalised IQM") -> Figure:
    """Bars of variants with their 95% intervals, side by side for each value of the other parameter.

    Args:
        compared: from `ablations.compare`; a variant without runs is labelled missing, one without a score none.
        label: name of the score.
    """
    axis_name = next((name for name in compared.columns[1:2] if name != "runs"), None)
    groups = list(compared[axis_name].unique()) if axis_name else [""]
    variants = list(compared["variant"].unique())
    figure, axis = plt.subplots(figsize=(min(12.8, 2.5 + 0.9 * len(groups) * len(variants)), 3.4))
    width = 0.8 / len(variants)
    for number, variant in enumerate(variants):
        rows = compared[compared["variant"] == variant]
        at = np.arange(len(groups)) + (number - (len(variants) - 1) / 2) * width
        errors = np.abs(rows[["low", "high"]].to_numpy().T - rows["score"].to_numpy())
        look = {"color": VARIANTS.get(variant, "#666666"), "edgecolor": "black", "linewidth": 0.5}
        axis.bar(at, rows["score"], 0.92 * width, yerr=errors, capsize=3, label=variant, **look)
        for place, runs in zip(at[rows["score"].isna()], rows.loc[rows["score"].isna(), "runs"]):
            said = "none" if runs else "missing"
            axis.annotate(said, (place, 0), rotation=90, ha="center", va="bottom", fontsize="x-small")
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xticks(range(len(groups)), groups)
    axis.set(xlabel=axis_name or "", ylabel=label, xlim=(-0.5, len(groups) - 0.5))
    axis.grid(visible=False, axis="x")
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def scaling(compared: pd.DataFrame, label: str = "human-normalised IQM") -> Figure:
    """Score against parameters as the paper counts them, a line per family of encoders and variant (Figure 6).

    Intervals are 95%. IMPALA runs use the same recipe as all others; the paper's IMPALA points are another system, the
    CQL of Lee et al. (2022).

    Args:
        compared: from `ablations.compare`, across encoders.
        label: name of the score.
    """
    known = compared.dropna(subset=["score", "paper_parameters"])
    figure, axis = plt.subplots(figsize=(8.5, 3.8))
    names = {"resnet": "ResNet", "impala": "IMPALA with this recipe"}
    family = known["encoder"].str.extract(r"^([a-z]+)")[0]
    for (name, variant), rows in known.groupby([family, "variant"], sort=False):
        rows = rows.sort_values("paper_parameters")
        errors = np.abs(rows[["low", "high"]].to_numpy().T - rows["score"].to_numpy())
        color = VARIANTS.get(variant, "#666666")
        marker = {"resnet": "o", "impala": "s"}.get(name, "^")
        millions = rows["paper_parameters"] / 1e6
        axis.errorbar(
            millions,
            rows["score"],
            errors,
            color=color,
            marker=marker,
            capsize=3,
            label=f"{names.get(name, name)}, {variant}",
        )
        for x, y, encoder in zip(millions, rows["score"], rows["encoder"]):
            axis.annotate(encoder, (x, y), (5, 5), textcoords="offset points", fontsize="x-small")
    axis.set(xscale="log", xlabel="parameters of encoder and first dense layer, millions", ylabel=label)
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="x", which="minor", labelsize="x-small")
    if len(known):
        axis.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    else:
        axis.annotate("no runs", (0.5, 0.5), xycoords="axes fraction", ha="center")
    return figure


def step_times(table: pd.DataFrame) -> Figure:
    """Time of a training step against its FLOPs, both logarithmic, with the time at the device's peak as a line.

    Args:
        table: rows of `performance.measure_step`.
    """
    figure, axis = plt.subplots(figsize=(7.5, 4.5))
    colors = dict(zip(table["dtype"].unique(), ("#d55e00", "#0072b2")))
    markers = dict(zip(table["encoder"].unique(), "osD^vPX*<>h"))
    for (dtype, encoder), rows in table.groupby(["dtype", "encoder"], sort=False):
        rows = rows.sort_values("GFLOP")
        style = {"marker": markers[encoder], "color": colors[dtype], "ms": 7, "lw": 1}
        axis.plot(rows["GFLOP"], rows["ms"], label=f"{encoder}, {dtype}", **style)
    for dtype, rows in table.groupby("dtype", sort=False):
        rows = rows.sort_values("GFLOP")
        axis.plot(rows["GFLOP"], rows["floor, ms"], color=colors[dtype], ls="--", lw=1, label=f"at the peak, {dtype}")
    axis.set(xscale="log", yscale="log", xlabel="GFLOP of a step (estimated)", ylabel="time of a step (ms)")
    axis.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def losses_by_dtype(table: pd.DataFrame) -> Figure:
    """Losses of the same training in two precisions, and their difference.

    Args:
        table: columns step, float32, bfloat16.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    left.plot(table["step"], table["float32"], color="#0072b2", label="float32")
    left.plot(table["step"], table["bfloat16"], color="#d55e00", ls="--", label="bfloat16")
    left.set(xlabel="gradient step", ylabel="loss (nats)")
    left.legend(fontsize="x-small")
    right.plot(table["step"], table["bfloat16"] / table["float32"] - 1, color="black", lw=1)
    right.yaxis.set_major_formatter(PercentFormatter(1))
    right.set(xlabel="gradient step", ylabel="bfloat16 less float32, of float32")
    return figure


# The walkthrough's colours: prediction, target and result; and the two signs of a gradient.
PREDICTED, TARGET, LATER = PLAYERS["dataset"], PLAYERS["agent"], PLAYERS["human"]
DOWN, UP = "#b2182b", "#2166ac"


def transition(
    observation: np.ndarray, next_observation: np.ndarray, rewards: np.ndarray, discount: float, action: str
) -> Figure:
    """One n-step transition: its two stacks of frames, and each step's reward with its weight in the return.

    Args:
        observation: uint8 [84, 84, S] at step t, oldest frame first.
        next_observation: uint8 [84, 84, S] at step t + n.
        rewards: [n], clipped, from step t on.
        discount: discount per step.
        action: name of the data's action at step t.
    """
    stack, n = observation.shape[-1], len(rewards)
    figure = plt.figure(figsize=(12.4, 4.6))
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.0, 1.15))
    ages = range(1 - stack, 1)
    sides = {
        f"s, the state at t; action {action}": (observation, [f"t{age}" if age else "t" for age in ages]),
        f"s', the state at t+{n}": (next_observation, [f"t{n + age:+d}" if n + age else "t" for age in ages]),
    }
    for side, (title, (frames, times)) in zip(top.subfigures(1, 2, wspace=0.05), sides.items()):
        side.suptitle(title, fontsize="medium")
        for axis, frame, time in zip(side.subplots(1, stack), frames.transpose(2, 0, 1), times):
            axis.imshow(frame, cmap="gray", vmin=0, vmax=255)
            axis.set_axis_off()
            axis.set_title(time, fontsize="small")
    axis = bottom.subplots()
    weights = discount ** np.arange(n)
    axis.plot(range(n), weights, color="black", marker="o", ms=3, lw=1, label="weight γᵏ")
    axis.bar(range(n), weights * rewards, color=TARGET, width=0.5, label="weight × clipped reward")
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xticks(range(n), [f"t+{k}" if k else "t" for k in range(n)])
    axis.set(xlabel="agent step", ylabel="share of the return")
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def frames(pictures: Mapping[str, np.ndarray]) -> Figure:
    """Pictures side by side, each under its name: [84, 84] from 0, black, to 255, white."""
    figure, axes = plt.subplots(1, len(pictures), figsize=(3.1 * len(pictures), 3.3), squeeze=False)
    for axis, (title, picture) in zip(axes.flat, pictures.items()):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axis.set_axis_off()
        axis.set_title(title)
    return figure


def taken_over(values: np.ndarray, rewards: np.ndarray, by: Sequence[str], label: str) -> Figure:
    """What an agent expected over an episode that it and somebody else played in turns, their part shaded.

    Args:
        values: [T].
        rewards: [T].
        by: who chose each action; ``you`` is shaded.
        label: name of the values, as of `Agent.expectation`.
    """
    figure, axis = plt.subplots(figsize=(11, 2.8))
    steps, yours = np.arange(len(values)), np.array([who == "you" for who in by])
    edges = np.flatnonzero(np.diff(yours.astype(int), prepend=0, append=0))
    for first, stop in zip(edges[::2], edges[1::2]):
        name = "you play" if first == edges[0] else None
        axis.axvspan(first - 0.5, stop - 0.5, color="#e69f00", alpha=0.25, lw=0, label=name)
    if len(at := steps[rewards != 0]):
        axis.vlines(at, 0, 1, transform=axis.get_xaxis_transform(), color="#009e73", lw=1.5, alpha=0.7, label="reward")
    axis.plot(steps, values, color="#0072b2", lw=1.3, label=label)
    axis.set(xlabel="step", ylabel=label, xlim=(-0.5, len(values) - 0.5))
    axis.grid(False, axis="x")
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def scatter_states(axis: Axes, table: pd.DataFrame, by: str) -> None:
    """Places x, y of states, coloured by a column: a game by its colour, a number on a scale from its 1% to its 99%."""
    look = {"s": 14, "alpha": 0.8, "lw": 0}
    if by == "game":
        for game, color in game_colors(list(table["game"].unique())).items():
            own = table[table["game"] == game]
            axis.scatter(own["x"], own["y"], color=[color], label=game, **look)
        axis.legend(fontsize="x-small", markerscale=1.5)
    else:
        low, high = np.quantile(table[by], [0.01, 0.99])  # a few large returns would leave all others in one colour
        dots = axis.scatter(table["x"], table["y"], c=table[by], cmap="viridis", vmin=low, vmax=high, **look)
        bar = axis.figure.colorbar(dots, ax=axis, extend="both")
        bar.ax.tick_params(labelsize="x-small")
    axis.set_title(by)
    axis.tick_params(labelsize="x-small")


def state_map(table: pd.DataFrame, explained: np.ndarray, shown: Mapping[int, np.ndarray]) -> Figure:
    """A map of states, coloured by value, by return and by game, with the frames of some of them.

    Args:
        table: columns x, y, value, return, game.
        explained: [2], share of the variance along x and y.
        shown: frames [84, 84] by row of the table; numbered in the map in this order.
    """
    figure = plt.figure(figsize=(12.4, 6.4))
    above, below = figure.subfigures(2, 1, height_ratios=(1.7, 1))
    for axis, by in zip(above.subplots(1, 3), ("value", "return", "game")):
        scatter_states(axis, table, by)
        axis.set(xlabel=f"PC 1 ({explained[0]:.0%} of the variance)", ylabel=f"PC 2 ({explained[1]:.0%})")
        for number, row in enumerate(shown, start=1):
            place = (table["x"].iloc[row], table["y"].iloc[row])
            box = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": "black", "lw": 0.8, "alpha": 0.85}
            axis.annotate(str(number), place, fontsize="x-small", ha="center", va="center", bbox=box)
    for number, (axis, (row, frame)) in enumerate(zip(below.subplots(1, len(shown)), shown.items()), start=1):
        axis.imshow(frame, cmap="gray", vmin=0, vmax=255)
        axis.set_axis_off()
        state = table.iloc[row]
        axis.set_title(f"{number}: value {state['value']:.2f}\nreturn {state['return']:.2f}", fontsize="small")
    return figure


def network(layers: pd.DataFrame, heads: Sequence[str]) -> Figure:
    """The network from left to right as in the paper's Figure 3, with each part's output and number of parameters.

    Args:
        layers: from `networks.layers`: columns layer, output, parameters; the last row is the heads.
        heads: names of the heads' games.
    """
    trunk, head = layers.iloc[:-1], layers.iloc[-1]
    colors = {"observation": "#e8e8e8", "encoder": "#cfe3f3", "feature": "#fbe0c8"}
    figure, axis = plt.subplots(figsize=(12.4, 2.1 if len(heads) == 1 else 2.9))
    box = {"boxstyle": "round,pad=0.02,rounding_size=0.06", "edgecolor": "#555555"}

    def draw(x: float, y: float, height: float, lines: list[str], color: str) -> None:
        axis.add_patch(FancyBboxPatch((x, y - height / 2), 0.8, height, facecolor=color, **box))
        axis.text(x + 0.4, y, "\n".join(lines), ha="center", va="center", fontsize="small")

    for place, row in enumerate(trunk.itertuples()):
        color = next((color for word, color in colors.items() if row.layer.startswith(word)), "#e4efdc")
        learned = f"{row.parameters:,}\nparameters" if row.parameters else "nothing learned"
        draw(place, 0.0, 1.5, [textwrap.fill(row.layer, 13), "", row.output, "", learned], color)
        if place:
            axis.annotate("", (place, 0), (place - 0.2, 0), arrowprops={"arrowstyle": "->", "color": "#555555"})
    shown = heads if len(heads) <= 4 else [*heads[:2], "…", heads[-1]]
    height = min(1.5, 2.2 / len(shown))
    for place, y in zip(shown, (np.arange(len(shown)) - (len(shown) - 1) / 2) * -1.05 * height):
        learned = f"{head.parameters // len(heads):,}\nparameters"
        lines = [f"head of\n{place}", "", head.output, "", learned] if len(shown) == 1 else [f"{place}: {head.output}"]
        draw(len(trunk), y, height, lines, "#f3d9ea")
        arrow = {"arrowstyle": "->", "color": "#555555"}
        axis.annotate("", (len(trunk), y), (len(trunk) - 0.2, 0), arrowprops=arrow)
    axis.set(xlim=(-0.1, len(trunk) + 0.95), ylim=(-0.85, 0.85) if len(heads) == 1 else (-1.2, 1.2))
    axis.set_axis_off()
    return figure


def over_atoms(
    atoms: np.ndarray, distributions: Mapping[str, np.ndarray], gradient: np.ndarray | None = None
) -> Figure:
    """Return distributions over their support, means as dashed lines; below them, if given, the gradient of the logits.

    Args:
        atoms: [N].
        distributions: probabilities [N] by name.
        gradient: [N]; where it is positive, descent lowers the logit.
    """
    rows = 1 if gradient is None else 2
    figure, axes = plt.subplots(rows, 1, figsize=(8.5, 1.0 + 2.3 * rows), sharex=True, squeeze=False)
    colors = (PREDICTED, TARGET, LATER, "#cc79a7", "black")
    for (name, probabilities), color in zip(distributions.items(), colors):
        _distribution(axes[0, 0], atoms, probabilities, color, name)
    axes[0, 0].set(ylabel="probability", ylim=(0, None))
    axes[0, 0].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    if gradient is not None:
        _signed_bars(axes[1, 0], atoms, gradient)
        axes[1, 0].set(ylabel="∂ loss / ∂ logit")
    axes[-1, 0].set(xlabel="return z")
    return figure


def _distribution(axis: Axes, atoms: np.ndarray, probabilities: np.ndarray, color: str, name: str) -> None:
    mean = float(probabilities @ atoms)
    axis.plot(atoms, probabilities, color=color, drawstyle="steps-mid", lw=1.6, label=f"{name}, mean {mean:.3f}")
    axis.axvline(mean, color=color, ls="--", lw=1)


def _signed_bars(axis: Axes, atoms: np.ndarray, values: np.ndarray) -> None:
    """Bars coloured by the effect of descent on the logit: lowered where the gradient is positive, else raised."""
    width = 0.9 * (atoms[-1] - atoms[0]) / (len(atoms) - 1)
    for sign, color, label in ((1, DOWN, "descent lowers the logit"), (-1, UP, "descent raises it")):
        axis.bar(atoms, np.where(sign * values > 0, values, 0), width, color=color, lw=0, label=label)
    axis.axhline(0, color="black", lw=0.8)
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def projection(moved: np.ndarray, probabilities: np.ndarray, atoms: np.ndarray, projected: np.ndarray) -> Figure:
    """A target distribution after the Bellman update, and after its projection onto the support's atoms.

    Args:
        moved: [N], returns r + discount * z; may lie between atoms and beyond them.
        probabilities: [N], their mass.
        atoms: [N], the support.
        projected: [N], mass of the atoms after the projection.
    """
    figure, (wide, close) = plt.subplots(1, 2, figsize=(12.4, 3.4), width_ratios=(1.6, 1))
    middle, spacing = float(moved @ probabilities), (atoms[-1] - atoms[0]) / (len(atoms) - 1)
    for axis in (wide, close):
        look = {"basefmt": " ", "markerfmt": "o"}
        for x, y, color, label in (
            (moved, probabilities, PREDICTED, "before: at r + γⁿ z"),
            (atoms, projected, TARGET, "after: on the atoms"),
        ):
            stems = axis.stem(x, y, linefmt=color, label=label, **look)
            stems.markerline.set(color=color, markersize=3 if axis is wide else 6)
            stems.stemlines.set(linewidth=0.8 if axis is wide else 1.8)
        axis.set(xlabel="return z", ylabel="probability", ylim=(0, None))
    for edge in (atoms[0], atoms[-1]):
        wide.axvline(edge, color="black", ls=":", lw=1)
    wide.set_title("the whole distribution; dotted: ends of the support")
    close.set_xlim(middle - 3.5 * spacing, middle + 3.5 * spacing)
    close.set_xticks(atoms[np.abs(atoms - middle) < 3.5 * spacing])
    close.xaxis.set_major_formatter("{x:.2f}")
    close.set_title("around its mean; ticks are atoms")
    wide.legend(fontsize="small", loc="upper left")
    return figure


def by_action(names: Sequence[str], values: Mapping[str, np.ndarray], taken: str, ylabel: str) -> Figure:
    """Bars per action, side by side for each series, the data's action marked.

    Args:
        names: names of the game's actions.
        values: [A] by name.
        taken: the data's action.
        ylabel: name of the values.
    """
    figure, axis = plt.subplots(figsize=(8.5, 3.2))
    _bars_by_action(axis, names, values, taken)
    axis.set(ylabel=ylabel)
    if len(values) > 1:
        axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _bars_by_action(axis: Axes, names: Sequence[str], values: Mapping[str, np.ndarray], taken: str) -> None:
    width = 0.8 / len(values)
    for number, ((name, heights), color) in enumerate(zip(values.items(), (PREDICTED, TARGET, LATER))):
        axis.bar(
            np.arange(len(names)) + (number - (len(values) - 1) / 2) * width, heights, width, color=color, label=name
        )
    axis.set_xticks(range(len(names)), [f"{name}\n(data)" if name == taken else name for name in names])
    axis.axhline(0, color="black", lw=0.8)
    axis.grid(False, axis="x")


def gradient_by_action(atoms: np.ndarray, names: Sequence[str], gradients: Mapping[str, np.ndarray]) -> Figure:
    """Gradients of the logits, a row per action and a column per atom; each panel has a separate scale.

    Args:
        atoms: [N].
        names: names of the game's actions.
        gradients: [A, N] by name.
    """
    figure, axes = plt.subplots(1, len(gradients), figsize=(12.4, 2.6), squeeze=False)
    half = (atoms[-1] - atoms[0]) / (len(atoms) - 1) / 2
    for axis, (title, gradient) in zip(axes.flat, gradients.items()):
        largest = max(float(np.abs(gradient).max()), 1e-12)
        extent = (atoms[0] - half, atoms[-1] + half, len(names) - 0.5, -0.5)
        look = {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest, "aspect": "auto", "interpolation": "nearest"}
        picture = axis.imshow(gradient, extent=extent, **look)
        axis.set_yticks(range(len(names)), names)
        axis.grid(False)
        axis.set(title=title, xlabel="return z")
        bar = figure.colorbar(picture, ax=axis, ticks=[-largest, 0, largest], format=StrMethodFormatter("{x:.0e}"))
        bar.ax.tick_params(labelsize="small")
    return figure


def features(plain: np.ndarray, plain_next: np.ndarray, normalized: np.ndarray, normalized_next: np.ndarray) -> Figure:
    """Norms of representations, and their dot products with those of the next states, before and after normalisation.

    Args:
        plain: [B, F] of the states, from the last dense layer.
        plain_next: [B, F] of the states n steps later.
        normalized: [B, F] of the states, divided by their norms.
        normalized_next: [B, F] of the states n steps later.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.2))
    pairs = {"as computed": (plain, plain_next), "normalised": (normalized, normalized_next)}
    measures = {
        "norm of φ(s)": {name: np.linalg.norm(now, axis=-1) for name, (now, _) in pairs.items()},
        "φ(s) · φ(s')": {name: (now * then).sum(-1) for name, (now, then) in pairs.items()},
    }
    for axis, (label, measured) in zip(axes, measures.items()):
        everything = np.concatenate(list(measured.values()))
        edges = np.linspace(everything.min() - 1e-6, everything.max() + 1e-6, 41)
        for (name, values), color in zip(measured.items(), (PREDICTED, TARGET)):
            spread = f"{name}: {values.min():.3g} to {values.max():.3g}"
            axis.hist(values, bins=edges, color=color, alpha=0.75, label=spread)
        axis.set(xlabel=label, ylabel="states")
        axis.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    return figure


def values_and_returns(values: Mapping[str, np.ndarray], returns: np.ndarray) -> Figure:
    """Q of the data's actions against the discounted return that followed in the data, a panel per stage of training.

    Args:
        values: [B] by stage.
        returns: [B].
    """
    figure, axes = plt.subplots(1, len(values), figsize=(12.4, 3.6), sharex=True, sharey=True, squeeze=False)
    ends = (
        min(returns.min(), *(q.min() for q in values.values())),
        max(returns.max(), *(q.max() for q in values.values())),
    )
    for axis, (stage, q) in zip(axes.flat, values.items()):
        axis.plot(ends, ends, color="black", ls=":", lw=1)
        axis.scatter(returns, q, s=14, alpha=0.6, color=PREDICTED)
        moves = q.std() > 0 and returns.std() > 0
        axis.set_title(f"{stage}: correlation {np.corrcoef(returns, q)[0, 1]:.2f}" if moves else stage)
        axis.set(xlabel="discounted return in the data")
    axes[0, 0].set(ylabel="Q(s, a of the data)")
    return figure


def pulls(atoms: np.ndarray, names: Sequence[str], settings: Mapping[str, Any]) -> Figure:
    """A transition's pull under different settings: a row each of target, gradient, and push on each action.

    Args:
        atoms: [N].
        names: names of the game's actions.
        settings: `walkthrough.Pull` by title.
    """
    size = (12.4, 2.9 * len(settings) + 0.4)
    figure, axes = plt.subplots(len(settings), 3, figsize=size, squeeze=False)
    for (left, middle, right), (title, pull) in zip(axes, settings.items()):
        action = names[pull.action]
        _distribution(left, atoms, pull.predicted, PREDICTED, "predicted")
        if pull.target is None:
            left.axvline(pull.target_mean, color=TARGET, lw=2, label=f"target, {pull.target_mean:.3f}")
        else:
            _distribution(left, atoms, pull.target, TARGET, "target")
        left.set(title=title, xlabel="return z", ylim=(0, None))
        left.legend(fontsize="x-small", loc="upper left")
        left.set_ylim(0, 1.35 * left.get_ylim()[1])  # room for the legend
        _signed_bars(middle, atoms, (pull.td_gradient + pull.cql_gradient)[pull.action])
        middle.get_legend().remove()
        middle.set(title=f"gradient of the logits of {action}", xlabel="return z")
        pushes = {"TD error": pull.td_push, "α · CQL": pull.cql_push}
        _bars_by_action(right, names, {name: push[: len(names)] for name, push in pushes.items()}, action)
        right.set(title="push on Q(s, ·)")
        right.legend(fontsize="x-small", loc="best")
    return figure
