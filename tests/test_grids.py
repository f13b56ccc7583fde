"""Grids: what they expand to, and real runs on a real Dask cluster, failing and killed."""

import io
import json
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml
from distributed import Client
from rich.console import Console

from scaled_ql import batches, collect, grids, parameters, processes, runs
from scaled_ql.parameters import ParameterError
from scaled_ql.replay import open_replay


def collection(outputs: Path, **values: object) -> parameters.Parameters:
    tiny = {"games": ["Breakout"], "num_transitions": 300, "max_steps": 100, "processes": 1, "outputs": str(outputs)}
    return parameters.check("01_data_collection", tiny | values)


def cell(outputs: Path, run: str, **values: object) -> tuple[str, parameters.Parameters]:
    return "01_data_collection", collection(outputs, run=run, **values)


def test_a_grid_is_all_combinations_of_each_mapping_once(tmp_path: Path) -> None:
    base = parameters.check("04_scaled_training", {"run": "base", "alpha": 1.0})
    grid = [{"head": ["c51", "mse"], "seed": [0, 1]}, {"seed": [0, 1, 2]}, {"alpha": [0.0, 1.0]}]
    cells = batches.expand(base, grid, "04_scaled_training", "batch.yaml")
    names = ["base", "base.seed-1", "base.head-mse", "base.seed-1.head-mse", "base.seed-2", "base.alpha-0.0"]
    assert [values.run for values in cells] == names
    assert [(values.head, values.seed, values.alpha) for values in cells] == [
        ("c51", 0, 1.0), ("c51", 1, 1.0), ("mse", 0, 1.0), ("mse", 1, 1.0), ("c51", 2, 1.0), ("c51", 0, 0.0)
    ]  # fmt: skip
    assert batches.expand(base, [], "04_scaled_training", "batch.yaml") == [base]
    with pytest.raises(ParameterError, match=r"(?s)batch\.yaml with .*'heda'.*did you mean head"):
        batches.expand(base, [{"heda": ["mse"]}], "04_scaled_training", "batch.yaml")


def test_names_tell_apart_what_differs() -> None:
    base = parameters.check("04_scaled_training", {})
    changes = [{"learning_rate": 1e30}, {"learning_rate": 1e-30}, {"hidden_sizes": [5, 12]}, {"view": "a/b"}]
    names = [batches.cell_name(base, change) for change in changes]
    assert len(set(names)) == 4
    for name in names:
        parameters.check("04_scaled_training", {"run": name})


def test_a_failing_run_is_retried_and_reported_and_a_killed_worker_costs_nothing_but_time(
    recording: Path, tmp_path: Path
) -> None:
    """One worker, which first fails twice, and then is killed in the middle of the other run."""
    absent = {"dataset": str(recording), "episode": 99_999, "outputs": str(tmp_path), "run": "bad"}
    name, values = cell(tmp_path, "killed", num_transitions=3_000)
    cells = [("03_data_exploration", parameters.check("03_data_exploration", absent)), (name, values)]
    status = tmp_path / name / "killed" / "status.json"
    killed = []

    def kill_its_worker() -> None:
        while not runs.read_json(status).get("done"):
            time.sleep(0.05)
        worker = psutil.Process(json.loads(status.read_text())["pid"]).parent()
        killed.append(worker.pid)
        worker.kill()

    thread = threading.Thread(target=kill_its_worker, daemon=True)
    thread.start()
    outcomes = grids.run_grid(cells, workers=1, retries=1)
    assert [outcome.values.run for outcome in outcomes] == ["bad", "killed"]
    assert [outcome.state for outcome in outcomes] == ["failed", "finished"]
    assert [outcome.retries for outcome in outcomes] == [1, 0]
    assert "IndexError" in outcomes[0].error
    assert "Traceback" in outcomes[0].error and "---->" in outcomes[0].error, "the failing cell is shown"
    thread.join(timeout=10)
    assert killed and not psutil.pid_exists(killed[0])
    collect.record_game(tmp_path / "undisturbed", "Breakout", 3_000, seed=values.seed, max_steps=values.max_steps)
    data = [open_replay(folder) for folder in (tmp_path / name / "killed" / "replay", tmp_path / "undisturbed")]
    assert data[0].identity() == data[1].identity()
    assert data[0].validate() == []
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("run.html")}
    began = time.monotonic()
    assert [outcome.state for outcome in grids.run_grid(cells[1:])] == ["finished"]
    assert time.monotonic() - began < 5, "nothing was left to do"
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_the_table_shows_where_runs_are(tmp_path: Path) -> None:
    cells = [cell(tmp_path, run) for run in ("running", "waiting", "ended", "broken")]
    folder = tmp_path / "01_data_collection" / "running"
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"state": "running", "done": 500, "total": 2_000}))
    line = json.dumps({"step": 500, "loss": 3.25, "steps_per_second": 8.0})
    (folder / "metrics.jsonl").write_text(line + "\n" + '{"step": 550, "lo')
    done = tmp_path / "01_data_collection" / "ended"
    done.mkdir()
    scores = {game: {"human-normalised %": score} for game, score in zip("abcde", (0.0, 10.0, 20.0, 90.0, None))}
    scores["f"] = {}  # no reference scores
    (done / "summary.json").write_text(json.dumps({"games": scores}))
    outcomes = {
        run: grids.Outcome(*one, state, 0, "") for run, state, one in
        (("ended", "finished", cells[2]), ("broken", "failed", cells[3]))
    }  # fmt: skip
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(grids.GridTable(cells, {}).table({"running": 2}, outcomes))
    text = console.export_text()
    assert "1 of 4 finished, 1 waiting" in text
    (row,) = [line for line in text.splitlines() if "running" in line and "500" in line]
    for shown in ("500 of 2,000", "8.0", "3.250", "3 min", "2"):
        assert shown in row
    assert any("ended" in line and "15.0%" in line for line in text.splitlines())
    assert any("broken" in line and "failed" in line for line in text.splitlines())


def test_every_worker_has_cores_of_its_own_and_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert processes.accelerators() == ["4", "7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert processes.accelerators() == []


def test_a_batch_with_a_grid(tmp_path: Path) -> None:
    file = tmp_path / "batch.yaml"
    step = {"notebook": "04_scaled_training", "parameters": "tiny.yaml", "grid": [{"seed": [0, 1, 2]}], "retries": 4}
    file.write_text(yaml.safe_dump({"steps": [step]}))
    (loaded,) = batches.load_batch(file, {"outputs": str(tmp_path)})
    assert [values.run for values in loaded.cells] == ["tiny", "tiny.seed-1", "tiny.seed-2"]
    assert all(values.outputs == str(tmp_path) for values in loaded.cells)
    assert loaded.retries == 4


def test_no_run_waits_behind_another_while_a_worker_may_become_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grids, "_execute", lambda notebook, values: time.sleep(0.5))
    monkeypatch.setattr(grids, "REFRESH_SECONDS", 0.1)
    given, table = [], grids.GridTable([], {})
    with grids._local_cluster(2, 6) as cluster, Client(cluster, set_as_default=False) as client:
        monkeypatch.setattr(table, "update", lambda *_: given.extend(map(len, client.processing().values())))
        outcomes = grids._follow(client, [cell(tmp_path, f"run{number}") for number in range(6)], 0, table)
    assert [outcome.state for outcome in outcomes.values()] == ["finished"] * 6
    assert max(given) == 1
