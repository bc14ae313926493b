from __future__ import annotations

import shutil
from ctypes.util import find_library

import click

from .main import State


@click.command("doctor")
@click.pass_obj
def command(state: State) -> int:
    """Check versions, device, plugins, registry, weights and the PDF's system libraries."""
    from .. import __version__
    from ..device import device_kind
    from ..errors import HarnessError
    from ..paths import EXTRAS, cache_folder, package_folder, runs_folder, with_extra
    from ..plugins import load_plugins
    from ..runner import versions
    from ..weights import weights_present

    trouble = 0

    def say(good: bool, text: str) -> None:
        nonlocal trouble
        trouble += not good
        click.echo(f"{'ok      ' if good else 'PROBLEM '} {text}")

    say(True, f"vision-harness {__version__}; " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    say(True, f"device: {device_kind('auto')}; runs in {runs_folder()}; cache {cache_folder('weights').parent}")
    free = shutil.disk_usage(next(p for p in (runs_folder(), *runs_folder().parents) if p.exists())).free
    say(free > 1e9, f"{free / 1e9:.1f} GB free for runs")
    plugins = load_plugins()
    for kind in ("techniques", "model_builders", "weight_sources", "datasets", "renderers"):
        try:
            offers = plugins.offers(kind)
            say(True, f"{len(offers)} {kind.replace('_', ' ')}: {', '.join(sorted(offers))}")
        except HarnessError as error:
            say(False, str(error))
    for failure in plugins.failures:
        say(False, str(failure))
        if state.debug:
            click.echo(failure.traceback)
    try:
        registry = state.registry()
    except HarnessError as error:
        for text in str(error).splitlines():
            say(False, text)
        return 1
    say(True, f"registry: {', '.join(map(str, registry.files))}")
    for name, entry in sorted(registry.models.items()):
        try:
            present, hint = weights_present(name, entry)
        except HarnessError as error:
            say(False, f"model {name}: {error}")
            continue
        click.echo(f"{'ok      ' if present else 'absent  '} weights of {name}" + (f": {hint}" if hint else ""))
    for package in EXTRAS:
        if package_folder(package) is None:
            click.echo(f"absent   package {package}: {with_extra(package)}")
    for library, package in (("pango-1.0", "libpango-1.0-0"), ("pangoft2-1.0", "libpangoft2-1.0-0")):
        found = find_library(library) is not None
        say(found, f"system library {library}" + ("" if found else f": the PDF needs it (Debian: apt install {package})"))
    if find_library("harfbuzz-subset") is None:
        click.echo("absent   system library harfbuzz-subset: the PDF is made without it (Debian: apt install libharfbuzz-subset0)")
    return 1 if trouble else 0
