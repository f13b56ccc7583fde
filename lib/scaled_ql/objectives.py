"""Objectives: what a method minimises over a batch, and the preferences by which its network then acts.

`losses` are of one transition; here they are put together and averaged. The methods:

- ``cql``: n-step TD error + alpha * CQL (equation 1), Scaled QL; alpha = 0 is plain Q-learning.
- ``bcq``: in place of CQL, a backup over only those actions that a behaviour policy finds likely, which was cloned
  before (appendix A.2). First `cloning` trains the policy as a network of its own; then `q_learning` with `tau` trains
  the Q-network of a `BCQNetwork`, whose policy `training.make_optimizer` freezes.
- ``bc``: behaviour cloning.
- ``return_bc``: behaviour cloning together with the returns, which acts as if it expected a high one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from scaled_ql import losses
from scaled_ql.games import NUM_ACTIONS
from scaled_ql.networks.q_network import Head
from scaled_ql.replay.batch import Batch

PyTree = Any
Metrics = dict[str, jax.Array]
Method = Literal["cql", "bcq", "bc", "return_bc"]
Rewards = Literal["real", "zero", "shuffled"]
Objective = Callable[[PyTree, PyTree, Batch, jax.Array], tuple[jax.Array, Metrics]]
Preferences = Callable[[PyTree, jax.Array, jax.Array], jax.Array]


def action_masks(num_actions: list[int]) -> jax.Array:
    """bool [games, 18]: which actions each game has, from the sizes of their minimal sets."""
    return jnp.arange(NUM_ACTIONS) < jnp.array(num_actions)[:, None]


def q_learning(
    graph: nnx.GraphDef,
    num_actions: list[int],
    *,
    head: Head = "c51",
    alpha: float | None = None,
    atoms: jax.Array | None = None,
    double_q: bool = False,
    tau: float | None = None,
    reward_scale: np.ndarray | None = None,
    dr3: float = 0.0,
    random_shift: int = 0,
) -> Objective:
    """The objective of Scaled QL and its variants: mean over the batch of TD error + alpha * CQL (equation 1).

    Args:
        graph: from `training.init_state`, of a `QNetwork`, or with `tau` of a `BCQNetwork`.
        num_actions: size of each game's minimal action set.
        head: ``c51``, ``hl_gauss``, ``two_hot`` or ``mse``: form of the value and its TD error.
        alpha: weight of the CQL regulariser; Table B.1: 0.05 for C51, 0.1 for MSE. None: 0.05, or with `tau` 0, for BCQ
            takes the place of CQL.
        atoms: the support [N] of a categorical head (default: `losses.support()`).
        double_q: the online network chooses the action that the target network values.
        tau: discrete BCQ's threshold (`losses.likely_actions`). The behaviour policy is used as it is and gets no
            gradient; Fujimoto et al. (2019), whom the paper follows otherwise, train it along with the Q-network and
            on the same features. None: no constraint.
        reward_scale: float32 [games], divides rewards (`replay.reward_scales`); None: rewards as they are.
        dr3: weight of `losses.dr3_penalty`.
        random_shift: pixels by which observations are shifted at most (`losses.shift_image`).

    Returns:
        (params, target_params, batch, key) -> (loss, metrics). Metrics are scalars `loss`, `td_loss`, `cql_loss`,
        `q_data` (mean Q of the data's actions), `q_greedy` (of the best actions), with a categorical head `entropy` (of
        the return distributions predicted for the data's actions, in nats), with `tau` `allowed_share` (of a game's
        actions, in the next states), with `dr3` `dr3_penalty`; and float32 [games] `td_loss_sum`,
        `td_loss_count`.
    """
    if alpha is None:
        alpha = 0.05 if tau is None else 0.0
    masks = action_masks(num_actions)
    atoms = losses.support() if atoms is None else atoms
    scale = jnp.ones(len(masks)) if reward_scale is None else jnp.asarray(reward_scale)
    td_loss = {
        "c51": partial(losses.c51_loss, atoms=atoms),
        "hl_gauss": partial(losses.histogram_loss, atoms=atoms, encode=losses.hl_gauss),
        "two_hot": partial(losses.histogram_loss, atoms=atoms, encode=losses.two_hot),
        "mse": losses.mse_loss,
    }[head]

    def to_q(outputs: jax.Array) -> jax.Array:
        return outputs if head == "mse" else losses.expected_q(outputs, atoms)

    def objective(params: PyTree, target_params: PyTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        network, target = (nnx.merge(graph, nnx.State(tree)) for tree in (params, target_params))
        now, then = shifts(key, len(batch.game), random_shift)
        mask = masks[batch.game]
        reward = batch.reward / scale[batch.game]
        allowed, extra, metrics = mask, 0.0, {}
        if tau is not None:
            behaviour, network, target = network.behaviour, network.q, target.q
            logits_tn = jax.lax.stop_gradient(outputs(behaviour, batch.next_observation, batch.game, then)[0])
            allowed = jax.vmap(partial(losses.likely_actions, tau=tau))(logits_tn, mask)
            metrics["allowed_share"] = (allowed.sum(-1) / mask.sum(-1)).mean()
        outputs_t, features_t = outputs(network, batch.observation, batch.game, now)
        target_tn, _ = outputs(target, batch.next_observation, batch.game, then)
        q, selector_q = to_q(outputs_t), to_q(target_tn)
        if double_q or dr3:
            online_tn, features_tn = outputs(network, batch.next_observation, batch.game, then)
        if double_q:
            selector_q = to_q(online_tn)
        if dr3:
            metrics["dr3_penalty"] = jax.vmap(losses.dr3_penalty)(features_t, features_tn).mean()
            extra += dr3 * metrics["dr3_penalty"]
        td = jax.vmap(td_loss)(outputs_t, batch.action, reward, batch.discount, target_tn, selector_q, allowed)
        cql = jax.vmap(losses.cql_loss)(q, batch.action, mask)
        total = td.mean() + alpha * cql.mean() + extra
        metrics |= {
            "loss": total,
            "td_loss": td.mean(),
            "cql_loss": cql.mean(),
            "q_data": jnp.take_along_axis(q, batch.action[:, None], axis=1).mean(),
            "q_greedy": jnp.where(mask, q, losses.MASKED).max(-1).mean(),
        }
        if head != "mse":
            taken = jnp.take_along_axis(outputs_t, batch.action[:, None, None], axis=1)[:, 0]
            metrics["entropy"] = jax.vmap(losses.entropy)(taken).mean()
        return total, metrics | by_game("td_loss", td, batch.game, len(masks))

    return objective


def cloning(
    graph: nnx.GraphDef,
    num_actions: list[int],
    *,
    returns: bool = False,
    atoms: jax.Array | None = None,
    random_shift: int = 0,
) -> Objective:
    """The objective of behaviour cloning: mean negative log-likelihood of the data's actions; no target network.

    Args:
        graph: from `training.init_state`, of a `QNetwork` whose head is ``mse`` (its 18 outputs are logits), or with
            `returns` a categorical one.
        num_actions: size of each game's minimal action set.
        returns: of actions and returns together (`losses.return_bc_loss`); a batch's `reward` is then the discounted
            return from that step on (`replay.label_with_returns`).
        atoms: the returns [N] that are told apart (default: `losses.support()`).
        random_shift: as in `q_learning`.

    Returns:
        as `q_learning`; metrics are scalars `loss`, `nll`, `accuracy` (how often the likeliest action is the data's),
        and float32 [games] `nll_sum`, `nll_count`.
    """
    masks = action_masks(num_actions)
    atoms = losses.support() if atoms is None else atoms

    def objective(params: PyTree, target_params: PyTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        del target_params
        network, mask = nnx.merge(graph, nnx.State(params)), masks[batch.game]
        logits, _ = outputs(network, batch.observation, batch.game, shifts(key, len(batch.game), random_shift)[0])
        if returns:
            nll = jax.vmap(partial(losses.return_bc_loss, atoms=atoms))(logits, batch.action, batch.reward, mask)
            logits = losses.expert_action_logits(logits, atoms, kappa=0.0)
        else:
            nll = jax.vmap(losses.bc_loss)(logits, batch.action, mask)
        likeliest = jax.vmap(losses.greedy_action)(logits, mask)
        metrics = {"loss": nll.mean(), "nll": nll.mean(), "accuracy": (likeliest == batch.action).mean()}
        return nll.mean(), metrics | by_game("nll", nll, batch.game, len(masks))

    return objective


def without_rewards(objective: Objective, rewards: Rewards) -> Objective:
    """The control of an experiment: an objective that minimises the same loss on rewards that say nothing.

    What it learns, it did not learn from rewards; frames, actions, discounts and terminations are untouched.

    Args:
        objective: of a method.
        rewards: ``zero``: every reward is 0; ``shuffled``: each transition has the reward of another one of its game in
            the batch, which keeps the rewards' distribution; ``real``: `objective` itself.
    """
    if rewards == "real":
        return objective

    def control(params: PyTree, target_params: PyTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        reward = jnp.zeros_like(batch.reward)
        if rewards == "shuffled":
            mixed = jnp.lexsort((jax.random.uniform(jax.random.fold_in(key, 1), reward.shape), batch.game))
            reward = reward.at[jnp.argsort(batch.game)].set(batch.reward[mixed])
        return objective(params, target_params, batch._replace(reward=reward), key)

    return control


def outputs(
    network: nnx.Module, observation: jax.Array, game: jax.Array, augment: Callable[[jax.Array], jax.Array] | None
) -> tuple[jax.Array, jax.Array]:
    """A network's outputs and the representation before its heads."""
    features = network.features(observation, game, augment)
    return network.heads(features, game), features.astype(jnp.float32)


def shifts(
    key: jax.Array, size: int, pixels: int
) -> tuple[Callable[[jax.Array], jax.Array] | None, Callable[[jax.Array], jax.Array] | None]:
    """Independent random shifts of a batch's two observations, or None where `pixels` is 0."""
    if not pixels:
        return None, None
    offsets = [losses.random_offsets(one, size, pixels) for one in jax.random.split(key)]
    return tuple(partial(jax.vmap(partial(losses.shift_image, pixels=pixels)), offset=offset) for offset in offsets)


def by_game(name: str, values: jax.Array, game: jax.Array, games: int) -> Metrics:
    """Sums and counts per game of values [B]."""
    return {
        f"{name}_sum": jax.ops.segment_sum(values, game, games),
        f"{name}_count": jax.ops.segment_sum(jnp.ones_like(values), game, games),
    }


def preferences(
    graph: nnx.GraphDef,
    num_actions: list[int],
    *,
    method: Method = "cql",
    head: Head = "c51",
    atoms: jax.Array | None = None,
    tau: float = 0.3,
    kappa: float = 1.0,
) -> Preferences:
    """The numbers whose largest a trained network's player chooses: values, or log-probabilities of a clone.

    Args:
        graph: as in the method's objective.
        num_actions: size of each game's minimal action set.
        method: of the training.
        head: of the Q-learning methods.
        atoms: the support (default: `losses.support()`).
        tau: of ``bcq``, whose unlikely actions have -inf.
        kappa: of ``return_bc``; see `losses.expert_action_logits`.

    Returns:
        jitted: (params, uint8 [B, 84, 84, 4], int32 [B] game) -> float32 [B, 18], -inf outside the game's set.
    """
    masks = action_masks(num_actions)
    atoms = losses.support() if atoms is None else atoms

    @jax.jit
    def prefer(params: PyTree, observation: jax.Array, game: jax.Array) -> jax.Array:
        network, mask = nnx.merge(graph, nnx.State(params)), masks[game]
        if method == "bc":
            values = network(observation, game)
        elif method == "return_bc":
            values = losses.expert_action_logits(network(observation, game), atoms, kappa)
        else:
            if method == "bcq":
                logits = network.behaviour(observation, game)
                mask = jax.vmap(partial(losses.likely_actions, tau=tau))(logits, mask)
                network = network.q
            values = network(observation, game)
            values = values if head == "mse" else losses.expected_q(values, atoms)
        return jnp.where(mask, values, -jnp.inf)

    return prefer
