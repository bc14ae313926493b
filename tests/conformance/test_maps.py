"""Every technique that gives maps of pixels explains every kind of target, and survives models that have little to say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from harness.models import LoadedModel
from harness.plugins import load_plugins
from harness.registry import InputSpec
from harness.testing import run_once, small_dataset

MAPS = {name: cls for name, cls in load_plugins().techniques.items() if cls.attribution}
SMALL = {"rise": {"masks": 40}, "lime": {"samples": 40}, "integrated_gradients": {"steps": 4}, "expected_gradients": {"samples": 4}}
TARGETS = {
    "predicted": "predicted",
    "labelled": "labelled",
    "index": 7,
    "name": "three",
    "layer": "layer:features.3",
    "channel": "channel:features.3:4",
    "neuron": "neuron:features.3:4,1,6",
    "function": f"{__name__}:margin",
    "a class each": [1, "labelled", "three"],
    "a neuron each": ["neuron:classifier.1:1", "neuron:classifier.1:5", "neuron:classifier.1:9"],
}


def margin(logits):
    return logits[:, 1] - logits[:, 7]


def attribution(name, model, data, **params):
    result = run_once(MAPS[name].build({**SMALL.get(name, {}), **params}), model, data)
    return next(a for a in result.artifacts if a.name == MAPS[name].attribution).data, result


@pytest.fixture(scope="module")
def named(digits_cnn):
    """The digits network with names that are no numbers, and the digits with its labels."""
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    from dataclasses import replace

    return LoadedModel(digits_cnn.module, digits_cnn.input, "digits_cnn", words), replace(small_dataset(3), classes=words)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", MAPS)
def test_every_kind_of_target(name, kind, named):
    model, data = named
    maps, _ = attribution(name, model, data, target=TARGETS[kind])
    assert maps.shape == (3, 8, 8)
    assert np.isfinite(maps).all()
    assert maps.any()


@pytest.mark.parametrize("name", MAPS)
def test_targets_of_their_own_are_those_of_single_runs(name, named):
    model, data = named
    together, _ = attribution(name, model, data, target=[1, 5, 9])
    for i, c in enumerate((1, 5, 9)):
        alone, _ = attribution(name, model, data.select(indices=[i]), target=c)
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-4, atol=1e-5)


def small_model(classes):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, classes),
    )  # fmt: skip
    return LoadedModel(net, InputSpec(channels=1, size=8, mean=(0.3,), std=(0.4,)))


@pytest.mark.parametrize("name", MAPS)
def test_one_class_alone(name):
    maps, _ = attribution(name, small_model(1), small_dataset(2))
    assert np.isfinite(maps).all()


@pytest.mark.parametrize("name", MAPS)
def test_a_model_that_does_not_react_gives_a_zero_map_and_says_so(name):
    model = small_model(3)
    model.module[-1].weight.data.zero_()
    maps, result = attribution(name, model, small_dataset(2))
    assert np.abs(maps).max() < 1e-6
    if not maps.any():
        assert any("zero" in note for note in result.notes)


@pytest.mark.parametrize("judge", ["faithfulness", "sanity_checks", "saliency_comparison"])
def test_judges_of_zero_maps(judge):
    model = small_model(3)
    model.module[-1].weight.data.zero_()
    technique = load_plugins().technique(judge).build({"techniques": ["saliency", "grad_cam"]})
    result = run_once(technique, model, small_dataset(2))
    assert all(np.isfinite(m.value) for m in result.metrics)
