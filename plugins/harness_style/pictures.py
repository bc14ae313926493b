"""Pictures that a technique names: of a registry's dataset, or files; in their own shape, at a size of one's choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from harness import Context

NAMED = "a picture of a dataset as DATASET:ID (textures:brick.png), or the path of a file"


def tensor_of(ctx: Context, picture: Image.Image, size: int) -> Tensor:
    """(1, C, H, W) in [0, 1], the longer side `size` pixels (0: as it is), in the colours that the model takes."""
    from harness.context import to_images
    from harness.datasets import at_size

    return to_images(at_size(picture, size, ctx.model.input.channels)[None], ctx.device, ctx.model.dtype)


def contents(ctx: Context, size: int) -> Iterator[tuple[str, Tensor]]:
    """The run's own pictures, uncut, in their own shapes, the longer side `size` pixels; one at a time, as they may be large."""
    return ((name, tensor_of(ctx, ctx.dataset.get(i), size)) for i, name in enumerate(ctx.ids))


def read_all(ctx: Context) -> None:
    """Open every picture once: that one is broken is told before work is put into the others."""
    for i in range(len(ctx.ids)):
        ctx.dataset.get(i)


SMALLEST = 16  # pixels of a side, below which nothing is left where a styler's network has a quarter of them


def small_ones(ctx: Context, size: int, layers: Sequence[str] = ()) -> dict[str, str]:
    """{name: why} of the pictures that stylers, or these layers of the model, do not take; raises where they take none."""
    from harness import NotApplicable

    found = {}
    for name, content in contents(ctx, size):
        height, width = content.shape[2:]
        if min(height, width) < SMALLEST:
            reason = f"a picture of {width} x {height} pixels is too small for stylers, which take {SMALLEST} and more; raise size"
        else:
            reason = unseen(ctx, content, layers) if layers else ""
        if reason:
            found[name] = f"{name}: {reason}"
    if len(found) == len(ctx.ids):
        raise NotApplicable("; ".join(found.values()))
    return found


def unseen(ctx: Context, image: Tensor, layers: Sequence[str]) -> str:
    """Why a network cannot look at a picture of this size, in its words; empty where it can."""
    return _looked_at(ctx, image, layers)[1]


def refusal(ctx: Context, image: Tensor, layers: Sequence[str]) -> str:
    """Why a picture of this size says nothing at these layers; empty where it does."""
    found, reason = _looked_at(ctx, image, layers)
    for name, value in found.items():
        if value.shape[2] * value.shape[3] < 4:
            return f"the picture is smaller than what a position of {name} sees: it has {value.shape[2]} x {value.shape[3]} positions there"
    return reason


def _looked_at(ctx: Context, image: Tensor, layers: Sequence[str]) -> tuple[dict[str, Tensor], str]:
    import torch

    from harness.context import out_of_memory

    try:
        with torch.no_grad():
            return ctx.model.activations(image, list(dict.fromkeys(layers))), ""
    except (RuntimeError, AssertionError, ValueError) as error:
        if out_of_memory(error):
            raise
        size = f"{image.shape[3]} x {image.shape[2]} pixels"
        words = " ".join(str(error).split())[:120]
        return {}, f"{ctx.model.name!r} takes no picture of {size}, too small for its layers or not the size it was made for: {words}"


def coarse_to_fine(height: int, width: int, halvings: int, least: int) -> list[tuple[int, int]]:
    """(height, width) from the coarsest to the full size, each half of the next; none with a side below `least` but the last."""
    sizes = [(max(1, round(height / 2**k)), max(1, round(width / 2**k))) for k in range(halvings, -1, -1)]
    return [size for size in sizes if size == (height, width) or min(size) >= least]


def resized(images: Tensor, height: int, width: int) -> Tensor:
    import torch.nn.functional as F

    if tuple(images.shape[2:]) == (height, width):
        return images
    smaller = height < images.shape[2]
    return F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False, antialias=smaller).clamp(0, 1)


MARGIN, ROOM = 6, 3  # pixels; what is next to the border of a network's maps is not what is inside
SHIFTS = ((0, 0), (2, 1), (1, 3), (3, 2), (1, 0), (3, 1), (0, 2), (2, 3))  # (down, to the right), of a stride of four
TIGHT = 2
WORTH = 10


def framed(images: Tensor, part: int | None = None) -> Tensor:
    """Pictures continued beyond their borders by `MARGIN` pixels and by up to `ROOM` more: strides leave out last rows and columns, maps
    are padded with zeros, and both would show along the border. `unframed` cuts the frame away.

    In each part of a descent the picture lies elsewhere in the frame by less than a stride: what a network does not see, as its strides
    pass over it, would stay as a grid (Odena et al. 2016, "Deconvolution and Checkerboard Artifacts", Distill). Without a part there are
    two pixels on the right and below alone, so that what is matched is the picture and hardly any frame."""
    import torch.nn.functional as F

    top, bottom, left, right = _around(part)
    return F.pad(images, (left, right, top, bottom), mode="reflect" if min(images.shape[2:]) > MARGIN + ROOM else "replicate")


def unframed(images: Tensor, part: int | None = None) -> Tensor:
    top, bottom, left, right = _around(part)
    return images[..., top : images.shape[2] - bottom, left : images.shape[3] - right]


def _around(part: int | None) -> tuple[int, int, int, int]:
    """Pixels above, below, to the left and to the right."""
    if part is None:
        return 0, TIGHT, 0, TIGHT
    down, right = SHIFTS[part % len(SHIFTS)]
    return MARGIN + down, MARGIN + ROOM - down, MARGIN + right, MARGIN + ROOM - right


def parts_of(steps: int, count: int) -> list[int]:
    """Steps of each of `count` parts of a descent, as even as can be; fewer parts where they would have less than `WORTH` steps, in which
    L-BFGS, which begins anew in each, would come to nothing."""
    count = max(1, min(count, steps // WORTH))
    return [steps * (i + 1) // count - steps * i // count for i in range(count)]


def eight_bits(images: Tensor) -> Tensor:
    """Whole 255ths, which are stored in a quarter of the space and are what a screen shows."""
    import torch

    return torch.round(images.clamp(0, 1) * 255) / 255


LEAST_SPREAD = 8 / 255  # below which colours count as one, so that their noise is not spread


def colours_of(image: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean (C,) and covariance (C, C) of the pixels of one picture (1, C, H, W)."""
    pixels = image[0].flatten(1).cpu().double().numpy()  # numpy knows no bfloat16
    return pixels.mean(1), np.cov(pixels, bias=True).reshape(len(pixels), -1)


def power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    """Of a covariance (C, C)."""
    values, vectors = np.linalg.eigh(matrix)
    found: np.ndarray = (vectors * values.clip(1e-12) ** exponent) @ vectors.T
    return found


def noise_of(noise: Tensor, mean: np.ndarray, covariance: np.ndarray) -> Tensor:
    """Noise (N, C, H, W) of deviation 1 with a mean (C,) and a covariance (C, C), but for what leaves [0, 1]."""
    import torch

    from harness.device import full_precision

    root, offset = (torch.from_numpy(a).to(noise.dtype).to(noise.device) for a in (power(covariance, 0.5), mean))
    with full_precision(noise.device):
        return (torch.einsum("dc,nchw->ndhw", root, noise) + offset[:, None, None]).clamp(0, 1)


def in_colours(image: Tensor, mean: np.ndarray, covariance: np.ndarray, share: float = 1.0) -> Tensor:
    """One picture (1, C, H, W) whose pixels have a mean (C,) and a covariance (C, C), but for what leaves [0, 1]: x -> T (x - m) + mean. Of
    all such linear maps T moves colours least: T = S^-1/2 (S^1/2 covariance S^1/2)^1/2 S^-1/2, S being the picture's own (Pitie &
    Kokaram 2007, "The linear Monge-Kantorovitch linear colour mapping for example-based colour transfer", CVMP). To both covariances
    `LEAST_SPREAD`^2 is added, so that contrast below it is not stretched. `share` of the way."""
    import torch

    from harness.device import full_precision

    own_mean, own = colours_of(image)
    least = LEAST_SPREAD**2 * np.eye(len(own))
    root, back = power(own + least, 0.5), power(own + least, -0.5)
    mixing = share * back @ power(root @ (covariance + least) @ root, 0.5) @ back + (1 - share) * np.eye(len(own))
    shift = own_mean + share * (mean - own_mean) - mixing @ own_mean
    matrix, offset = (torch.from_numpy(a).to(image.dtype).to(image.device) for a in (mixing, shift))
    with full_precision(image.device):
        return (torch.einsum("dc,nchw->ndhw", matrix, image) + offset[:, None, None]).clamp(0, 1)


def recoloured(images: Tensor, like: Tensor) -> Tensor:
    """The lightness of `images` with the colours of `like` (Gatys et al. 2016, arXiv:1606.05897, sec. 4.2: Y of one, IQ of the other)."""
    import torch

    if images.shape[1] != 3:
        return images
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    # Moving all three colours by the same amount changes Y and leaves I and Q.
    return (like + ((images - like) * weights).sum(1, keepdim=True)).clamp(0, 1)
