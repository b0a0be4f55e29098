"""`python -m tests.screenshots REPORT` (`make screenshots`): the pictures of the report page in docs.

The page in the light and the dark theme, on a phone, and as it is printed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.browser import Browser, Tab, find_browser
from tests.documents import DOCS


@dataclass(frozen=True)
class Shot:
    """A picture of a part of the page.

    Args:
        width: of the window, in CSS pixels.
        first: selector of the element at the top of the picture.
        last: selector of the element at its end.
        dark: in the dark theme.
        media: `screen` or `print`.
    """

    width: int
    first: str = "#explorer"
    last: str = "#texts"
    dark: bool = False
    media: str = "screen"


SHOTS: Mapping[str, Shot] = {
    "explorer-light.png": Shot(1000, last="#scale"),
    "explorer-dark.png": Shot(1000, last="#scores", dark=True),
    "explorer-phone.png": Shot(400),
    "explorer-print.png": Shot(1032, first="header", media="print"),  # A4, landscape
}
"""File in docs -> what it shows."""


def take(report: Path, out: Path) -> None:
    """Write the pictures of a report to a folder.

    Raises:
        FileNotFoundError: no report, or no browser.
    """
    if not report.is_file():
        raise FileNotFoundError(f"expected a report page at {report}; there is none. Run `make demo`.")
    if (binary := find_browser()) is None:
        raise FileNotFoundError("expected Chromium or Chrome on the path; got none. Install one (Debian: chromium).")
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(binary, Path(profile))
        try:
            for name, shot in SHOTS.items():
                tab = Tab(browser)
                tab.window(shot.width, dark=shot.dark, media=shot.media)
                tab.open(report.resolve())
                tab.picture(out / name, between=(shot.first, shot.last))
                tab.close()
        finally:
            browser.close()


if __name__ == "__main__":
    take(Path(sys.argv[1]), DOCS)
