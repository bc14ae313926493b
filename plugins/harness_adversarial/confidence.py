from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from harness import Curve, Metric, NotApplicable, Paper, Param, Result, Table, Technique
from harness.technique import Further

from .attacks import Attack, in_255ths, perturbed
from .shared import interval

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context, Dataset

SCORES = ("largest probability", "energy", "Mahalanobis", "k-NN")
SLUGS = ("probability", "energy", "mahalanobis", "knn")
COVERED = (1.0, 0.9, 0.8, 0.5)


class Seen(NamedTuple):
    """What the model makes of some pictures."""

    logits: np.ndarray  # (N, K) float64
    features: np.ndarray  # (N, D) float64


class Confidence(Technique):
    """Does the model know when it does not? Calibration and temperature scaling (Guo et al. 2017, arXiv:1706.04599), accuracy of the
    answers it is surest of (Geifman & El-Yaniv 2017, arXiv:1705.08500), and whether pictures of another kind are told by the largest
    probability (Hendrycks & Gimpel 2016, arXiv:1610.02136), the energy log sum exp f (Liu et al. 2020, arXiv:2010.03759), the Mahalanobis
    distance to the nearest class (Lee et al. 2018, arXiv:1807.03888) or that to the k-th neighbour (Sun et al. 2022, arXiv:2204.06507).

    Every other picture fits the temperature, the classes' means and their covariance; the others are judged. Cost: two forward passes a
    picture, and `steps` of both kinds for adversarial ones.
    """

    name = "confidence"
    family = "adversarial"
    version = 2
    paper = Paper("Guo, Pleiss, Sun, Weinberger", 2017, "On Calibration of Modern Neural Networks", arxiv="1706.04599")
    needs = frozenset({"dataset", "labels", "classifier"})
    reading = (
        "On the diagonal of the first plot the model is right as often as it says. The second: accuracy when only the surest answers "
        "count. The table: an AUROC of 1 tells strange pictures from the dataset's every time, one half is a guess."
    )
    caveats = (
        "Few pictures make the calibration error look larger than it is; mind its interval. Strange pictures that are easy to tell, "
        "like noise, say little about those that are not."
    )
    audit = {"full": {}}

    bins: int = Param(15, ge=2, le=1000, description="bins of equal width over the confidence")
    others: tuple[str, ...] = Param(("textures",), description="datasets of another kind, by their names in the registry")
    noise: bool = Param(True, description="also pictures of uniform noise")
    eps: float = Param(8.0, ge=0, le=255, description="budget of the adversarial pictures in L-inf, in 255ths; 0: none")
    steps: int = Param(20, ge=1, le=10_000, description="steps of that attack")
    neighbours: int = Param(10, ge=1, description="k of the k-NN distance")
    strange: int = Param(200, ge=1, description="pictures of each other kind at most")
    resamples: int = Param(500, ge=10, le=100_000, description="bootstrap resamples for the intervals")

    def further(self) -> Further:
        return Further(datasets=self.others)

    def run(self, ctx: Context) -> Result:
        if ctx.model.class_count < 2:
            raise NotApplicable("needs at least two classes")
        labels = ctx.labels
        assert labels is not None
        if len(labels) < 4:
            raise NotApplicable(f"needs at least four pictures, two to fit and two to judge; there are {len(labels)}")
        truth = labels.cpu().numpy()
        seen = looked_at(ctx, ctx.dataset)
        fit = np.arange(len(truth)) % 2 == 0
        judged = ~fit
        temperature, at_bound = fitted_temperature(seen.logits[fit], truth[fit])
        before, after = softmax(seen.logits[judged]), softmax(seen.logits[judged] / temperature)
        own = truth[judged]
        right = before.argmax(1) == own
        random = np.random.default_rng(ctx.seed)
        names = ("as it is", f"temperature {temperature:.3g}")
        errors: list[tuple[float, float, float]] = []
        rows: list[list[Any]] = []
        for name, chances in zip(names, (before, after), strict=True):
            sure = chances.max(1)
            value = calibration_error(sure, right, self.bins)
            draws = random.integers(0, len(sure), (self.resamples, len(sure)))
            spread = np.array([calibration_error(sure[d], right[d], self.bins) for d in draws])
            # The resamples' error is biased upwards as the sample's own is: their spread about the value is what counts.
            low, high = (float(np.clip(value + q, 0, 1)) for q in np.quantile(spread - spread.mean(), (0.025, 0.975)))
            errors.append((value, low, high))
            loss = float(-np.log(np.maximum(chances[np.arange(len(own)), own], 1e-30)).mean())
            brier = float(np.square(chances - np.eye(chances.shape[1])[own]).sum(1).mean())
            rows.append([name, value, low, high, loss, brier, float(sure.mean()), float(right.mean())])
        columns = ["probabilities", "calibration error", "from", "to", "log loss", "Brier score", "mean confidence", "accuracy"]
        artifacts: list[Any] = [reliability(before, after, right, self.bins, names), Table("calibration", columns, rows)]
        curve, area = selective(after.max(1), right)
        artifacts.append(curve)
        ood = self._strange(ctx, seen, truth, fit, judged, temperature)
        metrics = [
            Metric("accuracy", float(right.mean()), better="higher", per_image=right.astype(float).tolist(),
                   about="share of the judged pictures that the model gets right", detail="{:.3f} to {:.3f}".format(*interval(right))),
            Metric("calibration_error", errors[0][0], better="lower", about="expected calibration error (ECE)",
                   detail=f"{errors[0][1]:.3f} to {errors[0][2]:.3f}, {len(own)} pictures in {self.bins} bins"),
            Metric("calibration_error_scaled", errors[1][0], better="lower", about="the same after temperature scaling",
                   detail=f"{errors[1][1]:.3f} to {errors[1][2]:.3f}, temperature {temperature:.3g}"),
            Metric("selective_risk", area, better="lower", about="area under the curve of error over coverage (AURC)"),
        ]  # fmt: skip
        notes = [f"the temperature is fitted on {int(fit.sum())} pictures; {int(judged.sum())} others are judged"]
        if at_bound:
            why = (
                "stays 1: the pictures it is fitted on are all right"
                if temperature == 1
                else f"is at the end of its range, {temperature:.3g}"
            )
            notes.append(f"the temperature {why}; fit it on pictures that the model has not learnt from")
        if not right.any():
            notes.append("the model is wrong on every picture that is judged")
        if ood:
            columns = ["strange pictures", "pictures", *SCORES, "named with at least 90 %"]
            artifacts.append(Table("strange", columns, ood))
            for k, score in enumerate(SCORES):
                about = f"mean AUROC of telling strange pictures from the dataset's by {score}"
                metrics.append(Metric(f"auroc_{SLUGS[k]}", float(np.mean([row[2 + k] for row in ood])), better="higher", about=about))
        return Result(artifacts, metrics, notes)

    def _strange(
        self, ctx: Context, seen: Seen, truth: np.ndarray, fit: np.ndarray, judged: np.ndarray, temperature: float
    ) -> list[list[Any]]:
        """A row for each kind of strange picture: how well each score tells them from the judged ones."""
        from sklearn.metrics import roc_auc_score

        measure = Scores(seen.features[fit], truth[fit], self.neighbours)
        own = measure(Seen(seen.logits[judged], seen.features[judged]))
        rows = []
        for name, found in self._kinds(ctx, np.flatnonzero(judged)):
            theirs = measure(found)
            mark = np.r_[np.zeros(len(own[0])), np.ones(len(theirs[0]))]
            areas = [float(roc_auc_score(mark, -np.r_[a, b])) for a, b in zip(own, theirs, strict=True)]
            rows.append([name, len(found.logits), *areas, float((softmax(found.logits / temperature).max(1) >= 0.9).mean())])
        return rows

    def _kinds(self, ctx: Context, judged: np.ndarray) -> list[tuple[str, Seen]]:
        import torch

        from harness.context import to_images

        kinds: list[tuple[str, Seen]] = []
        spec = ctx.model.input
        count = min(self.strange, len(judged))
        if self.noise:
            draws = ctx.draws([f"noise {i}" for i in range(count)])
            pictures = draws.rand((spec.channels, spec.size, spec.size))
            kinds.append(("uniform noise", look(ctx, pictures)))
        for name in self.others:
            other = ctx.further_dataset(name).select(self.strange)
            kinds.append((name, looked_at(ctx, other)))
        if self.eps:
            some = ctx.dataset.select(indices=judged[:count].tolist())
            assert ctx.labels is not None
            own = ctx.labels[judged[:count]]
            images = to_images(some.pictures(spec), ctx.device, ctx.model.dtype)
            settings = Attack("pgd", "linf", self.steps, 0.1, random_start=True)

            def worse(rows: slice) -> Tensor:
                return perturbed(ctx.model, images[rows], own[rows], settings, self.eps / 255, ctx.draws(list(some.ids[rows])))

            made = torch.cat(list(ctx.batched(len(images), worse)))
            kinds.append((f"adversarial, {in_255ths(self.eps / 255)}", look(ctx, made)))
        return kinds


class Scores:
    """The four scores, high where a picture looks like those it was fitted on."""

    def __init__(self, features: np.ndarray, labels: np.ndarray, neighbours: int) -> None:
        from sklearn.neighbors import NearestNeighbors

        self.means = np.stack([features[labels == c].mean(0) for c in np.unique(labels)])
        place = np.searchsorted(np.unique(labels), labels)
        centred = features - self.means[place]
        # Few pictures and many features leave the covariance singular; shrinkage (Ledoit & Wolf 2004) keeps it whole. Where every class
        # has one picture nothing is left of it, and distances are plain ones.
        self.plain, self.axes, self.less = 1.0, np.zeros((features.shape[1], 0)), np.zeros(0)
        if np.square(centred).sum() > 1e-12:
            self.plain, self.axes, self.less = precision(centred)
        length = np.linalg.norm(features, axis=1, keepdims=True)
        self.k = min(neighbours, len(features))
        self.near = NearestNeighbors(n_neighbors=self.k).fit(features / np.maximum(length, 1e-12))

    def __call__(self, seen: Seen) -> tuple[np.ndarray, ...]:
        from scipy.special import logsumexp

        # x' P x - 2 x' P m + m' P m in products of matrices: the differences (N, C, D) of many pictures and classes fit no memory.
        middle = self.means.mean(0)  # nearer to both, so that less is lost when large numbers are subtracted
        here, there = seen.features - middle, self.means - middle
        along, beside = here @ self.axes, there @ self.axes
        own = self.plain * np.square(here).sum(1) - np.square(along) @ self.less
        others = self.plain * np.square(there).sum(1) - np.square(beside) @ self.less
        both = self.plain * here @ there.T - (along * self.less) @ beside.T
        distance = (own[:, None] - 2 * both + others).min(1)
        length = np.linalg.norm(seen.features, axis=1, keepdims=True)
        kth = self.near.kneighbors(seen.features / np.maximum(length, 1e-12))[0][:, -1]
        return softmax(seen.logits).max(1), logsumexp(seen.logits, axis=1), -distance, -kth


def precision(centred: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """(p, V (D, r), l (r,)) with P = p I - V diag(l) V' the inverse of the covariance (1 - s) X'X / n + s m I of n centred features X
    (n, D), m being its mean eigenvalue and s the shrinkage of Ledoit & Wolf (2004, "A well-conditioned estimator for large-dimensional
    covariance matrices", eq. 14), as scikit-learn's LedoitWolf has it. Nothing of D x D is made where there are fewer pictures than that.
    """
    n, d = centred.shape
    small = centred @ centred.T / n if n < d else centred.T @ centred / n
    values, vectors = np.linalg.eigh(small)
    mean = np.trace(small) / d
    squares = np.square(small).sum()
    noise = (np.square(np.square(centred).sum(1)).sum() / n - squares) / (d * n)
    apart = squares / d - mean**2
    shrinkage = min(noise, apart) / apart if apart > 0 and noise > 0 else 0.0
    kept = values > 1e-12 * max(values[-1], 1e-300)
    values, vectors = values[kept], vectors[:, kept]
    axes = centred.T @ vectors / np.sqrt(n * values) if n < d else vectors
    least = shrinkage * mean
    if least <= 1e-12 * mean:  # what has no spread then counts nothing, as in a pseudo-inverse
        return 0.0, axes, -1 / values
    plain = 1 / least
    return plain, axes, plain - 1 / ((1 - shrinkage) * values + least)


def look(ctx: Context, images: Tensor) -> Seen:
    """Logits and what the last linear layer receives."""
    import torch

    def some(rows: slice) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return ctx.model(images[rows]), ctx.model.embedding(images[rows])

    parts = list(ctx.batched(len(images), some))
    logits, features = (torch.cat([p[k] for p in parts]).cpu().double().numpy() for k in (0, 1))
    return Seen(logits, features)


def looked_at(ctx: Context, dataset: Dataset) -> Seen:
    """The same of a whole dataset, which need not fit into memory."""
    from harness.context import to_images

    parts = [look(ctx, to_images(pixels, ctx.device, ctx.model.dtype)) for _, pixels in dataset.batches(ctx.model.input, ctx.max_batch)]
    return Seen(np.concatenate([p.logits for p in parts]), np.concatenate([p.features for p in parts]))


def softmax(logits: np.ndarray) -> np.ndarray:
    from scipy.special import softmax as soft

    found: np.ndarray = soft(logits, axis=1)
    return found


def calibration_error(sure: np.ndarray, right: np.ndarray, bins: int) -> float:
    """ECE: sum over bins of the share of pictures in it times |accuracy - mean confidence| (Guo et al. 2017, eq. 3)."""
    place = np.minimum((sure * bins).astype(int), bins - 1)
    gap = np.bincount(place, right - sure, bins)
    return float(np.abs(gap).sum() / len(sure))


def fitted_temperature(logits: np.ndarray, labels: np.ndarray) -> tuple[float, bool]:
    """The temperature of the least log loss, and whether there is one in the range from 1/20 to 20. Where all answers are right there is
    none, as ever surer ones lose ever less; it then stays 1."""
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    def loss(log_t: float) -> float:
        return float(-log_softmax(logits / np.exp(log_t), axis=1)[np.arange(len(labels)), labels].mean())

    if (logits.argmax(1) == labels).all():
        return 1.0, True
    end = np.log(20)
    best = float(minimize_scalar(loss, bounds=(-end, end), method="bounded", options={"xatol": 1e-6}).x)
    return float(np.exp(best)), bool(abs(best) > end - 0.05)


def reliability(before: np.ndarray, after: np.ndarray, right: np.ndarray, bins: int, names: tuple[str, str]) -> Curve:
    """Accuracy over confidence, bin by bin; bins without a picture are bridged."""
    middles = (np.arange(bins) + 0.5) / bins
    lines = {"right as often as said": middles}
    for name, chances in zip(names, (before, after), strict=True):
        sure = chances.max(1)
        place = np.minimum((sure * bins).astype(int), bins - 1)
        count = np.bincount(place, minlength=bins)
        full = count > 0
        share = np.bincount(place, right, bins)[full] / count[full]
        said = np.bincount(place, sure, bins)[full] / count[full]
        lines[name] = np.interp(middles, said, share)
    return Curve("reliability", middles, lines, "confidence", "accuracy", caption="Between bins that hold pictures lines are straight.")


def selective(sure: np.ndarray, right: np.ndarray) -> tuple[Curve, float]:
    """Accuracy of the surest answers over the share of pictures that are answered, and the area under the error."""
    order = np.argsort(-sure, kind="stable")
    count = np.arange(1, len(sure) + 1)
    error = 1 - np.cumsum(right[order]) / count
    perfect = 1 - np.minimum(right.sum(), count) / count
    caption = "; ".join(f"{c:.0%} answered: {1 - error[max(0, round(c * len(sure)) - 1)]:.3f}" for c in COVERED)
    lines = {"the surest first": 1 - error, "in the best order": 1 - perfect}
    return Curve("selective", count / len(sure), lines, "share answered", "accuracy", caption=caption), float(error.mean())
