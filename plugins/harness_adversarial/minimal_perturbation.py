from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness import ConfigError, Images, Metric, Paper, Param, Result, Table, Technique

from .attacks import Attacked, lengths
from .minimal import deepfool, lbfgs
from .shared import AMPLIFIED, in_full_precision, interval_text, second, tell_difference

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context

Method = Literal["deepfool", "deepfool_linf", "lbfgs"]
SHOWN = 8  # pictures that are drawn; the table has all
WORDS = {"deepfool": "DeepFool, L2", "deepfool_linf": "DeepFool, L-inf", "lbfgs": "L-BFGS"}


class MinimalPerturbation(Technique):
    """How little must change before the answer does? DeepFool, in L2 and L-inf (Moosavi-Dezfooli et al. 2016, arXiv:1511.04599), and
    min c ||r||^2 + loss(x + r, l) within the box by L-BFGS with a search for c (Szegedy et al. 2013, arXiv:1312.6199).

    DeepFool looks for the nearest other class; L-BFGS for the one named, without one the second most likely, and then finds smaller
    changes for several times the cost. Distortion is Szegedy's sqrt(mean of r^2) over the pixels in [0, 1]. Cost: DeepFool about four
    steps of one forward and `candidates` backward passes a picture, L-BFGS `rounds` times `steps` passes of both kinds.
    """

    name = "minimal_perturbation"
    family = "adversarial"
    version = 4
    paper = Paper("Szegedy, Zaremba, Sutskever, Bruna, Erhan, Goodfellow, Fergus", 2013, "Intriguing properties of neural networks",
                  arxiv="1312.6199")  # fmt: skip
    needs = frozenset({"images", "classifier"})
    reading = (
        "The shorter the change, the nearer a picture lies to a boundary of the model. The differences are drawn amplified about grey, "
        "by the factor in their caption."
    )
    caveats = (
        "Upper bounds: a smaller change may exist that these searches do not find. Pixels are not rounded to whole 255ths; the smallest "
        "changes vanish when a picture is saved with eight bits."
    )
    audit = {"full": {"methods": ("deepfool",)}}

    methods: tuple[Method, ...] = Param(("deepfool", "deepfool_linf", "lbfgs"), min_length=1, description="searches that are made")
    target: str | int = Param("", description="the class that L-BFGS aims at; none: the second most likely, for each picture")
    candidates: int = Param(10, ge=2, description="DeepFool: how many of the most likely classes are tried")
    overshoot: float = Param(0.02, ge=0, le=1, description="DeepFool: share of the way by which it goes beyond the boundary")
    deepfool_steps: int = Param(50, ge=1, le=10_000, description="DeepFool: steps at most")
    steps: int = Param(40, ge=1, le=10_000, description="L-BFGS: steps for each weight c")
    rounds: int = Param(8, ge=1, le=100, description="L-BFGS: weights c that are tried")

    @in_full_precision
    def run(self, ctx: Context) -> Result:
        import torch

        images = ctx.images
        clean = ctx.predicted
        wanted = self._targets(ctx)
        already = (wanted == clean).nonzero().flatten().tolist() if "lbfgs" in self.methods else []
        if already:
            name = ctx.model.class_name(int(wanted[already[0]]))
            raise ConfigError(f"minimal_perturbation.target: {ctx.ids[already[0]]} is already {name!r} to the model; name another class")
        made = {method: self._made(ctx, method, wanted) for method in dict.fromkeys(self.methods)}
        notes: list[str] = []
        metrics, rows, columns = [], [], []
        for method, found in made.items():
            delta = found.images - images
            rms = delta.cpu().double().square().flatten(1).mean(1).sqrt()
            l2, linf = lengths(delta, "l2"), lengths(delta, "linf")
            hits = found.fooled.cpu().numpy()
            each = rms[found.fooled.cpu()].tolist()
            columns.append((method, found, rms, l2, linf))
            if each:
                middle = float(l2[found.fooled].median())
                detail = f"{int(hits.sum())} of {len(hits)} pictures, {interval_text(hits)}; median L2 norm {middle:.3g}"
                about = f"{WORDS[method]}: root mean square change of a pixel in [0, 1], over the pictures whose answer it changes"
                metrics.append(
                    Metric(f"distortion_{method}", float(np.mean(each)), better="higher", per_image=each, about=about, detail=detail)
                )
            lost = [ctx.ids[i] for i in np.flatnonzero(~hits)]
            if lost:
                notes.append(f"{WORDS[method]} finds nothing for {len(lost)} of {len(hits)} pictures: {', '.join(lost[:5])}")
        answers = {method: ctx.logits(found.images).argmax(1) for method, found in made.items()}
        for method, found, rms, l2, linf in columns:
            for i in range(len(images)):
                now = ctx.model.class_name(int(answers[method][i]))
                row = [ctx.ids[i], ctx.model.class_name(int(clean[i])), WORDS[method], bool(found.fooled[i]), now]
                rows.append([*row, float(rms[i]), float(l2[i]), float(linf[i]) * 255])
        artifacts: list[Any] = []
        for method, found in made.items():
            delta = found.images - images
            sheet, captions = [], []
            for i in range(min(SHOWN, len(images))):
                factor = AMPLIFIED if float(delta[i].abs().max()) * AMPLIFIED > 0.1 else 100
                sheet += [images[i], found.images[i], (0.5 + factor * delta[i]).clamp(0, 1)]
                captions += [
                    ctx.model.class_name(int(clean[i])),
                    ctx.model.class_name(int(answers[method][i])),
                    tell_difference(delta[i], factor),
                ]
            caption = f"{WORDS[method]}: original, changed, amplified difference."
            small = images.shape[-1] < 64
            artifacts.append(Images(method, torch.stack(sheet), captions=captions, columns=3, exact=small, caption=caption))
        names = ["picture", "answer", "search", "answer changes", "answer after", "RMS", "L2", "L-inf in 255ths"]
        artifacts.append(Table("pictures", names, rows))
        return Result(artifacts, metrics, notes)

    def _made(self, ctx: Context, method: Method, wanted: Tensor) -> Attacked:
        import torch

        images, model = ctx.images, ctx.model
        if method == "lbfgs":

            def search(rows: slice) -> Attacked:
                draws = ctx.draws(ctx.ids[rows])
                return lbfgs(model, images[rows], wanted[rows], draws, steps=self.steps, rounds=self.rounds, progress=ctx.report)
        else:

            def search(rows: slice) -> Attacked:
                return deepfool(
                    model,
                    images[rows],
                    norm="l2" if method == "deepfool" else "linf",
                    candidates=self.candidates,
                    steps=self.deepfool_steps,
                    overshoot=self.overshoot,
                )

        parts = list(ctx.batched(len(images), search))
        return Attacked(torch.cat([p.images for p in parts]), torch.cat([p.fooled for p in parts]))

    def _targets(self, ctx: Context) -> Tensor:
        import torch

        if self.target != "" and "lbfgs" not in self.methods:
            raise ConfigError(
                "minimal_perturbation.target: only the search lbfgs aims at a class; add it to `methods`, or leave target out"
            )
        if self.target == "":
            return second(ctx.own_logits, ctx.predicted)
        return torch.full((len(ctx.images),), ctx.model.class_index(self.target), device=ctx.device)
