"""Runs networks with OpenVINO on a CPU, in one-thread streams that take small passes. Exact, and the fastest on CPUs.

In a pass of a given size, a place gets the same bits at any position and beside any other places. Passes of other sizes
mostly give the same bits too, and so do passes on one thread and on all threads. An exception is a small network in
bfloat16 on a CPU with AMX. So `autotune.py` combines only sizes that agree. The streams get equal shares of a batch.
The remaining places, such as a single row, run in *wide* passes, one at a time on all threads.
"""

import contextlib
import copy
import ctypes
import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from cachetools import LRUCache
from torch import Tensor, nn

from tminus import model
from tminus.model.checkpoint import Checkpoint
from tminus.model.denoiser import Denoiser
from tminus.model.files import first_line
from tminus.service.engine import openvino_graph
from tminus.service.engine.executors import split_wide
from tminus.service.engine.openvino_graph import convert, transpose_narrow

try:
    import openvino  # must follow openvino_graph, which disables telemetry
    import openvino.opset14 as ops
except ImportError:  # an optional dependency
    openvino = None

Floats = npt.NDArray[np.float32]
Compiled = dict[tuple[str, int, int, int], "_Passes"]  # keyed by (precision, size, streams, threads)

log = logging.getLogger(__name__)

MADV_DONTNEED = 4
MOST_KEPT_BYTES = 4 * 2**30  # maximum size of all graphs in the cache folder
# Prefix of a folder that is still being written, and the age in seconds at which it counts as abandoned.
UNFINISHED, UNFINISHED_S = "graph-new-", 3600.0
MAX_TIMES_BETWEEN = 4096  # number of cached embeddings of fractional timesteps
VECTOR = 64  # floats; torch uses no longer vectors on any processor
# A mark on a graph node, not saved to files. Without it, OpenVINO turns division by a constant into multiplication.
DIVIDES = "nonconvertable_divide_0"
PRECISION_HINTS = {"float32": "f32", "bfloat16": "bf16"}


def available() -> bool:
    """Return whether OpenVINO is installed."""
    return openvino is not None


def version() -> str | None:
    """Return OpenVINO's version; None if it is not installed."""
    return openvino.__version__ if openvino is not None else None


@cache
def core() -> Any:
    """Return OpenVINO's Core, the only one in this process.

    A Core gives its thread an alternate stack for signals, and frees that stack when the Core is destroyed. If several
    Cores are destroyed out of order, a thread is left with a freed stack, and the next signal kills the process.
    """
    return openvino.Core()


def precisions() -> tuple[str, ...]:
    """Return the precisions that this processor supports. bfloat16 needs special instructions."""
    capabilities = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("float32", "bfloat16") if "BF16" in capabilities else ("float32",)


def bfloat16_gain() -> float:
    """Return how many times faster bfloat16 is than float32 on this processor, for a typical convolution."""
    x = ops.parameter([1, 128, 32, 32], np.float32)
    layer = ops.convolution(x, np.ones((128, 128, 3, 3), np.float32), [1, 1], [1, 1], [1, 1], [1, 1])
    model = openvino.Model([ops.result(layer)], [x])
    seconds: dict[str, list[float]] = {precision: [] for precision in PRECISION_HINTS}
    requests = {
        precision: core().compile_model(model, "CPU", _config(precision, 1, 1)).create_infer_request()
        for precision in PRECISION_HINTS
    }
    for _ in range(8):  # alternate the precisions, so that other programs delay both
        for precision, request in requests.items():
            began_s = time.perf_counter()
            request.infer()
            seconds[precision].append(time.perf_counter() - began_s)
    return min(seconds["float32"]) / min(seconds["bfloat16"])


class Graph:
    """A network converted to OpenVINO's graph, with tables of its embeddings in float32. Executors may share a Graph.

    If a file is given, the graph is cached in it for later starts, and the weights are memory-mapped. Compiled passes
    hold their own reordered copy of the weights. So the mapped weights need not stay in memory, and the network can
    free its own.
    """

    def __init__(
        self, net: Denoiser, shape: Sequence[int], num_timesteps: int, file: "KeptGraph | None" = None
    ) -> None:
        """shape: [C, H, W] of one row. file: where the graph is cached."""
        with torch.inference_mode():
            # Embed all timesteps in one call, so that a timestep's bits never depend on a batch. Use float32, because
            # bfloat16 cannot represent 999.
            time_table = net.time_embedder()(torch.arange(num_timesteps))  # [T, temb]
            weight = net.class_embedding.weight if net.class_embedding is not None else None
            self.temb_dim = time_table.shape[1]
            # Torch computes the last elements differently if they do not fill a vector. Padding avoids such elements.
            spare = -self.temb_dim % VECTOR
            self.time_table = F.pad(time_table, (0, spare))
            self.class_table = F.pad(weight, (0, spare)).clone() if weight is not None else None  # [classes, temb]
        self._embed_between = LRUCache[float, Tensor](MAX_TIMES_BETWEEN)
        self._embed_one = copy.deepcopy(net.time_embedder())
        self.act = net.act
        self.shape, self.out_shape = tuple(shape), (net.config.out_channels, *shape[1:])
        self._file = file
        kept = file.read() if file is not None else None
        self.model = kept if kept is not None else self._convert_and_keep(net)
        self._net = net if self._file is not None else None

    def free_network(self) -> None:
        """Free the network's weights if the graph's file holds a copy."""
        if self._net is not None:
            self._net.to("meta")
            self._net = None

    def _convert_and_keep(self, net: Denoiser) -> Any:
        example = (torch.zeros(1, *self.shape), torch.zeros(1, self.temb_dim))
        inputs = [openvino.PartialShape([-1, *self.shape]), openvino.PartialShape([-1, self.temb_dim])]
        model = _convert(_Body(net), example, inputs)
        if self._file is not None and (kept := self._file.write(model)) is not None:
            return kept
        self._file = None  # the file cannot be written, so the weights stay in memory
        return model

    def compile(self, precision: str, size: int, streams: int, threads: int) -> "_Passes":
        """Compile the graph for passes of one size. The streams share the threads."""
        compiled = core().compile_model(self.of_size(size, precision), "CPU", _config(precision, streams, threads))
        if self._file is not None:
            self._file.release()
        return _Passes(compiled)

    @torch.inference_mode()
    def embed_time(self, t: Tensor) -> Tensor:
        """Embed timesteps [B]. Each fractional timestep is embedded alone, so that its bits never depend on a batch."""
        whole = t.long().clamp(0, len(self.time_table) - 1)
        temb = self.time_table[whole]
        for place in (whole != t).nonzero().flatten().tolist():
            temb[place] = self._between(float(t[place]))
        return temb

    def _between(self, t: float) -> Tensor:
        if t not in self._embed_between:
            temb = self._embed_one(torch.tensor([t]))[0]
            self._embed_between[t] = F.pad(temb, (0, self.time_table.shape[1] - self.temb_dim))
        return self._embed_between[t]

    def of_size(self, size: int, precision: str) -> Any:
        """Return a copy of the graph for passes of one size. Fixed shapes are a third faster than dynamic ones."""
        sized = self.model.clone()
        sized.reshape({sized.inputs[0]: [size, *self.shape], sized.inputs[1]: [size, self.temb_dim]})
        if precision == "float32":
            transpose_narrow(sized)
        return sized


class KeptGraph:
    """A converted graph in the cache folder: two files, and a third file with a hash of both.

    If the files are damaged or cannot be written, the network is converted again.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """key: a hash of everything that the graph depends on."""
        self._folder = folder
        self._files = tuple(folder / f"graph-{key}.{suffix}" for suffix in ("xml", "bin", "sha256"))
        self._xml, self._weights, self._sums = self._files

    def read(self) -> Any:
        """Load the graph with memory-mapped weights; None if it is missing or was modified."""
        try:
            if self._sums.read_text("utf-8") != _hash_of(self._xml, self._weights):
                log.warning("%s is not what was written: the network is converted again", self._weights)
                return None
            with contextlib.suppress(OSError):  # for example, the folder is read-only
                self._sums.touch()  # marks this graph as recently used, see `_forget_oldest`
            return core().read_model(self._xml, self._weights)
        except (OSError, ValueError, RuntimeError):
            return None

    def write(self, model: Any) -> Any:
        """Write the graph, and load it with memory-mapped weights. Return None on failure, such as a full disk.

        Other servers may write the same graph at the same time. Each server maps the files that it wrote itself.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._forget_unfinished()
            with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=self._folder) as name:
                xml, weights, sums = new = [Path(name) / file.name for file in self._files]
                openvino.save_model(model, xml, compress_to_fp16=False)
                kept = core().read_model(xml, weights)  # fails for a truncated file
                sums.write_text(_hash_of(xml, weights), "utf-8")
                weights.chmod(0o400)  # overwriting a mapped file would crash a server
                self._sums.unlink(missing_ok=True)  # the hash is deleted first and written last
                for file, place in zip(new, self._files, strict=True):
                    file.replace(place)
        except (OSError, RuntimeError) as error:
            log.info(
                "the converted network is not kept, so its weights stay in memory once more: %s", first_line(error)
            )
            return None
        with contextlib.suppress(OSError):  # another server may delete the same files
            self._forget_oldest()
        return kept

    def release(self) -> None:
        """Drop the mapped weights from memory. They are read from the file again when needed."""
        libc = ctypes.CDLL(None)
        with contextlib.suppress(OSError, AttributeError), Path("/proc/self/maps").open(encoding="utf-8") as maps:
            for line in maps:
                if self._weights.name in line and " r--" in line:
                    start, end = (int(address, 16) for address in line.split(maxsplit=1)[0].split("-"))
                    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)

    def _forget_unfinished(self) -> None:
        """Delete folders left behind by servers that were killed while writing."""
        for folder in self._folder.glob(f"{UNFINISHED}*"):
            with contextlib.suppress(OSError):
                if time.time() - folder.stat().st_mtime > UNFINISHED_S:
                    shutil.rmtree(folder)

    def _forget_oldest(self) -> None:
        """Delete the least recently used graphs, except this one, until the remaining graphs fit in MOST_KEPT_BYTES."""
        used = 0
        for sums in sorted(self._folder.glob("graph-*.sha256"), key=lambda file: file.stat().st_mtime, reverse=True):
            files = [sums, sums.with_suffix(".xml"), sums.with_suffix(".bin")]
            used += sum(file.stat().st_size for file in files if file.exists())
            if used > MOST_KEPT_BYTES and sums != self._sums:
                for file in files:
                    file.unlink(missing_ok=True)


def _hash_of(xml: Path, weights: Path) -> str:
    digest = hashlib.sha256(xml.read_bytes())
    with weights.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def kept_graph(folder: Path | None, checkpoint: Checkpoint, part: str) -> KeptGraph | None:
    """Return the cache entry for the graph of a part of a checkpoint; None if there is no folder.

    The entry's files may not exist yet.
    """
    if folder is None:
        return None
    parts = {
        "part": part,
        "weights": checkpoint.weights_hash,
        "network": checkpoint.net.config.to_dict(),
        "predicts": checkpoint.noise.prediction_type,  # the graph of a score network takes images in [0, 1]
        "shape": checkpoint.row_shape,
        "torch": torch.__version__,
        "openvino": version(),
        "code": _code_hash(),
    }
    return KeptGraph(folder, hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16])


@cache
def _code_hash() -> str:
    """Return a hash of the code that makes a graph: the networks and the conversion."""
    digest = hashlib.sha256()
    converts = [Path(__file__), Path(openvino_graph.__file__)]
    for file in sorted([*Path(model.__file__).parent.rglob("*.py"), *converts]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


class OpenVINOExecutor:
    """Runs a Graph in one-thread streams, and in wide passes on all threads.

    With streams=1, all threads share one stream and one copy of the weights.
    """

    name = "openvino"
    queues = True

    def __init__(
        self,
        graph: Graph,
        *,
        precision: str = "float32",
        sizes: Sequence[int] = (1,),
        threads: int,
        streams: int | None = None,
        wide: int = 0,
        compiled: Compiled | None = None,
    ) -> None:
        """sizes: pass sizes, ascending. streams: `threads` or 1. wide: maximum number of places in wide passes.

        compiled: compiled passes of this graph, shared with other executors; new ones are added. Executors that share
        passes must not run at the same time.
        """
        self.precision = precision
        passes = f"passes of {', '.join(map(str, sizes))}" + (f", up to {wide} wide" if wide else "")
        streams = threads if streams is None else streams
        how = f"{streams} streams" if streams == threads else f"one stream of {threads} threads"
        self.details = f"openvino {openvino.__version__}, {how}, {passes}"
        self._graph, self._sizes, self._streams, self._wide = graph, tuple(sizes), streams, wide
        self._num_running = 0  # number of passes whose outputs have not been read yet
        wide_sizes = [size for size in sizes if size <= max(wide, sizes[0])] if wide else []
        made: Compiled = {} if compiled is None else compiled

        def get(size: int, count: int) -> _Passes:
            key = (precision, size, count, threads)
            if key not in made:
                made[key] = graph.compile(*key)
            return made[key]

        self._passes = {size: get(size, streams) for size in sizes}
        self._wide_passes = {size: get(size, 1) for size in wide_sizes}

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        return self.start(x, t, class_labels)()

    @torch.inference_mode()
    def start(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Callable[[], Tensor]:
        """Start the network on a batch. A second batch may start before the first has ended.

        OpenVINO has a queue for each pass size, from which a free stream takes the next pass. Passes of different sizes
        would compete for the cores. So once each stream has a pass, passes of other sizes wait until earlier ones end.
        """
        graph = self._graph
        temb = graph.embed_time(t)
        if graph.class_table is not None:
            assert class_labels is not None
            temb = temb + graph.class_table[class_labels]
        x_, temb_ = x.contiguous().numpy(), graph.act(temb)[:, : graph.temb_dim].numpy()
        out = np.empty((len(x), *graph.out_shape), np.float32)
        narrow, wide = split_wide(len(x), self._sizes, self._streams, 0 if self._num_running else self._wide)
        waiting, running = deque([*narrow, *wide]), deque[tuple[_Passes, _Pass, int, int]]()

        def begin() -> None:
            passes = self._passes if len(waiting) > len(wide) else self._wide_passes
            start, end, size = waiting.popleft()
            one = passes[size].start(x_[start:end], temb_[start:end])
            running.append((passes[size], one, start, end))
            self._num_running += 1

        def finish() -> Tensor:
            try:
                while running:
                    passes, one, start, end = running[0]
                    one.wait()
                    out[start:end] = one.out[: end - start]
                    running.popleft()
                    passes.put_back(one)
                    self._num_running -= 1
                    if len(waiting) > len(wide) or (waiting and not running):  # a wide pass needs all threads
                        begin()
            finally:
                self._abandon(running)
            return torch.from_numpy(out)

        try:
            begin()
            while len(waiting) > len(wide) and (len(running) < self._streams or waiting[0][2] == narrow[0][2]):
                begin()
        except BaseException:
            self._abandon(running)
            raise
        return finish

    def _abandon(self, running: "deque[tuple[_Passes, _Pass, int, int]]") -> None:
        """Wait for passes whose outputs are not needed, because a request cannot be started while it is running."""
        while running:
            passes, one, *_ = running.popleft()
            with contextlib.suppress(RuntimeError):
                one.wait()
            passes.put_back(one)
            self._num_running -= 1


def one_thread(module: nn.Module, shape: Sequence[int], file: KeptGraph | None = None) -> Callable[[Floats], Floats]:
    """Compile a module for one thread in float32. The module has one input of this shape and one output.

    The returned function is not thread-safe. file: where the graph is cached.
    """
    graph = file.read() if file is not None else None
    if graph is None:
        converted = _convert(module, torch.zeros(*shape), [openvino.PartialShape(list(shape))])
        transpose_narrow(converted)
        graph = (file.write(converted) if file is not None else None) or converted
    request = core().compile_model(graph, "CPU", _config("float32", 1, 1)).create_infer_request()
    if file is not None:
        file.release()

    def run(x: Floats) -> Floats:
        request.infer([x])
        out: Floats = request.get_output_tensor(0).data.copy()
        return out

    return run


def _convert(module: nn.Module, example: Any, inputs: Sequence[Any]) -> Any:
    """Convert a module to a graph that computes the same bits as after being saved and loaded."""
    model = convert(module.eval(), example, inputs)
    for node in model.get_ordered_ops():
        if DIVIDES in (marks := node.get_rt_info()):
            del marks[DIVIDES]
    return model


def _config(precision: str, streams: int, threads: int) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": PRECISION_HINTS[precision],
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": threads,
        # The web server and the encoders use these cores too, and a pinned stream would have to wait for them.
        "ENABLE_CPU_PINNING": False,
    }


class _Passes:
    """Owns the requests of one compiled graph. Creates another one if all requests are running."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._free: deque[_Pass] = deque()

    def start(self, x: Floats, temb: Floats) -> "_Pass":
        one = self._free.popleft() if self._free else _Pass(self._compiled.create_infer_request())
        try:
            one.start(x, temb)
        except BaseException:
            self._free.append(one)
            raise
        return one

    def put_back(self, one: "_Pass") -> None:
        """Make a finished request available again."""
        self._free.append(one)


class _Pass:
    """A request whose input and output memory is accessed directly, at a third of the cost of passing tensors."""

    def __init__(self, request: Any) -> None:
        self._request, self.wait = request, request.wait  # `out` holds the result when `wait` returns
        self._x, self._temb = request.get_input_tensor(0).data, request.get_input_tensor(1).data
        self.out: Floats = request.get_output_tensor(0).data

    def start(self, x: Floats, temb: Floats) -> None:
        """Start the request. A short batch leaves old values in the rest of the input; callers drop their outputs."""
        self._x[: len(x)], self._temb[: len(temb)] = x, temb
        self._request.start_async()


class _Body(nn.Module):
    """Wraps Denoiser.denoise as a module, because OpenVINO converts only modules."""

    def __init__(self, net: Denoiser) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, act_temb: Tensor) -> Tensor:
        return self.net.denoise(x, act_temb)
