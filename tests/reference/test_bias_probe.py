"""bias_probe on the planted snow, on a user's own masks, and by hand; the planted datasets themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from harness import NotApplicable
from harness.context import Context, to_images
from harness.datasets import load_dataset
from harness.errors import DataError, RegistryError
from harness.models import LoadedModel, load_model
from harness.registry import DatasetEntry, InputSpec, load_registry
from harness.testing import run_once
from harness_saliency import BiasProbe
from harness_saliency.bias_probe import moved, on_cue


@pytest.fixture(scope="module")
def snow(registry):
    return load_dataset("snow_test", registry)


def probe(name, data, registry, **params):
    result = run_once(BiasProbe(**params), load_model(name, registry), data, max_batch=64)
    return result, {m.name: m.value for m in result.metrics}


@pytest.mark.slow
def test_the_snow_is_found_and_the_control_is_cleared(registry, snow):
    """At correlation 0.95 at least half of the map lies on the cue and swapping it flips nine in ten; with the control neither."""
    maps = ("occlusion", "grad_cam", "expected_gradients", "saliency", "smoothgrad", "integrated_gradients", "guided_backprop")
    data = snow.select(60)
    leaning, found = probe("snow_cnn", data, registry, techniques=maps)
    control, clean = probe("snow_control_cnn", data, registry, techniques=maps)
    assert found["leans"] == 1
    assert found["swapped_flips"] >= 0.9
    assert all(found[f"share.{n}"] >= 0.5 for n in maps)
    assert found["worst_group"] < 0.2
    assert leaning.notes[0].startswith("this model leans on a patch of snow")
    assert clean["leans"] == 0
    assert clean["swapped_flips"] <= 0.1
    assert all(clean[f"share.{n}"] <= 0.1 for n in maps)
    assert clean["worst_group"] > 0.6
    assert control.notes[0].startswith("this model does not lean on a patch of snow")


def test_a_model_that_reads_the_cue_alone(registry, snow):
    """Closed form: a score that is the brightest corner's mean flips whenever the snow is swapped, and nowhere else."""

    class Corners(nn.Module):
        def forward(self, x):
            corners = torch.stack(
                [x[:, :, a, b].mean((1, 2, 3)) for a in (slice(0, 9), slice(-9, None)) for b in (slice(0, 9), slice(-9, None))], 1
            )
            snowy = corners.amax(1) - 0.6
            return torch.stack([snowy, -snowy], 1)

    model = LoadedModel(Corners(), InputSpec(size=32, mean=(0.0,) * 3, std=(1.0,) * 3), classes=("even", "odd"))
    result = run_once(BiasProbe(techniques=("saliency",)), model, snow.select(40))
    found = {m.name: m.value for m in result.metrics}
    assert found["swapped_flips"] == 1
    assert found["covered_flips"] == 1
    assert found["elsewhere_flips"] == 0
    assert found["share.saliency"] > 0.99
    assert found["worst_group"] == 0


def test_shares_and_moved_regions_by_hand():
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, 0, :2] = True
    maps = torch.tensor([[[3.0, 1.0, -9.0, 0.0], [0.0, 4.0, 0.0, 0.0], [0.0] * 4, [0.0] * 4]])
    assert on_cue(maps, masks).item() == 0.5
    assert on_cue(torch.zeros(1, 4, 4), masks).item() == 0
    assert moved(masks)[0].nonzero().tolist() == [[2, 2], [2, 3]]
    assert not (moved(torch.ones(1, 4, 4, dtype=torch.bool))).any()  # a cue that is everywhere has no elsewhere


def test_a_cue_that_is_everywhere_has_no_control(registry):
    data = plant(registry, cue="tint", correlation=0.5).select(indices=range(12))

    class Blue(nn.Module):
        def forward(self, x):
            blue = (x[:, 2] - x[:, 1]).mean((1, 2)) * 20
            return torch.stack([blue, -blue], 1)

    model = LoadedModel(Blue(), InputSpec(size=32, mean=(0.0,) * 3, std=(1.0,) * 3), classes=("a", "b"))
    result = run_once(BiasProbe(techniques=("saliency",)), model, data)
    assert not any(m.name == "elsewhere_flips" for m in result.metrics)
    assert "leaves no room to cover as much elsewhere" in result.notes[0]


def test_a_users_own_masks(tmp_path, registry, digits_cnn):
    """A folder of pictures and one of masks: the cue is covered, since nobody knows how to swap it."""
    rng = np.random.default_rng(0)
    for folder in ("pictures/dark", "pictures/light", "masks/light"):
        (tmp_path / folder).mkdir(parents=True)
    for i in range(12):
        pixels = rng.integers(60, 90, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"pictures/dark/{i}.png")
        pixels[:4, :4] = 255
        Image.fromarray(pixels).save(tmp_path / f"pictures/light/{i}.png")
        mask = np.zeros((16, 16), np.uint8)
        mask[:4, :4] = 255
        Image.fromarray(mask).save(tmp_path / f"masks/light/{i}.png")
    (tmp_path / "r.yaml").write_text("datasets: {mine: {source: 'folder:pictures', masks: masks, masks_show: a stamp}}")
    data = load_dataset("mine", load_registry([tmp_path / "r.yaml"]))

    class Brightest(nn.Module):
        def forward(self, x):
            top = x.amax((1, 2, 3)) - 0.5  # behind the normalisation: 0.7 in pixels
            return torch.stack([-top, top], 1)

    model = LoadedModel(Brightest(), InputSpec(size=16, mean=(0.2,) * 3, std=(1.0,) * 3), classes=("dark", "light"))
    result = run_once(BiasProbe(techniques=("saliency", "occlusion")), model, data)
    found = {m.name: m.value for m in result.metrics}
    assert found["covered_flips"] == 1
    assert found["elsewhere_flips"] == 0
    assert "swapped_flips" not in found
    assert found["leans"] == 1
    assert "leans on a stamp: when it alone is covered, the answer changes on 100 % of 12 pictures" in result.notes[0]


def test_needs_marks(digits_cnn, registry):
    with pytest.raises(NotApplicable, match="a dataset with `masks`, or a planted one"):
        run_once(BiasProbe(techniques=("saliency",)), digits_cnn, load_dataset("digits", registry).select(3))


# -- planted datasets --------------------------------------------------------------------------------------------------------


def plant(registry, **args):
    source = args.pop("source", "planted:digits_test")
    entry = DatasetEntry(source=source, args={"of": ["8"], **args})
    registry = registry.__class__(models=registry.models, datasets={**registry.datasets, "mine": entry}, recipes={})
    return load_dataset("mine", registry)


def test_the_cue_goes_with_the_class_as_often_as_said(registry):
    data = load_dataset("snow_train", registry)
    there = data.masks(InputSpec(channels=1, size=32)).any((1, 2))
    even = data.labels == 0
    assert data.classes == ("even", "odd")
    assert there[even].mean() == pytest.approx(0.95, abs=0.02)
    assert there[~even].mean() == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize("cue", ["patch", "background", "tint"])
def test_swapping_changes_the_cue_and_nothing_else(cue, registry):
    data = plant(registry, cue=cue, correlation=1.0).select(indices=range(30))
    masks = data.masks(InputSpec(channels=1, size=32))
    assert np.array_equal(masks.any((1, 2)), data.labels == 8)
    changed = 0
    for i in range(30):
        before, after = (np.asarray(picture).astype(int) for picture in (data.get(i), data.marks.swapped(i)))
        assert before.shape == (32, 32, 3)
        differs = (before != after).any(2)
        assert differs.any()
        if masks[i].any():
            changed += 1
            assert masks[i][differs].mean() > (0.85 if cue == "background" else 0.999)  # an object's rim lets some snow through
            assert differs[masks[i]].mean() > 0.9
    assert changed
    again = plant(registry, cue=cue, correlation=1.0).select(indices=range(30))
    assert np.array_equal(np.asarray(data.get(3)), np.asarray(again.get(3)))


def test_colour_pictures_keep_their_colours(registry):
    entry = DatasetEntry(source="planted:cifar10_samples", args={"of": ["cat"], "size": 48, "object": 0.75, "noise": 0.0})
    registry = registry.__class__(models={}, datasets={**registry.datasets, "mine": entry}, recipes={})
    data = load_dataset("mine", registry)
    base = load_dataset("cifar10_samples", registry)
    inner = np.asarray(base.get(0).resize((36, 36), Image.Resampling.BICUBIC)).astype(int)
    found = np.asarray(data.get(0)).astype(int)[14:34, 14:34]  # clear of corners
    assert np.abs(found - inner[8:28, 8:28]).max() <= 1


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ({"of": ["11"]}, DataError, "no class '11'"),
        ({"cue": "fog"}, RegistryError, r"datasets\.mine\.args\.cue"),
        ({"correlation": 2}, RegistryError, r"args\.correlation"),
        ({"kind": "patch"}, RegistryError, r"args\.kind: unknown key"),
        ({"groups": {"a": ["0"], "b": ["0"]}, "of": ["a"]}, DataError, "class '0' stands in two"),
        ({"groups": {"a": ["zero"]}, "of": ["a"]}, DataError, "no class 'zero'"),
        ({"source": "planted:mine"}, RegistryError, "planted in itself"),
    ],
)
def test_plantings_that_make_no_sense(args, error, message, registry):
    with pytest.raises(error, match=message):
        plant(registry, **args)


def test_a_cue_needs_labels(registry):
    entry = DatasetEntry(source="planted:photos", args={"of": ["x"]})
    registry = registry.__class__(models={}, datasets={**registry.datasets, "mine": entry}, recipes={})
    with pytest.raises(DataError, match="has no labels"):
        load_dataset("mine", registry)


def test_context_gives_the_masks(registry, snow):
    data = snow.select(6)
    ctx = Context(
        load_model("snow_cnn", registry),
        images=to_images(data.pictures(InputSpec(size=32)), torch.device("cpu")),
        ids=data.ids,
        dataset=data,
    )
    assert np.array_equal(ctx.masks.numpy(), data.masks(InputSpec(channels=1, size=32)))


def test_the_rules_are_checked_where_there_are_marks():
    from harness.testing import check_technique

    assert check_technique(BiasProbe, params={"techniques": ["saliency"]}) == []
