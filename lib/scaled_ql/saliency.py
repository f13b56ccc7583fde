"""Where an agent looks: how much its values change when a spot of what it sees is blurred.

Greydanus et al. (2018), "Visualizing and understanding Atari agents", section 3.1, for values instead of a policy and a
critic: the score of a spot is half the squared change of the values, summed over actions (their equation 2); of a
transformer's policy, that of its probabilities.
"""

import jax
import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from scaled_ql.episodes import Episode, seen
from scaled_ql.trained_agent import Agent

SPOT, BLUR = 5.0, 3.0  # standard deviations of a spot and of the blur, pixels; the paper's


def saliency(agent: Agent, episode: Episode, step: int, grid: int = 17) -> np.ndarray:
    """Score of spots all over an observation.

    All frames of a stack are blurred at the same spot; of a transformer's window the newest one alone: its past, and
    the return that it asks for there, stay what they were.

    Args:
        agent: from `load_agent`.
        episode: of one of its games.
        step: of the episode.
        grid: spots along each side, G: the middles of G x G equal squares.

    Returns:
        float64 [G, G], rows first; actions that the agent never plays do not count.
    """
    now = seen(agent, episode, np.s_[step : step + 1])
    frames = (now[0].frames if agent.memory else now[0])[0]
    at = (np.arange(grid) + 0.5) * frames.shape[-1] / grid - 0.5
    pixels = np.exp(-0.5 * np.square((np.arange(frames.shape[-1]) - at[:, None]) / SPOT))  # [G, 84]
    sharp = frames.astype(np.float32)
    change = gaussian_filter(sharp, (0, BLUR, BLUR)) - sharp
    if agent.memory:
        change[:-1] = 0
    spots = pixels[:, None, :, None] * pixels[None, :, None, :]  # [G, G, 84, 84], 1 in the middle of a spot
    blurred = np.rint(sharp + spots[:, :, None] * change).astype(np.uint8).reshape(-1, *frames.shape)
    first, *others = jax.tree.map(lambda x: x.repeat(1 + grid**2, axis=0), now)
    changed = np.concatenate([frames[None], blurred])
    first = first._replace(frames=changed) if agent.memory else changed
    values = agent.look(episode.game, first, *others).shown.astype(np.float64)
    difference = np.where(np.isfinite(values[1:]) & np.isfinite(values[0]), values[1:] - values[0], 0.0)
    return 0.5 * np.square(difference).sum(1).reshape(len(at), len(at))


def highlight(frame: np.ndarray, score: np.ndarray) -> np.ndarray:
    """A frame, uint8 [84, 84], with red where a score [G, G] of `saliency` is near its maximum: uint8 [84, 84, 3]."""
    share = score / max(float(score.max()), 1e-12)
    size = frame.shape[::-1]
    share = np.asarray(Image.fromarray(share.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    grey = frame.astype(np.float32) * (1 - 0.6 * share)
    red = grey + 230 * share
    return np.stack([red, grey, grey], axis=-1).clip(0, 255).astype(np.uint8)
