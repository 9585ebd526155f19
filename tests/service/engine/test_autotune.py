"""What may be chosen, what is chosen, and which sizes go together."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from tests.service.engine.exact import CPU, needs_openvino
from tminus.model.checkpoint import Checkpoint
from tminus.service.engine import autotune, openvino_executor
from tminus.service.engine.autotune import (
    Choice,
    TimedChoice,
    Wish,
    choose_executor,
    example_inputs,
    find_candidates,
    valid_choice,
)
from tminus.service.engine.executors import MAX_GRAPHS

pytestmark = pytest.mark.slow

CUDA = torch.device("cuda")
EAGER = Wish(executor="eager", precision="float32", max_batch=4)
HAS_OPENVINO = openvino_executor.available()
HAS_BFLOAT16 = HAS_OPENVINO and "bfloat16" in openvino_executor.precisions()

Timed = Callable[[Callable[[], object], torch.device], float]


# --- a wish that cannot be ---


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        (Wish(executor="onnx"), "executor must be auto, eager, compile, openvino, got 'onnx'"),
        (Wish(precision="float16"), "precision must be auto, float32, tf32, bfloat16, got 'float16'"),
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


# --- what is chosen ---


@pytest.mark.skipif(not HAS_BFLOAT16, reason="this processor has no bfloat16 instructions")
@pytest.mark.parametrize(
    ("approved", "precision"),
    [((), "float32"), ([("eager", "float32")], "float32"), ([("openvino", "bfloat16")], "bfloat16")],
)
def test_the_faster_precision_is_chosen_only_if_it_is_approved(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, approved: Sequence[tuple[str, str]], precision: str
) -> None:
    def tried(_builder: object, _wish: Wish, candidate: Choice, *_: object) -> TimedChoice:
        seconds = 1.0 if candidate.precision == "bfloat16" else 2.0
        return TimedChoice(replace(candidate, sizes=(1,)), seconds, seconds)

    monkeypatch.setattr(autotune, "_with_sizes", tried)
    executor = choose_executor(replace(checkpoint, approved=dict.fromkeys(approved)), CPU, Wish(), None)
    assert executor.precision == precision


def test_a_candidate_that_does_not_run_is_passed_over(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(_builder: object, _wish: Wish, candidate: Choice, *_: object) -> TimedChoice:
        if candidate.executor == "openvino" or not candidate.channels_last:
            raise RuntimeError("not here")
        return TimedChoice(replace(candidate, sizes=(2,)), 1.0, 1.0)

    monkeypatch.setattr(autotune, "_with_sizes", tried)
    executor = choose_executor(checkpoint, CPU, Wish(), None)
    assert (executor.name, executor.details) == ("eager", "channels_last, passes of 2")


def test_the_fastest_by_both_times_is_chosen(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(_builder: object, _wish: Wish, candidate: Choice, *_: object) -> TimedChoice:
        lone_s, row_s = (4.0, 1.0) if candidate.channels_last else (1.0, 3.0)
        return TimedChoice(replace(candidate, sizes=(1,)), lone_s, row_s)

    monkeypatch.setattr(autotune, "_with_sizes", tried)
    executor = choose_executor(checkpoint, CPU, EAGER, None)
    assert executor.details.startswith("contiguous")


# --- sizes ---


@pytest.mark.parametrize(("exact", "expected"), [(True, ((1,), (2, 4, 8))), (False, ((1, 2, 4, 8),))])
def test_only_sizes_that_agree_to_the_bit_go_together(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, exact: bool, expected: tuple[tuple[int, ...], ...]
) -> None:
    times = {1: 0.008, 2: 0.006, 4: 0.004, 8: 0.003}  # a row

    def tried(_builder: object, _wish: Wish, choice: Choice, _hopeless: float) -> TimedChoice:
        assert choice.sizes is not None
        (size,) = choice.sizes
        return TimedChoice(choice, 0.008, times[size], b"one" if size == 1 else b"other")

    monkeypatch.setattr(autotune, "_try", tried)
    builder = autotune.Builder(checkpoint, CPU, 1)
    candidate = Choice("openvino", "float32")
    chosen = autotune._with_sizes(builder, Wish(exact=exact, max_batch=16), candidate).choice
    assert chosen.sizes == expected[-1], "the group of the better times"


def test_a_size_that_is_hardly_faster_is_left_out(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {1: 0.0080, 2: 0.0079, 4: 0.006, 8: 0.006}

    def tried(_builder: object, _wish: Wish, choice: Choice, _hopeless: float) -> TimedChoice:
        assert choice.sizes is not None
        return TimedChoice(choice, 0.008, times[choice.sizes[0]], b"the same")

    monkeypatch.setattr(autotune, "_try", tried)
    builder = autotune.Builder(checkpoint, CPU, 1)
    measured = autotune._with_sizes(builder, Wish(), Choice("openvino", "float32"))
    assert measured.choice.sizes == (1, 4)
    assert measured.row_s == 0.006


def test_what_is_far_slower_than_the_best_is_tried_at_one_size_only(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, int]] = []

    def tried(_builder: object, _wish: Wish, choice: Choice, _hopeless: float) -> TimedChoice:
        assert choice.sizes is not None
        seen.append((choice.channels_last, choice.sizes[0]))
        seconds = (0.001 if choice.channels_last else 0.004) / choice.sizes[0]
        return TimedChoice(choice, seconds, seconds, b"the same")

    monkeypatch.setattr(autotune, "_try", tried)
    builder = autotune.Builder(checkpoint, CPU, 1)
    best = autotune._fastest(builder, Wish(), [Choice("eager", "float32", last) for last in (True, False)])
    assert best.channels_last
    assert seen == [(True, 1), (True, 2), (True, 4), (True, 8), (False, 1)]


@pytest.mark.parametrize("runs", [True, False])
def test_on_a_cpu_eager_is_tried_only_where_openvino_cannot_run_the_network(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, runs: bool
) -> None:
    tried: list[str] = []

    def with_sizes(_builder: object, _wish: Wish, choice: Choice, *_: object) -> TimedChoice:
        tried.append(choice.executor)
        if choice.executor == "openvino" and not runs:
            raise RuntimeError("no such operation")
        return TimedChoice(choice, 0.001, 0.001)

    monkeypatch.setattr(autotune, "_with_sizes", with_sizes)
    builder = autotune.Builder(checkpoint, CPU, 1)
    best = autotune._fastest(builder, Wish(), [Choice("openvino", "float32"), Choice("eager", "float32")])
    assert best.executor == tried[-1]
    assert tried == (["openvino"] if runs else ["openvino", "eager"])


@pytest.mark.parametrize(("best_s", "hopeless"), [(0.001, True), (1.0, False)])
def test_what_one_row_shows_to_be_far_slower_is_not_timed_with_a_full_batch(
    checkpoint: Checkpoint, best_s: float, hopeless: bool
) -> None:
    class Timed:
        device, is_large, worth = CPU, False, autotune.WORTH
        checkpoint: Checkpoint
        passes: ClassVar[list[int]] = []

        def build(self, _choice: Choice) -> Callable[..., Tensor]:
            return lambda x, _t, _labels: self.passes.append(len(x)) or x

        def time(self, call: Callable[[], object]) -> float:
            call()
            return 0.01

        def tell(self, pass_s: float) -> None:
            assert pass_s == 0.01

    Timed.checkpoint, Timed.passes = checkpoint, []
    best = autotune.TimedChoice(Choice("openvino", "float32"), best_s, best_s)
    measured = autotune._with_sizes(Timed(), Wish(threads=2), Choice("eager", "float32"), best)  # type: ignore[arg-type]
    assert (max(Timed.passes) == 1) == hopeless
    assert (measured.score > autotune.HOPELESS * best.score) == hopeless


def test_on_a_machine_too_busy_to_measure_on_one_size_is_tried_of_each_candidate(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one tried last may be the faster."""

    def tried(_builder: object, _wish: Wish, choice: Choice, _hopeless: float) -> TimedChoice:
        assert choice.sizes is not None
        seconds = 1.0 if choice.precision == "bfloat16" else 0.5
        return TimedChoice(choice, seconds, seconds, b"the same")

    monkeypatch.setattr(autotune, "_try", tried)
    monkeypatch.setattr(autotune, "BUDGET_S", -1.0)
    builder = autotune.Builder(checkpoint, CPU, 1)
    candidates = [Choice("openvino", precision) for precision in ("bfloat16", "float32")]
    best = autotune._fastest(builder, Wish(), candidates)
    assert (best.precision, best.sizes) == ("float32", (1,))


class Widening:
    """Builds executors whose times and bits depend on how many places go in wide passes."""

    def __init__(self, checkpoint: Checkpoint, seconds: dict[int, float], other_bits: int | None = None) -> None:
        self.checkpoint, self.device, self.worth = checkpoint, CPU, autotune.WORTH
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
        (2, {0: 1.0, 1: 0.6}, 1, True, 0),
        (2, {0: 1.0, 1: 0.6}, 1, False, 1),
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
    measured = autotune._with_wide(builder, wish, TimedChoice(narrow, 1.0, 0.5))  # type: ignore[arg-type]
    assert measured == TimedChoice(replace(narrow, wide=expected), seconds[1] if expected else 1.0, 0.5)


class OneStream:
    """Builds executors of a large network that take a second for a pass on all threads, and so much in streams."""

    device, is_large, worth = CPU, True, autotune.WORTH_LARGE

    def __init__(self, checkpoint: Checkpoint, row_s: float) -> None:
        self.checkpoint, self.row_s, self.forgotten, self.built = checkpoint, row_s, 0, list[Choice]()
        self.told: list[float] = []
        self.tell = self.told.append

    def build(self, choice: Choice) -> Callable[..., Tensor]:
        self.built.append(choice)
        return lambda x, _t, _labels: x

    def time(self, call: Callable[[], Tensor]) -> float:
        return self.row_s * len(call()) if self.built[-1].streams is None else 1.0

    def forget_compiled(self) -> None:
        self.forgotten += 1


@pytest.mark.parametrize(
    ("threads", "row_s", "alone"), [(1, 0.1, True), (4, 0.1, True), (8, 0.9, True), (8, 0.8, False)]
)
def test_a_large_network_runs_on_all_threads_unless_streams_are_worth_holding_its_weights_twice(
    checkpoint: Checkpoint, threads: int, row_s: float, alone: bool
) -> None:
    builder, candidate = OneStream(checkpoint, row_s), Choice("openvino", "float32")
    found = autotune._in_one_stream(builder, Wish(threads=threads), candidate)  # type: ignore[arg-type]
    assert found == (TimedChoice(replace(candidate, sizes=(1,), streams=1), 1.0, 1.0) if alone else None)
    assert builder.told == [1.0]
    if found is not None and len(builder.built) > 1:
        assert builder.forgotten == 2, "neither is held while the other is measured, nor after"


@pytest.mark.parametrize("max_batch", [1, 17, 4096])
def test_graphs_are_few_and_reach_from_one_row_to_the_largest_batch(max_batch: int) -> None:
    sizes = autotune._graph_sizes(max_batch)
    assert len(sizes) <= MAX_GRAPHS
    assert sizes == tuple(sorted(set(sizes)))
    assert sizes[-1] == max_batch
    assert sizes[0] == 1 or len(sizes) == MAX_GRAPHS


# --- which kept answers are taken ---


@pytest.mark.parametrize(
    ("wide", "streams", "sound"),
    [(0, None, True), (1, None, True), (2, None, False), (1.0, None, False), (0, 1, True), (0, 2, False)],
)
def test_a_kept_wide_way_is_taken_only_if_it_could_be_measured_now(wide: object, streams: object, sound: bool) -> None:
    candidate = Choice("openvino", "float32")
    fields = {**asdict(replace(candidate, sizes=(1, 2))), "wide": wide, "streams": streams}
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


def candidates(checkpoint: Checkpoint, wish: Wish, device: torch.device = CPU) -> set[tuple[str, str]]:
    return {(each.executor, each.precision) for each in find_candidates(checkpoint, device, wish)}


def test_without_openvino_a_cpu_has_eager(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_executor, "openvino", None)
    assert candidates(checkpoint, Wish()) == {("eager", "float32")}


@needs_openvino
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_auto_takes_no_precision_that_the_checkpoint_does_not_approve(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(openvino_executor, "precisions", lambda: ("float32", "bfloat16"))
    other = "compile" if device == CUDA else "openvino"
    float32 = {("eager", "float32"), (other, "float32")}
    assert candidates(checkpoint, Wish(), device) == float32
    for executor in ("eager", other):
        approved = replace(checkpoint, approved={(executor, "bfloat16"): None})
        assert candidates(approved, Wish(), device) == float32 | {(executor, "bfloat16")}, "of that executor only"
    both = replace(checkpoint, approved={("eager", "bfloat16"): None, (other, "bfloat16"): None})
    assert candidates(both, Wish(), device) == float32 | {("eager", "bfloat16"), (other, "bfloat16")}
    unheard_of = replace(
        checkpoint, approved=dict.fromkeys([("eager", "int4"), ("../../etc", "bfloat16"), ("openvino", "../../etc")])
    )
    assert candidates(unheard_of, Wish(), device) == float32
    monkeypatch.setattr(openvino_executor, "precisions", lambda: ("float32",))
    approved = replace(checkpoint, approved={("openvino", "bfloat16"): None})
    assert candidates(approved, Wish()) == {("eager", "float32"), ("openvino", "float32")}, "approved is not able"


def test_tf32_is_refused_on_a_cpu_and_a_precision_that_is_asked_for_needs_no_approval(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="precision tf32 needs a CUDA device, got cpu"):
        choose_executor(checkpoint, CPU, Wish(precision="tf32"), None)
    assert candidates(checkpoint, Wish(executor="eager", precision="bfloat16")) == {("eager", "bfloat16")}


def test_tf32_is_taken_on_a_gpu_where_it_is_asked_for_or_approved(checkpoint: Checkpoint) -> None:
    assert candidates(checkpoint, Wish(precision="tf32"), CUDA) == {("eager", "tf32"), ("compile", "tf32")}
    approved = replace(checkpoint, approved={("compile", "tf32"): None, ("eager", "float32"): None})
    float32 = {("eager", "float32"), ("compile", "float32")}
    assert candidates(approved, Wish(), CUDA) == float32 | {("compile", "tf32")}
    no_use = replace(checkpoint, approved={("eager", "tf32"): None, ("openvino", "tf32"): None})
    assert {precision for _, precision in candidates(no_use, Wish())} == {"float32"}, (
        "approved elsewhere, not for a CPU"
    )
