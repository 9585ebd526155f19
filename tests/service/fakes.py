"""Stand-ins that work: an engine without a network, whose ticks happen when the test lets them."""

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from tminus.model.catalogue import SAMPLER_FACTS, SAMPLERS, Recommended, Rung
from tminus.model.pixels import to_uint16
from tminus.model.trajectory import PlanNumbers
from tminus.service.errors import NotFinite
from tminus.service.model_info import Limits, ModelInfo
from tminus.service.preview import Show
from tminus.service.spec import Floats, Images, Inputs, Pixels, Point, SampleSpec, Snapshot
from tminus.service.work import Batch

PATIENCE_S = 60.0  # before a test gives up: only a test that fails waits so long

INFO = ModelInfo(
    name="fake",
    architecture="UNet2DModel",
    num_parameters=123,
    height_px=4,
    width_px=6,
    alpha=False,
    channels=1,
    latent=None,
    num_timesteps=1000,
    beta_schedule="linear",
    prediction_type="epsilon",
    variance_type="fixed_small",
    timestep_spacings={name: facts.spacing or "leading" for name, facts in SAMPLER_FACTS.items()},
    steps_offset=0,
    log_sigmas=tuple(np.linspace(-4.6, 5.1, 1000).tolist()),
    fractional=True,
    continuous=False,
    clip=True,
    samplers=SAMPLERS,
    tables=(),
    refused_tables=(),
    student=None,
    folded_guidance=1.0,
    default_sampler="ddpm",
    recommended=Recommended("dpmpp_2m", 20),
    ladder=(Rung("dpmpp_2m", 20), Rung("dpmpp_2m", 10), Rung("dpmpp_2m", 5)),
    conditional=True,
    class_names=("cat", "dog", "3d-print"),
    null_class=3,
    weights_hash="ab" * 32,
    fingerprint="0123456789abcdef",
    device="a fake",
    executor="none",
    precision="float32",
    executor_details="colours by arithmetic",
    exact=True,
)

LIMITS = Limits(max_n=64, max_batch=8, max_rows=256, max_jobs=16, max_backlog_s=1e9, max_body_bytes=4096)


def make_spec(**fields: object) -> SampleSpec:
    """A spec of one unguided row and three ddpm steps, but for what is given."""
    given = {"n": 1, "steps": 3, "sampler": "ddpm", "eta": 0.0, "seed": 1, "index": 0, "guidance": 1.0, "clip": True}
    given |= {"guidance_interval": None} | fields
    given.setdefault("class_labels", (0,) * given["n"])  # type: ignore[operator]
    given.setdefault("timestep_spacing", INFO.timestep_spacings.get(str(given["sampler"]), "leading"))
    return SampleSpec(**given)  # type: ignore[arg-type]


def fake_pixels(spec: SampleSpec, steps_done: int, info: ModelInfo = INFO) -> Images:
    """What FakeEngine makes of a spec: a colour by seed, image index and the number of steps that were taken."""
    shape = (info.height_px, info.width_px, info.channels)
    values = [(spec.seed + 31 * (spec.index + k) + 7 * steps_done) % 256 for k in range(spec.n)]
    return np.stack([np.full(shape, value, np.uint8) for value in values])


class Gate:
    """Where ticks wait for the test: open, all pass; shut, one passes for each `let`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open, self._passes = True, 0

    def shut(self) -> None:
        with self._changed:
            self._open = False

    def open(self) -> None:
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def let(self, ticks: int = 1) -> None:
        with self._changed:
            self._passes += ticks
            self._changed.notify_all()

    def enter(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._open or self._passes > 0, PATIENCE_S), "nobody opened the gate"
            if not self._open:
                self._passes -= 1


class FakeEngine:
    """Keeps the rules of RowEngine and asserts that its caller does: slots, step order, one job a remove."""

    def __init__(self, info: ModelInfo = INFO, slots: int = 256) -> None:
        self.info = info
        self.gate = Gate()
        self.begun: queue.SimpleQueue[Batch] = queue.SimpleQueue()  # each tick, before it passes the gate
        self.batches: list[Batch] = []  # the ticks that ran
        self.jobs: dict[int, tuple[SampleSpec, tuple[int, ...]]] = {}  # by first row
        self.steps_done: dict[int, int] = {}
        self.inputs: list[Inputs | None] = []  # of each job that came
        self.nan: set[int] = set()  # rows whose latent is not finite
        self.on_begin: Callable[[Batch], None] = lambda batch: None
        self.on_step: Callable[[Batch], None] = lambda batch: None  # as a tick ends, before its rows have stepped
        self.on_add: Callable[[SampleSpec], None] = lambda spec: None
        self.on_images: Callable[[Sequence[int]], None] = lambda rows: None
        self.on_preview: Callable[[Sequence[int]], None] = lambda rows: None
        self.on_snapshot: Callable[[Sequence[int]], None] = lambda rows: None
        self.on_noised: Callable[[], None] = lambda: None
        self.on_decode: Callable[[SampleSpec], None] = lambda spec: None  # of each image, of a latent model
        self.on_encode: Callable[[Inputs], None] = lambda inputs: None
        self.lost = False  # whether the device does nothing any more
        self.runs_ahead = self.queues = False
        self.in_flight: list[Batch] = []  # in the order in which they began, which is that in which they end
        self.on_remove: Callable[[Sequence[int]], None] = lambda rows: None
        self._free = list(range(slots))

    def add(self, spec: SampleSpec, snapshot: Snapshot | None = None, inputs: Inputs | None = None) -> tuple[int, ...]:
        self.on_add(spec)
        self.inputs.append(inputs)
        assert (inputs and inputs.image_sha256, inputs and inputs.mask_sha256) == (spec.image_sha256, spec.mask_sha256)
        assert len(self._free) >= spec.n, "out of slots"
        rows = tuple(self._free.pop(0) for _ in range(spec.n))
        self.jobs[rows[0]] = (spec, rows)
        if snapshot is None:
            self.steps_done |= dict.fromkeys(rows, spec.start)
        else:
            self.steps_done |= dict(zip(rows, snapshot.steps, strict=True))
        return rows

    def step(self, batch: Batch) -> None:
        self.begin(batch)()

    def begin(self, batch: Batch) -> Callable[[], None]:
        self.on_begin(batch)
        assert self.queues or not self.in_flight, "it has no queue"
        assert self.rows_in_flight.isdisjoint(batch.rows), "a row is in one tick at a time"
        for row, step in zip(batch.rows, batch.steps, strict=True):
            assert self.steps_done[row] == step, "a row must take its steps in order"
        self.in_flight.append(batch)
        self.begun.put(batch)

        def finish() -> None:
            try:
                assert self.in_flight[0] is batch
                self.gate.enter()
                self.on_step(batch)
            finally:
                self.in_flight.remove(batch)
            for row in batch.rows:
                self.steps_done[row] += 1
            self.batches.append(batch)

        return finish

    @property
    def rows_in_flight(self) -> set[int]:
        return {row for batch in self.in_flight for row in batch.rows}

    def wait(self) -> None:
        pass

    def broken(self, rows: Sequence[int]) -> tuple[int, ...]:
        return tuple(row for row in rows if row in self.nan)

    def images(self, rows: Sequence[int], bit_depth: int = 8) -> Callable[[], Pixels]:
        self.on_images(rows)
        spec, its_rows = next(job for job in self.jobs.values() if rows[0] in job[1])
        assert self.info.latent is not None or tuple(rows) == its_rows
        assert {self.steps_done[row] for row in rows} == {spec.end}, "images before the last step"
        pixels = fake_pixels(spec, spec.steps, self.info)[[its_rows.index(row) for row in rows]]
        finite, decode = not self.nan & set(rows), self.on_decode

        def read() -> Pixels:
            if not finite:
                raise NotFinite
            if self.info.latent is not None:
                decode(spec)
            if bit_depth == 8:
                return pixels
            values = (pixels / 100 - 1).astype(np.float32)  # some lie beyond 1
            return values if bit_depth == 32 else to_uint16(values)

        return read

    def encoder(self, inputs: Inputs) -> Callable[[], Inputs]:
        def encode() -> Inputs:
            self.on_encode(inputs)
            return replace(inputs, latents=np.zeros((1, 1, 1), np.float32))

        return encode

    def preview(self, rows: Sequence[int], show: Sequence[Show]) -> Callable[[], Mapping[Show, Images]]:
        self.on_preview(rows)
        spec, its_rows = next(job for job in self.jobs.values() if rows[0] in job[1])
        if tuple(rows) == its_rows:
            pixels = fake_pixels(spec, min(self.steps_done[row] for row in rows), self.info)
        else:  # some of them, each as it is
            pixels = self._each(rows)
        pixels = pixels[..., : self.info.shown_channels]
        return lambda: {name: pixels if name == "x_t" else 255 - pixels for name in show}

    def _each(self, rows: Sequence[int]) -> Images:
        """The pixels of rows of one job, each as it is."""
        spec, its_rows = next(job for job in self.jobs.values() if rows[0] in job[1])
        return np.stack([fake_pixels(spec, self.steps_done[row], self.info)[its_rows.index(row)] for row in rows])

    def snapshot(self, rows: Sequence[int], steps: tuple[int, ...]) -> Callable[[], Snapshot]:
        self.on_snapshot(rows)
        _, its_rows = self.jobs[rows[0]]
        assert tuple(rows) == its_rows
        assert tuple(self.steps_done[row] for row in rows) == steps
        shape = (len(rows), self.info.channels, self.info.height_px, self.info.width_px)
        return lambda: Snapshot(
            steps, *(np.zeros(each, np.float32) for each in (shape, shape, (len(rows), 0, *shape[1:])))
        )

    def plan(self, spec: SampleSpec) -> PlanNumbers:
        """Each pass keeps x and adds noise, but for the last."""
        timesteps = np.arange(spec.num_passes, 0, -1, dtype=np.float64)
        lines = np.tile([0.0, 1.0, 1.0, 0.0, 0.0, 2.0, np.inf, 0.0], (spec.num_passes, 1))
        lines[-1, 5] = 0
        return PlanNumbers(timesteps, lines, np.stack([np.ones_like(timesteps), timesteps], 1))

    def point(self, rows: Sequence[int]) -> Callable[[], Point]:
        """x and x_0 are what x_t and x_0 of a preview are, as floats."""
        self.on_preview(rows)
        x = self._each(rows).transpose(0, 3, 1, 2).astype(np.float32)
        return lambda: Point(x, 255 - x)

    def noised(self, images: Images, t: int, seed: int) -> Callable[[], Images]:
        self.on_noised()
        noisy = images + np.uint8((t + seed) % 256)  # wraps, as uint8 does
        return lambda: noisy

    def latents(self, rows: Sequence[int]) -> Floats:
        spec, its_rows = self.jobs[rows[0]]
        assert tuple(rows) == its_rows
        return fake_pixels(spec, self.steps_done[rows[0]], self.info).transpose(0, 3, 1, 2).astype(np.float32)

    def remove(self, rows: Sequence[int]) -> None:
        self.on_remove(rows)
        assert self.rows_in_flight.isdisjoint(rows), "a tick in flight would write over the next row in the slot"
        _, its_rows = self.jobs.pop(rows[0])
        assert tuple(rows) == its_rows
        for row in rows:
            del self.steps_done[row]
        self.nan -= set(rows)
        self._free.extend(rows)

    def is_lost(self) -> bool:
        return self.lost

    def memory_bytes(self) -> int | None:
        return None

    # --- for the test ---

    def next_begun(self) -> Batch:
        """Wait for the next tick to begin."""
        return self.begun.get(timeout=PATIENCE_S)

    def seeds(self, batch: Batch) -> set[int]:
        """The seeds of the jobs that have a row in a batch that has not been removed yet."""
        return {spec.seed for spec, rows in self.jobs.values() if set(rows) & set(batch.rows)}


class FakeKeeper:
    """Keeps the snapshots that the worker takes, and is ready for them unless the test says otherwise."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, Snapshot]] = []
        self.ready = True

    def due(self, now_s: float) -> bool:
        return self.ready

    def keep(self, snapshots: Mapping[str, Callable[[], Snapshot]], began_s: float, cost_s: float) -> None:
        self.rounds.append({name: read() for name, read in snapshots.items()})


def wait_until(holds: Callable[[], bool]) -> None:
    """Look again and again, as some states announce themselves by no event; fail after the usual patience."""
    began_s = time.monotonic()
    while not holds():
        waited_s = time.monotonic() - began_s
        assert waited_s < PATIENCE_S, "it did not happen"
        time.sleep(min(0.02, max(0.001, waited_s / 10)))
