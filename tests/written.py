"""Runs as they are on disk after training, without any training: noise in place of what was learned."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaled_ql import documents, methods, networks, parameters, training

TINY = {"encoder": "nature_narrow", "hidden_sizes": [8], "num_atoms": 5, "adam_epsilon": 1e-5, "v_min": -1.0}
TINY |= {"v_max": 3.0, "subtract_mean_frames": True, "eval_epsilon": 0.1, "eval_max_steps": 60}


def write_run(
    folder: Path, games: list[str], steps: tuple[int, ...] = (20,), seed: int = 0, **values: Any
) -> list[networks.QNetwork]:
    """A run of `04_scaled_training`; the network at each of its checkpoints."""
    p = parameters.check("04_scaled_training", TINY | {"run": folder.name} | values)
    names = ("heads", "num_atoms", "hidden_sizes", "embedding", "normalize_features")
    about = {name: getattr(p, name) for name in names}
    about["mean_frames"] = np.full((len(games), 84, 84), 90, np.float32) if p.subtract_mean_frames else None
    network = methods.make(p).build(p.encoder, len(games), 1, **about)
    return save(folder, p, network, training.about_run(p, games, "of a test"), steps, seed)


def write_online_run(folder: Path, games: list[str], **changed: Any) -> list[networks.QNetwork]:
    """A run of `02_online_agents` with independent agents; the network of each game."""
    values = {"games": games, "hidden_sizes": [8], "num_atoms": 5, "v_max": 2.0, "encoder": "nature_narrow"}
    values |= {"adam_epsilon": 1e-5, "run": folder.name, "max_steps": 60}
    p = parameters.check("02_online_agents", values | changed)
    plain = {"normalize_features": False, "layer_norm": False, "hidden_sizes": (8,), "num_atoms": 5}
    own = [networks.make_q_network(p.encoder, 1, "c51", seed, **plain) for seed in range(len(games))]
    states = [training.init_state(network, training.make_optimizer())[1] for network in own]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state.params for state in states))
    names = ["games", "learner", "head", "encoder", "hidden_sizes", "narrow_start", "n_step", "seed"]
    checkpoints = training.Checkpoints(folder / "checkpoints", {name: getattr(p, name) for name in names})
    checkpoints.save(states[0]._replace(step=jnp.int32(7), params=params))
    checkpoints.close()
    (folder / "parameters.yaml").write_text(documents.dump(p.model_dump()))
    return own


def save(folder: Path, p: Any, network: Any, about: dict, steps: tuple[int, ...], seed: int) -> list[Any]:
    from flax import nnx

    checkpoints, rng, kept = training.Checkpoints(folder / "checkpoints", about), np.random.default_rng(seed), []
    graph, state = training.init_state(network, training.make_optimizer())
    for step in steps:
        noise = lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
        params = jax.tree.map(noise, state.params)
        checkpoints.save(state._replace(step=jnp.int32(step), params=params))
        kept.append(nnx.merge(graph, nnx.State(params)))
    checkpoints.close()
    (folder / "parameters.yaml").write_text(documents.dump(p.model_dump()))
    return kept
