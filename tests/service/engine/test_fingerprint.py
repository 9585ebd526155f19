"""What a loaded model says of itself, and its fingerprint: all that can change a bit, and nothing else."""

from dataclasses import replace

import pytest
import torch

from tests.service.conftest import MakeCheckpoint
from tminus.model.catalogue import SAMPLERS, Recommended
from tminus.model.checkpoint import Checkpoint
from tminus.model.noise import NoiseConfig
from tminus.service.engine import fingerprint
from tminus.service.engine.engine import Engine
from tminus.service.engine.executors import EagerExecutor
from tminus.service.engine.fingerprint import make_model_info

CPU = torch.device("cpu")
OURS = ("tminus", "pillow")


def test_the_model_is_described_as_it_was_loaded(tiny: Checkpoint, make_checkpoint: MakeCheckpoint) -> None:
    executor = EagerExecutor(tiny.net, CPU, sizes=(1, 2))
    info = Engine(tiny, executor, CPU, max_rows=32, max_jobs=16).info
    assert info == make_model_info(tiny, CPU, executor, exact=True)
    assert (info.executor, info.precision, info.exact) == ("eager", "float32", True)
    assert info.executor_details == "channels_last, passes of 1, 2"
    own = {"ddpm", "ddim", "plms", "pndm"}
    spacings = {name: "leading" if name in own else "karras" for name in SAMPLERS}
    assert info.timestep_spacings == spacings | {"tuned": "table"}
    assert info.fractional
    assert info.num_parameters == sum(parameter.numel() for parameter in tiny.net.parameters())
    assert (info.height_px, info.width_px, info.channels, info.num_timesteps) == (8, 8, 1, 50)
    assert (info.conditional, info.class_names, info.null_class) == (True, ("cat", "dog", "3d-print"), 3)
    assert (info.samplers, info.default_sampler) == ((*SAMPLERS, "tuned"), "ddpm")
    assert info.weights_hash == tiny.weights_hash
    assert len(info.log_sigmas) == 50
    assert info.log_sigmas == tuple(sorted(info.log_sigmas))
    assert "CPU" in info.device
    other = make_model_info(make_checkpoint(classes=False, sample_size=(4, 10)), CPU, executor, exact=False)
    assert not other.exact
    assert (other.conditional, other.class_names, other.null_class) == (False, (), None)
    assert (other.height_px, other.width_px) == (4, 10)


def test_whether_the_fourth_channel_is_alpha_is_in_the_fingerprint(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint(in_channels=4, out_channels=4)
    executor = EagerExecutor(checkpoint.net, CPU)
    plain, alpha = (
        make_model_info(replace(checkpoint, alpha=each), CPU, executor, exact=True) for each in (False, True)
    )
    assert (plain.shown_channels, alpha.shown_channels) == (3, 4)
    assert plain.fingerprint != alpha.fingerprint


def test_what_only_formulas_of_noise_have_is_in_their_fingerprint_alone(tiny: Checkpoint) -> None:
    executor = EagerExecutor(tiny.net, CPU)

    def made(noise: NoiseConfig) -> str:
        return make_model_info(replace(tiny, noise=noise), CPU, executor, exact=True).fingerprint

    flow = NoiseConfig(prediction_type="flow", default_sampler="euler")
    assert made(replace(tiny.noise, shift=3.0, sampling_eps=1e-3)) == made(tiny.noise)
    assert made(replace(tiny.noise, steps_offset=1)) != made(tiny.noise)
    assert made(replace(flow, shift=3.0)) != made(flow)


def test_the_fingerprint_names_the_build_and_not_the_weights(make_checkpoint: MakeCheckpoint) -> None:
    one, other = make_checkpoint(seed=1), make_checkpoint(seed=2)
    assert one.weights_hash != other.weights_hash
    executors = [EagerExecutor(checkpoint.net, CPU) for checkpoint in (one, other)]
    fingerprints = [make_model_info(one, CPU, executor, exact=True).fingerprint for executor in executors]
    assert fingerprints[0] == fingerprints[1] == make_model_info(other, CPU, executors[1], exact=True).fingerprint


def test_all_that_may_move_a_bit_is_in_the_fingerprint(tiny: Checkpoint) -> None:
    ways: list[dict[str, object]] = [
        {}, {"exact": False}, {"channels_last": False}, {"sizes": (1,)}, {"sizes": (1, 2)}, {"precision": "bfloat16"},
    ]  # fmt: skip
    try:
        fingerprints = {fingerprint_of(tiny, **way) for way in ways}  # type: ignore[arg-type]
    finally:
        EagerExecutor(tiny.net, CPU)  # gives the net its layout back
    assert len(fingerprints) == len(ways)


def test_how_the_network_uses_its_weights_is_in_the_fingerprint_or_in_the_bits(make_checkpoint: MakeCheckpoint) -> None:
    one, other = make_checkpoint(), make_checkpoint(flip_sin_to_cos=False)
    assert one.weights_hash == other.weights_hash
    assert fingerprint_of(one, exact=False) != fingerprint_of(other, exact=False)
    assert fingerprint_of(one, bits="0") == fingerprint_of(other, bits="0"), "the bits would differ"


def fingerprint_of(checkpoint: Checkpoint, *, exact: bool = True, bits: str | None = None, **fields: object) -> str:
    executor = EagerExecutor(checkpoint.net, CPU, **fields)  # type: ignore[arg-type]
    return make_model_info(checkpoint, CPU, executor, exact=exact, bits=bits).fingerprint


def test_every_field_of_the_noise_config_is_in_the_fingerprint(tiny: Checkpoint) -> None:
    """The weights' hash does not tell it, and it moves every bit."""
    changes: list[dict[str, object]] = [
        {}, {"clip_sample_range": 0.5}, {"clip_sample": False}, {"variance_type": "fixed_large"},
        {"prediction_type": "sample"}, {"beta_end": 0.2}, {"num_train_timesteps": 60}, {"steps_offset": 1},
        {"set_alpha_to_one": False},
    ]  # fmt: skip
    for bits in (None, "0123"):
        noises = [replace(tiny.noise, **change) for change in changes]  # type: ignore[arg-type]
        found = {fingerprint_of(replace(tiny, noise=noise), bits=bits) for noise in noises}
        assert len(found) == len(changes)


def test_what_is_recommended_is_told_and_moves_no_bit(tiny: Checkpoint) -> None:
    other = replace(tiny, recommended=Recommended("dpmpp_2m", 20, 1.5))
    executor = EagerExecutor(tiny.net, CPU)
    assert make_model_info(tiny, CPU, executor, exact=True).recommended == Recommended("dpmpp_2m", 20)
    assert make_model_info(other, CPU, executor, exact=True).recommended == other.recommended
    assert fingerprint_of(tiny) == fingerprint_of(other)


def test_the_versions_of_what_makes_the_bytes_are_in_the_fingerprint(tiny: Checkpoint) -> None:
    found, real = [fingerprint_of(tiny, bits="0123")], fingerprint.version
    for owner, name, value in (
        (torch, "__version__", "9.9.9"),
        (fingerprint.features, "version", lambda name: "9.9.9" if name == "zlib" else None),
        *((fingerprint, "version", lambda name, of=of: "9.9.9" if name == of else real(name)) for of in OURS),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, value)
            found.append(fingerprint_of(tiny, bits="0123"))
    assert len(set(found)) == len(found)


def test_the_bits_of_an_exact_executor_stand_in_the_fingerprint_for_how_passes_are_run(tiny: Checkpoint) -> None:
    one, other = {"sizes": (1,)}, {"sizes": (1, 2)}
    assert fingerprint_of(tiny, bits="0123", **one) == fingerprint_of(tiny, bits="0123", **other)
    assert fingerprint_of(tiny, bits="0123", **one) != fingerprint_of(tiny, bits="0124", **one)
    assert fingerprint_of(tiny, **one) != fingerprint_of(tiny, **other)
    names = {fingerprint_of(tiny, exact=False, bits="0123", **fields) for fields in (one, other)}
    assert len(names) == 2, "what is not exact promises no bits"
    float32, bfloat16 = (fingerprint_of(tiny, bits="0123", precision=name, **one) for name in ("float32", "bfloat16"))
    assert float32 != bfloat16
