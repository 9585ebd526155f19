"""The files bench/results/NAME.json: how each was made, and its figures. All figures in the pages come from them.

A file is `{"made": {...}, KEY: ...}`. A measured number is `{"value": ..., "rounds": [...]}`, or a plain number where
it was measured once.
"""

import ast
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
TRIALS = ROOT / "build" / "bench"  # of quick runs
# The code that decides how fast tminus is and which images it makes, and what a benchmark starts beside itself.
CODE = ("model", "service/engine", "service/scheduling", "service/worker", "bench/peers", "bench/bare.py")
BUSY_SHARE = 0.05  # of the cores, taken by other programs: above it a machine is not idle
WATCH_S, MOST_WATCHES = 3.0, 10  # how long, and how often, the machine is watched before a run
MOST_ROUNDS = 8  # that a file keeps of one figure


@dataclass(slots=True)
class Begun:
    """A run that is under way: what was true of the machine before it."""

    load_average: float = field(default_factory=lambda: os.getloadavg()[0])
    busy_share: float = 0.0  # of the cores, taken by other programs in the seconds before
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))
    began_s: float = field(default_factory=time.monotonic)
    commit: str = ""
    clean: bool = False
    code: dict[str, str] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        """Whether the machine did nothing else when the run began."""
        return self.busy_share < BUSY_SHARE

    def made(self, machine: Mapping[str, Any], *, quick: bool = False, timed: bool = True) -> dict[str, Any]:
        """Say how the results were made. timed: whether a busy machine changes them."""
        return {
            "command": command(),
            "date": self.date,
            "seconds": round(time.monotonic() - self.began_s),
            "commit": self.commit,
            "clean": self.clean,
            "quick": quick,
            "timed": timed,
            "load_average": round(self.load_average, 2),
            "busy_share": round(self.busy_share, 3),
            "idle": self.idle,
            "machine": dict(machine),
            "code": self.code,
        }


def begin(*, wait: bool = True, code: Sequence[str] = CODE) -> Begun:
    """Begin a run.

    wait: watch the machine, up to half a minute, until other programs leave it alone. code: the folders and files that
    decide the figures, beside the modules of bench/ that this process has loaded.
    """
    begun = Begun()
    commit_now = git("describe", "--always", "--abbrev=10", "--exclude=*")
    # New result files are no change of what is measured.
    begun.commit = commit_now or "unknown"
    begun.clean = bool(commit_now) and not git("status", "--porcelain", "--", ":/", ":!/bench/results")
    begun.code = {path: digest(ROOT / path) for path in (*code, *loaded())}
    for _ in range(MOST_WATCHES if wait else 1):
        begun.busy_share = busy_share(WATCH_S if wait else WATCH_S / 10)
        if begun.idle:
            break
    if wait and not begun.idle:
        say(
            f"The machine is not idle: other programs take {begun.busy_share:.0%} of the cores. The file will say so, "
            "and no page will show its figures."
        )
    begun.began_s = time.monotonic()
    return begun


def busy_share(seconds: float) -> float:
    """Watch which share of the cores is in use while this process sleeps; 0 where the system does not tell."""
    try:
        before = _ticks()
        time.sleep(seconds)
        after = _ticks()
    except (OSError, ValueError):
        return 0.0
    total = sum(after) - sum(before)
    idle = sum(after[3:5]) - sum(before[3:5])  # idle, and waiting for a disk
    return max(0.0, 1 - idle / total) if total else 0.0


def write(name: str, made: Mapping[str, Any], figures: Mapping[str, Any], folder: Path | str | None = None) -> Path:
    """Write a file of results: into bench/results/, or into build/bench/ after a quick run."""
    folder = Path(folder or (TRIALS if made["quick"] else RESULTS))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps({"made": dict(made), **rounded(figures)}, indent=1) + "\n", "utf-8")
    say(f"written to {file}")
    return file


def say(text: str) -> None:
    """Tell progress on stderr: results go to stdout."""
    print(text, file=sys.stderr, flush=True)


def rounds(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Summarise one figure: the median, and the value of each round. None where there is no value."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    if len(found) == 1:
        return {"value": found[0]}
    return {"value": median(found), "rounds": found[:MOST_ROUNDS]}


def ratio(top: Sequence[float], bottom: Sequence[float]) -> dict[str, Any] | None:
    """Divide the medians; the rounds are divided one by one. None where there is nothing to divide by."""
    if not top or not all(bottom) or not bottom:
        return None
    each = [a / b for a, b in zip(top, bottom, strict=False)]
    found: dict[str, Any] = {"value": median(top) / median(bottom)}
    return found | ({"rounds": each[:MOST_ROUNDS]} if len(each) > 1 else {})


def rounded(value: Any) -> Any:
    """Keep four digits of each number, and leave out what was not measured."""
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items() if each is not None}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def command() -> str:
    """Return the command line of this process, as one types it."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec is not None else Path(sys.argv[0]).name
    return " ".join(["python -m", name, *sys.argv[1:]])


def git(*arguments: str) -> str:
    """Run git in this repository; empty where that fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def changed(made: Mapping[str, Any]) -> list[str]:
    """List the code that is not as it was when the figures were made; all of bench/ if its modules are not named."""
    code: Mapping[str, str] = made.get("code", {})
    unnamed = [] if any(path.startswith("bench/") for path in code) else ["bench"]
    return [path for path, was in code.items() if was != digest(ROOT / path)] + unnamed


def loaded() -> list[str]:
    """List the modules of bench/ that this process has loaded, as paths."""
    files = {Path(file) for module in [*sys.modules.values()] if (file := getattr(module, "__file__", None))}
    return sorted(file.relative_to(ROOT).as_posix() for file in files if file.is_relative_to(ROOT / "bench"))


@cache
def digest(path: Path) -> str:
    """Hash the code of a file or a folder. Comments, docstrings and layout do not count."""
    found = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
        found.update(file.relative_to(path).as_posix().encode())
        _add(found, ast.parse(file.read_bytes()))
    return found.hexdigest()[:12]


def _add(digest: Any, node: Any) -> None:
    """Add a syntax tree without its docstrings. What is empty is skipped, as Pythons differ in what they leave out."""
    if isinstance(node, ast.AST):
        digest.update(type(node).__name__.encode())
        for name, value in ast.iter_fields(node):
            if value in (None, []) and not isinstance(node, ast.Constant):
                continue
            digest.update(name.encode())
            _add(digest, value[1:] if name == "body" and _is_documented(node) else value)
    elif isinstance(node, list):
        for each in node:
            _add(digest, each)
    else:
        digest.update(repr(node).encode())


def _is_documented(node: ast.AST) -> bool:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return ast.get_docstring(node, clean=False) is not None
    return False


def _ticks() -> list[int]:
    with Path("/proc/stat").open(encoding="ascii") as file:
        return [int(each) for each in file.readline().split()[1:9]]
