"""Replay: stores of whole episodes on disk, and reproducible batches from them."""

from importlib import import_module
from typing import Any

from scaled_ql.replay.batch import Batch
from scaled_ql.replay.format import ReplayError
from scaled_ql.replay.returns import expert_returns, label_with_returns, returns_to_go, reward_scales
from scaled_ql.replay.sampling import mean_frames, prefetch, sample_batch, sample_indices, share_of
from scaled_ql.replay.sequences import Sequences, gather_sequences, sample_sequences
from scaled_ql.replay.store import Replay, open_replay
from scaled_ql.replay.views import View, load_view
from scaled_ql.replay.workers import sample_batches
from scaled_ql.replay.writer import ReplayWriter

# Loaded on demand: their packages take twice as long to import as everything that reading needs.
FORMATS = {
    "export_dqn_replay": "export",
    "import_dqn_replay": "dqn_replay",
    "import_minari": "minari",
    "import_rl_unplugged": "rl_unplugged",
}

__all__ = [
    "Batch",
    "Replay",
    "ReplayError",
    "ReplayWriter",
    "Sequences",
    "View",
    "expert_returns",
    "export_dqn_replay",
    "gather_sequences",
    "import_dqn_replay",
    "import_minari",
    "import_rl_unplugged",
    "label_with_returns",
    "load_view",
    "mean_frames",
    "open_replay",
    "prefetch",
    "returns_to_go",
    "reward_scales",
    "sample_batch",
    "sample_batches",
    "sample_indices",
    "sample_sequences",
    "share_of",
]


def __getattr__(name: str) -> Any:
    if name not in FORMATS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.formats.{FORMATS[name]}"), name)
