"""report.html in a real browser: a phone's width, light and dark, print."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report_run import write_run

from locsgd_dist.reporting import write_report
from locsgd_dist.reporting.style import PALETTE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found"),
    pytest.mark.xdist_group("browser"),  # one worker: the report is written once
]

PROBE = """
const page = frame.contentDocument, view = frame.contentWindow;
const colour = (selector) => view.getComputedStyle(page.querySelector(selector));
const wide = [...page.querySelectorAll("main *")].filter((e) =>
  !e.closest(".sheet") && !e.closest("svg") && e.getBoundingClientRect().right > view.innerWidth + 0.5);
const [svg] = page.querySelectorAll("#footprint svg");
const text = svg.querySelector("text");
return {
  width: page.documentElement.scrollWidth,
  wide: wide.map((e) => e.outerHTML.slice(0, 80)),
  ink: colour("body").color,
  page: colour("body").backgroundColor,
  axis: view.getComputedStyle(text).fill,
  curve: view.getComputedStyle(svg.querySelector("path[clip-path][style*=blue]")).stroke,
  textHeight: text.getBoundingClientRect().height,
  columns: colour(".figures").gridTemplateColumns.split(" ").length,
  drawn: [...page.querySelectorAll("figure svg")].map((e) => e.getBoundingClientRect().height),
};
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    names = {"name": "a-model-name-without-any-place-to-break-it-" * 4}
    path = write_run(tmp_path_factory.mktemp("runs") / ("long-name-" * 12), num_epochs=4, ranks=4, model=names)
    return write_report(path, plots=False).read_text()


def probe(folder: Path, report: str, width: int, *, dark: bool = False) -> dict[str, Any]:
    """What a browser window of that width makes of the report: it is shown in a frame, which may be narrower than
    the narrowest window."""
    page = folder / "frame.html"
    frame = f'<iframe id="frame" style="border:0;width:{width}px;height:800px" srcdoc="{html.escape(report)}"></iframe>'
    script = (
        f'onload = () => {{ document.querySelector("output").textContent = JSON.stringify((() => {{{PROBE}}})()) }}'
    )
    page.write_text(f"<!doctype html>{frame}<output></output><script>{script}</script>")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--hide-scrollbars", "--window-size=1400,900", scheme]
    command += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    found = re.search(r"<output>(.*?)</output>", dom, re.DOTALL)
    assert found, dom[-2000:]
    return json.loads(html.unescape(found[1]))


def rgb(color: str) -> str:
    return "rgb({}, {}, {})".format(*bytes.fromhex(color.removeprefix("#")))


def test_a_phone_scrolls_down_only(tmp_path: Path, report: str) -> None:
    seen = probe(tmp_path, report, 390)
    assert seen["wide"] == []
    assert seen["width"] == 390
    assert seen["columns"] == 1
    assert len(seen["drawn"]) == 12
    assert min(seen["drawn"]) > 150
    assert seen["textHeight"] >= 8


def test_a_desk_has_two_columns(tmp_path: Path, report: str) -> None:
    seen = probe(tmp_path, report, 1280)
    assert seen["wide"] == []
    assert (seen["width"], seen["columns"]) == (1280, 2)


@pytest.mark.parametrize("dark", [False, True])
def test_page_and_figures_follow_the_scheme(tmp_path: Path, report: str, dark: bool) -> None:
    seen = probe(tmp_path, report, 800, dark=dark)
    assert seen["ink"] == rgb(PALETTE["ink"][dark])
    assert seen["axis"] == rgb(PALETTE["muted"][dark])
    assert seen["curve"] == rgb(PALETTE["blue"][dark])
    background = [int(part) for part in re.findall(r"\d+", seen["page"])]
    assert (max(background) < 40) if dark else (min(background) > 240)
