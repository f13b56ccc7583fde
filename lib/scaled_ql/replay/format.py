"""The replay store on disk: whole episodes of single frames, one folder per dataset, game and run.

::

    dataset/
      Pong/1/                     game, run
        manifest.json             what this is: format version, source, actions, ROM, rules; written once
        episodes.arrow            the episode table (an Arrow stream and a CRC-32), memory-mapped
        episodes.jsonl            episodes appended since that table was written, one line each
        observation/  uint8  [T, 84, 84]   zarr v3, single frames, never stacks
        action/       uint8  [T]           index in the game's minimal set
        reward/       float32[T]           unclipped where known
        terminal/     bool   [T]           the episode ended in the game
        truncated/    bool   [T]           the episode was cut (time limit), its last state has no successor
        import.json               of an imported run: its files, gaps, and what was left out

A row of the table, or a line of the journal, commits its episode: anything else in the arrays was being written when a
writer died and is never read. An episode's transitions are rows ``row .. row + length - 1`` of the
arrays; where ``frames`` is ``length + 1``, one more frame is the state after the last action. Every chunk carries a
CRC-32C, every episode a CRC-32, and, except in old versions, so do the manifest and each line of the journal.
"""

import json
import os
import re
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import tensorstore as ts
from isal import isal_zlib

from scaled_ql.games import RULES

FORMAT = "scaled-ql replay"
FORMAT_VERSION = 2
FRAME_SHAPE = (84, 84)
BLACK = isal_zlib.crc32(bytes(FRAME_SHAPE[0] * FRAME_SHAPE[1]))  # CRC-32 of a frame of zeros
INNER_CHUNK = 16  # frames decoded together: small enough for random windows, large enough to compress well
# Frames a file: about 8 MB compressed, rewritten with each append. Larger files are fewer, so that more of
# them stay open; 131,072 doubled the CPU time of an append compared with 16,384, this adds a third.
FRAME_SHARD = 65_536
SCALAR_CHUNK = 1_024
SCALAR_SHARD = 4_194_304  # few files: their descriptors stay open
ARRAYS = {
    "observation": "uint8",
    "action": "uint8",
    "reward": "float32",
    "terminal": "bool",
    "truncated": "bool",
}
EPISODE = {
    "start": np.int64, "length": np.int64, "row": np.int64, "frames": np.int64, "episode_return": np.float64,
    "terminal": np.bool_, "truncated": np.bool_, "continued": np.bool_, "crc32": np.int64,
}  # fmt: skip


# Failed reads and writes: TensorStore raises NotImplementedError for ENOSYS and EOPNOTSUPP and ValueError for the rest,
# Python's own files raise OSError.
STORE_ERRORS = (OSError, ValueError, NotImplementedError)


class ReplayError(Exception):
    """A store that cannot be read or written; the message names the file and the remedy."""


def said(error: Exception) -> str:
    """The message of an error, without the page of specification that TensorStore appends."""
    return re.sub(r" \[\w+='.*", "", str(error), flags=re.DOTALL)


def array_spec(kvstore: Any, name: str) -> dict[str, Any]:
    """TensorStore spec of one array with all its settings, for writers."""
    frames = name == "observation"
    tail = list(FRAME_SHAPE) if frames else []
    bytes_codec = {"name": "bytes", "configuration": {"endian": "little"}}
    inner_codecs = [bytes_codec, {"name": "zstd", "configuration": {"level": 3}}, {"name": "crc32c"}]
    sharding = {
        "chunk_shape": [INNER_CHUNK if frames else SCALAR_CHUNK, *tail],
        "codecs": inner_codecs,
        "index_codecs": [bytes_codec, {"name": "crc32c"}],
        "index_location": "start",
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
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "dimension_names": ["time", "height", "width"][: 1 + len(tail)],
        },
    }


def file_name(name: str, number: int) -> str:
    """The number-th file of an array, below its run's folder. Flat: each level costs a lookup and an inode."""
    return f"observation/c.{number}.0.0" if name == "observation" else f"{name}/c.{number}"


def open_arrays(folder: Path) -> dict[str, ts.TensorStore]:
    """A run's arrays for writing, created where they are absent.

    Raises:
        ReplayError: another layout is there, or the folder cannot be written.
    """
    arrays = {}
    for name in ARRAYS:
        exists = (folder / name / "zarr.json").exists()
        spec = array_spec({"driver": "file", "path": f"{folder}/{name}/"}, name)
        if exists:
            del spec["metadata"]["shape"], spec["metadata"]["chunk_grid"]  # it keeps its length and its files' size
        try:
            arrays[name] = ts.open(spec, open=exists, create=not exists).result()
        except STORE_ERRORS as error:
            raise ReplayError(
                f"{folder / name}: cannot open or create this array ({said(error)}). Make room, make the "
                "folder writable on a file system with locks, or choose another folder."
            ) from error
    return arrays


def grow(arrays: dict[str, ts.TensorStore], rows: int) -> None:
    """Make the arrays at least `rows` long."""
    for name, array in arrays.items():
        if array.shape[0] < rows:
            arrays[name] = array.resize(exclusive_max=[rows, *array.shape[1:]], expand_only=True).result()


def write_rows(arrays: dict[str, ts.TensorStore], row: int, columns: dict[str, np.ndarray]) -> list[ts.Future]:
    """Start writing columns at rows row, row + 1, ...; the caller waits for the results."""
    return [
        arrays[name][row : row + len(column)].write(np.asarray(column, ARRAYS[name]))
        for name, column in columns.items()
    ]


def frame_crc32s(observation: np.ndarray) -> np.ndarray:
    """CRC-32 of each frame, uint32 [N]."""
    return np.array([isal_zlib.crc32(frame) for frame in np.ascontiguousarray(observation)], np.uint32)


def step_records(frame_crc32: np.ndarray, action: np.ndarray, reward: np.ndarray) -> bytes:
    """The bytes that an episode's CRC-32 covers, 12 per frame: the frame's CRC-32, its action, its reward.

    A frame after the last action has action and reward zero.
    """
    records = np.zeros(len(frame_crc32), [("frame", "<u4"), ("action", "<i4"), ("reward", "<f4")])
    records["frame"] = frame_crc32
    records["action"][: len(action)], records["reward"][: len(reward)] = action, reward
    return records.tobytes()


def write_file(file: Path, content: bytes) -> None:
    """Write a file atomically: a reader sees the old one or the new one. It is on disk when this returns."""
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("wb") as target:
        target.write(content)
        target.flush()
        os.fsync(target.fileno())
    partial.replace(file)


def make_manifest(
    game: str,
    run: int,
    *,
    actions: list[str],
    source: str,
    rom_md5: str = "",
    **rules: Any,
) -> dict[str, Any]:
    """The content of `manifest.json`; see `ReplayWriter` for the values, `games.RULES` for the rules."""
    unknown = rules.keys() - RULES.keys()
    if unknown:
        raise TypeError(f"unknown rules {', '.join(sorted(unknown))}; a manifest's rules are {', '.join(RULES)}.")
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "game": game,
        "run": run,
        "source": source,
        "actions": list(actions),
        "rom_md5": rom_md5,
        **{name: rules.get(name) for name in RULES},
    }


LINE_CRC32 = b"line_crc32"
REPORT = frozenset(
    ("complete", "format", "source", "files", "gaps", "excluded", "left_out", "transitions", "episodes")
)  # of an import
KNOWN = frozenset((*make_manifest("", 0, actions=[], source="", sticky_actions=0.0), "crc32"))


def write_or_compare_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Create a run's folder and manifest; one that exists must be the same.

    Raises:
        ReplayError: settings differ from the stored ones, or the folder cannot be written.
    """
    file = folder / "manifest.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write_file(file, encode_manifest(manifest))
    except OSError as error:
        raise ReplayError(f"{folder}: cannot create the store ({error}).") from error
    stored = read_manifest(file.read_bytes(), str(file))
    differences = [
        f"{key}: {stored.get(key)!r} stored, {value!r} requested"
        for key, value in manifest.items()
        if stored.get(key) not in (value, None)  # None: not recorded by an earlier version
    ]
    if differences:
        raise ReplayError(
            f"{file}: the store was recorded with other settings ({'; '.join(differences)}). "
            "Use another folder or run number, or delete the store."
        )


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """The content of `manifest.json`, or of another JSON object that has a checksum."""
    return json.dumps(manifest | {"crc32": _crc32(manifest)}, indent=1).encode() + b"\n"


def _crc32(value: Any) -> int:
    """CRC-32 of a JSON value, independent of its formatting."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def has_checksums(manifest: bytes) -> bool:
    """Whether a store's manifest, and so each line of its journal, was written with a checksum."""
    return b'"crc32"' in manifest


def read_manifest(content: bytes, where: str) -> dict[str, Any]:
    """Parse and check a manifest; absent rules are None, unknown."""
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise ReplayError(f"{where}: not JSON ({error}). Restore the file from a copy.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ReplayError(f'{where}: not the manifest of a replay store (no "format": "{FORMAT}").')
    if not isinstance(manifest.get("version"), int):
        raise ReplayError(f"{where}: the manifest has no version. Restore the file from a copy.")
    if manifest["version"] != FORMAT_VERSION:
        remedy = (
            "Update the package to read it." if manifest["version"] > FORMAT_VERSION else "Record or import it again."
        )
        raise ReplayError(
            f"{where}: store format {manifest['version']}, but this package reads {FORMAT_VERSION}. {remedy}"
        )
    missing = [name for name in ("game", "run", "actions") if name not in manifest]
    if missing:
        raise ReplayError(f"{where}: the manifest lacks {', '.join(missing)}. Restore the file from a copy.")
    unknown = manifest.keys() - KNOWN
    if unknown:
        raise ReplayError(
            f"{where}: the manifest has {', '.join(sorted(unknown))}, which this package does not know. Update the "
            "package, or restore the file from a copy."
        )
    crc32 = manifest.pop("crc32", absent := object())
    if crc32 is not absent and crc32 != _crc32(manifest):
        raise ReplayError(
            f"{where}: the manifest differs from its checksum. Restore the file from a copy; if you changed it on "
            "purpose, remove its crc32."
        )
    return dict.fromkeys(RULES) | manifest


def read_report(content: bytes, where: str) -> dict[str, Any]:
    """Parse the `import.json` of an imported run.

    Raises:
        ReplayError: damaged.
    """
    try:
        report = json.loads(content)
        crc32 = report.pop("crc32", absent := object())
        if crc32 is not absent and crc32 != _crc32(report):
            raise ValueError("it differs from its checksum")
        wrong = (REPORT ^ report.keys()) - ({"source"} - report.keys())  # which earlier versions did not have
        if wrong:
            raise ValueError(f"missing or unknown entries {', '.join(sorted(wrong))}")
    except (ValueError, TypeError, AttributeError) as error:
        raise ReplayError(
            f"{where}: not the report of an import ({type(error).__name__}: {error}). Run the same import again, which "
            "rewrites it, or restore it from a copy."
        ) from error
    return report


def local_folder(path: str | os.PathLike) -> Path:
    """Resolve a path or a ``file://`` URL to an absolute folder, without ``..`` and links.

    Raises:
        ReplayError: a URL of another kind.
    """
    parts = urlsplit(os.fspath(path))
    if parts.scheme == "file":
        return Path(unquote(parts.path)).resolve()
    if "://" in os.fspath(path):
        raise ReplayError(f"{path}: is not on a local disk. Name a local folder, and copy that afterwards.")
    return Path(path).resolve()


def empty_table() -> pa.Table:
    """An episode table without episodes."""
    return pa.table({name: np.empty(0, dtype) for name, dtype in EPISODE.items()})


def write_table(file: Path, table: pa.Table) -> None:
    """Write an episode table, atomically: one record batch, uncompressed, so that its columns can be mapped."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    content = sink.getvalue().to_pybytes()
    write_file(file, content + zlib.crc32(content).to_bytes(4, "little"))


def read_table(content: pa.Buffer, where: str) -> pa.Table:
    """Read an episode table from a buffer, which may be a memory map.

    Raises:
        ReplayError: damaged.
    """
    size = content.size - 4
    if size < 0 or zlib.crc32(memoryview(content)[:size]) != int.from_bytes(memoryview(content)[size:], "little"):
        raise ReplayError(f"{where}: its checksum is wrong. Restore the folder from a copy, or import it again.")
    return pa.ipc.open_stream(content.slice(0, size)).read_all()


def journal_line(row: dict[str, Any]) -> bytes:
    """A line of an episodes.jsonl: a JSON object whose last entry is the CRC-32 of the text before it."""
    text = json.dumps(row).encode()[:-1]
    return b'%b, "%b": %d}\n' % (text, LINE_CRC32, zlib.crc32(text))


def _parse_line(line: bytes, checked: bool) -> dict[str, Any]:
    text, mark, crc32 = line.rpartition(b', "%b": ' % LINE_CRC32)
    if mark and crc32 != b"%d}" % zlib.crc32(text):
        raise ValueError("it differs from its checksum")
    if checked and not mark:
        raise ValueError("it has no checksum")
    return json.loads(text + b"}" if mark else line)


def parse_journal(
    content: bytes, where: str, covered: int = 0, checked: bool = False
) -> tuple[list[dict[str, Any]], int]:
    """Parse the complete lines of an episodes.jsonl; a torn last line is an uncommitted episode.

    Args:
        content: content of the file.
        where: name of the file, for messages.
        covered: transitions in the episode table, whose lines are skipped.
        checked: every line has a checksum, as in a store whose manifest has one.

    Returns:
        the episodes after those, and the number of bytes up to the last complete line.
    """
    complete = content[: content.rfind(b"\n") + 1]
    rows, expected = [], None
    for number, line in enumerate(complete.split(b"\n")[:-1], 1):
        try:
            row = _parse_line(line, checked)
            start, length = row["start"], row["length"]
            wrong = [name for name, dtype in EPISODE.items() if type(row[name]) is not type(dtype(0).item())]
            wrong += [name for name in ("start", "row") if name not in wrong and row[name] < 0]
            if wrong:
                raise TypeError(f"{', '.join(wrong)} of a wrong type or sign")
            if row["frames"] < length:
                raise ValueError(f"{row['frames']} frames of {length} transitions")
        except (ValueError, KeyError, TypeError) as error:
            raise ReplayError(
                f"{where}: line {number} is not an episode ({error}). The file was changed after it was written; "
                "restore it from a copy, or delete this line and all after it to keep the episodes before."
            ) from error
        if expected is None:
            expected = min(start, covered)
        if start != expected or length < 1:
            raise ReplayError(
                f"{where}: line {number} says start {start}, length {length}; expected start {expected} and a "
                "positive length. Restore the file from a copy."
            )
        expected += length
        if start >= covered:
            rows.append(row)
    return rows, len(complete)
