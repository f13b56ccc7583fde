"""Batches made by hand."""

import numpy as np

from scaled_ql.replay.batch import Batch


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
