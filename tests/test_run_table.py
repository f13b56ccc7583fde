"""The table of runs: their states, what differs, comparisons, what may be deleted."""

import asyncio
import json
from pathlib import Path

import filelock
import pytest
import yaml
from click.testing import CliRunner, Result

from scaled_ql import explore, run_table, runs
from scaled_ql.command import main


def write(outputs: Path, notebook: str, run: str, state: str, summary: dict | None = None, **changes: object) -> Path:
    folder = outputs / notebook / run
    folder.mkdir(parents=True)
    (folder / "parameters.yaml").write_text(yaml.safe_dump({"run": run, "seed": 0, "alpha": 0.05} | changes))
    status = {"state": state, "updated": 1e9 + len(list(outputs.glob("*/*"))), "done": 30, "total": 40}
    (folder / "status.json").write_text(json.dumps(status | ({"error": "Oh no"} if state == "failed" else {})))
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    training = "04_scaled_training"
    for seed, mean in enumerate((4.0, 5.0)):
        games = {"Breakout": {"agent_return": mean, "human-normalised %": 10 * mean}}
        folder = write(tmp_path, training, f"seed{seed}", "finished", {"games": games, "steps": 40}, seed=seed)
        (folder / "evaluation" / "step-40").mkdir(parents=True)
        (folder / "evaluation" / "step-40" / "Breakout.csv").write_text(f"episode_return\n{mean - 1}\n{mean + 1}\n")
        (folder / "metrics.jsonl").write_text('{"step": 20, "loss": 2.0}\n{"step": 40, "loss": 1.0}\n')
    (write(tmp_path, training, "killed", "running", alpha=1.0) / "metrics.jsonl").write_text('{"step": 30}\n')
    write(tmp_path, training, "broken", "failed")
    write(tmp_path, "06_transfer", "seed0", "finished", {"games": {"Qbert": {"agent_return": 321.09}}}, dataset="x")
    write(tmp_path, "03_data_exploration", "data", "finished", {"games": [{"game": "Pong", "transitions": 3}]})
    return tmp_path


def call(outputs: Path, *arguments: object, **more: str) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), "--outputs", str(outputs)], **more)


def test_states_scores_and_differences(outputs: Path) -> None:
    table = run_table.gather(outputs)
    assert table["run"].tolist() == ["data", "seed0", "broken", "killed", "seed1", "seed0"], (
        "the one updated last first"
    )
    assert table["state"].tolist() == ["finished", "finished", "failed", "stopped", "finished", "finished"]
    words = run_table.in_words(table, now=1e9 + 3 * 86_400)
    assert words["differs"].tolist() == [
        "",
        "",
        *(f"alpha {a}, seed {s}" for s, a in ((0, 0.05), (0, 1.0), (1, 0.05), (0, 0.05))),
    ]
    assert words["score"].tolist() == ["", "Qbert 321.1", "", "", "50.0%", "40.0%"]
    assert words["progress"].tolist() == ["", "", "30 of 40", "30 of 40", "", ""]
    assert set(words["age"]) == {"2 d"}


def test_a_run_is_running_while_a_process_holds_its_lock(outputs: Path) -> None:
    folder = outputs / "04_scaled_training" / "killed"
    with filelock.FileLock(folder / ".lock"):
        assert run_table.state(folder) == "running"
    assert run_table.state(folder) == "stopped"


def test_the_command_lists_and_filters(outputs: Path) -> None:
    listed = call(outputs, "runs", "--json", "--notebook", "04_scaled_training", "--state", "stopped")
    (row,) = json.loads(listed.output)
    assert (row["run"], row["done"], row["total"], row["parameters"]["alpha"]) == ("killed", 30, 40, 1.0)
    assert row["updated"].startswith("2001-09-09T")
    everything = call(outputs, "runs")
    assert everything.exit_code == 0 and "6 runs" in everything.output and "Qbert 321.1" in everything.output
    nothing = call(outputs, "runs", "--state", "finisht")
    assert "no runs with state 'finisht'; there are failed, finished, stopped" in nothing.output
    assert call(outputs / "absent", "runs").exit_code == 0
    assert json.loads(call(outputs / "absent", "runs", "--json").output) == []


def test_compared_runs(outputs: Path, tmp_path: Path) -> None:
    file = tmp_path / "curves.png"
    done = call(outputs, "runs", "compare", "04_scaled_training/seed0", "seed1", "--figure", file)
    assert done.exit_code == 0, done.output
    assert "│ seed" in done.output and "alpha" not in done.output
    assert "4 (3 to 5), 2 episodes" in done.output and "5 (4 to 6), 2 episodes" in done.output
    assert file.stat().st_size > 1_000
    two = call(outputs, "runs", "compare", "seed0", "seed1")
    assert two.exit_code == 1 and "several runs have that name" in two.output
    none = call(outputs, "runs", "compare", "sead1")
    assert none.exit_code == 1 and "no such run" in none.output and "04_scaled_training/seed1" in none.output


def test_an_unreadable_run_is_listed(outputs: Path) -> None:
    (outputs / "04_scaled_training" / "seed1" / "status.json").write_text("{")
    table = run_table.gather(outputs).set_index("run")
    assert table.loc["seed1", "state"] == "unreadable" and "cannot be read as JSON" in table.loc["seed1", "error"]
    assert json.loads(call(outputs, "runs", "--json").output)


def test_only_what_holds_nothing_is_deleted_and_only_if_asked(outputs: Path) -> None:
    training = outputs / "04_scaled_training"
    half = training / "seed0" / ".summary.json.7.partial"
    half.touch()
    before = sorted(outputs.rglob("*"))
    refused = call(outputs, "clean", input="n\n")
    assert sorted(outputs.rglob("*")) == sorted({*before, *outputs.rglob(".*lock")})
    assert "recorded nothing: Oh no" in refused.output and str(half) in refused.output
    with filelock.FileLock(training / "broken" / ".runner.lock"):
        assert list(run_table.leftovers(outputs)) == [half], "a run that starts is left alone"
    assert call(outputs, "clean", input="y\n").exit_code == 0
    assert not half.exists() and not (training / "broken").exists()
    assert all((training / name).exists() for name in ("seed0", "seed1", "killed"))
    assert "nothing to delete" in call(outputs, "clean", "--yes").output


def test_what_begins_while_it_asks_is_not_deleted(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = filelock.FileLock(outputs / "04_scaled_training" / "broken" / ".lock")
    monkeypatch.setattr("click.confirm", lambda *_: lock.acquire() and True)
    assert call(outputs, "clean").exit_code == 0
    lock.release()
    assert (outputs / "04_scaled_training" / "broken").exists()


def test_a_log_that_is_being_written_is_read_without_its_last_line(outputs: Path) -> None:
    with (outputs / "04_scaled_training" / "seed0" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 60, "lo')
    assert run_table.learning_curves([outputs / "04_scaled_training" / "seed0"])["step"].tolist() == [20, 40]


def test_a_report_is_rendered_again(outputs: Path) -> None:
    import nbformat

    folder = outputs / "04_scaled_training" / "seed1"
    assert "execute the run first" in call(outputs, "render", "seed1").output
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A report")]), folder / "run.ipynb")
    done = call(outputs, "render", "seed1")
    assert done.exit_code == 0 and "A report" in (folder / "run.html").read_text()


def test_the_version() -> None:
    from importlib import metadata

    assert metadata.version("scaled-ql") in CliRunner().invoke(main, ["--version"]).output


def test_the_workspaces_own_outputs_are_the_default() -> None:
    assert str(runs.workspace() / "outputs") in CliRunner().invoke(main, ["runs"]).output


def test_a_list_of_runs_refreshes_itself(outputs: Path) -> None:
    status = outputs / "04_scaled_training" / "killed" / "status.json"
    seen = []

    async def watch() -> None:
        watched = explore.watch_runs(outputs, seconds=0.01)
        (named, live), (rows, picture) = watched.children[0].children, watched.children[1:]
        seen.append(rows.value)
        drawn = bytes(picture.value)
        status.write_text(status.read_text().replace('"done": 30', '"done": 33'))
        while "33 of 40" not in rows.value:
            await asyncio.sleep(0.01)
        live.value, named.value = False, "04_scaled_training/seed"
        seen.append(rows.value)
        assert bytes(picture.value) != drawn, "curves instead of the sentence that there are none in common"

    asyncio.run(asyncio.wait_for(watch(), 60))
    assert "6 runs at" in seen[0] and seen[0].count("30 of 40") == 2 and "40.0%" in seen[0]
    assert "2 runs at" in seen[1] and "killed" not in seen[1]
    assert "6 runs at" in explore.watch_runs(outputs).children[1].value, "without an event loop, too"
