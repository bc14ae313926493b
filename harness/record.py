"""What a run leaves on disk: `record.json` and one `.npz` an artifact, written whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

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
    summary: dict[str, list[float]] = {}  # {array: [mean, root mean square, largest magnitude]}, to compare across machines


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

    @field_validator("message", "traceback", mode="before")
    @classmethod
    def _storable(cls, text: Any) -> Any:
        """File names that are not UTF-8 stand in messages, and text that is stored must be."""
        return text.encode("utf-8", "backslashreplace").decode() if isinstance(text, str) else text


class Record(_Part):
    """Everything a second person needs to make the run again and to tell whether it came out the same."""

    schema_version: int = 1
    run_id: str
    key: str
    status: Status
    experiment: str = ""  # the name it was first made under
    spec: dict[str, Any]  # the RunSpec
    registries: list[str] = []  # the user's own registry files, as named
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

    def damage(self) -> str:
        """What is missing or altered among the files, in words; empty when all is well."""
        for file in self.record.artifacts:
            path = inside(self.folder, file.file)
            if not path.is_file() or sha256_file(path) != file.sha256:
                return f"{path}: missing or altered since the run wrote it; run again with --no-cache"
        return ""

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
    """As given: the order of keys is part of what a report prints. Parts of file names that are not UTF-8 are written as \\udcNN."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8", errors="backslashreplace")


def read_record(folder: Path) -> StoredRun:
    """The record in a folder, validated."""
    path = folder / RECORD
    try:
        return StoredRun(Record.model_validate_json(path.read_bytes()), folder)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        raise StorageError(f"{path}: not a record this version can read ({error.error_count()} problems)") from None


class Manifest(_Part):
    """An experiment as a list of its runs."""

    name: str
    title: str
    command: str = ""
    digest: str = ""
    run_ids: list[str] = []
    failed: bool = False


# Folders of the spool that belong to this process, with the open lock files that say so to others.
_HELD: dict[Path, int] = {}


class Spool:
    """Finished runs that have not reached the tracking store yet: `spool/OWNER/RUN`, a run moved in when complete.

    An owner is a process; while it lives it holds a lock, and nobody else touches its folder. What a dead process left
    is taken over by the next one that looks.
    """

    def __init__(self, root: Path) -> None:
        self.root = root / "spool"
        self.unreadable: list[str] = []

    def write(self, record: Record, found: Sequence[artifacts.Artifact]) -> StoredRun:
        """Write the whole run beside its place and move it there."""
        owner: Path | None = None
        temporary: Path | None = None
        try:
            owner = self._own()
            temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=owner))
            files = []
            for artifact in found:
                file = f"{artifact.name}.npz"
                artifact.save(temporary / file)
                digest = sha256_file(temporary / file)
                files.append(ArtifactFile(name=artifact.name, kind=artifact.kind, file=file, sha256=digest, summary=artifact.summary()))
            record = record.model_copy(update={"artifacts": files})
            write_json(temporary / RECORD, record.model_dump(mode="json"))
            place = owner / record.run_id
            temporary.rename(place)
        except BaseException as error:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            if owner is not None:
                self._tidy(owner)
            if isinstance(error, OSError):
                raise StorageError(
                    f"{self.root}: the run's results cannot be written ({error.strerror or error}); "
                    "make room or set HARNESS_RUNS to another folder"
                ) from error
            raise
        return StoredRun(record, place)

    def write_manifest(self, manifest: Manifest) -> None:
        """Keep an experiment's list of runs until the store can be told."""
        try:
            write_json(self._own() / f"{manifest.digest}.json", manifest.model_dump(mode="json"))
        except OSError as error:
            raise StorageError(f"{self.root}: the experiment's list of runs cannot be written ({error.strerror})") from error

    def manifests(self) -> list[tuple[Path, Manifest]]:
        found = []
        for owner in self._folders():
            for path in sorted(owner.glob("*.json")):
                try:
                    found.append((path, Manifest.model_validate_json(path.read_bytes())))
                except (OSError, ValidationError):
                    self._skip(f"{path}: not a list of runs this version can read")
        return found

    def __iter__(self) -> Iterator[StoredRun]:
        for owner in self._folders():
            for folder in sorted(owner.iterdir()):
                if not folder.name.startswith(".") and (folder / RECORD).is_file():
                    try:
                        run = read_record(folder)
                    except StorageError as error:
                        self._skip(str(error))
                        continue
                    yield run

    def waiting(self) -> bool:
        """Whether there is anything to send."""
        return bool(self.manifests()) or next(iter(self), None) is not None

    def _skip(self, problem: str) -> None:
        if problem not in self.unreadable:
            self.unreadable.append(problem)

    def find(self, key: str) -> StoredRun | None:
        return next((r for r in self if r.record.key == key and r.record.status == "finished"), None)

    def remove(self, run: StoredRun) -> None:
        shutil.rmtree(run.folder, ignore_errors=True)
        self._tidy(run.folder.parent)

    def remove_manifest(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._tidy(path.parent)

    # -- whose is what ----------------------------------------------------------------------------------------------

    def _own(self) -> Path:
        """A folder of this process."""
        self.root.mkdir(parents=True, exist_ok=True)
        for folder in _HELD:
            if folder.parent == self.root and folder.is_dir():
                return folder
        folder = self.root / uuid.uuid4().hex
        if not _lock(folder):  # before the folder is there, so that nobody finds it without an owner
            raise OSError(f"{folder} cannot be locked")
        folder.mkdir()
        return folder

    def _folders(self) -> list[Path]:
        """The folders of this process and of those that are gone, now ours; half-written runs of the dead are removed."""
        if not self.root.is_dir():
            return []
        mine = []
        for folder in sorted(p for p in self.root.iterdir() if p.is_dir()):
            if folder not in _HELD:
                if not _lock(folder):
                    continue
                if not folder.is_dir():  # its owner has sent all and removed it meanwhile
                    self._let_go(folder)
                    continue
                for half in folder.glob(".writing-*"):
                    shutil.rmtree(half, ignore_errors=True)
            mine.append(folder)
        return mine

    def _tidy(self, owner: Path) -> None:
        """Remove an owner's folder and lock once they are empty."""
        try:
            owner.rmdir()
        except OSError:
            return  # not empty
        self._let_go(owner)

    @staticmethod
    def _let_go(owner: Path) -> None:
        handle = _HELD.pop(owner, None)
        owner.with_suffix(".lock").unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


def _lock(folder: Path) -> bool:
    """Take a folder of the spool for this process, unless another one that lives has it."""
    handle = os.open(folder.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return False
    _HELD[folder] = handle
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
