"""What happens to the gradient before a step.

With x = L z, a step along the gradient in z moves x along L L^T g: the parametrisations of Olah, Mordvintsev & Schubert 2017
(doi:10.23915/distill.00007, "preconditioning") become maps of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..device import at_least_single

Matrix = np.ndarray[Any, np.dtype[np.float32]]
NOTHING: Matrix = np.ones((1, 1), np.float32)


class Conditioner(Protocol):
    def __call__(self, gradient: Tensor) -> Tensor: ...


@runtime_checkable
class Mixes(Protocol):
    """A conditioner that can say what it does to a single pixel."""

    def colour_matrix(self, channels: int) -> Matrix | None:
        """(C, C) by which it multiplies each pixel's colours, (1, 1) if it changes nothing; None if it does more than that."""


@dataclass(frozen=True)
class Conditions:
    """One conditioner after the other. Pictures come back with their colours side by side."""

    parts: Sequence[Conditioner]

    def __call__(self, gradient: Tensor) -> Tensor:
        for part in self.parts:
            gradient = part(gradient)
        return gradient.contiguous(memory_format=form(gradient))

    def colour_matrix(self, channels: int) -> Matrix | None:
        whole = NOTHING
        for part in self.parts:
            own = part.colour_matrix(channels) if isinstance(part, Mixes) else None
            if own is None:
                return None
            whole = own * whole if 1 in (own.size, whole.size) else own @ whole
        return whole


def form(z: Tensor) -> torch.memory_format:
    """How variables lie in memory: of pictures each pixel's colours side by side, as the model takes them and gives gradients, so that
    steps run over memory in order."""
    return torch.channels_last if z.dim() == 4 else torch.contiguous_format


# Covariance of RGB over 500 ImageNet pictures, one a class, shrunk to 64 x 64; mean of the diagonal 1.
NATURAL_COLOURS = ((0.988, 0.874, 0.805), (0.874, 0.945, 0.905), (0.805, 0.905, 1.067))

PIXELS = 4


@dataclass(frozen=True)
class NaturalColours:
    """Steps follow the colours of natural pictures: g -> ((1 - share) I + share Sigma) g over the channels."""

    share: float

    def __call__(self, gradient: Tensor) -> Tensor:
        if self.share == 0 or gradient.shape[1] != 3:
            return gradient
        return _mixed(gradient, lambda pixels: _mixing(self.share, pixels, gradient.device, gradient.dtype))

    def colour_matrix(self, channels: int) -> Matrix | None:
        return NOTHING if self.share == 0 or channels != 3 else _mixing(self.share, 1, torch.device("cpu"), torch.float32).numpy()


@dataclass(frozen=True)
class Colours:
    """Steps follow colours with the covariance Sigma (C, C), which is scaled to a mean of 1 on its diagonal: g -> ((1 - share) I +
    share Sigma) g over the channels. With a share of 1 pictures stay in the space of colours that they begin in, if Sigma knows no other:
    grey ones grey. Without any colours nothing changes."""

    covariance: Tensor
    share: float = 1.0

    def __call__(self, gradient: Tensor) -> Tensor:
        matrix = self._matrix().to(gradient.device, gradient.dtype)
        return _mixed(gradient, lambda pixels: torch.kron(torch.eye(pixels, device=matrix.device, dtype=matrix.dtype), matrix))

    def colour_matrix(self, channels: int) -> Matrix | None:
        return self._matrix().float().cpu().numpy()

    def _matrix(self) -> Tensor:
        sigma = self.covariance.double() if self.covariance.device.type != "mps" else self.covariance
        unit = torch.eye(len(sigma), device=sigma.device, dtype=sigma.dtype)
        size = sigma.diagonal().mean()
        return torch.where(size > 0, self.share * sigma / size.clamp_min(1e-30) + (1 - self.share) * unit, unit)


def _mixed(gradient: Tensor, mixing: Callable[[int], Tensor]) -> Tensor:
    """The colours (N, C, H, W) of each pixel times the symmetric matrix that `mixing` gives for a number of pixels side by side."""
    n, c, height, width = gradient.shape
    values = gradient.permute(0, 2, 3, 1).reshape(n, -1)  # no copy of what lies channels last
    mixed = torch.empty_like(values)
    # Several pixels a row: products with matrices of three columns are slow. Picture by picture, as one that is lost is not a number.
    whole = values.shape[1] // (c * PIXELS) * c * PIXELS
    for picture, to in zip(values, mixed, strict=True):
        for part, pixels in ((slice(whole), PIXELS), (slice(whole, None), 1)):
            torch.mm(picture[part].view(-1, c * pixels), mixing(pixels), out=to[part].view(-1, c * pixels))
    return mixed.view(n, height, width, c).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class LowFrequencies:
    """Each spatial frequency f (cycles a pixel) of the gradient is scaled by f^-power; constant colour like the lowest."""

    power: float

    def __call__(self, gradient: Tensor) -> Tensor:
        if self.power == 0:
            return gradient
        height, width = gradient.shape[2:]
        gradient = gradient.contiguous()  # colour by colour, in which order transforms are quickest
        scale = _frequency_scale(self.power, height, width, gradient.device, gradient.dtype)
        return torch.fft.irfft2(torch.fft.rfft2(gradient).mul_(scale), s=(height, width))

    def colour_matrix(self, channels: int) -> Matrix | None:
        return NOTHING if self.power == 0 else None


# Constants are made once: a copy from the host to a device in every step would make the loop wait for it.


@lru_cache(maxsize=32)
def _mixing(share: float, pixels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(3 pixels, 3 pixels): (1 - share) I + share Sigma of each of some pixels, which lie one after the other."""
    sigma = torch.tensor(NATURAL_COLOURS, device=device, dtype=dtype)
    mixing = (1 - share) * torch.eye(3, device=device, dtype=dtype) + share * sigma
    return torch.kron(torch.eye(pixels, device=device, dtype=dtype), mixing)


@lru_cache(maxsize=32)
def _frequency_scale(power: float, height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(H, W // 2 + 1): f^-power, the constant colour like the lowest frequency."""
    fy = torch.fft.fftfreq(height, device=device, dtype=dtype)[:, None]
    fx = torch.fft.rfftfreq(width, device=device, dtype=dtype)[None, :]
    return (fy.square() + fx.square()).sqrt().clamp_min(1 / max(height, width)).pow(-power)


MOST = 2**24  # values of which torch tells a quantile


def quantile(values: Tensor, share: float) -> Tensor:
    """(N,) the quantile of all values of each (N, ...), in single precision at least; of very many of every n-th."""
    flat = values.flatten(1)
    return torch.quantile(at_least_single(flat[:, :: -(-flat.shape[1] // MOST)]), share, dim=1)


@dataclass(frozen=True)
class ClipSmallGradients:
    """Elements whose magnitude lies below the picture's percentile become zero: a step moves the others alone."""

    percentile: float

    def __call__(self, gradient: Tensor) -> Tensor:
        if self.percentile == 0:
            return gradient
        size = gradient.abs()
        threshold = quantile(size, self.percentile / 100).to(size.dtype).view(-1, *[1] * (gradient.dim() - 1))
        return torch.where(size >= threshold, gradient, torch.zeros_like(gradient))

    def colour_matrix(self, channels: int) -> Matrix | None:
        return NOTHING if self.percentile == 0 else None
