"""The command `scaled-ql`."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO, get_args

import click
from tqdm import tqdm

from scaled_ql import batches, documents, parameters, run_table, runs

SHOWN = 10  # printed entries of a list that is also in a file

INPUTS = ("dataset", "view", "game")  # parameters that name a run's inputs


@click.group()
@click.version_option(package_name="scaled-ql", prog_name="scaled-ql")
def main() -> None:
    """Scaled offline Q-learning on Atari: run notebooks unattended, import and check datasets."""


@main.command()
@click.argument("target")
@click.argument("params", default="")
@click.option("-p", "overrides", nargs=2, multiple=True, metavar="NAME VALUE", help="Set one parameter (YAML value).")
@click.option("--outputs", default="", help="Folder for the runs instead of the workspace's outputs/.")
@click.option("--workers", default=0, show_default=True, help="Runs of a grid at once; 0: one per accelerator or core.")
@click.option("--scheduler", default="", help="Address of a running Dask scheduler for grids.")
def run(
    target: str,
    params: str,
    overrides: tuple[tuple[str, str], ...],
    outputs: str,
    workers: int,
    scheduler: str,
) -> None:
    """Run a batch (TARGET is a YAML file), or one notebook (TARGET is its name or path) with a YAML of parameters.

    Finished runs are left as they are; stopped ones resume.
    """
    with _reporting(parameters.ParameterError, runs.RunError):
        values = _overrides(overrides)
        if outputs:
            values["outputs"] = str(Path(outputs).resolve())
        steps = _steps(target, params, values)
        for cell in (cell for step in steps for cell in step.cells):
            runs.check_names(cell)
        for step in steps:
            if len(step.cells) == 1:
                runs.execute(step.notebook, step.cells[0])
            else:
                inputs = {tuple(getattr(cell, name, "") for name in INPUTS): cell for cell in step.cells}
                for cell in inputs.values():  # each once, not for every seed
                    runs.check_inputs(cell)
                _run_grid(step, workers, scheduler)


def _steps(target: str, params: str, values: dict[str, Any]) -> list[batches.Step]:
    """The steps to run; the error for a misspelt target suggests the probable one."""
    is_batch, notebook = target.endswith((".yaml", ".yml")), Path(target).stem
    if is_batch and params:
        meant = f"scaled-ql run {params} {target}" if params in parameters.NOTEBOOKS else f"scaled-ql run {target}"
        raise parameters.ParameterError(
            f"{target} is a file, which takes no second argument ({params}). Did you mean: {meant}"
        )
    known = os.path.exists(target) if is_batch else notebook in parameters.NOTEBOOKS  # noqa: PTH110
    if not known or (params and not os.path.isfile(params)):  # noqa: PTH113 - pathlib's raise for a name that is too long
        near = batches.near_command(target if is_batch else notebook, params)
        hint = f"Did you mean: {near}" if near else f"There are {', '.join(parameters.NOTEBOOKS)}, and params/batches/."
        wrong = f"{params}: no such file." if known else f"{target}: no such batch or notebook."
        raise parameters.ParameterError(f"{wrong} {hint}")
    if is_batch:
        return batches.load_batch(target, values)
    given = parameters.load(params) if params else {}
    return [batches.Step(notebook, [parameters.check(notebook, given | values, params or "command line")], 0)]


def _overrides(pairs: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """Parameters of the command line, each value YAML."""
    values: dict[str, Any] = {}
    for name, text in pairs:
        if name in values:
            raise parameters.ParameterError(f"-p {name} is given twice; give it once.")
        try:
            values[name] = documents.parse(text)
        except documents.DocumentError as error:
            raise parameters.ParameterError(f"-p {name} {text!r}: not a YAML value ({error}); quote text.") from error
    return values


def _run_grid(step: batches.Step, workers: int, scheduler: str) -> None:
    from scaled_ql import grids

    cells = [(step.notebook, values) for values in step.cells]
    outcomes = grids.run_grid(cells, workers=workers, scheduler=scheduler, retries=step.retries)
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    click.echo(f"{step.notebook}: {len(outcomes) - len(failed)} of {len(outcomes)} runs finished")
    for outcome in failed:
        click.echo(f"\n{outcome.values.run}: failed, {outcome.retries} retries\n{outcome.error}", err=True)
    if failed:
        names = ", ".join(outcome.values.run for outcome in failed)
        raise runs.RunError(f"{len(failed)} runs failed ({names}); the same command retries them.")


_outputs = click.option("--outputs", default="", help="Folder with the runs instead of the workspace's outputs/.")


def _folder(outputs: str) -> Path:
    return Path(outputs).resolve() if outputs else runs.workspace() / "outputs"


@main.group("runs", invoke_without_command=True)
@click.option("--notebook", default="", help="Only runs of this notebook.")
@click.option("--state", default="", help="Only runs in this state: finished, running, failed, interrupted, stopped.")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON, for scripts.")
@_outputs
@click.pass_context
def runs_(context: click.Context, notebook: str, state: str, as_json: bool, outputs: str) -> None:
    """List all runs, the one updated last first: state, progress, age, score, and in which parameters they differ."""
    if context.invoked_subcommand:
        return
    with _reporting(runs.RunError):
        table = run_table.gather(_folder(outputs))
    for name, wanted in {"notebook": notebook, "state": state}.items():
        known = sorted(table[name].unique())
        if wanted and wanted not in known:
            click.echo(f"no runs with {name} {wanted!r}; there are {', '.join(known) or 'none'}", err=True)
        table = table[table[name] == wanted] if wanted else table
    if as_json:
        click.echo(json.dumps(run_table.records(table), indent=1))
    else:
        _print_table(run_table.in_words(table, time.time()), f"{len(table)} runs in {_folder(outputs)}")


@runs_.command("compare")
@click.argument("names", nargs=-1, required=True)
@click.option("--figure", default="", help="Write the learning curves as a picture to this file.")
@_outputs
def compare(names: tuple[str, ...], figure: str, outputs: str) -> None:
    """Compare runs: parameters that differ, scores with 95% intervals over episodes, the ends of their logs.

    NAMES are <notebook>/<run>, or a run's name where it is the only one.
    """
    with _reporting(runs.RunError, parameters.ParameterError):
        folders = [runs.find(_folder(outputs), name) for name in names]
        tables = {
            "parameters that differ": run_table.compare_parameters(folders),
            "mean returns, with 95% intervals over episodes": run_table.compare_scores(folders),
        }
        curves = run_table.learning_curves(folders)
    for title, table in tables.items():
        _print_table(table.reset_index(), title if len(table) else f"{title}: none")
    if len(curves):
        last = curves.sort_values("step").groupby("run", sort=False).last()
        _print_table(last[["step", "loss"]].round(4).reset_index(), "end of the log")
        if figure:
            from scaled_ql import plots

            plots.set_style()
            plots.compare_curves(curves).savefig(figure)
            click.echo(f"written: {figure}")


@runs_.command("scores")
@click.argument("params")
@click.argument("file")
@_outputs
def scores(params: str, file: str, outputs: str) -> None:
    """Write the scores of the runs that differ from PARAMS, a file of params/04_scaled_training, to FILE, a CSV.

    Each row has the command of its run; 08_paper_report tests the paper's claims on such files.
    """
    from scaled_ql import ablations, claims

    with _reporting(runs.RunError, parameters.ParameterError, ablations.GatherError, OSError):
        meant = runs.workspace() / "params" / ablations.NOTEBOOK / Path(params).name
        if not meant.exists() or Path(params).resolve() != meant:
            raise runs.RunError(f"{params}: not a file of params/{ablations.NOTEBOOK}/, whose runs have scores.")
        table = claims.save(ablations.gather(_folder(outputs)), meant.name)
        if table.empty:
            raise runs.RunError(f"{_folder(outputs)}: no finished run has the data, steps and evaluation of {params}.")
        table.to_csv(file, index=False)
    click.echo(f"{table['run'].nunique()} runs in {file}")


@main.command()
@click.option("--yes", is_flag=True, help="Delete without asking.")
@_outputs
def clean(yes: bool, outputs: str) -> None:
    """Delete runs that failed before they recorded anything, and half-written files; asks first."""
    with _reporting(runs.RunError, OSError):
        found = run_table.leftovers(_folder(outputs))
        for path, why in found.items():
            click.echo(f"{path}: {why}")
        if found and (yes or click.confirm(f"Delete these {len(found)}?")):
            run_table.delete(found.keys() & run_table.leftovers(_folder(outputs)).keys())  # not what began meanwhile
            click.echo("deleted")
    if not found:
        click.echo("nothing to delete")


@main.command()
@click.argument("names", nargs=-1, required=True)
@_outputs
def render(names: tuple[str, ...], outputs: str) -> None:
    """Write the reports (run.html) of runs anew from their executed notebooks."""
    with _reporting(runs.RunError):
        for name in names:
            folder = runs.find(_folder(outputs), name)
            if not (folder / "run.ipynb").exists():
                raise runs.RunError(f"{folder}: has no run.ipynb; execute the run first.")
            click.echo(runs.render(folder / "run.ipynb"))


@main.command()
@click.argument("source", default="")
@click.argument("destination", default="")
def site(source: str, destination: str) -> None:
    """Write an index of all reports, with the reports, as static files.

    SOURCE is an outputs folder (default: the workspace's) or a folder of reports; DESTINATION by default SOURCE/site.
    """
    from scaled_ql import site as pages

    with _reporting(runs.RunError, OSError):
        folder = _folder(source)
        click.echo(pages.build(folder, Path(destination).resolve() if destination else folder / "site"))


def _print_table(table: Any, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title, title_justify="left")
    for column in table.columns:
        shown.add_column(str(column), overflow="fold")
    for row in table.itertuples(index=False):
        shown.add_row(*map(str, row))
    Console(width=None if sys.stdout.isatty() else 200).print(shown, markup=False)


@main.group("import")
def import_() -> None:
    """Import a published or logged dataset into a replay store. A stopped import resumes when it is run again."""


@main.group()
def export() -> None:
    """Write a replay store in another layout, or a trained agent as a folder to share."""


def _import_options(command: Callable) -> Callable:
    """Options of all imports."""
    for option in (
        click.option("--skip-bad", is_flag=True, help="Skip files that cannot be read, and list them."),
        click.option("--workers", default=0, show_default=True, help="Processes of a local Dask cluster; 0: this one."),
        click.option("--scheduler", default="", help="Address of a running Dask scheduler to use instead."),
    ):
        command = option(command)
    return command


_games = click.option("--game", "games", multiple=True, help="Import this game (repeatable); all by default.")
_actions = click.option(
    "--actions", default="minimal", show_default=True, type=click.Choice(["minimal", "full"]),
    help="The set that the source's actions index; full: all 18, mapped onto the game's set by name.",
)  # fmt: skip
_runs = click.option("--run", "numbers", multiple=True, type=int, help="Import this run (repeatable); all by default.")


@import_.command("dqn-replay")
@click.argument("source")
@click.argument("destination")
@_games
@_runs
@_actions
@_import_options
def import_dqn_replay(source: str, destination: str, games: tuple, numbers: tuple, **options: Any) -> None:
    """Import DQN-Replay logs from SOURCE, the folder or URL that holds the game folders."""
    _import("import_dqn_replay", source, destination, list(games) or None, list(numbers) or None, **options)


@import_.command("rl-unplugged")
@click.argument("source")
@click.argument("destination")
@_games
@_runs
@_actions
@_import_options
def import_rl_unplugged(source: str, destination: str, games: tuple, numbers: tuple, **options: Any) -> None:
    """Import RL Unplugged records from SOURCE, the folder or URL that holds the game folders."""
    _import("import_rl_unplugged", source, destination, list(games) or None, list(numbers) or None, **options)


@import_.command("minari")
@click.argument("dataset")
@click.argument("destination")
@click.option("--game", default=None, help="The game, if the dataset does not name it.")
@click.option("--run", default=1, show_default=True, help="Number of the run in the store.")
@_import_options
def import_minari(dataset: str, destination: str, game: str | None, run: int, **options: Any) -> None:
    """Import a Minari DATASET: an id of the local Minari folder, or a folder of one dataset."""
    _import("import_minari", dataset, destination, game, run, **options)


def _import(name: str, *arguments: Any, **options: Any) -> None:
    from scaled_ql import replay

    with _reporting(replay.ReplayError), tqdm(unit="file", dynamic_ncols=True, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        report = getattr(replay, name)(*arguments, progress=progress, **options)
    click.echo(f"{report.transitions:,} transitions in {arguments[1]}")
    for title, entries in (("gap", report.gaps), ("excluded", report.excluded), ("left out", report.left_out)):
        for entry in entries[:SHOWN]:
            click.echo(f"{title}: {', '.join(f'{key} {value}' for key, value in entry.items())}")
        if len(entries) > SHOWN:
            click.echo(f"{title}: {len(entries) - SHOWN} more, all listed in import.json of each game and run")


@export.command("dqn-replay")
@click.argument("store")
@click.argument("destination")
@click.option("--rows-per-file", default=1_000_000, show_default=True)
def export_dqn_replay(store: str, destination: str, rows_per_file: int) -> None:
    """Write STORE as DQN-Replay logs, for other libraries to read."""
    from scaled_ql import replay

    with _reporting(replay.ReplayError):
        replay.export_dqn_replay(store, destination, rows_per_file)
    click.echo(f"written: {destination}")


@export.command("model")
@click.argument("run")
@click.argument("folder")
@click.option("--step", default=None, type=int, help="Gradient steps of the checkpoint; the newest by default.")
@_outputs
def export_model(run: str, folder: str, step: int | None, outputs: str) -> None:
    """Write the agent of RUN to a new FOLDER: safetensors, configuration, model card.

    RUN is <notebook>/<run> of 02_online_agents, 04_scaled_training or 06_transfer, or its folder.
    """
    from scaled_ql import model_card, training

    with _reporting(runs.RunError, parameters.ParameterError, training.CheckpointError, OSError):
        click.echo(f"written: {model_card.export(run, folder, step, outputs)}")


@main.command()
@click.argument("store")
def verify(store: str) -> None:
    """Read all of STORE and compare it with its episode tables and checksums."""
    from scaled_ql import replay

    with _reporting(replay.ReplayError):
        dataset = replay.open_replay(store)
        total = sum(map(dataset.num_transitions, dataset.games))
        with tqdm(total=total, unit="transition", unit_scale=True, dynamic_ncols=True, disable=None) as bar:
            problems = dataset.validate(bar.update)
        unfinished = [
            f"{game} run {report['run']}: its import is incomplete; run it again"
            for game in dataset.games
            for report in dataset.import_reports(game)
            if not report["complete"]
        ]
    for problem in (*problems, *unfinished):
        click.echo(problem)
    click.echo(f"{len(dataset.games)} games, {total:,} transitions: {len(problems) + len(unfinished)} problems")
    sys.exit(bool(problems or unfinished))


@main.command()
@click.argument("store")
@click.option("--name", default="", help="Name of the dataset; by default the run's that made it, or the folder's.")
@click.option("--creator", default="", help="Who made it; Croissant wants this, a licence and a URL to publish it.")
@click.option("--license", "licence", default="", help="Its licence, best as a URL of spdx.org.")
@click.option("--url", default="", help="Where it is published.")
def card(store: str, name: str, creator: str, licence: str, url: str) -> None:
    """Write a dataset card into STORE: croissant.json, which says what is in it and how it was made."""
    from scaled_ql import dataset_card, replay

    with _reporting(replay.ReplayError, runs.RunError, parameters.ParameterError, OSError):
        given = {"name": name, "creator": creator, "license": licence, "url": url}
        today = time.strftime("%Y-%m-%d", time.gmtime())
        click.echo(f"written: {dataset_card.write(store, today, **given)}")


@main.group()
def benchmark() -> None:
    """Measure this machine against its limits."""


@benchmark.command("sampling")
@click.argument("store")
def benchmark_sampling(store: str) -> None:
    """Batches per second from disk and memory, compared with zstd's limit and a plain buffer; bytes per transition."""
    with _benchmarks() as benchmarks:
        click.echo(benchmarks.bytes_per_transition(store).round(1).to_string())
        click.echo(benchmarks.benchmark_sampling(store).round(0).to_string())


@benchmark.command("scale")
@click.argument("store")
@click.argument("folder")
@click.option("--copies", default=1_000, show_default=True, help="How many times larger the large store is.")
def benchmark_scale(store: str, folder: str, copies: int) -> None:
    """The same for a store of 40 games, made in FOLDER from chunks of STORE, and for a far larger store."""
    with _benchmarks() as benchmarks:
        click.echo(benchmarks.benchmark_scale(store, folder, copies).round(2).to_string())


@benchmark.command("online")
@click.option("--game", default="Breakout", show_default=True)
@click.option("--environments", default=64, show_default=True)
@click.option("--encoder", default="nature_narrow", show_default=True, type=click.Choice(get_args(parameters.Encoder)))
@click.option("--update-period", default=64, show_default=True, help="Environment steps between updates.")
def benchmark_online(game: str, environments: int, encoder: str, update_period: int) -> None:
    """Agents that play, learn and do both, compared with random actions; their replay, uncompressed and compressed.

    And the CPU time of each part, with the rates on sixteen cores that are computed from it.
    """
    settings = {"environments": environments, "encoder": encoder}
    with _benchmarks() as benchmarks:
        click.echo(benchmarks.benchmark_online(game, **settings, update_period=update_period).round(2).to_string())
        parts = benchmarks.online_parts(game, **settings)
        click.echo(parts.round(1).to_frame("CPU, µs").to_string())
        click.echo("computed, 16 cores, steps/s:")
        click.echo(benchmarks.online_rates(parts, 16, environments, update_period).round(2).to_string())
        click.echo(benchmarks.benchmark_ring(game, environments).round(2).to_string())


@benchmark.command("import")
@click.argument("store")
@click.argument("folder")
@click.option("--rows", default=1_000_000, show_default=True, help="Rows of the file.")
def benchmark_import(store: str, folder: str, rows: int) -> None:
    """Import a full-size log file, made in FOLDER from STORE, compared with decoding its gzip alone."""
    with _benchmarks() as benchmarks:
        click.echo(benchmarks.benchmark_import(store, folder, rows).round(1).to_string())


@benchmark.command("peers")
@click.argument("store")
@click.argument("environments")
@click.option("--csv", type=click.File("w", lazy=False), help="Also write all rates to this file, for 09_performance.")
@click.option("--transitions", default=20_000, type=click.IntRange(1), help="Of STORE's first game.", show_default=True)
@click.option("--seconds", default=5.0, show_default=True, help="Duration of each measurement.")
@click.option("--rounds", default=5, type=click.IntRange(1), help="Of all measurements, in turn.", show_default=True)
def benchmark_peers(store: str, environments: str, csv: TextIO | None, **settings: Any) -> None:
    """Training steps, batches and environments compared with d3rlpy, Dopamine, TorchRL and EnvPool; eight minutes.

    ENVIRONMENTS is a folder of virtual environments, each named after its library; what is not installed is left out,
    with the command that installs it.
    """
    import pandas as pd

    from scaled_ql import peers

    rows = []
    with _benchmarks():
        for row in peers.measure(store, environments, **settings):
            if "left out" in row:
                click.echo(f"{row['library']} is left out; {row['left out']}", err=True)
            else:
                rows.append(row)
                if csv:
                    line = pd.DataFrame([row], columns=peers.COLUMNS)
                    line.to_csv(csv, index=False, header=len(rows) == 1)
                    csv.flush()
        click.echo(peers.table(pd.DataFrame(rows)).round(2).to_string())


@contextlib.contextmanager
def _benchmarks() -> Iterator[Any]:
    """Yield the module of benchmarks, with its errors shown as a line."""
    from scaled_ql import benchmarks, games, replay

    with _reporting(replay.ReplayError, games.UnknownGame, OSError):
        yield benchmarks


@contextlib.contextmanager
def _reporting(*kinds: type[Exception]) -> Iterator[None]:
    """Turn errors that name their remedy into a line and an exit status."""
    try:
        yield
    except kinds as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo("stopped; the same command resumes from here", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
