"""Windows of steps equal those that a plain loop cuts from whole episodes: padding, terminals, truncations, returns."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaled_ql import games
from scaled_ql.games import FULL_ACTIONS, action_names
from scaled_ql.replay import (
    ReplayError,
    ReplayWriter,
    View,
    expert_returns,
    gather_sequences,
    label_with_returns,
    open_replay,
    returns_to_go,
    sample_batches,
    sample_indices,
    sample_sequences,
    writer,
)
from scaled_ql.replay.device import to_device
from scaled_ql.replay.memory import to_memory

# Per episode: length, whether it terminated, whether its beginning was lost, whether its last state is stored.
EPISODES = {
    "Pong": [(1, True, False, False), (9, True, False, True), (2, False, False, False), (6, False, True, True),
             (2, True, True, False), (5, True, False, False)],
    "Qbert": [(3, False, False, True)],
}  # fmt: skip
SAMPLING = {"games_per_batch": 4, "transitions_per_game": 2}


def write(path, episodes, seed=0):
    rng, rows = np.random.default_rng(seed), writer.episode_rows
    with pytest.MonkeyPatch.context() as patch:
        for game, of_game in episodes.items():
            names = action_names(game)
            with ReplayWriter(path, game, actions=names, source="a test", sticky_actions=0.0) as store:
                for length, terminal, continued, final in of_game:

                    def with_flag(*arguments, continued=continued):
                        data, row = rows(*arguments)
                        return data, row | {"continued": continued}

                    patch.setattr(writer, "episode_rows", with_flag)
                    frames = rng.integers(1, 256, (length + 1, 84, 84), dtype=np.uint8)
                    store.append(
                        frames[:-1], rng.integers(len(names), size=length), rng.integers(-3, 4, size=length),
                        terminal=terminal, final_observation=frames[-1] if final else None,
                    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sequences"), EPISODES)


def by_hand(replay, game, t, length):
    """The window that ends with transition t, from whole episodes: a list of a step's values, oldest first."""
    table = replay.episodes(game)
    number = int(np.flatnonzero(table["start"] <= t)[-1])
    episode, row = replay.episode(game, number), table.iloc[number]
    steps = []
    for step in range(t - row["start"] - length + 1, t - row["start"] + 1):
        clipped = [max(-1.0, min(1.0, float(reward))) for reward in episode["reward"]]
        if step < 0:
            steps.append((np.zeros((84, 84)), 0, 0.0, sum(clipped), False, False))
            continue
        action = FULL_ACTIONS.index(replay.action_names(game)[episode["action"][step]])
        ends = bool(row["terminal"]) and step == row["length"] - 1
        steps.append((episode["observation"][step], action, clipped[step], sum(clipped[step:]), ends, True))
    return steps


def windows_by_hand(episodes, length):
    """Time indices at which a window may end."""
    usable, start = set(), 0
    for size, _, continued, _ in episodes:
        usable |= {start + t for t in range(size) if not continued or t >= length - 1}
        start += size
    return usable


def labelled(replay, game, index, length):
    batch = gather_sequences(replay, game, index, length)
    return label_with_returns(batch, index, [returns_to_go(replay, name, 1.0) for name in replay.games])


def assert_windows(replay, batch, game, index, length):
    assert [field.dtype for field in batch] == [np.uint8, np.int32, np.float32, np.float32, bool, bool, np.int32]
    for row, (number, t) in enumerate(zip(game.tolist(), index.tolist())):
        expected = by_hand(replay, replay.games[number], t, length)
        for field, wanted in zip(batch, zip(*expected)):
            np.testing.assert_array_equal(field[row], np.array(wanted))
        assert batch.game[row] == number and batch.mask[row, -1]


episode = st.tuples(st.integers(1, 12), st.booleans(), st.booleans(), st.booleans())


@settings(deadline=None, max_examples=12)
@given(
    episodes=st.dictionaries(
        st.sampled_from(["Pong", "Breakout"]), st.lists(episode, min_size=1, max_size=5), min_size=1
    ),
    length=st.integers(1, 7),
    seed=st.integers(0, 2**32),
)
def test_every_window_equals_a_naive_reading_and_no_other_is_drawn(episodes, length, seed):
    with tempfile.TemporaryDirectory() as path:
        replay = open_replay(write(Path(path), episodes, seed))
        for number, name in enumerate(replay.games):
            usable = windows_by_hand(episodes[name], length)
            if not usable:
                with pytest.raises(
                    ReplayError, match=rf"{name} has no window of {length} steps: .*Use shorter windows"
                ):
                    replay.sampleable(name, 0, length)
                return
            start, count = replay.sampleable(name, 0, length)
            assert {t for a, n in zip(start, count) for t in range(a, a + n)} == usable
            index = np.array(sorted(usable))
            game = np.full(len(index), number, np.int32)
            assert_windows(replay, labelled(replay, game, index, length), game, index, length)


@pytest.mark.parametrize("where", ["disk", "memory", "device", "view"])
@pytest.mark.parametrize("length", [1, 4])
def test_a_batch_holds_the_sampled_windows(folder, where, length):
    replay = open_replay(folder, View(games=["Pong"], uniform=0.6, seed=1) if where == "view" else None)
    read = {"memory": to_memory, "device": to_device}.get(where, lambda replay: replay)(replay)
    for step in range(3):
        game, index = sample_indices(replay, 5, step, n_step=0, stack_size=length, **SAMPLING)
        batch = sample_sequences(read, 5, step, length=length, **SAMPLING)
        assert np.isnan(batch.return_to_go).all(), "no return that was forgotten passes for one"
        batch = label_with_returns(batch, index, [returns_to_go(replay, name, 1.0) for name in replay.games])
        assert_windows(replay, batch, game, index, length)


def test_windows_are_a_pure_function_of_seed_and_step_in_threads_processes_and_shares(folder):
    replay = open_replay(folder)
    how = {"sample": sample_sequences, "length": 3, **SAMPLING}
    for processes in (0, 2):
        batches = list(sample_batches(replay, 5, 10, 22, processes=processes, **how))  # all kept: none is overwritten
        assert len(batches) == 12
        for step, batch in enumerate(batches, 10):
            expected = sample_sequences(open_replay(folder), 5, step, length=3, **SAMPLING)
            for field, wanted in zip(batch, expected, strict=True):
                assert field.dtype == wanted.dtype
                np.testing.assert_array_equal(field, wanted)
    shares = [sample_sequences(replay, 5, 10, length=3, shard=(share, 2), **SAMPLING) for share in range(2)]
    for whole, *parts in zip(batches[0], *shares, strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    other = sample_sequences(replay, 6, 10, length=3, **SAMPLING)
    assert (other.frames != batches[0].frames).any()


def test_a_uniform_view_thins_out_the_windows_and_not_their_steps(folder):
    replay = open_replay(folder, View(games=["Pong"], uniform=0.3, seed=2))
    start, count = replay.sampleable("Pong", 0, 4)
    assert (count == 1).all() and len(start) < 25
    batch = gather_sequences(replay, np.zeros(len(start), np.int32), start, 4)
    assert batch.mask[:, :-1].any(), "steps before a window's last are shown, drawn or not"


def test_what_cannot_be_read_as_windows_is_refused(folder, tmp_path):
    replay = open_replay(folder)
    with pytest.raises(ReplayError, match="length must be at least 1 step, got 0"):
        sample_sequences(replay, 0, 0, length=0)
    with pytest.raises(ReplayError, match=r"Pong has transitions 0\.\.24, asked for 25\.\.25"):
        gather_sequences(replay, np.zeros(1, np.int32), np.array([25]))
    with pytest.raises(games.OtherActions, match="the joystick has no action PULL; its actions are NOOP, FIRE"):
        games.full_actions(["NOOP", "PULL"])


def test_every_games_actions_are_of_the_joystick_and_begin_with_noop():
    for game in games.TRAINING_GAMES + games.HELD_OUT_GAMES:
        names = action_names(game)
        assert [FULL_ACTIONS[number] for number in games.full_actions(names)] == list(names)
        assert names[0] == "NOOP", "an action that the game lacks is played as its first"


@pytest.mark.parametrize("share", [0.01, 0.34, 1.0])
def test_an_experts_returns_are_those_of_the_best_episodes(folder, share):
    """Episode by episode and step by step; what no expert has is never asked for."""
    replay, low, high = open_replay(folder), -2, 3
    weights = expert_returns(replay, low, high, share)
    assert weights.shape == (len(replay.games), 6) and weights.dtype == np.float32
    for game, of_game in zip(replay.games, weights):
        rewards, episodes, first = np.clip(replay.rewards(game), -1, 1), [], 0
        for length in replay.episodes(game)["length"]:
            own = rewards[first : first + length]
            episodes.append([own[step:].sum() for step in range(length)])
            first += length
        best = sorted(episodes, key=lambda returns: -returns[0])[: max(1, int(np.ceil(share * len(episodes))))]
        experts = [returns for returns in episodes if returns[0] >= best[-1][0]]

        def shares(some):
            steps = [min(max(int(x), low), high) for returns in some for x in returns]
            return np.array([steps.count(token) / len(steps) for token in range(low, high + 1)])

        of_experts, of_all = shares(experts), shares(episodes)
        for weight, expert, everyone in zip(of_game, of_experts, of_all):
            assert weight == pytest.approx(np.log(expert / everyone), abs=1e-6) if expert else weight == -np.inf
        if share == 1:
            assert (of_game[of_all > 0] == 0).all(), "all are experts: the data's own returns"
