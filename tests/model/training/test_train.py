import contextlib
import copy
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, LDMPipeline, UNet2DModel
from torch import Tensor
from tqdm import tqdm

from tests.tiny import TINY, randomize
from tminus.model.catalogue import Recommended
from tminus.model.checkpoint import load_checkpoint
from tminus.model.files import CheckpointError
from tminus.model.latent.autoencoder import Autoencoder, AutoencoderConfig, hash_autoencoder, save_autoencoder
from tminus.model.loss import lognormal_timesteps
from tminus.model.noise import NoiseConfig, NoiseSchedule
from tminus.model.samplers import sample
from tminus.model.training import run as run_file
from tminus.model.training import targets as targets_module
from tminus.model.training import train as train_module
from tminus.model.training.config import TrainConfig, usual_batch, usual_steps
from tminus.model.training.data import ImageSet
from tminus.model.training.run import STATE_FILE, Ema, TrainError, read_state, write_state
from tminus.model.training.train import batch_indices, train
from tminus.model.unet import UNet2D
from tminus.model.unet_config import UNetConfig

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]
CONDITIONAL = UNetConfig(**{**dataclasses.asdict(TINY), "num_class_embeds": 3, "dropout": 0.1})
NOISE = NoiseConfig(num_train_timesteps=50, beta_end=0.2)
RUN = TrainConfig(
    steps=8, batch_size=4, learning_rate=2e-3, warmup_steps=3, flip=True, seed=5, precision="fp32", save_every=3
)


def toy_images(count: int = 11) -> ImageSet:
    """Two classes: bright on the left or bright on the right, with some noise."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 60, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 2
    images[labels == 0, :, :, :4] += 190
    images[labels == 1, :, :, 4:] += 190
    return ImageSet(images, labels, ("left", "right"), "toy")


def run(folder: Path, config: TrainConfig = RUN, unet: UNetConfig = CONDITIONAL, **kwargs: Any) -> bool:
    return train(folder, toy_images(), unet, NOISE, config, device=CPU, **kwargs)


def provenance_in(folder: Path) -> dict[str, Any]:
    """What tminus.json says of where the weights came from."""
    provenance: dict[str, Any] = json.loads((folder / "tminus.json").read_text("utf-8"))["provenance"]
    return provenance


def state_of(folder: Path) -> dict[str, Any]:
    assert (folder / STATE_FILE).is_file()
    return read_state(folder)


def assert_same_bits(one: Any, other: Any, path: str = "") -> None:
    assert type(one) is type(other), path
    if isinstance(one, Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same_bits(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same_bits(a, b, f"{path}/{i}")
    else:
        assert one == other, path


def assert_same_run(one: Path, other: Path) -> None:
    """Step, weights, average, the optimiser's moments and the written checkpoint are the same to the bit."""
    first, second = state_of(one), state_of(other)
    assert_same_bits(first, second)
    assert load_checkpoint(one).weights_hash == load_checkpoint(other).weights_hash


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    assert run(folder)
    return folder


# --- the log ------------------------------------------------------------------------------------------------------


def test_a_log_gets_plain_lines_and_no_bar(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level("INFO"):
        run(tmp_path / "run", dataclasses.replace(RUN, steps=12, save_every=100))
    told = [record.getMessage() for record in caplog.records if record.name == "tminus.model.training.run"]
    assert re.fullmatch(r".*: step 0 of 12, cpu, fp32", told.pop(0))
    assert [line.split(",")[0] for line in told] == ["step 10 of 12", "step 12 of 12"]
    assert all(re.fullmatch(r"step .*, loss=\d\.\d{1,4}, images_s=\d+, left=\d\d:\d\d", line) for line in told)
    assert "it/s" not in capsys.readouterr().err


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_with_the_loss_and_the_time_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # or a thread of it would outlast the test
    with caplog.at_level("INFO"):
        run(tmp_path / "run", dataclasses.replace(RUN, steps=30, save_every=100))
    last = terminal.getvalue().rstrip("\n").rpartition("\r")[2]
    assert re.fullmatch(r"step 30/30 100%, 00:00 left, loss 0\.\d{1,4}, \d+ images/s *", last)
    assert not [record for record in caplog.records if "images_s" in record.getMessage()]


# --- losses -------------------------------------------------------------------------------------------------------


def test_the_losses_are_those_of_the_steps_and_a_run_that_is_stopped_twice_has_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    real = train_module.l_simple

    def noted(*given: Any) -> Tensor:
        loss = real(*given)
        seen.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(train_module, "l_simple", noted)
    config = dataclasses.replace(RUN, steps=34, save_every=100, sheet_every=1)
    assert run(tmp_path / "whole", config)
    losses = state_of(tmp_path / "whole")["losses"]
    assert [step for step, _ in losses["points"]] == [10, 20, 30]
    assert [mean for _, mean in losses["points"]] == pytest.approx([sum(seen[k : k + 10]) / 10 for k in (0, 10, 20)])
    assert (losses["sum"], losses["count"]) == (pytest.approx(sum(seen[30:])), 4)
    for step in (7, 23):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", config, on_sheet=interrupt_at(step))
    assert run(tmp_path / "stopped", config)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    plots = [(tmp_path / name / "loss.svg").read_text("utf-8") for name in ("whole", "stopped")]
    assert plots[0].replace("whole", "stopped") == plots[1]


def test_sheets_change_no_bit_of_a_run(straight: Path, tmp_path: Path) -> None:
    from tminus.model.samplers import compile_plan
    from tminus.service.cli.train import sheet_writer

    write, plan = sheet_writer(tmp_path / "run", CONDITIONAL, CPU), compile_plan(NOISE, NOISE.schedule(), "dpmpp_2m", 5)
    config = dataclasses.replace(RUN, sheet_every=1)
    assert run(tmp_path / "run", config, on_sheet=lambda net, step: write(net, plan, step))
    assert len(list((tmp_path / "run" / "sheets").iterdir())) == RUN.steps
    for part in ("net", "ema", "optimizer", "losses"):
        assert_same_bits(state_of(straight)[part], state_of(tmp_path / "run")[part], part)


def test_the_first_sheets_come_early_and_at_growing_distances() -> None:
    def looks(sheet_every: int, steps: int = 2500) -> list[int]:
        config = dataclasses.replace(RUN, sheet_every=sheet_every)
        return [step for step in range(1, steps) if config.looks_at(step)]

    assert looks(1000) == [50, 100, 200, 400, 800, 1000, 2000]
    assert looks(100, 350) == [50, 100, 200, 300]
    assert looks(7, 30) == [7, 14, 21, 28]


def test_fewer_images_take_fewer_steps_and_no_set_less_than_a_good_start() -> None:
    found = {count: usual_steps(count) for count in (1, 60, 600, 6_000, 60_000, 10**7)}
    assert [usual_batch(count) for count in (1, 2, 60, 127, 128, 60_000)] == [1, 1, 30, 63, 64, 64]
    assert found == {1: 500, 60: 500, 600: 1500, 6_000: 4700, 60_000: 15_000, 10**7: 15_000}


# --- resuming -----------------------------------------------------------------------------------------------------


def interrupt_at(step: int) -> Callable[[UNet2D, int], None]:
    def on_sheet(_net: UNet2D, now: int) -> None:
        if now == step:
            signal.raise_signal(signal.SIGINT)

    return on_sheet


@pytest.mark.parametrize("step", [1, 5])
def test_interrupted_and_resumed_run_is_the_run_never_interrupted(straight: Path, tmp_path: Path, step: int) -> None:
    config = dataclasses.replace(RUN, sheet_every=1)
    with pytest.raises(KeyboardInterrupt, match="saved"):
        run(tmp_path / "run", config, on_sheet=interrupt_at(step))
    assert state_of(tmp_path / "run")["step"] == step
    assert run(tmp_path / "run")
    assert_same_run(straight, tmp_path / "run")


def test_ctrl_c_after_the_last_step_stops_nothing(tmp_path: Path) -> None:
    done = False
    with contextlib.suppress(KeyboardInterrupt):  # which would end pytest
        done = run(tmp_path, dataclasses.replace(RUN, steps=2), on_sheet=interrupt_at(2))
    assert done


CHILD = """
import sys
from pathlib import Path
from tests.model.training import test_train as t
def on_sheet(net, step):
    print(step, flush=True)
    if step == 5:
        sys.stdin.read(1)  # stand still until it is killed
t.run(Path(sys.argv[1]), t.dataclasses.replace(t.RUN, sheet_every=1), on_sheet=on_sheet)
"""


def test_process_that_is_killed_resumes_as_if_it_had_not_been(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},  # other threads, other sums
    )
    assert child.stdout is not None
    assert child.stdin is not None
    try:
        for expected in range(1, 6):
            assert child.stdout.readline() == b"%d\n" % expected
        child.kill()
    finally:
        child.stdin.close()
        child.wait(60)
        child.stdout.close()
    assert child.returncode == -signal.SIGKILL
    assert state_of(folder)["step"] == 3  # the last save is whole
    load_checkpoint(folder)
    assert provenance_in(folder)["step"] == 3
    assert run(folder)
    assert_same_run(straight, folder)


def test_resuming_with_another_config_or_network_is_refused(tmp_path: Path) -> None:
    run(tmp_path, dataclasses.replace(RUN, steps=2))
    before = (tmp_path / STATE_FILE).read_bytes()
    for field, value in (("seed", 6), ("weighting", "velocity"), ("guidance", 2.0)):
        with pytest.raises(TrainError, match=rf"begun with {field}={getattr(RUN, field)!r}, got {value!r}"):
            run(tmp_path, dataclasses.replace(RUN, **{field: value}))  # type: ignore[arg-type]
    for field, was, got in (
        ("layers_per_block", 1, 2),
        ("attention_head_dim", 8, 4),
    ):  # no weight would show the second
        with pytest.raises(TrainError, match=f"begun with unet {field}={was}, got {got}"):
            run(tmp_path, unet=dataclasses.replace(CONDITIONAL, **{field: got}))
    many = dataclasses.replace(toy_images(), class_names=tuple(f"name {k}" for k in range(300)))
    with pytest.raises(TrainError, match=r"class_names=\[left, right\], got \[name 0, .* and 280 more\]") as refused:
        train(tmp_path, many, CONDITIONAL, NOISE, RUN, device=CPU)
    assert len(str(refused.value)) < 500
    assert (tmp_path / STATE_FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("names", "kept"),
    [(["a", "b"], ("a", "b")), (None, ("left", "right"))],
    ids=["renamed", "null, which is as if they were not there"],
)
def test_classes_may_be_renamed_in_tminus_json(
    names: list[str] | None, kept: tuple[str, ...], straight: Path, tmp_path: Path
) -> None:
    run(tmp_path, dataclasses.replace(RUN, steps=2))
    file = tmp_path / "tminus.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"class_names": names}), "utf-8")
    run(tmp_path)
    assert load_checkpoint(tmp_path).labels.class_names == kept
    assert_same_run(straight, tmp_path)


def test_run_of_a_version_without_a_setting_goes_on_with_its_default(straight: Path, tmp_path: Path) -> None:
    run(tmp_path, dataclasses.replace(RUN, steps=2))
    state = state_of(tmp_path)
    del state["config"]["weighting"]
    write_state(tmp_path, state)
    with pytest.raises(TrainError, match="begun with weighting='simple', got 'velocity'"):
        run(tmp_path, dataclasses.replace(RUN, weighting="velocity"))
    assert run(tmp_path)
    assert_same_run(straight, tmp_path)


def test_run_may_draw_its_timesteps_by_lognormal_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []

    def q_sample(self: NoiseSchedule, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        drawn.append(t)
        return noised(self, x_0, t, eps)

    noised = NoiseSchedule.q_sample
    monkeypatch.setattr(NoiseSchedule, "q_sample", q_sample)
    assert run(tmp_path, dataclasses.replace(RUN, timestep_sampling="lognormal", batch_size=16, learning_rate=0.0))
    share = lognormal_timesteps(NOISE.schedule())
    counts = torch.bincount(torch.cat(drawn), minlength=50).double() / (16 * RUN.steps)
    assert len(drawn) == RUN.steps
    assert ((counts.cumsum(0) - share.cumsum(0)).abs() <= 1 / 16 + 1e-6).all()


@pytest.mark.parametrize("change", [{"stable_target": True}, {"optimizer": "muon"}, {"weighting": "velocity"}])
def test_run_of_another_kind_resumes_to_the_bit_and_differs_from_a_plain_one(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    plain = dataclasses.replace(RUN, flip=False)
    other = dataclasses.replace(plain, **change)
    assert run(tmp_path / "plain", plain)
    assert run(tmp_path / "straight", other)
    run(tmp_path / "stopped", dataclasses.replace(other, steps=3))
    assert run(tmp_path / "stopped", other)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    state, at_first = state_of(tmp_path / "straight"), state_of(tmp_path / "plain")
    assert any(not torch.equal(state["net"][key], at_first["net"][key]) for key in at_first["net"])
    with pytest.raises(TrainError, match=f"begun with {next(iter(change))}="):
        run(tmp_path / "plain", other)


def test_settings_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    for change, says in (
        ({"weighting": "snr"}, "weighting must be among simple, velocity, got 'snr'"),
        ({"optimizer": "sgd"}, "optimizer must be among adam, muon, got 'sgd'"),
        ({"timestep_sampling": "cosine"}, "timestep_sampling must be among uniform, lognormal, got 'cosine'"),
    ):
        with pytest.raises(ValueError, match=says):
            dataclasses.replace(RUN, **change)  # type: ignore[arg-type]
    with pytest.raises(TrainError, match="stable_target takes the images as they are, and flip mirrors half of them"):
        run(tmp_path, dataclasses.replace(RUN, stable_target=True))


def test_a_resumed_run_goes_on_in_the_precision_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = dataclasses.replace(RUN, precision="auto", steps=2)
    monkeypatch.setattr("tminus.model.training.run.faster_of", lambda *_: "bf16")
    run(tmp_path, auto)
    monkeypatch.setattr("tminus.model.training.run.faster_of", lambda *_: pytest.fail("it measured again"))
    run(tmp_path, dataclasses.replace(auto, steps=3))
    assert provenance_in(tmp_path)["config"]["precision"] == "bf16"


def test_a_run_takes_the_cores_that_are_free_and_keeps_their_number_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    usual = torch.get_num_threads()
    taken: list[int] = []

    def steps(count: int, **fields: Any) -> int:
        torch.set_num_threads(4)
        run(tmp_path, dataclasses.replace(RUN, steps=count, **fields))
        taken.append(torch.get_num_threads())
        return int(provenance_in(tmp_path)["config"]["threads"])

    try:
        monkeypatch.setattr("tminus.model.machine.free_cores", lambda: 2)
        assert steps(1) == 2
        assert "torch takes 2 of its 4 threads: other programs or a CPU limit leave no more" in caplog.text
        monkeypatch.setattr("tminus.model.machine.free_cores", lambda: pytest.fail("it looked again"))
        assert steps(2) == 2
        assert steps(3, threads=3) == 3
        assert taken == [2, 2, 3]
    finally:
        torch.set_num_threads(usual)


def test_state_that_is_damaged_is_refused_and_left_alone(tmp_path: Path) -> None:
    run(tmp_path, dataclasses.replace(RUN, steps=1))
    file = tmp_path / STATE_FILE
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(TrainError, match=r"training-state\.safetensors: cannot resume from it"):
        run(tmp_path)
    assert file.stat().st_size == 1000


# --- what a run leaves behind -------------------------------------------------------------------------------------


def test_run_leaves_a_checkpoint_of_the_average_and_no_part_of_a_file(straight: Path) -> None:
    loaded, state = load_checkpoint(straight), state_of(straight)
    for key, value in loaded.net.state_dict().items():
        assert torch.equal(value, state["ema"][key])
        assert not torch.equal(value, state["net"][key])
    assert loaded.labels.class_names == ("left", "right")
    assert loaded.labels.null_class == 2
    assert loaded.noise == NOISE
    provenance = provenance_in(straight)
    assert provenance["data"] == "toy"
    assert provenance["step"] == 8
    assert provenance["images_seen"] == 8 * 4
    assert provenance["config"] == dataclasses.asdict(dataclasses.replace(RUN, threads=1))
    names = sorted(file.name for file in straight.rglob("*") if file.is_file())
    assert names == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "model_index.json",
        "scheduler_config.json",
        "tminus.json",
        STATE_FILE,
    ]


def test_save_that_fails_leaves_the_last_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, dataclasses.replace(RUN, steps=2))
    before = (tmp_path / STATE_FILE).read_bytes()

    def full_disk(_tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"part")
        raise OSError("No space left on device")

    monkeypatch.setattr(run_file, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path)
    assert (tmp_path / STATE_FILE).read_bytes() == before
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_unlabelled_set_trains_an_unconditional_net(tmp_path: Path) -> None:
    data = dataclasses.replace(toy_images(), labels=None, class_names=())
    assert train(tmp_path, data, TINY, NOISE, dataclasses.replace(RUN, steps=2), device=CPU)
    loaded = load_checkpoint(tmp_path)
    assert loaded.labels.num_classes == 0
    assert loaded.net.class_embedding is None


# --- starting from other weights ----------------------------------------------------------------------------------


def test_new_run_starts_from_the_weights_it_is_given(straight: Path, tmp_path: Path) -> None:
    frozen = dataclasses.replace(RUN, steps=1, learning_rate=0.0)
    run(tmp_path / "new", frozen, init_from=straight)
    state = state_of(tmp_path / "new")
    for key, value in load_checkpoint(straight).net.state_dict().items():
        assert torch.equal(state["net"][key], value)
    assert state["step"] == 1
    assert provenance_in(tmp_path / "new")["init_from"] == str(straight)


def test_a_run_goes_on_without_its_origin_or_with_it_by_any_spelling_and_with_no_other(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin, new, plain = tmp_path / "origin", tmp_path / "new", tmp_path / "plain"
    shutil.copytree(straight, origin)
    run(new, dataclasses.replace(RUN, steps=1), init_from=origin)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(origin)
    spellings = None, Path("origin"), tmp_path / "new" / ".." / "origin", tmp_path / "link"
    for steps, spelling in enumerate(spellings, 2):
        assert run(new, dataclasses.replace(RUN, steps=steps), init_from=spelling)
    shutil.rmtree(origin)
    assert run(new, dataclasses.replace(RUN, steps=6), init_from=Path("origin")), "its weights are needed no more"
    assert provenance_in(new)["init_from"] == str(origin)
    before = (new / STATE_FILE).read_bytes()
    with pytest.raises(TrainError, match=r"begun with init_from='.*origin', got '.*straight'; leave --init-from out"):
        run(new, dataclasses.replace(RUN, steps=7), init_from=straight)
    assert (new / STATE_FILE).read_bytes() == before
    run(plain, dataclasses.replace(RUN, steps=1))
    with pytest.raises(TrainError, match="begun with init_from=None, got"):
        run(plain, init_from=straight)


def test_what_is_recommended_is_kept_by_a_resumed_run_and_by_a_new_one_from_its_weights(
    straight: Path, tmp_path: Path
) -> None:
    origin, new, short = tmp_path / "origin", tmp_path / "new", tmp_path / "short"
    shutil.copytree(straight, origin)
    meta = json.loads((origin / "tminus.json").read_text("utf-8"))
    recommended = {"sampler": "dpmpp_2m", "steps": 7, "guidance": 1.5}
    (origin / "tminus.json").write_text(json.dumps(meta | {"recommended": recommended}), "utf-8")
    assert run(origin, dataclasses.replace(RUN, steps=9))
    assert run(new, dataclasses.replace(RUN, steps=1), init_from=origin)
    for folder in (origin, new):
        assert load_checkpoint(folder).recommended == Recommended(**recommended)
    tables = {"recommended": {"sampler": "tuned", "steps": 3}}
    (origin / "tminus.json").write_text(json.dumps(meta | tables), "utf-8")
    assert run(tmp_path / "third", dataclasses.replace(RUN, steps=1), init_from=origin)
    assert run(origin, dataclasses.replace(RUN, steps=10))
    for folder in (origin, tmp_path / "third"):
        usual = Recommended("dpmpp_2m", 20, 1.5)
        assert load_checkpoint(folder).recommended == usual, "tables fit only the weights that they were made for"
    (origin / "tminus.json").write_text(json.dumps(meta | {"recommended": recommended}), "utf-8")
    few = dataclasses.replace(NOISE, num_train_timesteps=6)
    one = dataclasses.replace(RUN, steps=1)
    assert train(short, toy_images(), CONDITIONAL, few, one, device=CPU, init_from=origin)
    assert load_checkpoint(short).recommended == Recommended("dpmpp_2m", 6, 1.5), "it has fewer timesteps than that"


@pytest.mark.parametrize(
    ("timesteps", "class_dropout", "expected"),
    [
        (50, 0.1, Recommended("dpmpp_2m", 20, 1.5)),
        (50, 0.0, Recommended("dpmpp_2m", 20)),  # the null class is never learned
        (6, 0.1, Recommended("dpmpp_2m", 6, 1.5)),
    ],
)
def test_a_new_run_recommends_few_steps_guided_where_it_learns_the_null_class(
    tmp_path: Path, timesteps: int, class_dropout: float, expected: Recommended
) -> None:
    noise = dataclasses.replace(NOISE, num_train_timesteps=timesteps)
    config = dataclasses.replace(RUN, steps=1, class_dropout=class_dropout)
    assert train(tmp_path, toy_images(), CONDITIONAL, noise, config, device=CPU)
    loaded = load_checkpoint(tmp_path)
    assert loaded.recommended == loaded.settings == expected
    loaded.plan(expected.sampler, expected.steps, guidance=expected.guidance)


def test_a_run_without_classes_recommends_no_guidance(tmp_path: Path) -> None:
    images = dataclasses.replace(toy_images(), labels=None, class_names=())
    assert train(tmp_path, images, TINY, NOISE, dataclasses.replace(RUN, steps=1), device=CPU)
    assert load_checkpoint(tmp_path).recommended == Recommended("dpmpp_2m", 20)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"block_out_channels": (16, 32)}, r"wrong shape of .*: this run asks for \(16,.*got \(8,"),
        ({"num_class_embeds": None}, r"do not fit this run: has class_embedding"),
    ],
    ids=["widths", "classes"],
)
def test_weights_of_another_network_are_refused(
    straight: Path, tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    unet = dataclasses.replace(CONDITIONAL, **change)
    data = toy_images() if "num_class_embeds" not in change else dataclasses.replace(toy_images(), labels=None)
    with pytest.raises(TrainError, match=f"straight: .*{why}"):
        train(tmp_path / "new", data, unet, NOISE, RUN, device=CPU, init_from=straight)
    assert not (tmp_path / "new" / STATE_FILE).exists()


# --- learning -----------------------------------------------------------------------------------------------------


class Recorder:
    """Stands for l_simple and keeps what it gives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.losses: list[float] = []
        self.l_simple = train_module.l_simple
        monkeypatch.setattr(train_module, "l_simple", self)

    def __call__(self, out: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
        loss = self.l_simple(out, target, weights)
        self.losses.append(loss.item())
        return loss


def test_loss_falls_on_a_toy_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    run(tmp_path, dataclasses.replace(RUN, steps=150, batch_size=16, learning_rate=1e-2, save_every=10**6))
    assert len(recorder.losses) == 150
    first, last = sum(recorder.losses[:3]) / 3, sum(recorder.losses[-30:]) / 30
    assert first > 0.8  # eps has variance 1, and the net knows nothing yet
    assert last < 0.5 * first


@pytest.mark.parametrize(
    ("prediction", "scheduler"), [("flow", FlowMatchEulerDiscreteScheduler), ("edm", EDMEulerScheduler)]
)
def test_a_run_of_flow_or_edm_learns_and_diffusers_samples_its_folder_to_the_same_images(
    prediction: str, scheduler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    noise = NoiseConfig(50, prediction_type=prediction, default_sampler="euler", clip_sample=False)
    config = dataclasses.replace(RUN, steps=150, batch_size=16, learning_rate=1e-2, save_every=10**6, flip=False)
    train(tmp_path, toy_images(), CONDITIONAL, noise, config, device=CPU)
    first, last = sum(recorder.losses[:3]) / 3, sum(recorder.losses[-30:]) / 30
    assert first > 0.8
    assert last < 0.8 * first

    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.noise == noise
    theirs = scheduler.from_pretrained(tmp_path, subfolder="scheduler")
    net = UNet2DModel.from_pretrained(tmp_path, subfolder="unet")
    eps, labels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 1])
    theirs.set_timesteps(10)
    with torch.no_grad():
        x = eps * getattr(theirs, "init_noise_sigma", 1.0)
        for t in theirs.timesteps:
            scaled = theirs.scale_model_input(x, t) if prediction == "edm" else x
            x = theirs.step(net(scaled, t, labels).sample, t, x).prev_sample
    got = sample(checkpoint.net, checkpoint.plan("euler", 10), eps, lambda _k: eps, class_labels=labels)
    torch.testing.assert_close(got, x, atol=1e-4, rtol=1e-5)
    bright = [got[0, :, :, :4].mean() > got[0, :, :, 4:].mean(), got[1, :, :, 4:].mean() > got[1, :, :, :4].mean()]
    assert all(bright), "left is bright on the left, and right on the right"


def test_training_that_diverges_stops_and_keeps_the_last_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, dataclasses.replace(RUN, steps=2))
    monkeypatch.setattr(train_module, "l_simple", lambda out, *_: (out * torch.nan).mean())
    with pytest.raises(TrainError, match="not finite"):
        run(tmp_path)
    assert state_of(tmp_path)["step"] == 2
    load_checkpoint(tmp_path)
    assert provenance_in(tmp_path)["step"] == 2


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_null_class_replaces_labels_as_often_as_asked_and_timesteps_are_uniform_over_the_whole_chain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dropout: float
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    forward = UNet2D.forward

    def record(self: UNet2D, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        assert class_labels is not None
        seen.append((t.clone(), class_labels.clone()))
        return forward(self, x, t, class_labels)

    monkeypatch.setattr(UNet2D, "forward", record)
    run(tmp_path, dataclasses.replace(RUN, steps=10, batch_size=200, class_dropout=dropout))
    timesteps, labels = (torch.cat(each) for each in zip(*seen, strict=True))
    share = (labels == 2).double().mean().item()
    assert share == pytest.approx(dropout, abs=4 * (dropout * (1 - dropout) / labels.numel()) ** 0.5)
    assert set(labels.unique().tolist()) == ({0, 1, 2} if dropout else {0, 1})
    counts = timesteps.bincount(minlength=50).double()
    assert len(counts) == 50
    chi_square = ((counts - 40) ** 2 / 40).sum().item()
    assert 20 < chi_square < 90  # 49 degrees of freedom: p of either side below 0.001


@pytest.mark.parametrize(("step", "decay"), [(0, 0.1), (90, 0.91), (10**6, 0.999)])
def test_decay_of_the_average_warms_up_as_one_plus_step_over_ten_plus_step(step: int, decay: float) -> None:
    net = torch.nn.Linear(3, 2)
    ema = Ema(net, 0.999)
    before = copy.deepcopy(ema.shadow)
    randomize(net, seed=1)
    ema.update(net, step)
    for key, value in net.state_dict().items():
        expected = decay * before[key].double() + (1 - decay) * value.double()
        torch.testing.assert_close(ema.shadow[key].double(), expected, rtol=1e-5, atol=1e-7)


# --- the order of images, the seeds, the learning rate ------------------------------------------------------------


@pytest.mark.parametrize(("num_images", "batch_size"), [(11, 4), (5, 12)])
def test_every_epoch_covers_each_image_once(num_images: int, batch_size: int) -> None:
    epochs = 4
    steps = -(-epochs * num_images // batch_size)
    picked = torch.cat([batch_indices(num_images, batch_size, 3, step) for step in range(steps)])
    orders = picked[: epochs * num_images].reshape(epochs, num_images).tolist()
    assert [sorted(order) for order in orders] == [list(range(num_images))] * epochs
    assert len({tuple(order) for order in orders}) == epochs  # each in an order of its own


def test_learning_rate_warms_up_holds_and_falls_to_zero() -> None:
    config = TrainConfig(steps=1000, batch_size=64, learning_rate=1e-3, warmup_steps=100, decay_fraction=0.2)
    rates = [config.learning_rate_at(step) for step in range(1001)]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[49] == pytest.approx(5e-4)
    assert rates[99:801] == [1e-3] * 702
    assert rates[900] == pytest.approx(5e-4)
    assert rates[999] == pytest.approx(5e-6)
    assert rates[1000] == 0


# --- on latents ---


def small_autoencoder() -> Autoencoder:
    """Of grey images; 8x8 pixels are latents of 3x4x4."""
    torch.manual_seed(2)
    return Autoencoder(
        AutoencoderConfig(
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 4),
            norm_num_groups=2,
            latent_channels=3,
            scaling_factor=1.5,
        )
    ).requires_grad_(False)


def latent_run(
    folder: Path, config: TrainConfig = RUN, init_from: Path | None = None, autoencoder: Autoencoder | None = None
) -> Autoencoder:
    autoencoder = autoencoder or small_autoencoder()
    unet = dataclasses.replace(CONDITIONAL, sample_size=4, in_channels=3, out_channels=3)
    noise = dataclasses.replace(NOISE, clip_sample=False)
    train(folder, toy_images(), unet, noise, config, device=CPU, init_from=init_from, autoencoder=autoencoder)
    return autoencoder


def test_a_run_on_latents_is_a_latent_checkpoint_and_its_x_0_are_the_scaled_latents_of_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    real = targets_module.training_target

    def target(noise: Any, schedule: Any, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        seen.append(x_0)
        return real(noise, schedule, x_0, t, eps)

    monkeypatch.setattr(targets_module, "training_target", target)
    autoencoder = latent_run(tmp_path, dataclasses.replace(RUN, flip=False))
    images = toy_images().images[batch_indices(11, 4, RUN.seed, 0)]
    torch.testing.assert_close(seen[0], autoencoder.encode(images.float() / 127.5 - 1), rtol=1e-4, atol=1e-5)
    found = load_checkpoint(tmp_path)
    assert (found.row_shape, found.image_shape) == ((3, 4, 4), (1, 8, 8))
    assert found.autoencoder is not None
    assert_same_bits(dict(found.autoencoder.state_dict()), dict(autoencoder.state_dict()))
    assert type(LDMPipeline.from_pretrained(tmp_path).vqvae) is AutoencoderKL


def test_another_autoencoder_and_mirrored_latents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="flip mirrors pixels"):
        latent_run(tmp_path)
    plain = dataclasses.replace(RUN, flip=False)
    latent_run(tmp_path, plain)
    unet = dataclasses.replace(CONDITIONAL, sample_size=4, in_channels=3, out_channels=3)
    other = load_checkpoint(tmp_path).autoencoder
    assert other is not None
    other.decoder.conv_out.bias.data += 1
    noise = dataclasses.replace(NOISE, clip_sample=False)
    with pytest.raises(TrainError, match="begun with autoencoder="):
        train(tmp_path, toy_images(), unet, noise, plain, device=CPU, autoencoder=other)


def test_an_autoencoder_that_an_earlier_run_left_is_replaced_and_none_is_left_to_a_model_of_pixels(
    tmp_path: Path,
) -> None:
    plain = dataclasses.replace(RUN, flip=False, steps=1)
    autoencoder = small_autoencoder()
    other = dataclasses.replace(autoencoder.config, scaling_factor=0.25)
    save_autoencoder(tmp_path / "vqvae", other, {key: value + 1 for key, value in autoencoder.state_dict().items()})
    latent_run(tmp_path, plain)
    found = load_checkpoint(tmp_path).autoencoder
    assert found is not None
    assert hash_autoencoder(found) == hash_autoencoder(autoencoder)

    (tmp_path / STATE_FILE).unlink()
    before = (tmp_path / "unet" / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"has an autoencoder in vqvae/, and this model is one of pixels; remove"):
        run(tmp_path, plain)
    assert (tmp_path / "unet" / "config.json").read_bytes() == before
    assert not (tmp_path / STATE_FILE).exists()
