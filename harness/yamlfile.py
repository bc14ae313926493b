"""Read YAML that users write: safely, with the line of every key, and with errors that point at it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from .errors import RegistryError
from .technique import describe

MAX_BYTES = 1_000_000
MAX_NODES = 50_000  # after aliases are followed: a "YAML bomb" is a small file that expands without end
MAX_DEPTH = 40

M = TypeVar("M", bound=BaseModel)
Location = tuple[str | int, ...]


@dataclass(frozen=True)
class YamlFile:
    """Plain values of a YAML file and the line of each key."""

    path: Path
    data: Any
    lines: Mapping[Location, int]

    def at(self, location: Iterable[Any] = ()) -> str:
        """'file:line' of a key, or of the nearest key above it."""
        loc = tuple(location)
        while loc and loc not in self.lines:
            loc = loc[:-1]
        return f"{self.path}:{self.lines.get(loc, 1)}"

    def validate(self, model: type[M], value: Any, location: Location = ()) -> M:
        """`value` as a model; every problem gets a line 'file:line: key: what is wrong'."""
        try:
            return model.model_validate(value)
        except ValidationError as error:
            lines = []
            for e in error.errors(include_url=False):
                # pydantic adds the names of union members to a location; only keys of the file are ours.
                keys = tuple(k for k in e["loc"] if isinstance(k, int) or _in_file(value, e["loc"], k))
                owner = _fields_at(model, e["loc"])
                shown = {**e, "loc": location + (keys or e["loc"])}
                lines.append(f"{self.at(location + keys)}: {describe(shown, owner)}")
            raise RegistryError("\n".join(lines)) from None


def _in_file(value: Any, location: tuple[Any, ...], key: Any) -> bool:
    for part in location:
        if part == key:
            return (isinstance(value, Mapping) and key in value) or key == location[-1]
        if isinstance(value, Mapping) and part in value:
            value = value[part]
    return False


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    current: Any = model
    for part in location[:-1]:
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            continue
        current = next((t for t in (field.annotation, *getattr(field.annotation, "__args__", ())) if hasattr(t, "model_fields")), current)
    return list(getattr(current, "model_fields", {}))


def read(path: Path) -> YamlFile:
    """Parse a file. Tags, cycles, duplicate keys and files that expand without end are errors."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        if path.stat().st_size > MAX_BYTES:
            raise RegistryError(f"{path}: larger than {MAX_BYTES:,} bytes; a registry or experiment is a small text file")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RegistryError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RegistryError(f"{path}: is not UTF-8 text") from None
    try:
        tree = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(str(error.problem).split())
        raise RegistryError(f"{path}:{mark.line + 1 if mark else 1}: {problem}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise RegistryError(f"{path}: is not YAML: {' '.join(str(error).split())[:200]}") from None
    lines: dict[Location, int] = {}
    count = 0

    def plain(node: Any, location: Location) -> Any:
        nonlocal count
        count += 1
        if count > MAX_NODES or len(location) > MAX_DEPTH:
            raise RegistryError(f"{path}: its aliases expand to more than {MAX_NODES:,} values or {MAX_DEPTH} levels; refused")
        if isinstance(node, Mapping):
            position = getattr(node, "lc", None)
            result = {}
            for key in node:
                name = key if isinstance(key, int) else str(key)
                here = (*location, name)
                if position is not None and position.data and key in position.data:
                    lines[here] = position.key(key)[0] + 1
                result[name] = plain(node[key], here)
            return result
        if isinstance(node, list):
            for i in range(len(node)):
                position = getattr(node, "lc", None)
                if position is not None and position.data and i in position.data:
                    lines[(*location, i)] = position.item(i)[0] + 1
            return [plain(v, (*location, i)) for i, v in enumerate(node)]
        if node is None or isinstance(node, bool):
            return node
        for kind in (int, float, str):
            if isinstance(node, kind):
                return kind(node)
        if type(node).__name__ == "ScalarBoolean":
            return bool(node)
        raise RegistryError(f"{YamlFile(path, None, lines).at(location)}: a value of kind {type(node).__name__} is not allowed here")

    return YamlFile(path, plain(tree, ()), lines)


def written(value: Any) -> str:
    """Plain values as YAML that `read` reads."""
    from io import StringIO

    from ruamel.yaml import YAML

    yaml, text = YAML(typ="safe", pure=True), StringIO()
    yaml.default_flow_style = None
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(value, text)
    return text.getvalue()
