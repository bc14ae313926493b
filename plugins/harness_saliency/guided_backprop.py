from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from harness import Heatmaps, Images, NotApplicable, Paper, Param, Result, TargetSpec, Technique

from .measures import captions, concentration, zero_notes
from .saliency import TARGET, reduce_channels

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context
    from harness.targets import Target

CAVEATS = (
    "The picture hardly depends on what the network has learnt: with random weights in its last layers it looks much the same "
    "(Adebayo et al. 2018, arXiv:1810.03292), and it is nearly the same for every class (Nie et al. 2018, arXiv:1805.07039). "
    "It is sharp because it finds edges; it is no evidence of what decided."
)


class GuidedBackprop(Technique):
    """The gradient of the class score with every ReLU letting only positive gradients back, and only where it fired,
    R_l = (f_l > 0) (R_{l+1} > 0) R_{l+1} (Springenberg et al. 2015, arXiv:1412.6806).

    Every ReLU counts: modules, functions and tensor methods. Cost: one forward and one backward pass a picture.
    """

    name = "guided_backprop"
    family = "saliency"
    paper = Paper(
        "Springenberg, Dosovitskiy, Brox, Riedmiller", 2015, "Striving for Simplicity: The All Convolutional Net", arxiv="1412.6806"
    )
    needs = frozenset({"images"})
    attribution = "map"
    reading = (
        "The coloured picture shows the change of each pixel and colour that speaks for the class by way of positive evidence "
        "alone: outlines and textures of the parts that excite the network."
    )
    caveats = CAVEATS
    audit = {"full": {}}

    target: TargetSpec = Param("predicted", description=TARGET)
    values: Literal["absolute", "signed"] = Param("absolute", description="absolute: strength; signed: also its direction")
    channels: Literal["max", "sum"] = Param("max", description="how the colour channels of a pixel join: the strongest, or their sum")

    def run(self, ctx: Context) -> Result:
        return explain(ctx, "guided", self.values, self.channels)


def explain(ctx: Context, rule: Literal["guided", "deconvnet"], values: str, channels: str) -> Result:
    """Maps and coloured pictures of the gradient under a rule for ReLU."""
    gradient = rule_gradient(ctx, rule)
    maps = reduce_channels(gradient, values, channels)
    names = captions(ctx)
    artifacts: list[Any] = [
        Heatmaps(
            "map", maps, captions=names, signed=values == "signed", unit="change of score per unit of pixel value, positive evidence only"
        )
    ]
    if gradient.shape[1] in (1, 3):
        artifacts.append(
            Images(
                "colour",
                coloured(gradient),
                captions=names,
                columns=4,
                exact=gradient.shape[-1] < 64,
                caption="Grey is zero; each on its own scale, cut at the 99.5th percentile.",
            )
        )
    return Result(artifacts, [concentration(maps)], zero_notes(maps, ctx.ids))


def coloured(gradient: Tensor) -> Tensor:
    """Gradients (N, C, H, W) as pictures: grey is zero, each on its own scale."""
    # A few pixels stand far out: the scale ends where all but one in two hundred values are below.
    size = gradient.abs().flatten(1).float().quantile(0.995, dim=1).to(gradient.dtype).view(-1, 1, 1, 1)
    return (0.5 + gradient / (2 * size.clamp_min(1e-30))).clamp(0, 1)


def rule_gradient(ctx: Context, rule: Literal["guided", "deconvnet"], images: Tensor | None = None, target: Target | None = None) -> Tensor:
    """(N, C, H, W) gradient of each picture's target with every ReLU's backward pass replaced.

    Of the run's own pictures and target unless others are given. NotApplicable where the network has other nonlinearities, of
    which the rules say nothing, or no ReLU at all.
    """
    from harness.hooks import relu_backward

    with relu_backward(rule) as seen:
        gradient = ctx.input_gradient(images, target)
    if seen.others:
        raise NotApplicable(f"needs a network whose nonlinearities are ReLU; {ctx.model.name!r} uses {', '.join(sorted(seen.others))}")
    if not seen.count:
        raise NotApplicable(f"needs a network with ReLU; on the way to the target {ctx.model.name!r} has none")
    return gradient
