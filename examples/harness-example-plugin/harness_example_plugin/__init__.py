"""A third party's technique: one class, one hook, one entry point in pyproject.toml."""

from harness import Context, Heatmaps, Paper, Param, Result, TargetSpec, Technique, hookimpl


class NoisyGradient(Technique):
    """Mean input gradient over noisy copies of the picture (Smilkov et al. 2017, arXiv:1706.03825).

    Cost: `samples` forward and backward passes a picture.
    """

    name = "noisy_gradient"
    family = "saliency"
    paper = Paper("Smilkov, Thorat, Kim, Viegas, Wattenberg", 2017, "SmoothGrad: removing noise by adding noise", arxiv="1706.03825")
    needs = frozenset({"images"})
    attribution = "map"  # faithfulness, sanity_checks and saliency_comparison judge it
    reading = "As for saliency, with less speckle: bright regions are where the score reacts to changes, noise or no noise."
    caveats = "The noise decides how smooth the map is; too much of it explains another picture than the one shown."
    audit = {"standard": {"samples": 8}}

    target: TargetSpec = Param("predicted", description="what is explained")
    samples: int = Param(25, ge=1, description="noisy copies averaged a picture")
    noise: float = Param(0.15, ge=0, description="standard deviation of the noise as a share of the picture's value range")

    def run(self, ctx: Context) -> Result:
        x = ctx.images  # (N, C, H, W) in [0, 1]
        std = self.noise * (x.amax((1, 2, 3), True) - x.amin((1, 2, 3), True))
        gradient = sum(ctx.input_gradient(x + std * ctx.randn_like(x)) for _ in range(self.samples)) / self.samples
        return Result([Heatmaps("map", gradient.abs().amax(1), unit="change of score per unit of pixel value")])


@hookimpl
def harness_techniques():
    return [NoisyGradient]
