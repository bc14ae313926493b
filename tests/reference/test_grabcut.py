"""grabcut_segmentation: seeds by quantile, OpenCV's own cut, and a bright square on noise."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from harness import ConfigError, Heatmaps, NotApplicable
from harness.context import Context, to_images
from harness.datasets import load_dataset
from harness.models import LoadedModel
from harness.registry import InputSpec
from harness.technique import Used
from harness_saliency import GrabcutSegmentation, Saliency
from harness_saliency.grabcut_segmentation import BACKGROUND, FOREGROUND, iou


def square_on_noise(side=64):
    """A picture uint8, the mask of its object, and a map that marks the object roughly."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 90, (side, side, 3)).astype(np.uint8)
    mask = np.zeros((side, side), bool)
    mask[20:44, 16:46] = True
    picture[mask] = np.array([220, 200, 60]) + rng.integers(-25, 25, (mask.sum(), 3))
    values = mask + 0.8 * rng.random((side, side))
    return picture, mask, values


def with_map(picture, values, **more):
    """A context in which `saliency` has given `values`."""
    model = LoadedModel(nn.Sequential(nn.Flatten(), nn.Linear(picture.size, 2)), InputSpec(size=len(picture)))
    images = to_images(picture[None], model.device)
    ctx = Context(model, images=images, ids=["p"], technique="grabcut_segmentation", **more)
    ctx.used = {"saliency": Used(Saliency())}
    ctx.results = {"saliency": {"saliency": Heatmaps("saliency", values[None])}}
    return ctx


def test_seeds_are_the_quantile_sets():
    values = np.random.default_rng(1).random((40, 50))
    seeds = GrabcutSegmentation().trimap(values)
    assert ((seeds == FOREGROUND) == (values >= np.quantile(values, 0.95))).all()
    assert ((seeds == BACKGROUND) == (values <= np.quantile(values, 0.30))).all()


def test_a_bright_square_on_noise_is_cut_out_the_same_each_time():
    picture, mask, values = square_on_noise()
    technique = GrabcutSegmentation(smooth=0.0)
    first, second = (technique.run(with_map(picture, values)).artifacts for _ in range(2))
    cut = next(a for a in first if a.name == "mask").data[0] > 0
    assert iou(cut[None], mask[None])[0] >= 0.9
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.data, b.data)


def test_equals_opencv_on_the_same_seeds():
    picture, _, values = square_on_noise()
    technique = GrabcutSegmentation(whole=False, iterations=3)
    seeds = technique.trimap(values)
    mask = seeds.copy()
    cv2.setRNGSeed(0)
    cv2.grabCut(np.ascontiguousarray(picture[..., ::-1]), mask, None, np.zeros((1, 65)), np.zeros((1, 65)), 3, cv2.GC_INIT_WITH_MASK)
    assert np.array_equal(technique.cut(picture, seeds), (mask == 1) | (mask == 3))


def test_pieces_without_a_seed_are_dropped():
    picture, _, _ = square_on_noise()
    picture[2:14, 50:62] = [220, 200, 60]  # the object's colour, far from it
    seeds = np.full((64, 64), 2, np.uint8)  # perhaps background
    seeds[24:40, 20:42], seeds[50:], seeds[:, :10], seeds[2:14, 50:62] = FOREGROUND, BACKGROUND, BACKGROUND, 3
    whole, all_ = (GrabcutSegmentation(whole=w).cut(picture, seeds) for w in (True, False))
    assert all_[8, 56]
    assert not whole[8, 56]
    assert whole[30, 30]


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_constant_map_cuts_nothing_out(value):
    picture, _, _ = square_on_noise()
    result = GrabcutSegmentation().run(with_map(picture, np.full((64, 64), value)))
    assert not next(a for a in result.artifacts if a.name == "mask").data.any()
    assert "too flat" in result.notes[0]


def test_a_picture_of_one_colour_is_no_crash():
    picture = np.full((32, 32, 3), 128, np.uint8)
    values = np.random.default_rng(0).random((32, 32))
    result = GrabcutSegmentation(smooth=0).run(with_map(picture, values))
    assert next(a for a in result.artifacts if a.name == "mask").data.shape == (1, 32, 32)


def test_overlap_is_measured_where_there_are_masks(tmp_path, registry):
    from PIL import Image

    picture, mask, values = square_on_noise()
    for folder, pixels in (("pictures", picture), ("masks", mask.astype(np.uint8) * 255)):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels).save(tmp_path / folder / "p.png")
    (tmp_path / "r.yaml").write_text("datasets: {squares: {source: 'folder:pictures', masks: masks, masks_show: a square}}")
    from harness.registry import load_registry

    data = load_dataset("squares", load_registry([tmp_path / "r.yaml"]))
    result = GrabcutSegmentation(smooth=0.0).run(with_map(picture, values, dataset=data))
    assert result.metrics[0].name == "iou"
    assert result.metrics[0].value >= 0.9


def test_iou_by_hand():
    a, b = np.zeros((2, 2, 2), bool), np.zeros((2, 2, 2), bool)
    a[0, 0], b[0, :, 0] = True, True
    assert iou(a, b).tolist() == [1 / 3, 1.0]


def test_what_cannot_be(digits_cnn, plugins):
    with pytest.raises(ConfigError, match="gives no map"):
        plugins.uses(GrabcutSegmentation(maps=("features",)))
    ctx = Context(digits_cnn, images=torch.zeros(1, 1, 8, 8), ids=["p"])
    ctx.missing = {"guided_backprop": "needs ReLU"}
    with pytest.raises(NotApplicable, match=r"guided_backprop: needs ReLU.*name another in `maps`"):
        GrabcutSegmentation().run(ctx)
    with pytest.raises(ConfigError, match="must lie below"):
        GrabcutSegmentation(background=0.96).run(ctx)
