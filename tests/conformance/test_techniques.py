"""Every installed technique keeps the rules; the list is the live one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from harness import Heatmaps, Metric, Param, Result, Technique
from harness.models import load_model
from harness.plugins import load_plugins
from harness.testing import check_technique, run_once, small_dataset

TECHNIQUES = load_plugins().techniques
# Parameters that make a run on 8 x 8 pictures possible or short; anything missing here runs with its defaults.
SMALL = {
    "class_visualization": {"steps": 4, "classes": [3, 5]},
    "channel_visualization": {"steps": 4, "count": 2, "rows": 2},
    "deep_dream": {"octaves": 1, "steps": 2, "frames": 2},
    "feature_inversion": {"steps": 4, "rows": 2},
    "deep_generator": {"steps": 4, "count": 2},
    "multifaceted": {"facets": 2, "steps": 3, "plane": "pca"},
    "inversion_by_depth": {"steps": 4, "rows": 2, "gallery": 8},
    "attack_curve": {"attacks": ["pgd"], "eps": [8], "steps": 2},
    "fooling_image": {"steps": 3},
    "adversarial_training": {"epochs": 1, "noises": ["none", "fgsm"], "budgets": [16], "steps": 1},
    "certified_radius": {"first": 10, "samples": 20},
    "confidence": {"steps": 2, "resamples": 10, "strange": 4, "neighbours": 2},
    "decision_slice": {"side": 5},
    "minimal_perturbation": {"steps": 4, "rounds": 2, "deepfool_steps": 5},
    "transfer_matrix": {"models": ["digits_linear"], "steps": 2},
    "universal_perturbation": {"passes": 2},
    "fast_style_transfer": {"size": 32, "steps": 2},
    "multi_style_transfer": {"size": 32, "stages": 2},
    "neural_texture": {"size": 32, "steps": 3, "coarse": 0, "depths": 2},
    "style_transfer": {"size": 32, "steps": 3, "coarse": 0},
    "super_resolution": {"steps": 2, "crop": 16, "size": 32, "batch": 2, "width": 4},
    "wei_levoy_texture": {"sample_size": 16, "size": 10, "window": 3, "levels": 2},
    "tsne_map": {"iterations": 250, "seeds": 1, "perplexity": [3]},
    "rise": {"masks": 60},
    "lime": {"samples": 60},
    "faithfulness": {"techniques": ["saliency", "grad_cam"], "cells": 4, "oracle_rounds": 2},
    "saliency_comparison": {"techniques": ["saliency", "occlusion"]},
    "sanity_checks": {"techniques": ["saliency", "guided_backprop"], "stages": 2},
    "bias_probe": {"techniques": ["saliency", "guided_backprop"]},
}
MODELS = {
    "linear_templates": ["digits_linear"],
    "bias_probe": ["snow_cnn"],
    "fast_style_transfer": ["snow_cnn"],  # stylers are trained on colour pictures
    "multi_style_transfer": ["snow_cnn"],
}
DATASETS = {"bias_probe": "snow_test", "fast_style_transfer": "snow_test", "multi_style_transfer": "snow_test"}
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "model"), [(name, model) for name in TECHNIQUES for model in MODELS.get(name, ["digits_cnn", "digits_resnet"])]
)
def test_keeps_the_rules(name, model):
    assert check_technique(TECHNIQUES[name], model, SMALL.get(name), DATASETS.get(name, "digits")) == []


@pytest.mark.parametrize("name", TECHNIQUES)
def test_says_where_it_comes_from_and_what_it_does_not_show(name):
    cls = TECHNIQUES[name]
    assert cls.summary()[0].isupper()
    assert cls.reading
    if cls.audit:
        assert cls.caveats


# bias_probe gives no map of its own, one a picture.
@pytest.mark.parametrize("name", [n for n, c in TECHNIQUES.items() if "images" in c.needs and n not in DATASETS])
def test_one_picture_alone_gets_what_it_gets_in_a_batch(name, digits_cnn):
    technique = TECHNIQUES[name].build(SMALL.get(name, {}))
    data = small_dataset(4)
    together, alone = (run_once(technique, digits_cnn, some) for some in (data, data.select(indices=[2])))
    single = {b.name: b for b in alone.artifacts}
    for a in together.artifacts:
        if not (isinstance(a, Heatmaps) and a.over == (0, 1, 2, 3)):
            continue  # not one a picture: belongs to all together, or to one of them
        b = single[a.name]
        torch.testing.assert_close(torch.tensor(a.data[2]), torch.tensor(b.data[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_has_a_reference_case(name):
    """A test under tests/reference imports the technique's class."""
    wanted = TECHNIQUES[name].__name__
    imported = set()
    for path in (ROOT / "tests" / "reference").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported |= {alias.name for alias in node.names}
    assert wanted in imported


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", TECHNIQUES)
def test_gives_the_same_on_a_gpu(name, registry):
    from harness.testing import same

    technique = TECHNIQUES[name].build(SMALL.get(name, {}))
    model, data = MODELS.get(name, ["digits_cnn"])[0], small_dataset(name=DATASETS.get(name, "digits"))
    results = [run_once(technique, load_model(model, registry, device), data) for device in ("cpu", "cuda")]
    assert same(*results, rtol=1e-2, atol=1e-3)


# -- the rules find what they are for --------------------------------------------------------------------------------


class _Careless(Technique):
    """A technique that breaks one rule, named by its parameter."""

    name = "careless"
    family = "saliency"
    needs = frozenset({"images"})
    reading = "not at all"
    rule: str = Param("", description="the rule it breaks")

    def run(self, ctx):
        x = ctx.images
        maps = x.abs().amax(1)
        if self.rule == "global seed":
            maps = maps + torch.rand(maps.shape, device=ctx.device)
        elif self.rule == "device":
            maps = maps + torch.zeros(1)
        elif self.rule == "wrong device":
            maps = maps + torch.zeros(1, device="cpu")
        elif self.rule == "batch":
            maps = maps * ctx.max_batch
        elif self.rule == "hooks":
            next(iter(ctx.model.modules.values())).register_forward_hook(lambda *_: None)
        elif self.rule == "training":
            ctx.model.module.train()
        elif self.rule == "weights":
            next(ctx.model.module.parameters()).data.mul_(1.5)
        elif self.rule == "gradient":
            ctx.model.module.requires_grad_(True)
        elif self.rule == "empty":
            return Result()
        return Result([Heatmaps("m", maps)], [Metric("mean", maps.mean())])


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        ("global seed", "global random generators"),
        ("global seed", "without generator="),
        ("device", "torch.zeros without device="),
        ("wrong device", "torch.zeros with device='cpu'"),
        ("batch", "depends on max_batch"),
        ("hooks", "left the model changed: hooks"),
        ("training", "left the model changed: modules or training flags"),
        ("weights", "left the model changed: weights or buffers"),
        ("gradient", "left the model changed: weights or buffers"),
        ("empty", "result is empty"),
    ],
)
def test_a_broken_rule_is_found(rule, found):
    problems = check_technique(_Careless, params={"rule": rule})
    assert any(found in p for p in problems), problems


def test_a_careful_technique_has_no_problems():
    assert check_technique(_Careless) == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"__doc__": "Text."}, "must be a slug"),
        ({"__doc__": "Text.", "name": "Bad-Name"}, "must be a slug"),
        ({"name": "fine"}, "docstring"),
        ({"__doc__": "Text.", "name": "fine"}, r"run\(ctx\) is missing"),
        (
            {"__doc__": "Text.", "name": "fine", "run": lambda self, ctx: None, "__annotations__": {"x": int}, "x": 1},
            "parameter x has no description",
        ),
    ],
)
def test_a_class_that_is_not_a_technique_is_refused_when_defined(body, message):
    with pytest.raises(TypeError, match=message):
        type("Wrong", (Technique,), {"__module__": __name__, **body})


def test_a_technique_is_final():
    with pytest.raises(TypeError, match="final"):
        type("Child", (_Careless,), {"__module__": __name__, "__doc__": "Text.", "name": "child"})


def test_imports_go_one_way():
    """plugins -> harness; reports -> harness.record, harness.artifacts and what they stand on; harness -> neither."""
    for path in [*ROOT.glob("harness/**/*.py"), *ROOT.glob("plugins/**/*.py"), *ROOT.glob("reports/**/*.py")]:
        part = path.relative_to(ROOT).parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in names:
                top = name.partition(".")[0]
                if part == "harness":
                    assert not top.startswith("harness_"), path
                    assert top != "mlflow" or path.name == "tracking.py", path
                elif part == "plugins":
                    assert top != "harness_reports", path
                elif part == "reports" and top == "harness":
                    assert name.partition(".")[2] in ("artifacts", "errors", "experiment", "hookspecs", "paths", "record"), (path, name)
                    assert top != "torch"
