"""Textures, styles and their networks, and what people give them: broken, thin and huge pictures, other networks, moved folders."""

from __future__ import annotations

import shutil
import tracemalloc
from collections import OrderedDict
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from harness import ConfigError, NotApplicable
from harness import optimise as o
from harness import train_styler as trainer
from harness.errors import DataError
from harness.models import LoadedModel, load_model
from harness.nets import VGG16Features
from harness.registry import InputSpec, StylerRecipe, load_registry
from harness.stylers import load_styler
from harness.testing import load_dataset, run_once
from harness_style import FastStyleTransfer, GramMatrix, MultiStyleTransfer, NeuralTexture, StyleTransfer, SuperResolution, WeiLevoyTexture
from harness_style import pictures as pictures_module
from harness_style import wei_levoy_texture as wei_levoy_module
from harness_style.wei_levoy import memory, synthesise

IHC = "textures:ihc.png"


class OneSize(nn.Module):
    """A network of 32 x 32 pixels and no other."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        assert x.shape[-1] == 32, f"Wrong image height! Expected 32 but got {x.shape[-1]}!"
        return self.head(self.features(x).mean((2, 3)))


@pytest.fixture(scope="module")
def one_size():
    torch.manual_seed(0)
    return LoadedModel(OneSize().eval(), InputSpec(size=32), name="one_size")


@pytest.fixture(scope="module")
def small(registry):
    return load_model("snow_cnn", registry)


@pytest.fixture
def folder(registry, tmp_path):
    """folder({name: (width, height)}) writes noise; a size of None a file that is no picture."""

    def write(sizes):
        random = np.random.default_rng(0)
        place = tmp_path / "pictures"
        place.mkdir()
        for name, size in sizes.items():
            if size is None:
                (place / name).write_bytes(b"\xff\xd8\xff\xe0 no picture")
            else:
                Image.fromarray(random.integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)).save(place / name)
        return load_dataset(str(place), registry)

    return write


@pytest.fixture
def no_work(monkeypatch):
    """A descent or a training that begins fails the test."""

    def begun(*_, **__):
        raise AssertionError("work was begun")

    monkeypatch.setattr(o, "ascend", begun)
    monkeypatch.setattr(SuperResolution, "_trained", begun)
    monkeypatch.setattr(wei_levoy_module, "synthesise", begun)


def recipe(**more):
    """Eight steps of a tiny network."""
    small = {"steps": 8, "batch_size": 2, "crop": 32, "style_size": 48, "width": 4, "blocks": 1, "styles": [IHC]} | more
    return StylerRecipe(
        encoder="snow_cnn", content_layer="features.4", style_layers=["features.1", "features.4"], dataset="photos", **small
    )


def table(result, name):
    return next(a for a in result.artifacts if a.name == name)


# -- pictures --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    "technique", [StyleTransfer(size=64), NeuralTexture(size=64), WeiLevoyTexture(), FastStyleTransfer(size=64), SuperResolution(size=64)]
)
def test_a_broken_picture_is_told_before_work_is_put_into_the_others(technique, folder, squeezenet):
    data = folder({f"{i}.png": (80, 60) for i in range(5)} | {"4.png": None})
    with pytest.raises(DataError, match=r"4.png"):
        run_once(technique, squeezenet, data)


@pytest.mark.usefixtures("no_work")
def test_a_style_too_small_at_a_later_scale_is_told_before_the_first_is_made(folder, squeezenet):
    data = folder({"a.png": (80, 60)})
    with pytest.raises(ConfigError, match=r"style_transfer.style: at .* raise style_scale or size"):
        run_once(StyleTransfer(size=128, style_scale=(1.0, 0.5, 0.1)), squeezenet, data)


def test_memory_that_runs_out_is_not_taken_for_a_small_picture(folder, small, monkeypatch):
    data = folder({"a.png": (80, 60)})

    def out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(LoadedModel, "activations", out)
    with pytest.raises(torch.OutOfMemoryError):
        run_once(StyleTransfer(size=64, style_layers=("features.1",), content_layer="features.1"), small, data)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("technique", [StyleTransfer(size=64), NeuralTexture(size=64), SuperResolution(size=64)])
def test_networks_of_one_size_are_refused(technique, folder, one_size):
    data = folder({f"{i}.png": (80, 60) for i in range(6)})
    with pytest.raises(NotApplicable, match="Expected 32 but got"):
        run_once(technique, one_size, data)


def test_sizes_that_deep_layers_do_not_take_are_left_out(folder, registry):
    """Of 224 x 112 pixels AlexNet's last pooling leaves some, of half of each side none."""
    alexnet, data = load_model("alexnet@random", registry), folder({"a.png": (224, 112)})
    result = run_once(NeuralTexture(size=224, layers=("features.2", "features.12"), depths=1, steps=2, shifts=1), alexnet, data)
    assert len(table(result, "objective").lines["to features.12"]) == 2
    words = {"size": 224, "style_layers": ("features.2",), "content_layer": "features.12", "coarse": 1, "steps": 2, "shifts": 1}
    result = run_once(StyleTransfer(**words), alexnet, data)
    assert len(table(result, "objective").lines["result"]) == 2


def test_layers_that_a_pass_calls_several_times_are_drawn(folder, registry):
    resnet, data = load_model("resnet18@random", registry), folder({"a.png": (80, 60)})
    result = run_once(GramMatrix(layers=("layer1.0.relu",)), resnet, data)
    assert [a.name for a in result.artifacts if a.name.startswith("gram-")] == ["gram-layer1.0.relu-2"]


def test_thin_pictures_are_left_out_and_told(folder, squeezenet):
    thin, whole = {f"{i}.png": (900, 9) for i in range(10)}, {"3.png": (80, 60)}
    data = folder(thin | whole | {"4.png": (80, 60)})
    for technique in (FastStyleTransfer(size=64, steps=0), MultiStyleTransfer(size=64, stages=2)):
        result = run_once(technique, squeezenet, data)
        assert sum(note.startswith("0.png: a picture of 64 x 1 pixels is too small") for note in result.notes) == 1
        assert sum(a.name.startswith(("transfer-", "styles-")) for a in result.artifacts) == 2
    result = run_once(SuperResolution(size=64, steps=1, batch=1, crop=32, width=2, blocks=1), squeezenet, data)
    assert any(note.startswith("9.png: 64 x 0 pixels are too few") for note in result.notes)
    assert sum(a.name.startswith("enlarged-") for a in result.artifacts) == 1
    for technique in (FastStyleTransfer(size=64), MultiStyleTransfer(size=64), SuperResolution(size=64)):
        with pytest.raises(NotApplicable, match="too small|too few"):
            run_once(technique, squeezenet, data.select(indices=[0, 1, 2, 5, 6]))


def test_of_many_pictures_twenty_are_judged(registry, small):
    photos = load_dataset("more_photos", registry)
    many = replace(photos, ids=[f"{i}.png" for i in range(120)], get=lambda i: photos.get(i % len(photos)).resize((40, 32)))
    result = run_once(SuperResolution(size=32, steps=1, batch=1, crop=16, width=2, blocks=1), small, many)
    assert sum(a.name.startswith("enlarged-") for a in result.artifacts) == 20


# -- settings --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_work")
def test_a_preset_is_for_its_network(folder, registry):
    data = folder({"a.png": (80, 60)})
    for preset, name, called in (
        ("vgg19", "vgg16_features", "VGG-19"),
        ("vgg16", "vgg19@random", "VGG-16"),
        ("vgg16", "squeezenet1_1", "VGG-16"),
    ):
        with pytest.raises(ConfigError, match=f"preset: {preset} names {called}'s layers, and '{name}' is another network"):
            run_once(StyleTransfer(size=64, preset=preset), load_model(name, registry), data)


def test_a_preset_takes_a_network_with_another_head(folder):
    model = LoadedModel(nn.Sequential(OrderedDict(features=VGG16Features().features, head=nn.Conv2d(512, 2, 1))), InputSpec(), "mine")
    result = run_once(StyleTransfer(size=64, coarse=0, shifts=1, steps=0, preset="vgg16"), model, folder({"a.png": (80, 60)}))
    assert any("content at features.20" in note for note in result.notes)


def test_weights_without_measure_give_the_picture_and_say_so(folder, small):
    data = folder({"a.png": (80, 60)})
    result = run_once(StyleTransfer(size=48, coarse=0, shifts=1, steps=3, style_weight=(1.0, 1e39)), small, data)
    assert any("style x 1e+39" in note and "stopped being finite" in note for note in result.notes)
    assert np.isfinite(table(result, "transfer-1").data).all()


def test_a_rate_at_which_nothing_is_learnt_is_told(registry, small):
    with pytest.raises(ConfigError, match="super_resolution.learning_rate: at 1 the loss stops being finite"):
        run_once(
            SuperResolution(size=32, steps=60, batch=2, crop=32, width=8, blocks=8, learning_rate=1),
            small,
            load_dataset("photos", registry),
        )


@pytest.mark.usefixtures("no_work")
def test_what_no_machine_holds_is_refused_and_what_is_needed_is_counted(registry, small, monkeypatch):
    monkeypatch.setattr("harness.device.physical_memory", lambda: 8 * 2**30)
    data = load_dataset("textures", registry)
    tissue = data.select(indices=[data.ids.index("ihc.png")])
    with pytest.raises(ConfigError, match=r"windows of 41 of ihc.png, 512 x 512, need about 15 GB of memory, and there are 8"):
        run_once(WeiLevoyTexture(sample_size=512, window=41), small, tissue)


def test_the_memory_counted_is_what_is_taken():
    sample = np.random.default_rng(0).random((100, 120, 3), dtype=np.float32)
    synthesise(sample[:40, :40], 8, 8, size=5, levels=1, random=np.random.default_rng(0))  # compiles
    for size, levels in ((9, 2), (15, 1)):
        tracemalloc.start()
        synthesise(sample, 64, 64, size=size, levels=levels, random=np.random.default_rng(0))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 0.7 * peak < memory(sample.shape, 64, 64, size, levels) < 1.5 * peak


# -- training --------------------------------------------------------------------------------------------------------------


def test_a_training_does_not_end_at_one_broken_file(folder):
    data = folder({f"{i}.png": (40, 40) for i in range(3)} | {"3.png": None})
    with pytest.warns(RuntimeWarning, match=r"3.png.*another is taken"):
        found = list(islice(trainer.crops(data, 2, 32, 3, torch.device("cpu"), lenient=True), 8))
    with pytest.warns(RuntimeWarning, match=r"3.png"):
        later = next(trainer.crops(data, 2, 32, 3, torch.device("cpu"), start=5, lenient=True))
    assert torch.equal(found[5], later)  # the same in any run
    with pytest.raises(DataError, match=r"3.png"):  # of a technique's pictures all count
        list(islice(trainer.crops(data, 2, 32, 3, torch.device("cpu")), 8))


def test_a_folder_of_broken_files_is_told(folder):
    with pytest.raises(DataError, match=r"0.png"), pytest.warns(RuntimeWarning):
        next(trainer.crops(folder({"0.png": None}), 1, 32, 3, torch.device("cpu"), lenient=True))


def test_lines_and_banners_are_cut_before_they_are_enlarged(folder, monkeypatch):
    sizes = []
    real = trainer.at_size

    def noted(picture, size, channels):
        sizes.append(size)
        return real(picture, size, channels)

    monkeypatch.setattr(trainer, "at_size", noted)
    data = folder({"0.png": (6000, 1), "1.png": (2, 3000)})
    batches = list(islice(trainer.crops(data, 4, 32, 3, torch.device("cpu")), 4))
    assert max(sizes) <= 16 * 32
    assert all(batch.shape == (4, 3, 32, 32) for batch in batches)
    shapes = {batch.shape for batch in islice(trainer.crops(data, 4, 64, 3, torch.device("cpu"), shown=0.6), 4)}
    assert shapes <= {(4, 3, 48, 96), (4, 3, 96, 48)}  # never more than twice as long as wide


@pytest.fixture
def steps(registry, tmp_path, monkeypatch):
    """steps(stop, **recipe) trains until step `stop` and gives the steps that were made; a state is written every four."""
    monkeypatch.setattr(trainer, "SAVED", 4)

    def trained(stop=99, **more):
        seen = []

        def note(what, done, total):
            seen.append(done)
            if done == stop:
                raise KeyboardInterrupt

        try:
            trainer.train_styler("a", recipe(**more), registry, tmp_path / "out", "cpu", note)
        except KeyboardInterrupt:
            assert (tmp_path / "out" / "a.state.safetensors").is_file()
        return seen

    return trained


def test_names_may_change_in_a_training_and_what_they_stand_for_may_not(steps, registry, tmp_path):
    texture = load_dataset("textures", registry)
    for name in ("one.png", "two.png"):
        texture.get(texture.ids.index("ihc.png")).save(tmp_path / name)
    state = tmp_path / "out" / "a.state.safetensors"
    assert steps(stop=5, styles=[str(tmp_path / "one.png")])[-1] == 5
    before = state.read_bytes()
    with pytest.raises(ConfigError, match=r"4 steps of another training .*remove it, or choose another --name or --output"):
        steps(styles=[str(tmp_path / "one.png")], style_weight=1.0)
    assert state.read_bytes() == before
    assert steps(styles=[str(tmp_path / "two.png")], description="in other words") == [5, 6, 7, 8]


def test_a_training_by_another_picture_of_the_same_name_is_another(steps, tmp_path):
    style = tmp_path / "style.png"
    for seed in (0, 1):
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (60, 60, 3)).astype(np.uint8)).save(style)
        if seed:
            with pytest.raises(ConfigError, match="steps of another training"):
                steps(styles=[str(style)])
            (tmp_path / "out" / "a.state.safetensors").unlink()
        assert steps(stop=5, styles=[str(style)]) == [1, 2, 3, 4, 5]
    assert steps(styles=[str(style)]) == [5, 6, 7, 8]  # the same picture: taken up


def test_what_was_trained_can_be_moved(registry, tmp_path, small):
    texture = load_dataset("textures", registry)
    texture.get(texture.ids.index("brick.png")).save(tmp_path / "wall.png")
    trainer.train_styler("mine", recipe(styles=[str(tmp_path / "wall.png")], steps=1), registry, tmp_path / "out", "cpu")
    (tmp_path / "wall.png").unlink()
    shutil.move(tmp_path / "out", tmp_path / "moved")
    found = load_registry([tmp_path / "moved" / "mine.yaml"])
    again = found.styler_recipes["mine"]
    assert found.stylers["mine"].styles == ["wall"] == again.style_names
    assert not Path(again.styles[0]).is_absolute()
    task = trainer.task_of(again, found, "cpu", small)
    wanted = trainer.task_of(recipe(styles=["textures:brick.png"]), registry, "cpu", small)
    assert task.styles == wanted.styles


def test_names_and_styles_that_would_fail_after_the_training_are_told_before(registry, tmp_path):
    with pytest.raises(ConfigError, match="is not UTF-8"):
        trainer.train_styler("a", recipe(styles=["caf\udce9.jpg"]), registry, tmp_path, "cpu")
    Image.new("RGB", (60, 60), (10, 200, 30)).save(tmp_path / "flat.png")
    with pytest.warns(RuntimeWarning, match="flat.png: one colour everywhere"):
        trainer.train_styler("a", recipe(styles=[str(tmp_path / "flat.png")], steps=1), registry, tmp_path / "out", "cpu")


def test_an_entry_names_as_many_styles_as_its_network_has(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "stylers:\n  two:\n    builder: harness.stylers:TransformNet\n    args: {width: 4, blocks: 1}\n    weights: random:0\n    styles: [a, b]\n"
    )
    with pytest.raises(ConfigError, match=r"mine.yaml:2.*names 2 styles, and its network has 1"):
        load_styler("two", load_registry([tmp_path / "mine.yaml"]))


def test_the_smallest_a_styler_takes_is_what_it_says(registry):
    styler = load_styler("ihc_style", registry)
    side = pictures_module.SMALLEST
    assert styler(torch.rand((1, 3, side, 4 * side))).shape == (1, 3, side, 4 * side)
