from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import model_validator

from harness import ConfigError, EveryMap, Heatmaps, Images, Metric, NotApplicable, Paper, Param, Result, TargetSpec, Technique

from .measures import captions
from .saliency import TARGET
from .spreading import layers_of, likely, takes_twice

if TYPE_CHECKING:
    from harness import Context

BACKGROUND, FOREGROUND, MAYBE_BACKGROUND, MAYBE_FOREGROUND = range(4)  # OpenCV's names for them: GC_BGD, GC_FGD, ...
OUTLINE = (1.0, 0.15, 0.1)
SURE = 0.35  # how far from the threshold towards the most and the least, beyond which a place is sure to be the object's, or background
HOLE = 0.15
DOUBTFUL = (1.0, 0.75, 0.1)  # the outline's colour then
APART = 0.3  # less than this between the cut-out and the rest makes it doubtful (chosen on the pictures that bench/cutouts.py counts)


class GrabcutSegmentation(Technique):
    """The object of a picture cut out without a label for any pixel: the brightest pixels of a saliency map are taken for the
    object's and others for background, and a colour model with a graph cut decides the rest
    (Simonyan et al. 2013, arXiv:1312.6034, sec. 3.2; GrabCut: Rother et al. 2004, doi:10.1145/1015706.1015720).

    A map marks what the model looks at, of a dog the head. So the map, smoothed first, of several techniques' maps the geometric mean,
    spreads to places that are alike for the network and in colour (Zhou et al. 2004; as class maps do in Ahn & Kwak 2018,
    arXiv:1803.10464), and against it spread the border of the picture, where the map is dark, and what is darkest elsewhere. Otsu's
    threshold parts what has more to do with the one from what has with the other, and what is far from it is a seed. `spread=none` is the
    paper's own way: seeds are the pixels at or above the 95 % and at or below the 30 % quantile of the map. Pieces of the cut without a
    seed of the object are dropped and holes filled. A cut-out that has hardly more to do with the map than the rest has is called doubtful.
    Where the dataset has masks of the objects, the overlap is measured. Cost: the maps', one forward pass of twice the sides, and the
    spreading and the cut on the CPU.
    """

    name = "grabcut_segmentation"
    family = "saliency"
    version = 5
    paper = Paper("Simonyan, Vedaldi, Zisserman", 2013, "Deep Inside Convolutional Networks", arxiv="1312.6034")
    needs = frozenset({"images"})
    reading = (
        "The outline should follow the object that the model names; it is yellow where the cut-out is doubtful, which only spreading can "
        "tell. Seeds: red is taken for the object, blue for background, the rest is decided by colour."
    )
    caveats = (
        "Neither the spreading nor the cut knows objects: where object and background are alike it leaks, and it may take along what the "
        "object stands on or lies beside. It is a help for annotation, not a segmentation to rely on. From where on a cut-out is doubtful "
        "was chosen with squeezenet1_1 on photographs."
    )
    audit = {"full": {}}

    target: TargetSpec = Param("predicted", description=TARGET)
    maps: tuple[str, ...] = Param(
        ("guided_backprop", "smoothgrad", "grad_cam"),
        min_length=1,
        description="techniques whose maps give the seeds; of several the geometric mean",
    )
    spread: Literal["alike", "none"] = Param("alike", description="alike: the map spreads to what the network takes for alike")
    smooth: float = Param(0.05, ge=0, le=0.5, description="Gaussian blur of the map before, as a share of the picture's shorter side")
    foreground: float = Param(
        0.95, gt=0, lt=1, description="without spreading: quantile of the map from which on a pixel is taken for the object"
    )
    background: float = Param(0.30, gt=0, lt=1, description="without spreading: quantile up to which it is taken for background")
    lean: float = Param(0.6, gt=0, lt=1, description="without spreading: quantile above which what is open starts as likely the object's")
    iterations: int = Param(5, ge=1, le=100, description="rounds of colour model and cut")
    seeds: Literal["sure", "likely"] = Param("sure", description="sure: seeds stay what they are; likely: the cut may change them")

    whole: bool = Param(True, description="drop pieces of the cut that hold no seed of the object, and fill holes")

    @model_validator(mode="after")
    def _consistent(self) -> GrabcutSegmentation:
        if self.background >= self.foreground:
            raise ValueError("`background` must lie below `foreground`")
        return self

    def uses(self) -> list[EveryMap]:
        return [EveryMap(self.target, self.maps)]

    def run(self, ctx: Context) -> Result:
        maps = self.smoothed(ctx)
        pixels = (ctx.images.cpu().float().numpy().transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
        pixels = np.repeat(pixels, 3, axis=3) if pixels.shape[3] == 1 else pixels
        trimaps, cuts, notes = [], [], []
        apart: list[float] = []  # of all pictures, or of none
        spreads = self.spread == "alike" and bool(layers_of(ctx.model))
        twice = spreads and takes_twice(ctx.model)
        if self.spread == "alike" and not spreads:
            notes.append(f"{ctx.model.name} has no layers with maps that say what is alike; seeds are quantiles of the map alone")
        for i, (name, values, picture) in enumerate(zip(ctx.ids, maps, pixels, strict=True)):
            seeds, judge = self.trimap(values), np.zeros_like(values)
            if spreads and (seeds == FOREGROUND).any():
                parting, judge = likely(ctx.model, ctx.images[i : i + 1], values, twice)
                seeds = sides(parting)
            ctx.report("pictures", i + 1, len(ctx.ids))
            if not (seeds == FOREGROUND).any() or not (seeds == BACKGROUND).any():
                notes.append(f"{name}: the map is too flat for seeds of both kinds; nothing is cut out")
                cuts.append(np.zeros(values.shape, dtype=bool))
            else:
                cuts.append(self.cut(picture, seeds))
            trimaps.append(seeds)
            if spreads:
                apart.append(contrast(judge, cuts[-1]))
        return self._result(ctx, pixels, np.stack(trimaps), np.stack(cuts), apart, notes)

    def smoothed(self, ctx: Context) -> np.ndarray:
        """(N, H, W) the map's strength in favour of the target, blurred."""
        from harness.optimise import gaussian_blur

        found = list(ctx.attributions().values())
        if not found:
            why = "; ".join(f"{name}: {reason}" for name, reason in ctx.missing.items())
            raise NotApplicable(f"needs a map for its seeds, and none has a result ({why}); name another in `maps`")
        strength: Any = 1.0
        for maps in found:
            # In double precision on the CPU, where quantiles and the cut are worked out.
            blurred = gaussian_blur(maps.clamp(min=0)[:, None].cpu().double(), self.smooth * min(maps.shape[1:]))[:, 0].numpy()
            strength = strength * blurred ** (1 / len(found))
        return strength

    def trimap(self, values: np.ndarray) -> np.ndarray:
        """uint8 (H, W) of OpenCV's labels: pixels at or above one quantile, at or below the other, and those between, which start
        on either side of a third.

        A map that is the same everywhere has no seeds.
        """
        low, lean, high = np.quantile(values, [self.background, self.lean, self.foreground])
        seeds = np.where(values > lean, MAYBE_FOREGROUND, MAYBE_BACKGROUND).astype(np.uint8)
        if high > low:
            seeds[values >= high], seeds[values <= low] = FOREGROUND, BACKGROUND
        return seeds

    def cut(self, picture: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """bool (H, W): the object in a picture uint8 (H, W, 3), RGB."""
        import cv2

        mask = seeds.copy()
        if self.seeds == "likely":
            mask[mask == FOREGROUND], mask[mask == BACKGROUND] = MAYBE_FOREGROUND, MAYBE_BACKGROUND
        cv2.setRNGSeed(0)  # its k-means draws from OpenCV's own generator
        models = np.zeros((1, 65), np.float64), np.zeros((1, 65), np.float64)
        bgr = np.ascontiguousarray(picture[..., ::-1])
        try:
            cv2.grabCut(bgr, mask, None, *models, self.iterations, cv2.GC_INIT_WITH_MASK)
        except cv2.error as error:  # colours that no model fits
            raise ConfigError(f"grabcut_segmentation: OpenCV cannot cut this picture: {' '.join(str(error).split())[:200]}") from None
        found = (mask == FOREGROUND) | (mask == MAYBE_FOREGROUND)
        if self.whole:
            _, pieces = cv2.connectedComponents(found.astype(np.uint8), connectivity=4)
            found &= np.isin(pieces, np.unique(pieces[(seeds == FOREGROUND) & found]))
            found = without_holes(found)
        return found

    def _result(
        self, ctx: Context, pixels: np.ndarray, trimaps: np.ndarray, cuts: np.ndarray, apart: list[float], notes: list[str]
    ) -> Result:
        images = pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255
        texts = captions(ctx)
        share = cuts.mean((1, 2))
        doubtful = [value < APART for value in apart] or [False] * len(cuts)
        shares = [
            f"{text}, {100 * value:.0f} % of the picture{', doubtful' if doubt else ''}"
            for text, value, doubt in zip(texts, share, doubtful, strict=True)
        ]
        colours = np.array([DOUBTFUL if doubt else OUTLINE for doubt in doubtful], np.float32)
        outlined = np.where(edges(cuts)[:, None], colours[:, :, None, None], images)
        alone = np.where(cuts[:, None], images, np.float32(1))
        seeds = (trimaps == FOREGROUND).astype(np.float32) - (trimaps == BACKGROUND)
        small = images.shape[-1] < 64
        artifacts: list[Any] = [
            Images("outline", outlined, captions=shares, columns=4, exact=small),
            Images("cut_out", alone, captions=list(ctx.ids), columns=4, exact=small),
            Heatmaps("seeds", seeds, captions=texts, signed=True, unit="1 object, -1 background, 0 open", shared_scale=True),
            Heatmaps("mask", cuts.astype(np.float32), captions=texts, unit="1 object", shared_scale=True),
        ]  # fmt: skip
        metrics = [Metric("object_share", float(share.mean()), per_image=share.tolist(), about="share of the picture that is cut out")]
        if apart:
            about = f"by how much more the cut-out has to do with the map than the rest has; below {APART} it is doubtful"
            metrics.append(Metric("apart", float(np.mean(apart)), better="higher", per_image=apart, about=about))
        marks = ctx.dataset.marks if ctx.masks is not None else None
        if ctx.masks is not None and marks is not None and marks.swapped is None:  # a mark that can be swapped is a cue, no object
            masks = ctx.masks.cpu().numpy()
            known = masks.any((1, 2))
            if known.any():
                overlap = iou(cuts[known], masks[known])
                metrics.insert(
                    0,
                    Metric(
                        "iou", float(overlap.mean()), better="higher", per_image=overlap.tolist(),
                        about=f"intersection over union of what is cut out and the mask of {marks.shows}, where there is one",
                    ),
                )  # fmt: skip
        return Result(artifacts, metrics, notes)


def sides(values: np.ndarray) -> np.ndarray:
    """uint8 (H, W) of OpenCV's labels by Otsu's threshold of values (H, W), which are sure far from it and open near it.

    Values that are the same everywhere have no seeds.
    """
    from skimage.filters import threshold_otsu

    low, high = values.min(), values.max()
    if not low < high:
        return np.full(values.shape, MAYBE_BACKGROUND, np.uint8)
    middle = threshold_otsu(values)
    seeds = np.where(values > middle, MAYBE_FOREGROUND, MAYBE_BACKGROUND).astype(np.uint8)
    seeds[values > middle + SURE * (high - middle)] = FOREGROUND
    seeds[values < middle - SURE * (middle - low)] = BACKGROUND
    return seeds


def contrast(values: np.ndarray, cut: np.ndarray) -> float:
    """Mean of values (H, W) within a cut bool (H, W) less that of the rest; 0 where one of them is empty."""
    return float(values[cut].mean() - values[~cut].mean()) if cut.any() and not cut.all() else 0.0


def without_holes(mask: np.ndarray) -> np.ndarray:
    """bool (H, W): what the mask encloses belongs to it, up to a share of its own area: a larger opening is one."""
    import cv2

    _, pieces, facts, _ = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=4)
    rim = np.unique(np.concatenate([pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]]))
    small = [k for k in range(1, len(facts)) if k not in rim and facts[k, cv2.CC_STAT_AREA] < HOLE * mask.sum()]
    found: np.ndarray = mask | np.isin(pieces, small)
    return found


def edges(masks: np.ndarray) -> np.ndarray:
    """bool (N, H, W): pixels of masks (N, H, W) within two pixels of its border, at least one."""
    import cv2

    kernel = np.ones((3, 3), np.uint8)
    return np.stack([(cv2.dilate(m, kernel) - cv2.erode(m, kernel)) > 0 for m in masks.astype(np.uint8)])


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N,) intersection over union of bool masks (N, H, W); 1 where both are empty."""
    both, either = (a & b).sum((1, 2)), (a | b).sum((1, 2))
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)
