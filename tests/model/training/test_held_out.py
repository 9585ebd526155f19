import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.model.training.test_train import (
    CONDITIONAL,
    CPU,
    NOISE,
    RUN,
    assert_same_run,
    run,
    state_of,
    toy_images,
)
from tminus.model.loss import velocity_weights
from tminus.model.noise import NoiseConfig
from tminus.model.training import held_out as held_out_module
from tminus.model.training.data import Examples
from tminus.model.training.held_out import mean_loss, note_losses
from tminus.model.training.train import train
from tminus.model.unet import UNet2D

HALF = 0.5


class Recorder:
    """A network that answers with half of its input, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def __call__(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        self.asked.append((x_t, t, class_labels))
        return HALF * x_t

    @property
    def x_t(self) -> Tensor:
        return torch.cat([x_t for x_t, _, _ in self.asked])

    @property
    def t(self) -> Tensor:
        return torch.cat([t for _, t, _ in self.asked])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_loss_is_that_of_the_formulas_in_float64(prediction: str, weighted: bool) -> None:
    noise = NoiseConfig(num_train_timesteps=1000, prediction_type=prediction)
    schedule, net = noise.schedule(), Recorder()
    x_0 = torch.rand((200, 1, 8, 8), generator=torch.Generator().manual_seed(2)) * 2 - 1
    weights = velocity_weights(noise, schedule).float() if weighted else None
    found = mean_loss(net, Examples(x_0, None), 200, noise, schedule, weights)

    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = (1 - beta).cumprod(0)[net.t][:, None, None, None]
    x_0, x_t = x_0.double(), net.x_t.double()
    eps = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
    target = {
        "epsilon": eps,
        "sample": x_0,
        "v_prediction": alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0,
    }[prediction]
    weight = weights[net.t].double() if weights is not None else torch.ones(200, dtype=torch.float64)
    assert found == pytest.approx(float((weight * (HALF * x_t - target).square().mean((1, 2, 3))).mean()), rel=1e-4)

    # What it rests on: every t as often, noise that is normal and of each image its own.
    assert net.t.sort().values.tolist() == list(range(0, 1000, 5))
    late = eps[net.t > 100].flatten()  # near t = 0 float32 leaves few digits of eps
    assert abs(float(late.mean())) < 4 / math.sqrt(len(late))
    assert float(late.std()) == pytest.approx(1, abs=4 / math.sqrt(2 * len(late)))
    assert abs(float(torch.corrcoef(eps[net.t > 100].flatten(1)[:2])[0, 1])) < 4 / math.sqrt(64)


def test_same_timesteps_noise_and_classes_at_every_call_in_batches_of_any_size() -> None:
    examples = Examples.some_of(toy_images(), 11, None, CPU)
    first, again = Recorder(), Recorder()
    one = mean_loss(first, examples, 11, NOISE, NOISE.schedule())
    other = mean_loss(again, examples, 11, NOISE, NOISE.schedule(), batch_size=3)
    assert (len(first.asked), len(again.asked)) == (1, 4)
    assert torch.equal(first.x_t, again.x_t)
    assert other == pytest.approx(one, rel=1e-6)
    labels = [labels for _, _, labels in again.asked]
    assert torch.cat([each for each in labels if each is not None]).tolist() == [k % 2 for k in range(11)]


# --- in a run -----------------------------------------------------------------------------------------------------


def losses_in(folder: Path) -> list[list[str]]:
    return [line.split(",") for line in (folder / "losses.csv").read_text().splitlines()]


def test_a_run_tells_of_held_out_images_and_is_the_same_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = dataclasses.replace(RUN, sheet_every=3)
    assert run(tmp_path / "without", config)
    assert not (tmp_path / "without" / "losses.csv").exists()
    others = dataclasses.replace(toy_images(20), name="others")
    with caplog.at_level("INFO"):
        assert run(tmp_path / "with", config, held_out=others)
    assert_same_run(tmp_path / "without", tmp_path / "with")
    head, *lines = losses_in(tmp_path / "with")
    assert head == ["step", "training", "held_out", "held_out_images"]
    assert [step for step, *_ in lines] == ["3", "6", "8"]
    assert all(0 < float(training) != float(of_others) > 0 for _, training, of_others, _ in lines)
    told = [record.getMessage() for record in caplog.records if "held out" in record.getMessage()]
    assert told == [
        f"step {step}: loss of the average {float(training):.5f} on training images, {float(of_others):.5f} held out"
        for step, training, of_others, _ in lines
    ]


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    for step, loss in ((1000, 0.5), (2000, 0.4), (3000, 0.3)):
        note_losses(tmp_path, step, loss, loss + 0.01, "others (20)")
    note_losses(tmp_path, 2000, 0.25, 0.125, "others (20)")  # killed after step 3000, resumed from a save before 2000
    assert losses_in(tmp_path) == [
        ["step", "training", "held_out", "held_out_images"],
        ["1000", "0.500000", "0.510000", "others (20)"],
        ["2000", "0.250000", "0.125000", "others (20)"],
    ]


@pytest.mark.parametrize(
    "left",
    [
        b"five,six,seven,\n",
        b"\xff\n",
    ],
    ids=["words", "no UTF-8"],
)
def test_lines_that_are_none_of_a_run_are_no_hindrance(tmp_path: Path, left: bytes) -> None:
    note_losses(tmp_path, 500, 0.5, 0.25, "others (20)")
    known = (tmp_path / "losses.csv").read_bytes()
    (tmp_path / "losses.csv").write_bytes(known + left)
    note_losses(tmp_path, 2000, 0.5, 0.25, "others (20)")
    assert (tmp_path / "losses.csv").read_bytes() == known + b"2000,0.500000,0.250000,others (20)\n"


def test_a_measurement_takes_no_larger_batches_than_a_step_and_64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    forward = UNet2D.forward

    def record(self: UNet2D, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        if not self.training:
            sizes.append(len(x))
        return forward(self, x, t, class_labels)

    monkeypatch.setattr(UNet2D, "forward", record)
    many = toy_images(70)
    config = dataclasses.replace(RUN, steps=1)
    assert run(tmp_path / "small", config, held_out=many)
    assert sizes == [4, 4, 3] * 2  # of a run whose steps take four
    sizes.clear()
    config = dataclasses.replace(config, batch_size=100)
    assert train(tmp_path / "large", many, CONDITIONAL, NOISE, config, device=CPU, held_out=many)
    assert sizes == [64, 6] * 2


def test_at_the_last_step_a_run_saves_before_it_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_args: object, **_options: object) -> float:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(held_out_module, "mean_loss", too_large)
    with pytest.raises(torch.OutOfMemoryError):
        run(tmp_path, held_out=toy_images(5))
    assert state_of(tmp_path)["step"] == RUN.steps
