"""The loop's parts against closed forms, torch's optimisers, scipy and scikit-image; going on, converging, batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from harness import optimise as o
from harness.context import Draws
from harness.models import LoadedModel
from harness.optimise.operators import total_variation_denoised
from harness.optimise.transforms import warp
from harness.registry import InputSpec

RULES = ("normalised", "mean_abs", "constant", "scaled", "progress", "momentum", "adam", "lbfgs", "line_search")


class Quadratic(nn.Module):
    """-sum_i c_i (x_i - t_i)^2 / 2, c from 1 to `condition`: how steep each pixel's own parabola is."""

    def __init__(self, numbers=16, condition=100.0):
        super().__init__()
        self.curvature = torch.logspace(0, np.log10(condition), numbers, dtype=torch.float64)
        self.top = torch.linspace(0.1, 0.9, numbers, dtype=torch.float64)

    def forward(self, x):
        return -(self.curvature * (x.flatten(1) - self.top).square()).sum(1, keepdim=True) / 2


def quadratic(condition=100.0, channels=1):
    module = Quadratic(16 * channels, condition)
    module.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    return LoadedModel(module, InputSpec(channels=channels, size=4, mean=(0.0,) * channels, std=(1.0,) * channels), "quadratic")


def draws(count=1, seed=0, dtype=torch.float64):
    return Draws([str(i) for i in range(count)], torch.device("cpu"), dtype, seed)


def score(count=1):
    return o.class_score(torch.zeros(count, dtype=torch.int64))


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- rules -------------------------------------------------------------------------------------------------------------


def test_adam_and_momentum_are_torchs():
    model, start = quadratic(), noise(2, 1, 4, 4)
    for rule, peer in (
        ("adam", lambda p: torch.optim.Adam([p], lr=0.02)),
        ("momentum", lambda p: torch.optim.SGD([p], lr=0.002, momentum=0.9)),
    ):
        leaf = start.clone().requires_grad_()
        optimiser = peer(leaf)
        for _ in range(30):
            optimiser.zero_grad()
            (-model(leaf).sum()).backward()
            optimiser.step()
        size = 0.02 if rule == "adam" else 0.002
        made = o.ascend(model, score(2), start, steps=30, step_size=size, draws=draws(2), rule=rule)
        torch.testing.assert_close(made.images, leaf.detach(), rtol=0, atol=1e-12)


def test_momentum_is_forgotten_when_the_step_size_changes():
    model, start = quadratic(), noise(1, 1, 4, 4)
    schedule = o.stepped([(5, 0.002), (5, 0.001)])
    whole = o.ascend(model, score(), start, steps=10, step_size=schedule, draws=draws(), rule="momentum")
    half = o.ascend(model, score(), start, steps=5, step_size=0.002, draws=draws(), rule="momentum")
    rest = o.ascend(model, score(), half.images, steps=5, step_size=0.001, draws=draws(), rule="momentum")
    assert torch.equal(whole.images, rest.images)


def test_lbfgs_solves_a_badly_scaled_quadratic_as_fast_as_scipy():
    from scipy.optimize import minimize

    model, start = quadratic(1e4), noise(1, 1, 4, 4)
    top = model.module.top.view(1, 1, 4, 4)
    curvature = model.module.curvature.numpy()
    peer = minimize(
        lambda x: ((curvature * (x - top.numpy().ravel()) ** 2).sum() / 2, curvature * (x - top.numpy().ravel())),
        start.numpy().ravel(),
        jac=True,
        method="L-BFGS-B",
        options={"ftol": 1e-16, "gtol": 1e-9},
    )
    made = o.ascend(model, score(), start, steps=2 * peer.nfev, step_size=0.05, draws=draws(), rule="lbfgs")
    assert float((made.images - top).abs().max()) < 1e-5
    assert (made.scores.diff(dim=0) >= 0).all()
    plain = o.ascend(model, score(), start, steps=2 * peer.nfev, step_size=1e-5, draws=draws(), rule="line_search")
    assert float((plain.images - top).abs().max()) > 1e-2  # what a gradient alone gets


def two_loops(gradient, pairs, condition):
    """Nocedal & Wright 2006, algorithm 7.4, for a score that is to rise; pairs from the oldest to the newest."""
    q, weights = gradient.clone(), []
    for s, y in reversed(pairs):
        weights.append((s @ q) / (s @ y))
        q = q - weights[-1] * y
    first = condition(q)
    s, y = pairs[-1]
    r = first * (s @ y) / (y @ y) * (q @ q) / (q @ first)
    for (s, y), weight in zip(pairs, reversed(weights), strict=True):
        r = r + s * (weight - (y @ r) / (s @ y))
    return r


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_lbfgs_is_the_two_loop_recursion_over_the_steps_that_rose(power):
    """Two pictures whose steps are kept and taken back at different times; more steps than are remembered."""
    rule, memory, random = o.LBFGS(history=4), {}, torch.Generator().manual_seed(0)
    scale = torch.logspace(0, power, 16, dtype=torch.float64)
    stretch = torch.logspace(0, 2, 16, dtype=torch.float64)

    def condition(gradient):
        return gradient * scale.view(1, 1, 4, 4)

    known = [[], []]
    gradient = torch.randn((2, 1, 4, 4), generator=random, dtype=torch.float64)
    for step in range(14):
        found = rule(memory, gradient, condition, 0.1, step, False)
        for i, pairs in enumerate(known):
            if pairs:
                wanted = two_loops(gradient[i].flatten(), pairs[-memory_left(pairs, i, step) :], lambda q: q * scale)
                torch.testing.assert_close(found[i].flatten() / memory["size"][i], wanted, rtol=1e-9, atol=1e-12)
        moved = torch.randn((2, 1, 4, 4), generator=random, dtype=torch.float64)
        rose = torch.tensor([step % 5 != 3, step % 4 != 2])
        mine = torch.where(rose.view(-1, 1, 1, 1), moved, torch.zeros_like(moved))
        here = torch.randn((2, 1, 4, 4), generator=random, dtype=torch.float64)
        slope = gradient - moved * stretch.view(1, 1, 4, 4)
        slope[~rose] *= np.nan  # what lies behind a step that is taken back does not matter
        rule.judged(memory, rose, (here + moved, here), (slope, gradient), step + 1)
        gradient = torch.where(rose.view(-1, 1, 1, 1), slope, gradient)
        for i, pairs in enumerate(known):
            if rose[i]:
                pairs.append((mine[i].flatten(), (mine[i].flatten() * stretch)))


def memory_left(pairs, picture, step):
    """A step that was taken back lies where the oldest pair lay, if there were as many as are remembered."""
    lost = (step - 1) % 5 == 3 if picture == 0 else (step - 1) % 4 == 2
    return 3 if lost and len(pairs) >= 4 else 4


def test_lbfgs_climbs_in_conditioned_coordinates():
    model, start = quadratic(1e3), noise(1, 1, 4, 4)
    top = model.module.top.view(1, 1, 4, 4)
    kept = {"steps": 120, "step_size": 0.05, "draws": draws(), "rule": "lbfgs"}
    for conditioners in ([], [o.LowFrequencies(1.0)], [o.LowFrequencies(2.0)]):
        made = o.ascend(model, score(), start, conditioners=conditioners, **kept)
        assert float((made.images - top).abs().max()) < 5e-4, conditioners


def test_the_last_step_is_judged_by_the_network_of_the_others():
    """Scores are far lower outside of `during`: judged there the last step would seem to fall."""
    from contextlib import contextmanager

    model, start = quadratic(10), noise(1, 1, 4, 4)
    less = [1000.0]
    objective = o.Objective(score().layers, lambda outputs, x: score().score(outputs, x) - less[0])

    @contextmanager
    def within(step):
        less[0] = 0.0
        yield
        less[0] = 1000.0

    made = o.ascend(model, objective, start, steps=3, step_size=0.05, draws=draws(), rule="line_search", during=within)
    assert float(model(made.images)[0, 0]) > float(made.scores[-1, 0])


def test_sums_and_spectra_are_precise_in_runs_of_lower_precision(squeezenet):
    from harness.device import device_settings

    bright = torch.full((1, 4, 64, 64), 100.0)
    for kind in (torch.float16, torch.bfloat16):
        torch.testing.assert_close(o.gram(bright.to(kind)), torch.full((1, 4, 4), 1e4))
        error = o.feature_error("a", bright.to(kind)).score({"a": 1.5 * bright}, bright)
        torch.testing.assert_close(error, torch.tensor([0.25]))
    spectrum = o.Fourier(64, 64)
    kept = {"steps": 3, "step_size": 0.05, "transforms": [o.Rotate(5)], "parametrisation": spectrum}
    objective = o.layer_norm("features.6")
    pictures, sums = {}, {}
    for precision in ("float32", "bfloat16"):
        with device_settings("cpu", precision):
            start = spectrum.start(draws(dtype=torch.float32))
            made = o.ascend(squeezenet, objective, start, draws=draws(dtype=torch.float32), **kept)
        assert made.images.dtype == torch.float32
        pictures[precision], sums[precision] = made.images, made.scores
    assert (pictures["float32"] - spectrum.images(start)).abs().max() > 0.02
    assert not torch.equal(sums["float32"], sums["bfloat16"])  # the layers' own work is less precise
    torch.testing.assert_close(sums["bfloat16"], sums["float32"], rtol=0.05, atol=0)
    assert len(torch.unique(pictures["bfloat16"])) > 5000  # of 12,288 values; bfloat16 has 128 from a half to one


@pytest.mark.parametrize("rule", RULES)
def test_pictures_do_not_influence_one_another(rule):
    model, start = quadratic(), noise(3, 1, 4, 4)
    size = 0.002 if rule in ("constant", "momentum", "line_search") else 0.02

    def made(which):
        return o.ascend(model, score(len(which)), start[which], steps=25, step_size=size, draws=draws(len(which)), rule=rule)

    together = made([0, 1, 2])
    for i in range(3):
        alone = made([i])
        torch.testing.assert_close(alone.images[0], together.images[i], rtol=0, atol=1e-12)
        torch.testing.assert_close(alone.scores[:, 0], together.scores[:, i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_going_on_from_a_snapshot_is_as_if_it_had_not_stopped(rule):
    """In colour, as what is read from a file lies colour by colour, and what the loop works on pixel by pixel."""
    model, start = quadratic(channels=3), noise(2, 3, 4, 4)
    careful = rule in ("lbfgs", "line_search")
    size = 0.002 if rule in ("constant", "momentum", "line_search") else 0.02
    settings = {"step_size": size, "rule": rule, "transforms": [] if careful else [o.Jitter(1)], "operators": [o.Clamp()]}
    whole = o.ascend(model, score(2), start, steps=31, draws=draws(2), **settings)
    first = o.ascend(model, score(2), start, steps=13, draws=draws(2), **settings)
    stored = {k: np.asarray(v).copy("C") for k, v in first.state.arrays().items()}
    begin = o.State.of(stored, torch.device("cpu"))
    rest = o.ascend(model, score(2), start, steps=31, draws=draws(2), begin=begin, **settings)
    assert torch.equal(rest.images, whole.images)
    assert len(rest.scores) == 18
    torch.testing.assert_close(rest.scores, whole.scores[13:], rtol=0, atol=0)


# -- the end -----------------------------------------------------------------------------------------------------------


def test_what_has_converged_rests_and_the_rest_goes_on():
    model = quadratic(1.0)
    top = model.module.top.view(1, 1, 4, 4)
    start = torch.cat([top + 1e-3, top + 5.0])  # -score starts at 8e-6 and 200
    one = o.Objective(frozenset(), lambda _, x: x.new_ones(len(x)))  # so that scores do not tend to 0

    def made(which, **more):
        more = {"steps": 1000, "step_size": 0.01, "rule": "constant", **more}
        return o.ascend(model, score(len(which)) + one, start[which], draws=draws(len(which)), snapshots=4, **more)

    both, alone = made([0, 1], converged=1e-4), made([0], converged=1e-4)
    assert len(alone.scores) == 40  # judged after the second window of 20
    assert 40 < len(both.scores) < 1000
    torch.testing.assert_close(both.images[0], alone.images[0])
    assert both.snapshots[-1][0] == both.state.step == len(both.scores) - 1  # the last score found it at rest
    assert torch.equal(both.snapshots[-1][1], both.images)
    assert len(made([0, 1]).scores) == 1000
    joined = o.join([alone, made([1], converged=1e-4)])
    assert torch.equal(joined.images, both.images) and joined.scores.shape == both.scores.shape


@pytest.mark.parametrize("done", [7, 20, 53])
def test_what_rests_does_so_whatever_its_company_and_however_often_it_is_interrupted(done, digits_cnn):
    """Batches, and going on: random transforms, early ends, a memory."""
    start = torch.rand((4, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 3, 5, 8])

    def made(which, steps=200, begin=None):
        random = Draws([str(i) for i in which], torch.device("cpu"), torch.float32, 0)
        return o.ascend(
            digits_cnn,
            o.class_score(classes[which]),
            start[which],
            steps=steps,
            step_size=0.02,
            draws=random,
            rule="adam",
            transforms=[o.Jitter(1)],
            operators=[o.Clamp()],
            converged=0.02,
            begin=begin,
        )

    together = made([0, 1, 2, 3])
    ends = [int((together.scores[:, i].diff() != 0).sum()) for i in range(4)]
    assert len(set(ends)) > 1 and max(ends) < 199  # each at its own time
    for i in range(4):
        alone = made([i])
        torch.testing.assert_close(alone.images[0], together.images[i], rtol=0, atol=1e-5)
        assert torch.equal(alone.state.draws[0], together.state.draws[i])
    joined = o.join([made([0, 1]), made([2]), made([3])])
    torch.testing.assert_close(joined.images, together.images, rtol=0, atol=1e-5)
    rest = made([0, 1, 2, 3], begin=made([0, 1, 2, 3], steps=done).state)
    torch.testing.assert_close(rest.images, together.images, rtol=0, atol=1e-6)
    after = made([0, 1, 2, 3], begin=joined.state)
    torch.testing.assert_close(after.images, together.images, rtol=0, atol=1e-5)


def test_no_gradient_no_step():
    model = quadratic()
    flat = o.Objective(frozenset(), lambda _, x: 0 * x.flatten(1).sum(1))
    for rule in RULES:
        found = o.ascend(model, flat, noise(1, 1, 4, 4), steps=25, step_size=9.0, draws=draws(), rule=rule)
        assert torch.equal(found.images, noise(1, 1, 4, 4)) and not found.stopped


def test_thin_pictures_have_a_variation():
    x = noise(1, 1, 5, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: o.total_variation().score({}, v), x)


def test_a_loop_with_nothing_left_to_do_ends():
    model = quadratic()
    lost = o.Objective(frozenset(), lambda _, x: x.flatten(1).sum(1) * float("nan"))
    made = o.ascend(model, lost, noise(2, 1, 4, 4), steps=1000, step_size=0.1, draws=draws(2), snapshots=2)
    assert made.stopped == [0, 1] and len(made.scores) == 20
    assert torch.equal(made.images, noise(2, 1, 4, 4))


def test_no_random_transforms_where_scores_are_compared():
    with pytest.raises(ValueError, match="random transforms"):
        o.ascend(quadratic(), score(), noise(1, 1, 4, 4), steps=1, step_size=1.0, draws=draws(), rule="lbfgs", transforms=[o.Jitter(1)])


# -- objectives --------------------------------------------------------------------------------------------------------


def test_total_variation_and_alpha_norm_written_out():
    x = noise(2, 3, 5, 4)
    a = x.numpy()
    dx, dy = np.zeros_like(a), np.zeros_like(a)
    dx[..., :-1], dy[..., :-1, :] = np.diff(a, axis=3), np.diff(a, axis=2)
    for beta in (2.0, 1.5, 1.0):
        expected = ((dx**2 + dy**2) ** (beta / 2)).sum((1, 2, 3))
        np.testing.assert_allclose(o.total_variation(beta).score({}, x), expected, rtol=1e-4 if beta < 2 else 1e-12)
    np.testing.assert_allclose(o.alpha_norm(6, 0.5).score({}, x), (np.abs(a - 0.5) ** 6).sum((1, 2, 3)))


@pytest.mark.parametrize("beta", [1.0, 1.5, 2.0])
def test_slopes_of_the_regularisers(beta):
    x = noise(1, 2, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: o.total_variation(beta).score({}, v), x)
    assert torch.autograd.gradcheck(lambda v: o.alpha_norm(6.0, 0.5).score({}, v), x)


def test_total_variation_of_a_flat_picture_is_nothing_and_has_no_slope():
    x = torch.full((1, 3, 4, 4), 0.3, dtype=torch.float64, requires_grad=True)
    for beta in (1.0, 2.0):
        value = o.total_variation(beta).score({}, x)
        assert float(value.detach()) <= 48 * 1e-5
        assert float(torch.autograd.grad(value, x)[0].abs().max()) < 1e-12


def test_feature_error_is_relative(digits_cnn):
    x = torch.rand((2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    layer = "features.0"
    own = digits_cnn.activations(x, [layer])[layer]
    objective = o.feature_error(layer, own)
    assert torch.equal(o.evaluate(digits_cnn, objective, x, x), torch.zeros(2))
    other = o.feature_error(layer, 2 * own)
    torch.testing.assert_close(o.evaluate(digits_cnn, other, x, x), torch.full((2,), 0.25))


def test_a_channel_rises(digits_cnn):
    x = torch.full((1, 1, 8, 8), 0.5)
    objective = o.channel("features.0", 3)
    made = o.ascend(digits_cnn, objective, x, steps=10, step_size=0.05, draws=draws(dtype=torch.float32), operators=[o.Clamp()])
    expected = digits_cnn.activations(made.images, ["features.0"])["features.0"][:, 3].mean((1, 2))
    torch.testing.assert_close(o.evaluate(digits_cnn, objective, made.images, made.images), expected)
    assert float(expected) > float(made.scores[0])


# -- transforms, conditioners, operators ----------------------------------------------------------------------------------


def test_a_quarter_turn_is_rot90_and_no_turn_changes_nothing():
    x = noise(2, 3, 8, 8)
    quarter, one = torch.full((2,), torch.pi / 2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    turned = warp(x, quarter, one)
    assert any(torch.allclose(turned, torch.rot90(x, k, (2, 3)), atol=1e-9) for k in (1, 3))
    torch.testing.assert_close(warp(x, 0 * one, one), x)
    halfway = noise(1, 1, 6, 10)
    torch.testing.assert_close(warp(halfway, quarter[:1] * 2, one[:1]), torch.rot90(halfway, 2, (2, 3)))


def test_enlarging_takes_the_middle():
    ramp = torch.linspace(0, 1, 64, dtype=torch.float64).expand(1, 1, 64, 64)
    found = o.Scale(2.0, 2.0)(ramp, draws())
    middle = torch.nn.functional.interpolate(ramp[..., 16:48, 16:48], size=(64, 64), mode="bilinear")
    torch.testing.assert_close(found[..., 2:-2, 2:-2], middle[..., 2:-2, 2:-2])


@pytest.mark.parametrize("transform", [o.Jitter(share=0.1), o.Scale(0.9, 1.1), o.Rotate(10), o.Pad(0.1)])
@pytest.mark.parametrize("size", [8, 32])
def test_transforms_are_differentiable_and_repeatable(transform, size):
    x = noise(2, 3, size, size).requires_grad_()
    first, second = transform(x, draws(2)), transform(x, draws(2))
    assert torch.equal(first, second)
    gradient = torch.autograd.grad(first.square().sum(), x)[0]
    assert torch.isfinite(gradient).all() and float(gradient.abs().sum()) > 0
    if not isinstance(transform, o.Pad):  # which draws nothing
        alike = transform(x.detach()[:1].expand(4, -1, -1, -1), draws(4))
        assert any(not torch.equal(alike[0], other) for other in alike[1:])  # each picture has draws of its own


def test_padding_is_a_share():
    x = noise(1, 1, 10, 20)
    assert o.Pad(0.1)(x, draws()).shape == (1, 1, 12, 22)
    assert float(o.Pad(0.1, value=0.25)(x, draws())[0, 0, 0, 0]) == 0.25
    assert torch.equal(o.Pad(0.1)(x, draws())[..., 1:-1, 1:-1], x)


@pytest.mark.parametrize("percentile", [0, 30, 95])
def test_small_gradients_become_zero_as_numpy_says(percentile):
    g = noise(2, 3, 4, 5) - 0.5
    found = o.ClipSmallGradients(percentile)(g).numpy()
    for row, own in zip(found, g.numpy(), strict=True):
        limit = np.percentile(np.abs(own), percentile)
        np.testing.assert_array_equal(row, np.where(np.abs(own) >= limit, own, 0))


def cost(u, x, weight):
    dx, dy = np.zeros_like(u), np.zeros_like(u)
    dx[:, :-1], dy[:-1] = np.diff(u, axis=1), np.diff(u, axis=0)
    return np.sqrt(dx**2 + dy**2).sum() + ((u - x) ** 2).sum() / (2 * weight)


@pytest.mark.parametrize("weight", [0.02, 0.1, 0.5])
def test_denoising_is_scikit_images(weight):
    from skimage.restoration import denoise_tv_chambolle

    x = noise(2, 3, 16, 12)
    found = total_variation_denoised(x, weight, 4000)
    for picture, own in zip(found, x, strict=True):
        for colour, plane in zip(picture, own, strict=True):
            peer = denoise_tv_chambolle(plane.numpy(), weight=weight, eps=1e-12, max_num_iter=4000)
            np.testing.assert_allclose(colour, peer, atol=2e-3)
            assert cost(colour.numpy(), plane.numpy(), weight) <= cost(peer, plane.numpy(), weight) * (1 + 1e-5)
    assert torch.equal(o.Denoise(lambda _: 0.0)(x, x, 0), x)
    steps = [float((o.Denoise(lambda t: [0.05, 0.5][t])(x, x, t) - x).abs().mean()) for t in (0, 1)]
    assert steps[0] < steps[1]


# -- parametrisations --------------------------------------------------------------------------------------------------


def test_denoising_that_goes_on_is_nearer_to_its_minimum_than_one_begun_anew():
    """A picture that moves by a 255th a step, as in ascent: two iterations from where the last step stood against twenty."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((2, 3, 24, 20), generator=generator, dtype=torch.float64)
    memory = {}
    warm, cold = o.Denoise(lambda _: 0.3).remembering(memory, "d"), o.Denoise(lambda _: 0.3)
    assert torch.equal(warm(x, x, 0), cold(x, x, 0))
    for step in range(1, 40):
        x = x + torch.randn(x.shape, generator=generator, dtype=x.dtype) / 255
        found = warm(x, x, step)
    best = total_variation_denoised(x, 0.3, 4000)
    assert float((found - best).abs().mean()) < 0.5 * float((cold(x, x, 40) - best).abs().mean())
    assert set(memory) == {"d.dual_x", "d.dual_y"} and all(v.shape == x.shape for v in memory.values())


def test_two_denoisers_in_one_loop_remember_apart_and_go_on(digits_cnn):
    start = torch.rand((2, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=digits_cnn.dtype)

    def made(steps, rows=slice(None), **more):
        return o.ascend(
            digits_cnn,
            o.class_score(torch.tensor([3, 5])[rows]),
            start[rows],
            steps=steps,
            step_size=0.05,
            draws=draws(len(start[rows]), dtype=digits_cnn.dtype),
            operators=[o.Denoise(lambda _: 0.02), o.Clamp(), o.Denoise(lambda t: 0.01 * (t % 2))],
            **more,
        )

    whole, begun = made(9), made(4)
    handed = {name: value.clone() for name, value in begun.state.memory.items()}
    assert torch.equal(made(9, begin=begun.state).images, whole.images)
    assert all(torch.equal(handed[name], value) for name, value in begun.state.memory.items()), "a state is not written to"
    torch.testing.assert_close(made(9, slice(1, 2), begin=begun.state.rows(slice(1, 2))).images, whole.images[1:], rtol=0, atol=1e-6)


def test_a_strip_of_several_batches_says_the_step_it_shows():
    def part(steps, mark):
        shots = [(n, torch.full((1, 1, 1, 1), mark + n / 100)) for n in steps]
        return o.Ascent(shots[-1][1], torch.zeros(steps[-1], 1), snapshots=shots)

    early, full = part([2, 4, 5], 1.0), part([2, 4, 8], 2.0)
    shots = o.join([early, full]).snapshots
    assert [n for n, _ in shots] == [2, 4, 8]
    assert [x.flatten().tolist() for _, x in shots] == [pytest.approx(v) for v in ([1.02, 2.02], [1.04, 2.04], [1.05, 2.08])]


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 7, 10), (1, 8, 8)])
def test_fourier_variables_give_their_picture_back(shape):
    fourier = o.Fourier(shape[1], shape[2], shape[0])
    x = 0.05 + 0.9 * noise(2, *shape)
    torch.testing.assert_close(fourier.images(fourier.variables(x)), x, rtol=0, atol=1e-9)
    start = fourier.images(fourier.start(draws(2)))
    assert start.shape == x.shape and float((start - 0.5).abs().max()) < 0.3 and not torch.equal(start[0], start[1])
    assert torch.autograd.gradcheck(fourier.images, fourier.start(draws(1)).requires_grad_())


def test_equal_fourier_variables_make_low_frequencies_strong():
    """A coefficient's amplitude in the logits falls like 1 / f."""
    fourier = o.Fourier(32, 32, 1)
    z = torch.zeros((2, 1, 32, 17, 2), dtype=torch.float64)
    z[0, 0, 0, 2, 0], z[1, 0, 0, 8, 0] = 1e-3, 1e-3
    slow, fast = (torch.logit(x).abs().max() for x in fourier.images(z))
    assert float(slow / fast) == pytest.approx(4, rel=1e-6)


def test_deep_priors_side_by_side_are_networks_of_their_own():
    prior = o.DeepPrior(18, 22, 3, (8, 8, 4))
    z = prior.start(draws(3))
    together = prior.images(z)
    assert together.shape == (3, 3, 18, 22) and float(together.min()) > 0 and float(together.max()) < 1
    for i in range(3):
        torch.testing.assert_close(prior.images(z[i : i + 1])[0], together[i])
    gradient = torch.autograd.grad(prior.images(z.requires_grad_())[0].sum(), z)[0]
    assert float(gradient[0].abs().sum()) > 0 and float(gradient[1:].abs().sum()) == 0


@pytest.mark.parametrize("made", [o.Fourier(8, 8, 1), o.DeepPrior(8, 8, 1, (8, 8))])
@pytest.mark.parametrize("rule", ["adam", "lbfgs"])
def test_any_parametrisation_climbs(made, rule, digits_cnn):
    random = draws(2, dtype=torch.float32)
    classes = torch.tensor([3, 8])
    found = o.ascend(
        digits_cnn,
        o.class_score(classes),
        made.start(random),
        steps=60,
        step_size=0.05,
        draws=random,
        rule=rule,
        parametrisation=made,
        snapshots=2,
    )
    assert found.images.shape == (2, 1, 8, 8)
    assert torch.equal(digits_cnn(found.images).argmax(1), classes)
    assert [step for step, _ in found.snapshots] == [30, 60]
    assert torch.equal(made.images(found.variables), found.images)


def test_the_guides_own_technique_works(digits_cnn):
    """The code that docs/synthesis.md shows, as it stands there."""
    import textwrap
    from pathlib import Path

    from harness.testing import check_technique

    guide = (Path(__file__).parents[2] / "docs" / "synthesis.md").read_text()
    names: dict[str, object] = {}
    exec(compile(textwrap.dedent(guide[guide.index("    from harness import Images") :]), "guide", "exec"), names)
    assert check_technique(names["Calm"]) == []
