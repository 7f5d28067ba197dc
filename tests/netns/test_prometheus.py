"""A real Prometheus scrapes a real supervisor with traffic: every metric of the docs is there, and every
query of the dashboard and of the alerts is answered.

Prometheus is what `scripts/set-up soak` unpacked.
"""

import json
import re
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from mcr.maps import DROP_REASONS, OUTPUT_DROP_REASONS
from tests.conftest import require
from tests.netns.flows import GROUP_IN, GROUP_OUT, GROUP_SENT, config, spawn_send, wait_until
from tests.netns.lab import Lab, Namespace
from tests.netns.test_metrics import LISTEN, scrape

pytestmark = pytest.mark.soak

ROOT = Path(__file__).parents[2]
BIN = ROOT / "build" / "soak" / "prometheus" / "usr" / "bin"
RULES = ROOT / "deploy" / "prometheus-mcr.rules.yml"
DASHBOARD = ROOT / "deploy" / "grafana-mcr.json"
PROMETHEUS = """\
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [%s]
scrape_configs:
  - job_name: mcr
    static_configs: [{targets: ["127.0.0.1:9931"]}]
"""
VARIABLES = {"$__rate_interval": "10s", "$instance": ".*", "$rule": ".*", "$job": ".*"}


@pytest.fixture(autouse=True)
def unpacked() -> None:
    require("prometheus", (BIN / "prometheus").exists(), f"there is no {BIN}: scripts/set-up soak")


def test_alert_rules_are_right(lab: Lab) -> None:
    promtool = str(BIN / "promtool")
    relay = lab.namespace("relay")
    lab.run(relay, [promtool, "check", "rules", str(RULES)])
    lab.run(relay, [promtool, "test", "rules", str(ROOT / "tests/netns/prometheus-mcr.rules.test.yml")])


def _api(lab: Lab, relay: Namespace, path: str, **query: str) -> Any:
    url = f"http://127.0.0.1:9090/api/v1/{path}?{urllib.parse.urlencode(query)}"
    with lab.inside(relay), urllib.request.urlopen(url, timeout=10) as answer:
        return json.loads(answer.read())["data"]


def _dashboard_queries() -> list[str]:
    """Those of the panels, with the dashboard's variables filled in."""
    queries = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"]
            for name, value in VARIABLES.items():
                query = query.replace(name, value)
            queries.append(query)
    return queries


def _documented() -> set[str]:
    """The metrics of the table in docs/OPERATIONS.md."""
    text = (ROOT / "docs" / "OPERATIONS.md").read_text()
    section = text.partition("## Prometheus\n")[2].partition("\n## ")[0]
    first_cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return set(re.findall(r"`(\w+)`", " ".join(first_cells)))


def _spawn_prometheus(lab: Lab, relay: Namespace) -> None:
    path = lab.directory / "prometheus.yml"
    path.write_text(PROMETHEUS % RULES)
    lab.spawn(
        relay,
        [
            str(BIN / "prometheus"),
            f"--config.file={path}",
            f"--storage.tsdb.path={lab.directory / 'tsdb'}",
            "--web.listen-address=127.0.0.1:9090",
        ],
    ).wait_for("Server is ready", timeout_s=60)


def test_prometheus_finds_every_metric_and_every_query_is_answered(lab: Lab) -> None:
    topology = lab.topology_relay(gro=True)
    rules = (("cam", GROUP_IN, [GROUP_OUT, "10.2.0.2:6001"]), ("fast", "239.1.1.2%in0:5000", [GROUP_OUT]))
    lab.supervisor(topology.relay, config=config(*rules) + LISTEN)
    for stream in (GROUP_SENT, "239.1.1.2%eth0:5000"):
        spawn_send(lab, topology.src, stream, "--rate", "1000", "--duration", "600")
    page = scrape(lab, topology.relay)
    page_file = lab.directory / "page"
    page_file.write_text(page)
    check = f"{BIN}/promtool check metrics < {page_file}"
    assert lab.run(topology.relay, ["sh", "-c", check]).stderr == ""
    _spawn_prometheus(lab, topology.relay)

    names = set(re.findall(r"^# TYPE (\w+)", page, re.MULTILINE))
    assert names == _documented()
    histogram = "mcr_rule_latency_seconds"
    stored = (names - {histogram}) | {f"{histogram}_{part}" for part in ("bucket", "sum", "count")}
    wait_until(
        lambda: stored <= set(_api(lab, topology.relay, "label/__name__/values")), "everything is stored", 30
    )
    for query in _dashboard_queries():
        wait_until(
            lambda query=query: bool(_api(lab, topology.relay, "query", query=query)["result"]),  # type: ignore[misc]
            f"data for {query}",
            30,
        )
    dropped = _api(lab, topology.relay, "query", query='mcr_rule_dropped_packets_total{rule="cam"}')["result"]
    assert {series["metric"]["reason"] for series in dropped} == set(DROP_REASONS)
    dropped = _api(lab, topology.relay, "query", query='mcr_output_dropped_packets_total{rule="cam"}')[
        "result"
    ]
    assert {series["metric"]["reason"] for series in dropped} == set(OUTPUT_DROP_REASONS)

    wait_until(lambda: _settled(lab, topology.relay), "every alert has been evaluated", 30)
    alerts = _api(lab, topology.relay, "alerts")["alerts"]
    degraded = {alert["labels"].get("degraded") for alert in alerts}
    assert degraded == {"zero_copy"}, alerts  # veth cannot; it waits for a minute before it fires


def _settled(lab: Lab, relay: Namespace) -> bool:
    (group,) = _api(lab, relay, "rules")["groups"]
    assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}, group
    return all(rule["health"] == "ok" for rule in group["rules"])
