"""What `inspect` says of networks whose trouble is known, and that it stays silent on healthy ones."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import gramian as gm
from gramian.checkpoint import save_tensors
from gramian.report import Report
from zoo import ZOO

CLASSIFY = gm.Objective.classification()


def plain(
    depth: int, activation: type[nn.Module] = nn.Tanh, width: int = 32, outputs: int = 2, seed: int = 0
) -> nn.Module:
    """A plain network as PyTorch initializes it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), activation())]
        return nn.Sequential(*layers, nn.Linear(width, outputs))


def batch(rows: int = 64, width: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 0.5 * torch.randn(rows, width, generator=generator)
    return x, (x.sum(1) > 0).long()


def codes(report: Report, *severities: str) -> set[str]:
    return {f.code for f in report.findings if not severities or f.severity in severities}


def scaled(model: nn.Module, factor: float) -> nn.Module:
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.weight.data *= factor
    return model


def isometric(model: nn.Module) -> nn.Module:
    return gm.init.isometric_(model, batch())


def with_value(model: nn.Module, value: float) -> nn.Module:
    model[2].weight.data[3, 4] = value
    return model


def with_dead_units(model: nn.Module) -> nn.Module:
    model[0].bias.data[:16] = -1e3
    return model


def zeroed(model: nn.Module) -> nn.Module:
    model[2].weight.data.zero_()
    return model


# (name, model, codes that must be found, codes that must not)
TROUBLES = [
    (
        "vanishing",
        lambda: plain(60),
        {"gain-below-one", "gradient-vanishes", "jacobian-vanishes", "samples-indistinguishable"},
        {"gain-above-one", "gradient-explodes", "gradient-underflow"},
    ),
    ("underflowing", lambda: plain(400), {"gradient-underflow", "gain-below-one"}, {"gain-above-one"}),
    (
        "exploding",
        lambda: scaled(isometric(plain(40, nn.ReLU)), 1.5),
        {"gain-above-one", "jacobian-explodes"},
        {"gain-below-one", "gradient-vanishes"},
    ),
    ("NaN", lambda: with_value(plain(4), math.nan), {"non-finite-weights", "non-finite-input"}, {"gain-below-one"}),
    ("infinite", lambda: with_value(plain(4), math.inf), {"non-finite-weights"}, set()),
    ("dead units", lambda: with_dead_units(plain(4, nn.ReLU)), {"dead-units"}, {"gain-below-one"}),
    ("zero weights", lambda: zeroed(plain(6)), {"zero-weights", "samples-indistinguishable"}, {"rank-deficient"}),
]


@pytest.mark.parametrize(("make", "present", "absent"), [t[1:] for t in TROUBLES], ids=[t[0] for t in TROUBLES])
def test_known_trouble_is_found(make, present, absent) -> None:
    report = gm.inspect(make(), [batch()], CLASSIFY)
    assert present <= codes(report)
    assert not absent & codes(report)
    for finding in report.findings:
        assert finding.title
        assert finding.evidence
        assert finding.cause


class Branch(nn.Module):
    """`h + b(relu(a(h)))`, with b zero as at the start of a LoRA adapter or a residual branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.b.weight)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.b(torch.relu(self.a(h)))


def test_a_matrix_that_is_zero_by_design_is_no_error() -> None:
    width = batch()[0].shape[1]
    torch.manual_seed(0)
    report = gm.inspect(nn.Sequential(*[Branch(width) for _ in range(3)], nn.Linear(width, 4)), [batch()], CLASSIFY)
    assert any(layer.gradient_rms == 0 for layer in report.layers)
    assert not codes(report, "error")
    assert not codes(report, "warning")


def test_zero_gradients_without_a_zero_matrix_are_an_underflow() -> None:
    torch.manual_seed(0)
    report = gm.inspect(plain(400), [batch()], CLASSIFY)
    assert report.layers[0].gradient_rms == 0
    assert codes(report, "error") == {"gain-below-one"}  # the cause; what follows from it is information
    assert "gradient-underflow" in codes(report, "info")


def _without_autograd(model: nn.Module, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize(
    "loss",
    [lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]).detach(), _without_autograd],
    ids=["detached", "no_grad"],
)
def test_a_loss_without_a_gradient_is_an_error(loss) -> None:
    report = gm.inspect(plain(3), [batch()], loss)
    assert "graph-cut" in codes(report, "error")
    assert "No gradient arrives at any layer" in report.verdict


def test_inference_mode_is_an_error() -> None:
    with torch.inference_mode(), pytest.raises(gm.errors.InputError, match="its weights can have no gradient"):
        gm.inspect(plain(3), [batch()], CLASSIFY)


def test_the_verdict_says_when_little_was_measured() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = isometric(plain(3)), nn.Linear(400, 400)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x) + 0 * self.unused.weight.sum()

    report = gm.inspect(Partly(), [batch()], CLASSIFY)
    assert "No trouble found in " in report.verdict
    assert " % of the parameters." in report.verdict.partition("The signal was measured of ")[2]


@pytest.mark.parametrize(
    ("depth", "activation", "allowed"),
    [
        (3, nn.Tanh, set()),
        (30, nn.Tanh, set()),
        (300, nn.Tanh, set()),
        (3, nn.ReLU, {"rank-deficient"}),  # an info: [Q, −Q; −Q, Q] has half the rank
        # At criticality the angles between samples close with depth, and here that is reported. At 300 layers of 32 the
        # fluctuations of ReLU's gain are themselves a trouble (Hanin 1801.03744): exp(−depth/width).
        (30, nn.ReLU, {"samples-indistinguishable", "dead-units", "rank-deficient"}),
    ],
)
def test_isometric_networks_have_no_findings(depth: int, activation: type[nn.Module], allowed: set[str]) -> None:
    report = gm.inspect(isometric(plain(depth, activation)), [batch()], CLASSIFY)
    assert codes(report) <= allowed


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_is_healthy(name: str) -> None:
    """No errors on models that learn; the 20-layer tanh network at PyTorch's gain is the one that does not."""
    case = ZOO[name]
    objective = {
        "classification": CLASSIFY,
        "next_token": gm.Objective.next_token(),
        "regression": gm.Objective.regression(),
    }[case.objective]
    report = gm.inspect(case.make_model(0), case.make_batches(0), objective)
    assert ("gain-below-one" in codes(report, "error")) == (name == "deep_tanh_mlp")
    if name != "deep_tanh_mlp":
        assert not codes(report, "error")
    assert report.layers
    assert Report.from_json(report.to_json()).layers == report.layers


def test_the_gain_is_that_of_the_weights() -> None:
    """For a linear network χ is the mean squared singular value of each weight matrix."""
    model = plain(12, nn.Identity)
    report = gm.inspect(model, [batch(256)], CLASSIFY)
    for layer in report.layers[:-1]:
        exact = sum(s * s for s in layer.singular_values) / len(layer.singular_values)
        assert layer.gain == pytest.approx(exact, rel=0.05)


def test_the_jacobian_is_the_product() -> None:
    model = plain(8, nn.Identity).double()
    x, y = batch()
    report = gm.inspect(model, [(x.double(), y)], CLASSIFY)
    product = torch.linalg.multi_dot([layer.weight for layer in reversed(model[:-1]) if isinstance(layer, nn.Linear)])
    torch.testing.assert_close(torch.tensor(report.jacobian).double(), torch.linalg.svdvals(product), rtol=1e-6, atol=0)


def test_a_trained_network_is_not_blamed_for_its_mean_gain() -> None:
    """A gain below one in the mean over directions is no trouble where the gradient crosses the depth all the same."""
    model = isometric(plain(60))
    for layer in model[:-1]:
        if isinstance(layer, nn.Linear):  # one direction passes, the others shrink
            layer.weight.data = torch.diag(torch.tensor([1.0] + [0.6] * 31))
    x = torch.zeros(64, 32)
    x[:, 0] = torch.linspace(-0.05, 0.05, 64)
    model[-1].weight.data = torch.zeros(2, 32)
    model[-1].weight.data[:, 0] = torch.tensor([1.0, -1.0])
    report = gm.inspect(model, [(x, (x[:, 0] > 0).long())], CLASSIFY)
    assert report.facts["gain χ (geometric mean)"] < 0.5
    assert "gain-below-one" not in codes(report)


def test_a_file_and_its_model_have_the_same_spectra(tmp_path) -> None:
    model = plain(5)
    save_tensors(tmp_path / "m.safetensors", model.state_dict())
    from_file, from_model = gm.inspect(tmp_path / "m.safetensors"), gm.inspect(model)
    assert [(x.name, x.singular_values) for x in from_file.layers] == [
        (x.name, x.singular_values) for x in from_model.layers
    ]
    assert from_file.facts["parameters"] == from_model.facts["parameters"]


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.ReLU(), nn.Linear(16, 2))
    model[3].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    gm.inspect(model, [batch()], CLASSIFY)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": [batch()]}, "go together"),
        ({"objective": CLASSIFY}, "go together"),
        ({"batches": [], "objective": CLASSIFY}, "no batches"),
    ],
)
def test_wrong_arguments(arguments, message) -> None:
    with pytest.raises(gm.errors.InputError, match=message):
        gm.inspect(plain(3), **arguments)
    with pytest.raises(gm.errors.InputError, match="no forward pass"):
        gm.inspect("model.safetensors", batches=[batch()], objective=CLASSIFY)
