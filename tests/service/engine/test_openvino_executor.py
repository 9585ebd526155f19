"""OpenVINO gives what the network gives, exactly, and reports to nobody."""

import copy
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.service.conftest import MakeCheckpoint
from tests.service.engine.exact import (
    MODELS,
    SIZES,
    able_to_bfloat16,
    assert_exact,
    bare,
    needs_bfloat16,
    needs_openvino,
    rows_of,
)
from tests.tiny import LUCIDRAINS
from tminus.model.checkpoint import Checkpoint
from tminus.model.denoiser import Denoiser
from tminus.model.networks import build
from tminus.model.networks.dome272 import Dome272Config
from tminus.model.networks.lucidrains import LucidrainsConfig
from tminus.service.engine import autotune, openvino_executor
from tminus.service.engine.autotune import agree_rows, example_inputs
from tminus.service.engine.devices import release_memory
from tminus.service.engine.openvino_executor import Compiled, Graph, KeptGraph, OpenVINOExecutor
from tminus.service.engine.openvino_graph import convert

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


# Converting and compiling take longer than all the rest.
GRAPHS: dict[object, tuple[Graph, Compiled]] = {}
CONVERTED: dict[str, Any] = {}


@pytest.fixture(scope="module", autouse=True)
def _graphs_are_let_go() -> Iterator[None]:
    yield
    GRAPHS.clear()
    CONVERTED.clear()


def converted(checkpoint: Checkpoint) -> tuple[Graph, Compiled]:
    """A network's graph, and the passes of it that there are."""
    key = (checkpoint.weights_hash, checkpoint.net.config, checkpoint.size_px, checkpoint.noise.num_train_timesteps)
    if key not in GRAPHS:
        GRAPHS[key] = Graph(checkpoint.net, checkpoint.row_shape, checkpoint.noise.num_train_timesteps), {}
    return GRAPHS[key]


def openvino(
    checkpoint: Checkpoint,
    sizes: Sequence[int] = (1,),
    precision: str = "float32",
    streams: int = 2,
    wide: int = 0,
    *,
    shared: bool = True,
) -> OpenVINOExecutor:
    """shared: with the passes of other tests."""
    graph, passes = converted(checkpoint)
    compiled = passes if shared else None
    return OpenVINOExecutor(graph, precision=precision, sizes=sizes, threads=streams, wide=wide, compiled=compiled)


@pytest.fixture(params=MODELS, ids=lambda name: name)
def checkpoint(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint) -> Checkpoint:
    return make_checkpoint(**MODELS[request.param])


@pytest.fixture(scope="module")
def narrow(make_checkpoint: MakeCheckpoint) -> Checkpoint:
    """An embedding of 48, which no processor's vectors divide."""
    return make_checkpoint(block_out_channels=(12, 24))


# --- what it gives ---


@needs_openvino
def test_openvino_gives_what_the_network_gives_and_is_exact(checkpoint: Checkpoint) -> None:
    inputs = example_inputs(checkpoint, CPU, 10)
    expected = bare(checkpoint, inputs)
    executor = openvino(checkpoint, (1, 2, 4))
    out = executor(*inputs)
    assert (out.dtype, out.shape) == (torch.float32, expected.shape)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    assert_exact(executor, checkpoint)


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


@needs_openvino
def test_the_timestep_is_not_rounded_to_bfloat16(make_checkpoint: MakeCheckpoint) -> None:
    """bfloat16 has no 999: neighbours among the timesteps would be one."""
    from tminus.model.noise import NoiseConfig

    checkpoint = make_checkpoint(noise=NoiseConfig(num_train_timesteps=1000))
    precision = "bfloat16" if able_to_bfloat16() else "float32"
    executor = openvino(checkpoint, precision=precision)
    x, _, labels = rows_of(example_inputs(checkpoint, CPU, 1), [0, 0, 0, 0])
    out = executor(x, torch.tensor([999, 998, 997, 996]), labels)
    assert len({each.numpy().tobytes() for each in out}) == 4


@needs_openvino
@pytest.mark.parametrize(("streams", "wide"), [(1, 0), (2, 1)])
def test_what_was_started_and_given_up_does_not_stop_the_next(tiny: Checkpoint, streams: int, wide: int) -> None:
    """As when making the noise raises, between start() and the function that it returned."""
    executor = openvino(tiny, (1, 2), streams=streams, wide=wide, shared=False)
    inputs = example_inputs(tiny, CPU, 11)
    expected = executor(*inputs).clone()
    for places in (2, 11):
        for _ in range(5):
            executor.start(*rows_of(inputs, range(places)))
        assert executor(*inputs).equal(expected)
        executor.start(*rows_of(inputs, range(places)))
        assert executor.start(*inputs)().equal(expected)


# --- the contract of an exact executor ---


@needs_openvino
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("streams", [1, 2])
def test_openvino_is_exact(tiny: Checkpoint, sizes: tuple[int, ...], streams: int) -> None:
    assert_exact(openvino(tiny, sizes, streams=streams), tiny)


@needs_openvino
@pytest.mark.parametrize(("model", "streams", "wide"), [("colour", 2, 1), ("tiny", 4, 2)])
def test_wide_passes_give_the_same_bits(make_checkpoint: MakeCheckpoint, model: str, streams: int, wide: int) -> None:
    """So a lone row, which all threads compute, is what it is among others, in a stream of one thread."""
    checkpoint = make_checkpoint(**MODELS[model])
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
@pytest.mark.parametrize("model", ["tiny", "colour"])
def test_sizes_that_agree_in_bfloat16_are_exact_together(make_checkpoint: MakeCheckpoint, model: str) -> None:
    checkpoint = make_checkpoint(**MODELS[model])
    groups = sizes_that_agree(checkpoint, "bfloat16")
    assert {size for sizes in groups for size in sizes} == {*SIZES[-1]}
    for sizes in groups:
        assert_exact(openvino(checkpoint, sizes, "bfloat16"), checkpoint)


@needs_bfloat16
@pytest.mark.parametrize(("model", "streams", "wide"), [("tiny", 2, 1), ("colour", 4, 2)])
def test_wide_passes_of_sizes_that_agree_in_bfloat16_are_exact(
    make_checkpoint: MakeCheckpoint, model: str, streams: int, wide: int
) -> None:
    checkpoint = make_checkpoint(**MODELS[model])
    sizes = next(sizes for sizes in sizes_that_agree(checkpoint, "bfloat16") if sizes[0] == 1)
    assert_exact(openvino(checkpoint, sizes, "bfloat16", streams, wide), checkpoint)


@needs_openvino
@pytest.mark.parametrize("sizes", [(1,), (1, 2, 4)])
def test_openvino_is_exact_where_the_embedding_leaves_vectors_unfilled(
    narrow: Checkpoint, sizes: tuple[int, ...]
) -> None:
    """Torch computes a vector's leftover another way, and where the leftover falls depends on the batch."""
    executor = openvino(narrow, sizes)
    assert_exact(executor, narrow)
    inputs = example_inputs(narrow, CPU, 31)
    alone = torch.cat([executor(*rows_of(inputs, [row])) for row in range(31)])
    torch.testing.assert_close(alone, bare(narrow, inputs), atol=1e-5, rtol=1e-4)
    for places in range(1, 32):
        assert executor(*rows_of(inputs, range(places))).equal(alone[:places]), f"a batch of {places}"
        shifted = range(31 - places, 31)
        assert executor(*rows_of(inputs, shifted)).equal(alone[31 - places :]), f"the last {places}"


# --- what is told ---


PROGRAM = """
import sys
import torch
from tminus.model.unet import UNet2D
from tests.tiny import TINY
from tminus.service.engine.openvino_executor import Graph
Graph(UNet2D(TINY), (1, 16, 16), 10)
from openvino.tools.ovc import telemetry_utils
assert telemetry_utils.tm.__name__.endswith("telemetry_stub"), telemetry_utils.tm
assert not any(name.startswith("openvino_telemetry.") for name in sys.modules)
"""


@needs_openvino
def test_nothing_is_told_to_the_makers_of_openvino(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=root,
        env={"HOME": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


SIGNAL = """
import gc, signal, torch
from tminus.service.engine.openvino_executor import one_thread
passes = [one_thread(torch.nn.Conv2d(1, 1, 3), (1, 1, 8, 8)) for _ in range(3)]
while passes:
    del passes[0]
    gc.collect()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@needs_openvino
def test_a_signal_is_handled_after_networks_have_gone_in_the_order_in_which_they_came() -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", SIGNAL], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


@needs_openvino
@pytest.mark.parametrize(
    "config",
    [
        Dome272Config(sample_size=8, in_channels=1, out_channels=1, num_class_embeds=3),
        LUCIDRAINS,
    ],
    ids=lambda config: config.class_name,
)
def test_networks_of_other_projects_give_torch_s_outputs_at_each_size(
    make_checkpoint: MakeCheckpoint, config: Dome272Config | LucidrainsConfig
) -> None:
    torch.manual_seed(0)
    net = build(config).requires_grad_(False).eval()
    checkpoint = replace(make_checkpoint(), net=net, weights_hash=config.class_name)
    x, t, labels = example_inputs(checkpoint, CPU, 5)
    out = openvino(checkpoint, (1, 2), streams=1)(x, t, labels)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(out, checkpoint.net(x, t, labels), **close)


@pytest.mark.parametrize(
    "own",
    [{}, {"timestep_scale": 20.0, "time_proj_dim": 12}, {"time_embedding_type": "fourier"}],
    ids=["plain", "own fields", "fourier"],
)
def test_timesteps_between_whole_ones_are_embedded_as_the_network_does_and_never_by_their_batch(
    make_checkpoint: MakeCheckpoint, own: dict[str, object]
) -> None:
    checkpoint = make_checkpoint(**own)
    net, (graph, _) = checkpoint.net, converted(checkpoint)
    t = torch.tensor([0.0, 7.0, 7.25, 48.9999, 30.5, 7.25])
    embedded = graph.embed_time(t)
    expected = net.time_embedder()(t)
    torch.testing.assert_close(embedded[:, : graph.temb_dim], expected, rtol=1e-5, atol=1e-5)
    for k in range(len(t)):
        assert torch.equal(graph.embed_time(t[k : k + 1])[0], embedded[k])
    assert torch.equal(embedded[1], graph.time_table[7])


@needs_openvino
def test_a_network_that_was_converted_is_not_kept() -> None:
    """torch keeps what it has traced, unless it is told not to: a server that reloads would grow each time."""

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def convert_one() -> None:
        net = nn.Linear(2048, 1024)  # 8 MiB
        convert(net, torch.zeros(1, 2048), [pytest.importorskip("openvino").PartialShape([1, 2048])])
        release_memory()

    convert_one()
    before = resident_bytes()
    for _ in range(10):
        convert_one()
    assert resident_bytes() - before < 5 * 8 * 2**20


# --- the graph that is kept ---


class Kept:
    """A folder with the graph of a network, and what is converted for it."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.checkpoint, self.converted = folder, checkpoint, 0

        def counted(module: nn.Module, *args: Any) -> Any:
            self.converted += 1
            if checkpoint.weights_hash not in CONVERTED:  # by a copy, as a graph reads the weights of its network
                CONVERTED[checkpoint.weights_hash] = convert(copy.deepcopy(module), *args)
            return CONVERTED[checkpoint.weights_hash].clone()

        monkeypatch.setattr(openvino_executor, "convert", counted)

    def run(self) -> tuple[bytes, Denoiser]:
        """Bytes of a pass by a graph that is kept there, and the network that it was made of."""
        net = copy.deepcopy(self.checkpoint.net)
        graph = Graph(net, self.checkpoint.row_shape, 50, KeptGraph(self.folder, "key"))
        executor = OpenVINOExecutor(graph, threads=1)
        graph.free_network()
        return executor(*example_inputs(self.checkpoint, CPU, 2)).numpy().tobytes(), net


@pytest.fixture
def kept(tmp_path: Path, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> Kept:
    return Kept(tmp_path / "cache", make_checkpoint(), monkeypatch)


def test_a_graph_that_is_kept_gives_the_same_bits_without_being_converted_and_frees_the_network(kept: Kept) -> None:
    plain = Graph(kept.checkpoint.net, kept.checkpoint.row_shape, 50)
    expected = OpenVINOExecutor(plain, threads=1)(*example_inputs(kept.checkpoint, CPU, 2)).numpy().tobytes()
    for _ in range(2):
        out, net = kept.run()
        assert out == expected
        assert {parameter.device.type for parameter in net.parameters()} == {"meta"}
    assert kept.converted == 2, "the plain one, and the first that was kept"
    assert sorted(file.suffix for file in kept.folder.iterdir()) == [".bin", ".sha256", ".xml"]
    assert (kept.folder / "graph-key.bin").stat().st_mode & 0o777 == 0o400, "what is mapped is not written over"


@pytest.mark.parametrize("suffix", ["bin", "xml", "sha256"])
@pytest.mark.parametrize("damage", ["flip", *(pytest.param(each, marks=pytest.mark.long) for each in ("cut", "gone"))])
def test_a_kept_graph_that_is_damaged_is_converted_again(kept: Kept, suffix: str, damage: str) -> None:
    expected, _ = kept.run()
    file = kept.folder / f"graph-key.{suffix}"
    file.chmod(0o600)
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if damage == "cut" else content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    for _ in range(2):
        assert kept.run()[0] == expected
    assert kept.converted == 2


def test_a_graph_that_cannot_be_kept_holds_the_weights_itself(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a folder that is only read, or on a disk that is full, where files may come out short without an error."""
    caplog.set_level(logging.INFO)
    save = openvino_executor.openvino.save_model

    def save_short(model: Any, xml: Path, **how: Any) -> None:
        save(model, xml, **how)
        weights = xml.with_suffix(".bin")
        weights.write_bytes(weights.read_bytes()[:100])

    monkeypatch.setattr(openvino_executor.openvino, "save_model", save_short)
    short, net = kept.run()
    assert {parameter.device.type for parameter in net.parameters()} == {"cpu"}
    assert "is not kept" in caplog.text
    assert list(kept.folder.iterdir()) == []
    kept.folder.rmdir()
    kept.folder.write_text("not a folder")
    assert kept.run()[0] == short


def test_of_many_kept_graphs_those_used_longest_ago_go(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.run()
    size = sum(file.stat().st_size for file in kept.folder.iterdir())
    for age_s, key in ((2000, "older"), (1000, "old")):
        for suffix in ("bin", "xml", "sha256"):
            file = kept.folder / f"graph-{key}.{suffix}"
            file.write_bytes((kept.folder / f"graph-key.{suffix}").read_bytes())
            os.utime(file, (time.time() - age_s,) * 2)
    (kept.folder / "graph-key.sha256").unlink()
    monkeypatch.setattr(openvino_executor, "MOST_KEPT_BYTES", int(2.5 * size))
    kept.run()
    assert {file.stem for file in kept.folder.iterdir()} == {"graph-key", "graph-old"}


def test_a_module_that_divides_gives_the_same_bits_whether_or_not_its_graph_is_kept(tmp_path: Path) -> None:
    """A network must not give other images where the folder of the cache cannot be written."""

    class Dividing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.silu(x / 0.8)

    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).numpy()
    outs = [openvino_executor.one_thread(Dividing(), (4, 64), file)(x) for file in (None, KeptGraph(tmp_path, "key"))]
    np.testing.assert_array_equal(*outs)


def test_a_graph_in_a_folder_that_is_only_read_is_used(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = kept.run()

    def refuse(*_args: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "touch", refuse)
    assert kept.run()[0] == expected
    assert kept.converted == 1


def test_what_a_killed_server_was_writing_is_deleted_when_it_is_old_and_nothing_else(kept: Kept) -> None:
    names = ("graph-new-old", "graph-new-young", "graph-mine")
    for name in names:
        (kept.folder / name).mkdir(parents=True)
        (kept.folder / name / "graph-key.bin").write_bytes(b"part")
    for name in ("graph-new-old", "graph-mine"):
        os.utime(kept.folder / name, (time.time() - 2 * openvino_executor.UNFINISHED_S,) * 2)
    kept.run()
    assert {file.name for file in kept.folder.iterdir() if file.is_dir()} == {"graph-new-young", "graph-mine"}


def test_two_servers_may_keep_the_same_graph_at_once_and_what_is_mixed_is_not_read(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one's file comes just before this one's hash, and is not what this one has mapped."""
    replace_file = Path.replace

    def replaced(new: Path, place: Path) -> Path:
        if place.suffix == ".sha256":
            (other := place.with_suffix(".other")).write_bytes(b"another's weights")
            replace_file(other, place.with_suffix(".bin"))
        return replace_file(new, place)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replaced)
        expected, _ = kept.run()
    assert kept.run()[0] == expected
    assert kept.converted == 2


@pytest.mark.parametrize("suffix", ["bin", "xml", "sha256"])
def test_a_link_in_the_place_of_a_file_is_replaced_and_a_folder_is_left_alone(kept: Kept, suffix: str) -> None:
    kept.folder.mkdir()
    place, linked = kept.folder / f"graph-key.{suffix}", kept.folder / "linked"
    linked.write_text("somebody's")
    place.symlink_to(linked)
    expected, net = kept.run()
    assert {parameter.device.type for parameter in net.parameters()} == {"meta"}
    assert linked.read_text() == "somebody's"
    place.unlink()
    (place / "within").mkdir(parents=True)
    assert kept.run()[0] == expected
    assert (place / "within").is_dir()


@pytest.mark.parametrize(
    "checkpoint",
    [name if name in ("colour", "NCSN++") else pytest.param(name, marks=pytest.mark.long) for name in MODELS],
    indirect=True,
)
def test_one_stream_of_all_threads_gives_the_bits_of_streams_of_one_thread(checkpoint: Checkpoint) -> None:
    inputs = example_inputs(checkpoint, CPU, 3)
    graph, passes = converted(checkpoint)
    one = OpenVINOExecutor(graph, threads=2, streams=1, compiled=passes)
    assert "one stream of 2 threads" in one.details
    torch.testing.assert_close(one(*inputs), openvino(checkpoint)(*inputs), rtol=1e-5, atol=1e-5)
    alone = torch.cat([one(*autotune.rows_of(inputs, row, row + 1)) for row in range(3)])
    assert one(*inputs).equal(alone)
