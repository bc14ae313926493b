"""What rises: a score a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..device import at_least_single, full_precision
from ..hooks import ANSWER
from ..models import LoadedModel
from .rules import rows

Score = Callable[[dict[str, Tensor], Tensor], Tensor]


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


def channel(layer: str, index: int) -> Objective:
    """The mean over positions of one channel of a layer with maps (N, C, H, W)."""
    return Objective(frozenset({layer}), lambda outputs, _: positions(outputs[layer])[..., index].mean(1))


def positions(maps: Tensor) -> Tensor:
    """(N, P, C) of maps (N, C, H, W). As maps lie channels last nothing is copied, and slopes come back in that layout: in another one
    the backward passes of the next layers take longer."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2)


def layer_norm(layer: str) -> Objective:
    """Half the squared norm of a layer, whose gradient with respect to the layer is the layer itself."""
    return Objective(frozenset({layer}), lambda outputs, _: half_square(outputs[layer]))


def guide_match(layer: str, guide: Tensor) -> Objective:
    """sum over positions of max_j a . g_j: each place of the layer grows like the one of the guide's (C, H, W) it is most like.

    The gradient at a place is that feature of the guide, as in the guided dreams of Mordvintsev, Olah & Tyka 2015.
    """
    features = at_least_single(guide.flatten(1))  # (C, J)

    def score(outputs: dict[str, Tensor], _: Tensor) -> Tensor:
        return (positions(outputs[layer]) @ features).amax(2).sum(1)

    return Objective(frozenset({layer}), score)


def feature_error(layer: str, features: Tensor) -> Objective:
    """||phi(x) - phi0||^2 / ||phi0||^2 of each picture, phi0 = features[i] (Mahendran & Vedaldi 2015, eq. 2); subtract it."""
    features = at_least_single(features)
    size = features.flatten(1).square().sum(1).clamp_min(torch.finfo(features.dtype).tiny)

    def score(outputs: dict[str, Tensor], _: Tensor) -> Tensor:
        return squared_distance(outputs[layer], features, 1 / size)

    return Objective(frozenset({layer}), score)


def squared_norm(centre: Tensor | float = 0.0) -> Objective:
    """||x - centre||_2^2 of each picture; subtract it to keep pictures near `centre`."""
    return Objective(frozenset(), lambda _, x: 2 * half_square(x - centre))


def alpha_norm(alpha: float = 6.0, centre: Tensor | float = 0.0) -> Objective:
    """sum |x - centre|^alpha: keeps pixels within a range (Mahendran & Vedaldi 2015, sec. 3)."""

    def score(_: dict[str, Tensor], x: Tensor) -> Tensor:
        found: Tensor = _PowerSum.apply(x - centre, alpha)
        return found

    return Objective(frozenset(), score)


def total_variation(beta: float = 2.0) -> Objective:
    """sum (dx^2 + dy^2)^(beta/2), differences to the right and lower neighbour, none across the edge, summed over colours
    (Mahendran & Vedaldi 2015, sec. 3). Where beta < 2 a flat place has no slope; 1e-10 under the root stands for it."""

    def score(_: dict[str, Tensor], x: Tensor) -> Tensor:
        found: Tensor = _Variation.apply(x, beta)
        return found

    return Objective(frozenset(), score)


# -- sums with slopes written out: a regulariser must not cost more than the passes it stands beside ------------------------


def half_square(x: Tensor) -> Tensor:
    """(N,) ||x||^2 / 2 of each picture."""
    found: Tensor = _HalfSquare.apply(x)
    return found


def squared_distance(x: Tensor, centre: Tensor, factor: Tensor) -> Tensor:
    """(N,) factor_i ||x_i - centre_i||^2 of each picture."""
    found: Tensor = _SquaredDistance.apply(x, centre, factor)
    return found


def squared_length(x: Tensor) -> Tensor:
    """(N,) ||x||^2 of each picture, in one pass over memory."""
    return torch.linalg.vector_norm(x, dim=_inner(x)).square()


class _HalfSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return squared_length(x) / 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x * rows(gradient, x)


class _SquaredDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, centre: Tensor, factor: Tensor) -> Tensor:
        away = x - centre
        ctx.save_for_backward(away, factor)
        return squared_length(away) * factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        away, factor = ctx.saved_tensors
        return away * rows(2 * gradient * factor, away), None, None


class _PowerSum(torch.autograd.Function):
    """sum |x|^alpha; even powers without a logarithm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        # slope / alpha: sign(x) |x|^(alpha - 1)
        if alpha in (2, 4, 6):
            square = x.square()
            slope = x.clone() if alpha == 2 else x * square if alpha == 4 else x * square.square_()
        else:
            slope = x.sign() * x.abs().pow(alpha - 1)
        ctx.save_for_backward(slope)
        ctx.alpha = alpha
        return (x * slope).sum(_inner(x))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return slope * rows(ctx.alpha * gradient, slope), None


class _Variation(torch.autograd.Function):
    """sum (dx^2 + dy^2)^(beta/2) of pictures (N, C, H, W)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: float) -> Tensor:
        dx, dy = x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]
        if beta == 2:
            value = squared_length(dx) + squared_length(dy)
        else:  # nothing follows the last column and row
            squared = torch.full_like(x, 1e-10)
            squared[..., :-1] += dx.square()
            squared[..., :-1, :] += dy.square()
            weight = squared.pow(beta / 2 - 1).mul_(beta / 2)
            dx *= weight[..., :-1]
            dy *= weight[..., :-1, :]
            value = squared.pow_(beta / 2).sum(_inner(x))
        # The slope at once, while the differences lie in the cache.
        slope = torch.zeros_like(x)
        slope[..., 1:] += dx
        slope[..., :-1] -= dx
        slope[..., 1:, :] += dy
        slope[..., :-1, :] -= dy
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return slope * rows(2 * gradient, slope), None


def _inner(x: Tensor) -> tuple[int, ...]:
    """All dimensions but the first."""
    return tuple(range(1, x.dim()))


def evaluate(model: LoadedModel, objective: Objective, seen: Tensor, pictures: Tensor) -> Tensor:
    """(N,) scores: layers look at `seen` (the transformed pictures), penalties at the pictures themselves. Only the layers' own work may
    be done in lower precision: sums over all positions are beyond what that can count."""
    layers = sorted(objective.layers)
    if layers == [ANSWER]:
        outputs = {ANSWER: model(seen)}
    else:
        outputs = model.activations(seen, layers) if layers else {}
    with full_precision(pictures.device):
        return objective.score({layer: at_least_single(found) for layer, found in outputs.items()}, pictures)
