"""The files of a release: one version everywhere, and the archives that an installed tminus knows."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from tests import release
from tminus.model.archives import PINS


def test_the_archives_that_are_known_are_those_of_the_folders() -> None:
    known = json.loads(PINS.read_text("utf-8"))
    assert known == release.pins(release.packed()), "python -m tests.release writes checkpoints/archives.json anew"


def test_every_checkpoint_comes_with_the_wheel_or_can_be_fetched() -> None:
    folders = {path.parent.name for path in (release.ROOT / "checkpoints").glob("*/unet")}
    assert folders == {*release.ABOUT, "fashion-mnist-32"}


@pytest.mark.parametrize("place", release.PLACES)
def test_the_version_is_the_same_wherever_it_stands(place: str) -> None:
    assert release.named(release.version()).search((release.ROOT / place).read_text("utf-8"))


def test_the_citation_has_the_date_of_the_newest_entry_of_the_changelog() -> None:
    changelog, citation = ((release.ROOT / name).read_text("utf-8") for name in ("CHANGELOG.md", "CITATION.cff"))
    newest = re.search(r"^## \S+ - (\S+)$", changelog, re.MULTILINE)
    assert newest is not None
    assert f"\ndate-released: {newest[1]}\n" in citation


def test_another_version_is_named_in_every_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in release.PLACES:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text((release.ROOT / place).read_text("utf-8"))
    old = release.named(release.version())
    monkeypatch.setattr(release, "ROOT", tmp_path)
    release.rename("97.98.99")
    for place in release.PLACES:
        text = (tmp_path / place).read_text("utf-8")
        assert "97.98.99" in text
        assert not old.search(text)
    assert tomllib.loads((tmp_path / "pyproject.toml").read_text("utf-8"))["project"]["version"] == "97.98.99"


@pytest.mark.parametrize(
    ("text", "is_named"),
    [
        ("v1.0.0", True),
        ("1.0.0-cuda", True),
        ("1.0.0.", True),
        ("11.0.0", False),
        ("1.0.01", False),
        ("10.1.0.0/16", False),
    ],
)
def test_a_version_is_found_as_a_whole(text: str, is_named: bool) -> None:
    assert (release.named("1.0.0").search(text) is not None) == is_named
