"""A small dataset on the accelerator: all frames decoded in its memory, batches gathered there."""

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from scaled_ql.replay.format import FRAME_SHAPE
from scaled_ql.replay.memory import BYTES_PER_FRAME, to_memory
from scaled_ql.replay.recording import Span
from scaled_ql.replay.store import Replay


class DeviceFrames:
    """Frames in a device's memory, 7 KB each; a batch's frames never leave it. See `store.RecordedFrames`."""

    is_shareable = False

    def __init__(self, replay: Replay, device: jax.Device | None = None):
        """Decode all frames of `replay` and put them on `device` (the default one).

        Raises:
            ReplayError: a damaged file.
        """
        self._places: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # places of a recording's rows among the frames
        blocks, count = [], 0
        for game in replay.games:
            for number, recording in enumerate(replay.recordings(game)):
                first, frames = replay.rows_in_use(game, number)
                order = np.argsort(first)
                first, frames = first[order], frames[order]
                self._places[id(recording)] = first, count + np.cumsum(frames) - frames - first
                blocks += recording.windows(first, first + frames - 1)
                count += int(frames.sum())
        self._frames = jax.device_put(np.concatenate(blocks), device)

    def __reduce__(self) -> tuple:
        raise TypeError("frames on a device cannot be handed to another process.")

    def read(self, spans: list[Span], shape: tuple[int, int], stack_size: int, out: None = None) -> jax.Array:
        """See `RecordedFrames.read`; the result is an array of the device, and there is no `out`."""
        places = np.empty(shape, np.int32)
        for span in spans:
            first, shift = self._places[id(span.recording)]
            place = shift[np.searchsorted(first, span.now, side="right") - 1]
            wanted = span.now[:, None] + np.arange(shape[1]) - stack_size + 1
            inside = (wanted >= span.earliest[:, None]) & (wanted <= span.then[:, None])
            places[span.places] = np.where(inside, wanted + place[:, None], -1)
        return _gather_frames(self._frames, places)


def to_device(replay: Replay, device: jax.Device | None = None) -> Replay:
    """Load a dataset or view: its frames, decoded, onto a device (the default one), the rest into memory.

    Raises:
        ReplayError: a damaged file.
    """
    replay = to_memory(replay)
    recordings = {game: replay.recordings(game) for game in replay.games}
    return Replay(replay.path, recordings, replay.view, DeviceFrames(replay, device))


@jax.jit
def _gather_frames(frames: jax.Array, places: np.ndarray) -> jax.Array:
    """Frames at places [...], uint8 [..., 84, 84]; place -1 is a frame of zeros."""
    return jnp.where((places >= 0)[..., None, None], frames[jnp.maximum(places, 0)], 0)


def place(replay: Replay, where: str = "auto") -> Replay:
    """Choose where a dataset is read from while training.

    Args:
        replay: an open dataset or view.
        where: ``"disk"``; ``"memory"``, compressed; ``"device"``, decoded on the accelerator; or ``"auto"``: on the
            accelerator if its decoded frames take at most 30% of that memory, else in memory if they take, estimated
            at 150 bytes each, at most half of what is free there, else on disk.

    Raises:
        ValueError: an unknown place.
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
    places = {"disk": lambda replay: replay, "memory": to_memory, "device": to_device}
    if where not in places:
        raise ValueError(f"where must be {', '.join(places)} or auto, got {where!r}")
    return places[where](replay)
