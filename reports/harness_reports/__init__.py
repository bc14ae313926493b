"""Reports: records -> one view -> HTML, PDF and JSON."""

from __future__ import annotations

from collections.abc import Mapping

from harness.hookspecs import hookimpl
from harness.record import Renderer

from .document import HtmlReport, JsonReport, PdfReport


@hookimpl
def harness_renderers() -> Mapping[str, Renderer]:
    return {"html": HtmlReport(), "pdf": PdfReport(), "json": JsonReport()}
