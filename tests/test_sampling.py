"""A batch is a pure function of (replay, seed, step), stratified by game and uniform within each."""

import gc
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from scaled_ql.games import action_names
from scaled_ql.replay import (
    ReplayError,
    ReplayWriter,
    View,
    mean_frames,
    open_replay,
    prefetch,
    sample_batch,
    sample_batches,
    sample_indices,
)
from scaled_ql.replay.memory import to_memory
from scaled_ql.replay.shared import SharedMemory, pack
from scaled_ql.replay.workers import _Places

# length and whether it terminated, per episode; very unequal on purpose
EPISODES = {
    "Asterix": [(1, True), (90, True), (2, False), (40, False), (1, True), (3, False), (7, True), (4, False)],
    "Pong": [(30, False)],
    "Seaquest": [(1, True), (1, False), (2, True)],
}


def write_episodes(path, game, episodes, run=1):
    rng = np.random.default_rng(0)
    with ReplayWriter(path, game, actions=action_names(game), source="a test", sticky_actions=0.0, run=run) as writer:
        for length, terminal in episodes:
            frames = rng.integers(256, size=(length, 84, 84), dtype=np.uint8)
            writer.append(frames, rng.integers(2, size=length), rng.normal(size=length), terminal=terminal)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("replay")
    for game, episodes in EPISODES.items():
        write_episodes(path, game, episodes)
    return path


@pytest.fixture(scope="module")
def replay(folder):
    return open_replay(folder)


def sampleable_by_hand(game, n_step):
    usable, start = set(), 0
    for length, terminal in EPISODES[game]:
        usable |= {start + t for t in range(length) if terminal or t + n_step < length}
        start += length
    return usable


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**63), step=st.integers(0, 2**40))
def test_pure_function_of_seed_and_step(folder, replay, seed, step):
    first = sample_indices(replay, seed, step)
    sample_indices(replay, seed, step + 1)
    again = sample_indices(open_replay(folder), seed, step)
    np.testing.assert_array_equal(first, again)
    for other in (sample_indices(replay, seed, step + 1), sample_indices(replay, seed + 1, step)):
        assert (np.array(first) != np.array(other)).any()


def test_step_and_seed_are_not_interchangeable(replay):
    batches = {sample_indices(replay, seed, step)[1].tobytes() for seed in range(8) for step in range(8)}
    assert len(batches) == 64


@settings(deadline=None, max_examples=40)
@given(
    games_per_batch=st.integers(1, 20),
    transitions_per_game=st.integers(1, 6),
    n_step=st.sampled_from([1, 3, 5, 25]),
    step=st.integers(0, 1000),
)
def test_groups_of_one_game_and_sampleable_transitions_only(
    replay, games_per_batch, transitions_per_game, n_step, step
):
    game, index = sample_indices(
        replay, 0, step, games_per_batch=games_per_batch, transitions_per_game=transitions_per_game, n_step=n_step
    )
    assert game.dtype == np.int32 and index.dtype == np.int64
    groups = game.reshape(games_per_batch, transitions_per_game)
    assert (groups == groups[:, :1]).all()
    for number, t in zip(game, index):
        assert t in sampleable_by_hand(replay.games[number], n_step)


def test_games_are_drawn_uniformly_with_replacement(replay):
    groups = np.concatenate([sample_indices(replay, 7, step)[0].reshape(128, 4)[:, 0] for step in range(40)])
    assert stats.chisquare(np.bincount(groups)).pvalue > 1e-4


@pytest.mark.parametrize("n_step", [1, 3])
def test_transitions_are_uniform_over_unequal_episodes(replay, n_step):
    drawn = [sample_indices(replay, 11, step, n_step=n_step) for step in range(100)]
    game, index = (np.concatenate(parts) for parts in zip(*drawn))
    for number, name in enumerate(replay.games):
        usable = sorted(sampleable_by_hand(name, n_step))
        counts = np.bincount(index[game == number], minlength=usable[-1] + 1)
        assert counts.sum() == counts[usable].sum() > 50 * len(usable)
        assert stats.chisquare(counts[usable]).pvalue > 1e-4


@settings(deadline=None, max_examples=15)
@given(step=st.integers(0, 1000), n_step=st.sampled_from([1, 3]), stack_size=st.sampled_from([1, 4]))
def test_batch_rows_are_the_sampled_transitions(replay, step, n_step, stack_size):
    shape = {"games_per_batch": 5, "transitions_per_game": 2, "n_step": n_step}
    game, index = sample_indices(replay, 3, step, **shape)
    batch = sample_batch(replay, 3, step, **shape, discount=0.9, stack_size=stack_size)
    assert all(len(field) == 10 for field in batch)
    for row in range(10):
        alone = replay.batch(replay.games[game[row]], [index[row]], n_step, 0.9, stack_size)
        for field, expected in zip(batch, alone):
            np.testing.assert_array_equal(field[row], expected[0])
            assert field.dtype == expected.dtype
    assert (abs(batch.reward) <= n_step).all()


def test_episodes_too_short_for_n_step(tmp_path):
    write_episodes(tmp_path, "Pong", [(3, False), (2, False)])
    replay = open_replay(tmp_path)
    assert set(sample_indices(replay, 0, 0, n_step=2)[1]) == {0}
    for n_step in (3, 50):
        with pytest.raises(ReplayError, match=rf"Pong .*n_step = {n_step}\. Use a smaller n_step"):
            sample_indices(replay, 0, 0, n_step=n_step)
        with pytest.raises(ReplayError, match="n_step"):
            sample_batch(replay, 0, 0, n_step=n_step)


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@settings(deadline=None, max_examples=20)
@given(start=st.integers(0, 5), count=st.integers(0, 12), depth=st.integers(0, 6), threads=st.integers(1, 3))
def test_prefetch_yields_in_order_and_reads_a_bounded_way_ahead(start, count, depth, threads):
    loaded = []

    def load(step):
        time.sleep(0.003 * (step % 3 == 0))  # every third is late
        loaded.append(step)
        return step, "batch"

    for step, item in enumerate(prefetch(load, start, start + count, depth=depth, threads=threads), start):
        assert item == (step, "batch")
        assert max(loaded) <= step + depth
    assert sorted(loaded) == list(range(start, start + count))
    assert prefetch_threads() == []


def test_prefetch_works_while_its_consumer_does():
    loaded = []
    batches = prefetch(lambda step: loaded.append(step), 0, 100, depth=4)
    next(batches)
    until = time.monotonic() + 10
    while len(loaded) < 5 and time.monotonic() < until:
        time.sleep(0.001)
    assert sorted(loaded) == [0, 1, 2, 3, 4]
    batches.close()


def test_prefetch_hands_on_an_error_after_what_came_before():
    def load(step):
        if step == 3:
            raise ReplayError("a chunk is damaged")
        return step

    seen = []
    with pytest.raises(ReplayError, match="a chunk is damaged"):
        for step in prefetch(load, 0, 10):
            seen.append(step)
    assert seen == [0, 1, 2]
    assert prefetch_threads() == []


def test_prefetch_closed_early_drops_what_is_pending_and_stops_its_threads():
    loaded, waiting, gate = [], threading.Event(), threading.Event()

    def load(step):
        if step > 0:
            waiting.set()
            gate.wait(10)
        loaded.append(step)

    batches = prefetch(load, 0, 10**9, threads=1)
    next(batches)
    assert waiting.wait(10) and prefetch_threads() != []
    threading.Timer(0.3, gate.set).start()
    batches.close()  # waits for step 1, which is under way
    assert prefetch_threads() == []
    assert loaded == [0, 1]


def test_prefetched_batches_equal_direct_ones(replay):
    def load(step):
        return sample_batch(replay, 5, step, games_per_batch=4, transitions_per_game=2)

    for step, batch in enumerate(prefetch(load, 10, 20, threads=3), 10):
        for field, expected in zip(batch, load(step)):
            np.testing.assert_array_equal(field, expected)


def assert_same(batch, expected):
    for field, other in zip(batch, expected):
        assert (field.dtype, field.strides, field.flags.writeable) == (other.dtype, other.strides, True)
        np.testing.assert_array_equal(field, other)


SAMPLING = {"games_per_batch": 4, "transitions_per_game": 2, "n_step": 3, "discount": 0.9}


def workers():
    return [child for child in psutil.Process().children() if "replay.workers import work" in " ".join(child.cmdline())]


@pytest.mark.parametrize("where", ["disk", "view", "memory"])
def test_batches_from_processes_are_in_order_and_equal_direct_ones(folder, where):
    view = View(games=["Asterix", "Pong"], uniform=0.5, seed=3) if where == "view" else None
    replay = open_replay(folder, view)
    replay = to_memory(replay) if where == "memory" else replay
    batches = list(sample_batches(replay, 5, 10, 40, processes=2, depth=3, **SAMPLING))  # all kept: none is overwritten
    assert len(batches) == 30
    for step, batch in enumerate(batches, 10):
        assert_same(batch, sample_batch(replay, 5, step, **SAMPLING))
    assert workers() == []


def test_without_processes_threads_sample(replay):
    batches = sample_batches(replay, 5, 10, 14, **SAMPLING)
    assert_same(next(batches), sample_batch(replay, 5, 10, **SAMPLING))
    assert prefetch_threads() != [] and workers() == []
    assert len(list(batches)) == 3


def test_nothing_is_started_for_no_batches(replay):
    assert list(sample_batches(replay, 0, 3, 3, processes=1)) == []


def test_an_error_in_a_process_comes_at_its_batch(tmp_path):
    rng = np.random.default_rng(0)
    with ReplayWriter(tmp_path, "Pong", actions=action_names("Pong"), source="a test", sticky_actions=0.0) as writer:
        writer.append(
            rng.integers(256, size=(1000, 84, 84), dtype=np.uint8), np.zeros(1000, int), np.zeros(1000), terminal=True
        )
    (file,) = tmp_path.glob("Pong/1/observation/c.*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255  # in one of 63 chunks
    file.write_bytes(content)
    replay, step = open_replay(tmp_path), 0
    with pytest.raises(ReplayError) as expected:
        while True:
            sample_batch(replay, 0, step, games_per_batch=1)
            step += 1
    seen = 0
    with pytest.raises(ReplayError) as caught:
        for _ in sample_batches(replay, 0, 0, 1000, processes=1, games_per_batch=1):
            seen += 1
    assert seen == step and str(caught.value) == str(expected.value)
    assert "Pong/1/observation: a chunk is damaged" in str(caught.value)
    assert workers() == []


def test_wrong_arguments_are_refused_as_by_sample_batch(replay):
    with pytest.raises(ValueError, match="a batch of 8 transitions has no share 3 of 3 equal ones"):
        next(sample_batches(replay, 0, 0, 5, processes=1, **SAMPLING, shard=(3, 3)))
    assert workers() == []


def test_closing_early_ends_the_processes_and_spares_the_batches(replay):
    gc.collect()
    descriptors = psutil.Process().num_fds()
    batches = sample_batches(replay, 1, 0, 10**9, processes=2, **SAMPLING)
    kept = next(batches)
    assert len(workers()) == 2
    batches.close()
    assert workers() == []
    assert_same(kept, sample_batch(replay, 1, 0, **SAMPLING))
    del batches, kept
    gc.collect()
    assert psutil.Process().num_fds() <= descriptors


def test_a_process_that_dies_is_noticed(replay):
    batches = sample_batches(replay, 1, 0, 10**9, processes=2, **SAMPLING)
    next(batches)
    workers()[0].kill()
    with pytest.raises(RuntimeError, match="ended with status -9"):
        for _ in batches:
            pass
    assert workers() == []


def run_python(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def test_a_killed_program_leaves_nothing_behind(folder):
    code = """
import sys, time
from scaled_ql.replay import open_replay, sample_batches
from scaled_ql.replay.memory import to_memory
batches = sample_batches(to_memory(open_replay(sys.argv[1])), 0, 0, 10**9, processes=2, games_per_batch=8)
next(batches)
print("running", flush=True)
for batch in batches:
    time.sleep(0.01)
"""
    program = run_python(code, folder)
    assert program.stdout.readline() == "running\n"
    children = psutil.Process(program.pid).children()
    assert len(children) == 2  # and no other process, say, a tracker of resources
    maps = [Path(f"/proc/{pid}/maps").read_text() for pid in (program.pid, *(child.pid for child in children))]
    assert "memfd:scaled_ql" in maps[0]  # it has no name, so nothing can stay
    assert not any("/dev/shm" in text for text in maps)
    program.send_signal(signal.SIGKILL)
    program.wait()
    assert psutil.wait_procs(children, timeout=20)[1] == []


def test_shares_taken_by_two_processes_are_the_batch(folder, replay):
    shares = [
        sample_batches(open_replay(folder), 7, 20, 23, processes=1, games_per_batch=5, shard=(share, 2))
        for share in range(2)
    ]
    for step, (first, second) in enumerate(zip(*shares), 20):
        assert len(first.action) == len(second.action) == 10
        whole = sample_batch(replay, 7, step, games_per_batch=5)
        for field, *parts in zip(whole, first, second):
            np.testing.assert_array_equal(np.concatenate(parts), field)
    assert step == 22


def test_a_place_is_free_when_no_array_shows_it_any_more():
    places = _Places((2, 3, 84))
    taken = [places.take() for _ in range(5)]
    assert taken == list(range(5))
    for place in taken:
        places.array(place)[:] = place
    lent = [places.lend(place) for place in taken]
    part = lent[3][1, :, 3:7].T
    del lent
    gc.collect()
    assert sorted(places.take() for _ in range(5)) == [0, 1, 2, 4, 5]
    assert (part == 3).all()
    del part
    gc.collect()
    assert places.take() == 3


def test_a_replay_for_another_process_shows_the_same_episodes_though_the_store_has_grown(tmp_path):
    write_episodes(tmp_path, "Pong", [(30, True)])
    replay = open_replay(tmp_path)
    write_episodes(tmp_path, "Pong", [(50, True)])
    again = pickle.loads(pickle.dumps(replay))
    assert open_replay(tmp_path).num_transitions("Pong") == 80
    assert again.num_transitions("Pong") == 30 and again.identity() == replay.identity()
    assert_same(sample_batch(again, 0, 0, **SAMPLING), sample_batch(replay, 0, 0, **SAMPLING))


def test_a_recording_of_which_a_view_shows_nothing_takes_no_memory(tmp_path):
    write_episodes(tmp_path, "Pong", [(30, True), (30, True)])
    write_episodes(tmp_path, "Pong", [(10, True)], run=2)
    replay = open_replay(tmp_path, View(between=[20, 60]))
    assert_same(sample_batch(to_memory(replay), 0, 0, **SAMPLING), sample_batch(replay, 0, 0, **SAMPLING))


def test_shared_memory_is_not_pickled_but_inherited():
    memory = SharedMemory()
    assert [memory.append(b"frames"), memory.append(b"rewards")] == [0, 64]
    assert memory.content[64:] == b"rewards"
    with pytest.raises(TypeError, match="inherited, not copied"):
        pickle.dumps(memory)
    packed, descriptors = pack([memory, memory])
    assert descriptors == sorted([memory.descriptor, packed.descriptor])


def test_mean_frames_are_the_mean_of_each_game(replay):
    means = mean_frames(replay, seed=0, num_frames=4_000)
    assert (means.shape, means.dtype) == ((len(replay.games), 84, 84), np.float32)
    for number, game in enumerate(replay.games):
        frames = replay.frames_at(game, np.arange(replay.num_transitions(game)))
        spread = frames.std(0) / np.sqrt(4_000)
        assert (abs(means[number] - frames.mean(0)) < 5.5 * spread + 1e-3).all()
    np.testing.assert_array_equal(means, mean_frames(replay, seed=0, num_frames=4_000))
