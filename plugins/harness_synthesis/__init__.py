"""Images made by gradient ascent."""

from __future__ import annotations

from harness import Technique, hookimpl

from .class_visualization import ClassVisualization

__all__ = ["ClassVisualization"]


@hookimpl
def harness_techniques() -> list[type[Technique]]:
    return [ClassVisualization]
