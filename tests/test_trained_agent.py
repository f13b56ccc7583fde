"""Agents read from runs: what they make of states, which checkpoint, and what is said where there is none."""

from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from written import save, write_online_run, write_run

from scaled_ql import documents, explore, losses, methods, training, transfer
from scaled_ql.games import action_names
from scaled_ql.parameters import ParameterError, check
from scaled_ql.runs import RunError

GAMES = ["Breakout", "Pong"]
STACKS = np.random.default_rng(0).integers(0, 256, (66, 4, 84, 84), np.uint8)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def c51(outputs: Path) -> list:
    return write_run(outputs / "04_scaled_training" / "c51", GAMES, steps=(10, 20))


def by_hand(network, stacks: np.ndarray, number: int) -> np.ndarray:
    """A network's outputs, float64 [N, 18, ...]."""
    return np.float64(network(np.moveaxis(stacks, 1, -1), np.full(len(stacks), number, np.int32)))


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


@pytest.mark.parametrize("game", GAMES)
def test_values_and_distributions_are_those_of_the_network_at_its_checkpoint(outputs: Path, c51: list, game: str):
    agent = explore.load_agent("04_scaled_training/c51", outputs=outputs)
    assert (agent.games, agent.step, agent.values_name) == (GAMES, 20, "Q(s, a)")
    assert agent.name == "04_scaled_training/c51, step 20"
    assert agent.protocol == {
        "epsilon": 0.1, "temperature": 0, "sticky_actions": 0.0, "max_steps": 60, "mode": None, "difficulty": None
    }  # fmt: skip
    np.testing.assert_allclose(agent.atoms, [-1, 0, 1, 2, 3])
    look, used = agent.look(game, STACKS), len(action_names(game))
    expected = softmax(by_hand(c51[1], STACKS, GAMES.index(game)))[:, :used]
    np.testing.assert_allclose(look.probabilities, expected, atol=1e-5)
    np.testing.assert_allclose(look.values, expected @ agent.atoms, atol=1e-5)
    entropies = -(expected * np.log(expected)).sum(-1)
    np.testing.assert_allclose(look.entropy, entropies[range(66), look.best], atol=1e-5)
    assert look.features.shape == (66, 8)
    assert (look.best == (expected @ agent.atoms).argmax(1)).mean() > 0.95, "but for ties"
    for number in (1, 3):  # of another compiled program, and of a padded one
        np.testing.assert_allclose(agent.look(game, STACKS[:number]).values, look.values[:number], atol=1e-5)
    np.testing.assert_array_equal(agent.player(game)(STACKS[:3]), agent.look(game, STACKS[:3]).values)


def test_a_shared_head_is_told_the_game(outputs: Path) -> None:
    (network,) = write_run(outputs / "04_scaled_training" / "shared", GAMES, heads="shared")
    agent = explore.load_agent("04_scaled_training/shared", outputs=outputs)
    values = {}
    for number, game in enumerate(GAMES):
        expected = softmax(by_hand(network, STACKS[:2], number))[:, : len(action_names(game))]
        values[game] = agent.look(game, STACKS[:2]).values
        np.testing.assert_allclose(values[game], expected @ agent.atoms, atol=1e-5)
    assert np.abs(values["Breakout"][:, :3] - values["Pong"][:, :3]).max() > 1e-3


def test_an_earlier_checkpoint_is_another_agent(outputs: Path, c51: list) -> None:
    agent = explore.load_agent(outputs / "04_scaled_training" / "c51", step=10)
    assert (agent.step, agent.checkpoints) == (10, [10, 20])
    expected = softmax(by_hand(c51[0], STACKS[:2], 1))[:, :6] @ agent.atoms
    np.testing.assert_allclose(agent.look("Pong", STACKS[:2]).values, expected, atol=1e-5)
    assert np.abs(expected - softmax(by_hand(c51[1], STACKS[:2], 1))[:, :6] @ agent.atoms).max() > 1e-3


def test_a_head_of_values_and_a_clone_have_no_distributions(outputs: Path) -> None:
    for number, (name, values) in enumerate({"mse": {"head": "mse"}, "bc": {"method": "bc"}}.items()):
        (network,) = write_run(outputs / "04_scaled_training" / name, GAMES, subtract_mean_frames=False, **values)
        agent = explore.load_agent(f"04_scaled_training/{name}", outputs=outputs)
        look = agent.look("Breakout", STACKS[:2])
        assert agent.atoms is None and look.probabilities is None and look.entropy is None
        np.testing.assert_allclose(look.values, by_hand(network, STACKS[:2], 0)[:, :4], atol=1e-5)
        assert agent.values_name == ("Q(s, a)", "log π(a|s) + c")[number]


def test_bcq_plays_only_what_its_own_tau_allows(outputs: Path) -> None:
    (network,) = write_run(outputs / "04_scaled_training" / "bcq", GAMES, method="bcq", tau=0.9, head="two_hot")
    agent = explore.load_agent("04_scaled_training/bcq", outputs=outputs)
    look = agent.look("Breakout", STACKS)
    behaviour = softmax(by_hand(network.behaviour, STACKS, 0)[:, :4])
    allowed = behaviour >= 0.9 * behaviour.max(1, keepdims=True)
    assert 0 < allowed.mean() < 1
    np.testing.assert_array_equal(np.isfinite(look.values), allowed)
    expected = softmax(by_hand(network.q, STACKS, 0))[:, :4]
    np.testing.assert_allclose(look.probabilities, expected, atol=1e-5)


def test_independent_online_agents_play_their_own_games(outputs: Path) -> None:
    own = write_online_run(outputs / "02_online_agents" / "two", GAMES)
    agent = explore.load_agent("02_online_agents/two", outputs=outputs)
    assert (agent.step, agent.dataset, agent.protocol["max_steps"]) == (7, "", 60)
    for number, game in enumerate(GAMES):
        used = len(action_names(game))
        expected = np.asarray(losses.expected_q(by_hand(own[number], STACKS[:2], 0), agent.atoms))[:, :used]
        np.testing.assert_allclose(agent.look(game, STACKS[:2]).values, expected, atol=1e-5)


def test_a_transferred_agent_plays_its_variant_with_the_networks_own_support(outputs: Path) -> None:
    folder = outputs / "06_transfer" / "variant"
    (network,) = write_run(folder, ["Breakout"])
    values = {"run": "variant", "game": "Breakout", "mode": 12, "setting": "online", "eval_epsilon": 0.2}
    p = check("06_transfer", {"adam_epsilon": 1e-5, "v_min": -1.0, "v_max": 3.0} | values)
    (folder / "parameters.yaml").write_text(documents.dump(p.model_dump()))
    agent = explore.load_agent("06_transfer/variant", outputs=outputs)
    assert (agent.protocol["mode"], agent.protocol["difficulty"], agent.protocol["epsilon"]) == (12, None, 0.2)
    assert agent.dataset == "", "it made its own experience"
    expected = softmax(by_hand(network, STACKS[:2], 0))[:, :4] @ [-1, 0, 1, 2, 3]
    np.testing.assert_allclose(agent.look("Breakout", STACKS[:2]).values, expected, atol=1e-5)


def test_a_q_network_on_a_frozen_masked_autoencoders_encoder_is_loaded(outputs: Path) -> None:
    origin, folder = outputs / "04_scaled_training" / "mae", outputs / "06_transfer" / "frozen"
    write_run(origin, GAMES, method="mae", encoder="vit_narrow", subtract_mean_frames=False)
    values = {"initial": "04_scaled_training/mae", "parts": "encoder", "freeze": True, "game": "Pong", "run": "frozen"}
    p, source = check("06_transfer", values | {"v_min": -1.0, "v_max": 3.0}), transfer.load(origin)
    settings = transfer.training_parameters(p, source)
    network = methods.make(settings).build(num_games=1, seed=3, **source.architecture)
    graph, variables = nnx.split(network, nnx.Param)
    params = transfer.graft(nnx.to_pure_dict(variables), source, p.parts)
    about = training.about_run(settings, ["Pong"], "of a test")
    (network,) = save(folder, p, nnx.merge(graph, nnx.State(params)), about, (20,), 0)
    agent = explore.load_agent("06_transfer/frozen", outputs=outputs)
    expected = softmax(by_hand(network, STACKS[:2], 0))[:, :6] @ agent.atoms
    np.testing.assert_allclose(agent.look("Pong", STACKS[:2]).values, expected, atol=1e-5)
    assert agent.atoms.tolist() == [-1, 0, 1, 2, 3] and agent.memory == 0


def test_what_cannot_be_loaded_is_named_with_a_remedy(outputs: Path, c51: list, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"'04_scaled_training/c52': no such run below .*; .* 04_scaled_training/c51"):
        explore.load_agent("04_scaled_training/c52", outputs=outputs)
    with pytest.raises(RunError, match="with checkpoints there are none"):
        explore.load_agent("any", outputs=tmp_path)
    with pytest.raises(training.CheckpointError, match=r"no checkpoint of step 15, only of 10, 20\. Choose"):
        explore.load_agent("04_scaled_training/c51", 15, outputs)
    with pytest.raises(ValueError, match=r"does not play 'Qbert'; it was trained on Breakout, Pong"):
        explore.load_agent("04_scaled_training/c51", outputs=outputs).look("Qbert", STACKS)
    young = outputs / "04_scaled_training" / "young"
    young.mkdir()
    (young / "parameters.yaml").write_text("run: young")
    with pytest.raises(training.CheckpointError, match="there is no checkpoint"):
        explore.load_agent(young)


def test_a_damaged_run_is_refused(outputs: Path) -> None:
    folder = outputs / "04_scaled_training" / "damaged"
    write_run(folder, GAMES)
    stored = folder / "parameters.yaml"
    values = documents.load(stored)
    stored.write_text(documents.dump(values | {"hidden_sizes": [9]}))
    with pytest.raises(training.CheckpointError, match=r"head_kernel is \(8, 2, 90\) there, \(9, 2, 90\) in"):
        explore.load_agent(folder)
    stored.write_text("encoder: resnet18")
    with pytest.raises(ParameterError, match=r"damaged/parameters\.yaml: not valid .*\n.*encoder"):
        explore.load_agent(folder)
    stored.write_text(documents.dump(values))
    largest = max((folder / "checkpoints" / "20" / "state").rglob("*"), key=lambda file: file.stat().st_size)
    content = np.frombuffer(largest.read_bytes(), np.uint8).copy()
    content[::97] ^= 255  # wherever the parameters are in it
    largest.write_bytes(content.tobytes())
    with pytest.raises(training.CheckpointError, match=r"Move this folder elsewhere|cannot be read as a checkpoint"):
        explore.load_agent(folder)


@pytest.mark.parametrize("values", [{"method": "mae", "encoder": "vit_narrow"}, {"method": "cpc"}])
def test_an_encoder_that_learned_from_images_alone_is_no_player(tmp_path: Path, values: dict) -> None:
    folder = tmp_path / "04_scaled_training" / "run"
    write_run(folder, ["Pong"], **values, subtract_mean_frames=False)
    with pytest.raises(
        RunError, match=rf"{values['method']} trains an encoder .* no player\. Choose a run of 06_transfer"
    ):
        explore.load_agent(folder)
