"""What an encoder knows of a game: how well a linear model reads the console's memory from its features.

The Atari's 128 bytes of RAM hold the positions of ball and players, the score, the lives. Ridge regression predicts
each byte that varies from the frozen features of a frame stack; the share of its variance that is explained in
episodes that the regression did not see says what the features hold, without any training of the network (Anand et al.,
2019, probe with classifiers instead).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
import pandas as pd
from flax import nnx

from scaled_ql.environments import STACK_SIZE, make_environment
from scaled_ql.methods.common import PyTree

# Some bytes by name, as far as the Atari Annotated RAM Interface (Anand et al., 2019) knows them.
NAMED: dict[str, dict[int, str]] = {
    "Boxing": {32: "player x", 33: "enemy x", 34: "player y", 35: "enemy y"},
    "Breakout": {72: "player x", 99: "ball x", 101: "ball y"},
    "Freeway": {14: "player y"},
    "Pong": {49: "ball x", 50: "enemy y", 51: "player y", 54: "ball y"},
    "Qbert": {43: "player x", 67: "player y"},
}
PENALTIES = 10.0 ** np.arange(-2, 6)  # of the ridge, in units of a feature's variance; the best is chosen by validation


class Observed(NamedTuple):
    """Moments of random play.

    Attributes:
        stacks: uint8 [N, 84, 84, 4], oldest frame first.
        ram: uint8 [N, 128].
        episode: int [N], ascending.
        step: int [N], within the episode.
    """

    stacks: np.ndarray
    ram: np.ndarray
    episode: np.ndarray
    step: np.ndarray


def observe(
    game: str, number: int, seed: int, every: int = 8, mode: int | None = None, difficulty: int | None = None
) -> Observed:
    """Play at random without sticky actions; keep every `every`-th step, whole stacks only.

    Args:
        game: name as in the paper.
        number: moments to keep.
        seed: seed of the play.
        every: agent steps between moments, which are alike when they are near.
        mode, difficulty: see `make_environment`.

    An episode counts as over after an eighth of the moments, so that there are several in any game.
    """
    environment = make_environment(game, sticky_actions=0.0, mode=mode, difficulty=difficulty)
    rng, stacks, memory, moments, episode = np.random.default_rng(seed), [], [], [], 0
    while len(stacks) < number:
        frame, _ = environment.reset(seed=int(rng.integers(2**31)))
        recent, over, step, kept = [frame], False, 0, 0
        while not over and len(stacks) < number and kept < -(-number // 8):
            frame, _, terminated, truncated, _ = environment.step(int(rng.integers(environment.action_space.n)))
            recent, over, step = [*recent, frame][-STACK_SIZE:], terminated or truncated, step + 1
            if len(recent) == STACK_SIZE and step % every == 0:
                stacks.append(np.stack(recent, axis=-1))
                memory.append(environment.unwrapped.ale.getRAM())
                moments.append((episode, step))
                kept += 1
        episode += 1
    environment.close()
    return Observed(np.stack(stacks), np.stack(memory), *np.array(moments).T)


def time_features(step: np.ndarray, number: int = 64) -> np.ndarray:
    """The control of a read-out: the time within the episode and nothing else, as bumps, float64 [N, number].

    Episodes begin alike, so that time alone says much about some bytes. What pixels say, they say beyond that.
    """
    centers = np.linspace(0, step.max(), number)
    return np.exp(-0.5 * np.square((step[:, None] - centers) / (centers[1] or 1)))


def make_features(graph: nnx.GraphDef) -> Callable[[PyTree, np.ndarray], np.ndarray]:
    """(params, stacks uint8 [N, 84, 84, 4]) -> float64 [N, D]: what a one-game `QNetwork` embeds them as."""

    @jax.jit
    def embed(params: PyTree, stacks: jax.Array) -> jax.Array:
        return nnx.merge(graph, nnx.State(params)).embedded(stacks, np.zeros(len(stacks), np.int32))

    def features(params: PyTree, stacks: np.ndarray) -> np.ndarray:
        size = 64  # one size is one compiled program
        padded = np.concatenate([stacks, stacks[:1].repeat(-len(stacks) % size, axis=0)])
        parts = [np.asarray(embed(params, part), np.float64) for part in np.split(padded, len(padded) // size)]
        return np.concatenate(parts)[: len(stacks)]

    return features


def read_out(features: np.ndarray, values: np.ndarray, episode: np.ndarray) -> np.ndarray:
    """Explained variance of values in held-out episodes by ridge regression on features.

    The last quarter of the episodes is held out. The penalty is chosen, for all values together, on the quarter before
    it, and the regression then fitted on all that is not held out.

    Args:
        features: float64 [N, D].
        values: float64 [N, V].
        episode: int [N].

    Returns:
        R² float64 [V]: 1 is perfect, 0 no better than the mean; NaN of values that do not vary.

    Raises:
        ValueError: fewer than four episodes.
    """
    numbers = np.unique(episode)
    if len(numbers) < 4:
        raise ValueError(f"{len(numbers)} episodes; a read-out needs four. Observe more moments.")
    test, check = (np.isin(episode, part) for part in (numbers[-(len(numbers) // 4) :], _third_quarter(numbers)))
    fit = ~test & ~check
    scores = [np.nanmean(_ridge(features, values, fit, check, penalty)) for penalty in PENALTIES]
    return _ridge(features, values, ~test, test, PENALTIES[int(np.argmax(scores))])


def _third_quarter(numbers: np.ndarray) -> np.ndarray:
    quarter = len(numbers) // 4
    return numbers[-2 * quarter : -quarter]


def _ridge(features: np.ndarray, values: np.ndarray, fit: np.ndarray, test: np.ndarray, penalty: float) -> np.ndarray:
    """R² of each value on `test`, in dual form: there are more features than moments."""
    mean, target_mean = features[fit].mean(0), values[fit].mean(0)
    x, new = features[fit] - mean, features[test] - mean
    kernel = x @ x.T
    weights = np.linalg.solve(kernel + penalty * np.trace(kernel) / len(x) * np.eye(len(x)), values[fit] - target_mean)
    residual = values[test] - target_mean - new @ (x.T @ weights)
    total = np.square(values[test] - values[test].mean(0)).sum(0)
    varies = (total > 0) & (values[fit].std(0) > 0)
    return np.where(varies, 1 - np.square(residual).sum(0) / np.where(varies, total, 1), np.nan)


def compare(observed: Observed, features: Mapping[str, np.ndarray], game: str) -> pd.DataFrame:
    """How well each encoder's features predict the RAM.

    Args:
        observed: from `observe`.
        features: by the name of an encoder, [N, D] of the same moments.
        game: for the names of bytes.

    Returns:
        index variable (named bytes, then the mean over all that vary, negative ones as 0); a column of R² per
        encoder.
    """
    values = observed.ram.astype(np.float64)
    scores = {name: read_out(x, values, observed.episode) for name, x in features.items()}
    named = {words: byte for byte, words in NAMED.get(game, {}).items()}
    rows = {words: {name: r2[byte] for name, r2 in scores.items()} for words, byte in named.items()}
    varying = int(np.isfinite(next(iter(scores.values()))).sum())
    rows[f"mean of {varying} bytes"] = {name: np.nanmean(np.maximum(r2, 0)) for name, r2 in scores.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("variable")
