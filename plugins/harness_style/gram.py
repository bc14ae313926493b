"""Which layers say what style is, and what they say of a picture (Gatys et al. 2015, arXiv:1505.07376)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context
    from harness.models import LoadedModel


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


def pooled(how: str) -> AbstractContextManager[object]:
    """A context in which max pooling is what `how` says: 'max', or 'average'."""
    if how != "average":
        return nullcontext()
    from .pooling import AveragePooling

    return AveragePooling()


def style_layers(ctx: Context, names: Sequence[str], count: int = 5, deepest: float = 0.75) -> list[str]:
    """The layers named, or `count` blocks of convolutions over the first part of the network, down to the share `deepest` of its depth."""
    from harness.errors import NotApplicable
    from harness_synthesis.blocks import blocks

    if names:
        found = [ctx.model.full_name(n) for n in dict.fromkeys(names)]
    else:
        every = blocks(ctx.model)
        if not every:
            raise NotApplicable(f"needs layers with maps; {ctx.model.name!r} has none before its class scores")
        last = min(len(every) - 1, max(1, round(deepest * (len(every) - 1))))
        count = min(count, last + 1)
        found = [every[round(i * last / max(1, count - 1))] for i in range(count)]
    for name in found:
        ctx.model.maps_shape(name)
    return list(dict.fromkeys(found))
