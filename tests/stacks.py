"""Batches made by hand."""

import numpy as np

from scaled_ql.replay.batch import Batch
from scaled_ql.replay.sequences import Sequences


def batch_of_stacks(
    observation: np.ndarray,
    action: np.ndarray,
    reward: np.ndarray,
    discount: np.ndarray,
    next_observation: np.ndarray,
    game: np.ndarray,
) -> Batch:
    """A batch from two stacks of frames each, [B, H, W, S], that share nothing."""
    size, stack = observation.shape[0], observation.shape[-1]
    frames = np.concatenate([observation, next_observation], axis=-1).transpose(0, 3, 1, 2)
    next_stack = np.tile(np.arange(stack, 2 * stack, dtype=np.int32), (size, 1))
    return Batch(frames, next_stack, action, reward, discount, game)


def windows(size: int = 6, length: int = 2, seed: int = 0, games: int = 2) -> Sequences:
    """Random windows of steps; every second one begins with padding."""
    rng = np.random.default_rng(seed)
    mask = np.ones((size, length), bool)
    mask[::2, 0] = False
    return Sequences(
        frames=rng.integers(256, size=(size, length, 84, 84), dtype=np.uint8),
        action=np.where(mask, rng.integers(18, size=(size, length)), 0).astype(np.int32),
        reward=np.where(mask, rng.integers(-1, 2, size=(size, length)), 0).astype(np.float32),
        return_to_go=rng.integers(-5, 6, size=(size, length)).astype(np.float32),
        terminal=np.zeros((size, length), bool),
        mask=mask,
        game=(np.arange(size) % games).astype(np.int32),
    )
