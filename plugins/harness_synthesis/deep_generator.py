from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from harness import ConfigError, Curve, Images, Metric, NotApplicable, Paper, Param, Result, Table, Technique, Use
from harness.technique import Further

from .class_visualization import prior_widths, spread, unique
from .climb import CONVERGED, GO_ON, PROGRESS, SCHEDULE, check_go_on, earlier, go_on, state_of, strip

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context
    from harness.generators import LoadedGenerator
    from harness.optimise import Ascent

PRIOR = "prior"
BY_GENERATOR = "generator"
PIXELS = "pixels"  # the name of the use that climbs on pixels, for comparison


class DeepGenerator(Technique):
    """The picture that a class likes among those a generator can make: argmax_y h(phi(G(y))) - lambda ||y|| over the codes y of a
    frozen, trained generator G (Nguyen, Dosovitskiy, Yosinski, Brox & Clune 2016, arXiv:1605.09304).

    As in the authors' release, steps are normalised by the mean magnitude of the code's gradient, shrink linearly to nothing, and
    each is followed by clipping every unit to the range it had in training pictures (`reach` times that) and by the decay
    y <- 0.99 y; the noise that ascent starts from is scaled to that range. With generator 'prior' nothing is trained beforehand:
    the weights and the code of a random convolutional network are what Adam moves (after Ulyanov et al. 2018, arXiv:1711.10925).
    Cost: one forward and one backward pass through generator and model a step and class.
    """

    name = "deep_generator"
    family = "synthesis"
    paper = Paper(
        "Nguyen, Dosovitskiy, Yosinski, Brox, Clune", 2016, "Synthesizing the Preferred Inputs for Neurons in Neural Networks via Deep "
        "Generator Networks", arxiv="1605.09304",
    )  # fmt: skip
    needs = frozenset({"classifier"})
    reading = (
        "The generator keeps to what pictures look like, so what is seen is a likely picture that the class score likes, not just any. "
        "Where a second network names the class too, the picture shows the class and not a quirk of the first network."
    )
    caveats = (
        "What the generator was never shown it cannot draw, and what it draws by itself is not the model's doing. Pictures of different "
        "generators, or with and without one, cannot be compared for what the model has learnt."
    )
    audit = {"full": {"count": 4, "steps": 100}}

    classes: tuple[int | str, ...] = Param((), description="classes by index or name; none: `count` of them, spread evenly")
    count: int = Param(4, ge=1, le=1000, description="how many classes when none are named")
    layer: str = Param("", description="a layer of the model whose channels are shown instead of classes")
    channels: tuple[int, ...] = Param((0,), description="channels of that layer")
    generator: str = Param(
        "auto",
        description="a generator of the registry; prior: an untrained one, whose weights move; auto: this model's, or else prior",
    )
    judge: str = Param("", description="a second model with the same classes, which names the pictures, and those of ascent on pixels")
    steps: int = Param(200, ge=0, le=100_000, description="gradient steps")
    schedule: int | None = SCHEDULE
    step_size: float = Param(
        0.1, gt=0, description="mean change of a unit of the code in the first step, as a share of the units' mean largest value"
    )
    decay: float = Param(0.01, ge=0, lt=1, description="share by which codes shrink after each step")
    reach: float = Param(1.0, gt=0, description="codes are clipped to this many times their range in training pictures; the release has 3")
    start: str = Param("", description="picture whose code ascent starts from, as DATASET:ID or the path of a file; none: noise")
    rate: float = Param(0.01, gt=0, description="with prior: Adam's step size")
    jitter: float = Param(16, ge=0, description="with prior: largest random shift before a pass, in pixels of a picture of 224")
    converged: float = CONVERGED
    go_on: int = GO_ON

    @model_validator(mode="after")
    def _consistent(self) -> DeepGenerator:
        check_go_on(self)
        if self.generator == PRIOR and self.start:
            raise ValueError("start: an untrained generator has no code for a picture; leave it out or name a trained generator")
        if self.layer and self.judge:
            raise ValueError("judge: a second model can name classes, not the channels of another's layer")
        return self

    def uses(self) -> list[Use]:
        found = earlier(self)
        if self.judge:
            found.append(Use("class_visualization", {"classes": list(self.classes), "count": self.count}, name=PIXELS))
        return found

    def further(self) -> Further:
        return Further(
            models=[self.judge] if self.judge else [],
            generators=[] if self.generator == PRIOR else [self.generator],
            pictures=[self.start] if self.start else [],
        )

    def run(self, ctx: Context) -> Result:
        import torch

        units = self._units(ctx)
        if self.judge and ctx.further_model(self.judge).classes != ctx.model.classes:
            raise NotApplicable(f"judge {self.judge!r} has other classes than {ctx.model.name!r}")
        generator = None if self.generator == PRIOR else ctx.generator(self.generator)
        if generator is not None and generator.channels != ctx.model.input.channels:
            raise ConfigError(
                f"deep_generator.generator: {generator.name!r} makes pictures of {generator.channels} channels, and "
                f"{ctx.model.name!r} takes {ctx.model.input.channels}"
            )
        if self.start and generator is None:
            raise ConfigError("deep_generator.start: there is no generator for this model; train one by `harness train generator`")
        start, made = self._climb(ctx, units, generator)

        value = units.value(ctx, made.images)
        first = units.value(ctx, start)
        small = made.images.shape[-1] < 64
        names = unique(units.names)
        captions = [f"{n}, {units.what} {v:.3g}" for n, v in zip(names, value.tolist(), strict=True)]
        by = f"By {generator.name}." if generator else "By an untrained generator."
        shown = torch.round(made.images * 255) / 255
        artifacts: list[Any] = [Images("pictures", shown, captions=captions, columns=4, exact=small, caption=by)]
        artifacts += strip("progress", made, start, names[:4], exact=small)
        known = torch.isfinite(made.scores).all(0).tolist()
        lines = {n: made.scores[:, i] for i, n in enumerate(names) if known[i]}
        if len(made.scores) and lines:
            artifacts.append(Curve("objective", range(1, len(made.scores) + 1), lines, "step", "score of the unit"))
        columns = ["unit", f"{units.what} at the start", units.what]
        columns_of = [first.tolist(), value.tolist()]
        risen = (value > first).float().tolist()
        metrics = [
            Metric(
                "risen",
                sum(risen) / len(risen),
                better="higher",
                per_image=risen,
                about="share of units that answer more than at the start",
            )
        ]
        if units.classes is not None:
            chance = ctx.logits(made.images).softmax(1).gather(1, units.classes[:, None]).squeeze(1).tolist()
            columns.append("probability")
            columns_of.append(chance)
            about = "probability of the class for its own picture"
            metrics.insert(0, Metric("probability", sum(chance) / len(chance), "", "higher", chance, about))
        if self.judge and units.classes is not None:
            judged, words = self._judged(ctx, made.images, units.classes)
            artifacts.append(words[0])
            metrics += judged
            columns += [f"{self.judge} says"]
            columns_of.append(words[1])
        rows = [[n, *values] for n, *values in zip(names, *columns_of, strict=True)]
        artifacts.append(Table("units", columns, rows))
        artifacts += state_of(made)
        notes = [f"{names[i]}: the score stopped being finite; the last good picture is shown" for i in made.stopped]
        return Result(artifacts, metrics, notes)

    def _units(self, ctx: Context) -> Units:
        import torch

        model = ctx.model
        if self.layer:
            layer = model.full_name(self.layer)
            total = model.maps_shape(layer)[0]
            wrong = [c for c in self.channels if not 0 <= c < total]
            if wrong:
                raise ConfigError(f"deep_generator.channels: {layer!r} has channels 0 to {total - 1}; there is no channel {wrong[0]}")
            return Units([f"{layer}, channel {c}" for c in self.channels], None, layer, list(self.channels))
        classes = [model.class_index(c) for c in self.classes] or spread(self.count, model.class_count)
        return Units([model.class_name(c) for c in classes], torch.tensor(classes, device=ctx.device))

    def _climb(self, ctx: Context, units: Units, generator: LoadedGenerator | None) -> tuple[Tensor, Ascent]:
        """The pictures of the first codes (N, C, H, W), and what ascent makes of them."""
        import torch

        from harness import optimise as o

        model, side = ctx.model, ctx.model.input.size
        begin = go_on(ctx)
        picture_code = self._code_of(ctx, generator) if generator and self.start else None
        prior = o.DeepPrior(side, side, model.input.channels, prior_widths(side))

        def some(rows: slice) -> tuple[Tensor, o.Ascent]:
            draws = ctx.draws(units.keys()[rows])
            operators: list[o.Operator] = []
            transforms: list[o.Transform] = []
            if generator is None:
                made_of: o.Parametrisation = prior
                start = prior.start(draws)
                size: Any = self.rate
                transforms = [o.Jitter(share=self.jitter / 224)] if self.jitter else []
            else:
                made_of = Generated(generator, side)
                typical = float(generator.high.mean())
                noise = draws.randn(generator.code)
                start = (typical * noise).clamp_min(0) if picture_code is None else picture_code.expand(len(noise), *picture_code.shape[1:])
                size = shrinking(self.step_size * typical, self.schedule or self.steps)
                operators = [
                    o.Clamp(self.reach * generator.low.clamp_max(0), self.reach * generator.high),
                    o.Decay(self.decay, torch.zeros_like(start[:1])),
                ]
                start = operators[0](start, start, 0)
            with torch.no_grad():
                first = made_of.images(start)
            return first, o.ascend(
                model,
                units.objective(rows),
                start,
                steps=self.steps,
                step_size=size,
                draws=draws,
                rule="adam" if generator is None else "mean_abs",
                parametrisation=made_of,
                transforms=transforms,
                operators=operators,
                snapshots=PROGRESS,
                converged=self.converged,
                begin=begin.rows(rows) if begin else None,
                progress=ctx.report,
            )

        starts, parts = zip(*ctx.batched(len(units.names), some), strict=True)
        return torch.cat(starts), o.join(parts)

    def _code_of(self, ctx: Context, generator: LoadedGenerator) -> Tensor:
        """(1, *code) what the generator's encoder gives for the picture `start`."""
        import torch

        from harness.context import to_images
        from harness.datasets import prepare

        encoder = ctx.model if generator.encoder == ctx.model.name else ctx.further_model(generator.encoder)
        picture = to_images(prepare(ctx.named_picture(self.start), encoder.input)[None], ctx.device, encoder.dtype)
        with torch.no_grad():
            found: Tensor = encoder.activations(picture, [generator.layer])[generator.layer]
        return found

    def _judged(self, ctx: Context, images: Tensor, classes: Tensor) -> tuple[list[Metric], tuple[Images, list[str]]]:
        """What the second network says of these pictures and of those that ascent on pixels makes of the same classes."""
        import torch

        judge = ctx.further_model(self.judge)
        pixels: Any = ctx.results[PIXELS]["pictures"]
        plain = torch.from_numpy(pixels.data).to(ctx.device, images.dtype)
        found: list[Metric] = []
        says: list[str] = []
        for which, pictures, words in ((BY_GENERATOR, images, "these pictures"), (PIXELS, plain, "pictures by ascent on pixels")):
            fitted = torch.nn.functional.interpolate(pictures, size=(judge.input.size,) * 2, mode="bilinear", antialias=True)
            with torch.no_grad():
                logits = torch.cat(list(ctx.batched(len(fitted), lambda rows: judge(fitted[rows]))))  # noqa: B023
            right = (logits.argmax(1) == classes).float().tolist()
            about = f"share of {words} that the second network, {self.judge}, gives their class"
            found.append(Metric(f"named_{which}", sum(right) / len(right), better="higher", per_image=right, about=about))
            if which != PIXELS:
                says = [judge.class_name(c) for c in logits.argmax(1).tolist()]
        caption = "For comparison: the same classes by ascent on pixels (class_visualization)."
        names = [judge.class_name(c) for c in classes.tolist()]
        return found, (Images("by_pixels", plain, captions=names, columns=4, exact=plain.shape[-1] < 64, caption=caption), says)


@dataclass(frozen=True)
class Units:
    """What is to be excited: classes, or channels of a layer."""

    names: list[str]
    classes: Tensor | None
    layer: str = ""
    channels: list[int] | None = None

    @property
    def what(self) -> str:
        return "mean activation" if self.layer else "score"

    def keys(self) -> list[str]:
        """What random numbers go by: the unit, not its place."""
        if self.classes is None:
            return self.names
        return [f"class-{c}-{self.classes.tolist()[:i].count(c)}" for i, c in enumerate(self.classes.tolist())]

    def objective(self, rows: slice) -> Any:
        from harness import optimise as o

        if self.classes is not None:
            return o.class_score(self.classes[rows])
        layer, channels = self.layer, (self.channels or [])[rows]

        def score(outputs: dict[str, Tensor], _: Tensor) -> Tensor:
            import torch

            return torch.stack([maps[c].mean() for maps, c in zip(outputs[layer], channels, strict=True)])

        return o.Objective(frozenset({layer}), score)

    def value(self, ctx: Context, images: Tensor) -> Tensor:
        """(N,) the objective of each unit for its picture."""
        import torch

        from harness import optimise as o

        with torch.no_grad():
            parts = ctx.batched(len(images), lambda rows: o.evaluate(ctx.model, self.objective(rows), images[rows], images[rows]))
            return torch.cat(list(parts))


@dataclass(frozen=True)
class Generated:
    """Pictures as a generator makes them of codes, at the model's size."""

    generator: LoadedGenerator
    side: int

    def images(self, variables: Tensor) -> Tensor:
        from torch.nn.functional import interpolate

        x = self.generator(variables)
        return x if x.shape[-1] == self.side else interpolate(x, size=(self.side, self.side), mode="bilinear", align_corners=False)


def shrinking(first: float, steps: int) -> Any:
    """Step sizes from `first` linearly to nothing, as in the release (8 to 1e-10)."""
    return lambda step: first + (1e-10 - first) * step / max(1, steps)
