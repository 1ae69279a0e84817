"""The terminal: no line too wide, nothing acts on the terminal, legible without color and in ASCII."""

from __future__ import annotations

import io
import math

import pytest
from rich.cells import cell_len
from rich.console import Console

from gramian.report import Layer, Report
from gramian.report.formatting import shorten
from gramian.report.terminal import DocumentView, LayersView, ReportView, show, to_text
from test_report_html import everything
from test_report_model import HOSTILE_NAMES, make_report, poison

NAMES = [
    "layers.{}.linear",
    "model.encoder.transformer.blocks.{}.self_attention.out_proj.base_layer.weight",
    "名前.{}.重み",
]


@pytest.mark.parametrize("width", [24, 40, 80, 100, 160])
@pytest.mark.parametrize("num_layers", [0, 1, 500])
@pytest.mark.parametrize("name", NAMES)
def test_no_line_is_wider_than_the_terminal(width: int, num_layers: int, name: str):
    report = make_report(num_layers, name)
    for item in (report, report.to_document()):
        for line in to_text(item, width).splitlines():
            assert cell_len(line) <= width, line


@pytest.mark.parametrize("name", HOSTILE_NAMES)
@pytest.mark.parametrize("width", [60, 160])
def test_names_cannot_act_on_the_terminal(name: str, width: int):
    for item in (poison(name), everything(name)):
        text = to_text(item, width)
        assert all(char == "\n" or char.isprintable() or char == "\u00a0" for char in text)
        assert all(cell_len(line) <= width for line in text.splitlines())


def test_markup_is_shown_as_it_is():
    assert "[red]x[/red]" in to_text(Report("[red]x[/red]", layers=[Layer("[bold]w", "Linear", (2, 2), 0)]))
    assert "[bold]w" in to_text(Report("t", layers=[Layer("[bold]w", "Linear", (2, 2), 0)]))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_plain_encodings_get_ascii(encoding: str):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)  # a pipe that knows no Unicode, and errors are strict
    for name in HOSTILE_NAMES:
        show(poison(name), Console(file=file, width=80))
    show(make_report(500, NAMES[1]), Console(file=file, width=80))
    show(everything(), Console(file=file, width=80))
    file.seek(0)
    text = file.read()
    assert text.isascii()
    assert "gain chi" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_no_color_where_none_is_wanted(monkeypatch):
    assert "\x1b" not in to_text(make_report(30))
    monkeypatch.setenv("NO_COLOR", "1")
    file = io.StringIO()
    show(make_report(30), Console(file=file, force_terminal=True, width=80))
    assert "\x1b[31m" not in file.getvalue()
    assert "\x1b[1;31m" not in file.getvalue()


def test_many_layers_show_the_telling_ones_and_say_how_many_are_hidden():
    report = make_report(500)
    layer = report.layers[321]
    report.layers[321] = Layer(layer.name, "Linear", (8, 8), 321, gain=math.nan)
    text = to_text(report)
    assert "476 of 500 layers (verbose shows all)" in text
    for name in ("layers.0.linear", "layers.321.linear", "layers.499.linear"):
        assert name in text
    everything_shown = to_text(report, verbose=True)
    assert "of 500 layers" not in everything_shown
    assert "layers.250.linear" in everything_shown


def test_a_wide_terminal_shows_more_columns():
    report = make_report(5)
    assert "column" in to_text(report, 60)
    assert "effective rank" in to_text(report, 160)
    assert "Hidden" not in to_text(report, 160)


def test_rich_and_str_show_the_report():
    report = make_report()
    console = Console(file=io.StringIO(), width=100)
    with console.capture() as capture:
        console.print(report)
    assert report.verdict in capture.get()
    assert report.verdict in str(report)
    assert repr(report) == f"<Report 'net': {report.verdict}>"


def test_the_pieces_print_alone():
    console = Console(file=io.StringIO(), width=80)
    for view in (ReportView(make_report(), True), LayersView(make_report()), DocumentView(everything(), True)):
        console.print(view)


def test_nothing_to_show():
    assert "no layers" in to_text(Report("empty"))


ALIKE = {
    "one letter apart": [f"encoder.layer.0.{word}.weight" for word in ("query", "quality", "quantity", "q", "queue")],
    "factors": [
        f"base.model.layers.{i}.attn.{k}_proj.lora_{x}.default.weight"
        for i in range(11)
        for k in ("q", "k", "query", "key")
        for x in "AB"
    ],
    "of different depth": [f"{'block.' * k}conv{j}.weight" for k in range(6) for j in range(4)],
    "without dots": [f"a_very_long_name_{k}_of_one_parameter_of_the_model" for k in range(30)],
    "other letters": [f"слой.{k}.вес" * 4 for k in range(12)],
    "like a number": ["a" * 30 + "x" * k for k in range(5)] + ["aaa~1", "aaa~2"],
}


@pytest.mark.parametrize("names", ALIKE.values(), ids=ALIKE)
@pytest.mark.parametrize("width", [6, 10, 18, 24, 40])
def test_names_that_are_shortened_stay_apart(names: list[str], width: int):
    short = shorten(names, width)
    assert len(set(short)) == len(names)
    assert all(len(text) <= width for text in short)


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_rows_of_a_table_stay_apart(columns: int):
    layers = [Layer(name, "Linear", (4, 4), depth, "float32") for depth, name in enumerate(ALIKE["factors"])]
    report = Report("net", layers=layers)
    lines = to_text(report, columns, verbose=True).splitlines()
    names = [line.split()[0] for line in lines if "4×4" in line]
    assert len(names) == len(set(names)) == len(report.layers)
