"""Exported agents: opened like their runs, and computed by their cards' code without this package."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from click.testing import CliRunner
from running import opening
from written import write_online_run, write_run

from scaled_ql import defaults, documents, episodes, explore, games, model_card, parameters, runs, weights
from scaled_ql.command import main
from scaled_ql.model_card import export
from scaled_ql.runs import RunError
from scaled_ql.training import CheckpointError

GAMES = ["Breakout", "Pong"]
STACKS = np.random.default_rng(1).integers(0, 256, (3, 4, 84, 84), np.uint8)
RUNS = {
    "shared": {"heads": "shared", "embedding": "attention", "hidden_sizes": [8, 6], "normalize_features": False},
    "nature": {"encoder": "nature", "embedding": "sum", "head": "mse", "subtract_mean_frames": False},
    "bc": {"method": "bc", "embedding": "none"},
    "resnet": {"encoder": "resnet34"},
    "bottleneck": {"encoder": "resnet50", "subtract_mean_frames": False},
    "impala": {"encoder": "impala_x4"},
}
SMALL = {  # in place of the paper's: blocks with and without shortcuts and strides
    "resnet34": ("resnet_basic", (2, 1), 4), "resnet50": ("resnet_bottleneck", (2, 1), 4), "impala_x4": ("impala", 1),
}  # fmt: skip
WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(("scaled_ql", "jax", "flax")))  # importing one raises
exec(open("card.py").read())
stacks = np.load("stacks.npy")
np.savez("values.npz", **{game: action_values(stacks, game) for game in config["games"]})
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        for name, family in SMALL.items():
            patch.setitem(defaults.ENCODERS, name, family)
        write_run(folder / "04_scaled_training" / "c51", GAMES)
        yield folder


def by_the_card(folder: Path) -> dict[str, np.ndarray]:
    """What the card's code computes in an interpreter that cannot import this package."""
    (code,) = re.findall(r"```python\n(import json.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    (folder / "card.py").write_text(code)
    np.save(folder / "stacks.npy", STACKS)
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(np.load(folder / "values.npz"))


@pytest.mark.parametrize("name", ["c51", *RUNS, "online", "online_resnet"])
def test_an_exported_agent_has_the_runs_values_with_this_package_and_without(
    outputs: Path, tmp_path: Path, name: str
) -> None:
    run = f"02_online_agents/{name}" if name.startswith("online") else f"04_scaled_training/{name}"
    if name.startswith("online"):
        write_online_run(outputs / run, GAMES, encoder="nature_narrow" if name == "online" else "resnet34")
    elif name in RUNS:
        write_run(outputs / run, GAMES, **RUNS[name])
    done = CliRunner().invoke(main, ["export", "model", run, str(tmp_path / "a/model"), "--outputs", str(outputs)])
    assert done.exit_code == 0, done.output
    agent, computed = explore.load_agent(run, outputs=outputs), by_the_card(tmp_path / "a/model")
    assert list(computed) == GAMES
    for game, values in computed.items():
        expected = agent.look(game, STACKS).values
        assert np.ptp(expected) > 1e-3
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
    if name in ("c51", "online"):
        exported = explore.load_agent(tmp_path / "a/model")
        for part in ("name", "step", "games", "protocol", "values_name", "discount", "dataset", "view"):
            assert getattr(agent, part) == getattr(exported, part)
        np.testing.assert_array_equal(exported.look("Pong", STACKS).values, agent.look("Pong", STACKS).values)


def test_what_a_card_says(outputs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(outputs / "04_scaled_training" / "c51", tmp_path / "04_scaled_training" / "c51")
    values = documents.load(run / "parameters.yaml")
    values |= {"learning_rate": 1e-5, "outputs": str(outputs), "view": "1e3", "hidden_sizes": [8]}
    (run / "parameters.yaml").write_text(documents.dump(values))
    (run / "evaluation/step-20").mkdir(parents=True)
    played = pd.DataFrame({"episode_return": [1.0, 2.0, 6.0, 7.0], "truncated": [False, False, False, True]})
    played.to_csv(run / "evaluation/step-20/Pong.csv", index=False)
    runs.write_json(run / "provenance.json", {"git_commit": "abc123", "git_dirty": True, "dataset": "d00d"})
    runs.write_json(run / "summary.json", {"games": {"Pong": {"dataset_return": 2.5}}, "as_parameters_say": False})
    card = (export(run, tmp_path / "model") / "README.md").read_text()
    assert "| Pong | 4 | 1.5 to 6.5 | 4 | 25% | 2.5 | – |" in card
    assert "| Breakout | – | – | – | – | – | – |" in card
    assert "0.1 of the moves random, sticky actions 0, at most 60 steps" in card
    for words in (
        "commit abc123, with changes",
        "contents' id d00d",
        "a loss of its own",
        "**Seed**: 0",
        "- Pong: NOOP",
    ):
        assert words in card
    assert str(outputs) not in card + (tmp_path / "model" / "config.json").read_text(), "a path of this machine"
    (line,) = re.findall(r"^scaled-ql run 04.*$", card, re.MULTILINE)
    words = shlex.split(line)[3:]
    given = {name: documents.parse(value) for name, value in zip(words[1::3], words[2::3])}
    assert parameters.check("04_scaled_training", given).model_dump() == values | {"outputs": ""}


def test_the_card_of_a_transferred_agent_says_from_where_and_its_variant(tmp_path: Path) -> None:
    run = tmp_path / "06_transfer" / "variant"
    write_run(run, ["Breakout"])
    values = {
        "run": "variant",
        "game": "Breakout",
        "mode": 12,
        "setting": "online",
        "initial": "04_scaled_training/a b",
    }
    p = parameters.check("06_transfer", values | {"v_min": -1.0, "v_max": 3.0, "freeze": True})
    (run / "parameters.yaml").write_text(documents.dump(p.model_dump()))
    card = (export(run, tmp_path / "model") / "README.md").read_text()
    for words in ("encoder + embedding from 04_scaled_training/a b, frozen", "mode 12", "what it experienced while it"):
        assert words in card
    assert "scaled-ql run 06_transfer -p run variant -p initial '\"04_scaled_training/a b\"' -p freeze true" in card
    assert explore.load_agent(tmp_path / "model").protocol["mode"] == 12


def test_an_earlier_checkpoint_is_exported_without_the_last_ones_scores(tmp_path: Path) -> None:
    run = tmp_path / "02_online_agents" / "early"
    write_run(run, ["Pong"], steps=(10, 20))
    (run / "evaluation").mkdir()
    pd.DataFrame({"episode_return": [3.0], "truncated": [False]}).to_csv(run / "evaluation/Pong.csv")
    assert "| Pong | – |" in (export(run, tmp_path / "early", step=10) / "README.md").read_text()
    assert "| Pong | 3 |" in (export(run, tmp_path / "late") / "README.md").read_text()
    assert explore.load_agent(tmp_path / "early").checkpoints == [10]
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 20, only of 10"):
        explore.load_agent(tmp_path / "early", step=20)


def test_scores_of_an_agent_transferred_online_are_found_by_its_transitions(tmp_path: Path) -> None:
    """Its checkpoints are named by updates: an evaluation of the same name is of another moment."""
    run = tmp_path / "06_transfer" / "online"
    write_run(run, ["Pong"], steps=(10, 20))
    values = {"run": "online", "game": "Pong", "setting": "online", "initial": "scratch"}
    p = parameters.check("06_transfer", values | {"v_min": -1.0, "v_max": 3.0})
    (run / "parameters.yaml").write_text(documents.dump(p.model_dump()))
    for transitions, score in ((10, 5.0), (20, 6.0), (80, 7.0)):
        file = run / "evaluation" / f"step-{transitions}" / "Pong.csv"
        file.parent.mkdir(parents=True)
        pd.DataFrame({"episode_return": [score], "truncated": [False]}).to_csv(file)

    def row(name: str, step: int) -> str:
        card = (export(run, tmp_path / name, step=step) / "README.md").read_text()
        return next(line for line in card.splitlines() if line.startswith("| Pong"))

    assert row("unfinished", 20).startswith("| Pong | – |")
    runs.write_json(run / "summary.json", {"games": {}, "steps": 80, "updates": 20})
    assert row("early", 10).startswith("| Pong | – |")
    assert row("late", 20).startswith("| Pong | 7 |")


def test_a_network_that_the_card_cannot_compute_has_no_code_without_this_package(outputs: Path, tmp_path: Path) -> None:
    write_run(outputs / "04_scaled_training" / "bcq", ["Pong"], method="bcq")
    folder = export("04_scaled_training/bcq", tmp_path / "bcq", outputs=outputs)
    card = (folder / "README.md").read_text()
    assert "Without this package" not in card and "explore.load_agent" in card
    expected = explore.load_agent("04_scaled_training/bcq", outputs=outputs).look("Pong", STACKS)
    np.testing.assert_array_equal(explore.load_agent(folder).look("Pong", STACKS).values, expected.values)


@pytest.mark.parametrize("method", ["dt", "bc_transformer"])
def test_the_card_of_a_transformer_says_what_it_sees_in_code_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setitem(defaults.TRANSFORMERS, "tiny", (1, 32, 2))
    values = {"method": method, "transformer": "tiny", "sequence_length": 3, "subtract_mean_frames": False}
    values |= {"return_low": -2, "return_high": 7, "target_return": 5.0} if method == "dt" else {}
    write_run(tmp_path / "04_scaled_training" / method, ["Pong"], eval_max_steps=6, **values)
    folder = export(f"04_scaled_training/{method}", tmp_path / "model", outputs=tmp_path)
    card, config = (folder / "README.md").read_text(), weights.read_config(folder)
    how = {"transformer": "tiny", "sequence_length": 3, "tokenizer": "patches", "dtype": "float32"}
    assert config["architecture"] == how and "stack_size" not in config["preprocessing"]
    assert "the last 3 steps of an episode" in card and "actions drawn from its policy" in card
    assert not re.findall("c51|discount 0|is 4 frames|Without this package", card)
    assert ("of the return R that it asks for (target_return 5.0)" in card) == (method == "dt")
    (code,) = re.findall(r"```python\n(.*?)explore\.agent_browser", card, re.DOTALL)
    run: dict = {}
    exec(code.replace("PATH/OF/THIS/FOLDER", str(folder)), run)
    policy = run["agent"].look("Pong", *episodes.seen(run["agent"], run["episode"])).policy
    assert policy.shape == (6, 6)
    np.testing.assert_allclose(policy.sum(1), 1, rtol=1e-5)


def test_what_a_network_lacks_is_not_in_its_architecture(outputs: Path, tmp_path: Path) -> None:
    write_run(outputs / "04_scaled_training" / "clone", ["Pong"], method="bc")
    config = weights.read_config(export("04_scaled_training/clone", tmp_path / "clone", outputs=outputs))
    assert not config["architecture"].keys() & {"head", "num_atoms", "group_size"}
    config = weights.read_config(export("04_scaled_training/c51", tmp_path / "c51", outputs=outputs))
    assert config["architecture"]["num_atoms"] == 5 and config["architecture"]["head"] == "c51"


def test_an_export_that_fails_leaves_nothing_behind(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise OSError("no room")

    monkeypatch.setattr(model_card, "card", fail)
    with pytest.raises(OSError, match="no room"):
        export("04_scaled_training/c51", tmp_path / "model", outputs=outputs)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_or_opened_is_refused_with_a_remedy(outputs: Path, tmp_path: Path) -> None:
    folder = export("04_scaled_training/c51", tmp_path / "model", outputs=outputs)
    for run, said in (("04_scaled_training/c51", "exists. Choose another"), (folder, "exists. Choose another")):
        with pytest.raises(RunError, match=said):
            export(run, folder, outputs=outputs)
    with pytest.raises(RunError, match="not a run's folder"):
        export(folder, tmp_path / "again", outputs=outputs)
    write_run(outputs / "04_scaled_training" / "mae", ["Pong"], method="mae", encoder="vit_narrow")
    done = CliRunner().invoke(
        main, ["export", "model", "04_scaled_training/mae", str(tmp_path / "mae"), "--outputs", str(outputs)]
    )
    assert done.exit_code == 1 and "no player" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    tensors = bytearray((folder / weights.TENSORS).read_bytes())
    tensors[-5] ^= 1
    (folder / weights.TENSORS).write_bytes(tensors)
    with pytest.raises(CheckpointError, match="differ from their SHA-256"):
        explore.load_agent(folder)
    (folder / weights.CONFIG).write_text('{"format": "scaled-ql model", "format_version": 2}')
    with pytest.raises(CheckpointError, match="of version 2, expected 1"):
        explore.load_agent(folder)
    short = '{"format": "scaled-ql model", "format_version": 1, "name": "", "games": [], "about": {}, "sha256": ""}'
    for content, said in (("{", "cannot be read"), ("[]", "not of a model that"), (short, "not say parameters, step")):
        (folder / weights.CONFIG).write_text(content)
        with pytest.raises(CheckpointError, match=said):
            explore.load_agent(folder)


def test_actions_of_the_configuration_are_the_games(outputs: Path, tmp_path: Path) -> None:
    config = weights.read_config(export("04_scaled_training/c51", tmp_path / "model", outputs=outputs))
    assert config["actions"] == {game: list(games.action_names(game)) for game in GAMES}


def test_the_agents_notebook_opens_an_exported_agent_without_its_run(outputs: Path, tmp_path: Path) -> None:
    export("04_scaled_training/c51", tmp_path / "gallery" / "model", outputs=outputs)
    values = {"agent": "gallery/model", "outputs": str(tmp_path), "max_steps": 20, "map_states": 8}
    book = opening("07_agents", "explore.show_moments(pair", values)
    nbformat.write(book, tmp_path / "opening.ipynb")
    played = papermill.execute_notebook(tmp_path / "opening.ipynb", tmp_path / "out.ipynb", progress_bar=False)
    printed = "".join(output.get("text", "") for cell in played.cells for output in cell.outputs)
    assert "no such replay folder" in printed and "No recording: episodes of the agent only" in printed
    assert "No second agent: this checkpoint is the only one" in printed


@pytest.mark.parametrize(
    ("model", "game", "least"), [("quickstart_seed_2", "Breakout", 4.9), ("six_games_500k_online", "Qbert", 178)]
)
def test_the_gallerys_agents_play(workspace: Path, model: str, game: str, least: float) -> None:
    """Better than the first one's data, and than a random player or the best constant action plays Qbert; whoever
    installs the workspace can look at them without any training."""
    agent = explore.load_agent(workspace / "outputs" / "gallery" / "models" / model)
    played = [episodes.play(agent.player(game), game, seed=seed, **agent.protocol) for seed in range(2)]
    assert np.mean([episode.rewards.sum() for episode in played]) > least
