"""Starts the real `tminus serve` as a process, on a free port.

Most tests ask a server on a small network of random weights, whose start and steps take a fraction of the time. What
shows on pictures, and the bytes of the executors that users run, is asked of the bundled checkpoint.
"""

import contextlib
import io
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from tests import postgres
from tests.documents import ROOT
from tests.e2e import forked
from tests.e2e.browser import OpenPage, Page
from tests.e2e.forked import Forked
from tests.service.keys import bearer, key_line
from tests.tiny import randomize
from tests.tools import needs
from tminus.model.catalogue import Recommended
from tminus.model.checkpoint import Labels, load_checkpoint, save_checkpoint
from tminus.model.unet import UNet2D
from tminus.service.client import Client

BUNDLED = ROOT / "checkpoints" / "fashion-mnist-32"
BUNDLED_THREADS = "2"  # a command with as many takes the executor that the server of the bundled model has chosen
RECOMMENDED = Recommended("dpmpp_2m", 20, 1.5)  # of the small ones, which have no tables
START_TIMEOUT_S = 240.0  # the first start measures, and the cores may be busy with other things
# Of servers whose models are loaded and unloaded: by whom, and how one says so.
ADMIN_KEY = "a-key-for-these-tests"
KEYS = {"TMINUS_KEYS": key_line("ops", ADMIN_KEY, "admin"), "TMINUS_OPEN": "yes"}
ADMIN = bearer(ADMIN_KEY)


def pixels(picture: bytes) -> np.ndarray:
    """The pixels of an image file."""
    with Image.open(io.BytesIO(picture)) as image:
        return np.asarray(image)


def png_of(picture: np.ndarray) -> bytes:
    """The file of these pixels."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()


@dataclass
class RunningServer:
    process: Forked
    lines: list[str] = field(default_factory=list)
    url: str = ""

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def client(self, **kwargs: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, **kwargs)  # type: ignore[arg-type]

    def api(self, **options: Any) -> Client:
        """Our own client; `with` closes it."""
        return Client(self.url, **options)

    def post(self, **kwargs: object) -> httpx.Response:
        return httpx.post(f"{self.url}/sample", timeout=120, **kwargs)  # type: ignore[arg-type]

    def slow_down(self, between_ticks_s: float = 0.1) -> None:
        """Have the server tick so seldom that a job of a thousand steps lasts longer than a test waits for anything."""
        self.process.between_ticks_s.value = between_ticks_s

    def speed_up(self) -> None:
        """Have it tick as often as it can again."""
        self.process.between_ticks_s.value = 0.0

    def fill(self, **spec: object) -> None:
        """Slow it down, and give it jobs of a spec until it refuses one, however fast the machine is."""
        self.slow_down()
        while (answer := httpx.post(f"{self.url}/jobs", json=spec, timeout=60)).status_code == 202:
            pass
        assert answer.status_code == 429, answer.text

    def wait_until(self, holds: Callable[[], bool]) -> None:
        began_s = time.monotonic()
        while not holds():
            waited_s = time.monotonic() - began_s
            assert waited_s < 60, f"it did not happen:\n{self.log}"
            time.sleep(min(0.1, max(0.02, waited_s / 10)))  # the server needs the cores more than we do

    def metric(self, name: str) -> float:
        """The sum over labels of one metric."""
        text = httpx.get(f"{self.url}/metrics").text
        return sum(float(m[1]) for m in re.finditer(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all processes of a session."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def _cache_of_our_own(shared_folder: Path) -> Iterator[None]:
    """Which executor is fastest is measured once for all processes of a session, and never for the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(shared_folder / "measured"))
        yield


@pytest.fixture(scope="session")
def small(shared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint like the bundled one, with its image size and classes, of some thousand random weights."""
    like = load_checkpoint(BUNDLED)
    config = replace(
        like.net.config,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(8,),
        norm_num_groups=4,
        add_attention=False,
    )
    net = UNet2D(config)
    randomize(net)
    made, folder = tmp_path_factory.mktemp("made") / "small", shared_folder / "small"
    save_checkpoint(made, net.state_dict(), config, like.noise, like.labels, {}, RECOMMENDED)
    with contextlib.suppress(OSError):  # another process was first, and it is the same
        made.rename(folder)
    return folder


@pytest.fixture(scope="session")
def colour(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another size, in colour, with other classes."""
    like = load_checkpoint(small)
    config = replace(like.net.config, sample_size=16, in_channels=3, out_channels=3, num_class_embeds=4)
    net, labels = UNet2D(config), Labels(("red", "green", "blue"), null_class=3)
    randomize(net)
    folder = tmp_path_factory.mktemp("made") / "rgb"
    save_checkpoint(folder, net.state_dict(), config, like.noise, labels, {}, like.recommended)
    return folder


def run_cli(*arguments: str, timeout_s: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        return forked.run(arguments, os.environ | env, Path(folder), timeout_s)


def start_server(checkpoint: Path, *flags: str, prepare: Callable[[], None] | None = None, **env: str) -> RunningServer:
    """Start a server and wait until it is ready; its log is kept. prepare: is called in its process before that."""
    defaults = {"TMINUS_STATE_DIR": ":memory:"}  # several servers at a time, and nothing left behind
    arguments = ["serve", "--checkpoint", str(checkpoint), "--port", "0", "--device", "cpu", *flags]
    process = Forked(arguments, os.environ | defaults | env, prepare)
    server = RunningServer(process)
    listening = threading.Event()

    def read() -> None:
        for line in process.output:
            server.lines.append(line)
            if match := re.search(r"listening on (http://[^\s\"]+)", line):
                server.url = match[1]
                listening.set()
        process.output.close()
        listening.set()

    threading.Thread(target=read, daemon=True).start()
    deadline = time.monotonic() + START_TIMEOUT_S
    listening.wait(START_TIMEOUT_S)
    while server.url and time.monotonic() < deadline:
        if httpx.get(f"{server.url}/readyz").status_code == 200:
            return server
        time.sleep(0.05)
    stop_server(server)
    raise AssertionError(f"the server did not become ready:\n{server.log}")


def stop_server(server: RunningServer) -> int:
    if server.process.poll() is None:
        server.process.terminate()
    try:
        return server.process.wait(60)
    except subprocess.TimeoutExpired:
        server.process.kill()
        raise


@contextlib.contextmanager
def serving(
    checkpoint: Path, *flags: str, prepare: Callable[[], None] | None = None, **env: str
) -> Iterator[RunningServer]:
    """A server that ends well when its tests have."""
    running = start_server(checkpoint, *flags, prepare=prepare, **env)
    try:
        yield running
    finally:
        status = stop_server(running)
    assert status == 0, running.log
    assert "Traceback" not in running.log, running.log


# For tests that do a server no harm. No memory for repeats, so that each answer is made; and nothing is too much work,
# however slow the machine.
SHARED = ("--result-cache-mb", "0", "--max-backlog-s", "6000")


SlowDown = Callable[..., None]


@pytest.fixture
def slow_down() -> Iterator[SlowDown]:
    """Slows a shared server down while a test looks at what runs there, and until the test ends or speeds it up."""
    slowed: list[RunningServer] = []

    def slow_down(server: RunningServer, **pace: float) -> None:
        slowed.append(server)
        server.slow_down(**pace)

    yield slow_down
    for server in slowed:
        server.speed_up()


@pytest.fixture(scope="module")  # while it is open there is an event loop in this thread, and no other can run
def browser() -> Iterator[Any]:
    """Chromium, by Playwright."""
    program = needs("chromium")
    flags = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=flags)
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: Any, server: RunningServer) -> Iterator[OpenPage]:
    """Opens the page; at the end no tab may have complained, nor asked anybody but the server. Leaves no job behind."""
    pages: list[Page] = []

    def make(url: str = server.url, **context: Any) -> Page:
        pages.append(Page(browser, url, **context))
        return pages[-1]

    yield make
    for page in pages:
        page.context.close()
    for url in {page.server_url for page in pages}:
        for job in httpx.get(f"{url}/jobs", params={"state": "waiting,running"}).json().get("jobs", ()):
            httpx.delete(f"{url}/jobs/{job['id']}")
    for page in pages:
        assert page.complaints == []
        assert [url for url in page.requests if not re.match(r"(blob:)?(http|ws)://127\.0\.0\.1:", url)] == []


@pytest.fixture(scope="session")
def server(small: Path) -> Iterator[RunningServer]:
    with serving(small, *SHARED) as running:
        yield running


@pytest.fixture(scope="session")
def bundled_server() -> Iterator[RunningServer]:
    """With two threads, so that streams and wide passes are tried too, where servers beside other tests have one."""
    with serving(BUNDLED, *SHARED, "--threads", BUNDLED_THREADS) as running:
        yield running


@pytest.fixture(scope="session")
def two(small: Path, colour: Path) -> Iterator[RunningServer]:
    """A server of `small`, the default, and of `colour`, which has another size and other classes."""
    with serving(small, *SHARED, "--checkpoint", f"colour={colour}", **KEYS) as running:
        yield running


@pytest.fixture(scope="module")
def database() -> Iterator[postgres.Postgres]:
    with postgres.running() as running:
        yield running


@pytest.fixture
def own_server(small: Path) -> Iterator[Callable[..., RunningServer]]:
    """Starts servers of a test's own, and stops them."""
    started: list[RunningServer] = []

    def start(*flags: str, checkpoint: Path = small, **env: str) -> RunningServer:
        started.append(start_server(checkpoint, *flags, **env))
        return started[-1]

    yield start
    for running in started:
        stop_server(running)
