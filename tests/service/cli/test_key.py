"""`tminus key`: what it prints is what a server takes."""

import stat
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.service.cli import running
from tests.service.keys import access_of
from tminus.service.access.keys import Key, KeyLimits, KeyRing, digest_of
from tminus.service.cli.key import add

run = partial(running.run, "key")


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


def test_several_at_the_same_time_all_add_theirs(tmp_path: Path) -> None:
    file, names = tmp_path / "keys", [f"k{number}" for number in range(50)]

    def add_key(name: str) -> None:
        add(file, Key(name, "sample", digest_of(name), KeyLimits()), like_the_earlier=False)

    with ThreadPoolExecutor(8) as threads:
        [*threads.map(add_key, names)]
    assert sorted(key.name for key in KeyRing(file=file).keys) == sorted(names)


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    file, link = tmp_path / "real" / "keys", tmp_path / "keys"
    run("a", "--file", file)
    link.symlink_to(file)
    run("b", "--file", link)
    assert link.is_symlink()
    assert [key.name for key in KeyRing(file=file).keys] == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
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
