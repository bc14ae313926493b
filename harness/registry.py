"""`registry.yaml` -> typed entries. A user's own file overlays ours: an entry of the same name replaces it whole."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from . import yamlfile
from .errors import ConfigError, RegistryError, did_you_mean, unknown

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

Positive = Annotated[int, Field(ge=1, le=100_000)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    description: str = ""
    license: str = ""
    source_url: str = ""
    _where: str = PrivateAttr("")
    _folder: Path = PrivateAttr(Path("."))

    @property
    def where(self) -> str:
        """'file:line' of the entry."""
        return self._where

    @property
    def folder(self) -> Path:
        """The folder of the file it stands in; relative paths start there."""
        return self._folder


class InputSpec(BaseModel):
    """What a model expects: pictures are resized (shorter side), centre-cropped to `size`, then (x - mean) / std."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    channels: Literal[1, 3] = 3
    size: Positive = 224
    resize: Positive | None = None
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _complete(self) -> InputSpec:
        for key, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            value = getattr(self, key) or (default if self.channels == 3 else default[:1])
            if len(value) != self.channels:
                raise ValueError(f"{key} has {len(value)} numbers for {self.channels} channels")
            object.__setattr__(self, key, value)
        if min(self.std) <= 0:
            raise ValueError("std must be above zero")
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize {self.resize} is below the crop size {self.size}")
        return self


class ModelEntry(_Entry):
    """How to build a model, where its weights are, and what it takes and gives."""

    builder: str
    args: dict[str, Any] = {}
    weights: str = "random:0"
    convert: str = ""  # path.to:function(loaded, entry) -> state dict, for weights stored another way
    file: str = ""  # file name of downloaded weights, so that their hash is known without importing torchvision
    sha256: Sha256 | None = None
    classes: str | list[str] = ""
    input: InputSpec = InputSpec()
    recipe: str = ""

    @field_validator("builder", "weights")
    @classmethod
    def _scheme(cls, value: str) -> str:
        if ":" not in value:
            raise ValueError("must look like 'scheme:name' or 'path.to:Class'")
        return value


class GeneratorEntry(ModelEntry):
    """A network that makes pictures of the codes that `layer` of model `encoder` gives."""

    encoder: str
    layer: str


class DatasetEntry(_Entry):
    """Where pictures come from: `folder:PATH`, `package:PACKAGE/PATTERN`, `digits:SPLIT`, `torchvision:NAME`, `planted:DATASET`."""

    source: str
    args: dict[str, Any] = {}  # what the source takes besides
    masks: str = ""  # a folder of pictures, not black where an object or a suspected cue is
    masks_show: str = ""  # what that is, in words
    classes: str | list[str] = ""
    split: Literal["train", "test", "all"] = "all"
    files: list[str] = []
    unlabelled: bool = False

    @field_validator("source")
    @classmethod
    def _scheme(cls, value: str) -> str:
        if ":" not in value:
            raise ValueError("must look like 'scheme:rest'")
        return value


class Adversary(BaseModel):
    """The inner maximisation of adversarial training: the loss is that of the worst picture found within eps of each, in L-inf
    (Madry et al. 2017, arXiv:1706.06083, eq. 2.1). One step of 1.25 eps from a random start is fast adversarial training (Wong et al.
    2020, arXiv:2001.03994)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    eps: Annotated[float, Field(gt=0, le=255)]  # in 255ths
    steps: Positive = 7
    step_size: Annotated[float, Field(gt=0, le=2)] = 0.25  # as a share of eps
    random_start: bool = True


class RecipeEntry(_Entry):
    """How a small network is trained; `harness train NAME` follows it."""

    builder: str
    args: dict[str, Any] = {}
    dataset: str
    test_dataset: str = ""  # none: every fifth picture of the dataset is kept apart
    limit: Positive | None = None  # as many pictures, spread evenly
    epochs: Positive
    batch_size: Positive = 64
    learning_rate: Annotated[float, Field(gt=0)] = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    shift: Annotated[int, Field(ge=0)] = 0  # random shifts of up to this many pixels
    flip: bool = False  # mirror half of the pictures
    schedule: Literal["cosine", "triangular"] = "cosine"  # of the rate: falling, or rising for half of the steps and falling then
    adversary: Adversary | None = None  # train on the worst pictures within a budget
    noise: Annotated[float, Field(ge=0, le=1)] = 0.0  # std of Gaussian noise on the pixels, for certified_radius (Cohen et al. 2019)
    signs: Annotated[float, Field(ge=0, le=1)] = 0.0  # size of random signs added to the pixels: noise that looks for nothing
    seed: int = 0
    classes: str | list[str] = ""
    input: InputSpec = InputSpec()


class GeneratorRecipe(_Entry):
    """How a generator is trained to invert a layer: by pixel, feature and adversarial loss (Dosovitskiy & Brox 2016)."""

    encoder: str
    layer: str
    compare: str = ""  # the layer of the encoder whose features must agree as well; the code's own where none is named
    dataset: str
    test_dataset: str = ""  # none: every fifth picture of the dataset is kept apart
    epochs: Positive
    batch_size: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = 0.001
    width: Positive = 64
    pixel: Annotated[float, Field(ge=0)] = 1.0
    feature: Annotated[float, Field(ge=0)] = 1.0
    adversarial: Annotated[float, Field(ge=0)] = 0.01
    seed: int = 0


class StylerEntry(ModelEntry):
    """A network that makes pictures in styles; `styles` names them, in the order of its rows."""

    styles: list[str]


class StylerRecipe(_Entry):
    """How such a network is trained: the losses of style transfer, on the network's pictures (Johnson et al. 2016)."""

    encoder: str
    content_layer: str
    style_layers: list[str]
    styles: list[str]  # pictures, as DATASET:ID or the paths of files
    style_names: list[str] = []
    dataset: str
    steps: Positive
    batch_size: Positive = 4
    learning_rate: Annotated[float, Field(gt=0)] = 0.001
    optimiser: Literal["adam", "muon"] = "adam"  # muon: of the kernels; norms and biases are learnt by Adam all the same
    crop: int | tuple[int, int] = 256  # pixels; with `shown` the root of the area, or the least and the most of it
    shown: Annotated[float, Field(ge=0.1, le=1)] | None = None  # least share of what a crop can show of its picture; see `crops`
    style_size: Annotated[int, Field(ge=32)] = 256
    content_weight: Annotated[float, Field(ge=0)] = 1.0
    style_weight: Annotated[float, Field(ge=0)] = 30.0
    style_shares: list[Annotated[float, Field(ge=0)]] = []  # how much of it each style gets; none: all of it
    tv_weight: Annotated[float, Field(ge=0)] = 0.3
    width: Positive = 32
    blocks: Positive = 5
    norm: Literal["instance", "batch"] = "instance"
    base: str = ""  # a styler that learns further styles: their rows of its norms alone
    start: str = ""  # a styler that the network begins as; its width, blocks and norm are that one's
    seed: int = 0

    @field_validator("crop", mode="before")
    @classmethod
    def _sides(cls, value: Any) -> Any:
        sides = value if isinstance(value, list | tuple) else [value]
        if len(sides) not in (1, 2) or not all(type(side) is int and side >= 32 for side in sides):
            raise ValueError("must be a number of pixels from 32 up, or two, the least and the most")
        return tuple(sides) if len(sides) == 2 else sides[0]

    @model_validator(mode="after")
    def _consistent(self) -> StylerRecipe:
        if self.base and self.start:
            raise ValueError(f"base {self.base} learns further styles and start {self.start} learns anew: give one of them")
        if isinstance(self.crop, tuple) and (self.shown is None or self.crop[0] > self.crop[1]):
            raise ValueError(f"crop {list(self.crop)}: two sizes are the least and the most, and go with `shown`")
        if self.style_shares and len(self.style_shares) != len(self.styles):
            raise ValueError(f"{len(self.style_shares)} style_shares for {len(self.styles)} styles")
        return self

    def one(self, style: int) -> StylerRecipe:
        """The recipe of one of its styles alone."""
        share = self.style_shares[style] if self.style_shares else 1.0
        found = self.model_copy(
            update={
                "styles": [self.styles[style]],
                "style_names": self.style_names[style : style + 1],
                "style_weight": self.style_weight * share,
                "style_shares": [],
            }
        )
        found._where, found._folder = self._where, self._folder
        return found


AnyRecipe = RecipeEntry | GeneratorRecipe | StylerRecipe

SECTIONS: dict[str, type[_Entry]] = {
    "models": ModelEntry,
    "generators": GeneratorEntry,
    "datasets": DatasetEntry,
    "recipes": RecipeEntry,
    "generator_recipes": GeneratorRecipe,
    "stylers": StylerEntry,
    "styler_recipes": StylerRecipe,
}


@dataclass(frozen=True)
class Registry:
    """All entries, ours and the user's."""

    models: Mapping[str, ModelEntry] = field(default_factory=dict)
    datasets: Mapping[str, DatasetEntry] = field(default_factory=dict)
    recipes: Mapping[str, RecipeEntry] = field(default_factory=dict)
    generators: Mapping[str, GeneratorEntry] = field(default_factory=dict)
    generator_recipes: Mapping[str, GeneratorRecipe] = field(default_factory=dict)
    stylers: Mapping[str, StylerEntry] = field(default_factory=dict)
    styler_recipes: Mapping[str, StylerRecipe] = field(default_factory=dict)
    files: Sequence[Path] = ()

    def model(self, name: str) -> ModelEntry:
        """The entry of `NAME`, or of `NAME@random[:SEED]` with seeded random weights in place of its own."""
        base, _, variant = name.partition("@")
        if base not in self.models:
            raise unknown("model", base, self.models, "`harness models`")
        entry = self.models[base]
        if name == base:
            return entry
        match = re.fullmatch(r"random(?::(\d+))?", variant)
        if not match:
            raise ConfigError(f"model {name!r}: after '@' only 'random' or 'random:SEED' may stand")
        update = {"weights": f"random:{match[1] or 0}", "sha256": None, "convert": "", "file": "", "recipe": ""}
        update["description"] = f"{base} with random weights in place of its own"
        random = entry.model_copy(update=update)
        random._where, random._folder = entry.where, entry.folder
        return random

    def dataset(self, name: str) -> DatasetEntry:
        """The entry of a name, or of a folder of images given by its path."""
        if name in self.datasets:
            return self.datasets[name]
        if os.sep in name or name in (".", "..") or Path(name).is_dir():
            if not Path(name).is_dir():
                raise ConfigError(f"dataset {name!r}: there is no such folder")
            if any("\ud800" <= letter <= "\udfff" for letter in name):  # records are UTF-8
                raise ConfigError(f"dataset {name!r}: the folder's name is not UTF-8; rename it, or make a link to it")
            entry = DatasetEntry(source=f"folder:{Path(name).resolve()}", description="a folder of images")
            entry._where = name
            return entry
        raise unknown("dataset", name, self.datasets, "`harness datasets`, a path with a '/' names a folder;")

    def recipe(self, name: str) -> AnyRecipe:
        known: dict[str, AnyRecipe] = {**self.recipes, **self.generator_recipes, **self.styler_recipes}
        if name not in known:
            raise unknown("recipe", name, known)
        return known[name]

    def with_recipe(self, name: str, recipe: AnyRecipe, changed: Mapping[str, Any]) -> Registry:
        """The registry with a recipe added under `name`, some of its values changed."""
        new = recipe.model_copy(update=dict(changed))
        new._where, new._folder = recipe.where, recipe.folder
        sections = {"recipes": RecipeEntry, "generator_recipes": GeneratorRecipe, "styler_recipes": StylerRecipe}
        update: dict[str, Any] = {}
        for section, kind in sections.items():
            others = {key: value for key, value in getattr(self, section).items() if key != name}
            update[section] = {**others, name: new} if isinstance(new, kind) else others
        return replace(self, **update)

    def styler(self, name: str) -> StylerEntry:
        if name not in self.stylers:
            raise unknown("styler", name, self.stylers)
        return self.stylers[name]

    def generator(self, name: str) -> GeneratorEntry:
        if name not in self.generators:
            raise unknown("generator", name, self.generators)
        return self.generators[name]

    def generator_for(self, model: str) -> str:
        """The first generator made for codes of a model (as it is named, its own weights); empty where there is none."""
        return next((name for name, entry in self.generators.items() if entry.encoder == model), "")


def shipped_path() -> Path:
    """Our own registry: inside the package in a wheel, at the project's root in a checkout."""
    here = Path(__file__).parent
    for path in (here / "registry.yaml", here.parent / "registry.yaml"):
        if path.is_file():
            return path
    raise RegistryError(f"registry.yaml is missing beside {here}; reinstall vision-harness")


def read_file(path: Path) -> dict[str, dict[str, Any]]:
    """The validated entries of one registry file, by section."""
    source = yamlfile.read(path)
    if not isinstance(source.data, dict):
        raise RegistryError(f"{source.at()}: a registry holds the sections {', '.join(SECTIONS)}")
    problems: list[str] = []
    found: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for section, entries in source.data.items():
        if section not in SECTIONS:
            known = "; there is " + ", ".join(SECTIONS)
            problems.append(f"{source.at((section,))}: {section}: unknown section{did_you_mean(section, SECTIONS) or known}")
            continue
        if not isinstance(entries, dict):
            problems.append(f"{source.at((section,))}: {section}: must map names to entries")
            continue
        for name, value in entries.items():
            location = (section, name)
            if not NAME.fullmatch(str(name)):
                problems.append(f"{source.at(location)}: {section}.{name}: a name has letters, digits, '_', '.' and '-'")
                continue
            try:
                entry = source.validate(SECTIONS[section], value, location)
            except RegistryError as error:
                problems.append(str(error))
                continue
            entry._where, entry._folder = source.at(location), path.resolve().parent
            found[section][str(name)] = entry
    if problems:
        raise RegistryError("\n".join(problems))
    return found


def named_registries() -> list[Path]:
    """The registry files that `HARNESS_REGISTRY` names, path separator between."""
    return [Path(p) for p in os.environ.get("HARNESS_REGISTRY", "").split(os.pathsep) if p]


def load_registry(overlays: Sequence[Path] = ()) -> Registry:
    """Our registry with the user's files laid over it, in order: those of `HARNESS_REGISTRY`, then those given."""
    merged: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    files = [shipped_path(), *named_registries(), *overlays]
    for path in files:
        for section, entries in read_file(path).items():
            merged[section].update(entries)
    return Registry(**merged, files=tuple(files))
