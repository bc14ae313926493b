from __future__ import annotations

import click

from .main import State


@click.command("sync")
@click.option("--tracking-uri", default="", help="MLflow store; default $MLFLOW_TRACKING_URI or the run folder's own.")
@click.pass_obj
def command(state: State, tracking_uri: str) -> None:
    """Send the runs that wait in the spool to the tracking store."""
    from ..experiment import Experiment
    from ..paths import runs_folder
    from ..runner import Session
    from ..tracking import sync, tracker_for
    from ..tracking import tracking_uri as choose

    root = runs_folder()
    session = Session(Experiment("runs", ()), root)
    sent = sync(tracker_for(choose(tracking_uri, root), root), session) if session.spool.waiting() else 0
    for problem in session.spool.unreadable:
        click.echo(f"warning: left out: {problem}", err=True)
    click.echo(f"{sent} runs sent")
