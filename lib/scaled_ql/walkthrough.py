"""The pull of one transition, and its dependence on the head, alpha and n: the walkthrough's exercise."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaled_ql import losses
from scaled_ql.methods.common import action_masks
from scaled_ql.methods.q_learning import TD_LOSSES
from scaled_ql.networks.q_network import Head
from scaled_ql.replay import Replay

Forward = Callable[[np.ndarray, np.ndarray], jax.Array]  # observation [B, 84, 84, S], game [B] -> logits [B, A, N]


class Pull(NamedTuple):
    """One transition's target, and the effect of descent on its loss on the logits and values at its state.

    Attributes:
        action: the data's action.
        predicted: [N], the return distribution of that action.
        target: [N], its target distribution; None if only the value has a target (``mse``).
        target_mean: expected return of the target.
        td_gradient: [A, N], of the TD error with respect to the logits.
        cql_gradient: [A, N], of alpha * CQL.
        td_push: [A], `push_on_q` of the TD error.
        cql_push: [A], `push_on_q` of alpha * CQL.
    """

    action: int
    predicted: np.ndarray
    target: np.ndarray | None
    target_mean: float
    td_gradient: np.ndarray
    cql_gradient: np.ndarray
    td_push: np.ndarray
    cql_push: np.ndarray


@jax.jit
def push_on_q(logits: jax.Array, gradient: jax.Array, atoms: jax.Array) -> jax.Array:
    """Rate of change of Q [A] when logits [A, N] descend along their gradient [A, N]: - dQ/dlogits . gradient.

    The rate is per unit of step size, to first order, as if the logits were the parameters.
    """
    return jax.jvp(lambda x: losses.expected_q(x, atoms), (logits,), (-gradient,))[1]


def pull(
    logits_t: jax.Array,
    action_t: jax.Array,
    reward: jax.Array,
    discount: jax.Array,
    target_logits_tn: jax.Array,
    mask: jax.Array,
    atoms: jax.Array,
    head: Head = "c51",
    alpha: float = 0.05,
) -> Pull:
    """Compute the `Pull` of one transition.

    Args:
        logits_t, action_t, reward, discount, target_logits_tn, atoms: see `losses.c51_loss`.
        mask: bool [A], the game's actions.
        head: head that defines the TD error. For ``mse`` it is that of the distribution's mean; a network with an MSE
            head has no distribution, and outputs that value.
        alpha: weight of the CQL regulariser.
    """
    transition = (logits_t, action_t, reward, discount, target_logits_tn)
    predicted, mean, td, cql, *pushes = _gradients(transition, mask, atoms, alpha, head=head)
    arrays = [np.asarray(x) for x in (td, cql, *pushes)]
    # The gradient of a cross-entropy is the prediction less the target.
    target = None if head == "mse" else np.asarray(predicted - td[action_t])
    return Pull(
        int(action_t), np.asarray(predicted), target, float(mean if target is None else target @ atoms), *arrays
    )


@partial(jax.jit, static_argnames="head")
def _gradients(
    transition: tuple[jax.Array, ...], mask: jax.Array, atoms: jax.Array, alpha: float, head: Head
) -> tuple[jax.Array, ...]:
    """The prediction, the scalar target, both gradients and both pushes of a `Pull`."""
    logits_t, action_t, reward, discount, target_logits_tn = transition
    q_tn = losses.expected_q(target_logits_tn, atoms)
    if head == "mse":
        backup = (action_t, reward, discount, q_tn, q_tn, mask)
        td = jax.grad(lambda x: TD_LOSSES[head](losses.expected_q(x, atoms), *backup))(logits_t)
    else:
        backup = (action_t, reward, discount, target_logits_tn, q_tn, mask)
        td = jax.grad(lambda x: TD_LOSSES[head](x, *backup, atoms=atoms))(logits_t)
    cql = jax.grad(lambda x: alpha * losses.cql_loss(losses.expected_q(x, atoms), action_t, mask))(logits_t)
    scalar = reward + discount * q_tn[losses.greedy_action(q_tn, mask)]
    pushes = (push_on_q(logits_t, gradient, atoms) for gradient in (td, cql))
    return jax.nn.softmax(logits_t[action_t]), scalar, td, cql, *pushes


def what_if(
    replay: Replay,
    game: str,
    index: int,
    online: Forward,
    target: Forward,
    atoms: jax.Array,
    *,
    n_step: int,
    discount: float,
    head: Head = "c51",
    alpha: float = 0.05,
) -> Pull:
    """Compute the `Pull` of a recorded transition under given settings; see `pull`.

    Args:
        replay: an open store.
        game: one of its games.
        index: time index of the transition.
        online: the online network.
        target: the target network.
        atoms: [N], the support.
        n_step: steps summed before bootstrapping.
        discount: discount per step.
        head: head that defines the TD error.
        alpha: weight of the CQL regulariser.
    """
    batch = replay.batch(game, [index], n_step, discount)
    logits, target_logits = online(batch.observation, batch.game)[0], target(batch.next_observation, batch.game)[0]
    mask = action_masks([len(replay.action_names(game))])[0]
    action, reward, after = (jnp.asarray(x[0]) for x in (batch.action, batch.reward, batch.discount))
    return pull(logits, action, reward, after, target_logits, mask, atoms, head, alpha)
