"""The page: nothing unescaped, nothing loaded, well formed, the same for the same document."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

import pytest

from gramian.errors import InputError
from gramian.report import (
    Action,
    Depth,
    Document,
    Finding,
    HeatMap,
    Lane,
    Picture,
    Place,
    Report,
    Role,
    Section,
    Series,
    Table,
    Tile,
)
from gramian.report.compose import compare
from gramian.report.html import render
from test_report_model import HOSTILE_NAMES, TIE, make_report, poison

VOID = {"meta", "input", "br", "img", "link", "hr", "wbr"}


class Page(HTMLParser):
    """Parses strictly: every tag is closed where it must be, and attributes and scripts are kept."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.tags if name in attributes]


def everything(name: str = "name") -> Document:
    """Return a document that holds every kind of item, with the name in every text."""
    looks: list[tuple[Any, Role]] = [
        ("line", "before"),
        ("dashed", "after"),
        ("points", "auto"),
        ("bars", "muted"),
        ("area", "auto"),
    ]
    series = [Series(f"{name} {style}", [1, 2, 3], [1.0, math.nan, 2.0], role, style) for style, role in looks]
    items = [
        Picture(name, series, name, name, caption=name, reference=(1.5, name)),
        Picture(name, series[:2], name, name, log_x=True, log_y=True, reference=(1.5, name), x_names=[name] * 4),
        (HeatMap(name, [[1.0, 2.0], [3.0]], name, name, True, name, name), HeatMap(name, [[5.0]])),
        Depth(name, [name, "b"], [Lane(name, [(name, "accent", [1.0, 2.0])])], [0], [1], name),
        Table(name, [name, "number"], [[name, 1.0], [name, None]], name, [0]),
        [Finding(name, "error", name, name, name, name, Action("tie", TIE | {"module": name}), name, name)],
    ]
    return Document(
        name, name, "bad", [Tile(name, name, name, "accent")], [Section(name, f"{name}\n- {name}", items)], name
    )


@cache
def harmless_page(make: Callable[[str], Document]) -> Page:
    return Page(render(make("name")))


@pytest.mark.parametrize("name", HOSTILE_NAMES)
@pytest.mark.parametrize("make", [everything, lambda name: poison(name).to_document()], ids=["document", "report"])
def test_names_are_text_wherever_they_stand(name: str, make):
    html = render(make(name))
    harmless, page = harmless_page(make), Page(html)

    # The same elements with the same attributes, hence no element and no handler came from the name. Pictures may
    # differ in their marks where a long name leaves less room, and cells in whether they may break.
    def outline(parsed: Page) -> list[tuple[str, list[str]]]:
        active = ("script", "style", "img", "iframe", "a", "link", "meta", "details", "td", "button")
        kept = [(tag, [a for a in attributes if (tag, a) != ("td", "class")]) for tag, attributes in parsed.tags]
        return [(tag, sorted(attributes)) for tag, attributes in kept if tag in active]

    assert outline(page) == outline(harmless)
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in harmless.tags} | {"ul", "li", "g", "text", "wbr"}
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert page.scripts == harmless.scripts
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", html)
    html.encode("utf-8")


def test_a_name_is_shown_as_it_is():
    name = "<b>$x$ & 'y' [red]</b>"
    text = " ".join(Page(render(poison(name).to_document())).words)
    assert name in text
    assert name in " ".join(Page(render(everything(name))).words)


def test_the_page_loads_nothing():
    html = render(everything())
    page = Page(html)
    for value in page.attributes("src") + page.attributes("href") + page.attributes("xlink:href"):
        assert value.startswith(("data:image/png;base64,", "#"))
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}


def test_only_the_pages_own_script_may_run():
    page = Page(render(everything()))
    assert len(page.scripts) == 1
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_ids_are_unique_and_references_meet_them():
    html = render(everything())
    page = Page(html)
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    used = [value[1:] for value in page.attributes("href") if value.startswith("#")]
    used += re.findall(r"url\(#([^)]*)\)", html)
    assert set(used) <= set(ids)


def test_colors_are_the_pages_variables():
    html = render(everything())
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, re.S))
    assert not re.findall(r"(?:fill|stroke): #[0-9a-f]+", drawn)
    css = files("gramian.report").joinpath("page.css").read_text()
    assert set(re.findall(r"var\((--c-[\w-]+)\)", html)) <= set(re.findall(r"(--c-[\w-]+):", css))


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_texts_stand_out_from_the_page_in_both_themes():
    css = files("gramian.report").joinpath("page.css").read_text()
    colors = dict(re.findall(r"--c-([\w-]+): light-dark\((#\w{6}, #\w{6})\)", css))
    both = {name: pair.split(", ") for name, pair in colors.items()}
    for name, pair in both.items():
        if name in ("paper", "surface", "grid", "axis", "line", "muted"):  # never the color of a text
            continue
        for theme in (0, 1):
            for ground in ("paper", "surface"):
                a, b = sorted((luminance(pair[theme]), luminance(both[ground][theme])))
                assert (b + 0.05) / (a + 0.05) >= 4.5, (name, theme, ground)  # WCAG 2.2, criterion 1.4.3


def test_the_same_document_gives_the_same_bytes():
    assert render(everything()) == render(everything())
    assert render(make_report().to_document()) == render(make_report().to_document())


@pytest.mark.parametrize("num_layers", [0, 1, 2])
def test_few_layers(num_layers: int):
    Page(render(make_report(num_layers).to_document()))


def test_empty_documents():
    Page(render(Document("", "")))
    Page(render(Report("empty").to_document()))
    Page(
        render(
            Document(
                "t", "v", sections=[Section("s", "", [[], (), Table("t", [], []), Picture("p", []), HeatMap("h", [])])]
            )
        )
    )


def test_five_hundred_layers():
    # 0.4 s and 0.5 MB on one core of a shared machine; the bound to keep is 3 s.
    html = render(make_report(500, width=64).to_document())
    assert html.count("<tr") == 501
    assert len(html) < 2e6


def test_a_report_of_unknown_and_broken_numbers():
    report = make_report(4)
    for value in (math.nan, math.inf, 0.0, None):
        layers = [
            type(layer)(layer.name, "Linear", (2, 2), layer.depth, singular_values=(value or 0.0,) * 2, gain=value,
                        activation_rms=value, gradient_rms=value)
            for layer in report.layers
        ]  # fmt: skip
        Page(render(Report("t", [], layers, {"x": math.nan}, (math.nan, math.inf)).to_document()))


def test_before_and_after_stand_side_by_side_on_one_scale():
    sections = compare(make_report(5), make_report(5), ("old", "new"))
    assert [s.heading for s in sections] == [
        "The network by depth", "Findings old", "Findings new", "Weight spectra", "End-to-end Jacobian",
    ]  # fmt: skip
    Page(render(Document("t", "v", sections=sections)))
    overlaid = sections[0].items[0]
    assert isinstance(overlaid, Depth)
    assert [lane.label.split()[0] for lane in overlaid.lanes] == ["signal,", "gradient", "gain"]
    for lane in overlaid.lanes:
        assert [(label, role) for label, role, _ in lane.series] == [("old", "before"), ("new", "after")]


def marked() -> Report:
    """A cause with two consequences, in a network of six modules; the second module has several parameters."""
    report = make_report(0)
    report.depth = [Place(f"net.{i}", "Linear", 1.0, 0.5, 0.0 if i < 2 else 1.0, 1.0) for i in range(6)]
    report.findings = [
        Finding("vanishes", "info", "All of it vanishes", where="net.3.weight … net.5.weight", follows="small"),
        Finding("dead", "warning", "Some are dead", where="net.0"),
        Finding("small", "error", "One is small", where="net.1.weight[q] and 2 more"),
        Finding("flat", "info", "Nothing arrives", where="all layers", evidence="it is 0", follows="small"),
    ]
    return report


def test_the_first_finding_is_marked_in_the_picture_and_what_follows_is_fainter():
    sections = marked().to_document().sections
    assert [s.heading for s in sections[:2]] == ["The network by depth", "Findings"]
    picture = sections[0].items[0]
    assert isinstance(picture, Depth)
    assert (picture.culprits, picture.consequences) == ([1], [3, 4, 5])
    assert "Marked: One is small. Fainter: what follows from it." in picture.caption
    assert "mark at the lower edge is a zero" in picture.caption
    html = render(marked().to_document())
    assert html.count('<g class="culprit"><rect x="0.5" y="0" width="1"') == 2  # wide and narrow
    assert html.count('<g class="consequence"><rect x="2.5" y="0" width="3"') == 2


@pytest.mark.parametrize(
    ("where", "told"), [("data", "about the data, before the first place"), ("all layers", "about all of it")]
)
def test_a_cause_without_a_place_is_told(where: str, told: str):
    report = marked()
    report.findings[2] = Finding("small", "error", "One is small", where=where)
    picture = report.to_document().sections[0].items[0]
    assert isinstance(picture, Depth)
    assert not picture.culprits
    assert told in picture.caption


def test_one_cause_has_one_card_with_what_follows_in_it():
    page = render(marked().to_document())
    cards = re.findall(r'class="finding \w+" data-code="([^"]+)"', page)
    assert cards == ["small", "dead"]
    card = page[page.index('data-code="small"') : page.index('data-code="dead"')]
    assert re.findall(r'<li data-code="([^"]+)"', card) == ["vanishes", "flat"]
    lonely = Report("t", [Finding("a", "info", "A", follows="gone")])  # its cause is not in the report
    assert 'data-code="a"' in render(lonely.to_document())


def test_comparing_with_nothing_measured_leaves_out():
    assert [s.heading for s in compare(Report("a"), Report("b"))] == ["Findings before", "Findings after"]


def test_a_ragged_table_is_refused():
    with pytest.raises(InputError, match="one cell per column"):
        render(Document("t", "v", sections=[Section("s", "", [Table("t", ["a", "b"], [[1]])])]))


def test_code_keeps_its_lines():
    finding = Finding("c", "error", "t", action=Action("compress", {"keep": 0.5}), advice="a = 1\n  b = 50 % 7")
    page = Page(render(Document("t", "v", sections=[Section("s", "", [[finding]])])))
    assert "a = 1\n  b = 50 % 7" in page.words
    assert finding.action is not None
    assert finding.action.code.count("\n") == 1
    assert finding.action.code in page.words


def test_a_notebook_shows_the_page_in_a_frame():
    shown = Page(make_report()._repr_html_())
    assert [tag for tag, _ in shown.tags] == ["iframe"]
    Page(shown.tags[0][1]["srcdoc"])


def test_a_rows_detail_is_in_the_page_and_escaped():
    report = poison("</script><b>\x1b[2J")
    page = Page(render(report.to_document()))
    details = json.loads(page.attributes("data-details")[0])
    assert len(details) == len(report.layers)
    assert "\\x1b" in details[0]["title"]
    assert details[1]["points"]


def test_500_blocks_stay_light():
    html = render(make_report(500, width=2048).to_document())
    assert len(html) < 6e6
    assert calls_to_render(200) < 12 * calls_to_render(20), "the work grows faster than the number of blocks"


def calls_to_render(num_blocks: int) -> int:
    """Python calls, which unlike seconds do not depend on what else the machine does."""
    document, count = make_report(num_blocks, width=64).to_document(), 0

    def hook(frame, event, argument) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(hook)
    try:
        render(document)
    finally:
        sys.setprofile(before)
    return count
