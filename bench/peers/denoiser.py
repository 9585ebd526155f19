"""A U-Net and diffusers' schedulers, batched as far as they go: what the request-level batchers serve.

The network is diffusers' own in eager PyTorch, or the graph that tminus makes of it for OpenVINO.

A batch of requests falls into groups of the same steps and sampler; each group is one loop over the timesteps, in which
every row has its own class and its own generator. Groups run one after the other: a diffusers scheduler steps all rows
of a batch at one timestep. Step by step, each request has a scheduler of its own, and only the passes are shared.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor

from bench import bare
from bench.peers import encode
from bench.tally import Tally
from tminus.model.checkpoint import load_checkpoint
from tminus.service.engine.executors import Executor

# More rows would make a batch of several images a request long.
MAX_ROWS = 16
SCHEDULERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}
TUNING_PASSES = 3
SIZES = (1, 2, 4, 8, 16)  # of OpenVINO's passes in one thread
Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request."""

    n: int
    steps: int
    sampler: str
    seed: int
    class_label: int | None

    @classmethod
    def parse(cls, body: dict[str, Any]) -> "Wanted":
        """Read a JSON body; raises ValueError for what cannot be done."""
        wanted = cls(
            int(body.get("n", 1)),
            int(body.get("steps", 1000)),
            body.get("sampler", "ddpm"),
            int(body.get("seed", 0)),
            body.get("class_label"),
        )
        if not (1 <= wanted.n <= 64 and 1 <= wanted.steps <= 1000 and wanted.sampler in SCHEDULERS):
            raise ValueError(f"cannot do {wanted}")
        return wanted


@dataclass(frozen=True, slots=True)
class Row:
    """One image of one request of a batch."""

    request: int
    generator: torch.Generator
    label: int


@dataclass(slots=True)
class Course:
    """A request under way."""

    rows: Sequence[Row]
    scheduler: Any
    timesteps: list[Tensor]  # that are left
    x: Tensor  # [B, C, H, W]


class Denoiser:
    """Owns the network. Load and use it in one thread: a second OpenMP team, of another thread, slows it."""

    def __init__(self, checkpoint: Path, tally: Tally, device: str = "cpu", openvino: str | None = None) -> None:
        """openvino: the precision of OpenVINO's passes; None for eager PyTorch in float32."""
        net: Any = UNet2DModel.from_pretrained(checkpoint, subfolder="unet")  # type: ignore[no-untyped-call]
        config = json.loads((checkpoint / "scheduler" / "scheduler_config.json").read_text("utf-8"))
        self._schedulers = {name: kind.from_config(config) for name, kind in SCHEDULERS.items()}
        labels = checkpoint / "tminus.json"
        null_class = json.loads(labels.read_text("utf-8")).get("null_class") if labels.is_file() else None
        self._null_class = null_class or 0
        self._conditional = net.config.num_class_embeds is not None
        size = net.config.sample_size
        self._shape = (net.config.in_channels, *(size if isinstance(size, list | tuple) else (size, size)))
        self._tally, self._device, self._layout = tally, device, torch.contiguous_format
        if openvino is not None:
            self._forward: Forward = in_openvino(checkpoint, openvino)
            self._read = reader(checkpoint, openvino=True)
        else:
            net.eval().to(device)
            self._forward = self._in_torch(net)
            self._layout = faster_layout(net, self._forward, self._shape)
            self._read = reader(checkpoint, openvino=False)

    @torch.inference_mode()
    def sample(self, requests: Sequence[Wanted]) -> list[bytes]:
        """Make every request's PNG, in their order."""
        groups: dict[tuple[int, str], list[Row]] = {}
        for number, wanted in enumerate(requests):
            groups.setdefault((wanted.steps, wanted.sampler), []).extend(self._rows(number, wanted))
        images: list[list[Image.Image]] = [[] for _ in requests]
        for (steps, sampler), rows in groups.items():
            for part in even_parts(rows, MAX_ROWS):
                x = self._loop(part, steps, sampler)
                for row, image in zip(part, self._read(x), strict=True):
                    images[row.request].append(image)
        return [encode(answer) for answer in images]

    def begin(self, wanted: Wanted) -> Course:
        """Begin a request that goes on step by step."""
        rows, scheduler = self._rows(0, wanted), copy.deepcopy(self._schedulers[wanted.sampler])
        scheduler.set_timesteps(wanted.steps)
        return Course(rows, scheduler, list(scheduler.timesteps), self._noise(rows))

    @torch.inference_mode()
    def step(self, courses: Sequence[Course]) -> None:
        """Take one step of each request, each at its own timestep."""
        rows = [row for course in courses for row in course.rows]
        x = torch.cat([course.x for course in courses]).contiguous(memory_format=self._layout)
        times = [course.timesteps.pop(0) for course in courses]
        t = torch.cat([t.expand(len(course.rows)) for t, course in zip(times, courses, strict=True)])
        outs = []
        for k in range(0, len(rows), MAX_ROWS):
            some = slice(k, k + MAX_ROWS)
            outs.append(self._forward(x[some], t[some], self._labels(rows[some])))
            self._tally.add(len(outs[-1]))
        own = torch.cat(outs).split([len(course.rows) for course in courses])  # type: ignore[no-untyped-call]
        for course, at, out in zip(courses, times, own, strict=True):
            generators = [row.generator for row in course.rows]
            course.x = course.scheduler.step(out, at, course.x, generator=generators).prev_sample

    def finish(self, course: Course) -> bytes:
        """Make the PNG of a request that has no steps left."""
        return encode(self._read(course.x))

    def _rows(self, number: int, wanted: Wanted) -> list[Row]:
        label = self._null_class if wanted.class_label is None else wanted.class_label
        return [Row(number, torch.Generator().manual_seed(wanted.seed + 2**32 * k), label) for k in range(wanted.n)]

    def _noise(self, rows: Sequence[Row]) -> Tensor:
        return torch.cat([torch.randn(1, *self._shape, generator=row.generator) for row in rows]).to(self._device)

    def _labels(self, rows: Sequence[Row]) -> Tensor | None:
        return torch.tensor([row.label for row in rows], device=self._device) if self._conditional else None

    def _loop(self, rows: Sequence[Row], steps: int, sampler: str) -> Tensor:
        """Take rows [B] from noise to finished rows [B, C, H, W]."""
        scheduler: Any = self._schedulers[sampler]
        scheduler.set_timesteps(steps)
        generators, labels, x = [row.generator for row in rows], self._labels(rows), self._noise(rows)
        for t in scheduler.timesteps:
            out = self._forward(x.contiguous(memory_format=self._layout), t, labels)
            x = scheduler.step(out, t, x, generator=generators).prev_sample
            self._tally.add(len(rows))
        return x

    def _in_torch(self, net: Any) -> Forward:
        def forward(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            if self._conditional and labels is None:
                labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            out: Tensor = net(x, t, class_labels=labels, return_dict=False)[0]
            return out

        return forward


def in_openvino(checkpoint: Path, precision: str) -> Forward:
    """Run tminus' graph of a network, on as many threads as torch has here.

    With several threads this is the executor that tminus chose on this machine; with one, passes of up to 16 rows.
    """
    threads = torch.get_num_threads()
    executor = bare.build(checkpoint, "openvino", precision) if threads > 1 else one_stream(checkpoint, precision)

    def forward(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return executor(x, t.to(torch.float32).expand(len(x)), labels)

    return forward


def one_stream(checkpoint: Path, precision: str) -> Executor:
    """Make an executor of one thread, with the graph that tminus converts."""
    from tminus.service.engine.openvino_executor import Graph, OpenVINOExecutor

    loaded = load_checkpoint(checkpoint)
    graph = Graph(loaded.net, loaded.row_shape, loaded.noise.num_train_timesteps)
    return OpenVINOExecutor(graph, precision=precision, sizes=SIZES, threads=1)


def reader(checkpoint: Path, *, openvino: bool) -> Callable[[Tensor], list[Image.Image]]:
    """Return what makes images of finished rows; those of a latent model are decoded."""
    if not (checkpoint / "vqvae").is_dir():
        return to_images
    if openvino:
        from tminus.service.engine.pictures import LatentPictures

        pictures = LatentPictures(load_checkpoint(checkpoint), torch.device("cpu"), None)
        return lambda x: [Image.fromarray(image) for image in pictures.read(x, [None] * len(x), 8)()]
    autoencoder = load_autoencoder(checkpoint)
    scaling = autoencoder.config.scaling_factor
    return lambda x: to_images(autoencoder.decode(x / scaling, return_dict=False)[0])


def load_autoencoder(checkpoint: Path) -> Any:
    """Load a latent model's autoencoder as diffusers' own, of the class that its config names."""
    config = json.loads((checkpoint / "vqvae" / "config.json").read_text("utf-8"))
    autoencoder: Any = getattr(diffusers, config["_class_name"]).from_pretrained(checkpoint, subfolder="vqvae")
    return autoencoder.eval()


@torch.inference_mode()
def faster_layout(net: torch.nn.Module, forward: Forward, shape: tuple[int, ...]) -> torch.memory_format:
    """Try both memory layouts and leave the network in the faster one; warms it too."""
    best_s: dict[torch.memory_format, float] = {}
    device = next(net.parameters()).device
    for layout in (torch.contiguous_format, torch.channels_last):
        net.to(memory_format=layout)  # type: ignore[call-overload]
        x = torch.randn(MAX_ROWS // 2, *shape, device=device).contiguous(memory_format=layout)
        seconds = []
        for _ in range(TUNING_PASSES + 1):
            started = time.perf_counter()
            forward(x, torch.tensor(1, device=device), None)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
        best_s[layout] = min(seconds[1:])
    best = min(best_s, key=lambda layout: best_s[layout])
    net.to(memory_format=best)  # type: ignore[call-overload]
    return best


def even_parts(rows: Sequence[Row], most: int) -> list[Sequence[Row]]:
    """Split into as few parts as can be, of sizes that differ by one at most."""
    parts = math.ceil(len(rows) / most)
    return [rows[len(rows) * k // parts : len(rows) * (k + 1) // parts] for k in range(parts)]


def to_images(x: Tensor) -> list[Image.Image]:
    """x [B, C, H, W] in -1..1 -> images."""
    pixels = ((x / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in pixels]
