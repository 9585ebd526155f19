"""The programs and data that tests need beyond pip, by Debian's package, and where each is found.

A test that needs one which is missing is skipped, and the end of the run says what to install. With CI=true it fails.
Run as a program this prints the packages that are missing; `.ci/run` installs them.
"""

import os
import shutil
from pathlib import Path

# Names are looked up in the path, and where Debian has daemons; others are patterns of files.
PLACES = {
    "chromium": ("chromium", "chromium-browser", "google-chrome"),
    "curl": ("curl",),
    "dataset-fashion-mnist": ("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz",),
    "docker-compose": ("docker-compose",),
    "kubectl": ("kubectl",),
    "libfaketime": ("/usr/lib/*/faketime/libfaketime.so.1",),
    "nginx-light": ("nginx",),
    "npm": ("npm",),  # and with it node
    "openssl": ("openssl",),
    "postgresql": ("initdb", "/usr/lib/postgresql/*/bin/initdb"),
    "prometheus": ("prometheus",),  # and with it promtool
    "prometheus-alertmanager": ("prometheus-alertmanager",),  # and with it amtool
    "sqlite3": ("sqlite3",),
    "systemd": ("systemd-analyze",),
}
MISSING = " is missing: apt-get install "


def find(package: str) -> Path | None:
    """Return what tests use of a package; None if it is not installed."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"
    for place in PLACES[package]:
        files = sorted(Path("/").glob(place[1:])) if place.startswith("/") else [shutil.which(place, path=path)]
        if files and files[-1] is not None:
            return Path(files[-1])
    return None


def needs(package: str) -> Path:
    """Return what a test uses of a package, or skip the test; in CI, fail it."""
    import pytest  # .ci/run asks for packages before there is a pytest

    found = find(package)
    if found is None and os.environ.get("CI") == "true":
        pytest.fail(f"{package}{MISSING}{package}", pytrace=False)
    if found is None:
        pytest.skip(f"{package}{MISSING}{package}")
    return found


if __name__ == "__main__":
    for name in PLACES:
        if find(name) is None:
            print(name)
