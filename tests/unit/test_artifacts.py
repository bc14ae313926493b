"""Artifacts: checked when built, unchanged by being stored, read without pickles."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from harness import Arrays, Curve, Heatmaps, Images, Matrix, Metric, Result, Scatter, Table
from harness.artifacts import load


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Images("a", np.zeros((2, 4, 3, 3))), r"shape \(2, 4, 3, 3\) is not"),
        (lambda: Images("a", np.full((1, 1, 2, 2), 1.1)), r"leave \[0, 1\]"),
        (lambda: Images("a", np.full((1, 1, 2, 2), np.nan)), "4 of 4 values are not finite"),
        (lambda: Images("a", np.zeros((2, 1, 2, 2)), captions=["x"]), "1 captions for 2 pictures"),
        (lambda: Images("a", np.zeros((0, 1, 2, 2))), "no pictures"),
        (lambda: Heatmaps("a", np.zeros((2, 2))), r"not \(N, H, W\)"),
        (lambda: Heatmaps("a", -np.ones((1, 2, 2))), "negative values"),
        (lambda: Heatmaps("a", np.zeros((2, 2, 2)), over=[0]), "1 places for 2 maps"),
        (lambda: Curve("a", [1, 2], {"l": [1]}), "does not fit"),
        (lambda: Curve("a", [1], {"l": [np.inf]}), "not finite"),
        (lambda: Curve("a", [1], {}), "at least one line"),
        (lambda: Scatter("a", np.zeros((3, 3))), r"not \(N, 2\)"),
        (lambda: Scatter("a", np.zeros((2, 2)), group=[0, 5], groups=["x"]), "outside"),
        (lambda: Scatter("a", np.zeros((2, 2)), pictures=np.zeros((1, 1, 2, 2)), pictured=[2]), "a point that is not there"),
        (lambda: Scatter("a", np.zeros((2, 2)), pictures=np.zeros((1, 1, 2, 2)), pictured=[0, 1]), r"\(2,\) places for 1 pictures"),
        (lambda: Matrix("a", np.zeros((2, 3)), ["x"], ["y"] * 3), "names for 1 x 3 values"),
        (lambda: Matrix("a", np.zeros((2, 1)), ["x", "y"], ["z"], tree=np.zeros((2, 4))), r"tree \(2, 4\) is not \(1, 4\)"),
        (lambda: Table("a", ["x"], [[1, 2]]), "row 0 has 2 cells for 1 columns"),
        (lambda: Table("a", ["x"], [[[1]]]), "not text or a number"),
        (lambda: Arrays("a", {"x": np.array([object()])}), "dtype object"),
        (lambda: Result([Table("a", [], []), Table("a", [], [])]), "two artifacts are named a"),
        (lambda: Result([], [Metric("m", 1), Metric("m", 2)]), "two metrics are named m"),
        (lambda: Metric("Bad name", 1), "metric name"),
    ],
)
def test_what_is_wrong_is_said_when_built(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_rounding_out_of_the_range_is_clipped():
    assert Images("a", np.full((1, 1, 1, 1), 1 + 1e-6)).data.max() == 1


@settings(max_examples=25, deadline=None)
@given(arrays(np.float32, (2, 3, 4, 5), elements=st.floats(0, 1, width=32)), st.text(max_size=20))
def test_images_survive_being_stored(data, text):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        image = Images("a", data, captions=[text, "b"], columns=2, caption=text)
        image.save(path)
        back = load(path)
    assert np.array_equal(back.data, image.data)
    assert back.captions == image.captions
    assert back.caption == text


def test_eight_bit_pictures_take_a_quarter_and_come_back_exactly(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 50, 50), dtype=np.uint8)
    data = (torch.from_numpy(pixels).float() / 255).numpy()
    Images("a", data).save(tmp_path / "a.npz")
    assert (tmp_path / "a.npz").stat().st_size < pixels.nbytes * 1.1
    assert np.array_equal(load(tmp_path / "a.npz").data, data)


@pytest.mark.parametrize(
    "artifact",
    [
        Heatmaps("h", np.random.default_rng(0).normal(size=(2, 3, 3)), signed=True, over=[1, 0], unit="u"),
        Curve("c", [1, 2], {"a": [1, 2], 'ä,."': [3, 4]}, "x", "y", log_y=True),
        Scatter("s", [[1, 2], [3, 4]], group=[0, 1], groups=["a", "b"]),
        Table("t", ["a", "b"], [[1, None], ["x", 1.5], [True, np.float32(2)]]),
        Arrays("a", {"x": np.arange(3), "y": torch.ones(2)}),
    ],
)
def test_every_kind_survives_and_gives_the_same_bytes(artifact, tmp_path):
    artifact.save(tmp_path / "1.npz")
    back = load(tmp_path / "1.npz")
    back.save(tmp_path / "2.npz")
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()
    meta, data = artifact.parts()
    again, same = back.parts()
    plain = lambda m: json.loads(json.dumps(m, default=lambda v: v.item()))  # noqa: E731
    assert plain(again) == plain(meta)
    assert all(np.array_equal(data[k], same[k]) for k in data)


def test_a_pickled_artifact_is_not_read(tmp_path):
    np.savez(tmp_path / "evil.npz", meta=np.array([print], dtype=object))
    with pytest.raises(ValueError, match="pickle"):
        load(tmp_path / "evil.npz")
