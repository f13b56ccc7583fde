"""Imports survive whatever is killed: the result is byte for byte that of an undisturbed import."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import psutil
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from scaled_ql.replay import ReplayError, ReplayWriter, export_dqn_replay, import_dqn_replay, open_replay

GAMES = {"Pong": ["NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE"], "Freeway": ["NOOP", "UP", "DOWN"]}
Contents = dict[str, bytes]


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs of two games in twelve files each; frames of noise, so that converting takes a moment."""
    folder = tmp_path_factory.mktemp("logs")
    rng = np.random.default_rng(0)
    for game, actions in GAMES.items():
        with ReplayWriter(folder / "store", game, actions=actions, source="noise", sticky_actions=0.25) as writer:
            while writer.num_transitions < 4_500:
                length = int(rng.integers(1, 700))
                writer.append(
                    rng.integers(1, 256, (length, 84, 84), dtype=np.uint8),
                    rng.integers(len(actions), size=length),
                    rng.normal(size=length),
                    terminal=bool(rng.integers(2)),
                )
    export_dqn_replay(folder / "store", folder / "logs", rows_per_file=-(-writer.num_transitions // 12) + 40)
    return folder / "logs"


@pytest.fixture(scope="module")
def undisturbed(logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Contents:
    folder = tmp_path_factory.mktemp("undisturbed")
    import_dqn_replay(logs, folder)
    assert open_replay(folder).validate() == []
    return contents(folder)


def contents(folder: Path) -> Contents:
    """Every file below a folder, locks aside."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != ".lock"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def begin(logs: Path, store: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "scaled_ql.command", "import", "dqn-replay", str(logs), str(store), *options]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen | None = None, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition() and (process is None or process.poll() is None):
        assert time.monotonic() < until, "nothing happens"
        time.sleep(0.002)


def parts(store: Path) -> int:
    return len(list(store.glob("*/1/parts/*.arrow")))


def files_of_chunks(store: Path) -> int:
    return len(list(store.glob("*/1/observation/c.*")))


POINTS = {
    "before the first file": lambda store: store.exists(),
    "in the first file": lambda store: files_of_chunks(store) > 0,
    "after some files": lambda store: parts(store) >= 5,
    "between the games": lambda store: (store / "Freeway/1/episodes.arrow").exists(),
    "while the second is checked": lambda store: (store / "Pong/1/manifest.json").exists(),
}


def test_a_killed_import_goes_on(logs: Path, undisturbed: Contents, tmp_path: Path) -> None:
    for reached in POINTS.values():
        process = begin(logs, tmp_path)
        wait_for(lambda reached=reached: reached(tmp_path), process)
        process.kill()
        process.communicate()
        if (tmp_path / "Freeway/1/manifest.json").exists():
            assert open_replay(tmp_path).validate() == []  # what is there can be used already
    import_dqn_replay(logs, tmp_path)
    assert contents(tmp_path) == undisturbed


def test_an_import_on_dask_survives_its_workers(logs: Path, undisturbed: Contents, tmp_path: Path) -> None:
    process = begin(logs, tmp_path, "--workers", "2")
    for number in (1, 9):
        wait_for(lambda number=number: parts(tmp_path) >= number, process)
        workers = [child for child in psutil.Process(process.pid).children(recursive=True) if works(child)]
        if workers:
            workers[0].kill()
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert contents(tmp_path) == undisturbed


def works(process: psutil.Process) -> bool:
    """Whether it is a worker or its nanny's child, not multiprocessing's own helper."""
    return process.is_running() and "spawn_main" in " ".join(process.cmdline())


def test_a_killed_import_on_dask_goes_on(logs: Path, undisturbed: Contents, tmp_path: Path) -> None:
    process = begin(logs, tmp_path, "--workers", "2")
    wait_for(lambda: parts(tmp_path) >= 3, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/1/parts/*.arrow")}
    assert len(before) >= 3
    import_dqn_replay(logs, tmp_path)
    assert contents(tmp_path) == undisturbed
    assert before == {file: file.stat().st_mtime_ns for file in before}  # nothing was done twice


def test_an_import_whose_scheduler_dies_goes_on_with_another(logs: Path, undisturbed: Contents, tmp_path: Path) -> None:
    store, dask = tmp_path / "store", [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    dask_worker = [sys.executable, "-m", "distributed.cli.dask_worker"]

    def cluster(name: str) -> list[subprocess.Popen]:
        file = tmp_path / name
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": tmp_path}
        local = ["--host", "127.0.0.1", "--scheduler-file", str(file), "--no-dashboard"]
        scheduler = subprocess.Popen([*dask, *local, "--port", "0"], **options)
        wait_for(file.exists)
        worker = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1", "--death-timeout", "5"]
        return [scheduler, subprocess.Popen([*dask_worker, "--scheduler-file", str(file), *worker], **options)]

    started = cluster("first.json")
    try:
        import_ = begin(logs, store, "--scheduler", address(tmp_path / "first.json"))
        wait_for(lambda: parts(store) >= 2, import_)
        started[0].kill()
        _, stderr = import_.communicate(timeout=200)
        assert import_.returncode == 1
        assert "Run it again" in stderr
        started += cluster("second.json")
        import_ = begin(logs, store, "--scheduler", address(tmp_path / "second.json"))
        _, stderr = import_.communicate(timeout=240)
        assert import_.returncode == 0, stderr
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert contents(store) == undisturbed


def address(file: Path) -> str:
    return json.loads(file.read_text())["address"]


def test_chunks_that_no_file_holds_are_no_damage(logs: Path, tmp_path: Path) -> None:
    shutil.copytree(logs / "Pong", tmp_path / "logs/Pong")
    for file in tmp_path.glob("logs/Pong/1/replay_logs/*_ckpt.[35].gz"):
        file.unlink()
    report = import_dqn_replay(tmp_path / "logs", tmp_path / "store")
    replay = open_replay(tmp_path / "store")
    assert len(report.gaps) == 2 and replay.validate() == []
    table = replay.episodes("Pong")
    assert len(replay.actions("Pong")) == report.transitions == table["length"].sum()
    assert 1 <= table["continued"].sum() <= 2  # one begins after each gap, unless the gap ends where an episode does


def test_a_bucket(logs: Path, undisturbed: Contents, tmp_path: Path) -> None:
    """Any fsspec URL; the address is in the parts alone."""
    bucket = fsspec.filesystem("memory")
    bucket.put(str(logs / "Pong"), "/bucket/Pong", recursive=True)
    import_dqn_replay("memory://bucket", tmp_path)
    same = {name: content for name, content in undisturbed.items() if name.startswith("Pong/1/observation")}
    assert same and same.items() <= contents(tmp_path).items()


class Locked(MemoryFileSystem):
    protocol = "locked"

    def ls(self, *_: object, **__: object) -> list:
        raise PermissionError("403 Forbidden")


def test_a_bucket_that_admits_nobody(tmp_path: Path) -> None:
    fsspec.register_implementation("locked", Locked, clobber=True)
    with pytest.raises(ReplayError, match=r"locked://bucket: cannot be listed .*403 Forbidden.* permissions"):
        import_dqn_replay("locked://bucket", tmp_path)
    with pytest.raises(ReplayError, match="this kind of address cannot be read"):
        import_dqn_replay("nosuch://bucket", tmp_path)


def test_a_full_disk(logs: Path, undisturbed: Contents, tmp_path: Path) -> None:
    """The system refuses to write more than 200 KB to a file."""
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
    code = limited + "from scaled_ql.command import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "import", "dqn-replay", str(logs), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f"error: {tmp_path}" in done.stderr and "/1: cannot be written" in done.stderr
    import_dqn_replay(logs, tmp_path)
    assert contents(tmp_path) == undisturbed


def test_a_second_import_into_the_same_folder_is_kept_out(logs: Path, tmp_path: Path) -> None:
    process = begin(logs, tmp_path)
    try:
        wait_for(lambda: parts(tmp_path) >= 1, process)
        with pytest.raises(ReplayError, match="another process"):
            import_dqn_replay(logs, tmp_path)
    finally:
        process.kill()
        process.communicate()
