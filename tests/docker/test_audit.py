"""The audit, against a database of vulnerabilities that listens here: pip-audit asks it over HTTP as it asks OSV."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.long

VULNERABILITY = {
    "id": "PYSEC-2026-1",
    "aliases": ["CVE-2026-1"],
    "summary": "It answers whatever it is asked.",
    "affected": [
        {
            "package": {"name": "idna", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.1"}]}],
        }
    ],
}


class Database(BaseHTTPRequestHandler):
    """Knows of one package, or of none."""

    vulnerable: str | None = None
    status = 200

    def do_POST(self) -> None:
        asked: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = asked["package"]["name"] == self.vulnerable
        body = json.dumps({"vulns": [VULNERABILITY]} if known else {}).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def database(**fields: object) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Known", (Database,), fields))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def audit(tmp_path: Path, url: str, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, ROOT / "docker" / "audit.py", "--osv-url", url, "--cache-dir", tmp_path, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_packages_without_known_vulnerabilities_are_counted(tmp_path: Path) -> None:
    with database() as url:
        done = audit(tmp_path, url)
    assert done.returncode == 0, done.stderr
    assert "NOT AUDITED" not in done.stdout
    count, _, rest = done.stdout.partition(" ")
    assert rest == "packages audited, no vulnerability is known\n"
    names = set()
    for lock in ("requirements", "torch-cuda", "sbom"):
        lines = (ROOT / "docker" / "locks" / f"{lock}.txt").read_text("utf-8").splitlines()
        names |= {line.partition("==")[0] for line in lines if line[0] not in "# "}
    assert int(count) == len(names)


def test_a_vulnerability_is_named_and_fails_the_build(tmp_path: Path) -> None:
    with database(vulnerable="idna") as url:
        done = audit(tmp_path, url)
    assert done.returncode == 1, done.stderr
    assert "PYSEC-2026-1, CVE-2026-1; fixed in 99.1\n" in done.stdout
    assert "vulnerabilities are known" in done.stdout


def test_a_vulnerability_that_does_not_concern_us_is_passed_over(tmp_path: Path) -> None:
    with database(vulnerable="idna") as url:
        done = audit(tmp_path, url, "--ignore-vuln", "CVE-2026-1")
    assert done.returncode == 0, done.stderr
    assert "no vulnerability is known" in done.stdout


def test_a_database_that_is_out_of_order_or_of_reach_is_told_and_fails_nothing(tmp_path: Path) -> None:
    with database(status=503) as url:
        out_of_order = audit(tmp_path, url)
    out_of_reach = audit(tmp_path, url)  # nobody listens there any more
    for done in (out_of_order, out_of_reach):
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("NOT AUDITED: the database of vulnerabilities could not be reached")


def test_an_audit_that_fails_for_another_reason_fails_the_build(tmp_path: Path) -> None:
    with database() as url:
        done = audit(tmp_path, url, "--requirement", "no-such-file")
    assert done.returncode == 2
    assert "no-such" in done.stderr
