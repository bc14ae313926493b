from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import model_validator

from harness import Curve, Images, Metric, Paper, Param, Result, Table, Technique, Use

from .climb import CONVERGED, GO_ON, check_go_on
from .feature_inversion import signal_to_noise, similarity

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context

INVERSION = "feature_inversion"


class InversionByDepth(Technique):
    """One picture through every depth: how much of it each layer gives back, as error, PSNR, SSIM and the rate at which the
    inversion is recognised as its own picture among others. What somebody who is given a layer's features learns of the picture
    (after Mahendran & Vedaldi 2015, arXiv:1412.0035, and Dosovitskiy & Brox 2016, arXiv:1506.02753).

    An inversion is recognised when, of all pictures of the gallery, its own is the nearest: by pixels (Euclidean distance of
    pictures shrunk to 32 x 32), and by the model's penultimate features (cosine). Cost: that of feature_inversion for each
    layer, and one forward pass a picture of the gallery.
    """

    name = "inversion_by_depth"
    family = "synthesis"
    paper = Paper("Mahendran, Vedaldi", 2015, "Understanding Deep Image Representations by Inverting Them", arxiv="1412.0035")
    needs = frozenset({"images"})
    reading = (
        "From left to right the picture passes deeper into the network. Where the recognition rate is still high, features are no "
        "safer to hand out than the picture itself, even if the inversion looks nothing like it."
    )
    caveats = (
        "A lower bound: this search uses no knowledge of pictures beyond smoothness, and a trained inverter finds more. The rates "
        "depend on the gallery: among few or unlike pictures recognition is easy, and chance is one in its size."
    )
    audit = {"full": {"rows": 6, "steps": 200}}

    layers: tuple[str, ...] = Param((), description="layers to invert; none: `rows` of them, spread over the depth")
    rows: int = Param(8, ge=1, le=100, description="how many layers when none are named")
    steps: int = Param(400, ge=1, le=100_000, description="gradient steps an inversion; all else as feature_inversion has it by default")
    converged: float = CONVERGED
    go_on: int = GO_ON
    gallery: int = Param(
        500,
        ge=1,
        le=100_000,
        description="pictures among which the inversion's own is looked for, at most; those inverted are always among them",
    )

    @model_validator(mode="after")
    def _consistent(self) -> InversionByDepth:
        check_go_on(self)
        return self

    def uses(self) -> list[Use]:
        settings = {"layers": list(self.layers), "rows": self.rows, "steps": self.steps, "converged": self.converged, "go_on": self.go_on}
        return [Use(INVERSION, settings)]

    def run(self, ctx: Context) -> Result:
        import torch

        from harness.layers import layer_table

        found = ctx.results[INVERSION]
        grid: Any = found["inversions"]
        table: Any = found["layers"]
        layers = [row[0] for row in table.rows]
        errors = [row[3] for row in table.rows]
        data = torch.from_numpy(grid.data).to(ctx.device, ctx.model.dtype)
        made = data.view(len(ctx.images), len(layers) + 1, *data.shape[1:])[:, 1:]  # (N, L, C, H, W)
        psnr = np.stack([signal_to_noise(made[:, k], ctx.images) for k in range(len(layers))])
        ssim = np.stack([similarity(made[:, k], ctx.images) for k in range(len(layers))])
        by_pixels, by_features, size = self._recognised(ctx, made)

        facts = {row.name: row for row in layer_table(ctx.model)}
        rows = []
        for k, layer in enumerate(layers):
            fact = facts[layer]
            seen = "all" if fact.receptive_field == 0 else "" if fact.receptive_field is None else str(fact.receptive_field)
            shape = " x ".join(map(str, fact.shape))
            values = int(np.prod(fact.shape)) / ctx.images[0].numel()
            numbers = [errors[k], float(psnr[k].mean()), float(ssim[k].mean()), float(by_pixels[k].mean()), float(by_features[k].mean())]
            rows.append([layer, shape, round(values, 3), seen, *numbers])
        columns = ["layer", "shape", "values a pixel value", "receptive field", "error", "PSNR (dB)", "SSIM"]
        columns += ["recognised by pixels", "recognised by features"]
        small = ctx.images.shape[-1] < 64
        caption = "The picture, and what each layer gives back, from the first to the last."
        depth = range(1, len(layers) + 1)
        lines = {"by pixels": by_pixels.mean(1), "by features": by_features.mean(1)}
        artifacts: list[Any] = [
            Images("depths", grid.data, captions=grid.captions, columns=len(layers) + 1, exact=small, caption=caption),
            Table("layers", columns, rows),
            Curve("PSNR", depth, {"PSNR": psnr.mean(1)}, "layer, in the order of the pass", "dB"),
            Curve("SSIM", depth, {"SSIM": ssim.mean(1)}, "layer, in the order of the pass", "SSIM"),
            Curve("recognition", depth, lines, "layer, in the order of the pass", "share of pictures"),
        ]
        among = f"among {size} pictures; chance at most {2 / size:.2g}"
        # How the inversions were made: their curve and, of the first picture, the way.
        artifacts += [a for name, a in found.items() if name == "objective" or name.startswith("progress")]
        about = "share of pictures that are recognised, by features or by pixels, from what the {} layer gives back"
        either = np.maximum(by_pixels, by_features)
        metrics = [
            Metric("psnr", float(psnr.mean()), "dB", per_image=psnr.mean(0).tolist(), about="mean over the layers"),
            *(
                Metric(
                    f"recognised_{which}", float(either[k].mean()), per_image=either[k].tolist(), about=about.format(which), detail=among
                )
                for which, k in (("first", 0), ("last", -1))
            ),
        ]
        return Result(artifacts, metrics)

    def _recognised(self, ctx: Context, made: Tensor) -> tuple[np.ndarray, np.ndarray, int]:
        """(L, N) whether an inversion is nearest to its own picture, by pixels and by features, and the gallery's size."""
        import torch

        from harness.context import to_images
        from harness.datasets import evenly

        whole = ctx.dataset.whole or ctx.dataset
        ids = list(whole.ids)
        own = set(ctx.ids)
        others = [i for i, name in enumerate(ids) if name not in own]
        others = [others[j] for j in evenly(max(0, self.gallery - len(ctx.ids)), len(others))] if others else []
        small, features = [thumbnails(ctx.images)], [self._features(ctx, ctx.images)]
        rest = whole.select(indices=others) if others else None
        if rest is not None:
            for rows, pixels in rest.batches(ctx.model.input, ctx.max_batch):
                images = to_images(pixels, ctx.device, ctx.model.dtype)
                small.append(thumbnails(images))
                features.append(self._features(ctx, images))
                ctx.report("gallery", rows.stop, len(others))
        gallery, vectors = torch.cat(small), torch.cat(features)
        count, layers = made.shape[:2]
        flat = made.flatten(0, 1)
        own_places = torch.arange(count, device=ctx.device).repeat_interleave(layers)
        near = torch.cdist(thumbnails(flat), gallery).argmin(1) == own_places
        alike = (self._features(ctx, flat) @ vectors.T).argmax(1) == own_places
        shaped = [x.view(count, layers).T.float().cpu().numpy() for x in (near, alike)]
        return shaped[0], shaped[1], len(gallery)

    def _features(self, ctx: Context, images: Tensor) -> Tensor:
        """(n, D) penultimate features of unit length."""
        import torch

        with torch.no_grad():
            found = torch.cat(list(ctx.batched(len(images), lambda rows: ctx.model.embedding(images[rows]))))
        return torch.nn.functional.normalize(found, dim=1)


def thumbnails(images: Tensor) -> Tensor:
    """(N, C * 32 * 32): pictures shrunk, or small ones as they are."""
    from torch.nn.functional import interpolate

    if min(images.shape[2:]) > 32:
        images = interpolate(images, size=(32, 32), mode="bilinear", antialias=True)
    return images.flatten(1)
