"""Words, numbers and choices that the adversarial techniques have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context, Metric, Result
    from harness.models import LoadedModel

Of = TypeVar("Of")
AMPLIFIED = 10


def in_full_precision(run: Callable[[Of, Context], Result]) -> Callable[[Of, Context], Result]:
    """A technique's `run` whose every answer is given in full precision, as attacks step and judge in it: in a lower one a picture near a
    boundary would have another answer before any change. Where there is one score there is no other answer, and nothing to attack."""

    @wraps(run)
    def exact(technique: Of, ctx: Context) -> Result:
        from harness import NotApplicable
        from harness.device import full_precision

        if ctx.model.class_count < 2:
            raise NotApplicable("needs at least two classes")
        with full_precision(ctx.device):
            return run(technique, ctx)

    return exact


def second(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) the most likely class that is not the label."""
    return logits.scatter(1, labels[:, None], float("-inf")).argmax(1)


def interval(hits: np.ndarray) -> tuple[float, float]:
    """95 % interval of a share (Wilson)."""
    from harness_representations.predictions import wilson

    return wilson(int(np.sum(hits)), len(hits))


def interval_text(hits: np.ndarray) -> str:
    low, high = interval(hits)
    return f"95 % interval {low:.3f} to {high:.3f}"


def rate(name: str, hits: np.ndarray, about: str, more: str = "", better: Literal["higher", "lower"] = "higher") -> Metric:
    """A share of pictures as a metric, with the count and the interval."""
    from harness import Metric

    low, high = interval(hits)
    detail = f"{int(hits.sum())} of {len(hits)}, {low:.3f} to {high:.3f}" + (f", {more}" if more else "")
    return Metric(name, float(hits.mean()), better=better, per_image=hits.astype(float).tolist(), about=about, detail=detail)


def tell_difference(delta: Tensor, factor: int) -> str:
    """The caption of an amplified difference: the factor and the largest change."""
    return f"difference x {factor}, at most {float(delta.abs().max()) * 255:.3g}/255"


def fitted(images: Tensor, size: int) -> Tensor:
    """Pictures as another model takes them: as they are, or resized."""
    return images if images.shape[-1] == size else resampled(images, size).clamp(0, 1)


def resampled(values: Tensor, size: int) -> Tensor:
    """Values of any sign (N, C, H, W) at another size (N, C, size, size)."""
    import torch.nn.functional as F

    return F.interpolate(values, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def check_alike(model: LoadedModel, other: LoadedModel, where: str) -> None:
    """Raises where another model knows other classes, or takes pictures of other channels."""
    from harness import ConfigError

    if other.classes != model.classes or other.class_count != model.class_count:
        raise ConfigError(f"{where}: {other.name!r} has other classes than {model.name!r}")
    if other.input.channels != model.input.channels:
        raise ConfigError(f"{where}: {other.name!r} takes {other.input.channels} colours a pixel, not {model.input.channels}")
