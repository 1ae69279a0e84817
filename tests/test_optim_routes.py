"""Where nothing tells which matrices a parameter holds: the warning, what it says to write, and that this works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gramian as gm
from gramian.errors import GramianWarning, InputError
from gramian.optim import SOAP, Muon, Shampoo
from gramian.optim.unknown_stacks import MOST_LEFT


class Experts(nn.Module):
    """A layer of hand-written experts, each (in, out), of which every row takes one."""

    def __init__(self, num: int, wide: int) -> None:
        super().__init__()
        self.router = nn.Linear(8, num, bias=False)
        self.w_in = nn.Parameter(torch.randn(num, 8, wide) / 3)
        self.w_out = nn.Parameter(torch.randn(num, wide, 8) / 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = self.router(x).softmax(-1)
        hidden = torch.einsum("bi,eio->ebo", x, self.w_in).relu()
        return x + torch.einsum("ebo,be->bo", torch.bmm(hidden, self.w_out), gates)


def network(num: int = 4, wide: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), Experts(num, wide), Experts(num, wide), nn.Linear(8, 3))


LAYOUTS = {"*.w_in": "e i o -> e o i", "*.w_out": "e i o -> e o i"}


@pytest.mark.parametrize("cls", [Muon, Shampoo, SOAP])
def test_experts_that_no_row_knows_are_told(cls: type[Muon]) -> None:
    model = network()
    left = 2 * 2 * 4 * 8 * 16
    share = left / (left + 64 + 2 * 32)  # beside the first layer and the routers; the head counts nowhere
    with pytest.warns(GramianWarning, match=f"{share:.0%} of the hidden parameters step by AdamW") as caught:
        cls(model)
    (warning,) = caught
    text = str(warning.message)
    assert "1.w_in, 1.w_out, 2.w_in and 1 more" in text
    assert "layouts={'1.w_in': LAYOUT, '1.w_out': LAYOUT, '2.w_in': LAYOUT, …}" in text
    assert "LAYOUT: 'e i o -> e o i' if forward computes x @ w[e], 'e o i -> e o i' if it computes x @ w[e].T" in text


@pytest.mark.parametrize(("shape", "layout"), [((4, 8, 16), "e i o -> e o i"), ((4, 16, 8), "e o i -> e o i")])
@pytest.mark.parametrize("names", [("w_in", "b_in"), ("weight", "bias"), ("up", "up_bias")])
def test_a_bias_tells_how_a_stack_lies(shape: tuple[int, ...], layout: str, names: tuple[str, str]) -> None:
    """The bias has the length of the output, 16; what the warning says steps each expert the right way round."""
    model = nn.Module()
    model.experts = nn.Module()
    for name, size in zip(names, (shape, (4, 16)), strict=True):
        model.experts.register_parameter(name, nn.Parameter(torch.randn(size)))
    with pytest.warns(GramianWarning, match=f"layouts={{'experts.{names[0]}': '{layout}'}}") as caught:
        Muon(model)
    assert "LAYOUT" not in str(caught[0].message)


def test_layers_of_one_kind_are_told_by_one_pattern() -> None:
    model = nn.ModuleDict({"layers": network()[1:3]})
    with pytest.warns(GramianWarning, match=r"layouts=\{'layers\.\*\.w_in': [^:]*, 'layers\.\*\.w_out': [^:]*\}"):
        Muon(model)


def test_what_the_warning_says_to_write_steps_each_expert_by_itself() -> None:
    """The update of a stack is that of its experts one by one, transposed from (in, out), by the naive way."""
    model = network()
    optimizer = Muon(model, lr=0.1, rtol=1e-3, layouts=LAYOUTS)
    assert sum(r["direction"] == "adamw" and "w_" in r["name"] for r in optimizer.explain()) == 0
    w = model[1].w_in
    before, wanted = w.detach().clone(), torch.empty_like(w)
    model(torch.randn(64, 8)).square().mean().backward()
    for expert, gradient in enumerate(w.grad.double()):
        u, _, v = torch.linalg.svd(gradient.mT, full_matrices=False)
        scale = (16 / 8) ** 0.5 / optimizer._num_matrices
        wanted[expert] = (before[expert] - 0.1 * scale * (u @ v).mT).float()
    optimizer.step()
    w = w.detach()
    assert float((w - wanted).norm() / (wanted - before).norm()) < 0.01


def test_the_user_may_want_adamw_and_frozen_experts_do_not_count() -> None:
    Muon(network(), routes={"*.w_*": "adamw"})
    frozen = network()
    for name, p in frozen.named_parameters():
        p.requires_grad_("w_" not in name)
    Muon(frozen)


@pytest.mark.parametrize(("extra", "warns"), [(0, False), (1, True)])
def test_the_share_is_the_one_stated(extra: int, warns: bool) -> None:
    matrix = nn.Parameter(torch.randn(24, 24))
    most = int(MOST_LEFT / (1 - MOST_LEFT) * matrix.numel()) // 4  # as many as reach the share exactly
    pairs = [("layer.weight", matrix), ("stack", nn.Parameter(torch.randn(2, 2, most + extra)))]
    if warns:
        with pytest.warns(GramianWarning, match="of the hidden parameters step by AdamW"):
            Muon(pairs)
    else:
        Muon(pairs)


def test_names_alone_say_to_pass_the_model() -> None:
    with pytest.warns(GramianWarning, match="Pass the model, and where its classes do not tell, layouts="):
        Muon(network().named_parameters())


@pytest.mark.parametrize("as_model", [True, False])
def test_a_stack_is_not_one_matrix(as_model: bool) -> None:
    model = network()
    given = model if as_model else list(model.named_parameters())
    with pytest.raises(
        InputError, match=r"'1\.w_in' of shape \(4, 8, 16\) .*layouts=\{'1\.w_in': LAYOUT\} \(LAYOUT: 'e i o"
    ):
        Muon(given, routes={"1.w_in": "matrix", "*.w_*": "adamw"})


def test_what_is_a_matrix_for_its_role_keeps_its_own_layout() -> None:
    """A head that is a kernel, or a table, steps as the matrices that the table of layers knows."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 3))
    row = {r["name"]: r for r in Muon(model, routes={"1.weight": "matrix"}).explain()}["1.weight"]
    assert row["matrices"] == "36 × 8"


def test_what_a_pass_uses_entry_by_entry_can_be_told_from_its_capture() -> None:
    """Two parameters that neither class, name nor shape tells apart: one is multiplied as a matrix."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(8, 32), nn.Linear(32, 3)
            self.inner, self.outer = (nn.Parameter(torch.randn(16, 32)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            h = (self.enter(x)[:, None] * self.inner).mean(1)
            return self.leave((h @ self.outer.mT) @ self.outer)

    model, batch = Mixed(), (torch.randn(5, 8), torch.randn(5, 3))
    stats = gm.capture(model, [batch], gm.Objective.regression())
    routes: dict[str, Any] = {name: "adamw" for name in stats.other_uses if all(site.A is None for site in stats[name])}
    directions = {row["name"]: row["direction"] for row in gm.optim.Muon(model, routes=routes).explain()}
    assert routes == {"inner": "adamw"}
    assert (directions["inner"], directions["outer"]) == ("adamw", "matrix")


def test_what_is_frozen_is_said_to_be() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    net[0].requires_grad_(False)
    optimizer = Muon(net)
    rows = {row["name"]: (row["direction"], row["reason"]) for row in optimizer.explain()}
    assert rows["0.weight"] == ("none", "frozen; else matrix: Linear.weight")
    assert rows["1.weight"][0] == "matrix"
    assert "1 parameters step as matrices, 3 by AdamW, 2 are frozen" in repr(optimizer)
    net[0].requires_grad_(True)
    assert next(iter(optimizer.explain()))["direction"] == "matrix"
