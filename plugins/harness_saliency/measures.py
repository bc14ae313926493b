"""Numbers and captions that the techniques of this family share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from harness import Metric

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context
    from harness.targets import Rows, Target

Scored = Literal["probability", "score"]
SCORED = "what is measured: the class probability (the score where the target is no class), or the unnormalised score"


def gini(maps: Tensor) -> Tensor:
    """(N,) Gini index of each map (N, H, W) >= 0: 0 all pixels equal, towards 1 all in one pixel; 0 for a zero map.

    Hurley & Rickard 2009, arXiv:0811.4706, table I.
    """
    import torch

    # numpy sorts many times faster on a CPU than torch; and MPS has no float64.
    values = torch.from_numpy(np.sort(maps.detach().flatten(1).cpu().float().numpy(), 1)).double()
    n = values.shape[1]
    rank = torch.arange(1, n + 1, device=values.device, dtype=values.dtype)
    total = values.sum(1)
    index = (values * (2 * rank - n - 1)).sum(1) / (n * total.clamp_min(torch.finfo(values.dtype).tiny))
    return torch.where(total > 0, index, torch.zeros_like(index))


def concentration(maps: Tensor) -> Metric:
    """How much of a map gathers in few pixels, as the mean Gini index."""
    values = gini(maps.abs()).tolist()
    about = "Gini index of the map's absolute values: 0 spread evenly, near 1 gathered in few pixels"
    return Metric("concentration", sum(values) / len(values), per_image=values, about=about)


def completeness(shares: Tensor, difference: Tensor) -> list[float]:
    """For each picture |sum of the shares (N, C, H, W) - difference (N,)| over |difference|."""
    error = (shares.flatten(1).sum(1) - difference).abs() / difference.abs().clamp_min(1e-12)
    return error.tolist()


def captions(ctx: Context) -> list[str]:
    """'explains flamingo, p = 0.98' for each picture."""
    target = ctx.target
    if target.classes is None:
        return [f"explains {label}" for label in target.labels]
    chance = ctx.own_logits.softmax(1).gather(1, target.classes.unsqueeze(1)).squeeze(1).tolist()
    return [f"explains {label}, p = {p:.2f}" for label, p in zip(target.labels, chance, strict=True)]


def zero_notes(maps: Tensor, ids: Sequence[str]) -> list[str]:
    """A sentence for each map that is zero everywhere, so that an empty picture is not read as a finding."""
    flat = (maps.flatten(1) == 0).all(1).tolist()
    return [
        f"{name}: the map is zero everywhere; the score does not react to this picture"
        for name, zero in zip(ids, flat, strict=True)
        if zero
    ]


def answer(target: Target, output: Tensor, rows: Rows, scored: Scored) -> Tensor:
    """(n,) the probability or the score of the target."""
    chance = target.probability(output, rows) if scored == "probability" else None
    return target.score(output, rows) if chance is None else chance


def unit_of(scored: Scored, ctx: Context) -> str:
    """What `answer` measures, in a word."""
    return "probability" if scored == "probability" and ctx.target.classes is not None else "score"
