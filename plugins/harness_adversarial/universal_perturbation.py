from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness import Arrays, ConfigError, Images, Metric, NotApplicable, Paper, Param, Result, Table, Technique

from .attacks import in_255ths
from .shared import in_full_precision, interval, rate
from .universal import answers, project_noise, universal_deepfool, universal_gradient

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context

Method = Literal["gradient", "deepfool"]
WORDS = {"gradient": "by gradient steps", "deepfool": "by DeepFool"}
SHOWN = 4


class UniversalPerturbation(Technique):
    """One change that, added to almost any picture, changes the model's answer: made on some pictures and measured on others, by DeepFool
    as in the paper (Moosavi-Dezfooli et al. 2017, arXiv:1610.08401) or by gradient steps on the margin (in the line of Shafahi et al.
    2020, arXiv:1811.11304).

    The pictures are split at random; what counts is whether the answer is another than for the picture itself, right or not. Random
    signs of the same size are measured beside it: some models are upset by anything. Cost: `passes` times two forward and one backward
    pass a picture; by DeepFool, four steps of one forward and ten backward passes for each picture that is not fooled yet.
    """

    name = "universal_perturbation"
    family = "adversarial"
    paper = Paper("Moosavi-Dezfooli, Fawzi, Fawzi, Frossard", 2017, "Universal adversarial perturbations", arxiv="1610.08401")
    needs = frozenset({"dataset", "classifier"})
    reading = (
        "The noise is drawn about grey, stretched to the whole range. What it does to pictures it was not made on is the number that "
        "counts; the noise has worked as far as it stands above random signs of the same size."
    )
    caveats = (
        "The rate depends on the pictures, their number and the size of the noise. A change of the answer need not be a mistake: the "
        "answer may have been wrong before."
    )

    method: Method = Param("gradient", description="gradient: steps on the margin; deepfool: the paper's algorithm")
    norm: Literal["linf", "l2"] = Param("linf", description="norm in which the noise is bounded")
    eps: float = Param(10.0, gt=0, description="its size: in 255ths in L-inf; in L2 of pictures in [0, 1]")
    share: float = Param(0.8, gt=0, lt=1, description="share of the pictures it is made on; the others judge it")
    passes: int = Param(10, ge=1, le=10_000, description="passes over the pictures, at most")
    batch: int = Param(25, ge=1, description="gradient: pictures a step")
    step_size: float = Param(0.1, gt=0, le=2, description="gradient: first length of a step as a share of eps")
    shift: float = Param(
        0.07, ge=0, le=0.5, description="gradient: pictures are rolled by up to this share of their side, and mirrored; 0: not"
    )
    wanted: float = Param(0.8, gt=0, le=1, description="deepfool: share of its own pictures at which it stops")

    @in_full_precision
    def run(self, ctx: Context) -> Result:
        import torch

        if self.norm == "linf" and self.eps > 255:
            raise ConfigError(f"universal_perturbation.eps: {self.eps:g} is more than 255 255ths, the whole range of a pixel")
        model, data = ctx.model, ctx.dataset
        if len(data) < 4:
            raise NotApplicable(f"needs at least four pictures, some to make the noise on and some to judge it; there are {len(data)}")
        if model.class_count < 2:
            raise NotApplicable("needs at least two classes")
        eps = self.eps / 255 if self.norm == "linf" else self.eps
        every = torch.from_numpy(data.pictures(model.input)).permute(0, 3, 1, 2).to(ctx.device)  # uint8
        draws = ctx.draws(["universal"])
        order = draws.rand((len(every),))[0].argsort()
        count = min(len(every) - 2, max(2, round(self.share * len(every))))
        made_on, judged = every[order[:count]], every[order[count:]]
        if self.method == "gradient":
            noise = universal_gradient(
                model, made_on, eps, draws, norm=self.norm, passes=self.passes, batch=self.batch,
                chunk=ctx.max_batch, step=self.step_size,
                shift=self.shift, progress=ctx.report,
            )  # fmt: skip
        else:
            noise = universal_deepfool(
                model, made_on, eps, draws, norm=self.norm, passes=self.passes, wanted=self.wanted, chunk=ctx.max_batch, progress=ctx.report
            )
        signs = project_noise(
            1e9 * draws.randn(noise.shape)[0].sign() if self.norm == "l2" else eps * draws.randn(noise.shape)[0].sign(), eps, self.norm
        )
        before = answers(model, judged, batch=ctx.max_batch)
        after = answers(model, judged, noise, batch=ctx.max_batch)
        hits = (after != before).cpu().numpy()
        own = (answers(model, made_on, noise, batch=ctx.max_batch) != answers(model, made_on, batch=ctx.max_batch)).cpu().numpy()
        random = (answers(model, judged, signs, batch=ctx.max_batch) != before).cpu().numpy()
        size = in_255ths(eps) if self.norm == "linf" else f"{eps:g} in L2"
        rows = [
            [what, float(h.mean()), *interval(h), int(h.sum()), len(h)]
            for what, h in (
                ("the noise, on unseen pictures", hits),
                ("the noise, on its own pictures", own),
                ("random signs, on unseen pictures", random),
            )
        ]
        metrics = [
            rate("fooled", hits, "share of unseen pictures whose answer the noise changes", f"{size}, made on {count} pictures"),
            rate("fooled_random", random, "the same for random signs of the same size", size),
            Metric("gain", float(hits.mean() - random.mean()), about="how much more it changes than random signs do"),
        ]
        if ctx.labels is not None:
            labels = ctx.labels[order[count:]]
            right, still = ((a == labels).cpu().numpy() for a in (before, after))
            metrics.append(rate("clean_accuracy", right, "accuracy on the unseen pictures as they are"))
            metrics.append(rate("attacked_accuracy", still, "accuracy on them with the noise", size))
        stretched = 0.5 + 0.5 * noise / noise.abs().max().clamp_min(1e-12)
        artifacts: list[Any] = [
            Images("perturbation", stretched[None], captions=["the noise, stretched to the whole range"], exact=noise.shape[-1] < 64,
                   caption=f"At most {float(noise.abs().max()) * 255:.3g}/255 a pixel, {float(noise.norm()):.3g} in L2."),
            self._shown(ctx, judged, noise, before, after),
            Table("rates", ["what", "answers changed", "from", "to", "pictures", "of"], rows),
            Table("becomes", ["class named with the noise", "unseen pictures", "named so before"], self._becomes(ctx, before, after)),
            Arrays("noise", {"noise": noise}),
        ]  # fmt: skip
        return Result(artifacts, metrics)

    def _shown(self, ctx: Context, judged: Tensor, noise: Tensor, before: Tensor, after: Tensor) -> Images:
        """Unseen pictures, those first whose answer changes, and the same with the noise."""
        import torch

        from .universal import pixels

        order = (before == after).int().argsort(stable=True)[:SHOWN]
        sheet, captions = [], []
        for i in order.tolist():
            picture = pixels(ctx.model, judged[i : i + 1])[0]
            sheet += [picture, (picture + noise).clamp(0, 1)]
            captions += [ctx.model.class_name(int(before[i])), ctx.model.class_name(int(after[i]))]
        return Images(
            "pictures", torch.stack(sheet), captions=captions, columns=4, exact=noise.shape[-1] < 64, caption="Unseen, and with the noise."
        )

    def _becomes(self, ctx: Context, before: Tensor, after: Tensor) -> list[list[Any]]:
        """The paper's dominant labels: which answers the noise leads to."""
        names, counts = np.unique(after.cpu().numpy(), return_counts=True)
        old = before.cpu().numpy()
        return [
            [ctx.model.class_name(int(names[k])), int(counts[k]), int((old == names[k]).sum())]
            for k in np.argsort(-counts, kind="stable")[:8]
        ]
