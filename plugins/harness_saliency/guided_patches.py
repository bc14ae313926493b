from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness import Images, Metric, Paper, Param, Result, Technique, Use

from .guided_backprop import coloured, rule_gradient

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context


class GuidedPatches(Technique):
    """Guided gradients of single units on the patches that excite their channel most (Springenberg et al. 2015, arXiv:1412.6806,
    fig. 3): which pixels of a strong patch made the unit fire.

    The patches are those of max_patches, one unit a patch: the place where the channel was strongest. Cost: one forward and one
    backward pass to the layer for each patch.
    """

    name = "guided_patches"
    family = "saliency"
    version = 2
    paper = Paper(
        "Springenberg, Dosovitskiy, Brox, Riedmiller", 2015, "Striving for Simplicity: The All Convolutional Net", arxiv="1412.6806"
    )
    needs = frozenset({"dataset", "conv"})
    reading = (
        "Above the patches of a channel, below what in them excites the unit: grey does nothing, coloured outlines do. When the "
        "outlines of a row show the same part (an eye, a letter), that is what the channel detects."
    )
    caveats = (
        "Guided gradients are sharp because they follow edges, whatever the later layers have learnt; here that is less of a worry, "
        "since they start at the unit itself. Each picture has its own scale."
    )
    audit = {"full": {}}

    layer: str = Param("", description="a layer with maps; none: the deepest before the class scores")
    k: int = Param(6, ge=1, le=100, description="patches a channel")
    channels: tuple[int, ...] = Param((), description="channels shown; none: the `count` most selective")
    count: int = Param(4, ge=1, le=200, description="channels shown when none are named")
    rule: Literal["guided", "deconvnet"] = Param("guided", description="the rule for ReLU")

    def uses(self) -> list[Use]:
        params: dict[str, Any] = {"layer": self.layer, "k": self.k, "channels": list(self.channels), "count": self.count}
        return [Use("max_patches", params)]

    def run(self, ctx: Context) -> Result:
        import torch

        from harness.context import to_images
        from harness.layers import receptive_fields
        from harness.targets import resolve
        from harness_representations.max_patches import box, cut

        model = ctx.model
        layer = model.full_name(self.layer or model.last_maps)
        found = ctx.results["max_patches"]
        top, table = found["top"].data, found["channels"].rows  # type: ignore[attr-defined]
        shown = list(self.channels) or [int(row[0]) for row in table[: self.count]]
        k = top["values"].shape[1]
        pictures, spots = top["pictures"][shown].reshape(-1), top["positions"][shown].reshape(-1, 2)  # (n,), (n, 2)
        names: list[str | int] = [f"neuron:{layer}:{c},{y},{x}" for c, (y, x) in zip(np.repeat(shown, k), spots.tolist(), strict=True)]
        target = resolve(names, model, len(names), lambda: torch.zeros(0, device=ctx.device), None)
        pixels = np.concatenate([ctx.dataset.pictures(model.input, i, i + 1) for i in pictures.tolist()])
        gradient = rule_gradient(ctx, self.rule, to_images(pixels, ctx.device, model.dtype), target)  # (n, C, H, W)
        field, side = receptive_fields(model.module, dict(model.calls)).get(layer), model.input.size
        boxes = [box(field, side, y, x) for y, x in spots.tolist()]
        focus = [_focus(g, b) for g, b in zip(gradient, boxes, strict=True)]
        patches = cut(ctx, field, pictures, spots)
        drawn = np.stack([_cut(g, b) for g, b in zip(coloured(gradient).cpu().float().numpy(), boxes, strict=True)])
        values = top["values"][shown]
        rows, captions = [], []
        for i, c in enumerate(shown):
            mine = slice(i * k, (i + 1) * k)
            rows += [patches[mine], drawn[mine]]
            captions += [f"channel {c}: {v:.3g}" if n == 0 else f"{v:.3g}" for n, v in enumerate(values[i])]
            captions += [f"{100 * f:.0f} % of the patch" for f in focus[mine]]
        silent = int((gradient.flatten(1) == 0).all(1).sum())
        metrics = [
            Metric(
                "focus", float(np.mean(focus)), per_image=focus,
                about="share of the patch's pixels that hold nine tenths of its guided gradient's energy",
            )
        ]  # fmt: skip
        artifacts = [
            Images(
                "guided_patches", np.concatenate(rows), captions=captions, columns=k, exact=patches.shape[-1] < 64,
                caption=f"{layer}: patches with their activation; below each its guided gradient and the share of the patch that "
                "holds nine tenths of its energy.",
            )
        ]  # fmt: skip
        return Result(artifacts, metrics, [f"{silent} of {len(names)} units do not fire: their gradient is zero"] if silent else [])


def _cut(image: np.ndarray, box: tuple[int, int, int]) -> np.ndarray:
    """(C, s, s) a box (top, left, size) of an image (C, H, W), grey where it reaches beyond."""
    top, left, size = box
    height, width = image.shape[1:]
    tile = np.full((len(image), size, size), 0.5, dtype=image.dtype)
    rows, columns = slice(max(0, top), min(height, top + size)), slice(max(0, left), min(width, left + size))
    tile[:, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = image[:, rows, columns]
    return tile


def _focus(gradient: Tensor, box: tuple[int, int, int]) -> float:
    """Share of a box's pixels that hold nine tenths of the gradient's energy; 0 for a zero gradient."""
    energy = gradient.square().sum(0).flatten().sort(descending=True).values
    total = energy.sum()
    if not total > 0:
        return 0.0
    return float((energy.cumsum(0) < 0.9 * total).sum() + 1) / box[2] ** 2
