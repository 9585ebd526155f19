import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from safetensors.torch import save_file

from tests.model.formats.conftest import close_to_scale, randomised
from tests.model.formats.dome import Dome
from tests.model.formats.guided import Guided
from tests.model.formats.ho import Ho
from tests.tiny import TINY
from tminus.model.checkpoint import load_checkpoint
from tminus.model.files import CheckpointError
from tminus.model.formats.conversion import FactsError, GivenFacts
from tminus.model.formats.read import convert, read_foreign

with warnings.catch_warnings(action="ignore"):
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

CIFAR = GivenFacts(image_size=16, timesteps=1000, beta_schedule="linear", prediction="epsilon", variance="fixed_large")
FACTS: dict[str, Any] = {"timesteps": 40, "beta_schedule": "linear", "prediction": "v_prediction"}
FIXED = GivenFacts(**FACTS, variance="fixed_small")


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    return randomised(Ho(blocks=1)).state_dict()


def refusal(file: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_foreign(file, CIFAR)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_same_weights_are_read_from_each_kind_of_file(state: dict[str, Any], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "plain.ckpt")
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "parallel.pt")
    save_file(state, tmp_path / "safe.safetensors")
    hashes = set()
    for file in ("plain.ckpt", "parallel.pt", "safe.safetensors"):
        convert(tmp_path / file, tmp_path / f"{file}-out", CIFAR)
        hashes.add(load_checkpoint(tmp_path / f"{file}-out").weights_hash)
    assert len(hashes) == 1


def test_file_that_is_no_checkpoint_is_told_in_one_line(state: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "a pointer of Git LFS" in refusal(file)
    file.write_bytes(b"\x00" * 100)
    assert "it is not plain tensors" in refusal(file)
    torch.save(state, file)
    file.write_bytes(file.read_bytes()[:-5000])
    assert refusal(file) == f"{file}: truncated or not a weights file"
    file.write_bytes(b"\x80\x02.")  # a pickle that ends before it has a value
    assert refusal(file) == f"{file}: truncated or not a weights file"
    torch.save({"state_dict": state, "epoch": 3}, file)
    assert "must hold a state dict of tensors, got a dict of state_dict, epoch" in refusal(file)
    torch.save({"layer.weight": torch.ones(2)}, file)
    assert "of no known format" in refusal(file)
    assert "its first weight is 'layer.weight'" in refusal(file)
    torch.save({}, file)
    assert "hold no tensors" in refusal(file)
    torch.save({key: value.to(torch.int8) for key, value in state.items()}, file)
    assert "must be of float32, float16, bfloat16, float64, got torch.int8" in refusal(file)


def test_weights_that_are_not_finite_leave_no_folder(state: dict[str, Any], tmp_path: Path) -> None:
    torch.save({**state, "conv_in.bias": torch.full((32,), torch.nan)}, tmp_path / "nan.pt")
    with pytest.raises(CheckpointError, match=r"conv_in\.bias holds NaN"):
        convert(tmp_path / "nan.pt", tmp_path / "out", CIFAR)
    assert not (tmp_path / "out").exists()


def test_folder_that_holds_something_is_left_as_it_is(state: dict[str, Any], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "plain.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        convert(tmp_path / "plain.pt", tmp_path / "out", CIFAR)
    assert (tmp_path / "out" / "note").read_text() == "mine"


FILES: dict[str, Any] = {
    "openai": lambda: Guided(heads=1, blocks=1).state_dict(),
    "ddpm": lambda: Ho(blocks=1).state_dict(),
    "dome272": lambda: Dome(classes=3).state_dict(),
    "lucidrains": lambda: GaussianDiffusion(Unet(dim=8, dim_mults=(1, 2)), image_size=16, timesteps=10).state_dict(),
}
NOISE = {"timesteps": 1000, "beta_schedule": "linear", "prediction": "epsilon", "variance": "fixed_small"}
ALL: dict[str, Any] = {
    "openai": NOISE | {"heads": 1},
    "ddpm": NOISE,
    "dome272": {"timesteps": 1000, "beta_schedule": "linear"},
    "lucidrains": {},
}


def less(ending: str, *more: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {key: value for key, value in state.items() if not any(end in key for end in (ending, *more))}


def plus(**tensors: torch.Tensor) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: state | {key.replace("__", "."): value for key, value in tensors.items()}


OTHERS: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    ("ddpm", less(".downsample."), "without resamp_with_conv"),
    ("ddpm", lambda s: {k.replace("nin_shortcut", "conv_shortcut"): v for k, v in s.items()}, "conv_shortcut (3x3)"),
    ("ddpm", plus(conv_in__weight=torch.ones(64, 3, 3, 3)), "ch_mult that does not begin with 1"),
    ("ddpm", plus(extra__weight=torch.ones(2)), "which that has not"),
    ("ddpm", less("conv_out.weight"), "looks like the PyTorch port"),
    ("lucidrains", plus(model__classes_emb__weight=torch.ones(2, 2)), "class-conditional network"),
    ("lucidrains", plus(model__time_mlp__0__weights=torch.ones(8)), "random or learned frequencies"),
    ("lucidrains", plus(model__init_conv__weight=torch.ones(8, 6, 7, 7)), "self_condition"),
    ("lucidrains", less("mem_kv"), "without mem_kv"),
    ("lucidrains", less("downs.1.3.weight"), "looks like lucidrains"),
    ("lucidrains", plus(model__extra=torch.ones(1)), "which that has not"),
    ("openai", less("output_blocks."), "a classifier of guided-diffusion"),
    ("openai", plus(input_blocks__1__1__transformer_blocks__0__norm__weight=torch.ones(2)), "cross-attention"),
    ("openai", plus(tail__weight=torch.ones(2)), "tail.weight, which is not known (and 0 more)"),
    ("openai", less("output_blocks.1.2", "input_blocks.2."), "levels do not repeat, as without conv_resample"),
    ("openai", less("out.0.weight"), "lacks conv_norm_out.weight"),
    ("openai", less("input_blocks.1.0.in_layers.2.weight"), "looks like OpenAI's"),
    ("openai", plus(out__2__bias=torch.ones(2)), "wrong shape of conv_out.bias"),
    ("openai", plus(input_blocks__0__0__weight=torch.ones(32, 6, 3, 3)), "only 1..64 channels in and as many out"),
]


@pytest.mark.parametrize(("name", "change", "message"), OTHERS, ids=[message for *_, message in OTHERS])
def test_file_of_another_network_is_refused_by_what_it_is(
    name: str, change: Callable[[dict[str, Any]], dict[str, Any]], message: str, tmp_path: Path
) -> None:
    torch.save(change(FILES[name]()), tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_foreign(tmp_path / "other.pt", GivenFacts(image_size=16, **ALL[name]))


@pytest.mark.parametrize("name", FILES)
def test_any_damage_to_a_file_is_one_clear_line_that_names_it(name: str, tmp_path: Path) -> None:
    whole, rng, file = FILES[name](), random.Random(0), tmp_path / "damaged.pt"
    given = GivenFacts(image_size=16, **ALL[name])
    keys = sorted(whole)

    def damaged() -> dict[str, Any]:
        state, key = dict(whole), rng.choice(keys)
        value = state.pop(key)
        kind = rng.choice(["gone", "number", "flat", "deeper", "longer", "other name", "huge number", "no number"])
        if kind in ("number", "flat", "deeper", "longer"):
            state[key] = {
                "number": torch.ones(()),
                "flat": value.flatten(),
                "deeper": value[None, None],
                "longer": torch.cat([value, value]) if value.ndim else value,
            }[kind]
        elif kind != "gone":
            parts = key.split(".")
            at = rng.randrange(len(parts))
            parts[at] = {"other name": "x", "huge number": "99999999999", "no number": "1x"}[kind]
            state[".".join(parts)] = value
        return state

    for _ in range(20):
        torch.save(damaged(), file)
        try:
            read_foreign(file, given)  # some damage leaves a network that could be
        except FactsError as error:  # what is damaged may have said something that was given too
            assert str(error).startswith("--")
        except CheckpointError as error:
            assert str(error).startswith(f"{file}: ")
            assert "\n" not in str(error)
            assert not re.search(r"index out of range|to unpack|must match the size", str(error)), "Python's own words"


@pytest.fixture
def theirs() -> UNet2DModel:
    fields = {key: value for key, value in TINY.to_dict().items() if key != "_class_name"}
    net = randomised(UNet2DModel(**fields))
    assert isinstance(net, UNet2DModel)
    return net


@pytest.mark.parametrize("folder", ["", "unet"])
def test_network_alone_is_converted_with_the_scheduler_that_is_given(
    theirs: UNet2DModel, folder: str, tmp_path: Path
) -> None:
    theirs.save_pretrained(tmp_path / "bare" / folder)
    converted = convert(tmp_path / "bare", tmp_path / "out", FIXED)
    assert converted.format == "diffusers' UNet2DModel without a scheduler"
    ours, pipeline = load_checkpoint(tmp_path / "out"), DDPMPipeline.from_pretrained(tmp_path / "out")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 39])
    with torch.no_grad():
        close_to_scale(ours.net(x, t), theirs(x, t).sample)
    assert (ours.noise.num_train_timesteps, ours.noise.prediction_type) == (40, "v_prediction")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"variance": "learned"}, "--variance must be fixed_small or fixed_large, got 'learned'"),
        ({"image_size": 0}, r"--image-size must be 1\.\.4096, got 0"),
        ({"timesteps": 10**9}, r"--timesteps must be 1\.\.100000, got 1000000000"),
        ({"beta_start": -0.1}, r"--beta-start must be 0\.\.1, got -0.1"),
        ({"heads": 4, "head_width": 64}, "--heads or --head-width, not both: got 4 and 64"),
    ],
)
def test_value_out_of_bounds_is_refused_by_its_flag(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GivenFacts(**facts)


def test_ends_of_a_schedule_are_asked_for_where_projects_differ_and_told_where_they_are_taken() -> None:
    facts = {"timesteps": 1000, "prediction": "epsilon", "variance": "fixed_small"}
    for schedule in ("scaled_linear", "sigmoid"):
        assert {"beta_start", "beta_end"} <= set(GivenFacts(beta_schedule=schedule).needed_for_noise())
    own = GivenFacts(**facts, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)  # type: ignore[arg-type]
    assert (own.noise().beta_start, own.noise().beta_end) == (0.00085, 0.012)
    assert own.noise_notes(own.noise()) == ("x_0 is clipped to [-1, 1]",)
    usual = GivenFacts(**facts, beta_schedule="linear")  # type: ignore[arg-type]
    assert usual.noise_notes(usual.noise()) == ("betas from 0.0001 to 0.02", "x_0 is clipped to [-1, 1]")
    assert (
        usual.noise(scaled=True).beta_end,
        GivenFacts(timesteps=4000, beta_schedule="linear").noise(scaled=True).beta_end,
    ) == (0.02, 0.005)
