"""What several test files share: the workspace's paths and one small real recording."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from scaled_ql import collect

WORKSPACE = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """What one process compiles, all others of the session find: those that run tests, and those that tests start.

    Before JAX is imported, which reads its settings then. A folder that is given, as a process of xdist is, stays.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="scaled-ql-tests-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # the many small ones, too
    # Most programs run a few times, and take longer to compile than to run. Those that run often: see `optimized`.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if "XLA_FLAGS" not in os.environ:
        # XLA's older emitters compile three times faster, to the same values but for rounding, as long as it has them.
        flags = "--xla_backend_optimization_level=1"
        older = f"{flags} --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
        compiles = [sys.executable, "-c", "import jax; jax.numpy.ones(1) + 1"]
        probe = os.environ | {"XLA_FLAGS": older, "JAX_PLATFORMS": "cpu"}  # an accelerator stays free
        known = subprocess.run(compiles, env=probe, capture_output=True).returncode == 0
        os.environ["XLA_FLAGS"] = older if known else flags
    # What tests start imports a second and a half less: see there.
    without = str(Path(__file__).parent / "without")
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if without not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([without, *filter(None, paths)])


@pytest.fixture
def optimized() -> Iterator[None]:
    """For tests of many steps: programs that are first compiled in them are optimised a little."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def pytest_xdist_auto_num_workers() -> int:
    """A process more than there are cores: many tests wait for processes that they started, or killed."""
    return len(os.sched_getaffinity(0)) + 1


# Minutes; to be started first.
LONG = (
    "test_notebooks.py", "test_browser.py", "test_devices.py", "test_resuming.py", "test_transfer_runs.py",
    "test_online.py", "test_grids.py", "test_networks.py", "test_decision_transformer.py", "test_methods.py",
    "test_training.py", "test_vit.py", "test_mae.py", "test_runs.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files before short ones, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def workspace() -> Path:
    return WORKSPACE


@pytest.fixture(scope="session")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two games from real ALE: Breakout and Freeway, the latter truncated."""
    store = tmp_path_factory.mktemp("recording") / "replay"
    collect.record_game(store, "Breakout", 600, seed=3)
    collect.record_game(store, "Freeway", 400, seed=3, max_steps=150)
    return store


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests measured."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")
