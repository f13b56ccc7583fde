"""Views, shares of a batch, uniformity, and stores in memory and on the device: always the very same transitions."""

import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from scaled_ql import collect
from scaled_ql.games import action_names
from scaled_ql.replay import (
    Replay,
    ReplayError,
    ReplayWriter,
    View,
    chunks,
    load_view,
    open_replay,
    prefetch,
    sample_batch,
    sample_indices,
)
from scaled_ql.replay.device import place
from scaled_ql.replay.memory import MemoryRecording, to_memory
from scaled_ql.replay.recording import Recording
from scaled_ql.replay.shared import pack

LENGTHS = (1, 2, 40, 3, 300, 5, 17)  # of a game's episodes; every second one is truncated


def write(path: Path, lengths=LENGTHS, games=("Breakout", "Pong"), runs=(1, 2), final=False) -> None:
    for game in games:
        for run in runs:
            rng = np.random.default_rng([run, *game.encode()])
            with ReplayWriter(path, game, run, actions=action_names(game), source="test", sticky_actions=0.0) as writer:
                for number, length in enumerate(lengths):
                    frames = rng.integers(1, 256, (length + 1, 84, 84), dtype=np.uint8)
                    frames[:, 0, 0], frames[:, 0, 1] = number, run
                    frames[:, 0, 2] = np.arange(length + 1) % 251
                    writer.append(
                        frames[:length], rng.integers(2, size=length), rng.normal(size=length),
                        terminal=number % 2 == 0, final_observation=frames[length] if final else None,
                    )  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("views") / "replay"
    write(path)
    return path


def equal(left, right) -> bool:
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(left, right, strict=True))


# Views


@pytest.mark.parametrize(
    ("view", "episodes"),
    [
        ({}, 14),
        ({"runs": [2]}, 7),
        ({"first": 0.1}, 6),  # of 368 transitions, episodes that begin before the 37th: starts 0, 1, 3
        ({"between": [3, 44]}, 4),  # those that begin at 3 and 43
        ({"runs": [1], "first": 0.5}, 5),
    ],
)
def test_a_view_shows_whole_trajectories(store: Path, view: dict, episodes: int) -> None:
    whole, part = open_replay(store), open_replay(store, View(**view))
    table = part.episodes("Pong")
    assert len(table) == episodes
    assert table["start"].tolist() == [0, *np.cumsum(table["length"])[:-1]]
    everything = whole.episodes("Pong")
    for number, row in table.iterrows():
        (same,) = everything.index[(everything["crc32"] == row["crc32"]) & (everything["run"] == row["run"])]
        for name, column in part.episode("Pong", number).items():
            np.testing.assert_array_equal(column, whole.episode("Pong", same)[name])


def test_batches_of_a_view_are_those_of_the_dataset(store: Path) -> None:
    part, whole = open_replay(store, View(runs=[2], between=[3, 346])), open_replay(store)
    offset = whole.episodes("Pong").query("run == 2")["start"].iloc[0] + 3
    t = np.arange(0, 39)
    assert equal(part.batch("Pong", t, 1), whole.batch("Pong", t + offset, 1))


def test_a_uniform_view_draws_that_many_and_samples_only_those(store: Path) -> None:
    view = View(uniform=0.25, seed=3)
    part = open_replay(store, view)
    start, count = part.sampleable("Pong", 3)
    may = {t for a, n in zip(*open_replay(store).sampleable("Pong", 3)) for t in range(a, a + n)}
    assert set(start) <= may and (count == 1).all() and len(set(start)) == len(start)
    assert 0.6 * 184 < len(start) <= 184  # a quarter of 736, less those without a state three steps later
    drawn = {index for step in range(60) for index in sample_pong(part, step)}
    assert drawn == set(start)
    assert set(open_replay(store, view).sampleable("Pong", 3)[0]) == set(start)
    assert set(open_replay(store, View(uniform=0.25, seed=4)).sampleable("Pong", 3)[0]) != set(start)
    alone = open_replay(store, View(games=["Pong"], uniform=0.25, seed=3))  # other games change nothing
    assert set(alone.sampleable("Pong", 3)[0]) == set(start)


def sample_pong(replay, step: int) -> list[int]:
    game, index = sample_indices(replay, 0, step, games_per_batch=64)
    return index[game == replay.games.index("Pong")].tolist()


def test_identities_of_views(store: Path) -> None:
    views = [None, View(), View(games=["Pong"]), View(first=0.2), View(uniform=0.5), View(uniform=0.5, seed=1)]
    identities = [open_replay(store, view).identity() for view in views]
    assert identities[0] == identities[1]
    assert len(set(identities)) == len(views) - 1
    assert open_replay(store, View(first=0.2)).identity() == identities[3]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("first: 1.5", "first: .*1.5"),
        ("frist: 0.2", "frist.*It may set games"),
        ("games: Pong", "games"),
        ("between: [5, 5]", "a < b"),
        ("uniform: 0", "uniform"),
        ("- 1", "view"),
        ("a: [", "YAML"),
    ],
)
def test_a_bad_view_is_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ReplayError, match=rf"mine\.yaml.*{words}"):
        load_view(file)


@pytest.mark.parametrize("view", [{"games": ["Qbert"]}, {"runs": [7]}, {"between": [1_000, 2_000]}])
def test_a_view_of_what_is_not_there(store: Path, view: dict) -> None:
    with pytest.raises(ReplayError, match="view"):
        open_replay(store, View(**view))


# Sampling


def test_every_valid_transition_is_equally_likely(store: Path) -> None:
    """Very unequal episode lengths; chi-squared over all sampleable transitions of both runs."""
    replay = open_replay(store)
    counts: dict[int, int] = dict.fromkeys(
        (t for a, n in zip(*replay.sampleable("Pong", 3)) for t in range(a, a + n)), 0
    )
    for step in range(400):
        for index in sample_pong(replay, step):
            counts[index] += 1  # a KeyError is an invalid transition
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    n_step=st.integers(1, 5),
    final=st.booleans(),
    seed=st.integers(0, 9),
)
def test_all_valid_transitions_are_reached_and_no_other(lengths: list, n_step: int, final: bool, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), lengths, ["Pong"], [1], final)
        replay = open_replay(folder)
        valid, start = set(), 0
        for number, length in enumerate(lengths):
            for step in range(length):  # terminal, or the state n steps later is stored
                if number % 2 == 0 or step + n_step < length + final:
                    valid.add(start + step)
            start += length
        if not valid:
            return
        uniform = (np.arange(4 * len(valid)) + 0.5) / (4 * len(valid))
        assert sorted(replay.draw("Pong", uniform, n_step)) == sorted(4 * list(valid))
        replay.batch("Pong", sorted(valid), n_step)
        for t in set(range(start)) - valid:
            with pytest.raises(ReplayError, match="truncated"):
                replay.batch("Pong", t, n_step)


def test_the_state_after_the_last_action_is_used(tmp_path: Path) -> None:
    write(tmp_path, (5, 4), ["Pong"], [1], final=True)
    batch = open_replay(tmp_path).batch("Pong", [4, 3, 8, 6], 1, 0.5)
    last = batch.next_observation[:, 0, 2, -1].tolist()  # each frame says its number
    assert last == [5, 4, 4, 2]
    assert batch.discount.tolist() == [0, 0.5, 0.5, 0.5]  # the second episode was truncated: it goes on
    assert batch.next_observation[0, 0, 2].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("shards", [2, 4])
def test_shares_of_a_batch_are_the_batch(store: Path, shards: int) -> None:
    replay, shape = open_replay(store), {"games_per_batch": 8, "transitions_per_game": 4}
    whole = sample_batch(replay, 5, 7, **shape)
    shares = [sample_batch(replay, 5, 7, **shape, shard=(number, shards)) for number in range(shards)]
    assert equal([np.concatenate(fields) for fields in zip(*shares)], whole)
    with pytest.raises(ValueError, match="share"):
        sample_batch(replay, 5, 7, **shape, shard=(shards, shards))
    with pytest.raises(ValueError, match="share"):
        sample_batch(replay, 5, 7, **shape, shard=(0, 5))


def test_threads_share_open_files(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far more files than may stay open, eight threads: a descriptor is never closed under somebody's hands."""
    monkeypatch.setattr(chunks, "_open", lru_cache(maxsize=2)(chunks._OpenFile))
    replay = open_replay(store)
    expected = [sample_batch(replay, 0, step, games_per_batch=4) for step in range(60)]
    batches = prefetch(lambda step: sample_batch(replay, 0, step, games_per_batch=4), 0, 60, depth=16, threads=8)
    assert all(equal(batch, wanted) for batch, wanted in zip(batches, expected, strict=True))


# Other places


@pytest.mark.parametrize("view", [View(), View(runs=[2], first=0.4), View(games=["Pong"], uniform=0.3)])
@pytest.mark.parametrize("where", ["memory", "device"])
def test_a_dataset_elsewhere_gives_the_same_batches(store: Path, view: View, where: str) -> None:
    disk = open_replay(store, view)
    other = place(disk, where)
    for step in range(3):
        for n_step in (1, 3):
            assert equal(sample_batch(disk, 1, step, n_step=n_step), sample_batch(other, 1, step, n_step=n_step))
    assert other.identity() == disk.identity()


def test_a_dataset_behind_a_url_gives_the_same_batches(store: Path) -> None:
    disk = open_replay(store)
    through_tensorstore = {  # as in a bucket
        game: [Recording(one.kvstore, one.manifest, one.table) for one in disk.recordings(game)] for game in disk.games
    }
    remote = Replay(disk.path, through_tensorstore)
    for step in range(3):
        assert equal(sample_batch(disk, 1, step), sample_batch(remote, 1, step))


def test_memory_reads_no_file_again(tmp_path: Path) -> None:
    write(tmp_path)
    disk, memory = open_replay(tmp_path), to_memory(open_replay(tmp_path))
    expected = sample_batch(disk, 0, 0)
    for file in tmp_path.rglob("c.*"):
        file.unlink()
    assert equal(sample_batch(memory, 0, 0), expected)


def test_damage_is_noticed_in_memory(tmp_path: Path) -> None:
    write(tmp_path, runs=[1])
    (file,) = tmp_path.glob("Pong/1/observation/c.0.0.0")
    content = bytearray(file.read_bytes())
    content[-500_000] ^= 1
    file.write_bytes(content)
    memory = to_memory(open_replay(tmp_path))
    with pytest.raises(ReplayError, match="Pong/1/observation: a chunk is damaged"):
        for step in range(20):
            sample_batch(memory, 0, step)


def test_auto_takes_memory_where_there_is_room(store: Path) -> None:
    chosen = place(open_replay(store), "auto")
    assert isinstance(chosen.recordings("Pong")[0], MemoryRecording) and chosen.is_shareable
    on_device = place(open_replay(store), "device")
    assert not on_device.is_shareable
    with pytest.raises(TypeError, match="cannot be handed to another process"):
        pack(on_device)
    with pytest.raises(ValueError, match="disk, memory, device or auto"):
        place(open_replay(store), "ram")


def test_a_long_journal_becomes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scaled_ql.replay import writer

    monkeypatch.setattr(writer, "JOURNAL_LINES", 3)
    write(tmp_path / "long", runs=[1], games=["Pong"])
    folder = tmp_path / "long/Pong/1"
    assert (folder / "episodes.arrow").exists() and (folder / "episodes.jsonl").read_bytes() == b""
    monkeypatch.undo()
    write(tmp_path / "short", runs=[1], games=["Pong"])
    long, short = open_replay(tmp_path / "long"), open_replay(tmp_path / "short")
    assert long.identity() == short.identity() and long.validate() == []
    assert long.episodes("Pong").equals(short.episodes("Pong"))
    assert collect._committed(tmp_path / "long/Pong") == collect._committed(tmp_path / "short/Pong") == sum(LENGTHS)
    # Killed between writing the table and emptying the journal: the lines say what the table has.
    (folder / "episodes.jsonl").write_bytes((tmp_path / "short/Pong/1/episodes.jsonl").read_bytes())
    assert open_replay(tmp_path / "long").identity() == short.identity()
    content = bytearray((folder / "episodes.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "episodes.arrow").write_bytes(content)
    with pytest.raises(ReplayError, match=r"episodes\.arrow: its checksum is wrong"):
        open_replay(tmp_path / "long")
