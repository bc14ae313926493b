"""The example of a third party's package: installed for real, found, run, reported, and gone again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installed(tmp_path):
    """The package as an installer would leave it, in a folder of its own on the path: no environment is changed."""
    source = ROOT / "examples" / "harness-example-plugin"
    target = tmp_path / "site"
    target.mkdir()
    os.symlink(source / "harness_example_plugin", target / "harness_example_plugin")
    info = target / "harness_example_plugin-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: harness-example-plugin\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[harness]\nexample_plugin = harness_example_plugin\n")
    return {**os.environ, "PYTHONPATH": str(target)}


def harness(*words, env, cwd):
    return subprocess.run([sys.executable, "-m", "harness", *words], env=env, cwd=cwd, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_it_is_found_checked_run_and_reported(installed, tmp_path):
    assert "noisy_gradient" in harness("techniques", env=installed, cwd=tmp_path).stdout
    checked = harness("plugin", "check", "harness-example-plugin", env=installed, cwd=tmp_path)
    assert checked.stdout == "ok      noisy_gradient\n", checked.stdout
    words = ["-d", "digits_test", "--limit", "6", "-p", "class_visualization.steps=3"]
    done = harness("audit", "digits_cnn", *words, "--format", "html", env=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "noisy_gradient on digits_cnn" in done.stderr
    judged = harness(
        "run", "-m", "digits_cnn", "-d", "digits_test", "--limit", "2", "-t", "faithfulness", "-p", "cells=2", "-p", "oracle_rounds=0",
        "-p", "profile=draft", env=installed, cwd=tmp_path,
    )  # fmt: skip
    assert judged.returncode == 0, judged.stderr
    harness("report", "runs", "--format", "json", "-o", "judged", env=installed, cwd=tmp_path)
    assert '"deletion.noisy_gradient"' in (tmp_path / "judged/report.json").read_text()  # without knowing its name
    assert "harness-example-plugin 0.1.0" in (tmp_path / "out/audit-digits_cnn/report.html").read_text()


@pytest.mark.slow
def test_its_own_tests_pass(installed, tmp_path):
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "examples/harness-example-plugin/tests")]
    done = subprocess.run(words, env=installed, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_a_broken_package_stops_nothing_else(installed, tmp_path):
    info = tmp_path / "site" / "broken-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text("[harness]\nbroken = broken_module\n")
    (tmp_path / "site" / "broken_module.py").write_text("raise OSError('no such library')\n")
    done = harness("run", "-m", "digits_cnn", "-d", "digits", "-t", "noisy_gradient", "--limit", "2", env=installed, cwd=tmp_path)
    assert done.returncode == 0
    assert "plugin 'broken' of broken 2.0: OSError: no such library" in done.stderr
    doctor = harness("doctor", env=installed, cwd=tmp_path)
    assert doctor.returncode == 1
    assert "PROBLEM  plugin 'broken' of broken 2.0" in doctor.stdout
    wrong = harness("run", "-m", "digits_cnn", "-d", "digits", "-t", "brocken", env=installed, cwd=tmp_path)
    assert wrong.returncode == 2
    assert "may belong to what failed to load" in wrong.stderr


@pytest.mark.slow
def test_two_packages_with_one_name_are_both_named(installed, tmp_path):
    info = tmp_path / "site" / "double-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: double\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text("[harness]\ndouble = double_module\n")
    (tmp_path / "site" / "double_module.py").write_text("from harness_example_plugin import harness_techniques\n")
    wrong = harness("techniques", env=installed, cwd=tmp_path)
    assert wrong.returncode == 2
    assert "'noisy_gradient' is offered by both double 2.0" in wrong.stderr
    assert "harness-example-plugin 0.1.0" in wrong.stderr
    skipped = harness("techniques", env={**installed, "HARNESS_SKIP_PLUGINS": "double"}, cwd=tmp_path)
    assert skipped.returncode == 0
