"""The metrics of a running relay: exact, quick, over TLS, and out of the way of everything else."""

import socket
import ssl
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mcr.control import ControlClient
from tests.netns.flows import (
    GROUP_HEARD,
    GROUP_IN,
    GROUP_OUT,
    GROUP_SENT,
    config,
    relay_one,
    wait_until,
)
from tests.netns.lab import Lab, Namespace

LISTEN = '[metrics]\nlisten = "127.0.0.1:9931"\n'


def scrape(lab: Lab, relay: Namespace, tls: ssl.SSLContext | None = None) -> str:
    url = f"{'https' if tls else 'http'}://127.0.0.1:9931/metrics"
    with lab.inside(relay), urllib.request.urlopen(url, timeout=30, context=tls) as answer:
        text: str = answer.read().decode()
        return text


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The whole scrape as prometheus_client reads it: values by name and labels, none of them twice."""
    read = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    by_label = {(each.name, frozenset(each.labels.items())): each.value for each in read}
    assert len(by_label) == len(read) == sum(not line.startswith("#") for line in text.splitlines())
    return by_label


def many_rules(count: int) -> str:
    """Two outputs each: one of them unicast, so that they take the worker path."""
    return config(
        *(
            (
                f"rule-{number}",
                f"239.{1 + number // 250}.1.{1 + number % 250}%in0:5000",
                [f"239.{101 + number // 250}.1.{1 + number % 250}%out0:6000", f"10.2.0.2:{7000 + number}"],
            )
            for number in range(count)
        )
    )


def test_metrics_tell_the_exact_counts(lab: Lab) -> None:
    topology = lab.topology_relay()
    outputs = [GROUP_OUT, "10.2.0.2:6001"]
    lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, outputs)) + LISTEN)
    before = time.time()
    relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 5000, "--rate", "20000")
    page = samples(scrape(lab, topology.relay))
    rule, output, worker = (
        {"rule": "cam"},
        {"rule": "cam", "output": GROUP_OUT},
        {"interface": "in0", "worker": "0"},
    )
    wanted = {"wanted_mode": "auto", "wanted_ingress": "auto", "wanted_zero_copy": "auto"}
    for name, labels, value in (
        ("mcr_rule_received_packets_total", rule, 5000),
        ("mcr_rule_received_bytes_total", rule, 6580000),
        ("mcr_rule_relayed_packets_total", rule, 5000),
        ("mcr_rule_relayed_bytes_total", rule, 6580000),
        ("mcr_rule_dropped_packets_total", rule | {"reason": "fragment"}, 0),
        ("mcr_rule_info", rule | {"stream": GROUP_IN, "interface": "in0", "path": "worker"}, 1),
        ("mcr_rule_active", rule, 1),
        ("mcr_rule_latency_seconds_count", rule, 10000),
        ("mcr_output_relayed_packets_total", output, 5000),
        ("mcr_output_sent_packets_total", output, 5000),
        ("mcr_output_dropped_packets_total", output | {"reason": "socket_full"}, 0),
        ("mcr_output_active", output, 1),
        ("mcr_worker_up", worker, 1),
        ("mcr_worker_restarts_total", worker, 0),
        ("mcr_worker_crash_loop", worker, 0),
        (
            "mcr_interface_info",
            {"interface": "in0", "mode": "native", "ingress": "xsk", "zero_copy": "off"} | wanted,
            1,
        ),
        ("mcr_joins_held", {}, 1),
        ("mcr_config_reloads_total", {"result": "success"}, 0),
    ):
        assert page[name, frozenset(labels.items())] == value, name
    last = page["mcr_rule_last_packet_timestamp_seconds", frozenset(rule.items())]
    assert before - 1 < last <= time.time() + 1


def test_rules_that_change_between_scrapes_are_told_as_they_are(lab: Lab) -> None:
    topology = lab.topology_relay()
    lab.supervisor(topology.relay, config=config() + LISTEN)
    names = [f"rule-{number}" for number in range(4)]

    def told() -> set[str]:
        page = samples(scrape(lab, topology.relay))
        return {dict(labels)["rule"] for name, labels in page if name == "mcr_rule_active"}

    for number, name in enumerate(names):
        stream = f"239.1.1.{1 + number}%in0:5000"
        to = f"239.2.2.{1 + number}%out0:6000"
        lab.mcr(topology.relay, "rule", "add", name, "--from", stream, "--to", to)
        assert told() == set(names[: number + 1])
    lab.mcr(topology.relay, "rule", "del", names[1])
    assert told() == {names[0], *names[2:]}


def test_a_failed_reload_and_a_control_client_are_told(lab: Lab) -> None:
    topology = lab.topology_relay()
    lab.supervisor(topology.relay, config=config(("cam", GROUP_IN, [GROUP_OUT])) + LISTEN)
    lab.mcr(topology.relay, "reload")
    (lab.directory / f"{topology.relay.name}.toml").write_text("nonsense")
    assert lab.mcr(topology.relay, "reload", check=False).returncode == 1
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(lab.runtime_directory / f"{topology.relay.name}.sock"))
        wait_until(lambda: "\nmcr_control_clients 1.0\n" in scrape(lab, topology.relay), "the client counts")
    text = scrape(lab, topology.relay)
    assert '\nmcr_config_reloads_total{result="success"} 1.0\n' in text
    assert '\nmcr_config_reloads_total{result="failure"} 1.0\n' in text
    assert "\nmcr_config_last_reload_successful 0.0\n" in text


def _openssl(directory: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)


def _certificate(directory: Path, name: str, authority: str = "", alternative: str = "IP:127.0.0.1") -> None:
    """NAME.pem and NAME.key, signed by an authority made before, or an authority itself."""
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key")
    request = ("req", *key, "-subj", f"/CN={name}")
    if not authority:
        _openssl(directory, *request, "-x509", "-days", "2", "-out", f"{name}.pem")
        return
    _openssl(directory, *request, "-out", f"{name}.csr")
    (directory / "extensions").write_text(f"subjectAltName={alternative}\n")
    signed = ("-CA", f"{authority}.pem", "-CAkey", f"{authority}.key", "-CAcreateserial", "-days", "2")
    extended = ("-extfile", "extensions", "-out", f"{name}.pem")
    _openssl(directory, "x509", "-req", "-in", f"{name}.csr", *signed, *extended)


def _client(directory: Path, certificate: str = "") -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=directory / "authority.pem")
    if certificate:
        context.load_cert_chain(directory / f"{certificate}.pem", directory / f"{certificate}.key")
    return context


def test_tls_lets_in_only_who_has_a_certificate(lab: Lab) -> None:
    topology = lab.topology_relay()
    _certificate(lab.directory, "authority")
    _certificate(lab.directory, "stranger")
    for name in ("server", "scraper"):
        _certificate(lab.directory, name, "authority")
    tls = "".join(
        f'{key} = "{lab.directory}/{file}"\n'
        for key, file in (
            ("tls_cert", "server.pem"),
            ("tls_key", "server.key"),
            ("client_ca", "authority.pem"),
        )
    )
    supervisor = lab.supervisor(topology.relay, config=LISTEN + tls)
    assert "\nmcr_joins_wanted 0.0\n" in scrape(lab, topology.relay, _client(lab.directory, "scraper"))
    for certificate in ("", "stranger"):
        with pytest.raises(OSError):
            scrape(lab, topology.relay, _client(lab.directory, certificate))
    with pytest.raises(OSError):
        scrape(lab, topology.relay)
    _certificate(lab.directory, "server", "authority", "IP:127.0.0.1,DNS:renewed")
    with lab.inside(topology.relay), socket.create_connection(("127.0.0.1", 9931)) as connection:
        context = _client(lab.directory, "scraper")
        with context.wrap_socket(connection, server_hostname="renewed"):
            pass  # the renewed certificate is served, and bears that name
    assert "Traceback" not in supervisor.output()


@pytest.mark.parametrize(
    ("certificate", "key", "cause"),
    [
        ("absent.pem", "authority.key", "there is no file"),
        ("authority.pem", "stranger.key", "cannot use the certificate"),
        ("authority.key", "authority.key", "cannot use the certificate"),
    ],
)
def test_certificates_that_cannot_be_used_are_named(lab: Lab, certificate: str, key: str, cause: str) -> None:
    relay = lab.namespace("relay")
    _certificate(lab.directory, "authority")
    _certificate(lab.directory, "stranger")
    path = lab.directory / "tls.toml"
    path.write_text(
        f'{LISTEN}tls_cert = "{lab.directory}/{certificate}"\ntls_key = "{lab.directory}/{key}"\n'
    )
    done = lab.mcr(relay, "run", "-c", str(path), check=False)
    assert done.returncode == 1
    assert cause in done.stderr and str(lab.directory) in done.stderr and "remedy: " in done.stderr


def test_stuck_scrapers_hold_up_neither_the_relay_nor_the_end(lab: Lab) -> None:
    """As many as are let in say nothing, or do not read; the next is refused, and so until one is cut."""
    topology = lab.topology_relay()
    text = config(("cam", GROUP_IN, [GROUP_OUT]), path="worker") + LISTEN
    supervisor = lab.supervisor(topology.relay, config=text)
    with lab.inside(topology.relay):
        stuck = [socket.create_connection(("127.0.0.1", 9931)) for _ in range(8)]
    for connection in stuck[4:]:
        connection.sendall(b"GET /metrics HTTP/1.0\r\n")
    with lab.inside(topology.relay), socket.create_connection(("127.0.0.1", 9931)) as refused:
        refused.settimeout(10)
        assert refused.recv(1) == b""
    sent, heard = relay_one(lab, topology, GROUP_SENT, GROUP_HEARD, 1000, "--rate", "10000")
    assert heard["packets"] == sent["packets"]
    begin = time.monotonic()
    assert supervisor.terminate(timeout_s=10) == 0
    assert time.monotonic() - begin < 4, "the silence of a scraper, 5 s, is not waited for"
    for connection in stuck:
        connection.close()
    assert lab.leftovers(topology.relay) == []


@pytest.mark.soak
def test_a_scrape_of_2000_rules_takes_less_than_100_ms(lab: Lab) -> None:
    topology = lab.topology_relay()
    supervisor = lab.supervisor(topology.relay, config=many_rules(2000) + LISTEN, timeout_s=120)
    times_s, changed_s = [], []
    for _ in range(10):
        begin = time.perf_counter()
        text = scrape(lab, topology.relay)
        times_s.append(time.perf_counter() - begin)
    for number in range(5):
        stream, to = f"239.99.1.{1 + number}%in0:5000", f"239.99.2.{1 + number}%out0:6000"
        lab.mcr(topology.relay, "rule", "add", f"new-{number}", "--from", stream, "--to", to)
        begin = time.perf_counter()
        page = scrape(lab, topology.relay)
        changed_s.append(time.perf_counter() - begin)
        assert page.count("\nmcr_rule_received_packets_total{") == 2001 + number
    assert text.count("\nmcr_rule_received_packets_total{") == 2000
    assert text.count("\nmcr_output_sent_packets_total{") == 4000
    assert min(times_s) < 0.1, times_s
    assert min(changed_s) < 0.1, changed_s
    control = lab.runtime_directory / f"{topology.relay.name}.sock"
    answered_s = []
    with ControlClient(control, timeout_s=10) as client, lab.inside(topology.relay):
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", 9931)) as scraper:
                scraper.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                begin = time.perf_counter()
                client.call("rule.show", name="rule-0")
                answered_s.append(time.perf_counter() - begin)
                while scraper.recv(1 << 20):
                    pass
    assert min(answered_s) < 0.02, answered_s
    assert supervisor.terminate() == 0
