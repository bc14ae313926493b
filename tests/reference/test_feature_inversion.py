"""Feature inversion against the closed form of a linear layer, its release's objective written out, and a real network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from harness import ConfigError
from harness import optimise as o
from harness.context import Context, Draws
from harness.models import LoadedModel
from harness.registry import InputSpec
from harness.testing import load_dataset, run_once
from harness_synthesis import FeatureInversion, InversionByDepth
from harness_synthesis.feature_inversion import NATURAL_RMS, inversion_objective, released_tv, signal_to_noise, similarity


def linear(size=6, features=20):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(size * size, features, bias=False), nn.Linear(features, 2)).double()
    return LoadedModel(module, InputSpec(channels=1, size=size, mean=(0.0,), std=(1.0,)), "linear")


def differences(size):
    """D with ||D x||^2 = sum dx^2 + dy^2."""
    rows = []
    for y in range(size):
        for x in range(size):
            for ny, nx in ((y, x + 1), (y + 1, x)):
                if ny < size and nx < size:
                    row = np.zeros((size, size))
                    row[ny, nx], row[y, x] = 1, -1
                    rows.append(row.ravel())
    return torch.tensor(np.array(rows))


@pytest.mark.parametrize("tv", [0.01, 1.0])
def test_a_linear_layer_is_inverted_by_its_normal_equations(tv):
    """(A^T A / ||phi0||^2 + lambda D^T D) x = A^T phi0 / ||phi0||^2 with beta 2 and no norm penalty."""
    model = linear()
    a, d = model.module[1].weight.data, differences(6)
    truth = torch.rand((1, 1, 6, 6), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    phi = model.activations(truth, ["1"])["1"]
    norm = 3.0
    weight, size = tv / 2 / norm, float(phi.square().sum())
    expected = torch.linalg.solve(a.T @ a / size + weight * d.T @ d, a.T @ phi[0] / size)
    objective = inversion_objective("1", phi, 0.0, norm, tv, 2.0, 0.0, 6.0)
    leaf = expected.view(1, 1, 6, 6).requires_grad_()
    slope = torch.autograd.grad(o.evaluate(model, objective, leaf, leaf).sum(), leaf)[0]
    assert float(slope.abs().max()) < 1e-12
    draws = Draws(["a"], torch.device("cpu"), torch.float64, 0)
    made = o.ascend(model, objective, torch.zeros_like(truth), steps=300, step_size=0.1, draws=draws, rule="lbfgs")
    torch.testing.assert_close(made.images.flatten(), expected, rtol=0, atol=1e-4)


def test_endless_smoothing_gives_one_colour():
    model = linear()
    truth = torch.rand((2, 1, 6, 6), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ctx = Context(model, images=truth, ids=["a", "b"], technique="feature_inversion")
    technique = FeatureInversion(layers=("1",), tv=1e9, optimiser="lbfgs", steps=200, alpha_weight=0, clamp=False)
    grid = technique.run(ctx).artifacts[0].data
    assert float(np.ptp(grid[1])) < 1e-4 and float(np.ptp(grid[0])) > 0.5


def test_the_objective_is_the_releases():
    """In its own units: x in 255ths, E = err + [lambda_TV / 2 tv(x) + lambda_a / 2 sum x^6] / sigma^2."""
    model = linear()
    x = torch.rand((1, 1, 6, 6), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    phi = model.activations(1 - x, ["1"])["1"]
    sigma = 7.0
    found = -o.evaluate(model, inversion_objective("1", phi, 0.4, sigma**2, 10.0, 1.5, 8e-10, 6.0), x, x)
    wide = (x - 0.4).numpy()[0, 0] * 255
    dx, dy = np.zeros_like(wide), np.zeros_like(wide)
    dx[:, :-1], dy[:-1] = np.diff(wide, axis=1), np.diff(wide, axis=0)
    penalties = 10 / 2 * ((dx**2 + dy**2) ** 0.75).sum() + 8e-10 / 2 * (wide**6).sum()
    error = float((model.activations(x, ["1"])["1"] - phi).square().sum() / phi.square().sum())
    assert float(found) == pytest.approx(error + penalties / (sigma * 255) ** 2, rel=1e-5)


def test_the_released_weights_follow_the_depth():
    assert [released_tv(k / 20) for k in (1, 6, 7, 12, 13, 20)] == [1, 1, 10, 10, 100, 100]


def test_the_weight_of_the_variation_suits_the_size():
    """A wave drawn at half the size keeps its share of the objective: TV / ||x||^2 times the weight."""

    def share(side):
        place = torch.linspace(0, 2 * torch.pi, side + 1, dtype=torch.float64)[:-1]
        x = place.sin().expand(1, 1, side, side)
        return float(o.total_variation(2.0).score({}, x) / x.square().sum()) * released_tv(0.1, side)

    assert share(64) == pytest.approx(share(256), rel=0.05)


def test_one_step_is_the_releases():
    """x <- x - rate sigma^2 dE/dx from noise of a natural picture's size, the first of three phases."""
    model = linear()
    truth = torch.rand((1, 1, 6, 6), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ctx = Context(model, images=truth, ids=["a"], technique="feature_inversion")
    technique = FeatureInversion(layers=("1",), steps=4, tv=5.0, clamp=False)
    made, _ = technique._invert(ctx, "1")
    norm = NATURAL_RMS**2 * 36
    x = NATURAL_RMS * ctx.draws(["1 a"]).randn((1, 6, 6))
    phi = model.activations(truth, ["1"])["1"]
    objective = inversion_objective("1", phi, 0.0, norm, 5.0, 2.0, 8e-10, 6.0)
    velocity, before = torch.zeros_like(x), None
    for rate in (0.004, 0.0004, 0.0004, 0.00004):
        leaf = x.clone().requires_grad_()
        slope = torch.autograd.grad(o.evaluate(model, objective, leaf, leaf).sum(), leaf)[0]
        velocity = rate * norm * slope + (0.9 * velocity if rate == before else 0)
        x, before = x + velocity, rate
    torch.testing.assert_close(made.images, x, rtol=0, atol=1e-12)


def test_measures_are_scikit_images():
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    a, b = (torch.rand((2, 3, 16, 12), generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    for i in range(2):
        x, y = a[i].numpy(), b[i].numpy()
        assert signal_to_noise(a, b)[i] == pytest.approx(peak_signal_noise_ratio(y, x, data_range=1), rel=1e-6)
        assert similarity(a, b)[i] == pytest.approx(structural_similarity(x, y, channel_axis=0, data_range=1), rel=1e-6)
    assert signal_to_noise(a, a).tolist() == [100, 100]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_first_relu_gives_the_photograph_back_and_deeper_layers_less(squeezenet, registry):
    """On a real network: over 40 dB at the first ReLU, then less with depth, while each meets its features far better than noise."""
    photo = load_dataset("photos", registry).select(indices=[0])
    result = run_once(FeatureInversion(layers=("features.1", "features.4", "features.9"), steps=200), squeezenet, photo)
    rows = next(a for a in result.artifacts if a.name == "layers").rows
    psnr = [row[4] for row in rows]
    assert psnr[0] > 40
    assert psnr[0] > psnr[1] + 10 > psnr[2] + 10
    assert all(row[3] < 0.15 for row in rows)
    curve = next(a for a in result.artifacts if a.name == "objective")
    assert all(line[-1] < 0.3 * line[0] for line in curve.lines.values())


@pytest.mark.parametrize("optimiser", ["momentum", "adam", "lbfgs"])
def test_going_on_gives_what_an_undivided_run_gives(optimiser, digits_cnn, registry):
    digits = load_dataset("digits", registry).select(2)
    settings = {"layers": ("features.0", "classifier.1"), "optimiser": optimiser}
    whole = run_once(FeatureInversion(steps=30, **settings), digits_cnn, digits)
    rest = run_once(FeatureInversion(steps=30, go_on=12, **settings), digits_cnn, digits)
    np.testing.assert_array_equal(rest.artifacts[0].data, whole.artifacts[0].data)
    first = run_once(FeatureInversion(steps=12, **settings), digits_cnn, digits)
    assert not np.array_equal(first.artifacts[0].data, whole.artifacts[0].data)


def test_zero_steps_give_the_start_and_a_wild_rate_the_last_good_picture(digits_cnn, registry):
    digits = load_dataset("digits", registry).select(2)
    result = run_once(FeatureInversion(layers=("features.0",), steps=0), digits_cnn, digits)
    assert 0.1 < result.artifacts[0].data[1].std() < 0.4
    wild = run_once(FeatureInversion(layers=("features.0",), steps=40, rate=1e30, clamp=False), digits_cnn, digits)
    assert len(wild.notes) == 2 and "stopped being finite" in wild.notes[0]
    assert np.isfinite(wild.artifacts[0].data).all()


def test_bad_input_is_named(digits_cnn, registry):
    digits = load_dataset("digits", registry).select(1)
    with pytest.raises(ConfigError, match="no layer 'features.99'"):
        run_once(FeatureInversion(layers=("features.99",)), digits_cnn, digits)
    with pytest.raises(ConfigError, match="go_on 30 must be fewer than steps"):
        FeatureInversion.build({"go_on": 30, "steps": 30})


# -- through every depth -------------------------------------------------------------------------------------------------


def test_recognition_counts_the_nearest(digits_cnn, registry):
    """Perfect copies are recognised always, copies of the neighbour never."""
    digits = load_dataset("digits", registry)
    some = digits.select(indices=[3, 4, 5])
    technique = InversionByDepth(gallery=50)
    ctx = Context(
        digits_cnn,
        images=torch.from_numpy(some.pictures(digits_cnn.input)).permute(0, 3, 1, 2).float() / 255,
        ids=some.ids,
        dataset=some,
    )
    own, others = ctx.images, ctx.images.roll(1, 0)
    pixels, features, size = technique._recognised(ctx, torch.stack([own, others], 1))
    assert size == 50
    assert pixels.tolist() == features.tolist() == [[1, 1, 1], [0, 0, 0]]


def test_deeper_layers_give_less_away(digits_cnn, registry):
    digits = load_dataset("digits", registry).select(4)
    result = run_once(InversionByDepth(steps=200, gallery=200, layers=("features.0", "features.6", "classifier.2")), digits_cnn, digits)
    table = next(a for a in result.artifacts if a.name == "layers")
    assert [row[0] for row in table.rows] == ["features.0", "features.6", "classifier.2"]
    psnr = [row[5] for row in table.rows]
    assert psnr[0] > psnr[1] > psnr[2]
    metrics = {m.name: m for m in result.metrics}
    assert metrics["recognised_first"].value == 1.0 and "200 pictures" in metrics["recognised_first"].detail
