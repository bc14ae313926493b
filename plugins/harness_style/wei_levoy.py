"""Texture synthesis pixel by pixel (Wei & Levoy 2000, SIGGRAPH)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from .tsvq import Exhaustive, Tree

Search = Literal["tsvq", "exhaustive"]
Progress = Callable[[str, int, int], None]
STRIPE = 16  # rows between two reports of progress


@dataclass(frozen=True)
class Synthesis:
    image: np.ndarray  # (H, W, C)
    levels: list[np.ndarray]  # from the coarsest
    cost: float  # mean squared distance of a neighbourhood to its match, a value, at the finest level
    seconds: float  # of the searches alone
    building: float  # seconds of building what is searched


def causal(size: int) -> list[tuple[int, int]]:
    """(dy, dx) of the pixels that raster order has passed in a window of `size`: (size^2 - 1) / 2 of them, the shape of an L."""
    half = size // 2
    return [(dy, dx) for dy in range(-half, 1) for dx in range(-half, half + 1) if (dy, dx) < (0, 0)]


def square(size: int) -> list[tuple[int, int]]:
    half = size // 2
    return [(dy, dx) for dy in range(-half, half + 1) for dx in range(-half, half + 1)]


def pyramid(image: np.ndarray, levels: int) -> list[np.ndarray]:
    """Gaussian pyramid (H, W, C), the coarsest first; sides are halved, rounded up."""
    from scipy.ndimage import gaussian_filter

    found = [image.astype(np.float32)]
    for _ in range(levels - 1):
        smooth = gaussian_filter(found[-1], (0.85, 0.85, 0), mode="reflect")
        found.append(np.ascontiguousarray(smooth[::2, ::2]))
    return found[::-1]


def synthesise(
    sample: np.ndarray,
    height: int,
    width: int,
    *,
    size: int = 7,
    levels: int = 3,
    search: Search = "tsvq",
    leaves: int = 1,
    random: np.random.Generator,
    progress: Progress | None = None,
) -> Synthesis:
    """A picture (height, width, C) whose every pixel is one of the sample's (h, w, C), taken where its surroundings are most alike.

    Each level of the pyramid is filled in raster order from its causal neighbourhood, of which the picture's border wraps around (a
    toroidal picture tiles), and from the whole neighbourhood, about half as wide, of the finished coarser level. The coarsest level begins
    as noise of the sample's own pixels and is gone over twice, since across its border the first time there is noise; of the others what
    lies near the upper and the left border is.
    """
    samples = pyramid(sample, levels)
    sides = [(-(-height // 2**k), -(-width // 2**k)) for k in range(levels - 1, -1, -1)]
    made: list[np.ndarray] = []
    origins = np.empty(0, np.int64)  # where in the sample of a level each pixel was taken
    cost, seconds, building = 0.0, 0.0, 0.0
    for level, (source, (rows, columns)) in enumerate(zip(samples, sides, strict=True)):
        near, below = causal(size), square(size // 2 | 1) if level else []
        places, vectors = _neighbourhoods(source, samples[level - 1] if level else None, near, below)
        colours = source.reshape(-1, source.shape[2])
        begun = time.perf_counter()
        finder = Tree(vectors, leaves=leaves) if search == "tsvq" else Exhaustive(vectors)
        building += time.perf_counter() - begun
        picked = colours[places]
        own = _wrapped(near, rows, columns)
        coarse = np.empty((rows * columns, 0), np.float32)
        y, x = (g.ravel() for g in np.mgrid[:rows, :columns])
        if not level:
            image = colours[random.integers(0, len(colours), rows * columns)].copy()
        else:
            up = made[-1]
            above = (y // 2) * up.shape[1] + x // 2
            # What raster order has not reached lies across the border: what is finer where the coarser level took its pixels from says
            # more of it than noise would.
            taken = np.stack(np.divmod(origins[above], samples[level - 1].shape[1])) * 2 + [y % 2, x % 2]
            image = source[np.minimum(taken[0], source.shape[0] - 1), np.minimum(taken[1], source.shape[1] - 1)]
            coarse = up.reshape(-1, up.shape[2])[_wrapped(below, *up.shape[:2])[above]].reshape(rows * columns, -1)
        matches = np.full(rows * columns, -1)
        asked = np.empty((rows * columns, vectors.shape[1]), np.float32)
        going_on = _continued(near, places, source.shape[:2])
        filled = _by_tree(finder, *going_on) if isinstance(finder, Tree) else partial(_one_by_one, finder)
        begun = time.perf_counter()
        # Then what was made before all across the border was: near the upper and the left one; of the coarsest level, everything.
        again = (y < size // 2) | (x < size // 2) | (level == 0)
        for once in (np.ones_like(again), again):
            for row in range(0, rows, STRIPE):
                here = slice(row * columns, min(rows, row + STRIPE) * columns)
                filled(row * columns + np.flatnonzero(once[here]), image, own, coarse, picked, matches, asked)
                if progress is not None:
                    progress(f"rows of level {level + 1} of {levels}", min(rows, row + STRIPE), rows)
        seconds += time.perf_counter() - begun
        origins = places[matches]
        if level == levels - 1:
            cost = float(np.square(asked - vectors[matches]).mean(dtype=np.float64))
        made.append(image.reshape(rows, columns, -1))
    return Synthesis(made[-1], made, cost, seconds, building)


COPIES = 4  # of the sample's neighbourhoods at once: they, the tree's, and the two that are parted


def memory(sample: tuple[int, ...], height: int, width: int, size: int, levels: int) -> int:
    """About how many bytes `synthesise` needs at once, for a sample (h, w, C)."""
    near, below = len(causal(size)), len(square(size // 2 | 1)) if levels > 1 else 0
    length = (near + below) * sample[2]
    return 4 * length * COPIES * sample[0] * sample[1] + height * width * (4 * length + 8 * near + 4 * below * sample[2])


def _continued(near: Sequence[tuple[int, int]], places: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(B,) which of the neighbours `near` touch a pixel; (N, B) which row of the sample's vectors, at `places` (N,), stands to each row as
    the pixel to that neighbour, or -1."""
    beside = [k for k, (dy, dx) in enumerate(near) if max(abs(dy), abs(dx)) == 1]
    rows = np.full(shape, -1)
    rows.ravel()[places] = np.arange(len(places))
    y, x = np.divmod(places, shape[1])
    found = np.full((len(places), len(beside)), -1)
    for b, k in enumerate(beside):
        to_y, to_x = y - near[k][0], x - near[k][1]
        inside = (to_y < shape[0]) & (to_x >= 0) & (to_x < shape[1])
        found[inside, b] = rows[to_y[inside], to_x[inside]]
    return np.array(beside), found


def _by_tree(tree: Tree, beside: np.ndarray, onward: np.ndarray) -> Callable[..., None]:
    """The compiled loop; compiling it is none of a search's time."""
    from .tsvq_compiled import fill

    length = tree.vectors.shape[1]
    none = np.zeros(0, np.int64)
    one = np.zeros((1, length), np.float32)
    known = beside, onward, tree.vectors, *tree.parts
    fill(none, one, np.zeros((1, 1), np.int64), one, one, none, one, *known)
    return lambda *level: fill(*level, *known)


def _one_by_one(
    finder: Exhaustive,
    places: np.ndarray,
    image: np.ndarray,
    own: np.ndarray,
    coarse: np.ndarray,
    picked: np.ndarray,
    matches: np.ndarray,
    asked: np.ndarray,
) -> None:
    """What the compiled loop does for a tree: pixels `places` of image (M, C), each by the match of its neighbourhood."""
    length = own.shape[1] * image.shape[1]
    for place in places:
        vector = asked[place]
        vector[:length] = image.take(own[place], 0).ravel()
        vector[length:] = coarse[place]
        matches[place] = finder.nearest(vector)
        image[place] = picked[matches[place]]


def _wrapped(offsets: Sequence[tuple[int, int]], rows: int, columns: int) -> np.ndarray:
    """(rows * columns, offsets) flat indices of each pixel's neighbours, around the borders."""
    y, x = np.mgrid[:rows, :columns]
    shifts = np.asarray(offsets, np.int64).reshape(-1, 2)
    dy, dx = shifts[:, 0], shifts[:, 1]
    return ((y[..., None] + dy) % rows * columns + (x[..., None] + dx) % columns).reshape(rows * columns, -1)


def _neighbourhoods(
    source: np.ndarray, coarser: np.ndarray | None, near: Sequence[tuple[int, int]], below: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """(flat indices, vectors) of the sample's pixels whose neighbourhoods lie whole inside it: a sample does not tile."""
    rows, columns, colours = source.shape
    reach = max(-dx for _, dx in near)
    y, x = np.mgrid[reach:rows, reach : columns - reach]
    if coarser is not None:
        half = max(dx for _, dx in below)
        inside = (y // 2 >= half) & (y // 2 < coarser.shape[0] - half) & (x // 2 >= half) & (x // 2 < coarser.shape[1] - half)
        y, x = y[inside], x[inside]
    y, x = y.ravel(), x.ravel()
    vectors = np.empty((len(y), len(near) + (0 if coarser is None else len(below)), colours), np.float32)
    for k, (dy, dx) in enumerate(near):
        vectors[:, k] = source[y + dy, x + dx]
    if coarser is not None:
        for k, (dy, dx) in enumerate(below, len(near)):
            vectors[:, k] = coarser[y // 2 + dy, x // 2 + dx]
    return y * columns + x, vectors.reshape(len(y), -1)
