from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
@click.option(
    "-d",
    "--dataset",
    default="",
    help="Train on another dataset, or a folder's pictures; but for stylers every fifth is kept for the test.",
)
@click.option("--encoder", default="", help="Of a generator: the model whose layer it inverts.")
@click.option("--layer", default="", help="Of a generator: the layer.")
@click.option("--epochs", type=click.IntRange(1, 100_000), help="Passes over the pictures; default the recipe's.")
@click.option("--limit", type=click.IntRange(5), help="Of a network: train on as many pictures, spread evenly.")
@click.option("--style", multiple=True, help="Of a styler: a picture, as DATASET:ID or a path; several make one network of several styles.")
@click.option("--base", default="", help="Of a styler: one that is to learn these styles besides its own.")
@click.option("--start", default="", help="Of a styler: one to begin as, whose width, blocks and norm it has; default the recipe's.")
@click.option("--steps", type=click.IntRange(1, 100_000), help="Of a styler: training steps; default the recipe's.")
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
    style: tuple[str, ...],
    base: str,
    start: str,
    steps: int | None,
    device: str,
) -> None:
    """Train a small network, a generator or a network of styles by a recipe of the registry.

    \b
    harness train digits_cnn
    harness train generator -d my/pictures --encoder squeezenet1_1 --layer features.12 -o my
    harness train ihc_style -d my/pictures --style my/painting.jpg -n painting -o my
    """
    from ..errors import ConfigError
    from ..paths import cache_folder
    from ..registry import NAME

    registry = state.registry()
    found = registry.recipe(recipe)
    kind = "generator" if recipe in registry.generator_recipes else "styler" if recipe in registry.styler_recipes else "network"
    given: dict[str, Any] = {"dataset": dataset, "encoder": encoder, "layer": layer, "epochs": epochs, "limit": limit}
    given |= {"style": style, "base": base, "start": start, "steps": steps}
    takes = {
        "network": {"dataset", "epochs", "limit"},
        "generator": {"dataset", "encoder", "layer", "epochs"},
        "styler": {"dataset", "encoder", "style", "base", "start", "steps"},
    }
    for key, value in given.items():
        if value and key not in takes[kind]:
            raise ConfigError(f"recipe {recipe!r} trains a {kind}, which has no --{key}; it takes --{', --'.join(sorted(takes[kind]))}")
    if base and start:
        raise ConfigError("--base learns further styles by a network, --start learns anew from one: give one of them")
    changed = {key: value for key, value in given.items() if value}
    if base or start:
        changed |= {"base": base, "start": start}
    if dataset and kind != "styler":
        changed["test_dataset"] = ""
    if (encoder or layer) and kind == "generator":
        changed["compare"] = ""
    if style:
        changed["styles"] = [absolute(s) for s in changed.pop("style")]
        changed["style_names"], changed["style_shares"] = [], []
    name = name or recipe
    if not NAME.fullmatch(name):
        raise ConfigError(f"--name {name!r}: a name has letters, digits, '_', '.' and '-'")
    registry = registry.with_recipe(name, found, changed)
    from ..train import train

    with told():
        path, card = train(name, registry, output or cache_folder("weights"), device, report=progress)
    if kind == "generator":
        test = card["test"]
        click.echo(
            f"{path}: PSNR {test['psnr']:.1f} dB on {card['test_data']['pictures']} pictures kept apart, {test['same_answer']:.0%} of them "
            f"named alike, sha256 {card['sha256']}"
        )
        click.echo(f"try it: harness -r {path.with_suffix('.yaml')} run -m {card['encoder']['name']} -t deep_generator -p generator={name}")
    elif kind == "styler":
        lost = {k: v[-1] for k, v in card["losses"].items()}
        click.echo(f"{path}: content error {lost['content']:.3f}, style error {lost['style']:.3f} at the end, sha256 {card['sha256']}")
        technique = "multi_style_transfer" if len(card["styles"]) > 1 else "fast_style_transfer"
        click.echo(
            f"try it: harness -r {path.with_suffix('.yaml')} run -m {card['encoder']['name']} -d photos -t {technique} -p styler={name}"
        )
    else:
        attacked = f", {card['accuracy']['attacked']:.3f} under attack" if "attacked" in card["accuracy"] else ""
        where = card["test_data"]["name"] or f"{card['test_data']['pictures']} pictures kept apart"
        click.echo(f"{path}: accuracy {card['accuracy']['test']:.3f}{attacked} on {where}, sha256 {card['sha256']}")
        data = card["test_data"]["name"] or card["data"]["name"]
        click.echo(f"try it: harness -r {path.with_suffix('.yaml')} audit {name} -d {data}")


@contextmanager
def told() -> Iterator[None]:
    """Warnings as lines of their own, each once."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: click.echo(f"\rwarning: {message}", err=True)
        yield


def absolute(style: str) -> str:
    """A path of the command line starts where that was given, not at the recipe's file."""
    from ..datasets import picture_place

    return style if picture_place(style) else str(Path(style).expanduser().absolute())


def progress(what: str, done: int, total: int) -> None:
    click.echo(f"\r{what} {done} of {total}", nl=done == total, err=True)
