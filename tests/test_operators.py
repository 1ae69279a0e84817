"""Jacobians agree with torch.func's, sample by sample, and measuring them changes nothing."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import gramian as gm
from cases import seeded
from gramian.operators import end_to_end_jacobian, layer_gains
from gramian.operators.gains import MIXED, REPEATED, try_gains
from test_capture import assert_same, snapshot
from zoo import ZOO

CLASSIFY = gm.Objective.classification()


def digits(n: int, name: str = "mlp") -> tuple[Tensor, Tensor]:
    x, y = ZOO[name].make_batches(0)[0]
    return x[:n], y[:n]


def per_sample_jacobian(segment: nn.Module, x: Tensor) -> Tensor:
    """(samples, m, n) in float64, one sample at a time."""
    segment = copy.deepcopy(segment).double().eval()
    rows = [torch.func.jacrev(lambda z: segment(z[None])[0].flatten())(sample).flatten(1) for sample in x.double()]
    return torch.stack(rows).detach()


CHAINS = {
    "mlp": (ZOO["mlp"].make_model(0), digits(6)),
    "tanh": (ZOO["deep_tanh_mlp"].make_model(0)[:9], digits(6)),
    "cnn": (ZOO["batchnorm_cnn"].make_model(0), digits(4, "batchnorm_cnn")),
    "in_place": (nn.Sequential(nn.Linear(64, 9), nn.ReLU(True), nn.Linear(9, 5), nn.ReLU(True)), digits(6)),
    "shapes": (nn.Sequential(nn.Unflatten(1, (8, 8)), nn.Linear(8, 3), nn.Flatten(0, 1), nn.Linear(3, 2)), digits(4)),
    "frozen": (ZOO["mlp"].make_model(0).requires_grad_(False), digits(6)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_gains_are_mean_squared_singular_values(name: str) -> None:
    model, batch = CHAINS[name]
    gains = layer_gains(model, batch, CLASSIFY, num_probes=200)
    starts = [i for i, m in enumerate(model) if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert list(gains) == [f"{i}.weight" for i in starts]
    for i, j in zip(starts, [*starts[1:], starts[-1] + 1], strict=True):
        model.eval()
        x = model[:i](batch[0])
        if name == "shapes":  # rows of one sample are samples of the next layer
            x = x.reshape(-1, x.shape[-1])
            jacobian = per_sample_jacobian(nn.Sequential(*(m for m in model[i:j] if isinstance(m, nn.Linear))), x)
        else:
            jacobian = per_sample_jacobian(model[i:j], x)
        exact = jacobian.square().sum((1, 2)).mean() / min(jacobian.shape[1:])
        gain = gains[f"{i}.weight"]
        assert gain.standard_error < 0.1 * gain.chi
        assert abs(gain.chi - exact) < 5 * gain.standard_error


def test_the_standard_error_is_honest() -> None:
    model, batch = CHAINS["mlp"]
    reference = layer_gains(model, batch, CLASSIFY, num_probes=3000, generator=seeded(99))["2.weight"].chi
    scores = []
    for seed in range(200):
        gain = layer_gains(model, batch, CLASSIFY, num_probes=3, generator=seeded(seed))["2.weight"]
        scores.append((gain.chi - reference) / gain.standard_error)
    assert sum(abs(s) < 3 for s in scores) >= 190
    assert max(map(abs, scores)) > 0.3


def test_the_last_gain_is_to_the_layers_own_output_whatever_the_objective() -> None:
    model, (x, y) = CHAINS["mlp"]

    def loss(model: nn.Module, batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    gain = layer_gains(model, (x, y), loss, num_probes=500)["4.weight"]
    w = model[4].weight.detach()
    assert gain.chi == pytest.approx(float(w.square().sum()) / 10, abs=5 * gain.standard_error)


# The layers whose output alone makes the next layer's input; the others mix with skips, attention or recurrence.
KNOWN = {
    "residual_cnn": {"0.weight", "2.conv1.weight", "3.conv1.weight", "6.weight"},
    "lstm": {"head.weight"},
    "gru": {"head.weight"},
    "transformer_classifier": {
        "embed.weight", "head.weight",
        "encoder.layers.0.linear1.weight", "encoder.layers.1.linear1.weight",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_none_where_the_next_input_depends_on_more(name: str) -> None:
    case = ZOO[name]
    gains = layer_gains(case.make_model(0), case.make_batches(0)[0], CLASSIFY)
    assert {layer for layer, gain in gains.items() if gain is not None} == KNOWN[name]


class Skip(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_residual_layers_have_no_gain_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(64, 8), *(Skip(nn.Linear(8, 8)) for _ in range(3)), nn.Linear(8, 10))
    gains = layer_gains(model, digits(4), CLASSIFY)
    assert [g is None for g in gains.values()] == [False, True, True, True, False]


def test_a_layer_used_twice_has_none() -> None:
    shared = nn.Linear(64, 64)
    gains = layer_gains(nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(64, 10)), digits(4), CLASSIFY)
    assert gains["0.weight"] is None
    assert gains["3.weight"] is not None


@pytest.mark.parametrize("name", ["mlp", "tanh", "cnn", "in_place"])
def test_end_to_end_jacobian_is_exact(name: str) -> None:
    model, batch = CHAINS[name]
    last = max(i for i, m in enumerate(model) if isinstance(m, nn.Linear))
    got = end_to_end_jacobian(model, batch, CLASSIFY)
    wanted = per_sample_jacobian(model[:last], batch[0])
    assert got.shape == wanted.shape
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_end_to_end_jacobian_starts_at_what_indices_select() -> None:
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 2))
    tokens = torch.randint(7, (4, 5), generator=seeded(0))
    got = end_to_end_jacobian(model, (tokens,), CLASSIFY)
    wanted = per_sample_jacobian(model[1:4], model[0](tokens))
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-6)


def test_inputs_that_are_not_contiguous() -> None:
    class Transposed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(1, 2)

    model = nn.Sequential(nn.Linear(5, 3), Transposed(), nn.Linear(4, 2))
    x = torch.randn(2, 4, 5, generator=seeded(0))
    got = end_to_end_jacobian(model, (x,), CLASSIFY)
    torch.testing.assert_close(got.double(), per_sample_jacobian(model[:2], x), rtol=1e-4, atol=1e-6)


def test_none_where_the_jacobian_is_too_wide_or_there_is_one_layer() -> None:
    wide = nn.Sequential(nn.Linear(64, 600), nn.Tanh(), nn.Linear(600, 10))
    assert end_to_end_jacobian(wide, digits(2), CLASSIFY) is None
    assert end_to_end_jacobian(nn.Sequential(nn.Linear(64, 10)), digits(2), CLASSIFY) is None


@pytest.mark.parametrize("name", ZOO)
def test_measuring_leaves_the_zoo_as_it_was(name: str) -> None:
    case = ZOO[name]
    model, batch = case.make_model(0), case.make_batches(0)[0]
    objective = getattr(gm.Objective, case.objective)()
    before = snapshot(model)
    gains = layer_gains(model, batch, objective, num_probes=1)
    end_to_end_jacobian(model, tuple(t[:2] for t in batch), objective)
    assert_same(before, snapshot(model))
    assert gains
    assert all(g is None or (math.isfinite(g.chi) and g.chi >= 0) for g in gains.values())


def test_a_failure_leaves_no_hooks() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(9, 10))
    before = snapshot(model)
    for measure in (layer_gains, end_to_end_jacobian):
        with pytest.raises(RuntimeError, match="shape"):
            measure(model, digits(2), CLASSIFY)
    assert_same(before, snapshot(model))


def test_each_layer_without_a_gain_has_its_own_reason() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain, self.skip, self.twice = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.chain(x)
            x = x + self.skip(x)
            return self.head(self.twice(self.twice(x)))

    gains, reasons = try_gains(Net(), (torch.randn(8, 4), torch.zeros(8, 2)), gm.Objective.regression())
    assert reasons == {"skip.weight": MIXED, "twice.weight": REPEATED}
    assert {name for name, gain in gains.items() if gain is None} == set(reasons)
