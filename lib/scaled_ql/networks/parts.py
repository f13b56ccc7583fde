"""Parts that convolutional networks and transformers share, and the transformer's block."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Dtype = Any
xavier = nnx.initializers.xavier_uniform()


def pixels(observation: jax.Array, game: jax.Array, mean_frames: jax.Array | None, dtype: Dtype) -> jax.Array:
    """Observations as a network takes them: less their game's mean frame, if there is one, and divided by 255.

    Args:
        observation: uint8 [B, 84, 84, C].
        game: int32 [B].
        mean_frames: float32 [games, 84, 84], constants; None: nothing is subtracted.
        dtype: dtype of the result.
    """
    x = observation.astype(dtype)
    if mean_frames is not None:
        x -= jax.lax.stop_gradient(mean_frames)[game][..., None].astype(dtype)
    return x / 255


def squares_to_channels(x: jax.Array, side: int) -> jax.Array:
    """Put squares of side x side pixels in the channels: [B, H, W, C] -> [B, H / side, W / side, side^2 C]."""
    size, height, width, channels = x.shape
    x = x.reshape(size, height // side, side, width // side, side, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(size, height // side, width // side, side * side * channels)


def channels_to_squares(x: jax.Array, side: int) -> jax.Array:
    """Undo `squares_to_channels`: [B, H, W, side^2 C] -> [B, side H, side W, C]."""
    size, height, width, _ = x.shape
    x = x.reshape(size, height, width, side, side, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(size, height * side, width * side, -1)


def run_blocks(blocks: nnx.Sequential, x: jax.Array, remat: bool) -> jax.Array:
    """Run the blocks in order; with `remat` only the values between them are kept for the backward pass."""
    for block in blocks.layers:
        x = run_block(block, x, remat=remat)
    return x


def run_block(
    block: nnx.Module, *inputs: jax.Array | None, remat: bool, call: Callable = lambda block, *inputs: block(*inputs)
) -> Any:
    """Run a block, or another method of it (`call`); with `remat` only its inputs are kept for the backward pass."""
    if not remat:
        return call(block, *inputs)
    graph, variables = nnx.split(block)
    return jax.checkpoint(lambda variables, *inputs: call(nnx.merge(graph, variables), *inputs))(variables, *inputs)


class TransformerBlock(nnx.Module):
    """Self-attention and a GELU layer of four times the width, each normalised before and added to its input.

    Kernels start as Xavier's, uniform, in a ViT (He et al., 2021); biases at 0; GELU is the exact one.
    """

    def __init__(
        self, width: int, heads: int, *, kernel_init: nnx.Initializer = xavier,
        dropout: float = 0.0, dtype: Dtype, rngs: nnx.Rngs,
    ):  # fmt: skip
        if width % heads:
            raise ValueError(f"a width of {width} cannot be divided among {heads} attention heads.")
        self.heads, self.dropout = heads, nnx.Dropout(dropout)
        norm = partial(nnx.LayerNorm, width, epsilon=1e-6, dtype=dtype, rngs=rngs)
        linear = partial(nnx.Linear, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.norm1, self.attention, self.projection = norm(), linear(width, 3 * width), linear(width, width)
        self.norm2, self.expansion, self.contraction = norm(), linear(width, 4 * width), linear(4 * width, width)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None, key: jax.Array | None = None) -> jax.Array:
        """[B, T, width] -> the same shape.

        Args:
            x: tokens.
            mask: bool, broadcast to [B, heads, T, T]: whether a token (row) attends to another one (column); None:
                to all.
            key: of the dropout of attention's and the layer's outputs; None: nothing is dropped.
        """
        return self._transformed(x, self._queries_keys_values(x), mask, key)

    def with_entropy(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Without a mask: what `__call__` returns; and how evenly tokens attend to all, float32 [B], from 0 to 1.

        It is the entropy of the attention weights, a mean over heads and tokens, as a share of its maximum log T.
        """
        inputs = self._queries_keys_values(x)
        query, keys, _ = inputs
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, keys, preferred_element_type=jnp.float32)
        log_weights = jax.nn.log_softmax(scores / math.sqrt(query.shape[-1]))
        entropy = -(jnp.exp(log_weights) * log_weights).sum(-1).mean((1, 2)) / math.log(x.shape[1])
        return self._transformed(x, inputs, None, None), entropy

    def _queries_keys_values(self, x: jax.Array) -> list[jax.Array]:
        """[B, T, width] -> three of [B, T, heads, size of a head]."""
        return jnp.split(self.attention(self.norm1(x)).reshape(*x.shape[:2], 3 * self.heads, -1), 3, 2)

    def _transformed(
        self, x: jax.Array, inputs: list[jax.Array], mask: jax.Array | None, key: jax.Array | None
    ) -> jax.Array:
        first, second = (None, None) if key is None else jax.random.split(key)
        attended = jax.nn.dot_product_attention(*inputs, mask=mask)  # softmax in float32
        x = x + self._dropped(self.projection(attended.reshape(x.shape)), first)
        return x + self._dropped(self.contraction(nnx.gelu(self.expansion(self.norm2(x)), approximate=False)), second)

    def _dropped(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        return self.dropout(x, deterministic=key is None, rngs=key)
