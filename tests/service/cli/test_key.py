"""`tminus key`: what it prints is what a server takes."""

import stat
from pathlib import Path

import click.testing
import pytest

from tests.service.keys import access_of
from tminus.service.access.keyring import KeyRing
from tminus.service.access.keys import KeyLimits
from tminus.service.cli.main import main


def run(*arguments: str | Path) -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, ["key", *map(str, arguments)])


def test_a_secret_and_its_line_are_printed() -> None:
    secret, line = run(
        "studio", "--row-steps-per-minute", "600", "--jobs", "3", "--connections", "5"
    ).stdout.splitlines()
    caller = access_of(line).with_secret(secret)
    assert (caller.name, caller.role, caller.limits) == ("studio", "sample", KeyLimits(600, 3, 5))
    assert secret not in line


def test_the_line_is_added_to_a_file_that_others_cannot_read(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    secrets = [
        run(name, "--role", role, "--file", file).stdout.strip() for name, role in (("a", "sample"), ("b", "admin"))
    ]
    file.write_text(file.read_text() + "# without a line end")
    secrets.append(run("a", "--file", file).stdout.strip())
    ring = KeyRing(file=file)
    found = [ring.find(secret) for secret in secrets]
    assert [(key.name, key.role) for key in found if key] == [("a", "sample"), ("b", "admin"), ("a", "sample")]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]
    file.chmod(0o640)
    run("c", "--file", file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640, "as its owner wants it"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a/b",), "NAME must be"),
        (("",), "NAME must be"),
        (("a", "--role", "root"), "'root' is not one of"),
        (("a", "--jobs", "0"), "0 is not in the range"),
        (("a", "--file", "/nowhere/keys"), "/nowhere/keys: No such file"),
        (("a", "--jobs", "2", "--file", "keys"), "two lines of a differ"),
        (("a", "--file", "broken"), "line 1"),
    ],
)
def test_what_is_wrong_is_one_clear_line_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run("a", "--file", "keys")
    Path("broken").write_text("no key")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert said in result.stderr
    assert "tm_" not in result.output
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
