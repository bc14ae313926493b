"""What the maps of a dataset share: reduction to few dimensions, quality of a map, and which pictures to show on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from harness.artifacts import Arrays
from harness.datasets import evenly
from harness.errors import NotApplicable

from .search import nearest

if TYPE_CHECKING:
    from sklearn.decomposition import PCA

    from harness import Context

TRUST_POINTS = 3000  # trustworthiness needs all pairs; more points are judged by this many of them
TRUST_NEIGHBOURS = 12


def features_of(ctx: Context, least: int = 3) -> np.ndarray:
    """(N, D) the features this run builds on; NotApplicable where a map of them says nothing."""
    found = ctx.results["features"]["features"]
    assert isinstance(found, Arrays)
    features = found.data["features"]
    if len(features) < least:
        raise NotApplicable(f"a map needs at least {least} pictures; {ctx.dataset.name!r} has {len(features)}")
    if not (features != features[0]).any():
        raise NotApplicable(f"all {len(features)} pictures have the same features; look at the layer and at the pictures")
    return features


def principal(features: np.ndarray, components: int) -> tuple[np.ndarray, PCA]:
    """(N, k) coordinates along the first k <= `components` axes of largest variance, in float64, and the fitted PCA."""
    from sklearn.decomposition import PCA

    count, width = features.shape
    # The covariance is the smaller matrix where there are more pictures than dimensions.
    solver = "covariance_eigh" if count > width else "full"
    pca = PCA(min(components, count, width), svd_solver=solver)
    return pca.fit_transform(features.astype(np.float64)), pca


def groups_of(ctx: Context) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """(group of each picture, names): the dataset's classes that occur; (None, ()) without labels."""
    labels = ctx.dataset.labels
    if labels is None:
        return None, ()
    present, group = np.unique(labels, return_inverse=True)
    return group, tuple(ctx.dataset.classes[i] for i in present)


def one_nn_accuracy(points: np.ndarray, labels: np.ndarray) -> float | None:
    """Share of points whose nearest other point has their class (van der Maaten & Hinton 2008 report its error), of those
    whose class has another point; None where there is none."""
    able = np.flatnonzero(np.bincount(labels)[labels] > 1)
    if not len(able) or len(np.unique(labels)) < 2:
        return None
    found = nearest(points[able], points, 1, able, engine="blocks")[0][:, 0]
    return float((labels[found] == labels[able]).mean())


def trust(features: np.ndarray, points: np.ndarray) -> float:
    """Trustworthiness of a map in [0, 1]: 1 when near points are near in the features too (Venna & Kaski 2001)."""
    from sklearn.manifold import trustworthiness

    rows = evenly(TRUST_POINTS, len(points))
    k = min(TRUST_NEIGHBOURS, (len(rows) - 1) // 2)
    return float(trustworthiness(features[rows], points[rows], n_neighbors=k)) if k >= 1 else 1.0


def stamps(points: np.ndarray, most: int, side: float = 0.075) -> list[int]:
    """Indices of points at which a picture fits without covering another, in order; `side` as a share of the map."""
    low, span = points.min(0), np.ptp(points, axis=0).max() or 1.0
    places = (points - low) / span
    chosen: list[int] = []
    for i in range(len(points)):
        if len(chosen) == most:
            break
        if not chosen or (np.abs(places[chosen] - places[i]).max(1) >= side).all():
            chosen.append(i)
    return chosen


def thumbnails(ctx: Context, indices: list[int], side: int) -> np.ndarray:
    """(M, C, side, side) in [0, 1]; pictures smaller than `side` keep their size."""
    import torch
    from torch.nn.functional import adaptive_avg_pool2d

    from harness.context import to_images

    spec = ctx.model.input
    pixels = np.concatenate([ctx.dataset.pictures(spec, i, i + 1) for i in indices])
    images = to_images(pixels, torch.device("cpu"))
    return adaptive_avg_pool2d(images, min(side, spec.size)).numpy()
