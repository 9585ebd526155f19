"""Runs a real nginx by a configuration of docker/nginx."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.tools import needs

CONFIGURATIONS = Path(__file__).parents[2] / "docker" / "nginx"
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


@contextmanager
def nginx(folder: Path, servers: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run it with these lines of its http block. Its log is `errors` in the folder."""
    whole = f"pid {folder}/pid; daemon off; worker_processes 1;\nevents {{ worker_connections 4096; }}\n"
    whole += "http { access_log off;\n" + "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in TEMPORARY)
    (folder / "nginx.conf").write_text(f"{whole}{servers}}}\n")
    process = subprocess.Popen([needs("nginx-light"), "-c", folder / "nginx.conf", "-e", folder / "errors"])
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)
