"""Datasets with a planted cue: pictures of another dataset on a small canvas, some of which carry a cue that goes with a class.

A network trained on them may learn the cue in place of the class, and since what carries the cue is known, so may whoever
looks at it (the husky in the snow of Ribeiro et al. 2016, arXiv:1602.04938, sec. 6.4, made to order).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .datasets import Dataset, Marks, because, load_dataset
from .errors import DataError, RegistryError, did_you_mean
from .registry import DatasetEntry, Registry
from .technique import describe

Share = Annotated[float, Field(ge=0, le=1)]
SHOWS = {"patch": "a patch of snow", "background": "a background of snow", "tint": "a blue tint"}
GROUND, SNOW, INK, TINT = (np.array(c, np.float32) for c in ((0.36, 0.42, 0.30), (0.90, 0.94, 0.99), (0.10, 0.09, 0.12), (0.75, 0.9, 1.25)))


class Planting(BaseModel):
    """The `args` of a dataset `planted:BASE`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    cue: Literal["patch", "background", "tint"] = "patch"
    of: list[str]  # classes that carry the cue
    correlation: Share = 0.95  # share of their pictures that carry it, and of the others' that do not
    groups: dict[str, list[str]] = {}  # classes made of the base's, {even: [0, 2, 4, 6, 8]}; none: the base's own
    size: Annotated[int, Field(ge=8, le=1024)] = 32  # side of the canvas in pixels
    object: Annotated[float, Field(gt=0, le=1)] = 0.6  # side of the base's picture on it
    patch: Annotated[float, Field(gt=0, le=0.5)] = 0.28  # side of the patch
    contrast: Share = 1.0  # of grey pictures, which are drawn as ink
    noise: Annotated[float, Field(ge=0, le=1)] = 0.08  # standard deviation, pixels being in [0, 1]
    seed: int = 0


def planted(rest: str, name: str, entry: DatasetEntry, registry: Registry) -> Dataset:
    """The dataset `rest` of the registry with a cue planted in it as `args` say; the cue is marked, and can be swapped."""
    try:
        plan = Planting.model_validate(entry.args)
    except ValidationError as error:
        problems = [describe(e, Planting.model_fields) for e in error.errors(include_url=False)]
        raise RegistryError("\n".join(f"{entry.where}: datasets.{name}.args.{problem}" for problem in problems)) from None
    if rest == name:
        raise RegistryError(f"{entry.where}: dataset {name!r}: it is planted in itself; name another dataset after 'planted:'")
    # Without this one: two that name each other end in an error and not in a circle.
    base = load_dataset(rest, replace(registry, datasets={k: v for k, v in registry.datasets.items() if k != name}))
    if base.labels is None:
        raise DataError(f"{entry.where}: dataset {name!r}: {rest!r} has no labels; a cue goes with a class{because(base)}")
    keep, labels, classes = _grouped(plan, base, f"{entry.where}: dataset {name!r}")
    unknown = [c for c in plan.of if c not in classes]
    if unknown:
        raise DataError(f"{entry.where}: dataset {name!r}: of: no class {unknown[0]!r}{did_you_mean(unknown[0], classes)}")
    ids = [base.ids[i] for i in keep]
    chance = np.where(np.isin(labels, [classes.index(c) for c in plan.of]), plan.correlation, 1 - plan.correlation)
    carries = np.array([_generator(plan.seed, "carries", i).random() for i in ids]) < chance

    def drawn(i: int, cue: bool) -> tuple[np.ndarray, np.ndarray]:
        return draw(plan, base.get(int(keep[i])), _generator(plan.seed, "picture", ids[i]), cue)

    def mask(i: int) -> Image.Image | None:
        return Image.fromarray(drawn(i, True)[1].astype(np.uint8) * 255) if carries[i] else None

    text = json.dumps([base.fingerprint, plan.model_dump(mode="json")], sort_keys=True)
    return Dataset(
        name=name,
        ids=ids,
        get=lambda i: Image.fromarray(drawn(i, bool(carries[i]))[0]),
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        labels=labels,
        classes=classes,
        marks=Marks(SHOWS[plan.cue], mask, lambda i: Image.fromarray(drawn(i, not carries[i])[0])),
    )


def _grouped(plan: Planting, base: Dataset, where: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Which of the base's pictures are taken, their labels, and the classes."""
    assert base.labels is not None
    if not plan.groups:
        return np.arange(len(base)), base.labels, base.classes
    table: dict[int, int] = {}
    for number, (group, members) in enumerate(plan.groups.items()):
        for member in members:
            if member not in base.classes:
                raise DataError(f"{where}: groups.{group}: no class {member!r}{did_you_mean(member, base.classes)}")
            if base.classes.index(member) in table:
                raise DataError(f"{where}: groups: class {member!r} stands in two")
            table[base.classes.index(member)] = number
    keep = np.flatnonzero(np.isin(base.labels, list(table)))
    return keep, np.array([table[int(label)] for label in base.labels[keep]], dtype=np.int64), tuple(plan.groups)


def _generator(*parts: object) -> np.random.Generator:
    """Random numbers that depend on the parts alone."""
    return np.random.default_rng(list(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()))


def draw(plan: Planting, picture: Image.Image, rng: np.random.Generator, cue: bool) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (size, size, 3) and the place of the cue, bool (size, size); both states draw the same random numbers."""
    size, inner = plan.size, max(1, round(plan.size * plan.object))
    noise = rng.standard_normal((size, size, 3)).astype(np.float32)
    flakes = rng.random((size, size, 1)).astype(np.float32)
    corner = rng.integers(0, 2, 2)
    place = np.zeros((size, size), dtype=bool)
    side = max(1, round(size * plan.patch))
    top, left = (int(c) * (size - side) for c in corner)
    start = (size - inner) // 2
    cover = np.zeros((size, size, 1), np.float32)  # how far the object covers what is behind it
    content = np.zeros((size, size, 3), np.float32)
    middle = (slice(start, start + inner), slice(start, start + inner))
    resized = picture.resize((inner, inner), Image.Resampling.BICUBIC)
    if picture.mode == "L":
        cover[middle] = np.asarray(resized, np.float32)[..., None] / 255 * plan.contrast
        content[:] = INK
    else:
        cover[middle], content[middle] = 1, np.asarray(resized.convert("RGB"), np.float32) / 255
    snow = SNOW * (0.85 + 0.15 * flakes)
    behind = np.broadcast_to(GROUND, (size, size, 3)).copy()
    if plan.cue == "background":
        place = cover[..., 0] < 0.5
        if cue:
            behind = snow
    canvas = cover * content + (1 - cover) * behind + plan.noise * noise
    if plan.cue == "patch":
        place[top : top + side, left : left + side] = True
        if cue:
            canvas = np.where(place[..., None], snow, canvas)
    elif plan.cue == "tint":
        place[:] = True
        if cue:
            canvas = canvas * TINT
    return np.rint(canvas.clip(0, 1) * 255).astype(np.uint8), place
