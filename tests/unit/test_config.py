"""Configuration files: what a good one becomes, and the exact line that every bad one is told."""

import os
import time
from ipaddress import ip_address
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mcr.config import (
    MAX_FILE_BYTES,
    Attachment,
    Config,
    TlsFiles,
    load_config,
    parse_attachment,
    parse_listen,
    parse_rule,
)
from mcr.errors import MAX_ERRORS, McrError
from mcr.rule import MCR_MAX_INTERFACES, Origin, Rule
from mcr.stream import parse_output, parse_stream

EXAMPLE = """\
[metrics]
listen = "127.0.0.1:9931"

[[attach]]
interface = "eth0"
mode = "auto"            # native, then generic

[[attach]]
interface = "eth1"
mode = "native"
ingress = "xsk"
zero_copy = "on"
busy_poll = true

[[rule]]
name = "studio-cam-1"
from = "239.1.1.1%eth0:5000"
to   = ["239.2.2.2%eth1:6000,ttl=8", "10.20.0.9:6000"]
path = "auto"

[[rule]]
name = "studio-cam-2"
from = "239.1.1.2%eth9:5000"
to   = ["10.20.0.9:6001"]
path = "worker"
"""


def write(directory: Path, text: str, name: str = "m.toml") -> Path:
    path = directory / name
    path.write_bytes(text.encode())
    return path


def refused(*paths: Path) -> McrError:
    with pytest.raises(McrError) as caught:
        load_config(paths)
    return caught.value


def test_the_last_tls_files_count(tmp_path: Path) -> None:
    both = '[metrics]\ntls_cert = "/a.pem"\ntls_key = "/a.key"\n'
    one = write(tmp_path, both, "one.toml")
    two = write(tmp_path, both + 'client_ca = "/ca.pem"\n', "two.toml")
    silent = write(tmp_path, "", "silent.toml")
    assert load_config([silent]).metrics_tls is None
    assert load_config([two, one, silent]).metrics_tls == TlsFiles(Path("/a.pem"), Path("/a.key"))
    tls = load_config([one, two]).metrics_tls
    assert tls is not None and tls.client_ca == Path("/ca.pem")


def test_a_file_becomes_attachments_rules_and_settings(tmp_path: Path) -> None:
    path = write(tmp_path, EXAMPLE)
    config = load_config([path])
    assert config == Config(
        attachments=(Attachment("eth0"), Attachment("eth1", "native", "xsk", "on", busy_poll=True)),
        rules=(
            Rule(
                "studio-cam-1",
                parse_stream("239.1.1.1%eth0:5000"),
                (parse_output("239.2.2.2%eth1:6000,ttl=8"), parse_output("10.20.0.9:6000")),
            ),
            Rule(
                "studio-cam-2",
                parse_stream("239.1.1.2%eth9:5000"),
                (parse_output("10.20.0.9:6001"),),
                "worker",
            ),
        ),
        metrics_listen="127.0.0.1:9931",
    )
    assert [attachment.origin for attachment in config.attachments] == [
        Origin(str(path), 4),
        Origin(str(path), 8),
    ]
    assert [rule.origin for rule in config.rules] == [Origin(str(path), 15), Origin(str(path), 21)]


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "\ufeff# with a byte order mark", "rule = []", "[metrics]"]
)
def test_a_file_that_says_nothing_is_an_empty_configuration(tmp_path: Path, text: str) -> None:
    assert load_config([write(tmp_path, text)]) == Config()


def test_no_file_is_an_empty_configuration() -> None:
    assert load_config([]) == Config()


def test_lines_may_end_as_on_windows(tmp_path: Path) -> None:
    assert load_config([write(tmp_path, EXAMPLE.replace("\n", "\r\n"))]).rules[1].origin == Origin(
        str(tmp_path / "m.toml"), 21
    )


def test_files_are_merged_in_their_order_and_the_last_listen_counts(tmp_path: Path) -> None:
    one = write(tmp_path, EXAMPLE, "one.toml")
    two = write(
        tmp_path,
        '[[rule]]\nname = "a"\nfrom = "239.9.9.9%eth0:5"\nto = ["10.20.0.9:9"]\n',
        "two.toml",
    )
    off = write(tmp_path, 'metrics.listen = "off"', "off.toml")
    config = load_config([one, two])
    assert [rule.name for rule in config.rules] == ["studio-cam-1", "studio-cam-2", "a"]
    assert config.rules[2].origin == Origin(str(two), 1)
    assert config.metrics_listen == "127.0.0.1:9931"
    assert load_config([one, off]).metrics_listen is None
    assert load_config([off, one]).metrics_listen == "127.0.0.1:9931"


def test_rules_of_different_files_are_checked_together(tmp_path: Path) -> None:
    one = write(
        tmp_path, '[[rule]]\nname = "a"\nfrom = "239.1.1.1%e:5"\nto = ["239.1.1.2%e:5"]\n', "one.toml"
    )
    two = write(
        tmp_path, '\n[[rule]]\nname = "b"\nfrom = "239.1.1.2%e:5"\nto = ["239.1.1.1%e:5"]\n', "two.toml"
    )
    assert str(refused(one, two)) == f"{two}:2: rules form a loop: 'a' -> 'b' -> 'a'"
    assert str(refused(one, one)) == f"{one}:1: there are two rules named 'a' (the first is at {one}:1)"


RULE = '[[rule]]\nname = "a"\nfrom = "239.1.1.1%eth0:5"\n'
ATTACH = '[[attach]]\ninterface = "eth0"\n'


@pytest.mark.parametrize(
    ("text", "line", "cause", "remedy"),
    [
        # Keys and tables.
        ("x = 1", 1, "unknown key 'x'", "the keys of a configuration are metrics, attach, rule"),
        ("\n\n[[rules]]\nname = 1", 3, "unknown key 'rules'", "did you mean rule?"),
        ("[metrics]\n\nlisen = 'off'", 3, "unknown key 'lisen'", "did you mean listen?"),
        ("\nmetrics.lisen = 'off'", 2, "unknown key 'lisen'", "did you mean listen?"),
        (ATTACH + "threads = 1", 3, "unknown key 'threads'", "did you mean egress_threads?"),
        (ATTACH + "workers = 0", 3, "workers is 0", "write a number from 1 to 64"),
        (ATTACH + "workers = true", 3, "workers is a boolean", "write a number from 1 to 64"),
        (ATTACH + "egress_threads = 9", 3, "egress_threads is 9", "write a number from 0 to 8"),
        (ATTACH + "egress_threads = '1'", 3, "egress_threads is a string", "write a number from 0 to 8"),
        (ATTACH + "cpus = '3-1'", 3, "cpus is '3-1'", 'write CPU numbers such as "2,3" or "2-5"'),
        (ATTACH + "cpus = '1,,2'", 3, "cpus is '1,,2'", 'write CPU numbers such as "2,3" or "2-5"'),
        (ATTACH + "cpus = 2", 3, "cpus is an integer, not a string", "put it in quotes"),
        (ATTACH + "'zero-copy' = 'on'", 3, "unknown key 'zero-copy'", "did you mean zero_copy?"),
        (RULE + 'to = ["10.0.0.1:5"]\nfrm = 1', 5, "unknown key 'frm'", "did you mean from?"),
        (RULE + 'to = ["10.0.0.1:5"]\n[rule.extra]\nx = 1', 5, "unknown key 'extra'", "the keys of [[rule]]"),
        (ATTACH + RULE + '"t\\u00f6" = 1', 6, "unknown key 'tö'", "the keys of [[rule]]"),
        ("metrics = 1", 1, "metrics is an integer, not a table", "write [metrics]"),
        ("[[metrics]]", 1, "metrics is an array, not a table", "write [metrics]"),
        ("\n[rule]\nname = 'a'", 2, "rule is a table, not an array of tables", "write [[rule]]"),
        ("\n[attach]", 2, "attach is a table, not an array of tables", "write [[attach]]"),
        ("rule = [\n{name = 'a'},\n1]", 2, "from is missing", "add from = ..."),
        ("rule = [\n1]", 2, "rule holds an integer", "write [[rule]]"),
        # Metrics.
        ("[metrics]\ntls_cert = 'a.pem'", 2, "tls_cert is not an absolute path", "write it from / on"),
        ("[metrics]\ntls_cert = '/a.pem'", 1, "tls_key is missing beside tls_cert", 'add tls_key = "/..."'),
        ("[metrics]\nclient_ca = '/a.pem'", 1, "tls_cert is missing beside client_ca", "add tls_cert"),
        ("[metrics]\ntls_key = 1", 2, "tls_key is an integer, not a string", "put it in quotes"),
        ("[metrics]\nlisten = 9931", 2, "listen is an integer, not a string", "put it in quotes"),
        ("[metrics]\nlisten = ':9931'", 2, "':9931' is not an address and a port", "127.0.0.1:9931"),
        ("[metrics]\nlisten = 'on'", 2, "'on' is not an address and a port", "127.0.0.1:9931"),
        ("[metrics]\nlisten = '::1:9931'", 2, "IPv6 address ::1 is not in brackets", "write [::1]"),
        ("[metrics]\nlisten = '127.0.0.1:0'", 2, "port 0 is not within 1..65535", "1..65535"),
        # Attachments.
        ("\n[[attach]]\nmode = 'auto'", 2, "interface is missing", "add interface = ..."),
        ("[[attach]]\ninterface = 'a/b'", 2, "'a/b' cannot be the name of an interface", "ip link"),
        ("[[attach]]\ninterface = true", 2, "interface is a boolean, not a string", "put it in quotes"),
        (ATTACH + "mode = 'skb'", 3, "mode is 'skb'", 'choose one of "auto", "native", "generic"'),
        (ATTACH + "ingress = 1.5", 3, "ingress is a float", 'choose one of "auto", "xsk", "packet"'),
        (ATTACH + "zero_copy = true", 3, "zero_copy is a boolean", 'choose one of "auto", "on", "off"'),
        (ATTACH + "\nbusy_poll = 1", 4, "busy_poll is an integer, not true or false", "true or false"),
        (ATTACH + "busy_poll = 2024-01-01", 3, "busy_poll is a date or time", "true or false"),
        (ATTACH + "ingress = 'packet'\nmode = 'native'", 4, "eth0: mode native is for XDP", "ingress xsk"),
        (ATTACH + "mode = 'generic'\ningress = 'packet'", 3, "eth0: mode generic is for XDP", "remove mode"),
        (ATTACH + "zero_copy = 'on'\ningress = 'packet'", 3, "eth0: zero copy is for AF_XDP", "ingress xsk"),
        (ATTACH + "mode = 'generic'\nzero_copy = 'on'", 4, "eth0: generic mode always copies", "mode native"),
        (ATTACH + ATTACH, 3, "eth0 is attached twice (first at {file}:1)", "remove one of the two"),
        # Rules.
        ("\n[[rule]]\nfrom = 'x'", 2, "name is missing", "add name = ..."),
        ("[[rule]]\nname = 'a'\nto = []", 1, "from is missing", "add from = ..."),
        (RULE, 1, "to is missing", "add to = ..."),
        ("[[rule]]\nname = 'a b'", 2, "'a b' cannot be the name of a rule", "letters, digits"),
        ("[[rule]]\nname = ['a']", 2, "name is an array, not a string", "put it in quotes"),
        ("[[rule]]\nname = 'a'\nfrom = '239.1.1.1%e:0'", 3, "port 0 is not within 1..65535", "1..65535"),
        (RULE + "to = '10.0.0.1:5'", 4, "to is a string, not an array of strings", 'to = ["..."]'),
        (RULE + "to = []", 4, "rule 'a' has 0 outputs", "1 to 64 outputs"),
        (RULE + "to = [\n'10.0.0.1:5',\n6]", 6, "to holds an integer", "put it in quotes"),
        (RULE + "to = ['10.0.0.1:5', '10.0.0.1:5']", 4, "has the output 10.0.0.1:5 twice", "remove one"),
        (RULE + "to = ['10.0.0.1:5']\npath = 'fast'", 5, "path is 'fast'", '"auto", "kernel", "worker"'),
        (RULE + "to = ['10.0.0.1:5']\npath = 'kernel'", 1, "cannot take the kernel path", '"worker"'),
        (
            RULE + "to = ['239.1.1.2%e:5,vlan=9']\npath = 'worker'",
            1,
            "takes the worker path, which cannot tag",
            "e.9",
        ),
        (RULE + "to = ['239.1.1.1%eth0:5']", 1, "rule 'a' sends to its own input", "another group"),
        (RULE + "to = ['10.0.0.1:5']\n" + RULE + "to = ['10.0.0.2:5']", 5, "two rules named 'a'", "rename"),
    ],
)
def test_a_bad_file_is_told_its_line_cause_and_remedy(
    tmp_path: Path, text: str, line: int, cause: str, remedy: str
) -> None:
    path = write(tmp_path, text)
    errors = refused(path).each()
    (error,) = [each for each in errors if cause.replace("{file}", str(path)) in each.cause]
    assert error.where == f"{path}:{line}"
    assert remedy in error.remedy
    assert (error.cause + error.remedy).isprintable()


EVERYTHING_WRONG = """\
[metrics]
listen = "nonsense"
tls_cert = "a.pem"
tls_key = 1
[control]
read = "none"
colour = 1
[[attach]]
interface = "eth0"
mode = "driver"
workers = 1000
[[attach]]
interface = "eth1"
ingress = "packet"
mode = "native"
zero_copy = "on"
[[attach]]
interface = "eth2"
[[attach]]
interface = "eth2"
[[rule]]
name = "a b"
from = "239.1.1.1:5000"
to = ["239.2.2.2%eth9:6000", "10.0.0.1:99999", 7]
path = "fast"
[[rule]]
name = "twice"
from = "239.1.1.2%eth0:5"
to = ["10.0.0.1:5", "10.0.0.1:5", "10.0.0.1:5"]
[[rule]]
name = "l1"
from = "239.1.1.3%eth0:1"
to = ["239.1.1.4%eth0:1"]
[[rule]]
name = "l2"
from = "239.1.1.4%eth0:1"
to = ["239.1.1.3%eth0:1"]
[[rule]]
name = "own"
from = "239.1.1.5%eth0:1"
to = ["239.1.1.5%eth0:1"]
[[rule]]
name = "l2"
from = "239.1.1.6%eth0:1"
to = ["239.1.1.4%eth0:1"]
[[rule]]
name = "input"
from = "239.1.1.6%eth0:1"
to = ["239.3.1.4%eth0:1,vlan=7"]
path = "worker"
[[ruel]]
"""


def test_everything_that_is_wrong_is_said_in_the_order_of_the_files(tmp_path: Path) -> None:
    first = write(tmp_path, EVERYTHING_WRONG, "first.toml")
    second, missing = write(tmp_path, "a = [\n", "second.toml"), tmp_path / "missing.toml"
    error = refused(first, second, missing)
    found = [(each.where.removeprefix(f"{tmp_path}/"), each.cause) for each in error.each()]
    assert all(each.remedy and not each.others for each in error.each())
    expected = [
        ("", "cannot read "),
        ("first.toml:2", "'nonsense' is not an address and a port"),
        ("first.toml:3", "tls_cert is not an absolute path"),
        ("first.toml:4", "tls_key is an integer, not a string"),
        ("first.toml:6", "read is 'none'"),
        ("first.toml:7", "unknown key 'colour'"),
        ("first.toml:10", "mode is 'driver'"),
        ("first.toml:11", "workers is 1000"),
        ("first.toml:15", "eth1: mode native is for XDP"),
        ("first.toml:16", "eth1: zero copy is for AF_XDP"),
        ("first.toml:19", f"eth2 is attached twice (first at {first}:17)"),
        ("first.toml:22", "'a b' cannot be the name of a rule"),
        ("first.toml:23", "stream '239.1.1.1:5000': it names no interface"),
        ("first.toml:24", "output '10.0.0.1:99999': port 99999 is not within 1..65535"),
        ("first.toml:24", "to holds an integer"),
        ("first.toml:25", "path is 'fast'"),
        ("first.toml:29", "rule 'twice' has the output 10.0.0.1:5 twice"),
        ("first.toml:29", "rule 'twice' has the output 10.0.0.1:5 twice"),
        ("first.toml:34", "rules form a loop: 'l1' -> 'l2' -> 'l1'"),
        ("first.toml:38", "rule 'own' sends to its own input"),
        ("first.toml:42", f"there are two rules named 'l2' (the first is at {first}:34)"),
        ("first.toml:46", "rules 'l2' and 'input' have the same input 239.1.1.6%eth0:1"),
        ("first.toml:46", "rule 'input' takes the worker path, which cannot tag output"),
        ("first.toml:51", "unknown key 'ruel'"),
        ("second.toml:1", "TOML syntax: "),
    ]
    assert [where for where, _ in found] == [where for where, _ in expected]
    for (_, cause), (_, begin) in zip(found, expected, strict=True):
        assert cause.startswith(begin)
    assert str(error) == f"cannot read {missing}: No such file or directory, and 24 more errors"


@pytest.mark.parametrize("count", [MAX_ERRORS, MAX_ERRORS + 1, 5000])
def test_of_very_many_errors_the_first_are_said_and_the_others_counted(tmp_path: Path, count: int) -> None:
    path = write(tmp_path, "".join(f"k{number} = 1\n" for number in range(count)))
    error = refused(path)
    said = [(each.where, each.cause) for each in error.each()]
    assert said == [(f"{path}:{number + 1}", f"unknown key 'k{number}'") for number in range(MAX_ERRORS)]
    assert error.unshown == count - MAX_ERRORS
    assert str(error).endswith(f", and {count - 1} more errors")


def test_a_file_with_one_error_says_no_more_than_that(tmp_path: Path) -> None:
    path = write(tmp_path, ATTACH + "workers = 0")
    error = refused(path)
    assert (str(error), error.others, error.unshown) == (f"{path}:3: workers is 0", (), 0)


@pytest.mark.parametrize(
    "to",
    [
        """
        to = [
          "10.0.0.1:5",
          "10.0.0.1:bad",  # HERE
        ]
        """,
        """
        to = ["10.0.0.1:5", "10.0.0.1:6",
              "10.0.0.1:7",
              # a comment, with "10.0.0.1:bad" and ] in it
              '10.0.0.1:bad' # HERE
              ,]
        """,
        """
        to = ["10.0.0.1:5", "10.0.0.1:bad"]  # HERE
        """,
        '''
        to = [ # ]
          """\\
          10.0.0.1:5\\
          """,

          "10.0.0.1:bad" # HERE
        ]
        ''',
        """
        "to" = [
            '''10.0.0.1:5''', "10.0.0.1:6", '10.0.0.1:7',
            "\\u0031\\u0030.0.0.1:bad"]  # HERE
        """,
    ],
)
def test_an_error_in_an_array_points_to_the_element(tmp_path: Path, to: str) -> None:
    text = f'[[rule]]\nname = "a"\nfrom = "239.1.1.1%eth0:5"\n{dedent(to)}'
    line = 1 + text[: text.index("HERE")].count("\n")
    path = write(tmp_path, text)
    assert str(refused(path)) == f"{path}:{line}: output '10.0.0.1:bad': port 'bad' is not a number"


def test_lines_are_right_behind_everything_that_looks_like_something_else(tmp_path: Path) -> None:
    text = (
        '''\
# [[rule]]
[metrics] # [[rule]]
listen = """\\
    127.0.0.1:9931""" # "

[ [attach] ]
'''.replace("[ [", "[[").replace("] ]", "]]")
        + r'''
interface = 'e"[#\'
[[rule]]
name = "a"
from = "239.1.1.1%eth\"[:5"
to = ["10.0.0.1:5", "10.0.0.1:6"]
[[ "rule" ]]
name = """b"""
from = '239.1.1.2%[[rule]]:5'
to = [
  """10.0.0.1:5""",
]

[[rule]] # HERE
name = 'c'
from = "239.1.1.3%eth0:5" # HERE
'''
    )
    path = write(tmp_path, text)
    lines = [number for number, line in enumerate(text.split("\n"), 1) if "HERE" in line]
    assert str(refused(path)) == f"{path}:{lines[0]}: to is missing"
    path = write(tmp_path, text.replace("239.1.1.3", "239.1.1.300"))
    assert [each.where for each in refused(path).each()] == [f"{path}:{line}" for line in lines]
    origins = load_config([write(tmp_path, text + 'to = ["10.0.0.1:5"]')]).rules
    assert [rule.origin for rule in origins] == [Origin(str(path), n) for n in (9, 13, 20)]


@pytest.mark.parametrize(
    ("text", "line", "cause"),
    [
        ("a = 1\nb = = 2\n", 2, "TOML syntax: Invalid value"),
        ("[[rule]\nname = 1", 1, "TOML syntax: Expected ']]' at the end of an array declaration"),
        ("a = 1\na = 2", 2, "TOML syntax: Cannot overwrite a value"),
        ('a = 1\n\nb = "x\n', 3, "TOML syntax: Illegal character '\\n'"),
        ("a = 1\nb = [1,\n\n", 2, "TOML syntax: "),
        ("a = \x00", 1, "TOML syntax: Invalid value"),
    ],
)
def test_a_syntax_error_is_told_its_line(tmp_path: Path, text: str, line: int, cause: str) -> None:
    path = write(tmp_path, text)
    error = refused(path)
    assert error.where == f"{path}:{line}"
    assert error.cause.startswith(cause)
    assert " (at " not in error.cause


def test_values_that_the_toml_reader_cannot_hold_are_refused(tmp_path: Path) -> None:
    assert refused(write(tmp_path, "a = " + "[" * 100_000)).cause == "arrays or tables are nested too deeply"
    assert refused(write(tmp_path, "a = " + "9" * 5_000)).cause.startswith("TOML value: ")


def test_a_file_that_is_not_utf_8_is_refused_at_its_line(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_bytes(b"# one\n# two \xff\n")
    assert str(refused(path)) == f"{path}:2: the file is not UTF-8"


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    assert str(refused(path)) == f"cannot read {path}: No such file or directory"


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo"):
        assert str(refused(path)) == f"{path} is not a regular file"


def test_files_that_are_refused_leave_no_descriptor_open(tmp_path: Path) -> None:
    before = sorted(Path("/proc/self/fd").iterdir())
    for path in (tmp_path, tmp_path / "none", write(tmp_path, "x")):
        refused(path)
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_a_file_of_the_largest_size_is_read_and_a_larger_one_is_refused(tmp_path: Path) -> None:
    assert load_config([write(tmp_path, "#" * MAX_FILE_BYTES)]) == Config()
    path = write(tmp_path, "#" * (MAX_FILE_BYTES + 1))
    assert str(refused(path)) == f"{path} is larger than 4194304 bytes"


def test_more_attachments_than_workers_are_refused(tmp_path: Path) -> None:
    text = "".join(f'[[attach]]\ninterface = "eth{n}"\n' for n in range(MCR_MAX_INTERFACES + 1))
    path = write(tmp_path, text)
    assert str(refused(path)) == f"{path}:129: there are more than 64 attachments"


def test_one_bad_rule_among_good_ones_yields_nothing(tmp_path: Path) -> None:
    good = write(tmp_path, EXAMPLE, "good.toml")
    bad = write(tmp_path, EXAMPLE.replace("studio", "x").replace("239.1.1.2%eth9", "eth9"), "bad.toml")
    assert f"{bad}:23" in [each.where for each in refused(good, bad).each()]


def test_a_request_is_held_to_what_a_file_is_held_to() -> None:
    table = {"name": "a", "from": "239.1.1.1%eth0:5", "to": ["10.20.0.9:6"]}
    rule = parse_rule(table, temporary=True)
    assert rule == Rule("a", parse_stream("239.1.1.1%eth0:5"), (parse_output("10.20.0.9:6"),))
    assert rule.temporary
    assert rule.origin is None
    assert parse_attachment({"interface": "eth0", "busy_poll": True}) == Attachment("eth0", busy_poll=True)
    shared: dict[str, object] = {"interface": "eth0", "workers": 2, "egress_threads": 1, "cpus": "4,0-2"}
    assert parse_attachment(shared) == Attachment("eth0", workers=2, egress_threads=1, cpus=(4, 0, 1, 2))
    for parse, bad, cause in (
        (parse_rule, {**table, "to": None}, "to is nothing, not an array of strings"),
        (parse_rule, {**table, "x": 1}, "unknown key 'x'"),
        (parse_attachment, {"interface": "eth0", "mode": "driver"}, "mode is 'driver'"),
        (parse_attachment, {}, "interface is missing"),
    ):
        with pytest.raises(McrError) as caught:
            parse(bad)
        assert str(caught.value) == cause


def test_listen_is_an_address_and_a_port_or_off() -> None:
    assert parse_listen("off") is None
    assert parse_listen("127.0.0.1:9931") == (ip_address("127.0.0.1"), 9931)
    assert parse_listen("[::1]:9931") == (ip_address("::1"), 9931)
    assert parse_listen("[::]:1") == (ip_address("::"), 1)


def test_a_file_of_4000_rules_loads_in_seconds(tmp_path: Path) -> None:
    text = "".join(
        f'[[rule]]\nname = "r{n}"\nfrom = "239.1.{n >> 8}.{n & 255}%eth0:5"\n'
        f'to = [\n  "239.2.{n >> 8}.{n & 255}%eth1:6,ttl=8",\n  "10.20.0.9:{n + 1}",\n]\n'
        for n in range(4000)
    )
    path = write(tmp_path, text)
    start = time.process_time()
    rules = load_config([path]).rules
    assert time.process_time() - start < 5
    assert rules[-1].origin == Origin(str(path), 3999 * 7 + 1)


words = "[ ] { } \" ' \"\"\" ''' = # \\ . , rule name to=[ x.y=1 [rule.a.b] 1e5 inf 10:00:00 é"
pieces = st.sampled_from([*EXAMPLE.splitlines(keepends=True), *words.split(), "\n", "\r\n", "\t"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("239.1.1.1%eth0:5"),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300)
@given(st.binary() | st.lists(pieces).map(lambda parts: "".join(parts).encode()))
@example(b"a=1_000.5e3\n[a.b.c]\n")
@example(b'["a\\"]"]\n\'=\' = [[1,[2]],{a=[1]}]')
def test_any_bytes_are_a_configuration_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(data)
    try:
        load_config([path])
    except McrError as error:
        assert (error.cause + error.remedy).isprintable()


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["name", "from", "to", "path", "interface", "mode", "busy_poll"]) | st.text(), values
    )
)
@example({"\ud800": 1})
@example({"interface": "\ud800"})
def test_any_request_is_parsed_or_refused_in_one_line(table: dict[str, object]) -> None:
    for parse in (parse_rule, parse_attachment):
        try:
            parse(table)
        except McrError as error:
            assert (error.cause + error.remedy).isprintable()
