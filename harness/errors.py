"""Every error a user may meet. Each says in one line what is wrong, where, and what to do.

HarnessError                exit code 1
├── ConfigError             exit code 2: bad usage, configuration or input
│   ├── RegistryError       a registry or experiment file
│   ├── PluginError         plugins that cannot be used together, or at all
│   ├── DataError           a picture or a dataset
│   └── WeightsError        weights that are missing, altered or not safe to read
├── NotApplicable           the technique does not apply to this model and data; recorded, not a failure
├── TrackingError           the tracking server cannot be used
└── StorageError            results cannot be written (exit code 2)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HarnessError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line exits with."""

    exit_code = 1


class ConfigError(HarnessError):
    exit_code = 2


class RegistryError(ConfigError):
    pass


class PluginError(ConfigError):
    pass


class DataError(ConfigError):
    pass


class WeightsError(ConfigError):
    pass


class NotApplicable(HarnessError):
    pass


class TrackingError(HarnessError):
    pass


class StorageError(ConfigError):
    pass


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """'; did you mean X or Y?' for the nearest of the known names, or an empty string."""
    by_lower = {k.lower(): k for k in known}
    near = [by_lower[n] for n in difflib.get_close_matches(str(name).lower(), by_lower, n=3, cutoff=0.6)]
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def unknown(kind: str, name: object, known: Iterable[str], listing: str = "") -> ConfigError:
    """The one way to say that a name does not exist."""
    known = list(known)
    hint = did_you_mean(name, known)
    if not hint and 0 < len(known) <= 12:
        hint = f"; there is {', '.join(sorted(known))}"
    if listing:
        hint += f" ({listing} lists them)"
    return ConfigError(f"no {kind} {str(name)!r}{hint}")
