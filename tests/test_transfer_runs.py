"""Runs of `06_transfer` as a user starts them: killed, resumed, frozen, on a variant."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from scaled_ql import methods, parameters, runs, training, transfer
from scaled_ql.replay import open_replay

TINY = {
    "encoder": "nature_narrow", "hidden_sizes": [16], "num_atoms": 11, "games_per_batch": 2, "adam_epsilon": 1e-5,
    "subtract_mean_frames": True,
}  # fmt: skip
INITIAL = "04_scaled_training/pretrained"
QUICK = {"eval_episodes": 1, "eval_max_steps": 20, "video_steps": 0, "probe_moments": 0, "batch_size": 8}
QUICK |= {"initial": INITIAL, "built_like": INITIAL, "learning_rate": 0.01, "adam_epsilon": 1e-5}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An outputs folder with a finished pre-training run of two games: noise in place of what it learned."""
    folder = tmp_path_factory.mktemp("outputs")
    p = parameters.check("04_scaled_training", TINY | {"run": "pretrained"})
    architecture = {"hidden_sizes": (16,), "num_atoms": 11, "mean_frames": np.full((2, 84, 84), 90, np.float32)}
    network = methods.make(p).build(p.encoder, 2, 5, **architecture)
    _, state = training.init_state(network, training.make_optimizer())
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(lambda x: x + 0.02 * rng.normal(size=x.shape).astype(np.float32), state.params)
    where = folder / INITIAL
    checkpoints = training.Checkpoints(where / "checkpoints", training.about_run(p, ["Pong", "Qbert"], "of a test"))
    checkpoints.save(state._replace(step=jax.numpy.int32(20), params=noisy))
    checkpoints.close()
    (where / "status.json").write_text('{"state": "finished"}')
    return folder


@pytest.fixture(scope="module")
def transformers(outputs: Path) -> Path:
    """The same folder with a decision transformer, and an encoder of single frames, as fresh as they are made."""
    for name, values in {
        "dt": {"transformer": "tiny", "target_return": 1.0},
        "cpc": {"encoder": "nature_narrow"},
    }.items():
        p = parameters.check("04_scaled_training", values | {"method": name, "run": name, "sequence_length": 2})
        _, state = training.init_state(methods.make(p).build(p.encoder, 2, 5), training.make_optimizer())
        where = outputs / "04_scaled_training" / name
        checkpoints = training.Checkpoints(where / "checkpoints", training.about_run(p, ["Pong", "Qbert"], "of a test"))
        checkpoints.save(state._replace(step=jax.numpy.int32(20)))
        checkpoints.close()
        (where / "status.json").write_text('{"state": "finished"}')
        (where / "parameters.yaml").write_text(json.dumps(values | {"method": name, "sequence_length": 2}))
    return outputs


def command(outputs: Path, run: str, **values: object) -> list[str]:
    file = outputs / f"{run}.yaml"
    file.write_text(json.dumps(QUICK | values | {"run": run}))  # JSON is YAML
    return [sys.executable, "-m", "scaled_ql.command", "run", "06_transfer", str(file), "--outputs", str(outputs)]


def finish(started: list[str]) -> str:
    done = subprocess.run(started, cwd=runs.workspace(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kill_when(started: list[str], folder: Path, far_enough: int) -> None:
    """SIGKILL of the kernel once its status says that so much is done."""
    process = subprocess.Popen(started, cwd=runs.workspace(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while (status := runs.read_json(folder / "status.json")).get("done", 0) < far_enough:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.kill(status["pid"], signal.SIGKILL)
    process.wait(timeout=120)
    assert runs.read_json(folder / "status.json")["state"] == "running"


def state_of(folder: Path, step: int) -> dict:
    return ocp.StandardCheckpointer().restore((folder / "checkpoints" / str(step) / "state").absolute())


def rows(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith("per_second")} for row in found]


def test_offline_killed_and_resumed_is_bit_identical_and_what_is_frozen_stays(outputs: Path, recording: Path) -> None:
    values = {"game": "Breakout", "dataset": str(recording), "freeze": True, "num_steps": 200, "log_every": 5}
    values |= {"checkpoint_every": 10, "eval_every": 100}
    finish(command(outputs, "undisturbed", **values))
    undisturbed, stopped = (outputs / "06_transfer" / name for name in ("undisturbed", "stopped"))
    kill_when(command(outputs, "stopped", **values), stopped, 40)
    finish(command(outputs, "stopped", **values))
    assert rows(stopped) == rows(undisturbed)
    states = [state_of(folder, 200) for folder in (stopped, undisturbed)]
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(one, other)
    source = transfer.load(outputs / INITIAL)
    trained = training.flat_params(states[0]["params"])
    frozen = [path for path in trained if training.is_part(path, ("encoder", "embedding"))]
    assert len(frozen) == 7
    for path in frozen:
        np.testing.assert_array_equal(trained[path], source.params[path])
    assert (trained["hidden/0/kernel"].shape == source.params["hidden/0/kernel"].shape) and (
        trained["hidden/0/kernel"] != source.params["hidden/0/kernel"]
    ).any()
    assert trained["mean_frames"].shape == (1, 84, 84) and not (trained["mean_frames"] == 90).all()
    summary = runs.read_json(stopped / "summary.json")
    assert summary["pretrained"]["games"] == ["Pong", "Qbert"] and summary["pretrained"]["steps"] == 20
    assert summary["trained_parameters"] == summary["parameters"] - sum(source.params[path].size for path in frozen)
    assert sorted(file.name for file in (stopped / "evaluation").iterdir()) == ["step-100", "step-200"]
    assert (undisturbed / "transfer.csv").read_text().count("Scaled QL, frozen") == 1
    assert "No comparison: runs stopped, undisturbed have equal parameters" in (stopped / "run.html").read_text()
    more = {"initial": "06_transfer/stopped", "parts": "all but the head", "freeze": False, "num_steps": 5}
    finish(command(outputs, "again", **values | more | {"eval_every": 0}))  # what was transferred is transferred again
    assert "this is no transfer to an unseen game" in (outputs / "06_transfer" / "again" / "run.html").read_text()
    about = runs.read_json(outputs / "06_transfer" / "again" / "summary.json")["pretrained"]
    assert about["games"] == ["Breakout"] and about["encoder"] == "nature_narrow" and about["steps"] == 200


@pytest.mark.parametrize("initial, parts", [("dt", "all"), ("cpc", "encoder")])
def test_a_decision_transformer_is_fine_tuned_and_plays_with_its_memory(
    transformers: Path, recording: Path, initial: str, parts: str
) -> None:
    run, sources = (
        f"tuned_{initial}",
        {"initial": f"04_scaled_training/{initial}", "built_like": "04_scaled_training/dt"},
    )
    values = {"game": "Breakout", "dataset": str(recording), "parts": parts, "num_steps": 6, "log_every": 3}
    values |= {"checkpoint_every": 3, "video_steps": 10, "probe_moments": 64}
    finish(command(transformers, run, **sources, **values))
    folder = transformers / "06_transfer" / run
    assert [row["step"] for row in rows(folder)] == [3, 6] and "return_nll" in rows(folder)[0]
    summary = runs.read_json(folder / "summary.json")
    assert summary["pretrained"]["method"] == initial and summary["network"]["transformer"] == "tiny"
    assert summary["network"]["tokenizer"] == {"dt": "patches", "cpc": "nature_narrow"}[initial]
    assert np.isfinite(summary["games"]["Breakout"]["agent_return"]) and summary["probe"] is None
    assert (folder / "transfer.csv").read_text().count(f"{initial.upper()}, fine-tuned") == 1
    assert (folder / "videos" / "Breakout.mp4").stat().st_size > 0
    tuned = transfer.load(folder)
    assert tuned.about["method"] == "dt" and tuned.about["games"] == ["Breakout"]
    given = transfer.load(transformers / "04_scaled_training" / initial).params
    taken = [path for path in given if initial == "dt" or training.is_part(path, ["encoder"])]
    assert taken and all(tuned.params[path].shape == given[path].shape for path in taken)
    assert all((tuned.params[path] != given[path]).any() for path in taken), "it was trained further"


def test_online_on_a_variant_killed_and_resumed_loses_unfinished_episodes_only(outputs: Path) -> None:
    values = {"setting": "online", "game": "Freeway", "mode": 1, "num_transitions": 600, "environments": 2}
    values |= {"max_steps": 50, "min_history": 100, "update_period": 4, "epsilon_decay": 200, "capacity": 1000}
    values |= {"checkpoint_every": 5, "v_min": -10.0, "v_max": 10.0, "eval_every": 300}
    folder = outputs / "06_transfer" / "variant"
    started = command(outputs, "variant", **values)
    kill_when(started, folder, 200)
    before = open_replay(folder / "replay")
    logged = before.episodes("Freeway")
    frames = before.frames_at("Freeway", np.arange(before.num_transitions("Freeway")))
    assert 200 <= len(frames) < 600
    finish(started)
    after = open_replay(folder / "replay")
    assert after.num_transitions("Freeway") >= 600
    columns = ["start", "length", "episode_return"]
    assert after.episodes("Freeway")[columns].head(len(logged)).equals(logged[columns])
    np.testing.assert_array_equal(after.frames_at("Freeway", np.arange(len(frames))), frames)
    (manifest,) = after.manifests("Freeway")
    assert manifest["mode"] == 1 and manifest["sticky_actions"] == 0.25
    summary = runs.read_json(folder / "summary.json")
    assert summary["steps"] == 600 and summary["updates"] >= 125 and summary["dataset"] == "online"
    steps = [int(path.name.removeprefix("step-")) for path in (folder / "evaluation").iterdir()]
    assert 600 in steps and all(step % 300 == 0 for step in steps)
    assert "Freeway, mode 1, online" in (folder / "run.html").read_text()
