"""The core of all imports: files become parts, parts become a recording; on Dask or in this process.

::

    plan(game, run)   the files, and the place of each one's rows in the recording's arrays
    convert(part)     one file: its rows into the arrays, its segments (pieces of episodes) into parts/<number>.arrow
    finish(run)       segments -> episode table -> read everything back and compare

Each of the three can be repeated at any time with the same result, so a killed import is simply started again: a part
whose file of segments exists is done. Each file has separate rows in the arrays, so files are converted in any order
and in parallel; the episode table says which rows count.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import fsspec
import numpy as np
import pyarrow as pa
import tensorstore as ts

from scaled_ql.games import FULL_ACTIONS, NUM_ACTIONS, UnknownGame, action_names
from scaled_ql.processes import main_guard_hint
from scaled_ql.replay import format as fmt
from scaled_ql.replay.format import ReplayError
from scaled_ql.replay.recording import open_recording, validate_recording
from scaled_ql.replay.writer import lock_recording

BLOCK = 8_192  # rows written together: 58 MB of frames, whole chunks
MAX_INVALID = 0.01  # share of a file's rows that may be invalid
FEW_INVALID = 5  # invalid rows that are always accepted
RETRIES = 5  # of a task whose worker was killed

OnProgress = Callable[[int, int], None]


class Part(NamedTuple):
    """One file of a recording.

    Attributes:
        folder: the recording's folder in the destination.
        number: its place in the order of time.
        file: its path in the source, for the report.
        content: input of the format's conversion; equal for equal results, wherever the source is.
        source: address of the source.
    """

    folder: str
    number: int
    file: str
    content: dict[str, Any]
    source: str

    @property
    def address(self) -> str:
        """Current address of its file, for messages and the report."""
        return f"{fsspec.core.url_to_fs(self.source)[1]}/{self.file}"

    @property
    def game(self) -> str:
        """Name of its game."""
        return Path(self.folder).parent.name


class Plan(NamedTuple):
    """The work for one recording.

    Attributes:
        manifest: the recording's manifest.
        parts: its files, in the order of time.
        notes: gaps found while planning, for the report.
    """

    manifest: dict[str, Any]
    parts: list[Part]
    notes: dict[str, list]


class Report(NamedTuple):
    """The result of an import.

    Attributes:
        transitions: transitions in the requested recordings, those imported before included.
        gaps: stretches that no file holds, as {game, run, ...}.
        excluded: invalid rows, as {game, run, file, row, reason}.
        left_out: files, or ends of files, that could not be read, as {game, run, file, row, reason}.
    """

    transitions: int
    gaps: list[dict[str, Any]]
    excluded: list[dict[str, Any]]
    left_out: list[dict[str, Any]]


def prepare_recording(folder: Path, rows: int, manifest: dict[str, Any], parts: list[Part]) -> None:
    """Create a recording's arrays, long enough for all its files.

    Raises:
        ReplayError: the destination cannot be written, or holds a recording or other files' contents.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _expect_same_recording(folder, manifest, parts)
        fmt.grow(fmt.open_arrays(folder), rows)
    except fmt.STORE_ERRORS as error:
        raise ReplayError(f"{folder}: cannot be written ({fmt.said(error)}). Choose another destination.") from error


def _expect_same_recording(folder: Path, manifest: dict[str, Any], parts: list[Part]) -> None:
    """Refuse a recording that came from other contents; the same contents at another address pass."""
    stored, file = folder / "manifest.json", folder / "import.json"
    if not stored.exists():
        return
    before = fmt.read_manifest(stored.read_bytes(), str(stored))
    report, damaged = {}, False
    with suppress(FileNotFoundError):
        try:
            report = fmt.read_report(file.read_bytes(), str(file))
        except ReplayError:
            damaged = True  # it is made again
    same = before["source"] == manifest["source"] and before["game"] == manifest["game"]
    if damaged:
        same &= any(_read_part(part) for part in parts)
    elif "source" in report:
        same &= report["source"] == parts[0].source or any(_read_part(part) for part in parts)
    elif report:  # of an earlier version, which listed whole addresses
        same &= any(known.endswith(part.file) for known in report["files"] for part in parts)
    if not same or not (folder / "parts").exists():
        raise ReplayError(
            f"{folder}: holds other data ({before['source']}, from {report.get('source', 'a recording')}). "
            "Choose another destination, or delete this folder."
        )


class Unreadable(ReplayError):
    """A file, or the rest of one, that cannot be imported.

    Attributes:
        row: first row or record that is not imported.
    """

    def __init__(self, message: str, row: int = 0):
        super().__init__(message)
        self.row = row


class RowWriter:
    """Collects rows and writes them in whole blocks, one block behind, so that reading continues meanwhile."""

    def __init__(self, folder: Path, row: int):
        self._arrays = fmt.open_arrays(folder)
        self._folder, self._row, self._held, self._columns = folder, row, 0, []
        self._pending: list[Any] = []

    def append(self, **columns: np.ndarray) -> None:
        """Add equally many rows to each of the arrays that are written.

        A block or more is written as it is, without a copy: it must not change before the next call, or `wait`.
        """
        count = len(next(iter(columns.values())))
        if count >= BLOCK:
            self._flush()
            self._write(columns)
            return
        self._columns.append({name: column.copy() for name, column in columns.items()})
        self._held += count
        if self._held >= BLOCK:
            self._flush()

    def close(self) -> None:
        """Write what is left and wait until all is on disk."""
        self._flush()
        self.wait()

    def _flush(self) -> None:
        if self._columns:
            self._write({name: np.concatenate([held[name] for held in self._columns]) for name in self._columns[0]})
            self._columns, self._held = [], 0

    def _write(self, columns: dict[str, np.ndarray]) -> None:
        self.wait()
        try:
            self._pending = fmt.write_rows(self._arrays, self._row, columns)
        except fmt.STORE_ERRORS as error:
            raise self._error(error) from error
        self._row += len(next(iter(columns.values())))

    def wait(self) -> None:
        """Wait until everything handed to TensorStore is on disk."""
        try:
            for write in self._pending:
                write.result()
        except fmt.STORE_ERRORS as error:
            raise self._error(error) from error
        finally:
            self._pending = []

    def _error(self, error: Exception) -> ReplayError:
        return ReplayError(
            f"{self._folder}: cannot be written ({fmt.said(error)}). What was imported before is safe; make room, or "
            "fix the permissions, and run the same import again to resume."
        )


def too_many(invalid: int, rows: int) -> bool:
    """Whether more rows of a file, or of a run, are invalid than damage explains."""
    return invalid > max(MAX_INVALID * rows, FEW_INVALID)


def action_indices(actions: Sequence[str], action_set: str) -> list[int]:
    """Index in the game's minimal set of each action of a source; -1 where the game lacks it.

    Args:
        actions: names of the minimal set.
        action_set: set that the source's actions index, ``"minimal"`` or ``"full"``.

    Raises:
        ReplayError: an unknown set.
    """
    if action_set not in ("minimal", "full"):
        raise ReplayError(f"actions is {action_set!r}; expected 'minimal' or 'full', the set that the source indexes.")
    names = FULL_ACTIONS if action_set == "full" else actions
    return [actions.index(name) if name in actions else -1 for name in names]


def map_actions(action: np.ndarray, indices: list[int]) -> np.ndarray:
    """A source's actions [N] as indices in the game's minimal set, int64 [N]; 0 for those that the game lacks."""
    known = np.array(indices)
    mapped = known[np.where((action >= 0) & (action < len(known)), action, 0)]
    return np.maximum(mapped, 0)


def describe_invalid(address: str, game: str, invalid: int, action: np.ndarray, indices: list[int]) -> str:
    """Error message for a file of which `too_many` rows are invalid.

    Args:
        address: address of the file.
        game: its name.
        invalid: number of invalid rows.
        action: integers [N], as in the file.
        indices: from `action_indices`.
    """
    names, low, high = action_names(game), int(action.min()), int(action.max())
    if min(indices) < 0:
        absent = sorted({FULL_ACTIONS[value] for value in np.unique(action) if 0 <= value < len(indices)} - {*names})
        remedy = f"They are read as the full set of 18, of which {game} lacks {', '.join(absent) or 'none of these'}."
    elif len(names) <= high < NUM_ACTIONS and low >= 0:
        remedy = (
            'They look like indices into the full set of 18. If they are, import with actions="full" (on the command '
            "line --actions full), which maps them by name."
        )
    else:
        remedy = "The file is damaged or of another game; restore it from its source."
    return (
        f"{address}: {invalid:,} of {len(action):,} rows are invalid, more than {MAX_INVALID:.0%}. Its actions are "
        f"{low} to {high}, and {game} has {', '.join(names)}. {remedy}"
    )


def write_part(part: Part, segments: list[dict[str, Any]], report: dict[str, list]) -> None:
    """Commit a converted part: its segments and its report."""
    table = pa.Table.from_pylist(segments or [{"row": 0}]).slice(0, len(segments))
    content = {"content": json.dumps(part.content, sort_keys=True), "report": json.dumps(report)}
    fmt.write_table(_part_file(part), table.replace_schema_metadata(content))


def _part_file(part: Part) -> Path:
    return Path(part.folder) / "parts" / f"{part.number:05}.arrow"


def _read_part(part: Part) -> tuple[list[dict[str, Any]], dict[str, list]] | None:
    """(segments, report) of a part already converted from the same content, or None."""
    file = _part_file(part)
    if not file.exists():
        return None
    try:
        table = fmt.read_table(pa.py_buffer(file.read_bytes()), str(file))
    except (ReplayError, OSError):
        return None  # it is made again
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    if metadata["content"] != json.dumps(part.content, sort_keys=True):
        return None
    return table.to_pylist(), json.loads(metadata["report"])


def segment(
    row: int,
    observation_crc32: np.ndarray,
    action: np.ndarray,
    reward: np.ndarray,
    *,
    terminal: bool,
    continued: bool = False,
    joins: bool = False,
    is_open: bool = False,
    **columns: Any,
) -> dict[str, Any]:
    """One unbroken stretch of transitions of one episode in one file.

    Args:
        row: row of its first transition in the recording's arrays.
        observation_crc32: uint32, CRC-32 of each frame; one more than actions where the last state is stored.
        action: integers [L].
        reward: float32 [L].
        terminal: the episode ends in the game with its last transition.
        continued: its episode began before this file.
        joins: it continues the last segment of the previous file.
        is_open: the next file may continue it.
        **columns: more columns of the episode table.
    """
    content = fmt.step_records(observation_crc32, action, reward)
    return {
        "row": row, "length": len(action), "frames": len(observation_crc32),
        "episode_return": float(reward.sum(dtype=np.float64)), "terminal": bool(terminal),
        "continued": bool(continued), "crc32": zlib.crc32(content), "joins": bool(joins), "open": bool(is_open),
        "largest": float(np.abs(reward).max()),
        "records": content if joins else b"", **columns,
    }  # fmt: skip


def join_segments(parts: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Join segments of consecutive parts into episodes in time order, across the borders of files."""
    episodes: list[dict[str, Any]] = []
    for segments in parts:
        for piece in segments:
            piece = dict(piece)
            last = episodes[-1] if episodes else None
            if piece["joins"] and last and last["open"] and last["row"] + last["length"] == piece["row"]:
                last["length"] += piece["length"]
                last["frames"] += piece["frames"]
                last["episode_return"] += piece["episode_return"]
                last["crc32"] = zlib.crc32(piece["records"], last["crc32"])
                last["terminal"], last["open"] = piece["terminal"], piece["open"]
                last["largest"] = max(last["largest"], piece["largest"])
            else:
                piece["continued"] = piece["continued"] or piece["joins"]
                episodes.append(piece)
    return episodes


def convert_part(convert: Callable[[Part], tuple], part: Part, skip_bad: bool) -> None:
    """Convert one part unless it is done; with `skip_bad`, an unreadable one counts as empty from there on."""
    done = _read_part(part)
    if done is not None and not done[1].get("left_out"):  # an unreadable file may have been repaired
        return
    folder = Path(part.folder)
    try:
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        segments, report, problem = convert(part)
        if problem is not None:
            if not skip_bad:
                raise problem
            report = {**report, "left_out": [{"file": part.address, "row": problem.row, "reason": str(problem)}]}
        write_part(part, segments, report)
    except OSError as error:
        raise ReplayError(
            f"{folder}: cannot be written ({error}). What was imported before is safe; run the same import again."
        ) from error


def finish_recording(plan: Plan, order_by: list[str], usable: int) -> dict[str, Any]:
    """Make the episode table of a recording from its first `usable` parts, read everything back, write `import.json`.

    Raises:
        ReplayError: too many invalid rows, or the written data differ from the read ones.
    """
    parts = [_read_part(part) for part in plan.parts[:usable]]
    folder = Path(plan.parts[0].folder)
    episodes = join_segments([segments for segments, _ in parts])
    episodes.sort(key=lambda episode: [episode[name] for name in order_by])
    report = {name: list(values) for name, values in plan.notes.items()}
    for _, found in parts:
        for name, values in found.items():
            report.setdefault(name, []).extend(values)
    rows = sum(episode["length"] for episode in episodes) + len(report.get("excluded", ()))
    if too_many(len(report.get("excluded", ())), rows):
        raise ReplayError(
            f"{folder}: {len(report['excluded']):,} of {rows:,} rows of {plan.parts[0].source} are invalid, more than "
            f"{MAX_INVALID:.0%}; the first: {report['excluded'][0]}. It is damaged or of another game."
        )
    report = {
        "complete": False, "format": plan.manifest["source"], "source": plan.parts[0].source,
        "files": [part.file for part in plan.parts[:usable]],
        "gaps": [], "excluded": [], "left_out": [], **report,
    }  # fmt: skip
    try:
        _commit(folder, plan.manifest, episodes, [piece for segments, _ in parts for piece in segments])
        if episodes:
            recording = open_recording(ts.KvStore.open(folder.as_uri() + "/").result())
            problems = validate_recording(recording)
            if problems:
                raise ReplayError(f"{problems[0]} ({len(problems)} problems.) Delete {folder} and import it again.")
        report["transitions"] = sum(episode["length"] for episode in episodes)
        report["episodes"] = len(episodes)
        report["complete"] = usable == len(plan.parts)
        fmt.write_file(folder / "import.json", fmt.encode_manifest(report))
    except OSError as error:
        raise ReplayError(f"{folder}: cannot be written ({error}). Make room and run the same import again.") from error
    return report


def _commit(
    folder: Path, manifest: dict[str, Any], episodes: list[dict[str, Any]], segments: list[dict[str, Any]]
) -> None:
    truncated = fmt.open_arrays(folder)["truncated"]
    ends = {episode["row"] + episode["length"] - 1 for episode in episodes}
    try:
        for border in [piece["row"] + piece["length"] - 1 for piece in segments if piece["open"]]:
            if bool(truncated[border].read().result()) != (border in ends):
                truncated[border].write(border in ends).result()
    except fmt.STORE_ERRORS as error:
        raise ReplayError(
            f"{folder}: cannot be written ({fmt.said(error)}). Make room and run the same import again."
        ) from error
    for leftover in folder.glob("**/*.__lock"):
        leftover.unlink(missing_ok=True)
    if not episodes:
        return
    length = np.array([episode["length"] for episode in episodes])
    columns = {
        name: [episode[name] for episode in episodes]
        for name in episodes[0]
        if name not in ("start", "truncated", "joins", "open", "records", "largest")
    }
    known = {"start": np.cumsum(length) - length, "truncated": [not episode["terminal"] for episode in episodes]}
    table = pa.table({name: np.asarray(values) for name, values in {**columns, **known}.items()})
    fmt.write_table(folder / "episodes.arrow", table.select([*(fmt.EPISODE | columns)]))
    if not manifest["rewards"]:  # not recorded in logs
        clipped = max(episode["largest"] for episode in episodes) <= 1
        manifest = manifest | {"rewards": "clipped" if clipped else "raw"}
    fmt.write_file(folder / "manifest.json", fmt.encode_manifest(manifest))


class _Here(Executor):
    """Runs submitted calls at once, in this process."""

    def submit(self, function: Callable, /, *arguments: Any, **options: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*arguments, **options))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def _executor(workers: int, scheduler: str) -> Iterator[Executor]:
    if not workers and not scheduler:
        yield _Here()
        return
    import dask
    from distributed import Client, LocalCluster

    settings = {"distributed.scheduler.allowed-failures": RETRIES, "distributed.worker.memory.terminate": False}
    with dask.config.set(settings):
        if scheduler:
            with Client(scheduler, timeout=30) as client:
                yield client.get_executor(pure=False)
        else:
            cluster = LocalCluster(
                n_workers=workers, threads_per_worker=1, host="127.0.0.1", dashboard_address=None, memory_limit=None
            )
            with cluster, Client(cluster) as client:
                yield client.get_executor(pure=False)


def run_import(
    destination: str | os.PathLike,
    runs: list[tuple[str, int]],
    plan: Callable[[str, int], Plan],
    convert: Callable[[Part], tuple],
    *,
    order_by: list[str],
    skip_bad: bool,
    workers: int,
    scheduler: str,
    progress: OnProgress | None,
) -> Report:
    """Import runs: plan each, convert its files, finish it. Completed work is not repeated.

    Args:
        destination: the dataset's folder.
        runs: (game, run) pairs.
        plan: called as plan(game, run).
        convert: called with a part; returns (segments, report, the error that made it stop or None).
        order_by: columns of the segments that give their time order.
        skip_bad: skip a file that cannot be read, and list it.
        workers: processes of a local Dask cluster; 0 converts in this process.
        scheduler: address of a running Dask scheduler instead.
        progress: called with (files done, files known).

    Raises:
        ReplayError: the first error; episodes before it are imported.
    """
    destination = fmt.local_folder(destination)
    lock = lock_recording(destination, 1)
    try:
        with _executor(workers, scheduler) as executor:
            reports = _run_tasks(executor, runs, plan, convert, order_by, skip_bad, progress)
    except ReplayError:
        raise
    except (Exception, CancelledError) as error:
        lost = (OSError, RuntimeError, CancelledError)  # of Dask's scheduler or workers
        if not isinstance(error, lost) and not type(error).__module__.startswith("distributed"):
            raise
        raise ReplayError(
            f"the import was interrupted ({type(error).__name__}: {error}). "
            f"{main_guard_hint() or 'Run it again: it resumes from here.'}"
        ) from error
    finally:
        lock.release()
    found: dict[str, list] = {"gaps": [], "excluded": [], "left_out": []}
    for (game, run), report in sorted(reports.items()):
        for name, entries in found.items():
            entries += [{"game": game, "run": run, **entry} for entry in report[name]]
    return Report(sum(report["transitions"] for report in reports.values()), **found)


def _run_tasks(
    executor: Executor, runs: list, plan: Callable, convert: Callable, order_by: list[str], skip_bad: bool,
    progress: OnProgress | None,
) -> dict[tuple[str, int], dict[str, Any]]:  # fmt: skip
    plans: dict[tuple[str, int], Plan] = {}
    missing: dict[tuple[str, int], set[int]] = {}  # parts of a run that are not converted
    reports: dict[tuple[str, int], dict[str, Any]] = {}
    tasks: dict[Future, tuple] = {}
    first_error: Exception | None = None

    def submit(kind: str, key: tuple, number: int, function: Callable, *arguments: Any) -> None:
        tasks[executor.submit(function, *arguments)] = (kind, key, number)

    def finish(key: tuple) -> None:
        usable = min(missing[key], default=len(plans[key].parts))
        if plans[key].parts:
            submit("finish", key, 0, finish_recording, plans[key], order_by, usable)
        else:
            reports[key] = {"transitions": 0, "gaps": [], "excluded": [], "left_out": [], **plans[key].notes}

    waiting = list(runs)
    while tasks or (waiting and first_error is None):
        while waiting and first_error is None and len(tasks) < 1_000:
            key = waiting.pop(0)
            submit("plan", key, 0, plan, *key)
        done, _ = wait(tasks, return_when=FIRST_COMPLETED)
        for future in done:
            kind, key, number = tasks.pop(future)
            error = future.exception()
            first_error = first_error or error
            if kind == "plan" and error is None:
                plans[key] = future.result()
                missing[key] = set(range(len(plans[key].parts)))
                finished = _finished(plans[key])
                if finished is not None:
                    reports[key], missing[key] = finished, set()
                    continue
                for place, part in enumerate(plans[key].parts):
                    submit("convert", key, place, convert_part, convert, part, skip_bad)
                if not plans[key].parts:
                    finish(key)
            elif kind == "convert":
                if error is None:
                    missing[key].discard(number)
                if not any(what == "convert" and of == key for what, of, _ in tasks.values()):
                    finish(key)
            elif kind == "finish" and error is None:
                reports[key] = future.result()
        if progress:
            total = sum(len(known.parts) for known in plans.values())
            progress(total - sum(map(len, missing.values())), total)
    if first_error is not None:
        raise first_error
    return reports


def _finished(plan: Plan) -> dict[str, Any] | None:
    """The report of a recording already imported from the same files, or None."""
    if not plan.parts:
        return None
    folder = Path(plan.parts[0].folder)
    file = folder / "import.json"
    try:
        report = fmt.read_report(file.read_bytes(), str(file))
        same = report["files"] == [part.file for part in plan.parts]
        whole = report["complete"] and not report["left_out"]
        recording = open_recording(ts.KvStore.open(folder.as_uri() + "/").result())
        if recording:
            recording.read_last_row()
    except (FileNotFoundError, ReplayError):
        return None  # it is made again with the episode table; other losses are reported then
    there = recording.num_transitions if recording else 0
    sound = whole and same and there == report["transitions"]
    return report if sound and all(_read_part(part) for part in plan.parts) else None


def list_folder(filesystem: fsspec.AbstractFileSystem, path: str) -> list[dict[str, Any]]:
    """Entries of a folder or a bucket's prefix.

    Raises:
        ReplayError: absent, or not allowed.
    """
    try:
        return filesystem.ls(path, detail=True)
    except FileNotFoundError as error:
        raise ReplayError(f"{path}: no such folder. Expected the folder that holds one folder per game.") from error
    except Exception as error:  # each kind of bucket raises other errors
        raise ReplayError(
            f"{path}: cannot be listed ({type(error).__name__}: {error}). Check the address and your permissions."
        ) from error


def folders_in(filesystem: fsspec.AbstractFileSystem, path: str) -> dict[str, str]:
    """Paths by name of the folders, and symbolic links to folders, in a folder.

    Raises:
        ReplayError: see `list_folder`.
    """
    return {
        entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["name"].rstrip("/")
        for entry in list_folder(filesystem, path)
        if entry["type"] == "directory" or (entry.get("islink") and filesystem.isdir(entry["name"]))
    }


def expect_level(path: str, found: str, levels: int) -> None:
    """Refuse a source that is one or more levels below the folder of games.

    Raises:
        ReplayError: always; the message names the probable folder.
    """
    raise ReplayError(
        f"{path}: {found}. Expected the folder that holds one folder per game: {path.rsplit('/', levels)[0] or '/'}."
    )


def _expect_no_source(filesystem: fsspec.AbstractFileSystem, folder: str) -> None:
    """Refuse a source if one of its folders is probably the intended one."""
    for name in folders_in(filesystem, folder):
        with suppress(UnknownGame):
            action_names(name)
            raise ReplayError(
                f"{folder.rsplit('/', 1)[0]}: holds no game's folder, but {folder} does ({name}). Expected the folder "
                f"that holds one folder per game: {folder}."
            )


def open_source(source: str | os.PathLike) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a folder or URL, and the path in it.

    Raises:
        ReplayError: an unsupported kind of URL.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(str(source))
        if str(source).startswith("file://") and not filesystem.exists(path):
            path = unquote(path)  # fsspec takes a URL's %20 for part of the name
        return filesystem, path
    except (ValueError, ImportError) as error:
        raise ReplayError(
            f"{source}: this kind of address cannot be read ({error}). For gs:// pip install -e 'lib[gcs]', for s3:// "
            "pip install -e 'lib[s3]'."
        ) from error


def game_folders(filesystem: fsspec.AbstractFileSystem, path: str, games: list[str] | None) -> dict[str, str]:
    """Folders of a source by game; all of them, or the requested ones.

    Raises:
        ReplayError: no folder there, one not named after a game, or a requested one is absent.
    """
    folders = {name: at for name, at in folders_in(filesystem, path).items() if not name.startswith(".")}
    absent = sorted(set(games or ()) - folders.keys())
    if absent:
        for folder in folders.values():
            _expect_no_source(filesystem, folder)
        raise ReplayError(f"{path}: no folder of {', '.join(absent)}; it has {', '.join(sorted(folders)) or 'none'}.")
    chosen = {name: folders[name] for name in sorted(games or folders)}
    if not chosen:
        raise ReplayError(f"{path}: has no folders. Expected the folder that holds one folder per game.")
    for name, folder in chosen.items():
        try:
            action_names(name)
        except UnknownGame as error:
            _expect_no_source(filesystem, folder)
            raise ReplayError(
                f"{folder}: {error} A source holds one folder per game, named as the game; name the games to import "
                "if there are others beside them."
            ) from error
    return chosen
