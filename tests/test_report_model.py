"""Reports as data: verdict, JSON round trip, files whole or absent; and the samples of the other report tests."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from gramian.errors import InputError, UnsupportedError
from gramian.report import Action, Finding, Layer, Report, check_target

HOSTILE = "<script>alert(1)</script>"
# What a checkpoint may hold as a name, and what must never come out of it as it is.
HOSTILE_NAMES = [
    HOSTILE,
    "</script><script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "\"' onmouseover='alert(1)",
    "]]><!--",
    "{{ 7*7 }}{% raw %}",
    "[red]bold[/red] [link=file:///x]y[/link]",
    "$\\frac{1}{2}$ &amp; &lt;b&gt;",
    "\x1b[2J\x1b]0;title\x07",
    "\u202egnp.exe",
    "lone \ud800 surrogate\x00",
    "名前.重み",
    "a" * 400,
]


TIE = {"module": "encoder", "attribute": "weight", "source": "decoder.weight"}


def make_report(num_layers: int = 3, name: str = "layers.{}.linear", width: int = 8) -> Report:
    """Return a vanishing network: every number known, one finding of each severity."""
    generator = np.random.default_rng(0)
    layers = [
        Layer(
            name=name.replace("{}", str(depth)),
            kind="Linear",
            shape=(width, width),
            depth=depth,
            dtype="float32",
            parameters=width * width,
            singular_values=tuple(sorted(generator.uniform(0.1, 2, width), reverse=True)),
            frobenius_norm=4.0,
            spectral_norm=2.0,
            condition=20.0 + depth,
            stable_rank=3.5,
            effective_rank=5.5,
            numerical_rank=width,
            gain=0.5,
            activation_rms=0.7**depth,
            gradient_rms=0.7 ** (num_layers - depth),
        )
        for depth in range(num_layers)
    ]
    first = layers[0].name if layers else ""
    findings = [
        Finding("remark", "info", "A remark"),
        Finding("dead-units", "warning", "Dead units", where=first),
        Finding(
            "gain-below-one",
            "error",
            "Gradients vanish",
            first,
            "χ = 0.50 ± 0.01",
            "The gain.",
            Action("isometric_"),
            "On a fresh model.",
            "Paper",
        ),
    ]
    return Report(
        "net", findings, layers, {"samples": 512, "loss": 2.3, "mode": "evaluation"}, (2.0, 1.0, 0.5), ["A note."]
    )


def poison(name: str) -> Report:
    """Return a report that holds the name in every text."""
    report = make_report(4, name + "{}")
    finding = Finding(name, "error", name, name, name, name, Action("tie", TIE | {"module": name}), name, name)
    report.layers[0] = Layer(name, name, (2, 2), 0, name, note=name)
    return Report(name, [finding], report.layers, {name: name, "loss": 1.0}, (1.0,), [name])


def test_verdict_counts_errors_and_warnings_and_names_the_worst():
    report = make_report(100)
    assert report.status == "bad"
    assert report.verdict == "1 error, 1 warning: Gradients vanish."
    report.findings = report.findings[:2]
    assert (report.status, report.verdict) == ("warning", "1 warning: Dead units.")
    report.findings = report.findings[:1]
    assert (report.status, report.verdict) == ("good", "No trouble found in 100 layers; 1 remark: a remark.")
    assert "no layers" in Report("empty").verdict


@pytest.mark.parametrize("num_layers", [0, 1, 100])
def test_json_round_trip(num_layers: int):
    report = make_report(num_layers)
    again = Report.from_json(report.to_json())
    assert again.layers == report.layers
    assert again.findings == report.findings
    assert (again.title, again.facts, again.jacobian, again.notes) == (
        report.title,
        report.facts,
        report.jacobian,
        report.notes,
    )


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_json_keeps_every_name(name: str):
    assert Report.from_json(poison(name).to_json()).layers[0].name == name


def test_json_is_strict_where_numbers_are_not_finite():
    layer = Layer("a", "Linear", (2, 2), 0, singular_values=(math.inf, math.nan), gain=math.nan, condition=math.inf)
    text = Report("t", [], [layer], {"loss": math.nan}, (math.inf, 1.0)).to_json()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = json.loads(text, parse_constant=refuse)
    assert data["gramian"] == 1
    assert data["layers"][0]["gain"] is None
    assert data["jacobian"] == [None, 1.0]
    again = Report.from_json(text)
    assert again.layers[0].gain is None
    assert math.isnan(again.jacobian[0])


def test_json_takes_numbers_of_numpy():
    layer = Layer("a", "Linear", (np.int64(2), 2), 0, gain=np.float32(0.5), numerical_rank=np.int32(2))  # type: ignore[arg-type]
    assert json.loads(Report("t", layers=[layer]).to_json())["layers"][0]["shape"] == [2, 2]


def test_json_of_a_later_version_may_hold_more():
    data = make_report().to_dict()
    data["later"] = data["layers"][0]["later"] = {"x": 1}
    assert len(Report.from_json(json.dumps(data)).layers) == 3
    data["gramian"] = 2
    with pytest.raises(InputError, match="Upgrade gramian"):
        Report.from_json(json.dumps(data))


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", "nul", '{"gramian": 1, "kind": "report"}'),
        '{"gramian":1,"kind":"report","title":"t","layers":[{}]}',
        '{"gramian":1,"kind":"report","title":"t","layers":3}',
        '{"gramian":1,"kind":"report","title":"t","facts":3}',
        '{"gramian":1,"kind":"report","title":"t","findings":[{"code":"","title":"","severity":"loud"}]}',
    ],
)
def test_what_is_not_a_report_is_refused_in_one_line(text: str):
    with pytest.raises(InputError) as error:
        Report.from_json(text)
    assert "\n" not in str(error.value)


def test_save_picks_the_format_by_suffix(tmp_path):
    report = make_report()
    report.save(tmp_path / "r.html")
    report.save(str(tmp_path / "r.JSON"))
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert Report.from_json((tmp_path / "r.JSON").read_text()).layers == report.layers
    for name in ("r.pdf", "r", ".html"):
        with pytest.raises(InputError, match=r"ends in \.html or \.json"):
            report.save(tmp_path / name)


def test_save_says_why_it_cannot_write(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        make_report().save(tmp_path / "missing" / "r.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match="not a regular file"):
        make_report().save(tmp_path / "folder.json")


def test_a_write_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    path.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="No space left on device"):
        make_report().save(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["r.json"]  # nor is anything left lying


def test_a_write_goes_through_a_link(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    make_report().save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() != "old"


def test_dataframe_without_pandas_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UnsupportedError, match="pip install pandas"):
        make_report().to_dataframe()


def test_dataframe_has_one_row_per_layer():
    pytest.importorskip("pandas")
    frame = make_report(5).to_dataframe()
    assert list(frame.index) == [f"layers.{depth}.linear" for depth in range(5)]
    assert frame["gain"].tolist() == [0.5] * 5


def run(code: str) -> str:
    """Return what the code prints in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_reports_loads_nothing_that_draws_or_trains():
    heavy = "matplotlib", "jinja2", "rich", "numpy", "torch"
    assert run(f"import sys, gramian.report; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_drawing_needs_no_torch_and_leaves_matplotlib_alone():
    # Reading the setting of the backend would itself load pyplot: keys, not items.
    code = """
import sys, matplotlib
settings = lambda: {k: matplotlib.rcParams[k] for k in matplotlib.rcParams.keys() if not k.startswith("backend")}
before = settings()
from gramian.report import Document, HeatMap, Picture, Section, Series, render
items = [Picture("p", [Series("a", [0, 1], [1, 2])]), HeatMap("h", [[1.0, 2.0]])]
render(Document("t", "v", sections=[Section("s", "", items)]))
print("torch" in sys.modules, "matplotlib.pyplot" in sys.modules, settings() == before)
"""
    assert run(code) == "False False True"


def test_a_report_may_lie_in_or_beside_a_folder_that_is_made_before_it(tmp_path):
    out = tmp_path / "runs" / "a"
    for place in (tmp_path / "runs" / "a.html", out / "a.html", tmp_path / "a.html"):
        check_target(place, made=out)
    for made in (out, None):
        with pytest.raises(InputError, match="does not exist"):
            check_target(tmp_path / "elsewhere" / "a.html", made=made)
