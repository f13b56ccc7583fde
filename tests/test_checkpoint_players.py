"""Recordings of trained agents in order, and agents that were published by others, read as weights alone."""

import gzip
import io
import pickle
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from written import write_online_run, write_run

from scaled_ql import collect, defaults, explore, runs, trained_agent, weights
from scaled_ql.collect import record, record_game
from scaled_ql.model_card import export
from scaled_ql.parameters import ParameterError, check
from scaled_ql.replay import ReplayError, open_replay
from scaled_ql.runs import RunError
from scaled_ql.training import CheckpointError

STACKS = np.random.default_rng(2).integers(0, 256, (2, 4, 84, 84), np.uint8)
SHORT = {"seed": 4, "max_steps": 30, "final_epsilon": 0.0}  # every episode is cut after 30 steps


def published(num_actions: int, atoms: np.ndarray | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights as Atari Agents name and shape them."""
    rng, outputs = np.random.default_rng(seed), num_actions * (1 if atoms is None else len(atoms))
    shapes = {"features.0": (32, 4, 8, 8), "features.2": (64, 32, 4, 4), "features.4": (64, 64, 3, 3)}
    shapes |= {"head.0": (512, 3136), "head.2": (outputs, 512)}
    state = {} if atoms is None else {"_AtariNet__support": np.float32(atoms)}
    for name, shape in shapes.items():
        scale = (2 / np.prod(shape[1:])) ** 0.5
        state[f"_AtariNet__{name}.weight"] = np.float32(scale * rng.normal(size=shape))
        state[f"_AtariNet__{name}.bias"] = np.float32(0.1 * rng.normal(size=shape[0]))
    return state


def by_hand(state: dict[str, np.ndarray], stacks: np.ndarray) -> np.ndarray:
    """The published network in float64, a place of each feature map at a time: values [N, actions]."""
    w = {name.removeprefix("_AtariNet__"): np.float64(array) for name, array in state.items()}
    x = stacks / 255
    for number, stride in ((0, 4), (2, 2), (4, 1)):
        kernel, bias = w[f"features.{number}.weight"], w[f"features.{number}.bias"]
        side = (x.shape[2] - kernel.shape[2]) // stride + 1
        y = np.zeros((len(x), len(bias), side, side))
        for row in range(side):
            for column in range(side):
                top, left = row * stride, column * stride
                patch = x[:, :, top : top + kernel.shape[2], left : left + kernel.shape[3]]
                y[:, :, row, column] = patch.reshape(len(x), -1) @ kernel.reshape(len(bias), -1).T + bias
        x = np.maximum(y, 0)
    x = np.maximum(x.reshape(len(x), -1) @ w["head.0.weight"].T + w["head.0.bias"], 0)
    x = x @ w["head.2.weight"].T + w["head.2.bias"]
    if "support" not in w:
        return x
    p = np.exp(x.reshape(len(x), -1, len(w["support"])))
    return (p * w["support"]).sum(-1) / p.sum(-1)


@pytest.fixture(scope="module")
def agents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints of one agent of two games, one of another, and what is no agent."""
    home = tmp_path_factory.mktemp("agents")
    write_run(home / "04_scaled_training" / "run", ["Breakout", "Pong"], steps=(10, 200))
    write_online_run(home / "02_online_agents" / "online", ["Pong"])  # step 7
    folder = home / "exported"
    for step in (200, 10):
        export("04_scaled_training/run", folder / f"a-{step}", step, home)
    export("02_online_agents/online", folder / "z", outputs=home)
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text('{"model_type": "of another library"}')
    return folder


def test_agents_are_found_by_game_in_the_order_of_their_training(agents: Path, tmp_path: Path) -> None:
    found = {game: [place.name for place in weights.find_agents(agents, game)] for game in ("Pong", "Breakout")}
    assert found == {"Pong": ["z", "a-10", "a-200"], "Breakout": ["a-10", "a-200"]}
    for name in ("Qbert/1/model_50.gz", "Qbert/0/model_50.gz", "Qbert/0/model_6.gz", "Qbert/0/model_best.gz"):
        (tmp_path / "DQN_modern" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "DQN_modern" / name).touch()
    found = [str(place.relative_to(tmp_path / "DQN_modern/Qbert")) for place in weights.find_agents(tmp_path, "Qbert")]
    assert found == ["0/model_6.gz", "0/model_50.gz", "1/model_50.gz"]
    assert [player.name for player in trained_agent.players(agents / "z", ["Pong"])["Pong"]] == ["z"], "one alone"
    with pytest.raises(RunError, match="no agent of Asterix; there are agents of Breakout, Pong"):
        weights.find_agents(agents, "Asterix")
    with pytest.raises(RunError, match="no agent of Pong; there are none"):
        weights.find_agents(agents / "other", "Pong")


def test_half_written_agents_are_left_out_and_two_kinds_are_not_put_in_an_order(agents: Path, tmp_path: Path) -> None:
    folder = tmp_path / ".home" / "agents"  # what is above does not count
    shutil.copytree(agents / "z", folder / "z")
    shutil.copytree(agents / "z", folder / ".y.partial")
    hidden = folder / ".trash" / "Pong" / "0" / "model_1.gz"
    hidden.parent.mkdir(parents=True)
    hidden.touch()
    assert weights.find_agents(folder, "Pong") == [folder / "z"]
    public = folder / "DQN_modern" / "Pong" / "0" / "model_1.gz"
    public.parent.mkdir(parents=True)
    public.touch()
    with pytest.raises(RunError, match=r"exported agents of Pong and files of Atari Agents.* order is not known"):
        weights.find_agents(folder, "Pong")


def test_what_cannot_play_is_refused_before_anything_is_recorded(
    agents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(defaults.TRANSFORMERS, "tiny", (1, 32, 2))
    write_run(tmp_path / "04_scaled_training" / "clone", ["Pong"], method="bc_transformer", transformer="tiny")
    export("04_scaled_training/clone", tmp_path / "one" / "clone", outputs=tmp_path)
    with pytest.raises(RunError, match=r"clone: a transformer sees the last steps .* Take it out"):
        trained_agent.players(tmp_path / "one", ["Pong"])
    damaged = shutil.copytree(agents / "z", tmp_path / "two" / "z") / weights.TENSORS
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="differ from their SHA-256"):
        trained_agent.players(tmp_path / "two", ["Pong"])
    monkeypatch.setitem(sys.modules, "torch", None)
    public = tmp_path / "three" / "Pong" / "0" / "model_1.gz"
    public.parent.mkdir(parents=True)
    public.touch()
    with pytest.raises(CheckpointError, match="needs PyTorch"):
        trained_agent.players(tmp_path / "three", ["Pong"])


def test_players_are_the_same_if_name_configuration_and_parameters_are(agents: Path, tmp_path: Path) -> None:
    def identity(name: str, old: str = "", new: str = "") -> str:
        folder = shutil.copytree(agents / "z", tmp_path / str(len(list(tmp_path.iterdir()))) / name)
        config = folder / weights.CONFIG
        assert old in config.read_text()
        config.write_text(config.read_text().replace(old, new) if old else config.read_text())
        (player,) = trained_agent.players(folder.parent, ["Pong"])["Pong"]
        return player.identity

    same = identity("z")
    assert identity("z") == same
    assert len({same, identity("y"), identity("z", '"v_max": 2.0', '"v_max": 3.0')}) == 3


def test_trained_agents_play_their_shares_of_a_recording_in_order(
    agents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = trained_agent.players(agents, ["Pong"])["Pong"]
    stopped = iter([False] * 4 + [True])
    monkeypatch.setattr(collect, "_stopped", lambda: next(stopped))
    assert record_game(tmp_path, "Pong", 250, agents=ours, **SHORT) == 120
    monkeypatch.undo()
    assert record_game(tmp_path, "Pong", 250, agents=ours, **SHORT) == 270
    replay = open_replay(tmp_path)
    table = replay.episodes("Pong")
    assert table["agent"].tolist() == ["z"] * 3 + ["a-10"] * 3 + ["a-200"] * 3  # up to 83 and 166 of 250
    assert set(table["epsilon"]) == {0.0}
    (manifest,) = replay.manifests("Pong")
    assert "3 trained agents in order, z to a-200" in manifest["source"]
    chosen, alike, others = replay.actions("Pong"), [], []
    loaded = {name: explore.load_agent(agents / name) for name in table["agent"].unique()}
    for row in table.itertuples():
        frames = replay.frames_at("Pong", np.arange(row.start, row.start + row.length))
        padded = np.concatenate([np.zeros((3, 84, 84), np.uint8), frames])
        stacks = np.stack([padded[step : step + 4] for step in range(row.length)])
        own = chosen[row.start : row.start + row.length]
        alike.append(loaded[row.agent].look("Pong", stacks).best == own)
        others.append(loaded["z" if row.agent != "z" else "a-10"].look("Pong", stacks).best == own)
    assert np.mean(alike) > 0.99, "but for ties: networks see states one by one there, together here"
    assert np.mean(others) < 0.9, "agents differ"
    with pytest.raises(ReplayError, match="other settings"):
        record_game(tmp_path, "Pong", 250, agents=ours[1:], **SHORT)
    with pytest.raises(ReplayError, match="other settings"):
        record_game(tmp_path, "Pong", 250, agents=[*ours[:2], ours[2]._replace(identity="other")], **SHORT)


def test_every_agent_plays_where_episodes_are_longer_than_shares(
    agents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Episodes of 30 steps; shares of 20, 14 and a little more than an episode."""
    ours = trained_agent.players(agents, ["Pong"])["Pong"]
    for number, (asked, expected) in enumerate(((60, [0, 1, 2]), (42, [0, 1, 2]), (91, [0, 0, 1, 2]))):
        for stops in (True, False):  # after each episode; and not at all
            store, calls = tmp_path / f"{number}-{stops}", 1
            if stops:
                while True:
                    stopped = iter([False, True])
                    monkeypatch.setattr(collect, "_stopped", lambda stopped=stopped: next(stopped))
                    before = calls * 30
                    if record_game(store, "Pong", asked, agents=ours, **SHORT) < before:
                        break
                    calls += 1
                monkeypatch.undo()
            total = record_game(store, "Pong", asked, agents=ours, **SHORT)
            assert total == 30 * len(expected)
            assert open_replay(store).episodes("Pong")["agent"].tolist() == [ours[turn].name for turn in expected]


def test_processes_record_what_one_would_have_recorded(agents: Path, tmp_path: Path) -> None:
    """The games side by side; a stopped recording resumes as if it had not been stopped."""
    players = trained_agent.players(agents, ["Breakout", "Pong"])
    settings = SHORT | {"final_epsilon": 0.5}
    *_, done = record(tmp_path / "both", ["Breakout", "Pong"], 60, agents=players, **settings)
    assert done == {"Breakout": 60, "Pong": 90}, "each agent at least once"
    for game in done:
        record_game(tmp_path / "alone", game, 60, agents=players[game], **settings)
    both, alone = open_replay(tmp_path / "both"), open_replay(tmp_path / "alone")
    assert both.validate() == [] and both.identity() == alone.identity()
    assert both.episodes("Breakout")["agent"].tolist() == ["a-10", "a-200"]


@pytest.mark.parametrize("atoms", [None, np.linspace(-10, 10, 51)], ids=["DQN", "C51"])
def test_weights_of_atari_agents_make_the_published_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, atoms: np.ndarray | None
) -> None:
    state, file = published(6, atoms), tmp_path / "C51_modern" / "Pong" / "2" / "model_50000.gz"
    file.parent.mkdir(parents=True)
    file.touch()
    monkeypatch.setattr(weights, "_load_weights", lambda file: state)
    agent = explore.load_agent(file)
    assert (agent.games, agent.step, agent.dataset) == (["Pong"], 50_000, "")
    assert agent.name == "C51_modern/Pong/2/model_50000.gz, step 50,000"
    assert (agent.atoms is None) == (atoms is None)
    values, expected = agent.look("Pong", STACKS).values, by_hand(state, STACKS)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "atoms", [np.linspace(0, 10, 51), np.linspace(10, -10, 51), np.r_[-1, 0.5, 1], np.r_[-1, np.nan, 1], np.float32(1)]
)
def test_a_support_that_is_not_c51s_is_refused(atoms: np.ndarray) -> None:
    state = published(6, np.linspace(-1, 1, np.size(atoms))) | {"_AtariNet__support": atoms}
    with pytest.raises(CheckpointError, match="expected ascending numbers at equal distances around 0"):
        weights.from_atari_agents(state, 6, "a file")


def test_weights_of_another_network_or_game_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"head\.2\.bias is \(18,\) there, expected \(6,\) for 6 actions"):
        weights.from_atari_agents(published(18), 6, "a file")
    state = published(6)
    del state["_AtariNet__features.2.bias"]
    with pytest.raises(CheckpointError, match=r"features\.2\.bias is absent there"):
        weights.from_atari_agents(state, 6, "a file")
    with pytest.raises(CheckpointError, match=r"extra is \(1,\) there, expected none"):
        weights.from_atari_agents(published(6) | {"extra": np.zeros(1)}, 6, "a file")
    for name in ("Pung/0/model_1.gz", "Pong/0/last.gz"):
        file = tmp_path / name
        file.parent.mkdir(parents=True)
        file.touch()
        with pytest.raises(CheckpointError, match=r"not named as Atari Agents name their files"):
            explore.load_agent(file)


class Evil:
    """Unpickled, it would make a file."""

    def __init__(self, file: Path):
        self.file = str(file)

    def __reduce__(self) -> tuple:
        return open, (self.file, "w")


def test_files_of_atari_agents_are_loaded_as_weights_alone(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is an extra")
    folder = tmp_path / "DQN_modern" / "Pong" / "0"
    folder.mkdir(parents=True)
    states = [{name: torch.from_numpy(array) for name, array in published(6, seed=seed).items()} for seed in range(2)]
    for step, state in enumerate(states, 1):
        with gzip.open(folder / f"model_{step}.gz", "wb") as stream:
            torch.save({"estimator_state": state, "step": step}, stream)
    for step in (1, 2):
        expected = by_hand(published(6, seed=step - 1), STACKS)
        values = explore.load_agent(folder / f"model_{step}.gz").look("Pong", STACKS).values
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)
    players = trained_agent.players(tmp_path, ["Pong"])["Pong"]
    record_game(tmp_path / "store", "Pong", 60, agents=players, **SHORT)
    names = open_replay(tmp_path / "store").episodes("Pong")["agent"].tolist()
    assert names == ["DQN_modern/Pong/0/model_1.gz", "DQN_modern/Pong/0/model_2.gz"]
    made, saved = tmp_path / "made", io.BytesIO()
    torch.save({"estimator_state": states[0], "more": Evil(made)}, saved)
    for content in (saved.getvalue(), pickle.dumps(Evil(made)), b"nothing"):
        (folder / "model_3.gz").write_bytes(gzip.compress(content))
        with pytest.raises(CheckpointError, match="cannot be read as weights alone"):
            explore.load_agent(folder / "model_3.gz")
    assert not made.exists()


def test_without_pytorch_its_files_are_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    file = tmp_path / "Pong" / "0" / "model_1.gz"
    file.parent.mkdir(parents=True)
    file.touch()
    with pytest.raises(CheckpointError, match=r"needs PyTorch .*pip install -e 'lib\[torch\]'"):
        explore.load_agent(file)


def test_pytorch_versions_that_can_be_made_to_execute_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__="2.9.1+cpu"))
    file = tmp_path / "Pong" / "0" / "model_1.gz"
    file.parent.mkdir(parents=True)
    file.touch()
    with pytest.raises(CheckpointError, match=r"PyTorch 2\.9\.1\+cpu can be made to execute .* at least 2\.10"):
        explore.load_agent(file)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__="2.10.0a0+git"))
    with pytest.raises(CheckpointError, match="cannot be read as weights alone"):
        explore.load_agent(file)


def test_agents_are_given_to_checkpoint_players_alone_and_their_folder_exists(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="agents: missing; player 'checkpoints' needs a folder"):
        check("01_data_collection", {"player": "checkpoints"})
    with pytest.raises(ParameterError, match="agents: without effect with player 'scripted'"):
        check("01_data_collection", {"agents": "folder"})
    p = check("01_data_collection", {"player": "checkpoints", "agents": "folder", "outputs": str(tmp_path)})
    assert p.last_epsilon == 0.01
    with pytest.raises(RunError, match=r"agents = 'folder': no such folder"):
        runs.check_inputs(p)
    (tmp_path / "folder").mkdir()
    runs.check_inputs(p)
