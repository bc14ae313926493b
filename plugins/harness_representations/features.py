from __future__ import annotations

from typing import TYPE_CHECKING

from harness import Arrays, Metric, Param, Result, Technique

if TYPE_CHECKING:
    from harness import Context


class Features(Technique):
    """One vector a picture: a layer's output, averaged over positions, for a whole dataset; other techniques build on it.

    'penultimate' is what the last layer with weights receives (fc7 of AlexNet and VGG), 'pixels' the picture itself.
    Cost: one forward pass a picture, which ends at the layer.
    """

    name = "features"
    family = "representations"
    needs = frozenset({"dataset"})
    reading = "Not drawn: neighbours, maps and geometry are computed from it."

    layer: str = Param("penultimate", description="a layer's name, 'penultimate', or 'pixels'")

    def run(self, ctx: Context) -> Result:
        import torch

        parts = []
        with torch.no_grad():
            for _, images in ctx.stream():
                vectors = images.flatten(1) if self.layer == "pixels" else ctx.model.embedding(images, self.layer)
                parts.append(vectors.float().cpu())
        features = torch.cat(parts)  # (N, D)
        return Result([Arrays("features", {"features": features})], [Metric("dimensions", features.shape[1])])
