"""DQN-Replay logs (Agarwal et al., 2020): dumps of Dopamine's replay buffer, which was filled again and again.

::

    Breakout/1/replay_logs/$store$_observation_ckpt.0.gz   gzip over npy, uint8 [C, 84, 84]
                           $store$_action_ckpt.0.gz        int32 [C]
                           $store$_reward_ckpt.0.gz        float32 [C]
                           $store$_terminal_ckpt.0.gz      uint8 [C]
                           add_count_ckpt.0.gz             int64 []

The buffer is a ring of C rows that has seen `add_count` rows when it is dumped. Row r holds the row with the global
number g, the largest below add_count with g % C == r, and a file is new from the number at which the previous file
ended. Rows of a ring that is not full yet were never written; they hold zeros, or stale memory.
An episode begins with three rows of zeros.

The published logs were dumped once a cycle, one row early: the last row of file k is the row between files k - 1 and
k. The last dump of such a log saves the ring's position in place of add_count. Dopamine's own checkpoints are dumped
at any time and always save add_count. So the last count of a log, where it is below C, may be either;
`_last_count` compares contents to decide.

Here a row of the arrays is the row with that global number: files do not depend on one another.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import cycle
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec
import numpy as np
from isal import igzip_threaded

from scaled_ql.environments import rules
from scaled_ql.games import action_names
from scaled_ql.replay import format as fmt
from scaled_ql.replay.format import FRAME_SHAPE, ReplayError
from scaled_ql.replay.formats import importing
from scaled_ql.replay.formats.importing import BLOCK, OnProgress, Part, Plan, Report, RowWriter, Unreadable

SOURCE = "DQN-Replay"
PADDING = 3  # rows of zeros before an episode: Dopamine's stack size less one
PUBLISHED = rules(sticky_actions=0.25)
READ_BYTES = 1 << 18  # decoded in one call: as much may be lost before a cut
MAX_CAPACITY = 20_000_000  # rows per file; more would not fit in memory
COLUMNS = {"action": np.int32, "reward": np.float32, "terminal": np.uint8}
BOUNDARY = "boundary"  # a column besides Dopamine's: 1 truncated here, 2 its beginning was lost
LOGS = "replay_logs"  # folder of a run's files
MANIFEST = "manifest.json"  # of the store that logs were exported from
FILE = re.compile(r"^\$store\$_(observation|action|reward|terminal)_ckpt\.(\d+)\.gz$|^add_count_ckpt\.(\d+)\.gz$")


def import_dqn_replay(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    games: list[str] | None = None,
    runs: list[int] | None = None,
    *,
    actions: str = "minimal",
    skip_bad: bool = False,
    workers: int = 0,
    scheduler: str = "",
    progress: OnProgress | None = None,
) -> Report:
    """Import logs of Dopamine's replay buffer; a killed import resumes when it is called again.

    Args:
        source: the folder or URL (``gs://`` with gcsfs, ``s3://`` with s3fs, ...) that holds the game folders.
        destination: the dataset's folder, on a local disk.
        games: games to import; None: all.
        runs: runs to import of each game; None: all.
        actions: set that the actions index: the game's ``"minimal"`` set, as in published logs, or the ``"full"`` set
            of 18, which is mapped onto the minimal one by name.
        skip_bad: skip a file that cannot be read, and list it in the report and in ``import.json``.
        workers: processes that convert files in parallel; 0: this one.
        scheduler: address of a running Dask scheduler to use instead, whose workers see both folders.
        progress: called with (files done, files known).

    Returns:
        imported transitions, gaps, excluded rows and files left out.

    Raises:
        ReplayError: a file that cannot be read or is inconsistent; the message names file, row and remedy.
    """
    filesystem, root = importing.open_source(source)
    url, destination = filesystem.unstrip_protocol(root), fmt.local_folder(destination)
    found = _find_runs(filesystem, root, games, runs)

    def plan(game: str, run: int) -> Plan:
        return plan_recording(url, found[game, run], destination, game, run, actions)

    return importing.run_import(
        destination, sorted(found), plan, convert,
        order_by=["row"], skip_bad=skip_bad, workers=workers, scheduler=scheduler, progress=progress,
    )  # fmt: skip


def _find_runs(
    filesystem: fsspec.AbstractFileSystem, root: str, games: list[str] | None, runs: list[int] | None
) -> dict[tuple[str, int], str]:
    """Folders of logs in a source, as paths in it, by game and run."""
    found = {}
    _expect_source(filesystem, root)
    for game, folder in importing.game_folders(filesystem, root, games).items():
        there = importing.folders_in(filesystem, folder)
        names = {int(name): address for name, address in there.items() if name.isdigit()}
        absent = sorted(set(runs or ()) - names.keys())
        if absent or not names:
            _expect_game(filesystem, root, folder, there)
            raise ReplayError(
                f"{folder}: no run {', '.join(map(str, absent)) or 'folder'}; it has {sorted(names)}. "
                f"Expected {folder}/<run>/{LOGS}/."
            )
        for run in sorted(runs or names):
            if LOGS not in importing.folders_in(filesystem, names[run]):
                here = "Dopamine's files, but no folder" if _has_logs(filesystem, names[run]) else "no folder"
                raise ReplayError(
                    f"{names[run]}: has {here} {LOGS}. Expected {names[run]}/{LOGS}/ with those files in it."
                )
            found[game, run] = f"{names[run]}/{LOGS}".removeprefix(root).lstrip("/")
    return found


def _expect_game(filesystem: fsspec.AbstractFileSystem, root: str, folder: str, there: dict[str, str]) -> None:
    """Refuse a folder that looks like a level above or below a game's."""
    if _has_logs(filesystem, folder):
        raise ReplayError(f"{folder}: has Dopamine's files, but no folder of a run. Expected {folder}/<run>/{LOGS}/.")
    if LOGS in there:
        raise ReplayError(f"{folder}: has a folder {LOGS}, but no folder of a run. Expected {folder}/<run>/{LOGS}/.")


def _has_logs(filesystem: fsspec.AbstractFileSystem, folder: str) -> bool:
    return any(FILE.match(entry["name"].rsplit("/", 1)[-1]) for entry in importing.list_folder(filesystem, folder))


def _expect_source(filesystem: fsspec.AbstractFileSystem, root: str) -> None:
    folders = importing.folders_in(filesystem, root)
    if _has_logs(filesystem, root):
        importing.expect_level(root, "is a folder of Dopamine's files, as <game>/<run>/replay_logs", 3)
    if LOGS in folders:
        importing.expect_level(root, f"is the folder of one run, with {LOGS} in it", 2)
    if folders and all(name.isdigit() for name in folders):
        importing.expect_level(root, f"is the folder of one game, with the runs {', '.join(sorted(folders))}", 1)


def plan_recording(source: str, folder: str, destination: Path, game: str, run: int, action_set: str) -> Plan:
    """Plan a run: its files, the global numbers that each adds, and the gaps between them.

    A bad file stays in the plan, to be reported in its turn.

    Raises:
        ReplayError: there are no files, or the destination cannot be written.
    """
    filesystem, root = importing.open_source(source)
    logs = f"{root}/{folder}"
    dumps: dict[int, dict[str, int]] = {}  # bytes of each file
    for entry in importing.list_folder(filesystem, logs):
        match = FILE.match(entry["name"].rsplit("/", 1)[-1])
        if match:
            dumps.setdefault(int(match[2] or match[3]), {})[match[1] or "add_count"] = entry["size"]
    if not dumps:
        raise ReplayError(f"{logs}: holds no $store$_observation_ckpt.<number>.gz; expected Dopamine's replay logs.")
    actions, target = list(action_names(game)), str(destination / game / str(run))
    indices = importing.action_indices(actions, action_set)
    parts, gaps = [], []
    capacity, before, previous = 0, 0, None  # of the previous file: rows per file, rows added, number
    for number in sorted(dumps):
        try:
            _expect_all(logs, number, {*dumps[number]})
            capacity = _capacity(filesystem, logs, number, capacity)
            count = _read_add_count(filesystem, _address(logs, "add_count", number))
            follows = previous is not None
            if number == max(dumps) and count < capacity:
                count, follows = _last_count(filesystem, logs, number, count, capacity, before, previous, indices)
                if count == before:
                    continue
            if count <= before:
                raise Unreadable(
                    f"{_address(logs, 'add_count', number)}: {count} rows added, but {before} by the previous file. "
                    "Expected counts that grow with the number of the dump: files of different logs are mixed."
                )
        except Unreadable as error:
            parts.append(Part(target, number, _address(folder, "observation", number), {"bad": str(error)}, source))
            continue
        low = max(before, count - capacity)
        if low > before:
            gaps.append({"first": before, "last": low - 1, "before": _address(folder, "observation", number)})
        content = {
            "logs": folder, "number": number, "capacity": capacity, "low": low, "stop": count,
            "previous": previous if follows and low == before else None, "actions": indices,
            "sizes": dict(sorted(dumps[number].items())),  # tell this log from another
        }  # fmt: skip
        parts.append(Part(target, number, _address(folder, "observation", number), content, source))
        before, previous = count, number
    manifest = _read_manifest(filesystem, logs, game, run, actions, action_set)
    importing.prepare_recording(Path(target), before, manifest, parts)
    return Plan(manifest, parts, {"gaps": gaps})


def _read_manifest(
    filesystem: fsspec.AbstractFileSystem, logs: str, game: str, run: int, actions: list[str], action_set: str
) -> dict[str, Any]:
    """The manifest beside logs that were exported from a store, or that of a published log."""
    known = fmt.make_manifest(
        game, run, actions=actions, source=SOURCE, **PUBLISHED | {"rewards": "", "action_set": action_set}
    )
    address = f"{logs}/{MANIFEST}"
    if not filesystem.exists(address):
        return known
    given = fmt.read_manifest(filesystem.cat_file(address), address)
    if (given["game"], given["actions"]) != (game, actions):
        raise ReplayError(
            f"{address}: is of {given['game']} with the actions {given['actions']}, the folder is of {game} with "
            f"{actions}. Logs of two games are mixed; restore them from their source."
        )
    return {**given, "run": run}


def _expect_all(logs: str, number: int, there: set[str]) -> None:
    absent = {*COLUMNS, "observation", "add_count"} - there
    if absent:
        names = ", ".join(_address(logs, name, number) for name in sorted(absent))
        raise Unreadable(f"{names}: missing, while other files of dump {number} are there. Restore it.")


def _capacity(filesystem: fsspec.AbstractFileSystem, logs: str, number: int, before: int) -> int:
    address = _address(logs, "action", number)
    with _opened(filesystem, address) as file:
        rows = file.expect(COLUMNS["action"], ())
    if before and rows != before:
        raise Unreadable(
            f"{address}: {rows} rows, but the files before it have {before}. Expected the dumps of one buffer: logs "
            "of different ones cannot be mixed."
        )
    return rows


def _address(logs: str, column: str, number: int) -> str:
    name = column if column == "add_count" else f"$store$_{column}"
    return f"{logs}/{name}_ckpt.{number}.gz"


def _last_count(
    filesystem: fsspec.AbstractFileSystem, logs: str, number: int, count: int, capacity: int, before: int,
    previous: int | None, indices: list[int],
) -> tuple[int, bool]:  # fmt: skip
    """Rows added at a log's last dump, which saved either that number or the ring's position.

    Rows of the previous dump that cannot have been overwritten since are the same in both. The smallest count
    consistent with this is the right one.

    Args:
        filesystem: file system of the logs.
        logs: folder of the logs.
        number: number of the dump.
        count: saved number, below the capacity.
        capacity: capacity of the ring.
        before: rows added at the previous dump; 0 for none.
        previous: number of that dump.
        indices: see `_bad_rows`.

    Returns:
        the count, and whether its new rows are known to follow the previous dump's last one.
    """
    first = count + max(-((count - before) // capacity), 0) * capacity  # the smallest that is not below `before`
    cycles = 1 if previous is None else number - previous  # if the log is dumped once a cycle
    same = None
    if previous is not None:
        old = np.arange(max(first - capacity, 0), before) % capacity
        same = _are_same(filesystem, logs, number, previous, old, capacity)
    if same:
        return first, True
    if same is None and first < capacity:
        if _never_written(filesystem, logs, number, count, capacity, indices):
            return first, previous is not None
        return first + (max(number, 1) if previous is None else cycles) * capacity, False
    if same is None and cycles == 1 and previous is not None:
        # The previous dump ended in an episode's padding, so there is nothing to compare. A log that has been dumped
        # once a cycle so far, as the published ones are, is assumed to continue so to its end.
        return first, (before + 1) // capacity == previous + 1
    return first + (max(cycles - 1, 1) if same is False else cycles - 1) * capacity, False


def _are_same(
    filesystem: fsspec.AbstractFileSystem, logs: str, number: int, previous: int, rows: np.ndarray, capacity: int
) -> bool | None:
    """Whether two dumps agree in these rows; None if nothing can be compared, or only zeros."""
    differs, blank = False, True
    for name, dtype in COLUMNS.items():
        ours = read_column(filesystem, _address(logs, name, number), dtype, capacity)[rows]
        try:
            theirs = read_column(filesystem, _address(logs, name, previous), dtype, capacity)[rows]
        except Unreadable:
            return None
        differs |= ours.tobytes() != theirs.tobytes()
        blank &= not ours.any()
    if not differs and len(rows) < BLOCK:  # few rows may agree by chance
        with suppress(Unreadable):
            ours, theirs = (
                _frame_crc32s(filesystem, _address(logs, "observation", dump), rows, capacity)
                for dump in (number, previous)
            )
            differs = bool((ours != theirs).any())
            blank &= bool((ours == fmt.BLACK).all())
    return None if blank and not differs else not differs


def _never_written(
    filesystem: fsspec.AbstractFileSystem, logs: str, number: int, count: int, capacity: int, indices: list[int]
) -> bool:
    """Whether the rows from the ring's position on look never written.

    Large arrays begin as zeros, so their frames are black; small ones hold stale memory.
    """
    columns = [read_column(filesystem, _address(logs, name, number), COLUMNS[name], capacity) for name in COLUMNS]
    action, reward, terminal = (column[count:] for column in columns)
    invalid = ~np.isfinite(reward) | ~np.isin(action, np.flatnonzero(np.array(indices) >= 0)) | (terminal > 1)
    if invalid.mean() > 0.5:
        return True
    try:
        crc32 = _frame_crc32s(filesystem, _address(logs, "observation", number), np.arange(count, capacity), capacity)
    except Unreadable:  # its own part reports it; the first dump of a log is the likeliest not to be full
        return number == 0
    return bool((crc32 == fmt.BLACK).all())


def _frame_crc32s(filesystem: fsspec.AbstractFileSystem, address: str, rows: np.ndarray, capacity: int) -> np.ndarray:
    """CRC-32 of a dump's frames at these rows, uint32 [N]."""
    crc32, last = np.zeros(capacity, np.uint32), int(rows.max())
    with _opened(filesystem, address) as file:
        file.expect(np.uint8, FRAME_SHAPE, capacity)
        for begin in range(0, last + 1, BLOCK):
            block = np.empty((min(BLOCK, capacity - begin), *FRAME_SHAPE), np.uint8)
            file.fill(block)
            crc32[begin : begin + len(block)] = fmt.frame_crc32s(block)
    return crc32[rows]


class _Npy:
    """A gzipped npy file, read front to back; never unpickles, never reads beyond what its header promises."""

    def __init__(self, address: str, stream: BinaryIO):
        self.address, self.row, self.stream = address, 0, stream
        version = np.lib.format.read_magic(self.stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise Unreadable(f"{address}: npy version {version}, expected 1.0 or 2.0.")
        self.shape, fortran, self.dtype = read(self.stream)
        if self.dtype.hasobject:
            raise Unreadable(f"{address}: holds pickled objects, which are never loaded; expected numbers.")
        if fortran and len(self.shape) > 1:
            raise Unreadable(f"{address}: in Fortran order; expected C order.")

    def expect(self, dtype: Any, tail: tuple[int, ...], rows: int | None = None) -> int:
        """Check dtype and shape; returns the number of rows."""
        wanted = f"{np.dtype(dtype)} [{rows or 'C'}{''.join(f', {n}' for n in tail)}]"
        if self.dtype != np.dtype(dtype) or len(self.shape) != 1 + len(tail) or self.shape[1:] != tail:
            raise Unreadable(f"{self.address}: is {self.dtype} {list(self.shape)}, expected {wanted}.")
        if not 0 < self.shape[0] <= MAX_CAPACITY or (rows is not None and self.shape[0] != rows):
            raise Unreadable(
                f"{self.address}: its header says {self.shape[0]} rows, expected {rows or f'1 to {MAX_CAPACITY}'}."
            )
        return self.shape[0]

    def fill(self, block: np.ndarray) -> None:
        """Read the next rows into a contiguous array; after a failure, `row` is the first unread one."""
        target, filled, begin = memoryview(block).cast("B"), 0, self.row
        while filled < len(target):
            count = self.stream.readinto(target[filled : filled + READ_BYTES])
            if not count:
                raise EOFError(f"it ends there, its header promises {self.shape[0]} rows")
            filled += count
            self.row = begin + filled * len(block) // len(target)

    def expect_end(self) -> None:
        """Check that nothing follows the last row, and with that gzip's own checksum."""
        if self.stream.read(1):
            raise Unreadable(
                f"{self.address}: continues after the {self.row} rows that its header promises. "
                "Restore it from its source."
            )


@contextmanager
def _opened(filesystem: fsspec.AbstractFileSystem, address: str) -> Iterator[_Npy]:
    """Open one file of a log; errors while it is read name the file, the row and the remedy."""
    file = None
    try:
        with filesystem.open(address, "rb") as raw, igzip_threaded.open(raw, "rb") as stream:
            file = _Npy(address, stream)
            yield file
    except ReplayError:
        raise
    except Exception as error:  # gzip, npy and each kind of bucket have their own errors
        # Rows before a cut are sound; with a wrong checksum, none is known to be.
        row = file.row if file and isinstance(error, EOFError) else 0
        if isinstance(error, PermissionError):
            remedy = "Check your permissions."
        else:
            remedy = "The file is damaged or not a gzipped npy; restore it from its source."
        raise Unreadable(
            f"{address}: cannot be read from row {row} on ({type(error).__name__}: {error}). {remedy}", row
        ) from error


def _read_add_count(filesystem: fsspec.AbstractFileSystem, address: str) -> int:
    with _opened(filesystem, address) as file:
        if file.shape != () or file.dtype.kind not in "iu":
            raise Unreadable(f"{address}: is {file.dtype} {list(file.shape)}, expected one integer.")
        content = file.stream.read(file.dtype.itemsize + 1)
        if len(content) != file.dtype.itemsize:
            raise Unreadable(f"{address}: not as long as its header says; restore it from its source.")
        return int(np.frombuffer(content, file.dtype)[0])


def read_column(filesystem: fsspec.AbstractFileSystem, address: str, dtype: Any, capacity: int) -> np.ndarray:
    """One small column of a dump, [capacity].

    Raises:
        ReplayError: damaged, or of another dtype or length.
    """
    with _opened(filesystem, address) as file:
        file.expect(dtype, (), capacity)
        column = np.empty(capacity, dtype)
        file.fill(column)
        file.expect_end()
        return column


class Dump(NamedTuple):
    """The new rows of one dump in the order of their global numbers, [N]; row i has the number low + i."""

    low: int
    ring: np.ndarray  # row of the file
    action: np.ndarray
    reward: np.ndarray
    terminal: np.ndarray
    boundary: np.ndarray


def convert(part: Part) -> tuple[list[dict[str, Any]], dict[str, list], Unreadable | None]:
    """Write one dump's rows and find its segments.

    Returns:
        (segments, report of excluded rows, the error that ended it early or None)
    """
    content = part.content
    if "bad" in content:
        return [], {}, Unreadable(content["bad"])
    filesystem, root = importing.open_source(part.source)
    try:
        dump, ended = _read_dump(filesystem, f"{root}/{content['logs']}", content)
    except Unreadable as error:
        return [], {}, Unreadable(str(error))  # nothing of the dump can be used, from row 0 on
    address = part.address
    crc32, good, problem = _write_frames(filesystem, address, part, dump)
    segments, excluded = find_segments(dump, crc32, good, ended, content["actions"], address)
    if importing.too_many(len(excluded), int(good.sum())):
        invalid = len(excluded), dump.action[good], content["actions"]
        return [], {}, Unreadable(importing.describe_invalid(address, part.game, *invalid))
    dump = dump._replace(action=importing.map_actions(dump.action, content["actions"]))
    usable = np.zeros(len(dump.action), bool)
    terminal, truncated = np.zeros((2, len(dump.action)), bool)
    for piece in segments:
        begin, stop = piece["row"] - dump.low, piece["row"] - dump.low + piece["length"]
        usable[begin:stop] = True
        terminal[stop - 1] = piece["terminal"]
        truncated[stop - 1] = not piece["terminal"] and not piece["open"]
    writer = RowWriter(Path(part.folder), dump.low)
    action, reward = np.where(usable, dump.action, 0), np.where(usable, dump.reward, np.float32(0))
    writer.append(action=action, reward=reward, terminal=terminal, truncated=truncated)
    writer.close()
    return segments, {"excluded": excluded}, problem


def _read_dump(filesystem: fsspec.AbstractFileSystem, logs: str, content: dict[str, Any]) -> tuple[Dump, int]:
    """A dump's small columns, and when the episode before its first row ended; see `find_segments`."""
    number, capacity = content["number"], content["capacity"]
    low, previous = content["low"], content["previous"]
    ring = np.arange(low, content["stop"]) % capacity
    columns = {
        name: read_column(filesystem, _address(logs, name, number), dtype, capacity)[ring]
        for name, dtype in COLUMNS.items()
    }
    boundary = np.zeros(len(ring), np.uint8)
    if filesystem.exists(_address(logs, BOUNDARY, number)):
        boundary = read_column(filesystem, _address(logs, BOUNDARY, number), np.uint8, capacity)[ring]
    ended = 1 if low == 0 else -1
    if previous is not None:
        before = np.arange(low - 1, max(low - 2 - PADDING, -1), -1) % capacity
        try:
            ends = read_column(filesystem, _address(logs, "terminal", previous), np.uint8, capacity)[before] == 1
            ended = int(np.argmax(ends)) + 1 if ends.any() else 0
        except Unreadable:  # that file's own part reports it
            ended = -1
    return Dump(low, ring, **columns, boundary=boundary), ended


def _write_frames(
    filesystem: fsspec.AbstractFileSystem, address: str, part: Part, dump: Dump
) -> tuple[np.ndarray, np.ndarray, Unreadable | None]:
    """Write the new frames; returns their CRC-32s, which of them were read, and the error that ended reading early."""
    capacity = part.content["capacity"]
    crc32, good = np.zeros(len(dump.ring), np.uint32), np.zeros(len(dump.ring), bool)
    # In the file's order the new rows are at most two stretches: the ring's front, and the end that precedes it.
    turn = int(np.argmin(dump.ring))
    stretches = sorted((int(dump.ring[i]), i, n) for i, n in ((0, turn), (turn, len(dump.ring) - turn)) if n)
    writers = {place: RowWriter(Path(part.folder), dump.low + place) for _, place, _ in stretches}
    # One block is read while the one before it is being written; new memory for each would cost more than reading.
    buffers = cycle(np.empty((3, min(BLOCK, capacity), *FRAME_SHAPE), np.uint8))
    problem, at = None, 0

    def use(block: np.ndarray) -> None:
        """Take the new rows from a block, which begins at row `at` of the file."""
        for ring, place, count in stretches:
            begin, stop = max(ring, at), min(ring + count, at + len(block))
            if begin >= stop:
                writers[place].wait()  # before its buffer is used again
            else:
                frames = block[begin - at : stop - at]
                here = slice(place + begin - ring, place + stop - ring)
                crc32[here] = fmt.frame_crc32s(frames)
                good[here] = True
                writers[place].append(observation=frames)

    try:
        with _opened(filesystem, address) as file:
            file.expect(np.uint8, FRAME_SHAPE, capacity)
            while at < capacity:
                block = next(buffers)[: capacity - at]
                try:
                    file.fill(block)
                finally:
                    use(block[: file.row - at])
                    at = file.row
            file.expect_end()
    except Unreadable as error:
        problem = error
        good &= dump.ring < error.row
    for writer in writers.values():
        writer.close()
    return crc32, good, problem


def find_segments(
    dump: Dump, crc32: np.ndarray, good: np.ndarray, ended: int, indices: list[int], file: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Cut a dump's new rows into segments of episodes.

    Args:
        dump: N rows.
        crc32: uint32 [N], of each frame.
        good: bool [N], whether the frame could be read.
        ended: distance from the first row back to the last episode's end, at most PADDING + 1; 0 if it is farther, -1
            if those rows are lost.
        indices: the game's index of each of the log's actions, -1 for none; segments use the game's.
        file: name, for the list.

    Returns:
        (segments, invalid rows with the reason for each)
    """
    size = len(dump.action)
    excluded, bad = _bad_rows(dump, good, indices, file)
    action = importing.map_actions(dump.action, indices)
    ends = dump.terminal == 1
    padding, depth = _find_padding(dump, crc32, good, bad, ended)
    keep = good & ~bad & ~padding
    lost = (dump.boundary & 2) > 0
    # A row is an episode's first if an episode ended, or padding stood, just before it.
    padded_before = 1 < ended <= depth + 1
    fresh = np.concatenate([[ended == 1 or padded_before], (ends | padding)[:-1]]) & ~lost
    starts = keep & (fresh | lost | ~np.concatenate([[False], keep[:-1]]))
    stops = np.append(np.flatnonzero(starts)[1:], size)
    segments = []
    for begin, stop in zip(np.flatnonzero(starts).tolist(), stops.tolist()):
        stop = begin + int(np.argmin(np.append(keep[begin:stop], False)))
        here, last = slice(begin, stop), stop - 1
        joins = begin == 0 and ended >= 0 and not fresh[0]
        segments.append(
            importing.segment(
                dump.low + begin,
                crc32[here],
                action[here],
                dump.reward[here],
                terminal=ends[last] and not dump.boundary[last] & 1,
                continued=not fresh[begin] and not joins,
                joins=joins,
                is_open=stop == size and not ends[last],
            )
        )
    return segments, excluded


def _bad_rows(dump: Dump, good: np.ndarray, indices: list[int], file: str) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Invalid rows: (a list of them with the reason, bool [N])."""
    allowed = np.flatnonzero(np.array(indices) >= 0)
    known = f"0 to {len(indices) - 1}" if len(allowed) == len(indices) else ", ".join(map(str, allowed))
    tests = {
        "reward": (~np.isfinite(dump.reward), "expected a finite number"),
        "action": (~np.isin(dump.action, allowed), f"the game has {known}"),
        "terminal": (dump.terminal > 1, "expected 0 or 1"),
    }
    excluded, bad = [], np.zeros(len(good), bool)
    for name, (wrong, expected) in tests.items():
        for row in np.flatnonzero(wrong & good & ~bad).tolist():
            reason = f"its {name} is {getattr(dump, name)[row]}, {expected}"
            excluded.append({"file": file, "row": int(dump.ring[row]), "reason": reason})
        bad |= wrong
    return sorted(excluded, key=lambda entry: entry["row"]), bad


def _find_padding(
    dump: Dump, crc32: np.ndarray, good: np.ndarray, bad: np.ndarray, ended: int
) -> tuple[np.ndarray, int]:
    """Rows of zeros that precede episodes: (bool [N], their number per episode in this file)."""
    size = len(good)
    zero = good & (crc32 == fmt.BLACK) & (dump.action == 0) & (dump.reward == 0) & (dump.terminal == 0)

    blank = zero | bad  # a damaged row of padding is still one

    def run_of_zeros(row: int, limit: int) -> list[int]:
        rows = []
        while len(rows) < limit and row + len(rows) < size and blank[row + len(rows)]:
            rows.append(row + len(rows))
        return rows

    after = {
        position + 1: run_of_zeros(position + 1, PADDING) for position in np.flatnonzero(dump.terminal != 0).tolist()
    }
    # A first frame may be black as well; the usual number of rows of zeros tells padding from it.
    whole = [len(run) for row, run in after.items() if row + PADDING <= size and dump.terminal[row - 1] == 1]
    depth = int(np.median(whole)) if whole else PADDING
    before = run_of_zeros(0, depth - max(ended - 1, 0) if ended else 0)
    padding = np.zeros(size, bool)
    for run in [before, *(run[:depth] for run in after.values())]:
        padding[run] = True
    return padding & zero, depth
