"""Widgets that show an agent step by step, and their static twins for rendered reports.

A step is drawn in some 40 ms of a core: what stays is drawn once per episode, and only what moves is drawn on top.
"""

import base64
import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image as Picture

from scaled_ql.controls import Steps
from scaled_ql.environments import STACK_SIZE
from scaled_ql.episodes import Episode, disagreements, play, recorded, telling_moments, watch
from scaled_ql.games import action_names
from scaled_ql.plots import action_colors, scatter_states, state_map
from scaled_ql.replay import Replay
from scaled_ql.saliency import highlight, saliency
from scaled_ql.state_map import StateMap, far_apart
from scaled_ql.trained_agent import Agent, Look, load_agent

__all__ = [
    "Moments", "agent_browser", "load_agent", "show_figure", "show_moments", "show_state_map", "state_map_browser",
]  # fmt: skip

FRAMES = 8  # of a longer window, the newest ones are shown
RETURNS = {"predicted": "#0072b2", "drawn from": "#d55e00"}  # distributions of a decision transformer, and colours


class Moments:
    """A figure of one step of an episode, for one or two agents, which moves quickly to another step.

    Attributes:
        title: text above the figure, empty at first.
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
            self._figure = Figure(figsize=(12, 5.9 if rows == 1 else 8.2), dpi=80)
        self._canvas = FigureCanvasAgg(self._figure)  # not pyplot's: no cell shows it by itself
        bottom, top, low = (0.09, 0.26, 0.36) if rows == 1 else (0.065, 0.18, 0.27)
        grid = self._figure.add_gridspec
        below = grid(1, 1, left=0.055, right=0.945, bottom=bottom, top=top)
        self._past = max(agent.memory for agent in agents)  # steps whose actions and rewards are seen, too
        number = min(max(agent.memory or STACK_SIZE for agent in agents), FRAMES)
        columns = max(2, -(-number // 2))
        frames = grid(2, columns, left=0.01, right=0.34, bottom=low - 0.02, top=0.93, wspace=0.02, hspace=0.16)
        panels = grid(rows, 1, left=0.39, right=0.99, bottom=low, top=0.9, hspace=0.42)
        self._moving: list[Any] = []
        self.title = self._move(self._figure.text(0.01, 0.965, "", fontsize="medium"))
        places = [self._figure.add_subplot(frames[at // columns, at % columns]) for at in range(number)]
        self._ages = [self._caption(axis, number - 1 - at) for at, axis in enumerate(places)]
        self._frames = [
            self._move(axis.imshow(np.zeros((84, 84, 3), np.uint8), interpolation="nearest")) for axis in places
        ]
        self._lines, self._bars, self._marks, self._asked = [], [], [], []
        for row, (agent, look) in enumerate(zip(agents, looks)):
            self._distributions(self._figure, panels[row], agent, look)
        self._timeline(self._figure.add_subplot(below[0]))
        self._background: Any = None

    def _move(self, artist: Any) -> Any:
        artist.set_animated(True)
        self._moving.append(artist)
        return artist

    def _caption(self, axis: Axes, age: int) -> Any:
        """Of a frame that is so many steps old; of the past of a transformer it changes with the step."""
        axis.set_axis_off()
        caption = axis.set_title(f"{age} before" if age else "now", fontsize="x-small", pad=2)
        return self._move(caption) if 0 < age < self._past else caption

    def _distributions(self, figure: Figure, place: Any, agent: Agent, look: Look) -> None:
        """Curves over the atoms, where there are any, and bars of the values, an action always in one colour."""
        colors = action_colors(self._names)
        finite = look.shown[np.isfinite(look.shown)]
        columns = 1 if agent.atoms is None else 2
        inner = place.subgridspec(1, columns, width_ratios=(1.45, 1)[:columns], wspace=0.32)
        lines = []
        if agent.atoms is not None:
            axis, top = figure.add_subplot(inner[0]), float(look.probabilities.max())
            seen = agent.atoms[(look.probabilities > 0.02 * top).any((0, 1))]
            margin = 2 * (agent.atoms[1] - agent.atoms[0])
            axis.set(xlim=(seen[0] - margin, seen[-1] + margin), ylim=(0, 1.05 * top))
            asks = look.asked is not None
            title = "return from the window's first frame on" if asks else "return distribution of each action"
            axis.set_title(title, fontsize="small")
            axis.set_xlabel("return", fontsize="x-small", labelpad=1)
            nothing = np.zeros(len(agent.atoms))
            named = RETURNS if asks else dict(zip(self._names, colors))
            lines = [
                self._move(axis.plot(agent.atoms, nothing, color=color, drawstyle="steps-mid", label=name)[0])
                for name, color in named.items()
            ]
            if asks:
                self._asked.append((look.asked, self._move(axis.axvline(0, color="black", ls=":", label="asked for"))))
                axis.legend(fontsize="x-small")
            axis.tick_params(labelsize="x-small")
        axis = figure.add_subplot(inner[-1])
        places, low, high = np.arange(len(self._names)), min(finite.min(), 0.0), max(finite.max(), 0.0)
        axis.set(xlim=(low, low + 1.8 * max(high - low, 1e-6)), ylim=(len(self._names) - 0.5, -0.5))
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
        name, expected = self._agents[0].expectation(look)
        axis.plot(steps, expected, color="#0072b2", lw=1, label=name)
        if look.entropy is not None:
            other = axis.twinx()
            other.plot(steps, look.entropy, color="#777777", lw=0.8)
            of = "its distribution" if look.policy is None else "the policy"
            axis.plot([], [], color="#777777", lw=0.8, label=f"entropy of {of}, nats (right)")
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

    def set_step(self, step: int, score: np.ndarray | None = None) -> None:
        """Put everything that moves where it is at a step; a score of `saliency` is shown in the newest frame."""
        stack = self._episode.stacks(np.s_[step : step + 1], len(self._frames))[0]
        for picture, frame in zip(self._frames, stack):
            picture.set_data(np.repeat(frame[..., None], 3, axis=-1))
        if score is not None:
            self._frames[-1].set_data(highlight(stack[-1], score))
        for age, caption in zip(range(len(self._ages) - 1, 0, -1), self._ages):
            if age < self._past:
                caption.set_text(self._did(step - age, age))
        for asked, line in self._asked:
            line.set_xdata([asked[step], asked[step]])
        chosen = int(self._episode.actions[step])
        for look, lines, bars, marks in zip(self._looks, self._lines, self._bars, self._marks):
            best = int(look.best[step])
            for action, line in enumerate(lines):
                line.set_ydata(look.probabilities[step, action])
                if look.asked is None:
                    line.set(lw=2.6 if action in (best, chosen) else 1.0, zorder=3 if action in (best, chosen) else 2)
            for action, (bar, mark) in enumerate(zip(bars, marks)):
                value = float(look.shown[step, action])
                bar.set_width(value if np.isfinite(value) else 0.0)
                roles = [word for word, which in (("best", best), ("chosen", chosen)) if which == action]
                shown = f"{value:.2f}" if np.isfinite(value) else "not allowed"
                mark.set_text(f" {shown}  {', '.join(roles)}")
                mark.set(x=max(bar.get_width(), 0.0), fontweight="bold" if roles else "normal")
        self._now.set_xdata([step, step])

    def _did(self, step: int, age: int) -> str:
        """What was done at a step of the past, as a transformer sees it."""
        if step < 0:
            return f"{age} before: nothing"
        reward = np.sign(self._episode.rewards[step])
        action = self._names[self._episode.actions[step]]
        return f"{age} before: {action}" + (f", reward {reward:+g}" if reward else "")

    def png(self) -> bytes:
        """The figure of this step, drawing only what moves."""
        canvas = self._canvas
        if self._background is None:
            canvas.draw()
            self._background = canvas.copy_from_bbox(self._figure.bbox)
        canvas.restore_region(self._background)
        for artist in sorted(self._moving, key=lambda artist: artist.get_zorder()):
            self._figure.draw_artist(artist)
        return to_picture(np.asarray(canvas.buffer_rgba())[..., :3])


def moment_in_words(agents: Sequence[Agent], episode: Episode, looks: Sequence[Look], step: int) -> str:
    """One step in a sentence: the alternative text of its figure."""
    names, rewards = action_names(episode.game), episode.rewards
    chosen, total = names[episode.actions[step]], rewards.sum()
    said = []
    for agent, look in zip(agents, looks):
        best = int(look.best[step])
        words = f"{names[best]} at {agent.values_name} = {look.shown[step, best]:.2f}"
        if look.entropy is not None:
            most = np.log(look.doubtful.shape[-1])
            words += f", entropy {look.entropy[step]:.2f} of at most {most:.2f} nats"
        if look.asked is not None:
            words += f", asking for a return of {look.asked[step]:g} where {agent.expectation(look)[1][step]:.1f} is "
            words += "predicted"
        said.append(words if len(agents) == 1 else f"of {agent.name} {words}")
    return (
        f"{episode.game}, {episode.title}, step {step} of {len(rewards) - 1}: {chosen}, chosen by {episode.by[step]}; "
        f"best {'; best '.join(said)}. Reward {rewards[step]:g}, return so far {rewards[:step].sum():g}, "
        f"{total:g} in all; then {episode.ending}."
    )


def show_picture(png: bytes, words: str) -> None:
    """Show a picture with an alternative text, which reports drop from an output of type PNG."""
    data = base64.b64encode(png).decode()
    display(HTML(f'<img src="data:image/png;base64,{data}" alt="{html.escape(words)}" style="max-width: 100%">'))


def show_figure(figure: Figure, words: str) -> None:
    """Show a figure, and close it, with an alternative text."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    show_picture(buffer.getvalue(), words)


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
        moments.title.set_text(words.split("; best ")[0])
        show_picture(moments.png(), words)


class AgentBrowser(widgets.VBox):
    """See `agent_browser`.

    Attributes:
        game, source, number: whose episode is shown: the game, ``agent`` or ``recording``, its seed or its row.
        looks_at: whether the newest frame shows where the first agent looks (`saliency`).
        cases: with two agents, where they disagree most clearly; choosing one goes there.
        steps: the controls over its steps.
        picture, words: the step as a figure, and in a sentence.
        episode: the episode.
    """

    def __init__(self, agents: Sequence[Agent], data: Replay | None, game: str, seed: int, protocol: dict[str, Any]):
        """Play the first episode and show it."""
        self._agents, self._data, self._protocol = agents, data, protocol
        shared = [game for game in agents[0].games if all(game in agent.games for agent in agents)]
        if not shared:
            played = "; ".join(f"{agent.name}: {', '.join(agent.games)}" for agent in agents)
            raise ValueError(f"these agents play no game together ({played}). Choose runs with a common game.")
        self.game = widgets.Dropdown(options=shared, value=game if game in shared else shared[0], description="game")
        self.source = widgets.Dropdown(options=["agent"], description="played by")
        self.number = widgets.BoundedIntText(min=0, max=2**30, description="seed")
        self.steps = Steps(self._show)
        self.picture = widgets.Image(format="png", layout=widgets.Layout(max_width="960px"))
        self.words = widgets.HTML()
        self.looks_at = widgets.ToggleButton(description="where it looks", tooltip="blur spots; slower")
        self.cases = widgets.Select(description="disagree", rows=6, layout=widgets.Layout(width="34em"))
        self.episode: Episode
        below = [self.words, self.cases] if len(agents) == 2 else [self.words]
        chosen = widgets.HBox([self.game, self.source, self.number, self.looks_at])
        super().__init__([chosen, self.steps, self.picture, *below])
        self._observed: list[tuple[Any, Callable]] = [
            (self.game, self._set_game), (self.source, self._set_source), (self.number, self._set_episode),
            (self.cases, self._set_case),
        ]  # fmt: skip
        for widget, call in self._observed:
            widget.observe(call, "value")
        self.looks_at.observe(self._show, "value")
        self._set_game(number=seed)

    def _quietly(self, widget: Any, **values: Any) -> None:
        """Set a widget without showing an episode that was not asked for."""
        ((_, call),) = [pair for pair in self._observed if pair[0] is widget]
        widget.unobserve(call, "value")
        for name, value in values.items():
            setattr(widget, name, value)
        widget.observe(call, "value")

    def _set_game(self, _: object = None, number: int = 0) -> None:
        there = self._data is not None and self.game.value in self._data.games
        options = ["agent", "recording"] if there else ["agent"]
        if list(self.source.options) != options:
            self._quietly(self.source, options=options, value="agent")
        self._set_source(number=number)

    def _set_source(self, _: object = None, number: int = 0) -> None:
        by_agent = self.source.value == "agent"
        last = 2**30 if by_agent else len(self._data.episodes(self.game.value)) - 1
        self._quietly(self.number, value=number, max=last, description="seed" if by_agent else "episode")
        self._set_episode()

    def _set_episode(self, _: object = None) -> None:
        agent, game, number = self._agents[0], self.game.value, self.number.value
        self.words.value = "playing ..." if self.source.value == "agent" else "reading ..."
        if self.source.value == "agent":
            protocol = agent.protocol | self._protocol
            self.episode = play(agent.player(game), game, seed=number, title=agent.name, **protocol)
        else:
            limit = {"max_steps": self._protocol["max_steps"]} if "max_steps" in self._protocol else {}
            self.episode = recorded(self._data, game, number, **limit)
        self._looks = [watch(agent, self.episode) for agent in self._agents]
        self._moments = Moments(self._agents, self.episode, self._looks)
        self.steps.set_episode(len(self.episode.actions), self._events())

    def _events(self) -> dict[str, np.ndarray]:
        events = {"reward": np.flatnonzero(self.episode.rewards)}
        if len(self._looks) == 2:
            events["disagreement"] = np.flatnonzero(self._looks[0].best != self._looks[1].best)
            table = disagreements(self.episode, *self._looks)
            cases = [(f"step {row.step}: {row.first} or {row.second}", row.step) for row in table.itertuples()]
            self._quietly(self.cases, options=cases, value=None)
        return events

    def _set_case(self, _: object = None) -> None:
        if self.cases.value is not None:
            self.steps.slider.value = self.cases.value

    def _show(self, _: object = None) -> None:
        step = self.steps.slider.value
        score = saliency(self._agents[0], self.episode, step) if self.looks_at.value else None
        self._moments.set_step(step, score)
        self.picture.value = self._moments.png()
        words = html.escape(moment_in_words(self._agents, self.episode, self._looks, step))
        self.words.value = f'<div role="status">{words}</div>'


def agent_browser(
    *agents: Agent, data: Replay | None = None, game: str = "", seed: int = 0, **protocol: Any
) -> AgentBrowser:
    """Browse an agent step by step, or two agents on the same states, in JupyterLab.

    The first agent plays, with a seed; or episodes of a recording are shown, and what the agents make of them. After a
    click on the slider, arrow keys move it; the play button plays at the game's speed. With two agents, the clearest
    cases in which they disagree are listed. A transformer sees the past of the episode, whoever played it.

    Args:
        agents: one or two, from `load_agent`.
        data: an open store with recorded episodes.
        game, seed: of the episode that is shown first; "": the first game that the agents share.
        protocol: changes to the way in which the first agent's run evaluates it, such as ``max_steps=500``;
            see `Agent.protocol`.

    Raises:
        ValueError: not one or two agents, or they play no game together.
    """
    if len(agents) not in (1, 2):
        raise ValueError(f"one agent or two can be browsed, got {len(agents)}.")
    return AgentBrowser(agents, data, game, seed, protocol)


# A click on a picture in an HTML widget: its place, as shares of width and height, goes to the kernel by a text field.
CLICK = """
const field = this.closest('.scaled-ql-clicked').querySelector('.scaled-ql-click input');
field.value = event.offsetX / this.clientWidth + ' ' + event.offsetY / this.clientHeight;
field.dispatchEvent(new Event('change', {bubbles: true}));
"""


class StateMapBrowser(widgets.VBox):
    """See `state_map_browser`.

    Attributes:
        by: what the colours show.
        state: row of the state that is shown.
        clicked: where the map was clicked: shares of its width and height from the top left, in text.
        picture, view, words: the map, the state's frames, the state in a sentence.
    """

    def __init__(self, states: StateMap):
        """Show the state in the middle of the map."""
        self._states, self._canvas = states, FigureCanvasAgg(Figure(figsize=(7.5, 5), dpi=80))
        self.by = widgets.Dropdown(options=["value", "return", "game"], description="colour")
        self.state = widgets.BoundedIntText(min=0, max=len(states.table) - 1, description="state")
        self.clicked = widgets.Text()
        hidden = widgets.Box([self.clicked], layout=widgets.Layout(display="none"))
        hidden.add_class("scaled-ql-click")
        self.picture, self.view, self.words = widgets.HTML(), widgets.Image(format="png", width=320), widgets.HTML()
        places = states.table[["x", "y"]].to_numpy()
        self.state.value = far_apart(places, 1)[0]
        beside = widgets.VBox([self.view, self.words])
        super().__init__([widgets.HBox([self.by, self.state]), widgets.HBox([self.picture, beside]), hidden])
        self.add_class("scaled-ql-clicked")
        self.by.observe(self._show, "value")
        self.state.observe(self._show, "value")
        self.clicked.observe(self._click, "value")
        self._show()

    def _click(self, _: object = None) -> None:
        """Choose the state nearest to the click."""
        across, down = map(float, self.clicked.value.split())
        width, height = self._canvas.get_width_height()
        clicked = np.array([across * width, (1 - down) * height])
        places = self._axis.transData.transform(self._states.table[["x", "y"]].to_numpy())
        self.state.value = int(np.linalg.norm(places - clicked, axis=1).argmin())

    def _show(self, _: object = None) -> None:
        table, row = self._states.table, self.state.value
        state, figure = table.iloc[row], self._canvas.figure
        figure.clear()
        self._axis = figure.add_subplot()
        scatter_states(self._axis, table, self.by.value)
        self._axis.plot(state["x"], state["y"], "o", ms=13, mfc="none", mec="#d55e00", mew=2.5)
        self._canvas.draw()
        words = (
            f"{state['game']}, transition {state['time']:,}: value {state['value']:.2f}, "
            f"return that followed {state['return']:.2f}"
        )
        data = base64.b64encode(to_picture(np.asarray(self._canvas.buffer_rgba())[..., :3])).decode()
        alternative = f"map of {len(table)} states coloured by {self.by.value}; marked: {words}"
        self.picture.value = (
            f'<img src="data:image/png;base64,{data}" alt="{html.escape(alternative)}" onclick="{html.escape(CLICK)}" '
            'style="cursor: crosshair; max-width: none">'
        )
        self.view.value = stack_picture(self._states.stacks[row])
        self.words.value = f'<div role="status">{html.escape(words)}; oldest frame first</div>'


def to_picture(picture: np.ndarray) -> bytes:
    """Encode uint8 [H, W] or [H, W, 3] as PNG, quickly."""
    buffer = io.BytesIO()
    Picture.fromarray(np.ascontiguousarray(picture)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def stack_picture(stack: np.ndarray) -> bytes:
    """A frame stack, uint8 [4, 84, 84], as one PNG of twice the size, oldest frame first, two in a row."""
    older, newer = (np.concatenate(list(pair), axis=1) for pair in np.split(stack, 2))
    return to_picture(np.concatenate([older, newer]).repeat(2, 0).repeat(2, 1))


def state_map_browser(states: StateMap) -> StateMapBrowser:
    """A map of states in JupyterLab: a click, or the number of a state, opens its frames."""
    return StateMapBrowser(states)


def show_state_map(states: StateMap, frames: int = 6) -> None:
    """The static twin of `state_map_browser`, with an alternative text: three colourings and some states' frames."""
    table = states.table
    rows = far_apart(table[["x", "y"]].to_numpy(), frames)
    figure = state_map(table, states.explained, {row: states.stacks[row, -1] for row in rows})
    together = table[["value", "return"]].corr().iloc[0, 1]
    show_figure(
        figure,
        f"Map of {len(table)} states of {', '.join(table['game'].unique())} by the first two principal components of "
        f"the agent's features, {states.explained.sum():.0%} of their variance, coloured by value, return and game. "
        f"Correlation of value and return: {together:.2f}.",
    )
