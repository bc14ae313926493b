"""What tests share: real small models and data, and a state folder of their own."""

from __future__ import annotations

import os

# Two test processes share two cores; libraries read this when they are loaded.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import shutil
from pathlib import Path

import pytest
import torch

from harness.models import LoadedModel, load_model
from harness.plugins import Plugins, load_plugins
from harness.registry import InputSpec, Registry, load_registry

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session")
def registry() -> Registry:
    return load_registry()


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    return load_plugins()


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its schema: making one takes seconds, copying it nothing."""
    from harness.tracking import Tracker

    root = tmp_path_factory.mktemp("store")
    Tracker(f"sqlite:///{root / 'mlflow.db'}", root)
    return root / "mlflow.db"


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Path:
    """Runs and caches go to the test's own folder; nothing of the developer's environment reaches it."""
    for name in ("MLFLOW_TRACKING_URI", "HARNESS_REGISTRY", "HARNESS_SKIP_PLUGINS", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    runs = tmp_path / "harness-runs"
    runs.mkdir()
    shutil.copy(empty_store, runs / "mlflow.db")
    monkeypatch.setenv("HARNESS_RUNS", str(runs))
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return runs


@pytest.fixture(scope="session")
def digits_cnn(registry: Registry) -> LoadedModel:
    return load_model("digits_cnn", registry)


@pytest.fixture(scope="session")
def digits_linear(registry: Registry) -> LoadedModel:
    return load_model("digits_linear", registry)


@pytest.fixture(scope="session")
def squeezenet(registry: Registry) -> LoadedModel:
    return load_model("squeezenet1_1", registry)


@pytest.fixture
def plain_spec() -> InputSpec:
    """Pixels as they are: mean 0, std 1, one channel, 6 x 6."""
    return InputSpec(channels=1, size=6, mean=(0.0,), std=(1.0,))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones, which have a time limit of their own, come first: two processes then end at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)
