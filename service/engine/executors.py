"""Executors run the network on a batch of places, and return its output in float32.

A place is one input of the network; a guided row takes two. An exact executor gives a place the same bits, whatever
else is in the batch. It uses a few fixed pass sizes, whose outputs were found to agree. `autotune.py` chooses the
executor and the sizes.
"""

import copy
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tminus.model.denoiser import Denoiser
from tminus.model.machine import torch_threads
from tminus.service.engine.devices import multiplying, streams
from tminus.service.threads import started_pool

CPU_SIZES = (1, 2, 4, 8)  # pass sizes to try on a CPU
PRECISIONS = ("float32", "tf32", "bfloat16")  # tf32 (CUDA only): products of float32 values with 10-bit mantissas
Passes = list[tuple[int, int, int]]  # (start, end, size) of each pass
MAX_GRAPHS = 6  # torch.compile silently gives up after 8 shapes, and each graph keeps memory


class Executor(Protocol):
    """Runs the network on a batch of places. Not thread-safe."""

    name: str
    precision: str
    details: str  # anything else that may change output bits: layout, pass sizes, streams
    queues: bool  # True if a batch may start before the previous one has finished

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        """Run the network, and return its output, float32 [B, C', H, W].

        x: float32 [B, C, H, W]. t: float32 [B]. class_labels: int64 [B] or None.
        """
        ...

    def start(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Callable[[], Tensor]:
        """Start the network. The returned function waits for the output. The caller may do other work in between."""
        ...


def split(places: int, sizes: Sequence[int], streams: int = 1) -> Passes:
    """Divide a batch into passes of the given ascending sizes. Each stream gets an even share of the batch.

    Large passes come first. A pass is padded only if fewer places are left than the smallest size.
    """
    taken: list[int] = []
    for stream in range(streams):
        share = places // streams + (stream < places % streams)
        for size in reversed(sizes):
            taken += [size] * (share // size)
            share %= size
        if share:
            taken.append(sizes[0])
    passes: Passes = []
    start = 0
    for size in sorted(taken, reverse=True):
        if start < places:
            passes.append((start, min(start + size, places), size))
        start += size
    return passes


def split_wide(places: int, sizes: Sequence[int], streams: int, wide: int) -> tuple[Passes, Passes]:
    """Divide a batch into passes for the streams, and into wide passes that use all threads.

    Each stream gets an equal share. The remaining places run in wide passes if there are at most `wide` of them.
    Otherwise, they are divided among the streams too.
    """
    left = places % streams
    if not 0 < left <= wide:
        return split(places, sizes, streams), []
    even = places - left
    rest = [(even + start, even + end, size) for start, end, size in split(left, sizes)]
    return split(even, sizes, streams), rest


class EagerExecutor:
    """Runs the network in plain PyTorch; the reference for other executors. If `sizes` is None, a batch is one pass.

    With several threads, each thread is a stream, and a batch is divided into passes. All streams take passes from one
    queue, which all batches share, so no stream waits for another.
    """

    name = "eager"

    def __init__(
        self,
        net: Denoiser,
        device: torch.device,
        *,
        precision: str = "float32",
        channels_last: bool = True,
        sizes: Sequence[int] | None = None,
        threads: int = 1,
        wide: int = 0,
    ) -> None:
        """threads: the number of streams. With 1, passes run in the caller's thread and use all of torch's threads.

        wide: if no stream is busy, a batch of at most this many places runs in the caller's thread and uses all
        threads.
        """
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._net: Denoiser = net.to(device).to(memory_format=self._format)  # type: ignore[call-overload]
        self._device, self._sizes, self.precision = device, sizes, precision
        self._threads, self._wide = threads, wide
        self._pool = started_pool(threads, "tminus-pass", partial(torch.set_num_threads, 1)) if threads > 1 else None
        self.queues = self._pool is not None
        self._running: list[Future[Tensor]] = []
        self.details = "channels_last" if channels_last else "contiguous"
        if sizes is not None:
            self.details += f", {threads} streams" if threads > 1 else ""
            self.details += f", passes of {', '.join(map(str, sizes))}" + (f", up to {wide} wide" if wide else "")
            if device.type == "cpu":
                self._net = _of_fixed_kernels(self._net, precision, in_streams=threads > 1)

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        return self.start(x, t, class_labels)()

    def start(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Callable[[], Tensor]:
        """Start the network. On a CPU, passes in the caller's thread are finished when this returns.

        A batch may start before earlier batches have finished.
        """
        places = len(x)
        x = x.contiguous(memory_format=self._format)
        passes = [(0, places, places)] if self._sizes is None else split(places, self._sizes, self._threads)
        run = partial(self._pass, x, t, class_labels)
        self._running = [future for future in self._running if not future.done()]
        if self._pool is not None and (self._running or places > self._wide):
            futures = [self._pool.submit(run, *one) for one in passes]
            self._running += futures

            def finish() -> Tensor:
                wait(futures)  # even if one pass has failed, wait for all
                return torch.cat([future.result() for future in futures])

            return finish
        with torch_threads(self._threads if self._pool is not None else None):
            outs = [run(*one) for one in passes]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return lambda: out

    def _pass(self, x: Tensor, t: Tensor, class_labels: Tensor | None, start: int, end: int, size: int) -> Tensor:
        part = slice(start, end)
        labels = class_labels[part] if class_labels is not None else None
        padding = size - (end - start)
        autocast = torch.autocast(self._device.type, torch.bfloat16, enabled=self.precision == "bfloat16")
        with torch.inference_mode(), multiplying(self._device, tf32=self.precision == "tf32"), autocast:
            out: Tensor = self._net(pad(x[part], padding), pad(t[part], padding), pad(labels, padding)).float()
            return out[: end - start]


def _of_fixed_kernels(net: Denoiser, precision: str, *, in_streams: bool) -> Denoiser:
    """Copy a network so that passes of all sizes use the same CPU kernels. The copy shares the weights.

    PyTorch and MKL choose kernels by the number of rows, and different kernels differ in the last bits.
    """
    kinds: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _Linear}
    if precision == "float32" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        kinds[nn.Conv2d] = _Conv2d
    if in_streams:  # then a wide pass gives the same bits as a pass in a stream
        kinds[nn.GroupNorm] = _GroupNorm
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    net = copy.deepcopy(net, shared)
    for module in net.modules():
        module.__class__ = kinds.get(type(module), type(module))
    return net


class _Conv2d(nn.Conv2d):
    """Always uses oneDNN. Torch would use other kernels for a small single image or a 1x1 convolution on one thread."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert not isinstance(self.padding, str)
        return torch.mkldnn_convolution(input, weight, bias, self.padding, self.stride, self.dilation, self.groups)


class _Linear(nn.Linear):
    """Pads a batch of vectors, such as timestep embeddings, to the largest pass size, so MKL uses the same kernel."""

    def forward(self, input: Tensor) -> Tensor:
        rows = len(input)
        if input.dim() > 2 or rows >= CPU_SIZES[-1]:
            return super().forward(input)
        return super().forward(F.pad(input, (0, 0, 0, CPU_SIZES[-1] - rows)))[:rows]


class _GroupNorm(nn.GroupNorm):
    """Runs on one thread. On several, torch would split sums over a large image, which changes the bits."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.get_num_threads() == 1:
            return super().forward(input)
        with torch_threads(1):
            return super().forward(input)


class CompiledExecutor:
    """Runs the network with torch.compile. On CUDA, each pass size is captured once as a CUDA graph and replayed."""

    name = "compile"
    queues = False

    def __init__(
        self,
        net: Denoiser,
        device: torch.device,
        shape: Sequence[int],
        *,
        precision: str = "float32",
        sizes: Sequence[int],
    ) -> None:
        """Compile the network, which takes about a minute.

        shape: [C, H, W] of one row. sizes: at most MAX_GRAPHS pass sizes, ascending.
        """
        assert 1 <= len(sizes) <= MAX_GRAPHS
        self._net: Denoiser = net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch._dynamo.reset()  # otherwise earlier executors' shapes would count towards torch's limit
        # Without fullgraph, torch may silently run parts of the network eagerly.
        self._compiled = torch.compile(self._net, dynamic=False, fullgraph=True)
        self._device, self._sizes, self.precision = device, tuple(sizes), precision
        self.details = f"passes of {', '.join(map(str, sizes))}"
        labels = self._net.class_embedding is not None
        self._inputs: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        for size in self._sizes:
            x = torch.zeros(size, *shape, device=device).contiguous(memory_format=torch.channels_last)
            t = torch.zeros(size, device=device)
            self._inputs[size] = (x, t, torch.zeros_like(t, dtype=torch.int64) if labels else None)
            if device.type == "cuda":
                self._graphs[size] = self._capture(size)
            else:
                self._run(*self._inputs[size])

    @torch.inference_mode()
    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        outs = [self._pass(x, t, class_labels, *one) for one in split_padded(len(x), self._sizes)]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def start(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Callable[[], Tensor]:
        """Start the network. On a CPU, the work is finished when this returns."""
        out = self(x, t, class_labels)
        return lambda: out

    def _pass(self, x: Tensor, t: Tensor, class_labels: Tensor | None, start: int, end: int, size: int) -> Tensor:
        static_x, static_t, static_labels = self._inputs[size]
        num = end - start
        # The graph reads fixed memory. Entries past `num` hold values from an earlier pass; their outputs are dropped.
        static_x[:num].copy_(x[start:end])
        static_t[:num].copy_(t[start:end])
        if static_labels is not None and class_labels is not None:
            static_labels[:num].copy_(class_labels[start:end])
        if size not in self._graphs:
            return self._run(static_x, static_t, static_labels)[:num]
        graph, out = self._graphs[size]
        graph.replay()
        return out[:num].clone()  # the next replay overwrites `out`

    def _run(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        autocast = torch.autocast(self._device.type, torch.bfloat16, self.precision == "bfloat16")
        with torch.inference_mode(), multiplying(self._device, tf32=self.precision == "tf32"), autocast:
            out: Tensor = self._compiled(x, t, class_labels)  # type: ignore[no-untyped-call]
        return out.float()

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # A CUDA graph needs a warm-up on another stream, so that it captures neither compilation nor cuDNN's choices.
        stream = streams(self._device).capturing
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._run(*self._inputs[size])
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The default mode would forbid many CUDA calls in other threads, where another model's ticks may be running.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            out = self._run(*self._inputs[size])
        return graph, out


def split_padded(places: int, sizes: Sequence[int]) -> Passes:
    """Divide a batch into passes of the largest size, then one pass of the smallest size that fits the rest.

    If small passes leave the device partly idle, one padded pass costs less than several unpadded ones.
    """
    largest = sizes[-1]
    passes = [(start, start + largest, largest) for start in range(0, places - largest + 1, largest)]
    start = len(passes) * largest
    if start < places:
        passes.append((start, places, next(size for size in sizes if size >= places - start)))
    return passes


def probe_bits(executor: Executor, inputs: tuple[Tensor, Tensor, Tensor | None]) -> str:
    """Return a hash of an executor's outputs for these inputs."""
    return hashlib.sha256(executor(*inputs).cpu().numpy().tobytes()).hexdigest()[:16]


def pad(tensor: Tensor | None, padding: int) -> Any:
    """Append copies of the last entry to fill up a pass."""
    if tensor is None or padding == 0:
        return tensor
    return torch.cat([tensor, tensor[-1:].expand(padding, *tensor.shape[1:])])
