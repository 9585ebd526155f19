"""Converts a network to OpenVINO's graph, and rewrites the graph for exactness and speed.

Exactness: in a rewritten graph, the bits do not depend on the number of threads. Speed: large feature maps keep one
memory layout. On a CPU, convolutions put the channels last. An operation that needs the channels first has to convert
its input and its output, which takes most of the time of a large group norm. Rewriting for speed changes the rounding.
So small feature maps are left alone: they would gain little, and their images keep the same bytes.
"""

import contextlib
import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

# Disable telemetry: unless this package is missing, openvino reports each import and conversion over the network.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
try:
    import openvino
    import openvino.opset14 as ops
except ImportError:  # an optional dependency
    openvino = None
else:
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

LARGE = 2**18  # number of values in a row's feature map: 1 MiB, about a core's cache
# OpenVINO changes the layout of a feature map slowly if it has at most NARROW channels. This matters for maps of at
# least WORTHWHILE values.
NARROW, WORTHWHILE = 64, 2**14
WINDOW = 16  # maximum side of an averaging window, in pixels
# SPREAD[m, k] is 1 if row k of the 3x3 kernel is added to row m of the 4x4 kernel in `_transposed`.
SPREAD = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], np.float64)


def convert(module: nn.Module, example: Any, inputs: Sequence[Any]) -> Any:
    """Convert a module to a graph. Clear torch's caches, which would keep the traced weights until exit."""
    with warnings.catch_warnings(action="ignore"):  # the tracer warns about shapes, which never change here
        # With check_trace, torch would trace a second time to compare, which takes twice as long.
        traced = TorchScriptPythonDecoder(module, example_input=example, trace_kwargs={"check_trace": False})
        model = openvino.convert_model(traced, input=list(inputs))
    with contextlib.suppress(AttributeError):  # these names are private to torch
        torch._C._jit_clear_class_registry()
        torch.jit._recursive.concrete_type_store = torch.jit._recursive.ConcreteTypeStore()
        torch.jit._state._clear_class_state()
    _rewrite(model)
    _transpose_once(model)
    _project_once(model)
    model.validate_nodes_and_infer_types()
    return model


def transpose_narrow(model: Any) -> None:
    """Before group norms with few channels, change the layout by explicit transpositions. No bit changes.

    Use this only for float32, where OpenVINO's own layout changes are ten times as slow.
    """
    for node in model.get_ordered_ops():
        before = node.input_value(0).get_node() if node.get_type_name() == "MVN" else None
        if before is None or before.get_type_name() != "Reshape":
            continue
        values, shift = _split_shift(before.input_value(0))
        sizes = [size.get_length() for size in list(values.get_partial_shape())[1:]]
        if len(sizes) != 3 or sizes[0] > NARROW or math.prod(sizes) < WORTHWHILE:
            continue
        # OpenVINO transposes a sum that includes a convolution's output only if another operation lies between the sum
        # and the transposition. A mean over single pixels is such an operation, and changes no value.
        same = ops.avg_pool(values, [1, 1], [0, 0], [0, 0], [1, 1], exclude_pad=True)
        pixels = ops.reshape(ops.transpose(same, [0, 2, 3, 1]), np.array([0, -1, sizes[0]]), special_zero=True)
        x = ops.reshape(ops.transpose(pixels, [0, 2, 1]), np.array([0, *sizes]), special_zero=True)
        before.input(0).replace_source_output((x if shift is None else ops.add(x, shift)).output(0))
    model.validate_nodes_and_infer_types()


def _rewrite(model: Any) -> None:
    """Rewrite group norms, and large convolutions of upsampled feature maps."""
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind == "GroupNormalization":
            large = math.gcd(WINDOW, *_sizes(node)[1:]) > 1 and math.prod(_sizes(node)) >= LARGE
            new = _norm_by_windows(node) if large else _norm_by_group(node)
        elif kind == "Convolution" and math.prod(_sizes(node)) >= LARGE and _doubles(node):
            new = _transposed(node)
        else:
            continue
        node.output(0).replace(new.output(0))


def _transpose_once(model: Any) -> None:
    """In each attention layer, transpose the pixels once instead of three times, for q, k and v. No bit changes."""
    products = defaultdict(list)
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul" and node.get_attributes()["transpose_a"]:
            products[node.input_value(0).get_node().get_friendly_name()].append(node)
    for nodes in products.values():
        flat = nodes[0].input_value(0).get_node()
        if len(nodes) < 2 or flat.get_type_name() != "Reshape":
            continue
        before, after = (list(each.get_partial_shape()) for each in (flat.input_value(0), flat.output(0)))
        if len(before) != 4 or len(after) != 3 or before[1] != after[1]:  # not from [B, C, H, W] to [B, C, H W]
            continue
        last = ops.transpose(flat.input_value(0), [0, 2, 3, 1])
        pixels = ops.reshape(last, np.array([0, -1, _sizes(flat)[0]]), special_zero=True)
        for node in nodes:
            product = ops.matmul(pixels, node.input_value(1), False, node.get_attributes()["transpose_b"])
            node.output(0).replace(product.output(0))


def _project_once(model: Any) -> None:
    """Compute the timestep projections of all blocks in one matrix product. No bit changes."""
    sums, weights, biases = [], [], []
    for node in model.get_ordered_ops():
        product = node.input_value(0).get_node() if node.get_type_name() == "Add" else None
        if product is None or product.get_type_name() != "MatMul":
            continue
        inputs = [product.input_value(0).get_node(), product.input_value(1).get_node(), node.input_value(1).get_node()]
        kinds = [each.get_type_name() for each in inputs]
        if kinds == ["Parameter", "Constant", "Constant"] and product.get_attributes()["transpose_b"]:
            sums.append(node)
            weights.append(inputs[1].get_data())
            biases.append(inputs[2].get_data().ravel())
    if len(sums) < 2:
        return
    temb = sums[0].input_value(0).get_node().input_value(0)
    product = ops.matmul(temb, ops.constant(np.concatenate(weights)), False, True)
    joined = ops.add(product, ops.constant(np.concatenate(biases)[None]))
    parts = ops.variadic_split(joined, np.int64(1), np.array([len(bias) for bias in biases]))
    for k, node in enumerate(sums):
        node.output(0).replace(parts.output(k))


def _sizes(node: Any) -> list[int]:
    """Return channels, height and width of a node's output."""
    return [size.get_length() for size in list(node.output(0).get_partial_shape())[1:]]


def _norm_by_group(node: Any) -> Any:
    """Rewrite a group norm as a norm over [B, groups, rest], where a single thread computes each group.

    OpenVINO's own group norm splits a group's sum between threads, so its bits depend on the number of threads.
    """
    x, weight, bias = (node.input_value(k) for k in range(3))
    attributes = node.get_attributes()
    h = ops.reshape(x, np.array([0, attributes["num_groups"], -1]), special_zero=True)
    h = ops.mvn(h, np.array([2]), True, attributes["epsilon"], "inside_sqrt")
    h = ops.reshape(h, np.array([0, *_sizes(node)]), special_zero=True)
    return ops.add(ops.multiply(h, _by_channel(weight)), _by_channel(bias))


def _norm_by_windows(node: Any) -> Any:
    """Rewrite a group norm by averaging over windows and then over each group. The channels stay last.

    In bfloat16, the output of every node is rounded, and a rounded statistic would shift a whole channel. So each
    statistic is the sum of two values: the rounded value, and the mean of the remainder.
    """
    x, weight, bias = (node.input_value(k) for k in range(3))
    attributes, (channels, height, width) = node.get_attributes(), _sizes(node)
    groups, window = attributes["num_groups"], math.gcd(WINDOW, height, width)
    x, shift = _split_shift(x)

    def windows(values: Any) -> Any:
        return ops.avg_pool(values, [window] * 2, [0, 0], [0, 0], [window] * 2, exclude_pad=True)

    def mean(values: Any) -> tuple[Any, Any]:
        by_group = ops.reshape(values, np.array([0, groups, -1]), special_zero=True)
        rounded = ops.reduce_mean(by_group, np.array([2]), keep_dims=True)
        rest = ops.reduce_mean(ops.subtract(by_group, rounded), np.array([2]), keep_dims=True)
        return each(rounded), each(rest)

    def each(by_group: Any) -> Any:
        return _by_channel(ops.tile(by_group, np.array([1, 1, channels // groups])), rows=0)

    def shifted(values: Any) -> Any:
        return values if shift is None else ops.add(values, shift)

    rounded, rest = mean(shifted(windows(x)))
    # The difference is computed twice. Otherwise it would be written to memory and read again.
    centred = ops.subtract(shifted(x), rounded)
    variance = ops.add(*mean(windows(ops.multiply(centred, centred))))
    deviation = ops.sqrt(ops.add(variance, np.float32(attributes["epsilon"])))
    h = ops.divide(shifted(ops.subtract(ops.subtract(x, rest), rounded)), deviation)
    return ops.add(ops.multiply(h, _by_channel(weight)), _by_channel(bias))


def _split_shift(x: Any) -> tuple[Any, Any]:
    """Split a sum into values and a shift that is constant over a channel. The sum then need not be stored."""
    node = x.get_node()
    if node.get_type_name() == "Add":
        for values, shift in ((0, 1), (1, 0)):
            values, shift = node.input_value(values), node.input_value(shift)
            if list(shift.get_partial_shape())[2:] == [1, 1] and shift.get_node().get_type_name() != "Constant":
                return values, shift
    return x, None


def _by_channel(values: Any, rows: int = 1) -> Any:
    """Reshape values to [rows, channels, 1, 1]. With rows=0, the number of rows stays the same."""
    return ops.reshape(values, np.array([rows, -1, 1, 1]), special_zero=True)


def _doubles(node: Any) -> bool:
    """Return whether a node is a 3x3 convolution of a feature map that nearest-neighbour upsampling has doubled."""
    before, attributes = node.input_value(0).get_node(), node.get_attributes()
    if before.get_type_name() != "Interpolate" or before.get_attributes()["mode"] != "nearest":
        return False
    plain = all(list(attributes[name]) == [1, 1] for name in ("strides", "dilations", "pads_begin", "pads_end"))
    kernel = list(node.input_value(1).get_shape())[2:]
    sizes = [size.get_length() for size in list(before.input_value(0).get_partial_shape())[2:]]
    return plain and kernel == [3, 3] and [2 * size for size in sizes] == _sizes(node)[1:]


def _transposed(node: Any) -> Any:
    """Rewrite the convolution of a doubled map as a transposed convolution of the smaller map.

    In the doubled map, several weights of the 3x3 kernel fall on the same pixel of the smaller map. These weights are
    summed beforehand, which leaves four of nine multiplications.
    """
    weight = node.input_value(1).get_node().get_data().astype(np.float64)
    spread = np.einsum("mk,nl,oikl->iomn", SPREAD, SPREAD, weight).astype(np.float32)
    before = node.input_value(0).get_node().input_value(0)
    return ops.convolution_backprop_data(before, ops.constant(spread), [2, 2], pads_begin=[1, 1], pads_end=[1, 1])
