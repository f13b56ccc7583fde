"""The replay store: whole episodes of single frames, one folder per dataset, game and run.

::

    dataset/
      Pong/1/                     game, run
        manifest.json             what this is: format version, source, actions, stickiness, ROM; written once
        episodes.jsonl            one line per complete episode, appended after its arrays are on disk
        observation/  uint8  [T, 84, 84]   zarr v3, single frames, never stacks
        action/       int32  [T]           index in the game's minimal set
        reward/       float32[T]           unclipped where known
        terminal/     bool   [T]           the episode ended in the game
        truncated/    bool   [T]           the episode was cut (time limit), its last state has no successor

A line of ``episodes.jsonl`` commits its episode: whatever the arrays hold beyond the last complete line was
being written when the writer died and is never read. Every chunk carries a CRC-32C, every episode a CRC-32.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import filelock
import numpy as np
import pandas as pd
import tensorstore as ts

T = TypeVar("T")

FORMAT = "scaled-ql replay"
FORMAT_VERSION = 1
FRAME_SHAPE = (84, 84)
INNER_CHUNK = 16  # frames decoded together: small enough for random windows, large enough to compress well
FRAME_SHARD = 65_536  # frames a file: about 8 MB compressed
SCALAR_CHUNK = 4_096
SCALAR_SHARD = 1_048_576
ARRAYS = {
    "observation": "uint8",
    "action": "int32",
    "reward": "float32",
    "terminal": "bool",
    "truncated": "bool",
}


class ReplayError(Exception):
    """A store that cannot be read or written; the message names the file and the remedy."""


class Batch(NamedTuple):
    """B transitions with n-step returns (a pytree of NumPy arrays).

    Attributes:
        observation: uint8 [B, 84, 84, 4], oldest frame first, frames before the episode's start zero.
        action: int32 [B], index in the game's minimal action set.
        reward: float32 [B], sum over k < n of discount^k r_{t+k}, cut at the episode's end.
        discount: float32 [B], discount^n, or 0 where the episode terminated within the n steps.
        next_observation: uint8 [B, 84, 84, 4], the stack at t + n; where discount is 0, the episode's last one.
        game: int32 [B], index into the replay's `games`.
    """

    observation: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    discount: np.ndarray
    next_observation: np.ndarray
    game: np.ndarray


def _array_spec(kvstore: Any, name: str) -> dict[str, Any]:
    """TensorStore spec of one array, with all its settings: what a writer creates and continues."""
    frames = name == "observation"
    tail = list(FRAME_SHAPE) if frames else []
    bytes_codec = {"name": "bytes", "configuration": {"endian": "little"}}
    inner_codecs = [bytes_codec, {"name": "zstd", "configuration": {"level": 3}}, {"name": "crc32c"}]
    sharding = {
        "chunk_shape": [INNER_CHUNK if frames else SCALAR_CHUNK, *tail],
        "codecs": inner_codecs,
        "index_codecs": [bytes_codec, {"name": "crc32c"}],
    }
    shard = [FRAME_SHARD if frames else SCALAR_SHARD, *tail]
    return {
        "driver": "zarr3",
        "kvstore": kvstore,
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": [0, *tail],
            "data_type": ARRAYS[name],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "dimension_names": ["time", "height", "width"][: 1 + len(tail)],
        },
    }


def _episode_crc32(observation: np.ndarray, action: np.ndarray, reward: np.ndarray) -> int:
    crc = 0
    for array in (observation, action, reward):
        crc = zlib.crc32(np.ascontiguousarray(array), crc)
    return crc


def _read_manifest(content: bytes, where: str) -> dict[str, Any]:
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise ReplayError(f"{where}: not JSON ({error}). Restore the file from a copy.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ReplayError(f'{where}: not the manifest of a replay store (no "format": "{FORMAT}").')
    if not isinstance(manifest.get("version"), int):
        raise ReplayError(f"{where}: the manifest has no version. Restore the file from a copy.")
    if manifest["version"] > FORMAT_VERSION:
        raise ReplayError(
            f"{where}: store format {manifest['version']}, but this package reads up to {FORMAT_VERSION}. "
            "Update the package to read it."
        )
    missing = [name for name in ("game", "run", "actions") if name not in manifest]
    if missing:
        raise ReplayError(f"{where}: the manifest lacks {', '.join(missing)}. Restore the file from a copy.")
    return manifest


def _parse_journal(content: bytes, where: str) -> pd.DataFrame:
    """Complete lines of an episodes.jsonl as a table; a torn last line is an episode that was not committed."""
    complete = content[: content.rfind(b"\n") + 1]
    rows, expected = [], 0
    for number, line in enumerate(complete.splitlines(), 1):
        try:
            row = json.loads(line)
            start, length = row["start"], row["length"]
            if (type(length), type(row["terminal"]), type(row["crc32"])) != (int, bool, int):
                raise TypeError("length, terminal or crc32 of a wrong type")
        except (ValueError, KeyError, TypeError) as error:
            raise ReplayError(
                f"{where}: line {number} is not an episode ({error}). The file was changed after it was written; "
                "restore it from a copy, or delete this line and all after it to keep the episodes before."
            ) from error
        if start != expected or length < 1:
            raise ReplayError(
                f"{where}: line {number} says start {start}, length {length}; expected start {expected} and a "
                "positive length. Restore the file from a copy."
            )
        expected += length
        rows.append(row)
    return pd.DataFrame(rows)


class ReplayWriter:
    """Appends whole episodes of one game and run to a store on a local disk.

    Each `append` is on disk (fsync) when it returns. Reopening a store that was being written when its
    process died continues after the last complete episode. A file lock keeps a second writer out.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        game: str,
        run: int = 1,
        *,
        actions: Iterable[str],
        source: str,
        sticky_actions: float,
        frame_skip: int = 4,
        rom_md5: str = "",
        rewards: str = "raw",
        lock_timeout: float = 30,
    ):
        """Open `path`/`game`/`run` for appending, creating it where needed.

        Args:
            path: the dataset's folder.
            game: name as in the paper.
            run: number of the recording, so that several agents' experience of a game stays apart.
            actions: names of the minimal action set; stored actions index it.
            source: who played, in words.
            sticky_actions: the probability with which the emulator repeated an action.
            frame_skip: emulator frames per transition.
            rom_md5: of the ROM that was played.
            rewards: ``"raw"`` or ``"clipped"``.
            lock_timeout: seconds to wait for another writer (a killed one lets go within a moment).

        Raises:
            ReplayError: a folder of something else, other settings than before, or another writer.
        """
        self.folder = Path(path).resolve() / game / str(run)
        self.manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "game": game,
            "run": run,
            "source": source,
            "actions": list(actions),
            "sticky_actions": sticky_actions,
            "frame_skip": frame_skip,
            "rom_md5": rom_md5,
            "rewards": rewards,
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ReplayError(f"{self.folder}: cannot create the store ({error}).") from error
        self._lock = filelock.FileLock(self.folder / ".lock")
        try:
            self._lock.acquire(timeout=lock_timeout)
        except filelock.Timeout as error:
            raise ReplayError(
                f"{self.folder}: another process is writing this store; wait for it or stop it."
            ) from error
        try:
            self._write_or_compare_manifest()
            self._arrays = {name: self._open_array(name) for name in ARRAYS}
            self._recover_journal()
            self._check_last_transition()
        except BaseException:
            self._lock.release()
            raise

    def _write_or_compare_manifest(self) -> None:
        file = self.folder / "manifest.json"
        if not file.exists():
            partial = file.with_suffix(".partial")
            with partial.open("w") as target:
                target.write(json.dumps(self.manifest, indent=1) + "\n")
                target.flush()
                os.fsync(target.fileno())
            partial.replace(file)
        stored = _read_manifest(file.read_bytes(), str(file))
        differences = [
            f"{key}: {stored.get(key)!r} there, {value!r} asked for"
            for key, value in self.manifest.items()
            if stored.get(key) != value
        ]
        if differences:
            raise ReplayError(
                f"{file}: the store was recorded with other settings ({'; '.join(differences)}). "
                "Use another folder or run number, or delete the store."
            )

    def _open_array(self, name: str) -> ts.TensorStore:
        exists = (self.folder / name / "zarr.json").exists()
        spec = _array_spec({"driver": "file", "path": f"{self.folder}/{name}/"}, name)
        if exists:
            del spec["metadata"]["shape"]  # as long as it has become
        try:
            return ts.open(spec, open=exists, create=not exists).result()
        except ValueError as error:
            raise ReplayError(f"{self.folder / name}: cannot open or create this array ({error}).") from error

    def _check_last_transition(self) -> None:
        """Read the end of every array: appending to a chunk that was lost would turn what it held into zeros."""
        if self.num_transitions:
            run = _open_run(ts.KvStore.open(self.folder.as_uri() + "/").result())
            for name in ARRAYS:
                last = run.open_array(name)[self.num_transitions - 1]
                run.reading(lambda last=last: last.read().result(), name)

    def _recover_journal(self) -> None:
        """Count committed episodes and cut a torn last line, which a killed writer leaves behind."""
        file = self.folder / "episodes.jsonl"
        content = file.read_bytes() if file.exists() else b""
        episodes = _parse_journal(content, str(file))
        self.num_episodes = len(episodes)
        self.num_transitions = int(episodes["length"].sum()) if len(episodes) else 0
        self._journal_size = content.rfind(b"\n") + 1
        if self._journal_size < len(content):
            os.truncate(file, self._journal_size)

    def append(
        self,
        observation: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        *,
        terminal: bool,
        **columns: float | int | str,
    ) -> None:
        """Append one episode of L >= 1 transitions.

        Args:
            observation: uint8 [L, 84, 84], the frame on which each action was chosen.
            action: integers [L], indices into the store's actions.
            reward: [L], what each action earned.
            terminal: whether the episode ended in the game; if not, it was truncated.
            **columns: further columns of the episode table (say, the player's epsilon).

        Raises:
            ReplayError: data that is no episode of this game, or a disk that does not take it; the episodes
                appended before stay valid.
        """
        observation, action, reward = (
            np.asarray(observation),
            np.asarray(action),
            np.asarray(reward, np.float32),
        )
        self._check_episode(observation, action, reward)
        terminal = bool(terminal)
        reserved = columns.keys() & {"start", "length", "episode_return", "truncated", "crc32", "run"}
        if reserved:
            raise ReplayError(f"{self.folder}: a column cannot be called {', '.join(sorted(reserved))}; rename it.")
        length, start = len(action), self.num_transitions
        last = np.arange(length) == length - 1
        data = {
            "observation": observation,
            "action": action.astype(np.int32),
            "reward": reward,
            "terminal": last & terminal,
            "truncated": last & (not terminal),
        }
        row = {
            "start": start,
            "length": length,
            "episode_return": float(reward.sum(dtype=np.float64)),
            "terminal": terminal,
            "truncated": not terminal,
            "crc32": _episode_crc32(observation, data["action"], reward),
            **{name: getattr(value, "item", lambda value=value: value)() for name, value in columns.items()},
        }
        try:
            self._write_arrays(data, start)
            self._commit(row)
        except (OSError, ValueError) as error:
            raise ReplayError(
                f"{self.folder}: episode {self.num_episodes} could not be written ({error}). The {start} transitions "
                "before it are safe; make room on the disk and run again to continue."
            ) from error
        self.num_episodes += 1
        self.num_transitions += length

    def _check_episode(self, observation: np.ndarray, action: np.ndarray, reward: np.ndarray) -> None:
        where = f"{self.folder}: episode {self.num_episodes}"
        if action.ndim != 1:
            raise ReplayError(f"{where}: actions must be a list of integers [L], got shape {list(action.shape)}.")
        length = len(action)
        if length == 0:
            raise ReplayError(f"{where} has no transitions; an episode has at least one.")
        if observation.shape != (length, *FRAME_SHAPE) or observation.dtype != np.uint8:
            raise ReplayError(
                f"{where}: observation is {observation.dtype} {list(observation.shape)}, expected uint8 "
                f"[{length}, 84, 84]: single frames, one per action."
            )
        if reward.shape != (length,) or not np.isfinite(reward).all():
            raise ReplayError(f"{where}: rewards must be {length} finite numbers, got {reward!r}.")
        allowed = len(self.manifest["actions"])
        if not np.issubdtype(action.dtype, np.integer) or action.min() < 0 or action.max() >= allowed:
            raise ReplayError(
                f"{where}: actions must be integers from 0 to {allowed - 1} ({self.manifest['game']} has "
                f"{', '.join(self.manifest['actions'])}), got {np.unique(action).tolist()}."
            )

    def _write_arrays(self, data: dict[str, np.ndarray], start: int) -> None:
        stop = start + len(data["action"])
        for name, array in self._arrays.items():
            if array.shape[0] < stop:
                shape = [stop, *array.shape[1:]]
                self._arrays[name] = array.resize(exclusive_max=shape, expand_only=True).result()
        for write in [array[start:stop].write(data[name]) for name, array in self._arrays.items()]:
            write.result()

    def _commit(self, row: dict[str, Any]) -> None:
        with (self.folder / "episodes.jsonl").open("ab") as journal:
            journal.truncate(self._journal_size)  # what a failed commit before this one may have left
            journal.write(json.dumps(row).encode() + b"\n")
            journal.flush()
            os.fsync(journal.fileno())
            self._journal_size = journal.tell()

    def close(self) -> None:
        """Let another writer in."""
        self._lock.release()

    def __enter__(self) -> "ReplayWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Run:
    """One game and run, read-only: its manifest, its episode table, its arrays."""

    def __init__(self, kvstore: ts.KvStore, manifest: dict[str, Any], episodes: pd.DataFrame):
        self.kvstore, self.manifest, self.episodes = kvstore, manifest, episodes
        self.num_transitions = int(episodes["length"].sum())
        self.starts = episodes["start"].to_numpy(np.int64)
        self.lasts = self.starts + episodes["length"].to_numpy(np.int64) - 1
        self.terminal = episodes["terminal"].to_numpy(bool)

    def open_array(self, name: str) -> ts.TensorStore:
        where = f"{self.kvstore.url}{name}"
        kvstore = (self.kvstore / f"{name}/").spec().to_json()
        spec = {
            "driver": "zarr3",
            "kvstore": kvstore,
            "fill_missing_data_reads": False,
        }  # missing is not zero
        try:
            array = ts.open(spec, open=True, read=True, dtype=ARRAYS[name]).result()
        except ValueError as error:
            raise ReplayError(f"{where}: cannot open this array ({error}). Restore the folder from a copy.") from error
        if array.shape[0] < self.num_transitions:
            raise ReplayError(
                f"{where}: holds {array.shape[0]} transitions, but episodes.jsonl promises {self.num_transitions}. "
                "Restore the folder from a copy."
            )
        return array

    @cached_property
    def frames(self) -> ts.TensorStore:
        return self.open_array("observation")

    @cached_property
    def action(self) -> np.ndarray:
        return self.read_column("action")

    @cached_property
    def reward(self) -> np.ndarray:
        return self.read_column("reward")

    def read_column(self, name: str) -> np.ndarray:
        return self.reading(lambda: self.open_array(name)[: self.num_transitions].read().result(), name)

    def reading(self, read: Callable[[], T], name: str) -> T:
        """Run a read; a checksum or decoding error names the array and the remedy."""
        try:
            return read()
        except ValueError as error:
            raise ReplayError(
                f"{self.kvstore.url}{name}: a chunk is damaged or missing ({error}). Restore the folder "
                "from a copy, or delete it and record or import it again."
            ) from error

    def read_windows(self, first: np.ndarray, last: np.ndarray) -> list[np.ndarray]:
        """Frames first[i]..last[i], inclusive: one read operation for all windows."""

        def read() -> list[np.ndarray]:
            with ts.Batch() as batch:
                reads = [self.frames[a : b + 1].read(batch=batch) for a, b in zip(first.tolist(), last.tolist())]
            return [read.result() for read in reads]

        return self.reading(read, "observation")


class Replay:
    """A read-only dataset; see `open_replay`.

    Attributes:
        path: where it lies.
        games: names of its games, sorted; a batch's `game` indexes this list.
    """

    def __init__(self, path: str, runs: dict[str, list[_Run]]):
        self.path = path
        self.games = sorted(runs)
        self._runs = runs
        self._episodes = {game: self._join_episodes(game) for game in self.games}
        self.sampleable = lru_cache(maxsize=None)(self._sampleable)

    def _game_runs(self, game: str) -> list[_Run]:
        if game not in self._runs:
            raise ReplayError(f"{self.path}: no game {game!r}; it has {', '.join(self.games)}.")
        return self._runs[game]

    def num_transitions(self, game: str) -> int:
        """Stored transitions of a game, all runs together."""
        return sum(run.num_transitions for run in self._game_runs(game))

    def manifests(self, game: str) -> list[dict[str, Any]]:
        """What is known of each recording of a game: source, actions, stickiness, ROM, ..."""
        return [run.manifest for run in self._game_runs(game)]

    def action_names(self, game: str) -> list[str]:
        """The game's minimal action set, as recorded."""
        return self._game_runs(game)[0].manifest["actions"]

    def _join_episodes(self, game: str) -> pd.DataFrame:
        tables, offset = [], 0
        for run in self._game_runs(game):
            tables.append(run.episodes.assign(run=run.manifest["run"], start=run.episodes["start"] + offset))
            offset += run.num_transitions
        return pd.concat(tables, ignore_index=True)

    def episodes(self, game: str) -> pd.DataFrame:
        """Episode table in time order: start (index t of the first transition), length, episode_return,
        terminal, truncated, crc32, whatever the recorder added, and run."""
        self._game_runs(game)
        return self._episodes[game].copy()

    def actions(self, game: str) -> np.ndarray:
        """int32 [T], every stored action of a game in time order."""
        return np.concatenate([run.action for run in self._game_runs(game)])

    def rewards(self, game: str) -> np.ndarray:
        """float32 [T], every stored reward of a game in time order, unclipped where known."""
        return np.concatenate([run.reward for run in self._game_runs(game)])

    def frames_at(self, game: str, indices: np.ndarray) -> np.ndarray:
        """uint8 [N, 84, 84], the single frames at time indices of a game."""
        indices = np.asarray(indices, np.int64)
        frames = np.empty((len(indices), *FRAME_SHAPE), np.uint8)
        for rows, run, t in self._by_run(game, indices):
            frames[rows] = np.concatenate(run.read_windows(t, t))
        return frames

    def _by_run(self, game: str, indices: np.ndarray) -> Iterable[tuple[np.ndarray, _Run, np.ndarray]]:
        """Split indices of a game by run: (rows of `indices`, the run, indices within it)."""
        total = self.num_transitions(game)
        if len(indices) and (indices.min() < 0 or indices.max() >= total):
            raise ReplayError(
                f"{self.path}: {game} has transitions 0..{total - 1}, asked for {indices.min()}..{indices.max()}."
            )
        offset = 0
        for run in self._game_runs(game):
            rows = np.flatnonzero((indices >= offset) & (indices < offset + run.num_transitions))
            if len(rows):
                yield rows, run, indices[rows] - offset
            offset += run.num_transitions

    def _sampleable(self, game: str, n_step: int) -> tuple[np.ndarray, np.ndarray]:
        """(start, count), int64 [episodes]: transitions start..start+count-1 of each episode have n-step returns.

        All of an episode that terminated; in a truncated one those whose successor n steps later is stored.
        """
        episodes = self.episodes(game)
        cut = np.where(episodes["terminal"], 0, n_step)
        counts = np.maximum(episodes["length"].to_numpy(np.int64) - cut, 0)
        if not counts.any():
            raise ReplayError(
                f"{self.path}: {game} has no transition with a state {n_step} steps later: all its episodes are "
                f"truncated and no longer than n_step = {n_step}. Use a smaller n_step or more data."
            )
        return episodes["start"].to_numpy(np.int64), counts

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
            indices: integers [B]; t is the game's t-th stored transition in time order.
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
    ) -> Batch:
        """Transitions of several games: int32 [B] into `games` and int [B] time indices; otherwise as `batch`."""
        if n_step < 1 or stack_size < 1:
            raise ReplayError(f"n_step and stack_size are at least 1, got {n_step} and {stack_size}.")
        size = len(indices)
        stacks = np.zeros((2, size, stack_size, *FRAME_SHAPE), np.uint8)
        batch = Batch(
            # Frames are written whole and shown last: views, so that nothing is transposed here.
            observation=stacks[0].transpose(0, 2, 3, 1),
            action=np.empty(size, np.int32),
            reward=np.empty(size, np.float32),
            discount=np.empty(size, np.float32),
            next_observation=stacks[1].transpose(0, 2, 3, 1),
            game=games,
        )
        for number in np.unique(games):
            rows = np.flatnonzero(games == number)
            for part, run, t in self._by_run(self.games[number], indices[rows].astype(np.int64)):
                self._fill(batch, stacks, rows[part], run, t, n_step, discount, stack_size, clip_rewards)
        return batch

    def _fill(
        self, batch: Batch, stacks: np.ndarray, rows: np.ndarray, run: _Run, t: np.ndarray,
        n_step: int, discount: float, stack_size: int, clip_rewards: bool,
    ) -> None:  # fmt: skip
        """Write the transitions at times t of one run into the given rows of the batch."""
        episode = np.searchsorted(run.starts, t, side="right") - 1
        first, last = run.starts[episode], run.lasts[episode]
        ended = t + n_step > last
        lost = ended & ~run.terminal[episode]
        if lost.any():
            raise ReplayError(
                f"{self.path}: {run.manifest['game']} transition {t[lost][0]} of run {run.manifest['run']} cannot be "
                f"used with n_step = {n_step}: its episode was truncated at {last[lost][0]}, before the state that "
                "the return bootstraps from. Draw indices with sample_indices, which leaves such transitions out."
            )
        steps = t[:, None] + np.arange(n_step)
        rewards = run.reward[np.minimum(steps, last[:, None])].astype(np.float64)
        if clip_rewards:
            rewards = rewards.clip(-1, 1)
        weights = np.where(steps <= last[:, None], discount ** np.arange(n_step), 0.0)
        batch.action[rows] = run.action[t]
        batch.reward[rows] = (rewards * weights).sum(1)
        batch.discount[rows] = np.where(ended, 0.0, discount**n_step)

        following = np.minimum(t + n_step, last)
        earliest = np.maximum(t - stack_size + 1, first)
        windows = run.read_windows(earliest, following)
        for row, window, begin, now, then in zip(rows, windows, earliest, t, following):
            for target, end in ((stacks[0, row], now), (stacks[1, row], then)):
                stack = window[max(end - stack_size + 1, begin) - begin : end - begin + 1]
                target[stack_size - len(stack) :] = stack

    def identity(self) -> str:
        """A short id of the contents: equal for equal episodes, whatever the folder is called."""
        content = [
            [run.manifest, run.episodes.to_csv(index=False)] for game in self.games for run in self._game_runs(game)
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def rom_md5s(self) -> dict[str, str]:
        """MD5 of the ROM that each game was recorded with (of its first run)."""
        return {game: self.manifests(game)[0]["rom_md5"] for game in self.games}

    def stored_bytes(self, game: str) -> int:
        """Bytes that a game's files occupy on a local disk; 0 for a store elsewhere."""
        folder = Path(self.path) / game
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    def validate(self) -> list[str]:
        """Read everything and compare with the episode tables; returns one line per problem (none: all is well)."""
        problems = []
        for game in self.games:
            for run in self._game_runs(game):
                try:
                    problems += self._validate_run(run)
                except ReplayError as error:
                    problems.append(str(error))
        return problems

    def _validate_run(self, run: _Run) -> list[str]:
        problems = []
        flags = {name: run.read_column(name) for name in ("terminal", "truncated")}
        limit = len(run.manifest["actions"])
        for number, row in enumerate(run.episodes.itertuples()):
            where = f"{run.kvstore.url} episode {number} (transitions {row.start}..{row.start + row.length - 1})"
            here = slice(row.start, row.start + row.length)
            action, reward = run.action[here], run.reward[here]
            try:
                frames = run.read_windows(np.array([row.start]), np.array([here.stop - 1]))[0]
            except ReplayError as error:
                problems.append(f"{where}: {error}")
                continue
            if _episode_crc32(frames, action, reward) != row.crc32:
                problems.append(f"{where}: contents differ from the recorded CRC-32.")
            if action.min() < 0 or action.max() >= limit:
                problems.append(f"{where}: actions outside 0..{limit - 1}.")
            for name, flag in flags.items():
                if flag[here][-1] != getattr(row, name) or flag[here][:-1].any():
                    problems.append(f"{where}: {name} flags differ from the episode table.")
        return problems


def open_replay(path: str | os.PathLike) -> Replay:
    """Open a dataset for reading.

    Args:
        path: a folder, or any URL that TensorStore reads (``file://``, ``gs://``, ``s3://``, ...).

    Raises:
        ReplayError: nothing there, something else there, a newer format, or a damaged episode table.
    """
    url = str(path)
    if "://" not in url:
        folder = Path(path).absolute()
        if not folder.is_dir():
            raise ReplayError(f"{folder}: no such replay folder. Record one with notebooks/00_data_collection.ipynb.")
        url = folder.as_uri()
    kvstore = ts.KvStore.open(url.rstrip("/") + "/").result()
    suffix = b"/manifest.json"
    folders = [key[: -len(suffix)].decode() for key in kvstore.list().result() if key.endswith(suffix)]
    runs: dict[str, list[_Run]] = {}
    for folder in sorted(folders, key=lambda name: (name.split("/")[0], len(name), name)):
        run = _open_run(kvstore / f"{folder}/")
        if run is not None:
            others = runs.setdefault(run.manifest["game"], [])
            twins = [other.kvstore.url for other in others if other.manifest["run"] == run.manifest["run"]]
            if twins:
                raise ReplayError(
                    f"{path}: holds the same run twice: {twins[0]} and {run.kvstore.url}. Open one dataset."
                )
            others.append(run)
    if not runs:
        raise ReplayError(
            f"{path}: not a replay store: no manifest.json of format {FORMAT!r} with complete episodes below it. "
            "Expected the dataset's folder, which holds one folder per game."
        )
    return Replay(str(path), runs)


def _open_run(kvstore: ts.KvStore) -> _Run | None:
    """One game and run, or None where no episode was completed yet."""
    manifest = _read_manifest(kvstore.read("manifest.json").result().value, f"{kvstore.url}manifest.json")
    journal = kvstore.read("episodes.jsonl").result()
    episodes = _parse_journal(journal.value, f"{kvstore.url}episodes.jsonl")
    return _Run(kvstore, manifest, episodes) if len(episodes) else None
