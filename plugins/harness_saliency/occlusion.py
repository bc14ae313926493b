from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator, model_validator

from harness import ConfigError, Heatmaps, Metric, Paper, Param, Result, TargetSpec, Technique

from .measures import captions, zero_notes

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context

WORTH = 0.75  # incremental inference must leave less than this share of the work
SMALL = 5e7  # multiplications a pass below which handling boxes costs more than it saves

Convention = Literal["mean", "xplique", "zennit"]


class Occlusion(Technique):
    """Drop of the score when a window of the picture is covered, map(i, j) = mean over windows
    covering (i, j) of f(x) - f(x covered) (Zeiler & Fergus 2014, arXiv:1311.2901, sec. 4.2).

    High means important. The last window of a row is cut at the edge, so that every pixel is covered. Convention
    'xplique' sums instead and leaves no partial windows; 'zennit' keeps only the window, covers the rest and sums the raw
    score. Where that saves work only what a window reaches is computed anew (Nakandala et al. 2019,
    doi:10.1145/3299869.3319874), which changes nothing but rounding. Cost: at most one forward pass a window and one for the
    picture.
    """

    name = "occlusion"
    family = "saliency"
    version = 3
    paper = Paper("Zeiler, Fergus", 2014, "Visualizing and Understanding Convolutional Networks", arxiv="1311.2901")
    needs = frozenset({"images"})
    attribution = "occlusion"
    reading = (
        "Red regions lower the score when they are covered: the model used them. Blue regions raise it: they spoke against the "
        "class. The scale says by how much."
    )
    caveats = (
        "A covered picture is unlike what the model was trained on, and the colour of the cover matters. Two regions that can "
        "stand in for one another both look unimportant. Nothing smaller than the window is resolved."
    )
    audit = {"quick": {"window": 0.2, "stride": 0.2}, "standard": {}, "full": {"stride": 0.036}}
    draft = {"window": 0.2, "stride": 0.2}

    target: TargetSpec = Param(
        "predicted", description="what is explained: predicted, labelled, a class, layer:NAME, channel:NAME:C, neuron:NAME:C,Y,X"
    )
    window: float = Param(
        0.143, gt=0, description="side of the covered square: pixels, or below 1 a share of the picture's shorter side (32 pixels at 224)"
    )
    stride: float = Param(
        0.0715, gt=0, description="distance between neighbouring windows, likewise (16 pixels at 224); at most the window"
    )
    baseline: Literal["grey", "mean", "black", "white", "blur", "noise"] = Param(
        "grey", description="what the window is covered with: 0.5, the picture's mean colour, 0, 1, a blurred copy, uniform noise"
    )
    convention: Convention = Param(
        "mean", description="how overlapping windows join: mean over them (ours, captum's), or as xplique or zennit do"
    )

    inference: Literal["auto", "full"] = Param(
        "auto",
        description="auto: compute anew only what a window reaches, where it saves a quarter of the multiplications; full: whole passes",
    )

    @field_validator("window", "stride")
    @classmethod
    def _whole_pixels(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("from 1 on it is a whole number of pixels")
        return value

    @model_validator(mode="after")
    def _covered(self) -> Occlusion:
        if (self.window < 1) == (self.stride < 1) and self.stride > self.window:
            raise ValueError(f"stride {self.stride:g} leaves gaps between windows of {self.window:g}; make it at most the window")
        return self

    def pixels(self, height: int, width: int) -> tuple[int, int]:
        """(window, stride) in pixels for a picture of that size."""
        side = min(height, width)
        window = int(self.window) if self.window >= 1 else min(side, max(2, round(self.window * side)))
        stride = int(self.stride) if self.stride >= 1 else max(1, round(self.stride * side))
        if window > side:
            raise ConfigError(f"occlusion.window: {window} pixels do not fit a picture of {height} x {width}")
        if stride > window:
            raise ConfigError(f"occlusion.stride: {stride} pixels leave gaps between windows of {window}; make it at most the window")
        return window, stride

    def run(self, ctx: Context) -> Result:
        found = self.measure(ctx)
        maps = spread(found.drops, found.boxes, ctx.images.shape[2:], self.convention)
        unit = "score" if self.convention == "zennit" else "drop of the score"
        texts = captions(ctx)
        artifacts = [Heatmaps("occlusion", maps, captions=texts, signed=True, unit=unit)]
        metrics = []
        if found.lost is not None and found.chance is not None:
            lost = spread(found.lost, found.boxes, ctx.images.shape[2:], self.convention)
            artifacts.append(Heatmaps("occlusion_probability", lost, captions=texts, signed=True, unit="drop of the probability"))
            largest = found.lost.amax(1)
            about = "largest drop of the class probability that one covered window causes"
            metrics.append(Metric("largest_drop", float(largest.mean()), per_image=largest.tolist(), about=about))
            survives = (largest <= found.chance / 2).to(largest.dtype)
            about = "share of pictures whose class probability no single window halves"
            metrics.append(Metric("robust_share", float(survives.mean()), per_image=survives.tolist(), about=about))
        return Result(artifacts, metrics, zero_notes(maps, ctx.ids))

    def measure(self, ctx: Context) -> Measured:
        """Every window's effect on every picture, in the model's own precision."""
        import torch

        x, target, model = ctx.images, ctx.target, ctx.model  # (N, C, H, W)
        height, width = x.shape[2:]
        window, stride = self.pixels(height, width)
        cover = baseline(ctx, self.baseline)
        boxes = windows(height, width, window, stride, self.convention)
        total = len(x) * len(boxes)

        def clean(rows: slice) -> tuple[Tensor, Tensor | None]:
            output = target.output(model, x[rows])
            return target.score(output, rows), target.probability(output, rows)

        keep_only = self.convention == "zennit"
        below, above = (x, cover) if keep_only else (cover, x)  # what shows through the window, and around it

        def covered(rows: slice) -> tuple[Tensor, Tensor | None]:
            """Scores of covered copies number rows.start to rows.stop, counted picture by picture."""
            numbers = range(rows.start, rows.stop)
            picture = torch.arange(rows.start, rows.stop, device=x.device) // len(boxes)
            # One copy of the pictures and small writes into it: less memory traffic than masks.
            copies = above[picture].contiguous(memory_format=torch.channels_last)
            for copy, number in zip(copies, numbers, strict=True):
                top, bottom, left, right = boxes[number % len(boxes)]
                copy[:, top:bottom, left:right] = below[number // len(boxes), :, top:bottom, left:right]
            output = target.output(model, copies)
            ctx.report("windows", rows.stop, total)
            return target.score(output, picture), target.probability(output, picture)

        with torch.no_grad():
            score, chance = _joined(ctx.batched(len(x), clean))
            quick = None if self.inference == "full" or keep_only else self._quick(ctx, boxes, cover)
            parts = _joined(ctx.batched(total, covered)) if quick is None else quick
            scores, chances = (v if v is None else v.view(len(x), len(boxes)) for v in parts)
        assert score is not None
        assert scores is not None
        if self.convention == "zennit":
            return Measured(boxes, scores, None, chance)
        return Measured(boxes, score[:, None] - scores, None if chance is None or chances is None else chance[:, None] - chances, chance)

    def _quick(self, ctx: Context, boxes: list[tuple[int, int, int, int]], cover: Tensor) -> tuple[Tensor | None, Tensor | None] | None:
        """Scores and probabilities of all covered copies by incremental inference; None where it is not to be had or not worth it."""
        import torch

        from harness.context import out_of_memory

        from .incremental import Incremental

        x, target, model = ctx.images, ctx.target, ctx.model
        if target.layer is not None:
            return None
        try:
            incremental = Incremental(model, boxes, (x.shape[2], x.shape[3]))
        except Exception as error:  # whatever a network does that fx took otherwise; whole passes know nothing of that
            if out_of_memory(error):
                raise
            return None
        if incremental.left > WORTH or incremental.work < SMALL:
            return None
        height, width = incremental.boxes.size
        found: list[Any] = []
        for i in range(len(x)):
            try:
                clean = incremental.clean(x[i : i + 1])
            except Exception as error:
                if i or out_of_memory(error):
                    raise
                return None

            def some(rows: slice, i: int = i, clean: Any = clean) -> tuple[Tensor, Tensor | None]:
                contents = x.new_empty((rows.stop - rows.start, x.shape[1], height, width))
                starts = zip(incremental.boxes.tops[rows], incremental.boxes.lefts[rows], boxes[rows], strict=True)
                for content, (y, left_, (top, bottom, left, right)) in zip(contents, starts, strict=True):
                    content.copy_(x[i, :, y : y + height, left_ : left_ + width])
                    content[:, top - y : bottom - y, left - left_ : right - left_] = cover[i, :, top:bottom, left:right]
                output = incremental.answers(clean, contents, rows)
                ctx.report("windows", i * len(boxes) + rows.stop, len(x) * len(boxes))
                picture = torch.full((len(output),), i, device=x.device)
                return target.score(output, picture), target.probability(output, picture)

            try:
                found.append(_joined(ctx.batched(len(boxes), some)))
            except Exception as error:
                if i or out_of_memory(error):
                    raise
                return None
            if i == 0 and not self._agrees(ctx, boxes, cover, found[0][0]):
                return None
        return _joined(found)

    def _agrees(self, ctx: Context, boxes: list[tuple[int, int, int, int]], cover: Tensor, scores: Tensor | None) -> bool:
        """Whether two windows of the first picture get from whole passes what incremental inference gave."""
        import torch

        assert scores is not None
        numbers = [0, len(boxes) // 2]
        copies = ctx.images[:1].repeat(2, 1, 1, 1)
        for copy, number in zip(copies, numbers, strict=True):
            top, bottom, left, right = boxes[number]
            copy[:, top:bottom, left:right] = cover[0, :, top:bottom, left:right]
        expected = ctx.target.score(ctx.target.output(ctx.model, copies), torch.zeros(2, dtype=torch.int64, device=ctx.device))
        # Against what windows change, however small a network's scores are; where they change nothing, against rounding.
        spread = float(scores.std()) if len(scores) > 1 else 0.0
        largest = float(scores.abs().max())
        return float((scores[numbers] - expected).abs().max()) <= max(1e-3 * spread, 1e-5 * largest)


@dataclass(frozen=True)
class Measured:
    """What covering did: the windows; drops and lost probability (N, windows); clean probability (N,)."""

    boxes: Sequence[tuple[int, int, int, int]]
    drops: Tensor
    lost: Tensor | None
    chance: Tensor | None


def _joined(parts: Iterable[tuple[Tensor, Tensor | None]]) -> tuple[Tensor | None, Tensor | None]:
    import torch

    scores, chances = zip(*parts, strict=True)
    return torch.cat(scores), None if chances[0] is None else torch.cat(chances)


def windows(height: int, width: int, window: int, stride: int, convention: Convention = "mean") -> list[tuple[int, int, int, int]]:
    """(top, bottom, left, right) of each window, row by row; the last may be cut at the edge."""

    def starts(size: int) -> list[int]:
        if convention == "mean":
            return list(range(0, max(0, -(-(size - window) // stride)) * stride + 1, stride))
        if convention == "zennit" and size % stride:
            raise ConfigError(f"occlusion.convention: zennit's windows need a stride that divides the picture's {size} pixels")
        return list(range(0, size - window + 1, stride))

    return [(y, min(y + window, height), x, min(x + window, width)) for y in starts(height) for x in starts(width)]


def spread(values: Tensor, boxes: Sequence[tuple[int, int, int, int]], size: Sequence[int], convention: Convention) -> Tensor:
    """(N, windows) values -> (N, H, W): at each pixel the mean over the windows that cover it, or their sum."""
    from harness.device import at_least_single

    values = at_least_single(values)  # bfloat16 counts to 256
    total = values.new_zeros((len(values), *size))
    count = values.new_zeros(tuple(size))
    for i, (top, bottom, left, right) in enumerate(boxes):
        total[:, top:bottom, left:right] += values[:, i, None, None]
        count[top:bottom, left:right] += 1
    return total if convention != "mean" else total / count.clamp_min(1)


def baseline(ctx: Context, kind: str) -> Tensor:
    """What windows are covered with, one picture each (N, C, H, W)."""
    import torch

    x = ctx.images
    if kind == "mean":
        return x.mean((2, 3), keepdim=True).expand_as(x)
    if kind == "blur":
        from harness.optimise import gaussian_blur

        return gaussian_blur(x, x.shape[-1] / 20)
    if kind == "noise":
        return ctx.draws(stream="baseline").rand(x.shape[1:])
    return torch.full_like(x, {"grey": 0.5, "black": 0.0, "white": 1.0}[kind])
