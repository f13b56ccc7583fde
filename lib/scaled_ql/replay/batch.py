"""Training batches: transitions with n-step returns, as one tree of arrays."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """B transitions with n-step returns (a pytree: NumPy arrays as read, JAX arrays inside a program).

    The two frame stacks of a transition overlap, so each frame is stored, and sent to an accelerator, once;
    `observation` and `next_observation` are cut from `frames` on use.

    Attributes:
        frames: uint8 [B, S + n, 84, 84], t - S + 1 .. t + n, oldest first; those before the episode's start, and after
            the last that `next_observation` shows, are zero.
        next_stack: int32 [B, S], which of these make `next_observation`.
        action: int32 [B], index in the game's minimal action set.
        reward: float32 [B], sum over k < n of discount^k r_{t+k}, cut at the episode's end.
        discount: float32 [B], discount^n, or 0 where the episode terminated within the n steps.
        game: int32 [B], index into the replay's `games`.
    """

    frames: np.ndarray
    next_stack: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    discount: np.ndarray
    game: np.ndarray

    @property
    def observation(self) -> np.ndarray:
        """uint8 [B, 84, 84, S], the stack at t, oldest frame first."""
        return self.frames[:, : self.next_stack.shape[1]].transpose(0, 2, 3, 1)

    @property
    def next_observation(self) -> np.ndarray:
        """uint8 [B, 84, 84, S], the stack at t + n; where `discount` is 0, the episode's last one."""
        rows = np.arange(len(self.next_stack))[:, None]
        return self.frames[rows, self.next_stack].transpose(0, 2, 3, 1)
