"""Reading one recording: one game and run of a replay; `scaled_ql.replay.format` documents the layout on disk."""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

import numpy as np
import pandas as pd
import pyarrow as pa
import tensorstore as ts

from scaled_ql.replay import format as fmt
from scaled_ql.replay.chunks import Chunks, Read, read_files
from scaled_ql.replay.format import ARRAYS, ReplayError, file_name

T = TypeVar("T")

VALIDATED_TOGETHER = 8_192  # rows
BLANK_ROWS = 100  # consecutive, black, with action 0 and reward 0: more than any game and player produce


class Recording:
    """One game and run of a replay, read-only: manifest, episode table and arrays, on any storage of TensorStore.

    Attributes:
        kvstore: its folder.
        manifest: content of its `manifest.json`.
        table: Arrow table of its episodes, in time order.
        folder: its folder on a local disk, or None.
    """

    def __init__(self, kvstore: ts.KvStore, manifest: dict[str, Any], table: pa.Table):
        self.kvstore, self.manifest, self.table = kvstore, manifest, table
        self.starts = table["start"].to_numpy()
        self.lengths = table["length"].to_numpy()
        self.num_transitions = int(self.starts[-1] + self.lengths[-1])
        parts = urlsplit(kvstore.url)
        self.folder = unquote(parts.path) if parts.scheme == "file" else None
        self.num_rows = int((table["row"].to_numpy() + table["frames"].to_numpy()).max())

    def __getstate__(self) -> dict[str, Any]:
        """State for another process, which opens the files again."""
        kind = type(self)
        return {k: v for k, v in vars(self).items() if not isinstance(getattr(kind, k, None), cached_property)}

    def open_array(self, name: str) -> ts.TensorStore:
        """Open one of the arrays for reading."""
        where = f"{self.kvstore.url}{name}"
        kvstore = (self.kvstore / f"{name}/").spec().to_json()
        spec = {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}  # missing is not zero
        try:
            array = ts.open(spec, open=True, read=True, dtype=ARRAYS[name]).result()
        except fmt.STORE_ERRORS as error:
            raise ReplayError(
                f"{where}: cannot open this array ({fmt.said(error)}). Restore the folder from a copy."
            ) from error
        if array.shape[0] < self.num_rows:
            raise ReplayError(
                f"{where}: holds {array.shape[0]} rows, but the episode table promises {self.num_rows}. "
                "Restore the folder from a copy."
            )
        return array

    @cached_property
    def arrays(self) -> dict[str, ts.TensorStore]:
        """All arrays, opened on first use."""
        return {name: self.open_array(name) for name in ARRAYS}

    def reading(self, read: Callable[[], T], name: str) -> T:
        """Run a read; a checksum or decoding error names the array and the remedy."""
        try:
            return read()
        except fmt.STORE_ERRORS as error:
            raise ReplayError(
                f"{self.kvstore.url}{name}: a chunk is damaged or missing ({fmt.said(error)}). Restore the folder "
                "from a copy, or delete it and record or import it again."
            ) from error

    def read_last_row(self) -> None:
        """Read the end of every array, to detect lost files early.

        Raises:
            ReplayError: it cannot be read.
        """
        for name in ARRAYS:
            last = self.open_array(name)[self.num_rows - 1]
            self.reading(lambda last=last: last.read().result(), name)

    def values(self, name: str, first: np.ndarray, last: np.ndarray, width: int = 1) -> np.ndarray:
        """One column at rows first[i]..last[i], inclusive, at most `width` of them: [B, width], padded with zeros."""
        rows = first[:, None] + np.arange(width)
        read = self.reading(lambda: self.arrays[name][np.minimum(rows, last[:, None])].read().result(), name)
        return np.where(rows <= last[:, None], read, np.zeros((), ARRAYS[name]))

    def windows(self, first: np.ndarray, last: np.ndarray) -> list[np.ndarray]:
        """Frames first[i]..last[i], inclusive, all windows in one read operation."""

        def read() -> list[np.ndarray]:
            frames = self.arrays["observation"]
            with ts.Batch() as batch:
                reads = [frames[a : b + 1].read(batch=batch) for a, b in zip(first.tolist(), last.tolist())]
            return [read.result() for read in reads]

        return self.reading(read, "observation")

    def read_windows(
        self, first: np.ndarray, last: np.ndarray
    ) -> Iterator[tuple[int, int, Callable[[np.ndarray], None]]]:
        """For each window, frames first[i]..last[i]: (first row of its piece, rows of the piece, how to read it).

        A piece is the window itself, or the whole chunks that contain it.
        """
        for begin, window in zip(first.tolist(), self.windows(first, last)):
            yield begin, len(window), partial(np.copyto, src=window)

    def stretches(self, name: str, first: np.ndarray, length: np.ndarray) -> np.ndarray:
        """Rows first[i] .. first[i] + length[i] - 1 of a column, one stretch after another."""
        if not len(first):
            return np.empty(0, ARRAYS[name])
        stops = first + length
        hole = self.arrays[name].chunk_layout.read_chunk.shape[0]  # as many rows may be a chunk that was never written
        breaks = np.flatnonzero((first[1:] < stops[:-1]) | (first[1:] - stops[:-1] >= hole)) + 1
        parts = []
        for group in np.split(np.arange(len(first)), breaks):
            low, high = int(first[group[0]]), int(stops[group[-1]])
            column = self.reading(lambda low=low, high=high: self.arrays[name][low:high].read().result(), name)
            if (first[group[1:]] == stops[group[:-1]]).all():
                parts.append(column)
            else:
                parts += [column[a - low : b - low] for a, b in zip(first[group], stops[group])]
        return np.concatenate(parts)


class ChunkedRecording(Recording, ABC):
    """A recording whose chunks can be read one by one without TensorStore; see `chunks`."""

    @property
    @abstractmethod
    def chunks(self) -> dict[str, Chunks]:
        """Readers of chunks by array name, at least for the frames."""

    def _open_chunks(self, name: str, make_read: Callable[[int], Read]) -> Chunks:
        layout, tail = self.arrays[name].chunk_layout, self.arrays[name].shape[1:]
        rows, shard = layout.read_chunk.shape[0], layout.write_chunk.shape[0]
        largest = 2 * rows * math.prod(tail) * np.dtype(ARRAYS[name]).itemsize + 1_024  # bytes of a sound chunk
        return Chunks(f"{self.kvstore.url}{name}", make_read(largest), np.dtype(ARRAYS[name]), tail, rows, shard)

    def read_windows(
        self, first: np.ndarray, last: np.ndarray
    ) -> Iterator[tuple[int, int, Callable[[np.ndarray], None]]]:
        """See `Recording.read_windows`; a piece is whole chunks."""
        chunks = self.chunks["observation"]
        for a, b in zip((first // chunks.rows).tolist(), (last // chunks.rows).tolist()):

            def read(target: np.ndarray, a: int = a, b: int = b) -> None:
                for place, number in enumerate(range(a, b + 1)):
                    chunks.read_into(number, target[place * chunks.rows : (place + 1) * chunks.rows])

            yield a * chunks.rows, (b + 1 - a) * chunks.rows, read


class LocalRecording(ChunkedRecording):
    """A recording on a local disk."""

    @cached_property
    def chunks(self) -> dict[str, Chunks]:
        """Readers of the files of all arrays that a batch needs."""

        def path(name: str, number: int) -> str:
            return self.folder + file_name(name, number)

        names = ("observation", "action", "reward")
        return {name: self._open_chunks(name, partial(read_files, partial(path, name))) for name in names}

    def values(self, name: str, first: np.ndarray, last: np.ndarray, width: int = 1) -> np.ndarray:
        """See `Recording.values`."""
        values, chunks = np.zeros((len(first), width), ARRAYS[name]), self.chunks[name]
        size = chunks.rows
        for place, (begin, end) in enumerate(zip(first.tolist(), last.tolist())):
            for number in range(begin // size, end // size + 1):
                low, high = max(begin, number * size), min(end + 1, (number + 1) * size)
                part = chunks[number][low - number * size : high - number * size]
                values[place, low - begin : high - begin] = part
        return values


class Span(NamedTuple):
    """Transitions of one recording in a batch: their places in it, and their rows in the arrays, int64 [B].

    Attributes:
        recording: the recording.
        places: places in the batch.
        now: row of the transition.
        then: row of the frame that `next_observation` ends with.
        earliest: row of the observation's first frame; no earlier than the episode's first row.
        last: row of the episode's last transition.
        terminal: bool [B], the episode ends in the game there; False: it was truncated.
    """

    recording: Recording
    places: np.ndarray
    now: np.ndarray
    then: np.ndarray
    earliest: np.ndarray
    last: np.ndarray
    terminal: np.ndarray

    def actions(self) -> np.ndarray:
        """[B], indices in the game's minimal action set."""
        return self.recording.values("action", self.now, self.now)[:, 0]

    def returns(self, n_step: int, discount: float, clip_rewards: bool) -> np.ndarray:
        """float64 [B], n-step returns, cut at the episode's end."""
        last = np.minimum(self.now + n_step - 1, self.last)
        rewards = self.recording.values("reward", self.now, last, n_step).astype(np.float64)
        if clip_rewards:
            rewards = rewards.clip(-1, 1)
        return rewards @ discount ** np.arange(n_step)


def read_file(kvstore: ts.KvStore, name: str) -> bytes | None:
    """Read a file; None if it does not exist.

    Raises:
        ReplayError: it cannot be read.
    """
    try:
        found = kvstore.read(name).result()
    except fmt.STORE_ERRORS as error:
        raise ReplayError(
            f"{kvstore.url}{name}: cannot be read ({fmt.said(error)}). Check the address and your permissions, or "
            "restore the folder from a copy."
        ) from error
    return found.value if found.state == "value" else None


def open_recording(kvstore: ts.KvStore) -> Recording | None:
    """Open one game and run; None if no episode is complete yet."""
    described = read_file(kvstore, "manifest.json") or b""
    manifest = fmt.read_manifest(described, f"{kvstore.url}manifest.json")
    # The journal first: a writer that moves it into the table meanwhile leaves both, never neither.
    journal = read_file(kvstore, "episodes.jsonl") or b""
    table = _read_table(kvstore)
    starts, lengths = table["start"].to_numpy(), table["length"].to_numpy()
    if not np.array_equal(starts, np.cumsum(lengths) - lengths):
        raise ReplayError(f"{kvstore.url}episodes.arrow: its episodes are not contiguous. Restore it.")
    checked, covered = fmt.has_checksums(described), int(lengths.sum())
    rows, _ = fmt.parse_journal(journal, f"{kvstore.url}episodes.jsonl", covered, checked)
    if rows:
        tables = [table] if table.num_rows else []
        table = pa.concat_tables([*tables, pa.Table.from_pylist(rows)], promote_options="permissive")
    if not table.num_rows:
        return None
    kind = LocalRecording if urlsplit(kvstore.url).scheme == "file" else Recording
    return kind(kvstore, manifest, table.combine_chunks())


def _read_table(kvstore: ts.KvStore) -> pa.Table:
    where = f"{kvstore.url}episodes.arrow"
    parts = urlsplit(kvstore.url)
    if parts.scheme == "file":
        file = Path(unquote(parts.path)) / "episodes.arrow"
        if not file.exists():
            return fmt.empty_table()
        try:
            with pa.memory_map(str(file)) as mapped:
                return fmt.read_table(mapped.read_buffer(), where)
        except OSError as error:
            raise ReplayError(f"{where}: cannot be read ({error}). Restore the folder from a copy.") from error
    content = read_file(kvstore, "episodes.arrow")
    return fmt.empty_table() if content is None else fmt.read_table(pa.py_buffer(content), where)


def validate_recording(recording: Recording, progress: Callable[[int], None] = lambda transitions: None) -> list[str]:
    """Read a recording and compare it with its episode table; returns one line per problem.

    Raises:
        ReplayError: an array cannot be opened.
    """
    problems = []
    limit = len(recording.manifest["actions"])
    table = recording.table.to_pandas().sort_values("row", kind="stable")
    row, stop = table["row"].to_numpy(), (table["row"] + table["frames"]).to_numpy()
    hole = recording.arrays["observation"].chunk_layout.read_chunk.shape[0]  # may be a chunk that was never written
    breaks = (np.diff(row // VALIDATED_TOGETHER) > 0) | (row[1:] - stop[:-1] >= hole)
    groups = [group for _, group in table.groupby(np.concatenate([[0], np.cumsum(breaks)]))]
    ahead = _read_group(recording, groups[0])
    for number, group in enumerate(groups):
        reads, ahead = ahead, _read_group(recording, groups[number + 1]) if number + 1 < len(groups) else {}
        low = int(group["row"].iloc[0])
        columns = {}
        for name, read in reads.items():
            try:
                columns[name] = recording.reading(read.result, name)
            except ReplayError as error:
                first, last = group.iloc[0], group.iloc[-1]
                where = f"transitions {first.start}..{last.start + last.length - 1}"
                problems.append(f"{recording.kvstore.url} {where}: {error}")
        if len(columns) < len(reads):
            continue
        for row in group.itertuples():
            where = (
                f"{recording.kvstore.url} episode {row.Index} (transitions {row.start}..{row.start + row.length - 1})"
            )
            here = slice(row.row - low, row.row - low + row.length)
            frames = columns["observation"][row.row - low : row.row - low + row.frames]
            action, reward = columns["action"][here], columns["reward"][here]
            crc32 = fmt.frame_crc32s(frames)
            if zlib.crc32(fmt.step_records(crc32, action, reward)) != row.crc32:
                problems.append(f"{where}: contents differ from the recorded CRC-32.")
            blank = _longest((crc32[: row.length] == fmt.BLACK) & (action == 0) & (reward == 0))
            if blank >= BLANK_ROWS:
                problems.append(
                    f"{where}: {blank} consecutive rows are black, with action 0 and reward 0, like rows of a replay "
                    "buffer that were never written. Import it again."
                )
            if action.min() < 0 or action.max() >= limit:
                problems.append(f"{where}: actions outside 0..{limit - 1}.")
            for name in ("terminal", "truncated"):
                if columns[name][here][-1] != getattr(row, name) or columns[name][here][:-1].any():
                    problems.append(f"{where}: {name} flags differ from the episode table.")
            progress(row.length)
    return problems


def _longest(marked: np.ndarray) -> int:
    """Length of the longest stretch of True in bool [N]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marked, [False]])))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def _read_group(recording: Recording, group: pd.DataFrame) -> dict[str, ts.Future]:
    """Start reading all columns of neighbouring episodes."""
    low, high = int(group["row"].iloc[0]), int((group["row"] + group["frames"]).max())
    return {name: array[low:high].read() for name, array in recording.arrays.items()}
