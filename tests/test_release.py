"""The files of a release: those that an installed tminus knows are those that would be made of the folders today."""

import json

from tests import release
from tminus.model.archives import PINS


def test_the_archives_that_are_known_are_those_of_the_folders() -> None:
    known = json.loads(PINS.read_text("utf-8"))
    assert known == release.pins(release.packed()), "python -m tests.release writes checkpoints/archives.json anew"


def test_every_checkpoint_comes_with_the_wheel_or_can_be_fetched() -> None:
    folders = {path.parent.name for path in (release.ROOT / "checkpoints").glob("*/unet")}
    assert folders == {*release.ABOUT, "fashion-mnist-32"}
