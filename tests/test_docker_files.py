"""What the container files say of the server, held against the server's own settings."""

import re
import subprocess
import sys
from pathlib import Path

from tminus.service.server import ANSWER_S
from tminus.service.settings import Settings

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = (ROOT / "docker" / "compose.yaml").read_text()
OVERRIDES = "".join((ROOT / "docker" / f"{name}.yaml").read_text() for name in ("gpu", "keys"))


def test_every_tminus_variable_is_a_setting() -> None:
    known = {f"TMINUS_{name.upper()}" for name in Settings.model_fields}
    used = set(re.findall(r"TMINUS_[A-Z_]+", DOCKERFILE + COMPOSE + OVERRIDES))
    assert used
    assert used <= known


def test_the_image_serves_the_bundled_checkpoint_and_no_other_goes_to_the_builder() -> None:
    ((_, bundled),) = Settings().checkpoints()
    default = f"checkpoints/{bundled.name}"
    assert "TMINUS_CHECKPOINT" not in DOCKERFILE, "it comes with the package"
    rules = (ROOT / ".dockerignore").read_text().split()
    assert [rule for rule in rules if rule.startswith("!checkpoints")] == [f"!{default}"]


def test_the_builder_gets_nothing_that_is_not_named() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert not allowed & {".git", ".venv", "runs", "tests", "bench"}


def test_compose_waits_longer_than_a_drain_takes() -> None:
    stop_s = int(re.search(r"stop_grace_period: (\d+)s", COMPOSE)[1])  # type: ignore[index]
    grace_s = float(re.search(r'TMINUS_GRACE_S: "(\d+)"', COMPOSE)[1])  # type: ignore[index]
    assert stop_s >= grace_s + ANSWER_S


def test_each_image_runs_as_a_numbered_user_that_is_not_root() -> None:
    for target in ("cpu", "cuda"):
        final = DOCKERFILE.partition(f"FROM base AS {target}\n")[2].partition("\nFROM ")[0]
        assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", final.strip().splitlines()[-1]), "after all that needs root"


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_a_build_without_a_target_is_that_for_the_cpu() -> None:
    assert re.findall(r"^FROM .* AS (\w+)$", DOCKERFILE, re.MULTILINE)[-2:] == ["cuda", "cpu"]


def test_the_server_gets_the_signals_itself() -> None:
    final = DOCKERFILE.partition(" AS base\n")[2].partition("\nFROM ")[0]
    assert re.search(r'^ENTRYPOINT \["tminus"\]$', final, re.MULTILINE)
    assert re.search(r'^CMD \["serve"\]$', final, re.MULTILINE)
