"""An imported Minari dataset holds what was played: frames as our environments make them, the minimal actions."""

import json
import os
import shutil
import sys
from pathlib import Path

import ale_py
import cv2
import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete, MultiBinary
from gymnasium.wrappers import AtariPreprocessing, ClipReward, FrameStackObservation
from test_rl_unplugged import check_episodes, contents, mtimes

from scaled_ql.environments import differing_rules, rules
from scaled_ql.games import action_names
from scaled_ql.replay import ReplayError, open_replay
from scaled_ql.replay.formats.minari import import_minari

minari = pytest.importorskip("minari")
h5py = pytest.importorskip("h5py")
from minari.data_collector import EpisodeBuffer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
gymnasium.register_envs(ale_py)
ID = "atari/breakout/test-v0"
GREY = Box(0, 255, (84, 84), np.uint8)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


# Played in ALE


def make(environment, **options):
    return gymnasium.make(environment, **options)


def preprocessed(environment, full_action_space=False, **options):
    emulator = make(environment, frameskip=1, full_action_space=full_action_space)
    return AtariPreprocessing(emulator, noop_max=0, **options)


def play(environment, episodes=2, steps=60, choice=None, **options):
    """A dataset of random play, and what was played: ALE's own grey screen, resized, where it is not preprocessed.

    A `choice` of actions is drawn from instead of all.
    """
    collector = minari.DataCollector(environment, **options)
    rng, played = np.random.default_rng(3), []

    def look(observation):
        if observation.ndim == 3 and observation.shape[-1] == 3:
            screen = environment.unwrapped.ale.getScreenGrayscale()
            return cv2.resize(screen, (84, 84), interpolation=cv2.INTER_AREA)
        newest = observation[-1] if observation.shape[0] == 4 else observation
        return np.array(newest).reshape(84, 84)

    for number in range(episodes):
        # A seed makes ALE load the ROM again, which takes half a second.
        observation, _ = collector.reset(seed=None if number else 3, options={"minari_autoseed": False})
        frames, actions, rewards, terminal = [look(observation)], [], [], False
        while not terminal and len(actions) < steps:
            chosen = int(rng.choice(choice or environment.action_space.n))
            observation, reward, terminal, _, _ = collector.step(chosen)
            frames.append(look(observation))
            actions.append(chosen)
            rewards.append(reward)
        played.append({
            "frames": np.stack(frames), "action": np.array(actions), "reward": np.array(rewards), "terminal": terminal
        })  # fmt: skip
    return collector.create_dataset(ID), played


def check_holds(store, episodes, game="Breakout"):
    replay = open_replay(store)
    check_episodes(replay, episodes, game)
    return replay


RAW = {"jpeg_encoding": False}
KINDS = {
    "grey": lambda: play(preprocessed("BreakoutNoFrameskip-v4", terminal_on_life_loss=True), 3, 80, **RAW),
    "grey, channel": lambda: play(preprocessed("ALE/Breakout-v5", grayscale_newaxis=True), **RAW),
    "grey, Arrow": lambda: play(preprocessed("ALE/Breakout-v5"), data_format="arrow", **RAW),
    "stack": lambda: play(FrameStackObservation(preprocessed("ALE/Breakout-v5"), 4)),
    "colour, higher": lambda: play(make("ALE/Pooyan-v5"), 1, 40, **RAW),
    "colour, 18 actions": lambda: play(make("ALE/Alien-v5", full_action_space=True), 1, 40, **RAW),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_transition_is_the_one_that_was_played(tmp_path, kind):
    dataset, played = KINDS[kind]()
    game = {"colour, 18 actions": "Alien", "colour, higher": "Pooyan"}.get(kind, "Breakout")
    report = import_minari(dataset, tmp_path / "store")
    assert report == (sum(len(episode["action"]) for episode in played), [], [], [])
    replay = check_holds(tmp_path / "store", played, game)
    manifest = replay.manifests(game)[0]
    assert manifest["source"] == f"Minari {ID}" and tuple(manifest["actions"]) == action_names(game)
    assert manifest["sticky_actions"] == (0 if kind == "grey" else 0.25) and manifest["frame_skip"] == 4
    if kind == "grey":
        assert all(episode["terminal"] for episode in played)
        last = np.cumsum([len(episode["action"]) for episode in played]) - 1
        batch = replay.batch(game, last, n_step=3)
        assert (batch.discount == 0).all()
        np.testing.assert_array_equal(batch.next_observation[..., -1], [episode["frames"][-1] for episode in played])


def test_actions_of_the_full_set(tmp_path):
    """By name; those that the game has not are left out, and cut the episode."""
    full = tuple(ale_py.Action.__members__)
    environment = preprocessed("ALE/Breakout-v5", full_action_space=True)
    dataset, (played,) = play(environment, 1, 50, [0, 1, 3, 4] * 6 + [5, 17], **RAW)
    names = [full[action] for action in played["action"]]
    report = import_minari(dataset, tmp_path / "store")
    pieces, begin = [], 0
    for stop in range(51):
        if stop == 50 or names[stop] not in action_names("Breakout"):
            if stop > begin:
                pieces.append({
                    "frames": played["frames"][begin : stop + (stop == 50)],
                    "action": np.array([action_names("Breakout").index(name) for name in names[begin:stop]]),
                    "reward": played["reward"][begin:stop], "terminal": False, "continued": begin > 0,
                })  # fmt: skip
            begin = stop + 1
    check_holds(tmp_path / "store", pieces)
    left_out = [step for step, name in enumerate(names) if name not in action_names("Breakout")]
    assert left_out and [entry["reason"].split(":")[0] for entry in report.excluded] == [f"step {n}" for n in left_out]
    assert f"its action is {played['action'][left_out[0]]}, the game has 0, 1, 3, 4" in report.excluded[0]["reason"]


def test_episodes_of_actions_that_the_game_lacks_end_the_import(tmp_path):
    dataset, _ = play(preprocessed("ALE/Breakout-v5", full_action_space=True), 1, 50, **RAW)
    with pytest.raises(ReplayError, match=r"episode 0: \d+ of 50 rows are invalid.*Breakout has NOOP.*lacks DOWN"):
        import_minari(dataset, tmp_path / "store")
    assert import_minari(dataset, tmp_path / "store", skip_bad=True).left_out


RULES = {
    "as ours": (lambda: preprocessed("ALE/Breakout-v5"), {"frame_skip": 4, "mode": "default", "max_steps": 27_000}),
    "lives": (lambda: preprocessed("ALE/Breakout-v5", terminal_on_life_loss=True), {"life_loss_terminal": True}),
    "every frame": (lambda: make("ALE/Breakout-v5", frameskip=1), {"frame_skip": 1, "observation": "colour 210 x 160"}),
    "drawn": (lambda: make("ALE/Breakout-v5", frameskip=(2, 5)), {"frame_skip": [2, 5], "life_loss_terminal": False}),
    "variant": (lambda: make("ALE/Breakout-v5", mode=4, difficulty=1), {"mode": 4, "difficulty": 1}),
    "full": (lambda: make("ALE/Alien-v5", full_action_space=True), {"action_set": "minimal"}),  # Alien has all 18
    "clipped": (lambda: ClipReward(make("ALE/Breakout-v5"), -1.0, 1.0), {"rewards": "clipped"}),
}


@pytest.mark.parametrize("kind", RULES)
def test_rules_of_the_recording(tmp_path, kind):
    build, expected = RULES[kind]
    dataset, _ = play(build(), 1, 30)
    import_minari(dataset, tmp_path / "store")
    replay = open_replay(tmp_path / "store")
    (manifest,) = replay.manifests(replay.games[0])
    assert {name: manifest[name] for name in expected} == expected
    differing = differing_rules([manifest | {"rewards": None}], rules(sticky_actions=0.25))  # too short to tell
    assert bool(differing) == (kind != "as ours"), differing


def test_a_dataset_that_moved(tmp_path, root):
    dataset, _ = play(preprocessed("ALE/Breakout-v5"), **RAW)
    import_minari(dataset, tmp_path / "store")
    before = mtimes(tmp_path / "store")
    (root / "atari").rename(tmp_path / "moved")
    moved = tmp_path / "moved/breakout/test-v0"
    (tmp_path / "link").symlink_to(moved)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/data").symlink_to(moved / "data")
    for place in (moved, moved / "data", moved.as_uri(), tmp_path / "link", tmp_path / "linked"):
        import_minari(place, tmp_path / "sub/../store")
        assert mtimes(tmp_path / "store") == before  # nothing was done twice


def test_a_copy_with_other_times_is_the_same_dataset(tmp_path, root):
    """What a dataset is, its content says: not where it lies, and not when it was written."""
    create(buffers([9, 5]))
    import_minari(ID, tmp_path / "store")
    before = mtimes(tmp_path / "store")
    shutil.copytree(root / ID, tmp_path / "copy")
    for number, file in enumerate((tmp_path / "copy").rglob("*")):
        os.utime(file, (1_000_000 + number, 2_000_000 + number))
    assert import_minari(tmp_path / "copy", tmp_path / "store").transitions == 14
    assert mtimes(tmp_path / "store") == before  # nothing was done twice
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "copy").rglob("*")}
    with h5py.File(tmp_path / "copy/data/main_data.hdf5", "a") as file:
        file["episode_1/rewards"][2] += 1
    for file, time in times.items():
        os.utime(file, ns=(time, time))
    with pytest.raises(ReplayError, match=r"Breakout/1: holds other data"):
        import_minari(tmp_path / "copy", tmp_path / "store")
    assert mtimes(tmp_path / "store") == before


def test_a_name_that_is_too_long_is_one_sentence(tmp_path):
    for source in ("x" * 300, tmp_path / ("x" * 300)):
        with pytest.raises(ReplayError, match=r"x: cannot be read \(.*File name too long.*\)\. Check the name"):
            import_minari(source, tmp_path / "store")


def test_another_dataset_of_the_same_game_is_refused(tmp_path):
    create(buffers([9, 5]))
    import_minari(ID, tmp_path / "store")
    before = contents(tmp_path / "store")
    create(buffers([9, 6], seed=1), identifier="atari/breakout/other-v0")
    with pytest.raises(ReplayError, match=r"Breakout/1: holds other data \(Minari atari/breakout/test-v0"):
        import_minari("atari/breakout/other-v0", tmp_path / "store")
    assert contents(tmp_path / "store") == before


def test_folders_that_are_levels_off_are_named(tmp_path, root):
    create(buffers([9, 5]))
    for level in ("", "atari", "atari/breakout"):
        with pytest.raises(ReplayError, match=rf"{level}: is a folder of datasets\. .*one: {root}/{ID}/data\."):
            import_minari(root / level, tmp_path / "store")
    with pytest.raises(ReplayError, match=rf"main_data.hdf5: is a file\. .*: {root}/{ID}/data\."):
        import_minari(root / ID / "data/main_data.hdf5", tmp_path / "store")


@pytest.mark.parametrize("bad", [5, 6])
def test_more_invalid_steps_than_damage_explains_end_the_import(tmp_path, bad):
    episodes = buffers([60])
    for step in range(bad):
        episodes[0].rewards[5 + 5 * step] = float("nan")
    create(episodes)
    if bad == 5:
        assert len(import_minari(ID, tmp_path / "store").excluded) == 5
        return
    with pytest.raises(ReplayError, match=r"episode 0: 6 of 60 rows are invalid, more than 1%"):
        import_minari(ID, tmp_path / "store")
    report = import_minari(ID, tmp_path / "store", skip_bad=True)
    assert (len(report.left_out), report.transitions) == (1, 0)


def test_images_that_minari_kept_as_jpeg(tmp_path):
    """They are what Minari returns, near what was played."""
    dataset, played = play(preprocessed("ALE/Breakout-v5"))
    for episode, stored in zip(played, dataset):
        assert 0 < np.abs(stored.observations.astype(int) - episode["frames"]).mean() < 5
        episode["frames"] = stored.observations
    import_minari(dataset, tmp_path / "store")
    check_holds(tmp_path / "store", played)


# Datasets of our own making


def buffers(lengths, shape=(84, 84), actions=4, seed=0):
    rng = np.random.default_rng(seed)
    return [
        EpisodeBuffer(
            observations=list(rng.integers(0, 256, (length + 1, *shape), dtype=np.uint8)),
            actions=rng.integers(0, actions, length).tolist(),
            rewards=rng.choice([-3.0, 0.0, 0.5, 25.0], length).tolist(),
            terminations=[False] * (length - 1) + [number % 2 == 0],
            truncations=[False] * (length - 1) + [number % 2 == 1],
        )
        for number, length in enumerate(lengths)
    ]


def naive(buffer, frames=None):
    return {
        "frames": np.stack(buffer.observations) if frames is None else frames, "action": np.array(buffer.actions),
        "reward": np.array(buffer.rewards), "terminal": buffer.terminations[-1],
    }  # fmt: skip


def create(episodes, space=GREY, actions=4, env="ALE/Breakout-v5", identifier=ID, **options):
    actions = Discrete(actions) if isinstance(actions, int) else actions
    played = None
    if env:
        played = gymnasium.Env()
        played.spec = gymnasium.spec(env)
    return minari.create_dataset_from_buffers(
        identifier, episodes, env=played, observation_space=space, action_space=actions,
        **RAW, **options,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(84, 84, 4), (4, 84, 84), (84, 84, 1), (100, 90)])
def test_shapes(tmp_path, shape):
    episodes = buffers([9, 5], shape)
    create(episodes, Box(0, 255, shape, np.uint8))
    import_minari(ID, tmp_path / "store")
    newest = {
        (84, 84, 4): lambda seen: seen[:, :, 3],
        (4, 84, 84): lambda seen: seen[3],
        (84, 84, 1): lambda seen: seen[:, :, 0],
        (100, 90): lambda seen: cv2.resize(seen, (84, 84), interpolation=cv2.INTER_AREA),
    }[shape]
    check_holds(
        tmp_path / "store", [naive(episode, np.stack([*map(newest, episode.observations)])) for episode in episodes]
    )


def test_dataset_id_folder_or_object(tmp_path, root):
    episodes = buffers([9, 5, 12])
    dataset = create(episodes)
    folder = root / ID
    for number, source in enumerate([ID, folder, str(folder / "data"), dataset]):
        import_minari(source, tmp_path / f"store{number}", run=number)
        assert (
            check_holds(tmp_path / f"store{number}", list(map(naive, episodes))).manifests("Breakout")[0]["run"]
            == number
        )
    some = dataset.filter_episodes(lambda episode: bool(episode.terminations[-1]))
    import_minari(some, tmp_path / "some")
    check_holds(tmp_path / "some", [naive(episodes[0]), naive(episodes[2])])


def test_importing_again_and_more(tmp_path):
    episodes = buffers([9, 5, 12])
    dataset = create(episodes[:2])
    calls = []
    import_minari(dataset, tmp_path / "store", progress=lambda done, known: calls.append((done, known)))
    assert calls[-1] == (2, 2)
    before = mtimes(tmp_path / "store")
    assert import_minari(dataset, tmp_path / "store").transitions == 14
    assert mtimes(tmp_path / "store") == before
    dataset.update_dataset_from_buffer(episodes[2:])
    assert import_minari(ID, tmp_path / "store").transitions == 26
    check_holds(tmp_path / "store", list(map(naive, episodes)))
    import_minari(ID, tmp_path / "undisturbed")
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")


def test_the_game(tmp_path):
    episodes = buffers([6])
    create(episodes, env=None, identifier="mine-v0")
    with pytest.raises(ReplayError, match=r"mine-v0: names no environment.*argument game"):
        import_minari("mine-v0", tmp_path / "store")
    import_minari("mine-v0", tmp_path / "store", game="Breakout")
    manifest = check_holds(tmp_path / "store", [naive(episodes[0])]).manifests("Breakout")[0]
    assert (manifest["sticky_actions"], manifest["frame_skip"]) == (None, None)  # nobody says it
    with pytest.raises(ReplayError, match=r"Brakeout.*Did you mean Breakout.*argument game"):
        import_minari("mine-v0", tmp_path / "store", game="Brakeout")
    create(episodes, env="CartPole-v1", identifier="pole-v0")
    with pytest.raises(ReplayError, match=r"CartPole.*argument game"):
        import_minari("pole-v0", tmp_path / "store")


@pytest.mark.parametrize(
    "space, actions, expected",
    [
        (GREY, 6, r"Discrete\(6\); expected Discrete\(4\), the minimal set of Breakout, or Discrete\(18\)"),
        (GREY, Discrete(4, start=1), "start=1"),
        (GREY, MultiBinary(4), "MultiBinary"),
        (Box(0, 1, (84, 84), np.float32), 4, "float32.*expected a Box of uint8"),
        (Box(0, 255, (128,), np.uint8), 4, r"\[128\], expected grey"),
        (Box(0, 255, (84, 83, 4), np.uint8), 4, r"\[84, 83, 4\], expected grey"),
        (Box(0, 255, (4, 84, 84, 1), np.uint8), 4, r"\[4, 84, 84, 1\], expected grey"),
    ],
)
def test_spaces_that_are_not_of_the_game(tmp_path, space, actions, expected):
    (episode,) = buffers([3], space.shape)
    shown = [frame.astype(space.dtype) for frame in episode.observations]
    taken = [np.ones(4, np.int8)] * 3 if isinstance(actions, MultiBinary) else [1, 2, 3]
    create([EpisodeBuffer(**{**vars(episode), "observations": shown, "actions": taken})], space, actions)
    with pytest.raises(ReplayError, match=expected):
        import_minari(ID, tmp_path / "store")


# Bad ones


def test_bad_steps(tmp_path):
    (episode,) = buffers([12])
    episode.rewards[4], episode.actions[9] = float("nan"), 4
    create([episode])
    report = import_minari(ID, tmp_path / "store")
    truth = naive(episode)
    cuts = [(0, 4, 4), (5, 9, 9), (10, 12, 13)]
    pieces = [
        {
            "frames": truth["frames"][begin:frames], "action": truth["action"][begin:stop],
            "reward": truth["reward"][begin:stop], "terminal": stop == 12, "continued": begin > 0,
        }
        for begin, stop, frames in cuts
    ]  # fmt: skip
    check_holds(tmp_path / "store", pieces)
    reasons = [entry["reason"] for entry in report.excluded]
    assert reasons == [
        "step 4: its reward is nan, expected a finite number",
        "step 9: its action is 4, the game has 0, 1, 2, 3",
    ]
    assert [(entry["game"], entry["run"], entry["row"]) for entry in report.excluded] == [("Breakout", 1, 0)] * 2


def replace(name, change):
    """One array of an episode, by what a function makes of it."""

    def damage(episode):
        values = change(episode[name][()])
        del episode[name]
        if values is not None:
            episode[name] = values

    return damage


DAMAGES = {
    **{f"no {name}": replace(name, lambda _: None) for name in ("observations", "actions", "rewards", "terminations")},
    "one observation short": replace("observations", lambda values: values[:-1]),
    "one action short": replace("actions", lambda values: values[1:]),
    "rewards of two columns": replace("rewards", lambda values: np.stack([values, values], 1)),
    "other pixels": replace("observations", lambda values: values[:, :83]),
    "observations float32": replace("observations", lambda values: values.astype(np.float32)),
    "goes on after its end": replace("terminations", lambda values: ~values),
    "other length": lambda episode: episode.attrs.update(total_steps=4),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_bad_episode(tmp_path, root, damage):
    """It is named, those before it are there, and with skip_bad those after it as well."""
    episodes = buffers([9, 5, 12])
    create(episodes)
    with h5py.File(root / ID / "data/main_data.hdf5", "a") as file:
        damage(file["episode_1"])
    with pytest.raises(ReplayError, match=r"test-v0/data episode 1: cannot be read .*Download or record") as refused:
        import_minari(ID, tmp_path / "store")
    assert open_replay(tmp_path / "store").num_transitions("Breakout") == 9
    report = import_minari(ID, tmp_path / "store", skip_bad=True)
    assert [(entry["row"], entry["reason"]) for entry in report.left_out] == [(1, str(refused.value))]
    check_holds(tmp_path / "store", [naive(episodes[0]), naive(episodes[2])])


def test_no_dataset(tmp_path, root):
    create(buffers([3]))
    with pytest.raises(ReplayError, match=r"atari/pong/absent-v0: not a Minari dataset .*MINARI_DATASETS_PATH"):
        import_minari("atari/pong/absent-v0", tmp_path / "store")
    metadata = root / ID / "data/metadata.json"
    good = json.loads(metadata.read_text())
    for bad in ("{", json.dumps({**good, "data_format": "tape"}), json.dumps({**good, "minari_version": "9.0"})):
        metadata.write_text(bad)
        with pytest.raises(ReplayError, match="test-v0: not a Minari dataset"):
            import_minari(ID, tmp_path / "store")
    metadata.write_text(json.dumps({**good, "total_episodes": 0}))
    with pytest.raises(ReplayError, match="has no episodes"):
        import_minari(ID, tmp_path / "store")
    metadata.write_text(json.dumps(good))
    (root / ID / "data/main_data.hdf5").write_bytes(b"no HDF5")
    with pytest.raises(ReplayError, match="list of episodes cannot be read"):
        import_minari(ID, tmp_path / "store")
    shutil.rmtree(root / ID)
    with pytest.raises(ReplayError, match="not a Minari dataset"):
        import_minari(root / ID, tmp_path / "store")


def test_minari_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ReplayError, match=r'pip install -e "lib\[minari\]"'):
        import_minari(ID, tmp_path / "store")
    assert not list(Path(tmp_path).glob("store"))
