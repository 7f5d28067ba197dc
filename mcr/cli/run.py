"""`mcr run`: a supervisor in the foreground."""

import asyncio
import sys
from pathlib import Path

import click

from mcr.cli.common import Settings
from mcr.service import run


@click.command(name="run")
@click.option(
    "-c",
    "--config",
    "paths",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A TOML file; several are read in order.",
)
@click.option("--metrics", metavar="ADDR:PORT|off", help="Where to serve Prometheus metrics.")
@click.pass_obj
def command(settings: Settings, paths: tuple[Path, ...], metrics: str | None) -> None:
    """Run a supervisor until SIGTERM or Ctrl-C; SIGHUP reloads its files."""
    asyncio.run(run(settings.instance, paths, metrics, ready=lambda _: print("mcr: ready", file=sys.stderr)))
