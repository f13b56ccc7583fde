"""Controls that browsers of episodes share."""

from collections.abc import Callable

import ipywidgets as widgets
import numpy as np

from scaled_ql.environments import FRAME_SKIP

GAME_SPEED = 1_000 * FRAME_SKIP / 60  # milliseconds of a step: the console shows 60 frames a second


def next_event(steps: np.ndarray, now: int) -> int:
    """The first of ascending steps after `now`; `now` if there is none."""
    later = steps[steps > now]
    return int(later[0]) if len(later) else now


class Steps(widgets.HBox):
    """Controls over the steps of an episode: play, a slider that follows the arrow keys, jumps to events.

    Attributes:
        play, slider, jumps: the controls; the slider has the step.
    """

    def __init__(self, show: Callable[[], None]):
        """Make the controls of an empty episode; `show` is called once whenever another step is to be shown."""
        self.play = widgets.Play(min=0, max=0, interval=round(GAME_SPEED), show_repeat=False)
        wide = widgets.Layout(width="34em")
        self.slider = widgets.IntSlider(min=0, max=0, description="step", layout=wide)
        widgets.jslink((self.play, "value"), (self.slider, "value"))
        self._show = lambda _: show()
        self.slider.observe(self._show, "value")
        self._events: dict[str, np.ndarray] = {}
        self.jumps = widgets.HBox([])
        super().__init__([self.play, self.slider, self.jumps])

    def set_episode(self, length: int, events: dict[str, np.ndarray]) -> None:
        """Begin at step 0 of another episode, and show it.

        Args:
            length: its steps.
            events: ascending steps by name; each gets a button that jumps to the next one.
        """
        self.play.playing = False
        self.slider.unobserve(self._show, "value")
        self.slider.value, self.slider.max, self.play.max = 0, length - 1, length - 1
        self.slider.observe(self._show, "value")
        self._events = events
        if [button.description for button in self.jumps.children] != [f"next {name}" for name in events]:
            self.jumps.children = [self._button(name) for name in events]
        for button, steps in zip(self.jumps.children, events.values()):
            button.disabled = not len(steps)
        self._show(None)

    def _button(self, name: str) -> widgets.Button:
        button = widgets.Button(
            description=f"next {name}", tooltip=f"jump to the next {name}", layout=widgets.Layout(width="auto")
        )

        def jump(_: object) -> None:
            self.slider.value = next_event(self._events[name], self.slider.value)

        button.on_click(jump)
        return button
