"""bfloat16 is approved where it does no harm, and refused where it does; the verdict is kept where it can be."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.service.engine.exact import CPU, needs_bfloat16
from tests.tiny import TINY, randomize
from tminus.model.checkpoint import Checkpoint, Labels, approve, load_checkpoint, save_checkpoint
from tminus.model.noise import NoiseConfig
from tminus.model.unet import UNet2D
from tminus.service.engine import approval, openvino_executor
from tminus.service.engine.accuracy import BOUNDS
from tminus.service.engine.approval import approve_later, approve_portions, with_kept_approvals
from tminus.service.engine.autotune import Builder, Choice, Wish
from tminus.service.engine.executors import EagerExecutor
from tminus.service.engine.loading import load_engine, read_checkpoint
from tminus.service.engine.protocol import BUNDLED, LoadOptions

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_thread(_threads_as_before: object) -> None:
    torch.set_num_threads(1)  # nets this small gain nothing from a second, and wait long for one on a busy machine


def save(folder: Path, net: UNet2D, like: Checkpoint | None = None) -> Path:
    noise, labels = (like.noise, like.labels) if like is not None else (NoiseConfig(), Labels())
    recommended = like.recommended if like is not None else None
    save_checkpoint(folder, net.state_dict(), net.config, noise, labels, {}, recommended)
    return folder


@pytest.fixture
def net() -> UNet2D:
    net = UNet2D(TINY)
    randomize(net)
    return net.requires_grad_(False).eval()


def harm(net: torch.nn.Module) -> None:
    """Add 1000 to what the norm after it takes away: the same function in float32, and nothing else in bfloat16."""
    convolutions = [module for name, module in net.named_modules() if name.endswith(".conv1")]
    assert convolutions
    with torch.no_grad():
        for convolution in convolutions:
            assert isinstance(convolution, torch.nn.Conv2d)
            assert convolution.bias is not None
            convolution.bias.add_(1000)


def judge(folder: Path, cache: Path | None, executor: str = "eager") -> bool:
    exact = Builder(load_checkpoint(folder), CPU, 1).build(Choice(executor, "float32", sizes=(1,)))
    portions = approve_portions(folder, exact, CPU, 1, cache, num_images=4, batch_size=4)
    while True:
        try:
            next(portions)
        except StopIteration as end:
            verdict = end.value
            assert isinstance(verdict, bool)
            return verdict


def approved(folder: Path, cache: Path | None) -> Mapping[tuple[str, str], float | None]:
    return with_kept_approvals(load_checkpoint(folder), CPU, cache).approved


def test_a_network_that_bfloat16_leaves_alone_is_approved_in_its_folder(
    net: UNet2D, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tmp_path / "model", net)
    with caplog.at_level("INFO"):
        assert judge(folder, tmp_path / "cache")
    assert load_checkpoint(folder).approved.keys() == {("eager", "bfloat16")}
    (check,) = json.loads((folder / "tminus.json").read_text())["approved"]
    assert (check["criterion"], check["samples"]) == (
        "truncation",
        "4 images by dpmpp_2m, 20 steps and by ddim, 50 steps",
    )
    assert [each["point"]["sampler"] for each in check["differences"]] == ["dpmpp_2m", "ddim"]
    assert 0 < check["relative_error"] < BOUNDS["bfloat16"]
    assert load_checkpoint(folder).approved["eager", "bfloat16"] == check["relative_error"]
    assert "4 images by dpmpp_2m, 20 steps and by ddim, 50 steps, 720 passes, about" in caplog.text


def test_the_same_network_written_so_that_bfloat16_harms_it_is_refused_and_the_verdict_is_kept(
    net: UNet2D, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([5.0, 900.0])
    before = net(x, t, None)
    harm(net)
    assert net(x, t, None).allclose(before, atol=1e-3), "in float32 it is the same network"
    folder = save(tmp_path / "model", net)
    files = (folder / "tminus.json").read_bytes()
    assert not judge(folder, tmp_path / "cache")
    assert (folder / "tminus.json").read_bytes() == files
    assert approved(folder, tmp_path / "cache") == {}
    kept = approval.kept_verdict(load_checkpoint(folder), CPU, "eager", tmp_path / "cache").read()
    assert kept is not None
    assert kept["approved"] is False
    assert "an earlier approval" not in caplog.text
    approve(folder, {name: kept[name] for name in ("executor", "precision", "weights_hash")})
    assert not judge(folder, tmp_path / "cache")
    assert f"an earlier approval in {folder} stays" in caplog.text


def test_of_a_folder_that_cannot_be_written_the_approval_is_kept_in_the_cache_folder_for_its_weights(
    net: UNet2D, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(30, "Read-only file system", "tminus.json")

    monkeypatch.setattr(approval, "approve", fail)
    folder, cache = save(tmp_path / "model", net), tmp_path / "cache"
    assert judge(folder, cache)
    assert load_checkpoint(folder).approved == {}
    assert approved(folder, cache).keys() == {("eager", "bfloat16")}
    assert approved(folder, None) == {}
    randomize(net, seed=1)
    assert approved(save(tmp_path / "model", net), cache) == {}, "other weights, of the same config"
    cache_file = tmp_path / "file"  # in which nothing can be kept
    cache_file.touch()
    for nowhere in (None, cache_file):
        with pytest.raises(OSError, match="Read-only"):
            judge(folder, nowhere)


def test_a_server_finds_what_is_kept_in_its_cache_folder(net: UNet2D, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", net)
    approval.kept_verdict(load_checkpoint(folder), CPU, "openvino", tmp_path).write({"approved": True})
    options = LoadOptions(folder, device="cpu", cache_dir=tmp_path)
    assert read_checkpoint(options).approved.keys() == {("openvino", "bfloat16")}


def test_as_many_images_are_made_as_there_is_time_for(
    net: UNet2D, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tmp_path / "model", net)
    exact = Builder(load_checkpoint(folder), CPU, 1).build(Choice("eager", "float32", sizes=(1,)))
    for budget_s, num_images in ((0.0, approval.MIN_IMAGES), (1e9, approval.MAX_IMAGES)):
        monkeypatch.setattr(approval, "BUDGET_S", budget_s)
        portions = approve_portions(folder, exact, CPU, 1, None)
        with caplog.at_level("INFO"):
            while f"{num_images} images by" not in caplog.text:
                next(portions)


# --- at the start of a server ---


def later(folder: Path, cache: Path, **fields: Any) -> list[None]:
    """Do what a server would do while no job runs."""
    checkpoint = with_kept_approvals(load_checkpoint(folder), CPU, cache)
    options = LoadOptions(folder, **{"executor": "eager", "approve_when_idle": True, **fields})
    executor = Builder(load_checkpoint(folder), CPU, 1).build(Choice(options.executor, "float32", sizes=(1,)))
    return list(approve_later(checkpoint, executor, CPU, Wish(precision=options.precision), options, cache))


def test_while_no_job_runs_bfloat16_is_approved_once_and_no_portion_is_more_than_a_pass(
    net: UNet2D, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(approval, "BUDGET_S", 0.0)
    passes = []
    run = EagerExecutor.__call__

    def counted(executor: EagerExecutor, *inputs: Any) -> Tensor:
        passes.append(len(inputs[0]))
        return run(executor, *inputs)

    monkeypatch.setattr(EagerExecutor, "__call__", counted)
    folder = save(tmp_path / "model", net)
    portions = later(folder, tmp_path / "cache")
    assert set(passes) == {1}
    assert len(portions) >= len(passes), "the others wait for the second executor"
    assert load_checkpoint(folder).approved.keys() == {("eager", "bfloat16")}
    assert later(folder, tmp_path / "cache") == []


def test_while_no_job_runs_nothing_is_done_that_was_not_asked_for_or_is_known(net: UNet2D, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", net)
    assert later(folder, tmp_path / "cache", precision="float32") == []
    assert later(folder, tmp_path / "cache", approve_when_idle=False) == []
    approval.kept_verdict(load_checkpoint(folder), CPU, "eager", tmp_path / "cache").write({"approved": False})
    assert later(folder, tmp_path / "cache") == [], "it was refused"
    assert load_checkpoint(folder).approved == {}


@pytest.mark.long
def test_an_engine_comes_with_what_approves_bfloat16_for_its_next_start(
    net: UNet2D, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(approval, "BUDGET_S", 0.0)
    folder = save(tmp_path / "model", net)
    options = LoadOptions(folder, "cpu", "eager", threads=1, cache_dir=tmp_path / "cache", approve_when_idle=True)
    loaded = load_engine(options)
    assert loaded.spare_work is not None
    assert "float32" in str(loaded.measured)
    for _ in loaded.spare_work:
        pass
    assert ("eager", "bfloat16") in read_checkpoint(options).approved


@needs_bfloat16
@pytest.mark.parametrize(("gain", "told"), [(2.0, True), (1.1, False)])
def test_the_log_tells_what_bfloat16_may_gain_and_how_it_is_approved(
    net: UNet2D,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    gain: float,
    told: bool,
) -> None:
    monkeypatch.setattr(openvino_executor, "bfloat16_gain", lambda: gain)
    folder = save(tmp_path / "model", net)
    with caplog.at_level("INFO"):
        later(folder, tmp_path, executor="openvino", approve_when_idle=False)
    line = (
        f"bfloat16 would be about 2.0 times as fast, and is not approved for these weights: `tminus approve {folder}`"
    )
    assert (line in caplog.text) is told


@needs_bfloat16
def test_the_gain_of_bfloat16_is_measured_in_a_moment() -> None:
    assert 0.5 < openvino_executor.bfloat16_gain() < 20


@pytest.mark.long
@needs_bfloat16
@pytest.mark.parametrize("harmed", [False, True], ids=["as it is", "harmed"])
def test_the_bundled_network_is_approved_as_its_classifier_has_it_and_refused_when_it_is_harmed(
    tmp_path: Path, harmed: bool
) -> None:
    bundled = load_checkpoint(BUNDLED)
    assert isinstance(bundled.net, UNet2D)
    assert ("openvino", "bfloat16") in bundled.approved
    if harmed:
        harm(bundled.net)
    assert judge(save(tmp_path / "model", bundled.net, bundled), None, "openvino") is not harmed
