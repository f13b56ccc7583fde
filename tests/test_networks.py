"""Networks against a float64 NumPy forward pass, the paper's sizes, and the properties the trunk promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from scaled_ql import networks, training
from scaled_ql.networks import ENCODERS, count_parameters, encoders, make_encoder, make_q_network
from scaled_ql.networks.encoders import BasicBlock, BottleneckBlock
from scaled_ql.networks.q_network import SpatialEmbedding, normalize_features

call = jax.jit(lambda module, *inputs: module(*inputs))
OBSERVATION = np.random.default_rng(0).integers(0, 256, (3, 84, 84, 4), np.uint8)
GAME = np.array([0, 2, 1], np.int32)


def small(encoder="nature", head="c51", seed=0, **options):
    return make_q_network(encoder, 3, head, seed, **{"num_atoms": 11, "hidden_sizes": (16, 16)} | options)


def filled(make, seed=0):
    """The module with random values in every parameter: no scale is one, no bias zero."""
    module, rng = nnx.eval_shape(make), np.random.default_rng(seed)

    def draw(path, x):
        noise = rng.normal(size=x.shape)
        if len(x.shape) > 1:
            noise *= np.sqrt(2 / np.prod(x.shape[:-1]))
        return jnp.array(1 + 0.2 * noise if "scale" in jax.tree_util.keystr(path) else noise, x.dtype)

    nnx.update(module, jax.tree_util.tree_map_with_path(draw, nnx.state(module, nnx.Param)))
    return module


def flat(network):
    return training.flat_params(nnx.to_pure_dict(nnx.state(network, nnx.Param)))


# The reference: float64, one operation at a time, parameters read from the network.


def value(parameter):
    return np.asarray(parameter[...], np.float64)


def relu(x):
    return np.where(x > 0, x, 0)


def windows(x, size, stride, padding, fill):
    """Yield (row, column, every output position's pixel at that offset of its window)."""
    lengths = x.shape[1:3]
    if padding == "SAME":
        outputs = [-(-length // stride) for length in lengths]
        missing = [max((n - 1) * stride + size - length, 0) for n, length in zip(outputs, lengths)]
        edges = [(0, 0), *((total // 2, total - total // 2) for total in missing), (0, 0)]
        x = np.pad(x, edges, constant_values=fill)
    else:
        outputs = [(length - size) // stride + 1 for length in lengths]
    rows, columns = (np.arange(n) * stride for n in outputs)
    for i in range(size):
        for j in range(size):
            yield i, j, x[:, rows + i][:, :, columns + j]


def convolve(x, layer, stride=1, padding="SAME"):
    kernel = value(layer.kernel)
    y = sum(pixels @ kernel[i, j] for i, j, pixels in windows(x, len(kernel), stride, padding, 0.0))
    return y if layer.bias is None else y + value(layer.bias)


def max_pool(x):
    return functools.reduce(np.maximum, (pixels for _, _, pixels in windows(x, 3, 2, "SAME", -np.inf)))


def group_norm(x, layer, group_size):
    y = np.empty_like(x)
    for image in range(len(x)):
        for first in range(0, x.shape[-1], group_size):
            group = x[image, :, :, first : first + group_size]
            y[image, :, :, first : first + group_size] = (group - group.mean()) / np.sqrt(group.var() + 1e-6)
    return y * value(layer.scale) + value(layer.bias)


def residual_block(x, block, stride, group_size):
    if isinstance(block, BottleneckBlock):
        layers = [(block.conv1, block.norm1, 1), (block.conv2, block.norm2, stride), (block.conv3, block.norm3, 1)]
    else:
        layers = [(block.conv1, block.norm1, stride), (block.conv2, block.norm2, 1)]
    y = x
    for number, (conv, norm, step) in enumerate(layers):
        y = group_norm(convolve(relu(y) if number else y, conv, step), norm, group_size)
    if block.shortcut is not None:
        conv, norm = block.shortcut.layers
        x = group_norm(convolve(x, conv, stride), norm, group_size)
    return relu(x + y)


def encode_resnet(x, encoder, group_size):
    x = max_pool(relu(group_norm(convolve(x, encoder.conv, 2), encoder.norm, group_size)))
    for number, block in enumerate(encoder.blocks.layers):
        x = residual_block(x, block, 1 if number == 0 else 2, group_size)
    return x


def encode_nature(x, encoder, _):
    for layer, stride in zip(encoder.layers.layers[::2], (4, 2, 1)):
        x = relu(convolve(x, layer, stride, "VALID"))
    return x


def encode_impala(x, encoder, _):
    for stage in encoder.stages.layers:
        x = max_pool(convolve(x, stage.conv))
        for unit in stage.units.layers:
            x = x + convolve(relu(convolve(relu(x), unit.conv1)), unit.conv2)
    return relu(x)


def forward(network, encode, observation, game, group_size=4):
    x = encode(observation / 255.0, network.encoder, group_size)
    x = (x * value(network.embedding.kernel)).reshape(len(x), -1)
    shared = network.game_embedding is not None
    for number, layer in enumerate(network.hidden):
        kernel = value(layer.kernel)
        if number == 0 and shared:  # as BRC has it: one input
            embedded = value(network.game_embedding.embedding)[game]
            x = np.concatenate([x, embedded / np.sqrt((embedded**2).sum(1, keepdims=True))], 1)
            kernel = np.concatenate([kernel, value(network.game_layer.kernel)])
        x = x @ kernel + value(layer.bias)
        if number == 0:
            norm, mean, variance = network.layer_norm, x.mean(1, keepdims=True), x.var(1, keepdims=True)
            x = (x - mean) / np.sqrt(variance + 1e-6) * value(norm.scale) + value(norm.bias)
        x = relu(x)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    kernel, bias = value(network.head_kernel), value(network.head_bias)
    return np.stack(
        [row @ kernel[:, number] + bias[number] for row, number in zip(x, np.zeros(3, int) if shared else game)]
    )


@pytest.mark.parametrize("stride, inputs", [(1, 8), (2, 8), (1, 32)])
@pytest.mark.parametrize("block", [BasicBlock, BottleneckBlock])
def test_blocks_equal_reference(block, stride, inputs):
    with jax.enable_x64(True):
        module = filled(lambda: block(inputs, 8, stride, group_size=2, dtype=jnp.float64, rngs=nnx.Rngs(0)))
        x = np.random.default_rng(0).normal(size=(2, 7, 6, inputs))
        y = np.asarray(call(module, x))
    assert (module.shortcut is None) == (stride == 1 and inputs == 8 * block.expansion)
    np.testing.assert_allclose(y, residual_block(x, module, stride, 2), atol=1e-9)


@pytest.mark.parametrize(
    "encoder, encode, group_size",
    [("resnet_narrow", encode_resnet, 8), ("impala_x1", encode_impala, 4), ("nature", encode_nature, 4)],
)
@pytest.mark.parametrize("heads", ["per_game", "shared"])
def test_network_equals_reference(encoder, encode, group_size, heads):
    network = filled(lambda: small(encoder, group_size=group_size, heads=heads))
    outputs = call(network, OBSERVATION, GAME)
    expected = forward(network, encode, OBSERVATION, GAME, group_size).reshape(3, 18, 11)
    assert expected.std() > 0.05
    np.testing.assert_allclose(outputs, expected, atol=2e-5)


@pytest.mark.parametrize("group_size", [4, 8])
def test_a_group_has_group_size_neighbouring_channels(group_size):
    norm = filled(lambda: make_encoder("resnet_narrow", group_size=group_size, rngs=nnx.Rngs(0))).norm
    x = np.random.default_rng(0).normal(size=(1, 3, 3, 16)).astype(np.float32)
    other = x.copy()
    other[0, 1, 1, 5] += 1
    changed = np.any(call(norm, x) != call(norm, other), (0, 1, 2))
    assert np.flatnonzero(changed).tolist() == list(range(5 // group_size * group_size, 8))


# Sizes and shapes, without memory for the large ones.


@functools.cache
def abstract(encoder, head):
    def build():
        network = make_q_network(encoder, 40, head)
        return network, network(jnp.zeros((3, 84, 84, 4), jnp.uint8), jnp.zeros(3, jnp.int32))

    return nnx.eval_shape(build)


@pytest.mark.parametrize(
    "encoder, millions", [("resnet34", 30.7), ("resnet50", 61.3), ("resnet101", 80.3), ("resnet152", 95.9)]
)
def test_encoder_and_first_dense_layer_have_the_papers_size(encoder, millions):
    network, _ = abstract(encoder, "c51")
    count = count_parameters(network.encoder, network.embedding, network.hidden[0])
    assert count / 1e6 == pytest.approx(millions, abs=0.05)
    norms = [module for _, module in nnx.iter_modules(network) if isinstance(module, encoders.GroupNorm)]
    assert len(norms) == {"resnet34": 36, "resnet50": 53, "resnet101": 104, "resnet152": 155}[encoder]
    assert all(norm.group_size == 4 for norm in norms)


def test_trunk_and_heads_have_the_papers_layers():
    network, _ = abstract("nature", "c51")
    assert [layer.kernel.shape[1] for layer in network.hidden] == [2048, 1024, 1024, 1024]
    assert network.layer_norm.scale.shape == (2048,)
    assert count_parameters(network.head_kernel, network.head_bias) == 40 * (1024 + 1) * 18 * 51


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder_gives_logits(encoder):
    network, outputs = abstract(encoder, "c51")
    assert outputs.shape == (3, 18, 51) and outputs.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))


@pytest.mark.parametrize("encoder", ["resnet_narrow", "impala_x16", "nature"])
def test_mse_head_gives_values(encoder):
    _, outputs = abstract(encoder, "mse")
    assert outputs.shape == (3, 18) and outputs.dtype == jnp.float32


def test_count_parameters():
    linear = nnx.eval_shape(lambda: nnx.Linear(5, 7, rngs=nnx.Rngs(0)))
    assert count_parameters(linear) == 42
    assert count_parameters(linear, {"a": np.zeros((2, 3)), "b": [np.zeros(4)]}, linear) == 42 + 10 + 42


@pytest.mark.parametrize(
    "options", [{}, {"mean_frames": np.zeros((3, 84, 84)), "normalize_features": False, "heads": "shared"}]
)
@pytest.mark.parametrize("encoder, head", [("nature", "c51"), ("resnet_narrow", "mse")])
def test_layers_hold_all_parameters_and_name_what_they_make(encoder, head, options):
    network = filled(lambda: small(encoder, head, embedding="sum", **options))
    table = networks.layers(network)
    assert table["parameters"].sum() == count_parameters(network)
    assert ("feature normalisation" in set(table["layer"])) == network.normalize
    features = table["output"][2]
    assert f"{network.embedding.features}" == features
    assert table["output"].iloc[-1] == ("18 × 11" if head == "c51" else "18")
    assert "mean" in table["layer"][0] if options else table["layer"][0] == "observation, pixels"


def test_mean_frames_are_no_trained_parameters():
    plain, centred = (nnx.eval_shape(lambda m=m: small(mean_frames=m)) for m in (None, np.zeros((3, 84, 84))))
    both = nnx.eval_shape(lambda: networks.BCQNetwork(small(mean_frames=np.zeros((3, 84, 84))), small(head="mse")))
    assert count_parameters(plain) == count_parameters(centred)
    assert count_parameters(both) == count_parameters(centred) + count_parameters(both.behaviour)
    assert count_parameters(nnx.to_pure_dict(nnx.state(centred, nnx.Param))) == count_parameters(plain)


# The spatial embedding.


def test_embeddings_equal_loops():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    start = SpatialEmbedding("pointwise", 3, 4, 5, dtype=jnp.float32, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(call(start, x), x.reshape(2, 60))
    pointwise, summed, attended, pooled = (
        filled(lambda kind=kind: SpatialEmbedding(kind, 3, 4, 5, dtype=jnp.float32, rngs=nnx.Rngs(0)))
        for kind in ("pointwise", "sum", "attention", "none")
    )
    assert (pointwise.features, summed.features, attended.features, pooled.features) == (60, 40, 40, 5)
    expected = {"pointwise": np.zeros((2, 60)), "none": np.zeros((2, 5))}
    expected |= {"sum": np.zeros((2, 40)), "attention": np.zeros((2, 40))}
    weights = np.exp(x.astype(np.float64) @ value(attended.kernel))  # [2, 3, 4, 8]
    for b, h, w, c in np.ndindex(x.shape):
        expected["pointwise"][b, (h * 4 + w) * 5 + c] = x[b, h, w, c] * value(pointwise.kernel)[h, w, c]
        expected["none"][b, c] += x[b, h, w, c] / 12
        for f in range(8):
            expected["sum"][b, c * 8 + f] += x[b, h, w, c] * value(summed.kernel)[h, w, c, f]
            expected["attention"][b, c * 8 + f] += x[b, h, w, c] * weights[b, h, w, f] / weights[b, :, :, f].sum()
    for module in (pointwise, summed, attended, pooled):
        np.testing.assert_allclose(call(module, x), expected[module.kind], atol=1e-5)
    assert [len(jax.tree.leaves(nnx.state(m, nnx.Param))) for m in (pointwise, summed, attended, pooled)] == [
        1, 1, 1, 0,
    ]  # fmt: skip


@pytest.mark.parametrize("embedding", ["sum", "attention", "none"])
def test_networks_of_the_other_embeddings_have_their_widths(embedding):
    network = nnx.eval_shape(lambda: small("resnet_narrow", embedding=embedding))
    assert network.hidden[0].kernel.shape == (128 * (1 if embedding == "none" else 8), 16)


# Feature normalisation.


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.floats(-3, 6))
def test_normalized_features_have_unit_norm(seed, exponent):
    x = np.random.default_rng(seed).normal(size=(2, 9)).astype(np.float32) * np.float32(10**exponent)
    y = np.asarray(normalized(x))
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(y, x / np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True), atol=1e-5)


normalized = jax.jit(normalize_features)
gradient_of_normalized = jax.jit(jax.grad(lambda x, weights: (normalize_features(x) * weights).sum()))


def test_gradients_pass_through_the_norm():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(2, 7)).astype(np.float32)

    def loss(x):
        return (x / np.sqrt((x**2).sum()) * weights).sum()

    steps = 1e-6 * np.eye(7)
    expected = [(loss(x.astype(np.float64) + step) - loss(x - step)) / 2e-6 for step in steps]
    gradient = gradient_of_normalized(x, weights)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)
    np.testing.assert_allclose(gradient @ x, 0, atol=1e-5)  # none along x: its length does not matter


def test_zero_features_stay_zero_with_finite_gradients():
    x = jnp.zeros((2, 5))
    np.testing.assert_array_equal(normalized(x), x)
    assert np.isfinite(gradient_of_normalized(x, jnp.ones((2, 5)))).all()


def test_normalize_features_switch():
    features = jax.jit(lambda network: network.features(OBSERVATION, GAME))
    on, off = (np.asarray(features(filled(lambda s=s: small(normalize_features=s)))) for s in (True, False))
    lengths = np.linalg.norm(off, axis=1, keepdims=True)
    assert (abs(lengths - 1) > 0.01).all()
    np.testing.assert_allclose(on, off / lengths, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 6, 11, 21, 84])
def test_max_pool_and_its_gradient_equal_a_window_reduction(size):
    rng = np.random.default_rng(size)
    x = rng.normal(size=(2, size, size + 1, 3)).astype(np.float32)
    y = rng.normal(size=(2, -(-size // 2), size // 2 + 1, 3)).astype(np.float32)

    @jax.jit
    def pooled_with_gradients(x, y):
        pools = lambda x: nnx.max_pool(x, (3, 3), (2, 2), padding="SAME"), encoders.max_pool
        (expected, gradient), (pooled, own_gradient) = (jax.vjp(pool, x) for pool in pools)
        return expected, gradient(y)[0], pooled, own_gradient(y)[0]

    expected, gradient, pooled, own_gradient = pooled_with_gradients(x, y)
    np.testing.assert_array_equal(pooled, expected)
    np.testing.assert_allclose(own_gradient, gradient, atol=1e-6)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("size, stride", [(7, 2), (8, 4), (3, 2), (5, 4), (4, 4), (2, 2), (1, 2)])
def test_strided_convolutions(size, stride, padding):
    with jax.enable_x64(True):
        rng = np.random.default_rng(size)
        x, kernel = (jnp.array(rng.normal(size=shape)) for shape in ((2, 20, 20, 4), (size, size, 4, 5)))
        dimensions = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        expected = jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, **dimensions)
        convolve = jax.jit(encoders.strided_convolution, static_argnums=(2, 3))
        np.testing.assert_allclose(convolve(x, kernel, stride, padding), expected, atol=1e-12)


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match=r"16 channels cannot be divided .* group_size = 3"):
        make_q_network("resnet_narrow", 1, group_size=3)


# Heads, seeds, precision, names.


def test_a_game_uses_its_own_head_alone():
    network = filled(small)
    same = np.repeat(OBSERVATION[:1], 3, axis=0)
    before = np.asarray(call(network, same, np.arange(3, dtype=np.int32)))
    assert all(np.abs(before[a] - before[b]).max() > 0.01 for a, b in ((0, 1), (1, 2), (0, 2)))
    network.head_kernel[...] = network.head_kernel[...].at[:, 1].add(0.5)
    network.head_bias[...] = network.head_bias[...].at[1].add(0.5)
    after = np.asarray(call(network, same, np.arange(3, dtype=np.int32)))
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    assert (after[1] != before[1]).all()
    np.testing.assert_array_equal(call(network, same, np.array([2, 0, 2], np.int32)), after[[2, 0, 2]])


def test_a_shared_head_is_one_games_whatever_their_number_and_the_rest_begins_alike():
    """Parameters and bytes; for the paper's 40 games and layers 37 million fewer."""
    networks = {heads: small(heads=heads) for heads in ("per_game", "shared")}
    own, shared = ({path: x.shape for path, x in flat(network).items()} for network in networks.values())
    assert (
        shared.keys() - own.keys() == {"game_embedding/embedding", "game_layer/kernel"} and own.keys() <= shared.keys()
    )
    assert {path for path in own if own[path] != shared[path]} == {"head_kernel", "head_bias"}
    saved = 2 * (16 + 1) * 18 * 11 - 3 * 32 - 32 * 16
    assert count_parameters(networks["per_game"]) - count_parameters(networks["shared"]) == saved
    for path, x in flat(networks["per_game"]).items():
        if not path.startswith("head_"):
            np.testing.assert_array_equal(x, flat(networks["shared"])[path])
    lengths = np.linalg.norm(small(heads="shared", seed=1).game_layer.kernel[...], axis=0)
    assert lengths.mean() == pytest.approx(1, rel=0.1), "as much as the game alone would give the first layer"


def test_of_a_games_embedding_the_direction_counts_and_only_for_that_game():
    network = filled(lambda: small(heads="shared"))
    same = np.repeat(OBSERVATION[:1], 3, axis=0)
    games = np.arange(3, dtype=np.int32)
    before = np.asarray(call(network, same, games))
    assert all(np.abs(before[a] - before[b]).max() > 0.01 for a, b in ((0, 1), (1, 2), (0, 2)))
    table = network.game_embedding.embedding
    table[...] = table[...].at[1].multiply(7)
    np.testing.assert_allclose(call(network, same, games), before, atol=1e-5)
    table[...] = table[...].at[1].multiply(-1)
    after = np.asarray(call(network, same, games))
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    assert np.abs(after[1] - before[1]).max() > 0.01


def test_a_row_does_not_depend_on_its_batch():
    network = filled(lambda: small("resnet_narrow", group_size=8))
    together = call(network, OBSERVATION, GAME)
    changed = OBSERVATION.copy()
    changed[1:] = 255 - changed[1:]
    np.testing.assert_array_equal(call(network, changed, GAME)[0], together[0])


def test_seed_determines_the_parameters():
    first, again, other = (jax.tree.leaves(nnx.state(small(seed=seed), nnx.Param)) for seed in (0, 0, 1))
    for a, b in zip(first, again):
        np.testing.assert_array_equal(a, b)
    kernels = [(a, b) for a, b in zip(first, other) if np.ptp(a) > 0]
    assert len(kernels) == 3 + 2 + 1 and all(np.abs(a - b).min() < np.abs(a - b).max() for a, b in kernels)


def test_initial_scales():
    network = small()
    convolution, head = network.encoder.layers.layers[2].kernel, network.head_kernel
    assert np.std(convolution) == pytest.approx((2 / (4 * 4 * 64)) ** 0.5, rel=0.05)  # He et al., fan out
    assert np.std(head) == pytest.approx((1 / 16) ** 0.5, rel=0.05)  # a head sees 16 features, whatever the games


def test_bfloat16_computes_roughly_the_same_with_float32_parameters():
    exact, rough = (filled(lambda d=d: small("resnet_narrow", dtype=d, group_size=8)) for d in ("float32", "bfloat16"))
    for a, b in zip(*(jax.tree.leaves(nnx.state(network, nnx.Param)) for network in (exact, rough))):
        assert b.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)
    a, b = (np.asarray(call(network, OBSERVATION, GAME)) for network in (exact, rough))
    assert b.dtype == np.float32
    error = np.abs(a - b).max()
    assert 1e-5 < error < 0.1 * np.abs(a).max()


def test_heads_in_bfloat16_do_not_round_their_product():
    """Values near 8: of features and kernels that bfloat16 holds exactly, the sum is exact to float32's precision."""
    network, rng = small(head="mse", dtype="bfloat16"), np.random.default_rng(0)
    features = rng.uniform(0.5, 1, (400, 16)).astype(jnp.bfloat16)
    kernel = rng.uniform(0.5, 0.9, (16, 3, 18)).astype(jnp.bfloat16)
    network.head_kernel[...] = jnp.array(kernel, jnp.float32)
    values = jax.jit(lambda network, *x: network.heads(*x))(network, features, np.zeros(400, np.int32))
    expected = features.astype(np.float64) @ kernel.astype(np.float64)[:, 0]
    assert values.dtype == jnp.float32
    assert 7 < expected.mean() < 9
    np.testing.assert_allclose(values, expected, atol=1e-5)
    rounded = np.asarray(expected.astype(jnp.bfloat16), np.float64)
    assert np.abs(rounded - expected).max() > 0.01
    assert len(np.unique(values)) > 10 * len(np.unique(rounded))


@pytest.mark.parametrize("head", ["c51", "mse"])
def test_head_bias_is_every_actions_start_and_changes_nothing_else(head):
    bias = np.random.default_rng(0).normal(size=11)
    plain, biased = small(head=head), small(head=head, head_bias=bias)
    difference = call(biased, OBSERVATION, GAME) - call(plain, OBSERVATION, GAME)
    expected = np.zeros((3, 18)) if head == "mse" else np.broadcast_to(bias, (3, 18, 11))
    np.testing.assert_allclose(difference, expected, atol=1e-5)
    biased.head_bias[...] = plain.head_bias[...]
    for a, b in zip(*(jax.tree.leaves(nnx.state(network, nnx.Param)) for network in (plain, biased))):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "make, names",
    [
        (lambda: make_q_network("resnet18", 3), ["resnet18", *ENCODERS]),
        (lambda: networks.make_encoder("vgg", rngs=nnx.Rngs(0)), ["vgg", *ENCODERS]),
        (lambda: make_q_network("nature", 3, "iqn"), ["iqn", "c51", "mse"]),
        (lambda: make_q_network("nature", 3, heads="own"), ["unknown heads", "own", "per_game", "shared"]),
        (lambda: small(embedding="max"), ["max", "pointwise", "sum", "attention", "none"]),
    ],
)
def test_unknown_names_are_refused_with_the_choices(make, names):
    with pytest.raises(ValueError) as error:
        make()
    assert all(name in str(error.value) for name in names)


def test_mean_frames_are_subtracted_of_each_rows_own_game():
    means = np.random.default_rng(1).integers(0, 256, (3, 84, 84))
    plain, centred = small(seed=4), small(seed=4, mean_frames=means)
    still = np.repeat(means[GAME].astype(np.uint8)[..., None], 4, axis=-1)  # a game's own mean: nothing is left of it
    np.testing.assert_allclose(call(centred, still, GAME), call(plain, np.zeros_like(still), GAME), atol=1e-5)
    zero = small(seed=4, mean_frames=np.zeros((3, 84, 84)))
    np.testing.assert_array_equal(call(zero, OBSERVATION, GAME), call(plain, OBSERVATION, GAME))


def test_mean_frames_have_no_gradient():
    network = small(mean_frames=np.full((3, 84, 84), 100.0))
    graph, params = nnx.split(network, nnx.Param)
    gradient = jax.grad(lambda params: nnx.merge(graph, params)(OBSERVATION, GAME).sum())(params)
    assert not gradient["mean_frames"][...].any()
    assert gradient["head_bias"][...].any()
