"""A technique: a frozen set of parameters and `run(ctx) -> Result`.

The fields of a Technique are at once its command-line options, its YAML schema, its documentation and its logged
parameters. A class is final: share code by passing functions, not by subclassing a technique.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from .artifacts import Artifact
    from .context import Context

Param = Field
SLUG = re.compile(r"[a-z][a-z0-9_]*")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")  # of artifacts: also the names of their files

# What a technique may ask of the model and the data. The runner answers "not applicable" where it is missing.
Need = Literal["images", "dataset", "labels", "marks", "classifier", "conv", "linear", "style_images"]

# What is explained: "predicted", "labelled", a class index or name, "layer:NAME", "channel:LAYER:C",
# "neuron:LAYER:C,Y,X", "path.to:callable"; or a list with one of these for each picture.
TargetSpec = str | int | list[str | int]


@dataclass(frozen=True)
class Paper:
    """Where a technique comes from; `arxiv` or `doi` without the address in front."""

    authors: str
    year: int
    title: str
    arxiv: str = ""
    doi: str = ""

    @property
    def url(self) -> str:
        if self.arxiv:
            return f"https://arxiv.org/abs/{self.arxiv}"
        return f"https://doi.org/{self.doi}" if self.doi else ""


@dataclass(frozen=True)
class Metric:
    """A measured number. `better` says which direction is; `per_image` holds what `value` is the mean of."""

    name: str
    value: float
    unit: str = ""
    better: Literal["higher", "lower", ""] = ""
    per_image: Sequence[float] = ()
    about: str = ""  # what it measures, the same for every model
    detail: str = ""  # what belongs to this value: an interval, a count

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_.]*", self.name):
            raise ValueError(f"metric name {self.name!r} is not lower-case letters, digits, '_' and '.'")
        object.__setattr__(self, "value", float(self.value))
        object.__setattr__(self, "per_image", tuple(float(v) for v in self.per_image))


@dataclass(frozen=True)
class Result:
    """What `run` returns: artifacts, metrics, and plain sentences a reader must know (`notes`)."""

    artifacts: Sequence[Artifact] = ()
    metrics: Sequence[Metric] = ()
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for kind, items in (("artifact", self.artifacts), ("metric", self.metrics)):
            names = [item.name for item in items]
            odd = [n for n in names if not NAME.fullmatch(n)]
            if odd:
                raise ValueError(f"{kind} name {odd[0]!r} is not letters, digits, '_', '-' and '.'")
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise ValueError(f"two {kind}s are named {', '.join(twice)}")
        if not all(isinstance(note, str) for note in self.notes):
            raise ValueError("notes are sentences (str)")


@dataclass(frozen=True)
class Use:
    """Another technique's result to build on: the runner computes it first, or takes it from the store.

    It is found under `ctx.results[name]`; `name` is the technique's unless one is given, as two uses of one technique need.
    """

    technique: str
    params: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    optional: bool = False  # without a result (not applicable, failed) it is left out and named in `ctx.missing`

    @property
    def label(self) -> str:
        return self.name or self.technique


@dataclass(frozen=True)
class EveryMap:
    """Every installed technique that declares an `attribution`, third-party ones included, each as an optional Use.

    Those named in `only` where there are any. `target` goes to the techniques that have such a parameter, and their other
    parameters are those of the audit profile `profile` or, with 'draft', of their `draft`; their defaults where they have none.
    """

    target: TargetSpec = "predicted"
    only: tuple[str, ...] = ()
    profile: str = ""


@dataclass(frozen=True)
class Further:
    """Registry names of what a technique needs besides its own model and dataset; the generator 'auto' is the one made for
    that model's codes."""

    models: Sequence[str] = ()
    generators: Sequence[str] = ()
    stylers: Sequence[str] = ()
    datasets: Sequence[str] = ()
    pictures: Sequence[str] = ()  # as DATASET:ID, or paths; their contents then belong to the run's key


@dataclass(frozen=True)
class Used:
    """A technique whose result is at hand, and those it was built on."""

    technique: Technique
    uses: Mapping[str, Used] = field(default_factory=dict)


class Technique(BaseModel):
    """Base of all techniques. Write `name`, a docstring, fields made with Param, and `run`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str] = ""
    family: ClassVar[str] = ""
    version: ClassVar[int] = 1  # raised whenever the numbers a run gives change
    paper: ClassVar[Paper | None] = None
    needs: ClassVar[frozenset[Need]] = frozenset()
    per_picture: ClassVar[bool] = False  # makes something for each picture though it needs the 'dataset': takes few unless told otherwise
    reading: ClassVar[str] = ""  # how to read the picture
    caveats: ClassVar[str] = ""  # what it does not show
    # Name of the Heatmaps (N, H, W), one a picture, that say how much each pixel speaks for the target; techniques that
    # judge maps find it by this name. Empty where there is none.
    attribution: ClassVar[str] = ""
    # Parameters of its run in an audit of that profile; without an entry it is not part of the profile.
    audit: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    draft: ClassVar[Mapping[str, Any]] = {}  # cheaper parameters, for others that compute it many times

    @model_validator(mode="before")
    @classmethod
    def _one_is_enough(cls, given: Any) -> Any:
        """A single value where a list of any length is wanted: `style=painting.png`."""
        if not isinstance(given, Mapping):
            return given
        lists = {n for n, f in cls.model_fields.items() if get_origin(f.annotation) is tuple and get_args(f.annotation)[-1:] == (Ellipsis,)}
        return {k: (v,) if k in lists and isinstance(v, str | int | float) else v for k, v in given.items()}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        where = f"technique {cls.__module__}.{cls.__qualname__}"
        if cls.__bases__ != (Technique,):
            raise TypeError(f"{where}: a technique is final; share functions instead of subclassing {cls.__bases__[0].__name__}")
        if not SLUG.fullmatch(cls.name):
            raise TypeError(f"{where}: `name` must be a slug like 'integrated_gradients', not {cls.name!r}")
        if not cls.__dict__.get("__doc__"):
            raise TypeError(f"{where}: a docstring that says what it computes is missing")
        if cls.run is Technique.run:
            raise TypeError(f"{where}: run(ctx) is missing")
        undocumented = [n for n, f in cls.model_fields.items() if not f.description]
        if undocumented:
            raise TypeError(f"{where}: parameter {', '.join(undocumented)} has no description; declare it with Param(...)")

    def run(self, ctx: Context) -> Result:
        raise NotImplementedError  # a class without its own is refused when it is defined

    def uses(self) -> Sequence[Use | EveryMap]:
        """Results of other techniques, found under `ctx.results[name of the use]`; each looks at the same pictures."""
        return ()

    def further(self) -> Further:
        """What it works with besides the model and dataset it is run on; `ctx.further_model`, `ctx.generator` and
        `ctx.further_dataset` load it."""
        return Further()

    def key_params(self) -> dict[str, Any]:
        """The parameters as plain JSON values."""
        return self.model_dump(mode="json")

    @classmethod
    def summary(cls) -> str:
        return inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].replace("\n", " ")

    @classmethod
    def build(cls, params: Mapping[str, Any], where: str = "") -> Technique:
        """Validated parameters, or a ConfigError with one line a problem."""
        try:
            return cls.model_validate(dict(params))
        except ValidationError as error:
            prefix = f"{where}: " if where else ""
            lines = [
                f"{prefix}{cls.name}{'.' if e['loc'] else ': '}{describe(e, cls.model_fields)}" for e in error.errors(include_url=False)
            ]
            raise ConfigError("\n".join(lines)) from None


def describe(error: Mapping[str, Any], known: Mapping[str, Any] | Sequence[str]) -> str:
    """One pydantic error in words: 'key: what is wrong, and what was given'."""
    location = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        hint = did_you_mean(error["loc"][-1], known) or (f"; there is {', '.join(sorted(known))}" if known else "")
        return f"{location}: unknown key{hint}"
    if error["type"] == "missing":
        return f"{location}: missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not location:  # of several keys together, which the message names
        return message
    given = repr(error["input"])
    return f"{location}: {message}, not {given if len(given) <= 60 else given[:57] + '...'}"
