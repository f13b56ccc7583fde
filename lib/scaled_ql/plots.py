"""Figures: a tidy DataFrame or arrays in, a matplotlib figure out; colour-blind-safe, a game always one colour."""

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    columns = min(number, 3)
    rows = -(-number // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for spare in axes.flat[number:]:
        spare.set_visible(False)
    return figure, list(axes.flat[:number])


def returns_over_time(episodes: pd.DataFrame) -> Figure:
    """Raw return of each episode against when it was recorded, with a running mean over a tenth of the episodes.

    Args:
        episodes: columns game, start, episode_return.
    """
    games = list(episodes["game"].unique())
    figure, axes = _grid(len(games))
    colors = game_colors(games)
    for axis, (game, table) in zip(axes, episodes.groupby("game", sort=False)):
        window = max(len(table) // 10, 1)
        smooth = table["episode_return"].rolling(window, min_periods=1, center=True).mean()
        axis.scatter(table["start"], table["episode_return"], s=12, alpha=0.5, color=colors[game])
        axis.plot(table["start"], smooth, color=colors[game])
        axis.set(title=game, xlabel="transitions before the episode", ylabel="episode return (raw)")
    return figure


def action_histograms(actions: dict[str, np.ndarray], names: dict[str, list[str]]) -> Figure:
    """Share of each action in a game's transitions; arguments by game."""
    figure, axes = _grid(len(actions))
    colors = game_colors(list(actions))
    for axis, (game, taken) in zip(axes, actions.items()):
        share = np.bincount(taken, minlength=len(names[game])) / len(taken)
        axis.barh(names[game], share, color=colors[game])
        axis.invert_yaxis()
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
        axis.set(title=game, xlabel="transition", ylabel="rewards per 1,000 transitions", ylim=(0, None))
    axes[0].legend()
    return figure


def episode_lengths(episodes: pd.DataFrame) -> Figure:
    """Histogram of episode lengths per game; columns game, length."""
    games = list(episodes["game"].unique())
    figure, axes = _grid(len(games))
    colors = game_colors(games)
    for axis, (game, table) in zip(axes, episodes.groupby("game", sort=False)):
        axis.hist(table["length"], bins=15, color=colors[game])
        axis.set(title=game, xlabel="agent steps (4 emulator frames each)", ylabel="episodes")
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
    """Training against steps: TD loss per game, CQL loss, mean Q, gradient norm; rows of `training.train`."""
    games = [name.removeprefix("td_loss/") for name in metrics if name.startswith("td_loss/")]
    colors = game_colors(games)
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.2))
    for game in games[:10]:
        axes[0].plot(metrics["step"], metrics[f"td_loss/{game}"], color=colors[game], label=game, alpha=0.8)
    axes[0].plot(metrics["step"], metrics["td_loss"], color="black", lw=2, label="all")
    axes[1].plot(metrics["step"], metrics["cql_loss"], color="black")
    axes[2].plot(metrics["step"], metrics["q_data"], color=PLAYERS["dataset"], label="actions of the data")
    axes[2].plot(metrics["step"], metrics["q_greedy"], color=PLAYERS["agent"], label="greedy actions")
    axes[3].semilogy(metrics["step"], metrics["grad_norm"], color="black")
    titles = ("TD loss", "CQL loss (before alpha)", "mean Q", "gradient norm")
    for axis, title in zip(axes, titles):
        axis.set(title=title, xlabel="gradient step")
    for axis in (axes[0], axes[2]):
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
