"""Matrices that have lost their rank are named; parameters that meet others entry by entry are no matrices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from gramian.inspection.passes.watched_steps import observe

CLASSIFY = gm.Objective.classification()
N, D, STATES, LENGTH, CLASSES = 64, 8, 6, 12, 3


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(N) % CLASSES
    x = torch.randn(N, LENGTH, D, generator=g)
    x[:, :, 0] += y[:, None]
    return [(x, y)]


def codes(model: nn.Module) -> set[str]:
    return {f.code for f in gm.inspect(model, batches(), CLASSIFY).findings}


class Scan(nn.Module):
    """A diagonal state space model, whose states decay alike in all channels, with `mixes` a matrix that mixes them."""

    def __init__(self, *, mixes: bool) -> None:
        super().__init__()
        self.decay = nn.Parameter(-torch.arange(1.0, STATES + 1).repeat(D, 1))
        self.step, self.into = nn.Parameter(torch.full((D,), 0.1)), nn.Linear(D, STATES)
        self.mix = nn.Parameter(torch.outer(torch.randn(D), torch.randn(D))) if mixes else None
        self.head = nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.mix is not None:
            x = x @ self.mix
        state = x.new_zeros(len(x), D, STATES)
        keep = torch.exp(self.decay * self.step[:, None])
        for t in range(x.shape[1]):
            state = keep * state + self.into(x[:, t])[:, None] * x[:, t, :, None]
        return self.head(state.sum(-1))


class Gained(nn.Module):
    """A layer for each head, each with gains that start at one; with `low`, heads whose matrix has rank one."""

    def __init__(self, *, low: bool) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(D, 4 * D), nn.Linear(4 * D, CLASSES)
        self.gain = nn.Parameter(torch.ones(4, D))
        if low:
            with torch.no_grad():
                self.into.weight.copy_(torch.outer(torch.randn(4 * D), torch.randn(D)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x.mean(1)).unflatten(-1, (4, D))
        return self.head(torch.tanh(F.layer_norm(h, (D,)) * self.gain).flatten(1))


@pytest.mark.parametrize("make", [lambda: Scan(mixes=False), lambda: Gained(low=False)])
def test_parameters_that_meet_others_by_entries_are_no_matrices(make) -> None:
    torch.manual_seed(0)
    found = codes(make())
    assert not found & {"parameter-rank-one", "parameter-constant", "rank-deficient", "dominant-direction"}


@pytest.mark.parametrize(
    ("make", "where"), [(lambda: Scan(mixes=True), "mix"), (lambda: Gained(low=True), "into.weight")]
)
def test_a_matrix_of_rank_one_is_named(make, where) -> None:
    torch.manual_seed(0)
    findings = gm.inspect(make(), batches(), CLASSIFY).findings
    assert (findings[0].code, findings[0].where) == ("parameter-rank-one", where)


def test_how_values_of_parameters_are_taken() -> None:
    torch.manual_seed(0)
    seen = observe(Scan(mixes=True), batches(), CLASSIFY)
    assert seen.entries == {"decay", "step"}
    assert {"into.weight", "mix", "head.weight"} <= seen.multiplied
    seen = observe(nn.Sequential(nn.GRU(D, D, batch_first=True), Last(), nn.Linear(D, CLASSES)), batches(), CLASSIFY)
    assert not {name for name in seen.entries if "weight" in name}


class Last(nn.Module):
    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        return given[0][:, -1]


class Recurrent(nn.Module):
    """A GRU, a norm and a head; the matrices of its inputs, or all of its own, times a number."""

    def __init__(self, inputs: float = 1.0, state: float = 1.0, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.norm, self.head = nn.GRU(D, 24, batch_first=True), nn.LayerNorm(24), nn.Linear(24, CLASSES)
        with torch.no_grad():
            self.rnn.weight_ih_l0.mul_(inputs)
            self.rnn.weight_hh_l0.mul_(state)
            self.norm.weight.fill_(gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.rnn(x)[0][:, -1]))


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (Recurrent(), set()),
        (Recurrent(inputs=96), {"parameter-scale-large"}),
        (Recurrent(inputs=11, state=11), {"gain-above-one"}),
        (Recurrent(gain=20), {"parameter-scale-large"}),
    ],
    ids=["as drawn", "inputs", "both", "norm"],
)
def test_the_scale_of_recurrent_cells_and_of_norms(model: nn.Module, told: set[str]) -> None:
    assert codes(model) & {"parameter-scale-large", "parameter-scale-small", "gain-above-one"} == told


class Shifted(nn.Module):
    """Layers of tanh that offsets drive to its ends."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(LENGTH * D if i == 0 else 32, 32) for i in range(3))
        self.head = nn.Linear(32, CLASSES)
        with torch.no_grad():
            for layer in self.layers:
                layer.bias.copy_(offset * torch.randn(32).sign())

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


def test_saturation_makes_gains_small_and_not_the_other_way_round() -> None:
    findings = gm.inspect(Shifted(9.0), batches(), CLASSIFY).findings
    first = findings[0]
    assert first.code == "saturated-units"
    assert all(f.severity == "info" for f in findings if f.code == "gain-below-one")


def test_a_lone_bias_on_weights_as_they_were_drawn_is_no_fine_tune() -> None:
    model = Shifted(0.0)
    model.requires_grad_(False)
    model.head.bias.requires_grad_(True)
    found = {f.code: f.severity for f in gm.inspect(model, batches(), CLASSIFY).findings}
    assert found["parameter-frozen"] == "warning"
    for layer in model.layers:  # all biases: a way of fine-tuning
        layer.bias.requires_grad_(True)
    found = {f.code: f.severity for f in gm.inspect(model, batches(), CLASSIFY).findings}
    assert found.get("parameter-frozen", "info") == "info"


@pytest.mark.parametrize(("eps", "told"), [(1e-8, False), (5.0, True)])
def test_an_epsilon_beyond_the_gradients_is_named(eps: float, told: bool) -> None:
    model = Shifted(0.0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, eps=eps)
    found = {f.code: f for f in gm.inspect(model, batches(), CLASSIFY, optimizer=optimizer).findings}
    assert ("rate-too-low" in found) == told
    assert not told or "ε of 5" in found["rate-too-low"].cause


@pytest.mark.parametrize(("rate", "told"), [(3e-4, True), (0.02, False), (None, False)])
def test_a_rate_of_adamw_given_to_muon_is_named(rate: float | None, told: bool) -> None:
    model = Shifted(0.0)
    found = gm.inspect(model, batches(), CLASSIFY, optimizer=gm.optim.Muon(model, lr=rate)).findings
    assert ("rate-too-low" in {f.code for f in found}) == told


class Speaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(14, 24, padding_idx=0)
        self.rnn, self.head = nn.GRU(24, 24, batch_first=True), nn.Linear(24, 14)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(ids))[0])


@pytest.mark.parametrize(("already", "told"), [(True, True), (False, False)])
def test_tokens_that_are_shifted_twice(already: bool, told: bool) -> None:
    x = torch.randint(1, 14, (32, 12), generator=torch.Generator().manual_seed(0))
    batch = {"ids": x[:, :-1], "labels": x[:, 1:]} if already else {"ids": x, "labels": x}
    found = {f.code: f for f in gm.inspect(Speaks(), [batch], gm.Objective.next_token()).findings}
    assert ("labels-independent" in found and "shifts them again" in found["labels-independent"].title) == told
    assert "rank-deficient" not in found  # the table's row of padding is zero
    pair = gm.inspect(Speaks(), [(x[:, :-1], x[:, 1:])], gm.Objective.next_token()).findings
    assert not any("shifts them again" in f.title for f in pair)
