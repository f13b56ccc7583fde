"""Experience of online agents: written to the store, and read back from it."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from scaled_ql.replay.format import FRAME_SHAPE
from scaled_ql.replay.store import Replay
from scaled_ql.replay.writer import ReplayWriter
from scaled_ql.training import tensorboard_writer

WRITE_SECONDS = 1.0  # between writes: each costs as much as a thousand transitions, however few it writes
TRANSITIONS_WAITING = 50_000  # unwritten ones, 0.4 GB, before playing waits for the disk
WRITERS = 4


class EpisodeLog:
    """Writes episodes on threads, once a second, each game's in order.

    Attributes:
        transitions: number by game, on disk or about to be written.
    """

    def __init__(self, writers: Mapping[str, ReplayWriter]):
        """Log to the given writers, one per game."""
        self._writers = writers
        self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="log")
        self._waiting: dict[str, list[dict[str, Any]]] = {game: [] for game in writers}
        self._size, self._began = 0, time.perf_counter()
        self._writes: list[Future] = []
        self.transitions = {game: writer.num_transitions for game, writer in writers.items()}

    def append(self, game: str, episode: dict[str, Any], **columns: float) -> None:
        """Add an episode to what waits; if that is too much, wait for the disk.

        Args:
            game: name of its game.
            episode: arguments of `ReplayWriter.append`.
            **columns: further columns of the episode table.

        Raises:
            ReplayError: an earlier episode could not be written.
        """
        length = len(episode["action"])
        self.transitions[game] += length
        self._size += length
        self._waiting[game].append(episode | columns)
        if self._size > TRANSITIONS_WAITING:
            self._write()

    def write_if_due(self) -> None:
        """Begin to write what waits, if the last write ended and began a second ago.

        Raises:
            ReplayError: an earlier episode could not be written.
        """
        if time.perf_counter() - self._began > WRITE_SECONDS and all(write.done() for write in self._writes):
            self._write()

    def wait(self) -> None:
        """Return when all episodes are on disk.

        Raises:
            ReplayError: one could not be written.
        """
        self._write()
        for write in self._writes:
            write.result()

    def _write(self) -> None:
        for write in self._writes:
            write.result()
        self._submit()

    def _submit(self) -> None:
        self._writes = [
            self._pool.submit(self._writers[game].extend, episodes)
            for game, episodes in self._waiting.items()
            if episodes
        ]
        self._waiting = {game: [] for game in self._writers}
        self._size, self._began = 0, time.perf_counter()

    def __enter__(self) -> "EpisodeLog":
        return self

    def __exit__(self, *_: object) -> None:
        wait(self._writes)  # one write of a game at a time
        self._submit()  # whatever else went wrong
        self._pool.shutdown()


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
