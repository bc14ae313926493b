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
FLOOR = 0.05  # below this two places are not alike at all


def layers_of(model: LoadedModel) -> list[str]:
    """Blocks of convolutions from a third of the way on; none where a network has no layers with maps."""
    from harness_synthesis.blocks import blocks

    every = blocks(model)
    later = every[len(every) // 3 :]
    count = min(DEPTHS, len(later))
    return list(dict.fromkeys(later[round(i * (len(later) - 1) / max(1, count - 1))] for i in range(count)))


def regions(model: LoadedModel, image: Tensor, count: int = 8) -> np.ndarray:
    """int (side, side), side at most 56: the number of each place's region in one picture (1, C, H, W), at most `count` of them.

    The picture is looked at in twice its size where the model takes that, for finer maps. Cost: one forward pass of twice the sides, and
    a few eigenvectors of a matrix of side^4 numbers on the CPU.
    """
    from scipy.sparse.linalg import eigsh
    from sklearn.cluster import KMeans

    side = min(GRID, *image.shape[2:])
    likeness = alike(model, image, side)
    degree = likeness.sum(1)
    root = np.sqrt(degree)
    vectors = min(VECTORS, side * side - 2)
    values, found = eigsh(likeness / (root[:, None] * root[None]), k=vectors + 1, v0=np.ones(len(degree)))
    found = found[:, np.argsort(-values)[1:]] / root[:, None]
    found = found / np.linalg.norm(found, axis=0)
    found = found * np.sign(found[np.abs(found).argmax(0), np.arange(vectors)])
    groups: np.ndarray = KMeans(count, n_init=4, random_state=0).fit_predict(found)
    return groups.reshape(side, side)


def alike(model: LoadedModel, image: Tensor, side: int) -> np.ndarray:
    """float64 (side^2, side^2): how much two places of a picture have to do with one another."""
    import torch
    import torch.nn.functional as F

    from harness.device import at_least_single
    from harness_synthesis.blocks import refuses

    layers = layers_of(model)
    twice = 2 * min(image.shape[2:])
    with torch.no_grad():
        seen = image
        if not refuses(model, twice, layers[-1]):
            seen = F.interpolate(image, scale_factor=2.0, mode="bicubic", align_corners=False).clamp(0, 1)
        likeness = torch.zeros((side * side, side * side), dtype=torch.float64)
        for found in model.activations(seen, layers).values():
            maps = F.interpolate(at_least_single(found).cpu(), size=(side, side), mode="bilinear", align_corners=False)[0].flatten(1).T
            maps = F.normalize(maps - maps.mean(0), dim=1)
            likeness += (maps @ maps.T).clamp(min=0) / len(layers)
        small = F.interpolate(image.cpu().float(), size=(side, side), mode="area")
    colours = torch.from_numpy(lightness_and_hue(small[0].numpy())).flatten(1).T
    colours = (colours - colours.mean(0)) / (colours.std() + 1e-6)
    line = torch.arange(side) / side
    places = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).view(-1, 2)
    likeness += COLOUR * torch.exp(-torch.cdist(colours, colours).square() / SPREAD)
    likeness *= NEAR + torch.exp(-torch.cdist(places, places).square() / (2 * WIDTH**2))
    likeness[likeness < FLOOR] = 0
    likeness.fill_diagonal_(1)  # no place is without any other, if only itself
    return likeness.numpy()


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
