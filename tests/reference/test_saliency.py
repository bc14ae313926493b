"""saliency against central differences, Euler's identity on a bias-free ReLU net, and captum."""

from __future__ import annotations

import pytest
import torch
from captum.attr import Saliency as CaptumSaliency
from torch import nn

from harness import ConfigError
from harness.context import Context
from harness.models import LoadedModel
from harness.registry import InputSpec
from harness_saliency import Saliency
from harness_saliency.measures import gini
from harness_saliency.saliency import reduce_channels


def net(bias=True, channels=3, size=8):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(channels, 6, 3, bias=bias),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, 3, bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * (size - 4) ** 2, 5, bias=bias),
    ).double()
    return LoadedModel(module, InputSpec(channels=channels, size=size, mean=(0.0,) * channels, std=(1.0,) * channels))


def context(model, count=3, **more):
    images = torch.rand(
        (count, model.input.channels, model.input.size, model.input.size), generator=torch.Generator().manual_seed(1), dtype=model.dtype
    )
    return Context(model, images=images, ids=[f"p{i}" for i in range(count)], technique="saliency", **more)


def maps(technique, ctx):
    return torch.tensor(technique.run(ctx).artifacts[0].data)


def test_equals_central_differences():
    model = net()
    ctx = context(model, count=1, target=2)
    gradient = ctx.input_gradient()[0]
    step = 1e-6
    for index in [(0, 0, 0), (1, 3, 4), (2, 7, 7), (0, 5, 2)]:
        up, down = ctx.images.clone(), ctx.images.clone()
        up[(0, *index)] += step
        down[(0, *index)] -= step
        difference = (model(up)[0, 2] - model(down)[0, 2]) / (2 * step)
        assert gradient[index].item() == pytest.approx(difference.item(), abs=1e-6)


def test_gradient_times_input_sums_to_the_score_of_a_bias_free_relu_net():
    model = net(bias=False)
    ctx = context(model, target=1)
    found = Saliency(target=1, times_input=True, values="signed", channels="sum")
    torch.testing.assert_close(maps(found, ctx).double().sum((1, 2)), model(ctx.images)[:, 1], rtol=1e-5, atol=1e-6)


def test_equals_captum_on_the_real_model(squeezenet, registry):
    from harness.context import to_images
    from harness.datasets import load_dataset

    data = load_dataset("imagenet_samples", registry).select(4)
    images = to_images(data.pictures(squeezenet.input), squeezenet.device)
    ctx = Context(squeezenet, images=images, ids=data.ids, technique="saliency")
    theirs = CaptumSaliency(squeezenet).attribute(images.clone().requires_grad_(), target=ctx.predicted, abs=True).amax(1)
    torch.testing.assert_close(maps(Saliency(), ctx), theirs, rtol=0, atol=1e-6)


def test_a_target_for_each_picture():
    model = net()
    mixed = maps(Saliency(), context(model, target=[0, "3", 4]))
    for i, c in enumerate([0, 3, 4]):
        torch.testing.assert_close(mixed[i], maps(Saliency(), context(model, target=c))[i])


@pytest.mark.parametrize(
    ("target", "closed"),
    [
        ("channel:0:2", lambda out: out[:, 2].mean((1, 2))),
        ("neuron:0:1,2,3", lambda out: out[:, 1, 2, 3]),
        ("layer:0", lambda out: out.square().sum((1, 2, 3)) / 2),
    ],
)
def test_inner_targets_are_what_they_say(target, closed):
    model = net()
    ctx = context(model, target=target)
    leaf = ctx.images.clone().requires_grad_()
    # layer 0 is followed by an in-place ReLU: its negative values must still count
    expected = torch.autograd.grad(closed(model.module[0](leaf)).sum(), leaf)[0]
    torch.testing.assert_close(ctx.input_gradient(), expected)


def test_a_function_as_target(monkeypatch, tmp_path):
    (tmp_path / "margins.py").write_text("def margin(logits):\n    return logits[:, 0] - 2 * logits[:, 1]\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = net()
    found = context(model, target="margins:margin").input_gradient()
    single = [context(model, target=c).input_gradient() for c in (0, 1)]
    torch.testing.assert_close(found, single[0] - 2 * single[1])
    for wrong in ("margins:no_such_function", "no_such_module:f"):
        with pytest.raises(ConfigError, match="path.to:function"):
            context(model, target=wrong).input_gradient()


def test_channel_reductions():
    g = torch.tensor([[[[1.0]], [[-3.0]], [[2.0]]]])
    assert reduce_channels(g, "absolute", "max").item() == 3
    assert reduce_channels(g, "absolute", "sum").item() == 6
    assert reduce_channels(g, "signed", "max").item() == -3
    assert reduce_channels(g, "signed", "sum").item() == 0


def test_a_zero_gradient_is_a_zero_map_with_a_note():
    model = net()
    model.module[5].weight.zero_()
    result = Saliency().run(context(model))
    assert not result.artifacts[0].data.any()
    assert len(result.notes) == 3
    assert result.metrics[0].value == 0


def test_gini_closed_forms():
    even, single = torch.ones(1, 4, 5), torch.zeros(1, 4, 5)
    single[0, 2, 2] = 7
    assert gini(even).item() == pytest.approx(0)
    assert gini(single).item() == pytest.approx(1 - 1 / 20)
    ramp = torch.arange(1, 5.0).view(1, 2, 2)
    assert gini(ramp).item() == pytest.approx(0.25)  # (1*-3 + 2*-1 + 3*1 + 4*3) / (4 * 10)


def test_works_on_a_transformer(registry):
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    vit = VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4)
    nn.init.normal_(vit.heads.head.weight)  # torchvision starts it at zero
    model = LoadedModel(vit, InputSpec(size=32))
    assert maps(Saliency(), context(model)).amax() > 0
