"""Contrastive predictive coding (``cpc``): an encoder learns which frame follows which (van den Oord et al., 2018).

The paper takes its bar "CPC + DT" from Lee et al. (2022): a representation phi of single frames is trained so that
phi(o_t)' W phi(o_{t+1}) is larger for a frame's successor than for other frames, and a decision transformer is then
trained on it. Nothing is learned of actions, rewards or games: the network cannot play. `transfer` takes the encoder
into a decision transformer, which sees single frames, too; a Q-network, which sees four at a time, cannot have it.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax import nnx

from scaled_ql import losses
from scaled_ql.defaults import GROUP_SIZE
from scaled_ql.methods import common
from scaled_ql.methods.common import Method, Metrics, Objective, PyTree
from scaled_ql.networks import count_parameters, layers, make_encoder
from scaled_ql.networks.parts import Dtype
from scaled_ql.replay.sequences import Sequences

FEATURES = 256  # of phi; no source says how many
METRICS = {
    "nll": "negative log-likelihood, nats",
    "accuracy": "next frame is the likeliest",
    "chance": "the same by chance",
}


class ContrastivePredictor(nnx.Module):
    """An encoder of single frames, a projection of its feature map to a vector phi, and a bilinear form of two of them.

    The form begins with zeros: all frames are then equally likely. What phi is made of is normalised, so that the
    scores do not depend on the size of an encoder's features.
    """

    def __init__(self, encoder: str, *, group_size: int, remat: bool, dtype: Dtype, rngs: nnx.Rngs):
        how = {"group_size": group_size, "remat": remat, "dtype": dtype}
        self.dtype = dtype
        self.encoder = make_encoder(encoder, channels=1, rngs=rngs, **how)
        cells = jax.eval_shape(self.encoder, jax.ShapeDtypeStruct((1, 84, 84, 1), dtype)).shape[1:]
        self.projection = nnx.Linear(math.prod(cells), FEATURES, dtype=dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(FEATURES, rngs=rngs)
        self.bilinear = nnx.Linear(FEATURES, FEATURES, use_bias=False, kernel_init=nnx.initializers.zeros, rngs=rngs)

    @property
    def published(self) -> tuple[nnx.Module, ...]:
        """The part that is transferred."""
        return (self.encoder,)

    def __call__(self, frames: jax.Array) -> jax.Array:
        """phi of frames, uint8 [N, 84, 84, 1] -> float32 [N, 256]."""
        cells = self.encoder(frames.astype(self.dtype) / 255)
        return self.norm(self.projection(cells.reshape(len(cells), -1)).astype(jnp.float32))

    def scores(self, now: jax.Array, then: jax.Array) -> jax.Array:
        """How well each frame fits after each other one: phi [N, F], phi [M, F] -> float32 [N, M]."""
        return self.bilinear(now) @ then.T


def cpc(*, sequence_length: int = 4, random_shift: int = 0) -> Method:
    """Contrastive predictive coding: the mean over a batch's pairs of successive frames of `losses.info_nce`.

    A pair is two successive steps of a window, both of its episode: not padding, and nothing follows a terminal step.
    The candidates for a frame's successor are the second frames of all pairs of the batch: of the other windows,
    whatever their game, and of the other moments of its own window. Another pair's frame is wrong even where it looks
    like the right one, as when nothing moves: no encoder can then be certain. With `accumulate`, candidates are those
    of a part of the batch: another, easier task, and not the same result in less memory.

    Args:
        sequence_length: steps of a window, at least 2; more steps give more pairs, and more candidates of one game.
        random_shift: maximum shift of frames in pixels, of each one in another direction: a window's own would tell
            which frames are of one window. See `losses.shift_image`.

    Returns:
        a method with the metrics `loss`, `nll`, `accuracy` (how often the successor has the largest score; one of k
        that are equally large counts as 1 / k), `chance` (1 / candidates), and float32 [games] `nll_sum`, `nll_count`.
        Its network cannot play.

    Raises:
        ValueError: windows of a single step.
    """
    if sequence_length < 2:
        raise ValueError(f"sequence_length must be at least 2 steps, a frame and its successor, got {sequence_length}.")
    return Method(
        minimises=r"$-\phi_t^\top W \phi_{t+1} + \log \sum_j \exp(\phi_t^\top W \phi_j)$ over second frames $j$",
        build=_build,
        objective=partial(_objective, random_shift),
        preferences=None,
        metrics=METRICS,
        batches="sequences",
    )


def successors(mask: jax.Array, terminal: jax.Array) -> jax.Array:
    """Which steps of windows are followed by the next one in their episode: bool [B, T], bool [B, T] -> [B, T - 1]."""
    return mask[:, :-1] & mask[:, 1:] & ~terminal[:, :-1]


def _build(
    encoder: str, num_games: int, seed: int = 0, *,
    group_size: int = GROUP_SIZE, dtype: str = "float32", remat: bool = False, **of_q_networks: Any,
) -> nnx.Module:  # fmt: skip
    """`Method.build`; all games share all of it, and it has nothing else of a Q-network's architecture."""
    del num_games, of_q_networks
    how = {"group_size": group_size, "dtype": jnp.dtype(dtype), "remat": remat}
    # One compiled program draws all parameters, as in `networks.make_q_network`.
    return nnx.jit(lambda key: ContrastivePredictor(encoder, rngs=nnx.Rngs(key), **how))(jax.random.key(seed))


def _objective(
    random_shift: int, graph: nnx.GraphDef, num_actions: list[int], reward_scale: np.ndarray | None = None
) -> Objective:
    del reward_scale

    def minimise(params: PyTree, target_params: PyTree, batch: Sequences, key: jax.Array) -> tuple[jax.Array, Metrics]:
        del target_params
        network, (size, length) = nnx.merge(graph, nnx.State(params)), batch.mask.shape
        frames = batch.frames.reshape(size * length, 84, 84, 1)
        if augment := common.shifts(key, len(frames), random_shift)[0]:
            frames = augment(frames)
        phi = network(frames).reshape(size, length, -1)
        real = successors(batch.mask, batch.terminal).reshape(-1)
        scores = network.scores(*(x.reshape(len(real), -1) for x in (phi[:, :-1], phi[:, 1:])))
        nll = jax.vmap(losses.info_nce, (0, 0, None))(scores, jnp.arange(len(real)), real)
        offered = jnp.where(real, scores, losses.MASKED)
        best = offered.max(1, keepdims=True)
        right = (jnp.diagonal(scores) == best[:, 0]) / (offered == best).sum(1)
        number = jnp.maximum(real.sum(), 1)  # of a batch without a pair, all are 0
        means = {name: jnp.where(real, x, 0).sum() / number for name, x in (("nll", nll), ("accuracy", right))}
        game, games = jnp.repeat(batch.game, length - 1), len(num_actions)
        sums = {"nll_sum": jnp.where(real, nll, 0), "nll_count": real.astype(jnp.float32)}
        by_game = {name: jax.ops.segment_sum(x, game, games) for name, x in sums.items()}
        return means["nll"], {"loss": means["nll"], "chance": 1 / number} | means | by_game

    return minimise


@layers.register
def _(network: ContrastivePredictor) -> pd.DataFrame:
    image = jax.ShapeDtypeStruct((1, 84, 84, 1), network.dtype)
    cells = jax.eval_shape(network.encoder, image).shape[1:]
    rows = [
        ("observation, one frame", image.shape[1:], ()),
        ("encoder", cells, (network.encoder,)),
        ("projection, layer norm", (FEATURES,), (network.projection, network.norm)),
        ("bilinear form", (1,), (network.bilinear,)),
    ]
    named = [(layer, " × ".join(map(str, shape)), count_parameters(*parts)) for layer, shape, parts in rows]
    return pd.DataFrame(named, columns=["layer", "output", "parameters"])
