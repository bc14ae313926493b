"""Pictures through generators: gradients, bounds, what a second network says, training of generators, bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from harness import ConfigError
from harness import optimise as o
from harness.generators import UpconvGenerator, first_side, load_generator
from harness.registry import GeneratorRecipe, load_registry
from harness.testing import load_dataset, run_once
from harness.train_generator import relative, train_generator
from harness_synthesis import DeepGenerator
from harness_synthesis.deep_generator import Generated, shrinking


@pytest.fixture(scope="module")
def digits(registry):
    return load_dataset("digits", registry).select(4)


def table(result, name):
    return next(a for a in result.artifacts if a.name == name)


def test_the_codes_gradient_is_a_finite_difference(registry):
    generator = load_generator("digits_cnn_code", registry)
    generator.module.double()
    code = torch.rand((1, 64), generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    made = Generated(generator, 8)
    weights = torch.rand((1, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda y: (made.images(y) * weights).sum(), code, eps=1e-6, atol=1e-5)


def test_generators_of_vectors_and_of_maps_give_pictures_of_their_size():
    for code, channels, size, width in (([10], 1, 8, 4), ([10], 3, 30, 64), ([6, 5, 5], 3, 40, 4), ([6, 13, 13], 3, 100, 64)):
        made = UpconvGenerator(code, channels, size, width).requires_grad_(False)(torch.rand(2, *code))
        assert made.shape == (2, channels, size, size)
        assert float(made.min()) >= 0 and float(made.max()) <= 1
    assert [first_side(n) for n in (8, 32, 224, 28)] == [4, 4, 7, 7]
    with pytest.raises(ValueError, match="a vector"):
        UpconvGenerator([3, 4])


def test_steps_decay_and_bounds_are_the_releases(digits_cnn, registry, digits):
    """By hand: y <- 0.99 clip(y + step g / mean|g|), the step shrinking linearly."""
    technique = DeepGenerator(classes=(3, 8), steps=6)
    made = run_once(technique, digits_cnn, digits)
    generator = load_generator("digits_cnn_code", registry)
    typical = float(generator.high.mean())
    state = table(made, "state").data
    from harness.context import Draws

    draws = Draws(["class-3-0", "class-8-0"], torch.device("cpu"), torch.float32, 0, "deep_generator", "")
    y = (typical * draws.randn((64,))).clamp_min(0).clamp(torch.zeros(64), generator.high)
    for step in range(6):
        leaf = y.clone().requires_grad_()
        score = digits_cnn(generator(leaf)).gather(1, torch.tensor([[3], [8]])).sum()
        gradient = torch.autograd.grad(score, leaf)[0]
        size = 0.1 * typical + (1e-10 - 0.1 * typical) * step / 6
        y = 0.99 * (y + size * gradient / gradient.abs().mean(1, keepdim=True)).clamp(torch.zeros(64), generator.high)
    torch.testing.assert_close(torch.tensor(state["memory.variables"]), y, rtol=0, atol=1e-4)
    assert shrinking(8.0, 200)(0) == 8.0 and shrinking(8.0, 200)(200) == pytest.approx(1e-10)


def test_codes_stay_in_their_range_and_the_generator_is_left_as_it_was(digits_cnn, registry, digits, monkeypatch):
    loaded = load_generator("digits_cnn_code", registry)
    monkeypatch.setattr("harness.context.Context.generator", lambda self, name: loaded)
    before = {k: v.clone() for k, v in loaded.module.state_dict().items()}
    result = run_once(DeepGenerator(count=10), digits_cnn, digits)
    assert all(torch.equal(v, before[k]) for k, v in loaded.module.state_dict().items())
    generator = load_generator("digits_cnn_code", registry)
    codes = torch.tensor(table(result, "state").data["memory.variables"])
    assert (codes <= 0.99 * generator.high + 1e-6).all() and (codes >= 0).all()
    wide = run_once(DeepGenerator(count=10, reach=3.0), digits_cnn, digits)
    beyond = torch.tensor(table(wide, "state").data["memory.variables"])
    assert (beyond <= 3 * generator.high).all() and (beyond > generator.high).any()
    assert all(torch.equal(v, before[k]) for k, v in generator.module.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["auto", "prior"])
def test_a_second_network_names_the_class_more_often_than_by_pixels(kind, digits_cnn, digits):
    found = [run_once(DeepGenerator(count=10, generator=kind, judge="digits_resnet"), digits_cnn, digits, seed=s) for s in range(3)]
    rates = [{m.name: m.value for m in result.metrics} for result in found]
    assert all(r["probability"] > 0.95 and r["risen"] == 1.0 for r in rates)
    assert np.mean([r["named_generator"] for r in rates]) > np.mean([r["named_pixels"] for r in rates]) + 0.05
    rows = table(found[0], "units").rows
    assert len(rows) == 10
    said = [row[0] == row[4] for row in rows]
    assert np.mean(said) == pytest.approx(rates[0]["named_generator"])


def test_hidden_units_and_a_pictures_own_code(digits_cnn, digits):
    result = run_once(DeepGenerator(layer="features.1", channels=(0, 3), steps=60), digits_cnn, digits)
    assert {m.name: m.value for m in result.metrics}["risen"] == 1.0
    assert [row[0] for row in table(result, "units").rows] == ["features.1, channel 0", "features.1, channel 3"]
    name = digits.ids[2]
    start = run_once(DeepGenerator(classes=(3,), steps=0, start=f"{digits.name}:{name}"), digits_cnn, digits)
    own = torch.from_numpy(digits.pictures(digits_cnn.input, 2, 3)).permute(0, 3, 1, 2).float() / 255
    error = float((torch.tensor(table(start, "pictures").data) - own).square().mean())
    assert error < 0.03  # its inversion


@pytest.mark.parametrize("kind", ["auto", "prior"])
def test_going_on_is_as_if_it_had_not_stopped(kind, digits_cnn, digits):
    settings = {"classes": (3, 5), "generator": kind, "decay": 0.01}
    first = run_once(DeepGenerator(steps=20, **settings), digits_cnn, digits)
    rest = run_once(DeepGenerator(steps=20, go_on=8, **settings), digits_cnn, digits)
    np.testing.assert_array_equal(table(rest, "pictures").data, table(first, "pictures").data)


def test_bad_input_is_named(digits_cnn, digits, registry):
    for params, message in (
        ({"generator": "digit_cnn_code"}, "no generator 'digit_cnn_code'; did you mean 'digits_cnn_code'"),
        ({"layer": "features.1", "channels": (99,)}, "channels 0 to 15"),
        ({"start": "digits:nothing"}, "dataset 'digits' has no picture 'nothing'"),
        ({"classes": ("eleven",)}, "no class 'eleven'"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_once(DeepGenerator(**params), digits_cnn, digits)
    for params, message in (
        ({"generator": "prior", "start": "a"}, "an untrained generator has no code"),
        ({"layer": "features.1", "judge": "digits_resnet"}, "can name classes"),
    ):
        with pytest.raises(ConfigError, match=message):
            DeepGenerator.build(params)


# -- training -----------------------------------------------------------------------------------------------------------


def recipe(**more):
    made = GeneratorRecipe(**{"encoder": "digits_cnn", "layer": "classifier.2", "dataset": "digits_train", "epochs": 3, "width": 8, **more})
    made._where = "test"
    return made


@pytest.mark.slow
def test_a_generator_learns_to_invert(tmp_path, registry):
    path, card = train_generator("mine", recipe(epochs=6), registry, tmp_path, "cpu")
    pixel, feature = card["losses"]["pixel"], card["losses"]["feature"]
    assert pixel[-1] < 0.5 * pixel[0] and feature[-1] < 0.3 * feature[0]
    assert card["test"]["same_answer"] > 0.8 and card["test"]["psnr"] > 12
    assert card["test_data"]["pictures"] == 287  # every fifth of 1,437
    again, other = train_generator("again", recipe(epochs=6), registry, tmp_path, "cpu")
    assert card["sha256"] == other["sha256"] and path.read_bytes() == again.read_bytes()
    mine = load_registry([tmp_path / "mine.yaml"])
    generator = load_generator("mine", mine)
    assert json.loads((tmp_path / "mine.json").read_text())["args"]["code"] == [64]
    assert generator.encoder == "digits_cnn" and (generator.high > 0).any()


def test_the_shipped_generator_is_its_recipes(registry):
    from importlib.resources import files

    card = json.loads((files("harness") / "data" / "digits_cnn_code.json").read_text())
    entry = registry.generator("digits_cnn_code")
    assert card["sha256"] == entry.sha256 and card["args"] == entry.args
    assert card["recipe"] == registry.generator_recipes["digits_cnn_code"].model_dump(mode="json")
    assert card["test"]["same_answer"] > 0.95


def test_the_range_is_that_of_the_training_pictures(registry, digits_cnn):
    data = load_dataset("digits_train", registry)
    images = torch.from_numpy(data.pictures(digits_cnn.input)).permute(0, 3, 1, 2).float() / 255
    codes = digits_cnn.activations(images, ["classifier.2"])["classifier.2"]
    generator = load_generator("digits_cnn_code", registry)
    torch.testing.assert_close(generator.high, codes.amax(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(generator.low, codes.amin(0), rtol=1e-4, atol=1e-4)


def test_training_on_a_folder_of_pictures(tmp_path, registry):
    """Maps as codes, colour pictures: a network of 32 x 32."""
    from PIL import Image
    from skimage import data

    photo = Image.fromarray(data.coffee())
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(20):
        photo.crop((20 * i, 10 * i, 20 * i + 150, 10 * i + 150)).resize((32, 32)).save(folder / f"{i}.png")
    settings = {"encoder": "snow_cnn", "layer": "features.5", "dataset": str(folder), "epochs": 30, "batch_size": 8, "learning_rate": 0.003}
    _, card = train_generator("folder", recipe(**settings), registry, tmp_path, "cpu")
    assert card["losses"]["pixel"][-1] < 0.4 * card["losses"]["pixel"][0]
    assert card["data"]["pictures"] == 16 and card["test_data"]["pictures"] == 4


def test_what_cannot_be_trained(tmp_path, registry):
    with pytest.raises(ConfigError, match="no layer 'classifier.99'"):
        train_generator("x", recipe(layer="classifier.99"), registry, tmp_path, "cpu")
    (tmp_path / "few").mkdir()
    from PIL import Image

    Image.new("L", (8, 8)).save(tmp_path / "few" / "a.png")
    with pytest.raises(ConfigError, match="too few to train on"):
        train_generator("x", recipe(dataset=str(tmp_path / "few")), registry, tmp_path, "cpu")
    with pytest.raises(ConfigError, match="stopped being finite"):
        train_generator("x", recipe(learning_rate=1e30, adversarial=0), registry, tmp_path, "cpu")


def test_relative_error():
    a = torch.tensor([[1.0, 2.0], [0.0, 2.0]])
    assert float(relative(a, a)) == 0 and float(relative(2 * a, a)) == pytest.approx(1.0)
    assert o.Clamp(0.0, torch.tensor([1.0, 5.0]))(torch.tensor([[9.0, 9.0]]), a, 0).tolist() == [[1.0, 5.0]]
