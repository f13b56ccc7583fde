"""Runs: one folder per run of a notebook, papermill batches, provenance, rendered reports.

::

    outputs/<notebook>/<run>/
      parameters.yaml   all parameters, as checked
      provenance.json   git commit, package versions, devices, command
      status.json       state (running, finished, failed, interrupted), progress, error
      run.ipynb, run.html  as executed, whatever executed it
      summary.json      the report's inputs; written when the run finishes
      ...               the notebook's own files
"""

import contextlib
import difflib
import itertools
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pandas as pd
from tqdm import tqdm

from scaled_ql import documents, parameters
from scaled_ql.games import UnknownGame, UnknownVariant, check_variant, rom_name
from scaled_ql.parameters import Parameters
from scaled_ql.replay import Replay, ReplayError, View, open_replay
from scaled_ql.replay.views import load_view

PACKAGES = (
    "scaled-ql", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy", "pandas",
    "ale-py", "gymnasium", "papermill",
)  # fmt: skip
# Reports that gather other runs: executed again each time.
GATHERING = ("05_ablations", "05_learning_from_reward", "08_paper_report")
# For kernels' GLIBC_TUNABLES. On a CPU, XLA allocates the memory of each step again, and glibc has the system map and
# clear it page by page: 84,000 faults and a third of the time of a narrow ResNet's step with heads for 40 games. With
# pages of 2 MB there are 340. It is read only when a process starts.
LARGE_PAGES = "glibc.malloc.hugetlb=1"
# A run's own records. A folder that holds nothing else holds no result, and reserves no name.
BOOKKEEPING = frozenset((
    "parameters.yaml", "provenance.json", "status.json", "run.ipynb", "run.html", ".run.ipynb", ".lock", ".runner.lock",
))  # fmt: skip
SOCKET_PATH = 107  # maximum bytes in a socket's path
SHUTDOWN_SECONDS = 60.0  # an interrupted kernel writes a checkpoint first
LOCK_SECONDS = 20.0  # a kernel whose runner was killed takes a moment to notice


class LeftToFirstProcess(BaseException):
    """Not an error: in distributed training only the first process continues to evaluate and to report."""


class RunError(RuntimeError):
    """A run that cannot start or did not finish; the message has the remedy."""


def workspace() -> Path:
    """The checkout: the folder that holds `notebooks/`, `params/` and `outputs/`.

    It is found from this package's location (``pip install -e ./lib``), or else upwards from the current folder.

    Raises:
        RunError: neither is inside a workspace.
    """
    for start in (Path(__file__).resolve(), Path.cwd()):
        for folder in (start, *start.parents):
            if (folder / "notebooks").is_dir() and (folder / "params").is_dir():
                return folder
    raise RunError(
        "no workspace found: run this inside the checkout, or install the package with pip install -e ./lib."
    )


def outputs_folder(values: Parameters) -> Path:
    """The outputs folder that holds a run."""
    return Path(values.outputs).resolve() if values.outputs else workspace() / "outputs"


def process_number(values: Parameters) -> int:
    """Number of this process in a `distributed` run, from its environment; 0 in any other run."""
    if getattr(values, "distributed", False):
        for name in ("JAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX"):
            if name in os.environ:
                return int(os.environ[name])
    return 0


def run_folder(notebook: str, values: Parameters) -> Path:
    """The folder of a run, which all its processes share."""
    return outputs_folder(values) / notebook / values.run


def own_folder(notebook: str, values: Parameters) -> Path:
    """Folder of this process's notebook and status: the run's folder, or one within it for all but the first."""
    number = process_number(values)
    return run_folder(notebook, values) / f"processes/{number}" if number else run_folder(notebook, values)


def open_dataset(values: Any, games: list[str] | None = None) -> Replay:
    """Open the replay that a run's `dataset` and `view` name, or only some of its games.

    `dataset` is a URL, an absolute path, or a path below the outputs folder; `view` a file of `params/views/`
    without ``.yaml``, any path, or "" for the whole dataset.

    Raises:
        ReplayError: absent or damaged, or a view of absent data.
    """
    path = values.dataset if "://" in values.dataset else str(outputs_folder(values) / values.dataset)
    view = _open_view(values.view)
    return open_replay(path, (view or View()).model_copy(update={"games": games}) if games else view)


def _open_view(name: str) -> View | None:
    file = Path(name)
    if not name:
        return None
    if file.suffix in (".yaml", ".yml", ".json"):
        return load_view(file)
    known = {path.stem: path for path in (workspace() / "params" / "views").glob("*.yaml")}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(sorted(known))}."
        raise ReplayError(f"view {name!r}: no such file in params/views. {hint}")
    return load_view(known[name])


def check_names(values: Parameters) -> None:
    """Check a run's games, variant and view, which do not depend on other runs.

    Raises:
        RunError: one is unknown; the message suggests near ones.
    """
    try:
        for game in getattr(values, "games", ()):
            rom_name(game)
        if hasattr(values, "variant"):
            check_variant(values.game, **values.variant)
        _open_view(getattr(values, "view", ""))
    except (UnknownGame, UnknownVariant, ReplayError) as error:
        raise RunError(f"run {values.run}: {error}") from error


def check_inputs(values: Parameters) -> None:
    """Check a run's inputs before its kernel is started: games, view, dataset, agents, the run it is initialised from.

    Raises:
        RunError: an input is unknown, cannot be read, or is not finished.
    """
    check_names(values)
    if hasattr(values, "initial"):
        trained_run(values, "built_like" if values.initial == "scratch" else "initial")
    if getattr(values, "agents", "") and not (outputs_folder(values) / values.agents).is_dir():
        raise RunError(
            f"run {values.run}: agents = {values.agents!r}: no such folder, neither as such nor below "
            f"{outputs_folder(values)}. Export agents into one with scaled-ql export model."
        )
    if getattr(values, "dataset", "") and getattr(values, "setting", "") != "online":
        try:
            dataset = open_dataset(values)
        except (ReplayError, OSError) as error:
            raise RunError(f"run {values.run}: {error}") from error
        game = getattr(values, "game", "")
        if game and game not in dataset.games:
            raise RunError(f"run {values.run}: game {game!r} is not in {values.dataset}: {', '.join(dataset.games)}.")


def find(home: Path, name: str, having: str = "parameters.yaml") -> Path:
    """The folder of a run.

    Args:
        home: outputs folder.
        name: ``<notebook>/<run>``, or the run's name alone where no other notebook has such a run.
        having: file or folder that the run has, such as ``checkpoints``.

    Raises:
        RunError: there is none, or several; the message names them.
    """
    known = _folders(home, having)
    meant = [name] if name in known else [full for full in known if full.split("/", 1)[1] == name]
    if len(meant) == 1:
        return known[meant[0]]
    if meant:
        raise RunError(f"{name!r}: several runs have that name below {home}; did you mean {' or '.join(meant)}?")
    raise RunError(f"{name!r}: {_no_such_run(home, name, having)}")


def _folders(home: Path, having: str) -> dict[str, Path]:
    return {str(file.parent.relative_to(home)): file.parent for file in sorted(home.glob(f"*/*/{having}"))}


def _no_such_run(home: Path, name: str, having: str) -> str:
    """Why there is no run of that name, and which names are near it."""
    known = _folders(home, having)
    names = {full.split("/", 1)[1]: full for full in known} | {full: full for full in known}
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
    near = list(dict.fromkeys(names[each] for each in close)) or list(known)[:3]
    which = "with checkpoints there are" if having == "checkpoints" else "there are"
    return f"no such run below {home}; {which} {', '.join(near) or 'none'}."


def trained_run(values: Parameters, parameter: str) -> Path:
    """The folder of the finished run with checkpoints that a parameter names.

    Raises:
        RunError: there is no such run, it is not finished, or it has no checkpoint.
    """
    name = getattr(values, parameter)
    home = outputs_folder(values)
    folder, says = home / name, f"run {values.run}: {parameter} = {name!r}"
    if not name or not (folder / "status.json").exists():
        raise RunError(f"{says}: {_no_such_run(home, name, 'checkpoints')}")
    state = read_json(folder / "status.json").get("state", "not started")
    if state != "finished":
        raise RunError(f"{says}: that run is {state}. Wait until it is finished, or execute it again to resume it.")
    if not any(place.name.isdigit() for place in folder.glob("checkpoints/*")):
        raise RunError(f"{says}: {folder} has no checkpoints. Choose a run that trained a network.")
    return folder


def write_json(file: Path, value: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the new one."""
    _write_text(file, json.dumps(_plain(value), indent=1, default=str, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """Convert to JSON values: NumPy's numbers to Python's, non-finite ones to null."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_text(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise RunError(
            f"{file}: cannot be written ({error}). Make room, make the folder writable, or set outputs to another one."
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file; an absent one is empty.

    Raises:
        RunError: empty, half-written or not readable.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: cannot be read as JSON ({error}). Restore it, or move it elsewhere.") from error
    if not isinstance(content, dict):
        raise RunError(f"{file}: expected an object, got {type(content).__name__}. Restore it, or move it elsewhere.")
    return content


def provenance() -> dict[str, Any]:
    """Information to reproduce a run: commit, versions, devices, machine."""

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(
                ["git", *arguments], cwd=workspace(), capture_output=True, text=True, check=True, timeout=30
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ""

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:  # this package, say, read from a path instead of installed
            return None

    commit = git("rev-parse", "HEAD")
    return {
        "git_commit": commit or None,
        "git_dirty": bool(git("status", "--porcelain")) if commit else None,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "jax_enable_x64": bool(sys.modules["jax"].config.jax_enable_x64) if "jax" in sys.modules else None,
    }


def command(notebook: str, values: Parameters, base: Parameters | None = None, file: str = "") -> str:
    """The command that executes such a run: its parameters that are not defaults, but for the outputs folder.

    Args:
        notebook, values: the run.
        base, file: the parameters of a file, which the command then names, instead of the defaults.
    """
    words = ["scaled-ql", "run", notebook, *filter(None, [file])]
    for name, value in values.model_dump(exclude_defaults=base is None, exclude={"outputs"}).items():
        if base is None or value != getattr(base, name):
            plain = isinstance(value, str) and re.fullmatch(r"[\w./-]+", value) and documents.parse(value) == value
            words += ["-p", name, value if plain else json.dumps(value)]
    return shlex.join(words)


def last_line(file: Path) -> dict[str, Any]:
    """The last complete line of a JSON-lines file; empty if there is none."""
    if not file.exists():
        return {}
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 65_536))
        lines = [line for line in stream.read().splitlines(keepends=True) if line.endswith(b"\n")]
    return json.loads(lines[-1]) if lines else {}


def once(file: Path, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """Read a table from a CSV file; compute and write it first if absent, so that a resumed run does not repeat it."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")  # several runs may need the same table
        compute().to_csv(partial, index=False)
        partial.replace(file)
    return pd.read_csv(file)


class Run:
    """A notebook's run in progress; see `start`.

    Attributes:
        folder: folder of the run's files.
        own: folder of this process's files; with one process, the same.
        parameters: checked parameters.
    """

    def __init__(self, notebook: str, values: Parameters):
        self.notebook, self.parameters = notebook, values
        self.folder, self.own = run_folder(notebook, values), own_folder(notebook, values)
        make_folder(self.own)
        try:
            self._lock = _lock(self.own / ".lock", is_singleton=True).lock
        except filelock.Timeout:
            pid = read_json(self.own / "status.json").get("pid")
            raise RunError(
                f"{self.own}: another process (pid {pid}) is running in this folder. Wait for it, stop it, "
                "or choose another run name."
            ) from None
        self._started = time.time()

    def _status(self, state: str, **more: Any) -> None:
        status = {"state": state, "pid": os.getpid(), "started": self._started, "updated": time.time()} | more
        write_json(self.own / "status.json", status)

    def note(self, **facts: Any) -> None:
        """Add facts known only during the run (dataset, ROMs, ...) to `provenance.json`."""
        file = self.own / "provenance.json"
        write_json(file, read_json(file) | facts)

    def progress(self, done: int, total: int) -> None:
        """Record the run's progress in `status.json`, which the runner shows."""
        self._status("running", done=done, total=total)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`, mark the run finished and release its folder."""
        write_json(self.folder / "summary.json", summary)
        self._status("finished")
        self._lock.release(force=True)

    def leave_to_first_process(self) -> None:
        """Continue only in the first process of a run; the others finish here.

        Raises:
            LeftToFirstProcess: in all other processes; the notebook's runner handles it.
        """
        if self.own != self.folder:
            self._status("finished")
            self._lock.release(force=True)
            raise LeftToFirstProcess("evaluation and report are left to the first process")

    def _watch_cells(self, namespace: dict[str, Any]) -> None:
        """In a kernel: keep the notebook as executed, and mark the run failed or interrupted when a cell raises."""
        ipython = sys.modules.get("IPython")
        shell = ipython.get_ipython() if ipython else None
        if shell is None:
            return
        _watching.close()
        save = self._notebook_saver(shell.kernel, namespace) if hasattr(shell, "kernel") else None

        def after_cell(result: Any) -> None:
            error = result.error_in_exec or result.error_before_exec
            if error is not None and not isinstance(error, LeftToFirstProcess) and self._lock.is_locked:
                state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
                self._status(state, error="".join(traceback.format_exception_only(error)).strip())
            if save:
                save()
            if not self._lock.is_locked:
                _watching.close()

        shell.events.register("post_run_cell", after_cell)
        _watching.callback(shell.events.unregister, "post_run_cell", after_cell)

    def _notebook_saver(self, kernel: Any, namespace: dict[str, Any]) -> Callable[[], None] | None:
        """A function that writes `run.ipynb`, and `run.html` once the run is finished; None if a runner does it."""
        if _has_runner(self.own):
            return None
        from scaled_ql import recorder  # with nbformat, which takes longer to import than all of the package

        known = set(type(self.parameters).model_fields)
        before = namespace["In"][1:-1][::-1]
        earlier = list(itertools.takewhile(lambda source: parameters.assigned(source, known), before))[::-1]
        recorded = recorder.Recorder(kernel, earlier)
        _watching.callback(recorded.close)
        original, file = workspace() / "notebooks" / f"{self.notebook}.ipynb", self.own / "run.ipynb"
        document = recorder.document(self.notebook, original, namespace)
        if document.name == file.name and document != file:
            print(f"{document} stays the notebook of another run. This run keeps its own: {file}")

        def save() -> None:
            import nbformat

            sys.stdout.flush()
            sys.stderr.flush()
            try:
                content = nbformat.read(document, as_version=4)
                book = recorder.merge(content, recorded.cells, lambda source: parameters.assigned(source, known))
                _write_text(file, nbformat.writes(book) + "\n")
                if not self._lock.is_locked and self.own == self.folder:
                    publish(file)
            except (OSError, ValueError, RunError) as error:
                print(f"{file}: the notebook could not be kept ({error}).", file=sys.stderr)

        return save


_watching = contextlib.ExitStack()  # to close before this kernel follows another run


def _has_runner(folder: Path) -> bool:
    """Whether `execute` waits for this run in another process."""
    return is_locked(folder / ".runner.lock")


def is_locked(file: Path) -> bool:
    """Whether a process holds a lock of a run's folder: `.lock`, its kernel; `.runner.lock`, its `execute`."""
    if not file.exists():
        return False
    try:
        with filelock.FileLock(file, timeout=0, fallback_to_soft=False):
            return False
    except filelock.Timeout:
        return True


def make_folder(folder: Path) -> None:
    """Make the folder of a run.

    Raises:
        RunError: it cannot be made.
    """
    try:
        str(folder).encode()
        folder.mkdir(parents=True, exist_ok=True)
    except UnicodeEncodeError as error:
        raise RunError(
            f"{os.fsencode(folder)!r}: not a path in this locale ({error.reason}). Set PYTHONUTF8=1, or outputs to "
            "another folder."
        ) from error
    except OSError as error:
        raise RunError(f"{folder}: cannot be made ({error}). Set outputs to a writable folder.") from error


def _lock(file: Path, **options: Any) -> filelock.AcquireReturnProxy:
    """Acquire a lock; the result is a context manager that releases it.

    Raises:
        filelock.Timeout: another process holds it.
        RunError: the file system does not support locks.
    """
    try:
        return filelock.FileLock(file, timeout=LOCK_SECONDS, fallback_to_soft=False, **options).acquire()
    except filelock.Timeout:
        raise
    except OSError as error:
        raise RunError(
            f"{file.parent}: cannot be locked against a second process ({error}). Set outputs to a writable folder, on "
            "a file system with locks."
        ) from error


def start(notebook: str, namespace: dict[str, Any]) -> Run:
    """Begin, or resume, the run that a notebook's parameters name; every notebook calls this first.

    Checks the parameters, locks the run's folder against a second process, and writes `parameters.yaml` and
    `provenance.json`.

    Args:
        notebook: name without ``.ipynb``.
        namespace: the notebook's ``globals()``.

    Raises:
        ParameterError: invalid parameters; the message lists all mistakes.
        RunError: the folder is in use, or holds a run with other parameters.
    """
    values = parameters.from_notebook(notebook, namespace)
    compare_parameters(notebook, values)
    run = Run(notebook, values)
    file = run.own / "parameters.yaml"
    if not (file.exists() and holds_results(run.folder)):
        _write_text(file, documents.dump(values.model_dump()))
    write_json(run.own / "provenance.json", provenance())
    run._status("running")
    run._watch_cells(namespace)
    return run


def holds_results(folder: Path) -> bool:
    """Whether a run has recorded anything; one that failed earlier reserves neither name nor parameters."""
    return any(
        file.name not in BOOKKEEPING
        and not file.name.endswith(".partial")
        and (file.is_symlink() or (file.is_file() and file.stat().st_size))  # links are not followed
        for file in folder.rglob("*")
    )


def compare_parameters(notebook: str, values: Parameters) -> bool:
    """Whether the run exists and has recorded something; its parameters must then be equal.

    Raises:
        RunError: the parameters differ, or cannot be read.
    """
    file = own_folder(notebook, values) / "parameters.yaml"
    try:
        if not (file.exists() and holds_results(run_folder(notebook, values))):
            return False
    except OSError as error:  # a name too long, a folder that cannot be read
        raise RunError(
            f"{file.parent}: cannot be read ({error}). Choose another run name or outputs folder."
        ) from error
    stored, ours = parameters.load(file), values.model_dump()
    if not stored:
        raise RunError(f"{file}: empty; expected the parameters of a run. Restore it, or choose another run name.")
    stored = type(values)().model_dump() | stored  # a parameter that came later had its default's effect
    differences = [
        f"{name}: {stored.get(name)!r} stored, {ours.get(name)!r} now"
        for name in sorted(stored.keys() | ours.keys() - {"outputs"})
        if name != "outputs" and stored.get(name) != ours.get(name)
    ]
    if differences:
        raise RunError(
            f"{file.parent} holds a run with other parameters ({'; '.join(differences)}). Choose another run name, "
            "or delete that folder."
        )
    return True


def finished(notebook: str, values: Parameters) -> bool:
    """Whether this very run is complete, report included; a report that gathers other runs never is.

    Raises:
        RunError: the folder holds a run with other parameters.
    """
    folder = own_folder(notebook, values)
    exists = compare_parameters(notebook, values)
    done = read_json(folder / "status.json").get("state") == "finished"
    reported = (folder / "run.html").exists() or folder != run_folder(notebook, values)
    return exists and done and reported and notebook not in GATHERING


def execute(notebook: str, values: Parameters) -> Path:
    """Run a notebook with papermill and render its report; a finished run is left unchanged, a stopped one resumes.

    Returns:
        the run's folder.

    Raises:
        RunError: an input is absent, the notebook failed (the message ends with its error), or its folder is in use.
    """
    folder = own_folder(notebook, values)
    title = f"{notebook} / {folder.relative_to(outputs_folder(values) / notebook)}"
    if finished(notebook, values):
        print(f"{title}: finished before, left as it is: {folder / 'run.html'}")
        return folder
    check_inputs(values)
    make_folder(folder)
    began = time.perf_counter()
    try:
        lock = _lock(folder / ".runner.lock")
    except filelock.Timeout:
        raise RunError(f"{folder}: another scaled-ql run is executing this run; wait for it or stop it.") from None
    try:
        with lock, _progress_bar(folder, title):
            _papermill(notebook, values, folder)
            if folder == run_folder(notebook, values):
                publish(folder / "run.ipynb")
    except OSError as error:
        raise RunError(
            f"{folder}: the run cannot be executed here ({error}). Make room, make the folder writable, or set outputs "
            "to another one."
        ) from error
    print(f"{title}: {time.perf_counter() - began:.0f} s: {run_folder(notebook, values) / 'run.html'}")
    return folder


def _papermill(notebook: str, values: Parameters, folder: Path) -> None:
    import papermill
    from traitlets.config import Config

    from scaled_ql import recorder

    source, partial = workspace() / "notebooks" / f"{notebook}.ipynb", folder / ".run.ipynb"
    given = values.model_dump(exclude_defaults=True)
    os.environ.setdefault("GLIBC_TUNABLES", LARGE_PAGES)
    for attempt in range(3):
        # Sockets in a private folder instead of TCP ports, which could collide.
        with tempfile.TemporaryDirectory(prefix="scaled-ql-", dir=_socket_folder()) as own, _own_kernel(Path(own)):
            settings = {"transport": "ipc", "ip": f"{own}/kernel", "shutdown_wait_time": SHUTDOWN_SECONDS}
            local = Config(KernelManager=settings)
            try:
                papermill.execute_notebook(
                    source, partial, given, kernel_name="python3", cwd=workspace(), progress_bar=False, config=local
                )
                break
            except papermill.PapermillExecutionError as error:
                partial.replace(folder / "run.ipynb")
                recorder.sign(folder / "run.ipynb")
                if error.ename == LeftToFirstProcess.__name__:
                    return
                failed = RunError(
                    f"{source.name}: {error.ename}: {error.evalue}\nThe notebook as far as it came: "
                    f"{folder / 'run.ipynb'}. Running the same command again resumes from disk."
                )
                failed.add_note(re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback or [])))
                raise failed from None
            except RuntimeError as error:  # the kernel did not start, or died
                if attempt == 2 or read_json(folder / "status.json").get("pid") is not None:
                    raise RunError(f"{source.name}: the kernel died ({error}). Run again to resume.") from error
                time.sleep(1 + attempt)
    partial.replace(folder / "run.ipynb")


def _socket_folder() -> str | None:
    """Folder of a kernel's sockets: None, the usual temporary folder, unless its path is too long for a socket."""
    longest = f"{tempfile.gettempdir()}/scaled-ql-abcdefgh/kernel-5"
    return None if len(os.fsencode(longest)) <= SOCKET_PATH else "/tmp"


@contextlib.contextmanager
def _own_kernel(folder: Path) -> Iterator[None]:
    """Bind the kernel name python3 to this interpreter, whatever JUPYTER_PATH names."""
    from ipykernel.kernelspec import write_kernel_spec

    write_kernel_spec(folder / "kernels" / "python3")
    before = os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = os.pathsep.join([str(folder), *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["JUPYTER_PATH"]
        else:
            os.environ["JUPYTER_PATH"] = before


@contextlib.contextmanager
def _progress_bar(folder: Path, title: str) -> Iterator[None]:
    """Show the run's own progress from its status file, on stderr."""
    done = threading.Event()

    def follow() -> None:
        status: dict[str, Any] = {}
        with tqdm(desc=title, unit="step", dynamic_ncols=True, leave=False, disable=None) as bar:
            while not done.wait(1):
                with contextlib.suppress(RunError):
                    status = read_json(folder / "status.json")
                if status.get("total"):
                    bar.total, bar.n = status["total"], status["done"]
                bar.refresh()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def publish(notebook: Path) -> None:
    """Sign and render the notebook of a finished run, and make it read-only.

    Opened, executed with another `run` and saved, a writable one would be overwritten by that run's notebook.
    """
    from scaled_ql import recorder

    recorder.sign(notebook)
    render(notebook)
    notebook.chmod(0o444)


def render(notebook: Path) -> Path:
    """Write a notebook's HTML next to it: one file that opens offline, with figures and videos inside."""
    import nbformat

    from scaled_ql.report import ReportExporter

    content = nbformat.read(notebook, as_version=4)
    exporter = ReportExporter(
        embed_images=True, mathjax_url="", require_js_url="", jquery_url="", widget_renderer_url="", theme="light"
    )
    resources = {"metadata": {"name": notebook.parent.name}, "about": _about(notebook.parent)}
    html, _ = exporter.from_notebook_node(content, resources)
    file = notebook.with_suffix(".html")
    _write_text(file, html)
    return file


def _about(folder: Path) -> dict[str, Any]:
    """What a report says of its run: see `report.arrange`; empty where the folder is not a run's."""
    if not (folder / "parameters.yaml").exists():
        return {}
    stored, notebook = parameters.load(folder / "parameters.yaml"), folder.parent.name
    fields = parameters.NOTEBOOKS[notebook].model_fields if notebook in parameters.NOTEBOOKS else {}
    stored = {name: value for name, value in stored.items() if name not in ("run", "outputs")}
    usual = [name for name, value in stored.items() if name in fields and fields[name].default == value]
    made = read_json(folder / "provenance.json")
    updated = read_json(folder / "status.json").get("updated")
    words = [folder.name] if "." in folder.name else []  # the title has the first part of a grid's run
    words += [f"seed {stored['seed']}"] if "seed" in stored else []
    words += [time.strftime("%d %B %Y", time.gmtime(updated))] if updated is not None else []
    words += (
        [f"commit {made['git_commit'][:7]}{', modified' if made.get('git_dirty') else ''}"]
        if made.get("git_commit")
        else []
    )
    return {
        "run": folder.name,
        "line": " · ".join(words),
        "verdict": read_json(folder / "summary.json").get("verdict", ""),
        "changed": {name: value for name, value in stored.items() if name not in usual},
        "defaults": {name: stored[name] for name in usual},
    }
