"""The graph that OpenVINO runs computes what the network does, however large its feature maps are."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.service.conftest import MakeCheckpoint
from tests.service.engine.exact import CPU, MODELS, assert_exact, bare, needs_bfloat16, needs_openvino
from tests.tiny import randomize
from tminus.model.layers import ResnetBlock, Upsample
from tminus.service.engine import openvino_graph
from tminus.service.engine.autotune import example_inputs
from tminus.service.engine.openvino_executor import PRECISION_HINTS, Graph, OpenVINOExecutor, core
from tminus.service.engine.openvino_graph import convert, transpose_narrow

pytestmark = [pytest.mark.slow, needs_openvino]


@pytest.fixture
def _all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every feature map counts as large."""
    monkeypatch.setattr(openvino_graph, "LARGE", 1)


def ops_of(model: Any) -> Counter[str]:
    return Counter(node.get_type_name() for node in model.get_ops())


def run(
    module: nn.Module,
    *inputs: Tensor,
    precision: str = "float32",
    threads: int = 1,
    prepare: Callable[[nn.Module], object] = randomize,
) -> tuple[Tensor, Counter[str]]:
    """What the converted module gives, and the kinds of operations that it was converted to."""
    openvino = pytest.importorskip("openvino")
    prepare(module)
    model = convert(module.eval(), inputs, [openvino.PartialShape(list(each.shape)) for each in inputs])
    config = {"INFERENCE_PRECISION_HINT": PRECISION_HINTS[precision], "INFERENCE_NUM_THREADS": threads}
    out = core().compile_model(model, "CPU", config)([each.numpy() for each in inputs])[0]
    return torch.from_numpy(out.copy()), ops_of(model)


@pytest.mark.usefixtures("_all_large")
@pytest.mark.parametrize("size", [(16, 16), (48, 20), (6, 4)])
@pytest.mark.parametrize("temb_dim", [None, 24])
def test_a_large_resnet_block_is_what_torch_computes(size: tuple[int, int], temb_dim: int | None) -> None:
    block = ResnetBlock(16, 32, temb_dim, groups=4, eps=1e-5, act="silu")
    inputs = (3 + torch.randn(2, 16, *size), *([torch.randn(2, temb_dim)] if temb_dim is not None else []))
    out, kinds = run(block, *inputs)
    assert kinds["AvgPool"] == 4
    assert kinds["MVN"] == kinds["GroupNormalization"] == 0
    torch.testing.assert_close(out, block(*inputs), atol=2e-5, rtol=1e-4)


@pytest.mark.usefixtures("_all_large")
def test_a_height_without_windows_is_normalised_the_other_way() -> None:
    norm, x = nn.GroupNorm(4, 16), torch.randn(1, 16, 15, 16)
    out, kinds = run(norm, x)
    assert (kinds["AvgPool"], kinds["MVN"]) == (0, 1)
    torch.testing.assert_close(out, norm(x), atol=1e-5, rtol=1e-4)


class Normed(nn.Module):
    """A group norm between two convolutions that change nothing, as which bfloat16 runs it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.before, self.after = (nn.Conv2d(channels, channels, 1, bias=False) for _ in range(2))
        self.norm = nn.GroupNorm(channels // 2, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(self.norm(self.before(x)))
        return out


@needs_bfloat16
@pytest.mark.usefixtures("_all_large")
def test_in_bfloat16_a_large_group_norm_neither_moves_nor_scales_a_channel() -> None:
    """As a mean and a deviation would that were rounded to eight bits."""
    channels = 32
    module = Normed(channels)
    x = 2 + torch.randn(1, channels, 128, 128, generator=torch.Generator().manual_seed(0))

    def neutral(_: nn.Module) -> None:
        for conv in (module.before, module.after):
            conv.weight.data = torch.eye(channels)[:, :, None, None]
        module.norm.weight.data, module.norm.bias.data = torch.ones(channels), torch.zeros(channels)

    out, kinds = run(module, x, precision="bfloat16", prepare=neutral)
    assert kinds["AvgPool"] == 2
    expected = module(x.bfloat16().float()).detach()
    moved = (out - expected).mean((2, 3))
    scaled = (out * expected).mean((2, 3)) / expected.square().mean((2, 3)) - 1
    assert float(moved.abs().max()) < 2.5e-3
    assert float(scaled.abs().max()) < 1.5e-3


@pytest.mark.usefixtures("_all_large")
def test_the_convolution_of_a_doubled_map_is_what_torch_computes() -> None:
    up, x = Upsample(6), torch.randn(2, 6, 5, 7)
    out, kinds = run(up, x)
    assert (kinds["ConvolutionBackpropData"], kinds["Interpolate"], kinds["Convolution"]) == (1, 0, 0)
    torch.testing.assert_close(out, up(x), atol=1e-5, rtol=1e-4)


class Resized(nn.Module):
    """A convolution of a map that was made larger."""

    def __init__(self, kernel: int, scale: float, mode: str) -> None:
        super().__init__()
        self.conv, self.scale, self.mode = nn.Conv2d(4, 4, kernel, padding=kernel // 2), scale, mode

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=self.scale, mode=self.mode))
        return out


@pytest.mark.usefixtures("_all_large")
@pytest.mark.parametrize(
    ("kernel", "scale", "mode"), [(5, 2.0, "nearest"), (1, 2.0, "nearest"), (3, 3.0, "nearest"), (3, 2.0, "bilinear")]
)
def test_other_convolutions_of_larger_maps_stay(kernel: int, scale: float, mode: str) -> None:
    module, x = Resized(kernel, scale, mode), torch.randn(1, 4, 6, 6)
    out, kinds = run(module, x)
    assert (kinds["ConvolutionBackpropData"], kinds["Convolution"]) == (0, 1)
    torch.testing.assert_close(out, module(x), atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("_all_large")
@pytest.mark.parametrize(
    "fields",
    [
        MODELS["colour"],
        pytest.param({"resnet_time_scale_shift": "scale_shift", "sample_size": 16}, marks=pytest.mark.long),
        pytest.param({"up_block_types": ("ResnetUpsampleBlock2D", "UpBlock2D")}, marks=pytest.mark.long),
    ],
    ids=["colour", "scale_shift", "resnets that double"],
)
def test_a_network_of_large_maps_is_exact_and_what_torch_computes(
    make_checkpoint: MakeCheckpoint, fields: dict[str, object]
) -> None:
    checkpoint = make_checkpoint(**fields)
    graph = Graph(checkpoint.net, checkpoint.row_shape, checkpoint.noise.num_train_timesteps)
    kinds = ops_of(graph.model)
    assert (kinds["MVN"], kinds["ConvolutionBackpropData"]) == (0, 1)
    executor = OpenVINOExecutor(graph, sizes=(1, 2), threads=2, wide=1)
    inputs = example_inputs(checkpoint, CPU, 10)
    torch.testing.assert_close(executor(*inputs), bare(checkpoint, inputs), atol=1e-5, rtol=1e-4)
    assert_exact(executor, checkpoint)


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=needs_bfloat16)])
def test_threads_change_no_bit_of_a_large_map(precision: str) -> None:
    """In a block of as many channels and pixels as those that are large by themselves."""
    block, x = ResnetBlock(64, 64, None, groups=32, eps=1e-6, act="silu"), 1 + torch.randn(1, 64, 64, 64)
    one, kinds = run(block, x, precision=precision)
    assert kinds["AvgPool"] == 4
    for threads in (2, 3):
        assert run(block, x, precision=precision, threads=threads)[0].equal(one), threads


def test_small_maps_stay_as_they_are(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    kinds = ops_of(Graph(checkpoint.net, checkpoint.row_shape, checkpoint.noise.num_train_timesteps).model)
    assert kinds["AvgPool"] == kinds["ConvolutionBackpropData"] == 0
    assert kinds["MVN"] > 0


class Narrow(nn.Module):
    """Group norms of few channels: of what a convolution gives, and of that with a shift of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.block = nn.Conv2d(3, 32, 3, padding=1), ResnetBlock(32, 16, 8, groups=4, eps=1e-5, act="silu")

    def forward(self, x: Tensor, act_temb: Tensor) -> Tensor:
        out: Tensor = self.block(self.conv(x), act_temb)
        return out


def test_layouts_that_are_transposed_change_no_bit() -> None:
    openvino = pytest.importorskip("openvino")
    module, inputs = Narrow().eval(), (torch.randn(1, 3, 32, 32), torch.randn(1, 8))
    randomize(module)
    model = convert(module, inputs, [openvino.PartialShape(list(each.shape)) for each in inputs])
    outs = []
    for transposed in (False, True):
        if transposed:
            transpose_narrow(model)
        compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        outs.append(torch.from_numpy(compiled([each.numpy() for each in inputs])[0].copy()))
    assert ops_of(model)["Transpose"] == 4, "two before each norm"
    assert outs[1].equal(outs[0])


def test_layouts_are_transposed_in_float32_alone_and_where_it_pays(make_checkpoint: MakeCheckpoint) -> None:
    """The shift of the timestep is added after the transposition, which then starts at the convolution."""
    checkpoint = make_checkpoint(block_out_channels=(16, 24), sample_size=32, norm_num_groups=8)
    graph = Graph(checkpoint.net, checkpoint.row_shape, checkpoint.noise.num_train_timesteps)
    plain, float32, bfloat16 = (
        ops_of(model)["Transpose"] for model in (graph.model, graph.of_size(1, "float32"), graph.of_size(1, "bfloat16"))
    )
    assert plain == bfloat16
    assert float32 > plain
    small = make_checkpoint()
    graph = Graph(small.net, small.row_shape, small.noise.num_train_timesteps)
    assert ops_of(graph.of_size(1, "float32")) == ops_of(graph.model)


class Heads(nn.Module):
    """Attention whose channels are split into heads before they are projected."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = (nn.Linear(4, 4, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.reshape(len(x), 2, 4, -1).transpose(2, 3)
        out: Tensor = self.to_q(pixels) @ self.to_k(pixels).transpose(2, 3)
        return out


def test_pixels_that_are_split_into_heads_are_transposed_as_they_were() -> None:
    module, x = Heads(), torch.randn(2, 8, 3, 5)
    torch.testing.assert_close(run(module, x)[0], module(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=needs_bfloat16)])
def test_what_is_done_once_for_all_blocks_changes_no_bit(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """The projections of the timestep, and the transposition before q, k and v."""
    checkpoint = make_checkpoint(block_out_channels=(16, 32), sample_size=16)
    inputs = example_inputs(checkpoint, CPU, 5)

    def run_graph() -> tuple[Tensor, Counter[str]]:
        graph = Graph(checkpoint.net, checkpoint.row_shape, checkpoint.noise.num_train_timesteps)
        executor = OpenVINOExecutor(graph, precision=precision, sizes=(1, 2), streams=2, threads=2)
        return executor(*inputs), ops_of(graph.model)

    out, kinds = run_graph()
    for name in ("_transpose_once", "_project_once"):
        monkeypatch.setattr(openvino_graph, name, lambda _model: None)
    plain, plain_kinds = run_graph()
    blocks = sum(name.endswith("time_emb_proj.weight") for name, _ in checkpoint.net.named_parameters())
    assert plain_kinds["MatMul"] - kinds["MatMul"] == blocks - 1
    assert kinds["Transpose"] > plain_kinds["Transpose"], "once for each attention, where products transposed before"
    assert out.equal(plain)
