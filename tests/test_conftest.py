"""What the suite does when tests fail, or cannot be run: it ends, leaves no process, and says what to install."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import ROOT

pytestmark = pytest.mark.slow

A_SERVER_IS_LEFT = """
import os, signal, subprocess, threading
from tests.e2e.forked import Forked

def test_that_fails_while_its_server_runs():
    server = Forked(["serve"], os.environ, prepare=signal.pause)
    threading.Thread(target=server.output.read).start()
    subprocess.run("setsid sleep 600 &", shell=True, check=True)
    raise AssertionError("failed as it should")
"""
A_THREAD_WAITS = """
import threading
from tests import conftest

conftest.END_S = 0.5

def test_that_fails_while_its_thread_waits():
    threading.Thread(target=threading.Event().wait).start()
    raise AssertionError("failed as it should")
"""

TOOLS_ARE_MISSING = """
from tests import tools

tools.PLACES |= dict.fromkeys(("curl", "kubectl"), ("/no/such/file",))

def test_that_needs_curl():
    tools.needs("curl")

def test_that_needs_kubectl():
    tools.needs("kubectl")

def test_that_needs_curl_too():
    tools.needs("curl")
"""


def run_tests(folder: Path, text: str, *flags: str, **more: str) -> "subprocess.CompletedProcess[str]":
    """Run a file of tests as the suite is run, until nobody holds its output. No process of it may live then."""
    (folder / "test_it.py").write_text(text)
    mark = uuid.uuid4().hex
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "--rootdir", folder]
    done = subprocess.run(
        [*command, *flags, folder / "test_it.py"],
        cwd=ROOT, env=env | more | {"MARK_OF_THIS_TEST": mark}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    alive = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MARK_OF_THIS_TEST") == mark:
                alive.append(process)
        except psutil.Error:  # another user's, or it has just ended
            pass
    assert alive == []
    return done


@pytest.mark.parametrize("flags", [(), ("-n", "1")])
def test_a_run_ends_though_a_test_has_left_a_server_and_takes_it_along(tmp_path: Path, flags: tuple[str, ...]) -> None:
    done = run_tests(tmp_path, A_SERVER_IS_LEFT, *flags)
    assert done.returncode == 1
    assert "failed as it should" in done.stdout
    assert "Timeout" not in done.stderr


def test_a_run_ends_though_a_thread_waits_for_ever_and_says_where(tmp_path: Path) -> None:
    done = run_tests(tmp_path, A_THREAD_WAITS)
    assert done.returncode == 1
    assert "failed as it should" in done.stdout
    assert "threading.py" in done.stderr.partition("Timeout")[2]


def test_what_is_not_installed_skips_its_tests_and_is_named_once(tmp_path: Path) -> None:
    done = run_tests(tmp_path, TOOLS_ARE_MISSING, CI="")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("apt-get install curl kubectl") == 1
    assert "tests skipped for want of tools: 3; apt-get install curl kubectl" in done.stdout.splitlines()


def test_in_ci_what_is_not_installed_fails_its_tests(tmp_path: Path) -> None:
    done = run_tests(tmp_path, TOOLS_ARE_MISSING, CI="true")
    assert done.returncode == 1, done.stdout
    assert done.stdout.count("curl is missing: apt-get install curl") >= 2
    assert "3 failed" in done.stdout
