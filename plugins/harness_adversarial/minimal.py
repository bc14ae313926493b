"""Attacks that look for the smallest change: DeepFool, and box-constrained quasi-Newton descent after Szegedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .attacks import FLOOR, Attacked, Norm, lengths, success

if TYPE_CHECKING:
    from torch import Tensor

    from harness.context import Draws
    from harness.models import LoadedModel


PATIENCE = 5  # steps after which each is made longer by NUDGE: before a clipped pixel ever shorter steps end short of the boundary
NUDGE = 1e-4  # in the norm; the authors' release adds it to every step


def deepfool(
    model: LoadedModel,
    images: Tensor,
    *,
    norm: Norm = "l2",
    candidates: int = 10,
    steps: int = 50,
    overshoot: float = 0.02,
    clip: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Attacked:
    """Pictures (N, C, H, W) moved step by step to the nearest boundary of the model made linear where they are (Moosavi-Dezfooli et al.
    2016, arXiv:1511.04599, algorithm 2), and `overshoot` of the way beyond it.

    r = |f_k - f_0| / ||w_k - w_0||^2 (w_k - w_0) for the class k among the `candidates` most likely ones whose boundary is nearest,
    f being logits and w their gradients; in L-inf r = |f_k - f_0| / ||w_k - w_0||_1 sign(w_k - w_0). Without `clip` pixels may leave
    [0, 1]. A picture whose answer has changed is done and leaves the batch. Cost: one forward and `candidates` backward passes a
    step and picture that is left.
    """
    import torch

    from harness.device import full_precision

    with torch.no_grad(), full_precision(images.device):
        order = model(images).argsort(1, descending=True)[:, : max(2, candidates)]
    start = order[:, 0]
    result = images.clone()
    done = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    left = torch.arange(len(images), device=images.device)
    x, total = images, torch.zeros_like(images)
    with full_precision(images.device):
        for step in range(steps):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                logits = model(leaf)
                hit = logits.detach().argmax(1) != start[left]
                differences = logits.gather(1, order[left]) - logits.gather(1, start[left, None])
                count = differences.shape[1]
                slopes = [torch.autograd.grad(differences[:, k].sum(), leaf, retain_graph=k + 1 < count)[0] for k in range(1, count)]
            if bool(hit.any()):
                result[left[hit]], done[left[hit]] = x[hit], True
                keep = ~hit
                left, x, total, differences = left[keep], x[keep], total[keep], differences[keep]
                slopes = [slope[keep] for slope in slopes]
                if not len(left):
                    return Attacked(result, done)
            slope = torch.stack(slopes, 1)  # (n, K - 1, C, H, W)
            flat = slope.flatten(2)
            size = flat.norm(dim=2) if norm == "l2" else flat.abs().sum(2)
            distance = differences.detach()[:, 1:].abs() / size.clamp_min(FLOOR)
            # A class whose score cannot be told from the first one's by its slope is no way out.
            distance = torch.where(size > FLOOR, distance, torch.inf)
            nearest = distance.argmin(1)
            rows = torch.arange(len(left), device=left.device)
            best, width = slope[rows, nearest], size[rows, nearest].view(-1, 1, 1, 1)
            far = distance[rows, nearest].nan_to_num(posinf=0.0).view(-1, 1, 1, 1)
            if step >= PATIENCE:
                far = far + NUDGE
            total = total + far * (best / width.clamp_min(FLOOR) if norm == "l2" else best.sign())
            x = images[left] + (1 + overshoot) * total
            if clip:
                x = x.clamp(0, 1)
            if progress is not None:
                progress(step + 1, steps)
    result[left] = x
    done[left] = ~success(model, x, start[left], True)
    return Attacked(result, done)


def lbfgs(
    model: LoadedModel,
    images: Tensor,
    classes: Tensor,
    draws: Draws,
    *,
    steps: int = 40,
    rounds: int = 8,
    progress: Callable[[str, int, int], None] | None = None,
) -> Attacked:
    """The smallest change found that makes the model name `classes` (N,): min_r c ||r||^2 - log p(class | x + r) with x + r in [0, 1]
    (Szegedy et al. 2013, arXiv:1312.6199, sec. 4.1), by L-BFGS whose steps are brought back into the box, and a search for the largest
    c of each picture for which the class is named.

    c rises tenfold while it works and falls tenfold while it does not, and is halved between in a logarithm's sense once both are
    known. Cost: `rounds` times `steps` forward and backward passes a picture.
    """
    import torch
    import torch.nn.functional as F

    from harness import optimise as o
    from harness.device import full_precision
    from harness.hooks import ANSWER

    c = torch.full((len(images),), 1.0, device=images.device, dtype=images.dtype)
    works, fails = torch.zeros_like(c), torch.full_like(c, torch.inf)  # the largest c that does, the smallest that does not
    best, found = images.clone(), success(model, images, classes, True)
    norms = torch.where(found, 0.0, torch.inf).to(images.dtype)
    start = images
    for turn in range(rounds):

        def score(outputs: dict[str, Tensor], x: Tensor, c: Tensor = c) -> Tensor:
            return -F.cross_entropy(outputs[ANSWER], classes, reduction="none") - c * (x - images).square().flatten(1).sum(1)

        with full_precision(images.device):
            part = o.ascend(
                model,
                o.Objective(frozenset({ANSWER}), score),
                start,
                steps=steps,
                step_size=0.005,  # root mean square of the first step
                rule="lbfgs",
                draws=draws,
                operators=[o.Clamp()],
            )
        made = part.images.clamp(0, 1)
        hit = success(model, made, classes, True)
        size = lengths(made - images, "l2")
        better = hit & (size < norms)
        best = torch.where(better.view(-1, 1, 1, 1), made, best)
        norms, found = torch.where(better, size, norms), found | hit
        works, fails = torch.where(hit, torch.maximum(works, c), works), torch.where(hit, fails, torch.minimum(fails, c))
        c = torch.where(fails.isinf(), works * 10, torch.where(works == 0, fails / 10, (works * fails).sqrt()))
        # A picture found is near the next one for a c near by; one that failed says nothing, and may have got lost.
        start = torch.where(hit.view(-1, 1, 1, 1), made, images)
        if progress is not None:
            progress("rounds", turn + 1, rounds)
    return Attacked(best, found)
