"""Watch a forward pass. Hooks live inside a `with` block and are gone after it, whatever happens.

A layer is named by its dotted module name. A module that one forward pass calls several times (torchvision's ResNet
reuses its ReLU) has one output a call: `layer1.0.relu#1` is the first; the plain name means the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

ANSWER = ""  # stands for what the whole model gives among layer names


class NeverReached(ValueError):
    """A forward pass ended, or went another way, before a layer asked for."""


class _Reached(Exception):
    """The deepest layer asked for has answered; the rest of the forward pass is not needed."""


def split_call(name: str) -> tuple[str, int | None]:
    """'a.b#2' -> ('a.b', 2); 'a.b' -> ('a.b', None)."""
    base, mark, call = name.rpartition("#")
    return (base, int(call)) if mark and call.isdecimal() else (name, None)


def first_tensor(output: Any) -> Tensor | None:
    """The tensor a module gave, or the first of a tuple or list of them."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    return None


@contextmanager
def _attached(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def activations(
    forward: Callable[[Tensor], Any],
    modules: Mapping[str, nn.Module],
    calls: Mapping[str, int],
    layers: Sequence[str],
    images: Tensor,
    inputs: bool = False,
    reduce: Callable[[str, Tensor], Any] | None = None,
    calm: set[str] | None = None,
) -> dict[str, Any]:
    """{layer: output} of one forward pass, which ends at the deepest of the layers.

    Gradients flow where the caller enabled them. Outputs are as the layer gave them, also when an in-place operation follows: they are
    copied, but for those of layers in `calm`, into which a pass before did not write. Of these the pass's own tensors are given, not to be
    written into, unless it did write this time, when another pass is made; writes past torch's count (`.data`) are not seen.
    `calls` says how often a pass calls each module; `inputs` takes what the layers receive instead.
    `reduce(layer, output)` is kept in the output's place: many layers can be looked at without holding them all.
    The name `ANSWER` among the layers is what the whole pass gives.
    """
    wanted: dict[tuple[str, int], str] = {}
    same: dict[str, str] = {}  # two names of one call
    whole = ANSWER in layers
    for name in layers:
        if name == ANSWER:
            continue
        base, call = split_call(name)
        same[name] = wanted.setdefault((base, call or calls.get(base, 1)), name)
    found: dict[str, Any] = {}
    seen: dict[str, int] = {}
    calm = set() if calm is None else calm
    watched: dict[str, tuple[Tensor, int]] = {}  # what the pass may still write over, and how often it had been written then

    def keep(base: str, value: Any) -> None:
        seen[base] = seen.get(base, 0) + 1
        name = wanted.get((base, seen[base]))
        if name is None:
            return
        tensor = first_tensor(value)
        if tensor is None:
            raise TypeError(f"layer {name!r} does not give a tensor")
        last = not whole and len(found) + 1 == len(wanted)
        if reduce:
            found[name] = reduce(name, tensor)
        elif last:  # nothing comes after it
            found[name] = tensor
        elif tensor.is_inference():  # whose writes are not counted
            found[name] = tensor.clone()
        else:
            found[name] = tensor if name in calm else tensor.clone()
            watched[name] = tensor, tensor._version
        if last:
            raise _Reached

    handles: list[RemovableHandle] = []
    for base in dict.fromkeys(base for base, _ in wanted):
        module = modules[base]
        if inputs:
            handles.append(module.register_forward_pre_hook(lambda _m, args, base=base: keep(base, args)))
        else:
            handles.append(module.register_forward_hook(lambda _m, _args, output, base=base: keep(base, output)))
    with _attached(handles):
        try:
            found[ANSWER] = forward(images)
        except _Reached:
            pass
    written = {name for name, (tensor, version) in watched.items() if tensor._version != version}
    spoilt = written & calm
    calm |= watched.keys() - written
    calm -= spoilt
    if spoilt:
        found.clear()  # one pass at a time in memory
        watched.clear()
        return activations(forward, modules, calls, layers, images, inputs, reduce, calm)
    missing = [name for name in wanted.values() if name not in found]
    if missing:
        raise NeverReached(f"the forward pass never reached layer {missing[0]!r}")
    return {name: found[same.get(name, name)] for name in layers}


def tap(forward: Callable[[Tensor], Any], module: nn.Module, call: int, images: Tensor) -> tuple[Any, Tensor]:
    """(the pass's answer, the module's output at that call) with the answer differentiable in the output.

    What follows gets a copy, so that an operation in place leaves the output as the layer gave it; what came before is
    cut off, so that nothing is differentiated for it.
    """
    kept: list[Tensor] = []
    seen = 0

    def cut(_module: nn.Module, _args: Any, output: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen != call:
            return None
        if not isinstance(output, Tensor):
            raise TypeError("the layer does not give a tensor")
        kept.append(output.detach().requires_grad_())
        return kept[0].clone()

    with _attached([module.register_forward_hook(cut)]):
        answer = forward(images)
    if not kept:
        raise NeverReached("the forward pass never reached the layer")
    return answer, kept[0]


def trace_calls(forward: Callable[[Tensor], Any], modules: Mapping[str, nn.Module], images: Tensor) -> list[tuple[str, tuple[int, ...]]]:
    """(module name, output shape) of every call in one forward pass, in the order the calls end."""
    order: list[tuple[str, tuple[int, ...]]] = []

    def note(name: str, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            order.append((name, tuple(tensor.shape)))

    handles = [m.register_forward_hook(lambda _m, _a, output, name=name: note(name, output)) for name, m in modules.items()]
    with _attached(handles), torch.no_grad():
        forward(images)
    return order


# -- other rules for the backward pass through ReLU ---------------------------------------------------------------------

Rule = Literal["guided", "deconvnet", "redirected"]


class _Rectify(torch.autograd.Function):
    """ReLU whose backward pass follows a rule: 'guided' g * (g > 0) * (x > 0), 'deconvnet' g * (g > 0).

    'redirected' is the plain rule, but for pictures to which nothing would come back: those get what pushes silent units up,
    so that ascent can start from them (Olah et al. 2017, doi:10.23915/distill.00007, "rectified linear units").
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: Rule, inplace: bool) -> Tensor:
        ctx.rule = rule
        if inplace:
            ctx.mark_dirty(x)
        y = x.clamp_(min=0) if inplace else x.clamp(min=0)
        if rule != "deconvnet":
            ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        if ctx.rule == "deconvnet":
            return gradient.clamp(min=0), None, None
        (y,) = ctx.saved_tensors
        if ctx.rule == "guided":
            return torch.ops.aten.threshold_backward(gradient.clamp(min=0), y, 0), None, None  # one pass, as torch's own ReLU
        plain = gradient * (y > 0)
        silent = (plain.flatten(1) == 0).all(1).view(-1, *[1] * (plain.ndim - 1))
        return torch.where(silent, gradient.clamp(min=0), plain), None, None


_RELU = {F.relu: False, torch.relu: False, Tensor.relu: False, F.relu_: True, torch.relu_: True, Tensor.relu_: True}
# Nonlinearities that a rule for ReLU does not speak of.
_OTHERS = {
    getattr(F, n) for n in (
        "gelu", "silu", "mish", "hardswish", "hardsigmoid", "leaky_relu", "elu", "celu", "selu", "softplus", "relu6", "hardtanh", "prelu",
        "sigmoid", "tanh", "logsigmoid", "softsign", "glu", "threshold", "scaled_dot_product_attention", "multi_head_attention_forward",
    )
} | {torch.sigmoid, torch.tanh, Tensor.sigmoid, Tensor.tanh, Tensor.sigmoid_, Tensor.tanh_}  # fmt: skip


class relu_backward(TorchFunctionMode):  # used as a with-statement's verb
    """While it holds, every ReLU passes gradients back by `rule`, be it a module, a function or a tensor's method, in place
    or not; the model itself is not touched.

    `others` names nonlinearities met on the way that are no ReLU, `count` how many ReLUs there were.
    """

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.count = 0
        self.others: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _RELU:
            x = args[0] if args else kwargs["input"]
            inplace = _RELU[func] or bool(kwargs.get("inplace", args[1] if len(args) > 1 else False))
            self.count += 1
            return _Rectify.apply(x, self.rule, inplace)
        if func in _OTHERS:
            self.others.add(func.__name__.rstrip("_"))
        return func(*args, **kwargs)
