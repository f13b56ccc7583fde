"""Play in the emulator yourself, take over from an agent, and hand back."""

import html
import weakref
from typing import Any

import ipywidgets as widgets
import numpy as np

from scaled_ql.browsers import stack_picture
from scaled_ql.controls import GAME_SPEED
from scaled_ql.episodes import Emulation, Episode, begin
from scaled_ql.games import action_names
from scaled_ql.trained_agent import Agent

KEYS = {"ArrowUp": "UP", "ArrowDown": "DOWN", "ArrowLeft": "LEFT", "ArrowRight": "RIGHT", "Space": "FIRE"}  # by code
# A key goes to the kernel by a text field, with the time so that no two are equal. An input of its own has the focus,
# since JupyterLab takes keys for commands elsewhere.
PRESS = """
const field = this.closest('.scaled-ql-play').querySelector('.scaled-ql-key input');
field.value = (event.type == 'keyup' ? 'released' : event.code) + ' ' + event.timeStamp;
field.dispatchEvent(new Event('change', {bubbles: true}));
event.preventDefault();
"""


class PlayAlong(widgets.VBox):
    """See `play_along`.

    Attributes:
        game, seed, again: the episode, and a button that begins it again.
        player: whose turn it is while it plays, ``agent`` or ``you``.
        play: plays at the game's speed.
        moves: a button for each action, with the agent's value; its best is green.
        pressed: the last key and its time, in text.
        view, words: the observation, oldest frame first, and the state in a sentence.
    """

    def __init__(self, agent: Agent, protocol: dict[str, Any]):
        """Begin an episode of the agent's first game; see `play_along`."""
        self._agent, self._protocol = agent, protocol
        self._emulations: list[Emulation] = []  # the one in progress
        weakref.finalize(self, self._emulations.clear)  # at exit, too: ALE reports an emulator that is left
        self.game = widgets.Dropdown(options=agent.games, description="game")
        self.seed = widgets.BoundedIntText(min=0, max=2**30, description="seed")
        self.again = widgets.Button(description="begin again")
        self.player = widgets.ToggleButtons(options=["agent", "you"], style={"button_width": "6em"})
        self.play = widgets.Play(min=0, max=2**30, interval=round(GAME_SPEED), show_repeat=False)
        self.one = widgets.Button(description="one step", tooltip="one step of whose turn it is")
        self.moves = widgets.HBox(layout=widgets.Layout(flex_flow="row wrap", width="40em"))
        self.pressed = widgets.Text()
        hidden = widgets.Box([self.pressed], layout=widgets.Layout(display="none"))
        hidden.add_class("scaled-ql-key")
        heard = html.escape(PRESS)
        keys = widgets.HTML(
            f'<input onkeydown="{heard}" onkeyup="{heard}" style="width: 36em" aria-label="keys" '
            'placeholder="click here, then play with the arrow keys and the space bar (fire)">'
        )
        self.view, self.words = widgets.Image(format="png", width=336), widgets.HTML()
        beside = widgets.VBox([self.moves, self.words])
        rows = [[self.game, self.seed, self.again], [self.player, self.play, self.one], [keys, hidden]]
        super().__init__([*map(widgets.HBox, rows), widgets.HBox([self.view, beside])])
        self.add_class("scaled-ql-play")
        for widget in (self.game, self.seed):
            widget.observe(self._begin, "value")
        self.again.on_click(self._begin)
        self.one.on_click(lambda _: self._turn())
        self.play.observe(self._tick, "value")
        self.pressed.observe(self._key, "value")
        self._begin()

    @property
    def _emulation(self) -> Emulation:
        return self._emulations[0]

    @property
    def episode(self) -> Episode:
        """What was played so far."""
        title = f"{self._agent.name} and you, seed {self.seed.value}"
        return self._emulation.episode(title, self.seed.value)

    def by_agent(self, steps: int = 1) -> None:
        """Let the agent play so many steps, or to the episode's end."""
        for _ in range(steps):
            if self._emulation.over:
                return
            self._step(*self._chance.choose(self._look.values[0]))

    def by_you(self, action: str, steps: int = 1) -> None:
        """Take an action by its name, so many times or to the episode's end."""
        for _ in range(steps):
            if not self._emulation.over:
                self._step(self._names.index(action), "you")

    def _begin(self, _: object = None) -> None:
        for emulation in self._emulations:
            emulation.close()
        self.play.playing, self.player.value = False, "agent"
        self._names, self._held, self._return = action_names(self.game.value), 0, 0.0  # 0 is NOOP in every game
        player = self._agent.player(self.game.value)
        emulation, self._chance = begin(player, self.game.value, self.seed.value, **self._protocol)
        self._emulations[:] = [emulation]
        self.moves.children = [self._button(number) for number in range(len(self._names))]
        self._show()

    def _button(self, number: int) -> widgets.Button:
        button = widgets.Button(layout=widgets.Layout(width="12.5em"))
        button.on_click(lambda _: self._take(number))
        return button

    def _take(self, action: int) -> None:
        """You choose an action: now, or from the next step on while it plays."""
        self.player.value, self._held = "you", action
        if not self.play.playing and not self._emulation.over:
            self._step(action, "you")

    def _key(self, _: object = None) -> None:
        code = self.pressed.value.split()[0]
        if code == "released":
            self._held = 0
        elif KEYS.get(code) in self._names:
            self._take(self._names.index(KEYS[code]))

    def _tick(self, change: Any) -> None:
        if change["new"]:  # 0 is the stop button's
            self._turn()

    def _turn(self) -> None:
        if self._emulation.over:
            self.play.playing = False
        elif self.player.value == "agent":
            self.by_agent()
        else:
            self._step(self._held, "you")

    def _step(self, action: int, by: str) -> None:
        self._return += self._emulation.step(action, by)
        self._show()

    def _show(self) -> None:
        self._look = self._agent.look(self.game.value, *self._emulation.seen)
        best, values = int(self._look.best[0]), self._look.shown[0]
        for number, (button, name, value) in enumerate(zip(self.moves.children, self._names, values)):
            button.description = f"{name}  {value:.2f}" if np.isfinite(value) else f"{name}  not allowed"
            button.button_style = "success" if number == best else ""
        self.view.value = stack_picture(self._emulation.stack)
        over = f" Over: {self._emulation.over}." if self._emulation.over else ""
        would = "would play" if self._look.policy is None else "would most likely play"
        words = f"Step {len(self._emulation)}, return {self._return:g}; the agent {would} {self._names[best]}.{over}"
        self.words.value = f'<div role="status">{html.escape(words)}</div>'


def play_along(agent: Agent, **protocol: Any) -> PlayAlong:
    """Play yourself in JupyterLab, by buttons or keys, and let the agent take over or hand back at any moment.

    As long as the agent alone plays, it is the episode of `episodes.play` with this seed. What you do is part of the
    past that a transformer sees when you hand back.

    Args:
        agent: whose games are played, and whose values are shown.
        protocol: changes to `Agent.protocol`, such as ``epsilon=0``: without random moves.
    """
    return PlayAlong(agent, agent.protocol | protocol)
