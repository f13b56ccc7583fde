"""Batches: steps, each a notebook with a file of parameters and optionally a grid, read from YAML and checked first.

A grid is a list of mappings from parameter names to values; each mapping stands for all combinations of its values, on
top of the step's file of parameters. Every combination is a run with its own name (`cell_name`).
"""

import difflib
import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pydantic

from scaled_ql import parameters, runs
from scaled_ql.parameters import ParameterError, Parameters


class _StepEntry(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    notebook: str
    parameters: str
    grid: list[dict[str, list[Any]]] = []
    retries: Annotated[int, pydantic.Field(ge=0)] = 2


class _BatchFile(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    steps: list[_StepEntry] = pydantic.Field(min_length=1)


class Step(NamedTuple):
    """A step of a batch: independent runs of a notebook, and the number of retries of a failed one."""

    notebook: str
    cells: list[Parameters]
    retries: int


def cell_name(base: Parameters, changes: Mapping[str, Any]) -> str:
    """Name of the run that changes some parameters of `base`, in the order of the schema: base.head-mse.seed-1."""
    order = list(type(base).model_fields)
    parts = [f"{name}-{changes[name]}" for name in sorted(changes, key=order.index) if name not in ("run", "outputs")]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", ".".join([base.run, *parts]).replace("e+", "e"))


def expand(base: Parameters, grid: list[dict[str, list[Any]]], notebook: str, source: str) -> list[Parameters]:
    """Expand a grid into runs: all combinations of each mapping's values, on top of `base`, each once.

    Raises:
        ParameterError: a combination is not valid for the notebook.
    """
    cells: dict[str, Parameters] = {}
    for mapping in grid or [{}]:
        for combination in itertools.product(*mapping.values()):
            given = dict(zip(mapping, combination))
            checked = parameters.check(notebook, base.model_dump() | given, f"{source} with {given}")
            changes = {name: value for name, value in given.items() if getattr(base, name) != value}
            name = cell_name(base, changes)
            cells[name] = checked.model_copy(update={"run": name})
    return list(cells.values())


def _meant(file: Path, content: Mapping[str, Any]) -> str:
    """The probable command if a file of parameters was given as a batch; else an empty string."""
    named = [file.absolute().parent.name] if file.absolute().parent.name in parameters.NOTEBOOKS else []
    fitting = named or [
        name
        for name, schema in parameters.NOTEBOOKS.items()
        if content and content.keys() <= schema.model_fields.keys()
    ]
    return f"scaled-ql run {fitting[0]} {file}" if fitting else ""


def near_command(target: str, file: str = "") -> str:
    """The probable command behind a misspelt ``scaled-ql run TARGET FILE``; an empty string if none is near.

    Args:
        target: notebook or batch.
        file: file of parameters; "" for none.
    """
    home = runs.workspace()
    files = {os.path.relpath(path): path for path in (home / "params").rglob("*.yaml")}
    batches = {path.stem: name for name, path in files.items() if path.parent.name == "batches"}
    known = {name: name for name in (*parameters.NOTEBOOKS, *files)} | batches
    known |= {f"{stem}.yaml": name for stem, name in batches.items()}
    near = difflib.get_close_matches(target, known, n=1)
    if not near:
        return ""
    if not file:
        return f"scaled-ql run {known[near[0]]}"
    of_notebook = {name: name for name, path in files.items() if path.parent.name == near[0]}
    of_notebook |= {Path(name).name: name for name in of_notebook}
    there = os.path.isfile(file)  # noqa: PTH113 - pathlib's raises for a name that is too long
    files_near = [file] if there else difflib.get_close_matches(file, of_notebook, n=1)
    return f"scaled-ql run {near[0]} {of_notebook.get(files_near[0], files_near[0])}" if files_near else ""


def load_batch(file: str | Path, overrides: Mapping[str, Any]) -> list[Step]:
    """Read and check a batch: an ordered list of notebooks, each with a file of `params/<notebook>/`, maybe a grid.

    Raises:
        ParameterError: a mistake in the batch or in a file it names.
    """
    content = parameters.load(file)
    try:
        batch = _BatchFile.model_validate(content)
    except pydantic.ValidationError as error:
        meant = _meant(Path(file), content)
        if meant:
            raise ParameterError(f"{file}: parameters of a notebook, not a batch. Did you mean: {meant}") from None
        mistakes = "; ".join(
            f"{'.'.join(map(str, mistake['loc']))}: {mistake['msg']}, got {mistake['input']!r}"
            for mistake in error.errors()
        )
        raise ParameterError(
            f"{file}: not a batch, a list of steps with notebook, parameters and grid ({mistakes})."
        ) from None
    steps = []
    for number, step in enumerate(batch.steps, 1):
        source = runs.workspace() / "params" / step.notebook / step.parameters
        try:
            if step.notebook not in parameters.NOTEBOOKS:
                parameters.check(step.notebook, {}, "notebook")
            base = parameters.check(step.notebook, {**parameters.load(source), **overrides}, str(source))
            cells = expand(base, step.grid, step.notebook, step.parameters)
        except ParameterError as error:
            raise ParameterError(f"{file}, step {number}: {error}") from error
        steps.append(Step(step.notebook, cells, step.retries))
    return steps
