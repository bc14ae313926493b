from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness import ConfigError, Heatmaps, NotApplicable, Paper, Param, Result, TargetSpec, Technique

from .measures import captions, concentration
from .saliency import TARGET

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context


class GradCam(Technique):
    """The maps of a deep layer added up with weights that say how much each raises the class score,
    relu(sum_k a_k A_k), a_k the mean over positions of dS/dA_k (Selvaraju et al. 2017, arXiv:1610.02391, eq. 1 and 2).

    Values are raw, not rescaled; the map is enlarged bilinearly to the picture. Cost: one forward pass a picture, and a
    backward pass down to the layer.
    """

    name = "grad_cam"
    family = "saliency"
    paper = Paper("Selvaraju, Cogswell, Das, Vedantam, Parikh, Batra", 2017, "Grad-CAM", arxiv="1610.02391")
    needs = frozenset({"images", "conv"})
    attribution = "grad_cam"
    reading = "Bright regions hold the deep features that raise the class score. It is coarse: a few positions a side, smoothly enlarged."
    caveats = (
        "It speaks for one layer: what that layer's maps do not separate, the map cannot show. Evidence against the class is "
        "cut away unless `relu` is off."
    )
    audit = {"full": {}}

    target: TargetSpec = Param("predicted", description=TARGET)
    layer: str = Param("", description="a layer with maps; none: the deepest before the class scores")
    relu: bool = Param(True, description="keep only what speaks for the class")

    def run(self, ctx: Context) -> Result:
        from torch.nn.functional import interpolate

        layer = self.layer or last_maps(ctx)
        coarse = self.attribute(ctx, layer)
        maps = interpolate(coarse[:, None], size=ctx.images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
        unit = "weighted activation"
        found: list[Any] = [
            Heatmaps(
                "grad_cam",
                maps,
                captions=captions(ctx),
                signed=not self.relu,
                unit=unit,
                caption=f"{layer}, {coarse.shape[1]} x {coarse.shape[2]} positions.",
            )
        ]
        empty = (coarse.flatten(1) == 0).all(1).tolist()
        notes = [
            f"{name}: nothing in {layer} speaks for the class; the map is zero" for name, zero in zip(ctx.ids, empty, strict=True) if zero
        ]
        return Result(found, [concentration(maps)], notes)

    def attribute(self, ctx: Context, layer: str) -> Tensor:
        """(N, h, w) the map at the layer's own size."""
        import torch

        model, target = ctx.model, ctx.target
        model.maps_shape(layer)

        def work(rows: slice) -> Tensor:
            with torch.enable_grad():
                output, maps = model.tap(ctx.images[rows], layer, lambda x: target.output(model, x))
                score = target.score(output, rows).sum()
                if not score.requires_grad:
                    raise ConfigError(f"grad_cam.layer: the target does not stand on {layer!r}; name a layer that leads to it")
                gradient = torch.autograd.grad(score, maps)[0]
            weighted = (gradient.mean((2, 3), keepdim=True) * maps.detach()).sum(1)
            return weighted.clamp(min=0) if self.relu else weighted

        return torch.cat(list(ctx.batched(len(ctx.images), work)))


def last_maps(ctx: Context) -> str:
    """The deepest layer with maps that the target stands on."""
    model, end = ctx.model, ctx.target.layer
    if end is None:
        return model.last_maps
    names = [name for name, _ in model.calls]
    shapes = dict(model.calls)
    for name in reversed(names[: names.index(model.full_name(end)) + 1]):
        if len(shapes[name]) == 4 and shapes[name][2] * shapes[name][3] > 1 and name not in model.channels_behind:
            return name
    raise NotApplicable(f"needs a layer with maps at or before {end!r}; {model.name!r} has none")
