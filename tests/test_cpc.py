"""Contrastive predictive coding: its loss and pairs against a float64 reference, what it learns, what it cannot do."""

import contextlib
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_sequences
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import windows

from scaled_ql import devices, losses, methods, networks, parameters, training
from scaled_ql.methods.common import checked_objective
from scaled_ql.methods.cpc import successors
from scaled_ql.replay import open_replay, sample_sequences

# The loss and the pairs.


def reference_loss(scores, positive, candidates):
    """Cross-entropy of the right one, from probabilities."""
    offered = np.flatnonzero(candidates)
    p = np.exp(scores[offered] - scores[offered].max())
    return -np.log(p[offered.tolist().index(positive)] / p.sum())


of_scores = jax.jit(jax.value_and_grad(losses.info_nce))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.0, 0.5, 1.0]))
def test_the_loss_equals_the_reference_and_what_is_no_candidate_gets_no_gradient(seed, share):
    rng = np.random.default_rng(seed)
    scores, candidates, positive = 3 * rng.normal(size=6), rng.random(6) < share, int(rng.integers(6))
    candidates[positive] = True
    with jax.enable_x64(True):
        loss, gradient = of_scores(jnp.array(scores), jnp.int32(positive), candidates)
    np.testing.assert_allclose(loss, reference_loss(scores, positive, candidates), atol=1e-9)
    assert not np.asarray(gradient)[~candidates].any()


episode = st.tuples(st.integers(1, 9), st.booleans(), st.booleans(), st.booleans())


@settings(deadline=None, max_examples=10)
@given(
    episodes=st.dictionaries(st.sampled_from(["Pong", "Qbert"]), st.lists(episode, min_size=1, max_size=5), min_size=1),
    length=st.integers(2, 5),
    seed=st.integers(0, 2**32),
)
def test_pairs_are_real_successors_and_all_of_them(episodes, length, seed):
    """Frames of the store are noise, no two alike: the place of each is known, and with it which one follows."""
    with tempfile.TemporaryDirectory() as path:
        replay = open_replay(test_sequences.write(Path(path), episodes, seed))
        if not all(test_sequences.windows_by_hand(episodes[name], length) for name in replay.games):
            return
        batch = sample_sequences(replay, 3, 0, games_per_batch=4, transitions_per_game=2, length=length)
        pairs = successors(batch.mask, batch.terminal)
        place = {}
        for name in replay.games:
            for number in range(len(replay.episodes(name))):
                for step, frame in enumerate(replay.episode(name, number)["observation"]):
                    place[frame.tobytes()] = (name, number, step)
        for row in range(len(batch.game)):
            for step in range(length - 1):
                now, then = (place.get(batch.frames[row, at].tobytes()) for at in (step, step + 1))
                follows = bool(now and then) and now[:2] == then[:2] and now[2] + 1 == then[2]
                assert pairs[row, step] == follows, (now, then)


def test_nothing_follows_a_terminal_step_and_padding_is_no_step():
    mask = np.array([[False, True, True, True], [True, True, True, True]])
    terminal = np.array([[False, False, False, True], [False, True, False, False]])
    assert successors(mask, terminal).tolist() == [[False, True, True], [True, False, True]]


# The objective.


def made(method, encoder="nature_narrow", seed=0, **architecture):
    network = method.build(encoder, 2, seed, num_atoms=5, hidden_sizes=(8,), **architecture)
    optimizer = training.make_optimizer(1e-3, 1e-8)
    return network, optimizer, *training.init_state(network, optimizer)


def moved(params, seed=0):
    """Noise on all parameters: the bilinear form begins with zeros."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), params)


def by_hand(network, params, batch):
    """Loss of each pair in float64, its window, and whether the successor has the largest score."""
    tree = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def phi(frame):
        graph = nnx.merge(nnx.split(network, nnx.Param)[0], nnx.State(params))
        cells = np.asarray(graph.encoder(jnp.array(frame[None, :, :, None] / 255, jnp.float32)), np.float64)
        x = cells.reshape(-1) @ tree["projection"]["kernel"] + tree["projection"]["bias"]
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-6)
        return x * tree["norm"]["scale"] + tree["norm"]["bias"]

    pairs = []
    for row in range(len(batch.game)):
        for step in range(batch.mask.shape[1] - 1):
            if batch.mask[row, step] and batch.mask[row, step + 1] and not batch.terminal[row, step]:
                pairs.append((row, phi(batch.frames[row, step]), phi(batch.frames[row, step + 1])))
    found = []
    for number, (row, now, _) in enumerate(pairs):
        scores = np.array([now @ tree["bilinear"]["kernel"] @ then for _, _, then in pairs])
        found.append((row, reference_loss(scores, number, np.ones(len(pairs), bool)), scores.argmax() == number))
    return found


def test_the_objective_is_the_mean_over_pairs_of_the_loss_among_all_second_frames():
    method, batch = methods.cpc(sequence_length=3), windows(5, 3)
    batch.terminal[1, 1] = True
    network, _, graph, state = made(method)
    params = moved(state.params)
    objective = jax.jit(checked_objective(method.objective(graph, [18, 4])))
    loss, metrics = objective(params, None, batch, jax.random.key(0))
    pairs = by_hand(network, params, batch)
    assert len(pairs) == 6, "10, less one of each of 3 padded windows, less that after the terminal step"
    each = np.array([nll for _, nll, _ in pairs])
    assert np.ptp(each) > 0.1
    assert float(loss) == pytest.approx(each.mean(), rel=1e-4) == float(metrics["nll"]) == float(metrics["loss"])
    assert float(metrics["accuracy"]) == pytest.approx(np.mean([right for *_, right in pairs]), abs=1e-6)
    assert float(metrics["chance"]) == pytest.approx(1 / 6)
    games = np.array([batch.game[row] for row, *_ in pairs])
    np.testing.assert_allclose(metrics["nll_sum"], [each[games == game].sum() for game in (0, 1)], rtol=1e-4)
    assert metrics["nll_count"].tolist() == [(games == 0).sum(), (games == 1).sum()]
    other = batch._replace(frames=np.where(batch.mask[..., None, None], batch.frames, 77))
    assert objective(params, None, other, jax.random.key(0))[0] == loss, "what padding shows is not read"


def test_it_begins_at_chance_and_a_batch_without_a_pair_teaches_nothing():
    method, batch = methods.cpc(sequence_length=2), windows(6, 2)
    _, _, graph, state = made(method)
    objective = method.objective(graph, [18, 4])
    step = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (loss, metrics), _ = step(state.params, None, batch, jax.random.key(0))
    assert float(loss) == pytest.approx(np.log(3))
    assert float(metrics["accuracy"]) == pytest.approx(1 / 3) == float(metrics["chance"])
    batch.mask[:, 0] = False
    (loss, metrics), gradient = step(moved(state.params), None, batch, jax.random.key(0))
    assert loss == 0 == metrics["nll_count"].sum() and not any(leaf.any() for leaf in jax.tree.leaves(gradient))


def test_each_frame_is_shifted_by_itself():
    """Copies of one frame in all places: were a window's shift its own, it would tell which frames are its."""
    method = methods.cpc(sequence_length=2, random_shift=4)
    network, _, graph, state = made(method)
    seen = []

    class Watched(type(network)):
        def __call__(self, frames):
            jax.debug.callback(lambda x: seen.append(np.asarray(x)), frames)
            return super().__call__(frames)

    network.__class__ = Watched
    graph, _ = training.init_state(network, training.make_optimizer())
    frame = np.random.default_rng(0).integers(256, size=(84, 84), dtype=np.uint8)
    batch = windows(16, 2)._replace(frames=np.tile(frame, (16, 2, 1, 1)))
    method.objective(graph, [18, 4])(state.params, None, batch, jax.random.key(0))
    jax.effects_barrier()
    (frames,) = seen
    pairs = frames.reshape(16, 2, -1)
    assert len({x.tobytes() for x in frames}) > 20
    assert sum((now == then).all() for now, then in pairs) < 4, "one in 81"


@pytest.mark.parametrize("encoder, cells", [("resnet_narrow", "3 × 3 × 128"), ("vit_narrow", "6 × 6 × 96")])
def test_any_encoder_of_single_frames_will_do(encoder, cells):
    network = methods.cpc().build(encoder, 2)
    table = networks.layers(network)
    assert table["parameters"].sum() == networks.count_parameters(network)
    assert table["output"].tolist() == ["84 × 84 × 1", cells, "256", "1"]


def test_windows_of_a_single_step_are_refused():
    with pytest.raises(ValueError, match="sequence_length must be at least 2 steps, a frame and its successor, got 1"):
        methods.cpc(sequence_length=1)
    with pytest.raises(parameters.ParameterError, match=r"sequence_length \(1\): method 'cpc' needs at least 2"):
        parameters.check("04_scaled_training", {"method": "cpc", "sequence_length": 1})
    with pytest.raises(parameters.ParameterError, match="head, rewards, transformer: without effect in method 'cpc'"):
        values = {"method": "cpc", "rewards": "zero", "head": "mse", "transformer": "tiny"}
        parameters.check("04_scaled_training", values)
    assert methods.cpc().preferences is None, "it cannot play"


# Training.


def drifting(rng, size):
    """Windows of two frames: a square that moves by (7, 7), beside another one that is anywhere in the second frame."""
    frames = np.zeros((size, 2, 84, 84), np.uint8)
    for row in range(size):
        y, x = 7 * rng.integers(0, 9, 2)
        frames[row, 0, y : y + 14, x : x + 14] = 255
        frames[row, 1, y + 7 : y + 21, x + 7 : x + 21] = 255
        for step in range(2):
            y, x = rng.integers(0, 70, 2)
            frames[row, step, y : y + 7, x : x + 7] = 120
    batch = windows(size, 2)
    return batch._replace(frames=frames, mask=np.ones((size, 2), bool), game=np.zeros(size, np.int32))


def test_it_tells_the_next_frame_from_others_in_frames_it_has_not_seen():
    """The square's next place is certain, and one of 81; another square, grey and elsewhere each time, is noise."""
    method, rng = methods.cpc(sequence_length=2), np.random.default_rng(0)
    _, optimizer, graph, state = made(method)
    step = training.make_train_step(method.objective(graph, [18]), optimizer)
    for _ in range(150):
        state, _ = step(state, drifting(rng, 32))
    _, metrics = method.objective(graph, [18])(state.params, None, drifting(np.random.default_rng(9), 32), None)
    assert metrics["chance"] == pytest.approx(1 / 32)
    assert metrics["accuracy"] > 0.6, "among 32 windows, one in three shares its place with another"


def test_training_that_was_stopped_resumes_bit_identically(tmp_path):
    """On windows from a store, through the trainer."""
    data = open_replay(test_sequences.write(tmp_path / "replay", test_sequences.EPISODES))
    small = {"games_per_batch": 2, "transitions_per_game": 2, "num_steps": 4, "log_every": 1, "checkpoint_every": 2}
    small |= {"encoder": "nature_narrow", "sequence_length": 3, "random_shift": 4}
    p = parameters.check("04_scaled_training", {"method": "cpc", **small})
    mesh, method = devices.make_mesh(1), methods.make(p)
    network, optimizer, graph, _ = made(method)
    objective = method.objective(graph, [6, 6])

    def train(folder, until=None):
        trainer = training.Trainer(p, data, mesh, tmp_path / folder, tmp_path / folder)
        state = training.init_state(network, optimizer)[1]
        assert trainer.check_memory(objective, optimizer, state, method.batches)["activations"] > 0
        with contextlib.closing(trainer.steps(objective, optimizer, state, method.batches)) as steps:
            for state, log in steps:  # noqa: B007
                if until is not None and int(state.step) == until:
                    break
        return jax.device_get(state), log.table()

    train("stopped", until=3)
    (state, log), (expected, undisturbed) = train("stopped"), train("undisturbed")
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    columns = [name for name in log if not name.endswith("per_second")]
    assert log[columns].equals(undisturbed[columns]) and len(log) == 4 and np.isfinite(log["loss"]).all()
    assert {"accuracy", "chance", "head_grad_rms"} <= set(log)
