from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness import Heatmaps, Metric, Paper, Param, Result, TargetSpec, Technique

from .measures import captions, completeness, concentration, zero_notes
from .saliency import TARGET, reduce_channels

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context

Baseline = Literal["black", "grey", "white", "mean", "blur"]


class IntegratedGradients(Technique):
    """What each pixel adds to the score on the straight way from a baseline to the picture,
    (x_i - b_i) times the mean over the way of dS/dx_i (Sundararajan et al. 2017, arXiv:1703.01365, eq. 1).

    The shares add up to S(x) - S(b); how nearly they do is reported. Cost: `steps` forward and backward passes a picture.
    """

    name = "integrated_gradients"
    family = "saliency"
    paper = Paper("Sundararajan, Taly, Yan", 2017, "Axiomatic Attribution for Deep Networks", arxiv="1703.01365")
    needs = frozenset({"images"})
    attribution = "integrated_gradients"
    reading = (
        "Bright pixels carry much of the difference between the picture's score and the baseline's (with values signed: red for, "
        "blue against). The completeness error says how far their sum is off: a few percent is fine, more asks for more steps."
    )
    caveats = (
        "Everything is relative to the baseline: with a black one, black parts of an object count nothing. Pixels may matter "
        "on the way without mattering at the picture."
    )
    audit = {"full": {}}
    draft = {"steps": 16}

    target: TargetSpec = Param("predicted", description=TARGET)
    steps: int = Param(50, ge=1, le=10_000, description="points on the way at which the gradient is taken")
    rule: Literal["midpoint", "gausslegendre"] = Param(
        "midpoint", description="where the points lie and what each weighs; Gauss-Legendre is the better for smooth networks, not for ReLU"
    )
    baseline: Baseline = Param("black", description="where the way begins; mean is the training mean, blur the picture without detail")
    values: Literal["absolute", "signed"] = Param("absolute", description="absolute: strength; signed: for and against")

    def run(self, ctx: Context) -> Result:
        x = ctx.images
        start = baseline(ctx, self.baseline)
        shares = self.attribute(ctx, start)
        error = completeness(shares, scores(ctx, x) - scores(ctx, start))
        maps = reduce_channels(shares, self.values, "sum")
        found = Heatmaps("integrated_gradients", maps, captions=captions(ctx), signed=self.values == "signed", unit="share of the score")
        metrics = [
            concentration(maps),
            Metric(
                "completeness_error", float(np.median(error)), better="lower", per_image=error,
                about="median over pictures: |sum of the shares - (S(x) - S(baseline))| over |S(x) - S(baseline)|",
            ),
        ]  # fmt: skip
        return Result([found], metrics, zero_notes(maps, ctx.ids))

    def attribute(self, ctx: Context, start: Tensor) -> Tensor:
        """(N, C, H, W) shares of the score."""
        x, target = ctx.images, ctx.target
        total: Any = 0
        points, weights = quadrature(self.rule, self.steps)
        for point, weight in ctx.track(zip(points, weights, strict=True), len(points), "steps"):
            total = total + weight * ctx.input_gradient(start + point * (x - start), target)
        return (x - start) * total


def scores(ctx: Context, images: Tensor) -> Tensor:
    """(N,) each picture's target in `images` (N, C, H, W), which stand in for the pictures."""
    import torch

    def score(rows: slice) -> Tensor:
        with torch.no_grad():
            return ctx.target.score(ctx.target.output(ctx.model, images[rows]), rows)

    return torch.cat(list(ctx.batched(len(images), score)))


def quadrature(rule: str, steps: int) -> tuple[list[float], list[float]]:
    """Points in (0, 1) and their weights, which sum to one."""
    if rule == "midpoint":
        return [(i + 0.5) / steps for i in range(steps)], [1 / steps] * steps
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()


def baseline(ctx: Context, name: Baseline) -> Tensor:
    """(N, C, H, W) pictures in which what is to be explained is absent."""
    import torch

    from harness.optimise import gaussian_blur

    x = ctx.images
    if name == "blur":
        return gaussian_blur(x, x.shape[-1] / 16)
    if name == "mean":
        return torch.tensor(ctx.model.input.mean, device=ctx.device, dtype=x.dtype).view(1, -1, 1, 1).expand_as(x)
    return torch.full_like(x, {"black": 0.0, "grey": 0.5, "white": 1.0}[name])
