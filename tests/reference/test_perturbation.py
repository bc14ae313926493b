"""rise, lime and expected_gradients against slow replicas, closed forms and captum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum._utils.models.linear_model import SkLearnRidge
from captum.attr import Lime as CaptumLime
from torch import nn

from harness import ConfigError
from harness.context import Context, to_images
from harness.datasets import load_dataset
from harness.models import LoadedModel
from harness.registry import InputSpec
from harness.testing import run_once, small_dataset
from harness_saliency import ExpectedGradients, Lime, Rise
from harness_saliency.lime import fit_linear, nearness
from harness_saliency.rise import enlarge


def spec(channels=1, size=8):
    return InputSpec(channels=channels, size=size, mean=(0.0,) * channels, std=(1.0,) * channels)


def linear_model(size=8, channels=1, classes=3):
    torch.manual_seed(0)
    return LoadedModel(nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, classes)).double(), spec(channels, size))


def context(model, count=2, technique="x", **more):
    shape = (count, model.input.channels, model.input.size, model.input.size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=model.dtype)
    return Context(model, images=images, ids=[f"p{i}" for i in range(count)], technique=technique, **more)


# -- rise ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "grid"), [(8, 3), (12, 4), (9, 1), (21, 7)])
def test_masks_are_enlarged_as_by_interpolation_and_cut_out(size, grid):
    model = linear_model(size)
    technique = Rise(masks=5, grid=grid)
    ctx = context(model)
    grids, shifts = technique.draw(ctx)
    from harness_saliency.rise import _enlarging

    found = enlarge(grids, shifts, [_enlarging(grid, size, ctx.images)] * 2, (size, size))
    cell = -(-size // grid)
    up = F.interpolate(grids[:, None], size=(grid + 1) * cell, mode="bilinear", align_corners=False)[:, 0]
    for mask, whole, (y, x) in zip(found, up, shifts.tolist(), strict=True):
        assert 0 <= y < cell
        assert 0 <= x < cell
        torch.testing.assert_close(mask, whole[y : y + size, x : x + size])


@pytest.mark.parametrize("scored", ["score", "probability"])
@pytest.mark.parametrize("batch", [3, 64])
def test_equals_the_mean_worked_mask_by_mask(scored, batch):
    """S(p) = 1 / (E[M] N) sum_i f(I * M_i) M_i(p), or the covariance where it is centred."""
    model = linear_model()
    ctx = context(model, 2, "rise", target=1, max_batch=batch)
    technique = Rise(masks=20, grid=4, keep=0.4, baseline="black", scored=scored, target=1, centred=False)
    found = technique.attribute(ctx)
    centred = technique.model_copy(update={"centred": True}).attribute(context(model, 2, "rise", target=1))
    grids, shifts = technique.draw(context(model, 2, "rise", target=1))
    for i, image in enumerate(ctx.images):
        total, pairs = torch.zeros(8, 8, dtype=torch.float64), []
        for grid, (y, x) in zip(grids[20 * i : 20 * (i + 1)], shifts[20 * i : 20 * (i + 1)].tolist(), strict=True):
            mask = F.interpolate(grid[None, None], size=(10, 10), mode="bilinear")[0, 0, y : y + 8, x : x + 8]
            logits = model((image * mask)[None])[0]
            value = logits[1] if scored == "score" else logits.softmax(0)[1]
            total += value * mask
            pairs.append((mask, value))
        expected = total / (0.4 * 20)
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-10)
        mean = torch.stack([v for _, v in pairs]).mean()
        covariance = torch.stack([(v - mean) * m for m, v in pairs]).sum(0) / (0.4 * 20)
        torch.testing.assert_close(centred[i], covariance, rtol=0, atol=1e-10)


def test_a_linear_model_gets_its_weights_back():
    """Cells of one pixel, enlarged by a pixel: the centred map tends to cov(M) (w x) / keep, its closed form."""
    model = linear_model()
    ctx = context(model, 1, "rise", target=2)
    found = Rise(masks=100_000, grid=8, baseline="black", scored="score", target=2).attribute(ctx)[0]
    # A row of the grid enlarged from 8 to 9 and cut to 8: M = A G A^T with independent cells of variance 1/4.
    way = F.interpolate(torch.eye(8, dtype=torch.float64)[None], size=9, mode="linear", align_corners=False)[0].T[:8]
    parts = model.module[1].weight[2].view(8, 8) * ctx.images[0, 0]
    expected = 0.25 / 0.5 * (way @ way.T) @ parts @ (way @ way.T)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_one_cell_hides_all_or_nothing(digits_cnn):
    result = run_once(Rise(masks=16, grid=1), digits_cnn, small_dataset(2))
    assert np.ptp(result.artifacts[0].data, axis=(1, 2)).max() < 1e-5


# -- lime ------------------------------------------------------------------------------------------------------------------


def blocks(size, side):
    """(size, size) square superpixels."""
    line = np.arange(size) * side // size
    return line[:, None] * side + line


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_a_black_box_linear_in_the_mask_gets_exact_coefficients(distance):
    """All 2^9 masks, no ridge: each weight is the sum of w (x - fill) over its superpixel."""
    model = linear_model(9)
    ctx = context(model, 2, "lime", target=1)
    technique = Lime(target=1, samples=512, ridge=0, fill="grey", scored="score", distance=distance)
    segments = [blocks(9, 3)] * 2
    assert len(technique.masks(ctx, 0, 9)[0]) == 512
    weight = model.module[1].weight[1].view(9, 9).numpy()
    for i, found in enumerate(technique.explain(ctx, segments)):
        expected = np.bincount(segments[i].ravel(), weights=(weight * (ctx.images[i, 0].numpy() - 0.5)).ravel())
        np.testing.assert_allclose(found.weights, expected, atol=1e-10)
        assert found.fit == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("samples", [60, 512])
def test_equals_captum_with_the_same_masks(samples, digits_cnn):
    """Same masks, kernel and ridge; captum's own sampling and regression."""
    ctx = context(digits_cnn, 1, "lime", target=3, max_batch=64)
    technique = Lime(target=3, samples=samples, ridge=0.7, fill="black", scored="score")
    segment = blocks(8, 3)
    found = technique.explain(ctx, [segment])[0]
    drawn, _ = technique.masks(ctx, 0, 9)
    assert len(drawn) == samples
    masks = iter(torch.from_numpy(drawn).float())

    def similarity(original, perturbed, interpretable, **_):
        own = nearness(interpretable.numpy() > 0.5, "cosine", 0.25)[0]
        return torch.tensor(1.0 if samples < 512 else own * samples / nearness(drawn, "cosine", 0.25).sum())

    theirs = CaptumLime(
        digits_cnn, interpretable_model=SkLearnRidge(alpha=0.7), similarity_func=similarity, perturb_func=lambda *_, **__: next(masks)[None]
    ).attribute(
        ctx.images, target=3, baselines=0.0, n_samples=samples, feature_mask=torch.from_numpy(segment)[None, None], return_input_shape=False
    )
    np.testing.assert_allclose(found.weights, theirs[0].numpy(), rtol=1e-4, atol=1e-5)


def test_regression_equals_scikit_learn():
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    masks, answers = rng.random((80, 7)) < 0.5, rng.normal(size=80)
    near = nearness(masks, "cosine", 0.25)
    theirs = Ridge(alpha=2.0).fit(masks, answers, sample_weight=near)
    found = fit_linear(masks, answers, near, 2.0)
    np.testing.assert_allclose(found.weights, theirs.coef_, atol=1e-10)
    plain = theirs.score(masks, answers, sample_weight=near)
    assert found.fit == pytest.approx(max(0, 1 - (1 - plain) * 79 / 72))


def test_noise_is_not_explained():
    """As many weights as samples fit anything; the adjusted fit says that it means nothing."""
    rng = np.random.default_rng(0)
    masks, answers = rng.random((60, 40)) < 0.5, rng.normal(size=60)
    assert fit_linear(masks, answers, np.ones(60), 1.0).fit < 0.3


def test_the_ridge_means_the_same_with_few_superpixels():
    """All combinations weigh as much as drawn masks do: a linear black box keeps its weights."""
    model = linear_model(9)
    for count in (1, 2, 3):
        ctx = context(model, 1, "lime", target=1)
        segment = np.arange(81).reshape(9, 9) * count // 81
        found = Lime(target=1, fill="grey").explain(ctx, [segment])[0]
        weight = model.module[1].weight[1].view(9, 9).numpy() * (ctx.images[0, 0].numpy() - 0.5)
        expected = np.bincount(segment.ravel(), weights=weight.ravel())
        np.testing.assert_allclose(found.weights, expected, rtol=0.1, atol=0.02 * np.abs(expected).max())
        assert found.fit > 0.97


def test_noise_and_grey_pictures_have_superpixels(registry):
    snow = load_dataset("snow_test", registry).select(8)
    images = to_images(snow.pictures(InputSpec(size=32)), torch.device("cpu"))
    assert min(Lime().superpixels(x).max() + 1 for x in images) > 20
    y, x = np.mgrid[:64, :64]
    disc = torch.from_numpy(((y - 32) ** 2 + (x - 32) ** 2 < 300).astype(np.float32))[None]
    found = Lime().superpixels(disc)
    inside = [disc[0].numpy()[found == s].std() for s in range(found.max() + 1)]
    assert np.mean(inside) < 0.1  # they follow the disc's edge


@pytest.mark.parametrize("technique", [Rise(masks=12), Lime(samples=12)])
def test_lower_precision(technique, squeezenet):
    from harness.device import device_settings

    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for precision in ("float32", "bfloat16"):
        with device_settings("cpu", precision):
            result = technique.run(Context(squeezenet, images=images, ids=["p"], technique=technique.name, target=3))
        found.append(result.artifacts[0].data)
    assert np.isfinite(found[1]).all()
    assert np.corrcoef(found[0].ravel(), found[1].ravel())[0, 1] > 0.8


def test_nearness_is_the_papers_kernel():
    masks = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    d = 1 - np.array([1, np.sqrt(0.5), 0])
    np.testing.assert_allclose(nearness(masks, "cosine", 0.5), np.exp(-(d**2) / 0.25))
    np.testing.assert_allclose(nearness(masks, "euclidean", 0.5), np.exp(-np.array([0, 0.5, 1]) / 0.25))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_seeds_agree_at_a_thousand_samples(squeezenet, registry):
    """Rank correlation of the superpixels' weights above 0.95, the mean of six pictures spread evenly through the set.

    The first of them alone is below: weights near zero change places.
    """
    from scipy.stats import spearmanr

    data = load_dataset("imagenet_samples", registry).select(6)
    images = to_images(data.pictures(squeezenet.input), squeezenet.device)
    technique = Lime()
    assert technique.samples == 1000
    segments = [technique.superpixels(image) for image in images]
    found = [technique.explain(Context(squeezenet, images=images, ids=data.ids, technique="lime", seed=seed), segments) for seed in (0, 1)]
    assert np.mean([spearmanr(a.weights, b.weights).statistic for a, b in zip(*found, strict=True)]) > 0.95


def test_drawing_in_proportion_tends_to_what_weighting_gives(digits_cnn):
    """Masks drawn by the kernel and masks weighted by it lead to the same linear model."""
    ctx = context(digits_cnn, 1, "lime", target=3, max_batch=1024)
    segments = [blocks(8, 4)]
    every = Lime(target=3, samples=2**16, ridge=0, fill="black").explain(ctx, segments)[0].weights
    drawn = Lime(target=3, samples=20_000, ridge=0, fill="black").explain(ctx, segments)[0].weights
    assert np.abs(drawn - every).max() < 0.05 * np.abs(every).max()


def test_the_fill_is_each_superpixels_mean_colour():
    model = linear_model(6, channels=3)
    ctx = context(model, 1, "lime")
    segment = blocks(6, 2)
    filled = Lime(fill="own")._fill(ctx, [segment])[0]
    for s in range(4):
        inside = torch.from_numpy(segment == s)
        torch.testing.assert_close(filled[:, inside], ctx.images[0][:, inside].mean(1, keepdim=True).expand(3, 9))


def test_one_superpixel_and_a_picture_of_one_colour(digits_cnn):
    result = run_once(Lime(segments=1), digits_cnn, small_dataset(2))
    assert "one superpixel only" in result.notes[0]
    assert np.ptp(result.artifacts[0].data, axis=(1, 2)).max() == 0
    flat = Context(digits_cnn, images=torch.full((1, 1, 8, 8), 0.5), ids=["flat"], technique="lime")
    result = Lime(fill="own").run(flat)
    assert np.isfinite(result.artifacts[0].data).all()
    assert np.abs(result.artifacts[0].data).max() < 1e-4  # switching off its own colour changes nothing
    with pytest.raises(ConfigError, match=r"lime\.samples"):
        Lime.build({"samples": 1})


def test_superpixels_cover_the_picture_and_are_numbered(squeezenet, registry):
    data = load_dataset("photos", registry).select(1)
    image = to_images(data.pictures(squeezenet.input), squeezenet.device)[0]
    found = Lime(segments=60).superpixels(image)
    assert found.shape == (224, 224)
    assert set(np.unique(found)) == set(range(found.max() + 1))
    assert 25 <= found.max() + 1 <= 90


# -- expected_gradients ------------------------------------------------------------------------------------------------------


def digits_context(model, rows=(2, 5), **more):
    data = load_dataset("digits_test", _registry()).select(indices=list(rows))
    images = to_images(data.pictures(model.input), model.device, model.dtype)
    return Context(model, images=images, ids=data.ids, dataset=data, technique="expected_gradients", **more)


def _registry():
    from harness.registry import load_registry

    return load_registry()


def test_a_linear_model_has_shares_known_from_its_baselines():
    """sum over draws of (x - x') w / n: the place on the way does not matter."""
    model = linear_model()
    ctx = digits_context(model, target=1)
    technique = ExpectedGradients(target=1, samples=9, references=5)
    others = technique.baselines(ctx)
    shares, picked = technique.attribute(ctx, others)
    weight = model.module[1].weight[1].view(1, 8, 8)
    for i in range(2):
        expected = (ctx.images[i] - others[picked[i]].mean(0)) * weight
        torch.testing.assert_close(shares[i], expected, rtol=0, atol=1e-12)
    metric = technique.run(digits_context(model, target=1)).metrics[1]
    assert metric.name == "completeness_error"
    assert metric.value < 1e-10


def test_tends_to_integrated_gradients_over_all_baselines(digits_cnn):
    from harness_saliency import IntegratedGradients

    ctx = digits_context(digits_cnn, target=4)
    technique = ExpectedGradients(target=4, samples=2000, references=6)
    others = technique.baselines(ctx)
    found, _ = technique.attribute(ctx, others)
    integrated = torch.stack(
        [
            IntegratedGradients(target=4, steps=50).attribute(digits_context(digits_cnn, target=4), other.expand_as(ctx.images))
            for other in others
        ]
    ).mean(0)
    assert torch.nn.functional.cosine_similarity(found.flatten(1), integrated.flatten(1)).min() > 0.98


def test_baselines_are_of_the_whole_dataset(digits_cnn):
    ctx = digits_context(digits_cnn)
    assert len(ExpectedGradients(references=8).baselines(ctx)) == 8
    assert len(ExpectedGradients(references=10_000).baselines(ctx)) == len(ctx.dataset.whole) == 360
