"""An imported DQN-Replay log holds what was added to it, never rows that did not follow each other; exports return."""

import gzip
import io
import json
import pickle
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from dopamine_log import DopamineLog, column_file, load, read_log, save, unique_frame
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st

from scaled_ql.games import FULL_ACTIONS, action_names
from scaled_ql.replay import (
    ReplayError,
    ReplayWriter,
    export_dqn_replay,
    import_dqn_replay,
    open_replay,
)
from scaled_ql.replay import format as fmt
from scaled_ql.replay import recording as reading
from scaled_ql.replay.formats import dqn_replay, importing

SAMPLE = Path(__file__).parent / "data" / "dqn_replay"  # written by Dopamine's own buffer, C = 2,000
EARLY = Path(__file__).parent / "data" / "dqn_replay_early"  # the same steps, C = 4,000, after 300, 600 and 900 of them
COLUMNS = ("observation", "action", "reward", "terminal")


@pytest.fixture
def small_blocks(monkeypatch):
    """A few rows fill a block, a chunk and a file of the store, as a million rows do."""
    sizes = {"INNER_CHUNK": 4, "FRAME_SHARD": 16, "SCALAR_CHUNK": 4, "SCALAR_SHARD": 16}
    for name, size in sizes.items():
        monkeypatch.setattr(fmt, name, size)
    for module in (importing, dqn_replay):
        monkeypatch.setattr(module, "BLOCK", 4)
    monkeypatch.setattr(reading, "VALIDATED_TOGETHER", 16)


def write_log(source, lengths=(9, 14, 9, 20, 7), capacity=20, finish=True, **where):
    """By default 74 rows in files 0 to 3; at each border between two files an episode goes on."""
    log = DopamineLog(source, capacity=capacity, **where)
    for length in lengths:
        log.add_episode(length)
    if finish:
        log.finish()
    return log


def table_of(episodes):
    lengths = [len(episode["indices"]) for episode in episodes]
    return {
        "start": np.cumsum([0, *lengths])[:-1].tolist(),
        "length": lengths,
        "terminal": [episode["terminal"] for episode in episodes],
        "truncated": [not episode["terminal"] for episode in episodes],
        "continued": [episode["continued"] for episode in episodes],
    }


def check_same(array, expected):
    assert array.shape == expected.shape and np.array_equal(array, expected)


def check_holds(path, episodes, game="Pong", runs=None):
    """The store holds exactly these episodes, bit for bit and in this order."""
    replay = open_replay(path)
    assert replay.validate() == []
    expected, table = table_of(episodes), replay.episodes(game)
    assert {name: table[name].tolist() for name in expected} == expected
    for name, stored in (("action", replay.actions(game)), ("reward", replay.rewards(game))):
        np.testing.assert_array_equal(stored, np.concatenate([episode[name] for episode in episodes]))
    assert (replay.actions(game).dtype, replay.rewards(game).dtype) == ("int32", "float32")
    frames = replay.frames_at(game, np.arange(replay.num_transitions(game)))
    check_same(frames, np.concatenate([episode["observation"] for episode in episodes]))
    if runs is not None:
        assert table["run"].tolist() == runs
    return replay


def check_batches(replay, logs_and_episodes, game="Pong", stack_size=4):
    """What may be sampled is what the kept rows determine, and equals the transitions of the unbroken log."""
    truth = [
        (log, e, step) for log, episodes in logs_and_episodes for e in episodes for step in range(len(e["indices"]))
    ]
    for n_step, clip_rewards in ((1, True), (4, False)):
        usable = [
            t
            for t, (_, episode, step) in enumerate(truth)
            if (episode["terminal"] or step + n_step < len(episode["indices"]))
            and not (episode["continued"] and step < stack_size - 1)
        ]
        if not usable:
            with pytest.raises(ReplayError, match=f"n_step = {n_step}"):
                replay.sampleable(game, n_step)
            continue
        start, count = replay.sampleable(game, n_step)
        assert [t for a, n in zip(start.tolist(), count.tolist()) for t in range(a, a + n)] == usable
        batch = replay.batch(game, usable, n_step, 0.9, stack_size, clip_rewards)
        arguments = n_step, 0.9, stack_size, clip_rewards
        wanted = [truth[t][0].transition(truth[t][1]["indices"][truth[t][2]], *arguments) for t in usable]
        observation, action, reward, discount, following = (np.array(field) for field in zip(*wanted))
        check_same(batch.observation, observation)
        np.testing.assert_array_equal(batch.action, action)
        np.testing.assert_allclose(batch.reward, reward, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(batch.discount, discount.astype(np.float32))
        check_same(batch.next_observation, following)


def check_nothing_mixed(replay, log, game="Pong"):
    """Every stored episode is a stretch of the log as it was added, whichever stretches there are."""
    assert replay.validate() == []
    every = np.arange(replay.num_transitions(game))
    index_of = {row[0].tobytes(): index for index, row in enumerate(log.rows) if row is not None}
    indices = np.array([index_of.get(frame.tobytes(), -1) for frame in replay.frames_at(game, every)])
    assert (indices >= 0).all(), "frames that are not of the log"
    for name, column, stored in (("action", 1, replay.actions(game)), ("reward", 2, replay.rewards(game))):
        assert stored.tolist() == [log.rows[index][column] for index in indices], name
    for row in replay.episodes(game).itertuples():
        first, last = indices[row.start], indices[row.start + row.length - 1]
        assert indices[row.start : row.start + row.length].tolist() == list(range(first, last + 1))
        assert row.terminal == bool(log.rows[last][3])
        assert row.continued or log.rows[first - 1] is None


def contents(path):
    """Every file of a store with its bytes, locks left out."""
    return {str(file.relative_to(path)): file.read_bytes() for file in store_files(path)}


def check_same_files(path, expected):
    found = contents(path)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def store_files(path):
    return sorted(file for file in Path(path).rglob("*") if file.is_file() and "lock" not in file.name)


def mtimes(path):
    return {file: file.stat().st_mtime_ns for file in store_files(path)}


def read_report(path, game="Pong", run=1):
    return json.loads((Path(path) / game / str(run) / "import.json").read_text())


# What was added comes out


@st.composite
def episode_lists(draw, max_rows=70):
    """Lengths of episodes, and whether the last of them is over when the log ends."""
    lengths = draw(st.lists(st.one_of(st.integers(1, 4), st.integers(1, 30)), min_size=1, max_size=12))
    while sum(lengths) > max_rows and len(lengths) > 1:
        lengths.pop()
    return lengths, draw(st.booleans())


def build(source, run, capacity, lengths, last_is_over, finish, damage=None):
    log = DopamineLog(source, run=run, capacity=capacity, seed=run)
    for number, length in enumerate(lengths):
        terminal = last_is_over or number < len(lengths) - 1
        log.add_episode(length, terminal, {step: change for at, step, change in damage or () if at == number})
    # A last file says only where the cursor is: a cycle jumped over just before it cannot be told, see below.
    before = log.ends[-1] if log.ends else 0
    if finish and len(log.rows) - before < capacity and len(log.rows) != before:
        log.finish()
    return log


LOGS = st.dictionaries(
    st.sampled_from([1, 2, 10]), st.tuples(st.integers(5, 40), episode_lists(), st.booleans()), min_size=1, max_size=2
)
SLOW = {
    "deadline": None,
    "phases": [Phase.explicit, Phase.generate],  # shrinking takes minutes
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
}


@settings(max_examples=6, **SLOW)
@given(logs=LOGS)
@example(logs={1: (5, ([1] * 12, True), False)})  # padding and cycles jumped over everywhere
@example(logs={1: (8, ([1, 1, 1, 30], False), True)})
def test_every_transition_is_the_one_that_was_added(small_blocks, logs):
    with tempfile.TemporaryDirectory() as folder:
        built = {
            run: build(f"{folder}/source", run, capacity, *lengths, finish)
            for run, (capacity, lengths, finish) in sorted(logs.items())
        }
        kept = [(log, log.episodes()) for log in built.values() if log.ends and log.episodes()]
        assume(len(kept) == len(built))
        import_dqn_replay(f"{folder}/source", f"{folder}/store")
        runs = [run for run, (_, episodes) in zip(built, kept) for _ in episodes]
        replay = check_holds(f"{folder}/store", [e for _, episodes in kept for e in episodes], runs=runs)
        check_batches(replay, kept)


@settings(max_examples=8, **SLOW)
@given(
    capacity=st.integers(5, 20),
    episodes=episode_lists(),
    finish=st.booleans(),
    lost=st.sets(st.integers(0, 12), min_size=1, max_size=4),
)
def test_nothing_mixes_rows_across_lost_files(small_blocks, capacity, episodes, finish, lost):
    with tempfile.TemporaryDirectory() as folder:
        log = build(f"{folder}/source", 1, capacity, *episodes, finish)
        lost = {number for number in lost if number < len(log.ends)}
        assume(lost and len(lost) < len(log.ends))
        expected = log.episodes(dict.fromkeys(lost, 0))
        assume(expected)
        for number in lost:
            log.remove(number)
        import_dqn_replay(f"{folder}/source", f"{folder}/store")
        check_batches(check_holds(f"{folder}/store", expected), [(log, expected)])


DAMAGE = [
    {"reward": np.nan},
    {"reward": np.inf},
    {"reward": -np.inf},
    {"action": 99},
    {"action": -1},
    {"action": 6},  # Pong has 0..5
    {"terminal": 7},
    {"reward": np.nan, "action": -1, "terminal": 2},
]


@settings(max_examples=6, **SLOW)
@given(
    capacity=st.integers(5, 40),
    episodes=episode_lists(),
    damage=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12), st.sampled_from(DAMAGE)), min_size=1, max_size=5),
)
def test_bad_rows_are_left_out_and_reported(small_blocks, capacity, episodes, damage):
    with tempfile.TemporaryDirectory() as folder:
        log = build(f"{folder}/source", 1, capacity, *episodes, finish=True, damage=damage)
        bad = sorted(log.damaged.keys() & log.kept())
        assume(bad and log.episodes())
        report = import_dqn_replay(f"{folder}/source", f"{folder}/store")
        check_batches(check_holds(f"{folder}/store", log.episodes()), [(log, log.episodes())])
        assert sorted(reported_rows(report)) == sorted(log.place(index) for index in bad)


def reported_rows(report):
    """(file number, row) of what was left out, row by row."""
    assert all(entry["reason"] and (entry["game"], entry["run"]) == ("Pong", 1) for entry in report.excluded)
    return [(int(entry["file"].split(".")[-2]), entry["row"]) for entry in report.excluded]


@pytest.mark.parametrize("damage", DAMAGE[::3] + DAMAGE[-1:], ids=str)
@pytest.mark.parametrize("step", [0, 4, 13])
def test_one_bad_row_by_hand(tmp_path, damage, step):
    log = DopamineLog(tmp_path / "source", capacity=30)
    for number in range(4):
        log.add_episode(14, damage={step: damage} if number == 1 else None)
    log.finish()
    report = import_dqn_replay(tmp_path / "source", tmp_path / "store")
    table = check_holds(tmp_path / "store", log.episodes()).episodes("Pong")
    pieces = {0: [14, 13, 14, 14], 4: [14, 4, 9, 14, 14], 13: [14, 13, 14, 14]}
    assert table["length"].tolist() == pieces[step]
    assert reported_rows(report) == [log.place(*log.damaged)]
    in_file = read_report(tmp_path / "store")["excluded"]
    assert [entry["row"] for entry in in_file] == [entry["row"] for entry in report.excluded]


def test_zero_rows_that_are_no_padding_are_kept(tmp_path):
    """An episode may begin, go on and end on a black screen."""
    log = DopamineLog(tmp_path / "source", capacity=9)
    black = np.zeros((84, 84), np.uint8)
    for _ in range(3):
        for _ in range(5):
            log.add(black, 0, 0.0, 0)
        log.add_episode(4, terminal=False)
        for step in range(6):
            log.add(black, 0, 0.0, int(step == 5))
    log.finish()
    import_dqn_replay(tmp_path / "source", tmp_path / "store")
    check_holds(tmp_path / "store", log.episodes())
    assert open_replay(tmp_path / "store").episodes("Pong")["length"].tolist() == [15, 15, 15]


@pytest.mark.parametrize("begin", range(0, 11, 2))
def test_padding_straddles_the_border_of_two_files(tmp_path, begin):
    log = write_log(tmp_path / "source", [3 + begin, 20, 20], capacity=16)
    import_dqn_replay(tmp_path / "source", tmp_path / "store")
    check_batches(check_holds(tmp_path / "store", log.episodes()), [(log, log.episodes())])


@pytest.mark.parametrize("position", range(0, 19, 3))
def test_last_file_ends_early(small_blocks, tmp_path, position):
    """Rows of an earlier cycle follow those that are new."""
    log = write_log(tmp_path / "source", [18, 16 + position])
    assert log.ends == [19, 39, 40 + position]
    import_dqn_replay(tmp_path / "source", tmp_path / "store")
    check_holds(tmp_path / "store", log.episodes())


@pytest.mark.parametrize("rows_before, continued", [(16, True), (17, False), (18, False)])
def test_jumped_cycle_is_a_gap(tmp_path, rows_before, continued):
    """Padding that carries the count over the dump: file 0 begins with row 19, padding unless `continued`."""
    log = write_log(tmp_path / "source", [rows_before - 3, 24, 5], capacity=20)
    assert log.ends[0] == 39
    import_dqn_replay(tmp_path / "source", tmp_path / "store")
    replay = check_holds(tmp_path / "store", log.episodes())
    assert replay.episodes("Pong")["continued"].tolist() == [continued, False]
    check_batches(replay, [(log, log.episodes())])


def test_last_file_without_a_new_row(tmp_path):
    log = write_log(tmp_path / "source", [16, 17], finish=False)
    log.add_episode(37, terminal=False)
    assert log.ends == [19, 39, 59, 79]
    before = log.episodes()
    log.finish()
    import_dqn_replay(tmp_path / "source", tmp_path / "store")
    check_holds(tmp_path / "store", before)


@pytest.mark.parametrize("rows_before", [56, 57, 58])
def test_cycle_jumped_over_before_the_last_file_mixes_nothing(tmp_path, rows_before):
    """The last file does not count cycles; that its old rows are not those of the file before tells."""
    log = write_log(tmp_path / "source", [40, rows_before - 46], finish=False)
    log.add_episode(6, terminal=False)
    log.finish()
    assert log.ends[1:] == [39, rows_before + 9]
    import_dqn_replay(tmp_path / "source", tmp_path / "store")
    check_nothing_mixed(open_replay(tmp_path / "store"), log)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_first_transitions_after_a_gap_by_hand(tmp_path, lost):
    """In the middle of one long episode: their frame stacks are unknown, so they are not drawn."""
    log = write_log(tmp_path / "source", [70], capacity=20)
    log.remove(lost)
    import_dqn_replay(tmp_path / "source", tmp_path / "store")
    replay = open_replay(tmp_path / "store")
    table = replay.episodes("Pong")
    after = table[table["continued"]]
    assert len(after) == 1 and table["continued"].tolist()[-1]
    first, length = int(after["start"].iloc[0]), int(after["length"].iloc[0])
    start, count = replay.sampleable("Pong", 3)
    assert (start[-1], count[-1]) == (first + 3, length - 3)  # it ended in the game
    batch = replay.batch("Pong", np.arange(first, first + 4), 3, 0.99)
    known = (batch.observation != 0).any((1, 2))
    assert known.tolist() == [[False] * 3 + [True], [False] * 2 + [True] * 2, [False] + [True] * 3, [True] * 4]
    np.testing.assert_array_equal(batch.observation[:, :, :, -1], replay.frames_at("Pong", np.arange(first, first + 4)))


# Real frames


@pytest.fixture(scope="module")
def recorded_log(recording, tmp_path_factory):
    """The Breakout recording as Dopamine would have logged it, and its episodes."""
    replay, source = open_replay(recording), tmp_path_factory.mktemp("recorded")
    table = replay.episodes("Breakout")
    log = DopamineLog(source, "Breakout", capacity=130)
    for row in table.itertuples():
        here = np.arange(row.start, row.start + row.length)
        columns = replay.frames_at("Breakout", here), replay.actions("Breakout")[here], replay.rewards("Breakout")[here]
        for step, (observation, action, reward) in enumerate(zip(*columns)):
            log.add(observation, action, np.clip(reward, -1, 1), int(row.terminal and step == row.length - 1))
    log.finish()
    return source, log


def test_real_frames(recorded_log, tmp_path):
    source, log = recorded_log
    import_dqn_replay(source, tmp_path)
    replay = check_holds(tmp_path, log.episodes(), "Breakout")
    check_batches(replay, [(log, log.episodes())], "Breakout")
    manifest = replay.manifests("Breakout")[0]
    assert manifest["rewards"] == "clipped" and tuple(manifest["actions"]) == action_names("Breakout")
    assert manifest["sticky_actions"] == 0.25


def test_log_of_dopamines_own(tmp_path):
    import_dqn_replay(SAMPLE, tmp_path)
    episodes = read_log(SAMPLE / "Breakout/1/replay_logs")
    replay = open_replay(tmp_path)
    assert replay.validate() == []
    table = replay.episodes("Breakout")
    assert table["length"].tolist() == [len(episode) for episode in episodes]
    assert table["terminal"].tolist() == [bool(episode[-1][3]) for episode in episodes]
    assert not table["continued"].any()
    rows = [row for episode in episodes for row in episode]
    np.testing.assert_array_equal(replay.actions("Breakout"), [row[1] for row in rows])
    np.testing.assert_array_equal(replay.rewards("Breakout"), [row[2] for row in rows])
    np.testing.assert_array_equal(replay.frames_at("Breakout", np.arange(len(rows))), [row[0] for row in rows])


def test_early_dumps_of_dopamines_own(tmp_path):
    """A ring that is not full: its small columns hold what was in memory before, its frames are black."""
    report = import_dqn_replay(EARLY, tmp_path)
    rows = [row for episode in read_log(SAMPLE / "Breakout/1/replay_logs") for row in episode][:900]
    replay = open_replay(tmp_path)
    assert report == (900, [], [], []) and replay.num_transitions("Breakout") == 900
    np.testing.assert_array_equal(replay.actions("Breakout"), [row[1] for row in rows])
    np.testing.assert_array_equal(replay.rewards("Breakout"), [row[2] for row in rows])
    frames = replay.frames_at("Breakout", np.arange(900))
    np.testing.assert_array_equal(frames, [row[0] for row in rows])
    assert frames.any((1, 2)).all()


# Dumps at any time


@st.composite
def dump_histories(draw):
    """Capacity, rows of each episode, steps of the dumps with their numbers, whether the last saves the position."""
    capacity = draw(st.integers(5, 40))
    lengths = draw(st.lists(st.one_of(st.integers(1, 6), st.integers(1, 30)), min_size=1, max_size=8))
    steps = sum(lengths)
    times = sorted(draw(st.sets(st.integers(1, steps), min_size=1, max_size=5)))
    numbers = sorted(draw(st.sets(st.integers(0, 60), min_size=len(times), max_size=len(times))))
    return capacity, lengths, times, numbers, draw(st.booleans()), draw(st.booleans())


@settings(max_examples=25, **SLOW)
@given(history=dump_histories())
@example(history=(40, [10, 10], [5, 9, 17], [0, 1, 2], False, True))  # never full
@example(history=(40, [10, 10], [17], [7], False, True))  # one dump, with a number of its own
@example(history=(40, [10, 10], [17], [7], False, False))  # likewise, what was in memory before is not black
@example(history=(20, [10, 30], [9, 33], [0, 1], True, True))  # the first wrap lies between
@example(history=(20, [30, 30, 30], [25, 41, 80], [3, 4, 9], True, True))  # after many
def test_any_history_of_dumps(small_blocks, history):
    check_history(history)


def check_history(history):
    """What the last dump of a ring holds is told from its contents, whenever and how often it was dumped."""
    capacity, lengths, times, numbers, position, black = history
    with tempfile.TemporaryDirectory() as folder:
        log = DopamineLog(f"{folder}/source", capacity=capacity, automatic=False)
        if black:
            log.memory["observation"][:] = 0
        steps = 0
        for length in lengths:
            for step in range(length):
                number = len(log.rows) + (3 if log.begins else 0)
                log.add(unique_frame(number), number % 6, np.float32(number % 7 - 3) / 2, int(step == length - 1))
                steps += 1
                if steps in times:
                    last = steps == times[-1]
                    count = len(log.rows) % capacity if position and last else len(log.rows)
                    log.dump(numbers[times.index(steps)], count)
        del log.rows[log.ends[-1] :]
        expected = log.episodes()
        assume(expected)
        import_dqn_replay(f"{folder}/source", f"{folder}/store")
        replay = open_replay(f"{folder}/store")
        check_nothing_mixed(replay, log)
        kept = [index for episode in expected for index in episode["indices"]]
        assert replay.actions("Pong").tolist() == [log.rows[index][1] for index in kept]
        if not position or log.ends[-1] < capacity:  # else whole cycles may have gone by unseen
            check_holds(f"{folder}/store", expected)


def test_rows_that_were_never_written_are_a_problem(tmp_path):
    """Whatever let them in, black rows without end are no experience."""
    with ReplayWriter(tmp_path, "Pong", actions=action_names("Pong"), source="a test", sticky_actions=0.25) as writer:
        frames = np.stack([unique_frame(number) for number in range(300)])
        writer.append(frames, np.arange(300) % 6, np.zeros(300), terminal=True)
        assert open_replay(tmp_path).validate() == []
        frames[100:230] = 0
        writer.append(frames, np.where(frames.any((1, 2)), np.arange(300) % 6, 0), np.zeros(300), terminal=True)
    (problem,) = open_replay(tmp_path).validate()
    assert re.search(r"transitions 300\.\.599.*130 .*black.* never written", problem)


# Which games, which runs, and again


def test_games_and_runs_that_were_asked_for(tmp_path):
    logs = {
        (game, run): write_log(tmp_path / "source", game=game, run=run, seed=run)
        for game, run in (("Pong", 1), ("Pong", 2), ("Pong", 10), ("Breakout", 1))
    }
    import_dqn_replay(tmp_path / "source", tmp_path / "some", games=["Pong"], runs=[2, 10])
    assert open_replay(tmp_path / "some").games == ["Pong"]
    assert open_replay(tmp_path / "some").episodes("Pong")["run"].unique().tolist() == [2, 10]
    import_dqn_replay((tmp_path / "source").as_uri(), tmp_path / "all")
    assert open_replay(tmp_path / "all").games == ["Breakout", "Pong"]
    expected = [episode for (game, _), log in logs.items() if game == "Pong" for episode in log.episodes()]
    check_holds(tmp_path / "all", expected)
    for request in ({"games": ["Freeway"]}, {"games": ["Pong"], "runs": [3]}, {"games": ["Pnog"]}):
        with pytest.raises(ReplayError, match=r"Freeway|3|Pnog"):
            import_dqn_replay(tmp_path / "source", tmp_path / "none", **request)


def test_files_that_are_no_columns_are_ignored(tmp_path):
    """Newer logs also pickle where episodes end; training wrote checkpoints beside them."""
    log = write_log(tmp_path / "source")
    for number in range(len(log.ends)):
        (log.folder / f"episode_end_indices_ckpt.{number}.gz").write_bytes(gzip.compress(b"\x80\x04."))
        (log.folder / f"invalid_range_ckpt.{number}.gz").unlink()
    (log.folder.parent / "checkpoints").mkdir()
    (tmp_path / "source/README.md").write_text("mine")
    import_dqn_replay(tmp_path / "source", tmp_path / "store")
    check_holds(tmp_path / "store", log.episodes())


def test_importing_again_changes_nothing(tmp_path):
    write_log(tmp_path / "source")
    write_log(tmp_path / "source", run=2, finish=False)
    import_dqn_replay(tmp_path / "source", tmp_path / "store")
    before = mtimes(tmp_path / "store")
    import_dqn_replay(tmp_path / "source", tmp_path / "store")
    assert mtimes(tmp_path / "store") == before


@pytest.mark.parametrize("parts", [[1], [2], [1, 2, 3]])
def test_log_that_grew(tmp_path, parts):
    log = write_log(tmp_path / "whole")
    for part in [*parts, len(log.ends)]:
        growing = tmp_path / "growing/Pong/1/replay_logs"
        growing.mkdir(parents=True, exist_ok=True)
        for number in range(part):
            for file in log.folder.glob(f"*_ckpt.{number}.gz"):
                if not (growing / file.name).exists():
                    shutil.copy2(file, growing)
        import_dqn_replay(tmp_path / "growing", tmp_path / "store")
        assert open_replay(tmp_path / "store").validate() == []
    check_holds(tmp_path / "store", log.episodes())
    import_dqn_replay(tmp_path / "whole", tmp_path / "undisturbed")
    assert open_replay(tmp_path / "store").identity() == open_replay(tmp_path / "undisturbed").identity()


def test_log_that_was_ended_and_went_on(tmp_path):
    """Its last, partial file is replaced by a full one with the same number."""
    lengths = [9, 14, 9]
    write_log(tmp_path / "source", lengths)
    import_dqn_replay(tmp_path / "source", tmp_path / "store")
    shutil.rmtree(tmp_path / "source")
    log = write_log(tmp_path / "source", [*lengths, 20, 7])
    import_dqn_replay(tmp_path / "source", tmp_path / "store")
    check_holds(tmp_path / "store", log.episodes())
    import_dqn_replay(tmp_path / "source", tmp_path / "undisturbed")
    check_same_files(tmp_path / "store", contents(tmp_path / "undisturbed"))


# Bad files


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def column(log, name, number=1):
    return column_file(log.folder, name, number)


def rewrite(name, change):
    """Replace one array by what `change` makes of it."""

    def damage(log):
        save(column(log, name), change(load(column(log, name))))
        return column(log, name)

    return damage


def rewrite_bytes(name, change):
    """Replace the bytes inside the gzip by what `change` makes of them."""

    def damage(log):
        file = column(log, name)
        file.write_bytes(gzip.compress(change(gzip.decompress(file.read_bytes()))))
        return file

    return damage


def cut_gzip(log):
    file = column(log, "observation")
    file.write_bytes(file.read_bytes()[:-40])
    return file


def flip_bit(log):
    file = column(log, "observation")
    content = bytearray(file.read_bytes())
    content[-6] ^= 4  # in the checksum: elsewhere it may mean the same
    file.write_bytes(content)
    return file


def empty_file(log):
    column(log, "action").write_bytes(b"")
    return column(log, "action")


def plain_npy(log):
    column(log, "action").write_bytes(npy(load(column(log, "action"))))
    return column(log, "action")


def missing(name):
    def damage(log):
        column(log, name).unlink()
        return column(log, name)

    return damage


def change_add_count(content):
    def damage(log):
        file = log.folder / "add_count_ckpt.1.gz"
        file.unlink() if content is None else file.write_bytes(gzip.compress(content))
        return file

    return damage


def other_capacity(log):
    for name in COLUMNS:
        array = load(column(log, name))
        save(column(log, name), np.concatenate([array, array[:1]]))
    return log.folder / "*ckpt.1.gz"


def too_many_rows(content):
    return content.replace(b"(20,", b"(21,")


BAD_FILES = {
    "truncated gzip": cut_gzip,
    "flipped bit": flip_bit,
    "empty": empty_file,
    "not gzip": plain_npy,
    "not npy": rewrite_bytes("action", lambda content: b"<html>403 Forbidden</html>"),
    "observation float32": rewrite("observation", lambda array: array.astype(np.float32)),
    "observation of 83 columns": rewrite("observation", lambda array: array[:, :, :83]),
    "action float32": rewrite("action", lambda array: array.astype(np.float32)),
    "action [C, 1]": rewrite("action", lambda array: array[:, None]),
    "reward of strings": rewrite("reward", lambda array: array.astype("U8")),
    "terminal float32": rewrite("terminal", lambda array: array.astype(np.float32)),
    "scalar": rewrite("reward", lambda array: array[0]),
    "more data than the header says": rewrite_bytes("reward", lambda content: content + bytes(1000)),
    "fewer frames than the header says": rewrite_bytes("observation", too_many_rows),
    "fewer actions than the header says": rewrite_bytes("action", too_many_rows),
    "broken header": rewrite_bytes("reward", lambda content: content.replace(b"descr", b"descx")),
    "other capacity": other_capacity,
    **{f"no {name}": missing(name) for name in COLUMNS},
    "no add_count": change_add_count(None),
    "add_count of two": change_add_count(npy(np.array([39, 40]))),
    "add_count negative": change_add_count(npy(np.array(-1))),
    "add_count not npy": change_add_count(b"59"),
    "add_count of an earlier file": change_add_count(npy(np.array(19))),
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A log, and what an import of it holds."""
    folder = tmp_path_factory.mktemp("imported")
    log = write_log(folder / "source")
    import_dqn_replay(folder / "source", folder / "store")
    return log, contents(folder / "store")


@pytest.fixture
def log(imported):
    """That log; what a test does to its files is undone."""
    files = {file: file.read_bytes() for file in imported[0].folder.iterdir()}
    yield imported[0]
    restore(files)


def restore(files):
    for file, content in files.items():
        file.write_bytes(content)


def check_bad_file(folder, log, bad):
    """The file is named; what lay before it stays; the rest comes with skip_bad."""
    source, store, rest = log.folder.parents[2], folder / "store", folder / "rest"
    name = re.escape(bad.name).replace(r"\*", ".*")
    with pytest.raises(ReplayError, match=name):
        import_dqn_replay(source, store)
    before = log.episodes(dict.fromkeys(range(1, len(log.ends)), 0))
    complete = [episode for episode in before if episode["terminal"]]
    check_holds(store, before if len(open_replay(store).episodes("Pong")) > len(complete) else complete)

    report = import_dqn_replay(source, rest, skip_bad=True)
    (entry,) = report.left_out
    assert re.search(name, entry["file"] + entry["reason"])
    assert read_report(rest)["left_out"][0].items() <= entry.items()
    expected = log.episodes({1: entry["row"]})
    check_batches(check_holds(rest, expected), [(log, expected)])


@pytest.mark.parametrize("damage", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file(tmp_path, log, damage):
    check_bad_file(tmp_path, log, damage(log))


@pytest.mark.parametrize("name", ["truncated gzip", "action float32", "other capacity", "no reward", "no add_count"])
def test_repaired_file(tmp_path, log, imported, name):
    """Repairing the file and importing again gives what an undisturbed import gives, byte for byte."""
    source, files = log.folder.parents[2], {file: file.read_bytes() for file in log.folder.iterdir()}
    BAD_FILES[name](log)
    with pytest.raises(ReplayError):
        import_dqn_replay(source, tmp_path)
    restore(files)
    import_dqn_replay(source, tmp_path)
    check_same_files(tmp_path, imported[1])


@pytest.mark.parametrize("name", ["observation", "terminal"])
@pytest.mark.parametrize("number", [0, 3])
def test_bad_file_elsewhere(tmp_path, log, number, name):
    source = log.folder.parents[2]
    file = column(log, name, number)
    file.write_bytes(file.read_bytes()[:30])
    with pytest.raises(ReplayError, match=rf"{name}_ckpt\.{number}\.gz"):
        import_dqn_replay(source, tmp_path / "store")
    import_dqn_replay(source, tmp_path / "rest", skip_bad=True)
    expected = log.episodes({number: 0})
    check_batches(check_holds(tmp_path / "rest", expected), [(log, expected)])


def test_bomb(tmp_path, log):
    """A few hundred kilobytes that unpack to 300 MB behind an honest header."""
    file = column(log, "terminal")
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()) + bytes(300_000_000), compresslevel=1))
    check_bad_file(tmp_path, log, file)


@pytest.mark.parametrize("name", [*COLUMNS, "add_count"])
def test_last_file_counts_when_the_one_before_is_bad(tmp_path, log, name):
    file = log.folder / "add_count_ckpt.2.gz" if name == "add_count" else column(log, name, 2)
    file.write_bytes(file.read_bytes()[:30])
    import_dqn_replay(log.folder.parents[2], tmp_path, skip_bad=True)
    replay = open_replay(tmp_path)
    check_nothing_mixed(replay, log)
    check_same(replay.frames_at("Pong", [replay.num_transitions("Pong") - 1])[0], log.rows[-1][0])
    assert replay.episodes("Pong")["terminal"].iloc[-1]


@settings(max_examples=5, **SLOW)
@given(data=st.data())
def test_damaged_bits_never_yield_other_frames(small_blocks, log, data):
    """A flipped bit may unpack to other frames, and is noticed when the file ends."""
    file = column(log, data.draw(st.sampled_from(COLUMNS)))
    content = bytearray(file.read_bytes())
    position = data.draw(st.integers(10, len(content) - 9))  # between the name in its header and its checksum
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    intact, sound = file.read_bytes(), load(file)
    try:
        file.write_bytes(content)
        with tempfile.TemporaryDirectory() as folder:
            report = import_dqn_replay(log.folder.parents[2], folder, skip_bad=True)
            check_nothing_mixed(open_replay(folder), log)
            assert report.left_out or np.array_equal(load(file), sound)
    finally:
        file.write_bytes(intact)


def test_checksum_at_the_end_of_a_long_file_speaks_for_all_of_it(tmp_path, monkeypatch):
    """A pixel changed within, found out many blocks later."""
    for module in (importing, dqn_replay):
        monkeypatch.setattr(module, "BLOCK", 64)
    log = write_log(tmp_path / "source", [100] * 15, capacity=1500, finish=False)
    file = column(log, "observation", 0)
    packed, frames = file.read_bytes(), load(file)
    frames[205, 10, 10] += 1
    save(file, frames)
    file.write_bytes(file.read_bytes()[:-8] + packed[-8:])
    assert import_dqn_replay(tmp_path / "source", tmp_path / "store", skip_bad=True).left_out
    if (tmp_path / "store/Pong/1/manifest.json").exists():
        check_nothing_mixed(open_replay(tmp_path / "store"), log)


def test_repair_after_bad_files_were_skipped(tmp_path, log, imported):
    file = column(log, "observation")
    content = file.read_bytes()
    file.write_bytes(content[:-40])
    for _ in range(2):
        assert import_dqn_replay(log.folder.parents[2], tmp_path, skip_bad=True).left_out
    file.write_bytes(content)
    assert not import_dqn_replay(log.folder.parents[2], tmp_path).left_out
    check_same_files(tmp_path, imported[1])


class Payload:
    """What it unpickles to is a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["observation", "reward", "add_count"])
def test_pickle_is_refused_and_never_loaded(tmp_path, name):
    trap = tmp_path / "it was loaded"
    pickle.loads(pickle.dumps(Payload(trap)))  # the trap works
    trap.unlink()
    log = write_log(tmp_path / "source")
    file = log.folder / "add_count_ckpt.1.gz" if name == "add_count" else column(log, name)
    for content in (npy(np.array([Payload(trap)] * 20), allow_pickle=True), pickle.dumps(Payload(trap))):
        file.write_bytes(gzip.compress(content))
        with pytest.raises(ReplayError, match=rf"{name}_ckpt\.1\.gz"):
            import_dqn_replay(tmp_path / "source", tmp_path / "store")
        report = import_dqn_replay(tmp_path / "source", tmp_path / "rest", skip_bad=True)
        assert not trap.exists() and report is not None
        shutil.rmtree(tmp_path / "rest")
        shutil.rmtree(tmp_path / "store")


# Actions of another set


def log_of_actions(source, actions, game="Breakout", bad=None):
    """An episode of frames told apart, with these actions; `bad` maps a step to what is stored in its place."""
    log = DopamineLog(source, game=game, capacity=len(actions) + 50)
    for step, action in enumerate(actions):
        log.add(unique_frame(step), action, 0.0, step == len(actions) - 1, (bad or {}).get(step))
    log.finish()
    return log


def test_a_log_of_the_full_set_is_refused_and_can_be_mapped(tmp_path):
    """Read as the game's own, RIGHT would be LEFT and most of the rest left out."""
    names = ["NOOP", "FIRE", "RIGHT", "LEFT"] * 15
    log_of_actions(tmp_path / "source", [FULL_ACTIONS.index(name) for name in names])
    with pytest.raises(ReplayError, match=r"observation.*15 of 63 rows are invalid.* 0 to 4.*full set.*--actions full"):
        import_dqn_replay(tmp_path / "source", tmp_path / "store")
    assert not (tmp_path / "store/Breakout/1/manifest.json").exists()
    report = import_dqn_replay(tmp_path / "source", tmp_path / "mapped", actions="full")
    replay = open_replay(tmp_path / "mapped")
    assert (report.excluded, replay.validate()) == ([], [])
    assert [replay.action_names("Breakout")[action] for action in replay.actions("Breakout")] == names
    assert replay.manifests("Breakout")[0]["action_set"] == "full"


def test_a_log_of_the_games_own_set_is_not_mapped(tmp_path):
    log_of_actions(tmp_path / "source", [0, 1, 2, 3] * 15)
    with pytest.raises(ReplayError, match=r"15 of 63 rows are invalid.*read as the full set.*Breakout lacks UP"):
        import_dqn_replay(tmp_path / "source", tmp_path / "store", actions="full")
    with pytest.raises(ReplayError, match=r"actions is 'all'; expected 'minimal' or 'full'"):
        import_dqn_replay(tmp_path / "source", tmp_path / "store", actions="all")


@pytest.mark.parametrize("rows, bad, stops", [(60, 5, False), (60, 6, True), (3000, 30, False), (3000, 31, True)])
@pytest.mark.parametrize("kind", [{"action": 99}, {"reward": np.float32(np.nan)}])
def test_more_invalid_rows_than_damage_explains_end_the_import(tmp_path, rows, bad, stops, kind):
    log_of_actions(tmp_path / "source", [1] * rows, bad={2 + 3 * step: kind for step in range(bad)})
    if not stops:
        assert len(import_dqn_replay(tmp_path / "source", tmp_path / "store").excluded) == bad
        return
    with pytest.raises(
        ReplayError, match=rf"{bad} of {rows + 3:,} rows are invalid, more than 1%.*damaged or of another"
    ):
        import_dqn_replay(tmp_path / "source", tmp_path / "store")
    skipped = import_dqn_replay(tmp_path / "source", tmp_path / "store", skip_bad=True)
    assert len(skipped.left_out) == 1 and skipped.transitions == 0


# Where a source lies


def linked(link, target):
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)


@pytest.mark.parametrize("kind", ["source", "game", "run", "replay_logs", "files"])
def test_symbolic_links_are_followed(tmp_path, kind):
    log = write_log(tmp_path / "real")
    source, at = (
        tmp_path / "source",
        {"source": "", "game": "Pong", "run": "Pong/1", "replay_logs": "Pong/1/replay_logs"},
    )
    if kind == "files":
        for file in log.folder.iterdir():
            linked(source / "Pong/1/replay_logs" / file.name, file)
    else:
        linked(source / at[kind], tmp_path / "real" / at[kind])
    for name, address in (("by path", source), ("by URL", source.as_uri())):
        import_dqn_replay(address, tmp_path / name)
        check_holds(tmp_path / name, log.episodes())


def test_a_source_that_moved_or_is_named_otherwise(tmp_path, monkeypatch):
    log = write_log(tmp_path / "source")
    import_dqn_replay(tmp_path / "source", tmp_path / "store")
    before = mtimes(tmp_path / "store")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "source").rename(tmp_path / "elsewhere/moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for address in (
        (tmp_path / "elsewhere/moved"),
        (tmp_path / "elsewhere/moved").as_uri(),
        "moved",
        "../elsewhere/moved",
    ):
        report = import_dqn_replay(address, "../store")
        assert report.transitions == sum(len(episode["indices"]) for episode in log.episodes())
        assert mtimes(tmp_path / "store") == before  # nothing was done twice


def test_a_source_that_moved_and_grew(tmp_path):
    log = DopamineLog(tmp_path / "source")
    log.add_episode(30, terminal=False)
    import_dqn_replay(tmp_path / "source", tmp_path / "store")
    (tmp_path / "source").rename(tmp_path / "moved")
    log.folder = tmp_path / "moved/Pong/1/replay_logs"
    log.add_episode(30)
    log.finish()
    import_dqn_replay((tmp_path / "moved").as_uri(), tmp_path / "store")
    check_holds(tmp_path / "store", log.episodes())


def test_another_log_of_the_same_game_is_refused(tmp_path):
    write_log(tmp_path / "source")
    import_dqn_replay(tmp_path / "source", tmp_path / "store")
    before = contents(tmp_path / "store")
    write_log(tmp_path / "other", (11, 3, 30), seed=5)
    with pytest.raises(ReplayError, match=r"Pong/1: holds other data \(DQN-Replay, from file://.*source\)"):
        import_dqn_replay(tmp_path / "other", tmp_path / "store")
    assert contents(tmp_path / "store") == before


@pytest.mark.parametrize("up", ["..", "sub/../..", "../up/../other"])
def test_destinations_above_the_working_folder(tmp_path, monkeypatch, up):
    log = write_log(tmp_path / "source")
    (tmp_path / "here/sub").mkdir(parents=True)
    (tmp_path / "up").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    import_dqn_replay("../source", f"{up}/store", workers=1)
    check_holds(f"{up}/store", log.episodes())
    export_dqn_replay(open_replay(f"{up}/store"), f"{up}/again", rows_per_file=20)
    import_dqn_replay(f"{up}/again", tmp_path / "back")
    check_holds(tmp_path / "back", log.episodes())


def test_folders_named_by_url(tmp_path, monkeypatch):
    """Also where a name has spaces, or what looks like a quoted one; nothing is written to a folder called file:."""
    monkeypatch.chdir(tmp_path)
    for name in ("with space", "50%20 ü"):
        log = write_log(tmp_path / name)
        store, again = tmp_path / f"{name} store", tmp_path / f"{name} again"
        import_dqn_replay((tmp_path / name).as_uri(), store.as_uri())
        check_holds(store.as_uri(), log.episodes())
        export_dqn_replay(store.as_uri(), again.as_uri(), rows_per_file=20)
        assert (again / "Pong/1/replay_logs/add_count_ckpt.0.gz").exists()
        with ReplayWriter(
            tmp_path.as_uri() + "/own", "Pong", actions=action_names("Pong"), source="me", sticky_actions=0
        ):
            assert (tmp_path / "own/Pong/1").is_dir()
    for command in (import_dqn_replay, export_dqn_replay):
        with pytest.raises(ReplayError, match="gs://bucket/store: is not on a local disk"):
            command(tmp_path / (name if command is import_dqn_replay else f"{name} store"), "gs://bucket/store")
    assert not (tmp_path / "file:").exists() and not (tmp_path / "gs:").exists()


LEVELS = {
    "Pong": r"is the folder of one game, with the runs 1\. .*one folder per game: {source}\.",
    "Pong/1": r"is the folder of one run, with replay_logs in it\. .*one folder per game: {source}\.",
    "Pong/1/replay_logs": r"is a folder of Dopamine's files, .*one folder per game: {source}\.",
}


@pytest.mark.parametrize("level", LEVELS)
def test_a_source_that_is_levels_off_is_named(tmp_path, level):
    write_log(tmp_path / "source")
    for address in (tmp_path / "source" / level, (tmp_path / "source" / level).as_uri()):
        with pytest.raises(ReplayError, match=f"{level}: " + LEVELS[level].format(source=tmp_path / "source")):
            import_dqn_replay(address, tmp_path / "store")


def test_files_without_their_folder_are_named(tmp_path):
    log = write_log(tmp_path / "source")
    log.folder.rename(tmp_path / "logs")
    for file in (tmp_path / "logs").iterdir():
        file.rename(log.folder.parent / file.name)
    with pytest.raises(
        ReplayError, match=r"Pong/1: has Dopamine's files, but no folder replay_logs\. Expected .*Pong/1/re"
    ):
        import_dqn_replay(tmp_path / "source", tmp_path / "store")
    log.folder.parent.rename(tmp_path / "1")
    for file in (tmp_path / "1").iterdir():
        file.rename(tmp_path / "source/Pong" / file.name)
    with pytest.raises(ReplayError, match=r"Pong: .*Dopamine's files.*Expected .*Pong/<run>/replay_logs/"):
        import_dqn_replay(tmp_path / "source", tmp_path / "store")
    (tmp_path / "above/source").mkdir(parents=True)
    write_log(tmp_path / "above/source")
    for games in (None, ["Pong"]):
        with pytest.raises(
            ReplayError, match=r"above: holds no game's folder, but .*above/source does .*: .*above/source\."
        ):
            import_dqn_replay(tmp_path / "above", tmp_path / "store", games)


# Bad folders


def test_unknown_game(tmp_path):
    log = write_log(tmp_path / "source")
    write_log(tmp_path / "source", game="Pnog")
    with pytest.raises(ReplayError, match="Pnog"):
        import_dqn_replay(tmp_path / "source", tmp_path / "store")
    import_dqn_replay(tmp_path / "source", tmp_path / "pong", games=["Pong"])
    check_holds(tmp_path / "pong", log.episodes())


def test_source_without_a_log(tmp_path):
    with pytest.raises(ReplayError, match="absent"):
        import_dqn_replay(tmp_path / "absent", tmp_path / "store")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReplayError, match="empty"):
        import_dqn_replay(tmp_path / "empty", tmp_path / "store")
    (tmp_path / "empty/Pong/1/replay_logs").mkdir(parents=True)
    with pytest.raises(ReplayError, match="empty"):
        import_dqn_replay(tmp_path / "empty", tmp_path / "store")
    assert not (tmp_path / "store/Pong/1/manifest.json").exists()


def test_every_file_bad(tmp_path):
    log = write_log(tmp_path / "source")
    for file in log.folder.glob("*observation*"):
        file.write_bytes(b"")
    with pytest.raises(ReplayError, match="observation"):
        import_dqn_replay(tmp_path / "source", tmp_path / "store")


def test_destination_in_the_way(tmp_path):
    write_log(tmp_path / "source")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ReplayError, match="file"):
        import_dqn_replay(tmp_path / "source", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_destination_is_a_recording(tmp_path, recording):
    """A run of another origin is neither continued nor replaced."""
    shutil.copytree(recording, tmp_path / "store")
    before = contents(tmp_path / "store")
    write_log(tmp_path / "source", game="Breakout")
    with pytest.raises(ReplayError, match="Breakout"):
        import_dqn_replay(tmp_path / "source", tmp_path / "store")
    assert contents(tmp_path / "store") == before


# Export


def write_store(path, runs, seed, game="Pong"):
    """A store of our own making: {run: [(length, terminal), ...]}."""
    for run, episodes in runs.items():
        with ReplayWriter(path, game, run, actions=action_names(game), source="a test", sticky_actions=0.25) as writer:
            for number, (length, terminal) in enumerate(episodes):
                rng = np.random.default_rng([seed, run, number])
                frames = rng.integers(0, 3, (length, 1, 84), dtype=np.uint8).repeat(84, 1)
                rewards = rng.normal(scale=2, size=length).astype(np.float32)
                writer.append(frames, rng.integers(6, size=length), rewards, terminal=terminal)


def check_equal_replays(one, other, game="Pong"):
    columns = ["start", "length", "terminal", "truncated", "continued", "run"]
    assert one.episodes(game)[columns].to_dict("list") == other.episodes(game)[columns].to_dict("list")
    np.testing.assert_array_equal(one.actions(game), other.actions(game))
    np.testing.assert_array_equal(one.rewards(game), other.rewards(game))
    every = np.arange(one.num_transitions(game))
    check_same(one.frames_at(game, every), other.frames_at(game, every))


STORES = st.dictionaries(
    st.sampled_from([1, 2, 10]),
    st.lists(st.tuples(st.integers(1, 25), st.booleans()), min_size=1, max_size=5),
    min_size=1,
    max_size=2,
)


@settings(max_examples=3, **SLOW)  # besides those named
@given(runs=STORES, rows_per_file=st.integers(5, 40), seed=st.integers(0, 99))
@example(runs={1: [(1, True)]}, rows_per_file=5, seed=0)
@example(runs={1: [(1, True)] * 5}, rows_per_file=5, seed=0)
@example(runs={1: [(2, True), (25, True)]}, rows_per_file=5, seed=0)
@example(runs={1: [(13, True), (5, True)]}, rows_per_file=20, seed=0)  # a file ends with all of the padding
@example(runs={1: [(3, False), (22, True), (13, True), (3, False), (17, False)]}, rows_per_file=19, seed=61)  # and last
def test_import_of_an_export_is_the_original(small_blocks, runs, rows_per_file, seed):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_store(folder / "store", runs, seed)
        export_dqn_replay(folder / "store", folder / "log", rows_per_file=rows_per_file)
        check_exported_files(folder / "log", open_replay(folder / "store"), rows_per_file)
        import_dqn_replay(folder / "log", folder / "again")
        again = open_replay(folder / "again")
        assert again.validate() == []
        check_equal_replays(again, open_replay(folder / "store"))


def check_exported_files(source, replay, rows_per_file):
    table = replay.episodes("Pong")
    for run, of_run in table.groupby("run"):
        logs = source / "Pong" / str(run) / "replay_logs"
        episodes = read_log(logs)
        assert [len(episode) for episode in episodes] == of_run["length"].tolist()
        for row, episode in zip(of_run.itertuples(), episodes):
            here = np.arange(row.start, row.start + row.length)
            frames, actions, rewards, terminals = zip(*episode)
            np.testing.assert_array_equal(frames, replay.frames_at("Pong", here))
            np.testing.assert_array_equal(actions, replay.actions("Pong")[here])
            np.testing.assert_array_equal(rewards, replay.rewards("Pong")[here])
            assert list(terminals) == [0] * (row.length - 1) + [1]
        for number in range(len(list(logs.glob("add_count*")))):
            arrays = [load(column_file(logs, name, number)) for name in COLUMNS]
            assert [array.dtype for array in arrays] == ["uint8", "int32", "float32", "uint8"]
            assert [array.shape for array in arrays] == [(rows_per_file, 84, 84), *[(rows_per_file,)] * 3]
            assert load(logs / f"add_count_ckpt.{number}.gz").shape == ()
            assert load(logs / f"invalid_range_ckpt.{number}.gz").shape == (5,)


@pytest.mark.parametrize("lost", [[], [1], [0, 2]])
def test_export_of_an_import_holds_the_same_episodes(tmp_path, lost):
    log = write_log(tmp_path / "source")
    for number in lost:
        log.remove(number)
    import_dqn_replay(tmp_path / "source", tmp_path / "store")
    export_dqn_replay(open_replay(tmp_path / "store"), tmp_path / "log", rows_per_file=20)
    import_dqn_replay(tmp_path / "log", tmp_path / "again")
    check_holds(tmp_path / "again", log.episodes(dict.fromkeys(lost, 0)))
    assert not read_report(tmp_path / "again")["excluded"]


def test_export_does_not_overwrite(tmp_path):
    write_store(tmp_path / "store", {1: [(5, True)]}, seed=0)
    log = write_log(tmp_path / "source")
    before = contents(tmp_path / "source")
    with pytest.raises(ReplayError, match="replay_logs"):
        export_dqn_replay(tmp_path / "store", tmp_path / "source")
    assert contents(tmp_path / "source") == before and log.folder.is_dir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ReplayError, match="file"):
        export_dqn_replay(tmp_path / "store", tmp_path / "file")
    with pytest.raises(ReplayError, match="rows_per_file"):
        export_dqn_replay(tmp_path / "store", tmp_path / "log", rows_per_file=0)
