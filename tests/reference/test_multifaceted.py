"""Facets against scikit-learn, the released schedule, and what the paper says of them, on real digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from harness import ConfigError
from harness import optimise as o
from harness.context import Context, Draws
from harness.testing import load_dataset, run_once
from harness_synthesis import Multifaceted
from harness_synthesis.multifaceted import PHASES, between, climb, facets, fidelity, plane, resized, scheduled, spread_apart


@pytest.fixture(scope="module")
def digits(registry):
    return load_dataset("digits", registry)


def table(result, name):
    return next(a for a in result.artifacts if a.name == name)


def test_groups_are_k_means_with_the_nearest_first():
    from sklearn.cluster import KMeans

    points = np.random.default_rng(0).normal(size=(200, 2)) + np.repeat([[0, 0], [9, 0], [0, 9], [9, 9]], 50, axis=0)
    found = facets(points, 4, 1)
    assert sorted(np.concatenate(found)) == list(range(200))
    assert [len(f) for f in found] == sorted((len(f) for f in found), reverse=True)
    inertia = 0.0
    for members in found:
        centre = points[members].mean(0)
        far = np.linalg.norm(points[members] - centre, axis=1)
        assert (np.diff(far) >= -1e-9).all()
        inertia += float(np.square(far).sum())
    assert inertia <= 1.01 * KMeans(4, n_init=20, random_state=5).fit(points).inertia_
    assert {frozenset(f) for f in found} == {frozenset(range(k, k + 50)) for k in (0, 50, 100, 150)}


def test_fewer_distinct_pictures_than_facets():
    found = facets(np.zeros((5, 3)), 4, 0)
    assert len(found) == 1 and len(found[0]) == 5
    assert plane(np.zeros((1, 4)), "tsne", 0).shape == (1, 1)
    assert plane(np.random.default_rng(0).normal(size=(6, 4)), "tsne", 0).shape == (6, 2)  # too few for t-SNE


def test_a_start_is_the_mean_of_the_pictures_nearest_to_the_centre(digits_cnn, digits):
    technique = Multifaceted(classes=(4,), facets=3, nearest=5, steps=0, plane="pca")
    result = run_once(technique, digits_cnn, digits)
    sheet = table(result, "class-4")
    nearest, means, made = sheet.data[:3], sheet.data[3:6], sheet.data[6:9]
    own = digits.select(indices=np.flatnonzero(digits.labels == 4))
    images = torch.from_numpy(own.pictures(digits_cnn.input)).permute(0, 3, 1, 2).float() / 255
    features = digits_cnn.embedding(images).numpy()
    ctx = Context(digits_cnn, dataset=digits, technique="multifaceted")
    groups = technique._facets(ctx, features, 4)
    for k, members in enumerate(groups):
        mean = images[members[:5].tolist()].mean(0)
        np.testing.assert_allclose(means[k], mean, atol=0.5 / 255 + 1e-6)
        np.testing.assert_allclose(nearest[k], images[members[0]], atol=0.5 / 255 + 1e-6)
    np.testing.assert_array_equal(made, means)  # no step was made


def test_the_schedule_is_the_released_one():
    assert [p.steps for p in scheduled(370)] == [190, 150, 20, 10]
    assert [p.steps for p in scheduled(37)] == [19, 15, 2, 1] and sum(p.steps for p in scheduled(13)) == 13
    first, second, third, _ = PHASES
    for i in (0, 7, 149):  # as the release is written
        assert between(first.step, i, 190) == pytest.approx(1 + ((2 - 1) * i) / 190)
        assert fidelity(second, i) == pytest.approx(0.01 - (0.01 - 2 * i) / 150)
    assert third.margin * 227 == pytest.approx(50) and second.scale == 1.2
    short = scheduled(37)[1]
    assert fidelity(short, 3) == pytest.approx(fidelity(second, 30))


def test_the_steps_are_written_out(digits_cnn, monkeypatch):
    """The first phase by hand: whole pictures (nothing to crop), size over the mean of |g|, clipped, then denoised from where that stood."""
    from harness.optimise.operators import total_variation_denoised

    start = torch.rand((2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    ctx = Context(digits_cnn, technique="multifaceted")
    found = climb(ctx, 3, start, ["a", "b"], scheduled(370), 5, 0.0, None)
    x, dual = start, (torch.zeros_like(start), torch.zeros_like(start))
    for i in range(5):
        leaf = x.clone().requires_grad_()
        gradient = torch.autograd.grad(digits_cnn(leaf)[:, 3].sum(), leaf)[0]
        x = x + (1 + i / 190) / 255 * gradient / gradient.abs().mean((1, 2, 3), keepdim=True)
        x = total_variation_denoised(x.clamp(0, 1), 8 / 227 / 255 / (0.4 - (0.4 - 0.4 * i) / 190), 2 if i else 20, dual)
    torch.testing.assert_close(found.images, x, rtol=0, atol=1e-6)


def test_crops_are_drawn_about_the_middle_and_steps_reach_them_alone():
    draws = Draws(["a"], torch.device("cpu"), torch.float32, 0)
    x = torch.arange(1600.0).view(1, 1, 40, 40)
    corners = [divmod(int(o.Crop(20, 0.3)(x, draws)[0, 0, 0, 0]), 40) for _ in range(400)]
    rows = np.array(corners)
    assert rows.min() >= 0 and rows.max() <= 20
    assert abs(rows.mean() - 9.5) < 0.6 and 4.5 < rows.std() < 6.5  # 0.3 of 20, cut to whole pixels, kept inside
    leaf = x.clone().requires_grad_()
    inner = torch.autograd.grad(o.Focus(0.25)(leaf, draws).sum(), leaf)[0]
    assert float(inner.sum()) == 400 and float(inner[0, 0, 10:30, 10:30].min()) == 1
    assert torch.equal(o.Focus(0.25)(x, draws), x)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["digits_cnn", "digits_resnet"])
def test_facets_differ_more_than_random_starts(model, registry, digits):
    from harness.models import load_model

    results = [run_once(Multifaceted(count=10, facets=5), load_model(model, registry), digits, seed=seed) for seed in range(3)]
    every = [{m.name: m for m in found.metrics} for found in results]
    # A single class may fall either way, by the processor's rounding even: of many it is the greater part, and their mean each time.
    assert np.mean([found["facets_differ_more"].value for found in every]) > 0.5
    assert all(found["facets_apart"].value > 1.05 * found["random_apart"].value for found in every)
    result, metrics = results[0], every[0]
    assert metrics["facets_apart"].value > 1.1 * metrics["random_apart"].value
    assert metrics["probability"].value > 0.95
    assert metrics["random_probability"].value > 0.7  # else they would lie close together for not having started
    rows = table(result, "facets").rows
    assert len(rows) == 50 and len({row[0] for row in rows}) == 10
    per_class = {name: sum(row[2] for row in rows if row[0] == name) for name in {row[0] for row in rows}}
    assert sum(per_class.values()) == len(digits)


def test_distance_between_vectors():
    assert spread_apart(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])) == pytest.approx(10 / 3)


def test_a_folder_of_one_class(digits_cnn, digits, tmp_path, registry):
    """Pictures without labels: all are the named class's."""
    from PIL import Image

    for i in np.flatnonzero(digits.labels == 7)[:12]:
        Image.fromarray(np.asarray(digits.get(int(i)).convert("L"))).save(tmp_path / f"{i}.png")
    folder = load_dataset(str(tmp_path), registry)
    result = run_once(Multifaceted(classes=(7,), facets=2), digits_cnn, folder)
    assert sum(row[2] for row in table(result, "facets").rows) == 12
    predicted = run_once(Multifaceted(facets=2), digits_cnn, folder)
    assert table(predicted, "facets").rows[0][0] == "7"


@pytest.mark.parametrize("done", [5, 26, 46])
def test_going_on_is_as_if_it_had_not_stopped(done, digits_cnn, digits):
    settings = {"classes": (2,), "facets": 3, "plane": "pca"}
    whole = run_once(Multifaceted(**settings), digits_cnn, digits)
    rest = run_once(Multifaceted(go_on=done, **settings), digits_cnn, digits)
    np.testing.assert_array_equal(table(rest, "class-2").data, table(whole, "class-2").data)


def test_an_early_end_in_several_batches(digits_cnn, digits):
    settings = {"classes": (2,), "facets": 4, "plane": "pca", "converged": 0.3, "schedule": 200}
    whole = run_once(Multifaceted(**settings), digits_cnn, digits, max_batch=32)
    parts = run_once(Multifaceted(**settings), digits_cnn, digits, max_batch=3)
    np.testing.assert_allclose(table(parts, "class-2").data, table(whole, "class-2").data, atol=2 / 255)
    assert len(table(parts, "objective").x) == 200


def test_what_cannot_be(digits_cnn, digits, registry):
    with pytest.raises(ConfigError, match="classes 0 to 9"):
        run_once(Multifaceted(classes=(11,)), digits_cnn, digits)
    with pytest.raises(ConfigError, match="no picture of the dataset is labelled '5'"):
        run_once(Multifaceted(classes=(5,)), digits_cnn, digits.select(indices=np.flatnonzero(digits.labels == 3)))
    with pytest.raises(ConfigError, match="name that class in `classes`"):
        run_once(Multifaceted(members="all"), digits_cnn, digits)
    with pytest.raises(ConfigError, match="fewer than the 50 steps"):
        run_once(Multifaceted(classes=(2,), facets=2, plane="pca", go_on=60), digits_cnn, digits)
    with pytest.raises(ConfigError, match="no layer 'features.77'"):
        run_once(Multifaceted(layer="features.77"), digits_cnn, digits)
    assert resized(torch.zeros(1, 1, 4, 4), 4).shape == (1, 1, 4, 4)
