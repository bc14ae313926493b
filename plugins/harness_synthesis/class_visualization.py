from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from harness import Curve, Images, Metric, NotApplicable, Paper, Param, Result, Table, Technique, Use

from .blocks import refuses
from .climb import CONVERGED, GO_ON, PROGRESS, SCHEDULE, check_go_on, earlier, go_on, mean_picture, state_of, strip

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context
    from harness.optimise import Ascent

# The notes' plain recipe and the four settings that Yosinski et al. recommend (their toolbox's documentation). The
# toolbox's learning rates suit CaffeNet's gradients; here the rate is set by what the first step should gain, found by
# trial on squeezenet1_1: with less, the regularisation of the second and fourth undoes each step.
PLAIN: Mapping[str, Any] = {"jitter": 0, "decay": 0.0, "blur": 0.0, "blur_every": 0, "natural_colours": 0.0, "low_frequencies": 0.0}
# What acts on pixels one by one, and does not stand beside another parametrisation.
PIXELWISE = ("decay", "blur", "natural_colours", "low_frequencies", "norm_percentile", "contribution_percentile")
ADAM: Mapping[str, Any] = {**PLAIN, "step": "adam", "step_size": 12.75}
# Transforms, rate and initial deviation as in the tutorial of Olah, Mordvintsev & Schubert's library.
FOURIER: Mapping[str, Any] = {**ADAM, "parametrisation": "fourier", "noise": 0.01, "pad": 0.05, "jitter": 8, "scale": 0.05, "rotate": 5.0}
PRIOR: Mapping[str, Any] = {**ADAM, "parametrisation": "prior", "step_size": 2.55, "jitter": 8, "scale": 0.05, "rotate": 5.0}


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
    "fourier": FOURIER,
    "prior": PRIOR,
}
COMPARED = tuple(name for name in PRESETS if name not in ("fourier", "prior"))  # item by item what the papers set side by side
Preset = Literal["default", "simonyan", "yosinski_1", "yosinski_2", "yosinski_3", "yosinski_4", "fourier", "prior", "compare"]
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
    version = 7
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
    preset: Preset = Param(
        "default",
        description="a named recipe; parameters given besides it take precedence. compare: those that need no other parametrisation, "
        "side by side",
    )
    parametrisation: Literal["pixels", "fourier", "prior"] = Param(
        "pixels",
        description="what steps move: the pixels; Fourier coefficients of decorrelated colours; the weights and the code of an untrained "
        "convolutional network that draws the picture. The last two bring the settings of the preset of their name",
    )
    steps: int = Param(256, ge=0, le=100_000, description="gradient steps")
    step: Literal["normalised", "constant", "scaled", "progress", "line_search", "adam", "lbfgs"] = Param(
        "normalised",
        description="normalised: by the gradient's RMS; constant: the raw gradient; scaled: the raw "
        "gradient times what makes the first step gain `gain`; progress: as much of it as the score's `gain` needs; "
        "line_search: constant, no step lowers the objective; adam, lbfgs: those",
    )
    step_size: float = Param(
        8.0, gt=0, description="size of a step in 255ths: the RMS change of a pixel, or the (largest) factor of the raw gradient"
    )
    gain: float = Param(
        2.0, gt=0, description="with step scaled or progress: how much a step (the first, each) raises the objective, to first order"
    )
    schedule: int | None = SCHEDULE
    size: int = Param(0, ge=0, le=4096, description="side of the picture in pixels; 0: the model's own")
    l2: float = Param(0.0, ge=0, description="lambda, weight of the squared distance from the training mean (pixels in [0, 1])")
    jitter: int = Param(16, ge=0, description="random shift before each pass, up to this many pixels at 224, in proportion at other sizes")
    scale: float = Param(0.0, ge=0, lt=1, description="random change of size before each pass, up to this share either way")
    rotate: float = Param(0.0, ge=0, le=180, description="random turn before each pass, up to this many degrees either way")
    pad: float = Param(0.0, ge=0, le=0.5, description="grey border before each pass, as a share of the side")
    tv: float = Param(0.0, ge=0, description="weight of the total variation (sum of squared differences of neighbours, pixels in [0, 1])")
    gradient_percentile: float = Param(0.0, ge=0, lt=100, description="this share of the gradient's values, the smallest, is left out")
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
    converged: float = CONVERGED
    go_on: int = GO_ON

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        named = values.get("preset", values.get("parametrisation", "default"))
        return {**PRESETS.get(str(named), {}), **values}

    @model_validator(mode="after")
    def _consistent(self) -> ClassVisualization:
        check_go_on(self)
        if self.preset == "compare" and self.go_on:
            raise ValueError("go_on: the presets side by side are runs of their own; go on from one of them")
        blurring = [n for n in ("jitter", "scale", "rotate") if getattr(self, n)]
        if self.step in ("line_search", "lbfgs") and blurring:
            raise ValueError(f"step {self.step} compares scores, which {blurring[0]} would blur; set {' and '.join(blurring)} to 0")
        pixelwise = [n for n in PIXELWISE if getattr(self, n)]
        if self.parametrisation != "pixels" and pixelwise:
            raise ValueError(f"{pixelwise[0]} acts on pixels, which parametrisation {self.parametrisation} does not move; set it to 0")
        return self

    def uses(self) -> list[Use]:
        if self.preset != "compare":
            return earlier(self)
        given = {k: v for k, v in self.key_params().items() if k in self.model_fields_set and k not in ("preset", "go_on")}
        return [Use(self.name, {**given, "preset": preset}, name=preset) for preset in COMPARED]

    def run(self, ctx: Context) -> Result:
        import torch

        from harness.optimise.conditioners import quantile

        if self.preset == "compare":
            return compared(ctx)
        model = ctx.model
        classes = torch.tensor([model.class_index(c) for c in self.classes or spread(self.count, model.class_count)], device=ctx.device)
        side = self.size or model.input.size
        centre = mean_picture(model, side, side)
        seen = side + 2 * round(self.pad * side)
        if seen != model.input.size:
            problem = refuses(ctx.model, seen)
            if problem:
                raise NotApplicable(f"needs a model that takes pictures of {seen} pixels; leave out `size` and set `pad` to 0 ({problem})")
        start, made = self._climb(ctx, classes, centre, side)

        logits = ctx.logits(made.images)
        score = logits.gather(1, classes[:, None]).squeeze(1)
        chance = logits.softmax(1).gather(1, classes[:, None]).squeeze(1)
        rank = 1 + (logits > score[:, None]).sum(1)
        high = high_frequency_share(made.images)
        names = [model.class_name(c) for c in classes.tolist()]
        small = side < 64
        captions = [f"{n}, p = {p:.3f}" for n, p in zip(names, chance.tolist(), strict=True)]
        artifacts: list[Any] = [Images("pictures", made.images, captions=captions, columns=4, exact=small)]
        faint = quantile((made.images - centre).abs(), 0.995)
        if bool((faint < FAINT).any()):
            # As the toolbox of Yosinski et al. shows its pictures, which stay close to the mean.
            scale = faint.clamp_min(1e-6).to(made.images.dtype).view(-1, 1, 1, 1)
            shown = (0.5 + (made.images - centre) / (2 * scale)).clamp(0, 1)
            caption = "The same with their contrast stretched: grey is the training mean, each on its own scale."
            artifacts.append(Images("stretched", shown, captions=names, columns=4, exact=small, caption=caption))
        artifacts += strip("progress", made, start, names[:4], exact=small)
        known = torch.isfinite(made.scores).all(0).tolist()
        lines = {n: made.scores[:, i] for i, n in enumerate(unique(names)) if known[i]}
        if len(made.scores) and lines:
            artifacts.append(Curve("objective", range(1, len(made.scores) + 1), lines, "step", "objective"))
        rows = [
            list(row) for row in zip(names, classes.tolist(), score.tolist(), chance.tolist(), rank.tolist(), high.tolist(), strict=True)
        ]
        artifacts.append(Table("classes", ["class", "index", "score", "probability", "rank", "high-frequency share"], rows))
        artifacts += state_of(made)
        first = float((rank == 1).float().mean())
        metrics = [
            Metric("probability", float(chance.mean()), "", "higher", chance.tolist(), "probability of the class for its own picture"),
            Metric("lowest_probability", float(chance.min()), better="higher", about="the least of these probabilities"),
            Metric("first_share", first, better="higher", about="share of pictures that the model gives their class"),
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

    def _climb(self, ctx: Context, classes: Tensor, centre: Tensor, side: int) -> tuple[Tensor, Ascent]:
        """The pictures ascent starts from (N, C, H, W), and what it makes of them."""
        import torch

        from harness import optimise as o

        model = ctx.model
        grey = float(centre.mean())
        transforms: list[o.Transform] = [
            *([o.Pad(self.pad, grey)] if self.pad else []),
            *([o.Jitter(share=self.jitter / 224)] if self.jitter else []),
            *([o.Scale(1 - self.scale, 1 + self.scale)] if self.scale else []),
            *([o.Rotate(self.rotate)] if self.rotate else []),
        ]
        operators: list[o.Operator] = [
            o.Decay(self.decay, centre),
            o.Blur(self.blur, self.blur_every, self.blur_end, self.schedule or self.steps),
            o.ClipSmallNorm(self.norm_percentile, centre),
            o.ClipSmallContribution(self.contribution_percentile, centre),
            o.Clamp(),
        ]
        conditioners: list[o.Conditioner] = [
            o.ClipSmallGradients(self.gradient_percentile),
            o.NaturalColours(self.natural_colours),
            o.LowFrequencies(self.low_frequencies),
        ]
        pixels = self.parametrisation == "pixels"
        made_of: o.Pixels | o.Fourier | o.DeepPrior = o.Pixels()
        if self.parametrisation == "fourier":
            made_of = o.Fourier(side, side, model.input.channels)
        elif self.parametrisation == "prior":
            made_of = o.DeepPrior(side, side, model.input.channels, prior_widths(side))
        begin = go_on(ctx)

        def some(rows: slice) -> tuple[Tensor, o.Ascent]:
            draws = ctx.draws([f"class-{c}" for c in classes[rows].tolist()])
            if isinstance(made_of, o.Fourier):
                start = made_of.start(draws, self.noise)
            elif isinstance(made_of, o.DeepPrior):
                start = made_of.start(draws)
            else:
                start = (centre + self.noise * draws.randn((model.input.channels, side, side))).clamp(0, 1)
            objective = o.class_score(classes[rows])
            if self.l2:
                objective = objective - self.l2 * o.squared_norm(centre)
            if self.tv:
                objective = objective - self.tv * o.total_variation()
            with torch.no_grad():
                first = made_of.images(start)
            return first, o.ascend(
                model,
                objective,
                start,
                steps=self.steps,
                step_size=self.step_size / 255,
                draws=draws,
                rule=self.step,
                gain=self.gain,
                parametrisation=made_of,
                transforms=transforms,
                conditioners=conditioners if pixels else [],
                operators=operators if pixels else [],
                snapshots=PROGRESS,
                converged=self.converged,
                begin=begin.rows(rows) if begin else None,
                progress=ctx.report,
            )

        starts, parts = zip(*ctx.batched(len(classes), some), strict=True)
        return torch.cat(starts), o.join(parts)


def compared(ctx: Context) -> Result:
    """The presets side by side: a row a class, a column a preset, contrast stretched where a preset's pictures are faint."""
    import torch

    tables: dict[str, Any] = {name: artifacts["classes"] for name, artifacts in ctx.results.items()}
    shown: dict[str, Any] = {name: artifacts.get("stretched", artifacts["pictures"]) for name, artifacts in ctx.results.items()}
    small = next(iter(shown.values())).exact
    grid = torch.stack([torch.from_numpy(images.data) for images in shown.values()], 1).flatten(0, 1)
    captions, rows = [], []
    for i, row in enumerate(next(iter(tables.values())).rows):
        for name, table in tables.items():
            _, _, score, chance, rank, high = table.rows[i]
            faint = ", stretched" if "stretched" in ctx.results[name] else ""
            captions.append(f"{row[0]}: {name}, p = {chance:.3f}{faint}")
            rows.append([row[0], name, score, chance, rank, high])
    columns = ["class", "preset", "score", "probability", "rank", "high-frequency share"]
    metrics = []
    for name, table in tables.items():
        chance, high = [r[3] for r in table.rows], [r[5] for r in table.rows]
        about = "probability of the class for its picture by this preset"
        metrics.append(Metric(f"probability.{name}", sum(chance) / len(chance), better="higher", per_image=chance, about=about))
        about = "share of spectral energy above a quarter of the sampling rate"
        metrics.append(Metric(f"high_frequency.{name}", sum(high) / len(high), better="lower", per_image=high, about=about))
    grid = torch.round(grid * 255) / 255
    return Result(
        [Images("comparison", grid, captions=captions, columns=len(shown), exact=small), Table("presets", columns, rows)], metrics
    )


def prior_widths(side: int) -> tuple[int, ...]:
    """Channels of an untrained generator for pictures of this side: it starts from maps of about seven pixels."""
    doublings = 1
    while side / 2**doublings > 10:
        doublings += 1
    return (*(64, 64, 64, 48, 32, 24, 16, 16)[:doublings], 16)


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
