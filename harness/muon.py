"""Muon, an optimiser for the kernels of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the fifth-degree polynomial that takes singular values to about 1
ROUNDS = 5
RMS = 0.4


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon), of kernels as matrices (out, rest).

    m = momentum m + (1 - momentum) g; a kernel W changes by -lr RMS sqrt(max(out, rest)) orthogonal((1 - momentum) g + momentum m), so
    that all its singular directions learn alike and its entries change by about 0.4 lr whatever the shape (after Liu et al. 2025,
    arXiv:2502.16982, eq. 4, with 0.2). In the precision of the kernels: bfloat16, which torch's own works in, is slow on processors.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 0.002, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2:
                    raise ValueError(f"Muon learns matrices and kernels, not a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One change of all kernels that have a slope."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                memory = self.state[p]
                if not memory:
                    memory["momentum"] = torch.zeros_like(p)
                m = memory["momentum"].lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(m, group["momentum"])
                change = orthogonal(ahead.flatten(1))
                p.add_(change.reshape(p.shape), alpha=-group["lr"] * RMS * max(change.shape) ** 0.5)
        return loss


def orthogonal(x: Tensor) -> Tensor:
    """About U V^T of x (M, N) = U S V^T: singular values between 0.68 and 1.21 where S is above 0.002 of its norm, by Newton-Schulz."""
    tall = x.shape[0] > x.shape[1]
    y = x.T if tall else x
    y = y / y.norm().clamp_min(torch.finfo(x.dtype).tiny)
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        gram = y @ y.T
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.T if tall else y
