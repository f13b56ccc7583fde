"""Statistics of all rewards for some methods: returns to the episode's end, and the scale of each game's rewards."""

import numpy as np

from scaled_ql.defaults import EXPERT_SHARE
from scaled_ql.replay.batch import Batch
from scaled_ql.replay.sequences import Sequences
from scaled_ql.replay.store import Replay


def returns_to_go(replay: Replay, game: str, discount: float = 0.99) -> np.ndarray:
    """The discounted sum of clipped rewards from each transition of a game to its episode's end, float32 [T].

    In a truncated episode the sum stops at the last recorded reward. T floats are kept in memory: 40 MB for 10 million.
    """
    from scipy.signal import lfilter  # as slow to import as jax, and rarely needed

    rewards = replay.rewards(game).clip(-1, 1).astype(np.float64)
    lengths = replay.episodes(game)["length"].to_numpy()
    parts = np.split(rewards, np.cumsum(lengths)[:-1])
    # G_t = r_t + discount G_{t+1} is a first-order filter, run backwards.
    returns = [lfilter([1.0], [1.0, -discount], part[::-1])[::-1] for part in parts]
    return np.concatenate(returns).astype(np.float32)


def label_with_returns(batch: Batch | Sequences, index: np.ndarray, returns: list[np.ndarray]) -> Batch | Sequences:
    """Transitions whose `reward` is the return to go, or windows with their `return_to_go`.

    Args:
        batch: transitions, or windows that end with them.
        index: int [B], their time indices, from `sample_indices`.
        returns: `returns_to_go` of each game, in the order of `Replay.games`; for windows undiscounted.
    """
    labels = [returns[game][time] for game, time in zip(batch.game.tolist(), index.tolist())]
    if isinstance(batch, Batch):
        return batch._replace(reward=np.array(labels, np.float32))
    before = np.zeros(batch.reward.shape)  # rewards from a step to the one before the last
    before[:, :-1] = np.cumsum(batch.reward[:, -2::-1], axis=1, dtype=np.float64)[:, ::-1]
    return batch._replace(return_to_go=(before + np.array(labels)[:, None]).astype(np.float32))


def expert_returns(replay: Replay, low: int, high: int, share: float = EXPERT_SHARE) -> np.ndarray:
    """How much likelier each return to go is among each game's best episodes than in all its data, as logits.

    log p(R | expert) - log p(R), which is log p(expert | R) up to a constant: -inf of returns that no expert has. An
    expert plays a game's best episodes; both distributions are over steps. It takes the place of kappa R in
    `methods.decision_transformer.expert_return_logits`, as in MTRO (Tatematsu & Wachi, 2025), which derives the
    distribution of an expert's returns from offline data. Who counts as an expert is a guess, and MTRO's other half,
    which adjusts the network's predictions by their accuracy, is not here.

    Args:
        replay: an open dataset.
        low, high: returns with a token, each integer between; others count as the nearest.
        share: of a game's episodes, by their undiscounted sum of clipped rewards; at least one, and all that equal the
            last of them.

    Returns:
        float32 [games, high - low + 1].
    """
    rows = []
    for game in replay.games:
        returns, lengths = returns_to_go(replay, game, 1.0), replay.episodes(game)["length"].to_numpy()
        whole = returns[np.cumsum(lengths) - lengths]
        worst = np.sort(whole)[-max(1, int(np.ceil(share * len(whole))))]
        token = np.clip(np.round(returns) - low, 0, high - low).astype(int)
        counts = [np.bincount(x, minlength=high - low + 1) for x in (token[np.repeat(whole >= worst, lengths)], token)]
        with np.errstate(divide="ignore"):
            expert, everyone = (np.log(count / count.sum()) for count in counts)
        rows.append(np.where(counts[0], expert - np.where(counts[0], everyone, 0), -np.inf))
    return np.array(rows, np.float32)


def reward_scales(replay: Replay) -> np.ndarray:
    """The standard deviation of each game's clipped rewards, float32 [games]; 1 where they never change.

    Dividing by it standardises rewards across tasks (Kurin et al., 2022; section 5.3 uses it with the MSE loss).
    """
    deviations = np.array([replay.rewards(game).clip(-1, 1).std(dtype=np.float64) for game in replay.games])
    return np.where(deviations > 0, deviations, 1).astype(np.float32)
