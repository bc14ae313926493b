"""faithfulness, sanity_checks and saliency_comparison: closed forms, ends of their scales, and what they must find."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.metrics import infidelity as captum_infidelity
from scipy.stats import spearmanr
from torch import nn

from harness import ConfigError, Heatmaps, NotApplicable, Param, Result, Technique
from harness.context import Context
from harness.models import LoadedModel
from harness.registry import InputSpec
from harness.technique import Used
from harness.testing import run_once, small_dataset
from harness_saliency import Faithfulness, SaliencyComparison, SanityChecks
from harness_saliency.faithfulness import Game, areas, infidelity, unexplained
from harness_saliency.sanity_checks import copied, randomise, rank_correlation, weighted

PAIR = ("saliency", "guided_backprop")


def linear_model(size=8):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(size * size, 3)).double()
    return LoadedModel(module, InputSpec(channels=1, size=size, mean=(0.0,), std=(1.0,)))


def context(model, count=2, **more):
    shape = (count, model.input.channels, model.input.size, model.input.size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=model.dtype)
    return Context(model, images=images, ids=[f"p{i}" for i in range(count)], technique="faithfulness", **more)


def game(model, count=2, cells=4, steps=16, base="black"):
    ctx = context(model, count, target=1)
    return ctx, Game(ctx, cells, steps, {"deletion": base, "insertion": base}, "score")


def truth(ctx, model, g):
    """(N, cells^2) what each cell adds to the score of a linear model over black."""
    parts = (model.module[1].weight[1].view(1, 8, 8) * ctx.images[:, 0]).unflatten(1, (4, 2)).unflatten(3, (4, 2))
    return parts.sum((2, 4)).flatten(1)


# -- faithfulness ------------------------------------------------------------------------------------------------------------


def test_curves_of_a_linear_model_are_partial_sums():
    model = linear_model()
    ctx, g = game(model)
    parts = truth(ctx, model, g)
    order = g.order(parts)
    score = model(ctx.images)[:, 1]
    sums = torch.cat([torch.zeros(2, 1, dtype=torch.float64), parts.gather(1, order).cumsum(1)], 1)
    torch.testing.assert_close(g.curve("deletion", order), score[:, None] - sums)
    torch.testing.assert_close(g.curve("insertion", order), score[:, None] - parts.sum(1, keepdim=True) + sums)


def test_the_oracle_is_the_true_order_of_an_additive_model_and_the_scale_is_in_order():
    """Deletion: oracle < random < the oracle's order reversed; insertion the other way round."""
    model = linear_model()
    ctx, g = game(model)
    best = truth(ctx, model, g).argsort(1, descending=True)
    for rounds in (1, 4, 16):
        assert torch.equal(g.oracle("deletion", rounds), best)
        assert torch.equal(g.oracle("insertion", rounds), best)
    chance = torch.stack([areas(g.curve("deletion", g.random(i))) for i in range(50)]).mean(0)
    right, wrong = (areas(g.curve("deletion", o)) for o in (best, best.flip(1)))
    assert (right < chance).all()
    assert (chance < wrong).all()
    chance = torch.stack([areas(g.curve("insertion", g.random(i))) for i in range(50)]).mean(0)
    assert (areas(g.curve("insertion", best)) > chance).all()
    assert (chance > areas(g.curve("insertion", best.flip(1)))).all()


def test_the_scale_is_in_order_on_a_real_network(digits_cnn):
    ctx = context(digits_cnn, 6)
    from harness.context import to_images

    ctx._images = to_images(small_dataset(6).pictures(digits_cnn.input), digits_cnn.device)
    g = Game(ctx, 8, 16, {"deletion": "black", "insertion": "black"}, "probability")
    for way, sign in (("deletion", 1), ("insertion", -1)):
        best = g.oracle(way, 16)
        right, wrong = (sign * areas(g.curve(way, o)).mean() for o in (best, best.flip(1)))
        chance = sign * torch.stack([areas(g.curve(way, g.random(i))) for i in range(10)]).mean()
        assert right < chance < wrong


def test_cells_of_sizes_that_do_not_divide():
    model = linear_model(size=7)
    _, g = game(model, cells=3)
    maps = torch.rand(2, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    line = np.arange(7) * 3 // 7
    for a in range(3):
        for b in range(3):
            inside = torch.from_numpy((line[:, None] == a) & (line[None] == b))
            torch.testing.assert_close(g.pool(maps)[:, 3 * a + b], maps[:, inside].mean(1))


def test_a_constant_map_is_ordered_at_random():
    model = linear_model()
    _, g = game(model)
    order = g.order(torch.zeros(2, 16))
    assert torch.equal(order, g.random(-1))
    assert not torch.equal(order, torch.arange(16).expand(2, -1))
    assert torch.equal(order.sort(1).values, torch.arange(16).expand(2, -1))


def test_infidelity_equals_captum_at_the_best_scale(digits_cnn):
    """Same perturbations: captum's normalised infidelity over the mean squared effect."""
    import copy

    digits_cnn = LoadedModel(copy.deepcopy(digits_cnn.module).double(), digits_cnn.input)
    ctx = context(digits_cnn, 2, target=1)
    g = Game(ctx, 8, 8, {"deletion": "black", "insertion": "black"}, "score")
    maps = ctx.input_gradient()[:, 0] * ctx.images[:, 0]
    maps = maps + 0.1 * torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(3))
    draws = ctx.draws(stream="rectangles").randint(0, 8, (10, 4))
    low, high = torch.minimum(draws[..., :2], draws[..., 2:]), torch.maximum(draws[..., :2], draws[..., 2:])
    masks = torch.zeros(2, 10, 8, 8, dtype=torch.float64)
    for i in range(2):
        for p in range(10):
            (t, left), (b, r) = low[i, p].tolist(), high[i, p].tolist()
            masks[i, p, t : b + 1, left : r + 1] = 1
    found = unexplained(ctx, g, {"m": g.pool(maps)}, 10)["m"]
    hidden = masks * ctx.images  # what is taken away over black
    effect = torch.stack([digits_cnn(ctx.images)[:, 1] - digits_cnn(ctx.images - hidden[:, p, None])[:, 1] for p in range(10)], 1)
    turn = iter(range(10))

    def perturb(inputs):
        p = next(turn)
        mask = masks[:, p, None]
        return mask, inputs * (1 - mask)

    with torch.no_grad():
        theirs = captum_infidelity(
            digits_cnn, perturb, ctx.images, maps[:, None], target=1, n_perturb_samples=10, max_examples_per_batch=2, normalize=True
        )
    torch.testing.assert_close(found * effect.square().mean(1), theirs, rtol=1e-5, atol=1e-5)


def test_infidelity_by_hand():
    effect = torch.tensor([[1.0, 2.0, -1.0]])
    torch.testing.assert_close(infidelity(3 * effect, effect), torch.zeros(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(infidelity(torch.zeros(1, 3), effect), torch.ones(1))
    torch.testing.assert_close(infidelity(-effect, effect), torch.ones(1))  # the wrong way round
    assert infidelity(effect, torch.zeros(1, 3)).isnan().all()  # nothing to explain
    torch.testing.assert_close(infidelity(torch.tensor([[1.0, 0.0, 1.0]]), effect), torch.ones(1))  # nothing in common


class _ThirdParty(Technique):
    """A map technique of somebody's own: the true weights, or their opposite."""

    name = "third_party"
    family = "saliency"
    needs = frozenset({"images"})
    attribution = "mine"
    reading = "as it is"
    sign: int = Param(1, description="1 right, -1 wrong")

    def run(self, ctx):
        return Result([Heatmaps("mine", self.sign * ctx.model.module[1].weight[1].view(1, 8, 8) * ctx.images[:, 0], signed=True)])


def judged(technique, model, **labels):
    ctx = context(model, target=1)
    results = {label: {a.name: a for a in t.run(context(model)).artifacts} for label, t in labels.items()}
    ctx.results, ctx.used = results, {label: Used(t) for label, t in labels.items()}
    ctx.missing = {"absent": "needs something else"}
    return technique.run(ctx)


def test_techniques_unheard_of_are_judged():
    model = linear_model()
    technique = Faithfulness(target=1, cells=4, steps=16, deleted="black", inserted="black", scored="score")
    result = judged(technique, model, right=_ThirdParty(), wrong=_ThirdParty(sign=-1))
    table = next(a for a in result.artifacts if a.name == "faithfulness")
    rows = {row[0]: row for row in table.rows}
    assert rows["right"][3:5] == pytest.approx((1, 1))
    assert rows["wrong"][3] < 0
    assert rows["wrong"][4] < 0
    assert rows["right"][5] == "2 of 2"
    assert rows["wrong"][6] == "0 of 2"
    assert rows["right"][7] == pytest.approx(0, abs=1e-5)
    assert table.rows[0][0] == "right"
    assert "absent is left out: needs something else" in result.notes


def test_every_map_is_asked_for_by_its_declaration(plugins):
    found = {use.technique for use in plugins.uses(Faithfulness())}
    assert found == {n for n, cls in plugins.techniques.items() if cls.attribution}
    assert {"saliency", "lime", "rise"} <= found
    assert all(use.optional for use in plugins.uses(Faithfulness()))
    two = plugins.uses(Faithfulness(techniques=PAIR, target=3, profile="draft"))
    assert [(u.technique, u.params) for u in two] == [("saliency", {"target": 3}), ("guided_backprop", {"target": 3})]
    with pytest.raises(ConfigError, match="'features' gives no map"):
        plugins.uses(Faithfulness(techniques=("features",)))
    with pytest.raises(ConfigError, match="saliency"):
        plugins.uses(Faithfulness(techniques=("salience",)))


def test_nothing_to_judge(digits_cnn):
    with pytest.raises(NotApplicable, match="gives maps of these pictures"):
        Faithfulness().run(context(digits_cnn))


def test_a_declared_attribution_must_be_there(digits_cnn):
    from harness.errors import HarnessError

    ctx = context(digits_cnn)
    ctx.results, ctx.used = {"third_party": {}}, {"third_party": Used(_ThirdParty())}
    with pytest.raises(HarnessError, match="declares the attribution 'mine'"):
        ctx.attributions()


# -- sanity_checks -----------------------------------------------------------------------------------------------------------


def test_rank_correlation_is_spearmans():
    a, b = (torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))
    a[0, :3] = 0.5  # ties
    found = rank_correlation(a, b)
    expected = [spearmanr(x.flatten().numpy(), y.flatten().numpy()).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
    assert rank_correlation(a, torch.ones_like(a)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("how", ["normal", "shuffle"])
def test_weights_are_replaced_in_a_copy_from_the_last_layer_on(how, digits_cnn):
    names = weighted(digits_cnn)
    assert names == ["classifier.3", "classifier.1", "features.5", "features.2", "features.0"]
    before = digits_cnn.state()
    mixed = copied(digits_cnn)
    randomise(mixed.modules[names[0]], context(digits_cnn).draws(["x"]), how)
    assert digits_cnn.state() == before
    old, new = (m.modules["classifier.3"].weight for m in (digits_cnn, mixed))
    assert not torch.allclose(old, new)
    assert torch.equal(digits_cnn.modules["classifier.1"].weight, mixed.modules["classifier.1"].weight)
    if how == "shuffle":
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values)
    else:
        assert float(new.std()) == pytest.approx(float(old.std()), rel=0.1)


def test_weights_that_no_call_shows_become_random_too():
    """Attention multiplies by weights of modules it does not call; parameters of the network itself come last."""
    from torchvision.models import SwinTransformer, VisionTransformer

    torch.manual_seed(0)
    for net in (VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4), SwinTransformer([4, 4], 16, [2, 2], [2, 2], [2, 2], num_classes=4)):
        model = LoadedModel(net, InputSpec(size=32))
        names = weighted(model)
        mixed = copied(model)
        for name in names:
            randomise(mixed.module.get_submodule(name), context(model, 1).draws([name]), "normal")
        before, after = model.module.state_dict(), mixed.module.state_dict()
        same = [n for n, v in before.items() if v.is_floating_point() and v.std() > 0 and torch.equal(v, after[n])]
        assert same == []
        assert names[0] in ("heads.head", "head")


def test_units_of_their_own_are_cut_to_the_pictures_looked_at(digits_cnn):
    targets = [f"channel:features.3:{c}" for c in range(6)]
    result = run_once(SanityChecks(techniques=("saliency",), target=targets, pictures=4, stages=2), digits_cnn, small_dataset(6))
    assert len(result.metrics[0].per_image) == 4


@pytest.mark.slow
def test_guided_backprop_hardly_notices_random_weights_where_saliency_does(squeezenet, registry):
    """Adebayo et al. 2018: with the last layers random guided backprop keeps its map, the gradient loses its own."""
    from harness.datasets import load_dataset

    data = load_dataset("imagenet_samples", registry).select(2)
    result = run_once(SanityChecks(techniques=PAIR, pictures=2, stages=6), squeezenet, data)
    rows = {row[0]: row for row in result.artifacts[0].rows}
    assert rows["guided_backprop"][2] > 0.9
    assert rows["saliency"][2] < 0.7
    assert rows["guided_backprop"][-1] == "keeps its map"
    assert rows["saliency"][-1] == "depends on the weights"
    assert any("guided_backprop hardly depends" in note for note in result.notes)
    assert not any("saliency hardly" in note for note in result.notes)


def test_the_explained_class_stays(digits_cnn):
    """The maps of a random network are of the class that the trained one gave."""
    seen = []

    class Spy(_ThirdParty.__base__):
        """Notes what it is asked to explain."""

        name = "spy"
        family = "saliency"
        needs = frozenset({"images"})
        attribution = "m"
        reading = "x"
        target: str | int | list[str | int] = Param("predicted", description="what is explained")

        def run(self, ctx):
            seen.append(self.target)
            return Result([Heatmaps("m", ctx.input_gradient().abs().amax(1))])

    ctx = context(digits_cnn, 3)
    ctx._dataset = small_dataset(3)
    ctx.used = {"spy": Used(Spy())}
    ctx.results = {"spy": {a.name: a for a in Spy().run(context(digits_cnn, 3)).artifacts}}
    SanityChecks(pictures=2, stages=2).run(ctx)
    assert seen[1:] == [ctx.predicted[[0, 1]].tolist()] * 2


# -- saliency_comparison -------------------------------------------------------------------------------------------------------


def test_scores_stand_beside_the_maps_best_first(digits_cnn):
    technique = SaliencyComparison(techniques=("saliency", "occlusion", "grad_cam"), pictures=2)
    result = run_once(technique, digits_cnn, small_dataset(3))
    judged_ = run_once(Faithfulness(techniques=technique.techniques), digits_cnn, small_dataset(3))
    area = next(a for a in judged_.artifacts if a.name == "areas").data
    rows = [a for a in result.artifacts if a.name.startswith("picture")]
    assert len(rows) == 2
    first = rows[0]
    assert set(first.over) == {0}
    assert first.data.shape == (3, 8, 8)
    names = [t.split(":")[0].replace(" ", "_") for t in first.captions]
    score = [area[f"deletion.{n}"][0] - area[f"insertion.{n}"][0] for n in names]
    assert score == sorted(score)
    assert f"del {area['deletion.saliency'][0]:.2f}" in next(t for t in first.captions if t.startswith("saliency"))
    agreement = next(a for a in result.artifacts if a.name == "agreement")
    assert np.allclose(np.diag(agreement.values), 1)
    assert np.allclose(agreement.values, agreement.values.T)
