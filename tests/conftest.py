"""What several test files share: the workspace's paths and one small real recording."""

from pathlib import Path

import pytest

from scaled_ql import collect

WORKSPACE = Path(__file__).resolve().parents[1]


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
