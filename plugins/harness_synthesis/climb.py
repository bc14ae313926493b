"""What the techniques that ascend have in common: a progress strip, a state to go on from, an early end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness import Arrays, Images, Param, Use

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context
    from harness.models import LoadedModel
    from harness.optimise import Ascent, State

SCHEDULE: Any = Param(
    None, ge=1, le=1_000_000, description="the length in steps by which what changes on the way goes; none: the number of steps"
)
PROGRESS = 5  # pictures in a progress strip
EARLIER = "earlier"
CONVERGED: Any = Param(
    0.0,
    ge=0,
    lt=1,
    description="stop a picture once 20 steps raise its objective by less than this share of what the 20 before them had; 0: never",
)
GO_ON: Any = Param(
    0,
    ge=0,
    description="go on from where a run of this many steps with the same settings ended; it is taken from the store or made first",
)


def mean_picture(model: LoadedModel, height: int, width: int) -> Tensor:
    """(1, C, height, width) the model's mean colour everywhere: written out and laid out as pictures are, so that what is taken from them
    or mixed with them at every step goes over memory in order."""
    import torch

    colour = torch.tensor(model.input.mean, device=model.device, dtype=model.dtype).view(1, -1, 1, 1)
    return colour.expand(1, -1, height, width).contiguous(memory_format=torch.channels_last)


def earlier(technique: Any) -> list[Use]:
    """The run that `go_on` names: the same technique with fewer steps."""
    if not technique.go_on:
        return []
    params = {**technique.key_params(), "steps": technique.go_on, "go_on": 0}
    if "schedule" in params:  # what changes from step to step goes by the whole length
        params["schedule"] = technique.schedule or technique.steps
    return [Use(technique.name, params, name=EARLIER)]


def check_go_on(technique: Any) -> None:
    """ValueError unless the run to go on from is shorter."""
    if technique.go_on and technique.steps is not None and technique.go_on >= technique.steps:
        raise ValueError(f"go_on {technique.go_on} must be fewer than steps, which is {technique.steps}: the steps already done count")


def go_on(ctx: Context, name: str = "state") -> State | None:
    """The state to begin with, if an earlier run left one."""
    from harness.errors import ConfigError
    from harness.optimise import State

    if EARLIER not in ctx.results:
        return None
    artifact: Any = ctx.results[EARLIER].get(name)
    if artifact is None:
        raise ConfigError(f"{ctx.technique}.go_on: the run of fewer steps left nothing to go on from; its score stopped being finite")
    return State.of(artifact.data, ctx.device)


def state_of(made: Ascent, name: str = "state") -> list[Arrays]:
    """The state as an artifact; none where numbers in it are not finite, since nothing can go on from there."""
    import torch

    if made.state is None or not all(bool(torch.isfinite(v).all()) for v in made.state.memory.values()):
        return []
    return [Arrays(name, made.state.arrays())]


def strip(name: str, made: Ascent, start: Tensor | None, names: Sequence[str], exact: bool = False, caption: str = "") -> list[Any]:
    """The pictures `names` (the first ones) on their way, a row each; `start` (N, C, H, W) stands in front."""
    import torch

    if not made.snapshots:
        return []
    stages = ([("start", start)] if start is not None else []) + [(f"step {n}", images) for n, images in made.snapshots]
    pictures = torch.stack([images[: len(names)] for _, images in stages], 1).flatten(0, 1).clamp(0, 1)
    captions = [f"{n}: {stage}" if k == 0 else stage for n in names for k, (stage, _) in enumerate(stages)]
    return [Images(name, torch.round(pictures * 255) / 255, captions=captions, columns=len(stages), exact=exact, caption=caption)]
