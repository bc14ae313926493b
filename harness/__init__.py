"""vision-harness: understand, compare and audit image models.

Names are imported when first used, so that `import harness` and `harness --help` stay quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Arrays": "artifacts",
    "ConfigError": "errors",
    "Context": "context",
    "Curve": "artifacts",
    "EveryMap": "technique",
    "HarnessError": "errors",
    "Heatmaps": "artifacts",
    "Images": "artifacts",
    "Matrix": "artifacts",
    "Metric": "technique",
    "NotApplicable": "errors",
    "Paper": "technique",
    "Param": "technique",
    "Result": "technique",
    "Scatter": "artifacts",
    "Table": "artifacts",
    "TargetSpec": "technique",
    "Technique": "technique",
    "Use": "technique",
    "hookimpl": "hookspecs",
}

__all__ = [
    "Arrays",
    "ConfigError",
    "Context",
    "Curve",
    "EveryMap",
    "HarnessError",
    "Heatmaps",
    "Images",
    "Matrix",
    "Metric",
    "NotApplicable",
    "Paper",
    "Param",
    "Result",
    "Scatter",
    "Table",
    "TargetSpec",
    "Technique",
    "Use",
    "__version__",
    "hookimpl",
]

if TYPE_CHECKING:
    from .artifacts import Arrays, Curve, Heatmaps, Images, Matrix, Scatter, Table
    from .context import Context
    from .errors import ConfigError, HarnessError, NotApplicable
    from .hookspecs import hookimpl
    from .technique import EveryMap, Metric, Paper, Param, Result, TargetSpec, Technique, Use


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
