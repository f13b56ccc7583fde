"""The command `scaled-ql`."""

import sys
from pathlib import Path

import click
import yaml

from scaled_ql import parameters, runs


@click.group()
def main() -> None:
    """Scaled offline Q-learning on Atari: run notebooks unattended."""


@main.command()
@click.argument("target")
@click.argument("params", required=False, type=click.Path(exists=True, dir_okay=False))
@click.option("-p", "overrides", nargs=2, multiple=True, metavar="NAME VALUE", help="Set one parameter (YAML value).")
@click.option("--outputs", default="", help="Folder for the runs instead of the workspace's outputs/.")
def run(target: str, params: str | None, overrides: tuple[tuple[str, str], ...], outputs: str) -> None:
    """Run a batch (TARGET is a YAML file), or one notebook (TARGET is its name or path) with a YAML of parameters.

    Finished runs are left as they are; stopped ones go on where they stopped.
    """
    try:
        values = {name: yaml.safe_load(value) for name, value in overrides}
        if outputs:
            values["outputs"] = str(Path(outputs).absolute())
        if target.endswith((".yaml", ".yml")):
            steps = runs.load_batch(target, values)
        else:
            notebook = Path(target).stem
            source = params or "command line"
            given = parameters.load(params) if params else {}
            steps = [(notebook, parameters.check(notebook, given | values, source))]
        for notebook, checked in steps:
            runs.execute(notebook, checked)
    except (parameters.ParameterError, runs.RunError, yaml.YAMLError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo("stopped; the same command goes on from here", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
