"""Things to look at and play with in a notebook; each widget has a static twin for rendered reports."""

import io
import time
from collections.abc import Callable

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML, DisplayHandle, Image, display
from matplotlib.figure import Figure
from tqdm import tqdm

from scaled_ql.replay import Replay
from scaled_ql.runs import Run


def to_png(figure: Figure) -> bytes:
    """Render and close a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


class Progress:
    """One progress line and one picture, updated in place: alive in JupyterLab, a single output in a report."""

    def __init__(self, run: Run, unit: str, seconds_between_pictures: float = 20):
        """Show nothing yet; `run` also gets the progress, for whoever started it."""
        self.run, self.unit, self.period = run, unit, seconds_between_pictures
        self._line, self._picture = DisplayHandle(), DisplayHandle()
        self._shown = False
        self._started = self._drawn = time.monotonic()
        self._initial = 0

    def update(self, done: int, total: int, draw: Callable[[], Figure] | None = None) -> None:
        """Say how far things are; `draw` makes the picture, called now and then and at the end."""
        now = time.monotonic()
        if not self._shown:
            self._initial = done
        line = tqdm.format_meter(done, total, now - self._started, unit=self.unit, initial=self._initial, ncols=100)
        self._put(self._line, {"text/plain": line}, raw=True)
        if draw is not None and (not self._shown or done >= total or now - self._drawn > self.period):
            self._put(self._picture, Image(to_png(draw())))
            self._drawn = now
        self._shown = True
        self.run.progress(done, total)

    def _put(self, handle: DisplayHandle, content: object, raw: bool = False) -> None:
        if self._shown:
            handle.update(content, raw=raw)
        else:
            handle.display(content, raw=raw)


def episode_view(replay: Replay, game: str, episode: int, step: int, stack_size: int = 4) -> Figure:
    """One moment of an episode: the frame stack the agent sees, the action by name, the reward, the return so far.

    Args:
        replay: an open store.
        game: one of its games.
        episode: row of its episode table.
        step: within the episode.
        stack_size: frames shown, oldest first.
    """
    row = replay.episodes(game).iloc[episode]
    t, start = int(row["start"]) + step, int(row["start"])
    first = max(t - stack_size + 1, start)
    frames = replay.frames_at(game, np.arange(first, t + 1))
    stack = np.concatenate([np.zeros((stack_size - len(frames), 84, 84), np.uint8), frames])
    rewards = replay.rewards(game)[start : t + 1]
    action = replay.action_names(game)[replay.actions(game)[t]]
    figure, axes = plt.subplots(1, stack_size, figsize=(2.1 * stack_size, 2.7))
    for age, (axis, frame) in enumerate(zip(np.atleast_1d(axes), stack)):
        axis.imshow(frame, cmap="gray", vmin=0, vmax=255)
        axis.set_axis_off()
        axis.set_title("now" if age == stack_size - 1 else f"{stack_size - 1 - age} before", fontsize="small")
    figure.suptitle(
        f"{game}, episode {episode}, step {step} of {int(row['length']) - 1}: {action}, "
        f"reward {rewards[-1]:g}, return so far {rewards[:-1].sum():g} (at the end {row['episode_return']:g})",
        fontsize="medium",
    )
    return figure


def episode_browser(replay: Replay) -> widgets.Widget:
    """Sliders over game, episode and step around `episode_view`, for JupyterLab."""
    game = widgets.Dropdown(options=replay.games, description="game")
    episode = widgets.IntSlider(description="episode", min=0, max=0, continuous_update=False)
    step = widgets.IntSlider(description="step", min=0, max=0, continuous_update=False)
    play = widgets.Play(min=0, max=0, step=1, interval=150)
    picture = widgets.Image(format="png")
    widgets.jslink((play, "value"), (step, "value"))

    def set_game(_: object = None) -> None:
        episode.value, episode.max = 0, len(replay.episodes(game.value)) - 1
        set_episode()

    def set_episode(_: object = None) -> None:
        last = int(replay.episodes(game.value)["length"].iloc[episode.value]) - 1
        step.value, step.max, play.max = 0, last, last
        show()

    def show(_: object = None) -> None:
        picture.value = to_png(episode_view(replay, game.value, episode.value, step.value))

    game.observe(set_game, "value")
    episode.observe(set_episode, "value")
    step.observe(show, "value")
    set_game()
    return widgets.VBox([widgets.HBox([game, episode]), widgets.HBox([play, step]), picture])


def table(data: pd.DataFrame, decimals: int = 1, caption: str = "") -> None:
    """Show a table, numbers rounded, readable in a report."""
    style = data.style.format(precision=decimals, thousands=",", na_rep="–").set_caption(caption)
    display(HTML(style.to_html()))
