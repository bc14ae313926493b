from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness import Curve, Images, Metric, NotApplicable, Paper, Param, Result, Table, Technique

from .gram import Style, descent, moments_of, pooled, style_layers, targets_of
from .pictures import (
    coarse_to_fine,
    colours_of,
    eight_bits,
    framed,
    noise_of,
    parts_of,
    read_all,
    refusal,
    resized,
    tensor_of,
    unframed,
    unseen,
)
from .style_transfer import LEAST

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context
    from harness.optimise import Ascent


class NeuralTexture(Technique):
    """A texture made anew: argmin_x sum_l ||G_l(x) - A_l||^2 / ||A_l||^2 from noise, G_l being Gram matrices of the layers down to a depth
    and A_l those of the sample (Gatys et al. 2015, arXiv:1505.07376). One column for each depth. `form=covariance` has covariances about
    the sample's means, whitened in part, in their place.

    Errors are relative, pixels stay within [0, 1], the sample is taken whole. Start is noise of the sample's mean and covariance of
    colours, at half the size first; steps follow that covariance, so that what no layer asks for makes no colours the sample has not
    (`own_colours`). L-BFGS and average pooling as in the paper. Cost: one forward and one backward pass to the deepest layer a step,
    picture and depth.
    """

    name = "neural_texture"
    family = "style"
    version = 11
    paper = Paper("Gatys, Ecker, Bethge", 2015, "Texture Synthesis Using Convolutional Neural Networks", arxiv="1505.07376")
    needs = frozenset({"dataset", "conv"})
    per_picture = True
    reading = (
        "First the sample, then what matching the statistics of ever deeper layers makes of noise. Early layers keep colours and "
        "small blobs; with deeper ones larger structure comes back, but no arrangement of things."
    )
    caveats = "Textures with long lines or exact repeats are not held by averages over positions; of a photograph it makes a jumble."

    layers: tuple[str, ...] = Param((), description="layers, from early to late; none: five over the first three quarters")
    depths: int = Param(3, ge=1, le=20, description="how many depths are shown, the deepest with all layers")
    form: Literal["relative", "covariance"] = Param(
        "relative", description="what is matched: Gram matrices, or covariances about the sample's means"
    )
    steps: int = Param(150, ge=0, le=100_000, description="steps of L-BFGS, or of Adam, at each size")
    shifts: int = Param(
        3,
        ge=1,
        le=1000,
        description="parts of the descent at each size, in each of which the picture lies elsewhere to the strides by a pixel or more",
    )
    coarse: int = Param(1, ge=0, le=6, description="how many smaller sizes, each half of the next, come before the full one")
    optimiser: Literal["lbfgs", "adam"] = Param("lbfgs", description="how it descends")
    step_size: float = Param(5.0, gt=0, description="size of Adam's steps, of the first of L-BFGS, in 255ths")
    pooling: Literal["max", "average"] = Param("average", description="average: means in place of max pooling, as in the paper")
    tv_weight: float = Param(0.0, ge=0, description="weight of the total variation a pixel, which smooths")
    own_colours: float = Param(1.0, ge=0, le=1, description="how far steps follow the colours of the sample; 0: not at all")
    size: int = Param(224, ge=8, le=8192, description="longer side of sample and result")

    def run(self, ctx: Context) -> Result:
        import torch

        from harness.datasets import flat

        layers = style_layers(ctx, self.layers, fine=True)
        count = min(self.depths, len(layers))
        ends = np.linspace(1, len(layers), count).round().astype(int).tolist() if count > 1 else [len(layers)]
        kept = [layers[:end] for end in ends]
        artifacts: list[Any] = []
        rows: list[list[Any]] = []
        lines: dict[str, Any] = {}
        notes: list[str] = []
        refused: list[str] = []
        finals: list[float] = []
        read_all(ctx)
        for number, name in enumerate(ctx.ids, 1):
            picture = ctx.dataset.get(number - 1)
            if flat(picture):
                notes.append(f"{name}: one colour everywhere; there is no texture to make")
            sample = tensor_of(ctx, picture, self.size)
            reason = refusal(ctx, sample, layers)
            if reason:
                refused.append(f"{name}: {reason}")
                continue
            made = [self._made(ctx, name, sample, some) for some in kept]
            every = targets_of(ctx.model, sample, layers, self.pooling)
            for some, part in zip(kept, made, strict=True):
                errors = relative_errors(ctx, part.images.clamp(0, 1), every, self.pooling)
                label = f"{name}, to {some[-1]}" if len(ctx.ids) > 1 else f"to {some[-1]}"
                matched = float(np.mean([errors[layer] for layer in some]))
                rows.append([name, some[-1], matched, float(np.mean(list(errors.values()))), correlation_length(part.images[0])])
                lines[label] = (-part.scores[:, 0]).cpu().double().numpy()
                notes += [f"{label}: the error stopped being finite; the last good picture is shown"] * bool(part.stopped)
            finals.append(rows[-1][2])
            sheet = torch.cat([sample, *(part.images for part in made)])
            captions = [name, *(f"layers to {some[-1]}" for some in kept)]
            small = min(sample.shape[2:]) < 64
            artifacts.append(Images(f"texture-{number}", eight_bits(sheet), captions=captions, columns=len(sheet), exact=small))
            stages = made[-1].snapshots
            if stages:
                strip = torch.cat([image for _, image in stages])
                names = [f"step {n}" for n, _ in stages]
                artifacts.append(Images(f"progress-{number}", eight_bits(strip), captions=names, columns=len(strip), exact=small))
            ctx.report("pictures", number, len(ctx.ids))
        if not lines:
            raise NotApplicable("; ".join(refused))
        lines = {k: v[np.isfinite(v)] for k, v in lines.items()}
        longest = max(len(v) for v in lines.values())
        if longest:
            full = {k: np.r_[v, np.full(longest - len(v), v[-1])] for k, v in lines.items() if len(v)}
            artifacts.append(
                Curve("objective", range(1, longest + 1), full, "step", "error", log_y=all((v > 0).all() for v in full.values()))
            )
        columns = ["picture", "layers to", "Gram error of the matched layers", "Gram error of all layers", "correlation length in pixels"]
        artifacts.append(Table("errors", columns, rows))
        about = "relative squared error of the Gram matrices at the end, all layers matched"
        return Result(
            artifacts, [Metric("gram_error", float(np.mean(finals)), better="lower", per_image=finals, about=about)], [*notes, *refused]
        )

    def _made(self, ctx: Context, name: str, sample: Tensor, layers: list[str]) -> Ascent:
        """From coarse to fine; the scores of all sizes stand one after the other."""
        from dataclasses import replace

        import torch

        from harness import optimise as o

        height, width = sample.shape[2:]
        draws = ctx.draws([name])
        mean, covariance = colours_of(sample)
        conditioner = o.Colours(torch.from_numpy(covariance).to(sample.dtype).to(sample.device), self.own_colours)
        image: Tensor | None = None
        scores: list[Tensor] = []
        shots: list[tuple[int, Tensor]] = []
        stopped = set[int]()
        done = 0
        for tall, wide in coarse_to_fine(height, width, self.coarse, LEAST):
            small = resized(sample, tall, wide)
            if (tall, wide) != (height, width) and unseen(ctx, small, layers):
                continue
            objective = -Style(moments_of(ctx.model, small, layers, self.pooling), self.form).error()
            if self.tv_weight:
                objective = objective - (100 * self.tv_weight / small[0].numel()) * o.total_variation()
            if image is None:
                image = noise_of(draws.randn(small.shape[1:]), mean, covariance)
            else:
                image = resized(image, tall, wide)
            parts = parts_of(self.steps, self.shifts)
            for number, steps in enumerate(parts):
                place = number if number < len(parts) - 1 else None
                part = o.ascend(
                    ctx.model,
                    objective,
                    framed(image, place),
                    steps=steps,
                    step_size=self.step_size / 255,
                    rule=descent(self.optimiser),
                    draws=draws,
                    operators=[o.Clamp()],
                    conditioners=[conditioner],
                    during=lambda _: pooled(self.pooling, ctx.model.module),
                    progress=ctx.report,
                )
                image = unframed(part.images, place)
                done += steps
                if steps:
                    shots.append((done, resized(image, height, width)))
                scores.append(part.scores)
                stopped |= set(part.stopped)
                if part.stopped:
                    break
        assert image is not None
        return replace(part, images=image, scores=torch.cat(scores), snapshots=shots, stopped=sorted(stopped))


def relative_errors(ctx: Context, images: Tensor, targets: dict[str, Tensor], pooling: str) -> dict[str, float]:
    """{layer: ||G - A||^2 / ||A||^2} of one picture."""
    found = targets_of(ctx.model, images, list(targets), pooling)
    return {n: float((found[n] - a).square().sum() / a.square().sum().clamp_min(1e-20)) for n, a in targets.items()}


def correlation_length(image: Tensor) -> float:
    """How far apart pixels are alike: the first distance in pixels at which the autocorrelation of the lightness, mean of rows and
    columns, falls below 1/e; between two pixels it is taken as straight."""
    grey = image.cpu().double().mean(0)
    grey = grey - grey.mean()
    power = float(grey.square().mean())
    if power < 1e-12:
        return float(max(grey.shape))
    before = 1.0
    for lag in range(1, min(grey.shape)):
        along = float((grey[:, lag:] * grey[:, :-lag]).mean() + (grey[lag:] * grey[:-lag]).mean()) / 2 / power
        if along < np.exp(-1):
            return lag - (np.exp(-1) - along) / max(before - along, 1e-12)
        before = along
    return float(min(grey.shape))
