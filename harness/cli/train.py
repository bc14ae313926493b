from __future__ import annotations

from pathlib import Path

import click

from .main import State


@click.command("train")
@click.argument("recipe")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the weights and their card; default the user's cache.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.pass_obj
def command(state: State, recipe: str, output: Path | None, device: str) -> None:
    """Train a small network by a recipe of the registry."""
    from ..paths import cache_folder

    registry = state.registry()
    registry.recipe(recipe)
    from ..train import train

    path, card = train(recipe, registry, output or cache_folder("weights"), device)
    click.echo(f"{path}: accuracy {card['accuracy']['test']:.3f} on {card['test_data']['name']}, sha256 {card['sha256']}")
