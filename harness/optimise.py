"""The one loop that makes images by ascending an objective; parts compose.

    objective    what rises: a score a picture; objectives add and scale
    transforms   what happens to the picture before the model sees it (jitter), differentiable
    conditioners what happens to the gradient before a step: ascent in other coordinates than single pixels
    step         how far to go along the gradient (normalised, constant, line search)
    operators    what happens to the picture after a step (decay, blur, clipping), in the order given

A score that is not finite ends the work on that picture: its last good state is kept and said so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .context import Draws
from .hooks import ANSWER
from .models import LoadedModel

Score = Callable[[dict[str, Tensor], Tensor], Tensor]


# -- objectives --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """score(outputs of `layers`, pictures) -> (N,). `a + b` and `2 * a` make new ones; one forward pass serves all."""

    layers: frozenset[str]
    score: Score

    def __add__(self, other: Objective) -> Objective:
        return Objective(self.layers | other.layers, lambda outputs, x: self.score(outputs, x) + other.score(outputs, x))

    def __mul__(self, factor: float) -> Objective:
        return Objective(self.layers, lambda outputs, x: factor * self.score(outputs, x))

    __rmul__ = __mul__

    def __neg__(self) -> Objective:
        return self * -1

    def __sub__(self, other: Objective) -> Objective:
        return self + -other


def class_score(classes: Tensor) -> Objective:
    """S_c, the unnormalised class score of class c = classes[i] for picture i (Simonyan et al. 2013, eq. 1)."""
    return Objective(frozenset({ANSWER}), lambda outputs, _: outputs[ANSWER].gather(1, classes.unsqueeze(1)).squeeze(1))


def squared_norm(centre: Tensor | float = 0.0) -> Objective:
    """||x - centre||_2^2 of each picture; subtract it to keep pictures near `centre`."""
    return Objective(frozenset(), lambda _, x: (x - centre).square().flatten(1).sum(1))


def layer_norm(layer: str) -> Objective:
    """Half the squared norm of a layer, whose gradient with respect to the layer is the layer itself."""
    return Objective(frozenset({layer}), lambda outputs, _: outputs[layer].flatten(1).square().sum(1) / 2)


def guide_match(layer: str, guide: Tensor) -> Objective:
    """sum over positions of max_j a . g_j: each place of the layer grows like the one of the guide's (C, H, W) it is most like.

    The gradient at a place is that feature of the guide, as in the guided dreams of Mordvintsev, Olah & Tyka 2015.
    """
    features = guide.flatten(1)  # (C, J)

    def score(outputs: dict[str, Tensor], _: Tensor) -> Tensor:
        own = outputs[layer].flatten(2)  # (N, C, P)
        return torch.einsum("ncp,cj->npj", own, features).amax(2).sum(1)

    return Objective(frozenset({layer}), score)


def evaluate(model: LoadedModel, objective: Objective, seen: Tensor, pictures: Tensor) -> Tensor:
    """(N,) scores: layers look at `seen` (the transformed pictures), penalties at the pictures themselves."""
    layers = sorted(objective.layers)
    if layers == [ANSWER]:
        outputs = {ANSWER: model(seen)}
    else:
        outputs = model.activations(seen, layers) if layers else {}
    return objective.score(outputs, pictures)


# -- transforms --------------------------------------------------------------------------------------------------------


class Transform(Protocol):
    def __call__(self, images: Tensor, draws: Draws) -> Tensor: ...


@dataclass(frozen=True)
class Jitter:
    """Roll each picture by up to `pixels` in both directions; the gradient rolls back by itself."""

    pixels: int

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        if self.pixels == 0:
            return images
        shifts = draws.integers(-self.pixels, self.pixels + 1, 2)
        return torch.stack([torch.roll(x, (dy, dx), (1, 2)) for x, (dy, dx) in zip(images, shifts, strict=True)])


# -- conditioners: steepest ascent in another parametrisation of the picture -------------------------------------------------
#
# With x = L z, a step along the gradient in z moves x along L L^T g: the parametrisations of Olah, Mordvintsev & Schubert
# 2017 (doi:10.23915/distill.00007, "preconditioning") become maps of the gradient.


class Conditioner(Protocol):
    def __call__(self, gradient: Tensor) -> Tensor: ...


# Covariance of RGB over 500 ImageNet pictures, one a class, shrunk to 64 x 64; mean of the diagonal 1.
NATURAL_COLOURS = ((0.988, 0.874, 0.805), (0.874, 0.945, 0.905), (0.805, 0.905, 1.067))


@dataclass(frozen=True)
class NaturalColours:
    """Steps follow the colours of natural pictures: g -> ((1 - share) I + share Sigma) g over the channels."""

    share: float

    def __call__(self, gradient: Tensor) -> Tensor:
        if self.share == 0 or gradient.shape[1] != 3:
            return gradient
        return torch.einsum("ij,njhw->nihw", _mixing(self.share, gradient.device, gradient.dtype), gradient)


@dataclass(frozen=True)
class LowFrequencies:
    """Each spatial frequency f (cycles a pixel) of the gradient is scaled by f^-power; constant colour like the lowest."""

    power: float

    def __call__(self, gradient: Tensor) -> Tensor:
        if self.power == 0:
            return gradient
        height, width = gradient.shape[2:]
        scale = _frequency_scale(self.power, height, width, gradient.device, gradient.dtype)
        return torch.fft.irfft2(torch.fft.rfft2(gradient) * scale, s=(height, width))


# Constants are made once: a copy from the host to a device in every step would make the loop wait for it.


@lru_cache(maxsize=32)
def _mixing(share: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(3, 3): (1 - share) I + share Sigma."""
    sigma = torch.tensor(NATURAL_COLOURS, device=device, dtype=dtype)
    return (1 - share) * torch.eye(3, device=device, dtype=dtype) + share * sigma


@lru_cache(maxsize=32)
def _frequency_scale(power: float, height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(H, W // 2 + 1): f^-power, the constant colour like the lowest frequency."""
    fy = torch.fft.fftfreq(height, device=device, dtype=dtype)[:, None]
    fx = torch.fft.rfftfreq(width, device=device, dtype=dtype)[None, :]
    return (fy.square() + fx.square()).sqrt().clamp_min(1 / max(height, width)).pow(-power)


# -- operators: what happens to the pictures after a step -----------------------------------------------------------------


class Operator(Protocol):
    def __call__(self, images: Tensor, gradient: Tensor, step: int) -> Tensor: ...


@dataclass(frozen=True)
class Decay:
    """centre + (1 - theta) (x - centre): L2 decay (Yosinski et al. 2015, sec. 3)."""

    theta: float
    centre: Tensor

    def __call__(self, images: Tensor, gradient: Tensor, step: int) -> Tensor:
        return images if self.theta == 0 else torch.lerp(images, self.centre, self.theta)


@dataclass(frozen=True)
class Blur:
    """Gaussian blur every `every` steps; sigma in pixels goes from `sigma` to `end` over `steps`."""

    sigma: float
    every: int = 1
    end: float | None = None
    steps: int = 1

    def __call__(self, images: Tensor, gradient: Tensor, step: int) -> Tensor:
        if self.every == 0 or (step + 1) % self.every:
            return images
        end = self.sigma if self.end is None else self.end
        return gaussian_blur(images, self.sigma + (end - self.sigma) * step / max(1, self.steps - 1))


@dataclass(frozen=True)
class ClipSmallNorm:
    """Pixels whose norm over the channels is below the percentile return to `centre` (Yosinski et al. 2015)."""

    percentile: float
    centre: Tensor

    def __call__(self, images: Tensor, gradient: Tensor, step: int) -> Tensor:
        if self.percentile == 0:
            return images
        return _keep(images, self.centre, (images - self.centre).square().sum(1, keepdim=True).sqrt(), self.percentile)


@dataclass(frozen=True)
class ClipSmallContribution:
    """Pixels whose |sum over channels of (x - centre) * gradient| is below the percentile return to `centre`."""

    percentile: float
    centre: Tensor

    def __call__(self, images: Tensor, gradient: Tensor, step: int) -> Tensor:
        if self.percentile == 0:
            return images
        benefit = ((images - self.centre) * gradient).sum(1, keepdim=True).abs()
        return _keep(images, self.centre, benefit, self.percentile)


@dataclass(frozen=True)
class ClampPixels:
    """Keep pixels in [0, 1]."""

    def __call__(self, images: Tensor, gradient: Tensor, step: int) -> Tensor:
        return images.clamp(0, 1)


def _keep(images: Tensor, centre: Tensor, value: Tensor, percentile: float) -> Tensor:
    """`images` where value (N, 1, H, W) reaches its picture's percentile, `centre` elsewhere."""
    threshold = torch.quantile(value.flatten(1), percentile / 100, dim=1).view(-1, 1, 1, 1)
    return torch.where(value >= threshold, images, centre)


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian over (H, W), cut at 4 sigma, edges repeated; as scipy's gaussian_filter(mode='nearest')."""
    if sigma <= 0:
        return images
    radius = int(4 * sigma + 0.5)
    place = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (place / sigma).square())
    kernel = kernel / kernel.sum()
    channels = images.shape[1]
    x = F.pad(images, (0, 0, radius, radius), mode="replicate")
    x = F.conv2d(x, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    x = F.pad(x, (radius, radius, 0, 0), mode="replicate")
    return F.conv2d(x, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


# -- the loop ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ascent:
    """What the loop gives back."""

    images: Tensor  # (N, C, H, W)
    scores: Tensor  # (T, N): the objective before each step
    stopped: list[int] = field(default_factory=list)  # pictures whose score stopped being finite
    snapshots: list[tuple[int, Tensor]] = field(default_factory=list)  # (steps done, images)


def join(parts: Sequence[Ascent]) -> Ascent:
    """Several batches' results as one."""
    sizes = [len(part.images) for part in parts]
    return Ascent(
        torch.cat([part.images for part in parts]),
        torch.cat([part.scores for part in parts], 1),
        [i + sum(sizes[:n]) for n, part in enumerate(parts) for i in part.stopped],
        [(shots[0][0], torch.cat([images for _, images in shots])) for shots in zip(*(part.snapshots for part in parts), strict=True)],
    )


StepRule = Literal["normalised", "mean_abs", "constant", "scaled", "progress", "line_search"]


def ascend(
    model: LoadedModel,
    objective: Objective,
    start: Tensor,
    *,
    steps: int,
    step_size: float,
    draws: Draws,
    rule: StepRule = "normalised",
    gain: float = 2.0,
    transforms: Sequence[Transform] = (),
    conditioners: Sequence[Conditioner] = (),
    operators: Sequence[Operator] = (),
    snapshots: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Ascent:
    """Ascend the objective from `start` (N, C, H, W) for `steps` steps.

    rule 'normalised'  x += step_size * g / rms(g), rms over the picture: step_size is the RMS change of a pixel
         'mean_abs'    x += step_size * g / mean(|g|): step_size is the mean change of a pixel (DeepDream's)
         'constant'    x += step_size * g
         'scaled'      as constant, the factor being gain / ||g||^2 at the first step: a rate that suits the model
         'progress'    x += min(step_size, gain / ||g||^2) * g: to first order the score rises by `gain` a step
                       (Yosinski et al. 2015)
         'line_search' as constant, but a step after which a picture scores less is taken back and its step size
                       halved (accepted ones grow it by a tenth), so that no score ever falls; not with random transforms
    Cost: one forward and one backward pass a step, and one forward pass at the end. Pictures do not influence one another.
    """
    if rule == "line_search" and transforms:
        raise ValueError("line_search compares scores, which random transforms would blur")
    x = start.detach().clone()
    good = x  # the last picture of each whose score was finite
    alive = torch.ones(len(x), dtype=torch.bool, device=x.device)
    trace: list[Tensor] = []
    shots: list[tuple[int, Tensor]] = []
    wanted = {round(steps * (i + 1) / snapshots) for i in range(snapshots)} if snapshots else set()
    size = torch.full((len(x), 1, 1, 1), step_size, device=x.device, dtype=x.dtype)
    best: tuple[Tensor, Tensor, Tensor] | None = None  # line search: pictures, gradient, score accepted last
    tiny = torch.finfo(x.dtype).tiny

    for step in range(steps):
        score, gradient = _score_and_gradient(model, objective, x, transforms, draws)
        # torch.where and not an `if`: a device is not waited for in the middle of the loop.
        if rule == "line_search" and best is not None:
            # A step into the void is taken back like any other that does not rise.
            rose = (score >= best[2]) & torch.isfinite(gradient.flatten(1)).all(1)
            mask = rose.view(-1, 1, 1, 1)
            x, gradient, score = torch.where(mask, x, best[0]), torch.where(mask, gradient, best[1]), torch.where(rose, score, best[2])
            size = torch.where(mask, size * 1.1, size * 0.5)
        known = torch.isfinite(score)
        x = torch.where(known.view(-1, 1, 1, 1), x, good)
        if trace:
            score = torch.where(known, score, trace[-1])
        alive = alive & known & torch.isfinite(gradient.flatten(1)).all(1)
        good, best = x, (x, gradient, score)
        trace.append(score)
        move = gradient
        for conditioner in conditioners:
            move = conditioner(move)
        if rule == "normalised":
            move = move / move.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(tiny)
        elif rule == "mean_abs":
            move = move / move.abs().mean((1, 2, 3), keepdim=True).clamp_min(tiny)
        elif rule == "scaled" and step == 0:
            size = gain / (gradient * move).sum((1, 2, 3), keepdim=True).clamp_min(tiny)
        elif rule == "progress":
            move = move * (gain / (gradient * move).sum((1, 2, 3), keepdim=True).clamp_min(tiny) / step_size).clamp_max(1)
        new = x + size * move
        for operator in operators:
            new = operator(new, gradient, step)
        x = torch.where(alive.view(-1, 1, 1, 1), new, x)
        if step + 1 in wanted:
            shots.append((step + 1, x.clone()))
        if progress is not None:
            progress("steps", step + 1, steps)
    if best is not None:
        # The last step has not been looked at yet.
        with torch.no_grad():
            final = evaluate(model, objective, x, x)
        kept = final >= best[2] if rule == "line_search" else torch.isfinite(final)
        x = torch.where(kept.view(-1, 1, 1, 1), x, good)
        if rule != "line_search":  # which takes back what does not rise
            alive = alive & kept
        if steps in wanted:
            shots[-1] = (steps, x.clone())
    scores = torch.stack(trace) if trace else x.new_zeros((0, len(x)))
    stopped = torch.nonzero(~alive).flatten().tolist()
    return Ascent(x, scores, stopped, shots)


def _score_and_gradient(
    model: LoadedModel, objective: Objective, x: Tensor, transforms: Sequence[Transform], draws: Draws
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        seen: Tensor = leaf
        for transform in transforms:
            seen = transform(seen, draws)
        score = evaluate(model, objective, seen, leaf)
        gradient = torch.autograd.grad(score.sum(), leaf)[0]
    return score.detach(), gradient
