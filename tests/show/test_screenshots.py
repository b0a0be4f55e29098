"""`make screenshots` writes the pictures of the report page that docs show."""

from __future__ import annotations

import subprocess
from pathlib import Path

import matplotlib.image
import pytest

from steerkit.show.report import write_report
from steerkit.sweeps.result import SweepResult
from tests.browser import Browser
from tests.screenshots import SHOTS, take
from tests.sweep_tables import table, tokens

ROOT = Path(__file__).parents[2]


def test_a_report_is_pictured_light_dark_on_a_phone_and_in_print(browser: Browser, tmp_path: Path) -> None:
    frame = table(layers=(8,), prompts=2, samples=1)
    write_report(tmp_path / "report.html", title="Two", sweep=SweepResult(frame), projections=tokens(frame))
    take(tmp_path / "report.html", tmp_path)
    pictures = {name: matplotlib.image.imread(tmp_path / name) for name in SHOTS}
    assert {name: picture.shape[1] for name, picture in pictures.items()} == {
        name: shot.width for name, shot in SHOTS.items()
    }
    brightness = {name: picture[..., :3].mean() for name, picture in pictures.items()}
    assert brightness["explorer-dark.png"] < 0.3 < 0.8 < brightness["explorer-light.png"]
    assert all(picture.shape[0] > 300 for picture in pictures.values())


def test_a_missing_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a report page at .*Run `make demo`"):
        take(tmp_path / "report.html", tmp_path)


def test_make_screenshots_takes_them_of_the_demo() -> None:
    command = ["make", "--dry-run", "--old-file=.venv/.ready", "--old-file=.venv/.dev", "screenshots"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "steerkit demo --out runs/demo" in told and "tests.screenshots runs/demo/report.html" in told
