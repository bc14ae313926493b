"""The wheel carries everything: registry, templates, styles, networks; it works from another folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_it_holds_what_is_needed_and_no_more(unpacked):
    files = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    assert {
        "harness/registry.yaml",
        "harness/data/digits_cnn.safetensors",
        "harness/data/imagenet_classes.txt",
        "harness_reports/templates/report.html.jinja",
        "harness_reports/styles/print.css",
        "harness_saliency/occlusion.py",
    } <= files
    assert not [f for f in files if f.startswith(("tests", "bench", "docs", "examples"))]
    assert sum((unpacked / f).stat().st_size for f in files) < 6_500_000  # two networks of styles are 3.4 MB of it


@pytest.mark.slow
def test_it_audits_from_another_folder(unpacked, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}

    def run(*words):
        return subprocess.run([sys.executable, *words], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)

    where = run(
        "-c", "import harness, harness_reports, harness.registry as r; print(harness.__file__, harness_reports.__file__, r.shipped_path())"
    )
    assert where.stdout.count(str(unpacked)) == 3, where
    done = run(
        "-m",
        "harness",
        "audit",
        "digits_cnn",
        "-d",
        "digits_test",
        "--limit",
        "4",
        "--profile",
        "quick",
        "-p",
        "class_visualization.steps=2",
        "-o",
        "a",
    )
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"report.html", "report.pdf", "report.json"}
