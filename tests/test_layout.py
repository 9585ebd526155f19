"""tests/ mirrors the tree: what tests service/work.py is in tests/service/test_work.py."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = sorted(file for part in ("model", "service") for file in (ROOT / "tests" / part).glob("**/test_*.py"))
# Tests of no one module, and why.
OF_NO_MODULE = {
    "model/formats/test_terrain.py": "converts a network that strangers trained",
    "service/test_imports.py": "holds every module to the layers",
}
# These modules of the client are written twice, in _async/ and in _sync/; each test runs with both.
TWICE = ("client", "connection", "job", "watching")


def modules_of(test: Path) -> list[Path]:
    """The modules that a file of tests is for, by its place and name."""
    place = ROOT / test.relative_to(ROOT / "tests").parent
    name = test.stem.removeprefix("test_")
    if place == ROOT / "service" / "client" and name in TWICE:
        return [place / each / f"{name}.py" for each in ("_async", "_sync")]
    return [place / f"{name}.py"]


def name_of(test: Path) -> str:
    return test.relative_to(ROOT / "tests").as_posix()


@pytest.mark.parametrize("test", [test for test in TESTS if name_of(test) not in OF_NO_MODULE], ids=name_of)
def test_tests_stand_where_the_module_they_test_stands(test: Path) -> None:
    assert not [module for module in modules_of(test) if not module.exists()]


def test_the_exceptions_exist_and_are_exceptions() -> None:
    for name in OF_NO_MODULE:
        test = ROOT / "tests" / name
        assert test.exists()
        assert not any(module.exists() for module in modules_of(test))
