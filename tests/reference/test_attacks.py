"""Attacks against foolbox and closed forms, budgets, rates that fall, warnings, bad input."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from harness import ConfigError
from harness.context import Context, Draws
from harness.models import LoadedModel
from harness.registry import InputSpec
from harness.testing import load_dataset, run_once
from harness_adversarial import AttackCurve, FoolingImage
from harness_adversarial.attack_curve import WORST
from harness_adversarial.attacks import Attack, attack, direction, in_255ths, lengths, project, starts
from harness_adversarial.shared import second


@pytest.fixture(scope="module")
def some(registry, digits_cnn):
    data = load_dataset("digits_test", registry).select(60)
    images = torch.from_numpy(data.pictures(digits_cnn.input)).permute(0, 3, 1, 2).float() / 255
    return images, torch.from_numpy(data.labels)


def draws(count):
    return Draws([str(i) for i in range(count)], torch.device("cpu"), torch.float32, 0)


def table(result, name):
    return next(a for a in result.artifacts if a.name == name)


class Peer(nn.Module):
    """The model as foolbox takes it: pixels in [0, 1], normalised by our own code, so that both see the same numbers."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


@pytest.fixture(scope="module")
def foolbox():
    """Its own imports raise warnings about scipy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import foolbox
    return foolbox


def foolbox_model(foolbox, model):
    return foolbox.PyTorchModel(Peer(model).eval(), bounds=(0, 1), device="cpu")


@pytest.mark.parametrize("eps", [4 / 255, 32 / 255])
@pytest.mark.parametrize(("norm", "steps"), [("linf", 1), ("linf", 10), ("l2", 1), ("l2", 10)])
def test_without_a_random_start_it_is_foolboxs(foolbox, norm, steps, eps, digits_cnn, some):
    """In double precision: in single, ten steps of two orders of work can lie a millionth apart by rounding alone."""
    images, labels = some[0].double(), some[1]
    model = LoadedModel(copy.deepcopy(digits_cnn.module).double(), digits_cnn.input, "digits_cnn in double precision", digits_cnn.classes)
    eps = eps if norm == "linf" else 10 * eps
    peers = {
        ("linf", 1): foolbox.attacks.LinfFastGradientAttack(random_start=False),
        ("linf", 10): foolbox.attacks.LinfPGD(rel_stepsize=0.15, steps=10, random_start=False),
        ("l2", 1): foolbox.attacks.L2FastGradientAttack(random_start=False),
        ("l2", 10): foolbox.attacks.L2PGD(rel_stepsize=0.15, steps=10, random_start=False),
    }
    _, theirs, hits = peers[norm, steps](foolbox_model(foolbox, model), images, labels, epsilons=eps)
    settings = Attack("a", norm, steps, 1.0 if steps == 1 else 0.15)
    ours = attack(model, images, labels, settings, eps)
    torch.testing.assert_close(ours.images, theirs, rtol=0, atol=1e-9)
    assert torch.equal(ours.fooled, hits)


def test_targeted_it_is_foolboxs_as_well(foolbox, digits_cnn, some):
    images, labels = some
    wanted = (labels + 1) % 10
    peer = foolbox.attacks.LinfPGD(rel_stepsize=0.1, steps=20, random_start=False)
    _, theirs, hits = peer(foolbox_model(foolbox, digits_cnn), images, foolbox.TargetedMisclassification(wanted), epsilons=0.2)
    ours = attack(digits_cnn, images, wanted, Attack("a", "linf", 20, 0.1, targeted=True), 0.2)
    torch.testing.assert_close(ours.images, theirs, rtol=0, atol=1e-6)
    assert torch.equal(ours.fooled, hits) and hits.any()


def test_with_a_random_start_it_fools_as_many(foolbox, digits_cnn, some):
    images, labels = some
    eps = 40 / 255
    rates = {"ours": [], "foolbox": []}
    for seed in range(3):
        torch.manual_seed(seed)
        peer = foolbox.attacks.LinfPGD(rel_stepsize=0.1, steps=20, random_start=True)
        rates["foolbox"].append(float(peer(foolbox_model(foolbox, digits_cnn), images, labels, epsilons=eps)[2].float().mean()))
        random = Draws([str(i) for i in range(len(images))], torch.device("cpu"), torch.float32, seed)
        settings = Attack("a", "linf", 20, 0.1, random_start=True)
        rates["ours"].append(float(attack(digits_cnn, images, labels, settings, eps, random, drop=True).fooled.float().mean()))
    assert np.mean(rates["ours"]) >= np.mean(rates["foolbox"]) - 0.01
    assert 0.1 < np.mean(rates["foolbox"]) < 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_step_on_a_linear_model_is_the_closed_form(norm):
    """x + eps w / ||w||* : the sign, or the direction, of the loss's gradient."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    model = LoadedModel(module, InputSpec(channels=1, size=4, mean=(0.0,), std=(1.0,)), "linear")
    x = torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64)
    away = (module[1].weight[1] - module[1].weight[0]).view(1, 1, 4, 4)  # of two classes: where class 0 loses
    found = attack(model, x, torch.tensor([0]), Attack("a", norm, 1, 1.0), 0.1).images - x
    expected = 0.1 * (away.sign() if norm == "linf" else away / away.norm())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_changes_stay_in_the_ball_and_pixels_in_range(norm, digits_cnn, some):
    images, labels = some
    for eps in (1 / 255, 0.3, 1.0):
        made = attack(digits_cnn, images, labels, Attack("a", norm, 7, 0.4, random_start=True), eps, draws(len(images)))
        assert float(lengths(made.images - images, norm).max()) <= eps + 1e-7
        assert float(made.images.min()) >= 0 and float(made.images.max()) <= 1
    begun = starts(images, 0.2, norm, draws(len(images)))
    far = lengths(begun - images, norm)
    assert float(far.max()) <= 0.2 + 1e-6 and float(far.mean()) > 0.05
    assert torch.equal(project(images, images, 0.0, norm), images)
    assert float(direction(torch.zeros(1, 1, 2, 2), norm).abs().max()) == 0


def test_a_picture_once_fooled_leaves_and_changes_nothing_for_the_others(digits_cnn, some):
    images, labels = some
    settings = Attack("a", "linf", 12, 0.2)
    whole = attack(digits_cnn, images, labels, settings, 40 / 255)
    quick = attack(digits_cnn, images, labels, settings, 40 / 255, drop=True)
    assert (quick.fooled >= whole.fooled).all() and quick.fooled.any() and not quick.fooled.all()
    assert torch.equal(digits_cnn(quick.images).argmax(1) != labels, quick.fooled)
    torch.testing.assert_close(quick.images[~quick.fooled], whole.images[~quick.fooled], rtol=0, atol=1e-6)
    one = attack(digits_cnn, images[5:6], labels[5:6], settings, 40 / 255)
    torch.testing.assert_close(one.images[0], whole.images[5], rtol=0, atol=1e-6)


# -- the curve --------------------------------------------------------------------------------------------------------------


def test_rates_fall_with_the_budget_and_the_worst_case_is_below_all(digits_cnn, registry):
    data = load_dataset("digits_test", registry).select(40)
    result = run_once(AttackCurve(eps=(8, 16, 32, 64), eps_l2=(0.25, 0.5, 1, 2), steps=10), digits_cnn, data, max_batch=16)
    for norm in ("linf", "l2"):
        lines = table(result, f"accuracy_{norm}").lines
        for values in lines.values():
            assert (np.diff(values) <= 0).all()
        worst = np.array(lines[WORST])
        assert all((worst <= np.array(v) + 1e-9).all() for v in lines.values())
        assert worst[-1] < 0.5 < worst[0]
        assert all(v[0] == worst[0] for v in lines.values())
    metrics = {m.name: m for m in result.metrics}
    assert metrics["clean_accuracy"].value == worst[0] and "40" in metrics["clean_accuracy"].detail
    rows = table(result, "rates").rows
    assert {row[2] for row in rows if row[1] == "L-inf"} == {"8/255", "16/255", "32/255", "64/255"}
    assert all(row[4] <= row[3] <= row[5] for row in rows)
    again = run_once(AttackCurve(eps=(8, 16, 32, 64), eps_l2=(0.25, 0.5, 1, 2), steps=10), digits_cnn, data, max_batch=40)
    assert table(again, "rates").rows == rows


class Masked(nn.Module):
    """Answers through logits rounded to steps: right, and without a gradient to follow."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        logits = self.inner(x)
        return logits.detach().round() + 0 * logits


def test_masked_gradients_raise_a_warning(digits_cnn, registry):
    data = load_dataset("digits_test", registry).select(40)
    masked = LoadedModel(Masked(digits_cnn.module), digits_cnn.input, "masked", digits_cnn.classes)
    settings = {"attacks": ("pgd",), "eps": (48,), "steps": 5, "surrogate": "digits_cnn"}
    notes = run_once(AttackCurve(**settings), masked, data, max_batch=40).notes
    assert any("pictures made on digits_cnn fool" in n for n in notes)
    honest = run_once(AttackCurve(**settings | {"steps": 40, "surrogate": "digits_resnet"}), digits_cnn, data, max_batch=40).notes
    assert not any("masked" in n for n in honest)


def test_one_weak_attack_is_not_called_robustness(digits_cnn, registry):
    data = load_dataset("digits_test", registry).select(10)
    notes = run_once(AttackCurve(attacks=("fgsm",), eps=(8,), checks=False), digits_cnn, data).notes
    assert any("says nothing about robustness" in n for n in notes)


def test_what_cannot_be_attacked(digits_cnn, registry):
    data = load_dataset("digits_test", registry).select(6)
    with pytest.raises(ConfigError, match="outside 0 to 255"):
        run_once(AttackCurve(eps=(300,)), digits_cnn, data)
    none = run_once(AttackCurve(eps=(0, 0.0001), attacks=("pgd",)), digits_cnn, data)
    assert len(set(table(none, "accuracy_linf").lines["pgd"])) == 1  # nothing is lost within no budget
    from dataclasses import replace

    wrong = replace(data, labels=(data.labels + 1) % 10)
    result = run_once(AttackCurve(eps=(8,), attacks=("pgd",)), digits_cnn, wrong)
    assert any("wrong on every picture" in n for n in result.notes)
    unlabelled = replace(data, labels=None)
    result = run_once(AttackCurve(eps=(8,), attacks=("pgd",), steps=3), digits_cnn, unlabelled)
    assert any("no labels" in n for n in result.notes)
    assert second(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1])).tolist() == [2]
    assert in_255ths(2 / 255) == "2/255" and in_255ths(0.5 / 255) == "0.5/255"


# -- fooling pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_sample_becomes_a_koala(squeezenet, registry):
    data = load_dataset("imagenet_samples", registry)
    result = run_once(FoolingImage(target="koala"), squeezenet, data, max_batch=20)
    metrics = {m.name: m for m in result.metrics}
    assert metrics["fooled"].value == 1.0 and len(metrics["fooled"].per_image) == 20
    assert metrics["confidence"].value >= 0.98
    assert all(row[5] <= 2 + 1e-4 for row in table(result, "pictures").rows)


def test_panels_show_what_they_say(digits_cnn, registry):
    data = load_dataset("digits_test", registry).select(3)
    result = run_once(FoolingImage(target=3, eps=30), digits_cnn, data)
    sheet = table(result, "fooled")
    for i in range(3):
        original, made, difference, amplified = sheet.data[4 * i : 4 * i + 4]
        np.testing.assert_allclose(difference, np.clip(0.5 + (made - original), 0, 1), atol=1e-6)
        np.testing.assert_allclose(amplified, np.clip(0.5 + 10 * (made - original), 0, 1), atol=1e-5)
        assert "difference x 10" in sheet.captions[4 * i + 3]


def test_a_target_that_is_the_answer_is_not_counted(digits_cnn, registry):
    data = load_dataset("digits_test", registry).select(indices=[3])
    own = int(digits_cnn(torch.from_numpy(data.pictures(digits_cnn.input)).permute(0, 3, 1, 2).float() / 255).argmax())
    result = run_once(FoolingImage(target=own), digits_cnn, data)
    assert result.metrics == [] and "without any change" in result.notes[0]
    with pytest.raises(ConfigError, match="whole range of a pixel"):
        run_once(FoolingImage(eps=256), digits_cnn, data)
    nothing = run_once(FoolingImage(target=(own + 1) % 10, eps=0), digits_cnn, data)
    assert {m.name: m.value for m in nothing.metrics}["fooled"] == 0.0
    ctx = Context(digits_cnn, images=torch.zeros(1, 1, 8, 8), ids=["a"], technique="fooling_image")
    assert FoolingImage()._targets(ctx, torch.tensor([[3.0, 1.0, 2.0]])).tolist() == [1]
