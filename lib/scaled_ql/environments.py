"""ALE environments with the preprocessing of the data and of the paper's evaluation (Table B.1).

Grey frames, maximum over the last two of 4 emulator frames, area resize to 84 x 84, no no-op start, no fire on
reset, game over (not a lost life) ends an episode, 27,000 agent steps (108,000 frames) truncate it.
"""

import multiprocessing
import multiprocessing.connection
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import ale_py
import ale_py.vector_env
import gymnasium
import numpy as np

from scaled_ql.games import RULES, check_variant, rom_name
from scaled_ql.processes import main_guard_hint

T = TypeVar("T")

FRAME_SKIP = 4
STACK_SIZE = 4
MAX_STEPS = 27_000  # agent steps, Table B.1: 108K frames
STEP_SECONDS = 120.0  # an environment that takes longer for one step has hung
NO_ANSWER = (EOFError, OSError, TimeoutError, multiprocessing.TimeoutError)  # the last is no TimeoutError
OBSERVATION = "grey 84 x 84, maximum over 2 frames"

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)


class EnvironmentDied(RuntimeError):
    """An environment's process or thread ended or does not answer."""


class UnknownAction(ValueError):
    """An action outside the environment's set; ALE's threads would never answer it."""


def check_actions_sent(game: str, actions: np.ndarray, num_actions: int) -> None:
    """Check actions before an environment gets them.

    Args:
        game: name of the game, for the message.
        actions: integers, of any shape.
        num_actions: size of the environment's set.

    Raises:
        UnknownAction: an action below 0 or above `num_actions` - 1, or not an integer.
    """
    actions = np.asarray(actions)
    wrong = actions[(actions < 0) | (actions >= num_actions)]
    if not np.issubdtype(actions.dtype, np.integer) or wrong.size:
        sent = np.unique(wrong if wrong.size else actions).tolist()
        raise UnknownAction(
            f"{game}: actions {sent} are outside the environment's set, 0 to {num_actions - 1}. Was the agent trained "
            "on a recording with other actions? Compare its manifest's list of actions with games.action_names."
        )


def rules(
    *, sticky_actions: float, max_steps: int = MAX_STEPS, mode: int | None = None, difficulty: int | None = None
) -> dict[str, Any]:
    """The rules by which this module's environments play, keyed as `games.RULES`; for manifests and reports.

    Args:
        sticky_actions, max_steps, mode, difficulty: see `make_environment`.
    """
    return {
        "rewards": "raw",
        "life_loss_terminal": False,
        "frame_skip": FRAME_SKIP,
        "sticky_actions": sticky_actions,
        "mode": "default" if mode is None else mode,
        "difficulty": "default" if difficulty is None else difficulty,
        "action_set": "minimal",
        "observation": OBSERVATION,
        "max_steps": max_steps,
    }


def differing_rules(manifests: Iterable[Mapping[str, Any]], played: Mapping[str, Any]) -> list[str]:
    """Differences between the rules of recordings and the rules of play, one phrase each.

    Args:
        manifests: manifests of a game's recordings; a rule that is None is unknown and never differs.
        played: from `rules`.

    Returns:
        phrases such as ``"frame skip: 1 in the data, 4 here"``; empty if all known rules agree.
    """
    manifests, found = list(manifests), []
    for name, words in RULES.items():
        values = [manifest[name] for manifest in manifests if manifest.get(name) not in (None, "", played[name])]
        distinct = sorted({in_words(value) for value in values})
        if distinct:
            found.append(f"{words}: {', '.join(distinct)} in the data, {in_words(played[name])} here")
    return found


def compare_rules(manifests: Mapping[str, Iterable[Mapping[str, Any]]], played: Mapping[str, Any]) -> str:
    """Compare the rules of recordings with the rules of play, in a sentence or two for a caption.

    Args:
        manifests: manifests of each game's recordings.
        played: from `rules`.
    """
    games: dict[str, list[str]] = {}
    unknown: dict[str, list[str]] = {}
    for game, recordings in manifests.items():
        recordings = list(recordings)
        for phrase in differing_rules(recordings, played):
            games.setdefault(phrase, []).append(game)
        for name, words in RULES.items():
            if any(recording.get(name) in (None, "") for recording in recordings):
                unknown.setdefault(words, []).append(game)

    def listed(found: dict[str, list[str]]) -> str:
        return "; ".join(
            phrase if len(of) == len(manifests) else f"{phrase} ({', '.join(of)})" for phrase, of in found.items()
        )

    differing = f"Recorded under other rules: {listed(games)}." if games else "Recorded under no other rules."
    return f"{differing} Not known of the recordings: {listed(unknown)}." if unknown else differing


def in_words(value: Any) -> str:
    """Format the value of a rule for a report."""
    if value in (None, ""):
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " to ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def whole_rewards(rewards: np.ndarray) -> np.ndarray:
    """Raw rewards, of any shape and dtype, without the million that ALE takes off when a score passes it.

    Asterix, Defender and VideoPinball show six digits, and a reward is the difference of two scores.
    """
    return np.where(rewards < -500_000, rewards + 1_000_000, rewards).astype(rewards.dtype)


class _Preprocessing(gymnasium.wrappers.AtariPreprocessing):
    """`AtariPreprocessing` with `whole_rewards`, which refuses an action of -1 instead of taking it for the last."""

    def __init__(self, game: str, environment: gymnasium.Env):
        super().__init__(environment, noop_max=0, frame_skip=FRAME_SKIP)
        self._game = game

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        check_actions_sent(self._game, action, self.action_space.n)
        frame, reward, *rest = super().step(action)
        return frame, float(whole_rewards(np.float64(reward))), *rest


def make_environment(
    game: str,
    *,
    sticky_actions: float = 0.25,
    max_steps: int = MAX_STEPS,
    mode: int | None = None,
    difficulty: int | None = None,
) -> gymnasium.Env:
    """Make one environment with single frames, uint8 [84, 84], and raw rewards.

    A step runs in the caller's thread and blocks all other threads of the process, so only another process can enforce
    a time limit: `collect.record` and `ProcessVectorEnv` do.

    Args:
        game: name as in the paper.
        sticky_actions: probability that the emulator repeats the previous action, at every emulator frame.
        max_steps: agent steps after which an episode is truncated.
        mode: game mode of ALE (None: the default).
        difficulty: game difficulty of ALE (None: the default).

    Its `step` raises `UnknownAction`.

    Raises:
        UnknownGame: ALE does not have it.
        UnknownVariant: the game does not have that mode or difficulty.
    """
    check_variant(game, mode, difficulty)
    environment = ale_py.AtariEnv(
        rom_name(game),
        mode=mode,
        difficulty=difficulty,
        frameskip=1,
        repeat_action_probability=sticky_actions,
        max_num_frames_per_episode=FRAME_SKIP * max_steps,
    )
    return _Preprocessing(game, environment)


class ProcessVectorEnv(gymnasium.vector.AsyncVectorEnv):
    """Environments of `make_environment` with stacked frames, one process each; slower than `AtariVectorEnv`.

    `send` begins a step of all environments, `recv` returns its results.

    Raises:
        EnvironmentDied: from the constructor and from any call that waits for a process.
        UnknownAction: from `send` and `step`.
    """

    def __init__(self, game: str, num_environments: int, *, screens: bool = False, **options: Any):
        self._game = game
        make = partial(_make_screens if screens else _make_stacked, game, options)
        super().__init__([make] * num_environments, context="forkserver")  # a fork of a program with threads may hang

    def _check_spaces(self) -> None:
        """Wait for the first answers of the processes."""
        calls, results = _serve_calls()
        try:
            _within_limit(calls, results, super()._check_spaces)
        except NO_ANSWER as error:
            raise self._died(error) from error
        finally:
            calls.put(None)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """(stacks, info) after a reset of all environments."""
        try:
            self.reset_async(seed=seed, options=options)
            return self.reset_wait(STEP_SECONDS)
        except NO_ANSWER as error:
            raise self._died(error) from error

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """`send` and `recv`."""
        self.send(actions)
        return self.recv()

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """Kill the processes: they hold nothing to save, and a hung one ignores any request."""
        for process in self.processes:
            process.kill()
        for pipe in self.parent_pipes:
            if pipe is not None:
                pipe.close()
        for process in self.processes:
            process.join()

    def send(self, actions: np.ndarray) -> None:
        """Begin a step with integer actions [N]."""
        check_actions_sent(self._game, actions, self.single_action_space.n)
        try:
            self.step_async(actions)
        except OSError as error:
            raise self._died(error) from error

    def recv(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """(stacks, rewards, terminated, truncated, info) of the step that `send` began."""
        try:
            return self.step_wait(STEP_SECONDS)
        except NO_ANSWER as error:
            raise self._died(error) from error

    def _died(self, error: Exception) -> EnvironmentDied:
        if isinstance(error, (EOFError, OSError)) and not isinstance(error, TimeoutError):
            multiprocessing.connection.wait(
                [process.sentinel for process in self.processes], timeout=5
            )  # a pipe ends first
        dead = [str(number) for number, process in enumerate(self.processes) if not process.is_alive()]
        what = f"environment {', '.join(dead)} of {self.num_envs} ended" if dead else "an environment does not answer"
        self.close()
        remedy = main_guard_hint() or "Run again to resume."
        return EnvironmentDied(f"{self._game}: {what} ({type(error).__name__}: {error}). {remedy}")


def _make_stacked(game: str, options: dict[str, Any]) -> gymnasium.Env:
    environment = make_environment(game, **options)
    return gymnasium.wrappers.FrameStackObservation(environment, STACK_SIZE, padding_type="zero")


def _make_screens(game: str, options: dict[str, Any]) -> gymnasium.Env:
    environment = make_environment(game, **options)
    screen, space = environment.unwrapped.ale.getScreenRGB, environment.unwrapped.observation_space
    shown = gymnasium.spaces.Box(0, 255, (1, *space.shape), np.uint8)
    return gymnasium.wrappers.TransformObservation(environment, lambda _: screen()[None], shown)


class ThreadVectorEnv(ale_py.vector_env.AtariVectorEnv):
    """ALE's environments on C++ threads, with checked actions and a time limit on every wait.

    Raises:
        EnvironmentDied: from any call that waits for the threads.
        UnknownAction: from `send` and `step`.
    """

    def __init__(self, game: str, num_environments: int, **options: Any):
        super().__init__(rom_name(game), num_environments, **options)
        self._game = game
        self._serve()

    def _serve(self) -> None:
        self._calls, self._results = _serve_calls()
        weakref.finalize(self, self._calls.put, None)

    def _wait(self, call: Callable[[], T]) -> T:
        try:
            return _within_limit(self._calls, self._results, call)
        except TimeoutError as error:
            self._serve()  # a late result must not answer a later call
            raise EnvironmentDied(f"{self._game}: {error} Run again to resume.") from error

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """See the base class."""
        return self._wait(partial(super().reset, **options))

    def send(self, actions: np.ndarray) -> None:
        """Begin a step with integer actions [N]."""
        check_actions_sent(self._game, actions, self.single_action_space.n)
        super().send(actions)

    def recv(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """(stacks, rewards, terminated, truncated, info) of the step that `send` began."""
        stacks, rewards, *rest = self._wait(super().recv)
        return stacks, whole_rewards(rewards), *rest

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """`send` and `recv`."""
        self.send(actions)
        return self.recv()


def _serve_calls() -> tuple[queue.SimpleQueue, queue.SimpleQueue]:
    """Start a thread that makes calls for one that waits with a limit: (calls, results); None ends it."""
    calls, results = queue.SimpleQueue(), queue.SimpleQueue()

    def serve() -> None:
        while call := calls.get():
            try:
                result = call(), None
            except Exception as error:
                result = None, error
            del call  # it holds the environment
            results.put(result)

    threading.Thread(target=serve, daemon=True, name="environment").start()  # a hung one keeps no program alive
    return calls, results


def _within_limit(calls: queue.SimpleQueue, results: queue.SimpleQueue, call: Callable[[], T]) -> T:
    """The result of a call, made by the thread of `_serve_calls`.

    Raises:
        TimeoutError: it took longer than `STEP_SECONDS`.
    """
    calls.put(call)
    try:
        result, error = results.get(timeout=STEP_SECONDS)
    except queue.Empty as late:
        raise TimeoutError(f"no answer from the environments within {STEP_SECONDS:g} s.") from late
    if error is not None:
        raise error
    return result


VectorEnvironment = ThreadVectorEnv | ProcessVectorEnv


def make_vector_environment(
    game: str,
    num_environments: int,
    *,
    sticky_actions: float = 0.0,
    max_steps: int = MAX_STEPS,
    num_threads: int = 0,
    mode: int | None = None,
    difficulty: int | None = None,
    screens: bool = False,
) -> VectorEnvironment:
    """Make environments of one game; without sticky actions, frames and rewards equal `make_environment`'s bit for bit.

    Observations are stacks, uint8 [N, 4, 84, 84], oldest frame first, frames before an episode's start zero.
    An environment that ended resets on its next step, whose action is ignored and whose reward is 0. Where game over
    coincides with the step limit, `truncated` may be set along with `terminated`.

    The default variant runs on C++ threads. These support no mode or difficulty, so any other variant runs in one
    process per environment.

    Args:
        game: name as in the paper.
        num_environments: number of environments.
        sticky_actions: as in `make_environment`.
        max_steps: as in `make_environment`.
        num_threads: threads of the default variant; 0: one per core that the process may use.
        mode: as in `make_environment`.
        difficulty: as in `make_environment`.
        screens: observe colour screens, uint8 [N, 1, 210, 160, 3], of the same play.

    Raises:
        EnvironmentDied: they do not answer; also from any call that waits for them.
        UnknownAction: from `send` and `step`, an action outside the game's set.
        UnknownGame: ALE does not have it.
        UnknownVariant: the game does not have that mode or difficulty.
    """
    if mode is not None or difficulty is not None:
        check_variant(game, mode, difficulty)
        options = {"sticky_actions": sticky_actions, "max_steps": max_steps, "mode": mode, "difficulty": difficulty}
        return ProcessVectorEnv(game, num_environments, screens=screens, **options)
    return ThreadVectorEnv(
        game,
        num_environments,
        num_threads=num_threads or min(num_environments, len(os.sched_getaffinity(0))),  # ALE's 0: the machine's cores
        max_num_frames_per_episode=FRAME_SKIP * max_steps,
        repeat_action_probability=sticky_actions,
        stack_num=1 if screens else STACK_SIZE,
        **({"grayscale": False, "img_height": 210, "img_width": 160} if screens else {}),
        frameskip=FRAME_SKIP,
        noop_max=0,
        use_fire_reset=False,
        reward_clipping=False,
    )
