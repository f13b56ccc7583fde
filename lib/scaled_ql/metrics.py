"""Scores: normalisation by human play and aggregates over games."""

import numpy as np

from scaled_ql.games import reference_score


def human_normalized(game: str, score: float) -> float:
    """(score - random) / (human - random): 0 is a random player, 1 a human tester.

    Raises:
        UnknownGame: the game has no reference scores.
    """
    random, human = reference_score(game, "random"), reference_score(game, "human")
    return (score - random) / (human - random)


def iqm(scores: np.ndarray) -> float:
    """Interquartile mean over all entries: the mean of the middle half (Agarwal et al., 2021)."""
    from scipy import stats  # takes longer to import than all else here

    return float(stats.trim_mean(np.asarray(scores, np.float64), 0.25, axis=None))
