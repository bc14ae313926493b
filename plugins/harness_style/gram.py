"""Which layers say what style is, and what they say of a picture (Gatys et al. 2015, arXiv:1505.07376)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness import Context
    from harness.models import LoadedModel
    from harness.optimise import LBFGS, Moments, Objective

HISTORY = 3
Form = Literal["covariance", "relative", "absolute"]  # covariances about the style's means; Gram matrices, as shares and as in the paper


def targets_of(model: LoadedModel, images: Tensor, layers: Sequence[str], pooling: str = "max") -> dict[str, Tensor]:
    """{layer: (N, C, C)} Gram matrices over HW."""
    return {name: found.gram for name, found in moments_of(model, images, layers, pooling).items()}


def moments_of(model: LoadedModel, images: Tensor, layers: Sequence[str], pooling: str = "max") -> dict[str, Moments]:
    """{layer: Gram matrices over HW and means}."""
    import torch

    from harness.optimise import moments

    with torch.no_grad(), pooled(pooling, model.module):
        return {name: moments(found) for name, found in model.activations(images, list(layers)).items()}


class Style:
    """What pictures are to have at some layers, by one of the forms of the error."""

    def __init__(self, targets: Mapping[str, Moments], form: Form = "relative") -> None:
        from harness.optimise import covariances

        self.form: Form = form
        self.grams = {layer: found.gram for layer, found in targets.items()}
        self.covariances = covariances(targets) if form == "covariance" else {}

    def error(self, weights: Sequence[float] = (), only: str = "") -> Objective:
        """Of all layers, or of one."""
        from harness import optimise as o

        if self.form == "covariance":
            return o.covariance_error({n: found for n, found in self.covariances.items() if only in ("", n)}, weights)
        return o.style_error({n: found for n, found in self.grams.items() if only in ("", n)}, weights, self.form)


def features_of(model: LoadedModel, images: Tensor, layer: str, pooling: str = "max") -> Tensor:
    return maps_of(model, images, [layer], pooling)[layer]


def maps_of(model: LoadedModel, images: Tensor, layers: Sequence[str], pooling: str = "max") -> dict[str, Tensor]:
    """{layer: (N, C, H, W)} in single precision at least."""
    import torch

    from harness.device import at_least_single

    with torch.no_grad(), pooled(pooling, model.module):
        found: dict[str, Tensor] = model.activations(images, list(dict.fromkeys(layers)))
        return {name: at_least_single(maps) for name, maps in found.items()}


def descent(optimiser: Literal["lbfgs", "adam"]) -> Literal["adam"] | LBFGS:
    """The rule behind an optimiser's name: L-BFGS remembers three changes, as each is read several times a step, and errors hardly grow by
    that."""
    from harness.optimise import LBFGS

    return LBFGS(history=HISTORY) if optimiser == "lbfgs" else optimiser


def pooled(how: str, module: nn.Module) -> AbstractContextManager[object]:
    """A context in which max pooling of the module is what `how` says: 'max', or 'average'."""
    if how != "average":
        return nullcontext()
    from .pooling import averaged

    return averaged(module)


def style_layers(ctx: Context, names: Sequence[str], count: int = 5, deepest: float = 0.75, fine: bool = False) -> list[str]:
    """The layers named, or `count` spread over the first part of the network, down to the share `deepest` of its depth; `fine`: the first
    of them one that sees more of the grain, as a texture from noise needs."""
    if names:
        found = [ctx.model.full_name(n) for n in dict.fromkeys(names)]
    else:
        every = _layers(ctx.model)
        last = min(len(every) - 1, max(1, round(deepest * (len(every) - 1))))
        count = min(count, last + 1)
        found = [every[round(i * last / max(1, count - 1))] for i in range(count)]
        if fine:
            order = [name for name, _ in ctx.model.calls]
            found = sorted([_grain(ctx.model), *found[1:]], key=order.index)
    for name in found:
        ctx.model.maps_shape(name)
    return list(dict.fromkeys(found))


def sparse(ctx: Context, layers: Sequence[str]) -> list[str]:
    """Those with strides of eight and more; or else the last with a stride of four; or none. What is compared with all of the style there
    sees shapes and not only grain, and comparing costs little beside the network's passes."""
    positions = {name: math.prod(ctx.model.maps_shape(name)[1:]) for name in layers}
    eight, four = (math.ceil(ctx.model.input.size / stride) ** 2 for stride in (8, 4))
    return [name for name in layers if positions[name] <= eight] or [name for name in layers if positions[name] <= four][-1:]


def falling(count: int) -> tuple[float, ...]:
    """Weights of `count` layers that fall evenly from the first to the last, their sum 1."""
    total = count * (count + 1) / 2
    return tuple((count - i) / total for i in range(count))


def content_layer(ctx: Context, name: str) -> str:
    """The layer named, or one at a quarter of the depth: deeper ones lose windows and roofs."""
    if name:
        found = ctx.model.full_name(name)
    else:
        every = _layers(ctx.model)
        found = every[round(0.25 * (len(every) - 1))]
    ctx.model.maps_shape(found)
    return found


def _layers(model: LoadedModel) -> list[str]:
    """Of each block of convolutions a layer that sees all it gives and whose Gram matrix, C^2 HW multiplications in either direction,
    costs little beside its convolutions: of a Fire module the squeeze layer, which has an eighth of the channels of what it squeezes;
    elsewhere the pooling right behind the block, with a quarter of its positions (Gatys et al. 2015 take pool1 to pool4), or else the
    block."""
    from torch import nn
    from torchvision.models.squeezenet import Fire

    every = _blocks(model)
    calls = [name for name, _ in model.calls]

    def cheap(name: str) -> str:
        if isinstance(model.modules.get(name), Fire):
            return f"{name}.squeeze_activation"
        behind = calls[calls.index(name) + 1]
        return behind if isinstance(model.modules.get(behind), nn.MaxPool2d | nn.AvgPool2d) else name

    return [cheap(name) for name in every]


def _grain(model: LoadedModel) -> str:
    """Of SqueezeNet what the first Fire module sees in windows of 3 x 3, of which bricks and stones come back better than of its first
    convolution, at a fourth of the positions; elsewhere the first block itself, not the pooling behind it."""
    from torchvision.models.squeezenet import Fire

    first, *others = _blocks(model)
    return f"{others[0]}.expand3x3_activation" if others and isinstance(model.modules.get(others[0]), Fire) else first


def _blocks(model: LoadedModel) -> list[str]:
    from harness.errors import NotApplicable
    from harness_synthesis.blocks import blocks

    every = blocks(model)
    if not every:
        raise NotApplicable(f"needs layers with maps; {model.name!r} has none before its class scores")
    return every
