"""Places of a picture made like places of a style: brute force, closed forms, effects, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from harness import ConfigError
from harness import optimise as o
from harness.context import Context
from harness.datasets import at_size
from harness.optimise.matching import MOST_GAIN, spread
from harness.registry import load_registry
from harness.testing import load_dataset, run_once
from harness_style import StyleTransfer
from harness_style.gram import maps_of, pooled, sparse, style_layers
from harness_style.pictures import framed
from harness_style.style_transfer import LARGE, MATCHES, SOFT, Plan, Transfer

IHC, BRICK = "textures:ihc.png", "textures:brick.png"


def maps(seed, n=1, c=4, height=5, width=6):
    return torch.randn((n, c, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def windows(picture):
    """{place: the features about their mean in a window of 3 x 3}, numbers beyond the border being the border's."""
    f = picture.numpy()
    f = f - f.mean((1, 2), keepdims=True)
    c, height, width = f.shape
    around = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return {
        (y, x): np.array([f[k, min(max(y + i, 0), height - 1), min(max(x + j, 0), width - 1)] for k in range(c) for i, j in around])
        for y in range(height)
        for x in range(width)
    }


def test_each_place_gets_the_features_of_the_one_whose_surroundings_are_most_like_its_own(monkeypatch):
    monkeypatch.setattr("harness.optimise.matching.AT_ONCE", 7)
    monkeypatch.setattr("harness.optimise.matching.FEATURE_DIRECTIONS", 36)  # none left out
    style, pictures = maps(0, height=7, width=4), maps(1, n=2)
    found = o.nearest_places(pictures, o.feature_places([style]))
    assert found.shape == pictures.shape
    theirs = windows(style[0])
    for picture, to in zip(pictures, found, strict=True):
        for (y, x), own in windows(picture).items():
            like = {place: own @ w / math.sqrt((own @ own) * (w @ w)) for place, w in theirs.items()}
            row, column = max(like, key=lambda place: like[place])
            assert torch.equal(to[:, y, x], style[0, :, row, column])


def test_a_style_finds_itself_and_neither_brightness_nor_contrast_matters():
    style = maps(0)
    places = o.feature_places([style])
    assert torch.equal(o.nearest_places(style, places), style)
    assert torch.equal(o.nearest_places(0.3 * style + 5, places), style)
    assert not torch.equal(o.nearest_places(style.flip(3), places), style)


def test_the_error_and_its_slope_are_those_written_out():
    found = {"a": maps(1, n=2), "b": maps(2, n=2, c=3)}
    styles = {name: o.feature_places([maps(seed, c=f.shape[1], height=8)]) for seed, (name, f) in zip((3, 4), found.items(), strict=True)}
    wanted = {name: o.nearest_places(f, styles[name]) for name, f in found.items()}
    share = torch.tensor([1.0, -3.0], dtype=torch.float64)

    def written_out(leaves):
        total = 0
        for seed, (name, f) in zip((3, 4), leaves.items(), strict=True):
            flat = maps(seed, c=f.shape[1], height=8)[0].flatten(1)
            spread = float(np.trace(np.cov(flat.numpy(), bias=True)))
            total = total + (f - wanted[name]).square().sum((1, 2, 3)) / (30 * spread)
        return total / 2

    values, slopes = [], []
    ours = o.match_error(wanted, {name: p.spread for name, p in styles.items()})
    for score in (lambda leaves: ours.score(leaves, leaves["a"]), written_out):
        leaves = {name: f.clone().requires_grad_() for name, f in found.items()}
        values.append(score(leaves))
        slopes.append(torch.autograd.grad((share * values[-1]).sum(), list(leaves.values())))
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*slopes)
    assert ours.score(wanted, wanted["a"]).abs().max() == 0


def test_the_mean_of_a_style_is_one_away():
    style = maps(0)
    mean = style.mean((2, 3), keepdim=True).expand_as(style)
    assert float(o.match_error({"a": style}, {"a": spread(style)}).score({"a": mean}, mean)) == pytest.approx(1)


def test_of_many_places_some_are_kept_evenly(monkeypatch):
    style = maps(0, height=20, width=30)
    rows = style[0].flatten(1).T
    every = o.feature_places([style])
    assert torch.equal(every.features, rows)
    monkeypatch.setattr("harness.optimise.matching.MOST", 7)
    few = o.feature_places([style])
    kept = [i * 599 // 6 for i in range(7)]
    assert torch.equal(few.features, rows[kept])
    wanted = np.array(list(windows(style[0]).values()))[kept]
    unit = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    assert np.allclose(few.surroundings @ few.directions.T, unit, atol=1e-9)  # seven lie in few directions
    assert few.spread == every.spread  # of all


def test_several_styles_are_searched_together_each_by_its_share():
    one, two = maps(0), maps(1) * 3
    both = o.feature_places([one, two])
    assert torch.equal(o.nearest_places(one, both), one)
    assert torch.equal(o.nearest_places(two, both), two)
    rows, others = (x[0].flatten(1).T for x in (one, two))
    assert torch.equal(both.features, torch.cat([rows, others]))
    fewer = o.feature_places([one, two], [0.25, 0.75])
    assert torch.equal(fewer.features, torch.cat([rows[[i * 29 // 9 for i in range(10)]], others]))  # 10 of 30, and all of the other
    assert float(fewer.spread) == pytest.approx(0.25 * float(spread(one)) + 0.75 * float(spread(two)))


def test_styles_without_a_share_are_left_out():
    one, two = maps(0), maps(1)
    assert torch.equal(o.feature_places([one, two], [1.0, 0.0]).surroundings, o.feature_places([one]).surroundings)
    one, two = picture(0), picture(1)
    assert torch.equal(o.pixel_patches([one, two], [1.0, 0.0]).codes, o.pixel_patches([one]).codes)
    assert torch.equal(o.as_sharp_as(one, [two, one], [1.0, 0.0]), o.as_sharp_as(one, [two]))


def test_few_directions_find_places_nearly_as_like(squeezenet, photo, monkeypatch):
    """Of 288 numbers a place 64 are compared."""
    ctx = context(squeezenet, photo)
    layer = style_layers(ctx, ())[2]
    style, own = (
        maps_of(squeezenet, torch.from_numpy(at_size(p, 256, 3)).permute(2, 0, 1)[None].float() / 255, [layer], "average")[layer]
        for p in (ctx.named_picture(IHC), photo.get(0))
    )
    found = o.nearest_places(own, o.feature_places([style]))
    monkeypatch.setattr("harness.optimise.matching.FEATURE_DIRECTIONS", 288)
    whole = o.nearest_places(own, o.feature_places([style]))
    assert float((found == whole).all(1).float().mean()) > 0.6


@pytest.mark.parametrize("value", [0.0, 123.4])
def test_of_a_style_of_one_colour_errors_stay_numbers(value):
    style, x = torch.full((1, 4, 5, 6), value), maps(1).float().requires_grad_()
    places = o.feature_places([style])
    error = o.match_error({"a": o.nearest_places(x, places)}, {"a": places.spread}).score({"a": x}, x)
    (slope,) = torch.autograd.grad(error.sum(), x)
    assert torch.isfinite(error).all()
    assert torch.isfinite(slope).all()


# -- in style_transfer -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo(registry):
    data = load_dataset("photos", registry)
    return data.select(indices=[data.ids.index("chelsea.png")])


def context(model, data):
    return Context(model, ids=data.ids, dataset=data, technique="style_transfer", registry=load_registry())


def quick(**more):
    return StyleTransfer(**{"style": (IHC,), "steps": 30, "size": 128, "coarse": 0, "shifts": 1, **more})


def made(result):
    return next(a for a in result.artifacts if a.name == "transfer-1").data[-1]


def first(result):
    return next(a for a in result.artifacts if a.name == "objective").lines["result"][0]


def test_layers_with_strides_of_eight_and_more_are_compared(squeezenet, photo):
    ctx = context(squeezenet, photo)
    squeezed = [f"features.{i}.squeeze_activation" for i in (6, 7, 10)]
    assert sparse(ctx, style_layers(ctx, ())) == squeezed
    assert sparse(ctx, ["features.2", "features.4"]) == ["features.4"]  # of strides of four the last
    assert sparse(ctx, ["features.0", "features.1"]) == []
    result = run_once(quick(style_layers=("features.1",), steps=2), squeezenet, photo)
    assert np.isfinite(made(result)).all()


def test_matches_bring_places_like_the_style_s(squeezenet, photo):
    """What is left is measured on the finished picture, with matches found anew."""
    ctx = context(squeezenet, photo)
    layers = style_layers(ctx, ())
    transfer = Transfer(ctx, quick(), layers, layers[0], [ctx.named_picture(IHC)], Plan("a", 1.0, 1.0), "a")
    places = transfer.style_places(128)
    left = {}
    for weight in (0.0, 0.5, 5.0):
        image = torch.as_tensor(made(run_once(quick(match_weight=weight, strokes=0.0), squeezenet, photo)))[None]
        found = maps_of(squeezenet, image, list(places), "average")
        wanted = {name: o.nearest_places(f, places[name]) for name, f in found.items()}
        left[weight] = float(o.match_error(wanted, {n: p.spread for n, p in places.items()}).score(found, image))
    assert left[5.0] < left[0.5] < 0.9 * left[0.0]


@pytest.mark.parametrize(("name", "fainter"), [(IHC, False), (BRICK, True)])
def test_the_objective_has_them_by_their_weight(name, fainter, squeezenet, photo):
    """As shares of the style's spread, or of the content's, if that is larger."""
    ctx = context(squeezenet, photo)
    layers = style_layers(ctx, ())
    more = {"style": (name,), "palette": 0.0, "steps": 1, "style_weight": (3.0,)}
    with_them, without = (first(run_once(quick(match_weight=w, **more), squeezenet, photo)) for w in (0.5, 0.0))
    style, picture = (
        torch.from_numpy(at_size(p, 128, 3)).permute(2, 0, 1)[None].float() / 255 for p in (ctx.named_picture(name), photo.get(0))
    )
    picture = framed(picture, 0)
    with torch.no_grad(), pooled("average", squeezenet.module):
        theirs, own = (squeezenet.activations(x, layers[2:]) for x in (style, picture))
    places = {name: o.feature_places([f]) for name, f in theirs.items()}
    sizes = {name: spread(own[name]) if fainter else p.spread for name, p in places.items()}
    assert all(bool(spread(own[name]) > p.spread) is fainter for name, p in places.items())
    error = o.match_error({name: o.nearest_places(f, places[name]) for name, f in own.items()}, sizes).score(own, picture)
    assert with_them - without == pytest.approx(3.0 * 0.5 * float(error), rel=1e-3)


def test_matches_are_those_of_what_has_been_made(squeezenet, photo):
    ctx = context(squeezenet, photo)
    layers = style_layers(ctx, ())
    settings = quick(match_weight=0.5, content_weight=0)
    transfer = Transfer(ctx, settings, layers, layers[0], [ctx.named_picture(IHC)], Plan("a", 2.0, 1.0), "a")
    places = transfer.style_places(128)
    target, image = (torch.rand((1, 3, 96, 128), generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    found = maps_of(squeezenet, image, list(places), "average")
    wanted = {n: o.nearest_places(f, places[n]) for n, f in found.items()}
    error = float(o.match_error(wanted, {n: p.spread for n, p in places.items()}).score(found, image))
    with pooled("average", squeezenet.module):
        score = float(o.evaluate(squeezenet, transfer._objective(target, image, None, places), image, image))
    assert score == pytest.approx(-2.0 * 0.5 * error, rel=1e-5)


def test_without_weights_covariances_have_matches_and_patches_and_gram_matrices_have_none(squeezenet, photo):
    def at_once(**more):
        return made(run_once(quick(steps=3, size=64, **more), squeezenet, photo))

    assert np.array_equal(at_once(), at_once(match_weight=MATCHES, strokes=1.0))
    assert np.array_equal(at_once(form="relative"), at_once(form="relative", match_weight=0.0, strokes=0.0))
    for more in ({"match_weight": 0.0}, {"strokes": 0.0}, {"strokes": 0.5}):
        assert not np.array_equal(at_once(), at_once(**more))
    for more in ({"match_weight": 1.0}, {"strokes": 1.0}):
        assert not np.array_equal(at_once(form="relative"), at_once(form="relative", **more))


@pytest.mark.parametrize("side", [128, 768])
def test_styles_count_by_their_shares(side, squeezenet, photo, monkeypatch):
    ctx = context(squeezenet, photo)
    layers = style_layers(ctx, ())
    pictures = [ctx.named_picture(n) for n in (IHC, BRICK)]

    def places(styles, blend=()):
        settings = quick(style=(IHC, BRICK)[: len(styles)], blend=blend)
        found = Transfer(ctx, settings, layers, layers[0], styles, Plan("a", 1.0, 1.0), "a").style_places(side)[layers[2]].features
        return [tuple(row) for row in found.tolist()]

    alone, mixed = places(pictures[:1]), places(pictures, (3.0, 1.0))
    assert places(pictures, (1.0, 0.0)) == alone
    monkeypatch.setattr("harness.optimise.matching.MOST", 10**6)
    own, theirs = set(places(pictures[:1])), set(places(pictures[1:]))
    assert len(mixed) == (4096 if side == 768 else pytest.approx(len(own) / 0.75, abs=1))
    count = round(0.75 * len(mixed))
    assert set(mixed[:count]) <= own
    assert set(mixed[count:]) <= theirs


def test_flat_styles_work_and_weights_below_zero_are_refused(squeezenet, photo, tmp_path):
    Image.new("RGB", (60, 60), (10, 200, 30)).save(tmp_path / "flat.png")
    assert np.isfinite(made(run_once(quick(style=(str(tmp_path / "flat.png"),), steps=3, match_weight=1.0), squeezenet, photo))).all()
    for wrong in ({"match_weight": -1}, {"strokes": -0.1}, {"strokes": 1.1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            StyleTransfer.build(wrong)


# -- patches of pixels -----------------------------------------------------------------------------------------------------


def picture(seed, height=20, width=26, c=3):
    return torch.rand((1, c, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def soft(image, sigma):
    return gaussian_filter(image.numpy(), (0, sigma, sigma), mode="nearest")


def fine(image):
    return image.numpy() - gaussian_filter(image.numpy(), (0, 0, 1.5, 1.5), mode="nearest")


def shapes(image):
    grey = image.numpy().mean(1)
    return gaussian_filter(grey, (0, 1.5, 1.5), mode="nearest") - gaussian_filter(grey, (0, 6, 6), mode="nearest")


def repainted_slowly(image, style, side, sigma):
    """Every third patch, its borders mirrored; compared in all dimensions, both made soft."""
    _, height, width = image.shape
    around = np.pad(soft(image, sigma), ((0, 0), (side, side), (side, side)), mode="reflect")
    window = np.outer(*[0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1, side + 1) / (side + 1))] * 2) ** 2

    def apart(picture):
        found = [picture[:, i : i + side, j : j + side] for i in range(style.shape[1] - side + 1) for j in range(style.shape[2] - side + 1)]
        return [f - f.mean((1, 2), keepdims=True) for f in found]

    theirs = list(zip(apart(style.numpy()), apart(soft(style, sigma)), strict=True))
    total, weight = np.zeros_like(around), np.zeros_like(around)
    for i in range(0, height + side + 1, 3):
        for j in range(0, width + side + 1, 3):
            own = around[:, i : i + side, j : j + side]
            mean = own.mean((1, 2), keepdims=True)
            best = min(theirs, key=lambda t: np.square(own - mean - t[1]).sum())[0]
            total[:, i : i + side, j : j + side] += (best + mean) * window
            weight[:, i : i + side, j : j + side] += window
    return (total / np.maximum(weight, 1e-300))[:, side:-side, side:-side]


@pytest.mark.parametrize(("c", "side", "softness"), [(1, 6, 0.0), (3, 6, 0.0), (3, 8, 1.2)])
def test_patches_become_the_nearest_of_the_style(c, side, softness, monkeypatch):
    monkeypatch.setattr("harness.optimise.matching.DIRECTIONS", side * side * c)  # none left out
    monkeypatch.setattr("harness.optimise.matching.AT_ONCE", 7)
    style, images = picture(0, 12, 13, c), torch.cat([picture(1, c=c), picture(2, c=c)])
    brush = o.pixel_patches([style], (), side, softness)
    found = o.repainted(images, brush)
    for image, to in zip(images, found, strict=True):
        assert np.allclose(to, repainted_slowly(image, style[0], side, softness), atol=1e-9)
    half = o.repainted(images, brush, 0.5)
    torch.testing.assert_close(half, (images + found) / 2)
    assert torch.equal(o.repainted(images, brush, 0.0), images)


def test_a_style_is_repainted_as_itself_and_noise_on_it_goes():
    smooth = torch.nn.functional.interpolate(picture(0, 9, 9), (48, 48), mode="bicubic").clamp(0, 1)
    style = o.pixel_patches([smooth])
    inside = (..., slice(6, -6), slice(6, -6))  # mirrored borders are in no patch of the style
    torch.testing.assert_close(o.repainted(smooth, style)[inside], smooth[inside], rtol=0, atol=1e-3)
    noisy = (smooth + 0.05 * (picture(1, 48, 48) - 0.5) * 2).clamp(0, 1)
    before, after = (float((x[inside] - smooth[inside]).square().mean()) for x in (noisy, o.repainted(noisy, style)))
    assert after < 0.3 * before


def test_what_soft_patches_are_depends_on_no_ripple_and_has_the_fine_detail_of_the_style():
    style, smooth = picture(0, 64, 64), o.gaussian_blur(picture(1, 64, 64), 3)
    weave = 0.1 * (-1.0) ** (torch.arange(64)[:, None] + torch.arange(64))
    hard, soft = ([o.repainted(x, o.pixel_patches([style], (), LARGE, by)) for x in (smooth, smooth + weave)] for by in (0.0, SOFT))
    moved = [float((a - b)[..., 8:-8, 8:-8].square().mean()) for a, b in (hard, soft)]
    assert moved[1] < 1e-3 * moved[0]
    assert np.square(fine(soft[1])).mean() > 10 * np.square(fine(smooth)).mean()


def test_a_ripple_that_no_patch_of_the_style_has_goes_and_brightness_stays():
    style = torch.full((1, 3, 30, 30), 0.2, dtype=torch.float64)
    style[..., 15:] = 0.8
    x = torch.linspace(0.2, 0.8, 40, dtype=torch.float64).expand(1, 3, 40, 40)
    ripple = x + 0.05 * (-1.0) ** torch.arange(40)[:, None]
    after = o.repainted(ripple, o.pixel_patches([style]))[..., 6:-6, 6:-6]
    assert float((after[..., 1:, :] - after[..., :-1, :]).abs().max()) < 1e-6
    assert float((after.mean((1, 2)) - x[..., 6:-6, 6:-6].mean((1, 2))).abs().max()) < 0.05


def test_of_several_styles_each_has_its_share_of_patches_and_small_ones_serve():
    found = o.pixel_patches([picture(0, 120, 120), picture(1, 120, 120)], [0.75, 0.25])
    assert len(found.values) == 8192
    assert found.codes.shape == (8192, 32)
    one, two = picture(0, 16, 17), picture(1, 16, 17)
    alone = [o.pixel_patches([x]).values for x in (one, two)]
    both = o.pixel_patches([one, two], [0.75, 0.25]).values
    assert len(alone[0]) == 11 * 12
    assert torch.equal(both[: 11 * 12], alone[0])
    assert len(both) == 11 * 12 * 4 // 3
    assert all((row == alone[1]).all(1).any() for row in both[11 * 12 :])
    assert len(o.pixel_patches([picture(0, 3, 4)]).values) == 1


@pytest.mark.parametrize("brush", [(6, 0.0), (LARGE, SOFT)])
@pytest.mark.parametrize("size", [(1, 1), (3, 4), (7, 20), (8, 8)])
def test_tiny_pictures_and_tiny_styles_have_patches(size, brush):
    tiny = o.repainted(picture(0, *size), o.pixel_patches([picture(1, 2, 9), picture(2, 7, 5)], (), *brush))
    assert tiny.shape == (1, 3, *size)
    assert torch.isfinite(tiny).all()


def test_soft_patches_are_compared_where_soft_ones_differ():
    """Of white noise most of what is left is in few directions."""
    style = picture(0, 128, 128)
    brush = o.pixel_patches([style], (), LARGE, SOFT)
    whole = o.pixel_patches([o.gaussian_blur(style, SOFT)], (), LARGE)
    assert float(brush.codes.square().sum() / whole.values.square().sum()) > 0.8


def test_in_lower_precision_it_is_the_same_but_for_rounding():
    half, other = picture(0).bfloat16(), picture(1).bfloat16()
    brush = o.pixel_patches([other])
    for found, wanted in (
        (o.repainted(half, brush), o.repainted(half.float(), brush)),
        (o.with_detail(half, half, [other]), o.with_detail(half.float(), half.float(), [other.float()])),
        (o.as_sharp_as(half, [other]), o.as_sharp_as(half.float(), [other.float()])),
    ):
        assert found.dtype == torch.bfloat16
        assert float((wanted - half.float()).abs().max()) > 0.1
        torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0.02)


def ripples(amplitude, frequency, size=128):
    """(1, 3, H, W) of grey columns."""
    wave = torch.sin(2 * np.pi * frequency * torch.arange(size, dtype=torch.float64))
    return (0.5 + amplitude * wave).expand(1, 3, size, size)


@pytest.mark.parametrize(("frequency", "theirs", "wanted"), [(0.25, 1.3, 1.3), (0.25, 5.0, MOST_GAIN), (0.25, 0.5, 1.0), (0.03, 1.3, 1.0)])
def test_fine_bands_rise_to_the_power_of_the_style_within_bounds(frequency, theirs, wanted):
    found = o.as_sharp_as(ripples(0.1, frequency), [ripples(0.1 * theirs, frequency)])
    inside = (..., slice(16, -16), slice(16, -16))
    torch.testing.assert_close(found[inside], ripples(0.1 * wanted, frequency)[inside], rtol=0, atol=2e-3)


def test_finer_bands_rise_no_less_than_coarser_ones_and_styles_count_by_their_shares():
    noise = torch.fft.rfft2(torch.randn((1, 3, 128, 128), generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 10)
    rate = (torch.fft.fftfreq(128)[:, None] ** 2 + torch.fft.rfftfreq(128) ** 2).sqrt()
    coarse, fine = (torch.fft.irfft2(noise * mask, s=(128, 128)) for mask in ((rate > 0.08) & (rate < 0.28), rate > 0.28))
    found = o.as_sharp_as(coarse + fine, [1.3 * coarse + 0.5 * fine])[..., 16:-16, 16:-16]
    torch.testing.assert_close(found, 1.3 * (coarse + fine)[..., 16:-16, 16:-16], rtol=0, atol=0.02)
    mixed = o.as_sharp_as(ripples(0.1, 0.25), [ripples(0.14, 0.25), ripples(0.1, 0.25)], [0.25, 0.75])[..., 16:-16, 16:-16]
    wanted = math.sqrt(0.25 * 1.4**2 + 0.75)
    torch.testing.assert_close(mixed, ripples(0.1 * wanted, 0.25)[..., 16:-16, 16:-16], rtol=0, atol=2e-3)


def test_the_size_of_the_style_does_not_matter():
    white = [
        scale * torch.randn((1, 1, *size), generator=torch.Generator().manual_seed(0))
        for scale, size in ((0.1, (128, 128)), (0.13, (300, 200)))
    ]
    found = o.as_sharp_as(white[0], white[1:])
    assert 1.25 < float(found.std() / white[0].std()) < 1.5  # no band less than a coarser one, of which some have more by chance


@pytest.mark.parametrize("size", [16, 20, 24, 25])
def test_bands_that_a_small_picture_lacks_raise_no_others(size):
    image = picture(0, size, size)
    torch.testing.assert_close(o.as_sharp_as(image, [0.2 * picture(1, 128, 128)]), image)


def test_nothing_comes_round_from_the_other_side():
    ramp = torch.linspace(0.2, 0.8, 128, dtype=torch.float64).expand(1, 3, 128, 128) + ripples(0.02, 0.25) - 0.5
    found = o.as_sharp_as(ramp, [ripples(0.04, 0.25)])
    assert float((found - ramp).abs().max()) < 0.06  # the ripples', which the jump from end to end is far above


@pytest.mark.parametrize("size", [(1, 1), (3, 4), (20, 7)])
def test_of_flat_styles_and_tiny_pictures_pictures_stay_as_they_are(size):
    image = picture(0, *size).float()
    torch.testing.assert_close(o.as_sharp_as(image, [torch.full((1, 3, 9, 9), 0.3)]), image)
    assert torch.isfinite(o.as_sharp_as(image, [picture(1, 30, 40).float()])).all()


def test_fine_detail_comes_as_strongly_as_styles_have_their_own_and_as_shapes_are_left():
    content, one, two, image = picture(0), 0.2 * picture(1, 40, 41), 0.4 * picture(2, 30, 31), picture(3)
    share = math.sqrt((0.25 * np.square(fine(one)).mean() + 0.75 * np.square(fine(two)).mean()) / np.square(fine(content)).mean())
    assert share < 0.5
    contents = torch.cat([content, content, content])
    left = [0.5 * content + 0.02 * image, 0.1 * content + 0.02 * image, 1 - content]
    found = o.with_detail(torch.cat(left), contents, [one, two], [0.25, 0.75], 0.8)
    for n, (to, before) in enumerate(zip(found, left, strict=True)):
        shown = float((shapes(before) * shapes(content)).sum() / np.square(shapes(content)).sum())
        assert (shown > share, 0 < shown < share, shown < 0)[n]
        assert np.allclose(to, before[0].numpy() + 0.8 * min(share, max(0.0, shown)) * fine(content)[0], atol=1e-9)
    strong = o.with_detail(2 * content, content, [10 * one])
    assert np.allclose(strong, 2 * content.numpy() + fine(content), atol=1e-9)  # no more than the content's
    flat = torch.full((1, 3, 9, 9), 0.3, dtype=torch.float64)
    assert np.allclose(o.with_detail(image, content, [flat]), image)
    assert np.allclose(o.with_detail(flat, flat, [one]), flat)


def test_patches_lie_over_fine_detail_of_the_content_where_there_is_one(squeezenet, photo):
    def at(**more):
        return made(run_once(quick(**{"steps": 20, "size": 256, "coarse": 1, **more}), squeezenet, photo))

    content = at(steps=0, palette=0.0, style_weight=(0.0,))
    detail = [
        float(np.corrcoef(fine(torch.as_tensor(x)[None]).ravel(), fine(torch.as_tensor(content)[None]).ravel())[0, 1])
        for x in (at(), at(detail=0.0))
    ]
    assert detail[0] > detail[1] + 0.05
    for without in ({"content_weight": 0.0}, {"strokes": 0.0}):
        assert np.array_equal(at(**without), at(detail=0.0, **without))
    for wrong in (-0.1, 1.1):
        with pytest.raises(ConfigError, match="detail"):
            StyleTransfer.build({"detail": wrong})


def test_the_end_is_two_layers_of_patches_with_detail_between_and_sharpness(squeezenet, photo, monkeypatch):
    ctx = context(squeezenet, photo)
    layers = style_layers(ctx, ())
    pictures = [ctx.named_picture(n) for n in (IHC, BRICK)]
    settings = quick(style=(IHC, BRICK), blend=(3.0, 1.0), strokes=0.5, detail=0.6)
    transfer = Transfer(ctx, settings, layers, layers[0], pictures, Plan("a", 1.0, 1.0), "a")
    styles = [torch.from_numpy(at_size(p, 128, 3)).permute(2, 0, 1)[None].float() / 255 for p in pictures]
    shares, content, image = [0.75, 0.25], picture(0, 96, 128).float(), (0.7 * picture(0, 96, 128) + 0.3 * picture(1, 96, 128)).float()
    wanted = o.repainted(image, o.pixel_patches(styles, shares, LARGE, SOFT), 0.5).clamp(0, 1)
    wanted = o.with_detail(wanted, content, styles, shares, 0.3).clamp(0, 1)
    wanted = o.repainted(wanted, o.pixel_patches(styles, shares), 0.5).clamp(0, 1)
    wanted = (wanted + 0.5 * (o.as_sharp_as(wanted, styles, shares) - wanted)).clamp(0, 1)
    torch.testing.assert_close(transfer._finished(image, content, transfer._brush(128)), wanted)
    given = []
    monkeypatch.setattr(o, "with_detail", lambda images, contents, *_: given.append(contents) or images)
    run_once(quick(steps=1), squeezenet, photo)
    own = torch.from_numpy(at_size(photo.get(0), 128, 3)).permute(2, 0, 1)[None].float() / 255
    coloured = Transfer(ctx, quick(), layers, layers[0], pictures[:1], Plan("a", 1.0, 1.0), "a")._in_the_styles_colours(own)
    torch.testing.assert_close(given[0], coloured)
    assert float((coloured - own).abs().max()) > 0.1


def test_the_picture_is_repainted_at_the_end_and_at_every_part_of_smaller_sizes(squeezenet, photo, monkeypatch):
    seen, brushes, amounts = [], [], []
    real = o.repainted

    def watched(x, brush, amount):
        seen.append(real(x, brush, amount))
        brushes.append(brush)
        amounts.append(amount)
        return seen[-1]

    monkeypatch.setattr(o, "repainted", watched)
    result = run_once(quick(steps=20, shifts=2, coarse=1, strokes=0.5, detail=0.0), squeezenet, photo)
    assert [tuple(x.shape[2:]) for x in seen] == [(42, 64), (42, 64), (85, 128), (85, 128)]
    assert amounts == [0.5] * 4
    assert [(b.side, b.softness) for b in brushes] == [(6, 0.0), (6, 0.0), (LARGE, SOFT), (6, 0.0)]
    named = context(squeezenet, photo).named_picture(IHC)
    small, style = (torch.from_numpy(at_size(named, side, 3)).permute(2, 0, 1)[None].float() / 255 for side in (64, 128))
    for brush, own in zip(brushes, (small, small, style, style), strict=True):
        assert torch.equal(brush.values, o.pixel_patches([own], (), brush.side, brush.softness).values)
    torch.testing.assert_close(seen[3], real(seen[2].clamp(0, 1), brushes[3], 0.5))
    painted = seen[-1].clamp(0, 1)
    sharp = (painted + 0.5 * (o.as_sharp_as(painted, [style]) - painted)).clamp(0, 1)
    assert np.abs(made(result) - sharp[0].numpy()).max() < 0.6 / 255
    assert float((sharp - painted).abs().max()) > 0.02
    steps = next(a for a in result.artifacts if a.name == "progress-1").data
    assert np.array_equal(steps[-1], made(result))


def test_a_descent_that_stops_is_painted_all_the_same(squeezenet, photo):
    """At a weight beyond numbers the picture stays, and then takes the style's patches."""
    beyond = {"style_weight": (1e39,), "steps": 40, "shifts": 4}
    results = [run_once(quick(strokes=s, **beyond), squeezenet, photo) for s in (1.0, 0.0)]
    assert np.abs(made(results[0]) - made(results[1])).mean() > 0.01
    for result in results:
        stages = [a.data[-1] for a in result.artifacts if a.name == "progress-1"]
        assert all(np.array_equal(stage, made(result)) for stage in stages)
