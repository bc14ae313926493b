"""The one loop: plan, reuse, seed, run, time, record. The only place that catches a technique's errors."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import __version__
from .artifacts import Heatmaps, Images
from .datasets import Dataset, load_dataset, picture_place
from .device import device_kind, device_settings, peak_memory
from .errors import ConfigError, HarnessError, NotApplicable, StorageError, TrackingError, WeightsError
from .experiment import PICTURES, Experiment, RunSpec
from .paths import sha256_file
from .plugins import Plugins
from .record import DatasetFacts, ErrorFacts, MetricValue, ModelFacts, Record, Spool, Status, StoredRun, TechniqueFacts
from .registry import Registry
from .technique import Result, Technique, Use, Used
from .weights import weights_hash

if TYPE_CHECKING:
    from .models import LoadedModel

INPUTS = "inputs"  # the artifact that holds the pictures of a per-picture technique
MINOR = ".".join(__version__.split(".")[:2])
_RECORDED = (
    "torch", "torchvision", "numpy", "scipy", "scikit-learn", "scikit-image", "opencv-python-headless", "pillow",
    "mlflow-skinny", "weasyprint", "vision-harness",
)  # fmt: skip


@dataclass
class Session:
    """One experiment being worked on: where its results go and what happened to it."""

    experiment: Experiment
    root: Path
    tracking_uri: str = ""
    warnings: list[str] = field(default_factory=list)
    warn: Callable[[str], None] = lambda text: None
    done: dict[str, StoredRun] = field(default_factory=dict)  # by key; a tracker that moves a run puts its new place here
    offline: bool = False  # the tracking store cannot be reached; results stay in the spool
    registries: tuple[str, ...] = ()  # the user's own registry files, as named

    @cached_property
    def spool(self) -> Spool:
        return Spool(self.root)

    def warning(self, text: str) -> None:
        """Said once, and kept."""
        if text not in self.warnings:
            self.warnings.append(text)
            self.warn(text)


@dataclass(frozen=True)
class Planned:
    """A run with its key and those it builds on."""

    spec: RunSpec
    technique: Technique
    key: str
    dataset: Dataset | None
    uses: tuple[tuple[Use, Planned], ...] = ()

    def used(self) -> dict[str, Used]:
        """What it builds on, by name."""
        return {use.label: Used(plan.technique, plan.used()) for use, plan in self.uses}


@dataclass(frozen=True)
class Outcome:
    """A run's result and how it came about."""

    spec: RunSpec
    run: StoredRun
    how: Literal["computed", "reused"]

    @property
    def failed(self) -> bool:
        return self.run.record.status == "failed"


@dataclass(frozen=True)
class Event:
    """Told to whoever shows progress: a run starts, gets on, or ends."""

    kind: Literal["start", "step", "end"]
    spec: RunSpec
    number: int  # 1-based place among all runs
    total: int
    what: str = ""
    done: int = 0
    of: int = 0
    outcome: Outcome | None = None


Watch = Callable[[Event], None]


class Runner:
    """Runs an experiment. Models and datasets are loaded once each."""

    def __init__(self, registry: Registry, plugins: Plugins, session: Session, use_cache: bool = True, watch: Watch | None = None) -> None:
        self.registry, self.plugins, self.session = registry, plugins, session
        self.use_cache, self.watch = use_cache, watch or (lambda event: None)
        self._datasets: dict[str, Dataset] = {}
        self._selected: dict[tuple[Any, ...], Dataset] = {}
        self._hashes: dict[str, str] = {}
        self._further_hashes: dict[tuple[str, str], str] = {}
        self._codes: dict[tuple[str, Path], str] = {}
        self._obtained: set[str] = set()  # keys that this runner has computed or found
        self._model: tuple[tuple[str, str], LoadedModel] | None = None

    # -- planning ----------------------------------------------------------------------------------------------------

    def plan(self, spec: RunSpec) -> Planned:
        """Resolve names, selection and dependencies; needs no torch when weights and data are here."""
        cls = self.plugins.technique(spec.technique)
        technique = cls.build(spec.params)
        entry = self.registry.model(spec.model)
        dataset = self._select(spec, cls) if spec.dataset else None
        wanted = self.plugins.uses(technique)
        labels = [use.label for use in wanted]
        if len(set(labels)) < len(labels):
            raise HarnessError(f"technique {spec.technique!r} uses two results under one name; give each Use a `name`")
        # What is built on looks at the same pictures, whatever its own default would be.
        same = {"limit": spec.limit if spec.select else len(dataset)} if dataset is not None else {}
        uses = tuple(
            (use, self.plan(spec.model_copy(update={"technique": use.technique, "params": dict(use.params), **same}))) for use in wanted
        )
        if spec.model not in self._hashes:
            self._hashes[spec.model] = weights_hash(spec.model, entry)
        parts = {
            "technique": [technique.name, technique.version],
            "params": technique.key_params(),
            "model": [entry.builder, entry.args, self._hashes[spec.model], entry.input.model_dump(mode="json"), entry.classes],
            "convert": entry.convert,
            # A user's own code may change without its name changing.
            "code": [self._code(reference, entry.folder) for reference in (entry.builder, entry.convert, getattr(technique, "target", ""))],
            "dataset": _data(dataset) if dataset else None,
            # A record says what a model and a dataset are called, so that a report can name them and give the command.
            "names": [spec.model, spec.dataset],
            "seed": spec.seed,
            "device": device_kind(spec.device).partition(":")[0],
            "precision": spec.precision,
            "harness": MINOR,
            "uses": [[use.label, u.key] for use, u in uses],
        }
        if any(word in str(getattr(technique, "target", "")) for word in ("channel:", "neuron:")):
            parts["units"] = "channels first"  # also where a layer has them last, which earlier results took otherwise
        further = self._further(technique, spec.model)
        if further:
            parts["further"] = further
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return Planned(spec, technique, key, dataset, uses)

    def _further(self, technique: Technique, model: str) -> list[list[Any]]:
        """What stands for the other networks and datasets a technique works with: builder, arguments and weights; fingerprints."""
        wanted = technique.further()
        names = [self.registry.generator_for(model) if name == "auto" else name for name in wanted.generators]
        generators = [("generator", name, self.registry.generator(name)) for name in names if name]
        models = [("model", name, self.registry.model(name)) for name in (*wanted.models, *(e.encoder for _, _, e in generators))]
        stylers = [("styler", name, self.registry.styler(name)) for name in wanted.stylers]
        found: list[list[Any]] = []
        for kind, name, entry in (*generators, *stylers, *models):
            if (kind, name) not in self._further_hashes:
                self._further_hashes[kind, name] = weights_hash(name, entry)
            code = [self._code(reference, entry.folder) for reference in (entry.builder, entry.convert)]
            facts = entry.model_dump(mode="json", exclude={"description", "license", "source_url", "file", "recipe", "weights", "sha256"})
            found.append([kind, name, facts, code, self._further_hashes[kind, name]])
        found += [["dataset", name, *_data(self._dataset(name))] for name in wanted.datasets]
        found += [self._picture(technique.name, name) for name in wanted.pictures]
        for _, name, entry in stylers:  # the losses by which its pictures are judged
            recipe = self.registry.styler_recipes.get(entry.recipe)
            if recipe is not None:
                found.append(["styler_recipe", name, recipe.model_dump(mode="json", exclude={"description"})])
                found += [self._picture(technique.name, style, recipe.folder) for style in recipe.styles]
        return found

    def _code(self, reference: Any, folder: Path) -> str:
        """`code_hash`, once for all runs: a package has thousands of files."""
        if not isinstance(reference, str):
            return ""
        if (reference, folder) not in self._codes:
            self._codes[reference, folder] = code_hash(reference, folder)
        return self._codes[reference, folder]

    def _picture(self, technique: str, name: str, folder: Path = Path()) -> list[Any]:
        place = picture_place(name)
        if place is not None:
            return ["picture", name, self._dataset(place[0]).fingerprint]
        path = folder / Path(name).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"{technique}: there is no file {str(path)!r}; name a picture of a dataset as DATASET:ID, or the path of a file"
            )
        return ["picture", sha256_file(path)]

    def _dataset(self, name: str) -> Dataset:
        if name not in self._datasets:
            self._datasets[name] = load_dataset(name, self.registry)
            if self._datasets[name].remark:
                self.session.warning(self._datasets[name].remark)
        return self._datasets[name]

    def _select(self, spec: RunSpec, cls: type[Technique]) -> Dataset:
        assert spec.dataset is not None
        limit = spec.limit
        if limit is None and spec.select is None and ("dataset" not in cls.needs or cls.per_picture):
            limit = PICTURES
        choice = (spec.dataset, limit, tuple(spec.select or ()))
        if choice not in self._selected:
            self._selected[choice] = self._dataset(spec.dataset).select(limit, spec.select)
        return self._selected[choice]

    # -- running -----------------------------------------------------------------------------------------------------

    def run(self, experiment: Experiment) -> list[Outcome]:
        """All runs, in order; what is finished already is reused, and a failure stops nothing else."""
        self._tell("harness_experiment_started")
        planned = self._plans(experiment)
        # Model by model, so that each is loaded once; answers stand in the order asked for.
        first = {name: i for i, name in reversed(list(enumerate(spec.model for spec in experiment.runs)))}
        order = sorted(range(len(planned)), key=lambda i: (first[experiment.runs[i].model], i))
        outcomes: dict[int, Outcome] = {}
        for number, i in enumerate(order, 1):
            plan = planned[i]
            if isinstance(plan, Planned):
                outcomes[i] = self._one(plan, number, len(planned))
            else:
                self.watch(Event("start", experiment.runs[i], number, len(planned)))
                outcomes[i] = self._lost(experiment.runs[i], plan)
                self.watch(Event("end", experiment.runs[i], number, len(planned), outcome=outcomes[i]))
        runs = [outcomes[i].run for i in range(len(planned))]
        self._tell("harness_experiment_finished", runs=runs)
        for problem in self.session.spool.unreadable:
            self.session.warning(f"left out: {problem}")
        # What was in the spool may have moved to the store meanwhile.
        return [replace(outcomes[i], run=self.session.done.get(runs[i].record.key, runs[i])) for i in range(len(planned))]

    def _plans(self, experiment: Experiment) -> list[Planned | WeightsError]:
        """A plan for each run; one model's missing weights are its own trouble, unless there is no other model."""
        planned: list[Planned | WeightsError] = []
        lost: dict[str, WeightsError] = {}
        for spec in experiment.runs:
            try:
                planned.append(lost[spec.model] if spec.model in lost else self.plan(spec))
            except WeightsError as error:
                if spec.model not in self._hashes:  # its own weights, and not those of another network that a technique names
                    lost[spec.model] = error
                planned.append(error)
        if planned and all(isinstance(plan, WeightsError) for plan in planned):
            raise next(plan for plan in planned if isinstance(plan, WeightsError))
        return planned

    def _lost(self, spec: RunSpec, error: WeightsError) -> Outcome:
        """A run whose model has no weights here, recorded as failed."""
        key = hashlib.sha256(spec.model_dump_json().encode()).hexdigest()
        technique = self.plugins.technique(spec.technique).build(spec.params)
        entry = self.registry.model(spec.model)
        record = Record(
            run_id=uuid.uuid4().hex,
            key=key,
            status="failed",
            experiment=self.session.experiment.name,
            spec=spec.model_dump(mode="json"),
            registries=list(self.session.registries),
            technique=self._technique_facts(technique),
            params=technique.key_params(),
            model=ModelFacts(
                name=spec.model,
                builder=entry.builder,
                weights=self._hashes.get(spec.model, "absent"),
                source=entry.weights,
                license=entry.license,
            ),
            seed=spec.seed,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=versions(),
            git=git_state(),
            error=ErrorFacts(type=type(error).__name__, message=str(error), bad_input=True),
        )
        run = self.session.spool.write(record, ())
        self.session.done[key] = run
        self._tell("harness_run_started", spec=spec, key=key)
        self._tell("harness_run_finished", spec=spec, run=run)
        return Outcome(spec, self.session.done[key], "computed")

    def find(self, key: str) -> StoredRun | None:
        """A run of that key that this runner has obtained, or a finished one from the spool or the store."""
        if key in self._obtained:
            return self.session.done[key]
        found: StoredRun | None = self.session.spool.find(key)
        if found is None and not self.session.offline:
            for impl in reversed(self.plugins.manager.hook.harness_find_run.get_hookimpls()):
                try:
                    given = {"session": self.session, "key": key}
                    answer: Any = impl.function(*(given[name] for name in impl.argnames))
                    found = answer
                except StorageError as error:  # a record that cannot be read is as good as none
                    self.session.warning(f"{error}; it is computed again")
                except ConfigError:
                    raise  # a wrong address is the user's to mend, before work begins
                except TrackingError as error:
                    self.session.offline = True
                    self.session.warning(str(error))
                except Exception as error:  # somebody's store is in trouble; the run can be computed all the same
                    self.session.warning(f"harness_find_run: {type(error).__name__}: {error}")
                if found is not None:
                    break
        return found

    def _one(self, plan: Planned, number: int, total: int) -> Outcome:
        self.watch(Event("start", plan.spec, number, total))
        outcome = self._obtain(plan, number, total)
        if outcome.how == "reused":
            self._tell("harness_run_reused", spec=plan.spec, run=outcome.run)
        self.watch(Event("end", plan.spec, number, total, outcome=outcome))
        return outcome

    def _obtain(self, plan: Planned, number: int, total: int) -> Outcome:
        if self.use_cache or plan.key in self._obtained:
            found = self.find(plan.key)
            damage = found.damage() if found is not None and plan.key not in self._obtained else ""
            if damage:
                self.session.warning(f"{damage.partition(';')[0]}; it is computed again")
                found = None
            if found is not None:
                self.session.done[plan.key] = found
                self._obtained.add(plan.key)
                return Outcome(plan.spec, found, "reused")
        used: dict[str, Outcome] = {}
        if plan.uses and not self._refused(plan):
            used = {use.label: self._obtain(planned, number, total) for use, planned in plan.uses}
        lost = [use.label for use, _ in plan.uses if use.optional and use.label in used and used[use.label].failed]
        # What is made without them, or of what was made without others, must not be taken for the whole another time.
        keys = {use.label: planned.key for use, planned in plan.uses}
        lost += [outcome.run.record.key for label, outcome in used.items() if outcome.run.record.key != keys[label]]
        if lost:
            plan = replace(plan, key=hashlib.sha256("\0".join((plan.key, *lost)).encode()).hexdigest())
        self._tell("harness_run_started", spec=plan.spec, key=plan.key)

        def progress(what: str, done: int, of: int) -> None:
            self.watch(Event("step", plan.spec, number, total, what, done, of))

        record, result = self._compute(plan, used, progress)
        try:
            run = self.session.spool.write(record, result.artifacts)
        except StorageError:
            raise
        except Exception as problem:  # an artifact that cannot be stored is the technique's fault, and its own
            fault = ErrorFacts(
                type=type(problem).__name__,
                message=f"its result cannot be stored: {type(problem).__name__}: {problem}",
                traceback=traceback.format_exc(),
            )
            run = self.session.spool.write(record.model_copy(update={"status": "failed", "metrics": [], "notes": [], "error": fault}), ())
        self.session.done[plan.key] = run
        self._obtained.add(plan.key)
        self._tell("harness_run_finished", spec=plan.spec, run=run)
        return Outcome(plan.spec, self.session.done[plan.key], "computed")

    def _refused(self, plan: Planned) -> bool:
        """Does the model or the data lack what the technique itself needs? Nothing it builds on is worth computing then; it fails the same
        way when it is run, and anything else that goes wrong here is told there."""
        try:
            with device_settings(plan.spec.device, plan.spec.precision):
                check_needs(plan.technique, self._context(plan, self._loaded(plan.spec), {}, lambda *_: None, pictures=False))
        except NotApplicable:
            return True
        except Exception:
            return False
        return False

    def _tell(self, hook: str, **arguments: Any) -> None:
        for error in self.plugins.call(hook, session=self.session, **arguments):
            if isinstance(error, ConfigError):
                raise error
            if isinstance(error, TrackingError):
                self.session.offline = True
                self.session.warning(str(error))
            else:
                self.session.warning(f"{hook}: {type(error).__name__}: {error}")

    def _loaded(self, spec: RunSpec) -> LoadedModel:
        from .models import load_model

        device = device_kind(spec.device)
        if self._model is None or self._model[0] != (spec.model, device):
            self._model = None  # two large models need not fit side by side
            model = load_model(spec.model, self.registry, device)
            if model.weights != self._hashes.get(spec.model, model.weights):
                raise ConfigError(f"weights of {spec.model!r} changed while the experiment ran; run it again when nothing writes to them")
            self._model = ((spec.model, device), model)
        return self._model[1]

    def _compute(self, plan: Planned, used: Mapping[str, Outcome], progress: Callable[[str, int, int], None]) -> tuple[Record, Result]:
        spec, technique = plan.spec, plan.technique
        started, clock = datetime.now(UTC), time.perf_counter()
        result, error, batch = Result(), None, spec.max_batch
        selected: list[str] = []
        status: Status = "finished"
        class_count = 0
        with device_settings(spec.device, spec.precision) as facts:
            try:
                optional = {use.label for use, _ in plan.uses if use.optional}
                absent = {label: u for label, u in used.items() if u.run.record.status != "finished"}
                broken = next((u for label, u in absent.items() if label not in optional), None)
                if broken is not None:
                    problem = _reason(broken.run.record)
                    fault = broken.run.record.error
                    kind: type[HarnessError] = ConfigError if fault is not None and fault.bad_input else HarnessError
                    if broken.run.record.status == "not_applicable":
                        kind = NotApplicable
                    raise kind(f"{broken.spec.technique}, which it builds on, has no result: {problem}")
                model = self._loaded(spec)
                class_count = len(model.classes)
                ctx = self._context(plan, model, used, progress)
                selected = list(ctx.ids)
                _ = model.as_loaded
                try:
                    check_needs(technique, ctx)
                    with _noted() as notes:
                        result = _with_inputs(_checked(technique.run(ctx)), ctx, "images" in technique.needs)
                    result = replace(result, notes=[*result.notes, *notes])
                finally:
                    batch = ctx.max_batch
                    changed = model.changes()
                    if changed:
                        self._model = None
                if changed:
                    raise HarnessError(f"the technique left the model changed: {', '.join(changed)}")
            except NotApplicable as reason:
                result, status = Result(), "not_applicable"
                error = ErrorFacts(type="NotApplicable", message=str(reason))
            except Exception as problem:
                result, status = Result(), "failed"
                bad_input = isinstance(problem, ConfigError)
                message = str(problem) if isinstance(problem, HarnessError) else f"{type(problem).__name__}: {problem}"
                error = ErrorFacts(type=type(problem).__name__, message=message, traceback=traceback.format_exc(), bad_input=bad_input)
            memory = peak_memory(device_kind(spec.device))
        seconds = time.perf_counter() - clock
        record = Record(
            run_id=uuid.uuid4().hex,
            key=plan.key,
            status=status,
            experiment=self.session.experiment.name,
            spec=spec.model_dump(mode="json"),
            registries=list(self.session.registries),
            technique=self._technique_facts(technique),
            params=technique.key_params(),
            model=self._model_facts(spec.model, class_count),
            dataset=self._dataset_facts(plan, selected),
            seed=spec.seed,
            device=facts.as_dict(),
            batch=batch,
            started=started.isoformat(timespec="seconds"),
            seconds=round(seconds, 3),
            peak_memory_bytes=memory,
            versions=versions(),
            git=git_state(),
            uses=[u.run.record.key for u in used.values()],
            metrics=[
                MetricValue(
                    name=m.name, value=_number(m.value), unit=m.unit, better=m.better, about=m.about, detail=m.detail,
                    per_image=[_number(v) for v in m.per_image],
                )
                for m in result.metrics
            ],
            notes=list(result.notes),
            error=error,
        )  # fmt: skip
        return record, result

    def _context(
        self,
        plan: Planned,
        model: LoadedModel,
        used: Mapping[str, Outcome],
        progress: Callable[[str, int, int], None],
        pictures: bool = True,
    ) -> Any:
        from .context import Context, labels_of, to_images

        needs, dataset = plan.technique.needs, plan.dataset
        images = labels = None
        ids: list[str] = []
        if dataset is not None:
            labels = labels_of(dataset, model)
            ids = list(dataset.ids)
            if pictures and "images" in needs:
                images = to_images(dataset.pictures(model.input), model.device, model.dtype)
        return Context(
            model,
            images=images,
            labels=labels,
            ids=ids,
            dataset=dataset,
            technique=plan.technique.name,
            target=getattr(plan.technique, "target", "predicted"),
            seed=plan.spec.seed,
            max_batch=plan.spec.max_batch,
            results={label: u.run.all_artifacts() for label, u in used.items() if u.run.record.status == "finished"},
            used=plan.used(),
            missing={label: _reason(u.run.record) for label, u in used.items() if u.run.record.status != "finished"},
            progress=progress,
            registry=self.registry,
        )

    # -- facts -------------------------------------------------------------------------------------------------------

    def _technique_facts(self, technique: Technique) -> TechniqueFacts:
        origin = self.plugins.offers("techniques")[technique.name][1]
        paper = technique.paper
        return TechniqueFacts(
            name=technique.name,
            family=technique.family,
            version=technique.version,
            distribution=origin.distribution,
            distribution_version=origin.version,
            summary=technique.summary(),
            reading=technique.reading,
            caveats=technique.caveats,
            paper={"authors": paper.authors, "year": paper.year, "title": paper.title, "url": paper.url} if paper else None,
        )

    def _model_facts(self, name: str, classes: int) -> ModelFacts:
        entry = self.registry.model(name)
        return ModelFacts(
            name=name,
            builder=entry.builder,
            weights=self._hashes[name],
            source=entry.weights,
            license=entry.license,
            input=entry.input.model_dump(mode="json"),
            classes=classes,
        )

    def _dataset_facts(self, plan: Planned, selected: Sequence[str]) -> DatasetFacts | None:
        if plan.dataset is None or plan.spec.dataset is None:
            return None
        entry = self.registry.dataset(plan.spec.dataset)
        per_picture = "images" in plan.technique.needs or plan.technique.per_picture
        return DatasetFacts(
            name=plan.spec.dataset,
            fingerprint=plan.dataset.fingerprint,
            pictures=len(plan.dataset),
            selected=list(selected) if per_picture else [],
            license=entry.license,
            source=entry.source.partition(":")[0],
        )


def _data(dataset: Dataset) -> list[Any]:
    """What identifies a dataset: its pictures, and what its labels are called."""
    return [dataset.fingerprint, list(dataset.classes), dataset.names_are_indices]


def _reason(record: Record) -> str:
    """Why a run has no result."""
    return record.error.message if record.error else record.status


def _number(value: float) -> float | None:
    return value if abs(value) < float("inf") else None  # NaN compares false


@contextmanager
def _noted() -> Iterator[list[str]]:
    """Warnings about operations that are not repeatable, as notes for the record; all others pass on."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield notes
    for item in caught:
        text = str(item.message)
        if "does not have a deterministic implementation" in text:
            note = f"not repeatable bit for bit: {text.split(' does not have')[0]} has no deterministic form on this device"
            if note not in notes:
                notes.append(note)
        else:
            warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)


def _checked(result: Any) -> Result:
    if not isinstance(result, Result):
        raise TypeError(f"run(ctx) must return a Result, not a {type(result).__name__}")
    return result


def _with_inputs(result: Result, ctx: Any, wanted: bool) -> Result:
    """The pictures a technique looked at belong to its record: maps are drawn over them."""
    if not wanted:
        return result
    names = (
        [f"{i}: {ctx.model.class_name(c)}" for i, c in zip(ctx.ids, ctx.labels.tolist(), strict=True)]
        if ctx.labels is not None
        else ctx.ids
    )
    for artifact in result.artifacts:
        if isinstance(artifact, Heatmaps) and any(not 0 <= i < len(ctx.ids) for i in artifact.over or ()):
            raise ValueError(f"Heatmaps {artifact.name!r} lie over picture {max(artifact.over or ())} of {len(ctx.ids)}; give `over`")
    inputs = Images(INPUTS, ctx.images, captions=names, caption="The pictures as the model takes them.")
    return replace(result, artifacts=[*result.artifacts, inputs])


def check_needs(technique: Technique, ctx: Any) -> None:
    """NotApplicable, in words, when the model or the data lacks what the technique needs."""
    import torch

    model, needs = ctx.model, technique.needs
    if "classifier" in needs:
        _ = model.class_count  # raises NotApplicable itself
    if "labels" in needs and ctx.labels is None:
        raise NotApplicable("needs pictures whose labels are classes of this model")
    if "marks" in needs and ctx.dataset.marks is None:
        raise NotApplicable("needs pictures in which something is marked: a dataset with `masks`, or a planted one")
    kinds = {"conv": torch.nn.Conv2d, "linear": torch.nn.Linear}
    for need, kind in kinds.items():
        if need in needs and not any(isinstance(m, kind) for m in model.modules.values()):
            raise NotApplicable(f"needs a model with {'convolutions' if need == 'conv' else 'a linear layer'}")


def code_hash(reference: Any, folder: Path) -> str:
    """sha256 of the source behind 'file.py:Name', or of all of the package behind 'package.module:name'; empty where there is none.

    What comes with torchvision is told by its version in the record, and a plugin's code by its technique's version. Of what a single
    file imports nothing is known here.
    """
    if not isinstance(reference, str) or reference.startswith(("torchvision:", "layer:", "channel:", "neuron:")):
        return ""
    where, mark, _ = reference.rpartition(":")
    if not mark or not where:
        return ""
    if where.endswith(".py"):
        path: Path | None = folder / Path(where).expanduser()
    else:
        try:
            spec = find_spec(where)
        except (ImportError, ValueError, AttributeError):
            return ""
        path = Path(spec.origin) if spec and spec.origin else None
        package = where.partition(".")[0]
        whole = find_spec(package) if package not in ("harness", "torchvision") else None
        if whole is not None and whole.submodule_search_locations:
            return _sources_hash([Path(place) for place in whole.submodule_search_locations])
    return sha256_file(path) if path is not None and path.is_file() else ""


def _sources_hash(folders: Sequence[Path]) -> str:
    """sha256 over the names and the bytes of a package's Python files."""
    total = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            total.update(f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n".encode())
    return total.hexdigest()


@cache
def versions() -> Mapping[str, str]:
    """Installed versions of what results depend on."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in _RECORDED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def git_state() -> dict[str, Any]:
    """Commit of the repository the command was given in, and whether it has changes; empty outside of one."""

    def git(*words: str) -> str:
        return subprocess.run(("git", *words), capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 all fine, 1 some run failed, 2 where bad input was the cause."""
    failed = [o.run.record.error for o in outcomes if o.failed]
    if any(e is not None and e.bad_input for e in failed):
        return 2
    return 1 if failed else 0
