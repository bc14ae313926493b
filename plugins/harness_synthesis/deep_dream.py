from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import model_validator

from harness import Arrays, ConfigError, Curve, Images, Metric, NotApplicable, Paper, Param, Result, Technique, Use

from .blocks import blocks, refuses
from .climb import CONVERGED, EARLIER

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context
    from harness.optimise import Ascent, Objective

USUAL = 4  # octaves where nothing else is asked for
SHOWN = 4  # pictures in the progress strip


class DeepDream(Technique):
    """A picture in which what a layer sees is made stronger, x += step g / mean|g| with g the gradient of half the layer's squared
    norm, over octaves from coarse to fine (Mordvintsev, Olah & Tyka 2015, https://github.com/google/deepdream).

    Each octave starts from the picture at its size plus the detail of the octave before, enlarged; before each step the picture
    is rolled by a random jitter and rolled back after it. With a `guide` each place grows like the place of the guide that it
    resembles most. With `frames` the dream goes on while the camera moves in. Cost: `octaves` times `steps` forward and backward
    passes to the layer, most of them at smaller sizes; `frames` times that for an animation.
    """

    name = "deep_dream"
    family = "synthesis"
    paper = Paper("Mordvintsev, Olah, Tyka", 2015, "Inceptionism: Going Deeper into Neural Networks")
    needs = frozenset({"images", "conv"})
    reading = (
        "Whatever the layer finds in the picture is drawn into it: early layers bring strokes and swirls, late ones eyes, heads and "
        "buildings, wherever the picture gives them a hold. What comes up again and again is what the layer looks for."
    )
    caveats = (
        "It shows what excites a layer, not what the model makes of the picture. ImageNet has 118 breeds of dogs, hence the dogs; a "
        "model of places dreams of buildings."
    )
    audit = {"full": {"steps": 10}}

    layer: str = Param("", description="the layer that dreams; none: the block three quarters of the way to the class scores")
    steps: int = Param(10, ge=0, le=100_000, description="gradient steps an octave")
    octaves: int | None = Param(
        None, ge=1, le=20, description="sizes worked at, from the smallest to the picture's own; none: 4, or as many as the layer allows"
    )
    octave_scale: float = Param(1.4, gt=1, le=4, description="each octave is this much larger than the one before")
    step_size: float = Param(1.5, gt=0, description="mean change of a pixel in a step, in 255ths")
    jitter: float = Param(32, ge=0, description="largest random roll before a step, in pixels of a picture of 224")
    dreams: int = Param(1, ge=1, le=1000, description="how often the picture is dreamt, each time from what came of it before")
    go_on: int = Param(0, ge=0, description="go on from an earlier run of this many dreams, taken from the store or made first")
    converged: float = CONVERGED
    size: int = Param(
        0, ge=0, le=16_384, description="dream the whole picture, its longer side this many pixels; 0: the square that the model takes"
    )
    guide: str = Param("", description="the name of a picture of the dataset that the dream is to resemble")
    frames: int = Param(0, ge=0, le=10_000, description="frames of a zoom into the first picture; 0 makes none")
    zoom: float = Param(0.05, gt=0, lt=0.5, description="how far each frame moves in, as a share of the picture")

    @model_validator(mode="after")
    def _consistent(self) -> DeepDream:
        if self.go_on and self.go_on >= self.dreams:
            raise ValueError(f"go_on {self.go_on} must be fewer than dreams, which is {self.dreams}: those already dreamt count")
        return self

    def uses(self) -> list[Use]:
        if not self.go_on:
            return []
        return [Use(self.name, {**self.key_params(), "dreams": self.go_on, "go_on": 0, "frames": 0}, name=EARLIER)]

    def run(self, ctx: Context) -> Result:
        import torch

        if self.size:
            return self._whole(ctx)
        layer = self.layer or dreaming(ctx)
        octaves = self._octaves(ctx, layer)
        settings = self.model_copy(update={"octaves": octaves})
        objective = self._objective(ctx, layer)
        made: list[Tensor] = []
        traces: list[list[Tensor]] = []
        stopped: list[int] = []
        strips: list[Tensor] = []
        start = self._start(ctx)

        def some(rows: slice) -> tuple[Tensor, list[Tensor], list[int], list[Ascent]]:
            image = start[rows]
            scores: list[Tensor] = []
            lost: list[int] = []
            found: list[Ascent] = []
            for number in range(self.go_on, self.dreams):
                draws = ctx.draws(ctx.ids[rows], stream=f"dream {number}" if number else "")
                image, found = dream(ctx, objective, image, settings, draws)
                scores += [_filled(p.scores, self.steps) for p in found]
                lost += [i for p in found for i in p.stopped]
            return image, scores, lost, found[-octaves:]  # of many dreams the pictures on the way would fill the memory

        first = 0
        for image, scores, lost, last in ctx.batched(len(start), some):
            made.append(image)
            traces.append(scores)
            stopped += [first + i for i in lost]
            strips.append(torch.stack([_resized(p.images, image.shape[2:]) for p in last], 1))
            first += len(image)
        pictures = torch.cat(made)
        every = torch.cat([torch.cat(t) for t in traces], 1)  # (dreams * octaves * steps, N)
        return settings._result(ctx, layer, pictures, every, torch.cat(strips), sorted(set(stopped)), objective)

    def _whole(self, ctx: Context) -> Result:
        """Each picture in its own shape: a dream of its own."""
        from harness.context import Context as Own

        takes_any_size(ctx, self.layer or dreaming(ctx))
        artifacts: list[Any] = []
        metrics: dict[str, list[Metric]] = {}
        notes: list[str] = []
        for i, (name, image) in enumerate(zip(ctx.ids, whole_pictures(ctx, self.size), strict=True)):
            results = {EARLIER: {"state": ctx.results[EARLIER][f"state-{i + 1}"]}} if EARLIER in ctx.results else {}
            own = Own(
                ctx.model,
                images=image,
                ids=[name],
                dataset=ctx.dataset,
                technique=ctx.technique,
                seed=ctx.seed,
                max_batch=ctx.max_batch,
                results=results,
                progress=ctx.report,
            )
            found = self.model_copy(update={"size": 0, "frames": 0 if i else self.frames}).run(own)
            artifacts += [replace(a, name=f"{a.name}-{i + 1}") for a in found.artifacts]
            for metric in found.metrics:
                metrics.setdefault(metric.name, []).append(metric)
            notes += found.notes
        joined = [
            replace(same[0], value=float(np.mean([m.value for m in same])), per_image=[v for m in same for v in m.per_image])
            for same in metrics.values()
        ]
        return Result(artifacts, joined, notes)

    def _octaves(self, ctx: Context, layer: str) -> int:
        """How many sizes are worked at; a number that was asked for and cannot be is an error."""
        _, rows, columns = ctx.model.maps_shape(layer)
        side = min(ctx.images.shape[2:])
        least = max(8, 2 * max(1, ctx.model.input.size // min(rows, columns)))

        def smallest(octaves: int) -> int:
            return round(side / self.octave_scale ** (octaves - 1))

        if self.octaves is None:
            fitting = [n for n in range(2, USUAL + 1) if smallest(n) >= least]
            return max(fitting, default=1) if fitting and not refuses(ctx.model, smallest(fitting[-1]), layer) else 1
        if self.octaves > 1:
            takes_any_size(ctx, layer)
        if smallest(self.octaves) < least:
            raise ConfigError(
                f"deep_dream.octaves: the smallest of {self.octaves} would have {smallest(self.octaves)} pixels a side, too few for "
                f"{layer!r}; take fewer, or a smaller octave_scale"
            )
        return self.octaves

    def _start(self, ctx: Context) -> Tensor:
        """The pictures, or what an earlier run dreamt of them."""
        import torch

        if EARLIER not in ctx.results:
            return ctx.images
        state: Any = ctx.results[EARLIER]["state"]
        return torch.from_numpy(state.data["images"]).to(ctx.device, ctx.model.dtype)

    def _objective(self, ctx: Context, layer: str) -> Objective:
        import torch

        from harness import optimise as o
        from harness.context import to_images

        if not self.guide:
            return o.layer_norm(layer)
        whole = ctx.dataset.whole or ctx.dataset
        if self.guide not in whole.ids:
            from harness.errors import did_you_mean

            raise ConfigError(f"deep_dream.guide: the dataset has no picture {self.guide!r}{did_you_mean(self.guide, whole.ids)}")
        i = list(whole.ids).index(self.guide)
        picture = to_images(whole.pictures(ctx.model.input, i, i + 1), ctx.device, ctx.model.dtype)
        with torch.no_grad():
            return o.guide_match(layer, ctx.model.activations(picture, [layer])[layer][0])

    def _result(
        self, ctx: Context, layer: str, pictures: Tensor, scores: Tensor, strips: Tensor, stopped: list[int], objective: Objective
    ) -> Result:
        import torch

        from harness import optimise as o

        small = pictures.shape[-1] < 64
        artifacts: list[Any] = [
            Images(
                "dream",
                pictures,
                captions=list(ctx.ids),
                columns=4,
                exact=small,
                caption=f"{layer}{f', after {self.guide}' if self.guide else ''}.",
            )
        ]
        if self.steps:
            shown = min(len(pictures), SHOWN)
            strip = torch.cat([torch.cat([ctx.images[i, None], strips[i]]) for i in range(shown)])
            names = ["start", *(f"octave {k + 1}" for k in range(strips.shape[1]))]
            captions = [f"{ctx.ids[i]}: {n}" if n == "start" else n for i in range(shown) for n in names]
            artifacts.append(Images("progress", strip, captions=captions, columns=len(names), exact=small))
            lines = {ctx.ids[i]: scores[:, i] for i in range(len(pictures)) if bool(torch.isfinite(scores[:, i]).all())}
            if lines:
                what = "likeness to the guide" if self.guide else "half the squared norm of the layer"
                artifacts.append(
                    Curve("objective", range(1, len(scores) + 1), lines, "step, octave after octave", what, log_y=not self.guide)
                )
        artifacts.append(Arrays("state", {"images": pictures}))
        if self.frames:
            artifacts.append(Images("zoom", self._zoom(ctx, objective, pictures[:1]), moving=True, exact=small))

        def strength(images: Tensor) -> Tensor:
            with torch.no_grad():
                return torch.cat(list(ctx.batched(len(images), lambda rows: o.evaluate(ctx.model, objective, images[rows], images[rows]))))

        before = strength(ctx.images)
        gain = (strength(pictures) / before).tolist() if bool((before > 0).all()) else []
        rising = (scores.view(-1, self.steps, len(pictures)).diff(dim=1) > 0).float().mean((0, 1)).tolist() if self.steps > 1 else []
        metrics = []
        if gain:  # a likeness to the guide may be below zero, where a ratio says nothing
            about = "the objective of the dream over that of the picture"
            metrics.append(Metric("gain", float(np.mean(gain)), better="higher", per_image=gain, about=about))
        if rising:
            about = "share of steps that raise the objective, within octaves"
            metrics.append(Metric("rising_steps", float(np.mean(rising)), better="higher", per_image=rising, about=about))
        notes = [
            f"{ctx.ids[i]}: the objective stopped being finite; the last good picture is shown; use a smaller step_size" for i in stopped
        ]
        return Result(artifacts, metrics, notes)

    def _zoom(self, ctx: Context, objective: Objective, start: Tensor) -> np.ndarray:
        """(frames, C, H, W): dream, move in, dream again; whole 255ths, which are stored in a quarter of the space."""
        frames, x = [start], start
        for i in ctx.track(range(1, self.frames), self.frames - 1, "frames"):
            x = closer(x, self.zoom)
            x, _ = dream(ctx, objective, x, self, ctx.draws([ctx.ids[0]], stream=f"frame {i}"))
            frames.append(x)
        return np.concatenate([np.rint(f.cpu().float().numpy() * 255) / np.float32(255) for f in frames])


def dreaming(ctx: Context) -> str:
    """The block of convolutions three quarters of the way to the class scores."""
    found = blocks(ctx.model)
    if not found:
        raise NotApplicable(f"needs layers with maps; {ctx.model.name!r} has none before its class scores")
    return found[round(0.75 * (len(found) - 1))]


def takes_any_size(ctx: Context, layer: str) -> None:
    """NotApplicable where the model takes pictures of its own size only."""
    import torch

    from harness.context import out_of_memory

    images = ctx.images[:1]
    try:
        with torch.no_grad():
            ctx.model.activations(torch.nn.functional.pad(images, (0, 8, 0, 8)), [layer])
    except (RuntimeError, AssertionError, ValueError) as error:
        if out_of_memory(error):
            raise
        raise NotApplicable(f"needs a model that takes pictures of any size, or `octaves` 1; {ctx.model.name!r} says: {error}") from None


def whole_pictures(ctx: Context, size: int) -> Iterator[Tensor]:
    """Each picture of the dataset (1, C, H, W), uncut, its longer side `size` pixels."""
    from PIL import Image

    from harness.context import to_images

    for i in range(len(ctx.dataset)):
        picture = ctx.dataset.get(i).convert("L" if ctx.model.input.channels == 1 else "RGB")
        scale = size / max(picture.size)
        width, height = (max(1, round(n * scale)) for n in picture.size)
        pixels = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
        yield to_images(pixels.reshape(1, height, width, -1).copy(), ctx.device, ctx.model.dtype)


def sizes(side: int, octaves: int, scale: float) -> list[int]:
    """Sides of the octaves, the smallest first."""
    return [round(side / scale**k) for k in reversed(range(octaves))]


def dream(ctx: Context, objective: Objective, images: Tensor, settings: DeepDream, draws: Any) -> tuple[Tensor, list[Ascent]]:
    """Pictures (N, C, H, W) dreamt over octaves, and what each octave's ascent gave."""
    import torch

    from harness import optimise as o

    height, width = images.shape[2:]
    detail: Tensor | None = None
    parts: list[Ascent] = []
    for tall, wide in zip(*(sizes(n, settings.octaves or 1, settings.octave_scale) for n in (height, width)), strict=True):
        base = _resized(images, (tall, wide))
        start = base if detail is None else (base + _resized(detail, (tall, wide))).clamp(0, 1)
        pixels = round(settings.jitter * min(height, width) / 224)
        part = o.ascend(
            ctx.model,
            objective,
            start,
            steps=settings.steps,
            step_size=settings.step_size / 255,
            draws=draws,
            rule="mean_abs",
            transforms=[o.Jitter(pixels)] if pixels else [],
            operators=[o.Clamp()],
            converged=settings.converged,
            progress=ctx.report,
        )
        detail = part.images - base
        parts.append(part)
    return torch.clamp(parts[-1].images, 0, 1), parts


def _filled(scores: Tensor, length: int) -> Tensor:
    """An octave's scores (T, N), the last standing for those that an early end left out."""
    import torch

    return scores if len(scores) == length else torch.cat([scores, scores[-1:].expand(length - len(scores), -1)])


def _resized(images: Tensor, size: Any) -> Tensor:
    from torch.nn.functional import interpolate

    return images if tuple(images.shape[2:]) == tuple(size) else interpolate(images, size=tuple(size), mode="bilinear", align_corners=False)


def closer(images: Tensor, share: float) -> Tensor:
    """The middle of pictures (N, C, H, W), `share` of each side cut away in all, enlarged to the whole."""
    height, width = images.shape[2:]
    top, left = max(1, round(height * share / 2)), max(1, round(width * share / 2))
    return _resized(images[:, :, top : height - top, left : width - left], (height, width))
