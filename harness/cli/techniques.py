from __future__ import annotations

import json

import click

from .main import State


@click.command("techniques")
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
@click.pass_obj
def command(state: State, as_json: bool) -> None:
    """List the techniques that are installed."""
    plugins = state.plugins()
    offers = plugins.offers("techniques")
    if as_json:
        found = [
            {
                "name": name,
                "family": cls.family,
                "version": cls.version,
                "summary": cls.summary(),
                "needs": sorted(cls.needs),
                "package": str(offers[name][1]),
                "parameters": cls.model_json_schema().get("properties", {}),
            }
            for name, cls in plugins.techniques.items()
        ]
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    width = max(len(name) for name in plugins.techniques)
    for name, cls in plugins.techniques.items():
        click.echo(f"{name:{width}}  {shorten(cls.summary(), 100)}")


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3].rsplit(" ", 1)[0] + "..."
