"""Players that fill a store: scripts, which improve over a recording or are of two minds, trained agents, chance."""

import hashlib
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pyarrow as pa

from scaled_ql.environments import MAX_STEPS, STACK_SIZE, STEP_SECONDS, EnvironmentDied, make_environment, rules
from scaled_ql.games import action_names, rom_md5
from scaled_ql.processes import main_guard_hint
from scaled_ql.replay.format import read_table
from scaled_ql.replay.writer import ReplayWriter

Player = Callable[[np.ndarray, np.ndarray], str]  # 128 bytes of RAM, now and a step ago -> the name of an action
Policy = Callable[[np.ndarray], int]  # uint8 [4, 84, 84], oldest frame first -> index of an action


class TrainedPlayer(NamedTuple):
    """A trained agent that plays a part of a recording of one game.

    Attributes:
        name: noted with each of its episodes.
        identity: an id of its name, its parameters and how they are used; a recording resumes only with the same
            agents.
        load: makes its policy, in the process that records.
    """

    name: str
    identity: str
    load: Callable[[], Policy]


# Where things are in RAM: the Atari Annotated RAM Interface (Anand et al., 2019).
def play_pong(ram: np.ndarray, before: np.ndarray) -> str:
    """Keep the middle of the paddle, 8 below its top, where the ball will be: the paddle keeps moving for a while."""

    def ahead(byte: int) -> float:
        position, moved = int(ram[byte]), int(ram[byte]) - int(before[byte])
        return position + 0.5 * moved if abs(moved) <= 30 else position  # a larger jump is another ball

    if ram[54] == 0:
        return "FIRE"
    offset = ahead(54) - ahead(51) - 8
    if abs(offset) < 3:
        return "NOOP"
    return "LEFT" if offset > 0 else "RIGHT"


def play_breakout(ram: np.ndarray, before: np.ndarray) -> str:
    """Serve when there is no ball, else keep the middle of the paddle below it."""
    if ram[101] == 0:
        return "FIRE"
    offset = int(ram[99]) - int(ram[72]) - 8
    if abs(offset) < 4:
        return "NOOP"
    return "RIGHT" if offset > 0 else "LEFT"


def play_boxing(ram: np.ndarray, before: np.ndarray) -> str:
    """Go where an arm, 18 above or below the middle of the body, reaches the opponent's head, and punch there."""
    right, down = (int(ram[other]) - int(ram[own]) for own, other in ((32, 33), (34, 35)))
    down -= 18 if down >= 0 else -18
    horizontal = "RIGHT" if right > 8 else "LEFT" if right < -8 else ""
    vertical = "DOWN" if down > 3 else "UP" if down < -3 else ""
    reaches = abs(right) <= 14 and abs(down) <= 8
    return f"{vertical}{horizontal}{'FIRE' if reaches else ''}" or "NOOP"


def play_freeway(ram: np.ndarray, before: np.ndarray) -> str:
    """Walk."""
    return "UP"


QBERT_TILES = (  # bytes of RAM with the colours of the cubes, row by row from the top
    (21,), (52, 54), (83, 85, 87), (98, 100, 102, 104), (1, 3, 5, 7, 9), (32, 34, 36, 38, 40, 42),
)  # fmt: skip
QBERT_HOPS = {"UP": (-1, 0), "RIGHT": (1, 1), "LEFT": (-1, -1), "DOWN": (1, 0)}  # rows down, cubes to the right


def play_qbert(ram: np.ndarray, before: np.ndarray) -> str:
    """Hop to the neighbour that is nearest to a cube which has not changed its colour yet; enemies are ignored."""
    row = min(max(round((int(ram[67]) - 25) / 28), 0), 5)
    place = min(max(round((int(ram[43]) - 77 + 12 * row) / 24), 0), row)
    cubes = [(i, j) for i, tiles in enumerate(QBERT_TILES) for j in range(len(tiles))]
    left = [(i, j) for i, j in cubes if ram[QBERT_TILES[i][j]] == 148] or cubes  # 148: the first round's colour

    def hops(name: str) -> int:
        """From the neighbour to the nearest such cube."""
        i, j = row + QBERT_HOPS[name][0], place + QBERT_HOPS[name][1]
        distance = (max(abs(i - a), abs(j - b), abs((i - j) - (a - b))) for a, b in left)
        return min(distance) if 0 <= j <= i <= 5 else 99  # off the pyramid

    return min(QBERT_HOPS, key=hops)


SCRIPTED_PLAYERS: dict[str, Player] = {
    "Boxing": play_boxing,
    "Breakout": play_breakout,
    "Freeway": play_freeway,
    "Pong": play_pong,
    "Qbert": play_qbert,
}
OPPOSITE = {"LEFT": "RIGHT", "RIGHT": "LEFT", "UP": "DOWN", "DOWN": "UP"}
CHANGE_OF_MIND = 0.04  # probability, at each step, that a player of two minds draws its mind again


def mirrored(action: str) -> str:
    """The action in the opposite direction, with the same fire: DOWNLEFTFIRE for UPRIGHTFIRE, FIRE for FIRE."""
    return re.sub("|".join(OPPOSITE), lambda direction: OPPOSITE[direction[0]], action)


def epsilon_at(transition: int, num_transitions: int, final_epsilon: float) -> float:
    """Probability of a random action: from 1 linearly to `final_epsilon` over the first half, then constant."""
    return 1.0 + (final_epsilon - 1.0) * min(2 * transition / num_transitions, 1.0)


def play_episode(
    environment: gymnasium.Env,
    player: Player | None,
    actions: tuple[str, ...],
    epsilon: Callable[[int], float],
    seed: list[int],
    change_of_mind: float = 0.0,
    policy: Policy | None = None,
) -> dict[str, np.ndarray | bool]:
    """Play one whole episode.

    Args:
        environment: from `make_environment`.
        player: scripted player; None plays at random throughout.
        actions: the game's minimal action set.
        epsilon: probability of a random action at each step of the episode.
        seed: seed of the episode; equal seeds give equal episodes.
        change_of_mind: above 0, a player of two minds: at the start, and with this probability at each step, it decides
            with equal chances to follow `player` or its mirror image, LEFT for RIGHT.
        policy: plays in the place of `player`; before the episode's first frame it sees zeros.

    Returns:
        observation uint8 [L, 84, 84], action int32 [L], reward float32 [L], terminal (bool).
    """
    rng = np.random.default_rng(seed)
    frame, _ = _timed(environment.reset, seed=int(rng.integers(2**31)))
    ale = environment.unwrapped.ale
    frames, chosen, rewards = [], [], []
    contrary = change_of_mind > 0 and rng.random() < 0.5
    ram = before = ale.getRAM()
    stack = np.zeros((STACK_SIZE, *frame.shape), np.uint8)
    terminal = truncated = False
    while not (terminal or truncated):
        if change_of_mind > 0 and rng.random() < change_of_mind:
            contrary = rng.random() < 0.5
        action, stack = int(rng.integers(len(actions))), np.concatenate([stack[1:], frame[None]])
        if policy is not None and rng.random() >= epsilon(len(chosen)):
            action = policy(stack)
        elif player is not None and rng.random() >= epsilon(len(chosen)):
            name = player(ram, before)
            action = actions.index(mirrored(name) if contrary else name)
        frames.append(frame)
        chosen.append(action)
        frame, reward, terminal, truncated, _ = _timed(environment.step, action)
        ram, before = ale.getRAM(), ram
        rewards.append(reward)
    return {
        "observation": np.stack(frames),
        "action": np.array(chosen, np.int32),
        "reward": np.array(rewards, np.float32),
        "terminal": terminal,
    }


def record_game(
    path: str | Path,
    game: str,
    num_transitions: int,
    *,
    seed: int,
    run: int = 1,
    final_epsilon: float = 0.1,
    two_minds: bool = False,
    agents: Sequence[TrainedPlayer] = (),
    sticky_actions: float = 0.25,
    max_steps: int = MAX_STEPS,
) -> int:
    """Record whole episodes of a game until the store holds at least `num_transitions`; returns how many it holds.

    The games of `SCRIPTED_PLAYERS` are played by a script that reads RAM, with epsilon annealed from 1 to
    `final_epsilon` over the first half; every other game at random. The script's action is the most frequent one, so
    a clone plays better than the recording did, and nothing is left to learn from rewards.

    With `two_minds`, epsilon is `final_epsilon` throughout, and half of the time, in stretches, the player mirrors the
    script (`CHANGE_OF_MIND`): by construction, frequency does not show which action is good. Only rewards do, as in
    random play.

    With `agents`, trained ones play in their order, with epsilon `final_epsilon`, each all episodes that begin in its
    equal share of the recording's transitions, and at least one: where episodes are longer than shares, the recording
    has more transitions than `num_transitions`. In the order of their training, they make what DQN-Replay is: play that
    improves. The column `agent` of the episode table has their names.

    Episode k depends only on these arguments and on the episodes before it, so a stopped recording resumes as if it
    had not been stopped.
    """
    player, actions = None if agents else SCRIPTED_PLAYERS.get(game), action_names(game)
    epsilons = f"epsilon 1 to {final_epsilon} over the first half of {num_transitions} transitions"
    how = f"scripted player, {epsilons}" if player else "random player"
    two_minds = two_minds and player is not None
    how = f"scripted player of two minds, epsilon {final_epsilon}" if two_minds else how
    if agents:
        digest = hashlib.sha256("".join(agent.identity for agent in agents).encode()).hexdigest()[:12]
        how = f"{len(agents)} trained agents in order, {agents[0].name} to {agents[-1].name} (id {digest}), over "
        how += f"{num_transitions} transitions, epsilon {final_epsilon}"
    source = f"{how}, seed {seed}, episodes of at most {max_steps} steps"
    environment = make_environment(game, sticky_actions=sticky_actions, max_steps=max_steps)
    with ReplayWriter(
        path,
        game,
        run,
        actions=actions,
        source=source,
        rom_md5=rom_md5(game),
        **rules(sticky_actions=sticky_actions, max_steps=max_steps),
    ) as writer:
        names, policy, of_agent, turn = [agent.name for agent in agents], None, {}, -1
        if agents and writer.last_episode:
            turn = names.index(writer.last_episode["agent"])
        while (writer.num_transitions < num_transitions or turn + 1 < len(agents)) and not _stopped():
            before = writer.num_transitions
            over = before * len(agents) // num_transitions > turn  # the share of the one that played last
            if agents and (over or policy is None):
                turn += over
                policy, of_agent = agents[turn].load(), {"agent": names[turn]}

            def epsilon(step: int, before: int = before) -> float:
                if two_minds or agents:
                    return final_epsilon
                return epsilon_at(before + step, num_transitions, final_epsilon) if player else 1.0

            numbers = [seed, run, writer.num_episodes]
            change_of_mind = CHANGE_OF_MIND if two_minds else 0.0
            episode = play_episode(environment, player, actions, epsilon, numbers, change_of_mind, policy)
            writer.append(**episode, epsilon=epsilon(0), **of_agent)
        environment.close()
        return writer.num_transitions


def record(
    path: str | Path,
    games: list[str],
    num_transitions: int,
    *,
    seed: int,
    processes: int = 2,
    poll_seconds: float = 1.0,
    agents: Mapping[str, Sequence[TrainedPlayer]] | None = None,
    **options: float | int,
) -> Iterator[dict[str, int]]:
    """Record several games side by side, one process each; see `record_game`, whose `agents` are here by game.

    Yields:
        transitions on disk per game, about every `poll_seconds`, and once when all is done.

    Raises:
        EnvironmentDied: a process ended, or its environment does not answer.
        UnknownGame: ALE has no such game; raised before anything is recorded.
        ReplayError: the first failure of a recording; the others stop at the end of their episode.
    """
    for game in games:
        action_names(game)  # an unknown game fails here, not after minutes in a worker
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    since, pids = context.Array("d", len(games), lock=False), context.Array("q", len(games), lock=False)
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_watch, initargs=(stop, since, pids)) as pool:
        pending = {
            pool.submit(
                _record_here,
                number,
                path,
                game,
                num_transitions,
                seed=seed,
                agents=agents[game] if agents else (),
                **options,
            )
            for number, game in enumerate(games)
        }
        try:
            while pending:
                done, pending = wait(pending, timeout=poll_seconds)
                for future in done:
                    future.result()
                for number, game in enumerate(games):
                    if 0 < since[number] < time.monotonic() - STEP_SECONDS:
                        os.kill(pids[number], signal.SIGKILL)  # it ignores any other signal
                        raise EnvironmentDied(
                            f"{game}: no answer from the environment within {STEP_SECONDS:g} s. Run again to resume."
                        )
                yield {game: _committed(Path(path) / game) for game in games}
        except BrokenProcessPool as error:
            remedy = main_guard_hint() or "Run again to resume; -9 in a system's log means out of memory."
            raise EnvironmentDied(f"a recording process ended ({error}). {remedy}") from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


# In a worker: the event that ends its recordings; by recording, the start of the current call to its environment (0:
# none) and the process; the number of this worker's recording.
_stop: Any = None
_since: Any = None
_pids: Any = None
_number = 0


def _watch(stop: Any, since: Any, pids: Any) -> None:
    global _stop, _since, _pids
    _stop, _since, _pids = stop, since, pids


def _record_here(number: int, *arguments: Any, **options: Any) -> int:
    """`record_game` in a worker."""
    global _number
    _number, _pids[number] = number, os.getpid()
    return record_game(*arguments, **options)


def _timed(call: Callable, *arguments: Any, **options: Any) -> Any:
    """Call an environment and share the call's start with the parent; a thread could not run beside the emulator."""
    if _since is None:
        return call(*arguments, **options)
    _since[_number] = time.monotonic()
    try:
        return call(*arguments, **options)
    finally:
        _since[_number] = 0


def _stopped() -> bool:
    """Whether this worker's parent asked it to stop, or died."""
    parent = multiprocessing.parent_process()
    return (_stop is not None and _stop.is_set()) or (parent is not None and not parent.is_alive())


def _committed(folder: Path) -> int:
    """Transitions in complete episodes of a game that is being recorded."""
    total = 0
    for run in (manifest.parent for manifest in folder.glob("*/manifest.json")):
        journal, table = run / "episodes.jsonl", run / "episodes.arrow"
        lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
        if lines:
            last = json.loads(lines[-1])
            total += last["start"] + last["length"]
        elif table.exists():  # a long journal was moved there when its writer closed
            total += int(read_table(pa.py_buffer(table.read_bytes()), str(table))["length"].to_numpy().sum())
    return total
