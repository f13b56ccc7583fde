"""Runs of `06_transfer` as a user starts them: from a masked autoencoder, killed, resumed, frozen, on a variant."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from running import arguments, metrics, run
from written import write_run

from scaled_ql import methods, parameters, runs, training, transfer
from scaled_ql.replay import open_replay

TARGET, PRETRAINED = "06_transfer", "04_scaled_training/tiny_mae"
QUICK = {"eval_episodes": 1, "eval_max_steps": 20, "video_steps": 0, "probe_moments": 0, "learning_rate": 1e-3}
OFFLINE = QUICK | {"game": "Breakout", "num_steps": 120, "eval_every": 60}
OFFLINE |= {"deterministic": True, "steps_per_dispatch": 2}
ONLINE = QUICK | {"num_transitions": 600, "max_steps": 50, "update_period": 4, "epsilon_decay": 200, "eval_every": 300}


def words(file: str, **values: object) -> list[str]:
    """A file of parameters and what differs from it, for the command; JSON is YAML."""
    return [file, *(word for name, value in values.items() for word in ("-p", name, json.dumps(value)))]


def finish(outputs: Path, target: str, *more: str) -> None:
    done = run(target, outputs, *more)
    assert done.returncode == 0, done.stdout + done.stderr


def kill_when(outputs: Path, folder: Path, far_enough: int, *more: str) -> None:
    """SIGKILL of the kernel once its status says that so much is done."""
    process = subprocess.Popen(
        arguments(TARGET, outputs, *more), cwd=runs.workspace(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while (status := runs.read_json(folder / "status.json")).get("done", 0) < far_enough:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.kill(status["pid"], signal.SIGKILL)
    process.wait(timeout=120)
    assert runs.read_json(folder / "status.json")["state"] == "running"


def state_of(folder: Path, step: int) -> dict:
    return ocp.StandardCheckpointer().restore((folder / "checkpoints" / str(step) / "state").absolute())


@pytest.fixture(scope="module")
def outputs(recording: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An outputs folder with a masked autoencoder that was trained on two games."""
    folder = tmp_path_factory.mktemp("outputs")
    file = "params/04_scaled_training/tiny_mae.yaml"
    finish(folder, "04_scaled_training", *words(file, dataset=str(recording), subtract_mean_frames=True))
    return folder


@pytest.fixture(scope="module")
def transformers(outputs: Path, recording: Path) -> Path:
    """The same folder with a decision transformer, as fresh as it is made, and an encoder of single frames."""
    values = {"method": "dt", "run": "tiny_dt", "transformer": "tiny", "target_return": 1.0, "sequence_length": 2}
    p = parameters.check("04_scaled_training", values)
    _, state = training.init_state(methods.make(p).build(p.encoder, 2, 5), training.make_optimizer())
    where = outputs / "04_scaled_training" / "tiny_dt"
    checkpoints = training.Checkpoints(where / "checkpoints", training.about_run(p, ["Pong", "Qbert"], "of a test"))
    checkpoints.save(state._replace(step=jax.numpy.int32(20)))
    checkpoints.close()
    (where / "status.json").write_text('{"state": "finished"}')
    (where / "parameters.yaml").write_text(json.dumps(values))
    file = "params/04_scaled_training/tiny_cpc.yaml"
    finish(outputs, "04_scaled_training", *words(file, dataset=str(recording)))
    return outputs


@pytest.fixture(scope="module")
def offline(recording: Path) -> list[str]:
    """Of a Q-network on the frozen encoder."""
    return words("params/06_transfer/tiny_mae.yaml", **OFFLINE, dataset=str(recording))


@pytest.fixture(scope="module")
def undisturbed(outputs: Path, offline: list[str]) -> Path:
    finish(outputs, TARGET, *offline, "-p", "run", "undisturbed")
    return outputs / TARGET / "undisturbed"


@pytest.mark.parametrize("method", ["mae", "cpc"])
def test_what_cannot_play_says_so(transformers: Path, method: str) -> None:
    folder = transformers / "04_scaled_training" / f"tiny_{method}"
    said = f"The network of <code>{method}</code> cannot play: nothing is evaluated and nothing is filmed in this run."
    text = (folder / "run.html").read_text()
    assert text.count(said) == 2, "at the beginning, and where scores would be"
    assert not (folder / "evaluation").exists() and runs.read_json(folder / "summary.json")["games"] == {}
    assert [row["step"] for row in metrics(folder)] == [5, 10, 15, 20]
    shown = {"mae": ("error of the hidden patches", "error"), "cpc": ("next frame is the likeliest", "accuracy")}
    title, name = shown[method]
    value = np.mean([row[name] for row in metrics(folder)])
    assert text.count(f"{title} <strong>{value:.3g}</strong>") == 2, "at the report's top and in its place"
    assert text.count('alt="Frames') == (2 if method == "mae" else 0), "pictures, likewise"


@pytest.mark.parametrize("initial, parts", [("dt", "all"), ("cpc", "encoder")])
def test_a_decision_transformer_is_fine_tuned_and_plays_with_its_memory(
    transformers: Path, recording: Path, initial: str, parts: str
) -> None:
    values = QUICK | {"game": "Breakout", "dataset": str(recording), "num_steps": 6, "log_every": 3}
    values |= {"checkpoint_every": 3, "video_steps": 10, "probe_moments": 64}
    finish(transformers, TARGET, *words(f"params/06_transfer/tiny_{initial}.yaml", **values))
    folder = transformers / TARGET / f"tiny_{initial}"
    assert [row["step"] for row in metrics(folder)] == [3, 6] and "return_nll" in metrics(folder)[0]
    summary = runs.read_json(folder / "summary.json")
    assert summary["pretrained"]["method"] == initial and summary["network"]["transformer"] == "tiny"
    assert summary["network"]["tokenizer"] == {"dt": "patches", "cpc": "nature_narrow"}[initial]
    assert np.isfinite(summary["games"]["Breakout"]["agent_return"]) and summary["probe"] is None
    assert (folder / "transfer.csv").read_text().count(f"{initial.upper()}, fine-tuned") == 1
    assert (folder / "videos" / "Breakout.mp4").stat().st_size > 0
    tuned = transfer.load(folder)
    assert tuned.about["method"] == "dt" and tuned.about["games"] == ["Breakout"]
    given = transfer.load(transformers / "04_scaled_training" / f"tiny_{initial}").params
    taken = [path for path in given if parts == "all" or training.is_part(path, ["encoder"])]
    assert taken and all(tuned.params[path].shape == given[path].shape for path in taken)
    assert all((tuned.params[path] != given[path]).any() for path in taken), "it was trained further"


def test_online_on_a_variant_killed_and_resumed_keeps_what_was_on_disk(tmp_path: Path) -> None:
    write_run(tmp_path / "04_scaled_training" / "tiny", ["Pong", "Qbert"])
    (tmp_path / "04_scaled_training" / "tiny" / "status.json").write_text('{"state": "finished"}')
    folder = tmp_path / TARGET / "variant"
    online = words("params/06_transfer/tiny_online.yaml", **ONLINE, run="variant")
    kill_when(tmp_path, folder, 200, *online)
    before = open_replay(folder / "replay")
    logged = before.episodes("Breakout")
    frames = before.frames_at("Breakout", np.arange(before.num_transitions("Breakout")))
    assert 200 <= len(frames) < 600
    finish(tmp_path, TARGET, *online)
    after = open_replay(folder / "replay")
    assert after.num_transitions("Breakout") >= 600
    columns = ["start", "length", "episode_return"]
    assert after.episodes("Breakout")[columns].head(len(logged)).equals(logged[columns])
    np.testing.assert_array_equal(after.frames_at("Breakout", np.arange(len(frames))), frames)
    (manifest,) = after.manifests("Breakout")
    assert manifest["mode"] == 12 and manifest["sticky_actions"] == 0.25
    summary = runs.read_json(folder / "summary.json")
    assert summary["steps"] == 600 and summary["updates"] >= 125 and summary["dataset"] == "online"
    assert summary["pretrained"]["games"] == ["Pong", "Qbert"] and summary["pretrained"]["steps"] == 20
    steps = [int(path.name.removeprefix("step-")) for path in (folder / "evaluation").iterdir()]
    assert 600 in steps and all(step % 300 == 0 for step in steps)
    assert "Breakout, mode 12, online" in (folder / "run.html").read_text()
