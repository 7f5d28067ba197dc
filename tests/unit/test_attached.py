"""In which XDP mode an interface is attached, by what kind of interface it is."""

import pytest

from mcr import loader
from mcr.attached import xdp_mode
from mcr.config import Attachment, Mode
from mcr.rule import InterfaceFacts


def facts(kind: str) -> InterfaceFacts:
    return InterfaceFacts("x0", 7, 1500, True, True, "02:00:00:00:00:01", kind=kind)


@pytest.mark.parametrize("mode", ["auto", "native", "generic"])
@pytest.mark.parametrize("kind", ["", "veth", "bridge", "vlan"])
def test_the_mode_is_what_was_asked_for(kind: str, mode: Mode) -> None:
    assert xdp_mode(Attachment("x0", mode=mode), facts(kind)) == mode


@pytest.mark.parametrize("kind", ["bond", "team"])
def test_native_mode_would_not_see_a_bond(kind: str) -> None:
    assert xdp_mode(Attachment("x0"), facts(kind)) == "generic"
    assert xdp_mode(Attachment("x0", mode="generic"), facts(kind)) == "generic"
    with pytest.raises(loader.XdpUnsupportedError, match=f"x0 is a {kind}") as refused:
        xdp_mode(Attachment("x0", mode="native"), facts(kind))
    assert "attach the members" in refused.value.remedy
