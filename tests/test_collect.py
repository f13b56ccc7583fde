"""Recordings repeat bit for bit, survive being killed, and hold what the emulator showed."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest

from scaled_ql import collect
from scaled_ql.collect import SCRIPTED_PLAYERS, epsilon_at, mirrored, play_episode, record, record_game
from scaled_ql.environments import EnvironmentDied, make_environment, rules
from scaled_ql.games import RULES, UnknownGame, action_names, rom_md5
from scaled_ql.replay import ReplayError, open_replay

SHORT = {"seed": 4, "max_steps": 60}  # every episode is cut after 60 steps


def identity(path):
    replay = open_replay(path)
    assert replay.validate() == []
    return replay.identity()


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """360 transitions of Breakout: 6 episodes."""
    path = tmp_path_factory.mktemp("recording")
    assert record_game(path, "Breakout", 360, **SHORT) == 360
    return path


def test_recording_twice_gives_the_same(recording, tmp_path):
    record_game(tmp_path / "again", "Breakout", 360, **SHORT)
    assert identity(tmp_path / "again") == identity(recording)


@pytest.mark.parametrize("changed", [{"seed": 5}, {"run": 2}])
def test_seeds_and_runs_differ(recording, tmp_path, changed):
    record_game(tmp_path, "Breakout", 120, **(SHORT | changed))
    other = open_replay(tmp_path).episodes("Breakout")
    assert len(other) == 2
    assert not set(open_replay(recording).episodes("Breakout")["crc32"]) & set(other["crc32"])


def test_finished_recording_is_left_alone(recording):
    before = identity(recording)
    assert record_game(recording, "Breakout", 360, **SHORT) == 360
    assert identity(recording) == before


def test_killed_recording_goes_on_as_if_it_had_not_been(recording, tmp_path):
    code = f"import sys; from scaled_ql.collect import *; record_game(sys.argv[1], 'Breakout', 360, **{SHORT})"
    journal = tmp_path / "Breakout/1/episodes.jsonl"
    for count in (1, 2):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
        try:
            until = time.monotonic() + 60
            while not journal.exists() or journal.read_bytes().count(b"\n") < count:
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.001)
        finally:
            process.kill()  # SIGKILL
            process.wait()
        assert count <= len(open_replay(tmp_path).episodes("Breakout")) < 6
    assert record_game(tmp_path, "Breakout", 360, **SHORT) == 360
    assert identity(tmp_path) == identity(recording)


def test_replaying_the_actions_shows_the_recorded_frames(recording):
    replay = open_replay(recording)
    environment = make_environment("Breakout", sticky_actions=0.25, max_steps=60)
    for number, episode in enumerate(replay.episodes("Breakout").itertuples()):
        here = slice(episode.start, episode.start + episode.length)
        seed = int(np.random.default_rng([4, 1, number]).integers(2**31))
        frames, rewards = [environment.reset(seed=seed)[0]], []
        for action in replay.actions("Breakout")[here]:
            frame, reward, terminated, truncated, _ = environment.step(int(action))
            frames.append(frame)
            rewards.append(reward)
        np.testing.assert_array_equal(frames[:-1], replay.frames_at("Breakout", np.arange(here.start, here.stop)))
        np.testing.assert_array_equal(rewards, replay.rewards("Breakout")[here])
        assert (terminated, truncated) == (episode.terminal, episode.truncated) == (False, True)


def test_what_a_recording_says_about_itself(recording):
    replay = open_replay(recording)
    (manifest,) = replay.manifests("Breakout")
    assert manifest["actions"] == list(action_names("Breakout"))
    assert manifest["rom_md5"] == rom_md5("Breakout")
    assert manifest["sticky_actions"] == 0.25
    assert manifest["rewards"] == "raw"
    assert {name: manifest[name] for name in RULES} == rules(sticky_actions=0.25, max_steps=60)
    assert set(replay.actions("Breakout")) == {0, 1, 2, 3}
    epsilon = replay.episodes("Breakout")["epsilon"]
    np.testing.assert_allclose(epsilon, [1, 0.7, 0.4, 0.1, 0.1, 0.1])


def test_rewards_are_raw(tmp_path):
    record_game(tmp_path, "SpaceInvaders", 250, seed=0)  # a random player, whole games
    replay = open_replay(tmp_path)
    table, rewards = replay.episodes("SpaceInvaders"), replay.rewards("SpaceInvaders")
    assert set(rewards) <= {0, 5, 10, 15, 20, 25, 30, 200} and rewards.max() >= 5
    assert table["episode_return"].sum() == rewards.sum()
    assert table["terminal"].all() and (table["epsilon"] == 1).all()


def test_sticky_actions_zero_makes_frames_a_function_of_actions(tmp_path):
    record_game(tmp_path, "Freeway", 60, sticky_actions=0.0, **SHORT)
    replay = open_replay(tmp_path)
    assert replay.manifests("Freeway")[0]["sticky_actions"] == 0
    environment = make_environment("Freeway", sticky_actions=0.0)
    frames = [environment.reset(seed=99)[0]]
    for action in replay.actions("Freeway")[:59]:
        frames.append(environment.step(int(action))[0])
    np.testing.assert_array_equal(frames, replay.frames_at("Freeway", np.arange(0, 60)))


def test_other_player_settings_are_not_mixed_in(recording):
    for changed in ({"seed": 5}, {"final_epsilon": 0.5}, {"sticky_actions": 0.0}):
        with pytest.raises(ReplayError, match="other settings"):
            record_game(recording, "Breakout", 360, **(SHORT | changed))


def test_epsilon_falls_linearly_from_one_over_the_first_half():
    assert [epsilon_at(t, 100, 0.2) for t in (0, 25, 50, 150)] == pytest.approx([1.0, 0.6, 0.2, 0.2])


@pytest.mark.parametrize("game, margin", [("Boxing", 5), ("Breakout", 3), ("Freeway", 2), ("Pong", 2), ("Qbert", 100)])
def test_scripted_player_beats_a_random_one(game, margin):
    environment, actions = make_environment(game, max_steps=300), action_names(game)

    def score(player, seed):
        return play_episode(environment, player, actions, lambda step: 0.0, [seed])["reward"].sum()

    seeds = range(2)
    scripted, random = (np.mean([score(p, s) for s in seeds]) for p in (SCRIPTED_PLAYERS[game], None))
    assert scripted >= random + margin


@pytest.mark.parametrize("game", ["Boxing", "Breakout", "Qbert"])
def test_the_mirror_image_of_an_action_is_the_opposite_and_one_of_the_game(game):
    names = action_names(game)
    assert all(mirrored(mirrored(name)) == name and mirrored(name) in names for name in names)
    pairs = {"UPRIGHTFIRE": "DOWNLEFTFIRE", "LEFT": "RIGHT", "FIRE": "FIRE", "NOOP": "NOOP"}
    assert {name: mirrored(name) for name in pairs} == pairs


def test_the_scripted_pong_player_wins():
    """Alone, without random moves and sticky actions: the whole game, which has no luck in it."""
    environment, actions = make_environment("Pong", sticky_actions=0.0), action_names("Pong")
    played = play_episode(environment, SCRIPTED_PLAYERS["Pong"], actions, lambda step: 0.0, [0])
    assert played["terminal"] and played["reward"].sum() > 0


def test_two_games_in_two_processes(tmp_path):
    updates = list(record(tmp_path / "both", ["Breakout", "Asterix"], 180, processes=2, poll_seconds=0.05, **SHORT))
    assert updates[-1] == {"Breakout": 180, "Asterix": 180}
    for before, after in pairwise(updates):
        assert all(before[game] <= after[game] for game in before)
    assert len({sum(update.values()) for update in updates}) > 2  # something was seen on the way
    assert open_replay(tmp_path / "both").games == ["Asterix", "Breakout"]
    record_game(tmp_path / "alone", "Breakout", 180, **SHORT)
    record_game(tmp_path / "alone", "Asterix", 180, **SHORT)
    assert identity(tmp_path / "both") == identity(tmp_path / "alone")


def test_stopping_to_look_stops_the_recording(tmp_path):
    updates = record(tmp_path, ["Breakout"], 10**7, processes=1, poll_seconds=0.05, **SHORT)
    while next(updates)["Breakout"] == 0:
        pass
    updates.close()
    replay = open_replay(tmp_path)
    assert replay.validate() == []
    time.sleep(0.2)
    assert open_replay(tmp_path).identity() == replay.identity()


def test_an_environment_that_does_not_answer_ends_the_recording(tmp_path, monkeypatch):
    """Here its process is stopped in the middle of a step."""
    updates = record(tmp_path, ["Breakout"], 10**7, processes=1, poll_seconds=0.05, **SHORT)
    while next(updates)["Breakout"] == 0:
        pass
    shared = updates.gi_frame.f_locals
    (pid,) = shared["pids"]
    os.kill(pid, signal.SIGSTOP)
    while not shared["since"][0]:  # between two steps
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.01)
        os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(collect, "STEP_SECONDS", 0.5)
    with pytest.raises(EnvironmentDied, match=r"Breakout: no answer from the environment within 0\.5 s"):
        for _ in updates:
            pass
    assert not psutil.pid_exists(pid)
    assert open_replay(tmp_path).validate() == []


def test_failure_in_a_process_is_raised(tmp_path):
    Path(tmp_path / "Asterix").write_text("not a folder")
    with pytest.raises(ReplayError, match="Asterix"):
        for _ in record(tmp_path, ["Asterix"], 60, processes=1, poll_seconds=0.05, **SHORT):
            pass


def test_unknown_game_fails_before_anything_is_recorded(tmp_path):
    with pytest.raises(UnknownGame, match="Breakout"):
        next(record(tmp_path / "data", ["Pong", "Brekout"], 100, seed=0))
    with pytest.raises(UnknownGame, match="Breakout"):
        record_game(tmp_path / "data", "Brekout", 100, seed=0)
    assert not (tmp_path / "data").exists()


def always_left(ram, before):
    return "LEFT"


def test_a_player_of_two_minds_does_the_mirror_image_half_of_the_time_in_stretches():
    actions = action_names("Breakout")
    names = []
    for seed in range(4):
        environment = make_environment("Breakout", sticky_actions=0.0, max_steps=500)
        episode = play_episode(environment, always_left, actions, lambda step: 0.0, [seed], change_of_mind=0.04)
        names += [[actions[action] for action in episode["action"]]]
    flat = [name for part in names for name in part]
    assert set(flat) == {"LEFT", "RIGHT"}
    assert 0.2 < flat.count("LEFT") / len(flat) < 0.8
    switches = sum(a != b for part in names for a, b in pairwise(part))
    assert 0.005 < switches / len(flat) < 0.04  # half of the redrawn minds are the old one


def test_a_recording_of_two_minds_says_so_and_has_one_epsilon(tmp_path):
    record_game(tmp_path, "Breakout", 180, two_minds=True, final_epsilon=0.2, **SHORT)
    record_game(tmp_path, "Amidar", 60, two_minds=True, final_epsilon=0.2, **SHORT)
    replay = open_replay(tmp_path)
    assert set(replay.episodes("Breakout")["epsilon"].round(6)) == {0.2}
    assert set(replay.episodes("Amidar")["epsilon"]) == {1.0}  # no script plays it: at random
    manifest = json.loads((tmp_path / "Breakout/1/manifest.json").read_text())
    assert "two minds" in manifest["source"]
    assert "random player" in json.loads((tmp_path / "Amidar/1/manifest.json").read_text())["source"]
