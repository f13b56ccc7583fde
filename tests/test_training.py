"""The training step against plain NumPy, the loop, and checkpoints under damage, refusal and full disks."""

import contextlib
import functools
import gc
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stacks import batch_of_stacks
from tensorboardX.proto.event_pb2 import Event
from test_losses import Table, reference_batch

from scaled_ql import devices, losses, methods, training
from scaled_ql.games import NUM_ACTIONS
from scaled_ql.methods import common
from scaled_ql.networks import make_q_network
from scaled_ql.replay.batch import Batch
from scaled_ql.training import CheckpointError, Checkpoints, Diverged, MetricsLog

GAMES = ["Amidar", "Pong", "Qbert"]
NUM_GAME_ACTIONS = [2, 3, 6]
ABOUT = {"encoder": "nature", "games": GAMES}
NUM_STATES = 5


@pytest.fixture
def quiet():
    """Let go of the reads that Orbax abandons, while their warnings are filtered."""
    yield
    gc.collect()


def refuses(test):
    return pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")(
        pytest.mark.usefixtures("quiet")(test)
    )


def table_batch(number, games=(0, 1, 2), size=4):
    """Batch `number` of an endless stream, for a table."""
    rng = np.random.default_rng(number)
    game = rng.choice(games, size).astype(np.int32)
    return batch_of_stacks(
        observation=rng.integers(NUM_STATES, size=(size, 1, 1, 1)).astype(np.uint8),
        action=rng.integers(np.array(NUM_GAME_ACTIONS)[game]).astype(np.int32),
        reward=rng.normal(size=size).astype(np.float32),
        discount=rng.choice([0.0, 0.97], size).astype(np.float32),
        next_observation=rng.integers(NUM_STATES, size=(size, 1, 1, 1)).astype(np.uint8),
        game=game,
    )


def stream(first, last, **changed):
    """Batches of steps first..last; `changed` maps fields to {step: value}."""
    for step in range(first, last + 1):
        values = {field: steps[step] for field, steps in changed.items() if step in steps}
        yield table_batch(step)._replace(**values)


OPTIMIZER = training.make_optimizer(0.01)
TABLE = np.random.default_rng(0).normal(size=(len(GAMES), NUM_STATES, NUM_ACTIONS)).astype(np.float32)


def table_state(step=0, table=TABLE):
    state = training.init_state(Table(table), OPTIMIZER)[1]
    return state._replace(step=jnp.int32(step))


@functools.cache
def table_step():
    graph = training.init_state(Table(TABLE), OPTIMIZER)[0]
    objective = methods.q_learning(head="mse", alpha=0.1).objective(graph, NUM_GAME_ACTIONS)
    return training.make_train_step(objective, OPTIMIZER, target_update_period=3)


def assert_same(state, other):
    leaves, others = jax.tree.leaves(state), jax.tree.leaves(other)
    assert len(leaves) == len(others)
    for a, b in zip(leaves, others):
        np.testing.assert_array_equal(a, b)


def same(state, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other)))


def steps_on_disk(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


# The step.


def test_steps_equal_a_plain_numpy_adam_with_a_target_table():
    learning_rate, epsilon, alpha, period = 0.05, 1e-3, 0.3, 3
    rng = np.random.default_rng(1)
    table = rng.normal(size=TABLE.shape)
    with jax.enable_x64(True):
        optimizer = training.make_optimizer(learning_rate, epsilon)
        graph, state = training.init_state(Table(table), optimizer)
        objective = methods.q_learning(head="mse", alpha=alpha).objective(graph, NUM_GAME_ACTIONS)
        train_step = training.make_train_step(objective, optimizer, target_update_period=period)
        online, target, mean, square = table.copy(), table.copy(), 0.0, 0.0
        for step in range(1, 9):
            batch = table_batch(step)
            gradient = np.zeros_like(online)
            for row, game in enumerate(batch.game):
                now, then = batch.observation[row, 0, 0, 0], batch.next_observation[row, 0, 0, 0]
                size, action = NUM_GAME_ACTIONS[game], batch.action[row]
                backed_up = batch.reward[row] + batch.discount[row] * target[game, then, :size].max()
                weights = np.exp(online[game, now, :size])
                gradient[game, now, action] += (2 * (online[game, now, action] - backed_up) - alpha) / 4
                gradient[game, now, :size] += alpha * weights / weights.sum() / 4
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient**2
            online -= learning_rate * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + epsilon)
            if step % period == 0:
                target = online.copy()
            state, _ = train_step(state, batch)
            np.testing.assert_allclose(state.params["table"], online, atol=1e-7)
            np.testing.assert_allclose(state.target_params["table"], target, atol=1e-7)
            assert state.step == step
    assert np.array_equal(online[0, :, 2:], table[0, :, 2:])  # actions that the game does not have


def test_target_is_a_bitwise_copy_at_multiples_of_the_period_and_constant_between():
    state = table_state()
    before, copied = np.array(state.target_params["table"]), []
    for step in range(1, 10):
        state, _ = table_step()(state, table_batch(step))
        online, target = np.array(state.params["table"]), np.array(state.target_params["table"])
        assert np.array_equal(target, online if step % 3 == 0 else before)
        assert not np.array_equal(online, before)
        copied.append(not np.array_equal(target, before))
        before = target
    assert copied == 3 * [False, False, True]


def test_the_state_passed_in_is_donated():
    state = table_state()
    table = state.params["table"]
    after, _ = table_step()(state, table_batch(1))
    assert table.is_deleted()
    assert np.isfinite(after.params["table"]).all() and after.step == 1


def test_action_masks():
    masks = np.asarray(common.action_masks([3, 18]))
    assert masks.tolist() == [3 * [True] + 15 * [False], 18 * [True]]


@pytest.mark.parametrize("accumulate, backend", [(1, "cpu"), (2, "gpu")])
def test_several_steps_of_one_program_are_the_same_steps(accumulate, backend, monkeypatch):
    """Target copies within it, each step's own random numbers, and accumulated gradients included; unrolled or not."""
    monkeypatch.setattr(training.jax, "default_backend", lambda: backend)
    graph, plain = training.init_state(Table(TABLE), OPTIMIZER)[0], methods.q_learning(head="mse", alpha=0.1)
    plain = plain.objective(graph, NUM_GAME_ACTIONS)

    def objective(params, target_params, batch, key):
        loss, metrics = plain(params, target_params, batch, key)
        loss += (params["table"] * jax.random.normal(key, TABLE.shape)).sum()
        return loss, metrics | {"loss": loss}

    step = training.make_train_step(objective, OPTIMIZER, target_update_period=3, seed=4, accumulate=accumulate)
    together, alone, rows = table_state(), table_state(), []
    for stack in ([1, 2, 3, 4], [5], [6, 7]):
        batches = [table_batch(number) for number in stack]
        together, metrics = step(together, *batches)
        for number, batch in enumerate(batches):
            alone, row = step(alone, batch)
            rows.append(row["loss"])
            row_together = metrics if len(stack) == 1 else jax.tree.map(lambda x, number=number: x[number], metrics)
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), row_together, row)
        assert together.step == alone.step == stack[-1]
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), together, alone)
    assert len({float(loss) for loss in rows}) == 7
    assert not np.array_equal(together.params["table"], together.target_params["table"])  # it was copied in step 6


@pytest.mark.parametrize("where", ["head_kernel", "q/head_kernel"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_heads_gradient_is_measured_by_its_root_mean_square(where, accumulate):
    """Of a loss that is linear in the parameters, whose gradient is therefore known; a behaviour's head is not it."""
    rng = np.random.default_rng(0)
    wanted, other = (rng.normal(size=(4, 5, 6)).astype(np.float32) for _ in range(2))
    slopes = {"head_kernel": wanted, "head_bias": other}
    if where.startswith("q"):
        slopes = {"q": slopes, "behaviour": {"head_kernel": other}}

    def objective(params, target_params, batch, key):
        loss = sum((a * b).sum() for a, b in zip(*map(jax.tree.leaves, (params, slopes))))
        return loss, {"loss": loss, "of_sum": jnp.zeros(3), "of_count": jnp.zeros(3)}

    optimizer = training.make_optimizer()
    params = jax.tree.map(jnp.zeros_like, slopes)
    state = training.TrainState(jnp.int32(0), params, params, optimizer.init(params))
    update = jax.jit(training.make_update(objective, optimizer, accumulate=accumulate))
    _, metrics = update(state, table_batch(0), jax.random.key(0))
    np.testing.assert_allclose(metrics["head_grad_rms"], np.sqrt(np.mean(wanted.astype(np.float64) ** 2)), rtol=1e-6)
    squares = sum((x.astype(np.float64) ** 2).sum() for x in jax.tree.leaves(slopes))
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(squares), rtol=1e-6)


def test_a_decaying_rate_and_frozen_parts_work_together():
    optimizer = training.make_optimizer(0.1, 1e-8, decay_steps=4, frozen=("behaviour",))
    params = {"q": jnp.zeros(2), "behaviour": jnp.ones(3)}
    gradients, state, steps = jax.tree.map(jnp.ones_like, params), optimizer.init(params), []
    for _ in range(5):
        updates, state = optimizer.update(gradients, state, params)
        steps.append(float(updates["q"][0]))
        assert not np.any(updates["behaviour"])
    np.testing.assert_allclose(steps, [-0.1, -0.075, -0.05, -0.025, 0], atol=1e-6)  # Adam of a constant gradient: -rate


def test_a_warm_up_comes_first_and_weights_decay_as_in_adamw():
    """Against a loop over float64 numbers; biases, mean frames and what is frozen do not decay."""
    rng, rate, decay, epsilon = np.random.default_rng(0), 0.1, 0.3, 1e-8
    optimizer = training.make_optimizer(rate, epsilon, 6, ("encoder",), warmup_steps=2, weight_decay=decay)
    params = {"hidden": {"kernel": rng.normal(size=(2, 2)), "bias": rng.normal(size=2)}}
    params |= {"mean_frames": np.full((1, 2, 2), 9.0), "encoder": {"kernel": np.ones((2, 2))}}
    params = jax.tree.map(np.float32, params)
    kernel, bias = (params["hidden"][name].astype(np.float64) for name in ("kernel", "bias"))
    state, moments = optimizer.init(params), [[np.zeros_like(x), np.zeros_like(x)] for x in (kernel, bias)]
    for step, share in enumerate([0, 0.5, 1, 0.75, 0.5, 0.25, 0], 1):
        gradients = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
        gradients["mean_frames"] *= 0
        updates, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(lambda x, y: np.asarray(x + y), params, updates)
        for number, (name, own, shrinks) in enumerate((("kernel", kernel, decay), ("bias", bias, 0))):
            gradient, (first, second) = gradients["hidden"][name].astype(np.float64), moments[number]
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient**2 - second)
            move = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + epsilon)
            own -= share * rate * (move + shrinks * own)
            np.testing.assert_allclose(params["hidden"][name], own, atol=1e-5)
    assert np.unique(params["mean_frames"]) == 9 and np.unique(params["encoder"]["kernel"]) == 1
    constant = training.make_optimizer(0.1, 1e-8, warmup_steps=2)
    state, steps = constant.init(jnp.zeros(1)), []
    for _ in range(4):
        updates, state = constant.update(jnp.ones(1), state, jnp.zeros(1))
        steps.append(float(updates[0]))
    np.testing.assert_allclose(steps, [0, -0.05, -0.1, -0.1], atol=1e-6)


@pytest.mark.parametrize("kind", ["adam", "lamb"])
def test_a_rate_rises_falls_and_a_long_gradient_is_cut(kind):
    """Adam's step of a constant gradient is the rate; LAMB's is the rate times the parameter's norm, per its length."""
    params, gradients = {"w": jnp.full(4, 3.0)}, {"w": jnp.full(4, 50.0)}
    for cut in (0.0, 1.0):
        optimizer = training.make_optimizer(0.1, 1e-8, 8, kind=kind, warmup_steps=2, max_grad_norm=cut)
        state, steps = optimizer.init(params), []
        for _ in range(4):
            updates, state = optimizer.update(gradients, state, params)
            steps.append(float(updates["w"][0]))
        scale = 3.0 if kind == "lamb" else 1.0
        np.testing.assert_allclose(steps, scale * np.array([0, -0.05, -0.1, -0.1 * 5 / 6]), rtol=1e-4)
        first = training.make_optimizer(0.1, 1.0, kind="adam", max_grad_norm=cut)
        update = first.update(gradients, first.init(params), params)[0]["w"][0]
        size = 0.5 if cut else 50.0  # a gradient of norm 100, cut to norm 1
        assert update == pytest.approx(-0.1 * size / (size + 1), rel=1e-4)


def test_epsilon_warning():
    said = training.epsilon_warning(2.8e-6, 3.125e-4)
    assert said == (
        "Adam's epsilon (3.1e-04) is 112 times the head's gradient (2.8e-06 RMS): this run learns hardly anything."
    )
    assert training.epsilon_warning(1e-5, 1.01e-4) and not training.epsilon_warning(1e-5, 0.99e-4)
    assert not training.epsilon_warning(3e-5, 1e-8) and not training.epsilon_warning(math.nan, 1e-8)
    assert "no gradient" in training.epsilon_warning(0.0, 1e-8)


# Real networks: determinism and learning.


@functools.cache
def bandit():
    """Two states of two games, each action once: one step, a reward that depends on all three; and the best."""
    frames = np.random.default_rng(0).integers(0, 256, (4, 84, 84, 4), np.uint8)
    best = {(0, 0): 0, (0, 1): 1, (1, 2): 2, (1, 3): 0}
    rows = [(game, state, action) for game, state in best for action in range(NUM_GAME_ACTIONS[game])]
    game, state, action = np.array(rows, np.int32).T
    reward = np.array([1.0 if best[row[:2]] == row[2] else -0.5 * (1 + row[2]) / 3 for row in rows], np.float32)
    batch = batch_of_stacks(frames[state], action, reward, np.zeros(len(rows), np.float32), frames[state], game)
    return batch, np.array([best[row[:2]] for row in rows])


@functools.cache
def nature_step(head):
    optimizer = training.make_optimizer(2e-3)
    network = make_q_network("nature", 3, head, num_atoms=11, hidden_sizes=(16, 16))
    graph, state = training.init_state(network, optimizer)
    objective = methods.q_learning(head=head, atoms=jnp.linspace(-2, 2, 11)).objective(graph, NUM_GAME_ACTIONS)
    train_step = training.make_train_step(objective, optimizer, target_update_period=5)
    return graph, train_step, jax.device_get(state)


def nature_state(head):
    return jax.tree.map(jnp.array, nature_step(head)[2])


def test_loss_of_a_real_network_equals_the_reference_on_its_outputs():
    graph, train_step, _ = nature_step("c51")
    rng, (batch, _), state = np.random.default_rng(0), bandit(), nature_state("c51")
    state = state._replace(target_params=jax.tree.map(lambda x: -1.5 * x, state.params))
    reward, discount = rng.normal(size=10).astype(np.float32), np.float32([0.9, 0] * 5)
    images = batch.observation
    batch = batch_of_stacks(images, batch.action, reward, discount, images[::-1], batch.game)
    apply = jax.jit(functools.partial(training.apply, graph))
    outputs = np.asarray(apply(state.params, batch.observation, batch.game))
    target_outputs = np.asarray(apply(state.target_params, batch.next_observation, batch.game))
    masks = np.arange(NUM_ACTIONS) < np.array(NUM_GAME_ACTIONS)[:, None]
    td, cql, loss = reference_batch(
        outputs, target_outputs, target_outputs, batch, masks, np.linspace(-2, 2, 11), alpha=0.05
    )
    _, metrics = train_step(state, batch)
    for name, expected in {"loss": loss, "td_loss": td.mean(), "cql_loss": cql.mean()}.items():
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["td_loss_sum"], [td[:4].sum(), td[4:].sum(), 0], rtol=1e-5)
    assert metrics["td_loss_count"].tolist() == [4, 6, 0]


@pytest.mark.parametrize("head", ["c51", "mse"])
def test_a_network_learns_the_best_actions(head):
    graph, train_step, _ = nature_step(head)
    state, (batch, best) = nature_state(head), bandit()
    td = []
    for _ in range(150 if head == "c51" else 100):
        state, metrics = train_step(state, batch)
        td.append(float(metrics["td_loss"]))
    assert td[-1] < (0.6 if head == "c51" else 0.1) * td[0]  # rewards between two atoms leave C51 some entropy
    outputs = jax.jit(lambda params: training.apply(graph, params, batch.observation, batch.game))(state.params)
    q = losses.expected_q(outputs, jnp.linspace(-2, 2, 11)) if head == "c51" else outputs
    masks = common.action_masks(NUM_GAME_ACTIONS)[batch.game]
    assert np.array_equal(jax.vmap(losses.greedy_action)(q, masks), best)


def test_the_same_seed_and_batches_give_bit_identical_parameters():
    _, train_step, _ = nature_step("c51")
    batch, _ = bandit()
    order = [np.random.default_rng(step).permutation(len(batch.game)) for step in range(6)]
    runs = []
    for seed in (0, 0, 1):
        network = make_q_network("nature", 3, "c51", seed, num_atoms=11, hidden_sizes=(16, 16))
        state = training.init_state(network, training.make_optimizer())[1]
        for rows in order:
            state, metrics = train_step(state, Batch(*(field[rows] for field in batch)))
        runs.append(jax.device_get((state, metrics)))
    assert_same(runs[0], runs[1])
    assert not same(runs[0][0].params, runs[2][0].params)


# The loop.


def without_speed(row):
    return {name: value for name, value in row.items() if not name.endswith("_per_second")}


def test_rows_average_the_steps_metrics(tmp_path):
    batches = [table_batch(step, games=(0, 1) if step < 3 else (0, 1, 2), size=8) for step in range(6)]
    state, expected = table_state(), []
    for batch in batches:
        state, metrics = table_step()(state, batch)
        expected.append(jax.device_get(metrics))
    assert all(metrics["td_loss_count"][2] > 0 for metrics in expected[3:])

    checkpoints = Checkpoints(tmp_path / "run", ABOUT)
    trained = training.train(
        table_state(), table_step(), iter(batches), GAMES, log_every=3, checkpoint_every=6, checkpoints=checkpoints
    )
    rows = []
    for number, (after, row) in enumerate(trained):
        assert row["step"] == after.step == 3 * (number + 1)
        assert row["steps_per_second"] > 0
        assert row["transitions_per_second"] == pytest.approx(8 * row["steps_per_second"])
        rows.append(row)
    assert_same(after, state)
    checkpoints.close()
    assert steps_on_disk(tmp_path / "run") == [6]
    for row, window in zip(rows, (expected[:3], expected[3:]), strict=True):
        for name in ("loss", "td_loss", "cql_loss", "q_data", "q_greedy", "grad_norm"):
            assert row[name] == pytest.approx(np.mean([metrics[name] for metrics in window]), rel=1e-6)
        for number, game in enumerate(GAMES):
            total = sum(metrics["td_loss_sum"][number] for metrics in window)
            count = sum(metrics["td_loss_count"][number] for metrics in window)
            wanted = total / count if count else math.nan
            assert row[f"td_loss/{game}"] == pytest.approx(wanted, rel=1e-6, nan_ok=True)
        assert len(row) == 6 + 3 + 3
    assert math.isnan(rows[0]["td_loss/Qbert"]) and not math.isnan(rows[1]["td_loss/Qbert"])


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(tmp_path):
    train_step, (batch, _) = nature_step("c51")[1], bandit()

    def run(folder, rows_to_do, killed=False):
        """Go on from the folder's newest checkpoint, for a while."""
        checkpoints = Checkpoints(folder, ABOUT)
        state = checkpoints.restore(nature_state("c51"))
        first = int(state.step)
        orders = (np.random.default_rng(step).permutation(len(batch.game)) for step in itertools.count(first))
        batches = (Batch(*(field[order] for field in batch)) for order in orders)
        trained = training.train(
            state, train_step, batches, GAMES, log_every=1, checkpoint_every=2, checkpoints=checkpoints
        )
        results = list(itertools.islice(trained, rows_to_do))
        if killed:
            checkpoints.wait()
            shutil.copytree(folder, folder.with_name("left"))
        trained.close()
        checkpoints.close()
        return first, jax.device_get(results[-1][0]), [without_speed(row) for _, row in results]

    _, whole, rows = run(tmp_path / "whole", 5)
    first, _, before = run(tmp_path / "parts", 3, killed=True)  # its newest checkpoint is that of step 2
    second, resumed, after = run(tmp_path / "left", 3)
    assert (first, second) == (0, 2) and [row["step"] for row in after] == [3, 4, 5]
    assert_same(resumed, whole)
    np.testing.assert_equal(before[:2] + after, rows)  # NaN, where a game was not drawn, equals NaN
    np.testing.assert_equal(after[0], before[2])
    third, resumed, after = run(tmp_path / "parts", 3)  # closed, it left a checkpoint of step 3 and repeats its row
    assert third == 3 and [row["step"] for row in after] == [3, 4, 5]
    assert_same(resumed, whole)
    np.testing.assert_equal(before[:2] + after, rows)


def table_run(folder, steps, interrupt=None, steps_per_dispatch=1, train_step=None):
    """A run of a table to its end, through a log; `interrupt(step)` may raise where its batch is asked for."""
    checkpoints = Checkpoints(folder / "checkpoints", ABOUT)
    state = checkpoints.restore(table_state())
    log = MetricsLog(folder / "metrics.jsonl", int(state.step))

    def batches(first):
        for step in range(first + 1, steps + 1):
            if interrupt:
                interrupt(step)
            yield table_batch(step)

    trained = training.train(
        state, train_step or table_step(), batches(int(state.step)), GAMES, log_every=4, checkpoint_every=5,
        steps_per_dispatch=steps_per_dispatch, checkpoints=checkpoints,
    )  # fmt: skip
    try:
        with contextlib.closing(trained):
            for _, row in trained:
                log.append(row)
    finally:
        checkpoints.close()
    return [without_speed(row) for row in log.rows]


@pytest.mark.parametrize("steps", [1, 3, 8, 10, 11])
def test_any_number_of_steps_ends_with_a_row_and_a_checkpoint(tmp_path, steps):
    rows = table_run(tmp_path, steps)
    assert [row["step"] for row in rows] == sorted({*range(4, steps + 1, 4), steps})
    state = table_state()
    for step in range(1, steps + 1):
        state, _ = table_step()(state, table_batch(step))
    checkpoints = Checkpoints(tmp_path / "checkpoints", ABOUT)
    assert checkpoints.latest_step() == steps
    assert_same(checkpoints.restore(table_state()), state)
    checkpoints.close()


@pytest.mark.parametrize("size, stacks", [(1, [1] * 11), (3, [3, 1, 1, 3, 2, 1]), (100, [4, 1, 3, 2, 1])])
def test_steps_given_at_once_end_where_a_row_or_a_checkpoint_is_due(tmp_path, size, stacks):
    """Rows every fourth step, checkpoints every fifth, 11 steps: the same as one at a time."""
    given = []

    def train_step(state, *batches):
        given.append(len(batches))
        return table_step()(state, *batches)

    rows = table_run(tmp_path / "stacks", 11, None, size, train_step)
    assert given == stacks
    expected = table_run(tmp_path / "alone", 11)
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == [4, 8, 11]
    for row, other in zip(rows, expected):
        assert row == pytest.approx(other, rel=1e-5, nan_ok=True)
    states = {}
    for name in ("stacks", "alone"):
        assert steps_on_disk(tmp_path / name / "checkpoints") == [10, 11]
        states[name] = restore(tmp_path / name / "checkpoints")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), *states.values())


def test_few_sizes_of_what_is_given_at_once_are_compiled_and_a_resumed_run_has_the_same():
    stacks = [list(stack) for stack in training._stacks(iter(range(1, 1001)), 0, 7, (100, 250))]
    assert {len(stack) for stack in stacks} == {7, 2, 1} and list(itertools.chain(*stacks)) == list(range(1, 1001))
    for number, stack in enumerate(stacks[:60]):
        rest = iter(range(stack[-1] + 1, 1001))
        assert list(training._stacks(rest, stack[-1], 7, (100, 250))) == stacks[number + 1 :]


class Lost(Exception):
    pass


@pytest.mark.parametrize("kind, size", [(KeyboardInterrupt, 1), (Lost, 1), (Lost, 3)])
def test_a_run_interrupted_anywhere_has_lost_no_row_and_no_step_that_was_given_to_the_device(tmp_path, kind, size):
    whole = table_run(tmp_path / "whole", 11, None, size)
    ends = {1: range(12), 3: [0, 3, 4, 5, 8, 10]}[size]
    for at in range(2, 12):
        done = max(step for step in ends if step < at)

        def interrupt(step, at=at):
            if step == at:
                raise kind

        with pytest.raises(kind):
            table_run(tmp_path / str(at), 11, interrupt, size)
        assert [0, *steps_on_disk(tmp_path / str(at) / "checkpoints")][-1] == done
        np.testing.assert_equal(table_run(tmp_path / str(at), 11, None, size), [
            {name: None if value != value else value for name, value in row.items()} if row["step"] <= done else row
            for row in whole
        ])  # fmt: skip


def resumed_run(folder, yields=None, begin=None):
    """`training.resume` of a table for 11 steps, left after some yields; its steps at the yields, log and state."""
    checkpoints = Checkpoints(folder / "checkpoints", ABOUT)
    shardings = devices.state_shardings(table_state(), devices.make_mesh(1))
    where = {"checkpoints": checkpoints, "log_file": folder / "policy" / "metrics.jsonl", "shardings": shardings}
    batches_from = lambda step: stream(step + 1, 11)  # noqa: E731
    run = training.resume(
        begin or table_state(), table_step(), batches_from, GAMES, log_every=4, checkpoint_every=5, **where
    )  # fmt: skip
    seen = []
    with contextlib.closing(run):
        for state, _ in itertools.islice(run, yields):
            seen.append((int(state.step), jax.device_get(state)))
    checkpoints.close()
    rows = [without_speed(json.loads(line)) for line in where["log_file"].read_text().splitlines()]
    return [step for step, _ in seen], rows, seen[-1][1]


def test_a_run_left_at_any_yield_resumes_to_the_same_rows_and_state(tmp_path):
    steps, rows, state = resumed_run(tmp_path / "whole")
    assert steps == [0, 4, 8, 11]
    again = resumed_run(tmp_path / "whole")
    assert again[0] == [11], "a finished run yields once"
    assert_same(again[2], state)
    for yields in (1, 2, 3):
        folder = tmp_path / str(yields)
        assert resumed_run(folder, yields)[0] == steps[:yields]
        left, after, resumed = resumed_run(folder)
        assert left[0] == steps[yields - 1], "closed, it left a checkpoint of the step it had yielded"
        assert after == rows and [row["step"] for row in after] == [4, 8, 11]
        assert_same(resumed, state)


def test_the_state_to_begin_with_is_not_taken(tmp_path):
    """So that a notebook's cell can be executed again, with and without a checkpoint."""
    begin = table_state()
    first = resumed_run(tmp_path / "one", 2, begin)
    assert_same(begin, table_state())
    assert not same(first[2].params, begin.params)
    whole, again = (resumed_run(tmp_path / name, None, begin) for name in ("one", "other"))
    assert_same(whole[2], again[2])


@pytest.fixture
def ctrl_c():
    """Ctrl-C interrupts, also where a shell that started the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_the_middle_of_a_step_waits_for_its_state(ctrl_c, tmp_path):
    checkpoints = Checkpoints(tmp_path, ABOUT)

    def train_step(state, batch):
        result = table_step()(state, batch)
        if int(result[0].step) == 3:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)
        return result

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        list(training.train(
            table_state(), train_step, stream(1, 9), GAMES, log_every=4, checkpoint_every=8, checkpoints=checkpoints
        ))  # fmt: skip
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoints.latest_step() == 3 and len(checkpoints.window) == 0
    checkpoints.restore(table_state())
    assert len(checkpoints.window) == 3
    checkpoints.close()


def test_an_interrupt_before_the_first_step_leaves_nothing(ctrl_c, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        table_run(tmp_path, 5, lambda step: signal.raise_signal(signal.SIGINT))
    assert steps_on_disk(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("step, good", [(1, []), (5, [4]), (6, [4]), (8, [4])])
def test_a_bad_loss_names_step_games_and_the_last_good_checkpoint(tmp_path, step, good, size):
    checkpoints, changed = Checkpoints(tmp_path, ABOUT), table_batch(step, games=(0, 2))
    reward = changed.reward.copy()
    reward[1] = np.nan
    bad = {"reward": {step: reward}, "game": {step: np.array([2, 0, 2, 0])}, "action": {step: np.zeros(4, np.int32)}}
    trained = training.train(
        table_state(), table_step(), stream(1, 12, **bad), GAMES, log_every=4, checkpoint_every=4,
        steps_per_dispatch=size, checkpoints=checkpoints,
    )  # fmt: skip
    with pytest.raises(Diverged) as error:
        for _ in trained:
            pass
    message = str(error.value)
    assert f"step {step} " in message and "Amidar, Qbert" in message and "Pong" not in message
    assert f"checkpoint: {tmp_path / '4'}." in message if good else "no checkpoint yet" in message
    checkpoints.close()
    assert steps_on_disk(tmp_path) == good
    if good:
        assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), checkpoints.restore(table_state())))


def test_a_bad_gradient_under_a_finite_loss_is_never_written_to_a_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, ABOUT)
    one = table_batch(2, size=1)
    batches = [table_batch(1), one._replace(reward=np.float32([1.5e19])), *stream(3, 4)]
    # 1.5e19 squared is a float32; the square of the gradient, in Adam's state, is not.
    trained = training.train(
        table_state(), table_step(), batches, GAMES, log_every=1, checkpoint_every=1, checkpoints=checkpoints
    )
    with pytest.raises(Diverged, match="step 2 "):
        for _, row in trained:
            assert math.isfinite(row["loss"])
    checkpoints.close()
    assert steps_on_disk(tmp_path) == [1]


def test_metrics_log_goes_on_behind_the_checkpoint(tmp_path):
    file = tmp_path / "metrics.jsonl"
    log = MetricsLog(file, 0)
    for step in (2, 4, 6):
        log.append({"step": step, "loss": step / 2, "td_loss/Pong": math.nan})
    log.append({"step": 7, "loss": math.inf})
    assert "Infinity" not in file.read_text()
    with file.open("a") as torn:
        torn.write('{"step": 8, "lo')
    assert "NaN" not in file.read_text()
    log = MetricsLog(file, 4)
    assert [row["step"] for row in log.rows] == [2, 4]
    log.append({"step": 6, "loss": 9.0, "td_loss/Pong": 1.0})
    table = MetricsLog(file, 100).table()
    assert table["step"].tolist() == [2, 4, 6] and table["loss"].tolist() == [1, 2, 9]
    assert table["td_loss/Pong"].isna().tolist() == [True, True, False]


def events(folder):
    """(step, {name: value}) of each event in TensorBoard's files: a length, its CRC, a message, its CRC."""
    found = []
    for file in sorted(folder.iterdir()):
        content, place = file.read_bytes(), 0
        while place < len(content):
            size = int.from_bytes(content[place : place + 8], "little")
            event = Event.FromString(content[place + 12 : place + 12 + size])
            found.append((event.step, {value.tag: value.simple_value for value in event.summary.value}))
            place += size + 16
    return found


def test_metrics_are_mirrored_for_tensorboard(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, tensorboard=True)
    for step in (2, 4, 6):
        log.append({"step": step, "loss": step / 2, "td_loss/Pong": math.nan})
    log = MetricsLog(tmp_path / "metrics.jsonl", 4, tensorboard=True)  # killed, resumed from the checkpoint of step 4
    log.append({"step": 6, "loss": 30.0, "td_loss/Pong": 1.0})
    log.close()
    written = [(step, value) for step, values in events(tmp_path / "tensorboard") for value in values.items()]
    assert written == [(2, ("loss", 1)), (4, ("loss", 2)), (6, ("loss", 30)), (6, ("td_loss/Pong", 1))]
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e 'lib\[tensorboard\]'"):
        MetricsLog(tmp_path / "metrics.jsonl", 6, tensorboard=True)


# Checkpoints.


def save_steps(folder, steps, keep_period=None, table=TABLE):
    checkpoints, states = Checkpoints(folder, ABOUT, keep_period), {}
    for step in steps:
        states[step] = table_state(step, table + np.float32(step))
        checkpoints.save(states[step])
    checkpoints.close()
    return states


def restore(folder, about=ABOUT, table=TABLE):
    checkpoints = Checkpoints(folder, about)
    try:
        return checkpoints.restore(table_state(table=table))
    finally:
        checkpoints.close()


@pytest.mark.parametrize("keep_period, kept", [(None, [6, 7]), (3, [3, 6, 7])])
def test_the_newest_two_and_multiples_of_the_period_are_kept(tmp_path, keep_period, kept):
    states = save_steps(tmp_path, range(1, 8), keep_period)
    assert steps_on_disk(tmp_path) == kept
    for step in reversed(kept):
        restored = restore(tmp_path)
        assert isinstance(restored, training.TrainState) and restored.params["table"].dtype == jnp.float32
        assert_same(restored, states[step])
        shutil.rmtree(tmp_path / str(step))


def test_restore_of_an_empty_folder_returns_the_state_given(tmp_path):
    checkpoints, state = Checkpoints(tmp_path / "new" / "run", ABOUT), table_state(3)
    assert checkpoints.latest_step() is None and checkpoints.restore(state) is state
    checkpoints.close()


def test_a_checkpoint_is_the_state_when_it_was_saved(tmp_path):
    """Training goes on in the donated buffers while the checkpoint is still being written."""
    table = np.random.default_rng(0).normal(size=(3, 4000, NUM_ACTIONS)).astype(np.float32)
    checkpoints, state = Checkpoints(tmp_path, ABOUT), table_state(table=table)
    for step in range(1, 4):
        state, _ = table_step()(state, table_batch(step))
        saved = jax.tree.map(np.array, state)
        checkpoints.save(state)
        for number in range(5):
            state, _ = table_step()(state, table_batch(number))
        checkpoints.wait()
        assert_same(checkpoints.restore(state), saved)
    checkpoints.close()


def test_latest_step_is_complete_on_disk(tmp_path):
    table = np.random.default_rng(0).normal(size=(3, 40_000, NUM_ACTIONS)).astype(np.float32)
    checkpoints = Checkpoints(tmp_path, ABOUT)
    checkpoints.save(table_state(4, table))
    step, described = checkpoints.latest_step(), checkpoints.describe_latest()
    there = steps_on_disk(tmp_path)
    checkpoints.close()
    assert step is None or step in there
    assert there or "no checkpoint yet" in described
    assert checkpoints.latest_step() == 4 and str(tmp_path / "4") in checkpoints.describe_latest()


def test_a_checkpoint_of_something_else_is_refused_with_both_values(tmp_path):
    save_steps(tmp_path, [1])
    with pytest.raises(CheckpointError) as error:
        restore(tmp_path, {"encoder": "resnet34", "games": GAMES, "dataset": "abc"})
    message = str(error.value)
    assert str(tmp_path / "1") in message and "games" not in message
    assert "encoder: 'nature' in the checkpoint, 'resnet34' here" in message
    assert "dataset: None in the checkpoint, 'abc' here" in message


@refuses
@pytest.mark.parametrize("shape", [(4, 5, 18), (2, 5, 18), (3, 6, 18), (3, 5, 18, 11)])
def test_other_shapes_are_refused(tmp_path, shape):
    save_steps(tmp_path, [1])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        restore(tmp_path, table=np.zeros(shape, np.float32))


def test_a_checkpoint_of_other_dtypes_is_refused_by_name_and_never_called_damaged(tmp_path):
    with jax.enable_x64(True):
        save_steps(tmp_path, [1], table=TABLE.astype(np.float64))
    with pytest.raises(CheckpointError) as error:
        restore(tmp_path)
    message = str(error.value)
    assert "float64 [3, 5, 18] in the checkpoint, float32 [3, 5, 18] is expected" in message
    assert "JAX_ENABLE_X64=1" in message and str(tmp_path / "1") in message
    assert "elete" not in message and "move" not in message
    with jax.enable_x64(True):
        restored = restore(tmp_path, table=TABLE.astype(np.float64))
    np.testing.assert_array_equal(restored.params["table"], TABLE.astype(np.float64) + 1)


@refuses
def test_advice_about_an_unreadable_checkpoint_destroys_nothing(tmp_path):
    save_steps(tmp_path, [1, 2])
    for file in (tmp_path / "2" / "state").rglob("*"):
        if file.is_file():
            flip_a_bit(file)
    with pytest.raises(CheckpointError, match=r"2: cannot be loaded.*move this folder elsewhere") as error:
        restore(tmp_path)
    assert "elete" not in str(error.value)
    (tmp_path / "2").rename(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    assert restore(tmp_path).step == 1


@refuses
def test_another_tree_is_refused(tmp_path):
    save_steps(tmp_path, [1])
    checkpoints, state = Checkpoints(tmp_path, ABOUT), table_state()
    for params in ({"table": jnp.array(TABLE), "bias": jnp.zeros(3)}, {"kernel": jnp.array(TABLE)}):
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            checkpoints.restore(state._replace(params=params))
    checkpoints.close()


def halve(file):
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


@refuses
@pytest.mark.parametrize("damage", [Path.unlink, halve, flip_a_bit])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_loads(tmp_path, damage):
    """Damage one file at a time: either all values are right, or a CheckpointError says that they are not."""
    table = np.random.default_rng(0).normal(size=(3, 200, NUM_ACTIONS)).astype(np.float32)
    states = save_steps(tmp_path / "whole", [1, 2], table=table)
    files = [path.relative_to(tmp_path) for path in (tmp_path / "whole" / "2").rglob("*") if path.is_file()]
    holds_arrays = max(files, key=lambda path: (tmp_path / path).stat().st_size)
    problems = []
    for number, file in enumerate(sorted(files)):
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", copy)
        damage(copy / file.relative_to("whole"))
        try:
            if not same(restore(copy, table=table), states[2]):
                problems.append(f"{file} loaded with other values")
            elif file == holds_arrays:
                problems.append(f"{file} was not read")
        except CheckpointError as error:
            if str(copy / "2") not in str(error):
                problems.append(f"{file}: the error names no folder")
            shutil.rmtree(copy / "2")
            assert_same(restore(copy, table=table), states[1])
        except Exception as error:
            problems.append(f"{file}: {type(error).__name__}")
    assert not problems


FILL_THE_DISK = """
import resource, sys
import jax.numpy as jnp, numpy as np
from scaled_ql.training import CheckpointError, Checkpoints, TrainState
checkpoints = Checkpoints(sys.argv[1], {})
def state(step):
    params = {"table": jnp.array(np.random.default_rng(step).normal(size=100_000))}
    return TrainState(jnp.int32(step), params, params, ())
checkpoints.save(state(1))
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
for step in (2, 3):
    try:
        checkpoints.save(state(step))
        checkpoints.wait()
    except CheckpointError as error:
        print(error)
print(checkpoints.describe_latest())
"""


def test_a_disk_that_takes_no_more_leaves_the_earlier_checkpoint(tmp_path):
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    command = [sys.executable, "-c", FILL_THE_DISK, str(tmp_path), "100000"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("could not be written") == 2 and "Make room on the disk" in process.stdout
    assert process.stdout.endswith(f"Last good checkpoint: {tmp_path / '1'}.\n")
    assert steps_on_disk(tmp_path) == [1]
    params = {"table": jnp.zeros(100_000)}
    checkpoints = Checkpoints(tmp_path, {})
    restored = checkpoints.restore(training.TrainState(jnp.int32(0), params, params, ()))
    expected = np.random.default_rng(1).normal(size=100_000).astype(np.float32)
    assert restored.step == 1 and np.array_equal(restored.target_params["table"], expected)
    checkpoints.save(restored._replace(step=jnp.int32(2)))  # there is room again
    checkpoints.close()
    assert steps_on_disk(tmp_path) == [1, 2]
