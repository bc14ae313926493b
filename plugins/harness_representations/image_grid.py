from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import model_validator

from harness import Arrays, Images, Metric, Paper, Param, Result, Technique, Use

from .maps import features_of, thumbnails

if TYPE_CHECKING:
    from harness import Context

CELLS = 2500  # the optimal assignment takes cubic time
WIDEST = 2400  # pixels of the whole picture


class ImageGrid(Technique):
    """The t-SNE map filled with the pictures themselves (Karpathy 2014, "t-SNE visualization of CNN codes"): every cell of a
    grid shows the picture nearest to its place, or no picture is shown twice.

    unique: the assignment of pictures to cells with the least sum of squared distances (Jonker & Volgenant 1987, by scipy);
    nearest: each cell's nearest picture, which may show one several times. Cost: the map, and the assignment.
    """

    name = "image_grid"
    family = "representations"
    paper = Paper("van der Maaten, Hinton", 2008, "Visualizing Data using t-SNE, JMLR 9", doi="10.5555/1390681.1442799")
    needs = frozenset({"dataset"})
    reading = (
        "Neighbouring pictures are alike to the model. Walk over it: what changes from one side to the other is what the layer "
        "tells apart. The second picture is the part where neighbours are most alike."
    )
    caveats = "Cells force a map into a square: what stands at the edge of a cluster may neighbour a stranger."
    audit = {"full": {}}

    layer: str = Param("penultimate", description="the features' layer: a layer's name or 'penultimate'")
    perplexity: float = Param(30.0, gt=0, description="perplexity of the t-SNE map")
    mode: Literal["unique", "nearest"] = Param(
        "unique", description="no picture twice, with the best assignment, or for each cell the nearest picture"
    )
    side: int = Param(0, ge=0, le=100, description="cells a side; 0: as many as the pictures fill, at most 50")
    cell: int = Param(0, ge=0, le=256, description="pixels a cell; 0: as many as a picture of 2,400 pixels allows, at most 96")
    detail: int = Param(8, ge=2, le=50, description="cells a side of the part that is shown enlarged")

    @model_validator(mode="after")
    def _consistent(self) -> ImageGrid:
        if self.mode == "unique" and self.side**2 > CELLS:
            raise ValueError(f"{self.side} x {self.side} cells are more than the {CELLS} of the unique mode; use mode nearest")
        return self

    def uses(self) -> tuple[Use, ...]:
        return (
            Use("features", {"layer": self.layer}),
            Use("tsne_map", {"layer": self.layer, "perplexity": [self.perplexity], "seeds": 1, "pictures": 0}),
        )

    def run(self, ctx: Context) -> Result:
        features = features_of(ctx)
        maps = ctx.results["tsne_map"]["maps"]
        assert isinstance(maps, Arrays)
        points = maps.data["points"]
        count = len(points)
        side = self.side or max(2, min(math.isqrt(CELLS), math.isqrt(count)))
        places = unit_square(points)
        centres = cells(side)
        chosen = unique(places, centres) if self.mode == "unique" else nearest_to(places, centres)  # (side^2,), -1 for an empty cell
        edge = min(self.cell or min(96, WIDEST // side), ctx.model.input.size)
        picture = paint(ctx, chosen, side, edge)
        shown = min(self.detail, side)
        top, left = closest_block(features, chosen.reshape(side, side), shown)
        part = chosen.reshape(side, side)[top : top + shown, left : left + shown].reshape(-1)
        large = min(ctx.model.input.size, max(edge, 96))
        exact = ctx.model.input.size < 64
        artifacts: list[Any] = [
            Images(
                "grid", picture[None], zoom=True, exact=exact,
                caption=f"{len(set(chosen.tolist()) - {-1})} of {count} pictures, {side} x {side} cells.",
            ),
            Images(
                "detail", paint(ctx, part, shown, large)[None], zoom=True, exact=exact,
                caption=f"Rows {top + 1} to {top + shown}, columns {left + 1} to {left + shown}: where neighbours are most alike.",
            ),
            Arrays("cells", {"pictures": chosen.reshape(side, side), "points": places, "centres": centres}),
        ]  # fmt: skip
        metrics = [
            Metric(
                "neighbour_distance", adjacent_distance(features, chosen.reshape(side, side)), better="lower",
                about="mean feature distance of adjacent cells' pictures, as a share of that of any two pictures shown",
            )
        ]  # fmt: skip
        labels = ctx.dataset.labels
        if labels is not None and len(np.unique(labels)) > 1:
            same, base = adjacent_share(labels, chosen.reshape(side, side))
            metrics.append(
                Metric(
                    "neighbour_same_class",
                    same,
                    better="higher",
                    about="share of adjacent cells whose pictures have one class",
                    detail=f"{base:.3f} for any two",
                )
            )
        return Result(artifacts, metrics)


def unit_square(points: np.ndarray) -> np.ndarray:
    """Points moved and scaled, each axis alone, into [0, 1]^2."""
    span = np.ptp(points, axis=0)
    return (points - points.min(0)) / np.where(span > 0, span, 1)


def cells(side: int) -> np.ndarray:
    """(side^2, 2) centres (x, y) of the cells, row by row, in [0, 1]^2."""
    axis = (np.arange(side) + 0.5) / side
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return np.stack([x.ravel(), y.ravel()], 1)


def nearest_to(places: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The index of the point nearest to each centre; the lowest among equals."""
    return np.array([int(((places - c) ** 2).sum(1).argmin()) for c in centres])


def unique(places: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """A point for each centre, none twice, with the least sum of squared distances; -1 where points run out."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    cost = cdist(centres, places, "sqeuclidean")
    rows, columns = linear_sum_assignment(cost)
    chosen = np.full(len(centres), -1)
    chosen[rows] = columns
    return chosen


def paint(ctx: Context, chosen: np.ndarray, side: int, edge: int) -> np.ndarray:
    """(C, side * edge, side * edge): the chosen pictures in their cells, white where there is none."""
    channels = ctx.model.input.channels
    tiles = np.ones((len(chosen), channels, edge, edge), np.float32)
    used = np.flatnonzero(chosen >= 0)
    for start in range(0, len(used), 64):
        part = used[start : start + 64]
        tiles[part] = thumbnails(ctx, chosen[part].tolist(), edge)
    return tiles.reshape(side, side, channels, edge, edge).transpose(2, 0, 3, 1, 4).reshape(channels, side * edge, side * edge)


def _pairs(grid: np.ndarray) -> np.ndarray:
    """(P, 2) pictures of adjacent cells, empty cells and a picture beside itself left out."""
    across = np.stack([grid[:, :-1].ravel(), grid[:, 1:].ravel()], 1)
    down = np.stack([grid[:-1].ravel(), grid[1:].ravel()], 1)
    pairs = np.concatenate([across, down])
    return pairs[(pairs >= 0).all(1) & (pairs[:, 0] != pairs[:, 1])]


def adjacent_distance(features: np.ndarray, grid: np.ndarray) -> float:
    """Mean feature distance of adjacent pictures over the mean distance of any two of those shown."""
    pairs = _pairs(grid)
    if not len(pairs):
        return 1.0
    near = np.linalg.norm(features[pairs[:, 0]].astype(np.float64) - features[pairs[:, 1]], axis=1).mean()
    shown = np.unique(grid[grid >= 0])
    some = shown[:: max(1, len(shown) // 1000)]
    from scipy.spatial.distance import pdist

    base = pdist(features[some].astype(np.float64)).mean()
    return float(near / base) if base > 0 else 1.0


def adjacent_share(labels: np.ndarray, grid: np.ndarray) -> tuple[float, float]:
    """(share of adjacent pictures of one class, the same for any two pictures shown)."""
    pairs = _pairs(grid)
    count = np.bincount(labels[np.unique(grid[grid >= 0])]).astype(np.float64)
    total = count.sum()
    base = float((count * (count - 1)).sum() / max(1.0, total * (total - 1)))
    return (float((labels[pairs[:, 0]] == labels[pairs[:, 1]]).mean()) if len(pairs) else 1.0), base


def closest_block(features: np.ndarray, grid: np.ndarray, size: int) -> tuple[int, int]:
    """(row, column) of the size x size block whose neighbours are most alike."""
    side = len(grid)
    best, place = np.inf, (0, 0)
    wide = features.astype(np.float64)
    safe = np.maximum(grid, 0)
    across = np.linalg.norm(wide[safe[:, :-1]] - wide[safe[:, 1:]], axis=2)
    down = np.linalg.norm(wide[safe[:-1]] - wide[safe[1:]], axis=2)
    # A cell that is empty, or shows its neighbour's picture, says nothing of likeness.
    worst = 2 * max(across.max(initial=0.0), down.max(initial=0.0)) + 1
    across[(grid[:, :-1] < 0) | (grid[:, 1:] < 0) | (grid[:, :-1] == grid[:, 1:])] = worst
    down[(grid[:-1] < 0) | (grid[1:] < 0) | (grid[:-1] == grid[1:])] = worst
    for y in range(side - size + 1):
        for x in range(side - size + 1):
            value = across[y : y + size, x : x + size - 1].sum() + down[y : y + size - 1, x : x + size].sum()
            if value < best:
                best, place = value, (y, x)
    return place
