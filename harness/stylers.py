"""Networks that turn a picture into another in one pass: into a style (Johnson et al. 2016), into one of several styles (Dumoulin et
al. 2017), or into one of four times the size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .builders import build_module
from .device import placed
from .errors import ConfigError

if TYPE_CHECKING:
    from .registry import ModelEntry, Registry, StylerEntry

Norm = Literal["instance", "batch"]


class ConditionalInstanceNorm(nn.Module):
    """z = gamma_s (x - mu) / sigma + beta_s with mean and deviation of each picture's channel, and a row of gamma and beta a style
    (Dumoulin et al. 2017, arXiv:1610.07629, eq. 5). With one style, instance norm (Ulyanov et al. 2016, arXiv:1607.08022)."""

    def __init__(self, channels: int, styles: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(styles, channels))
        self.beta = nn.Parameter(torch.zeros(styles, channels))

    def forward(self, x: Tensor, mix: Tensor) -> Tensor:
        """x (N, C, H, W), mix (N, styles) weights of the styles' rows."""
        # Batch norm over a batch of one picture is instance norm, and unlike torch's instance norm, which turns pictures into
        # another layout and back, it works channels last and applies gamma and beta on the way.
        rows = zip(torch.split(x, 1), mix @ self.gamma, mix @ self.beta, strict=True)
        found = [F.batch_norm(part, None, None, gamma, beta, training=True, eps=self.eps) for part, gamma, beta in rows]
        return found[0] if len(found) == 1 else torch.cat(found)


class _Layer(nn.Module):
    """Reflected padding, a convolution, a norm."""

    def __init__(self, into: int, out: int, kernel: int, stride: int, norm: Norm, styles: int) -> None:
        super().__init__()
        self.pad = kernel // 2
        self.conv = nn.Conv2d(into, out, kernel, stride)
        self.norm = nn.BatchNorm2d(out) if norm == "batch" else ConditionalInstanceNorm(out, styles)

    def forward(self, x: Tensor, mix: Tensor) -> Tensor:
        x = self.conv(F.pad(x, (self.pad,) * 4, mode="reflect"))
        found: Tensor = self.norm(x) if isinstance(self.norm, nn.BatchNorm2d) else self.norm(x, mix)
        return found


class _Doubling(_Layer):
    """The same of a picture enlarged twofold by repetition, which is not made."""

    def forward(self, x: Tensor, mix: Tensor) -> Tensor:
        # What reflection puts around the enlarged picture, repetition of the edge puts around the small one.
        x = doubled(F.pad(x, (1,) * 4, mode="replicate"), self.conv)
        found: Tensor = self.norm(x) if isinstance(self.norm, nn.BatchNorm2d) else self.norm(x, mix)
        return found


class _Residual(nn.Module):
    def __init__(self, width: int, norm: Norm, styles: int) -> None:
        super().__init__()
        self.first, self.second = (_Layer(width, width, 3, 1, norm, styles) for _ in range(2))

    def forward(self, x: Tensor, mix: Tensor) -> Tensor:
        found: Tensor = x + self.second(F.relu(self.first(x, mix)), mix)
        return found


def doubled(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 3 x 3 convolution of x (N, C, H + 2, W + 2), padded by one, as if each pixel had first been repeated into 2 x 2: (N, K, 2 H, 2 W).

    Two of the three rows of a kernel meet one and the same row of the small picture, and so do columns; added up beforehand they are
    four kernels of 2 x 2, one for each place in a pixel's block. 4/9 of the products, and nothing large to pad and keep.
    """
    n, _, height, width = x.shape
    height, width = height - 2, width - 2
    out, into = conv.weight.shape[:2]

    def added(kernels: Tensor, dim: int) -> Tensor:
        """(2, *kernels.shape but for two in place of three along dim): what the first and the second of two pixels meets."""
        a, b, c = torch.split(kernels, 1, dim)
        return torch.stack([torch.cat([a, b + c], dim), torch.cat([a + b, c], dim)])

    kernels = added(added(conv.weight, 3), 3).reshape(4 * out, into, 2, 2)  # (row in the block, column, out) by into
    bias = None if conv.bias is None else conv.bias.repeat(4)
    found = F.conv2d(x, kernels.contiguous(memory_format=torch.channels_last), bias)
    found = found.permute(0, 2, 3, 1).reshape(n, height + 1, width + 1, 2, 2, out)
    rows = [torch.stack([found[:, p : p + height, q : q + width, p, q] for q in (0, 1)], 3) for p in (0, 1)]
    return torch.stack(rows, 2).reshape(n, 2 * height, 2 * width, out).permute(0, 3, 1, 2)


def in_pairs(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """conv(x) for an even width: two neighbours at once by a kernel wider by one. Twice as quick on processors where there are but three
    channels to make, which fill less than half a register."""
    both = torch.stack([F.pad(conv.weight, (0, 1)), F.pad(conv.weight, (1, 0))]).flatten(0, 1)
    bias = None if conv.bias is None else conv.bias.repeat(2)
    found = F.conv2d(x, both.contiguous(memory_format=torch.channels_last), bias, stride=(1, 2))
    n, channels, height, width = found.shape
    return found.reshape(n, 2, channels // 2, height, width).permute(0, 2, 3, 4, 1).reshape(n, channels // 2, height, 2 * width)


class TransformNet(nn.Module):
    """c9s1-32, d64, d128, R128 x 5, u64, u32, c9s1-3 (Johnson et al. 2016, arXiv:1603.08155, supplement) with reflected padding and
    enlargement by repetition in place of strided transposed convolutions; 1,679,235 parameters with one style.

    Pictures (N, channels, H, W) in [0, 1] of any size from 16 up -> the same shape, in [0, 1]: by a sigmoid, or with `squash` off by
    cutting off what lies beyond, as networks do that were trained elsewhere.
    """

    def __init__(
        self, channels: int = 3, width: int = 32, blocks: int = 5, styles: int = 1, norm: Norm = "instance", squash: bool = True
    ) -> None:
        super().__init__()
        self.styles, self.squash = styles, squash
        self.down = nn.ModuleList(
            _Layer(into, out, kernel, stride, norm, styles)
            for into, out, kernel, stride in ((channels, width, 9, 1), (width, 2 * width, 3, 2), (2 * width, 4 * width, 3, 2))
        )
        self.residual = nn.ModuleList(_Residual(4 * width, norm, styles) for _ in range(blocks))
        self.up = nn.ModuleList(_Doubling(into, out, 3, 1, norm, styles) for into, out in ((4 * width, 2 * width), (2 * width, width)))
        self.out = nn.Conv2d(width, channels, 9)

    def forward(self, x: Tensor, mix: Tensor | None = None) -> Tensor:
        height, width = x.shape[2:]
        if mix is None:
            mix = F.one_hot(torch.zeros(len(x), dtype=torch.int64, device=x.device), self.styles).to(x.dtype)
        # Halved twice and doubled twice: sides that are no multiple of four are filled up and cut off again.
        x = F.pad(x, (0, -width % 4, 0, -height % 4), mode="replicate")
        x = 4 * (x - 0.5)  # of about the deviation that the first weights expect
        for layer in self.down:
            x = F.relu(layer(x, mix))
        for block in self.residual:
            x = block(x, mix)
        for layer in self.up:
            x = F.relu(layer(x, mix))
        x = in_pairs(F.pad(x, (4,) * 4, mode="reflect"), self.out)
        x = torch.sigmoid(x) if self.squash else x.clamp(0, 1)
        return x[..., :height, :width]

    def row(self, style: int) -> list[Tensor]:
        """Views of gamma and beta of one style, all there is of it in the network."""
        norms = [m for m in self.modules() if isinstance(m, ConditionalInstanceNorm)]
        return [table.data[style] for m in norms for table in (m.gamma, m.beta)]


_EXAMPLES = {  # a layer of TransformNet, and the convolution and the norm that stand for it in the example's network
    **{f"down.{i}": (f"conv{i + 1}", f"in{i + 1}") for i in range(3)},
    **{
        f"residual.{i}.{part}": (f"res{i + 1}.conv{n}", f"res{i + 1}.in{n}")
        for i in range(5)
        for n, part in enumerate(("first", "second"), 1)
    },
    "up.0": ("deconv1", "in4"),
    "up.1": ("deconv2", "in5"),
}


def from_pytorch_examples(state: Mapping[str, Tensor], entry: ModelEntry) -> dict[str, Tensor]:
    """Weights of the `fast_neural_style` network of github.com/pytorch/examples as those of `TransformNet(squash=False)`.

    That network takes and makes pictures in 0..255, and its norms may hold running means of older versions of torch, which play no part.
    Scales go into the first and the last convolution, so that at sides that are multiples of four both make the same picture.
    """
    if entry.args.get("squash", True):
        raise ValueError("its pictures are cut off and not squashed: the entry needs `args: {squash: false}`")
    found: dict[str, Tensor] = {}
    for ours, (conv, norm) in _EXAMPLES.items():
        found[f"{ours}.conv.weight"], found[f"{ours}.conv.bias"] = state[f"{conv}.conv2d.weight"], state[f"{conv}.conv2d.bias"]
        found[f"{ours}.norm.gamma"], found[f"{ours}.norm.beta"] = state[f"{norm}.weight"][None], state[f"{norm}.bias"][None]
    first = found["down.0.conv.weight"]  # which meets 4 (x - 0.5) and expects 255 x
    found["down.0.conv.bias"] = found["down.0.conv.bias"] + 127.5 * first.sum((1, 2, 3))
    found["down.0.conv.weight"] = first * (255 / 4)
    found["out.weight"], found["out.bias"] = state["deconv3.conv2d.weight"] / 255, state["deconv3.conv2d.bias"] / 255
    return found


class SuperResolutionNet(nn.Module):
    """Residual blocks at the small size, then two doublings, added to the bicubic enlargement; after Johnson et al. 2016 without norms,
    so that each pixel depends on its surroundings alone and large pictures can be worked on in tiles.

    Pictures (N, channels, H, W) in [0, 1] -> (N, channels, 4 H, 4 W), not clipped.
    """

    def __init__(self, channels: int = 3, width: int = 32, blocks: int = 4) -> None:
        super().__init__()
        self.read = nn.Conv2d(channels, width, 5, padding=2)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)) for _ in range(blocks)
        )
        self.up = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.out = nn.Conv2d(width, channels, 5, padding=2)
        nn.init.zeros_(self.out.weight)  # begins as the bicubic enlargement
        assert self.out.bias is not None
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        start = F.interpolate(x, scale_factor=4.0, mode="bicubic", align_corners=False)
        y = self.read(x)
        for block in self.blocks:
            y = y + block(y)
        for layer in self.up:
            assert isinstance(layer, nn.Conv2d)
            y = F.leaky_relu(doubled(F.pad(y, (1,) * 4), layer), 0.2)
        found: Tensor = start + self.out(y)
        return found

    @property
    def reach(self) -> int:
        """How many pixels of the small picture around a pixel can change it; more than enough."""
        return 2 + 2 * len(self.blocks) + 4


class LoadedStyler:
    """A network that makes pictures in styles, ready for use: frozen."""

    def __init__(self, module: nn.Module, name: str, styles: Sequence[str], device: str | torch.device) -> None:
        self.name, self.styles = name, tuple(styles)
        self.device = torch.device(device)
        self.module = placed(module.eval().requires_grad_(False), self.device)

    def __call__(self, images: Tensor, mix: Sequence[float] = ()) -> Tensor:
        """Pictures (N, C, H, W) in [0, 1] in the style, or the mixture of styles by their weights."""
        weights = torch.tensor([mix or [1.0, *[0.0] * (len(self.styles) - 1)]], device=self.device, dtype=images.dtype)
        with torch.no_grad():
            made: Tensor = self.module(images.contiguous(memory_format=torch.channels_last), weights.expand(len(images), -1))
        return made


def load_styler(name: str, registry: Registry, device: str | torch.device = "cpu") -> LoadedStyler:
    """The styler of a registry name on a device."""
    entry: StylerEntry = registry.styler(name)
    module = build_module(name, entry)
    rows = getattr(module, "styles", len(entry.styles))
    if rows != len(entry.styles):
        raise ConfigError(f"{entry.where}: styler {name!r} names {len(entry.styles)} styles, and its network has {rows}")
    return LoadedStyler(module, name, entry.styles, device)
