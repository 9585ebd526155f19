"""Samples as they are served: rounded to uint8, and sample i is image i of a request with this seed.

The classes of a checkpoint and of a data set are matched by name, not by number.
"""

import io
import time

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tminus.model.checkpoint import Checkpoint
from tminus.model.denoiser import Denoiser
from tminus.model.evaluation.options import EvaluateError, EvaluateOptions
from tminus.model.evaluation.result_cache import BatchCache
from tminus.model.guidance import Forward
from tminus.model.latent.latents import images_of
from tminus.model.pixels import to_uint8
from tminus.model.rng import image_noise
from tminus.model.samplers import Plan, sample
from tminus.model.training.data import ImageSet

MAX_STRIP, MAX_STRIP_PX, MIN_STRIP = 16, 1024, 4  # images of a strip, its width


def class_map(checkpoint: Checkpoint, class_names: tuple[str, ...]) -> Tensor | None:
    """Map each class of the checkpoint to its number in `class_names`, int64 [K]; None where the names differ."""
    names = checkpoint.labels.class_names
    if not names or sorted(names) != sorted(class_names):
        return None
    return torch.tensor([class_names.index(name) for name in names])


def sample_classes(checkpoint: Checkpoint, num_samples: int) -> Tensor | None:
    """Give each sample a class in turn, int64 [num_samples]; None for an unconditional checkpoint."""
    if checkpoint.net.class_embedding is None:
        return None
    return torch.arange(num_samples) % checkpoint.labels.num_classes


def image_classes(checkpoint: Checkpoint, data: ImageSet) -> Tensor | None:
    """The checkpoint's class of each real image, int64 [N]; its null class where names do not match.

    None for an unconditional checkpoint. Raises ValueError where names do not match and there is no null class.
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
    """Pick images at random, as many of a class as chance gives: int64 [num_images], or fewer if there are fewer."""
    return torch.randperm(len(data), generator=torch.Generator().manual_seed(seed % 2**63))[:num_images]


def balanced_picks(data: ImageSet, num_images: int, seed: int) -> Tensor:
    """Pick images at random, classes in turn as among samples: int64 [num_images], or fewer if there are fewer."""
    order = random_picks(data, len(data), seed)
    if data.labels is not None:
        labels = data.labels[order]
        turn = torch.zeros_like(labels)
        for k in range(len(data.class_names)):
            turn[labels == k] = torch.arange(int((labels == k).sum()))
        order = order[(turn * len(data.class_names) + labels).argsort()]
    return order[:num_images]


def class_weights(labels: Tensor, num_classes: int) -> Tensor | None:
    """Weights by which each class counts as much as any other, as among samples: int64 [N] to float64 [N].

    None where images count as they are: classes in turn differ by one image at most, and so do these.
    """
    counts = labels.bincount(minlength=num_classes)
    return None if counts.max() - counts.min() <= 1 else (1 / counts.double())[labels]


def compile_options(checkpoint: Checkpoint, options: EvaluateOptions) -> Plan:
    """Compile the sampler that the options name. Raises ValueError for one that is not possible."""
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
    cache: BatchCache | None = None,
) -> Tensor:
    """Sample images 0..num_samples-1 of the seed, uint8 [N, C, H, W] on the CPU. `net` lies on `device`.

    forward=None runs the net itself in options.precision; any other is called as it is, with tensors on `device`.
    The batches that `cache` has are not made again, and the others are kept there.
    Raises EvaluateError for samples that are not finite, and OSError where a batch cannot be kept.
    """
    cache = cache or BatchCache(None, {})
    plan = compile_options(checkpoint, options)
    shape = checkpoint.row_shape
    classes = sample_classes(checkpoint, options.num_samples)
    starts = range(0, options.num_samples, options.batch_size)
    images = []
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=forward is None and options.precision == "bfloat16")
    with tqdm(total=len(starts) * len(plan), unit="pass", desc="samples", disable=None) as progress, autocast:

        def on_step(_: int) -> None:
            progress.update()

        for start in starts:
            indices = range(start, min(start + options.batch_size, options.num_samples))
            if (batch := cache.read(indices)) is not None:
                images.append(batch)
                progress.update(len(plan))
                continue
            started_s = time.perf_counter()

            def z_of(k: int, indices: range = indices) -> Tensor:
                return image_noise(options.seed, indices, k + 1, shape, device)

            x_0 = sample(
                forward or net,
                plan,
                image_noise(options.seed, indices, 0, shape, device),
                z_of,
                class_labels=classes[start : indices.stop].to(device) if classes is not None else None,
                null_class=checkpoint.labels.null_class,
                guidance=options.guidance,
                guidance_interval=options.guidance_interval,
                guidance_rescale=options.guidance_rescale,
                on_step=on_step,
            )
            if not bool(torch.isfinite(x_0).all()):
                raise EvaluateError(f"{checkpoint.name}: samples {indices.start}..{indices.stop - 1} are not finite")
            if checkpoint.autoencoder is not None:
                with torch.autocast(device.type, enabled=False):
                    x_0 = images_of(checkpoint.autoencoder, x_0.float())
            images.append(to_uint8(x_0).cpu())
            cache.write(indices, images[-1], time.perf_counter() - started_s)
    return torch.cat(images)


def strip_length(checkpoint: Checkpoint) -> int:
    """How many images a strip shows: each class as often as the others where they fit, and no more than 1024 px."""
    most = max(MIN_STRIP, min(MAX_STRIP, MAX_STRIP_PX // checkpoint.size_px[1]))
    classes = max(1, checkpoint.labels.num_classes)
    return most // classes * classes or most


def strip(images: Tensor) -> bytes:
    """Lay images uint8 [N, C, H, W] side by side: a PNG."""
    row = torch.cat(list(images), dim=2).movedim(0, 2)  # [H, N W, C]
    out = io.BytesIO()
    Image.fromarray(row.squeeze(2).numpy() if row.shape[2] == 1 else row.contiguous().numpy()).save(out, "PNG")
    return out.getvalue()
