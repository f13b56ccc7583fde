"""Q-networks: image encoders of several families under the paper's trunk and per-game heads."""

from scaled_ql.networks.encoders import ENCODERS, make_encoder
from scaled_ql.networks.q_network import BCQNetwork, QNetwork, count_parameters, make_q_network

__all__ = ["ENCODERS", "BCQNetwork", "QNetwork", "count_parameters", "make_encoder", "make_q_network"]
