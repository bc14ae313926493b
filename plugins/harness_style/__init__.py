"""Texture and style: pictures made to match the statistics of other pictures."""

from __future__ import annotations

from harness import Technique, hookimpl

from .fast_style_transfer import FastStyleTransfer
from .gram_matrix import GramMatrix
from .multi_style_transfer import MultiStyleTransfer
from .neural_texture import NeuralTexture
from .style_transfer import StyleTransfer
from .super_resolution import SuperResolution
from .wei_levoy_texture import WeiLevoyTexture

__all__ = [
    "FastStyleTransfer",
    "GramMatrix",
    "MultiStyleTransfer",
    "NeuralTexture",
    "StyleTransfer",
    "SuperResolution",
    "WeiLevoyTexture",
]


@hookimpl
def harness_techniques() -> list[type[Technique]]:
    return [FastStyleTransfer, GramMatrix, MultiStyleTransfer, NeuralTexture, StyleTransfer, SuperResolution, WeiLevoyTexture]
