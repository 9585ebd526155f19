import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from tests.tiny import TINY, randomize
from tminus.model.catalogue import Recommended
from tminus.model.checkpoint import Checkpoint, Labels, approve, load_checkpoint, needs_of, save_checkpoint
from tminus.model.files import CheckpointError, write_atomically, write_json
from tminus.model.noise import NoiseConfig
from tminus.model.samplers import compile_plan, sample
from tminus.model.unet import UNet2D
from tminus.model.unet_config import UNetConfig
from tminus.model.weights import hash_weights, load_state_dict

CONDITIONAL = UNetConfig(**{**dataclasses.asdict(TINY), "num_class_embeds": 4})
LABELS = Labels(("shirt", "shoe", "bag"), null_class=3)
SHORT = NoiseConfig(num_train_timesteps=20, beta_end=0.3, variance_type="fixed_large")
WEIGHTS = Path("unet/diffusion_pytorch_model.safetensors")
X, T = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8), torch.tensor([3, 17])


def random_net(config: UNetConfig = TINY) -> UNet2D:
    net = UNet2D(config)
    randomize(net)
    return net.requires_grad_(False).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An unconditional checkpoint as tminus writes it."""
    save_checkpoint(tmp_path / "model", random_net().state_dict(), TINY, SHORT, Labels(), {})
    return tmp_path / "model"


@pytest.fixture
def conditional(tmp_path: Path) -> Path:
    """A checkpoint with three classes and a null class."""
    state = random_net(CONDITIONAL).state_dict()
    save_checkpoint(tmp_path / "classes", state, CONDITIONAL, SHORT, LABELS, {"data": "toy", "step": 7})
    return tmp_path / "classes"


@pytest.fixture
def theirs() -> UNet2DModel:
    """diffusers' own tiny net with random weights."""
    values = TINY.to_dict()
    values.pop("_class_name")
    net = UNet2DModel(**values).eval()
    randomize(net)
    return net.requires_grad_(False)


def assert_same_net(loaded: Checkpoint, net: Any, atol: float = 1e-5) -> None:
    expected = net(X, T)
    expected = expected if isinstance(expected, torch.Tensor) else expected.sample
    torch.testing.assert_close(loaded.net(X, T), expected, rtol=0, atol=atol)


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# --- round trips --------------------------------------------------------------------------------------------------


def provenance_in(folder: Path) -> Any:
    """What tminus.json says of where the weights came from."""
    return json.loads((folder / "tminus.json").read_text("utf-8"))["provenance"]


def test_checkpoint_survives_a_round_trip(conditional: Path) -> None:
    net = random_net(CONDITIONAL)
    loaded = load_checkpoint(conditional)
    labels = torch.tensor([0, 3])
    assert torch.equal(loaded.net(X, T, labels), net(X, T, labels))
    assert loaded.net.config == CONDITIONAL
    assert loaded.noise == SHORT
    assert loaded.labels == LABELS
    assert loaded.labels.num_classes == 3
    assert provenance_in(conditional) == {"data": "toy", "step": 7}
    assert loaded.name == "classes"
    assert loaded.size_px == (8, 8)
    assert loaded.weights_hash == hash_weights(net.state_dict())


def test_hash_changes_with_a_value_a_name_or_a_shape_and_not_with_the_order() -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1)}
    digest = hash_weights(state)
    assert hash_weights(dict(reversed(state.items()))) == digest
    assert hash_weights({**state, "a": state["a"].reshape(3, 2)}) != digest
    assert hash_weights({**state, "b": torch.ones(1) + 1e-6}) != digest
    assert hash_weights({"c": state["a"], "b": state["b"]}) != digest


def test_write_that_fails_leaves_the_old_file_and_no_part(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    file.write_bytes(b"old")

    def fail(path: Path) -> None:
        path.write_bytes(b"half of the new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, fail)
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state.pt"]


# --- diffusers reads what we write --------------------------------------------------------------------------------


PIPELINES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "ddpm": (DDPMPipeline, DDPMScheduler, {}),
    "ddpm of learned variance": (DDPMPipeline, DDPMScheduler, {"variance_type": "learned_range"}),
    "ddim": (DDIMPipeline, DDIMScheduler, {"default_sampler": "ddim"}),
    "dpmpp_2m": (DDPMPipeline, DPMSolverMultistepScheduler, {"default_sampler": "dpmpp_2m"}),
}


@pytest.mark.parametrize(("cls", "scheduler", "fields"), PIPELINES.values(), ids=PIPELINES.keys())
def test_diffusers_pipeline_loads_and_samples_what_tminus_writes(
    tmp_path: Path, cls: Any, scheduler: Any, fields: dict[str, Any]
) -> None:
    unet = dataclasses.replace(TINY, out_channels=2) if "variance_type" in fields else TINY
    net, noise = random_net(unet), NoiseConfig(num_train_timesteps=20, beta_end=0.3, **fields)
    save_checkpoint(tmp_path, net.state_dict(), unet, noise, Labels(), {})
    assert load_checkpoint(tmp_path).noise == noise
    pipeline = cls.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.scheduler) is scheduler
    torch.testing.assert_close(pipeline.unet(X, T).sample, net(X, T), rtol=0, atol=1e-5)

    # Where x0 is clipped, tminus takes eps from the clipped x0, as DDIMPipeline does when told to.
    told = {"use_clipped_model_output": True} if cls is DDIMPipeline else {}
    generator = torch.Generator().manual_seed(3)
    made = pipeline(batch_size=2, generator=generator, num_inference_steps=5, output_type="np", **told).images
    generator = torch.Generator().manual_seed(3)
    x_T = torch.randn(2, 1, 8, 8, generator=generator)
    plan = compile_plan(noise, noise.schedule(), noise.default_sampler, 5)
    ours = sample(net, plan, x_T, lambda _k: torch.randn(2, 1, 8, 8, generator=generator))
    expected = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(torch.from_numpy(made), expected, rtol=0, atol=1e-3)


# --- tminus reads what diffusers writes ---------------------------------------------------------------------------


FORMS: dict[str, dict[str, Any]] = {
    "bin": {"safe_serialization": False},
    "shards": {"max_shard_size": "30KB"},
    "bin shards": {"max_shard_size": "30KB", "safe_serialization": False},
    "variant": {"variant": "fp16"},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_of_weights_file_is_loaded(tmp_path: Path, theirs: UNet2DModel, form: dict[str, Any]) -> None:
    DDPMPipeline(theirs, DDPMScheduler()).save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    theirs.save_pretrained(tmp_path / "unet", **form)
    written = [file.name for file in (tmp_path / "unet").iterdir()]
    assert WEIGHTS.name not in written
    assert ("max_shard_size" in form) == any("-of-" in name for name in written)
    loaded = load_checkpoint(tmp_path)
    assert_same_net(loaded, theirs)
    assert loaded.weights_hash == hash_weights(theirs.state_dict())


def old_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for key, value in state.items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f".{new}.", f".{old}.")
        renamed[key] = value
    return renamed


def test_attention_names_from_before_2023_are_understood(folder: Path) -> None:
    state = old_names(load_file(folder / WEIGHTS))
    assert any(key.endswith("attentions.0.query.weight") for key in state)
    save_file(state, folder / WEIGHTS)
    assert_same_net(load_checkpoint(folder), random_net())


# --- what was approved --------------------------------------------------------------------------------------------


def check_of(folder: Path, **changes: Any) -> dict[str, Any]:
    weights = load_checkpoint(folder).weights_hash
    return {"executor": "openvino", "precision": "bfloat16", "weights_hash": weights, "frechet_ratio": 1.01} | changes


def test_what_is_approved_is_read_again_and_replaces_what_is_of_the_same_executor_precision_and_weights(
    conditional: Path,
) -> None:
    before = json.loads((conditional / "tminus.json").read_text())
    others = [
        check_of(conditional, executor="eager"),
        check_of(conditional, precision="tf32"),
        check_of(conditional, weights_hash="of another training"),
    ]
    for check in (others[0], check_of(conditional), *others[1:]):
        approve(conditional, check)
    approve(conditional, check_of(conditional, frechet_ratio=0.99))
    after = json.loads((conditional / "tminus.json").read_text())
    assert after.pop("approved") == [*others, check_of(conditional, frechet_ratio=0.99)]
    assert after == before
    approved = load_checkpoint(conditional).approved
    assert approved.keys() == {("eager", "bfloat16"), ("openvino", "tf32"), ("openvino", "bfloat16")}


# --- what is recommended ------------------------------------------------------------------------------------------


def test_what_is_recommended_is_read_and_changes_no_hash(conditional: Path) -> None:
    before = load_checkpoint(conditional)
    assert before.recommended is None
    edit_json(conditional / "tminus.json", recommended={"sampler": "dpmpp_2m", "steps": 5, "guidance": 1.5})
    loaded = load_checkpoint(conditional)
    assert loaded.recommended == Recommended("dpmpp_2m", 5, 1.5)
    assert loaded.weights_hash == before.weights_hash
    edit_json(conditional / "tminus.json", recommended=None)
    assert load_checkpoint(conditional).recommended is None


# --- refusals -----------------------------------------------------------------------------------------------------


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


def cut(file: Path, keep: float) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * keep)])


def as_bin(folder: Path) -> Path:
    file = folder / WEIGHTS.with_suffix(".bin")
    torch.save(load_file(folder / WEIGHTS), file)
    (folder / WEIGHTS).unlink()
    return file


def as_old_bin(folder: Path) -> Path:
    file = as_bin(folder)
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    return file


def nan_weights(folder: Path) -> None:
    change_weights(folder, lambda state: state["conv_in.bias"].fill_(torch.nan))


def with_index(folder: Path, index: Any) -> None:
    (folder / WEIGHTS).rename(folder / "stolen.safetensors")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    file.write_text(index if isinstance(index, str) else json.dumps(index))


def unet_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "unet" / "config.json", **changes)


def model_index(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "model_index.json", **changes)


def bin_with(key: str, value: torch.Tensor) -> Callable[[Path], None]:
    """The weights as a .bin, with another tensor in it."""

    def damage(folder: Path) -> None:
        file = as_bin(folder)
        torch.save(torch.load(file, weights_only=True) | {key: value}, file)

    return damage


def scheduler_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "scheduler" / "scheduler_config.json", **changes)


def recommends(value: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "tminus.json", recommended=value)


def ladder(*rungs: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "tminus.json", ladder=list(rungs))


GOOD: dict[str, Any] = {"sampler": "dpmpp_2m", "steps": 20}
REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a sampler is recommended": (
        recommends("dpmpp_2m"),
        "recommended must be an object with sampler, steps, guidance, got 'dpmpp_2m'",
    ),
    "eta is recommended": (recommends(GOOD | {"eta": 0}), "each member of recommended must be one of sampler, .*'eta'"),
    "an unknown sampler": (recommends(GOOD | {"sampler": "rk45"}), "recommended sampler must be one of ddpm, .*'rk45'"),
    "no steps": (recommends(GOOD | {"steps": 0}), r"recommended steps must be an integer in 1\.\.20, got 0"),
    "much guidance": (recommends(GOOD | {"guidance": 50.1}), r"guidance must be a number in 0\.\.50, got 50\.1"),
    "guidance without a null class": (recommends(GOOD | {"guidance": 2}), r"must be 1 \(off\) without a null_class"),
    "a long name": (recommends(GOOD | {"sampler": "x" * 1000}), r"got 'x{99}$"),
    "a ladder without rungs": (ladder(), r"ladder must be a list of 1 to 16 settings, got \[\]"),
    "a ladder with too many": (ladder(*[GOOD] * 17), "ladder must be a list of 1 to 16 settings"),
    "a rung with an unknown sampler": (ladder(GOOD | {"sampler": "x"}), r"ladder\[0\] sampler must be one of ddpm"),
    "a rung with an unknown member": (ladder(GOOD, GOOD | {"eta": 0}), r"each member of ladder\[1\] must be one of"),
    "a rung of a number": (ladder(GOOD | {"model": 5}), r"ladder\[0\] model must be the name of a model, got 5"),
    "a rung that is not far": (ladder(GOOD | {"distance": -1}), r"ladder\[0\] distance must be a number, 0 or more"),
    "a ladder that goes up": (
        ladder(GOOD | {"steps": 5}, GOOD),
        r"ladder\[1\] must be fewer than 5 passes, those of the setting before it, got .*20 passes",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"no diffusion_pytorch_model\.safetensors or \.bin"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), r"a U-Net without a scheduler_config\.json.* folder of"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_bytes(b"x")), r"a file \(no suffix\)\. .* folder of diffusers"),
    "latent diffusion without its autoencoder": (
        model_index(_class_name="LDMPipeline"),
        "model_index.json: an LDMPipeline without its autoencoder, the folder vqvae/",
    ),
    "Stable Diffusion": (
        lambda f: (
            model_index(_class_name="StableDiffusionPipeline", text_encoder=["transformers", "CLIPTextModel"])(f),
            unet_config(cross_attention_dim=768)(f),
        ),
        "'StableDiffusionPipeline' is not served: it makes images of text, .*; those that are: DDPMPipeline, DDIMPipe",
    ),
    "a pipeline with a transformer": (
        model_index(_class_name="DiTPipeline", transformer=["diffusers", "DiTTransformer2DModel"]),
        "'DiTPipeline' is not served: its denoiser is a transformer; .*; those that are: DDPMPipeline, DDIMPipeline",
    ),
    "a transformer": (
        lambda f: (
            shutil.rmtree(f),
            f.mkdir(),
            (f / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}'),
        ),
        "config.json: 'DiTTransformer2DModel' is a transformer; tminus runs U-Nets only",
    ),
    "another network": (unet_config(_class_name="UNet2DConditionModel"), "_class_name must be UNet2DModel, got"),
    "a field that is not honoured": (
        unet_config(cross_attention_dim=768),
        "cross_attention_dim=768 is not a known setting",
    ),
    "a scheduler that is not served": (
        lambda f: model_index(scheduler=["diffusers", "SASolverScheduler"])(f),
        "'SASolverScheduler' is not served; those that are: DDPMScheduler",
    ),
    "config not JSON": (lambda f: (f / "unet/config.json").write_text("{'a': 1"), r"config\.json: not JSON"),
    "safetensors without tensors": (lambda f: save_file({}, f / WEIGHTS), "the weights hold no tensors"),
    "bin of a list": (lambda f: torch.save([torch.ones(1)], as_bin(f)), r"\.bin: must hold a state dict of tensors"),
    "a scheduler of numbers": (model_index(scheduler=[1, 2]), r"scheduler must be \[library, class\], got \[1, 2\]"),
    "defaults of a number": (unet_config(_use_default_values=5), "_use_default_values must be a list of names, got 5"),
    "channels of four hundred digits": (unet_config(in_channels=10**400), "in_channels must be a positive integer"),
    "config too deep": (lambda f: (f / "unet/config.json").write_text("[" * 10**6), r"config\.json: not JSON"),
    "weight map of numbers": (lambda f: with_index(f, {"weight_map": {"a": 1}}), "weight_map must map keys"),
    "NaN": (nan_weights, r"conv_in\.bias holds NaN or infinite weights"),
    "whole numbers": (
        lambda f: change_weights(f, lambda s: s.update({"conv_in.bias": torch.zeros(8, dtype=torch.int64)})),
        r"conv_in\.bias must be of float32, .*, got torch\.int64",
    ),
    "one value for forty gigabytes": (
        bin_with("conv_in.bias", torch.zeros(1).expand(10**10)),
        r"conv_in\.bias must hold each of its values, got fewer than 10000000000",
    ),
    "no values": (bin_with("conv_in.bias", torch.zeros(8, device="meta")), r"must hold plain values, got meta"),
    "sparse": (
        bin_with("conv_in.bias", torch.zeros(8).to_sparse()),
        r"must hold plain values, got torch\.sparse_coo|sparse tensor",
    ),
    "key missing": (
        lambda f: change_weights(f, lambda s: s.pop("mid_block.resnets.1.conv2.bias")),
        r"do not fit config\.json: lacks mid_block\.resnets\.1\.conv2\.bias \(and 0 more\)",
    ),
    "key too many": (
        lambda f: change_weights(f, lambda s: s.update({"class_embedding.weight": torch.ones(3, 3)})),
        r"do not fit config\.json: has class_embedding\.weight, which",
    ),
    "shape wrong": (
        lambda f: change_weights(f, lambda s: s.update({"conv_in.weight": torch.ones(8, 3, 3, 3)})),
        r"wrong shape of conv_in\.weight: config\.json asks for \(8, 1, 3, 3\), got \(8, 3, 3, 3\)",
    ),
    "config of a net that would fill the memory": (unet_config(block_out_channels=[2**20, 2**21]), "wrong shape of"),
    "shard outside": (
        lambda f: with_index(f, {"weight_map": {"conv_in.weight": "../stolen.safetensors"}}),
        r"weight_map must map keys to file names in the same folder",
    ),
    "shard missing": (
        lambda f: with_index(f, {"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}}),
        r"00001-of-00002\.safetensors: the weight map names this file, and it is not there",
    ),
}


@pytest.mark.parametrize(("damage", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_broken_checkpoint_is_refused_in_one_line(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as refusal:
        load_checkpoint(folder)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith(str(folder))


@pytest.mark.parametrize("null", [1, 3])
def test_null_class_is_made_the_last_label_and_the_others_keep_their_order(conditional: Path, null: int) -> None:
    before = load_checkpoint(conditional)
    edit_json(conditional / "tminus.json", null_class=null, class_names=["a", "b", "c"])
    after = load_checkpoint(conditional)
    assert after.labels == Labels(("a", "b", "c"), 3)
    assert (after.weights_hash == before.weights_hash) == (null == 3), "the label is part of what the weights are"
    x, t = torch.randn(4, 1, 8, 8), torch.zeros(4)
    old = torch.tensor([label for label in range(4) if label != null] + [null])
    with torch.no_grad():
        assert torch.equal(after.net(x, t, torch.arange(4)), before.net(x, t, old))


def test_weights_larger_than_memory_are_refused_before_they_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tminus.model.weights.free_memory_bytes", lambda: 1000)
    monkeypatch.setattr("tminus.model.weights._read_tensors", lambda _file: pytest.fail("it was read"))
    with pytest.raises(CheckpointError, match=r"unet: 0\.0 GiB of weights, and 0\.0 GiB of memory are free"):
        load_checkpoint(folder)


def test_what_a_folder_takes_is_known_by_its_configuration_alone(folder: Path, tmp_path: Path) -> None:
    for each in (folder, Path(__file__).parents[2] / "checkpoints" / "avatars-64"):
        loaded = load_checkpoint(each)
        modules = [loaded.net, *([loaded.autoencoder] if loaded.autoencoder is not None else [])]
        weights_bytes = sum(value.numel() * value.element_size() for net in modules for value in net.parameters())
        bare = shutil.copytree(each, tmp_path / "bare" / each.name, ignore=shutil.ignore_patterns("*.safetensors"))
        needs = needs_of(bare)
        assert needs.weights_bytes == weights_bytes
        assert (needs.size_px, needs.row_px) == (loaded.size_px, loaded.row_shape[1:])
        assert needs.loading_bytes > needs.serving_bytes > weights_bytes
        assert (needs.coding_bytes > 0) == (loaded.autoencoder is not None)
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        needs_of(folder)


@pytest.mark.parametrize("form", ["zip", "old"])
def test_bin_damaged_anywhere_is_loaded_or_refused_and_never_fails_otherwise(folder: Path, form: str) -> None:
    save_checkpoint(folder, {"a": torch.ones(2)}, TINY, SHORT, Labels(), {})
    file = as_bin(folder) if form == "zip" else as_old_bin(folder)
    whole, random, refused = file.read_bytes(), Random(0), 0
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(random.randint(1, 4)):
            damaged[random.randrange(min(len(whole), 700))] = random.randrange(256)
        file.write_bytes(damaged)
        try:
            load_state_dict(folder / "unet")
        except CheckpointError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("how", ["overwritten", "shortened"])
def test_what_is_loaded_does_not_change_with_its_file(folder: Path, how: str) -> None:
    """A file that is mapped would: whoever wrote over a checkpoint would change what is served, or end the server."""
    net = load_checkpoint(folder).net
    before = {key: value.clone() for key, value in net.state_dict().items()}
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as opened:
        if how == "shortened":
            opened.truncate(64)
        else:
            opened.write(bytes(size))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(("channels", "alpha"), [(1, False), (2, False), (4, True), (5, False), (64, False)])
def test_pixels_of_one_to_sixty_four_channels_are_served_and_four_are_rgba(
    tmp_path: Path, channels: int, alpha: bool
) -> None:
    unet = dataclasses.replace(TINY, in_channels=channels, out_channels=channels)
    save_checkpoint(tmp_path, random_net(unet).state_dict(), unet, NoiseConfig(), Labels(), {})
    loaded = load_checkpoint(tmp_path)
    assert (loaded.image_shape, loaded.alpha) == ((channels, 8, 8), alpha)
    save_checkpoint(tmp_path, random_net(unet).state_dict(), unet, NoiseConfig(), Labels(), {}, alpha=False)
    assert not load_checkpoint(tmp_path).alpha


@pytest.mark.parametrize(
    ("channels", "said", "message"),
    [
        (65, {}, r"only 1\.\.64 channels in and as many out .*, got 65 -> 65"),
        (3, {"alpha": True}, "alpha must be false: images have 3 channels, and RGBA four, got True"),
        (4, {"alpha": "no"}, "alpha must be true or false, got 'no'"),
    ],
)
def test_channels_that_cannot_be_served_are_refused_by_the_bound(
    tmp_path: Path, channels: int, said: dict[str, Any], message: str
) -> None:
    unet = dataclasses.replace(TINY, in_channels=channels, out_channels=channels)
    save_checkpoint(tmp_path, random_net(unet).state_dict(), unet, NoiseConfig(), Labels(), {})
    write_json(tmp_path / "tminus.json", said)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)
