"""Reading a replay store; `scaled_ql.replay.format` says how it lies on disk."""

import hashlib
import json
import math
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

import numpy as np
import pandas as pd
import pyarrow as pa
import tensorstore as ts

from scaled_ql.games import OtherActions, check_actions
from scaled_ql.replay import format as fmt
from scaled_ql.replay.chunks import Chunks, Read, read_files
from scaled_ql.replay.format import ARRAYS, FORMAT, FRAME_SHAPE, ReplayError, file_name
from scaled_ql.replay.views import Episodes, View, drawn_transitions, load_view, select_episodes

T = TypeVar("T")

READ_TOGETHER = 32  # windows
VALIDATED_TOGETHER = 8_192  # rows
BLANK_ROWS = 100  # in a row with a black frame, action 0 and no reward: no game and no player makes so many


class Batch(NamedTuple):
    """B transitions with n-step returns (a pytree of arrays: NumPy's where it was read, JAX's inside a program).

    The two frame stacks of a transition share frames, so what is kept, and sent to an accelerator, is each frame once;
    `observation` and `next_observation` are cut from them where they are used.

    Attributes:
        frames: uint8 [B, S + n, 84, 84], t - S + 1 .. t + n, oldest first; those before the episode's start, and after
            the last that `next_observation` shows, are zero.
        next_stack: int32 [B, S], which of these make `next_observation`.
        action: int32 [B], index in the game's minimal action set.
        reward: float32 [B], sum over k < n of discount^k r_{t+k}, cut at the episode's end.
        discount: float32 [B], discount^n, or 0 where the episode terminated within the n steps.
        game: int32 [B], index into the replay's `games`.
    """

    frames: np.ndarray
    next_stack: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    discount: np.ndarray
    game: np.ndarray

    @property
    def observation(self) -> np.ndarray:
        """uint8 [B, 84, 84, S], the stack at t, oldest frame first."""
        return self.frames[:, : self.next_stack.shape[1]].transpose(0, 2, 3, 1)

    @property
    def next_observation(self) -> np.ndarray:
        """uint8 [B, 84, 84, S], the stack at t + n; where `discount` is 0, the episode's last one."""
        rows = np.arange(len(self.next_stack))[:, None]
        return self.frames[rows, self.next_stack].transpose(0, 2, 3, 1)

    @classmethod
    def of_stacks(
        cls,
        observation: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        discount: np.ndarray,
        next_observation: np.ndarray,
        game: np.ndarray,
    ) -> "Batch":
        """A batch from two stacks of frames each, [B, H, W, S], that share nothing."""
        size, stack = observation.shape[0], observation.shape[-1]
        frames = np.concatenate([observation, next_observation], axis=-1).transpose(0, 3, 1, 2)
        next_stack = np.tile(np.arange(stack, 2 * stack, dtype=np.int32), (size, 1))
        return cls(frames, next_stack, action, reward, discount, game)


class Run:
    """One game and run on disk or behind a URL, read-only: its manifest, its episode table, its arrays.

    Attributes:
        kvstore: its folder.
        manifest: what it is.
        table: Arrow table of its episodes, in time order.
        folder: on a local disk, or None.
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
        """What another process needs, which opens the files anew."""
        kind = type(self)
        return {k: v for k, v in vars(self).items() if not isinstance(getattr(kind, k, None), cached_property)}

    def open_array(self, name: str) -> ts.TensorStore:
        """One of the arrays, for reading."""
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
        """All of them, opened on first use."""
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
        """Read the end of every array: what was lost as a whole is noticed at once.

        Raises:
            ReplayError: it cannot be read.
        """
        for name in ARRAYS:
            last = self.open_array(name)[self.num_rows - 1]
            self.reading(lambda last=last: last.read().result(), name)

    def _chunks(self, name: str, make_read: Callable[[int], Read]) -> Chunks:
        layout, tail = self.arrays[name].chunk_layout, self.arrays[name].shape[1:]
        rows, shard = layout.read_chunk.shape[0], layout.write_chunk.shape[0]
        largest = 2 * rows * math.prod(tail) * np.dtype(ARRAYS[name]).itemsize + 1_024  # bytes of a sound chunk
        return Chunks(f"{self.kvstore.url}{name}", make_read(largest), np.dtype(ARRAYS[name]), tail, rows, shard)

    @cached_property
    def chunks(self) -> dict[str, Chunks]:
        """What a batch needs, chunk by chunk; empty for a store that is not on a local disk."""
        if self.folder is None:
            return {}

        def path(name: str, number: int) -> str:
            return self.folder + file_name(name, number)

        names = ("observation", "action", "reward")
        return {name: self._chunks(name, partial(read_files, partial(path, name))) for name in names}

    def values(self, name: str, first: np.ndarray, last: np.ndarray, width: int = 1) -> np.ndarray:
        """One column at rows first[i]..last[i], inclusive, at most `width` of them: [B, width], zeros behind them."""
        values = np.zeros((len(first), width), ARRAYS[name])
        if not self.chunks:
            rows = first[:, None] + np.arange(width)
            read = self.reading(lambda: self.arrays[name][np.minimum(rows, last[:, None])].read().result(), name)
            return np.where(rows <= last[:, None], read, values)
        chunks = self.chunks[name]
        size = chunks.rows
        for place, (begin, end) in enumerate(zip(first.tolist(), last.tolist())):
            for number in range(begin // size, end // size + 1):
                low, high = max(begin, number * size), min(end + 1, (number + 1) * size)
                part = chunks[number][low - number * size : high - number * size]
                values[place, low - begin : high - begin] = part
        return values

    def windows(self, first: np.ndarray, last: np.ndarray) -> list[np.ndarray]:
        """Frames first[i]..last[i], inclusive: one read operation for all windows."""

        def read() -> list[np.ndarray]:
            frames = self.arrays["observation"]
            with ts.Batch() as batch:
                reads = [frames[a : b + 1].read(batch=batch) for a, b in zip(first.tolist(), last.tolist())]
            return [read.result() for read in reads]

        return self.reading(read, "observation")

    def read_windows(
        self, first: np.ndarray, last: np.ndarray
    ) -> Iterator[tuple[int, int, Callable[[np.ndarray], None]]]:
        """For each window, frames first[i]..last[i]: (row that its piece begins with, rows of that, how to read it).

        A piece is whole chunks where they can be read one by one, else just the window.
        """
        if self.chunks:
            chunks = self.chunks["observation"]
            for a, b in zip((first // chunks.rows).tolist(), (last // chunks.rows).tolist()):

                def read(target: np.ndarray, a: int = a, b: int = b) -> None:
                    for place, number in enumerate(range(a, b + 1)):
                        chunks.read_into(number, target[place * chunks.rows : (place + 1) * chunks.rows])

                yield a * chunks.rows, (b + 1 - a) * chunks.rows, read
        else:
            for begin, window in zip(first.tolist(), self.windows(first, last)):
                yield begin, len(window), partial(np.copyto, src=window)

    def stretches(self, name: str, first: np.ndarray, length: np.ndarray) -> np.ndarray:
        """Rows first[i] .. first[i] + length[i] - 1 of a column, one stretch after another."""
        if not len(first):
            return np.empty(0, ARRAYS[name])
        stops = first + length
        hole = self.arrays[name].chunk_layout.read_chunk.shape[0]  # so many rows may be a chunk that was never written
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


class Replay:
    """A read-only dataset, or the part of it that a view shows; see `open_replay`.

    Attributes:
        path: where it lies.
        view: which part of it this is.
        games: names of its games, sorted; a batch's `game` indexes this list.
    """

    def __init__(self, path: str, runs: dict[str, list[Run]], view: View | None = None):
        self.path, self.view = path, view or View()
        missing = sorted(set(self.view.games) - runs.keys())
        if missing:
            raise ReplayError(f"{path}: the view asks for {', '.join(missing)}; it has {', '.join(sorted(runs))}.")
        self.games = sorted(set(self.view.games) or runs)
        self._runs = {
            game: [run for run in runs[game] if not self.view.runs or run.manifest["run"] in self.view.runs]
            for game in self.games
        }
        self._episodes = {game: self._join_episodes(game) for game in self.games}
        for game, episodes in self._episodes.items():
            if not len(episodes.start):
                has = [run.manifest["run"] for run in runs[game]]
                raise ReplayError(
                    f"{path}: the view leaves nothing of {game}: {self.view.model_dump(exclude_defaults=True)}; "
                    f"it has the runs {has}."
                )
        self._local = threading.local()
        self.sampleable = lru_cache(maxsize=None)(self._sampleable)
        self._ranks = lru_cache(maxsize=None)(self._sampleable_ranks)

    def __reduce__(self) -> tuple:
        """For another process; it sees the same episodes, even if the store has grown since."""
        if type(self) is not Replay:
            raise TypeError(f"a {type(self).__name__} cannot be handed to another process.")
        return Replay, (self.path, self._runs, self.view)

    def _join_episodes(self, game: str) -> Episodes:
        columns: dict[str, list[np.ndarray]] = {name: [] for name in Episodes._fields}
        for number, run in enumerate(self._runs[game]):
            chosen = select_episodes(self.view, run.starts, run.lengths)
            columns["run"].append(np.full(chosen.stop - chosen.start, number, np.int32))
            columns["entry"].append(np.arange(chosen.start, chosen.stop))
            for name in ("length", "row", "frames", "terminal", "continued"):
                columns[name].append(run.table[name].to_numpy()[chosen])
        joined = {name: np.concatenate(parts) for name, parts in columns.items() if parts and name != "start"}
        if not joined:
            return Episodes(*[np.empty(0, np.int64)] * len(Episodes._fields))
        return Episodes(start=np.cumsum(joined["length"]) - joined["length"], **joined)

    def _game_runs(self, game: str) -> list[Run]:
        if game not in self._runs:
            raise ReplayError(f"{self.path}: no game {game!r}; it has {', '.join(self.games)}.")
        return self._runs[game]

    def num_transitions(self, game: str) -> int:
        """Transitions of a game in this view, all runs together, before `view.uniform` thins them out."""
        self._game_runs(game)
        episodes = self._episodes[game]
        return int(episodes.start[-1] + episodes.length[-1])

    @property
    def num_frames(self) -> int:
        """Stored frames of all games in this view."""
        return sum(int(episodes.frames.sum()) for episodes in self._episodes.values())

    def manifests(self, game: str) -> list[dict[str, Any]]:
        """What is known of each recording of a game: source, actions, stickiness, ROM, ..."""
        return [run.manifest for run in self._game_runs(game)]

    def runs(self, game: str) -> list[Run]:
        """The recordings of a game, in the order of their numbers."""
        return list(self._game_runs(game))

    def rows_in_use(self, game: str, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(first, frames), int64 [episodes]: the rows of a game's number-th recording that this view shows."""
        episodes = self._episodes[game]
        here = episodes.run == number
        return episodes.row[here], episodes.frames[here]

    def import_reports(self, game: str) -> list[dict[str, Any]]:
        """`import.json` of each imported recording of a game, with its run: files, gaps, what was left out."""
        reports = []
        for run in self._game_runs(game):
            content = _read_file(run.kvstore, "import.json")
            if content is not None:
                report = fmt.read_report(content, f"{run.kvstore.url}import.json")
                reports.append({"run": run.manifest["run"], **report})
        return reports

    def action_names(self, game: str) -> list[str]:
        """The game's minimal action set, as recorded."""
        return self._game_runs(game)[0].manifest["actions"]

    def episodes(self, game: str) -> pd.DataFrame:
        """Episode table in time order: start (index t of the first transition), length, row, frames, episode_return,
        terminal, truncated, continued, crc32, whatever the recorder added, and run."""
        runs, episodes = self._game_runs(game), self._episodes[game]
        tables = []
        for number, run in enumerate(runs):
            here = episodes.run == number
            chosen = run.table.take(pa.array(episodes.entry[here]))
            tables.append(chosen.to_pandas().assign(run=run.manifest["run"], start=episodes.start[here]))
        return pd.concat(tables, ignore_index=True)

    def actions(self, game: str) -> np.ndarray:
        """int32 [T], every action of a game in time order."""
        return self._column(game, "action").astype(np.int32)

    def rewards(self, game: str) -> np.ndarray:
        """float32 [T], every reward of a game in time order, unclipped where known."""
        return self._column(game, "reward")

    def _column(self, game: str, name: str) -> np.ndarray:
        parts = []
        for number, run in enumerate(self._game_runs(game)):
            here = self._episodes[game].run == number
            parts.append(run.stretches(name, self._episodes[game].row[here], self._episodes[game].length[here]))
        return np.concatenate(parts)

    def episode(self, game: str, number: int) -> dict[str, np.ndarray]:
        """One episode, by its place in `episodes`.

        Returns:
            observation uint8 [L, 84, 84], or [L + 1, 84, 84] where the frame after the last action is stored,
            action uint8 [L], reward float32 [L].
        """
        run = self._game_runs(game)[self._episodes[game].run[number]]
        episodes = self._episodes[game]
        row, length, frames = (int(column[number]) for column in (episodes.row, episodes.length, episodes.frames))
        where = np.array([row]), np.array([length])
        return {
            "observation": run.windows(where[0], where[0] + frames - 1)[0],
            **{name: run.stretches(name, *where) for name in ("action", "reward")},
        }

    def frames_at(self, game: str, indices: np.ndarray) -> np.ndarray:
        """uint8 [N, 84, 84], the single frames at time indices of a game."""
        indices = np.asarray(indices, np.int64)
        frames = np.empty((len(indices), *FRAME_SHAPE), np.uint8)
        for part, run, episode, step in self._locate(game, indices):
            rows = self._episodes[game].row[episode] + step
            frames[part] = np.concatenate(run.windows(rows, rows))
        return frames

    def _locate(self, game: str, indices: np.ndarray) -> Iterator[tuple[np.ndarray, Run, np.ndarray, np.ndarray]]:
        """Split time indices of a game by run: (places in `indices`, the run, episode, step within the episode)."""
        total = self.num_transitions(game)
        if len(indices) and (indices.min() < 0 or indices.max() >= total):
            raise ReplayError(
                f"{self.path}: {game} has transitions 0..{total - 1}, asked for {indices.min()}..{indices.max()}."
            )
        episodes = self._episodes[game]
        episode = np.searchsorted(episodes.start, indices, side="right") - 1
        step = indices - episodes.start[episode]
        for number, run in enumerate(self._game_runs(game)):
            part = np.flatnonzero(episodes.run[episode] == number)
            if len(part):
                yield part, run, episode[part], step[part]

    def _sampleable(self, game: str, n_step: int, stack_size: int = 4) -> tuple[np.ndarray, np.ndarray]:
        """(start, count), int64: transitions start .. start + count - 1 of each stretch may be sampled.

        That is all of an episode that terminated; in a truncated one those whose state n steps later is stored; in
        one whose beginning was lost those whose whole frame stack is stored. A uniform view has a stretch of one
        for each transition that it drew and that may be sampled.
        """
        self._game_runs(game)
        episodes = self._episodes[game]
        skip = np.where(episodes.continued, stack_size - 1, 0)
        beyond = episodes.frames - episodes.length
        cut = np.where(episodes.terminal, 0, np.maximum(n_step - beyond, 0))
        start = episodes.start + skip
        count = np.maximum(episodes.length - skip - cut, 0)
        if self.view.uniform < 1:
            drawn = drawn_transitions(self.view, game, self.num_transitions(game))
            episode = np.searchsorted(episodes.start, drawn, side="right") - 1
            start = drawn[(drawn >= start[episode]) & (drawn < start[episode] + count[episode])]
            count = np.ones_like(start)
        if not count.any():
            raise ReplayError(
                f"{self.path}: {game} has no transition with a state {n_step} steps later: all its episodes are "
                f"truncated and no longer than n_step = {n_step}. Use a smaller n_step or more data."
            )
        return start, count

    def _sampleable_ranks(self, game: str, n_step: int, stack_size: int) -> np.ndarray:
        return np.cumsum(self.sampleable(game, n_step, stack_size)[1])

    def draw(self, game: str, uniform: np.ndarray, n_step: int, stack_size: int = 4) -> np.ndarray:
        """Map uniform numbers in [0, 1) to time indices, int64, each sampleable transition equally likely."""
        start, count = self.sampleable(game, n_step, stack_size)
        ends = self._ranks(game, n_step, stack_size)
        rank = (uniform * ends[-1]).astype(np.int64)
        stretch = np.searchsorted(ends, rank, side="right")
        return start[stretch] + rank - (ends[stretch] - count[stretch])

    def batch(
        self,
        game: str,
        indices: Any,
        n_step: int = 3,
        discount: float = 0.99,
        stack_size: int = 4,
        clip_rewards: bool = True,
    ) -> Batch:
        """The transitions of a game at time indices t, with n-step returns.

        Args:
            game: one of `games`.
            indices: integers [B]; t is the game's t-th transition in time order.
            n_step: steps summed before bootstrapping.
            discount: per step.
            stack_size: frames in an observation.
            clip_rewards: clip each step's reward to [-1, 1] before summing.

        Raises:
            ReplayError: an index out of range, a transition that has no successor because its episode was
                truncated within the n steps, or a damaged chunk.
        """
        indices = np.atleast_1d(np.asarray(indices))
        if not np.issubdtype(indices.dtype, np.integer) or indices.ndim > 1:
            raise ReplayError(f"indices are a list of integers, got {indices.dtype} {indices!r}.")
        self._game_runs(game)
        games = np.full(len(indices), self.games.index(game), np.int32)
        return self.gather(games, indices, n_step, discount, stack_size, clip_rewards)

    def gather(
        self,
        games: np.ndarray,
        indices: np.ndarray,
        n_step: int = 3,
        discount: float = 0.99,
        stack_size: int = 4,
        clip_rewards: bool = True,
        out: np.ndarray | None = None,
    ) -> Batch:
        """Transitions of several games: int32 [B] into `games` and int [B] time indices; otherwise as `batch`.

        Args:
            out: uint8 [B, stack_size + n_step, 84, 84], contiguous, that the frames are written to and the batch
                shows; by default new memory. Not for a dataset that is on a device.
        """
        if n_step < 1 or stack_size < 1:
            raise ReplayError(f"n_step and stack_size are at least 1, got {n_step} and {stack_size}.")
        size = len(indices)
        action, reward, discounts = np.empty(size, np.int32), np.empty(size, np.float32), np.empty(size, np.float32)
        spans = list(self._spans(games, indices, n_step, stack_size))
        for places, run, span in spans:
            action[places] = run.values("action", span.now, span.now)[:, 0]
            reward[places] = span.returns(run, n_step, discount, clip_rewards)
            discounts[places] = np.where(span.ended, 0.0, discount**n_step)
        next_stack = np.empty((size, stack_size), np.int32)
        for places, _, span in spans:
            next_stack[places] = (span.then - span.now)[:, None] + np.arange(stack_size)
        read = self._read_frames if out is None else partial(self._read_frames, out=out)
        frames = read(spans, (size, stack_size + n_step), stack_size)
        return Batch(frames, next_stack, action, reward, discounts, games)

    def _read_frames(
        self,
        spans: list[tuple[np.ndarray, Run, "Span"]],
        shape: tuple[int, int],
        stack_size: int,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """The frames of a batch, uint8 [*shape, 84, 84]: those from `stack_size` - 1 before t on."""
        size, width = shape
        frames = np.empty((size, width, *FRAME_SHAPE), np.uint8) if out is None else out
        windows: list = [None] * size
        first, earliest, last = np.empty((3, size), np.int64)
        for places, run, span in spans:
            first[places], earliest[places], last[places] = span.now - stack_size + 1, span.earliest, span.then
            for place, window in zip(places.tolist(), run.read_windows(span.earliest, span.then)):
                windows[place] = window
        for begin in range(0, size, READ_TOGETHER):
            group = slice(begin, begin + READ_TOGETHER)
            self._cut_windows(frames[group], windows[group], first[group], earliest[group], last[group])
        return frames

    def _cut_windows(
        self, frames: np.ndarray, windows: list, first: np.ndarray, earliest: np.ndarray, last: np.ndarray
    ) -> None:
        """Fill uint8 [B, width, 84, 84] with rows first, first + 1, ...; with 0 outside `earliest` .. `last`.

        The windows are read into one buffer, small enough to stay in the processor's cache, and copied from there in
        one go: little work for Python, so that several threads can read at once.
        """
        needed = 1 + sum(rows for _, rows, _ in windows)
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < needed:
            buffer = self._local.buffer = np.zeros((needed, *FRAME_SHAPE), np.uint8)  # the first stays black
        at, shift = 1, []
        for begin, rows, read in windows:
            read(buffer[at : at + rows])
            shift.append(at - begin)
            at += rows
        wanted = first[:, None] + np.arange(frames.shape[1])
        inside = (wanted >= earliest[:, None]) & (wanted <= last[:, None])
        np.take(buffer, np.where(inside, wanted + np.array(shift)[:, None], 0), axis=0, out=frames, mode="clip")

    def _spans(
        self, games: np.ndarray, indices: np.ndarray, n_step: int, stack_size: int
    ) -> Iterator[tuple[np.ndarray, Run, "Span"]]:
        """Split transitions of several games by run: (places in the batch, the run, which rows make them)."""
        for number in np.unique(games):
            game, places = self.games[number], np.flatnonzero(games == number)
            for part, run, episode, step in self._locate(game, indices[places].astype(np.int64)):
                yield places[part], run, self._span(game, run, episode, step, n_step, stack_size)

    def _span(self, game: str, run: Run, episode: np.ndarray, step: np.ndarray, n_step: int, stack_size: int) -> "Span":
        """Which rows of a run's arrays make the transitions at the given steps of episodes."""
        episodes = self._episodes[game]
        first, length = episodes.row[episode], episodes.length[episode]
        frames = episodes.frames[episode]
        ended = episodes.terminal[episode] & (step + n_step >= length)
        lost = ~ended & (step + n_step >= frames)
        if lost.any():
            t = episodes.start[episode[lost][0]] + step[lost][0]
            last = episodes.start[episode[lost][0]] + length[lost][0] - 1
            raise ReplayError(
                f"{self.path}: {game} transition {t} of run {run.manifest['run']} cannot be used with "
                f"n_step = {n_step}: its episode was truncated at {last}, before the state that "
                "the return bootstraps from. Draw indices with sample_indices, which leaves such transitions out."
            )
        return Span(
            first=first,
            last=first + length - 1,
            now=first + step,
            then=first + np.minimum(step + n_step, frames - 1),
            earliest=first + np.maximum(step - stack_size + 1, 0),
            ended=ended,
        )

    def identity(self) -> str:
        """A short id of the contents: equal for equal episodes and views, whatever the folder is called."""
        digest = hashlib.sha256(json.dumps(self.view.model_dump(exclude_defaults=True), sort_keys=True).encode())
        for game in self.games:
            for run in self._game_runs(game):
                known = {name: value for name, value in run.manifest.items() if value is not None}
                digest.update(json.dumps(known, sort_keys=True).encode())
                for name in ("length", "frames", "terminal", "continued", "crc32"):
                    digest.update(np.ascontiguousarray(run.table[name].to_numpy()))
        return digest.hexdigest()[:12]

    def rom_md5s(self) -> dict[str, str]:
        """MD5 of the ROM that each game was recorded with (of its first run); "" where it is not known."""
        return {game: self.manifests(game)[0]["rom_md5"] for game in self.games}

    def stored_bytes(self, game: str) -> int:
        """Bytes that the files of a game's recordings occupy on a local disk; 0 for a store elsewhere."""
        folders = [Path(run.folder) for run in self._game_runs(game) if run.folder is not None]
        files = (file for folder in folders for pattern in ("*", "*/*") for file in folder.glob(pattern))  # links too
        return sum(file.stat().st_size for file in files if file.is_file())

    def validate(self, progress: Callable[[int], None] = lambda transitions: None) -> list[str]:
        """Read everything and compare with the episode tables; returns one line per problem (none: all is well).

        Args:
            progress: called with the number of transitions of each episode that was compared.
        """
        problems = []
        for game in self.games:
            for run in self._game_runs(game):
                try:
                    problems += validate_run(run, progress)
                except ReplayError as error:
                    problems.append(str(error))
        return problems


class Span(NamedTuple):
    """Rows of a run's arrays, int64 [B], that make B transitions.

    Attributes:
        first, last: of the episode's transitions.
        now: the transition.
        then: the frame that `next_observation` ends with.
        earliest: the first frame of the observation.
        ended: the episode terminates within the n steps.
    """

    first: np.ndarray
    last: np.ndarray
    now: np.ndarray
    then: np.ndarray
    earliest: np.ndarray
    ended: np.ndarray

    def returns(self, run: Run, n_step: int, discount: float, clip_rewards: bool) -> np.ndarray:
        """float64 [B], n-step returns, cut at the episode's end."""
        last = np.minimum(self.now + n_step - 1, self.last)
        rewards = run.values("reward", self.now, last, n_step).astype(np.float64)
        if clip_rewards:
            rewards = rewards.clip(-1, 1)
        return rewards @ discount ** np.arange(n_step)


def validate_run(run: Run, progress: Callable[[int], None] = lambda transitions: None) -> list[str]:
    """Read a run and compare it with its episode table; returns one line per problem.

    Raises:
        ReplayError: an array cannot be opened.
    """
    problems = []
    limit = len(run.manifest["actions"])
    table = run.table.to_pandas().sort_values("row", kind="stable")
    row, stop = table["row"].to_numpy(), (table["row"] + table["frames"]).to_numpy()
    hole = run.arrays["observation"].chunk_layout.read_chunk.shape[0]  # may be a chunk that was never written
    breaks = (np.diff(row // VALIDATED_TOGETHER) > 0) | (row[1:] - stop[:-1] >= hole)
    groups = [group for _, group in table.groupby(np.concatenate([[0], np.cumsum(breaks)]))]
    ahead = _read_group(run, groups[0])
    for number, group in enumerate(groups):
        reads, ahead = ahead, _read_group(run, groups[number + 1]) if number + 1 < len(groups) else {}
        low = int(group["row"].iloc[0])
        columns = {}
        for name, read in reads.items():
            try:
                columns[name] = run.reading(read.result, name)
            except ReplayError as error:
                first, last = group.iloc[0], group.iloc[-1]
                where = f"transitions {first.start}..{last.start + last.length - 1}"
                problems.append(f"{run.kvstore.url} {where}: {error}")
        if len(columns) < len(reads):
            continue
        for row in group.itertuples():
            where = f"{run.kvstore.url} episode {row.Index} (transitions {row.start}..{row.start + row.length - 1})"
            here = slice(row.row - low, row.row - low + row.length)
            frames = columns["observation"][row.row - low : row.row - low + row.frames]
            action, reward = columns["action"][here], columns["reward"][here]
            crc32 = fmt.frame_crc32s(frames)
            if zlib.crc32(fmt.step_records(crc32, action, reward)) != row.crc32:
                problems.append(f"{where}: contents differ from the recorded CRC-32.")
            blank = _longest((crc32[: row.length] == fmt.BLACK) & (action == 0) & (reward == 0))
            if blank >= BLANK_ROWS:
                problems.append(
                    f"{where}: {blank} rows on end are black, with action 0 and no reward, as rows of a replay buffer "
                    "that were never written. Import it again."
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


def _read_group(run: Run, group: pd.DataFrame) -> dict[str, ts.Future]:
    """Begin to read all columns of episodes that lie near one another."""
    low, high = int(group["row"].iloc[0]), int((group["row"] + group["frames"]).max())
    return {name: array[low:high].read() for name, array in run.arrays.items()}


def open_replay(path: str | os.PathLike, view: View | str | os.PathLike | None = None) -> Replay:
    """Open a dataset for reading.

    Args:
        path: a folder, or any URL that TensorStore reads (``file://``, ``gs://``, ``s3://``, ...).
        view: the part of it to use, or a file that says so; see `View`.

    Raises:
        ReplayError: nothing there, something else there, a newer format, a damaged episode table, or a view that
            asks for what is not there.
    """
    if view is not None and not isinstance(view, View):
        view = load_view(view)
    url = str(path)
    try:
        parts = urlsplit(url)
        if "://" in url and parts.scheme != "file":
            kvstore = ts.KvStore.open(url.rstrip("/") + "/").result()
            keys = [key.decode() for key in kvstore.list().result() if key.endswith(b"/manifest.json")]
        else:
            folder = fmt.local_folder(path)
            if not os.path.isdir(folder):  # noqa: PTH112 - pathlib's raises where a name is too long
                raise ReplayError(
                    f"{folder}: no such replay folder. Record one with notebooks/01_data_collection.ipynb."
                )
            kvstore = ts.KvStore.open(folder.as_uri() + "/").result()
            keys = [str(file.relative_to(folder)) for file in folder.glob("*/*/manifest.json")]  # behind links too
            for levels, what in ((1, "the folder of one game"), (0, "the folder of one recording")):
                if not keys and any(folder.glob("*/" * levels + "manifest.json")):
                    raise ReplayError(
                        f"{folder}: is {what}. Expected the dataset's folder, which holds one folder per game: "
                        f"{folder.parents[1 - levels]}."
                    )
    except fmt.STORE_ERRORS as error:
        raise ReplayError(
            f"{url}: cannot be listed ({fmt.said(error)}). Check the address and your permissions."
        ) from error
    folders = [key.rsplit("/", 1)[0] for key in keys if key.count("/") == 2]
    runs: dict[str, list[Run]] = {}
    for folder in sorted(folders, key=lambda name: (name.split("/")[0], len(name), name)):
        run = open_run(kvstore / f"{folder}/")
        if run is not None:
            others = runs.setdefault(run.manifest["game"], [])
            twins = [other.kvstore.url for other in others if other.manifest["run"] == run.manifest["run"]]
            if twins:
                raise ReplayError(
                    f"{path}: holds the same run twice: {twins[0]} and {run.kvstore.url}. Open one dataset."
                )
            others.append(run)
    if not runs and folders:
        raise ReplayError(
            f"{path}: no complete episode in {folders[0]}/episodes.jsonl or episodes.arrow. Record or import it again."
        )
    if not runs:
        raise ReplayError(
            f"{path}: not a replay store: no manifest.json of format {FORMAT!r} with complete episodes below it. "
            "Expected the dataset's folder, which holds one folder per game."
        )
    _check_actions(runs)
    return Replay(str(path), runs, view)


def _check_actions(runs: dict[str, list[Run]]) -> None:
    """All recordings of a game index the game's own list of actions, or at least the same.

    Raises:
        ReplayError: one does not.
    """
    for game, recordings in runs.items():
        first = recordings[0]
        for run in recordings:
            try:
                check_actions(game, run.manifest["actions"])
            except OtherActions as error:
                raise ReplayError(f"{run.kvstore.url}manifest.json: {error}") from error
            if run.manifest["actions"] != first.manifest["actions"]:
                raise ReplayError(
                    f"{run.kvstore.url}manifest.json: its actions are {', '.join(run.manifest['actions'])}, those of "
                    f"{first.kvstore.url} are {', '.join(first.manifest['actions'])}. Recordings of one game index the "
                    "same list; import or record this one again."
                )


def _read_file(kvstore: ts.KvStore, name: str) -> bytes | None:
    """The content of a file, or None where there is none.

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


def open_run(kvstore: ts.KvStore) -> Run | None:
    """One game and run, or None where no episode was completed yet."""
    described = _read_file(kvstore, "manifest.json") or b""
    manifest = fmt.read_manifest(described, f"{kvstore.url}manifest.json")
    # The journal first: a writer that moves it into the table meanwhile leaves both, never neither.
    journal = _read_file(kvstore, "episodes.jsonl") or b""
    table = _read_table(kvstore)
    starts, lengths = table["start"].to_numpy(), table["length"].to_numpy()
    if not np.array_equal(starts, np.cumsum(lengths) - lengths):
        raise ReplayError(f"{kvstore.url}episodes.arrow: its episodes do not follow one another. Restore it.")
    checked, covered = fmt.has_checksums(described), int(lengths.sum())
    rows, _ = fmt.parse_journal(journal, f"{kvstore.url}episodes.jsonl", covered, checked)
    if rows:
        tables = [table] if table.num_rows else []
        table = pa.concat_tables([*tables, pa.Table.from_pylist(rows)], promote_options="permissive")
    return Run(kvstore, manifest, table.combine_chunks()) if table.num_rows else None


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
    content = _read_file(kvstore, "episodes.arrow")
    return fmt.empty_table() if content is None else fmt.read_table(pa.py_buffer(content), where)
