"""Appending to a replay store, episode by episode."""

import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow as pa
import tensorstore as ts

from scaled_ql.games import OtherActions, check_actions
from scaled_ql.replay import format as fmt
from scaled_ql.replay.format import FRAME_SHAPE, ReplayError
from scaled_ql.replay.recording import open_recording

JOURNAL_LINES = 4_096  # longer journals go into the table when a writer closes


class ReplayWriter:
    """Appends whole episodes of one game and run to a store on a local disk.

    Each `append` or `extend` is on disk (fsync) when it returns. Reopening a store that was being written when its
    process died continues after the last complete episode. A file lock keeps a second writer out.

    Attributes:
        num_episodes, num_transitions: on disk.
        last_episode: row of the episode table; None of an empty recording.
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
        **rules: Any,
    ):
        """Open `path`/`game`/`run` for appending, creating it where needed.

        Args:
            path: the dataset's folder.
            game: name as in the paper.
            run: number of the recording, so that several agents' experience of a game stays apart.
            actions: names of the minimal action set; stored actions index it.
            source: description of the player.
            sticky_actions: probability that the emulator repeated an action.
            frame_skip: emulator frames per transition.
            rom_md5: MD5 of the ROM that was played.
            rewards: ``"raw"`` or ``"clipped"``.
            lock_timeout: seconds to wait for another writer (a killed one releases the lock within a moment).
            **rules: the other rules of play, named as in `games.RULES`; those left out are unknown.

        Raises:
            ReplayError: the folder holds something else, other settings than before, or another writer.
        """
        self.folder = fmt.local_folder(path) / game / str(run)
        self.manifest = fmt.make_manifest(
            game,
            run,
            actions=list(actions),
            source=source,
            sticky_actions=sticky_actions,
            frame_skip=frame_skip,
            rom_md5=rom_md5,
            rewards=rewards,
            **rules,
        )
        try:
            check_actions(game, self.manifest["actions"])
        except OtherActions as error:
            raise ReplayError(f"{self.folder}: {error}") from error
        self._lock = lock_recording(self.folder, lock_timeout)
        try:
            fmt.write_or_compare_manifest(self.folder, self.manifest)
            self._arrays = fmt.open_arrays(self.folder)
            self._recover()
            self._check_last_row()
        except BaseException:
            self._lock.release()
            raise

    def _recover(self) -> None:
        """Count committed episodes and cut a torn last line, which a killed writer leaves behind."""
        self._table = self.folder / "episodes.arrow"
        self._journal = self.folder / "episodes.jsonl"
        table = fmt.empty_table()
        if self._table.exists():
            table = fmt.read_table(pa.py_buffer(self._table.read_bytes()), str(self._table))
        content = self._journal.read_bytes() if self._journal.exists() else b""
        covered = int(table["length"].to_numpy().sum())
        checked = fmt.has_checksums((self.folder / "manifest.json").read_bytes())
        self._appended, self._journal_size = fmt.parse_journal(content, str(self._journal), covered, checked)
        self.num_episodes = table.num_rows + len(self._appended)
        self.num_transitions = covered + sum(row["length"] for row in self._appended)
        rows = self._appended or table.slice(max(table.num_rows - 1, 0)).to_pylist()
        self.last_episode: dict[str, Any] | None = rows[-1] if rows else None
        self._next_row = max(
            int((table["row"].to_numpy() + table["frames"].to_numpy()).max(initial=0)),
            max((row["row"] + row["frames"] for row in self._appended), default=0),
        )
        if self._journal_size < len(content):
            os.truncate(self._journal, self._journal_size)

    def _check_last_row(self) -> None:
        """Read the end of every array: appending to a lost chunk would replace its contents with zeros."""
        if self.num_transitions:
            open_recording(ts.KvStore.open(self.folder.as_uri() + "/").result()).read_last_row()

    def append(
        self,
        observation: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        *,
        terminal: bool,
        final_observation: np.ndarray | None = None,
        **columns: float | int | str,
    ) -> None:
        """Append one episode of L >= 1 transitions.

        Args:
            observation: uint8 [L, 84, 84], the frame on which each action was chosen.
            action: integers [L], indices into the store's actions.
            reward: [L], reward of each action.
            terminal: whether the episode ended in the game; if not, it was truncated.
            final_observation: uint8 [84, 84], the frame after the last action, if known.
            **columns: further columns of the episode table (say, the player's epsilon).

        Raises:
            ReplayError: invalid data, or a failed write; episodes appended before stay valid.
        """
        frames = {"observation": observation, "final_observation": final_observation}
        self.extend([frames | {"action": action, "reward": reward, "terminal": terminal} | columns])

    def extend(self, episodes: Iterable[Mapping[str, Any]]) -> None:
        """Append episodes, arguments of `append` each, with one write, which costs as much as a thousand transitions.

        Raises:
            ReplayError: as `append`; none of them is appended.
        """
        parts, rows, start, row = [], [], self.num_transitions, self._next_row
        for number, episode in enumerate(episodes, self.num_episodes):
            data, entry = self._rows(f"{self.folder}: episode {number}", start, row, dict(episode))
            parts.append(data)
            rows.append(entry)
            start, row = start + entry["length"], row + entry["frames"]
        if not rows:
            return
        together = parts[0] if len(parts) == 1 else {n: np.concatenate([part[n] for part in parts]) for n in parts[0]}
        try:
            fmt.grow(self._arrays, row)
            for write in fmt.write_rows(self._arrays, self._next_row, together):
                write.result()
            self._commit(rows)
        except fmt.STORE_ERRORS as error:
            raise ReplayError(
                f"{self.folder}: episode {self.num_episodes} could not be written ({fmt.said(error)}). The "
                f"{self.num_transitions} transitions before it are safe; make room on the disk and run again to "
                "continue."
            ) from error
        self.last_episode = rows[-1]
        self.num_episodes += len(rows)
        self.num_transitions, self._next_row = start, row

    def _rows(
        self, where: str, start: int, row: int, episode: dict[str, Any]
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """`episode_rows` of an episode, checked, with its further columns."""
        observation, action = np.asarray(episode.pop("observation")), np.asarray(episode.pop("action"))
        reward, terminal = np.asarray(episode.pop("reward"), np.float32), bool(episode.pop("terminal"))
        final, columns = episode.pop("final_observation", None), episode
        check_episode(self.manifest, where, observation, action, reward)
        reserved = columns.keys() & {*fmt.EPISODE, "run"}
        if reserved:
            raise ReplayError(f"{self.folder}: reserved column name {', '.join(sorted(reserved))}; rename it.")
        if final is not None:
            final = np.asarray(final)
            if final.shape != FRAME_SHAPE or final.dtype != np.uint8:
                raise ReplayError(
                    f"{where}: final_observation is {final.dtype} {list(final.shape)}, expected uint8 [84, 84]."
                )
            observation = np.concatenate([observation, final[None]])
        data, entry = episode_rows(observation, action, reward, terminal, start, row)
        entry |= {name: getattr(value, "item", lambda value=value: value)() for name, value in columns.items()}
        return data, entry

    def _commit(self, rows: list[dict[str, Any]]) -> None:
        with self._journal.open("ab") as journal:
            journal.truncate(self._journal_size)  # remains of a failed commit
            journal.write(b"".join(map(fmt.journal_line, rows)))
            journal.flush()
            os.fsync(journal.fileno())
            self._journal_size = journal.tell()
        self._appended += rows

    def _compact(self) -> None:
        """Move a long journal into the table. If killed in between, the journal repeats the table: harmless."""
        table = pa.Table.from_pylist(self._appended)
        if self._table.exists():
            before = fmt.read_table(pa.py_buffer(self._table.read_bytes()), str(self._table))
            table = pa.concat_tables([before, table], promote_options="permissive")
        fmt.write_table(self._table, table)
        os.truncate(self._journal, 0)
        self._appended, self._journal_size = [], 0

    def close(self) -> None:
        """Release the lock, so that another writer can open the store."""
        if self._lock.is_locked:
            if len(self._appended) > JOURNAL_LINES:
                self._compact()
            self._lock.release()

    def __enter__(self) -> "ReplayWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lock_recording(folder: Path, timeout: float) -> filelock.BaseFileLock:
    """Create a recording's folder and acquire its writer lock.

    Raises:
        ReplayError: the folder cannot be made, or another process holds the lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReplayError(f"{folder}: cannot create the store ({error}).") from error
    lock = filelock.FileLock(folder / ".lock", fallback_to_soft=False)  # a soft lock outlives a killed writer
    try:
        lock.acquire(timeout=timeout)
    except filelock.Timeout as error:
        raise ReplayError(f"{folder}: another process is writing this store; wait for it or stop it.") from error
    except OSError as error:
        raise ReplayError(
            f"{folder}: cannot write here ({error}). Choose a writable folder, on a file system with locks."
        ) from error
    return lock


def check_episode(
    manifest: dict[str, Any], where: str, observation: np.ndarray, action: np.ndarray, reward: np.ndarray
) -> None:
    """Check one episode's arrays.

    Raises:
        ReplayError: a wrong shape or dtype, an action outside the game's set, a non-finite reward.
    """
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
    allowed = len(manifest["actions"])
    if not np.issubdtype(action.dtype, np.integer) or action.min() < 0 or action.max() >= allowed:
        raise ReplayError(
            f"{where}: actions must be integers from 0 to {allowed - 1} ({manifest['game']} has "
            f"{', '.join(manifest['actions'])}), got {np.unique(action).tolist()}."
        )


def episode_rows(
    observation: np.ndarray, action: np.ndarray, reward: np.ndarray, terminal: bool, start: int, row: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """One episode as rows of the arrays and as a row of the table.

    Args:
        observation: uint8 [L, 84, 84], or [L + 1, 84, 84] with the frame after the last action.
        action: [L].
        reward: float32 [L].
        terminal: whether it ended in the game.
        start: index of its first transition in the run.
        row: row of its first transition in the arrays.
    """
    length, frames = len(action), len(observation)
    last = np.arange(frames) == length - 1
    beyond = np.zeros(frames - length, np.int32)
    data = {
        "observation": observation,
        "action": np.concatenate([action.astype(np.int32), beyond]),
        "reward": np.concatenate([reward, beyond.astype(np.float32)]),
        "terminal": last & terminal,
        "truncated": last & (not terminal),
    }
    entry = {
        "start": start,
        "length": length,
        "row": row,
        "frames": frames,
        "episode_return": float(reward.sum(dtype=np.float64)),
        "terminal": terminal,
        "truncated": not terminal,
        "continued": False,
        "crc32": zlib.crc32(fmt.step_records(fmt.frame_crc32s(observation), action, reward)),
    }
    return data, entry
