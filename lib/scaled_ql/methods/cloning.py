"""Behaviour cloning (``bc``), and cloning together with the returns (``return_bc``)."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from flax import nnx

from scaled_ql import losses
from scaled_ql.defaults import KAPPA
from scaled_ql.methods import common
from scaled_ql.methods.common import Method, Metrics, Objective, PyTree
from scaled_ql.replay.batch import Batch

METRICS = {"nll": "negative log-likelihood, nats", "accuracy": "data's action is the likeliest"}


def bc(*, random_shift: int = 0) -> Method:
    """Behaviour cloning: mean negative log-likelihood of the data's actions; no target network, no rewards.

    Args:
        random_shift: as in `q_learning.q_learning`.

    Returns:
        a method with the metrics `loss`, `nll`, `accuracy` (how often the likeliest action is the data's), and float32
        [games] `nll_sum`, `nll_count`. Its network's 18 outputs are logits.
    """

    def of_batch(logits: jax.Array, batch: Batch, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vmap(losses.bc_loss)(logits, batch.action, mask), logits

    return Method(
        minimises=r"$-\log \pi(a_\mathrm{data} \mid s)$",
        build=partial(common.build_network, head="mse"),
        objective=partial(_objective, of_batch, random_shift),
        preferences=partial(
            common.masked_preferences, lambda network, observation, game, mask: (network(observation, game), mask)
        ),
        metrics=METRICS,
        values="log π(a|s) + c",
        samples=True,  # the likeliest action of an unsure clone is arbitrary
    )


def return_bc(*, atoms: jax.Array | None = None, kappa: float = KAPPA, random_shift: int = 0) -> Method:
    """Cloning of actions and returns together; the policy then acts as if it expected a high return.

    Args:
        atoms: support [N] of the returns (default: `losses.support()`).
        kappa: inverse temperature of the expert's returns; see `losses.expert_action_logits`.
        random_shift: as in `q_learning.q_learning`.

    Returns:
        a method with the metrics of `bc`; its batches' rewards are discounted returns (`replay.label_with_returns`).
    """
    atoms = losses.support() if atoms is None else atoms

    def of_batch(logits: jax.Array, batch: Batch, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        nll = jax.vmap(partial(losses.return_bc_loss, atoms=atoms))(logits, batch.action, batch.reward, mask)
        return nll, losses.expert_action_logits(logits, atoms, kappa=0.0)

    def values(
        network: nnx.Module, observation: jax.Array, game: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return losses.expert_action_logits(network(observation, game), atoms, kappa), mask

    return Method(
        minimises=r"$-\log p(a_\mathrm{data}, R \mid s)$, $R$ the discounted return from $s$ on",
        build=partial(common.build_network, head="c51"),
        objective=partial(_objective, of_batch, random_shift),
        preferences=partial(common.masked_preferences, values),
        metrics=METRICS,
        batches="returns",
        values="log π(a|s, expert) + c",
    )


def _objective(
    of_batch: Callable[[jax.Array, Batch, jax.Array], tuple[jax.Array, jax.Array]],
    random_shift: int,
    graph: nnx.GraphDef,
    num_actions: list[int],
    reward_scale: np.ndarray | None = None,
) -> Objective:
    """Objective of a clone, from (outputs, batch, mask) -> (negative log-likelihoods [B], actions' logits [B, 18])."""
    del reward_scale
    masks = common.action_masks(num_actions)

    def minimise(params: PyTree, target_params: PyTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        del target_params
        network, mask = nnx.merge(graph, nnx.State(params)), masks[batch.game]
        augment, _ = common.shifts(key, len(batch.game), random_shift)
        nll, logits = of_batch(common.outputs(network, batch.observation, batch.game, augment)[0], batch, mask)
        likeliest = jax.vmap(losses.greedy_action)(logits, mask)
        metrics = {"loss": nll.mean(), "nll": nll.mean(), "accuracy": (likeliest == batch.action).mean()}
        return nll.mean(), metrics | common.by_game("nll", nll, batch.game, len(masks))

    return minimise
