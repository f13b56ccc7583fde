"""Transfer: what is taken from a checkpoint, into which networks, and what frozen parts cost."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stacks import batch_of_stacks, windows

from scaled_ql import devices, methods, networks, parameters, training, transfer
from scaled_ql.training import CheckpointError

PARTS = tuple(transfer.MODULES)
BUILT = {"encoder": "nature_narrow", "hidden_sizes": (8, 6), "num_atoms": 5, "embedding": "pointwise"}
BUILT |= {"normalize_features": True, "group_size": 4}
ABOUT = BUILT | {"games": ["Breakout", "Freeway"], "dataset": "of a test", "seed": 1}
ATOMS = jnp.linspace(-1, 1, 5)
OBSERVATION = np.random.default_rng(0).integers(0, 256, (3, 84, 84, 4), np.uint8)


@functools.cache
def build(num_games=1, head="c51", seed=7, grey=None, **changes):
    """A network, whose parameters a state copies; with mean frames where they are `grey`."""
    mean_frames = None if grey is None else np.full((num_games, 84, 84), grey, np.float32)
    how = BUILT | {"mean_frames": mean_frames} | changes
    return networks.make_q_network(num_games=num_games, head=head, seed=seed, **how)


def make_batch(number, size=4):
    rng = np.random.default_rng(number)
    frames = rng.integers(0, 256, (2, size, 84, 84, 4), np.uint8)
    action, reward = rng.integers(3, size=size).astype(np.int32), rng.normal(size=size).astype(np.float32)
    return batch_of_stacks(
        frames[0], action, reward, np.full(size, 0.9, np.float32), frames[1], np.zeros(size, np.int32)
    )


def write_run(folder, method="cql", about=ABOUT, grey=None):
    """A run of two games as it is on disk after 20 steps, with noise in place of what they learned; graph and state."""
    network = build(2, "mse" if method == "bc" else "c51", 1, grey)
    if method == "bcq":
        network = networks.BCQNetwork(network, build(2, "mse", 2))
    optimizer = training.make_optimizer(frozen=("behaviour",) if method == "bcq" else ())
    graph, state = training.init_state(network, optimizer)
    rng = np.random.default_rng(3)
    moved = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), state.params)
    state = state._replace(step=jnp.int32(20), params=moved)
    checkpoints = training.Checkpoints(folder / "checkpoints", about | {"method": method})
    checkpoints.save(state)
    checkpoints.close()
    return graph, jax.device_get(state)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with mean frames, its graph, its state."""
    folder = tmp_path_factory.mktemp("outputs") / "run"
    return folder, *write_run(folder, grey=100)


def start(source, parts="encoder", freeze=True):
    """A new network for one game, with parts of the source: objective, optimizer, state."""
    optimizer = training.make_optimizer(0.01, frozen=source.names(parts) if freeze else ())
    graph, state = transfer.init_state(build(), optimizer, source, parts)
    return methods.q_learning(atoms=ATOMS).objective(graph, [3]), optimizer, state


@functools.cache
def compiled(folder, parts="encoder", freeze=True, accumulate=1):
    objective, optimizer, _ = start(transfer.load(folder), parts, freeze)
    return training.make_train_step(objective, optimizer, accumulate=accumulate, target_update_period=3)


def paths_and_bytes(tree):
    return {path: np.asarray(leaf).tobytes() for path, leaf in training.flat_params(tree).items()}


# Reading.


@pytest.mark.parametrize("method", ["cql", "bcq", "bc", "return_bc"])
def test_each_methods_network_is_read_bit_for_bit(tmp_path, method):
    _, state = write_run(tmp_path / "run", method)
    expected = state.params["q"] if method == "bcq" else state.params
    for folder in (tmp_path / "run", str(tmp_path / "run" / "checkpoints")):
        source = transfer.load(folder)
        assert {path: leaf.tobytes() for path, leaf in source.params.items()} == paths_and_bytes(expected)
        assert source.about["method"] == method and source.folder.name == "20"
    network = networks.make_q_network(num_games=1, head="mse", seed=0, **source.architecture)
    assert network.hidden[0].kernel.shape == state.params.get("q", state.params)["hidden"][0]["kernel"].shape


def test_a_network_of_more_than_ten_layers_is_read(tmp_path):
    """Layers are numbered, and 10 comes before 2 where numbers are strings, as they are on disk."""
    network = build(1, hidden_sizes=(6,) * 12)
    state = training.init_state(network, training.make_optimizer())[1]
    checkpoints = training.Checkpoints(tmp_path / "checkpoints", ABOUT | {"hidden_sizes": [6] * 12, "method": "cql"})
    checkpoints.save(state)
    checkpoints.close()
    source = transfer.load(tmp_path)
    assert {path: leaf.tobytes() for path, leaf in source.params.items()} == paths_and_bytes(state.params)


def test_reading_touches_nothing(run):
    folder, *_ = run
    unfinished = folder / "checkpoints" / "40.orbax-checkpoint-tmp"  # of a run that is writing
    unfinished.mkdir()
    before = sorted(map(str, folder.rglob("*")))
    assert transfer.load(folder).folder.name == "20"
    assert sorted(map(str, folder.rglob("*"))) == before
    unfinished.rmdir()


def test_what_cannot_be_read_is_a_sentence(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError, match=r"there is no checkpoint\. Name a run"):
            transfer.load(folder)
    (tmp_path / "foreign" / "3").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="3: cannot be read as a checkpoint of a training run"):
        transfer.load(tmp_path / "foreign")
    write_run(tmp_path / "agent", about={"encoder": "nature_narrow", "games": ["Pong"], "hidden_sizes": [8, 6]})
    with pytest.raises(CheckpointError, match=r"how its network was built \(num_atoms, embedding, "):
        transfer.load(tmp_path / "agent")


def test_a_checkpoint_that_differs_from_its_checksum_is_refused_and_an_older_one_has_none(tmp_path):
    write_run(tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "20" / "about" / "metadata"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | {"params_crc32": stored["params_crc32"] ^ 1}))
    with pytest.raises(CheckpointError, match="differ from their CRC-32"):
        transfer.load(tmp_path / "run")
    del stored["params_crc32"]
    file.write_text(json.dumps(stored))
    assert "encoder" in {path.split("/")[0] for path in transfer.load(tmp_path / "run").params}


# Grafting.


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("head, num_games", [("c51", 1), ("mse", 3)])
def test_the_parts_are_taken_bit_for_bit_and_nothing_else(run, parts, head, num_games):
    folder, _, old = run
    network = build(num_games, head)
    params = training.init_state(network, training.make_optimizer())[1].params
    before = paths_and_bytes(params)
    grafted = paths_and_bytes(transfer.graft(params, transfer.load(folder), parts))
    theirs = paths_and_bytes(old.params)
    assert grafted.keys() == before.keys() and "mean_frames" in theirs.keys() - grafted.keys()
    for path, value in grafted.items():
        assert value == (theirs if training.is_part(path, transfer.MODULES[parts]) else before)[path], path
    assert before == paths_and_bytes(params), "the parameters given are not changed"


def test_a_new_networks_own_mean_frames_stay(run):
    folder, *_ = run
    network, source = build(grey=3), transfer.load(folder)
    _, state = transfer.init_state(network, training.make_optimizer(), source, "all but the head")
    assert np.unique(state.params["mean_frames"]) == [3]
    assert source.params["mean_frames"].mean() == pytest.approx(100, abs=1)


def test_the_features_are_the_old_networks(tmp_path):
    graph, old = write_run(tmp_path / "run")
    new, state = transfer.init_state(
        build(), training.make_optimizer(), transfer.load(tmp_path / "run"), "all but the head"
    )
    game = np.zeros(3, np.int32)

    def features(graph, params):
        network = nnx.merge(graph, nnx.State(params))
        return np.asarray(network.features(OBSERVATION, game))

    assert np.ptp(features(graph, old.params), axis=0).max() > 0, "they tell observations apart"
    np.testing.assert_array_equal(features(new, state.params), features(graph, old.params))
    np.testing.assert_array_equal(features(new, state.target_params), features(graph, old.params))


@pytest.mark.parametrize(
    "changes, parts, message",
    [
        ({"hidden_sizes": (8, 5)}, "all but the head", r"part 'hidden'.*hidden/1/bias is float32 \[6\].*float32 \[5\]"),
        ({"encoder": "nature"}, "encoder", r"part 'encoder' does not fit: encoder/.* is float32 .*, float32 "),
        ({"embedding": "none"}, "encoder + embedding", r"part 'embedding'.*kernel is float32 \[.*absent in the new"),
        ({"stack_size": 1}, "encoder", r"part 'encoder'.*, 4, .*, 1, "),
        ({"layer_norm": False}, "all but the head", r"part 'layer_norm'.*absent in the new"),
        ({"normalize_features": False}, "all but the head", "normalize_features is True in .*, False in the new"),
    ],
)
def test_what_does_not_fit_is_named_with_both_shapes(run, changes, parts, message):
    folder, *_ = run
    with pytest.raises(transfer.TransferError, match=message):
        transfer.init_state(build(**changes), training.make_optimizer(), transfer.load(folder), parts)


def test_hidden_layers_that_are_not_taken_may_have_any_size(run):
    folder, _, old = run
    source = transfer.load(folder)
    _, state = transfer.init_state(build(hidden_sizes=(4,)), training.make_optimizer(), source, "encoder + embedding")
    assert paths_and_bytes(state.params["embedding"]) == paths_and_bytes(old.params["embedding"])


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A run of two games with a shared head, and its state."""
    folder, network = tmp_path_factory.mktemp("outputs"), build(2, heads="shared", seed=1)
    state = training.init_state(network, training.make_optimizer())[1]
    checkpoints = training.Checkpoints(folder / "checkpoints", ABOUT | {"heads": "shared", "method": "cql"})
    checkpoints.save(state)
    checkpoints.close()
    return folder, state


def test_a_new_game_has_a_new_embedding_whatever_is_transferred(shared):
    folder, old = shared
    source = transfer.load(folder)
    assert source.architecture["heads"] == "shared"
    new = build(1, heads="shared")
    _, state = transfer.init_state(new, training.make_optimizer(), source, "all but the head")
    ours, theirs = training.flat_params(state.params), training.flat_params(old.params)
    alike = {
        path for path in ours if ours[path].shape == theirs[path].shape and np.array_equal(ours[path], theirs[path])
    }
    fresh = {"head_kernel", "game_embedding/embedding"}
    assert not fresh & alike and alike | fresh | {"head_bias"} == ours.keys() and "game_layer/kernel" in alike
    assert ours["game_embedding/embedding"].shape == (1, 32)
    table = transfer.overview(state.params, source, "all but the head", ())
    assert table["from"].to_dict() == {
        name: "fresh" if "head" in name or name == "game_embedding" else "transferred" for name in table.index
    }
    names = source.names("all but the head")
    assert "game_layer" in names and "game_embedding" not in names


def test_a_networks_heads_say_what_fits(run, shared):
    """The encoder fits either; the dense layers of a shared head have a part that others do not have."""
    folder, _ = shared
    transfer.init_state(build(), training.make_optimizer(), transfer.load(folder), "encoder + embedding")
    with pytest.raises(
        transfer.TransferError, match=r"part 'game_layer'.*game_layer/kernel is float32 \[32, 8\].*absent"
    ):
        transfer.init_state(build(), training.make_optimizer(), transfer.load(folder), "all but the head")
    assert transfer.load(run[0]).architecture["heads"] == "per_game", "of a run from before there was a choice"


def test_unknown_parts_are_refused(run):
    folder, *_ = run
    with pytest.raises(ValueError, match="parts = 'decoder'; there are 'encoder', "):
        transfer.load(folder).names("decoder")


def test_all_of_a_network_with_as_many_games_is_taken_but_its_mean_frames(run):
    folder, _, old = run
    source = transfer.load(folder)
    _, state = transfer.init_state(build(2, grey=3), training.make_optimizer(), source, "all")
    ours, theirs = paths_and_bytes(state.params), paths_and_bytes(old.params)
    assert ours.keys() == theirs.keys()
    assert {path for path in ours if ours[path] != theirs[path]} == {"mean_frames"}
    with pytest.raises(transfer.TransferError, match=r"part 'head_bias' does not fit: .*take fewer parts"):
        transfer.init_state(build(1), training.make_optimizer(), source, "all")
    with pytest.raises(transfer.TransferError, match=r"normalize_features is True in .*, False in the new"):
        transfer.init_state(build(2, normalize_features=False), training.make_optimizer(), source, "all")
    assert "mean_frames" not in source.names("all") and "head_kernel" in source.names("all")


# Transformers, and encoders of single frames.

DT = {"method": "dt", "transformer": "tiny", "sequence_length": 2, "return_low": -2, "return_high": 3}
CPC = {"method": "cpc", "encoder": "nature_narrow", "group_size": 8}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Runs by name, of two games, with noise in place of what they learned."""
    folder = tmp_path_factory.mktemp("outputs")
    for name, values in {"dt": DT | {"target_return": 2.5}, "cpc": CPC}.items():
        p = parameters.check("04_scaled_training", values)
        _, state = training.init_state(methods.make(p).build(p.encoder, 2, 1), training.make_optimizer())
        rng = np.random.default_rng(3)
        moved = jax.tree.map(lambda x, rng=rng: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), state.params)
        about = training.about_run(p, ["Breakout", "Freeway"], "of a test")
        checkpoints = training.Checkpoints(folder / name / "checkpoints", about)
        checkpoints.save(state._replace(step=jnp.int32(20), params=moved))
        checkpoints.close()
        (folder / name / "parameters.yaml").write_text(json.dumps(values))  # JSON is YAML
    write_run(folder / "cql")
    return folder


def begin(folder, **values):
    """A run of `06_transfer` until its first step: its settings, network, source and state."""
    p = parameters.check("06_transfer", {"game": "Pong", "batch_size": 4, **values})
    source, like = transfer.sources(p, lambda name: folder / getattr(p, name))
    settings = transfer.training_parameters(p, like)
    network = methods.make(settings).build(num_games=1, seed=7, **like.architecture)
    optimizer = training.make_optimizer(0.01, 1e-8, frozen=source.names(p.parts) if p.freeze else ())
    return settings, network, source, optimizer, transfer.init_state(network, optimizer, source, p.parts)


def test_a_decision_transformer_is_transferred_whole_and_plays_as_it_did(pretrained):
    settings, _, source, _, (_, state) = begin(pretrained, initial="dt", parts="all")
    assert {name: getattr(settings, name) for name in DT} == DT and settings.target_return == 2.5
    about = json.loads((source.folder / "about" / "metadata").read_text())["run"]
    assert "tokenizer" not in about and transfer.built(settings)["tokenizer"] == "patches", "as before there was one"
    assert (settings.games_per_batch, settings.transitions_per_game, settings.rewards) == (1, 4, "real")
    assert paths_and_bytes(state.params) == paths_and_bytes(source.params) == paths_and_bytes(state.target_params)
    assert source.in_words("Pong").startswith("Transformer tiny trained by dt on Breakout, Freeway for 20 steps")
    for parts in ("encoder", "encoder + embedding"):
        with pytest.raises(transfer.TransferError, match=r"has nothing by the name of encoder.*set parts to all"):
            begin(pretrained, initial="dt", parts=parts)
    with pytest.raises(transfer.TransferError, match="a transformer that dt trained, which learns from a dataset"):
        begin(pretrained, initial="dt", parts="all", setting="online")
    with pytest.raises(ValueError, match="everything is frozen"):
        begin(pretrained, initial="dt", parts="all", freeze=True)


def test_a_transformer_from_scratch_is_built_like_another(pretrained):
    settings, _, source, _, (_, state) = begin(pretrained, initial="scratch", built_like="dt")
    assert source is None and settings.method == "dt" and settings.target_return == 2.5
    ours, theirs = training.flat_params(state.params), transfer.load(pretrained / "dt").params
    assert {path: x.shape for path, x in ours.items()} == {path: x.shape for path, x in theirs.items()}
    assert not np.array_equal(ours["blocks/0/attention/kernel"], theirs["blocks/0/attention/kernel"])
    clone = parameters.check("04_scaled_training", {"method": "bc_transformer", "transformer": "tiny"})
    like = transfer.Source(pretrained / "clone" / "checkpoints" / "20", training.about_run(clone, ["Pong"], "x"), {})
    settings = transfer.training_parameters(parameters.check("06_transfer", {"initial": "scratch"}), like)
    assert (settings.method, settings.transformer) == ("bc_transformer", "tiny")
    assert set(transfer.built(settings)) == {"transformer", "sequence_length", "group_size", "dtype"}


def test_a_transformers_checkpoint_is_no_q_network(pretrained):
    source = transfer.load(pretrained / "dt")
    with pytest.raises(
        transfer.TransferError, match=r"holds a transformer that dt trained; it has no Q-values.*such as cql"
    ):
        transfer.init_state(build(), training.make_optimizer(), source, "encoder")


def test_an_encoder_of_single_frames_becomes_a_transformers_tokenizer(pretrained):
    """CPC + DT: all but the encoder is fresh; where that is frozen, a step trains all the rest."""
    about = {"initial": "cpc", "built_like": "dt", "parts": "encoder", "freeze": True}
    settings, network, source, optimizer, (graph, state) = begin(pretrained, **about)
    assert (settings.method, settings.tokenizer, settings.group_size) == ("dt", "nature_narrow", 8)
    assert settings.transformer == "tiny" and settings.target_return == 2.5
    assert transfer.built(settings)["tokenizer"] == "nature_narrow" and network.patches == 49
    ours, theirs = (training.flat_params(tree) for tree in (state.params, source.params))
    encoder = {path for path in ours if training.is_part(path, ["encoder"])}
    assert encoder == {path for path in theirs if training.is_part(path, ["encoder"])} and len(encoder) == 6
    before = paths_and_bytes(state.params)
    assert all(before[path] == theirs[path].tobytes() for path in encoder)
    fresh = training.flat_params(nnx.to_pure_dict(nnx.state(network, nnx.Param)))
    assert all(np.array_equal(ours[path], fresh[path]) for path in ours.keys() - encoder)
    objective = methods.make(settings).objective(graph, [6])
    state, metrics = training.make_train_step(objective, optimizer)(state, windows(4, 2, games=1))
    after = paths_and_bytes(state.params)
    assert np.isfinite(metrics["loss"]) and {path for path in after if after[path] == before[path]} == encoder


def test_an_encoder_of_single_frames_goes_nowhere_else(pretrained):
    with pytest.raises(transfer.TransferError, match=r"built_like = 'cql': a network of cql.*name a run of method dt"):
        begin(pretrained, initial="cpc", built_like="cql", parts="encoder")
    with pytest.raises(transfer.TransferError, match=r"built_like = 'cpc': a network of cpc.*name a run of method dt"):
        begin(pretrained, initial="scratch", built_like="cpc")
    with pytest.raises(transfer.TransferError, match=r"part '\w+' does not fit: .*absent.*take fewer parts"):
        begin(pretrained, initial="cpc", built_like="dt", parts="all")
    with pytest.raises(transfer.TransferError, match=r"part 'encoder' does not fit"):
        transfer.init_state(build(), training.make_optimizer(), transfer.load(pretrained / "cpc"), "encoder")


# Freezing.


def moments(opt_state):
    """Sizes of the arrays of the optimizer's state that are not counters."""
    return sum(leaf.size for leaf in jax.tree.leaves(opt_state) if leaf.ndim)


@pytest.mark.parametrize("parts, accumulate", zip(PARTS, (1, 2, 1)))
def test_frozen_parts_keep_their_bits_and_have_no_moments_and_the_rest_moves(run, parts, accumulate):
    _, _, state = start(transfer.load(run[0]), parts)
    trained = {
        path: leaf.size
        for path, leaf in training.flat_params(state.params).items()
        if not training.is_part(path, transfer.MODULES[parts])
    }
    assert moments(state.opt_state) == 2 * sum(trained.values())
    before, step = paths_and_bytes(state.params), compiled(run[0], parts, accumulate=accumulate)
    for number in range(10):
        state, metrics = step(state, make_batch(number))
    after = paths_and_bytes(state.params)
    assert {path for path in before if after[path] != before[path]} == trained.keys()
    assert np.isfinite(metrics["loss"]) and metrics["head_grad_rms"] > 0


def test_without_freezing_everything_moves(run):
    _, _, state = start(transfer.load(run[0]), freeze=False)
    before = paths_and_bytes(state.params)
    state, _ = compiled(run[0], freeze=False)(state, make_batch(0))
    after = paths_and_bytes(state.params)
    assert all(after[path] != before[path] for path in before)


def test_what_is_trained_gets_the_gradient_it_would_get_without_freezing(run):
    source, results = transfer.load(run[0]), []
    for freeze in (True, False):
        _, _, state = start(source, freeze=freeze)
        state, metrics = compiled(run[0], freeze=freeze)(state, make_batch(0))
        results.append((state.params, metrics))
    (frozen, metrics), (tuned, all_metrics) = results
    for name in frozen.keys() - {"encoder"}:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), frozen[name], tuned[name])
    np.testing.assert_allclose(metrics["loss"], all_metrics["loss"], rtol=1e-6)
    assert metrics["grad_norm"] < all_metrics["grad_norm"], "of the trained part alone"


def test_no_gradient_is_computed_for_what_is_frozen(run):
    """The backward pass of a convolution is convolutions: with the encoder frozen, only the forward ones are left."""
    counts = {}
    for freeze in (True, False):
        objective, optimizer, state = start(transfer.load(run[0]), freeze=freeze)
        update = training.make_update(objective, optimizer)
        text = str(jax.make_jaxpr(update)(state, make_batch(0), jax.random.key(0)))
        counts[freeze] = text.count("conv_general_dilated[")
    forward = str(jax.make_jaxpr(objective)(state.params, state.target_params, make_batch(0), jax.random.key(0)))
    assert counts[True] == forward.count("conv_general_dilated[") < counts[False]


def test_frozen_parts_need_no_memory_but_their_own(run):
    needed = {}
    for parts in ("encoder", "encoder + embedding"):
        objective, optimizer, state = start(transfer.load(run[0]), parts)
        trained = training.trained_part(state.params, optimizer.frozen)
        needed[parts] = training.memory_needed(objective, state, make_batch(0), frozen=optimizer.frozen)
        assert needed[parts]["gradients"] == devices.tree_bytes(trained) < devices.tree_bytes(state.params)
    objective, _, state = start(transfer.load(run[0]), freeze=False)
    tuned = training.memory_needed(objective, state, make_batch(0))
    for name in ("state", "activations", "total"):
        assert needed["encoder + embedding"][name] <= needed["encoder"][name] < tuned[name]


def test_freezing_everything_is_refused(run):
    source = transfer.load(run[0])
    names = (*source.names("all but the head"), "head_kernel", "head_bias")
    with pytest.raises(ValueError, match=r"everything is frozen .*nothing is left to train"):
        transfer.init_state(build(), training.make_optimizer(frozen=names), source, "encoder")


def test_a_resumed_run_is_bit_identical(run, tmp_path):
    _, _, state = start(transfer.load(run[0]))
    step, beginning = compiled(run[0]), jax.device_get(state)
    whole, part = (jax.tree.map(jnp.array, beginning) for _ in range(2))
    for number in range(8):
        whole, _ = step(whole, make_batch(number))
    for number in range(4):
        part, _ = step(part, make_batch(number))
    checkpoints = training.Checkpoints(tmp_path, ABOUT)
    checkpoints.save(part)
    part = checkpoints.restore(beginning)
    checkpoints.close()
    for number in range(4, 8):
        part, _ = step(part, make_batch(number))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(part), jax.device_get(whole))


def test_a_fine_tuned_run_is_a_source_itself(run, tmp_path):
    _, _, state = start(transfer.load(run[0]))
    state, _ = compiled(run[0])(state, make_batch(0))
    checkpoints = training.Checkpoints(tmp_path, ABOUT | {"method": "cql", "games": ["Pong"]})
    checkpoints.save(state)
    checkpoints.close()
    source = transfer.load(tmp_path)
    assert {path: leaf.tobytes() for path, leaf in source.params.items()} == paths_and_bytes(state.params)
