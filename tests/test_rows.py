"""Tables print as tables, show as tables in a notebook, and stay lists; what holds tensors has a short repr."""

from __future__ import annotations

import pandas
import pytest
import torch
from torch import nn

import gramian as gm
from gramian.rows import LEAST, SHOWN, Rows
from gramian.training.task import Run


def test_rows_stay_a_list_and_align() -> None:
    rows = Rows([{"name": "a", "n": 1, "share": 0.5}, {"name": "bcd", "n": 1200, "share": None}])
    assert rows == [{"name": "a", "n": 1, "share": 0.5}, {"name": "bcd", "n": 1200, "share": None}]
    assert repr(rows).splitlines() == ["name      n  share", "a         1    0.5", "bcd   1,200"]
    assert list(pandas.DataFrame(rows).columns) == ["name", "n", "share"]
    assert repr(Rows()) == "no rows"
    assert "no rows" in Rows()._repr_html_()


def test_a_long_table_is_cut_in_the_middle_and_says_so() -> None:
    rows = Rows({"i": i} for i in range(1000))
    lines = repr(rows).splitlines()
    assert len(lines) == SHOWN + 2
    assert lines[1].strip() == "0"
    assert lines[-1].strip() == "999"
    assert "… 960 more; a loop over it has them all" in lines
    assert rows._repr_html_().count("<tr>") == SHOWN + 2


def test_a_name_is_never_cut_and_a_page_cuts_nothing() -> None:
    name, reason = "model.layers.17." * 5, "why it is so, at length " * 4
    rows = Rows([{"name": name, "reason": reason}])
    assert name in repr(rows)
    lines = repr(rows).splitlines()
    assert " ".join(line.removeprefix(name).strip() for line in lines[1:]) == reason.strip()  # it goes on below
    assert all(len(line) <= len(name) + 2 + LEAST for line in lines)
    assert reason.strip() in rows._repr_html_()


def test_names_cannot_break_out_of_the_page_or_the_line() -> None:
    rows = Rows([{"na<me": "<script>alert(1)</script>\n\x1b[31m"}])
    assert "<script>" not in rows._repr_html_()
    assert "&lt;script&gt;" in rows._repr_html_()
    assert len(repr(rows).splitlines()) == 2
    assert "\x1b" not in repr(rows)
    assert "\x1b" not in rows._repr_html_()


@pytest.fixture(scope="module")
def nouns() -> dict[str, object]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    batches = [(x, x.argmax(-1) % 3) for x in torch.randn(20, 64, 10)]
    objective = gm.Objective.classification()
    stats = gm.capture(model, batches, objective)
    blocks, plan, optimizer = gm.blocks(model), gm.compress(model, stats), gm.optim.Muon(model)
    run = Run(model, [{"step": 10, "seconds": 1.0, "loss": 0.5, "accuracy": 0.9}], 10, 1.0, optimizer="muon", lr=0.1)
    return {
        "blocks": blocks, "block": blocks.blocks[0], "rest": blocks.rest[0], "statistics": stats, "plan": plan,
        "objective": objective, "run": run, "report": gm.inspect(model, quick=True),
        "rate": gm.suggest_lr(model, batches, objective),
        "rows of blocks": blocks.explain(), "rows of a plan": plan.explain(),
        "rows of an optimizer": optimizer.explain(), "rows of its health": optimizer.health(),
        "certificate": gm.linalg.inv_ex(torch.eye(3).expand(4, 3, 3))[1],
    }  # fmt: skip


def test_reprs_are_short_and_show_no_tensor(nouns) -> None:
    for name, noun in nouns.items():
        assert "tensor(" not in repr(noun), name
        assert len(repr(noun)) < 700, name
        if not name.startswith("rows"):
            assert "\n" not in repr(noun), name


@pytest.mark.parametrize(
    "name", ["blocks", "statistics", "plan", "run", "rate", "report", "certificate", "rows of its health"]
)
def test_a_notebook_shows_a_table_or_a_page(nouns, name: str) -> None:
    shown = nouns[name]._repr_html_()
    assert "<table" in shown or "<iframe" in shown


def test_a_certificate_tells_the_worst_of_its_matrices() -> None:
    told = repr(gm.linalg.inv_ex(torch.stack([torch.eye(3), torch.zeros(3, 3)]))[1])
    assert told.startswith("<Certificate of 2 matrices: 1 converged, 1 failed, error at most ")
    assert told.endswith("the answer does not exist: the matrix is singular or rank-deficient>")
    ranked = gm.linalg.pinv_ex(torch.ones(3, 2))[1]
    assert repr(ranked).startswith("<RankedCertificate of 1 matrix: converged")
    for unreadable in (torch.zeros(2, 3, 3, device="meta"), torch.zeros(0, 3, 3)):
        assert "\n" not in repr(gm.linalg.inv_ex(unreadable)[1])
    seen = []
    torch.vmap(lambda m: (seen.append(repr(gm.linalg.inv_ex(m)[1])), m)[1])(torch.eye(3).expand(2, 3, 3))
    assert "not known here" in seen[0]


def test_health_is_still_a_dict() -> None:
    layer = nn.Linear(4, 4)
    health = gm.optim.Muon(layer).health()
    assert health == dict(health)
    assert health["weight"]["skipped"] == 0
    assert repr(health).splitlines()[0].split() == ["name", "skipped", "fallbacks"]
