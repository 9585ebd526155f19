"""Checkpoints of dome272/Diffusion-Models-pytorch: a plain state dict in `ckpt.pt` or `ema_ckpt.pt`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tminus.model.formats.conversion import Converted, GivenFacts, numbered
from tminus.model.networks.dome272 import Dome272Config

FORMAT = "dome272/Diffusion-Models-pytorch"


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict has this format."""
    return "inc.double_conv.0.weight" in state and "sa1.mha.in_proj_weight" in state


def convert(state: Mapping[str, Tensor], given: GivenFacts) -> Converted:
    """Convert a state dict. Raises MissingFacts and FactsError.

    The project samples with variance beta, and does not clip x_0. Without a label, it adds nothing to the embedding of
    the timestep, so the null class gets an embedding of zeros.
    """
    of_noise = [name for name in given.needed_for_noise() if name not in ("prediction", "variance")]
    given.check(f"a file of {FORMAT}", ["image_size", *of_noise], given.taken_for_noise())
    assert given.image_size is not None
    state = dict(state)
    classes = None
    if "label_emb.weight" in state:
        known = state.pop("label_emb.weight")
        state["class_embedding.weight"] = torch.cat([known, torch.zeros_like(known[:1])])
        classes = len(known) + 1
    config = Dome272Config(
        sample_size=given.image_size,
        in_channels=state["inc.double_conv.0.weight"].shape[1],
        out_channels=len(state["outc.weight"]),
        num_class_embeds=classes,
        time_dim=state["down1.emb_layer.1.weight"].shape[1],
        middle=tuple(
            len(state[f"bot{k}.double_conv.3.weight"]) for k in (1, 2, 3) if f"bot{k}.double_conv.3.weight" in state
        ),
    )
    noise = given.noise(clip=False)  # The network predicts eps; the project samples with variance beta.
    note = "x_0 is not clipped, as in its own loop; solvers of few steps may need clip=true"
    return Converted(
        FORMAT,
        config,
        state,
        noise,
        numbered(classes, null_class=classes is not None),
        (*given.noise_notes(noise), note),
    )
