"""The decision transformer: its sizes, what each token sees, and all it computes in plain NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import special

from scaled_ql import networks
from scaled_ql.networks.transformer import token_mask

LENGTH, RETURNS = 3, 7


@functools.cache
def network(returns=RETURNS, dtype="float32", remat=False, tokenizer="patches"):
    how = {"length": LENGTH, "num_returns": returns, "dtype": dtype, "remat": remat, "tokenizer": tokenizer}
    return networks.make_decision_transformer("tiny", 1, **how)


@functools.cache
def inputs():
    rng = np.random.default_rng(0)
    frames = rng.integers(256, size=(2, LENGTH, 84, 84), dtype=np.uint8)
    action, reward = rng.integers(18, size=(2, LENGTH)), rng.integers(4, size=(2, LENGTH))
    return frames, np.array([5, 2]), action, reward


@nnx.jit
def predict(net, frames, first_return, action, reward):
    return net(frames, first_return, action, reward)


@pytest.mark.parametrize("size, layers, width, published", [("40M", 6, 768, 42e6), ("200M", 10, 1280, 197e6)])
def test_sizes_are_the_published_ones_and_all_that_the_specification_lists(size, layers, width, published):
    net = nnx.eval_shape(lambda: networks.make_decision_transformer(size))
    blocks = networks.count_parameters(net.blocks)
    assert 12 * layers * width**2 == pytest.approx(published, rel=0.015)
    assert blocks == pytest.approx(12 * layers * width**2, rel=0.01)
    embeddings = (14 * 14 + 1) * width + 36 * width + 4 * 39 * width + (120 + 18 + 4) * width
    heads = (width + 1) * (120 + 18 + 4)
    of_block = 3 * width * (width + 1) + width * (width + 1) + width * 4 * (width + 1) + (4 * width + 1) * width
    of_block += 2 * 2 * width
    assert networks.count_parameters(net) == embeddings + heads + layers * of_block + 2 * width
    table = networks.layers(net)
    assert table["parameters"].sum() == networks.count_parameters(net)
    clone = nnx.eval_shape(lambda: networks.make_decision_transformer(size, num_returns=0))
    fewer = 4 * width + 120 * width + 120 * (width + 1)  # positions, table and head of the returns
    assert networks.count_parameters(clone) == networks.count_parameters(net) - fewer


@pytest.mark.parametrize("has_returns, patches", [(True, 36), (False, 36), (True, 9)])
def test_a_token_sees_the_past_and_its_own_frame_and_the_first_return_alone(has_returns, patches):
    kinds = ["patch"] * patches + ["return"] * has_returns + ["action", "reward"]
    tokens = [(step, kind) for step in range(LENGTH) for kind in kinds]
    mask = token_mask(LENGTH, has_returns, patches)
    assert mask.shape == (len(tokens), len(tokens))
    for i, (step, kind) in enumerate(tokens):
        for j, (other, what) in enumerate(tokens):
            own_frame = step == other and kind == what == "patch"
            assert mask[i, j] == ((j <= i or own_frame) and not (what == "return" and other > 0))


def by_hand(net, frames, first_return, action, reward):
    """The network in float64, one window, one head, one token after another."""
    as64 = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
    tree = as64(nnx.to_pure_dict(nnx.state(net, nnx.Param)))

    def dense(layer, x):
        return x @ layer["kernel"] + layer["bias"]

    def norm(layer, x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * layer["scale"] + layer["bias"]

    def gelu(x):
        return x * (1 + special.erf(x / np.sqrt(2))) / 2

    def cells(frame):
        """What a frame's tokens are made of, row by row."""
        if net.encoder:
            found = np.asarray(net.encoder(jnp.array(frame[None, :, :, None] / 255, jnp.float32)), np.float64)
            return found.reshape(-1, found.shape[-1])
        return [frame[14 * y : 14 * y + 14, 14 * x : 14 * x + 14].reshape(-1) / 255 for y in range(6) for x in range(6)]

    per_step, outputs = net.per_step, ([], [], [], [])
    for row in range(len(action)):
        tokens = []
        for step in range(action.shape[1]):
            for number, cell in enumerate(cells(frames[row, step])):
                tokens.append(dense(tree["patch"], cell) + tree["patch_position"][number])
            if net.num_returns:
                tokens.append(tree["returns"][first_return[row]] if step == 0 else np.zeros(128))
            tokens += [tree["actions"][action[row, step]], tree["rewards"][reward[row, step]]]
        x = np.array(tokens) + tree["position"][: len(tokens)]
        mask = token_mask(action.shape[1], bool(net.num_returns), net.patches)
        for block in tree["blocks"].values():
            q, k, v = np.split(dense(block["attention"], norm(block["norm1"], x)), 3, axis=1)
            seen = np.zeros_like(x)
            for head in range(2):
                part = slice(64 * head, 64 * head + 64)
                for token in range(len(x)):
                    weights = np.exp(k[mask[token]][:, part] @ q[token, part] / 8)
                    seen[token, part] = weights @ v[mask[token]][:, part] / weights.sum()
            x = x + dense(block["projection"], seen)
            x = x + dense(block["contraction"], gelu(dense(block["expansion"], norm(block["norm2"], x))))
        x = norm(tree["norm"], x)
        if net.num_returns:
            outputs[0].append(dense(tree["return_head"], x[net.patches - 1 :: per_step]))
        outputs[1].append(dense(tree["action_head"], x[per_step - 3 :: per_step]))
        outputs[2].append(dense(tree["reward_head"], x[per_step - 2 :: per_step]))
        outputs[3].append(x[per_step - 3 :: per_step])
    return [np.array(output) for output in outputs]


@pytest.mark.parametrize("returns, tokenizer", [(RETURNS, "patches"), (0, "patches"), (RETURNS, "nature_narrow")])
def test_predictions_equal_a_float64_reference(returns, tokenizer):
    net = network(returns, tokenizer=tokenizer)
    assert net.patches == {"patches": 36, "nature_narrow": 49}[tokenizer]
    assert networks.layers(net)["parameters"].sum() == networks.count_parameters(net)
    predicted, expected = predict(net, *inputs()), by_hand(net, *inputs())
    assert [x.shape[2] for x in predicted[:3]] == [returns, 18, 4]
    for ours, wanted in zip(predicted, expected, strict=True):
        assert ours.dtype == jnp.float32
        if wanted.size:
            np.testing.assert_allclose(ours, wanted, atol=2e-5)


def test_nothing_sees_what_comes_later():
    """Changing an input changes what follows it, and nothing before."""
    frames, first, action, reward = inputs()
    base = [np.asarray(x) for x in predict(network(), *inputs())]

    def changed(**new):
        values = {"frames": frames, "first": first, "action": action, "reward": reward} | new
        now = predict(network(), *values.values())
        return [(np.abs(np.asarray(x) - y) > 1e-6).any(-1).all(0).tolist() for x, y in zip(now, base)]

    with_last = frames.copy()
    with_last[:, 1, 83, 83] ^= 255  # in the frame's last patch: seen by all of it, and so by the next prediction
    assert changed(frames=with_last) == [[False, True, True]] * 4
    with_first = frames.copy()
    with_first[:, 1, 0, 0] ^= 255
    assert changed(frames=with_first) == [[False, True, True]] * 4
    assert changed(first=(first + 1) % RETURNS) == [[False, True, True], *[[True] * 3] * 3]
    other = action.copy()
    other[:, 1] = (other[:, 1] + 1) % 18
    after = [False, False, True]
    assert changed(action=other) == [after, after, [False, True, True], after]
    other = reward.copy()
    other[:, 1] = (other[:, 1] + 1) % 4
    assert changed(reward=other) == [after] * 4


def test_a_shorter_window_is_the_beginning_of_a_longer_one():
    whole = predict(network(), *inputs())
    frames, first, action, reward = inputs()
    part = predict(network(), frames[:, :1], first, action[:, :1], reward[:, :1])
    for ours, wanted in zip(part, whole):
        np.testing.assert_allclose(ours, wanted[:, :1], atol=1e-5)


def test_bfloat16_rounds_and_rematerialisation_changes_nothing():
    exact = predict(network(), *inputs())
    rounded = predict(network(dtype="bfloat16"), *inputs())
    for ours, wanted in zip(rounded, exact):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, wanted, atol=0.1)

    @nnx.jit
    def gradient(net, key):
        graph, params = nnx.split(net, nnx.Param)

        def loss(params):
            predictions = nnx.merge(graph, params)(*inputs(), key)
            return sum(jnp.square(x).mean() for x in predictions)

        return jax.grad(loss)(params)

    plain, again = (gradient(network(remat=remat), jax.random.key(3)) for remat in (False, True))
    for ours, wanted in zip(jax.tree.leaves(again), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=1e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain))


def test_dropout_is_a_function_of_its_key():
    drop = nnx.jit(lambda net, seed: net(*inputs(), jax.random.key(seed)).actions)
    first, again, other = (drop(network(), seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3 < np.abs(first - predict(network(), *inputs()).actions).max()


def test_what_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"unknown transformer '80M'; there are tiny, 40M, 200M\."):
        networks.make_decision_transformer("80M")
    with pytest.raises(ValueError, match="unknown encoder 'pixels'; there are resnet34"):
        networks.make_decision_transformer("tiny", tokenizer="pixels")
    with pytest.raises(ValueError, match="length must be at least 1 step, got 0"):
        networks.make_decision_transformer("tiny", length=0)
