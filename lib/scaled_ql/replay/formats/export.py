"""Writing a dataset as DQN-Replay logs, for libraries that read those; `dqn_replay` has the layout.

The whole log is a sequence of rows: three of zeros, an episode, three of zeros, ... File k is what a ring of C
rows holds after (k + 1) C - 1 rows, so it can be written front to back, reading episodes as they come.
"""

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from isal import igzip

from scaled_ql.replay.format import FRAME_SHAPE, ReplayError, encode_manifest, local_folder
from scaled_ql.replay.formats.dqn_replay import BOUNDARY, COLUMNS, MANIFEST, PADDING
from scaled_ql.replay.store import Replay, open_replay

BLOCK = 4_096  # rows written together


def export_dqn_replay(
    store: Replay | str | os.PathLike, destination: str | os.PathLike, rows_per_file: int = 1_000_000
) -> None:
    """Write a dataset in the layout of DQN-Replay: ``<destination>/<Game>/<run>/replay_logs/``.

    Every episode ends with terminal 1, truncated ones too, as in the published logs. A fifth file, which other
    readers ignore, ``$store$_boundary_ckpt``, holds the rest: bit 0 marks the end of a truncated episode, bit 1 the
    start of one whose beginning was lost. Source, ROM and rules are in ``manifest.json``. Frames after an episode's
    last action and further columns of the episode table are not exported.

    Args:
        store: a dataset, its path, or a view of it.
        destination: a folder.
        rows_per_file: capacity C.

    Raises:
        ReplayError: the folder holds logs already, or cannot be written.
    """
    replay = store if isinstance(store, Replay) else open_replay(store)
    if rows_per_file < PADDING + 2:
        raise ReplayError(f"rows_per_file must be at least {PADDING + 2}, got {rows_per_file}.")
    for game in replay.games:
        for manifest in replay.manifests(game):
            folder = local_folder(destination) / game / str(manifest["run"]) / "replay_logs"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if any(folder.iterdir()):
                    raise ReplayError(f"{folder}: is not empty. Choose another destination, or delete it.")
                _export_recording(replay, game, manifest["run"], folder, rows_per_file)
                (folder / MANIFEST).write_bytes(encode_manifest(manifest))
            except OSError as error:
                raise ReplayError(f"{folder}: cannot be written ({error}). Make room, or choose another.") from error


def _export_recording(replay: Replay, game: str, run: int, folder: Path, capacity: int) -> None:
    log = _Log(replay, game, run)
    for number in range(-(-(log.num_rows + 1) // capacity)):
        count = min((number + 1) * capacity - 1, log.num_rows)
        partial = number > 0 and count < (number + 1) * capacity - 1
        names = ["observation", *COLUMNS, *([BOUNDARY] if log.has_boundaries else [])]
        files = {name: _create(folder, f"$store$_{name}", number) for name in names}
        for name, file in files.items():
            shape = (capacity, *FRAME_SHAPE) if name == "observation" else (capacity,)
            _write_header(file, COLUMNS.get(name, np.uint8), shape)
        for block in _ring_rows(count, capacity):
            for name, column in log.rows(block, names).items():
                files[name].write(np.ascontiguousarray(column))
        position = count % capacity
        small = {
            # The last, partial dump of a log saves the ring's position here.
            "add_count": np.array(position if partial else count, np.int64),
            "invalid_range": (position - 1 + np.arange(5)) % capacity,
        }
        for name, value in small.items():
            files[name] = _create(folder, name, number)
            _write_header(files[name], np.int64, value.shape)
            files[name].write(value.astype(np.int64).tobytes())
        for file in files.values():
            file.close()


def _create(folder: Path, name: str, number: int) -> igzip.IGzipFile:
    return igzip.IGzipFile(folder / f"{name}_ckpt.{number}.gz", "wb", compresslevel=2, mtime=0)


def _write_header(file: igzip.IGzipFile, dtype: type, shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _ring_rows(count: int, capacity: int) -> Iterator[np.ndarray]:
    """Global numbers of a ring's rows after `count` rows, in its order; negative: never written."""
    for begin in range(0, capacity, BLOCK):
        ring = np.arange(begin, min(begin + BLOCK, capacity))
        yield count - 1 - (count - 1 - ring) % capacity


class _Log:
    """One run as a sequence of rows, each episode after three rows of zeros."""

    def __init__(self, replay: Replay, game: str, run: int):
        table = replay.episodes(game)
        table = table[table["run"] == run]
        self._numbers = table.index.to_numpy()
        self._length = table["length"].to_numpy()
        self._start = np.cumsum(self._length + PADDING) - self._length
        self._truncated, self._continued = table["truncated"].to_numpy(), table["continued"].to_numpy()
        self.num_rows = int(self._start[-1] + self._length[-1])
        self.has_boundaries = bool(self._truncated.any() or self._continued.any())
        self._episode = lru_cache(maxsize=4)(lambda number: replay.episode(game, int(self._numbers[number])))

    def rows(self, numbers: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
        """Columns of the rows with the given global numbers; zeros for padding and for rows never written."""
        columns = {
            name: np.zeros((len(numbers), *(FRAME_SHAPE if name == "observation" else ())), COLUMNS.get(name, np.uint8))
            for name in names
        }
        episode = np.searchsorted(self._start, numbers, side="right") - 1
        step = numbers - self._start[episode]
        inside = (episode >= 0) & (step < self._length[episode])
        for number in np.unique(episode[inside]):
            here = np.flatnonzero(inside & (episode == number))
            contents, last = self._episode(int(number)), self._length[number] - 1
            for name in ("observation", "action", "reward"):
                columns[name][here] = contents[name][step[here]]
            columns["terminal"][here] = step[here] == last
            if BOUNDARY in columns:
                columns[BOUNDARY][here] = (step[here] == last) * self._truncated[number]
                columns[BOUNDARY][here] += (2 * (step[here] == 0) * self._continued[number]).astype(np.uint8)
        return columns
