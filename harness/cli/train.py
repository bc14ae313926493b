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
@click.option("-n", "--name", default="", help="Name of what is trained; default the recipe's.")
@click.option("-d", "--dataset", default="", help="Train on another dataset, or a folder's pictures; every fifth is kept for the test.")
@click.option("--encoder", default="", help="Of a generator: the model whose layer it inverts.")
@click.option("--layer", default="", help="Of a generator: the layer.")
@click.option("--epochs", type=click.IntRange(1, 100_000), help="Passes over the pictures; default the recipe's.")
@click.option("--limit", type=click.IntRange(5), help="Of a network: train on as many pictures, spread evenly.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.pass_obj
def command(
    state: State,
    recipe: str,
    output: Path | None,
    name: str,
    dataset: str,
    encoder: str,
    layer: str,
    epochs: int | None,
    limit: int | None,
    device: str,
) -> None:
    """Train a small network or a generator by a recipe of the registry.

    \b
    harness train digits_cnn
    harness train generator -d my/pictures --encoder squeezenet1_1 --layer features.12 -o my
    """
    from ..errors import ConfigError
    from ..paths import cache_folder
    from ..registry import NAME

    registry = state.registry()
    found = registry.recipe(recipe)
    generator = recipe in registry.generator_recipes
    if (encoder or layer) and not generator:
        raise ConfigError(f"recipe {recipe!r} trains a network; --encoder and --layer are a generator's")
    if limit and generator:
        raise ConfigError(f"recipe {recipe!r} trains a generator; --limit is for networks")
    given = {"dataset": dataset, "encoder": encoder, "layer": layer, "epochs": epochs, "limit": limit}
    changed = {key: value for key, value in given.items() if value}
    if dataset:
        changed["test_dataset"] = ""
    if (encoder or layer) and generator:
        changed["compare"] = ""
    name = name or recipe
    if not NAME.fullmatch(name):
        raise ConfigError(f"--name {name!r}: a name has letters, digits, '_', '.' and '-'")
    registry = registry.with_recipe(name, found, changed)
    from ..train import train

    path, card = train(name, registry, output or cache_folder("weights"), device, report=progress)
    if generator:
        test = card["test"]
        click.echo(
            f"{path}: PSNR {test['psnr']:.1f} dB on {card['test_data']['pictures']} pictures kept apart, {test['same_answer']:.0%} of them "
            f"named alike, sha256 {card['sha256']}"
        )
        click.echo(f"try it: harness -r {path.with_suffix('.yaml')} run -m {card['encoder']['name']} -t deep_generator -p generator={name}")
    else:
        attacked = f", {card['accuracy']['attacked']:.3f} under attack" if "attacked" in card["accuracy"] else ""
        where = card["test_data"]["name"] or f"{card['test_data']['pictures']} pictures kept apart"
        click.echo(f"{path}: accuracy {card['accuracy']['test']:.3f}{attacked} on {where}, sha256 {card['sha256']}")


def progress(what: str, done: int, total: int) -> None:
    click.echo(f"\r{what} {done} of {total}", nl=done == total, err=True)
