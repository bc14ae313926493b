"""Exact nearest neighbours in L2: candidates in float32, their distances in float64."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 256_000_000
CHUNK = 512  # dimensions summed in single precision at once
SPARE = 8  # candidates beyond k, so that float32 rounding at the k-th place is usually settled at once
Engine = Literal["auto", "blocks", "faiss"]
# (rows of queries, how many) -> (their candidates (q, m), the squared distance of the last one (q,)), to float32 rounding
Candidates = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def nearest(
    queries: np.ndarray,
    database: np.ndarray,
    k: int,
    skip: np.ndarray | None = None,
    device: torch.device | str = "cpu",
    engine: Engine = "auto",
) -> tuple[np.ndarray, np.ndarray]:
    """(indices, distances), each (Q, k): the k rows of `database` nearest to each query in L2, ties by index.

    `skip` (Q,) is a row each query must not find: itself. Candidates come from |q|^2 + |x|^2 - 2 q x in float32, by
    FAISS (`faiss-cpu`, `faiss-gpu`) when it is installed, else by blocked matrix products on `device`. They are ordered
    by distances computed in float64 from the differences; where rounding could have hidden a neighbour among the
    candidates, all rows within the bound of the rounding error are looked at. Every engine gives the same answer.
    """
    count, extra = len(database), 0 if skip is None else 1
    if k + extra > count:
        raise ValueError(f"{k} neighbours of {count} rows")
    # Rounding grows with the norms.
    centre = database.mean(0, dtype=np.float64).astype(database.dtype)
    x, q = ((part - centre).astype(np.float32, copy=False) for part in (database, queries))
    use_faiss = find_spec("faiss") is not None if engine == "auto" else engine == "faiss"
    candidates = _by_faiss(q, x) if use_faiss else _by_blocks(q, x, device)
    # Rounding of |q|^2 + |x|^2 - 2 q x summed over d terms: at most about d u (|q| + |x|)^2 (Higham 2002, Accuracy and
    # Stability of Numerical Algorithms, sec. 3.1), u = 2^-24; 16 covers the few operations besides the sums.
    terms = x.shape[1] if use_faiss else min(x.shape[1], CHUNK)
    norms = np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64))
    q_norms = np.sqrt(np.einsum("qd,qd->q", q, q, dtype=np.float64))
    slack = (terms + 16) * 2.0**-24 * (q_norms + norms.max()) ** 2
    indices = np.empty((len(q), k), dtype=np.int64)
    distances = np.empty((len(q), k))
    pending, want = np.arange(len(q)), min(count, k + extra + SPARE)
    while pending.size:
        open_: list[np.ndarray] = []
        block = max(1, BLOCK_BYTES // (8 * max(count, want * 2)))
        for rows in np.split(pending, range(block, len(pending), block)):
            found, edge = candidates(rows, want)
            found = np.sort(found, axis=1)  # ties go to the lower index
            squared = _squared(queries[rows], database, found)
            if skip is not None:
                squared[found == skip[rows, None]] = np.inf
            order = np.argsort(squared, axis=1, kind="stable")[:, :k]
            indices[rows] = np.take_along_axis(found, order, 1)
            distances[rows] = np.take_along_axis(squared, order, 1)
            # What is not among the candidates is at least `edge` away, to rounding.
            open_.append(rows[edge - slack[rows] <= distances[rows][:, -1]])
        pending = np.concatenate(open_) if want < count else np.empty(0, np.int64)
        want = min(count, 8 * want)
    return indices, np.sqrt(distances)


def _squared(q: np.ndarray, x: np.ndarray, found: np.ndarray) -> np.ndarray:
    """(Q, m) squared distances in float64 of each query to its candidates."""
    out = np.empty(found.shape)
    for i, row in enumerate(found):
        near = x if len(row) == len(x) else x[row]
        step = max(1, BLOCK_BYTES // (8 * max(1, x.shape[1])))
        for start in range(0, len(near), step):
            difference = near[start : start + step].astype(np.float64) - q[i]
            out[i, start : start + step] = np.einsum("md,md->m", difference, difference)
    return out


def _by_blocks(q: np.ndarray, x: np.ndarray, device: torch.device | str) -> Candidates:
    import torch

    base = torch.from_numpy(x).to(device)
    # Sums over many dimensions are added up from shorter ones, in double precision where the device has it.
    wide = torch.float32 if base.device.type == "mps" else torch.float64
    spans = [slice(i, i + CHUNK) for i in range(0, x.shape[1], CHUNK)]
    squared = torch.stack([base[:, s].square().sum(1).to(wide) for s in spans]).sum(0)

    def candidates(rows: np.ndarray, want: int) -> tuple[np.ndarray, np.ndarray]:
        part = torch.from_numpy(q[rows]).to(device)
        own = torch.stack([part[:, s].square().sum(1).to(wide) for s in spans]).sum(0)
        if len(spans) == 1:
            scores = torch.addmm(squared.float(), part, base.T, alpha=-2)
        else:
            scores = squared.repeat(len(part), 1)
            for s in spans:
                scores.sub_(part[:, s] @ base[:, s].T, alpha=2)
        best = scores.topk(want, dim=1, largest=False)
        return best.indices.cpu().numpy(), (best.values[:, -1].to(wide) + own).cpu().numpy()

    return candidates


def _by_faiss(q: np.ndarray, x: np.ndarray) -> Candidates:
    import faiss

    index = faiss.IndexFlatL2(x.shape[1])
    index.add(x)

    def candidates(rows: np.ndarray, want: int) -> tuple[np.ndarray, np.ndarray]:
        squared, found = index.search(q[rows], want)
        return found, squared[:, -1].astype(np.float64)

    return candidates


def vote(neighbour_labels: np.ndarray, classes: int) -> np.ndarray:
    """(Q, k) labels, nearest first -> (Q,) the most frequent; among equals the one whose member is nearest."""
    answers = np.empty(len(neighbour_labels), dtype=np.int64)
    for i, row in enumerate(neighbour_labels):
        counts = np.bincount(row, minlength=classes)
        leaders = np.flatnonzero(counts == counts.max())
        answers[i] = next(label for label in row if label in leaders)
    return answers
