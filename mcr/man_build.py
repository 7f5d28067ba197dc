"""Writes mcr(1), a man page of all commands, from the commands themselves, to standard output.

Only a build step: `make install` runs it. It must never say anything that `mcr --help` does not, but for exit
statuses, files and the environment. The requests are those of man(7).
"""

import re
from collections.abc import Iterator
from importlib.metadata import version

import click

from mcr.cli.main import cli
from mcr.errors import ExitStatus

STATUS_MEANINGS = {
    ExitStatus.DONE: "Done.",
    ExitStatus.FAILED: "The request failed.",
    ExitStatus.USAGE: "Wrong usage.",
    ExitStatus.NO_SUPERVISOR: "No supervisor is running.",
    ExitStatus.NOT_PERMITTED: "Not permitted.",
}
FILES = {
    "/run/mcr/INSTANCE.sock": "The control socket.",
    "/sys/fs/bpf/mcr/INSTANCE/": "The pinned maps and programs, for bpftool(8).",
    "/var/lib/mcr/INSTANCE/rules.toml": "The rules that commands added.",
}
ENVIRONMENT = {
    "MCR_RUNTIME_DIR": "Replaces /run/mcr.",
    "MCR_STATE_DIR": "Replaces /var/lib/mcr.",
    "MCR_TIME_SCALE": "A number from 1 to 1000 that every time limit is multiplied by, for slow machines.",
    "NO_COLOR": "If it is not empty, mcr top uses no colours.",
}


def escaped(text: str) -> str:
    """Text that roff takes as it is (groff_char(7))."""
    text = text.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq").replace("^", r"\(ha")
    return re.sub(r"^\.", r"\&.", text, flags=re.MULTILINE)


def _paragraphs(text: str) -> Iterator[str]:
    for number, paragraph in enumerate(re.split(r"\n\s*\n", text.strip())):
        if number:
            yield ".PP"
        yield escaped(" ".join(paragraph.split()))


def _entry(term: str, text: str) -> Iterator[str]:
    yield ".TP"
    yield rf"\fB{escaped(term)}\fR"
    yield escaped(text)


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and isinstance(parameter, click.Option) and "--help" not in parameter.opts:
            yield from _entry(*record)


def _subcommands(
    command: click.Command, context: click.Context
) -> Iterator[tuple[click.Command, click.Context]]:
    """Those that do something, each with the context of its whole name."""
    if not isinstance(command, click.Group):
        yield command, context
        return
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        assert found is not None
        yield from _subcommands(found, click.Context(found, info_name=name, parent=context))


def _usage(command: click.Command, context: click.Context) -> str:
    return " ".join(command.collect_usage_pieces(context))


def page() -> Iterator[str]:
    """The lines of the page."""
    root = click.Context(cli, info_name="mcr", max_content_width=10000, terminal_width=10000)
    yield f'.TH MCR 1 "" "MCR {version("mcr")}" "User commands"'
    yield ".SH NAME"
    yield r"mcr \- a multicast relay: UDP streams from one network to others"
    yield ".SH SYNOPSIS"
    yield rf"\fBmcr\fR {escaped(_usage(cli, root))}"
    yield ".SH DESCRIPTION"
    yield from _paragraphs(cli.help or "")
    yield from _options(cli, root)
    yield ".SH COMMANDS"
    for command, context in _subcommands(cli, root):
        name = context.command_path.partition(" ")[2]
        yield f".SS {escaped(name)} {escaped(_usage(command, context))}"
        yield from _paragraphs(command.help or "")
        yield from _options(command, context)
    yield ".SH EXIT STATUS"
    for status, meaning in STATUS_MEANINGS.items():
        yield from _entry(str(int(status)), meaning)
    yield ".SH FILES"
    for name, meaning in FILES.items():
        yield from _entry(name, meaning)
    yield ".SH ENVIRONMENT"
    for name, meaning in ENVIRONMENT.items():
        yield from _entry(name, meaning)
    yield ".SH SEE ALSO"
    yield "bpftool(8), ip(8), tc(8)"


if __name__ == "__main__":
    print("\n".join(page()))
