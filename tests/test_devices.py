"""One device or eight, one process or two: the same training; and what is refused before it begins."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from parallel import make_batch

from scaled_ql import defaults, devices, methods, networks, training

SCRIPT = Path(__file__).parent / "parallel.py"


def start(folder, steps, *words, count=1, **environment):
    """A process that trains, with `count` virtual devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), str(steps), *words],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process, timeout=200):
    output, errors = process.communicate(timeout=timeout)
    assert process.returncode == 0, errors[-3000:]
    lines = [line for line in output.splitlines() if line.startswith("{")]  # Gloo prints, too
    return json.loads(lines[-1]) if lines else None


def train(folder, steps, *words, **options):
    return finish(start(folder, steps, *words, **options))


def assert_equal(result, expected, steps):
    assert list(result["losses"]) == [str(step) for step in steps]
    for step in steps:
        (*losses, norm), (*others, other) = result["losses"][str(step)], expected["losses"][str(step)]
        np.testing.assert_allclose(losses, others, rtol=1e-5, err_msg=step)
        if step == 1:  # later rounding decides on which side of 0 a rectifier is, which gradients show
            np.testing.assert_allclose(norm, other, rtol=1e-5)
    if steps[-1] == int(list(expected["losses"])[-1]):  # of the parameters, in the end
        assert result["sum"] == pytest.approx(expected["sum"], rel=1e-5)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """A small network on one device."""
    return train(tmp_path_factory.mktemp("one"), 20)


@pytest.mark.parametrize("words", ["encoder=resnet_narrow head=c51", "encoder=vit_narrow head=mse split"])
def test_eight_devices_train_as_one(tmp_path, words):
    one = start(tmp_path / "one", 20, *words.split())
    eight = start(tmp_path / "eight", 20, *words.split(), count=8)
    assert_equal(finish(eight), finish(one), range(1, 21))


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """Without random shifts, whose keys differ."""
    network = networks.make_q_network("nature_narrow", 3, "c51", hidden_sizes=(16,))
    optimizer = training.make_optimizer(1e-3)
    graph, state = training.init_state(network, optimizer)
    objective, key = methods.q_learning().objective(graph, [4, 3, 6]), jax.random.key(0)
    batch = make_batch(0)
    (whole, metrics), (parts, same) = (
        jax.jit(training.make_update(objective, optimizer, accumulate=n))(state, batch, key) for n in (1, 4)
    )
    assert metrics.keys() == same.keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), metrics, same)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole.params, parts.params)


def test_a_run_resumes_on_another_number_of_devices(expected, tmp_path):
    """On one, on eight that share the state as well, and on one again."""
    train(tmp_path, 5)
    assert_equal(train(tmp_path, 10, "split", count=8), expected, range(6, 11))
    assert_equal(train(tmp_path, 20), expected, range(11, 21))


def two_processes(folder, steps, *words):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        start(
            folder, steps, "distributed", *words, count=2,
            JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(number),
        )
        for number in range(2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "restricted"),
    [
        ({"SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "2"}, False),
        ({"SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "16"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, True),
        ({"SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, True),
        ({"SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "16", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, False),
        ({"SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "2", "JAX_LOCAL_DEVICE_IDS": "0,1"}, True),
        ({}, True),
    ],
)
def test_a_process_that_is_alone_on_its_host_takes_all_its_accelerators(monkeypatch, environment, restricted):
    """JAX restricts a process of Slurm or Open MPI to one device, unless it is given a list, which may be empty."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: given.append(arguments))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    devices.join_cluster(True)
    assert given[0].get("local_device_ids") == (None if restricted else [])


def test_two_processes_that_give_five_steps_at_once_to_their_devices_train_as_one(expected, tmp_path):
    first, second = two_processes(tmp_path, 20, "split", "at_once=5")
    result = finish(first)
    assert finish(second) is None
    assert list(result["losses"]) == ["5", "10", "15", "20"]
    for step, (loss, *_) in result["losses"].items():
        mean = np.mean([expected["losses"][str(one)][0] for one in range(int(step) - 4, int(step) + 1)])
        assert loss == pytest.approx(mean, rel=1e-5)
    assert result["sum"] == pytest.approx(expected["sum"], rel=1e-5)


def test_when_one_process_dies_the_other_stops_and_the_run_resumes(expected, tmp_path):
    first, second = two_processes(tmp_path, 1_000, "slow")
    for line in first.stdout:
        if line.startswith("{") and json.loads(line)["step"] >= 12:
            break
    second.send_signal(signal.SIGKILL)
    began = time.monotonic()
    _, errors = first.communicate(timeout=150)
    assert time.monotonic() - began < 60  # of 20 seconds without a word, instead of the 60 there usually are
    assert first.returncode != 0 and errors.strip()
    second.wait(timeout=10)
    second.stdout.close(), second.stderr.close()
    result = train(tmp_path, 20)
    assert_equal(result, expected, range(11, 21))


# What is refused.


def test_a_batch_that_cannot_be_split():
    mesh = SimpleNamespace(size=8)
    devices.check_batch(16, mesh, 2)
    with pytest.raises(
        devices.DeviceError, match=r"20 transitions .* over 8 devices\. Use a multiple of 8, such as 16"
    ):
        devices.check_batch(20, mesh)
    with pytest.raises(devices.DeviceError, match="over 8 devices x 3 accumulated parts"):
        devices.check_batch(16, mesh, 3)


def test_more_devices_than_there_are():
    with pytest.raises(devices.DeviceError, match="num_devices = 5000, but there are"):
        devices.make_mesh(5_000)


@pytest.mark.parametrize("environment", [{}, {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}])
def test_distributed_on_a_single_process(tmp_path, environment):
    process = start(tmp_path, 5, "distributed", **environment)
    _, errors = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "DeviceError: distributed is set, but" in errors and "set distributed = False" in errors


def test_a_step_without_enough_memory_is_refused_before_compiling():
    network = networks.make_q_network("resnet_narrow", 3, "c51", hidden_sizes=(32,))
    graph, state = training.init_state(network, training.make_optimizer())
    objective = methods.q_learning().objective(graph, [4, 3, 6])
    reckon = lambda size, **options: training.memory_needed(objective, state, make_batch(0, size), **options)  # noqa: E731
    small, large, parts = reckon(16), reckon(64), reckon(64, accumulate=4)
    assert large["activations"] == pytest.approx(4 * small["activations"], rel=0.05)
    assert parts["activations"] == small["activations"]
    assert reckon(64, parts=4, split=True)["state"] == small["state"] // 4
    batch = sum(np.asarray(leaf).nbytes for leaf in make_batch(0, 16))
    assert [reckon(16, steps_per_dispatch=k)["batches"] for k in (1, 2, 5)] == [batch, 4 * batch, 10 * batch]
    assert reckon(16, steps_per_dispatch=5)["total"] - small["total"] == 9 * batch
    training.check_memory(small, jax.devices()[0])
    with pytest.raises(devices.OutOfMemory, match=r"estimated to take [\d.]+ GB .* Raise accumulate, set remat"):
        training.check_memory(small | {"total": 10**15}, jax.devices()[0])


def test_the_estimated_memory_is_what_a_compiler_reserves():
    network = networks.make_q_network("resnet_narrow", 3, "c51", hidden_sizes=(512,))
    optimizer = training.make_optimizer()
    graph, state = training.init_state(network, optimizer)
    objective, batch = methods.q_learning().objective(graph, [4, 3, 6]), make_batch(0, 64)
    compiled = jax.jit(training.make_update(objective, optimizer)).lower(state, batch, jax.random.key(0)).compile()
    reserved = compiled.memory_analysis().temp_size_in_bytes
    needed = training.memory_needed(objective, state, batch)
    assert 0.5 < (needed["activations"] + needed["gradients"]) / reserved < 2


def test_an_accelerator_out_of_memory_names_what_to_lower(tmp_path):
    def train_step(state, batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.")

    state = training.TrainState(jax.numpy.int32(0), {}, {}, {})
    checkpoints = training.Checkpoints(tmp_path, {})
    steps = training.train(
        state, train_step, iter([make_batch(0)]), ["a"], log_every=1, checkpoint_every=1, checkpoints=checkpoints
    )
    with pytest.raises(
        devices.OutOfMemory, match=r"step 1 does not fit .*123 bytes.* Raise accumulate.*no checkpoint yet"
    ):
        next(steps)


@pytest.mark.parametrize("encoder", ["resnet_narrow", "vit_narrow"])
def test_recomputing_takes_less_memory(encoder):
    activations = {}
    for remat in (False, True):
        build = partial(networks.make_q_network, encoder, 3, "c51", hidden_sizes=(16,), remat=remat)
        graph, _ = nnx.split(nnx.eval_shape(build), nnx.Param)
        state = jax.eval_shape(lambda build=build: training.init_state(build(), training.make_optimizer())[1])
        objective = methods.q_learning().objective(graph, [4, 3, 6])
        activations[remat] = training.memory_needed(objective, state, make_batch(0))["activations"]
    assert activations[True] < activations[False]


def test_recomputing_changes_nothing(monkeypatch):
    """Of two residual blocks; of a transformer's, see `test_transformer`."""
    monkeypatch.setitem(defaults.ENCODERS, "resnet_narrow", ("resnet_basic", (1, 1), 16))
    found = []
    for remat in (False, True):
        network = networks.make_q_network("resnet_narrow", 3, "c51", hidden_sizes=(16,), remat=remat)
        graph, state = training.init_state(network, training.make_optimizer())
        gradient = jax.jit(jax.grad(methods.q_learning().objective(graph, [4, 3, 6]), has_aux=True))
        found.append(gradient(state.params, state.target_params, make_batch(0), jax.random.key(0)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *found)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found[0][0]))


def test_deterministic_programs_are_asked_for_in_time_or_refused(monkeypatch):
    code = """if True:
        import os, jax
        from scaled_ql import devices
        for wanted in (False, True):
            devices.make_deterministic(wanted)
            print(os.environ["XLA_FLAGS"])
        jax.devices()  # XLA ends a process with a flag that it does not know
        devices.make_deterministic(True)
    """
    environment = os.environ | {"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    given = "--xla_cpu_enable_fast_math=false"
    assert done.stdout.splitlines() == [given, f"{given} --xla_gpu_deterministic_ops=true"], done.stderr
    assert done.returncode == 0, done.stderr
    jax.devices()
    monkeypatch.setenv("XLA_FLAGS", given)
    devices.make_deterministic(False)
    with pytest.raises(devices.DeviceError, match=r"deterministic = True, but JAX has started .* Restart the kernel"):
        devices.make_deterministic(True)
    assert os.environ["XLA_FLAGS"] == given


def test_a_platform_that_jaxlib_lacks_is_named():
    code = "from scaled_ql.devices import DeviceError, make_mesh\ntry: make_mesh()\nexcept DeviceError as e: print(e)"
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode == 0 and not done.stdout:
        pytest.skip("there is an accelerator")
    assert "JAX_PLATFORMS = cuda, but the installed jaxlib has no such device" in done.stdout, done.stderr


def test_an_accelerator_that_jax_does_not_see_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.warns(UserWarning, match=r"1 NVIDIA device.*lib\[cuda13\]"):
        devices.make_mesh(1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    with warnings.catch_warnings(action="error"):
        devices.make_mesh(1)
