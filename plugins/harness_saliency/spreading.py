"""A map carried on to what hangs together with the places that it marks: places of a picture are alike if a network's features and the
colours there are (as in Melas-Kyriazi et al. 2022, arXiv:2205.07839), and values spread between them (Zhou et al. 2004, "Learning with
local and global consistency", NIPS; of class maps Ahn & Kwak 2018, arXiv:1803.10464)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from harness.models import LoadedModel

GRID = 56  # places along a side, at most
DEPTHS = 4  # layers whose features are compared
COLOUR, SPREAD = 0.5, 0.5  # weight of likeness in colour; its squared width, in deviations of the picture's colours
NEAR, WIDTH = 0.3, 0.25  # of places far apart this share counts; how far near reaches, as a share of the side
FLOOR = 0.05  # below this two places are not alike at all
POWER = 3  # of likeness: the less alike two places are, the less passes between them
KEPT = 0.99  # what a place passes on; the rest is its own value
RIM = 1  # places along the border, from which background spreads
DARK = 0.6  # quantile of the map up to which a place of the border is background
LOW, LESS = 0.3, 0.2  # quantile up to which any place is, and what it counts where one of the border counts 1


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


def likely(model: LoadedModel, image: Tensor, strength: np.ndarray, twice: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """float (H, W) in [-1, 1], twice: by how much one picture (1, C, H, W) has more to do with what a map (H, W) marks than with its
    unmarked parts; all are spread between places that are alike, and scaled to 1.

    The first is for parting the two: of the map its square, which leaves out faint marks on what lies around the object, against the
    border and, for less, all that is dark. The second is for judging what was parted: the map itself against the border. With `twice` the
    picture is looked at in twice its size. Cost: one forward pass, and a system of side^2 equations on the CPU, side being at most 56.
    """
    import cv2

    side = min(GRID, *image.shape[2:])
    small = cv2.resize(strength, (side, side), interpolation=cv2.INTER_AREA)
    small = small / max(small.max(), 1e-30)
    rim = np.ones((side, side), bool)
    rim[RIM : side - RIM, RIM : side - RIM] = False
    border = (rim & (small <= np.quantile(small, DARK))).astype(float)
    dark = border + LESS * (small <= np.quantile(small, LOW))
    found = spread(alike(model, image, side, twice), np.stack([small**2, dark, small, border]).reshape(4, -1))
    bright, dark, marked, border = (found / found.max(1, keepdims=True).clip(1e-30)).reshape(4, side, side)

    def enlarged(values: np.ndarray) -> np.ndarray:
        large: np.ndarray = cv2.resize(values, strength.shape[::-1], interpolation=cv2.INTER_CUBIC)
        return large.clip(-1, 1)

    return enlarged(bright - dark), enlarged(marked - border)


def spread(likeness: np.ndarray, values: np.ndarray, kept: float = KEPT) -> np.ndarray:
    """(K, n): the limit of f <- kept S f + (1 - kept) y for each row y of `values` (K, n), S = D^-1/2 W D^-1/2 being the likeness (n, n) of
    places made one of neighbours (Zhou et al. 2004, sec. 2)."""
    from scipy.linalg import solve

    root = np.sqrt(likeness.sum(1))
    system = -kept * likeness / (root[:, None] * root[None])
    system[np.diag_indices_from(system)] += 1
    found: np.ndarray = (1 - kept) * solve(system, values.T, assume_a="pos", overwrite_a=True, check_finite=False).T
    return found


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
    return likeness**POWER


def lightness_and_hue(image: np.ndarray) -> np.ndarray:
    """float32 (3, H, W) CIELAB of a picture (C, H, W) in [0, 1]."""
    from skimage.color import rgb2lab

    rgb = np.repeat(image, 3, 0) if len(image) == 1 else image
    lab: np.ndarray = rgb2lab(rgb.transpose(1, 2, 0)).transpose(2, 0, 1)
    return np.ascontiguousarray(lab, np.float32)
