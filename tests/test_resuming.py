"""Training that was stopped: killed, interrupted, and resumed to the very numbers of an undisturbed run."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import jax
import nbformat
import numpy as np
import orbax.checkpoint as ocp
import pandas as pd
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from running import TINY, arguments, metrics, opening, run

from scaled_ql import evaluation, parameters, runs

# Programs as users have them, not as `conftest` has tests compile them.
AS_USERS = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}


def restored(folder: Path) -> dict:
    """The state of step 200."""
    return ocp.StandardCheckpointer().restore((folder / "checkpoints" / "200" / "state").absolute())


def final_state(folder: Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restored(folder))]


def assert_same_arrays(left: Iterable[np.ndarray], right: Iterable[np.ndarray]) -> None:
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(one, other)


def rows_of(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def kernel_of(folder: Path) -> int:
    return json.loads((folder / "status.json").read_text())["pid"]


def stop(command: list[str], folder: Path, log: Path, way: str) -> None:
    """Run until a row is added to the log, then end it in one of two ways; of a third, see `test_transfer_runs`."""
    while runs.is_locked(folder / ".lock"):  # a kernel whose runner was killed takes a moment to notice
        time.sleep(0.01)
    before = rows_of(log)
    process = subprocess.Popen(
        command, env=os.environ | AS_USERS, cwd=runs.workspace(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores Ctrl-C, and so would these tests' children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while rows_of(log) <= before:  # only a step beyond what the last kernel reached shows that this one trains
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.01)
    assert runs.LARGE_PAGES.encode() in Path(f"/proc/{kernel_of(folder)}/environ").read_bytes()
    process.send_signal(signal.SIGINT if way == "interrupt" else signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert json.loads((folder / "status.json").read_text())["state"] != "finished"
    if way == "interrupt":
        assert process.returncode == 130
        assert "resumes from here" in stderr


def test_a_run_stopped_in_two_ways_resumes_bit_identically_and_measures_each_score_once(
    recording: Path, tmp_path: Path
) -> None:
    """SIGKILL of the runner, then Ctrl-C, each in the middle of training; then to its end.

    Of BCQ, whose behaviour policy comes first, in a folder of its own; the Q-network has it as it then is.
    """
    target = "04_scaled_training"
    more = ["-p", "method", "bcq", "-p", "num_steps", "200", "-p", "eval_every", "100", "-p", "checkpoint_every", "20"]
    more += ["-p", "eval_episodes", "1", "-p", "eval_max_steps", "5", "-p", "video_steps", "0"]
    more += ["-p", "steps_per_dispatch", "5", "-p", "sampling_processes", "1", "-p", "deterministic", "true"]
    more += ["-p", "dataset", str(recording)]
    undisturbed, stopped = tmp_path / target / "undisturbed", tmp_path / target / "stopped"
    done = run(target, tmp_path, TINY[target], "-p", "run", "undisturbed", *more, **AS_USERS)
    assert done.returncode == 0, done.stderr
    command = arguments(target, tmp_path, TINY[target], "-p", "run", "stopped", *more)
    stop(command, stopped, stopped / "behaviour" / "metrics.jsonl", "kill the runner")
    assert not (stopped / "metrics.jsonl").exists()
    stop(command, stopped, stopped / "metrics.jsonl", "interrupt")
    # As if it had been killed after step 100 was evaluated: what was measured by then is marked.
    curve = evaluation.score_curve(undisturbed / "evaluation")
    shutil.copytree(undisturbed / "evaluation" / "step-100", stopped / "evaluation" / "step-100", dirs_exist_ok=True)
    marked = pd.read_csv(stopped / "evaluation" / "step-100" / "Freeway.csv").assign(episode_return=77.0)
    marked.to_csv(stopped / "evaluation" / "step-100" / "Freeway.csv", index=False)
    done = run(target, tmp_path, TINY[target], "-p", "run", "stopped", *more, **AS_USERS)
    assert done.returncode == 0, done.stderr
    for folder in ("", "behaviour"):
        assert metrics(stopped / folder) == metrics(undisturbed / folder)
        assert_same_arrays(final_state(stopped / folder), final_state(undisturbed / folder))
    both, policy = restored(undisturbed), restored(undisturbed / "behaviour")["params"]
    for tree in ("params", "target_params"):
        assert_same_arrays(jax.tree.leaves(both[tree]["behaviour"]), jax.tree.leaves(policy))
    first, last = (metrics(undisturbed / "behaviour")[row]["nll"] for row in (0, -1))
    assert last < first, "the policy was trained"
    assert list(curve["step"]) == [100, 200] * 2 and list(curve["game"]) == ["Breakout"] * 2 + ["Freeway"] * 2
    summary = json.loads((undisturbed / "summary.json").read_text())["games"]
    assert list(curve["agent_return"][1::2]) == [summary[game]["agent_return"] for game in ("Breakout", "Freeway")]
    again = evaluation.score_curve(stopped / "evaluation")
    assert list(again["agent_return"]) == [*curve["agent_return"][:2], 77, curve["agent_return"][3]]


def test_the_training_cell_goes_on_after_an_interrupt_and_shows_its_curves_again(
    recording: Path, tmp_path: Path
) -> None:
    """As in JupyterLab: the cell is interrupted, and executed again in the same kernel; and again when all is done."""
    values = parameters.load(runs.workspace() / TINY["04_scaled_training"])
    values |= {"dataset": str(recording), "outputs": str(tmp_path), "num_steps": 200, "log_every": 1, "run": "again"}
    book = opening("04_scaled_training", "trainer.steps(", values)
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
        # Cells of their own: nbclient cannot update the display of a cell whose outputs it has cleared. JupyterLab can.
        for _ in range(2):
            book.cells.append(nbformat.v4.new_code_cell(book.cells[-1].source))
            client.execute_cell(book.cells[-1], len(book.cells) - 1)
    assert 3 <= done < 200, "it was interrupted in the middle"
    assert [row["step"] for row in metrics(log.parent)] == list(range(1, 201))
    assert len(final_state(log.parent)) > 0
    for cell in book.cells[-2:]:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), "its curves"
