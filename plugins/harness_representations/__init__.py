"""What a model's answers, its last layer and its activations know of a dataset."""

from __future__ import annotations

from harness import Technique, hookimpl

from .activation_maps import ActivationMaps
from .channel_probe import ChannelProbe
from .features import Features
from .max_patches import MaxPatches
from .nearest_neighbors import NearestNeighbors
from .predictions import Predictions
from .receptive_field import ReceptiveField

__all__ = ["ActivationMaps", "ChannelProbe", "Features", "MaxPatches", "NearestNeighbors", "Predictions", "ReceptiveField"]


@hookimpl
def harness_techniques() -> list[type[Technique]]:
    return [ActivationMaps, ChannelProbe, Features, MaxPatches, NearestNeighbors, Predictions, ReceptiveField]
