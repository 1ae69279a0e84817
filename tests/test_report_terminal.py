"""The terminal: no line too wide, nothing acts on the terminal, legible without color and in ASCII."""

from __future__ import annotations

import io
import math

import pytest
from rich.cells import cell_len
from rich.console import Console

from gramian.report import Document, Layer, Picture, Report, Section, Series
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


def test_what_goes_to_a_file_has_no_blanks_at_the_ends_of_lines():
    file = io.StringIO()
    show(make_report(), Console(file=file, width=100), verbose=True)
    lines = file.getvalue().splitlines()
    assert len(lines) > 20
    assert [line for line in lines if line != line.rstrip()] == []


def test_a_curve_of_few_points_is_told_point_by_point():
    few = Picture(
        "", [Series("planned", [10, 50, 90], [0.2, 0.7, 0.9]), Series("chosen", [50], [0.7])], x_label="kept, %"
    )
    lines = to_text(Document("t", "v", sections=[Section("s", items=[few])])).splitlines()
    rows = [line.split() for line in lines[-4:]]
    assert rows == [
        ["kept,", "%", "planned", "chosen"],
        ["90.0", "0.900", "–"],
        ["50.0", "0.700", "0.700"],
        ["10.0", "0.200", "–"],
    ]
    many = Picture("", [Series("loss", range(1, 100), range(1, 100))])
    assert "greatest" in to_text(Document("t", "v", sections=[Section("s", items=[many])]))


def test_nothing_to_show():
    assert "no layers" in to_text(Report("empty"))


def names_in(text: str, num: int) -> list[str]:
    """The first cell of each row of the table, which is the last thing in the text."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == ["layer"])
    return [line.split("  ")[0] for line in lines[start + 1 : start + 1 + num]]


ALIKE = {
    "initials": [f"model.{a}.{b}.weight" for a in ("attention", "adapter") for b in ("query", "quantizer")],
    "middles": [f"{'a' * 30}{k}{'b' * 40}" for k in range(12)],
    "wide": [f"層{'重' * 40}{k}{'み' * 40}" for k in range(12)],
    "ascii": ["wä.weight", "wa.weight"],
    "tags": ["model.attention.query_projection_of_it.weight #2", *(f"model.{a}.q{'x' * 30}.w" for a in ("at", "au"))],
}  # fmt: skip


@pytest.mark.parametrize("case", ALIKE)
@pytest.mark.parametrize("width", [24, 40, 80])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_two_rows_read_the_same(case: str, width: int, encoding: str):
    layers = [Layer(name, "Linear", (4, 4), i, condition=1e3) for i, name in enumerate(ALIKE[case])]
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    show(Report("t", layers=layers), Console(file=file, width=width))
    file.seek(0)
    text = file.read()
    names = names_in(text, len(layers))
    assert len(set(names)) == len(layers)
    assert all(cell_len(line) <= width for line in text.splitlines())


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_note_is_told_in_full_at_any_width(width: int):
    long = "dequantized from int4 (GPTQ), groups of 128 columns, symmetric"
    notes = [long, "", long, "tied to the embedding"]
    layers = [
        Layer(
            f"model.layers.{i}.q", "Linear", (4, 4), i, condition=1e3, spectral_norm=2.0, stable_rank=2.0,
            rank_90=(2, 2), rank_99=(3, 3), above_noise=1, noise_p_value=1e-9, gain=1.0, gradient_rms=1.0, note=note,
        )
        for i, note in enumerate(notes)
    ]  # fmt: skip
    text = to_text(Report("t", layers=layers), width)
    assert long in " ".join(text.split())
    assert "tied to the embedding" in " ".join(text.split())
    assert " ".join(text.split()).count(long) == 1
    rows = [line for line in text.splitlines() if line.startswith("model.layers")]
    assert [line.split()[-1] for line in rows][0::2] == ["1", "1"]
    assert rows[3].split()[-1] == "2"


def test_short_notes_stay_in_their_rows():
    layers = [Layer(f"l.{i}", "Linear", (4, 4), i, note="a note" if i else "") for i in range(3)]
    text = to_text(Report("t", layers=layers), 80)
    assert text.count("a note") == 2
    assert "note 1:" not in text


@pytest.mark.parametrize("columns", [50, 80, 132])
def test_a_printed_report_is_as_wide_as_the_terminal(monkeypatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    report = make_report(30, NAMES[0])
    lines = str(report).splitlines()
    assert max(map(cell_len, lines)) <= columns
    assert str(report) == to_text(report, width=columns)
