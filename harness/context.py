"""What a technique is given: the model, the pictures, repeatable random numbers, and the verbs they share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from .errors import HarnessError, NotApplicable
from .targets import Target, resolve
from .technique import TargetSpec, Used

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from PIL import Image

    from .artifacts import Artifact
    from .datasets import Dataset
    from .generators import LoadedGenerator
    from .models import LoadedModel
    from .registry import Registry, StylerRecipe
    from .stylers import LoadedStyler

T = TypeVar("T")


def stable_seed(*parts: object) -> int:
    """A 63-bit seed that depends on the parts alone: not on the process, the machine or the order of work."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def drawn(draw: Callable[..., Tensor], size: Any, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """draw(size), such as torch.rand of a shape or torch.randperm of a number, on the CPU and then put on the device: every device
    gets the same numbers."""
    return draw(size, generator=generator, device="cpu").to(device)


MANY = 2**17  # random numbers that are worth several threads


class Draws:
    """Random numbers for named items: an item gets the same numbers in any batch, order or worker.

    Drawn on the CPU, so that every device sees the same; shapes are for one item, results are (items, *shape).
    """

    def __init__(self, ids: Sequence[str], device: torch.device, dtype: torch.dtype, *seed: object) -> None:
        self.ids, self.device, self.dtype = list(ids), device, dtype
        self._generators = [torch.Generator("cpu").manual_seed(stable_seed(*seed, i)) for i in self.ids]

    def _filled(self, shape: Sequence[int], dtype: torch.dtype, fill: Callable[[Tensor, torch.Generator], Tensor]) -> Tensor:
        pin = self.device.type == "cuda"  # else the copy would be waited for
        found = torch.empty((len(self.ids), *shape), dtype=dtype, device="cpu", pin_memory=pin)
        items, threads = found.unbind(0), min(len(self.ids), torch.get_num_threads())
        if threads > 1 and found.numel() >= MANY:
            with ThreadPoolExecutor(threads) as pool:  # torch draws in one thread, and lets others run meanwhile
                list(pool.map(fill, items, self._generators))
        else:
            for item, generator in zip(items, self._generators, strict=True):
                fill(item, generator)
        return found.to(self.device, non_blocking=True)

    def randn(self, shape: Sequence[int]) -> Tensor:
        return self._filled(shape, self.dtype, lambda x, g: x.normal_(generator=g))

    def rand(self, shape: Sequence[int]) -> Tensor:
        return self._filled(shape, self.dtype, lambda x, g: x.uniform_(generator=g))

    def randint(self, low: int, high: int, shape: Sequence[int]) -> Tensor:
        """Whole numbers low <= n < high, as int64."""
        return self._filled(shape, torch.int64, lambda x, g: x.random_(low, high, generator=g))

    def integers(self, low: int, high: int, count: int) -> list[list[int]]:
        """Per item `count` whole numbers low <= n < high as Python ints: no device is waited for."""
        return [torch.randint(low, high, (count,), generator=g, device="cpu").tolist() for g in self._generators]

    def normals(self, count: int) -> list[list[float]]:
        """Per item `count` normal numbers as Python floats: no device is waited for."""
        return [torch.randn(count, generator=g, device="cpu", dtype=torch.float64).tolist() for g in self._generators]

    def state(self) -> Tensor:
        """(items, bytes) uint8: where the generators stand; `restore` puts them back there."""
        return torch.stack([g.get_state() for g in self._generators])

    def restore(self, state: Tensor) -> None:
        for generator, found in zip(self._generators, state, strict=True):
            generator.set_state(found.clone())  # torch reads past a view


class Context:
    """Handed to `Technique.run`.

    images   (N, C, H, W), float32 in [0, 1], on `device`; empty when the technique needs none
    labels   (N,) indices into the model's classes, or None
    ids      names of the pictures
    dataset  the whole selection, for techniques that stream it
    results  {technique: {artifact name: Artifact}} of what `uses()` asked for
    missing  {technique: why} for those of them that are optional and have no result
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        ids: Sequence[str] = (),
        dataset: Dataset | None = None,
        technique: str = "",
        target: TargetSpec = "predicted",
        seed: int = 0,
        max_batch: int = 32,
        results: Mapping[str, Mapping[str, Artifact]] | None = None,
        used: Mapping[str, Used] | None = None,
        missing: Mapping[str, str] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        registry: Registry | None = None,
    ) -> None:
        self._registry, self._further = registry, dict[tuple[str, str], Any]()
        self.model = model
        self.device = model.device
        self._images = images
        self._labels = labels
        self.ids = list(ids)
        self._dataset = dataset
        self.technique, self.seed, self.max_batch = technique, seed, max_batch
        self.results = results or {}
        self.used, self.missing = used or {}, missing or {}
        self._spec = target
        self._progress = progress
        self._draws: dict[str, Draws] = {}

    # -- data ------------------------------------------------------------------------------------------------------

    @property
    def images(self) -> Tensor:
        if self._images is None:
            raise NotApplicable("needs images; declare 'images' in `needs`")
        return self._images

    @property
    def dataset(self) -> Dataset:
        if self._dataset is None:
            raise NotApplicable("needs a dataset; declare 'dataset' in `needs`")
        return self._dataset

    @property
    def labels(self) -> Tensor | None:
        return self._labels

    def stream(self, work: Callable[[Tensor], T]) -> Iterator[tuple[slice, T]]:
        """(rows, work(images)) over the whole dataset without gradients; the next batch is opened during the work on this one.

        `work` gets at most `max_batch` pictures; when memory runs out it is called again with fewer.
        """
        total = len(self.dataset)
        for whole, pixels in self.dataset.batches(self.model.input, self.max_batch):
            images = to_images(pixels, self.device, self.model.dtype)
            start = whole.start

            def some(rows: slice, images: Tensor = images) -> tuple[int, T]:
                with torch.no_grad():
                    return rows.stop - rows.start, work(images[rows])

            for count, value in self.batched(len(images), some):
                yield slice(start, start + count), value
                start += count
            self.report("pictures", whole.stop, total)

    @cached_property
    def masks(self) -> Tensor | None:
        """(N, H, W) bool: what the dataset marks in each picture (an object, a suspected cue); None where it marks nothing."""
        found = self.dataset.masks(self.model.input) if self._dataset is not None else None
        return None if found is None else torch.from_numpy(found).to(self.device)

    # -- other networks and datasets ------------------------------------------------------------------------------------

    def further_model(self, name: str) -> LoadedModel:
        """A model that the technique names in `further()`, on the same device."""
        from .models import load_model

        return cast("LoadedModel", self._loaded("model", name, lambda registry: load_model(name, registry, self.device)))

    def generator(self, name: str) -> LoadedGenerator | None:
        """A generator that the technique names in `further()`; of 'auto', None where the registry has none for this model."""
        from .generators import load_generator

        if name == "auto":
            name = self._registry.generator_for(self.model.name) if self._registry else ""
            if not name:
                return None
        return cast("LoadedGenerator", self._loaded("generator", name, lambda registry: load_generator(name, registry, self.device)))

    def further_dataset(self, name: str) -> Dataset:
        """A dataset that the technique names in `further()`."""
        from .datasets import load_dataset

        return load_dataset(name, self.registry)

    def named_picture(self, name: str, folder: Path | None = None) -> Image.Image:
        """A picture that the technique names in `further()`, as DATASET:ID or by its path (from `folder`), mode L or RGB."""
        from .datasets import named_picture

        return named_picture(name, self.registry, folder)

    def styler(self, name: str) -> LoadedStyler:
        """A network that makes pictures in styles, which the technique names in `further()`."""
        from .stylers import load_styler

        return cast("LoadedStyler", self._loaded("styler", name, lambda registry: load_styler(name, registry, self.device)))

    @property
    def registry(self) -> Registry:
        if self._registry is None:
            raise HarnessError("this context was made without a registry")
        return self._registry

    def styler_recipe(self, name: str) -> StylerRecipe | None:
        """The recipe that a styler names, if it is in the registry."""
        return self.registry.styler_recipes.get(self.registry.styler(name).recipe)

    def _loaded(self, kind: str, name: str, load: Callable[[Registry], Any]) -> Any:
        if (kind, name) not in self._further:
            self._further[kind, name] = build_network(load, self.registry)
        return self._further[kind, name]

    # -- what others have found ------------------------------------------------------------------------------------

    def attributions(self) -> dict[str, Tensor]:
        """{technique: (N, H, W)} the maps among the results, by the artifact that each declares as its `attribution`."""
        found = {}
        for label, artifacts in self.results.items():
            name = self.used[label].technique.attribution
            if name:
                found[label] = torch.from_numpy(_attribution(label, artifacts, name)).to(self.device)
        return found

    def needed_attributions(self) -> dict[str, Tensor]:
        """`attributions()`, where there must be one: NotApplicable with the reasons of all that are missing. A target that names nothing
        is told first, as it is why there is none."""
        _ = self.target
        found = self.attributions()
        if not found:
            reasons = "".join(f"; {label}: {why}" for label, why in self.missing.items())
            raise NotApplicable(f"needs a technique that gives maps of these pictures; none has a result{reasons}")
        return found

    def again(
        self,
        label: str,
        *,
        model: LoadedModel | None = None,
        images: Tensor | None = None,
        target: TargetSpec | None = None,
        rows: Sequence[int] | None = None,
    ) -> dict[str, Artifact]:
        """{artifact name: Artifact} of a use computed anew: on another model, on other pictures in place of these, for another target.

        `rows` takes some of the pictures only. The seed and the pictures' names stay, so random numbers are the same.
        """
        keep = list(range(len(self.ids))) if rows is None else list(rows)
        return self._again(self.used[label], model or self.model, self.images[keep] if images is None else images, target, keep)

    def _again(self, used: Used, model: LoadedModel, images: Tensor, target: TargetSpec | None, keep: list[int]) -> dict[str, Artifact]:
        technique = used.technique
        target = getattr(technique, "target", None) if target is None else target
        if isinstance(target, list) and len(target) == len(self.ids) != len(keep):
            target = [target[i] for i in keep]
        if target is not None and "target" in type(technique).model_fields:
            technique = technique.model_copy(update={"target": target})
        ctx = Context(
            model,
            images=images,
            labels=None if self.labels is None else self.labels[keep],
            ids=[self.ids[i] for i in keep],
            dataset=None if self._dataset is None else self._dataset.select(indices=keep),
            technique=technique.name,
            target=getattr(technique, "target", "predicted"),
            seed=self.seed,
            max_batch=self.max_batch,
            results={label: self._again(other, model, images, target, keep) for label, other in used.uses.items()},
            used=used.uses,
            registry=self._registry,
        )
        try:
            return {artifact.name: artifact for artifact in technique.run(ctx).artifacts}
        finally:
            self.max_batch = ctx.max_batch  # halved where memory ran out

    # -- what is explained -----------------------------------------------------------------------------------------

    @cached_property
    def own_logits(self) -> Tensor:
        """(N, K) class scores of the pictures; known without a further pass once `input_gradient()` has been there."""
        return self.logits(self.images)

    @cached_property
    def predicted(self) -> Tensor:
        """(N,) the class with the highest score for each picture."""
        return self.own_logits.argmax(1)

    @cached_property
    def target(self) -> Target:
        """The target the technique's parameter `target` names."""
        return resolve(self._spec, self.model, len(self.ids), lambda: self.predicted, self.labels)

    def logits(self, images: Tensor) -> Tensor:
        """(n, K) class scores, without gradients, at most `max_batch` pictures at a time."""
        with torch.no_grad():
            return torch.cat(list(self.batched(len(images), lambda rows: self.model(images[rows]))))

    def input_gradient(self, images: Tensor | None = None, target: Target | None = None) -> Tensor:
        """(N, C, H, W) gradient of each picture's score with respect to its pixels; rows are those of ctx.images."""
        own = images is None
        x = self.images if images is None else images
        # The predicted class is read off the pass that the gradient needs anyway.
        best = own and target is None and self._spec == "predicted" and "own_logits" not in self.__dict__
        wanted = None if best else target or self.target
        seen: list[Tensor] = []

        def gradient(rows: slice) -> Tensor:
            with torch.enable_grad():
                leaf = x[rows].detach().requires_grad_()
                output = self.model(leaf) if wanted is None else wanted.output(self.model, leaf)
                score = output.gather(1, output.argmax(1, keepdim=True)) if wanted is None else wanted.score(output, rows)
                found = torch.autograd.grad(score.sum(), leaf)[0]
            if own and (wanted is None or wanted.layer is None):
                seen.append(output.detach())
            return found

        parts = list(self.batched(len(x), gradient))
        gradients = parts[0] if len(parts) == 1 else torch.cat(parts)  # one part needs no copy
        if seen and "own_logits" not in self.__dict__:
            self.own_logits = torch.cat(seen)
        return gradients

    # -- randomness ------------------------------------------------------------------------------------------------

    def draws(self, ids: Sequence[str] | None = None, stream: str = "") -> Draws:
        """Random numbers for the pictures (or the items named); `stream` keeps two uses apart."""
        return Draws(self.ids if ids is None else ids, self.device, self.model.dtype, self.seed, self.technique, stream)

    def randn_like(self, x: Tensor) -> Tensor:
        """Normal noise (N, ...), row i belonging to picture i; the next call gives new numbers."""
        if "randn_like" not in self._draws:
            self._draws["randn_like"] = self.draws(stream="randn_like")
        return self._draws["randn_like"].randn(x.shape[1:])

    # -- batches, memory, progress -----------------------------------------------------------------------------------

    def batched(self, total: int, work: Callable[[slice], T]) -> Iterator[T]:
        """work(rows) over `total` items, at most `max_batch` at once; halves the batch when memory runs out."""
        start = 0
        while start < total:
            rows = slice(start, min(start + self.max_batch, total))
            try:
                result = work(rows)
            except RuntimeError as error:
                if not out_of_memory(error) or rows.stop - rows.start == 1:
                    raise
                self.max_batch = max(1, (rows.stop - rows.start) // 2)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            start = rows.stop
            yield result

    def report(self, what: str, done: int, total: int) -> None:
        """Tell the person waiting how far the work is."""
        if self._progress is not None:
            self._progress(what, done, total)

    def track(self, items: Iterable[T], total: int, what: str) -> Iterator[T]:
        """Pass items on and report each."""
        for done, item in enumerate(items, 1):
            yield item
            self.report(what, done, total)


def build_network(load: Callable[[Registry], Any], registry: Registry) -> Any:
    """Loads a network; the conformance checks know this frame and look away while it is at work."""
    return load(registry)


def _attribution(label: str, artifacts: Mapping[str, Artifact], name: str) -> np.ndarray:
    artifact: Any = artifacts.get(name)
    if artifact is None or artifact.kind != "heatmaps":
        raise HarnessError(f"technique {label!r} declares the attribution {name!r}, but its result has no such Heatmaps")
    return artifact.data


def labels_of(dataset: Dataset, model: LoadedModel) -> Tensor | None:
    """(N,) the dataset's labels as indices into the model's classes, or None where the two name different things."""
    classes = model.classes
    if not classes and dataset.names_are_indices:
        try:
            classes = tuple(str(i) for i in range(model.class_count))
        except NotApplicable:
            return None
    found = dataset.labels_for(classes)
    if found is None:
        return None
    try:
        _ = model.class_count  # as many names as scores, or an error before anything is indexed
    except NotApplicable:
        return None
    return torch.from_numpy(found).to(model.device)


def to_images(pixels: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 (N, H, W, C) -> (N, C, H, W) in [0, 1] on the device."""
    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).to(dtype).div_(255)


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error) for text in ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")
    )
