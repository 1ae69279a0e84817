"""Weights that are put together, standardized or reshaped before use; and masks that follow the rows of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from cases import seeded
from gramian.recording.recorder import INFERENCE, WITHOUT_AUTOGRAD

REGRESS = gm.Objective.regression()
N, IN, ONE, TWO = 12, 5, 4, 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


# ---- put together ----------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self, use: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(normal(ONE, IN, seed=1)), nn.Parameter(normal(TWO, IN, seed=2))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.one, self.two)


OUTPUTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda x, a, b: F.linear(x, torch.cat([a, b])),
    "concat": lambda x, a, b: F.linear(x, torch.concat(tensors=(a, b), dim=-2)),
    "vstack": lambda x, a, b: F.linear(x, torch.vstack([a, b])),
    "transposed": lambda x, a, b: x @ torch.cat([a, b]).T,
    "columns": lambda x, a, b: x @ torch.cat([a.T, b.T], 1),
    "left": lambda x, a, b: (torch.cat([a, b]) @ x.T).T,
    "scaled": lambda x, a, b: F.linear(x, 1.0 * torch.cat([a, b]).clone()),
    "einsum": lambda x, a, b: torch.einsum("nd,od->no", x, torch.cat([a, b])),
    "convolution": lambda x, a, b: F.conv1d(x.unsqueeze(-1), torch.cat([a, b]).unsqueeze(-1)).squeeze(-1),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in OUTPUTS if name != "convolution"])
def test_weights_joined_along_the_outputs_share_the_input(name: str) -> None:
    model, x, y = Pair(OUTPUTS[name]), normal(N, IN, seed=3), normal(N, ONE + TWO, seed=4)
    stats = gm.capture(model, [(x, y)], REGRESS, fisher="empirical")
    g = (model(x) - y).detach()
    for site, part in ((stats["one"].only, g[:, :ONE]), (stats["two"].only, g[:, ONE:])):
        assert site.A is not None, site.reason
        close(site.A.matrix, x.T @ x / N)
        close(site.G.matrix, part.T @ part / N)
    assert not stats.summary()


def test_a_view_of_joined_weights_that_is_not_understood_is_named() -> None:
    stats = gm.capture(Pair(OUTPUTS["convolution"]), [(normal(N, IN), normal(N, ONE + TWO))], REGRESS)
    assert {stats[name].reason for name in ("one", "two")} == {"used only by cat, which is not captured"}


def test_weights_joined_along_the_inputs_have_their_own_features() -> None:
    model = Pair(lambda x, a, b: F.linear(x, torch.cat([a.T, b.T], 1)))
    x, y = normal(N, ONE + TWO, seed=3), normal(N, IN, seed=4)
    stats = gm.capture(model, [(x, y)], REGRESS, fisher="empirical")
    g = (model(x) - y).detach()
    for site, own in ((stats["one"].only, x[:, :ONE]), (stats["two"].only, x[:, ONE:])):
        assert site.transposed
        close(site.A.matrix, own.T @ own / N)
        close(site.G.matrix, g.T @ g / N)


def test_a_stack_of_weights_is_a_batch_of_products() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(IN, ONE, bias=False, dtype=torch.float64) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, torch.stack([layer.weight for layer in self.layers]).mT)

    model, x, y = Stack(), normal(3, N, IN, seed=3), normal(3, N, ONE, seed=4)
    stats = gm.capture(model, [(x, y)], REGRESS, fisher="empirical")
    g = (model(x) - y).detach()
    for e in range(3):
        site = stats[f"layers.{e}.weight"].only
        assert site.A is not None, site.reason
        close(site.A.matrix, x[e].T @ x[e] / N)
        close(site.G.matrix, g[e].T @ g[e] / (3 * N))


def test_data_beside_a_weight_makes_no_weight() -> None:
    """A prompt before the tokens is data, whatever it is multiplied by."""
    model = Pair(lambda x, a, b: F.linear(torch.cat([a, x]), b))
    stats = gm.capture(model, [(normal(N, IN), normal(N + ONE, TWO))], REGRESS)
    assert stats["one"].reason == "used only by cat, which is not captured"
    assert stats["two"].A is not None


# ---- standardized ----------------------------------------------------------------------------------------------------


class Standardized(nn.Conv2d):
    """The kernels of NFNet and of weight standardization, as timm computes them."""

    def __init__(self, how: str) -> None:
        super().__init__(3, ONE, 3, bias=False, dtype=torch.float64)
        self.how, self.gain = how, nn.Parameter(torch.ones(ONE, 1, 1, 1, dtype=torch.float64))

    def kernel(self) -> Tensor:
        if self.how == "by hand":
            var, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, correction=0)
            return self.gain * (self.weight - mean) / torch.sqrt(var + 1e-5)
        flat, gain = self.weight.reshape(1, ONE, -1), self.gain.view(-1)
        if self.how == "batch_norm":
            return F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0).reshape_as(self.weight)
        return F.layer_norm(self.weight, self.weight.shape[1:]) * self.gain

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel()).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("how", ["by hand", "batch_norm", "layer_norm"])
def test_a_standardized_kernel_is_the_weight_that_is_applied(how: str) -> None:
    model, x = Standardized(how), normal(2, 3, 6, 6, seed=3)
    y = normal(2, 16, ONE, seed=4)
    stats = gm.capture(model, [(x, y)], REGRESS, fisher="empirical")
    rows, g = F.unfold(x, 3).transpose(1, 2).flatten(0, 1), (model(x) - y).detach().flatten(0, 1)
    site = stats["weight"].only
    assert site.A is not None, site.reason
    close(site.A.matrix, rows.T @ rows / len(rows))
    close(site.G.matrix, g.T @ g / len(g))


# ---- padding ---------------------------------------------------------------------------------------------------------

TOKENS = torch.randint(1, 9, (3, 4), generator=seeded(0))
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])


class Routed(nn.Module):
    """Tokens are flattened, and each goes to one of two experts."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.table, self.how = nn.Embedding(9, IN, dtype=torch.float64), how
        self.flat = nn.Linear(IN, IN, dtype=torch.float64)
        self.experts = nn.Parameter(normal(2, IN, IN, seed=1))
        self.out = nn.Linear(IN, IN, dtype=torch.float64)
        self.head = nn.Linear(IN, 9, dtype=torch.float64)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.flat(self.table(input_ids).flatten(0, 1))
        chosen, y = input_ids.flatten() % 2, torch.zeros_like(x)
        if self.how == "gather":
            y = torch.bmm(x.repeat_interleave(1, dim=0).unsqueeze(1), self.experts[chosen]).squeeze(1)
            return self.head(self.out(y.tanh())).unflatten(0, input_ids.shape)
        for e in range(2):
            where = (chosen == e).nonzero().flatten()
            rows = x.index_select(0, where) if self.how == "index_select" else x[where]
            rows = x[chosen == e] if self.how == "bool" else rows
            rows = torch.stack([x[i] for i in where]) if self.how == "unknown" else rows
            y = y.index_add(0, where, self.out((rows @ self.experts[e]).tanh()))
        return self.head(y).unflatten(0, input_ids.shape)


@pytest.mark.parametrize("how", ["indices", "index_select", "bool", "gather"])
def test_padding_does_not_count_in_routed_rows(how: str) -> None:
    model = Routed(how)
    layouts = {"experts": "e i o -> e o i"}
    batch = {"input_ids": TOKENS, "attention_mask": MASK}
    stats = gm.capture(model, [batch], gm.Objective.next_token(), layouts=layouts)
    real, chosen = MASK.flatten() != 0, TOKENS.flatten() % 2
    x = model.flat(model.table(TOKENS).flatten(0, 1)).detach()
    site = stats["experts"].only
    assert site.A is not None, site.reason
    assert site.A.count.tolist() == [int((real & (chosen == e)).sum()) for e in range(2)]
    for e in range(2):
        rows = x[real & (chosen == e)]
        close(site.A.matrix[e], rows.T @ rows / len(rows))
    counts = {name: float(stats[f"{name}.weight"].A.count) for name in ("table", "flat", "out", "head")}
    assert counts == dict.fromkeys(counts, int(MASK.sum()))
    assert not stats.summary()


def test_rows_that_the_mask_does_not_reach_are_told() -> None:
    batch = {"input_ids": TOKENS, "attention_mask": MASK}
    layouts = {"experts": "e i o -> e o i"}
    stats = gm.capture(Routed("unknown"), [batch], gm.Objective.next_token(), layouts=layouts)
    assert "experts" in stats.padded
    assert stats.summary() == ["Padded positions count in A, which the mask does not reach in matmul: experts"]
    assert gm.Statistics().merge(stats).padded == stats.padded
    whole = gm.capture(Routed("unknown"), [{"input_ids": TOKENS}], gm.Objective.next_token(), layouts=layouts)
    assert not whole.summary()


def test_time_before_samples_is_told() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mix, self.head = nn.Embedding(9, IN), nn.Linear(IN, IN), nn.Linear(IN, 9)

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.head(self.mix(self.table(input_ids).transpose(0, 1)).transpose(0, 1))

    stats = gm.capture(TimeFirst(), [{"input_ids": TOKENS, "attention_mask": MASK}], gm.Objective.next_token())
    assert stats.padded == {"mix.weight": "linear"}
    assert float(stats["head.weight"].A.count) == int(MASK.sum())


# ---- what the statistics say -----------------------------------------------------------------------------------------


def test_layers_with_the_same_second_use_are_one_line() -> None:
    class Decomposed(nn.Module):
        """As DoRA: the norm of the weight with its update enters as a scale that data meets."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(IN, IN) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x) + torch.cdist(x, layer.weight)
            return x

    stats = gm.capture(Decomposed(), [(torch.randn(N, IN), torch.randn(N, IN))], REGRESS)
    first = "layers.0.weight, layers.1.weight, layers.2.weight and 2 more"
    assert stats.summary() == [f"{first} are also used by cdist, which is not captured."]


def test_inference_mode_is_a_reason_of_its_own() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(IN, IN), nn.Linear(IN, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                h = self.body(x)
            return self.head(h.clone())

    x: Any = torch.randn(N, IN, generator=seeded(0))
    stats = gm.capture(Frozen(), [(x, torch.zeros(N, dtype=torch.long))], gm.Objective.classification())
    assert stats["body.weight"].reason == INFERENCE
    assert INFERENCE in WITHOUT_AUTOGRAD
    torch.testing.assert_close(stats["body.weight"].A.matrix, (x.double().T @ x.double()) / N, rtol=1e-5, atol=1e-6)
