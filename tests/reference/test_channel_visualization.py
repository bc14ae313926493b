"""channel_visualization: the objective against its formula, what the pictures excite, and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from harness import ConfigError, NotApplicable
from harness import optimise as o
from harness.context import Context
from harness.datasets import load_dataset
from harness.models import LoadedModel, load_model
from harness.registry import InputSpec
from harness.testing import run_once, small_dataset
from harness_synthesis import ChannelVisualization
from harness_synthesis.blocks import blocks
from harness_synthesis.channel_visualization import unit_score


@pytest.mark.parametrize("middle", [False, True])
def test_the_score_is_the_units_activation(middle, digits_cnn):
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(2, 32)
    weights[0, 4], weights[1, 9], weights[1, 2] = 1, 0.5, -2
    maps = digits_cnn.activations(x, ["features.3"])["features.3"]
    expected = torch.stack([maps[0, 4], 0.5 * maps[1, 9] - 2 * maps[1, 2]])
    expected = expected[:, 4, 4] if middle else expected.mean((1, 2))
    found = o.evaluate(digits_cnn, unit_score("features.3", weights, middle), x, x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("unit", ["channel", "neuron", "direction"])
def test_ascent_raises_every_units_score(unit, digits_cnn):
    technique = ChannelVisualization(layers=("features.3", "features.6"), unit=unit, count=3, steps=40, size=8, jitter=0, blur=0)
    result = run_once(technique, digits_cnn, small_dataset(6))
    curve = next(a for a in result.artifacts if a.name == "objective")
    assert set(curve.lines) == {"features.3", "features.6"}
    assert all(line[-1] > line[0] + 0.1 for line in curve.lines.values())
    table = next(a for a in result.artifacts if a.name == "units").rows
    assert len(table) == 6
    pictures = result.artifacts[0].data
    assert pictures.shape == (6, 1, 8, 8)
    # what the table says is what the network answers
    maps = digits_cnn.activations(torch.tensor(pictures[:3]), ["features.3"])["features.3"]
    if unit == "channel":
        channels = [int(row[1].split()[1]) for row in table[:3]]
        for i, c in enumerate(channels):
            assert table[i][2] == pytest.approx(maps[i, c].mean().item(), rel=1e-4, abs=1e-6)
    if unit == "direction":
        assert all(row[4] is None for row in table)
        assert not any(m.name == "above_dataset" for m in result.metrics)
    else:
        maps = digits_cnn.activations(torch.tensor(_pixels(6)), ["features.3"])["features.3"]
        best = (maps.mean((2, 3)) if unit == "channel" else maps[:, :, 4, 4]).numpy()
        c = int(table[0][1].split()[1])
        assert table[0][4] == pytest.approx(float(np.percentile(best[:, c], 99)), rel=1e-4, abs=1e-6)


def _pixels(count):
    return small_dataset(count).pictures(InputSpec(channels=1, size=8)).transpose(0, 3, 1, 2).astype(np.float32) / 255


def test_directions_are_of_length_one_and_their_own(digits_cnn):
    technique = ChannelVisualization(unit="direction", steps=0, size=8)
    ctx = Context(digits_cnn, technique="channel_visualization")
    _, weights = technique._climb(ctx, "features.3", [0, 1], 8)
    torch.testing.assert_close(weights.norm(dim=1), torch.ones(2))
    _, other = technique._climb(ctx, "features.3", [1, 5], 8)
    torch.testing.assert_close(other[0], weights[1])


def test_a_silent_unit_is_reached_through_its_relu():
    """The plain gradient of a unit that is silent everywhere is zero; the redirected one pushes it up, for that picture alone."""
    from harness.hooks import relu_backward

    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=True), nn.ReLU(), nn.Conv2d(2, 1, 1))
    for parameter, values in zip(net.parameters(), ([1.0, -1.0], [-0.5, -0.5], [1.0, 1.0], [0.0]), strict=True):
        parameter.data = torch.tensor(values).view_as(parameter)
    x = torch.tensor([0.2, 0.9]).view(2, 1, 1, 1).requires_grad_()
    plain = torch.autograd.grad(net(x).sum(), x)[0].flatten().tolist()
    with relu_backward("redirected"):
        redirected = torch.autograd.grad(net(x).sum(), x)[0].flatten().tolist()
    assert plain == [0, 1]
    assert redirected == [0, 1]  # both units are pushed up: one wants x larger, the other smaller
    net[2].weight.data = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    with relu_backward("redirected"):
        redirected = torch.autograd.grad(net(x).sum(), x)[0].flatten().tolist()
    assert redirected == [1, 1]  # the first picture's unit is reached, and only what pushes upward


def test_no_steps_give_the_start(digits_cnn):
    result = run_once(ChannelVisualization(layers=("features.3",), count=2, steps=0, size=8, noise=0.0), digits_cnn, small_dataset(2))
    assert np.allclose(result.artifacts[0].data, digits_cnn.input.mean[0])


@pytest.mark.slow
def test_units_answer_more_strongly_than_to_any_photograph(squeezenet, registry):
    """Above the 99th percentile of the dataset's mean activations, early and late in the network."""
    technique = ChannelVisualization(layers=("features.4", "features.10"), count=3, steps=80, size=112)
    result = run_once(technique, squeezenet, load_dataset("imagenet_samples", registry), max_batch=16)
    found = {m.name: m.value for m in result.metrics}
    assert found["above_dataset"] == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("squeezenet1_1", ["features.1", "features.3", "features.4", "features.6", "features.7", "features.9", "features.10", "features.11", "features.12"]),
        ("resnet18", ["relu", "layer1", "layer2", "layer3", "layer4"]),
        ("alexnet", ["features.1", "features.4", "features.7", "features.9", "features.11"]),
        ("digits_cnn", ["features.1", "features.3", "features.6"]),
    ],
)  # fmt: skip
def test_blocks_are_what_people_call_layers(name, expected, registry):
    assert blocks(load_model(f"{name}@random", registry)) == expected


def test_what_cannot_be(digits_cnn, registry):
    with pytest.raises(ConfigError, match="no layer 'features.99'"):
        run_once(ChannelVisualization(layers=("features.99",)), digits_cnn, small_dataset(1))
    with pytest.raises(ConfigError, match=r"'features.3' has channels 0 to 31; there is no channel 32"):
        run_once(ChannelVisualization(layers=("features.3",), channels=(32,)), digits_cnn, small_dataset(1))
    with pytest.raises(NotApplicable, match="needs a layer with maps"):
        run_once(ChannelVisualization(layers=("classifier.1",)), digits_cnn, small_dataset(1))
    vector = LoadedModel(nn.Sequential(nn.Conv2d(1, 2, 8), nn.Flatten(), nn.Linear(2, 2)), InputSpec(channels=1, size=8))
    with pytest.raises(NotApplicable, match="none before its class scores"):
        run_once(ChannelVisualization(), vector, small_dataset(1))


def test_going_on_is_as_if_it_had_not_stopped(digits_cnn, registry):
    data = load_dataset("digits", registry).select(4)
    settings = {"layers": ("features.1", "features.6"), "count": 2, "steps": 12}
    whole = run_once(ChannelVisualization(**settings), digits_cnn, data)
    rest = run_once(ChannelVisualization(go_on=5, **settings), digits_cnn, data)
    np.testing.assert_array_equal(rest.artifacts[0].data, whole.artifacts[0].data)
    assert [a.name for a in whole.artifacts if a.name.startswith(("progress", "state"))] == [
        "progress-features.1", "progress-features.6", "state-features.1", "state-features.6",
    ]  # fmt: skip
