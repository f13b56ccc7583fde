"""This package and other libraries side by side: the same frames, the same machine, in turn, each in its own process.

`peer_rates` has the other libraries' part. They pin what others need in other versions (Gymnasium, Gym), so each may
live in a virtual environment of its own.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scaled_ql import benchmarks, peer_rates
from scaled_ql.environments import make_environment, make_vector_environment
from scaled_ql.games import action_names
from scaled_ql.peer_rates import ENVIRONMENTS, STEP_BATCH, rate
from scaled_ql.replay import Replay, View, open_replay, sample_batches
from scaled_ql.replay.memory import to_memory

OURS = "scaled-ql"
START_SECONDS = 600  # what takes longer, to start and to read its data, hangs
COLUMNS = ("measured", "library", "version", "round", "cores", "rate", "same")  # of a rate


def make_network() -> Any:
    """d3rlpy's Nature network, 1.69 million parameters for four actions; here heads have all 18."""
    from scaled_ql import networks

    plain = {"normalize_features": False, "layer_norm": False}
    return networks.make_q_network("nature", 1, "mse", hidden_sizes=(512,), **plain)


def _updates(store: str, view: View, seconds: float) -> float:
    """Updates per second of d3rlpy's DiscreteCQL as it is here: its network; two threads sample ahead, from memory.

    An update is three forward passes (states; next states through both networks) and one backward. d3rlpy's is four and
    two: it passes the states twice with gradients, for the TD loss and for CQL's; and it samples in between.
    """
    import jax

    from scaled_ql import devices, methods, training

    data, network = to_memory(open_replay(store, view)), make_network()
    optimizer = training.make_optimizer(6.25e-5, 1e-8)
    graph, state = training.init_state(network, optimizer)
    method = methods.q_learning(head="mse", alpha=1.0, double_q=True, scale_rewards="no")
    update = training.make_train_step(method.objective(graph, [len(data.action_names(data.games[0]))]), optimizer)
    shape = {"games_per_batch": STEP_BATCH // 4, "transitions_per_game": 4, "n_step": 1}
    batches = devices.place_batches(sample_batches(data, 0, 0, 10**9, **shape), devices.make_mesh(1))

    def work(step: int) -> None:
        nonlocal state
        for _ in range(10):
            state, metrics = update(state, next(batches))
        jax.block_until_ready(metrics["loss"])

    return rate(work, 10, seconds)


def _samples(store: str, view: View, seconds: float) -> float:
    """Transitions per second from the compressed store in memory, a thread per core; Dopamine samples on one."""
    return benchmarks.sampling_rate(to_memory(open_replay(store, view)), len(os.sched_getaffinity(0)), seconds)


def _steps(store: str, view: View, seconds: float) -> float:
    """Environment steps per second of ALE's own vector environment, as the package uses it."""
    (game,) = view.games
    environments, rng = make_vector_environment(game, ENVIRONMENTS), np.random.default_rng(0)
    environments.reset(seed=0)

    def work(step: int) -> None:
        for _ in range(10):
            environments.step(rng.integers(len(action_names(game)), size=ENVIRONMENTS))

    return rate(work, 10 * ENVIRONMENTS, seconds)


# What is measured: our part, and the libraries that do it, each (module, name on the package index).
MEASURED: dict[str, tuple[Callable[[str, View, float], float], dict[str, tuple[str, str]]]] = {
    "updates/s, Nature network, batch 32": (_updates, {"d3rlpy": ("d3rlpy", "d3rlpy")}),
    "transitions/s, batches of 512": (
        _samples, {"dopamine": ("dopamine", "dopamine-rl"), "torchrl": ("torchrl", "torchrl")},
    ),
    "environment steps/s, random actions": (_steps, {"envpool": ("envpool", "envpool")}),
}  # fmt: skip


def write_data(replay: Replay, folder: Path, episodes: int = 3, max_steps: int = 400) -> None:
    """Write what other libraries read: a game's transitions, and a few episodes of random play.

    Args:
        replay: a store of one game.
        folder: gets observation [T, 84, 84], action, reward [T], `starts` and `terminal` [episodes] as .npy, and
            played.npz: game, actions and rewards [episodes, max_steps], frames [episodes, max_steps, 84, 84] after
            them, lengths [episodes]. Each episode began with an emulator frame of no action; none is sticky.
        episodes: of random play.
        max_steps: at most, of each of them.
    """
    (game,) = replay.games
    table = replay.episodes(game)
    whole = [replay.episode(game, number) for number in range(len(table))]
    for name in ("observation", "action", "reward"):
        np.save(folder / f"{name}.npy", np.concatenate([one[name][: len(one["action"])] for one in whole]))
    np.save(folder / "starts.npy", np.cumsum([0, *(len(one["action"]) for one in whole[:-1])]))
    np.save(folder / "terminal.npy", table["terminal"].to_numpy())
    actions = np.random.default_rng(0).integers(len(action_names(game)), size=(episodes, max_steps))
    frames = np.zeros((episodes, max_steps, 84, 84), np.uint8)
    rewards, lengths = np.zeros((episodes, max_steps)), np.zeros(episodes, np.int64)
    environment = make_environment(game, sticky_actions=0.0)
    for number in range(episodes):
        environment.reset(seed=0)
        environment.unwrapped.ale.act(0)
        for step, action in enumerate(actions[number]):
            frames[number, step], rewards[number, step], ended, *_ = environment.step(int(action))
            lengths[number] = step + 1
            if ended:
                break
    played = {"actions": actions, "frames": frames, "rewards": rewards, "lengths": lengths}
    np.savez(folder / "played.npz", game=game, **played)


def find_python(library: str, module: str, environments: Path) -> str | None:
    """The Python that has a library: environments/<library>/bin/python if there is one, this one, or None."""
    own = environments / library / "bin" / "python"
    if own.exists():
        return str(own)
    return sys.executable if importlib.util.find_spec(module) else None


def measure(
    store: str, environments: str | Path, *, transitions: int = 20_000, seconds: float = 5.0, rounds: int = 5
) -> Iterator[dict[str, Any]]:
    """Measure this package and the libraries that are installed, in turn, `rounds` times.

    Args:
        store: a recording; the first `transitions` of its first game are used.
        environments: folder of virtual environments, each named after its library.
        transitions: of the episodes that begin within so many.
        seconds: duration of each measurement, besides its start.
        rounds: times that each is measured.

    Yields:
        rows: measured, library, version, round, cores, rate, and of environments `same`, whether they play the first
        steps of a few episodes as ALE does; or of what is left out: library, and `left out`, why, or how to install it.

    Raises:
        ReplayError: the store cannot be read.
        RuntimeError: this package's part failed.
    """
    view = View(games=open_replay(store).games[:1], between=[0, transitions])
    pythons: dict[str, str] = {}
    cores = len(os.sched_getaffinity(0))
    for _, libraries in MEASURED.values():
        for library, (module, package) in libraries.items():
            python, own = find_python(library, module, Path(environments)), Path(environments) / library
            if python:
                pythons[library] = python
            else:
                how = f"not installed: python3 -m venv {own} && {own}/bin/pip install {package}"
                yield {"library": library, "left out": how}
    with tempfile.TemporaryDirectory() as folder:
        write_data(open_replay(store, view), Path(folder))
        for number in range(rounds):
            for measured, (_, libraries) in MEASURED.items():
                ours = [sys.executable, "-m", "scaled_ql.peers", measured, store, view.model_dump_json()]
                commands = {OURS: ours} | {
                    library: [pythons[library], "-I", peer_rates.__file__, library, folder]
                    for library in libraries
                    if library in pythons
                }
                for library, command in commands.items():
                    found, failure = _answer([*command, str(seconds)], START_SECONDS + 2 * seconds)
                    if found:
                        row = {"measured": measured, "library": library, "round": number, "cores": cores}
                        yield row | found
                        continue
                    if library == OURS:
                        raise RuntimeError(f"{measured}: {failure}")
                    del pythons[library]
                    yield {"library": library, "left out": f"it failed: {failure}"}


def _answer(command: list[str], limit: float) -> tuple[dict[str, Any], str]:
    """What a command prints last, as JSON, or an empty one and why there is none: its last words, or its time is up."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {}, f"no rate after {limit:g} s"
    if done.returncode:
        return {}, (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return json.loads(done.stdout.splitlines()[-1]), ""


def read(file: str | Path) -> pd.DataFrame:
    """Read the rates that the command wrote.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not Path(file).exists():
        raise FileNotFoundError(f"{file}: no such file; scaled-ql benchmark peers STORE ENVIRONMENTS --csv writes one.")
    return pd.read_csv(file)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Medians over rounds, and ours relative to them.

    Args:
        rows: rates of `measure`.

    Returns:
        index measured, library; columns version, `median`, `least` and `most` of the rounds, `ours, times`: our median
        divided by the library's; `plays as ALE`, where `same` was measured: in all rounds.
    """
    groups = rows.groupby(["measured", "library"], sort=False)
    found = groups["rate"].agg(["median", "min", "max"]).set_axis(["median", "least", "most"], axis=1)
    ours = found["median"].xs(OURS, level="library").reindex(found.index.get_level_values("measured"))
    found.insert(0, "version", groups["version"].first())
    found["ours, times"] = ours.to_numpy() / found["median"]
    if "same" in rows and rows["same"].notna().any():
        found["plays as ALE"] = groups["same"].min().map({True: "yes", False: "no"}).fillna("")
    return found


if __name__ == "__main__":
    _, name, path, of, duration = sys.argv
    part, _ = MEASURED[name]
    measured_rate = part(path, View.model_validate_json(of), float(duration))
    print(json.dumps({"rate": measured_rate, "version": metadata.version("scaled-ql")}))
