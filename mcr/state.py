"""The rules that commands have added, kept in a file so that no crash loses one that was accepted.

Written aside, synced, and put in place by one rename, before the command is answered. A file that is torn or
foreign is set aside, never guessed at and never fatal. This module must never decide whether a rule is right.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path

import tomli_w

from mcr.config import Config, load_config
from mcr.errors import McrError
from mcr.rule import Rule

HEADER = "# Rules added by command. MCR writes this file; change them with: mcr rule add, mcr rule del\n\n"

log = logging.getLogger(__name__)


def state_path(instance: str) -> Path:
    """`rules.toml` of an instance, in /var/lib/mcr/<instance> or $MCR_STATE_DIR/<instance>."""
    return Path(os.environ.get("MCR_STATE_DIR") or "/var/lib/mcr") / instance / "rules.toml"


def stage_rules(instance: str, rules: Iterable[Rule]) -> None:
    """Writes a file of exactly these rules aside, synced. Raises McrError, and then leaves nothing."""
    tables = [
        {
            "name": rule.name,
            "from": str(rule.stream),
            "to": [str(output) for output in rule.outputs],
            "path": rule.path,
        }
        for rule in rules
    ]
    path = state_path(instance)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _staged_path(instance).open("wb") as file:
            file.write((HEADER + tomli_w.dumps({"rule": tables})).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        drop_staged(instance)
        raise _not_saved(path, error) from error


def put_rules(instance: str) -> None:
    """Puts the staged file in place. A crash at any moment leaves the old file or the new one (rename(2),
    fsync(2)). Raises McrError, and then the old file is still there."""
    path = state_path(instance)
    try:
        _staged_path(instance).rename(path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise _not_saved(path, error) from error


def drop_staged(instance: str) -> None:
    """Removes what was staged, if anything was."""
    with contextlib.suppress(OSError):
        _staged_path(instance).unlink()


def _staged_path(instance: str) -> Path:
    return state_path(instance).with_suffix(".new")


def _not_saved(path: Path, error: OSError) -> McrError:
    return McrError(
        f"the rules cannot be saved in {path}: {error.strerror}",
        "make room or set MCR_STATE_DIR to another directory, or use: mcr rule add --temporary",
    )


def load_rules(instance: str) -> dict[str, Rule]:
    """The rules that were saved, by name. A file that cannot be understood is set aside, and logged."""
    path = state_path(instance)
    if not path.exists():
        return {}
    try:
        config = load_config([path])
        if config != Config(rules=config.rules):
            raise McrError(
                "it holds more than rules, so MCR did not write it", "keep that in a file of your own"
            )
    except McrError as error:
        set_aside(instance, str(error))
        return {}
    return {rule.name: _from_command(rule) for rule in config.rules}


def _from_command(rule: Rule) -> Rule:
    return Rule(rule.name, rule.stream, rule.outputs, rule.path)


def set_aside(instance: str, cause: str) -> None:
    """Renames the file, so that it is neither used nor lost."""
    path = state_path(instance)
    aside = path.with_name(f"rules.toml.{time.strftime('%Y%m%dT%H%M%S')}.bad")
    try:
        path.rename(aside)
        log.error("saved rules are not used: %s (set aside as %s)", cause, aside)
    except OSError as error:
        log.error("saved rules are not used: %s (and cannot be set aside: %s)", cause, error.strerror)
