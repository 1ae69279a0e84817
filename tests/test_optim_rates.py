"""The usual rates: L counts what a unit of the function passes through; narrow tables move faster."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gramian as gm


class _Experts(nn.Module):
    """Four experts, stacked or as modules of their own; the forward pass does not matter here."""

    def __init__(self, *, stacked: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        if stacked:
            self.experts = nn.Module()
            self.experts.gate_up_proj = nn.Parameter(torch.randn(4, 12, 8))
            self.experts.down_proj = nn.Parameter(torch.randn(4, 8, 6))
        else:
            parts = {"gate": (8, 6), "up": (8, 6), "down": (6, 8)}
            self.experts = nn.ModuleList(
                nn.ModuleDict({k: nn.Linear(*s, bias=False) for k, s in parts.items()}) for _ in range(4)
            )
        self.head = nn.Linear(8, 3)


@pytest.mark.parametrize("stacked", [True, False])
def test_experts_in_parallel_share_one_part_of_the_rate(stacked: bool) -> None:
    layouts = {"experts.gate_up_proj": "e (two o) i -> e two o i", "experts.down_proj": "e o i -> e o i"}
    optimizer = gm.optim.Muon(_Experts(stacked=stacked), lr=0.1, layouts=layouts if stacked else None)
    assert optimizer._num_matrices == 1 + 3


def test_fused_parts_and_groups_count_each_and_depthwise_kernels_not_at_all() -> None:
    model = nn.Sequential(
        nn.Conv1d(8, 16, 3, groups=4), nn.Conv1d(16, 16, 3, groups=16), nn.MultiheadAttention(16, 2), nn.Linear(16, 2)
    )
    assert gm.optim.Muon(model)._num_matrices == 4 + 0 + (3 + 1)


def test_narrow_tables_take_a_larger_usual_rate() -> None:
    def rates(width: int, **options: object) -> dict[str, float]:
        optimizer = gm.optim.Muon(
            nn.Sequential(nn.Embedding(9, width), nn.Linear(width, 4), nn.Linear(4, 2)), **options
        )
        return optimizer.rates()

    assert rates(64)["0.weight"] == rates(64)["2.weight"] == 1e-2
    assert rates(600)["0.weight"] == pytest.approx(2.4 / 600)
    assert rates(2048)["0.weight"] == rates(2048)["2.weight"] == 3e-3
    assert rates(64, rest_lr=1e-3)["0.weight"] == 1e-3
    assert rates(64, scale="match_rms_adamw", lr=2e-3)["0.weight"] == 2e-3
    without = gm.optim.Muon(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)))
    assert without.rates()["2.weight"] == 1e-2


@pytest.mark.parametrize(("lr", "table"), [(0.01, 1e-2), (0.1, 1e-2), (0.2, 2e-2), (1.0, 3e-2), (10.0, 3e-2)])
def test_the_rest_takes_more_where_the_matrices_do(lr: float, table: float) -> None:
    """In proportion and at most threefold; vectors take the same, but no more than a matrix's share of the rate."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = gm.optim.Muon(net, lr=lr)
    assert optimizer.rates()["4.weight"] == pytest.approx(table)
    assert optimizer.rates()["4.bias"] == pytest.approx(min(table, lr / 2))
    optimizer.param_groups[0]["lr"] *= 0.5  # a schedule
    assert optimizer.rates()["4.weight"] == pytest.approx(table / 2)


class _Mamba(nn.Module):
    """The weights of a Mamba's block as transformers and mamba_ssm name them; the forward pass does not matter here."""

    def __init__(self, width: int = 8, rank: int = 2, states: int = 4) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(5, width)
        self.mixer = nn.Module()
        self.mixer.in_proj = nn.Linear(width, 4 * width, bias=False)
        self.mixer.conv1d = nn.Conv1d(2 * width, 2 * width, 4, groups=2 * width)
        self.mixer.x_proj = nn.Linear(2 * width, rank + 2 * states, bias=False)
        self.mixer.dt_proj = nn.Linear(rank, 2 * width)
        self.mixer.out_proj = nn.Linear(2 * width, width, bias=False)
        self.head = nn.Linear(width, 3)


@pytest.mark.parametrize("as_model", [True, False])
def test_what_makes_the_coefficients_of_a_recurrence_steps_as_a_matrix_and_does_not_count(as_model: bool) -> None:
    model = _Mamba()
    optimizer = gm.optim.Muon(model if as_model else list(model.named_parameters()))
    direction = {row["name"]: row["direction"] for row in optimizer.explain()}
    assert direction["mixer.x_proj.weight"] == direction["mixer.dt_proj.weight"] == "matrix"
    assert optimizer._num_matrices == 2  # in_proj, which only its config would tell to be two, and out_proj


def test_coefficients_alone_have_the_whole_rate() -> None:
    model = _Mamba()
    for name, p in model.named_parameters():
        p.requires_grad_("x_proj" in name)
    assert gm.optim.Muon(model)._num_matrices == 1


@pytest.mark.parametrize(("taps", "rate"), [(3, 0.147 / 9), (7, 3e-3), (1, 3e-2)])
def test_small_depthwise_kernels_take_a_larger_usual_rate(taps: int, rate: float) -> None:
    """All entries moved by the rate move an output by the rate times the taps, which is the same for every size."""
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, taps, groups=8), nn.Linear(8, 2))
    rates = gm.optim.Muon(model).rates()
    assert rates["1.weight"] == pytest.approx(rate)
    assert rates["2.weight"] == 1e-2
    given = gm.optim.Muon(model, rest_lr=1e-3)
    assert len(given.param_groups) == 1
    assert {rate for name, rate in given.rates().items() if name != "0.weight"} == {1e-3}
    assert set(gm.optim.Muon(model, scale="match_rms_adamw", lr=2e-3).rates().values()) == {2e-3}


def _chain(depth: int, *last: nn.Module) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(depth)), *last, nn.Linear(8, 2))


def test_the_usual_rate_of_muon_grows_with_the_square_root_of_depth() -> None:
    """With a norm or gates; the steps of a plain network's matrices add up, and its rate grows to twice the base."""

    def usual(params: Any) -> float:
        return gm.optim.Muon(params).param_groups[0]["lr"]

    for last, most in ((nn.LayerNorm(8), 1.0), (nn.BatchNorm1d(8), 1.0), (nn.Tanh(), 0.2)):
        rates = {depth: usual(_chain(depth, last)) for depth in (1, 2, 8, 18, 300)}
        assert rates == pytest.approx({1: 0.1, 2: 0.1, 8: 0.2, 18: min(0.3, most), 300: most})
    assert usual(nn.LSTM(8, 8, num_layers=2)) == pytest.approx(0.1 * 6**0.5)  # L is 12: the last is the head
    normed = _chain(18, nn.LayerNorm(8))
    assert usual(list(normed.named_parameters())) == pytest.approx(0.3)
    with pytest.warns(gm.errors.GramianWarning, match="without names"):
        assert usual([*normed.parameters()]) == pytest.approx(0.2)
    assert gm.optim.Muon(_chain(18), lr=0.1).param_groups[0]["lr"] == 0.1
    assert gm.optim.Muon(_chain(18), scale="match_rms_adamw").param_groups[0]["lr"] == 0.1
    assert gm.optim.SOAP(_chain(18)).param_groups[0]["lr"] == 0.1
    frozen = _chain(18)
    for layer in frozen[:10]:
        layer.requires_grad_(False)
    assert gm.optim.Muon(frozen).param_groups[0]["lr"] == pytest.approx(0.2)


def test_a_group_of_its_own_rate_keeps_it_and_others_take_the_usual_one() -> None:
    net = _chain(8)
    groups = [{"params": list(net[:4].parameters()), "lr": 0.7}, {"params": list(net[4:].parameters())}]
    optimizer = gm.optim.Muon(groups, model=net)
    assert [group["lr"] for group in optimizer.param_groups] == [0.7, pytest.approx(0.2)]
    assert [group["full_lr"] for group in optimizer.param_groups] == [0.7, pytest.approx(0.2)]


def _faded(optimizer: Any) -> list[bool]:
    return [group["fades"] for group in optimizer.param_groups]


def test_a_rate_that_nobody_gave_fades() -> None:
    net, model = _chain(2), _chain(8)
    assert _faded(gm.optim.Muon(net)) == _faded(gm.optim.BalancedMuon(net)) == [True]
    groups = [{"params": list(model[:4].parameters()), "lr": 0.7}, {"params": list(model[4:].parameters())}]
    assert _faded(gm.optim.Muon(groups, model=model)) == [False, True]
    given = [gm.optim.Muon(net, lr=0.1), gm.optim.Muon(net, scale="match_rms_adamw"), gm.optim.SOAP(net)]
    assert not any(fades for optimizer in given for fades in _faded(optimizer))


@pytest.mark.parametrize(("step", "share"), [(99, 1.0), (399, 0.5)])
def test_all_rates_fade_together_and_a_resumed_run_goes_on(step: int, share: float) -> None:
    """√(T/t) after T = (L / 2 lr)², which is 100 here; a state of before there was fading does not."""
    net = _chain(2)
    moved = []
    for fades in (True, False, None):
        optimizer = gm.optim.Muon(net)
        state = optimizer.state_dict()
        state["param_groups"][0] |= {"step": step, "fades": fades}
        if fades is None:
            del state["param_groups"][0]["fades"]
        optimizer.load_state_dict(state)
        before = [p.detach().clone() for p in net.parameters()]
        for number, p in enumerate(net.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
        rates = optimizer.rates()
        optimizer.step()
        assert optimizer.param_groups[0]["step"] == step + 1
        moved.append([float((p.detach() - b).norm()) for p, b in zip(net.parameters(), before, strict=True)])
        assert rates["0.weight"] == pytest.approx(0.1 * (share if fades else 1.0))
        assert rates["0.bias"] == pytest.approx(0.01 * (share if fades else 1.0))
    assert [a / b for a, b in zip(*moved[:2], strict=True)] == pytest.approx([share] * len(moved[0]), rel=1e-4)
    assert moved[1] == pytest.approx(moved[2], rel=1e-4)


def test_an_optimizer_s_text_is_one_line_and_tells_rates_and_routes() -> None:
    optimizer = gm.optim.Muon(_chain(2), lr=0.25)
    assert repr(optimizer) == "<Muon: lr=0.25, 2 parameters step as matrices, 4 by AdamW>"
    proximal = gm.optim.Proximal(optimizer, {"0.weight": gm.prox.L1(0.5)})
    assert repr(proximal) == f"<Proximal: 0.weight: L1(strength=0.5); after {optimizer!r}>"
    assert all(len(line) <= 80 for line in repr(optimizer.explain()).splitlines())


@pytest.mark.parametrize("name", ["pos", "pe", "pos_emb", "position"])
def test_learned_positions_are_tables(name: str) -> None:
    net = _chain(2)
    net.register_parameter(name, nn.Parameter(torch.zeros(1, 6, 8)))
    for optimizer in (gm.optim.Muon(net), gm.optim.Muon(net.named_parameters())):
        (row,) = (row for row in optimizer.explain() if row["name"] == name)
        assert (row["direction"], row["reason"].split(",")[0]) == ("adamw", "embedding")
