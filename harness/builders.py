"""Build a network from the `builder` of a registry entry: `torchvision:NAME`, `package.module:Class` or `file.py:Class`.

Imports torch only when a network is built: this module is loaded with the plugins.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .device import seeded
from .errors import ConfigError, WeightsError, did_you_mean, unknown
from .hookspecs import hookimpl
from .registry import ModelEntry
from .weights import load_weights

if TYPE_CHECKING:
    from torch import nn


def build_module(name: str, entry: ModelEntry) -> nn.Module:
    """The network of an entry with the weights its `weights` names."""
    import torch

    from .plugins import load_plugins

    state = load_weights(name, entry)
    scheme, _, rest = entry.builder.partition(":")
    builders = load_plugins().offers("model_builders")
    seed = int(entry.weights.partition(":")[2]) if state is None else 0
    with seeded(seed):
        try:
            if scheme in builders:
                module = builders[scheme][0](rest, **entry.args)
            else:
                module = _import(entry, f"{scheme}:{rest}")(**entry.args)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{entry.where}: model {name!r}: {entry.builder} with {dict(entry.args)}: {error}") from error
    if not isinstance(module, torch.nn.Module):
        raise ConfigError(f"{entry.where}: model {name!r}: {entry.builder} gave a {type(module).__name__}, not a torch.nn.Module")
    if state is not None:
        try:
            module.load_state_dict(dict(state))
        except (RuntimeError, AttributeError) as error:
            problem = " ".join(str(error).split())[:300]
            raise WeightsError(f"{entry.where}: the weights of {name!r} do not fit {entry.builder}: {problem}") from None
    return module


def _import(entry: ModelEntry, path: str) -> Any:
    """The class or function of 'module.path:Name' or 'file.py:Name' (relative to the registry file)."""
    where, _, attribute = path.rpartition(":")
    try:
        if where.endswith(".py"):
            file = entry.folder / Path(where).expanduser()
            if not file.is_file():
                raise ConfigError(f"{entry.where}: builder {path!r}: there is no file {file}")
            spec = importlib.util.spec_from_file_location(f"harness_user_{file.stem}", file)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{entry.where}: builder {path!r}: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise ConfigError(f"{entry.where}: builder {path!r}: {where} has no {attribute!r}{did_you_mean(attribute, public)}")
    return getattr(module, attribute)


def _torchvision(name: str, **args: Any) -> nn.Module:
    from torchvision.models import get_model, list_models

    if name not in list_models():
        raise unknown("torchvision model", name, list_models())
    return get_model(name, weights=None, **args)


@hookimpl
def harness_model_builders() -> Mapping[str, Any]:
    return {"torchvision": _torchvision}
