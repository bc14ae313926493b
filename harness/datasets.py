"""Labelled and unlabelled pictures: opened safely, in a fixed order, with a fingerprint of their bytes.

A picture becomes uint8 (H, W, C) of the size a model takes; the division by 255 happens on the device.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import ConfigError, DataError, did_you_mean
from .hookspecs import hookimpl
from .paths import cache_folder, inside, package_folder, with_extra
from .registry import DatasetEntry, InputSpec, Registry

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
DIGIT_NAMES = tuple("0123456789")
CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_MODES = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC, "nearest": Image.Resampling.NEAREST}
# A picture a thousand times longer than wide would be enlarged to gigabytes on its way to a square crop.
_LONGEST = 8192


def open_picture(path: Path) -> Image.Image:
    """A picture as people see it: mode L or RGB, 8 bit, turned as its EXIF tag says, transparency over white."""
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty (0 bytes); replace or remove it")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return eight_bit(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{path}: more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: not a picture that can be read; replace or remove it") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"{path}: the picture is broken ({error}); replace or remove it") from None


def eight_bit(image: Image.Image) -> Image.Image:
    """Any Pillow mode as L or RGB."""
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow's own conversion cuts 16-bit values off at 255; the high byte is the picture.
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((values.clip(0, 65535) // 257).astype(np.uint8))
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image, np.float64))
        scale = 255 if values.max(initial=0) <= 1 else 1
        return Image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def evenly(count: int, total: int) -> list[int]:
    """`count` indices (at most all), spread evenly from 0 on."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def prepare(image: Image.Image, spec: InputSpec) -> np.ndarray:
    """uint8 (size, size, channels): shorter side resized, centre cropped, as torchvision's evaluation presets do."""
    image = image.convert("RGB" if spec.channels == 3 else "L")
    width, height = image.size
    short = spec.resize or spec.size
    scale = short / min(width, height)
    if max(width, height) * scale > _LONGEST:
        half = spec.size / scale / 2
        box = (max(0, width / 2 - half), max(0, height / 2 - half), min(width, width / 2 + half), min(height, height / 2 + half))
        image = image.resize((spec.size, spec.size), _MODES[spec.interpolation], box=box)
    else:
        longer = int(short * max(width, height) / min(width, height))
        size = (short, longer) if width <= height else (longer, short)
        if size != image.size:
            image = image.resize(size, _MODES[spec.interpolation])
        left, top = round((size[0] - spec.size) / 2), round((size[1] - spec.size) / 2)
        image = image.crop((left, top, left + spec.size, top + spec.size))
    array = np.array(image)
    return array[..., None] if array.ndim == 2 else array


@dataclass(frozen=True)
class Marks:
    """What a dataset marks in its pictures, an object or a suspected cue.

    `get(i)` is a picture (mode L) of the i-th's size, not black where the mark is, or None; `swapped(i)` is the i-th picture
    with the cue changed and all else equal, where the dataset can tell.
    """

    shows: str
    get: Callable[[int], Image.Image | None]
    swapped: Callable[[int], Image.Image] | None = None

    def select(self, keep: np.ndarray) -> Marks:
        get, swapped = self.get, self.swapped
        return replace(self, get=lambda i: get(int(keep[i])), swapped=None if swapped is None else lambda i: swapped(int(keep[i])))


def because(data: Dataset) -> str:
    """What a message says of why a dataset has no labels: '' or ': ...'."""
    return f": {data.remark}" if data.remark else ""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Pictures in a fixed order. `get(i)` opens the i-th; `labels` (N,) index `classes`; `marks` is what is marked in them.

    `whole` is the dataset that this one is a selection of.
    """

    name: str
    ids: Sequence[str]
    get: Callable[[int], Image.Image]
    fingerprint: str
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    names_are_indices: bool = False  # folder names may be class numbers of the model
    marks: Marks | None = None
    whole: Dataset | None = None
    remark: str = ""  # what whoever uses it should be told

    def __post_init__(self) -> None:
        if not self.ids:
            raise DataError(f"dataset {self.name!r} has no pictures")
        if self.labels is not None:
            bad = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.classes)))
            if bad.size:
                i = int(bad[0])
                raise DataError(
                    f"dataset {self.name!r}: label {int(self.labels[i])} of {self.ids[i]} is outside its {len(self.classes)} classes"
                )

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, limit: int | None = None, indices: Sequence[int] | None = None) -> Dataset:
        """Some of the pictures: given ones, or `limit` spread evenly, so that sorted classes all have their share."""
        if indices is None:
            if limit is None or limit >= len(self):
                return self
            indices = evenly(limit, len(self))
        wrong = [i for i in indices if not 0 <= i < len(self)]
        if wrong:
            raise DataError(f"dataset {self.name!r} has pictures 0 to {len(self) - 1}; there is no picture {wrong[0]}")
        keep = np.asarray(indices, dtype=np.int64)
        ids = [self.ids[i] for i in keep]
        digest = hashlib.sha256("\n".join((self.fingerprint, *ids)).encode()).hexdigest()
        labels = None if self.labels is None else self.labels[keep]
        get = self.get
        return replace(
            self,
            ids=ids,
            labels=labels,
            fingerprint=digest,
            get=lambda i: get(int(keep[i])),
            marks=None if self.marks is None else self.marks.select(keep),
            whole=self.whole or self,
        )

    def labels_for(self, classes: Sequence[str]) -> np.ndarray | None:
        """Labels as indices into a model's classes, or None where the two do not name the same things."""
        if self.labels is None:
            return None
        if tuple(classes) == self.classes:
            return self.labels
        places: dict[str, list[int]] = {}
        for i, name in enumerate(classes):
            places.setdefault(name.casefold(), []).append(i)
        found = [places.get(name.casefold(), []) for name in self.classes]
        if all(len(f) == 1 for f in found):
            table = [f[0] for f in found]
        elif self.names_are_indices and all(n.isdecimal() and int(n) < len(classes) for n in self.classes):
            table = [int(n) for n in self.classes]
            if table == list(range(len(table))) and len(table) != len(classes):
                return None  # 0, 1, 2 ... are more likely digits than the first classes of a larger set
        else:
            return None
        return np.asarray(table)[self.labels]

    def pictures(self, spec: InputSpec, start: int = 0, stop: int | None = None) -> np.ndarray:
        """uint8 (n, size, size, channels) of pictures start to stop."""
        return np.stack([prepare(self.get(i), spec) for i in range(start, len(self) if stop is None else stop)])

    def masks(self, spec: InputSpec) -> np.ndarray | None:
        """bool (N, size, size): the marks as the pictures are cut; None where the dataset has none."""
        if self.marks is None:
            return None
        cut = spec.model_copy(update={"channels": 1, "interpolation": "nearest"})
        found = np.zeros((len(self), spec.size, spec.size), dtype=bool)
        for i in range(len(self)):
            mask = self.marks.get(i)
            if mask is not None:
                found[i] = prepare(mask, cut)[..., 0] > 0
        return found

    def batches(self, spec: InputSpec, size: int) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows, uint8 pictures) in order; the next batch is opened while the caller works on this one."""
        rows = [slice(i, min(i + size, len(self))) for i in range(0, len(self), size)]
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(self.pictures, spec, rows[0].start, rows[0].stop)
            for i, row in enumerate(rows):
                batch = waiting.result()
                if i + 1 < len(rows):
                    waiting = pool.submit(self.pictures, spec, rows[i + 1].start, rows[i + 1].stop)
                yield row, batch


def _hash_files(paths: Sequence[Path], extra: Sequence[str]) -> str:
    """sha256 over each file's bytes with its name and label."""
    total = hashlib.sha256()
    for path, text in zip(paths, extra, strict=True):
        with path.open("rb") as file:
            total.update(f"{text}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _from_files(
    name: str, root: Path, paths: Sequence[Path], labels: Sequence[int] | None, classes: tuple[str, ...], **more: Any
) -> Dataset:
    ids = [shown_name(path.relative_to(root).as_posix()) for path in paths]
    marks = [f"{i}\0{'' if labels is None else labels[n]}" for n, i in enumerate(ids)]
    return Dataset(
        name=name,
        ids=ids,
        get=lambda i: open_picture(paths[i]),
        fingerprint=_hash_files(paths, marks),
        labels=None if labels is None else np.asarray(labels, dtype=np.int64),
        classes=classes,
        **more,
    )


def shown_name(name: str) -> str:
    """A file's name as it can be stored and printed: bytes that are not UTF-8 as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def pictures_in(root: Path) -> list[Path]:
    """The picture files in a folder and the folders in it, links to folders followed, sorted; what begins with a dot is left out."""
    found: list[Path] = []
    above: dict[str, set[str]] = {}  # real places of a folder and of those it was reached by

    def told(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}; a folder that cannot be read would be missing without a word") from None

    for place, folders, files in os.walk(root, onerror=told, followlinks=True):
        real, before = os.path.realpath(place), above.get(os.path.dirname(place), set())
        if real in before:  # a link to a folder above it has no end
            folders.clear()
            continue
        above[place] = before | {real}
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        here = (Path(place) / name for name in files if not name.startswith("."))
        found += [p for p in here if p.suffix.lower() in SUFFIXES and p.is_file()]
    return sorted(found)


def image_folder(rest: str, name: str, entry: DatasetEntry) -> Dataset:
    """A folder of images: one subfolder a class, or all in one folder without labels."""
    root = Path(rest).expanduser()
    root = root if root.is_absolute() else entry.folder / root
    if not root.is_dir():
        raise DataError(f"{entry.where}: dataset {name!r}: there is no folder {root}")
    paths = pictures_in(root)
    if not paths:
        raise DataError(f"dataset {name!r}: no pictures in {root} (looked for {', '.join(sorted(SUFFIXES))})")
    groups = [shown_name(p.relative_to(root).parts[0]) if p.parent != root else "" for p in paths]
    if entry.unlabelled or not all(groups):
        loose = [path.name for path, group in zip(paths, groups, strict=True) if not group]
        remark = ""
        if not entry.unlabelled and len(loose) < len(paths):
            others = f" and {len(loose) - 1} more" if len(loose) > 1 else ""
            remark = (
                f"dataset {name!r} is used without labels: {root} holds pictures ({loose[0]!r}{others}) beside its folders, which else "
                "would be its classes; move them into folders, or set `unlabelled: true` in a registry"
            )
        return _from_files(name, root, paths, None, (), remark=remark)
    names = sorted(set(groups))
    try:
        classes = class_names(entry.classes) or tuple(names)
    except ConfigError as error:
        raise ConfigError(f"{entry.where}: dataset {name!r}: {error}") from None
    unlisted = [n for n in names if n not in classes]
    if unlisted:
        raise DataError(
            f"{entry.where}: dataset {name!r}: folder {unlisted[0]!r} is not one of its classes{did_you_mean(unlisted[0], classes)}"
        )
    return _from_files(name, root, paths, [classes.index(g) for g in groups], classes, names_are_indices=True)


def with_masks(dataset: Dataset, entry: DatasetEntry) -> Dataset:
    """The dataset with the marks of the folder `masks`: pictures of the same names, any suffix, not black where the mark is."""
    root = entry.folder / Path(entry.masks).expanduser()
    if not root.is_dir():
        raise DataError(f"{entry.where}: dataset {dataset.name!r}: there is no folder of masks {root}")
    there = {shown_name(p.relative_to(root).with_suffix("").as_posix()): p for p in pictures_in(root)}
    paths = [there.get(Path(i).with_suffix("").as_posix()) for i in dataset.ids]
    if not any(paths):
        raise DataError(
            f"{entry.where}: dataset {dataset.name!r}: no mask in {root} has the name of a picture (the first is {dataset.ids[0]!r})"
        )

    def get(i: int) -> Image.Image | None:
        path = paths[i]
        if path is None:
            return None
        mask, picture = open_picture(path).convert("L"), dataset.get(i)
        if mask.size != picture.size:
            sizes = f"{mask.width} x {mask.height}, its picture {picture.width} x {picture.height}"
            raise DataError(f"{path}: the mask is {sizes}; make them equal")
        return mask

    found = [(i, path) for i, path in zip(dataset.ids, paths, strict=True) if path is not None]
    marked = _hash_files([path for _, path in found], [i for i, _ in found])
    digest = hashlib.sha256(f"{dataset.fingerprint}\n{marked}\n{entry.masks_show}".encode()).hexdigest()
    return replace(dataset, marks=Marks(entry.masks_show or "the marked region", get), fingerprint=digest)


def package_pictures(rest: str, name: str, entry: DatasetEntry) -> Dataset:
    """Pictures inside an installed package: `PACKAGE/FOLDER`, the files listed; 'x_12_243.jpg' carries label 243."""
    package, _, folder = rest.partition("/")
    where = package_folder(package)
    if where is None:
        raise DataError(f"dataset {name!r} comes with the package {package!r}, which is not installed: {with_extra(package)}")
    root = inside(where, folder)
    paths: list[Path] = []
    for pattern in entry.files:
        matched = sorted(root.glob(pattern))
        if not matched:
            raise DataError(f"{entry.where}: dataset {name!r}: {root} has no file {pattern!r}")
        paths += matched
    if entry.unlabelled:
        return _from_files(name, root, paths, None, ())
    try:
        labels = [int(path.stem.rsplit("_", 1)[1]) for path in paths]
    except (IndexError, ValueError):
        raise DataError(f"{entry.where}: dataset {name!r}: file names do not end in '_LABEL'; add `unlabelled: true`") from None
    return _from_files(name, root, paths, labels, class_names(entry.classes))


def digits(rest: str, name: str, entry: DatasetEntry) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey; every fifth is the test split.

    Read from scikit-learn's packaged file, which spares its import.
    """
    root = package_folder("sklearn")
    if root is None:
        raise DataError("scikit-learn is missing; reinstall vision-harness")
    packed = (root / "datasets" / "data" / "digits.csv.gz").read_bytes()
    values = np.loadtxt(gzip.decompress(packed).decode().splitlines(), delimiter=",")
    index = np.arange(len(values))
    parts = {"all": index, "train": index[index % 5 != 0], "test": index[index % 5 == 0]}
    if (rest or "all") not in parts:
        raise DataError(f"{entry.where}: dataset {name!r}: the digits have parts {', '.join(parts)}, not {rest!r}")
    keep = parts[rest or "all"]
    pixels = np.rint(values[keep, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return Dataset(
        name=name,
        ids=[f"digit-{i:04d}" for i in keep],
        get=lambda i: Image.fromarray(pixels[i]),
        fingerprint=hashlib.sha256(packed + f"{rest or 'all'}".encode()).hexdigest(),
        labels=values[keep, -1].astype(np.int64),
        classes=DIGIT_NAMES,
    )


def torchvision_dataset(rest: str, name: str, entry: DatasetEntry) -> Dataset:
    """A dataset that torchvision downloads (`CIFAR10`, `MNIST`); `split` says which part."""
    import torchvision.datasets as sets

    root = cache_folder("datasets")
    cls = getattr(sets, rest, None)
    if not callable(cls) or "train" not in signature(cls).parameters:
        fitting = ", ".join(n for n in sets.__all__ if "train" in signature(getattr(sets, n)).parameters)
        raise DataError(f"{entry.where}: dataset {name!r}: {rest!r} is not one of torchvision's sets with a training part: {fitting}")
    parts = [True, False] if entry.split == "all" else [entry.split == "train"]
    loaded = []
    for train in parts:
        try:
            loaded.append(cls(str(root), train=train, download=False))
        except RuntimeError:
            try:
                loaded.append(cls(str(root), train=train, download=True))
            except Exception as error:
                raise DataError(
                    f"dataset {name!r} is not in {root} and could not be downloaded ({type(error).__name__}: {error}); "
                    f'on a machine with a network run: python -c "import torchvision as t; t.datasets.{rest}({str(root)!r}, download=True)"'
                ) from None
    pixels = np.concatenate([np.asarray(part.data) for part in loaded])
    labels = np.concatenate([np.asarray(part.targets, dtype=np.int64) for part in loaded])
    return Dataset(
        name=name,
        ids=[f"{rest.lower()}-{entry.split}-{i:05d}" for i in range(len(pixels))],
        get=lambda i: Image.fromarray(pixels[i]),
        fingerprint=hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest(),
        labels=labels,
        classes=tuple(loaded[0].classes),
    )


def picture_place(name: str) -> tuple[str, str] | None:
    """(dataset, id) of a picture named 'DATASET:ID'; None where the name is a path. A drive's letter is no dataset."""
    dataset, colon, rest = name.partition(":")
    return (dataset, rest) if colon and len(dataset) > 1 and "/" not in dataset else None


def named_picture(name: str, registry: Registry, folder: Path | None = None) -> Image.Image:
    """A picture named as DATASET:ID or by a path, which starts in `folder`; mode L or RGB."""
    place = picture_place(name)
    if place is None:
        path = Path(name).expanduser()
        path = path if path.is_absolute() or folder is None else folder / path
        if not path.is_file():
            raise DataError(f"there is no picture {str(path)!r}; name one of a dataset as DATASET:ID, or the path of a file")
        return open_picture(path)
    data = load_dataset(place[0], registry)
    if place[1] not in data.ids:
        raise DataError(f"dataset {place[0]!r} has no picture {place[1]!r}{did_you_mean(place[1], data.ids)}")
    return data.get(list(data.ids).index(place[1]))


def at_size(picture: Image.Image, size: int, channels: int) -> np.ndarray:
    """uint8 (H, W, channels) of a whole picture, its longer side `size` pixels; 0: as it is."""
    if size and max(picture.size) != size:
        scale = size / max(picture.size)
        width, height = (max(1, round(n * scale)) for n in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.array(picture.convert("L" if channels == 1 else "RGB"))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def flat(picture: Image.Image) -> bool:
    """One colour everywhere?"""
    extrema = picture.getextrema()
    bands = extrema if isinstance(extrema[0], tuple) else (extrema,)
    return all(low == high for low, high in bands)


def class_names(classes: str | Sequence[str]) -> tuple[str, ...]:
    """Names of a known set (`imagenet`, `cifar10`, `digits`), or the names given."""
    if not isinstance(classes, str):
        return tuple(classes)
    if classes == "imagenet":
        return _imagenet_names()
    known = {"": (), "cifar10": CIFAR10_NAMES, "digits": DIGIT_NAMES}
    if classes not in known:
        raise ConfigError(f"no class names {classes!r}{did_you_mean(classes, [*known, 'imagenet'])}; give a list of names")
    return known[classes]


def _imagenet_names() -> tuple[str, ...]:
    path = Path(__file__).parent / "data" / "imagenet_classes.txt"
    return tuple(path.read_text(encoding="utf-8").splitlines())


DatasetSource = Callable[..., Dataset]  # (rest, name, entry) or (rest, name, entry, registry)


def load_dataset(name: str, registry: Registry) -> Dataset:
    """The dataset of a registry name or of a folder's path."""
    from .plugins import load_plugins

    entry = registry.dataset(name)
    scheme, _, rest = entry.source.partition(":")
    source: DatasetSource = load_plugins().get("datasets", scheme)
    # A source that builds on other datasets asks for the registry.
    more = {"registry": registry} if "registry" in signature(source).parameters else {}
    if source is harness_datasets().get(scheme):
        for setting in ("args", "split", "files", "unlabelled"):
            if setting in entry.model_fields_set and setting not in HEEDED[scheme]:
                raise DataError(f"{entry.where}: dataset {name!r}: `{setting}` means nothing to a source {scheme!r}; remove it")
    try:
        dataset = source(rest, name, entry, **more)
        return with_masks(dataset, entry) if entry.masks else dataset
    except OSError as error:
        raise DataError(f"dataset {name!r}: {error.filename or ''}: {error.strerror or error}") from None


# Settings of an entry that our own sources heed; those of other packages see to theirs themselves.
HEEDED = {
    "planted": ("args",),
    "folder": ("unlabelled",),
    "package": ("files", "unlabelled"),
    "digits": (),
    "torchvision": ("split",),
}


@hookimpl
def harness_datasets() -> Mapping[str, DatasetSource]:
    from .planted import planted  # which stands on this module

    return {
        "planted": planted,
        "folder": image_folder,
        "package": package_pictures,
        "digits": digits,
        "torchvision": torchvision_dataset,
    }
