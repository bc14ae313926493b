"""One change for all pictures: by DeepFool, picture after picture, and by stochastic gradient steps on the margin."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .attacks import Norm, direction
from .minimal import deepfool

if TYPE_CHECKING:
    from torch import Tensor

    from harness.context import Draws
    from harness.models import LoadedModel

Progress = Callable[[str, int, int], None]


def project_noise(noise: Tensor, eps: float, norm: Norm) -> Tensor:
    """Noise (C, H, W) brought into the ball about zero (Moosavi-Dezfooli et al. 2017, arXiv:1610.08401, sec. 3)."""
    if norm == "linf":
        return noise.clamp(-eps, eps)
    return noise * (eps / noise.norm().clamp_min(1e-12)).clamp_max(1)


def universal_deepfool(
    model: LoadedModel,
    images: Tensor,
    eps: float,
    draws: Draws,
    *,
    norm: Norm = "linf",
    passes: int = 5,
    wanted: float = 0.8,
    steps: int = 10,
    candidates: int = 10,
    chunk: int = 25,
    progress: Progress | None = None,
) -> Tensor:
    """The paper's algorithm 1: each picture that the noise does not fool yet adds the smallest step that takes it over a boundary, in
    its turn, and the sum is projected; passes over the pictures in a new order until the share `wanted` is fooled.

    images (N, C, H, W) in [0, 1], uint8 or floating; noise (C, H, W); at most `chunk` pictures are in flight. Cost: a forward pass a
    picture and pass, and DeepFool for those that are not fooled.
    """
    import torch

    own = answers(model, images, batch=chunk)
    noise = torch.zeros_like(pixels(model, images[:1])[0])
    for turn in range(passes):
        order = draws.rand((len(images),))[0].argsort()
        for done, i in enumerate(order.tolist()):
            picture = pixels(model, images[i : i + 1])
            moved = (picture + noise).clamp(0, 1)
            with torch.no_grad():
                hit = model(moved).argmax(1) != own[i]
            if not bool(hit):
                found = deepfool(model, moved, steps=steps, candidates=candidates, norm="l2", clip=False)
                if bool(found.fooled):
                    noise = project_noise(noise + (found.images - moved)[0], eps, norm)
            if progress is not None:
                progress("pictures", turn * len(images) + done + 1, passes * len(images))
        if float((answers(model, images, noise, batch=chunk) != own).float().mean()) >= wanted:
            break
    return noise


def universal_gradient(
    model: LoadedModel,
    images: Tensor,
    eps: float,
    draws: Draws,
    *,
    norm: Norm = "linf",
    passes: int = 10,
    batch: int = 25,
    chunk: int = 25,
    step: float = 0.1,
    shift: float = 0.07,
    progress: Progress | None = None,
) -> Tensor:
    """Noise that lowers the margin f_c - max_k f_k of each picture's own class c, by signed steps with momentum (Dong et al. 2018,
    arXiv:1710.06081) on mini-batches, whose length falls to zero. The margin is cut off where a picture is fooled by far, so that it no
    longer counts (as Shafahi et al. 2020, arXiv:1811.11304, cut their loss). Pictures are mirrored and rolled by up to the share `shift`
    of their side at random, so that few go a long way.

    images (N, C, H, W) in [0, 1], uint8 or floating; noise (C, H, W); `step` as a share of eps; at most `chunk` pictures are in
    flight. Cost: a forward pass, and one forward and one backward pass, a picture and pass.
    """
    import torch

    noise = torch.zeros_like(pixels(model, images[:1])[0])
    momentum = torch.zeros_like(noise)
    reach = round(shift * images.shape[-1])
    batches = -(-len(images) // batch)
    total = passes * batches
    own = None if reach else answers(model, images, batch=chunk)
    for k in range(total):
        if k % batches == 0:
            order = draws.rand((len(images),))[0].argsort()
        rows = order[(k % batches) * batch : (k % batches + 1) * batch]
        if reach:
            turned = (draws.rand((len(rows), 1, 1, 1))[0] < 0.5).to(noise.device)
            dy, dx = draws.integers(-reach, reach + 1, 2)[0]
        gradient = torch.zeros_like(noise)
        for part in range(0, len(rows), chunk):  # what fits into memory; the step is that of all
            some = rows[part : part + chunk]
            x = pixels(model, images[some.to(images.device)])
            if reach:
                x = torch.where(turned[part : part + chunk], x.flip(3), x).roll((dy, dx), (2, 3))
                with torch.no_grad():
                    classes = model(x).argmax(1)
            else:
                assert own is not None
                classes = own[some]
            with torch.enable_grad():
                leaf = noise.detach().requires_grad_()
                logits = model((x + leaf).clamp(0, 1))
                gradient += torch.autograd.grad(margin(logits, classes).clamp_min(-ENOUGH).sum(), leaf)[0]
        momentum = 0.9 * momentum + gradient / gradient.abs().mean().clamp_min(1e-12)
        move = direction(momentum[None], norm)[0]
        noise = project_noise(noise - step * eps * (1 - k / total) * move, eps, norm)
        if progress is not None:
            progress("steps", k + 1, total)
    return noise


ENOUGH = 10.0  # logits by which a picture is fooled, beyond which it no longer counts


def margin(logits: Tensor, classes: Tensor) -> Tensor:
    """(N,) f_c - max over k != c of f_k: below zero the model names another class."""
    own = logits.gather(1, classes[:, None]).squeeze(1)
    return own - logits.scatter(1, classes[:, None], float("-inf")).amax(1)


def pixels(model: LoadedModel, images: Tensor) -> Tensor:
    """Pictures as the model takes them: uint8 ones, which take a quarter of the space, as numbers in [0, 1]."""
    import torch

    if images.dtype == torch.uint8:
        return images.to(model.device).to(model.dtype) / 255
    return images.to(model.device)


def answers(model: LoadedModel, images: Tensor, noise: Tensor | float = 0.0, *, batch: int) -> Tensor:
    """(N,) the classes named for pictures with the noise upon them."""
    import torch

    with torch.no_grad():
        return torch.cat([model((pixels(model, part) + noise).clamp(0, 1)).argmax(1) for part in torch.split(images, batch)])
