"""A dataset card: Croissant metadata (MLCommons, version 1.0) beside the recordings of a store.

``croissant.json`` says how the data were made and lists the files. Two tables are in it, which any reader of Croissant
gets as records: ``recordings``, one row per game and run, with its rules of play and its ROM; and ``behaviour``, the
player's score in each fifth of a recording.
"""

import hashlib
from pathlib import Path
from typing import Any

from scaled_ql import explore, parameters, run_table, runs
from scaled_ql.environments import in_words
from scaled_ql.games import RULES
from scaled_ql.replay import Replay, open_replay
from scaled_ql.replay.format import ARRAYS, local_folder

FIFTHS = 5
TERMS = (
    "citeAs", "column", "equivalentProperty", "extract", "field", "fileObject", "fileProperty", "fileSet", "format",
    "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex",
    "repeated", "replace", "samplingRate", "separator", "source", "subField", "transform",
)  # fmt: skip
CONTEXT = {
    "@language": "en", "@vocab": "https://schema.org/", "sc": "https://schema.org/", "dct": "http://purl.org/dc/terms/",
    "cr": "http://mlcommons.org/croissant/", "rai": "http://mlcommons.org/croissant/RAI/",
    "conformsTo": "dct:conformsTo", "data": {"@id": "cr:data", "@type": "@json"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"}, **{term: f"cr:{term}" for term in TERMS},
}  # fmt: skip
TABLES = {  # files of a recording, beside its arrays
    "manifest.json": "application/json",
    "episodes.arrow": "application/vnd.apache.arrow.stream",
    "episodes.jsonl": "application/jsonlines",
    "import.json": "application/json",
}
KINDS = {str: "sc:Text", int: "sc:Integer", float: "sc:Float"}


def write(store: str | Path, published: str, **given: str) -> Path:
    """Write the card of a complete store.

    Args:
        store: its folder, on a local disk.
        published: date for the card, such as 2026-01-31.
        given: name, creator, license and url, which a store does not know; "" leaves one out.

    Raises:
        ReplayError: no store there, or a damaged one.
        RunError: it is still being recorded or imported.
    """
    folder = local_folder(store).resolve()
    replay = open_replay(folder)
    unfinished = [game for game in replay.games for report in replay.import_reports(game) if not report["complete"]]
    made_here = (folder.parent / "parameters.yaml").exists()
    state = run_table.state(folder.parent) if made_here else "finished"
    if unfinished or state != "finished":
        what = f"the import of {unfinished[0]} is incomplete" if unfinished else f"the run that records it is {state}"
        raise runs.RunError(f"{folder}: {what}. Run it again to finish, then write the card.")
    file = folder / "croissant.json"
    runs.write_json(file, describe(replay, folder, published, **given))
    return file


def describe(replay: Replay, folder: Path, published: str, **given: str) -> dict[str, Any]:
    """The contents of the card; arguments as of `write`."""
    how, made_by = _how_it_was_made(replay, folder)
    recordings, behaviour = _recordings(replay), _behaviour(replay)
    total = sum(row["transitions"] for row in recordings)
    creator = {"@type": "sc:Organization", "name": given["creator"]} if given.get("creator") else ""
    about = {
        "name": given.get("name") or made_by or folder.name,
        "description": f"Whole episodes of {len(replay.games)} Atari games ({', '.join(replay.games)}), {total:,} "
        f"transitions: frames, actions, raw rewards where known. {how} Contents' id {replay.identity()}. To be read "
        "with scaled_ql.replay.open_replay, or any reader of zarr.",
        "creator": creator,
        "license": given.get("license"),
        "url": given.get("url"),
    }
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": ["http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0"],
        **{name: value for name, value in about.items() if value},
        "version": "1.0.0",
        "datePublished": published,
        "rai:dataCollection": how,
        "distribution": _files(replay, folder),
        "recordSet": [
            _record_set("recordings", "A game and run: who played, under which rules, on which ROM.", recordings),
            _record_set(
                "behaviour",
                "The player's mean raw return, and that return on the scale of a random player (0) and a human tester "
                "(100), over the complete episodes that begin in each fifth of a recording. No score where most "
                "episodes were cut short, or nothing is known of humans.",
                behaviour,
            ),
        ],
    }


def _how_it_was_made(replay: Replay, folder: Path) -> tuple[str, str]:
    """In sentences; and the name of the run that made it, "" if it was none."""
    sources = sorted({recording.manifest["source"] for game in replay.games for recording in replay.recordings(game)})
    how, run, notebook = f"Player: {'; '.join(sources)}.", folder.parent, folder.parent.parent.name
    if not (run / "parameters.yaml").exists() or notebook not in parameters.NOTEBOOKS:
        return how, ""
    p = parameters.check(notebook, parameters.load(run / "parameters.yaml"), str(run / "parameters.yaml"))
    how += f" Command: {runs.command(notebook, p)}"
    made = runs.read_json(run / "provenance.json")
    if made.get("git_commit"):
        how += (
            f" (commit {made['git_commit']}{', with changes that were not committed' if made.get('git_dirty') else ''})"
        )
    return f"{how}; seed {p.seed}.", f"{notebook}/{run.name}"


def _recordings(replay: Replay) -> list[dict[str, Any]]:
    rows = []
    for game in replay.games:
        for recording in replay.recordings(game):
            manifest = recording.manifest
            rows.append(
                {"game": game, "run": manifest["run"], "source": manifest["source"],
                 "transitions": recording.num_transitions, "episodes": len(recording.starts),
                 "actions": ", ".join(manifest["actions"]), "rom_md5": manifest["rom_md5"] or "not known",
                 **{rule: in_words(manifest.get(rule)) for rule in RULES}}
            )  # fmt: skip
    return rows


def _behaviour(replay: Replay) -> list[dict[str, Any]]:
    episodes, rows = explore.recorded_episodes(replay), []
    begun = [explore.begins_in_first(episodes, number / FIFTHS) for number in range(FIFTHS + 1)]
    parts = {str(number): begun[number] & ~begun[number - 1] for number in range(1, FIFTHS + 1)}
    for (game, run), of_recording in explore.compare_parts(episodes, parts).iloc[:-1].iterrows():  # the last: sums
        for fifth in parts:
            part = of_recording[fifth]
            rows.append(
                {"game": game, "run": int(run), "fifth": int(fifth), "transitions": int(part["transitions"]),
                 "episodes": int(part["episodes"]), "mean_return": float(part["mean return"]),
                 "score": float(part["score, %"])}
            )  # fmt: skip
    return rows  # without a value NaN, which becomes null


def _record_set(name: str, description: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A table whose rows stand in the card itself."""
    kinds = {column: KINDS.get(type(rows[0][column]), KINDS[float]) for column in rows[0]}
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": description,
        "field": [
            {"@type": "cr:Field", "@id": f"{name}/{column}", "name": f"{name}/{column}", "dataType": kind}
            for column, kind in kinds.items()
        ],
        "data": [{f"{name}/{column}": value for column, value in row.items()} for row in rows],
    }


def _files(replay: Replay, folder: Path) -> list[dict[str, Any]]:
    """The small files of each recording with checksums, and one pattern for the arrays, which have their own."""
    found = []
    for game in replay.games:
        for recording in replay.recordings(game):
            for name, kind in TABLES.items():
                file = Path(recording.folder) / name
                if file.exists():
                    path, content = str(file.relative_to(folder)), file.read_bytes()
                    sizes = {"contentSize": f"{len(content)} B", "sha256": hashlib.sha256(content).hexdigest()}
                    place = {"@id": path, "name": path, "contentUrl": path}
                    found.append({"@type": "cr:FileObject", **place, "encodingFormat": kind, **sizes})
    arrays = {
        "@type": "cr:FileSet",
        "@id": "arrays",
        "name": "arrays",
        "description": "Arrays in zarr v3, game/run/array: observation uint8 [T, 84, 84], single frames; action uint8 "
        "[T], index into the recording's actions; reward float32 [T]; terminal and truncated bool [T]. Every chunk has "
        "a CRC-32C; episodes.arrow and episodes.jsonl say which rows are an episode's.",
        "encodingFormat": "application/octet-stream",
        "includes": [f"*/*/{array}/*" for array in ARRAYS],
    }
    return [*found, arrays]
