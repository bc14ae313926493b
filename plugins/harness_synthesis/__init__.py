"""Images made by gradient ascent."""

from __future__ import annotations

from harness import Technique, hookimpl

from .class_visualization import ClassVisualization
from .deep_dream import DeepDream

__all__ = ["ClassVisualization", "DeepDream"]


@hookimpl
def harness_techniques() -> list[type[Technique]]:
    return [ClassVisualization, DeepDream]
