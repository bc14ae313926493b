from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness import Images, Matrix, Metric, Paper, Param, Result, Table, Technique

from .gram import style_layers

if TYPE_CHECKING:
    from harness import Context

SHOWN = 64  # channels of a matrix that is drawn with numbers; larger ones are pictures


class GramMatrix(Technique):
    """G = F F^T / divisor, C x C, of a layer's features F (C, H W): how often channels fire together, wherever they do (Gatys et al. 2015,
    arXiv:1505.07376, eq. 1).

    Divisors in use are HW (DeepTextures), CHW (fast-neural-style) and none. Over HW, G = Cov + mean mean^T: the Gram matrix is the
    covariance and the means together, for the same cost; both are computed and timed. Cost: one forward pass to the deepest layer.
    """

    name = "gram_matrix"
    family = "style"
    version = 2
    paper = Paper("Gatys, Ecker, Bethge", 2015, "Texture Synthesis Using Convolutional Neural Networks", arxiv="1505.07376")
    needs = frozenset({"images", "conv"})
    reading = (
        "Row and column are channels; bright where two fire at the same places, on the diagonal where one fires much. Where things are "
        "is lost: a picture with its positions shuffled has the same matrix."
    )
    caveats = "A matrix of one layer; positions at the border see padding. Times are of one run on a shared machine."
    audit = {"full": {"layers": ()}}

    layers: tuple[str, ...] = Param((), description="layers; none: three over the first three quarters")
    divisor: Literal["hw", "chw", "none"] = Param(
        "hw", description="what the sums are divided by: positions, positions and channels, nothing"
    )

    def run(self, ctx: Context) -> Result:
        import torch

        from harness.device import at_least_single
        from harness.optimise import gram

        layers = style_layers(ctx, self.layers, 3)
        features: dict[str, Any] = {}
        with torch.no_grad():
            for part in ctx.batched(len(ctx.images), lambda rows: ctx.model.activations(ctx.images[rows], layers)):
                for layer, value in part.items():
                    features.setdefault(layer, []).append(at_least_single(value))
        artifacts: list[Any] = []
        rows: list[list[Any]] = []
        residuals, shares, times = [], [], []
        for layer in layers:
            value = torch.cat(features[layer])
            _, c, height, width = value.shape
            found = gram(value, self.divisor)
            over_hw = found * {"hw": 1, "chw": c, "none": 1 / (height * width)}[self.divisor]
            mean = value.flatten(2).mean(2)
            covariance = covariances(value)
            residual = (over_hw - covariance - mean[:, :, None] * mean[:, None]).abs().amax((1, 2)) / over_hw.abs().amax((1, 2)).clamp_min(
                1e-12
            )
            residuals.append(residual)
            # The share of the matrix that the means alone make.
            share = (mean.square().sum(1).square() / over_hw.square().sum((1, 2)).clamp_min(1e-30)).sqrt()
            shares.append(share)

            def product(value: Any = value) -> Any:
                return gram(value)

            def spread(value: Any = value) -> Any:
                return covariances(value)

            seconds = timed({"gram": product, "covariance": spread}, ctx)
            times.append(f"{layer} {seconds['covariance'] / seconds['gram']:.2f}")
            rank = torch.linalg.matrix_rank(over_hw[0].cpu().double()).item()
            rows.append([layer, c, height * width, int(rank), float(share.mean()), float(residual.max())])
            artifacts.append(self._drawn(ctx, layer, found))
        columns = ["layer", "channels", "positions", "rank, first picture", "share of the means", "|G/HW - Cov - mean mean'|"]
        artifacts.append(Table("layers", columns, rows))
        each = torch.stack(shares).mean(0).tolist()
        worst = torch.stack(residuals).amax(0).tolist()
        metrics = [
            Metric("mean_share", float(np.mean(each)), per_image=each, about="norm of mean mean^T over that of G, mean of layers"),
            Metric(
                "identity_error",
                float(np.max(worst)),
                better="lower",
                about="largest difference of G/HW and Cov + mean mean^T, as a share of the largest entry",
            ),
        ]
        return Result(artifacts, metrics, [f"time of the covariance over that of the Gram matrix: {', '.join(times)}"])

    def _drawn(self, ctx: Context, layer: str, found: Any) -> Any:
        """Small matrices with their numbers' scale, large ones as pictures: the root, as a few strong channels outshine all others."""
        import torch

        from harness_synthesis.blocks import in_a_name

        if len(found) == 1 and found.shape[1] <= SHOWN:
            names = [str(i) for i in range(found.shape[1])]
            return Matrix(
                f"gram-{in_a_name(layer)}", found[0].cpu().double(), names, names, unit=f"sum over positions, divisor {self.divisor}"
            )
        root = found.abs().sqrt()
        pictures = root / root.amax((1, 2), keepdim=True).clamp_min(1e-20)
        factor = max(1, -(-128 // found.shape[1]))
        pictures = pictures.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        caption = f"{layer}: the root of |G|, {found.shape[1]} x {found.shape[1]} channels."
        return Images(
            f"gram-{in_a_name(layer)}", torch.round(255 * pictures[:, None].float()) / 255, captions=ctx.ids, exact=True, caption=caption
        )


def covariances(value: Any) -> Any:
    """(N, C, C) covariance over positions, divided by their number."""
    from harness.optimise import gram

    return gram(value - value.mean((2, 3), keepdim=True))


def timed(work: dict[str, Any], ctx: Context, rounds: int = 5) -> dict[str, float]:
    """Median seconds of each, in turn."""
    from harness.device import synchronise

    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, call in work.items():
            synchronise(ctx.device)
            begun = time.perf_counter()
            call()
            synchronise(ctx.device)
            found[name].append(time.perf_counter() - begun)
    return {name: float(np.median(seconds[1:])) for name, seconds in found.items()}
