"""The optimisation loop and class_visualization against closed forms, scipy and recorded order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

from harness import ConfigError
from harness import optimise as o
from harness.context import Context, Draws
from harness.models import LoadedModel
from harness.registry import InputSpec, load_registry
from harness.testing import load_dataset, run_once
from harness_synthesis import ClassVisualization
from harness_synthesis.class_visualization import PRESETS, high_frequency_share, spread


def linear(size=4, classes=3, scale=0.1):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(size * size, classes)).double()
    module[1].weight.data.mul_(scale)
    return LoadedModel(module, InputSpec(channels=1, size=size, mean=(0.5,), std=(1.0,)), "linear")


def draws(count=1, seed=0):
    return Draws([str(i) for i in range(count)], torch.device("cpu"), torch.float64, seed)


def grey(count=1, size=4):
    return torch.full((count, 1, size, size), 0.5, dtype=torch.float64)


def test_l2_ascent_of_a_linear_model_converges_to_w_over_two_lambda():
    model, lam = linear(), 2.0
    classes = torch.tensor([0, 2])
    objective = o.class_score(classes) - lam * o.squared_norm(0.5)
    made = o.ascend(model, objective, grey(2), steps=200, step_size=0.1, draws=draws(2), rule="constant")
    expected = model.module[1].weight[classes].view(2, 1, 4, 4) / (2 * lam)
    torch.testing.assert_close(made.images - 0.5, expected, rtol=0, atol=1e-9)


def test_the_technique_itself_reaches_the_closed_form():
    model = linear()
    technique = ClassVisualization(
        classes=(1,),
        preset="simonyan",
        step="constant",
        step_size=0.1 * 255,
        l2=2.0,
        steps=200,
        noise=0.0,
        decay=0.0,
        jitter=0,
        blur_every=0,
    )
    pictures = technique.run(Context(model, technique="class_visualization")).artifacts[0].data
    expected = 0.5 + model.module[1].weight[1].view(4, 4) / 4
    torch.testing.assert_close(torch.tensor(pictures[0, 0]).double(), expected, rtol=0, atol=1e-6)


def test_line_search_never_lowers_the_objective(digits_cnn):
    classes = torch.arange(4)
    start = torch.rand((4, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    objective = o.class_score(classes) - 0.5 * o.squared_norm(0.3)
    made = o.ascend(digits_cnn, objective, start, steps=60, step_size=5.0, draws=draws(4), rule="line_search", operators=[])
    assert (made.scores.diff(dim=0) >= 0).all()
    assert (made.scores[-1] > made.scores[0]).all()
    with torch.no_grad():
        assert (o.evaluate(digits_cnn, objective, made.images, made.images) >= made.scores[-1]).all()


def test_a_normalised_step_moves_pixels_by_its_size():
    made = o.ascend(linear(), o.class_score(torch.tensor([0])), grey(), steps=1, step_size=0.01, draws=draws())
    assert (made.images - 0.5).square().mean().sqrt().item() == pytest.approx(0.01, rel=1e-9)


@pytest.mark.parametrize("sigma", [0.4, 0.5, 1.0, 2.3])
def test_blur_equals_scipy(sigma):
    x = torch.rand((2, 3, 17, 12), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4.0)
    np.testing.assert_allclose(o.gaussian_blur(x, sigma).numpy(), expected, atol=1e-6)


def test_blur_keeps_its_schedule():
    x = torch.rand((1, 1, 9, 9), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    blur = o.Blur(2.0, every=4, end=0.5, steps=9)
    assert torch.equal(blur(x, x, 0), x)
    torch.testing.assert_close(blur(x, x, 3), o.gaussian_blur(x, 2.0 - 1.5 * 3 / 8))
    torch.testing.assert_close(blur(x, x, 7), o.gaussian_blur(x, 2.0 - 1.5 * 7 / 8))
    assert torch.equal(o.Blur(1.0, every=0)(x, x, 3), x)


@pytest.mark.parametrize("percentile", [0.0, 20.0, 50.0, 90.0])
def test_small_pixels_return_to_the_centre_as_numpy_says(percentile):
    rng = torch.Generator().manual_seed(0)
    x, g = (torch.rand((2, 3, 7, 9), generator=rng, dtype=torch.float64) for _ in range(2))
    centre = torch.full((1, 3, 1, 1), 0.4, dtype=torch.float64)
    for operator, value in (
        (o.ClipSmallNorm(percentile, centre), np.sqrt(((x - centre) ** 2).sum(1).numpy())),
        (o.ClipSmallContribution(percentile, centre), np.abs(((x - centre) * (g - 0.5)).sum(1).numpy())),
    ):
        found = operator(x, g - 0.5, 0)
        for i in range(2):
            keep = value[i] >= np.percentile(value[i], percentile)
            expected = np.where(keep, x[i].numpy(), 0.4)
            np.testing.assert_allclose(found[i].numpy(), expected, atol=1e-6)
    if percentile == 0:
        assert torch.equal(o.ClipSmallNorm(0, centre)(x, g, 0), x)


def test_decay_comes_after_the_step_and_pulls_to_the_centre():
    centre = torch.tensor(0.5, dtype=torch.float64)
    model = linear()
    made = o.ascend(
        model,
        o.class_score(torch.tensor([1])),
        grey(),
        steps=1,
        step_size=0.1,
        draws=draws(),
        rule="constant",
        operators=[o.Decay(0.25, centre)],
    )
    weight = model.module[1].weight[1].view(1, 1, 4, 4)
    torch.testing.assert_close(made.images, 0.5 + 0.75 * 0.1 * weight)


def test_operators_act_in_yosinskis_order(monkeypatch, digits_cnn):
    """Gradient, decay, blur, small norm, small contribution, then the pixel range."""
    trace = []

    def spy(cls):
        original = cls.__call__
        monkeypatch.setattr(cls, "__call__", lambda self, x, g, t: trace.append(cls.__name__) or original(self, x, g, t))

    for cls in (o.Decay, o.Blur, o.ClipSmallNorm, o.ClipSmallContribution, o.Clamp):
        spy(cls)
    ClassVisualization(classes=(1,), steps=1).run(Context(digits_cnn, technique="class_visualization"))
    assert trace == ["Decay", "Blur", "ClipSmallNorm", "ClipSmallContribution", "Clamp"]


def test_the_gradient_comes_back_from_under_the_jitter():
    """For a linear model rolled by s, the gradient is the weight rolled by -s."""
    model = linear(size=8)
    found = o.ascend(
        model,
        o.class_score(torch.tensor([0])),
        grey(size=8),
        steps=1,
        step_size=1.0,
        draws=draws(),
        rule="constant",
        transforms=[o.Jitter(3)],
    )
    dy, dx = draws().integers(-3, 4, 2)[0]
    weight = model.module[1].weight[0].view(8, 8)
    torch.testing.assert_close(found.images[0, 0] - 0.5, torch.roll(weight, (-dy, -dx), (0, 1)))
    assert (dy, dx) != (0, 0)


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_steps_follow_given_colours(share):
    random = torch.Generator().manual_seed(0)
    g = torch.randn((2, 4, 5, 7), generator=random)
    covariance = torch.cov(torch.randn((4, 30), generator=random))
    mixing = share * covariance / covariance.diagonal().mean() + (1 - share) * torch.eye(4)
    colours = o.Colours(3 * covariance, share)
    torch.testing.assert_close(colours(g), torch.einsum("dc,nchw->ndhw", mixing, g))
    torch.testing.assert_close(torch.from_numpy(colours.colour_matrix(4)), mixing)
    assert torch.equal(o.Colours(torch.zeros(4, 4), share)(g), g)


def test_natural_colours_mix_channels_by_a_covariance():
    g = torch.rand((2, 3, 5, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = torch.tensor(o.NATURAL_COLOURS, dtype=torch.float64)
    torch.testing.assert_close(o.NaturalColours(1.0)(g), torch.einsum("dc,nchw->ndhw", sigma, g))
    odd = g[:1, :, :, 1:]  # pixels that make no whole rows of several
    for laid in (odd, odd.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(o.NaturalColours(1.0)(laid), o.NaturalColours(1.0)(g)[:1, :, :, 1:])
    lost = g[:, :, :, 1:].clone()
    lost[1] = torch.nan
    torch.testing.assert_close(
        o.NaturalColours(1.0)(lost)[:1], o.NaturalColours(1.0)(g)[:1, :, :, 1:]
    )  # of one that is lost no other knows
    torch.testing.assert_close(o.NaturalColours(0.25)(g), 0.75 * g + 0.25 * o.NaturalColours(1.0)(g))
    assert torch.equal(o.NaturalColours(0)(g), g)
    assert torch.equal(o.NaturalColours(1)(g[:, :1]), g[:, :1])
    values = torch.linalg.eigvalsh(sigma)  # a step still goes uphill: symmetric, positive definite
    assert values.min() > 0
    assert torch.equal(sigma, sigma.T)


def test_low_frequencies_scale_a_wave_by_its_frequency():
    n = 32
    for cycles in (1, 4, 10):
        wave = torch.sin(2 * torch.pi * cycles * torch.arange(n, dtype=torch.float64) / n).expand(1, 3, n, n)
        torch.testing.assert_close(o.LowFrequencies(0.5)(wave), wave * (cycles / n) ** -0.5)
    flat = torch.full((1, 3, n, n), 0.3, dtype=torch.float64)
    torch.testing.assert_close(o.LowFrequencies(1.0)(flat), flat * n)
    assert torch.equal(o.LowFrequencies(0)(flat), flat)


def test_conditioned_steps_still_go_uphill(squeezenet):
    objective, start = o.class_score(torch.tensor([130])), torch.full((1, 3, 224, 224), 0.5)
    conditioners = [o.NaturalColours(0.8), o.LowFrequencies(0.5)]
    rng = Draws(["a"], start.device, start.dtype, 0)
    made = o.ascend(squeezenet, objective, start, steps=12, step_size=0.01, draws=rng, conditioners=conditioners)
    assert made.scores[-1] > made.scores[0] + 10


def test_objectives_add_and_scale():
    model, x = linear(), torch.rand((2, 1, 4, 4), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a, b = o.class_score(torch.tensor([0, 1])), o.class_score(torch.tensor([2, 2]))
    logits = model(x)
    both = o.evaluate(model, 2 * a - b * 0.5 + -a, x, x)
    torch.testing.assert_close(both, logits[[0, 1], [0, 1]] - 0.5 * logits[:, 2])


def test_one_pass_serves_a_layer_and_the_logits(digits_cnn):
    calls: list[int] = []
    _ = digits_cnn.call_counts  # the layers are counted by a pass of their own, once a model
    handle = digits_cnn.modules["features.0"].register_forward_hook(lambda *_: calls.append(1))
    layer = o.Objective(frozenset({"features.0"}), lambda outputs, _: outputs["features.0"].mean((1, 2, 3)))
    x = torch.rand((2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    found = o.evaluate(digits_cnn, layer + o.class_score(torch.tensor([1, 2])), x, x)
    handle.remove()
    assert len(calls) == 1
    expected = digits_cnn.activations(x, ["features.0"])["features.0"].mean((1, 2, 3)) + digits_cnn(x)[[0, 1], [1, 2]]
    torch.testing.assert_close(found, expected)


class Cliff(nn.Module):
    """Two scores; the second is -log(9 - sum), which is not a number above 9."""

    def forward(self, x):
        total = x.flatten(1).sum(1, keepdim=True)
        return torch.cat([total, -torch.log(9 - total)], 1)


@pytest.mark.parametrize("rule", ["normalised", "constant", "scaled", "progress", "line_search"])
def test_a_score_that_is_not_finite_keeps_the_last_good_picture(rule):
    model = LoadedModel(Cliff().double(), InputSpec(channels=1, size=4, mean=(0.0,), std=(1.0,)))
    made = o.ascend(model, o.class_score(torch.tensor([0, 1])), grey(2), steps=20, step_size=0.05, gain=3.0, draws=draws(2), rule=rule)
    last = model(made.images)[[0, 1], [0, 1]]
    assert torch.isfinite(last).all()
    assert torch.isfinite(made.scores).all()
    assert made.images[0].sum() > 9  # the other goes on
    if rule == "line_search":  # which takes bad steps back instead of giving up
        assert made.stopped == []
        assert last[1] > made.scores[0, 1]
    else:
        assert made.stopped == [1]
        assert last[1] == made.scores[-1, 1]
        assert last[1] == made.scores[:, 1].max()


@pytest.mark.parametrize("rule", ["normalised", "line_search"])
def test_a_start_whose_score_is_not_finite_is_kept_and_said(rule):
    model = LoadedModel(Cliff().double(), InputSpec(channels=1, size=4, mean=(0.0,), std=(1.0,)))
    start = torch.ones_like(grey(2))
    made = o.ascend(model, o.class_score(torch.tensor([0, 1])), start, steps=3, step_size=0.01, draws=draws(2), rule=rule)
    assert made.stopped == [1]
    assert torch.equal(made.images[1], start[1])


def test_a_run_that_leaves_the_finite_numbers_says_so_and_can_be_stored(tmp_path):
    model = LoadedModel(Cliff(), InputSpec(channels=1, size=4, mean=(0.0,), std=(1.0,)))
    technique = ClassVisualization(classes=(0, 1), steps=40, blur=0.0, decay=0.0, noise=0.0, jitter=0)
    result = technique.run(Context(model, technique="class_visualization"))
    assert result.notes == ["1: the score stopped being finite; the last good picture is shown; use a smaller step_size"]
    for artifact in result.artifacts:
        artifact.save(tmp_path / f"{artifact.name}.npz")


@pytest.mark.parametrize("rule", ["scaled", "progress"])
def test_a_step_gains_what_was_asked_for(rule):
    """On a linear model the first order is all there is: every step raises the score by the gain."""
    model = linear()
    made = o.ascend(model, o.class_score(torch.tensor([2])), grey(), steps=5, step_size=1e9, gain=0.25, draws=draws(), rule=rule)
    torch.testing.assert_close(made.scores.diff(dim=0), torch.full((4, 1), 0.25, dtype=torch.float64))


def test_progress_is_bounded_by_the_largest_rate():
    model = linear()
    arguments = {"steps": 3, "step_size": 0.01, "draws": draws()}
    bounded = o.ascend(model, o.class_score(torch.tensor([2])), grey(), gain=1e9, rule="progress", **arguments)
    constant = o.ascend(model, o.class_score(torch.tensor([2])), grey(), rule="constant", **arguments)
    torch.testing.assert_close(bounded.images, constant.images)


def test_classes_in_several_batches_get_what_they_get_in_one(digits_cnn):
    technique = ClassVisualization(classes=(3, 5, 8), steps=6)
    one, several = (technique.run(Context(digits_cnn, technique="class_visualization", max_batch=b)) for b in (32, 2))
    assert [a.name for a in one.artifacts] == [a.name for a in several.artifacts]
    np.testing.assert_allclose(one.artifacts[0].data, several.artifacts[0].data, atol=1e-5)
    first, second = ({a.name: a for a in result.artifacts} for result in (one, several))
    np.testing.assert_allclose(first["progress"].data, second["progress"].data, atol=1e-5)
    for label, line in first["objective"].lines.items():
        np.testing.assert_allclose(second["objective"].lines[label], line, rtol=1e-4)


def test_zero_steps_give_the_start():
    result = ClassVisualization(classes=(1, 2), steps=0, noise=0.0).run(Context(linear(), technique="class_visualization"))
    assert np.allclose(result.artifacts[0].data, 0.5)
    assert [a.name for a in result.artifacts] == ["pictures", "stretched", "classes", "state"]


def test_faint_pictures_are_shown_stretched():
    model = linear()
    arguments = {"classes": (1,), "step": "constant", "noise": 0.0, "jitter": 0, "blur": 0.0, "decay": 0.0, "low_frequencies": 0.0}
    faint = ClassVisualization(steps=1, step_size=0.01, **arguments).run(Context(linear(), technique="class_visualization"))
    pictures, stretched = faint.artifacts[:2]
    assert stretched.name == "stretched"
    assert np.corrcoef(pictures.data.ravel(), stretched.data.ravel())[0, 1] > 0.99
    assert stretched.data.std() > 10 * pictures.data.std()
    strong = ClassVisualization(steps=40, step_size=500.0, **arguments).run(Context(model, technique="class_visualization"))
    assert "stretched" not in [a.name for a in strong.artifacts]


def test_a_class_alone_gets_what_it_gets_in_company(digits_cnn):
    def pictures(*classes):
        return ClassVisualization(classes=classes, steps=12).run(Context(digits_cnn, technique="class_visualization")).artifacts[0].data

    np.testing.assert_allclose(pictures(3, 5, 8)[1], pictures(5)[0], atol=1e-5)


def test_presets_fill_what_is_not_given():
    assert ClassVisualization(preset="yosinski_3").decay == PRESETS["yosinski_3"]["decay"]
    assert ClassVisualization(preset="yosinski_3", decay=0.5).decay == 0.5
    for name in PRESETS:
        ClassVisualization.build({"preset": name})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"classes": ["flamigo"]}, "no class 'flamigo' in model 'digits_cnn'; give an index from 0 to 9"),
        ({"classes": [10]}, "classes 0 to 9"),
        ({"classes": [-1]}, "classes 0 to 9"),
    ],
)
def test_classes_that_do_not_exist(params, message, digits_cnn):
    with pytest.raises(ConfigError, match=message):
        ClassVisualization(**params).run(Context(digits_cnn, technique="class_visualization"))


def test_line_search_and_jitter_exclude_each_other():
    with pytest.raises(ConfigError, match="set jitter to 0"):
        ClassVisualization.build({"step": "line_search"})


def test_spread_is_even_and_inside():
    assert spread(4, 1000) == [125, 375, 625, 875]
    assert spread(20, 3) == [0, 1, 2]


def test_high_frequency_share_closed_forms():
    n = 32
    wave = lambda f: torch.sin(2 * torch.pi * f * torch.arange(n) / n).expand(1, 1, n, n)  # noqa: E731
    assert high_frequency_share(wave(4)).item() == pytest.approx(0, abs=1e-5)
    assert high_frequency_share(wave(12)).item() == pytest.approx(1, abs=1e-5)
    assert high_frequency_share(wave(4) + wave(12)).item() == pytest.approx(0.5, abs=1e-4)
    assert high_frequency_share(torch.full((1, 1, 8, 8), 0.3)).item() == 0


def test_loop_runs_without_values(digits_cnn):
    """On the meta device nothing can be read back: a hidden wait for the device would fail here."""
    import copy

    model = LoadedModel(copy.deepcopy(digits_cnn.module), digits_cnn.input, device="meta")
    # ascend() ends with one read of what stopped; everything before runs without values
    with pytest.raises((NotImplementedError, RuntimeError), match="meta|Tensor.item|nonzero"):
        o.ascend(
            model, o.class_score(torch.zeros(2, dtype=torch.int64, device="meta")), torch.empty((2, 1, 8, 8), device="meta"), steps=3, step_size=0.1,
            draws=Draws(["a", "b"], torch.device("meta"), torch.float32, 0), transforms=[o.Jitter(1)],
            operators=[o.Decay(0.1, torch.tensor(0.5, device="meta")), o.Blur(1.0, 1), o.Clamp()],
            conditioners=[o.NaturalColours(0.5), o.LowFrequencies(0.5)],
            progress=lambda what, done, total: seen.append(done),
        )  # fmt: skip
    assert seen == [1, 2, 3]


seen: list[int] = []


# -- other parametrisations, going on, side by side ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preset": "fourier"},
        {"preset": "prior"},
        {"preset": "yosinski_3", "steps": 20},
        {"step": "lbfgs", "jitter": 0, "blur_every": 0},
    ],
)
def test_going_on_is_as_if_it_had_not_stopped(settings, digits_cnn):
    data = load_dataset("digits", load_registry()).select(1)
    settings = {"classes": (3, 5), **settings, "steps": 20}
    whole = run_once(ClassVisualization(**settings), digits_cnn, data)
    rest = run_once(ClassVisualization(go_on=8, **settings), digits_cnn, data)
    np.testing.assert_array_equal(rest.artifacts[0].data, whole.artifacts[0].data)
    assert len(next(a for a in rest.artifacts if a.name == "objective").x) == 12


@pytest.mark.parametrize("preset", ["fourier", "prior"])
def test_other_parametrisations_reach_their_class(preset, digits_cnn):
    technique = ClassVisualization(preset=preset, count=10, steps=64)
    metrics = {m.name: m.value for m in technique.run(Context(digits_cnn, technique="class_visualization")).metrics}
    assert metrics["first_share"] == 1.0
    assert metrics["lowest_probability"] > 0.9
    assert ClassVisualization(parametrisation=preset) == ClassVisualization(preset=preset).model_copy(update={"preset": "default"})


def test_an_early_end_when_converged(digits_cnn):
    settings = {"classes": (3,), "steps": 2000, "jitter": 0}
    result = ClassVisualization(converged=0.01, **settings).run(Context(digits_cnn, technique="class_visualization"))
    curve = next(a for a in result.artifacts if a.name == "objective")
    assert 40 <= len(curve.x) < 500
    assert result.metrics[0].value > 0.99


def test_presets_side_by_side(digits_cnn):
    data = load_dataset("digits", load_registry()).select(1)
    result = run_once(ClassVisualization(preset="compare", classes=(3, 5), steps=30), digits_cnn, data)
    sheet, table = result.artifacts
    names = ["default", "simonyan", "yosinski_1", "yosinski_2", "yosinski_3", "yosinski_4"]
    assert sheet.columns == 6 and len(sheet.data) == 12
    assert [row[1] for row in table.rows] == names * 2
    own = run_once(ClassVisualization(preset="simonyan", classes=(3, 5), steps=30), digits_cnn, data)
    found = next(a for a in own.artifacts if a.name == "classes").rows
    assert table.rows[1][2:] == found[0][2:] and table.rows[7][2:] == found[1][2:]
    assert {m.name for m in result.metrics} == {f"{k}.{n}" for n in names for k in ("probability", "high_frequency")}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"parametrisation": "fourier", "decay": 0.1}, "decay acts on pixels"),
        ({"step": "lbfgs", "rotate": 5.0, "jitter": 0}, "rotate would blur"),
        ({"go_on": 300}, "go_on 300 must be fewer than steps"),
    ],
)
def test_settings_that_exclude_each_other(params, message):
    with pytest.raises(ConfigError, match=message):
        ClassVisualization.build(params)
