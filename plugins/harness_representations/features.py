from __future__ import annotations

from typing import TYPE_CHECKING

from harness import Arrays, HarnessError, Metric, Param, Result, Technique

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context


class Features(Technique):
    """One vector a picture: a layer's output, averaged over positions, for a whole dataset; other techniques build on it.

    'penultimate' is what the last layer with weights receives (fc7 of AlexNet and VGG), 'pixels' the picture itself.
    Cost: one forward pass a picture, which ends at the layer.
    """

    name = "features"
    family = "representations"
    version = 2
    needs = frozenset({"dataset"})
    reading = "Not drawn: neighbours, maps and geometry are computed from it."

    layer: str = Param("penultimate", description="a layer's name, 'penultimate', or 'pixels'")

    def run(self, ctx: Context) -> Result:
        import torch

        def vectors(images: Tensor) -> Tensor:
            return images.flatten(1) if self.layer == "pixels" else ctx.model.embedding(images, self.layer)

        features = torch.cat([found.float().cpu() for _, found in ctx.stream(vectors)])  # (N, D)
        bad = (~torch.isfinite(features).all(1)).nonzero().flatten().tolist()
        if bad:
            raise HarnessError(
                f"layer {self.layer!r} of {ctx.model.name!r} gives values that are not finite for {len(bad)} of {len(features)} pictures, "
                f"first {ctx.ids[bad[0]]!r}; look at the model's weights and at those pictures"
            )
        return Result([Arrays("features", {"features": features})], [Metric("dimensions", features.shape[1])])
