"""Other libraries beside this one: the same frames, medians and ratios, what is absent or fails left out."""

from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from scaled_ql import networks, peer_rates, peers
from scaled_ql.command import main
from scaled_ql.environments import make_environment
from scaled_ql.replay import View, open_replay

SAMPLING = "transitions/s, batches of 512"


def test_the_libraries_read_the_stores_own_episodes(recording: Path, tmp_path: Path) -> None:
    replay = open_replay(recording, View(games=["Freeway"], between=[100, 400]))
    peers.write_data(replay, tmp_path, episodes=1, max_steps=5)
    episodes, table = peer_rates.read_data(tmp_path), replay.episodes("Freeway")
    assert len(episodes) == len(table) > 1
    for number, episode in enumerate(episodes):
        ours = replay.episode("Freeway", number)
        assert len(episode["observation"]) == len(ours["action"]) == table["length"].iloc[number]
        np.testing.assert_array_equal(episode["observation"], ours["observation"][: len(ours["action"])])
        for name in ("action", "reward"):
            np.testing.assert_array_equal(episode[name], ours[name])
        assert bool(episode["terminal"]) == table["terminal"].iloc[number]


def test_played_episodes_are_those_of_an_environment_after_a_frame_of_no_action(
    recording: Path, tmp_path: Path
) -> None:
    peers.write_data(open_replay(recording, View(games=["Breakout"])), tmp_path, episodes=2, max_steps=300)
    played = np.load(tmp_path / "played.npz")
    assert str(played["game"]) == "Breakout" and (played["lengths"] < 300).all(), "whole episodes"
    environment = make_environment("Breakout", sticky_actions=0.0)
    for number, length in enumerate(played["lengths"]):
        environment.reset(seed=1)
        environment.unwrapped.ale.act(0)
        for step in range(length):
            frame, reward, ended, *_ = environment.step(int(played["actions"][number, step]))
            assert np.array_equal(frame, played["frames"][number, step]) and reward == played["rewards"][number, step]
        assert ended


def fake(environments: Path, library: str, script: str) -> None:
    """A virtual environment whose Python is a shell script."""
    python = environments / library / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)


def test_each_round_has_a_rate_of_each_library_that_works(recording: Path, tmp_path: Path, monkeypatch) -> None:
    """One answers with its arguments' data, one fails, one is not installed."""
    names = {"dopamine": ("dopamine", "dopamine-rl"), "torchrl": ("torchrl", "torchrl"), "none": ("none_such", "none")}
    monkeypatch.setattr(peers, "MEASURED", {SAMPLING: (None, names)})
    given = f'test -f "$4/observation.npy" && test "$1 $2 $3 $5" = "-I {peer_rates.__file__} dopamine 0.05"'
    fake(tmp_path, "dopamine", given + ' && echo noise && echo \'{"rate": 50.0, "version": "4"}\'')
    fake(tmp_path, "torchrl", "echo first >&2; echo ImportError: no such file >&2; exit 1")
    options = ["--csv", tmp_path / "rates.csv", "--transitions", "300", "--seconds", "0.05", "--rounds", "2"]
    done = CliRunner().invoke(main, ["benchmark", "peers", *map(str, [recording, tmp_path, *options])])
    assert done.exit_code == 0, done.output
    own = tmp_path / "none"
    assert f"none is left out; not installed: python3 -m venv {own} && {own}/bin/pip install none\n" in done.output
    assert done.output.count("torchrl is left out; it failed: ImportError: no such file") == 1
    rates = peers.read(tmp_path / "rates.csv")
    assert rates[["library", "round"]].to_numpy().tolist() == [
        ["scaled-ql", 0], ["dopamine", 0], ["scaled-ql", 1], ["dopamine", 1]
    ]  # fmt: skip
    ours = rates[rates["library"] == "scaled-ql"]["rate"].median()
    assert ours > 0
    assert peers.table(rates).loc[(SAMPLING, "dopamine"), "ours, times"] == pytest.approx(ours / 50)


def test_what_hangs_is_left_out_and_the_rates_before_it_are_kept(recording: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(peers, "MEASURED", {SAMPLING: (None, {"dopamine": ("dopamine", "dopamine-rl")})})
    answer = peers._answer
    fake(tmp_path, "dopamine", "exec sleep 60")
    file, kept = tmp_path / "rates.csv", []

    def impatient(command: list[str], limit: float) -> tuple[dict, str]:
        kept.append(len(file.read_text().splitlines()))
        return ({"rate": 2.0, "version": "1"}, "") if "scaled_ql.peers" in command else answer(command, 0.5)

    monkeypatch.setattr(peers, "_answer", impatient)
    options = ["--csv", file, "--transitions", "300", "--rounds", "2"]
    done = CliRunner().invoke(main, ["benchmark", "peers", *map(str, [recording, tmp_path, *options])])
    assert done.exit_code == 0 and "dopamine is left out; it failed: no rate after 0.5 s" in done.output
    assert kept == [0, 2, 2] and peers.read(file)["rate"].tolist() == [2, 2], "each row is written as it comes"


def test_ratios_are_of_medians() -> None:
    rows = [
        {"measured": measured, "library": library, "version": "1", "rate": rate, "same": same}
        for measured, library, rates, same in (
            ("a", "scaled-ql", (10.0, 30.0, 20.0), None), ("a", "x", (5.0, 4.0, 8.0), None), ("a", "y", (40.0,), None),
            ("b", "scaled-ql", (1.0, 3.0), None), ("b", "x", (4.0,), False), ("b", "y", (4.0, 4.0), True),
        )
        for rate in rates
    ]  # fmt: skip
    rows.insert(-1, rows[-1] | {"library": "z", "same": True})
    rows.append(rows[-1] | {"library": "z", "same": False})
    found = peers.table(pd.DataFrame(rows))
    assert found["median"].tolist() == [20, 5, 40, 2, 4, 4, 4]
    assert found["ours, times"].tolist() == [1, 4, 0.5, 1, 0.5, 0.5, 0.5]
    assert (found.loc[("a", "x"), "least"], found.loc[("a", "x"), "most"]) == (4, 8)
    assert found["plays as ALE"].tolist() == ["", "", "", "", "no", "yes", "no"], "z: in one round only"


def test_the_network_is_of_d3rlpys_size() -> None:
    """Three convolutions, 3136 features, 512, four actions: 1,686,180 parameters; here 18 actions, and an embedding."""
    number = networks.count_parameters(jax.eval_shape(peers.make_network))
    assert number == 1_686_180 + 14 * 513 + 49 * 64


def test_a_file_of_rates_that_is_absent_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"rates\.csv: no such file; scaled-ql benchmark peers"):
        peers.read(tmp_path / "rates.csv")


@pytest.mark.parametrize("library", peer_rates.LIBRARIES)
def test_a_library_that_is_installed_has_a_rate(library: str, recording: Path, tmp_path: Path) -> None:
    (module,) = (names[library][0] for _, names in peers.MEASURED.values() if library in names)
    pytest.importorskip(module, reason=f"{module} is not installed here")
    peers.write_data(open_replay(recording, View(games=["Breakout"])), tmp_path)
    found = peer_rates.LIBRARIES[library](tmp_path, 0.1)
    assert found["rate"] > 0 and found.get("same", True)
