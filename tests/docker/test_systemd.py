"""docker/systemd, held against the server's settings and what systemd itself says."""

import re
import subprocess
import tomllib
from pathlib import Path

from tests.tools import needs
from tminus.service.startup.server import ANSWER_S
from tminus.service.startup.settings import Settings

FOLDER = Path(__file__).parents[2] / "docker" / "systemd"
UNIT = (FOLDER / "tminus.service").read_text("utf-8")
GIVEN = tomllib.loads((FOLDER / "tminus.toml").read_text("utf-8"))


def test_every_setting_that_the_files_name_is_one() -> None:
    named = {name.lower() for name in re.findall(r"^Environment=TMINUS_(\w+)=", UNIT, re.MULTILINE)}
    assert named
    assert named | {name.replace("-", "_") for name in GIVEN} <= Settings.model_fields.keys()


def test_it_may_stop_for_longer_than_a_drain_takes() -> None:
    (stop_s,) = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)
    assert int(stop_s) > Settings.model_fields["grace_s"].default + ANSWER_S


def test_folders_that_systemd_makes_are_those_of_the_server() -> None:
    for kind, parent, name in (
        ("StateDirectory", "/var/lib", "STATE_DIR"),
        ("CacheDirectory", "/var/cache", "CACHE_DIR"),
    ):
        (folder,) = re.findall(rf"^{kind}=(\w+)$", UNIT, re.MULTILINE)
        assert f"Environment=TMINUS_{name}={parent}/{folder}\n" in UNIT


def test_the_timer_asks_at_the_port_of_the_metrics() -> None:
    alive = (FOLDER / "tminus-alive.service").read_text("utf-8")
    assert f"http://127.0.0.1:{GIVEN['metrics-port']}/healthz" in alive


def test_systemd_finds_no_fault(tmp_path: Path) -> None:
    analyze = needs("systemd")
    program = tmp_path / "tminus"
    program.touch(mode=0o755)
    for file in FOLDER.iterdir():
        (tmp_path / file.name).write_text(file.read_text("utf-8").replace("/opt/tminus/bin/tminus", str(program)))
    units = [str(path) for path in sorted(tmp_path.iterdir()) if path.suffix in (".service", ".timer")]
    done = subprocess.run([analyze, "verify", *units], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
