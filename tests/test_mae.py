"""The masked autoencoder: its loss and masks against a float64 reference, what it learns, what it cannot do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from test_vit import dense, normalise, transform, value

from scaled_ql import defaults, losses, methods, networks, parameters, replay, training, transfer
from scaled_ql.methods.mae import MaskedAutoencoder, is_hidden, visible_patches
from scaled_ql.networks.parts import channels_to_squares, squares_to_channels
from scaled_ql.networks.vit import patches
from scaled_ql.replay.batch import Batch


@pytest.fixture
def shallow(monkeypatch):
    monkeypatch.setitem(defaults.ENCODERS, "vit_narrow", ("vit", 96, 1, 3))


def reference_patches(image):
    """[N, 196 C], one pixel after another."""
    rows, columns = image.shape[0] // 14, image.shape[1] // 14
    return np.array(
        [
            [image[14 * r + i, 14 * c + j, k] for i in range(14) for j in range(14) for k in range(image.shape[2])]
            for r in range(rows)
            for c in range(columns)
        ],
        np.float64,
    )


def reference_loss(predicted, image, visible):
    """Mean over hidden patches of the mean over pixels, each patch compared with its standardised self."""
    errors = []
    for number, patch in enumerate(reference_patches(image)):
        if number not in visible:
            target = (patch - patch.mean()) / np.sqrt(((patch - patch.mean()) ** 2).sum() / len(patch) + 1e-6)
            errors.append(sum((a - b) ** 2 for a, b in zip(predicted[number], target)) / len(patch))
    return sum(errors) / len(errors)


# The loss and the mask.


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), visible=st.sets(st.integers(0, 5), max_size=5), flat=st.integers(0, 5))
def test_the_loss_equals_the_reference(seed, visible, flat):
    rng = np.random.default_rng(seed)
    image, predicted = rng.uniform(size=(28, 42, 2)), rng.normal(size=(6, 392))
    row, column = divmod(flat, 3)
    image[14 * row : 14 * row + 14, 14 * column : 14 * column + 14] = 0.3  # a patch of one grey level
    hidden = np.array([number not in visible for number in range(6)])
    with jax.enable_x64(True):
        cut = patches(jnp.array(image[None]))[0]
        loss = losses.masked_patch_loss(jnp.array(predicted), cut, jnp.array(hidden))
    np.testing.assert_allclose(loss, reference_loss(predicted, image, visible), rtol=1e-9)


def test_a_grey_patch_is_a_target_of_zeros_with_finite_gradients():
    patch = jnp.full((1, 784), 0.4)
    gradient = jax.grad(lambda x: losses.masked_patch_loss(jnp.ones((1, 784)), x, jnp.array([True])))(patch)
    mean, deviation = losses.patch_statistics(patch)
    np.testing.assert_allclose((patch - mean) / deviation, 0, atol=1e-3)
    assert np.isfinite(gradient).all()


def test_nine_of_thirty_six_are_visible_and_each_as_often_as_others():
    visible = np.asarray(visible_patches(jax.random.key(0), 4_000, 36))
    assert visible.shape == (4_000, 9) and all(len(set(row)) == 9 for row in visible.tolist())
    counts = np.bincount(visible.ravel(), minlength=36)
    assert np.abs(counts - 1_000).max() < 5 * np.sqrt(1_000)
    together = np.mean([(0 in row) and (1 in row) for row in visible.tolist()])
    assert together == pytest.approx(9 / 36 * 8 / 35, abs=0.02), "no grid, no blocks"
    hidden = np.asarray(is_hidden(jnp.array(visible[:50]), 36))
    assert all(set(np.flatnonzero(~row)) == set(seen) for row, seen in zip(hidden, visible[:50].tolist()))


def test_squares_and_channels_are_inverse():
    image = np.random.default_rng(0).normal(size=(2, 28, 42, 3))
    np.testing.assert_array_equal(channels_to_squares(squares_to_channels(image, 14), 14), image)


# The network.


def filled(make, seed=0):
    module, rng = nnx.eval_shape(make), np.random.default_rng(seed)
    state = nnx.state(module, nnx.Param)
    nnx.update(module, jax.tree.map(lambda x: jnp.array(rng.normal(size=x.shape) / np.sqrt(x.shape[0])), state))
    return module


def reference_network(images, visible, network):
    """Each image: the encoder on what is visible, the decoder on all patches; each [N, 196 C]."""
    vit, painted = network.encoder, []
    for image, seen in zip(images, visible):
        rows, columns = image.shape[0] // 14, image.shape[1] // 14

        def positions(width, columns=columns):
            quarter = width // 4
            frequencies = np.array([10_000 ** (-k / quarter) for k in range(quarter)])
            return lambda number: np.concatenate(
                [f(place * frequencies) for place in divmod(number, columns) for f in (np.sin, np.cos)]
            )

        cut, own, wide = reference_patches(image), positions(vit.width), positions(network.width)
        x = np.array([value(vit.class_token), *(dense(cut[n], vit.patch) + own(n) for n in seen)])
        for block in vit.blocks.layers:
            x = transform(x, block, np.ones((len(x), len(x)), bool))
        x = dense(normalise(x, vit.norm), network.narrowing)
        found = dict(zip(seen.tolist(), x[1:]))
        tokens = [found.get(n, value(network.mask_token)) + wide(n) for n in range(rows * columns)]
        y = np.array([x[0], *tokens])
        for block in network.blocks.layers:
            y = transform(y, block, np.ones((len(y), len(y)), bool))
        painted.append(dense(normalise(y[1:], network.norm), network.painting))
    return np.array(painted)


def test_the_network_equals_the_reference(monkeypatch):
    monkeypatch.setitem(defaults.ENCODERS, "vit_narrow", ("vit", 96, 2, 3))
    with jax.enable_x64(True):
        how = {"stack_size": 2, "mean_frames": None, "remat": False, "dtype": jnp.float64}
        network = filled(lambda: MaskedAutoencoder("vit_narrow", rngs=nnx.Rngs(0), **how))
        images = np.random.default_rng(1).uniform(size=(2, 28, 42, 2))
        visible = np.array([[4, 1, 0], [2, 5, 3]])
        painted = jax.jit(lambda network, *x: network(*x))(network, images, visible)
    expected = reference_network(images, visible, network)
    assert expected.std() > 0.1
    np.testing.assert_allclose(painted, expected, atol=2e-4)


@pytest.mark.parametrize(
    "encoder, width, depth, heads", [("vit_base", 512, 8, 16), ("vit_small", 256, 8, 8), ("vit_tiny", 128, 8, 4)]
)
def test_the_decoder_of_a_vit_base_is_the_papers(encoder, width, depth, heads):
    method = methods.mae()
    network = nnx.eval_shape(lambda: method.build(encoder, 2))
    assert (network.width, len(network.blocks.layers)) == (width, depth)
    assert {block.heads for block in network.blocks.layers} == {heads}
    layers = networks.layers(network)
    assert layers["parameters"].sum() == networks.count_parameters(network)
    assert layers["output"].tolist()[1:] == ["9 × 784", f"10 × {48 * heads}", f"36 × {width}", "27 × 784"]


def test_other_encoders_are_refused_before_anything_is_built():
    with pytest.raises(ValueError, match="must be a ViT, such as vit_base, got 'nature_narrow'"):
        methods.mae().build("nature_narrow", 1)
    with pytest.raises(parameters.ParameterError, match=r"encoder \('resnet101'\): method 'mae' needs one of vit_"):
        parameters.check("04_scaled_training", {"method": "mae"})
    with pytest.raises(parameters.ParameterError, match="head, rewards: without effect in method 'mae'"):
        values = {"method": "mae", "encoder": "vit_tiny", "rewards": "zero", "head": "mse"}
        parameters.check("04_scaled_training", values)
    assert methods.mae().preferences is None, "it cannot play"


# The objective, on real frames.


@pytest.fixture(scope="module")
def data(recording):
    return replay.open_replay(recording)


def sample(data, step, games=16, each=2) -> Batch:
    return replay.sample_batch(data, 3, step, games_per_batch=games, transitions_per_game=each, n_step=1, discount=0.9)


def test_the_objective_is_the_loss_of_what_is_hidden_in_the_step(shallow, data):
    method, batch, key = methods.mae(), sample(data, 0, games=4, each=1), jax.random.key(5)
    means = np.random.default_rng(0).integers(0, 256, (2, 84, 84)).astype(np.float32)
    network = method.build("vit_narrow", 2, mean_frames=means, num_atoms=5, hidden_sizes=(8,))
    graph, state = training.init_state(network, training.make_optimizer())
    loss, metrics = jax.jit(method.objective(graph, [4, 3]))(state.params, state.params, batch, key)
    visible = visible_patches(key, 4, 36)
    images = (batch.observation - means[batch.game][..., None]) / 255.0
    painted = np.asarray(
        jax.jit(lambda network, *x: network(*x))(network, jnp.array(images, jnp.float32), visible), np.float64
    )
    each = [reference_loss(*row) for row in zip(painted, images, np.asarray(visible).tolist())]
    assert float(loss) == pytest.approx(np.mean(each), rel=1e-3) == float(metrics["error"])
    for game in range(2):
        assert metrics["error_sum"][game] == pytest.approx(np.sum(np.array(each)[batch.game == game]), rel=1e-3)
    nothing = [reference_loss(0 * row[0], *row[1:]) for row in zip(painted, images, np.asarray(visible).tolist())]
    assert float(metrics["error_of_means"]) == pytest.approx(np.mean(nothing), rel=1e-3)


def test_pictures_show_what_is_seen_and_complete_the_rest(shallow, data):
    method, batch, key = methods.mae(), sample(data, 0, games=3, each=1), jax.random.key(5)
    network = method.build("vit_narrow", 2, mean_frames=np.full((2, 84, 84), 60, np.float32))
    graph, state = training.init_state(network, training.make_optimizer())
    pictures = {name: np.asarray(x) for name, x in method.pictures(graph)(state.params, batch, key).items()}
    masked, completed, frame = pictures.values()
    np.testing.assert_array_equal(frame, batch.observation[..., -1])
    for number, visible in enumerate(np.asarray(visible_patches(key, 3, 36)).tolist()):
        for patch in range(36):
            row, column = divmod(patch, 6)
            square = np.s_[number, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
            if patch in visible:
                np.testing.assert_array_equal(masked[square], frame[square])
                np.testing.assert_array_equal(completed[square], frame[square])
            else:
                assert (masked[square] == 128).all()
    assert completed.min() >= 0 and completed.max() <= 255 and (completed != frame).any()


@pytest.mark.usefixtures("optimized")
def test_it_completes_held_out_frames_better_than_the_mean_frame(shallow, data):
    """The last fifth of Breakout's recording is never trained on; errors on hidden patches, in normalised pixels.

    The rival sees all: the mean of the training frames, in place of what is hidden, standardised like the truth.
    """
    frames, rng, method = data.frames_at("Breakout", np.arange(600)), np.random.default_rng(0), methods.mae()

    def batch_of(size, first, last):
        newest = rng.integers(first + 3, last, size)
        stacks = np.stack([frames[number - 3 : number + 1] for number in newest])
        ones = np.ones(size, np.float32)
        return Batch(stacks, np.tile(np.arange(4, dtype=np.int32), (size, 1)), *[np.int32(0 * ones)] * 4)

    network = method.build("vit_narrow", 1)
    optimizer = training.make_optimizer(2e-3, 1e-8, decay_steps=250, warmup_steps=20)
    graph, state = training.init_state(network, optimizer)
    step = training.make_train_step(method.objective(graph, [4]), optimizer)
    for _ in range(250):
        state, _ = step(state, batch_of(32, 0, 480))
    batch, key = batch_of(32, 480, 600), jax.random.key(9)
    _, metrics = jax.jit(method.objective(graph, [4]))(state.params, state.params, batch, key)
    hidden = np.asarray(is_hidden(visible_patches(key, 32, 36), 36))
    mean = np.repeat(frames[:480].mean(0)[..., None], 4, axis=-1)
    targets, rival = (normalised(cut(image)) for image in (batch.observation, mean[None]))
    rival = ((rival - targets) ** 2).mean(-1)[hidden].mean()
    assert metrics["error"] < 0.9 * rival < metrics["error_of_means"], (float(metrics["error"]), rival)


def cut(images):
    return np.stack([reference_patches(image / 255) for image in images])


def normalised(patches):
    return (patches - patches.mean(-1, keepdims=True)) / np.sqrt(patches.var(-1, keepdims=True) + 1e-6)


def test_a_resumed_run_is_bit_identical(shallow, tmp_path, data):
    """Masks are a function of seed and step."""
    method = methods.mae(random_shift=4)
    optimizer = training.make_optimizer(1e-3, 1e-8, 4, warmup_steps=1, weight_decay=0.05)
    graph, state = training.init_state(method.build("vit_narrow", 2), optimizer)
    step = training.make_train_step(method.objective(graph, [4, 3]), optimizer, seed=7)
    beginning = jax.device_get(state)
    whole, part = (jax.tree.map(jnp.array, beginning) for _ in range(2))
    errors = []
    for _ in range(4):
        whole, metrics = step(whole, sample(data, 0, games=4, each=1))
        errors.append(float(metrics["error_of_means"]))
    assert len(set(errors)) == 4, "each step hides other patches of the same batch"
    for _ in range(2):
        part, _ = step(part, sample(data, 0, games=4, each=1))
    checkpoints = training.Checkpoints(tmp_path, {"method": "mae"})
    checkpoints.save(part)
    part = checkpoints.restore(beginning)
    checkpoints.close()
    for _ in range(2):
        part, _ = step(part, sample(data, 0, games=4, each=1))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(part), jax.device_get(whole))


# From its checkpoint into a Q-network.


def test_its_encoder_goes_into_a_q_network_frozen(shallow, tmp_path, data):
    values = {"method": "mae", "encoder": "vit_narrow", "hidden_sizes": [8], "num_atoms": 5}
    p = parameters.check("04_scaled_training", values)
    method, optimizer = methods.make(p), training.make_optimizer()
    checkpoints = training.Checkpoints(tmp_path / "checkpoints", training.about_run(p, ["Pong", "Qbert"], "of a test"))
    checkpoints.save(training.init_state(method.build(p.encoder, 2, 1), optimizer)[1])
    checkpoints.close()
    source = transfer.load(tmp_path)
    assert source.about["method"] == "mae" and "trained by mae on Pong, Qbert" in source.in_words("Breakout")
    q = methods.q_learning(atoms=jnp.linspace(-1, 1, 5))
    network = q.build(num_games=2, seed=2, **source.architecture)
    optimizer = training.make_optimizer(1e-3, 1e-8, frozen=source.names("encoder"))
    for parts in ("encoder + embedding", "all but the head"):
        with pytest.raises(transfer.TransferError, match=r"part 'embedding' does not fit: .*absent in .*fewer parts"):
            transfer.init_state(network, optimizer, source, parts)
    graph, state = transfer.init_state(network, optimizer, source, "encoder")
    step = training.make_train_step(q.objective(graph, [4, 3]), optimizer)
    before = {path: np.asarray(x) for path, x in training.flat_params(state.params).items()}
    state, metrics = step(state, sample(data, 0, games=4, each=1))
    assert np.isfinite(metrics["loss"])
    for path, after in training.flat_params(state.params).items():
        taken = training.is_part(path, ["encoder"])
        np.testing.assert_array_equal(before[path], source.params[path] if taken else before[path])
        assert np.array_equal(after, before[path]) == taken, path
