"""What the learnt weights look like."""

from __future__ import annotations

from harness import Technique, hookimpl

from .first_layer_filters import FirstLayerFilters

__all__ = ["FirstLayerFilters"]


@hookimpl
def harness_techniques() -> list[type[Technique]]:
    return [FirstLayerFilters]
