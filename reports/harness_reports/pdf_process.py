"""`python -m harness_reports.pdf_process FOLDER OUT`: FOLDER/report.html as PDF. Reads nothing outside of FOLDER."""

from __future__ import annotations

import logging
import mimetypes
import sys
from pathlib import Path

EXIT_NOT_WRITTEN = 3
# Addresses end up in the PDF as hashes: a folder's own path would make each rendering differ. The name cannot resolve.
BASE = "http://report.invalid/"


def main(folder: Path, out: Path) -> int:
    from weasyprint import HTML
    from weasyprint.urls import FatalURLFetchingError, URLFetcher, URLFetcherResponse

    class InsideFolder(URLFetcher):
        """Files of the report's own folder and nothing else: no network, no other files."""

        def fetch(self, url, headers=None):  # type: ignore[no-untyped-def]  # WeasyPrint has no types
            name = url.removeprefix(BASE)
            if not url.startswith(BASE) or "/" in name or not (folder / name).is_file():
                raise FatalURLFetchingError(f"refused: {url}")
            kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
            return URLFetcherResponse(url, (folder / name).read_bytes(), {"Content-Type": kind})

    logging.getLogger("weasyprint").setLevel(logging.ERROR)
    logging.getLogger("fontTools").setLevel(logging.ERROR)
    text = (folder / "report.html").read_text(encoding="utf-8")
    data = HTML(string=text, base_url=BASE, url_fetcher=InsideFolder()).write_pdf(pdf_variant="pdf/ua-1")
    try:
        out.write_bytes(data)
    except OSError as error:
        print(error.strerror, file=sys.stderr)
        return EXIT_NOT_WRITTEN
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
