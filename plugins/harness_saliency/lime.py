from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness import Heatmaps, Images, Metric, Paper, Param, Result, TargetSpec, Technique

from .integrated_gradients import baseline
from .measures import SCORED, Scored, answer, captions, concentration, unit_of, zero_notes
from .saliency import TARGET

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context

Distance = Literal["cosine", "euclidean"]


class Lime(Technique):
    """The weights of superpixels in a linear model that answers as the network does around a picture,
    argmin_g sum_z pi(z) (f(z) - g(z))^2 + ridge ||g||^2 with pi(z) = exp(-D(x, z)^2 / width^2) over copies z whose superpixels
    are switched off at random (Ribeiro et al. 2016, arXiv:1602.04938, eq. 1 and 2).

    Superpixels are SLIC's. Copies are drawn in proportion to pi instead of being weighted by it, which tends to the same g with
    less noise; where superpixels have no more combinations than `samples`, every one is tried once and weighted, and nothing is
    left to chance. By default f is the score: the paper's probability saturates, and a linear model fits it worse.
    Cost: `samples` forward passes a picture.
    """

    name = "lime"
    family = "saliency"
    paper = Paper(
        "Ribeiro, Singh, Guestrin", 2016, '"Why Should I Trust You?": Explaining the Predictions of Any Classifier', arxiv="1602.04938"
    )
    needs = frozenset({"images"})
    attribution = "lime"
    reading = (
        "Red superpixels speak for the class, blue ones against it, by the share of the answer that the scale gives. The fit says "
        "how much of the network's behaviour the linear model explains: near 1 believe it, below one half do not."
    )
    caveats = (
        "The answer depends on the superpixels, on what they are switched off with and on how wide the neighbourhood is. Superpixels "
        "that can stand in for one another share their weight or both look unimportant."
    )
    audit = {"full": {}}
    draft = {"samples": 250}

    target: TargetSpec = Param("predicted", description=TARGET)
    samples: int = Param(1000, ge=2, le=1_000_000, description="copies a picture")
    segments: int = Param(30, ge=1, le=2000, description="superpixels aimed at; small pictures get fewer, of four pixels at least")
    compactness: float = Param(10.0, gt=0, description="SLIC's: higher gives squarer superpixels, lower follows colours more")
    fill: Literal["mean", "grey", "black", "white", "blur", "own"] = Param(
        "mean",
        description="what is seen of a superpixel that is off: the training mean, a grey, a blurred copy, or its own mean colour, "
        "which leaves superpixels of one colour as they are",
    )
    distance: Distance = Param(
        "cosine", description="D, between the vectors of what is on: 1 - cosine, or the share of superpixels off, as a root"
    )
    width: float = Param(0.25, gt=0, description="width of the kernel, in units of D")
    ridge: float = Param(1.0, ge=0, description="weight of the ridge penalty")
    scored: Scored = Param("score", description=SCORED)

    def run(self, ctx: Context) -> Result:
        segments = [self.superpixels(image) for image in ctx.images]
        found = self.explain(ctx, segments)
        maps = np.stack([f.weights[s] for f, s in zip(found, segments, strict=True)])
        fit = [f.fit for f in found]
        unit = f"share of the {unit_of(self.scored, ctx)}"
        texts = [f"{text}, fit {value:.2f}" for text, value in zip(captions(ctx), fit, strict=True)]
        x = ctx.images
        lines = np.stack([outlines(s) for s in segments])
        drawn = x.cpu().float().numpy() * (1 - lines[:, None]) + lines[:, None]
        tensor: Any = x.new_tensor(maps)
        artifacts: list[Any] = [
            Heatmaps("lime", maps, captions=texts, signed=True, unit=unit),
            Images("superpixels", drawn, captions=[f"{s.max() + 1} superpixels" for s in segments], columns=4, exact=x.shape[-1] < 64),
        ]
        metrics = [
            concentration(tensor),
            Metric(
                "fit", float(np.mean(fit)), better="higher", per_image=fit,
                about="adjusted share of the variance of the answers to nearby masked copies that the linear model explains",
            ),
        ]  # fmt: skip
        single = [
            f"{name}: one superpixel only; its weight is the whole" for name, s in zip(ctx.ids, segments, strict=True) if s.max() == 0
        ]
        return Result(artifacts, metrics, [*zero_notes(tensor, ctx.ids), *single])

    def superpixels(self, image: Tensor) -> np.ndarray:
        """(H, W) superpixel numbers from 0 on (Achanta et al. 2012, doi:10.1109/TPAMI.2012.120)."""
        from skimage.segmentation import slic

        pixels = image.detach().cpu().double().numpy().transpose(1, 2, 0)
        wanted = self.wanted(*pixels.shape[:2])
        if wanted == 1:
            return np.zeros(pixels.shape[:2], dtype=np.int64)
        # Grey as colour: SLIC weighs lightness of 0 to 100 against places, and leaves grey in [0, 1]. Smoothed, or noise falls apart.
        pixels = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
        found = slic(pixels, n_segments=wanted, compactness=self.compactness, sigma=1, start_label=0, channel_axis=-1)
        return np.unique(found, return_inverse=True)[1].reshape(found.shape).astype(np.int64)

    def wanted(self, height: int, width: int) -> int:
        """How many superpixels are asked for."""
        return min(self.segments, max(1, height * width // 4))

    def explain(self, ctx: Context, segments: list[np.ndarray]) -> list[Explained]:
        """The linear model of each picture."""
        import torch

        x, target, model = ctx.images, ctx.target, ctx.model
        places = [torch.from_numpy(s).to(x.device) for s in segments]
        off = self._fill(ctx, segments)
        masks, near = zip(*(self.masks(ctx, i, int(s.max()) + 1) for i, s in enumerate(segments)), strict=True)
        ends = np.cumsum([len(m) for m in masks]).tolist()
        starts = [0, *ends[:-1]]
        on = [torch.from_numpy(m).to(x.device) for m in masks]

        def work(rows: slice) -> Tensor:
            first, last = (int(np.searchsorted(ends, row, side="right")) for row in (rows.start, rows.stop - 1))
            parts, owners = [], []
            for i in range(first, last + 1):
                mine = on[i][max(rows.start, starts[i]) - starts[i] : min(rows.stop, ends[i]) - starts[i]]
                parts.append(torch.where(mine[:, places[i]].unsqueeze(1), x[i], off[i]))
                owners += [i] * len(mine)
            copies = parts[0] if len(parts) == 1 else torch.cat(parts)
            picture = torch.tensor(owners, device=x.device)
            with torch.no_grad():
                value = answer(target, target.output(model, copies), picture, self.scored)
            ctx.report("copies", rows.stop, ends[-1])
            return value

        answers = torch.cat(list(ctx.batched(ends[-1], work))).cpu().double().numpy()  # MPS has no float64
        return [fit_linear(m, answers[a:b], w, self.ridge) for m, w, a, b in zip(masks, near, starts, ends, strict=True)]

    def masks(self, ctx: Context, picture: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """bool (samples, count), which superpixels are on, and the weight of each mask.

        All combinations, weighted by pi, where there are no more than `samples`; otherwise drawn in proportion to pi, with as
        many on as the quantiles of their number say.
        """
        if count < 31 and 2**count <= self.samples:
            every = np.array(list(itertools.product((True, False), repeat=count)))
            near = nearness(every, self.distance, self.width)
            return every, near * (self.samples / near.sum())  # as much in all as drawn ones have, for the ridge's sake
        draws = ctx.draws([ctx.ids[picture]], stream="masks")
        below = np.cumsum(likelihood(count, self.distance, self.width))
        place = (np.arange(self.samples) + draws.rand((self.samples,))[0].cpu().numpy()) / self.samples
        on = np.searchsorted(below / below[-1], place).clip(0, count)
        rank = draws.rand((self.samples, count))[0].cpu().numpy().argsort(1).argsort(1)
        return rank < on[:, None], np.ones(self.samples)

    def _fill(self, ctx: Context, segments: list[np.ndarray]) -> Tensor:
        """(N, C, H, W) what is seen where a superpixel is off."""
        import torch

        if self.fill != "own":
            return baseline(ctx, self.fill)
        filled = []
        for image, segment in zip(ctx.images.cpu().double().numpy(), segments, strict=True):
            flat = segment.ravel()
            sums = np.stack([np.bincount(flat, weights=channel.ravel()) for channel in image])
            filled.append((sums / np.bincount(flat))[:, segment])
        return torch.from_numpy(np.stack(filled)).to(ctx.images.dtype).to(ctx.device)


class Explained:
    """A linear model around a picture: `weights` (d,) and the share of variance it explains."""

    def __init__(self, weights: np.ndarray, fit: float) -> None:
        self.weights, self.fit = weights, fit


def nearness(masks: np.ndarray, distance: Distance, width: float) -> np.ndarray:
    """(n,) weights pi = exp(-D^2 / width^2) of masks (n, d) by their distance from the mask with everything on."""
    share = masks.mean(1)
    # The cosine between a mask of k ones and d ones is sqrt(k / d); of an empty mask, zero.
    d = 1 - np.sqrt(share) if distance == "cosine" else np.sqrt(1 - share)
    return np.exp(-np.square(d) / width**2)


def likelihood(count: int, distance: Distance, width: float) -> np.ndarray:
    """(count + 1,) how many masks have k superpixels on, times their weight pi, up to a factor."""
    from scipy.special import gammaln

    on = np.arange(count + 1)
    ways = gammaln(count + 1) - gammaln(on + 1) - gammaln(count - on + 1)
    return np.exp(ways - ways.max()) * nearness((on[:, None] > np.arange(count)), distance, width)


def fit_linear(masks: np.ndarray, answers: np.ndarray, near: np.ndarray, ridge: float) -> Explained:
    """Weighted ridge regression with an intercept, which is not penalised, in double precision."""
    z = masks.astype(np.float64)
    if np.ptp(answers) <= 1e-6 * np.abs(answers).max():  # rounding
        return Explained(np.zeros(z.shape[1]), 0.0)
    if z.shape[1] == 1:  # on and off: nothing to fit, and nothing for a penalty to decide
        return Explained(answers[z[:, 0] == 1].mean(keepdims=True) - answers[z[:, 0] == 0].mean(), 1.0)
    share = near / near.sum()
    centred, left = z - share @ z, answers - share @ answers
    normal = centred.T @ (near[:, None] * centred)
    moment = centred.T @ (near * left)
    if ridge:
        weights = np.linalg.solve(normal + ridge * np.eye(len(normal)), moment)
    else:
        weights = np.linalg.lstsq(normal, moment, rcond=None)[0]
    total = float(near @ np.square(left))
    rest = float(near @ np.square(left - centred @ weights))
    fit = 1 - rest / total if total > 0 else 0.0
    # Adjusted for the number of weights, which fit noise as well (Wherry 1931).
    count, free = z.shape
    return Explained(weights, max(0.0, 1 - (1 - fit) * (count - 1) / (count - free - 1)) if count > free + 1 else 0.0)


def outlines(segments: np.ndarray) -> np.ndarray:
    """float32 (H, W): 1 where the pixel to the right or below belongs to another superpixel."""
    edge = np.zeros(segments.shape, dtype=np.float32)
    edge[:, :-1] += segments[:, :-1] != segments[:, 1:]
    edge[:-1] += segments[:-1] != segments[1:]
    return edge.clip(0, 1)
