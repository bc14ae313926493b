"""Every renderer draws every kind of artifact, escapes every text, and gives the same bytes twice."""

from __future__ import annotations

import numpy as np
import pytest

from harness import Arrays, Curve, Heatmaps, Images, Matrix, Scatter, Table
from harness.artifacts import KINDS
from harness.plugins import load_plugins
from harness.record import DatasetFacts, ErrorFacts, MetricValue, ModelFacts, Record, ReportInput, Spool, TechniqueFacts

EVIL = "<script>alert('x')</script>&\"--> $x$"


def artifacts():
    rng = np.random.default_rng(0)
    photo = rng.random((3, 3, 70, 80), dtype=np.float32)
    return [
        Images("inputs", photo, captions=[EVIL] * 3),
        Images("tiny", rng.random((5, 1, 8, 8)), columns=3, exact=True, caption=EVIL),
        Images("one", photo[:1]),
        Heatmaps("plain", rng.random((3, 70, 80)), captions=[EVIL] * 3, unit=EVIL),
        Heatmaps("signed", rng.normal(size=(2, 70, 80)), signed=True, over=[0, 2], shared_scale=True),
        Heatmaps("zero", np.zeros((3, 70, 80))),
        Heatmaps("coarse", rng.random((3, 7, 7))),
        Curve("curve", [1, 2, 3], {EVIL: [1, 2, 3], "b": [3, 2, 1]}, EVIL, EVIL, log_x=True),
        Scatter("scatter", rng.random((9, 2)), group=[0, 1, 2] * 3, groups=["a", EVIL, "c"], x_label=EVIL),
        Scatter("stamps", rng.random((9, 2)), pictures=photo, pictured=[0, 3, 8]),
        Scatter("grey_stamps", rng.random((2000, 2)), group=[0, 1] * 1000, groups=["a", EVIL], pictures=photo[:, :1], pictured=[0, 3, 8]),
        Matrix("matrix", rng.random((3, 3)), [EVIL, "b", "c"], ["x", EVIL, "z"], EVIL, tree=[[0, 1, 0.5, 2], [2, 3, 1, 3]]),
        Matrix("wide", rng.normal(size=(2, 80)), ["a", "b"], range(80), signed=True),
        Heatmaps("sheet", rng.random((40, 7, 7)), columns=8, shared_scale=True, over=[0] * 40),
        Images("zoomed", photo[:1], zoom=True, captions=[EVIL]),
        Images("moving", rng.random((9, 3, 64, 64)), moving=True),
        Table("table", ["name", EVIL], [[EVIL, None], ["b", 1.5], ["c", True]]),
        Table("long", ["i"], [[i] for i in range(100)]),
        Arrays("arrays", {"x": rng.random(4)}),
    ]


def record(**change):
    values = {
        "run_id": "0" * 32, "key": "a" * 64, "status": "finished", "seed": 3, "started": "2026-01-02T03:04:05+00:00",
        "spec": {"model": EVIL, "technique": "t", "dataset": EVIL, "params": {"p": EVIL}},
        "technique": TechniqueFacts(
            name="t", summary=EVIL, reading=EVIL, caveats=EVIL, paper={"authors": EVIL, "year": 1, "title": EVIL, "url": "https://example.org/?a=1&b"}
        ),
        "params": {"p": EVIL}, "model": ModelFacts(name=EVIL, builder=EVIL, weights="f" * 64, license=EVIL),
        "dataset": DatasetFacts(name=EVIL, fingerprint="b" * 64, pictures=3), "device": {"kind": "cpu", "name": EVIL},
        "versions": {"torch": EVIL}, "git": {"commit": EVIL, "dirty": True}, "notes": [EVIL],
        "metrics": [MetricValue(name="m", value=0.5, per_image=[0.4, 0.6], about=EVIL, better="higher"), MetricValue(name="n", value=None, detail=EVIL)],
    }  # fmt: skip
    return Record(**{**values, **change})


@pytest.fixture
def report(tmp_path):
    spool = Spool(tmp_path)
    good = spool.write(record(), artifacts())
    other = spool.write(record(run_id="1" * 32, model=ModelFacts(name="other", builder="b", weights="random:0")), artifacts())
    bad = spool.write(
        record(
            run_id="2" * 32,
            status="failed",
            model=ModelFacts(name="third", builder="b", weights="w"),
            error=ErrorFacts(type="E", message=EVIL, traceback=EVIL),
        ),
        [],
    )
    absent = spool.write(
        record(
            run_id="3" * 32,
            status="not_applicable",
            model=ModelFacts(name="fourth", builder="b", weights="w"),
            error=ErrorFacts(type="N", message=EVIL),
        ),
        [],
    )
    return ReportInput(EVIL, "name", [good, other, bad, absent], EVIL, [EVIL])


RENDERERS = list(load_plugins().offers("renderers"))


def test_the_example_has_every_kind():
    assert {a.kind for a in artifacts()} == set(KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", RENDERERS)
def test_the_same_runs_give_the_same_bytes(name, report, plugins, tmp_path):
    first, second = (plugins.get("renderers", name).render(report, tmp_path / sub).read_bytes() for sub in ("a", "b"))
    assert first == second
    assert len(first) > 1000


@pytest.mark.parametrize("name", RENDERERS)
def test_a_folder_that_cannot_be_written_gets_no_half_report(name, report, plugins, tmp_path):
    from harness.errors import StorageError

    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        plugins.get("renderers", name).render(report, tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", RENDERERS)
def test_a_full_disk_leaves_no_half_report(name, report, plugins, tmp_path, monkeypatch):
    import errno
    from pathlib import Path

    from harness.errors import StorageError

    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageError, match="No space left"):
        plugins.get("renderers", name).render(report, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_html_is_one_safe_file(report, plugins, tmp_path):
    text = plugins.get("renderers", "html").render(report, tmp_path).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "default-src 'none'" in text
    assert 'src="data:image/webp' in text
    assert 'src="http' not in text
    assert text.count("<h1>") == 1
    assert "failed" in text
    assert "not applicable" in text
    assert "first 25 of 100 rows" in text
    assert "zero everywhere" in text


def test_every_picture_in_the_html_has_a_text_and_a_size(report, plugins, tmp_path):
    import re

    text = plugins.get("renderers", "html").render(report, tmp_path).read_text()
    pictures = re.findall(r"<img [^>]*>", text)
    assert len(pictures) > 20
    assert all('alt="' in p and 'alt=""' not in p for p in pictures)


@pytest.mark.slow
def test_pdf_is_tagged_and_holds_the_text(report, plugins, tmp_path):
    from pypdf import PdfReader

    pdf = PdfReader(plugins.get("renderers", "pdf").render(report, tmp_path))
    assert "/StructTreeRoot" in pdf.trailer["/Root"]
    assert pdf.trailer["/Root"]["/Lang"] == "en"
    assert [item["/Title"] for item in pdf.outline[1] if isinstance(item, dict)] == ["Summary", "T", "Provenance"]
    text = " ".join(page.extract_text() for page in pdf.pages)
    assert "not applicable" in text
    assert "<script>" in text  # as text on the page
    fonts = {str(f["/BaseFont"]) for page in pdf.pages for f in (o.get_object() for o in page["/Resources"]["/Font"].values())}
    assert all("DejaVu" in f for f in fonts), fonts


def test_pdf_reads_no_file_outside_of_its_folder(tmp_path):
    import subprocess
    import sys

    secret = tmp_path / "secret.png"
    secret.write_bytes(b"x")
    work = tmp_path / "work"
    work.mkdir()
    for source in (secret.as_uri(), "http://127.0.0.1:9/x.png"):
        (work / "report.html").write_text(
            f'<html lang="en"><title>t</title><link rel="attachment" href="{source}"><img alt="x" src="{source}">'
        )
        done = subprocess.run(
            [sys.executable, "-m", "harness_reports.pdf_process", str(work), str(tmp_path / "o.pdf")], capture_output=True, text=True
        )
        assert done.returncode == 1
        assert "refused" in done.stderr or "not allowed" in done.stderr or "protocol" in done.stderr.lower()
        assert not (tmp_path / "o.pdf").exists()


def test_a_damaged_run_is_a_failure_and_shifts_nothing(report, plugins, tmp_path):
    """Metrics stand under their own models when one of three has lost its files."""
    import re

    spool = Spool(tmp_path / "more")
    runs = []
    for i, name in enumerate(("one", "two", "three")):
        facts = ModelFacts(name=name, builder="b", weights="w")
        value = [MetricValue(name="m", value=i + 0.25)]
        runs.append(spool.write(record(run_id=f"{i}" * 32, model=facts, metrics=value), [Images("a", np.zeros((1, 1, 4, 4)))]))
    (runs[0].folder / "a.npz").write_bytes(b"x")
    text = plugins.get("renderers", "html").render(ReportInput("t", "n", runs), tmp_path / "out").read_text()
    assert "2 finished, 1 failed" in text
    assert "missing or altered" in text
    table = text[text.index('<table class="data metrics">') :]
    assert re.findall(r'<th scope="col">(\w+)</th>', table)[:4] == ["metric", "two", "three", "meaning"]
    assert re.findall(r"<td[^>]*>([\d.]+)</td>", table)[:2] == ["1.25", "2.25"]
    assert plugins.get("renderers", "json").render(ReportInput("t", "n", runs), tmp_path / "out").exists()


def test_many_models_stand_below_one_another(plugins, tmp_path):
    """Six columns of models would not fit a page: each model is a row, its values under the metrics' names."""
    import re

    spool = Spool(tmp_path / "more")
    runs = [
        spool.write(
            record(
                run_id=f"{i}" * 32, model=ModelFacts(name=f"net{i}", builder="b", weights="w"),
                metrics=[MetricValue(name="m", value=i + 0.25, about="what"), MetricValue(name="n", value=2 * i + 0.5, better="higher")],
            ),
            [],
        )
        for i in range(6)
    ]  # fmt: skip
    text = plugins.get("renderers", "html").render(ReportInput("t", "n", runs), tmp_path / "out").read_text()
    table = text[text.index('<table class="data metrics">') :]
    assert re.findall(r'<th scope="col">(\w+)</th>', table)[:3] == ["model", "m", "n"]
    assert re.findall(r'<th scope="row">(\w+)</th><td>([\d.]+)</td>', table)[:6] == [(f"net{i}", f"{i + 0.25:.3g}") for i in range(6)]
    assert '<td class="best">10.5</td>' in table
    assert table.count('class="best"') == 1


def test_an_artifact_that_cannot_be_drawn_costs_only_itself(report, plugins, tmp_path, monkeypatch):
    from harness_reports import charts

    monkeypatch.setattr(charts, "curve", lambda artifact: 1 / 0)
    text = plugins.get("renderers", "html").render(report, tmp_path).read_text()
    assert "curve cannot be drawn: ZeroDivisionError" in text
    assert "first 25 of 100 rows" in text


@pytest.mark.slow
def test_the_pdf_process_imports_nothing_from_the_users_folder(report, plugins, tmp_path, monkeypatch):
    (tmp_path / "weasyprint.py").write_text("raise SystemExit('imported from the current folder')")
    (tmp_path / "logging.py").write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(tmp_path)
    assert plugins.get("renderers", "pdf").render(report, tmp_path / "out").exists()


def test_json_holds_every_row_and_no_nan(report, plugins, tmp_path):
    import json

    content = json.loads(plugins.get("renderers", "json").render(report, tmp_path).read_text())
    assert len(content["runs"][0]["tables"]["long"]["rows"]) == 100
    assert content["runs"][0]["metrics"][1]["value"] is None


@pytest.mark.parametrize("layout", [{}, {"columns": 2}, {"columns": 2, "captions": ["weak", "strong"]}])
def test_one_scale_keeps_a_weak_map_weak_in_every_layout(layout):
    from harness_reports.view import _heatmaps

    class Drawn:
        def __init__(self):
            self.pixels = []

        def image(self, pixels, exact=False):
            self.pixels.append(pixels)
            return "x.png"

    def darkest(**more):
        drawn = Drawn()
        panel = _heatmaps(record(), Heatmaps("maps", np.stack([np.full((64, 64), 0.1), np.ones((64, 64))]), **layout, **more), None, drawn)
        pixels = np.concatenate([p.reshape(len(p), -1, 3) for p in drawn.pixels], 1)
        return pixels[:, : pixels.shape[1] // 2].mean((0, 1)), panel.legend.high

    (own, words), (shared, number) = darkest(), darkest(shared_scale=True)
    assert np.abs(own - shared).max() > 20  # on a scale of its own the weak map is drawn as strong as the other
    assert words != number and "1" in number


def test_labels_of_a_logarithmic_axis_are_numbers():
    import numpy as np

    from harness import Curve
    from harness_reports import charts

    drawn = charts.curve(Curve("a", range(1, 30), {"x": np.geomspace(2e7, 4e8, 29)}, "step", "value", log_y=True))
    assert b"mathdefault" not in drawn and b"<!-- 1e+08 -->" in drawn
