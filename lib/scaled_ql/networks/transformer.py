"""The multi-game decision transformer (Lee et al., 2022): frames, returns, actions and rewards as one sequence."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax import nnx

from scaled_ql.defaults import DROPOUT, GROUP_SIZE, RETURN_HIGH, RETURN_LOW, TRANSFORMERS
from scaled_ql.games import NUM_ACTIONS
from scaled_ql.networks.encoders import make_encoder
from scaled_ql.networks.parts import Dtype, TransformerBlock, run_block, squares_to_channels
from scaled_ql.networks.q_network import count_parameters, layers
from scaled_ql.networks.vit import PATCH

PATCHES = (84 // PATCH) ** 2  # of a frame
NUM_REWARDS = 4  # tokens: no reward, positive, end of the game, negative
normal = nnx.initializers.normal(0.02)
truncated = nnx.initializers.truncated_normal(0.02)


class Predictions(NamedTuple):
    """What follows each token: logits, float32.

    Attributes:
        returns: [B, T, returns], of a step's return to go, from its last patch; [B, T, 0] without return tokens.
        actions: [B, T, 18], from its return token, or from its last patch where there are none.
        rewards: [B, T, 4], from its action.
        features: [B, T, width], what actions are predicted from.
    """

    returns: jax.Array
    actions: jax.Array
    rewards: jax.Array
    features: jax.Array


def token_mask(length: int, has_returns: bool, patches: int = PATCHES) -> np.ndarray:
    """Which tokens a token sees, bool [tokens, tokens]: those before it and itself, and all patches of its own frame.

    A step is 36 or other `patches`, a return, an action, a reward. Of the returns only the first step's is seen: the
    others are not known in play.

    Args:
        length: steps, T.
        has_returns: whether there are return tokens.
        patches: tokens of a frame.
    """
    per_step = patches + 2 + has_returns
    step, place = np.divmod(np.arange(length * per_step), per_step)
    is_patch, is_return = place < patches, has_returns & (place == patches)
    causal = np.tril(np.ones((len(step), len(step)), bool))
    same_frame = (step[:, None] == step) & is_patch[:, None] & is_patch
    return (causal | same_frame) & ~(is_return & (step > 0))


class DecisionTransformer(nnx.Module):
    """A causal transformer over T steps of 36 patches, a return, an action and a reward each.

    It predicts a step's return from its frame, its action from the return, its reward from the action. All games share
    all of it: which game it is, only the frames tell. Without return tokens it is a cloning transformer. With an
    encoder as its tokenizer, the cells of its feature map stand in for patches of pixels: 9 of a ResNet, 36 of a ViT.
    """

    def __init__(
        self,
        num_layers: int,
        width: int,
        heads: int,
        *,
        length: int,
        num_returns: int,
        dropout: float,
        tokenizer: str,
        group_size: int,
        remat: bool,
        dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.length, self.num_returns, self.remat, self.dtype = length, num_returns, remat, dtype

        def table(rows: int, init: nnx.Initializer = truncated) -> nnx.Param:
            return nnx.Param(init(rngs.params(), (rows, width)))

        of_encoder = {"channels": 1, "group_size": group_size, "remat": remat, "dtype": dtype, "rngs": rngs}
        self.encoder = None if tokenizer == "patches" else make_encoder(tokenizer, **of_encoder)
        self.patches, features = PATCHES, PATCH * PATCH
        if self.encoder:
            *cells, features = jax.eval_shape(self.encoder, jax.ShapeDtypeStruct((1, 84, 84, 1), dtype)).shape[1:]
            self.patches = math.prod(cells)
        self.patch = nnx.Linear(features, width, kernel_init=truncated, dtype=dtype, rngs=rngs)
        self.patch_position = table(self.patches, normal)
        self.position = table(length * self.per_step)
        self.returns = table(num_returns) if num_returns else None
        self.actions, self.rewards = table(NUM_ACTIONS), table(NUM_REWARDS)
        self.dropout = nnx.Dropout(dropout)
        init = nnx.initializers.variance_scaling(2 / num_layers, "fan_in", "truncated_normal")
        how = {"kernel_init": init, "dropout": dropout, "dtype": dtype, "rngs": rngs}
        self.blocks = nnx.List(TransformerBlock(width, heads, **how) for _ in range(num_layers))
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.return_head = nnx.Linear(width, num_returns, rngs=rngs) if num_returns else None
        self.action_head = nnx.Linear(width, NUM_ACTIONS, rngs=rngs)
        self.reward_head = nnx.Linear(width, NUM_REWARDS, rngs=rngs)

    @property
    def per_step(self) -> int:
        """Tokens of a step."""
        return self.patches + 2 + bool(self.num_returns)

    @property
    def published(self) -> tuple[nnx.Module, ...]:
        """The parts whose parameters Lee et al. count: all."""
        return (self,)

    def __call__(
        self,
        frames: jax.Array,
        first_return: jax.Array | None,
        action: jax.Array,
        reward: jax.Array,
        key: jax.Array | None = None,
    ) -> Predictions:
        """Predict what follows each token, from those that it sees; see `token_mask`.

        Args:
            frames: uint8 [B, T, 84, 84], T at most the network's length.
            first_return: int32 [B], token of the first step's return; of the others none is seen. None without tokens.
            action: int32 [B, T], index in the full joystick.
            reward: int32 [B, T], token.
            key: of the dropout; None: nothing is dropped, as in play.
        """
        size, length = action.shape
        keys = (None,) * (len(self.blocks) + 1) if key is None else jax.random.split(key, len(self.blocks) + 1)
        x = self._embedded(frames, first_return, action, reward).reshape(size, length * self.per_step, -1)
        x = (x + self.position[...][: x.shape[1]]).astype(self.dtype)
        x = self.dropout(x, deterministic=key is None, rngs=keys[-1])
        mask = jnp.asarray(token_mask(length, bool(self.num_returns), self.patches))[None, None]
        for block, of_block in zip(self.blocks, keys):
            x = run_block(block, x, mask, of_block, remat=self.remat)
        x = self.norm(x).reshape(size, length, self.per_step, -1).astype(jnp.float32)  # so that logits are not rounded
        last = self.patches - 1
        returns = self.return_head(x[:, :, last]) if self.num_returns else jnp.zeros((size, length, 0))
        before_action = last + bool(self.num_returns)
        features, after_action = x[:, :, before_action], x[:, :, before_action + 1]
        return Predictions(returns, self.action_head(features), self.reward_head(after_action), features)

    def _embedded(
        self, frames: jax.Array, first_return: jax.Array | None, action: jax.Array, reward: jax.Array
    ) -> jax.Array:
        """The tokens, without their positions: [B, T, tokens of a step, width]."""
        size, length = action.shape
        images = frames.reshape(-1, 84, 84, 1).astype(self.dtype) / 255
        cells = self.encoder(images) if self.encoder else squares_to_channels(images, PATCH)
        patches = self.patch(cells.reshape(size, length, self.patches, -1))
        parts = [patches + self.patch_position[...].astype(self.dtype)]
        if self.num_returns:
            first = self.returns[...][first_return][:, None, None]
            parts.append(jnp.pad(first, ((0, 0), (0, length - 1), (0, 0), (0, 0))))
        parts += [self.actions[...][action][:, :, None], self.rewards[...][reward][:, :, None]]
        return jnp.concatenate([part.astype(jnp.float32) for part in parts], axis=2)


def make_decision_transformer(
    size: str = "40M",
    seed: int = 0,
    *,
    length: int = 4,
    num_returns: int = RETURN_HIGH - RETURN_LOW + 1,
    dropout: float = DROPOUT,
    tokenizer: str = "patches",
    group_size: int = GROUP_SIZE,
    remat: bool = False,
    dtype: str = "float32",
) -> DecisionTransformer:
    """Make a multi-game decision transformer (Lee et al., 2022; sizes of their Table 1 and section 4).

    Kernels of the blocks start with variance 2 / (layers x fan in), embeddings with standard deviation 0.02, as in
    their public code, which has 200M alone; width and depth of 40M are those whose 12 L d^2 is its name.

    Args:
        size: a key of `networks.TRANSFORMERS`; ``tiny`` is ours, for CPUs.
        seed: seed of the initial parameters.
        length: steps of a window, T.
        num_returns: number of return tokens; 0: there are none, and the network clones.
        dropout: share of the embeddings, and of the outputs of attention and MLP, that is dropped in training.
        tokenizer: what makes tokens of a frame: ``patches``, or a key of `networks.ENCODERS`, which sees one frame.
        group_size: of such an encoder; see `encoders.make_encoder`.
        remat: recompute each block in the backward pass; see `encoders.make_encoder`.
        dtype: dtype of the computation, ``float32`` or ``bfloat16``; parameters and logits are float32.

    Raises:
        ValueError: an unknown size or tokenizer, or `length` below 1.
    """
    if size not in TRANSFORMERS:
        raise ValueError(f"unknown transformer {size!r}; there are {', '.join(TRANSFORMERS)}.")
    if length < 1:
        raise ValueError(f"length must be at least 1 step, got {length}.")
    how = {"length": length, "num_returns": num_returns, "dropout": dropout, "remat": remat, "dtype": jnp.dtype(dtype)}
    how |= {"tokenizer": tokenizer, "group_size": group_size}
    return nnx.jit(lambda key: DecisionTransformer(*TRANSFORMERS[size], **how, rngs=nnx.Rngs(key)))(
        jax.random.key(seed)
    )


@layers.register
def _(network: DecisionTransformer) -> pd.DataFrame:
    width, tables = network.position.shape[-1], [network.actions, network.rewards, network.position]
    tables += [network.returns] if network.num_returns else []
    encoder = [part for part in (network.encoder, network.patch, [network.patch_position]) if part]
    heads = [head for head in (network.return_head, network.action_head, network.reward_head) if head]
    outputs = " + ".join(str(head.out_features) for head in heads)
    tokens = f"{network.length * network.per_step} × {width}"
    rows = [
        ("observation, pixels", f"{network.length} × 84 × 84", 0),
        ("encoder: patches", f"{network.length * network.patches} × {width}", encoder),
        ("tokens and positions", tokens, (tables,)),
        (f"{len(network.blocks)} blocks: attention, MLP", tokens, (network.blocks, network.norm)),
        ("heads", outputs, heads),
    ]
    named = [(layer, shape, count_parameters(*parts) if parts else 0) for layer, shape, parts in rows]
    return pd.DataFrame(named, columns=["layer", "output", "parameters"])
