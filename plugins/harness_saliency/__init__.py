"""Which pixels matter: techniques that give each pixel of a picture a share in a model's answer."""

from __future__ import annotations

from harness import Technique, hookimpl

from .deconvnet import Deconvnet
from .guided_backprop import GuidedBackprop
from .occlusion import Occlusion
from .saliency import Saliency

__all__ = ["Deconvnet", "GuidedBackprop", "Occlusion", "Saliency"]


@hookimpl
def harness_techniques() -> list[type[Technique]]:
    return [Deconvnet, GuidedBackprop, Occlusion, Saliency]
