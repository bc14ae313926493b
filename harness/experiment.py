"""Experiment YAML -> a list of runs: models x datasets x techniques x parameters x seeds.

name: maps
models: [squeezenet1_1, resnet18@random]
datasets: [imagenet_samples]
techniques:
  - saliency
  - occlusion: {window: 32, stride: {sweep: [8, 16]}}
seeds: [0, 1]
limit: 8
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from . import yamlfile
from .errors import ConfigError, RegistryError
from .plugins import Plugins
from .technique import Technique

Count = Annotated[int, Field(ge=1)]
# How many pictures a technique that makes something for each picture gets, unless told otherwise.
PICTURES = 20


class RunSpec(BaseModel):
    """One run: (model, dataset, technique, parameters, seed) on one device."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str
    dataset: str | None = None
    technique: str
    params: dict[str, Any] = {}
    seed: int = 0
    limit: Count | None = None
    select: list[int] | None = None
    device: str = "auto"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    max_batch: Count = 32

    def command(self, registries: Sequence[str] = ()) -> str:
        """The command line that makes this run."""
        words = ["harness"]
        for path in registries:
            words += ["--registry", path]
        words += ["run", "-m", self.model]
        if self.dataset:
            words += ["-d", self.dataset]
        words += ["-t", self.technique]
        for name, value in sorted(self.params.items()):
            words += ["-p", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
        if self.seed:
            words += ["--seed", str(self.seed)]
        if self.limit:
            words += ["--limit", str(self.limit)]
        if self.select:
            words += ["--select", ",".join(map(str, self.select))]
        if self.device != "auto":
            words += ["--device", self.device]
        if self.precision != "float32":
            words += ["--precision", self.precision]
        if self.max_batch != 32:
            words += ["--max-batch", str(self.max_batch)]
        return shlex.join(words)

    def label(self) -> str:
        """'technique on model, dataset', for people."""
        return f"{self.technique} on {self.model}" + (f", {self.dataset}" if self.dataset else "")


@dataclass(frozen=True)
class Experiment:
    """A named set of runs."""

    name: str
    runs: tuple[RunSpec, ...]
    title: str = ""
    command: str = ""

    def digest(self) -> str:
        """Identifies the set of runs asked for."""
        text = json.dumps([self.name, *(r.model_dump(mode="json") for r in self.runs)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    title: str = ""
    models: Annotated[list[str], Field(min_length=1)]
    datasets: list[str] = []
    techniques: Annotated[list[str | dict[str, dict[str, Any] | None]], Field(min_length=1)]
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0]
    limit: Count | None = None
    select: list[int] | None = None
    device: str = "auto"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    max_batch: Count = 32

    @model_validator(mode="after")
    def _one_choice(self) -> _File:
        if self.limit is not None and self.select is not None:
            raise ValueError("limit and select both choose pictures; give one of them")
        return self


def sweeps(params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the values given as {sweep: [...]}."""
    choices: list[list[Any]] = []
    for name, value in params.items():
        if isinstance(value, Mapping) and set(value) == {"sweep"}:
            if not isinstance(value["sweep"], list) or not value["sweep"]:
                raise ConfigError(f"{name}: sweep needs a list of values")
            choices.append(value["sweep"])
        else:
            choices.append([value])
    return [dict(zip(params, combination, strict=True)) for combination in itertools.product(*choices)]


def needs_data(technique: type[Technique]) -> bool:
    return bool(technique.needs & {"images", "dataset", "labels", "marks"})


def expand(
    plugins: Plugins,
    models: Sequence[str],
    datasets: Sequence[str],
    techniques: Iterable[tuple[str, Mapping[str, Any]]],
    seeds: Sequence[int] = (0,),
    **common: Any,
) -> tuple[RunSpec, ...]:
    """The runs of a grid; parameters are checked here, and a technique that needs no pictures runs once a model."""
    specs: dict[str, RunSpec] = {}
    for (name, params), model, seed in itertools.product(list(techniques), models, seeds):
        cls = plugins.technique(name)
        if needs_data(cls) and not datasets:
            raise ConfigError(f"technique {name!r} needs pictures: name a dataset (`harness datasets` lists them)")
        for combination in sweeps(params):
            cls.build(combination)
            for dataset in datasets if needs_data(cls) else [None]:
                data = common if dataset else {k: v for k, v in common.items() if k not in ("limit", "select")}
                spec = RunSpec(model=model, dataset=dataset, technique=name, params=combination, seed=seed, **data)
                specs.setdefault(spec.model_dump_json(), spec)
    return tuple(specs.values())


def load_experiment(path: Path, plugins: Plugins, **override: Any) -> Experiment:
    """Read and check an experiment file; errors carry file:line, the key and the nearest valid name."""
    source = yamlfile.read(path)
    file = source.validate(_File, source.data)
    problems: list[str] = []
    techniques: list[tuple[str, Mapping[str, Any]]] = []
    for i, item in enumerate(file.techniques):
        location: tuple[str | int, ...] = ("techniques", i)
        if isinstance(item, str):
            name = item
            params: Mapping[str, Any] = {}
        elif len(item) == 1:
            name, params = next((k, v or {}) for k, v in item.items())
            location = (*location, name)
        else:
            problems.append(f"{source.at(location)}: techniques.{i}: one technique an item, as `- name: {{parameter: value}}`")
            continue
        try:
            cls = plugins.technique(name)
            for combination in sweeps(params):
                cls.build(combination)
        except ConfigError as error:
            for line in str(error).splitlines():
                key = line.partition(": ")[0].removeprefix(f"{name}.")
                problems.append(f"{source.at((*location, key))}: techniques.{line}")
            continue
        techniques.append((name, params))
    if problems:
        raise RegistryError("\n".join(dict.fromkeys(problems)))
    common: dict[str, Any] = {
        "limit": file.limit,
        "select": file.select,
        "device": file.device,
        "precision": file.precision,
        "max_batch": file.max_batch,
    }
    for one, other in (("limit", "select"), ("select", "limit")):  # what the command line chooses takes the place of the file's choice
        if override.get(one) is not None:
            common[other] = None
    common |= {k: v for k, v in override.items() if v is not None}
    seeds = [common.pop("seed")] if "seed" in common else file.seeds
    runs = expand(plugins, file.models, file.datasets, techniques, seeds, **common)
    return Experiment(file.name, runs, file.title or file.name, shlex.join(["harness", "run", str(path)]))
