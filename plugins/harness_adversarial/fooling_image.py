from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from harness import ConfigError, Images, Metric, Paper, Param, Result, Table, Technique

from .attacks import Attack, in_255ths, lengths, perturbed
from .shared import AMPLIFIED, in_full_precision

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context


class FoolingImage(Technique):
    """A picture changed so little that nobody sees it, and the model names a class of our choice: signed gradient steps on
    -log p(target), each pixel kept within eps of the original and in [0, 1] (targeted form of Kurakin et al. 2016, arXiv:1607.02533;
    the effect: Szegedy et al. 2013, arXiv:1312.6199).

    All steps are made, so that the target's probability goes on rising after the first success. Cost: one forward and one backward
    pass a step and picture.
    """

    name = "fooling_image"
    family = "adversarial"
    paper = Paper("Szegedy, Zaremba, Sutskever, Bruna, Erhan, Goodfellow, Fergus", 2013, "Intriguing properties of neural networks",
                  arxiv="1312.6199")  # fmt: skip
    needs = frozenset({"images", "classifier"})
    reading = (
        "First and second picture look alike to a person; to the model the second is the target class. The difference is drawn about "
        "grey, as it is and amplified: it looks like noise, not like the target."
    )
    caveats = (
        "That a picture can be changed so says little about how often a model errs by itself. The changes are made with the model's "
        "weights at hand and for pictures that reach it pixel by pixel."
    )
    audit = {"standard": {"steps": 20}, "full": {}}

    target: str | int = Param("", description="the class to be named; none: the one the model finds least likely, for each picture")
    eps: float = Param(2.0, ge=0, description="largest change of a pixel, in 255ths")
    steps: int = Param(40, ge=0, le=100_000, description="signed gradient steps")
    step_size: float = Param(0.125, gt=0, le=1, description="length of a step as a share of eps")

    @in_full_precision
    def run(self, ctx: Context) -> Result:
        import torch

        if self.eps > 255:
            raise ConfigError(f"fooling_image.eps: {self.eps:g} is more than 255 255ths, the whole range of a pixel")
        model, images = ctx.model, ctx.images
        clean = ctx.own_logits
        wanted = self._targets(ctx, clean)
        already = clean.argmax(1) == wanted
        settings = Attack("targeted", "linf", self.steps, self.step_size, targeted=True)
        eps = self.eps / 255

        def some(rows: slice) -> Tensor:
            return perturbed(model, images[rows], wanted[rows], settings, eps, progress=lambda d, n: ctx.report("steps", d, n))

        made = torch.cat(list(ctx.batched(len(images), some)))
        logits = ctx.logits(made)
        chance = logits.softmax(1).gather(1, wanted[:, None]).squeeze(1)
        fooled = logits.argmax(1) == wanted
        delta = made - images
        far = lengths(delta, "linf")
        before = clean.softmax(1).amax(1)
        names = [model.class_name(c) for c in clean.argmax(1).tolist()]
        now = [model.class_name(c) for c in logits.argmax(1).tolist()]
        sheet = torch.stack([images, made, (0.5 + delta).clamp(0, 1), (0.5 + AMPLIFIED * delta).clamp(0, 1)], 1).flatten(0, 1)
        captions = []
        for i in range(len(images)):
            captions += [
                f"{names[i]}, p = {float(before[i]):.3f}",
                f"{now[i]}, p = {float(logits[i].softmax(0).amax()):.3f}",
                f"difference, at most {float(far[i]) * 255:.3g}/255",
                f"difference x {AMPLIFIED}",
            ]
        columns = ["picture", "answer before", "probability", "target", "probability of the target", "largest change in 255ths", "fooled"]
        rows = [
            [
                ctx.ids[i],
                names[i],
                float(before[i]),
                model.class_name(int(wanted[i])),
                float(chance[i]),
                float(far[i] * 255),
                bool(fooled[i]),
            ]
            for i in range(len(images))
        ]
        caption = f"Original, changed by at most {in_255ths(eps)}, the difference about grey, and the same times {AMPLIFIED}."
        artifacts: list[Any] = [
            Images("fooled", sheet, captions=captions, columns=4, exact=images.shape[-1] < 64, caption=caption),
            Table("pictures", columns, rows),
        ]
        own = ~already
        hits = fooled[own].float()
        detail = f"{int(hits.sum())} of {len(hits)} within {in_255ths(eps)}"
        metrics = []
        if len(hits):
            about = "share of pictures that the model gives the target class after the change"
            metrics.append(Metric("fooled", float(hits.mean()), per_image=hits.tolist(), about=about, detail=detail))
            about = "probability of the target class after the change"
            metrics.append(Metric("confidence", float(chance[own].mean()), per_image=chance[own].tolist(), about=about))
        notes = [
            f"{ctx.ids[i]}: the model gives it the target class without any change; not counted" for i in np.flatnonzero(already.cpu())
        ]
        return Result(artifacts, metrics, notes)

    def _targets(self, ctx: Context, logits: Tensor) -> Tensor:
        import torch

        if self.target == "":
            return logits.argmin(1)
        return torch.full((len(logits),), ctx.model.class_index(self.target), device=ctx.device)
