import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from torch import Tensor

from tests.service.fakes import INFO, LIMITS, FakeEngine, wait_until
from tests.tiny import TINY, randomize
from tminus.model.checkpoint import Checkpoint, Labels
from tminus.model.noise import NoiseConfig
from tminus.model.sampler_tables import Table
from tminus.model.unet import UNet2D
from tminus.model.weights import hash_weights
from tminus.service.access.access import Access
from tminus.service.api.edge.origin import AllowedSites
from tminus.service.engine.executors import Executor
from tminus.service.engine.protocol import RowEngine
from tminus.service.jobs.crash_report import CrashFile
from tminus.service.jobs.store.async_store import Results, Stores
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.sqlite_store import SqliteStore
from tminus.service.jobs.webhooks.deliverer import Rules
from tminus.service.model_info import Limits, ModelInfo
from tminus.service.scheduling.forecast import Speed
from tminus.service.scheduling.scheduler import BatchPolicy, TickTimes
from tminus.service.startup import app as startup_app
from tminus.service.startup.app import Application
from tminus.service.startup.loader import ModelLoader
from tminus.service.startup.models import Prepared, ServedModels, UnloadedModel
from tminus.service.startup.settings import Library

CONDITIONAL = replace(TINY, num_class_embeds=4)
THREE_CLASSES = Labels(("cat", "dog", "3d-print"), null_class=3)

# For T = 50: one that looks back twice, so that it needs a register, and a guided one that adds noise.
TABLES_OF_50 = (
    Table(
        "tuned",
        4,
        1.0,
        (49.0, 30.5, 12.25, 3.0),
        ((0.9, 0.1, 0, 0, 0), (0.8, 0.3, -0.1, 0, 0), (0.4, 0.9, -0.3, 0.05, 0), (0.1, 1.3, -0.5, 0.1, 0)),
    ),
    Table("tuned", 3, 2.0, (49.0, 21.5, 4.0), ((0.7, 0.2, 0, 0, 0.3), (0.5, 0.6, -0.2, 0, 0.1), (0, 1.1, -0.1, 0, 0))),
)


class Around:
    """An executor around another, without a queue. Subclasses do their part in `__call__`."""

    queues = False

    def __init__(self, executor: Executor) -> None:
        self.name, self.precision, self.details = executor.name, executor.precision, executor.details
        self.executor = executor

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        return self.executor(x, t, class_labels)

    def start(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Callable[[], Tensor]:
        return lambda: self(x, t, class_labels)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # For nets this small a second thread costs more than it brings, and the bits do not depend on the machine.
    torch.set_num_threads(1)


MakeCheckpoint = Callable[..., Checkpoint]


@pytest.fixture(scope="session")
def make_checkpoint() -> MakeCheckpoint:
    """Makes a checkpoint in memory: a tiny U-Net of random weights, conditional unless `classes` is False."""

    def make(*, classes: bool = True, noise: NoiseConfig | None = None, seed: int = 0, **fields: object) -> Checkpoint:
        config = replace(CONDITIONAL, **({} if classes else {"num_class_embeds": None}) | fields)  # type: ignore[arg-type]
        net = UNet2D(config)
        randomize(net, seed)
        with torch.no_grad():
            if net.class_embedding is not None:  # classes must matter, or a wrong one would not be seen
                net.class_embedding.weight.mul_(4)
        net.requires_grad_(False).eval()
        assert config.size_px is not None
        return Checkpoint(
            net=net,
            noise=noise or NoiseConfig(num_train_timesteps=50, beta_end=0.1),
            labels=THREE_CLASSES if classes else Labels(),
            weights_hash=hash_weights(net.state_dict()),
            name="tiny",
            size_px=config.size_px,
            tables=TABLES_OF_50 if noise is None and classes else (),
        )

    return make


@pytest.fixture(scope="session")
def tiny(make_checkpoint: MakeCheckpoint) -> Checkpoint:
    """8x8, one channel, three classes and a null class, T = 50."""
    return make_checkpoint()


def prepare(engine: RowEngine, limits: Limits, tick_times: Sequence[tuple[int, float]]) -> Prepared:
    """A model as the app takes it."""
    times = TickTimes(tuple(tick_times))
    policy = BatchPolicy.of(limits.max_batch, max(2, limits.max_batch // 2), times)
    return Prepared(engine, limits, Speed(policy, limits.max_rows))


def create_app(
    first: Sequence[Prepared],
    open_store: Callable[[str], JobStore],
    allowed_sites: AllowedSites | None = None,
    *,
    access: Access | None = None,
    webhooks: Rules | None = None,
    results: Results | None = None,
    library: Library | None = None,
    prepare: Callable[[str, Path], Prepared] | None = None,
    unloaded: Sequence[UnloadedModel] = (),
    crash_file: CrashFile | None = None,
    room_lacking: Callable[[Path, int], str | None] = lambda *_: None,
    idle_unload_s: float | None = None,
    **more: Any,
) -> Application:
    """An application around models. library, prepare: what can be loaded, and how. more: for the app alone."""
    served = ServedModels(
        list(first),
        Stores(open_store, results),
        allowed_sites or AllowedSites(),
        access or Access(),
        webhooks=webhooks,
        crash_file=crash_file,
        unloaded=unloaded,
    )
    loader = ModelLoader(served, library or Library(), prepare, room_lacking, idle_unload_s)  # type: ignore[arg-type]
    return Application(startup_app.create_app(served, loader, **more), served)


TEST_HOSTS = frozenset({"testserver"})  # as WebSockets of Starlette's client call it


class Site:
    """An app on a fake engine, its lifespan running, asked in process."""

    def __init__(
        self,
        info: ModelInfo,
        limits: Limits,
        tick_times: Sequence[tuple[int, float]],
        allowed_sites: AllowedSites | None = None,
        state_file: Path | dict[str, Path] | Callable[[str], JobStore] | None = None,
        **more: Any,
    ) -> None:
        """more: for create_app, and `others`, models beside the first."""
        self.engine = FakeEngine(info)
        prepared = prepare(self.engine, limits, tick_times)
        first = [prepared, *more.pop("others", ())]

        def open_store(weights_hash: str) -> JobStore:
            if callable(state_file):
                return state_file(weights_hash)
            return SqliteStore(state_file.get(weights_hash) if isinstance(state_file, dict) else state_file)

        application = create_app(first, open_store, allowed_sites or AllowedSites(TEST_HOSTS), **more)
        self.application, self.app, served = application, application.app, application.served
        self.worker, self.streams, self.answers = served.worker, served.streams, served.answers
        self.client = TestClient(self.app, base_url="http://localhost", raise_server_exceptions=False)

    def wait_until_ready(self) -> None:
        wait_until(lambda: self.worker.state.ready)
        while not self.engine.begun.empty():
            self.engine.begun.get()

    def open_when_told(self, commands: int = 1) -> None:
        """Open the gate once so many commands wait for the worker, as a cancel does until the tick has ended."""
        wait_until(lambda: self.worker._commands.qsize() >= commands)
        self.engine.gate.open()

    def post(self, **kwargs: Any) -> Any:
        return self.client.post("/sample", **kwargs)

    def metrics(self) -> dict[str, float]:
        """Each sample of /metrics by its name and labels."""
        text = self.client.get("/metrics").text
        return {
            f"{sample.name}{json.dumps(sample.labels) if sample.labels else ''}": sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


MakeSite = Callable[..., Site]
INSTANT = ((1, 1e-6), (LIMITS.max_batch, 1e-6))


@contextmanager
def running_sites() -> Iterator[MakeSite]:
    """Makes running sites; at the end each is shut down and its engine must be empty."""
    sites: list[Site] = []

    def make(
        *,
        info: ModelInfo = INFO,
        gate_shut: bool = False,
        tick_times: Sequence[tuple[int, float]] = INSTANT,
        state_file: Path | dict[str, Path] | Callable[[str], JobStore] | None = None,
        app: dict[str, Any] | None = None,
        **limits: object,
    ) -> Site:
        held = replace(LIMITS, **limits)  # type: ignore[arg-type]
        site = Site(info, held, tick_times, state_file=state_file, **(app or {}))
        if gate_shut:
            site.engine.gate.shut()
        site.client.__enter__()
        sites.append(site)
        if not gate_shut:
            site.wait_until_ready()
        return site

    yield make
    for site in sites:
        site.engine.gate.open()
        site.client.__exit__(None, None, None)
        assert site.engine.jobs == {}


@pytest.fixture
def make_site() -> Iterator[MakeSite]:
    with running_sites() as make:
        yield make


@pytest.fixture
def site(make_site: MakeSite) -> Site:
    return make_site()


@pytest.fixture(scope="module")
def one_site() -> Iterator[Site]:
    """For all tests of a module that are refused, and so leave nothing behind."""
    with running_sites() as make:
        yield make()


def problem(response: Any, status: int, code: str) -> dict[str, Any]:
    """Check what every problem document has, and return it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-request-id"]
    document: dict[str, Any] = json.loads(response.content, parse_constant=pytest.fail)
    assert document["status"] == status
    assert document["code"] == code
    assert document["type"] == f"urn:tminus:problem:{code}"
    assert document["title"]
    assert document["detail"]
    return document


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image)


@pytest.fixture
def held(make_site: MakeSite) -> Site:
    """A site that is ready, and whose next tick waits for the test."""
    site = make_site()
    site.engine.gate.shut()
    return site


class Restarts:
    """Sites on one file, one after the other. The last is shut down at the end."""

    def __init__(self, file: Path) -> None:
        self.file, self.site = file, None

    def start(
        self,
        *,
        shut: bool = False,
        info: dict[str, Any] | None = None,
        tick_times: tuple[tuple[int, float], ...] = INSTANT,
        **fields: Any,
    ) -> Site:
        limits = replace(LIMITS, **fields)
        self.site = Site(replace(INFO, **info or {}), limits, tick_times, state_file=self.file)
        if shut:
            self.site.engine.gate.shut()
            self.site.engine.gate.let()  # the warm-up
        self.site.client.__enter__()
        self.site.wait_until_ready()
        return self.site

    def stop(self) -> None:
        """Stop as SIGTERM does, without waiting: accepted jobs stay."""
        if self.site is not None:
            self.site.worker.drain()
            self.site.engine.gate.open()
            self.site.client.__exit__(None, None, None)
            assert self.site.engine.jobs == {}
            self.site = None


@pytest.fixture
def restarts(tmp_path: Path) -> Iterator[Restarts]:
    made = Restarts(tmp_path / "jobs.sqlite3")
    yield made
    made.stop()


def frames_of(content: bytes) -> tuple[list[np.ndarray], list[int]]:
    """Pixels and durations of an animation."""
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "WEBP"
        frames, durations = [], []
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            frames.append(np.asarray(image.convert("L")))
            durations.append(image.info["duration"])
        return frames, durations
