"""An imported RL Unplugged run holds what its files hold, in the order of time; what is damaged is refused by name."""

import gzip
import io
import shutil
import struct
import zlib
from pathlib import Path

import cv2
import google_crc32c
import numpy as np
import pytest
from PIL import Image

from scaled_ql.games import FULL_ACTIONS, action_names
from scaled_ql.replay import ReplayError, open_replay
from scaled_ql.replay.formats import importing, rl_unplugged
from scaled_ql.replay.formats.rl_unplugged import import_rl_unplugged

SAMPLE = Path(__file__).parent / "data" / "rl_unplugged"  # written by TensorFlow
DISCOUNT = 0.9


# An independent writer and reader of the files


def varint(value):
    value &= (1 << 64) - 1
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes(encoded) + bytes([value])


def block(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(values):
    """A tf.train.Feature: bytes, floats (packed) or integers (packed, or one by one as older writers did)."""
    if isinstance(values[0], bytes):
        return block(1, b"".join(block(1, value) for value in values))
    if isinstance(values[0], float):
        return block(2, block(1, struct.pack(f"<{len(values)}f", *values)))
    if len(values) == 1:
        return block(3, b"\x08" + varint(values[0]))
    return block(3, block(1, b"".join(varint(value) for value in values)))


def example(features):
    entries = [block(1, block(1, name.encode()) + block(2, feature(values))) for name, values in features.items()]
    return block(1, b"".join(entries))


def masked(content):
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % (1 << 32))


def framed(content):
    length = struct.pack("<Q", len(content))
    return length + masked(length) + content + masked(content)


def read_varint(content, at):
    value = shift = 0
    while True:
        value |= (content[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if content[at - 1] < 128:
            return value, at


def parse(message):
    """The fields of a protobuf message, as (number, bytes or integer)."""
    at = 0
    while at < len(message):
        key, at = read_varint(message, at)
        value, at = read_varint(message, at)
        if key & 7 == 2:
            value, at = message[at : at + value], at + value
        yield key >> 3, value


def read_integers(values):
    """Integers that are packed or not."""
    for value in values:
        if isinstance(value, int):
            yield value
            continue
        at = 0
        while at < len(value):
            integer, at = read_varint(value, at)
            yield integer


def read_records(file):
    content, at = gzip.decompress(file.read_bytes()), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield content[at + 12 : at + 12 + length]
        at += 16 + length


def read_episode(record):
    """frames, actions, rewards, terminal, order, by hand."""
    ((_, features),) = parse(record)
    values = {}
    for _, entry in parse(features):
        name, value = (content for _, content in parse(entry))
        values[name.decode()] = [item for _, listed in parse(value) for _, item in parse(listed)]
    frames = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in values["observations"]])
    actions = list(read_integers(values["actions"]))
    rewards, discounts = (np.frombuffer(b"".join(values[name]), "<f4") for name in ("unclipped_rewards", "discounts"))
    order = [*read_integers(values["checkpoint_idx"]), *read_integers(values["episode_idx"])]
    length = len(actions) - (discounts[-1] == 0)
    return {
        "frames": frames, "action": np.array(actions[:length]), "reward": rewards[:length],
        "terminal": discounts[-1] == 0, "order": tuple(order),
    }  # fmt: skip


# Runs of our own making


def make_episode(checkpoint, number, steps, terminal=True, seed=0):
    """`steps` of them are in the record; the last is no transition where the episode is terminal."""
    rng = np.random.default_rng([seed, checkpoint, number])
    frames = rng.integers(0, 256, (steps, 84, 84), dtype=np.uint8)
    rewards = rng.choice([-3.0, 0.0, 0.5, 25.0], steps)
    discounts = [1.0] * (steps - 1) + [0.0 if terminal else 1.0]
    return {
        "observations": [cv2.imencode(".png", frame)[1].tobytes() for frame in frames],
        "actions": rng.integers(0, 6, steps).tolist(),
        "unclipped_rewards": rewards.tolist(),
        "clipped_rewards": np.clip(rewards, -1, 1).tolist(),
        "discounts": discounts,
        "episode_return": [float(rewards.sum())],
        "clipped_episode_return": [float(np.clip(rewards, -1, 1).sum())],
        "checkpoint_idx": [checkpoint],
        "episode_idx": [number],
    }


def naive(features):
    """What the store is to hold of such an episode."""
    terminal = features["discounts"][-1] == 0
    length = len(features["actions"]) - terminal
    return {
        "frames": np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in features["observations"]]),
        "action": np.array(features["actions"][:length]),
        "reward": np.array(features["unclipped_rewards"][:length]),
        "terminal": terminal,
        "order": (features["checkpoint_idx"][0], features["episode_idx"][0]),
    }


def write_file(file, episodes):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(b"".join(framed(example(episode)) for episode in episodes), 1))


def address(source, number, files, game="Pong", run=1):
    return Path(source) / game / f"run_{run}-{number:05}-of-{files:05}"


def write_run(source, files, game="Pong", run=1):
    for number, episodes in enumerate(files):
        write_file(address(source, number, len(files), game, run), episodes)
    return [naive(episode) for episodes in files for episode in episodes]


def three_files(seed=0):
    """Two or three episodes each, of 2 to 9 transitions, some truncated; not in the order of time."""
    kinds = [[(2, 7, True), (0, 4, False)], [(1, 6, True), (0, 3, True), (2, 5, False)], [(0, 10, True), (1, 2, True)]]
    return [
        [
            make_episode(checkpoint, 10 * number + place, *rest, seed)
            for place, (checkpoint, *rest) in enumerate(of_file)
        ]
        for number, of_file in enumerate(kinds)
    ]


# What the store is to hold


def in_time(episodes):
    return sorted(episodes, key=lambda episode: episode["order"])


def check_holds(path, episodes, game="Pong", batches=True):
    """Exactly these episodes, in the order of time."""
    episodes = in_time(episodes)
    replay = open_replay(path)
    table = replay.episodes(game)
    assert list(zip(table["checkpoint_idx"], table["episode_idx"])) == [episode["order"] for episode in episodes]
    check_episodes(replay, episodes, game, batches)
    return replay


def check_episodes(replay, episodes, game, batches=True):
    """Exactly these, in this order: {frames [L] or [L + 1], action [L], reward [L], terminal, continued (False)}."""
    assert replay.validate() == []
    table = replay.episodes(game)
    assert table["length"].tolist() == [len(episode["action"]) for episode in episodes]
    assert table["frames"].tolist() == [len(episode["frames"]) for episode in episodes]
    assert table["terminal"].tolist() == [episode["terminal"] for episode in episodes]
    assert table["truncated"].tolist() == [not episode["terminal"] for episode in episodes]
    assert table["continued"].tolist() == [episode.get("continued", False) for episode in episodes]
    np.testing.assert_allclose(table["episode_return"], [episode["reward"].sum() for episode in episodes])
    np.testing.assert_array_equal(replay.actions(game), np.concatenate([episode["action"] for episode in episodes]))
    np.testing.assert_array_equal(replay.rewards(game), np.concatenate([episode["reward"] for episode in episodes]))
    frames = replay.frames_at(game, np.arange(replay.num_transitions(game)))
    expected = np.concatenate([episode["frames"][: len(episode["action"])] for episode in episodes])
    assert np.array_equal(frames, expected)
    if batches:
        check_batches(replay, episodes, game)


def stack(frames, last, size=4):
    """[84, 84, size], the frames up to `last`, zeros before the episode."""
    return np.stack(
        [frames[i] if i >= 0 else np.zeros((84, 84), np.uint8) for i in range(last - size + 1, last + 1)], -1
    )


def check_batches(replay, episodes, game):
    """Every transition that may be used, and no other, step by step."""
    truth = [(episode, step) for episode in episodes for step in range(len(episode["action"]))]
    for n, clip in ((1, False), (3, True)):
        usable, expected = [], []
        for t, (episode, step) in enumerate(truth):
            over = episode["terminal"] and step + n >= len(episode["action"])
            if (not over and step + n >= len(episode["frames"])) or (episode.get("continued") and step < 3):
                continue
            reward = 0.0
            for k, earned in enumerate(episode["reward"][step : step + n]):
                reward += DISCOUNT**k * (max(-1, min(1, earned)) if clip else earned)
            usable.append(t)
            expected.append((
                stack(episode["frames"], step), episode["action"][step], reward, 0 if over else DISCOUNT**n,
                stack(episode["frames"], min(step + n, len(episode["frames"]) - 1)),
            ))  # fmt: skip
        if not usable:
            with pytest.raises(ReplayError, match="no transition"):
                replay.sampleable(game, n)
            continue
        start, count = replay.sampleable(game, n)
        assert [t for first, many in zip(start, count) for t in range(first, first + many)] == usable
        batch = replay.batch(game, usable, n, DISCOUNT, clip_rewards=clip)
        observation, action, reward, discount, following = map(np.array, zip(*expected))
        assert np.array_equal(batch.observation, observation) and np.array_equal(batch.next_observation, following)
        assert np.array_equal(batch.action, action)
        np.testing.assert_allclose(batch.reward, reward, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(batch.discount, discount, rtol=1e-6)


def contents(path):
    files = [file for file in Path(path).rglob("*") if file.is_file() and "lock" not in file.name]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def mtimes(path):
    return {file: file.stat().st_mtime_ns for file in Path(path).rglob("*") if "lock" not in file.name}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A whole run, to be copied before it is changed."""
    folder = tmp_path_factory.mktemp("source")
    write_run(folder, three_files())
    return folder


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """That run, imported."""
    store = tmp_path_factory.mktemp("whole")
    import_rl_unplugged(source, store)
    return store


@pytest.fixture
def copied(source, tmp_path):
    return Path(shutil.copytree(source, tmp_path / "source"))


EPISODES = [[naive(episode) for episode in episodes] for episodes in three_files()]
EVERY = [episode for episodes in EPISODES for episode in episodes]


# What is written comes out


def test_every_transition_in_the_order_of_time(whole):
    replay = check_holds(whole, EVERY)
    manifest = replay.manifests("Pong")[0]
    assert (manifest["source"], manifest["sticky_actions"], manifest["rewards"]) == ("RL Unplugged", 0.25, "raw")
    assert tuple(manifest["actions"]) == action_names("Pong")
    report = replay.import_reports("Pong")[0]
    assert (report["transitions"], report["episodes"], report["complete"]) == (32, 7, True)


def test_the_terminal_observation_is_the_last_next_observation(whole):
    replay = open_replay(whole)
    table = replay.episodes("Pong")
    for row, episode in zip(table.itertuples(), in_time(EVERY)):
        if row.terminal:
            last = row.start + row.length - 1
            batch = replay.batch("Pong", np.arange(max(row.start, last - 1), last + 1), n_step=5)
            assert (batch.discount == 0).all()
            for shown in batch.next_observation:
                np.testing.assert_array_equal(shown[:, :, -1], episode["frames"][-1])
                assert not (shown[:, :, -1] == shown[:, :, -2]).all()


def test_episodes_in_other_files_give_the_same_data(whole, tmp_path):
    """Where an episode lies does not matter, nor how many files there are."""
    mixed = [episode for episodes in three_files() for episode in episodes]
    np.random.default_rng(5).shuffle(mixed)
    write_run(tmp_path / "source", [mixed[:1], mixed[1:2], mixed[2:6], mixed[6:]])
    import_rl_unplugged(tmp_path / "source", tmp_path / "store")
    assert check_holds(tmp_path / "store", EVERY).identity() == open_replay(whole).identity()


def test_rows_are_read_and_written_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(rl_unplugged, "READ_ROWS", 7)
    monkeypatch.setattr(importing, "BLOCK", 32)
    files = [[make_episode(0, n, steps) for n, steps in enumerate((50, 7, 1, 33, 2))], [make_episode(1, 0, 70, False)]]
    expected = [episode for episode in write_run(tmp_path / "source", files) if len(episode["action"])]
    report = import_rl_unplugged(tmp_path / "source", tmp_path / "store")
    check_holds(tmp_path / "store", expected)
    assert [(entry["row"], "no transition" in entry["reason"]) for entry in report.excluded] == [(2, True)]


def test_games_and_runs_that_were_asked_for(tmp_path):
    truth = {}
    for number, (game, run) in enumerate([("Pong", 1), ("Pong", 2), ("Pong", 10), ("Breakout", 1)]):
        episode = make_episode(0, 0, 5, seed=number)
        episode["actions"] = [action % 4 for action in episode["actions"]]
        truth[game, run] = write_run(tmp_path / "source", [[episode]], game, run)
    (tmp_path / "source/Pong/README").write_text("not a file of a run")
    import_rl_unplugged(tmp_path / "source", tmp_path / "some", games=["Pong"], runs=[2])
    check_holds(tmp_path / "some", truth["Pong", 2])
    calls = []
    report = import_rl_unplugged(
        (tmp_path / "source").as_uri(), tmp_path / "all", progress=lambda done, known: calls.append((done, known))
    )
    assert report.transitions == 16 and calls[-1] == (4, 4)
    replay = open_replay(tmp_path / "all")
    assert replay.games == ["Breakout", "Pong"] and replay.episodes("Pong")["run"].tolist() == [1, 2, 10]
    for request, named in (({"games": ["Freeway"]}, "Freeway"), ({"games": ["Pong"], "runs": [3]}, "run 3")):
        with pytest.raises(ReplayError, match=named):
            import_rl_unplugged(tmp_path / "source", tmp_path / "none", **request)


def test_workers_make_the_same_bytes(source, whole, tmp_path):
    import_rl_unplugged(source, tmp_path, workers=2)
    assert contents(tmp_path) == contents(whole)


def test_files_of_tensorflows_own(tmp_path):
    import_rl_unplugged(SAMPLE, tmp_path)
    for game in (folder.name for folder in SAMPLE.iterdir()):
        records = [record for file in (SAMPLE / game).iterdir() for record in read_records(file)]
        check_holds(tmp_path, [read_episode(record) for record in records], game)


# Again, and more


def test_importing_again_changes_nothing(copied, tmp_path):
    import_rl_unplugged(copied, tmp_path / "store")
    before = mtimes(tmp_path / "store")
    assert import_rl_unplugged(copied, tmp_path / "store").transitions == 32
    assert mtimes(tmp_path / "store") == before


def test_missing_file_is_a_gap_until_it_comes(copied, whole, tmp_path):
    file = address(copied, 1, 3)
    file.rename(tmp_path / "elsewhere")
    report = import_rl_unplugged(copied, tmp_path / "store")
    assert report.gaps == [{"game": "Pong", "run": 1, "file": str(file)}]
    check_holds(tmp_path / "store", EPISODES[0] + EPISODES[2])
    (tmp_path / "elsewhere").rename(file)
    assert import_rl_unplugged(copied, tmp_path / "store").gaps == []
    assert check_holds(tmp_path / "store", EVERY).identity() == open_replay(whole).identity()


def test_repaired_file_is_read_again(copied, whole, tmp_path):
    file = address(copied, 1, 3)
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2])
    import_rl_unplugged(copied, tmp_path / "store", skip_bad=True)
    file.write_bytes(good)
    assert import_rl_unplugged(copied, tmp_path / "store").left_out == []
    assert check_holds(tmp_path / "store", EVERY).identity() == open_replay(whole).identity()


# Where a source lies, and what its actions index


@pytest.mark.parametrize("kind", ["source", "game", "files"])
def test_symbolic_links_are_followed(source, whole, tmp_path, kind):
    if kind == "source":
        (tmp_path / "source").symlink_to(source)
    elif kind == "game":
        (tmp_path / "source").mkdir()
        (tmp_path / "source/Pong").symlink_to(source / "Pong")
    else:
        (tmp_path / "source/Pong").mkdir(parents=True)
        for file in (source / "Pong").iterdir():
            (tmp_path / "source/Pong" / file.name).symlink_to(file)
    for name, address in (("by path", tmp_path / "source"), ("by URL", (tmp_path / "source").as_uri())):
        import_rl_unplugged(address, tmp_path / name)
        assert check_holds(tmp_path / name, EVERY).identity() == open_replay(whole).identity()


def test_a_source_that_moved_or_is_named_otherwise(copied, tmp_path, monkeypatch):
    import_rl_unplugged(copied, tmp_path / "store")
    before = mtimes(tmp_path / "store")
    (tmp_path / "sub").mkdir()
    copied.rename(tmp_path / "sub/moved")
    monkeypatch.chdir(tmp_path / "sub")
    for address in (tmp_path / "sub/moved", (tmp_path / "sub/moved").as_uri(), "moved", "../sub/moved"):
        assert import_rl_unplugged(address, "../store").transitions == 32
        assert mtimes(tmp_path / "store") == before  # nothing was done twice


def test_other_files_of_the_same_game_are_refused(copied, tmp_path):
    import_rl_unplugged(copied, tmp_path / "store")
    before = contents(tmp_path / "store")
    write_run(tmp_path / "other", three_files(seed=1)[:2])
    with pytest.raises(ReplayError, match=r"Pong/1: holds other data \(RL Unplugged, from file://.*source\)"):
        import_rl_unplugged(tmp_path / "other", tmp_path / "store")
    assert contents(tmp_path / "store") == before


def test_records_of_the_full_set_are_refused_and_can_be_mapped(tmp_path):
    names = ["NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE"]  # of Pong
    episode = make_episode(0, 0, 24, terminal=False)
    own = episode | {"actions": [0, 1, 2, 3, 4, 5] * 4}
    episode["actions"] = [FULL_ACTIONS.index(names[action]) for action in own["actions"]]
    write_run(tmp_path / "source", [[episode]])
    with pytest.raises(ReplayError, match=r"of-00001: 8 of 24 rows are invalid.*0 to 12.*full set.*--actions full"):
        import_rl_unplugged(tmp_path / "source", tmp_path / "store")
    import_rl_unplugged(tmp_path / "source", tmp_path / "mapped", actions="full")
    assert check_holds(tmp_path / "mapped", [naive(own)]).manifests("Pong")[0]["action_set"] == "full"
    write_run(tmp_path / "own", [[own]])
    with pytest.raises(ReplayError, match=r"8 of 24 rows are invalid.*read as the full set.*Pong lacks DOWN, UP"):
        import_rl_unplugged(tmp_path / "own", tmp_path / "store", actions="full")


@pytest.mark.parametrize("bad", [5, 6])
def test_more_invalid_steps_than_damage_explains_end_the_import(tmp_path, bad):
    episode = make_episode(0, 0, 60, terminal=False)
    for step in range(bad):
        episode["unclipped_rewards"][5 + 5 * step] = float("nan")
    write_run(tmp_path / "source", [[episode]])
    if bad == 5:
        assert len(import_rl_unplugged(tmp_path / "source", tmp_path / "store").excluded) == 5
        return
    with pytest.raises(ReplayError, match=r"6 of 60 rows are invalid, more than 1%.*damaged or of another game"):
        import_rl_unplugged(tmp_path / "source", tmp_path / "store")
    report = import_rl_unplugged(tmp_path / "source", tmp_path / "store", skip_bad=True)
    assert (len(report.left_out), report.transitions) == (1, 0)


# Bad steps


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"unclipped_rewards": float("nan")}, "its reward is nan"),
        ({"unclipped_rewards": float("-inf")}, "its reward is -inf"),
        ({"actions": 6}, "its action is 6, the game has 0, 1, 2, 3, 4, 5"),
        ({"actions": -1}, "its action is -1"),
        ({"actions": 1 << 40, "unclipped_rewards": float("nan")}, "its reward is nan"),
    ],
)
def test_bad_step_cuts_its_episode(tmp_path, change, reason):
    files = [[make_episode(0, 0, 4), make_episode(0, 1, 12)], [make_episode(0, 2, 9, terminal=False)]]
    first, long, last = (naive(episode) for episodes in files for episode in episodes)
    for name, value in change.items():
        for step in (0, 5, 10, 11):  # the last is no transition: what stands there does not matter
            files[0][1][name][step] = value
        files[1][0][name][8] = value
    write_run(tmp_path / "source", files)
    report = import_rl_unplugged(tmp_path / "source", tmp_path / "store")

    def piece(episode, begin, stop, **more):
        cut = {name: episode[name][begin:stop] for name in ("frames", "action", "reward")}
        return {**episode, **cut, "terminal": False, "continued": begin > 0, **more}

    check_holds(tmp_path / "store", [first, piece(long, 1, 5), piece(long, 6, 10), piece(last, 0, 8)])
    places = [(Path(entry["file"]).name[10], entry["row"], entry["reason"].split(":")[0]) for entry in report.excluded]
    assert places == [("0", 1, "step 0"), ("0", 1, "step 5"), ("0", 1, "step 10"), ("1", 0, "step 8")]
    assert all(reason in entry["reason"] for entry in report.excluded)


def test_bad_step_before_the_end_leaves_the_terminal_observation(tmp_path):
    episode = make_episode(0, 0, 12)
    truth = naive(episode)
    episode["unclipped_rewards"][4] = float("nan")
    write_run(tmp_path / "source", [[episode]])
    import_rl_unplugged(tmp_path / "source", tmp_path / "store")
    before = {**truth, "terminal": False, **{name: truth[name][:4] for name in ("frames", "action", "reward")}}
    after = {**truth, "continued": True, **{name: truth[name][5:] for name in ("frames", "action", "reward")}}
    check_holds(tmp_path / "store", [before, after])


# Bad files


def change_bytes(change):
    """Of the file as it lies there."""
    return lambda file: file.write_bytes(change(file.read_bytes()))


def change_record(change):
    """Of the second record's content, in a right frame."""

    def damage(file):
        records = list(read_records(file))
        records[1] = change(records[1])
        file.write_bytes(gzip.compress(b"".join(map(framed, records)), 1))

    return damage


def change_frame(change):
    """Of the second record with its checksums."""

    def damage(file):
        records = [bytearray(framed(record)) for record in read_records(file)]
        records[1] = change(records[1])
        file.write_bytes(gzip.compress(b"".join(records), 1))

    return damage


def change_features(**changes):
    """Of the second record: lists replaced by what a function makes of them, or left out (None)."""

    def damage(file):
        episode = three_files()[1][1]
        for name, change in changes.items():
            if change is None:
                del episode[name]
            else:
                episode[name] = change(episode[name])
        change_record(lambda record: example(episode))(file)

    return damage


def change_png(change):
    """Of the second observation of the second record."""
    return change_features(observations=lambda pngs: [pngs[0], change(pngs[1]), *pngs[2:]])


def change_content(change):
    """Of all that is in the gzip; `change` is also told where the records end."""

    def damage(file):
        ends = np.cumsum([16 + len(record) for record in read_records(file)])
        file.write_bytes(gzip.compress(change(gzip.decompress(file.read_bytes()), ends), 1))

    return damage


def flipped(place):
    def flip(content):
        content = bytearray(content)
        content[place] ^= 4
        return bytes(content)

    return flip


def huge_length(record):
    length = struct.pack("<Q", 1 << 40)
    return length + masked(length) + record[12:]


def picture(extension, *shape, dtype=np.uint8):
    return lambda png: cv2.imencode(extension, np.zeros(shape, dtype))[1].tobytes()


def huge_png(png):
    """Says that it has four billion pixels."""
    header = png[12:16] + struct.pack(">II", 1 << 16, 1 << 16) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


OTHER_EDITION = {"o_t": [b"png"] * 4, "a_t": [1], "r_t": [0.5], "d_t": [1.0]}
DAMAGES = {
    "length's checksum": (1, change_frame(flipped(9))),
    "length": (1, change_frame(flipped(1))),
    "data": (1, change_frame(flipped(5_000))),
    "data's checksum": (1, change_frame(flipped(-1))),
    "too long": (1, change_frame(huge_length)),
    "ends within a length": (2, change_content(lambda content, ends: content[: ends[1] + 5])),
    "ends within data": (1, change_content(lambda content, ends: content[: ends[1] - 9_000])),
    "ends within a checksum": (1, change_content(lambda content, ends: content[: ends[1] - 1])),
    "goes on after the last record": (3, change_content(lambda content, ends: content + b"junk")),
    "gzip cut in the middle": (1, change_bytes(lambda content: content[: len(content) // 2])),
    "gzip without its end": (2, change_bytes(lambda content: content[:-4])),
    "gzip's checksum": (2, change_bytes(flipped(-6))),
    "plain": (0, change_bytes(gzip.decompress)),
    "empty": (0, change_bytes(lambda content: b"")),
    "no record": (0, change_bytes(lambda content: gzip.compress(b""))),
    "no TFRecord": (0, change_bytes(lambda content: gzip.compress(b"<html>403 Forbidden</html>"))),
    "no Example": (1, change_record(lambda record: b"\xff" * 20)),
    "empty record": (1, change_record(lambda record: b"")),
    "transitions": (1, change_record(lambda record: example({"o_t": [b"png"] * 4, "a_t": [1], "r_t": [0.5]}))),
    **{f"no {name}": (1, change_features(**{name: None})) for name in (*rl_unplugged.SEQUENCES, *rl_unplugged.NUMBERS)},
    "actions are floats": (1, change_features(actions=lambda actions: list(map(float, actions)))),
    "rewards are integers": (1, change_features(unclipped_rewards=lambda rewards: list(map(int, rewards)))),
    "one observation short": (1, change_features(observations=lambda pngs: pngs[:-1])),
    "one observation more": (1, change_features(observations=lambda pngs: [*pngs, pngs[0]])),
    "one action short": (1, change_features(actions=lambda actions: actions[1:])),
    "one reward more": (1, change_features(unclipped_rewards=lambda rewards: [*rewards, 0.0])),
    "discount 0 in the middle": (1, change_features(discounts=lambda discounts: [0.0, *discounts[1:]])),
    "discount NaN": (1, change_features(discounts=lambda discounts: [*discounts[:-1], float("nan")])),
    "two checkpoints": (1, change_features(checkpoint_idx=lambda numbers: [0, 1])),
    "no PNG": (1, change_png(lambda png: b"not a picture")),
    "empty PNG": (1, change_png(lambda png: b"")),
    "PNG's header only": (1, change_png(lambda png: png[:33])),
    "PNG cut": (1, change_png(lambda png: png[: len(png) // 2])),
    "PNG damaged": (1, change_png(flipped(3_000))),
    "PNG of 84 x 83": (1, change_png(picture(".png", 84, 83))),
    "PNG in colour": (1, change_png(picture(".png", 84, 84, 3))),
    "PNG of 16 bit": (1, change_png(picture(".png", 84, 84, dtype=np.uint16))),
    "JPEG": (1, change_png(picture(".jpg", 84, 84))),
    "huge PNG": (1, change_png(huge_png)),
}


@pytest.mark.parametrize("number, damage", DAMAGES.values(), ids=DAMAGES)
def test_bad_file(copied, tmp_path, number, damage):
    """File and record are named, and nothing from there on is kept of it."""
    damage(address(copied, 1, 3))
    report = import_rl_unplugged(copied, tmp_path / "store", skip_bad=True)
    (left_out,) = report.left_out
    assert left_out["file"] == str(address(copied, 1, 3)) and left_out["row"] == number
    assert f"run_1-00001-of-00003: cannot be read from record {number} on" in left_out["reason"]
    check_holds(tmp_path / "store", EPISODES[0] + EPISODES[1][:number] + EPISODES[2], batches=False)


def test_bad_file_ends_the_import(copied, tmp_path):
    """What lay before it is there; what is said is what was expected, what is there, and what to do."""
    said, file = {}, address(copied, 1, 3)
    good = file.read_bytes()
    for name in ("no actions", "one action short", "PNG of 84 x 83", "transitions", "too long"):
        file.write_bytes(good)
        DAMAGES[name][1](file)
        with pytest.raises(ReplayError, match=r"run_1-00001-of-00003: .*record 1 ") as refused:
            import_rl_unplugged(copied, tmp_path / "store")
        said[name] = str(refused.value)
    check_holds(tmp_path / "store", EPISODES[0])
    assert "lacks actions (int64_list)" in said["no actions"]
    assert "'observations': 3, 'actions': 2" in said["one action short"]
    assert "step 1" in said["PNG of 84 x 83"] and "84 x 84" in said["PNG of 84 x 83"]
    assert "atari_episodes_ordered" in said["transitions"] and "o_t" in said["transitions"]
    assert str(1 << 40) in said["too long"] and "at most" in said["too long"]
    assert all("restore it from its source" in message for message in said.values())
    file.write_bytes(good)
    import_rl_unplugged(copied, tmp_path / "store")
    check_holds(tmp_path / "store", EVERY)


def test_file_with_more_steps_than_it_has_rows(copied, tmp_path, monkeypatch):
    monkeypatch.setattr(rl_unplugged, "ROWS_PER_FILE", 12)
    with pytest.raises(ReplayError, match=r"run_1-00001-of-00003: .*record 2 .*12 steps"):
        import_rl_unplugged(copied, tmp_path / "store")


# Bad folders


def test_files_of_two_datasets(copied, tmp_path):
    shutil.copy(address(copied, 0, 3), address(copied, 0, 2))
    with pytest.raises(ReplayError, match=r"run_1-0000.-of-0000[23].*run_1-0000.-of-0000[23].*two datasets are mixed"):
        import_rl_unplugged(copied, tmp_path / "store")


def test_number_beyond_the_files(copied, tmp_path):
    address(copied, 2, 3).rename(address(copied, 3, 3))
    with pytest.raises(ReplayError, match="run_1-00003-of-00003"):
        import_rl_unplugged(copied, tmp_path / "store")


def test_source_without_a_run(copied, tmp_path):
    for wrong, named in (
        (tmp_path / "absent", "absent"),
        (copied / "Pong", rf"is the folder of one game.*: {copied}\."),
    ):
        with pytest.raises(ReplayError, match=named):
            import_rl_unplugged(wrong, tmp_path / "store")
    (tmp_path / "above").mkdir()
    (tmp_path / "above/source").symlink_to(copied)
    for wrong, named in (
        (tmp_path / "above", rf"holds no game's folder, but .* does .*: {tmp_path}/above/source\."),
        (address(copied, 0, 3), rf"run_1-00000-of-00003: is a file\. .*one folder per game: {copied}\."),
    ):
        with pytest.raises(ReplayError, match=named):
            import_rl_unplugged(wrong, tmp_path / "store")
    (copied / "Breakout").mkdir()
    with pytest.raises(ReplayError, match=r"Breakout: no file.*run_<run>-<number>-of-<files>"):
        import_rl_unplugged(copied, tmp_path / "store")
    (copied / "Breakout").rename(copied / "Brakeout")
    with pytest.raises(ReplayError, match="Brakeout"):
        import_rl_unplugged(copied, tmp_path / "store")
    assert not (tmp_path / "store").exists() or not list((tmp_path / "store").glob("*/*/manifest.json"))


def test_destination_in_the_way(source, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ReplayError, match="file"):
        import_rl_unplugged(source, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
