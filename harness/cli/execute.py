"""Run an experiment from the command line: session, progress, closing lines; used by run, audit, compare and verify."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..experiment import Experiment
    from ..runner import Event, Outcome, Session
    from .main import State


def parse_params(items: Sequence[str]) -> dict[str, Any]:
    """['window=32', 'classes=[9, 130]'] -> values as YAML reads them; 'a,b' stays text."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    found: dict[str, Any] = {}
    for item in items:
        name, mark, text = item.partition("=")
        if not mark or not name:
            raise ConfigError(f"-p {item!r}: write NAME=VALUE")
        if name in found:
            raise ConfigError(f"-p {name}: given twice")
        try:
            found[name] = YAML(typ="safe", pure=True).load(text) if text else ""
        except YAMLError:
            found[name] = text
    return found


def parse_list(text: str | None, limit: int | None = None) -> list[int] | None:
    """'0,3,7' -> [0, 3, 7]; beside a limit it would leave one of the two without a say."""
    if text is None:
        return None
    if limit is not None:
        raise ConfigError("give --limit or --select, not both")
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--select {text!r}: write picture numbers with commas, as 0,3,7") from None


def run_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that every command that runs techniques has."""
    for option in reversed(
        (
            click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of all randomness."),
            click.option("--limit", type=click.IntRange(min=1), help="Use this many pictures, spread evenly over the dataset."),
            click.option("--select", metavar="I,J,...", help="Use these pictures, by number."),
            click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."),
            click.option(
                "--precision",
                type=click.Choice(["float32", "bfloat16", "float16"]),
                default="float32",
                show_default=True,
                help="Below float32: autocast.",
            ),
            click.option(
                "--max-batch",
                type=click.IntRange(min=1),
                default=32,
                show_default=True,
                help="Pictures in flight at once, perturbed copies included.",
            ),
            click.option("--tracking-uri", default="", help="MLflow store; default $MLFLOW_TRACKING_URI or the run folder's own."),
            click.option("--no-cache", is_flag=True, help="Run again what is finished already."),
        )
    ):
        function = option(function)
    return function


def execute(
    state: State, experiment: Experiment, *, tracking_uri: str = "", use_cache: bool = True, root: Path | None = None
) -> tuple[Session, list[Outcome]]:
    """Run all of it, with a progress bar on a terminal and plain lines elsewhere."""
    from ..paths import runs_folder
    from ..runner import Runner, Session

    session = Session(
        experiment,
        root or runs_folder(),
        tracking_uri,
        warn=lambda text: click.echo(f"warning: {text}", err=True),
        registries=tuple(state.used_registries()),
    )
    with progress() as watch:
        outcomes = Runner(state.registry(), state.plugins(), session, use_cache, watch).run(experiment)
    return session, outcomes


class progress:  # used as a with-statement's verb
    """Watches a runner."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Callable[[Event], None]:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.fields[place]} {task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[what]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        return self.see

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def see(self, event: Event) -> None:
        place = f"{event.number}/{event.total}"
        if event.kind == "start" and self._bar is not None:
            self._task = self._bar.add_task(event.spec.label(), total=None, place=place, what="")
        elif event.kind == "step" and self._bar is not None:
            self._bar.update(self._task, total=event.of, completed=event.done, what=event.what)
        elif event.kind == "end" and event.outcome is not None:
            if self._bar is not None:
                self._bar.remove_task(self._task)
            say = self._bar.console.print if self._bar is not None else lambda text, **_: click.echo(text, err=True)
            say(f"{place} {line(event.outcome)}", **({"markup": False, "highlight": False} if self._bar is not None else {}))


def line(outcome: Outcome) -> str:
    """One run in a line."""
    record = outcome.run.record
    text = f"{outcome.spec.label()}: "
    if record.status == "failed":
        return text + f"FAILED: {record.error.message if record.error else ''}"
    if record.status == "not_applicable":
        return text + f"not applicable: {record.error.message if record.error else ''}"
    return text + ("reused" if outcome.how == "reused" else f"{record.seconds:.1f} s")


def write_reports(
    state: State, runs: Sequence[Any], title: str, name: str, command: str, formats: Sequence[str], folder: Path
) -> list[Path]:
    """Render a report in each format into a folder. One that fails costs no other: it is raised when the others are written and named."""
    from ..errors import HarnessError, StorageError
    from ..record import ReportInput

    plugins = state.plugins()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be made ({error.strerror}); choose another folder with -o") from None
    report = ReportInput(title, name, runs, command, [str(f) for f in plugins.failures])
    written: list[Path] = []
    problems: list[HarnessError] = []
    for kind in formats:
        try:
            written.append(plugins.get("renderers", kind).render(report, folder))
        except HarnessError as error:
            with suppress(OSError):
                (folder / f"report.{kind}").unlink()  # an older one tells of other runs
            problems.append(error)
    if problems:
        for path in written:
            click.echo(str(path))
        raise problems[0]
    return written
