"""Figures: a tidy DataFrame or arrays in, a matplotlib figure out; colour-blind-safe, a game always one colour."""

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from scaled_ql.metrics import iqm

PLAYERS = {"random": "#999999", "dataset": "#0072b2", "agent": "#d55e00", "human": "#009e73"}


def set_style() -> None:
    """Call once per notebook."""
    import seaborn as sns  # takes longer to import than all else here

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
    """Raw return of each episode against when it was recorded, with a running mean over a tenth of a run's episodes.

    Args:
        episodes: columns game, start, episode_return; where there is a column run, each run has a line of its own;
            where there is a column incomplete, those episodes are crosses and in no mean.
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
    """Cut off what is far above or below, so that one game does not flatten all others."""
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
    """Rewards per 1,000 transitions over collection time, gains and losses apart; rewards by game."""
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
    """Histogram of episode lengths per game, stacked by how the recording of an episode begins and ends.

    Args:
        episodes: columns game, length, and where known truncated and continued.
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


def learning_curves(metrics: pd.DataFrame) -> Figure:
    """Training against steps: the loss per game, then what the method has of CQL, values, accuracy; gradient norm.

    Args:
        metrics: rows of `training.train`.
    """
    main = "td_loss" if "td_loss" in metrics else "nll"
    games = [name.removeprefix(f"{main}/") for name in metrics if name.startswith(f"{main}/")]
    titles = {
        main: {"td_loss": "TD loss", "nll": "negative log-likelihood, nats"}[main],
        "cql_loss": "CQL loss (before alpha)",
        "q_data": "mean Q",
        "behaviour_loss": "behaviour policy, nats",
        "dr3_penalty": "DR3 (before its weight)",
        "accuracy": "data's action is the likeliest",
        "grad_norm": "gradient norm",
    }
    titles = {name: title for name, title in titles.items() if name in metrics}
    figure, axes = plt.subplots(1, len(titles), figsize=(15, 3.2))
    for axis, (name, title) in zip(axes, titles.items()):
        if name == main:
            for game, color in list(game_colors(games).items())[:10]:
                axis.plot(metrics["step"], metrics[f"{main}/{game}"], color=color, label=game, alpha=0.8)
            axis.plot(metrics["step"], metrics[name], color="black", lw=2, label="all")
        elif name == "q_data":
            axis.plot(metrics["step"], metrics["q_data"], color=PLAYERS["dataset"], label="actions of the data")
            axis.plot(metrics["step"], metrics["q_greedy"], color=PLAYERS["agent"], label="greedy actions")
        else:
            axis.plot(metrics["step"], metrics[name], color="black")
        axis.set(title=title, xlabel="gradient step", yscale="log" if name == "grad_norm" else "linear")
        if name in (main, "q_data"):
            axis.legend(fontsize="x-small")
    return figure


def scores(table: pd.DataFrame, episodes: pd.DataFrame) -> Figure:
    """Mean raw return per game and player, the agent's single episodes as dots.

    Args:
        table: index game; columns random, dataset, agent and, where known, human.
        episodes: the agent's, columns game, episode_return.
    """
    figure, axes = _grid(len(table), width=3.6)
    for axis, (game, row) in zip(axes, table.iterrows()):
        known = row[[player for player in PLAYERS if player in row and pd.notna(row[player])]].astype(float)
        axis.bar(known.index, known, color=[PLAYERS[player] for player in known.index])
        dots = episodes.loc[episodes["game"] == game, "episode_return"]
        axis.scatter(["agent"] * len(dots), dots, color="black", s=8, alpha=0.6, zorder=3)
        axis.axhline(0, color="black", lw=0.8)
        axis.set(title=game, ylabel="episode return (raw)")
    return figure
