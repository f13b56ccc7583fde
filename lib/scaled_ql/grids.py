"""Grids: runs that differ in a few parameters, in parallel on Dask workers, with a table that follows them.

A step of a batch may carry a grid (`batches`). Finished runs are recognised, and interrupted ones resume from their
checkpoints.

On Slurm or Kubernetes, start the workers with dask-jobqueue or dask-kubernetes, one thread and one accelerator each::

    cluster = SLURMCluster(
        cores=1, processes=1, memory="64GB", job_extra_directives=["--gres=gpu:1"], walltime="24:00:00"
    )
    cluster.scale(16)
    print(cluster.scheduler_address)  # for --scheduler; keep this process alive

Workers may join and leave; `cluster.adapt` would never start a second one, since runs wait here and not with Dask.
"""

import contextlib
import io
import os
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import dask
from rich.console import Console
from rich.live import Live
from rich.table import Table

from scaled_ql import parameters, run_table, runs
from scaled_ql.parameters import Parameters
from scaled_ql.processes import accelerators, main_guard_hint

REFRESH_SECONDS = 2.0
FINISHED_SHOWN = 5
COLUMNS = ("state", "step", "steps/s", "loss", "score", "time left")


class Outcome(NamedTuple):
    """The outcome of a run of a grid.

    Attributes:
        notebook, values: the run.
        state: ``finished`` or ``failed``.
        retries: number of retries.
        error: "" or the last error, with the traceback of the cell that failed.
    """

    notebook: str
    values: Parameters
    state: str
    retries: int
    error: str


def run_grid(
    cells: Sequence[tuple[str, Parameters]], *, workers: int = 0, scheduler: str = "", retries: int = 2
) -> list[Outcome]:
    """Execute runs in parallel; a failed one is retried, and does not stop the others.

    Args:
        cells: notebooks and their checked parameters, with distinct run names.
        workers: processes of a local Dask cluster; 0: one per accelerator, or else one per core. Each has exclusive use
            of an accelerator, or of an equal share of the cores.
        scheduler: address of a running Dask scheduler to use instead, whose workers (one thread and one accelerator
            each) see the same files.
        retries: retries per run.

    Returns:
        one outcome per run, in their order.

    Raises:
        RunError: the local workers did not start.
    """
    from distributed import Client

    done = [cell for cell in cells if runs.finished(*cell)]
    outcomes = {cell[1].run: Outcome(*cell, "finished", 0, "") for cell in done}
    left = [cell for cell in cells if cell[1].run not in outcomes]
    if left:
        cluster = contextlib.nullcontext(scheduler) if scheduler else _local_cluster(workers, len(left))
        with cluster as where, Client(where, set_as_default=False) as client:
            outcomes |= _follow(client, left, retries, GridTable(cells, outcomes))
    return [outcomes[values.run] for _, values in cells]


def _follow(client, cells: list[tuple[str, Parameters]], retries: int, progress: "GridTable") -> dict[str, Outcome]:
    """Submit runs, retrying failed ones, until all have ended; returns outcomes by name of the run.

    As many are submitted as there are threads: Dask hands out all that it has, and may leave a run waiting behind a
    long one while other workers are idle.
    """
    outcomes: dict[str, Outcome] = {}
    tried = dict.fromkeys((values.run for _, values in cells), 0)
    waiting, futures = list(cells), {}

    def submit_waiting() -> None:
        free = max(sum(client.nthreads().values()), 1) - len(futures)
        for notebook, values in waiting[: max(free, 0)]:
            # A new key, as a retry must not reuse the first result. Dask itself moves runs of workers that died.
            future = client.submit(_execute, notebook, values.model_dump(), key=f"{values.run}-{time.time_ns()}")
            futures[future] = waiting.pop(0)

    try:
        with progress.live() as live:
            while waiting or futures:
                submit_waiting()
                time.sleep(REFRESH_SECONDS)
                for future in [future for future in futures if future.done()]:
                    notebook, values = cell = futures.pop(future)
                    error = future.exception()
                    if error is not None and tried[values.run] < retries:
                        tried[values.run] += 1
                        waiting.insert(0, cell)
                        continue
                    text = "" if error is None else "\n".join([str(error), *getattr(error, "__notes__", [])])
                    state = "finished" if error is None else "failed"
                    outcomes[values.run] = Outcome(notebook, values, state, tried[values.run], text)
                progress.update(live, tried, outcomes)
    finally:
        client.cancel(list(futures), force=True)
    return outcomes


def _execute(notebook: str, values: dict) -> None:
    """Execute one run on a worker, quietly."""
    from distributed import get_worker

    lane = getattr(get_worker(), "scaled_ql_lane", None)
    if lane is not None:
        cores, accelerator = lane
        os.sched_setaffinity(0, cores)  # of this thread, and so of the kernel that it starts
        if accelerator is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = accelerator
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        runs.execute(notebook, parameters.check(notebook, values))


@contextlib.contextmanager
def _local_cluster(workers: int, most: int) -> Iterator:
    """A cluster of processes of one thread each on this machine, which do not share cores or accelerators."""
    from distributed import Client, LocalCluster

    cores, devices = sorted(os.sched_getaffinity(0)), accelerators()
    workers = min(workers or len(devices) or len(cores), most)
    lanes = [
        (cores[number::workers] or cores, devices[number % len(devices)] if devices else None)
        for number in range(workers)
    ]

    def take_lane(dask_worker) -> None:
        dask_worker.scaled_ql_lane = lanes[int(dask_worker.name)]

    # Dask monitors itself a hundred times a second, which slows down small machines.
    calm = {"distributed.worker.profile.enabled": False, "distributed.admin.tick.interval": "1s"}
    quiet = {"silence_logs": "ERROR", "dashboard_address": None}
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(calm))
        try:
            options = {"threads_per_worker": 1, "host": "127.0.0.1", "memory_limit": 0} | quiet
            cluster = stack.enter_context(LocalCluster(n_workers=workers, **options))
        except (RuntimeError, OSError) as error:
            remedy = main_guard_hint() or "Run again, with fewer workers if memory or processes are short."
            raise runs.RunError(f"the workers did not start ({error}). {remedy}") from error
        client = stack.enter_context(Client(cluster, set_as_default=False))
        client.register_worker_callbacks(take_lane)  # also for workers that Dask restarts
        yield cluster


class GridTable:
    """A table of the runs, updated in place in a terminal and in JupyterLab; elsewhere a line per ended run."""

    def __init__(self, cells: Sequence[tuple[str, Parameters]], outcomes: dict[str, Outcome]):
        self._cells, self._done, self._told = cells, outcomes, set()
        self._console = Console()

    def live(self) -> contextlib.AbstractContextManager:
        """The display that `update` draws on."""
        if self._console.is_terminal or self._console.is_jupyter:
            return Live(self.table({}, {}), console=self._console, auto_refresh=False)
        return contextlib.nullcontext()

    def update(self, live: Live | None, tried: dict[str, int], outcomes: dict[str, Outcome]) -> None:
        """Show the state of all runs."""
        if live is not None:
            live.update(self.table(tried, outcomes), refresh=True)
            return
        for name, outcome in outcomes.items():
            if name not in self._told:
                self._told.add(name)
                count = len(self._told) + len(self._done)
                again = f", tried {outcome.retries + 1} times" if outcome.retries else ""
                score = run_table.last_score(runs.outputs_folder(outcome.values) / outcome.notebook / name)
                said = f"{name}: {outcome.state}{again}{f', score {score}' if score else ''}"
                print(f"[{count}/{len(self._cells)}] {said}", flush=True)

    def table(self, tried: dict[str, int], outcomes: dict[str, Outcome]) -> Table:
        """A row per running, failed and recently finished run; counts of the others."""
        recent = [name for name, outcome in outcomes.items() if outcome.state == "finished"][-FINISHED_SHOWN:]
        outcomes = self._done | outcomes
        rows, waiting, finished = [], 0, 0
        for notebook, values in self._cells:
            state = outcomes[values.run].state if values.run in outcomes else None
            folder = runs.outputs_folder(values) / notebook / values.run
            row = (
                run_table.describe(folder) if state is None else {"state": state, "score": run_table.last_score(folder)}
            )
            finished += state == "finished"
            if state == "finished" and values.run not in recent:
                continue
            if state is None and row["state"] == "waiting" and not tried.get(values.run):
                waiting += 1
            else:
                rows.append((values.run, row, tried.get(values.run, 0)))
        table = Table(title=f"{finished} of {len(self._cells)} finished, {waiting} waiting", title_justify="left")
        for column in ("run", *COLUMNS, "retries"):
            table.add_column(column, justify="left" if column in ("run", "state") else "right")
        for name, row, retries in rows:
            shown = [row.get(column, "") for column in COLUMNS]
            table.add_row(name, *shown, str(retries or ""))
        return table
