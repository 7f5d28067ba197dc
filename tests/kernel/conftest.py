"""The real XDP program, loaded once for a module of tests, in a namespace of its own.

It must never attach the program nor send a packet: frames reach it through BPF_PROG_TEST_RUN only.
"""

import os
import socket
from collections.abc import Iterator

import pytest

from mcr import loader
from mcr.maps import Maps
from tests.conftest import require
from tests.kernel.relay import Relay
from tests.netns.lab import Lab


@pytest.fixture(scope="module")
def loaded_relay(lab_prefixes: Iterator[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """The loaded program with two interfaces of two queues each; the tests' thread is in their namespace."""
    require("root", os.geteuid() == 0, f"effective user id is {os.geteuid()}")
    with Lab(next(lab_prefixes), tmp_path_factory.mktemp("kernel")) as lab:
        namespace = lab.namespace("xdp")
        lab.veth(namespace, "in0", namespace, "other0", queues=2)
        with lab.inside(namespace):
            loader.load(namespace.name)
            try:
                with Maps(namespace.name) as maps:
                    ifindex, other_ifindex = map(socket.if_nametoindex, ("in0", "other0"))
                    yield Relay(namespace.name, maps, ifindex, other_ifindex)
            finally:
                loader.unload(namespace.name)


@pytest.fixture
def relay(loaded_relay: Relay) -> Iterator[Relay]:
    """The loaded program without rules, sockets and counts."""
    try:
        yield loaded_relay
    finally:
        loaded_relay.forget()
