"""The man page says of every command and option what its help says, in roff that is taken literally."""

from collections.abc import Iterator

import click

from mcr.cli.main import cli
from mcr.man_build import escaped, page


def commands(group: click.Group, *names: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, *names, name)
        else:
            yield (*names, name), command


def test_every_command_and_option_is_there() -> None:
    sections: dict[str, str] = {}
    for section in "\n".join(page()).split("\n.SS ")[1:]:
        head, _, body = section.partition("\n")
        sections[head.partition(" [")[0]] = body
    for names, command in commands(cli):
        body = sections[" ".join(names)]
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert escaped(parameter.opts[0]) in body
                assert escaped((parameter.help or "").split(".")[0]) in body


def test_no_text_is_taken_for_a_request() -> None:
    assert escaped(".so /etc/passwd\n'x \\fB --y") == r"\&.so /etc/passwd" + "\n" + r"\(aqx \efB \-\-y"
