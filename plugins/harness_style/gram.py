"""Which layers say what style is, and what they say of a picture (Gatys et al. 2015, arXiv:1505.07376)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context
    from harness.models import LoadedModel
    from harness.optimise import LBFGS

HISTORY = 4


def targets_of(model: LoadedModel, images: Tensor, layers: Sequence[str], pooling: str = "max") -> dict[str, Tensor]:
    """{layer: (N, C, C)} Gram matrices over HW."""
    import torch

    from harness.optimise import gram

    with torch.no_grad(), pooled(pooling):
        return {name: gram(found) for name, found in model.activations(images, list(layers)).items()}


def features_of(model: LoadedModel, images: Tensor, layer: str, pooling: str = "max") -> Tensor:
    import torch

    from harness.device import at_least_single

    with torch.no_grad(), pooled(pooling):
        found: Tensor = model.activations(images, [layer])[layer]
        return at_least_single(found)


def descent(optimiser: Literal["lbfgs", "adam"]) -> Literal["adam"] | LBFGS:
    """The rule behind an optimiser's name, for style transfer: L-BFGS remembers four changes, as each is read several times a step. Its
    errors hardly grow by that; those of textures, which come close to none, would."""
    from harness.optimise import LBFGS

    return LBFGS(history=HISTORY) if optimiser == "lbfgs" else optimiser


def pooled(how: str) -> AbstractContextManager[object]:
    """A context in which max pooling is what `how` says: 'max', or 'average'."""
    if how != "average":
        return nullcontext()
    from .pooling import AveragePooling

    return AveragePooling()


def style_layers(ctx: Context, names: Sequence[str], count: int = 5, deepest: float = 0.75, cheap: bool = False) -> list[str]:
    """The layers named, or `count` blocks of convolutions spread over the first part of the network, down to the share `deepest` of its
    depth; `cheap`: of these the layers whose Gram matrices cost little."""
    if names:
        found = [ctx.model.full_name(n) for n in dict.fromkeys(names)]
    else:
        every = _layers(ctx.model, cheap)
        last = min(len(every) - 1, max(1, round(deepest * (len(every) - 1))))
        count = min(count, last + 1)
        found = [every[round(i * last / max(1, count - 1))] for i in range(count)]
    for name in found:
        ctx.model.maps_shape(name)
    return list(dict.fromkeys(found))


def content_layer(ctx: Context, name: str) -> str:
    """The layer named, or one at two fifths of the depth."""
    if name:
        found = ctx.model.full_name(name)
    else:
        every = _layers(ctx.model, cheap=True)
        found = every[round(0.4 * (len(every) - 1))]
    ctx.model.maps_shape(found)
    return found


def _layers(model: LoadedModel, cheap: bool) -> list[str]:
    """Blocks of convolutions; or layers that see all that a block gives, and whose Gram matrices, C^2 HW multiplications in either
    direction, cost little beside its convolutions: of SqueezeNet the squeeze layers, an eighth of the channels of what they squeeze;
    elsewhere the blocks, or the pooling right behind one, with a quarter of its positions (Gatys et al. 2015 take pool1 to pool4)."""
    from torch import nn
    from torchvision.models.squeezenet import Fire

    from harness.errors import NotApplicable
    from harness_synthesis.blocks import blocks

    every = blocks(model)
    if not every:
        raise NotApplicable(f"needs layers with maps; {model.name!r} has none before its class scores")
    if not cheap:
        return every
    fires = [name for name in every if isinstance(model.modules.get(name), Fire)]
    if fires:
        return [f"{name}.squeeze_activation" for name in fires]
    calls = [name for name, _ in model.calls]
    behind = [calls[calls.index(name) + 1] for name in every]
    return [b if isinstance(model.modules.get(b), nn.MaxPool2d | nn.AvgPool2d) else name for b, name in zip(behind, every, strict=True)]
