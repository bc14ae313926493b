"""The one loop that makes images by ascending an objective; parts compose.

    objective        what rises: a score a picture; objectives add and scale
    parametrisation  what the picture is made of: pixels, Fourier coefficients, an untrained network's weights, a code
    transforms       what happens to the picture before the model sees it (jitter, scale, rotation), differentiable
    conditioners     what happens to the gradient before a step: ascent in other coordinates
    rule             how far to go along the gradient (normalised, momentum, Adam, L-BFGS, line search)
    operators        what happens to the variables after a step (decay, blur, clipping, denoising), in the order given

In a technique's `run`:

    from harness import optimise as o
    made = o.ascend(
        ctx.model, o.channel("features.6", 3) - 0.1 * o.total_variation(), ctx.images, steps=64, step_size=4 / 255,
        draws=ctx.draws(), transforms=[o.Jitter(share=0.05)], operators=[o.Clamp()], snapshots=5,
    )
    return Result([Images("made", made.images)])

A score that is not finite ends the work on that picture: its last good state is kept and said so.
"""

from .conditioners import NATURAL_COLOURS, ClipSmallGradients, Colours, Conditioner, LowFrequencies, NaturalColours
from .loop import Ascent, State, ascend, join, stepped
from .matching import Patches, Places, as_sharp_as, feature_places, match_error, nearest_places, pixel_patches, repainted, with_detail
from .objectives import (
    Objective,
    alpha_norm,
    channel,
    class_score,
    evaluate,
    feature_error,
    guide_match,
    layer_norm,
    positions,
    squared_norm,
    total_variation,
)
from .operators import Blur, Clamp, ClipSmallContribution, ClipSmallNorm, Decay, Denoise, Operator, Remembers, gaussian_blur
from .parametrisations import DeepPrior, Fourier, Parametrisation, Pixels
from .rules import LBFGS, Adam, Constant, LineSearch, MeanAbs, Momentum, Normalised, Progress, Rule, Scaled
from .style import Covariance, Moments, content_error, covariance_error, covariances, gram, moments, style_error
from .transforms import Crop, Focus, Jitter, Pad, Rotate, Scale, Transform

__all__ = [
    "LBFGS",
    "NATURAL_COLOURS",
    "Adam",
    "Ascent",
    "Blur",
    "Clamp",
    "ClipSmallContribution",
    "ClipSmallGradients",
    "ClipSmallNorm",
    "Colours",
    "Conditioner",
    "Constant",
    "Covariance",
    "Crop",
    "Decay",
    "DeepPrior",
    "Denoise",
    "Focus",
    "Fourier",
    "Jitter",
    "LineSearch",
    "LowFrequencies",
    "MeanAbs",
    "Moments",
    "Momentum",
    "NaturalColours",
    "Normalised",
    "Objective",
    "Operator",
    "Pad",
    "Parametrisation",
    "Patches",
    "Pixels",
    "Places",
    "Progress",
    "Remembers",
    "Rotate",
    "Rule",
    "Scale",
    "Scaled",
    "State",
    "Transform",
    "alpha_norm",
    "as_sharp_as",
    "ascend",
    "channel",
    "class_score",
    "content_error",
    "covariance_error",
    "covariances",
    "evaluate",
    "feature_error",
    "feature_places",
    "gaussian_blur",
    "gram",
    "guide_match",
    "join",
    "layer_norm",
    "match_error",
    "moments",
    "nearest_places",
    "pixel_patches",
    "positions",
    "repainted",
    "squared_norm",
    "stepped",
    "style_error",
    "total_variation",
    "with_detail",
]
