"""Arithmetic of what a step costs against sums by hand and the compiler's own count; the comparison's fairness."""

import itertools
import time

import jax
import numpy as np
import pandas as pd
import pytest

from scaled_ql import networks, performance
from scaled_ql.games import NUM_ACTIONS

SMALL = {"hidden_sizes": (16,)}


def conv(side, kernel, inputs, outputs):
    return 2 * side**2 * kernel**2 * inputs * outputs


def dense(sizes):
    return sum(2 * a * b for a, b in itertools.pairwise(sizes))


def basic(side, inputs, width, shortcut):
    return (
        conv(side, 3, inputs, width) + conv(side, 3, width, width) + (conv(side, 1, inputs, width) if shortcut else 0)
    )


def bottleneck(before, side, inputs, width, shortcut):
    layers = conv(before, 1, inputs, width) + conv(side, 3, width, width) + conv(side, 1, width, 4 * width)
    return layers + (conv(side, 1, inputs, 4 * width) if shortcut else 0)


def resnet34():
    total = conv(42, 7, 4, 64)
    for side, repeats, inputs, width in ((21, 3, 64, 64), (11, 4, 64, 128), (6, 6, 128, 256), (3, 3, 256, 512)):
        total += basic(side, inputs, width, inputs != width) + (repeats - 1) * basic(side, width, width, False)
    return total, 9 * 512


def resnet101():
    total, inputs, before = conv(42, 7, 4, 64), 64, 21
    for side, repeats, width in ((21, 3, 64), (11, 4, 128), (6, 23, 256), (3, 3, 512)):
        total += bottleneck(before, side, inputs, width, True)
        total += (repeats - 1) * bottleneck(side, side, 4 * width, width, False)
        inputs, before = 4 * width, side
    return total, 9 * 2048


def impala_x4():
    total, inputs = 0, 4
    for side, width in ((84, 64), (42, 128), (21, 128)):
        after = -(-side // 2)
        total += conv(side, 3, inputs, width) + 4 * conv(after, 3, width, width)
        inputs = width
    return total, 11 * 11 * 128


def vit_small():
    tokens, width = 37, 384
    layers = tokens * (dense([width, 3 * width]) + dense([width, width]) + dense([width, 4 * width, width]))
    block = layers + 2 * 2 * tokens**2 * width  # queries with keys, and weights with values
    return 36 * dense([784, width]) + 12 * block, 36 * width


@pytest.mark.parametrize("encoder", [resnet34, resnet101, impala_x4, vit_small])
def test_forward_flops_are_the_sum_over_layers_by_hand(encoder):
    layers, features = encoder()
    hidden = (2048, 1024, 1024, 1024)
    expected = layers + dense([features, *hidden]) + 2 * 1024 * 40 * NUM_ACTIONS * 51
    estimated = performance.forward_cost(encoder.__name__, 40).flops
    assert estimated == pytest.approx(expected, rel=0.02)  # padding of the stem


def test_a_steps_bytes_by_hand():
    """Nature's three convolutions, a hidden layer of 16 and heads for two games, in float32; a batch of 5."""
    sides, channels, kernels = (84, 20, 9, 7), (4, 32, 64, 64), (8, 4, 3)
    maps = [side**2 * width for side, width in zip(sides, channels)]
    vectors, outputs = [7 * 7 * 64, 16], 2 * NUM_ACTIONS * 51
    images = sum(a + b for a, b in itertools.pairwise(maps)) + sum(vectors) + 16 + outputs
    weights = sum(k**2 * a * b for k, (a, b) in zip(kernels, itertools.pairwise(channels)))
    weights += vectors[0] * 16 + 16 * outputs
    others = sum(channels[1:]) + 49 * 64 + 3 * 16 + outputs  # biases, spatial embedding, layer normalisation
    expected = 4 * 4 * (5 * images + weights) + 28 * (weights + others)
    assert performance.step_bytes("nature", 5, 2, **SMALL) == pytest.approx(expected, rel=1e-9)


def test_heads_for_more_games_cost_their_parameters():
    """Parameters, target and two moments of another game's head; the rest of the batch is the same size."""
    table = performance.measure_heads("nature_narrow", 4, (1, 3), seconds=0.03, **SMALL)
    more = table["memory, GB"] - table["working memory, GB"]
    assert more[3] - more[1] == pytest.approx(4 * 4 * 2 * 18 * 51 * (16 + 1) / 1e9)
    assert (table["working memory, GB"] > 0).all() and table.loc[1, "ms, of the first"] == 1


def test_a_decision_transformers_cost_by_hand():
    """Two blocks of 128 on four steps: three passes, but no gradient with respect to the pixels; in play two passes."""
    costs = performance.system_costs(["dt tiny", "bc_transformer tiny"], 8)

    def forward(steps, per_step):
        tokens, heads = steps * per_step, (18 + 4 + 120 * (per_step - 38)) * steps * 2 * 128
        block = tokens * (dense([128, 3 * 128]) + dense([128, 128]) + dense([128, 512, 128])) + 2 * 2 * tokens**2 * 128
        return 36 * steps * dense([196, 128]), 2 * block + heads

    for name, per_step in (("dt tiny", 39), ("bc_transformer tiny", 38)):
        (pixels, rest), first = forward(4, per_step), sum(forward(1, per_step)) if per_step == 39 else 0
        assert costs.loc[name, "step, GFLOP"] == pytest.approx((2 * pixels + 3 * rest) / 1e9, rel=0.01)
        assert costs.loc[name, "decision, GFLOP"] == pytest.approx((pixels + rest + first) / 1e9, rel=0.01)


def test_systems_have_their_published_sizes_and_nothing_is_allocated():
    """A Q-network's step is that of `step_flops`; it holds parameters four times, gradients, activations, a batch."""
    before = sum(x.nbytes for x in jax.live_arrays())
    costs = performance.system_costs(["cql vit_tiny", "mae vit_tiny", "dt 200M"], 512)
    assert sum(x.nbytes for x in jax.live_arrays()) - before < 1e6
    sizes = costs["as published, millions"]
    assert sizes.tolist() == pytest.approx([5.5 + 36 * 192 * 2048 / 1e6, 5.5, 197], rel=0.01)
    of_q = costs.loc["cql vit_tiny"]
    assert of_q["step, GFLOP"] == pytest.approx(performance.step_flops("vit_tiny", 1, 40) / 1e9, rel=0.05)
    assert of_q["moved, GB"] == pytest.approx(performance.step_bytes("vit_tiny", 512, 40) / 1e9, rel=0.05)
    assert of_q["decision, GFLOP"] == pytest.approx(performance.forward_cost("vit_tiny", 40).flops / 1e9, rel=0.01)
    assert np.isnan(costs.loc["mae vit_tiny", "decision, GFLOP"])
    bytes_of = 4 * 1e6 * costs["parameters, millions"] / 1e9
    np.testing.assert_allclose(costs["state, GB"], 4 * bytes_of, rtol=1e-3)
    frames = 512 * np.array([7, 7, 4]) * 84 * 84 / 1e9
    np.testing.assert_allclose(costs["memory, GB"], 5 * bytes_of + costs["activations, GB"] + frames, rtol=1e-3)


def test_a_strided_convolutions_gradient_costs_no_zeros():
    """Of 8 x 8 pixels to 4 x 4: forward, and the gradients with respect to kernel and images, as much each."""
    inputs = jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32), jax.ShapeDtypeStruct((2, 2, 3, 5), np.float32)
    dimensions = ("NHWC", "HWIO", "NHWC")
    convolve = lambda *x: jax.lax.conv_general_dilated(*x, (2, 2), "VALID", dimension_numbers=dimensions)  # noqa: E731
    flops, _ = performance._traced_cost(jax.grad(lambda *x: (convolve(*x) ** 2).sum(), argnums=(0, 1)), *inputs)
    assert flops == 3 * conv(4, 2, 3, 5)


def test_a_floor_is_the_longer_of_two_times_by_hand():
    """989 TFLOP/s and 3.35 TB/s of an H100: 295 FLOP/byte; 1.2 TB/s of a TPU v4 and 275 TFLOP/s: 229."""
    costs = pd.DataFrame({"step, GFLOP": [98.9, 98.9], "moved, GB": [33.5, 3.35]}, index=["much moved", "little"])
    floors = performance.roofline(costs, 100)
    assert floors["TFLOP"].tolist() == pytest.approx([9.89, 9.89]) and floors["GB"].tolist() == [33.5, 3.35]
    assert floors["FLOP/byte"].tolist() == pytest.approx([295.2, 2_952], rel=1e-3)
    assert floors["NVIDIA H100, ms"].tolist() == pytest.approx([10, 10], rel=1e-3)
    assert floors["TPU v4, ms"].tolist() == pytest.approx([9.89 / 275 * 1e3] * 2)
    assert floors["NVIDIA A100, ms"].tolist() == pytest.approx([9.89 / 312 * 1e3] * 2)
    costs["moved, GB"] *= 10
    assert performance.roofline(costs, 100)["NVIDIA H100, ms"].tolist() == pytest.approx([100, 10], rel=1e-3)


def test_flops_are_what_the_step_has_as_lowered_for_a_tpu():
    step, batch = performance.make_step("nature", 2, **SMALL), performance.random_batch(4, 2)
    lowered = jax.jit(step.update).trace(step.state, batch, jax.random.key(0)).lower(lowering_platforms=("tpu",))
    products = 4 * performance.step_flops("nature", 1, 2, **SMALL) - 4 * conv(20, 8, 4, 32)  # images have no gradient
    rest = 40 * networks.count_parameters(step.state.params)  # Adam's, and the elementwise
    assert products < lowered.cost_analysis()["flops"] < products + rest


def test_the_paper_main_steps_flops():
    """About 5.5 TFLOP, three forward passes of the online network and one of the target."""
    assert performance.step_flops("resnet101", 512, 40) / 1e12 == pytest.approx(5.5, rel=0.1)
    table = performance.hours({"a": 1e15, "b": 1e15}, {"a": 1.0, "b": 0.5})
    main = table.loc["a"].iloc[0]
    assert main == pytest.approx(performance.step_flops("resnet101", 512, 40) * 1e7 / 1e15 / 3600)
    np.testing.assert_allclose(table.loc["b"], 2 * table.loc["a"])


def test_a_measured_step_agrees_with_its_arithmetic():
    limits = performance.ceilings(("float32",), size=256, seconds=0.05)
    row = performance.measure_step("resnet_narrow", 4, limits, num_games=2, seconds=0.1, **SMALL)
    assert 0.6 < row["GFLOP, compiled"] / row["GFLOP"] < 1.2
    assert 1 < row["moved, GB, compiled"] / row["moved, GB"] < 10  # each operand once is the least
    assert row["ms"] > 0 and row["transitions/s"] == pytest.approx(4e3 / row["ms"])
    assert row["share of peak"] == pytest.approx(row["floor, ms"] / row["ms"])


def test_noise_is_a_valid_batch():
    batch = performance.random_batch(100, 40)
    sizes = np.array([len(performance.action_names(game)) for game in performance.TRAINING_GAMES])
    assert (batch.action < sizes[batch.game]).all() and set(batch.game) == set(range(40))
    assert batch.observation.shape == batch.next_observation.shape == (100, 84, 84, 4)
    np.testing.assert_array_equal(batch.next_observation[..., 0], batch.observation[..., 3])


def test_what_does_not_fit_is_named_and_the_others_are_measured(monkeypatch):
    monkeypatch.setattr(performance.devices, "free_bytes", lambda device: 30_000_000)
    limits = performance.Ceilings({"float32": 1e9}, 1e9, 1e9)
    table, refused = performance.measure_steps(
        ["nature_narrow"], ["float32"], [2, 4_096], limits, num_games=2, seconds=0.01, **SMALL
    )
    assert table["batch"].tolist() == [2]
    assert len(refused) == 1 and "nature_narrow, float32, batch 4096: a step is estimated to take" in refused[0]


def test_pytorchs_network_is_of_the_same_size():
    torch = pytest.importorskip("torch", reason="PyTorch is an extra")
    from scaled_ql import torch_step

    for encoder in ("resnet_narrow", "resnet50", "nature", "nature_narrow", "vit_narrow"):
        theirs = torch_step.Network(encoder, 3, (32, 16))
        ours = jax.eval_shape(lambda encoder=encoder: networks.make_q_network(encoder, 3, "c51", hidden_sizes=(32, 16)))
        assert sum(p.numel() for p in theirs.parameters()) == networks.count_parameters(ours), encoder
        logits = theirs(torch.zeros(2, 4, 84, 84, dtype=torch.uint8), torch.tensor([0, 2]))
        assert logits.shape == (2, 18, 51) and torch.isfinite(logits).all()


def test_pytorchs_step_learns_and_is_measured_beside_ours():
    pytest.importorskip("torch", reason="PyTorch is an extra")
    from scaled_ql import torch_step

    noise = performance.random_batch(4, 3)
    step = torch_step.make_torch_step("nature_narrow", noise, [18, 18, 18], (16,))
    losses = [float(step()) for _ in range(200)]
    assert losses[-1] < losses[0] - 0.01
    limits = performance.Ceilings({"float32": 1e12}, 1e10, 1e10)
    row = torch_step.compare("nature_narrow", 4, 2, (16,), "float32", limits, 0.01)
    best = min(value for name, value in row.items() if name.startswith("PyTorch"))
    assert row["JAX, of PyTorch's best"] == pytest.approx(row["JAX, ms"] / best) and best > 0


def test_short_calls_are_timed_together_and_long_ones_alone():
    calls = []
    assert performance.median_seconds(lambda: calls.append(time.sleep(0.06)), 0.0) >= 0.06
    assert len(calls) == 2 + 3, "two to warm up, and three timings of one"
    calls.clear()
    assert performance.median_seconds(lambda: calls.append(None), 0.0) < 1e-3
    assert len(calls) > 2 + 3 * 50, "each timing lasts as many calls as fill 50 ms"


def test_every_size_of_batch_is_compiled_before_playing_is_timed(monkeypatch):
    asked = []
    monkeypatch.setattr(performance.evaluation, "make_q_function", lambda *_: lambda stacks: asked.append(len(stacks)))

    def evaluate(player, game, **how):
        assert set(asked) == {16, 4}
        return pd.DataFrame({"length": [how["max_steps"]]})

    monkeypatch.setattr(performance.evaluation, "evaluate", evaluate)
    performance.measure_evaluation("Breakout", "resnet_narrow", **SMALL)
    assert asked
