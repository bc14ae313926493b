from __future__ import annotations

import json

import click

from .main import State


@click.command("datasets")
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
@click.pass_obj
def command(state: State, as_json: bool) -> None:
    """List the datasets of the registry."""
    entries = sorted(state.registry().datasets.items())
    if as_json:
        rows = [{"name": n, "description": e.description, "source": e.source, "license": e.license, "where": e.where} for n, e in entries]
        click.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    width = max(len(name) for name, _ in entries)
    for name, entry in entries:
        click.echo(f"{name:{width}}  {entry.description}")
    click.echo("A folder of images is named by its path: -d ./pictures (one subfolder a class, or none).")
