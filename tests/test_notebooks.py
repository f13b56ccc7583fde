"""The notebooks: committed clean, and executed by papermill on real ALE with tiny parameters, killed, resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import jax
import nbformat
import numpy as np
import orbax.checkpoint as ocp
import pandas as pd
import papermill
import pytest
import yaml
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from scaled_ql import evaluation, parameters, runs

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
TINY = {name: f"params/{name}/tiny.yaml" for name in parameters.NOTEBOOKS}


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_committed_clean_and_readable(file: Path) -> None:
    book = nbformat.read(file, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert all(
        len(cell.source.splitlines()) <= 20 for cell in code if "parameters" not in cell.metadata.get("tags", [])
    )
    assert book.cells[0].cell_type == "markdown"
    for word in ("**It needs**", "**It takes**"):
        assert word in book.cells[0].source
    assert not any("sys.path" in cell.source or "\nclass " in cell.source for cell in code)
    figures = [i for i, cell in enumerate(book.cells) if cell.source.startswith("plots.") and cell.source.endswith(";")]
    assert all("*How to read it*" in book.cells[i + 1].source for i in figures)
    assert file.stem in parameters.NOTEBOOKS


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny batch, run by the command once for all tests."""
    folder = tmp_path_factory.mktemp("outputs")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))  # one compilation for all runs
    done = run("params/batches/tiny.yaml", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def arguments(target: str, folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "scaled_ql.command", "run", target, *more, "--outputs", str(folder)]


def run(target: str, folder: Path, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        arguments(target, folder, *more), cwd=runs.workspace(), capture_output=True, text=True, timeout=850
    )


@pytest.mark.parametrize("notebook", parameters.NOTEBOOKS)
def test_every_notebook_runs_and_leaves_its_report(outputs: Path, notebook: str) -> None:
    folder = outputs / notebook / "tiny"
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    html = (folder / "run.html").read_text()
    assert len(html) < 10_000_000
    assert "data:image/png;base64" in html
    for word in ('src="http', 'href="http', "@import", "url(http"):
        assert word not in html
    assert html.count(str(outputs)) == 1, "a path of this machine, beside the parameter that asked for it"
    films = 2 if notebook == "04_scaled_training" else 0
    assert html.count("data:video/mp4;base64") == html.count('poster="data:image/jpeg;base64') == films


def test_the_summary_compares_agent_dataset_and_random_player(outputs: Path) -> None:
    summary = json.loads((outputs / "04_scaled_training" / "tiny" / "summary.json").read_text())
    assert list(summary["games"]) == ["Breakout", "Pong"]
    for row in summary["games"].values():
        assert row["agent_episodes"] == 2
        assert all(np.isfinite(row[name]) for name in ("random_return", "dataset_return", "agent_return"))


def test_a_narrow_start_is_one_and_belongs_to_the_checkpoint(outputs: Path) -> None:
    target = "04_scaled_training"
    done = run(target, outputs, TINY[target], "-p", "run", "narrow", "-p", "narrow_start", "true")
    assert done.returncode == 0, done.stderr
    first_entropies = {name: metrics(outputs / target / name)[0]["entropy"] for name in ("tiny", "narrow")}
    assert first_entropies["tiny"] == pytest.approx(np.log(51), abs=0.1)
    assert first_entropies["narrow"] == pytest.approx(np.log(np.sqrt(2 * np.pi * np.e) / 0.8), abs=0.1)  # bins of 0.8
    about = json.loads((outputs / target / "narrow" / "checkpoints" / "20" / "about" / "metadata").read_text())
    assert about["run"]["narrow_start"] is True


def test_finished_runs_are_recognised(outputs: Path, tmp_path: Path) -> None:
    steps = [
        {"notebook": name, "parameters": "tiny.yaml"} for name in parameters.NOTEBOOKS if name not in runs.GATHERING
    ]
    batch = tmp_path / "batch.yaml"
    batch.write_text(yaml.safe_dump({"steps": steps}))
    before = {
        file: file.stat().st_mtime_ns for file in outputs.rglob("*") if file.is_file() and ".lock" not in file.name
    }
    began = time.monotonic()
    done = run(str(batch), outputs)
    assert done.returncode == 0
    assert done.stdout.count("finished before") == len(steps)
    assert time.monotonic() - began < 60
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_a_finished_run_that_is_shown_again_has_its_curves(outputs: Path) -> None:
    target = "04_scaled_training"
    folder = outputs / target / "shown"
    shutil.copytree(outputs / target / "tiny", folder)
    for name in ("run.ipynb", "run.html", "summary.json", "status.json", "parameters.yaml"):
        (folder / name).unlink()
    done = run(target, outputs, TINY[target], "-p", "run", "shown")
    assert done.returncode == 0, done.stderr
    cells = nbformat.read(folder / "run.ipynb", as_version=4).cells
    (training,) = (cell for cell in cells if "for state, log in steps" in cell.source)
    assert any("image/png" in output.get("data", {}) for output in training.outputs)


def test_papermill_alone_works_from_any_folder(outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"run": "alone", "dataset": "01_data_collection/tiny/replay", "outputs": str(outputs)}
    source = runs.workspace() / "notebooks" / "03_data_exploration.ipynb"
    papermill.execute_notebook(source, tmp_path / "out.ipynb", values, progress_bar=False)
    assert json.loads((outputs / "03_data_exploration" / "alone" / "status.json").read_text())["state"] == "finished"
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean dataset"):
        papermill.execute_notebook(source, tmp_path / "out.ipynb", {"datasett": "x"}, progress_bar=False)


def test_two_runs_side_by_side_do_not_meet(outputs: Path) -> None:
    target = "03_data_exploration"
    both = [
        subprocess.Popen(
            arguments(target, outputs, TINY[target], "-p", "run", f"side-{number}"),
            cwd=runs.workspace(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in (1, 2)
    ]  # fmt: skip
    for process in both:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output


def restored(folder: Path) -> dict:
    """The state of step 400."""
    return ocp.StandardCheckpointer().restore((folder / "checkpoints" / "400" / "state").absolute())


def final_state(folder: Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restored(folder))]


def assert_same_arrays(left: Iterable[np.ndarray], right: Iterable[np.ndarray]) -> None:
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(one, other)


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith("per_second")} for row in rows]


def rows_of(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def kernel_of(folder: Path) -> int:
    return json.loads((folder / "status.json").read_text())["pid"]


def stop(command: list[str], folder: Path, log: Path, way: str) -> None:
    """Run until a row is added to the log, then end it in one of three ways."""
    before = rows_of(log)
    process = subprocess.Popen(
        command, cwd=runs.workspace(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        # What a shell starts in the background ignores Ctrl-C, and so would these tests' children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while rows_of(log) <= before:  # only a step beyond what the last kernel reached shows that this one trains
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.01)
    if way == "kill the kernel":
        assert runs.LARGE_PAGES.encode() in Path(f"/proc/{kernel_of(folder)}/environ").read_bytes()
    number = signal.SIGINT if way == "interrupt" else signal.SIGKILL
    os.kill(kernel_of(folder) if way == "kill the kernel" else process.pid, number)
    _, stderr = process.communicate(timeout=120)
    assert json.loads((folder / "status.json").read_text())["state"] != "finished"
    if way == "interrupt":
        assert process.returncode == 130
        assert "resumes from here" in stderr


def test_a_run_stopped_in_three_ways_resumes_bit_identically(outputs: Path) -> None:
    """SIGKILL of the runner, Ctrl-C, SIGKILL of the kernel, each in the middle of training; then to its end."""
    target = "04_scaled_training"
    more = ["-p", "num_steps", "400", "-p", "eval_max_steps", "5", "-p", "video_steps", "2"]
    done = run(target, outputs, TINY[target], "-p", "run", "undisturbed", *more)
    assert done.returncode == 0, done.stderr
    undisturbed, stopped = outputs / target / "undisturbed", outputs / target / "stopped"
    command = arguments(target, outputs, TINY[target], "-p", "run", "stopped", *more)
    for way in ("kill the runner", "interrupt", "kill the kernel"):
        stop(command, stopped, stopped / "metrics.jsonl", way)
    done = run(target, outputs, TINY[target], "-p", "run", "stopped", *more)
    assert done.returncode == 0, done.stderr
    assert metrics(stopped) == metrics(undisturbed)
    assert_same_arrays(final_state(stopped), final_state(undisturbed))


def test_bcq_stopped_in_both_phases_resumes_bit_identically(outputs: Path) -> None:
    """The behaviour policy comes first, in a folder of its own; the Q-network has it as it then is."""
    target = "04_scaled_training"
    more = ["-p", "method", "bcq", "-p", "num_steps", "400", "-p", "eval_max_steps", "5", "-p", "video_steps", "2"]
    done = run(target, outputs, TINY[target], "-p", "run", "bcq", *more)
    assert done.returncode == 0, done.stderr
    undisturbed, stopped = outputs / target / "bcq", outputs / target / "bcq-stopped"
    command = arguments(target, outputs, TINY[target], "-p", "run", "bcq-stopped", *more)
    stop(command, stopped, stopped / "behaviour" / "metrics.jsonl", "kill the kernel")
    assert not (stopped / "metrics.jsonl").exists()
    stop(command, stopped, stopped / "metrics.jsonl", "interrupt")
    done = run(target, outputs, TINY[target], "-p", "run", "bcq-stopped", *more)
    assert done.returncode == 0, done.stderr
    for folder in ("", "behaviour"):
        assert metrics(stopped / folder) == metrics(undisturbed / folder)
        assert_same_arrays(final_state(stopped / folder), final_state(undisturbed / folder))
    both, policy = restored(undisturbed), restored(undisturbed / "behaviour")["params"]
    for tree in ("params", "target_params"):
        assert_same_arrays(jax.tree.leaves(both[tree]["behaviour"]), jax.tree.leaves(policy))
    first, last = (metrics(undisturbed / "behaviour")[row]["nll"] for row in (0, -1))
    assert last < first, "the policy was trained"


LOSS = """
def huber(outputs_t, action_t, reward, discount, target_outputs_tn, selector_q_tn, allowed, atoms):
    \"\"\"Huber's loss of the expected value.\"\"\"
    q, target_q = losses.expected_q(outputs_t, atoms), losses.expected_q(target_outputs_tn, atoms)
    best = losses.greedy_action(selector_q_tn, allowed)
    target = jax.lax.stop_gradient(reward + discount * target_q[best])
    return optax.losses.huber_loss(q[action_t], target)
"""


def test_a_loss_of_ones_own_in_a_cell_is_trained_logged_checkpointed_plotted_and_evaluated(
    outputs: Path, tmp_path: Path
) -> None:
    book = nbformat.read(runs.workspace() / "notebooks" / "04_scaled_training.ipynb", as_version=4)
    (start,) = (cell for cell in book.cells if "method = methods.make(p)" in cell.source)
    start.source = start.source.replace("methods.make(p)", "methods.make(p, td_loss=huber)")
    cell = nbformat.v4.new_code_cell("import jax\nimport optax\n\nfrom scaled_ql import losses\n\n" + LOSS)
    book.cells.insert(book.cells.index(start), cell)
    nbformat.write(book, tmp_path / "own.ipynb")
    values = parameters.load(runs.workspace() / TINY["04_scaled_training"]) | {"run": "huber", "outputs": str(outputs)}
    papermill.execute_notebook(tmp_path / "own.ipynb", tmp_path / "out.ipynb", values, progress_bar=False)
    folder = outputs / "04_scaled_training" / "huber"
    assert [row["step"] for row in metrics(folder)] == [5, 10, 15, 20]
    c51 = metrics(outputs / "04_scaled_training" / "tiny")
    assert metrics(folder)[0].keys() == c51[0].keys() and metrics(folder)[0]["td_loss"] < 0.5 < c51[0]["td_loss"]
    assert (folder / "checkpoints" / "20").is_dir()
    summary = json.loads((folder / "summary.json").read_text())
    assert all(np.isfinite(row["agent_return"]) for row in summary["games"].values())
    assert summary["as_parameters_say"] is False
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    (loop,) = (cell for cell in cells if "for state, log in steps" in cell.source)
    assert any("image/png" in output.get("data", {}) for output in loop.outputs)
    assert any(
        "huber" in output.get("data", {}).get("text/markdown", "")
        for cell in cells
        for output in cell.get("outputs", ())
    )


def test_the_score_of_an_iteration_is_measured_once(outputs: Path) -> None:
    target, more = "04_scaled_training", ["-p", "run", "iterations", "-p", "eval_every", "10"]
    done = run(target, outputs, TINY[target], *more)
    assert done.returncode == 0, done.stderr
    folder = outputs / target / "iterations"
    curve = evaluation.score_curve(folder / "evaluation")
    assert list(curve["step"]) == [10, 20] * 2 and list(curve["game"]) == ["Breakout"] * 2 + ["Pong"] * 2
    summary = json.loads((folder / "summary.json").read_text())["games"]
    assert list(curve["agent_return"][1::2]) == [summary[game]["agent_return"] for game in ("Breakout", "Pong")]
    # Stopped after step 10 and before 20: what was measured by then is marked, what was not is deleted.
    marked = pd.read_csv(folder / "evaluation" / "step-10" / "Pong.csv").assign(episode_return=77.0)
    marked.to_csv(folder / "evaluation" / "step-10" / "Pong.csv", index=False)
    for name in ("checkpoints/20", "evaluation/step-20"):
        shutil.rmtree(folder / name)
    for name in ("status.json", "summary.json", "run.html"):
        (folder / name).unlink()
    done = run(target, outputs, TINY[target], *more)
    assert done.returncode == 0, done.stderr
    again = evaluation.score_curve(folder / "evaluation")
    assert list(again["agent_return"]) == [*curve["agent_return"][:2], 77, curve["agent_return"][3]]


def test_the_training_cell_goes_on_after_an_interrupt(recording: Path, tmp_path: Path) -> None:
    """As in JupyterLab: the cell is interrupted, and executed again in the same kernel."""
    values = parameters.load(runs.workspace() / TINY["04_scaled_training"])
    values |= {"dataset": str(recording), "outputs": str(tmp_path), "num_steps": 400, "log_every": 1, "run": "again"}
    book = nbformat.read(runs.workspace() / "notebooks" / "04_scaled_training.ipynb", as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    (training,) = (number for number, cell in enumerate(code) if "trainer.steps(" in cell.source)
    given = nbformat.v4.new_code_cell("\n".join(f"{name} = {value!r}" for name, value in values.items()))
    book.cells = [code[0], given, *code[1 : training + 1]]
    client = NotebookClient(book, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    log = tmp_path / "04_scaled_training" / "again" / "metrics.jsonl"
    with client.setup_kernel():
        for number, cell in enumerate(book.cells[:-1]):
            client.execute_cell(cell, number)

        def interrupt() -> None:
            while rows_of(log) < 3:
                time.sleep(0.01)
            os.kill(kernel_of(log.parent), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
            client.execute_cell(book.cells[-1], len(book.cells) - 1)
        thread.join()
        assert json.loads((log.parent / "status.json").read_text())["state"] == "interrupted"
        done = rows_of(log)
        # A cell of its own: nbclient cannot update the display of a cell whose outputs it has cleared. JupyterLab can.
        book.cells.append(nbformat.v4.new_code_cell(book.cells[-1].source))
        client.execute_cell(book.cells[-1], len(book.cells) - 1)
    assert 3 <= done < 400, "it was interrupted in the middle"
    assert [row["step"] for row in metrics(log.parent)] == list(range(1, 401))
    assert len(final_state(log.parent)) > 0
