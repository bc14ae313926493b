"""integrated_gradients, smoothgrad and grad_cam against closed forms and captum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients as CaptumIntegrated
from captum.attr import LayerGradCam
from torch import nn

from harness import ConfigError, NotApplicable
from harness.context import Context, to_images
from harness.datasets import load_dataset
from harness.models import LoadedModel, load_model
from harness.registry import InputSpec, load_registry
from harness.testing import run_once, small_dataset
from harness_saliency import GradCam, IntegratedGradients, Saliency, Smoothgrad
from harness_saliency.integrated_gradients import baseline, quadrature


def spec(channels=1, size=8):
    return InputSpec(channels=channels, size=size, mean=(0.0,) * channels, std=(1.0,) * channels)


def context(model, count=3, technique="x", **more):
    shape = (count, model.input.channels, model.input.size, model.input.size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=model.dtype)
    return Context(model, images=images, ids=[f"p{i}" for i in range(count)], technique=technique, **more)


def net(size=8):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * (size - 4) ** 2, 5)
    )  # fmt: skip
    return LoadedModel(module.double(), spec(size=size))


class Squares(nn.Module):
    """Scores sum x^2 and sum x^3."""

    def forward(self, x):
        flat = x.flatten(1)
        return torch.stack([flat.square().sum(1), flat.pow(3).sum(1)], 1)


def maps(result):
    return torch.tensor(result.artifacts[0].data)


# -- integrated_gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["gausslegendre", "midpoint"])
def test_a_linear_model_needs_one_step(rule):
    torch.manual_seed(0)
    model = LoadedModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double(), spec())
    ctx = context(model, target=2)
    start = baseline(ctx, "grey")
    shares = IntegratedGradients(target=2, steps=1, rule=rule).attribute(ctx, start)
    weight = model.module[1].weight[2].view(1, 1, 8, 8)
    torch.testing.assert_close(shares, (ctx.images - 0.5) * weight)


def test_powers_have_known_shares():
    """The way from zero to x of x^3 gives x^3 to each pixel; Gauss-Legendre with two points is exact for it."""
    model = LoadedModel(Squares().double(), spec())
    for target, power in ((0, 2), (1, 3)):
        ctx = context(model, target=target)
        shares = IntegratedGradients(target=target, steps=2, rule="gausslegendre").attribute(ctx, torch.zeros_like(ctx.images))
        torch.testing.assert_close(shares, ctx.images.pow(power))


def completeness(technique, model, data):
    return next(m for m in run_once(technique, model, data).metrics if m.name == "completeness_error")


def test_shares_add_up_to_the_difference(digits_cnn):
    """A smooth network: within a thousandth for every picture at 200 steps. With ReLU the gradient jumps along the way, and
    any rule converges as one over the steps (captum's by the same amount, see below)."""
    import copy

    smooth = copy.deepcopy(digits_cnn.module)
    for parent in (smooth.features, smooth.classifier):
        for i, module in enumerate(parent):
            if isinstance(module, nn.ReLU):
                parent[i] = nn.Softplus(beta=3)
    smooth.features[4] = nn.AvgPool2d(2)
    smooth = LoadedModel(smooth, digits_cnn.input, classes=digits_cnn.classes)
    for rule in ("midpoint", "gausslegendre"):
        assert max(completeness(IntegratedGradients(steps=200, rule=rule, target="labelled"), smooth, small_dataset(8)).per_image) <= 1e-3
    few, many = (completeness(IntegratedGradients(steps=n), digits_cnn, small_dataset(12)).value for n in (20, 200))
    assert many < few / 3
    assert many < 2e-3


@pytest.mark.parametrize(("rule", "theirs"), [("gausslegendre", "gausslegendre"), ("midpoint", "riemann_middle")])
def test_equals_captum(rule, theirs):
    model = net()
    ctx = context(model, target=3)
    expected, delta = CaptumIntegrated(model).attribute(
        ctx.images, baselines=torch.zeros_like(ctx.images), target=3, n_steps=20, method=theirs, return_convergence_delta=True
    )
    technique = IntegratedGradients(target=3, steps=20, rule=rule)
    ours = technique.attribute(ctx, torch.zeros_like(ctx.images))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        difference = model(ctx.images)[:, 3] - model(torch.zeros_like(ctx.images))[:, 3]
    torch.testing.assert_close(ours.flatten(1).sum(1) - difference, delta, rtol=0, atol=1e-5)


def test_points_and_weights():
    for rule in ("gausslegendre", "midpoint"):
        points, weights = quadrature(rule, 7)
        assert sum(weights) == pytest.approx(1)
        assert all(0 < p < 1 for p in points)
        assert np.dot(weights, points) == pytest.approx(0.5)


def test_baselines(digits_cnn):
    ctx = context(digits_cnn)
    assert not baseline(ctx, "black").any()
    assert (baseline(ctx, "white") == 1).all()
    assert torch.allclose(baseline(ctx, "mean"), torch.tensor(0.305))
    assert baseline(ctx, "blur").std() < ctx.images.std()
    same = context(digits_cnn)
    same._images = torch.zeros_like(same.images)
    result = IntegratedGradients(steps=2).run(same)  # the picture is the baseline: nothing to share out
    assert not result.artifacts[0].data.any()
    assert len(result.notes) == 3


# -- smoothgrad ------------------------------------------------------------------------------------------------------------


def test_without_noise_it_is_the_saliency_map():
    model = net()
    ours = maps(Smoothgrad(samples=3, noise=0.0, target=1).run(context(model, target=1)))
    torch.testing.assert_close(ours, maps(Saliency(target=1).run(context(model, target=1))))


def test_of_a_square_it_is_twice_the_mean_noisy_picture():
    model = LoadedModel(Squares().double(), spec())
    found = Smoothgrad(samples=40, noise=0.3, target=0).attribute(context(model, technique="smoothgrad", target=0, seed=5))
    again = context(model, technique="smoothgrad", seed=5)
    x = again.images
    spread = 0.3 * (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True))
    noisy = torch.stack([x + spread * again.randn_like(x) for _ in range(40)])
    torch.testing.assert_close(found, 2 * noisy.mean(0))
    squares = Smoothgrad(samples=40, noise=0.3, target=0, average="square").attribute(
        context(model, technique="smoothgrad", target=0, seed=5)
    )
    torch.testing.assert_close(squares, 4 * noisy.square().mean(0))


def test_of_a_linear_model_it_is_the_weight_whatever_the_noise():
    torch.manual_seed(0)
    model = LoadedModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double(), spec())
    found = Smoothgrad(samples=4, noise=1.0, target=1).attribute(context(model, target=1))
    torch.testing.assert_close(found, model.module[1].weight[1].view(1, 1, 8, 8).expand(3, -1, -1, -1))


def test_another_seed_is_another_map_and_the_same_is_the_same(digits_cnn):
    one, same, other = (maps(Smoothgrad(samples=3).run(context(digits_cnn, technique="smoothgrad", seed=s))) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


def test_it_is_smoother_than_one_gradient(squeezenet, registry):
    data = load_dataset("imagenet_samples", registry).select(2)
    images = to_images(data.pictures(squeezenet.input), squeezenet.device)

    def rough(technique):
        m = maps(technique.run(Context(squeezenet, images=images, ids=data.ids, technique=technique.name)))
        return ((m[:, 1:] - m[:, :-1]).square().mean((1, 2)) / m.square().mean((1, 2))).mean()

    assert rough(Smoothgrad(samples=10)) < 0.85 * rough(Saliency())


# -- grad_cam --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layer"), [("squeezenet1_1", "features.11"), ("resnet18", "layer3"), ("vgg16", "features.28")])
@pytest.mark.parametrize("relu", [True, False])
def test_maps_equal_captum(name, layer, relu, registry):
    """vgg16's features.28 is a convolution with an in-place ReLU behind it: its own negative values count."""
    model = LoadedModel(load_model(f"{name}@random", registry).module, InputSpec(size=96))
    ctx = context(model, 2, target=7)
    ours = GradCam(target=7, layer=layer, relu=relu).attribute(ctx, layer)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model.module

        def forward(self, x):
            return self.inner(model.normalise(x))

    whole = Whole()
    part = whole.get_submodule("inner." + layer)
    expected = LayerGradCam(whole, part).attribute(ctx.images.clone().requires_grad_(), target=7, relu_attributions=relu)[:, 0]
    if layer == "features.28":  # captum reads the tensor after the ReLU has written over it
        logits, maps_ = model.tap(ctx.images, layer)
        gradient = torch.autograd.grad(logits[:, 7].sum(), maps_)[0]
        assert (maps_ < 0).any()
        expected = (gradient.mean((2, 3), keepdim=True) * maps_).sum(1).detach()
        expected = expected.relu() if relu else expected
    torch.testing.assert_close(ours, expected.detach(), rtol=1e-4, atol=1e-7)
    assert ours.abs().max() > 0


def test_by_hand():
    """One convolution, global average, linear: a_k = w_k / (h w), the map is the class activation map over h w."""
    torch.manual_seed(0)
    net_ = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).double()
    model = LoadedModel(net_, spec())
    ctx = context(model, target=1)
    found = GradCam(target=1, layer="1", relu=False).attribute(ctx, "1")
    active = net_[1](net_[0](ctx.images))
    torch.testing.assert_close(found, torch.einsum("k,nkhw->nhw", net_[4].weight[1], active) / 36)


def test_a_channel_inside_and_a_callable_are_explained(digits_cnn):
    """For a neuron of a later layer the weights are its own gradients; for itself a layer's map is the rectified square."""
    ctx = context(digits_cnn, 2, target="neuron:classifier.1:7")
    found = GradCam(layer="features.3", relu=False).attribute(ctx, "features.3")
    output = digits_cnn.activations(ctx.images, ["features.3"])["features.3"].requires_grad_()
    rest = digits_cnn.module.classifier[:2](digits_cnn.module.features[4:](output))[:, 7]
    gradient = torch.autograd.grad(rest.sum(), output)[0]
    torch.testing.assert_close(found, (gradient.mean((2, 3), keepdim=True) * output).sum(1).detach())
    own = context(digits_cnn, 2, target="layer:features.3")
    found = GradCam(layer="features.3", relu=False).attribute(own, "features.3")
    torch.testing.assert_close(found, (output.mean((2, 3), keepdim=True) * output).sum(1).detach())
    assert GradCam().run(own).artifacts[0].caption.startswith("features.3")  # the deepest layer that the target stands on
    summed = context(digits_cnn, 2, target=f"{__name__}:margin")
    two = [GradCam(layer="features.3", relu=False).attribute(context(digits_cnn, 2, target=c), "features.3") for c in (3, 5)]
    torch.testing.assert_close(GradCam(layer="features.3", relu=False).attribute(summed, "features.3"), two[0] - two[1])


def margin(logits):
    return logits[:, 3] - logits[:, 5]


def test_the_model_is_left_alone_and_batches_do_not_matter(digits_cnn):
    before = digits_cnn.state()
    one, several = (GradCam().attribute(context(digits_cnn, 5, max_batch=b), "features.6") for b in (32, 2))
    torch.testing.assert_close(one, several)
    assert digits_cnn.state() == before


def test_what_grad_cam_says(digits_cnn):
    with pytest.raises(ConfigError, match=r"layer 'features\.6' comes after"):
        GradCam(layer="features.6").run(context(digits_cnn, target="layer:features.0"))
    beside = load_model("squeezenet1_1@random", load_registry())
    ctx = context(beside, 1, target="channel:features.3.expand3x3:0")
    with pytest.raises(ConfigError, match="does not stand on 'features.3.expand1x1'"):
        GradCam(layer="features.3.expand1x1").run(ctx)
    with pytest.raises(NotApplicable, match="needs a layer with maps"):
        GradCam(layer="classifier.1").run(context(digits_cnn))
    with pytest.raises(ConfigError, match="no layer 'features.9'"):
        GradCam(layer="features.9").run(context(digits_cnn))
    import copy

    silent = LoadedModel(copy.deepcopy(digits_cnn.module), digits_cnn.input)
    silent.module.classifier[3].weight.data.zero_()
    result = GradCam().run(context(silent))
    assert not result.artifacts[0].data.any()
    assert "nothing in features.6 speaks for the class" in result.notes[0]
