from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from .main import State


@click.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
@click.pass_obj
def command(state: State, name: str, as_json: bool) -> None:
    """Show a model's layers, a technique's parameters or a dataset."""
    from ..errors import unknown

    registry, plugins = state.registry(), state.plugins()
    if name in plugins.techniques:
        return _technique(plugins, name, as_json)
    if name.partition("@")[0] in registry.models:
        return _model(registry, name, as_json)
    if name in registry.datasets or "/" in name:
        return _dataset(registry, name, as_json)
    raise unknown("model, technique or dataset", name, [*registry.models, *plugins.techniques, *registry.datasets])


def _technique(plugins: Any, name: str, as_json: bool) -> None:
    cls = plugins.technique(name)
    if as_json:
        click.echo(json.dumps(cls.model_json_schema(), indent=1, ensure_ascii=False))
        return
    click.echo(f"{name} (version {cls.version}, from {plugins.offers('techniques')[name][1]})\n{cls.summary()}")
    if cls.paper:
        click.echo(f"{cls.paper.authors} ({cls.paper.year}). {cls.paper.title}. {cls.paper.url}")
    click.echo(f"needs: {', '.join(sorted(cls.needs)) or 'only a model'}")
    for parameter, value in cls.model_fields.items():
        click.echo(f"  {parameter} = {json.dumps(value.default)}\n      {value.description}")


def _model(registry: Any, name: str, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..layers import layer_table
    from ..models import load_model

    model = load_model(name, registry)
    rows = layer_table(model)
    if as_json:
        click.echo(json.dumps([asdict(r) for r in rows], indent=1))
        return
    spec = model.input
    click.echo(f"{name}: {registry.model(name).description}")
    classes = len(model.classes) or "no"
    click.echo(f"input {spec.channels} x {spec.size} x {spec.size} in [0, 1], {classes} named classes, weights {model.weights[:16]}")
    table = Table("layer", "kind", "output", "receptive field", "stride", "parameters", box=None, pad_edge=False)
    for r in rows:
        field = "" if r.receptive_field is None else "whole" if r.receptive_field == 0 else str(r.receptive_field)
        table.add_row(r.name, r.kind, " x ".join(map(str, r.shape)), field, "" if r.stride is None else str(r.stride), f"{r.parameters:,}")
    Console(width=max(100, Console().width), markup=False, highlight=False).print(table)


def _dataset(registry: Any, name: str, as_json: bool) -> None:
    from ..datasets import load_dataset

    data = load_dataset(name, registry)
    if data.remark:
        click.echo(f"warning: {data.remark}", err=True)
    facts = {
        "name": name,
        "description": registry.dataset(name).description,
        "pictures": len(data),
        "labelled": data.labels is not None,
        "classes": len(data.classes),
        "fingerprint": data.fingerprint,
        "license": registry.dataset(name).license,
    }
    if as_json:
        click.echo(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    for key, value in facts.items():
        click.echo(f"{key}: {value}")
