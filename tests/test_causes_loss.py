"""Causes in what the loss is applied to, in norms, masks and groups of the optimizer; each with its healthy network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from gramian.inspection.experiments.evaluation_mode import evaluate
from gramian.inspection.passes.moments import moments

CLASSIFY, REGRESS = gm.Objective.classification(), gm.Objective.regression()
N, WIDTH, CLASSES = 64, 20, 5

Loss = Callable[[nn.Module, Any], Tensor]


def data(kind: str) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, N, WIDTH, generator=generator)
    scores = x @ torch.randn(WIDTH, CLASSES, generator=generator)
    if kind == "sequences":  # of 8 steps, and 3 labels each
        return [(x[0].view(8, 8, WIDTH), torch.randint(1, CLASSES, (8, 3), generator=generator))]
    y = {
        "classes": scores.argmax(-1),
        "shares": scores.softmax(-1),
        "number": x[..., 0] * 2 + x[..., 1],
        "bits": (scores > 0).float(),
    }[kind]
    return list(zip(x, y, strict=True))


def net(outputs: int = CLASSES, *last: nn.Module, norm: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    middle = [norm] if norm is not None else []
    return nn.Sequential(nn.Linear(WIDTH, 64), *middle, nn.ReLU(), nn.Linear(64, outputs), *last)


def found(model: nn.Module, batches: Any, objective: Any, optimizer: Any = None) -> dict[str, Any]:
    """The errors and warnings, by code."""
    report = gm.inspect(model, batches, objective, optimizer=optimizer)
    return {f.code: f for f in report.findings if f.severity != "info"}


def loss(function: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    return lambda model, batch: function(model(batch[0]), batch[1])


def ctc(change: Callable[[Tensor], Tensor]) -> Loss:
    def function(scores: Tensor, labels: Tensor) -> Tensor:
        n, steps, _ = scores.shape
        given = change(scores).transpose(0, 1)
        return F.ctc_loss(given, labels, torch.full((n,), steps), torch.full((n,), labels.shape[1]))

    return loss(function)


KL = loss(lambda s, p: F.kl_div(s, p, reduction="batchmean"))


class Column(nn.Module):
    """Adds a dimension of one for a norm over the last."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x[..., None])[..., 0]


class Transposed(nn.Module):
    """A reshape that mixes the samples."""

    def forward(self, x: Tensor) -> Tensor:
        return x.t().reshape(x.shape)


class Softmaxed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x * x.softmax(self.dim) * 20


SOFTMAX_OF_SAMPLES = loss(lambda s, y: -F.log_softmax(s, 0)[torch.arange(N), y].mean())
OF_LOSSES: dict[str, tuple[str, nn.Module, str, Any]] = {
    "sigmoid before a loss of scores": (
        "loss-double-sigmoid", net(CLASSES, nn.Sigmoid()), "bits", loss(F.binary_cross_entropy_with_logits),
    ),
    "nll_loss of scores": ("loss-not-log-probabilities", net(), "classes", loss(F.nll_loss)),
    "kl_div of probabilities": ("loss-not-log-probabilities", net(CLASSES, nn.Softmax(1)), "shares", KL),
    "kl_div of scores": ("loss-not-log-probabilities", net(), "shares", KL),
    "kl_div against log-probabilities": (
        "loss-not-log-probabilities", net(CLASSES, nn.LogSoftmax(1)), "shares",
        loss(lambda s, p: F.kl_div(s, p.log(), reduction="batchmean")),
    ),
    "ctc_loss of scores": ("loss-not-log-probabilities", net(), "sequences", ctc(lambda s: s)),
    "ctc_loss of probabilities": ("loss-not-log-probabilities", net(), "sequences", ctc(lambda s: s.softmax(-1))),
    "a log-softmax over the samples": ("samples-mixed", net(), "classes", SOFTMAX_OF_SAMPLES),
    "tanh before cross-entropy": ("loss-double-softmax", net(CLASSES, nn.Tanh()), "classes", CLASSIFY),
    "(N, 1) against (N,)": ("loss-broadcast", net(1), "number", loss(lambda s, y: (s - y).square().mean())),
    "ReLU before a regression": ("output-range", net(1, nn.ReLU()), "number", REGRESS),
    "targets of another unit": (
        "labels-scale", net(1), "number", loss(lambda s, y: F.mse_loss(s.squeeze(-1), 1e4 * y + 1e5)),
    ),
    "a mixing reshape": ("axes-swapped", net(CLASSES, Transposed()), "classes", CLASSIFY),
    "a softmax over the samples": ("samples-mixed", net(CLASSES, Softmaxed(0)), "classes", CLASSIFY),
    "a norm over one value": ("norm-single-value", net(norm=Column(nn.LayerNorm(1))), "classes", CLASSIFY),
    "groups of one value": ("norm-single-value", net(norm=nn.GroupNorm(64, 64)), "classes", CLASSIFY),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_LOSSES)
def test_the_cause_is_named_first(name: str) -> None:
    code, model, kind, objective = OF_LOSSES[name]
    serious = found(model, data(kind), objective)
    assert next(iter(serious)) == code


@pytest.mark.parametrize(
    ("change", "steps", "is_zeroed", "expected"),
    [
        (lambda y: y, 8, False, {}),
        (lambda y: y - 1, 8, False, {"labels-out-of-range": "error"}),  # the first class is the blank
        (lambda y: torch.cat((y, 0 * y[:, :1]), 1), 8, False, {"labels-out-of-range": "warning"}),  # padding
        (lambda y: y, 2, False, {"labels-out-of-range": "error"}),  # from which it follows that the loss is infinite
        (lambda y: y % 2 + 1, 3, True, {"labels-ignored": "error"}),  # of two labels, most repeat one
        (lambda y: y % 2 + 1, 5, True, {}),
    ],
)
def test_labels_of_ctc(
    change: Callable[[Tensor], Tensor], steps: int, is_zeroed: bool, expected: dict[str, str]
) -> None:
    def function(scores: Tensor, labels: Tensor) -> Tensor:
        labels, n = change(labels), len(labels)
        given = scores.log_softmax(-1).transpose(0, 1)[:steps]
        lengths = torch.full((n,), steps), torch.full((n,), labels.shape[1])
        return F.ctc_loss(given, labels, *lengths, zero_infinity=is_zeroed)

    told = found(net(), data("sequences"), loss(function))
    assert {code: f.severity for code, f in told.items()} == expected


HEALTHY: dict[str, tuple[nn.Module, str, Any]] = {
    "scores of bits": (net(), "bits", loss(F.binary_cross_entropy_with_logits)),
    "log-probabilities": (net(CLASSES, nn.LogSoftmax(1)), "classes", loss(F.nll_loss)),
    "kl_div of log-probabilities": (net(CLASSES, nn.LogSoftmax(1)), "shares", KL),
    "kl_div of two log-probabilities": (
        net(CLASSES, nn.LogSoftmax(1)),
        "shares",
        loss(lambda s, p: F.kl_div(s, p.log(), reduction="batchmean", log_target=True)),
    ),
    "ctc_loss of log-probabilities": (net(), "sequences", ctc(lambda s: s.log_softmax(-1))),
    "a number": (net(1), "number", loss(lambda s, y: F.mse_loss(s.squeeze(-1), y))),
    "a softmax over the features": (net(CLASSES, Softmaxed(1)), "classes", CLASSIFY),
    "probabilities to bits": (net(CLASSES, nn.Sigmoid()), "bits", loss(F.binary_cross_entropy)),
    "a group norm": (net(norm=nn.GroupNorm(4, 64)), "classes", CLASSIFY),
    "a batch norm": (net(norm=nn.BatchNorm1d(64)), "classes", CLASSIFY),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_networks_draw_no_alarm(name: str) -> None:
    model, kind, objective = HEALTHY[name]
    assert not found(model, data(kind), objective)


def test_few_values_for_a_batch_norm() -> None:
    batches = [(x[:2], y[:2]) for x, y in data("classes")]
    assert "norm-few-values" in found(net(norm=nn.BatchNorm1d(64)), batches, CLASSIFY)


def test_a_batch_norm_without_momentum() -> None:
    finding = found(net(norm=nn.BatchNorm1d(64, momentum=0.0)), data("classes"), CLASSIFY)["norm-statistics"]
    assert "never change" in finding.title


def test_an_offset_of_the_head() -> None:
    model = net()
    with torch.no_grad():
        model[-1].bias[0] = 100.0
    finding = found(model, data("classes"), CLASSIFY)["head-offset"]
    assert "class 0" in finding.title
    assert finding.where == "2"


def test_a_mask_of_all_keys() -> None:
    class Masked(nn.Module):
        def __init__(self, hidden: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, dropout=0.0)
            self.head, self.hidden = nn.Linear(WIDTH, CLASSES), hidden

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.zeros(len(x), 3, dtype=torch.bool)
            mask[:, 2:] = True  # padding
            x = self.layer(x[:, None] + torch.arange(3.0)[:, None], src_key_padding_mask=mask | self.hidden)
            return self.head(x.mean(1))

    assert "attention-masked" in found(Masked(True), data("classes"), CLASSIFY)
    assert not found(Masked(False), data("classes"), CLASSIFY)


def test_a_mean_over_normalized_features() -> None:
    class Mean(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.norm = nn.Linear(WIDTH, 16), nn.LayerNorm(16)
            self.head, self.dim = nn.Linear(4 if dim == 2 else 16, CLASSES), dim

        def forward(self, x: Tensor) -> Tensor:
            x = torch.stack([self.stem(x.roll(i, 1)) for i in range(4)], 1)
            return self.head(self.norm(x).mean(self.dim))

    serious = found(Mean(2), data("classes"), CLASSIFY, torch.optim.Adam(Mean(2).parameters()))
    assert "reduction-cancels" in serious
    assert "gradient-vanishes" not in serious
    assert not found(Mean(1), data("classes"), CLASSIFY)


def adam(model: nn.Module, first: float = 1e-3, rest: float = 1e-3, **settings: Any) -> torch.optim.Optimizer:
    groups = [
        {"params": list(model[:1].parameters()), "lr": first},
        {"params": list(model[1:].parameters()), "lr": rest},
    ]
    return torch.optim.Adam(groups, **settings)


def test_the_group_at_fault_is_named() -> None:
    model = net()
    low = found(model, data("classes"), CLASSIFY, adam(model, 1e-9))["rate-too-low"]
    high = found(model, data("classes"), CLASSIFY, adam(model, rest=3.0))["rate-too-high"]
    assert low.where == "0"
    assert "1e-09 of group 0 (0.weight)" in low.cause
    assert "The rate 3 of group 1 (2.weight)" in high.cause
    assert not found(model, data("classes"), CLASSIFY, adam(model))


def test_a_large_epsilon_is_the_cause_of_small_steps() -> None:
    model = net()
    finding = found(model, data("classes"), CLASSIFY, adam(model, eps=10.0))["rate-too-low"]
    assert "ε of 10" in finding.cause


def test_maximize() -> None:
    model = net()
    serious = found(model, data("classes"), CLASSIFY, torch.optim.SGD(model.parameters(), 0.1, maximize=True))
    assert next(iter(serious)) == "loss-maximized"


def test_a_warm_up_from_zero_is_no_fault() -> None:
    model = net()
    optimizer = adam(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 100)
    assert not found(model, data("classes"), CLASSIFY, optimizer)
    still = adam(model, 0.0)
    assert "was given a rate of zero" in found(model, data("classes"), CLASSIFY, still)["parameter-not-stepped"].cause


def test_branches_that_start_shut_do_not_make_the_rate_low() -> None:
    class Shut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gate = nn.Linear(64, 64), nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gate * F.relu(self.layer(x))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 64), *(Shut() for _ in range(6)), nn.Linear(64, CLASSES))
    assert not found(model, data("classes"), CLASSIFY, torch.optim.Adam(model.parameters()))


def test_a_teacher_under_no_grad_and_a_backbone_in_evaluation_mode_are_meant() -> None:
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = net(), net().requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = self.teacher(x + 0.1)
            return self.student(x) - 0.1 * wanted

    assert not found(Student(), data("classes"), CLASSIFY)
    model = net()
    model[0].requires_grad_(False)
    assert "parameter-frozen" in found(model, data("classes"), CLASSIFY)
    model[0].eval()
    assert "parameter-frozen" not in found(model, data("classes"), CLASSIFY)


def test_evaluation_leaves_the_model_and_the_random_state_alone() -> None:
    model = net(CLASSES, nn.Dropout(0.5), norm=nn.BatchNorm1d(64))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    batch = data("classes")[0]
    result = evaluate(model, [batch], CLASSIFY)
    total, units = CLASSIFY.loss(model.eval(), batch)
    assert result.mixed_by is None
    assert result.loss == pytest.approx(float(total / units), rel=1e-6)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_samples_that_draw_numbers_of_their_own_do_not_look_mixed() -> None:
    generator = torch.Generator().manual_seed(0)

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x + 0.1 * torch.randn(x.shape, generator=generator))

    assert evaluate(Noisy(), data("classes"), CLASSIFY).mixed_by is None


@pytest.mark.parametrize("scale", [1e-35, 1e-18, 1.0, 1e18, 1e30])
def test_moments_have_no_scale(scale: float) -> None:
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) + 2
    found = moments(x * scale)
    wide = (x * scale).double()
    assert found.is_finite
    assert found.rms == pytest.approx(float(wide.square().mean().sqrt()), rel=1e-5)
    assert found.between == pytest.approx(float(wide.std(0, correction=0).square().mean().sqrt()), rel=1e-5)


def test_a_branch_on_the_mode_is_told() -> None:
    class Branch(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.net, self.factor = net(norm=nn.BatchNorm1d(64)), factor

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * (1.0 if self.training else self.factor)

    def averaged(model: nn.Module) -> nn.Module:
        for _ in range(40):
            model(data("classes")[0][0])
        return model

    assert "modes-disagree" in found(averaged(Branch(40.0)), data("classes"), CLASSIFY)
    assert not found(averaged(Branch(1.0)), data("classes"), CLASSIFY)
    assert not found(Branch(1.0), data("classes"), CLASSIFY)  # statistics that have not settled


# ---- what users make and lists of faults forget ----------------------------------------------------------------------


def test_layers_in_a_python_list_are_not_the_models() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.layers = nn.Linear(WIDTH, 32), [nn.Linear(32, 32) for _ in range(2)]
            self.head = nn.Linear(32, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for layer in self.layers:
                x = F.relu(layer(x))
            return self.head(x)

    serious = found(Hidden(), data("classes"), CLASSIFY)
    assert next(iter(serious)) == "parameter-unregistered"
    assert "4 parameters" in serious["parameter-unregistered"].title


def test_all_frozen() -> None:
    finding = found(net().requires_grad_(False), data("classes"), CLASSIFY)["parameter-frozen"]
    assert finding.severity == "error"


def test_a_training_step_that_fails_is_no_clean_verdict() -> None:
    batches = [(x[:1], y[:1]) for x, y in data("classes")]
    assert "training-fails" in found(net(norm=nn.BatchNorm1d(64)), batches, CLASSIFY)


def test_a_softmax_over_one_value() -> None:
    serious = found(net(1, nn.Softmax(1)), data("number"), loss(lambda s, y: F.mse_loss(s.squeeze(-1), y)))
    assert next(iter(serious)) in ("softmax-single-value", "output-range")
    assert "softmax-single-value" in serious


def test_labels_that_are_not_finite() -> None:
    batches = [(x, torch.where(torch.arange(N) == 3, torch.nan, y)) for x, y in data("number")]
    serious = found(net(1), batches, loss(lambda s, y: (s.squeeze(-1) - y).square().mean()))
    assert next(iter(serious)) == "labels-non-finite"
    assert "loss-non-finite" not in serious


def test_inputs_that_a_norm_or_the_model_rescales_are_not_judged() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x / 255)

    batches = [(255 * x, y) for x, y in data("classes")]
    assert "input-scale" in found(net(), batches, CLASSIFY)
    assert not found(nn.Sequential(nn.BatchNorm1d(WIDTH), net()), batches, CLASSIFY)
    assert not found(Scaled(), batches, CLASSIFY)


def test_a_norm_that_is_called_on_two_kinds_of_data_is_not_judged_by_the_first() -> None:
    model = net(1, norm=nn.BatchNorm1d(64))
    batches = [(x, 0.05 * x + 3) for x, _ in data("number")]
    assert not found(model, batches, lambda m, b: F.softplus(-m(b[0])).mean() + F.softplus(m(b[1])).mean())


def test_a_weighted_log_probability_is_one() -> None:
    def focal(scores: Tensor, y: Tensor) -> Tensor:
        log_p = F.log_softmax(scores, 1)
        return F.nll_loss((1 - log_p.exp()) ** 2 * log_p, y)

    assert not found(net(), data("classes"), loss(focal))


def test_rates_that_fall_by_layer_are_no_fault() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 32), *(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(12)))
    model.append(nn.Linear(32, CLASSES))
    gm.init.isometric_(model, data("classes")[0][0])
    groups = [{"params": list(m.parameters()), "lr": 1e-3 * 0.4 ** (13 - i)} for i, m in enumerate(model)]
    assert not found(model, data("classes"), CLASSIFY, torch.optim.Adam(groups))


def test_nodes_of_a_graph_mix_on_purpose() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.register_buffer("adjacency", torch.eye(N) + torch.eye(N).roll(1, 0))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.adjacency @ x)

    assert "samples-mixed" not in found(Graph(), data("classes"), CLASSIFY)


def test_arrays_and_batches_of_many_parts() -> None:
    pairs = data("classes")
    assert not found(net(), [(x.numpy(), y.numpy()) for x, y in pairs], CLASSIFY)
    assert not found(net(), [(x, x, x, y) for x, y in pairs], lambda m, b: F.cross_entropy(m(b[0]), b[3]))


def test_a_model_that_returns_something_else_in_evaluation_mode() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor, y: Tensor) -> Any:
            scores = self.net(x)
            return {"loss": F.cross_entropy(scores, y)} if self.training else [scores.argmax(1)]

    report = gm.inspect(Detector(), data("classes"), lambda m, b: m(*b)["loss"])
    assert report.not_looked_at.keys() >= {"evaluation mode"}
    assert not [f for f in report.findings if f.severity == "error"]


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(gm.errors.InputError, match="optimizer"):
        gm.inspect(net(), data("classes"), CLASSIFY, optimizer="adam")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("function", "sign", "is_told"),
    [
        (lambda v: 2 * F.relu(v), -1, True),
        (lambda v: F.relu(v) * 2, 1, False),
        (lambda v: -F.relu(v), 1, True),
        (lambda v: -F.relu(v), -1, False),
        (lambda v: -v.sigmoid(), 1, True),
        (lambda v: v.sigmoid().mul_(100), 1, False),
        (lambda v: F.relu(v) - 100, -1, False),
    ],
)
def test_the_range_of_a_scaled_or_negated_function(
    function: Callable[[Tensor], Tensor], sign: float, is_told: bool
) -> None:
    class Last(nn.Module):
        def forward(self, v: Tensor) -> Tensor:
            return function(v).squeeze(1)

    batches = [(x, sign * (y.abs() + 0.1)) for x, y in data("number")]
    assert ("output-range" in found(net(1, Last()), batches, loss(F.mse_loss))) == is_told
