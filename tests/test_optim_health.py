"""`health()` tells what happened, and `max_overhead` sets the schedule once from measured times."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from cases import seeded, untyped
from directions import checks_of, has, maker
from gramian import random
from gramian.errors import GramianWarning, InputError
from gramian.optim import SOAP, Muon, refresh
from gramian.optim.registry import MATRIX_OPTIMIZERS

pytestmark = pytest.mark.filterwarnings("ignore:.*parameters without names")


def stepped(optimizer: Any, w: nn.Parameter, *grads: torch.Tensor) -> dict[str, Any]:
    for g in grads:
        w.grad = g.clone()
        optimizer.step()
    return optimizer.health("spectra")["0"]


def test_spectra_are_those_of_the_momentum() -> None:
    sigma = torch.tensor([8.0, 4.0, 2.0, 2.0], dtype=torch.float64)
    g = random.with_spectrum(5, 4, spectrum=sigma, generator=seeded(0), dtype=torch.float64)
    share = sigma / sigma.sum()
    wanted = math.exp(-float((share * share.log()).sum()))
    for entry in MATRIX_OPTIMIZERS.values():
        w = nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))
        optimizer: Any = entry.optimizer([w])
        row = stepped(optimizer, w, g)
        if optimizer.recipe.momentum is None:
            assert row["condition"] is row["effective_rank"] is None
            continue
        assert row["condition"] == pytest.approx(4.0)
        assert row["effective_rank"] == pytest.approx(wanted)


def test_the_worst_of_several_matrices_is_told() -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 1, bias=False), nn.Linear(4, 4))
    optimizer = Muon(model)
    thirds = [torch.eye(4), torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.5])), torch.ones(4, 4)]
    model[0].in_proj_weight.grad = torch.cat(thirds)
    optimizer.step()
    row = optimizer.health("spectra")["0.in_proj_weight"]
    assert row["effective_rank"] == pytest.approx(1.0, abs=1e-4)
    assert row["condition"] > 1e6
    assert optimizer.health("spectra")["0.out_proj.weight"] == {
        "skipped": 0, "fallbacks": None, "condition": None, "effective_rank": None, "drift": None
    }  # fmt: skip


def drifted(make: Callable[..., Any]) -> list[float]:
    """After a renewal, after a step with the same gradient, and after one with another."""
    w = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    optimizer = make([w])
    g, other = (
        random.with_spectrum(4, 4, spectrum=torch.arange(1.0, 5.0), generator=seeded(i)).double() for i in (0, 1)
    )
    return [stepped(optimizer, w, x)["drift"] for x in (g, g, 50 * other)]


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_drift_tells_how_stale_is_what_is_kept(name: str) -> None:
    plain = (
        {"nesterov": False} if has(name, "nesterov") else {}
    )  # Nesterov's momentum is another than that of the state
    found = drifted(maker(name, exact=True, refresh=10, **plain))
    if MATRIX_OPTIMIZERS[name].optimizer.recipe.staleness is None:  # type: ignore[attr-defined]
        assert found == [None] * 3
        return
    fresh, same, other = found
    assert fresh < 1e-6
    assert same < 1e-6
    assert 0.1 < other <= 1


def test_nothing_is_stale_where_all_is_recomputed() -> None:
    assert all(drift is None for drift in drifted(Muon))
    assert all(drift < 1e-6 for drift in drifted(lambda w: SOAP(w, refresh=1)))


def test_the_drift_of_soap_is_the_share_off_the_diagonal() -> None:
    w = nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
    optimizer = SOAP([w], refresh=10)
    grads = [torch.randn(3, 3, generator=seeded(i), dtype=torch.float64) for i in range(3)]
    found = stepped(optimizer, w, *grads)["drift"]
    shares = []
    for of in (lambda g: g @ g.T, lambda g: g.T @ g):
        q = torch.linalg.eigh(of(grads[0]))[1]
        moment = sum(0.95 ** (2 - i) * q.T @ of(g) @ q for i, g in enumerate(grads))
        off = moment - torch.diag(moment.diagonal())
        shares.append(float(torch.linalg.matrix_norm(off) / torch.linalg.matrix_norm(moment)))
    assert found == pytest.approx(max(shares))


def test_an_unknown_detail_is_refused() -> None:
    with untyped(), pytest.raises(InputError, match="'counts' or 'spectra'"):
        Muon([nn.Parameter(torch.ones(2, 2))]).health("all")


# ---- the schedule ----------------------------------------------------------------------------------------------------


class Watch:
    """A clock that says what the test wants: seconds of a step by whether all is due, and between two steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, full: float, base: float, outside: float) -> None:
        self.time, self.calls = 0.0, 0
        self.full, self.base, self.outside = full, base, outside
        monkeypatch.setattr(refresh, "_now", self.now)

    def now(self, group: dict[str, Any]) -> float:
        begins = self.calls % 2 == 0
        self.calls += 1
        self.time += self.outside if begins else self.full if group["refresh"] == 1 else self.base
        return self.time


def run(optimizer: Any, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=seeded(10 * step + i))
        optimizer.step()


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(6, 4)) for _ in range(3)]


MAKERS = {name: maker(name) for name in MATRIX_OPTIMIZERS}


@pytest.mark.parametrize("name", MAKERS)
def test_the_schedule_is_the_shortest_that_keeps_the_share(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """base + (full − base)/refresh ≤ outside · share/(1 − share), as 88/(200/9 − 2) = 4.35 for the second."""
    for outside, wanted in ((900.0, 1), (200.0, 5), (90.0, 11)):
        Watch(monkeypatch, 90.0, 2.0, outside)
        params = parameters()
        optimizer = MAKERS[name](params, max_overhead=0.1)
        run(optimizer, params, range(9))
        assert [g["refresh"] for g in optimizer.param_groups] == [wanted]
        kept = checks_of(name).keeps_direction
        assert ("direction" in optimizer.state[params[0]]) == kept
        run(optimizer, params, range(9, 12))
        assert optimizer.param_groups[0]["refresh"] == wanted
        assert ("direction" in optimizer.state[params[0]]) == (kept and wanted > 1)
        assert all(p.isfinite().all() for p in params)


def test_only_new_matrices_are_made_while_the_rest_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    Watch(monkeypatch, 90.0, 2.0, 200.0)
    params = parameters()
    optimizer = Muon(params, max_overhead=0.1)
    run(optimizer, params, range(6))
    kept = [optimizer.state[p]["direction"].clone() for p in params]
    run(optimizer, params, range(6, 9))
    assert all(torch.equal(optimizer.state[p]["direction"], before) for p, before in zip(params, kept, strict=True))
    run(optimizer, params, range(9, 14))
    assert not any(torch.equal(optimizer.state[p]["direction"], old) for p, old in zip(params, kept, strict=True))


@pytest.mark.parametrize("stop", [3, 7, 11])
@pytest.mark.parametrize("name", MAKERS)
def test_a_restored_run_replays_the_choice(name: str, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was stopped between the first measurement and the choice, on a machine that is as fast."""

    def fresh() -> tuple[list[nn.Parameter], Any]:
        params = parameters()
        return params, MAKERS[name](params, max_overhead=0.1)

    Watch(monkeypatch, 90.0, 2.0, 200.0)
    params, optimizer = fresh()
    run(optimizer, params, range(stop))
    weights, state = [p.detach().clone() for p in params], optimizer.state_dict()
    others, again = fresh()
    for p, w in zip(others, weights, strict=True):
        p.data.copy_(w)
    again.load_state_dict(state)
    run(optimizer, params, range(stop, 16))
    Watch(monkeypatch, *((90.0, 2.0, 200.0) if stop < 9 else (1.0, 1.0, 1.0)))
    run(again, others, range(stop, 16))
    assert again.param_groups[0]["refresh"] == optimizer.param_groups[0]["refresh"] == 5
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_a_share_that_cannot_be_met_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    Watch(monkeypatch, 90.0, 50.0, 200.0)
    params = parameters()
    optimizer = SOAP(params, max_overhead=0.1)
    run(optimizer, params, range(8))
    with pytest.warns(GramianWarning, match="must run in every step takes 20% of a step here"):
        run(optimizer, params, range(8, 9))
    assert optimizer.param_groups[0]["refresh"] == refresh.LONGEST


def test_a_schedule_is_staggered() -> None:
    """Every matrix once in a cycle, and no two in one step while there are steps enough."""
    params = parameters()
    optimizer = SOAP(params, refresh=3)
    run(optimizer, params, range(4))
    assert sorted(optimizer._plans[0].stacks[0].phases) == [0, 1, 2]


def test_a_share_out_of_range_is_refused() -> None:
    for share in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(InputError, match=r"max_overhead must be in \(0, 1\), or None"):
            Muon(parameters(), max_overhead=share)
