"""docker/prometheus and docker/grafana, held against a real server by a real Prometheus."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.postgres import free_port
from tests.service.client.conftest import SPEC, Served
from tests.service.conftest import INSTANT
from tests.service.fakes import INFO, LIMITS, wait_until
from tests.service.keys import access_of, bearer, key_line
from tests.tools import needs
from tminus.service.metrics import Metrics

ROOT = Path(__file__).parents[1]
PROMETHEUS = ROOT / "docker" / "prometheus"
DASHBOARD = json.loads((ROOT / "docker" / "grafana" / "dashboards" / "tminus.json").read_text("utf-8"))
ALERTS = [
    rule for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"] for rule in group["rules"]
]
PANELS = {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in DASHBOARD["panels"]}
# Nothing of it happens here: no GPU, no shared store, no error, and no reader is slow.
EMPTY_HERE = (
    "tminus_device_memory_bytes",
    "tminus_store_backlog_seconds",
    'status=~"5.."',
    "tminus_jobs_aborted_total",
    "tminus_snapshots_total",
)
KEY = "a-key"


def run(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_its_configuration_and_the_alerts() -> None:
    promtool = needs("prometheus").with_name("promtool")
    run(promtool, "check", "config", PROMETHEUS / "prometheus.yml")
    run(promtool, "test", "rules", PROMETHEUS / "alerts_test.yml")


def test_every_alert_is_tried_when_it_fires_and_when_it_does_not() -> None:
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    tried = [(each["alertname"], bool(each["exp_alerts"])) for test in tests for each in test["alert_rule_test"]]
    assert {*tried} == {(rule["alert"], fires) for rule in ALERTS for fires in (True, False)}


def test_alerts_are_tried_on_counters_that_begin_as_those_of_the_server_do() -> None:
    at_0 = {(sample.name, *sorted(sample.labels.items())) for family in Metrics().registry.collect()
            for sample in family.samples if sample.name.endswith("_total")}  # fmt: skip
    for test in yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]:
        for each in test["input_series"]:
            name, _, labels = each["series"].partition("{")
            if name.endswith("_total"):
                own = sorted(pair for pair in re.findall(r'(\w+)="(.*?)"', labels) if pair[0] != "instance")
                assert each["values"].startswith("0" if (name, *own) in at_0 else "_"), each["series"]


def test_operations_says_what_to_do_about_every_alert() -> None:
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    assert {*re.findall(r"`(Tminus\w+)`", text)} == {rule["alert"] for rule in ALERTS}


def test_the_dashboard_is_provisioned_where_compose_mounts_it() -> None:
    provisioning = ROOT / "docker" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "dashboards.yaml").read_text())["providers"]
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    mounted = dict(each.rsplit(":", 2)[:2][::-1] for each in services["grafana"]["volumes"])
    assert mounted[provider["options"]["path"]] == "./grafana/dashboards"
    assert mounted["/etc/grafana/provisioning"] == "./grafana/provisioning"
    assert source["url"] == "http://prometheus:9090"
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {source["uid"]}
    (scraped,) = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"][0]["dns_sd_configs"]
    port = services["tminus"]["environment"]["TMINUS_METRICS_PORT"]
    assert (scraped["names"], str(scraped["port"])) == (["tminus"], port)
    assert not any(str(port) in published for published in services["tminus"]["ports"]), "there it needs no key"


def test_every_port_that_compose_publishes_is_for_this_machine_alone() -> None:
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    ports = [port for service in services.values() for port in service["ports"]]
    assert len(ports) == 3
    assert all(re.fullmatch(r"\$\{\w+:-127\.0\.0\.1:\d+\}:\d+", port) for port in ports)


# --- a server that is scraped ---


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A server at which all has happened that the dashboard shows."""
    access = access_of(key_line("studio", KEY), is_open=True)
    limits = replace(LIMITS, max_streams=8, max_streams_per_address=8)
    with Served(INFO, limits, INSTANT, access=access).running() as running:
        yield running


@contextmanager
def prometheus(served: Served, folder: Path) -> Iterator[str]:
    """Debian's Prometheus with the configuration of docker/, but for the address of its target."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "200ms", "evaluation_interval": "200ms"}
    scraped = {"job_name": "tminus", "static_configs": [{"targets": [served.url.removeprefix("http://")]}]}
    config |= {"scrape_configs": [scraped], "alerting": {}}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(PROMETHEUS / "alerts.yml", folder)
    url = f"http://127.0.0.1:{free_port()}"
    command = [needs("prometheus"), f"--config.file={folder / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={url.removeprefix('http://')}"]
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    command += [option for option in services["prometheus"]["command"] if option.startswith("--enable-feature=")]
    command += ["--log.level=error"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        yield url
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=20)
    assert errors == ""


def answers(url: str, query: str) -> list[Any]:
    """What a query finds; empty until Prometheus listens."""
    try:
        answer = httpx.get(f"{url}/api/v1/query", params={"query": query})
    except httpx.TransportError:
        return []
    if answer.status_code == 503:
        return []
    document = answer.json()
    assert document["status"] == "success", (query, document)
    found: list[Any] = document["data"]["result"]
    return found


def filled(expression: str) -> str:
    """An expression of the dashboard as Grafana sends it."""
    return expression.replace("$__rate_interval", "1m").replace("$instance", ".*")


@pytest.mark.slow
def test_prometheus_scrapes_a_server_and_every_panel_shows_something(served: Served, tmp_path: Path) -> None:
    with prometheus(served, tmp_path) as url:
        wait_until(lambda: bool(answers(url, 'up{job="tminus"} == 1')))

        def work() -> None:
            assert httpx.post(f"{served.url}/sample", json=SPEC, headers=bearer(KEY)).status_code == 200
            adaptive = {"quality": "adaptive", "deadline_s": 600}
            assert httpx.post(f"{served.url}/sample", json=adaptive).status_code == 200
            assert httpx.post(f"{served.url}/sample", json={"steps": 0}).status_code == 422
            job = httpx.post(f"{served.url}/jobs", json=SPEC).json()
            httpx.get(f"{served.url}/jobs/{job['id']}/events", params={"every": 1, "show": "x_t"})

        missing = [filled(each) for queries in PANELS.values() for each in queries]
        missing = [each for each in missing if not any(empty in each for empty in EMPTY_HERE)]

        def all_found() -> bool:
            work()
            missing[:] = [query for query in missing if not answers(url, query)]
            return not missing

        wait_until(all_found)
        for query in (*(filled(each) for queries in PANELS.values() for each in queries), *(r["expr"] for r in ALERTS)):
            answers(url, query)  # is understood
        for query in (filled(t["expr"]) for p in DASHBOARD["panels"] for t in p["targets"] if t.get("exemplar")):
            asked = {"query": query, "start": time.time() - 60, "end": time.time() + 60}
            found = httpx.get(f"{url}/api/v1/query_exemplars", params=asked).json()["data"]
            assert all(each["labels"]["request_id"] for series in found for each in series["exemplars"])
            assert found, query
        rules = httpx.get(f"{url}/api/v1/rules").json()["data"]["groups"][0]["rules"]
        assert {rule["name"] for rule in rules} == {rule["alert"] for rule in ALERTS}
        assert {rule["health"] for rule in rules} <= {"ok", "unknown"}


def test_every_metric_of_dashboard_and_alerts_is_one_of_the_server(served: Served) -> None:
    text = httpx.get(f"{served.url}/metrics").text
    families = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    named = re.findall(r"\b(?:tminus|process)_\w+", json.dumps(PANELS) + json.dumps(ALERTS))
    assert len({*named}) > 20
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in named} <= families
