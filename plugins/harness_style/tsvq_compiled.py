"""The search of a tree of centroids, and the loop over pixels around it, compiled: steps of nanoseconds that follow one another, for
which calls of numpy are too long. Importing this imports numba."""

from __future__ import annotations

from typing import Any

import numpy as np

from harness.compiled import compiled

_jit = compiled(fastmath=True)


@_jit
def search(
    centres: Any, first: Any, last: Any, is_leaf: Any, packed: Any, rows: Any, leaves: int, far: Any, node_of: Any, vector: Any
) -> int:
    best, found = np.float32(np.inf), 0
    count, node = 0, 0
    for turn in range(leaves):
        while not is_leaf[node]:
            near, chosen = np.float32(np.inf), first[node]
            for child in range(first[node], last[node]):
                distance = np.float32(0)
                for d in range(vector.shape[0]):
                    distance += (centres[child, d] - vector[d]) ** 2
                if child > first[node]:  # the farther of two is passed by
                    far[count], node_of[count] = (near, chosen) if distance < near else (distance, child)
                    count += 1
                if distance < near:
                    near, chosen = distance, child
            node = chosen
        for place in range(first[node], last[node]):
            distance = np.float32(0)
            for d in range(vector.shape[0]):
                distance += (packed[place, d] - vector[d]) ** 2
            if distance < best:
                best, found = distance, rows[place]
        if turn + 1 == leaves or count == 0:
            break
        k = 0
        for i in range(1, count):
            if far[i] < far[k]:
                k = i
        node = node_of[k]
        count -= 1
        far[k], node_of[k] = far[count], node_of[count]
    return found


@_jit
def apart(one: Any, other: Any) -> Any:
    distance = np.float32(0)
    for d in range(one.shape[0]):
        distance += (one[d] - other[d]) ** 2
    return distance


@_jit
def fill(
    places: Any, image: Any, own: Any, coarse: Any, picked: Any, matches: Any, asked: Any, beside: Any, onward: Any, vectors: Any,
    centres: Any, first: Any, last: Any, is_leaf: Any, packed: Any, rows: Any, leaves: int, far: Any, node_of: Any,
) -> None:  # fmt: skip
    """Pixels `places` of image (M, C), each by the match of its neighbours own (M, K) and of coarse (M, L); `asked` keeps the vectors.

    beside (B,) says which of the K neighbours touch the pixel, onward (N, B) which row of the sample stands to a row as the pixel to that
    neighbour, or -1. What continues a neighbour's match is compared with what the tree finds.
    """
    colours, length = image.shape[1], own.shape[1] * image.shape[1]
    for place in places:
        vector = asked[place]
        for k in range(own.shape[1]):
            for c in range(colours):
                vector[k * colours + c] = image[own[place, k], c]
        for k in range(coarse.shape[1]):
            vector[length + k] = coarse[place, k]
        found = search(centres, first, last, is_leaf, packed, rows, leaves, far, node_of, vector)
        best = apart(vectors[found], vector)
        for b in range(beside.shape[0]):
            match = matches[own[place, beside[b]]]
            if match < 0 or onward[match, b] < 0:
                continue
            distance = apart(vectors[onward[match, b]], vector)
            if distance < best:
                best, found = distance, onward[match, b]
        matches[place] = found
        for c in range(colours):
            image[place, c] = picked[found, c]
