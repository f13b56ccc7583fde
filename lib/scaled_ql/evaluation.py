"""Evaluation in ALE: greedy policies, whole episodes, videos (appendix B.3)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import jax
import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from scaled_ql.defaults import EVAL_EPSILON
from scaled_ql.environments import MAX_STEPS, make_vector_environment
from scaled_ql.games import NUM_ACTIONS, action_names, full_actions
from scaled_ql.methods.common import Method, Preferences, PyTree
from scaled_ql.metrics import digits
from scaled_ql.replay.format import FRAME_SHAPE
from scaled_ql.replay.sequences import Sequences

# uint8 [N, 4, 84, 84] stacks -> float32 [N, actions]: the largest is played, -inf never
QFunction = Callable[[np.ndarray], np.ndarray]


class MemoryPlayer:
    """A trained policy for one game that sees the last steps of its episode, and not a stack alone.

    Attributes:
        length: steps that it sees, T.
        full: int32 [actions], where the game's actions stand in the full joystick.
    """

    def __init__(self, prefer: Callable, params: PyTree, game_index: int, names: Sequence[str], length: int):
        """Make the player.

        Args:
            prefer: from `methods.Method.preferences` of a method with a memory.
            params: online parameters.
            game_index: number of the game.
            names: the game's minimal action set.
            length: the method's memory.
        """
        self._prefer, self._params, self._game = prefer, params, game_index
        self.length, self.full = length, full_actions(names)

    def __call__(self, windows: Sequences, draw: np.ndarray) -> np.ndarray:
        """Log-probabilities of the game's actions, float32 [N, actions]; -inf: never played.

        An action that the game does not have is played as its first, NOOP.

        Args:
            windows: of `History.see`; their game is not read.
            draw: int32 [N, 3], numbers that a row's random choices are a function of.
        """
        windows = windows._replace(game=np.full(len(draw), self._game, np.int32))
        return self.in_game(np.asarray(self._prefer(self._params, windows, draw)))

    def in_game(self, log_policy: np.ndarray) -> np.ndarray:
        """Log-probabilities of the game's actions, from those of the full joystick's, float32 [N, 18]."""
        values = log_policy[:, self.full]
        absent = np.setdiff1d(np.arange(NUM_ACTIONS), self.full)
        values[:, 0] = np.logaddexp.reduce(log_policy[:, [self.full[0], *absent]], axis=1)
        return values


class History:
    """What players with a memory see of episodes that are being played, several side by side.

    Args:
        player: the player.
        environments: int [N], numbers of the environments.
        seed: seed of the player's random choices.
        step: number of the next step; two plays with the same seed, environment and step choose alike.
    """

    def __init__(self, player: MemoryPlayer, environments: np.ndarray, seed: int, step: int = 0):
        shape = (len(environments), player.length)
        self._full, self._collected = player.full, np.zeros(len(environments), np.float32)
        self._numbers, self._step = np.stack([np.full(len(environments), seed % 2**31), environments], 1), step
        self._windows = Sequences(
            frames=np.zeros((*shape, *FRAME_SHAPE), np.uint8),
            action=np.zeros(shape, np.int32),
            reward=np.zeros(shape, np.float32),
            return_to_go=np.zeros(shape, np.float32),
            terminal=np.zeros(shape, bool),
            mask=np.zeros(shape, bool),
            game=np.zeros(len(environments), np.int32),
        )

    def see(self, frames: np.ndarray, begins: np.ndarray) -> tuple[Sequences, np.ndarray]:
        """Add a step; returns new windows that end with it, and their `draw`: a `MemoryPlayer`'s arguments.

        Its action and reward, which are not known yet, are 0. `return_to_go` is what the episode has given before each
        step, negated: added to the return that an episode is to have, it is what is still to come.

        Args:
            frames: uint8 [N, 84, 84].
            begins: bool [N], whether it is its episode's first.
        """
        self._collected = np.where(begins, 0, self._collected).astype(np.float32)
        latest = {"frames": frames, "return_to_go": -self._collected, "mask": np.ones(len(frames), bool)}
        grown = {}
        for name, array in self._windows._asdict().items():
            if name != "game":
                kept = np.where(begins.reshape(-1, *[1] * (array.ndim - 1)), 0, array[:, 1:]).astype(array.dtype)
                last = latest.get(name, np.zeros(len(frames), array.dtype))
                grown[name] = np.concatenate([kept, last[:, None]], axis=1)
        self._windows = self._windows._replace(**grown)
        draw = np.column_stack([self._numbers, np.full(len(frames), self._step)]).astype(np.int32)
        self._step += 1
        return self._windows, draw

    def act(self, actions: np.ndarray, rewards: np.ndarray) -> None:
        """Note what was done in the step seen last, int [N] in the game's set, and what it gave, raw [N]."""
        action, reward = self._windows.action.copy(), self._windows.reward.copy()
        action[:, -1], reward[:, -1] = self._full[actions], np.clip(rewards, -1, 1)
        self._windows = self._windows._replace(action=action, reward=reward)
        self._collected = self._collected + reward[:, -1]


def make_player(
    method: Method, prefer: Callable, params: PyTree, game_index: int, names: Sequence[str]
) -> QFunction | MemoryPlayer:
    """A trained network as a player of one game, for `evaluate` and `record_film`.

    Args:
        method: the method that trained it.
        prefer: from its `preferences`.
        params: online parameters.
        game_index: number of the game.
        names: the game's minimal action set.
    """
    if method.memory:
        return MemoryPlayer(prefer, params, game_index, names, method.memory)
    return make_q_function(prefer, params, game_index, len(names))


def make_q_function(prefer: Preferences, params: PyTree, game_index: int, num_actions: int) -> QFunction:
    """A trained network's values, or other preferences, for one game's actions.

    Args:
        prefer: from `methods.Method.preferences`.
        params: online parameters.
        game_index: number of the game's head.
        num_actions: size of the game's minimal set; the other outputs are cut off.

    Returns:
        uint8 [N, 4, 84, 84] (frames second, as environments give them) -> float32 [N, num_actions].
    """

    def q_function(stacks: np.ndarray) -> np.ndarray:
        game = np.full(len(stacks), game_index, np.int32)
        return np.asarray(prefer(params, np.moveaxis(stacks, 1, -1), game))[:, :num_actions]

    return q_function


def play_randomly(stacks: np.ndarray) -> np.ndarray:
    """Q function of a random player, for `evaluate` with epsilon = 1."""
    return np.zeros((len(stacks), 1), np.float32)


def constant_action(action: int) -> QFunction:
    """Q function of a player that always prefers one action, like a greedy network that learned nothing."""

    def q_function(stacks: np.ndarray) -> np.ndarray:
        values = np.full((len(stacks), action + 1), -np.inf, np.float32)
        values[:, action] = 0
        return values

    return q_function


def best_constant_action(game: str, **protocol: Any) -> pd.DataFrame:
    """Evaluate each of a game's actions, played constantly.

    The best of several noisy means is an optimistic estimate: as a control it errs on the safe side.

    Args:
        game: name as in the paper.
        protocol: keyword arguments of `evaluate`.

    Returns:
        one row per action, best first: action (name), episode_return (mean, raw), episodes, steps, truncated (share).
    """
    rows = []
    for number, name in enumerate(action_names(game)):
        played = evaluate(constant_action(number), game, **protocol)
        means = {"episode_return": played["episode_return"].mean(), "episodes": len(played)}
        rows.append({"action": name, **means, "steps": played["length"].sum(), "truncated": played["truncated"].mean()})
    return pd.DataFrame(rows).sort_values("episode_return", ascending=False, kind="stable", ignore_index=True)


def batch_sizes(slots: int) -> set[int]:
    """Sizes of the batches that `evaluate` gives to a player of so many environments: all, and on a CPU a quarter.

    An accelerator takes as long for few as for many; and each size of a batch is a program to compile.
    """
    return {slots, -(-slots // 4)} if jax.default_backend() == "cpu" else {slots}


def evaluate(
    q_function: QFunction | MemoryPlayer,
    game: str,
    *,
    episodes: int,
    seed: int,
    min_steps: int = 0,
    epsilon: float = EVAL_EPSILON,
    temperature: float = 0.0,
    max_steps: int = MAX_STEPS,
    num_environments: int = 16,
    sticky_actions: float = 0.0,
    mode: int | None = None,
    difficulty: int | None = None,
    keep_actions: bool = False,
) -> pd.DataFrame:
    """Play whole episodes, epsilon-greedily, in parallel environments.

    Every environment plays its share of the episodes and then further ones until it has played its share of the steps;
    it finishes every episode that it begins. This is Table B.1's rule, whole episodes until at least 125,000 steps,
    applied to each environment. Whether an environment begins an episode depends only on its earlier ones, so the
    expected sum of returns is the mean return times the expected number of episodes (Wald's identity). Stopping
    all environments at some step instead would drop long episodes more often than short ones.

    On a CPU, once no more than a quarter of the environments have anything left to play, the player gets a batch of a
    quarter of the size. The episodes are the same but for a network's rounding: in a batch of another size its values
    may differ in the last place, which matters where two actions are as close as that.

    Args:
        q_function: uint8 [N, 4, 84, 84] -> [N, actions]; or a player with a memory, empty at every episode's beginning.
        game: name as in the paper.
        episodes: total of whole episodes; with `min_steps` a minimum.
        seed: seed of the random actions and of the emulators.
        min_steps: minimum total of agent steps (Table B.1: 125,000); 0: no minimum.
        epsilon: probability of a random action (Table B.1: 0.001).
        temperature: 0 plays the largest value; above 0, actions are drawn from softmax(values / temperature): at 1 a
            clone whose values are log-probabilities plays its own policy.
        max_steps: agent steps after which an episode is truncated (Table B.1: 27,000).
        num_environments: maximum number of environments; never more than `episodes` or `min_steps`.
        sticky_actions: probability of a repeated action; 0 in the paper's evaluation, 0.25 in its data.
        mode, difficulty: the game's variant; see `make_vector_environment`.
        keep_actions: add a column `actions`, from which `record_film` plays an episode again.

    Returns:
        one row per episode: environment, episode_return (raw), length, truncated, and `action_<NAME>` for each of the
        game's actions: how often the player itself chose it. Epsilon's random actions are not counted, so a row's
        counts sum to its length without them, and a random player's are all 0. `actions` has a colon (so that no CSV
        reader takes it for a number) and a letter per step, a for the game's first action, random ones included.

    Raises:
        ValueError: the player chose an action outside the game's set.
    """
    slots = min(num_environments, max(episodes, min_steps))
    quota, share = (total // slots + (np.arange(slots) < total % slots) for total in (episodes, min_steps))
    variant = {"mode": mode, "difficulty": difficulty}
    environments = make_vector_environment(game, slots, sticky_actions=sticky_actions, max_steps=max_steps, **variant)
    rng, num_actions = np.random.default_rng(seed), environments.single_action_space.n
    stacks, _ = environments.reset(seed=int(rng.integers(2**30)))  # slot i: this seed + i
    sent: list[list[int]] = [[] for _ in range(slots)]
    played, steps, total, length = np.zeros(slots, int), np.zeros(slots, int), np.zeros(slots), np.zeros(slots, int)
    chosen, resetting, done = np.zeros((slots, num_actions), int), np.zeros(slots, bool), np.zeros(slots, bool)
    history = History(q_function, np.arange(slots), seed) if isinstance(q_function, MemoryPlayer) else None
    rows, begins = [], np.ones(slots, bool)
    few = min(batch_sizes(slots))
    while not done.all():
        size = few if (~done).sum() <= few else slots
        asked = np.sort(np.argsort(done, kind="stable")[:size])  # finished environments fill it up
        seen = history.see(stacks[:, -1], begins) if history else (stacks,)
        if size < slots:  # all need no copy
            seen = jax.tree.map(lambda x, asked=asked: x[asked], seen)
        values = q_function(*seen)
        if temperature > 0:  # the largest of values with Gumbel noise is a draw from their softmax
            values = values / temperature + rng.gumbel(size=(slots, values.shape[1]))[asked]
        actions = np.zeros(slots, int)
        actions[asked] = values.argmax(1)
        if actions.max() >= num_actions:
            environments.close()
            raise ValueError(
                f"{game} has {num_actions} actions, 0 to {num_actions - 1}; the player chose action {actions.max()}. "
                "Was it trained on another game, or with the full joystick?"
            )
        explore = rng.random(slots) < epsilon
        own = np.flatnonzero(~explore & ~resetting)
        chosen[own, actions[own]] += 1
        actions = np.where(explore, rng.integers(num_actions, size=slots), actions)
        environments.send(actions)
        for slot in np.flatnonzero(~resetting) if keep_actions else ():
            sent[slot].append(actions[slot])
        stacks, reward, terminated, truncated, _ = environments.recv()
        if history:
            history.act(actions, reward)
        begins = resetting
        total += np.where(resetting, 0, reward)
        length += ~resetting
        ended = (terminated | truncated) & ~resetting
        for slot in np.flatnonzero(ended & ~done):
            kept = (":" + "".join(chr(ord("a") + action) for action in sent[slot]),) if keep_actions else ()
            rows.append((slot, total[slot], length[slot], bool(truncated[slot]), *kept, *chosen[slot]))
        played += ended
        steps += np.where(ended, length, 0)
        done |= ended & (played >= quota) & (steps >= share)
        total[ended], length[ended], chosen[ended] = 0, 0, 0
        for slot in np.flatnonzero(ended):
            sent[slot].clear()
        resetting = ended
    environments.close()
    columns = ["environment", "episode_return", "length", "truncated", *(["actions"] if keep_actions else [])]
    return pd.DataFrame(rows, columns=[*columns, *(f"action_{name}" for name in action_names(game))])


def mean_random_frame(game: str, seed: int, num_frames: int = 1_000, **rules: Any) -> np.ndarray:
    """Mean frame of random play: what `replay.mean_frames` is where nothing was recorded.

    Args:
        game: name as in the paper.
        seed: seed of the play.
        num_frames: frames in all, every sixteenth of eight episodes or more side by side.
        rules: sticky actions and variant; see `make_vector_environment`.

    Returns:
        float32 [84, 84], from 0 to 255.
    """
    environments, rng = make_vector_environment(game, 8, **rules), np.random.default_rng(seed)
    environments.reset(seed=int(rng.integers(2**30)))
    total, steps = np.zeros((84, 84)), -(-num_frames // 8)
    for _ in range(steps):
        for _ in range(16):
            stacks = environments.step(rng.integers(environments.single_action_space.n, size=8))[0]
        total += stacks[:, -1].mean(0, dtype=np.float64)
    environments.close()
    return (total / steps).astype(np.float32)


def mean_interval(returns: np.ndarray, seed: int = 0, confidence: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the mean over episodes: how well one agent was measured, not how well training repeats."""
    returns = np.asarray(returns, np.float64)
    means = np.random.default_rng(seed).choice(returns, (10_000, len(returns))).mean(1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def repeated(played: Mapping[str, pd.DataFrame]) -> str:
    """A sentence that names games with equal episodes, whose intervals are too narrow; "" if there are none.

    Without sticky actions and with few random moves a policy plays one episode again and again. Equal in return and
    length counts as equal; truncated episodes, which are equally long, count as different.

    Args:
        played: tables of `evaluate` by game.
    """
    few = []
    for game, episodes in played.items():
        whole = episodes[~episodes["truncated"]]
        copies = whole.duplicated(["episode_return", "length"]).sum()
        if copies > 0.2 * len(episodes):
            few.append(f"{game} {len(episodes) - copies} of {len(episodes)}")
    return f"Different episodes: {', '.join(few)}; the others are copies, and intervals too narrow." if few else ""


def verdict(scores: pd.DataFrame) -> str:
    """One agent's result in words, a line of Markdown per game.

    Args:
        scores: index game; columns agent, low, high (95% interval of its mean over episodes), and the players to
            compare it with, whose own uncertainty is neglected; NaN where a player was not measured.
    """
    lines = []
    for game, row in scores.iterrows():
        others = row.drop(["agent", "low", "high"]).dropna()
        above, below = others[others < row["low"]], others[others > row["high"]]
        groups = {"above": above, "below": below, "not told apart from": others.drop([*above.index, *below.index])}
        words = [
            f"{relation} {', '.join(f'{name} ({digits(value)})' for name, value in group.items())}"
            for relation, group in groups.items()
            if len(group)
        ]
        agent, low, high = (digits(row[name]) for name in ("agent", "low", "high"))
        lines.append(f"- **{game}: {agent}** ({low} to {high}), {'; '.join(words)}")
    return "\n".join(lines)


def score_curve(folder: Path) -> pd.DataFrame:
    """Mean raw returns over the course of a training run.

    Args:
        folder: holds ``step-<gradient steps>/<game>.csv``, each a table of `evaluate`; other files are ignored.

    Returns:
        columns game, step, agent_return, episodes, truncated (share of them); sorted by game and step.
    """
    rows = []
    for file in folder.glob("step-*/*.csv"):
        if file.stem.isalnum():  # no partial file and no other kind of play
            played = pd.read_csv(file)
            means = {"agent_return": played["episode_return"].mean(), "truncated": played["truncated"].mean()}
            step = int(file.parent.name.removeprefix("step-"))
            rows.append({"game": file.stem, "step": step, "episodes": len(played)} | means)
    columns = ["game", "step", "agent_return", "episodes", "truncated"]
    return pd.DataFrame(rows, columns=columns).sort_values(["game", "step"], ignore_index=True)


def representative(episodes: pd.DataFrame) -> int:
    """Row of the episode to film: the return nearest to the median, the longest on ties."""
    distance = (episodes["episode_return"] - episodes["episode_return"].median()).abs()
    return int(episodes[distance == distance.min()]["length"].idxmax())


def record_film(
    q_function: QFunction | MemoryPlayer,
    game: str,
    episodes: pd.DataFrame,
    number: int,
    file: str | Path,
    *,
    seed: int,
    sticky_actions: float = 0.0,
    max_steps: int = MAX_STEPS,
    mode: int | None = None,
    difficulty: int | None = None,
    num_steps: int = 900,
    frames_per_second: int = 30,
    label: str = "Q(s, a)",
) -> float:
    """Play an evaluation's episode again and write an MP4 of it, with the value of each action next to the screen.

    Args:
        q_function: as in the evaluation; only shown, the actions are the evaluation's.
        game: name as in the paper.
        episodes: from `evaluate`, with `keep_actions`.
        number: row of the episode.
        file: file to write.
        seed, sticky_actions, max_steps, mode, difficulty: as in the evaluation.
        num_steps: maximum number of agent steps shown (15 are a second of the game); idle stretches are skipped, see
            `eventful`.
        frames_per_second: frame rate of the video; 30 is twice the game's speed.
        label: name of the values.

    Returns:
        the episode's raw return.
    """
    names, slot = action_names(game), int(episodes.loc[number, "environment"])
    before = episodes.loc[:number]
    actions = [
        [ord(letter) - ord("a") for letter in row[1:]] for row in before[before["environment"] == slot]["actions"]
    ]
    first = int(np.random.default_rng(seed).integers(2**30)) + slot
    options = {"sticky_actions": sticky_actions, "max_steps": max_steps, "mode": mode, "difficulty": difficulty}
    rewards, still, last = [], [], None
    for stack, reward in _play_again(game, first, actions, options):
        still.append(last is not None and np.array_equal(stack[-1], last))
        last = stack[-1]
        rewards.append(reward)
    shown = eventful(np.array(rewards), np.array(still), num_steps)
    wanted = set(shown.tolist())
    both = zip(_play_again(game, first, actions, options), _play_again(game, first, actions, options, screens=True))
    history, seen, screens = None, [], []
    if isinstance(q_function, MemoryPlayer):  # an environment's steps are numbered with those that reset it
        history = History(q_function, np.array([slot]), seed, step=sum(len(played) + 1 for played in actions[:-1]))
    for step, ((stack, reward), (screen, _)) in enumerate(both):
        now = history.see(stack[-1:], np.array([step == 0])) if history else (stack[None],)
        if step in wanted:
            seen.append(now)
            screens.append(screen[0])
        if history:
            history.act(np.array([actions[-1][step]]), np.array([reward]))
    shown_first = seen[:1] * (-len(seen) % 64)  # one size is one compiled program
    padded = jax.tree.map(lambda *parts: np.concatenate(parts), *seen, *shown_first)
    parts = [jax.tree.map(lambda x, at=at: x[at : at + 64], padded) for at in range(0, len(seen), 64)]
    q = np.concatenate([q_function(*part) for part in parts])[: len(seen)]
    # One scale for the whole video, so that bars can be compared from frame to frame.
    low, high = q[np.isfinite(q)].min(), q.max()
    scores = np.cumsum(rewards) - rewards
    pictures = (
        _draw(screen, f"{game}   score {scores[step]:g}", f"step {step:,} of {len(rewards):,}", names, values,
              actions[-1][step], low, high, label)
        for step, screen, values in zip(shown, screens, q)
    )  # fmt: skip
    write_video(file, pictures, frames_per_second)
    return float(np.sum(rewards))


def eventful(rewards: np.ndarray, still: np.ndarray, number: int, patience: int = 15) -> np.ndarray:
    """The steps of an episode that a film shows, at most `number`: those nearest to an event.

    Args:
        rewards: [T]; a step with a reward is an event, and so are the first and the last.
        still: bool [T], whether the frame repeats the previous one; skipped from the `patience`-th in a row on.
        number: maximum number of steps.
        patience: steps without change before skipping.

    Returns:
        int [at most number], ascending.
    """
    steps = np.arange(len(rewards))
    idle = steps - np.maximum.accumulate(np.where(still, -1, steps)) >= patience
    events = np.union1d(np.flatnonzero(rewards), [0, len(rewards) - 1])
    after = np.clip(np.searchsorted(events, steps), 0, len(events) - 1)
    distance = np.minimum(np.abs(events[after] - steps), np.abs(steps - events[np.maximum(after - 1, 0)]))
    kept = np.flatnonzero(~idle | np.isin(steps, events))
    return np.sort(kept[np.argsort(distance[kept], kind="stable")[:number]])


def _play_again(
    game: str, seed: int, episodes: list[list[int]], options: dict[str, Any], screens: bool = False
) -> Iterator[tuple[np.ndarray, float]]:
    """Observation and reward of each step of the last of an environment's episodes, from all their actions."""
    environment = make_vector_environment(game, 1, screens=screens, num_threads=1, **options)
    observation, _ = environment.reset(seed=seed)
    for number, actions in enumerate(episodes):
        if number:
            observation = environment.step(np.zeros(1, int))[0]  # resets
        for action in actions:
            before = observation
            observation, reward, *_ = environment.step(np.array([action]))
            if number == len(episodes) - 1:
                yield before[0], float(reward[0])
    environment.close()


def _draw(
    screen: np.ndarray, title: str, place: str, names: tuple[str, ...], q: np.ndarray, action: int,
    low: float, high: float, label: str,
) -> np.ndarray:  # fmt: skip
    """The game's screen with a bar per action: uint8 [420, 640, 3]."""
    picture = Image.new("RGB", (640, 420), (250, 250, 250))
    picture.paste(Image.fromarray(screen).resize((320, 420), Image.Resampling.NEAREST))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
    draw.text((336, 6), title, (20, 20, 20), font=ImageFont.load_default(size=17))
    draw.text((336, 28), place, (90, 90, 90), font=font)
    draw.text((336, 44), f"{label}, bars from {low:.2f} to {high:.2f}", (90, 90, 90), font=font)
    pitch = min(34, 346 // len(names))
    for number, (name, value) in enumerate(zip(names, q)):
        top = 66 + number * pitch
        if not np.isfinite(value):
            draw.text((336, top), f"{name}: not allowed", (150, 150, 150), font=font)
            continue
        width = 4 + int(150 * (value - low) / max(high - low, 1e-6))
        color = (213, 94, 0) if number == action else (0, 114, 178)
        draw.text((336, top), name, (20, 20, 20), font=font)
        draw.rectangle((430, top, 430 + width, top + pitch - 6), color)
        draw.text((436 + width, top), f"{value:.2f}", (20, 20, 20), font=font)
    return np.asarray(picture)


def write_video(file: str | Path, pictures: object, frames_per_second: int) -> None:
    """Encode uint8 [H, W, 3] pictures as H.264, which every browser plays."""
    with av.open(str(file), "w") as container:
        stream = None
        for picture in pictures:
            if stream is None:
                options = {"crf": "26", "preset": "veryfast"}
                stream = container.add_stream("libx264", rate=frames_per_second, options=options)
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
