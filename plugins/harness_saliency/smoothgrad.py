from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from harness import Heatmaps, Paper, Param, Result, TargetSpec, Technique

from .measures import captions, concentration, zero_notes
from .saliency import TARGET, reduce_channels

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context


class Smoothgrad(Technique):
    """The mean input gradient over noisy copies of the picture (Smilkov et al. 2017, arXiv:1706.03825).

    Noise is normal with a standard deviation given as a share of the picture's range of values. Cost: `samples` forward and
    backward passes a picture.
    """

    name = "smoothgrad"
    family = "saliency"
    paper = Paper("Smilkov, Thorat, Kim, Viegas, Wattenberg", 2017, "SmoothGrad: removing noise by adding noise", arxiv="1706.03825")
    needs = frozenset({"images"})
    attribution = "smoothgrad"
    reading = "As a saliency map, with less speckle: what stays bright moves the score in the whole neighbourhood of the picture."
    caveats = (
        "The noise is part of the answer: more of it smooths more, and looks at pictures the network was not trained on. Clean "
        "looks are not correctness."
    )
    audit = {"full": {}}
    draft = {"samples": 8}

    target: TargetSpec = Param("predicted", description=TARGET)
    samples: int = Param(25, ge=1, le=10_000, description="noisy copies averaged a picture")
    noise: float = Param(0.15, ge=0, le=2, description="standard deviation of the noise, as a share of the picture's value range")
    average: Literal["gradient", "square"] = Param(
        "gradient", description="what is averaged: the gradient, or its square (Hooker et al. 2019)"
    )
    values: Literal["absolute", "signed"] = Param("absolute", description="absolute: strength of the reaction; signed: also its direction")
    channels: Literal["max", "sum"] = Param("max", description="how the colour channels of a pixel join: the strongest, or their sum")

    def run(self, ctx: Context) -> Result:
        maps = reduce_channels(self.attribute(ctx), self.values, self.channels)
        found = Heatmaps(
            "smoothgrad", maps, captions=captions(ctx), signed=self.values == "signed", unit="change of score per unit of pixel value"
        )
        return Result([found], [concentration(maps)], zero_notes(maps, ctx.ids))

    def attribute(self, ctx: Context) -> Tensor:
        """(N, C, H, W) the averaged gradient."""
        x, target = ctx.images, ctx.target
        spread = self.noise * (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True))
        total: Any = 0
        for _ in ctx.track(range(self.samples), self.samples, "samples"):
            gradient = ctx.input_gradient(x + spread * ctx.randn_like(x), target)
            total = total + (gradient.square() if self.average == "square" else gradient)
        return total / self.samples
