from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness import Heatmaps, Metric, Paper, Param, Result, TargetSpec, Technique
from harness.datasets import evenly

from .integrated_gradients import scores
from .measures import captions, completeness, concentration, zero_notes
from .saliency import TARGET, reduce_channels

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context


class ExpectedGradients(Technique):
    """Integrated gradients averaged over baselines that are pictures of the dataset, E[(x - x') dS/dx(x' + a (x - x'))] with x'
    drawn from them and a from [0, 1] (Erion et al. 2019, arXiv:1906.10670, eq. 3).

    No colour has to stand for "nothing". The expected sum is S(x) less the mean score of the baselines; how far off the sum is,
    is reported. Cost: `samples` forward and backward passes a picture.
    """

    name = "expected_gradients"
    family = "saliency"
    paper = Paper(
        "Erion, Janizek, Sturmfels, Lundberg, Lee",
        2019,
        "Improving performance of deep learning models with axiomatic attribution priors and expected gradients",
        arxiv="1906.10670",
    )
    needs = frozenset({"images"})
    attribution = "expected_gradients"
    reading = (
        "Bright pixels carry much of the difference between this picture's score and that of the dataset's other pictures (with "
        "values signed: red for, blue against)."
    )
    caveats = (
        "Relative to the pictures it is compared with: what they all share counts nothing. A mean over random draws: few samples "
        "leave speckle and a completeness error."
    )
    audit = {"full": {}}
    draft = {"samples": 16}

    target: TargetSpec = Param("predicted", description=TARGET)
    samples: int = Param(50, ge=1, le=100_000, description="draws of a baseline and a place on the way to it, a picture")
    references: int = Param(32, ge=1, le=10_000, description="pictures of the dataset that serve as baselines, spread evenly")
    values: Literal["absolute", "signed"] = Param("absolute", description="absolute: strength; signed: for and against")

    def run(self, ctx: Context) -> Result:
        others = self.baselines(ctx)
        shares, picked = self.attribute(ctx, others)
        error = completeness(shares, scores(ctx, ctx.images) - self.expected(ctx, others, picked))
        maps = reduce_channels(shares, self.values, "sum")
        found = Heatmaps("expected_gradients", maps, captions=captions(ctx), signed=self.values == "signed", unit="share of the score")
        metrics = [
            concentration(maps),
            Metric(
                "completeness_error", float(np.median(error)), better="lower", per_image=error,
                about="median over pictures: |sum of the shares - (S(x) - mean S(baselines drawn))| over |S(x) - mean S(baselines drawn)|",
            ),
        ]  # fmt: skip
        notes = ["the dataset has one picture only, which is its own baseline: the map is zero"] if len(others) == 1 else []
        return Result([found], metrics, [*zero_notes(maps, ctx.ids), *notes])

    def baselines(self, ctx: Context) -> Tensor:
        """(R, C, H, W) pictures of the dataset, of all of it where the run looks at some."""
        from harness.context import to_images

        whole = ctx.dataset.whole or ctx.dataset
        some = whole.select(indices=evenly(self.references, len(whole)))
        return to_images(some.pictures(ctx.model.input), ctx.device, ctx.model.dtype)

    def attribute(self, ctx: Context, others: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of the score (N, C, H, W), and which baselines were drawn (N, samples)."""
        x, target = ctx.images, ctx.target
        draws = ctx.draws(stream="baselines")
        picked, place = draws.randint(0, len(others), (self.samples,)), draws.rand((self.samples,))
        total: Any = 0
        for i in ctx.track(range(self.samples), self.samples, "samples"):
            away = x - others[picked[:, i]]
            total = total + away * ctx.input_gradient(x - (1 - place[:, i]).view(-1, 1, 1, 1) * away, target)
        return total / self.samples, picked

    def expected(self, ctx: Context, others: Tensor, picked: Tensor) -> Tensor:
        """(N,) mean score of each picture's target over the baselines drawn for it."""
        import torch

        target = ctx.target

        def work(rows: slice) -> Tensor:
            with torch.no_grad():
                output = target.output(ctx.model, others[rows])
                # Every picture's target in every baseline: (N, r), N scores read off one pass.
                pictures = torch.arange(len(ctx.images), device=ctx.device)
                return torch.stack([target.score(output, i.expand(len(output))) for i in pictures])

        table = torch.cat(list(ctx.batched(len(others), work)), 1)  # (N, R)
        return table.gather(1, picked).mean(1)
