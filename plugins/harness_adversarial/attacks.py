"""Gradient attacks in pixel units: pictures in [0, 1], eps and steps likewise.

x <- clip(project(x + step * direction(gradient of the loss))), the direction being the gradient's sign (L-inf; Goodfellow et al. 2014,
arXiv:1412.6572; Madry et al. 2017, arXiv:1706.06083) or the gradient over its norm (L2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from harness.context import Draws
    from harness.models import LoadedModel

Norm = Literal["linf", "l2"]
FLOOR = 1e-12  # below this a norm counts as this much


@dataclass(frozen=True)
class Attack:
    """How an attack goes: `step` as a share of eps; targeted ones descend the loss of a class, others ascend that of the label."""

    name: str
    norm: Norm
    steps: int
    step: float
    targeted: bool = False
    random_start: bool = False


@dataclass(frozen=True)
class Attacked:
    """Pictures after an attack, and which of them (N,) bool it fooled: the answer is the target, or not the label."""

    images: Tensor
    fooled: Tensor


def lengths(delta: Tensor, norm: Norm) -> Tensor:
    """(N,) the norm of each picture's change."""
    flat = delta.flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


def project(x: Tensor, origin: Tensor, eps: float, norm: Norm) -> Tensor:
    """Pictures brought into the ball of radius eps about `origin` and into [0, 1]."""
    delta = x - origin
    if norm == "linf":
        delta = delta.clamp(-eps, eps)
    else:
        delta = delta * (eps / lengths(delta, norm).clamp_min(FLOOR)).clamp_max(1).view(-1, 1, 1, 1)
    return (origin + delta).clamp(0, 1)


def direction(gradient: Tensor, norm: Norm) -> Tensor:
    """The step of length 1 in the norm along which the loss rises most."""
    if norm == "linf":
        return gradient.sign()
    return gradient / lengths(gradient, norm).clamp_min(FLOOR).view(-1, 1, 1, 1)


def starts(images: Tensor, eps: float, norm: Norm, draws: Draws) -> Tensor:
    """A uniform place in the ball about each picture, inside [0, 1]."""
    if norm == "linf":
        return (images + eps * (2 * draws.rand(images.shape[1:]) - 1)).clamp(0, 1)
    way = draws.randn(images.shape[1:])
    count = way[0].numel()
    radius = draws.rand(()).pow(1 / count).view(-1, 1, 1, 1)
    return (images + eps * radius * way / lengths(way, norm).view(-1, 1, 1, 1)).clamp(0, 1)


def attack(
    model: LoadedModel,
    images: Tensor,
    classes: Tensor,
    settings: Attack,
    eps: float,
    draws: Draws | None = None,
    drop: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Attacked:
    """Pictures (N, C, H, W) changed by at most eps so that the model errs on `classes` (N,), or names them if targeted.

    With `drop` a picture is done once it is fooled: it leaves the batch, which is exact where any place in the ball counts. Without,
    all go on to the last step, as foolbox's do. Cost: one forward and one backward pass a step and picture that is left, and one
    forward pass at the end, which sees who was fooled.
    """
    result, left = _stepped(model, images, classes, settings, eps, draws, drop, progress)
    done = ~left
    if bool(left.any()):
        done[left] = success(model, result[left], classes[left], settings.targeted)
    return Attacked(result, done)


def perturbed(
    model: LoadedModel,
    images: Tensor,
    classes: Tensor,
    settings: Attack,
    eps: float,
    draws: Draws | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The pictures of `attack`, without the pass that sees whether they fool the model."""
    return _stepped(model, images, classes, settings, eps, draws, False, progress)[0]


def _stepped(
    model: LoadedModel,
    images: Tensor,
    classes: Tensor,
    settings: Attack,
    eps: float,
    draws: Draws | None,
    drop: bool,
    progress: Callable[[int, int], None] | None,
) -> tuple[Tensor, Tensor]:
    """Pictures after the steps, and (N,) bool which of them are not known to be fooled."""
    import torch
    import torch.nn.functional as F

    from harness.device import full_precision

    open_ = torch.ones(len(images), dtype=torch.bool, device=images.device)
    if eps == 0 or settings.steps == 0:
        return images, open_
    x = images
    if settings.random_start:
        if draws is None:
            raise ValueError("a random start needs draws")
        x = starts(images, eps, settings.norm, draws)
    sign = -1.0 if settings.targeted else 1.0
    result = x.clone() if drop else x
    left = torch.arange(len(x), device=x.device)
    origin, wanted = images, classes
    low, high = ((images - eps).clamp_min_(0), (images + eps).clamp_max_(1)) if settings.norm == "linf" else (None, None)
    with full_precision(images.device):  # the signs of tiny gradients count
        for step in range(settings.steps):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                logits = model(leaf)
                gradient = torch.autograd.grad(F.cross_entropy(logits, wanted, reduction="sum"), leaf)[0]
            if drop:
                hit = (logits.detach().argmax(1) == wanted) == settings.targeted
                if bool(hit.any()):  # a wait for the device, which a smaller batch is worth
                    result[left[hit]], open_[left[hit]] = x[hit], False
                    keep = ~hit
                    left, x, origin, wanted, gradient = left[keep], x[keep], origin[keep], wanted[keep], gradient[keep]
                    if low is not None and high is not None:
                        low, high = low[keep], high[keep]
                    if not len(left):
                        return result, open_
            if low is not None:  # the same in fewer passes over memory
                assert high is not None
                x = x.add(gradient.sign_(), alpha=sign * settings.step * eps)
                torch.maximum(x, low, out=x)
                torch.minimum(x, high, out=x)
            else:
                x = project(x + sign * settings.step * eps * direction(gradient, settings.norm), origin, eps, settings.norm)
            if progress is not None:
                progress(step + 1, settings.steps)
    if not drop:
        return x, open_
    result[left] = x
    return result, open_


def success(model: LoadedModel, images: Tensor, classes: Tensor, targeted: bool) -> Tensor:
    """(N,) bool: does the model name the class (targeted), or another than it? In the precision in which attacks step."""
    import torch

    from harness.device import full_precision

    with torch.no_grad(), full_precision(images.device):
        return (model(images).argmax(1) == classes) == targeted


def in_255ths(eps: float) -> str:
    """eps in [0, 1] as people write it: n/255."""
    return f"{eps * 255:g}/255"
