from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import model_validator

from harness import ConfigError, Curve, Images, Metric, NotApplicable, Paper, Param, Result, Table, Technique

from .gram import Form, Style, content_layer, descent, falling, features_of, maps_of, moments_of, pooled, sparse, style_layers
from .pictures import (
    LEAST_SPREAD,
    NAMED,
    coarse_to_fine,
    colours_of,
    contents,
    eight_bits,
    framed,
    in_colours,
    parts_of,
    recoloured,
    refusal,
    resized,
    tensor_of,
    unframed,
    unseen,
)

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from harness import Context
    from harness.optimise import Ascent, Moments, Objective, Patches, Places
    from harness.technique import Further

EVERY = 100  # steps between the pictures that show the progress
COLOURS_AT = 256  # pixels of the longer side at which a style's colours are counted
WEIGHT, WEIGHT_OF_GRAMS = 7.0, 30.0  # of the style
MATCHES = 0.07  # of single places beside the style's statistics
LARGE, SOFT = 8, 1.2  # pixels: the patches that take ripples away at the end, and the Gaussian by which they are compared
LEAST = 32  # pixels of the shorter side of the coarsest picture
# The settings of Gatys et al. 2016 in torchvision's layer names: content at relu4_2, style at relu1_1 to relu5_1.
PAPER: dict[str, Any] = {"pooling": "average", "palette": 0.0}
PRESETS: dict[str, dict[str, Any]] = {
    "vgg19": {
        "content_layer": "features.22",
        "style_layers": ("features.1", "features.6", "features.11", "features.20", "features.29"),
        **PAPER,
    },
    "vgg16": {
        "content_layer": "features.20",
        "style_layers": ("features.1", "features.6", "features.11", "features.18", "features.25"),
        **PAPER,
    },
}
LAST_OF = {"vgg19": "features.34", "vgg16": "features.28"}  # conv5_4 and conv5_3, at other places in other networks of the family


@dataclass(frozen=True)
class Plan:
    """One picture to be made: what is weighed how."""

    label: str
    style_weight: float
    style_scale: float


class StyleTransfer(Technique):
    """The content of one picture in the style of another: argmin_x alpha ||F(x) - P||^2 / ||P||^2 + beta (sum_l w_l E_l(x) + delta M(x)) +
    gamma TV(x), F being a layer's output, P that of the content picture, E_l how far a layer's statistics are from the style's (Gatys et
    al. 2016, CVPR; arXiv:1508.06576), and M how far single places are from the style's that are most like them (Li & Wand 2016, CVPR;
    arXiv:1601.04589).

    E_l = ||W_l (K_l(x) - C_l) W_l||^2 / ||W_l C_l W_l||^2: K_l are mean products of features about the style's means, C_l the style's
    covariances, W_l = C_l^-1/4, by which rare features count more, if not those that are hardly there. M is the mean, over style layers
    with strides of eight and more, of ||F_l(x) - T_l||^2 / (HW s_l): at each place T_l has the style's features of the place whose
    surroundings of 3 x 3 are most like it, found anew in each part; s_l is the mean squared distance of features from their mean, beside
    a content the larger of the style's and the content's. `form=relative` has Gram matrices G_l, ||G_l(x) - A_l||^2 / ||A_l||^2, and
    neither M nor patches, if these are not asked for. These errors are shares, so that one set of weights serves networks and layers of
    any scale; beside a content, the weight of E_l is divided by the content's own where that is above one. `form=absolute` has the
    paper's sums.

    Between the parts at smaller sizes patches of pixels become the style's (`strokes`; Kwatra et al. 2005). At the end they do so twice:
    larger ones, compared without what is fine, in whose place is the style's (Freeman et al. 2002); then the content's fine detail is added
    (`detail`), and smaller ones make paint of it; at last fine frequencies get the style's power.

    The content is the picture in the style's colours (`palette`; Pitie & Kokaram 2007), so that features agree on what is dark and what is
    red. Descent starts from the content picture and goes from a coarse picture to a fine one. Pictures keep their shapes and are worked on
    one by one and whole: memory grows with their size, as the statistics of all positions are needed at once. Cost: one forward and one
    backward pass to the deepest layer a step, of the picture with a frame of some pixels; three forward passes a part, and the comparison
    with up to 4096 places of the style; two with 8192 patches at the end, and one in each part at smaller sizes.
    """

    name = "style_transfer"
    family = "style"
    version = 11
    paper = Paper("Gatys, Ecker, Bethge", 2016, "Image Style Transfer Using Convolutional Neural Networks", arxiv="1508.06576")
    needs = frozenset({"dataset", "conv"})
    per_picture = True
    reading = (
        "The first picture is the content, the second the style. The table says how far features are from those of the content and Gram "
        "matrices, whatever `form` is, from those of the style, as shares of them, each in the colours in which it is matched: one falls "
        "as the other rises. The objective jumps where the picture is moved against the network's strides, is painted over or grows, and "
        "where its places are matched anew."
    )
    caveats = "Whether a picture is good no number here tells: look. Networks other than VGG give other, often flatter, styles."

    style: tuple[str, ...] = Param(("textures:ihc.png",), min_length=1, description=f"style pictures; each {NAMED}")
    blend: tuple[float, ...] = Param(
        (), description="weights of several styles, whose Gram matrices and means are averaged; none: all the same"
    )
    preset: Literal["", "vgg19", "vgg16"] = Param(
        "", description="vgg19, vgg16: layers, pooling, palette and Gram matrices of the paper, for a model with that network's layers"
    )
    content_layer: str = Param("", description="layer of the content; none: one at a quarter of the depth")
    style_layers: tuple[str, ...] = Param((), description="layers of the style; none: five over the first three quarters")
    layer_weights: tuple[float, ...] = Param(
        (), description="w_l of the style layers; none: evenly falling, with the preset all the same, and 1 in sum"
    )
    content_weight: float = Param(1.0, ge=0, description="alpha")
    style_weight: tuple[float, ...] = Param(
        (), description=f"beta; several make a row of pictures; none: {WEIGHT:g}, of Gram matrices {WEIGHT_OF_GRAMS:g}"
    )
    match_weight: float | None = Param(
        None,
        ge=0,
        description="delta: how much single places count beside statistics, as a share of beta, at style layers with strides of eight and "
        "more, or else the last with one of four; more of it paints more of the style's things, also over the subject. For errors that are "
        f"shares; none: {MATCHES:.2g}, with Gram matrices 0",
    )
    strokes: float | None = Param(
        None,
        ge=0,
        le=1,
        description="how far, however small the weight of the style is, patches of pixels become those of the style that are most like "
        "them: twice at the end, where the picture then becomes as sharp as the style, and between the parts at smaller sizes; it paints "
        "over what is dreamt. 0: not at all; none: 1, with Gram matrices 0",
    )
    detail: float = Param(
        1.0,
        ge=0,
        le=1,
        description="how much of the content's fine detail, windows and cables, the patches at the end lie over, which have it then; no "
        "stronger than the styles' own, and weaker where less of the content's shapes is left. 0: what the network keeps, as without "
        "`strokes` or a `content_weight`",
    )
    tv_weight: float = Param(0.0, ge=0, description="gamma, to smooth; TV is 100 times the mean square of neighbours' differences")
    style_scale: tuple[float, ...] = Param(
        (1.0,), min_length=1, description="size of the style picture against the content's; several: a row"
    )
    form: Literal["", "covariance", "relative", "absolute"] = Param(
        "",
        description="of the style's errors: by covariances about the style's means, as shares; relative: by Gram matrices, as shares; "
        "absolute: the paper's sums; none: covariance, with the preset relative",
    )
    pooling: Literal["max", "average"] = Param("average", description="average: means in place of max pooling, as in the paper")
    start: Literal["content", "noise"] = Param("content", description="what descent starts from")
    optimiser: Literal["lbfgs", "adam"] = Param("lbfgs", description="L-BFGS, or Adam with `step_size`")
    step_size: float = Param(5.0, gt=0, description="size of Adam's steps, of the first of L-BFGS, in 255ths")
    steps: int = Param(200, ge=0, le=100_000, description="steps at the full size")
    shifts: int = Param(
        8,
        ge=1,
        le=1000,
        description="parts of the descent at each size, in each of which the picture lies elsewhere to the strides by a pixel or more",
    )
    coarse: int = Param(3, ge=0, le=6, description="how many smaller sizes, each half of the next, come before it, with as many steps")
    palette: float = Param(
        1.0,
        ge=0,
        le=1,
        description="how far the content takes the mean and the covariance of the styles' colours beforehand; 0: its own, as with "
        "`colours=content` and the presets",
    )
    natural_colours: float = Param(
        1.0, ge=0, le=1, description="how far steps follow the colours of natural pictures, against coloured fringes"
    )
    size: int = Param(768, ge=8, le=8192, description="longer side of the pictures")
    colours: Literal["style", "content"] = Param("style", description="content: the picture keeps its own colours, which the styles take")
    dream: float = Param(0.0, ge=0, description="weight of a layer's squared norm, which makes it dream on top")
    dream_layer: str = Param("", description="the layer that dreams; none: the content's")

    @model_validator(mode="after")
    def _consistent(self) -> StyleTransfer:
        if self.blend and len(self.blend) != len(self.style):
            raise ValueError(f"blend has {len(self.blend)} weights for {len(self.style)} styles")
        if self.blend and (min(self.blend) < 0 or sum(self.blend) <= 0):
            raise ValueError("blend: weights are not below zero, and one is above")
        if min(self.style_weight, default=0) < 0 or min(self.style_scale) <= 0:
            raise ValueError("style_weight must not be below zero, style_scale must be above zero")
        if self.preset:
            own = [n for n, value in PRESETS[self.preset].items() if getattr(self, n) not in (value, type(self).model_fields[n].default)]
            if own:
                raise ValueError(f"preset={self.preset} has its own {' and '.join(own)}; leave that out, or the preset")
        if self.layer_weights and (min(self.layer_weights) < 0 or sum(self.layer_weights) <= 0):
            raise ValueError("layer_weights: weights are not below zero, and one is above")
        return self

    def further(self) -> Further:
        from harness.technique import Further

        return Further(pictures=self.style)

    def run(self, ctx: Context) -> Result:
        from harness.datasets import flat

        if self.preset:
            convolutions = [name for name, _ in ctx.model.convolutions() if name.startswith("features.")]  # and not those of a head
            if convolutions[-1:] != [LAST_OF[self.preset]]:
                network = self.preset.upper().replace("VGG", "VGG-")
                raise ConfigError(
                    f"style_transfer.preset: {self.preset} names {network}'s layers, and {ctx.model.name!r} is another network"
                )
        form: Form = self.form or ("relative" if self.preset else "covariance")
        betas = self.style_weight or (WEIGHT if form == "covariance" else WEIGHT_OF_GRAMS,)
        places = self.match_weight if self.match_weight is not None else MATCHES if form == "covariance" else 0.0
        strokes = self.strokes if self.strokes is not None else float(form == "covariance")
        settled = {"form": form, "style_weight": betas, "match_weight": places, "strokes": strokes}
        settings = self.model_copy(update={**PRESETS.get(self.preset, {}), **settled})
        layers = style_layers(ctx, settings.style_layers)
        if not self.layer_weights:  # the paper's are all the same
            weights = (1 / len(layers),) * len(layers) if self.preset else falling(len(layers))
            settings = settings.model_copy(update={"layer_weights": weights})
        elif len(self.layer_weights) != len(layers):
            raise ConfigError(
                f"style_transfer.layer_weights: {len(self.layer_weights)} numbers for {len(layers)} style layers: {', '.join(layers)}"
            )
        content = content_layer(ctx, settings.content_layer)
        styles = [(name, ctx.named_picture(name)) for name in self.style]
        plans = [
            Plan(
                ", ".join([f"style x {w:g}"] * (len(betas) > 1) + [f"scale {s:g}"] * (len(self.style_scale) > 1)) or "result",
                w,
                s,
            )
            for s in self.style_scale
            for w in betas
        ]
        notes = [f"{name}: one colour everywhere; its statistics hold nothing but that colour" for name, p in styles if flat(p)]
        artifacts: list[Any] = []
        rows: list[list[Any]] = []
        curves: dict[str, Any] = {}
        reasons = {name: refusal(ctx, picture, [*layers, content]) for name, picture in contents(ctx, self.size)}
        refused = [f"{name}: {reason}" for name, reason in reasons.items() if reason]
        if len(refused) == len(ctx.ids):
            raise NotApplicable("; ".join(refused))
        for plan in plans:  # before work is put into any
            Transfer(ctx, settings, layers, content, [p for _, p in styles], plan, "").check(self.size)
        final: dict[str, list[float]] = {"content_error": [], "style_error": []}
        for number, (name, picture) in enumerate(contents(ctx, self.size), 1):
            if reasons[name]:
                continue
            made = []
            for plan in plans:
                found = Transfer(ctx, settings, layers, content, [p for _, p in styles], plan, f"{name} {plan.style_scale:g}").run(picture)
                made.append(found)
                label = f"{name}, {plan.label}" if len(ctx.ids) > 1 or len(plans) > 1 else plan.label
                curves[label] = found.trace
                rows.append([name, plan.style_weight, plan.style_scale, found.content, found.style, found.variation])
                notes += [f"{label}: {n}" for n in found.notes]
            final["content_error"].append(made[0].content)
            final["style_error"].append(made[0].style)
            artifacts += self._shown(number, name, picture, styles, made, plans)
            ctx.report("pictures", number, len(ctx.ids))
        longest = max(len(t) for t in curves.values())
        if longest:
            lines = {k: np.r_[v, np.full(longest - len(v), v[-1] if len(v) else 0.0)] for k, v in curves.items()}
            artifacts.append(
                Curve(
                    "objective", range(1, longest + 1), lines, "step", "weighted errors", log_y=all((v > 0).all() for v in lines.values())
                )
            )
        columns = ["picture", "style weight", "style scale", "content error", "style error", "TV"]
        artifacts.append(Table("errors", columns, rows))
        about = {
            "content_error": "relative squared error of the features of the content in its palette, of the first weight and scale",
            "style_error": "relative squared error of the style's Gram matrices, mean of layers",
        }
        metrics = [Metric(k, float(np.mean(v)), better="lower", per_image=v, about=about[k]) for k, v in final.items()]
        notes.append(f"content at {content}; style at {', '.join(layers)}")
        return Result(artifacts, metrics, list(dict.fromkeys([*notes, *refused])))

    def _shown(
        self, number: int, name: str, picture: Tensor, styles: list[tuple[str, Image.Image]], made: list[Transferred], plans: list[Plan]
    ) -> list[Any]:
        import torch

        height, width = picture.shape[2:]
        frame = [padded(p, height, width, picture) for _, p in styles]
        sheet = torch.cat([picture, *frame, *(m.image for m in made)])
        captions = [
            name,
            *(n for n, _ in styles),
            *(f"{p.label}: content {m.content:.2g}, style {m.style:.2g}" for p, m in zip(plans, made, strict=True)),
        ]
        small = min(height, width) < 64
        found: list[Any] = [Images(f"transfer-{number}", eight_bits(sheet), captions=captions, columns=min(4, len(sheet)), exact=small)]
        if made[0].stages:
            strip = torch.cat([resized(image, height, width) for _, image in made[0].stages])
            names = [f"step {n}" for n, _ in made[0].stages]
            found.append(Images(f"progress-{number}", eight_bits(strip), captions=names, columns=min(6, len(strip)), exact=small))
        return found


@dataclass(frozen=True)
class Transferred:
    image: Tensor
    trace: np.ndarray  # the weighted errors before each step
    stages: list[tuple[int, Tensor]]
    content: float
    style: float
    variation: float
    notes: list[str]


class Transfer:
    """One picture's way from coarse to fine."""

    def __init__(
        self, ctx: Context, settings: StyleTransfer, layers: list[str], content: str, styles: list[Image.Image], plan: Plan, stream: str
    ) -> None:
        self.ctx, self.settings, self.layers, self.content, self.styles, self.plan, self.stream = (
            ctx,
            settings,
            layers,
            content,
            styles,
            plan,
            stream,
        )
        self.own: tuple[np.ndarray, np.ndarray] | None = None  # colours of the content, which styles take where it keeps its own

    def run(self, picture: Tensor) -> Transferred:
        from harness import optimise as o

        ctx, s = self.ctx, self.settings
        height, width = picture.shape[2:]
        draws = ctx.draws([self.stream])
        picture = self._in_the_styles_colours(picture)
        self.own = self._kept_colours(picture)
        image: Tensor | None = None
        traces, stages, notes = [], [], []
        done = shown = 0
        for tall, wide in coarse_to_fine(height, width, s.coarse, LEAST):
            if (tall, wide) != (height, width) and self.plan.style_weight and self.style_refusal(max(tall, wide)):
                continue
            small = resized(picture, tall, wide)
            if (tall, wide) != (height, width) and unseen(ctx, small, [*self.layers, self.content]):
                continue
            if image is not None:
                image = resized(image, tall, wide)
            elif s.start == "content":
                image = small
            else:
                image = draws.rand(small.shape[1:])
            style = Style(self.style_targets(max(tall, wide)), s.form or "covariance") if self.plan.style_weight else None
            places = self.style_places(max(tall, wide)) if self.plan.style_weight and s.match_weight else {}
            brush = self._brush(max(tall, wide)) if self.plan.style_weight and s.strokes and s.steps else None
            parts = parts_of(s.steps, s.shifts)
            for number, steps in enumerate(parts):
                start = framed(image, number)
                part = self._descend(self._objective(framed(small, number), start, style, places), start, steps, draws)
                image = unframed(part.images, number).clamp(0, 1)
                last = number == len(parts) - 1 or bool(part.stopped)
                if brush is not None and (tall, wide) != (height, width):
                    image = o.repainted(image, brush, s.strokes or 0).clamp(0, 1)
                elif brush is not None and last:
                    image = self._finished(image, picture, brush)
                traces.append(-part.scores[:, 0].cpu().double().numpy())
                for n, shot in part.snapshots:
                    end = n == part.snapshots[-1][0]
                    if (last and end) or (done + n) // EVERY > shown:
                        shown = (done + n) // EVERY
                        stages.append((done + n, image if end else unframed(shot, number)))
                done += steps
                if part.stopped:
                    notes.append(
                        "the errors stopped being finite; the last good picture is shown: use smaller weights or another optimiser"
                    )
                    break
        assert image is not None
        if s.colours == "content":
            image = recoloured(image, picture)
        style_error, content_error = self._errors(image, picture)
        variation = float(o.total_variation().score({}, image)) * 100 / image.numel()
        trace = np.concatenate(traces)
        return Transferred(image, trace[np.isfinite(trace)], stages, content_error, style_error, variation, notes)

    def _descend(self, objective: Objective, start: Tensor, steps: int, draws: Any) -> Ascent:
        from harness import optimise as o

        s = self.settings
        return o.ascend(
            self.ctx.model,
            objective,
            start,
            steps=steps,
            snapshots=max(1, steps // EVERY),
            step_size=s.step_size / 255,
            rule=descent(s.optimiser),
            draws=draws,
            operators=[o.Clamp()],
            conditioners=[o.NaturalColours(s.natural_colours)],
            during=lambda _: pooled(s.pooling, self.ctx.model.module),
            progress=self.ctx.report,
        )

    def _in_the_styles_colours(self, picture: Tensor) -> Tensor:
        """Not where nothing of the style is wanted or it has none, nor where the picture is to keep its own."""
        s = self.settings
        if not (s.palette and self.plan.style_weight) or s.colours == "content":
            return picture
        counted = [(share, *colours_of(tensor_of(self.ctx, p, COLOURS_AT))) for share, p in zip(self.shares(), self.styles, strict=True)]
        counted = [(share, m, c) for share, m, c in counted if share and np.trace(c) > len(m) * LEAST_SPREAD**2]
        if not counted:
            return picture
        shares = np.asarray([share for share, _, _ in counted])
        mean, covariance = (np.tensordot(shares / shares.sum(), [one[i] for one in counted], 1) for i in (1, 2))
        return in_colours(picture, mean, covariance, s.palette)

    def _kept_colours(self, picture: Tensor) -> tuple[np.ndarray, np.ndarray] | None:
        """Those that the styles are to take: of a picture of one colour there are none."""
        if self.settings.colours != "content":
            return None
        mean, covariance = colours_of(picture)
        return (mean, covariance) if np.trace(covariance) > len(mean) * LEAST_SPREAD**2 else None

    def shares(self) -> list[float]:
        """How much each style counts; their sum is 1."""
        shares = np.asarray(self.settings.blend or [1.0] * len(self.styles), float)
        return [float(v) for v in shares / shares.sum()]

    def style_targets(self, side: int) -> dict[str, Moments]:
        """Weighted means of the styles' Gram matrices and means, the style pictures' longer side being `side` times the plan's scale."""
        from harness.optimise import Moments

        found: dict[str, Moments] = {}
        for share, image in self._style_images(side):
            for layer, (products, mean) in moments_of(self.ctx.model, image, self.layers, self.settings.pooling).items():
                before = found.get(layer, (0, 0))
                found[layer] = Moments(before[0] + share * products, before[1] + share * mean)
        return found

    def style_places(self, side: int) -> dict[str, Places]:
        """What the styles have at layers that see shapes, of each as much as it counts."""
        from harness.optimise import feature_places

        layers = sparse(self.ctx, self.layers)
        if not layers:
            return {}
        shares, images = zip(*self._style_images(side), strict=True)
        maps = [maps_of(self.ctx.model, image, layers, self.settings.pooling) for image in images]
        return {layer: feature_places([one[layer] for one in maps], shares) for layer in layers}

    def _finished(self, image: Tensor, picture: Tensor, brush: Patches) -> Tensor:
        """In patches of the styles twice: as far as they agree on what is not fine, and with the content's fine detail; and as sharp."""
        from harness import optimise as o

        s = self.settings
        amount = s.strokes or 0
        shares, styles = zip(*self._style_images(max(image.shape[2:])), strict=True)
        image = o.repainted(image, o.pixel_patches(styles, shares, LARGE, SOFT), amount).clamp(0, 1)
        if s.content_weight and s.detail:
            image = o.with_detail(image, picture, styles, shares, amount * s.detail).clamp(0, 1)
        image = o.repainted(image, brush, amount).clamp(0, 1)
        sharp = o.as_sharp_as(image, styles, shares)
        return (image + amount * (sharp - image)).clamp(0, 1)

    def _brush(self, side: int) -> Patches:
        from harness.optimise import pixel_patches

        shares, images = zip(*self._style_images(side), strict=True)
        return pixel_patches(images, shares)

    def _style_images(self, side: int) -> Iterator[tuple[float, Tensor]]:
        """How much each style counts, and its picture, whose longer side is `side` times the plan's scale."""
        for share, picture in zip(self.shares(), self.styles, strict=True):
            image = tensor_of(self.ctx, picture, self.style_size(side))
            yield share, image if self.own is None else in_colours(image, *self.own)

    def check(self, side: int) -> None:
        """Raises where the network cannot look at the styles at the full size."""
        reason = self.style_refusal(side)
        if reason:
            raise ConfigError(f"{self.ctx.technique}.style: {reason}; raise style_scale or size")

    def style_size(self, side: int) -> int:
        return max(1, round(side * self.plan.style_scale))

    def style_refusal(self, side: int) -> str:
        """Why the network cannot look at one of the styles where the picture's longer side is `side`; empty where it can."""
        for picture in self.styles:
            image = tensor_of(self.ctx, picture, self.style_size(side))
            reason = refusal(self.ctx, image, self.layers)
            if reason:
                return f"at {image.shape[3]} x {image.shape[2]} pixels {reason}"
        return ""

    def _objective(self, target: Tensor, image: Tensor, style: Style | None, places: Mapping[str, Places]) -> Objective:
        """For a content and for what has been made of it."""
        import torch

        from harness import optimise as o
        from harness.optimise.matching import spread

        ctx, s = self.ctx, self.settings
        absolute = s.form == "absolute"
        needed = self.layers if style is not None and (places or not absolute) else []
        own = maps_of(ctx.model, target, [*needed, self.content], s.pooling) if s.content_weight else {}
        objective = o.Objective(frozenset(), lambda _, x: 0 * x.sum((1, 2, 3)))  # a slope there is, even where nothing is weighed
        if s.content_weight:
            objective = objective - s.content_weight * o.content_error(
                self.content, own[self.content], "absolute" if absolute else "relative"
            )
        if style is not None:
            weights: Sequence[float] = s.layer_weights
            if s.content_weight and not absolute:
                weights = self._eased(weights, style, own)
            objective = objective - self.plan.style_weight * style.error(weights)
        if places:
            now = maps_of(ctx.model, image, list(places), s.pooling)
            wanted = {layer: o.nearest_places(features, places[layer]) for layer, features in now.items()}
            # Of a style that is much fainter than the content nothing but the style would be left.
            spreads = {n: torch.maximum(p.spread, spread(own[n])) if n in own else p.spread for n, p in places.items()}
            objective = objective - self.plan.style_weight * (s.match_weight or 0) * o.match_error(wanted, spreads)
        if s.tv_weight:
            objective = objective - (s.tv_weight / target[0].numel() * 100) * o.total_variation()
        if s.dream:
            layer = ctx.model.full_name(s.dream_layer) if s.dream_layer else self.content
            ctx.model.maps_shape(layer)
            size = features_of(ctx.model, target, layer, s.pooling).square().sum()
            objective = objective + (2 * s.dream / float(size)) * o.layer_norm(layer)
        return objective

    def _eased(self, weights: Sequence[float], style: Style, own: Mapping[str, Tensor]) -> list[float]:
        """The weights of errors that are shares, less where those of the content's own maps {layer: (1, C, H, W)} are above one: of a style
        that is much fainter than the content nothing but the style would be left. By covariances that is so of most, as photographs have
        what paintings have not."""
        from harness.device import full_precision

        some = next(iter(own.values()))
        with full_precision(some.device):
            away = [float(style.error(only=n).score(dict(own), some)) for n in self.layers]
        return [w / max(1.0, d) for w, d in zip(weights, away, strict=True)]

    def _errors(self, image: Tensor, picture: Tensor) -> tuple[float, float]:
        """(style, content) relative errors of the finished picture, each style layer counting the same."""
        import torch

        from harness import optimise as o

        ctx, s = self.ctx, self.settings
        with torch.no_grad(), pooled(s.pooling, ctx.model.module):
            style = Style(self.style_targets(max(picture.shape[2:]))).error()
            content = o.content_error(self.content, features_of(ctx.model, picture, self.content, s.pooling))
            return float(o.evaluate(ctx.model, style, image, image)), float(o.evaluate(ctx.model, content, image, image))


def padded(picture: Image.Image, height: int, width: int, like: Tensor) -> Tensor:
    """A picture fitted into a frame of the size, white around it."""
    import torch
    from PIL import Image, ImageOps

    small = ImageOps.contain(picture.convert("L" if like.shape[1] == 1 else "RGB"), (width, height), Image.Resampling.LANCZOS)
    frame = Image.new(small.mode, (width, height), "white")
    frame.paste(small, ((width - small.width) // 2, (height - small.height) // 2))
    pixels = np.asarray(frame)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(pixels.copy()).to(like.device, like.dtype)[None] / 255
