"""Weights as models use them: experts by loops, gathers and groups; weights that are scaled, masked, reparametrized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import gramian as gm
from cases import seeded

REGRESS = gm.Objective.regression()
N, IN, OUT = 12, 8, 4  # rows, inputs, outputs; multiples of 16 bytes, which grouped_mm wants


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(normal(N, IN, seed=s), normal(N, OUT, seed=s + 10)) for s in (0, 1)]


def second(t: Tensor) -> Tensor:
    return (t.double().mT @ t.double()).detach()


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5 * float(wanted.abs().max()))


# ---- experts ---------------------------------------------------------------------------------------------------------

NUM_EXPERTS = 4


class Experts(nn.Module):
    """Each row goes to one of the first three of four experts, by its first entry: (expert, out, in)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(NUM_EXPERTS, OUT, IN, seed=3))

    def chosen(self, x: Tensor) -> Tensor:
        return torch.bucketize(x[:, 0].contiguous(), torch.tensor([-0.5, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Loop(Experts):
    def forward(self, x: Tensor) -> Tensor:
        chosen, out = self.chosen(x), torch.zeros(len(x), OUT)
        for e in chosen.unique():  # a tensor, as in transformers
            where = (chosen == e).nonzero().flatten()
            out.index_add_(0, where, F.linear(x[where], self.weight[e]))
        return out


class LoopOfProducts(Experts):
    def forward(self, x: Tensor) -> Tensor:
        chosen, out = self.chosen(x), torch.zeros(len(x), OUT)
        for e, w in enumerate(self.weight.unbind()):
            out[chosen == e] = x[chosen == e] @ w.T
        return out


class Gathered(Experts):
    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(self.weight[self.chosen(x)], x.unsqueeze(-1)).squeeze(-1)


class GatheredByIndexSelect(Experts):
    def forward(self, x: Tensor) -> Tensor:
        chosen = self.weight.transpose(1, 2).index_select(0, self.chosen(x))
        return torch.baddbmm(torch.zeros(len(x), 1, OUT), batch1=x.unsqueeze(1), batch2=chosen).squeeze(1)


class GatheredByEinsum(Experts):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nd,nod->no", x, self.weight[self.chosen(x)])


class Grouped(Experts):
    def forward(self, x: Tensor) -> Tensor:
        order = self.chosen(x).argsort(stable=True)
        ends = torch.bincount(self.chosen(x), minlength=NUM_EXPERTS).cumsum(0).int()
        out = torch._grouped_mm(x[order], self.weight.transpose(-2, -1), offs=ends)
        return torch.zeros_like(out).index_copy(0, order, out)


@pytest.mark.parametrize("kind", [Loop, LoopOfProducts, Gathered, GatheredByIndexSelect, GatheredByEinsum, Grouped])
def test_experts_have_the_rows_that_were_sent_to_them(kind: type[Experts]) -> None:
    model = kind()
    stats = gm.capture(model, batches(), REGRESS, fisher="empirical", layouts={"weight": "e o i -> e o i"})
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    chosen = model.chosen(x)
    site = stats["weight"].only
    assert site.A is not None
    assert site.G is not None
    assert site.calls == {Loop: 6, LoopOfProducts: 8}.get(kind, 2)
    assert site.A.count.tolist() == torch.bincount(chosen, minlength=NUM_EXPERTS).tolist()
    assert site.A.count[-1] == 0
    for e in range(NUM_EXPERTS):
        rows = x[chosen == e]
        g = rows @ model.weight[e].T - y[chosen == e]
        close(site.A.matrix[e], second(rows) / max(1, len(rows)))
        close(site.G.matrix[e], second(g) / len(x))
    assert stats.coverage == 1.0
    assert not stats.summary()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_transformers_run_experts_in_three_ways(how: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=20, num_local_experts=6, experts_implementation=how,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    tokens = torch.randint(20, (2, 4), generator=seeded(0))
    given: list[tuple[Tensor, Tensor]] = []
    experts = model.model.layers[0].mlp.experts
    handle = experts.register_forward_pre_hook(lambda m, args: given.append((args[0].detach(), args[1])))
    stats = gm.capture(model, [tokens], lambda m, b: m(input_ids=b, labels=b).loss)
    handle.remove()
    up, down = (stats[f"model.layers.0.mlp.experts.{name}_proj"].only for name in ("gate_up", "down"))
    (x, chosen), act = given[0], torch.nn.functional.silu
    counts = torch.bincount(chosen.flatten(), minlength=6)
    assert 0 in counts
    assert up.A.count.tolist() == down.A.count.tolist() == counts.tolist()
    for e in range(6):
        rows = x[(chosen == e).any(-1)]
        gate, value = (rows @ experts.gate_up_proj[e].T).chunk(2, -1)
        close(up.A.matrix[e], second(rows) / max(1, len(rows)))
        close(down.A.matrix[e], second(act(gate) * value) / max(1, len(rows)))
        # Σ g xᵀ is the gradient: the sides of the gradient lie in those of G and A.
        assert bool(up.G.matrix[e].any()) == bool(len(rows))
    assert stats.coverage == 1.0


# ---- the weight that is applied --------------------------------------------------------------------------------------


class Applied(nn.Module):
    """A linear layer whose weight is some function of the parameter."""

    def __init__(self, applied: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(OUT, IN, seed=3))
        self.up, self.down = nn.Parameter(normal(OUT, 2, seed=4)), nn.Parameter(normal(2, IN, seed=5))
        self.gain = nn.Parameter(normal(OUT, 1, seed=6))
        self.register_buffer("mask", (normal(OUT, IN, seed=7) > 0).float())
        self.applied = applied

    def matrix(self) -> Tensor:
        return self.applied(self, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix())


APPLIED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "scaled": lambda m, w: 0.5 * w,
    "equalized": lambda m, w: w * torch.tensor(3.0),
    "divided": lambda m, w: w / w.norm(dim=1, keepdim=True) * m.gain,
    "standardized": lambda m, w: (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True),
    "normalized": lambda m, w: F.normalize(w, dim=1),
    "masked": lambda m, w: w * m.mask,
    "masked_fill": lambda m, w: w.masked_fill(m.mask == 0, 0.0),
    "merged": lambda m, w: w + (m.up @ m.down) * 2,
    "rounded": lambda m, w: w + ((w * 8).round() / 8 - w).detach(),
    "cast": lambda m, w: w.double().float().contiguous(),
    "transposed twice": lambda m, w: w.t().contiguous().permute(1, 0),
    "detached": lambda m, w: w.detach().clone(),
    "data": lambda m, w: w.data,
    "squeezed": lambda m, w: w.unsqueeze(0).squeeze(0),
    "viewed": lambda m, w: w.view(1, OUT, IN)[0],
}


@pytest.mark.parametrize("name", APPLIED)
def test_the_site_is_that_of_the_weight_that_is_applied(name: str) -> None:
    model = Applied(APPLIED[name])
    stats = gm.capture(model, batches(), REGRESS, fisher="empirical")
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    site = stats["weight"].only
    assert site.A is not None, site.reason
    assert site.G is not None, site.reason
    close(site.A.matrix, second(x) / len(x))
    close(site.G.matrix, second(x @ model.matrix().T - y) / len(x))


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning, match="deprecated"):
        return torch.nn.utils.weight_norm(layer)


REPARAMETRIZED: dict[str, tuple[Callable[[nn.Linear], nn.Module], str]] = {
    "weight_norm": (parametrizations.weight_norm, "parametrizations.weight.original1"),
    "spectral_norm": (parametrizations.spectral_norm, "parametrizations.weight.original"),
    "orthogonal": (parametrizations.orthogonal, "parametrizations.weight.original"),
    "old weight_norm": (old_weight_norm, "weight_v"),
    "old spectral_norm": (torch.nn.utils.spectral_norm, "weight_orig"),
    "pruned": (lambda m: prune.random_unstructured(m, "weight", 0.5), "weight_orig"),
}


@pytest.mark.parametrize("name", REPARAMETRIZED)
def test_reparametrized_layers_have_one_site(name: str) -> None:
    torch.manual_seed(0)
    change, weight = REPARAMETRIZED[name]
    model = change(nn.Linear(IN, OUT))
    model.eval()
    stats = gm.capture(model, batches(), REGRESS, fisher="empirical")
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    site = stats[weight].only
    assert (site.A is None, site.reason) == (False, "")
    assert site.calls == 2
    close(site.A.matrix, second(x) / len(x))
    close(site.G.matrix, second(model(x) - y) / len(x))
    assert not stats.other_uses


REPEATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "expanded": lambda x, w: torch.bmm(x, w.unsqueeze(0).expand(3, -1, -1)),
    "unsqueezed": lambda x, w: x @ w.unsqueeze(0),
    "left": lambda x, w: torch.bmm(w.T.expand(3, -1, -1), x.mT).mT,
    "by einsum": lambda x, w: torch.einsum("bti,bio->bto", x, w.expand(3, -1, -1)),
}


class Repeated(nn.Module):
    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.use = nn.Parameter(normal(IN, OUT, seed=3)), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x.view(3, 4, IN), self.weight).flatten(0, 1)


@pytest.mark.parametrize("name", REPEATED)
def test_a_weight_that_is_repeated_over_the_batch(name: str) -> None:
    model = Repeated(REPEATED[name])
    stats = gm.capture(model, batches(), REGRESS, fisher="empirical")
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    site = stats["weight"].only
    assert site.A is not None, site.reason
    close(site.A.matrix, second(x) / len(x))
    close(site.G.matrix, second(x @ model.weight - y) / len(x))


# ---- uses that are not captured --------------------------------------------------------------------------------------

NAMED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mul": lambda x, w: (x[:, None] * w).sum(-1),
    "linalg.vecdot": lambda x, w: torch.linalg.vecdot(x[:, None], w),
    "cdist": lambda x, w: torch.cdist(x, w),
    "cat": lambda x, w: F.linear(x, torch.cat([w, w])[:OUT]),
    "matmul": lambda x, w: (x @ w.T.expand(3, -1, -1)).sum(0),
    "stack": lambda x, w: F.linear(x, torch.stack([w, w])[0]),
    "pad": lambda x, w: F.linear(F.pad(x, (0, 1)), F.pad(w, (0, 1))),
    "indexing": lambda x, w: F.linear(x, w[torch.arange(OUT)]),
    "index_select": lambda x, w: F.linear(x, w.index_select(0, torch.arange(OUT))),
    "gather": lambda x, w: F.linear(x, w.gather(0, torch.zeros(OUT, IN, dtype=torch.long))),
    "where": lambda x, w: torch.where(x[:, None] > 0, w, 0.0).sum(-1),
    "linear (of a slice or reshape of it)": lambda x, w: F.pad(F.linear(x, w[1:]), (0, 1)),
    "linear, as an input": lambda x, w: x[:, :OUT] + F.linear(w, OTHER.weight)[:, 0],
}  # fmt: skip
OTHER = nn.Linear(IN, OUT)


class Named(nn.Module):
    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], *, beside: bool) -> None:
        super().__init__()
        self.weight, self.other = nn.Parameter(normal(OUT, IN, seed=3)), OTHER
        self.use, self.beside = use, beside

    def forward(self, x: Tensor) -> Tensor:
        out = self.use(x, self.weight) + self.other(x)
        return out + F.linear(x, self.weight) if self.beside else out


@pytest.mark.parametrize("name", NAMED)
def test_a_use_that_is_not_captured_is_named(name: str) -> None:
    stats = gm.capture(Named(NAMED[name], beside=False), batches(), REGRESS)
    assert stats["weight"].only.A is None
    assert stats["weight"].reason == f"used only by {name}, which is not captured"
    assert stats.coverage == 0.5
    assert any(f"used only by {name}" in line and "50.0%" in line for line in stats.summary())


@pytest.mark.parametrize("name", ["mul", "cdist", "where"])
def test_a_second_use_that_is_not_captured_is_told(name: str) -> None:
    stats = gm.capture(Named(NAMED[name], beside=True), batches(), REGRESS)
    assert stats["weight"].only.A is not None
    assert stats.other_uses == {"weight": [name]}
    assert stats.summary() == [f"weight is also used by {name}, which is not captured."]


def test_a_penalty_on_weights_is_no_use() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1]) + 0.1 * sum(
            p.square().sum() + p.norm() for p in model.parameters()
        )

    stats = gm.capture(nn.Linear(IN, OUT), batches(), loss)
    assert stats["weight"].only.calls == 2
    assert not stats.other_uses
    assert not stats.summary()


def test_parameters_that_are_no_block_count() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights, self.linear = nn.Parameter(normal(2, OUT, IN)), nn.Linear(IN, OUT)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + F.linear(x, self.weights[1])

    stats = gm.capture(Odd(), batches(), REGRESS)
    assert stats.coverage == pytest.approx(1 / 3)
    assert stats.summary()[-1] == (
        "Not captured, which matrices it holds is not known (1; 66.7% of these parameters): weights"
    )
    merged = gm.Statistics().merge(stats)
    assert merged.coverage == stats.coverage


def test_two_calls_of_the_model_are_one_site_with_the_rows_of_both() -> None:
    def contrast(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]) @ model(batch[0].flip(0) + 1).T, torch.arange(N))

    model = nn.Linear(IN, OUT, bias=False)
    stats = gm.capture(model, batches()[:1], contrast)
    x = batches()[0][0]
    one, two = model(x), model(x.flip(0) + 1)
    loss = N * F.cross_entropy(one @ two.T, torch.arange(N))
    g = torch.cat(torch.autograd.grad(loss, [one, two]))
    site = stats["weight"].only
    close(site.A.matrix, second(torch.cat([x, x.flip(0) + 1])) / (2 * N))
    close(site.G.matrix, second(g) / N)
