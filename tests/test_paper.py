"""The paper's numbers from its own tables, and our systems beside them, each in the same games only."""

from collections.abc import Iterator, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from scaled_ql import metrics, paper, plots
from scaled_ql.games import TRAINING_GAMES, reference_score

VIEW = "forty_games_suboptimal"
DEFAULTS = {
    "method": "cql", "encoder": "resnet101", "head": "c51", "hidden_sizes": [2048, 1024], "alpha": "paper", "seed": 0,
    "view": VIEW, "dataset": "dqn_replay", "num_steps": 10_000, "log_every": 100, "data_id": "0123456789ab",
    "num_parameters": 122_100_000, "paper_parameters": 80_300_000, "eval_epsilon": 0.001, "eval_max_steps": 27_000,
    "transformer": "40M",
}  # fmt: skip
NO_RUNS, NO_SCORES = pd.DataFrame(), pd.DataFrame(columns=["run", "game", "agent_return", "human_normalized"])


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


def gathered(**changes: dict) -> pd.DataFrame:
    """Runs by name, each with what differs from `DEFAULTS`."""
    return pd.DataFrame([DEFAULTS | {name: row[name] for name in row} for row in changes.values()], index=list(changes))


def scored(**levels: float | Sequence[float]) -> pd.DataFrame:
    """Scores of runs in all 40 games, or, where a run has a list, in the first few."""
    rows = []
    for run, level in levels.items():
        for game, value in zip(TRAINING_GAMES, level if isinstance(level, list) else [level] * 40):
            random, human = reference_score(game, "random"), reference_score(game, "human")
            rows.append((run, game, random + value * (human - random), value, 10, 0.25))
    return pd.DataFrame(rows, columns=["run", "game", "agent_return", "human_normalized", "episodes", "truncated"])


def rows_of(table: pd.DataFrame, system: str, column: str = "system") -> pd.DataFrame:
    return table[table[column] == system]


@pytest.mark.parametrize("setting", paper.SETTINGS)
def test_recomputed_numbers_are_near_the_printed_ones(setting: paper.Setting) -> None:
    """To 1.4 percentage points, that of DT (200M) on sub-optimal data: 29.3 recomputed, 30.6 printed."""
    table = paper.with_printed(paper.aggregates(paper.published(setting), replicates=20), setting)
    printed = table.dropna(subset="printed")
    assert len(printed) == sum(key[0] == setting for key in paper.PRINTED)
    assert (printed["value"] - printed["printed"]).abs().max() < 0.014
    assert (table.dropna(subset="low").eval("low <= value <= high")).all()
    assert len(table) == 5 * 2 + 1
    behaviour = table.iloc[-1]
    assert behaviour["value"] == {"sub_optimal": 0.51, "near_optimal": 0.935}[setting]
    assert np.isnan(behaviour["low"]) and np.isnan(behaviour["high"]), "there is nothing to draw anew"


@pytest.mark.parametrize(
    ("system", "iqm", "median"),
    [("DT (40M)", 22.7, 18.1), ("BC (80M)", 11.7, 7.4), ("MT Impala-DQN", 61.8, 65.6), ("Scaled QL (80M)", 77.6, 57.5)],
)
def test_aggregates_of_the_sub_optimal_data(system: str, iqm: float, median: float) -> None:
    table = rows_of(paper.aggregates(paper.published("sub_optimal"), replicates=20), system).set_index("statistic")
    assert 100 * table.loc["IQM", "value"] == pytest.approx(iqm, abs=0.1)
    assert 100 * table.loc["median", "value"] == pytest.approx(median, abs=0.1)
    assert (table["games"] == 40).all() and (table["runs"] == 1).all()


def test_the_papers_words_against_its_tables() -> None:
    assert paper.claims()["recomputed"].tolist() == ["2.65×", "42.5%", "2.3 points", "21.4 points"]


def test_improvement_by_hand() -> None:
    """The difference of raw scores over what the human is above a random player; in 12 games DT is better."""
    gain = paper.improvement(paper.published("sub_optimal"), paper.SCALED_QL).set_index("game")["improvement"]
    raw = paper.raw_scores(paper.published("sub_optimal"))
    assert raw.loc["Amidar"].tolist() == [72.9, 82.2, 14.5, 629.8, 33.1, 1719.5], "the first row of Table C.1"
    for game, span in (("Breakout", 30.5 - 1.7), ("Jamesbond", 302.8 - 29.0), ("Amidar", 1719.5 - 5.8)):
        assert gain[game] == pytest.approx((raw.loc[game, paper.SCALED_QL] - raw.loc[game, paper.DT]) / span)
    assert gain["Amidar"] == pytest.approx((33.1 - 72.9) / 1713.7)
    worse = "Carnival TimePilot ChopperCommand Zaxxon Jamesbond Amidar Hero WizardOfWor Gopher VideoPinball"
    assert set(gain[gain < 0].index) == {*worse.split(), "YarsRevenge", "FishingDerby"}
    curve = paper.profiles(
        paper.improvement(paper.published("sub_optimal"), paper.SCALED_QL), [0, 1, 5, 20], "improvement", replicates=50
    )
    assert curve["fraction"].tolist() == [28 / 40, 12 / 40, 3 / 40, 1 / 40]
    assert curve.eval("low <= fraction <= high").all()


def test_profiles_are_those_of_metrics() -> None:
    taus = np.linspace(0, 2, 11)
    ours = paper.profiles(paper.published("near_optimal"), taus, replicates=300, seed=3)
    for system, rows in ours.groupby("system"):
        values = rows_of(paper.published("near_optimal"), system)["human_normalized"].to_numpy()
        np.testing.assert_allclose(rows["fraction"], metrics.profile(values, taus))
    low, high = metrics.interval(
        rows_of(paper.published("near_optimal"), paper.DT).sort_values("game")["human_normalized"],
        lambda scores: metrics.profile(scores, taus), 300, seed=3, over="tasks",
    )  # fmt: skip
    np.testing.assert_allclose(rows_of(ours, paper.DT)[["low", "high"]].to_numpy().T, [low, high])


def test_runs_that_differ_in_the_seed_are_one_system_and_others_are_told_apart() -> None:
    runs = gathered(
        a={"seed": 0}, b={"seed": 1, "dataset": "elsewhere", "log_every": 50}, c={"method": "bc"},
        d={"method": "bc", "num_steps": 20_000}, e={"view": "six_games_suboptimal"},
        f={"encoder": "impala_x4", "hidden_sizes": [32]}, g={"encoder": "impala_x4", "hidden_sizes": [64]},
        h={"method": "dt"},
    )  # fmt: skip
    assert paper.systems(runs, VIEW)["system"].to_dict() == {
        "a": "Scaled QL, resnet101, here",
        "b": "Scaled QL, resnet101, here",
        "c": "BC, resnet101, num_steps 10,000, here",
        "d": "BC, resnet101, num_steps 20,000, here",
        "f": "Scaled QL, impala_x4, hidden_sizes [32], here",
        "g": "Scaled QL, impala_x4, hidden_sizes [64], here",
        "h": "DT, 40M, here",
    }
    assert (
        paper.systems(runs.assign(data_id=list("abcdefgh")), VIEW)["system"]["b"]
        == "Scaled QL, resnet101, data b, here"
    )


def test_seeds_count_together_and_only_games_that_all_of_them_have() -> None:
    runs = gathered(a={"seed": 0}, b={"seed": 1}, other={"view": ""})
    scores = scored(a=0.2, b=[0.4, 0.8, 1.2], other=9.0)
    scores.loc[len(scores)] = ["a", "Pong", 3.0, 0.5, 10, 0.25]  # not one of the paper's 40
    own = paper.own_scores(runs, scores, VIEW)
    assert set(own["game"]) == set(TRAINING_GAMES[:3]) and set(own["run"]) == {"a", "b"}
    first, second = paper.compare(paper.published("sub_optimal"), own)
    assert first.own == [] and first.games == TRAINING_GAMES and first.title == "all 40 games"
    assert second.own == ["Scaled QL, resnet101, here"] and second.title == "3 of 40 games (Amidar, Assault, Asterix)"
    table = paper.aggregates(second.scores, replicates=20)
    assert (table["games"] == 3).all()
    ours = rows_of(table, "Scaled QL, resnet101, here").set_index("statistic")
    assert ours.loc["median", "value"] == pytest.approx(0.5) and (ours["runs"] == 2).all()
    assert ours.loc["IQM", "value"] == pytest.approx((0.2 + 0.2 + 0.4 + 0.8) / 4)
    about = paper.describe(runs, scores, VIEW).loc["Scaled QL, resnet101, here"]
    assert about["games compared"] == "3 of 40" and "Pong" in about["its other games"] and about["seeds"] == "0, 1"
    assert about["truncated, %"] == 25
    assert (about["parameters, millions"], about["in all, millions"]) == (80.3, 122.1), "as the paper counts, and all"


def test_systems_of_fewer_games_never_stand_among_those_of_forty() -> None:
    runs = gathered(
        full={}, few={"encoder": "resnet34"}, fewer={"encoder": "resnet50"}, same={"encoder": "nature"},
        none={"encoder": "resnet_narrow"},
    )  # fmt: skip
    scores = scored(full=0.6, few=[0.1] * 6, fewer=[0.2] * 2, same=[0.3] * 6, none=[])
    compared = paper.compare(paper.published("sub_optimal"), paper.own_scores(runs, scores, VIEW))
    assert [(len(one.games), one.own) for one in compared] == [
        (40, ["Scaled QL, resnet101, here"]),
        (6, ["Scaled QL, nature, here", "Scaled QL, resnet34, here"]),
        (2, ["Scaled QL, resnet50, here"]),
    ]
    for one in compared:
        assert one.scores.groupby("system")["game"].agg(tuple).map(set).map(set(one.games).__eq__).all()
        assert set(paper.published("sub_optimal")["system"]) < set(one.scores["system"])
        assert list(paper.raw_scores(one.scores).columns)[-1] == "Human"
    theirs = rows_of(paper.aggregates(compared[1].scores, replicates=20), paper.SCALED_QL).set_index("statistic")
    six = rows_of(paper.published("sub_optimal"), paper.SCALED_QL).set_index("game").loc[list(TRAINING_GAMES[:6])]
    assert theirs.loc["median", "value"] == pytest.approx(six["human_normalized"].median())
    with pytest.raises(ValueError, match="same games"):
        paper.aggregates(pd.concat([one.scores for one in compared]))


def test_two_sets_of_games_of_one_size_have_two_titles() -> None:
    runs = gathered(a={}, b={"encoder": "nature"})
    scores = scored(a=[0.1] * 6, b=0.2)
    scores = scores[(scores["run"] == "a") | scores["game"].isin(TRAINING_GAMES[10:16])]
    titles = [one.title for one in paper.compare(paper.published("sub_optimal"), paper.own_scores(runs, scores, VIEW))]
    assert titles == ["all 40 games", "6 of 40 games", "6 of 40 games, set 2"]


@pytest.mark.parametrize("runs", [NO_RUNS, pd.DataFrame(columns=list(DEFAULTS)), gathered(a={"view": "another"})])
def test_without_a_run_the_paper_is_alone(runs: pd.DataFrame) -> None:
    assert paper.describe(runs, NO_SCORES, VIEW).empty
    own = paper.own_scores(runs, NO_SCORES, VIEW)
    (alone,) = paper.compare(paper.published("sub_optimal"), own)
    assert alone.own == []
    assert list(paper.raw_scores(alone.scores).columns) == [
        "DT (200M)", "DT (40M)", "BC (80M)", "MT Impala-DQN", "Scaled QL (80M)", "Human",
    ]  # fmt: skip
    assert plots.system_colors(own["system"]) == plots.SYSTEMS


def test_bars_show_the_table_and_a_system_has_one_colour() -> None:
    runs = gathered(full={})
    own = paper.own_scores(runs, scored(full=0.6), VIEW)
    colors = plots.system_colors(own["system"])
    (whole,) = paper.compare(paper.published("sub_optimal"), own)
    table = paper.with_printed(paper.aggregates(whole.scores, replicates=20), "sub_optimal")
    figure = plots.system_bars(table.assign(panel=table["statistic"]), colors)
    iqm = figure.axes[1]
    names = [label.get_text() for label in iqm.get_yticklabels()]
    assert names[-1] == "Scaled QL, resnet101, here" and paper.BEHAVIOUR not in names
    bars = dict(zip(names, iqm.containers[-1].patches))
    for name, bar in bars.items():
        assert to_hex(bar.get_facecolor()) == colors[name]
        assert bool(bar.get_hatch()) == (name not in plots.SYSTEMS)
    assert bars[paper.SCALED_QL].get_width() == pytest.approx(0.7757, abs=1e-3)
    assert [line.get_xdata()[0] for line in iqm.lines if list(line.get_xdata()) == [0.51, 0.51]] == [0.51]
    gain = pd.concat([paper.improvement(whole.scores, system) for system in (paper.SCALED_QL, *whole.own)])
    panel = plots.improvements(gain, colors).axes[0]
    assert panel.get_title().endswith("higher in 28 of 40 games")
    assert panel.get_yticklabels()[0].get_text() == "Atlantis"
    shades = [to_hex(bar.get_facecolor()) for bar in panel.patches]
    assert shades == [colors[paper.SCALED_QL]] * 28 + [colors[paper.DT]] * 12
    profile = paper.profiles(whole.scores, np.linspace(0, 2, 5), replicates=20)
    lines = {line.get_label(): line for line in plots.performance_profile(profile, colors).axes[0].lines}
    assert lines["Scaled QL, resnet101, here"].get_linestyle() == "--"
    np.testing.assert_allclose(lines["Scaled QL, resnet101, here"].get_ydata(), [1, 1, 0, 0, 0])
