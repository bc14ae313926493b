"""Max pooling replaced by averages, without touching the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode


@contextmanager
def averaged(module: nn.Module) -> Iterator[None]:
    """Within the context passes of the module, of one thread, go by `AveragePooling`, and nothing else does: a function mode costs some
    microseconds an operation, and what is made of features takes hundreds."""
    passes: list[ExitStack] = []  # one inside another, where the module calls itself

    def enter(*_: object) -> None:
        passes.append(ExitStack())
        passes[-1].enter_context(AveragePooling())

    def leave(*_: object) -> None:
        passes.pop().close()

    # Also where a pass ends early, as it does behind the deepest layer that is asked for.
    handles = [module.register_forward_pre_hook(enter, prepend=True), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        while passes:  # what no hook hears of, an interrupt
            leave()


class AveragePooling(TorchFunctionMode):
    """Max pooling replaced by the mean over the same windows, for whatever runs inside; Gatys et al. found that gradients then flow
    better."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in ("max_pool2d", "boolean_dispatch", "_max_pool2d") and not kwargs.get("return_indices", False):
            names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            return F.avg_pool2d(
                given["input"],
                given["kernel_size"],
                given.get("stride"),
                given.get("padding", 0),
                ceil_mode=given.get("ceil_mode", False),
                count_include_pad=False,
            )
        return func(*args, **kwargs)
