"""What the container files say of the server, held against the server's own settings."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tools import needs
from tminus.service.errors import ForeignHost
from tminus.service.startup.server import ANSWER_S
from tminus.service.startup.settings import Settings

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = (ROOT / "docker" / "compose.yaml").read_text()
OVERRIDES = "".join((ROOT / "docker" / f"{name}.yaml").read_text() for name in ("gpu", "production"))
PASSWORD = "of all kinds: $@/%'"


def test_every_tminus_variable_is_a_setting() -> None:
    known = {f"TMINUS_{name.upper()}" for name in Settings.model_fields}
    used = set(re.findall(r"TMINUS_[A-Z_]+", DOCKERFILE + COMPOSE + OVERRIDES))
    assert used
    assert used <= known


def test_the_base_image_is_one_by_its_digest() -> None:
    """docker/lock renews it by this line."""
    bases = re.findall(r"^FROM (\S+:\S+) AS \w+$", DOCKERFILE, re.MULTILINE)
    assert len(bases) == 2
    assert len({*bases}) == 1
    assert re.fullmatch(r"python:3\.11-slim@sha256:[0-9a-f]{64}", bases[0])


def test_each_image_runs_as_a_numbered_user_that_is_not_root() -> None:
    for target in ("cpu", "cuda"):
        final = DOCKERFILE.partition(f"FROM base AS {target}\n")[2].partition("\nFROM ")[0]
        assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", final.strip().splitlines()[-1]), "after all that needs root"


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


# --- as compose itself reads the files ---


NEEDED = {"NAME": "diffusion.example", "POSTGRES_PASSWORD": PASSWORD} | {
    name: f"/srv/{name}" for name in ("KEYS", "CERTIFICATES", "ALERT_URL")
}


def compose(*names: str, **env: str) -> "subprocess.CompletedProcess[str]":
    files = [part for name in ("compose", *names) for part in ("--file", ROOT / "docker" / f"{name}.yaml")]
    command = [needs("docker-compose"), *files, "config", "--format", "json"]
    read = {*re.findall(r"\$\{(\w+)", COMPOSE + OVERRIDES), "TMINUS_KEYS"}
    bare = {name: value for name, value in os.environ.items() if name not in read}
    return subprocess.run(command, env=bare | env, capture_output=True, text=True, timeout=60, check=False)


def composed(*names: str, **env: str) -> dict[str, Any]:
    """The services that compose would run."""
    done = compose(*names, **env)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["services"]
    return found


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return composed("production", **NEEDED)


def mounted(service: dict[str, Any]) -> dict[str, str]:
    """What a service has of the host, by where it has it."""
    return {each["target"]: each["source"] for each in service["volumes"] if each["type"] == "bind"}


def test_compose_waits_longer_than_a_drain_takes(services: dict[str, Any]) -> None:
    server = services["tminus"]
    stop_s = float(server["stop_grace_period"].removesuffix("s"))
    assert stop_s >= float(server["environment"]["TMINUS_GRACE_S"]) + ANSWER_S
    assert services["proxy"]["stop_grace_period"] == server["stop_grace_period"]


def test_one_server_is_open_to_its_own_machine_or_asks_for_keys() -> None:
    assert composed()["tminus"]["environment"]["TMINUS_OPEN"] == "yes"
    keyed = composed(OPEN="no", TMINUS_KEYS="a line\nand another")["tminus"]["environment"]
    assert (keyed["TMINUS_OPEN"], keyed["TMINUS_KEYS"]) == ("no", "a line\nand another")


def test_the_database_asks_for_the_password_that_the_servers_have_whatever_is_in_it(services: dict[str, Any]) -> None:
    servers, database = services["tminus"]["environment"], services["postgres"]["environment"]
    escaped = PASSWORD.replace("$", "$$")  # as compose prints it
    assert servers["PGPASSWORD"] == database["POSTGRES_PASSWORD"] == escaped
    assert servers["TMINUS_JOB_STORE"] == f"postgresql://{database['POSTGRES_USER']}@postgres/tminus"


@pytest.mark.parametrize("name", NEEDED)
def test_production_does_not_start_without_what_it_needs(name: str) -> None:
    refused = compose("production", **{each: value for each, value in NEEDED.items() if each != name})
    assert refused.returncode != 0
    assert name in refused.stderr


def test_three_servers_ask_for_keys_and_are_reached_by_the_proxy_alone(services: dict[str, Any]) -> None:
    server, proxy = services["tminus"], services["proxy"]
    assert server["deploy"]["replicas"] == 3
    assert composed("production", **NEEDED, SERVERS="5")["tminus"]["deploy"]["replicas"] == 5
    assert server["environment"]["TMINUS_OPEN"] == "no"
    assert mounted(server)[str(Path(server["environment"]["TMINUS_KEYS_FILE"]).parent)] == NEEDED["KEYS"]
    assert "ports" not in server, "since it takes every address for a proxy's"
    assert server["environment"]["FORWARDED_ALLOW_IPS"] == "*"
    assert [name for name, each in services.items() for port in each.get("ports", ()) if "host_ip" not in port] == [
        "proxy"
    ]
    assert proxy["ports"][0]["published"] == "443"


def test_the_proxy_has_what_its_configuration_names(services: dict[str, Any]) -> None:
    proxy, text = services["proxy"], (ROOT / "docker" / "nginx" / "tminus.conf.template").read_text()
    assert proxy["environment"] == {"NAME": NEEDED["NAME"]}
    assert {*re.findall(r"\$\{(\w+)\}", re.sub("#.*", "", text))} == {"NAME"}
    assert f"listen {proxy['ports'][0]['target']} ssl;" in text
    (folder,) = {*re.findall(r"ssl_certificate\w* +(/\w+)/", text)}
    assert mounted(proxy)[folder] == NEEDED["CERTIFICATES"]
    assert mounted(proxy)["/etc/nginx/templates"] == str(ROOT / "docker" / "nginx")


def test_alerts_go_to_the_url_of_the_file(services: dict[str, Any]) -> None:
    manager = mounted(services["alertmanager"])
    config = yaml.safe_load(Path(manager["/etc/alertmanager/alertmanager.yml"]).read_text())
    ((receiver,),) = [each["webhook_configs"] for each in config["receivers"]]
    assert manager[receiver["url_file"]] == NEEDED["ALERT_URL"]
    prometheus = yaml.safe_load((ROOT / "docker" / "prometheus" / "prometheus.yml").read_text())
    (found,) = [at for each in prometheus["alerting"]["alertmanagers"] for at in each["dns_sd_configs"]]
    assert (found["names"], found["port"]) == (["alertmanager"], services["alertmanager"]["ports"][0]["target"])


@pytest.mark.parametrize("files", [(), ("production",)], ids="-".join)
def test_a_server_is_known_by_its_public_name_and_by_addresses(files: tuple[str, ...]) -> None:
    """By an address Prometheus and the other servers ask."""
    found = composed(*files, **NEEDED)["tminus"]["environment"]
    known = Settings(allowed_hosts=found["TMINUS_ALLOWED_HOSTS"]).allowed_sites()
    for host in (NEEDED["NAME"], "172.18.0.3:9100"):
        known.check_host(host)
    with pytest.raises(ForeignHost):
        known.check_host("evil.example")
