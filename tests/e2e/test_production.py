"""The commands of docs/production.md in order, as printed. Each of its machines is an address and a folder of this one.

Replaced are hosts, ports, paths and users, and what would change this machine: packages, systemd and containers.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests import postgres
from tests.documents import ROOT, code_blocks, run_shell
from tests.e2e.conftest import RunningServer, start_server, stop_server
from tests.e2e.nginx import nginx, write_configuration
from tests.postgres import free_port
from tests.receivers import make_certificate, receiver
from tests.service.fakes import wait_until
from tests.service.keys import bearer
from tests.test_monitoring import answers
from tests.tools import needs

pytestmark = pytest.mark.long

NAME, DATABASE, OWN, PROXY, CONTAINERS = "diffusion.example", "database.example", "own", "127.0.0.1", "containers"
SERVERS = ("127.0.0.11", "127.0.0.12", "127.0.0.13")
FOLDERS = ("tminus", "srv", "etc/systemd/system", "etc/nginx/conf.d", "etc/nginx/tminus", "etc/prometheus")
blocks = partial(code_blocks, "docs/production.md", "sh")
PROGRAMS = {
    # HOST:PATH is a path below the folder of the host.
    "scp": '#!/bin/sh\nshift $(($# - 2))\nexec cp -r $(echo "$@" | sed -E "s|([^ @]+@)?([^ @]+):|$MACHINES/\\2/|g")\n',
    "runuser": '#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n',
    **dict.fromkeys(("apt-get", "useradd", "git", "pip"), "#!/bin/sh\n"),
}


class Machines:
    """The machines of the page, and what runs on them."""

    def __init__(self, root: Path, checkpoint: Path, database: postgres.Postgres, closing: ExitStack) -> None:
        self.root, self._checkpoint, self._database, self._closing = root, checkpoint, database, closing
        self.ports = {port: str(free_port()) for port in ("443", "8000", "9090", "9093", "9100")}
        self.servers: dict[str, RunningServer] = {}
        self.of_nginx = f"include {root / PROXY}/etc/nginx/conf.d/*.conf;\n"
        write_configuration(root, self.of_nginx)
        for name, text in PROGRAMS.items():
            (root / name).write_text(text)
            (root / name).chmod(0o755)
        for machine in (OWN, DATABASE, PROXY, CONTAINERS, *SERVERS):
            for folder in FOLDERS:
                (root / machine / folder).mkdir(parents=True)
            (root / machine / "tminus" / "docker").symlink_to(ROOT / "docker")
        certificate = make_certificate(root, NAME)
        for folder in (root / PROXY / "etc" / "nginx" / "tminus", root / CONTAINERS / "tminus"):
            for file in ("fullchain.pem", "privkey.pem"):
                (folder / file).symlink_to(certificate)
        known = f'connect-to = "{NAME}:443:127.0.0.1:{self.ports["443"]}"\ncacert = "{certificate}"\n'
        (root / ".curlrc").write_text(known)
        self.environment = {"MACHINES": str(root), "CURL_HOME": str(root), "PATH": f"{root}:{os.environ['PATH']}"}
        self.environment |= {"PGHOST": "127.0.0.1", "PGPORT": str(database.port), "PGUSER": "postgres"}
        self._prepare_database(root / DATABASE / "etc", database.folder / "data")

    def _prepare_database(self, etc: Path, data: Path) -> None:
        """As Debian leaves it: with TLS, and for its own user."""
        pem = shutil.copy(make_certificate(self.root, "localhost"), data / "server.pem")
        pem.chmod(0o600)
        os.chown(pem, data.stat().st_uid, data.stat().st_gid)
        with (data / "postgresql.conf").open("a") as settings:
            settings.write("ssl = on\nssl_cert_file = 'server.pem'\nssl_key_file = 'server.pem'\n")
        (data / "pg_hba.conf").write_text("host all postgres 127.0.0.1/32 trust\n")
        for link, target in (("postgresql/17/main", data), ("ssl/certs/ssl-cert-snakeoil.pem", pem)):
            (etc / link).parent.mkdir(parents=True)
            (etc / link).symlink_to(target)

    def here(self, text: str, machine: str) -> str:
        """Commands or settings of the page, with hosts, ports, paths and users of this machine."""
        text = text.replace("10.0.0.0/24", "127.0.0.0/8").replace("10.0.0.10", PROXY).replace("10.0.0.", "127.0.0.")
        text = text.replace(f"@{DATABASE}/", f"@localhost:{self._database.port}/")
        text = text.replace("localhost:8000", f"{machine}:8000").replace("8443/443", "8443/127.0.0.1:443")
        for port, ours in self.ports.items():
            text = re.sub(rf"(?<=[:=])(?<!tminus:)( ?){port}\b", rf"\g<1>{ours}", text)
        text = re.sub(r"(?<![\w/.:])/(?=(etc|opt|srv|var)/)", f"{self.root / machine}/", text)
        return re.sub(r"^(install.*?)(?: -[og] \w+)+", r"\1", text, flags=re.MULTILINE)

    def run(self, block: str, machine: str, **env: str) -> str:
        """Run a block of the page; return what it printed."""
        code = re.sub(r"python3 -m venv (\S+)", r"install -D $MACHINES/pip \1/bin/pip", self.here(block, machine))
        code = code.replace("nginx -t", f"{needs('nginx-light')} -t -c {self.root}/nginx.conf -e {self.root}/errors")
        said = ""
        for part in re.split(r"^(systemctl .*)\n", code, flags=re.MULTILINE):
            if part.startswith("systemctl "):
                self.systemctl(part.removeprefix("systemctl "), machine)
            elif part:
                said += run_shell(part, self.root / machine / "tminus", **self.environment | env)
        return said

    def systemctl(self, words: str, machine: str) -> None:
        match words:
            case "restart postgresql":
                self._database.stop()
                self._database.start()
            case "enable --now tminus.service tminus-alive.timer" | "restart tminus":
                assert machine not in self.servers or stop_server(self.servers[machine]) == 0
                self.start(machine)
            case "kill --signal KILL tminus":
                self.servers[machine].process.send_signal(signal.SIGKILL)
                self.servers[machine].process.wait(30)
            case "reload nginx":
                self._closing.enter_context(nginx(self.root, self.of_nginx, self.client))
            case "restart prometheus prometheus-alertmanager":
                self._watch(self.root / machine / "etc" / "prometheus")
            case _:
                assert words == "daemon-reload"

    def start(self, machine: str) -> None:
        """Start a server by its unit."""
        etc = self.root / machine / "etc"
        settings = etc / "tminus" / "tminus.toml"
        settings.write_text(self.here(settings.read_text(), machine))
        unit = self.here((etc / "systemd" / "system" / "tminus.service").read_text(), machine)
        unit += re.sub("^", "Environment=", (etc / "tminus" / "secrets.env").read_text(), flags=re.MULTILINE)
        env = dict(re.findall(r"^Environment=(\w+)=(.*)$", unit.replace(f"/{OWN}/", f"/{machine}/"), re.MULTILINE))
        assert env.pop("TMINUS_HOST") == "0.0.0.0"
        flags = re.findall(r"^ExecStart=\S+ serve (.*)$", unit, re.MULTILINE)[0].split()
        flags += ["--host", machine, "--port", self.ports["8000"], "--job-lease-s", "2"]
        self.servers[machine] = start_server(self._checkpoint, *flags, **env)

    def _watch(self, etc: Path) -> None:
        """Start Prometheus and Alertmanager, and wait until the servers are seen."""
        manager = etc / "alertmanager.yml"
        manager.write_text(self.here(manager.read_text(), PROXY))
        for package, config, port, *flags in (
            ("prometheus", etc / "prometheus.yml", "9090", f"--storage.tsdb.path={etc}/data"),
            ("prometheus-alertmanager", manager, "9093", f"--storage.path={etc}/sent", "--cluster.listen-address="),
        ):
            flags += [f"--config.file={config}", f"--web.listen-address=127.0.0.1:{self.ports[port]}"]
            process = subprocess.Popen([needs(package), *flags], stderr=subprocess.DEVNULL)
            self._closing.enter_context(process)
            self._closing.callback(process.terminate)
        wait_until(lambda: len(answers(f"http://127.0.0.1:{self.ports['9090']}", "up == 1")) == len(SERVERS))

    def client(self, key: str = "") -> httpx.Client:
        url, headers = f"https://127.0.0.1:{self.ports['443']}", {"Host": NAME} | (bearer(key) if key else {})
        return httpx.Client(base_url=url, verify=False, headers=headers, timeout=60)


@pytest.fixture
def machines(small: Path, tmp_path: Path) -> Iterator[Machines]:
    with ExitStack() as closing:
        found = Machines(tmp_path, small, closing.enter_context(postgres.running("postgres")), closing)
        yield found
        for server in found.servers.values():
            stop_server(server)


def test_three_servers_are_set_up_watched_killed_restored_and_upgraded(machines: Machines) -> None:
    password = machines.run(*blocks(section="Database"), DATABASE).splitlines()[-1].removeprefix("PASSWORD=")
    studio, _ = machines.run(*blocks(section="Keys and settings"), OWN, PASSWORD=password).split()
    for server in SERVERS:
        machines.run(*blocks(section="Servers"), server)
    machines.run(*blocks(section="Proxy"), PROXY)
    (alerts,), (watch, submit, ask, kill, compare) = blocks(section="Alerts"), blocks(section="Trial")
    with receiver() as hooks:
        machines.run(alerts.replace("https://hooks.example", hooks.url), PROXY)
        assert machines.run(watch, PROXY).count("=> 1") == len(SERVERS)
        wait_until(lambda: bool(hooks.refused))  # the alert: it is no webhook of ours
    for running in machines.servers.values():
        running.slow_down()
    machines.run(submit, OWN, KEY=studio)
    wait_until(lambda: bool(machines.run(ask, DATABASE).strip()))
    (killed,) = re.findall(r"http://([\d.]+):", machines.run(ask, DATABASE))
    machines.run(kill, killed)
    lost = machines.servers.pop(killed)
    with machines.client(studio) as http:
        for _ in range(12):
            assert http.post("/sample", json={"steps": 2}).status_code == 200, "another server answers"
    for running in machines.servers.values():
        running.speed_up()
    machines.run(compare, OWN, AUTH=f"Authorization: Bearer {studio}")
    assert "".join(running.log for running in machines.servers.values()).count("goes on from step") == 1, lost.log
    machines.start(killed)  # as systemd does

    dump, restore = blocks(section="Backup and restore")
    folder = machines.root / OWN / "tminus"
    path = f"/jobs/{json.loads((folder / 'job.json').read_text())['id']}"
    machines.run(dump, DATABASE)
    with machines.client(studio) as http:
        assert http.delete(path).status_code == 204
        assert [stop_server(running) for running in machines.servers.values()] == [0, 0, 0]
        machines.run(restore, DATABASE)
        for server in SERVERS:
            machines.run(*blocks(section="Upgrade"), server)
        assert http.get(f"{path}/image").content == (folder / "survived.png").read_bytes()
        tried = [http.post("/jobs", json={"n": 64, "steps": 1000}) for _ in range(len(SERVERS) + 1)]
        assert {answer.json().get("code") for answer in tried} == {None, "quota_exceeded"}


def test_compose_is_given_what_its_users_can_read(machines: Machines) -> None:
    (code,) = blocks(section="With Compose")
    users = re.findall(r"install (?:-d )?-o (\d+) .*/srv/tminus/([\w-]+)", code)
    assert users == [("10001", "keys"), ("101", "certificates"), ("101", "certificates"), ("65534", "alert-url")]
    code = code.replace("docker compose", str(needs("docker-compose"))).replace(
        '"$@"', "config --format json > made.json"
    )
    key = rf"{sys.executable} -m tminus \2 --file \1/keys"
    machines.run(re.sub(r"docker run --rm -v (\S+):/keys tminus (.*) --file /keys/keys", key, code), CONTAINERS)
    services = json.loads((machines.root / CONTAINERS / "tminus" / "made.json").read_text())["services"]
    mounts = {each["target"]: Path(each["source"]) for one in services.values() for each in one.get("volumes", ())}
    assert (mounts["/keys"] / "keys").read_text().startswith("studio")
    assert {file.name for file in mounts["/certificates"].iterdir()} == {"fullchain.pem", "privkey.pem"}
    assert mounts["/etc/prometheus/alert-url"].read_text() == "https://hooks.example/tminus\n"
