"""What outlives a supervisor that is told to keep forwarding, and how the next one takes it over.

The kernel path needs no process: its maps, programs and, with `--on-exit keep`, its XDP links are pinned, and
a file beside the control socket remembers which ids belong to which rules and outputs. The process of the
joins outlives the supervisor as long as there are such links. The next supervisor adopts all of it if its
layout is the same, and refuses it, with both versions named, if not. This module must never change what is
forwarded.
"""

import json
import logging
import os
from pathlib import Path

from mcr import loader
from mcr._bpf import ffi, lib
from mcr.control import socket_path
from mcr.desired import Ids
from mcr.errors import McrError
from mcr.membership_life import Refuge

LARGEST_SETTINGS = 4096  # bytes; only the first field, the version, is looked at

log = logging.getLogger(__name__)


def ids_path(instance: str) -> Path:
    """The file of ids; it goes with a reboot, as the pins do."""
    return socket_path(instance).with_suffix(".ids.json")


def save_ids(instance: str, ids: Ids) -> None:
    """Writes the ids aside, then puts the file in place by one rename. Raises McrError."""
    path = ids_path(instance)
    new = path.with_suffix(".new")
    outputs = [[rule, output, number] for (rule, output), number in ids.outputs.items()]
    try:
        new.write_text(json.dumps({"rules": ids.rules, "outputs": outputs}))
        new.rename(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise McrError(f"the ids cannot be saved in {path}: {error.strerror}", "make room there") from error


def load_ids(instance: str) -> Ids:
    """The ids that were saved; none, with a warning, if the file is missing or foreign."""
    try:
        saved = json.loads(ids_path(instance).read_text())
        rules = {str(name): int(number) for name, number in saved["rules"].items()}
        outputs = {(str(rule), str(output)): int(number) for rule, output, number in saved["outputs"]}
        return Ids.of(rules, outputs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read (%s): counters start from zero", ids_path(instance), error)
        return Ids()


def forget(instance: str) -> None:
    """Removes the file of ids."""
    ids_path(instance).unlink(missing_ok=True)


def refuge(instance: str) -> Refuge:
    """Where the joins of an instance outlive their supervisor, for as long as its links do."""
    return Refuge(socket_path(instance).with_suffix(".join"), loader.link_dir(instance))


def is_forwarding(instance: str) -> bool:
    """Whether an earlier supervisor left links that still forward."""
    return any(loader.link_dir(instance).glob("*"))


def check_layout(instance: str) -> None:
    """Raises McrError unless the pinned state has this version's layout."""
    found = _pinned_version(instance)
    own = f"{lib.MCR_ABI_VERSION:08x}"
    if found == own:
        return
    raise McrError(
        f"instance {instance} forwards with layout {found}, and this MCR has {own}",
        "mcr run --replace, which interrupts forwarding, or run the MCR that it belongs to",
    )


def _pinned_version(instance: str) -> str:
    try:
        fd = loader.open_pin(instance, "settings")
    except McrError:
        return "unknown"
    try:
        value = ffi.new("char[]", LARGEST_SETTINGS)
        if lib.bpf_map_lookup_elem(fd, ffi.new("__u32 *", 0), value) < 0:
            return "unknown"
        return f"{ffi.cast('struct mcr_settings *', value).abi_version:08x}"
    finally:
        os.close(fd)
