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
// Texts whose contrast with what is behind them is below WCAG's AA.
const channels = (color) => {
  const found = color.match(/[\\d.e-]+/g).map(Number);
  return color.startsWith("color(") ? found : found.map((value, place) => (place < 3 ? value / 255 : value));
};
const light = ([r, g, b]) => [r, g, b].map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, place) => sum + c * [0.2126, 0.7152, 0.0722][place], 0);
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const found = channels(getComputedStyle(at).backgroundColor);
    if (found.length < 4 || found[3] === 1) return found;
  }
  return [1, 1, 1];
};
const pale = (strict = 1) => {
  const bad = new Set();
  for (const element of document.querySelectorAll("body *")) {
    const texts = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!texts || !element.getClientRects().length || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const color = element instanceof SVGElement && element.namespaceURI.includes("svg") ? style.fill : style.color;
    if (color === "none") continue;
    const [a, b] = [light(channels(color)), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5) * strict) bad.add(`${element.textContent.slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return [...bad];
};
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
  const header = all("th span", table).find((s) => s.textContent === "input rms");
  header.click(); told.descending = names()[0];
  header.click(); told.ascending = names()[0];
  const filter = table.querySelector("input");
  filter.value = "layers.7.";
  filter.dispatchEvent(new Event("input"));
  told.filtered = names();
  const list = document.querySelector(".findings");
  const cards = () => all(".finding:not(.filtered)", list).map((card) => card.dataset.code);
  const words = list.querySelector("input");
  const wanted = (text) => { words.value = text; words.dispatchEvent(new Event("input")); return cards(); };
  told.byLayer = wanted("layers.41"); told.byCode = wanted("gradient-vanishes");
  told.counted = list.querySelector(".count").textContent;
  wanted("");
  list.querySelector("[data-severity=error]").click(); told.bySeverity = cards();
  list.querySelector("[data-severity=error]").click(); told.again2 = cards().length;
  list.querySelector("[data-fold='']").click(); told.open = all("details[open]", list).length;
  list.querySelector("[data-fold=open]").click();
  const heat = all("[data-box]").find((d) => d.offsetParent);
  const [full, left, top] = JSON.parse(heat.dataset.box);
  const area = heat.querySelector("svg").getBoundingClientRect();
  const by = area.width / full;
  const corner = { clientX: area.left + (left + 1) * by, clientY: area.top + (top + 1) * by };
  heat.dispatchEvent(new PointerEvent("pointermove", corner));
  told.heat = heat.querySelector(".tip").textContent;
  all("tr.opens")[0].click();
  told.pale = ["light", "dark"].map((theme) => { root.dataset.theme = theme; return pale(); });
  told.below10 = pale(10 / 4.5).length;
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
        Finding("rank-deficient", "warning", "Two matrices are alike", where="layers.40.linear, layers.41.linear"),
        Finding("dead-units", "warning", "Units are dead", where="layers.7.linear", evidence="12 of 64"),
        Finding("noise-only", "info", "Nothing was learned", where="layers.8.linear", evidence="p = 0.4"),
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
    assert told["pale"] == [[], []]
    assert told["below10"] > 10  # the faint texts, so that the measurement sees something
    assert (told["byLayer"], told["byCode"]) == (["rank-deficient"], ["parameter-scale-small"])
    assert told["counted"] == "1 of 4 findings"
    assert told["bySeverity"] == ["rank-deficient", "dead-units", "noise-only"]
    assert (told["again2"], told["open"]) == (4, 0)
    assert told["heat"].startswith("layers.0.linear")
    assert told["whole"] == told["again"] == "-0.5 0 60 1"
    assert told["last"].startswith("layers.59. signal")
    assert told["second"].startswith("layers.1. ")
    assert told["zoomed"] == "-0.5 0 30 1"
    assert told["shown"] == "Shown: 30 of 60, layers.0 … layers.29"
    drawn = (
        360 if width < 500 else 960
    )  # the middle of the drawing, less the labels on its left and the room on its right
    assert told["tip"].startswith(f"layers.{int((drawn / 2 - 52) / (drawn - 64) * 60)}")
    assert (told["descending"], told["ascending"]) == ("layers.0.linear", "layers.59.linear")
    assert told["filtered"] == ["layers.7.linear"]
