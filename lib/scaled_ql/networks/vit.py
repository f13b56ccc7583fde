"""Vision transformer (Dosovitskiy et al., 2021), as He et al. (2021) pre-train it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from scaled_ql.networks.parts import Dtype, TransformerBlock, run_block, run_blocks, squares_to_channels, xavier

PATCH = 14  # pixels; the 16 of the literature do not divide 84


def patches(x: jax.Array) -> jax.Array:
    """Cut images into squares of 14 x 14 pixels, row by row: [B, H, W, C] -> [B, H W / 196, 196 C].

    Raises:
        ValueError: squares do not divide the image.
    """
    if x.shape[1] % PATCH or x.shape[2] % PATCH:
        raise ValueError(
            f"images of {x.shape[1]} x {x.shape[2]} pixels cannot be cut into patches of {PATCH} x {PATCH}; resize "
            "them to a multiple, such as 84 x 84."
        )
    x = squares_to_channels(x, PATCH)
    return x.reshape(len(x), -1, x.shape[-1])


@functools.cache
def sine_positions(height: int, width: int, features: int) -> np.ndarray:
    """Positions in a grid, float32 [height * width, features], row by row: fixed, never learned.

    A quarter of the features each are sine and cosine of the row, then of the column, times frequencies that fall
    geometrically from 1 to 1 / 10,000 (Vaswani et al., 2017, in two dimensions).
    """
    frequencies = 10_000.0 ** -(np.arange(features // 4) / (features // 4))
    rows, columns = (axis.reshape(-1, 1) * frequencies for axis in np.indices((height, width)))
    parts = [function(angle) for angle in (rows, columns) for function in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


class ViT(nnx.Module):
    """Patches of a frame stack -> transformer -> one feature vector per patch, a feature map of 6 x 6.

    A class token goes along, as in the pre-training of He et al. (2021); it is not part of the feature map. The
    features are what the final layer normalisation makes of them: of both signs, unlike those of the other encoders.
    """

    def __init__(
        self, width: int, depth: int, heads: int, *, channels: int, group_size: int, remat: bool, dtype: Dtype,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        del group_size  # the family has no group normalisation
        self.width, self.depth, self.remat, self.dtype = width, depth, remat, dtype
        self.patch = nnx.Linear(PATCH**2 * channels, width, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.class_token = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (width,)))
        self.blocks = nnx.Sequential(*(TransformerBlock(width, heads, dtype=dtype, rngs=rngs) for _ in range(depth)))
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H / 14, W / 14, width]."""
        return self._as_map(self.encode(self.tokens(x)), x)

    def with_entropies(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The feature map, and how evenly each block's tokens attend (`TransformerBlock.with_entropy`), [B, blocks]."""
        tokens, entropies = self._with_class_token(self.tokens(x)), []
        for block in self.blocks.layers:
            tokens, entropy = run_block(block, tokens, remat=self.remat, call=TransformerBlock.with_entropy)
            entropies.append(entropy)
        return self._as_map(self.norm(tokens), x), jnp.stack(entropies, axis=1)

    def tokens(self, x: jax.Array) -> jax.Array:
        """Embedded patches with their positions, [B, H, W, C] -> [B, H W / 196, width]."""
        positions = sine_positions(x.shape[1] // PATCH, x.shape[2] // PATCH, self.width)
        return self.patch(patches(x)) + positions.astype(self.dtype)

    def encode(self, tokens: jax.Array) -> jax.Array:
        """The class token and any tokens through the transformer, [B, T, width] -> [B, 1 + T, width]."""
        return self.norm(run_blocks(self.blocks, self._with_class_token(tokens), self.remat))

    def _with_class_token(self, tokens: jax.Array) -> jax.Array:
        first = jnp.broadcast_to(self.class_token[...].astype(tokens.dtype), (len(tokens), 1, self.width))
        return jnp.concatenate([first, tokens], axis=1)

    def _as_map(self, tokens: jax.Array, x: jax.Array) -> jax.Array:
        """The tokens of images x without the class token, [B, H / 14, W / 14, width]."""
        return tokens[:, 1:].reshape(len(x), x.shape[1] // PATCH, x.shape[2] // PATCH, self.width)
