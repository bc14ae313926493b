"""How far to go along the gradient.

A rule gives the change of the variables (N, ...) for one step. What it must remember it keeps in `memory`, tensors with a
row a picture, so that pictures do not influence one another and work can go on from where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

Memory = dict[str, Tensor]


class Rule(Protocol):
    """`move` is the gradient after the conditioners; `size` the step size of this step, `fresh` whether it is another than before."""

    careful: ClassVar[bool]  # a step after which a picture scores less is taken back; `judged` then hears of it

    def __call__(self, memory: Memory, gradient: Tensor, move: Tensor, size: float, step: int, fresh: bool) -> Tensor: ...

    def judged(self, memory: Memory, rose: Tensor, moved: Tensor, bent: Tensor, step: int) -> None:
        """Hear which pictures' last step was kept (N,), how the variables moved and how the gradient changed on the way."""


def rows(values: Tensor, like: Tensor) -> Tensor:
    """(N,) -> (N, 1, ...): one value a picture, to be spread over its variables."""
    return values.view(-1, *[1] * (like.dim() - 1))


def total(x: Tensor) -> Tensor:
    """(N, 1, ...) sums over each picture's variables."""
    return x.sum(tuple(range(1, x.dim())), keepdim=True)


def average(x: Tensor) -> Tensor:
    """(N, 1, ...) means over each picture's variables."""
    return x.mean(tuple(range(1, x.dim())), keepdim=True)


def _tiny(x: Tensor) -> float:
    return float(torch.finfo(x.dtype).tiny)


def _over(size: float, length: Tensor) -> Tensor:
    """size / length, and no step at all where there is no gradient."""
    return torch.where(length > 0, size / length.clamp_min(_tiny(length)), torch.zeros_like(length))


class _Plain:
    """A rule that never takes a step back."""

    careful: ClassVar[bool] = False

    def judged(self, memory: Memory, rose: Tensor, moved: Tensor, bent: Tensor, step: int) -> None:
        return


@dataclass(frozen=True)
class Normalised(_Plain):
    """size * g / rms(g): size is the RMS change of a variable."""

    def __call__(self, memory: Memory, gradient: Tensor, move: Tensor, size: float, step: int, fresh: bool) -> Tensor:
        return move * _over(size, average(move.square()).sqrt())


@dataclass(frozen=True)
class MeanAbs(_Plain):
    """size * g / mean(|g|): size is the mean change of a variable (DeepDream's step)."""

    def __call__(self, memory: Memory, gradient: Tensor, move: Tensor, size: float, step: int, fresh: bool) -> Tensor:
        return move * _over(size, average(move.abs()))


@dataclass(frozen=True)
class Constant(_Plain):
    """size * g."""

    def __call__(self, memory: Memory, gradient: Tensor, move: Tensor, size: float, step: int, fresh: bool) -> Tensor:
        return size * move


@dataclass(frozen=True)
class Scaled(_Plain):
    """rate * g, the rate being gain / ||g||^2 at the first step: a constant that suits the model."""

    gain: float = 2.0

    def __call__(self, memory: Memory, gradient: Tensor, move: Tensor, size: float, step: int, fresh: bool) -> Tensor:
        if "rate" not in memory:
            memory["rate"] = _over(self.gain, total(gradient * move))
        return memory["rate"] * move


@dataclass(frozen=True)
class Progress(_Plain):
    """min(size, gain / ||g||^2) * g: to first order the score rises by `gain` a step (Yosinski et al. 2015)."""

    gain: float = 2.0

    def __call__(self, memory: Memory, gradient: Tensor, move: Tensor, size: float, step: int, fresh: bool) -> Tensor:
        return size * move * (self.gain / total(gradient * move).clamp_min(_tiny(move)) / size).clamp_max(1)


@dataclass(frozen=True)
class Momentum(_Plain):
    """v <- beta v + size * g, forgotten whenever the step size changes (as Mahendran & Vedaldi 2015 do, against overshooting)."""

    beta: float = 0.9

    def __call__(self, memory: Memory, gradient: Tensor, move: Tensor, size: float, step: int, fresh: bool) -> Tensor:
        velocity = size * move
        if "velocity" in memory and not fresh:
            velocity.add_(memory["velocity"], alpha=self.beta)
        memory["velocity"] = velocity
        return velocity


@dataclass(frozen=True)
class Adam(_Plain):
    """size * m / (sqrt(v) + eps) with the means of g and g^2 freed of their bias (Kingma & Ba 2015, alg. 1)."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __call__(self, memory: Memory, gradient: Tensor, move: Tensor, size: float, step: int, fresh: bool) -> Tensor:
        zero = torch.zeros_like(move)
        memory["mean"] = torch.lerp(move, memory.get("mean", zero), self.beta1)
        memory["square"] = torch.lerp(move.square(), memory.get("square", zero), self.beta2)
        mean, square = memory["mean"] / (1 - self.beta1 ** (step + 1)), memory["square"] / (1 - self.beta2 ** (step + 1))
        return size * mean / (square.sqrt() + self.eps)


@dataclass(frozen=True)
class LineSearch:
    """As Constant, but a step that lowers a picture's score is taken back and its step size halved; kept ones grow it by a tenth."""

    careful: ClassVar[bool] = True

    def __call__(self, memory: Memory, gradient: Tensor, move: Tensor, size: float, step: int, fresh: bool) -> Tensor:
        if "size" not in memory:
            memory["size"] = torch.full_like(rows(move.flatten(1)[:, 0], move), size)
        return memory["size"] * move

    def judged(self, memory: Memory, rose: Tensor, moved: Tensor, bent: Tensor, step: int) -> None:
        size = memory["size"]
        # On a plateau every step is kept: its size must not grow beyond all numbers.
        memory["size"] = torch.where(rows(rose, size), (size * 1.1).clamp_max(1e6), size * 0.5)


@dataclass(frozen=True)
class LBFGS:
    """Quasi-Newton steps from the last `history` changes of variables and gradient (Nocedal 1980; two-loop recursion), each
    picture with a memory of its own. A step that lowers the score is taken back and halved; the first, and those after
    six halvings in a row, go along the gradient with an RMS change of `size`."""

    history: int = 10
    careful: ClassVar[bool] = True

    def __call__(self, memory: Memory, gradient: Tensor, move: Tensor, size: float, step: int, fresh: bool) -> Tensor:
        if "size" not in memory:
            one = torch.ones_like(rows(move.flatten(1)[:, 0], move))
            memory["size"], memory["curvature"] = one, torch.zeros_like(one)
        # Newest first. An empty place, or one of a step taken back, has rho 0 and changes nothing.
        places = [k % self.history for k in range(step - 1, step - 1 - self.history, -1)]
        held = [k for k in places if f"s{k}" in memory]
        q, weights = move, []
        for k in held:
            weight = memory[f"rho{k}"] * total(memory[f"s{k}"] * q)
            q = q - weight * memory[f"y{k}"]
            weights.append(weight)
        q = q * memory["curvature"]
        for k, weight in zip(reversed(held), reversed(weights), strict=True):
            q = q + memory[f"s{k}"] * (weight - memory[f"rho{k}"] * total(memory[f"y{k}"] * q))
        known = memory["curvature"] > 0
        plain = move * _over(size, average(move.square()).sqrt())
        return memory["size"] * torch.where(known, q, plain)

    def judged(self, memory: Memory, rose: Tensor, moved: Tensor, bent: Tensor, step: int) -> None:
        """Stores the pair of the step before `step`: s, and y = -(change of the gradient), since the score is to rise."""
        k = (step - 1) % self.history
        s, y = moved, -bent
        product, square = total(s * y), total(y * y)
        kept = rows(rose, product)
        good = kept & (product > 1e-10 * (square * total(s * s)).sqrt())
        zero = torch.zeros_like(product)
        memory[f"s{k}"], memory[f"y{k}"] = torch.where(good, s, torch.zeros_like(s)), torch.where(good, y, torch.zeros_like(y))
        memory[f"rho{k}"] = torch.where(good, 1 / product, zero)
        memory["curvature"] = torch.where(good, product / square, memory["curvature"])
        size = torch.where(kept, torch.ones_like(memory["size"]), memory["size"] * 0.5)
        lost = ~kept & (size < 1 / 64) & (memory["curvature"] > 0)
        memory["curvature"] = torch.where(lost, zero, memory["curvature"])
        for name in [n for n in memory if n.startswith("rho")]:
            memory[name] = torch.where(lost, zero, memory[name])
        memory["size"] = torch.where(lost, torch.ones_like(size), size)


NAMED: dict[str, type[Normalised | MeanAbs | Constant | LineSearch | Adam | LBFGS | Momentum]] = {
    "normalised": Normalised,
    "mean_abs": MeanAbs,
    "constant": Constant,
    "momentum": Momentum,
    "adam": Adam,
    "lbfgs": LBFGS,
    "line_search": LineSearch,
}
