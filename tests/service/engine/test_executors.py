"""How a batch is cut into passes, and what eager and compiled executors give."""

import gc
import shutil
import threading
from collections.abc import Iterator, Sequence
from itertools import count, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.service.conftest import MakeCheckpoint
from tests.service.engine.engines import OnGpu
from tests.service.engine.exact import MODELS, SIZES, assert_exact, bare, needs_bfloat16, rows_of
from tests.tools import needs
from tminus.model.checkpoint import Checkpoint
from tminus.service.engine.autotune import example_inputs
from tminus.service.engine.executors import (
    CPU_SIZES,
    CompiledExecutor,
    EagerExecutor,
    Executor,
    pad,
    split,
    split_padded,
    split_wide,
)

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


# --- how a batch is cut ---


ascending_sizes = st.sets(st.integers(1, 16), min_size=1, max_size=5).map(sorted)


def covers_every_place_once(passes: Sequence[tuple[int, int, int]], places: int) -> bool:
    ends = [0, *(end for _, end, _ in passes)]
    return all(start == before for (start, _, _), before in zip(passes, ends, strict=False)) and ends[-1] == places


@given(st.integers(0, 100), ascending_sizes, st.integers(1, 8))
def test_a_split_covers_every_place_once_and_pads_only_what_is_smaller_than_the_smallest_size(
    places: int, sizes: list[int], streams: int
) -> None:
    passes = split(places, sizes, streams)
    assert covers_every_place_once(passes, places)
    for start, end, size in passes:
        assert size in sizes
        assert 0 < end - start <= size, "no pass is empty, none too full"
        assert end - start == size or size == sizes[0] > 1


@given(st.integers(1, 100), st.integers(0, 4).map(lambda k: [2**i for i in range(k + 1)]), st.integers(1, 8))
def test_each_stream_gets_an_even_share(places: int, sizes: list[int], streams: int) -> None:
    """Of its own the passes of an even share: so the slowest stream has no more than a share, rounded up, to do."""
    passes = [size for _, _, size in split(places, sizes, streams)]
    shares = [places // streams + (stream < places % streams) for stream in range(streams)]
    expected = [size for share in shares for _, _, size in split(share, sizes)]
    assert sorted(passes) == sorted(expected)
    assert passes == sorted(passes, reverse=True), "large passes come first"


@given(st.integers(0, 100), ascending_sizes, st.integers(1, 8), st.integers(0, 7))
def test_what_is_left_of_even_shares_goes_in_wide_passes_if_it_is_little(
    places: int, sizes: list[int], streams: int, wide: int
) -> None:
    narrow_passes, wide_passes = split_wide(places, sizes, streams, wide)
    left = places % streams
    assert covers_every_place_once([*narrow_passes, *wide_passes], places)
    if left <= wide:
        assert sum(end - start for start, end, _ in wide_passes) == left
        assert narrow_passes == split(places - left, sizes, streams)
        assert all(size in sizes and size <= max(left, sizes[0]) for *_, size in wide_passes)
    else:
        assert (narrow_passes, wide_passes) == (split(places, sizes, streams), [])


@given(st.integers(0, 200), ascending_sizes)
def test_a_padded_split_has_full_passes_and_one_of_the_smallest_size_that_fits(places: int, sizes: list[int]) -> None:
    passes = split_padded(places, sizes)
    assert covers_every_place_once(passes, places)
    for start, end, size in passes[:-1]:
        assert end - start == size == sizes[-1]
    for start, end, size in passes[-1:]:
        assert size == min(each for each in sizes if each >= end - start)


def test_padding_repeats_the_last_entry() -> None:
    assert pad(None, 3) is None
    tensor = torch.tensor([[1, 2], [3, 4]])
    assert pad(tensor, 0) is tensor
    assert pad(tensor, 2).tolist() == [[1, 2], [3, 4], [3, 4], [3, 4]]


# --- what they give ---


@pytest.fixture(params=MODELS, ids=lambda name: name)
def checkpoint(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint) -> Checkpoint:
    return make_checkpoint(**MODELS[request.param])


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("sizes", [None, SIZES[-1], (3, 5)])
def test_eager_gives_what_the_network_gives(
    checkpoint: Checkpoint, channels_last: bool, sizes: tuple[int, ...] | None
) -> None:
    inputs = example_inputs(checkpoint, CPU, 9)
    expected = bare(checkpoint, inputs)
    executor = EagerExecutor(checkpoint.net, CPU, channels_last=channels_last, sizes=sizes)
    out = executor(*inputs)
    assert (out.dtype, out.shape) == (torch.float32, expected.shape)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert executor.start(*inputs)().equal(out)


# --- the contract of an exact executor ---


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(
    ("checkpoint", "channels_last"),
    [*((name, True) for name in MODELS), ("tiny", False)],
    indirect=["checkpoint"],
)
def test_eager_in_passes_of_one_size_is_exact(checkpoint: Checkpoint, size: int, channels_last: bool) -> None:
    assert_exact(EagerExecutor(checkpoint.net, CPU, channels_last=channels_last, sizes=(size,)), checkpoint)


@needs_bfloat16
@pytest.mark.parametrize("size", [1, 4])
def test_eager_in_bfloat16_is_exact_and_near(tiny: Checkpoint, size: int) -> None:
    executor = EagerExecutor(tiny.net, CPU, precision="bfloat16", sizes=(size,))
    assert_exact(executor, tiny)
    inputs = example_inputs(tiny, CPU, 9)
    expected, out = bare(tiny, inputs), executor(*inputs)
    assert out.dtype == torch.float32
    assert not out.equal(expected)
    torch.testing.assert_close(out, expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("checkpoint", ["tiny", "unconditional", "colour", "NCSN++"], indirect=True)
def test_eager_has_the_same_bits_in_passes_of_any_size_in_streams_and_alone(
    checkpoint: Checkpoint, channels_last: bool
) -> None:
    """Torch chooses kernels by the number of rows, and sums are split by the number of threads."""
    inputs = example_inputs(checkpoint, CPU, 13)

    def eager(*sizes: int, threads: int = 2) -> EagerExecutor:
        return EagerExecutor(checkpoint.net, CPU, channels_last=channels_last, sizes=sizes, threads=threads)

    torch.set_num_threads(1)
    outs = [eager(*sizes)(*inputs) for sizes in ((1,), (2,), (8,), CPU_SIZES)]
    outs.append(eager(1, threads=1)(*inputs))
    assert all(one.equal(other) for one, other in pairwise(outs))
    assert_exact(eager(*CPU_SIZES), checkpoint)


def test_a_wide_pass_of_an_image_whose_norms_torch_splits_has_the_bits_of_a_stream(
    make_checkpoint: MakeCheckpoint,
) -> None:
    checkpoint = make_checkpoint(sample_size=32)
    inputs = example_inputs(checkpoint, CPU, 4)
    executor = EagerExecutor(checkpoint.net, CPU, sizes=(1, 2), threads=2, wide=1)
    rows = [executor(*rows_of(inputs, [row])) for row in range(4)]
    assert torch.cat(rows).equal(executor(*inputs))


@pytest.fixture
def no_threads_left() -> Iterator[None]:
    """Each stream has a thread, which ends with its executor."""
    before = threading.enumerate()
    yield
    gc.collect()  # as when a model is unloaded: an error knows the frames that it came through
    for thread in threading.enumerate():
        if thread not in before:
            thread.join(10)
            assert not thread.is_alive()


@pytest.mark.usefixtures("no_threads_left")
def test_batches_of_streams_may_be_started_before_earlier_ones_are_finished(tiny: Checkpoint) -> None:
    executor = EagerExecutor(tiny.net, CPU, sizes=(1, 2), threads=2, wide=1)
    inputs = example_inputs(tiny, CPU, 13)
    batches = [rows_of(inputs, rows) for rows in (range(7), range(7, 8), range(8, 13))]
    finishes = [executor.start(*batch) for batch in batches]
    assert torch.cat([finish() for finish in finishes]).equal(executor(*inputs))
    assert torch.get_num_threads() == 1, "as it was"


@pytest.mark.usefixtures("no_threads_left")
def test_a_pass_of_a_stream_that_fails_is_told_of_by_its_own_batch_alone(tiny: Checkpoint) -> None:
    executor = EagerExecutor(tiny.net, CPU, sizes=(1,), threads=2)
    x, t, labels = example_inputs(tiny, CPU, 6)
    assert labels is not None
    expected, no_class = executor(x, t, labels), labels.clone()
    no_class[2] = 10**6
    before, bad, after = (executor.start(x, t, each) for each in (labels, no_class, labels))
    assert before().equal(expected)
    with pytest.raises(IndexError):
        bad()
    assert after().equal(expected)
    assert executor(x, t, labels).equal(expected), "it stays usable"


@pytest.mark.usefixtures("no_threads_left")
def test_a_stream_takes_the_next_pass_while_another_is_held(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = EagerExecutor(tiny.net, CPU, sizes=(1,), threads=2)
    inputs = example_inputs(tiny, CPU, 2)
    go_on, run, passes = threading.Event(), EagerExecutor._pass, count()

    def held(each: EagerExecutor, *args: object) -> torch.Tensor:
        if next(passes) == 0:
            assert go_on.wait(10)
        return run(each, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(EagerExecutor, "_pass", held)
    first = executor.start(*inputs)  # holds one stream
    second = executor.start(*rows_of(inputs, [1, 0]))
    executor._running[-1].result(10)  # the other stream goes on, to the last pass
    go_on.set()
    assert first().equal(second()[[1, 0]])


# --- compiled ---


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="there is no C++ compiler")
def test_compiled_on_a_cpu_gives_what_the_network_gives_and_is_exact(
    make_checkpoint: MakeCheckpoint,
) -> None:
    needs("openssl")  # by which torch's own code names its precompiled headers
    # As few kernels as there may be: each takes a C++ compiler a second or more.
    blocks: dict[str, object] = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    checkpoint = make_checkpoint(
        **blocks, block_out_channels=(8,), mid_block_type=None, out_channels=2, norm_num_groups=4
    )
    inputs = example_inputs(checkpoint, CPU, 7)
    expected = bare(checkpoint, inputs)
    executor = CompiledExecutor(checkpoint.net, CPU, (1, 8, 8), sizes=(2,))
    torch.testing.assert_close(executor(*inputs), expected, atol=1e-5, rtol=1e-4)
    assert executor.start(*inputs)().equal(executor(*inputs))
    assert_exact(executor, checkpoint)


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [{}, {"classes": False}, {"in_channels": 3, "out_channels": 6}])
@pytest.mark.parametrize("sizes", [(4,), (1, 2, 8)])
def test_cuda_graphs_give_what_the_network_gives(
    on_gpu: OnGpu, fields: dict[str, object], sizes: tuple[int, ...]
) -> None:
    checkpoint, device = on_gpu(**fields)
    inputs = example_inputs(checkpoint, CPU, 21)
    expected = bare(checkpoint, inputs)
    shape = checkpoint.row_shape
    executor = CompiledExecutor(checkpoint.net, device, shape, sizes=sizes)
    on_device = example_inputs(checkpoint, device, 21)
    for rows in (range(21), range(3), range(5, 6), range(8)):
        part = tuple(each[rows.start : rows.stop] if each is not None else None for each in on_device)
        out = executor(*part)  # type: ignore[arg-type]
        torch.testing.assert_close(out.cpu(), expected[rows.start : rows.stop], atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["eager", "compile"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_on_a_gpu_passes_of_one_size_are_exact(on_gpu: OnGpu, kind: str, precision: str) -> None:
    checkpoint, device = on_gpu()
    executor: Executor
    if kind == "eager":
        executor = EagerExecutor(checkpoint.net, device, precision=precision, sizes=(8,))
    else:
        executor = CompiledExecutor(checkpoint.net, device, (1, 8, 8), precision=precision, sizes=(8,))
    x, t, labels = example_inputs(checkpoint, device, 8)
    assert labels is not None
    whole = executor(x, t, labels).cpu().numpy()
    for row in range(8):
        alone = executor(x[row : row + 1], t[row : row + 1], labels[row : row + 1]).cpu().numpy()
        np.testing.assert_array_equal(alone[0], whole[row])
    turned = executor(x.roll(3, 0), t.roll(3), labels.roll(3)).cpu().numpy()
    np.testing.assert_array_equal(np.roll(turned, -3, 0), whole)


@pytest.mark.gpu
def test_a_replay_does_not_write_over_the_last_answer(on_gpu: OnGpu) -> None:
    checkpoint, device = on_gpu()
    executor = CompiledExecutor(checkpoint.net, device, (1, 8, 8), sizes=(4,))
    x, t, labels = example_inputs(checkpoint, device, 4)
    first = executor(x, t, labels)
    kept = first.clone()
    executor(-x, t, labels)
    assert first.equal(kept)
