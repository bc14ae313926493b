"""Find plugins through the entry-point group `harness`; one that is broken is reported and stops nothing else.

`HARNESS_SKIP_PLUGINS` names entry points or distributions to leave out, separated by commas.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from . import hookspecs
from .errors import ConfigError, PluginError, did_you_mean, unknown
from .technique import EveryMap, Technique, Use

GROUP = hookspecs.PROJECT


@dataclass(frozen=True)
class Origin:
    """Which package a plugin came from."""

    distribution: str
    version: str
    entry: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


@dataclass(frozen=True)
class Failure:
    """A plugin that could not be used."""

    origin: Origin
    problem: str
    traceback: str

    def __str__(self) -> str:
        return f"plugin {self.origin.entry!r} of {self.origin}: {self.problem}"


@dataclass
class Plugins:
    """The plugins that loaded, what they offer, and those that failed."""

    manager: pluggy.PluginManager
    origins: dict[str, Origin] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    _offers: dict[str, dict[str, tuple[Any, Origin]]] = field(default_factory=dict)

    def offers(self, kind: str) -> dict[str, tuple[Any, Origin]]:
        """{name: (object, origin)} of one kind: techniques, model_builders, weight_sources, datasets, renderers."""
        if kind not in self._offers:
            found: dict[str, tuple[Any, Origin]] = {}
            for name, value, origin in self._collect(kind):
                if name in found:
                    other = found[name][1]
                    skip = origin.entry if origin.distribution == other.distribution else origin.distribution
                    raise PluginError(
                        f"{kind.removesuffix('s').replace('_', ' ')} {name!r} is offered by both {other} ({other.entry}) and "
                        f"{origin} ({origin.entry}); uninstall one or set HARNESS_SKIP_PLUGINS={skip}"
                    )
                found[name] = (value, origin)
            self._offers[kind] = found
        return self._offers[kind]

    def _collect(self, kind: str) -> Iterator[tuple[str, Any, Origin]]:
        # Implementations are called one by one: a hook call as a whole would end at the first that raises.
        for impl in getattr(self.manager.hook, f"harness_{kind}").get_hookimpls():
            origin = self.origins[impl.plugin_name]
            try:
                offered = impl.function()
                if kind == "techniques":
                    pairs = [(_technique(t).name, t) for t in offered]
                else:
                    pairs = list(dict(offered).items())
            except Exception as error:
                self.failures.append(_failure(origin, error))
                continue
            for name, value in pairs:
                yield name, value, origin

    @property
    def techniques(self) -> dict[str, type[Technique]]:
        return {name: cls for name, (cls, _) in sorted(self.offers("techniques").items())}

    def technique(self, name: str) -> type[Technique]:
        """The technique of that name, or an error with the nearest names and the plugins that failed to load."""
        return self._get("techniques", "technique", name, "`harness techniques`")

    def uses(self, technique: Technique) -> list[Use]:
        """What a technique builds on, `EveryMap` spelt out in the order of names."""
        found: list[Use] = []
        for use in technique.uses():
            found += self._maps(use, technique.name) if isinstance(use, EveryMap) else [use]
        return found

    def _maps(self, wanted: EveryMap, asker: str) -> Iterator[Use]:
        maps = {name: cls for name, cls in self.techniques.items() if cls.attribution}
        for name in wanted.only:
            if self.technique(name).name not in maps:
                raise ConfigError(f"{asker}: {name!r} gives no map of a picture's pixels; there is {', '.join(maps)}")
        for name in wanted.only or maps:
            cls = maps[name]
            params = dict(cls.draft if wanted.profile == "draft" else cls.audit.get(wanted.profile, {}))
            if "target" in cls.model_fields:
                params["target"] = wanted.target
            yield Use(name, params, optional=True)

    def get(self, kind: str, name: str) -> Any:
        return self._get(kind, kind.removesuffix("s").replace("_", " "), name)

    def _get(self, kind: str, word: str, name: str, listing: str = "") -> Any:
        offers = self.offers(kind)
        if name in offers:
            return offers[name][0]
        error = unknown(word, name, offers, listing)
        if self.failures:
            broken = "; ".join(map(str, self.failures))
            raise PluginError(f"{error}; it may belong to what failed to load: {broken} (see `harness doctor`)")
        raise error

    def call(self, hook: str, **arguments: Any) -> list[Exception]:
        """Tell every plugin; errors are returned, so that one plugin's trouble does not reach the others."""
        errors: list[Exception] = []
        for impl in getattr(self.manager.hook, hook).get_hookimpls():
            try:
                impl.function(*(arguments[name] for name in impl.argnames))
            except Exception as error:
                errors.append(error)
        return errors


def _technique(cls: Any) -> type[Technique]:
    if not (isinstance(cls, type) and issubclass(cls, Technique)):
        raise TypeError(f"harness_techniques returned {cls!r}, which is not a Technique class")
    return cls


def _failure(origin: Origin, error: BaseException) -> Failure:
    text = " ".join(str(error).split())
    return Failure(origin, f"{type(error).__name__}: {text}" if text else type(error).__name__, traceback.format_exc())


def discover(entries: list[tuple[Origin, Callable[[], Any]]]) -> Plugins:
    """Load and register each entry on its own; what fails is recorded, unregistered and left out."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    known_hooks = [name for name in vars(hookspecs) if name.startswith(f"{GROUP}_")]
    plugins = Plugins(manager)
    for origin, load in entries:
        name = f"{origin.distribution}:{origin.entry}"
        module = None
        try:
            module = load()
            manager.register(module, name)
            _check_spelling(manager, module, known_hooks)
        except (Exception, SystemExit) as error:  # a module that exits must not end the harness
            plugins.failures.append(_failure(origin, error))
            if module is not None and manager.has_plugin(name):
                manager.unregister(name=name)
        else:
            plugins.origins[name] = origin
    return plugins


def _check_spelling(manager: pluggy.PluginManager, module: Any, known: list[str]) -> None:
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        for caller in manager.get_hookcallers(module) or ():
            if not caller.has_spec():
                raise PluginError(f"unknown hook {caller.name!r}{did_you_mean(caller.name, known)}") from error
        raise


def _installed() -> list[tuple[Origin, Callable[[], Any]]]:
    skip = {s.strip() for s in os.environ.get("HARNESS_SKIP_PLUGINS", "").split(",") if s.strip()}
    found: dict[tuple[str, str], tuple[Origin, EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        dist = entry.dist
        origin = Origin(dist.name if dist else "unknown", dist.version if dist else "0", entry.name)
        if not skip & {origin.entry, origin.distribution}:
            found.setdefault((origin.distribution, origin.entry), (origin, entry))
    return [(origin, entry.load) for _, (origin, entry) in sorted(found.items(), key=lambda item: item[0])]


@cache
def load_plugins() -> Plugins:
    """The plugins installed in this environment; loaded once."""
    return discover(_installed())


def distributions(plugins: Plugins) -> Mapping[str, str]:
    """{distribution: version} of every plugin that loaded."""
    return {o.distribution: o.version for o in plugins.origins.values()}
