"""A plain model of the log that Dopamine's circular buffer leaves on disk, and naive readers of such logs."""

import gzip
from pathlib import Path

import numpy as np

PADDING = 3  # zero rows before each episode: one less than the stack
NO_FRAME = np.zeros((84, 84), np.uint8)


def save(file, array, level=1):
    with gzip.open(file, "wb", compresslevel=level) as target:
        np.save(target, array, allow_pickle=False)


def load(file):
    with gzip.open(file) as source:
        return np.load(source, allow_pickle=False)


def column_file(folder, name, number):
    return folder / f"$store$_{name}_ckpt.{number}.gz"


class DopamineLog:
    """Rows go to a ring of `capacity` rows; a dump of the whole ring is one file per column and number.

    Attributes:
        rows: what was added, by global index: None for padding, else (observation, action, reward, terminal).
        damaged: what was stored in place of columns of a row, by its global index.
        ends: the true add_count at each dump; file `number` holds the last `capacity` rows before ends[number].
        numbers: of the dumps; where not `automatic`, they are made by `dump` and have any.
    """

    def __init__(self, source, game="Pong", run=1, capacity=20, seed=0, automatic=True):
        self.automatic, self.numbers = automatic, []
        self.folder, self.game = Path(source) / game / str(run) / "replay_logs", game
        self.folder.mkdir(parents=True)
        self.capacity, self.rows, self.damaged, self.ends = capacity, [], {}, []
        rng, self.begins = np.random.default_rng(seed), True
        self.memory = {  # not initialised yet
            "observation": rng.integers(0, 256, (capacity, 84, 84), dtype=np.uint8),
            "action": rng.integers(-(2**31), 2**31, capacity).astype(np.int32),
            "reward": np.array([np.nan, np.inf, -1e30, 1e-40], np.float32)[rng.integers(4, size=capacity)],
            "terminal": rng.integers(0, 256, capacity, dtype=np.uint8),
        }

    def add(self, observation, action, reward, terminal, damage=None):
        """One transition, with padding first where an episode begins; `damage` is stored in place of its columns."""
        if self.begins:
            for _ in range(PADDING):
                self._write(None, observation=NO_FRAME, action=0, reward=0.0, terminal=0)
        if damage:
            self.damaged[len(self.rows)] = damage
        added = {"observation": observation, "action": action, "reward": reward, "terminal": terminal}
        self._write((observation, action, reward, terminal), **(added | (damage or {})))
        self.begins = bool(terminal)
        if self.automatic and len(self.rows) % self.capacity == self.capacity - 1:
            self.dump(len(self.ends), len(self.rows))

    def _write(self, row, **stored):
        for name, value in stored.items():
            self.memory[name][len(self.rows) % self.capacity] = value
        self.rows.append(row)

    def finish(self):
        """The last dump, which says where the cursor is instead of how many rows were added."""
        self.dump(len(self.ends), len(self.rows) % self.capacity)

    def dump(self, number, add_count):
        """Write the ring as it is, under any number and with what is said to have been added."""
        cursor = len(self.rows) % self.capacity
        for name, values in self.memory.items():
            save(column_file(self.folder, name, number), values)
        save(self.folder / f"add_count_ckpt.{number}.gz", np.array(add_count))
        save(self.folder / f"invalid_range_ckpt.{number}.gz", (cursor - 1 + np.arange(5)) % self.capacity)
        self.ends.append(len(self.rows))
        self.numbers.append(number)

    def add_episode(self, length, terminal=True, damage=None):
        """Transitions told apart by their global index; `damage` maps a step to what is stored in its place."""
        for step in range(length):
            number = len(self.rows)
            action, reward = number % 5 if self.game == "Pong" else number % 3, np.float32(number % 7 - 3) / 2
            ends = int(terminal and step == length - 1)
            self.add(unique_frame(number), action, reward, ends, (damage or {}).get(step))

    def remove(self, number):
        for file in self.folder.glob(f"*_ckpt.{number}.gz"):
            file.unlink()

    def place(self, index):
        """(file number, row) where a row with this global index is first found."""
        return next((n for n, end in enumerate(self.ends) if end > index), None), index % self.capacity

    def kept(self, lost=None):
        """Global indices that the files hold; `lost` maps numbers of files to the first row that they lack."""
        ends = [end for number, end in enumerate(self.ends) if number not in (lost or {})]
        kept = {index for end in ends for index in range(max(0, end - self.capacity), end)}
        for number, row in (lost or {}).items():
            end = self.ends[number]
            kept |= {index for index in range(max(0, end - self.capacity), end) if index % self.capacity < row}
        return kept

    def episodes(self, lost=None):
        """The episodes, or pieces of episodes, of which the files hold every row in between, in time order."""
        kept = self.kept(lost)
        found, current, before_is_known = [], None, True
        for index, row in enumerate(self.rows):
            if index not in kept or index in self.damaged:
                current, before_is_known = None, False
            elif row is None:
                current, before_is_known = None, True
            else:
                if current is None:
                    current = {"indices": [], "terminal": False, "continued": not before_is_known}
                    found.append(current)
                current["indices"].append(index)
                if row[3]:
                    current["terminal"], current, before_is_known = True, None, True
        for episode in found:
            added = [self.rows[index] for index in episode["indices"]]
            for name, column in zip(("observation", "action", "reward"), zip(*added)):
                episode[name] = np.array(column)
        return found

    def transition(self, index, n_step, discount, stack_size, clip_rewards):
        """The true transition at a global index of the whole log, whatever was lost of it."""

        def stack(end):
            frames, inside = np.zeros((84, 84, stack_size), np.uint8), True
            for back in range(stack_size):
                inside = inside and self.rows[end - back] is not None
                if inside:
                    frames[:, :, stack_size - 1 - back] = self.rows[end - back][0]
            return frames

        total, following, bootstrap = 0.0, index, discount**n_step
        for k in range(n_step):
            _, _, reward, terminal = self.rows[index + k]
            total += discount**k * (max(-1.0, min(1.0, float(reward))) if clip_rewards else float(reward))
            if terminal:
                bootstrap, following = 0.0, index + k
                break
            following = index + k + 1
        return stack(index), self.rows[index][1], total, bootstrap, stack(following)


def unique_frame(number):
    """A frame unlike any other, and never zero."""
    frame = np.full((84, 84), 1 + number % 251, np.uint8)
    frame[40] = 1 + number // 251
    return frame


def read_log(folder):
    """Episodes of an unbroken log on disk, one row at a time: lists of (observation, action, reward, terminal)."""
    numbers = sorted(int(file.name.split(".")[1]) for file in folder.glob("add_count_ckpt.*.gz"))
    rows = []
    for number in numbers:
        names = ("observation", "action", "reward", "terminal")
        columns = [load(column_file(folder, name, number)) for name in names]
        capacity, end = len(columns[0]), int(load(folder / f"add_count_ckpt.{number}.gz"))
        if number > 0 and end < capacity:  # the last file: where the cursor is
            end += (len(rows) + 1) // capacity * capacity
        assert len(rows) <= end <= len(rows) + capacity, f"file {number} does not continue the one before"
        for index in range(len(rows), end):
            rows.append(tuple(column[index % capacity] for column in columns))
    episodes, zeros = [[]], 0
    for observation, action, reward, terminal in rows:
        is_zero = not (action or reward or terminal or observation.any())
        if not episodes[-1] and is_zero and zeros < PADDING:
            zeros += 1
            continue
        episodes[-1].append((observation, action, reward, terminal))
        if terminal:
            episodes.append([])
            zeros = 0
    return [episode for episode in episodes if episode]
