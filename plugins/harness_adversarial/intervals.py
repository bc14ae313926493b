"""Interval bounds: which logits can pictures within eps have? (Gowal et al. 2018, arXiv:1810.12715, sec. 3)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.models import LoadedModel

Box = tuple["Tensor", "Tensor"]  # (low, high)


class Unknown(Exception):
    """A network holds something that intervals are not carried through here."""


def certified_linf(model: LoadedModel, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    """(N,) bool: no picture within eps in L-inf, and in [0, 1], makes the model prefer another class. Cost: about two forward passes."""
    import torch

    with torch.no_grad():
        box = ((images - eps).clamp_min(0), (images + eps).clamp_max(1))
        low, high = bounds(model.module, (model.normalise(box[0]), model.normalise(box[1])))
        own = low.gather(1, labels[:, None]).squeeze(1)
        others = high.scatter(1, labels[:, None], float("-inf")).amax(1)
        return own > others


def bounds(module: nn.Module, box: Box) -> Box:
    """Lower and upper bounds of a network's outputs over a box of inputs: each layer's own, so wider the deeper the network.

    Networks of convolutions, linear layers, batch norm, ReLU, pooling, flattening and sums; Unknown for any other.
    """
    import torch
    from torch import fx

    from harness.context import out_of_memory

    try:
        graph = fx.symbolic_trace(module)
    except Exception as error:  # control flow that depends on values, and whatever else tracing may meet
        raise Unknown(f"the network cannot be traced: {type(error).__name__}") from error
    layers = dict(graph.named_modules())
    values: dict[str, Any] = {}

    def given(argument: Any) -> Any:
        return values[argument.name] if isinstance(argument, fx.Node) else argument

    for node in graph.graph.nodes:
        if node.op == "placeholder":
            values[node.name] = box
        elif node.op == "output":
            found = given(node.args[0])
            return found[0], found[1]
        elif node.op == "call_module":
            values[node.name] = _layer(layers[node.target], given(node.args[0]))
        elif node.op in ("call_function", "call_method"):
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            arguments = [given(a) for a in node.args]
            if node.target is operator.add or name in ("add", "add_", "iadd"):
                if not all(isinstance(a, tuple) for a in arguments[:2]):
                    raise Unknown("a sum with something that is not a layer's output")
                values[node.name] = tuple(a + b for a, b in zip(*arguments[:2], strict=True))
            elif name in ("relu", "relu_", "flatten", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "dropout"):
                if name == "dropout":
                    values[node.name] = arguments[0]
                    continue
                # All of them rise with their input, so bounds go through one by one.
                function: Callable[..., Tensor] = getattr(torch.nn.functional, name, None) or getattr(torch, name)
                clean = {k: v for k, v in node.kwargs.items() if k != "inplace"}
                try:
                    values[node.name] = tuple(function(end, *arguments[1:], **clean) for end in arguments[0])
                except (TypeError, ValueError, RuntimeError) as error:
                    if out_of_memory(error):
                        raise
                    raise Unknown(f"{name} cannot be computed: {str(error).splitlines()[0][:120]}") from error
            else:
                raise Unknown(f"no bounds are known through {name}")
        else:
            raise Unknown(f"no bounds are known through {node.op}")
    raise Unknown("the network gives nothing")


def _layer(layer: nn.Module, box: Box) -> Box:
    import torch.nn.functional as F
    from torch import nn

    low, high = box
    if isinstance(layer, nn.Linear | nn.Conv2d):
        if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
            raise Unknown(f"a convolution with padding {layer.padding_mode!r}")
        centre, radius = (low + high) / 2, (high - low) / 2
        middle = layer(centre)
        if isinstance(layer, nn.Linear):
            spread = F.linear(radius, layer.weight.abs())
        else:
            spread = F.conv2d(radius, layer.weight.abs(), None, layer.stride, layer.padding, layer.dilation, layer.groups)
        return middle - spread, middle + spread
    if isinstance(layer, nn.BatchNorm2d):
        one, two = layer(low), layer(high)
        return one.minimum(two), one.maximum(two)  # each channel rises or falls with its input
    if isinstance(layer, nn.ReLU):
        return low.clamp_min(0), high.clamp_min(0)
    if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d | nn.AdaptiveAvgPool2d | nn.Flatten | nn.Dropout | nn.Identity):
        return layer(low), layer(high)
    raise Unknown(f"no bounds are known through {type(layer).__name__}")
