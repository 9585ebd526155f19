"""Checkpoints of lucidrains/denoising-diffusion-pytorch: `model-N.pt` files, or only the state dict."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tminus.model.files import CheckpointError
from tminus.model.formats.conversion import CLIPS, HO_BETAS, HO_TIMESTEPS, Converted, GivenFacts, numbered
from tminus.model.networks.lucidrains import LucidrainsConfig
from tminus.model.noise import NoiseConfig, make_betas

FORMAT = "lucidrains/denoising-diffusion-pytorch"
NET = "model."  # prefix of the network's keys in the state dict of a GaussianDiffusion
EMA = "ema_model."  # prefix of the GaussianDiffusion's keys in `model-N.pt`
OF_FLOAT32 = 1e-5  # relative tolerance, because the tables in the file are float32
NOTE = "the timestep's sines and cosines have theta 10000, and images were scaled to [-1, 1], as by default"


def weights_of(loaded: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the averaged weights from a Trainer's `model-N.pt`, or None for another file."""
    ema = loaded.get("ema")
    if not isinstance(ema, dict) or not isinstance(loaded.get("model"), dict):
        return None
    return {key.removeprefix(EMA): value for key, value in ema.items() if str(key).startswith(EMA)}


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict has this format."""
    return "model.init_conv.weight" in state and "betas" in state


def convert(state: Mapping[str, Tensor], given: GivenFacts) -> Converted:
    """Convert a state dict. Raises MissingFacts, FactsError, and CheckpointError for an unsupported network."""
    net = {key.removeprefix(NET): value for key, value in state.items() if key.startswith(NET)}
    _refuse_others(net)
    prediction = _prediction(state)
    needed = ["image_size"] + (["prediction"] if prediction is None else [])
    given.check(f"a file of {FORMAT}", needed)
    assert given.image_size is not None
    given.check_of_betas()
    channels, out = net["init_conv.weight"].shape[1], len(net["final_conv.weight"])
    levels = len({key.split(".")[1] for key in net if key.startswith("downs.")})
    linear = [f"downs.{level}.2.to_out.0.weight" in net for level in range(levels)]
    # mem_kv is [2, heads, d, n] for linear attention, and [2, heads, n, d] for full attention.
    mem = [net[f"downs.{level}.2.mem_kv"].shape for level in range(levels)]
    config = LucidrainsConfig(
        sample_size=given.image_size,
        in_channels=channels,
        out_channels=out,
        dim=net["time_mlp.1.weight"].shape[1],
        init_dim=len(net["init_conv.weight"]),
        level_widths=tuple(_width(net, level) for level in range(levels)),
        attn_heads=tuple(shape[1] for shape in mem),
        attn_dim_head=tuple(shape[2 if is_linear else 3] for shape, is_linear in zip(mem, linear, strict=True)),
        full_attn=tuple(not is_linear for is_linear in linear),
        num_mem_kv=mem[0][3 if linear[0] else 2],
    )
    noise = NoiseConfig(
        num_train_timesteps=len(state["betas"]),
        **_schedule(state["betas"]),
        prediction_type=str(prediction or given.prediction),
        variance_type="learned_range" if out == 2 * channels else "fixed_small",
    )
    return Converted(FORMAT, config, net, noise, numbered(None), (NOTE, CLIPS))


def _refuse_others(net: Mapping[str, Tensor]) -> None:
    if any(key.startswith(("classes_emb.", "classes_mlp.", "null_classes_emb")) for key in net):
        raise CheckpointError(f"the class-conditional network of {FORMAT}, which is not served")
    if "time_mlp.0.weights" in net:
        raise CheckpointError(f"a network of {FORMAT} with random or learned frequencies, which is not served")
    channels, out = net["init_conv.weight"].shape[1], len(net["final_conv.weight"])
    if channels == 2 * out:
        raise CheckpointError(f"a network of {FORMAT} with self_condition, which is not served")
    if "mid_attn.mem_kv" not in net:
        raise CheckpointError(f"a network of {FORMAT} of an early version, without mem_kv, which is not served")


def _width(net: Mapping[str, Tensor], level: int) -> int:
    down = f"downs.{level}.3.1.weight"
    return len(net[down] if down in net else net[f"downs.{level}.3.weight"])


def _schedule(betas: Tensor) -> dict[str, Any]:
    """Return the config fields for these betas: a named schedule if one matches, otherwise trained_betas."""
    betas, scale = betas.double(), HO_TIMESTEPS / len(betas)
    named: tuple[dict[str, Any], ...] = (
        {"beta_schedule": "linear", "beta_start": HO_BETAS[0] * scale, "beta_end": HO_BETAS[1] * scale},
        {"beta_schedule": "squaredcos_cap_v2"},
    )
    for fields in named:
        ends = [fields[end] for end in ("beta_start", "beta_end") if end in fields]
        if torch.allclose(betas, make_betas(fields["beta_schedule"], len(betas), *ends), rtol=OF_FLOAT32, atol=0):
            return fields
    return {"trained_betas": tuple(betas.tolist())}


def _prediction(state: Mapping[str, Tensor]) -> str | None:
    """Infer the prediction type from the loss weights. Returns None if they match no type.

    The weights are snr / snr for eps, snr for x_0, and snr / (snr + 1) for v. With min-SNR weighting (Hang et al.
    2023), the numerator is limited to gamma.
    """
    if "loss_weight" not in state:
        return None
    alpha_bar = (1 - state["betas"].double()).cumprod(0)
    snr = alpha_bar / (1 - alpha_bar)
    for name, over in (("epsilon", snr), ("sample", torch.ones_like(snr)), ("v_prediction", snr + 1)):
        weighted = state["loss_weight"].double() * over
        if torch.allclose(weighted, snr.clamp(max=float(weighted.max())), rtol=1e-3, atol=1e-9):
            return name
    return None
