"""nearest_neighbors and features against brute force, scikit-learn and captum."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from captum.influence import SimilarityInfluence
from captum.influence._core.similarity_influence import euclidean_distance
from sklearn.neighbors import NearestNeighbors as SklearnNeighbors

from harness import NotApplicable
from harness.context import to_images
from harness.datasets import load_dataset
from harness.testing import run_once, small_dataset
from harness_representations import Features, NearestNeighbors
from harness_representations.nearest_neighbors import quality
from harness_representations.search import nearest, vote


def brute(queries, database, k, skip=None):
    d = ((queries[:, None, :].astype(np.float64) - database[None].astype(np.float64)) ** 2).sum(2)
    if skip is not None:
        d[np.arange(len(queries)), skip] = np.inf
    order = np.argsort(d, axis=1, kind="stable")[:, :k]  # stable: ties by index
    return order, np.sqrt(np.take_along_axis(d, order, 1))


ENGINES = ["blocks", *(["faiss"] if find_spec("faiss") else [])]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", range(3))
def test_equals_brute_force_with_ties(seed, engine):
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 3, (300, 5)).astype(np.float32)  # many equal distances and duplicates
    indices, distances = nearest(data, data, 7, np.arange(300), engine=engine)
    expected, d = brute(data, data, 7, np.arange(300))
    assert np.array_equal(indices, expected)
    np.testing.assert_allclose(distances, d, rtol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("offset", "scale", "width"), [(1e4, 1e-3, 8), (100, 1, 1500), (0, 1e-6, 40)])
def test_rounding_does_not_change_the_order(offset, scale, width, engine):
    """Far from the origin |q|^2 + |x|^2 - 2qx loses what tells neighbours apart."""
    rng = np.random.default_rng(0)
    data = offset + rng.normal(size=(200, width)) * scale
    assert np.array_equal(nearest(data, data, 5, np.arange(200), engine=engine)[0], brute(data, data, 5, np.arange(200))[0])


def test_more_equals_than_candidates():
    """Forty copies of one row: the five of lowest index are the neighbours, wherever the first candidates lie."""
    data = np.random.default_rng(3).normal(size=(120, 6)).astype(np.float32)
    data[60:100] = data[50]
    assert nearest(data[50:51], data, 5, np.array([50]))[0].tolist() == [[60, 61, 62, 63, 64]]


def test_more_neighbours_than_rows():
    data = np.zeros((4, 2), np.float32)
    assert nearest(data, data, 3, np.arange(4))[0].tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    with pytest.raises(ValueError, match="4 neighbours of 4 rows"):
        nearest(data, data, 4, np.arange(4))


def test_blocks_do_not_matter(monkeypatch):
    from harness_representations import search

    rng = np.random.default_rng(1)
    data = rng.normal(size=(60, 4)).astype(np.float32)
    whole = nearest(data, data, 3)
    monkeypatch.setattr(search, "BLOCK_BYTES", 8 * 60 * 7)  # seven queries at once
    monkeypatch.setattr(search, "CHUNK", 3)
    assert np.array_equal(nearest(data, data, 3)[0], whole[0])


def test_self_is_first_at_distance_zero():
    data = np.random.default_rng(2).normal(size=(30, 6)).astype(np.float32)
    indices, distances = nearest(data, data, 2)
    assert np.array_equal(indices[:, 0], np.arange(30))
    assert not distances[:, 0].any()


def test_equals_scikit_learn_on_the_digits(registry):
    data = load_dataset("digits", registry)
    x = data.pictures(registry.model("digits_cnn").input).reshape(len(data), -1).astype(np.float64) / 255
    distances, _ = SklearnNeighbors(n_neighbors=5, metric="euclidean", algorithm="brute").fit(x).kneighbors(x[:200])
    np.testing.assert_allclose(nearest(x[:200], x, 5)[1][:, 1:], distances[:, 1:], rtol=1e-5)


def test_vote_prefers_the_nearest_among_equals():
    assert vote(np.array([[2, 1, 1, 2, 0], [3, 3, 1, 1, 1], [4, 0, 1, 2, 3]]), 5).tolist() == [2, 1, 4]


def test_quality_by_hand():
    labels = np.array([0, 0, 0, 1, 1])
    indices = np.array([[1, 3], [0, 2], [3, 4], [4, 0], [0, 1]])
    same = np.bincount(labels)[labels] - 1
    found = quality(indices, labels, np.arange(5), same)
    assert found["precision"].tolist() == [0.5, 1, 0, 0.5, 0]
    assert found["recall"].tolist() == [0.5, 1, 0, 1, 0]
    assert found["vote_accuracy"].tolist() == [1, 1, 0, 1, 0]


def test_features_are_what_the_last_layer_receives(digits_cnn):
    data = small_dataset(9)
    features = run_once(Features(), digits_cnn, data, max_batch=4).artifacts[0].data["features"]
    assert features.shape == (9, 64)
    last = digits_cnn.modules["classifier.3"]
    logits = torch.tensor(features) @ last.weight.T + last.bias
    with torch.no_grad():
        torch.testing.assert_close(logits, digits_cnn(to_images(data.pictures(digits_cnn.input), digits_cnn.device)), rtol=1e-5, atol=1e-5)


def test_features_of_a_map_are_averaged_over_positions(digits_cnn):
    data = small_dataset(3)
    found = run_once(Features(layer="features.5"), digits_cnn, data).artifacts[0].data["features"]
    images = to_images(data.pictures(digits_cnn.input), digits_cnn.device)
    with torch.no_grad():
        expected = digits_cnn.activations(images, ["features.5"])["features.5"].mean((2, 3))
    torch.testing.assert_close(torch.tensor(found), expected)


def test_pixels_are_a_space_too(digits_cnn):
    found = run_once(Features(layer="pixels"), digits_cnn, small_dataset(3)).artifacts[0].data["features"]
    assert found.shape == (3, 64)


def test_feature_precision_is_above_pixel_precision_on_unseen_digits(registry, digits_cnn):
    result = run_once(NearestNeighbors(), digits_cnn, load_dataset("digits_test", registry), max_batch=128)
    found = {m.name: m.value for m in result.metrics}
    assert found["precision.features"] > found["precision.pixels"] > 0.8
    assert found["vote_accuracy.features"] >= found["vote_accuracy.pixels"]
    assert 0 < found["neighbours_differ"] < 1


def test_captum_finds_the_same(digits_cnn, tmp_path):
    data = small_dataset(12)
    result = run_once(NearestNeighbors(k=3), digits_cnn, data)
    ours = next(a for a in result.artifacts if a.name == "neighbours").data["features.indices"]
    images = to_images(data.pictures(digits_cnn.input), digits_cnn.device)
    normalised = digits_cnn.normalise(images)
    peer = SimilarityInfluence(
        digits_cnn.module, "classifier.2", torch.utils.data.TensorDataset(normalised), str(tmp_path), "digits",
        # captum 0.9 hands its metric a list of one tensor where it documents the tensor
        similarity_metric=lambda a, b: euclidean_distance(a[0] if isinstance(a, list) else a, b),
        similarity_direction="min", batch_size=12,
    )  # fmt: skip
    theirs = peer.influence(normalised, top_k=4)["classifier.2"][0]
    assert np.array_equal(np.asarray(theirs)[:, 1:], ours)


def test_duplicate_pictures_are_neighbours_at_distance_zero(digits_cnn, registry):
    data = load_dataset("digits", registry).select(indices=[0, 0, 1, 2])
    result = run_once(NearestNeighbors(k=1), digits_cnn, data)
    arrays = next(a for a in result.artifacts if a.name == "neighbours").data
    assert arrays["pixels.indices"][:2, 0].tolist() == [1, 0]
    assert arrays["pixels.distances"][0, 0] == 0


def test_numbers_may_rest_on_some_of_the_pictures(digits_cnn):
    """Two of twelve as queries: rows 0 and 6 of what all of them give."""
    data = small_dataset(12)
    whole, some = (run_once(NearestNeighbors(k=3, measured=n), digits_cnn, data) for n in (1000, 2))
    arrays = [next(a for a in r.artifacts if a.name == "neighbours").data for r in (whole, some)]
    assert arrays[1]["queries"].tolist() == [0, 6]
    for name in ("pixels.indices", "features.indices"):
        assert np.array_equal(arrays[1][name], arrays[0][name][[0, 6]])
    values = [next(m for m in r.metrics if m.name == "neighbours_differ").per_image for r in (whole, some)]
    assert values[1] == (values[0][0], values[0][6])


def test_larger_pictures_are_averaged_for_pixel_distances(digits_cnn):
    """Side 1: the mean grey alone decides."""
    data = small_dataset(12)
    arrays = next(a for a in run_once(NearestNeighbors(k=2, pixel_size=1), digits_cnn, data).artifacts if a.name == "neighbours").data
    means = data.pictures(digits_cnn.input).mean((1, 2, 3), keepdims=True).reshape(12, 1).astype(np.float32)
    assert np.array_equal(arrays["pixels.indices"], brute(means, means, 2, np.arange(12))[0])


def test_features_that_are_not_numbers_are_told(registry):
    from harness import HarnessError
    from harness.models import load_model

    model = load_model("digits_cnn@random", registry)
    model.modules["features.0"].weight.data[0] = torch.nan
    with pytest.raises(HarnessError, match="not finite for 12 of 12 pictures, first 'digit-0000'"):
        run_once(Features(), model, small_dataset(12))


def test_too_few_pictures(digits_cnn):
    """A folder of five has four neighbours each; what was asked for was a profile's number."""
    result = run_once(NearestNeighbors(), digits_cnn, small_dataset(5))
    assert result.notes[0] == "4 neighbours and not 5, as there are 5 pictures"
    arrays = next(a for a in result.artifacts if a.name == "neighbours")
    assert arrays.data["features.indices"].shape == (5, 4)
    with pytest.raises(NotApplicable, match="at least two pictures"):
        run_once(NearestNeighbors(), digits_cnn, small_dataset(1))


def test_without_labels_there_are_neighbours_but_no_precision(digits_cnn):
    from dataclasses import replace

    data = replace(small_dataset(), labels=None, classes=())
    result = run_once(NearestNeighbors(k=2), digits_cnn, data)
    assert [m.name for m in result.metrics] == ["neighbours_differ"]
    assert "no labels" in result.notes[0]
