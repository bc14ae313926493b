"""deep_dream against a plain port of the published loop, and each of its parts alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from harness import ConfigError, NotApplicable
from harness import optimise as o
from harness.context import Context, to_images
from harness.datasets import load_dataset
from harness.models import LoadedModel
from harness.registry import InputSpec
from harness.testing import run_once, small_dataset
from harness_synthesis import DeepDream
from harness_synthesis.deep_dream import _resized, closer, dream, sizes


def tiny(size=28):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 5, 3, stride=2, padding=1), nn.ReLU(inplace=True)
    )
    return LoadedModel(net.double(), InputSpec(size=size, mean=(0.4,) * 3, std=(0.3,) * 3))


def context(model, count=2, **more):
    shape = (count, 3, model.input.size, model.input.size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=model.dtype)
    return Context(model, images=images, ids=[f"p{i}" for i in range(count)], technique="deep_dream", **more)


def test_equals_the_published_loop():
    """make_step and deepdream of the notebook, written out: roll, forward, backward from the layer itself, step, unroll, clip."""
    model = tiny()
    technique = DeepDream(layer="3", steps=5, octaves=3, step_size=4.0, jitter=24)
    ctx = context(model)
    found, _ = dream(ctx, o.layer_norm("3"), ctx.images, technique, ctx.draws())
    jitter = round(24 * 28 / 224)
    for i in range(2):
        draws = ctx.draws([f"p{i}"])
        detail = None
        for side in (14, 20, 28):
            base = _resized(ctx.images[i, None], (side, side))
            x = base if detail is None else (base + _resized(detail, (side, side))).clamp(0, 1)
            for _ in range(5):
                ((dy, dx),) = draws.integers(-jitter, jitter + 1, 2)
                rolled = torch.roll(x, (dy, dx), (2, 3)).requires_grad_()
                layer = model.module(model.normalise(rolled))
                gradient = torch.autograd.grad(layer, rolled, grad_outputs=layer.detach())[0]
                rolled = rolled.detach() + 4 / 255 / gradient.abs().mean() * gradient
                x = torch.roll(rolled, (-dy, -dx), (2, 3)).clamp(0, 1)
            detail = x - base
        torch.testing.assert_close(found[i], x[0], rtol=0, atol=1e-10)


def test_octaves_grow_by_the_scale():
    assert sizes(224, 4, 1.4) == [82, 114, 160, 224]
    assert sizes(100, 1, 2.0) == [100]


def test_the_gradient_is_that_of_half_the_squared_norm():
    model = tiny()
    x = context(model).images.requires_grad_()
    layer = model.module(model.normalise(x))
    published = torch.autograd.grad(layer, x, grad_outputs=layer.detach())[0]  # diff = data
    ours = torch.autograd.grad(o.evaluate(model, o.layer_norm("3"), x, x).sum(), x)[0]
    torch.testing.assert_close(ours, published, rtol=0, atol=1e-10)


def test_the_mean_change_of_a_step_is_the_step_size():
    model = tiny()
    ctx = context(model)
    made = o.ascend(model, o.layer_norm("3"), ctx.images, steps=1, step_size=0.01, draws=ctx.draws(), rule="mean_abs")
    assert (made.images - ctx.images).abs().mean((1, 2, 3)).tolist() == pytest.approx([0.01, 0.01], abs=1e-12)


def test_no_steps_give_the_picture_back():
    model = tiny()
    ctx = context(model)
    result = DeepDream(layer="3", steps=0, octaves=3).run(ctx)
    np.testing.assert_allclose(result.artifacts[0].data, ctx.images.numpy(), atol=1e-7)
    assert result.metrics[0].value == pytest.approx(1)


@pytest.mark.parametrize("step", [1.5, 4000.0])
def test_pixels_stay_in_range(step):
    data = DeepDream(layer="3", steps=4, octaves=2, step_size=step).run(context(tiny())).artifacts[0].data
    assert data.min() >= 0
    assert data.max() <= 1
    assert np.isfinite(data).all()


def test_a_guide_pulls_each_place_towards_its_most_similar_feature():
    """The gradient at a place is the guide's feature with the largest dot product."""
    torch.manual_seed(0)
    guide, own = torch.rand(4, 3, 2), torch.rand(2, 4, 2, 2, requires_grad=True)
    score = o.guide_match("x", guide).score({"x": own}, own)
    gradient = torch.autograd.grad(score.sum(), own)[0]
    features = guide.flatten(1).T  # (6, 4)
    for n in range(2):
        for y in range(2):
            for x in range(2):
                best = features[(features @ own[n, :, y, x]).argmax()]
                torch.testing.assert_close(gradient[n, :, y, x], best)


def test_a_guided_dream_is_another_dream_and_names_its_guide(squeezenet, registry):
    photos = load_dataset("photos", registry)
    some = photos.select(indices=[0])
    small = LoadedModel(squeezenet.module, squeezenet.input.model_copy(update={"size": 96, "resize": 96}))
    runs = [
        run_once(DeepDream(layer="features.6", steps=3, octaves=2, guide=guide), small, some) for guide in ("", "hubble_deep_field.jpg")
    ]
    assert np.abs(runs[0].artifacts[0].data - runs[1].artifacts[0].data).max() > 0.05
    assert "after hubble_deep_field.jpg" in runs[1].artifacts[0].caption
    assert runs[1].metrics[0].value > 1
    with pytest.raises(ConfigError, match=r"no picture 'hubble.jpg'.*hubble_deep_field"):
        run_once(DeepDream(guide="hubble.jpg", octaves=2), small, some)


@pytest.mark.slow
def test_the_layers_norm_rises_in_nearly_every_step(squeezenet, registry):
    images = to_images(load_dataset("photos", registry).select(2).pictures(squeezenet.input), squeezenet.device)
    ctx = Context(squeezenet, images=images, ids=["a", "b"], technique="deep_dream")
    result = DeepDream(layer="features.10", jitter=0, octaves=2).run(ctx)
    found = {m.name: m for m in result.metrics}
    assert found["rising_steps"].value >= 0.95
    assert found["gain"].value > 5


def test_an_animation_moves_in():
    model = tiny()
    result = DeepDream(layer="3", steps=2, octaves=2, frames=4, zoom=0.2).run(context(model))
    zoom = next(a for a in result.artifacts if a.name == "zoom")
    assert zoom.moving
    assert zoom.data.shape == (4, 3, 28, 28)
    dreamt = result.artifacts[0].data[0]
    np.testing.assert_allclose(zoom.data[0], dreamt, atol=1 / 255)
    assert len({f.tobytes() for f in zoom.data}) == 4
    assert np.array_equal(np.rint(zoom.data * 255) / np.float32(255), zoom.data)


def test_closer_is_the_middle_enlarged():
    x = torch.arange(100.0).view(1, 1, 10, 10)
    found = closer(x, 0.4)
    assert found.shape == x.shape
    torch.testing.assert_close(found, torch.nn.functional.interpolate(x[:, :, 2:8, 2:8], size=(10, 10), mode="bilinear"))


def test_what_cannot_be(digits_cnn):
    with pytest.raises(ConfigError, match=r"deep_dream\.octaves: the smallest of 8 would have 3 pixels"):
        DeepDream(layer="3", octaves=8, octave_scale=1.4).run(context(tiny()))
    with pytest.raises(ConfigError, match="no layer 'features.99'"):
        run_once(DeepDream(layer="features.99", octaves=1), digits_cnn, small_dataset(1))
    with pytest.raises(ConfigError, match=r"octave_scale"):
        DeepDream.build({"octave_scale": 1})


def test_a_model_of_one_size_only():
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    vit = LoadedModel(VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=4), InputSpec(size=32))
    with pytest.raises(NotApplicable, match="takes pictures of any size"):
        DeepDream(layer="conv_proj", octaves=2).run(context(vit))


def test_a_score_that_stops_being_finite_keeps_the_last_good_picture():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            y = self.conv(x)
            return y / (x.amax((1, 2, 3), keepdim=True) < 0.93)  # no number once a pixel is bright

    model = LoadedModel(nn.Sequential(Breaks(), nn.Conv2d(4, 2, 1)), InputSpec(size=16, mean=(0.0,) * 3, std=(1.0,) * 3))
    images = torch.full((1, 3, 16, 16), 0.5) + 0.2 * torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ctx = Context(model, images=images, ids=["p"], technique="deep_dream")
    result = DeepDream(layer="0", octaves=1, steps=60, step_size=6.0, jitter=0).run(ctx)
    assert "stopped being finite" in result.notes[0]
    assert np.isfinite(result.artifacts[0].data).all()
    assert result.artifacts[0].data.max() < 0.93


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("squeezenet1_1", "features.10"),
        ("resnet18", "layer3"),
        ("vgg16", "features.22"),
        ("googlenet", "inception4d"),
        ("digits_cnn", "features.6"),
    ],
)
def test_a_block_three_quarters_deep_dreams_when_none_is_named(name, layer, registry):
    from harness.models import load_model
    from harness_synthesis.deep_dream import dreaming

    assert dreaming(Context(load_model(f"{name}@random", registry))) == layer


def test_a_dream_goes_on_from_an_earlier_one(digits_cnn, registry):
    data = load_dataset("digits", registry).select(2)
    settings = {"octaves": 1, "steps": 3, "jitter": 28}
    twice = run_once(DeepDream(dreams=2, **settings), digits_cnn, data)
    once = run_once(DeepDream(**settings), digits_cnn, data)
    rest = run_once(DeepDream(dreams=2, go_on=1, **settings), digits_cnn, data)
    np.testing.assert_array_equal(rest.artifacts[0].data, twice.artifacts[0].data)
    assert not np.array_equal(once.artifacts[0].data, twice.artifacts[0].data)
    with pytest.raises(ConfigError, match="go_on 2 must be fewer than dreams"):
        DeepDream.build({"dreams": 2, "go_on": 2})


def test_whole_pictures_keep_their_shape(squeezenet, registry):
    data = load_dataset("photos", registry).select(indices=[1, 3])  # 512 x 512 and 640 x 427
    settings = {"layer": "features.3", "octaves": 2, "steps": 2, "size": 160}
    result = run_once(DeepDream(**settings), squeezenet, data)
    shapes = {a.name: a.data.shape[2:] for a in result.artifacts if a.name.startswith("dream")}
    assert shapes == {"dream-1": (160, 160), "dream-2": (107, 160)}
    assert len(result.metrics[0].per_image) == 2 and result.metrics[0].value > 1
    twice = run_once(DeepDream(dreams=2, **settings), squeezenet, data)
    rest = run_once(DeepDream(dreams=2, go_on=1, **settings), squeezenet, data)
    for a, b in zip(twice.artifacts, rest.artifacts, strict=True):
        if a.name.startswith("dream"):
            np.testing.assert_array_equal(a.data, b.data)


def test_octaves_fit_small_pictures_unless_asked_for(digits_cnn, registry):
    data = load_dataset("digits", registry).select(1)
    assert len(run_once(DeepDream(steps=2), digits_cnn, data).artifacts) > 0
    with pytest.raises((ConfigError, NotApplicable)):
        run_once(DeepDream(steps=2, octaves=4), digits_cnn, data)
