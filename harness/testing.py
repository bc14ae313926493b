"""The rules that every technique keeps, as checks that anybody can run against their own.

`check_technique(MyTechnique)` runs it on a small network and real digits and gives back what is wrong, in sentences.
It finds what no GPU is needed to find: a tensor made without a device is reported here and would fail there.
"""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from .artifacts import Artifact
from .context import Context, build_network, labels_of, to_images
from .datasets import Dataset, load_dataset
from .errors import ConfigError, HarnessError, NotApplicable
from .models import LoadedModel, load_model
from .plugins import load_plugins
from .registry import load_registry
from .runner import check_needs
from .technique import Result, Technique, Used

FACTORIES = (
    "arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "tensor", "zeros",
    "as_tensor", "from_numpy", "fftfreq", "rfftfreq", "hann_window", "hamming_window", "tril_indices", "triu_indices",
)  # fmt: skip
DRAWS = ("rand", "randint", "randn", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli", "multinomial")


class DeviceGuard(TorchFunctionMode):
    """Notes tensors made without an explicit device, which on a GPU would land on the CPU, and draws without a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        ours = self._caller()
        if ours and name in FACTORIES and name != "from_numpy" and kwargs.get("device") is None:
            self.problems.append(f"torch.{name} without device= at {ours}")
        fixed = kwargs.get("device")
        if ours and name in FACTORIES and isinstance(fixed, str) and not ours.startswith("context.py:"):
            self.problems.append(f"torch.{name} with device={fixed!r} at {ours}; use ctx.device")
        if ours and name in DRAWS and kwargs.get("generator") is None:
            self.problems.append(f"torch.{name} without generator= at {ours}; use ctx.draws() or ctx.randn_like()")
        return func(*args, **kwargs)

    @staticmethod
    def _caller() -> str:
        """file:line of the code that called torch; empty when torch itself did."""
        frame = inspect.currentframe()
        frame = frame.f_back.f_back if frame and frame.f_back else None
        while frame is not None and frame.f_code.co_name == "__torch_function__":  # another mode, which only passed the call on
            frame = frame.f_back
        if frame is None:
            return ""
        path = frame.f_code.co_filename
        outer: Any = frame
        while outer is not None and outer.f_code is not build_network.__code__:
            outer = outer.f_back
        if outer is not None:  # a further network, which is built on the CPU and then put where it belongs
            return ""
        return "" if "/torch/" in path or "/torchvision/" in path else f"{path.rsplit('/', 1)[-1]}:{frame.f_lineno}"


@contextmanager
def global_seeds(seed: int) -> Iterator[Callable[[], bool]]:
    """Set the global generators; the function given says whether they are still as set. They return at the end."""
    before = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # the global generator is what is watched
    torch.manual_seed(seed)
    mine = random.getstate(), repr(np.random.get_state(legacy=False)), torch.get_rng_state()  # noqa: NPY002

    def untouched() -> bool:
        same_numpy = repr(np.random.get_state(legacy=False)) == mine[1]  # noqa: NPY002
        return random.getstate() == mine[0] and same_numpy and torch.equal(torch.get_rng_state(), mine[2])

    try:
        yield untouched
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def small_dataset(count: int = 12, name: str = "digits") -> Dataset:
    """Some pictures of a dataset: of the digits, with all classes among them."""
    return load_dataset(name, load_registry()).select(indices=range(count))


def run_once(
    technique: Technique,
    model: LoadedModel,
    dataset: Dataset,
    seed: int = 0,
    max_batch: int = 4,
) -> Result:
    """Run a technique as the runner would, with what it uses, but without a store."""
    results: dict[str, Mapping[str, Artifact]] = {}
    missing: dict[str, str] = {}
    plugins = load_plugins()
    bare = Context(model, labels=labels_of(dataset, model), ids=dataset.ids, dataset=dataset, technique=technique.name)
    check_needs(technique, bare)
    for use in plugins.uses(technique):
        other = plugins.technique(use.technique).build(use.params)
        try:
            found = run_once(other, model, dataset, seed, max_batch)
        except NotApplicable as reason:
            if not use.optional:
                raise
            missing[use.label] = str(reason)
            continue
        results[use.label] = {a.name: a for a in found.artifacts}
    ctx = Context(
        model,
        images=to_images(dataset.pictures(model.input), model.device, model.dtype) if "images" in technique.needs else None,
        labels=labels_of(dataset, model),
        ids=dataset.ids,
        dataset=dataset,
        technique=technique.name,
        target=getattr(technique, "target", "predicted"),
        seed=seed,
        max_batch=max_batch,
        results=results,
        used=_used(technique),
        missing=missing,
        registry=load_registry(),
    )
    return technique.run(ctx)


def _used(technique: Technique) -> dict[str, Used]:
    plugins = load_plugins()
    others = {use.label: plugins.technique(use.technique).build(use.params) for use in plugins.uses(technique)}
    return {label: Used(other, _used(other)) for label, other in others.items()}


def same(a: Result, b: Result, rtol: float = 0.0, atol: float = 0.0) -> bool:
    """Whether two results hold the same arrays and metrics."""
    if [x.name for x in a.artifacts] != [x.name for x in b.artifacts] or [m.name for m in a.metrics] != [m.name for m in b.metrics]:
        return False
    for x, y in zip(a.artifacts, b.artifacts, strict=True):
        (mx, ax), (my, ay) = x.parts(), y.parts()
        if ax.keys() != ay.keys() or (atol == rtol == 0 and json.dumps(mx, default=str) != json.dumps(my, default=str)):
            return False
        if any(ax[k].shape != ay[k].shape for k in ax) or not all(
            np.allclose(ax[k], ay[k], rtol=rtol, atol=atol, equal_nan=True) if ax[k].dtype.kind in "fc" else np.array_equal(ax[k], ay[k])
            for k in ax
        ):
            return False
    return all(np.isclose(x.value, y.value, rtol=rtol, atol=atol, equal_nan=True) for x, y in zip(a.metrics, b.metrics, strict=True))


# Where techniques are checked: the first on which they are applicable. Some want a linear model, or marks in the pictures.
GROUNDS = (("digits_cnn", "digits"), ("digits_linear", "digits"), ("snow_cnn", "snow_test"))


def check_technique(
    cls: type[Technique], model_name: str = "digits_cnn", params: Mapping[str, Any] | None = None, dataset_name: str = "digits"
) -> list[str]:
    """What is wrong with a technique; an empty list when it keeps the rules.

    Documented; parameters survive JSON and unknown ones are refused; the same seed gives the same result whatever the
    global generators hold, which stay untouched; the model is left as found; tensors are made on the device asked for;
    a result's artifacts survive being stored; the batch size changes nothing but rounding.
    """
    problems: list[str] = []
    params = dict(params or {})
    for wanted, text in (("reading", "how to read the result"), ("family", "its family")):
        if not getattr(cls, wanted):
            problems.append(f"`{wanted}` is missing: say {text}")
    try:
        technique = cls.build(params)
    except ConfigError as error:
        return [*problems, f"its defaults are refused: {error}"]
    if cls.model_validate_json(technique.model_dump_json()) != technique:
        problems.append("parameters do not survive JSON")
    try:
        cls.build({**params, "no_such_parameter": 1})
    except ConfigError:
        pass
    else:
        problems.append("an unknown parameter is accepted")

    model, dataset = load_model(model_name, load_registry()), small_dataset(name=dataset_name)
    _ = model.as_loaded
    guard = DeviceGuard()
    try:
        with global_seeds(1) as untouched, guard:
            first = run_once(technique, model, dataset)
            clean = untouched()
        if not clean:  # a library may draw while it is imported; a run draws again
            with global_seeds(1) as untouched:
                run_once(technique, model, dataset)
                clean = untouched()
        if not clean:
            problems.append("it draws from the global random generators; use ctx.draws()")
        with global_seeds(2):
            again = run_once(technique, model, dataset)
        larger = run_once(technique, model, dataset, max_batch=32)
    except NotApplicable as reason:
        here = GROUNDS.index((model_name, dataset_name)) if (model_name, dataset_name) in GROUNDS else len(GROUNDS)
        if here + 1 < len(GROUNDS):
            return check_technique(cls, GROUNDS[here + 1][0], params, GROUNDS[here + 1][1])
        return [*problems, f"it cannot be checked on {model_name}: {reason}"]
    except HarnessError as error:
        return [*problems, f"it fails on {model_name} with digits: {error}"]
    except Exception as error:  # whatever somebody's technique raises is a finding
        return [*problems, f"it fails on {model_name} with digits: {type(error).__name__}: {error}"]
    if not isinstance(first, Result):
        return [*problems, f"run(ctx) returned a {type(first).__name__}, not a Result"]
    if not first.artifacts and not first.metrics:
        problems.append("its result is empty")
    if not same(first, again):
        problems.append("two runs with the same seed differ")
    if not same(first, larger, rtol=1e-3, atol=1e-4):
        problems.append("its result depends on max_batch")
    problems += [f"it left the model changed: {what}" for what in model.changes()]
    problems += sorted(set(guard.problems))
    problems += _survives(first.artifacts)
    return problems + _attributes(cls, first, len(dataset), model)


def _attributes(cls: type[Technique], result: Result, pictures: int, model: LoadedModel) -> list[str]:
    """Whether the map that a technique declares is there, one a picture, as large as the pictures."""
    if not cls.attribution:
        return []
    found: Any = next((a for a in result.artifacts if a.name == cls.attribution), None)
    shape = (pictures, model.input.size, model.input.size)
    if found is None or found.kind != "heatmaps":
        return [f"`attribution` names {cls.attribution!r}, but its result has no such Heatmaps"]
    if found.data.shape != shape:
        return [
            f"its attribution {cls.attribution!r} has shape {found.data.shape}, not {shape}: one map a picture, as large as the picture"
        ]
    return []


def _survives(found: Sequence[Artifact]) -> list[str]:
    import tempfile
    from pathlib import Path

    from .artifacts import load

    problems = []
    with tempfile.TemporaryDirectory() as folder:
        for artifact in found:
            path = Path(folder) / f"{artifact.name}.npz"
            try:
                artifact.save(path)
                back = load(path)
            except (OSError, TypeError, ValueError, KeyError) as error:
                problems.append(f"artifact {artifact.name!r} cannot be stored: {error}")
                continue
            if not same(Result([artifact]), Result([back])):
                problems.append(f"artifact {artifact.name!r} changes when it is stored")
    return problems
