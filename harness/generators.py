"""Generators: networks that turn codes, what a layer of some encoder gives, back into pictures (Dosovitskiy & Brox 2016)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .builders import build_module

if TYPE_CHECKING:
    from .registry import GeneratorEntry, Registry


class UpconvGenerator(nn.Module):
    """Codes (N, *code) -> pictures (N, channels, size, size) in [0, 1], by a linear map (of vectors) or a convolution (of maps),
    then doublings of size, each with a convolution 3 x 3, after Dosovitskiy & Brox 2016, arXiv:1602.02644.

    `low` and `high` hold the range of each unit of the code over the pictures it was trained on, of maps that of each channel.
    """

    low: Tensor
    high: Tensor

    def __init__(self, code: Sequence[int], channels: int = 3, size: int = 224, width: int = 64) -> None:
        super().__init__()
        if len(code) not in (1, 3):
            raise ValueError(f"a code is a vector (D) or maps (C, H, W), not {list(code)}")
        self.code, self.size = tuple(code), size
        start = code[1] if len(code) == 3 else first_side(size)
        doublings = max(1, math.ceil(math.log2(size / start)))
        widths = [max(16, int(width * 2 ** min(2, doublings - k - 1))) for k in range(doublings + 1)]
        self.start = start
        self.read: nn.Module
        if len(code) == 1:
            self.read = nn.Sequential(nn.Linear(code[0], widths[0] * start * start), nn.Unflatten(1, (widths[0], start, start)))
        else:
            self.read = nn.Conv2d(code[0], widths[0], 3, padding=1)
        blocks: list[nn.Module] = []
        for into, out in pairwise(widths):
            blocks += [nn.LeakyReLU(0.2), nn.Upsample(scale_factor=2), nn.Conv2d(into, out, 3, padding=1)]
        self.grow = nn.Sequential(*blocks, nn.LeakyReLU(0.2), nn.Conv2d(widths[-1], channels, 3, padding=1))
        units = (code[0],) if len(code) == 1 else (code[0], 1, 1)
        self.register_buffer("low", torch.zeros(units))
        self.register_buffer("high", torch.ones(units))

    def forward(self, code: Tensor) -> Tensor:
        x = self.grow(self.read(code / self.high.mean().clamp_min(1e-6)))
        if x.shape[-1] != self.size:
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False)
        return torch.sigmoid(x)


def first_side(size: int) -> int:
    """The side of the first maps, from which doublings lead to `size` or just beyond."""
    side = size
    while side > 7:
        side = -(-side // 2)
    return side


class LoadedGenerator:
    """A generator ready for use: frozen, with the range of codes it knows."""

    def __init__(self, module: nn.Module, entry: GeneratorEntry, name: str, device: str | torch.device) -> None:
        self.name, self.encoder, self.layer = name, entry.encoder, entry.layer
        self.device = torch.device(device)
        self.module = module.eval().requires_grad_(False).to(self.device)
        self.code = tuple(entry.args["code"])
        with torch.no_grad():
            self.channels: int = self.module(torch.zeros((1, *self.code), device=self.device)).shape[1]

    @property
    def low(self) -> Tensor:
        """Least value of each unit of a code, in a shape that fits codes (N, *code)."""
        return self.module.get_buffer("low")

    @property
    def high(self) -> Tensor:
        """Largest value of each unit."""
        return self.module.get_buffer("high")

    def __call__(self, codes: Tensor) -> Tensor:
        """Pictures (N, C, H, W) in [0, 1] of codes (N, *code)."""
        made: Tensor = self.module(codes)
        return made


def load_generator(name: str, registry: Registry, device: str | torch.device = "cpu") -> LoadedGenerator:
    """The generator of a registry name on a device."""
    entry = registry.generator(name)
    return LoadedGenerator(build_module(name, entry), entry, name, device)
