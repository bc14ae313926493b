"""Output shapes, strides and theoretical receptive fields of a model's layers.

r grows by (k - 1) * j and the stride j by s at each window of size k and stride s (Araujo et al. 2019,
doi:10.23915/distill.00021); over branches the union counts. Needs a model that torch.fx can trace; where it cannot, or
where an unknown function comes in between, the columns stay empty.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node, symbolic_trace

from .hooks import split_call
from .models import LoadedModel


@dataclass(frozen=True)
class Field:
    """Position i of a layer sees input pixels i * stride + left ... i * stride + right, in each direction."""

    stride: float = 1
    left: float = 0
    right: float = 0
    whole: bool = False  # sees the whole picture

    @property
    def size(self) -> int:
        return int(self.right - self.left + 1)

    def window(self, kernel: int, stride: int, padding: float, dilation: int) -> Field:
        if self.whole:
            return self
        left = self.left - padding * self.stride
        right = self.right + ((kernel - 1) * dilation - padding) * self.stride
        return Field(self.stride * stride, left, right)


@dataclass(frozen=True)
class LayerInfo:
    """One row of `harness show MODEL`. `receptive_field` 0 means the whole picture, None unknown."""

    name: str
    kind: str
    shape: tuple[int, ...]  # (C, H, W) or (D,)
    receptive_field: int | None
    stride: int | None
    parameters: int


GLOBAL = Field(whole=True)
_WINDOWS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
_GLOBAL = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Linear, nn.MultiheadAttention, nn.Flatten)
# Norms look wider while they train; in evaluation batch norm does not, and the others are counted without their statistics.
_POINTWISE = (
    nn.Identity, nn.Dropout, nn.Dropout2d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d, nn.LocalResponseNorm,
    nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
_SAME_FUNCTIONS: set[Any] = {
    F.relu, F.relu_, torch.relu, torch.relu_, F.gelu, F.silu, F.hardswish, F.hardsigmoid, F.relu6, F.leaky_relu, F.dropout,
    torch.sigmoid, torch.tanh, F.layer_norm, F.batch_norm, F.instance_norm, operator.neg, torch.clone, torch.permute,
}  # fmt: skip
_SAME_METHODS = {"relu", "relu_", "sigmoid", "tanh", "clone", "contiguous", "add", "add_", "mul", "mul_", "permute", "clamp"}
_JOINS: set[Any] = {operator.add, operator.iadd, operator.mul, operator.imul, operator.sub, torch.add, torch.mul, torch.cat, torch.sub}
_POOLS: set[Any] = {F.max_pool2d, F.avg_pool2d, torch.max_pool2d}
_WHOLE_FUNCTIONS: set[Any] = {torch.flatten, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.mean, F.linear}
_WHOLE_METHODS = {"flatten", "mean", "view", "reshape"}


def _one(value: Any) -> Any:
    """A window parameter for one direction; the larger of two."""
    return max(value) if isinstance(value, tuple | list) else value


def _same_padding(padding: Any, kernel: int, dilation: int) -> float:
    if padding == "same":
        return (kernel - 1) * dilation / 2
    return 0 if padding == "valid" else _one(padding)


def _module_field(module: nn.Module, x: Field) -> Field | None:
    if isinstance(module, _WINDOWS):
        kernel, dilation = _one(module.kernel_size), _one(getattr(module, "dilation", 1))
        stride = _one(module.stride if module.stride is not None else kernel)
        return x.window(kernel, stride, _same_padding(module.padding, kernel, dilation), dilation)
    if isinstance(module, _GLOBAL):
        # A linear layer on channels-last maps (ConvNeXt) works on each position alone; fx cannot tell it from a
        # classifier here, so the caller corrects it by the output's shape.
        return GLOBAL
    return x if isinstance(module, _POINTWISE) or type(module).__module__ == "torch.nn.modules.activation" else None


def _adaptive(x: Field, before: tuple[int, ...], after: tuple[int, ...]) -> Field | None:
    """Of adaptive pooling between known sizes: nothing changes, windows without overlap, everything; None where windows differ."""
    if before == after or x.whole:
        return x
    if after == (1, 1):
        return GLOBAL
    side, rest = divmod(before[0], after[0])
    if rest or any(a != side * b for a, b in zip(before, after, strict=True)):
        return None
    return x.window(side, side, 0, 1)


def _join(fields: list[Field]) -> Field | None:
    if any(f.whole for f in fields):
        return GLOBAL if all(f.whole for f in fields) else _widest([f for f in fields if not f.whole])
    return _widest(fields)


def _widest(fields: list[Field]) -> Field | None:
    if len({f.stride for f in fields}) > 1:
        return None
    return Field(fields[0].stride, min(f.left for f in fields), max(f.right for f in fields))


def _function_field(node: Node, inputs: list[Field]) -> Field | None:
    target: Any = node.target
    if target is operator.getitem:  # a choice among pictures and channels moves nothing; another would
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return inputs[0] if len(index) <= 2 else None
    if target is torch.unsqueeze:
        return inputs[0]
    by_name = getattr(target, "__name__", "") == "stochastic_depth"  # torchvision's, known to fx as a function
    if by_name or target in _SAME_FUNCTIONS or (target in _SAME_METHODS and len(inputs) == 1):
        return inputs[0]
    if target in _JOINS or target in _SAME_METHODS:
        return _join(inputs)
    if target in _WHOLE_FUNCTIONS or target in _WHOLE_METHODS:
        return GLOBAL
    if target in _POOLS:
        names = ("kernel_size", "stride", "padding")
        given = dict(zip(names, node.args[1:], strict=False)) | {k: v for k, v in node.kwargs.items() if k in names}
        kernel = _one(given["kernel_size"])
        return inputs[0].window(kernel, _one(given.get("stride") or kernel), _one(given.get("padding", 0)), 1)
    return None


def receptive_fields(module: nn.Module, shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Field]:
    """{layer, reused ones numbered `#k`: field} of every layer whose field is known."""
    try:
        graph: GraphModule = symbolic_trace(module)
    except Exception:  # fx raises whatever the model's own code raises on symbolic values
        return {}
    modules = dict(module.named_modules())
    fields: dict[Node, Field | None] = {}
    found: dict[str, list[Field | None]] = {}
    constant: set[Node] = set()  # parameters, sizes and what is made of them alone: they see nothing of the picture
    for node in graph.graph.nodes:
        value: Field | None = None
        if node.op == "placeholder":
            value = Field()
        elif node.op == "get_attr" or node.target is getattr or (node.op != "output" and constant.issuperset(node.all_input_nodes)):
            constant.add(node)
        else:
            known = [fields.get(n) for n in node.all_input_nodes if n not in constant]
            inputs = [f for f in known if f is not None]
            if inputs and len(inputs) == len(known):
                if node.op == "call_module":
                    inner = modules[str(node.target)]
                    value = _module_field(inner, inputs[0])
                    shape = (shapes or {}).get(str(node.target), ())
                    if isinstance(inner, nn.Linear) and len(shape) == 4 and not inputs[0].whole:
                        value = inputs[0]
                    before = (shapes or {}).get(str(node.all_input_nodes[0].target), ())
                    if isinstance(inner, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d) and len(shape) == len(before) == 4:
                        value = _adaptive(inputs[0], before[2:], shape[2:])
                else:
                    value = _function_field(node, inputs)
        fields[node] = value
        if node.op == "call_module":
            found.setdefault(str(node.target), []).append(value)
        # A block's field is that of the last operation inside it.
        for path in _owners(node):
            found[path] = [value]
    named: dict[str, Field] = {}
    for name, values in found.items():
        for i, field in enumerate(values, 1):
            if field is not None:
                named[f"{name}#{i}" if len(values) > 1 else name] = field
    return named


def _owners(node: Node) -> list[str]:
    """Dotted names of the blocks an operation stands in."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [str(path) for path, *_ in (v if isinstance(v, tuple) else (v,) for v in stack.values())]
    own = str(node.target) if node.op == "call_module" else None
    return [n for n in names if n and n != own]


def layer_table(model: LoadedModel) -> list[LayerInfo]:
    """Every layer in the order of a forward pass."""
    shapes = dict(model.calls)
    fields = receptive_fields(model.module, shapes)
    rows = []
    for name, shape in model.calls:
        module = model.modules[split_call(name)[0]]
        field = fields.get(name)
        size = None if field is None else 0 if field.whole else field.size
        stride = int(field.stride) if field is not None and not field.whole and float(field.stride).is_integer() else None
        count = sum(p.numel() for p in module.parameters())
        rows.append(LayerInfo(name, type(module).__name__, shape[1:], size, stride, count))
    return rows
