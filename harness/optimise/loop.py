from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..context import Draws
from ..device import full_precision
from ..models import LoadedModel
from .conditioners import Conditioner, Conditions, form
from .objectives import Objective, evaluate
from .operators import Operator, Remembers
from .parametrisations import Parametrisation, Pixels
from .rules import NAMED, Memory, Progress, Rule, Scaled, rows
from .transforms import Transform

WINDOW = 20  # steps over which convergence is judged

StepRule = Literal["normalised", "mean_abs", "constant", "scaled", "progress", "momentum", "adam", "lbfgs", "line_search"]


@dataclass(frozen=True)
class State:
    """Where work stopped, from which it goes on as if it had not: each tensor has a row a picture."""

    step: int
    memory: Mapping[str, Tensor]
    draws: Tensor  # (N, bytes) uint8: the random generators

    def arrays(self) -> dict[str, Any]:
        """As named arrays, to be stored as one artifact."""
        return {"step": np.asarray(self.step), "draws": self.draws, **{f"memory.{k}": v for k, v in self.memory.items()}}

    @classmethod
    def of(cls, arrays: Mapping[str, Any], device: torch.device) -> State:
        """From what `arrays` gave, read back as numpy arrays or tensors."""
        found = {k: v for k, v in arrays.items() if k != "step"}
        memory = {k.removeprefix("memory."): torch.as_tensor(v, device=device) for k, v in found.items() if k != "draws"}
        return cls(int(arrays["step"]), memory, torch.from_numpy(np.asarray(found["draws"])))

    def rows(self, which: slice) -> State:
        return State(self.step, {k: v[which] for k, v in self.memory.items()}, self.draws[which])


@dataclass(frozen=True)
class Ascent:
    """What the loop gives back."""

    images: Tensor  # (N, C, H, W)
    scores: Tensor  # (T, N): the objective before each step
    stopped: list[int] = field(default_factory=list)  # pictures whose score stopped being finite
    snapshots: list[tuple[int, Tensor]] = field(default_factory=list)  # (steps done, images)
    state: State | None = None
    variables: Tensor | None = None  # what the parametrisation made the images of


def join(parts: Sequence[Ascent]) -> Ascent:
    """Several batches' results as one; what stopped early is filled up with its last values."""
    sizes = [len(part.images) for part in parts]
    longest = max(len(part.scores) for part in parts)
    shots = max((part.snapshots for part in parts), key=lambda found: found[-1][0] if found else -1)
    states = [part.state for part in parts if part.state is not None]
    variables = [part.variables for part in parts if part.variables is not None]
    last = max(states, key=lambda s: s.step, default=None)
    return Ascent(
        torch.cat([part.images for part in parts]),
        torch.cat([_filled(part.scores, longest) for part in parts], 1),
        [i + sum(sizes[:n]) for n, part in enumerate(parts) for i in part.stopped],
        [(n, torch.cat([_at(part, n) for part in parts])) for n, _ in shots],
        last and State(last.step, {k: _together(states, k, v) for k, v in last.memory.items()}, torch.cat([s.draws for s in states])),
        torch.cat(variables) if len(variables) == len(parts) else None,
    )


def _at(part: Ascent, step: int) -> Tensor:
    """A batch's pictures after that many steps, or where it had ended before."""
    return next((images for n, images in reversed(part.snapshots) if n <= step), part.images)


def _together(states: Sequence[State], name: str, like: Tensor) -> Tensor:
    """One memory of several batches; what a batch that ended early never had is zero."""
    return torch.cat([s.memory.get(name, like.new_zeros((len(s.draws), *like.shape[1:]))) for s in states])


def _filled(scores: Tensor, length: int) -> Tensor:
    return scores if len(scores) == length else torch.cat([scores, scores[-1:].expand(length - len(scores), -1)])


def stepped(phases: Sequence[tuple[int, float]]) -> Callable[[int], float]:
    """A schedule: each value for its number of steps, the last one from there on."""

    def value(step: int) -> float:
        for count, size in phases:
            if step < count:
                return size
            step -= count
        return phases[-1][1]

    return value


def ascend(
    model: LoadedModel,
    objective: Objective,
    start: Tensor,
    *,
    steps: int,
    step_size: float | Callable[[int], float],
    draws: Draws,
    rule: StepRule | Rule = "normalised",
    gain: float = 2.0,
    parametrisation: Parametrisation | None = None,
    transforms: Sequence[Transform] = (),
    conditioners: Sequence[Conditioner] = (),
    operators: Sequence[Operator] = (),
    snapshots: int = 0,
    converged: float = 0.0,
    begin: State | None = None,
    during: Callable[[int], AbstractContextManager[object]] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Ascent:
    """Ascend the objective from `start`, variables (N, ...) of the parametrisation (pictures, without one), for `steps` steps.

    step_size    a number, or a function of the step
    rule         a Rule, or the name of one: 'normalised', 'mean_abs', 'constant', 'scaled', 'progress', 'momentum', 'adam',
                 'lbfgs', 'line_search'; `gain` is that of 'scaled' and 'progress'. Under 'lbfgs' and 'line_search' no score
                 ever falls; they compare scores, so random transforms may not stand beside them.
    snapshots    how many pictures on the way are kept
    converged    a picture is left as it is once the mean of its objective over 20 steps exceeds that of the 20 before by less
                 than this share of it; the loop ends when all are. 0: never
    begin        the `state` of an earlier ascent: its steps are done, and the rest goes on as if it had not stopped. `start`
                 then gives the shape alone
    during       a context, such as another backward rule, that surrounds the passes of a step

    The device is waited for only every 20 steps. Cost: one forward and one backward pass a step, to the deepest layer the
    objective asks for, and one forward pass at the end. Pictures do not influence one another.
    """
    law = _rule(rule, gain)
    if law.careful and transforms:
        raise ValueError(f"{type(law).__name__} compares scores, which random transforms would blur")
    made: Parametrisation = parametrisation or Pixels()
    size_at = step_size if callable(step_size) else lambda _: step_size
    memory: Memory = {} if begin is None else {name: value.clone() for name, value in begin.memory.items()}  # rules write into it
    z = _laid_out(memory.pop("variables", start).detach())
    done = 0 if begin is None else begin.step
    if begin is not None:
        draws.restore(begin.draws)
    good = z  # the last variables of each picture whose score was finite
    alive = memory.pop("alive", torch.ones(len(z), dtype=torch.bool, device=z.device))
    resting = memory.pop("resting", torch.zeros_like(alive))  # converged
    recent = list(memory.pop("recent", z.new_zeros((len(z), 0))).unbind(1))[-min(done, 2 * WINDOW) :] if done else []
    stands: dict[int, Tensor] = {}  # of those that rest, where their random numbers stood when they came to it
    before: tuple[Tensor, Tensor, Tensor] | None = None  # a careful rule: variables, gradient and score kept last
    if "kept_variables" in memory:
        before = (memory.pop("kept_variables"), memory.pop("kept_gradient"), memory.pop("kept_score"))
    acts = [op.remembering(memory, f"operator{n}") if isinstance(op, Remembers) else op for n, op in enumerate(operators)]
    trace: list[Tensor] = []
    shots: list[tuple[int, Tensor]] = []
    wanted = {done + round((steps - done) * (i + 1) / snapshots) for i in range(snapshots)} if snapshots and steps > done else set()
    reached = done
    condition = Conditions(conditioners)
    for step in range(done, steps):
        with during(step) if during else nullcontext():
            score, gradient = _score_and_gradient(model, objective, z, made, transforms, draws)
        finite = _finite(gradient)
        # torch.where and not an `if`: a device is not waited for in the middle of the loop.
        if law.careful and before is not None:
            # A step into the void is taken back like any other that does not rise, and the gradient then is one that was looked at.
            rose, finite = (score >= before[2]) & finite, alive
            with full_precision(z.device):
                law.judged(memory, rose, (z, before[0]), (gradient, before[1]), step)
            z, gradient, score = _chosen(rose, z, before[0]), _chosen(rose, gradient, before[1]), _chosen(rose, score, before[2])
        known = torch.isfinite(score)
        z = _chosen(known, z, good)
        if trace:
            score = torch.where(known & ~resting, score, trace[-1])
        alive = alive & known & finite
        good, before = z, (z, gradient, score)
        trace.append(score)
        recent = [*recent, score][-2 * WINDOW :]
        if (step + 1) % WINDOW == 0:
            if converged and len(recent) == 2 * WINDOW:
                last, earlier = torch.stack(recent[WINDOW:]).mean(0), torch.stack(recent[:WINDOW]).mean(0)
                still = last - earlier < converged * earlier.abs()
                for i in torch.nonzero(still & ~resting).flatten().tolist():
                    stands[i] = draws.state()[i]
                resting = resting | still
            if not bool((alive & ~resting).any()):
                break
        with full_precision(z.device):
            size = size_at(step)
            new = z + law(memory, gradient, condition, size, step, fresh=step > 0 and size != size_at(step - 1))
            for act in acts:
                new = act(new, gradient, step)
        z = _chosen(alive & ~resting, new, z)
        reached = step + 1
        if reached in wanted:
            # Of a careful rule the last picture that was kept: this step is not judged yet.
            shots.append((reached, _pictures(made, before[0] if law.careful else z).clone()))
        if progress is not None:
            progress("steps", reached, steps)
    # A picture that rests keeps the random numbers it would have had alone, and one that is lost nothing that is not a number.
    stand = draws.state()
    for i, own in stands.items():
        stand[i] = own
    ended = {name: _chosen(alive, value, value.new_zeros(()).expand_as(value)) for name, value in memory.items()}
    ended |= {"variables": z, "alive": alive, "resting": resting}
    if converged:
        filled = [z.new_zeros(len(z))] * (2 * WINDOW - len(recent)) + recent
        ended["recent"] = torch.stack([torch.where(alive, score, torch.zeros_like(score)) for score in filled], 1)
    if before is not None:
        if law.careful:
            kept_before = dict(zip(("kept_variables", "kept_gradient", "kept_score"), before, strict=True))
            ended |= {n: _chosen(alive, v, v.new_zeros(()).expand_as(v)) for n, v in kept_before.items()}
        # The last step has not been looked at yet.
        with torch.no_grad(), during(reached) if during else nullcontext():
            image, seen = _seen(z, made, transforms, draws)
            final = evaluate(model, objective, seen, image)
        draws.restore(stand)
        kept = final >= before[2] if law.careful else torch.isfinite(final)
        z = torch.where(rows(kept, z), z, good)
        if not law.careful:  # which takes back what does not rise
            alive = alive & kept
            ended |= {"variables": z, "alive": alive}
    images = _pictures(made, z)
    if shots and shots[-1][0] == reached:
        shots[-1] = (reached, images.clone())
    elif snapshots and done < reached < steps:
        shots.append((reached, images.clone()))  # the loop ended early
    scores = torch.stack(trace) if trace else z.new_zeros((0, len(z)))
    stopped = torch.nonzero(~alive).flatten().tolist()
    return Ascent(images, scores, stopped, shots, State(reached, ended, stand), z)


def _rule(rule: StepRule | Rule, gain: float) -> Rule:
    if not isinstance(rule, str):
        return rule
    if rule == "scaled":
        return Scaled(gain)
    return Progress(gain) if rule == "progress" else NAMED[rule]()


def _laid_out(z: Tensor) -> Tensor:
    return z.clone(memory_format=form(z))


def _finite(gradient: Tensor) -> Tensor:
    """(N,) whether all of a picture's gradient is finite: what is not makes its sum so."""
    return torch.isfinite(gradient.sum(tuple(range(1, gradient.dim()))))


def _chosen(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """new where mask (N,) holds, else old. On a CPU nothing is waited for by looking, and mostly all are new."""
    if mask.device.type == "cpu" and bool(mask.all()):
        return new
    return torch.where(rows(mask, new), new, old)


def _score_and_gradient(
    model: LoadedModel, objective: Objective, z: Tensor, made: Parametrisation, transforms: Sequence[Transform], draws: Draws
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        pictures, seen = _seen(leaf, made, transforms, draws)
        score = evaluate(model, objective, seen, pictures)
        with full_precision(z.device):
            gradient = torch.autograd.grad(score.sum(), leaf)[0]
    return score.detach(), gradient


def _seen(z: Tensor, made: Parametrisation, transforms: Sequence[Transform], draws: Draws) -> tuple[Tensor, Tensor]:
    """The pictures, and what the model is shown of them. Only its own passes may run in lower precision: Fourier transforms, places in
    a picture and small steps cannot."""
    with full_precision(z.device):
        pictures = seen = made.images(z)
        for transform in transforms:
            seen = transform(seen, draws)
    return pictures, seen


def _pictures(made: Parametrisation, z: Tensor) -> Tensor:
    with torch.no_grad(), full_precision(z.device):
        return made.images(z)
