"""`mcr run`: a supervisor in the foreground."""

import asyncio
from pathlib import Path
from typing import Literal

import click

from mcr.cli.common import Settings, configure_log, errors_logged, log_options, say
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
@click.option(
    "--on-exit",
    type=click.Choice(["detach", "keep"]),
    default="detach",
    show_default=True,
    help="Leave nothing, or leave the kernel path and its joins for the next supervisor to adopt.",
)
@click.option("--replace", is_flag=True, help="Start afresh where an earlier supervisor left it forwarding.")
@log_options
@click.pass_obj
def command(
    settings: Settings,
    paths: tuple[Path, ...],
    metrics: str | None,
    on_exit: Literal["detach", "keep"],
    replace: bool,
    log_level: str | None,
    log_json: bool,
) -> None:
    """Run a supervisor until SIGTERM or Ctrl-C; SIGHUP reloads its files."""
    configure_log(log_level, log_json)

    def ready(_: object) -> None:
        say("ready", log_json)

    with errors_logged(log_json):
        asyncio.run(
            run(settings.instance, paths, metrics, on_exit=on_exit, replace_kept=replace, ready=ready)
        )
