"""Which pixels matter: techniques that give each pixel of a picture a share in a model's answer."""

from __future__ import annotations

from harness import Technique, hookimpl

from .bias_probe import BiasProbe
from .deconvnet import Deconvnet
from .expected_gradients import ExpectedGradients
from .faithfulness import Faithfulness
from .grabcut_segmentation import GrabcutSegmentation
from .grad_cam import GradCam
from .guided_backprop import GuidedBackprop
from .guided_patches import GuidedPatches
from .integrated_gradients import IntegratedGradients
from .lime import Lime
from .occlusion import Occlusion
from .rise import Rise
from .saliency import Saliency
from .saliency_comparison import SaliencyComparison
from .sanity_checks import SanityChecks
from .smoothgrad import Smoothgrad

_ALL: list[type[Technique]] = [
    BiasProbe, Deconvnet, ExpectedGradients, Faithfulness, GrabcutSegmentation, GradCam, GuidedBackprop, GuidedPatches,
    IntegratedGradients, Lime, Occlusion, Rise, Saliency, SaliencyComparison, SanityChecks, Smoothgrad,
]  # fmt: skip

__all__ = [
    "BiasProbe", "Deconvnet", "ExpectedGradients", "Faithfulness", "GrabcutSegmentation", "GradCam", "GuidedBackprop", "GuidedPatches",
    "IntegratedGradients", "Lime", "Occlusion", "Rise", "Saliency", "SaliencyComparison", "SanityChecks", "Smoothgrad",
]  # fmt: skip


@hookimpl
def harness_techniques() -> list[type[Technique]]:
    return _ALL
