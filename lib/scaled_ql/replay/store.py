"""Reading a dataset: the recordings of several games as one; `scaled_ql.replay.format` documents the layout on disk."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pyarrow as pa
import tensorstore as ts

from scaled_ql.games import OtherActions, check_actions
from scaled_ql.replay import format as fmt
from scaled_ql.replay.batch import Batch
from scaled_ql.replay.format import FORMAT, FRAME_SHAPE, ReplayError
from scaled_ql.replay.recording import Recording, Span, open_recording, read_file, validate_recording
from scaled_ql.replay.views import Episodes, View, drawn_transitions, load_view, select_episodes

READ_TOGETHER = 32  # windows


class RecordedFrames:
    """Reads the frames of batches from the recordings themselves; several threads may read at once.

    Other readers, such as `device.DeviceFrames`, have the same attribute and method.

    Attributes:
        is_shareable: whether another process can read them.
    """

    is_shareable = True

    def __init__(self):
        self._local = threading.local()

    def __reduce__(self) -> tuple:
        return RecordedFrames, ()

    def read(
        self, spans: list[Span], shape: tuple[int, int], stack_size: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Read the frames of a batch, uint8 [*shape, 84, 84], from t - `stack_size` + 1 on.

        Args:
            spans: the batch's transitions.
            shape: (transitions, frames of each).
            stack_size: frames in an observation.
            out: memory for the result.
        """
        size, width = shape
        frames = np.empty((size, width, *FRAME_SHAPE), np.uint8) if out is None else out
        windows: list = [None] * size
        first, earliest, last = np.empty((3, size), np.int64)
        for span in spans:
            first[span.places] = span.now - stack_size + 1
            earliest[span.places], last[span.places] = span.earliest, span.then
            for place, window in zip(span.places.tolist(), span.recording.read_windows(span.earliest, span.then)):
                windows[place] = window
        for begin in range(0, size, READ_TOGETHER):
            group = slice(begin, begin + READ_TOGETHER)
            self._cut_windows(frames[group], windows[group], first[group], earliest[group], last[group])
        return frames

    def _cut_windows(
        self, frames: np.ndarray, windows: list, first: np.ndarray, earliest: np.ndarray, last: np.ndarray
    ) -> None:
        """Fill uint8 [B, width, 84, 84] with rows first, first + 1, ...; with 0 outside `earliest` .. `last`.

        The windows are read into one buffer, small enough to stay in the processor's cache, and copied from there at
        once: little work under Python's lock, so that several threads can read in parallel.
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


class Replay:
    """A read-only dataset, or the part of it that a view shows; see `open_replay`.

    Attributes:
        path: its folder or URL.
        view: the part shown.
        games: names of its games, sorted; a batch's `game` indexes this list.
    """

    def __init__(
        self,
        path: str,
        recordings: dict[str, list[Recording]],
        view: View | None = None,
        frames: Any = None,
    ):
        """Show the part of recordings that a view selects.

        Args:
            path: their folder or URL.
            recordings: recordings by game.
            view: part to show; None is all.
            frames: reader of batches' frames; None is `RecordedFrames`.
        """
        self.path, self.view, self._frames = path, view or View(), frames or RecordedFrames()
        missing = sorted(set(self.view.games) - recordings.keys())
        if missing:
            raise ReplayError(
                f"{path}: the view names {', '.join(missing)}; there are {', '.join(sorted(recordings))}."
            )
        self.games = sorted(set(self.view.games) or recordings)
        self._recordings = {
            game: [one for one in recordings[game] if not self.view.runs or one.manifest["run"] in self.view.runs]
            for game in self.games
        }
        self._episodes = {game: self._join_episodes(game) for game in self.games}
        for game, episodes in self._episodes.items():
            if not len(episodes.start):
                has = [recording.manifest["run"] for recording in recordings[game]]
                raise ReplayError(
                    f"{path}: the view selects nothing of {game}: {self.view.model_dump(exclude_defaults=True)}; "
                    f"the game has the runs {has}."
                )
        self.sampleable = lru_cache(maxsize=None)(self._sampleable)
        self._ranks = lru_cache(maxsize=None)(self._sampleable_ranks)

    def __reduce__(self) -> tuple:
        """Pickle for another process, which sees the same episodes even if the store has grown."""
        return Replay, (self.path, self._recordings, self.view, self._frames)

    @property
    def is_shareable(self) -> bool:
        """Whether another process can read it; not from a device's memory."""
        return self._frames.is_shareable

    def _join_episodes(self, game: str) -> Episodes:
        columns: dict[str, list[np.ndarray]] = {name: [] for name in Episodes._fields}
        for number, recording in enumerate(self._recordings[game]):
            chosen = select_episodes(self.view, recording.starts, recording.lengths)
            columns["run"].append(np.full(chosen.stop - chosen.start, number, np.int32))
            columns["entry"].append(np.arange(chosen.start, chosen.stop))
            for name in ("length", "row", "frames", "terminal", "continued"):
                columns[name].append(recording.table[name].to_numpy()[chosen])
        joined = {name: np.concatenate(parts) for name, parts in columns.items() if parts and name != "start"}
        if not joined:
            return Episodes(*[np.empty(0, np.int64)] * len(Episodes._fields))
        return Episodes(start=np.cumsum(joined["length"]) - joined["length"], **joined)

    def _recordings_of(self, game: str) -> list[Recording]:
        if game not in self._recordings:
            raise ReplayError(f"{self.path}: no game {game!r}; it has {', '.join(self.games)}.")
        return self._recordings[game]

    def num_transitions(self, game: str) -> int:
        """Transitions of a game in this view, all recordings together, before `view.uniform` thins them out."""
        self._recordings_of(game)
        episodes = self._episodes[game]
        return int(episodes.start[-1] + episodes.length[-1])

    @property
    def num_frames(self) -> int:
        """Stored frames of all games in this view."""
        return sum(int(episodes.frames.sum()) for episodes in self._episodes.values())

    def manifests(self, game: str) -> list[dict[str, Any]]:
        """The manifest of each recording of a game: source, actions, ROM, rules."""
        return [recording.manifest for recording in self._recordings_of(game)]

    def recordings(self, game: str) -> list[Recording]:
        """The recordings of a game, in the order of their numbers."""
        return list(self._recordings_of(game))

    def rows_in_use(self, game: str, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(first, frames), int64 [episodes]: the rows of a game's number-th recording that this view shows."""
        episodes = self._episodes[game]
        here = episodes.run == number
        return episodes.row[here], episodes.frames[here]

    def import_reports(self, game: str) -> list[dict[str, Any]]:
        """`import.json` of each imported recording of a game, with its run: files, gaps, what was left out."""
        reports = []
        for recording in self._recordings_of(game):
            content = read_file(recording.kvstore, "import.json")
            if content is not None:
                report = fmt.read_report(content, f"{recording.kvstore.url}import.json")
                reports.append({"run": recording.manifest["run"], **report})
        return reports

    def action_names(self, game: str) -> list[str]:
        """The game's minimal action set, as recorded."""
        return self._recordings_of(game)[0].manifest["actions"]

    def episodes(self, game: str) -> pd.DataFrame:
        """Episode table in time order: start (index t of the first transition), length, row, frames, episode_return,
        terminal, truncated, continued, crc32, whatever the recorder added, and run."""
        recordings, episodes = self._recordings_of(game), self._episodes[game]
        tables = []
        for number, recording in enumerate(recordings):
            here = episodes.run == number
            chosen = recording.table.take(pa.array(episodes.entry[here]))
            tables.append(chosen.to_pandas().assign(run=recording.manifest["run"], start=episodes.start[here]))
        return pd.concat(tables, ignore_index=True)

    def actions(self, game: str) -> np.ndarray:
        """int32 [T], every action of a game in time order."""
        return self._column(game, "action").astype(np.int32)

    def rewards(self, game: str) -> np.ndarray:
        """float32 [T], every reward of a game in time order, unclipped where known."""
        return self._column(game, "reward")

    def _column(self, game: str, name: str) -> np.ndarray:
        parts = []
        for number, recording in enumerate(self._recordings_of(game)):
            here = self._episodes[game].run == number
            parts.append(recording.stretches(name, self._episodes[game].row[here], self._episodes[game].length[here]))
        return np.concatenate(parts)

    def episode(self, game: str, number: int) -> dict[str, np.ndarray]:
        """One episode, by its place in `episodes`.

        Returns:
            observation uint8 [L, 84, 84], or [L + 1, 84, 84] where the frame after the last action is stored,
            action uint8 [L], reward float32 [L].
        """
        recording = self._recordings_of(game)[self._episodes[game].run[number]]
        episodes = self._episodes[game]
        row, length, frames = (int(column[number]) for column in (episodes.row, episodes.length, episodes.frames))
        where = np.array([row]), np.array([length])
        return {
            "observation": recording.windows(where[0], where[0] + frames - 1)[0],
            **{name: recording.stretches(name, *where) for name in ("action", "reward")},
        }

    def frames_at(self, game: str, indices: np.ndarray) -> np.ndarray:
        """uint8 [N, 84, 84], the single frames at time indices of a game."""
        indices = np.asarray(indices, np.int64)
        frames = np.empty((len(indices), *FRAME_SHAPE), np.uint8)
        for part, recording, episode, step in self._locate(game, indices):
            rows = self._episodes[game].row[episode] + step
            frames[part] = np.concatenate(recording.windows(rows, rows))
        return frames

    def _locate(self, game: str, indices: np.ndarray) -> Iterator[tuple[np.ndarray, Recording, np.ndarray, np.ndarray]]:
        """Split time indices of a game: (places in `indices`, their recording, episode, step within the episode)."""
        total = self.num_transitions(game)
        if len(indices) and (indices.min() < 0 or indices.max() >= total):
            raise ReplayError(
                f"{self.path}: {game} has transitions 0..{total - 1}, asked for {indices.min()}..{indices.max()}."
            )
        episodes = self._episodes[game]
        episode = np.searchsorted(episodes.start, indices, side="right") - 1
        step = indices - episodes.start[episode]
        for number, recording in enumerate(self._recordings_of(game)):
            part = np.flatnonzero(episodes.run[episode] == number)
            if len(part):
                yield part, recording, episode[part], step[part]

    def _sampleable(self, game: str, n_step: int, stack_size: int = 4) -> tuple[np.ndarray, np.ndarray]:
        """(start, count), int64: transitions start .. start + count - 1 of each stretch may be sampled.

        These are all transitions of a terminated episode, those of a truncated one whose state n steps later is stored,
        and those of one whose beginning was lost whose whole frame stack is stored; with n = 0, where a frame stack is
        the window that ends there, nothing that comes later is needed. In a uniform view each of them is a stretch of
        one.
        """
        self._recordings_of(game)
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
            if n_step == 0:
                raise ReplayError(
                    f"{self.path}: {game} has no window of {stack_size} steps: all its episodes lost their beginning "
                    "and are shorter, so that what came before cannot be known. Use shorter windows or more data."
                )
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
            discount: discount per step.
            stack_size: frames in an observation.
            clip_rewards: clip each step's reward to [-1, 1] before summing.

        Raises:
            ReplayError: an index out of range, a transition that has no successor because its episode was
                truncated within the n steps, or a damaged chunk.
        """
        indices = np.atleast_1d(np.asarray(indices))
        if not np.issubdtype(indices.dtype, np.integer) or indices.ndim > 1:
            raise ReplayError(f"indices must be a list of integers, got {indices.dtype} {indices!r}.")
        self._recordings_of(game)
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
            raise ReplayError(f"n_step and stack_size must be at least 1, got {n_step} and {stack_size}.")
        size = len(indices)
        action, reward, discounts = np.empty(size, np.int32), np.empty(size, np.float32), np.empty(size, np.float32)
        next_stack = np.empty((size, stack_size), np.int32)
        spans = self.spans(games, indices, n_step, stack_size)
        for span in spans:
            action[span.places] = span.actions()
            reward[span.places] = span.returns(n_step, discount, clip_rewards)
            ended = span.terminal & (span.now + n_step > span.last)
            discounts[span.places] = np.where(ended, 0.0, discount**n_step)
            next_stack[span.places] = (span.then - span.now)[:, None] + np.arange(stack_size)
        frames = self.read_frames(spans, (size, stack_size + n_step), stack_size, out)
        return Batch(frames, next_stack, action, reward, discounts, games)

    def read_frames(
        self, spans: list[Span], shape: tuple[int, int], stack_size: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Frames of located transitions, uint8 [*shape, 84, 84]; see `RecordedFrames.read`."""
        return self._frames.read(spans, shape, stack_size, out)

    def spans(self, games: np.ndarray, indices: np.ndarray, n_step: int, stack_size: int) -> list[Span]:
        """Locate the rows of transitions of several games, one recording after another.

        Args:
            games: int32 [B], numbers in `games`.
            indices: int [B], time indices.
            n_step: steps up to the last frame that is needed; 0: the transition's own is the last.
            stack_size: frames up to the transition's own.

        Raises:
            ReplayError: an index out of range, or a state after an episode's end.
        """
        spans = []
        for number in np.unique(games):
            game, places = self.games[number], np.flatnonzero(games == number)
            for part, recording, episode, step in self._locate(game, indices[places].astype(np.int64)):
                self._expect_successors(game, recording, episode, step, n_step)
                episodes = self._episodes[game]
                first, length, frames = (column[episode] for column in (episodes.row, episodes.length, episodes.frames))
                span = Span(
                    recording=recording,
                    places=places[part],
                    now=first + step,
                    then=first + np.minimum(step + n_step, frames - 1),
                    earliest=first + np.maximum(step - stack_size + 1, 0),
                    last=first + length - 1,
                    terminal=episodes.terminal[episode],
                )
                spans.append(span)
        return spans

    def _expect_successors(
        self, game: str, recording: Recording, episode: np.ndarray, step: np.ndarray, n_step: int
    ) -> None:
        """Refuse transitions whose episode was truncated before the state n steps later."""
        episodes = self._episodes[game]
        length, beyond = episodes.length[episode], step + n_step
        lost = ~(episodes.terminal[episode] & (beyond >= length)) & (beyond >= episodes.frames[episode])
        if lost.any():
            start = episodes.start[episode[lost][0]]
            raise ReplayError(
                f"{self.path}: {game} transition {start + step[lost][0]} of run {recording.manifest['run']} cannot be "
                f"used with n_step = {n_step}: its episode was truncated at {start + length[lost][0] - 1}, before the "
                "state that the return bootstraps from. Draw indices with sample_indices, which leaves such "
                "transitions out."
            )

    def identity(self) -> str:
        """A short id of the contents: equal for equal episodes and views, whatever the folder is called."""
        digest = hashlib.sha256(json.dumps(self.view.model_dump(exclude_defaults=True), sort_keys=True).encode())
        for game in self.games:
            for recording in self._recordings_of(game):
                known = {name: value for name, value in recording.manifest.items() if value is not None}
                digest.update(json.dumps(known, sort_keys=True).encode())
                for name in ("length", "frames", "terminal", "continued", "crc32"):
                    digest.update(np.ascontiguousarray(recording.table[name].to_numpy()))
        return digest.hexdigest()[:12]

    def rom_md5s(self) -> dict[str, str]:
        """MD5 of the ROM that each game was recorded with (in its first recording); "" if unknown."""
        return {game: self.manifests(game)[0]["rom_md5"] for game in self.games}

    def stored_bytes(self, game: str) -> int:
        """Bytes that the files of a game's recordings occupy on a local disk; 0 for a store elsewhere."""
        folders = [Path(recording.folder) for recording in self._recordings_of(game) if recording.folder is not None]
        files = (file for folder in folders for pattern in ("*", "*/*") for file in folder.glob(pattern))  # links too
        return sum(file.stat().st_size for file in files if file.is_file())

    def validate(self, progress: Callable[[int], None] = lambda transitions: None) -> list[str]:
        """Read everything and compare with the episode tables; returns one line per problem.

        Args:
            progress: called with the number of transitions of each episode that was compared.
        """
        problems = []
        for game in self.games:
            for recording in self._recordings_of(game):
                try:
                    problems += validate_recording(recording, progress)
                except ReplayError as error:
                    problems.append(str(error))
        return problems


def open_replay(path: str | os.PathLike, view: View | str | os.PathLike | None = None) -> Replay:
    """Open a dataset for reading.

    Args:
        path: a folder, or any URL that TensorStore reads (``file://``, ``gs://``, ``s3://``, ...).
        view: part to show, or a file that describes it; see `View`.

    Raises:
        ReplayError: no dataset there, another format version, a damaged episode table, or a view of absent data.
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
    recordings: dict[str, list[Recording]] = {}
    for folder in sorted(folders, key=lambda name: (name.split("/")[0], len(name), name)):
        recording = open_recording(kvstore / f"{folder}/")
        if recording is not None:
            others = recordings.setdefault(recording.manifest["game"], [])
            twins = [other.kvstore.url for other in others if other.manifest["run"] == recording.manifest["run"]]
            if twins:
                raise ReplayError(
                    f"{path}: holds the same recording twice: {twins[0]} and {recording.kvstore.url}. Open one dataset."
                )
            others.append(recording)
    if not recordings and folders:
        raise ReplayError(
            f"{path}: no complete episode in {folders[0]}/episodes.jsonl or episodes.arrow. Record or import it again."
        )
    if not recordings:
        raise ReplayError(
            f"{path}: not a replay store: no manifest.json of format {FORMAT!r} with complete episodes below it. "
            "Expected the dataset's folder, which holds one folder per game."
        )
    _check_actions(recordings)
    return Replay(str(path), recordings, view)


def _check_actions(recordings: dict[str, list[Recording]]) -> None:
    """Check that all recordings of a game index the same list of actions, the game's own if ALE has it.

    Raises:
        ReplayError: they differ.
    """
    for game, of_game in recordings.items():
        first = of_game[0]
        for recording in of_game:
            try:
                check_actions(game, recording.manifest["actions"])
            except OtherActions as error:
                raise ReplayError(f"{recording.kvstore.url}manifest.json: {error}") from error
            if recording.manifest["actions"] != first.manifest["actions"]:
                raise ReplayError(
                    f"{recording.kvstore.url}manifest.json: its actions are "
                    f"{', '.join(recording.manifest['actions'])}, those of {first.kvstore.url} are "
                    f"{', '.join(first.manifest['actions'])}. Recordings of one game must index the same list; import "
                    "or record this one again."
                )
