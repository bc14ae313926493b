"""linear_templates and layer_filters against their definitions, scikit-learn and planted weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from harness import ConfigError, NotApplicable
from harness.context import Context, to_images
from harness.datasets import load_dataset
from harness.models import LoadedModel, load_model
from harness.nets import LinearClassifier
from harness.registry import InputSpec
from harness_saliency import Saliency
from harness_weights import LayerFilters, LinearTemplates
from harness_weights.layer_filters import directedness
from harness_weights.linear_templates import affine, roughness


def result_of(technique, model):
    return technique.run(Context(model, technique=technique.name))


def artifact(result, name):
    return next(a for a in result.artifacts if a.name == name)


def linear(channels=3, size=6, classes=4):
    torch.manual_seed(0)
    spec = InputSpec(channels=channels, size=size, mean=(0.4, 0.5, 0.6)[:channels], std=(0.2, 0.25, 0.3)[:channels])
    return LoadedModel(LinearClassifier(channels, size, classes).double(), spec)


def probes(model, count=5):
    shape = (count, *model.example().shape[1:])
    return torch.rand(shape, dtype=model.dtype, generator=torch.Generator().manual_seed(1))


# -- linear_templates --------------------------------------------------------------------------------------------------


def test_template_times_picture_plus_b_is_the_score():
    model = linear()
    stored = artifact(result_of(LinearTemplates(), model), "linear").data
    x = probes(model).numpy()
    found = np.einsum("nchw,kchw->nk", x, stored["weight"]) + stored["bias"]
    np.testing.assert_allclose(found, model(torch.tensor(x)).numpy(), atol=1e-6)


@pytest.mark.parametrize("name", ["digits_linear", "cifar10_linear"])
def test_the_shipped_linear_models(name, registry):
    model = load_model(name, registry)
    result = result_of(LinearTemplates(), model)
    stored = artifact(result, "linear").data
    x = probes(model)
    found = np.einsum("nchw,kchw->nk", x.double().numpy(), stored["weight"].astype(np.float64)) + stored["bias"]
    np.testing.assert_allclose(found, model(x).double().numpy(), atol=1e-4)  # in single precision
    assert next(m for m in result.metrics if m.name == "linearity_error").value < 1e-5
    assert list(artifact(result, "templates").captions) == list(model.classes)


def test_a_row_of_w_is_the_template_and_back():
    """W belongs to the pixels: the module's own row over the standard deviation, in the picture's shape."""
    model = linear()
    weight, bias, _ = affine(model, probes(model, 2))
    std = torch.tensor(model.input.std, dtype=torch.float64).view(1, 3, 1, 1)
    own = model.module.linear.weight.view(4, 3, 6, 6)
    torch.testing.assert_close(weight, own / std, rtol=0, atol=1e-12)
    torch.testing.assert_close((weight * std).flatten(1), model.module.linear.weight, rtol=0, atol=1e-12)
    mean = torch.tensor(model.input.mean, dtype=torch.float64).view(1, 3, 1, 1)
    torch.testing.assert_close(bias, model.module.linear.bias - (weight * mean).flatten(1).sum(1), rtol=0, atol=1e-12)


def test_the_picture_is_an_affine_map_of_the_weight():
    model = linear()
    for shared in (True, False):
        result = result_of(LinearTemplates(shared_scale=shared), model)
        pictures, weight = artifact(result, "templates").data.astype(np.float64), artifact(result, "linear").data["weight"]
        for k in range(4):
            assert np.corrcoef(pictures[k].ravel(), weight[k].ravel())[0, 1] == pytest.approx(1, abs=1e-6)
        if not shared:
            assert all(np.abs(p - 0.5).max() == pytest.approx(0.5) for p in pictures)


def test_saliency_of_a_linear_model_is_its_template_whatever_the_picture():
    model = linear()
    weight = affine(model, probes(model, 2))[0]
    x = probes(model, 3)
    ctx = Context(model, images=x, ids=["a", "b", "c"], technique="saliency", target=2)
    maps = torch.tensor(Saliency(target=2).run(ctx).artifacts[0].data)
    for i in range(3):
        torch.testing.assert_close(maps[i].double(), weight[2].abs().amax(0), rtol=1e-6, atol=1e-6)


def test_scikit_learns_coefficients_are_the_templates(registry):
    data = load_dataset("digits_train", registry)
    spec = InputSpec(channels=1, size=8, mean=(0.0,), std=(1.0,))
    x = data.pictures(spec).reshape(len(data), -1) / 255
    fitted = LogisticRegression(max_iter=2000).fit(x, data.labels)
    module = LinearClassifier(1, 8, 10).double()
    module.linear.weight.data = torch.tensor(fitted.coef_)
    module.linear.bias.data = torch.tensor(fitted.intercept_)
    model = LoadedModel(module, spec)
    stored = artifact(result_of(LinearTemplates(), model), "linear").data
    np.testing.assert_allclose(stored["weight"].reshape(10, 64), fitted.coef_, atol=1e-9)
    np.testing.assert_allclose(stored["bias"], fitted.intercept_, atol=1e-9)
    images = to_images(data.pictures(spec)[:50], model.device, model.dtype)
    np.testing.assert_allclose(model(images).numpy(), fitted.decision_function(x[:50]), atol=1e-6)


def test_an_affine_model_without_a_linear_layer():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AvgPool2d(2), nn.Conv2d(2, 3, 2), nn.Flatten())
    model = LoadedModel(net.double(), InputSpec(channels=1, size=6, mean=(0.5,), std=(0.5,)))
    assert artifact(result_of(LinearTemplates(), model), "templates").data.shape == (3, 1, 6, 6)


@pytest.mark.parametrize("name", ["digits_cnn", "squeezenet1_1"])
def test_a_model_that_is_not_linear(name, registry):
    with pytest.raises(NotApplicable, match="linear function of the pixels"):
        result_of(LinearTemplates(), load_model(name, registry))


def test_roughness_closed_forms():
    assert roughness(torch.ones(2, 1, 8, 8)) == 0
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    assert roughness(board.expand(1, 1, 8, 8)) == pytest.approx(2)
    noise = torch.randn((20, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    assert roughness(noise) == pytest.approx(1, abs=0.05)


def test_the_cifar10_card_says_what_it_was_trained_on(registry):
    import json
    from pathlib import Path

    import harness

    card = json.loads((Path(harness.__file__).parent / "data" / "cifar10_linear.json").read_text())
    assert 0.38 <= card["accuracy"]["test"] <= 0.41
    assert "JPEG" in card["note"]
    assert card["sha256"] == registry.model("cifar10_linear").sha256
    recipe = registry.recipe("cifar10_linear").model_dump(mode="json")
    told = {k: v for k, v in card["recipe"].items() if k not in ("dataset", "test_dataset")}
    assert told == {k: recipe[k] for k in told}


# -- layer_filters -----------------------------------------------------------------------------------------------------


def test_tiles_are_the_kernels_in_order():
    torch.manual_seed(0)
    model = LoadedModel(nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6, 2)), InputSpec(size=7))
    result = result_of(LayerFilters(), model)
    kernels, weight = artifact(result, "kernels"), model.modules["2"].weight.detach().numpy()
    assert kernels.data.shape == (24, 1, 3, 3)
    assert kernels.columns % 4 == 0
    scale = np.abs(weight).max()
    for tile, (o, i) in zip(kernels.data, [(o, i) for o in range(6) for i in range(4)], strict=True):
        np.testing.assert_allclose(tile[0], 0.5 + weight[o, i] / (2 * scale), atol=1e-6)
    rows = {row[0]: row for row in artifact(result, "layers").rows}
    assert rows["0"][1:3] == ("4 x 3 x 5 x 5", 12)
    assert rows["2"][1:3] == ("6 x 4 x 3 x 3", 24)


def test_a_convolutions_answer_to_its_own_filter_is_its_squared_norm():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, bias=False).double()
    answers = conv(conv.weight.detach())[:, :, 0, 0]
    torch.testing.assert_close(answers.diagonal(), conv.weight.flatten(1).square().sum(1))


def test_edges_are_directed_and_their_shuffles_are_not():
    y, x = np.mgrid[-3:4, -3:4]
    window = np.exp(-(x**2 + y**2) / 8)
    edges = np.stack([window * np.sin(1.2 * (x * np.cos(a) + y * np.sin(a))) for a in np.linspace(0, 3, 40)])[:, None]
    noise = np.random.default_rng(0)
    structure, chance = directedness(edges, noise.random(49))
    assert structure > 0.6
    assert chance < 0.35
    structure, chance = directedness(noise.normal(size=(30, 20, 7, 7)), noise.random(49))
    assert structure == pytest.approx(chance, abs=0.02)
    assert directedness(np.zeros((2, 2, 3, 3)), noise.random(9)) == (0.0, 0.0)


def test_the_first_layer_says_more_than_the_last(squeezenet, registry):
    """Trained: structure in the first layer, little of it in the last; untrained: none anywhere."""
    trained, random = (
        {m.name: m.value for m in result_of(LayerFilters(), m).metrics} for m in (squeezenet, load_model("squeezenet1_1@random", registry))
    )
    assert trained["structure.first"] > 2 * trained["structure.last"] > 0
    assert abs(random["structure.first"]) < trained["structure.first"] / 3
    assert abs(random["structure.last"]) < 0.01


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_large", "convnext_tiny", "vit_b_16"])
def test_layer_filters_of_the_registrys_models(name, registry):
    result = result_of(LayerFilters(), load_model(f"{name}@random", registry))
    rows = artifact(result, "layers").rows
    for row in rows:
        out, inner, *kernel = map(int, row[1].split(" x "))
        assert row[2] == out * inner
        assert (row[3] is None) == (min(kernel) == 1)


def test_what_layer_filters_refuses(digits_cnn):
    with pytest.raises(ConfigError, match="'classifier.1' is not a convolution"):
        result_of(LayerFilters(layer="classifier.1"), digits_cnn)
    with pytest.raises(ConfigError, match="no layer 'features.9'"):
        result_of(LayerFilters(layer="features.9"), digits_cnn)
    only = LoadedModel(
        nn.Sequential(nn.Conv2d(1, 3, 1), nn.Flatten(), nn.Linear(48, 2)), InputSpec(channels=1, size=4, mean=(0.0,), std=(1.0,))
    )
    result = result_of(LayerFilters(), only)
    assert [m.name for m in result.metrics] == ["convolutions"]
    assert artifact(result, "kernels").data.shape == (3, 1, 1, 1)
