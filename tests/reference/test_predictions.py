"""predictions, and the real model on the real pictures."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from harness.datasets import load_dataset
from harness.testing import run_once
from harness_representations import Predictions
from harness_representations.predictions import wilson


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (5, 5), (14, 20), (610, 1000)])
def test_wilson_equals_scipy(hits, count):
    theirs = binomtest(hits, count).proportion_ci(method="wilson")
    assert wilson(hits, count) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_converted_squeezenet_is_right_as_often_as_it_should(squeezenet, registry):
    """Measured when the weights were first converted: 14 of 20 first, 17 of 20 among the first five."""
    found = {m.name: m for m in run_once(Predictions(), squeezenet, load_dataset("imagenet_samples", registry), max_batch=20).metrics}
    assert found["top1"].value == 14 / 20
    assert found["top5"].value == 17 / 20
    assert found["top1"].detail == "14 of 20, 0.481 to 0.855"


@pytest.mark.parametrize(("name", "least"), [("digits_linear", 0.95), ("digits_cnn", 0.98), ("digits_resnet", 0.98)])
def test_shipped_networks_are_as_good_as_their_cards_say(name, least, registry):
    import json
    from pathlib import Path

    import harness
    from harness.models import load_model

    card = json.loads((Path(harness.__file__).parent / "data" / f"{name}.json").read_text())
    found = {
        m.name: m.value
        for m in run_once(Predictions(), load_model(name, registry), load_dataset("digits_test", registry), max_batch=64).metrics
    }
    assert found["top1"] == pytest.approx(card["accuracy"]["test"], abs=1e-6)
    assert found["top1"] >= least
    assert card["sha256"] == registry.model(name).sha256
    assert card["test_data"]["fingerprint"] == load_dataset("digits_test", registry).fingerprint


def test_labels_of_another_set_give_no_accuracy(squeezenet, registry):
    result = run_once(Predictions(), squeezenet, load_dataset("cifar10_samples", registry).select(2))
    assert [m.name for m in result.metrics] == ["confidence"]
    assert "accuracy cannot be given" in result.notes[0]
