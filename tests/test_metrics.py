"""Aggregates and intervals against values recorded from rliable 1.2.0, and the paper's own raw scores."""

from importlib import resources

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from scaled_ql import metrics

STEPS = np.arange(1, 31, dtype=float)
SCORES = (np.sin(STEPS) * 1.3 + 0.4 * np.cos(3 * STEPS) + 0.7).reshape(5, 6)
OTHERS = (np.cos(2 * STEPS) + 0.5).reshape(5, 6)
AGGREGATES = (metrics.mean, metrics.median, metrics.iqm, metrics.optimality_gap)
# rliable 1.2.0 on the same arrays: aggregates, then its bootstrap of 50,000 replicates.
RECORDED = (0.7029043422256347, 0.7483852682826231, 0.6958307556578691, 0.5889222927454145)
RECORDED_ONE_RUN = (0.6645303516489477, 0.5599452206814926, 0.6428760156414406, 0.6128146568749888)
RECORDED_LOW = (0.549919640096189, 0.5728274013791451, 0.5371880150538327, 0.4784766192794936)
RECORDED_HIGH = (0.8546776922098777, 0.8953296824095109, 0.8600749664841577, 0.6931679884930639)
RECORDED_TASKS_LOW = (-0.09680210661501533, -0.3983891913064593, -0.2615921422948747, 0.14668492643950248)
RECORDED_TASKS_HIGH = (1.4615136392545551, 1.8320350255718099, 1.6149751535909485, 1.1631213202166966)
RECORDED_PROFILE = (1.0, 25 / 30, 22 / 30, 17 / 30, 13 / 30, 7 / 30, 4 / 30)


def test_no_score_follows_from_beginnings_of_games() -> None:
    """Pong: random -20.7, human 14.6. Cut off after 600 steps at 0 : 0 it would be 58.6%."""
    played = pd.DataFrame({"episode_return": [0.0, 0.0, -20.7, 14.6], "length": 600, "truncated": False})
    assert metrics.human_normalized_mean("Pong", played) == pytest.approx((-6.1 / 4 + 20.7) / 35.3)
    for cut, known in ((1, True), (2, True), (3, False), (4, False)):
        episodes = played.assign(truncated=[number < cut for number in range(4)])
        assert metrics.cut_short(episodes) == cut / 4
        assert np.isfinite(metrics.human_normalized_mean("Pong", episodes)) == known
    limit = played.assign(truncated=True, length=27_000)  # the published scores' own
    assert metrics.cut_short(limit) == 0 and np.isfinite(metrics.human_normalized_mean("Pong", limit))
    assert np.isnan(metrics.human_normalized_mean("Pong", played.head(0)))


def test_aggregates_are_rliables() -> None:
    assert [aggregate(SCORES) for aggregate in AGGREGATES] == pytest.approx(RECORDED, rel=1e-12)
    assert [aggregate(SCORES[0]) for aggregate in AGGREGATES] == pytest.approx(RECORDED_ONE_RUN, rel=1e-12)
    assert metrics.probability_of_improvement(SCORES, OTHERS) == pytest.approx(0.4933333333333334, rel=1e-12)
    assert metrics.profile(SCORES, np.linspace(-1, 2, 7)).tolist() == pytest.approx(RECORDED_PROFILE, rel=1e-12)


def test_intervals_are_rliables() -> None:
    """To what two bootstraps of 50,000 replicates differ by."""
    for over, scores, low, high, within in (
        ("runs", SCORES, RECORDED_LOW, RECORDED_HIGH, 0.01),
        ("tasks", SCORES[0], RECORDED_TASKS_LOW, RECORDED_TASKS_HIGH, 0.03),
    ):
        ours = [metrics.interval(scores, aggregate, over=over) for aggregate in AGGREGATES]
        assert [interval[0] for interval in ours] == pytest.approx(low, abs=within)
        assert [interval[1] for interval in ours] == pytest.approx(high, abs=within)
    low, high = metrics.interval(SCORES, lambda scores: metrics.profile(scores, np.array([0.0, 1.0])))
    assert low == pytest.approx([20 / 30, 10 / 30], abs=1 / 60) and high == pytest.approx(
        [25 / 30, 15 / 30], abs=1 / 60
    )


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 7)), elements=st.floats(-50, 50)))
def test_aggregates_are_what_they_are_called(scores: np.ndarray) -> None:
    assert metrics.iqm(scores) == pytest.approx(stats.trim_mean(scores, 0.25, axis=None), abs=1e-9)
    assert metrics.mean(scores) == pytest.approx(sum(map(sum, scores.tolist())) / scores.size, abs=1e-9)
    tasks = sorted(sum(column) / len(column) for column in scores.T.tolist())
    middle = (tasks[(len(tasks) - 1) // 2] + tasks[len(tasks) // 2]) / 2
    assert metrics.median(scores) == pytest.approx(middle, abs=1e-9)
    gaps = [max(1 - value, 0) for row in scores.tolist() for value in row]
    assert metrics.optimality_gap(scores) == pytest.approx(sum(gaps) / len(gaps), abs=1e-9)
    stack = np.stack([scores, 2 * scores, scores + 1])
    for aggregate in AGGREGATES:
        assert aggregate(stack) == pytest.approx([aggregate(one) for one in stack])


def test_improvement_by_hand() -> None:
    assert metrics.probability_of_improvement([[1.0, 5.0], [2.0, 5.0]], [[1.0, 6.0]]) == (0.75 + 0.0) / 2
    assert metrics.probability_of_improvement(SCORES, SCORES) == 0.5


def test_intervals_depend_on_the_seed_alone() -> None:
    assert metrics.interval(SCORES, metrics.iqm, 1_000, seed=1) == metrics.interval(SCORES, metrics.iqm, 1_000, seed=1)
    assert metrics.interval(SCORES, metrics.iqm, 1_000, seed=1) != metrics.interval(SCORES, metrics.iqm, 1_000, seed=2)
    large = np.tile(SCORES, (4, 20))  # several parts
    assert metrics.interval(large, metrics.mean, 3_000) == metrics.interval(large, metrics.mean, 3_000)


def test_an_interval_covers_as_often_as_it_says() -> None:
    """Means of 10 runs in 8 tasks, 200 experiments; a percentile bootstrap of 10 runs covers a little less."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = metrics.interval(rng.normal(size=(10, 8)), metrics.mean, 500, seed=seed)
        covered += low <= 0 <= high
    assert 0.86 <= covered / 200 <= 0.98


@pytest.mark.parametrize(
    ("scores", "arguments", "words"),
    [
        (SCORES[0], {}, "one run does not show"),
        ([[1.0, np.nan]], {"over": "tasks"}, "finite"),
        ([], {}, "finite"),
        (SCORES, {"over": "seeds"}, "runs or tasks"),
    ],
)
def test_bad_scores_are_named(scores: np.ndarray, arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        metrics.interval(scores, metrics.mean, 100, **arguments)


@pytest.mark.parametrize(
    ("dataset", "method", "iqm", "median"),
    [
        ("sub_optimal", "Scaled QL (80M)", 77.6, 57.5),
        ("sub_optimal", "DT (200M)", 29.3, 26.5),
        ("sub_optimal", "MT Impala-DQN", 61.8, 65.6),
        ("near_optimal", "Scaled QL (80M)", 113.6, 98.9),
        ("near_optimal", "DT (200M)", 111.3, 77.5),
    ],
)
def test_the_papers_raw_scores(dataset: str, method: str, iqm: float, median: float) -> None:
    """Tables C.1 and C.2, aggregated anew; the paper prints 77.8, 30.6, 114.1 and 111.8 for the IQMs."""
    table = pd.read_csv(resources.files("scaled_ql") / "data" / "paper_scores.csv")
    rows = table[(table["dataset"] == dataset) & (table["method"] == method)]
    scores = np.array([metrics.human_normalized(game, score) for game, score in zip(rows["game"], rows["score"])])
    assert len(scores) == 40
    assert 100 * metrics.iqm(scores) == pytest.approx(iqm, abs=0.1)
    assert 100 * metrics.median(scores) == pytest.approx(median, abs=0.1)


def test_dqn_normalised() -> None:
    assert metrics.dqn_normalized("Amidar", 5.8) == 0
    assert metrics.dqn_normalized("Amidar", 1207.74) == 1


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (7.5623, "7.562"),
        (471.93, "471.9"),
        (999.94, "999.9"),
        (999.96, "1,000"),
        (11_040.4, "11,040"),
        (-20, "-20"),
        (0, "0"),
    ],
)
def test_returns_are_written_without_exponents(value: float, words: str) -> None:
    assert metrics.digits(value) == words
