"""The hooks a plugin may implement. Hooks only ever gain arguments, and an implementation may take fewer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from .datasets import DatasetSource
    from .experiment import RunSpec
    from .record import Renderer, StoredRun
    from .runner import Session
    from .technique import Technique
    from .weights import WeightSource

PROJECT = "harness"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def harness_techniques() -> list[type[Technique]]:  # type: ignore[empty-body]
    """Techniques this plugin offers."""


@hookspec
def harness_model_builders() -> Mapping[str, Any]:  # type: ignore[empty-body]
    """{scheme: build(name, **args) -> torch.nn.Module} for `builder: scheme:name` in a registry."""


@hookspec
def harness_weight_sources() -> Mapping[str, WeightSource]:  # type: ignore[empty-body]
    """{scheme: source} for `weights: scheme:rest` in a registry."""


@hookspec
def harness_datasets() -> Mapping[str, DatasetSource]:  # type: ignore[empty-body]
    """{scheme: source(rest, name, entry) -> Dataset} for `source: scheme:rest` in a registry."""


@hookspec
def harness_renderers() -> Mapping[str, Renderer]:  # type: ignore[empty-body]
    """{format: renderer} for `--format`."""


@hookspec
def harness_experiment_started(session: Session) -> None:
    """An experiment begins, before anything is planned: the place to tidy up after an earlier one."""


@hookspec
def harness_run_started(session: Session, spec: RunSpec, key: str) -> None:
    """A run is about to be computed."""


@hookspec
def harness_run_finished(session: Session, spec: RunSpec, run: StoredRun) -> None:
    """A run has ended, in success or failure; its record stands in the spool, and whoever stores it may remove it."""


@hookspec
def harness_run_reused(session: Session, spec: RunSpec, run: StoredRun) -> None:
    """A run of the experiment is there already and is not computed again."""


@hookspec(firstresult=True)
def harness_find_run(session: Session, key: str) -> StoredRun | None:
    """A finished run of that key in the store, or None."""


@hookspec
def harness_experiment_finished(session: Session, runs: Sequence[StoredRun]) -> None:
    """All runs of an experiment have ended; `runs` stand in the experiment's order."""
