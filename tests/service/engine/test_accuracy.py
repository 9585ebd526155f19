"""An executor that computes something else than PyTorch in float32, or does not run, does not serve."""

import faulthandler
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.model.latent.folders import save_latent_pipeline
from tests.service.engine.exact import CPU, bare, needs_bfloat16, needs_openvino
from tminus.model.checkpoint import Checkpoint, load_checkpoint
from tminus.service.engine import autotune, choice_cache, openvino_executor
from tminus.service.engine.accuracy import Unfit, Verdict, deviation
from tminus.service.engine.autotune import Choice, Wish, choose_executor, example_inputs
from tminus.service.engine.executors import Executor
from tminus.service.engine.openvino_executor import Graph, OpenVINOExecutor
from tminus.service.engine.pictures import LatentPictures

WISH = Wish(max_batch=4, threads=1)
IN_OPENVINO = Choice("openvino", "float32", sizes=(1,))
GARBAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": lambda out: torch.sin(1000 * out) * 3,
    "nan": lambda out: out * torch.nan,
    "scaled": lambda out: out * 1.05,
}


# --- the figures ---


@given(st.floats(-0.5, 0.5), st.integers(0, 3))
def test_a_deviation_is_that_of_the_row_that_differs_most(share: float, row: int) -> None:
    reference = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    out = reference.clone()
    out[row] *= 1 + share
    found = deviation(out, reference)
    assert found.relative_error == pytest.approx(abs(share), abs=1e-6)
    assert found.cosine == pytest.approx(1.0, abs=1e-6)


def test_an_output_that_is_not_finite_deviates_without_end_and_a_reference_that_is_not_does_not_count() -> None:
    reference = torch.ones(2, 3)
    assert deviation(torch.tensor([[1.0, 1, 1], [1, torch.nan, 1]]), reference).relative_error == torch.inf
    assert deviation(torch.zeros(2, 3), torch.zeros(2, 3)).relative_error == 0, "a network that gives nothing but zeros"
    reference[1] = torch.nan
    assert deviation(reference, reference).relative_error == 0


# --- garbage ---


@pytest.fixture
def in_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest of the candidates is the first one, untimed."""
    monkeypatch.setattr(autotune, "_fastest", lambda _builder, _wish, some: replace(some[0], sizes=(1,)))


def choose(checkpoint: Checkpoint, cache: Path | None, wish: Wish = WISH) -> Executor:
    return choose_executor(replace(checkpoint, net=copied(checkpoint)), CPU, wish, cache)


def copied(checkpoint: Checkpoint) -> Any:
    """A network of its own: the one that serves may give its weights up."""
    net = type(checkpoint.net)(checkpoint.net.config)
    net.load_state_dict(checkpoint.net.state_dict())
    return net.requires_grad_(False).eval()


def replace_outputs(monkeypatch: pytest.MonkeyPatch, executor: type, make: Callable[[Tensor], Tensor]) -> None:
    start = executor.start  # type: ignore[attr-defined]

    def replaced(self: Any, *inputs: Any) -> Callable[[], Tensor]:
        finish = start(self, *inputs)
        return lambda: make(finish())

    monkeypatch.setattr(executor, "start", replaced)


@needs_openvino
@pytest.mark.usefixtures("in_openvino")
@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("warm", [False, pytest.param(True, marks=pytest.mark.long)], ids=["cold", "warm"])
def test_an_executor_that_gives_garbage_is_refused_with_both_figures(
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    garbage: str,
    warm: bool,
) -> None:
    if warm:
        assert choose(checkpoint, tmp_path).name == "openvino"
    replace_outputs(monkeypatch, OpenVINOExecutor, GARBAGE[garbage])
    inputs = example_inputs(checkpoint, CPU, 2)
    for says in ("cosine", "delete"):  # the second start knows it, and says what to do
        caplog.clear()
        served = choose(checkpoint, tmp_path)
        assert served.name == "eager"
        torch.testing.assert_close(served(*inputs), bare(checkpoint, inputs))
        (line,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert "network by openvino in float32: its output differs" in line
        assert "at most 0.001 is allowed" in line
        assert says in line
    with pytest.raises(ValueError, match="cosine"):
        choose(checkpoint, None, replace(WISH, executor="openvino"))


@needs_bfloat16
@pytest.mark.usefixtures("in_openvino")
@pytest.mark.parametrize(("scale", "at_approval", "expected"), [
    (1.0, None, "bfloat16"), (1.05, None, "float32"), (1.05, 0.05, "bfloat16"), (1.02, None, "bfloat16"),
    (1.02, 0.002, "float32"),
])  # fmt: skip
def test_bfloat16_may_deviate_by_what_was_measured_when_it_was_approved(
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    scale: float,
    at_approval: float | None,
    expected: str,
) -> None:
    start = OpenVINOExecutor.start

    def scaled(self: OpenVINOExecutor, *inputs: Any) -> Callable[[], Tensor]:
        finish = start(self, *inputs)
        return lambda: finish() * (scale if self.precision == "bfloat16" else 1)

    monkeypatch.setattr(OpenVINOExecutor, "start", scaled)
    approved = replace(checkpoint, approved={("openvino", "bfloat16"): at_approval})
    assert choose(approved, None).precision == expected


@needs_openvino
@pytest.mark.usefixtures("in_openvino")
def test_outputs_are_compared_once_for_the_weights_and_the_processor(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    check = Verdict.check

    def counted(self: Verdict, bits: str, outputs: Any, reference: Any) -> None:
        check(self, bits, outputs, lambda: compared.append(1) or reference())

    monkeypatch.setattr(Verdict, "check", counted)
    for _ in range(2):
        assert choose(checkpoint, tmp_path).name == "openvino"
    assert len(compared) == 1
    choose(replace(checkpoint, weights_hash="f" * 64), tmp_path)
    assert len(compared) == 2, "other weights"
    monkeypatch.setattr(choice_cache, "_cpu", lambda: ("another", "processor"))
    choose(checkpoint, tmp_path)
    assert len(compared) == 3, "another processor"


@needs_openvino
@pytest.mark.parametrize("garbage", GARBAGE)
def test_an_autoencoder_that_gives_garbage_is_run_by_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, garbage: str
) -> None:
    one_thread = openvino_executor.one_thread

    def replaced(*args: Any) -> Any:
        run = one_thread(*args)
        return lambda x: GARBAGE[garbage](torch.from_numpy(run(x))).numpy()

    monkeypatch.setattr(openvino_executor, "one_thread", replaced)
    save_latent_pipeline(tmp_path / "latent", "kl")
    checkpoint = load_checkpoint(tmp_path / "latent")
    autoencoder = checkpoint.autoencoder
    assert autoencoder is not None
    latents = torch.randn(1, *checkpoint.row_shape, generator=torch.Generator().manual_seed(1))
    pictures = LatentPictures(checkpoint, CPU, tmp_path / "cache")
    (image,) = pictures.read(latents, [None], 32)()
    torch.testing.assert_close(torch.from_numpy(image).permute(2, 0, 1), autoencoder.decode(latents)[0])
    parts = [line.split(" in float32")[0] for line in caplog.messages if "PyTorch" in line]
    assert parts == ["decoder by openvino", "encoder by openvino"]


# --- what does not run ---


@needs_openvino
@pytest.mark.usefixtures("in_openvino")
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_where_openvino_cannot_compile_eager_serves(
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    warm: bool,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("stoi\nat cpu_map.cpp")

    if warm:
        assert choose(checkpoint, tmp_path).name == "openvino"
    monkeypatch.setattr(Graph, "compile", fail)
    inputs = example_inputs(checkpoint, CPU, 2)
    for _ in range(2):
        caplog.clear()
        served = choose(checkpoint, tmp_path)
        torch.testing.assert_close(served(*inputs), bare(checkpoint, inputs))
        warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert warnings == ["network by openvino in float32 does not run here: stoi"]


DYING = """
import os, sys
from pathlib import Path
import torch
from tminus.model.checkpoint import load_checkpoint
from tminus.service.engine.autotune import Wish, choose_executor
from tminus.service.engine.openvino_executor import Graph
if sys.argv[3] != "0":
    Graph.compile = lambda *_: os.kill(os.getpid(), int(sys.argv[3]))
print(choose_executor(load_checkpoint(Path(sys.argv[1])), torch.device("cpu"), Wish(threads=1), Path(sys.argv[2])).name)
"""


@needs_openvino
@pytest.mark.parametrize(("fatal", "warm"), [
    (signal.SIGILL, False), pytest.param(signal.SIGFPE, True, marks=pytest.mark.long)
], ids=["cold", "warm"])  # fmt: skip
def test_a_start_after_one_that_a_signal_ended_takes_eager_and_says_why(
    tmp_path: Path, fatal: signal.Signals, warm: bool
) -> None:
    folder, cache = tmp_path / "model", tmp_path / "cache"
    save_latent_pipeline(folder, "kl")

    def start(kill: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", DYING, str(folder), str(cache), str(kill)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)

    if warm:
        assert start().stdout == "openvino\n"
        for verdict in cache.glob("choice-*.json"):  # as of a container that has moved to other cores
            if "float32" in json.loads(verdict.read_text()):
                verdict.unlink()
    assert start(fatal).returncode == -fatal
    after = start(fatal)
    assert after.stdout == "eager\n"
    (line,) = [line for line in after.stderr.splitlines() if line.startswith("network by openvino")]
    assert line.startswith("network by openvino: an earlier start ended while it was tried: Fatal Python error")
    assert "; delete" in line


def test_an_attempt_refuses_nothing_while_its_process_lives_or_when_it_ends_otherwise(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verdict(precision: str = "float32") -> Verdict:
        return Verdict(checkpoint, CPU, "openvino", precision, tmp_path)

    def end_in_an_attempt(end: Callable[[], object]) -> None:
        if (child := os.fork()) == 0:
            with verdict().attempt():
                end()
        os.waitpid(child, 0)

    for elsewhere in (True, False):  # whether something else has the signals written
        monkeypatch.setattr(faulthandler, "is_enabled", lambda elsewhere=elsewhere: elsewhere)
        with verdict().attempt():
            assert list(tmp_path.glob("*.attempt"))
            assert verdict().refusal is None
        with pytest.raises(RuntimeError), verdict().attempt():
            raise RuntimeError
        assert not list(tmp_path.glob("*.attempt"))
    for end in (lambda: os._exit(0), lambda: os.kill(os.getpid(), signal.SIGKILL)):
        end_in_an_attempt(end)
        assert verdict().refusal is None
    end_in_an_attempt(lambda: os.kill(os.getpid(), signal.SIGILL))
    assert not list(tmp_path.glob("*.attempt")) or verdict().refusal
    with pytest.raises(Unfit, match=r"an earlier start ended while it was tried: Fatal.*Illegal"), verdict().attempt():
        pass
    assert verdict("bfloat16").refusal is not None, "what ends the process in one precision is not tried in another"
