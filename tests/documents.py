"""The blocks of code of README.md and docs/, and how tests run them as printed, against a server of theirs."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.tools import needs

ROOT = Path(__file__).parents[1]
PROGRAMS = {"python": sys.executable, "tminus": f"{sys.executable} -m tminus"}
PACKAGES = {"curl ": "curl", "openssl ": "openssl", "--data fashion-mnist": "dataset-fashion-mnist"}


def code_blocks(page: str | Path, *languages: str, section: str = "") -> list[str]:
    """Return the blocks of a page in these languages, or in any; of one section, where it is named."""
    text = (ROOT / page).read_text("utf-8")
    if section:
        text = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    found = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [code for language, code in found if language in languages or not languages]


def shell_commands(page: str | Path) -> list[str]:
    """Return the commands of a page's shell blocks, each as one line without its comment."""
    lines = "".join(code_blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := re.sub(r"(^| )# .*", "", line).strip())]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page as GitHub makes them: of its headings, and those that are written as HTML."""
    text = re.sub(r"^ *(```+).*?^ *\1$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for title in re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE):
        shown = re.sub(r"<[^>]*>|\]\([^)]*\)", "", title).strip()
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        names = itertools.chain([slug], (f"{slug}-{k}" for k in itertools.count(1)))  # of headings that are alike
        found.add(next(name for name in names if name not in found))
    return found | {*re.findall(r'<a (?:id|name)="([^"]+)"', text)}


def run_shell(code: str, folder: Path, url: str = "", **env: str) -> str:
    """Run commands in a folder; return what they printed."""
    code = re.sub(r"(?<!/)\.venv/bin/(python|tminus)", lambda found: PROGRAMS[found[1]], code)
    code = re.sub(r"^curl ", "curl -sS --fail-with-body ", code, flags=re.MULTILINE)
    for said, package in PACKAGES.items():
        if said in code:
            needs(package)
    return _run(["bash", "-euo", "pipefail", "-c", code], folder, url, env)


def run_python(code: str, folder: Path, url: str = "", **env: str) -> str:
    """Run a program in a folder; return what it printed."""
    return _run([sys.executable, "-c", code], folder, url, env)


def _run(command: list[str], folder: Path, url: str, more: dict[str, str]) -> str:
    command[-1] = command[-1].replace("localhost:8000", url.removeprefix("http://"))
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'client'}", "HF_TOKEN": ""} | more
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}{done.stderr}"
    return done.stdout
