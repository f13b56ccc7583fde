"""Replay in memory for agents that learn online: single frames in a ring, sampled uniformly.

One ring holds one game, played by E environments that step together. Row k of each environment's part holds the frame
on which its k-th action was chosen, that action and its reward. The frame after an episode's last action has a separate
row, which is not a transition; the next episode begins in the following row. This matches environments that spend a
step on resetting.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import repeat

import numpy as np
import zstandard

from scaled_ql.replay.batch import Batch
from scaled_ql.replay.format import FRAME_SHAPE, INNER_CHUNK, ReplayError

FRAME_BYTES = FRAME_SHAPE[0] * FRAME_SHAPE[1]
ROW_BYTES = 16  # action, reward, flags, and start of the episode
COMPRESSED_FRAME_BYTES = 400  # an estimate: most games take 50 to 200
DRAWS = 1_000  # unsuccessful draws before giving up


class Ring:
    """The last rows of E environments of one game.

    Args:
        num_environments: E.
        capacity: transitions that can be sampled. At least one whole episode of each environment is kept besides, to be
            logged when it ends.
        max_steps: step limit of an episode.
        compressed: keep frames compressed, `INNER_CHUNK` at a time: a fiftieth of the memory, slower to sample.

    Attributes:
        rows: rows kept per environment.
        now: the row of the current frames; those before it are complete.
    """

    def __init__(self, num_environments: int, capacity: int, max_steps: int, *, compressed: bool = False):
        self.num_environments = num_environments
        self._window = -(-capacity // num_environments)
        self.rows = kept_rows(num_environments, capacity, max_steps)
        self._frames = (CompressedFrames if compressed else RawFrames)(num_environments, self.rows)
        shape = num_environments, self.rows
        self._action, self._reward = np.zeros(shape, np.uint8), np.zeros(shape, np.float32)
        self._terminal, self._ended, self._is_step = (np.zeros(shape, bool) for _ in range(3))
        self._begin = np.zeros(shape, np.int64)  # row of the episode's first frame
        self._resetting = np.zeros(num_environments, bool)
        self.now = -1

    def begin(self, frames: np.ndarray) -> None:
        """Begin new episodes with their first frames, uint8 [E, 84, 84], after a reset of all environments.

        An unfinished episode is never completed, but its transitions can be sampled.
        """
        if self.now >= 0:
            self._is_step[:, self.now % self.rows] = False
        if self.now > 0:
            self._ended[:, (self.now - 1) % self.rows] |= self._is_step[:, (self.now - 1) % self.rows]
        self.now += 1
        self._begin[:, self.now % self.rows] = self.now
        self._resetting[:] = False
        self._frames.write(self.now, frames)

    def add(
        self,
        frames: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        terminal: np.ndarray,
        truncated: np.ndarray,
        idle: np.ndarray | bool = False,
    ) -> np.ndarray:
        """Add a step of all environments and the frames that follow it.

        Args:
            frames: uint8 [E, 84, 84], after the step.
            action: integers [E], indices in the minimal set; ignored where an environment reset.
            reward: [E], raw rewards.
            terminal: bool [E], the episode ended in the game.
            truncated: bool [E], the episode was cut.
            idle: bool [E], filler rows without a transition, for environments with fewer rows.

        Returns:
            numbers of the environments whose episode this step ended; read them with `episode` before the next step.
        """
        row, following = self.now % self.rows, (self.now + 1) % self.rows
        is_step = ~self._resetting & ~np.asarray(idle)
        ended = (terminal | truncated) & is_step
        self._action[:, row], self._reward[:, row] = action, reward
        self._terminal[:, row] = terminal & is_step
        self._ended[:, row], self._is_step[:, row] = ended, is_step
        self._begin[:, following] = np.where(is_step, self._begin[:, row], self.now + 1)
        self._resetting = ended
        self.now += 1
        self._frames.write(self.now, frames)
        return np.flatnonzero(ended)

    def episode(self, environment: int) -> dict[str, np.ndarray | bool]:
        """The episode that the last step of an environment ended, as arguments of `ReplayWriter.append`."""
        last = self.now - 1
        rows = np.arange(self._begin[environment, last % self.rows], last + 1)
        at = environment, rows % self.rows
        frames = np.empty((len(rows) + 1, *FRAME_SHAPE), np.uint8)
        self._frames.read(np.array([environment]), rows[:1], frames[None])
        return {
            "observation": frames[:-1],
            "action": self._action[at].astype(np.int32),
            "reward": self._reward[at].copy(),
            "terminal": bool(self._terminal[environment, last % self.rows]),
            "final_observation": frames[-1],
        }

    def fill(self, episodes: Iterable[dict[str, np.ndarray | bool]]) -> None:
        """Play recorded episodes into an empty ring, in time order, as if its environments had played them."""
        ahead = iter(episodes)
        tracks = [_rows(ahead) for _ in range(self.num_environments)]  # each takes the next episode once free
        blank = np.zeros(FRAME_SHAPE, np.uint8)
        previous = None
        for entries in zip(*(_then(track, (blank, 0, 0.0, False, False, True)) for track in tracks)):
            frames, *step = (np.array(column) for column in zip(*entries))
            if step[-1].all():  # none has anything left
                return
            if previous is None:
                self.begin(frames)
            else:
                self.add(frames, *previous)
            previous = step

    def sample(
        self,
        rng: np.random.Generator,
        size: int,
        *,
        n_step: int = 1,
        discount: float = 0.99,
        stack_size: int = 4,
        out: np.ndarray | None = None,
    ) -> Batch:
        """Draw transitions uniformly, with n-step returns of clipped rewards; `game` is 0.

        As in `Replay.batch`, transitions without a state n steps later are not drawn: a truncated episode's last n - 1,
        and the newest. `out` is memory for the frames, as in `Replay.gather`.

        Raises:
            ReplayError: no transition can be sampled yet.
        """
        environment, row, steps, terminated = np.empty((4, size), np.int64)
        wanted = np.arange(size)
        for _ in range(DRAWS):
            oldest = max(self.now - self.rows + 1, self.now - self._window, 0)
            environment[wanted] = rng.integers(self.num_environments, size=len(wanted))
            row[wanted] = rng.integers(oldest, max(self.now, oldest + 1), size=len(wanted))
            usable, steps[wanted], terminated[wanted] = self._look_ahead(
                environment[wanted], row[wanted], n_step, stack_size
            )
            wanted = wanted[~usable]
            if not len(wanted):
                frames = np.empty((size, stack_size + n_step, *FRAME_SHAPE), np.uint8) if out is None else out
                return self._batch(environment, row, steps, terminated.astype(bool), n_step, discount, frames)
        raise ReplayError(
            f"after {self.now} steps of {self.num_environments} environments there is nothing to learn from yet: no "
            f"transition has a state {n_step} steps later. Raise min_history."
        )

    def _look_ahead(
        self, environment: np.ndarray, row: np.ndarray, n_step: int, stack_size: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(may be sampled, steps up to the state that follows, the episode terminated by then), each [N]."""
        ahead = row[:, None] + np.arange(n_step)
        at = environment[:, None], ahead % self.rows
        ended = self._ended[at] & (ahead < self.now)
        within = ended.any(1)
        steps = np.where(within, ended.argmax(1) + 1, n_step)
        last = environment, (row + steps - 1) % self.rows
        terminated = within & self._terminal[last]
        here = environment, row % self.rows
        earliest = np.maximum(self._begin[here], row - stack_size + 1)
        usable = self._is_step[here] & (row + steps <= self.now) & (earliest > self.now - self.rows)
        return usable & (terminated | (steps == n_step)), steps, terminated

    def _batch(
        self,
        environment: np.ndarray,
        row: np.ndarray,
        steps: np.ndarray,
        terminated: np.ndarray,
        n_step: int,
        discount: float,
        frames: np.ndarray,
    ) -> Batch:
        here = environment, row % self.rows
        ahead, width = np.arange(n_step), frames.shape[1]
        stack_size = width - n_step
        rewards = self._reward[environment[:, None], (row[:, None] + ahead) % self.rows].clip(-1, 1)
        rewards = np.where(ahead < steps[:, None], rewards, 0).astype(np.float64)
        first = row - stack_size + 1
        self._frames.read(environment, first, frames)
        shown = first[:, None] + np.arange(width)
        outside = (shown < self._begin[here][:, None]) | (shown > (row + steps)[:, None])
        frames[outside] = 0
        return Batch(
            frames=frames,
            next_stack=(steps[:, None] + np.arange(stack_size)).astype(np.int32),
            action=self._action[here].astype(np.int32),
            reward=(rewards @ discount**ahead).astype(np.float32),
            discount=np.where(terminated, 0, discount**n_step).astype(np.float32),
            game=np.zeros(len(row), np.int32),
        )

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return self._frames.nbytes + ROW_BYTES * self._action.size


def sample_rings(
    rings: list[Ring],
    seed: list[int],
    size: int,
    pool: ThreadPoolExecutor,
    *,
    shared: bool,
    n_step: int = 1,
    discount: float = 0.99,
    stack_size: int = 4,
) -> Batch:
    """A batch from the rings of G games: [G, size] transitions, or with `shared` [size], games drawn uniformly."""
    rng = np.random.default_rng(seed)
    shape = stack_size + n_step, *FRAME_SHAPE
    if shared:
        counts = np.bincount(rng.integers(len(rings), size=size), minlength=len(rings))
        frames = np.empty((size, *shape), np.uint8)
        parts = np.split(frames, np.cumsum(counts)[:-1])
    else:
        counts = np.full(len(rings), size)
        frames = np.empty((len(rings), size, *shape), np.uint8)
        parts = list(frames)
    options = {"n_step": n_step, "discount": discount, "stack_size": stack_size}
    jobs = [
        partial(ring.sample, own, count, out=part, **options)
        for ring, own, count, part in zip(rings, rng.spawn(len(rings)), counts.tolist(), parts)
        if count
    ]
    drawn = [jobs[0]()] if len(jobs) == 1 else list(pool.map(lambda job: job(), jobs))
    join = np.concatenate if shared else np.stack
    rest = {name: join([getattr(batch, name) for batch in drawn]) for name in Batch._fields[1:]}
    if shared:
        rest["game"] = np.repeat(np.arange(len(rings), dtype=np.int32), counts)
    return Batch(frames, **rest)


def kept_rows(num_environments: int, capacity: int, max_steps: int) -> int:
    """Rows that a `Ring` keeps per environment: a share of the capacity, or the longest episode; whole chunks."""
    rows = max(-(-capacity // num_environments), max_steps + 2)
    return -(-rows // INNER_CHUNK) * INNER_CHUNK


def ring_bytes(num_environments: int, capacity: int, max_steps: int, compressed: bool) -> int:
    """Bytes that a full `Ring` takes: 7.1 GB for a million transitions, compressed at most half a GB."""
    frame = COMPRESSED_FRAME_BYTES if compressed else FRAME_BYTES
    return num_environments * kept_rows(num_environments, capacity, max_steps) * (frame + ROW_BYTES)


def _rows(episodes: Iterator[dict[str, np.ndarray | bool]]) -> Iterator[tuple]:
    """Arguments of `Ring.add` for one environment, row by row, and the frame before each, from its episodes."""
    for episode in episodes:
        last = len(episode["action"]) - 1
        for step, frame in enumerate(episode["observation"]):
            ended = step == last
            terminal = ended and bool(episode["terminal"])
            yield frame, episode["action"][step], episode["reward"][step], terminal, ended and not terminal, False
        yield episode["final_observation"], 0, 0.0, False, False, False


def _then(rows: Iterator[tuple], idle: tuple) -> Iterator[tuple]:
    yield from rows
    yield from repeat(idle)


class RawFrames:
    """The last `rows` frames of E environments; unwritten rows take no memory."""

    def __init__(self, num_environments: int, rows: int):
        self._rows = rows
        self._frames = np.zeros((num_environments, rows, *FRAME_SHAPE), np.uint8)
        self._flat = self._frames.reshape(-1, *FRAME_SHAPE)
        self.nbytes = self._frames.nbytes

    def write(self, row: int, frames: np.ndarray) -> None:
        """Frames [E, 84, 84] of one row."""
        self._frames[:, row % self._rows] = frames

    def read(self, environment: np.ndarray, first: np.ndarray, frames: np.ndarray) -> None:
        """Fill uint8 [N, width, 84, 84] with rows first, first + 1, ... of an environment each."""
        rows = (first[:, None] + np.arange(frames.shape[1])) % self._rows
        np.take(self._flat, environment[:, None] * self._rows + rows, axis=0, out=frames, mode="clip")


class CompressedFrames:
    """Like `RawFrames`, with each environment's frames compressed once a chunk of them is full."""

    def __init__(self, num_environments: int, rows: int):
        self._rows = rows
        self._open = np.zeros((num_environments, INNER_CHUNK, *FRAME_SHAPE), np.uint8)  # the chunk being filled
        self._chunks: list[list[bytes]] = [[b""] * (rows // INNER_CHUNK) for _ in range(num_environments)]
        self._opened = 0
        self._pool = ThreadPoolExecutor(thread_name_prefix="compress")

    def write(self, row: int, frames: np.ndarray) -> None:
        """Frames [E, 84, 84] of one row."""
        number, place = divmod(row, INNER_CHUNK)
        if number != self._opened:
            full = list(self._pool.map(zstandard.compress, self._open, repeat(3)))
            for chunks, chunk in zip(self._chunks, full):
                chunks[self._opened % len(chunks)] = chunk
            self._opened = number
        self._open[:, place] = frames

    def _chunk(self, environment: int, number: int) -> np.ndarray:
        if number == self._opened:
            return self._open[environment]
        chunk = self._chunks[environment][number % len(self._chunks[environment])]
        if not chunk:
            return np.zeros((INNER_CHUNK, *FRAME_SHAPE), np.uint8)
        return np.frombuffer(zstandard.decompress(chunk), np.uint8).reshape(INNER_CHUNK, *FRAME_SHAPE)

    def read(self, environment: np.ndarray, first: np.ndarray, frames: np.ndarray) -> None:
        """See `RawFrames.read`."""
        width = frames.shape[1]
        for target, who, begin in zip(frames, environment.tolist(), first.tolist()):
            for number in range(begin // INNER_CHUNK, (begin + width - 1) // INNER_CHUNK + 1):
                low, high = max(begin, number * INNER_CHUNK), min(begin + width, (number + 1) * INNER_CHUNK)
                part = self._chunk(who, number)[low - number * INNER_CHUNK : high - number * INNER_CHUNK]
                target[low - begin : high - begin] = part

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return self._open.nbytes + sum(len(chunk) + 33 for chunks in self._chunks for chunk in chunks)
