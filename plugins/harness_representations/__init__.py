"""What a model's answers, its last layer and its activations know of a dataset."""

from __future__ import annotations

from harness import Technique, hookimpl

from .activation_maps import ActivationMaps
from .channel_probe import ChannelProbe
from .embedding_geometry import EmbeddingGeometry
from .features import Features
from .image_grid import ImageGrid
from .max_patches import MaxPatches
from .nearest_neighbors import NearestNeighbors
from .pca_map import PcaMap
from .predictions import Predictions
from .receptive_field import ReceptiveField
from .tsne_map import TsneMap

TECHNIQUES: list[type[Technique]] = [
    ActivationMaps,
    ChannelProbe,
    EmbeddingGeometry,
    Features,
    ImageGrid,
    MaxPatches,
    NearestNeighbors,
    PcaMap,
    Predictions,
    ReceptiveField,
    TsneMap,
]
__all__ = [cls.__name__ for cls in TECHNIQUES]


@hookimpl
def harness_techniques() -> list[type[Technique]]:
    return TECHNIQUES
