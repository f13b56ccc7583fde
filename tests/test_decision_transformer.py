"""Decision and cloning transformers: inference and losses against float64 references, memory in play, learning."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_evaluation
import test_sequences
import test_stitching as chain
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import windows

from scaled_ql import defaults, devices, evaluation, methods, parameters, training
from scaled_ql.games import FULL_ACTIONS, action_names
from scaled_ql.methods import decision_transformer as dt
from scaled_ql.methods.common import MethodError, checked_objective
from scaled_ql.networks.transformer import Predictions
from scaled_ql.replay import open_replay

# Inference.

LOGITS = np.array(
    [[0.0, 1.0, -2.0, 0.5, 3.0], [0, 0, 0, 0, 0], [8, -30, 2, -40, -35], [-40, -40, -40, -40, 0], [5, 4, 3, 2, 1]]
)


def test_the_papers_inference_weighs_returns_by_their_place_in_the_range():
    for kappa in (0.0, 1.0, 10.0):
        expected = np.exp(LOGITS) * np.exp(kappa * (np.arange(-2, 3) + 2) / 4)  # R from -2 to 2
        expected /= expected.sum(1, keepdims=True)
        np.testing.assert_allclose(
            jax.nn.softmax(dt.expert_return_logits(jnp.array(LOGITS), kappa)), expected, rtol=1e-5
        )


@pytest.mark.parametrize("samples, temperature", [(1, 1.0), (2, 0.75), (128, 0.75)])
def test_the_notebooks_inference_is_the_distribution_of_the_largest_draw(samples, temperature):
    """By the first draw that is k, none before it and at most k after it; what is rare is not lost in sums."""
    ours = np.asarray(dt.best_return_logits(jnp.array(LOGITS, jnp.float32), samples, temperature))
    for row, logits in zip(ours, LOGITS):
        p = np.exp(temperature * logits)
        p /= p.sum()
        best = [
            sum(p[:k].sum() ** n * p[k] * p[: k + 1].sum() ** (samples - 1 - n) for n in range(samples))
            for k in range(5)
        ]
        known = np.array(best) > 1e-300
        np.testing.assert_allclose(row[known], np.log(np.array(best)[known]), rtol=1e-4, atol=1e-4)
        assert (row[~known] < np.log(1e-300)).all()
    rare = np.asarray(dt.best_return_logits(jnp.array([0.0, -40.0]), 128, 1.0))
    assert rare[1] == pytest.approx(np.log(128) - 40, abs=1e-3)


def test_the_largest_of_draws_is_distributed_so():
    rng, p = np.random.default_rng(0), np.exp(0.75 * LOGITS[0])
    draws = rng.choice(5, (20_000, 8), p=p / p.sum()).max(1)
    expected = np.exp(dt.best_return_logits(jnp.array(LOGITS[0]), 8, 0.75))
    np.testing.assert_allclose(np.bincount(draws, minlength=5) / 20_000, expected, atol=4 * 0.5 / np.sqrt(20_000))


@given(
    logits=st.lists(st.integers(-400, 400).map(lambda x: x / 100), min_size=1, max_size=18),
    percentile=st.sampled_from([0.0, 25.0, 50.0, 75.0]),
)
@settings(deadline=None, max_examples=60)
def test_actions_above_the_percentile_are_played_in_proportion(logits, percentile):
    policy = np.exp(dt.top_actions(jnp.array(logits, jnp.float32), percentile))
    exact = np.float32(logits).astype(np.float64)
    place = percentile / 100 * (len(exact) - 1)
    low, high = np.sort(exact)[[int(np.floor(place)), int(np.ceil(place))]]
    threshold = low + (place - np.floor(place)) * (high - low)
    near = np.abs(exact - threshold) < 1e-5  # float32 may see them on either side
    kept = (exact > threshold) | (exact == exact.max()) | (percentile == 0)
    assert ((policy > 0) == kept)[~near | (percentile == 0) | (exact == exact.max())].all()
    kept = policy > 0
    np.testing.assert_allclose(policy[kept], np.exp(exact[kept]) / np.exp(exact[kept]).sum(), rtol=1e-4)


def test_tokens():
    reward = jnp.array([0, 0.5, -1, 1, 0, -1.0])
    assert dt.reward_tokens(reward, jnp.array([0, 0, 0, 1, 1, 0], bool)).tolist() == [0, 1, 3, 2, 2, 3]
    returns = jnp.array([-30, -20, -19.6, 0, 3.4, 99, 100, 1e6])
    assert dt.return_tokens(returns, -20, 99).tolist() == [0, 0, 0, 20, 23, 119, 119, 119]


# The loss.


def test_a_windows_losses_equal_a_reference():
    rng, mask = np.random.default_rng(0), np.array([False, True, True])
    returns, actions, rewards = rng.normal(size=(3, 5)), rng.normal(size=(3, 18)), rng.normal(size=(3, 4))
    action, reward = np.array([3, 17, 0]), np.array([1, 0, 2])
    predictions = Predictions(*(jnp.array(x, jnp.float32) for x in (returns, actions, rewards)), jnp.zeros((3, 1)))
    found = dt.window_losses(predictions, jnp.int32(4), jnp.array(action), jnp.array(reward), jnp.array(mask))

    def nll(logits, label):
        return np.log(np.exp(logits).sum()) - logits[label]

    assert found["return_nll"] == pytest.approx(nll(returns[0], 4), rel=1e-5), "padding, too, has a return"
    assert found["nll"] == pytest.approx((nll(actions[1], 17) + nll(actions[2], 0)) / 2, rel=1e-5)
    assert found["reward_nll"] == pytest.approx((nll(rewards[1], 0) + nll(rewards[2], 2)) / 2, rel=1e-5)
    assert found["accuracy"] == ((actions[1].argmax() == 17) + (actions[2].argmax() == 0)) / 2


HOW = {"transformer": "tiny", "sequence_length": 2}


@pytest.fixture
def shallow(monkeypatch):
    """One layer, which compiles sooner."""
    monkeypatch.setitem(defaults.TRANSFORMERS, "tiny", (1, 32, 2))


def made(method, seed=0):
    network = method.build("resnet101", 2, seed, dtype="float32", hidden_sizes=[1])
    optimizer = training.make_optimizer(1e-3, 1e-8)
    graph, state = training.init_state(network, optimizer)
    return network, optimizer, graph, state


@pytest.mark.parametrize("name", ["dt", "bc_transformer"])
def test_the_objective_is_the_mean_of_its_cross_entropies(shallow, name):
    method = methods.METHODS[name](**HOW, **({"return_low": -2, "return_high": 3} if name == "dt" else {}))
    network, _, graph, state = made(method)
    batch, key = windows(), jax.random.key(5)
    objective = jax.jit(checked_objective(method.objective(graph, [18, 4])))
    loss, metrics = objective(state.params, None, batch, key)
    dropout = jax.random.split(key)[1]
    token = np.clip(batch.return_to_go[:, 0], -2, 3).astype(int) + 2 if name == "dt" else None
    rewards = np.select([batch.reward > 0, batch.reward < 0], [1, 3], 0)
    outputs = nnx.jit(lambda net: net(batch.frames, token, batch.action, rewards, dropout))(network)
    expected, nll = {"nll": [], "reward_nll": [], "return_nll": []}, jax.nn.log_softmax
    for row in range(6):
        own = [(-nll(outputs.actions[row, t])[batch.action[row, t]], -nll(outputs.rewards[row, t])[rewards[row, t]])
               for t in range(2) if batch.mask[row, t]]  # fmt: skip
        expected["nll"].append(np.mean([x for x, _ in own]))
        expected["reward_nll"].append(np.mean([x for _, x in own]))
        if name == "dt":
            expected["return_nll"].append(-nll(outputs.returns[row, 0])[token[row]])
    for part, values in expected.items():
        assert (part in metrics) == bool(values)
        if values:
            assert metrics[part] == pytest.approx(np.mean(values), rel=1e-4)
    assert loss == metrics["loss"] == pytest.approx(np.mean([np.mean(x) for x in expected.values() if x]), rel=1e-4)
    np.testing.assert_allclose(metrics["nll_sum"], [np.sum(expected["nll"][g::2]) for g in (0, 1)], rtol=1e-4)
    assert metrics["nll_count"].tolist() == [3, 3]
    if name == "dt":
        assert metrics["clipped"] == np.mean((batch.return_to_go[:, 0] < -2) | (batch.return_to_go[:, 0] > 3)) > 0
        forgotten = batch._replace(return_to_go=np.full((6, 2), np.nan, np.float32))
        assert np.isnan(objective(state.params, None, forgotten, key)[0])


def test_a_control_tells_nothing_of_rewards():
    seen = []

    def objective(params, target_params, batch, key):
        seen.append(batch)
        return 0.0, {}

    batch = jax.tree.map(jnp.asarray, windows(40))
    batch = batch._replace(return_to_go=batch.return_to_go + 100 * jnp.arange(40)[:, None])  # no two alike
    methods.without_rewards(objective, "zero")(None, None, batch, jax.random.key(0))
    assert not seen[-1].reward.any() and not seen[-1].return_to_go.any()
    methods.without_rewards(objective, "shuffled")(None, None, batch, jax.random.key(0))
    shuffled, mask = seen[-1], np.asarray(batch.mask)
    assert (shuffled.return_to_go != batch.return_to_go).any()
    assert not np.asarray(shuffled.reward)[~mask].any() and not mask.all(), "padding has no rewards, in play neither"
    for game in (0, 1):
        own = np.asarray(batch.game) == game
        told = {tuple(to_go): reward for to_go, reward in zip(*(np.asarray(x)[own] for x in batch[3:1:-1]))}
        rows = [sorted(map(tuple, np.asarray(x.return_to_go)[own])) for x in (batch, shuffled)]
        assert rows[0] == rows[1], "other windows' of the same game, whole"
        for number in np.flatnonzero(own):
            theirs = told[tuple(np.asarray(shuffled.return_to_go)[number])]
            np.testing.assert_array_equal(shuffled.reward[number], np.where(mask[number], theirs, 0))


# Play.


def test_an_action_that_the_game_lacks_is_played_as_noop():
    rng = np.random.default_rng(0)
    policy = jax.nn.log_softmax(rng.normal(size=(3, 18)))
    policy = np.array(policy.at[1, 0].set(-jnp.inf), np.float32)
    player = evaluation.MemoryPlayer(lambda *_: policy, None, 0, action_names("Breakout"), 2)
    values = player(windows(3), np.zeros((3, 3), np.int32))
    own = [FULL_ACTIONS.index(name) for name in ("NOOP", "FIRE", "RIGHT", "LEFT")]
    expected = np.exp(policy[:, own])
    expected[:, 0] += np.exp(np.delete(policy, own, axis=1)).sum(1)
    np.testing.assert_allclose(np.exp(values), expected, rtol=1e-5)


class Watching(evaluation.MemoryPlayer):
    """Records what it is shown, and plays by a script."""

    def __init__(self, choose, length):
        super().__init__(None, None, 0, action_names("Breakout"), length)
        self.choose, self.seen = choose, []

    def __call__(self, windows, draw):
        self.seen.append((windows, draw))
        return np.eye(4, dtype=np.float32)[self.choose(len(self.seen), len(draw))]


class Numbered(test_evaluation.Scripted):
    """Frames that tell slot, episode and step; rewards that differ by step."""

    step = 0

    def reset(self, seed):
        stacks = np.zeros((len(self.lengths), 4, 84, 84), np.uint8)
        for slot, left in enumerate(self.left):
            length = self.lengths[slot][self.episode[slot] % len(self.lengths[slot])]
            stacks[slot, -1, 0, :3] = 1 + slot, 1 + self.episode[slot], 1 + length - left
        return stacks, {}

    def recv(self):
        stacks, reward, ended, truncated, info = super().recv()
        self.step += 1
        return stacks, np.where(reward > 1, reward, self.step % 4 - 1.0), ended, truncated, info


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 6), min_size=3, max_size=3), min_size=1, max_size=3),
    length=st.integers(1, 4),
)
def test_a_player_with_a_memory_sees_its_episodes_last_steps_and_no_other_episode(lengths, length):
    environments = Numbered(lengths)
    environments.left = np.array([row[0] for row in lengths])
    choices = np.random.default_rng(0).integers(4, size=(200, len(lengths)))
    player = Watching(lambda moment, _: choices[moment][player.seen[-1][1][:, 1]], length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "make_vector_environment", lambda game, slots, **options: environments)
        how = {"episodes": 3 * len(lengths), "seed": 7, "epsilon": 0.0, "num_environments": len(lengths)}
        evaluation.evaluate(player, "Breakout", **how)
    full = [FULL_ACTIONS.index(name) for name in action_names("Breakout")]
    histories = [[] for _ in lengths]
    for moment, (seen, draw) in enumerate(player.seen):
        asked = draw[:, 1].tolist()  # finished ones need not be among them
        assert draw.tolist() == [[7, slot, moment] for slot in asked]
        for place, slot in enumerate(asked):
            if environments.sent[moment][1][slot]:  # the step that resets: its action is ignored
                histories[slot] = []
                continue
            history = histories[slot]
            recent = history[-(length - 1) :] if length > 1 else []
            padding = length - 1 - len(recent)
            assert seen.mask[place].tolist() == [False] * padding + [True] * (length - padding)
            shown = seen.frames[place, :, 0, :3].tolist()
            assert shown[:padding] == [[0, 0, 0]] * padding
            steps = [len(history) - len(recent) + 1 + k for k in range(len(recent) + 1)]
            assert [frame[2] for frame in shown[padding:]] == steps
            assert len({tuple(frame[:2]) for frame in shown[padding:]}) == 1, "one episode"
            assert seen.action[place].tolist() == [0] * padding + [full[a] for a, _ in recent] + [0]
            assert seen.reward[place].tolist() == [0] * padding + [r for _, r in recent] + [0]
            collected = -np.cumsum([0.0] + [r for _, r in history])
            assert seen.return_to_go[place, padding:].tolist() == collected[len(history) - len(recent) :].tolist()
            history.append((choices[moment + 1, slot], float(np.clip((moment + 1) % 4 - 1, -1, 1))))


@functools.cache
def trained_like(name="dt", **settings):
    method = methods.METHODS[name](**HOW, **settings)
    _, _, graph, state = made(method)
    return method, method.preferences(graph, [4]), state.params


def test_a_film_shows_what_the_player_saw_and_chose(shallow, tmp_path):
    method, prefer, params = trained_like()
    player = evaluation.make_player(method, prefer, params, 0, action_names("Breakout"))
    shared = {"seed": 4, "sticky_actions": 0.25, "max_steps": 40}
    seen = []

    class Recorded(evaluation.MemoryPlayer):
        def __init__(self):
            vars(self).update(vars(player))

        def __call__(self, windows, draw):
            values = super().__call__(windows, draw)
            seen.extend(zip(draw.tolist(), values))
            return values

    played = evaluation.evaluate(
        Recorded(),
        "Breakout",
        episodes=3,
        num_environments=2,
        epsilon=0.2,
        temperature=1.0,
        keep_actions=True,
        **shared,
    )
    in_play, number = {tuple(draw): values for draw, values in seen}, played.index[-1]
    assert (played["environment"] == played.loc[number, "environment"]).sum() == 2, "not its environment's first"
    seen.clear()
    score = evaluation.record_film(
        Recorded(), "Breakout", played, number, tmp_path / "film.mp4", num_steps=30, **shared
    )
    assert score == played.loc[number, "episode_return"]
    assert len({tuple(draw) for draw, _ in seen}) == 30
    for draw, values in seen:
        np.testing.assert_allclose(values, in_play[tuple(draw)], atol=1e-4)


def test_play_is_a_function_of_its_numbers_and_asks_for_the_target(shallow):
    """The return drawn differs with the numbers; a number as a target is reached less what was collected."""
    batch, draw = windows(4), np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]], np.int32)
    _, prefer, params = trained_like("dt", action_percentile=0.0)
    one = batch._replace(**{name: np.repeat(x[:1], 4, 0) for name, x in batch._asdict().items()})
    policies = np.asarray(prefer(params, one, draw))
    np.testing.assert_allclose(np.exp(policies).sum(1), 1, rtol=1e-4)
    np.testing.assert_array_equal(policies, prefer(params, one, draw))
    _, prefer, params = trained_like("dt", target_return=5.0, action_percentile=0.0)
    given = one._replace(return_to_go=np.repeat(np.float32([[0], [-3], [-3], [0]]), 2, 1))
    policies = np.asarray(prefer(params, given, draw))
    np.testing.assert_array_equal(policies[[0, 1]], policies[[3, 2]])
    assert np.abs(policies[0] - policies[1]).max() > 0


def test_an_experts_returns_from_data_weigh_the_predicted_ones_in_each_game(shallow):
    """Where one return is left, it is played for; where nothing is known of an expert, as the data's players did."""
    batch = windows(64)
    one = batch._replace(**{name: np.repeat(x[:1], 64, 0) for name, x in batch._asdict().items()})
    draw = np.stack([np.zeros(64), np.zeros(64), np.arange(64)], 1).astype(np.int32)
    experts = np.zeros((2, 120), np.float32)
    experts[1] = np.where(np.arange(120) == 25, 3.0, -np.inf)
    how = {"target_return": "data", "action_percentile": 0.0, "expert_returns": experts}
    _, _, graph, state = made(methods.dt(**HOW))
    prefer, params = methods.dt(**HOW, **how).preferences(graph, [4, 4]), state.params
    first, second = (
        np.asarray(prefer(params, one._replace(game=np.full(64, game, np.int32)), draw)) for game in (0, 1)
    )
    _, wanted, _ = trained_like("dt", target_return=5.0, action_percentile=0.0)
    asked = wanted(params, one._replace(return_to_go=np.zeros_like(one.return_to_go)), draw)
    np.testing.assert_allclose(second, asked, atol=1e-5)
    _, wanted, _ = trained_like("dt", target_return="paper", return_kappa=0.0, action_percentile=0.0)
    np.testing.assert_allclose(first, wanted(params, one, draw), atol=1e-5)
    assert np.ptp(first, axis=0).max() > 1e-4 > np.ptp(second, axis=0).max()


def test_an_expert_that_nobody_gave_is_asked_for_in_a_sentence():
    with pytest.raises(
        MethodError, match=r"target_return = 'data' asks for an expert's returns, but there are none: pass"
    ):
        methods.dt(target_return="data").preferences(None, [3])


# Training.


def test_training_that_was_stopped_resumes_bit_identically(shallow, tmp_path):
    """On windows from a store, through the trainer; its checkpoint says that it holds a transformer."""
    data = open_replay(test_sequences.write(tmp_path / "replay", test_sequences.EPISODES))
    small = {"games_per_batch": 2, "transitions_per_game": 2, "num_steps": 4, "log_every": 1, "checkpoint_every": 2}
    p = parameters.check("04_scaled_training", {"method": "dt", "transformer": "tiny", "sequence_length": 2, **small})
    mesh, method = devices.make_mesh(1), methods.make(p)
    network, optimizer, graph, _ = made(method)
    objective = method.objective(graph, [6, 6])

    def train(folder, until=None):
        trainer = training.Trainer(p, data, mesh, tmp_path / folder, tmp_path / folder)
        needed = trainer.check_memory(objective, optimizer, training.init_state(network, optimizer)[1], method.batches)
        assert needed["activations"] > 0
        state = training.init_state(network, optimizer)[1]
        with contextlib.closing(trainer.steps(objective, optimizer, state, method.batches)) as steps:
            for state, log in steps:  # noqa: B007
                if until is not None and int(state.step) == until:
                    break
        return jax.device_get(state), log.table()

    train("stopped", until=3)
    (state, log), (expected, undisturbed) = train("stopped"), train("undisturbed")
    for ours, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, wanted)
    columns = [name for name in log if not name.endswith("per_second")]
    assert log[columns].equals(undisturbed[columns]) and len(log) == 4 and np.isfinite(log["loss"]).all()
    about = training.read_params(tmp_path / "stopped" / "checkpoints")[1]
    assert about["transformer"] == "tiny" and about["sequence_length"] == 2


def test_only_what_predicts_returns_reads_them(tmp_path, monkeypatch):
    data = open_replay(test_sequences.write(tmp_path / "replay", test_sequences.EPISODES))
    small = {
        "transformer": "tiny",
        "sequence_length": 2,
        "games_per_batch": 2,
        "transitions_per_game": 2,
        "num_steps": 2,
    }
    read = []
    monkeypatch.setattr(
        training.replay, "returns_to_go", lambda *about: read.append(about) or np.zeros(1_000, np.float32)
    )
    for name, reads in (("bc_transformer", 0), ("dt", len(data.games))):
        p = parameters.check("04_scaled_training", {"method": name, **small})
        kind = methods.make(p).batches
        trainer = training.Trainer(p, data, devices.make_mesh(1), tmp_path, tmp_path)
        for batch in (trainer.batch(kind), next(trainer.batches(kind, 0))):
            assert np.isnan(batch.return_to_go).all() == (name == "bc_transformer") and batch.action.shape == (4, 2)
        assert len(read) == reads


# Learning.

SMALL = {"transformer": "tiny", "sequence_length": 4, "return_low": 0, "return_high": 6}
NAMES = FULL_ACTIONS[:3]


def of_steps(rows):
    """Windows of four steps that end with the last of some steps (frame, action, reward); one return for each."""
    batch = jax.tree.map(np.zeros_like, windows(len(rows), 4))
    for row, (steps, total) in enumerate(rows):
        first = 4 - len(steps)
        batch.return_to_go[row] = total
        batch.mask[row, first:] = True
        for place, (frame, action, reward) in enumerate(steps, first):
            batch.frames[row, place], batch.action[row, place], batch.reward[row, place] = frame, action, reward
    return batch


@functools.cache
def small_step():
    method = methods.dt(**SMALL)
    network, optimizer, graph, _ = made(method)
    train_step = training.make_train_step(method.objective(graph, [3]), optimizer)
    return graph, network, optimizer, train_step


def learned(rows):
    """The parameters after training on twelve windows at every step."""
    _, network, optimizer, train_step = small_step()
    state, batch = (
        training.init_state(network, optimizer)[1],
        jax.device_put(of_steps(rows)._replace(game=np.zeros(12, np.int32))),
    )
    for _ in range(150):
        state, metrics = train_step(state, batch)
    return state.params, jax.device_get(metrics)


@functools.cache
def player_of(target_return):
    prefer = methods.dt(**SMALL, target_return=target_return).preferences(small_step()[0], [3])
    return lambda params: evaluation.MemoryPlayer(prefer, params, 0, NAMES, 4)


@pytest.mark.usefixtures("optimized")
def test_a_high_return_asked_for_is_played_and_a_low_one_is_not():
    """In each of two images, the action that gives 5 is another one, and rarer than the one that gives 0."""
    frames = np.zeros((2, 84, 84), np.uint8)
    frames[0, 20:60, 20:40], frames[1, 20:60, 50:70] = 255, 255
    rows = [([(frames[0], 0, 0)], 0)] * 4 + [([(frames[0], 2, 1)], 5)] * 2
    rows += [([(frames[1], 0, 0)], 0)] * 4 + [([(frames[1], 1, 1)], 5)] * 2
    params, metrics = learned(rows)
    assert metrics["accuracy"] == 1, "given their returns, the data's actions are certain"

    def plays(target_return):
        player = player_of(target_return)(params)
        history = evaluation.History(player, np.arange(2), seed=0)
        return player(*history.see(frames, np.ones(2, bool))).argmax(1).tolist()

    assert plays(5.0) == [2, 1]
    assert plays(0.0) == [0, 0]
    assert plays("notebook") == [2, 1], "the best of many draws is the high return, though the low one is likelier"


@pytest.mark.usefixtures("optimized")
def test_a_decision_transformer_does_not_stitch_the_chain():
    """It plays one good half or the other; Q-learning on this data plays both (`test_stitching`): 1.5."""
    frames, rows = chain.images()[..., 0], []
    for actions in chain.DATA:
        states, rewards = chain.follow(actions)
        steps = list(zip(frames[states[:-1]], actions, rewards))
        rows += [(steps[: t + 1], 4 * sum(rewards)) for t in range(len(steps))]
    params, metrics = learned(rows)
    assert metrics["return_nll"] == pytest.approx(-np.log(2 / 3) * 2 / 3 - np.log(1 / 3) / 3, abs=0.05)
    player = player_of("notebook")(params)
    for seed in range(4):
        history, rng = evaluation.History(player, np.zeros(1, int), seed), np.random.default_rng(seed)
        state, total, actions = chain.START, 0.0, []
        while state != chain.END:
            values = player(*history.see(frames[[state]], np.array([not actions])))
            action = int((values[0] + rng.gumbel(size=3)).argmax())
            reward = chain.REWARD[state, action]
            history.act(np.array([action]), np.array([reward]))
            state, total, actions = chain.NEXT[state, action], total + reward, [*actions, action]
        assert total == 1.0 and actions in chain.DATA[:2]
