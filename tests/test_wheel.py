"""What is installed from a wheel: one name, and all that it needs to serve something."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("tminus", "service", "model", "checkpoints", "pyproject.toml", "README.md", "LICENSE")

PROGRAM = """
from pathlib import Path
import tminus
from tminus.model.checkpoint import load_checkpoint
from tminus.service.api.page import FOLDER
from tminus.service.settings import Settings
assert Path(tminus.__file__).parents[1] == Path.cwd(), tminus.__file__
((_, checkpoint),) = Settings().checkpoints()
assert checkpoint.is_relative_to(Path.cwd()), checkpoint
print(load_checkpoint(checkpoint).name, (FOLDER / "index.html").is_file())
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel brings. It is built from a copy, as building leaves files where it works."""
    folder = tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(
                source, folder / "source" / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(source, folder / "source" / part)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    done = subprocess.run([*build, str(folder / "source")], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_it_takes_one_name(installed: Path) -> None:
    names = {path.name for path in installed.iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"tminus"}
    assert (installed / "tminus" / "py.typed").is_file()


def test_every_module_is_in_it(installed: Path) -> None:
    for part in ("service", "model"):
        ours, theirs = (
            {file.relative_to(folder) for file in folder.glob("**/*.py")}
            for folder in (ROOT / part, installed / "tminus" / part)
        )
        assert theirs == ours


def test_it_has_something_to_serve(installed: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=installed, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "fashion-mnist-32 True\n", done.stderr
