"""Widgets and figures on a real recording."""

import base64
import io
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from dopamine_log import DopamineLog
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from PIL import Image

from scaled_ql import evaluation, explore, plots, runs
from scaled_ql.environments import rules
from scaled_ql.games import action_names, reference_score
from scaled_ql.metrics import human_normalized
from scaled_ql.replay import ReplayWriter, View, import_dqn_replay, open_replay
from scaled_ql.replay.store import Replay
from scaled_ql.replay.views import drawn_transitions


def test_the_browser_shows_the_episode_that_its_sliders_name(recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, drawn, draw = open_replay(recording), [], explore.episode_view
    monkeypatch.setattr(explore, "episode_view", lambda _, *of: drawn.append(of) or draw(_, *of))
    browser = explore.episode_browser(data)
    (game, episode), (steps, words, picture) = browser.children[0].children, browser.children[1:]
    step = steps.slider
    pictures = {bytes(picture.value)}
    assert step.max == data.episodes("Breakout")["length"].iloc[0] - 1
    step.value = 5
    pictures.add(bytes(picture.value))
    game.value = "Freeway"
    pictures.add(bytes(picture.value))
    assert (episode.value, step.value) == (0, 0)
    assert episode.max == len(data.episodes("Freeway")) - 1
    assert len(pictures) == 3 and "Freeway, episode 0, truncated, step 0 of 149: " in words.value
    step.value, episode.value, game.value = 2, 1, "Breakout"
    expected = [("Breakout", 0, 0), ("Breakout", 0, 5), ("Freeway", 0, 0)]
    assert drawn == [*expected, ("Freeway", 0, 2), ("Freeway", 1, 0), ("Breakout", 0, 0)], "each once"


def test_sliders_draw_with_what_they_are_set_to() -> None:
    drawn = []

    def draw(**chosen: object) -> plt.Figure:
        drawn.append(chosen)
        return plt.figure(figsize=(1 + len(drawn), 1))

    widget = explore.sliders(draw, {"n": [1, 3, 5], "head": ["c51", "mse"]}, {"n": 3, "head": "mse"})
    (n, head), picture = widget.children[0].children, widget.children[1]
    before = bytes(picture.value)
    head.value = "c51"
    n.value = 5
    assert drawn == [{"n": 3, "head": "mse"}, {"n": 3, "head": "c51"}, {"n": 5, "head": "c51"}]
    assert [control.description for control in (n, head)] == ["n", "head"]
    assert bytes(picture.value) != before


def test_values_are_printed_behind_their_names(capsys: pytest.CaptureFixture) -> None:
    explore.values({"loss": np.float32(1 / 3), "by hand": 2, "rewards": np.array([0.0, 1.5]), "action": "LEFT"})
    assert capsys.readouterr().out.splitlines() == [
        "loss     0.333333",
        "by hand  2",
        "rewards  0, 1.5",
        "action   LEFT",
    ]


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


def test_names_of_runs_lead_to_their_reports() -> None:
    InteractiveShell.instance()
    with capture_output(stdout=False, stderr=False) as captured:
        explore.table(pd.DataFrame({"system": ["a, <b>"], "runs": ["first, second.seed-1"]}), links={"runs": "04"})
    InteractiveShell.clear_instance()
    (page,) = (output.data["text/html"] for output in captured.outputs)
    assert re.findall('href="([^"]+)">([^<]+)<', page) == [
        ("../../04/first/run.html", "first"),
        ("../../04/second.seed-1/run.html", "second.seed-1"),
    ]
    assert "a, &lt;b&gt;" in page


def test_progress_reaches_the_status_file_and_draws_at_the_end(tmp_path: Path) -> None:
    values = runs.parameters.check("01_data_collection", {"outputs": str(tmp_path)})
    run, drawn = runs.Run("01_data_collection", values), []

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


def test_a_picture_that_comes_late_is_shown_and_then_replaced(tmp_path: Path) -> None:
    values = runs.parameters.check("01_data_collection", {"outputs": str(tmp_path)})
    run = runs.Run("01_data_collection", values)
    progress = explore.Progress(run, "steps")
    InteractiveShell.instance()  # which collects what is displayed
    with capture_output(stdout=False, stderr=False) as captured:
        progress.update(1, 3)
        progress.update(2, 3, plt.figure)
        progress.update(3, 3, plt.figure)
    InteractiveShell.clear_instance()
    shown = [("image/png" in output.data, output.update) for output in captured.outputs]
    assert [update for picture, update in shown if picture] == [False, True]
    assert [update for picture, update in shown if not picture] == [False, True, True]
    run.finish({})
    plt.close("all")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Replay:
    """Logs of Pong and Amidar, six episodes of 9 each: of Pong a file is missing and two rows are bad."""
    folder = tmp_path_factory.mktemp("imported")
    pong = DopamineLog(folder / "log", "Pong", capacity=12)  # padding and an episode fill the ring: one dump for each
    for damage in (None, None, None, None, {2: {"reward": np.float32(np.nan)}, 8: {"action": 99}}, None):
        pong.add_episode(9, damage=damage)
    pong.finish()
    pong.remove(2)  # it holds the last row of episode 1 and all but the last of episode 2
    amidar = DopamineLog(folder / "log", "Amidar", capacity=12)
    for _ in range(6):
        amidar.add_episode(9)
    amidar.finish()
    import_dqn_replay(folder / "log", folder / "store")
    return open_replay(folder / "store")


def test_sources_and_findings_say_what_the_import_reported(imported: Replay) -> None:
    sources = explore.sources(imported)
    pong = sources.loc[("Pong", 1)]
    assert (pong["gaps"], pong["gap rows"], pong["excluded"], pong["left out"]) == (1, 12, 2, 0)
    assert (pong["source"], pong["rewards"], pong["complete"]) == ("DQN-Replay", "raw", "yes")
    assert pong["transitions"] == 6 * 9 - (1 + 8) - 2
    assert sources.loc[("Amidar", 1)][["transitions", "episodes", "gaps", "gap rows"]].tolist() == [54, 6, 0, 0]
    (gap,) = explore.findings(imported, "gaps").to_dict("records")
    assert gap == {
        "game": "Pong", "run": 1, "first row": 23, "last row": 34, "found before": "$store$_observation_ckpt.3.gz"
    }  # fmt: skip
    excluded = explore.findings(imported, "excluded")
    assert excluded["reason"].tolist() == [
        "its reward is nan, expected a finite number",
        "its action is 99, the game has 0 to 5",
    ]
    assert explore.findings(imported, "left_out").empty


def test_a_recording_has_no_import_to_report_and_a_killed_import_is_not_complete(
    recording: Path, imported: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = explore.sources(open_replay(recording))
    assert sources[["gaps", "gap rows", "excluded", "left out", "complete"]].isna().all(axis=None)
    monkeypatch.setattr(Replay, "import_reports", lambda self, game: [])
    assert (explore.sources(imported)["complete"] == "no").all()


def test_findings_are_shown_up_to_a_limit_and_without_folders(
    imported: Replay, recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(explore, "display", lambda html: shown.append(html.data))
    explore.show_findings(imported, limit=1)
    assert len(shown) == 2
    assert "Gaps: missing rows or files; all 1." in shown[0]
    assert "the first 1 of 2." in shown[1]
    rows = shown[1].split("<tbody>")[1]  # its identifier, before, is drawn at random
    assert "its reward is nan" in rows
    assert "its action is 99" not in rows
    assert "replay_logs" not in "".join(shown)
    explore.show_findings(open_replay(recording))
    assert len(shown) == 2, "nothing was imported, nothing is shown"


def test_incomplete_are_the_pieces_of_cut_episodes(imported: Replay) -> None:
    recorded = explore.recorded_episodes(imported)
    pong = recorded[recorded["game"] == "Pong"]
    assert pong["length"].tolist() == [9, 8, 1, 9, 2, 5, 9]
    assert pong["start"].tolist() == [0, 9, 17, 18, 27, 29, 34]
    assert pong["incomplete"].tolist() == [False, True, True, False, True, True, False]
    assert pong["fraction"].tolist() == pytest.approx([start / 43 for start in (0, 9, 17, 18, 27, 29, 34)])
    assert not recorded.loc[recorded["game"] == "Amidar", "incomplete"].any()
    table = explore.overview(imported, recorded)
    assert table.loc["Pong", ["episodes", "truncated", "beginning lost"]].tolist() == [7, 3, 2]
    whole = imported.episodes("Pong")["episode_return"].iloc[[0, 3, 6]]
    assert table.loc["Pong", "return mean"] == pytest.approx(whole.mean())
    assert table["ROM"].to_dict() == {"Amidar": "other (published data)", "Pong": "same (published data)"}


def test_a_time_limit_leaves_a_return_whole(recording: Path) -> None:
    recorded = explore.recorded_episodes(open_replay(recording))
    freeway = recorded[recorded["game"] == "Freeway"]
    assert freeway["truncated"].all()
    assert not freeway["incomplete"].any()
    assert (explore.overview(open_replay(recording), recorded)["ROM"] == "same").all()


def test_a_view_in_words_and_in_numbers(imported: Replay) -> None:
    view = View(games=["Pong"], runs=[1], first=0.5, uniform=0.25, seed=3)
    words = explore.describe_view(view)
    for part in ("Pong, run 1 of each", "first 50% of its transitions", "25% of each game's transitions", "seed 3"):
        assert part in words
    assert "transitions 5 to 19" in explore.describe_view(View(between=[5, 20]))
    assert explore.describe_view(View()) == "all games, all runs of each."
    data = open_replay(imported.path, view)
    shares = explore.view_shares(data, imported)
    drawn = len(drawn_transitions(view, "Pong", 27))
    assert shares.loc["Pong"].tolist() == pytest.approx([43, 27, drawn, 100 * drawn / 43])
    assert shares.loc["Amidar"].tolist() == [54, 0, 0, 0]


@pytest.mark.parametrize("fraction", [0.2, 0.25, 0.5, 0.6279])
def test_what_begins_in_the_first_part_is_what_a_view_shows(imported: Replay, fraction: float) -> None:
    data = open_replay(imported.path, View(first=fraction))
    recorded = explore.recorded_episodes(data)
    assert len(recorded) == 13, "also what the view leaves out"
    first = explore.begins_in_first(recorded, fraction)
    assert first.tolist() == recorded["in_view"].tolist()
    for game in data.games:
        assert recorded[first & (recorded["game"] == game)]["length"].sum() == data.num_transitions(game)
        assert explore.overview(data, recorded).loc[game, "transitions"] == data.num_transitions(game)


def test_the_browser_and_its_twin_work_on_a_view(imported: Replay) -> None:
    data = open_replay(imported.path, View(between=[20, 54], uniform=0.5))
    explore.episode_browser(data)
    figure = explore.episode_view(data, "Pong", 1, 3)
    shown = figure.axes[3].images[0].get_array()
    np.testing.assert_array_equal(shown, data.episode("Pong", 1)["observation"][3])
    rewards = data.episode("Pong", 1)["reward"]
    title = figure.get_suptitle()
    assert "episode 1, beginning lost, truncated, step 3 of 4" in title
    assert f"reward {rewards[3]:g}, return so far {rewards[:3].sum():g} (at the end {rewards.sum():g})" in title
    plt.close("all")


def tidy(game: str, run: int, returns: list[float], **columns: object) -> pd.DataFrame:
    """Episodes of ten transitions each."""
    start = 10 * np.arange(len(returns))
    known = {"truncated": False, "continued": False, "incomplete": False, "clipped": False, "in_view": True}
    table = {"game": game, "run": run, "start": start, "length": 10, "fraction": start / (10 * len(returns))}
    return pd.DataFrame(table | {"episode_return": returns} | known | columns)


def test_quality_over_time_by_hand() -> None:
    # Pong: random -20.7, human 14.6. Of four parts, run 2 begins an episode in the first and the third alone.
    episodes = pd.concat(
        [
            tidy("Pong", 1, [-20.7, 14.6, 14.6, -20.7], incomplete=[False, False, False, True]),
            tidy("Pong", 2, [14.6, 14.6]),
            tidy("Tetris", 1, [1.0, 2.0], clipped=True),
        ],
        ignore_index=True,
    )
    quality = explore.quality_over_time(episodes, bins=4)
    pong = quality[quality["game"] == "Pong"]
    assert pong["fraction"].tolist() == [0.125, 0.375, 0.625, 0.875]
    assert pong["human_normalized"].tolist() == pytest.approx([0.5, 1, 1, 1]), "the last part goes on as it was"
    assert not pong["clipped"].any()
    tetris = quality[quality["game"] == "Tetris"]
    assert tetris["human_normalized"].isna().all(), "no reference scores"
    assert tetris["clipped"].all()


def test_parts_compared_by_hand() -> None:
    games = ("Pong", "Breakout", "Seaquest", "Qbert")
    tables = []
    for number, game in enumerate(games):
        random, human = reference_score(game, "random"), reference_score(game, "human")
        returns = [random + (human - random) * score for score in (0, 0, number, number, 1)]
        tables.append(tidy(game, 1, returns, incomplete=[False, False, False, False, True]))
    episodes = pd.concat(tables, ignore_index=True)
    compared = explore.compare_parts(
        episodes, {"all": episodes["length"] > 0, "first": explore.begins_in_first(episodes, 0.5)}
    )
    seaquest = compared.loc[("Seaquest", 1)]
    assert seaquest[("all", "transitions")] == 50
    assert seaquest[("all", "score, %")] == pytest.approx(100)  # (0 + 0 + 2 + 2) / 4
    assert seaquest[("first", "episodes")] == 3
    assert seaquest[("first", "score, %")] == pytest.approx(200 / 3)
    assert human_normalized("Seaquest", seaquest[("first", "mean return")]) == pytest.approx(2 / 3)
    last = compared.iloc[-1]
    assert last[("all", "transitions")] == 200
    assert last[("first", "episodes")] == 12
    assert last[("all", "score, %")] == pytest.approx((50 + 100) / 2), "without the best and the worst of four"
    assert last[("first", "score, %")] == pytest.approx(100 * (1 / 3 + 2 / 3) / 2)
    assert np.isnan(last[("all", "mean return")])
    rows = json.loads(json.dumps(explore.records(compared), allow_nan=False))
    assert rows[-1]["all mean return"] is None
    assert rows[0]["game"] == "Breakout"


def test_beginnings_of_games_have_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three parts of the recording are mostly of episodes that a step limit ended."""
    random, human = reference_score("Pong", "random"), reference_score("Pong", "human")
    cut = [False, True, True, True, False, False]
    pong = tidy("Pong", 1, [human] * 6, truncated=cut)
    episodes = pd.concat([pong, tidy("Breakout", 1, [random] * 6, truncated=[True] * 6)], ignore_index=True)
    quality = explore.quality_over_time(episodes, bins=3)
    assert quality["human_normalized"].isna().tolist() == [False, True, False, True, True, True]
    early = episodes["start"] < 40
    compared = explore.compare_parts(episodes, {"all": episodes["length"] > 0, "early": early})
    assert compared.loc[("Pong", 1), ("all", "truncated, %")] == 50
    assert compared.loc[("Pong", 1), ("all", "score, %")] == pytest.approx(100)
    assert compared.loc[("Pong", 1), ("early", "truncated, %")] == 75
    assert compared.loc[("Pong", 1), ("early", "mean return")] == human
    assert np.isnan(compared.loc[("Pong", 1), ("early", "score, %")])
    assert compared.iloc[-1][("all", "score, %")] == pytest.approx(100), "of Pong alone"
    assert np.isnan(compared.iloc[-1][("early", "score, %")])
    shown: list[str] = []
    monkeypatch.setattr(explore, "display", lambda html: shown.append(html.data))
    explore.table(compared, none=[("all", "score, %"), ("early", "score, %")])
    assert shown[0].count(">none<") == 4  # Breakout twice, Pong's early part, and its IQM


def test_lives_are_no_games(tmp_path: Path) -> None:
    about = {"actions": action_names("Pong"), "source": "a test", **rules(sticky_actions=0.25)}
    for run, by_life in ((1, False), (2, True), (3, None)):
        with ReplayWriter(tmp_path, "Pong", run, **about | {"life_loss_terminal": by_life, "mode": by_life}) as writer:
            writer.append(np.ones((3, 84, 84), np.uint8), np.zeros(3, int), np.ones(3), terminal=True)
    data = open_replay(tmp_path)
    recorded = explore.recorded_episodes(data)
    assert recorded["incomplete"].tolist() == [False, True, False]
    assert explore.overview(data, recorded)["return mean"].tolist() == [3]
    said = explore.recorded_rules(data)
    assert said["end of an episode at a lost life"].tolist() == ["no", "yes", "not known"]
    assert said.loc[("Pong", 1), "sticky actions"] == "0.25" and said.loc[("Pong", 1), "step limit"] == "27000"


def test_a_part_may_lack_a_game(imported: Replay) -> None:
    recorded = explore.recorded_episodes(imported)
    compared = explore.compare_parts(recorded, {"all": recorded["length"] > 0, "one": recorded["game"] == "Pong"})
    assert compared.loc[("Amidar", 1), ("one", "transitions")] == 0
    assert np.isnan(compared.loc[("Amidar", 1), ("one", "score, %")])
    assert compared.iloc[-1][("one", "transitions")] == 43
    assert np.isnan(explore.iqm_over_games(recorded[recorded["incomplete"]]))


def test_a_store_of_any_game_is_understood(tmp_path: Path) -> None:
    about = {"actions": action_names("Tetris"), "source": "nobody", "sticky_actions": 0, "rom_md5": "0"}
    with ReplayWriter(tmp_path, "Tetris", **about) as writer:
        writer.append(np.zeros((3, 84, 84), np.uint8), np.zeros(3, int), np.ones(3), terminal=True)
    data = open_replay(tmp_path)
    recorded = explore.recorded_episodes(data)
    assert explore.overview(data, recorded).loc["Tetris", "ROM"] == "other"
    compared = explore.compare_parts(recorded, {"all": recorded["length"] > 0})
    assert compared[("all", "score, %")].isna().all()
    assert compared.loc[("Tetris", 1), ("all", "mean return")] == 3


def test_tables_show_what_is_in_them_and_no_markup_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(explore, "display", lambda html: shown.append(html.data))
    data = pd.DataFrame({"a": [-0.04, 1234.56, np.nan], "b": ["<i>", "$x$", "c"]})
    explore.table(data)
    for cell in (">0.0<", ">1,234.6<", ">–<", "&lt;i&gt;", "tex2jax_ignore"):
        assert cell in shown[0]
    assert "-0.0" not in shown[0]
    assert data["a"].iloc[0] == -0.04, "the caller's table stays as it was"


def test_a_film_shows_its_middle_until_it_plays(tmp_path: Path) -> None:
    pictures = [np.full((64, 96, 3), 10 * number, np.uint8) for number in range(21)]
    evaluation.write_video(tmp_path / "film.mp4", pictures, 30)
    html = explore.film(tmp_path / "film.mp4")._repr_html_()
    assert "data:video/mp4;base64," in html
    (poster,) = re.findall(r'poster="data:image/jpeg;base64,([^"]+)"', html)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(poster))))
    assert shown.shape == (64, 96, 3) and abs(shown.mean() - 100) < 8
