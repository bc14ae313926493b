"""Weights: read without running code, pinned, and with a way to get them."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from harness.errors import ConfigError, WeightsError
from harness.models import load_model
from harness.registry import load_registry
from harness.weights import read_numpy_pickle, read_weights, weights_hash, weights_present


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


@pytest.mark.parametrize("name", ["w.pkl", "w.pth", "w.safetensors"])
def test_rubbish_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"rubbish")
    with pytest.raises(WeightsError, match="cannot be read"):
        read_weights(tmp_path / name)


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


def test_a_path_does_not_leave_its_package(tmp_path):
    with pytest.raises(ConfigError, match="leads out of"):
        weights_hash("mine", overlay(tmp_path, weights="package:harness/../../x.pth").model("mine"))
