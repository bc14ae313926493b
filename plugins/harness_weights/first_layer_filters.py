from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from harness import Arrays, Images, Metric, NotApplicable, Paper, Param, Result, Table, Technique
from harness.datasets import evenly

from .gabor import SMALLEST, coherence, gabor_fit, leading_component

if TYPE_CHECKING:
    from harness import Context

FITS = 96  # filters fitted with a Gabor function, evenly spread: a fit takes some forty milliseconds


class FirstLayerFilters(Technique):
    """The weights of the first convolution as pictures, all on one scale (Krizhevsky et al. 2012, fig. 3), with their kinds counted.

    A filter is drawn as 0.5 + w / (2 max |w|), the maximum being over all filters. Cost: no pass through the model.
    """

    name = "first_layer_filters"
    family = "weights"
    version = 2
    paper = Paper(
        "Krizhevsky, Sutskever, Hinton", 2012, "ImageNet Classification with Deep Convolutional Neural Networks", doi="10.1145/3065386"
    )
    needs = frozenset({"conv"})
    reading = (
        "Each tile is one filter: what it shows is what it responds to most. Edges, stripes and colour blobs are what a trained "
        "network has; speckle means a filter has learnt little. Grey tiles are filters near zero."
    )
    caveats = (
        "Only the first layer's inputs are colours, so only its weights can be seen as pictures. A clean picture here says "
        "nothing about what later layers do with it. Kernels below 5 x 5 are too small for a Gabor fit."
    )
    audit = {"quick": {}, "standard": {}}

    oriented_above: float = Param(
        0.5, ge=0, le=1, description="a filter is oriented when its spectral coherence (0 none, 1 one direction) exceeds this"
    )
    colour_above: float = Param(
        0.5, ge=0, le=1, description="a filter is colour-opponent when this share of its energy is off the grey axis"
    )
    dead_below: float = Param(0.05, ge=0, le=1, description="a filter is dead when its norm is below this share of the largest")

    def run(self, ctx: Context) -> Result:
        name, conv = ctx.model.convolutions()[0]
        weight = conv.weight.detach().float().cpu().numpy()  # (out, in, k, k)
        if weight.shape[1] not in (1, 3):
            raise NotApplicable(f"needs a first convolution on grey or colour pictures; {name} takes {weight.shape[1]} channels")
        scale = float(np.abs(weight).max()) or 1.0
        norms = np.sqrt((weight.astype(np.float64) ** 2).sum((1, 2, 3)))
        alive = norms > 0
        grey = weight.astype(np.float64).mean(1)
        off_grey = np.zeros(len(weight))
        if weight.shape[1] == 3:
            off_grey[alive] = 1 - 3 * (grey[alive] ** 2).sum((1, 2)) / norms[alive] ** 2
        patterns = leading_component(weight)
        coherent = coherence(patterns)
        dead = norms < self.dead_below * norms.max() if norms.any() else np.ones(len(norms), bool)
        kind = np.where(dead, "dead", "other")
        kind = np.where(~dead & (coherent > self.oriented_above), "oriented", kind)
        colour = ~dead & (off_grey > self.colour_above)

        fitted = weight.shape[-1] >= SMALLEST and weight.shape[-1] == weight.shape[-2]
        fits: dict[int, float] = {}
        if fitted:
            alive_ones = np.flatnonzero(~dead)
            some = alive_ones[evenly(FITS, len(alive_ones))].tolist()
            fits = {i: gabor_fit(patterns[i]) for i in ctx.track(some, len(some), "filters")}
        columns = ["filter", "norm", "off_grey", "coherence", "kind", "colour-opponent"] + (["gabor_r2"] if fitted else [])
        rows = [
            [i, float(norms[i]), float(off_grey[i]), float(coherent[i]), str(kind[i]), bool(colour[i])] + ([fits.get(i)] if fitted else [])
            for i in range(len(weight))
        ]
        shape = " x ".join(map(str, weight.shape))
        metrics = [
            Metric("filters", len(weight)),
            Metric(
                "oriented_share",
                float((kind == "oriented").mean()),
                about=f"share of filters with spectral coherence above {self.oriented_above}",
            ),
            Metric(
                "colour_share",
                float(colour.mean()),
                about=f"share of filters with more than {self.colour_above:.0%} of their energy off the grey axis",
            ),
            Metric(
                "dead_share",
                float(dead.mean()),
                better="lower",
                about=f"share of filters with a norm below {self.dead_below:.0%} of the largest",
            ),
        ]
        if fits:
            about = "median adjusted R2 of a Gabor function over the filters that are not dead"
            metrics.append(
                Metric("gabor_r2", float(np.median(list(fits.values()))), better="higher", about=about, detail=f"{len(fits)} filters")
            )
        artifacts = [
            Images(
                "filters",
                0.5 + weight / (2 * scale),
                columns=16 if len(weight) > 32 else 8,
                exact=True,
                caption=f"{name}: {shape}, one scale for all, from -{scale:.3g} to {scale:.3g}",
            ),
            Table("kinds", columns, rows),
            Arrays("weights", {"weight": weight}),
        ]
        notes = [] if fitted else [f"{name} has {weight.shape[-2]} x {weight.shape[-1]} kernels: too small, or not square, for a Gabor fit"]
        return Result(artifacts, metrics, notes)
