"""Losses: one transition in, a scalar out; callers `jax.vmap` over the batch.

Throughout, A is 18 (the full joystick) and `mask` is bool [A]: true for the actions of the transition's game.
An action outside the mask takes part in nothing: no target, no log-sum-exp, no greedy choice.
Subscripts carry time: `_t` at the state, `_tn` at the state n steps later.
"""

import jax
import jax.numpy as jnp

MASKED = -1e9  # a value below any Q, finite so that gradients of what it masks are zero and not NaN


def support(v_min: float = -20.0, v_max: float = 20.0, num_atoms: int = 51) -> jax.Array:
    """The returns z_1..z_N that a categorical value distribution weighs, [N] (appendix B.2: 51 on [-20, 20])."""
    return jnp.linspace(v_min, v_max, num_atoms)


def expected_q(logits: jax.Array, atoms: jax.Array) -> jax.Array:
    """Q(s, .) = sum_i softmax(logits)_i z_i: [..., N] -> [...]."""
    return jax.nn.softmax(logits, axis=-1) @ atoms


def greedy_action(q: jax.Array, mask: jax.Array) -> jax.Array:
    """The game's best action, an int32 scalar, from q [A]."""
    return jnp.where(mask, q, MASKED).argmax(-1)


def project_categorical(target_atoms: jax.Array, probabilities: jax.Array, atoms: jax.Array) -> jax.Array:
    """Distribute probability mass at arbitrary returns over the fixed atoms, linearly between neighbours.

    Equation 7 of Bellemare et al. (2017). Mass beyond the support's ends goes to the end atoms.

    Args:
        target_atoms: [M], where the mass lies: r + discount * z.
        probabilities: [M], how much lies there.
        atoms: [N], evenly spaced, ascending.

    Returns:
        [N], the projected probabilities, with the same sum.
    """
    spacing = (atoms[-1] - atoms[0]) / (len(atoms) - 1)
    position = (jnp.clip(target_atoms, atoms[0], atoms[-1]) - atoms[0]) / spacing
    # Atom i takes the share 1 - |position - i| of mass within one spacing of it.
    share = jnp.clip(1 - jnp.abs(position[None, :] - jnp.arange(len(atoms))[:, None]), 0, 1)
    return share @ probabilities


def c51_loss(
    logits_t: jax.Array,
    action_t: jax.Array,
    reward: jax.Array,
    discount: jax.Array,
    target_logits_tn: jax.Array,
    selector_q_tn: jax.Array,
    mask: jax.Array,
    atoms: jax.Array,
) -> jax.Array:
    """Cross-entropy of the predicted return distribution to the projected Bellman target (Bellemare et al., 2017).

    Args:
        logits_t: [A, N], online network at s_t.
        action_t: int scalar, the data's action.
        reward: scalar, n-step return up to the bootstrap.
        discount: scalar, discount^n, or 0 after termination.
        target_logits_tn: [A, N], target network at s_{t+n}.
        selector_q_tn: [A], the Q values whose best action is backed up: the target network's own, or the
            online network's for double Q-learning (van Hasselt et al., 2016).
        mask: bool [A].
        atoms: [N].

    Returns:
        The cross-entropy in nats; its gradient is taken with respect to `logits_t` only.
    """
    action_tn = greedy_action(selector_q_tn, mask)
    probabilities = jax.nn.softmax(target_logits_tn[action_tn])
    target = project_categorical(reward + discount * atoms, probabilities, atoms)
    return -jax.lax.stop_gradient(target) @ jax.nn.log_softmax(logits_t[action_t])


def mse_loss(
    q_t: jax.Array,
    action_t: jax.Array,
    reward: jax.Array,
    discount: jax.Array,
    target_q_tn: jax.Array,
    selector_q_tn: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    """Squared temporal-difference error (Q(s_t, a_t) - r - discount Q'(s_{t+n}, a*))^2, all Q [A]; see `c51_loss`."""
    action_tn = greedy_action(selector_q_tn, mask)
    target = jax.lax.stop_gradient(reward + discount * target_q_tn[action_tn])
    return jnp.square(q_t[action_t] - target)


def cql_loss(q_t: jax.Array, action_t: jax.Array, mask: jax.Array) -> jax.Array:
    """Conservative regulariser log sum_a exp Q(s_t, a) - Q(s_t, a_t), with expected Q values (equation 1).

    Args:
        q_t: [A].
        action_t: int scalar, the data's action.
        mask: bool [A].
    """
    return jax.nn.logsumexp(q_t, where=mask) - q_t[action_t]
