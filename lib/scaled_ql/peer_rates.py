"""What other libraries do per second with the same frames, for `peers`, which runs this file in their environments.

python -I peer_rates.py LIBRARY FOLDER SECONDS prints JSON: version, rate; of environments, whether they play as ALE.
FOLDER is from `peers.write_data`. Only NumPy and the library itself are imported; nothing of this package.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

BATCH, STACK, N_STEP, DISCOUNT = 512, 4, 3, 0.99  # of sampling
STEP_BATCH = 32  # of a training step
ENVIRONMENTS = 16  # side by side


def rate(work: Callable[[int], object], size: int, seconds: float) -> float:
    """Median of `size` / duration over calls of work(i), except the first."""
    work(0)
    durations, began, step = [], time.perf_counter(), 1
    while time.perf_counter() - began < seconds or not durations:
        before = time.perf_counter()
        work(step)
        durations.append(time.perf_counter() - before)
        step += 1
    return size / float(np.median(durations))


def read_data(folder: Path) -> list[dict[str, np.ndarray]]:
    """Read a game's episodes in time order: observation uint8 [L, 84, 84], action, reward [L], terminal bool []."""
    arrays = {name: np.load(folder / f"{name}.npy") for name in ("observation", "action", "reward")}
    starts, terminal = np.load(folder / "starts.npy"), np.load(folder / "terminal.npy")
    parts = {name: np.split(array, starts[1:]) for name, array in arrays.items()}
    return [
        {name: parts[name][number] for name in parts} | {"terminal": ended} for number, ended in enumerate(terminal)
    ]


def d3rlpy_updates(folder: Path, seconds: float) -> dict[str, Any]:
    """Updates per second of DiscreteCQL with its defaults, a Nature network, on batches from its replay buffer."""
    import d3rlpy
    import torch
    from d3rlpy.dataset import Episode, FrameStackTransitionPicker, InfiniteBuffer, ReplayBuffer

    d3rlpy.logging.set_log_context(test=True)
    episodes = [
        Episode(
            episode["observation"][:, None], episode["action"][:, None].astype(np.int32),
            episode["reward"][:, None], bool(episode["terminal"]),
        )
        for episode in read_data(folder)
    ]  # fmt: skip
    buffer = ReplayBuffer(
        InfiniteBuffer(), FrameStackTransitionPicker(STACK), episodes=episodes,
        action_size=1 + int(max(episode.actions.max() for episode in episodes)),
    )  # fmt: skip
    scale = d3rlpy.preprocessing.PixelObservationScaler()
    config = d3rlpy.algos.DiscreteCQLConfig(batch_size=STEP_BATCH, observation_scaler=scale)
    agent = config.create(device=torch.cuda.is_available())
    agent.build_with_dataset(buffer)

    def update(step: int) -> None:
        for _ in range(10):
            agent.update(buffer.sample_transition_batch(STEP_BATCH))

    return {"rate": rate(update, 10, seconds), "version": metadata.version("d3rlpy")}


def dopamine_samples(folder: Path, seconds: float) -> dict[str, Any]:
    """Transitions per second of Dopamine's replay buffer, which stores compressed stacks and samples on one thread."""
    from dopamine.jax.replay_memory import accumulator, elements, replay_buffer, samplers

    episodes = read_data(folder)
    buffer = replay_buffer.ReplayBuffer(
        accumulator.TransitionAccumulator(STACK, N_STEP, DISCOUNT), samplers.UniformSamplingDistribution(0),
        batch_size=BATCH, max_capacity=sum(len(episode["action"]) for episode in episodes),
    )  # fmt: skip
    for episode in episodes:
        last = len(episode["action"]) - 1
        steps = zip(episode["observation"], episode["action"], episode["reward"], strict=True)
        for number, (frame, action, reward) in enumerate(steps):
            ended = number == last
            step = elements.TransitionElement(frame, int(action), float(reward), ended and episode["terminal"], ended)
            buffer.add(step)
    return {"rate": rate(lambda step: buffer.sample(), BATCH, seconds), "version": metadata.version("dopamine-rl")}


def torchrl_samples(folder: Path, seconds: float) -> dict[str, Any]:
    """Transitions per second of TorchRL's replay buffer: slices of the 7 frames that stack and n-step span."""
    from tensordict import TensorDict
    from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer

    episodes, span = read_data(folder), STACK + N_STEP
    stored = {
        name: np.concatenate([episode[name] for episode in episodes]) for name in ("observation", "action", "reward")
    }
    stored["episode"] = np.repeat(np.arange(len(episodes)), [len(episode["action"]) for episode in episodes])
    size = len(stored["action"])
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(size),
        sampler=SliceSampler(slice_len=span, traj_key="episode", cache_values=True),
        batch_size=BATCH * span,
        prefetch=len(os.sched_getaffinity(0)),
    )
    buffer.extend(TensorDict(stored, batch_size=[size]))
    return {"rate": rate(lambda step: buffer.sample(), BATCH, seconds), "version": metadata.version("torchrl")}


def envpool_steps(folder: Path, seconds: float) -> dict[str, Any]:
    """Environment steps per second of random actions; and whether it plays the steps in the folder, bit for bit.

    EnvPool begins an episode with a no-op at least (1.2.5 crashes where `noop_max` is 0), and so do these. It has a
    thread per core that the process may use, as ALE's vector environment has here.
    """
    import envpool

    played = np.load(folder / "played.npz")
    few, most = played["actions"].shape

    def make(environments: int) -> Any:
        threads = min(environments, len(os.sched_getaffinity(0)))
        options = {"noop_max": 1, "use_fire_reset": False, "stack_num": STACK, "num_threads": threads}
        return envpool.make_gymnasium(f"{played['game']}-v5", num_envs=environments, **options)

    environments = make(few)
    environments.reset()
    answers = [environments.step(played["actions"][:, number])[:2] for number in range(most)]
    frames, rewards = (np.stack(parts, axis=1) for parts in zip(*((stack[:, -1], reward) for stack, reward in answers)))
    in_episode = np.arange(most) < played["lengths"][:, None]
    same = all(
        np.array_equal(array[in_episode], played[name][in_episode])
        for name, array in (("frames", frames), ("rewards", rewards))
    )
    environments.close()

    environments, rng = make(ENVIRONMENTS), np.random.default_rng(0)
    environments.reset()

    def step(number: int) -> None:
        for _ in range(10):
            environments.step(rng.integers(environments.action_space.n, size=ENVIRONMENTS))

    rates = {"rate": rate(step, 10 * ENVIRONMENTS, seconds), "version": metadata.version("envpool")}
    return rates | {"same": bool(same)}


LIBRARIES = {
    "d3rlpy": d3rlpy_updates,
    "dopamine": dopamine_samples,
    "torchrl": torchrl_samples,
    "envpool": envpool_steps,
}

if __name__ == "__main__":
    _, library, folder, duration = sys.argv
    print(json.dumps(LIBRARIES[library](Path(folder), float(duration))))
