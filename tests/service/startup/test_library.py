"""Which models may be loaded, and what they are called."""

from pathlib import Path

import pytest

from tminus.service.startup.library import NAME, Library, name_of


def test_the_folders_of_a_folder_are_models_of_their_names_as_they_are_now(tmp_path: Path) -> None:
    library = Library({"given": Path("elsewhere")}, tmp_path)
    for name in ("b", "a", ".hidden", "with space", "x" * 65):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    assert list(library.folders().items()) == [
        ("given", Path("elsewhere")), ("a", tmp_path / "a"), ("b", tmp_path / "b")
    ]  # fmt: skip
    (tmp_path / "c").mkdir()
    assert "c" in library.folders()


def test_a_name_that_was_given_is_not_taken_from_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert Library({"a": Path("elsewhere")}, tmp_path).folders() == {"a": Path("elsewhere")}


def test_a_folder_that_is_gone_has_no_models(tmp_path: Path) -> None:
    assert Library({}, tmp_path / "gone").folders() == {}


def test_an_entry_that_cannot_be_read_hides_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("x" * 300)  # no file has so long a name: to look there is an error
    assert Library({}, tmp_path).folders() == {"a": tmp_path / "a"}
    assert "b in the folder of models cannot be read" in caplog.text


@pytest.mark.parametrize("name", ["a", "A-b_c.9", "9", "x" * 64])
def test_these_are_names(name: str) -> None:
    assert NAME.fullmatch(name)
    assert name_of(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "-a", ".a", "a/b", "a\\b", "a b", "\u00e9", "a\n", "x" * 65, "%2e"])
def test_these_are_none(name: str) -> None:
    assert not NAME.fullmatch(name)
    assert NAME.fullmatch(name_of(name))
