"""Which pixels matter: techniques that give each pixel of a picture a share in a model's answer."""

from __future__ import annotations

from harness import Technique, hookimpl

from .deconvnet import Deconvnet
from .grad_cam import GradCam
from .guided_backprop import GuidedBackprop
from .integrated_gradients import IntegratedGradients
from .occlusion import Occlusion
from .saliency import Saliency
from .smoothgrad import Smoothgrad

__all__ = ["Deconvnet", "GradCam", "GuidedBackprop", "IntegratedGradients", "Occlusion", "Saliency", "Smoothgrad"]


@hookimpl
def harness_techniques() -> list[type[Technique]]:
    return [Deconvnet, GradCam, GuidedBackprop, IntegratedGradients, Occlusion, Saliency, Smoothgrad]
