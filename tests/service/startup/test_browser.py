"""A browser is opened where there is one, and the log says where there is none. In processes, whose screens differ."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
URL = "http://localhost:8000"
PROGRAM = f"""
import logging
from tminus.service.startup.serve import open_page
logging.basicConfig(format="%(message)s")
open_page({URL!r})
"""


@pytest.mark.parametrize(
    ("screen", "says"),
    [
        ({}, f"--open-browser: there is no display here; open {URL} yourself\n"),
        ({"DISPLAY": ":9"}, f"--open-browser: no browser could be opened; open {URL} yourself\n"),
        ({"WAYLAND_DISPLAY": "wayland-9"}, f"--open-browser: no browser could be opened; open {URL} yourself\n"),
        ({"BROWSER": "./browser"}, ""),
        ({"BROWSER": "./browser", "DISPLAY": ":9"}, ""),
    ],
)
def test_what_is_opened_and_said(screen: dict[str, str], says: str, tmp_path: Path) -> None:
    browser = tmp_path / "browser"
    browser.write_text('#!/bin/sh\necho "$*" >opened\n')
    browser.chmod(0o755)
    env = {"PATH": str(tmp_path / "nothing"), "PYTHONPATH": str(ROOT)} | screen
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == says
    opened = tmp_path / "opened"
    assert (opened.read_text() if opened.exists() else "") == f"{URL}\n" * (not says)
