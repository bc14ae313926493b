"""What happens to pictures before the model sees them. Sizes may be shares of the picture, so that small ones work as well."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..context import Draws


class Transform(Protocol):
    def __call__(self, images: Tensor, draws: Draws) -> Tensor: ...


@dataclass(frozen=True)
class Jitter:
    """Roll each picture by up to `pixels`, or `share` of its shorter side, in both directions; the gradient rolls back by itself."""

    pixels: int = 0
    share: float = 0.0

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        far = self.pixels or round(self.share * min(images.shape[2:]))
        if far == 0:
            return images
        rolled: Tensor = _Roll.apply(images, draws.integers(-far, far + 1, 2))
        return rolled


class _Roll(torch.autograd.Function):
    """Each picture rolled by its own shift (dy, dx); the gradient is rolled back. One pass over memory either way."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, shifts: list[list[int]]) -> Tensor:
        ctx.shifts = shifts
        return rolled(images, shifts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return rolled(gradient, [[-dy, -dx] for dy, dx in ctx.shifts]), None


def rolled(images: Tensor, shifts: list[list[int]]) -> Tensor:
    """Pictures (N, C, H, W), the i-th moved by shifts[i] = (dy, dx); what leaves on one side comes in on the other."""
    out = torch.empty_like(images)
    height, width = images.shape[2:]
    for new, old, (dy, dx) in zip(out, images, shifts, strict=True):
        dy, dx = dy % height, dx % width
        for to, of in ((slice(dy, None), slice(None, height - dy)), (slice(None, dy), slice(height - dy, None))):
            new[:, to, dx:] = old[:, of, : width - dx]
            new[:, to, :dx] = old[:, of, width - dx :]
    return out


@dataclass(frozen=True)
class Pad:
    """A border of `share` of the shorter side on each edge, in the colour `value` or, without one, mirrored."""

    share: float
    value: float | None = None

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        width = round(self.share * min(images.shape[2:]))
        if width == 0:
            return images
        edges = (width,) * 4
        return F.pad(images, edges, mode="reflect") if self.value is None else F.pad(images, edges, value=self.value)


@dataclass(frozen=True)
class Scale:
    """Each picture enlarged about its middle by a factor between `low` and `high`; its size stays, the edge is mirrored."""

    low: float
    high: float

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        factor = self.low + (self.high - self.low) * draws.rand(()).to(images.dtype)
        return warp(images, torch.zeros_like(factor), factor)


@dataclass(frozen=True)
class Rotate:
    """Each picture turned about its middle by up to `degrees` either way; the edge is mirrored."""

    degrees: float

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        angle = math.radians(self.degrees) * (2 * draws.rand(()).to(images.dtype) - 1)
        return warp(images, angle, torch.ones_like(angle))


def warp(images: Tensor, angle: Tensor, factor: Tensor) -> Tensor:
    """Pictures (N, C, H, W) turned by `angle` (N,) in radians, anticlockwise, and enlarged by `factor` (N,), bilinearly."""
    height, width = images.shape[2:]
    cos, sin, zero = angle.cos() / factor, angle.sin() / factor, torch.zeros_like(angle)
    # Coordinates run from -1 to 1 along either side: in pixels the turn must be one of a rectangle.
    rows = [torch.stack([cos, -sin * (height / width), zero], 1), torch.stack([sin * (width / height), cos, zero], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


@dataclass(frozen=True)
class Crop:
    """A window of `size` x `size` out of each picture, its corner drawn normally about the middle, `spread` times the free room
    in standard deviation, and kept inside."""

    size: int
    spread: float = 0.3

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        room = [max(0, n - self.size) for n in images.shape[2:]]
        if max(room) == 0:
            return images
        # Places are needed as numbers on the host: drawn there, so that no device is waited for.
        corners = []
        for pair in draws.normals(2):
            middle = [min(max(int(r / 2 + r * self.spread * z), 0), r) for r, z in zip(room, pair, strict=True)]
            corners.append(middle)
        return torch.stack([x[:, dy : dy + self.size, dx : dx + self.size] for x, (dy, dx) in zip(images, corners, strict=True)])


@dataclass(frozen=True)
class Focus:
    """The picture as it is, but gradients reach its middle alone: not the `margin` (share of the shorter side) along each edge."""

    margin: float

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        edge = round(self.margin * min(images.shape[2:]))
        if edge == 0:
            return images
        inner = images[..., edge:-edge, edge:-edge]
        found = images.detach().clone()
        found[..., edge:-edge, edge:-edge] = inner
        return found
