"""Incremental inference: what a network answers when one box of a picture changes, by computing anew only what the box reaches
(Nakandala, Kumar & Papakonstantinou 2019, doi:10.1145/3299869.3319874, sec. 4).

The clean picture's maps are kept. From layer to layer a box grows by the kernel and shrinks by the stride; a convolution or
pooling runs on the box and the rim it needs, everything else on the box alone, and where the box has become nearly the whole
map, or a layer mixes all places, the full map is put together and the network goes on as usual. Exact but for rounding.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node, symbolic_trace

from harness.models import LoadedModel

WHOLE = 0.8  # a box that covers more of its map than this is not worth the trouble
_PLACEWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Dropout, nn.Identity,
    nn.BatchNorm2d,
)  # fmt: skip
_PLACEWISE_FUNCTIONS = {
    F.relu, F.relu_, F.relu6, F.gelu, F.silu, F.hardswish, F.dropout, torch.relu, torch.relu_, torch.sigmoid, torch.tanh, operator.add,
    operator.iadd, operator.mul, operator.imul, torch.add, torch.mul,
}  # fmt: skip
_IN_PLACE = {operator.iadd, operator.imul, F.relu_, torch.relu_}
_PLACEWISE_METHODS = {"relu", "relu_", "add", "add_", "mul", "mul_", "sigmoid", "contiguous"}


@dataclass(frozen=True)
class Window:
    """A layer that looks at k places each way: (rows, columns) of everything."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    fill: float  # what is beyond the edge


@dataclass(frozen=True)
class Boxes:
    """One box a window of the picture in a map: all of one size, at their own places."""

    size: tuple[int, int]
    tops: Sequence[int]
    lefts: Sequence[int]


class Incremental:
    """Answers to one picture with boxes of it changed.

    `boxes` are (top, bottom, left, right) in pixels. `work` counts the multiplications of a whole pass, `left` is the share of
    them that remains; ValueError where the network cannot be traced, or writes over values that it still reads.
    """

    def __init__(self, model: LoadedModel, boxes: Sequence[tuple[int, int, int, int]], size: tuple[int, int]) -> None:
        self.model = model
        try:
            self.graph = symbolic_trace(model.module).graph
        except Exception as error:  # control flow that depends on values, and whatever else tracing meets
            raise ValueError(f"the network cannot be traced: {error}") from error
        self._refuse_overwriting()
        # All boxes get the size of the largest; one at the edge starts earlier and covers what stays as it is.
        height, width = max(b - t for t, b, _, _ in boxes), max(r - left for _, _, left, r in boxes)
        tops, lefts = [min(t, size[0] - height) for t, _, _, _ in boxes], [min(left, size[1] - width) for _, _, left, _ in boxes]
        self.boxes = Boxes((height, width), tops, lefts)
        with torch.no_grad():
            example = torch.zeros((1, model.input.channels, *size), device=model.device, dtype=model.dtype)
            shapes: dict[Node, Any] = {n: v.shape if isinstance(v, Tensor) else () for n, v in self._run(model.normalise(example)).items()}
        self.plan: dict[Node, Boxes | None] = {}  # None: the full map
        work, rest = 0.0, 0.0
        for node in self.graph.nodes:
            self.plan[node] = self._place(node, shapes)
            own, box = self._multiplications(node, shapes), self.plan[node]
            work += own
            rest += own if box is None else own * box.size[0] * box.size[1] / (shapes[node][2] * shapes[node][3])
        self.work, self.left = work, rest / work if work else 1.0

    def _multiplications(self, node: Node, shapes: dict[Node, Any]) -> float:
        """Of a convolution, a linear layer or an attention; the rest is small."""
        module = self.model.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d):
            return float(shapes[node][2] * shapes[node][3] * module.weight.numel())
        if isinstance(module, nn.Linear):
            return float(math.prod(shapes[node][1:-1]) * module.weight.numel())
        if isinstance(module, nn.MultiheadAttention):  # four maps of every place, and every place with every other
            places = shapes[node.all_input_nodes[0]][1]
            return float(4 * places * module.embed_dim**2 + 2 * places**2 * module.embed_dim)
        return 0.0

    def _refuse_overwriting(self) -> None:
        """ValueError where something in place changes a value that another node reads as well: the order would matter."""
        for node in self.graph.nodes:
            module: Any = self.model.module.get_submodule(str(node.target)) if node.op == "call_module" else None
            method = node.op == "call_method" and str(node.target).endswith("_")
            inplace = getattr(module, "inplace", False) or node.kwargs.get("inplace", False) or node.target in _IN_PLACE or method
            if inplace and node.all_input_nodes and len(node.all_input_nodes[0].users) > 1:
                raise ValueError(f"{node.name} writes over what others read")

    # -- what is where ---------------------------------------------------------------------------------------------------

    def _window(self, node: Node) -> Window | None:
        """The window of a convolution or pooling that can be run on a part of its map."""
        if node.op != "call_module":
            return None
        module: Any = self.model.module.get_submodule(str(node.target))
        if isinstance(module, nn.Conv2d):
            if module.padding_mode != "zeros" or isinstance(module.padding, str):
                return None
            return Window(_pair(module.kernel_size), _pair(module.stride), _pair(module.padding), _pair(module.dilation), 0.0)
        if isinstance(module, nn.MaxPool2d) and not module.return_indices:
            return Window(_pair(module.kernel_size), _pair(module.stride), _pair(module.padding), _pair(module.dilation), float("-inf"))
        if isinstance(module, nn.AvgPool2d) and not module.ceil_mode and (_pair(module.padding) == (0, 0) or module.count_include_pad):
            return Window(_pair(module.kernel_size), _pair(module.stride), _pair(module.padding), (1, 1), 0.0)
        return None

    def _joins(self, node: Node) -> bool:
        """Whether a node works place by place, on one map or on several of one size."""
        if node.op == "call_module":
            module = self.model.module.get_submodule(str(node.target))
            return isinstance(module, _PLACEWISE_MODULES) and not module.training
        if node.op == "call_method":
            return node.target in _PLACEWISE_METHODS
        return node.op == "call_function" and (node.target in _PLACEWISE_FUNCTIONS or _is_cat(node))

    def _place(self, node: Node, shapes: dict[Node, Any]) -> Boxes | None:
        if node.op == "placeholder":
            return self.boxes
        inputs = [n for n in node.all_input_nodes if shapes[n]]
        found = [self.plan[n] for n in inputs]
        if not found or any(f is None for f in found) or len(shapes[node]) != 4:
            return None
        known = [f for f in found if f is not None]
        window, (height, width) = self._window(node), shapes[node][2:]
        if window is not None:
            rows = _grown(known[0].tops, known[0].size[0], window, 0, height)
            columns = _grown(known[0].lefts, known[0].size[1], window, 1, width)
        elif self._joins(node) and len({tuple(shapes[n][2:]) for n in inputs}) == 1:
            rows = _union([(f.tops, f.size[0]) for f in known], height)
            columns = _union([(f.lefts, f.size[1]) for f in known], width)
        else:
            return None
        box = Boxes((rows[1], columns[1]), rows[0], columns[0])
        return None if box.size[0] * box.size[1] > WHOLE * height * width else box

    # -- running ---------------------------------------------------------------------------------------------------------

    def _run(self, images: Tensor) -> dict[Node, Any]:
        """Every node's value; copies, since the network may write over what it has made."""
        values: dict[Node, Any] = {}
        for node in self.graph.nodes:
            values[node] = self._execute(node, images, values)
            if isinstance(values[node], Tensor):
                values[node] = values[node].clone()
        return values

    def _execute(self, node: Node, images: Tensor, values: dict[Node, Any]) -> Any:
        if node.op == "placeholder":
            return images
        if node.op == "get_attr":
            found: Any = self.model.module
            for part in str(node.target).split("."):
                found = getattr(found, part)
            return found
        args: Any = torch.fx.node.map_arg(node.args, lambda n: values[n])
        kwargs: Any = torch.fx.node.map_arg(node.kwargs, lambda n: values[n])
        if node.op == "call_module":
            return self.model.module.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_function":
            target: Any = node.target
            return target(*args, **kwargs)
        return args[0]  # output

    def clean(self, image: Tensor) -> dict[Node, Any]:
        """What the network makes of a picture (1, C, H, W) as it is; the answer is its last value."""
        return self._run(self.model.normalise(image))

    def answers(self, clean: dict[Node, Any], covered: Tensor, rows: slice) -> Any:
        """The network's answer for boxes number rows.start to rows.stop; `covered` (n, C, h, w) is what is in them, in [0, 1]."""
        values: dict[Node, Any] = {}
        wholes: dict[Node, Any] = {}
        last: Any = None
        for node in self.graph.nodes:
            if node.op == "placeholder":
                values[node] = self.model.normalise(covered)
            elif self.plan[node] is None:
                values[node] = self._execute(node, covered, {n: self._whole(n, values, wholes, clean, rows) for n in node.all_input_nodes})
            else:
                values[node] = self._part(node, values, clean, rows)
            last = values[node]
        return last

    def _whole(self, node: Node, values: dict[Node, Any], wholes: dict[Node, Any], clean: dict[Node, Any], rows: slice) -> Any:
        """A node's full value for each box."""
        box = self.plan[node]
        if box is None:
            return values[node]
        if node in wholes:
            return wholes[node]
        part = values[node]
        full = clean[node].repeat(len(part), 1, 1, 1).contiguous(memory_format=torch.channels_last)
        height, width = box.size
        for i, (top, left) in enumerate(zip(box.tops[rows], box.lefts[rows], strict=True)):
            full[i, :, top : top + height, left : left + width] = part[i]
        wholes[node] = full
        return full

    def _part(self, node: Node, values: dict[Node, Any], clean: dict[Node, Any], rows: slice) -> Tensor:
        """A node's value in its boxes."""
        box = self.plan[node]
        assert box is not None
        tops, lefts = box.tops[rows], box.lefts[rows]
        window = self._window(node)
        if window is not None:
            source = node.all_input_nodes[0]
            if window.kernel == (1, 1) and window.stride == (1, 1) and window.padding == (0, 0):
                return self._execute(node, values[source], values)
            return self._windowed(node, source, window, values, clean, rows)
        inputs = node.all_input_nodes
        cut = {}
        for n in inputs:
            own = self.plan[n]
            if own is None or (own.size == box.size and own.tops[rows] == tops and own.lefts[rows] == lefts):
                cut[n] = values[n]
            else:
                cut[n] = _crop(clean[n], values[n], own, rows, tops, lefts, box.size, (0, 0), 0.0)
        return self._execute(node, values[inputs[0]], cut)

    def _windowed(self, node: Node, source: Node, window: Window, values: dict[Node, Any], clean: dict[Node, Any], rows: slice) -> Tensor:
        """A convolution or pooling of the boxes and the rim around them, with the padding put there by hand."""
        box, own = self.plan[node], self.plan[source]
        assert box is not None
        assert own is not None
        starts, lengths = [], []
        for axis, places in enumerate((box.tops[rows], box.lefts[rows])):
            starts.append([p * window.stride[axis] - window.padding[axis] for p in places])
            lengths.append((box.size[axis] - 1) * window.stride[axis] + window.dilation[axis] * (window.kernel[axis] - 1) + 1)
        size = (lengths[0], lengths[1])
        inputs = _crop(clean[source], values[source], own, rows, starts[0], starts[1], size, window.padding, window.fill)
        module: Any = self.model.module.get_submodule(str(node.target))
        if isinstance(module, nn.Conv2d):
            return F.conv2d(inputs, module.weight, module.bias, module.stride, 0, module.dilation, module.groups)
        if isinstance(module, nn.MaxPool2d):
            return F.max_pool2d(inputs, module.kernel_size, module.stride, 0, module.dilation)
        return F.avg_pool2d(inputs, module.kernel_size, module.stride, 0, divisor_override=module.divisor_override)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _is_cat(node: Node) -> bool:
    """torch.cat over the channels."""
    dim: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    return node.target in (torch.cat, torch.concat) and bool(dim == 1)


def _grown(starts: Sequence[int], size: int, window: Window, axis: int, limit: int) -> tuple[list[int], int]:
    """Where the outputs begin that see any of `size` places from each start, and how many there are at most."""
    kernel, stride, padding = window.kernel[axis], window.stride[axis], window.padding[axis]
    reach = window.dilation[axis] * (kernel - 1)
    first = [max(0, -((reach - padding - s) // stride)) for s in starts]
    last = [min(limit - 1, (s + size - 1 + padding) // stride) for s in starts]
    count = max(1, min(limit, max(b - a + 1 for a, b in zip(first, last, strict=True))))
    return [min(max(0, a), limit - count) for a in first], count


def _union(parts: Sequence[tuple[Sequence[int], int]], limit: int) -> tuple[list[int], int]:
    """The smallest ranges of one length that hold those of all parts."""
    first = [min(p) for p in zip(*(starts for starts, _ in parts), strict=True)]
    last = [max(p) for p in zip(*([s + size for s in starts] for starts, size in parts), strict=True)]
    count = min(limit, max(b - a for a, b in zip(first, last, strict=True)))
    return [min(a, limit - count) for a in first], count


def _crop(
    clean: Tensor, part: Tensor, own: Boxes, rows: slice, tops: Sequence[int], lefts: Sequence[int], size: tuple[int, int],
    padding: tuple[int, int], fill: float,
) -> Tensor:  # fmt: skip
    """(n, C, h, w): the clean map (1, C, H, W) around the places given, `fill` beyond its edges, with each box's values in it."""
    height, width = clean.shape[2:]
    (above, before), (low, high) = padding, size
    below = max(0, max(tops) + low - height)
    after = max(0, max(lefts) + high - width)
    around = F.pad(clean, (before, after, above, below), value=fill) if above or before or below or after else clean
    shape = (len(part), clean.shape[1], low, high)
    found = torch.empty(shape, device=clean.device, dtype=part.dtype, memory_format=torch.channels_last)
    for i, (top, left, y, x) in enumerate(zip(tops, lefts, own.tops[rows], own.lefts[rows], strict=True)):
        found[i] = around[0, :, top + above : top + above + low, left + before : left + before + high]
        # The box within the crop; of a box that reaches beyond it, what lies inside.
        dy, dx = y - top, x - left
        y0, x0, y1, x1 = max(0, dy), max(0, dx), min(low, dy + own.size[0]), min(high, dx + own.size[1])
        if y0 < y1 and x0 < x1:
            found[i, :, y0:y1, x0:x1] = part[i, :, y0 - dy : y1 - dy, x0 - dx : x1 - dx]
    return found
