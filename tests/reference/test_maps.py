"""pca_map, tsne_map, image_grid and embedding_geometry against closed forms, brute force, scikit-learn and openTSNE."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from sklearn.decomposition import PCA
from sklearn.manifold import _t_sne, trustworthiness

from harness import Arrays, ConfigError, NotApplicable
from harness.context import Context
from harness.datasets import Dataset, load_dataset
from harness.registry import InputSpec
from harness.testing import run_once, small_dataset
from harness_representations import EmbeddingGeometry, ImageGrid, PcaMap, TsneMap
from harness_representations.embedding_geometry import ancestors, between, hierarchy, relabel, separation, wordnet_distances
from harness_representations.image_grid import (
    adjacent_distance,
    adjacent_share,
    cells,
    closest_block,
    nearest_to,
    unique,
    unit_square,
)
from harness_representations.maps import one_nn_accuracy, principal, stamps, trust
from harness_representations.tsne_map import embed


def artifact(result, name):
    return next(a for a in result.artifacts if a.name == name)


def values(result):
    return {m.name: m.value for m in result.metrics}


def given(model, dataset, features, technique, **results):
    """A context whose features are the ones given."""
    found = {"features": {"features": Arrays("features", {"features": np.asarray(features, np.float32)})}, **results}
    return Context(model, ids=dataset.ids, dataset=dataset, technique=technique, results=found)


@pytest.fixture(scope="module")
def digit_features(digits_cnn, registry):
    from harness_representations import Features

    data = load_dataset("digits_test", registry).select(180)
    return data, run_once(Features(), digits_cnn, data, max_batch=128).artifacts[0].data["features"]


# -- PCA ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(60, 12), (12, 60)])  # by the covariance, and by the singular values themselves
def test_axes_are_those_of_the_singular_values(shape):
    x = np.random.default_rng(0).normal(size=shape) @ np.diag(np.linspace(1, 4, shape[1]))
    points, pca = principal(x, 6)
    centred = x - x.mean(0)
    _, scale, axes = np.linalg.svd(centred, full_matrices=False)
    assert (np.abs((pca.components_ * axes[:6]).sum(1)) > 1 - 1e-6).all()
    # what is left out is the sum of the dropped eigenvalues
    residual = np.square(centred - points @ pca.components_).sum()
    assert residual == pytest.approx(np.square(scale[6:]).sum(), rel=1e-8)
    theirs = PCA(6).fit_transform(x)
    np.testing.assert_allclose(np.abs(points), np.abs(theirs), atol=1e-5)


def test_the_map_of_pictures(digits_cnn, digit_features):
    data, features = digit_features
    result = PcaMap().run(given(digits_cnn, data, features, "pca_map"))
    expected = PCA(2).fit(features.astype(np.float64))
    assert values(result)["explained_2d"] == pytest.approx(expected.explained_variance_ratio_.sum(), rel=1e-6)
    found = artifact(result, "map")
    assert found.groups == tuple("0123456789")
    assert len(found.pictures) == len(found.pictured) > 10
    curve = next(iter(artifact(result, "explained").lines.values()))
    assert (np.diff(curve) >= 0).all()
    assert curve[-1] <= 1 + 1e-9
    assert values(result)["nearest_accuracy.features"] > values(result)["nearest_accuracy.map"] > 0.3


def test_one_dimension_is_a_line(digits_cnn):
    data = small_dataset(6)
    result = PcaMap().run(given(digits_cnn, data, np.arange(6.0)[:, None], "pca_map"))
    assert not artifact(result, "map").points[:, 1].any()
    assert values(result)["explained_2d"] == pytest.approx(1)


# -- what maps share -----------------------------------------------------------------------------------------------------


def test_trustworthiness_and_nearest_accuracy_by_hand():
    line = np.arange(30.0)[:, None] * np.ones((1, 3))
    flat = np.hstack([np.arange(30.0)[:, None], np.zeros((30, 1))])
    assert trust(line, flat) == 1
    mixed = flat[np.random.default_rng(0).permutation(30)]
    assert trust(line, mixed) == pytest.approx(trustworthiness(line, mixed, n_neighbors=12))
    assert trust(line, mixed) < 0.8
    points = np.array([[0.0, 0], [0.1, 0], [5, 0], [5.2, 0], [9, 0]])
    assert one_nn_accuracy(points, np.array([0, 0, 1, 1, 2])) == 1  # the last has no other of its class
    assert one_nn_accuracy(points, np.array([0, 1, 0, 1, 2])) == 0
    assert one_nn_accuracy(points, np.arange(5)) is None
    assert one_nn_accuracy(points, np.zeros(5, int)) is None


def test_stamps_do_not_cover_one_another():
    points = np.random.default_rng(0).random((300, 2)) * [7, 3]
    chosen = stamps(points, 40, 0.1)
    assert 10 < len(chosen) <= 40
    places = points[chosen] / np.ptp(points, axis=0).max()
    apart = np.abs(places[:, None] - places[None]).max(2)[np.triu_indices(len(chosen), 1)]
    assert apart.min() >= 0.1
    assert stamps(np.zeros((4, 2)), 10) == [0]


# -- t-SNE ---------------------------------------------------------------------------------------------------------------


def test_rows_have_the_perplexity_asked_for(digit_features):
    """2^H(P_i) = perplexity; P is symmetric and sums to 1: what the library minimises is the paper's."""
    from scipy.spatial.distance import pdist, squareform

    points, _ = principal(digit_features[1][:120], 50)
    squared = squareform(pdist(points)).astype(np.float32) ** 2
    conditional = _t_sne._utils._binary_search_perplexity(squared, 20.0, 0)
    entropy = -(conditional * np.log2(np.maximum(conditional, 1e-30))).sum(1)
    np.testing.assert_allclose(2**entropy, 20, atol=1e-3 * 20)
    joint = squareform(_t_sne._joint_probabilities(squared, 20.0, 0))
    assert joint.sum() == pytest.approx(1, abs=1e-6)
    assert np.array_equal(joint, joint.T)


def test_the_gradient_is_that_of_the_divergence():
    """4 sum_j (p_ij - q_ij)(y_i - y_j) / (1 + ||y_i - y_j||^2), against finite differences of KL(P || Q)."""
    from scipy.spatial.distance import pdist

    rng = np.random.default_rng(0)
    joint = _t_sne._joint_probabilities(np.square(np.float32(_square(rng.normal(size=(15, 4))))), 4.0, 0)
    y = rng.normal(size=(15, 2))

    def divergence(flat):
        q = 1 / (1 + pdist(flat.reshape(15, 2)) ** 2)
        q = q / (2 * q.sum())
        return 2 * float(joint @ np.log(joint / q))

    value, gradient = _t_sne._kl_divergence(y.ravel().copy(), joint, 1, 15, 2)
    assert value == pytest.approx(divergence(y.ravel()), abs=1e-6)
    for i in (0, 7, 22):
        step = np.zeros(30)
        step[i] = 1e-6
        difference = (divergence(y.ravel() + step) - divergence(y.ravel() - step)) / 2e-6
        assert gradient[i] == pytest.approx(difference, abs=1e-5)


def _square(x):
    from scipy.spatial.distance import pdist, squareform

    return squareform(pdist(x))


def test_more_iterations_do_not_raise_the_divergence(digit_features):
    points, _ = principal(digit_features[1][:120], 50)
    found = [embed(points, 20, n, 0)[1] for n in (300, 600)]
    assert found[0] >= found[1] - 1e-3


@pytest.mark.skipif(not find_spec("openTSNE"), reason="needs openTSNE")
def test_both_libraries_reach_the_same_divergence(digit_features):
    points, _ = principal(digit_features[1], 50)
    ours, theirs = embed(points, 20, 750, 0)[1], embed(points, 20, 750, 0, engine="openTSNE")[1]
    assert ours == pytest.approx(theirs, rel=0.05)


def test_the_map_keeps_neighbours_better_than_pca(digits_cnn, digit_features):
    data, features = digit_features
    result = TsneMap(seeds=2, iterations=300).run(given(digits_cnn, data, features, "tsne_map"))
    found = values(result)
    assert found["trustworthiness.tsne"] > found["trustworthiness.pca"] + 0.02
    assert found["nearest_accuracy.tsne"] > found["nearest_accuracy.pca"] + 0.1
    assert [row[:3] for row in artifact(result, "settings").rows] == [
        (30.0, "PCA", 0),
        (5.0, "PCA", 0),
        (50.0, "PCA", 0),
        (30.0, "noise", 1),
    ]
    assert {"tsne", "pca", "perplexity_5", "perplexity_50", "seed_1"} <= {a.name for a in result.artifacts}


def test_the_same_seed_gives_the_same_bits_and_another_start_does_not(digit_features):
    points, _ = principal(digit_features[1][:60], 50)
    one, again, other = (embed(points, 10, 300, seed, noise=True)[0] for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.allclose(one, other)


def test_a_perplexity_that_the_pictures_do_not_allow_is_lowered_and_said(digits_cnn):
    data = small_dataset(12)
    rng = np.random.default_rng(0)
    result = TsneMap(iterations=250, seeds=1).run(given(digits_cnn, data, rng.normal(size=(12, 5)), "tsne_map"))
    assert [row[0] for row in artifact(result, "settings").rows] == pytest.approx([11 / 3])
    assert "12 pictures allow a perplexity of at most 3.67" in result.notes[0]


@pytest.mark.parametrize("technique", [PcaMap(), TsneMap(iterations=250, seeds=1)])
def test_maps_of_odd_features(technique, digits_cnn, registry):
    data = small_dataset(8)
    with pytest.raises(NotApplicable, match="all 8 pictures have the same features"):
        technique.run(given(digits_cnn, data, np.ones((8, 3)), technique.name))
    with pytest.raises(NotApplicable, match="a map needs at least [35] pictures"):
        technique.run(given(digits_cnn, small_dataset(2), np.random.default_rng(0).normal(size=(2, 3)), technique.name))
    twins = np.random.default_rng(0).normal(size=(4, 3)).repeat(2, 0)
    twins[:, 1] = 0.25  # a feature that never changes
    assert np.isfinite(
        artifact(
            technique.run(given(digits_cnn, data, twins, technique.name)),
            technique.name.removesuffix("_map") if technique.name == "tsne_map" else "map",
        ).points
    ).all()
    one = replace(data, labels=np.zeros(8, np.int64), classes=("only",))
    assert not any("nearest_accuracy" in m.name for m in technique.run(given(digits_cnn, one, twins, technique.name)).metrics)
    bare = replace(data, labels=None, classes=())
    assert technique.run(given(digits_cnn, bare, twins, technique.name)).metrics


# -- image_grid ----------------------------------------------------------------------------------------------------------


def test_assignments_are_optimal_and_nearest_is_brute_force():
    rng = np.random.default_rng(0)
    places, centres = unit_square(rng.normal(size=(40, 2))), cells(5)
    assert centres[0].tolist() == [0.1, 0.1]
    assert centres[1].tolist() == pytest.approx([0.3, 0.1])  # row by row
    near = nearest_to(places, centres)
    cost = ((centres[:, None] - places[None]) ** 2).sum(2)
    assert np.array_equal(near, cost.argmin(1))
    chosen = unique(places, centres)
    assert len(set(chosen.tolist())) == 25
    ours = cost[np.arange(25), chosen].sum()
    rows, columns = linear_sum_assignment(cost)
    assert ours == pytest.approx(cost[rows, columns].sum())
    greedy, free = 0.0, set(range(40))
    for i in range(25):
        best = min(free, key=lambda j: cost[i, j])
        greedy += cost[i, best]
        free.remove(best)
    assert ours <= greedy
    few = unique(places[:10], centres)
    assert sorted(few[few >= 0].tolist()) == list(range(10))
    assert (few == -1).sum() == 15


def test_the_grid_shows_the_pictures_in_their_cells(digits_cnn):
    data = small_dataset(9)
    spots = np.array([[x, y] for y in range(3) for x in range(3)], float)[::-1]
    maps = {"tsne_map": {"maps": Arrays("maps", {"points": spots})}}
    technique = ImageGrid(detail=2, cell=8)
    result = technique.run(given(digits_cnn, data, spots, "image_grid", **maps))
    assert artifact(result, "cells").data["pictures"].ravel().tolist() == list(range(8, -1, -1))
    grid, pixels = artifact(result, "grid").data[0, 0], data.pictures(digits_cnn.input)[..., 0] / 255
    np.testing.assert_allclose(grid[:8, 8:16], pixels[7], atol=1e-6)
    np.testing.assert_allclose(grid[16:, :8], pixels[2], atol=1e-6)
    assert artifact(result, "grid").zoom
    assert artifact(result, "detail").data.shape == (1, 1, 16, 16)


def test_grid_numbers_by_hand():
    grid = np.array([[0, 1], [2, -1]])
    features = np.array([[0.0], [1], [3]])
    # neighbours: 0-1 and 0-2, distances 1 and 3; all pairs: 1, 3, 2
    assert adjacent_distance(features, grid) == pytest.approx(2 / 2)
    same, base = adjacent_share(np.array([4, 4, 5]), grid)
    assert (same, base) == (0.5, pytest.approx(1 / 3))
    block = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    away = np.arange(9.0)[:, None] ** 3
    assert closest_block(away, block, 2) == (0, 0)
    assert closest_block(away[::-1], block, 2) == (1, 1)


def test_neighbours_on_the_grid_of_digits_are_alike(digits_cnn, registry):
    result = run_once(ImageGrid(), digits_cnn, load_dataset("digits_test", registry).select(150), max_batch=150)
    found = {m.name: m for m in result.metrics}
    assert found["neighbour_distance"].value < 0.6
    assert found["neighbour_same_class"].value > 0.6
    assert float(found["neighbour_same_class"].detail.split()[0]) < 0.15


def test_what_the_grid_refuses(digits_cnn):
    with pytest.raises(ConfigError, match="60 x 60 cells are more than the 2500"):
        ImageGrid.build({"side": 60})
    result = run_once(ImageGrid(side=4, mode="nearest"), digits_cnn, small_dataset(8))
    assert (artifact(result, "cells").data["pictures"] >= 0).all()


# -- embedding_geometry --------------------------------------------------------------------------------------------------


def test_imagenets_hierarchy():
    above, classes = hierarchy()
    assert sorted(classes) == list(range(1000))
    roots = [name for name, parents in above.items() if not parents]
    assert roots == ["n00001740"]  # entity
    assert all("n00001740" in ancestors(s) for s in classes.values())
    wolf, husky, malamute, flamingo, cup = 269, 250, 249, 130, 968
    d = wordnet_distances([wolf, husky, malamute, flamingo, cup])
    assert np.array_equal(d, d.T)
    assert not np.diag(d).any()
    assert d[0, 1] < d[0, 3] < d[0, 4]  # a wolf is nearer to a husky than to a flamingo, than to a cup
    # timber wolf - wolf - canine - dog - ... as WordNet has it: brute force over all common ancestors
    one, other = ancestors(classes[wolf]), ancestors(classes[husky])
    assert d[0, 1] == min(one[a] + other[a] for a in one.keys() & other.keys())


def test_distances_and_separation_by_hand():
    means = np.array([[1.0, 0], [0, 1], [-1, 0]])
    np.testing.assert_allclose(between(means, "cosine"), [[0, 1, 2], [1, 0, 1], [2, 1, 0]], atol=1e-12)
    assert between(means, "euclidean")[0, 2] == 2
    np.testing.assert_allclose(between(means + 7, "correlation"), between(means, "correlation"), atol=1e-9)
    features = np.array([[0.0], [2], [10], [12]])
    assert separation(features, np.array([0, 0, 1, 1]), np.array([[1.0], [11]])) == pytest.approx(10)
    with pytest.raises(ConfigError, match="no direction for cosine; use euclidean"):
        between(np.array([[0.0, 0], [1, 1]]), "cosine")


def test_a_tree_follows_its_leaves():
    from scipy.cluster.hierarchy import cophenet, leaves_list, linkage

    x = np.random.default_rng(0).normal(size=(9, 3))
    tree = linkage(x, "average", optimal_ordering=True)
    order = leaves_list(tree)
    moved = relabel(tree, order)
    assert leaves_list(moved).tolist() == list(range(9))
    from scipy.spatial.distance import squareform

    np.testing.assert_allclose(squareform(cophenet(moved)), squareform(cophenet(tree))[np.ix_(order, order)])


def test_planted_geometry_is_found(digits_cnn):
    """Four classes in two pairs: the nearest class is the other of the pair, and the matrix puts them side by side."""
    labels = np.repeat(np.arange(4), 3)
    places = np.array([[10.0, 0], [0, 10], [10, 1], [1, 10]])
    features = places[labels] + np.random.default_rng(0).normal(size=(12, 2)) * 0.01
    data = replace(small_dataset(12), labels=labels, classes=("a", "b", "c", "d"))
    result = EmbeddingGeometry(distance="euclidean").run(given(digits_cnn, data, features, "embedding_geometry"))
    assert {row[0]: row[2] for row in artifact(result, "nearest_classes").rows} == {"a": "c", "c": "a", "b": "d", "d": "b"}
    shown = artifact(result, "distances")
    assert set(shown.rows[:2]) in ({"a", "c"}, {"b", "d"})
    assert values(result)["separation"] > 100
    assert "labels are not ImageNet's" in result.notes[0]


def test_features_that_follow_wordnet_correlate_with_it(squeezenet, registry):
    """Classes placed by multidimensional scaling of the WordNet distances: the correlation is nearly one; shuffled, none."""
    from sklearn.manifold import MDS

    wanted = list(range(0, 1000, 40))
    names = squeezenet.classes
    data = Dataset("kinds", [str(i) for i in wanted], lambda i: Image.new("RGB", (8, 8)), "x" * 64, np.asarray(wanted), names)
    places = MDS(8, metric="precomputed", random_state=0, n_init=1, init="random").fit_transform(wordnet_distances(wanted))

    def correlation(features):
        ctx = given(squeezenet, data, features, "embedding_geometry")
        ctx._labels = torch.tensor(wanted)
        return values(EmbeddingGeometry(distance="euclidean").run(ctx))["wordnet_correlation"]

    assert correlation(places) > 0.8
    assert abs(correlation(places[np.random.default_rng(0).permutation(len(wanted))])) < 0.3


def test_real_classes_near_in_meaning_are_near_in_the_layer(squeezenet, registry):
    result = run_once(EmbeddingGeometry(), squeezenet, load_dataset("imagenet_samples", registry))
    found = {m.name: m for m in result.metrics}
    assert found["wordnet_correlation"].value > 0.1
    assert found["wordnet_of_nearest"].value < float(found["wordnet_of_nearest"].detail.split()[0])


def test_what_geometry_refuses(digits_cnn):
    data = small_dataset(6)
    features = np.random.default_rng(0).normal(size=(6, 3))
    one = replace(data, labels=np.zeros(6, np.int64), classes=("only",))
    with pytest.raises(NotApplicable, match="those of one only"):
        EmbeddingGeometry().run(given(digits_cnn, one, features, "embedding_geometry"))
    with pytest.raises(NotApplicable, match="labelled"):
        EmbeddingGeometry().run(given(digits_cnn, replace(data, labels=None, classes=()), features, "embedding_geometry"))
    two = replace(data, labels=np.arange(6) % 2, classes=("a", "b"))
    result = EmbeddingGeometry().run(given(digits_cnn, two, features, "embedding_geometry"))
    assert artifact(result, "distances").tree is None


def test_the_input_spec_of_thumbnails_is_kept_small(digits_cnn):
    from harness_representations.maps import thumbnails

    ctx = given(digits_cnn, small_dataset(3), np.eye(3), "pca_map")
    assert thumbnails(ctx, [0, 2], 40).shape == (2, 1, 8, 8)
    assert thumbnails(ctx, [1], 4).shape == (1, 1, 4, 4)
    assert isinstance(digits_cnn.input, InputSpec)


def test_one_feature_is_a_line_for_tsne_too(digits_cnn):
    data = small_dataset(8)
    result = TsneMap(iterations=250, seeds=1).run(given(digits_cnn, data, np.arange(8.0)[:, None], "tsne_map"))
    assert np.isfinite(artifact(result, "tsne").points).all()


def test_the_detail_is_not_where_nothing_is():
    """Sixty pictures in a hundred cells, many features: the empty corner is not the part where neighbours are most alike."""
    features = np.random.default_rng(0).normal(size=(60, 512))
    grid = np.full(100, -1)
    grid[:60] = np.arange(60)
    top, _ = closest_block(features, grid.reshape(10, 10), 4)
    assert top <= 2


def test_twins_have_no_separation_and_siblings_no_order(squeezenet, digits_cnn):
    data = replace(small_dataset(6), labels=np.repeat([0, 1, 2], 2), classes=("a", "b", "c"))
    features = np.random.default_rng(0).normal(size=(3, 4)).repeat(2, 0)
    result = EmbeddingGeometry(distance="euclidean").run(given(digits_cnn, data, features, "embedding_geometry"))
    assert "separation" not in values(result)
    assert any("same features" in note for note in result.notes)
    kin = [151, 152, 153]  # three toy dogs, equally far from one another
    distances = wordnet_distances(kin)
    assert len(set(distances[np.triu_indices(3, 1)])) == 1
    names = squeezenet.classes
    dogs = Dataset("dogs", ["a", "b", "c"], lambda i: Image.new("RGB", (8, 8)), "x" * 64, np.asarray(kin), names)
    ctx = given(squeezenet, dogs, np.random.default_rng(1).normal(size=(3, 4)), "embedding_geometry")
    ctx._labels = torch.tensor(kin)
    result = EmbeddingGeometry(distance="euclidean").run(ctx)
    assert "wordnet_correlation" not in values(result)
    assert any("no order" in note for note in result.notes)
