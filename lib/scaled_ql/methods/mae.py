"""Masked autoencoder (``mae``): a ViT learns to complete images, and is transferred (He et al., 2021; the paper's B.4).

Its encoder is trained on a quarter of the patches of each observation, and learns nothing of actions, rewards or games:
the network cannot play. `transfer` takes the encoder into a Q-network.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax import nnx

from scaled_ql import losses
from scaled_ql.methods import common
from scaled_ql.methods.common import Method, Metrics, Objective, PyTree
from scaled_ql.networks import count_parameters, layers, make_encoder
from scaled_ql.networks.parts import Dtype, TransformerBlock, channels_to_squares, pixels, run_blocks, xavier
from scaled_ql.networks.vit import PATCH, ViT, patches, sine_positions
from scaled_ql.replay.batch import Batch

HIDDEN = 0.75  # share of an observation's patches
METRICS = {"error": "error of the hidden patches", "error_of_means": "the same of the patches' own means"}


class MaskedAutoencoder(nnx.Module):
    """A ViT that sees some patches of an image, and a smaller transformer that paints the others from what it makes.

    The decoder of a ViT-Base is He et al.'s: width 512, 8 blocks, 16 heads. Other encoders have decoders of the same
    proportions: two thirds of their width and depth, heads of 32.
    """

    def __init__(
        self, encoder: str, *, stack_size: int, mean_frames: jax.Array | None, remat: bool, dtype: Dtype,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        self.remat = remat
        self.mean_frames = None if mean_frames is None else nnx.Param(mean_frames)
        self.encoder = make_encoder(encoder, channels=stack_size, remat=remat, dtype=dtype, rngs=rngs)
        if not isinstance(self.encoder, ViT):
            raise ValueError(f"a masked autoencoder's encoder must be a ViT, such as vit_base, got {encoder!r}.")
        heads = round(self.encoder.width / 48)
        self.width = 32 * heads
        linear = partial(nnx.Linear, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.narrowing = linear(self.encoder.width, self.width)
        self.mask_token = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (self.width,)))
        depth = round(2 / 3 * self.encoder.depth)
        self.blocks = nnx.Sequential(
            *(TransformerBlock(self.width, heads, dtype=dtype, rngs=rngs) for _ in range(depth))
        )
        self.norm = nnx.LayerNorm(self.width, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.painting = linear(self.width, PATCH**2 * stack_size)

    @property
    def published(self) -> tuple[nnx.Module, ...]:
        """The part that is transferred: its parameters are those that are comparable with a Q-network's."""
        return (self.encoder,)

    def images(self, observation: jax.Array, game: jax.Array) -> jax.Array:
        """Observations uint8 [B, 84, 84, C] as the Q-network's encoder will see them, but float32."""
        return pixels(observation, game, None if self.mean_frames is None else self.mean_frames[...], jnp.float32)

    def __call__(self, images: jax.Array, visible: jax.Array) -> jax.Array:
        """Paint all patches of images of which some are seen.

        Args:
            images: float [B, H, W, C].
            visible: int32 [B, K], the patches that the encoder sees; see `visible_patches`.

        Returns:
            float32 [B, N, 196 C], patches less their mean and divided by their standard deviation.
        """
        tokens = jnp.take_along_axis(self.encoder.tokens(images), visible[..., None], axis=1)
        seen = self.narrowing(self.encoder.encode(tokens))
        positions = sine_positions(images.shape[1] // PATCH, images.shape[2] // PATCH, self.width)
        whole = jnp.broadcast_to(self.mask_token[...].astype(seen.dtype), (len(images), *positions.shape))
        whole = whole.at[jnp.arange(len(images))[:, None], visible].set(seen[:, 1:]) + positions.astype(seen.dtype)
        tokens = run_blocks(self.blocks, jnp.concatenate([seen[:, :1], whole], axis=1), self.remat)
        return self.painting(self.norm(tokens[:, 1:])).astype(jnp.float32)


def visible_patches(key: jax.Array, images: int, patches: int) -> jax.Array:
    """Draw the quarter of each image's patches that stays visible, without replacement: int32 [images, patches / 4]."""
    order = jnp.argsort(jax.random.uniform(key, (images, patches)), axis=1)
    return order[:, : round((1 - HIDDEN) * patches)]


def is_hidden(visible: jax.Array, patches: int) -> jax.Array:
    """From the numbers of visible patches, int32 [B, K], which patches are hidden: bool [B, patches]."""
    return (visible[:, :, None] != jnp.arange(patches)).all(1)


def mae(*, random_shift: int = 0) -> Method:
    """Masked autoencoder: the mean error of an observation's hidden patches (`losses.masked_patch_loss`).

    Args:
        random_shift: as in `q_learning.q_learning`.

    Returns:
        a method with the metrics `loss`, `error`, `error_of_means` (of a painter that knows nothing but each patch's
        mean, at most 1), and float32 [games] `error_sum`, `error_count`. Its network cannot play.
    """

    def objective(graph: nnx.GraphDef, num_actions: list[int], reward_scale: np.ndarray | None = None) -> Objective:
        del reward_scale

        def minimise(params: PyTree, target_params: PyTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
            del target_params
            network, size = nnx.merge(graph, nnx.State(params)), len(batch.game)
            augment, _ = common.shifts(jax.random.fold_in(key, 1), size, random_shift)
            images = network.images(batch.observation, batch.game)
            images = augment(images) if augment else images
            targets = patches(images)
            visible = visible_patches(key, size, targets.shape[1])
            mask = is_hidden(visible, targets.shape[1])
            error = jax.vmap(losses.masked_patch_loss)(network(images, visible), targets, mask)
            of_means = jax.vmap(losses.masked_patch_loss)(jnp.zeros_like(targets), targets, mask)
            metrics = {"loss": error.mean(), "error": error.mean(), "error_of_means": of_means.mean()}
            return error.mean(), metrics | common.by_game("error", error, batch.game, len(num_actions))

        return minimise

    return Method(
        minimises=r"$\frac{1}{196\,C} \lVert \hat x_p - (x_p - \mu_p) / \sigma_p \rVert^2$ over hidden patches $p$",
        build=_build,
        objective=objective,
        preferences=None,
        metrics=METRICS,
        pictures=_pictures,
    )


def _build(
    encoder: str,
    num_games: int,
    seed: int = 0,
    *,
    stack_size: int = 4,
    mean_frames: np.ndarray | None = None,
    remat: bool = False,
    dtype: str = "float32",
    **of_the_q_network: Any,
) -> nnx.Module:
    """`Method.build`; the rest of the architecture is that of the Q-network that will have the encoder."""
    del num_games, of_the_q_network
    how = {"stack_size": stack_size, "remat": remat, "dtype": jnp.dtype(dtype)}
    # One compiled program draws all parameters, as in `networks.make_q_network`.
    draw = nnx.jit(
        lambda key, mean_frames: MaskedAutoencoder(encoder, mean_frames=mean_frames, rngs=nnx.Rngs(key), **how)
    )
    return draw(jax.random.key(seed), None if mean_frames is None else jnp.asarray(mean_frames, jnp.float32))


@layers.register
def _(network: MaskedAutoencoder, stack_size: int = 4) -> pd.DataFrame:
    number, size = (84 // PATCH) ** 2, PATCH**2 * stack_size
    seen = round((1 - HIDDEN) * number)
    decoder = network.narrowing, network.mask_token, network.blocks, network.norm
    rows = [
        ("observation", (84, 84, stack_size), ()),
        ("patches, the visible ones", (seen, size), ()),
        ("encoder, with a class token", (1 + seen, network.encoder.width), (network.encoder,)),
        ("decoder", (number, network.width), decoder),
        ("pixels", (number - seen, size), (network.painting,)),
    ]
    named = [(layer, " × ".join(map(str, shape)), count_parameters(*parts)) for layer, shape, parts in rows]
    return pd.DataFrame(named, columns=["layer", "output", "parameters"])


def _pictures(graph: nnx.GraphDef) -> Callable[[PyTree, Batch, jax.Array], dict[str, jax.Array]]:
    @jax.jit
    def paint(params: PyTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, ...]:
        network = nnx.merge(graph, nnx.State(params))
        images = network.images(batch.observation, batch.game)
        original, (size, height, width, _) = patches(images), images.shape
        visible = visible_patches(key, size, original.shape[1])
        mean, deviation = losses.patch_statistics(original)
        painted = network(images, visible) * deviation + mean

        def newest(cut: jax.Array) -> jax.Array:
            """The newest frame of patches [B, N, 196 C]: [B, 84, 84]."""
            return channels_to_squares(cut.reshape(size, height // PATCH, width // PATCH, -1), PATCH)[..., -1]

        frame = batch.observation[..., -1].astype(jnp.float32)
        unseen = newest(jnp.broadcast_to(is_hidden(visible, original.shape[1])[..., None], original.shape))
        completed = jnp.clip(frame + 255 * newest(painted - original), 0, 255)  # mean frames cancel
        return jnp.where(unseen, 128, frame), jnp.where(unseen, completed, frame), frame

    titles = ("what it sees", "what it makes of that", "the frame")  # JAX would sort them
    return lambda *inputs: dict(zip(titles, paint(*inputs)))
