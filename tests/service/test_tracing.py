"""Spans while traces are off, and what is told of an error. With OpenTelemetry: startup/test_traces.py."""

import asyncio
import subprocess
import sys
from pathlib import Path

from tminus.service.errors import DeadlinePassed, JobCancelled
from tminus.service.tracing import TRACER, note, traced, why

ROOT = Path(__file__).parents[2]


def test_while_traces_are_off_a_block_runs_and_nothing_else_happens() -> None:
    assert TRACER.get() is None
    with traced("store add", {}):
        note({"tminus.problem": "none"})


def test_an_error_is_known_by_its_code_or_type_and_a_clients_mistake_is_not_the_servers() -> None:
    assert why(JobCancelled("gone")) == ("cancelled", False)
    assert why(DeadlinePassed.of(1.0)) == ("deadline_passed", True)
    assert why(ValueError("a text that may be secret")) == ("ValueError", True)
    assert why(asyncio.CancelledError()) == ("CancelledError", False)


def test_a_server_without_traces_imports_no_sdk_of_opentelemetry() -> None:
    program = """
import sys
import tminus.service.startup.app, tminus.service.startup.server, tminus.service.startup.traces
import tminus.service.cli.serve
assert tminus.service.startup.traces.start_traces("1.2.3") is None
sys.exit(", ".join({"opentelemetry.sdk", "opentelemetry.exporter", "requests"} & sys.modules.keys()) or 0)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
