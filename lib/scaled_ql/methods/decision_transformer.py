"""Decision transformers (``dt``) and cloning transformers (``bc_transformer``), after Lee et al. (2022).

The model is one of play, good and bad: it predicts returns, actions given returns, and rewards. Expert play is asked of
it afterwards, by choosing a high return that it finds likely. In play, the policy sees the last T steps of its episode.
Nothing is kept of the tokens of earlier decisions (no KV cache): the window slides by a step each time, so every token
gets another position and sees another past, and all keys and values change. What one decision needs first, the return
predicted from the first frame, takes the 39 tokens of that step alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from scaled_ql.defaults import (
    ACTION_PERCENTILE,
    GROUP_SIZE,
    RETURN_HIGH,
    RETURN_KAPPA,
    RETURN_LOW,
    RETURN_SAMPLES,
    RETURN_TEMPERATURE,
)
from scaled_ql.methods import common
from scaled_ql.methods.common import Method, MethodError, Metrics, Objective, PyTree
from scaled_ql.networks import make_decision_transformer
from scaled_ql.networks.transformer import Predictions
from scaled_ql.replay.sequences import Sequences

METRICS = {
    "nll": "negative log-likelihood of actions, nats",
    "accuracy": "data's action is the likeliest",
    "return_nll": "that of returns",
    "reward_nll": "that of rewards",
    "clipped": "share of returns outside the table",
}
TargetReturn = float | Literal["notebook", "paper", "data"]


class Decision(NamedTuple):
    """What a transformer makes of B windows, and would do after their last frames.

    Attributes:
        log_policy: float32 [B, 18], log-probabilities of the full joystick's actions; -inf: never played.
        features: float32 [B, width], what these are predicted from.
        predicted: float32 [B, returns], distribution of the return from the window's first step on, as predicted from
            its frame alone; None without return tokens, as are the others.
        offered: float32 [B, returns], the distribution that the return to ask for is drawn from.
        token: int32 [B], the return that is asked for.
    """

    log_policy: jax.Array
    features: jax.Array
    predicted: jax.Array | None = None
    offered: jax.Array | None = None
    token: jax.Array | None = None


def dt(
    *,
    transformer: str = "40M",
    tokenizer: str = "patches",
    sequence_length: int = 4,
    return_low: int = RETURN_LOW,
    return_high: int = RETURN_HIGH,
    target_return: TargetReturn = "notebook",
    return_kappa: float = RETURN_KAPPA,
    return_samples: int = RETURN_SAMPLES,
    return_temperature: float = RETURN_TEMPERATURE,
    action_percentile: float = ACTION_PERCENTILE,
    random_shift: int = 0,
    expert_returns: np.ndarray | None = None,
) -> Method:
    """The multi-game decision transformer: the mean of three cross-entropies, of returns, actions and rewards.

    Args:
        transformer: a key of `networks.TRANSFORMERS`.
        tokenizer: what makes tokens of a frame: ``patches``, or an encoder, such as one that `cpc` has trained; see
            `networks.make_decision_transformer`.
        sequence_length: steps of a window, T.
        return_low, return_high: undiscounted returns with a token, each integer between; others count as the nearest.
        target_return: the return that the policy asks for at each step: ``notebook``, the largest of `return_samples`
            draws from the predicted returns (`best_return_logits`); ``paper``, a draw from those that an expert would
            have (`expert_return_logits`); ``data``, the same with experts from data; a number, that return of the whole
            episode, less what it gave so far.
        return_kappa: inverse temperature of ``paper``.
        return_samples, return_temperature: of ``notebook``.
        action_percentile: actions that are not above this percentile of their logits are not played; 0: all are.
        random_shift: maximum shift of a window's frames in pixels, all in the same direction;
            see `losses.shift_image`.
        expert_returns: of ``data``: float [games, returns], `replay.expert_returns` of the same table.

    Returns:
        a method with the metrics `loss`, `nll` and `accuracy` (of actions, on average over a window's steps without
        padding, then over windows), `return_nll` (of the first step's return alone), `reward_nll`, `clipped` (share of
        windows whose return has no token of its own), and float32 [games] `nll_sum`, `nll_count`.
    """
    returns = (return_low, return_high)

    def offer(logits: jax.Array, windows: Sequences) -> jax.Array:
        if target_return == "notebook":
            return best_return_logits(logits, return_samples, return_temperature)
        if target_return == "paper":
            return expert_return_logits(logits, return_kappa)
        if target_return == "data":
            return logits + jnp.asarray(expert_returns)[windows.game]
        token = return_tokens(target_return + windows.return_to_go[:, 0], *returns)
        return jnp.where(jnp.arange(logits.shape[-1]) == token[:, None], 0.0, -jnp.inf)

    def decisions(graph: nnx.GraphDef, num_actions: list[int]) -> Callable[..., Decision]:
        del num_actions
        if target_return == "data" and expert_returns is None:
            raise MethodError(
                "target_return = 'data' asks for an expert's returns, but there are none: pass expert_returns, from "
                "`replay.expert_returns`."
            )

        def decide(params: PyTree, windows: Sequences, draw: jax.Array) -> Decision:
            network = nnx.merge(graph, nnx.State(params))
            inputs = windows.action, reward_tokens(windows.reward, windows.terminal)
            nothing = jnp.zeros(len(windows.action), jnp.int32)  # a first return, which no return's prediction sees
            first = network(windows.frames[:, :1], nothing, *(x[:, :1] for x in inputs)).returns[:, 0]
            offered = offer(first, windows)
            token = jax.vmap(jax.random.categorical)(_keys(draw), offered)
            now = network(windows.frames, token, *inputs)
            log_policy = top_actions(now.actions[:, -1], action_percentile)
            return Decision(log_policy, now.features[:, -1], jax.nn.softmax(first), jax.nn.softmax(offered), token)

        return decide

    return Method(
        minimises=r"$-\frac{1}{3} \log p(R_1 \mid s_1)\, p(a_t \mid \cdot)\, p(r_t \mid \cdot)$",
        build=partial(_build, transformer, sequence_length, return_high - return_low + 1, tokenizer),
        objective=partial(_objective, returns, random_shift),
        preferences=partial(_preferences, decisions),
        metrics=METRICS,
        batches="sequences with returns",
        values="log π(a|s, R)",
        memory=sequence_length,
        decisions=decisions,
        temperature=1.0,
    )


def bc_transformer(*, transformer: str = "40M", sequence_length: int = 4, random_shift: int = 0) -> Method:
    """The cloning transformer: `dt` without return tokens; it plays as the data's players did.

    Args:
        transformer, sequence_length, random_shift: as of `dt`.

    Returns:
        a method with the metrics of `dt`, but for those of returns.
    """

    def decisions(graph: nnx.GraphDef, num_actions: list[int]) -> Callable[..., Decision]:
        del num_actions

        def decide(params: PyTree, windows: Sequences, draw: jax.Array) -> Decision:
            del draw
            network = nnx.merge(graph, nnx.State(params))
            rewards = reward_tokens(windows.reward, windows.terminal)
            now = network(windows.frames, None, windows.action, rewards)
            return Decision(jax.nn.log_softmax(now.actions[:, -1]), now.features[:, -1])

        return decide

    return Method(
        minimises=r"$-\frac{1}{2} \log p(a_t \mid \cdot)\, p(r_t \mid \cdot)$",
        build=partial(_build, transformer, sequence_length, 0, "patches"),
        objective=partial(_objective, None, random_shift),
        preferences=partial(_preferences, decisions),
        metrics={name: title for name, title in METRICS.items() if name not in ("return_nll", "clipped")},
        batches="sequences",
        values="log π(a|s)",
        memory=sequence_length,
        decisions=decisions,
        temperature=1.0,
    )


def _preferences(decisions: Callable, graph: nnx.GraphDef, num_actions: list[int]) -> Callable:
    """`Method.preferences`: of decisions, the policy alone, compiled."""
    decide = decisions(graph, num_actions)
    return jax.jit(lambda params, windows, draw: decide(params, windows, draw).log_policy)


def _build(
    transformer: str, length: int, num_returns: int, tokenizer: str, encoder: str, num_games: int, seed: int = 0, *,
    group_size: int = GROUP_SIZE, dtype: str = "float32", remat: bool = False, **of_q_networks: Any,
) -> nnx.Module:  # fmt: skip
    """`Method.build`: a transformer is the same for all games, and has nothing else of a Q-network's architecture."""
    del encoder, num_games, of_q_networks
    how = {"tokenizer": tokenizer, "group_size": group_size, "dtype": dtype, "remat": remat}
    return make_decision_transformer(transformer, seed, length=length, num_returns=num_returns, **how)


def reward_tokens(reward: jax.Array, terminal: jax.Array) -> jax.Array:
    """Tokens of rewards, int32: 0 of none, 1 of a positive one, 2 where the game ends, 3 of a negative one."""
    return jnp.where(terminal, 2, (reward > 0) + 3 * (reward < 0)).astype(jnp.int32)


def return_tokens(return_to_go: jax.Array, low: int, high: int) -> jax.Array:
    """Tokens of returns, int32, from 0: the nearest integer between `low` and `high`, ends included."""
    return jnp.clip(jnp.round(return_to_go) - low, 0, high - low).astype(jnp.int32)


def expert_return_logits(logits: jax.Array, kappa: float = RETURN_KAPPA) -> jax.Array:
    """Logits of an expert's returns, [..., N]: log p(R) + kappa (R - R_low) / (R_high - R_low).

    Section 3.4 of Lee et al. (2022): p(R | expert) is p(R) p(expert | R), the latter in proportion to exp(kappa R).

    Args:
        logits: [..., N], of the predicted returns R_low to R_high.
        kappa: inverse temperature for the whole range; 0: the returns of the data's players.
    """
    return logits + kappa * jnp.linspace(0, 1, logits.shape[-1])


def best_return_logits(
    logits: jax.Array, samples: int = RETURN_SAMPLES, temperature: float = RETURN_TEMPERATURE
) -> jax.Array:
    """Logits of the largest of several returns that are drawn independently from softmax(temperature * logits).

    The notebook that was published with the models of Lee et al. draws 128 and takes the largest. Its distribution is
    known, so that one draw does: with F(k) the probability of at most k, it is F(k)^samples - F(k - 1)^samples.

    Args:
        logits: [..., N], of the predicted returns.
        samples: number of draws.
        temperature: factor of the logits, as in that notebook: below 1 it flattens them.
    """
    log_p = jax.nn.log_softmax(temperature * logits)
    log_f = jax.lax.cumlogsumexp(log_p, axis=log_p.ndim - 1)
    share = jnp.exp(jnp.minimum(log_p - log_f, 0))  # F(k - 1) = F(k) (1 - share), without a difference of small numbers
    return samples * log_f + jnp.log(-jnp.expm1(samples * jnp.log1p(-share)))


def top_actions(logits: jax.Array, percentile: float = ACTION_PERCENTILE) -> jax.Array:
    """Log-probabilities [..., A] of a policy that plays only actions whose logits are above their percentile.

    Args:
        logits: [..., A].
        percentile: 0 to 100, interpolated linearly; 0: all actions. The likeliest action is always played.
    """
    if percentile:
        threshold = jnp.percentile(logits, percentile, axis=-1, keepdims=True)
        kept = (logits > threshold) | (logits == logits.max(-1, keepdims=True))
        logits = jnp.where(kept, logits, -jnp.inf)
    return jax.nn.log_softmax(logits)


def window_losses(
    predictions: Predictions, return_token: jax.Array | None, action: jax.Array, reward: jax.Array, mask: jax.Array
) -> Metrics:
    """Negative log-likelihoods of one window in nats, and its share of likeliest actions, scalars.

    Args:
        predictions: of one window, [T, ...].
        return_token: int scalar, of the first step; None without returns. It counts even where that step is padding, as
            play begins with padding, too.
        action: int [T].
        reward: int [T], tokens.
        mask: bool [T], false for padding, which counts nowhere else.
    """

    def mean(values: jax.Array) -> jax.Array:
        return jnp.where(mask, values, 0).sum() / mask.sum()

    def nll(logits: jax.Array, label: jax.Array) -> jax.Array:
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), label[..., None], axis=-1)[..., 0]

    found = {
        "nll": mean(nll(predictions.actions, action)),
        "reward_nll": mean(nll(predictions.rewards, reward)),
        "accuracy": mean(predictions.actions.argmax(-1) == action),
    }
    return found if return_token is None else found | {"return_nll": nll(predictions.returns[0], return_token)}


def _objective(
    returns: tuple[int, int] | None,
    random_shift: int,
    graph: nnx.GraphDef,
    num_actions: list[int],
    reward_scale: np.ndarray | None = None,
) -> Objective:
    """`Method.objective`; `returns` are the lowest and highest with a token, None without."""
    del reward_scale

    def minimise(params: PyTree, target_params: PyTree, batch: Sequences, key: jax.Array) -> tuple[jax.Array, Metrics]:
        del target_params
        network, (shift, dropout) = nnx.merge(graph, nnx.State(params)), jax.random.split(key)
        frames, rewards = batch.frames, reward_tokens(batch.reward, batch.terminal)
        if augment := common.shifts(shift, len(batch.game), random_shift)[0]:
            frames = augment(frames.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        first = batch.return_to_go[:, 0]
        token = return_tokens(first, *returns) if returns else None
        predictions = network(frames, token, batch.action, rewards, dropout)
        per_window = jax.vmap(window_losses)(predictions, token, batch.action, rewards, batch.mask)
        metrics = {name: values.mean() for name, values in per_window.items()}
        terms = [value for name, value in metrics.items() if name.endswith("nll")]
        metrics["loss"] = sum(terms) / len(terms)
        if returns:
            metrics["clipped"] = ((first < returns[0]) | (first > returns[1])).mean()
            # Returns that were never filled in are NaN, which a token cannot be.
            metrics["loss"] = jnp.where(jnp.isnan(first).any(), jnp.nan, metrics["loss"])
        return metrics["loss"], metrics | common.by_game("nll", per_window["nll"], batch.game, len(num_actions))

    return minimise


def _keys(draw: jax.Array) -> jax.Array:
    """A key for each row of numbers, int32 [B, 3] -> [B]."""

    def key(numbers: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(numbers[0]), numbers[1]), numbers[2])

    return jax.vmap(key)(draw)
