"""Exact nearest neighbours by blocked matrix products."""

from __future__ import annotations

import numpy as np

BLOCK_BYTES = 64_000_000


def nearest(queries: np.ndarray, database: np.ndarray, k: int, skip: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(indices, distances), each (Q, k): the k rows of `database` nearest to each query in L2, ties by index.

    `skip` (Q,) is a row each query must not find: itself. Distances are computed in float64: candidates from
    |q|^2 + |x|^2 - 2 q x, then every candidate that rounding could have misplaced from the differences themselves.
    """
    database = np.ascontiguousarray(database)
    squared = np.einsum("nd,nd->n", database, database, dtype=np.float64)
    wide = database.astype(np.float64) if database.nbytes <= 1_000_000_000 else None
    indices = np.empty((len(queries), k), dtype=np.int64)
    distances = np.empty((len(queries), k))
    block = max(1, BLOCK_BYTES // (8 * len(database)))
    for start in range(0, len(queries), block):
        q = queries[start : start + block].astype(np.float64)
        approx = squared[None, :] - 2 * (q @ (wide if wide is not None else database.astype(np.float64)).T)
        q2 = np.einsum("qd,qd->q", q, q)
        if skip is not None:
            approx[np.arange(len(q)), skip[start : start + block]] = np.inf
        kth = np.partition(approx, k - 1, axis=1)[:, k - 1]
        # Rounding of the expanded form: a few ulps of its largest term.
        slack = 1e-12 * (q2 + squared.max())
        for row in range(len(q)):
            candidates = np.flatnonzero(approx[row] <= kth[row] + slack[row])
            exact = ((database[candidates].astype(np.float64) - q[row]) ** 2).sum(1)
            order = np.lexsort((candidates, exact))[:k]
            indices[start + row] = candidates[order]
            distances[start + row] = np.sqrt(exact[order])
    return indices, distances


def vote(neighbour_labels: np.ndarray, classes: int) -> np.ndarray:
    """(Q, k) labels, nearest first -> (Q,) the most frequent; among equals the one whose member is nearest."""
    answers = np.empty(len(neighbour_labels), dtype=np.int64)
    for i, row in enumerate(neighbour_labels):
        counts = np.bincount(row, minlength=classes)
        leaders = np.flatnonzero(counts == counts.max())
        answers[i] = next(label for label in row if label in leaders)
    return answers
