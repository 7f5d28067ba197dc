"""`mcr rule`: add, delete and show rules."""

import click

from mcr.cli.common import Settings, call, complete_rules, json_option, print_json, print_table


@click.group(name="rule")
def command() -> None:
    """Add, delete and show rules."""


@command.command(name="add")
@click.argument("name")
@click.option("--from", "stream", required=True, metavar="STREAM", help="The input: 239.1.1.1%eth0:5000")
@click.option(
    "--to",
    "outputs",
    required=True,
    multiple=True,
    metavar="STREAM",
    help="An output: 239.2.2.2%eth1:6000,ttl=8",
)
@click.option("--path", type=click.Choice(["auto", "kernel", "worker"]), default="auto", show_default=True)
@click.option("--temporary", is_flag=True, help="Forget the rule when the supervisor ends.")
@click.pass_obj
def add(
    settings: Settings, name: str, stream: str, outputs: tuple[str, ...], path: str, temporary: bool
) -> None:
    """Add the rule NAME."""
    params = {"name": name, "from": stream, "to": list(outputs), "path": path, "temporary": temporary}
    done = call(settings, "rule.add", **params)
    waits = f", pending: {done['pending']}" if done["pending"] else ""
    print(f"added {name}: path {done['path']} ({done['path_reason']}){waits}")


@command.command(name="del")
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete_rules)
@click.pass_obj
def delete(settings: Settings, names: tuple[str, ...]) -> None:
    """Delete rules that were added by command: all of those named, or none."""
    call(settings, "rule.del", names=list(names))


@command.command(name="show")
@click.argument("name", required=False, shell_complete=complete_rules)
@json_option
@click.pass_obj
def show(settings: Settings, name: str | None, as_json: bool) -> None:
    """Show every rule, or one: a line for each output."""
    rows = call(settings, "rule.show", name=name)
    if as_json:
        print_json(rows)
        return
    shown = [row | {"state": row["output_state"]} for row in rows]  # of a rule that waits, each output does
    print_table(
        shown, ("rule", "from", "to", "path", "state", "origin"), names=("rule", "from", "to", "origin")
    )
    for reason in dict.fromkeys(row["reason"] or row["output_reason"] for row in rows):
        if reason:
            print(f"pending: {reason}")
    for problem, remedy in dict.fromkeys((row["input_problem"], row["input_remedy"]) for row in rows):
        if problem:
            print(f"{problem}\n  remedy: {remedy}")
    for row in {row["rule"]: row for row in rows}.values() if name else ():
        print(f"path {row['path']}: {row['path_reason']}")
