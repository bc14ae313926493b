"""Make the pictures of the guides from what comes inside packages: `python docs/figures.py`, or with the name of one guide."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from harness import Technique
from harness.datasets import Dataset, load_dataset, package_pictures
from harness.models import LoadedModel, load_model
from harness.plugins import load_plugins
from harness.registry import DatasetEntry, Registry, load_registry
from harness.testing import run_once
from harness_adversarial import AdversarialTraining, DecisionSlice, FoolingImage
from harness_reports import charts, colour
from harness_representations import ImageGrid, MaxPatches, TsneMap
from harness_saliency import BiasProbe, GrabcutSegmentation
from harness_style import FastStyleTransfer, MultiStyleTransfer, NeuralTexture, StyleTransfer, WeiLevoyTexture
from harness_synthesis import ChannelVisualization, ClassVisualization, DeepDream, DeepGenerator, FeatureInversion, Multifaceted
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
    guides = {"representations": representations, "saliency": saliency, "synthesis": synthesis, "adversarial": adversarial, "style": style}
    registry = load_registry()
    for name in sys.argv[1:] or guides:
        guides[name](registry)


def representations(registry: Registry) -> None:

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


MAPS = ("saliency", "smoothgrad", "integrated_gradients", "guided_backprop", "grad_cam", "occlusion", "rise", "lime")


def saliency(registry: Registry) -> None:
    """Maps of two pictures, objects cut out, and the snow."""
    model, plugins = load_model("squeezenet1_1", registry), load_plugins()
    data = load_dataset("photos", registry)
    rows = []
    some = data.select(indices=[data.ids.index(n) for n in ("rocket.jpg", "camera.png")])
    images = some.pictures(model.input)
    maps = {}
    for name in MAPS:
        technique = plugins.technique(name).build({"stride": 0.036} if name == "occlusion" else {})
        found = {a.name: a for a in run_once(technique, model, some, max_batch=16).artifacts}
        maps[name] = found[technique.attribution].data.clip(0)
    for i, image in enumerate(images):
        rows += [image, *(colour.heat(m[i], colour.limit(m[i], False)) for m in maps.values())]
    small = [np.asarray(Image.fromarray(r).resize((128, 128), Image.Resampling.LANCZOS)) for r in rows]
    save(colour.sheet(small, 1 + len(MAPS), 4), "maps.jpg")

    some = data.select(
        indices=[data.ids.index(n) for n in ("chelsea.png", "coffee.png", "motorcycle_left.png", "camera.png", "rocket.jpg")]
    )
    found = {a.name: a for a in run_once(GrabcutSegmentation(), model, some).artifacts}
    save(colour.sheet([resized(p, 200) for p in found["outline"].data], 5, 4), "cut_out.jpg")

    some = load_dataset("snow_test", registry).select(60)
    tiles = []
    for name in ("snow_cnn", "snow_control_cnn"):
        result = run_once(BiasProbe(techniques=("occlusion", "saliency"), pictures=2), load_model(name, registry), some, max_batch=64)
        found = {a.name: a for a in result.artifacts}
        changed = found["cue_changed"].data[:2]
        tiles += [colour.enlarge(colour.picture(p), 128) for p in changed]
        maps_ = [m for _, m in sorted(zip(found["maps"].captions, found["maps"].data, strict=True), key=lambda pair: pair[0])]
        tiles += [colour.enlarge(colour.heat(m, colour.limit(m, False)), 128) for m in maps_]
        print(name, result.notes[0], found["cue_changed"].captions[:2], found["maps"].captions)
    save(colour.sheet(tiles, 4, 4), "snow.jpg")


# Simonyan et al.'s nine, Yosinski et al.'s four, and seven more.
CLASSES = (
    "dumbbell", "cup", "dalmatian", "bell pepper", "lemon", "Siberian husky", "goose", "ostrich", "limousine", "flamingo", "pelican",
    "hartebeest", "ground beetle", "tarantula", "jellyfish", "gorilla", "starfish", "pineapple", "school bus", "zebra",
)  # fmt: skip


def synthesis(registry: Registry) -> None:
    """Class pictures, recipes side by side, channels by depth, facets, pictures through generators, dreams, inversions."""
    model, cnn = load_model("squeezenet1_1", registry), load_model("digits_cnn", registry)
    photos, samples, digits = (load_dataset(n, registry) for n in ("photos", "imagenet_samples", "digits"))

    def shown(technique: Technique, model: LoadedModel, data: Dataset, name: str, side: int, batch: int = 10) -> list[np.ndarray]:
        found = {a.name: a for a in run_once(technique, model, data, max_batch=batch).artifacts}
        return [resized(p, side, exact=p.shape[-1] < 64) for p in found[name].data]

    def some(*names: str) -> Dataset:
        return photos.select(indices=[photos.ids.index(n) for n in names])

    save(colour.sheet(shown(ClassVisualization(classes=CLASSES), model, some("chelsea.png"), "pictures", 160), 7, 4), "classes.jpg")
    three = ("flamingo", "pelican", "hartebeest")
    rows = shown(ClassVisualization(classes=three, preset="compare"), model, some("chelsea.png"), "comparison", 128)
    other = [shown(ClassVisualization(classes=three, preset=p), model, some("chelsea.png"), "pictures", 128) for p in ("fourier", "prior")]
    rows = [tile for i in range(3) for tile in (*rows[6 * i : 6 * i + 6], *(pictures[i] for pictures in other))]
    save(colour.sheet(rows, 8, 4), "recipes.jpg")
    save(colour.sheet(shown(ChannelVisualization(), model, samples, "pictures", 140), 6, 4), "channels.jpg")
    facets = shown(Multifaceted(classes=(2,), facets=6), cnn, digits, "class-2", 64)
    facets += shown(Multifaceted(classes=(7,), facets=6), cnn, digits, "class-7", 64)
    save(beside([colour.sheet(facets[:24], 6, 4), colour.sheet(facets[24:], 6, 4)], 40), "facets.jpg")
    by_generator = DeepGenerator(count=10, judge="digits_resnet")
    made = [shown(by_generator, cnn, digits.select(1), name, 64) for name in ("by_pixels", "pictures")]
    made.append(shown(DeepGenerator(count=10, generator="prior"), cnn, digits.select(1), "pictures", 64))
    save(colour.sheet([tile for row in made for tile in row], 10, 4), "generated.jpg")
    dreams = [resized(p, 300) for p in some("astronaut.png", "rocket.jpg").pictures(model.input).transpose(0, 3, 1, 2) / np.float32(255)]
    for layer in ("features.6", "features.10"):
        dreams += shown(DeepDream(layer=layer, dreams=2), model, some("astronaut.png", "rocket.jpg"), "dream", 300)
    save(colour.sheet([dreams[i] for i in (0, 2, 4, 1, 3, 5)], 3, 4), "dreams.jpg")
    inverted = shown(FeatureInversion(), model, some("chelsea.png", "astronaut.png", "coffee.png"), "inversions", 160)
    save(colour.sheet(inverted, 6, 4), "inversions.jpg")


def adversarial(registry: Registry) -> None:
    """Two koalas, planes through pictures, the four questions. universal.jpg is made on pictures that do not come along."""
    model, cnn = load_model("squeezenet1_1", registry), load_model("digits_cnn", registry)
    samples, digits = load_dataset("imagenet_samples", registry), load_dataset("digits", registry)
    found = {a.name: a for a in run_once(FoolingImage(target="koala"), model, samples.select(indices=[2, 7]), max_batch=2).artifacts}
    save(colour.sheet([resized(p, 220) for p in found["fooled"].data], 4, 4), "fooled.jpg")
    planes = []
    for net, data in ((cnn, digits.select(indices=[0, 5, 8, 17])), (model, samples.select(4))):
        result = {a.name: a for a in run_once(DecisionSlice(normals=False), net, data, max_batch=32).artifacts}
        planes += [resized(p, 220, exact=True) for p in result["planes"].data]
    save(colour.sheet(planes, 4, 4), "slices.jpg")
    curves = {a.name: a for a in run_once(AdversarialTraining(), cnn, digits, max_batch=128).artifacts}
    drawn = [charts.curve_pixels(curves[n]) for n in ("which_noise", "which_budget", "clean_accuracy", "when_enough")]
    half = [np.asarray(Image.fromarray(d).resize((d.shape[1] // 2, d.shape[0] // 2), Image.Resampling.LANCZOS)) for d in drawn]
    save(np.concatenate([beside(half[:2]), beside(half[2:])]), "four_questions.jpg")


def style(registry: Registry) -> None:
    """Textures with and without a network, styles slow and fast, several styles in one network."""
    model = load_model("squeezenet1_1", registry)
    textures, photos = load_dataset("textures", registry), load_dataset("photos", registry)

    def some(data: Dataset, *names: str) -> Dataset:
        return data.select(indices=[list(data.ids).index(n) for n in names])

    def sheets(technique: Technique, data: Dataset, name: str, model: LoadedModel = model) -> list[np.ndarray]:
        found = {a.name: a for a in run_once(technique, model, data).artifacts}
        return [found[f"{name}-{i + 1}"].data for i in range(len(data))]

    hand = package_pictures("skimage/data", "hand", DatasetEntry(source="package:skimage/data", files=["text.png"], unlabelled=True))
    tiles = []
    for data, window in ((some(textures, "brick.png"), 11), (some(textures, "grass.png", "gravel.png"), 9), (hand, 9)):
        for sheet in sheets(WeiLevoyTexture(window=window, levels=4, leaves=8), data, "texture"):
            tiles += [np.asarray(Image.fromarray(colour.picture(p)).resize((p.shape[2] * 2, p.shape[1] * 2), 0)) for p in sheet]
    save(colour.sheet(tiles, 4, 4), "pixel_textures.jpg")
    rows = sheets(NeuralTexture(depths=4), some(textures, "brick.png", "gravel.png", "ihc.png"), "texture")
    save(colour.sheet([colour.picture(p) for sheet in rows for p in sheet], 5, 4), "network_textures.jpg")
    three = some(photos, "chelsea.png", "coffee.png", "rocket.jpg")
    columns = [sheets(StyleTransfer(style=(f"textures:{n}.png",), size=512), three, "transfer") for n in ("ihc", "brick")]
    lines = [beside([colour.picture(p) for p in (one[0], one[-1], two[-1])], 4) for one, two in zip(*columns, strict=True)]
    save(np.concatenate(lines), "transferred.jpg")
    two, transfer = some(photos, "chelsea.png", "rocket.jpg"), StyleTransfer(size=400, steps=100)
    columns = [sheets(transfer, two, "transfer", m) for m in (model, load_model("vgg16_features", registry))]
    lines = [beside([colour.picture(p) for p in (one[0], one[-1], two[-1])], 4) for one, two in zip(*columns, strict=True)]
    save(np.concatenate(lines), "vgg16.jpg")
    fast = sheets(FastStyleTransfer(steps=100), some(photos, "chelsea.png", "astronaut.png", "camera.png"), "transfer")
    save(np.concatenate([beside([colour.picture(p) for p in (sheet[0], sheet[2], sheet[3])], 4) for sheet in fast]), "fast.jpg")
    several = MultiStyleTransfer(size=200)
    four, between = (sheets(several, some(photos, "chelsea.png"), n)[0] for n in ("styles", "between"))
    save(colour.sheet([colour.picture(p) for p in (*four, *between)], 5, 4), "four_styles.jpg")


if __name__ == "__main__":
    main()
