from __future__ import annotations

from pathlib import Path

import click

from .execute import write_reports
from .main import State


@click.command("report")
@click.argument("experiment")
@click.option("--format", "formats", multiple=True, help="html, pdf, json; default all three.")
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), help="Folder of the report; default out/EXPERIMENT.")
@click.option("--tracking-uri", default="", help="MLflow store; default $MLFLOW_TRACKING_URI or the run folder's own.")
@click.pass_obj
def command(state: State, experiment: str, formats: tuple[str, ...], output: Path | None, tracking_uri: str) -> int:
    """Write the report of an experiment's newest run, from the tracking store alone."""
    from ..paths import runs_folder
    from ..tracking import tracker_for
    from ..tracking import tracking_uri as choose
    from .audit import FORMATS, slug

    plugins = state.plugins()
    for kind in formats:
        plugins.get("renderers", kind)
    root = runs_folder()
    manifest, runs = tracker_for(choose(tracking_uri, root), root).load(experiment)
    if manifest.get("interrupted"):
        click.echo("warning: this experiment was interrupted; the report shows what is there of it", err=True)
    folder = output or Path("out") / slug(experiment)
    for path in write_reports(state, runs, manifest["title"], experiment, manifest["command"], formats or FORMATS, folder):
        click.echo(str(path))
    damaged = [problem for problem in (r.damage() for r in runs) if problem]
    for problem in damaged:
        click.echo(f"warning: {problem}", err=True)
    return 1 if damaged or any(r.record.status == "failed" for r in runs) else 0
