"""The command's data side: import, verify, export and the benchmarks, as a user calls them."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from scaled_ql import benchmarks
from scaled_ql.command import main
from scaled_ql.replay import open_replay


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
    assert unfinished.exit_code == 1 and "Breakout run 1: its import is not complete" in unfinished.output
    skipped = call("import", "dqn-replay", logs, store, "--skip-bad")
    assert skipped.exit_code == 0 and "left out: game Breakout, run 1" in skipped.output
    assert call("verify", store).exit_code == 0


def test_a_parameter_of_the_command_line_is_yaml_and_given_once(tmp_path: Path) -> None:
    twice = call("run", "01_data_collection", "-p", "seed", "1", "-p", "seed", "2", "--outputs", tmp_path)
    assert twice.exit_code == 1 and "-p seed is given twice" in twice.output
    broken = call("run", "01_data_collection", "-p", "games", "[Pong", "--outputs", tmp_path)
    assert broken.exit_code == 1 and "error: -p games '[Pong': not a YAML value" in broken.output


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


def test_a_repeated_store_is_a_sound_one(recording: Path, tmp_path: Path) -> None:
    source = open_replay(recording)
    replay = open_replay(benchmarks.repeat_store(source, tmp_path / "large", ["Pong", "Qbert", "Boxing"], 2))
    assert [replay.num_transitions(game) for game in replay.games] == [2 * 16_384] * 3
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
        (["x" * 300], "no such batch or notebook. There are 01_data_collection"),
        (["x" * 300 + ".yaml"], "no such batch or notebook. There are 01_data_collection"),
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
