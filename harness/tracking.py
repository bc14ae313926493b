"""MLflow as the store of runs. The only file that imports mlflow, and it does so when first needed.

One MLflow run a run, nested under its experiment's; parameters, metrics and tags in one batch; the record and the
artifacts as files. A server that does not answer costs seconds and one warning: results stay in the spool.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import socket
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from .errors import ConfigError, StorageError, TrackingError
from .hookspecs import hookimpl
from .paths import inside, whole_folder
from .record import RECORD, Manifest, Record, StoredRun, flat, read_record, write_json

if TYPE_CHECKING:
    from .experiment import Experiment, RunSpec
    from .runner import Session

MANIFEST = "experiment.json"
_REUSED = "harness.reused."  # and a run's id, on the run of an experiment
_PROBE_SECONDS = 2.0
_PARAM_LENGTH, _TAG_LENGTH = 500, 500
_PARAMS = 100  # that MLflow takes at once


def tracking_uri(given: str, root: Path) -> str:
    """`--tracking-uri`, else `MLFLOW_TRACKING_URI`, else the SQLite file in the run folder."""
    return given or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"


def _name(text: str) -> str:
    """A name that MLflow takes for parameters, metrics and tags."""
    return re.sub(r"[^\w.\- ]", "_", text)[:240]


class Tracker:
    """Reads and writes runs in one MLflow store."""

    def __init__(self, uri: str, root: Path) -> None:
        self.uri, self.root = uri, root
        local = uri.startswith("sqlite:///")
        if local:
            database = Path(uri.removeprefix("sqlite:///"))
            try:
                database.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"{database.parent} cannot be made ({error.strerror}); set HARNESS_RUNS to another folder") from None
        else:
            _probe(uri)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # Its links and download bars would stand between our own lines.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        # MLflow's own patience is four minutes; ours is seconds, since nothing is lost when the server is away.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow.tracking import MlflowClient

        for name in ("alembic", "mlflow"):  # after the import, which sets them
            logging.getLogger(name).setLevel(logging.WARNING)

        with self._errors(), _alone(Path(uri.removeprefix("sqlite:///"))) if local else nullcontext():
            self.client = MlflowClient(tracking_uri=uri)
            self.client.search_experiments(max_results=1)  # makes the schema of a new database
            if local:
                with closing(sqlite3.connect(uri.removeprefix("sqlite:///"), timeout=30)) as connection:
                    connection.execute("PRAGMA journal_mode=WAL")  # a write costs half as much, and readers do not wait
        self._experiments: dict[str, str] = {}
        self._parents: dict[str, str] = {}
        self._searched: set[str] | None = None
        self._ids: dict[str, str] = {}  # harness run id -> MLflow run id

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, OSError, sqlite3.Error) as error:
            problem = " ".join(str(error).split())[:200]
            raise TrackingError(
                f"tracking store {self.uri} failed ({problem}); results stay in {self.root / 'spool'}: send them later with `harness sync`"
            ) from error
        except Exception as error:
            if type(error).__module__.startswith("sqlalchemy"):
                raise TrackingError(
                    f"tracking store {self.uri} failed ({type(error).__name__}); results stay in {self.root / 'spool'}"
                ) from error
            raise

    # -- writing -----------------------------------------------------------------------------------------------------

    def experiment_id(self, name: str) -> str:
        if name not in self._experiments:
            found = self.client.get_experiment_by_name(name)
            if found is None:
                # Only a local store's files lie where we say; a server has a place of its own.
                place = (self.root / "artifacts" / name).as_uri() if self.uri.startswith("sqlite:") else None
                self._experiments[name] = self.client.create_experiment(name, artifact_location=place)
            else:
                self._here(found)
                if found.lifecycle_stage == "deleted":
                    self.client.restore_experiment(found.experiment_id)
                self._experiments[name] = found.experiment_id
        return self._experiments[name]

    def _here(self, experiment: Any) -> None:
        """ConfigError where the files of a local store's experiment are said to lie in a folder that is gone: the store was moved."""
        place = _local(experiment.artifact_location) if self.uri.startswith("sqlite:") else None
        here = self.root / "artifacts" / experiment.name
        if place is not None and place != here and not place.exists() and here.exists():
            raise ConfigError(
                f"the run folder was moved: its records say that files lie in {place.parent.parent}, and they are in {self.root}; move it "
                "back, or set $HARNESS_RUNS to a new folder"
            )

    def parent(self, name: str, digest: str, command: str) -> str:
        """The MLflow run of an experiment: the interrupted one of the same plan, or a new one."""
        if digest not in self._parents:
            experiment = self.experiment_id(name)
            running = self.client.search_runs(
                [experiment], f"tags.`harness.experiment` = '{digest}' and attributes.status = 'RUNNING'", max_results=1
            )
            if running:
                self._parents[digest] = running[0].info.run_id
            else:
                tags = {
                    "mlflow.runName": name,
                    "harness.kind": "experiment",
                    "harness.experiment": digest,
                    "harness.command": command[:_TAG_LENGTH],
                }
                self._parents[digest] = self.client.create_run(experiment, tags=tags).info.run_id
        return self._parents[digest]

    def log(self, run: StoredRun, experiment: str, parent: str | None, fresh: bool = False) -> StoredRun:
        """Send one run; afterwards it stands in the store and the spool's copy may go.

        A run that is not `fresh` may have been sent before, by a process that was killed before it could tidy up.
        """
        from mlflow.entities import Metric, Param

        record = run.record
        with self._errors():
            if not fresh:
                known = self._find(f"tags.`harness.run_id` = '{record.run_id}' and attributes.status != 'RUNNING'")
                if known is not None:
                    return known
            started = int(datetime.fromisoformat(record.started).timestamp() * 1000)
            tags = {"mlflow.runName": f"{record.technique.name} {record.model.name}", **_tags(record)}
            if parent:
                tags["mlflow.parentRunId"] = parent
            created = self.client.create_run(self.experiment_id(experiment), start_time=started, tags=tags)
            run_id = created.info.run_id
            params = {**flat(record.params), "technique": record.technique.name, "model": record.model.name, "seed": str(record.seed)}
            if record.dataset:
                params["dataset"] = record.dataset.name
            metrics = {m.name: m.value for m in record.metrics if m.value is not None}
            metrics |= {"seconds": record.seconds, "peak_memory_bytes": float(record.peak_memory_bytes)}
            measured = [Metric(_name(k), v, started, 0) for k, v in metrics.items()]
            stored = [Param(_name(k), v[:_PARAM_LENGTH]) for k, v in params.items()]
            for first in range(0, len(stored), _PARAMS):
                self.client.log_batch(run_id, metrics=[] if first else measured, params=stored[first : first + _PARAMS])
            self._put(run_id, created.info.artifact_uri, run.folder)
            status = "FAILED" if record.status == "failed" else "FINISHED"
            self.client.set_terminated(run_id, status, end_time=started + int(record.seconds * 1000))
        self._ids[record.run_id] = run_id
        local = _local(created.info.artifact_uri)
        if local is None:
            # What a server took is kept here as well: the report that follows need not fetch it again.
            local = inside(self.root / "fetched", record.run_id)
            with whole_folder(local) as folder:
                shutil.copytree(run.folder, folder, dirs_exist_ok=True)
        return StoredRun(record, local)

    def note(self, experiment: Experiment, run: StoredRun) -> None:
        """That an experiment reuses a run of the store; one that waits in the spool is sent later, and belongs to another."""
        with self._errors():
            known = self._ids.get(run.record.run_id)
            if known is not None:
                parent = self.parent(experiment.name, experiment.digest(), experiment.command)
                self.client.set_tag(parent, _REUSED + run.record.run_id, known)

    def _put(self, run_id: str, artifact_uri: str, folder: Path) -> None:
        local = _local(artifact_uri)
        if local is not None and not local.exists():
            # The same disk: a copy of the folder, not a client call a file.
            local.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(folder, local)
        else:
            self.client.log_artifacts(run_id, str(folder))

    def enter(self, manifest: Manifest) -> None:
        """Close an experiment's MLflow run with the list of its runs."""
        with self._errors(), tempfile.TemporaryDirectory() as folder:
            parent = self.parent(manifest.name, manifest.digest, manifest.command)
            listed = []
            for run_id in manifest.run_ids:
                if run_id not in self._ids:
                    self._find(f"tags.`harness.run_id` = '{run_id}' and attributes.status != 'RUNNING'")
                listed.append({"run_id": run_id, "mlflow_run": self._ids.get(run_id, "")})
            path = Path(folder) / MANIFEST
            write_json(path, {"name": manifest.name, "title": manifest.title, "command": manifest.command, "runs": listed})
            self.client.log_artifact(parent, str(path))
            self.client.set_terminated(parent, "FAILED" if manifest.failed else "FINISHED")
            del self._parents[manifest.digest]  # the same plan run again is a new one

    # -- reading -----------------------------------------------------------------------------------------------------

    def find(self, key: str) -> StoredRun | None:
        """The newest finished run of a key, in whatever experiment it was made."""
        if not re.fullmatch(r"[0-9a-f]{64}", key):
            return None
        with self._errors():
            return self._find(f"tags.`harness.key` = '{key}' and attributes.status = 'FINISHED'")

    def _find(self, query: str) -> StoredRun | None:
        if self._searched is None:
            # Asked once a process: what others add meanwhile is at worst computed again.
            self._searched = {e.experiment_id for e in self.client.search_experiments()}
        experiments = self._searched | set(self._experiments.values())
        altered: StoredRun | None = None
        for found in self.client.search_runs(sorted(experiments), query, max_results=5, order_by=["attributes.start_time DESC"]):
            run = self._stored(found)
            if run is not None and not run.damage():
                return run
            altered = altered or run
        return altered

    def _stored(self, found: Any) -> StoredRun | None:
        """An MLflow run's files, on this disk or fetched; None when they are gone."""
        local = _local(found.info.artifact_uri)
        if local is None:
            run_id = found.data.tags.get("harness.run_id", "")
            if not re.fullmatch(r"[0-9a-f]{32}", run_id):
                return None
            local = inside(self.root / "fetched", run_id)
            if not (local / RECORD).is_file():
                with whole_folder(local) as folder:
                    self.client.download_artifacts(found.info.run_id, "", str(folder))
        if not (local / RECORD).is_file():
            return None
        run = read_record(local)
        self._ids[run.record.run_id] = found.info.run_id
        return run

    def experiments(self) -> list[str]:
        with self._errors():
            return sorted(e.name for e in self.client.search_experiments() if e.name != "Default")

    def load(self, name: str) -> tuple[dict[str, Any], list[StoredRun]]:
        """(manifest, runs) of the newest run of an experiment; of an interrupted one what is finished."""
        with self._errors():
            experiment = self.client.get_experiment_by_name(name)
            if experiment is None:
                from .errors import unknown

                raise unknown("experiment", name, self.experiments(), f"the MLflow store {self.uri}")
            self._here(experiment)
            ids = [experiment.experiment_id]
            parents = self.client.search_runs(
                ids, "tags.`harness.kind` = 'experiment'", max_results=200, order_by=["attributes.start_time DESC"]
            )
            if not parents:
                return self._loose(name, ids)
            # One that was interrupted and gone on with began long before it ended.
            parent = max(parents, key=lambda found: max(found.info.start_time, found.info.end_time or 0))
            if any(item.path == MANIFEST for item in self.client.list_artifacts(parent.info.run_id)):
                with tempfile.TemporaryDirectory() as folder:
                    path = self.client.download_artifacts(parent.info.run_id, MANIFEST, folder)
                    manifest = json.loads(Path(path).read_text(encoding="utf-8"))
                runs = []
                for item in manifest["runs"]:
                    found = self.client.get_run(item["mlflow_run"]) if item.get("mlflow_run") else None
                    run = self._stored(found) if found else None
                    if run is None:
                        raise ConfigError(
                            f"experiment {name!r}: the files of run {item['run_id'][:12]} are gone from {self.uri}; run it again"
                        )
                    runs.append(run)
                return manifest, runs
            children = self.client.search_runs(
                ids, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", order_by=["attributes.start_time ASC"], max_results=1000
            )
            stored = [self._stored(child) for child in children if child.info.status != "RUNNING"]
            made = [run for run in stored if run is not None]
            command = parent.data.tags.get("harness.command", "")
            return {"name": name, "title": name, "command": command, "interrupted": True}, self._with_reused(parent, made)

    def _with_reused(self, parent: Any, made: list[StoredRun]) -> list[StoredRun]:
        """What an interrupted experiment had reused, and what it made; of one run the latest."""
        from mlflow.exceptions import MlflowException

        reused = []
        for tag, run_id in parent.data.tags.items():
            if tag.startswith(_REUSED):
                with suppress(MlflowException, StorageError):  # deleted, or a record that cannot be read: the others are still to be seen
                    reused.append(self._stored(self.client.get_run(run_id)))
        every = [*((run, False) for run in reused if run is not None), *((run, True) for run in made)]
        # Within a second what succeeded is later than what failed, which is not reused, and what was made later than what was there.
        every.sort(key=lambda pair: (pair[0].record.started, pair[0].record.status != "failed", pair[1]))
        return list({json.dumps(run.record.spec, sort_keys=True): run for run, _ in every}.values())

    def _loose(self, name: str, ids: list[str]) -> tuple[dict[str, Any], list[StoredRun]]:
        """Runs whose experiment was killed before it could be entered: the newest of every key."""
        newest: dict[str, StoredRun] = {}
        for found in self.client.search_runs(
            ids, "tags.`harness.kind` = 'run' and attributes.status != 'RUNNING'", order_by=["attributes.start_time ASC"], max_results=1000
        ):
            run = self._stored(found)
            if run is not None:
                newest[run.record.key] = run
        if not newest:
            raise ConfigError(f"experiment {name!r} in {self.uri} holds no runs of harness")
        return {"name": name, "title": name, "command": "", "interrupted": True}, list(newest.values())


def _tags(record: Record) -> dict[str, str]:
    tags = {
        "harness.kind": "run",
        "harness.key": record.key,
        "harness.run_id": record.run_id,
        "harness.status": record.status,
        "harness.version": record.versions.get("vision-harness", ""),
        "harness.technique": f"{record.technique.name} v{record.technique.version}",
        "harness.weights": record.model.weights,
        "harness.device": str(record.device.get("kind", "")),
        "mlflow.source.name": "harness",
    }
    if record.dataset:
        tags["harness.data"] = record.dataset.fingerprint
    if record.git.get("commit"):
        tags["mlflow.source.git.commit"] = record.git["commit"]
    if record.error:
        tags["harness.error"] = record.error.message
    return {name: value[:_TAG_LENGTH] for name, value in tags.items() if value}


def _local(artifact_uri: str) -> Path | None:
    """The folder of a file URI, None for anything else."""
    parts = urlsplit(artifact_uri)
    return Path(unquote(parts.path)) if parts.scheme in ("file", "") and not parts.netloc else None


def _probe(uri: str) -> None:
    """Fail within seconds when nobody listens at a server's address."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        if parts.scheme in ("", "file"):
            raise ConfigError(f"tracking uri {uri!r}: MLflow no longer keeps runs in plain folders; use sqlite:///PATH or http://HOST:PORT")
        return
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=_PROBE_SECONDS).close()
    except (OSError, ValueError) as error:
        raise TrackingError(
            f"tracking server {uri} does not answer ({error}); results stay in the spool: send them later with `harness sync`"
        ) from None


@contextmanager
def _alone(database: Path) -> Iterator[None]:
    """Two processes that make the schema of one new database at once would both fail."""
    with database.with_name(f"{database.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@cache
def tracker_for(uri: str, root: Path) -> Tracker:
    return Tracker(uri, root)


def _of(session: Session) -> Tracker:
    return tracker_for(tracking_uri(session.tracking_uri, session.root), session.root)


# -- hooks ---------------------------------------------------------------------------------------------------------------


@hookimpl
def harness_find_run(session: Session, key: str) -> StoredRun | None:
    return _of(session).find(key)


@hookimpl
def harness_run_started(session: Session, spec: RunSpec) -> None:
    """Open the experiment's MLflow run before the first result, so that an interrupted one can be found again."""
    if not session.offline:
        tracker = _of(session)
        with tracker._errors():
            tracker.parent(session.experiment.name, session.experiment.digest(), session.experiment.command)


@hookimpl
def harness_run_reused(session: Session, run: StoredRun) -> None:
    """Note it with the experiment's MLflow run, so that an interrupted one can show it."""
    if not session.offline:
        _of(session).note(session.experiment, run)


@hookimpl
def harness_run_finished(session: Session, run: StoredRun) -> None:
    if session.offline:
        return
    tracker, experiment = _of(session), session.experiment
    with tracker._errors():
        parent = tracker.parent(experiment.name, experiment.digest(), experiment.command)
    stored = tracker.log(run, experiment.name, parent, fresh=True)
    session.done[run.record.key] = stored
    session.spool.remove(run)


@hookimpl
def harness_experiment_started(session: Session) -> None:
    """What earlier processes could not send goes first, so that it is found where everything else is."""
    if session.offline or not session.spool.waiting():
        return
    sync(_of(session), session)


@hookimpl
def harness_experiment_finished(session: Session, runs: Sequence[StoredRun]) -> None:
    experiment = session.experiment
    manifest = Manifest(
        name=experiment.name, title=experiment.title, command=experiment.command, digest=experiment.digest(),
        run_ids=[r.record.run_id for r in runs], failed=any(r.record.status == "failed" for r in runs),
    )  # fmt: skip
    if session.offline:
        session.spool.write_manifest(manifest)
        return
    tracker = _of(session)
    try:
        sync(tracker, session)
        tracker.enter(manifest)
    except TrackingError:
        session.spool.write_manifest(manifest)
        raise


def sync(tracker: Tracker, session: Session) -> int:
    """Send what is in the spool, runs first, then the experiments they belong to; the number of runs sent."""
    sent = 0
    manifests = session.spool.manifests()
    parents = {run_id: m for _, m in manifests for run_id in m.run_ids}
    for run in list(session.spool):
        manifest = parents.get(run.record.run_id)
        with tracker._errors():
            parent = tracker.parent(manifest.name, manifest.digest, manifest.command) if manifest else None
        stored = tracker.log(run, run.record.experiment or session.experiment.name, parent)
        session.done[run.record.key] = stored
        session.spool.remove(run)
        sent += 1
    for path, manifest in manifests:
        tracker.enter(manifest)
        session.spool.remove_manifest(path)
    return sent
