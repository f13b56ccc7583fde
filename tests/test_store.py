"""What was appended is what a batch holds; a killed writer, a full disk or a damaged file never yields other data."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from scaled_ql.games import FULL_ACTIONS, RULES, action_names
from scaled_ql.replay import ReplayError, ReplayWriter, chunks, format, open_replay, sample_batch

ACTIONS = action_names("Pong")


def open_writer(path, game="Pong", run=1, **changed):
    arguments = {"actions": action_names(game), "source": "a test", "sticky_actions": 0.25, "lock_timeout": 0.1}
    return ReplayWriter(path, game, run, **(arguments | changed))


def make_episode(number, length=None, terminal=None):
    """Episode `number`, the same wherever it is made; frames are never zero."""
    rng = np.random.default_rng(number)
    own_length, own_terminal = int(rng.integers(1, 40)), bool(rng.integers(2))
    length = own_length if length is None else length
    return {
        "observation": rng.integers(1, 256, (length, 84, 84), dtype=np.uint8),
        "action": rng.integers(len(ACTIONS), size=length),
        "reward": rng.normal(scale=2, size=length).astype(np.float32),
        "terminal": own_terminal if terminal is None else terminal,
    }


def write(path, numbers, **where):
    with open_writer(path, **where) as writer:
        for number in numbers:
            writer.append(**make_episode(number))


def identity_of(folder, count):
    """What `identity` is when episodes 0..count-1 are written undisturbed."""
    write(folder, range(count))
    return open_replay(folder).identity()


def check_holds_first(path, count):
    """The store holds episodes 0..count-1, bit for bit, and no more."""
    replay = open_replay(path)
    table = replay.episodes("Pong")
    assert len(table) == count and replay.validate() == []
    for number, row in enumerate(table.itertuples()):
        episode, stop = make_episode(number), row.start + row.length
        np.testing.assert_array_equal(replay.frames_at("Pong", np.arange(row.start, stop)), episode["observation"])
        np.testing.assert_array_equal(replay.actions("Pong")[row.start : stop], episode["action"])
        np.testing.assert_array_equal(replay.rewards("Pong")[row.start : stop], episode["reward"])
        assert row.terminal == episode["terminal"] and row.truncated != row.terminal
        assert row.episode_return == pytest.approx(episode["reward"].sum(), abs=1e-4)


def read_all(path):
    """Every transition that has a 1-step return."""
    replay = open_replay(path)
    start, count = replay.sampleable("Pong", 1)
    return replay.batch("Pong", np.concatenate([np.arange(a, a + n) for a, n in zip(start, count)]), 1)


@contextmanager
def small_chunks():
    """A few frames fill a file, so small stores have many chunks and shards."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in {"INNER_CHUNK": 4, "FRAME_SHARD": 16, "SCALAR_CHUNK": 4, "SCALAR_SHARD": 16}.items():
            patch.setattr(format, name, size)
        yield


# Batches


def naive_transition(episodes, t, n_step, discount, stack_size, clip_rewards):
    """Transition t of a game, one number and one frame at a time; None where truncation lost it."""
    for episode in episodes:
        length = len(episode["action"])
        if t < length:
            break
        t -= length
    ended = t + n_step >= length
    if ended and not episode["terminal"]:
        return None
    total = 0.0
    for k in range(n_step):
        if t + k < length:
            reward = float(episode["reward"][t + k])
            total += discount**k * (max(-1.0, min(1.0, reward)) if clip_rewards else reward)

    def stack(end):
        frames = np.zeros((84, 84, stack_size), np.uint8)
        for channel in range(stack_size):
            time = end - stack_size + 1 + channel
            if time >= 0:
                frames[:, :, channel] = episode["observation"][time]
        return frames

    following = length - 1 if ended else t + n_step
    return stack(t), episode["action"][t], total, 0.0 if ended else discount**n_step, stack(following)


@settings(deadline=None, max_examples=12)
@given(
    runs=st.dictionaries(
        st.sampled_from([1, 2, 10]),
        st.lists(st.tuples(st.integers(1, 11), st.booleans()), min_size=1, max_size=3),
        min_size=1,
    ),
    stack_size=st.sampled_from([1, 4]),
    clip_rewards=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_batches_equal_naive_ones(runs, stack_size, clip_rewards, seed):
    with tempfile.TemporaryDirectory() as folder, small_chunks():
        write(folder, [seed], game="Asterix")
        appended = []
        for run in sorted(runs):  # in time order: 1, 2, 10
            with open_writer(folder, run=run) as writer:
                for length, terminal in runs[run]:
                    appended.append(make_episode(seed + len(appended), length, terminal))
                    writer.append(**appended[-1])
        replay = open_replay(folder)
        assert replay.games == ["Asterix", "Pong"] and replay.validate() == []
        total = sum(len(episode["action"]) for episode in appended)
        assert replay.num_transitions("Pong") == total
        for n_step in (1, 3, 5):
            arguments = n_step, 0.9, stack_size, clip_rewards
            expected = [naive_transition(appended, t, *arguments) for t in range(total)]
            usable = [t for t in range(total) if expected[t]]
            for t in set(range(total)) - set(usable):
                with pytest.raises(ReplayError, match="truncated"):
                    replay.batch("Pong", [*usable[:1], t], *arguments)
            if not usable:
                with pytest.raises(ReplayError, match=f"n_step = {n_step}"):
                    replay.sampleable("Pong", n_step)
                continue
            start, count = replay.sampleable("Pong", n_step)
            assert [t for a, n in zip(start, count) for t in range(a, a + n)] == usable

            order = np.random.default_rng(seed).permutation(usable)
            batch = replay.batch("Pong", order, *arguments)
            wanted = [np.array(field) for field in zip(*(expected[t] for t in order))]
            np.testing.assert_array_equal(batch.observation, wanted[0])
            np.testing.assert_array_equal(batch.action, wanted[1])
            np.testing.assert_allclose(batch.reward, wanted[2], rtol=1e-6, atol=1e-6)
            np.testing.assert_array_equal(batch.discount, wanted[3].astype(np.float32))
            np.testing.assert_array_equal(batch.next_observation, wanted[4])
            assert (batch.game == 1).all()
            size, width = len(usable), stack_size + n_step
            assert [(field.dtype, field.shape) for field in batch] == [
                ("uint8", (size, width, 84, 84)), ("int32", (size, stack_size)), ("int32", (size,)),
                ("float32", (size,)), ("float32", (size,)), ("int32", (size,)),
            ]  # fmt: skip
            assert batch.observation.dtype == batch.next_observation.dtype == "uint8"


def test_batch_by_hand(tmp_path):
    frames = np.arange(1, 4, dtype=np.uint8)[:, None, None] * np.ones((84, 84), np.uint8)
    with open_writer(tmp_path) as writer:
        writer.append(frames, [0, 1, 2], [1, -3, 0.5], terminal=True)
        writer.append(frames + 3, [2, 1, 0], [1, 1, 1], terminal=False)
    replay = open_replay(tmp_path)
    batch = replay.batch("Pong", [1, 3], 2, 0.5)
    assert batch.observation[:, 0, 0].tolist() == [[0, 0, 1, 2], [0, 0, 0, 4]]
    assert batch.next_observation[:, 0, 0].tolist() == [[0, 1, 2, 3], [0, 4, 5, 6]]
    assert batch.action.tolist() == [1, 2]
    assert batch.reward.tolist() == [-1 + 0.5 * 0.5, 1.5]
    assert batch.discount.tolist() == [0, 0.25]
    assert replay.batch("Pong", 1, 2, 0.5, clip_rewards=False).reward.tolist() == [-3 + 0.5 * 0.5]


def test_episode_tables_and_manifests_of_several_runs(tmp_path):
    for run in (10, 2, 1):
        with open_writer(tmp_path, run=run, source=f"player {run}") as writer:
            writer.append(**make_episode(run, length=run), epsilon=1 / run)
    replay = open_replay(tmp_path)
    table = replay.episodes("Pong")
    assert table["run"].tolist() == [1, 2, 10]
    assert table["start"].tolist() == [0, 1, 3]
    assert table["length"].tolist() == [1, 2, 10]
    assert table["epsilon"].tolist() == [1.0, 0.5, 0.1]
    assert [manifest["source"] for manifest in replay.manifests("Pong")] == ["player 1", "player 2", "player 10"]
    assert replay.action_names("Pong") == list(ACTIONS)
    assert replay.stored_bytes("Pong") > 13 * 84 * 84 * 0.9  # random frames do not compress
    one_by_one = np.concatenate([replay.frames_at("Pong", [t]) for t in (2, 0, 1)])
    np.testing.assert_array_equal(replay.frames_at("Pong", [2, 0, 1]), one_by_one)  # across a border of runs
    table.loc[0, "length"] = 99
    assert replay.episodes("Pong")["length"].tolist() == [1, 2, 10]


def test_identity_depends_on_contents_alone(tmp_path):
    assert identity_of(tmp_path / "one", 3) == identity_of(tmp_path / "other", 3)
    episodes = [make_episode(number) for number in range(3)]
    episodes[1]["reward"][0] += 0.5
    with open_writer(tmp_path / "changed") as writer:
        for episode in episodes:
            writer.append(**episode)
    identities = {open_replay(tmp_path / name).identity() for name in ("one", "changed")}
    assert len(identities | {identity_of(tmp_path / "longer", 4)}) == 3


@pytest.mark.parametrize("name", ["with space", "50%20 ü#?", "sub/../other"])
def test_any_folder_name(tmp_path, name):
    (tmp_path / "sub").mkdir()
    write(tmp_path / name, range(2))
    check_holds_first(tmp_path / name, 2)


def test_open_by_url(tmp_path):
    write(tmp_path, range(2))
    by_url, by_path = open_replay(tmp_path.as_uri()), open_replay(str(tmp_path) + "/")
    assert by_url.identity() == by_path.identity()
    sizes = [file.stat().st_size for file in (tmp_path / "Pong").rglob("*") if file.is_file()]
    assert by_url.stored_bytes("Pong") == by_path.stored_bytes("Pong") == sum(sizes) > 0


@pytest.mark.parametrize("link", ["", "Pong", "Pong/1"])
def test_symbolic_links_are_followed(tmp_path, link):
    write(tmp_path / "real", range(2))
    (tmp_path / "store" / link).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "store" / link).symlink_to(tmp_path / "real" / link)
    real = open_replay(tmp_path / "real")
    for address in (tmp_path / "store", (tmp_path / "store").as_uri()):
        replay = open_replay(address)
        assert (replay.identity(), replay.validate()) == (real.identity(), [])
        assert replay.stored_bytes("Pong") == real.stored_bytes("Pong") > 0
    write(tmp_path / "store", range(2, 4))
    assert open_replay(tmp_path / "real").num_transitions("Pong") > real.num_transitions("Pong")


def test_relative_paths_above_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write("../store", range(2))
    check_holds_first("../store", 2)
    check_holds_first(tmp_path / "store", 2)


@pytest.mark.parametrize("level, what", [("Pong", "the folder of one game"), ("Pong/1", "the folder of one recording")])
def test_a_folder_that_is_levels_off_is_named(tmp_path, level, what):
    write(tmp_path / "store", range(2))
    for address in (tmp_path / "store" / level, (tmp_path / "store" / level).as_uri()):
        with pytest.raises(ReplayError, match=rf"{level}: is {what}\. .*: {tmp_path}/store\."):
            open_replay(address)


def change_actions(path, actions, game="Pong", run=1):
    """As a recorder of another list would have written it."""
    file = path / game / str(run) / "manifest.json"
    manifest = json.loads(file.read_text()) | {"actions": list(actions)}
    file.write_bytes(format.encode_manifest({name: manifest[name] for name in manifest.keys() - {"crc32"}}))


@pytest.mark.parametrize("actions", [FULL_ACTIONS, ACTIONS[::-1], ACTIONS[:3]], ids=["full", "reversed", "fewer"])
def test_actions_that_are_not_the_games_are_refused(tmp_path, actions):
    with pytest.raises(ReplayError, match=rf"Pong/1: its {len(actions)} actions are .*but Pong has 6: NOOP, FIRE"):
        open_writer(tmp_path, actions=actions)
    write(tmp_path, range(2))
    change_actions(tmp_path, actions)
    with pytest.raises(ReplayError, match=rf"Pong/1/manifest.json: its {len(actions)} actions are .*--actions full"):
        open_replay(tmp_path)


def test_recordings_of_one_game_index_one_list(tmp_path):
    """Also of a game that nobody knows, whose own list cannot be asked for."""
    for run, actions in ((1, ["LEFT", "RIGHT"]), (2, ["LEFT", "RIGHT"])):
        with ReplayWriter(tmp_path, "Unheard", run, actions=actions, source="a test", sticky_actions=0.25) as writer:
            writer.append(FRAMES, [0, 1, 1], [0, 0, 0], terminal=True)
    assert open_replay(tmp_path).action_names("Unheard") == ["LEFT", "RIGHT"]
    change_actions(tmp_path, ["RIGHT", "LEFT"], "Unheard", 2)
    with pytest.raises(
        ReplayError, match=r"Unheard/2/manifest.json: its actions are RIGHT, LEFT, those of .*/1/ are LEFT"
    ):
        open_replay(tmp_path)


def test_rules_are_known_where_they_were_recorded(tmp_path):
    write(tmp_path, [0])
    (manifest,) = open_replay(tmp_path).manifests("Pong")
    assert {name for name in RULES if manifest[name] is None} == set(RULES) - {
        "sticky_actions",
        "frame_skip",
        "rewards",
    }
    with open_writer(tmp_path, run=2, mode=1, life_loss_terminal=True) as writer:
        writer.append(**make_episode(0))
    assert open_replay(tmp_path).manifests("Pong")[1]["life_loss_terminal"] is True
    with pytest.raises(TypeError, match="unknown rules modes; a manifest's rules are rewards"):
        open_writer(tmp_path, run=3, modes=1)
    with pytest.raises(ReplayError, match="mode: 1 stored, 2 requested"):
        open_writer(tmp_path, run=2, mode=2, life_loss_terminal=True)


@pytest.mark.parametrize(
    "indices, message",
    [
        ([-1], "0..6"),
        ([0, 7], "0..6"),
        (np.array([2**63], np.uint64), "0..6"),
        ([0.0], "integers"),
        ([True], "integers"),
        ([[0, 1], [2, 3]], "indices"),
    ],
)
def test_bad_index(tmp_path, indices, message):
    with open_writer(tmp_path) as writer:
        writer.append(**make_episode(0, 7, True))
    with pytest.raises(ReplayError, match=message):
        open_replay(tmp_path).batch("Pong", indices)


def test_bad_request(tmp_path):
    write(tmp_path, range(2))
    replay = open_replay(tmp_path)
    for ask in (replay.num_transitions, replay.episodes, replay.rewards, lambda game: replay.batch(game, [0])):
        with pytest.raises(ReplayError, match="no game 'Pnog'; it has Pong"):
            ask("Pnog")
    with pytest.raises(ReplayError, match="n_step"):
        replay.batch("Pong", [0], 0)
    with pytest.raises(ReplayError, match="stack_size"):
        replay.batch("Pong", [0], stack_size=0)
    with pytest.raises(ReplayError, match="transitions"):
        replay.frames_at("Pong", np.arange(0, 1000))
    assert len(replay.batch("Pong", np.array([], int)).action) == 0


# Killed writers


def append_forever(path):
    """Run by another process: continue with whichever episode comes next."""
    with small_chunks(), open_writer(path, lock_timeout=20) as writer:
        while True:
            writer.append(**make_episode(writer.num_episodes))


def start(code, *arguments):
    """A Python process that can import this module."""
    command = [sys.executable, "-c", f"import sys; from test_store import *; {code}", *map(str, arguments)]
    return subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)


def wait_for_episodes(path, count, process):
    """Until the journal of a running writer has `count` lines."""
    journal, until = Path(path) / "Pong/1/episodes.jsonl", time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < count:
        assert process.poll() is None, "the writer ended by itself"
        assert time.monotonic() < until, "the writer writes nothing"
        time.sleep(0.001)


def test_killed_writer_leaves_a_prefix_and_goes_on(tmp_path):
    rng, count = np.random.default_rng(), 0
    for _ in range(3):
        process = start("append_forever(sys.argv[1])", tmp_path / "killed")
        try:
            wait_for_episodes(tmp_path / "killed", count + 2, process)
            assert open_replay(tmp_path / "killed").validate() == []  # a reader beside the writer
            time.sleep(rng.uniform(0, 0.1))
        finally:
            process.kill()  # SIGKILL
            process.communicate()
        before, count = count, len(open_replay(tmp_path / "killed").episodes("Pong"))
        assert count >= before + 2
        check_holds_first(tmp_path / "killed", count)
    with small_chunks():
        write(tmp_path / "killed", range(count, count + 3))
    check_holds_first(tmp_path / "killed", count + 3)
    assert open_replay(tmp_path / "killed").identity() == identity_of(tmp_path / "undisturbed", count + 3)


def test_torn_journal_line_is_no_episode(tmp_path):
    expected = identity_of(tmp_path / "undisturbed", 3)
    write(tmp_path / "torn", range(2))
    journal = tmp_path / "torn/Pong/1/episodes.jsonl"
    first, second = journal.read_bytes().splitlines(keepends=True)
    for kept in (1, len(second) // 2, len(second) - 1):
        journal.write_bytes(first + second[:kept])
        check_holds_first(tmp_path / "torn", 1)
        write(tmp_path / "torn", [1])
    write(tmp_path / "torn", [2])
    assert open_replay(tmp_path / "torn").identity() == expected
    assert journal.read_bytes().count(b"\n") == 3


def test_files_of_any_size_are_continued_and_sampled_alike(tmp_path, monkeypatch):
    with small_chunks(), pytest.MonkeyPatch.context() as patch:
        write(tmp_path / "small", range(4))
        patch.setattr(format, "FRAME_SHARD", 64)
        write(tmp_path / "small", range(4, 8))
        write(tmp_path / "large", range(8))
    check_holds_first(tmp_path / "small", 8)
    assert open_replay(tmp_path / "small").validate() == []
    frames = int(open_replay(tmp_path / "small").num_frames)
    for name, size in (("small", 16), ("large", 64)):
        assert len(list((tmp_path / name).glob("Pong/1/observation/c.*"))) == -(-frames // size)
    monkeypatch.setattr(chunks, "_open", lru_cache(maxsize=1)(chunks._OpenFile))  # fewer than there are files
    small, large = (sample_batch(open_replay(tmp_path / name), 0, 0, games_per_batch=16) for name in ("small", "large"))
    for one, other in zip(small, large, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("lost_length", [1, 5, 60])
def test_arrays_longer_than_the_journal_are_harmless(tmp_path, lost_length):
    with small_chunks():
        write(tmp_path / "one", range(2))
        journal = tmp_path / "one/Pong/1/episodes.jsonl"
        committed = journal.read_bytes()
        with open_writer(tmp_path / "one") as writer:
            writer.append(**make_episode(99, lost_length, terminal=True))
        journal.write_bytes(committed)  # as if the writer had died just before its commit
        check_holds_first(tmp_path / "one", 2)
        for number in (2, 3):
            write(tmp_path / "one", [number])
            check_holds_first(tmp_path / "one", number + 1)
    assert open_replay(tmp_path / "one").identity() == identity_of(tmp_path / "undisturbed", 4)


def test_run_without_a_complete_episode_is_left_out(tmp_path):
    open_writer(tmp_path, run=1).close()
    with pytest.raises(ReplayError, match="no complete episode in Pong"):
        open_replay(tmp_path)
    write(tmp_path, [0], run=2)
    replay = open_replay(tmp_path)
    assert replay.episodes("Pong")["run"].tolist() == [2]
    write(tmp_path, [1], run=1)
    assert open_replay(tmp_path).episodes("Pong")["run"].tolist() == [1, 2]
    assert replay.episodes("Pong")["run"].tolist() == [2]  # a replay does not change while it is open


# A full disk: a limit on the size of files makes the operating system refuse


def fill_disk(path, limit, note):
    """Run by another process: append under the limit until refused, then lift it and go on."""
    import resource

    with open_writer(path) as writer:
        writer.append(**make_episode(0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            while writer.num_episodes < 60:
                number = writer.num_episodes
                writer.append(**make_episode(number), **({"note": "x" * note} if number == 2 else {}))
        except ReplayError as error:
            print("refused", error)
        assert open_replay(path).validate() == []
        refused = writer.num_episodes
        check_holds_first(path, refused)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        for number in range(refused, refused + 3):
            writer.append(**make_episode(number))
        print("episodes", writer.num_episodes)


@pytest.mark.parametrize("limit, note", [(500_000, 0), (2_000_000, 3_000_000)], ids=["frames", "journal"])
def test_full_disk(tmp_path, limit, note):
    output = start("fill_disk(sys.argv[1], *map(int, sys.argv[2:]))", tmp_path / "full", limit, note).communicate()[0]
    assert "refused" in output and "make room" in output
    count = int(output.split()[-1])
    assert count >= 5
    check_holds_first(tmp_path / "full", count)
    assert open_replay(tmp_path / "full").identity() == identity_of(tmp_path / "undisturbed", count)


@pytest.mark.parametrize("kind", format.STORE_ERRORS)
def test_whatever_tensorstore_raises_is_one_sentence(tmp_path, monkeypatch, kind):
    """Its kind depends on what the system answered; the specification that it appends is left out."""

    class Refused:
        def result(self):
            raise kind("Error opening \"zarr3\" driver: [1] no locks [os_error_code='38'] [tensorstore_spec='{\n}']")

    monkeypatch.setattr(format.ts, "open", lambda *_, **__: Refused())
    with pytest.raises(ReplayError, match=r"observation: cannot open or create .*driver: \[1\] no locks\)\. Make room"):
        open_writer(tmp_path)


# Bad episodes and other people's folders

FRAMES = np.ones((3, 84, 84), np.uint8)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"action": [0, 1, 6]}, "from 0 to 5"),
        ({"action": [0, -1, 1]}, "from 0 to 5"),
        ({"action": [0, 1, 2**40]}, "from 0 to 5"),
        ({"action": [0.0, 1.0, 2.0]}, "integers"),
        ({"action": [[0], [1], [2]]}, "integers"),
        ({"action": 1}, "integers"),
        ({"observation": FRAMES[:0], "action": np.zeros(0, int), "reward": []}, "at least one"),
        ({"observation": FRAMES / 255}, "expected uint8"),
        ({"observation": FRAMES[:2]}, "expected uint8"),
        ({"observation": FRAMES[..., None]}, "expected uint8"),
        ({"observation": FRAMES[:, :83]}, "expected uint8"),
        ({"reward": [0, np.nan, 1]}, "finite"),
        ({"reward": [0, np.inf, 1]}, "finite"),
        ({"reward": [0, 1]}, "3 finite"),
        ({"reward": [[0], [1], [2]]}, "3 finite"),
        ({"start": 99}, "start"),
        ({"length": 1}, "length"),
    ],
)
def test_bad_episode_is_refused_and_harmless(tmp_path, changed, message):
    good = {"observation": FRAMES, "action": [0, 1, 2], "reward": [0, 1, 2], "terminal": True}
    with open_writer(tmp_path) as writer:
        writer.append(**make_episode(0))
        with pytest.raises(ReplayError, match=message):
            writer.append(**(good | changed))
        check_holds_first(tmp_path, 1)
        writer.append(**make_episode(1))
    check_holds_first(tmp_path, 2)


def test_episodes_written_together_are_those_written_one_by_one(tmp_path):
    episodes = [make_episode(number) | {"epsilon": number / 8} for number in range(7)]
    with open_writer(tmp_path / "together") as writer:
        writer.extend(episodes[:1])
        writer.extend(iter(episodes[1:5]))
        bad = episodes[6] | {"reward": episodes[6]["reward"] * np.nan}
        with pytest.raises(ReplayError, match=r"episode 6.*finite"):
            writer.extend([episodes[5], bad])
        check_holds_first(tmp_path / "together", 5)
        writer.extend([])
        assert (writer.num_episodes, writer.last_episode["epsilon"]) == (5, 0.5)
        writer.extend(episodes[5:])
    with open_writer(tmp_path / "one") as writer:
        for episode in episodes:
            writer.append(**episode)
    for name in ("episodes.jsonl", "observation/c.0.0.0", "reward/c.0", "terminal/c.0"):
        assert (tmp_path / "together/Pong/1" / name).read_bytes() == (tmp_path / "one/Pong/1" / name).read_bytes()
    check_holds_first(tmp_path / "together", 7)


@pytest.mark.parametrize("terminal", [True, np.True_, 1, np.uint8(1)])
def test_terminal_of_any_type(tmp_path, terminal):
    with open_writer(tmp_path) as writer:
        writer.append(**make_episode(0, 3) | {"terminal": terminal})
    replay = open_replay(tmp_path)
    assert replay.validate() == [] and replay.episodes("Pong")["terminal"].tolist() == [True]


def test_second_writer_is_kept_out(tmp_path):
    with open_writer(tmp_path) as writer:
        writer.append(**make_episode(0))
        with pytest.raises(ReplayError, match="another process"):
            open_writer(tmp_path)
        open_writer(tmp_path, run=2).close()  # another run is no conflict
        writer.append(**make_episode(1))
    write(tmp_path, [2])
    check_holds_first(tmp_path, 3)


def test_writer_lets_go_when_it_cannot_open(tmp_path):
    write(tmp_path, [0])
    with pytest.raises(ReplayError):
        open_writer(tmp_path, source="someone else")
    write(tmp_path, [1])
    check_holds_first(tmp_path, 2)


@pytest.mark.parametrize(
    "changed", [{"actions": ("NOOP",)}, {"source": "other"}, {"sticky_actions": 0.0}, {"rewards": "clipped"}]
)
def test_other_settings_on_reopening(tmp_path, changed):
    write(tmp_path, [0])
    with pytest.raises(ReplayError, match=next(iter(changed))):
        open_writer(tmp_path, **changed)


def test_missing_and_foreign_folders(tmp_path):
    with pytest.raises(ReplayError, match="no such replay folder"):
        open_replay(tmp_path / "absent")
    with pytest.raises(ReplayError, match="not a replay store"):
        open_replay(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ReplayError, match="no such replay folder"):
        open_replay(tmp_path / "notes.txt")
    with pytest.raises(ReplayError, match="cannot create"):
        open_writer(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_folder_of_two_datasets_is_no_dataset(tmp_path):
    for name in ("one", "other"):
        write(tmp_path / name, range(2))
    with pytest.raises(ReplayError, match="not a replay store"):  # not four episodes of the game
        open_replay(tmp_path)
    shutil.copytree(tmp_path / "one/Pong", tmp_path / "one/Copy")
    with pytest.raises(ReplayError, match=r"Copy.*Pong"):
        open_replay(tmp_path / "one")


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"format": "scaled-ql replay", "version": 3}', "Update the package"),
        ('{"format": "scaled-ql replay", "version": 1}', "Record or import it again"),
        ('{"format": "scaled-ql replay"}', "manifest"),
        ('{"format": "a web page", "version": 1}', "not the manifest"),
        ("[1, 2]", "not the manifest"),
        ('{"format": "scaled-', "not JSON"),
        ("", "not JSON"),
    ],
)
def test_manifest_of_something_else(tmp_path, content, message):
    write(tmp_path, [0])
    (tmp_path / "Pong/1/manifest.json").write_text(content)
    for open_it in (open_replay, open_writer):
        with pytest.raises(ReplayError, match=rf"manifest\.json.*{message}"):
            open_it(tmp_path)


# Damage


@pytest.mark.parametrize(
    "old, new",
    [
        ('"start": 5', '"start": 6'),
        ('"length": 7', '"length": 8'),
        ('"length": 7', '"length": 0'),
        ('"length": 7', '"length": "7"'),
        ('"length": 7', '"length": null'),
        ('"terminal"', '"termimal"'),
        ('"start"', '"strat"'),
        ("{", "["),
        (", ", ""),
        ("\n", "\n\n"),
    ],
)
def test_damaged_journal_line(tmp_path, old, new):
    with open_writer(tmp_path) as writer:
        for number, length in enumerate((5, 7, 9)):
            writer.append(**make_episode(number, length))
    journal = tmp_path / "Pong/1/episodes.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    lines[1] = lines[1].replace(old, new)
    damaged = "".join(lines)
    assert damaged != journal.read_text()
    journal.write_text(damaged)
    for open_it in (open_replay, open_writer):
        with pytest.raises(ReplayError, match=r"episodes\.jsonl: line [23]"):
            open_it(tmp_path)
    assert journal.read_text() == damaged


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A store of several small chunks and files per array, and a copy of what it holds."""
    folder = tmp_path_factory.mktemp("sound")
    with small_chunks(), open_writer(folder) as writer:
        for number in range(3):
            writer.append(**make_episode(number, 7, terminal=number != 1))
    return folder, read_all(folder)


def shards(folder, name="*"):
    return sorted((folder / "Pong/1").glob(f"{name}/c.*"))


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_damage_is_named_and_never_yields_other_data(sound, data):
    folder, expected = sound
    name = data.draw(st.sampled_from(sorted(format.ARRAYS)))
    file = data.draw(st.sampled_from(shards(folder, name)))
    kind = data.draw(st.sampled_from(["flip", "cut", "delete"]))
    content = file.read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    try:
        if kind == "flip":
            flipped = bytes([content[position] ^ (1 << data.draw(st.integers(0, 7)))])
            file.write_bytes(content[:position] + flipped + content[position + 1 :])
        elif kind == "cut":
            file.write_bytes(content[:position])
        else:
            file.unlink()
        problems = open_replay(folder).validate()
        assert problems and all(f"Pong/1/{name}: " in problem for problem in problems)
        # Batches do without the flags, which the journal has too, and without the index of chunks they do not need.
        try:
            batch = read_all(folder)
        except ReplayError as error:
            assert f"Pong/1/{name}: " in str(error)
        else:
            for field, wanted in zip(batch, expected):
                np.testing.assert_array_equal(field, wanted)
    finally:
        file.write_bytes(content)
    np.testing.assert_array_equal(read_all(folder).next_observation, expected.next_observation)


@pytest.mark.parametrize("bit", range(128))
def test_damaged_entry_of_the_index_is_named(sound, bit):
    folder, _ = sound
    file = shards(folder, "action")[0]
    content = file.read_bytes()
    flipped = content[bit // 8] ^ (1 << bit % 8)
    try:
        file.write_bytes(content[: bit // 8] + bytes([flipped]) + content[bit // 8 + 1 :])
        with pytest.raises(ReplayError, match="Pong/1/action: "):
            read_all(folder)
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize("what", ["its only file", "the array", "zarr.json"])
@pytest.mark.parametrize("name", ["observation", "action", "reward"])
def test_lost_file_is_named_and_appending_does_not_hide_it(tmp_path, name, what):
    write(tmp_path, range(2))
    folder = tmp_path / "Pong/1" / name
    if what == "the array":
        shutil.rmtree(folder)
    elif what == "zarr.json":
        (folder / what).unlink()
    else:
        shards(tmp_path, name)[0].unlink()
    for _ in range(2):
        with pytest.raises(ReplayError, match=f"Pong/1/{name}: "):
            read_all(tmp_path)
        with suppress(ReplayError):
            write(tmp_path, [2])


def test_validate_notices_a_frame_that_was_overwritten(tmp_path):
    write(tmp_path, range(2))
    spec = {"driver": "zarr3", "kvstore": (tmp_path / "Pong/1/observation").as_uri()}
    array = ts.open(spec, open=True).result()
    array[0, 40, 40] = 0  # through the front door: every chunk's checksum is right
    assert open_replay(tmp_path).validate() == [
        f"{(tmp_path / 'Pong/1').as_uri()}/ episode 0 (transitions 0..{make_episode(0)['action'].size - 1}): "
        "contents differ from the recorded CRC-32."
    ]


@pytest.mark.parametrize("column", ["row", "frames"])
def test_a_negative_number_in_the_journal_is_named(tmp_path, column):
    write(tmp_path, range(2))
    journal = tmp_path / "Pong/1/episodes.jsonl"
    line, *others = journal.read_text().splitlines(keepends=True)
    row = {name: value for name, value in json.loads(line).items() if name in format.EPISODE}
    journal.write_bytes(format.journal_line(row | {column: -7}) + "".join(others).encode())
    with pytest.raises(ReplayError, match=f"line 1 is not an episode.*{column}"):
        open_replay(tmp_path)


@pytest.mark.parametrize("name", ["episode_return", "row", "frames", "length"])
def test_a_number_that_changed_in_the_journal_is_noticed_at_once(tmp_path, name):
    write(tmp_path, range(2))
    journal = tmp_path / "Pong/1/episodes.jsonl"
    for old, new in ((rf'"{name}": -?\d', f'"{name}": 7'), (r', "line_crc32": \d+', "")):
        sound = journal.read_text()
        journal.write_text(re.sub(old, new, sound, count=1))
        assert journal.read_text() != sound
        for open_it in (open_replay, open_writer):
            with pytest.raises(ReplayError, match=r"episodes\.jsonl: line 1 is not an episode .*checksum"):
                open_it(tmp_path)
        journal.write_text(sound)


def test_a_manifest_that_changed_is_noticed(tmp_path):
    write(tmp_path, range(2))
    manifest = tmp_path / "Pong/1/manifest.json"
    sound = manifest.read_text()
    changes = {'"run": 1': '"run": 2', '"sticky_actions": 0.25': '"sticky_actions": 0.75', '"crc32"': '"crc33"'}
    for old, new in changes.items():
        assert old in sound
        manifest.write_text(sound.replace(old, new))
        with pytest.raises(ReplayError, match=r"manifest\.json: the manifest (differs from its checksum|has crc33)"):
            open_replay(tmp_path)


def test_a_store_of_an_earlier_version_has_no_checksums_and_goes_on(tmp_path):
    write(tmp_path / "old", range(2))
    for name in ("manifest.json", "episodes.jsonl"):
        file = tmp_path / "old/Pong/1" / name
        file.write_text(re.sub(r',\s*"(line_)?crc32": \d+(?=\n?\})', "", file.read_text()))
    assert "line_crc32" not in file.read_text() and file.read_text().count('"crc32"') == 2
    check_holds_first(tmp_path / "old", 2)
    write(tmp_path / "old", [2])
    check_holds_first(tmp_path / "old", 3)
    assert open_replay(tmp_path / "old").identity() == identity_of(tmp_path / "undisturbed", 3)


def test_a_recording_without_an_episode_is_named(tmp_path):
    write(tmp_path, range(1))
    (tmp_path / "Pong/1/episodes.jsonl").write_bytes(bytes(300))
    with pytest.raises(ReplayError, match=r"no complete episode in Pong/1/episodes\.jsonl"):
        open_replay(tmp_path)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_changed_journal_byte_is_noticed(sound, data):
    folder, expected = sound
    journal = folder / "Pong/1/episodes.jsonl"
    content = journal.read_bytes()
    needed = content[: content.rindex(b"\n")]  # without its end the last line is a torn one
    position = data.draw(st.integers(0, len(needed) - 1))
    new = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[position]))
    try:
        journal.write_bytes(content[:position] + bytes([new]) + content[position + 1 :])
        with suppress(ReplayError):
            replay = open_replay(folder)
            if not replay.validate():
                columns = ["start", "length", "terminal"]
                start, length, terminal = (replay.episodes("Pong")[column].tolist() for column in columns)
                assert (start, length, terminal) == ([0, 7, 14], [7, 7, 7], [True, False, True])
    finally:
        journal.write_bytes(content)
    assert len(read_all(folder).action) == len(expected.action)
