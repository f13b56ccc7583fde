"""Replay: stores of whole episodes on disk, and reproducible batches from them."""

from scaled_ql.replay.sampling import mean_frames, prefetch, sample_batch, sample_indices
from scaled_ql.replay.store import Batch, Replay, ReplayError, ReplayWriter, open_replay

__all__ = [
    "Batch",
    "Replay",
    "ReplayError",
    "ReplayWriter",
    "mean_frames",
    "open_replay",
    "prefetch",
    "sample_batch",
    "sample_indices",
]
