"""Experiment files: grids, sweeps, and messages with file:line."""

from __future__ import annotations

import shlex

import pytest

from harness.errors import ConfigError, RegistryError
from harness.experiment import Experiment, RunSpec, expand, load_experiment, sweeps


def write(tmp_path, text):
    path = tmp_path / "e.yaml"
    path.write_text(text)
    return path


def test_a_grid_with_sweeps(tmp_path, plugins):
    text = """
name: grid
models: [digits_cnn, digits_resnet@random]
datasets: [digits]
techniques:
  - saliency
  - occlusion: {window: 4, stride: {sweep: [1, 2]}}
  - first_layer_filters
seeds: [0, 1]
limit: 5
"""
    runs = load_experiment(write(tmp_path, text), plugins).runs
    assert len(runs) == 2 * 2 * (1 + 2 + 1)
    assert {r.params.get("stride") for r in runs if r.technique == "occlusion"} == {1, 2}
    assert all(r.limit == 5 for r in runs if r.dataset)
    assert all(r.dataset is None for r in runs if r.technique == "first_layer_filters")  # it looks at no pictures


def test_sweeps_multiply():
    assert sweeps({"a": {"sweep": [1, 2]}, "b": {"sweep": [3, 4]}, "c": 5}) == [{"a": a, "b": b, "c": 5} for a in (1, 2) for b in (3, 4)]
    with pytest.raises(ConfigError, match="needs a list"):
        sweeps({"a": {"sweep": 3}})


HEAD = "name: x\nmodels: [digits_cnn]\ndatasets: [digits]\n"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (HEAD + "techniques:\n  - occlusion:\n      windw: 3\n", 6, "occlusion.windw: unknown key; did you mean 'window'"),
        (HEAD + "techniques: [salience]\n", 4, "no technique 'salience'; did you mean 'saliency'"),
        (HEAD + "techniques:\n  - {saliency: {}, occlusion: {}}\n", 5, "one technique an item"),
        (HEAD + "techniques: [saliency]\nsead: 3\n", 5, "sead: unknown key; did you mean 'seeds'"),
        (HEAD + "techniques: []\n", 4, "techniques"),
        (HEAD + "techniques: [saliency]\nseeds: [a]\n", 5, "seeds.0"),
        ("name: a b\nmodels: [m]\ntechniques: [saliency]\n", 1, "name"),
        ("models: [m]\ntechniques: [saliency]\n", 1, "name: missing"),
        (HEAD + "techniques:\n  - occlusion: {window: 3, stride: 9}\n", 5, "leaves gaps"),
    ],
)
def test_mistakes_are_told_with_their_line(tmp_path, plugins, text, line, message):
    with pytest.raises(RegistryError) as error:
        load_experiment(write(tmp_path, text), plugins)
    assert f"e.yaml:{line}: " in str(error.value), str(error.value)
    assert message in str(error.value)


def test_a_technique_on_pictures_needs_a_dataset(plugins):
    with pytest.raises(ConfigError, match="needs pictures"):
        expand(plugins, ["digits_cnn"], [], [("saliency", {})])


def test_the_printed_command_makes_the_same_run(plugins):
    from harness.cli.execute import parse_list, parse_params

    spec = RunSpec(
        model="digits_cnn@random:3", dataset="my pictures/set", technique="class_visualization", params={"classes": [1, "two words"], "step": "constant", "l2": 0.5},
        seed=4, select=[1, 2], device="cpu", max_batch=8,
    )  # fmt: skip
    words = shlex.split(spec.command())
    value = lambda flag: [words[i + 1] for i, w in enumerate(words) if w == flag]  # noqa: E731
    assert value("-m") == [spec.model]
    assert value("-d") == [spec.dataset]
    assert parse_params(value("-p")) == spec.params
    assert parse_list(value("--select")[0]) == spec.select
    assert value("--seed") == ["4"]
    assert value("--device") == ["cpu"]
    assert value("--max-batch") == ["8"]


def test_the_digest_names_the_plan(plugins):
    runs = expand(plugins, ["digits_cnn"], ["digits"], [("saliency", {})])
    assert Experiment("a", runs).digest() == Experiment("a", runs, "another title").digest()
    assert Experiment("a", runs).digest() != Experiment("b", runs).digest()


def test_params_on_the_command_line():
    from harness.cli.execute import parse_params

    assert parse_params(["a=1", "b=1e-3", "c=[x, 2]", "d=no", "e=", "f={sweep: [1, 2]}", "g=a: [b"]) == {
        "a": 1, "b": 0.001, "c": ["x", 2], "d": "no", "e": "", "f": {"sweep": [1, 2]}, "g": "a: [b",
    }  # fmt: skip
    for wrong in (["a"], ["=1"], ["a=1", "a=2"]):
        with pytest.raises(ConfigError):
            parse_params(wrong)
