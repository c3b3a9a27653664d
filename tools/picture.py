"""Takes the README's picture of the report: the first window of an example's page, as a headless Chromium draws it.

`make picture`. The page is made by `recommend`, without a measurement, so that machines differ in nothing but fonts.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import yaml
from browser import Browser

from archcompass.advisor.pictures import gather
from archcompass.advisor.recommend import recommend
from archcompass.advisor.report.html import page
from archcompass.advisor.workload import Workload

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE, PICTURE = ROOT / "examples" / "corporate-archive.yaml", ROOT / "docs" / "report.png"
WIDTH, HEIGHT = 1120, 1195
COLOURS = 64


def main() -> int:
    """Writes docs/report.png."""
    from PIL import Image

    workload = Workload(**yaml.safe_load(EXAMPLE.read_text()))
    answer = recommend(workload)
    report = {
        "recommendation": answer.model_dump(mode="json"),
        "pictures": gather(workload, answer),
        "versions": {},
    }
    path = PICTURE.with_suffix(".html")
    path.write_text(page(report, "archcompass advise examples/corporate-archive.yaml -o out/"))
    try:
        with Browser() as browser:
            browser.open(path, width=WIDTH, height=HEIGHT)
            taken = browser.picture()
    finally:
        path.unlink()
    Image.open(io.BytesIO(taken)).convert("RGB").quantize(COLOURS).save(PICTURE, optimize=True)
    sys.stdout.write(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size:,} bytes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
