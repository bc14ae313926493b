"""How often grabcut_segmentation cuts the object out cleanly, and where it calls the cut-out doubtful: `python bench/cutouts.py FOLDER`.

`cutouts.json` has outlines traced by eye of 120 pictures of ImageNet's training set (shorter side 320 pixels), in three sets of 40, each
under the first 16 digits of its file's sha256. FOLDER is searched for those files; what is not found is left out. Coordinates, x and y in
turn, are those of the crop that the model sees (shorter side resized to 256, 224 x 224 in the middle), times three.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from harness.datasets import load_dataset
from harness.models import load_model
from harness.registry import load_registry
from harness.testing import run_once
from harness_saliency import GrabcutSegmentation

TRACED = Path(__file__).with_suffix(".json")
SIDE, TIMES = 224, 3
CLEAN = 0.15  # of the object may be missing, and as much background taken along


def main() -> None:
    parser = argparse.ArgumentParser(description="Count what is cut out cleanly.")
    parser.add_argument("folder", type=Path, help="where the pictures are, in folders or not")
    parser.add_argument("--spread", default="alike", choices=("alike", "none"), help="none: seeds by quantiles of the map, the paper's way")
    options = parser.parse_args()
    sets = json.loads(TRACED.read_text())
    registry = load_registry()
    pictures, model = load_dataset(str(options.folder), registry), load_model("squeezenet1_1", registry)
    there = {digest(options.folder / name): i for i, name in enumerate(pictures.ids)}
    for name, traced in sets.items():
        found = {key: there[key] for key in traced if key in there}
        if not found:
            parser.error(f"{options.folder} holds none of the {len(traced)} pictures of set {name}")
        result = run_once(GrabcutSegmentation(spread=options.spread), model, pictures.select(indices=list(found.values())))
        made = next(a for a in result.artifacts if a.name == "mask")
        cuts, masks = made.data > 0.5, np.stack([mask(**traced[key]) for key in found])
        size = masks.sum((1, 2))
        clean = ((masks & ~cuts).sum((1, 2)) <= CLEAN * size) & ((cuts & ~masks).sum((1, 2)) <= CLEAN * size)
        overlap = (cuts & masks).sum((1, 2)) / (cuts | masks).sum((1, 2))
        doubtful = np.array([caption.endswith(", doubtful") for caption in result.artifacts[0].captions])
        sure = f"; {clean[~doubtful].sum()} of the {(~doubtful).sum()} that are not doubtful"
        print(f"{name}: {clean.sum()} of {len(clean)} clean, overlap {overlap.mean():.2f}{sure}", flush=True)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def mask(outlines: list[list[float]], holes: list[list[float]] | None = None) -> np.ndarray:
    """bool (224, 224)"""
    drawn = Image.new("L", (SIDE * TIMES, SIDE * TIMES))
    pen = ImageDraw.Draw(drawn)
    for corners, inside in [*((o, 255) for o in outlines), *((h, 0) for h in holes or [])]:
        pen.polygon(corners, fill=inside)
    return np.asarray(drawn.resize((SIDE, SIDE), Image.Resampling.BOX)) > 127


if __name__ == "__main__":
    main()
