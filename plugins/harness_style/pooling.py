"""Max pooling replaced by averages, without touching the network."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


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
