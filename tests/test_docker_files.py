"""What the container files say of the server, held against the server's own settings."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tools import needs
from tminus.service.startup.server import ANSWER_S
from tminus.service.startup.settings import Settings

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = (ROOT / "docker" / "compose.yaml").read_text()
OVERRIDES = "".join((ROOT / "docker" / f"{name}.yaml").read_text() for name in ("gpu", "keys", "replicas"))
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


# --- several servers, as compose itself reads the files ---


def composed(*names: str, **env: str) -> dict[str, Any]:
    """The services that compose would run."""
    done = compose(*names, POSTGRES_PASSWORD=PASSWORD, **env)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["services"]
    return found


def compose(*names: str, **env: str) -> "subprocess.CompletedProcess[str]":
    files = [part for name in ("compose", *names) for part in ("--file", ROOT / "docker" / f"{name}.yaml")]
    command = [needs("docker-compose"), *files, "config", "--format", "json"]
    bare = {
        name: value for name, value in os.environ.items() if name not in ("POSTGRES_PASSWORD", "PORT", "KEYS", "NAME")
    }
    return subprocess.run(command, env=bare | env, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return composed("replicas")


@pytest.fixture(scope="module")
def proxied() -> dict[str, Any]:
    return composed("proxy", NAME="diffusion.example", CERTIFICATES="/certificates")


def test_compose_waits_longer_than_a_drain_takes(services: dict[str, Any]) -> None:
    server = services["tminus"]
    stop_s = float(server["stop_grace_period"].removesuffix("s"))
    assert stop_s >= float(server["environment"]["TMINUS_GRACE_S"]) + ANSWER_S


def test_the_database_asks_for_the_password_that_the_servers_have_whatever_is_in_it(services: dict[str, Any]) -> None:
    servers, database = services["tminus"]["environment"], services["postgres"]["environment"]
    escaped = PASSWORD.replace("$", "$$")  # as compose prints it
    assert servers["PGPASSWORD"] == database["POSTGRES_PASSWORD"] == escaped
    assert servers["TMINUS_JOB_STORE"] == f"postgresql://{database['POSTGRES_USER']}@postgres/tminus"
    refused = compose("replicas")
    assert refused.returncode != 0
    assert "POSTGRES_PASSWORD" in refused.stderr


def test_the_proxy_lives_as_long_as_the_servers_may_take_to_answer_and_nobody_comes_but_by_it(
    services: dict[str, Any], proxied: dict[str, Any]
) -> None:
    for found in (services, proxied):
        proxy, server = found["proxy"], found["tminus"]
        assert proxy["stop_grace_period"] == server["stop_grace_period"]
        assert server["environment"]["FORWARDED_ALLOW_IPS"] == "*"
        assert "ports" not in server, "since it takes every address for a proxy's"


@pytest.mark.parametrize("files", [(), ("proxy",), ("replicas",), ("keys", "replicas")], ids="-".join)
def test_a_server_is_known_by_the_names_by_which_prometheus_asks(files: tuple[str, ...], tmp_path: Path) -> None:
    found = composed(*files, NAME="diffusion.example", CERTIFICATES="/certificates", KEYS=str(tmp_path))
    known = Settings(allowed_hosts=found["tminus"]["environment"]["TMINUS_ALLOWED_HOSTS"]).allowed_sites()
    (config,) = [each for each in found["prometheus"]["command"] if each.startswith("--config.file=")]
    asked = re.findall(r'"([\w-]+:\d+)"', (ROOT / "docker" / "prometheus" / Path(config).name).read_text())
    assert asked
    for host in asked:
        known.check_host(host)
    assert ("diffusion.example" in known.hosts) == bool({"proxy", "replicas"} & {*files})
