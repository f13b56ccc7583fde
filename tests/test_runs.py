"""Run folders: locks, parameters that may not change, tables computed once, reports that open offline."""

import errno
import fcntl
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from scaled_ql import batches, documents, parameters, runs
from scaled_ql.command import main
from scaled_ql.parameters import ParameterError
from scaled_ql.replay import ReplayError
from scaled_ql.replay.writer import lock_recording


def namespace(tmp_path: Path, **values: object) -> dict:
    values = {"outputs": str(tmp_path), **values}
    return {"In": ["", "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in values.items())], **values}


def test_a_run_writes_what_is_needed_to_repeat_it(tmp_path: Path) -> None:
    run = runs.start("01_data_collection", namespace(tmp_path, run="a", seed=4))
    assert runs.parameters.load(run.folder / "parameters.yaml")["seed"] == 4
    origin = runs.read_json(run.folder / "provenance.json")
    assert len(origin["git_commit"] or "0" * 40) == 40
    assert origin["packages"]["numpy"] == __import__("numpy").__version__
    assert runs.read_json(run.folder / "status.json")["state"] == "running"
    run.note(dataset="abc")
    assert runs.read_json(run.folder / "provenance.json") == origin | {"dataset": "abc"}
    run.finish({"score": 1})
    assert runs.read_json(run.folder / "status.json")["state"] == "finished"
    assert runs.read_json(run.folder / "summary.json") == {"score": 1}


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """NFS without a lock daemon, and others, answer so. A file in place of a lock would outlive who made it."""

    def flock(*_: object) -> None:
        raise OSError(code, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    values = parameters.check("01_data_collection", {"run": "a", "outputs": str(tmp_path)})
    folder = re.escape(str(runs.run_folder("01_data_collection", values)))
    sentence = rf"{folder}: cannot be locked against a second process \(.*No locks available\)\. Set outputs to"
    with pytest.raises(runs.RunError, match=sentence):
        runs.start("01_data_collection", namespace(tmp_path, run="a"))
    with pytest.raises(runs.RunError, match=sentence):
        runs.execute("01_data_collection", values)
    with pytest.raises(ReplayError, match=r"store: cannot write here \(.*No locks available"):
        lock_recording(tmp_path / "store", 0.0)


def test_a_package_that_is_read_from_a_path_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "PACKAGES", ("numpy", "nowhere-installed"))
    assert runs.provenance()["packages"] == {"numpy": np.__version__, "nowhere-installed": None}


def test_a_run_does_not_change_its_parameters(tmp_path: Path) -> None:
    runs.start("01_data_collection", namespace(tmp_path, run="a", seed=4)).finish({})
    with pytest.raises(runs.RunError, match=r"seed: 4 stored, 5 now.*another run name"):
        runs.start("01_data_collection", namespace(tmp_path, run="a", seed=5))
    runs.start("01_data_collection", namespace(tmp_path, run="b", seed=5)).finish({})


def test_a_run_from_before_a_parameter_existed_had_its_default(tmp_path: Path) -> None:
    run = runs.start("01_data_collection", namespace(tmp_path, run="a", seed=4))
    run.finish({})
    file = run.folder / "parameters.yaml"
    lines = [line for line in file.read_text().splitlines(keepends=True) if not line.startswith("export:")]
    assert len(lines) == len(file.read_text().splitlines()) - 1
    file.write_text("".join(lines))
    with pytest.raises(runs.RunError, match="export: False stored, True now"):
        runs.start("01_data_collection", namespace(tmp_path, run="a", seed=4, export=True))
    runs.start("01_data_collection", namespace(tmp_path, run="a", seed=4)).finish({})


def test_starting_again_in_the_same_kernel_goes_on(tmp_path: Path) -> None:
    runs.start("01_data_collection", namespace(tmp_path))
    runs.start("01_data_collection", namespace(tmp_path)).finish({})


def test_a_second_process_is_kept_out_and_told_by_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys, time; from scaled_ql import runs;"
        f"run = runs.start('01_data_collection', {namespace(tmp_path)!r});"
        "print('started', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"started\n"
        monkeypatch.setattr(runs, "LOCK_SECONDS", 0.2)
        with pytest.raises(runs.RunError, match=f"another process .pid {other.pid}."):
            runs.start("01_data_collection", namespace(tmp_path))
        other.kill()
    runs.start("01_data_collection", namespace(tmp_path)).finish({})


def test_a_table_is_computed_once_and_never_half_written(tmp_path: Path) -> None:
    file, calls = tmp_path / "deep" / "table.csv", []

    def compute() -> pd.DataFrame:
        calls.append(1)
        return pd.DataFrame({"a": [1, 2]})

    assert runs.once(file, compute).equals(runs.once(file, compute))
    assert len(calls) == 1
    with pytest.raises(ZeroDivisionError):
        runs.once(tmp_path / "other.csv", lambda: 1 / 0)
    assert not (tmp_path / "other.csv").exists()


def test_a_report_needs_no_network_and_shows_no_widget(tmp_path: Path) -> None:
    picture = {"image/png": "iVBORw0KGgo="}
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": "VBox(children=())"}
    outputs = [nbformat.v4.new_output("display_data", data) for data in (picture, widget)]
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell("1", outputs=outputs)],
        metadata={"widgets": {"application/vnd.jupyter.widget-state+json": {"state": {"x": {}}}}},
    )
    nbformat.write(book, tmp_path / "run.ipynb")
    html = runs.render(tmp_path / "run.ipynb").read_text()
    assert "data:image/png;base64" in html
    assert "VBox" not in html
    for word in ('src="http', 'href="http', "@import", "url(http"):
        assert word not in html


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "scaled_ql.command", *map(str, arguments)], capture_output=True, text=True, timeout=300,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_the_command_lists_all_mistakes_and_runs_nothing(tmp_path: Path) -> None:
    done = command("run", "01_data_collection", "-p", "seeed", "1", "-p", "processes", "many", "--outputs", tmp_path)
    assert done.returncode == 1
    assert "did you mean seed?" in done.stderr
    assert "processes: " in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_failing_notebook_says_why_and_can_be_read(recording: Path, tmp_path: Path) -> None:
    values = ["-p", "dataset", recording, "-p", "episode", "99999", "-p", "run", "x"]
    done = command("run", "03_data_exploration", *values, "--outputs", tmp_path)
    folder = tmp_path / "03_data_exploration" / "x"
    assert done.returncode == 1
    assert "IndexError" in done.stderr
    assert str(folder / "run.ipynb") in done.stderr
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed"
    assert "IndexError" in status["error"]
    assert nbformat.read(folder / "run.ipynb", as_version=4).cells


@pytest.mark.parametrize(
    ("notebook", "values", "said"),
    [
        (
            "01_data_collection",
            {"games": "[Pong, Breakuot]"},
            "run default: ALE does not know the game 'Breakuot'. Did",
        ),
        ("01_data_collection", {"games": "[Warlords]"}, "run default: Warlords needs two players"),
        ("03_data_exploration", {"dataset": "nowhere"}, "nowhere: no such replay folder."),
        ("03_data_exploration", {"dataset": "n" * 300}, "n: no such replay folder."),
        ("04_scaled_training", {"dataset": "RECORDING", "view": "pong_one_percnt"}, "Did you mean pong_one_percent?"),
        ("04_scaled_training", {"dataset": "RECORDING", "view": "pong_one_percent"}, "the view names Pong; there are"),
        ("04_scaled_training", {"dataset": "RECORDING", "view": "/nowhere.yaml"}, "/nowhere.yaml: cannot be read"),
        ("03_data_exploration", {"dataset": "RECORDING", "game": "Pong"}, "game 'Pong' is not in"),
        ("06_transfer", {"game": "Breakout", "mode": "5"}, "Breakout has no mode 5. Its modes are 0, 4, 8"),
        ("06_transfer", {"game": "Brekout"}, "Did you mean Breakout, Qbert"),
        ("06_transfer", {"initial": "04_scaled_training/tiny"}, "initial = '04_scaled_training/tiny': no such run"),
        ("06_transfer", {"initial": "scratch"}, "built_like = '04_scaled_training/default': no such run"),
    ],
)
def test_what_a_run_names_is_checked_before_a_kernel_starts(
    recording: Path, tmp_path: Path, notebook: str, values: dict, said: str
) -> None:
    given = [
        part for name, value in values.items() for part in ("-p", name, value.replace("RECORDING", str(recording)))
    ]
    done = CliRunner().invoke(main, ["run", notebook, *given, "--outputs", str(tmp_path)])
    assert done.exit_code == 1
    assert done.output.startswith("error: run default: ") and said in done.output and done.output.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_to_transfer_from_is_finished_and_has_checkpoints(tmp_path: Path) -> None:
    values = parameters.check("06_transfer", {"outputs": str(tmp_path), "initial": "04_scaled_training/a"})
    (tmp_path / "04_scaled_training" / "b" / "checkpoints" / "20").mkdir(parents=True)
    with pytest.raises(runs.RunError, match=r"no such run below .*; with checkpoints there are 04_scaled_training/b"):
        runs.trained_run(values, "initial")
    folder = tmp_path / "04_scaled_training" / "a"
    folder.mkdir()
    with pytest.raises(runs.RunError, match="no such run below"):
        runs.trained_run(values, "initial")
    for state in ("running", "failed", "interrupted"):
        (folder / "status.json").write_text(json.dumps({"state": state}))
        with pytest.raises(runs.RunError, match=f"that run is {state}. Wait until it is finished"):
            runs.trained_run(values, "initial")
    (folder / "status.json").write_text('{"state": "finished"}')
    with pytest.raises(runs.RunError, match=r"has no checkpoints\. Choose a run that trained a network"):
        runs.trained_run(values, "initial")
    (folder / "checkpoints" / "20").mkdir(parents=True)
    assert runs.trained_run(values, "initial") == folder


def test_a_batch_is_checked_before_its_first_step(tmp_path: Path) -> None:
    steps = [{"notebook": name, "parameters": "tiny.yaml"} for name in ("01_data_collection", "04_scaled_training")]
    steps[1]["grid"] = [{"view": ["", "nothing_like_it"]}]
    (tmp_path / "batch.yaml").write_text(documents.dump({"steps": steps}))
    done = CliRunner().invoke(main, ["run", str(tmp_path / "batch.yaml"), "--outputs", str(tmp_path / "outputs")])
    assert done.exit_code == 1 and "view 'nothing_like_it'" in done.output
    assert not (tmp_path / "outputs").exists()


def test_a_run_name_cannot_leave_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ParameterError):
        runs.start("01_data_collection", namespace(tmp_path, run="../../elsewhere"))


def test_a_failed_run_that_recorded_nothing_reserves_nothing(tmp_path: Path) -> None:
    run = runs.start("01_data_collection", namespace(tmp_path, run="a", seed=4))
    run._status("failed")
    again = runs.start("01_data_collection", namespace(tmp_path, run="a", seed=5))
    assert runs.parameters.load(again.folder / "parameters.yaml")["seed"] == 5
    (again.folder / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(runs.RunError, match="seed: 5 stored, 6 now"):
        runs.start("01_data_collection", namespace(tmp_path, run="a", seed=6))
    again.finish({})


def test_json_is_json(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    runs.write_json(file, {"a": math.nan, "b": [np.float32(0.5), np.int64(3), math.inf], "c": {"d": np.bool_(True)}})
    assert json.loads(file.read_text(), parse_constant=pytest.fail) == {
        "a": None, "b": [0.5, 3, None], "c": {"d": True},
    }  # fmt: skip


@pytest.mark.parametrize("content", ["", '{"state": "runn', "[]", "\0"])
def test_a_half_written_status_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "status.json").write_text(content)
    with pytest.raises(runs.RunError, match=r"status\.json: .*Restore it, or move it elsewhere"):
        runs.read_json(tmp_path / "status.json")


def test_empty_parameters_of_a_run_are_named(tmp_path: Path) -> None:
    run = runs.start("01_data_collection", namespace(tmp_path, run="a"))
    run.finish({"score": 1})
    (run.folder / "parameters.yaml").write_text("")
    with pytest.raises(runs.RunError, match=r"parameters\.yaml: empty"):
        runs.start("01_data_collection", namespace(tmp_path, run="a"))


def test_a_name_that_is_too_long_and_a_folder_that_is_a_file(tmp_path: Path) -> None:
    with pytest.raises(runs.RunError, match=r"Choose another run name|cannot be made"):
        runs.start("01_data_collection", namespace(tmp_path, run="x" * 300))
    (tmp_path / "file").write_text("")
    with pytest.raises(runs.RunError, match="cannot be made"):
        runs.start("01_data_collection", namespace(tmp_path / "file"))


def test_a_long_temporary_folder_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/tmp/" + "x" * 120)
    assert runs._socket_folder() == "/tmp"
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    assert runs._socket_folder() is None


def test_python3_is_this_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jupyter_client.kernelspec import KernelSpecManager

    other = tmp_path / "other" / "kernels" / "python3"
    other.mkdir(parents=True)
    (other / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "other"))
    assert KernelSpecManager().get_kernel_spec("python3").argv == ["/bin/false"]
    with runs._own_kernel(tmp_path / "own"):
        assert KernelSpecManager().get_kernel_spec("python3").argv[0] == sys.executable
    assert KernelSpecManager().get_kernel_spec("python3").argv == ["/bin/false"]


def test_parameters_that_are_given_as_a_batch_name_the_command(workspace: Path) -> None:
    file = workspace / "params" / "04_scaled_training" / "quickstart.yaml"
    with pytest.raises(ParameterError, match=r"scaled-ql run 04_scaled_training .*quickstart\.yaml") as error:
        batches.load_batch(file, {})
    assert "\n" not in str(error.value)


ASCII = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_a_path_that_the_locale_does_not_know_is_one_line(tmp_path: Path) -> None:
    done = command("run", "01_data_collection", "--outputs", tmp_path / "é", **ASCII)
    assert done.returncode == 1 and "Set PYTHONUTF8=1" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "é").exists()


def test_a_dataset_given_to_agents_is_opened_and_a_wrong_one_named(recording: Path, tmp_path: Path) -> None:
    given = {"run": "looked_at", "outputs": str(tmp_path), "agent": "x"}
    runs.check_inputs(parameters.check("07_agents", given | {"dataset": str(recording)}))
    with pytest.raises(runs.RunError, match=r"run looked_at: .*nowhere"):
        runs.check_inputs(parameters.check("07_agents", given | {"dataset": "nowhere"}))
