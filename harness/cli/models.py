from __future__ import annotations

import json

import click

from .main import State


@click.command("models")
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
@click.pass_obj
def command(state: State, as_json: bool) -> None:
    """List the models of the registry, and whether their weights are here."""
    from ..errors import HarnessError
    from ..weights import weights_present

    rows = []
    for name, entry in sorted(state.registry().models.items()):
        try:
            present, hint = weights_present(name, entry, hint=as_json)
        except HarnessError as error:
            present, hint = False, str(error)
        rows.append(
            {
                "name": name,
                "weights": present,
                "description": entry.description,
                "builder": entry.builder,
                "where": entry.where,
                "obtain": hint,
            }
        )
    if as_json:
        click.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    width = max(len(str(r["name"])) for r in rows)
    for r in rows:
        click.echo(f"{r['name']:{width}}  {'here    ' if r['weights'] else 'download'}  {r['description']}")
    click.echo("Any of them as NAME@random[:SEED] has seeded random weights.")
