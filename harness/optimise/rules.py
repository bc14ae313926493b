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
    six halvings in a row, go along the gradient with an RMS change of `size`.

    The recursion runs over the inner products of what is remembered, and only its outcome over the variables (Chen, Wang & Zhou
    2014, "Large-scale L-BFGS using MapReduce"): what is remembered is read twice a step where the recursion itself reads it ten times.
    """

    history: int = 10
    careful: ClassVar[bool] = True

    def __call__(self, memory: Memory, gradient: Tensor, move: Tensor, size: float, step: int, fresh: bool) -> Tensor:
        g, m = _flat(move), self.history
        if "size" not in memory:
            one = torch.ones_like(g[:, 0])
            memory["size"], memory["curvature"], memory["rho"] = one, torch.zeros_like(one), g.new_zeros((len(g), m))
            # The changes s of the variables, then y of the gradient, in a ring; and the inner products of all of these.
            memory["pairs"], memory["products"] = g.new_zeros((len(g), 2 * m, g.shape[1])), g.new_zeros((len(g), 2 * m, 2 * m))
        along = torch.bmm(memory["pairs"], g[:, :, None]).squeeze(2)
        of_s, of_y = self._combination(memory, along, step)
        q = torch.baddbmm(rows(memory["curvature"], g[:, None]) * g[:, None], torch.cat([of_s, of_y], 1)[:, None], memory["pairs"])
        plain = g * _over(size, average(g.square()).sqrt())
        known = memory["curvature"][:, None] > 0
        return _shaped(memory["size"][:, None] * torch.where(known, q.squeeze(1), plain), move)

    def _combination(self, memory: Memory, along: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(N, history) each: how much of every s and of every y is in the step, beside the gradient times the curvature."""
        m, kind = self.history, torch.float32 if along.device.type == "mps" else torch.float64
        along, products, rho = along.to(kind), memory["products"].to(kind), memory["rho"].to(kind)
        curvature = memory["curvature"].to(kind)
        newest_first = [k % m for k in range(step - 1, max(-1, step - 1 - m), -1)]  # places never filled have rho 0
        of_s, of_y, weights = torch.zeros_like(rho), torch.zeros_like(rho), torch.zeros_like(rho)
        for k in newest_first:
            weights[:, k] = rho[:, k] * (along[:, k] + (products[:, k, m:] * of_y).sum(1))
            of_y[:, k] = -weights[:, k]
        of_y = of_y * curvature[:, None]
        on_y = curvature[:, None] * along[:, m:] + (products[:, m:, m:] * of_y[:, None]).sum(2)
        for k in reversed(newest_first):
            of_s[:, k] = weights[:, k] - rho[:, k] * (on_y[:, k] + (products[:, m + k, :m] * of_s).sum(1))
        return of_s.to(memory["rho"].dtype), of_y.to(memory["rho"].dtype)

    def judged(self, memory: Memory, rose: Tensor, moved: Tensor, bent: Tensor, step: int) -> None:
        """Stores the pair of the step before `step`: s, and y = -(change of the gradient), since the score is to rise."""
        m, pairs, products = self.history, memory["pairs"], memory["products"]
        k = (step - 1) % m
        pairs[:, k], pairs[:, m + k] = _flat(moved), -_flat(bent)
        both = torch.bmm(pairs, pairs[:, [k, m + k]].transpose(1, 2))  # (N, 2 m, 2)
        products[:, :, [k, m + k]], products[:, [k, m + k]] = both, both.transpose(1, 2)
        product, long, square = both[:, m + k, 0], both[:, k, 0], both[:, m + k, 1]
        good = rose & (product > 1e-10 * (square * long).sqrt())
        zero = torch.zeros_like(product)
        memory["rho"][:, k] = torch.where(good, 1 / product, zero)  # a pair that is not good changes nothing
        memory["curvature"] = torch.where(good, product / square, memory["curvature"])
        size = torch.where(rose, torch.ones_like(memory["size"]), memory["size"] * 0.5)
        lost = ~rose & (size < 1 / 64) & (memory["curvature"] > 0)
        memory["curvature"] = torch.where(lost, zero, memory["curvature"])
        memory["rho"] = torch.where(lost[:, None], torch.zeros_like(memory["rho"]), memory["rho"])
        memory["size"] = torch.where(lost, torch.ones_like(size), size)


def _flat(x: Tensor) -> Tensor:
    """(N, D), pictures in the order in which the loop lays them out, so that nothing is copied."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1) if x.dim() == 4 else x.reshape(len(x), -1)


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    """Back from `_flat` to the shape of `like`."""
    if like.dim() != 4:
        return flat.view(like.shape)
    n, c, h, w = like.shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


NAMED: dict[str, type[Normalised | MeanAbs | Constant | LineSearch | Adam | LBFGS | Momentum]] = {
    "normalised": Normalised,
    "mean_abs": MeanAbs,
    "constant": Constant,
    "momentum": Momentum,
    "adam": Adam,
    "lbfgs": LBFGS,
    "line_search": LineSearch,
}
