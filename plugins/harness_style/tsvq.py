"""Nearest neighbours among many vectors by a tree of centroids (tree-structured vector quantisation; Wei & Levoy 2000, sec. 4)."""

from __future__ import annotations

from typing import Any

import numpy as np


class Tree:
    """Vectors (N, D), parted again and again by the nearest of `branches` centroids (Lloyd's rule) until a leaf holds at most `leaf`.

    A search follows the nearest centroid down to a leaf and looks at all of its vectors; then it does the same from the `leaves - 1`
    nearest centroids that it has passed by. The paper's tree has two branches; with more, the first choices are better.
    """

    def __init__(self, vectors: np.ndarray, leaf: int = 256, leaves: int = 1, branches: int = 16) -> None:
        self.vectors = np.ascontiguousarray(vectors, np.float32)
        self.leaf, self.leaves, self.branches = leaf, leaves, branches
        # A node's children, or where it is a leaf the places in `order` of its rows, lie between `first` and `last`.
        centres, first, last = [np.zeros(self.vectors.shape[1], np.float32)], [0], [0]
        order: list[np.ndarray] = []
        held, waiting = 0, [(0, np.arange(len(self.vectors)))]
        is_leaf = [False]
        while waiting:
            node, rows = waiting.pop()
            groups = _parted(self.vectors[rows], branches) if len(rows) > leaf else None
            if groups is None:
                is_leaf[node], first[node], last[node] = True, held, held + len(rows)
                order.append(rows)
                held += len(rows)
                continue
            parts = [rows[groups == g] for g in np.unique(groups)]
            first[node], last[node] = len(first), len(first) + len(parts)
            waiting += [(len(first) + k, part) for k, part in enumerate(parts)]
            for part in parts:
                centres.append(self.vectors[part].mean(0))
                first.append(0)
                last.append(0)
                is_leaf.append(False)
        self.rows = np.concatenate(order)
        self._nodes = np.stack(centres), np.array(first), np.array(last), np.array(is_leaf)
        self._packed = self.vectors[self.rows]  # a leaf's vectors side by side
        self._passed = np.empty(len(first), np.float32), np.empty(len(first), np.int64)

    @property
    def parts(self) -> tuple[Any, ...]:
        """What the compiled search takes before the vector."""
        return (*self._nodes, self._packed, self.rows, self.leaves, *self._passed)

    def nearest(self, vector: np.ndarray) -> int:
        """The row found for a vector (D,)."""
        from .tsvq_compiled import search

        return int(search(*self.parts, vector))


class Exhaustive:
    """The same by comparing with every vector: |a - v|^2 = |a|^2 - 2 a v and what all share, one product of a matrix and a vector."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.twice, self.norms = 2 * np.ascontiguousarray(vectors, np.float32), np.square(vectors).sum(1)

    def nearest(self, vector: np.ndarray) -> int:
        return int((self.norms - self.twice.dot(vector)).argmin())


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
        belongs = (np.arange(groups.max() + 1)[:, None] == groups).astype(np.float32)
        centres = belongs @ vectors / belongs.sum(1, keepdims=True)
        nearest = (np.square(centres).sum(1) - 2 * vectors @ centres.T).argmin(1)
        nearest = np.unique(nearest, return_inverse=True)[1]
        if np.array_equal(nearest, groups):
            break
        groups = nearest
    return groups if groups.max() else None
