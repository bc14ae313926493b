"""What happens to the variables after a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .conditioners import quantile


class Operator(Protocol):
    def __call__(self, images: Tensor, gradient: Tensor, step: int) -> Tensor: ...


@runtime_checkable
class Remembers(Protocol):
    """An operator that goes on from its last step. The loop asks once for the operator that keeps its tensors, a row a picture, in
    `memory` under names that begin with `name`; they are part of the state that later work begins with."""

    def remembering(self, memory: dict[str, Tensor], name: str) -> Operator: ...


@dataclass(frozen=True)
class Decay:
    """centre + (1 - theta) (x - centre): L2 decay (Yosinski et al. 2015, sec. 3)."""

    theta: float
    centre: Tensor

    def __call__(self, images: Tensor, gradient: Tensor, step: int) -> Tensor:
        return images if self.theta == 0 else torch.lerp(images, self.centre, self.theta)


@dataclass(frozen=True)
class Blur:
    """Gaussian blur every `every` steps; sigma in pixels goes from `sigma` to `end` over `steps`."""

    sigma: float
    every: int = 1
    end: float | None = None
    steps: int = 1

    def __call__(self, images: Tensor, gradient: Tensor, step: int) -> Tensor:
        if self.every == 0 or (step + 1) % self.every:
            return images
        end = self.sigma if self.end is None else self.end
        return gaussian_blur(images, self.sigma + (end - self.sigma) * step / max(1, self.steps - 1))


@dataclass(frozen=True)
class ClipSmallNorm:
    """Pixels whose norm over the channels is below the percentile return to `centre` (Yosinski et al. 2015)."""

    percentile: float
    centre: Tensor

    def __call__(self, images: Tensor, gradient: Tensor, step: int) -> Tensor:
        if self.percentile == 0:
            return images
        return _keep(images, self.centre, (images - self.centre).square().sum(1, keepdim=True).sqrt(), self.percentile)


@dataclass(frozen=True)
class ClipSmallContribution:
    """Pixels whose |sum over channels of (x - centre) * gradient| is below the percentile return to `centre`."""

    percentile: float
    centre: Tensor

    def __call__(self, images: Tensor, gradient: Tensor, step: int) -> Tensor:
        if self.percentile == 0:
            return images
        benefit = ((images - self.centre) * gradient).sum(1, keepdim=True).abs()
        return _keep(images, self.centre, benefit, self.percentile)


@dataclass(frozen=True)
class Clamp:
    """Keep every value between `low` and `high`, by default pixels in [0, 1]; tensors bound each value for itself."""

    low: Tensor | float = 0.0
    high: Tensor | float = 1.0

    def __call__(self, images: Tensor, gradient: Tensor, step: int) -> Tensor:
        if isinstance(self.low, Tensor) or isinstance(self.high, Tensor):
            return images.clamp(min=self.low).clamp(max=self.high)
        return images.clamp(self.low, self.high)


@dataclass(frozen=True)
class Denoise:
    """The picture u that minimises TV(u) + 1/(2 weight) ||u - x||^2, TV = sum sqrt(dx^2 + dy^2) of each colour (Rudin, Osher &
    Fatemi 1992), by Chambolle's projection (2004). `weight(step)` is in pixels of [0, 1]; 0 changes nothing.

    In the loop the first step makes `first` iterations and every later one `iterations`, which begin at the dual variables of the
    step before: a step of ascent moves a picture little, and these little. Outside of a loop every call is a first step.
    """

    weight: Callable[[int], float]
    iterations: int = 2
    first: int = 20

    def __call__(self, images: Tensor, gradient: Tensor, step: int) -> Tensor:
        weight = self.weight(step)
        return images if weight == 0 else total_variation_denoised(images, weight, self.first)

    def remembering(self, memory: dict[str, Tensor], name: str) -> Operator:
        names = f"{name}.dual_x", f"{name}.dual_y"

        def follow(images: Tensor, gradient: Tensor, step: int) -> Tensor:
            weight = self.weight(step)
            if weight == 0:
                return images
            fresh = names[0] not in memory
            if fresh:
                memory.update({n: torch.zeros_like(images) for n in names})
            dual = memory[names[0]], memory[names[1]]
            return total_variation_denoised(images, weight, self.first if fresh else self.iterations, dual)

        return follow


def _keep(images: Tensor, centre: Tensor, value: Tensor, percentile: float) -> Tensor:
    """`images` where value (N, 1, H, W) reaches its picture's percentile, `centre` elsewhere."""
    threshold = quantile(value, percentile / 100).to(value.dtype).view(-1, 1, 1, 1)
    return torch.where(value >= threshold, images, centre)


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian over (H, W), cut at 4 sigma, edges repeated; as scipy's gaussian_filter(mode='nearest')."""
    if sigma <= 0:
        return images
    half = [math.exp(-0.5 * (place / sigma) ** 2) for place in range(int(4 * sigma + 0.5) + 1)]
    weights = [value / (2 * sum(half) - half[0]) for value in half]
    for dim in (2, 3):
        # Shifted pictures are added up: kernels are mostly narrow, and a convolution of single channels is slow on a CPU.
        side = images.shape[dim]
        first, last, blurred = images.narrow(dim, 0, 1), images.narrow(dim, side - 1, 1), images * weights[0]
        for place, weight in enumerate(weights[1:], 1):
            beyond = min(place, side)
            kept = side - beyond
            blurred.narrow(dim, beyond, kept).add_(images.narrow(dim, 0, kept), alpha=weight)
            blurred.narrow(dim, 0, beyond).add_(first, alpha=weight)
            blurred.narrow(dim, 0, kept).add_(images.narrow(dim, beyond, kept), alpha=weight)
            blurred.narrow(dim, kept, beyond).add_(last, alpha=weight)
        images = blurred
    return images


def total_variation_denoised(images: Tensor, weight: float, iterations: int = 20, dual: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """argmin_u TV(u) + 1/(2 weight) ||u - x||^2 by Chambolle's projection (J. Math. Imaging Vis. 20, 2004, sec. 3), step 1/4.

    `dual`, a pair shaped like the pictures, is where the iterations begin (without it at zero) and is overwritten by where they end.
    """
    px, py = (torch.zeros_like(images), torch.zeros_like(images)) if dual is None else dual
    dx, dy = torch.zeros_like(images), torch.zeros_like(images)  # the last column and row stay 0: no difference across the edge
    rate = 0.25 / weight
    for _ in range(iterations):
        u = _divergence(px, py).mul_(weight).add_(images)
        torch.sub(u[..., 1:], u[..., :-1], out=dx[..., :-1])
        torch.sub(u[..., 1:, :], u[..., :-1, :], out=dy[..., :-1, :])
        scale = torch.hypot(dx, dy).mul_(rate).add_(1)
        px.add_(dx, alpha=rate).div_(scale)
        py.add_(dy, alpha=rate).div_(scale)
    return _divergence(px, py).mul_(weight).add_(images)


def _divergence(px: Tensor, py: Tensor) -> Tensor:
    """Minus the adjoint of the forward differences."""
    found = px + py
    found[..., 1:] -= px[..., :-1]
    found[..., 1:, :] -= py[..., :-1, :]
    return found
