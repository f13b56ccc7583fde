"""Names to choose from, and defaults that several modules share: Table B.1's where the paper has a value.

Nothing is imported here, so that parameters are checked without JAX.
"""

from typing import Literal

NUM_ATOMS, V_MIN, V_MAX = 51, -20.0, 20.0  # categorical support (appendix B.2)
HIDDEN_SIZES = (2048, 1024, 1024, 1024)
GROUP_SIZE = 4  # channels per group of the ResNets' group normalisation
LEARNING_RATE, ADAM_EPSILON = 2e-4, 3.125e-4  # epsilon is not in the paper; see `training.make_optimizer`
TARGET_UPDATE_PERIOD = 2_000  # gradient steps
TAU, KAPPA = 0.3, 1.0  # for bcq; for return_bc
ATTENTION_ENTROPY = 0.7  # a guess: share of the maximum at which TQL's temperatures hold a ViT's attention

# name: (family, its arguments); built by `networks.encoders`
ENCODERS = {
    "resnet34": ("resnet_basic", (3, 4, 6, 3), 64),
    "resnet50": ("resnet_bottleneck", (3, 4, 6, 3), 64),
    "resnet101": ("resnet_bottleneck", (3, 4, 23, 3), 64),
    "resnet152": ("resnet_bottleneck", (3, 8, 36, 3), 64),
    "resnet_narrow8": ("resnet_basic", (1, 1, 1, 1), 8),  # a family for small data: each has four times the last one's
    "resnet_narrow": ("resnet_basic", (1, 1, 1, 1), 16),
    "resnet_narrow32": ("resnet_basic", (1, 1, 1, 1), 32),
    "resnet_narrow64": ("resnet_basic", (1, 1, 1, 1), 64),
    "impala_x1": ("impala", 1),
    "impala_x2": ("impala", 2),
    "impala_x4": ("impala", 4),
    "impala_x8": ("impala", 8),
    "impala_x16": ("impala", 16),
    "nature": ("nature",),
    "nature_narrow": ("nature_narrow",),
    "vit_narrow": ("vit", 96, 3, 3),  # width, blocks, attention heads
    "vit_tiny": ("vit", 192, 12, 3),
    "vit_small": ("vit", 384, 12, 6),
    "vit_base": ("vit", 768, 12, 12),
}

# name: (layers, width, heads); decision transformers, built by `networks.make_decision_transformer`
TRANSFORMERS = {"tiny": (2, 128, 2), "40M": (6, 768, 12), "200M": (10, 1280, 20)}
RETURN_LOW, RETURN_HIGH = -20, 99  # undiscounted returns with a token: 120, as in Lee et al. (2022)
DROPOUT = 0.1
RETURN_KAPPA = 10.0  # for the whole range of returns
RETURN_SAMPLES, RETURN_TEMPERATURE = 128, 0.75  # of the notebook that was published with their models
ACTION_PERCENTILE = 50.0  # likewise
EXPERT_SHARE = 0.1  # a guess: the best episodes of a game, whose returns are an expert's

# name: (module of `methods` with a function of that name, its parameters: the arguments, with `atoms` for v_min, v_max
# and num_atoms, and `rewards` if it uses them)
_Q_LEARNING = (
    "rewards", "head", "alpha", "atoms", "double_q", "scale_rewards", "dr3", "attention_temperature",
    "attention_entropy", "random_shift",
)  # fmt: skip
METHODS = {
    "cql": ("q_learning", _Q_LEARNING),
    "bcq": ("q_learning", (*_Q_LEARNING, "tau")),
    "bc": ("cloning", ("random_shift",)),
    "return_bc": ("cloning", ("rewards", "atoms", "kappa", "random_shift")),
    "dt": (
        "decision_transformer",
        ("rewards", "transformer", "sequence_length", "return_low", "return_high", "target_return", "return_kappa",
         "return_samples", "return_temperature", "action_percentile", "random_shift", "tokenizer"),
    ),
    "bc_transformer": ("decision_transformer", ("rewards", "transformer", "sequence_length", "random_shift")),
    "mae": ("mae", ("random_shift",)),
    "cpc": ("cpc", ("sequence_length", "random_shift")),
}  # fmt: skip

EVAL_EPSILON = 0.001  # share of random moves in evaluation (Table B.1)

Head = Literal["c51", "hl_gauss", "two_hot", "mse"]
Heads = Literal["per_game", "shared"]
Embedding = Literal["pointwise", "sum", "attention", "none"]
Rewards = Literal["real", "zero", "shuffled"]
Parts = Literal["encoder", "encoder + embedding", "all but the head", "all"]  # that are transferred
