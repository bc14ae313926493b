from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .execute import execute, parse_list, parse_params, run_options, write_reports
from .main import State

FORMATS = ("html", "pdf", "json")
PROFILES = ("quick", "standard", "full")


@click.command("audit")
@click.argument("model")
@click.option("-d", "--dataset", default="imagenet_samples", show_default=True, help="Dataset, or a folder's path.")
@click.option("--profile", type=click.Choice(PROFILES), default="standard", show_default=True, help="How much to run.")
@click.option("-p", "--param", "params", multiple=True, metavar="TECHNIQUE.NAME=VALUE", help="Change a parameter of the profile.")
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), help="Folder of the report; default out/audit-MODEL.")
@click.option("--format", "formats", multiple=True, help="html, pdf, json; default all three.")
@run_options
@click.pass_obj
def command(state: State, /, model: str, dataset: str, output: Path | None, **options: Any) -> int:
    """Audit a model: run a profile's techniques and write a report."""
    folder = output or Path("out") / f"audit-{slug(model)}"
    return audit(state, [model], dataset, folder, f"audit-{slug(model)}", f"Audit of {model} on {dataset}", "audit", **options)


def audit(
    state: State,
    models: Sequence[str],
    dataset: str,
    folder: Path,
    name: str,
    title: str,
    verb: str,
    *,
    profile: str,
    params: Sequence[str],
    formats: Sequence[str],
    seed: int,
    limit: int | None,
    select: str | None,
    device: str,
    precision: str,
    max_batch: int,
    tracking_uri: str,
    no_cache: bool,
) -> int:
    """Run the profile on each model and report; the audit of one model and the comparison of several."""
    from ..errors import StorageError
    from ..experiment import Experiment, expand
    from ..runner import exit_code
    from .run import split_params

    plugins = state.plugins()
    for kind in formats:
        plugins.get("renderers", kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(f"{folder}: the report cannot be written there ({error.strerror}); choose another folder with -o") from None
    wanted = profile_techniques(plugins, profile)
    given = split_params(tuple(wanted), parse_params(params))
    plan = [(technique, {**wanted[technique], **given[technique]}) for technique in wanted]
    runs = expand(
        plugins, models, [dataset], plan, [seed],
        limit=limit, select=parse_list(select, limit), device=device, precision=precision, max_batch=max_batch,
    )  # fmt: skip
    words = ["harness", *(w for path in state.used_registries() for w in ("-r", path)), verb, *models, "-d", dataset, "--profile", profile]
    words += [w for p in params for w in ("-p", p)]
    for option, value, default in (("--seed", seed, 0), ("--limit", limit, None), ("--select", select, None), ("--device", device, "auto"),
                                   ("--precision", precision, "float32"), ("--max-batch", max_batch, 32)):  # fmt: skip
        if value != default:
            words += [option, str(value)]
    experiment = Experiment(name, runs, title, shlex.join(words))
    _, outcomes = execute(state, experiment, tracking_uri=tracking_uri, use_cache=not no_cache)
    for path in write_reports(state, [o.run for o in outcomes], title, name, experiment.command, formats or FORMATS, folder):
        click.echo(str(path))
    return exit_code(outcomes) or int(any(o.run.damage() for o in outcomes))


def profile_techniques(plugins: Any, profile: str) -> dict[str, dict[str, Any]]:
    """{technique: parameters} of a profile; 'full' is every technique that is not only a means for others."""
    techniques = plugins.techniques
    if profile == "full":
        means = {use.technique for cls in techniques.values() for use in _uses(cls, plugins)}
        names = [n for n in techniques if n not in means or techniques[n].audit]
        return {n: dict(techniques[n].audit.get("full", techniques[n].audit.get("standard", {}))) for n in ordered(names, techniques)}
    return {n: dict(techniques[n].audit[profile]) for n in ordered([n for n in techniques if profile in techniques[n].audit], techniques)}


def _uses(cls: Any, plugins: Any) -> Sequence[Any]:
    try:
        return plugins.uses(cls())
    except ValueError:  # a parameter without default
        return ()


def ordered(names: Sequence[str], techniques: Any) -> list[str]:
    """From what the model answers to what it is made of."""
    families = ("overview", "saliency", "representations", "synthesis", "weights")
    return sorted(names, key=lambda n: (families.index(f) if (f := techniques[n].family) in families else len(families), n))


def slug(model: str) -> str:
    """A model's name as a folder's."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in model)
