from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import model_validator

from harness import Curve, Metric, NotApplicable, Paper, Param, Result, Table, Technique

from .intervals import Unknown, certified_linf
from .shared import interval, rate

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context

ABSTAINS = -1


class CertifiedRadius(Technique):
    """A radius within which no change whatever alters the answer of the smoothed model g(x) = argmax_c P(f(x + noise) = c): R = sigma
    Phi^-1(p), p being a lower bound of the chance of the class named most often (Cohen et al. 2019, arXiv:1902.02918, theorem 1).

    The class is chosen on `first` noisy copies and its chance bounded on `samples` others by Clopper and Pearson at the level `alpha`;
    below one half the model abstains. With `intervals` the plain model is certified besides in L-inf, by intervals carried through its
    layers (Gowal et al. 2018, arXiv:1810.12715). All pictures see the same noise, so that it is drawn once: each certificate holds with
    probability 1 - alpha as it stands, but those of several pictures are not independent. Cost: `first` + `samples` forward passes a
    picture.
    """

    name = "certified_radius"
    family = "adversarial"
    version = 2
    paper = Paper("Cohen, Rosenfeld, Kolter", 2019, "Certified Adversarial Robustness via Randomized Smoothing", arxiv="1902.02918")
    needs = frozenset({"images", "classifier"})
    reading = (
        "The curve is the share of pictures that are answered rightly and cannot be changed within the radius, in L2 of pictures in "
        "[0, 1]. It starts at the accuracy of the smoothed model, abstentions counting as errors."
    )
    caveats = (
        "The certificate is the smoothed model's, not the plain one's, and holds for each picture with probability 1 - alpha. A model "
        "that was not trained on noise is mostly wrong on it, so the curve judges it together with the smoothing."
    )
    audit = {"full": {"samples": 200}}

    sigma: float = Param(0.25, gt=0, le=10, description="std of the noise, of pixels in [0, 1]")
    first: int = Param(100, ge=1, description="noisy copies by which the class is chosen")
    samples: int = Param(1000, ge=1, description="noisy copies by which its chance is bounded")
    alpha: float = Param(0.001, gt=0, lt=1, description="chance at most that a certificate is wrong")
    intervals: tuple[float, ...] = Param((), description="also certify the plain model within these budgets in L-inf, in 255ths")

    @model_validator(mode="after")
    def _consistent(self) -> CertifiedRadius:
        wrong = [e for e in self.intervals if not 0 <= e <= 255]
        if wrong:
            raise ValueError(f"intervals: {wrong[0]:g} is outside 0 to 255; budgets are in 255ths of the range of a pixel")
        return self

    def run(self, ctx: Context) -> Result:
        from harness.device import full_precision

        classes = ctx.model.class_count
        if classes < 2:
            raise NotApplicable("needs at least two classes")
        labels = ctx.predicted if ctx.labels is None else ctx.labels
        truth = labels.cpu().numpy()
        plain = ctx.predicted.cpu().numpy() == truth
        notes, by_intervals = [], None
        if self.intervals:  # which are quick, and tell at once where they know no bounds
            try:
                with full_precision(ctx.device):
                    by_intervals = self._intervals(ctx, labels, plain)
            except Unknown as reason:
                notes.append(f"intervals: {reason}")
        chosen = counts(ctx, self.sigma, 0, self.first, classes).argmax(1)
        found = counts(ctx, self.sigma, self.first, self.samples, classes)[np.arange(len(truth)), chosen]
        low = np.array([lower_bound(int(k), self.samples, self.alpha) for k in found])
        radius = np.array([certificate(p, self.sigma) for p in low])
        answers = np.where(radius > 0, chosen, ABSTAINS)
        right = answers == truth
        most = self.sigma * float(normal_quantile(lower_bound(self.samples, self.samples, self.alpha)))
        radii = np.linspace(0, max(most, 1e-6), 51)
        line = [(right & (radius >= r)).mean() if r else right.mean() for r in radii]
        names = [*ctx.model.classes] or [str(i) for i in range(classes)]
        rows = [
            [
                ctx.ids[i],
                names[truth[i]],
                names[int(ctx.predicted[i])],
                "abstains" if answers[i] == ABSTAINS else names[answers[i]],
                int(found[i]),
                float(low[i]),
                float(radius[i]),
            ]
            for i in range(len(truth))
        ]
        columns = ["picture", "label", "plain answer", "smoothed answer", f"of {self.samples} copies", "chance at least", "radius (L2)"]
        caption = f"sigma {self.sigma:g}; no radius above {max(0.0, most):.3g} can be shown with {self.samples} copies."
        artifacts: list[Any] = [
            Curve("certified", radii, {"certified accuracy": line}, "radius (L2, pixels in [0, 1])", "share of pictures", caption=caption),
            Table("pictures", columns, rows),
        ]
        each = np.where(right, radius, 0.0)
        about = "radius within which the answer is right and certain; 0 where it is wrong or none is given"
        metrics = [
            rate("clean_accuracy", plain, "share of untouched pictures that the plain model gets right"),
            rate("smoothed_accuracy", right, "share of pictures that the smoothed model gets right and is certain of"),
            Metric("radius", float(each.mean()), "L2", "higher", per_image=each.tolist(), about=about, detail=f"sigma {self.sigma:g}"),
            rate("abstains", answers == ABSTAINS, "share of pictures for which the smoothed model gives no answer", better="lower"),
        ]
        if ctx.labels is None:
            notes.append("the pictures have no labels of this model: what counts is its own answer")
        if by_intervals is not None:
            curve, table, last = by_intervals
            artifacts += [curve, table]
            metrics.append(last)
        return Result(artifacts, metrics, notes)

    def _intervals(self, ctx: Context, labels: Tensor, plain: np.ndarray) -> tuple[Curve, Table, Metric]:
        import torch

        budgets = sorted(set(self.intervals))
        hits = []
        for eps in budgets:

            def sure(rows: slice, eps: float = eps) -> Tensor:
                return certified_linf(ctx.model, ctx.images[rows], labels[rows], eps / 255)

            parts = list(ctx.batched(len(labels), sure))
            hits.append(torch.cat(parts).cpu().numpy() & plain)
        lines = {"certified by intervals": [plain.mean(), *(h.mean() for h in hits)]}
        x = [0.0, *budgets]
        curve = Curve(
            "certified_linf", x, lines, "eps in 255ths (L-inf)", "share of pictures", caption="The plain model, by interval bounds."
        )
        rows = [[f"{eps:g}/255", float(h.mean()), *interval(h), int(h.sum()), len(h)] for eps, h in zip(budgets, hits, strict=True)]
        table = Table("intervals", ["eps", "certified", "from", "to", "pictures", "of"], rows)
        about = "share of pictures that no change within the largest budget in L-inf can change, by interval bounds"
        return curve, table, rate("certified_linf", hits[-1], about, f"eps {budgets[-1]:g}/255")


def counts(ctx: Context, sigma: float, start: int, samples: int, classes: int) -> np.ndarray:
    """(N, K) how often each class is named for noisy copies `start` to `start + samples` of each picture. Copy j has the noise j in
    any batch and for every picture."""
    import torch

    total = torch.zeros((len(ctx.images), classes), dtype=torch.int64, device=ctx.device)
    done = 0

    def some(rows: slice) -> Tensor:
        nonlocal done
        draws = ctx.draws([f"noise {j}" for j in range(start + rows.start, start + rows.stop)])
        # Laid out as pictures are, once for all of them.
        noise = (sigma * draws.randn(ctx.images.shape[1:])).contiguous(memory_format=torch.channels_last)
        found = torch.zeros_like(total)
        with torch.no_grad():
            for i, image in enumerate(ctx.images):
                named = ctx.model(image + noise).argmax(1)
                found[i].index_add_(0, named, torch.ones_like(named))  # not bincount, which waits for the device
        ctx.report("noisy copies", done + rows.stop, samples)
        return found

    for part in ctx.batched(samples, some):
        total += part
    return total.cpu().numpy()


def lower_bound(k: int, n: int, alpha: float) -> float:
    """The lower end of Clopper and Pearson's one-sided interval at level 1 - alpha for k hits of n."""
    from scipy.stats import beta

    return 0.0 if k == 0 else float(beta.ppf(alpha, k, n - k + 1))


def certificate(p: float, sigma: float) -> float:
    """sigma Phi^-1(p), 0 where p is no majority."""
    return float(sigma * normal_quantile(p)) if p > 0.5 else 0.0


def normal_quantile(p: float | Sequence[float]) -> Any:
    from scipy.stats import norm

    return norm.ppf(p)
