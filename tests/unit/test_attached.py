"""In which XDP mode an interface is attached, by what it is and what merges datagrams there."""

import pytest

from mcr import loader
from mcr.attached import xdp_mode
from mcr.config import Attachment, Ingress, Mode
from mcr.rule import InterfaceFacts


def facts(kind: str, name: str = "x0") -> InterfaceFacts:
    return InterfaceFacts(name, 7, 1500, True, True, "02:00:00:00:00:01", kind=kind)


@pytest.mark.parametrize("mode", ["native", "generic"])
@pytest.mark.parametrize("kind", ["", "veth", "bridge", "vlan"])
@pytest.mark.parametrize("merges", [False, True])
def test_a_mode_that_was_asked_for_is_taken(kind: str, mode: Mode, merges: bool) -> None:
    assert xdp_mode(Attachment("x0", mode=mode), facts(kind), "d", merges) == mode


@pytest.mark.parametrize(
    ("name", "kind", "merges", "ingress", "mode"),
    [
        ("x0", "", False, "auto", "auto"),
        ("x0", "", True, "auto", "native"),
        ("lo", "", False, "auto", "native"),
        ("x0", "veth", False, "auto", "native"),
        ("x0", "bridge", False, "auto", "native"),
        ("x0", "bridge", False, "xsk", "auto"),
        ("x0", "", True, "xsk", "auto"),
        ("x0", "bond", False, "auto", "generic"),
        ("x0", "team", False, "auto", "generic"),
        ("x0", "bond", True, "xsk", "generic"),
    ],
)
def test_auto_takes_generic_mode_only_where_datagrams_keep_their_borders(
    name: str, kind: str, merges: bool, ingress: Ingress, mode: Mode
) -> None:
    assert xdp_mode(Attachment(name, ingress=ingress), facts(kind, name), "d", merges) == mode


@pytest.mark.parametrize("kind", ["bond", "team"])
def test_native_mode_would_not_see_a_bond(kind: str) -> None:
    assert xdp_mode(Attachment("x0", mode="generic"), facts(kind), "d", False) == "generic"
    with pytest.raises(loader.XdpUnsupportedError, match=f"x0 is a {kind}") as refused:
        xdp_mode(Attachment("x0", mode="native"), facts(kind), "d", False)
    assert "attach the members" in refused.value.remedy
    with pytest.raises(loader.XdpUnsupportedError, match="GRO merges"):
        xdp_mode(Attachment("x0"), facts(kind), "d", True)


def test_auto_leaves_a_driver_alone_whose_native_mode_is_frail() -> None:
    assert xdp_mode(Attachment("x0"), facts(""), "vmxnet3", False) == "generic"
    assert xdp_mode(Attachment("x0", mode="native"), facts(""), "vmxnet3", False) == "native"
    with pytest.raises(loader.XdpUnsupportedError, match="GRO merges"):
        xdp_mode(Attachment("x0"), facts(""), "vmxnet3", True)
