"""occlusion against the closed form of a linear model, a slow replica, and captum."""

from __future__ import annotations

import pytest
import torch
from captum.attr import Occlusion as CaptumOcclusion
from torch import nn

from harness import ConfigError
from harness.context import Context
from harness.models import LoadedModel
from harness.registry import InputSpec
from harness_saliency import Occlusion
from harness_saliency.occlusion import spread, windows


def linear_model(size, channels=3):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 4)).double()
    return LoadedModel(module, InputSpec(channels=channels, size=size, mean=(0.0,) * channels, std=(1.0,) * channels))


def run(technique, model, count=2, target=1, max_batch=7, height=None):
    shape = (count, model.input.channels, height or model.input.size, model.input.size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=model.dtype)
    ctx = Context(model, images=images, ids=[f"p{i}" for i in range(count)], technique="occlusion", target=target, max_batch=max_batch)
    result = technique.run(ctx)
    return ctx, result, torch.tensor(result.artifacts[0].data).double()


@pytest.mark.parametrize(("size", "window", "stride"), [(12, 4, 2), (11, 4, 3), (13, 5, 5), (9, 9, 1), (10, 3, 2)])
@pytest.mark.parametrize("baseline", ["grey", "black", "mean"])
def test_linear_model_has_a_closed_form(size, window, stride, baseline):
    """The drop of a window is the sum of w (x - b) inside it; the map is the mean over covering windows."""
    model = linear_model(size)
    technique = Occlusion(target=1, window=window, stride=stride, baseline=baseline)
    ctx, _, stored = run(technique, model)
    measured = technique.measure(ctx)
    found = spread(measured.drops, measured.boxes, (size, size), "mean")
    w = model.module[1].weight[1].view(3, size, size)
    covers = {"grey": 0.5, "black": 0.0, "mean": ctx.images.mean((2, 3), keepdim=True)}
    parts = (w * (ctx.images - covers[baseline])).sum(1)  # (N, H, W)
    total, count = torch.zeros_like(parts), torch.zeros_like(parts)
    for top, bottom, left, right in windows(size, size, window, stride):
        total[:, top:bottom, left:right] += parts[:, top:bottom, left:right].sum((1, 2), keepdim=True)
        count[:, top:bottom, left:right] += 1
    assert count.min() >= 1
    torch.testing.assert_close(found, total / count, rtol=0, atol=1e-9)
    torch.testing.assert_close(stored, found, rtol=1e-6, atol=1e-7)  # artifacts are float32


@pytest.mark.parametrize(("size", "window", "stride"), [(12, 4, 2), (11, 4, 3), (13, 5, 4), (16, 8, 8), (17, 5, 5)])
def test_equals_captum(size, window, stride):
    model = linear_model(size)
    ctx, _, found = run(Occlusion(target=1, window=window, stride=stride), model)
    theirs = CaptumOcclusion(model).attribute(
        ctx.images, sliding_window_shapes=(3, window, window), strides=(3, stride, stride), target=1, baselines=0.5
    )
    torch.testing.assert_close(found, theirs.mean(1), rtol=0, atol=1e-5, check_dtype=False)


def test_equals_captum_on_the_real_model(squeezenet, registry):
    from harness.context import to_images
    from harness.datasets import load_dataset

    data = load_dataset("imagenet_samples", registry).select(1)
    images = to_images(data.pictures(squeezenet.input), squeezenet.device)
    # the same batches: the rounding of a convolution depends on what is beside it
    ctx = Context(squeezenet, images=images, ids=data.ids, technique="occlusion", max_batch=8)
    found = torch.tensor(Occlusion(window=60, stride=50, inference="full").run(ctx).artifacts[0].data)
    theirs = CaptumOcclusion(squeezenet).attribute(
        images, sliding_window_shapes=(3, 60, 60), strides=(3, 50, 50), target=ctx.predicted, baselines=0.5, perturbations_per_eval=8
    )
    torch.testing.assert_close(found, theirs.mean(1), rtol=0, atol=1e-5, check_dtype=False)


def test_probability_map_is_the_drop_of_the_softmax():
    model = linear_model(8)
    ctx, result, _ = run(Occlusion(target=1, window=4, stride=4), model, count=1)
    found = torch.tensor(result.artifacts[1].data)[0]
    clean = model(ctx.images).softmax(1)[0, 1]
    for top, left in [(0, 0), (4, 4), (0, 4)]:
        covered = ctx.images.clone()
        covered[:, :, top : top + 4, left : left + 4] = 0.5
        assert found[top, left].item() == pytest.approx((clean - model(covered).softmax(1)[0, 1]).item(), abs=1e-6)
    assert result.metrics[0].per_image[0] == pytest.approx(found.max().item(), abs=1e-6)


def test_xplique_sums_and_leaves_no_partial_windows():
    model = linear_model(11)
    _, _, found = run(Occlusion(target=1, window=4, stride=3, convention="xplique"), model, count=1)
    boxes = windows(11, 11, 4, 3, "xplique")
    assert len(boxes) == 3 * 3  # ceil((L - p + 1) / s) each way
    assert (found[:, 10:] == 0).all()
    _, _, mean = run(Occlusion(target=1, window=4, stride=3), model, count=1)
    assert found[0, 3, 3].item() == pytest.approx(4 * mean[0, 3, 3].item(), abs=1e-6)  # four windows meet there


def test_zennit_keeps_only_the_window_and_sums_the_score():
    model = linear_model(8)
    ctx, _, found = run(Occlusion(target=1, window=4, stride=4, convention="zennit"), model, count=1)
    kept = torch.full_like(ctx.images, 0.5)
    kept[:, :, :4, 4:] = ctx.images[:, :, :4, 4:]
    assert found[0, 1, 6].item() == pytest.approx(model(kept)[0, 1].item(), abs=1e-6)
    with pytest.raises(ConfigError, match="divides"):
        run(Occlusion(target=1, window=4, stride=3, convention="zennit"), model)


def test_the_batch_size_changes_nothing():
    model = linear_model(10)
    maps = [run(Occlusion(target=1, window=4, stride=3), model, max_batch=b)[2] for b in (1, 5, 64)]
    torch.testing.assert_close(maps[0], maps[1])
    torch.testing.assert_close(maps[0], maps[2])


def test_windows_that_cannot_be():
    with pytest.raises(ConfigError, match="leaves gaps"):
        Occlusion.build({"window": 4, "stride": 5})
    with pytest.raises(ConfigError, match="do not fit a picture of 8 x 8"):
        run(Occlusion(window=9, stride=2), linear_model(8))


@pytest.mark.parametrize(
    ("params", "side", "expected"),
    [
        ({}, 224, (32, 16)),
        ({}, 8, (2, 1)),
        ({}, 32, (5, 2)),
        ({"window": 9, "stride": 0.1}, 50, (9, 5)),
        ({"window": 1, "stride": 1}, 4, (1, 1)),
        ({}, 1, (1, 1)),
    ],
)
def test_sizes_in_pixels_or_as_a_share(params, side, expected):
    assert Occlusion(**params).pixels(side, side + 3) == expected


def test_sizes_that_make_no_sense():
    with pytest.raises(ConfigError, match="whole number of pixels"):
        Occlusion.build({"window": 3.5})
    with pytest.raises(ConfigError, match="leave gaps"):
        Occlusion(window=3, stride=0.5).pixels(20, 20)


def test_noise_belongs_to_the_picture():
    model = linear_model(8)
    first = run(Occlusion(target=1, window=4, stride=4, baseline="noise"), model)[2]
    again = run(Occlusion(target=1, window=4, stride=4, baseline="noise"), model, max_batch=2)[2]
    torch.testing.assert_close(first, again)
    assert not torch.allclose(first, run(Occlusion(target=1, window=4, stride=4), model)[2])


def test_blur_covers_less_than_grey_on_a_smooth_picture():
    model = linear_model(16)
    images = torch.linspace(0.2, 0.8, 16, dtype=torch.float64).expand(1, 3, 16, 16).contiguous()
    ctx = Context(model, images=images, ids=["p"], technique="occlusion", target=1)
    grey, blur = (abs(Occlusion(target=1, window=4, stride=4, baseline=b).run(ctx).artifacts[0].data).sum() for b in ("grey", "blur"))
    assert blur < grey
