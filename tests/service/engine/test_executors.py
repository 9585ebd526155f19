import shutil
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.checkpoint import Checkpoint
from service.engine import openvino_executor
from service.engine.autotune import agree_rows, example_inputs
from service.engine.executors import (
    MAX_GRAPHS,
    CompiledExecutor,
    EagerExecutor,
    Executor,
    pad,
    split,
    split_padded,
    split_wide,
)
from service.engine.openvino_executor import Graph, OpenVINOExecutor
from tests.service.conftest import MakeCheckpoint

CPU = torch.device("cpu")
SIZES = ((1,), (1, 2), (1, 2, 4))
Inputs = tuple[Tensor, Tensor, Tensor | None]

needs_openvino = pytest.mark.skipif(not openvino_executor.available(), reason="openvino, an extra, is not installed")


def able_to_bfloat16() -> bool:
    return openvino_executor.available() and "bfloat16" in openvino_executor.precisions()


needs_bfloat16 = pytest.mark.skipif(not able_to_bfloat16(), reason="this processor has no bfloat16 instructions")


# --- how a batch is cut ---


ascending_sizes = st.sets(st.integers(1, 16), min_size=1, max_size=5).map(sorted)


def covers_every_place_once(passes: Sequence[tuple[int, int, int]], places: int) -> bool:
    ends = [0, *(end for _, end, _ in passes)]
    return all(start == before for (start, _, _), before in zip(passes, ends, strict=False)) and ends[-1] == places


@given(st.integers(0, 100), ascending_sizes, st.integers(1, 8))
def test_a_split_covers_every_place_once_in_passes_of_the_sizes(places: int, sizes: list[int], streams: int) -> None:
    passes = split(places, sizes, streams)
    assert covers_every_place_once(passes, places)
    for start, end, size in passes:
        assert size in sizes
        assert 0 < end - start <= size, "no pass is empty, none too full"


@given(st.integers(1, 100), ascending_sizes, st.integers(1, 8))
def test_a_split_pads_only_where_fewer_places_are_left_than_the_smallest_size(
    places: int, sizes: list[int], streams: int
) -> None:
    passes = split(places, sizes, streams)
    for start, end, size in passes:
        assert end - start == size or size == sizes[0]
    if sizes[0] == 1:
        assert all(end - start == size for start, end, size in passes)
        assert sum(size for _, _, size in passes) == places


@given(st.integers(1, 100), st.integers(0, 4).map(lambda k: [2**i for i in range(k + 1)]), st.integers(1, 8))
def test_each_stream_gets_an_even_share(places: int, sizes: list[int], streams: int) -> None:
    """Of its own the passes of an even share: so the slowest stream has no more than a share, rounded up, to do."""
    passes = [size for _, _, size in split(places, sizes, streams)]
    shares = [places // streams + (stream < places % streams) for stream in range(streams)]
    expected = [size for share in shares for _, _, size in split(share, sizes)]
    assert sorted(passes) == sorted(expected)
    assert passes == sorted(passes, reverse=True), "large passes come first"


@given(st.integers(1, 100), ascending_sizes)
def test_one_stream_takes_as_many_places_at_once_as_it_can(places: int, sizes: list[int]) -> None:
    left = places
    for start, end, size in split(places, sizes):
        assert size == max([each for each in sizes if each <= left], default=sizes[0])
        left -= end - start


@pytest.mark.parametrize(
    ("places", "sizes", "streams", "expected"),
    [
        (1, (1, 2, 4), 2, [1]),
        (2, (1, 2, 4), 2, [1, 1]),
        (3, (1, 2, 4), 2, [2, 1]),
        (8, (1, 2, 4), 2, [4, 4]),
        (11, (1, 2, 4), 2, [4, 4, 2, 1]),
        (5, (2, 4), 1, [4, 2]),
        (1, (8,), 1, [8]),
        (9, (8,), 1, [8, 8]),
        (0, (1,), 1, []),
    ],
)
def test_some_splits(places: int, sizes: tuple[int, ...], streams: int, expected: list[int]) -> None:
    assert [size for _, _, size in split(places, sizes, streams)] == expected


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


@pytest.mark.parametrize(
    ("places", "streams", "wide", "expected"),
    [
        (1, 2, 1, ([], [1])),
        (2, 2, 1, ([1, 1], [])),
        (3, 2, 1, ([1, 1], [1])),
        (5, 2, 1, ([2, 2], [1])),
        (3, 2, 0, ([2, 1], [])),
        (3, 8, 4, ([], [2, 1])),
        (5, 8, 4, ([1, 1, 1, 1, 1], [])),
        (1, 1, 0, ([1], [])),
    ],
)
def test_some_wide_splits(places: int, streams: int, wide: int, expected: tuple[list[int], list[int]]) -> None:
    passes = split_wide(places, (1, 2, 4), streams, wide)
    assert tuple([size for *_, size in part] for part in passes) == expected


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


def bare(checkpoint: Checkpoint, inputs: Inputs) -> Tensor:
    """The network itself, in float32, as it was loaded."""
    with torch.inference_mode():
        out: Tensor = checkpoint.net(*inputs)
    return out


def openvino(
    checkpoint: Checkpoint, sizes: Sequence[int] = (1,), precision: str = "float32", streams: int = 2, wide: int = 0
) -> OpenVINOExecutor:
    key = (checkpoint.weights_hash, checkpoint.size_px, checkpoint.noise.num_train_timesteps)
    if key not in GRAPHS:
        shape = (checkpoint.net.config.in_channels, *checkpoint.size_px)
        GRAPHS[key] = Graph(checkpoint.net, shape, checkpoint.noise.num_train_timesteps)
    return OpenVINOExecutor(GRAPHS[key], precision=precision, sizes=sizes, streams=streams, wide=wide)


GRAPHS: dict[object, Graph] = {}  # converting takes longer than all the rest

MODELS: dict[str, dict[str, object]] = {
    "tiny": {},
    "unconditional": {"classes": False},
    "colour": {"in_channels": 3, "out_channels": 3},
    "wide": {"sample_size": (4, 10)},
    "learned variance": {"out_channels": 2},
    "learned variance in colour": {"in_channels": 3, "out_channels": 6, "classes": False},
}


@pytest.fixture(params=MODELS, ids=lambda name: name)
def checkpoint(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint) -> Checkpoint:
    return make_checkpoint(**MODELS[request.param])


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("sizes", [None, *SIZES, (2,), (3, 5)])
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


@needs_openvino
@pytest.mark.parametrize("sizes", [(1,), (1, 2, 4), (3,)])
def test_openvino_gives_what_the_network_gives(checkpoint: Checkpoint, sizes: tuple[int, ...]) -> None:
    inputs = example_inputs(checkpoint, CPU, 10)
    expected = bare(checkpoint, inputs)
    executor = openvino(checkpoint, sizes)
    out = executor(*inputs)
    assert (out.dtype, out.shape) == (torch.float32, expected.shape)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


@needs_openvino
def test_openvino_takes_any_strides_and_keeps_nothing_of_the_last_call(tiny: Checkpoint) -> None:
    executor = openvino(tiny, (1, 2))
    x, t, labels = example_inputs(tiny, CPU, 7)
    assert labels is not None
    first = executor(x, t, labels)
    kept = first.clone()
    strided = x.repeat_interleave(2, 0)[::2].to(memory_format=torch.channels_last).transpose(2, 3).contiguous()
    assert executor(strided.transpose(2, 3), t, labels).equal(kept)
    executor(x.flip(0), t.flip(0), labels.flip(0))
    assert first.equal(kept), "an answer does not change with the next question"


@needs_openvino
def test_what_is_started_goes_on_while_the_caller_does_other_things(tiny: Checkpoint) -> None:
    executor = openvino(tiny, (1, 2))
    inputs = example_inputs(tiny, CPU, 11)
    expected = executor(*inputs)
    finish = executor.start(*rows_of(inputs, range(11)))  # of which nobody keeps the inputs
    others = [torch.full_like(part, 1) for part in inputs if part is not None for _ in range(50)]
    assert finish().equal(expected)
    assert len(others) == 150


# --- the contract of an exact executor ---


def rows_of(inputs: Inputs, rows: Sequence[int]) -> Inputs:
    at = torch.tensor(rows)
    x, t, labels = inputs
    return x[at], t[at], labels[at] if labels is not None else None


def assert_exact(executor: Executor, checkpoint: Checkpoint) -> None:
    """Each place alone, at any position, beside any neighbours, in a batch of any size: the same bits."""
    inputs = example_inputs(checkpoint, CPU, 13)
    alone = [executor(*rows_of(inputs, [row])) for row in range(13)]
    assert all(bool(out.isfinite().all()) for out in alone)
    generator = torch.Generator().manual_seed(1)
    for size in (2, 3, 4, 5, 7, 8, 13, 13, 13):
        rows = torch.randperm(13, generator=generator)[:size].tolist()
        out = executor(*rows_of(inputs, rows))
        assert len(out) == size
        for position, row in enumerate(rows):
            assert out[position].equal(alone[row][0]), f"row {row} at {position} of {size}"
    # The wildest neighbours there are.
    x, t, labels = rows_of(inputs, [3] * 6)
    x[1:] = torch.tensor([1e30, -1e30, float("nan"), float("inf"), 0.0]).reshape(5, 1, 1, 1)
    out = executor(x, t, labels)
    assert out[0].equal(alone[3][0])


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("channels_last", [True, False])
def test_eager_in_passes_of_one_size_is_exact(checkpoint: Checkpoint, size: int, channels_last: bool) -> None:
    assert_exact(EagerExecutor(checkpoint.net, CPU, channels_last=channels_last, sizes=(size,)), checkpoint)


@needs_openvino
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("streams", [1, 2])
def test_openvino_is_exact(tiny: Checkpoint, sizes: tuple[int, ...], streams: int) -> None:
    assert_exact(openvino(tiny, sizes, streams=streams), tiny)


@needs_openvino
def test_openvino_is_exact_for_other_models(checkpoint: Checkpoint) -> None:
    assert_exact(openvino(checkpoint, (1, 2, 4)), checkpoint)


@needs_openvino
def test_openvinos_bits_do_not_depend_on_sizes_and_streams(tiny: Checkpoint) -> None:
    inputs = example_inputs(tiny, CPU, 9)
    outs = [openvino(tiny, sizes, streams=streams)(*inputs) for sizes in SIZES for streams in (1, 2)]
    assert all(out.equal(outs[0]) for out in outs)


@needs_openvino
@pytest.mark.parametrize(("streams", "wide"), [(2, 1), (4, 2)])
def test_wide_passes_give_the_same_bits(checkpoint: Checkpoint, streams: int, wide: int) -> None:
    """So a lone row, which all threads compute, is what it is among others, in a stream of one thread."""
    executor = openvino(checkpoint, (1, 2), "float32", streams, wide)
    assert_exact(executor, checkpoint)
    inputs = example_inputs(checkpoint, CPU, 11)
    assert executor(*inputs).equal(openvino(checkpoint, (1, 2), "float32", streams)(*inputs))


def sizes_that_agree(checkpoint: Checkpoint, precision: str) -> list[tuple[int, ...]]:
    """Sizes of a pass in groups of the same bits, as autotune keeps them; which they are depends on the processor."""
    inputs = example_inputs(checkpoint, CPU, agree_rows(checkpoint, precision))
    groups: dict[bytes, tuple[int, ...]] = {}
    for size in SIZES[-1]:
        bits = openvino(checkpoint, (size,), precision)(*inputs).numpy().tobytes()
        groups[bits] = (*groups.get(bits, ()), size)
    return list(groups.values())


@needs_bfloat16
def test_sizes_that_agree_in_bfloat16_are_exact_together(checkpoint: Checkpoint) -> None:
    groups = sizes_that_agree(checkpoint, "bfloat16")
    assert {size for sizes in groups for size in sizes} == {*SIZES[-1]}
    for sizes in groups:
        assert_exact(openvino(checkpoint, sizes, "bfloat16"), checkpoint)


@needs_bfloat16
@pytest.mark.parametrize(("streams", "wide"), [(2, 1), (4, 2)])
@pytest.mark.parametrize("model", ["tiny", "colour"])
def test_wide_passes_of_sizes_that_agree_in_bfloat16_are_exact(
    make_checkpoint: MakeCheckpoint, model: str, streams: int, wide: int
) -> None:
    checkpoint = make_checkpoint(**MODELS[model])
    sizes = next(sizes for sizes in sizes_that_agree(checkpoint, "bfloat16") if sizes[0] == 1)
    assert_exact(openvino(checkpoint, sizes, "bfloat16", streams, wide), checkpoint)


@needs_openvino
def test_a_group_norm_of_several_channels_a_group_is_computed_as_torch_does(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint(block_out_channels=(16, 32), norm_num_groups=4)
    inputs = example_inputs(checkpoint, CPU, 5)
    torch.testing.assert_close(openvino(checkpoint)(*inputs), bare(checkpoint, inputs), atol=1e-5, rtol=1e-4)


@needs_bfloat16
def test_openvino_in_bfloat16_is_near(tiny: Checkpoint) -> None:
    executor = openvino(tiny, (1,), "bfloat16")
    inputs = example_inputs(tiny, CPU, 9)
    expected, out = bare(tiny, inputs), executor(*inputs)
    assert out.dtype == torch.float32
    assert not out.equal(expected), "or it would not be bfloat16"
    torch.testing.assert_close(out, expected, atol=0.1, rtol=0.1)


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


@needs_openvino
def test_the_timestep_is_not_rounded_to_bfloat16(make_checkpoint: MakeCheckpoint) -> None:
    """bfloat16 has no 999: neighbours among the timesteps would be one."""
    from model.noise import NoiseConfig

    checkpoint = make_checkpoint(noise=NoiseConfig(num_train_timesteps=1000))
    precision = "bfloat16" if able_to_bfloat16() else "float32"
    executor = openvino(checkpoint, precision=precision)
    x, _, labels = rows_of(example_inputs(checkpoint, CPU, 1), [0, 0, 0, 0])
    out = executor(x, torch.tensor([999, 998, 997, 996]), labels)
    assert len({each.numpy().tobytes() for each in out}) == 4


@pytest.fixture(scope="module")
def narrow(make_checkpoint: MakeCheckpoint) -> Checkpoint:
    """An embedding of 48, which no processor's vectors divide."""
    return make_checkpoint(block_out_channels=(12, 24))


@needs_openvino
@pytest.mark.parametrize("sizes", [(1,), (1, 2, 4)])
def test_openvino_is_exact_where_the_embedding_leaves_vectors_unfilled(
    narrow: Checkpoint, sizes: tuple[int, ...]
) -> None:
    """Torch computes a vector's leftover another way, and where the leftover falls depends on the batch."""
    executor = openvino(narrow, sizes)
    assert executor._graph.temb_dim == 48
    assert_exact(executor, narrow)
    inputs = example_inputs(narrow, CPU, 31)
    alone = torch.cat([executor(*rows_of(inputs, [row])) for row in range(31)])
    torch.testing.assert_close(alone, bare(narrow, inputs), atol=1e-5, rtol=1e-4)
    for places in range(1, 32):
        assert executor(*rows_of(inputs, range(places))).equal(alone[:places]), f"a batch of {places}"
        shifted = range(31 - places, 31)
        assert executor(*rows_of(inputs, shifted)).equal(alone[31 - places :]), f"the last {places}"


@needs_openvino
@pytest.mark.parametrize(("streams", "wide"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("places", [1, 2, 11])
def test_what_was_started_and_given_up_does_not_stop_the_next(
    tiny: Checkpoint, streams: int, wide: int, places: int
) -> None:
    """As when making the noise raises, between start() and the function that it returned."""
    executor = openvino(tiny, (1, 2), streams=streams, wide=wide)
    inputs = example_inputs(tiny, CPU, 11)
    expected = executor(*inputs).clone()
    for _ in range(5):
        executor.start(*rows_of(inputs, range(places)))
    assert executor(*inputs).equal(expected)
    executor.start(*rows_of(inputs, range(places)))
    assert executor.start(*inputs)().equal(expected)


# --- what the details say ---


@needs_openvino
def test_details_tell_what_could_move_a_bit(tiny: Checkpoint) -> None:
    assert EagerExecutor(tiny.net, CPU, channels_last=False).details == "contiguous"
    assert EagerExecutor(tiny.net, CPU, sizes=(1, 2)).details == "channels_last, passes of 1, 2"
    details = openvino(tiny, (1, 4), streams=3).details
    assert all(part in details for part in ("openvino 20", "3 streams", "passes of 1, 4"))
    assert "wide" not in details
    assert openvino(tiny, (1, 4), streams=3, wide=2).details.endswith("passes of 1, 4, up to 2 wide")


# --- compiled ---


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="there is no C++ compiler")
def test_compiled_on_a_cpu_gives_what_the_network_gives_and_is_exact(
    make_checkpoint: MakeCheckpoint,
) -> None:
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


def test_no_more_shapes_are_compiled_than_torch_compiles(tiny: Checkpoint) -> None:
    for sizes in ((), tuple(range(1, MAX_GRAPHS + 2))):
        with pytest.raises(AssertionError):
            CompiledExecutor(tiny.net, CPU, (1, 8, 8), sizes=sizes)


# --- on a GPU ---

MakeOnGpu = Callable[..., Checkpoint]


@pytest.fixture
def on_gpu(make_checkpoint: MakeCheckpoint) -> Iterator[MakeOnGpu]:
    """Checkpoints of one's own, as an executor moves the net; and the exact float32 that the comparison needs."""
    allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield make_checkpoint
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [{}, {"classes": False}, {"in_channels": 3, "out_channels": 6}])
@pytest.mark.parametrize("sizes", [(4,), (1, 2, 8)])
def test_cuda_graphs_give_what_the_network_gives(
    on_gpu: MakeOnGpu, fields: dict[str, object], sizes: tuple[int, ...]
) -> None:
    checkpoint, device = on_gpu(**fields), torch.device("cuda")
    inputs = example_inputs(checkpoint, CPU, 21)
    expected = bare(checkpoint, inputs)
    shape = (checkpoint.net.config.in_channels, *checkpoint.size_px)
    executor = CompiledExecutor(checkpoint.net, device, shape, sizes=sizes)
    on_device = example_inputs(checkpoint, device, 21)
    for rows in (range(21), range(3), range(5, 6), range(8)):
        part = tuple(each[rows.start : rows.stop] if each is not None else None for each in on_device)
        out = executor(*part)  # type: ignore[arg-type]
        torch.testing.assert_close(out.cpu(), expected[rows.start : rows.stop], atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["eager", "compile"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_on_a_gpu_passes_of_one_size_are_exact(on_gpu: MakeOnGpu, kind: str, precision: str) -> None:
    checkpoint, device = on_gpu(), torch.device("cuda")
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
def test_a_replay_does_not_write_over_the_last_answer(on_gpu: MakeOnGpu) -> None:
    checkpoint, device = on_gpu(), torch.device("cuda")
    executor = CompiledExecutor(checkpoint.net, device, (1, 8, 8), sizes=(4,))
    x, t, labels = example_inputs(checkpoint, device, 4)
    first = executor(x, t, labels)
    kept = first.clone()
    executor(-x, t, labels)
    assert first.equal(kept)
