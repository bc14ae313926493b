"""What a picture is made of. The variables are one tensor with a row a picture; `images` turns them into pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..context import Draws
from .conditioners import NATURAL_COLOURS


class Parametrisation(Protocol):
    def images(self, variables: Tensor) -> Tensor:
        """(N, ...) -> pictures (N, C, H, W), differentiable."""


@dataclass(frozen=True)
class Pixels:
    """The pixels themselves."""

    def images(self, variables: Tensor) -> Tensor:
        return variables


@dataclass(frozen=True)
class Fourier:
    """Spectra of decorrelated colours, squashed into [0, 1] (Olah, Mordvintsev & Schubert 2017, "preconditioning").

    Variables (N, C, H, W // 2 + 1, 2), real and imaginary parts; each frequency f counts f^-power, and the three channels are
    mixed by the square root of natural pictures' colour covariance, so that a step of equal size everywhere in the variables
    changes pictures the way natural ones differ.
    """

    height: int
    width: int
    channels: int = 3
    power: float = 1.0
    colours: bool = True

    def start(self, draws: Draws, deviation: float = 0.01) -> Tensor:
        """Variables of faint noise about grey."""
        return deviation * draws.randn((self.channels, self.height, self.width // 2 + 1, 2))

    def images(self, variables: Tensor) -> Tensor:
        waves = torch.view_as_complex(variables.contiguous()) * self._scale(variables)
        x = torch.fft.irfft2(waves, s=(self.height, self.width), norm="ortho")
        if self.colours and self.channels == 3:
            x = torch.einsum("ij,njhw->nihw", _root(x.device, x.dtype, inverse=False), x)
        return torch.sigmoid(x)

    def variables(self, images: Tensor) -> Tensor:
        """The variables of given pictures (N, C, H, W), whose pixels are first drawn a thousandth into (0, 1)."""
        x = torch.logit(images.clamp(0.001, 0.999))
        if self.colours and self.channels == 3:
            x = torch.einsum("ij,njhw->nihw", _root(x.device, x.dtype, inverse=True), x)
        return torch.view_as_real(torch.fft.rfft2(x, norm="ortho") / self._scale(x))

    def _scale(self, like: Tensor) -> Tensor:
        return _spectrum_scale(self.height, self.width, self.power, like.device, like.dtype)


@lru_cache(maxsize=32)
def _spectrum_scale(height: int, width: int, power: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(H, W // 2 + 1): f^-power with f in cycles a pixel, the constant like the lowest; the largest is a quarter of the side."""
    fy = torch.fft.fftfreq(height, device=device, dtype=dtype)[:, None]
    fx = torch.fft.rfftfreq(width, device=device, dtype=dtype)[None, :]
    lowest = 1 / max(height, width)
    return ((fy.square() + fx.square()).sqrt().clamp_min(lowest) / lowest).pow(-power) * max(height, width) / 4


@lru_cache(maxsize=16)
def _root(device: torch.device, dtype: torch.dtype, inverse: bool) -> Tensor:
    """The symmetric square root of the colour covariance, or its inverse."""
    values, vectors = torch.linalg.eigh(torch.tensor(NATURAL_COLOURS, dtype=torch.float64))
    return ((vectors * values.sqrt().pow(-1 if inverse else 1)) @ vectors.T).to(device, dtype)


@dataclass(frozen=True)
class DeepPrior:
    """An untrained convolutional generator whose weights and input code are the variables (after Ulyanov et al. 2018,
    arXiv:1711.10925): its structure alone prefers smooth shapes to noise.

    A code (widths[0], H', W') is doubled in size by each block (nearest neighbours, convolution 3 x 3, instance norm, leaky
    ReLU) until it covers the picture, and a last convolution makes colours in [0, 1]. Every picture has a network of its own.
    """

    height: int
    width: int
    channels: int = 3
    widths: tuple[int, ...] = (64, 64, 48, 32, 16)

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the code, then of each block's kernel, at last those of the output's kernel and bias."""
        doublings = len(self.widths) - 1
        code = (self.widths[0], -(-self.height // 2**doublings), -(-self.width // 2**doublings))
        kernels = [(out, into, 3, 3) for into, out in zip(self.widths, self.widths[1:], strict=False)]
        return [code, *kernels, (self.channels, self.widths[-1], 1, 1), (self.channels,)]

    def start(self, draws: Draws) -> Tensor:
        """(N, number of weights and code values): a normal code, kernels of variance 2 / fan-in, no bias."""
        parts = []
        for place, shape in enumerate(self.shapes):
            scale = 1.0 if place == 0 else 0.0 if len(shape) == 1 else (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
            parts.append(scale * draws.randn(shape).flatten(1))
        return torch.cat(parts, 1)

    def images(self, variables: Tensor) -> Tensor:
        count = len(variables)
        code, *kernels, bias = self._split(variables)
        # Pictures lie side by side as groups of channels, so that one convolution serves all networks.
        x = code.flatten(0, 1)[None]
        for place, kernel in enumerate(kernels):
            last = place == len(kernels) - 1
            if not last:
                x = F.pad(F.interpolate(x, scale_factor=2.0, mode="nearest"), (1, 1, 1, 1), mode="replicate")
            x = F.conv2d(x, kernel.flatten(0, 1), bias.flatten() if last else None, groups=count)
            if not last:
                x = F.leaky_relu(F.instance_norm(x), 0.1)
        x = torch.sigmoid(x.view(count, self.channels, *x.shape[2:]))
        return x[..., : self.height, : self.width]

    def _split(self, variables: Tensor) -> Sequence[Tensor]:
        sizes = [int(torch.Size(s).numel()) for s in self.shapes]
        return [part.view(len(part), *shape) for part, shape in zip(torch.split(variables, sizes, 1), self.shapes, strict=True)]
