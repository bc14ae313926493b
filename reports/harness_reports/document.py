"""The formats: HTML in one file, PDF by WeasyPrint in a process of its own, JSON. All are written whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from harness.artifacts import Table
from harness.errors import HarnessError, StorageError
from harness.paths import writing
from harness.record import ReportInput

from .view import View, build_view

HERE = Path(__file__).parent
WEBP_QUALITY, JPEG_QUALITY = 80, 85
FRAME_MS = 100  # of animations
PDF_SECONDS = 600


class _Inline:
    """Pictures inside the page: WebP, without loss where single pixels matter."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}

    def image(self, pixels: np.ndarray, exact: bool) -> str:
        from PIL import Image

        key = hashlib.sha256(pixels.tobytes() + repr((pixels.shape, exact)).encode()).hexdigest()
        if key not in self._seen:
            buffer = io.BytesIO()
            # Fast settings: 10 % larger, ten times quicker.
            Image.fromarray(pixels).save(buffer, "WEBP", lossless=exact, quality=50 if exact else WEBP_QUALITY, method=1)
            self._seen[key] = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
        return self._seen[key]

    def animation(self, frames: list[np.ndarray], exact: bool) -> str:
        from PIL import Image

        first, *rest = (Image.fromarray(frame) for frame in frames)
        buffer = io.BytesIO()
        first.save(
            buffer, "WEBP", save_all=True, append_images=rest, duration=FRAME_MS, loop=0, lossless=exact, quality=WEBP_QUALITY, method=1
        )
        return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()

    def svg(self, data: bytes) -> str:
        return "data:image/svg+xml;base64," + base64.b64encode(data).decode()


class _Files:
    """Pictures beside the page, named by content: JPEG, or PNG where single pixels matter; WeasyPrint reads each once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def image(self, pixels: np.ndarray, exact: bool) -> str:
        from PIL import Image

        suffix = "png" if exact else "jpg"
        name = f"{hashlib.sha256(pixels.tobytes() + repr((pixels.shape, exact)).encode()).hexdigest()[:32]}.{suffix}"
        if not (self.folder / name).exists():
            if exact:
                Image.fromarray(pixels).save(self.folder / name, optimize=False)
            else:
                Image.fromarray(pixels).save(self.folder / name, quality=JPEG_QUALITY, subsampling=0)
        return name

    def animation(self, frames: list[np.ndarray], exact: bool) -> str:
        return ""  # paper does not move

    def svg(self, data: bytes) -> str:
        name = f"{hashlib.sha256(data).hexdigest()[:32]}.svg"
        (self.folder / name).write_bytes(data)
        return name


def render_page(view: View, styles: tuple[str, ...], printed: bool) -> str:
    """The page; every text is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    css = "\n".join((HERE / "styles" / name).read_text(encoding="utf-8") for name in styles)
    return environment.get_template("report.html.jinja").render(view=view, css=css, printed=printed)


class HtmlReport:
    """`report.html`: one file, no scripts, nothing fetched."""

    def render(self, report: ReportInput, folder: Path) -> Path:
        page = render_page(build_view(report, _Inline()), ("shared.css", "screen.css"), printed=False)
        path = folder / "report.html"
        with writing(path) as temporary:
            temporary.write_text(page, encoding="utf-8")
        return path


class PdfReport:
    """`report.pdf`, tagged (PDF/UA-1), A4."""

    def render(self, report: ReportInput, folder: Path) -> Path:
        path = folder / "report.pdf"
        with tempfile.TemporaryDirectory(prefix="harness-pdf-") as name:
            work = Path(name)
            view = build_view(report, _Files(work))
            _fonts(work)
            (work / "report.html").write_text(render_page(view, ("shared.css", "print.css"), printed=True), encoding="utf-8")
            with writing(path) as temporary:
                _weasyprint(work, temporary, view.date)
        return path


def _fonts(folder: Path) -> None:
    """The fonts that matplotlib ships, so that a page looks the same on machines with other fonts, or none."""
    import matplotlib

    source = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSansMono.ttf"):
        (folder / name).write_bytes((source / name).read_bytes())


def _weasyprint(work: Path, out: Path, date: str) -> None:
    # A process of its own: WeasyPrint keeps the memory of large documents, and reads the date of fonts when it starts.
    moment = int(datetime.fromisoformat(date).timestamp()) if date else 0
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(moment), "PYTHONHASHSEED": "0"}
    # -P: nothing is imported from the folder the user happens to stand in.
    command = [sys.executable, "-P", "-m", "harness_reports.pdf_process", str(work), str(out)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PDF_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise HarnessError(f"the PDF took longer than {PDF_SECONDS} s; ask for --format html") from None
    if done.returncode == 3:
        raise StorageError(f"the PDF cannot be written: {done.stderr.strip().splitlines()[-1]}")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        hint = (
            "; WeasyPrint needs the system library Pango (Debian: apt install libpango-1.0-0 libpangoft2-1.0-0)"
            if "pango" in done.stderr.lower()
            else ""
        )
        raise HarnessError(f"the PDF could not be made: {last}{hint}; the HTML has the same content")


class JsonReport:
    """`report.json`: the records and all table rows, for programs and for `harness verify`."""

    def render(self, report: ReportInput, folder: Path) -> Path:
        runs: list[dict[str, Any]] = []
        for run in report.runs:
            value = run.record.model_dump(mode="json")
            tables = [] if run.damage() else [run.artifact(f.name) for f in run.record.artifacts if f.kind == "table"]
            value["tables"] = {t.name: {"columns": t.columns, "rows": t.rows} for t in tables if isinstance(t, Table)}
            runs.append(value)
        content = {"schema_version": 1, "title": report.title, "name": report.name, "command": report.command, "runs": runs}
        path = folder / "report.json"
        with writing(path) as temporary:
            temporary.write_text(
                json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8"
            )
        return path
