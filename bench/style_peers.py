"""A step of style transfer as pystiche 1.0.1 and neural-style 0.5.7 make it, where they are installed; neither is kept up any more.

Both get the network in torch's own layout behind its normalisation, with means in place of maxima, the same layers and weights, and
torch's L-BFGS with the history that ours has, one evaluation a step.
"""

from __future__ import annotations

import copy
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torchvision.models.squeezenet import Fire

from harness.models import LoadedModel
from harness_style.gram import falling

HISTORY = 3
PACES: list[float] = []  # when passes of these networks began
Steps = Callable[[int], object]


class Normalise(nn.Module):
    def __init__(self, model: LoadedModel) -> None:
        super().__init__()
        self.register_buffer("scale", model._scale.contiguous())
        self.register_buffer("shift", model._shift.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        PACES.append(time.perf_counter())
        return x * self.get_buffer("scale") + self.get_buffer("shift")


def own_layout(model: LoadedModel) -> nn.Sequential:
    """The network in torch's own layout behind its normalisation, as one has it who loads it by hand; from pictures in [0, 1]."""
    return nn.Sequential(Normalise(model), copy.deepcopy(model.module).to(memory_format=torch.contiguous_format)).eval()


class Expand(nn.Module):
    """What follows the squeeze layer in a Fire module."""

    def __init__(self, fire: Fire) -> None:
        super().__init__()
        self.fire = fire

    def forward(self, x: Tensor) -> Tensor:
        fire = self.fire
        return torch.cat([fire.expand1x1_activation(fire.expand1x1(x)), fire.expand3x3_activation(fire.expand3x3(x))], 1)


def averaging(module: nn.Module) -> nn.Module:
    """A mean over the same windows in place of a max pooling."""
    if not isinstance(module, nn.MaxPool2d):
        return module
    return nn.AvgPool2d(module.kernel_size, module.stride, module.padding, module.ceil_mode, count_include_pad=False)


def chain(model: LoadedModel, layers: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """The network down to the last of the layers as modules one after the other, by their dotted names."""

    def parts(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
        if not any(layer.startswith(f"{name}.") for layer in layers):
            return [(name, averaging(module))]
        if isinstance(module, Fire):
            return [(f"{name}.squeeze", module.squeeze), (f"{name}.squeeze_activation", module.squeeze_activation), (name, Expand(module))]
        return [part for n, child in module.named_children() for part in parts(f"{name}.{n}", child)]

    inner = copy.deepcopy(model.module).to(memory_format=torch.contiguous_format)
    found: list[tuple[str, nn.Module]] = [("normalise", Normalise(model))]
    for name, child in inner.named_children():
        for part in parts(name, child):
            found.append(part)
            if part[0] == layers[-1]:
                return found
    raise ValueError(f"{model.name} is not a chain of modules down to {layers[-1]}")


def peers(model: LoadedModel, picture: Tensor, style: Tensor, layers: Sequence[str], content: str) -> dict[str, Steps]:
    """{name: steps} of what can be imported."""
    made: dict[str, Steps] = {}
    modules = chain(model, [content, *layers])
    picture, style = picture.contiguous(), style.contiguous()
    if find_spec("pystiche"):
        made["pystiche"] = _pystiche(modules, picture, style, layers, content)
    if find_spec("neural_style"):
        made["neural-style"] = _neural_style(modules, picture, style, layers, content)
    return made


def _pystiche(modules: list[tuple[str, nn.Module]], picture: Tensor, style: Tensor, layers: Sequence[str], content: str) -> Steps:
    for name, addresses in (("alexnet", {"alexnet": ""}), ("vgg", {})):  # names that it still looks for in torchvision
        module = importlib.import_module(f"torchvision.models.{name}")
        if not hasattr(module, "model_urls"):
            module.model_urls = addresses
    from pystiche import enc, loss, optim

    encoder = enc.MultiLayerEncoder([(name.replace(".", "_"), module) for name, module in modules])
    names = [layer.replace(".", "_") for layer in layers]
    criterion = loss.PerceptualLoss(
        loss.FeatureReconstructionLoss(encoder.extract_encoder(content.replace(".", "_"))),
        loss.MultiLayerEncodingLoss(
            encoder, names, lambda e, weight: loss.GramLoss(e, score_weight=weight), layer_weights=falling(len(names)), score_weight=25.0
        ),
    )
    criterion.set_content_image(picture)
    criterion.set_style_image(style)

    def go(steps: int) -> None:
        optim.image_optimization(
            picture.clone().requires_grad_(),
            criterion,
            lambda image: torch.optim.LBFGS([image], max_iter=1, max_eval=2, history_size=HISTORY),
            num_steps=steps,
            quiet=True,
        )

    return go


def _neural_style(modules: list[tuple[str, nn.Module]], picture: Tensor, style: Tensor, layers: Sequence[str], content: str) -> Steps:
    arguments, sys.argv = sys.argv, ["neural-style"]  # it reads the command line when it is imported
    from neural_style.neural_style import ContentLoss, StyleLoss

    sys.argv = arguments
    contents, styles = [], []
    net = nn.Sequential()
    for name, module in modules:
        net.append(module)
        if name == content:
            contents.append(ContentLoss(1.0))
            net.append(contents[-1])
        if name in layers:
            styles.append(StyleLoss(25.0 * falling(len(layers))[layers.index(name)]))
            net.append(styles[-1])
    with torch.no_grad():
        for losses, seen in ((contents, picture), (styles, style)):
            for module in losses:
                module.mode = "capture"
            net(seen)
            for module in losses:
                module.mode = "None"
    for module in (*contents, *styles):
        module.mode = "loss"

    def go(steps: int) -> None:
        image = nn.Parameter(picture.clone())
        optimiser = torch.optim.LBFGS(
            [image], max_iter=steps, max_eval=2 * steps, tolerance_change=-1, tolerance_grad=-1, history_size=HISTORY
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            net(image)
            total: Tensor = sum(module.loss for module in (*contents, *styles))
            total.backward()
            return total

        optimiser.step(closure)

    return go
