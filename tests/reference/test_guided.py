"""guided_backprop and deconvnet against their rules worked by hand, captum, and networks whose ReLU captum does not see."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from captum.attr import Deconvolution, NeuronGuidedBackprop
from captum.attr import GuidedBackprop as CaptumGuided
from torch import nn

from harness import NotApplicable
from harness.context import Context
from harness.models import LoadedModel, load_model
from harness.registry import InputSpec
from harness_saliency import Deconvnet, GuidedBackprop
from harness_saliency.guided_backprop import rule_gradient

# captum says that it hooks the network
pytestmark = pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU")


def spec(channels=1, size=8):
    return InputSpec(channels=channels, size=size, mean=(0.0,) * channels, std=(1.0,) * channels)


def context(model, count=2, **more):
    shape = (count, model.input.channels, model.input.size, model.input.size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=model.dtype)
    return Context(model, images=images, ids=[f"p{i}" for i in range(count)], technique="guided_backprop", **more)


class Small(nn.Module):
    """Two hidden layers whose ReLU comes in the form named."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(16, 12), nn.Linear(12, 10), nn.Linear(10, 3)
        self.form = form
        self.relu = nn.ReLU(inplace=form == "reused in place")
        self.other = nn.ReLU(inplace=form == "module in place")

    def rectify(self, x, first):
        if self.form in ("module", "module in place"):
            return (self.relu if first else self.other)(x)
        if self.form in ("reused", "reused in place"):
            return self.relu(x)
        if self.form == "function":
            return F.relu(x)
        if self.form == "function in place":
            F.relu(x, inplace=True)  # the answer is not used: the tensor itself must change
            return x
        if self.form == "torch":
            return torch.relu(x)
        if self.form == "method":
            return x.relu()
        assert self.form == "method in place"
        x.relu_()
        return x

    def forward(self, x):
        x = self.rectify(self.a(x.flatten(1)), True)
        return self.c(self.rectify(self.b(x), False))


FORMS = ["module", "module in place", "reused", "reused in place", "function", "function in place", "torch", "method", "method in place"]


@pytest.mark.parametrize("rule", ["guided", "deconvnet"])
@pytest.mark.parametrize("form", FORMS)
def test_the_rule_holds_for_every_form_of_relu(form, rule):
    """R_l = mask (R_{l+1} > 0) R_{l+1} worked by hand for two layers; the mask is the forward one in guided backprop alone."""
    net = Small(form).double()
    model = LoadedModel(net, spec(size=4))
    ctx = context(model, 3, target=1)
    found = rule_gradient(ctx, rule)
    x = ctx.images.flatten(1)
    z1 = net.a(x)
    z2 = net.b(z1.relu())
    back = net.c.weight[1].expand(3, -1)
    back = back.clamp(min=0) * ((z2 > 0) if rule == "guided" else 1)
    back = back @ net.b.weight
    back = back.clamp(min=0) * ((z1 > 0) if rule == "guided" else 1)
    torch.testing.assert_close(found.flatten(1), back @ net.a.weight, rtol=0, atol=1e-12)
    # afterwards everything is as before
    leaf = ctx.images.clone().requires_grad_()
    plain = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)[0]
    assert not torch.allclose(plain, found)
    torch.testing.assert_close(ctx.input_gradient(), plain)


@pytest.mark.parametrize(("ours", "theirs"), [("guided", CaptumGuided), ("deconvnet", Deconvolution)])
@pytest.mark.parametrize("name", ["alexnet", "vgg16", "squeezenet1_1"])
def test_equals_captum_signed(name, ours, theirs, registry):
    model = load_model(f"{name}@random", registry)
    small = LoadedModel(model.module, InputSpec(size=96), device="cpu")
    ctx = context(small, target=5)
    expected = theirs(_captums(small)).attribute(ctx.images.clone().requires_grad_(), target=5)
    found = rule_gradient(ctx, ours)
    assert found.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def _captums(model):
    """A module around a copy: captum swaps and hooks what it explains, and ours stays as it is."""
    import copy

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = copy.deepcopy(model.module)

        def forward(self, x):
            return self.inner(model.normalise(x))

    return Whole().eval()


def test_a_neuron_inside_equals_captum(squeezenet):
    small = LoadedModel(squeezenet.module, InputSpec(size=64))
    ctx = context(small, target="neuron:features.3:5,2,3")
    whole = _captums(small)
    expected = NeuronGuidedBackprop(whole, whole.inner.features[3]).attribute(
        ctx.images.clone().requires_grad_(), neuron_selector=(5, 2, 3)
    )
    torch.testing.assert_close(rule_gradient(ctx, "guided"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "densenet121"])
def test_networks_with_reused_and_functional_relu(name, registry):
    """Against the same network with every ReLU made a module of its own rule: a hook on the masks of the forward pass."""
    model = load_model(f"{name}@random", registry)
    small = LoadedModel(model.module, InputSpec(size=64))
    ctx = context(small, 2, target=3)
    found = rule_gradient(ctx, "guided")
    real = F.relu

    class Ruled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return real(x)

        @staticmethod
        def backward(ctx, g):
            return g * (g > 0) * (ctx.saved_tensors[0] > 0)

    patch = pytest.MonkeyPatch()
    patch.setattr(F, "relu", lambda x, inplace=False: Ruled.apply(x))
    try:
        leaf = ctx.images.clone().requires_grad_()
        expected = torch.autograd.grad(small(leaf)[:, 3].sum(), leaf)[0]
    finally:
        patch.undo()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_positive_later_layers_make_it_the_plain_gradient():
    net = Small("module").double()
    for layer in (net.b, net.c):
        layer.weight.data.abs_()
    model = LoadedModel(net, spec(size=4))
    ctx = context(model, 3, target=0)
    torch.testing.assert_close(rule_gradient(ctx, "guided"), ctx.input_gradient())


@pytest.mark.parametrize("form", [nn.GELU(), nn.SiLU(), nn.Tanh(), nn.Sigmoid(), nn.Hardswish(), nn.LeakyReLU()])
def test_other_nonlinearities_are_told(form):
    torch.manual_seed(0)
    model = LoadedModel(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), form, nn.Flatten(), nn.Linear(72, 2)), spec())
    with pytest.raises(NotApplicable, match="nonlinearities are ReLU; 'model' uses"):
        rule_gradient(context(model), "guided")


def test_a_network_without_relu_and_a_transformer():
    model = LoadedModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), spec())
    with pytest.raises(NotApplicable, match="has none"):
        rule_gradient(context(model), "guided")
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    vit = LoadedModel(VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=4), InputSpec(size=32))
    with pytest.raises(NotApplicable, match="gelu"):
        rule_gradient(context(vit), "guided")


@pytest.mark.parametrize("technique", [GuidedBackprop(), Deconvnet(values="signed", channels="sum")])
def test_what_they_give(technique, digits_cnn):
    result = technique.run(context(digits_cnn))
    maps, colour = result.artifacts
    assert maps.data.shape == (2, 8, 8)
    assert maps.signed == (technique.values == "signed")
    assert colour.data.shape == (2, 1, 8, 8)
    assert abs(colour.data - 0.5).max() == pytest.approx(0.5, abs=1e-6)


def test_a_zero_gradient_is_said():
    net = Small("module").double()
    net.c.weight.data.zero_()
    result = GuidedBackprop().run(context(LoadedModel(net, spec(size=4))))
    assert not result.artifacts[0].data.any()
    assert len(result.notes) == 2
    assert (result.artifacts[1].data == 0.5).all()


@pytest.mark.filterwarnings("ignore")  # the peer's own
@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
def test_equals_grad_cams_guided_backprop(name, registry):
    """The package grad-cam on a copy, since it swaps the network's ReLUs; one picture, (H, W, C)."""
    import copy

    from pytorch_grad_cam import GuidedBackpropReLUModel

    model = load_model(f"{name}@random", registry)
    small = LoadedModel(model.module, InputSpec(size=96, mean=(0.0,) * 3, std=(1.0,) * 3))
    ctx = context(small, 1, target=5)
    theirs = GuidedBackpropReLUModel(model=copy.deepcopy(small.module), device=torch.device("cpu"))(ctx.images, target_category=5)
    found = rule_gradient(ctx, "guided")[0].permute(1, 2, 0)
    assert found.abs().max() > 0
    torch.testing.assert_close(found, torch.as_tensor(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_grad_cam_equals_the_package_grad_cam(registry):
    """The package rescales each map to [0, 1]; so is ours here."""
    import copy

    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    from harness_saliency import GradCam

    model = load_model("resnet18@random", registry)
    small = LoadedModel(model.module, InputSpec(size=96, mean=(0.0,) * 3, std=(1.0,) * 3))
    ctx = context(small, 1, target=7)
    net = copy.deepcopy(small.module).requires_grad_(True)
    with GradCAM(model=net, target_layers=[net.layer4]) as cam:
        theirs = cam(input_tensor=ctx.images, targets=[ClassifierOutputTarget(7)])[0]
    ours = GradCam(target=7, layer="layer4").attribute(ctx, "layer4")[0]
    import cv2

    enlarged = cv2.resize(ours.numpy(), (96, 96))
    enlarged = (enlarged - enlarged.min()) / (enlarged.max() - enlarged.min())
    assert abs(enlarged - theirs).max() < 1e-4
