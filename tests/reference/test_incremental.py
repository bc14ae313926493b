"""Incremental inference against whole passes, on every kind of network it knows and on those that it does not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness.context import Context
from harness.models import LoadedModel, load_model
from harness.registry import InputSpec
from harness_saliency import Occlusion
from harness_saliency.incremental import Incremental
from harness_saliency.occlusion import windows


def compare(model, boxes, size, max_batch=7):
    """(answers by boxes, answers by whole passes, the Incremental)."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((1, model.input.channels, *size), generator=generator, dtype=model.dtype)
    incremental = Incremental(model, boxes, size)
    height, width = incremental.boxes.size
    cover = torch.rand((1, model.input.channels, *size), generator=generator, dtype=model.dtype)
    found, expected = [], []
    with torch.no_grad():
        clean = incremental.clean(image)
        for start in range(0, len(boxes), max_batch):
            rows = slice(start, min(start + max_batch, len(boxes)))
            contents, copies = [], []
            for (top, bottom, left, right), y, x in zip(
                boxes[rows], incremental.boxes.tops[rows], incremental.boxes.lefts[rows], strict=True
            ):
                copy = image[0].clone()
                copy[:, top:bottom, left:right] = cover[0, :, top:bottom, left:right]
                copies.append(copy)
                contents.append(copy[:, y : y + height, x : x + width])
            found.append(incremental.answers(clean, torch.stack(contents), rows))
            expected.append(model(torch.stack(copies)))
    return torch.cat(found), torch.cat(expected), incremental


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (20, 13), (7, 40)])
@pytest.mark.parametrize("name", ["squeezenet1_1", "alexnet", "resnet18", "densenet121", "googlenet", "vgg16", "mobilenet_v3_large"])
def test_equals_whole_passes(name, window, stride, registry):
    if (window, stride) != (20, 13) and name in ("vgg16", "densenet121", "googlenet"):
        pytest.skip("one size is enough for the slow ones")
    torch.manual_seed(0)
    model = load_model(f"{name}@random", registry)
    size = (96, 80) if name != "alexnet" else (96, 96)
    boxes = windows(*size, window, stride)[:: 3 if stride < 16 else 1]
    found, expected, _ = compare(model, boxes, size)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert expected.std(0).max() > 10 * (found - expected).abs().max()  # windows matter


class Odd(nn.Module):
    """Kernels, strides, paddings, dilations and groups of many kinds, ceil mode, average pooling, shortcuts, concatenation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a = nn.Conv2d(1, 6, 5, stride=2, padding=1, bias=False)
        self.b = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=3)
        self.c = nn.Conv2d(6, 4, (1, 3), padding=(0, 1))
        self.d = nn.Conv2d(6, 4, 1, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.norm.running_mean.uniform_(-1, 1)
        self.relu = nn.ReLU(inplace=True)
        self.ceil = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.mean = nn.AvgPool2d(3, 1, padding=1)
        self.end = nn.Linear(8, 3)

    def forward(self, x):
        x = self.relu(self.norm(self.a(x)))
        x = x + F.relu(self.b(x))
        x = self.ceil(x)
        left, right = self.c(x), self.mean(self.c(x))
        x = torch.cat([left, right], 1)
        return self.end(x.mean((2, 3)))


@pytest.mark.parametrize("size", [(40, 40), (41, 37), (33, 64)])
def test_every_kind_of_layer(size):
    model = LoadedModel(Odd().double(), InputSpec(channels=1, size=40, mean=(0.1,), std=(0.3,)))
    found, expected, incremental = compare(model, windows(*size, 6, 5), size)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert incremental.left < 0.6


def test_a_strided_convolution_that_skips_the_box():
    """A 1 x 1 convolution with stride 3 does not see a box of one pixel between its places."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 1, stride=3), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = LoadedModel(net.double(), InputSpec(channels=1, size=24, mean=(0.0,), std=(1.0,)))
    boxes = [(y, y + 1, x, x + 1) for y in range(0, 24, 5) for x in range(0, 24, 7)]
    found, expected, _ = compare(model, boxes, (24, 24))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_the_estimate_of_the_work_left():
    """One 3 x 3 convolution, padded: a box of 4 x 4 in 20 x 20 reaches 6 x 6 outputs, near the edge no more."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = LoadedModel(net, InputSpec(channels=1, size=20, mean=(0.0,), std=(1.0,)))
    incremental = Incremental(model, windows(20, 20, 4, 4), (20, 20))
    assert incremental.left == pytest.approx(36 / 400)
    assert incremental.work == 20 * 20 * 18


def test_occlusion_takes_it_and_gives_the_same(squeezenet):
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    results = []
    for inference in ("auto", "full"):
        ctx = Context(squeezenet, images=images, ids=["a", "b"], technique="occlusion", max_batch=8)
        technique = Occlusion(window=48, stride=44, inference=inference)
        results.append(technique.measure(ctx))
    quick, full = results
    assert (quick.drops - full.drops).abs().max() < 1e-4
    assert (quick.lost - full.lost).abs().max() < 1e-5
    assert full.drops.std() > 0.01


def test_a_network_that_cannot_be_traced_is_passed_whole(monkeypatch):
    class Depends(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(1, 8, 3)

        def forward(self, x):
            return self.conv(x).mean((2, 3)) * (2 if x.mean() > 0 else 1)

    model = LoadedModel(Depends(), InputSpec(channels=1, size=16, mean=(0.0,), std=(1.0,)))
    with pytest.raises(ValueError, match="cannot be traced"):
        Incremental(model, windows(16, 16, 4, 4), (16, 16))
    ctx = Context(model, images=torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)), ids=["a"])
    assert Occlusion(window=4, stride=4)._quick(ctx, windows(16, 16, 4, 4), torch.zeros(1, 1, 16, 16)) is None


def test_a_wrong_result_is_noticed(squeezenet, monkeypatch):
    """Two windows are checked by whole passes; where they differ all of them are."""
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    ctx = Context(squeezenet, images=images, ids=["a"], technique="occlusion")
    technique, full = Occlusion(window=75, stride=75), Occlusion(window=75, stride=75, inference="full")
    answers = Incremental.answers
    monkeypatch.setattr(Incremental, "answers", lambda *args: answers(*args) + 1)
    torch.testing.assert_close(technique.measure(ctx).drops, full.measure(ctx).drops)


def test_a_network_that_writes_over_what_it_still_reads_is_refused():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.d = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            x = self.c(x)
            y = self.d(x)
            x.relu_()
            return (x + y).mean((2, 3))

    model = LoadedModel(Overwrites(), InputSpec(channels=1, size=16, mean=(0.0,), std=(1.0,)))
    with pytest.raises(ValueError, match="writes over what others read"):
        Incremental(model, windows(16, 16, 4, 4), (16, 16))


def test_a_transformers_work_is_not_in_its_convolution(registry):
    model = load_model("vit_b_16@random", registry)
    assert Incremental(model, windows(224, 224, 32, 32), (224, 224)).left > 0.95
