"""The grammar: what each text means, what each bad text is told, and that text and value round-trip."""

from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mcr.errors import McrError
from mcr.stream import (
    Address,
    Output,
    Stream,
    check_interface_name,
    parse_address,
    parse_output,
    parse_port,
    parse_stream,
)

GROUP = IPv4Address("239.1.1.1")
GROUP6 = IPv6Address("ff15::1")
SENDER = IPv4Address("10.0.0.7")
SENDER6 = IPv6Address("2001:db8::7")
HOST = IPv4Address("10.20.0.9")


@pytest.mark.parametrize(
    ("text", "stream"),
    [
        ("239.1.1.1%eth0:5000", Stream(GROUP, 5000, "eth0")),
        ("239.1.1.1%eth0:*", Stream(GROUP, None, "eth0")),
        ("239.1.1.1%eth0:65535", Stream(GROUP, 65535, "eth0")),
        ("10.20.0.9%eth0:1", Stream(HOST, 1, "eth0")),
        ("10.0.0.7@239.1.1.1%eth0:5000", Stream(GROUP, 5000, "eth0", SENDER)),
        ("10.0.0.7@10.20.0.9%eth0:5000", Stream(HOST, 5000, "eth0", SENDER)),
        ("10.0.0.7@232.1.1.1%eth0:5000", Stream(IPv4Address("232.1.1.1"), 5000, "eth0", SENDER)),
        ("[ff15::1]%eth0:5000", Stream(GROUP6, 5000, "eth0")),
        ("[2001:db8::7]@[ff3e::1]%eth0:5000", Stream(IPv6Address("ff3e::1"), 5000, "eth0", SENDER6)),
        ("[fe80::1]%eth0:5000", Stream(IPv6Address("fe80::1"), 5000, "eth0")),
        ("[ff3e::1]%eth0:5000", Stream(IPv6Address("ff3e::1"), 5000, "eth0")),
        ("239.1.1.1%eth0:5000,vlan=1", Stream(GROUP, 5000, "eth0", vlan=1)),
        ("239.1.1.1%eth0:5000,vlan=100.4094", Stream(GROUP, 5000, "eth0", vlan=4094, vlan_outer=100)),
        ("239.1.1.1%eth0.100:5000", Stream(GROUP, 5000, "eth0.100")),
        ("239.1.1.1%veth0@if3:5000", Stream(GROUP, 5000, "veth0@if3")),
        ("239.1.1.1%a23456789012345:5000", Stream(GROUP, 5000, "a23456789012345")),
    ],
)
def test_an_input_is_parsed_and_written_back(text: str, stream: Stream) -> None:
    assert parse_stream(text) == stream
    assert str(stream) == text


@pytest.mark.parametrize(
    ("text", "output"),
    [
        ("239.1.1.1%eth1:6000", Output(GROUP, 6000, "eth1")),
        ("239.1.1.1%eth1:*", Output(GROUP, None, "eth1")),
        ("10.20.0.9:6000", Output(HOST, 6000)),
        ("10.20.0.9%eth1:6000", Output(HOST, 6000, "eth1")),
        ("127.0.0.1:6000", Output(IPv4Address("127.0.0.1"), 6000)),
        ("[::1]:6000", Output(IPv6Address("::1"), 6000)),
        ("[fe80::1]%eth1:6000", Output(IPv6Address("fe80::1"), 6000, "eth1")),
        ("232.1.1.1%eth1:6000", Output(IPv4Address("232.1.1.1"), 6000, "eth1")),
        ("10.20.0.9:6000,ttl=8", Output(HOST, 6000, ttl=8)),
        ("10.20.0.9:6000,ttl=decrement", Output(HOST, 6000, ttl=None)),
        ("10.20.0.9:6000,dscp=0", Output(HOST, 6000, dscp=0)),
        ("10.20.0.9:6000,source=preserve", Output(HOST, 6000, source="preserve")),
        ("10.20.0.9:6000,source=10.0.0.7", Output(HOST, 6000, source=SENDER)),
        ("[ff15::1]%e:6000,source=[2001:db8::7]", Output(GROUP6, 6000, "e", source=SENDER6)),
        ("239.1.1.1%e:6000,vlan=4094", Output(GROUP, 6000, "e", vlan=4094)),
        (
            "239.1.1.1%e:6,ttl=255,dscp=63,source=10.0.0.7,vlan=9",
            Output(GROUP, 6, "e", ttl=255, dscp=63, source=SENDER, vlan=9),
        ),
    ],
)
def test_an_output_is_parsed_and_written_back(text: str, output: Output) -> None:
    assert parse_output(text) == output
    assert str(output) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("10.20.0.9:6000,vlan=9,ttl=8", "10.20.0.9:6000,ttl=8,vlan=9"),
        ("10.20.0.9:6000,ttl=64,dscp=preserve,source=interface", "10.20.0.9:6000"),
        ("[FF15:0:0::1]%e:6000", "[ff15::1]%e:6000"),
    ],
)
def test_texts_of_one_meaning_have_one_canonical_text(text: str, canonical: str) -> None:
    assert str(parse_output(text)) == canonical


@pytest.mark.parametrize(
    ("text", "cause", "remedy"),
    [
        ("", "it is empty", "239.1.1.1%eth0:5000"),
        ("2" * 257, "it is longer than 256 characters", "shorten it"),
        ("239.1.1%eth0:5000", "'239.1.1' is not an IP address", "239.1.1.1"),
        ("239.1.1.256%eth0:5000", "'239.1.1.256' is not an IP address", "239.1.1.1"),
        ("239.1.1.01%eth0:5000", "'239.1.1.01' is not an IP address", "239.1.1.1"),
        (" 239.1.1.1%eth0:5000", "' 239.1.1.1' is not an IP address", "239.1.1.1"),
        ("localhost%eth0:5000", "'localhost' is not an IP address", "239.1.1.1"),
        ("[ff15::1%eth0:5000", "it is malformed", "[ff15::1]%eth0:5000"),
        ("[ff15::1]eth0:5000", "it is malformed", "[ff15::1]%eth0:5000"),
        ("ff15::1%eth0:5000", "IPv6 address ff15::1 is not in brackets", "write [ff15::1]"),
        ("2001:db8::7@[ff15::1]%e:5", "IPv6 address 2001:db8::7 is not in brackets", "write [2001:db8::7]"),
        ("[239.1.1.1]%eth0:5000", "an IPv4 address takes no brackets", "write 239.1.1.1"),
        ("[ff12::1%eth0]:5000", "address '[ff12::1%eth0]' has an interface inside", "after the brackets"),
        ("[::ffff:10.0.0.1]%eth0:5000", "[::ffff:10.0.0.1] is an IPv4-mapped address", "write 10.0.0.1"),
        ("0.0.0.0%eth0:5000", "0.0.0.0 is no destination", "multicast group"),
        ("[::]%eth0:5000", ":: is no destination", "multicast group"),
        ("255.255.255.255%eth0:5000", "255.255.255.255 is the broadcast address", "multicast group"),
        ("127.0.0.1%eth0:5000", "no interface receives the loopback address 127.0.0.1", "sender sends to"),
        ("[::1]%eth0:5000", "no interface receives the loopback address ::1", "sender sends to"),
        ("[ff11::1]%eth0:5000", "group ff11::1 has a scope that never leaves a host", "ff15::1"),
        ("[ff10::1]%eth0:5000", "group ff10::1 has a scope that never leaves a host", "ff15::1"),
        ("[2001:db8::7]@239.1.1.1%eth0:5", "2001:db8::7 is IPv6 but the destination is IPv4", "IPv4 source"),
        ("10.0.0.7@[ff15::1]%eth0:5", "10.0.0.7 is IPv4 but the destination is IPv6", "IPv6 source"),
        ("239.1.1.1@239.1.1.2%eth0:5", "source 239.1.1.1 is not a unicast address", "of the sender"),
        ("0.0.0.0@239.1.1.2%eth0:5", "source 0.0.0.0 is not a unicast address", "of the sender"),
        ("255.255.255.255@239.1.1.2%eth0:5", "source 255.255.255.255 is not a unicast", "of the sender"),
        ("@239.1.1.2%eth0:5", "'' is not an IP address", "239.1.1.1"),
        ("239.1.1.1:5000", "it names no interface", "%INTERFACE"),
        ("239.1.1.1%:5000", "the interface name is empty", "ip link"),
        ("239.1.1.1%a234567890123456:5000", "interface name 'a234567890123456' is longer than 15", "ip link"),
        ("239.1.1.1%éééééééé:5000", "interface name 'éééééééé' is longer than 15 bytes", "ip link"),
        ("239.1.1.1%et/h0:5000", "'et/h0' cannot be the name of an interface", "ip link"),
        ("239.1.1.1%et h0:5000", "'et h0' cannot be the name of an interface", "ip link"),
        ("239.1.1.1%et\nh0:5000", "'et\\nh0' cannot be the name of an interface", "ip link"),
        ("239.1.1.1%..:5000", "'..' cannot be the name of an interface", "ip link"),
        ("239.1.1.1%eth0", "it has no port", "add :PORT"),
        ("239.1.1.1%eth0,vlan=5", "it has no port", "add :PORT"),
        ("239.1.1.1%eth0:", "it has no port", "add :PORT"),
        ("239.1.1.1%eth0:0", "port 0 is not within 1..65535", "1..65535"),
        ("239.1.1.1%eth0:65536", "port 65536 is not within 1..65535", "1..65535"),
        ("239.1.1.1%eth0:" + "9" * 100, "is not within 1..65535", "1..65535"),
        ("239.1.1.1%eth0:+5", "port '+5' is not a number", "1..65535"),
        ("239.1.1.1%eth0:-5", "port '-5' is not a number", "1..65535"),
        ("239.1.1.1%eth0:5_0", "port '5_0' is not a number", "1..65535"),
        ("239.1.1.1%eth0: 5", "port ' 5' is not a number", "1..65535"),
        ("239.1.1.1%eth0:5 ", "port '5 ' is not a number", "1..65535"),
        ("239.1.1.1%eth0:5\n", "port '5\\n' is not a number", "1..65535"),
        ("239.1.1.1%eth0:05", "port '05' is not a number", "1..65535"),
        (
            "239.1.1.1%eth0:\N{ARABIC-INDIC DIGIT FIVE}",
            "port '\N{ARABIC-INDIC DIGIT FIVE}' is not a number",
            "1..65535",
        ),
        ("239.1.1.1%eth0:5:6", "port '5:6' is not a number", "1..65535"),
        ("239.1.1.1%eth0:5,", "there is an empty option", "remove the comma"),
        ("239.1.1.1%eth0:5,mtu=9", "there is no option 'mtu'", "the options here are vlan"),
        ("239.1.1.1%eth0:5,VLAN=9", "there is no option 'VLAN'", "the options here are vlan"),
        ("239.1.1.1%eth0:5,ttl=9", "option ttl belongs to outputs", "move it"),
        ("239.1.1.1%eth0:5,vlan", "option vlan has no value", "write vlan=1..4094 or vlan=OUTER.INNER"),
        ("239.1.1.1%eth0:5,vlan=", "option vlan has no value", "write vlan=1..4094 or vlan=OUTER.INNER"),
        ("239.1.1.1%eth0:5,vlan=1,vlan=1", "option vlan is given twice", "give it once"),
        ("239.1.1.1%eth0:5,vlan=0", "vlan 0 is not within 1..4094", "vlan=OUTER.INNER"),
        ("239.1.1.1%eth0:5,vlan=4095", "vlan 4095 is not within 1..4094", "vlan=OUTER.INNER"),
        ("239.1.1.1%eth0:5,vlan=0.5", "vlan 0 is not within 1..4094", "vlan=OUTER.INNER"),
        ("239.1.1.1%eth0:5,vlan=5.", "vlan '' is not a number", "vlan=OUTER.INNER"),
        ("239.1.1.1%eth0:5,vlan=1.2.3", "vlan '1.2' is not a number", "vlan=OUTER.INNER"),
    ],
)
def test_a_bad_input_is_told_its_cause_and_remedy(text: str, cause: str, remedy: str) -> None:
    with pytest.raises(McrError) as caught:
        parse_stream(text)
    assert caught.value.cause.startswith("stream '")
    assert cause in caught.value.cause
    assert remedy in caught.value.remedy
    assert "\n" not in caught.value.cause + caught.value.remedy


@pytest.mark.parametrize(
    ("text", "cause", "remedy"),
    [
        ("10.0.0.7@239.1.1.1%e:5", "SOURCE@ is for inputs", "use the option source=ADDRESS"),
        ("239.1.1.1:6000", "group 239.1.1.1 needs an interface to leave by", "%INTERFACE"),
        ("[ff15::1]:6000", "group ff15::1 needs an interface to leave by", "%INTERFACE"),
        (
            "[fe80::1]:6000",
            "link-local address fe80::1 needs an interface to leave by",
            "[fe80::1]%eth1:6000",
        ),
        ("10.20.0.9%:6000", "the interface name is empty", "ip link"),
        ("10.20.0.9:6,ttl=0", "ttl 0 is not within 1..255", "ttl=1..255 or ttl=decrement"),
        ("10.20.0.9:6,ttl=256", "ttl 256 is not within 1..255", "ttl=1..255 or ttl=decrement"),
        ("10.20.0.9:6,ttl=preserve", "ttl 'preserve' is not a number", "ttl=1..255 or ttl=decrement"),
        ("10.20.0.9:6,dscp=64", "dscp 64 is not within 0..63", "dscp=0..63 or dscp=preserve"),
        ("10.20.0.9:6,dscp=ef", "dscp 'ef' is not a number", "dscp=0..63 or dscp=preserve"),
        ("10.20.0.9:6,vlan=1.2", "vlan '1.2' is not a number", "write vlan=1..4094"),
        ("10.20.0.9:6,vlan=0", "vlan 0 is not within 1..4094", "write vlan=1..4094"),
        ("10.20.0.9:6,source=eth0", "'eth0' is not an IP address", "239.1.1.1"),
        ("10.20.0.9:6,source=fe80::1%e", "address 'fe80::1%e' has an interface inside", "after the brackets"),
        (
            "10.20.0.9:6,source=[2001:db8::7]",
            "2001:db8::7 is IPv6 but the destination is IPv4",
            "IPv4 source",
        ),
        ("10.20.0.9:6,source=239.1.1.1", "source 239.1.1.1 is not a unicast address", "of the sender"),
        ("10.20.0.9:6,tll=9", "there is no option 'tll'", "the options here are ttl, dscp, source, vlan"),
    ],
)
def test_a_bad_output_is_told_its_cause_and_remedy(text: str, cause: str, remedy: str) -> None:
    with pytest.raises(McrError) as caught:
        parse_output(text)
    assert caught.value.cause.startswith("output '")
    assert cause in caught.value.cause
    assert remedy in caught.value.remedy


def test_group_tells_multicast_from_unicast() -> None:
    assert parse_stream("239.1.1.1%e:5").group
    assert parse_stream("[ff15::1]%e:5").group
    assert not parse_stream("10.20.0.9%e:5").group
    assert parse_output("239.1.1.1%e:5").group
    assert not parse_output("10.20.0.9:5").group


def _is_destination(address: Address) -> bool:
    if address.version == 6 and (address.ipv4_mapped is not None or address.is_loopback):
        return False
    if address.version == 6 and address.is_multicast:
        return address.packed[1] & 0x0F >= 2 and address.packed[1] >> 4 != 3
    return not (
        address.is_unspecified
        or address.is_loopback
        or int(address) == 0xFFFFFFFF
        or address.packed[0] == 232
        or (address.version == 6 and address.is_link_local)
    )


def _is_source(address: Address) -> bool:
    return _is_destination(address) and not address.is_multicast


interfaces = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, blacklist_characters="/:,"), min_size=1, max_size=15
).filter(lambda name: name not in (".", ".."))
versions: st.SearchStrategy[Literal[4, 6]] = st.sampled_from((4, 6))
source_words: st.SearchStrategy[Literal["interface", "preserve"]] = st.sampled_from(("interface", "preserve"))
ports = st.none() | st.integers(1, 65535)
tags = st.integers(1, 4094)


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    version = draw(versions)
    address = draw(st.ip_addresses(v=version).filter(_is_destination))
    source = draw(st.none() | st.ip_addresses(v=version).filter(_is_source))
    vlan, outer = draw(st.sampled_from([(0, 0)]) | st.tuples(tags, st.just(0) | tags))
    return Stream(address, draw(ports), draw(interfaces), source, vlan, outer)


@st.composite
def outputs(draw: st.DrawFn) -> Output:
    version = draw(versions)
    address = draw(st.ip_addresses(v=version).filter(_is_destination))
    return Output(
        address=address,
        port=draw(ports),
        interface=draw(interfaces if address.is_multicast else interfaces | st.just("")),
        ttl=draw(st.none() | st.integers(1, 255)),
        dscp=draw(st.none() | st.integers(0, 63)),
        source=draw(source_words | st.ip_addresses(v=version).filter(_is_source)),
        vlan=draw(st.just(0) | tags),
    )


@settings(deadline=None)
@given(streams())
def test_every_stream_survives_its_text(stream: Stream) -> None:
    assert parse_stream(str(stream)) == stream


@settings(deadline=None)
@given(outputs())
def test_every_output_survives_its_text(output: Output) -> None:
    assert parse_output(str(output)) == output


words = (
    "239.1.1.1 232.1.1.1 10.0.0.7 [ff15::1] ff15::1 eth0 % %s @ : 0 5000 * , vlan ttl source = preserve [ ] ."
)
grammatical = st.lists(st.sampled_from([*words.split(), " ", "\n", "\0", "\ud800"]), max_size=14).map("".join)


@settings(deadline=None)
@given(st.text() | grammatical)
@example("\ud800")
@example("239.1.1.1%\ud800:5")
@example("[::1%\ud800]:5")
@example("10.0.0.1:5,source=::1%\n")
@example(":" * 256)
def test_any_text_is_parsed_and_written_back_or_refused_in_one_line(text: str) -> None:
    for parse in (parse_stream, parse_output):
        try:
            value = parse(text)
        except McrError as error:
            assert (error.cause + error.remedy).isprintable()
            assert error.cause
            assert error.remedy
        else:
            assert parse(str(value)) == value


@settings(deadline=None)
@given(st.text() | grammatical)
def test_the_parts_refuse_any_other_text_with_an_error_for_people(text: str) -> None:
    for parse in (parse_address, parse_port, check_interface_name):
        try:
            parse(text)
        except McrError as error:
            assert (error.cause + error.remedy).isprintable()


@settings(deadline=None)
@given(st.ip_addresses())
def test_an_address_is_an_ip_address_in_the_form_of_its_family(address: Address) -> None:
    text = f"[{address}]" if address.version == 6 else str(address)
    if address.version == 6 and address.ipv4_mapped is not None:
        with pytest.raises(McrError):
            parse_address(text)
    else:
        assert parse_address(text) == ip_address(str(address))
