"""Gram matrices and what pictures lack of a style (Gatys et al. 2015, arXiv:1505.07376; 2016, CVPR)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

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


class Moments(NamedTuple):
    """What a layer's features are on average over positions."""

    gram: Tensor  # (N, C, C), over HW
    mean: Tensor  # (N, C)


def moments(features: Tensor) -> Moments:
    """Gram matrices over HW and means of features (N, C, H, W)."""
    return Moments(gram(features), at_least_single(features).mean((2, 3)))


class Covariance(NamedTuple):
    """What `covariance_error` measures a layer's features by."""

    gram: Tensor  # (N, C, C), over HW
    mean: Tensor  # (N, C)
    metric: Tensor  # (N, C, C), a power of the covariance
    size: Tensor  # (N,), tr(C V C V) of the covariance C and the metric V


def covariances(targets: Mapping[str, Moments], whitening: float = 0.5) -> dict[str, Covariance]:
    """C^-whitening as the metric of each layer, C = G - m m' being the style's covariance: with 0 all directions of the features count by
    their variance, with 1 rare ones as much as any, and an invertible linear map of the channels then changes nothing. Directions of less
    than `FAINTEST` of the strongest one's variance count as if they had that much. Of features that are not finite all is not."""
    found = {}
    for layer, (products, mean) in targets.items():
        with full_precision(products.device):
            covariance = products - mean[:, :, None] * mean[:, None]
            metric = _power(covariance, -whitening)
            size = (covariance * (metric @ covariance @ metric)).sum((1, 2)).clamp_min(1e-20)
        found[layer] = Covariance(products, mean, metric, size)
    return found


FAINTEST = 1e-3


def _power(covariances: Tensor, exponent: float) -> Tensor:
    """(N, C, C) powers of covariances scaled to a largest eigenvalue of 1."""
    found = covariances.cpu() if covariances.device.type == "mps" else covariances
    known = torch.isfinite(found).all(2).all(1)[:, None]
    unit = torch.eye(found.shape[1], device=found.device, dtype=found.dtype)
    values, vectors = torch.linalg.eigh(torch.where(known[:, None], found, unit))
    values = (values / values[:, -1:].clamp_min(torch.finfo(values.dtype).tiny)).clamp_min(FAINTEST) ** exponent
    values = torch.where(known, values, torch.full_like(values, torch.nan))
    return ((vectors * values[:, None]) @ vectors.mT).to(covariances.device)


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
    """(N,) sum_l w_l ||L_l||^2 of what matrices over the number of positions lack, L = G - A, A symmetric; or with means m of the style (1
    or N, C) and a symmetric metric V of each layer, w_l tr(L V L V) of the mean products about m: L = (G - A) - m d' - d m', d being the
    features' means less m. The slopes 4 w F L / HW or 4 w (F - m) V L V / HW take one product each; all layers are done at once, as many
    small operations cost more than the products of small layers."""

    @staticmethod
    def forward(
        ctx: Any, targets: Sequence[Tensor], means: Sequence[Tensor], metrics: Sequence[Tensor], factors: Tensor, *features: Tensor
    ) -> Tensor:
        rows = [_rows(f) for f in features]
        lacking = [torch.baddbmm(a, r.mT, r, beta=-1, alpha=1 / r.shape[1]) for a, r in zip(targets, rows, strict=True)]
        pulled = lacking
        if means:
            for r, mean, whole in zip(rows, means, lacking, strict=True):
                across = mean[:, :, None] * (r.mean(1) - mean)[:, None]
                whole.sub_(across).sub_(across.mT)
            pulled = [v @ d @ v for v, d in zip(metrics, lacking, strict=True)]
            squares = torch.stack([(d * p).sum((1, 2)) for d, p in zip(lacking, pulled, strict=True)])
        else:
            squares = torch.stack([torch.linalg.vector_norm(d, dim=(1, 2)) for d in lacking]).square_()
        ctx.save_for_backward(factors, *rows, *pulled)
        ctx.shapes, ctx.means = [f.shape for f in features], means
        return squares.mul_(factors).sum(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        factors, *saved = ctx.saved_tensors
        rows, pulled = saved[: len(ctx.shapes)], saved[len(ctx.shapes) :]
        with full_precision(gradient.device):
            scales = (4 * gradient * factors)[:, :, None, None].unbind(0)
            turns = [p * (scale / r.shape[1]) for r, p, scale in zip(rows, pulled, scales, strict=True)]
            if ctx.means:
                slopes = [torch.baddbmm(m[:, None] @ t, r, t, beta=-1) for m, r, t in zip(ctx.means, rows, turns, strict=True)]
            else:
                slopes = [r @ t for r, t in zip(rows, turns, strict=True)]
        return None, None, None, None, *map(_maps, slopes, ctx.shapes)


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
    sizes = [
        a.square().sum((1, 2)).clamp_min(1e-20) if form == "relative" else a.new_full((len(a),), 4.0 * a.shape[1] ** 2)
        for a in targets.values()
    ]
    return _lacking(list(targets), list(targets.values()), weights, sizes)


def covariance_error(targets: Mapping[str, Covariance], weights: Sequence[float] = ()) -> Objective:
    """sum_l w_l ||W_l (K_l - C_l) W_l||^2 / ||W_l C_l W_l||^2: K_l are the mean products of the layers' features about the *style's* means,
    C_l the style's covariances, W_l = C_l^(-whitening / 2). Subtract it.

    Zero where Gram matrices and means are the style's (a mean that is off can stand for variance that lacks), one of what has the style's
    means everywhere. Of a Gram matrix most is the products of the means, which say little of what shapes there are. With these products
    gone what varies together counts, and what does so rarely counts more by the whitening of `covariances`.

    targets {layer: what `covariances` gives for 1 or N pictures}; without weights each layer counts the same, and they sum to 1.
    """
    grams, means, metrics, sizes = (list(part) for part in zip(*targets.values(), strict=True))
    return _lacking(list(targets), grams, weights, sizes, means, metrics)


def _lacking(
    layers: Sequence[str],
    wanted: Sequence[Tensor],
    weights: Sequence[float],
    sizes: Sequence[Tensor],
    means: Sequence[Tensor] = (),
    metrics: Sequence[Tensor] = (),
) -> Objective:
    """The weighted errors of layers, of which each is divided by a size (1 or N,)."""
    if weights and len(weights) != len(layers):
        raise ValueError(f"{len(weights)} weights for {len(layers)} style layers")
    shares = [share / size for share, size in zip(weights or [1 / len(layers)] * len(layers), sizes, strict=True)]
    most = max(len(a) for a in wanted)
    factors = torch.stack([share.expand(most) for share in shares])  # (L, 1 or N)

    def score(outputs: dict[str, Tensor], x: Tensor) -> Tensor:
        features = (at_least_single(outputs[layer]) for layer in layers)
        found: Tensor = _StyleError.apply(wanted, means, metrics, factors, *features)
        return found

    return Objective(frozenset(layers), score)


def content_error(layer: str, features: Tensor, form: Form = "relative") -> Objective:
    """||F - P||^2 / ||P||^2 at a layer; absolute: half the squared distance (Gatys et al. 2016, eq. 1). Subtract it."""
    if form == "relative":
        return feature_error(layer, features)
    wanted = at_least_single(features)
    return Objective(frozenset({layer}), lambda outputs, _: half_square(outputs[layer] - wanted))
