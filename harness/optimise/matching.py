"""Places of a picture made like places of a style: Markov random fields of features (Li & Wand 2016, arXiv:1601.04589)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import at_least_single, full_precision
from .objectives import Objective, squared_distance
from .operators import gaussian_blur

MOST = 4096  # places of a style that are looked at
FEATURE_DIRECTIONS = 64  # in which surroundings are compared, of those in which the style's are largest
AT_ONCE = 1024  # places or patches of a picture that are compared with all of the style's


class Places(NamedTuple):
    """What a style's features are at one layer, place by place."""

    features: Tensor  # (M, C)
    surroundings: Tensor  # (M, D) along `directions`: features about their mean in windows of 3 x 3, 9 C numbers of length 1
    directions: Tensor  # (9 C, D)
    spread: Tensor  # (1,), mean squared distance of the features from their mean


def spread(features: Tensor) -> Tensor:
    """(N,) mean squared distance of the features of maps (N, C, H, W) from their mean."""
    with full_precision(features.device):
        return at_least_single(features).var((2, 3), correction=0).sum(1)


def feature_places(styles: Sequence[Tensor], shares: Sequence[float] = ()) -> Places:
    """Those of styles' maps (1, C, H, W), evenly spread, `MOST` at most. Each style has as large a part of them as its share (shares sum to
    1), and its spread counts by that share."""
    counted = _counted(styles, shares)
    most = min(float(MOST), *(maps[0, 0].numel() / share for maps, share in counted))
    features, surroundings = [], []
    with full_precision(styles[0].device):
        for given, share in counted:
            maps = at_least_single(given)
            height, width = maps.shape[2:]
            kept = _evenly(height * width, int(share * most + 1e-6), maps.device)
            features.append(maps[0].permute(1, 2, 0).flatten(0, 1)[kept])
            windows = _continued(maps)[0].unfold(1, 3, 1).unfold(2, 3, 1)  # (C, H, W, 3, 3), no copy
            surroundings.append(F.normalize(windows[:, kept // width, kept % width].transpose(0, 1).flatten(1), dim=1))
        whole = torch.cat(surroundings)
        directions = _principal(whole, FEATURE_DIRECTIONS)
        size = torch.stack([share * spread(maps) for maps, share in counted]).sum(0)
        return Places(torch.cat(features), whole @ directions, directions, size)


def _counted(styles: Sequence[Tensor], shares: Sequence[float]) -> list[tuple[Tensor, float]]:
    """Those with a share above zero; without shares all count the same."""
    return [(s, share) for s, share in zip(styles, shares or [1 / len(styles)] * len(styles), strict=True) if share > 0]


def _principal(values: Tensor, most: int) -> Tensor:
    """(D, min(D, most)) orthogonal directions in which values (M, D), not centred, are largest: by some steps of orthogonal iteration from
    as many of the values, since D x D matrices of networks with many channels are too large to be decomposed."""
    width = values.shape[1]
    if width <= most:
        return torch.eye(width, device=values.device, dtype=values.dtype)
    found = values[_evenly(len(values), most, values.device)].T
    found = F.pad(found, (0, most - found.shape[1]))
    for _ in range(4):
        found = _orthogonal(values.T @ (values @ found))
    return found


def _orthogonal(columns: Tensor) -> Tensor:
    there = columns.cpu() if columns.device.type == "mps" else columns
    return torch.linalg.qr(there)[0].to(columns.device)


def _evenly(count: int, most: int, device: torch.device) -> Tensor:
    """Up to `most`, and one at least, of `count` numbers from the first to the last."""
    few = min(count, max(1, most))
    return torch.arange(few, device=device) * (count - 1) // max(1, few - 1)


def nearest_places(features: Tensor, style: Places) -> Tensor:
    """(N, C, H, W): for each place of maps (N, C, H, W) the style's features at the place whose surroundings are most like its own, by
    the cosine of features about their means in windows of 3 x 3.

    With the means of either taken away (Kolkin et al. 2022, arXiv:2203.13215, sec. 3) places are told apart even where all features of the
    picture are far from the style's. Windows are compared along the directions in which the style's are largest. Cost: HW (M + 9 C) 64
    multiplications."""
    n, c, height, width = features.shape
    with torch.no_grad(), full_precision(features.device):
        # How long a window of the picture is does not change which one is most like it.
        kernels = style.directions.T.reshape(-1, c, 3, 3)
        codes = F.conv2d(_continued(at_least_single(features)), kernels).permute(0, 2, 3, 1).flatten(0, 2)
        found = torch.cat([style.features[_largest(some @ style.surroundings.T)] for some in torch.split(codes, AT_ONCE)])
    return found.view(n, height, width, c).permute(0, 3, 1, 2)


def match_error(wanted: Mapping[str, Tensor], spreads: Mapping[str, Tensor]) -> Objective:
    """sum_l ||F_l - T_l||^2 / (HW s_l) / L of L layers, T_l being what `nearest_places` found; with the style's spread as s_l about one
    where everything has the style's mean, zero where every place is one of the style's. Subtract it.

    wanted {layer: (N, C, H, W)}, spreads {layer: (1 or N,)}. Unlike statistics of whole pictures it says what there is at each place, so
    that strokes and shapes are whole. It holds for one T, which is to be found anew from time to time.
    """
    factors = {n: 1 / (len(wanted) * f[0, 0].numel() * spreads[n].expand(len(f)).clamp_min(1e-20)) for n, f in wanted.items()}

    def score(outputs: dict[str, Tensor], x: Tensor) -> Tensor:
        found = x.new_zeros(len(x))
        for name, features in wanted.items():
            found = found + squared_distance(outputs[name], features, factors[name])
        return found

    return Objective(frozenset(wanted), score)


def _largest(rows: Tensor) -> Tensor:
    """(P,) where each row is largest. On a CPU torch's own search takes several times as long as numpy's."""
    return torch.from_numpy(rows.numpy().argmax(1)) if rows.device.type == "cpu" else rows.argmax(1)


def _continued(maps: Tensor) -> Tensor:
    """(N, C, H + 2, W + 2) of maps (N, C, H, W): less their mean, the border's repeated beyond it."""
    return F.pad(maps - maps.mean((2, 3), keepdim=True), (1, 1, 1, 1), mode="replicate")


# -- pixels ----------------------------------------------------------------------------------------------------------------

PATCH, STEP = 6, 3  # pixels of a patch's side, and from one patch to the next
KINDS = 8192  # patches of a style that are looked at
DIRECTIONS = 32  # in which patches are compared, of those in which the style's are largest


class Patches(NamedTuple):
    """A style's square patches of pixels, each without its mean colour."""

    values: Tensor  # (M, side^2 C)
    codes: Tensor  # (M, D) along `directions`, of the style made soft
    directions: Tensor  # (side^2 C, D)
    side: int
    softness: float  # standard deviation, in pixels, of the Gaussian that makes styles and pictures soft before they are compared


def pixel_patches(styles: Sequence[Tensor], shares: Sequence[float] = (), side: int = PATCH, softness: float = 0.0) -> Patches:
    """Those of pictures (1, C, H, W), evenly spread, `KINDS` at most; of each as large a part as its share (shares sum to 1)."""
    views = []
    for image, share in _counted(styles, shares):
        height, width = image.shape[2:]
        whole = F.pad(at_least_single(image), (0, max(0, side - width), 0, max(0, side - height)), mode="replicate")
        both = torch.cat([whole, gaussian_blur(whole, softness)])
        views.append((both.unfold(2, side, 1).unfold(3, side, 1), share))  # (2, C, rows, columns, side, side), no copy
    most = min(float(KINDS), *(view[0, 0, ..., 0, 0].numel() / share for view, share in views))
    found = []
    for view, share in views:
        kept = _evenly(view[0, 0, ..., 0, 0].numel(), int(share * most + 1e-6), view.device)
        some = view[:, :, kept // view.shape[3], kept % view.shape[3]].transpose(1, 2)  # (2, M, C, side, side)
        found.append(_apart(some.flatten(0, 1).flatten(1), view.shape[1])[0].view(2, len(kept), -1))
    values, compared = torch.cat(found, 1)
    with full_precision(values.device):
        directions = _principal(compared, DIRECTIONS)
        return Patches(values, compared @ directions, directions, side, softness)


def repainted(images: Tensor, brush: Patches, amount: float = 1.0) -> Tensor:
    """(N, C, H, W) whose overlapping patches are the style's that are most like them, but for each one's mean colour; `amount` of the way.

    A step of texture optimisation (Kwatra et al. 2005, "Texture Optimization for Example-based Synthesis", SIGGRAPH): each patch takes
    the nearest of the style, pixels are means of the patches over them, weighted by a window. What a network does not see or cannot tell
    from strokes, ripples, grids and coloured fringes, is in no patch of the style and goes. Where the style has strokes as fine there are
    patches like ripples, though: a brush with softness compares what is left without either, and what it puts there has the style's own
    fine detail (Freeman et al. 2002, "Example-Based Super-Resolution", IEEE CG&A)."""
    c, height, width = images.shape[1:]
    side = brush.side
    with torch.no_grad(), full_precision(images.device):
        before = at_least_single(images)
        around = F.pad(gaussian_blur(before, brush.softness), (side,) * 4, mode="reflect" if min(height, width) > side else "replicate")
        pieces = F.unfold(around, side, stride=STEP)  # (N, side^2 C, L)
        lengths = brush.codes.square().sum(1)
        window = torch.hann_window(side + 2, periodic=False, device=before.device, dtype=before.dtype)[1:-1].square()
        weights = torch.outer(window, window).flatten()
        for picture in pieces:
            for some in torch.split(picture, AT_ONCE, dim=1):
                apart, mean = _apart(some.T, c)
                nearest = _largest(torch.addmm(lengths, apart @ brush.directions, brush.codes.T, beta=-1, alpha=2))
                found = brush.values[nearest].view(len(mean), c, -1) + mean
                some.copy_((found * weights).flatten(1).T)
        size = around.shape[2:]
        total = F.fold(weights[None, :, None].expand(1, -1, pieces.shape[2]).contiguous(), size, side, stride=STEP)
        made = F.fold(pieces, size, side, stride=STEP) / total.clamp_min(torch.finfo(total.dtype).tiny)
        made = made[..., side : side + height, side : side + width]
        return (before + amount * (made - before)).to(images.dtype)


FINE, LESS_FINE = 1.5, 6.0  # pixels; what a Gaussian of the first takes away is fine, what is between both a little less so


def with_detail(images: Tensor, contents: Tensor, styles: Sequence[Tensor], shares: Sequence[float] = (), amount: float = 1.0) -> Tensor:
    """Pictures (N, C, H, W) with `amount` times the fine detail of contents (N, C, H, W) added: what a Gaussian of 1.5 pixels takes away,
    windows and cables, which networks with large strides do not keep. It comes no stronger than the styles' (1, C, H, W) own, and no
    stronger than the pictures show the contents' shapes of the next larger size, as a share of how these are in the contents."""
    with torch.no_grad():
        before, own = at_least_single(images), at_least_single(contents)
        fine, shapes = _fine(own), _shapes(own)
        least = torch.finfo(own.dtype).tiny
        theirs = torch.stack([share * _fine(at_least_single(style)).square().mean() for style, share in _counted(styles, shares)]).sum(0)
        strength = (theirs / fine.square().mean((1, 2, 3), keepdim=True).clamp_min(least)).sqrt()
        shown = (shapes * _shapes(before)).sum((1, 2, 3), keepdim=True) / shapes.square().sum((1, 2, 3), keepdim=True).clamp_min(least)
        return (before + amount * torch.minimum(strength, shown).clamp(0, 1) * fine).to(images.dtype)


def _fine(images: Tensor) -> Tensor:
    return images - gaussian_blur(images, FINE)


def _shapes(images: Tensor) -> Tensor:
    """(N, 1, H, W) of the mean of colours."""
    grey = images.mean(1, keepdim=True)
    return gaussian_blur(grey, FINE) - gaussian_blur(grey, LESS_FINE)


BANDS = 24  # of spatial frequency, up to one that changes sign with each pixel
COARSEST, MOST_GAIN = 3, 2.0  # bands that stay as they are, and how far amplitudes of others may rise


def as_sharp_as(images: Tensor, styles: Sequence[Tensor], shares: Sequence[float] = ()) -> Tensor:
    """Pictures (N, C, H, W) whose fine bands of spatial frequency have the power that they have in the styles (1, C, H, W), as far as that
    takes no more than twice their amplitude; none gets less, and no band is raised less than a coarser one. Means of patches that lie over
    one another are softer than any of them."""
    with torch.no_grad():
        before = at_least_single(images)
        spectra = [share * _power(at_least_single(style)) for style, share in _counted(styles, shares)]
        own = _power(before)
        gains = (torch.stack(spectra).sum(0) / own.clamp_min(1e-12)).sqrt().clamp(1, MOST_GAIN)
        gains = torch.where(own > 1e-12, gains, torch.ones_like(gains))  # small pictures lack some bands
        gains[:, :COARSEST] = 1
        upward = torch.ones((BANDS, BANDS), device=gains.device, dtype=gains.dtype).tril()
        gains = (gains[:, None] * upward).amax(2)  # of a band and all coarser ones
        height, width = before.shape[2:]
        edge = min(32, height - 1, width - 1)  # mirrored, so that nothing comes round from the other side
        around = F.pad(before, (edge,) * 4, mode="reflect")
        size = around.shape[2:]
        place = (2 * BANDS * _frequencies(size[0], size[1], before) - 0.5).clamp(0, BANDS - 1)
        low = place.long()
        share = place - low
        gain = gains[:, low] * (1 - share) + gains[:, (low + 1).clamp(max=BANDS - 1)] * share  # (N, H, W // 2 + 1)
        made = torch.fft.irfft2(torch.fft.rfft2(around) * gain[:, None], s=size)
        return made[..., edge : edge + height, edge : edge + width].to(images.dtype)


def _power(images: Tensor) -> Tensor:
    """(N, BANDS) mean power of the mean of colours, windowed; none in bands that so small a picture has not."""
    n, _, height, width = images.shape
    window = torch.outer(
        *(torch.hann_window(k + 2, periodic=False, device=images.device, dtype=images.dtype)[1:-1] for k in (height, width))
    )
    grey = images.mean(1)
    power = torch.fft.rfft2((grey - grey.mean((1, 2), keepdim=True)) * window).abs().square() / window.square().sum()
    band = (2 * BANDS * _frequencies(height, width, images)).long().clamp(max=BANDS - 1).flatten()
    count = torch.zeros(BANDS, device=images.device, dtype=images.dtype).index_add_(0, band, torch.ones_like(power[0].flatten()))
    return power.new_zeros((n, BANDS)).index_add_(1, band, power.flatten(1)) / count.clamp_min(1)


def _frequencies(height: int, width: int, like: Tensor) -> Tensor:
    """(H, W // 2 + 1) cycles a pixel."""
    down = torch.fft.fftfreq(height, device=like.device, dtype=like.dtype)[:, None]
    return (down.square() + torch.fft.rfftfreq(width, device=like.device, dtype=like.dtype).square()).sqrt()


def _apart(patches: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """(M, side^2 C) without the mean of each colour, and those means (M, C, 1)."""
    values = patches.reshape(len(patches), channels, -1)
    mean = values.mean(2, keepdim=True)
    return (values - mean).flatten(1), mean
