"""Networks: image encoders of several families under the paper's trunk and heads; decision transformers."""

from scaled_ql.defaults import ENCODERS, TRANSFORMERS
from scaled_ql.networks.encoders import make_encoder
from scaled_ql.networks.q_network import (
    BCQNetwork,
    QNetwork,
    count_parameters,
    layers,
    make_q_network,
    normalize_features,
)
from scaled_ql.networks.transformer import DecisionTransformer, make_decision_transformer

__all__ = [
    "ENCODERS",
    "TRANSFORMERS",
    "BCQNetwork",
    "DecisionTransformer",
    "QNetwork",
    "count_parameters",
    "layers",
    "make_decision_transformer",
    "make_encoder",
    "make_q_network",
    "normalize_features",
]
