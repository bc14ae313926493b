"""Registry files: typed, validated, with file:line in every message."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.cli.main import State
from harness.errors import ConfigError, RegistryError
from harness.registry import load_registry, read_file

SHIPPED = [
    "squeezenet1_1",
    "alexnet",
    "vgg16",
    "vgg16_features",
    "vgg19",
    "googlenet",
    "resnet18",
    "resnet50",
    "resnet101",
    "densenet121",
    "squeezenet1_0",
    "mobilenet_v3_large",
    "convnext_tiny",
    "vit_b_16",
    "digits_linear",
    "digits_cnn",
    "digits_resnet",
]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def problem(tmp_path, text) -> str:
    with pytest.raises(RegistryError) as error:
        load_registry([write(tmp_path, text)])
    return str(error.value)


def test_ships_what_it_says(registry):
    assert set(SHIPPED) <= set(registry.models)
    assert {"imagenet_samples", "cifar10_samples", "photos", "textures", "digits", "cifar10", "mnist"} <= set(registry.datasets)


def test_torchvision_entries_agree_with_torchvision(registry):
    """File name, preprocessing and architecture are torchvision's own."""
    from torchvision.models import get_model_weights, list_models

    count = 0
    for name, entry in registry.models.items():
        if not entry.weights.startswith("torchvision:"):
            continue
        weights = get_model_weights(name)[entry.weights.partition(":")[2]]
        preset = weights.transforms()
        assert name in list_models()
        assert weights.url.endswith("/" + entry.file)
        assert [entry.input.size] == preset.crop_size
        assert [entry.input.resize] == preset.resize_size
        assert entry.input.interpolation == preset.interpolation.value
        assert list(entry.input.mean) == preset.mean
        assert list(entry.input.std) == preset.std
        count += 1
    assert count == 12


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (
            "models:\n  m:\n    builder: torchvision:alexnet\n    wieghts: random:0\n",
            4,
            "models.m.wieghts: unknown key; did you mean 'weights'?",
        ),
        ("models:\n  m:\n    weights: random:0\n", 2, "models.m.builder: missing"),
        ("models:\n  m:\n    builder: alexnet\n", 3, "models.m.builder: must look like 'scheme:name'"),
        ("models:\n  m:\n    builder: a:b\n    input: {size: big}\n", 4, "models.m.input.size: input should be a valid integer"),
        (
            "models:\n  m:\n    builder: a:b\n    input:\n      size: 224\n      meen: [0]\n",
            6,
            "models.m.input.meen: unknown key; did you mean 'mean'?",
        ),
        ("models:\n  m:\n    builder: a:b\n    input: {channels: 1, mean: [0.1, 0.2]}\n", 4, "mean has 2 numbers for 1 channels"),
        ("models:\n  m:\n    builder: a:b\n    input: {size: 224, resize: 100}\n", 4, "resize 100 is below the crop size 224"),
        ("models:\n  m:\n    builder: a:b\n    sha256: abc\n", 4, "models.m.sha256"),
        ("modells:\n  m: {}\n", 1, "modells: unknown section; did you mean 'models'?"),
        ("models: 3\n", 1, "models: must map names to entries"),
        ("models:\n  'a b': {builder: 'a:b'}\n", 2, "models.a b: a name has letters"),
        ("datasets:\n  d: {source: 'folder:x', split: half}\n", 2, "datasets.d.split"),
        ("models:\n  m: {builder: 'a:b'}\n  m: {builder: 'c:d'}\n", 3, "duplicate key"),
        ("models:\n  m: {builder: a:b\n", 3, ""),
        ("models:\n  m:\n    builder: !!python/object:os.system x\n", 3, "not allowed here"),
        ("- a\n", 1, "a registry holds the sections"),
    ],
)
def test_each_mistake_is_one_line_with_its_place(tmp_path, text, line, message):
    found = problem(tmp_path, text)
    assert "\n" not in found
    assert f"mine.yaml:{line}: " in found
    assert message in found


def test_all_mistakes_are_told_at_once(tmp_path):
    found = problem(tmp_path, "models:\n  a: {bilder: 'x:y'}\n  b: {builder: 3}\ndatasets:\n  c: {}\n").splitlines()
    assert [line.partition(": ")[0].rpartition(":")[2] for line in found] == ["2", "2", "3", "5"]


def test_a_missing_file_and_text_that_is_not_text(tmp_path):
    with pytest.raises(RegistryError, match=r"none.yaml: cannot be read: No such file"):
        load_registry([tmp_path / "none.yaml"])
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(RegistryError, match="not UTF-8"):
        load_registry([tmp_path / "b.yaml"])


def test_a_yaml_bomb_is_refused_quickly(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    assert "expand to more than" in problem(tmp_path, "\n".join(lines))
    assert "refused" in problem(tmp_path, "models: &m\n  a: *m\n")
    assert "larger than" in problem(tmp_path, "#" * 1_100_000)


def test_a_users_file_lies_over_ours(tmp_path, monkeypatch):
    text = "models:\n  resnet18:\n    builder: torchvision:resnet34\n  mine:\n    builder: ./net.py:Net\n"
    path = write(tmp_path, text)
    merged = load_registry([path])
    assert merged.model("resnet18").builder == "torchvision:resnet34"
    assert merged.model("mine").folder == tmp_path
    assert merged.model("mine").where == f"{path}:4"
    assert "alexnet" in merged.models
    monkeypatch.setenv("HARNESS_REGISTRY", str(path))
    assert "mine" in load_registry().models
    state = State([Path("other.yaml")], False, ["-r", "other.yaml", "run", "-m", "mine"])
    assert state.used_registries() == [str(path), "other.yaml"]
    assert state.command() == f"harness -r {path} -r other.yaml run -m mine"
    again = State([path, Path("other.yaml")], False, ["-r", str(path), "-r", "other.yaml", "run", "-m", "mine"])
    assert again.command() == state.command() and again.used_registries() == state.used_registries()


def test_anchors_and_exponents_are_yaml_1_2(tmp_path):
    path = write(tmp_path, "recipes:\n  a: &a {builder: 'a:b', dataset: d, test_dataset: t, epochs: 1, learning_rate: 1e-3}\n  b: *a\n")
    assert read_file(path)["recipes"]["b"].learning_rate == 0.001


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", "no model 'resnet81'; did you mean 'resnet18'"),
        ("resnet18@randm", "after '@' only 'random' or 'random:SEED'"),
        ("resnet18@random:x", "after '@'"),
        ("nothing_like_it", "`harness models` lists them"),
    ],
)
def test_unknown_models(registry, name, message):
    with pytest.raises(ConfigError, match=message):
        registry.model(name)


def test_random_variants(registry):
    assert registry.model("vgg16@random").weights == "random:0"
    assert registry.model("vgg16@random:7").weights == "random:7"
    assert registry.model("squeezenet1_1@random").sha256 is None


def test_unknown_datasets(registry, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        registry.dataset("digit")
    with pytest.raises(ConfigError, match="no such folder"):
        registry.dataset(str(tmp_path / "none"))
    assert registry.dataset(str(tmp_path)).source == f"folder:{tmp_path}"
