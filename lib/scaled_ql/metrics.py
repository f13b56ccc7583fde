"""Scores: normalisation by reference players, aggregates over runs and games, and their intervals.

Scores of several runs (seeds) in several tasks (games) are an array [runs, tasks]; for one run, [tasks] suffices. The
aggregates are those of Agarwal et al. (2021), "Deep RL at the edge of the statistical precipice". Each also takes a
stack of such arrays, [..., runs, tasks], and returns one number for each.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from scaled_ql.environments import MAX_STEPS
from scaled_ql.games import reference_score

Statistic = Callable[[np.ndarray], np.ndarray]
TOGETHER = 2_000_000  # scores resampled at once
MOSTLY = 0.5  # share of episodes; if more were cut short, their mean is not a score


def human_normalized(game: str, score: float) -> float:
    """(score - random) / (human - random): 0 is a random player, 1 a human tester.

    Raises:
        UnknownGame: the game has no reference scores.
    """
    return _relative_to("human", game, score)


def human_normalized_mean(game: str, episodes: pd.DataFrame) -> float:
    """`human_normalized` mean return of played or recorded episodes, where that is a score of the game.

    Args:
        game: name of the game.
        episodes: columns episode_return (raw), length (agent steps), truncated.

    Returns:
        a fraction; NaN without episodes, or if most were `cut_short`.

    Raises:
        UnknownGame: the game has no reference scores.
    """
    score = human_normalized(game, episodes["episode_return"].mean())
    return float("nan") if cut_short(episodes) > MOSTLY else score


def cut_short(episodes: pd.DataFrame) -> float:
    """Share of episodes that were truncated before the limit of the protocol, 27,000 steps (Table B.1).

    An episode that reached that limit counts as complete, as in the published scores.

    Args:
        episodes: columns length (agent steps), truncated.
    """
    return float((episodes["truncated"].astype(bool) & (episodes["length"] < MAX_STEPS)).mean())


def dqn_normalized(game: str, score: float) -> float:
    """(score - random) / (dqn - random): 1 is a DQN after 50M frames.

    Raises:
        UnknownGame: the game has no reference scores.
    """
    return _relative_to("dqn_50m", game, score)


def _relative_to(player: str, game: str, score: float) -> float:
    random, reference = reference_score(game, "random"), reference_score(game, player)
    return (score - random) / (reference - random)


def _runs_and_tasks(scores: np.ndarray) -> np.ndarray:
    """Scores as float64 [..., runs, tasks].

    Raises:
        ValueError: none, or non-finite scores.
    """
    scores = np.atleast_2d(np.asarray(scores, np.float64))
    if not scores.size or not np.isfinite(scores).all():
        raise ValueError(f"scores [runs, tasks] must be finite numbers, got {scores}; leave missing runs out")
    return scores


def digits(value: float) -> str:
    """A return, four digits and no exponent: 7.562, 471.9, 11,040."""
    return f"{value:,.0f}" if abs(value) >= 999.95 else f"{value:.4g}"


def mean(scores: np.ndarray) -> np.ndarray:
    """Mean over runs and tasks."""
    return _runs_and_tasks(scores).mean((-2, -1))[()]


def median(scores: np.ndarray) -> np.ndarray:
    """Median over tasks of the mean over runs."""
    return np.median(_runs_and_tasks(scores).mean(-2), axis=-1)[()]


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean: the mean of the middle half of all runs in all tasks."""
    scores = _runs_and_tasks(scores)
    values = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    cut = values.shape[-1] // 4
    return values[..., cut : values.shape[-1] - cut].mean(-1)[()]


def optimality_gap(scores: np.ndarray, target: float = 1.0) -> np.ndarray:
    """Mean shortfall below `target`; a score above it counts as `target`."""
    return (target - np.minimum(_runs_and_tasks(scores), target)).mean((-2, -1))[()]


def profile(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Performance profile: the fraction of runs in all tasks that score above each threshold, [..., thresholds]."""
    above = _runs_and_tasks(scores)[..., None] > np.asarray(thresholds)
    return above.mean((-3, -2))


def probability_of_improvement(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Probability that a run of the first method beats one of the second, ties counting half, averaged over tasks.

    Args:
        scores: [..., runs, tasks].
        others: [..., other runs, tasks], the same tasks.
    """
    first, second = _runs_and_tasks(scores)[..., :, None, :], _runs_and_tasks(others)[..., None, :, :]
    return ((first > second) + 0.5 * (first == second)).mean((-3, -2, -1))[()]


def interval(
    scores: np.ndarray,
    statistic: Statistic,
    replicates: int = 50_000,
    confidence: float = 0.95,
    seed: int = 0,
    over: Literal["runs", "tasks"] = "runs",
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of a statistic.

    Args:
        scores: [runs, tasks] or [tasks].
        statistic: one of this module's, or any that takes [..., runs, tasks].
        replicates: resampled data sets.
        confidence: confidence level.
        seed: bootstrap seed.
        over: ``"runs"`` resamples each task's runs (stratified): uncertainty for these tasks. ``"tasks"`` resamples
            tasks with all their runs: uncertainty for games like these, the only choice with one run; say so in the
            caption.

    Returns:
        (low, high), each of the statistic's shape.

    Raises:
        ValueError: one run and ``over="runs"``, whose interval would have zero width; non-finite scores.
    """
    scores = _runs_and_tasks(scores)
    if over not in ("runs", "tasks"):
        raise ValueError(f"over must be runs or tasks, got {over!r}")
    if over == "runs" and len(scores) < 2:
        raise ValueError("one run does not show the spread of runs; use over='tasks', and say so in the caption")
    part = max(1, TOGETHER // scores.size)
    samples = _resampled(scores, replicates, np.random.default_rng(seed), over, part)
    values = [statistic(sample) for sample in samples]
    return _percentiles(np.concatenate(values), confidence)


def difference_interval(
    scores: np.ndarray,
    others: np.ndarray,
    statistic: Statistic,
    replicates: int = 50_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """`interval` of statistic(scores) - statistic(others), resampling the runs of both methods."""
    pair = _runs_and_tasks(scores), _runs_and_tasks(others)
    if min(map(len, pair)) < 2:
        raise ValueError(f"one run does not show the spread of runs; need two each, got {[len(one) for one in pair]}")
    part = max(1, TOGETHER // max(one.size for one in pair))
    samples = [
        _resampled(one, replicates, rng, "runs", part) for one, rng in zip(pair, np.random.default_rng(seed).spawn(2))
    ]
    return _percentiles(np.concatenate([statistic(one) - statistic(other) for one, other in zip(*samples)]), confidence)


def contrast(
    weights: Sequence[float], samples: Sequence[np.ndarray], confidence: float = 0.95
) -> tuple[float, float, float]:
    """A weighted sum of means, and its t interval (Welch, 1947): variances may differ between samples.

    Args:
        weights: of the samples' means; 1 and -1 for the difference of two.
        samples: float [n] each; a single value counts as a known number.
        confidence: confidence level.

    Returns:
        (value, low, high); the three are equal where nothing varies.
    """
    from scipy import stats

    samples = [np.asarray(x, np.float64) for x in samples]
    value = float(sum(weight * x.mean() for weight, x in zip(weights, samples, strict=True)))
    parts = [(w**2 * x.var(ddof=1) / len(x), len(x) - 1) for w, x in zip(weights, samples) if len(x) > 1]
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return value, value, value
    freedom = total**2 / sum(variance**2 / degrees for variance, degrees in parts)
    half = float(stats.t.ppf((1 + confidence) / 2, freedom) * np.sqrt(total))
    return value, value - half, value + half


def _resampled(
    scores: np.ndarray, replicates: int, rng: np.random.Generator, over: str, part: int
) -> Iterator[np.ndarray]:
    """Bootstrap samples of [runs, tasks], [replicates, runs, tasks], `part` of them at a time."""
    runs, tasks = scores.shape
    for begin in range(0, replicates, part):
        count = min(part, replicates - begin)
        if over == "runs":
            drawn = rng.integers(runs, size=(count, runs, tasks), dtype=np.uint32)
            yield scores.ravel()[drawn * np.uint32(tasks) + np.arange(tasks, dtype=np.uint32)]
        else:
            drawn = rng.integers(tasks, size=(count, tasks))
            yield scores[:, drawn].swapaxes(0, 1)


def _percentiles(values: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(values, [tail, 100 - tail], axis=0)
    return low, high
