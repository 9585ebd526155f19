"""What is chosen, and which sizes go together."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from tests.service.conftest import Around, MakeCheckpoint
from tminus.model.checkpoint import Checkpoint
from tminus.service.engine import autotune, openvino_executor
from tminus.service.engine.autotune import Choice, Measured, Wish, choose_executor, example_inputs, valid_choice
from tminus.service.engine.executors import MAX_GRAPHS, Executor

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
EAGER = Wish(executor="eager", precision="float32", max_batch=4)
HAS_OPENVINO = openvino_executor.available()
needs_openvino = pytest.mark.skipif(not HAS_OPENVINO, reason="openvino, an extra, is not installed")
HAS_BFLOAT16 = HAS_OPENVINO and "bfloat16" in openvino_executor.precisions()

Timed = Callable[[Callable[[], object], torch.device], float]


# --- a wish that cannot be ---


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        (Wish(executor="onnx"), "executor must be auto, eager, compile, openvino, got 'onnx'"),
        (Wish(executor=""), "executor must be"),
        (Wish(precision="float16"), "precision must be auto, float32, tf32, bfloat16, got 'float16'"),
        (Wish(precision="bf16"), "precision must be"),
    ],
)
def test_an_unknown_wish_is_refused_with_the_choice(checkpoint: Checkpoint, wish: Wish, says: str) -> None:
    with pytest.raises(ValueError, match="must be") as caught:
        choose_executor(checkpoint, CPU, wish, None)
    assert says in str(caught.value)


def test_openvino_that_is_not_installed_is_refused_with_the_way_to_get_it(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_executor, "openvino", None)
    with pytest.raises(ValueError, match="not installed: pip install"):
        choose_executor(checkpoint, CPU, Wish(executor="openvino"), None)


@needs_openvino
def test_openvino_on_a_gpu_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="runs on a CPU, got device cuda"):
        choose_executor(checkpoint, CUDA, Wish(executor="openvino"), None)


@needs_openvino
def test_a_precision_that_the_processor_lacks_is_refused(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_executor, "precisions", lambda: ("float32",))
    with pytest.raises(ValueError, match="precision bfloat16 is not something this processor"):
        choose_executor(checkpoint, CPU, Wish(executor="openvino", precision="bfloat16"), None)


# --- what is chosen ---


@pytest.mark.skipif(not HAS_BFLOAT16, reason="this processor has no bfloat16 instructions")
@pytest.mark.parametrize(
    ("approved", "precision"),
    [((), "float32"), ((("eager", "float32"),), "float32"), ((("openvino", "bfloat16"),), "bfloat16")],
)
def test_the_faster_precision_is_chosen_only_if_it_is_approved(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, approved: tuple[tuple[str, str], ...], precision: str
) -> None:
    def tried(_builder: object, _wish: Wish, candidate: Choice, *_: object) -> Measured:
        seconds = 1.0 if candidate.precision == "bfloat16" else 2.0
        return Measured(replace(candidate, sizes=(1,)), seconds, seconds)

    monkeypatch.setattr(autotune, "_with_sizes", tried)
    executor = choose_executor(replace(checkpoint, approved=approved), CPU, Wish(), None)
    assert executor.precision == precision


def test_a_candidate_that_does_not_run_is_passed_over(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(_builder: object, _wish: Wish, candidate: Choice, *_: object) -> Measured:
        if candidate.executor == "openvino" or not candidate.channels_last:
            raise RuntimeError("not here")
        return Measured(replace(candidate, sizes=(2,)), 1.0, 1.0)

    monkeypatch.setattr(autotune, "_with_sizes", tried)
    executor = choose_executor(checkpoint, CPU, Wish(), None)
    assert (executor.name, executor.details) == ("eager", "channels_last, passes of 2")


def test_where_nothing_runs_that_is_said(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(*_args: object) -> Measured:
        raise RuntimeError("not here")

    monkeypatch.setattr(autotune, "_with_sizes", tried)
    with pytest.raises(ValueError, match="no executor runs here"):
        choose_executor(checkpoint, CPU, Wish(), None)


def test_the_fastest_by_both_times_is_chosen(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(_builder: object, _wish: Wish, candidate: Choice, *_: object) -> Measured:
        lone_s, row_s = (4.0, 1.0) if candidate.channels_last else (1.0, 3.0)
        return Measured(replace(candidate, sizes=(1,)), lone_s, row_s)

    monkeypatch.setattr(autotune, "_with_sizes", tried)
    executor = choose_executor(checkpoint, CPU, EAGER, None)
    assert executor.details.startswith("contiguous")


# --- sizes ---


class Disagreeing(Around):
    """Gives other bits where a pass is large."""

    def __init__(self, executor: Executor, off: bool) -> None:
        super().__init__(executor)
        self._off = off

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        out = super().__call__(x, t, class_labels)
        return out.nextafter(torch.tensor(9.0)) if self._off else out


@pytest.mark.parametrize(("exact", "expected"), [(True, ((1,), (2, 4))), (False, ((1, 2, 4),))])
def test_only_sizes_that_agree_to_the_bit_go_together(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, exact: bool, expected: tuple[tuple[int, ...], ...]
) -> None:
    times = {1: 0.008, 2: 0.006, 4: 0.004}  # a row

    def tried(_builder: object, _wish: Wish, choice: Choice, _hopeless: float) -> object:
        assert choice.sizes is not None
        (size,) = choice.sizes
        return autotune._Trial(size, 0.008, times[size], b"one" if size == 1 else b"other")

    monkeypatch.setattr(autotune, "_try", tried)
    builder = autotune.Builder(checkpoint, CPU, 1)
    candidate = Choice("openvino", "float32")
    chosen = autotune._with_sizes(builder, Wish(exact=exact, max_batch=16), candidate).choice
    assert chosen.sizes == expected[-1], "the group of the better times"


def test_a_size_that_is_hardly_faster_is_left_out(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {1: 0.0080, 2: 0.0079, 4: 0.006}

    def tried(_builder: object, _wish: Wish, choice: Choice, _hopeless: float) -> object:
        assert choice.sizes is not None
        return autotune._Trial(choice.sizes[0], 0.008, times[choice.sizes[0]], b"the same")

    monkeypatch.setattr(autotune, "_try", tried)
    builder = autotune.Builder(checkpoint, CPU, 1)
    measured = autotune._with_sizes(builder, Wish(), Choice("openvino", "float32"))
    assert measured.choice.sizes == (1, 4)
    assert measured.row_s == 0.006


def test_what_is_far_slower_than_the_best_is_tried_at_one_size_only(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []

    def tried(_builder: object, _wish: Wish, choice: Choice, _hopeless: float) -> object:
        assert choice.sizes is not None
        seen.append((choice.executor, choice.sizes[0]))
        seconds = {"openvino": 0.001, "eager": 0.004}[choice.executor] / choice.sizes[0]
        return autotune._Trial(choice.sizes[0], seconds, seconds, b"the same")

    monkeypatch.setattr(autotune, "_try", tried)
    builder = autotune.Builder(checkpoint, CPU, 1)
    best = autotune._fastest(builder, Wish(), [Choice("openvino", "float32"), Choice("eager", "float32")])
    assert best.executor == "openvino"
    assert seen == [("openvino", 1), ("openvino", 2), ("openvino", 4), ("eager", 1)]


@pytest.mark.parametrize(("best_s", "hopeless"), [(0.001, True), (1.0, False)])
def test_what_one_row_shows_to_be_far_slower_is_not_timed_with_a_full_batch(
    checkpoint: Checkpoint, best_s: float, hopeless: bool
) -> None:
    class Timed:
        device = CPU
        checkpoint: Checkpoint
        passes: ClassVar[list[int]] = []

        def build(self, _choice: Choice) -> Callable[..., Tensor]:
            return lambda x, _t, _labels: self.passes.append(len(x)) or x

        def time(self, call: Callable[[], object]) -> float:
            call()
            return 0.01

    Timed.checkpoint, Timed.passes = checkpoint, []
    best = autotune.Measured(Choice("openvino", "float32"), best_s, best_s)
    measured = autotune._with_sizes(Timed(), Wish(threads=2), Choice("eager", "float32"), best)  # type: ignore[arg-type]
    assert (max(Timed.passes) == 1) == hopeless
    assert (measured.score > autotune.HOPELESS * best.score) == hopeless


def test_on_a_machine_too_busy_to_measure_on_the_first_candidate_is_taken_as_it_is(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def tried(_builder: object, _wish: Wish, choice: Choice, _hopeless: float) -> object:
        assert choice.sizes is not None
        return autotune._Trial(choice.sizes[0], 1.0, 1.0, b"the same")

    monkeypatch.setattr(autotune, "_try", tried)
    monkeypatch.setattr(autotune, "BUDGET_S", -1.0)
    builder = autotune.Builder(checkpoint, CPU, 1)
    best = autotune._fastest(builder, Wish(), [Choice("openvino", "float32"), Choice("eager", "float32")])
    assert (best.executor, best.sizes) == ("openvino", (1,))
    assert "1 executors were not tried" in caplog.text


class Widening:
    """Builds executors whose times and bits depend on how many places go in wide passes."""

    def __init__(self, checkpoint: Checkpoint, seconds: dict[int, float], other_bits: int | None = None) -> None:
        self.checkpoint, self.device = checkpoint, CPU
        self.seconds, self.other_bits = seconds, other_bits
        self.wide = 0

    def build(self, choice: Choice) -> Callable[..., Tensor]:
        def run(x: Tensor, _t: Tensor, _labels: Tensor | None) -> Tensor:
            self.wide = choice.wide
            return x + 1 if choice.wide and choice.wide == self.other_bits else x

        return run

    def time(self, call: Callable[[], object]) -> float:
        call()
        return self.seconds[self.wide]


@pytest.mark.parametrize(
    ("threads", "seconds", "other_bits", "exact", "expected"),
    [
        (1, {0: 1.0}, None, True, 0),
        (2, {0: 1.0, 1: 0.6}, None, True, 1),
        (2, {0: 1.0, 1: 0.98}, None, True, 0),
        (2, {0: 1.0, 1: 0.6}, 1, True, 0),
        (2, {0: 1.0, 1: 0.6}, 1, False, 1),
        (8, {0: 1.0, 1: 0.2, 2: 0.4, 4: 0.8}, None, True, 4),
        (8, {0: 1.0, 1: 0.4, 2: 0.8, 4: 1.6}, None, True, 2),
    ],
)
def test_places_go_the_wide_way_where_that_is_faster_and_gives_the_same_bits(
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    seconds: dict[int, float],
    other_bits: int | None,
    exact: bool,
    expected: int,
) -> None:
    builder = Widening(checkpoint, seconds, other_bits)
    wish = Wish(threads=threads, exact=exact)
    narrow = Choice("openvino", "float32", sizes=(1, 2))
    measured = autotune._with_wide(builder, wish, Measured(narrow, 1.0, 0.5))  # type: ignore[arg-type]
    assert measured == Measured(replace(narrow, wide=expected), seconds[1] if expected else 1.0, 0.5)


def test_no_size_is_larger_than_the_batch(checkpoint: Checkpoint, quick: list[int]) -> None:
    executor = choose_executor(checkpoint, CPU, replace(EAGER, max_batch=1), None)
    assert executor.details.endswith("passes of 1")


def test_eager_that_need_not_be_exact_takes_any_batch_whole(checkpoint: Checkpoint, quick: list[int]) -> None:
    assert "passes" not in choose_executor(checkpoint, CPU, replace(EAGER, exact=False), None).details


@pytest.mark.parametrize("max_batch", [1, 2, 3, 4, 16, 17, 64, 256, 1000, 4096])
def test_graphs_are_few_and_reach_from_one_row_to_the_largest_batch(max_batch: int) -> None:
    sizes = autotune._graph_sizes(max_batch)
    assert len(sizes) <= MAX_GRAPHS
    assert sizes == tuple(sorted(set(sizes)))
    assert sizes[-1] == max_batch
    assert sizes[0] == 1 or len(sizes) == MAX_GRAPHS


# --- which kept answers are taken ---


@pytest.mark.parametrize(
    ("sizes", "sound"),
    [
        ((1, 2, 4), True),
        ((4,), True),
        (tuple(range(1, MAX_GRAPHS + 1)), True),
        (tuple(range(1, MAX_GRAPHS + 2)), False),
        ((1, 17), False),
        ((2, 1), False),
        ((), True),
    ],
)
def test_sizes_that_were_kept_are_taken_only_if_they_could_be_measured_now(sizes: tuple[int, ...], sound: bool) -> None:
    candidate = Choice("openvino", "float32")
    fields = json.loads(json.dumps(asdict(replace(candidate, sizes=sizes))))
    expected = replace(candidate, sizes=sizes or None) if sound else None
    assert valid_choice(fields, [candidate], Wish(max_batch=16)) == expected


@pytest.mark.parametrize(("wide", "sound"), [(0, True), (1, True), (2, False), (-1, False), (1.0, False), ("1", False)])
def test_a_kept_wide_way_is_taken_only_if_it_could_be_measured_now(wide: object, sound: bool) -> None:
    candidate = Choice("openvino", "float32")
    fields = {**asdict(replace(candidate, sizes=(1, 2))), "wide": wide}
    found = valid_choice(fields, [candidate], Wish(max_batch=16, threads=2))
    assert (found is not None) == sound


# --- the real measurement ---


def test_what_is_chosen_here_gives_what_the_network_gives(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "TRIAL_S", 0.01)
    inputs = example_inputs(checkpoint, CPU, 5)
    with torch.inference_mode():
        expected = checkpoint.net(*inputs)
    executor = choose_executor(checkpoint, CPU, Wish(max_batch=4), tmp_path)
    assert executor.precision == "float32", "nothing else is approved"
    torch.testing.assert_close(executor(*inputs), expected, atol=1e-5, rtol=1e-4)


def test_example_inputs_are_always_the_same_and_of_all_kinds(checkpoint: Checkpoint) -> None:
    x, t, labels = example_inputs(checkpoint, CPU, 32)
    again = example_inputs(checkpoint, CPU, 32)
    assert x.equal(again[0])
    assert labels is not None
    assert len(set(t.tolist())) > 8
    assert set(labels.tolist()) == {0, 1, 2, 3}


def test_a_small_network_in_bfloat16_is_compared_on_many_rows(make_checkpoint: MakeCheckpoint) -> None:
    small, large = make_checkpoint(), make_checkpoint(sample_size=64, block_out_channels=(128, 128))
    assert autotune.agree_rows(small, "float32") == autotune.AGREE_ROWS
    assert autotune.agree_rows(small, "bfloat16") == autotune.MAX_AGREE_ROWS
    assert autotune.agree_rows(large, "bfloat16") == autotune.AGREE_ROWS
