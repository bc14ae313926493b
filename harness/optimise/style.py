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
        rows = _rows(features)
        ctx.save_for_backward(rows)
        ctx.shape, ctx.factor = features.shape, factor
        return (rows.transpose(1, 2) @ rows).mul_(factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        with full_precision(gradient.device):
            slope = rows @ (gradient + gradient.transpose(1, 2)).mul_(ctx.factor)
        return _maps(slope, ctx.shape), None


class _StyleError(torch.autograd.Function):
    """(N,) sum_l w_l ||G_l - A_l||^2 of matrices over the number of positions, A symmetric. The slopes 4 w F (G - A) / HW take one product
    each; all layers are done at once, as many small operations cost more than the products of small layers."""

    @staticmethod
    def forward(ctx: Any, targets: Sequence[Tensor], factors: Tensor, *features: Tensor) -> Tensor:
        rows = [_rows(f) for f in features]
        lacking = [torch.baddbmm(a, r.mT, r, beta=-1, alpha=1 / r.shape[1]) for a, r in zip(targets, rows, strict=True)]
        ctx.save_for_backward(factors, *rows, *lacking)
        ctx.shapes = [f.shape for f in features]
        return torch.stack([torch.linalg.vector_norm(d, dim=(1, 2)) for d in lacking]).square_().mul_(factors).sum(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        factors, *saved = ctx.saved_tensors
        rows, lacking = saved[: len(ctx.shapes)], saved[len(ctx.shapes) :]
        with full_precision(gradient.device):
            scales = (4 * gradient * factors)[:, :, None, None].unbind(0)
            slopes = [
                _maps(r @ (d * (scale / r.shape[1])), shape) for r, d, scale, shape in zip(rows, lacking, scales, ctx.shapes, strict=True)
            ]
        return None, None, *slopes


def _rows(features: Tensor) -> Tensor:
    """(N, HW, C) of maps (N, C, H, W), no copy of what lies channels last."""
    n, c, height, width = features.shape
    return features.permute(0, 2, 3, 1).reshape(n, height * width, c)


def _maps(rows: Tensor, shape: torch.Size) -> Tensor:
    n, c, height, width = shape
    return rows.view(n, height, width, c).permute(0, 3, 1, 2)


def style_error(targets: Mapping[str, Tensor], weights: Sequence[float] = (), form: Form = "relative") -> Objective:
    """sum_l w_l ||G_l - A_l||^2 / ||A_l||^2 of the layers' Gram matrices over HW; absolute: sum_l w_l ||G_l - A_l||^2 / (4 C^2), Gatys et
    al. 2015, eq. 2 with both matrices over their own number of positions. Subtract it.

    targets {layer: (1 or N, C, C)}; without weights each layer counts the same, and they sum to 1.
    """
    if weights and len(weights) != len(targets):
        raise ValueError(f"{len(weights)} weights for {len(targets)} style layers")
    wanted = list(targets.values())
    shares = [
        share / (a.square().sum((1, 2)).clamp_min(1e-20) if form == "relative" else a.new_full((len(a),), 4.0 * a.shape[1] ** 2))
        for a, share in zip(wanted, weights or [1 / len(wanted)] * len(wanted), strict=True)
    ]
    most = max(len(a) for a in wanted)
    factors = torch.stack([share.expand(most) for share in shares])  # (L, 1 or N)

    def score(outputs: dict[str, Tensor], x: Tensor) -> Tensor:
        found: Tensor = _StyleError.apply(wanted, factors, *(at_least_single(outputs[layer]) for layer in targets))
        return found

    return Objective(frozenset(targets), score)


def content_error(layer: str, features: Tensor, form: Form = "relative") -> Objective:
    """||F - P||^2 / ||P||^2 at a layer; absolute: half the squared distance (Gatys et al. 2016, eq. 1). Subtract it."""
    if form == "relative":
        return feature_error(layer, features)
    wanted = at_least_single(features)
    return Objective(frozenset({layer}), lambda outputs, _: half_square(outputs[layer] - wanted))
