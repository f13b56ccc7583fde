"""Vision transformers against a float64 NumPy reference, their sizes, and their place among the encoders."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stacks import batch_of_stacks

from scaled_ql import defaults, methods, networks, training, transfer
from scaled_ql.networks import count_parameters, make_encoder
from scaled_ql.networks.parts import TransformerBlock
from scaled_ql.networks.vit import ViT, patches, sine_positions

call = jax.jit(lambda module, *inputs: module(*inputs))


def filled(make, seed=0):
    """The module with random values in every parameter, in float64: no scale is one, no bias zero."""
    module, rng = nnx.eval_shape(make), np.random.default_rng(seed)

    def draw(path, x):
        noise = rng.normal(size=x.shape)
        if len(x.shape) > 1:
            noise /= np.sqrt(x.shape[0])
        return jnp.array(1 + 0.2 * noise if "scale" in jax.tree_util.keystr(path) else noise)

    nnx.update(module, jax.tree_util.tree_map_with_path(draw, nnx.state(module, nnx.Param)))
    return module


# The reference: one token, one head, one number after another.


def value(parameter):
    return np.asarray(parameter[...], np.float64)


def dense(x, layer):
    return x @ value(layer.kernel) + value(layer.bias)


def normalise(x, layer):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * value(layer.scale) + value(layer.bias)


def gelu(x):
    return x * np.vectorize(lambda z: (1 + math.erf(z / math.sqrt(2))) / 2)(x)


def attend(x, block, allowed, entropies=None):
    """What the tokens [T, D] of one sequence read from those that `allowed` [T, T] lets them see."""
    tokens, width = x.shape
    size, read = width // block.heads, np.zeros_like(x)
    both = dense(x, block.attention)
    for head in range(block.heads):
        own = slice(head * size, (head + 1) * size)
        query, key, content = (both[:, part * width : (part + 1) * width][:, own] for part in range(3))
        for token in range(tokens):
            seen = np.flatnonzero(allowed[token])
            scores = np.array([query[token] @ key[other] for other in seen]) / math.sqrt(size)
            weights = np.exp(scores - scores.max())
            read[token, own] = (weights / weights.sum()) @ content[seen]
            if entropies is not None:
                entropies.append(-sum(p * math.log(p) for p in weights / weights.sum() if p) / math.log(tokens))
    return dense(read, block.projection)


def transform(x, block, allowed, entropies=None):
    x = x + attend(normalise(x, block.norm1), block, allowed, entropies)
    return x + dense(gelu(dense(normalise(x, block.norm2), block.expansion)), block.contraction)


def encode(image, vit, entropies=None):
    """One image [H, W, C] through a ViT, patch by patch; a list gets the mean entropy of each block's attention."""
    height, width, features = image.shape[0] // 14, image.shape[1] // 14, vit.width
    tokens = [value(vit.class_token)]
    for row in range(height):
        for column in range(width):
            pixels = [
                image[14 * row + i, 14 * column + j, channel]
                for i in range(14)
                for j in range(14)
                for channel in range(image.shape[2])
            ]
            position = [
                function(place / 10_000 ** (k / (features // 4)))
                for place in (row, column)
                for function in (math.sin, math.cos)
                for k in range(features // 4)
            ]
            tokens.append(dense(np.array(pixels), vit.patch) + position)
    x = np.array(tokens)
    for block in vit.blocks.layers:
        of_tokens = []
        x = transform(x, block, np.ones((len(x), len(x)), bool), of_tokens)
        if entropies is not None:
            entropies.append(np.mean(of_tokens))
    return normalise(x, vit.norm)[1:].reshape(height, width, features)


@pytest.mark.parametrize("masked", [False, True])
def test_the_block_equals_the_reference(masked):
    """With a mask as a decision transformer has it: blocks of two that see themselves and all before."""
    with jax.enable_x64(True):
        block = filled(lambda: TransformerBlock(12, 3, dtype=jnp.float64, rngs=nnx.Rngs(0)))
        x = np.random.default_rng(1).normal(size=(2, 6, 12))
        place = np.arange(6) // 2
        allowed = place[:, None] >= place if masked else np.ones((6, 6), bool)
        y = np.asarray(call(block, x, *([allowed[None, None]] if masked else [])))
    for row in range(2):
        np.testing.assert_allclose(y[row], transform(x[row], block, allowed), atol=1e-5)  # float32's softmax


def test_what_is_masked_has_no_part_in_the_result():
    block = TransformerBlock(12, 3, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = np.random.default_rng(1).normal(size=(1, 5, 12)).astype(np.float32)
    causal = np.tri(5, dtype=bool)[None, None]
    before, other = call(block, x, causal), x.copy()
    other[0, 3, 0] += 1
    changed = np.abs(call(block, other, causal) - before).max((0, 2)) > 1e-6
    assert changed.tolist() == [False, False, False, True, True]


def test_the_encoder_equals_the_reference():
    with jax.enable_x64(True):
        vit = filled(lambda: ViT(8, 2, 2, channels=3, group_size=4, remat=False, dtype=jnp.float64, rngs=nnx.Rngs(0)))
        images = np.random.default_rng(1).uniform(size=(2, 28, 42, 3))
        maps = np.asarray(call(vit, images))
    assert maps.shape == (2, 2, 3, 8)
    for image, features in zip(images, maps):
        np.testing.assert_allclose(features, encode(image, vit), atol=1e-6)  # positions are float32


@pytest.mark.parametrize("remat", [False, True])
def test_the_entropies_of_its_attention_equal_the_reference(remat):
    """One of each block and image, from 0, all attend to one token, to 1, all attend to all."""
    how = {"channels": 3, "group_size": 4, "remat": remat, "dtype": jnp.float64}
    with jax.enable_x64(True):
        vit = filled(lambda: ViT(8, 2, 2, **how, rngs=nnx.Rngs(0)))
        images = np.random.default_rng(1).uniform(size=(2, 28, 42, 3))
        maps, entropies = jax.jit(lambda vit, x: vit.with_entropies(x))(vit, images)
        plain = call(vit, images)
    np.testing.assert_allclose(maps, plain, atol=1e-12)
    expected = [[], []]
    for image, of_blocks in zip(images, expected):
        encode(image, vit, of_blocks)
    assert entropies.shape == (2, 2) and np.ptp(expected) > 0.01
    np.testing.assert_allclose(entropies, expected, atol=1e-5)  # float32


def test_a_temperature_brings_back_attention_that_collapsed(shallow):
    """It grows while the entropy is below its target, and falls above; without one, attention collapses further."""
    found, temperatures = {}, []
    for temperature in (0.0, 0.3):
        method = methods.q_learning(atoms=ATOMS, attention_temperature=temperature, attention_entropy=0.8)
        network = method.build(num_games=1, seed=0, **BUILT)
        kernel = network.encoder.blocks.layers[0].attention.kernel
        kernel[...] = kernel[...].at[:, :64].multiply(4)  # queries and keys
        optimizer = training.make_optimizer(3e-3, 1e-8)
        graph, state = training.init_state(network, optimizer)
        step = training.make_train_step(method.objective(graph, [3]), optimizer)
        for _ in range(40):
            state, metrics = step(state, make_batch())
            found.setdefault(temperature, []).append(float(metrics["attention_entropy"]))
            assert metrics["attention_entropy"] == metrics["attention_entropy_1"], "of one block"
            if temperature:
                temperatures.append(float(metrics["attention_temperature"]))
    assert found[0.0][0] == pytest.approx(found[0.3][0]) and found[0.0][0] < 0.4
    assert found[0.0][-1] < 0.1 and found[0.3][-1] > 0.8
    grows = np.diff(temperatures) > 0
    assert temperatures[0] == pytest.approx(0.3) and grows[:3].all() and not grows[-10:].any()


def test_the_objective_is_the_one_without_attention_and_the_lagrangian(shallow):
    plain, held = (methods.q_learning(atoms=ATOMS, attention_temperature=t, attention_entropy=0.9) for t in (0.0, 0.25))
    networks_ = [method.build(num_games=1, seed=0, **BUILT) for method in (plain, held)]
    states = [training.init_state(network, training.make_optimizer())[1] for network in networks_]
    assert {"log_temperature"} == states[1].params.keys() - states[0].params.keys()
    losses_, gradients = [], []
    for method, network, state in zip((plain, held), networks_, states):
        objective = method.objective(nnx.split(network, nnx.Param)[0], [3])
        gradient, metrics = jax.jit(jax.grad(objective, has_aux=True))(state.params, state.params, make_batch(), None)
        losses_.append(metrics)
        gradients.append(gradient)
    entropy = float(losses_[1]["attention_entropy"])
    assert entropy == pytest.approx(float(losses_[0]["attention_entropy"]), abs=1e-6) and entropy > 0.9
    assert losses_[1]["loss"] == pytest.approx(float(losses_[0]["loss"]) + 0.25 * (0.9 - entropy), abs=1e-5)
    np.testing.assert_allclose(gradients[1]["log_temperature"], [0.25 * (entropy - 0.9)], rtol=1e-3)
    assert r"\sum_l \alpha_l (0.9 - H_l / \log T)" in held.minimises and "alpha_l" not in plain.minimises


def test_only_a_network_with_attention_has_temperatures():
    with pytest.raises(
        ValueError, match="attention_temperature: encoder 'nature' has no attention; choose a ViT, or 0"
    ):
        networks.make_q_network("nature", 1, attention_temperature=0.1)


def test_patches_are_squares_in_the_order_in_which_one_reads():
    image = np.zeros((1, 84, 84, 4), np.float32)
    image[0, 14:28, 28:42] = 1
    image[0, 14, 29, 3] = 5
    cut = np.asarray(patches(image))
    assert cut.shape == (1, 36, 784) and np.flatnonzero(cut.any(-1)[0]).tolist() == [6 + 2]
    assert cut[0, 8, 7] == 5, "row 0, column 1, channel 3 of its patch"


def test_images_that_patches_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"images of 84 x 80 pixels cannot be cut into patches of 14 x 14; resize"):
        patches(jnp.zeros((1, 84, 80, 4)))
    with pytest.raises(ValueError, match="a width of 12 cannot be divided among 5 attention heads"):
        TransformerBlock(12, 5, dtype=jnp.float32, rngs=nnx.Rngs(0))


def test_positions_differ_and_are_the_same_distance_apart_everywhere():
    places = sine_positions(6, 6, 96).astype(np.float64)
    products = (places @ places.T).reshape(6, 6, 6, 6)
    assert len(np.unique(places, axis=0)) == 36
    for step in ((0, 1), (1, 0), (2, 3)):
        ahead = [
            products[r, c, r + step[0], c + step[1]] for r, c in np.ndindex(6 - step[0], 6 - step[1])
        ]  # of a sine and a cosine each: the cosine of the difference
        np.testing.assert_allclose(ahead, ahead[0], rtol=1e-5)


# Sizes: nothing is allocated.


@functools.cache
def abstract(encoder, **how):
    return nnx.eval_shape(lambda: make_encoder(encoder, rngs=nnx.Rngs(0), **how))


def maps_of(vit, dtype):
    return jax.eval_shape(lambda vit, x: vit(x), vit, jax.ShapeDtypeStruct((2, 84, 84, 4), dtype))


@pytest.mark.parametrize(
    "encoder, millions, width, depth, heads",
    [("vit_tiny", 5.5, 192, 12, 3), ("vit_small", 21.7, 384, 12, 6), ("vit_base", 85.8, 768, 12, 12)],
)
def test_sizes_are_the_literatures(encoder, millions, width, depth, heads):
    """Of patch 16 on ImageNet without the classifier and learned positions, in millions; and the sum over layers."""
    vit = abstract(encoder)
    block = 4 * width**2 + 2 * 4 * width**2 + (3 + 1 + 4 + 1) * width + 2 * 2 * width
    expected = (14 * 14 * 4 + 1) * width + width + depth * block + 2 * width
    assert count_parameters(vit) == expected == pytest.approx(1e6 * millions, rel=0.01)
    assert len(vit.blocks.layers) == depth and {layer.heads for layer in vit.blocks.layers} == {heads}
    assert width // heads == 64
    assert maps_of(vit, jnp.float32).shape == (2, 6, 6, width)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_computation_has_its_dtype_and_parameters_are_float32(dtype):
    vit = abstract("vit_narrow", dtype=jnp.dtype(dtype))
    assert maps_of(vit, jnp.dtype(dtype)).dtype == jnp.dtype(dtype)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(vit, nnx.Param)))


def test_features_have_both_signs():
    """Documented, and what the spatial embedding and the dense layer above are fed."""
    vit = make_encoder("vit_narrow", rngs=nnx.Rngs(0))
    features = np.asarray(call(vit, np.random.default_rng(0).uniform(size=(2, 84, 84, 4)).astype(np.float32)))
    np.testing.assert_allclose(features.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(features.std(-1), 1, atol=1e-3)


# Among the encoders: every method trains it, it is transferred and frozen. Of one block, which compiles sooner.


@pytest.fixture
def shallow(monkeypatch):
    monkeypatch.setitem(defaults.ENCODERS, "vit_narrow", ("vit", 32, 1, 2))


ATOMS = jnp.linspace(-1, 1, 5)
BUILT = {"encoder": "vit_narrow", "num_atoms": 5, "hidden_sizes": (8,), "embedding": "pointwise"}
BUILT |= {"normalize_features": True, "group_size": 4}
OWN = {"cql": {"atoms": ATOMS}, "bcq": {"atoms": ATOMS}, "return_bc": {"atoms": ATOMS}}


def make_batch(size=8):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, size, 84, 84, 4), np.uint8)
    action, reward = rng.integers(3, size=size).astype(np.int32), rng.normal(size=size).astype(np.float32)
    game = np.zeros(size, np.int32)
    return batch_of_stacks(frames[0], action, reward, np.full(size, 0.9, np.float32), frames[1], game)


def trained(method, network, optimizer, state, steps):
    objective = method.objective(nnx.split(network, nnx.Param)[0], [3])
    step, batch = training.make_train_step(objective, optimizer), make_batch()
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize("name", ["cql", "bcq", "bc", "return_bc"])
def test_every_method_trains_it(shallow, name):
    method = methods.METHODS[name](**OWN.get(name, {}))
    network = method.build(num_games=1, seed=0, **BUILT)
    optimizer = training.make_optimizer(3e-4, 1e-8, frozen=tuple(method.before))
    _, state = training.init_state(network, optimizer)
    before = {path: np.asarray(x) for path, x in training.flat_params(state.params).items()}
    state, losses = trained(method, network, optimizer, state, 20)
    assert losses[-1] < losses[0], "on one batch"
    for path, after in training.flat_params(state.params).items():
        if training.is_part(path, ["encoder", "q/encoder"]):
            assert (np.asarray(after) != before[path]).any(), path


def test_it_is_transferred_and_frozen(shallow, tmp_path):
    method = methods.q_learning(atoms=ATOMS)
    network, optimizer = method.build(num_games=2, seed=1, **BUILT), training.make_optimizer()
    checkpoints = training.Checkpoints(
        tmp_path / "checkpoints", BUILT | {"games": ["Pong", "Qbert"], "method": "cql", "seed": 1}
    )
    checkpoints.save(training.init_state(network, optimizer)[1])
    checkpoints.close()
    source = transfer.load(tmp_path)
    network = method.build(num_games=1, seed=2, **source.architecture)
    optimizer = training.make_optimizer(1e-3, 1e-8, frozen=source.names("encoder"))
    _, state = transfer.init_state(network, optimizer, source, "encoder")
    state, _ = trained(method, network, optimizer, state, 2)
    encoder = {path: x for path, x in training.flat_params(state.params).items() if training.is_part(path, ["encoder"])}
    assert len(encoder) == 2 + 1 + 12 + 2
    for path, after in encoder.items():
        np.testing.assert_array_equal(after, source.params[path])


def test_the_names_are_the_encoders():
    named = {name for name, (family, *_) in defaults.ENCODERS.items() if family == "vit"}
    assert named == {"vit_narrow", "vit_tiny", "vit_small", "vit_base"} <= set(networks.ENCODERS)


def test_the_small_comparison_is_one_of_equal_sizes():
    """Of encoder and first dense layer, as the paper counts; `params/batches/transformer_small.yaml`."""
    sizes = {}
    for encoder, embedding in (
        ("resnet_narrow", "pointwise"),
        ("vit_narrow", "attention"),
        ("vit_narrow", "pointwise"),
    ):
        how = {"hidden_sizes": (256, 256), "embedding": embedding}
        network = nnx.eval_shape(lambda encoder=encoder, how=how: networks.make_q_network(encoder, 2, **how))
        sizes[encoder, embedding] = count_parameters(network.encoder, network.embedding, network.hidden[0])
    resnet, attention, pointwise = sizes.values()
    assert attention == pytest.approx(resnet, rel=0.01)
    assert (resnet / 1e6, pointwise / 1e6) == pytest.approx((0.61, 1.30), abs=0.005)
