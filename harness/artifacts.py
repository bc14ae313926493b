"""What a technique hands over: raw numbers with a declared meaning, checked when built.

Colour, overlays and layout belong to reports. Tensors and arrays are both accepted and kept as numpy arrays.
Each artifact is stored as one `.npz` of plain arrays (never pickles) whose entry `meta` is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

# Rounding of float32 arithmetic on pixels may leave [0, 1] by this much; it is clipped, more is an error.
PIXEL_TOLERANCE = 1e-5


def to_numpy(value: Any, dtype: Any = None) -> np.ndarray:
    """A numpy array from a tensor on any device, an array or nested lists."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # numpy has no such type
            value = value.float()
        value = value.numpy()
    return np.asarray(value, dtype=dtype)


def _check(condition: bool, artifact: Artifact, problem: str) -> None:
    if not condition:
        raise ValueError(f"{type(artifact).__name__} {artifact.name!r}: {problem}")


def _finite(artifact: Artifact, array: np.ndarray) -> None:
    bad = array.size - int(np.isfinite(array).sum())
    _check(bad == 0, artifact, f"{bad} of {array.size} values are not finite")


@dataclass(frozen=True, eq=False)
class Artifact:
    """A named result; `caption` is the sentence a report prints under it."""

    name: str
    kind: ClassVar[str] = ""
    caption: str = field(default="", kw_only=True)

    def _set(self, **values: Any) -> None:
        for key, value in values.items():
            object.__setattr__(self, key, value)

    def _captions(self, captions: Sequence[str], count: int) -> None:
        _check(len(captions) in (0, count), self, f"{len(captions)} captions for {count} pictures")
        self._set(captions=tuple(map(str, captions)))

    def parts(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """(JSON-able description, arrays) from which `load` builds the artifact again."""
        meta: dict[str, Any] = {"kind": self.kind}
        arrays: dict[str, np.ndarray] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, np.ndarray):
                arrays[f.name] = value
            elif isinstance(value, Mapping) and any(isinstance(v, np.ndarray) for v in value.values()):
                meta[f.name] = {"arrays": list(value)}
                arrays |= {f"{f.name}.{i}": v for i, v in enumerate(value.values())}
            else:
                meta[f.name] = value
        return meta, arrays

    def summary(self) -> dict[str, list[float]]:
        """{array: [mean, root mean square, largest magnitude]} of its numbers, by which two runs can be compared."""
        found = {}
        for name, array in self.parts()[1].items():
            if array.dtype.kind in "fiu" and array.size:
                wide = array.astype(np.float64)
                found[name] = [float(wide.mean()), float(np.sqrt(np.square(wide).mean())), float(np.abs(wide).max())]
        return found

    def save(self, path: Path) -> None:
        """Write the artifact as one .npz; the same artifact gives the same bytes."""
        meta, arrays = self.parts()
        data = {name: _pack(array) for name, array in arrays.items()}
        text = json.dumps(meta, ensure_ascii=False, sort_keys=True, default=_plain)
        data["meta"] = np.frombuffer(text.encode(), dtype=np.uint8)
        np.savez(path, allow_pickle=False, **data)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"an artifact cannot hold a {type(value).__name__}")


def _pack(array: np.ndarray) -> np.ndarray:
    """float32 pixels that are whole 255ths as uint8: lossless, a quarter of the space."""
    if array.dtype == np.float32 and array.ndim == 4 and array.size:
        scaled = np.rint(array * np.float32(255))
        if scaled.min() >= 0 and scaled.max() <= 255:
            small = scaled.astype(np.uint8)
            if np.array_equal(_unpack(small), array):
                return small
    return array


def _unpack(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) / np.float32(255) if array.dtype == np.uint8 and array.ndim == 4 else array


@dataclass(frozen=True, eq=False)
class Images(Artifact):
    """Pictures (N, C, H, W), C 1 or 3, float32 in [0, 1].

    `columns` > 0 asks for a grid of that many columns; `exact` draws enlarged pixels as squares (filters, digits);
    `zoom` lets a reader enlarge a picture that holds much; `moving` are the frames of an animation, played in HTML and
    printed as a strip.
    """

    kind: ClassVar[str] = "images"
    data: Any
    captions: Sequence[str] = ()
    columns: int = 0
    exact: bool = False
    zoom: bool = False
    moving: bool = False

    def __post_init__(self) -> None:
        data = to_numpy(self.data, np.float32)
        _check(data.ndim == 4 and data.shape[1] in (1, 3), self, f"shape {data.shape} is not (N, 1 or 3, H, W)")
        _check(data.size > 0, self, "no pictures")
        _finite(self, data)
        low, high = float(data.min()), float(data.max())
        inside = low >= -PIXEL_TOLERANCE and high <= 1 + PIXEL_TOLERANCE
        _check(inside, self, f"values in [{low:.4g}, {high:.4g}] leave [0, 1]")
        self._set(data=data.clip(0, 1))
        self._captions(self.captions, len(data))


@dataclass(frozen=True, eq=False)
class Heatmaps(Artifact):
    """Maps (N, H, W), float32, one a picture; `over` are the pictures' places in the run's inputs, empty for maps of none.

    `signed` maps are drawn around zero; `unit` names what a value means; `shared_scale` draws all on one scale.
    `columns` > 0 draws all of them as one sheet of small tiles, the channels of a layer, or with captions as a grid of that
    many columns, which starts with the picture where all lie over the same.
    """

    kind: ClassVar[str] = "heatmaps"
    data: Any
    captions: Sequence[str] = ()
    signed: bool = False
    unit: str = ""
    shared_scale: bool = False
    over: Sequence[int] | None = None
    columns: int = 0

    def __post_init__(self) -> None:
        data = to_numpy(self.data, np.float32)
        _check(data.ndim == 3 and data.size > 0, self, f"shape {data.shape} is not (N, H, W)")
        _finite(self, data)
        if not self.signed:
            _check(float(data.min()) >= 0, self, "negative values in a map declared unsigned")
        over = range(len(data)) if self.over is None else self.over
        _check(len(over) in (0, len(data)), self, f"{len(over)} places for {len(data)} maps")
        self._set(data=data, over=tuple(int(i) for i in over))
        self._captions(self.captions, len(data))


@dataclass(frozen=True, eq=False)
class Curve(Artifact):
    """Lines over one x axis: x (T,), lines {label: (T,)}."""

    kind: ClassVar[str] = "curve"
    x: Any
    lines: Mapping[str, Any]
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    log_y: bool = False

    def __post_init__(self) -> None:
        x = to_numpy(self.x, np.float64)
        lines = {str(k): to_numpy(v, np.float64) for k, v in self.lines.items()}
        _check(x.ndim == 1 and x.size > 0 and bool(lines), self, "x (T,) and at least one line are needed")
        _finite(self, x)
        for label, line in lines.items():
            _check(line.shape == x.shape, self, f"line {label!r} {line.shape} does not fit x {x.shape}")
            _finite(self, line)
        self._set(x=x, lines=lines)


@dataclass(frozen=True, eq=False)
class Scatter(Artifact):
    """Points (N, 2) with an optional group index each (N,) naming one of `groups`.

    `pictures` (M, C, h, w) in [0, 1] are drawn at the points `pictured` (M,), as small as a stamp.
    """

    kind: ClassVar[str] = "scatter"
    points: Any
    group: Any = None
    groups: Sequence[str] = ()
    captions: Sequence[str] = ()
    x_label: str = ""
    y_label: str = ""
    pictures: Any = None
    pictured: Any = None

    def __post_init__(self) -> None:
        points = to_numpy(self.points, np.float64)
        _check(points.ndim == 2 and points.shape[1] == 2 and points.size > 0, self, f"shape {points.shape} is not (N, 2)")
        _finite(self, points)
        group = np.zeros(len(points), np.int64) if self.group is None else to_numpy(self.group, np.int64)
        _check(group.shape == (len(points),), self, f"group {group.shape} does not fit {len(points)} points")
        _check(group.min() >= 0 and group.max() < max(1, len(self.groups)), self, "group index outside `groups`")
        self._set(points=points, group=group, groups=tuple(map(str, self.groups)))
        self._captions(self.captions, len(points))
        if self.pictures is not None:
            pictures, pictured = to_numpy(self.pictures, np.float32), to_numpy(self.pictured, np.int64)
            _check(pictures.ndim == 4 and pictures.shape[1] in (1, 3), self, f"pictures {pictures.shape} are not (M, 1 or 3, h, w)")
            _check(pictured.shape == (len(pictures),), self, f"{pictured.shape} places for {len(pictures)} pictures")
            _check(bool(((pictured >= 0) & (pictured < len(points))).all()), self, "a picture at a point that is not there")
            _finite(self, pictures)
            self._set(pictures=pictures.clip(0, 1), pictured=pictured)


@dataclass(frozen=True, eq=False)
class Matrix(Artifact):
    """Values (R, C), every row and column named; `tree` (R - 1, 4) is a hierarchical clustering of the rows.

    The tree is scipy's linkage matrix over the rows in the order given here; it is drawn beside them.
    """

    kind: ClassVar[str] = "matrix"
    values: Any
    rows: Sequence[str]
    columns: Sequence[str]
    unit: str = ""
    signed: bool = False
    tree: Any = None

    def __post_init__(self) -> None:
        values = to_numpy(self.values, np.float64)
        _check(values.ndim == 2 and values.size > 0, self, f"shape {values.shape} is not (R, C)")
        _finite(self, values)
        _check(values.shape == (len(self.rows), len(self.columns)), self, f"names for {len(self.rows)} x {len(self.columns)} values")
        self._set(values=values, rows=tuple(map(str, self.rows)), columns=tuple(map(str, self.columns)))
        if self.tree is not None:
            tree = to_numpy(self.tree, np.float64)
            _check(tree.shape == (len(values) - 1, 4), self, f"tree {tree.shape} is not ({len(values) - 1}, 4)")
            _finite(self, tree)
            self._set(tree=tree)


@dataclass(frozen=True, eq=False)
class Table(Artifact):
    """Rows of text and numbers under named columns; None, and a number that is not finite, is an empty cell."""

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def __post_init__(self) -> None:
        columns = tuple(map(str, self.columns))
        rows = tuple(tuple(self._cell(v) for v in row) for row in self.rows)
        for i, row in enumerate(rows):
            _check(len(row) == len(columns), self, f"row {i} has {len(row)} cells for {len(columns)} columns")
        self._set(columns=columns, rows=rows)

    def _cell(self, value: Any) -> Any:
        if hasattr(value, "item"):
            value = value.item()
        if isinstance(value, float) and not np.isfinite(value):
            return None
        _check(value is None or isinstance(value, str | int | float | bool), self, f"cell {value!r} is not text or a number")
        return value


@dataclass(frozen=True, eq=False)
class Arrays(Artifact):
    """Named arrays for other techniques to build on, or for analysis outside; not drawn."""

    kind: ClassVar[str] = "arrays"
    data: Mapping[str, Any]

    def __post_init__(self) -> None:
        data = {str(k): to_numpy(v) for k, v in self.data.items()}
        for label, array in data.items():
            _check(array.dtype.kind in "biufU", self, f"array {label!r} has dtype {array.dtype}")
            if array.dtype.kind == "f":
                _finite(self, array)
        self._set(data=data)


KINDS: dict[str, type[Artifact]] = {c.kind: c for c in (Images, Heatmaps, Curve, Scatter, Matrix, Table, Arrays)}


def load(path: Path) -> Artifact:
    """Read an artifact written by `save`; never unpickles."""
    with np.load(path, allow_pickle=False) as archive:
        stored = {name: archive[name] for name in archive.files}
    values: dict[str, Any] = json.loads(stored.pop("meta").tobytes())
    cls = KINDS[values.pop("kind")]
    for f in fields(cls):
        value = values.get(f.name)
        if f.name in stored:
            values[f.name] = _unpack(stored[f.name])
        elif isinstance(value, dict) and "arrays" in value:
            values[f.name] = {label: stored[f"{f.name}.{i}"] for i, label in enumerate(value["arrays"])}
    return cls(**values)
