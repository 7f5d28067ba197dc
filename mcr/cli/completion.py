"""`mcr completion`: what a shell needs to complete commands, options, rules and interfaces.

click asks this program at each TAB, so completing must be quick, and say nothing when it cannot.
"""

import click
from click.shell_completion import get_completion_class

VARIABLE = "_MCR_COMPLETE"  # the one click looks for, from the program's name


@click.command(name="completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script for SHELL.

    bash: source <(mcr completion bash). zsh: the same, after compinit. fish: mcr completion fish | source.
    """
    completion = get_completion_class(shell)
    assert completion is not None
    click.echo(completion(click.get_current_context().find_root().command, {}, "mcr", VARIABLE).source())
