"""Widgets and figures on a real recording."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from scaled_ql import explore, plots, runs
from scaled_ql.replay import open_replay


def test_the_browser_shows_the_episode_that_its_sliders_name(recording: Path) -> None:
    data = open_replay(recording)
    browser = explore.episode_browser(data)
    (game, episode), (_, step), picture = (
        browser.children[0].children,
        browser.children[1].children,
        browser.children[2],
    )
    pictures = {bytes(picture.value)}
    assert step.max == data.episodes("Breakout")["length"].iloc[0] - 1
    step.value = 5
    pictures.add(bytes(picture.value))
    game.value = "Freeway"
    pictures.add(bytes(picture.value))
    assert (episode.value, step.value) == (0, 0)
    assert episode.max == len(data.episodes("Freeway")) - 1
    assert len(pictures) == 3


def test_the_static_twin_shows_the_stack_that_a_batch_holds(recording: Path) -> None:
    data = open_replay(recording)
    row = data.episodes("Breakout").iloc[1]
    for step in (0, 2, int(row["length"]) - 1):
        figure = explore.episode_view(data, "Breakout", 1, step)
        shown = np.stack([axis.images[0].get_array() for axis in figure.axes], axis=-1)
        np.testing.assert_array_equal(shown, data.batch("Breakout", [row["start"] + step]).observation[0])
        plt.close(figure)


def test_figures_show_the_numbers_they_are_given(recording: Path) -> None:
    data = open_replay(recording)
    episodes = pd.concat([data.episodes(game).assign(game=game) for game in data.games])
    figure = plots.returns_over_time(episodes)
    dots = figure.axes[0].collections[0].get_offsets()
    np.testing.assert_allclose(dots[:, 1], data.episodes("Breakout")["episode_return"])
    actions = np.array([0, 0, 1, 3])
    bars = plots.action_histograms({"Breakout": actions}, {"Breakout": ["A", "B", "C", "D"]}).axes[0].patches
    assert [bar.get_width() for bar in bars] == [0.5, 0.25, 0, 0.25]
    rate = plots.reward_density({"Pong": np.array([0, 1, 0, -1.0])}, bins=2).axes[0].lines
    assert [line.get_ydata().tolist() for line in rate] == [[500, 0], [0, 500]] or [
        list(line.get_ydata()) for line in rate
    ] == [[500, 0], [0, 500]]
    plt.close("all")


def test_progress_reaches_the_status_file_and_draws_at_the_end(tmp_path: Path) -> None:
    values = runs.parameters.check("00_data_collection", {"outputs": str(tmp_path)})
    run, drawn = runs.Run("00_data_collection", values), []

    def draw() -> plt.Figure:
        drawn.append(1)
        return plt.figure()

    progress = explore.Progress(run, "steps")
    for done in (1, 2, 3):
        progress.update(done, 3, draw)
    status = runs.read_json(run.folder / "status.json")
    assert (status["state"], status["done"], status["total"]) == ("running", 3, 3)
    assert len(drawn) == 2, "at the start and at the end, not at every step"
    run.finish({})
