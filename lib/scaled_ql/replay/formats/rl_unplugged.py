"""RL Unplugged's Atari episodes (Gulcehre et al., 2020): the experience of DQN-Replay, with unclipped rewards.

::

    Breakout/run_1-00000-of-00050   gzip over TFRecords, each a tf.train.Example of one episode of L steps:
        observations                bytes [L], PNG, 84 x 84, 8 bit grey
        actions                     int64 [L], index in the game's minimal set
        unclipped_rewards           float [L]
        discounts                   float [L], 0 at the end of a game
        checkpoint_idx, episode_idx int64 [1], their order is that of time
        clipped_rewards, episode_return, clipped_episode_return are not read

Where the last discount is 0, the last step holds no more than the state after the last action: L - 1 transitions.

Here file k has its own rows in the recording's arrays, from `ROWS_PER_FILE` * k on: files do not depend on one another,
and unused rows take no room on the disk.
"""

import os
import re
import struct
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import cv2
import fsspec
import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from isal import igzip

from scaled_ql.environments import rules
from scaled_ql.games import action_names
from scaled_ql.replay import format as fmt
from scaled_ql.replay.format import FRAME_SHAPE, ReplayError
from scaled_ql.replay.formats import importing
from scaled_ql.replay.formats.importing import OnProgress, Part, Plan, Report, RowWriter, Unreadable

SOURCE = "RL Unplugged"
PUBLISHED = rules(sticky_actions=0.25)
ROWS_PER_FILE = 1 << 24  # whole shards; published files hold about a million
MAX_RECORD = 1 << 28  # bytes; the longest episode in frames that do not compress takes 200 MB
READ_ROWS = 1_024  # frames decoded together
FILE = re.compile(r"^run_(\d+)-(\d{5})-of-(\d{5})$")
PNG_START = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBB", 13, b"IHDR", FRAME_SHAPE[1], FRAME_SHAPE[0], 8, 0)
SEQUENCES = {
    "observations": "bytes_list", "actions": "int64_list", "unclipped_rewards": "float_list", "discounts": "float_list",
}  # fmt: skip
NUMBERS = {"checkpoint_idx": "int64_list", "episode_idx": "int64_list"}


def import_rl_unplugged(
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
    """Import RL Unplugged's Atari episodes; a killed import resumes when it is called again.

    Episodes are stored in the order of (checkpoint_idx, episode_idx), in whatever files they are. An episode that
    ended in the game has its last frame as the state after the last action; any other counts as truncated. A step
    with a non-finite reward, or an action outside the game's set, is left out and cuts its episode in two.

    Args:
        source: the folder or URL (``gs://rl_unplugged/atari_episodes_ordered`` with gcsfs, ...) that holds the game
            folders; the files below ``atari`` have another layout, single transitions, which is not read.
        destination: the dataset's folder, on a local disk.
        games: games to import; None: all.
        runs: runs to import of each game; None: all.
        actions: set that the actions index: the game's ``"minimal"`` set, as in published ones, or the ``"full"``
            set of 18, which is mapped onto the minimal one by name.
        skip_bad: skip a record that cannot be read: the rest of its file is left out and listed in the report
            and in ``import.json``.
        workers: processes that convert files in parallel; 0: this one.
        scheduler: address of a running Dask scheduler to use instead, whose workers see both folders.
        progress: called with (files done, files known).

    Returns:
        the report; gaps are missing files, as {game, run, file}; the row of an excluded or left-out entry is the number
        of its record in its file.

    Raises:
        ReplayError: a file that cannot be read or is inconsistent; the message names file, record and remedy.
    """
    filesystem, root = importing.open_source(source)
    url, destination = filesystem.unstrip_protocol(root), fmt.local_folder(destination)
    if filesystem.isfile(root) and FILE.match(root.rsplit("/", 1)[-1]):
        importing.expect_level(root, "is a file", 2)
    if _list_files(filesystem, root):
        importing.expect_level(root, "is the folder of one game, with its files run_<run>-<number>-of-<files>", 1)
    folders = importing.game_folders(filesystem, root, games)
    found = []
    for game, folder in folders.items():
        there = _list_files(filesystem, folder)
        absent = sorted(set(runs or ()) - there.keys())
        if absent or not there:
            raise ReplayError(
                f"{folder}: no file of run {', '.join(map(str, absent)) or '1'}; it has the runs {sorted(there)}. "
                f"Expected {folder}/run_<run>-<number>-of-<files>."
            )
        found += [(game, run) for run in sorted(runs or there)]

    def plan(game: str, run: int) -> Plan:
        return plan_recording(url, folders[game], destination, game, run, actions)

    return importing.run_import(
        destination, found, plan, convert,
        order_by=["checkpoint_idx", "episode_idx"], skip_bad=skip_bad, workers=workers, scheduler=scheduler,
        progress=progress,
    )  # fmt: skip


class File(NamedTuple):
    """One of the `total` files of a run."""

    number: int
    total: int
    address: str
    size: int | None


def _list_files(filesystem: fsspec.AbstractFileSystem, folder: str) -> dict[int, list[File]]:
    """The files of each run in a game's folder."""
    files: dict[int, list[File]] = {}
    for entry in importing.list_folder(filesystem, folder):
        match = FILE.match(entry["name"].rsplit("/", 1)[-1])
        if match:
            run, number, total = map(int, match.groups())
            files.setdefault(run, []).append(File(number, total, entry["name"], entry["size"]))
    return {run: sorted(of_run) for run, of_run in files.items()}


def plan_recording(source: str, folder: str, destination: Path, game: str, run: int, action_set: str) -> Plan:
    """Plan a run: its files, and the missing ones.

    Raises:
        ReplayError: files of two datasets, or the destination cannot be written.
    """
    filesystem, _ = importing.open_source(source)
    files = _list_files(filesystem, folder)[run]
    total = files[0].total
    for file in files:
        if file.total != total:
            raise ReplayError(
                f"{files[0].address} and {file.address}: files of two datasets are mixed; one has {total} files, the "
                f"other {file.total}. Keep those of one."
            )
        if file.number >= total:
            raise ReplayError(f"{file.address}: no such number among {total} files, which count from 0. Rename it.")
    actions, target = list(action_names(game)), destination / game / str(run)
    indices = importing.action_indices(actions, action_set)
    parts = [
        Part(str(target), number, f"{game}/{Path(address).name}", {"size": size, "actions": indices}, source)
        for number, _, address, size in files
    ]
    missing = sorted(set(range(total)) - {file.number for file in files})
    gaps = [{"file": f"{folder}/run_{run}-{number:05}-of-{total:05}"} for number in missing]
    manifest = fmt.make_manifest(game, run, actions=actions, source=SOURCE, **PUBLISHED | {"action_set": action_set})
    importing.prepare_recording(target, total * ROWS_PER_FILE, manifest, parts)
    return Plan(manifest, parts, {"gaps": gaps})


def convert(part: Part) -> tuple[list[dict[str, Any]], dict[str, list], Unreadable | None]:
    """Write one file's rows and find its segments.

    Returns:
        (segments, report of excluded rows, the error that ended it early or None)
    """
    filesystem, _ = importing.open_source(part.source)
    address, indices = part.address, part.content["actions"]
    first = row = part.number * ROWS_PER_FILE
    writer = RowWriter(Path(part.folder), first)
    allowed = np.flatnonzero(np.array(indices) >= 0)
    segments, excluded, problem, number, seen = [], [], None, 0, [np.empty(0, np.int64)]
    try:
        with filesystem.open(address, "rb") as raw:
            for record in read_records(raw):
                episode = parse_episode(record)
                if row + episode.steps > first + ROWS_PER_FILE:
                    raise ValueError(f"with it the file holds more than {ROWS_PER_FILE} steps, too many for one file")
                bad = bad_steps(episode.action, episode.reward, allowed)
                segments += write_episode(
                    writer, row, episode.frames(), importing.map_actions(episode.action, indices), episode.reward,
                    episode.terminal,
                    beyond=episode.steps - len(episode.action), bad=list(bad), **episode.order,
                )  # fmt: skip
                if not len(episode.action):
                    bad = {0: "it is the end of a game and has no transition"}
                excluded += [{"file": part.address, "row": number, "reason": f"step {i}: {bad[i]}"} for i in bad]
                seen.append(episode.action)
                row += episode.steps
                number += 1
        if not number:
            raise ValueError("the file holds no record, expected at least one episode")
    except ReplayError:
        raise
    except Exception as error:  # gzip, protobuf and each kind of bucket have their own errors
        if isinstance(error, PermissionError):
            remedy = "Check your permissions."
        else:
            remedy = "The file is damaged or of another layout; restore it from its source."
        problem = Unreadable(
            f"{address}: cannot be read from record {number} on ({type(error).__name__}: {error}). {remedy}", number
        )
    writer.close()
    action = np.concatenate(seen)
    if importing.too_many(len(excluded), len(action)):
        return [], {}, Unreadable(importing.describe_invalid(address, part.game, len(excluded), action, indices))
    return segments, {"excluded": excluded}, problem


def read_records(raw: BinaryIO) -> Iterator[bytes]:
    """Yield the records of a gzipped TFRecord file, after checking their checksums.

    Source: the comment at the head of TensorFlow's ``tsl/lib/io/record_writer.h``: length (uint64), its masked
    CRC-32C, the data, its masked CRC-32C.

    Raises:
        ValueError: a wrong checksum, or a record of more than `MAX_RECORD` bytes.
        EOFError: the file ends within a record.
    """
    stream = igzip.IGzipFile(fileobj=raw)
    while head := stream.read(12):
        head += _read(stream, 12 - len(head))
        length, checksum = struct.unpack("<QI", head)
        if masked_crc32c(head[:8]) != checksum:
            raise ValueError("the checksum of its length is wrong, expected a TFRecord")
        if length > MAX_RECORD:
            raise ValueError(f"its stated length is {length} bytes, expected at most {MAX_RECORD}")
        record = _read(stream, length)
        if masked_crc32c(record) != int.from_bytes(_read(stream, 4), "little"):
            raise ValueError(f"the checksum of its {length} bytes is wrong")
        yield record


def _read(stream: BinaryIO, size: int) -> bytes:
    content = stream.read(size)
    if len(content) != size:
        raise EOFError(f"the file ends within it, {size - len(content)} bytes early")
    return content


def masked_crc32c(content: bytes) -> int:
    """A CRC-32C as TFRecords store it: rotated by 15 bits, and a constant added."""
    crc = google_crc32c.value(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@cache
def _example_type() -> type:
    """The class of tf.train.Example; a protobuf map is a list of entries, and is read as that here."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")
    messages: dict[str, list[tuple]] = {
        "BytesList": [("value", field.TYPE_BYTES, True)],
        "FloatList": [("value", field.TYPE_FLOAT, True)],
        "Int64List": [("value", field.TYPE_INT64, True)],
        "Feature": [("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List")],
        "Entry": [("key", field.TYPE_STRING), ("value", "Feature")],
        "Features": [("feature", "Entry", True)],
        "Example": [("features", "Features")],
    }
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for number, (called, kind, *repeated) in enumerate(fields, 1):
            added = message.field.add(name=called, number=number)
            added.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            if isinstance(kind, str):
                added.type, added.type_name = field.TYPE_MESSAGE, f".tensorflow.{kind}"
            else:
                added.type = kind
    pool = descriptor_pool.DescriptorPool()  # not the default one, where TensorFlow may have its own
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


class Episode(NamedTuple):
    """One episode of S steps and L transitions, L = S - 1 where it is terminal, else L = S.

    Attributes:
        pngs: bytes [S].
        action: int64 [L].
        reward: float32 [L].
        terminal: the episode ended in the game.
        order: its checkpoint_idx and episode_idx.
    """

    pngs: Any
    action: np.ndarray
    reward: np.ndarray
    terminal: bool
    order: dict[str, int]

    @property
    def steps(self) -> int:
        """Frames in the record."""
        return len(self.pngs)

    def frames(self) -> Iterator[np.ndarray]:
        """Its frames, uint8 [n, 84, 84] at a time."""
        for begin in range(0, self.steps, READ_ROWS):
            yield np.stack([decode_png(png, begin + i) for i, png in enumerate(self.pngs[begin : begin + READ_ROWS])])


def parse_episode(record: bytes) -> Episode:
    """Parse a serialized tf.train.Example as an episode.

    Raises:
        ValueError: it is not an episode of the layout above.
        google.protobuf.message.DecodeError: it is not a tf.train.Example.
    """
    kinds = SEQUENCES | NUMBERS
    features = {entry.key: entry.value for entry in _example_type().FromString(record).features.feature}
    absent = [f"{name} ({kind})" for name, kind in kinds.items() if not _is_kind(features.get(name), kind)]
    if absent:
        raise ValueError(
            f"it lacks {', '.join(absent)}; it has {', '.join(sorted(features)) or 'nothing'}. Expected one episode a "
            "record, as in RL Unplugged's atari_episodes_ordered"
        )
    values = {name: getattr(features[name], kind).value for name, kind in kinds.items()}
    counts = {name: len(values[name]) for name in SEQUENCES}
    if len(set(counts.values())) > 1 or not counts["observations"]:
        raise ValueError(f"its lists have the lengths {counts}, expected equal ones of at least 1")
    if any(len(values[name]) != 1 for name in NUMBERS):
        raise ValueError(f"{' and '.join(NUMBERS)} are expected to be single numbers")
    discounts = np.array(values["discounts"], np.float32)
    if not (np.isfinite(discounts).all() and (discounts[:-1] > 0).all() and discounts[-1] >= 0):
        raise ValueError("expected discounts above 0, only the last of which may be 0")
    terminal = bool(discounts[-1] == 0)
    length = len(discounts) - terminal
    return Episode(
        pngs=values["observations"],
        action=np.array(values["actions"][:length], np.int64),
        reward=np.array(values["unclipped_rewards"][:length], np.float32),
        terminal=terminal,
        order={name: values[name][0] for name in NUMBERS},
    )


def _is_kind(feature: Any, kind: str) -> bool:
    return feature is not None and feature.HasField(kind)


def decode_png(png: bytes, step: int) -> np.ndarray:
    """Decode to uint8 [84, 84]; the size is checked first.

    Raises:
        ValueError: not a PNG of 84 x 84 pixels in 8 bit grey, or a damaged one.
    """
    frame = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED) if png.startswith(PNG_START) else None
    if frame is None or frame.shape != FRAME_SHAPE or frame.dtype != np.uint8:
        raise ValueError(f"step {step}: its observation is not a valid PNG of 84 x 84 pixels in 8 bit grey")
    return frame


def bad_steps(action: np.ndarray, reward: np.ndarray, allowed: np.ndarray) -> dict[int, str]:
    """Invalid steps of an episode, with the reason for each.

    Args:
        action: integers [L].
        reward: floats [L].
        allowed: actions in the game's set.
    """
    bad = {
        step: f"its action is {action[step]}, the game has {', '.join(map(str, allowed))}"
        for step in np.flatnonzero(~np.isin(action, allowed)).tolist()
    }
    for step in np.flatnonzero(~np.isfinite(reward)).tolist():
        bad[step] = f"its reward is {reward[step]}, expected a finite number"
    return dict(sorted(bad.items()))


def write_episode(
    writer: RowWriter,
    row: int,
    frames: Iterable[np.ndarray],
    action: np.ndarray,
    reward: np.ndarray,
    terminal: bool,
    *,
    beyond: int,
    bad: list[int],
    **columns: Any,
) -> list[dict[str, Any]]:
    """Write the rows of one episode of L transitions and find its segments: bad steps cut it.

    Args:
        writer: writer positioned at `row`.
        row: row of the first transition in the recording's arrays.
        frames: blocks of uint8 [n, 84, 84], L + `beyond` frames together.
        action: integers [L].
        reward: float32 [L].
        terminal: it ended in the game.
        beyond: 1 where the last frame is the state after the last action, else 0.
        bad: steps to leave out.
        **columns: more columns of the episode table.
    """
    length = len(action)
    keep = np.ones(length, bool)
    keep[bad] = False
    pieces = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]))).reshape(-1, 2).tolist()
    rows = {name: np.zeros(length + beyond, dtype) for name, dtype in fmt.ARRAYS.items() if name != "observation"}
    rows["action"][:length][keep], rows["reward"][:length][keep] = action[keep], reward[keep]
    for _, stop in pieces:
        rows["terminal" if terminal and stop == length else "truncated"][stop - 1] = True
    crc32: list[int] = []
    for block in frames:
        here = slice(len(crc32), len(crc32) + len(block))
        crc32 += fmt.frame_crc32s(block).tolist()
        writer.append(observation=block, **{name: column[here] for name, column in rows.items()})
    return [
        importing.segment(
            row + begin,
            np.array(crc32[begin : stop + (beyond if stop == length else 0)], np.uint32),
            action[begin:stop],
            reward[begin:stop],
            terminal=terminal and stop == length,
            continued=begin > 0,
            **columns,
        )
        for begin, stop in pieces
    ]
