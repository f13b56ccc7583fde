"""Losses: one transition in, a scalar out; callers `jax.vmap` over the batch.

Throughout, A is 18 (the full joystick) and `mask` is bool [A]: true for the actions of the transition's game.
An action outside the mask enters no target, no log-sum-exp and no greedy choice. `allowed` masks the actions that may
be backed up: all of the game's in Q-learning, the likely ones in BCQ.
Subscripts carry time: `_t` at the state, `_tn` at the state n steps later.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from scaled_ql.defaults import NUM_ATOMS, V_MAX, V_MIN

MASKED = -1e9  # a value below any Q, finite so that gradients of what it masks are zero and not NaN


def support(v_min: float = V_MIN, v_max: float = V_MAX, num_atoms: int = NUM_ATOMS) -> jax.Array:
    """Support z_1..z_N of a categorical value distribution, [N] (appendix B.2: 51 atoms on [-20, 20])."""
    return jnp.linspace(v_min, v_max, num_atoms)


def unit_normal_logits(atoms: jax.Array) -> jax.Array:
    """Logits -z^2 / 2 of a normal distribution around 0 with standard deviation 1, on the atoms: [N] -> [N].

    An initial bias for heads (`networks.make_q_network`), not from the paper. Zero logits are a uniform distribution
    over the whole support, which short training hardly leaves: one reward moves its expected return by little.
    """
    return -jnp.square(atoms) / 2


def entropy(logits: jax.Array) -> jax.Array:
    """Entropy of the distribution softmax(logits) [N], a scalar in nats: log N if uniform."""
    chex.assert_rank(logits, 1)
    return -jax.nn.softmax(logits) @ jax.nn.log_softmax(logits)


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
        target_atoms: [M], positions of the mass: r + discount * z.
        probabilities: [M], mass at each position.
        atoms: [N], evenly spaced, ascending.

    Returns:
        [N], the projected probabilities, with the same sum.
    """
    chex.assert_rank([target_atoms, probabilities, atoms], 1)
    chex.assert_equal_shape([target_atoms, probabilities])
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
    allowed: jax.Array,
    atoms: jax.Array,
) -> jax.Array:
    """Cross-entropy of the predicted return distribution to the projected Bellman target (Bellemare et al., 2017).

    Args:
        logits_t: [A, N], online network at s_t.
        action_t: int scalar, the data's action.
        reward: scalar, n-step return up to the bootstrap.
        discount: scalar, discount^n, or 0 after termination.
        target_logits_tn: [A, N], target network at s_{t+n}.
        selector_q_tn: [A], Q values that select the action backed up: the target network's, or the online network's for
            double Q-learning (van Hasselt et al., 2016).
        allowed: bool [A].
        atoms: [N].

    Returns:
        The cross-entropy in nats; its gradient is taken with respect to `logits_t` only.
    """
    _check_transition(logits_t, action_t, reward, discount, target_logits_tn, selector_q_tn, allowed, rank=2)
    chex.assert_shape(atoms, logits_t.shape[1:])
    action_tn = greedy_action(selector_q_tn, allowed)
    probabilities = jax.nn.softmax(target_logits_tn[action_tn])
    target = project_categorical(reward + discount * atoms, probabilities, atoms)
    return -jax.lax.stop_gradient(target) @ jax.nn.log_softmax(logits_t[action_t])


def two_hot(value: jax.Array, atoms: jax.Array) -> jax.Array:
    """A scalar as weights on its two neighbouring atoms, [N], whose mean it is (Schrittwieser et al., 2020)."""
    return project_categorical(jnp.asarray(value)[None], jnp.ones(1), atoms)


def hl_gauss(value: jax.Array, atoms: jax.Array, sigma: float = 0.75) -> jax.Array:
    """A scalar as the histogram of a normal distribution around it, [N].

    Section 3.1 of Farebrother et al. (2024), "Stop regressing". Bins are centred on the atoms; mass beyond the
    outermost edges is shared out in proportion.

    Args:
        value: scalar; beyond the support's ends it counts as the nearer end.
        atoms: [N], evenly spaced, ascending.
        sigma: standard deviation in bin widths, above 0; the source recommends 0.75. Towards 0 the result becomes a one
            at the nearest atom.
    """
    chex.assert_rank([value, atoms], [0, 1])
    width = (atoms[-1] - atoms[0]) / (len(atoms) - 1)
    edges = jnp.append(atoms - width / 2, atoms[-1] + width / 2)
    value = jnp.clip(value, atoms[0], atoms[-1])
    below = jax.scipy.stats.norm.cdf(edges, value, sigma * width)
    return jnp.diff(below) / (below[-1] - below[0])


def histogram_loss(
    logits_t: jax.Array,
    action_t: jax.Array,
    reward: jax.Array,
    discount: jax.Array,
    target_logits_tn: jax.Array,
    selector_q_tn: jax.Array,
    allowed: jax.Array,
    atoms: jax.Array,
    encode: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Cross-entropy to a scalar Bellman target written as a distribution: value learning as classification.

    Args:
        encode: (scalar, atoms [N]) -> [N]: `two_hot` or `hl_gauss`. The other arguments are those of `c51_loss`, whose
            target is the whole distribution of the next state's return instead.
    """
    _check_transition(logits_t, action_t, reward, discount, target_logits_tn, selector_q_tn, allowed, rank=2)
    chex.assert_shape(atoms, logits_t.shape[1:])
    action_tn = greedy_action(selector_q_tn, allowed)
    target = reward + discount * expected_q(target_logits_tn[action_tn], atoms)
    return -jax.lax.stop_gradient(encode(target, atoms)) @ jax.nn.log_softmax(logits_t[action_t])


def mse_loss(
    q_t: jax.Array,
    action_t: jax.Array,
    reward: jax.Array,
    discount: jax.Array,
    target_q_tn: jax.Array,
    selector_q_tn: jax.Array,
    allowed: jax.Array,
) -> jax.Array:
    """Squared temporal-difference error (Q(s_t, a_t) - r - discount Q'(s_{t+n}, a*))^2, all Q [A]; see `c51_loss`."""
    _check_transition(q_t, action_t, reward, discount, target_q_tn, selector_q_tn, allowed, rank=1)
    action_tn = greedy_action(selector_q_tn, allowed)
    target = jax.lax.stop_gradient(reward + discount * target_q_tn[action_tn])
    return jnp.square(q_t[action_t] - target)


def cql_loss(q_t: jax.Array, action_t: jax.Array, mask: jax.Array) -> jax.Array:
    """Conservative regulariser log sum_a exp Q(s_t, a) - Q(s_t, a_t), with expected Q values (equation 1).

    Args:
        q_t: [A].
        action_t: int scalar, the data's action.
        mask: bool [A].
    """
    _check_policy(q_t, action_t, mask)
    return jax.nn.logsumexp(q_t, where=mask) - q_t[action_t]


def likely_actions(behaviour_logits: jax.Array, mask: jax.Array, tau: float = 0.3) -> jax.Array:
    """The actions that discrete BCQ allows, bool [A]: pi(a|s) >= tau max_a' pi(a'|s) (appendix A.2).

    Args:
        behaviour_logits: [A], logits of the cloned behaviour policy.
        mask: bool [A].
        tau: 0 allows every action of the game, 1 only the likeliest.
    """
    chex.assert_rank([behaviour_logits, mask], 1)
    chex.assert_type([behaviour_logits, mask], [float, bool])
    log_policy = jnp.where(mask, behaviour_logits, -jnp.inf)  # only compared: no gradient comes here
    # tau = 0 must allow even actions whose probability underflows; log(0) = -inf does.
    return mask & (log_policy - log_policy.max() >= jnp.log(jnp.float32(tau)))


def bc_loss(logits_t: jax.Array, action_t: jax.Array, mask: jax.Array) -> jax.Array:
    """Negative log-likelihood of the data's action under a policy with logits [A]: behaviour cloning."""
    _check_policy(logits_t, action_t, mask)
    return jax.nn.logsumexp(logits_t, where=mask) - logits_t[action_t]


def return_bc_loss(
    logits_t: jax.Array, action_t: jax.Array, return_to_go: jax.Array, mask: jax.Array, atoms: jax.Array
) -> jax.Array:
    """Negative log-likelihood of the data's action together with the return that followed it.

    One categorical distribution over actions x returns: -log p(a, R | s) = -log p(R | s) - log p(a | s, R), which are
    the return and action terms of the multi-game decision transformer (Lee et al., 2022), without its context.

    Args:
        logits_t: [A, N].
        action_t: int scalar.
        return_to_go: scalar, the discounted return from s_t on; written on the atoms as `two_hot`.
        mask: bool [A].
        atoms: [N].
    """
    chex.assert_rank([logits_t, action_t, return_to_go, mask, atoms], [2, 0, 0, 1, 1])
    chex.assert_type([logits_t, action_t, return_to_go, mask, atoms], [float, int, float, bool, float])
    log_joint = logits_t - jax.nn.logsumexp(logits_t, where=mask[:, None])
    return -two_hot(return_to_go, atoms) @ log_joint[action_t]


def expert_action_logits(logits: jax.Array, atoms: jax.Array, kappa: float = 1.0) -> jax.Array:
    """log p(a | s, expert) up to a constant, [..., A], from the model of `return_bc_loss`, logits [..., A, N].

    Expert behaviour is inferred as in section 3.4 of Lee et al. (2022): p(R | expert, s) ~ p(R | s) exp(kappa R).
    Three things differ. The return is summed over; theirs is drawn. R is the discounted return on `atoms`; theirs is
    undiscounted, between -20 and 100. kappa is per unit of return; theirs is 10 for that whole range, 10 / 120 = 0.083
    per unit, so that the default of 1 weighs a unit twelve times as much. kappa = 0 is behaviour cloning.
    """
    return jax.nn.logsumexp(logits + kappa * atoms, axis=-1)


def attention_loss(entropies: jax.Array, log_temperatures: jax.Array, target: float) -> jax.Array:
    """Lagrangian that holds the entropies of attention at a target: sum_l alpha_l (target - entropy_l).

    After TQL (Dong et al., 2026), which finds that attention collapses in value functions of transformers. The network
    minimises it; each layer's temperature alpha_l maximises it, growing while its entropy is below the target and
    falling above it, as in soft actor-critic (Haarnoja et al., 2018). TQL's gain over a fixed penalty is that learned,
    layer-wise temperature; its target is not known to us. Its token of the value has one of its own; here values are
    read from all tokens.

    Args:
        entropies: [L], of each layer, as a share of their maximum.
        log_temperatures: [L], log alpha; gradients with respect to them are reversed.
        target: likewise a share.
    """
    chex.assert_rank([entropies, log_temperatures], 1)
    chex.assert_equal_shape([entropies, log_temperatures])
    temperatures = jnp.exp(log_temperatures)
    reversed_ = 2 * jax.lax.stop_gradient(temperatures) - temperatures
    return reversed_ @ (target - entropies)


def dr3_penalty(features_t: jax.Array, features_tn: jax.Array) -> jax.Array:
    """Explicit DR3 regulariser (Kumar et al., 2022, section 5): the dot product of successive representations [F].

    Both carry gradients. Scaled QL uses feature normalisation instead (section 4).
    """
    chex.assert_rank([features_t, features_tn], 1)
    chex.assert_type([features_t, features_tn], float)
    return features_t @ features_tn


def info_nce(scores: jax.Array, positive: jax.Array, candidates: jax.Array) -> jax.Array:
    """Negative log-likelihood, in nats, of the one right candidate: InfoNCE (van den Oord et al., 2018, equation 4).

    Args:
        scores: float [N], of the candidates.
        positive: int scalar, the number of the right one.
        candidates: bool [N], those that count; the right one is among them.
    """
    chex.assert_rank([scores, positive, candidates], [1, 0, 1])
    chex.assert_type([scores, positive, candidates], [float, int, bool])
    return jax.nn.logsumexp(jnp.where(candidates, scores, MASKED)) - scores[positive]


def masked_patch_loss(predicted: jax.Array, patches: jax.Array, hidden: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """Squared error of an image's hidden patches, each less its mean and divided by its standard deviation.

    He et al. (2021), section 4: "normalized pixels". A patch of one grey level has the target 0.

    Args:
        predicted: float [N, D], of N patches of D pixels.
        patches: float [N, D], the image, in units of the full range from black to white.
        hidden: bool [N]; at least one.
        epsilon: added to the variance.
    """
    chex.assert_rank([predicted, patches, hidden], [2, 2, 1])
    chex.assert_type([predicted, patches, hidden], [float, float, bool])
    mean, deviation = patch_statistics(patches, epsilon)
    target = (patches - mean) / deviation
    return jnp.where(hidden, jnp.square(predicted - target).mean(-1), 0).sum() / hidden.sum()


def patch_statistics(patches: jax.Array, epsilon: float = 1e-6) -> tuple[jax.Array, jax.Array]:
    """Mean of patches [..., D], and the root of their variance plus epsilon, each [..., 1]."""
    mean = patches.mean(-1, keepdims=True)
    return mean, jnp.sqrt(jnp.square(patches - mean).mean(-1, keepdims=True) + epsilon)


def random_offsets(key: jax.Array, number: int, pixels: int) -> jax.Array:
    """Vertical and horizontal shifts of images, int32 [number, 2], uniform in -pixels..pixels."""
    return jax.random.randint(key, (number, 2), -pixels, pixels + 1)


def shift_image(image: jax.Array, offset: jax.Array, pixels: int) -> jax.Array:
    """Move an image [H, W, C] by `offset` [2] (at most `pixels`), repeating its border (Kostrikov et al., 2021)."""
    padded = jnp.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)), mode="edge")
    start = (pixels - offset[0], pixels - offset[1], 0)
    return jax.lax.dynamic_slice(padded, start, image.shape)


def _check_transition(
    outputs_t: jax.Array,
    action_t: jax.Array,
    reward: jax.Array,
    discount: jax.Array,
    target_outputs_tn: jax.Array,
    selector_q_tn: jax.Array,
    allowed: jax.Array,
    *,
    rank: int,
) -> None:
    """Assert ranks and dtypes of a TD loss's arguments: outputs of a rank, the rest as `c51_loss` describes it."""
    transition = [outputs_t, action_t, reward, discount, target_outputs_tn, selector_q_tn, allowed]
    chex.assert_rank(transition, [rank, 0, 0, 0, rank, 1, 1])
    chex.assert_type(transition, [float, int, float, float, float, float, bool])
    chex.assert_equal_shape([outputs_t, target_outputs_tn])
    chex.assert_equal_shape([selector_q_tn, allowed])


def _check_policy(values: jax.Array, action: jax.Array, mask: jax.Array) -> None:
    chex.assert_rank([values, action, mask], [1, 0, 1])
    chex.assert_type([values, action, mask], [float, int, bool])
