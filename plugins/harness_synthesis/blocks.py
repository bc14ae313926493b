"""The layers that people mean when they say "layer": blocks of convolutions, each with the ReLU that follows a bare one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from harness import Context
    from harness.models import LoadedModel


def blocks(model: LoadedModel) -> list[str]:
    """Layers with maps and convolutions in them, before the class scores, in order: whole blocks where there are at least four."""
    from torch import nn

    from harness.hooks import split_call

    calls = [name for name, _ in model.calls]
    shapes = dict(model.calls)

    def module(name: str) -> nn.Module:
        return model.modules[split_call(name)[0]]

    known = [
        n
        for n in calls[: calls.index(model.last_map)]
        if len(shapes[n]) == 4
        and shapes[n][2] * shapes[n][3] > 1
        and n not in model.channels_behind
        and any(isinstance(m, nn.Conv2d) for m in module(n).modules())
    ]
    found: list[str] = []
    for depth in range(max((n.count(".") for n in known), default=-1) + 1):
        outer = [n for n in known if n.count(".") <= depth]
        found = [n for n in outer if not any(other.startswith(f"{n}.") for other in outer)]
        if len(found) >= 4:
            break
    return [_rectified(calls, calls.index(n), module) for n in found]


def _rectified(calls: list[str], place: int, module: Callable[[str], nn.Module]) -> str:
    from torch import nn

    while isinstance(module(calls[place + 1]), nn.BatchNorm2d | nn.ReLU):
        place += 1
    return calls[place]


def spread_layers(ctx: Context, count: int) -> list[str]:
    """Blocks of convolutions, evenly over the depth, the first and the last among them."""
    from harness.errors import NotApplicable

    found = blocks(ctx.model)
    if not found:
        raise NotApplicable(f"needs layers with maps; {ctx.model.name!r} has none before its class scores")
    count = min(count, len(found))
    return [found[round(i * (len(found) - 1) / max(1, count - 1))] for i in range(count)]


def refuses(model: LoadedModel, side: int, layer: str = "") -> str:
    """Why a model does not take pictures of another size than its own, in its words; empty where it does."""
    import torch

    from harness.context import out_of_memory

    shape = (1, model.input.channels, side, side)
    images = torch.full(shape, 0.5, device=model.device, dtype=model.dtype)
    try:
        with torch.no_grad():
            _ = model.activations(images, [layer]) if layer else model(images)
    except (RuntimeError, AssertionError, ValueError) as error:
        if out_of_memory(error):
            raise
        return " ".join(str(error).split())[:160]
    return ""


def in_a_name(layer: str) -> str:
    """A layer's name as a part of an artifact's, in which no '#' may stand: that of a call is 'relu-2' for 'relu#2'."""
    return layer.replace("#", "-")


def place(model: LoadedModel, layer: str) -> float:
    """How deep a layer lies, from 0 to 1: its number among the layers with weights, pooling or activations of a forward pass."""
    names = [name for name, _ in model.calls]
    simple = [n for n in names if not any(other.startswith(f"{n}.") for other in names)]
    reached = [n for n in simple if names.index(n) <= names.index(model.full_name(layer))]
    return len(reached) / len(simple)
