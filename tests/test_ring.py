"""The ring of an online learner: every batch against a naive reading of what was played, and against the store."""

import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaled_ql.games import action_names
from scaled_ql.online.ring import Ring, kept_rows, ring_bytes
from scaled_ql.replay import ReplayError, ReplayWriter, open_replay

MAX_STEPS = 30


def frame(environment, row):
    """A frame that says where it is from, noisy elsewhere."""
    picture = np.random.default_rng([environment, row]).integers(1, 256, (84, 84), np.uint8)
    picture[0, :5] = environment + 1, *row.to_bytes(4, "big")
    return picture


def where(picture):
    return int(picture[0, 0]) - 1, int.from_bytes(picture[0, 1:5].tobytes(), "big")


class Play:
    """Environments that play episodes of given lengths over and over, and a plain list of all they did."""

    def __init__(self, plans, ring, seed):
        self.ring, self.rng = ring, np.random.default_rng(seed)
        self.plans = [[plan[k % len(plan)] for k in range(1_000)] for plan in plans]
        self.log = [[] for _ in plans]  # dicts: action, reward, kind ("step", "final"), begin, end
        self.left = [list(plan) for plan in self.plans]
        self.step_in_episode, self.resetting = [0] * len(plans), [False] * len(plans)
        self.begin = [0] * len(plans)
        self.ended = []
        ring.begin(np.stack([frame(e, 0) for e in range(len(plans))]))

    def step(self):
        row, size = len(self.log[0]), len(self.plans)
        action, reward = self.rng.integers(3, size=size), self.rng.normal(0, 2, size).astype(np.float32)
        terminal, truncated = np.zeros(size, bool), np.zeros(size, bool)
        for e in range(size):
            if self.resetting[e]:
                self.log[e].append({"kind": "final", "begin": self.begin[e]})
                self.begin[e], self.step_in_episode[e], self.resetting[e] = row + 1, 0, False
                continue
            length, is_terminal = self.left[e][0]
            self.step_in_episode[e] += 1
            end = ""
            if self.step_in_episode[e] == length:
                self.left[e].pop(0)
                terminal[e], truncated[e] = is_terminal, not is_terminal
                self.resetting[e], end = True, "terminal" if is_terminal else "truncated"
            values = {"action": action[e], "reward": reward[e], "begin": self.begin[e], "end": end}
            self.log[e].append({"kind": "step", **values})
        frames = np.stack([frame(e, row + 1) for e in range(size)])
        for e in self.ring.add(frames, action, reward, terminal, truncated):
            self.ended.append((e, self.log[e][row]["begin"], row, self.ring.episode(e)))

    def transition(self, e, t, n, discount, stack):
        """Naively: None if it may not be sampled."""
        log, now = self.log[e], len(self.log[e])
        if log[t]["kind"] != "step":
            return None
        total, k, end = 0.0, 0, ""
        while k < n and not end:
            if t + k >= now:
                return None
            total += discount**k * min(max(float(log[t + k]["reward"]), -1.0), 1.0)
            end = log[t + k]["end"]
            k += 1
        if end == "truncated" and k < n:
            return None

        def frames_up_to(row):
            shown = []
            for r in range(row - stack + 1, row + 1):
                shown.append(frame(e, r) if r >= log[t]["begin"] else np.zeros((84, 84), np.uint8))
            return np.stack(shown, -1)

        follows = 0.0 if end == "terminal" else discount**n
        return frames_up_to(t), log[t]["action"], total, follows, frames_up_to(t + k)

    def usable(self, n, stack, window):
        """(environment, row) of all transitions that may be drawn."""
        now = len(self.log[0])
        oldest = max(0, now - self.ring.rows + 1)
        found = set()
        for e in range(len(self.plans)):
            for t in range(max(oldest, now - window), now):
                begin = max(self.log[e][t]["begin"], t - stack + 1)
                if begin >= oldest and self.transition(e, t, n, 0.9, stack):
                    found.add((e, t))
        return found


PLANS = st.lists(
    st.lists(st.tuples(st.integers(1, MAX_STEPS), st.booleans()), min_size=1, max_size=4), min_size=1, max_size=3
)


@settings(deadline=None, max_examples=25)
@given(
    plans=PLANS, n=st.sampled_from([1, 3, 5]), stack=st.sampled_from([1, 4]), capacity=st.integers(1, 90),
    steps=st.integers(1, 150), compressed=st.booleans(), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_batches_equal_naive_ones(plans, n, stack, capacity, steps, compressed, seed):
    ring = Ring(len(plans), capacity, MAX_STEPS, compressed=compressed)
    play = Play(plans, ring, seed)
    for _ in range(steps):
        play.step()
    usable, options = play.usable(n, stack, -(-capacity // len(plans))), {"n_step": n, "stack_size": stack}
    rng = np.random.default_rng(seed)
    if not usable:
        with pytest.raises(ReplayError, match="nothing to learn from"):
            ring.sample(rng, 2, **options)
        return
    batch = ring.sample(rng, 64 * len(usable) if len(usable) < 20 else 500, discount=0.9, **options)
    drawn = [where(stacked[..., -1]) for stacked in batch.observation]
    assert set(drawn) <= usable
    if len(usable) < 20:
        assert set(drawn) == usable
    for number in range(0, len(drawn), 7):
        observation, action, reward, follows, following = play.transition(*drawn[number], n, 0.9, stack)
        np.testing.assert_array_equal(batch.observation[number], observation)
        np.testing.assert_array_equal(batch.next_observation[number], following)
        assert batch.action[number] == action and batch.game[number] == 0
        assert batch.reward[number] == pytest.approx(reward, abs=1e-6)
        assert batch.discount[number] == np.float32(follows)


@settings(deadline=None, max_examples=6)
@given(plans=PLANS, n=st.sampled_from([1, 3]), compressed=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_what_is_logged_gives_the_same_batches_from_the_store(plans, n, compressed, seed):
    ring = Ring(len(plans), 60, MAX_STEPS, compressed=compressed)
    play, places = Play(plans, ring, seed), {}
    with tempfile.TemporaryDirectory() as folder:
        about = {"actions": action_names("Breakout"), "source": "test", "sticky_actions": 0.0}
        with ReplayWriter(folder, "Breakout", **about) as writer:
            for _ in range(100):
                play.step()
                while play.ended:
                    e, first, last, episode = play.ended.pop()
                    places |= {(e, first + k): writer.num_transitions + k for k in range(last - first + 1)}
                    writer.append(**episode)
        if not places:
            return
        replay = open_replay(folder)
        rng = np.random.default_rng(seed)
        sampled = ring.sample(rng, 100, n_step=n)
        drawn = [where(stacked[..., -1]) for stacked in sampled.observation]
        logged = [number for number, place in enumerate(drawn) if place in places]
        if not logged:
            return
        stored = replay.batch("Breakout", [places[drawn[number]] for number in logged], n_step=n)
        for name in ("observation", "next_observation", "action", "reward", "discount"):
            np.testing.assert_array_equal(getattr(stored, name), getattr(sampled, name)[logged], err_msg=name)

        again = Ring(2, 1_000, MAX_STEPS, compressed=compressed)  # a resumed learner's
        again.fill(again_episodes(replay))
        refilled = again.sample(rng, 600, n_step=n)
        assert {where(stacked[..., -1]) for stacked in refilled.observation} <= places.keys()
        back = replay.batch("Breakout", [places[where(s[..., -1])] for s in refilled.observation], n_step=n)
        for name in ("observation", "next_observation", "action", "reward", "discount"):
            np.testing.assert_array_equal(getattr(back, name), getattr(refilled, name), err_msg=name)
        start, count = replay.sampleable("Breakout", n)
        reached = {places[where(s[..., -1])] for s in refilled.observation}
        everything = {t for a, c in zip(start, count) for t in range(a, a + c)}
        assert reached <= everything
        if len(everything) < 60:
            assert reached == everything


def again_episodes(replay):
    for number in range(len(replay.episodes("Breakout"))):
        episode = replay.episode("Breakout", number)
        frames = episode.pop("observation")
        terminal = bool(replay.episodes("Breakout")["terminal"].iloc[number])
        yield episode | {"observation": frames[:-1], "final_observation": frames[-1], "terminal": terminal}


def test_a_break_between_two_plays_is_no_transition():
    ring = Ring(1, 100, MAX_STEPS)
    play = Play([[(30, True)]], ring, 0)
    for _ in range(6):
        play.step()
    ring.begin(frame(0, 7)[None])  # rows 0..5 were steps, row 6 the frame after them
    batch = ring.sample(np.random.default_rng(0), 200, n_step=3)
    assert {where(stacked[..., -1])[1] for stacked in batch.observation} == {0, 1, 2, 3}
    assert (batch.discount > 0).all()


def test_draws_are_uniform():
    ring = Ring(2, 1_000, 30)
    play = Play([[(1, True), (30, False)], [(7, True)]], ring, 0)
    for _ in range(200):
        play.step()
    usable = sorted(play.usable(3, 4, 500))
    batch = ring.sample(np.random.default_rng(1), 100 * len(usable), n_step=3)
    drawn = [where(picture) for picture in batch.frames[:, 3]]
    counts = np.array([drawn.count(place) for place in usable])
    assert counts.sum() == 100 * len(usable)
    squares = ((counts - 100) ** 2 / 100).sum()
    assert squares < len(usable) + 5 * (2 * len(usable)) ** 0.5  # five deviations of chi squared


def test_memory():
    assert kept_rows(32, 1_000_000, 27_000) == 31_264
    assert ring_bytes(32, 1_000_000, 27_000, compressed=False) < 7.5e9
    assert ring_bytes(32, 1_000_000, 27_000, compressed=True) < 0.5e9
    assert ring_bytes(8, 10_000, 27_000, compressed=False) > 8 * 27_000 * 84 * 84  # an episode each
