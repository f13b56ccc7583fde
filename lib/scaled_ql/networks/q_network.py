"""The paper's multi-game Q-network (Figure 3, appendix B.1)."""

import functools
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax import nnx

from scaled_ql.defaults import GROUP_SIZE, HIDDEN_SIZES, NUM_ATOMS, Embedding, Head, Heads
from scaled_ql.games import NUM_ACTIONS
from scaled_ql.networks.encoders import make_encoder
from scaled_ql.networks.parts import Dtype, pixels
from scaled_ql.networks.vit import ViT

GAME_FEATURES = 32  # length of a game's embedding, where the head is shared


class SpatialEmbedding(nnx.Module):
    """Feature map [B, H, W, C] -> vector: where a feature is, not only that it is there.

    - ``pointwise``: times a learned [H, W, C], then flattened (appendix B.1; the paper's parameter counts agree).
    - ``sum``: times a learned [H, W, C, 8], summed over space: [B, 8 C] (as in PTR, Kumar et al., 2022).
    - ``attention``: 8 averages over space, weighted by a softmax of the features' products with 8 learned queries:
      [B, 8 C]. Not in the paper; with a ViT, values come from tokens that attention pools.
    - ``none``: mean over space (global pooling, the ablation of Table A.1).

    The pointwise embedding starts at ones, a plain flattening.
    """

    def __init__(self, kind: Embedding, height: int, width: int, channels: int, *, dtype: Dtype, rngs: nnx.Rngs):
        self.kind, self.dtype = kind, dtype
        if kind == "pointwise":
            self.kernel = nnx.Param(jnp.ones((height, width, channels)))
            self.features = height * width * channels
        elif kind == "sum":
            init = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=(0, 1), out_axis=3)
            self.kernel = nnx.Param(init(rngs.params(), (height, width, channels, 8)))
            self.features = channels * 8
        elif kind == "attention":
            init = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
            self.kernel = nnx.Param(init(rngs.params(), (channels, 8)))
            self.features = channels * 8
        elif kind == "none":
            self.features = channels
        else:
            raise ValueError(f"unknown embedding {kind!r}; there are pointwise, sum, attention, none.")

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, features]."""
        if self.kind == "none":
            return x.mean((1, 2))
        kernel = self.kernel[...].astype(self.dtype)
        if self.kind == "sum":
            return jnp.einsum("bhwc,hwcf->bcf", x, kernel).reshape(len(x), -1)
        if self.kind == "attention":
            places = x.reshape(len(x), -1, x.shape[-1])
            weights = jax.nn.softmax(jnp.einsum("bpc,cf->bpf", places, kernel).astype(jnp.float32), axis=1)
            return jnp.einsum("bpc,bpf->bcf", places, weights.astype(self.dtype)).reshape(len(x), -1)
        return (x * kernel).reshape(len(x), -1)


def normalize_features(x: jax.Array, epsilon: float = 1e-12) -> jax.Array:
    """x / ||x||_2 over the last axis, in float32; gradients pass through the norm; zeros stay zeros."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + epsilon)


class QNetwork(nnx.Module):
    """Encoder -> spatial embedding -> Dense, LayerNorm, ReLU -> Dense, ReLU ... -> feature normalisation -> heads.

    Every game has a separate linear head: 18 actions x atoms, of which a game's minimal set uses the first rows; the
    caller (`losses`), which knows the games, masks the others.

    With shared heads, all games have one, and a learned embedding of the game enters the first fully connected layer:
    32 numbers for each game, divided by their length, concatenated to the layer's input, as in BRC (Nauman et al.,
    2025, and their code). It is written as the sum of two products, each of which starts with variance 1 / fan in.
    BRC's critics are dense networks of states; that the embedding enters where ours becomes dense is a guess. A row of
    the head means another action in each game, the n-th of its minimal set, which only the embedding can tell.
    """

    def __init__(
        self,
        encoder: str,
        num_games: int,
        *,
        num_outputs: int,
        heads: Heads,
        hidden_sizes: tuple[int, ...],
        embedding: Embedding,
        normalize: bool,
        group_size: int,
        stack_size: int,
        mean_frames: jax.Array | None,
        head_bias: jax.Array | None,
        layer_norm: bool,
        attention_temperature: float,
        remat: bool,
        dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.num_outputs, self.normalize, self.dtype = num_outputs, normalize, dtype
        # A constant, kept among the parameters so that a checkpoint holds it; without a gradient Adam leaves it alone.
        self.mean_frames = None if mean_frames is None else nnx.Param(mean_frames)
        how = {"group_size": group_size, "remat": remat, "dtype": dtype}
        self.encoder = make_encoder(encoder, channels=stack_size, rngs=rngs, **how)
        if attention_temperature and not self.has_attention:
            raise ValueError(f"attention_temperature: encoder {encoder!r} has no attention; choose a ViT, or 0.")
        self.log_temperature = (
            nnx.Param(jnp.full(self.encoder.depth, math.log(attention_temperature))) if attention_temperature else None
        )
        image = jax.ShapeDtypeStruct((1, 84, 84, stack_size), dtype)
        _, height, width, channels = jax.eval_shape(self.encoder, image).shape
        self.embedding = SpatialEmbedding(embedding, height, width, channels, dtype=dtype, rngs=rngs)
        sizes = [self.embedding.features, *hidden_sizes]
        self.hidden = nnx.List(nnx.Linear(a, b, dtype=dtype, rngs=rngs) for a, b in pairwise(sizes))
        self.layer_norm = nnx.LayerNorm(hidden_sizes[0], dtype=dtype, rngs=rngs) if layer_norm else None
        width = NUM_ACTIONS * num_outputs
        init = nnx.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=0, out_axis=2, batch_axis=(1,)
        )
        num_heads = num_games if heads == "per_game" else 1
        # Features first: all heads together are then one matrix product, and nothing is transposed for it.
        self.head_kernel = nnx.Param(init(rngs.params(), (sizes[-1], num_heads, width)))
        bias = jnp.zeros(num_outputs) if head_bias is None else head_bias
        self.head_bias = nnx.Param(jnp.tile(bias, (num_heads, NUM_ACTIONS)))
        shared, how = heads == "shared", {"use_bias": False, "dtype": dtype, "rngs": rngs}
        self.game_embedding = nnx.Embed(num_games, GAME_FEATURES, rngs=rngs) if shared else None
        self.game_layer = nnx.Linear(GAME_FEATURES, hidden_sizes[0], **how) if shared else None

    @property
    def has_attention(self) -> bool:
        """Whether its encoder is a ViT."""
        return isinstance(self.encoder, ViT)

    @property
    def published(self) -> tuple[nnx.Module, ...]:
        """The parts whose parameters the paper counts."""
        return self.encoder, self.embedding, self.hidden[0]

    def features(
        self, observation: jax.Array, game: jax.Array, augment: Callable[[jax.Array], jax.Array] | None = None
    ) -> jax.Array:
        """The representation before the heads, [B, last hidden size].

        Args:
            observation: see `__call__`.
            game: see `__call__`.
            augment: augmentation of the images after the mean is subtracted, float [B, 84, 84, 4] -> the same shape.
        """
        return self._dense(self.embedded(observation, game, augment), game)

    def features_and_entropies(
        self, observation: jax.Array, game: jax.Array, augment: Callable[[jax.Array], jax.Array] | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """`features` where the encoder is a ViT, and how evenly each of its blocks attends: `ViT.with_entropies`."""
        features, entropies = self.encoder.with_entropies(self._images(observation, game, augment))
        return self._dense(self.embedding(features), game), entropies

    def _dense(self, x: jax.Array, game: jax.Array) -> jax.Array:
        for number, layer in enumerate(self.hidden):
            x = layer(x)
            if number == 0 and self.game_embedding:
                x += self.game_layer(normalize_features(self.game_embedding(game)))
            x = nnx.relu(self.layer_norm(x) if number == 0 and self.layer_norm else x)
        return normalize_features(x) if self.normalize else x

    def embedded(
        self, observation: jax.Array, game: jax.Array, augment: Callable[[jax.Array], jax.Array] | None = None
    ) -> jax.Array:
        """What encoder and spatial embedding make of observations, [B, features]; arguments as of `features`."""
        return self.embedding(self.encoder(self._images(observation, game, augment)))

    def _images(
        self, observation: jax.Array, game: jax.Array, augment: Callable[[jax.Array], jax.Array] | None
    ) -> jax.Array:
        x = pixels(observation, game, None if self.mean_frames is None else self.mean_frames[...], self.dtype)
        return augment(x) if augment else x

    def __call__(self, observation: jax.Array, game: jax.Array) -> jax.Array:
        """Logits float32 [B, 18, atoms], or values float32 [B, 18] where the head is ``mse``.

        Args:
            observation: uint8 [B, 84, 84, 4], oldest frame first.
            game: int32 [B], number of the game.
        """
        return self.heads(self.features(observation, game), game)

    def heads(self, features: jax.Array, game: jax.Array) -> jax.Array:
        """Outputs of `__call__` from a representation [B, last hidden size]."""
        x = features.astype(self.dtype)
        game = jnp.zeros_like(game) if self.game_embedding else game  # the number of the head
        kernel, bias = self.head_kernel[...].astype(self.dtype), self.head_bias[...]
        # All heads for all rows, then each row's own: far cheaper than gathering a kernel per row.
        # The product is not rounded to the computation's dtype: bfloat16 has 0.03 between values of 4 to 8.
        outputs = jnp.matmul(x, kernel.reshape(len(kernel), -1), preferred_element_type=jnp.float32)
        outputs = outputs.reshape(len(x), *bias.shape)
        outputs = jnp.take_along_axis(outputs, game[:, None, None], axis=1)[:, 0] + bias[game]
        shape = (NUM_ACTIONS,) if self.num_outputs == 1 else (NUM_ACTIONS, self.num_outputs)
        return outputs.reshape(len(outputs), *shape)


class BCQNetwork(nnx.Module):
    """A Q-network and a behaviour policy of the same architecture, with separate parameters (appendix A.2).

    Attributes:
        q: the Q-network.
        behaviour: previously trained policy, whose outputs [B, 18] are logits; `nnx.update` gives a network the
            parameters of a training state.
    """

    def __init__(self, q: QNetwork, behaviour: QNetwork):
        self.q, self.behaviour = q, behaviour


def make_q_network(
    encoder: str,
    num_games: int,
    head: Head = "c51",
    seed: int = 0,
    *,
    heads: Heads = "per_game",
    num_atoms: int = NUM_ATOMS,
    hidden_sizes: tuple[int, ...] = HIDDEN_SIZES,
    embedding: Embedding = "pointwise",
    normalize_features: bool = True,
    group_size: int = GROUP_SIZE,
    stack_size: int = 4,
    mean_frames: np.ndarray | None = None,
    head_bias: np.ndarray | None = None,
    layer_norm: bool = True,
    attention_temperature: float = 0.0,
    remat: bool = False,
    dtype: str = "float32",
) -> QNetwork:
    """Make a Q-network with the paper's defaults (appendix B.1).

    The paper does not give initial parameters. Here convolutions start as in He et al. (2015), fan out; dense layers
    and heads from a truncated normal of variance 1 / fan in; biases at 0.

    Args:
        encoder: a key of `networks.ENCODERS`.
        num_games: number of games.
        head: ``c51``, ``hl_gauss``, ``two_hot``: logits [B, 18, num_atoms]; ``mse``: values [B, 18].
        seed: seed of the initial parameters.
        heads: ``per_game``, or ``shared``: one head, and an embedding of the game; see `QNetwork`.
        num_atoms: atoms of a categorical head.
        hidden_sizes: sizes of the fully connected layers.
        embedding: ``pointwise``, ``sum``, ``attention`` or ``none``; see `SpatialEmbedding`.
        normalize_features: divide the representation by its L2 norm.
        group_size: channels per group of the ResNets' group normalisation.
        stack_size: frames in an observation.
        mean_frames: [num_games, 84, 84], subtracted from every frame (He et al., 2016, train on images "with the
            per-pixel mean subtracted"; the paper does not say). Most of a game's screen never changes, and without
            it a short training run sees little else.
        head_bias: [num_atoms], the logits that every action's distribution starts from, such as
            `losses.unit_normal_logits`; None: zeros, the uniform distribution. Ignored by ``mse``.
        layer_norm: layer normalisation after the first fully connected layer; online DQN has none (Mnih et al., 2015).
        attention_temperature: of a ViT, the temperature that each block's attention starts with, a multiplier of
            `losses.attention_loss`, whose logarithm is a parameter; 0: there are none.
        remat: recompute the encoder's blocks in the backward pass; see `make_encoder`.
        dtype: dtype of the computation, ``float32`` or ``bfloat16``; parameters and outputs are float32.

    Raises:
        ValueError: an unknown encoder, head, heads or embedding; a temperature for an encoder without attention.
    """
    for name, value, known in (("head", head, get_args(Head)), ("heads", heads, get_args(Heads))):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; there are {', '.join(known)}.")
    create = partial(
        QNetwork,
        encoder,
        num_games,
        num_outputs=1 if head == "mse" else num_atoms,
        heads=heads,
        hidden_sizes=tuple(hidden_sizes),
        embedding=embedding,
        normalize=normalize_features,
        group_size=group_size,
        stack_size=stack_size,
        layer_norm=layer_norm,
        attention_temperature=attention_temperature,
        remat=remat,
        dtype=jnp.dtype(dtype),
    )
    if head == "mse":
        head_bias = None
    # One compiled program draws all parameters: several times faster than layer by layer. Differences between
    # runs are arguments, so that one program serves all.
    draw = nnx.jit(lambda key, **arrays: create(**arrays, rngs=nnx.Rngs(key)))
    arrays = {"mean_frames": mean_frames, "head_bias": head_bias}
    return draw(jax.random.key(seed), **jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays))


def count_parameters(*modules: Any) -> int:
    """Total number of trained parameters in modules or trees of arrays; `mean_frames` are a constant."""
    trees = [nnx.state(module, nnx.Param) if isinstance(module, nnx.Module) else module for module in modules]
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    return sum(leaf.size for path, leaf in leaves if "mean_frames" not in jax.tree_util.keystr(path))


@functools.singledispatch
def layers(network: QNetwork, stack_size: int = 4) -> pd.DataFrame:
    """The parts of a network in their order, from the observation to the heads.

    Args:
        network: network to list.
        stack_size: frames in an observation.

    Returns:
        columns layer, output (shape for one observation, in words; for the heads that of one game's), parameters
        (trained; for the heads those of all games).
    """
    image = jax.ShapeDtypeStruct((1, 84, 84, stack_size), network.dtype)
    pixels = "pixels" if network.mean_frames is None else "pixels less their mean"
    encoder = (network.encoder,) if network.log_temperature is None else (network.encoder, network.log_temperature)
    rows = [
        (f"observation, {pixels}", image.shape[1:], ()),
        ("encoder", jax.eval_shape(network.encoder, image).shape[1:], encoder),
        (f"spatial embedding: {network.embedding.kind}", (network.embedding.features,), (network.embedding,)),
    ]
    for number, layer in enumerate(network.hidden):
        norm = (network.layer_norm,) if number == 0 and network.layer_norm else ()
        rows.append(("dense, layer norm, ReLU" if norm else "dense, ReLU", (layer.out_features,), (layer, *norm)))
    if network.game_embedding:
        rows.insert(
            3, ("game embedding, to the dense layer", (GAME_FEATURES,), (network.game_embedding, network.game_layer))
        )
    if network.normalize:
        rows.append(("feature normalisation", (network.hidden[-1].out_features,), ()))
    head = (NUM_ACTIONS,) if network.num_outputs == 1 else (NUM_ACTIONS, network.num_outputs)
    rows.append(("shared head" if network.game_embedding else "heads", head, (network.head_kernel, network.head_bias)))
    named = [(layer, " × ".join(map(str, shape)), count_parameters(*parts)) for layer, shape, parts in rows]
    return pd.DataFrame(named, columns=["layer", "output", "parameters"])
