"""What starts small on purpose is no fault: branches that grow from zero, heads, tables, gains of entries."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm

N, D, WIDTH = 64, 8, 32
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
BATCHES = [(X, (X[:, 0] * X[:, 1] > 0).long())]


class Branch(nn.Module):
    """A layer beside which a low-rank branch is added, whose last matrix is zero times `size`."""

    def __init__(self, size: float = 0.0) -> None:
        super().__init__()
        self.first, self.base = nn.Linear(D, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.down, self.up = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, 2)
        self.up.weight.data.mul_(size)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.first(x))
        return self.head(self.base(h) + self.up(self.down(h)))


def entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def told(report: gm.Report | gm.watch) -> set[str]:
    return {f.code for f in report.findings if f.severity != "info"}


@pytest.mark.parametrize("rate", [1e-4, 1e-3])
def test_a_matrix_that_grows_from_zero_is_no_fault(rate: float) -> None:
    torch.manual_seed(0)
    model = Branch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    with gm.watch(model, optimizer, raise_on="error", every=1, share=None):
        for step in range(8):
            entropy(model, BATCHES[0]).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step in (0, 7):
                assert not told(gm.inspect(model, BATCHES, entropy, optimizer=optimizer)), step


def test_a_watch_knows_what_was_zero_when_it_began() -> None:
    torch.manual_seed(0)
    model = Branch()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gm.watch(model, optimizer, every=1, share=None) as watched:
        for _ in range(4):
            entropy(model, BATCHES[0]).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert bool(model.up.weight.any())
    assert not told(watched) & {"parameter-scale-small", "parameter-rank-one"}


def test_a_matrix_that_was_drawn_small_is_told() -> None:
    torch.manual_seed(0)
    model = Branch(1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert "parameter-scale-small" in told(gm.inspect(model, BATCHES, entropy, optimizer=optimizer))
    with gm.watch(model, optimizer) as watched:
        entropy(model, BATCHES[0]).backward()
        optimizer.step()
    assert "parameter-scale-small" in told(watched)


class Actor(nn.Module):
    """Two heads, of which `first` is registered before the other; the policy's begins small."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        for name in sorted(("policy", "value"), key=lambda name: name != first):
            self.add_module(name, nn.Linear(WIDTH, 3))
        self.policy.weight.data.mul_(0.01)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.policy(h), self.value(h)


@pytest.mark.parametrize("first", ["policy", "value"])
def test_all_output_layers_are_heads_in_a_watch(first: str) -> None:
    torch.manual_seed(0)
    model = Actor(first)
    optimizer = torch.optim.AdamW(model.parameters())
    with gm.watch(model, optimizer, raise_on="error"):
        scores, values = model(X)
        (F.cross_entropy(scores, BATCHES[0][1]) + values.square().mean()).backward()
        optimizer.step()


class Entries(nn.Module):
    """A layer with a parameter of ones that is no matrix, by the way it is used; `matrix` is one."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use, self.into, self.mid = use, nn.Linear(D, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 2)
        shape = {"rows": (3, WIDTH), "logits": (3, 3)}.get(use, (WIDTH, WIDTH))
        self.ones = nn.Parameter(torch.full(shape, 0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.into(x))
        if self.use == "rows":
            h = torch.tanh(self.mid(sum(h * a + h.roll(1, 0) * (1 - a) for a in self.ones)))
        elif self.use == "scales":
            h = F.linear(h, self.mid.weight * self.ones)
        elif self.use == "einsum":
            h = torch.einsum("bi,oi,oi->bo", h, self.mid.weight, self.ones)
        elif self.use == "logits":
            h = (self.ones.softmax(-1) @ torch.stack([h, h**2, torch.tanh(self.mid(h))], 1)).sum(1)
        else:
            h = self.mid(torch.einsum("bi,oi->bo", h, self.ones))
        return self.head(h)


@pytest.mark.parametrize("use", ["rows", "scales", "einsum", "logits", "matrix"])
def test_only_a_factor_of_a_product_must_not_be_constant(use: str) -> None:
    torch.manual_seed(0)
    model = Entries(use)
    found = told(gm.inspect(model, BATCHES, entropy))
    assert ("parameter-constant" in found) == (use == "matrix")
    optimizer = torch.optim.SGD(model.parameters())
    with gm.watch(model, optimizer) as watched:
        entropy(model, BATCHES[0]).backward()
        optimizer.step()
    assert ("parameter-constant" in told(watched)) == (use == "matrix")


def test_a_loss_that_is_not_finite_comes_before_weights_that_are_alike() -> None:
    torch.manual_seed(0)
    model = Entries("matrix")
    report = gm.inspect(model, BATCHES, lambda model, batch: (model(batch[0]).square().sum() - 1e9).log())
    assert (report.findings[0].code, report.findings[0].follows) == ("loss-non-finite", "")


class Pairs(nn.Module):
    """Vectors of two tables, word2vec's; with `deep`, layers that take the first's rows."""

    def __init__(self, *, deep: bool) -> None:
        super().__init__()
        self.one, self.other = nn.Embedding(50, WIDTH), nn.Embedding(50, WIDTH)
        nn.init.uniform_(self.one.weight, -1e-3, 1e-3)
        nn.init.zeros_(self.other.weight) if not deep else None
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)) if deep else None

    def forward(self, i: Tensor, j: Tensor) -> Tensor:
        h = self.one(i) if self.layers is None else self.layers(self.one(i))
        return (h * self.other(j)).sum(-1)


@pytest.mark.parametrize("deep", [False, True])
def test_small_vectors_are_lost_where_layers_take_them(*, deep: bool) -> None:
    torch.manual_seed(0)
    model, pairs = Pairs(deep=deep), torch.randint(50, (2, N))
    optimizer = torch.optim.SGD(model.parameters())
    with gm.watch(model, optimizer) as watched:
        F.softplus(-model(*pairs)).mean().backward()
        optimizer.step()
    assert ("embedding-scale" in told(watched)) == deep
    assert "zero-weights" not in told(watched)


def test_an_isometry_mirrored_for_relus_is_not_rank_deficient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))
    gm.init.isometric_(model, BATCHES[0])
    assert "rank-deficient" not in {f.code for f in gm.inspect(model).findings}
    model[2].weight.data.copy_(torch.randn(WIDTH, WIDTH // 2) @ torch.randn(WIDTH // 2, WIDTH))
    assert "rank-deficient" in {f.code for f in gm.inspect(model).findings}
