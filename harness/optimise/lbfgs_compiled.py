"""An L-BFGS step in three compiled passes over memory, block by block, where torch's operations are a dozen passes over pictures that do
not stay in the cache. For one picture on a CPU, in single precision. Importing this imports numba.

A matrix that mixes each pixel's C colours, which lie side by side, is here its 2C - 1 diagonals, repeated along a block: a product with
it is a sum of shifted values, for which there are instructions, where there are none for steps of three. A block ends with a pixel, so
that nothing comes over its borders.
"""

from __future__ import annotations

from threading import Lock
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from ..compiled import call, compiled
from .conditioners import Matrix

BLOCK = 1536  # values, of as many arrays as are used at once in the innermost cache; of 1, 2, 3 and 4 colours whole pixels
PARTS = 64  # in which sums are taken, however many threads there are, so that they do not depend on them

# Sums in any order, as there is none to prefer; what is not a number stays one.
_jit = compiled(fastmath={"reassoc", "contract", "nsz"}, parallel=True)
# Of the libraries that numba may run threads by one, workqueue, must not be entered twice: other compiled loops of a process that has
# neither OpenMP nor TBB may not run at the same time in another thread.
_turn = Lock()


@_jit
def _changes(z: Any, z0: Any, g: Any, g0: Any, moves: Any, bends: Any, place: int, sums: Any) -> None:
    m, parts, n = moves.shape[0], sums.shape[0], z.shape[0]
    share = -(-n // (parts * BLOCK)) * BLOCK
    for part in numba.prange(parts):
        for low in range(part * share, min(n, part * share + share), BLOCK):
            high = min(n, low + BLOCK)
            here, before, slope, earlier = z[low:high], z0[low:high], g[low:high], g0[low:high]
            move, bend = moves[place, low:high], bends[place, low:high]
            product = square = np.float32(0)
            for i in range(high - low):
                s, b = here[i] - before[i], slope[i] - earlier[i]
                move[i], bend[i] = s, b
                product += s * b
                square += b * b
            sums[part, m] += product
            sums[part, m + 1] += square
            for j in range(m):
                row, along = moves[j, low:high], np.float32(0)
                for i in range(high - low):
                    along += row[i] * slope[i]
                sums[part, j] += along


@_jit
def _mixed(g: Any, bends: Any, shares: Any, diagonals: Any, first: Any, sums: Any) -> None:
    m, parts, n = bends.shape[0], sums.shape[0], g.shape[0]
    width = diagonals.shape[0]
    share = -(-n // (parts * BLOCK)) * BLOCK
    for part in numba.prange(parts):
        padded = np.zeros(BLOCK + width - 1, np.float32)
        q = padded[width // 2 :]
        for low in range(part * share, min(n, part * share + share), BLOCK):
            high = min(n, low + BLOCK)
            slope, to = g[low:high], first[low:high]
            for i in range(high - low):
                q[i] = slope[i]
            for j in range(m):
                row, factor = bends[j, low:high], shares[j]
                for i in range(high - low):
                    q[i] += factor * row[i]
            for i in range(high - low):
                to[i] = diagonals[0, i] * padded[i]
            for d in range(1, width):
                for i in range(high - low):
                    to[i] += diagonals[d, i] * padded[i + d]
            overlap = square = np.float32(0)
            for i in range(high - low):
                overlap += q[i] * to[i]
                square += q[i] * q[i]
            sums[part, m] += overlap
            sums[part, m + 1] += square
            for j in range(m):
                row, along = bends[j, low:high], np.float32(0)
                for i in range(high - low):
                    along += row[i] * to[i]
                sums[part, j] += along


@_jit
def _onward(first: Any, factor: Any, moves: Any, shares: Any, parts: int) -> None:
    m, n = moves.shape[0], first.shape[0]
    share = -(-n // (parts * BLOCK)) * BLOCK
    for part in numba.prange(parts):
        for low in range(part * share, min(n, part * share + share), BLOCK):
            high = min(n, low + BLOCK)
            to = first[low:high]
            for i in range(high - low):
                to[i] *= factor
            for j in range(m):
                row, along = moves[j, low:high], shares[j]
                for i in range(high - low):
                    to[i] += along * row[i]


def changes(z: Tensor, before: Tensor, gradient: Tensor, earlier: Tensor, moves: Tensor, bends: Tensor, place: int) -> Tensor:
    """Writes the changes (D,) of variables and gradient to their place in the rings (m, D). Returns (m + 2,): the products of all moves
    with the gradient, of the two changes, and of the gradient's change with itself."""
    sums = np.zeros((PARTS, len(moves) + 2), np.float32)
    _run(_changes, *(x.numpy() for x in (z, before, gradient, earlier, moves, bends)), place, sums)
    return _added(sums)


def mixed(gradient: Tensor, bends: Tensor, shares: Tensor, to: Tensor, mixing: Matrix) -> Tensor:
    """Writes M q to `to` (D,) for q = gradient + shares (m,) bends (m, D), where M multiplies each pixel's colours by `mixing`. Returns
    (m + 2,): the products with that of all bends and of q, and of q with itself."""
    sums = np.zeros((PARTS, len(bends) + 2), np.float32)
    _run(_mixed, gradient.numpy(), bends.numpy(), shares.numpy(), _diagonals(mixing), to.numpy(), sums)
    return _added(sums)


def onward(first: Tensor, factor: float, moves: Tensor, shares: Tensor) -> None:
    """first (D,) becomes factor first + shares (m,) moves (m, D)."""
    _run(_onward, first.numpy(), np.float32(factor), moves.numpy(), shares.numpy(), PARTS)


def _run(kernel: Any, *arguments: object) -> None:
    """By as many threads as torch has, as far as numba has them. Torch keeps its number, which numba's start would change where both run
    their threads by OpenMP."""
    config: Any = numba.config
    threads = torch.get_num_threads()
    with _turn:
        before = numba.get_num_threads()
        numba.set_num_threads(min(threads, config.NUMBA_NUM_THREADS))
        try:
            call(kernel, *arguments)
        finally:
            numba.set_num_threads(before)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)


def _added(sums: Matrix) -> Tensor:
    return torch.from_numpy(sums.sum(0, dtype=np.float64).astype(np.float32))


def _diagonals(mixing: Matrix) -> Matrix:
    """(2C - 1, BLOCK) of (C, C): in row d at place i what the value d - C + 1 places behind i counts there."""
    colours = len(mixing)
    found = np.zeros((2 * colours - 1, BLOCK), np.float32)
    for to, row in enumerate(mixing):
        for source, value in enumerate(row):
            found[colours - 1 + source - to, to::colours] = value
    return found
