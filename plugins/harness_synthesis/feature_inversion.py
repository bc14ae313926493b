from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import model_validator

from harness import ConfigError, Curve, Images, Metric, Paper, Param, Result, Table, Technique

from .blocks import in_a_name, place, spread_layers
from .climb import CONVERGED, GO_ON, PROGRESS, SCHEDULE, check_go_on, earlier, go_on, mean_picture, state_of, strip

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context, Use
    from harness.optimise import Ascent, Objective

# Root mean square of a picture's distance from ImageNet's mean, over 500 of its pictures, one of every other class: what
# stands for the released code's x0_sigma, by which it scales its regularisers, its steps and the noise it starts from.
NATURAL_RMS = 0.255
RELEASED_SIDE = 227
# The released schedule: a quarter of the steps at the full rate, half at a tenth, a quarter at a hundredth.
PHASES = ((0.25, 1.0), (0.5, 0.1), (0.25, 0.01))


class FeatureInversion(Technique):
    """Which picture would a layer answer to alike? argmin_x ||phi(x) - phi0||^2 / ||phi0||^2 + lambda_a ||x||_6^6 + lambda_TV
    sum (dx^2 + dy^2)^(beta/2), phi0 being the layer's output for the given picture (Mahendran & Vedaldi 2015, arXiv:1412.0035).

    Weights, schedule and momentum are those of the authors' release, which counts pixels in 255ths from the training mean and
    divides both penalties by a natural picture's squared norm and by two; pixels are kept in range besides. Ascent starts from
    noise. Cost: one forward and one backward pass to the layer a step, picture and layer.
    """

    name = "feature_inversion"
    family = "synthesis"
    version = 5
    paper = Paper("Mahendran, Vedaldi", 2015, "Understanding Deep Image Representations by Inverting Them", arxiv="1412.0035")
    needs = frozenset({"images"})
    reading = (
        "What stays in the picture is what the layer still tells; what is lost it has thrown away or cannot tell apart. Early layers "
        "give the photograph back, deeper ones lose colour and texture first, then places, and keep shapes and parts."
    )
    caveats = (
        "The penalties fill in what the layer does not fix, so smooth places may be theirs and not the layer's. A poor inversion shows "
        "what this search finds, not that the information is gone; see the error, which says how well the features are met."
    )
    audit = {"full": {"rows": 4, "steps": 200}}

    layers: tuple[str, ...] = Param((), description="layers to invert, a column each; none: `rows` of them, spread over the depth")
    rows: int = Param(5, ge=1, le=100, description="how many layers when none are named")
    steps: int = Param(400, ge=0, le=100_000, description="gradient steps, in three phases of falling rate")
    schedule: int | None = SCHEDULE
    optimiser: Literal["momentum", "adam", "lbfgs"] = Param(
        "momentum", description="momentum: gradient descent with the released schedule; adam or lbfgs: those, with step_size"
    )
    rate: float = Param(0.004, gt=0, description="with momentum: the released learning rate, in units of a natural picture's squared norm")
    step_size: float = Param(10.0, gt=0, description="with adam or lbfgs: size of a step (the first) in 255ths")
    tv: float | None = Param(
        None,
        ge=0,
        description="lambda_TV; none: the released 1, 10 and 100 by the layer's depth, less for small pictures",
    )
    beta: float = Param(2.0, gt=0, le=4, description="power of the total variation: 2 smooths, 1 keeps edges")
    alpha_weight: float = Param(8e-10, ge=0, description="lambda_a, weight of the sum of |x|^alpha")
    alpha: float = Param(6.0, gt=1, le=10, description="power of that norm")
    clamp: bool = Param(True, description="keep pixels in [0, 1] after each step; the release does not")
    converged: float = CONVERGED
    go_on: int = GO_ON

    @model_validator(mode="after")
    def _consistent(self) -> FeatureInversion:
        check_go_on(self)
        return self

    def uses(self) -> list[Use]:
        return earlier(self)

    def run(self, ctx: Context) -> Result:
        import torch

        model = ctx.model
        layers = list(dict.fromkeys(model.full_name(n) for n in self.layers)) or spread_layers(ctx, self.rows)
        self._check(ctx, layers)
        made: dict[str, Ascent] = {}
        errors: dict[str, Tensor] = {}
        for layer in layers:
            made[layer], errors[layer] = self._invert(ctx, layer)
        pictures = {layer: m.images.clamp(0, 1) for layer, m in made.items()}
        psnr = {layer: signal_to_noise(p, ctx.images) for layer, p in pictures.items()}
        ssim = {layer: similarity(p, ctx.images) for layer, p in pictures.items()}

        small = ctx.images.shape[-1] < 64
        grid = torch.stack([ctx.images, *pictures.values()], 1).flatten(0, 1)
        # Whole 255ths are stored in a quarter of the space, and are what a screen shows.
        grid = torch.round(grid * 255) / 255
        names = [ctx.ids[i] if k == 0 else layers[k - 1] for i in range(len(ctx.images)) for k in range(len(layers) + 1)]
        artifacts: list[Any] = [Images("inversions", grid, captions=names, columns=len(layers) + 1, exact=small)]
        for layer, m in made.items():
            artifacts += strip(f"progress-{in_a_name(layer)}", m, None, [ctx.ids[0]], exact=small, caption=f"{layer}, step by step.")
        lines = {layer: -m.scores.mean(1) for layer, m in made.items() if len(m.scores) and bool(torch.isfinite(m.scores).all())}
        if lines:
            longest = max(len(v) for v in lines.values())
            lines = {n: torch.cat([v, v[-1:].expand(longest - len(v))]) for n, v in lines.items()}
            artifacts.append(Curve("objective", range(1, longest + 1), lines, "step", "error and penalties", log_y=True))
        artifacts.append(Table("layers", ["layer", "shape", "values", "error", "PSNR (dB)", "SSIM"], self._rows(ctx, errors, psnr, ssim)))
        artifacts += [a for layer, m in made.items() for a in state_of(m, f"state-{in_a_name(layer)}")]
        return Result(artifacts, self._metrics(layers, errors, psnr, ssim), self._notes(ctx, made))

    def _check(self, ctx: Context, layers: list[str]) -> None:
        """Raises where a layer is silent: told before any is inverted."""
        import torch

        def dead(rows: slice) -> dict[str, Tensor]:
            with torch.no_grad():
                found: dict[str, Tensor] = ctx.model.activations(
                    ctx.images[rows], layers, reduce=lambda _, value: (value.flatten(1) == 0).all(1)
                )
                return found

        parts = list(ctx.batched(len(ctx.images), dead))
        for layer in layers:
            silent = torch.cat([part[layer] for part in parts]).nonzero().flatten().tolist()
            if silent:
                raise ConfigError(f"layer {layer!r} gives nothing but zeros for {ctx.ids[silent[0]]}: there is nothing to invert")

    def _rows(self, ctx: Context, errors: dict[str, Tensor], psnr: dict[str, np.ndarray], ssim: dict[str, np.ndarray]) -> list[list[Any]]:
        rows = []
        for layer, error in errors.items():
            shape = ctx.model.layer_shape(layer)
            row = [layer, " x ".join(map(str, shape)), int(np.prod(shape)), float(error.mean()), float(psnr[layer].mean())]
            rows.append([*row, float(ssim[layer].mean())])
        return rows

    def _metrics(
        self, layers: list[str], errors: dict[str, Tensor], psnr: dict[str, np.ndarray], ssim: dict[str, np.ndarray]
    ) -> list[Metric]:
        each = per_picture(errors)
        found = [
            Metric("error", float(np.mean(each)), better="lower", per_image=each, about="relative error of the features, mean of layers")
        ]
        for which, layer in (("first", layers[0]), ("last", layers[-1])):
            about = f"peak signal-to-noise ratio of the picture that the {which} layer gives back"
            detail = f"{layer}; error {float(errors[layer].mean()):.2g}, SSIM {ssim[layer].mean():.2f}"
            per = psnr[layer].tolist()
            found.append(Metric(f"psnr_{which}", float(psnr[layer].mean()), "dB", "higher", per_image=per, about=about, detail=detail))
        return found

    def _notes(self, ctx: Context, made: dict[str, Ascent]) -> list[str]:
        return [
            f"{layer}, {ctx.ids[i]}: the error stopped being finite; the last good picture is shown; use a smaller rate"
            for layer, m in made.items()
            for i in m.stopped
        ]

    def _invert(self, ctx: Context, layer: str) -> tuple[Ascent, Tensor]:
        """Pictures whose features are those of the given ones, and the relative error that remains (N,)."""
        import torch

        from harness import optimise as o

        model, images = ctx.model, ctx.images
        centre = mean_picture(model, *images.shape[2:])
        norm = NATURAL_RMS**2 * images[0].numel()  # the squared norm of a natural picture
        weight = released_tv(place(model, layer), min(images.shape[2:]), self.beta) if self.tv is None else self.tv
        begin = go_on(ctx, f"state-{in_a_name(layer)}")

        def some(rows: slice) -> tuple[Ascent, Tensor]:
            with torch.no_grad():
                features = model.activations(images[rows], [layer])[layer]
            draws = ctx.draws([f"{layer} {i}" for i in ctx.ids[rows]])
            part = o.ascend(
                model,
                inversion_objective(layer, features, centre, norm, weight, self.beta, self.alpha_weight, self.alpha),
                self._start(centre, draws, images),
                steps=self.steps,
                step_size=self._size(norm),
                draws=draws,
                rule=self.optimiser,
                operators=[o.Clamp()] if self.clamp else [],
                snapshots=PROGRESS,
                converged=self.converged,
                begin=begin.rows(rows) if begin else None,
                progress=ctx.report,
            )
            with torch.no_grad():
                shown = part.images.clamp(0, 1)
                return part, o.evaluate(model, o.feature_error(layer, features), shown, shown)

        parts, errors = zip(*ctx.batched(len(images), some), strict=True)
        return o.join(parts), torch.cat(errors)

    def _start(self, centre: Tensor, draws: Any, images: Tensor) -> Tensor:
        start: Tensor = centre + NATURAL_RMS * draws.randn(images.shape[1:])
        return start.clamp(0, 1) if self.clamp else start

    def _size(self, norm: float) -> Any:
        from harness.optimise import stepped

        if self.optimiser != "momentum":
            return self.step_size / 255
        length = self.schedule or self.steps
        return stepped([(round(share * length), self.rate * factor * norm) for share, factor in PHASES])


def inversion_objective(
    layer: str, features: Tensor, centre: Tensor | float, norm: float, tv: float, beta: float, alpha_weight: float, alpha: float
) -> Objective:
    """Minus the released objective: error + [lambda_TV / 2 TV(x) + lambda_a / 2 ||x||_a^a] / ||natural picture||^2, with x in
    255ths from `centre`. `norm` is that squared norm with pixels in [0, 1]."""
    from harness import optimise as o

    objective = -o.feature_error(layer, features)
    if tv:
        objective = objective - (tv / 2 * 255 ** (beta - 2) / norm) * o.total_variation(beta)
    if alpha_weight:
        objective = objective - (alpha_weight / 2 * 255 ** (alpha - 2) / norm) * o.alpha_norm(alpha, centre)
    return objective


def released_tv(depth: float, side: int = RELEASED_SIDE, beta: float = 2.0) -> float:
    """lambda_TV of a layer at `depth` in [0, 1]: 1, 10 and 100 for layers 1-6, 7-12 and 13-20 of the release's 20.

    A picture drawn smaller is steeper from pixel to pixel, so that its variation grows by side^-beta against its norm: the
    weight shrinks as much from the release's 227 pixels.
    """
    weight = 1.0 if depth <= 6 / 20 else 10.0 if depth <= 12 / 20 else 100.0
    return float(weight * (side / RELEASED_SIDE) ** beta)


def per_picture(errors: dict[str, Tensor]) -> list[float]:
    """Each picture's mean over the layers."""
    return [float(np.mean(row)) for row in zip(*(e.tolist() for e in errors.values()), strict=True)]


def signal_to_noise(images: Tensor, originals: Tensor) -> np.ndarray:
    """(N,) 10 log10(1 / mean squared error) in dB, at most 100."""
    error = (images - originals).cpu().double().square().flatten(1).mean(1).numpy()
    return -10 * np.log10(np.maximum(error, 1e-10))


def similarity(images: Tensor, originals: Tensor) -> np.ndarray:
    """(N,) structural similarity (Wang et al. 2004) as scikit-image computes it, windows of 7 x 7 or what a small picture allows."""
    from skimage.metrics import structural_similarity

    side = min(images.shape[2:])
    window = min(7, side - 1 + side % 2)

    pairs = zip(images.float().cpu().numpy(), originals.float().cpu().numpy(), strict=True)
    return np.array([structural_similarity(a, b, channel_axis=0, data_range=1.0, win_size=window) for a, b in pairs])
