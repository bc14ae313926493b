from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import click

from .main import State


@click.command("ui")
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True)
@click.pass_obj
def command(state: State, port: int) -> None:
    """Open MLflow's web page on the run store, for this machine only (127.0.0.1)."""
    from ..errors import ConfigError
    from ..paths import runs_folder
    from ..tracking import tracking_uri

    if find_spec("mlflow.server.handlers") is None or find_spec("flask") is None:
        raise ConfigError("the web page comes with the extra 'ui': pip install 'vision-harness[ui]'")
    root = runs_folder()
    words = [
        sys.executable,
        "-P",  # nothing is imported from the folder the user stands in
        "-m",
        "mlflow",
        "ui",
        "--backend-store-uri",
        tracking_uri("", root),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    os.execv(sys.executable, words)  # noqa: S606  # fixed words; the server takes this process's place
