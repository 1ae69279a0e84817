"""The page in a browser, where there is one: nothing overflows, the depth zooms, the table sorts, the keys walk.

Headless Chromium opens the file as a person does. The test's script runs in a copy without the page's policy, which
lets no other script run.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from gramian.report import Finding, Place, Report
from gramian.report.html import render
from test_report_model import make_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]

ASK = """
addEventListener("load", () => {
  const told = {};
  const all = (what, of = document) => [...of.querySelectorAll(what)];
  const figure = document.querySelector("figure.depth");
  const drawing = all(".drawing", figure).find((d) => d.offsetParent);
  const here = figure.querySelector(".here");
  const press = (key) => drawing.dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true }));
  const view = () => drawing.querySelector(".lane").getAttribute("viewBox");
  const root = document.documentElement;
  told.overflow = root.scrollWidth - root.clientWidth;
  const texts = all(".verdict, .finding .what, .tile, .caption, .omitted");
  told.cut = texts.filter((e) => e.scrollWidth > e.clientWidth + 1 && e.clientWidth).length;
  told.whole = view();
  press("End"); told.last = here.textContent;
  press("Home"); press("ArrowRight"); told.second = here.textContent;
  press("+"); told.zoomed = view(); told.shown = here.textContent;
  press("Escape"); told.again = view();
  const box = drawing.querySelector("svg").getBoundingClientRect();
  const middle = { clientX: box.left + box.width / 2, clientY: box.top + 40 };
  drawing.dispatchEvent(new PointerEvent("pointermove", middle));
  told.tip = drawing.querySelector(".tip").textContent;
  const table = all("figure.table").pop();
  const names = () => all("tbody tr:not(.filtered)", table).map((row) => row.cells[0].textContent);
  const header = all("th span", table).find((s) => s.textContent === "activation");
  header.click(); told.descending = names()[0];
  header.click(); told.ascending = names()[0];
  const filter = table.querySelector("input");
  filter.value = "layers.7.";
  filter.dispatchEvent(new Event("input"));
  told.filtered = names();
  const controls = all("button, input, [role=img], [role=group], [role=region]");
  told.unnamed = controls.filter((e) => !(e.ariaLabel || e.textContent.trim() || e.closest("label"))).length;
  const out = document.createElement("pre");
  out.id = "told";
  out.textContent = JSON.stringify(told);
  document.body.append(out);
});
"""

# A window has a least width, a frame has none; its page tells its result by the title of the outer one.
FRAME = """<iframe src="page.html" style="width:{}px;height:900px;border:0"></iframe><script>
addEventListener("load", () => {{
  document.title = document.querySelector("iframe").contentDocument.getElementById("told").textContent;
}});
</script><title></title>"""


def report() -> Report:
    found = make_report(60)
    found.depth = [Place(f"layers.{i}", "Linear", 0.7**i, 0.9**i, 0.7 ** (60 - i), 0.5) for i in range(60)]
    found.findings = [
        Finding("parameter-scale-small", "error", "One layer is small " * 4, where="layers.30.linear", evidence="1e-4"),
        Finding("gradient-vanishes", "info", "The gradient vanishes", follows="parameter-scale-small"),
    ]  # fmt: skip
    found.not_looked_at = {"optimizer's steps": "no optimizer was given"}
    return found


def asked(folder: Path, width: int) -> dict[str, Any]:
    html = re.sub(r"<meta http-equiv[^>]*>", "", render(report().to_document()))
    (folder / "page.html").write_text(html.replace("</body>", f"<script>{ASK}</script></body>"))
    (folder / "frame.html").write_text(FRAME.format(width))
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"]
    command += [f"--window-size={max(width, 500)},1000", f"--user-data-dir={folder / 'profile'}"]
    command += ["--allow-file-access-from-files", "--disable-web-security", "--dump-dom"]
    target = folder / ("page.html" if width >= 500 else "frame.html")
    dom = subprocess.run([*command, target.as_uri()], capture_output=True, text=True, timeout=60).stdout
    pattern = r'<pre id="told">(.*?)</pre>' if width >= 500 else r"<title>(.*?)</title>"
    return json.loads(unescape(re.findall(pattern, dom, re.S)[-1]))


@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_works(tmp_path: Path, width: int) -> None:
    told = asked(tmp_path, width)
    assert (told["overflow"], told["cut"], told["unnamed"]) == (0, 0, 0)
    assert told["whole"] == told["again"] == "-0.5 0 60 1"
    assert told["last"].startswith("59: layers.59. signal")
    assert told["second"].startswith("1: layers.1. ")
    assert told["zoomed"] == "-0.5 0 30 1"
    assert told["shown"] == "Shown: 0 to 29 of 60, layers.0 … layers.29"
    drawn = (
        360 if width < 500 else 960
    )  # the middle of the drawing, less the labels on its left and the room on its right
    assert told["tip"].startswith(f"{int((drawn / 2 - 52) / (drawn - 64) * 60)}: layers.")
    assert (told["descending"], told["ascending"]) == ("layers.0.linear", "layers.59.linear")
    assert told["filtered"] == ["layers.7.linear"]
