"""Offline Q-learning: Scaled QL (``cql``) and, for comparison, discrete batch-constrained Q-learning (``bcq``)."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from scaled_ql import losses
from scaled_ql.defaults import ATTENTION_ENTROPY, TAU, Head
from scaled_ql.methods import common
from scaled_ql.methods.cloning import bc
from scaled_ql.methods.common import Method, MethodError, Metrics, Objective, PyTree
from scaled_ql.networks import BCQNetwork
from scaled_ql.replay.batch import Batch

TDLoss = Callable[..., jax.Array]
TD_LOSSES: dict[Head, TDLoss] = {
    "c51": losses.c51_loss,
    "hl_gauss": partial(losses.histogram_loss, encode=losses.hl_gauss),
    "two_hot": partial(losses.histogram_loss, encode=losses.two_hot),
    "mse": losses.mse_loss,
}
METRICS = {
    "td_loss": "TD loss",
    "cql_loss": "CQL loss (before alpha)",
    "q_data": "mean Q",
    "entropy": "entropy of the return, nats",
    "dr3_penalty": "DR3 (before its weight)",
    "attention_entropy": "attention's entropy",
}
TRANSITION = ("outputs_t", "action_t", "reward", "discount", "target_outputs_tn", "selector_q_tn", "allowed")


def q_learning(
    *,
    head: Head = "c51",
    td_loss: TDLoss | None = None,
    alpha: float | Literal["paper"] = "paper",
    atoms: jax.Array | None = None,
    double_q: bool = False,
    scale_rewards: Literal["auto", "yes", "no"] = "auto",
    dr3: float = 0.0,
    attention_temperature: float = 0.0,
    attention_entropy: float = ATTENTION_ENTROPY,
    random_shift: int = 0,
    likely: float | None = None,
) -> Method:
    """Scaled QL and its variants: mean over the batch of TD error + alpha * CQL (equation 1).

    Args:
        head: ``c51``, ``hl_gauss``, ``two_hot`` or ``mse``: form of the value and, without `td_loss`, its TD error.
        td_loss: a function of one transition: (outputs_t, action_t, reward, discount, target_outputs_tn, selector_q_tn,
            allowed) -> float scalar, see `losses.c51_loss`; an argument `atoms`, if it has one, is the support.
            Outputs are logits [18, N], or values [18] with the head ``mse``.
        alpha: weight of the CQL regulariser; ``paper``: Table B.1's 0.05, or 0.1 with ``mse``.
        atoms: support [N] of a categorical head (default: `losses.support()`).
        double_q: the online network chooses the action that the target network values.
        scale_rewards: divide rewards by their standard deviation in each game; ``auto``: with ``mse`` (section 5.3).
        dr3: weight of `losses.dr3_penalty`.
        attention_temperature: initial temperature of each block of a ViT, by which `losses.attention_loss` holds the
            entropy of its attention at a target; 0: it does not, and nothing is learned of it.
        attention_entropy: that target, as a share of the maximum.
        random_shift: maximum shift of observations in pixels (`losses.shift_image`).
        likely: discrete BCQ's threshold; see `bcq`. The network is then a `BCQNetwork`.

    Returns:
        a method with the metrics `loss`, `td_loss`, `cql_loss`, `q_data` (mean Q of the data's actions), `q_greedy` (of
        the best actions), with a categorical head `entropy` (of the return distributions predicted for the data's
        actions, in nats), with `likely` `allowed_share` (of a game's actions, in the next states), with `dr3`
        `dr3_penalty`; with a ViT `attention_entropy`, how evenly its tokens attend, and `attention_entropy_1` and so on
        of its blocks, with a temperature `attention_temperature`, their mean; and float32 [games] `td_loss_sum`,
        `td_loss_count`.

    Raises:
        MethodError: `td_loss` does not accept a transition, or (when traced) does not return a float scalar.
    """
    alpha = (0.1 if head == "mse" else 0.05) if alpha == "paper" else alpha
    atoms = losses.support() if atoms is None else atoms
    loss = _with_atoms(td_loss or TD_LOSSES[head], atoms)

    def to_q(values: jax.Array) -> jax.Array:
        return values if head == "mse" else losses.expected_q(values, atoms)

    def forward(
        graph: nnx.GraphDef,
        num_actions: list[int],
        reward_scale: np.ndarray | None,
        trees: tuple[PyTree, PyTree],
        batch: Batch,
        augment: tuple = (None, None),
    ) -> tuple:
        """A TD loss's arguments, the representations at both ends of the transitions, attention, metrics."""
        network, target = (nnx.merge(graph, nnx.State(tree)) for tree in trees)
        allowed, metrics = common.action_masks(num_actions)[batch.game], {}
        scale = jnp.ones(len(num_actions)) if reward_scale is None else jnp.asarray(reward_scale)
        reward = batch.reward / scale[batch.game]
        now, then = (batch.observation, batch.game, augment[0]), (batch.next_observation, batch.game, augment[1])
        if likely is not None:
            behaviour, network, target = network.behaviour, network.q, target.q
            logits_tn = jax.lax.stop_gradient(common.outputs(behaviour, *then)[0])
            mask, allowed = allowed, jax.vmap(partial(losses.likely_actions, tau=likely))(logits_tn, allowed)
            metrics["allowed_share"] = (allowed.sum(-1) / mask.sum(-1)).mean()
        features_t, entropies = common.represent(network, *now)
        outputs_t, features_t = network.heads(features_t, batch.game), features_t.astype(jnp.float32)
        target_tn, _ = common.outputs(target, *then)
        online_tn, features_tn = common.outputs(network, *then) if double_q or dr3 else (None, None)
        selector_q = to_q(online_tn if double_q else target_tn)
        transition = (outputs_t, batch.action, reward, batch.discount, target_tn, selector_q, allowed)
        attention = None if entropies is None else (entropies.mean(0), network.log_temperature)
        return transition, (features_t, features_tn), attention, metrics

    def objective(graph: nnx.GraphDef, num_actions: list[int], reward_scale: np.ndarray | None = None) -> Objective:
        def minimise(params: PyTree, target_params: PyTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
            augment = common.shifts(key, len(batch.game), random_shift)
            about = (graph, num_actions, reward_scale, (params, target_params), batch, augment)
            transition, features, attention, metrics = forward(*about)
            outputs_t, mask = transition[0], common.action_masks(num_actions)[batch.game]
            q, extra = to_q(outputs_t), 0.0
            if dr3:
                metrics["dr3_penalty"] = jax.vmap(losses.dr3_penalty)(*features).mean()
                extra += dr3 * metrics["dr3_penalty"]
            if attention:
                entropies, logs = attention
                metrics |= {f"attention_entropy_{block}": entropy for block, entropy in enumerate(entropies, 1)}
                metrics["attention_entropy"] = entropies.mean()
                if attention_temperature:
                    metrics["attention_temperature"] = jnp.exp(logs[...]).mean()
                    extra += losses.attention_loss(entropies, logs[...], attention_entropy)
            td = jax.vmap(loss)(*transition)
            _check_scalars(td, len(batch.game))
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
            return total, metrics | common.by_game("td_loss", td, batch.game, len(num_actions))

        return minimise

    def distributions(graph: nnx.GraphDef, num_actions: list[int], reward_scale: np.ndarray | None = None) -> Callable:
        def of_one(*transition: jax.Array) -> tuple[jax.Array, jax.Array]:
            # A cross-entropy's gradient, as of each categorical loss in TD_LOSSES, is softmax(logits) - target.
            logits, action = transition[:2]
            predicted = jax.nn.softmax(logits[action])
            return predicted, predicted - jax.grad(loss)(*transition)[action]

        @jax.jit
        def compare(params: PyTree, target_params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
            return jax.vmap(of_one)(*forward(graph, num_actions, reward_scale, (params, target_params), batch)[0])

        return compare

    def values(
        network: nnx.Module, observation: jax.Array, game: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        if likely is not None:
            mask = jax.vmap(partial(losses.likely_actions, tau=likely))(network.behaviour(observation, game), mask)
            network = network.q
        return to_q(network(observation, game)), mask

    name = getattr(td_loss, "__name__", "td_loss") if td_loss else head
    return Method(
        minimises=_in_words(name, alpha, dr3, attention_entropy if attention_temperature else None),
        build=partial(common.build_network, head=head, attention_temperature=attention_temperature),
        objective=objective,
        preferences=partial(common.masked_preferences, values),
        metrics=METRICS,
        scales_rewards=scale_rewards == "yes" or (scale_rewards == "auto" and head == "mse"),
        distributions=None if td_loss or head == "mse" else distributions,  # known only for a cross-entropy
    )


cql = q_learning


def bcq(*, tau: float = TAU, alpha: float | Literal["paper"] = "paper", **settings: Any) -> Method:
    """Discrete batch-constrained Q-learning (appendix A.2): backs up only actions that are likely in the data.

    A behaviour policy is cloned first, by a separate network of the same architecture, and gets no gradient afterwards.
    Fujimoto et al. (2019), whom the paper otherwise follows, train it jointly with the Q-network on shared features.

    Args:
        tau: threshold of the actions that are backed up and played, pi(a|s) >= tau max pi (`losses.likely_actions`).
        alpha: weight of the CQL regulariser; ``paper``: 0, as BCQ replaces it.
        settings: further arguments of `q_learning`.
    """
    method = q_learning(alpha=0.0 if alpha == "paper" else alpha, likely=tau, **settings)

    def build(encoder: str, num_games: int, seed: int = 0, **architecture: Any) -> nnx.Module:
        policy = behaviour.build(encoder, num_games, seed + 1, **architecture)
        return BCQNetwork(method.build(encoder, num_games, seed, **architecture), policy)

    behaviour = bc(random_shift=settings.get("random_shift", 0))
    words = rf"{method.minimises}; backed up are actions with $\pi(a \mid s) \geq {tau:g} \max \pi$"
    return method._replace(minimises=words, build=build, before={"behaviour": behaviour})


def _in_words(td_loss: str, alpha: float, dr3: float, attention: float | None) -> str:
    terms = [rf"\mathrm{{TD}}_\mathtt{{{td_loss.replace('_', chr(92) + '_')}}}"]
    if alpha:
        terms.append(rf"{alpha:g} \left(\log \sum_a \exp Q(s, a) - Q(s, a_\mathrm{{data}})\right)")
    if dr3:
        terms.append(rf"{dr3:g}\ \phi(s) \cdot \phi(s')")
    if attention is not None:
        terms.append(rf"\sum_l \alpha_l ({attention:g} - H_l / \log T)")
    return f"${' + '.join(terms)}$"


def _with_atoms(td_loss: TDLoss, atoms: jax.Array) -> TDLoss:
    """Bind a loss to its support, so that it takes only a transition."""
    arguments = inspect.signature(td_loss).parameters
    bound = partial(td_loss, atoms=atoms) if "atoms" in arguments else td_loss
    try:
        inspect.signature(bound).bind(*TRANSITION)
    except TypeError as error:
        raise MethodError(
            f"td_loss must take ({', '.join(TRANSITION)}) of one transition and return a scalar, this one takes "
            f"({', '.join(arguments)}): {error}."
        ) from None
    return bound


def _check_scalars(td: Any, size: int) -> None:
    shape, dtype = (getattr(td, name, None) for name in ("shape", "dtype"))
    if shape != (size,) or not jnp.issubdtype(dtype, jnp.floating):
        given = type(td).__name__ if shape is None else f"{dtype}{list(shape[1:])}"
        raise MethodError(f"td_loss must return a float scalar for one transition, got {given}.")
