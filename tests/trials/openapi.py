"""Schemathesis over the whole OpenAPI document, with all its checks: every answer is one that the document allows.

The app runs on a fake engine, so that it is the edge that is tried, at thousands of requests a minute. Whoever asks has
a key of the role admin; a check of schemathesis looks that without it nothing is answered.
"""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from bench.servers import options_of
from tests.service.api import fuzz_checks
from tests.service.client.conftest import Served
from tests.service.conftest import INSTANT
from tests.service.fakes import INFO, LIMITS
from tests.service.keys import access_of, bearer, key_line

ROOT = Path(__file__).parents[2]
# A schema cannot say which parameters go together, so a valid request may be refused: see fuzz_checks.py.
SETTINGS = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "3xx", 404, 406, 409, 410, 422, 429]

# Nor that a text is the name of a class, or what a tensor holds; and other people's APIs have no 422.
[[operations]]
include-tag = ["hugging face", "kserve"]
parameters = { "path.model" = "fake", "path.version" = "abababababababab" }
checks.positive_data_acceptance.expected-statuses = ["2xx", "3xx", 400, 404, 406, 429]

[[operations]]
include-name-regex = "POST /v1/images/.*"
checks.positive_data_acceptance.expected-statuses = ["2xx", 400, 404, 429]

[[operations]]
include-name = "POST /login"
checks.positive_data_acceptance.expected-statuses = ["2xx", 401]
"""
EXAMPLES = 60  # with many more, schemathesis 4.32 now and then makes a body that it cannot send
KEY = "the-key-of-the-tests"
CHECKS = ["--checks", "all", "--suppress-health-check", "all"]


@dataclass
class Fuzzed:
    """What came of it."""

    passed: bool
    output: str
    operations: int  # of the document
    cases: int  # requests that were made


def trial(examples: int, seed: int = 1) -> Fuzzed:
    """Make about so many requests of each kind to each operation."""
    program = Path(sys.executable).with_name("st")
    limits = replace(LIMITS, max_jobs=1000, max_body_bytes=2**20)
    access = access_of(key_line("ops", KEY, "admin"))
    with (
        tempfile.TemporaryDirectory() as folder,
        Served(INFO, limits, INSTANT, access=access).running() as served,
    ):
        (Path(folder) / "fuzz.toml").write_text(SETTINGS)
        command = [program, "--config-file", "fuzz.toml", "run", *CHECKS]
        command += ["--header", f"Authorization: Bearer {KEY}", "--no-color"]
        command += ["--max-examples", str(examples), "--seed", str(seed), f"{served.url}/openapi.json"]
        environment = os.environ | {"SCHEMATHESIS_HOOKS": fuzz_checks.__name__, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
        described = httpx.get(f"{served.url}/openapi.json", headers=bearer(KEY)).json()["paths"]
    cases = re.search(r"(\d+) generated", done.stdout)
    operations = sum(map(len, described.values()))
    return Fuzzed(done.returncode == 0, done.stdout + done.stderr, operations, int(cases[1]) if cases else 0)


if __name__ == "__main__":
    asked = options_of(__doc__, cases=10_000, seed=1)
    cases, seed, found = 0, asked.seed, trial(EXAMPLES, asked.seed)
    while (cases := cases + found.cases) < asked.cases and found.passed:
        seed += 1
        found = trial(EXAMPLES, seed)
    print(found.output if not found.passed else f"{cases} requests to {found.operations} operations")
    sys.exit(not found.passed)
