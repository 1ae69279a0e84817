"""`inspect` runs on models that are no chain of layers, and says what it could not measure and why."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from cases import seeded
from gramian.operators import end_to_end_jacobian

N, D = 12, 6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def tower(outputs: int = D) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, outputs))


class Towers(nn.Module):
    """Two encoders that meet in the loss, as in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = tower(), tower()

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        return {"scores": self.image(image) @ self.text(text).T}


class Graph(nn.Module):
    """A graph network: rows are nodes, and each layer mixes neighbors."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer in (self.one, self.two):
            x = layer(x)
            x = torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]).relu()
        return self.head(x)


class Unused(nn.Module):
    """A pooler that is called and whose output the loss does not use, and one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.pooler, self.other = tower(), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        return x, self.pooler(x).tanh()


class Output(NamedTuple):
    last: Tensor
    hidden: tuple[Tensor, ...]


class Structured(nn.Module):
    """An output of nested tuples, from keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tower()

    def forward(self, *, x: Tensor, labels: Tensor) -> Output:
        return Output(self.body(x), (x,))


class Lookup(nn.Module):
    """Only a table and a function: no module after the first is a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, D)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.table(tokens).mean(1), self.table.weight)


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    batch: Any
    loss: Callable[[nn.Module, Any], Tensor]
    notes: tuple[str, ...]


labels = torch.arange(N) % 3
ring = torch.stack([torch.arange(N), (torch.arange(N) + 1) % N])
CASES: dict[str, Case] = {
    "towers": Case(
        Towers, {"image": normal(N, D), "text": normal(N, D, seed=1)},
        lambda m, b: F.cross_entropy(m(**b)["scores"], torch.arange(len(b["image"]))),
        ("does not depend on that of image.0.weight", "gradient of the first layer against the last"),
    ),
    "called twice": Case(
        tower, (normal(N, D), normal(N, D, seed=1)),
        lambda m, b: F.cross_entropy(m(b[0]) @ m(b[1]).T, torch.arange(len(b[0]))),
        ("used several times", "gains of 3 of 3 layers"),
    ),
    "graph": Case(Graph, (normal(N, D), ring, labels), lambda m, b: F.cross_entropy(m(*b[:2]), b[2]), (
        "and no samples",
    )),
    "unused": Case(Unused, (normal(N, D),), lambda m, b: m(b[0])[0].square().mean(), (
        "Not captured, no gradient reached it (1; 20.0% of these parameters): pooler.weight",
        "Not captured, no batch reached it (1; 20.0% of these parameters): other.weight",
    )),
    "structured": Case(Structured, UserDict(x=normal(N, D), labels=labels), lambda m, b: F.cross_entropy(
        m(**b).last, b["labels"]), ("Measured without dropout",)),
    "ordered": Case(Structured, OrderedDict(x=normal(N, D), labels=labels), lambda m, b: F.cross_entropy(
        m(**b).last, b["labels"]), ("Measured without dropout",)),
    "lookup": Case(Lookup, (torch.arange(N)[:, None] % 9, labels), lambda m, b: F.cross_entropy(m(b[0]), b[1]), (
        "fewer than two layers",
    )),
    "sum over rows": Case(
        lambda: nn.Sequential(nn.Linear(D, D), nn.Flatten(0), nn.Linear(N * D, 2)), (normal(N, D),),
        lambda m, b: m(b[0]).square().mean(), (f"0.weight has {N} rows and 2.weight has {N * D}",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_inspect_says_what_it_could_not_measure(name: str) -> None:
    case = CASES[name]
    report = gm.inspect(case.make(), [case.batch], case.loss)
    said = [*report.notes, *(f"{what}: {why}" for what, why in report.not_looked_at.items())]
    for note in case.notes:
        assert any(note in line for line in said), said
    assert not [f.code for f in report.findings if f.severity == "error"]
    assert not any("Error" in line for line in said)


def test_the_sums_of_two_towers() -> None:
    model, case = Towers(), CASES["towers"]
    stats = gm.capture(model, [case.batch], case.loss)
    for name, side in (("image.0.weight", "image"), ("text.0.weight", "text")):
        x = case.batch[side].double()
        torch.testing.assert_close(stats[name].A.matrix, x.T @ x / N, rtol=1e-5, atol=1e-6)
        assert stats[name].G.count == N


def test_a_measurement_that_fails_is_left_out_with_its_error() -> None:
    class Picky(nn.Module):
        """Wants its first layer's own input tensor, which a measurement of gains replaces."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(D, D), nn.Linear(D, 2)
            self.one.register_forward_hook(self.look)

        def look(self, module: nn.Module, args: tuple, output: Tensor) -> None:
            if args[0] is not self.given:
                raise RuntimeError("another tensor.\nmore")

        def forward(self, x: Tensor) -> Tensor:
            self.given = x
            return self.two(self.one(x).relu())

    report = gm.inspect(Picky(), [normal(N, D)], lambda m, b: m(b).square().mean())
    assert report.not_looked_at["gains"] == "RuntimeError: another tensor"
    assert report.not_looked_at["end-to-end Jacobian"] == "RuntimeError: another tensor"
    assert "gains (RuntimeError: another tensor)" in report.verdict
    assert all(layer.gradient_rms is not None for layer in report.layers)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.w = nn.Linear(D, D), nn.Parameter(normal(D + 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) @ self.w


MISFITS = {
    "first": (nn.Sequential(nn.Linear(D + 1, 2)), normal(N, D), r"0 \(Linear\) .*\(12, 6\) and wants 7 features"),
    "middle": (nn.Sequential(nn.Linear(D, D), nn.Linear(9, 2)), normal(N, D), r"1 \(Linear\) .* wants 9 features"),
    "channels": (nn.Sequential(nn.Conv2d(3, 2, 3)), normal(N, 1, 5, 5), r"0 \(Conv2d\) .* wants 3 channels"),
    "tokens": (nn.Sequential(nn.Embedding(4, 2)), torch.arange(9), r"from 0 to 8 and wants integers from 0, below 4"),
    "no layer's": (Product(), normal(N, D), r"the model \(Product\) cannot run on a tensor of shape \(12, 6\)"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_forward_pass_that_fails_is_one_line_with_the_module(name: str) -> None:
    model, x, told = MISFITS[name]
    with pytest.raises(gm.errors.InputError, match=told) as caught:
        gm.inspect(model, [x], lambda m, b: m(b).square().mean())
    assert "\n" not in str(caught.value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_rows_that_mix_have_no_jacobian_of_a_sample() -> None:
    case = CASES["graph"]
    assert end_to_end_jacobian(case.make(), case.batch, case.loss) is None
    apart = torch.stack([torch.arange(N), torch.arange(N)])
    jacobian = end_to_end_jacobian(case.make(), (case.batch[0], apart, labels), case.loss)
    assert jacobian is not None
    assert jacobian.shape == (N, D, D)


def test_layouts_reach_the_capture() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(normal(2, D, D))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.stack[0]).tanh(), self.stack[1])

    report = gm.inspect(Fused(), [normal(N, D)], lambda m, b: m(b).square().mean(), layouts={"stack": "e o i -> e o i"})
    assert len(report.layers) == 2
    assert all(layer.gradient_rms for layer in report.layers)


def test_gradients_that_the_caller_switched_off_are_no_cut_graph() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(64, 8)
    told = [gm.inspect(model, [(x, x[:, :4].argmax(1))], gm.Objective.classification(), quick=True)]
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            batch = (x * 1, x[:, :4].argmax(1))
            told.append(gm.inspect(model, [batch], gm.Objective.classification(), quick=True))
            assert not torch.is_grad_enabled()
    assert len({str(report.findings) for report in told}) == 1
    assert "graph-cut" not in {f.code for f in told[0].findings}


class Jagged(nn.Module):
    """A network for samples of different lengths, which are averaged."""

    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(D, 16), nn.Linear(16, 3)
        self.first.bias.data.add_(bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([t.mean(0) for t in self.last(self.first(x).relu()).unbind()])


def test_jagged_batches_are_no_fault_and_a_fault_in_them_is_found() -> None:
    lengths = (3, 5, 7, 4, 6, 2, 8, 5)
    batches = []
    for i in range(2):
        rows = [normal(n, D, seed=10 * i + k) for k, n in enumerate(lengths)]
        batches.append((torch.nested.nested_tensor(rows, layout=torch.jagged), torch.arange(8) % 3))
    report = gm.inspect(Jagged(), batches, gm.Objective.classification())
    assert not [f for f in report.findings if f.severity != "info"]
    assert "nested" in report.not_looked_at["gains"]
    codes = [f.code for f in gm.inspect(Jagged(-20.0), batches, gm.Objective.classification()).findings]
    assert codes[0] == "dead-units"


def test_a_watch_that_fails_is_no_fault_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("in the watch")

    monkeypatch.setattr("gramian.inspection.passes.watched_pass.squares", fails)
    report = gm.inspect(tower(3), [(normal(N, D), torch.arange(N) % 3)], gm.Objective.classification())
    assert "training-fails" not in {f.code for f in report.findings}
    assert "in the watch" in report.not_looked_at["causes"]
