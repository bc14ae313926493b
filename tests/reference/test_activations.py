"""activation_maps, channel_probe, max_patches and receptive_field against brute force, captum, torchvision and scikit-learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from captum.attr import LayerActivation
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from harness import ConfigError, NotApplicable
from harness.context import to_images
from harness.datasets import Dataset
from harness.layers import layer_table, receptive_fields
from harness.models import LoadedModel, load_model
from harness.registry import InputSpec
from harness.testing import run_once, small_dataset
from harness_representations import ActivationMaps, ChannelProbe, MaxPatches, ReceptiveField
from harness_representations.activation_maps import countable
from harness_representations.channel_probe import areas, halve, ranks
from harness_representations.max_patches import Top, box
from harness_representations.receptive_field import effective_side


def images_of(data, model):
    return to_images(data.pictures(model.input), model.device, model.dtype)


def artifact(result, name):
    return next(a for a in result.artifacts if a.name == name)


def values(result):
    return {m.name: m.value for m in result.metrics}


def noise_dataset(count, size=24, labels=None, classes=()):
    """Pictures of random pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size), dtype=np.uint8)
    return Dataset("noise", [f"n{i}" for i in range(count)], lambda i: Image.fromarray(pixels[i]), "x" * 64, labels, classes)


def convolutions(size=24, positive=False, padding=1):
    """Two strided convolutions with a pooling in between, in float64."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=1, padding=padding),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, stride=2, padding=padding),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    ).double()
    if positive:
        for p in module.parameters():
            p.data.abs_()
    return LoadedModel(module, InputSpec(channels=1, size=size, mean=(0.0,), std=(1.0,)))


# -- activation_maps ---------------------------------------------------------------------------------------------------


def test_maps_equal_captum_and_torchvision(squeezenet, registry):
    from harness.datasets import load_dataset

    data = load_dataset("imagenet_samples", registry).select(3)
    layer = "features.6.squeeze"  # followed by an in-place ReLU
    result = run_once(ActivationMaps(layer=layer, picture=1, layers=(layer,)), squeezenet, data)
    maps = torch.tensor(artifact(result, "maps").data)
    x = squeezenet.normalise(images_of(data, squeezenet)[1:2])
    with torch.no_grad():
        extractor = create_feature_extractor(squeezenet.module, ["features.6.squeeze"])
        truncated = squeezenet.module.features[6].squeeze(squeezenet.module.features[:6](x))
        assert torch.equal(maps, truncated[0])
        # torchvision's extractor hands out the tensor that the ReLU then writes over; captum clones
        assert torch.equal(maps.relu(), extractor(x)["features.6.squeeze"][0].relu())
        captum = LayerActivation(squeezenet.module, squeezenet.module.features[6].squeeze).attribute(x)
    assert torch.equal(maps.relu(), captum[0].relu())
    assert (maps < 0).any()
    assert artifact(result, "maps").signed
    assert any("negative values" in note for note in result.notes)


def test_silence_by_hand(plain_spec):
    """Channel 0 is always -1 (dead), channel 1 is the picture less its grey, channel 2 is 1."""
    conv = nn.Conv2d(1, 3, 1)
    conv.weight.data = torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1, 1)
    conv.bias.data = torch.tensor([-1.0, -0.5, 1.0])
    model = LoadedModel(nn.Sequential(conv, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(108, 2)), plain_spec)
    half = np.zeros((6, 6), np.uint8)
    half[:, 3:] = 255
    data = Dataset("half", ["a", "b"], lambda i: Image.fromarray(half if i == 0 else np.zeros_like(half)), "x" * 64)
    for layer in ("0", "1"):  # a rectified layer is silent where its input is
        result = run_once(ActivationMaps(layer=layer), model, data, max_batch=1)
        assert values(result)["inactive_share"] == pytest.approx((36 * 2 + 18 + 36) / (3 * 36 * 2))
        assert values(result)["dead_share"] == pytest.approx(1 / 3)
        assert values(result)["silent_here"] == pytest.approx(1 / 3)
    rows = {row[0]: row for row in artifact(result, "layers").rows}
    assert list(rows) == ["0", "1", "3"]
    assert rows["1"][1:3] == ("ReLU", 3)
    assert countable(model) == ["0", "1", "3"]


def test_silence_of_transformers_and_reused_modules(registry, digits_cnn):
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    vit = LoadedModel(VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=4), InputSpec(size=32))
    result = run_once(ActivationMaps(layer="conv_proj"), vit, small_dataset(3))
    assert {row[2] for row in artifact(result, "layers").rows} >= {16, 32, 4}
    resnet = load_model("resnet18@random", registry)
    assert {"layer1.0.relu#1", "layer1.0.relu#2"} <= set(countable(resnet))


def test_what_activation_maps_refuses(digits_cnn):
    with pytest.raises(NotApplicable, match=r"needs a layer with maps \(C, H, W\); 'classifier.1' gives 64"):
        run_once(ActivationMaps(layer="classifier.1"), digits_cnn, small_dataset(3))
    with pytest.raises(ConfigError, match="there is no picture 3"):
        run_once(ActivationMaps(picture=3), digits_cnn, small_dataset(3))
    with pytest.raises(ConfigError, match="no layer 'features.77'"):
        run_once(ActivationMaps(layers=("features.77",)), digits_cnn, small_dataset(3))


# -- channel_probe -----------------------------------------------------------------------------------------------------


def test_auc_equals_scikit_learn_with_ties():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 6, (80, 5)).astype(float), rng.integers(0, 3, 80)
    found = areas(ranks(scores), labels, 4)
    for k in range(3):
        for c in range(5):
            assert found[k, c] == pytest.approx(roc_auc_score(labels == k, scores[:, c]), abs=1e-12)
    assert np.isnan(found[3]).all()


def test_halves_share_out_every_class():
    labels = np.array([2, 0, 2, 2, 0, 1, 2])
    first, second = halve(labels)
    assert sorted([*first, *second]) == list(range(7))
    assert np.bincount(labels[first]).tolist() == [1, 1, 2]
    assert np.bincount(labels[second], minlength=3).tolist() == [1, 0, 2]


def test_a_planted_detector_is_found_and_chance_is_known(plain_spec):
    """Pictures of class 1 have a bright corner that channel 2 alone looks at; the other channels see noise."""
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 12, 6)
    conv.weight.data[2] = 0
    conv.weight.data[2, 0, :2, :2] = 1
    model = LoadedModel(
        nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 2)), plain_spec
    )
    model.classes = ("plain", "marked")
    pixels = np.random.default_rng(1).integers(0, 200, (60, 6, 6), dtype=np.uint8)
    labels = np.arange(60) % 2
    pixels[labels == 1, :2, :2] = 255
    data = Dataset("marks", [f"m{i}" for i in range(60)], lambda i: Image.fromarray(pixels[i]), "x" * 64, labels, ("plain", "marked"))
    result = run_once(ChannelProbe(layer="1"), model, data)
    rows = artifact(result, "detectors").rows
    assert rows[1][2] == 2
    assert rows[1][3] == rows[1][4] == 1
    assert values(result)["held_out_auc"] > values(result)["by_chance"] + 0.2
    assert values(result)["by_chance"] == pytest.approx(0.5, abs=0.1)
    answers = artifact(result, "answers")
    assert answers.rows[1] == "marked: channel 2"
    assert answers.values[1].tolist() == [0, 1]  # of two classes each is the other's complement


def test_digits_have_detectors(digits_cnn, registry):
    from harness.datasets import load_dataset

    found = values(run_once(ChannelProbe(), digits_cnn, load_dataset("digits_test", registry), max_batch=128))
    assert found["held_out_auc"] > found["by_chance"] + 0.2


def test_one_class_and_single_pictures(digits_cnn, registry):
    from harness.datasets import load_dataset

    data = load_dataset("digits", registry)
    zeros = data.select(indices=np.flatnonzero(data.labels == 0)[:6].tolist())
    with pytest.raises(NotApplicable, match="those of one only"):
        run_once(ChannelProbe(), digits_cnn, zeros)
    result = run_once(ChannelProbe(), digits_cnn, small_dataset(10))
    assert "10 of 10 classes have too few pictures for two halves" in result.notes[0]
    assert [m.name for m in result.metrics] == ["channels"]
    with pytest.raises(NotApplicable, match="labelled dataset"):
        run_once(ChannelProbe(), digits_cnn, replace(small_dataset(), labels=None, classes=()))


# -- max_patches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_the_streamed_top_is_the_brute_force_top(batch):
    """Small whole numbers: many equals, which go to the earlier picture."""
    maps = torch.randint(0, 5, (23, 6, 3, 4), generator=torch.Generator().manual_seed(0)).float()
    top = Top(4)
    for start in range(0, 23, batch):
        top.add(maps[start : start + batch], start)
    best, pictures, spots = top.numpy()
    high = maps.flatten(2).amax(2).numpy()
    order = np.argsort(-high, axis=0, kind="stable")[:4]
    assert np.array_equal(pictures, order)
    assert np.array_equal(best, np.take_along_axis(high, order, 0))
    for k in range(4):
        for c in range(6):
            y, x = spots[k, c]
            assert maps[pictures[k, c], c, y, x] == best[k, c]
    z = (best.mean(0) - high.mean(0)) / high.std(0)
    np.testing.assert_allclose(top.selectivity(), z, rtol=1e-4, atol=1e-5)


def test_a_channel_that_never_changes_is_not_selective():
    top = Top(2)
    top.add(torch.full((5, 1, 2, 2), 0.3), 0)
    assert top.selectivity().tolist() == [0]


def test_the_gradient_lies_inside_the_box_and_reaches_its_border():
    model = convolutions(positive=True)
    fields = receptive_fields(model.module, dict(model.calls))
    for layer in ("0", "2", "3"):
        _, height, width = model.layer_shape(layer)
        for y, x in [(0, 0), (height // 2, width // 2), (height - 1, 0)]:
            leaf = torch.rand((1, 1, 24, 24), dtype=torch.float64, generator=torch.Generator().manual_seed(y)).requires_grad_()
            unit = model.activations(leaf, [layer])[layer][0, 0, y, x]
            gradient = torch.autograd.grad(unit, leaf)[0][0, 0]
            top, left, size = box(fields[layer], 24, y, x)
            inside = torch.zeros(24, 24, dtype=torch.bool)
            inside[max(0, top) : top + size, max(0, left) : left + size] = True
            assert not gradient[~inside].any()


def test_all_ones_fill_the_whole_box():
    """With average pooling and positive weights every pixel of the field counts, the border too."""
    module = nn.Sequential(
        nn.Conv2d(1, 2, 5, padding=1), nn.AvgPool2d(2), nn.Conv2d(2, 2, 3, stride=2, padding=1), nn.Conv2d(2, 1, 3)
    ).double()
    for p in module.parameters():
        p.data.fill_(1)
    model = LoadedModel(module, InputSpec(channels=1, size=40, mean=(0.0,), std=(1.0,)))
    fields = receptive_fields(module)
    for layer in ("0", "1", "2", "3"):
        _, height, width = model.layer_shape(layer)
        leaf = torch.rand((1, 1, 40, 40), dtype=torch.float64).requires_grad_()
        gradient = torch.autograd.grad(model.activations(leaf, [layer])[layer][0, 0, height // 2, width // 2], leaf)[0][0, 0]
        rows, columns = (gradient != 0).nonzero().unbind(1)
        top, left, size = box(fields[layer], 40, height // 2, width // 2)
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (top, top + size - 1, left, left + size - 1)
        assert fields[layer].size == size


def test_a_patch_fed_again_gives_the_same_activation():
    model = convolutions(padding=0)
    result = run_once(MaxPatches(layer="4", k=3, channels=(0, 1, 2, 3, 4, 5)), model, noise_dataset(8))
    patches = artifact(result, "patches").data
    best = artifact(result, "top").data["values"]
    for i, patch in enumerate(patches):
        with torch.no_grad():
            again = model.module[:5](torch.tensor(patch).double()[None])
        assert again.shape[2:] == (1, 1)
        assert again[0, i // 3, 0, 0].item() == pytest.approx(best[i // 3, i % 3], abs=1e-5)


def test_beyond_the_edge_is_grey():
    model = convolutions()
    data = noise_dataset(1)
    result = run_once(MaxPatches(layer="0", k=1, channels=(0,)), model, data)
    y, x = artifact(result, "top").data["positions"][0, 0].tolist()
    patch, whole = artifact(result, "patches").data[0, 0], np.pad(data.pictures(model.input)[0, ..., 0] / 255, 1, constant_values=0.5)
    np.testing.assert_allclose(patch, whole[y : y + 5, x : x + 5], atol=1e-6)


def test_what_max_patches_says(digits_cnn):
    result = run_once(MaxPatches(k=9, count=2), digits_cnn, small_dataset(4))
    assert "the dataset has 4 pictures: 4 patches a channel instead of 9" in result.notes
    assert artifact(result, "patches").data.shape[0] == 8
    assert artifact(result, "patches").columns == 4
    with pytest.raises(ConfigError, match="channels 0 to 31; there is no channel 32"):
        run_once(MaxPatches(channels=(32,)), digits_cnn, small_dataset(4))
    with pytest.raises(NotApplicable, match="needs a layer with maps"):
        run_once(MaxPatches(layer="classifier.1"), digits_cnn, small_dataset(4))


def test_duplicates_stand_in_order(digits_cnn, registry):
    from harness.datasets import load_dataset

    data = load_dataset("digits", registry).select(indices=[5, 5, 5])
    assert artifact(run_once(MaxPatches(k=3), digits_cnn, data), "top").data["pictures"].tolist() == [[0, 1, 2]] * 32


# -- receptive_field -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("alexnet", {"features.0": 11, "features.3": 51, "features.6": 99, "features.8": 131, "features.10": 163, "features.12": 195}),
        (
            "vgg16",
            {
                "features.3": 5, "features.8": 14, "features.15": 40, "features.22": 92, "features.25": 132, "features.29": 196,
                "features.30": 212,
            },
        ),
    ],
)  # fmt: skip
def test_known_receptive_fields(name, known, registry):
    """The constants of the course notes' networks, as computed by hand from kernel sizes and strides."""
    fields = receptive_fields(load_model(f"{name}@random", registry).module)
    assert {layer: fields[layer].size for layer in known} == known
    assert fields["features.12" if name == "alexnet" else "features.30"].stride == 32


def test_branches_count_with_their_widest(registry):
    """An Inception block's 5 x 5 branch (a 3 x 3 in torchvision's) and its pooled branch: the union of all four."""
    table = {row.name: row for row in layer_table(load_model("googlenet@random", registry))}
    block = table["inception3a"]
    branches = [table[f"inception3a.branch{i}"].receptive_field for i in (1, 2, 3, 4)]
    assert block.receptive_field == max(branches)
    assert block.stride == 8


def test_the_effective_field_of_one_convolution_is_its_kernel():
    """Equal weights: 95 % of the energy needs the outermost ring; all of it at a corner weight needs less."""
    module = nn.Sequential(nn.Conv2d(1, 3, 5, padding=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    module[0].weight.data.fill_(1)
    model = LoadedModel(module, InputSpec(channels=1, size=15, mean=(0.0,), std=(1.0,)))
    found = values(run_once(ReceptiveField(layers=("0",)), model, noise_dataset(4, 15)))
    assert found["theoretical_side"] == found["effective_side"] == 5
    module[0].weight.data.zero_()
    module[0].weight.data[:, :, 1:4, 1:4] = 1
    found = values(run_once(ReceptiveField(layers=("0",)), model, noise_dataset(4, 15)))
    assert (found["theoretical_side"], found["effective_side"]) == (5, 3)


def test_the_side_that_holds_the_energy():
    energy = torch.zeros(21, 21)
    energy[10, 10] = 1
    assert effective_side(energy, 0.95) == 1
    energy[8:13, 8:13] = 1
    assert effective_side(energy, 0.95) == 5
    assert effective_side(torch.zeros(4, 4), 0.95) == 0
    y = torch.arange(81.0) - 40
    gauss = torch.exp(-(y[:, None] ** 2 + y[None] ** 2) / (2 * 6.0**2))
    # a square of side 2a holds erf(a / (6 sqrt 2))^2 of a Gaussian
    assert effective_side(gauss, 0.95) == pytest.approx(2 * 2.236 * 6, abs=2)


def test_random_signs_estimate_the_channels_energy(digits_cnn):
    """A sum of many channels with random signs has, on average, the sum of their energies."""
    import math

    data = small_dataset(2)
    x = images_of(data, digits_cnn).requires_grad_()
    output = digits_cnn.activations(x, ["features.0"])["features.0"]
    exact = sum(torch.autograd.grad(output[:, c, 4, 4].sum(), x, retain_graph=True)[0].square().sum((0, 1)) for c in range(output.shape[1]))
    totals = []
    for seed in range(30):
        from harness.context import Context

        ctx = Context(digits_cnn, images=x.detach(), ids=data.ids, technique="receptive_field", seed=seed)
        totals.append(ReceptiveField()._energy(ctx, "features.0") * 2)
    mean = torch.stack(totals).mean(0)
    assert math.isclose(float(mean.sum()), float(exact.sum()), rel_tol=0.25)


def test_effective_is_within_theoretical(digits_cnn):
    result = run_once(ReceptiveField(), digits_cnn, small_dataset(3))
    for row in artifact(result, "layers").rows:
        if row[5] is not None:
            assert 0 < row[5] <= 8
            assert row[5] <= row[3]
    with pytest.raises(NotApplicable, match="needs a layer with maps"):
        run_once(ReceptiveField(layers=("classifier.1",)), digits_cnn, small_dataset(3))


# -- layers that name, order or shape things otherwise -------------------------------------------------------------------


def test_positions_before_channels_are_not_read_as_channels(registry):
    """ConvNeXt's linear layers give (N, H, W, C): counted by channel, refused as maps, never chosen by default."""
    model = load_model("convnext_tiny@random", registry)
    layer = "features.1.0.block.3"
    channels = model.layer_shape(layer)[-1]
    assert layer in model.channels_behind
    assert channels == 4 * 96
    assert "features.0.0" not in model.channels_behind
    assert "features.1.0.block.0" not in model.channels_behind
    assert "features.1.0" not in model.channels_behind
    assert model.last_maps not in model.channels_behind
    result = run_once(ActivationMaps(layers=(layer, "features.1.0.block.4"), layer="features.1.0.block.0"), model, small_dataset(2))
    rows = {row[0]: row for row in artifact(result, "layers").rows}
    assert rows[layer][2] == rows["features.1.0.block.4"][2] == channels
    for technique in (MaxPatches(layer=layer), ReceptiveField(layers=(layer,)), ActivationMaps(layer=layer)):
        with pytest.raises(NotApplicable, match="positions before channels"):
            run_once(technique, model, small_dataset(2))
    data = small_dataset(2)
    with torch.no_grad():
        x = images_of(data, model)
        torch.testing.assert_close(model.embedding(x, layer), model.activations(x, [layer])[layer].mean((1, 2)))


def test_a_layer_by_its_short_and_its_full_name(registry):
    model = load_model("resnet18@random", registry)
    assert model.full_name("layer1.0.relu") == "layer1.0.relu#2"
    assert model.full_name("conv1#1") == "conv1"
    assert model.layer_shape("conv1#1") == model.layer_shape("conv1")
    short, full = (run_once(MaxPatches(layer=name, k=1, count=1), model, small_dataset(2)) for name in ("layer1.0.relu", "layer1.0.relu#2"))
    assert artifact(short, "patches").data.shape == artifact(full, "patches").data.shape
    assert not short.notes or "receptive field" not in " ".join(short.notes)
    result = run_once(ReceptiveField(layers=("layer1.0.relu",)), model, small_dataset(2))
    assert "theoretical_side" in values(result)


def test_layers_stand_in_the_order_of_the_pass(registry):
    model = load_model("resnet18@random", registry)
    rows = [row[0] for row in artifact(run_once(ActivationMaps(), model, small_dataset(2)), "layers").rows]
    order = [name for name, _ in model.calls]
    assert rows == sorted(rows, key=order.index)
    assert rows[-1] == "fc"
    assert model.last_maps in rows


def test_a_class_that_leaves_no_others_in_one_half(digits_cnn, registry):
    """Three pictures of one class and one of another: nothing to hold out, said and not stored as no number."""
    data = small_dataset(4)
    mixed = replace(data, labels=np.array([0, 0, 0, 1]), classes=("a", "b"))
    result = run_once(ChannelProbe(), digits_cnn, mixed)
    assert [m.name for m in result.metrics] == ["channels"]
    assert "2 of 2 classes have too few pictures" in result.notes[0]
