"""Replay: stores of whole episodes on disk, and reproducible batches from them."""

from scaled_ql.replay.dqn_replay import import_dqn_replay
from scaled_ql.replay.export import export_dqn_replay
from scaled_ql.replay.format import ReplayError
from scaled_ql.replay.minari import import_minari
from scaled_ql.replay.returns import label_with_returns, returns_to_go, reward_scales
from scaled_ql.replay.rl_unplugged import import_rl_unplugged
from scaled_ql.replay.sampling import mean_frames, prefetch, sample_batch, sample_indices, share_of
from scaled_ql.replay.store import Batch, Replay, open_replay
from scaled_ql.replay.views import View, load_view
from scaled_ql.replay.workers import sample_batches
from scaled_ql.replay.writer import ReplayWriter

__all__ = [
    "Batch",
    "Replay",
    "ReplayError",
    "ReplayWriter",
    "View",
    "export_dqn_replay",
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
    "share_of",
]
