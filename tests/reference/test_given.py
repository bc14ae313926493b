"""What people give techniques besides the usual: networks of one score, of one size, of tokens; odd layers; what runs out and what is silent."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness import ConfigError, NotApplicable
from harness import optimise as o
from harness.layers import receptive_fields
from harness.models import LoadedModel, load_model
from harness.optimise.conditioners import MOST, quantile
from harness.registry import InputSpec
from harness.targets import resolve
from harness.testing import load_dataset, run_once
from harness_adversarial import (
    AdversarialTraining,
    AttackCurve,
    CertifiedRadius,
    DecisionSlice,
    FoolingImage,
    MinimalPerturbation,
    TransferMatrix,
)
from harness_adversarial.confidence import precision
from harness_representations import MaxPatches, Predictions
from harness_saliency import Faithfulness, Occlusion, SanityChecks
from harness_synthesis import ChannelVisualization, FeatureInversion, Multifaceted
from harness_synthesis.blocks import refuses

SPEC = InputSpec(channels=1, size=8, mean=(0.3,), std=(0.4,))


def wrapped(module, **more):
    torch.manual_seed(0)
    return LoadedModel(module.eval(), more.pop("spec", SPEC), name="own", **more)


def table(result, name):
    return next(a for a in result.artifacts if a.name == name)


def value(result, name):
    return next(m for m in result.metrics if m.name == name).value


@pytest.fixture(scope="module")
def digits(registry):
    return load_dataset("digits_test", registry).select(limit=12)


# -- networks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "technique",
    [AttackCurve(), FoolingImage(), TransferMatrix(models=("digits_cnn",)), MinimalPerturbation(), DecisionSlice(), Predictions()],
)
def test_one_score_is_not_taken_for_a_robust_answer(technique, digits):
    one = wrapped(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)))
    with pytest.raises(NotApplicable, match="at least two classes"):
        run_once(technique, one, replace(digits, labels=None, classes=()))


def test_the_probability_of_one_score_is_its_sigmoid(digits):
    one = wrapped(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)))
    target = resolve(0, one, 2, lambda: torch.zeros(2, dtype=torch.int64), None)
    logits = torch.tensor([[0.0], [2.0]])
    assert target.probability(logits).tolist() == pytest.approx([0.5, 1 / (1 + np.exp(-2))])


def test_networks_without_class_scores_are_refused(digits):
    maps = wrapped(nn.Sequential(nn.Conv2d(1, 4, 3)))
    bare = replace(digits, labels=None, classes=())
    for target in ("predicted", 0):
        with pytest.raises(NotApplicable, match=r"does not give class scores .*: give a `target` such as layer:NAME"):
            run_once(Occlusion(window=4, stride=4, target=target), maps, bare)
    run_once(Occlusion(window=4, stride=4, target="channel:0:2"), maps, bare)


class Tokens(nn.Module):
    """Gives (N, 16, 5) tokens and (N, 4, 4, 6) maps with channels last on its way."""

    def __init__(self):
        super().__init__()
        self.cut = nn.Conv2d(1, 5, 2, 2)
        self.tokens = nn.Linear(5, 5)
        self.last = nn.Linear(5, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.tokens(self.cut(x).flatten(2).transpose(1, 2))
        return self.head(self.last(x.unflatten(1, (4, 4))).mean((1, 2)))


def test_channels_are_channels_where_they_come_last(digits):
    model = wrapped(Tokens())
    x = torch.rand((2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    outputs = model.activations(x, ["tokens", "last"])

    def zeros():
        return torch.zeros(2, dtype=torch.int64)

    for spec, wanted in {
        "channel:last:5": outputs["last"][..., 5].mean((1, 2)),
        "channel:tokens:4": outputs["tokens"][..., 4].mean(1),
        "neuron:last:5,0,3": outputs["last"][:, 0, 3, 5],
        "neuron:tokens:4,15": outputs["tokens"][:, 15, 4],
    }.items():
        target = resolve(spec, model, 2, zeros, None)
        assert torch.allclose(target.score(target.output(model, x)), wanted), spec
    several = resolve(["channel:last:5", "channel:last:0"], model, 2, zeros, None)
    mean = outputs["last"].mean((1, 2))
    assert torch.allclose(several.score(several.output(model, x)), torch.stack([mean[0, 5], mean[1, 0]]))
    with pytest.raises(ConfigError, match=r"shape 6 x 4 x 4, counted from 0"):
        resolve("channel:last:6", model, 2, zeros, None)


class Pooled(nn.Module):
    """Functions in place of modules, as networks written by hand have them, and a loss where it is given what to aim at."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.head = nn.Linear(8 * 4, 10)

    def forward(self, x, aims=None):
        x = F.max_pool2d(F.relu(self.one(x)), 2)
        x = self.head(F.max_pool2d(F.relu(self.two(x)), 2).flatten(1))
        return x if aims is None else (x, F.cross_entropy(x, aims))


def test_occlusion_does_not_need_what_tracing_takes_otherwise(digits, monkeypatch):
    monkeypatch.setattr("harness_saliency.occlusion.SMALL", 0)
    model = wrapped(Pooled())
    data = replace(digits.select(limit=2), labels=None, classes=())
    found = table(run_once(Occlusion(window=2, stride=2), model, data), "occlusion").data
    assert found.shape == (2, 8, 8)
    assert np.abs(found).max() > 0


def test_interval_bounds_go_through_functions_and_are_asked_first(digits, monkeypatch):
    class Functions(Pooled):
        def forward(self, x):
            return super().forward(x)

    from harness_adversarial import certified_radius

    order = []
    for name in ("certified_linf", "counts"):
        real = getattr(certified_radius, name)
        monkeypatch.setattr(certified_radius, name, lambda *a, real=real, name=name: order.append(name) or real(*a))
    result = run_once(CertifiedRadius(first=4, samples=8, intervals=(0.1,)), wrapped(Functions()), digits)
    assert order[0] == "certified_linf" and "counts" in order
    assert not any("intervals:" in note for note in result.notes)
    assert 0 <= value(result, "certified_linf") <= 1


def test_adaptive_pooling_that_changes_nothing_sees_no_more(registry):
    """AlexNet's pools 6 x 6 to 6 x 6 at 224: its field is that of what comes before, 195 pixels."""
    alexnet = load_model("alexnet@random", registry)
    fields = receptive_fields(alexnet.module, dict(alexnet.calls))
    assert fields["avgpool"] == fields["features.12"]
    assert fields["avgpool"].size == 195
    squeezenet = load_model("squeezenet1_1", registry)
    assert receptive_fields(squeezenet.module, dict(squeezenet.calls))["classifier.3"].whole
    halves = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32, 2))
    model = wrapped(halves)
    assert receptive_fields(model.module, dict(model.calls))["1"].size == 4  # two pixels with a border of one
    photos = load_dataset("photos", registry).select(limit=2)
    shown = " ".join(a.caption for a in run_once(MaxPatches(k=1, count=1), alexnet, photos).artifacts)
    assert "195 x 195 pixels" in shown


# -- layers ----------------------------------------------------------------------------------------------------------------


def test_layers_called_several_times_give_rows_of_any_length(registry):
    resnet = load_model("resnet18@random", registry)
    technique = ChannelVisualization(layers=("layer1.0.relu", "layer2.0.relu"), count=70, steps=0, size=32)
    result = run_once(technique, resnet, load_dataset("photos", registry).select(limit=1))
    assert [a.name for a in result.artifacts if a.name.startswith("pictures")] == [
        "pictures-layer1.0.relu-2", "pictures-layer2.0.relu-2",
    ]  # fmt: skip


def test_a_silent_layer_is_told_before_another_is_inverted(digits_cnn, digits, monkeypatch):
    dead = wrapped(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10)))
    nn.init.constant_(dead.module[2].bias, -100.0)
    monkeypatch.setattr(o, "ascend", lambda *_, **__: pytest.fail("inverted"))
    with pytest.raises(ConfigError, match=r"layer '3' gives nothing but zeros"):
        run_once(FeatureInversion(layers=("1", "3")), dead, digits)


# -- settings and what they lead to ----------------------------------------------------------------------------------------


def test_searches_begin_after_the_target_is_known(digits_cnn, digits, monkeypatch):
    monkeypatch.setattr("harness_adversarial.minimal_perturbation.deepfool", lambda *_, **__: pytest.fail("searched"))
    with pytest.raises(ConfigError, match="no class 'thre'"):
        run_once(MinimalPerturbation(target="thre"), digits_cnn, digits)
    with pytest.raises(ConfigError, match="is already"):
        run_once(MinimalPerturbation(target=int(digits.labels[0])), digits_cnn, digits)
    with pytest.raises(ConfigError, match="only the search lbfgs aims at a class"):
        run_once(MinimalPerturbation(target=3, methods=("deepfool",)), digits_cnn, digits)


def test_a_network_that_diverges_costs_no_other(digits_cnn, registry, monkeypatch):
    from harness import train as trainer

    real = trainer.fit

    def fit(module, recipe, *rest, **more):
        found = real(module, recipe, *rest, **more)
        return [float("nan")] * len(found) if recipe.noise else found

    monkeypatch.setattr(trainer, "fit", fit)
    data = load_dataset("digits", registry).select(limit=60)
    result = run_once(AdversarialTraining(noises=("none", "gaussian"), budgets=(), epochs=2), digits_cnn, data)
    assert list(table(result, "loss").lines) == ["none"]
    assert any(note.startswith("Gaussian, 32/255: the loss stopped being finite") for note in result.notes)
    with pytest.raises(ConfigError, match="budgets lie above 0"):
        AdversarialTraining.build({"budgets": [0, 8]})


def test_a_second_model_is_looked_at_first(digits_cnn, digits, monkeypatch):
    monkeypatch.setattr(AttackCurve, "_curve", lambda *_: pytest.fail("attacked"))
    with pytest.raises(ConfigError, match=r"attack_curve.surrogate: 'snow_cnn' has other classes"):
        run_once(AttackCurve(surrogate="snow_cnn"), digits_cnn, digits)
    with pytest.raises(ConfigError, match=r"eps_l2: -1 is below zero"):
        run_once(AttackCurve(eps_l2=(-1.0,)), digits_cnn, digits)


def test_changes_of_another_size_keep_their_signs():
    from harness_adversarial.shared import fitted, resampled

    down = torch.full((1, 1, 8, 8), -0.1)
    assert torch.allclose(resampled(down, 16), torch.full((1, 1, 16, 16), -0.1))
    assert float(fitted(down, 16).max()) == 0  # pictures have none below zero


def test_pictures_of_a_second_model_of_another_size_are_tried(digits_cnn, registry, monkeypatch):
    """What a surrogate of 32 pixels makes fools as what one of 8 pixels does: the same network behind a reduction."""
    large = wrapped(nn.Sequential(nn.AvgPool2d(4), digits_cnn.module), spec=digits_cnn.input.model_copy(update={"size": 32}))
    large.classes = digits_cnn.classes
    tried = []
    from harness.context import Context
    from harness_adversarial import attack_curve

    real = attack_curve.project
    monkeypatch.setattr(
        attack_curve, "project", lambda x, origin, eps, norm: tried.append((x - origin).clone()) or real(x, origin, eps, norm)
    )
    monkeypatch.setattr(Context, "further_model", lambda *_: large)
    data = load_dataset("digits_test", registry).select(limit=12)
    run_once(AttackCurve(attacks=("pgd",), eps=(4.0, 8.0), surrogate="digits_resnet", steps=3), digits_cnn, data)
    change = tried[-1]  # the last is the surrogate's
    assert change.shape[-1] == 8 and float(change.min()) < -0.5 * 4 / 255 and float(change.max()) > 0.5 * 4 / 255


def test_a_surrogate_that_is_not_used_is_told(digits_cnn, digits):
    result = run_once(AttackCurve(attacks=("fgsm",), eps=(8.0,), surrogate="digits_resnet"), digits_cnn, digits)
    assert any("pictures of digits_resnet were not tried" in note for note in result.notes)


def test_the_share_of_a_plane_is_that_of_the_table(digits_cnn, digits):
    few = digits.select(limit=3)
    result = run_once(DecisionSlice(axes=("random", "gradient"), reach=20.0, side=31), digits_cnn, few)
    own = [row[3] for name in few.ids for row in [next(r for r in table(result, "classes").rows if r[0] == name)]]
    found = next(m for m in result.metrics if m.name == "own_share")
    assert found.per_image == pytest.approx(own)


def test_classes_and_sizes_are_looked_at_before_the_dataset(digits_cnn, digits, monkeypatch):
    monkeypatch.setattr(Multifaceted, "_features", lambda *_: pytest.fail("looked at the dataset"))
    few = digits.select(limit=3)
    lacking = next(c for c in range(10) if c not in set(few.labels.tolist()))
    with pytest.raises(ConfigError, match="no picture of the dataset is labelled"):
        run_once(Multifaceted(classes=(lacking,)), digits_cnn, few)


def test_judges_say_why_no_map_has_a_result(digits_cnn, digits):
    for technique in (Faithfulness(target="thre"), SanityChecks(target="thre")):
        with pytest.raises(ConfigError, match="no class 'thre'"):
            run_once(technique, digits_cnn, digits)
    blind = wrapped(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    with pytest.raises(NotApplicable, match=r"none has a result; grad_cam: .*"):
        run_once(Faithfulness(techniques=("grad_cam",)), blind, digits)


# -- numbers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(40, 6), (12, 30), (500, 8)])
def test_the_inverse_covariance_is_that_of_ledoit_and_wolf(n, d):
    from sklearn.covariance import LedoitWolf

    x = np.random.default_rng(0).normal(size=(n, d)) * np.linspace(0.1, 3, d)
    x -= x.mean(0)
    plain, axes, less = precision(x)
    found = plain * np.eye(d) - (axes * less) @ axes.T
    assert np.allclose(found, LedoitWolf(assume_centered=True).fit(x).precision_, rtol=1e-8, atol=1e-8 * np.abs(found).max())


def test_quantiles_of_very_many_values():
    few = torch.rand((2, 3, 50), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(quantile(few, 0.3), torch.quantile(few.flatten(1), 0.3, dim=1))
    many = torch.linspace(0, 1, 2 * MOST + 10)[None]
    assert float(quantile(many, 0.995)) == pytest.approx(0.995, abs=1e-4)


def test_occlusion_counts_in_single_precision():
    from harness_saliency.occlusion import spread

    boxes = [(0, 4, 0, 4)] * 600
    values = torch.full((1, 600), 0.5, dtype=torch.bfloat16)
    assert torch.equal(spread(values, boxes, (4, 4), "mean"), torch.full((1, 4, 4), 0.5))


def test_memory_that_runs_out_is_no_refusal(digits_cnn, monkeypatch):
    def out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LoadedModel, "__call__", out)
    with pytest.raises(torch.OutOfMemoryError):
        refuses(digits_cnn, 16)


def test_a_linear_head_before_the_pooling_takes_channels_last():
    model = wrapped(Tokens())
    x = torch.rand((2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    assert model.embedding(x).shape == (2, 6)

    class Late(Tokens):
        def forward(self, x):
            x = self.last(self.tokens(self.cut(x).flatten(2).transpose(1, 2)).unflatten(1, (4, 4)))
            return self.head(x).mean((1, 2))

    late = wrapped(Late())
    assert torch.allclose(late.embedding(x), late.activations(x, ["last"])["last"].mean((1, 2)))


def test_settings_that_cannot_be_are_told_before_what_they_build_on():
    from harness_representations import NearestNeighbors, TsneMap

    with pytest.raises(ConfigError, match="perplexity must be above zero"):
        TsneMap.build({"perplexity": [30, -5]})
    for technique, engine in ((TsneMap, "openTSNE"), (NearestNeighbors, "faiss")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("importlib.util.find_spec", lambda _: None)
            with pytest.raises(ConfigError, match=f"engine={engine} is not installed; install the extra"):
                technique.build({"engine": engine})
