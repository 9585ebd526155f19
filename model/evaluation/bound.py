"""The variational bound of a checkpoint on held-out images, and the curve of its terms."""

import torch
from torch import Tensor
from tqdm import tqdm

from tminus.model.checkpoint import Checkpoint
from tminus.model.denoiser import Denoiser
from tminus.model.evaluation.classes import balanced_picks, image_classes
from tminus.model.evaluation.figures import Bound, LeftOut, Term
from tminus.model.evaluation.options import EvaluateOptions
from tminus.model.loss import variational_bound
from tminus.model.pixels import to_model_range
from tminus.model.training.data import ImageSet


def measure_bound(net: Denoiser, checkpoint: Checkpoint, test: ImageSet, options: EvaluateOptions) -> Bound | LeftOut:
    """Measure the bound on options.bound_images of the test split, each with timesteps and noise of its own.

    `net` lies on the device that measures. LeftOut where the bound is not defined, with the reason.
    """
    noise, schedule = checkpoint.noise, checkpoint.noise.schedule()
    if checkpoint.autoencoder is not None:
        return LeftOut("bound", "it is one of pixels, and this network's are latents")
    if checkpoint.student is not None:
        return LeftOut("bound", "a student predicts where trajectories end, not the mean of x_0, so it has none")
    if noise.variance_type == "learned_range":
        return LeftOut("bound", "it is measured for a fixed variance only, and this network learned its own")
    if noise.prediction_type == "epsilon" and schedule.alpha_bar[-1] <= 0:
        return LeftOut("bound", "eps says nothing of x_0 at the last timestep, where alpha_bar is 0")
    try:
        classes = image_classes(checkpoint, test)
    except ValueError as error:
        return LeftOut("bound", str(error))
    timesteps = min(options.bound_timesteps, schedule.num_timesteps - 1)
    picked = balanced_picks(test, options.bound_images, options.seed)
    starts = range(0, len(picked), options.batch_size)
    device = next(net.parameters()).device
    parts = []
    with tqdm(total=len(starts) * (timesteps + 1), unit="pass", desc="bound", disable=None) as progress:

        def counted(x_t: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
            progress.update()
            out: Tensor = net(x_t, t, class_labels)
            return out

        for start in starts:
            batch = picked[start : start + options.batch_size]
            # Numbered by position in the split, so that an image's terms do not depend on which others are picked.
            part = variational_bound(
                counted,
                noise,
                schedule,
                to_model_range(test.images[batch].to(device)),
                classes[batch].to(device) if classes is not None else None,
                seed=options.seed,
                indices=batch.tolist(),
                timesteps=timesteps or None,
            )
            parts.append(part)
    total = torch.cat([part.total for part in parts])
    L_T, L_steps, L_0 = (
        float(torch.cat([getattr(part, name) for part in parts]).mean()) for name in ("L_T", "L_steps", "L_0")
    )
    standard_error = float(total.std(correction=0)) / max(1, len(picked) - 1) ** 0.5
    drawn = torch.cat([part.L_drawn for part in parts], dim=1).mean(1).tolist()  # [S]
    terms = tuple(Term(low, high - 1, mean) for (low, high), mean in zip(parts[0].runs, drawn, strict=True))
    return Bound(L_T, L_steps, L_0, float(total.mean()), standard_error, len(picked), timesteps, terms)
