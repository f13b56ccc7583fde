"""Running notebooks in tests: the command in a process of its own, the tiny parameters, what a training logged."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat

from scaled_ql import parameters, runs

# By notebook, as in tiny.yaml of params/batches.
TINY = {name: f"params/{name}/tiny.yaml" for name in parameters.NOTEBOOKS}
TINY["06_transfer"] = "params/06_transfer/tiny_offline.yaml"


def arguments(target: str, folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "scaled_ql.command", "run", target, *more, "--outputs", str(folder)]


def run(target: str, folder: Path, *more: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        arguments(target, folder, *more), env={**os.environ, **environment}, cwd=runs.workspace(),
        capture_output=True, text=True, timeout=850,
    )  # fmt: skip


def opening(notebook: str, until: str, values: dict[str, Any]) -> nbformat.NotebookNode:
    """The code cells of a committed notebook up to the one with a text; parameters as a person changes them."""
    book = nbformat.read(runs.workspace() / "notebooks" / f"{notebook}.ipynb", as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    (last,) = (number for number, cell in enumerate(code) if until in cell.source)
    given = nbformat.v4.new_code_cell("\n".join(f"{name} = {value!r}" for name, value in values.items()))
    book.cells = [code[0], given, *code[1 : last + 1]]
    return book


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith("per_second")} for row in rows]
