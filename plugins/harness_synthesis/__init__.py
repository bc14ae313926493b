"""Images made by gradient ascent."""

from __future__ import annotations

from harness import Technique, hookimpl

from .channel_visualization import ChannelVisualization
from .class_visualization import ClassVisualization
from .deep_dream import DeepDream
from .deep_generator import DeepGenerator
from .feature_inversion import FeatureInversion
from .inversion_by_depth import InversionByDepth
from .multifaceted import Multifaceted

__all__ = [
    "ChannelVisualization",
    "ClassVisualization",
    "DeepDream",
    "DeepGenerator",
    "FeatureInversion",
    "InversionByDepth",
    "Multifaceted",
]


@hookimpl
def harness_techniques() -> list[type[Technique]]:
    return [ChannelVisualization, ClassVisualization, DeepDream, DeepGenerator, FeatureInversion, InversionByDepth, Multifaceted]
