"""The samples of an evaluation, with their options.

Samples are made as in serving: sample i is image i of a request with the same seed. Their pixels are rounded to uint8.
The classes of the checkpoint and of the data are matched by name, not by number.
"""

import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tminus.model.checkpoint import Checkpoint
from tminus.model.denoiser import Denoiser
from tminus.model.evaluation.figures import LeftOut
from tminus.model.guidance import Forward
from tminus.model.latent.autoencoder import images_of
from tminus.model.pixels import RGBA, shown_channels, to_uint8
from tminus.model.rng import image_noise
from tminus.model.samplers import Plan, sample_passes
from tminus.model.timesteps import SPACINGS
from tminus.model.training.data import ImageSet

ALL = "all"
MAX_STRIP, MAX_STRIP_PX, MIN_STRIP = 16, 1024, 4  # most images, largest width in pixels, fewest images


class EvaluateError(ValueError):
    """Raised if the checkpoint, the data and the classifier do not match, or if samples are not finite."""


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """Options for sampling and measuring. With K classes, sample i has class i % K."""

    num_samples: int = 1000
    sampler: str = "ddim"
    steps: int = 50
    eta: float = 0.0
    guidance: float = 1.0
    seed: int = 0
    batch_size: int = 100
    precision: str = "float32"  # of the network: float32, tf32 or bfloat16; sampler updates always use float32
    bound_images: int = 200
    # The bound's timesteps are divided into this many runs, and each image draws one timestep from each run. Early runs
    # are shorter, because early timesteps make up most of the bound.
    bound_timesteps: int = 100
    spacing: str | None = None  # timestep spacing; None for the checkpoint's own
    guidance_interval: tuple[int, int] | None = None  # Timesteps lo <= t <= hi are guided; None guides all.
    guidance_rescale: float = 0.0  # the `share` of `rescale` in guidance.py
    executor: str = "eager"  # name of the executor that makes the samples

    def __post_init__(self) -> None:
        for field, least in (("num_samples", 2), ("batch_size", 1), ("bound_images", 1), ("bound_timesteps", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} must be {least} or more, got {getattr(self, field)}")
        if self.precision not in ("float32", "tf32", "bfloat16"):
            raise ValueError(f"precision must be float32, tf32 or bfloat16, got {self.precision!r}")
        if self.spacing is not None and self.spacing not in SPACINGS:
            raise ValueError(f"spacing must be among {', '.join(SPACINGS)} or None, got {self.spacing!r}")
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale must be in 0..1, got {self.guidance_rescale:g}")
        low, high = self.guidance_interval or (0, 0)
        if not 0 <= low <= high:
            raise ValueError(f"guidance_interval must be lo, hi with 0 <= lo <= hi, got {self.guidance_interval}")


@dataclass(frozen=True, slots=True)
class Point:
    """A sampler, its number of steps and its guidance scale."""

    sampler: str
    steps: int
    guidance: float = 1.0

    def __str__(self) -> str:
        guided = f", guidance {self.guidance:g}" if self.guidance != 1.0 else ""
        return f"{self.sampler}, {self.steps} steps{guided}"


def make_points(
    checkpoint: Checkpoint, samplers: Sequence[str], steps: Sequence[int], guidances: Sequence[float]
) -> tuple[Point, ...]:
    """Return each combination once; `all` means every sampler. Raises ValueError for an unknown sampler."""
    known = checkpoint.samplers
    for name in samplers:
        if name not in (*known, ALL):
            raise ValueError(f"sampler must be {ALL} or among {', '.join(known)}, got {name!r}")
    names = [each for name in samplers for each in (known if name == ALL else (name,))]
    points = [Point(name, count, guidance) for name in names for guidance in guidances for count in steps]
    return tuple(dict.fromkeys(points))


def without_guidance(points: Sequence[Point]) -> tuple[tuple[Point, ...], tuple[LeftOut, ...]]:
    """Return the points with guidance 1, for a checkpoint without a null class, and the omitted scales."""
    scales = sorted({point.guidance for point in points} - {1.0})
    plain = dict.fromkeys(dataclasses.replace(point, guidance=1.0) for point in points)
    why = "the checkpoint has no null class to guide from"
    return tuple(plain), tuple(LeftOut(f"guidance {scale:g}", why) for scale in scales)


def class_map(checkpoint: Checkpoint, class_names: tuple[str, ...]) -> Tensor | None:
    """Map the checkpoint's class numbers to positions in `class_names`, int64 [K]; None if the names differ."""
    names = checkpoint.labels.class_names
    if not names or sorted(names) != sorted(class_names):
        return None
    return torch.tensor([class_names.index(name) for name in names])


def sample_classes(checkpoint: Checkpoint, num_samples: int) -> Tensor | None:
    """Assign classes to samples in turn, int64 [num_samples]; None for an unconditional checkpoint."""
    if checkpoint.net.class_embedding is None:
        return None
    return torch.arange(num_samples) % checkpoint.labels.num_classes


def image_classes(checkpoint: Checkpoint, data: ImageSet) -> Tensor | None:
    """Return the class of each real image, numbered as in the checkpoint: int64 [N].

    If the class names differ, all images get the null class, and without a null class this raises ValueError. Returns
    None for an unconditional checkpoint.
    """
    if checkpoint.net.class_embedding is None:
        return None
    to_data = class_map(checkpoint, data.class_names)
    if data.labels is not None and to_data is not None:
        return to_data.argsort()[data.labels]
    if checkpoint.labels.null_class is None:
        raise ValueError("the checkpoint needs a class, and these images have none that it knows")
    return torch.full((len(data),), checkpoint.labels.null_class)


def random_picks(data: ImageSet, num_images: int, seed: int) -> Tensor:
    """Pick random images regardless of class: int64 [num_images], or fewer if the data has fewer."""
    return torch.randperm(len(data), generator=torch.Generator().manual_seed(seed % 2**63))[:num_images]


def balanced_picks(data: ImageSet, num_images: int, seed: int) -> Tensor:
    """Pick random images, with the classes in turn: int64 [num_images], or fewer if the data has fewer."""
    order = random_picks(data, len(data), seed)
    if data.labels is not None:
        labels = data.labels[order]
        turn = torch.zeros_like(labels)
        for k in range(len(data.class_names)):
            turn[labels == k] = torch.arange(int((labels == k).sum()))
        order = order[(turn * len(data.class_names) + labels).argsort()]
    return order[:num_images]


def class_weights(labels: Tensor, num_classes: int) -> Tensor | None:
    """Return weights that make all classes count equally: labels int64 [N] -> float64 [N].

    Returns None if class sizes differ by at most one, as they do among samples.
    """
    counts = labels.bincount(minlength=num_classes)
    return None if counts.max() - counts.min() <= 1 else (1 / counts.double())[labels]


def compile_options(checkpoint: Checkpoint, options: EvaluateOptions) -> Plan:
    """Compile the sampler in `options`. Raises ValueError if that is impossible."""
    return checkpoint.plan(
        options.sampler, options.steps, guidance=options.guidance, eta=options.eta, spacing=options.spacing
    )


def draw_samples(
    net: Denoiser,
    checkpoint: Checkpoint,
    options: EvaluateOptions,
    *,
    device: torch.device,
    forward: Forward | None = None,
) -> Tensor:
    """Sample images 0 to num_samples-1 of the seed, uint8 [N, C, H, W] on the CPU.

    `net` must be on `device`. It runs with autocast if options.precision is bfloat16; tf32 is a setting of torch, which
    this function does not change. If `forward` is given, it is called instead, without autocast, with tensors on
    `device`. Raises EvaluateError if samples are not finite.
    """
    plan = compile_options(checkpoint, options)
    shape = checkpoint.row_shape
    classes = sample_classes(checkpoint, options.num_samples)
    starts = range(0, options.num_samples, options.batch_size)
    images = []
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=forward is None and options.precision == "bfloat16")
    with tqdm(total=len(starts) * len(plan), unit="pass", desc="samples", disable=None) as progress, autocast:
        for start in starts:
            indices = range(start, min(start + options.batch_size, options.num_samples))

            def z_of(k: int, indices: range = indices) -> Tensor:
                return image_noise(options.seed, indices, k + 1, shape, device)

            x_0 = torch.zeros(0)
            for x in sample_passes(
                forward or net,
                plan,
                image_noise(options.seed, indices, 0, shape, device),
                z_of,
                class_labels=classes[start : indices.stop].to(device) if classes is not None else None,
                null_class=checkpoint.labels.null_class,
                guidance=options.guidance,
                guidance_interval=options.guidance_interval,
                guidance_rescale=options.guidance_rescale,
            ):
                x_0 = x
                progress.update()
            if not bool(torch.isfinite(x_0).all()):
                raise EvaluateError(f"{checkpoint.name}: samples {indices.start}..{indices.stop - 1} are not finite")
            if checkpoint.autoencoder is not None:
                with torch.autocast(device.type, enabled=False):
                    x_0 = images_of(checkpoint.autoencoder, x_0.float())
            images.append(to_uint8(x_0).cpu())
    return torch.cat(images)


def strip_length(checkpoint: Checkpoint) -> int:
    """Return the number of images in a strip: a multiple of the number of classes if all classes fit.

    A strip is at most MAX_STRIP_PX wide, unless MIN_STRIP images are wider than that.
    """
    most = max(MIN_STRIP, min(MAX_STRIP, MAX_STRIP_PX // checkpoint.size_px[1]))
    classes = max(1, checkpoint.labels.num_classes)
    return most // classes * classes or most


def strip(images: Tensor) -> bytes:
    """Join images, uint8 [N, C, H, W], side by side, and return a PNG."""
    images = images[:, : shown_channels(images.shape[1], alpha=images.shape[1] == RGBA)]
    row = torch.cat(list(images), dim=2).movedim(0, 2)  # [H, N W, C]
    out = io.BytesIO()
    Image.fromarray(row.squeeze(2).numpy() if row.shape[2] == 1 else row.contiguous().numpy()).save(out, "PNG")
    return out.getvalue()
