"""How far to go along the gradient.

A rule gives the change of the variables (N, ...) for one step. What it must remember it keeps in `memory`, tensors with a
row a picture, so that pictures do not influence one another and work can go on from where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.optim.adam import adam

from .conditioners import Matrix, Mixes

Memory = dict[str, Tensor]
Change = tuple[Tensor, Tensor]  # what is there now, and what was before
Condition = Callable[[Tensor], Tensor]


class Rule(Protocol):
    """`condition` does to a gradient what the conditioners do; `size` is the step size of this step, `fresh` whether it is another than
    before."""

    careful: ClassVar[bool]  # a step after which a picture scores less is taken back; `judged` then hears of it

    def __call__(self, memory: Memory, gradient: Tensor, condition: Condition, size: float, step: int, fresh: bool) -> Tensor: ...

    def judged(self, memory: Memory, rose: Tensor, moved: Change, bent: Change, step: int) -> None:
        """Hear which pictures' last step is kept (N,), and what variables and gradient are after it and were before."""


def rows(values: Tensor, like: Tensor) -> Tensor:
    """(N,) -> (N, 1, ...): one value a picture, to be spread over its variables."""
    return values.view(-1, *[1] * (like.dim() - 1))


def total(x: Tensor) -> Tensor:
    """(N, 1, ...) sums over each picture's variables."""
    return x.sum(tuple(range(1, x.dim())), keepdim=True)


def average(x: Tensor) -> Tensor:
    """(N, 1, ...) means over each picture's variables."""
    return x.mean(tuple(range(1, x.dim())), keepdim=True)


def root_mean_square(x: Tensor) -> Tensor:
    """(N, 1, ...) over each picture's variables."""
    return rows(torch.linalg.vector_norm(_flat(x), dim=1) / (x[0].numel() ** 0.5), x)


def _tiny(x: Tensor) -> float:
    return float(torch.finfo(x.dtype).tiny)


def _over(size: float | Tensor, length: Tensor) -> Tensor:
    """size / length, and no step at all where there is no gradient."""
    return torch.where(length > 0, size / length.clamp_min(_tiny(length)), torch.zeros_like(length))


class _Plain:
    """A rule that never takes a step back."""

    careful: ClassVar[bool] = False

    def judged(self, memory: Memory, rose: Tensor, moved: Change, bent: Change, step: int) -> None:
        return


@dataclass(frozen=True)
class Normalised(_Plain):
    """size * g / rms(g): size is the RMS change of a variable."""

    def __call__(self, memory: Memory, gradient: Tensor, condition: Condition, size: float, step: int, fresh: bool) -> Tensor:
        move = condition(gradient)
        return move * _over(size, root_mean_square(move))


@dataclass(frozen=True)
class MeanAbs(_Plain):
    """size * g / mean(|g|): size is the mean change of a variable (DeepDream's step)."""

    def __call__(self, memory: Memory, gradient: Tensor, condition: Condition, size: float, step: int, fresh: bool) -> Tensor:
        move = condition(gradient)
        return move * _over(size, average(move.abs()))


@dataclass(frozen=True)
class Constant(_Plain):
    """size * g."""

    def __call__(self, memory: Memory, gradient: Tensor, condition: Condition, size: float, step: int, fresh: bool) -> Tensor:
        return size * condition(gradient)


@dataclass(frozen=True)
class Scaled(_Plain):
    """rate * g, the rate being gain / ||g||^2 at the first step with a gradient: a constant that suits the model."""

    gain: float = 2.0

    def __call__(self, memory: Memory, gradient: Tensor, condition: Condition, size: float, step: int, fresh: bool) -> Tensor:
        move = condition(gradient)
        found = _over(self.gain, total(gradient * move))
        memory["rate"] = torch.where(memory["rate"] > 0, memory["rate"], found) if "rate" in memory else found
        return memory["rate"] * move


@dataclass(frozen=True)
class Progress(_Plain):
    """min(size, gain / ||g||^2) * g: to first order the score rises by `gain` a step (Yosinski et al. 2015)."""

    gain: float = 2.0

    def __call__(self, memory: Memory, gradient: Tensor, condition: Condition, size: float, step: int, fresh: bool) -> Tensor:
        move = condition(gradient)
        return size * move * (self.gain / total(gradient * move).clamp_min(_tiny(move)) / size).clamp_max(1)


@dataclass(frozen=True)
class Momentum(_Plain):
    """v <- beta v + size * g, forgotten whenever the step size changes (as Mahendran & Vedaldi 2015 do, against overshooting)."""

    beta: float = 0.9

    def __call__(self, memory: Memory, gradient: Tensor, condition: Condition, size: float, step: int, fresh: bool) -> Tensor:
        move = condition(gradient)
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

    def __call__(self, memory: Memory, gradient: Tensor, condition: Condition, size: float, step: int, fresh: bool) -> Tensor:
        move = condition(gradient)
        if "mean" not in memory:
            memory["mean"], memory["square"] = torch.zeros_like(move), torch.zeros_like(move)
        for name in (
            "mean",
            "square",
        ):  # what was stored and read again may lie otherwise in memory, which torch's own walks through as it lies
            if memory[name].stride() != move.stride():
                memory[name] = torch.empty_like(move).copy_(memory[name])
        change = torch.zeros_like(move)
        # torch's own, in one pass over memory where it would take eight; from zero, as the loop is to be told the change alone.
        adam(
            [change],
            [move],
            [memory["mean"]],
            [memory["square"]],
            [],
            [torch.full((), float(step), device=move.device)],
            fused=True,
            amsgrad=False,
            beta1=self.beta1,
            beta2=self.beta2,
            lr=size,
            weight_decay=0.0,
            eps=self.eps,
            maximize=True,
        )
        return change


@dataclass(frozen=True)
class LineSearch:
    """As Constant, but a step that lowers a picture's score is taken back and its step size halved; kept ones grow it by a tenth."""

    careful: ClassVar[bool] = True

    def __call__(self, memory: Memory, gradient: Tensor, condition: Condition, size: float, step: int, fresh: bool) -> Tensor:
        move = condition(gradient)
        if "size" not in memory:
            memory["size"] = torch.full_like(rows(move.flatten(1)[:, 0], move), size)
        return memory["size"] * move

    def judged(self, memory: Memory, rose: Tensor, moved: Change, bent: Change, step: int) -> None:
        size = memory["size"]
        # On a plateau every step is kept: its size must not grow beyond all numbers.
        memory["size"] = torch.where(rows(rose, size), (size * 1.1).clamp_max(1e6), size * 0.5)


@dataclass(frozen=True)
class LBFGS:
    """Quasi-Newton steps from the last `history` changes s of the variables and y of the gradient (Nocedal 1980; two-loop recursion, the
    conditioners being what is known of the inverse Hessian beforehand), each picture with a memory of its own. A step that lowers the
    score is taken back and halved; the first, and those after six halvings in a row, go along the gradient with an RMS change of `size`.

    Either loop runs over inner products, so that the changes are read as matrices and not one by one (after Chen, Wang & Zhou 2014,
    "Large-scale L-BFGS using MapReduce"). `judged` is to get the change from the gradient of the last call to that of the next. Large
    pictures on a CPU take three compiled passes over memory in place of a dozen operations.
    """

    history: int = 10
    careful: ClassVar[bool] = True

    def __call__(self, memory: Memory, gradient: Tensor, condition: Condition, size: float, step: int, fresh: bool) -> Tensor:
        g, m = _flat(gradient), self.history
        if "size" not in memory:
            one = torch.ones_like(g[:, 0])
            memory["size"], memory["curvature"], memory["good"] = one, torch.zeros_like(one), g.new_zeros((len(g), m), dtype=torch.bool)
            # Rings of s and of -y, how many were put into them, and the products s_i . y_j where s_i is no newer, as others are not needed.
            memory["moves"], memory["bends"] = g.new_zeros((len(g), m, g.shape[1])), g.new_zeros((len(g), m, g.shape[1]))
            memory["kept"], memory["products"] = torch.zeros_like(one, dtype=torch.int64), g.new_zeros((len(g), m, m))
            # s_i . g, and in which column of the products those of the last y are missing but for its own.
            memory["along"], memory["last"] = g.new_zeros((len(g), m)), g.new_zeros((len(g), 1, m), dtype=torch.bool)
        ahead = memory.pop("ahead", None)
        along = torch.bmm(memory["moves"], g[:, :, None]).squeeze(2) if ahead is None else ahead
        loops = (_Numbers if _large(g) else _Tensors)(memory, along)
        first, across, unit = _conditioned(memory["bends"], gradient, loops.forth().to(g.dtype), condition)
        # In the units of the inverse Hessian, whatever those of the conditioners are; along the gradient while nothing is known.
        scale = memory["curvature"][:, None] * unit
        known = scale > 0
        if g.device.type != "cpu" or not bool(known.all()):  # on a CPU looking costs less than another pass over memory
            scale = torch.where(known, scale, _over(size, root_mean_square(first)))
        # What follows is linear, so that the share of the step that is gone can stand here.
        scale = scale * memory["size"][:, None]
        return _shaped(_onward(first, scale, memory["moves"], loops.back(across, scale).to(g.dtype)), gradient)

    def judged(self, memory: Memory, rose: Tensor, moved: Change, bent: Change, step: int) -> None:
        """Stores s, and the change of the gradient, which is -y, since the score is to rise. What is no good pair lies in the place of the
        oldest, counts nothing and is written over by the next."""
        place = memory["kept"] % self.history
        product, square = _stored(memory, place, rose, moved, bent)
        if _large(memory["moves"][:, 0]):
            _Numbers.judged(memory, rose, place, product, square)
            return
        here = torch.arange(self.history, device=product.device) == place[:, None]  # (N, m)
        memory["last"] = here[:, None]
        memory["products"] = torch.where(here[:, :, None] & here[:, None], product[:, :, None], memory["products"])
        good = rose & ((product > 0) & (square > 0)).squeeze(1)
        memory["good"] = torch.where(here, good[:, None], memory["good"])
        memory["kept"] = memory["kept"] + good
        memory["curvature"] = torch.where(good, (product / square).squeeze(1), memory["curvature"])
        size = torch.where(rose, torch.ones_like(memory["size"]), memory["size"] * 0.5)
        lost = ~rose & (size < 1 / 64) & (memory["curvature"] > 0)
        memory["curvature"] = memory["curvature"] * ~lost
        memory["good"] = memory["good"] & ~lost[:, None]
        memory["size"] = torch.where(lost, torch.ones_like(size), size)


class _Tensors:
    """The two loops of L-BFGS over inner products, of all pictures at once: the coefficients of either solve a triangular system, from the
    newest change to the oldest, and back."""

    def __init__(self, memory: Memory, along: Tensor) -> None:
        """Products (N, m) of all changes of the variables with the gradient, which `memory` then has."""
        device, m = along.device, along.shape[1]
        self.kind = torch.float32 if device.type == "mps" else torch.float64
        self.size = memory["size"][:, None, None]
        # (N, m) places in the rings, the newest first.
        self.newest = (memory["kept"][:, None] - 1 - torch.arange(m, device=device)) % m
        # The change of g is a difference, and so are its products with what was there before, which need not be read for them again.
        others = memory["last"] & ~memory["last"].mT
        memory["products"] = torch.where(others, (memory["along"] - along)[:, :, None], memory["products"])
        memory["along"] = along
        # Places that were never filled, or badly, have coefficients of zero.
        self.good = memory["good"].gather(1, self.newest)[:, :, None]
        across = self.newest[:, None].expand(-1, m, -1)
        products = memory["products"].gather(1, across.mT).gather(2, across).to(self.kind)
        self.system = torch.where(self.good & self.good.mT, products.tril(), torch.eye(m, dtype=self.kind, device=device))
        along = along.gather(1, self.newest)[:, :, None].to(self.kind) * self.good
        self.of_y = torch.linalg.solve_triangular(self.system, along, upper=False)

    def forth(self) -> Tensor:
        """(N, 1, m) how much of each change of the gradient is added to it, where in the ring that lies."""
        return self._placed(self.of_y)

    def back(self, across: Tensor, scale: Tensor) -> Tensor:
        """(N, 1, m) how much of each change of the variables is added, for products (N, m, 1) of the changes of the gradient with what
        conditioners made of it, and for their scale (N, 1)."""
        bent = (across * scale[:, :, None]).gather(1, self.newest[:, :, None]).to(self.kind) * self.good
        of_y = self.of_y * self.size * self.system.diagonal(dim1=1, dim2=2)[:, :, None]
        return self._placed(torch.linalg.solve_triangular(self.system.mT, of_y + bent, upper=True))

    def _placed(self, coefficients: Tensor) -> Tensor:
        return torch.empty_like(coefficients).scatter_(1, self.newest[:, :, None], coefficients).mT


class _Numbers:
    """The same of each picture on its own, where that takes less time than a dozen tensors of nine numbers take to be made."""

    def __init__(self, memory: Memory, along: Tensor) -> None:
        pictures = zip(*(memory[name].numpy() for name in ("kept", "good", "last", "products", "along")), along.numpy(), strict=True)
        self.sizes = memory["size"].tolist()
        self.pictures = []
        for kept, good, (last,), products, before, now in pictures:
            for place in last.nonzero()[0]:
                own = products[place, place]
                with np.errstate(all="ignore"):  # as tensors have it
                    products[:, place] = before - now
                products[place, place] = own
            before[:] = now
            m = len(now)
            order = [k for k in ((int(kept) - 1 - age) % m for age in range(m)) if good[k]]
            self.pictures.append((m, order, products.tolist(), now.tolist()))
        self.of_y = []
        for m, order, products, now in self.pictures:
            found = [0.0] * m
            for k in order:
                found[k] = (now[k] - sum(products[k][j] * found[j] for j in order if found[j])) / products[k][k]
            self.of_y.append(found)

    @staticmethod
    def judged(memory: Memory, rose: Tensor, place: Tensor, product: Tensor, square: Tensor) -> None:
        """What LBFGS.judged makes of the products (N, 1) s . y and y . y."""
        names = ("kept", "good", "last", "products", "curvature", "size")
        numbers = (x.flatten().tolist() for x in (rose, place, product, square))
        for i, (up, here, along, bend) in enumerate(zip(*numbers, strict=True)):
            kept, good, last, products, curvature, size = (memory[name].numpy()[i : i + 1] for name in names)
            last[:] = False
            last[0, 0, here] = True
            products[0, here, here] = along
            good[0, here] = useful = up and along > 0 and bend > 0
            kept[0] += useful
            if useful:
                with np.errstate(over="ignore"):  # as tensors have it
                    curvature[0] = along / bend
            size[0] = 1 if up else size[0] / 2
            if not up and size[0] < 1 / 64 and curvature[0] > 0:
                curvature[0], good[0], size[0] = 0, False, 1

    def forth(self) -> Tensor:
        return torch.tensor(self.of_y, dtype=torch.float64, device="cpu")[:, None]

    def back(self, across: Tensor, scale: Tensor) -> Tensor:
        of_s = []
        for (m, order, products, _), of_y, size, bent, (by,) in zip(
            self.pictures, self.of_y, self.sizes, across.squeeze(2).tolist(), scale.tolist(), strict=True
        ):
            found = [0.0] * m
            for k in reversed(order):
                rest = of_y[k] * size * products[k][k] + bent[k] * by - sum(products[j][k] * found[j] for j in order if found[j])
                found[k] = rest / products[k][k]
            of_s.append(found)
        return torch.tensor(of_s, dtype=torch.float64, device="cpu")[:, None]


LARGE = 2**17  # values of a picture, of which what is used at once does not fit the innermost caches


def _large(flat: Tensor) -> bool:
    """Whether compiled passes serve pictures (N, D)."""
    return flat.device.type == "cpu" and flat.dtype == torch.float32 and flat.shape[1] >= LARGE


def _stored(memory: Memory, place: Tensor, rose: Tensor, moved: Change, bent: Change) -> tuple[Tensor, Tensor]:
    """Changes of variables and gradient, none where a step is taken back, put in their places (N,) of the rings; (N, 1) the products
    s . y and y . y of them."""
    moves, bends = memory["moves"], memory["bends"]
    if _large(moves[:, 0]):
        found = [_changes(*one) for one in zip(rose.tolist(), *map(_rows, (*moved, *bent)), moves, bends, place.tolist(), strict=True)]
        sums = torch.stack(found)
        memory["ahead"] = sums[:, :-2]  # which the next call begins with
        return -sums[:, -2:-1], sums[:, -1:]
    s, b = (_put(ring, place, rose, change) for ring, change in ((moves, moved), (bends, bent)))
    return -_product(s, b), _product(b, b)


def _changes(rose: bool, z: Tensor, before: Tensor, gradient: Tensor, earlier: Tensor, moves: Tensor, bends: Tensor, place: int) -> Tensor:
    """What `changes` gives for one picture; after a step that is taken back the gradient is the earlier one."""
    if rose:
        from .lbfgs_compiled import changes

        return changes(z, before, gradient, earlier, moves, bends, place)
    moves[place], bends[place] = 0, 0
    return torch.cat([torch.mv(moves, earlier), moves.new_zeros(2)])


def _conditioned(bends: Tensor, gradient: Tensor, shares: Tensor, condition: Condition) -> tuple[Tensor, Tensor, Tensor]:
    """What conditioners make (N, D) of q = gradient + shares (N, 1, m) bends (N, m, D), which may be written over; the products of the
    bends with it (N, m, 1); and q . q over its product with q (N, 1), which brings it to the units of q."""
    g = _flat(gradient)
    matrix = _colour_matrix(condition, gradient) if _large(g) else None
    if matrix is not None:
        from .lbfgs_compiled import mixed

        made = torch.empty_like(g, memory_format=torch.contiguous_format)
        sums = torch.stack([mixed(*one, matrix) for one in zip(_rows(gradient), bends, shares.squeeze(1), made, strict=True)])
        overlap, square = sums[:, -2:-1], sums[:, -1:]
        return made, sums[:, :-2, None], torch.ones_like(square) if matrix.size == 1 else _over(square, overlap)
    q = torch.baddbmm(g[:, None], shares, bends).squeeze(1)
    made = _flat(condition(_shaped(q, gradient)))
    across = torch.bmm(bends, made[:, :, None])
    if made.data_ptr() == q.data_ptr():
        return made, across, torch.ones_like(made[:, :1])
    unit = _over(_product(q, q), _product(q, made))
    return made.detach().clone() if _large(made) else made, across, unit  # what a conditioner gives may still be its own


def _colour_matrix(condition: Condition, gradient: Tensor) -> Matrix | None:
    """What the conditioners do to each pixel, where they do no more than that and its colours lie side by side, in one block."""
    from .lbfgs_compiled import BLOCK

    channels = gradient.shape[1]
    matrix = condition.colour_matrix(channels) if isinstance(condition, Mixes) else None
    if matrix is None or matrix.size == 1:
        return matrix
    return matrix if gradient.dim() == 4 and BLOCK % channels == 0 else None


def _onward(first: Tensor, scale: Tensor, moves: Tensor, shares: Tensor) -> Tensor:
    """(N, D) scale (N, 1) first + shares (N, 1, m) moves (N, m, D), of large pictures written over `first`."""
    if not _large(first):
        return (first * scale)[:, None].baddbmm_(shares, moves).squeeze(1)
    from .lbfgs_compiled import onward

    for one in zip(first, scale.flatten().tolist(), moves, shares.squeeze(1), strict=True):
        onward(*one)
    return first


def _put(ring: Tensor, place: Tensor, rose: Tensor, change: Change) -> Tensor:
    """(N, D) changes, none where a step is taken back, now in their places (N,) of a ring (N, m, D)."""
    new, old = map(_flat, change)
    if ring.device.type != "cpu":
        found = torch.where(rose[:, None], new - old, torch.zeros_like(new))
        ring[torch.arange(len(ring), device=ring.device), place] = found
        return found
    # Where looking costs less than an indexed copy, and a change is written where it is to stay.
    written = [ring[i, k] for i, k in enumerate(place.tolist())]
    for row, now, before, kept in zip(written, new, old, rose.tolist(), strict=True):
        if kept:
            torch.sub(now, before, out=row)
        else:
            row.zero_()
    return written[0][None] if len(written) == 1 else torch.stack(written)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """(N, 1) inner products of rows (N, D), in one pass over memory."""
    return torch.bmm(a[:, None], b[:, :, None]).squeeze(2)


def _flat(x: Tensor) -> Tensor:
    """(N, D), pictures in the order in which the loop lays them out, so that nothing is copied."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1) if x.dim() == 4 else x.reshape(len(x), -1)


def _rows(x: Tensor) -> Tensor:
    """`_flat` as compiled passes take it."""
    return _flat(x).detach().contiguous()


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
