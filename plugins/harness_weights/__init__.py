"""What the learnt weights look like."""

from __future__ import annotations

from harness import Technique, hookimpl

from .first_layer_filters import FirstLayerFilters
from .layer_filters import LayerFilters
from .linear_templates import LinearTemplates

__all__ = ["FirstLayerFilters", "LayerFilters", "LinearTemplates"]


@hookimpl
def harness_techniques() -> list[type[Technique]]:
    return [FirstLayerFilters, LayerFilters, LinearTemplates]
