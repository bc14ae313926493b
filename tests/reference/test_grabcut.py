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
from harness_saliency.grabcut_segmentation import APART, BACKGROUND, FOREGROUND, contrast, iou, sides, without_holes
from harness_saliency.spreading import alike, likely, spread


def square_on_noise(side=64):
    """A picture uint8, the mask of its object, and a map that marks the object roughly."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 90, (side, side, 3)).astype(np.uint8)
    mask = np.zeros((side, side), bool)
    mask[20:44, 16:46] = True
    picture[mask] = np.array([220, 200, 60]) + rng.integers(-25, 25, (mask.sum(), 3))
    values = mask + 0.8 * rng.random((side, side))
    return picture, mask, values


def with_map(picture, values, model=None, **more):
    """A context in which `saliency` has given `values`; the model has no maps if none is given."""
    model = model or LoadedModel(nn.Sequential(nn.Flatten(), nn.Linear(picture.size, 2)), InputSpec(size=len(picture)))
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
    assert any("too flat" in note for note in result.notes)


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


def halves(side=64):
    """A picture uint8 whose left part is a dark red disc on green, its right part the same green, and the disc's mask."""
    y, x = np.mgrid[:side, :side]
    mask = (y - side / 2) ** 2 + (x - side / 3) ** 2 < (side / 5) ** 2
    picture = np.where(mask[..., None], (150, 30, 30), (60, 160, 70)).astype(np.int64)
    return (picture + np.random.default_rng(0).integers(-12, 12, picture.shape)).clip(0, 255).astype(np.uint8), mask


def small_network(side=64):
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    return LoadedModel(nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)), InputSpec(size=side), "small")


def test_spreading_is_the_limit_of_passing_on():
    random = np.random.default_rng(0)
    likeness = random.random((30, 30))
    likeness += likeness.T
    values = random.random((2, 30))
    root = np.sqrt(likeness.sum(1))
    passing = likeness / root[:, None] / root[None]
    found = values.copy()
    for _ in range(400):
        found = 0.9 * found @ passing + 0.1 * values
    np.testing.assert_allclose(spread(likeness, values, kept=0.9), found, atol=1e-12)
    np.testing.assert_allclose(spread(np.eye(5), values[:, :5]), values[:, :5], atol=1e-12)  # no place has to do with another


def test_a_map_spreads_over_what_is_alike_and_the_same_each_time():
    picture, mask = halves()
    model = small_network()
    image = to_images(picture[None], model.device)
    y, x = np.mgrid[:64, :64]
    spot = np.exp(-((y - 24.0) ** 2 + (x - 18.0) ** 2) / 40)  # in the disc, off its middle
    first, second = (likely(model, image, spot) for _ in range(2))
    assert np.array_equal(first, second)
    inner = cv2.erode(mask.astype(np.uint8), np.ones((5, 5))) > 0
    outer = cv2.dilate(mask.astype(np.uint8), np.ones((5, 5))) == 0
    for found in first:
        assert found.shape == (64, 64) and np.abs(found).max() <= 1
        assert found[inner].min() > found[outer].max()
    assert spot[inner].min() < spot[outer].max()  # which the map alone does not say
    assert contrast(first[1], mask) > APART


def test_what_hardly_differs_from_the_rest_is_doubtful():
    values = np.zeros((10, 10))
    values[:5] = 0.5
    cut = np.zeros((10, 10), bool)
    assert contrast(values, cut) == contrast(values, ~cut) == 0
    cut[:5] = True
    assert contrast(values, cut) == 0.5
    cut[:, 5:] = True  # half of each
    assert contrast(values, cut) == pytest.approx(0.5 * 50 / 75)


def test_a_doubtful_cut_out_is_called_so(monkeypatch):
    """By its caption, by the colour of its outline and by its measure."""
    import harness_saliency.grabcut_segmentation as module

    picture, mask = halves()
    ctx = with_map(picture, mask.astype(float), small_network())
    sure = GrabcutSegmentation().run(ctx)
    monkeypatch.setattr(module, "APART", 3.0)
    doubted = GrabcutSegmentation().run(ctx)
    for result, doubt in ((sure, False), (doubted, True)):
        outline = next(a for a in result.artifacts if a.name == "outline")
        assert outline.captions[0].endswith(", doubtful") == doubt
        colour = np.array(module.DOUBTFUL if doubt else module.OUTLINE, np.float32)
        assert (outline.data[0] == colour[:, None, None]).all(0).any()
    assert next(m for m in sure.metrics if m.name == "apart").value > APART
    plain = GrabcutSegmentation(spread="none").run(ctx)  # which has no measure of it
    assert not plain.artifacts[0].captions[0].endswith("doubtful") and "apart" not in {m.name for m in plain.metrics}


@pytest.mark.parametrize("side", [1, 2, 3, 8, 30])
def test_spreading_in_small_pictures_and_in_one_colour(side):
    model = small_network(side)
    drawn = torch.rand((1, 3, side, side), generator=torch.Generator().manual_seed(0))
    strength = np.random.default_rng(0).random((side, side))
    for image in (torch.full((1, 3, side, side), 0.5), drawn):
        for found in likely(model, image, strength):
            assert found.shape == (side, side) and np.isfinite(found).all()


def test_likeness_is_symmetric_and_every_place_has_some():
    picture, _ = halves(40)
    model = small_network(40)
    likeness = alike(model, to_images(picture[None], model.device), 20)
    assert likeness.shape == (400, 400)
    np.testing.assert_allclose(likeness, likeness.T, atol=1e-6)
    assert likeness.min() >= 0 and (likeness.sum(1) >= 1).all()


def test_sides_are_sure_far_from_the_threshold_alone():
    random = np.random.default_rng(0)
    values = np.concatenate([random.normal(-0.5, 0.2, 5000), random.normal(0.5, 0.2, 5000)]).clip(-1, 1).reshape(100, 100)
    seeds = sides(values)  # the threshold lies about 0
    assert (seeds[values < -0.45] == BACKGROUND).all() and (seeds[values > 0.45] == FOREGROUND).all()
    near = np.abs(values) < 0.25
    assert set(np.unique(seeds[near])) == {2, 3}
    assert (seeds[near & (values > 0.1)] == 3).all() and (seeds[near & (values < -0.1)] == 2).all()
    assert (sides(np.full((4, 4), 0.3)) == 2).all()


def test_holes_are_filled_and_openings_are_not():
    mask = np.zeros((40, 40), bool)
    mask[5:35, 5:35] = True
    mask[10:13, 10:13] = False  # a hole
    mask[20:23, :8] = False  # open to the outside
    large = mask.copy()
    large[14:32, 14:32] = False
    found = without_holes(mask)
    assert found[10:13, 10:13].all() and not found[20:23, 5:8].any()
    assert not without_holes(large)[16:30, 16:30].any()


def test_a_map_that_marks_one_spot_cuts_the_whole_disc_out():
    picture, mask = halves()
    y, x = np.mgrid[:64, :64]
    spot = np.exp(-((y - 24.0) ** 2 + (x - 18.0) ** 2) / 40)  # in the disc, off its middle
    model = small_network()
    ctx = with_map(picture, spot)
    ctx.model = model
    result = GrabcutSegmentation(smooth=0.0).run(ctx)
    found = next(a for a in result.artifacts if a.name == "mask").data > 0
    assert iou(found, mask[None])[0] >= 0.9


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
        GrabcutSegmentation.build({"background": 0.96})
