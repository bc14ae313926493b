"""Make the pictures of docs/representations.md from what comes inside packages: run `python docs/figures.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from harness.datasets import load_dataset, package_pictures
from harness.models import load_model
from harness.registry import DatasetEntry, load_registry
from harness.testing import run_once
from harness_reports import charts, colour
from harness_representations import ImageGrid, MaxPatches, TsneMap
from harness_weights import LinearTemplates

HERE = Path(__file__).parent / "images"
PHOTOS = [
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "gravel.png",
    "grass.png",
    "motorcycle_left.png",
    "page.png",
    "rocket.jpg",
    "text.png",
    "horse.png",
    "moon.png",
    "hubble_deep_field.jpg",
    "ihc.png",
]
CHANNELS = (20, 259, 311, 208)  # of features.9: print, faces, eyes, dark things before a bright sky


def save(pixels: np.ndarray, name: str) -> None:
    Image.fromarray(pixels).save(HERE / name, quality=88)


def resized(image: np.ndarray, side: int, exact: bool = False) -> np.ndarray:
    picture = Image.fromarray(colour.picture(image))
    return np.asarray(picture.resize((side, side), Image.Resampling.NEAREST if exact else Image.Resampling.LANCZOS))


def beside(parts: list[np.ndarray], gap: int = 8) -> np.ndarray:
    height = max(p.shape[0] for p in parts)
    padded = [np.pad(p, ((0, height - p.shape[0]), (0, gap), (0, 0)), constant_values=255) for p in parts]
    return np.concatenate(padded, 1)[:, :-gap]


def main() -> None:
    registry = load_registry()

    result = run_once(LinearTemplates(), load_model("cifar10_linear", registry), load_dataset("cifar10_samples", registry))
    templates = next(a for a in result.artifacts if a.name == "templates")
    save(colour.sheet([resized(t, 128, exact=True) for t in templates.data], 5, 4), "templates.jpg")

    digits, cnn = load_dataset("digits_test", registry), load_model("digits_cnn", registry)
    maps = {a.name: a for a in run_once(TsneMap(seeds=1, perplexity=(30,), pictures=40), cnn, digits, max_batch=128).artifacts}
    grid = next(a for a in run_once(ImageGrid(cell=24), cnn, digits, max_batch=128).artifacts if a.name == "grid")
    drawn = [charts.scatter(maps["pca"]), charts.scatter(maps["tsne"])]
    parts = [np.asarray(Image.fromarray(d).resize((round(d.shape[1] * 432 / d.shape[0]), 432), Image.Resampling.LANCZOS)) for d in drawn]
    save(beside([*parts, resized(grid.data[0], 432)]), "digits_map.jpg")

    photos = package_pictures("skimage/data", "photos", DatasetEntry(source="package:skimage/data", files=PHOTOS, unlabelled=True))
    result = run_once(MaxPatches(layer="features.9", k=5, channels=CHANNELS), load_model("squeezenet1_1", registry), photos)
    patches = next(a for a in result.artifacts if a.name == "patches")
    save(colour.sheet([resized(p, 111) for p in patches.data], 5, 4), "strongest_patches.jpg")


if __name__ == "__main__":
    main()
