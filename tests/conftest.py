"""What several test files share: the workspace's paths and one small real recording."""

from pathlib import Path

import pytest

from scaled_ql import collect

WORKSPACE = Path(__file__).resolve().parents[1]


LONG = ("test_notebooks.py", "test_devices.py", "test_online.py", "test_networks.py")  # minutes; to be started first


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
