"""Cards of stores: valid Croissant, and what a naive reading of the store finds."""

import hashlib
import json
import shutil
from pathlib import Path

import mlcroissant
import numpy as np
import pytest
from click.testing import CliRunner

from scaled_ql import dataset_card, documents, runs
from scaled_ql.command import main
from scaled_ql.games import reference_score
from scaled_ql.parameters import check
from scaled_ql.replay import ReplayError, ReplayWriter, open_replay
from scaled_ql.replay.format import REPORT
from scaled_ql.runs import RunError

GIVEN = {"creator": "Somebody", "license": "https://spdx.org/licenses/CC0-1.0.html", "url": "https://example.org/data"}


def write_store(folder: Path, returns: dict[int, list[float]]) -> Path:
    """Pong; by run, the returns of episodes of ten steps."""
    rng = np.random.default_rng(0)
    names = ("NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE")
    for run, scores in returns.items():
        how = {"source": f"a test, run {run}", "sticky_actions": 0.25, "rom_md5": "ab" * 16, "max_steps": 27_000}
        with ReplayWriter(folder, "Pong", run, actions=names, **how) as writer:
            for score in scores:
                rewards = np.r_[np.zeros(9), score]
                frames = rng.integers(0, 256, (10, 84, 84), np.uint8)
                writer.append(frames, rng.integers(0, 6, 10), rewards, terminal=True)
    return folder


def records(file: Path, name: str) -> list[dict]:
    rows = mlcroissant.Dataset(jsonld=file).records(name)
    return [{column.split("/")[1]: value for column, value in row.items()} for row in rows]


def text(value: object) -> object:
    return value.decode() if isinstance(value, bytes) else value


def test_a_card_is_valid_and_says_how_good_the_player_was_in_each_fifth(tmp_path: Path) -> None:
    scores = {1: [-21.0, -20, -19, -18, -17, -16, -15, -14, -13, 21], 2: [1.0, 2, 3]}
    store = write_store(tmp_path / "store", scores)
    file = dataset_card.write(store, "2026-01-31", **GIVEN)
    assert file == store / "croissant.json"
    metadata = mlcroissant.Dataset(jsonld=file).metadata
    assert not metadata.ctx.issues.errors
    assert not [warning for warning in metadata.ctx.issues.warnings if "citeAs" not in warning]
    assert (metadata.name, metadata.license[0], metadata.url) == ("store", GIVEN["license"], GIVEN["url"])
    assert (metadata.creators[0].name, f"{metadata.date_published:%Y-%m-%d}") == ("Somebody", "2026-01-31")
    assert "130 transitions" in metadata.description and open_replay(store).identity() in metadata.description
    behaviour = records(file, "behaviour")
    low, high = (reference_score("Pong", player) for player in ("random", "human"))
    fifths = {
        1: [[-21.0, -20], [-19.0, -18], [-17.0, -16], [-15.0, -14], [-13.0, 21]],
        2: [[1.0], [2.0], [], [3.0], []],
    }
    expected = [(run, number, played) for run, parts in fifths.items() for number, played in enumerate(parts, 1)]
    for row, (run, fifth, played) in zip(behaviour, expected, strict=True):
        assert (text(row["game"]), row["run"], row["fifth"]) == ("Pong", run, fifth)
        assert (row["episodes"], row["transitions"]) == (len(played), 10 * len(played))
        mean = np.mean(played) if played else np.nan
        np.testing.assert_allclose(row["mean_return"], mean)
        np.testing.assert_allclose(row["score"], 100 * (mean - low) / (high - low))


def test_a_card_lists_the_recordings_and_their_files(recording: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(recording, tmp_path / "store"))
    done = CliRunner().invoke(main, ["card", str(store), "--name", "Two games"])
    assert done.exit_code == 0 and str(store / "croissant.json") in done.output, done.output
    card, replay = json.loads((store / "croissant.json").read_text()), open_replay(store)
    assert card["name"] == "Two games" and "license" not in card and "scripted player" in card["rai:dataCollection"]
    found = records(store / "croissant.json", "recordings")
    assert [text(row["game"]) for row in found] == replay.games == ["Breakout", "Freeway"]
    for row in found:
        (manifest,) = replay.manifests(game := text(row["game"]))
        assert (row["transitions"], row["episodes"]) == (replay.num_transitions(game), len(replay.episodes(game)))
        for name in ("source", "rom_md5", "observation"):
            assert text(row[name]) == manifest[name]
        assert (text(row["sticky_actions"]), text(row["max_steps"])) == ("0.25", str(manifest["max_steps"]))
    files = {entry["contentUrl"]: entry for entry in card["distribution"] if entry["@type"] == "cr:FileObject"}
    assert sorted(files) == [
        f"{game}/1/{name}" for game in replay.games for name in ("episodes.jsonl", "manifest.json")
    ]
    for path, entry in files.items():
        assert entry["sha256"] == hashlib.sha256((store / path).read_bytes()).hexdigest()
    (arrays,) = (entry for entry in card["distribution"] if entry["@type"] == "cr:FileSet")
    listed = {file for pattern in arrays["includes"] for file in store.glob(pattern)}
    assert {file.parent.name for file in listed} == {"observation", "action", "reward", "terminal", "truncated"}
    assert open_replay(store).identity() == open_replay(recording).identity()


def test_a_card_names_the_run_that_made_the_store_and_waits_for_it(tmp_path: Path) -> None:
    run = tmp_path / "01_data_collection" / "mine"
    store = write_store(run / "replay", {1: [1.0]})
    p = check("01_data_collection", {"run": "mine", "games": ["Pong"], "seed": 3, "outputs": str(tmp_path)})
    (run / "parameters.yaml").write_text(documents.dump(p.model_dump()))
    runs.write_json(run / "provenance.json", {"git_commit": "abc123", "git_dirty": False})
    runs.write_json(run / "status.json", {"state": "interrupted"})
    with pytest.raises(RunError, match=r"is interrupted\. Run it again to finish"):
        dataset_card.write(store, "2026-01-31")
    runs.write_json(run / "status.json", {"state": "finished"})
    card = json.loads(dataset_card.write(store, "2026-01-31").read_text())
    assert card["name"] == "01_data_collection/mine"
    assert card["rai:dataCollection"] == (
        "Player: a test, run 1. Command: scaled-ql run 01_data_collection -p run mine -p games '[\"Pong\"]' -p seed 3 "
        "(commit abc123); seed 3."
    )


def test_a_card_of_an_incomplete_import_or_of_nothing_is_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", {1: [1.0]})
    report = {entry: [] for entry in REPORT} | {"complete": False}
    (store / "Pong" / "1" / "import.json").write_text(json.dumps(report))
    with pytest.raises(RunError, match=r"the import of Pong is incomplete\. Run it again"):
        dataset_card.write(store, "2026-01-31")
    with pytest.raises(ReplayError, match="no such replay folder"):
        dataset_card.write(tmp_path / "absent", "2026-01-31")
    assert not (store / "croissant.json").exists()
