"""The notebooks: committed clean, and executed by papermill on real ALE with tiny parameters."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import yaml
from running import TINY, arguments, metrics, run

from scaled_ql import parameters, runs

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


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
    done = run("params/batches/tiny.yaml", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("file", TINY.values())
def test_every_notebook_runs_and_leaves_its_report(outputs: Path, file: str) -> None:
    notebook, run = Path(file).parts[1], Path(file).stem
    folder = outputs / notebook / run
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    html = (folder / "run.html").read_text()
    assert len(html) < 10_000_000
    assert "data:image/png;base64" in html
    for word in ('src="http', 'href="http', "@import", "url(http"):
        assert word not in html
    assert html.count(str(outputs)) == 1, "a path of this machine, beside the parameter that asked for it"
    films = {"04_scaled_training": 2, "06_transfer": 1}.get(notebook, 0)
    assert html.count("data:video/mp4;base64") == html.count('poster="data:image/jpeg;base64') == films


def test_the_summary_compares_agent_dataset_and_random_player(outputs: Path) -> None:
    summary = json.loads((outputs / "04_scaled_training" / "tiny" / "summary.json").read_text())
    assert list(summary["games"]) == ["Breakout", "Pong"]
    for row in summary["games"].values():
        assert row["agent_episodes"] == 2
        assert all(np.isfinite(row[name]) for name in ("random_return", "dataset_return", "agent_return"))


def test_finished_runs_are_recognised(outputs: Path, tmp_path: Path) -> None:
    steps = [
        {"notebook": name, "parameters": Path(file).name} for name, file in TINY.items() if name not in runs.GATHERING
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


ASCII = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_two_runs_side_by_side_do_not_meet_and_a_locale_of_ascii_changes_nothing(outputs: Path) -> None:
    target = "03_data_exploration"
    both = [
        subprocess.Popen(
            arguments(target, outputs, TINY[target], "-p", "run", f"side-{number}"), env={**os.environ, **locale},
            cwd=runs.workspace(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number, locale in ((1, {}), (2, ASCII))
    ]  # fmt: skip
    for process in both:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    for number in (1, 2):
        for file in ("run.html", "run.ipynb"):
            assert "84 × 84" in (outputs / target / f"side-{number}" / file).read_text(encoding="utf-8")
    again = run(target, outputs, TINY[target], "-p", "run", "side-2", **ASCII)
    assert again.returncode == 0 and "finished before" in again.stdout


SRUN = """#!{python}
import itertools, os, subprocess, sys

words = list(itertools.takewhile(lambda word: word.startswith("--"), sys.argv[1:]))
options = dict(word[2:].split("=") for word in words)
nodes = int(options["nodes"])
tasks = nodes * int(options["ntasks-per-node"])
job = {{"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(tasks)}}
job |= {{"SLURM_STEP_NUM_NODES": str(nodes), "SLURM_LOCALID": "0"}}
command = sys.argv[1 + len(words):]
started = [subprocess.Popen(command, env=os.environ | job | {{"SLURM_PROCID": str(n)}}) for n in range(tasks)]
sys.exit(max(process.wait() for process in started))
"""


def test_the_readmes_slurm_line_trains_on_two_nodes_as_one_process_does(
    outputs: Path, tmp_path: Path, workspace: Path
) -> None:
    """On two processes of this machine, which share the network's state; the first of them evaluates and reports."""
    srun, target = tmp_path / "srun", "04_scaled_training"
    srun.write_text(SRUN.format(python=sys.executable))
    srun.chmod(0o755)
    (line,) = re.findall(r"^srun .+$", (workspace / "README.md").read_text(), re.MULTILINE)
    words = [word for word in shlex.split(line) if word != ".venv/bin/scaled-ql"]
    options, words = words[: words.index("run")], words[words.index("run") :]
    assert words[1:] == [target, f"params/{target}/forty_games.yaml", "-p", "distributed", "true"]
    more = ["-p", "distributed", "true", "-p", "shard_parameters", "true", "-p", "video_steps", "0", "-p", "run", "two"]
    done = subprocess.run(
        [*options, *arguments(target, outputs, TINY[target], *more)], cwd=workspace, capture_output=True, text=True,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (outputs / target / name for name in ("tiny", "two"))
    assert [row["step"] for row in metrics(two)] == [5, 10, 15, 20]
    for row, same in zip(metrics(two), metrics(one), strict=True):
        assert row == pytest.approx(same, rel=1e-3) and row["loss"] == pytest.approx(same["loss"], rel=1e-5)
    assert json.loads((two / "provenance.json").read_text())["devices"] == ["cpu:cpu", "cpu:cpu"]
    for folder in (two, two / "processes" / "1"):
        assert json.loads((folder / "status.json").read_text())["state"] == "finished"
        assert (folder / "run.html").exists() == (folder == two)


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
    """It also starts narrow, and its checkpoint says so."""
    book = nbformat.read(runs.workspace() / "notebooks" / "04_scaled_training.ipynb", as_version=4)
    (start,) = (cell for cell in book.cells if "method = methods.make(p)" in cell.source)
    start.source = start.source.replace("methods.make(p)", "methods.make(p, td_loss=huber)")
    cell = nbformat.v4.new_code_cell("import jax\nimport optax\n\nfrom scaled_ql import losses\n\n" + LOSS)
    book.cells.insert(book.cells.index(start), cell)
    nbformat.write(book, tmp_path / "own.ipynb")
    values = parameters.load(runs.workspace() / TINY["04_scaled_training"])
    values |= {"run": "huber", "outputs": str(outputs), "narrow_start": True}
    papermill.execute_notebook(tmp_path / "own.ipynb", tmp_path / "out.ipynb", values, progress_bar=False)
    folder = outputs / "04_scaled_training" / "huber"
    assert [row["step"] for row in metrics(folder)] == [5, 10, 15, 20]
    c51 = metrics(outputs / "04_scaled_training" / "tiny")
    assert metrics(folder)[0].keys() == c51[0].keys() and metrics(folder)[0]["td_loss"] < 0.5 < c51[0]["td_loss"]
    assert c51[0]["entropy"] == pytest.approx(np.log(51), abs=0.1)
    assert metrics(folder)[0]["entropy"] == pytest.approx(
        np.log(np.sqrt(2 * np.pi * np.e) / 0.8), abs=0.1
    )  # bins of 0.8
    about = json.loads((folder / "checkpoints" / "20" / "about" / "metadata").read_text())
    assert about["run"]["narrow_start"] is True
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
