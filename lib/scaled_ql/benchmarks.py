"""Measurements compared with the machine's limits: sampling, importing, playing and learning online.

They print tables and assert nothing: a number is meaningful only next to the others of the same run.
"""

import contextlib
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import zstandard

from scaled_ql.environments import make_vector_environment
from scaled_ql.games import TRAINING_GAMES, action_names
from scaled_ql.peer_rates import BATCH, N_STEP, STACK, rate
from scaled_ql.replay import Replay, ReplayError, export_dqn_replay, open_replay, prefetch, sample_batch, sample_batches
from scaled_ql.replay import format as fmt
from scaled_ql.replay.memory import to_memory
from scaled_ql.replay.writer import ReplayWriter, episode_rows

ROWS = 16_384  # of a game of the smallest store, which others repeat


def repeat_store(source: Replay, destination: str | Path, games: list[str], copies: int) -> Path:
    """Build a large dataset from real chunks: `ROWS` rows of `source` a game, repeated by linking files to one.

    Args:
        source: real recordings, whose games lend their frames in turn.
        destination: folder to create.
        games: names of the games to make.
        copies: how many times each game's rows are repeated.

    Returns:
        the folder.
    """
    rows, per_frames, per_scalars = ROWS, fmt.FRAME_SHARD // ROWS, fmt.SCALAR_SHARD // ROWS  # copies in a file
    lenders = {game: source.games[number % len(source.games)] for number, game in enumerate(games)}
    first: dict[str, Path] = {}
    lent: list[dict] = []
    made: dict[tuple[str, int], tuple[list, list]] = {}  # games of one lender and as many actions have the same rows
    for game, lender in sorted(lenders.items(), key=lambda pair: pair[1]):  # each lender's episodes are read once
        if lender not in first:
            lent = _first_episodes(source, lender, rows)
        folder = Path(destination) / game / "1"
        manifest = fmt.make_manifest(
            game, 1, actions=list(action_names(game)), source=f"frames of {lender}, repeated", sticky_actions=0.25
        )
        fmt.write_or_compare_manifest(folder, manifest)
        arrays = fmt.open_arrays(folder)
        number = len(manifest["actions"])
        if (lender, number) not in made:
            episodes, columns, at = [], [], 0
            for episode in lent:
                actions = episode["action"] % number
                data, entry = episode_rows(episode["observation"], actions, episode["reward"], True, at, at)
                episodes.append(entry)
                columns.append(data)
                at += len(actions)
            made[lender, number] = episodes, columns
        episodes, columns = made[lender, number]
        written = columns[0].keys() - ({"observation"} if lender in first else set())
        together = {name: np.concatenate([data[name] for data in columns]) for name in written}
        once = together.pop("observation", None)
        repeated = {name: np.tile(column, min(per_scalars, copies)) for name, column in together.items()}
        try:
            fmt.grow(arrays, rows * copies)
            for write in fmt.write_rows(arrays, 0, repeated):
                write.result()
            for k in range(0 if lender in first else min(per_frames, copies)):
                fmt.write_rows(arrays, k * rows, {"observation": once})[0].result()
        except fmt.STORE_ERRORS as error:
            raise ReplayError(
                f"{folder}: cannot be written ({fmt.said(error)}). Make room, or choose another folder."
            ) from error
        frames = first.setdefault(lender, folder / fmt.file_name("observation", 0))
        for k in range(-(-copies // per_frames)):
            target = folder / fmt.file_name("observation", k)
            if target != frames:
                os.link(frames, target)
        for name in fmt.ARRAYS.keys() - {"observation"}:
            for k in range(1, -(-copies // per_scalars)):
                os.link(folder / fmt.file_name(name, 0), folder / fmt.file_name(name, k))
        one = pd.DataFrame(episodes)
        table = pd.concat([one] * copies, ignore_index=True)
        shift = np.repeat(np.arange(copies) * rows, len(one))
        table["start"] += shift
        table["row"] += shift
        fmt.write_table(folder / "episodes.arrow", pa.Table.from_pandas(table, preserve_index=False))
    return Path(destination)


def sampling_rate(
    replay: Replay, threads: int, seconds: float, batch_size: int = BATCH, *, processes: int = 0
) -> float:
    """Transitions per second of batches from threads, or from `processes`, stack 4, n-step 3.

    Median over stretches of eight batches, each batch dropped when the next arrives.
    """
    shape = {"games_per_batch": batch_size // 4, "transitions_per_game": 4, "n_step": N_STEP, "stack_size": STACK}
    if processes:
        batches = sample_batches(replay, 0, 0, 10**9, processes=processes, **shape)
    else:
        batches = prefetch(lambda step: sample_batch(replay, 0, step, **shape), 0, 10**9, threads=threads)
    with contextlib.closing(batches):
        return rate(lambda step: deque(islice(batches, 8), maxlen=0), 8 * batch_size, seconds)


def zstd_rate(replay: Replay, seconds: float) -> float:
    """The limit: windows of 7 frames per second that zstd alone decodes in memory on all cores."""
    compress = zstandard.ZstdCompressor(level=3).compress
    chunks = []
    for game in replay.games:
        count = min(replay.num_transitions(game), 8_192) // fmt.INNER_CHUNK * fmt.INNER_CHUNK
        frames = replay.frames_at(game, np.arange(count))
        chunks += [compress(frames[i : i + fmt.INNER_CHUNK].tobytes()) for i in range(0, count, fmt.INNER_CHUNK)]
    touched = 1 + (STACK + N_STEP - 1) / fmt.INNER_CHUNK  # chunks that a window meets on average

    def decode(step: int) -> None:
        decompress = zstandard.ZstdDecompressor().decompress
        for chunk in np.random.default_rng(step).integers(len(chunks), size=round(BATCH * touched)).tolist():
            decompress(chunks[chunk])

    cores = len(os.sched_getaffinity(0))
    done = prefetch(decode, 0, 10**9, threads=cores)
    return rate(lambda step: [next(done) for _ in range(8)], 8 * BATCH, seconds)


def numpy_rate(replay: Replay, seconds: float, capacity: int = 50_000) -> float:
    """The usual baseline: stacks cut from one uncompressed ring buffer in memory, uint8 [capacity, 84, 84]."""
    game = max(replay.games, key=replay.num_transitions)
    capacity = min(capacity, replay.num_transitions(game))
    ring = replay.frames_at(game, np.arange(capacity))
    back = np.arange(1 - STACK, 1)

    def batch(step: int) -> np.ndarray:
        now = np.random.default_rng(step).integers(STACK, capacity - N_STEP, size=BATCH)
        return np.stack([ring[now[:, None] + back], ring[now[:, None] + N_STEP + back]]).transpose(0, 1, 3, 4, 2)

    return rate(batch, BATCH, seconds)


def benchmark_sampling(path: str, seconds: float = 5.0) -> pd.DataFrame:
    """Transitions per second from disk (warm page cache) and memory, compared with zstd's limit and a plain buffer."""
    replay, cores = open_replay(path), len(os.sched_getaffinity(0))
    rates = {"uncompressed NumPy ring buffer, one thread": numpy_rate(replay, seconds)}
    for name, where in (("disk", replay), ("memory, compressed", to_memory(replay))):
        for threads in sorted({1, cores, 2 * cores}):
            rates[f"{name}, {threads} threads"] = sampling_rate(where, threads, seconds)
        for processes in sorted({1, cores}):
            rates[f"{name}, {processes} processes"] = sampling_rate(where, 0, seconds, processes=processes)
    rates[f"limit: zstd alone, {cores} threads"] = zstd_rate(replay, seconds)
    return pd.DataFrame({"transitions/s": pd.Series(rates)})


def bytes_per_transition(path: str) -> pd.DataFrame:
    """Bytes on disk for each transition of each game."""
    replay = open_replay(path)
    sizes = {game: replay.stored_bytes(game) / replay.num_transitions(game) for game in replay.games}
    return pd.DataFrame({"bytes/transition": pd.Series(sizes)})


def _first_episodes(source: Replay, game: str, rows: int) -> list[dict]:
    """A game's episodes from the first on, again and again, until they have `rows` transitions; the last one is cut."""
    taken: list[dict] = []
    left = rows
    while left:
        whole = source.episode(game, len(taken) % len(source.episodes(game)))
        length = min(len(whole["action"]), left)
        taken.append({name: whole[name][:length] for name in ("observation", "action", "reward")})
        left -= length
    return taken


def benchmark_scale(
    path: str, folder: str | Path, copies: int = 1_000, seconds: float = 50.0, repeats: int = 5
) -> pd.DataFrame:
    """The same measurements for a store of 40 games and for one `copies` times as large: medians of `repeats` in turn.

    Each is made by a fresh process. Speeds scatter by a fifth, as threads contend or do not: so each is compared with
    the small store's of the same round, too.

    Returns:
        index store; medians of transitions, seconds to open, transitions/s, memory, MB; and of the rate relative to
        the small store's of the same round the median, least and most.
    """
    source, stores = open_replay(path), {count: Path(folder) / f"copies-{count}" for count in (1, copies)}
    for count, store in stores.items():
        if not store.exists():
            repeat_store(source, store, list(TRAINING_GAMES), count)
    rows = []
    for number, (count, store) in enumerate(list(stores.items()) * repeats):
        command = [sys.executable, "-m", "scaled_ql.benchmarks", str(store), str(seconds / (2 * repeats))]
        measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        rows.append({"store": f"x {count}", "round": number // 2, **measured})
    table = pd.DataFrame(rows)
    by_store = table.pivot(index="round", columns="store", values="transitions/s")
    relative = by_store.div(by_store[rows[0]["store"]], axis=0).agg(["median", "min", "max"]).T
    relative.columns = ["of the small store's rate", "least", "most"]
    return table.drop(columns="round").groupby("store", sort=False).median().join(relative)


def _measure_store(path: str, seconds: float) -> dict[str, float]:
    before = psutil.Process().memory_info().rss
    began = time.perf_counter()
    replay = open_replay(path)
    opened = time.perf_counter() - began
    sampled = sampling_rate(replay, len(os.sched_getaffinity(0)), seconds)
    return {
        "transitions": sum(map(replay.num_transitions, replay.games)),
        "seconds to open": opened,
        "transitions/s": sampled,
        "memory, MB": (psutil.Process().memory_info().rss - before) / 1e6,
    }


def _learner(game: str, encoder: str, hidden: int) -> Any:
    """A C51 agent of one game, with one hidden layer."""
    from scaled_ql import losses, networks, training
    from scaled_ql.online.agents import independent_learners

    sizes = {"hidden_sizes": (hidden,), "normalize_features": False, "layer_norm": False}
    build = partial(networks.make_q_network, encoder, 1, "c51", **sizes)
    num_actions, optimizer = [len(action_names(game))], training.make_optimizer()
    return independent_learners(build, num_actions, optimizer, seed=0, atoms=losses.support(-10, 10))


def benchmark_online(
    game: str = "Breakout",
    environments: int = 64,
    encoder: str = "nature_narrow",
    hidden: int = 128,
    update_period: int = 64,
    batch_size: int = 32,
    seconds: float = 10.0,
) -> pd.DataFrame:
    """Agents that play, learn, and do both, compared with environments stepped with random actions.

    All settings are those of `online.play.play`, logging included; agents always act by their network.

    Returns:
        columns environment steps/s, updates/s, share of random actions (of the first row's steps/s).
    """
    import jax
    import jax.numpy as jnp

    from scaled_ql import training
    from scaled_ql.online.play import play

    num_actions, learner = [len(action_names(game))], _learner(game, encoder, hidden)

    vector = make_vector_environment(game, environments, sticky_actions=0.25)
    vector.reset(seed=0)
    rng = np.random.default_rng(0)

    def play_randomly() -> float:
        return rate(lambda step: vector.step(rng.integers(num_actions[0], size=environments)), environments, seconds)

    def learn_while_playing(update_period: int) -> dict[str, float]:
        """Medians over reports."""
        own = learner._replace(state=jax.tree.map(jnp.copy, learner.state))
        settings = {"environments": environments, "num_transitions": 10**9, "seed": 0, "source": "benchmark"}
        settings |= {"min_history": 1_000, "epsilon_decay": 1, "final_epsilon": 0.0, "report_seconds": 1.0}
        settings |= {"capacity": 100_000, "batch_size": batch_size, "update_period": update_period, "max_steps": 2_000}
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = training.Checkpoints(Path(folder) / "checkpoints", {})
            reports, until = [], time.perf_counter() + seconds
            with contextlib.closing(play(folder, [game], own, checkpoints, **settings)) as running:
                for _, report in running:
                    if min(report["played"].values()) > 2_000:  # compiled, and past the random phase
                        reports.append(report)
                    if time.perf_counter() > until and len(reports) > 3:
                        break
        names = "steps_per_second", "updates_per_second"
        return {name: float(np.median([report[name] for report in reports[1:]])) for name in names}

    rates = [play_randomly()]
    acting = learn_while_playing(10**12)
    rates.append(play_randomly())
    both = learn_while_playing(update_period)
    rates.append(play_randomly())
    random = float(np.median(rates))  # in between, as the machine's speed drifts
    ring = _filled_ring(vector, environments, 20_000, compressed=False)
    state = jax.tree.map(jnp.copy, learner.state)

    def learn(step: int) -> None:
        nonlocal state
        batch = ring.sample(np.random.default_rng(step), batch_size)
        state, metrics = learner.update(state, type(batch)(*(field[None] for field in batch)))
        metrics["loss"].block_until_ready()

    rows = {
        "limit: random actions, nothing else": {"environment steps/s": random},
        "acting, logging": {"environment steps/s": acting["steps_per_second"]},
        "learning alone": {"updates/s": rate(learn, 1, seconds / 2)},
        f"acting, logging, an update per {update_period} steps": {
            "environment steps/s": both["steps_per_second"], "updates/s": both["updates_per_second"],
        },
    }  # fmt: skip
    table = pd.DataFrame(rows).T
    table["share of random actions"] = table["environment steps/s"] / random
    vector.close()
    return table


def online_parts(
    game: str = "Breakout",
    environments: int = 64,
    encoder: str = "nature_narrow",
    hidden: int = 128,
    batch_size: int = 32,
    seconds: float = 5.0,
) -> pd.Series:
    """CPU microseconds of all threads for each part of `online.play.play`, measured alone on this machine.

    Returns:
        per environment step `emulation`, `network` (half of the environments a call), `log` (compressing and writing
        what `play` writes at once) and `loop` (the playing thread: exchange with the environments, random numbers,
        ring, cutting out episodes); per update of `batch_size` transitions `sample` and `update`.
    """
    import jax
    import jax.numpy as jnp

    from scaled_ql import training
    from scaled_ql.online.log import logged_episodes
    from scaled_ql.online.play import play

    vector, rng = make_vector_environment(game, environments, sticky_actions=0.25), np.random.default_rng(0)
    ring = _filled_ring(vector, environments, max(environments * 10, 1_000), compressed=False)
    steps = partial(rng.integers, vector.single_action_space.n, size=environments)
    cost = {"emulation": _cpu(lambda step: vector.step(steps()), environments, seconds)}
    vector.close()

    learner = _learner(game, encoder, hidden)
    state, half = jax.tree.map(jnp.copy, learner.state), -(-environments // 2)
    stacks = rng.integers(256, size=(1, half, STACK, *fmt.FRAME_SHAPE), dtype=np.uint8)
    cost["network"] = _cpu(lambda step: np.asarray(learner.greedy(state.params, stacks)), half, seconds)

    def sample(step: int) -> Any:
        batch = ring.sample(np.random.default_rng(step), batch_size)
        return type(batch)(*(field[None] for field in batch))

    def update(step: int) -> None:
        nonlocal state
        state, metrics = learner.update(state, batch)
        metrics["loss"].block_until_ready()

    batch = sample(0)
    cost["sample"] = _cpu(sample, 1, seconds)
    cost["update"] = _cpu(update, 1, seconds)

    with tempfile.TemporaryDirectory() as folder:
        settings = {"environments": environments, "num_transitions": 10**9, "seed": 0, "source": "benchmark"}
        settings |= {"min_history": 10**9, "report_seconds": 0.0, "capacity": 100_000, "max_steps": 500}
        checkpoints = training.Checkpoints(Path(folder) / "checkpoints", {})
        with contextlib.closing(play(folder, [game], learner, checkpoints, **settings)) as running:
            cost["loop"] = _cpu(lambda step: next(running), environments, seconds, time.thread_time)
            while not next(running)[1]["logged"][game]:
                pass
        recorded = open_replay(folder)
        episodes, (manifest,) = list(logged_episodes(recorded, game, 1, 5_000)), recorded.manifests(game)
        keywords = {name: manifest[name] for name in ("actions", "source", "sticky_actions")}
        with ReplayWriter(folder, game, 2, **keywords) as writer:
            written = sum(len(episode["action"]) for episode in episodes)
            cost["log"] = _cpu(lambda step: writer.extend(episodes), written, seconds)
    return pd.Series(cost)


def _cpu(work: Callable[[int], object], size: int, seconds: float, clock: Callable = time.process_time) -> float:
    """CPU microseconds of work(i), divided by `size`: the mean over calls, except the first."""
    work(0)
    began, before, calls = time.perf_counter(), clock(), 0
    while time.perf_counter() - began < seconds or not calls:
        calls += 1
        work(calls)
    return 1e6 * (clock() - before) / calls / size


def online_rates(
    parts: Mapping[str, float],
    cores: int,
    environments: int = 64,
    update_period: int = 64,
    *,
    decision_ms: float = 1.0,
    update_ms: float = 1.0,
) -> pd.DataFrame:
    """Environment steps/s of `online.play.play` on some cores, computed from `online_parts`.

    Two limits. All threads together cannot take more than all cores; emulation and writing are spread over them. And
    the playing thread waits for the network, once for each half of the environments, and for each update, while the
    emulators go on: its own work and these waits are one chain.

    Args:
        parts: CPU microseconds, of a core like those to be computed.
        cores: cores that nothing else uses.
        environments: environments side by side.
        update_period: steps between updates.
        decision_ms: an accelerator's time for one half's actions, transfers included: an assumption.
        update_ms: its time for an update, likewise.

    Returns:
        steps/s: `least` if a network on the CPU has one thread, `most` if its work is spread evenly over all cores;
        `limit`, of the latter: the cores or the playing thread; and the largest `share of random actions`.
    """
    emulation, network, log, loop = (parts[name] for name in ("emulation", "network", "log", "loop"))
    sample, update = parts["sample"] / update_period, parts["update"] / update_period
    waits = 1e3 * (2 * decision_ms / environments), 1e3 * update_ms / update_period
    rows = {}
    for name, host, chain, xla, wait in (
        ("random actions, nothing else", emulation, 0.0, 0.0, 0.0),
        ("acting, logging", emulation + log, loop, network, 0.0),
        ("acting, logging, learning", emulation + log, loop + sample, network + update, 0.0),
        ("acting, logging, network on an accelerator", emulation + log, loop, 0.0, waits[0]),
        ("acting, logging, learning on an accelerator", emulation + log, loop + sample, 0.0, sum(waits)),
    ):
        together = (host + chain + xla) / cores
        chains = [chain + wait + xla / spread for spread in (1, cores)]
        least, most = (1e6 / max(together, own) for own in chains)
        limit = "cores" if together >= chains[1] else "playing thread"
        rows[name] = {"least": least, "most": most, "limit": limit}
    table = pd.DataFrame(rows).T.astype({"least": float, "most": float})
    table["share of random actions"] = table["most"] / table["most"].iloc[0]
    return table


def _filled_ring(vector: Any, environments: int, transitions: int, compressed: bool) -> Any:
    """A ring of random play."""
    from scaled_ql.online.ring import Ring

    ring = Ring(environments, transitions, transitions // environments, compressed=compressed)
    rng = np.random.default_rng(0)
    stacks, _ = vector.reset(seed=0)
    ring.begin(stacks[:, -1])
    for _ in range(transitions // environments):
        actions = rng.integers(vector.single_action_space.n, size=environments)
        stacks, reward, terminated, truncated, _ = vector.step(actions)
        ring.add(stacks[:, -1], actions, reward, terminated, truncated)
    return ring


def benchmark_ring(
    game: str = "Breakout", environments: int = 64, transitions: int = 100_000, seconds: float = 5.0
) -> pd.DataFrame:
    """The replay of online learners, uncompressed and compressed: memory of a million transitions, time for a batch."""
    vector, rows = make_vector_environment(game, environments, sticky_actions=0.25), {}
    for name, compressed in (("uncompressed", False), ("compressed", True)):
        ring = _filled_ring(vector, environments, transitions, compressed)
        sampled = rate(lambda step, ring=ring: ring.sample(np.random.default_rng(step), 32), 32, seconds)
        held = environments * ring.rows
        rows[name] = {"GB for 1,000,000 transitions": ring.nbytes / held / 1e3, "transitions/s": sampled}
    vector.close()
    table = pd.DataFrame(rows).T
    table["times slower"] = table["transitions/s"].iloc[0] / table["transitions/s"]
    return table


def benchmark_import(path: str, folder: str | Path, rows: int = 1_000_000) -> pd.DataFrame:
    """Import one file of `rows` rows: time, peak memory, and the time that decoding its gzip alone takes."""
    folder = Path(folder)
    logs, game = folder / "logs", TRAINING_GAMES[0]
    if not logs.exists():
        store = repeat_store(open_replay(path), folder / "store", [game], -(-rows // ROWS))
        export_dqn_replay(open_replay(store), folder / "partial", rows)
        (folder / "partial").rename(logs)
    (file,) = logs.glob(f"{game}/1/replay_logs/*observation_ckpt.0.gz")
    began, size = time.perf_counter(), 0
    with gzip.open(file) as stream:
        while block := stream.read(1 << 24):
            size += len(block)
    decoding = time.perf_counter() - began
    shutil.rmtree(folder / "imported", ignore_errors=True)
    for other in logs.glob(f"{game}/1/replay_logs/*_ckpt.[1-9]*"):
        other.unlink()
    began = time.perf_counter()
    command = ["import", "dqn-replay", str(logs), str(folder / "imported")]
    subprocess.run([sys.executable, "-m", "scaled_ql.command", *command], check=True, stdout=subprocess.DEVNULL)
    importing = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
    decoded = size / 84 / 84
    return pd.DataFrame(
        {
            "gzip decoding alone": {"seconds": decoding, "rows/s": decoded / decoding, "peak memory, MB": np.nan},
            "import, checked": {"seconds": importing, "rows/s": decoded / importing, "peak memory, MB": peak},
        }
    ).T


if __name__ == "__main__":
    print(json.dumps(_measure_store(sys.argv[1], float(sys.argv[2]))))
