"""Numbers to colours: the only place where a map gets them. Every function gives uint8 RGB (H, W, 3)."""

from __future__ import annotations

from functools import cache

import numpy as np

# Maps run to this percentile of their size: one bright pixel would otherwise leave the rest unseen. The legend says so.
CLIP_PERCENTILE = 99.5


@cache
def colour_map(name: str) -> np.ndarray:
    """(256, 3) uint8 table of a perceptually ordered map."""
    import matplotlib

    return (matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)


def picture(image: np.ndarray) -> np.ndarray:
    """(C, H, W) in [0, 1] -> (H, W, 3)."""
    pixels = np.rint(image.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def limit(values: np.ndarray, signed: bool) -> float:
    """The value drawn at the end of the scale; 0 for a map that is zero everywhere."""
    size = np.abs(values) if signed else values
    top = float(np.percentile(size, CLIP_PERCENTILE))
    return top if top > 0 else float(size.max())


def heat(values: np.ndarray, end: float) -> np.ndarray:
    """An unsigned map (H, W), 0 dark to `end` bright."""
    share = values / end if end > 0 else np.zeros_like(values)
    return colour_map("inferno")[np.rint(share.clip(0, 1) * 255).astype(np.uint8)]


def balance(values: np.ndarray, end: float, over: np.ndarray | None) -> np.ndarray:
    """A signed map (H, W), blue -end to red +end, laid over the grey picture (H, W, 3) where it is strong."""
    share = (values / end if end > 0 else np.zeros_like(values)).clip(-1, 1)
    colour = colour_map("RdBu_r")[np.rint((share + 1) * 127.5).astype(np.uint8)].astype(np.float32)
    if over is None:
        return colour.astype(np.uint8)
    grey = over.astype(np.float32).mean(2, keepdims=True)
    weight = (np.abs(share) ** 0.6)[..., None] * 0.85
    return (weight * colour + (1 - weight) * grey).round().astype(np.uint8)


def enlarge(image: np.ndarray, least: int) -> np.ndarray:
    """Repeat pixels a whole number of times until the shorter side has `least`."""
    factor = max(1, -(-least // min(image.shape[:2])))
    return image.repeat(factor, 0).repeat(factor, 1)


def sheet(tiles: list[np.ndarray], columns: int, gap: int) -> np.ndarray:
    """Equal tiles row by row on white."""
    height, width = tiles[0].shape[:2]
    rows = -(-len(tiles) // columns)
    columns = min(columns, len(tiles))
    page = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for i, tile in enumerate(tiles):
        y, x = (i // columns) * (height + gap), (i % columns) * (width + gap)
        page[y : y + height, x : x + width] = tile
    return page
