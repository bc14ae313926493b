from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from harness import Paper, Param, Result, TargetSpec, Technique

from .guided_backprop import CAVEATS, explain
from .saliency import TARGET

if TYPE_CHECKING:
    from harness import Context


class Deconvnet(Technique):
    """The signal sent back through the network as by a deconvolutional one: every ReLU rectifies what comes back,
    R_l = (R_{l+1} > 0) R_{l+1}, whether or not it fired (Zeiler & Fergus 2014, arXiv:1311.2901).

    Max pooling sends back to where the maximum was, as Zeiler and Fergus's switches do. Cost: one forward and one backward
    pass a picture.
    """

    name = "deconvnet"
    family = "saliency"
    paper = Paper("Zeiler, Fergus", 2014, "Visualizing and Understanding Convolutional Networks", arxiv="1311.2901")
    needs = frozenset({"images"})
    attribution = "map"
    reading = (
        "As in guided backprop, but units that were silent send back as well: compare the two, which differ in the forward mask "
        "alone. Without it the picture is noisier for the deep layers of a network."
    )
    caveats = CAVEATS
    audit = {"full": {}}

    target: TargetSpec = Param("predicted", description=TARGET)
    values: Literal["absolute", "signed"] = Param("absolute", description="absolute: strength; signed: also its direction")
    channels: Literal["max", "sum"] = Param("max", description="how the colour channels of a pixel join: the strongest, or their sum")

    def run(self, ctx: Context) -> Result:
        return explain(ctx, "deconvnet", self.values, self.channels)
