"""Q-networks: image encoders of several families under the paper's trunk and per-game heads."""

from scaled_ql.defaults import ENCODERS
from scaled_ql.networks.encoders import make_encoder
from scaled_ql.networks.q_network import (
    BCQNetwork,
    QNetwork,
    count_parameters,
    layers,
    make_q_network,
    normalize_features,
)

__all__ = [
    "ENCODERS",
    "BCQNetwork",
    "QNetwork",
    "count_parameters",
    "layers",
    "make_encoder",
    "make_q_network",
    "normalize_features",
]
