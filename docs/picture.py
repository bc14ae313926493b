"""Make docs/images/overview.jpg, the README's picture: photographs of scikit-image, maps and class pictures of squeezenet1_1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from harness.context import Context, to_images
from harness.datasets import load_dataset
from harness.models import load_model
from harness.registry import load_registry
from harness_reports import colour
from harness_saliency import Occlusion, Saliency
from harness_synthesis import ClassVisualization

SIDE, GAP = 224, 6


def main() -> None:
    registry = load_registry()
    model = load_model("squeezenet1_1", registry)
    data = load_dataset("photos", registry)
    data = data.select(indices=[data.ids.index(name) for name in ("chelsea.png", "rocket.jpg")])
    images = to_images(data.pictures(model.input), model.device)

    def context(name: str) -> Context:
        return Context(model, images=images, ids=data.ids, technique=name)

    saliency = Saliency().run(context("saliency")).artifacts[0].data
    occlusion = Occlusion(window=48, stride=12).run(context("occlusion")).artifacts[0].data
    made = ClassVisualization(classes=("flamingo", "tarantula", "dalmatian", "ostrich", "jellyfish", "goose"))
    pictures = made.run(Context(model, technique="class_visualization")).artifacts[0].data
    top: list[np.ndarray] = []
    for i, image in enumerate(images.numpy()):
        photo = colour.picture(image)
        top += [
            photo,
            colour.heat(saliency[i], colour.limit(saliency[i], False)),
            colour.balance(occlusion[i], colour.limit(occlusion[i], True), photo),
        ]
    page = colour.sheet([*top, *(colour.picture(p) for p in pictures)], 6, GAP)
    folder = Path(__file__).parent / "images"
    folder.mkdir(exist_ok=True)
    Image.fromarray(page).resize((page.shape[1] * 3 // 4, page.shape[0] * 3 // 4), Image.Resampling.LANCZOS).save(
        folder / "overview.jpg", quality=85
    )


if __name__ == "__main__":
    main()
