"""Runs a real nginx by a configuration of docker/nginx."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONFIGURATIONS = Path(__file__).parents[2] / "docker" / "nginx"
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


@contextmanager
def nginx(folder: Path, servers: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run it with these lines of its http block. Its log is `errors` in the folder."""
    whole = f"pid {folder}/pid; daemon off; worker_processes 1;\nevents {{ worker_connections 4096; }}\n"
    whole += "http { access_log off;\n" + "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in TEMPORARY)
    (folder / "nginx.conf").write_text(f"{whole}{servers}}}\n")
    environment = os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin"}
    process = subprocess.Popen(
        ["nginx", "-c", str(folder / "nginx.conf"), "-e", str(folder / "errors")], env=environment
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)
