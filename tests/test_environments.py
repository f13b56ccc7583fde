"""Both kinds of environment show the same frames, and these are the paper's preprocessing of ALE's screens."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import ale_py
import cv2
import numpy as np
import pytest
from ale_py import roms

from scaled_ql import environments as environments_module
from scaled_ql.environments import (
    EnvironmentDied,
    UnknownAction,
    compare_rules,
    differing_rules,
    make_environment,
    make_vector_environment,
    rules,
    whole_rewards,
)
from scaled_ql.games import RULES, UnknownGame, UnknownVariant, action_names, rom_name


def naive_frames(game, actions, sticky_actions, seed):
    """Frames, rewards: grey, maximum of the last two of four emulator frames, area resize; straight from ALE."""
    ale = ale_py.ALEInterface()
    ale.setFloat("repeat_action_probability", sticky_actions)
    ale.setInt("random_seed", np.int32(np.random.SeedSequence(seed).generate_state(2)[1]))
    ale.loadROM(roms.get_rom_path(rom_name(game)))
    ale.reset_game()
    screens, rewards = [ale.getScreenGrayscale()], []
    for action in actions:
        reward, last = 0, []
        for _ in range(4):
            reward += ale.act(ale.getMinimalActionSet()[action])
            last.append(ale.getScreenGrayscale())
        screens.append(np.maximum(last[-1], last[-2]))
        rewards.append(reward)
    return [cv2.resize(screen, (84, 84), interpolation=cv2.INTER_AREA) for screen in screens], rewards


@pytest.mark.parametrize("sticky_actions", [0.0, 0.25])
@pytest.mark.parametrize("game", ["Breakout", "SpaceInvaders", "Carnival"])
def test_frames_equal_naive_preprocessing(game, sticky_actions):
    actions = np.random.default_rng(1).integers(len(action_names(game)), size=100)
    environment = make_environment(game, sticky_actions=sticky_actions)
    frames, rewards = [environment.reset(seed=3)[0]], []
    for action in actions:
        frame, reward, terminated, truncated, _ = environment.step(int(action))
        assert not terminated and not truncated
        frames.append(frame)
        rewards.append(reward)
    assert frames[0].shape == (84, 84) and frames[0].dtype == np.uint8
    expected_frames, expected_rewards = naive_frames(game, actions, sticky_actions, seed=3)
    np.testing.assert_array_equal(frames, expected_frames)
    assert rewards == expected_rewards
    assert len(np.unique(frames, axis=0)) > 50  # the screen moves, so equality means something


@pytest.mark.parametrize(
    "game, max_steps, num_steps, expected_end",
    [
        ("SpaceInvaders", 37, 120, "truncated"),
        ("Carnival", 20, 65, "truncated"),
        ("Pong", 77, 160, "truncated"),
        ("Breakout", 27_000, 450, "terminated"),
    ],
)
def test_vector_environment_equals_stacked_single_one(game, max_steps, num_steps, expected_end):
    vector = make_vector_environment(game, 2, max_steps=max_steps)
    single = make_environment(game, sticky_actions=0.0, max_steps=max_steps)
    stacks, _ = vector.reset(seed=0)
    stack = np.zeros((4, 84, 84), np.uint8)
    stack[-1], _ = single.reset(seed=0)
    np.testing.assert_array_equal(stacks, [stack, stack])

    ends, steps, was_reset, total = [], 0, False, 0.0
    for action in np.random.default_rng(0).integers(len(action_names(game)), size=num_steps):
        stacks, rewards, terminated, truncated, _ = vector.step(np.full(2, action))
        if was_reset:  # the vector environment spent this step on its reset
            frame, reward, end, cut = single.reset()[0], 0.0, False, False
            stack, steps = np.zeros_like(stack), 0
        else:
            frame, reward, end, cut, _ = single.step(int(action))
            steps += 1
        stack = np.concatenate([stack[1:], frame[None]])
        np.testing.assert_array_equal(stacks, [stack, stack])
        assert rewards.tolist() == [reward, reward]
        assert (terminated.tolist(), truncated.tolist()) == ([end] * 2, [cut] * 2)
        was_reset, total = end or cut, total + abs(reward)
        if was_reset:
            ends.append(("terminated" if end else "truncated", steps))
    assert len(ends) >= 2
    assert {kind for kind, _ in ends} == {expected_end}
    if expected_end == "truncated":
        assert {length for _, length in ends} == {max_steps}
    if num_steps >= 160:
        assert total > 0  # rewards were compared, too


def random_breakout(max_steps, seed):
    """The actions of an episode without stickiness, and (terminated, truncated) at its end."""
    environment = make_environment("Breakout", sticky_actions=0.0, max_steps=max_steps)
    environment.reset(seed=0)
    rng, actions, end, cut, info = np.random.default_rng(seed), [], False, False, {}
    while not (end or cut):
        actions.append(int(rng.integers(4)))
        _, _, end, cut, info = environment.step(actions[-1])
    return actions, (end, cut), info["episode_frame_number"]


def test_game_over_at_the_very_cap_is_termination():
    seed = 1
    actions, end, frames = random_breakout(27_000, seed)
    assert end == (True, False) and frames == 4 * len(actions)  # over on a step's last emulator frame

    vector = make_vector_environment("Breakout", 1, max_steps=len(actions))
    vector.reset(seed=0)
    for action in actions:
        _, _, terminated, truncated, _ = vector.step(np.array([action]))
    assert (terminated[0], truncated[0]) == (True, False)
    # The single environment sets both flags there, so `terminated` is the one to ask.
    assert random_breakout(len(actions), seed)[1] == (True, True)
    assert random_breakout(len(actions) - 1, seed)[1] == (False, True)


def test_a_score_that_passes_a_million_gives_its_reward():
    environment, rng = make_environment("Asterix"), np.random.default_rng(0)
    environment.reset(seed=0)
    for address, digits in ((0x5E, 0x99), (0x5F, 0x99), (0x60, 0x00)):  # a score of 999,900
        environment.unwrapped.ale.setRAM(address, digits)
    rewards = [environment.step(rng.integers(environment.action_space.n))[1] for _ in range(200)]
    assert rewards[0] == 999_900
    assert set(rewards[1:]) == {0, 50}
    assert environment.unwrapped.ale.getRAM()[0x5E] == 0, "the score did not pass a million"
    np.testing.assert_array_equal(whole_rewards(np.array([-999_000, -10, 50], np.float32)), [1_000, -10, 50])


def test_equal_seeds_repeat_sticky_actions():
    def play(environment, seed):
        frame, _ = environment.reset(seed=seed)
        return [frame] + [environment.step(step % 6)[0] for step in range(60)]

    one, other = (make_environment("SpaceInvaders", sticky_actions=0.5) for _ in range(2))
    first = play(one, 5)
    np.testing.assert_array_equal(first, play(other, 5))
    np.testing.assert_array_equal(first, play(one, 5))
    assert (np.array(first) != play(one, 6)).any()


def test_mode_and_difficulty_reach_the_emulator():
    def last_frame(**variant):
        environment = make_environment("Freeway", sticky_actions=0.0, **variant)
        environment.reset(seed=0)
        return [environment.step(0)[0] for _ in range(40)][-1]

    frames = [last_frame(), last_frame(mode=0, difficulty=0), last_frame(mode=1), last_frame(mode=4, difficulty=1)]
    np.testing.assert_array_equal(frames[0], frames[1])
    assert (frames[0] != frames[2]).any() and (frames[0] != frames[3]).any()


@pytest.mark.parametrize("game, max_steps", [("Breakout", 60), ("Freeway", 27_000), ("Pong", 45)])
def test_threads_and_processes_show_the_same(game, max_steps):
    """The default variant by name is played by processes; without a name by threads."""
    (variant,) = {(modes[0], difficulties[0]) for modes, difficulties in [variants(game)]}
    threads = make_vector_environment(game, 3, max_steps=max_steps)
    processes = make_vector_environment(game, 3, max_steps=max_steps, mode=variant[0], difficulty=variant[1])
    try:
        assert type(threads) is not type(processes)
        np.testing.assert_array_equal(threads.reset(seed=0)[0], processes.reset(seed=0)[0])
        rng, ended = np.random.default_rng(2), 0
        for _ in range(150):
            actions = rng.integers(len(action_names(game)), size=3)
            results = []
            for environment in (threads, processes):
                environment.send(actions)
                results.append([np.array(part) for part in environment.recv()[:4]])
            for left, right in zip(*results):
                np.testing.assert_array_equal(left, right)
            ended += int((results[0][2] | results[0][3]).sum())
        assert ended or max_steps == 27_000
    finally:
        threads.close()
        processes.close()


def test_a_variants_screens_are_coloured_and_of_that_variant():
    options = {"screens": True, "difficulty": 0}
    first, second = (make_vector_environment("Freeway", 1, mode=mode, **options) for mode in (0, 1))
    try:
        screens = [environment.reset(seed=0)[0] for environment in (first, second)]
        for _ in range(8):
            screens = [environment.step(np.zeros(1, int))[0] for environment in (first, second)]
        assert all(screen.shape == (1, 1, 210, 160, 3) and screen.dtype == np.uint8 for screen in screens)
        assert all((screen[..., 0] != screen[..., 2]).any() for screen in screens)
        assert (screens[0] != screens[1]).any()
    finally:
        first.close()
        second.close()


def variants(game):
    environment = ale_py.AtariEnv(rom_name(game))
    return environment.ale.getAvailableModes(), environment.ale.getAvailableDifficulties()


def test_a_variant_that_the_game_has_not_is_named_with_those_it_has():
    with pytest.raises(UnknownVariant, match=r"Breakout has no mode 5\..* 0, 4, 8"):
        make_environment("Breakout", mode=5)
    with pytest.raises(UnknownVariant, match=r"difficult.* 7.* 0, 1"):
        make_vector_environment("Breakout", 2, difficulty=7)


@pytest.mark.parametrize("wrong", [4, -1, 17])
def test_actions_outside_the_set_are_never_sent(wrong):
    """ALE's threads never answer them, and its single environment takes -1 for the last action."""
    single = make_environment("Breakout")
    single.reset(seed=0)
    with pytest.raises(UnknownAction, match=rf"Breakout: actions \[{wrong}\] .* 0 to 3"):
        single.step(wrong)
    (mode, *_), _ = variants("Breakout")
    for variant in ({}, {"mode": mode}):
        environments = make_vector_environment("Breakout", 2, **variant)
        environments.reset(seed=0)
        for send in (environments.send, environments.step):
            with pytest.raises(UnknownAction, match=rf"Breakout: actions \[{wrong}\] .* 0 to 3"):
                send(np.array([0, wrong]))
        environments.step(np.array([0, 3]))  # it still plays
        environments.close()


def test_nothing_waits_without_a_limit(monkeypatch):
    """Whatever keeps environments from answering: here no step was begun, and a process was stopped."""
    threads = make_vector_environment("Breakout", 2)
    threads.reset(seed=0)
    monkeypatch.setattr(environments_module, "STEP_SECONDS", 1.0)
    with pytest.raises(EnvironmentDied, match=r"Breakout: no answer .* within 1 s"):
        threads.recv()
    (mode, *_), _ = variants("Breakout")
    monkeypatch.setattr(environments_module, "STEP_SECONDS", 60.0)
    processes = make_vector_environment("Breakout", 2, mode=mode)
    processes.reset(seed=0)
    monkeypatch.setattr(environments_module, "STEP_SECONDS", 1.0)
    os.kill(processes.processes[1].pid, signal.SIGSTOP)
    with pytest.raises(EnvironmentDied, match="Breakout: an environment does not answer"):
        processes.reset(seed=0)
    assert not any(process.is_alive() for process in processes.processes)


SCRIPTS = {
    "environments": "from scaled_ql.environments import *; make_vector_environment('Breakout', 2, mode=0)",
    "players": "from scaled_ql.collect import *; list(record(sys.argv[1], ['Breakout'], 50, seed=0, max_steps=30))",
    "grids": "from scaled_ql import grids, parameters; grids.run_grid([('01_data_collection', "
    "parameters.check('01_data_collection', {'outputs': sys.argv[1]}))], workers=1)",
    "imports": "from scaled_ql.replay import *; import_dqn_replay(sys.argv[2], sys.argv[1], workers=1)",
}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_script_without_a_main_guard_is_named(tmp_path, kind):
    script, logs = tmp_path / "script.py", Path(__file__).parent / "data" / "dqn_replay"
    script.write_text(f"import sys; {SCRIPTS[kind]}\n")
    command = [sys.executable, str(script), str(tmp_path / "store"), str(logs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert f"{script} starts processes without a main guard" in done.stderr.strip().splitlines()[-1]


def test_rules_that_differ():
    ours = rules(sticky_actions=0.0)
    assert set(ours) == set(RULES) and None not in ours.values()
    recorded = [ours | {"frame_skip": [2, 5], "mode": 4}, ours | {"sticky_actions": 0.25, "mode": None}]
    assert differing_rules(recorded, ours) == [
        "frame skip: 2 to 5 in the data, 4 here",
        "sticky actions: 0.25 in the data, 0.0 here",
        "mode: 4 in the data, default here",
    ]
    assert differing_rules([dict.fromkeys(RULES), {}], ours) == []  # nothing is known


def test_rules_that_differ_in_a_sentence():
    ours = rules(sticky_actions=0.0, max_steps=6_000)
    data = ours | {"sticky_actions": 0.25}
    assert compare_rules({"Pong": [ours], "Breakout": [ours]}, ours) == "Recorded under no other rules."
    said = compare_rules({"Pong": [data], "Breakout": [data | {"life_loss_terminal": True, "mode": None}]}, ours)
    assert said == (
        "Recorded under other rules: sticky actions: 0.25 in the data, 0.0 here; end of an episode at a lost life: yes "
        "in the data, no here (Breakout). Not known of the recordings: mode (Breakout)."
    )


def test_unknown_game():
    for make in (make_environment, lambda game: make_vector_environment(game, 2)):
        with pytest.raises(UnknownGame, match="Breakout"):
            make("Brekout")


def test_threads_are_as_many_as_cores_that_may_be_used():
    """Runs of a grid have a share of the cores each; with all cores' threads each, they slow each other down."""
    code = """
import os
from scaled_ql.environments import make_vector_environment
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
alive = []
for number in (0, 1, 2):
    before = len(os.listdir("/proc/self/task"))
    alive.append(make_vector_environment("Pong", 2, num_threads=number))
    alive[-1].reset(seed=0)
    print(len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    by_default, one, two = map(int, done.stdout.split())
    assert by_default == one
    if os.cpu_count() > 1:  # ALE starts no more than the machine has cores
        assert one < two
