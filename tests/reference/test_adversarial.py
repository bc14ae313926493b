"""Minimal and universal changes, certificates, confidence, slices, transfer and training against closed forms and peers."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm
from torch import nn

from harness import ConfigError, NotApplicable
from harness.context import Context, Draws
from harness.models import LoadedModel, load_model
from harness.registry import Adversary, InputSpec, RecipeEntry
from harness.testing import load_dataset, run_once
from harness.train import fit, robust_accuracy, worst
from harness_adversarial import (
    AdversarialTraining,
    CertifiedRadius,
    Confidence,
    DecisionSlice,
    MinimalPerturbation,
    TransferMatrix,
    UniversalPerturbation,
)
from harness_adversarial.adversarial_training import fresh
from harness_adversarial.attacks import Attack, attack, lengths
from harness_adversarial.certified_radius import certificate, counts, lower_bound
from harness_adversarial.confidence import Scores, Seen, calibration_error, fitted_temperature, selective, softmax
from harness_adversarial.decision_slice import painted
from harness_adversarial.intervals import Unknown, bounds, certified_linf
from harness_adversarial.minimal import deepfool, lbfgs
from harness_adversarial.shared import second
from harness_adversarial.universal import margin, project_noise, universal_deepfool, universal_gradient

SPEC = InputSpec(channels=1, size=8, mean=(0.305,), std=(0.376,))


def draws(count, seed=0, dtype=torch.float32):
    return Draws([str(i) for i in range(count)], torch.device("cpu"), dtype, seed)


def table(result, name):
    return next(a for a in result.artifacts if a.name == name)


def metric(result, name):
    return next(m for m in result.metrics if m.name == name)


def linear(classes=4, seed=0, scale=1.0):
    """(model, W, b) of a linear model in float64 whose boundaries lie near grey pictures."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(64, classes).double()
    with torch.no_grad():
        layer.weight.copy_(scale * torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64))
        layer.bias.copy_(-0.5 * layer.weight.sum(1))
    module = nn.Sequential(nn.Flatten(), layer)
    spec = InputSpec(channels=1, size=8, mean=(0.0,), std=(1.0,))
    return LoadedModel(module, spec, "linear"), layer.weight, layer.bias


def near_grey(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + 0.05 * torch.randn((count, 1, 8, 8), generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def some(registry, digits_cnn):
    data = load_dataset("digits_test", registry).select(40)
    images = torch.from_numpy(data.pictures(digits_cnn.input)).permute(0, 3, 1, 2).float() / 255
    return images, torch.from_numpy(data.labels)


@pytest.fixture(scope="module")
def digits(registry):
    return load_dataset("digits_test", registry)


# -- the smallest change ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ball", ["l2", "linf"])
def test_deepfool_on_a_linear_model_is_the_distance_to_the_nearest_boundary(ball):
    model, weight, _ = linear()
    x = near_grey(6)
    logits = model(x)
    first = logits.argmax(1)
    steps = weight[None] - weight[first][:, None]  # (N, K, D)
    size = steps.norm(dim=2) if ball == "l2" else steps.abs().sum(2)
    distance = (logits.gather(1, first[:, None]) - logits) / size
    distance[torch.arange(6), first] = torch.inf
    found = deepfool(model, x, norm=ball, overshoot=0.02, steps=1)
    assert found.fooled.all()
    torch.testing.assert_close(lengths(found.images - x, ball), 1.02 * distance.amin(1).detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("ball", ["l2", "linf"])
def test_deepfool_is_within_one_percent_of_foolboxs(ball, digits_cnn, some):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import foolbox
    images = some[0]
    labels = digits_cnn(images).argmax(1)

    class Peer(nn.Module):
        def forward(self, x):
            return digits_cnn(x)

    peer = foolbox.PyTorchModel(Peer().eval(), bounds=(0, 1), device="cpu")
    theirs = (foolbox.attacks.L2DeepFoolAttack() if ball == "l2" else foolbox.attacks.LinfDeepFoolAttack())(
        peer, images, labels, epsilons=None
    )
    ours = deepfool(digits_cnn, images, norm=ball)
    assert theirs[2].all()
    assert ours.fooled.all()
    a, b = lengths(ours.images - images, ball), lengths(theirs[1] - images, ball)
    assert float(a.mean()) <= 1.01 * float(b.mean())
    assert float((a / b).median()) == pytest.approx(1, abs=0.01)
    assert ours.images.min() >= 0
    assert ours.images.max() <= 1


def test_lbfgs_finds_the_distance_to_a_boundary():
    """A linear model of two classes: |f| / ||w|| is the shortest way."""
    model, weight, _ = linear(classes=2)
    x = near_grey(4)
    logits = model(x).detach()
    wanted = logits.argmin(1)
    closed = (logits[:, 0] - logits[:, 1]).abs() / (weight[0] - weight[1]).norm().detach()
    found = lbfgs(model, x, wanted, draws(4, dtype=torch.float64), steps=60, rounds=16)
    assert found.fooled.all()
    length = lengths(found.images - x, "l2")
    assert (length >= closed - 1e-9).all()
    assert (length <= 1.05 * closed).all()


def test_lbfgs_needs_less_than_fgsm(digits_cnn, some):
    images = some[0][:12]
    clean = digits_cnn(images).argmax(1)
    wanted = second(digits_cnn(images), clean)
    found = lbfgs(digits_cnn, images, wanted, draws(12))
    assert found.fooled.all()
    assert torch.equal(digits_cnn(found.images).argmax(1), wanted)
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    best = torch.full((12,), torch.inf)
    for eps in torch.linspace(0.01, 1, 60).tolist():
        single = attack(digits_cnn, images, clean, Attack("fgsm", "linf", 1, 1.0), eps)
        size = torch.where(single.fooled, lengths(single.images - images, "l2"), torch.inf)
        best = best.minimum(size)
    assert torch.isfinite(best).sum() >= 8
    assert (lengths(found.images - images, "l2") <= best).all()


def test_distortion_is_szegedys_and_a_smaller_one_is_found_by_lbfgs(digits_cnn, digits):
    result = run_once(MinimalPerturbation(), digits_cnn, digits.select(6))
    rows = table(result, "pictures").rows
    for row in rows:
        assert row[5] == pytest.approx(row[6] / 8, rel=1e-6)  # RMS = L2 / sqrt(64)
    by = {m: [r[5] for r in rows if r[2] == m] for m in ("DeepFool, L2", "L-BFGS")}
    assert np.mean(by["L-BFGS"]) <= np.mean(by["DeepFool, L2"])
    assert metric(result, "distortion_deepfool").value == pytest.approx(np.mean(by["DeepFool, L2"]))


def test_a_target_that_is_the_answer_is_refused(digits_cnn, digits):
    one = digits.select(1)
    with pytest.raises(ConfigError, match="already '0'"):
        run_once(MinimalPerturbation(methods=("lbfgs",), target=int(one.labels[0])), digits_cnn, one)


# -- one change for all ----------------------------------------------------------------------------------------------------


def test_noise_is_projected_as_the_paper_says():
    noise = torch.randn((1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(project_noise(noise, 0.5, "linf"), noise.sign() * noise.abs().minimum(torch.tensor(0.5)), rtol=0, atol=1e-12)
    torch.testing.assert_close(project_noise(noise, 2.0, "l2"), noise * min(1, 2 / float(noise.norm())), rtol=0, atol=1e-12)
    torch.testing.assert_close(project_noise(noise, 100.0, "l2"), noise)


@pytest.mark.parametrize("ball", ["linf", "l2"])
@pytest.mark.parametrize("make", [universal_deepfool, universal_gradient])
def test_universal_noise_stays_in_its_ball_and_beats_random_noise(make, ball, digits_cnn, some):
    images = some[0]
    eps = 40 / 255 if ball == "linf" else 1.2
    more = {"shift": 0.0, "passes": 30} if make is universal_gradient else {"passes": 2, "wanted": 1.0}
    noise = make(digits_cnn, images, eps, draws(1), norm=ball, **more)
    assert float(noise.abs().max() if ball == "linf" else noise.norm()) <= eps + 1e-6
    clean = digits_cnn(images).argmax(1)

    def rate(v):
        return float((digits_cnn((images + v).clamp(0, 1)).argmax(1) != clean).float().mean())

    random = []
    for seed in range(5):
        signs = torch.randn(noise.shape, generator=torch.Generator().manual_seed(seed)).sign()
        random.append(rate(eps * signs if ball == "linf" else eps * signs / signs.norm()))
    assert rate(noise) > np.mean(random) + 0.05


def test_the_margin_is_what_a_picture_is_from_another_class():
    logits = torch.tensor([[3.0, 1.0, 2.5], [0.0, 4.0, -1.0]])
    assert margin(logits, torch.tensor([0, 2])).tolist() == [0.5, -5.0]


def test_universal_noise_is_judged_on_pictures_it_has_not_seen(digits_cnn, digits):
    technique = UniversalPerturbation(eps=40, passes=30, shift=0.0)
    result = run_once(technique, digits_cnn, digits)
    rates = {row[0]: row for row in table(result, "rates").rows}
    unseen, own = rates["the noise, on unseen pictures"], rates["the noise, on its own pictures"]
    assert unseen[5] == 72
    assert own[5] == 288
    assert metric(result, "fooled").value == unseen[1]
    assert metric(result, "gain").value > 0.1
    noise = table(result, "noise").data["noise"]
    assert np.abs(noise).max() <= 40 / 255 + 1e-7
    # The noise of the artifact is what was measured: used again it fools as many.
    images = torch.from_numpy(digits.pictures(digits_cnn.input)).permute(0, 3, 1, 2).float() / 255
    again = digits_cnn((images + torch.from_numpy(noise)).clamp(0, 1)).argmax(1) != digits_cnn(images).argmax(1)
    assert int(again.sum()) == unseen[4] + own[4]


def test_eps_is_in_255ths(digits_cnn, digits):
    with pytest.raises(ConfigError, match="255ths"):
        run_once(UniversalPerturbation(eps=256), digits_cnn, digits.select(8))
    with pytest.raises(ConfigError, match="255ths"):
        run_once(TransferMatrix(eps=256, models=("digits_resnet",)), digits_cnn, digits.select(8))
    with pytest.raises(ConfigError):
        CertifiedRadius.build({"intervals": [300]})


# -- certificates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n", "alpha"), [(1000, 1000, 0.001), (700, 1000, 0.01), (1, 10, 0.05)])
def test_the_bound_is_clopper_and_pearsons(k, n, alpha):
    """With the chance at the bound, k or more hits come up with probability alpha."""
    assert float(binom.sf(k - 1, n, lower_bound(k, n, alpha))) == pytest.approx(alpha, rel=1e-9)
    assert lower_bound(0, n, alpha) == 0.0


def test_a_certificate_is_never_above_the_distance_of_a_linear_model():
    """sigma Phi^-1(Phi(m / (sigma ||w||))) = m / ||w||, and the estimate from samples stays below."""
    model, weight, _ = linear(classes=2, scale=0.3)
    x = near_grey(12, seed=3)
    logits = model(x).detach()
    distance = ((logits[:, 0] - logits[:, 1]).abs() / (weight[0] - weight[1]).norm()).detach().numpy()
    sigma = 0.25
    assert np.allclose([certificate(float(norm.cdf(d / sigma)), sigma) for d in distance], distance, atol=1e-9)
    ctx = Context(model, images=x, ids=[str(i) for i in range(12)], technique="t", seed=1, max_batch=64)
    answer = logits.argmax(1).numpy()
    hits = counts(ctx, sigma, 0, 2000, 2)[np.arange(12), answer]
    found = np.array([certificate(lower_bound(int(k), 2000, 0.001), sigma) for k in hits])
    assert (found <= distance).all()
    assert found.max() > 0.5 * distance.max()


def test_noise_does_not_depend_on_the_batch(digits_cnn, some):
    images = some[0][:3]
    found = [
        counts(Context(digits_cnn, images=images, ids=["a", "b", "c"], technique="t", seed=1, max_batch=size), 0.3, 10, 90, 10)
        for size in (7, 64)
    ]
    assert np.array_equal(*found)
    assert (found[0].sum(1) == 90).all()
    assert (found[0].max(1) < 90).any()


def test_training_on_noise_certifies_more_and_no_attack_inside_flips(registry, digits_cnn, digits):
    data = digits.select(24)
    noisy = load_model("digits_cnn_noise", registry)
    technique = CertifiedRadius(samples=400)
    plain, trained = (run_once(technique, m, data) for m in (digits_cnn, noisy))
    assert metric(trained, "radius").value > 1.3 * metric(plain, "radius").value
    curve = table(trained, "certified").lines["certified accuracy"]
    assert (np.diff(curve) <= 0).all()
    # Projected gradient steps in L2 within the radius do not change the smoothed answer.
    images = torch.from_numpy(data.pictures(noisy.input)).permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(data.labels)
    rows = table(trained, "pictures").rows
    checked = 0
    for i, row in enumerate(rows):
        if row[6] > 0.3 and row[1] == row[3]:
            moved = attack(noisy, images[i : i + 1], labels[i : i + 1], Attack("a", "l2", 20, 0.2), 0.99 * row[6]).images
            ctx = Context(noisy, images=moved, ids=["x"], technique="t", seed=9, max_batch=256)
            assert counts(ctx, 0.25, 0, 500, 10).argmax(1)[0] == int(labels[i])
            checked += 1
    assert checked >= 5


@pytest.mark.parametrize("name", ["digits_linear", "digits_cnn", "digits_resnet"])
def test_intervals_hold_every_picture_of_the_box(name, registry, some):
    model = load_model(name, registry)
    image = some[0][:1]
    eps = 6 / 255
    low, high = bounds(model.module, (model.normalise((image - eps).clamp_min(0)), model.normalise((image + eps).clamp_max(1))))
    generator = torch.Generator().manual_seed(0)
    noise = eps * (2 * torch.rand((10_000, 1, 8, 8), generator=generator) - 1)
    noise[5000:] = eps * noise[5000:].sign()  # corners too
    logits = model((image + noise).clamp(0, 1))
    assert (logits >= low - 1e-4).all()
    assert (logits <= high + 1e-4).all()
    if name == "digits_linear":  # exact there
        weight = model.module.linear.weight / model.input.std[0]
        radius = ((image + eps).clamp_max(1) - (image - eps).clamp_min(0)).flatten() / 2
        torch.testing.assert_close((high - low)[0] / 2, (weight.abs() * radius).sum(1), rtol=1e-4, atol=1e-4)


def test_intervals_certify_what_they_may_and_no_more(registry, digits, some):
    model = load_model("digits_cnn", registry)
    images, labels = some
    assert torch.equal(certified_linf(model, images, labels, 0.0), model(images).argmax(1) == labels)
    assert certified_linf(model, images, labels, 0.02 / 255).any()
    linear_model = load_model("digits_linear", registry)
    eps = 8 / 255
    sure = certified_linf(linear_model, images, labels, eps)
    broken = attack(linear_model, images, labels, Attack("a", "linf", 20, 0.1), eps).fooled
    assert sure.any()
    assert not (sure & broken).any()
    with pytest.raises(Unknown, match="GELU"):
        bounds(nn.Sequential(nn.Flatten(), nn.GELU()), (images, images))
    result = run_once(CertifiedRadius(samples=20, intervals=(1.0, 0.01)), linear_model, digits.select(5))
    assert [row[0] for row in table(result, "intervals").rows] == ["0.01/255", "1/255"]


# -- confidence ------------------------------------------------------------------------------------------------------------


def test_the_calibration_error_of_a_calibrated_model_vanishes_and_otherwise_is_the_gap():
    random = np.random.default_rng(0)
    sure = random.uniform(0.2, 1, 200_000)
    assert calibration_error(sure, random.uniform(size=sure.size) < sure, 15) < 0.01
    assert calibration_error(np.full(1000, 0.9), np.arange(1000) < 600, 15) == pytest.approx(0.3)


def test_the_calibration_error_is_sklearns_curve_summed():
    from sklearn.calibration import calibration_curve

    random = np.random.default_rng(1)
    sure = random.beta(3, 1, 5000)
    right = random.uniform(size=5000) < sure**2
    accuracy, said = calibration_curve(right, sure, n_bins=10)
    counts_ = np.histogram(sure, 10, (0, 1))[0]
    assert calibration_error(sure, right, 10) == pytest.approx(np.sum(counts_[counts_ > 0] / 5000 * np.abs(accuracy - said)), abs=1e-9)


def test_the_temperature_is_found_again_and_keeps_answers():
    random = np.random.default_rng(2)
    logits = random.normal(0, 2, (20_000, 5))
    labels = (softmax(logits).cumsum(1) > random.uniform(size=(20_000, 1))).argmax(1)
    temperature, at_end = fitted_temperature(3 * logits, labels)
    assert temperature == pytest.approx(3, rel=0.03)
    assert not at_end
    assert np.array_equal((3 * logits).argmax(1), (3 * logits / temperature).argmax(1))
    assert fitted_temperature(logits, logits.argmax(1)) == (1.0, True)  # all right: none is the best


def test_accuracy_of_the_surest_falls_with_coverage_for_an_oracle():
    right = np.random.default_rng(3).uniform(size=500) < 0.8
    curve, area = selective(right.astype(float), right)
    assert (np.diff(curve.lines["the surest first"]) <= 1e-12).all()
    assert curve.lines["the surest first"][-1] == pytest.approx(right.mean())
    worst_area = selective(-right.astype(float), right)[1]
    assert area < 0.1 < worst_area


def test_distances_are_plain_definitions():
    random = np.random.default_rng(4)
    features = np.concatenate([random.normal((4, 0, 0), 1, (200, 3)), random.normal((-4, 0, 0), 1, (200, 3))])
    labels = np.repeat([0, 1], 200)
    seen = Seen(random.normal(size=(5, 2)), random.normal(0, 3, (5, 3)))
    _, energy, mahalanobis, knn = Scores(features, labels, 4)(seen)
    assert np.allclose(energy, np.log(np.exp(seen.logits).sum(1)))
    means = [features[labels == c].mean(0) for c in (0, 1)]
    spread = sum((features[labels == c] - means[c]).T @ (features[labels == c] - means[c]) for c in (0, 1)) / 400
    plain = -np.min([[(f - m) @ np.linalg.inv(spread) @ (f - m) for m in means] for f in seen.features], 1)
    assert np.allclose(mahalanobis, plain, rtol=0.1)  # shrinkage changes little with so many pictures
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    own = seen.features / np.linalg.norm(seen.features, axis=1, keepdims=True)
    assert np.allclose(knn, -np.sort(np.linalg.norm(own[:, None] - unit, axis=2), 1)[:, 3])


def test_strange_pictures_are_told_from_digits(digits_cnn, digits):
    result = run_once(Confidence(eps=32, resamples=50), digits_cnn, digits)
    rows = {row[0]: row for row in table(result, "strange").rows}
    assert set(rows) == {"uniform noise", "textures", "adversarial, 32/255"}
    assert rows["uniform noise"][3] > 0.8  # energy
    assert all(0 <= v <= 1 for row in rows.values() for v in row[2:])
    before, after = table(result, "calibration").rows
    assert before[7] == after[7]  # temperature changes no answer


def test_confidence_needs_labels_and_pictures(digits_cnn, digits):
    with pytest.raises(NotApplicable, match="four pictures"):
        run_once(Confidence(), digits_cnn, digits.select(3))


# -- the plane and the matrix ----------------------------------------------------------------------------------------------


def test_a_slice_of_a_linear_model_has_its_boundary_where_it_is(registry):
    """Along the gradient the other class begins at |f| / ||w||; across it, nowhere."""
    model, weight, _ = linear(classes=2)
    x = near_grey(1, seed=5)
    logits = model(x).detach()[0]
    distance = float((logits[0] - logits[1]).abs() / (weight[0] - weight[1]).norm())
    ctx = Context(model, images=x, ids=["a"], technique="decision_slice", seed=0, max_batch=256)
    result = DecisionSlice(reach=2 * distance, side=201, normals=False).run(ctx)
    plane = table(result, "planes").data[0]
    scale = plane.shape[-1] // 201
    line = plane[:, ::scale, ::scale][:, 100]
    away = np.flatnonzero((np.abs(line - line[:, 100:101]) > 0.05).any(0))
    first = away[away > 100].min() - 100
    assert first / 100 * 2 * distance == pytest.approx(distance, abs=0.03 * distance)
    assert not (away < 100).any()  # on the other side it is only the surer
    upward = plane[:, ::scale, ::scale][:, :, 100]
    assert np.allclose(upward, upward[:, :1])
    assert metric(result, "boundary_distance").value == pytest.approx(1.02 * distance, rel=1e-6)


def test_a_slice_shows_the_classes_of_its_points(digits_cnn, digits):
    result = run_once(DecisionSlice(side=21), digits_cnn, digits.select(4))
    shares: dict[str, float] = {}
    for row in table(result, "classes").rows:
        shares[row[0]] = shares.get(row[0], 0) + row[3]
    assert all(s == pytest.approx(1) for s in shares.values())
    lines = table(result, "normals").lines
    for line in lines.values():
        assert np.square(line).sum() == pytest.approx(4, rel=1e-5)  # as many unit vectors
    with pytest.raises(ConfigError, match="two different"):
        DecisionSlice.build({"axes": ["random", "random"]})


def test_universal_noise_as_an_axis(digits_cnn, digits):
    result = run_once(DecisionSlice(axes=("universal", "random"), side=5, normals=False), digits_cnn, digits.select(6))
    assert table(result, "planes").data.shape[0] == 6


def test_colours_are_those_of_the_classes_and_lines_are_darker():
    plane = np.array([[3, 3, 7], [3, 3, 7], [3, 3, 7]])
    colours = painted(plane, [3, 7])
    assert np.allclose(colours[:, 0, 0], [0x56 / 255, 0xB4 / 255, 0xE9 / 255])
    assert (colours[:, 1, 2] < [0xE6 / 255, 0x9F / 255, 1]).all()


def test_what_is_made_on_a_model_fools_its_twin_as_well(registry, digits_cnn, digits):
    result = run_once(TransferMatrix(models=("digits_linear", "digits_cnn_pgd"), eps=32), digits_cnn, digits.select(60))
    matrix = table(result, "fooled")
    values = dict(zip(matrix.rows, matrix.values.tolist(), strict=True))
    assert matrix.columns == ("digits_cnn", "digits_linear", "digits_cnn_pgd")
    for k, name in enumerate(matrix.columns[:2]):
        assert values[name][k] > values["random changes"][k] + 0.2  # the diagonal
        assert values[name][k] >= max(values[other][k] for other in matrix.columns) - 1e-9
    assert values["digits_cnn_pgd"][2] < 0.5 * values["digits_cnn"][0]  # the robust network bears it better
    assert metric(result, "own").value == pytest.approx(values["digits_cnn"][0])
    noise = run_once(TransferMatrix(models=("digits_linear",), eps=48, kind="universal"), digits_cnn, digits.select(30))
    assert table(noise, "fooled").values.shape == (3, 2)


def test_other_classes_and_no_models_are_refused(digits_cnn, digits):
    with pytest.raises(NotApplicable, match="further models"):
        run_once(TransferMatrix(), digits_cnn, digits.select(4))
    with pytest.raises(ConfigError, match="other classes"):
        run_once(TransferMatrix(models=("snow_cnn",)), digits_cnn, digits.select(4))


# -- training on attacks ---------------------------------------------------------------------------------------------------


def test_the_worst_loss_of_a_linear_model_is_the_closed_form():
    """max over the ball of log(1 + exp(-y f)) = log(1 + exp(-y f + eps ||w||_1)), where no pixel is clipped."""
    model, weight, _ = linear(classes=2, scale=0.2)
    x = near_grey(20)
    labels = torch.arange(20) % 2
    eps = 10 / 255
    for adversary in (Adversary(eps=10, steps=1, step_size=1.0, random_start=False), Adversary(eps=10, steps=8)):
        found = worst(model, x, labels, adversary, torch.Generator().manual_seed(0))
        assert float((found - x).abs().max()) <= eps + 1e-7
        loss = nn.functional.cross_entropy(model(found), labels, reduction="none")
        logits = model(x)
        lead = logits.gather(1, labels[:, None])[:, 0] - logits.gather(1, 1 - labels[:, None])[:, 0]
        closed = torch.log1p(torch.exp(-lead + eps * (weight[0] - weight[1]).abs().sum()))
        torch.testing.assert_close(loss, closed, rtol=0, atol=1e-6)


def test_robust_accuracy_of_a_linear_model_is_exact():
    model, weight, _ = linear(classes=2, scale=0.2)
    x = near_grey(200, seed=7)
    labels = model(x).argmax(1)
    logits = model(x)
    lead = logits.max(1).values - logits.min(1).values
    share = float((lead > 1 / 255 * (weight[0] - weight[1]).abs().sum()).double().mean())
    recipe = RecipeEntry(builder="a:b", dataset="d", epochs=1, input=model.input)
    assert 0.1 < share < 0.9
    assert robust_accuracy(model.module, recipe, x, labels, eps=1) == pytest.approx(share, abs=1e-9)


def test_networks_trained_on_attacks_bear_them(registry, digits_cnn, digits):
    """Those that ship, and one trained here for a few epochs."""
    images = torch.from_numpy(digits.pictures(digits_cnn.input)).permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(digits.labels)
    recipe = registry.recipe("digits_cnn_pgd")
    robust = {
        name: robust_accuracy(load_model(name, registry).module, recipe, images, labels)
        for name in ("digits_cnn", "digits_cnn_fgsm", "digits_cnn_pgd")
    }
    assert robust["digits_cnn"] < 0.45
    assert robust["digits_cnn_fgsm"] > 0.7
    assert robust["digits_cnn_pgd"] > 0.75


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_training_answers_the_four_questions(registry, digits_cnn):
    data = load_dataset("digits", registry).select(600)
    technique = AdversarialTraining(noises=("none", "pgd"), budgets=(24,), eps=24, epochs=14, steps=3, step_size=0.5)
    result = run_once(technique, digits_cnn, data, max_batch=128)
    assert metric(result, "attacked_pgd").value > metric(result, "attacked_none").value + 0.15
    assert {"which_noise", "which_budget", "clean_accuracy", "when_enough", "loss", "networks"} == {a.name for a in result.artifacts}
    for curve in (table(result, "which_noise"), table(result, "which_budget")):
        for line in curve.lines.values():
            assert (np.diff(line) <= 0.03).all()  # falls as the attack grows
    loss = table(result, "loss").lines["none"]
    assert loss[-1] < 0.5 * loss[0]
    assert len(table(result, "when_enough").x) == 14


def test_a_fresh_network_is_another_one_and_the_same_by_seed(registry, digits_cnn):
    for model in (digits_cnn, load_model("digits_resnet", registry)):
        one, two, other = (fresh(model.module, seed) for seed in (0, 0, 1))
        weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (one, two, other, model.module)]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])
        assert not torch.equal(weights[0], weights[3])

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(NotApplicable, match="Odd"):
        fresh(nn.Sequential(Odd()), 0)


@pytest.mark.parametrize(
    "more", [{"noise": 0.2}, {"signs": 0.1}, {"flip": True}, {"schedule": "triangular"}, {"adversary": {"eps": 8, "steps": 2}}]
)
def test_a_recipes_words_change_the_training(more, some):
    images, labels = some

    def trained(**words):
        recipe = RecipeEntry(builder="a:b", dataset="d", epochs=2, batch_size=20, input=SPEC, **words)
        torch.manual_seed(0)
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        fit(module, recipe, images, labels)
        return module[1].weight

    assert torch.equal(trained(**more), trained(**more))
    assert not torch.equal(trained(), trained(**more))
