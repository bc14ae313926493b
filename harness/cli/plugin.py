from __future__ import annotations

from pathlib import Path

import click

from .main import State


@click.group("plugin")
def command() -> None:
    """Write and check plugins."""


@command.command("new")
@click.argument("name")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False), default=Path(), help="Where to make the package's folder."
)
def new(name: str, output: Path) -> None:
    """Make a package with one technique, its entry point and its test."""
    from ..scaffold import scaffold

    folder = scaffold(name, output)
    click.echo(f"{folder}: install it with `pip install -e {folder}`, then `harness plugin check {folder.name}`")


@command.command("check")
@click.argument("package")
@click.pass_obj
def check(state: State, package: str) -> int:
    """Hold a package's techniques to the rules that all techniques keep."""
    from ..errors import ConfigError
    from ..plugins import load_plugins
    from ..testing import check_technique

    plugins = load_plugins()
    broken = [f for f in plugins.failures if package in (f.origin.distribution, f.origin.entry)]
    for failure in broken:
        click.echo(f"PROBLEM {failure}")
    mine = {name: cls for name, (cls, origin) in plugins.offers("techniques").items() if package in (origin.distribution, origin.entry)}
    if not mine and not broken:
        raise ConfigError(f"no installed package {package!r} offers techniques; install it first (pip install -e DIR)")
    bad = len(broken)
    for name, cls in sorted(mine.items()):
        problems = check_technique(cls)
        bad += len(problems)
        click.echo(f"{'PROBLEM' if problems else 'ok     '} {name}")
        for problem in problems:
            click.echo(f"        {problem}")
    return 1 if bad else 0
