"""A model ready to be looked at: pixels in, logits out, frozen, with its layers under dotted names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from . import hooks
from .builders import build_module
from .datasets import class_names
from .device import placed
from .errors import ConfigError, NotApplicable, did_you_mean, unknown
from .registry import InputSpec, Registry
from .weights import weights_hash

_CHANNELS_FIRST = (
    nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)  # fmt: skip


class LoadedModel:
    """Takes pixels in [0, 1], (N, C, H, W), float32; normalises inside; gives logits (N, K).

    The module is in evaluation mode, has no weight gradients and is channels_last.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: InputSpec,
        name: str = "model",
        classes: Sequence[str] = (),
        device: str | torch.device = "cpu",
        weights: str = "",
    ) -> None:
        self.name, self.input, self.classes, self.weights = name, spec, tuple(classes), weights
        self.device = torch.device(device)
        self.module = placed(module.eval().requires_grad_(False), self.device)
        dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)
        self.dtype = dtype
        self._mean = torch.tensor(spec.mean, device=self.device, dtype=dtype).view(1, -1, 1, 1)
        self._std = torch.tensor(spec.std, device=self.device, dtype=dtype).view(1, -1, 1, 1)
        self._scale, self._shift = 1 / self._std, -self._mean / self._std
        self._calm: set[str] = set()  # layers into whose outputs the model does not write later in a pass

    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits (N, K) of pixels (N, C, H, W) in [0, 1]."""
        return self.module(self.normalise(pixels))

    def normalise(self, pixels: Tensor) -> Tensor:
        """(x - mean) / std in one pass, channels_last: what the module itself takes."""
        return torch.addcmul(self._shift, pixels, self._scale).contiguous(memory_format=torch.channels_last)

    # -- layers ----------------------------------------------------------------------------------------------------

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every submodule by its dotted name."""
        return {name: module for name, module in self.module.named_modules() if name}

    @cached_property
    def calls(self) -> list[tuple[str, tuple[int, ...]]]:
        """(layer, output shape for one picture) in the order of a forward pass; reused modules are numbered `#1`, `#2`."""
        order = hooks.trace_calls(self, self.modules, self.example())
        total: dict[str, int] = {}
        for name, _ in order:
            total[name] = total.get(name, 0) + 1
        seen: dict[str, int] = {}
        numbered = []
        for name, shape in order:
            seen[name] = seen.get(name, 0) + 1
            numbered.append((f"{name}#{seen[name]}" if total[name] > 1 else name, shape))
        return numbered

    @cached_property
    def call_counts(self) -> dict[str, int]:
        """How often one forward pass calls each module."""
        counts: dict[str, int] = {}
        for name, _ in self.calls:
            base = hooks.split_call(name)[0]
            counts[base] = counts.get(base, 0) + 1
        return counts

    def full_name(self, name: str) -> str:
        """A layer's name as `calls` has it: with `#k` where a pass calls it several times (the last where none is given)."""
        self.check_layer(name)
        base, call = hooks.split_call(name)
        count = self.call_counts[base]
        return base if count == 1 else f"{base}#{call or count}"

    def layer_shape(self, name: str) -> tuple[int, ...]:
        """Output shape of a layer for one picture of the model's own size, without the batch."""
        return dict(self.calls)[self.full_name(name)][1:]

    @cached_property
    def channels_behind(self) -> frozenset[str]:
        """Layers that give (N, H, W, C): linear layers and norms inside ConvNeXt and Swin, and what follows them in place."""
        found: set[str] = set()
        previous: tuple[tuple[int, ...], bool] = ((), False)
        for name, shape in self.calls:
            module = self.modules[hooks.split_call(name)[0]]
            if len(shape) != 4 or isinstance(module, _CHANNELS_FIRST):
                behind = False
            elif type(module) is nn.LayerNorm or isinstance(module, nn.Linear):
                behind = True
            elif type(module).__name__ == "Permute":
                behind = list(getattr(module, "dims", ())) == [0, 2, 3, 1]
            else:
                behind = previous == (shape, True)
            if behind:
                found.add(name)
            previous = (shape, behind)
        return frozenset(found)

    def maps_shape(self, name: str) -> tuple[int, int, int]:
        """(C, H, W) of a layer with maps; NotApplicable for any other."""
        shape = self.layer_shape(name)
        if len(shape) != 3 or self.full_name(name) in self.channels_behind:
            order = " (positions before channels)" if len(shape) == 3 else ""
            raise NotApplicable(f"needs a layer with maps (C, H, W); {name!r} gives {' x '.join(map(str, shape))}{order}")
        return shape[0], shape[1], shape[2]

    def check_layer(self, name: str) -> None:
        """A ConfigError with the nearest names when the forward pass has no such layer."""
        base, call = hooks.split_call(name)
        if base not in self.call_counts:
            raise unknown("layer", name, [n for n, _ in self.calls], f"`harness show {self.name}`")
        if call is not None and not 1 <= call <= self.call_counts[base]:
            raise ConfigError(f"layer {name!r}: a forward pass calls {base!r} {self.call_counts[base]} times")

    def activations(
        self, images: Tensor, layers: Sequence[str], inputs: bool = False, reduce: Callable[[str, Tensor], Any] | None = None
    ) -> dict[str, Any]:
        """{layer: output}; the pass ends at the deepest of them. `inputs` takes what the layers receive instead.

        `reduce(layer, output)` takes the output's place as soon as it is there, so that many large ones need not be held.
        """
        for name in layers:
            if name != hooks.ANSWER:
                self.check_layer(name)
        return hooks.activations(self, self.modules, self.call_counts, layers, images, inputs, reduce, self._calm)

    def tap(self, images: Tensor, layer: str, forward: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """(logits, a layer's output), the logits being differentiable in the output and in nothing before it.

        `forward` gives something else than the logits from a pass through the model; ConfigError where it ends before the layer.
        """
        self.check_layer(layer)
        base, call = hooks.split_call(layer)
        with torch.enable_grad():
            try:
                return hooks.tap(forward or self, self.modules[base], call or self.call_counts[base], images)
            except hooks.NeverReached:
                raise ConfigError(f"layer {layer!r} comes after what is asked of it; name an earlier layer") from None

    @cached_property
    def last_map(self) -> str:
        """The last layer with learnt weights: the one that gives the class scores."""
        for name, _ in reversed(self.calls):
            if isinstance(self.modules[hooks.split_call(name)[0]], nn.Linear | nn.Conv2d):
                return name
        raise NotApplicable(f"model {self.name!r} has no linear layer or convolution")

    @cached_property
    def last_maps(self) -> str:
        """The deepest layer before the class scores whose output is maps (C, H, W) with more than one position."""
        names = [name for name, _ in self.calls]
        shapes = dict(self.calls)
        for name in reversed(names[: names.index(self.last_map)]):
            module, shape = self.modules[hooks.split_call(name)[0]], shapes[name]
            if (
                len(shape) == 4
                and shape[2] * shape[3] > 1
                and name not in self.channels_behind
                and not isinstance(module, nn.Sequential | nn.Dropout | nn.Identity)
            ):
                return name
        raise NotApplicable(f"model {self.name!r} has no layer with maps (C, H, W) before its class scores")

    def embedding(self, images: Tensor, layer: str = "penultimate") -> Tensor:
        """(N, D): a layer's output, averaged over positions; 'penultimate' is what the last linear layer receives."""
        if layer == "penultimate":
            value = self.activations(images, [self.last_map], inputs=True)[self.last_map]
        else:
            value = self.activations(images, [layer])[layer]
        if value.ndim == 4:
            # A linear layer takes channels last; what it gives is pooled afterwards.
            if layer == "penultimate":
                behind = isinstance(self.modules[hooks.split_call(self.last_map)[0]], nn.Linear)
            else:
                behind = self.full_name(layer) in self.channels_behind
            return value.mean((1, 2) if behind else (2, 3))
        return value.mean(1) if value.ndim == 3 else value.flatten(1)

    def convolutions(self) -> list[tuple[str, nn.Conv2d]]:
        """The 2-D convolutions in the order of a forward pass."""
        found = ((name, self.modules[hooks.split_call(name)[0]]) for name, _ in self.calls)
        return [(name, m) for name, m in found if isinstance(m, nn.Conv2d)]

    def example(self, n: int = 1) -> Tensor:
        """Grey pictures of the model's own size."""
        shape = (n, self.input.channels, self.input.size, self.input.size)
        return torch.full(shape, 0.5, device=self.device, dtype=self.dtype)

    # -- classes ---------------------------------------------------------------------------------------------------

    @cached_property
    def class_count(self) -> int:
        with torch.no_grad():
            logits = self(self.example())
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise NotApplicable(f"model {self.name!r} does not give class scores (N, K)")
        if self.classes and len(self.classes) != logits.shape[1]:
            raise ConfigError(
                f"model {self.name!r} has {len(self.classes)} class names for {logits.shape[1]} scores; correct `classes` in the registry"
            )
        return logits.shape[1]

    def class_index(self, name: str | int) -> int:
        """The index of a class given by name (any case) or by index."""
        count = self.class_count
        text = str(name).strip()
        if text.lstrip("-").isdecimal() and text.casefold() not in {c.casefold() for c in self.classes if not c.isdecimal()}:
            if not 0 <= int(text) < count:
                raise ConfigError(f"class {text}: model {self.name!r} has classes 0 to {count - 1}")
            return int(text)
        matches = [i for i, c in enumerate(self.classes) if c.casefold() == text.casefold()]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ConfigError(f"class {text!r} is the name of {' and '.join(map(str, matches))} in model {self.name!r}; give the index")
        raise ConfigError(
            f"no class {text!r} in model {self.name!r}{did_you_mean(text, self.classes) or f'; give an index from 0 to {count - 1}'}"
        )

    def class_name(self, index: int) -> str:
        return self.classes[index] if index < len(self.classes) else str(index)

    # -- left as found ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a run must leave as it found it: every tensor's identity and bits, types, training flags, hooks.

        Cost: one pass over the weights, one wait for the device.
        """
        tensors = self.module.state_dict(keep_vars=True)
        sums = torch.stack([_bit_sum(t) for t in tensors.values()]).tolist() if tensors else []
        weights = {n: (id(t), t.requires_grad, t.grad is None, s) for (n, t), s in zip(tensors.items(), sums, strict=True)}
        modes = {n: (type(m), m.training) for n, m in self.module.named_modules()}
        hooked = {
            n: sum(len(getattr(m, f"{kind}_hooks")) for kind in ("_forward", "_forward_pre", "_backward", "_backward_pre"))
            for n, m in self.module.named_modules()
        }
        return {"weights or buffers": weights, "modules or training flags": modes, "hooks": hooked}

    @cached_property
    def as_loaded(self) -> dict[str, Any]:
        """The state before the first run."""
        return self.state()

    def changes(self) -> list[str]:
        """What is no longer as it was when first asked."""
        return [what for what, value in self.state().items() if value != self.as_loaded[what]]


def _bit_sum(tensor: Tensor) -> Tensor:
    """A sum over a tensor's bits: `tensor.data` can be written to without the version counter noticing."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    detached = tensor.detach()
    return (detached if detached.dtype in (torch.bool, whole) else detached.view(whole)).sum(dtype=torch.int64)


def load_model(name: str, registry: Registry, device: str | torch.device = "cpu") -> LoadedModel:
    """The model of a registry name (or `NAME@random[:SEED]`) on a device."""
    entry = registry.model(name)
    return LoadedModel(build_module(name, entry), entry.input, name, class_names(entry.classes), device, weights_hash(name, entry))
