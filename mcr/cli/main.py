"""The `mcr` command: one file per verb or noun, loaded when it is used.

The only place that turns errors into text and exit statuses. It must never do what the supervisor does.
"""

import importlib
import os
import sys

import click

from mcr import logs
from mcr.cli.common import Settings
from mcr.errors import ExitStatus, McrError
from mcr.limits import time_scale

COMMANDS = (
    *("run", "attach", "detach", "rule", "status", "stats", "check", "reload", "send", "listen"),
    *("doctor", "explain", "joins", "log", "top", "completion", "trace", "capture"),
)


class LazyGroup(click.Group):
    """Imports a command's module only when that command is used: `mcr status` needs no BPF."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"mcr.cli.{cmd_name}").command
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--instance", default="default", metavar="NAME", help="Which relay, where several run on one host."
)
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
@click.version_option(package_name="mcr", prog_name="mcr")
@click.pass_context
def cli(ctx: click.Context, instance: str, verbose: bool) -> None:
    """MCR relays multicast and unicast UDP streams from one network to others."""
    logs.configure("debug" if verbose else "info")
    ctx.obj = Settings(instance)


def report(error: McrError) -> None:
    """Two lines on standard error for each: the cause, and the remedy. Then the number, if there are more."""
    for each in error.each():
        print(f"mcr: {each}\n  remedy: {each.remedy}", file=sys.stderr)
    if error.others:
        shown = 1 + len(error.others)
        unshown = f", the first {shown} are above" if error.unshown else ""
        print(f"mcr: {shown + error.unshown} errors{unshown}", file=sys.stderr)


def main() -> None:
    """Runs one command and exits with its status."""
    try:
        time_scale()  # a wrong one is said before anything waits
        status = cli.main(standalone_mode=False, prog_name="mcr")
        sys.exit(status if isinstance(status, int) else ExitStatus.DONE)
    except McrError as error:
        report(error)
        sys.exit(error.status)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(ExitStatus.USAGE)
    except click.UsageError as error:
        error.show()
        sys.exit(ExitStatus.USAGE)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitStatus.FAILED)


if __name__ == "__main__":
    main()
