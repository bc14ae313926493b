"""Nearest neighbours among many vectors by a tree of centroids (tree-structured vector quantisation; Wei & Levoy 2000, sec. 4)."""

from __future__ import annotations

import numpy as np

Held = tuple[np.ndarray, np.ndarray]  # twice the vectors, and their squared norms: |a - v|^2 = |a|^2 - 2 a v and what all share


class Tree:
    """Vectors (N, D), parted again and again by the nearest of `branches` centroids (Lloyd's rule) until a leaf holds at most `leaf`.

    A search follows the nearest centroid down to a leaf and looks at all of its vectors; then it does the same from the `leaves - 1`
    nearest centroids that it has passed by. The paper's tree has two branches; with more, fewer comparisons follow one another.
    """

    def __init__(self, vectors: np.ndarray, leaf: int = 256, leaves: int = 1, branches: int = 16) -> None:
        self.vectors = np.ascontiguousarray(vectors, np.float32)
        self.leaf, self.leaves, self.branches = leaf, leaves, branches
        # A fork k has centroids forks[k] and children[k]; a leaf is -1 - its place in `held`, with its rows.
        self.forks: list[Held] = []
        self.children: list[list[int]] = []
        self.held: list[Held] = []
        self.rows: list[np.ndarray] = []
        self.root = self._grown(np.arange(len(self.vectors)))

    def _grown(self, rows: np.ndarray) -> int:
        groups = _parted(self.vectors[rows], self.branches) if len(rows) > self.leaf else None
        if groups is None:
            self.held.append(_doubled(self.vectors[rows]))
            self.rows.append(rows)
            return -len(self.held)
        place = len(self.forks)
        parts = [rows[groups == g] for g in np.unique(groups)]
        self.forks.append(_doubled(np.stack([self.vectors[p].mean(0) for p in parts])))
        self.children.append([])
        self.children[place] = [self._grown(p) for p in parts]
        return place

    def nearest(self, vector: np.ndarray) -> int:
        """The row found for a vector (D,)."""
        best, found = np.inf, 0
        passed: list[tuple[float, int]] = []
        node = self.root
        for turn in range(self.leaves):
            while node >= 0:
                twice, norms = self.forks[node]
                distance = norms - twice.dot(vector)
                k = distance.argmin()
                if self.leaves > 1:
                    passed += [(d, c) for i, (d, c) in enumerate(zip(distance.tolist(), self.children[node], strict=True)) if i != k]
                node = self.children[node][k]
            twice, norms = self.held[-1 - node]
            distance = norms - twice.dot(vector)
            k = distance.argmin()
            if distance[k] < best:
                best, found = distance[k], self.rows[-1 - node][k]
            if turn + 1 == self.leaves or not passed:
                break
            node = passed.pop(min(range(len(passed)), key=passed.__getitem__))[1]
        return int(found)


class Exhaustive:
    """The same by comparing with every vector."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.twice, self.norms = _doubled(np.ascontiguousarray(vectors, np.float32))

    def nearest(self, vector: np.ndarray) -> int:
        return int((self.norms - self.twice.dot(vector)).argmin())


def _doubled(vectors: np.ndarray) -> Held:
    return 2 * vectors, np.square(vectors).sum(1)


def _parted(vectors: np.ndarray, branches: int, rounds: int = 8) -> np.ndarray | None:
    """(N,) the group of each vector, by Lloyd's rule from splits along the widest directions; None where all are alike."""
    groups = np.zeros(len(vectors), np.int64)
    count = 1
    while count < branches:
        new = groups * 2
        for g in range(count):
            held = np.flatnonzero(groups == g)
            centred = vectors[held] - vectors[held].mean(0) if len(held) else vectors[held]
            spread = np.square(centred).sum(0)
            if spread.sum() > 1e-12:
                # A power step from the widest coordinate points where they lie apart.
                way = centred.T @ (centred @ (centred.T @ centred[:, spread.argmax()]))
                new[held[centred @ way > 0]] += 1
        groups, count = new, 2 * count
    groups = np.unique(groups, return_inverse=True)[1]
    for _ in range(rounds):
        total = np.zeros((groups.max() + 1, vectors.shape[1]), np.float64)
        np.add.at(total, groups, vectors)
        centres = (total / np.bincount(groups)[:, None]).astype(np.float32)
        nearest = (np.square(centres).sum(1) - 2 * vectors @ centres.T).argmin(1)
        nearest = np.unique(nearest, return_inverse=True)[1]
        if np.array_equal(nearest, groups):
            break
        groups = nearest
    return groups if groups.max() else None
