"""What a run leaves on disk: `record.json` and one `.npz` an artifact, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from . import artifacts
from .errors import HarnessError, StorageError
from .paths import inside, sha256_file

RECORD = "record.json"
Status = Literal["finished", "failed", "not_applicable"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ArtifactFile(_Part):
    """One artifact as stored beside the record."""

    name: str
    kind: str
    file: str
    sha256: str


class MetricValue(_Part):
    name: str
    value: float | None  # None: not a finite number
    unit: str = ""
    better: str = ""
    per_image: list[float | None] = []
    about: str = ""
    detail: str = ""


class TechniqueFacts(_Part):
    """What a report prints about the technique, so that it needs no plugin to be installed."""

    name: str
    family: str = ""
    version: int = 1
    distribution: str = ""
    distribution_version: str = ""
    summary: str = ""
    reading: str = ""
    caveats: str = ""
    paper: dict[str, Any] | None = None


class ModelFacts(_Part):
    name: str
    builder: str
    weights: str  # sha256 of the file, or 'random:SEED'
    source: str = ""
    license: str = ""
    input: dict[str, Any] = {}
    classes: int = 0


class DatasetFacts(_Part):
    name: str
    fingerprint: str
    pictures: int
    selected: list[str] = []  # ids of the pictures a per-picture technique was given
    license: str = ""
    source: str = ""


class ErrorFacts(_Part):
    type: str
    message: str
    traceback: str = ""
    bad_input: bool = False


class Record(_Part):
    """Everything a second person needs to make the run again and to tell whether it came out the same."""

    schema_version: int = 1
    run_id: str
    key: str
    status: Status
    experiment: str = ""  # the name it was first made under
    spec: dict[str, Any]  # the RunSpec
    technique: TechniqueFacts
    params: dict[str, Any]
    model: ModelFacts
    dataset: DatasetFacts | None = None
    seed: int
    device: dict[str, Any] = {}
    batch: int = 0
    started: str  # ISO 8601, UTC
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    versions: dict[str, str] = {}
    git: dict[str, Any] = {}
    uses: list[str] = []  # keys of the runs it builds on
    metrics: list[MetricValue] = []
    artifacts: list[ArtifactFile] = []
    notes: list[str] = []
    error: ErrorFacts | None = None

    def metric(self, name: str) -> MetricValue | None:
        return next((m for m in self.metrics if m.name == name), None)


@dataclass(frozen=True)
class StoredRun:
    """A record and the folder it stands in."""

    record: Record
    folder: Path

    def artifact(self, name: str) -> artifacts.Artifact:
        """One artifact, its sha256 checked."""
        for file in self.record.artifacts:
            if file.name == name:
                path = inside(self.folder, file.file)
                if not path.is_file() or sha256_file(path) != file.sha256:
                    raise StorageError(f"{path}: missing or altered since the run wrote it; run again with --no-cache")
                return artifacts.load(path)
        raise HarnessError(f"run {self.record.key[:12]} has no artifact {name!r}")

    def all_artifacts(self) -> dict[str, artifacts.Artifact]:
        return {file.name: self.artifact(file.name) for file in self.record.artifacts}


class Renderer(Protocol):
    """Writes a report; offered by the hook `harness_renderers` under the name of its format."""

    def render(self, report: ReportInput, folder: Path) -> Path:
        """Write the report into `folder` and say which file it is."""


@dataclass(frozen=True)
class ReportInput:
    """What a report is made of; nothing else goes in, so that the same runs give the same bytes."""

    title: str
    name: str
    runs: Sequence[StoredRun]
    command: str = ""  # the exact command that makes the runs again
    plugin_failures: Sequence[str] = ()


def write_json(path: Path, value: Any) -> None:
    """As given: the order of keys is part of what a report prints."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_record(folder: Path) -> StoredRun:
    """The record in a folder, validated."""
    path = folder / RECORD
    try:
        return StoredRun(Record.model_validate_json(path.read_bytes()), folder)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        raise StorageError(f"{path}: not a record this version can read ({error.error_count()} problems)") from None


class Spool:
    """Finished runs that have not reached the tracking store yet: one folder a run, moved in when complete."""

    def __init__(self, root: Path) -> None:
        self.root = root / "spool"

    def write(self, record: Record, found: Sequence[artifacts.Artifact]) -> StoredRun:
        """Write the whole run beside its place and move it there."""
        temporary: Path | None = None
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=self.root))
            files = []
            for artifact in found:
                file = f"{artifact.name}.npz"
                artifact.save(temporary / file)
                files.append(ArtifactFile(name=artifact.name, kind=artifact.kind, file=file, sha256=sha256_file(temporary / file)))
            record = record.model_copy(update={"artifacts": files})
            write_json(temporary / RECORD, record.model_dump(mode="json"))
            place = self.root / record.run_id
            temporary.rename(place)
        except OSError as error:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            raise StorageError(
                f"{self.root}: the run's results cannot be written ({error.strerror or error}); "
                "make room or set HARNESS_RUNS to another folder"
            ) from error
        return StoredRun(record, place)

    def __iter__(self) -> Iterator[StoredRun]:
        if self.root.is_dir():
            for folder in sorted(self.root.iterdir()):
                if not folder.name.startswith(".") and (folder / RECORD).is_file():
                    yield read_record(folder)

    def find(self, key: str) -> StoredRun | None:
        return next((r for r in self if r.record.key == key and r.record.status == "finished"), None)

    def remove(self, run: StoredRun) -> None:
        shutil.rmtree(run.folder, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what processes that were killed left half-written."""
        if self.root.is_dir():
            for folder in self.root.glob(".writing-*"):
                if not _fresh(folder):
                    shutil.rmtree(folder, ignore_errors=True)


def _fresh(folder: Path) -> bool:
    """Whether another process may still be writing there: touched within the last ten minutes."""
    import time

    try:
        return time.time() - os.stat(folder).st_mtime < 600
    except OSError:
        return True


def flat(values: Mapping[str, Any]) -> dict[str, str]:
    """Parameters as short text, nested ones under dotted names."""
    out: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            out |= {f"{name}.{k}": v for k, v in flat(value).items()}
        else:
            out[name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return out
