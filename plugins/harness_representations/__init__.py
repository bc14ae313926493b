"""What a model's answers and its last layer know of a dataset."""

from __future__ import annotations

from harness import Technique, hookimpl

from .features import Features
from .nearest_neighbors import NearestNeighbors
from .predictions import Predictions

__all__ = ["Features", "NearestNeighbors", "Predictions"]


@hookimpl
def harness_techniques() -> list[type[Technique]]:
    return [Features, NearestNeighbors, Predictions]
