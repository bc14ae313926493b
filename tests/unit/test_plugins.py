"""Plugins: isolated, spelt right, unique."""

from __future__ import annotations

import types

import pytest

from harness import Heatmaps, Param, Result, Technique, hookimpl
from harness.errors import ConfigError, PluginError
from harness.plugins import Origin, discover


class Alpha(Technique):
    """A technique."""

    name = "alpha"
    x: int = Param(1, description="x")

    def run(self, ctx):
        return Result([Heatmaps("m", [[[1.0]]])])


def module(**functions):
    made = types.ModuleType("made")
    for name, function in functions.items():
        setattr(made, name, hookimpl(function))
    return made


def entries(**loaders):
    return [(Origin(f"dist-{name}", "1.0", name), loader) for name, loader in loaders.items()]


def raises():
    raise ImportError("no module named torchh")


GOOD = module(harness_techniques=lambda: [Alpha])


def test_a_plugin_that_raises_is_named_and_stops_nothing():
    plugins = discover(entries(a=raises, b=lambda: GOOD))
    assert list(plugins.techniques) == ["alpha"]
    assert str(plugins.failures[0]) == "plugin 'a' of dist-a 1.0: ImportError: no module named torchh"
    assert "Traceback" in plugins.failures[0].traceback
    with pytest.raises(PluginError, match=r"no technique 'beta'.*failed to load: plugin 'a' of dist-a 1.0"):
        plugins.technique("beta")


def test_a_plugin_that_exits_ends_nothing():
    def leave():
        raise SystemExit(7)

    plugins = discover(entries(a=leave, b=lambda: GOOD))
    assert list(plugins.techniques) == ["alpha"]
    assert "SystemExit: 7" in str(plugins.failures[0])


def test_a_hook_that_raises_is_named_and_stops_nothing():
    plugins = discover(entries(a=lambda: module(harness_techniques=lambda: 1 / 0), b=lambda: GOOD))
    assert list(plugins.techniques) == ["alpha"]
    assert "ZeroDivisionError" in str(plugins.failures[0])


def test_a_misspelt_hook_is_found():
    plugins = discover(entries(a=lambda: module(harness_tecniques=lambda: [Alpha])))
    assert "unknown hook 'harness_tecniques'; did you mean 'harness_techniques'" in str(plugins.failures[0])
    assert plugins.techniques == {}


def test_an_unknown_argument_is_found():
    plugins = discover(entries(a=lambda: module(harness_techniques=lambda colour: [Alpha]), b=lambda: GOOD))
    assert "colour" in str(plugins.failures[0])
    assert list(plugins.techniques) == ["alpha"]


def test_what_is_not_a_technique_is_found():
    plugins = discover(entries(a=lambda: module(harness_techniques=lambda: [int]), b=lambda: GOOD))
    assert list(plugins.techniques) == ["alpha"]
    assert "not a Technique class" in str(plugins.failures[0])


def test_a_name_offered_twice_names_both_packages():
    plugins = discover(entries(a=lambda: GOOD, b=lambda: module(harness_techniques=lambda: [Alpha])))
    with pytest.raises(
        PluginError, match=r"technique 'alpha' is offered by both dist-. 1.0 \(.\) and dist-. 1.0 \(.\).*HARNESS_SKIP_PLUGINS"
    ):
        _ = plugins.techniques


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'alpha'"):
        discover(entries(b=lambda: GOOD)).technique("alfa")


def test_built_ins_come_through_the_same_door(plugins):
    from importlib.metadata import entry_points

    assert plugins.failures == []
    names = {e.name for e in entry_points(group="harness")}
    assert {o.entry for o in plugins.origins.values()} <= names
    assert {"saliency", "occlusion", "first_layer_filters", "nearest_neighbors", "class_visualization"} <= set(plugins.techniques)


def test_skipping_by_environment(monkeypatch):
    from harness import plugins as module_

    monkeypatch.setenv("HARNESS_SKIP_PLUGINS", "harness_saliency, other")
    found = module_.discover(module_._installed())
    assert "saliency" not in found.techniques
    assert "first_layer_filters" in found.techniques


def test_one_plugins_trouble_with_an_event_does_not_reach_the_next():
    heard = []

    def bad(session, spec, key):
        raise RuntimeError("no")

    plugins = discover(
        entries(a=lambda: module(harness_run_started=lambda key: heard.append(key)), b=lambda: module(harness_run_started=bad))
    )
    errors = plugins.call("harness_run_started", session=None, spec=None, key="k")
    assert heard == ["k"]
    assert [str(e) for e in errors] == ["no"]


def test_parameters_say_what_is_wrong():
    for params, message in [
        ({"xx": 1}, "alpha.xx: unknown key; did you mean 'x'"),
        ({"x": "many"}, "alpha.x: input should be a valid integer"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Alpha.build(params)


def test_public_names_are_there():
    import harness

    for name in harness.__all__:
        assert getattr(harness, name) is not None
    with pytest.raises(AttributeError):
        _ = harness.no_such_name
