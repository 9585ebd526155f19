from pathlib import Path

import pytest
from click.testing import Result

from tests.service.cli.running import line_of, run
from tests.tiny import TINY, randomize
from tminus.model.catalogue import TEACHERS
from tminus.model.checkpoint import Labels, load_checkpoint, save_checkpoint
from tminus.model.noise import NoiseConfig
from tminus.model.unet import UNet2D

RUN = ["--steps", "2", "--batch-size", "4", "--trajectories", "4", "--teacher-steps", "4", "--precision", "fp32"]


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    net = UNet2D(TINY)
    randomize(net)
    noise = NoiseConfig(num_train_timesteps=20, beta_end=0.3)
    save_checkpoint(tmp_path / "teacher", net.state_dict(), TINY, noise, Labels(), {})
    return tmp_path / "teacher"


def distill(teacher: Path, out: Path, *arguments: str) -> Result:
    return run("distill", "--checkpoint", teacher, "--out", out, *RUN, *arguments)


def test_student_with_a_sheet_is_what_the_command_leaves(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tminus.model.training.teacher.REFERENCE_ROWS", 8)
    result = distill(teacher, tmp_path / "student", "--student-steps", "1,2", "--sheet-every", "1")
    assert result.exit_code == 0, result.output
    assert result.output.endswith(f"student: done\nTry: tminus serve --checkpoint {tmp_path / 'student'}\n")
    assert load_checkpoint(tmp_path / "student").samplers == ("consistency",)
    assert sorted(file.name for file in (tmp_path / "student" / "sheets").iterdir()) == ["0000001.png", "0000002.png"]
    sample = ["sample", "--checkpoint", tmp_path / "student", "-n", "2", "--steps", "2", "--out", tmp_path / "two.png"]
    made = run(*sample, "--sampler", "consistency", "--executor", "eager", "--precision", "float32", "--device", "cpu")
    assert made.exit_code == 0, made.output


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--data", "/nowhere"], "/nowhere: neither fashion-mnist nor a folder of images"),
        (["--guidance", "2"], "guidance must be 1 (off) for a checkpoint without a null class, got 2"),
        (["--student-steps", "two"], "--student-steps must be integers joined by commas, got 'two'"),
        (
            ["--teacher-sampler", "ddpm"],
            f"teacher_sampler must be among {', '.join(TEACHERS)}, got 'ddpm'",
        ),
    ],
)
def test_a_failure_is_one_clear_line(teacher: Path, tmp_path: Path, arguments: list[str], line: str) -> None:
    result = distill(teacher, tmp_path / "student", *arguments)
    assert result.exit_code == 1
    assert result.output == f"tminus: {line}\n"
    assert not (tmp_path / "student").exists()


def test_a_run_that_cannot_be_written_is_one_clear_line(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "Not a directory" in line_of(distill(teacher, tmp_path / "file" / "student"))
