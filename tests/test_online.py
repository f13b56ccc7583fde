"""Online learners: they learn, what they log is what the emulator showed, and they survive being stopped."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catch import make_catch
from test_training import events

from scaled_ql import losses, networks, training
from scaled_ql.devices import OutOfMemory
from scaled_ql.environments import EnvironmentDied, make_environment, make_vector_environment, rules
from scaled_ql.games import RULES, UnknownGame, UnknownVariant
from scaled_ql.online import agents, log
from scaled_ql.online import play as playing
from scaled_ql.online.ring import Ring, sample_rings
from scaled_ql.replay import ReplayError, ReplayWriter, open_replay
from scaled_ql.replay.batch import Batch

NAMES = ["Freeway", "Skiing", "Breakout"]  # in ALE they have 3, 3 and 4 actions, and so has Catch under these names


@functools.cache
def compiled(num_actions, shared=False, head="mse", seed=0, learning_rate=5e-4, hidden=16, v_max=6.0):
    heads = len(num_actions) if shared else 1
    sizes = {"hidden_sizes": (hidden,), "normalize_features": False, "layer_norm": False}
    build = partial(networks.make_q_network, "nature_narrow", heads, head, **sizes)
    make = agents.multi_task_learner if shared else agents.independent_learners
    settings = {"atoms": losses.support(-v_max, v_max, 51), "target_update_period": 100}
    return make(
        build, list(num_actions), training.make_optimizer(learning_rate, 1e-5), seed=seed, head=head, **settings
    )


def make_learner(num_actions, **settings):
    """As if it were new: updates donate the state."""
    learner = compiled(tuple(num_actions), **settings)
    return learner._replace(state=jax.tree.map(jnp.copy, learner.state))


def checkpoints_in(folder):
    return training.Checkpoints(folder / "checkpoints", {"agent": "of a test"})


def play(folder, games, learner, **changed):
    """All that `play` reports of a short run, after it ended."""
    settings = {
        "num_transitions": 200, "seed": 0, "source": "test", "environments": 4, "num_threads": 2, "max_steps": 25,
        "capacity": 1_000, "batch_size": 8, "min_history": 100, "update_period": 16, "epsilon_decay": 100,
        "final_epsilon": 0.1, "report_seconds": 0.0,
    }  # fmt: skip
    settings |= changed
    checkpoints = settings.pop("checkpoints", None) or checkpoints_in(folder)
    return playing.play(folder / "replay", games, learner, checkpoints, **settings)


# Learning.


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("kind", ["independent", "shared"])
def test_agents_reach_nine_tenths_of_the_best_return(tmp_path, kind):
    """Two single-game agents with two seeds, of 3 and 4 actions; then one C51 agent for two games."""
    if kind == "independent":
        games, learner, count = NAMES[1:], make_learner([3, 4], hidden=128, learning_rate=1e-3), 12_000
    else:
        games, count = NAMES[:2], 14_000
        learner = make_learner([3, 3], shared=True, head="c51", hidden=128, learning_rate=2e-3)
    settings = {
        "num_transitions": count, "environments": 16, "max_steps": 100, "capacity": 12_000, "min_history": 1_000,
        "update_period": 8, "epsilon_decay": 4_000, "final_epsilon": 0.02, "n_step": 3, "batch_size": 32,
        "report_seconds": 5.0,
    }  # fmt: skip
    for _ in play(tmp_path, games, learner, make=make_catch, **settings):
        pass
    replay = open_replay(tmp_path / "replay")
    for game in games:
        returns = replay.episodes(game)["episode_return"]
        assert returns.head(20).mean() < 0
        assert returns.tail(60).mean() > 4.5, game  # the best is 5; 2% of the moves are random


def random_batch(rng, leading, num_actions):
    """[*leading] transitions of one game each."""
    size = leading[-1]
    action = np.stack([rng.integers(n, size=size) for n in num_actions]) if len(leading) == 2 else None
    return Batch(
        frames=rng.integers(0, 256, (*leading, 5, 84, 84), np.uint8),
        next_stack=np.broadcast_to(np.arange(1, 5, dtype=np.int32), (*leading, 4)).copy(),
        action=action.astype(np.int32),
        reward=rng.normal(size=leading).astype(np.float32),
        discount=rng.choice([0.0, 0.99], leading).astype(np.float32),
        game=np.zeros(leading, np.int32),
    )


@pytest.mark.parametrize("over_games", [agents._one_by_one, jax.vmap])
def test_agents_trained_together_are_those_trained_alone(over_games, monkeypatch):
    monkeypatch.setattr(agents, "_one_by_one", over_games)
    rng, num_actions, head = np.random.default_rng(0), [4, 6], "c51"
    together = make_learner(num_actions, head=head)
    batches = [random_batch(rng, (2, 4), num_actions) for _ in range(3)]
    state = together.state
    first = jax.device_get(state.params)
    for batch in batches:
        state, metrics = together.update(state, batch)
    assert metrics["loss"].shape == (2,) and int(state.step) == 3
    for game, size in enumerate(num_actions):
        alone = make_learner([size], head=head, seed=game)
        jax.tree.map(lambda a, b, g=game: np.testing.assert_array_equal(a[g], b[0]), first, alone.state.params)
        own = alone.state
        for batch in batches:
            own, _ = alone.update(own, jax.tree.map(lambda x, g=game: x[g : g + 1], batch))
        jax.tree.map(
            lambda a, b, g=game: np.testing.assert_allclose(a[g], b[0], rtol=1e-3, atol=2e-5), state.params, own.params
        )
    stacks = rng.integers(0, 256, (2, 5, 4, 84, 84), np.uint8)
    greedy = np.asarray(together.greedy(state.params, stacks))
    for game, size in enumerate(num_actions):
        values = together.q_function(state.params, game)(stacks[game])
        assert values.shape == (5, size)
        np.testing.assert_array_equal(values.argmax(1), greedy[game])


def test_a_shared_agent_acts_with_each_games_head():
    learner = make_learner([4, 6], shared=True)
    stacks = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 84, 84), np.uint8)
    greedy = np.asarray(learner.greedy(learner.state.params, stacks))
    for game in range(2):
        values = learner.q_function(learner.state.params, game)(stacks[game])
        np.testing.assert_array_equal(values.argmax(1), greedy[game])


def test_epsilon():
    assert [playing.exploration_rate(step, 100, 50, 0.1) for step in (0, 100, 125, 150, 1_000)] == [
        1,
        1,
        0.55,
        0.1,
        0.1,
    ]


def test_batches_of_all_games():
    rings = []
    for game in range(3):
        ring = Ring(2, 100, 20)
        ring.begin(np.full((2, 84, 84), game + 1, np.uint8))
        for _ in range(10):
            flags = np.zeros(2, bool)
            ring.add(np.full((2, 84, 84), game + 1, np.uint8), np.zeros(2, int), np.zeros(2), flags, flags)
        rings.append(ring)
    with ThreadPoolExecutor() as pool:
        draw = partial(sample_rings, rings, [1, 2], 300, pool)
        apart, shared, again = draw(shared=False), draw(shared=True), draw(shared=True)
    assert apart.frames.shape == (3, 300, 5, 84, 84)
    assert all((apart.frames[game, :, 3] == game + 1).all() for game in range(3))
    assert shared.frames.shape == (300, 5, 84, 84)
    np.testing.assert_array_equal(shared.frames[:, 3, 0, 0], shared.game + 1)
    assert min(np.bincount(shared.game)) > 70  # of 100 each
    jax.tree.map(np.testing.assert_array_equal, shared, again)


# Logging.


class Recorded:
    """Environments, and all that went in and out of them."""

    def __init__(self, *arguments, **options):
        self.environments, self.steps = make_vector_environment(*arguments, **options), []

    @property
    def num_envs(self):
        return self.environments.num_envs

    def reset(self, **options):
        stacks, info = self.environments.reset(**options)
        self.first = stacks.copy()
        return stacks, info

    def send(self, actions):
        self.actions = actions.copy()
        self.environments.send(actions)

    def recv(self):
        result = self.environments.recv()
        self.steps.append((self.actions, *(np.array(part) for part in result[:4])))
        return result

    def close(self):
        self.environments.close()


def naive_episodes(recorded, number):
    """(step at which it ended, frames, actions, rewards, terminal) of one environment, from what it said."""
    frames, actions, rewards, resetting = [recorded.first[number, -1]], [], [], False
    for step, (action, stacks, reward, terminated, truncated) in enumerate(recorded.steps):
        if resetting:
            frames, actions, rewards, resetting = [stacks[number, -1]], [], [], False
            continue
        frames.append(stacks[number, -1])
        actions.append(int(action[number]))
        rewards.append(float(reward[number]))
        if terminated[number] or truncated[number]:
            yield step, np.stack(frames), actions, rewards, bool(terminated[number])
            resetting = True


@pytest.mark.parametrize(
    "sticky, more",
    [
        (0.25, {"max_steps": 250, "num_transitions": 1_500, "final_epsilon": 0.7}),
        (0.0, {"max_steps": 60}),
        (0.0, {"max_steps": 40, "mode": 4, "difficulty": 1}),
    ],
)
def test_everything_logged_was_played(tmp_path, sticky, more):
    made = []

    def make(*arguments, **options):
        made.append(Recorded(*arguments, **options))
        return made[-1]

    settings = {"num_transitions": 500, "sticky_actions": sticky, "make": make, "environments": 3, "capacity": 300}
    *_, (state, report) = play(tmp_path, ["Breakout"], make_learner([4]), **(settings | more))
    replay = open_replay(tmp_path / "replay")
    assert replay.validate() == []
    variant = {name: more[name] for name in ("mode", "difficulty") if name in more}
    (manifest,) = replay.manifests("Breakout")
    played = rules(sticky_actions=sticky, max_steps=more["max_steps"], **variant)
    assert {name: manifest[name] for name in RULES} == played
    assert [half.num_envs for half in made] == [2, 1]
    order = enumerate((half, e) for half in made for e in range(half.num_envs))
    expected = sorted((end, number, *rest) for number, at in order for end, *rest in naive_episodes(*at))
    table = replay.episodes("Breakout")
    assert len(table) >= 4 and report["logged"]["Breakout"] == table["length"].sum()
    if sticky:
        assert set(table["terminal"]) == {True, False}
    for number, row in enumerate(table.itertuples()):
        end, _, frames, actions, rewards, terminal = expected[number]
        episode = replay.episode("Breakout", number)
        np.testing.assert_array_equal(episode["observation"], frames)
        assert episode["action"].tolist() == actions and episode["reward"].tolist() == rewards
        assert (row.terminal, row.truncated) == (terminal, not terminal)
        before, earlier = (
            3 * step - sum(other + 1 < step for other, *_ in expected) for step in (end, max(end - 1, 0))
        )  # transitions played before that step, and before the one before it
        assert row.epsilon == playing.exploration_rate(before, 100, 100, more.get("final_epsilon", 0.1))
        assert row.learner_step == max(earlier - 100, 0) // 16  # of the parameters that chose the last action
    assert int(state.step) == report["updates"] > 0

    if not sticky:  # a fresh emulator, stepped one by one, shows the same
        fresh = make_environment("Breakout", sticky_actions=0.0, max_steps=more["max_steps"], **variant)
        for number in range(len(table)):
            episode, (frame, _) = replay.episode("Breakout", number), fresh.reset(seed=0)
            for step, action in enumerate(episode["action"].tolist()):
                np.testing.assert_array_equal(episode["observation"][step], frame)
                frame, reward, terminated, truncated, _ = fresh.step(action)
                assert reward == episode["reward"][step]
                assert (terminated or truncated) == (step == len(episode["action"]) - 1)
            assert terminated == table["terminal"].iloc[number]
            np.testing.assert_array_equal(episode["observation"][-1], frame)


class Halves:
    """Catch in parts; notes which of them are under way."""

    def __init__(self):
        self.under_way, self.parts = set(), []

    def make(self, game, num_environments, **options):
        part, number = make_catch(game, num_environments), len(self.parts)
        self.parts.append(part)
        send, recv = part.send, part.recv

        def sent(actions):
            self.under_way.add(number)
            send(actions)

        def received():
            self.under_way.remove(number)
            return recv()

        part.send, part.recv = sent, received
        return part


def test_a_half_of_the_environments_steps_while_the_network_chooses_and_all_while_it_learns(tmp_path):
    halves, learner, asked, learned = Halves(), make_learner([4]), [], []

    def greedy(params, stacks):
        asked.append((stacks.shape[:2], set(halves.under_way)))
        return learner.greedy(params, stacks)

    def update(state, batch):
        learned.append(set(halves.under_way))
        return learner.update(state, batch)

    own = learner._replace(greedy=greedy, update=update)
    list(play(tmp_path, ["Breakout"], own, make=halves.make, num_transitions=400))
    assert [part.num_envs for part in halves.parts] == [2, 2]
    assert set(map(str, asked)) == {str(((1, 2), {1})), str(((1, 2), {0}))} and len(asked) > 20
    assert learned and all(under_way == {0, 1} for under_way in learned)


def test_the_halves_start_and_play_as_if_they_were_one(tmp_path):
    """Environment e has the same seed however the environments are divided; without a network all choices are equal."""
    made = []

    def make(*arguments, **options):
        made.append(Recorded(*arguments, **options))
        return made[-1]

    settings = {"environments": 5, "min_history": 10**6, "num_transitions": 300, "max_steps": 40}
    list(play(tmp_path, ["Breakout"], make_learner([4]), make=make, **settings))
    whole = make_vector_environment("Breakout", 5, num_threads=2, sticky_actions=0.25, max_steps=40)
    whole.reset(seed=int(np.random.default_rng([0, 1, 0, 0]).integers(2**30)))
    halves = list(zip(*(half.steps for half in made)))
    assert len(halves) > 60
    for parts in halves:
        actions, *expected = map(np.concatenate, zip(*parts))
        for now, then in zip(whole.step(actions), expected):
            np.testing.assert_array_equal(now, then)
    whole.close()


def test_episodes_are_written_together_in_order_and_what_waits_is_bounded(tmp_path, monkeypatch):
    written = []

    class Writer:
        num_transitions = 7

        def extend(self, episodes):
            written.append([episode["number"] for episode in episodes])

    monkeypatch.setattr(log, "WRITE_SECONDS", 0.2)
    monkeypatch.setattr(log, "TRANSITIONS_WAITING", 50)
    with log.EpisodeLog({"Pong": Writer(), "Breakout": Writer()}) as episodes:
        for number in range(4):
            episodes.append("Pong", {"action": np.zeros(10)}, number=number)
            episodes.write_if_due()
        assert not written and episodes.transitions == {"Pong": 47, "Breakout": 7}
        time.sleep(0.25)
        episodes.write_if_due()
        episodes.append("Breakout", {"action": np.zeros(51)}, number=4)  # more than may wait
        episodes.append("Pong", {"action": np.zeros(1)}, number=5)
        episodes.wait()
        assert written == [[0, 1, 2, 3], [4], [5]]
        episodes.append("Pong", {"action": np.zeros(1)}, number=6)
    assert written[3:] == [[6]]


def test_a_failed_write_is_reported_and_other_games_are_written(tmp_path):
    written = []

    class Writer:
        num_transitions = 0

        def __init__(self, fails):
            self.fails = fails

        def extend(self, episodes):
            if self.fails:
                raise ReplayError("make room")
            written.extend(episodes)

    one = {"action": np.zeros(1)}
    with pytest.raises(ReplayError, match="make room"), log.EpisodeLog({"a": Writer(True), "b": Writer(False)}) as both:
        both.append("a", one)
        both.append("b", one)
        try:
            both.wait()
        finally:
            both.append("b", one)
    assert len(written) == 2


# Stopping and resuming.


def test_a_stopped_run_goes_on(tmp_path):
    games, options = ["Breakout", "Pong"], {"checkpoint_every": 5, "num_transitions": 400}
    options["tensorboard"] = tmp_path / "tensorboard"
    running = play(tmp_path, games, make_learner([4, 6]), **options)
    report = next(report for _, report in running if report["updates"] >= 12)
    running.close()  # as Ctrl-C does
    before = open_replay(tmp_path / "replay")
    saved = checkpoints_in(tmp_path).latest_step()
    assert 10 <= saved <= report["updates"]
    reports = [report for _, report in play(tmp_path, games, make_learner([4, 6]), **options)]
    first, last = reports[0], reports[-1]
    for game in games:
        logged = before.num_transitions(game)
        assert logged <= first["played"][game] <= logged + 4
        assert first["epsilon"][game] == playing.exploration_rate(first["played"][game], 100, 100, 0.1)
        replay = open_replay(tmp_path / "replay")
        assert replay.num_transitions(game) >= 400
        kept = replay.episodes(game).head(len(before.episodes(game)))
        assert kept["crc32"].tolist() == before.episodes(game)["crc32"].tolist()
        assert replay.episodes(game)["epsilon"].is_monotonic_decreasing
    assert replay.validate() == []
    mirrored = mirror(tmp_path / "tensorboard")
    assert mirrored == naive_mirror(replay)
    assert last["updates"] == (min(last["played"].values()) - 100) // 16 or last["updates"] >= saved
    finished = [report for _, report in play(tmp_path, games, make_learner([4, 6]), **options)]
    assert len(finished) == 1 and finished[0]["logged"] == last["logged"]
    assert mirror(tmp_path / "tensorboard") == mirrored


def test_checkpoints_to_keep_are_kept_though_several_updates_fall_due_at_once(tmp_path):
    checkpoints = training.Checkpoints(tmp_path / "checkpoints", {"agent": "of a test"}, keep_period=10)
    settings = {"num_transitions": 140, "update_period": 1, "checkpoint_every": 5, "checkpoints": checkpoints}
    *_, (_, report) = play(tmp_path, ["Pong"], make_learner([6]), **settings)
    checkpoints.wait()
    steps = sorted(int(folder.name) for folder in (tmp_path / "checkpoints").iterdir())
    saved = sorted({*range(5, report["updates"] + 1, 5), report["updates"]})
    assert report["updates"] >= 40
    assert steps == sorted({*saved[-2:], *(step for step in saved if step % 10 == 0)})


def mirror(folder):
    """(name, transitions, value) of all that TensorBoard would show."""
    return sorted((name, step, value) for step, values in events(folder) for name, value in values.items())


def naive_mirror(replay):
    shown = []
    for game in replay.games:
        for number, row in replay.episodes(game).iterrows():
            read = replay.episode(game, number)
            values = {"return": read["reward"].sum(), "length": len(read["action"]), "epsilon": row["epsilon"]}
            end = row["start"] + row["length"]
            shown += [(f"{name}/{game}", end, float(np.float32(value))) for name, value in values.items()]
    return sorted(shown)


def test_an_interrupted_run_writes_what_it_handed_over_before_it_gives_the_store_back(tmp_path, monkeypatch):
    happened = []

    class Slow(ReplayWriter):
        def extend(self, episodes):
            time.sleep(0.1)
            super().extend(episodes)
            happened.extend("append" for _ in episodes)

        def close(self):
            happened.append("close")
            super().close()

    monkeypatch.setattr(playing, "ReplayWriter", Slow)
    running = play(tmp_path, ["Breakout"], make_learner([4]), num_transitions=10**6, update_period=10**6)
    while "append" not in happened:
        next(running)
    running.close()  # environments end their episodes together, so some are still to be written
    assert happened == ["append"] * happened.count("append") + ["close"] and happened.count("append") > 1
    replay = open_replay(tmp_path / "replay")
    assert len(replay.episodes("Breakout")) == happened.count("append") and replay.validate() == []


CHILD = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from test_online import make_learner, play
for state, report in play(Path(sys.argv[1]), ["Breakout"], make_learner([4]), num_transitions=1500,
                          checkpoint_every=10):
    print(report["logged"]["Breakout"], flush=True)
"""


def test_a_killed_run_keeps_what_was_on_disk_and_goes_on(tmp_path):
    code = CHILD.format(tests=str(Path(__file__).parent))
    logged = 0
    for kill_at in (300, 800):
        with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
            for line in child.stdout:
                logged = int(line)
                if logged >= kill_at:
                    child.send_signal(signal.SIGKILL)
                    break
        replay = open_replay(tmp_path / "replay")
        assert replay.validate() == []
        assert replay.num_transitions("Breakout") >= logged
    *_, (state, report) = play(tmp_path, ["Breakout"], make_learner([4]), num_transitions=1_500)
    table = open_replay(tmp_path / "replay").episodes("Breakout")
    assert report["logged"]["Breakout"] == table["length"].sum() >= 1_500
    assert table["learner_step"].is_monotonic_increasing or table["learner_step"].diff().min() > -11
    assert int(state.step) >= 80


# What goes wrong.


def test_a_learner_that_diverges_stops_the_log_at_a_whole_episode(tmp_path):
    learner = make_learner([4, 6])

    def update(state, batch):
        if int(state.step) >= 5:
            batch = batch._replace(reward=batch.reward * np.array([[1.0], [np.nan]], np.float32))
        return learner.update(state, batch)

    with pytest.raises(training.Diverged, match=r"the loss of Pong is .*nan.* at update 6 .*logged"):
        list(play(tmp_path, ["Breakout", "Pong"], learner._replace(update=update), num_transitions=5_000))
    assert open_replay(tmp_path / "replay").validate() == []


def test_what_cannot_be_played_is_refused_before_anything_is(tmp_path):
    learner = make_learner([4])
    with pytest.raises(UnknownGame, match="Breakout"):
        next(play(tmp_path, ["Brekout"], learner))
    with pytest.raises(UnknownVariant, match=r"Breakout has no mode 5.* Its modes are 0, 4, 8.* difficulties 0, 1"):
        next(play(tmp_path, ["Breakout"], learner, mode=5))
    with pytest.raises(OutOfMemory, match=r"1 games x 400000 environments .* take [\d.]+ GB; [\d.]+ GB are free"):
        next(play(tmp_path, ["Breakout"], learner, environments=400_000, max_steps=27_000))
    assert not (tmp_path / "replay").exists()


def test_a_store_of_something_else_is_not_continued(tmp_path):
    list(play(tmp_path, ["Breakout"], make_learner([4])))
    with pytest.raises(ReplayError, match=r"other settings .*source: 'test' stored, 'another' requested"):
        next(play(tmp_path, ["Breakout"], make_learner([4]), source="another"))


def test_a_dead_environment_is_named(tmp_path):
    made = []

    def make(*arguments, **options):
        made.append(make_vector_environment(*arguments, **options))
        return made[-1]

    running = play(tmp_path, ["Freeway"], make_learner([3]), mode=1, make=make, num_transitions=5_000)
    next(running)
    processes = [process for half in made for process in half.processes]
    os.kill(processes[3].pid, signal.SIGKILL)
    with pytest.raises(EnvironmentDied, match="Freeway: environment 1 of 2 ended"):
        list(running)
    deadline = time.monotonic() + 20
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(process.is_alive() for process in processes)


def test_a_full_disk_keeps_what_was_logged(tmp_path):
    code = CHILD.format(tests=str(Path(__file__).parent))
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000))\n{code}"
    often = "from scaled_ql.online import log; log.WRITE_SECONDS = 0.05\nfor state"  # so that the first write fits
    limited = (
        limited.replace("checkpoint_every=10", "checkpoint_every=10**6")
        .replace("1500", "50_000")
        .replace("for state", often)
    )
    done = subprocess.run([sys.executable, "-c", limited, str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert done.returncode != 0 and "make room on the disk" in done.stderr
    journal = tmp_path / "replay" / "Breakout" / "1" / "episodes.jsonl"
    logged = [json.loads(line)["length"] for line in journal.read_text().splitlines()]
    assert logged and all(length > 0 for length in logged)
