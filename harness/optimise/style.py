"""Gram matrices and what pictures lack of a style (Gatys et al. 2015, arXiv:1505.07376; 2016, CVPR)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..device import at_least_single, full_precision
from .objectives import Objective, feature_error, half_square

Divisor = Literal["hw", "chw", "none"]
Form = Literal["relative", "absolute"]


def gram(features: Tensor, divisor: Divisor = "hw") -> Tensor:
    """G = F F^T / divisor (N, C, C) of features (N, C, H, W): sums over positions of products of channels."""
    _, c, height, width = features.shape
    with full_precision(features.device):
        found: Tensor = _Gram.apply(at_least_single(features), 1 / {"hw": height * width, "chw": c * height * width, "none": 1}[divisor])
    return found


class _Gram(torch.autograd.Function):
    """F^T F of positions by channels, whose slope F (g + g^T) is one product, where that of two factors would be two."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, factor: float) -> Tensor:
        n, c, height, width = features.shape
        rows = features.permute(0, 2, 3, 1).reshape(n, height * width, c)  # no copy of what lies channels last
        ctx.save_for_backward(rows)
        ctx.shape, ctx.factor = features.shape, factor
        return (rows.transpose(1, 2) @ rows).mul_(factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        n, c, height, width = ctx.shape
        with full_precision(gradient.device):
            slope = rows @ (gradient + gradient.transpose(1, 2)).mul_(ctx.factor)
        return slope.view(n, height, width, c).permute(0, 3, 1, 2), None


def style_error(targets: Mapping[str, Tensor], weights: Sequence[float] = (), form: Form = "relative") -> Objective:
    """sum_l w_l ||G_l - A_l||^2 / ||A_l||^2 of the layers' Gram matrices over HW; absolute: sum_l w_l ||G_l - A_l||^2 / (4 C^2), Gatys et
    al. 2015, eq. 2 with both matrices over their own number of positions. Subtract it.

    targets {layer: (1 or N, C, C)}; without weights each layer counts the same, and they sum to 1.
    """
    if weights and len(weights) != len(targets):
        raise ValueError(f"{len(weights)} weights for {len(targets)} style layers")
    factors = {
        layer: share
        / (
            target.square().sum((1, 2)).clamp_min(1e-20)
            if form == "relative"
            else torch.full_like(target[:, 0, 0], 4.0 * target.shape[1] ** 2)
        )
        for (layer, target), share in zip(targets.items(), weights or [1 / len(targets)] * len(targets), strict=True)
    }

    def score(outputs: dict[str, Tensor], x: Tensor) -> Tensor:
        total = x.new_zeros(len(x))
        for layer, target in targets.items():
            total = total + factors[layer] * (gram(outputs[layer]) - target).square().sum((1, 2))
        return total

    return Objective(frozenset(targets), score)


def content_error(layer: str, features: Tensor, form: Form = "relative") -> Objective:
    """||F - P||^2 / ||P||^2 at a layer; absolute: half the squared distance (Gatys et al. 2016, eq. 1). Subtract it."""
    if form == "relative":
        return feature_error(layer, features)
    wanted = at_least_single(features)
    return Objective(frozenset({layer}), lambda outputs, _: half_square(outputs[layer] - wanted))
