from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .audit import PROFILES, audit
from .execute import run_options
from .main import State


@click.command("compare")
@click.argument("models", nargs=-1, required=True)
@click.option("-d", "--dataset", default="imagenet_samples", show_default=True, help="Dataset, or a folder's path.")
@click.option("--profile", type=click.Choice(PROFILES), default="standard", show_default=True, help="How much to run.")
@click.option("-p", "--param", "params", multiple=True, metavar="TECHNIQUE.NAME=VALUE", help="Change a parameter of the profile.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("out/compare"),
    show_default=True,
    help="Folder of the report.",
)
@click.option("--format", "formats", multiple=True, help="html, pdf, json; default all three.")
@run_options
@click.pass_obj
def command(state: State, /, models: tuple[str, ...], dataset: str, output: Path, **options: Any) -> int:
    """Compare models: the same techniques on each, side by side in one report."""
    from ..errors import ConfigError

    if len(set(models)) < 2:
        raise ConfigError("compare needs at least two different models")
    return audit(state, models, dataset, output, "compare", f"Comparison of {', '.join(models)} on {dataset}", "compare", **options)
