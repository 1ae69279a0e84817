"""Attention and recurrence, unfused for a capture, give torch's own output, gradients and random draws."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import gramian as gm
from cases import seeded

NUM, QUERIES, KEYS, WIDTH, HEADS = 3, 5, 5, 8, 2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).requires_grad_()


def agrees(module: nn.Module, run: Callable[[nn.Module], Any], inputs: list[Tensor]) -> None:
    """`run(module)` inside a live capture, against outside: outputs, gradients of parameters and inputs, draws."""

    def leaves(result: Any) -> list[Tensor]:
        result = [part.data if isinstance(part, PackedSequence) else part for part in result]
        return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]

    def total(outputs: list[Tensor]) -> Tensor:
        return torch.stack(
            [(t * torch.randn(t.shape, generator=seeded(7), dtype=t.dtype)).sum() for t in outputs]
        ).sum()

    outcomes = []
    for watched in (False, True):
        own = copy.deepcopy(module).double()
        variables = [*own.parameters(), *inputs]
        torch.manual_seed(0)
        if watched:
            objective = gm.Objective(lambda m, _: leaves(run(m)), lambda output, _: (total(output), 1))
            with gm.capturing(own, objective) as stats:
                found = objective.predict(own, None)
                loss, _ = objective.criterion(found, None)
                grads = torch.autograd.grad(loss, variables, allow_unused=True)
            assert all(site.A is not None and site.G is not None for site in stats.sites())
        else:
            found = leaves(run(own))
            grads = torch.autograd.grad(total(found), variables, allow_unused=True)
        outcomes.append((found, grads, torch.get_rng_state()))
    (plain, wanted, state), (written, got, state_after) = outcomes
    assert [t.shape for t in plain] == [t.shape for t in written]
    for x, y in zip(plain, written, strict=True):  # a dropout that follows draws in the order of memory
        assert [s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1] == [
            s for s, n in zip(y.stride(), y.shape, strict=True) if n > 1
        ]
    for x, y in zip([*plain, *wanted], [*written, *got], strict=True):
        if x is None or y is None:
            assert x is y
            continue
        assert x.dtype == y.dtype
        torch.testing.assert_close(
            y, x, rtol=1e-10, atol=1e-10 * float(x.detach().nan_to_num().abs().max()), equal_nan=True
        )
    assert torch.equal(state, state_after)


# --- attention --------------------------------------------------------------------------------------------------------

future = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1)
padding = torch.arange(KEYS) >= torch.tensor([5, 3, 4])[:, None]
by_head = torch.rand(NUM * HEADS, QUERIES, KEYS, generator=seeded(1)) < 0.3

# options of the module, of the call, and which inputs differ: "self", "cross" (key is value) or "separate"
ATTENTION: dict[str, tuple[dict, dict, str]] = {
    "plain": ({}, {}, "self"),
    "no_weights": ({}, {"need_weights": False}, "self"),
    "weights_by_head": ({}, {"average_attn_weights": False}, "self"),
    "cross": ({}, {}, "cross"),
    "separate": ({}, {"need_weights": False}, "separate"),
    "no_bias": ({"bias": False}, {}, "cross"),
    "widths": ({"kdim": 6, "vdim": 4}, {}, "separate"),
    "widths_no_bias": ({"kdim": 6, "vdim": 4, "bias": False}, {"need_weights": False}, "separate"),
    "bias_kv": ({"add_bias_kv": True}, {"key_padding_mask": padding}, "self"),
    "zero_attn": ({"add_zero_attn": True}, {"attn_mask": future, "need_weights": False}, "self"),
    "everything": (
        {"add_zero_attn": True, "add_bias_kv": True, "kdim": 6, "vdim": 4},
        {"attn_mask": by_head, "key_padding_mask": padding, "average_attn_weights": False},
        "separate",
    ),
    "key_padding": ({}, {"key_padding_mask": padding}, "self"),
    "key_padding_float": ({}, {"key_padding_mask": -2.0 * padding.double(), "need_weights": False}, "self"),
    "causal": ({}, {"attn_mask": future, "is_causal": True, "need_weights": False}, "self"),
    "causal_weights": ({}, {"attn_mask": future, "is_causal": True}, "self"),
    "causal_padded": (
        {}, {"attn_mask": future, "is_causal": True, "key_padding_mask": padding, "need_weights": False}, "self",
    ),
    "mask_2d_bool": ({}, {"attn_mask": future}, "cross"),
    "mask_2d_float": ({}, {"attn_mask": normal(QUERIES, KEYS, seed=2), "need_weights": False}, "self"),
    "mask_3d_bool": ({}, {"attn_mask": by_head, "key_padding_mask": padding}, "self"),
    "mask_3d_float": ({}, {"attn_mask": normal(NUM * HEADS, QUERIES, KEYS, seed=2)}, "self"),
    "all_masked": ({}, {"key_padding_mask": torch.ones(NUM, KEYS, dtype=torch.bool)}, "self"),
    "all_masked_no_weights": (
        {}, {"key_padding_mask": torch.ones(NUM, KEYS, dtype=torch.bool), "need_weights": False}, "self",
    ),
}  # fmt: skip


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", ["batch_first", "sequence_first", "unbatched"])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str, shape: str, dropout: float) -> None:
    options, call, kind = ATTENTION[name]
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, dropout=dropout, batch_first=shape == "batch_first", **options)
    module = module.train(dropout > 0)
    query = normal(NUM, QUERIES, WIDTH)
    key = query if kind == "self" else normal(NUM, KEYS, options.get("kdim", WIDTH), seed=3)
    value = key if kind != "separate" else normal(NUM, KEYS, options.get("vdim", WIDTH), seed=4)
    call = dict(call)
    if shape == "unbatched":
        if "key_padding_mask" in call:
            call["key_padding_mask"] = call["key_padding_mask"][1]
        if call.get("attn_mask", future).ndim == 3:
            call["attn_mask"] = call["attn_mask"][:HEADS]
    given = {}  # one view of each, so that an input used twice stays one tensor
    for tensor in (query, key, value):
        given[id(tensor)] = {"batch_first": lambda t: t, "sequence_first": lambda t: t.transpose(0, 1)}.get(
            shape, lambda t: t[1]
        )(tensor)
    args = [given[id(tensor)] for tensor in (query, key, value)]
    inputs = list(
        {id(t): t for t in (query, key, value, *call.values()) if getattr(t, "requires_grad", False)}.values()
    )
    agrees(module, lambda m: m(*args, **call), inputs)


# --- recurrence -------------------------------------------------------------------------------------------------------

RECURRENT: dict[str, tuple[type[nn.RNNBase], dict]] = {
    "rnn_tanh": (nn.RNN, {}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "lstm_projected": (nn.LSTM, {"proj_size": 3}),
}
STACKS: dict[str, dict] = {
    "one": {},
    "batch_first": {"batch_first": True},
    "deep": {"num_layers": 3, "dropout": 0.4},
    "both_ways": {"bidirectional": True, "bias": False},
    "deep_both_ways": {"num_layers": 2, "bidirectional": True, "dropout": 0.4, "batch_first": True},
}
LENGTHS = torch.tensor([2, 6, 4, 1])
DATA = {
    "batched": lambda x: x,
    "unbatched": lambda x: x.select(0 if x.shape[0] == 4 else 1, 1),
    "packed": lambda x: pack_padded_sequence(x, LENGTHS, batch_first=x.shape[0] == 4, enforce_sorted=False),
    "sorted": lambda x: pack_padded_sequence(x, LENGTHS.sort(descending=True)[0], batch_first=x.shape[0] == 4),
}


@pytest.mark.parametrize("start", [False, True], ids=["zeros", "start"])
@pytest.mark.parametrize(("stack", "data"), list(product(STACKS, DATA)))
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrence(name: str, stack: str, data: str, start: bool) -> None:
    kind, options = RECURRENT[name]
    options = {**options, **STACKS[stack]}
    torch.manual_seed(0)
    module = kind(3, 5, **options).train("dropout" in options)
    x = normal(4, 6, 3) if options.get("batch_first") else normal(6, 4, 3)
    num = module.num_layers * (2 if module.bidirectional else 1)
    shapes = [(num, 4, module.proj_size or 5), (num, 4, 5)][: 2 if kind is nn.LSTM else 1]
    states = [normal(*shape, seed=5 + i) for i, shape in enumerate(shapes)] if start else []
    passed = [s[:, 1] if data == "unbatched" else s for s in states]
    hx = None if not start else tuple(passed) if kind is nn.LSTM else passed[0]
    agrees(module, lambda m: m(DATA[data](x), hx), [x, *states])


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell, "relu"])
def test_cells(kind: Any, bias: bool, batched: bool) -> None:
    torch.manual_seed(0)
    module = nn.RNNCell(3, 5, bias, nonlinearity="relu") if kind == "relu" else kind(3, 5, bias)
    x = normal(4, 3)
    given = x if batched else x[0]

    def run(m: nn.Module) -> list[Tensor]:
        first = m(given)
        second = m(given, first)
        return tree_leaves([first, second])

    agrees(module, run, [x])


class Named(nn.Module):
    """Calls torch's recurrent functions with all arguments by name."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.lstm, self.cell, self.packed = nn.LSTM(3, 5), nn.GRUCell(3, 5), packed

    def forward(self, x: Tensor) -> list[Tensor]:
        states = [torch.zeros(1, x.shape[1], 5, dtype=x.dtype) for _ in range(2)]
        options = {
            "hx": states, "params": list(self.lstm.parameters()), "has_biases": True, "num_layers": 1,
            "dropout": 0.0, "train": False, "bidirectional": False,
        }  # fmt: skip
        if self.packed:
            sizes = torch.full((len(x),), x.shape[1])
            found = torch.lstm(data=x.flatten(0, 1), batch_sizes=sizes, **options)
        else:
            found = torch.lstm(input=x, batch_first=False, **options)
        c = self.cell
        new = torch.gru_cell(
            input=x[0], hx=states[0][0], w_ih=c.weight_ih, w_hh=c.weight_hh, b_ih=c.bias_ih, b_hh=c.bias_hh
        )
        return [*found, new]


@pytest.mark.parametrize("packed", [False, True])
def test_arguments_by_name(packed: bool) -> None:
    torch.manual_seed(0)
    x = normal(6, 4, 3)
    agrees(Named(packed), lambda m: m(x), [x])


def test_one_layer_that_runs_in_reduced_precision() -> None:
    """Under autocast, the unfused function computes in the dtype of torch's own kernel."""
    module, x = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), normal(NUM, QUERIES, WIDTH).detach().float()
    objective = gm.Objective(lambda m, b: m(b, b, b)[0], lambda output, _: (output.float().sum(), 1))
    with torch.autocast("cpu", torch.bfloat16):
        wanted = objective.predict(module, x)
        with gm.capturing(module, objective):
            objective.loss(module, x)[0].backward()
            got = objective.predict(module, x)
    assert got.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
