"""first_layer_filters: what is drawn is the weight, and the measures have closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from harness import NotApplicable
from harness.context import Context
from harness.models import LoadedModel, load_model
from harness.registry import InputSpec
from harness_weights import FirstLayerFilters
from harness_weights.gabor import coherence, gabor_fit, leading_component


def result_of(model, **params):
    return FirstLayerFilters(**params).run(Context(model, technique="first_layer_filters"))


def model_with(weight):
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], bias=False)
    conv.weight.data = torch.tensor(weight, dtype=torch.float32)
    return LoadedModel(nn.Sequential(conv), InputSpec(channels=weight.shape[1], size=32))


def gabor(size=11, angle=0.6, frequency=0.15, phase=0.3, sigma=2.0):
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    u = x * np.cos(angle) + y * np.sin(angle)
    return np.exp(-(x**2 + y**2) / (2 * sigma**2)) * np.cos(2 * np.pi * frequency * u + phase)


def test_pictures_are_an_affine_map_of_the_weights(squeezenet):
    result = result_of(squeezenet)
    drawn, weight = result.artifacts[0].data, squeezenet.modules["features.0"].weight.numpy()
    assert np.corrcoef(drawn.ravel().astype(np.float64), weight.ravel())[0, 1] == pytest.approx(1, abs=1e-12)
    assert drawn.max() <= 1
    assert drawn.min() >= 0
    assert np.array_equal(result.artifacts[2].data["weight"], weight)


def test_tile_i_j_is_filter_i_times_columns_plus_j(squeezenet):
    from harness_reports.colour import picture, sheet

    images = result_of(squeezenet).artifacts[0]
    page = sheet([picture(p) for p in images.data], images.columns, 2)
    i, j = 2, 5
    assert np.array_equal(page[i * 5 : i * 5 + 3, j * 5 : j * 5 + 3], picture(images.data[i * images.columns + j]))


def test_response_of_the_layer_to_its_own_filter_is_the_squared_norm(squeezenet):
    weight = squeezenet.modules["features.0"].weight
    response = nn.functional.conv2d(weight, weight).squeeze()
    torch.testing.assert_close(response.diagonal(), weight.square().sum((1, 2, 3)), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("alexnet", (64, 3, 11, 11)),
        ("resnet18", (64, 3, 7, 7)),
        ("densenet121", (64, 3, 7, 7)),
        ("googlenet", (64, 3, 7, 7)),
        ("squeezenet1_0", (96, 3, 7, 7)),
        ("mobilenet_v3_large", (16, 3, 3, 3)),
    ],
)
def test_first_layers_of_the_registrys_models(name, shape, registry, monkeypatch):
    monkeypatch.setattr("harness_weights.first_layer_filters.FITS", 2)
    result = result_of(load_model(f"{name}@random", registry))
    artifacts = {a.name: a for a in result.artifacts}
    assert artifacts["filters"].data.shape == shape
    assert artifacts["weights"].data["weight"].shape == shape
    assert len(artifacts["kinds"].rows) == shape[0]


@pytest.mark.slow
def test_only_some_filters_are_fitted_and_said():
    from harness_weights import first_layer_filters

    weight = np.random.default_rng(0).normal(size=(3 * first_layer_filters.FITS // 2, 3, 5, 5))
    result = result_of(model_with(weight))
    fitted = [row[-1] for row in result.artifacts[1].rows if row[-1] is not None]
    assert len(fitted) == first_layer_filters.FITS
    assert next(m for m in result.metrics if m.name == "gabor_r2").detail == f"{len(fitted)} filters"


def test_a_planted_set_is_counted_right():
    rng = np.random.default_rng(0)
    grey_gabor = np.repeat(gabor()[None], 3, 0)
    opponent = np.stack([gabor(frequency=0.0), -gabor(frequency=0.0), np.zeros((11, 11))])
    dead = rng.normal(size=(3, 11, 11)) * 1e-4
    blob = np.repeat(gabor(frequency=0.0)[None], 3, 0)
    found = {m.name: m.value for m in result_of(model_with(np.stack([grey_gabor, opponent, dead, blob]))).metrics}
    assert found["filters"] == 4
    assert found["oriented_share"] == 0.25
    assert found["colour_share"] == 0.25
    assert found["dead_share"] == 0.25
    assert found["gabor_r2"] > 0.99


def test_gabor_fit_tells_a_gabor_from_noise():
    for size, angle in [(7, 0.2), (7, 1.9), (11, 2.6)]:
        assert gabor_fit(gabor(size, angle, 0.2)) > 0.99
    rng = np.random.default_rng(1)
    noise = [gabor_fit(rng.normal(size=(7, 7))) for _ in range(8)]
    assert max(noise) < 0.75
    assert gabor_fit(np.zeros((7, 7))) == 0


def test_coherence_closed_forms():
    stripes = np.tile([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0], (7, 1))
    assert coherence(np.pad(stripes, 0)) > 0.9
    spot = np.zeros((7, 7))
    spot[3, 3] = 1
    assert coherence(spot) == pytest.approx(0, abs=1e-9)
    assert coherence(np.zeros((7, 7))) == 0
    many = np.random.default_rng(0).normal(size=(3, 2, 5, 5))
    assert coherence(many).shape == (3, 2)
    assert coherence(many)[2, 1] == pytest.approx(float(coherence(many[2, 1])))


def test_leading_component_recovers_a_rank_one_filter():
    pattern, colour = gabor(7), np.array([0.5, -1.0, 0.25])
    found = leading_component((colour[:, None, None] * pattern)[None])[0]
    assert abs(np.corrcoef(found.ravel(), pattern.ravel())[0, 1]) == pytest.approx(1)


def test_trained_filters_differ_from_random_ones(squeezenet, registry):
    """The measure says something: after training more filters have an orientation or a colour than by chance."""
    random = load_model("squeezenet1_1@random", registry)
    energy = [{m.name: m.value for m in result_of(m_).metrics} for m_ in (squeezenet, random)]
    norms = [np.array([row[1] for row in result_of(m_).artifacts[1].rows]) for m_ in (squeezenet, random)]
    assert norms[0].std() / norms[0].mean() > 2 * norms[1].std() / norms[1].mean()
    assert energy[0]["filters"] == 64


def test_a_model_that_takes_neither_grey_nor_colour():
    with pytest.raises(NotApplicable, match="takes 4 channels"):
        model = LoadedModel(nn.Sequential(nn.Conv2d(4, 2, 3)), InputSpec(size=8))
        model.__dict__["convolutions"] = lambda: [("0", model.modules["0"])]
        result_of(model)
