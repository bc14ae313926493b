"""What is explained, reduced to one number a picture.

    predicted | labelled | CLASS NAME | CLASS INDEX        the class score (logit), unnormalised
    layer:NAME                                             half the squared norm of a layer
    channel:NAME:C                                         mean of channel C of a layer
    neuron:NAME:C,Y,X (or C for a vector)                  one unit of a layer
    path.to:function                                       function(logits (n, K)) -> (n,)

Channels come first in these names also where the layer gives them last, as those of Swin, ConvNeXt and ViT do (a token has one place).
A list gives each picture its own class, or its own channel or neuron of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import ConfigError, NotApplicable
from .technique import TargetSpec

if TYPE_CHECKING:
    from .models import LoadedModel

Rows = slice | Tensor


@dataclass(frozen=True)
class Target:
    """A scalar of the model's answer for each picture; `labels` name it, one a picture."""

    labels: tuple[str, ...]
    classes: Tensor | None = None  # (N,) class indices
    layer: str | None = None
    unit: tuple[int, ...] = ()  # () whole layer, (C,) channel, (C, Y, X) neuron
    units: Tensor | None = None  # (N, 1 or 3) one `unit` for each picture
    single: bool = False  # `unit` names one unit, not a channel
    behind: bool = False  # the layer gives positions before channels, as (N, H, W, C) or (N, tokens, C)
    function: Callable[[Tensor], Tensor] | None = None

    def output(self, model: LoadedModel, images: Tensor) -> Tensor:
        """What the target looks at: logits (n, K), or its layer's activations; the pass ends there."""
        return model(images) if self.layer is None else model.activations(images, [self.layer])[self.layer]

    def score(self, output: Tensor, rows: Rows = slice(None)) -> Tensor:
        """(n,) scores; `rows` says which picture each of the n outputs belongs to."""
        if self.function is not None:
            return self.function(output)
        if self.classes is not None:
            return output.gather(1, self.classes[rows].unsqueeze(1)).squeeze(1)
        if self.behind:
            output = output.movedim(-1, 1)
        if self.units is not None:
            mine = self.units[rows]
            picked = output[(torch.arange(len(output), device=output.device), *mine.unbind(1))]  # (n,) or (n, ...)
            return picked if self.single else picked.flatten(1).mean(1)
        if not self.unit:
            return output.flatten(1).square().sum(1) / 2
        if not self.single:
            return output[:, self.unit[0]].flatten(1).mean(1)
        for place in self.unit:
            output = output[:, place]
        return output

    def probability(self, output: Tensor, rows: Rows = slice(None)) -> Tensor | None:
        """(n,) softmax probability of the class, or None where the target is not a class."""
        if self.classes is None:
            return None
        chances = output.softmax(1) if output.shape[1] > 1 else output.sigmoid()  # of one score, what two-class networks mean by it
        return chances.gather(1, self.classes[rows].unsqueeze(1)).squeeze(1)


def resolve(
    spec: TargetSpec,
    model: LoadedModel,
    count: int,
    predicted: Callable[[], Tensor],
    labels: Tensor | None,
) -> Target:
    """The target a specification names, for `count` pictures; unknown names get the nearest ones."""
    if isinstance(spec, list):
        if len(spec) != count:
            raise ConfigError(f"target: {len(spec)} targets for {count} pictures")
        if any(_kind(s) for s in spec):
            return _units(spec, model)
        return _classes(model, [_class(s, model, predicted, labels, i) for i, s in enumerate(spec)])
    text = str(spec)
    kind, _, rest = text.partition(":")
    if text in ("predicted", "labelled"):
        _check_scores(model)
    if text == "predicted":
        return _classes(model, predicted())
    if text == "labelled":
        if labels is None:
            raise NotApplicable("target 'labelled' needs labels that are classes of this model")
        return _classes(model, labels)
    if _kind(text):
        return _inner(kind, rest, model, count)
    if ":" in text and text not in model.classes:
        return _function(text, count)
    _check_scores(model)
    return _classes(model, [model.class_index(spec)] * count)


def _check_scores(model: LoadedModel) -> None:
    try:
        _ = model.class_count
    except NotApplicable as none:
        raise NotApplicable(f"{none}: give a `target` such as layer:NAME or channel:NAME:C (`harness show {model.name}`)") from None


def _kind(spec: str | int) -> str:
    """'layer', 'channel' or 'neuron' for 'neuron:NAME:...' and the like; empty for classes and functions."""
    kind, _, rest = str(spec).partition(":")
    return kind if kind in ("layer", "channel", "neuron") and rest else ""


def _units(specs: Sequence[str | int], model: LoadedModel) -> Target:
    """A unit of one layer for each picture."""
    kinds = {_kind(s) for s in specs}
    if len(kinds) > 1 or not kinds <= {"channel", "neuron"}:
        raise ConfigError("target: a list names classes, or channels of one layer, or neurons of one layer, for all pictures alike")
    kind = kinds.pop()
    found = [_inner(kind, str(s).partition(":")[2], model, 1) for s in specs]
    if len({model.full_name(str(t.layer)) for t in found}) > 1:
        raise ConfigError(f"target: the {kind}s of a list lie in one layer, not in {' and '.join(sorted({str(t.layer) for t in found}))}")
    units = torch.tensor([t.unit for t in found], dtype=torch.int64, device=model.device)
    return Target(tuple(t.labels[0] for t in found), layer=found[0].layer, units=units, single=kind == "neuron", behind=found[0].behind)


def _class(spec: str | int, model: LoadedModel, predicted: Callable[[], Tensor], labels: Tensor | None, i: int) -> int:
    if spec == "predicted":
        return int(predicted()[i])
    if spec == "labelled":
        if labels is None:
            raise NotApplicable("target 'labelled' needs labels that are classes of this model")
        return int(labels[i])
    return model.class_index(spec)


def _classes(model: LoadedModel, indices: Sequence[int] | Tensor) -> Target:
    classes = torch.as_tensor(indices, dtype=torch.int64, device=model.device)
    return Target(tuple(model.class_name(i) for i in classes.tolist()), classes)


def _inner(kind: str, rest: str, model: LoadedModel, count: int) -> Target:
    layer, _, place = (rest, "", "") if kind == "layer" else rest.rpartition(":")
    if kind != "layer" and not (layer and place):
        raise ConfigError(f"target '{kind}:{rest}': write {kind}:LAYER:{'C' if kind == 'channel' else 'C,Y,X'}")
    shape = model.layer_shape(layer)
    behind = kind != "layer" and (len(shape) == 2 or model.full_name(layer) in model.channels_behind)
    if behind:
        shape = (shape[-1], *shape[:-1])
    try:
        unit = tuple(int(p) for p in place.split(",")) if place else ()
    except ValueError:
        raise ConfigError(f"target '{kind}:{rest}': {place!r} is not made of whole numbers") from None
    wanted = {"layer": 0, "channel": 1, "neuron": len(shape)}[kind]
    if kind == "channel" and len(shape) < 2:
        raise ConfigError(f"target 'channel:{rest}': layer {layer!r} is a vector; write neuron:{layer}:C")
    if len(unit) != wanted or any(not 0 <= u < n for u, n in zip(unit, shape, strict=False)):
        raise ConfigError(f"target '{kind}:{rest}': layer {layer!r} has shape {' x '.join(map(str, shape))}, counted from 0")
    return Target((f"{kind} {rest}",) * count, layer=layer, unit=unit, single=kind == "neuron", behind=behind)


def _function(path: str, count: int) -> Target:
    module, _, name = path.partition(":")
    try:
        function: Any = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"target {path!r}: {error}; write path.to:function, a class name or an index") from None
    return Target((path,) * count, function=function)
