"""The page in a real browser, where there is one: headless Chromium by its command line."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]

_LOOK = """
<script type="module">
const folds = [...document.querySelectorAll("details")];
const openedByLink = folds.filter((fold) => fold.open).map((fold) => fold.querySelector("h2")?.id);
folds.forEach((fold) => { fold.open = true; });
const page = document.documentElement;
const table = document.getElementById("results");
const names = () => [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => row.cells[0].textContent);
const before = names();
const buttons = [...table.querySelectorAll("thead button")];
buttons[0].click();
const descending = names();
buttons[0].click();
const ascending = names();
const filter = document.getElementById("filter");
filter.value = "a1";
filter.dispatchEvent(new Event("input"));
const filtered = names();

// Contrast of every element's own text with the first background behind it that is not transparent.
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function rgb(colour) {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
}
function luminance([r, g, b]) {
  const [x, y, z] = [r, g, b].map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
}
function behind(element) {
  for (let at = element; at; at = at.parentElement) {
    const colour = rgb(getComputedStyle(at).backgroundColor);
    if (colour[3] === 255) return colour;
  }
  return [255, 255, 255];
}
const texts = [...document.body.querySelectorAll("*")].filter(
  (element) => !element.closest("script, style, title")
    && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())
);
const contrasts = texts.map((element) => {
  const style = getComputedStyle(element);
  const one = luminance(rgb(element.closest("svg") ? style.fill : style.color));
  const other = luminance(behind(element));
  return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
});
document.title = JSON.stringify({
  openedByLink, before, descending, ascending, filtered,
  wide: page.scrollWidth > page.clientWidth,
  width: page.clientWidth,
  background: getComputedStyle(document.body).backgroundColor,
  smallest: Math.min(...texts.map((element) => parseFloat(getComputedStyle(element).fontSize))),
  contrast: Math.min(...contrasts),
  images: [...document.images].filter((image) => !(image.complete && image.naturalWidth)).length,
  svgs: [...document.querySelectorAll(".figures svg")].filter((svg) => svg.getBoundingClientRect().width > 100).length,
  hidden_scripts: document.querySelectorAll("script").length,
});
</script>
"""


def seen(page: Path, tmp_path: Path, width: int, theme: str, link: str = "") -> tuple[dict[str, Any], str]:
    """What a browser makes of ``page``, and what it wrote to its console. The page is looked at from within, in a
    frame of ``width``: a window has a least width."""
    inner = tmp_path / "page.html"
    inner.write_text(page.read_text().replace("</body>", _LOOK + "</body>"))
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<!DOCTYPE html><html style="color-scheme: {theme}"><title>outer</title>'
        f'<iframe src="page.html{link}" style="width: {width}px; height: 900px; border: 0" '
        'onload="document.title = this.contentDocument.title"></iframe></html>'
    )
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom",
            "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--window-size=1400,1000",
            f"--blink-settings=preferredColorScheme={1 if theme == 'light' else 0}", outer.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout, re.DOTALL)
    assert title, done.stdout[:2000] + done.stderr[-2000:]
    return json.loads(html.unescape(title[1])), "\n".join(
        line for line in done.stderr.splitlines() if "CONSOLE" in line
    )


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_is_readable_at_any_width_in_both_themes(
    finished: Path, tmp_path: Path, width: int, theme: str
) -> None:
    found, console = seen(finished / "report/index.html", tmp_path, width, theme)
    assert console == ""
    assert found["width"] == width
    assert not found["wide"]
    assert found["smallest"] >= 11
    assert found["contrast"] >= 4.5
    assert found["images"] == 0
    assert found["svgs"] == 2 * 3
    assert (found["background"] == "rgb(255, 255, 255)") == (theme == "light")


def test_the_table_sorts_and_filters_and_a_link_opens_its_q_id(finished: Path, tmp_path: Path) -> None:
    found, console = seen(finished / "report/index.html", tmp_path, 1280, "light", "#B2")
    assert console == ""
    assert found["before"] == found["ascending"] == ["A1", "B2"]
    assert found["descending"] == ["B2", "A1"]
    assert found["filtered"] == ["A1"]
    assert found["openedByLink"] == ["B2"]
