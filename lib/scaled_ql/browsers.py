"""Widgets that show an agent step by step, and their static twins for rendered reports.

A step is drawn in some 40 ms of a core: what stays is drawn once per episode, and only what moves is drawn on top.
"""

import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, display
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image as Picture

from scaled_ql.controls import Steps
from scaled_ql.environments import STACK_SIZE
from scaled_ql.episodes import Episode, play, recorded, telling_moments, watch
from scaled_ql.games import action_names
from scaled_ql.plots import action_colors
from scaled_ql.replay import Replay
from scaled_ql.trained_agent import Agent, Look, load_agent

__all__ = ["Moments", "agent_browser", "load_agent", "show_moments"]


class Moments:
    """A figure of one step of an episode, for one or two agents, which moves quickly to another step.

    Attributes:
        figure: the figure, of the last step that was drawn.
    """

    def __init__(self, agents: Sequence[Agent], episode: Episode, looks: Sequence[Look]):
        """Draw what stays.

        Args:
            agents: whose values are shown, one below another.
            episode: whose steps are shown.
            looks: what each agent makes of them, from `episodes.watch`.
        """
        self._agents, self._episode, self._looks = agents, episode, looks
        self._names, rows = action_names(episode.game), len(agents)
        with plt.rc_context({"figure.constrained_layout.use": False}):
            self.figure = Figure(figsize=(12, 5.9 if rows == 1 else 8.2), dpi=80)
        self._canvas = FigureCanvasAgg(self.figure)  # not pyplot's: no cell shows it by itself
        below = self.figure.add_gridspec(1, 1, left=0.055, right=0.945, bottom=0.09, top=0.2 if rows == 2 else 0.26)
        frames = self.figure.add_gridspec(2, 2, left=0.01, right=0.34, bottom=0.34, top=0.93, wspace=0.02, hspace=0.16)
        panels = self.figure.add_gridspec(rows, 1, left=0.39, right=0.99, bottom=0.36, top=0.9, hspace=0.42)
        self._moving: list[Any] = []
        self._frames = [self._frame(self.figure.add_subplot(frames[age // 2, age % 2]), age) for age in range(4)]
        self._lines, self._bars, self._marks = [], [], []
        for row, (agent, look) in enumerate(zip(agents, looks)):
            self._distributions(self.figure, panels[row], agent, look)
        self._timeline(self.figure.add_subplot(below[0]))
        self._background: Any = None

    def _move(self, artist: Any) -> Any:
        artist.set_animated(True)
        self._moving.append(artist)
        return artist

    def _frame(self, axis: Axes, age: int) -> Any:
        axis.set_axis_off()
        axis.set_title("now" if age == STACK_SIZE - 1 else f"{STACK_SIZE - 1 - age} before", fontsize="x-small", pad=2)
        return self._move(axis.imshow(np.zeros((84, 84, 3), np.uint8), interpolation="nearest"))

    def _distributions(self, figure: Figure, place: Any, agent: Agent, look: Look) -> None:
        """Curves over the atoms, where there are any, and bars of the values, an action always in one colour."""
        colors = action_colors(self._names)
        finite = look.values[np.isfinite(look.values)]
        columns = 1 if agent.atoms is None else 2
        inner = place.subgridspec(1, columns, width_ratios=(1.45, 1)[:columns], wspace=0.32)
        lines = []
        if agent.atoms is not None:
            axis, top = figure.add_subplot(inner[0]), float(look.probabilities.max())
            seen = agent.atoms[(look.probabilities > 0.02 * top).any((0, 1))]
            margin = 2 * (agent.atoms[1] - agent.atoms[0])
            axis.set(xlim=(seen[0] - margin, seen[-1] + margin), ylim=(0, 1.05 * top))
            axis.set_title("return distribution of each action", fontsize="small")
            axis.set_xlabel("return", fontsize="x-small", labelpad=1)
            lines = [
                self._move(axis.plot(agent.atoms, np.zeros(len(agent.atoms)), color=color, drawstyle="steps-mid")[0])
                for color in colors
            ]
            axis.tick_params(labelsize="x-small")
        axis = figure.add_subplot(inner[-1])
        places, low, high = np.arange(len(self._names)), min(finite.min(), 0.0), max(finite.max(), 0.0)
        axis.set(xlim=(low, low + 1.6 * max(high - low, 1e-6)), ylim=(len(self._names) - 0.5, -0.5))
        axis.set_yticks(places, self._names, fontsize="x-small" if len(self._names) < 10 else 6.5)
        axis.set_title(agent.values_name, fontsize="small")
        axis.tick_params(labelsize="x-small", axis="x")
        axis.grid(False, axis="y")
        axis.axvline(0, color="black", lw=0.8)
        self._bars.append([self._move(bar) for bar in axis.barh(places, 0 * places, 0.75, color=colors)])
        self._marks.append([self._move(axis.text(0, y, "", fontsize=7.5, va="center")) for y in places])
        self._lines.append(lines)
        if len(self._agents) > 1:
            corner = place.get_position(figure)
            figure.text(0.39, corner.y1 + 0.035, agent.name, fontsize="small", fontweight="bold")

    def _timeline(self, axis: Axes) -> None:
        """Rewards, the value of the greedy action, the entropy of its distribution, over the whole episode."""
        rewards, look = self._episode.rewards, self._looks[0]
        steps = np.arange(len(rewards))
        for sign, color, words in ((1, "#009e73", "reward"), (-1, "#d55e00", "negative reward")):
            if len(at := steps[sign * rewards > 0]):
                axis.vlines(at, 0, 1, transform=axis.get_xaxis_transform(), color=color, lw=1.5, alpha=0.6, label=words)
        axis.plot(steps, look.values.max(1), color="#0072b2", lw=1, label=f"largest {self._agents[0].values_name}")
        if look.entropy is not None:
            other = axis.twinx()
            other.plot(steps, look.entropy[steps, look.best], color="#777777", lw=0.8)
            axis.plot([], [], color="#777777", lw=0.8, label="entropy of its distribution, nats (right)")
            other.grid(False)
            other.tick_params(labelsize="x-small", colors="#777777")
            other.set_zorder(0)
        if len(self._looks) == 2 and len(at := steps[look.best != self._looks[1].best]):
            ends = axis.get_xaxis_transform()
            axis.plot(at, 0 * at + 0.03, "|", color="black", ms=6, transform=ends, label="they disagree")
        axis.set(xlim=(-0.5, max(len(rewards) - 0.5, 1)))
        axis.set_xlabel("step", fontsize="x-small", labelpad=1)
        axis.tick_params(labelsize="x-small")
        axis.grid(False, axis="x")
        axis.legend(fontsize="x-small", loc="lower left", bbox_to_anchor=(0, 0.97), ncols=5, frameon=False)
        self._now = self._move(axis.axvline(0, color="black", lw=1.5))

    def set_step(self, step: int) -> None:
        """Put everything that moves where it is at a step."""
        stack = self._episode.stacks(np.s_[step : step + 1])[0]
        for picture, frame in zip(self._frames, stack):
            picture.set_data(np.repeat(frame[..., None], 3, axis=-1))
        chosen = int(self._episode.actions[step])
        for look, lines, bars, marks in zip(self._looks, self._lines, self._bars, self._marks):
            best = int(look.best[step])
            for action, line in enumerate(lines):
                line.set_ydata(look.probabilities[step, action])
                line.set(lw=2.6 if action in (best, chosen) else 1.0, zorder=3 if action in (best, chosen) else 2)
            for action, (bar, mark) in enumerate(zip(bars, marks)):
                value = float(look.values[step, action])
                bar.set_width(value if np.isfinite(value) else 0.0)
                roles = [word for word, which in (("best", best), ("chosen", chosen)) if which == action]
                shown = f"{value:.2f}" if np.isfinite(value) else "not allowed"
                mark.set_text(f" {shown}  {', '.join(roles)}")
                mark.set(x=max(bar.get_width(), 0.0), fontweight="bold" if roles else "normal")
        self._now.set_xdata([step, step])

    def png(self) -> bytes:
        """The figure of this step, drawing only what moves."""
        canvas = self._canvas
        if self._background is None:
            canvas.draw()
            self._background = canvas.copy_from_bbox(self.figure.bbox)
        canvas.restore_region(self._background)
        for artist in sorted(self._moving, key=lambda artist: artist.get_zorder()):
            artist.axes.draw_artist(artist)
        buffer = io.BytesIO()
        Picture.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


def moment_in_words(agents: Sequence[Agent], episode: Episode, looks: Sequence[Look], step: int) -> str:
    """One step in a sentence: the alternative text of its figure."""
    names, rewards = action_names(episode.game), episode.rewards
    chosen, total = names[episode.actions[step]], rewards.sum()
    said = []
    for agent, look in zip(agents, looks):
        best = int(look.best[step])
        words = f"{names[best]} at {agent.values_name} = {look.values[step, best]:.2f}"
        if look.entropy is not None:
            words += f", entropy {look.entropy[step, best]:.2f} of at most {np.log(len(agent.atoms)):.2f} nats"
        said.append(words if len(agents) == 1 else f"of {agent.name} {words}")
    return (
        f"{episode.game}, {episode.title}, step {step} of {len(rewards) - 1}: {chosen}, chosen by {episode.by[step]}; "
        f"best {'; best '.join(said)}. Reward {rewards[step]:g}, return so far {rewards[:step].sum():g}, "
        f"{total:g} in all; then {episode.ending}."
    )


def show_moments(agents: Sequence[Agent], episode: Episode, steps: Sequence[int] = ()) -> None:
    """The static twin of `agent_browser`: figures of a few steps, with an alternative text each.

    Args:
        agents: one or two, as of `agent_browser`.
        episode: of a game that they play.
        steps: to show; empty: `episodes.telling_moments` of the first agent.
    """
    looks = [watch(agent, episode) for agent in agents]
    moments = Moments(agents, episode, looks)
    for step in steps or telling_moments(episode, looks[0]).values():
        moments.set_step(step)
        words = moment_in_words(agents, episode, looks, step)
        title = moments.figure.suptitle(words.split("; best ")[0], fontsize="medium", x=0.01, ha="left")
        buffer = io.BytesIO()
        moments.figure.savefig(buffer, format="png", dpi=90)
        title.remove()
        display(Image(buffer.getvalue(), alt=words))


class AgentBrowser(widgets.VBox):
    """See `agent_browser`.

    Attributes:
        game, source, number: whose episode is shown: the game, ``agent`` or ``recording``, its seed or its row.
        steps: the controls over its steps.
        picture, words: the step as a figure, and in a sentence.
        episode: the episode.
    """

    def __init__(self, agents: Sequence[Agent], data: Replay | None, protocol: dict[str, Any]):
        """Play the first episode and show it."""
        self._agents, self._data, self._protocol = agents, data, protocol
        shared = [game for game in agents[0].games if all(game in agent.games for agent in agents)]
        if not shared:
            played = "; ".join(f"{agent.name}: {', '.join(agent.games)}" for agent in agents)
            raise ValueError(f"these agents play no game together ({played}). Choose runs with a common game.")
        self.game = widgets.Dropdown(options=shared, description="game")
        self.source = widgets.Dropdown(options=["agent"], description="played by")
        self.number = widgets.BoundedIntText(min=0, max=2**30, description="seed")
        self.steps = Steps()
        self.picture = widgets.Image(format="png", layout=widgets.Layout(max_width="960px"))
        self.words = widgets.HTML()
        self.episode: Episode
        super().__init__([widgets.HBox([self.game, self.source, self.number]), self.steps, self.picture, self.words])
        self._observed: list[tuple[Any, Callable]] = [
            (self.game, self._set_game), (self.source, self._set_source), (self.number, self._set_episode),
        ]  # fmt: skip
        for widget, call in self._observed:
            widget.observe(call, "value")
        self.steps.slider.observe(self._show, "value")
        self._set_game()

    def _quietly(self, widget: Any, **values: Any) -> None:
        """Set a widget without showing an episode that was not asked for."""
        ((_, call),) = [pair for pair in self._observed if pair[0] is widget]
        widget.unobserve(call, "value")
        for name, value in values.items():
            setattr(widget, name, value)
        widget.observe(call, "value")

    def _set_game(self, _: object = None) -> None:
        there = self._data is not None and self.game.value in self._data.games
        options = ["agent", "recording"] if there else ["agent"]
        if list(self.source.options) != options:
            self._quietly(self.source, options=options, value="agent")
        self._set_source()

    def _set_source(self, _: object = None) -> None:
        by_agent = self.source.value == "agent"
        last = 2**30 if by_agent else len(self._data.episodes(self.game.value)) - 1
        self._quietly(self.number, value=0, max=last, description="seed" if by_agent else "episode")
        self._set_episode()

    def _set_episode(self, _: object = None) -> None:
        agent, game, number = self._agents[0], self.game.value, self.number.value
        self.words.value = "playing ..." if self.source.value == "agent" else "reading ..."
        if self.source.value == "agent":
            protocol = agent.protocol | self._protocol
            self.episode = play(agent.q_function(game), game, seed=number, title=agent.name, **protocol)
        else:
            limit = {"max_steps": self._protocol["max_steps"]} if "max_steps" in self._protocol else {}
            self.episode = recorded(self._data, game, number, **limit)
        self._looks = [watch(agent, self.episode) for agent in self._agents]
        self._moments = Moments(self._agents, self.episode, self._looks)
        self.steps.set_episode(len(self.episode.actions), self._events())
        self._show()

    def _events(self) -> dict[str, np.ndarray]:
        events = {"reward": np.flatnonzero(self.episode.rewards)}
        if len(self._looks) == 2:
            events["disagreement"] = np.flatnonzero(self._looks[0].best != self._looks[1].best)
        return events

    def _show(self, _: object = None) -> None:
        step = self.steps.slider.value
        self._moments.set_step(step)
        self.picture.value = self._moments.png()
        words = html.escape(moment_in_words(self._agents, self.episode, self._looks, step))
        self.words.value = f'<div role="status">{words}</div>'


def agent_browser(*agents: Agent, data: Replay | None = None, **protocol: Any) -> AgentBrowser:
    """Browse an agent step by step, or two agents on the same states, in JupyterLab.

    The first agent plays, with a seed; or episodes of a recording are shown, and what the agents make of them. After a
    click on the slider, arrow keys move it; the play button plays at the game's speed.

    Args:
        agents: one or two, from `load_agent`.
        data: an open store with recorded episodes.
        protocol: changes to the way in which the first agent's run evaluates it, such as ``max_steps=500``;
            see `Agent.protocol`.

    Raises:
        ValueError: not one or two agents, or they play no game together.
    """
    if len(agents) not in (1, 2):
        raise ValueError(f"one agent or two can be browsed, got {len(agents)}.")
    return AgentBrowser(agents, data, protocol)
