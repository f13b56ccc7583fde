"""A short training on however many devices and processes there are; run by test_devices.py, prints losses as JSON.

python parallel.py FOLDER STEPS [encoder=resnet_narrow] [head=mse] [split] [accumulate=2] [at_once=5] [slow] ...
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

from scaled_ql import defaults, devices, methods, networks, training
from scaled_ql.replay import share_of
from scaled_ql.replay.batch import Batch

SIZE, NUM_ACTIONS = 16, [4, 3, 6]
# Fewer blocks compile sooner.
SHALLOW = {"resnet_narrow": ("resnet_basic", (1, 1), 16), "vit_narrow": ("vit", 96, 1, 3)}


def make_batch(step, size=SIZE):
    """The whole batch of a step."""
    rng = np.random.default_rng([9, step])
    game = rng.integers(3, size=size).astype(np.int32)
    return Batch(
        frames=rng.integers(0, 256, (size, 5, 84, 84), np.uint8),
        next_stack=np.tile(np.arange(1, 5, dtype=np.int32), (size, 1)),
        action=rng.integers(np.array(NUM_ACTIONS)[game]).astype(np.int32),
        reward=rng.normal(size=size).astype(np.float32),
        discount=rng.choice([0, 0.9], size).astype(np.float32),
        game=game,
    )


def run(
    folder, last, encoder="nature_narrow", head="c51", split=False, accumulate=1, slow=False, num_devices=0, at_once=1
):
    """Train up to step `last` from the newest checkpoint; losses by step, the mean of those given `at_once`."""
    mesh = devices.make_mesh(num_devices)
    devices.check_batch(SIZE, mesh, accumulate)
    build = partial(networks.make_q_network, encoder, 3, head, 0, hidden_sizes=(32,))
    optimizer = training.make_optimizer(5e-5)  # at larger ones rounding errors on noise may double every step
    graph, state = training.init_state(build(), optimizer)
    shardings = devices.state_shardings(state, mesh, split)
    objective = methods.q_learning(head=head, random_shift=4).objective(graph, NUM_ACTIONS)
    options = {"target_update_period": 6, "accumulate": accumulate, "shardings": shardings}
    train_step = training.make_train_step(objective, optimizer, seed=3, **options)
    checkpoints = training.Checkpoints(folder, {"head": head})
    state = checkpoints.restore(devices.place_state(state, shardings))
    share, first = (jax.process_index(), jax.process_count()), int(state.step)
    parts = (jax.tree.map(lambda x: x[share_of(SIZE, share)], make_batch(step)) for step in range(first, last))
    losses = {}
    periods = {"log_every": at_once, "checkpoint_every": 5, "steps_per_dispatch": at_once}
    batches = devices.place_batches(parts, mesh)
    for now, row in training.train(state, train_step, batches, list("abc"), checkpoints=checkpoints, **periods):
        state = now
        losses[row["step"]] = row["loss"], row["td_loss/a"], row["grad_norm"]
        if slow:
            print(json.dumps({"step": row["step"]}), flush=True)
            time.sleep(0.2)
    checkpoints.close()
    if split:
        kernel = state.params["head_kernel"]
        assert kernel.addressable_shards[0].data.size * mesh.size == kernel.size
    return {"losses": losses, "sum": float(sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(devices.whole(state))))}


if __name__ == "__main__":
    folder, last, *words = sys.argv[1:]
    if "slow" in words:
        devices.SILENT_SECONDS = 20  # for tests that wait for it
    defaults.ENCODERS.update(SHALLOW)
    if "distributed" in words:
        devices.join_cluster(True)
    given = dict(word.split("=") for word in words if "=" in word)
    kinds = dict.fromkeys(("accumulate", "num_devices", "at_once"), int)
    options = {name: kinds.get(name, str)(value) for name, value in given.items()}
    options |= {word: True for word in words if word in ("split", "slow")}
    result = run(Path(folder), int(last), **options)
    if jax.process_index() == 0:
        print(json.dumps(result))
