"""A small dataset on the accelerator: all frames decoded in its memory, batches gathered there."""

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from scaled_ql.replay.format import FRAME_SHAPE
from scaled_ql.replay.memory import BYTES_PER_FRAME, to_memory
from scaled_ql.replay.store import Replay, Run, Span


class DeviceReplay(Replay):
    """A dataset, or view, whose frames are in a device's memory, 7 KB each; a batch's frames never leave it.

    Raises:
        ReplayError: a damaged file.
    """

    def __init__(self, replay: Replay, device: jax.Device | None = None):
        """Decode all frames of `replay` and put them on `device` (the default one)."""
        replay = to_memory(replay)
        super().__init__(replay.path, {game: replay.runs(game) for game in replay.games}, replay.view)
        self._places: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # of a run's rows among the frames
        blocks, count = [], 0
        for game in self.games:
            for number, run in enumerate(self.runs(game)):
                first, frames = self.rows_in_use(game, number)
                order = np.argsort(first)
                first, frames = first[order], frames[order]
                self._places[id(run)] = first, count + np.cumsum(frames) - frames - first
                blocks += run.windows(first, first + frames - 1)
                count += int(frames.sum())
        self._frames = jax.device_put(np.concatenate(blocks), device)

    def _read_frames(
        self, spans: list[tuple[np.ndarray, Run, Span]], shape: tuple[int, int], stack_size: int
    ) -> jax.Array:
        """As in `Replay`, an array of the device."""
        places = np.empty(shape, np.int32)
        for rows, run, span in spans:
            first, shift = self._places[id(run)]
            place = shift[np.searchsorted(first, span.now, side="right") - 1]
            wanted = span.now[:, None] + np.arange(shape[1]) - stack_size + 1
            inside = (wanted >= span.earliest[:, None]) & (wanted <= span.then[:, None])
            places[rows] = np.where(inside, wanted + place[:, None], -1)
        return _gather_frames(self._frames, places)


@jax.jit
def _gather_frames(frames: jax.Array, places: np.ndarray) -> jax.Array:
    """Frames at places [...], uint8 [..., 84, 84]; place -1 is a frame of zeros."""
    return jnp.where((places >= 0)[..., None, None], frames[jnp.maximum(places, 0)], 0)


def place(replay: Replay, where: str = "auto") -> Replay:
    """Choose where a dataset is read from while training.

    Args:
        replay: an open dataset or view.
        where: ``"disk"``; ``"memory"``, compressed; ``"device"``, decoded on the accelerator; or ``"auto"``: on the
            accelerator if its decoded frames take at most 30% of that memory, else in memory if they take, reckoned
            with 150 bytes each, at most half of what is free there, else on disk.

    Raises:
        ValueError: another word.
        ReplayError: a damaged file.
    """
    if where == "auto":
        frames = replay.num_frames
        device = jax.local_devices()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit", 0) if device.platform != "cpu" else 0
        if frames * FRAME_SHAPE[0] * FRAME_SHAPE[1] <= 0.3 * limit:
            where = "device"
        elif frames * BYTES_PER_FRAME <= 0.5 * psutil.virtual_memory().available:
            where = "memory"
        else:
            where = "disk"
    places = {"disk": lambda replay: replay, "memory": to_memory, "device": DeviceReplay}
    if where not in places:
        raise ValueError(f"a dataset is read from {', '.join(places)} or auto, got {where!r}")
    return places[where](replay)
