from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from harness import Heatmaps, Paper, Param, Result, TargetSpec, Technique

from .measures import captions, concentration, zero_notes

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context

TARGET = "what is explained: predicted, labelled, a class, layer:NAME, channel:NAME:C, neuron:NAME:C,Y,X"


class Saliency(Technique):
    """Gradient of the class score with respect to the pixels, M_ij = max_c |dS/dI_ijc| (Simonyan et al. 2013, arXiv:1312.6034, sec. 3.1).

    The score is the unnormalised logit. Cost: one forward and one backward pass a picture.
    """

    name = "saliency"
    family = "saliency"
    paper = Paper("Simonyan, Vedaldi, Zisserman", 2013, "Deep Inside Convolutional Networks", arxiv="1312.6034")
    needs = frozenset({"images"})
    attribution = "saliency"
    reading = (
        "Bright pixels are those where a small change moves the score most. Look for whether they gather on the object, "
        "on its outline, or somewhere else; single bright pixels mean little, patches of them do."
    )
    caveats = (
        "A gradient is local: it says how the score would react to a tiny change, not what the score is made of. Where the "
        "network has saturated, pixels that matter can look dark. Raw gradients are noisy."
    )
    audit = {"quick": {}, "standard": {}}

    target: TargetSpec = Param("predicted", description=TARGET)
    values: Literal["absolute", "signed"] = Param("absolute", description="absolute: strength of the reaction; signed: also its direction")
    channels: Literal["max", "sum"] = Param(
        "max", description="how the colour channels of a pixel join: max takes the strongest, sum adds them"
    )
    times_input: bool = Param(False, description="multiply the gradient by the pixel's value (gradient times input)")

    def run(self, ctx: Context) -> Result:
        gradient = ctx.input_gradient()  # (N, C, H, W)
        if self.times_input:
            gradient = gradient * ctx.images
        maps = reduce_channels(gradient, self.values, self.channels)
        unit = "score" if self.times_input else "change of score per unit of pixel value"
        found = Heatmaps("saliency", maps, captions=captions(ctx), signed=self.values == "signed", unit=unit)
        return Result([found], [concentration(maps)], zero_notes(maps, ctx.ids))


def reduce_channels(gradient: Tensor, values: str, channels: str) -> Tensor:
    """(N, C, H, W) -> (N, H, W). Signed 'max' keeps the sign of the channel that is strongest."""
    if values == "absolute":
        return gradient.abs().amax(1) if channels == "max" else gradient.abs().sum(1)
    if channels == "sum":
        return gradient.sum(1)
    strongest = gradient.abs().argmax(1, keepdim=True)
    return gradient.gather(1, strongest).squeeze(1)
