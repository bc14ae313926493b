from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from harness import Curve, Images, Metric, Paper, Param, Result, Table, Technique

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context

# The notes' plain recipe and the four settings that Yosinski et al. recommend (their toolbox's documentation). The
# toolbox's learning rates suit CaffeNet's gradients; here the rate is set by what the first step should gain, found by
# trial on squeezenet1_1: with less, the regularisation of the second and fourth undoes each step.
PLAIN: Mapping[str, Any] = {"jitter": 0, "decay": 0.0, "blur": 0.0, "blur_every": 0, "natural_colours": 0.0, "low_frequencies": 0.0}


def _yosinski(steps: int, gain: float, blur: float = 0.0, every: int = 0, **more: float) -> Mapping[str, Any]:
    start = {**PLAIN, "noise": 0.0, "step": "scaled"}
    return {**start, "steps": steps, "gain": gain, "blur": blur, "blur_end": blur, "blur_every": every, **more}


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "simonyan": {**PLAIN, "steps": 256, "step_size": 2.0, "l2": 0.005},
    "yosinski_1": _yosinski(500, 2.0, 0.5, 4, norm_percentile=50.0),
    "yosinski_2": _yosinski(750, 20.0, decay=0.3, norm_percentile=20.0),
    "yosinski_3": _yosinski(1000, 2.0, 1.0, 4, decay=0.0001),
    "yosinski_4": _yosinski(1000, 20.0, 0.5, 4, contribution_percentile=90.0),
}
PROGRESS = 5  # pictures in the progress strip
FAINT = 0.2  # pictures whose pixels lie closer than this to the mean are shown stretched as well


class ClassVisualization(Technique):
    """A picture that a class score likes: argmax_I S_c(I) - lambda ||I||_2^2 by gradient ascent
    (Simonyan et al. 2013, arXiv:1312.6034, eq. 1), with the decay, blur and clipping of Yosinski et al. 2015 (arXiv:1506.06579).

    S_c is the unnormalised score; I is measured from the training mean, and ascent starts there. By default steps follow
    natural colours and favour low frequencies (Olah et al. 2017, doi:10.23915/distill.00007); the presets named after
    papers do not. Cost: one forward and
    one backward pass a step and class.
    """

    name = "class_visualization"
    family = "synthesis"
    version = 2
    paper = Paper("Simonyan, Vedaldi, Zisserman", 2013, "Deep Inside Convolutional Networks", arxiv="1312.6034")
    needs = frozenset({"classifier"})
    reading = (
        "What the model would most like to see for each class. Parts that come back several times (heads, legs, textures) are "
        "what it looks for; things that come with the object in its training pictures may appear as well."
    )
    caveats = (
        "An optimum, not a typical example: it exaggerates, repeats and leaves out. The regulariser decides much of what it "
        "looks like, so compare pictures made with the same settings only."
    )
    audit = {"quick": {"steps": 96, "count": 2}, "standard": {"count": 4}, "full": {"count": 8}}

    classes: tuple[int | str, ...] = Param((), description="classes by index or name; none: `count` of them, spread evenly")
    count: int = Param(4, ge=1, le=100, description="how many classes when none are named")
    preset: Literal["default", "simonyan", "yosinski_1", "yosinski_2", "yosinski_3", "yosinski_4"] = Param(
        "default", description="a named recipe; parameters given besides it take precedence"
    )
    steps: int = Param(256, ge=0, le=100_000, description="gradient steps")
    step: Literal["normalised", "constant", "scaled", "progress", "line_search"] = Param(
        "normalised",
        description="normalised: by the gradient's RMS; constant: the raw gradient; scaled: the raw "
        "gradient times what makes the first step gain `gain`; progress: as much of it as the score's `gain` needs; "
        "line_search: constant, no step lowers the objective",
    )
    step_size: float = Param(
        8.0, gt=0, description="size of a step in 255ths: the RMS change of a pixel, or the (largest) factor of the raw gradient"
    )
    gain: float = Param(
        2.0, gt=0, description="with step scaled or progress: how much a step (the first, each) raises the objective, to first order"
    )
    size: int = Param(0, ge=0, le=4096, description="side of the picture in pixels; 0: the model's own")
    l2: float = Param(0.0, ge=0, description="lambda, weight of the squared distance from the training mean (pixels in [0, 1])")
    jitter: int = Param(16, ge=0, description="random shift before each pass, up to this many pixels at 224, in proportion at other sizes")
    decay: float = Param(0.0001, ge=0, lt=1, description="share of the distance from the mean that is lost after each step")
    blur: float = Param(1.5, ge=0, description="sigma of the Gaussian blur at the first step, in pixels")
    blur_end: float = Param(0.5, ge=0, description="sigma at the last step; in between it changes linearly")
    blur_every: int = Param(4, ge=0, description="steps between blurs; 0: never")
    natural_colours: float = Param(
        0.8, ge=0, le=1, description="how far steps follow the colour covariance of natural pictures: 0 each channel alone, 1 wholly"
    )
    low_frequencies: float = Param(
        0.5, ge=0, le=2, description="p of f^-p, by which each spatial frequency f of the gradient is scaled; 0: none"
    )
    norm_percentile: float = Param(
        0.0, ge=0, lt=100, description="after each step this share of pixels (percent), the smallest in norm, returns to the mean"
    )
    contribution_percentile: float = Param(
        0.0, ge=0, lt=100, description="the same for pixels with the smallest |sum over colours of pixel * gradient|"
    )
    noise: float = Param(0.02, ge=0, le=0.5, description="standard deviation of the noise around the mean at the start")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {**PRESETS.get(str(values.get("preset", "default")), {}), **values}

    @model_validator(mode="after")
    def _consistent(self) -> ClassVisualization:
        if self.step == "line_search" and self.jitter:
            raise ValueError("step line_search compares scores, which jitter would blur; set jitter to 0")
        return self

    def run(self, ctx: Context) -> Result:
        import torch

        from harness import optimise as o

        model = ctx.model
        classes = torch.tensor([model.class_index(c) for c in self.classes or spread(self.count, model.class_count)], device=ctx.device)
        side = self.size or model.input.size
        centre = torch.tensor(model.input.mean, device=ctx.device, dtype=model.dtype).view(1, -1, 1, 1)
        operators: list[o.Operator] = [
            o.Decay(self.decay, centre),
            o.Blur(self.blur, self.blur_every, self.blur_end, self.steps),
            o.ClipSmallNorm(self.norm_percentile, centre),
            o.ClipSmallContribution(self.contribution_percentile, centre),
            o.Clamp(),
        ]
        jitter = round(self.jitter * side / 224)

        def climb(rows: slice) -> tuple[Tensor, o.Ascent]:
            draws = ctx.draws([f"class-{c}" for c in classes[rows].tolist()])
            start = (centre + self.noise * draws.randn((model.input.channels, side, side))).clamp(0, 1)
            return start, o.ascend(
                model,
                o.class_score(classes[rows]) - self.l2 * o.squared_norm(centre),
                start,
                steps=self.steps,
                step_size=self.step_size / 255,
                draws=draws,
                rule=self.step,
                gain=self.gain,
                transforms=[o.Jitter(jitter)] if jitter else [],
                conditioners=[o.NaturalColours(self.natural_colours), o.LowFrequencies(self.low_frequencies)],
                operators=operators,
                snapshots=PROGRESS,
                progress=ctx.report,
            )

        starts, parts = zip(*ctx.batched(len(classes), climb), strict=True)
        start, made = torch.cat(starts), o.join(parts)
        logits = ctx.logits(made.images)
        score = logits.gather(1, classes[:, None]).squeeze(1)
        chance = logits.softmax(1).gather(1, classes[:, None]).squeeze(1)
        rank = 1 + (logits > score[:, None]).sum(1)
        high = high_frequency_share(made.images)
        names = [model.class_name(c) for c in classes.tolist()]
        artifacts: list[Any] = [
            Images(
                "pictures",
                made.images,
                captions=[f"{n}, p = {p:.3f}" for n, p in zip(names, chance.tolist(), strict=True)],
                columns=4,
                exact=side < 64,
            )
        ]
        faint = (made.images - centre).abs().flatten(1).float().quantile(0.995, dim=1)
        if bool((faint < FAINT).any()):
            # As the toolbox of Yosinski et al. shows its pictures, which stay close to the mean.
            scale = faint.clamp_min(1e-6).to(made.images.dtype).view(-1, 1, 1, 1)
            artifacts.append(
                Images(
                    "stretched",
                    (0.5 + (made.images - centre) / (2 * scale)).clamp(0, 1),
                    captions=names,
                    columns=4,
                    exact=side < 64,
                    caption="The same with their contrast stretched: grey is the training mean, each on its own scale.",
                )
            )
        if made.snapshots:
            shown = min(len(names), 4)
            strip = torch.cat([torch.stack([start[i], *(s[i] for _, s in made.snapshots)]) for i in range(shown)])
            captions = [text for n in names[:shown] for text in (f"{n}: start", *(f"step {t}" for t, _ in made.snapshots))]
            artifacts.append(Images("progress", strip, captions=captions, columns=len(made.snapshots) + 1, exact=side < 64))
            known = torch.isfinite(made.scores).all(0).tolist()
            lines = {n: made.scores[:, i] for i, n in enumerate(unique(names)) if known[i]}
            if lines:
                artifacts.append(Curve("objective", range(1, len(made.scores) + 1), lines, "step", "objective"))
        rows = [
            list(row) for row in zip(names, classes.tolist(), score.tolist(), chance.tolist(), rank.tolist(), high.tolist(), strict=True)
        ]
        artifacts.append(Table("classes", ["class", "index", "score", "probability", "rank", "high-frequency share"], rows))
        metrics = [
            Metric(
                "probability",
                float(chance.mean()),
                better="higher",
                per_image=chance.tolist(),
                about="probability of the class for its own picture",
            ),
            Metric("lowest_probability", float(chance.min()), better="higher", about="the least of these probabilities"),
            Metric(
                "first_share",
                float((rank == 1).float().mean()),
                better="higher",
                about="share of pictures that the model gives their class",
            ),
            Metric(
                "high_frequency",
                float(high.mean()),
                better="lower",
                per_image=high.tolist(),
                about="share of spectral energy above a quarter of the sampling rate",
            ),
        ]
        notes = [
            f"{names[i]}: the score stopped being finite; the last good picture is shown; use a smaller step_size" for i in made.stopped
        ]
        return Result(artifacts, metrics, notes)


def spread(count: int, classes: int) -> list[int]:
    """`count` class indices, evenly through all of them."""
    count = min(count, classes)
    return [(2 * i + 1) * classes // (2 * count) for i in range(count)]


def unique(names: list[str]) -> list[str]:
    """Names as labels of lines: a repeated one gets its number."""
    return [n if names.count(n) == 1 else f"{n} ({names[: i + 1].count(n)})" for i, n in enumerate(names)]


def high_frequency_share(images: Tensor) -> Tensor:
    """(N,) share of the spectral energy, mean colour apart, at more than a quarter of the sampling rate."""
    import torch

    x = images - images.mean((2, 3), keepdim=True)
    energy = torch.fft.rfft2(x.float()).abs().square().sum(1)  # (N, H, W // 2 + 1)
    fy = torch.fft.fftfreq(x.shape[2], device=x.device).abs()[:, None]
    fx = torch.fft.rfftfreq(x.shape[3], device=x.device)[None, :]
    # Columns of the half spectrum stand for two frequencies, but for the first and, at even widths, the last.
    twice = torch.full_like(fx, 2.0)
    twice[:, 0] = 1
    if x.shape[3] % 2 == 0:
        twice[:, -1] = 1
    energy = energy * twice
    high = (energy * (torch.maximum(fy, fx) > 0.25)).sum((1, 2))
    return high / energy.sum((1, 2)).clamp_min(torch.finfo(energy.dtype).tiny)
