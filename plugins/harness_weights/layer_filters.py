from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from harness import ConfigError, Curve, Images, Metric, Paper, Param, Result, Table, Technique
from harness.datasets import evenly

from .gabor import coherence

if TYPE_CHECKING:
    from harness import Context

LIMIT = 4096  # kernels measured a layer, evenly spread: means over more do not change


class LayerFilters(Technique):
    """The kernels of deeper convolutions, one grey tile for each pair of an output and an input channel (CS231n,
    "Visualizing and Understanding"), with a measure of how much a kernel still says by itself.

    Coherence is the share of a kernel's spectral energy along one direction: 1 for an edge or bar, near 0 for a blob and
    for noise; beside it stands what shuffled kernels of the same values have. Cost: no pass through the model.
    """

    name = "layer_filters"
    family = "weights"
    paper = Paper("Zeiler, Fergus", 2014, "Visualizing and Understanding Convolutional Networks", arxiv="1311.2901")
    needs = frozenset({"conv"})
    reading = (
        "A tile is one input channel's part of one output channel, outputs one after another. From the second layer on "
        "the inputs have no colour, only numbers of other filters: tiles look alike and say little, which is the point of "
        "this figure. The curve says it in a number: structure beyond chance by depth."
    )
    caveats = "Kernels of 1 x 1 have no shape. A 3 x 3 kernel has so few values that even noise looks somewhat directed."
    audit = {"full": {}}

    layer: str = Param("", description="convolution shown; none: the second with a kernel larger than 1 x 1")
    outputs: int = Param(16, ge=1, le=128, description="output channels shown at most, evenly spread")
    inputs: int = Param(16, ge=1, le=128, description="input channels shown at most, evenly spread")

    def run(self, ctx: Context) -> Result:
        convolutions = {name: conv.weight.detach().float().cpu().numpy() for name, conv in ctx.model.convolutions()}
        spatial = [name for name, w in convolutions.items() if min(w.shape[2:]) > 1]
        asked = ctx.model.full_name(self.layer) if self.layer else ""
        if asked and asked not in convolutions:
            raise ConfigError(f"layer_filters.layer: {self.layer!r} is not a convolution")
        shown = asked or (spatial[1] if len(spatial) > 1 else spatial[0] if spatial else next(iter(convolutions)))
        rows, depth, by_chance, measured = [], [], [], []
        for name, weight in ctx.track(convolutions.items(), len(convolutions), "layers"):
            structure = chance = None
            if name in spatial:
                structure, chance = directedness(weight, ctx.draws([name]).rand((weight.shape[2] * weight.shape[3],))[0].cpu().numpy())
                measured.append(name)
                depth.append(structure)
                by_chance.append(chance)
            norms = np.sqrt(np.square(weight.astype(np.float64)).sum((1, 2, 3)))
            dead = float((norms < 0.05 * norms.max()).mean()) if norms.max() > 0 else 1.0
            rows.append([name, " x ".join(map(str, weight.shape)), weight.shape[0] * weight.shape[1], structure, chance, dead])
        weight = convolutions[shown]
        outputs, inputs = evenly(self.outputs, weight.shape[0]), evenly(self.inputs, weight.shape[1])
        part = weight[np.ix_(outputs, inputs)]
        scale = float(np.abs(part).max()) or 1.0
        tiles = (0.5 + part / (2 * scale)).reshape(-1, 1, *part.shape[2:])
        shape = " x ".join(map(str, weight.shape))
        artifacts: list[Any] = [
            Images(
                "kernels", tiles, columns=len(inputs) * max(1, 16 // len(inputs)), exact=True,
                caption=f"{shown}: {shape}; {len(outputs)} of {weight.shape[0]} outputs, each with "
                f"{len(inputs)} of {weight.shape[1]} inputs, one scale from -{scale:.3g} to {scale:.3g}.",
            ),
            Table("layers", ["layer", "shape", "kernels", "coherence", "by chance", "dead filters"], rows),
        ]  # fmt: skip
        if len(measured) > 1:
            lines = {"coherence": depth, "shuffled kernels": by_chance}
            artifacts.append(
                Curve("by_depth", range(1, len(measured) + 1), lines, "convolution with a kernel above 1 x 1, by depth", "coherence")
            )
        metrics = [Metric("convolutions", len(convolutions))]
        if depth:
            metrics += [
                Metric(
                    "structure.first", depth[0] - by_chance[0], about="coherence of the first layer's kernels beyond that of shuffled ones"
                ),
                Metric("structure.last", depth[-1] - by_chance[-1], about="the same of the last layer's kernels"),
            ]
        return Result(artifacts, metrics)


def directedness(weight: np.ndarray, noise: np.ndarray) -> tuple[float, float]:
    """(mean coherence of the (out, in) kernels, the same after their values were shuffled in place).

    `noise` (k * k,) in [0, 1) orders the shuffle: one permutation for all kernels, so that only arrangement changes.
    """
    kernels = weight.reshape(-1, *weight.shape[2:])
    kernels = kernels[evenly(LIMIT, len(kernels))]
    kernels = kernels[np.abs(kernels).max((1, 2)) > 0]
    if not len(kernels):
        return 0.0, 0.0
    order = noise.argsort(kind="stable")
    shuffled = kernels.reshape(len(kernels), -1)[:, order].reshape(kernels.shape)
    return float(coherence(kernels).mean()), float(coherence(shuffled).mean())
