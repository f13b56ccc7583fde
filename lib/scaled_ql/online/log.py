"""Experience of online agents: written to the store, and read back from it."""

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from scaled_ql.replay.format import FRAME_SHAPE
from scaled_ql.replay.store import Replay
from scaled_ql.replay.writer import ReplayWriter
from scaled_ql.training import tensorboard_writer

EPISODES_WAITING = 64  # unwritten episodes before playing waits for the disk
WRITERS = 4


class EpisodeLog:
    """Writes episodes on threads, each game's in order.

    Attributes:
        transitions: number by game, on disk or about to be written.
    """

    def __init__(self, writers: Mapping[str, ReplayWriter]):
        """Log to the given writers, one per game."""
        self._writers = writers
        self._pools = [ThreadPoolExecutor(1, thread_name_prefix="log") for _ in range(WRITERS)]
        self._pool_of = dict(zip(writers, cycle(self._pools)))
        self._waiting: deque[Future] = deque()
        self.transitions = {game: writer.num_transitions for game, writer in writers.items()}

    def append(self, game: str, episode: dict[str, Any], **columns: float) -> None:
        """Queue an episode for writing; waits if the queue is full.

        Args:
            game: name of its game.
            episode: arguments of `ReplayWriter.append`.
            **columns: further columns of the episode table.

        Raises:
            ReplayError: an earlier episode could not be written.
        """
        self.transitions[game] += len(episode["action"])
        write = partial(self._writers[game].append, **episode, **columns)
        self._waiting.append(self._pool_of[game].submit(write))
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > EPISODES_WAITING):
            self._waiting.popleft().result()

    def wait(self) -> None:
        """Return when all episodes are on disk."""
        while self._waiting:
            self._waiting.popleft().result()

    def __enter__(self) -> "EpisodeLog":
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools:
            pool.shutdown()  # queued episodes are written, whatever else went wrong


class EpisodeMirror:
    """Episodes in TensorBoard's files: raw return, length, share of random moves, by the transitions that they end.

    Args:
        folder: written anew, so that a resumed recording's earlier episodes are added first.

    Raises:
        ModuleNotFoundError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path):
        self._writer, self._transitions = tensorboard_writer(folder), Counter()

    def add(self, game: str, episode_return: float, length: int, epsilon: float) -> None:
        """Mirror a game's next episode."""
        self._transitions[game] += length
        for name, value in {"return": episode_return, "length": length, "epsilon": epsilon}.items():
            self._writer.add_scalar(f"{name}/{game}", value, self._transitions[game])

    def close(self) -> None:
        """Write what the files do not have yet."""
        self._writer.close()


def logged_episodes(replay: Replay, game: str, run: int, capacity: int) -> Iterator[dict[str, Any]]:
    """A recording's last episodes, about `capacity` transitions, oldest first, for `ReplayWriter.append`."""
    table = replay.episodes(game)
    table = table[table["run"] == run]
    end = table["length"].cumsum()
    for number in table.index[(end.iloc[-1] - end) < capacity]:
        episode = replay.episode(game, int(number))
        frames, length = episode.pop("observation"), len(episode["action"])
        final = frames[length] if len(frames) > length else np.zeros(FRAME_SHAPE, np.uint8)
        terminal = bool(table.loc[number, "terminal"])
        yield episode | {"observation": frames[:length], "final_observation": final, "terminal": terminal}
