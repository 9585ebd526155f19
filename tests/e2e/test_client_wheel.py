"""tminus-client in an environment of its own: what it takes, and that it asks a real server."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import RunningServer
from tests.wheel import built, copied, unpacked, with_requirements

MAX_BYTES = 5_000_000
SPEC = {"n": 2, "steps": 20, "sampler": "ddim", "seed": 5, "class_label": "sneaker"}
PROGRAM = """
import asyncio, importlib.util, sys
from pathlib import Path
from tminus_client import AsyncClient, Client, Done, Problem

url, spec = sys.argv[1], {spec!r}
heavy = ("tminus", "torch", "numpy", "PIL", "service", "model")
assert not [name for name in heavy if importlib.util.find_spec(name)]
with Client(url) as tminus:
    Path("sync.png").write_bytes(tminus.sample(**spec).data)
    job = tminus.submit(**spec)
    assert job.wait(60).state == "done"
    Path("job.png").write_bytes(job.image().data)
    try:
        tminus.sample(steps=0)
    except Problem as problem:
        print(problem.code)
    try:
        Path("watched.png").write_bytes([each for each in tminus.watch(**spec) if isinstance(each, Done)][0].images[0])
    except ImportError as error:
        print(error)

async def ask():
    async with AsyncClient(url) as tminus:
        Path("async.png").write_bytes((await tminus.sample(**spec)).data)

asyncio.run(ask())
"""


def ask(python: Path, server: RunningServer, folder: Path) -> list[str]:
    command = [python, "-I", "-c", PROGRAM.format(spec=SPEC), server.url]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.long
def test_it_is_small_and_samples_and_submits_without_anything_else_and_watches_with_websockets(
    server: RunningServer, tmp_path: Path
) -> None:
    wheel = built(copied(tmp_path / "source") / "client", tmp_path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True, timeout=60)
    (site,), python = (tmp_path / "venv").glob("lib/python*/site-packages"), tmp_path / "venv" / "bin" / "python"
    unpacked(wheel, site)
    names = with_requirements(site, ["tminus-client"])
    assert {"tminus-client", "httpx", "h11"} <= names
    assert not names & {"websockets", "numpy", "pillow", "torch"}
    subprocess.run([python, "-m", "compileall", "-q", site], check=True, timeout=120)
    # As `du --apparent-size` counts. In blocks of 4 KiB it is a quarter more.
    size_bytes = sum(file.stat().st_size for file in site.rglob("*") if file.is_file())
    assert 1_000_000 < size_bytes < MAX_BYTES, size_bytes

    said = ask(python, server, tmp_path)
    assert said == ["invalid_field", "watch needs websockets: pip install './client[watch]' in a checkout of tminus"]
    with_requirements(site, ["tminus-client"], "watch")
    assert ask(python, server, tmp_path) == ["invalid_field"]
    wanted = server.post(json=SPEC).content
    for name in ("sync.png", "async.png", "job.png", "watched.png"):
        assert (tmp_path / name).read_bytes() == wanted
