"""A campaign of 10,500 damaged inputs: ``pytest -m fuzz -n 0 -s``. The default run leaves it out; it takes minutes.

Every input is accepted as what it was before, or refused with a sentence that names the file. A file of YAML has no
checksum, and may say something else than before: it is accepted as exactly what an independent reader finds in it.
"""

import collections
import gzip
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from dopamine_log import DopamineLog
from hypothesis import given, settings
from test_dqn_replay import SLOW, check_history, dump_histories
from test_rl_unplugged import three_files, write_run

from scaled_ql import batches, documents, parameters, training
from scaled_ql.games import action_names
from scaled_ql.parameters import ParameterError
from scaled_ql.replay import (
    ReplayError,
    ReplayWriter,
    import_dqn_replay,
    import_rl_unplugged,
    open_replay,
)
from scaled_ql.replay import format as fmt
from scaled_ql.replay.formats import dqn_replay, importing
from scaled_ql.replay.views import load_view

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(3_600)]
SECONDS = 60  # that an input may take
WORKSPACE = Path(__file__).resolve().parents[1]
WORDS = (
    "yes", "no", "on", "010", "0x1F", "1e3", "1e-4", "null", "~", "''", "[]", "{}", "-1", "0", "1.5", ".inf", ".nan",
    "10_000", "2024-01-01", "!!binary x", "&a 1", "*a", "<<: *a", "? x", "é", "true", "1:30", "'", '"', "\t", "---",
)  # fmt: skip


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """The content after one accident of those that disks, copies and editors have."""
    size = len(content)
    begin, end = sorted(rng.integers(0, size + 1, 2).tolist())
    place, length = int(rng.integers(size)), int(min(rng.geometric(0.1), size))
    other = int(rng.integers(size))
    match int(rng.integers(10)):
        case 0 | 1 | 2:
            return content[:place] + bytes([content[place] ^ 1 << int(rng.integers(8))]) + content[place + 1 :]
        case 3:
            return content[:place] + bytes([int(rng.integers(256))]) + content[place + 1 :]
        case 4:
            return content[:begin]
        case 5:
            return content[:place] + content[place + length :]
        case 6:
            return content[:place] + rng.bytes(length) + content[place:]
        case 7:
            return content[:begin] + bytes(end - begin) + content[end:]
        case 8:
            return content[:place] + content[other : other + length] + content[place + length :]
        case _:
            return content + content[begin:end]


def edited(content: bytes, rng: np.random.Generator) -> bytes:
    """The same, or a text after a slip of whoever edits it."""
    lines = content.decode().splitlines(keepends=True)
    place, other = rng.integers(0, len(lines), 2).tolist()
    word = WORDS[int(rng.integers(len(WORDS)))]
    match int(rng.integers(10)):
        case 0:
            lines.insert(other, lines[place])
        case 1:
            del lines[place]
        case 2:
            lines[place] = "  " + lines[place]
        case 3:
            lines[place], lines[other] = lines[other], lines[place]
        case 4 | 5 | 6:
            lines[place] = re.sub(r"(:\s*).*", lambda found: f"{found[1]}{word}", lines[place], count=1)
        case 7:
            lines[place] = re.sub(r"\d", str(int(rng.integers(10))), lines[place], count=1)
        case _:
            return damaged(content, rng)
    return "".join(lines).encode()


@contextmanager
def in_time(what: str) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"{what}: nothing came of it for {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def campaign(
    files: list[Path], count: int, damage: Callable, read: Callable, refusals: type[Exception], names: Callable = str
) -> None:
    """Damage one file at a time, read everything, put the file back.

    Args:
        files: in their turn.
        count: inputs.
        damage: called with a file's content and a generator of random numbers; returns other content.
        read: called without arguments; returns nothing, raises AssertionError where something is different.
        refusals: the errors that are expected.
        names: what such an error says of a file.
    """
    outcomes: collections.Counter = collections.Counter()
    problems = []
    for number in range(count):
        file = files[number % len(files)]
        content = file.read_bytes()
        mutated = damage(content, np.random.default_rng([number, len(files)]))
        file.write_bytes(mutated)
        try:
            with in_time(f"input {number}"):
                read()
            outcomes["accepted"] += 1
        except refusals as error:
            outcomes["refused"] += 1
            if names(file) not in str(error) or "Traceback" in str(error):
                problems.append(f"input {number}, {file}: it is not named: {error}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            problems.append(f"input {number}, {file}: {type(error).__name__}: {str(error)[:300]} {mutated[:200]!r}")
        finally:
            file.write_bytes(content)
    read()
    assert outcomes.total() + len(problems) >= count
    print(f"{count:,} inputs: {dict(outcomes)}", file=sys.__stderr__, flush=True)
    assert not problems, f"{len(problems)} of {count}:\n" + "\n".join(problems[:20])


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a folder: an import waits for the disk a dozen times."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"INNER_CHUNK": 4, "FRAME_SHARD": 16, "SCALAR_CHUNK": 4, "SCALAR_SHARD": 16}.items():
        monkeypatch.setattr(fmt, name, size)
    for module in (importing, dqn_replay):
        monkeypatch.setattr(module, "BLOCK", 4)


def same_import(run_import: Callable, source: Path, folder: Path) -> Callable[[], None]:
    """Whether an import of the source comes to what it comes to now, or raises."""

    def identity() -> str:
        shutil.rmtree(folder, ignore_errors=True)
        run_import(source, folder)  # which reads everything back, and compares it with the rows' checksums
        return open_replay(folder).identity()

    expected = identity()

    def read() -> None:
        assert identity() == expected, "imported as something else"

    return read


def in_gzip(part: slice) -> Callable[[bytes, np.random.Generator], bytes]:
    """Damage what is compressed, within a slice of it, under a gzip that is sound."""

    def damage(content: bytes, rng: np.random.Generator) -> bytes:
        if rng.random() < 0.5:
            return damaged(content, rng)
        whole = gzip.decompress(content)
        return gzip.compress(damaged(whole[part], rng) + whole[len(whole[part]) :], 1)

    return damage


def test_dqn_replay_logs(small_blocks: None, tmp_path: Path) -> None:
    log = DopamineLog(tmp_path / "source", capacity=12)
    for length in (5, 8, 7, 9):
        log.add_episode(length)
    log.finish()
    files = sorted(file for file in log.folder.iterdir() if not file.name.startswith("invalid_range"))
    read = same_import(import_dqn_replay, tmp_path / "source", tmp_path / "store")
    # Dopamine's rows have no checksum of their own: below gzip's only the header is damaged.
    campaign(files, 1_000, in_gzip(slice(0, 128)), read, ReplayError, lambda file: file.name)


def test_rl_unplugged_records(tmp_path: Path) -> None:
    write_run(tmp_path / "source", three_files())
    files = sorted((tmp_path / "source" / "Pong").iterdir())
    read = same_import(import_rl_unplugged, tmp_path / "source", tmp_path / "store")
    campaign(files, 1_000, in_gzip(slice(None)), read, ReplayError, lambda file: file.name)


def test_stores(small_blocks: None, tmp_path: Path) -> None:
    """Manifests and journals, half of the inputs, and all other files."""
    rng = np.random.default_rng(0)
    settings = {"source": "test", "sticky_actions": 0.25, "actions": list(action_names("Pong"))}
    with ReplayWriter(tmp_path, "Pong", 1, **settings) as writer:
        for length in (7, 5, 9, 6):
            frames = rng.integers(0, 256, (length + 1, 84, 84), dtype=np.uint8)
            columns = rng.integers(0, 6, length), rng.integers(-1, 2, length).astype(np.float32)
            writer.append(frames[:-1], *columns, terminal=length != 9, final_observation=frames[-1])

    def content() -> list:
        replay = open_replay(tmp_path)
        start, count = replay.sampleable("Pong", 1)
        usable = np.concatenate([np.arange(first, first + many) for first, many in zip(start, count)])
        batch = replay.batch("Pong", usable, 1)
        table = replay.episodes("Pong")
        problems = replay.validate()
        if problems:
            raise ReplayError(" ".join(problems))
        return [replay.manifests("Pong"), table.to_dict("list"), *(field.tobytes() for field in batch)]

    expected = content()

    def read() -> None:
        found = content()
        episodes = len(found[1]["start"])
        # A line that the journal's end cuts off was never committed: the episodes before it are all there is.
        assert found == expected or found[:2] == [
            expected[0], {name: values[:episodes] for name, values in expected[1].items()}
        ], "read as something else"  # fmt: skip

    folder = tmp_path / "Pong" / "1"
    texts = [folder / "manifest.json", folder / "episodes.jsonl"]
    others = sorted(file for file in folder.rglob("*") if file.is_file() and file not in texts and file.stat().st_size)
    campaign(texts, 2_000, edited, read, ReplayError, lambda file: file.name)

    def names(file: Path) -> str:
        return file.name if file.parent == folder else file.parent.name

    campaign(others, 2_000, damaged, read, ReplayError, names)


def test_stores_that_were_imported(small_blocks: None, tmp_path: Path) -> None:
    """Damage where an import was made to: what is made again is the same, all else is named."""
    log = DopamineLog(tmp_path / "source", capacity=12)
    for length in (5, 8, 7, 9):
        log.add_episode(length)
    log.finish()
    import_dqn_replay(tmp_path / "source", tmp_path / "store")
    folder = tmp_path / "store" / "Pong" / "1"

    def content() -> list:
        replay = open_replay(tmp_path / "store")
        problems = replay.validate()
        if problems:
            raise ReplayError(" ".join(problems))
        return [replay.manifests("Pong"), replay.episodes("Pong").to_dict("list"), replay.import_reports("Pong")]

    expected = content()

    def read() -> None:
        assert content() == expected, "read as something else"

    def import_again() -> None:
        import_dqn_replay(tmp_path / "source", tmp_path / "store")
        read()

    def names(file: Path) -> str:
        return file.name if file.parent in (folder, folder / "parts") else file.parent.name

    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)
    tables = [file for file in files if file.name == "import.json" or file.suffix == ".arrow"]
    campaign(tables, 250, damaged, read, ReplayError, names)
    campaign(files, 250, damaged, import_again, ReplayError, names)


@settings(max_examples=1_000, **SLOW)
@given(history=dump_histories())
def test_histories_of_dumps(small_blocks: None, history: tuple) -> None:
    """No damage here: rings that were dumped at any times, which the default run tries 25 of."""
    check_history(history)


def scalars(node: yaml.Node) -> object:
    """What a YAML node says, as text, nothing resolved; the value of a mapping's every key, in order."""
    if isinstance(node, yaml.MappingNode):
        return [(scalars(key), scalars(value)) for key, value in node.value]
    if isinstance(node, yaml.SequenceNode):
        return [scalars(item) for item in node.value]
    return node.value if node.style in ("'", '"', "|", ">") else Plain(node.value)


class Plain(str):
    """Text without quotes, which may stand for something else."""


def says(text: object, value: object) -> bool:
    """Whether text of a YAML file can stand for a value."""
    if isinstance(value, dict):
        keys = [key for key, _ in text]
        return len(set(keys)) == len(keys) == len(value) and all(
            says(key, name) and says(inner, item) for (key, inner), (name, item) in zip(text, value.items())
        )
    if isinstance(value, list):
        return isinstance(text, list) and len(text) == len(value) and all(map(says, text, value))
    if not isinstance(text, Plain):
        return value == text
    if value is None:
        return text in ("", "~", "null", "Null", "NULL")
    if isinstance(value, bool):
        return text.lower() == str(value).lower()
    if isinstance(value, int):
        return int(text, 0 if text[:2] in ("0o", "0x") else 10) == value
    if isinstance(value, float):
        return np.array_equal(float(text.replace(".inf", "inf").replace(".nan", "nan").lower()), value, equal_nan=True)
    return value == text and text.lower() not in ("true", "false", "null", "~")


def check_says(file: Path, values: dict) -> None:
    """The values of a file are what an independent reader finds in it."""
    node = yaml.compose(file.read_text(encoding="utf-8"), yaml.BaseLoader)
    assert says(scalars(node) if node else [], values), f"read as {values}"


def test_parameters(tmp_path: Path) -> None:
    files = {}
    for notebook in parameters.NOTEBOOKS:
        for source in sorted((WORKSPACE / "params" / notebook).glob("*.yaml"))[:4]:
            files[Path(shutil.copy(source, tmp_path / f"{notebook}.{source.name}"))] = notebook
    for number, (file, notebook) in enumerate(files.items()):

        def read(file: Path = file, notebook: str = notebook) -> None:
            values = parameters.load(file)
            checked = parameters.check(notebook, values, str(file)).model_dump()
            check_says(file, values)
            assert {name: checked[name] for name in values} == values
            defaults = parameters.check(notebook, {}).model_dump()
            assert all(checked[name] == defaults[name] for name in checked.keys() - values.keys())

        share = 1_500 * (number + 1) // len(files) - 1_500 * number // len(files)
        campaign([file], share, edited, read, ParameterError)


def test_views(tmp_path: Path) -> None:
    for source in (WORKSPACE / "params" / "views").glob("*.yaml"):
        shutil.copy(source, tmp_path)
    files = sorted(tmp_path.iterdir())
    for number, file in enumerate(files):

        def read(file: Path = file) -> None:
            view, values = load_view(file).model_dump(), documents.load(file) or {}
            check_says(file, values)
            assert {name: view[name] for name in values} == values

        share = 1_000 * (number + 1) // len(files) - 1_000 * number // len(files)
        campaign([file], share, edited, read, ReplayError)


def test_batches(tmp_path: Path) -> None:
    for source in (WORKSPACE / "params" / "batches").glob("*.yaml"):
        shutil.copy(source, tmp_path)
    files = sorted(tmp_path.iterdir())
    for number, file in enumerate(files):

        def read(file: Path = file) -> None:
            steps, values = batches.load_batch(file, {}), parameters.load(file)
            check_says(file, values)
            assert [step.notebook for step in steps] == [step["notebook"] for step in values["steps"]]
            assert [step.retries for step in steps] == [step.get("retries", 2) for step in values["steps"]]

        share = 1_000 * (number + 1) // len(files) - 1_000 * number // len(files)
        campaign([file], share, edited, read, ParameterError)


def test_checkpoints(tmp_path: Path) -> None:
    table = jnp.array(np.random.default_rng(0).normal(size=(3, 200)), jnp.float32)
    state = training.TrainState(jnp.int32(7), {"table": table}, {"table": table + 1}, ())
    about = {"encoder": "nature", "games": ["Pong"]}
    checkpoints = training.Checkpoints(tmp_path, about)
    checkpoints.save(state, [{"loss": np.float32(0.5)}])
    checkpoints.close()

    def read() -> None:
        checkpoints = training.Checkpoints(tmp_path, about)
        try:
            restored = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
        finally:
            checkpoints.close()
        for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
            assert np.array_equal(ours, theirs), "other values"
        assert [row["loss"] for row in checkpoints.window] == [np.float32(0.5)]

    files = sorted(file for file in tmp_path.rglob("*") if file.is_file() and file.stat().st_size)
    campaign(files, 500, damaged, read, training.CheckpointError, lambda file: str(tmp_path / "7"))
