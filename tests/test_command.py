"""The command's data side: import, verify, export and the benchmarks, as a user calls them."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from scaled_ql import benchmarks, runs
from scaled_ql.command import main
from scaled_ql.replay import format, open_replay


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_export_import_and_verify(recording: Path, tmp_path: Path) -> None:
    logs, store = tmp_path / "logs", tmp_path / "store"
    assert call("export", "dqn-replay", recording, logs, "--rows-per-file", "300").exit_code == 0
    done = call("import", "dqn-replay", logs, store, "--game", "Freeway", "--game", "Breakout")
    assert done.exit_code == 0, done.output
    before, after = open_replay(recording), open_replay(store)
    assert after.identity() == before.identity()
    assert f"{sum(map(before.num_transitions, before.games)):,} transitions" in done.output
    sound = call("verify", store)
    assert sound.exit_code == 0 and "2 games" in sound.output and "0 problems" in sound.output
    (file,) = store.glob("Freeway/1/observation/c.0.0.0")
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    damaged = call("verify", store)
    assert damaged.exit_code == 1 and "Freeway/1/observation" in damaged.output


def test_a_bad_file_stops_or_is_left_out(recording: Path, tmp_path: Path) -> None:
    logs, store = tmp_path / "logs", tmp_path / "store"
    call("export", "dqn-replay", recording, logs, "--rows-per-file", "300")
    (bad,) = logs.glob("Breakout/1/replay_logs/*reward_ckpt.1.gz")
    bad.write_bytes(b"not a gzip file")
    stopped = call("import", "dqn-replay", logs, store)
    assert stopped.exit_code == 1 and f"error: {bad}" in stopped.output
    unfinished = call("verify", store)
    assert unfinished.exit_code == 1 and "Breakout run 1: its import is incomplete" in unfinished.output
    skipped = call("import", "dqn-replay", logs, store, "--skip-bad")
    assert skipped.exit_code == 0 and "left out: game Breakout, run 1" in skipped.output
    assert call("verify", store).exit_code == 0


def test_a_parameter_of_the_command_line_is_yaml_and_given_once(tmp_path: Path) -> None:
    twice = call("run", "01_data_collection", "-p", "seed", "1", "-p", "seed", "2", "--outputs", tmp_path)
    assert twice.exit_code == 1 and "-p seed is given twice" in twice.output
    broken = call("run", "01_data_collection", "-p", "games", "[Pong", "--outputs", tmp_path)
    assert broken.exit_code == 1 and "error: -p games '[Pong': not a YAML value" in broken.output


def check_is_one_line(done: Result, *words: object) -> None:
    assert done.exit_code == 1 and done.output.startswith("error: ") and done.output.count("\n") == 1, done.output
    for word in words:
        assert str(word) in done.output


@pytest.fixture(scope="module")
def logs(recording: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    assert call("export", "dqn-replay", recording, folder, "--rows-per-file", "300").exit_code == 0
    return folder


def mount(*arguments: object) -> None:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", disk)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("how", ["small", "full", "read-only"])
def test_a_disk_that_takes_nothing_is_one_line(
    recording: Path, logs: Path, small_disk: Path, tmp_path: Path, how: str
) -> None:
    if how == "full":
        with (small_disk / "all").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4_096)) == 4_096:
                pass
    if how == "read-only":
        mount("-o", "remount,ro", small_disk)
    check_is_one_line(call("import", "dqn-replay", logs, small_disk / "store"), small_disk)
    for folder in () if how == "full" else small_disk.iterdir():
        shutil.rmtree(folder)
    check_is_one_line(call("export", "dqn-replay", recording, small_disk / "logs"), small_disk)
    for folder in () if how == "full" else small_disk.iterdir():
        shutil.rmtree(folder)
    check_is_one_line(call("benchmark", "import", recording, small_disk / "x", "--rows", "500"), small_disk)
    if how != "small":  # it would have room for what begins a run
        tiny = "params/01_data_collection/tiny.yaml"
        given = "run", "01_data_collection", runs.workspace() / tiny, "--outputs", small_disk / "outputs"
        check_is_one_line(call(*given), small_disk, "Set outputs to" if how == "read-only" else "Make room")


def test_a_read_only_recording_is_read(recording: Path, logs: Path, small_disk: Path, tmp_path: Path) -> None:
    mount("--bind", "-o", "ro", recording, small_disk)
    try:
        mount("-o", "remount,bind,ro", small_disk)
        with pytest.raises(OSError, match="Read-only"):
            (small_disk / "file").write_text("")
        assert call("verify", small_disk).exit_code == 0
        check_is_one_line(call("import", "dqn-replay", logs, small_disk), small_disk, "cannot write here")
    finally:
        subprocess.run(["umount", str(small_disk)], check=True)


LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ("import", "dqn-replay", LONG, "STORE"),
        ("import", "rl-unplugged", LONG, "STORE"),
        ("import", "minari", LONG, "STORE"),
        ("import", "dqn-replay", "LOGS", LONG),
        ("import", "dqn-replay", "LOGS", "STORE", "--game", LONG),
        ("export", "dqn-replay", "RECORDING", LONG),
        ("verify", LONG),
        ("benchmark", "sampling", LONG),
        ("benchmark", "scale", "RECORDING", LONG, "--copies", "1"),
        ("benchmark", "import", "RECORDING", LONG, "--rows", "500"),
        ("benchmark", "peers", LONG, "environments"),
        ("run", "01_data_collection", "--outputs", LONG),
        ("run", "01_data_collection", "-p", "run", LONG, "--outputs", "STORE"),
        ("run", "01_data_collection", "-p", "games", f"[{LONG}]", "--outputs", "STORE"),
        ("run", "04_scaled_training", "-p", "dataset", "RECORDING", "-p", "view", LONG, "--outputs", "STORE"),
        ("run", "04_scaled_training", "-p", "dataset", "RECORDING", "-p", "view", f"{LONG}.yaml", "--outputs", "STORE"),
    ],
    ids=lambda arguments: "-".join(arguments[:4]).replace(LONG, "long").replace("[", "").replace("]", ""),
)
def test_a_name_of_300_characters_is_one_line(
    recording: Path, logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"LOGS": logs, "RECORDING": recording, "STORE": tmp_path / "store"}
    check_is_one_line(call(*(places.get(argument, argument) for argument in arguments)), LONG)


@pytest.mark.parametrize("content", [b"", b'{"complete": tr', b"null", b"[]", b"{}", b"more"])
def test_a_damaged_report_of_an_import_is_named_and_made_again(logs: Path, tmp_path: Path, content: bytes) -> None:
    assert call("import", "dqn-replay", logs, tmp_path).exit_code == 0
    file = next(tmp_path.glob("*/1/import.json"))
    before = file.read_bytes()
    file.write_bytes(before.replace(b'"gaps": []', b'"gaps": [1]') if content == b"more" else content)
    assert file.read_bytes() != before
    check_is_one_line(call("verify", tmp_path), "import.json: not the report of an import", "Run the same import again")
    assert call("import", "dqn-replay", logs, tmp_path).exit_code == 0
    assert file.read_bytes() == before
    assert call("verify", tmp_path).exit_code == 0


def test_importing_again_mends_a_table_and_names_what_is_gone(logs: Path, tmp_path: Path) -> None:
    """As the message about a damaged table says."""
    assert call("import", "dqn-replay", logs, tmp_path).exit_code == 0
    table = next(tmp_path.glob("*/1/episodes.arrow"))
    before = table.read_bytes()
    table.write_bytes(before[:100])
    check_is_one_line(call("verify", tmp_path), "episodes.arrow: its checksum is wrong", "import it again")
    assert call("import", "dqn-replay", logs, tmp_path).exit_code == 0
    assert table.read_bytes() == before
    shutil.rmtree(table.parent / "observation")
    check_is_one_line(call("import", "dqn-replay", logs, tmp_path), table.parent, "observation", "missing", "Delete")


@pytest.mark.parametrize("kind", ["dqn-replay", "rl-unplugged", "minari"])
def test_nothing_there(tmp_path: Path, kind: str) -> None:
    done = call("import", kind, tmp_path / "absent", tmp_path / "store")
    assert done.exit_code == 1 and done.output.startswith("error: ") and "absent" in done.output


def test_sampling_benchmark(recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.benchmark_sampling, "__defaults__", (0.05,))
    done = call("benchmark", "sampling", recording)
    assert done.exit_code == 0, done.output
    for words in ("bytes/transition", "disk, 1 threads", "memory, compressed", "limit: zstd alone", "ring buffer"):
        assert words in done.output


PARTS = {"emulation": 400.0, "network": 60.0, "sample": 640.0, "update": 6_400.0, "loop": 30.0, "log": 20.0}


@pytest.mark.parametrize("cores, environments", [(2, 64), (16, 64), (16, 128)])
def test_rates_computed_for_more_cores(cores: int, environments: int) -> None:
    """By hand: microseconds of a step that all cores share, and those that follow one another."""
    table = benchmarks.online_rates(PARTS, cores, environments, decision_ms=0.5, update_ms=2.0)
    decisions = 1_000 / environments
    expected = {
        "random actions, nothing else": (400, 0, 0),
        "acting, logging": (510, 90, 30 + 60 / cores),
        "acting, logging, learning": (620, 200, 40 + 160 / cores),
        "acting, logging, network on an accelerator": (450, 30 + decisions, 30 + decisions),
        "acting, logging, learning on an accelerator": (460, 71.25 + decisions, 71.25 + decisions),
    }
    assert list(table.index) == list(expected)
    for name, (together, longest, shortest) in expected.items():
        row, shared = table.loc[name], together / cores
        assert row["least"] == pytest.approx(1e6 / max(shared, longest))
        assert row["most"] == pytest.approx(1e6 / max(shared, shortest))
        assert row["limit"] == ("cores" if shared > shortest else "playing thread")
        assert row["share of random actions"] == pytest.approx(row["most"] * 400 / cores / 1e6)


def test_the_parts_of_a_step_are_measured() -> None:
    parts = benchmarks.online_parts("Breakout", 4, "nature_narrow", 16, 8, seconds=0.05)
    assert parts.index.tolist() == ["emulation", "network", "sample", "update", "loop", "log"]
    assert (parts > 0).all() and parts["update"] > parts["network"]
    assert np.isfinite(parts).all()


def test_a_repeated_store_is_a_sound_one(recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format, "FRAME_SHARD", 2 * benchmarks.ROWS)
    source = open_replay(recording)
    replay = open_replay(benchmarks.repeat_store(source, tmp_path / "large", ["Pong", "Qbert", "Boxing"], 3))
    assert [replay.num_transitions(game) for game in replay.games] == [3 * benchmarks.ROWS] * 3
    assert replay.validate() == []


QUICKSTART = "params/04_scaled_training/quickstart.yaml"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["04_scaled_trainig"], "no such batch or notebook. Did you mean: scaled-ql run 04_scaled_training"),
        (["quickstart"], "Did you mean: scaled-ql run params/batches/quickstart.yaml"),
        (["params/batches/quickstrat.yaml"], "Did you mean: scaled-ql run params/batches/quickstart.yaml"),
        (["quickstart.yaml"], "Did you mean: scaled-ql run params/batches/quickstart.yaml"),
        ([QUICKSTART], "parameters of a notebook, not a batch. Did you mean: scaled-ql run 04_scaled_training"),
        ([QUICKSTART, "04_scaled_training"], f"Did you mean: scaled-ql run 04_scaled_training {QUICKSTART}"),
        (["04_scaled_training", "quickstart.yaml"], f"Did you mean: scaled-ql run 04_scaled_training {QUICKSTART}"),
        (["04_scaled_training", f"{QUICKSTART}x"], f"Did you mean: scaled-ql run 04_scaled_training {QUICKSTART}"),
        (["x" * 300], "no such batch or notebook. There are 00_walkthrough"),
        (["x" * 300 + ".yaml"], "no such batch or notebook. There are 00_walkthrough"),
        (["09_performance", "x" * 300], "no such file. There are"),
    ],
)  # fmt: skip
def test_a_misspelt_target_names_what_was_meant(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(workspace)
    done = call("run", *arguments)
    assert done.exit_code == 1 and done.output.startswith("error: ") and said in done.output
    assert done.output.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "steps: Field required"),
        ("- a", "expected a mapping"),
        ("steps: 5", "steps: Input should be a valid list, got 5"),
        ("steps: []", "steps: List should have at least 1 item"),
        ("steps: [{notebook: 04_scaled_training}]", "steps.0.parameters: Field required"),
        ("steps: [{notebook: 04_scaled, parameters: x}]", "'04_scaled'; did you mean 04_scaled_training?"),
        ("steps: [{notebook: 04_scaled_training, parameters: x.yaml}]", "x.yaml: cannot be read as YAML"),
        ("steps: [", "cannot be read as YAML"),
        ("steps:\n  - notebook: 04_scaled_training\n    parameters: tiny.yaml\n    grid: {}\n", "steps.0.grid: "),
    ],
)  # fmt: skip
def test_a_malformed_batch_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "batch.yaml").write_text(text)
    done = call("run", tmp_path / "batch.yaml")
    assert done.exit_code == 1 and done.output.startswith("error: ") and said in done.output
    assert done.output.count("\n") == 1 and ".yaml" in done.output


@pytest.mark.parametrize("arguments", [("sampling", "nowhere"), ("scale", "nowhere", "x"), ("import", "nowhere", "x")])
def test_a_benchmark_of_nothing_is_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = call("benchmark", *arguments)
    assert done.exit_code == 1 and done.output.startswith("error: ") and done.output.count("\n") == 1
    assert "nowhere: no such replay folder" in done.output


def test_a_benchmark_of_an_unknown_game_is_one_line() -> None:
    done = call("benchmark", "online", "--game", "Breakuot")
    assert done.exit_code == 1 and done.output.startswith("error: ALE does not know") and done.output.count("\n") == 1
