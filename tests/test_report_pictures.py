"""Drawings: what cannot be drawn is left out and counted, labels hide nothing, noise does not look like structure."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gramian as gm
from gramian.errors import InputError
from gramian.report import Depth, Document, HeatMap, Lane, Picture, Section, Series
from gramian.report.axes import make_axis, spread
from gramian.report.canvas import drawing_settings
from gramian.report.depth import draw_depth
from gramian.report.heatmaps import draw_heat_map, shared_scale
from gramian.report.pictures import Drawn, draw_picture

STYLES = ("line", "points", "dashed", "bars", "area")


def draw(picture: Picture | HeatMap, width: float = 960) -> Drawn:
    with drawing_settings():
        if isinstance(picture, HeatMap):
            return draw_heat_map(picture, "p-", None, width)
        return draw_picture(picture, "p-", width)


def texts(drawn: Drawn) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", drawn.svg)


@pytest.mark.parametrize("style", STYLES)
def test_what_an_axis_cannot_show_is_left_out_and_counted(style):
    values = [1.0, math.nan, math.inf, 0.0, -1.0, 1e-300, 1e300]
    drawn = draw(Picture("p", [Series("s", range(7), values, "auto", style)], log_y=True))
    assert drawn.notes == ["4 values left out: 2 not finite, 2 not positive, on a logarithmic scale."]
    assert "nan" not in drawn.svg.lower()
    assert draw(Picture("p", [Series("s", [1], [1.0], "auto", style)])).notes == []


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("values", [[], [math.nan], [0.0], [1.0], [1e-45, 1e-45], [5e-324, 1.0], [-1e308, 1e308]])
def test_every_size_of_number_can_be_drawn(values, style, log):
    draw(Picture("p", [Series("s", range(len(values)), values, "auto", style)], log_y=log, reference=(1.0, "one")))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(width=64), max_size=6), st.booleans(), st.integers(3, 12))
def test_ticks_lie_within_the_axis_and_are_few(values, log, num_ticks):
    shown = [v for v in values if math.isfinite(v) and abs(v) < 1e300 and (v > 0 or not log)]
    axis = make_axis(shown, log=log, num_ticks=num_ticks, margin=0.05)
    slack = 1e-6 * (axis.high - axis.low)
    assert axis.low < axis.high
    assert all(axis.low - slack <= tick <= axis.high + slack for tick in axis.ticks)
    assert len(axis.ticks) == len(axis.labels) <= max(num_ticks, 6) + 2
    assert len(set(axis.labels)) == len(axis.labels)
    assert all(0 <= axis.fraction(v) <= 1 for v in shown)


@given(st.lists(st.floats(0, 100), max_size=6))
def test_labels_are_moved_apart_in_order(wanted):
    places = spread(wanted, 15.0, 0.0, 100.0)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    gaps = [places[b] - places[a] for a, b in pairwise(order)]
    assert all(gap >= 15.0 - 1e-9 for gap in gaps)
    assert all(-1e-9 <= place <= 100 + 1e-9 for place in places)


def test_many_curves_get_a_legend_outside_and_few_their_labels():
    few = draw(Picture("p", [Series(f"s{i}", [0, 1], [0, i * 10]) for i in range(3)]))
    assert few.legend == []
    assert {"s0", "s1", "s2"} <= set(texts(few))
    many = draw(Picture("p", [Series(f"s{i}", [0, 1], [0, i]) for i in range(40)]))
    assert [label for label, _, _ in many.legend] == [f"s{i}" for i in range(40)]
    early = draw(Picture("p", [Series("a", [0, 1], [0, 1]), Series("b", [0, 10], [0, 5])]))
    assert len(early.legend) == 2  # the first ends far from the right side, a label there would stand on the curve


def test_roles_keep_their_colors_and_no_two_curves_share_one():
    roles = ["before", "after", "accent", "auto", "auto", "auto"]
    drawn = draw(Picture("p", [Series(str(i), [0], [i], role, "points") for i, role in enumerate(roles)]))  # type: ignore[arg-type]
    colors = [color for _, color, _ in drawn.legend]
    assert colors[:3] == ["var(--c-before)", "var(--c-after)", "var(--c-accent)"]
    assert not {"var(--c-series-1)", "var(--c-series-2)", "var(--c-series-5)"} & set(colors)
    assert len(set(colors)) == 6


def test_rounding_noise_is_not_drawn_as_structure():
    values = 1 + 1e-9 * np.random.default_rng(0).normal(size=50)
    axis = make_axis(values.tolist())
    assert axis.high - axis.low > 0.05
    scale = shared_scale([HeatMap("h", [values.tolist()], log=True)])
    assert scale.high - scale.low > 0.05


def test_names_along_the_axis_lose_what_they_share():
    names = [f"encoder.{i}.query.weight" for i in range(3)]
    shown = texts(draw(Picture("p", [Series("rank", range(3), [3, 2, 1], "auto", "bars")], x_names=names)))
    assert {"0", "1", "2", "encoder.*.query.weight"} <= set(shown)


def test_heat_maps_may_be_ragged_and_broken():
    drawn = draw(HeatMap("h", [[1.0, 2.0, 3.0], [], [math.nan, -1.0], [5.0]], log=True))
    assert drawn.notes == ["2 values left out: 1 not finite, 1 not positive, on a logarithmic scale."]
    assert drawn.svg.count("<image") == 2
    for values in ([], [[]], [[math.nan]], [[0.0]]):
        for log in (False, True):
            draw(HeatMap("h", values, log=log))


def test_heat_maps_that_stand_together_share_a_scale():
    low, high = HeatMap("a", [[0.1, 1.0]], log=True), HeatMap("b", [[1.0, 100.0]], log=True)
    scale = shared_scale([low, high])
    assert (round(scale.low, 6), round(scale.high, 6)) == (-1, 2)


def test_a_tiny_value_does_not_wash_out_a_heat_map_and_is_noted():
    drawn = draw(HeatMap("h", [[1.0, 0.5, 1e-30]], log=True))
    assert drawn.notes == ["1 value is below 1e-10 and drawn in the lowest color."]


def test_large_heat_maps_are_thinned_and_say_so():
    drawn = draw(HeatMap("h", np.ones((30, 5000)).tolist()))
    assert drawn.notes == ["30 of 30 rows and 512 of 5,000 columns drawn, evenly spaced."]
    assert len(drawn.svg) < 200_000


def test_a_thousand_layers_keep_the_picture_light():
    series = [Series("g", range(1000), (10.0 ** np.linspace(-45, 0, 1000)).tolist())]
    assert len(draw(Picture("p", series, log_y=True)).svg) < 100_000


def test_a_series_of_unequal_lengths_is_refused():
    with pytest.raises(InputError, match="2 x and 1 y"):
        draw(Picture("p", [Series("s", [1, 2], [1])]))


def test_pictures_are_given_as_figures_with_their_values(tmp_path):
    lane = Lane("gain", [("before", "before", [1.0, None, 0.0]), ("after", "after", [2.0, 2.0, 2.0])], reference=1.0)
    depth = Depth("by depth", ["a", "b", "c"], [lane, lane], culprits=[1])
    styles = [Series(style, [1, 2], [3, 4], "auto", style) for style in STYLES]
    picture = Picture("curves", styles, "x", "y", reference=(2.0, "ours"), log_y=True)
    pair = (HeatMap("colors", [[1, 2], [0]], log=True), HeatMap("colors", [[1.0]]))
    figures = Document("d", "v", sections=[Section("s", items=[depth, picture, pair, []])]).figures()
    assert list(figures) == ["by depth", "curves", "colors", "colors (2)"]
    top = figures["by depth"].axes[0]
    np.testing.assert_array_equal(top.lines[0].get_xydata(), [[0, 1], [2, 0]])
    assert top.get_yscale() == "log"
    assert figures["curves"].axes[0].get_legend_handles_labels()[1] == [
        "line",
        "points",
        "dashed",
        "area",
        "ours",
        "bars",
    ]
    assert figures["colors"].axes[0].images[0].get_array().count() == 2
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png", dpi=20)
    named = [label.get_text() for label in figures["by depth"].axes[-1].get_xticklabels()]
    assert [name for name in named if name] == ["a", "b", "c"]


@pytest.mark.parametrize("place", [0, 12, 13, 25])
def test_a_marked_places_name_fits_beside_its_place(place):
    """At a phone's width, whatever its length, with its end; that there are more is left out where there is no room."""
    names = [f"blocks.{number}.attention.qkv.weight" for number in range(26)]
    lane = Lane("gain", [("", "accent", [1.0] * 26)])
    svg = draw_depth(Depth("d", names, [lane], [place, *range(14, 17)]), 336)
    x, anchor, text = re.search(r'class="pointer".*?x="([\d.]+)".*?text-anchor="(\w+)".*?>([^<]*)<', svg).groups()
    room = 336 - float(x) if anchor == "start" else float(x)
    assert 8 * len(text) <= room
    assert text.strip(" ▼").endswith("weight and 3 more" if place in (0, 25) else "kv.weight")


def test_runs_and_plans_have_figures():
    run = gm.training.Run(
        nn.Linear(2, 2), [{"step": 1, "seconds": 0.1, "loss": 1.0}, {"step": 2, "seconds": 0.2, "loss": 0.5}]
    )
    [curve] = run.figures().values()
    np.testing.assert_array_equal(curve.axes[0].lines[0].get_xydata(), [[1, 1], [2, 0.5]])
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    batches = [(torch.randn(32, 4), torch.randint(3, (32,)))]
    objective = gm.Objective.classification()
    for plan in (gm.compress(model, batches, objective, keep=0.7), gm.narrow(model, batches, objective, keep=0.7)):
        figure = plan.figures()["Share kept"]
        shares = [bar.get_height() for bar in figure.axes[0].patches]
        rows = [row for row in plan.explain() if row["kept"] is not None]
        assert len(shares) == len(rows)
        assert min(shares) < 1
