"""Masks that show the wrong keys, and outputs that see their targets, however attention is computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from gramian.inspection.experiments.target_leaks import find_leak
from gramian.inspection.passes.watched_steps import observe

CLASSIFY = gm.Objective.classification()
TOKENS, T, WIDTH = 30, 10, 16
KINDS = ["fused", "module", "infinity", "large"]
# A softmax of −∞ alone is NaN, and so is the loss, which is an error.
HIDDEN = {k: f"{'error' if k == 'infinity' else 'warning'} attention-masked" for k in KINDS}


def padded(empty: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Tokens and padding, which is 0, with the first token's half as the label."""
    g = torch.Generator().manual_seed(2)
    x = torch.randint(1, TOKENS, (48, T), generator=g)
    x[torch.arange(T) >= torch.randint(3, T, (48, 1), generator=g)] = 0
    y = (x[:, 0] > TOKENS // 2).long()
    if empty is not None:
        x[empty] = 0
    return [(x, y)]


def sequences() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    x = torch.randint(TOKENS, (48, 1), generator=g) + torch.randint(1, 5, (48, 1), generator=g) * torch.arange(T + 1)
    return [(x[:, :-1] % TOKENS, x[:, 1:] % TOKENS)]


class Attends(nn.Module):
    """One layer of attention; `seen(tokens)` says which keys are seen, (N, T, T)."""

    def __init__(self, kind: str, seen: Callable[[Tensor], Tensor], *, padding: int | None, pooled: bool) -> None:
        super().__init__()
        self.kind, self.seen, self.pooled = kind, seen, pooled
        self.tokens = nn.Embedding(TOKENS, WIDTH, padding_idx=padding)
        self.positions = nn.Parameter(0.1 * torch.randn(T, WIDTH))
        if kind == "module":
            self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        else:
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 2 if pooled else TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        h, seen = self.tokens(tokens) + self.positions, self.seen(tokens)
        h = h + self._attend(h, seen)
        return self.head(h.mean(1) if self.pooled else h)

    def _attend(self, h: Tensor, seen: Tensor) -> Tensor:
        if self.kind == "module":
            return self.attention(h, h, h, attn_mask=~seen.repeat_interleave(2, 0), need_weights=False)[0]
        q, k, v = (t.unflatten(-1, (2, WIDTH // 2)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        if self.kind == "fused":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])
        else:
            hidden = -torch.inf if self.kind == "infinity" else -1e9
            out = (q @ k.mT / (WIDTH // 2) ** 0.5).masked_fill(~seen[:, None], hidden).softmax(-1) @ v
        return self.out(out.transpose(1, 2).flatten(2))


def keys(real: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda tokens: real(tokens)[:, None].expand(-1, tokens.shape[1], -1)


def triangle(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda tokens: make(torch.ones(T, T, dtype=torch.bool)).expand(len(tokens), -1, -1)


def first(kind: str, seen: Callable[[Tensor], Tensor], batches: list, **kwargs: bool) -> str:
    torch.manual_seed(1)
    model = Attends(kind, seen, padding=0 if kwargs["pooled"] else None, **kwargs)
    report = gm.inspect(model, batches, CLASSIFY)
    return next((f"{f.severity} {f.code}" for f in report.findings if f.severity != "info"), "")


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_padding(kind: str) -> None:
    assert first(kind, keys(lambda t: t != 0), padded(), pooled=True) == ""
    assert first(kind, keys(lambda t: t == 0), padded(), pooled=True) == "error attention-masked"
    assert first(kind, keys(lambda t: t != 0), padded(empty=2), pooled=True) == HIDDEN[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_the_future(kind: str) -> None:
    assert first(kind, triangle(torch.tril), sequences(), pooled=False) == ""
    assert first(kind, triangle(torch.triu), sequences(), pooled=False) == "error target-leak"
    assert first(kind, triangle(lambda m: m.tril(1)), sequences(), pooled=False) == "error target-leak"
    hidden = first(kind, triangle(lambda m: m.tril(-1)), sequences(), pooled=False)
    assert hidden == ("error target-leak" if kind == "large" else HIDDEN[kind])


class Recurrent(nn.Module):
    def __init__(self, *, both: bool) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH * (1 + both), TOKENS)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True, bidirectional=both)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.tokens(tokens))[0])


@pytest.mark.parametrize("both", [False, True])
def test_a_leak_is_what_the_gradient_says(both: bool) -> None:
    """The oracle: the derivative of the output at a position with respect to the embeddings behind it."""
    torch.manual_seed(0)
    model, batches = Recurrent(both=both), sequences()
    leak = find_leak(model, observe(model, batches, CLASSIFY), CLASSIFY)
    embedded = model.tokens(batches[0][0]).detach().requires_grad_(True)
    out = model.head(model.lstm(embedded)[0])
    [gradient] = torch.autograd.grad(out[:, T // 2].sum(), embedded)
    assert bool(gradient[:, T // 2 + 1 :].any()) == both == (leak is not None)
    if leak is not None:
        assert leak.name == "lstm"


def test_targets_that_are_not_the_next_inputs_are_no_leak() -> None:
    """An autoencoder sees what it is to give back, a tagger sees the whole sequence, and a prefix may see itself."""
    x, y = sequences()[0]
    tags = torch.randint(TOKENS, x.shape, generator=torch.Generator().manual_seed(3))
    prefix = torch.where(torch.arange(T) < T // 2, -100, y)
    everything = triangle(lambda m: m)

    def half(m: Tensor) -> Tensor:
        return m.tril() | (torch.arange(T) < T // 2)

    torch.manual_seed(1)
    model = Attends("fused", everything, padding=None, pooled=False)
    assert all(find_leak(model, observe(model, [(x, t)], CLASSIFY), CLASSIFY) is None for t in (x, tags))
    model.seen = triangle(half)
    assert find_leak(model, observe(model, [(x, prefix)], CLASSIFY), CLASSIFY) is None
    model.seen = everything
    assert find_leak(model, observe(model, [(x, prefix)], CLASSIFY), CLASSIFY) is not None
