"""`harness plugin new NAME`: a package with one technique that works, its entry point and its test."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from string import Template

from .errors import ConfigError, StorageError
from .plugins import load_plugins
from .technique import SLUG

PYPROJECT = Template("""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "$dist"
version = "0.1.0"
description = "A vision-harness technique"
requires-python = ">=3.11"
dependencies = ["vision-harness"]

[project.entry-points.harness]
$slug = "$package"

[tool.hatch.build.targets.wheel]
packages = ["$package"]
""")

MODULE = Template('''\
"""The technique $slug for vision-harness."""

from harness import Context, Heatmaps, Param, Result, TargetSpec, Technique, hookimpl


class $cls(Technique):
    """Mean absolute input gradient over noisy copies of the picture. Say here what yours computes, and its source."""

    name = "$slug"
    family = "saliency"
    needs = frozenset({"images"})
    attribution = "map"  # the map that faithfulness and the like judge
    audit = {"standard": {}}  # the profiles of audits it is part of, with its parameters there
    reading = "How to read the picture."
    caveats = "What it does not show."

    target: TargetSpec = Param("predicted", description="what is explained")
    samples: int = Param(8, ge=1, description="noisy copies averaged a picture")
    noise: float = Param(0.1, ge=0, description="standard deviation of the noise, pixels being in [0, 1]")

    def run(self, ctx: Context) -> Result:
        x = ctx.images  # (N, C, H, W) in [0, 1]
        maps = sum(ctx.input_gradient(x + self.noise * ctx.randn_like(x)).abs().amax(1) for _ in range(self.samples))
        return Result([Heatmaps("map", maps / self.samples, unit="mean change of score")])


@hookimpl
def harness_techniques():
    return [$cls]
''')

TEST = Template("""\
from $package import $cls

from harness.testing import check_technique


def test_keeps_the_rules():
    assert check_technique($cls) == []
""")


def scaffold(name: str, where: Path) -> Path:
    """Write the package `harness-NAME` into `where`; refuses to write over anything."""
    slug = name.replace("-", "_").removeprefix("harness_")
    if not SLUG.fullmatch(slug):
        raise ConfigError(f"plugin name {name!r}: use lower-case letters, digits and '_', starting with a letter")
    names = {
        "slug": slug,
        "dist": f"harness-{slug.replace('_', '-')}",
        "package": f"harness_{slug}",
        "cls": "".join(part.capitalize() for part in slug.split("_")),
    }
    if find_spec(names["package"]) is not None or slug in load_plugins().offers("techniques"):
        raise ConfigError(f"plugin name {name!r}: there is a technique or a package {names['package']!r} already; choose another name")
    folder = where / names["dist"]
    if folder.exists():
        raise ConfigError(f"{folder} exists already; choose another name or folder")
    files = {
        "pyproject.toml": PYPROJECT,
        f"{names['package']}/__init__.py": MODULE,
        f"tests/test_{slug}.py": TEST,
    }
    try:
        for path, template in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(template.substitute(names), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{folder}: {error.strerror}") from None
    return folder
