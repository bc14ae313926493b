"""Regions of a picture that hang together for a network (after Melas-Kyriazi et al. 2022, arXiv:2205.07839): places are alike if a
network's features and the colours there are, and normalised cuts (Shi & Malik 2000, doi:10.1109/34.868688) part what is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from harness.models import LoadedModel

GRID = 56  # places along a side, at most
DEPTHS = 4  # layers whose features are compared
VECTORS = 6  # of the cut, in which places are grouped
COLOUR, SPREAD = 0.5, 0.5  # weight of likeness in colour; its squared width, in deviations of the picture's colours
NEAR, WIDTH = 0.3, 0.25  # of places far apart this share counts; how far near reaches, as a share of the side
DENSE = 400  # places up to which all eigenvectors are as quick as a few
FLOOR = 0.05  # below this two places are not alike at all


def layers_of(model: LoadedModel) -> list[str]:
    """Blocks of convolutions from a third of the way on; none where a network has no layers with maps."""
    from harness_synthesis.blocks import blocks

    every = blocks(model)
    later = every[len(every) // 3 :]
    count = min(DEPTHS, len(later))
    return list(dict.fromkeys(later[round(i * (len(later) - 1) / max(1, count - 1))] for i in range(count)))


def takes_twice(model: LoadedModel) -> bool:
    """Whether the model looks at pictures of twice its size with these layers, which gives finer maps."""
    from harness_synthesis.blocks import refuses

    return not refuses(model, 2 * model.input.size, layers_of(model)[-1])


def regions(model: LoadedModel, image: Tensor, count: int = 8, twice: bool = False) -> np.ndarray:
    """int (side, side), side at most 56: the number of each place's region in one picture (1, C, H, W), at most `count` of them.

    With `twice` the picture is looked at in twice its size. Cost: one forward pass, and a few eigenvectors of a matrix of side^4 numbers
    on the CPU.
    """
    import warnings

    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    side = min(GRID, *image.shape[2:])
    if side < 2:
        return np.zeros((side, side), int)
    likeness = alike(model, image, side, twice)
    root = np.sqrt(likeness.sum(1))
    vectors = min(VECTORS, side * side - 1)
    found = leading(likeness / (root[:, None] * root[None]), vectors + 1)[:, 1:] / root[:, None]
    found = found / np.linalg.norm(found, axis=0)
    found = found * np.sign(found[np.abs(found).argmax(0), np.arange(vectors)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer kinds of places than regions, in a picture of one colour
        groups: np.ndarray = KMeans(min(count, side * side), n_init=4, random_state=0).fit_predict(found)
    return groups.reshape(side, side)


def leading(matrix: np.ndarray, count: int) -> np.ndarray:
    """(n, count) eigenvectors of a symmetric matrix (n, n), those of the largest values first."""
    from scipy.linalg import eigh
    from scipy.sparse.linalg import eigsh

    n = len(matrix)
    if n <= DENSE:  # where a picture's symmetries would end the search early, to go on from a random place
        vectors: np.ndarray = eigh(matrix, subset_by_index=(n - count, n - 1))[1]
        return vectors[:, ::-1]
    values, vectors = eigsh(matrix, k=count, which="LA", v0=np.ones(n))
    return vectors[:, np.argsort(-values)]


def alike(model: LoadedModel, image: Tensor, side: int, twice: bool = False) -> np.ndarray:
    """float64 (side^2, side^2): how much two places of a picture have to do with one another."""
    import torch
    import torch.nn.functional as F
    from scipy.spatial.distance import cdist

    layers = layers_of(model)
    with torch.no_grad():
        seen = F.interpolate(image, scale_factor=2.0, mode="bicubic", align_corners=False).clamp(0, 1) if twice else image
        features = [
            F.interpolate(found.float(), size=(side, side), mode="bilinear", align_corners=False)[0].flatten(1).T.cpu().numpy()
            for found in model.activations(seen, layers).values()
        ]
        small = F.interpolate(image.float(), size=(side, side), mode="area")[0].cpu().numpy()
    likeness = np.zeros((side * side, side * side))
    for maps in features:
        own = maps - maps.mean(0)
        own = own / np.linalg.norm(own, axis=1, keepdims=True).clip(1e-12)
        likeness += (own @ own.T).clip(0) / len(layers)
    colours = lightness_and_hue(small).reshape(3, -1).T
    colours = (colours - colours.mean(0)) / (colours.std() + 1e-6)
    likeness += COLOUR * np.exp(-cdist(colours, colours, "sqeuclidean") / SPREAD)
    places = np.indices((side, side)).reshape(2, -1).T / side
    likeness *= NEAR + np.exp(-cdist(places, places, "sqeuclidean") / (2 * WIDTH**2))
    likeness[likeness < FLOOR] = 0
    np.fill_diagonal(likeness, 1)  # no place is without any other, if only itself
    return likeness


def lightness_and_hue(image: np.ndarray) -> np.ndarray:
    """float32 (3, H, W) CIELAB of a picture (C, H, W) in [0, 1]."""
    from skimage.color import rgb2lab

    rgb = np.repeat(image, 3, 0) if len(image) == 1 else image
    lab: np.ndarray = rgb2lab(rgb.transpose(1, 2, 0)).transpose(2, 0, 1)
    return np.ascontiguousarray(lab, np.float32)


def marked(groups: np.ndarray, strength: np.ndarray, share: float, edge: float = 0.4) -> np.ndarray:
    """float (H, W) in [0, 1]: about how much of each pixel lies in regions that a map (H, W) marks: whose mean strength is more than
    `share` of that of the strongest. What takes up much of the picture's border is likely background: up to `edge` of it is taken off.
    """
    import cv2

    side = len(groups)
    small = cv2.resize(strength, (side, side), interpolation=cv2.INTER_AREA)
    rim = np.zeros((side, side), bool)
    width = max(1, round(side / 28))
    rim[:width], rim[-width:], rim[:, :width], rim[:, -width:] = True, True, True, True
    numbers = np.unique(groups)
    means = np.array([small[groups == k].mean() for k in numbers])
    quarters = np.array([(rim & (groups == k)).sum() for k in numbers]) / (rim.sum() / 4)
    means = means * (1 - edge * quarters.clip(max=1))
    inside = np.isin(groups, numbers[means > share * means.max()]).astype(np.float32)
    found: np.ndarray = cv2.resize(inside, strength.shape[::-1], interpolation=cv2.INTER_LINEAR)
    return found
