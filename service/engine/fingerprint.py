"""Describes a loaded model to users, and makes its fingerprint: a hash of all that can change output bits."""

import hashlib
import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from PIL import features

from tminus.model.checkpoint import Checkpoint
from tminus.model.noise import NoiseConfig
from tminus.model.scheduler_kinds import KINDS
from tminus.service.engine.executors import Executor
from tminus.service.model_info import LatentInfo, ModelInfo


def make_model_info(
    checkpoint: Checkpoint,
    device: torch.device,
    executor: Executor,
    *,
    exact: bool,
    bits: str | None = None,
    autoencoder_bits: str | None = None,
) -> ModelInfo:
    """Collect the facts about a model that users can see, including its fingerprint."""
    net, noise, labels = checkpoint.net, checkpoint.noise, checkpoint.labels
    return ModelInfo(
        name=checkpoint.name,
        architecture=net.config.class_name,
        num_parameters=sum(p.numel() for p in net.parameters()),
        height_px=checkpoint.size_px[0],
        width_px=checkpoint.size_px[1],
        channels=checkpoint.image_shape[0],
        alpha=checkpoint.alpha,
        latent=_latent_info(checkpoint),
        num_timesteps=noise.num_train_timesteps,
        beta_schedule=noise.levels,
        prediction_type=noise.prediction_type,
        variance_type=noise.variance_type,
        timestep_spacings={sampler: noise.default_spacing(sampler) for sampler in checkpoint.samplers},
        steps_offset=noise.steps_offset,
        log_sigmas=tuple(noise.schedule().log_sigmas),
        fractional=checkpoint.fractional,
        continuous=noise.is_continuous,
        clip=noise.clip_sample,
        samplers=checkpoint.samplers,
        tables=checkpoint.tables,
        refused_tables=checkpoint.refused_tables,
        student=checkpoint.student,
        folded_guidance=checkpoint.folded_guidance,
        default_sampler=checkpoint.default_sampler,
        recommended=checkpoint.settings,
        ladder=checkpoint.ladder,
        conditional=net.class_embedding is not None,
        class_names=labels.class_names,
        null_class=labels.null_class,
        weights_hash=checkpoint.weights_hash,
        fingerprint=fingerprint(
            checkpoint, device, executor, exact=exact, bits=bits, autoencoder_bits=autoencoder_bits
        ),
        device=_device_name(device),
        executor=executor.name,
        precision=executor.precision,
        executor_details=executor.details,
        exact=exact,
    )


def _latent_info(checkpoint: Checkpoint) -> LatentInfo | None:
    if (autoencoder := checkpoint.autoencoder) is None:
        return None
    return LatentInfo(autoencoder.config.kind, *checkpoint.row_shape, autoencoder.config.scaling_factor)


def _noise_fields(noise: NoiseConfig) -> dict[str, Any]:
    """Return the noise settings that can change output bits.

    If the schedule is not continuous, the settings for continuous schedules are left out.
    """
    fields = asdict(noise)
    if noise.is_continuous:
        return fields
    kinds = [kind for kind in KINDS if kind.family in ("betas", "consistency")]
    names = {kind.other_names.get(name, name) for kind in kinds for name in kind.fields}
    return {name: fields[name] for name in ("default_sampler", *names)}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def fingerprint(
    checkpoint: Checkpoint,
    device: torch.device,
    executor: Executor,
    *,
    exact: bool,
    bits: str | None = None,
    autoencoder_bits: str | None = None,
) -> str:
    """Hash everything but spec and weights that can change output bits: noise schedule, versions, device, passes.

    bits: a hash of an exact executor's outputs on fixed rows. It replaces the description of the passes, so that other
    pass sizes with the same bits give the same fingerprint. autoencoder_bits: for a latent model, a hash of the
    autoencoder's outputs on fixed inputs.
    """
    parts = {
        "noise": _noise_fields(checkpoint.noise),
        "null_class": checkpoint.labels.null_class,
        "tables": [table.hash for table in checkpoint.tables],
        "tminus": version("tminus"),
        "torch": torch.__version__,
        "png": (version("pillow"), features.version("zlib")),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "precision": executor.precision,
        "executor": executor.name,
        "passes": bits if exact and bits is not None else f"{executor.details}, {torch.get_num_threads()} threads",
        "exact": exact,
    }
    if not (exact and bits is not None):  # weights_hash does not cover how the network uses the weights
        parts["net"] = checkpoint.net.config.to_dict()
    if checkpoint.alpha:  # set in tminus.json, not in the weights
        parts["alpha"] = True
    if autoencoder_bits is not None:
        parts["autoencoder"] = autoencoder_bits
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
