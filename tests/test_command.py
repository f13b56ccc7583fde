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
    twice = call("run", "00_data_collection", "-p", "seed", "1", "-p", "seed", "2", "--outputs", tmp_path)
    assert twice.exit_code == 1 and "-p seed is given twice" in twice.output
    broken = call("run", "00_data_collection", "-p", "games", "[Pong", "--outputs", tmp_path)
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
