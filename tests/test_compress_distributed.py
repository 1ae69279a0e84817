"""Two ranks that calibrate together under DDP have one plan, which is that of one process with all batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gramian as gm
from distributed import run_on_ranks
from gramian import placement
from gramian.compression.choosing.making import plan_for
from gramian.errors import InputError

OBJECTIVE = gm.Objective.regression(fisher="gauss_newton")


class Net(nn.Module):
    """With a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(24, 40), nn.Linear(40, 40), nn.Linear(40, 6)
        self.unused = nn.Linear(40, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(x).tanh()).tanh())


def network() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def batches(num: int) -> list[Any]:
    """Few enough rows that one process, too, differentiates all of them."""
    x = torch.randn(num * 12, 24, generator=torch.Generator().manual_seed(1)) * torch.logspace(0.5, -1.5, 24)
    return list(zip(x.split(12), (x[:, :6] + x[:, 6:12]).split(12), strict=True))


def told(plan: Any) -> dict[str, Any]:
    """What can be compared of a plan, at two shares."""
    parts = [plan.at(keep=keep) for keep in (0.6, 0.85)]
    return {
        "sizes": [getattr(part, "ranks", None) or part.kept for part in parts],
        "predicted": [tuple(part.predicted) for part in parts],
        "points": [
            (*(value for value in point[:-1] if value is not None), *(point.kept or ())) for point in plan.points
        ],
        "notes": plan.notes,
        "reasons": plan.reasons,
        "weights": [p.detach() for p in parts[0].apply().parameters()],
    }


def planned(verb: str, kind: str, num: int) -> dict[str, Any]:
    rank, size = placement.world()
    model, given, used = network(), batches(num), OBJECTIVE
    if kind == "own output":  # whose gradient vanishes, and labels are drawn
        given, used = [(x, model(x).detach()) for x, _ in given], gm.Objective.regression(fisher="empirical")
    model = model if size == 1 else DistributedDataParallel(model)
    return told(getattr(gm, verb)(model, given[rank::size], used))


@pytest.mark.filterwarnings("ignore::gramian.errors.GramianWarning")
@pytest.mark.parametrize(
    ("verb", "kind", "num"),
    [("compress", "targets", 19), ("compress", "targets", 3), ("narrow", "targets", 17)],
)
def test_two_ranks_have_the_plan_of_one_process(verb: str, kind: str, num: int) -> None:
    alone = planned(verb, kind, num)
    one, two = run_on_ranks(planned, 2, verb, kind, num)
    assert all(torch.equal(a, b) for a, b in zip(one["weights"], two["weights"], strict=True))
    assert {k: v for k, v in one.items() if k != "weights"} == {k: v for k, v in two.items() if k != "weights"}
    for name in ("sizes", "notes", "reasons"):
        assert one[name] == alone[name]
    assert one["points"]
    for name in ("predicted", "points"):
        for a, b in zip(one[name], alone[name], strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-8)
    for a, b in zip(one["weights"], alone["weights"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::gramian.errors.GramianWarning")
def test_two_ranks_agree_where_labels_are_drawn() -> None:
    one, two = run_on_ranks(planned, 2, "compress", "own output", 6)
    assert any("the gradient of the loss is zero" in note for note in one["notes"])
    assert all(torch.equal(a, b) for a, b in zip(one["weights"], two["weights"], strict=True))
    assert one["sizes"] == two["sizes"]


def planned_for(folder: str) -> dict[str, Any]:
    """The plan of a command, whose ranks all have all batches, with a model that is frozen as a whole."""
    model, path = network().requires_grad_(False), Path(folder) / "plan.safetensors"
    plan = told(plan_for(model, batches(19), OBJECTIVE, plan_file=path))
    assert not any(p.requires_grad for p in model.parameters())
    again = plan_for(model, batches(19), OBJECTIVE, plan_file=path)
    return plan | {"read": {name: form.rank for name, form in again.at(keep=0.6).forms.items()}}


def test_ranks_that_have_all_batches_share_them(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    alone = planned_for(str(tmp_path / "one"))
    one, two = run_on_ranks(planned_for, 2, str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(one["weights"], two["weights"], strict=True))
    assert one["read"] == two["read"] == alone["read"]
    for name in ("sizes", "notes", "reasons"):
        assert one[name] == two[name] == alone[name]
    for a, b in zip(one["weights"], alone["weights"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def failing(which: str) -> str:
    rank, _ = placement.world()
    model = DistributedDataParallel(network())
    mine = batches(4)[rank::2]
    if rank == 1 and which == "loader":

        def broken() -> Any:
            yield batches(1)[0]
            raise InputError("the disk is gone")

        mine = broken()
    if rank == 1 and which == "nan":
        mine = [(x * torch.nan, y) for x, y in mine]
    if rank == 1 and which == "none":
        mine = []
    try:
        return str(gm.compress(model, mine, OBJECTIVE, keep=0.7).ranks)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("which", "message"), [("loader", "disk is gone"), ("nan", "the loss of batch 0 is nan"), ("none", "{'first'")]
)
def test_what_fails_on_one_rank_fails_on_both(which: str, message: str) -> None:
    """A rank without batches of its own is none that fails."""
    one, two = run_on_ranks(failing, 2, which, seconds=120)
    assert message in one
    assert message in two
