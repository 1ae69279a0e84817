"""The networks: a stem, blocks in a row, a pooling and a head, all of a few thousand parameters.

`Network.forward` is where wiring faults are: a block that is never called, a tensor that leaves the graph, a function
of the scores that the loss applies as well.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "sigmoid": nn.Sigmoid}


class Network(nn.Module):
    """Scores from `head(pool(blocks(stem(x))))`.

    Attributes:
        uncalled: indices of blocks that forward leaves out.
        detached: index of the block whose output leaves the graph, or `None`.
        final: a module that is applied to the scores, or `None`.
    """

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], pool: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.stem, self.blocks, self.pool = stem, nn.ModuleList(blocks), pool
        self.head: nn.Linear = head
        self.final: nn.Module | None = None
        self.uncalled: frozenset[int] = frozenset()
        self.detached: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            if i not in self.uncalled:
                x = block(x)
            if i == self.detached:
                x = x.detach()
        x = self.head(self.pool(x))
        return x if self.final is None else self.final(x)


class Dense(nn.Module):
    """Linear, perhaps a batch norm, an activation, dropout."""

    def __init__(self, inputs: int, outputs: int, act: str, norm: bool, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=not norm)
        self.norm = nn.BatchNorm1d(outputs) if norm else None
        self.act, self.dropout = ACTIVATIONS[act](), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.dropout(self.act(x if self.norm is None else self.norm(x)))


class Conv(nn.Module):
    """A 3 × 3 convolution, perhaps a batch norm, an activation, dropout."""

    def __init__(self, inputs: int, outputs: int, act: str, norm: bool, dropout: float, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(outputs) if norm else None
        self.act, self.dropout = ACTIVATIONS[act](), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.dropout(self.act(x if self.norm is None else self.norm(x)))


class Residual(nn.Module):
    """x + a branch of two 3 × 3 convolutions; with batch norms, or plain."""

    def __init__(self, width: int, act: str, norm: bool, dropout: float) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=not norm) for _ in range(2))
        self.norm1, self.norm2 = (nn.BatchNorm2d(width) if norm else nn.Identity() for _ in range(2))
        self.act, self.act_out, self.dropout = ACTIVATIONS[act](), ACTIVATIONS[act](), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        return self.act_out(x + self.dropout(y))


class Separable(nn.Module):
    """A depthwise and a pointwise convolution, each with a batch norm and an activation."""

    def __init__(self, width: int, act: str, dropout: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm1, self.act1 = nn.BatchNorm2d(width), ACTIVATIONS[act]()
        self.pointwise = nn.Conv2d(width, width, 1, bias=False)
        self.norm2, self.act2, self.dropout = nn.BatchNorm2d(width), ACTIVATIONS[act](), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.norm1(self.depthwise(x)))
        return self.dropout(self.act2(self.norm2(self.pointwise(x))))


class Recurrent(nn.Module):
    """The outputs of an LSTM at every step."""

    def __init__(self, inputs: int, width: int, dropout: float) -> None:
        super().__init__()
        self.lstm, self.dropout = nn.LSTM(inputs, width, batch_first=True), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.lstm(x)[0])


class Tokens(nn.Module):
    """Embeddings of tokens, with those of positions added where there are any."""

    def __init__(self, vocabulary: int, width: int, length: int = 0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.1 * torch.randn(length, width)) if length else None

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x) if self.positions is None else self.tokens(x) + self.positions


class Patches(nn.Module):
    """The 2 × 2 patches of an image of 8 × 8, projected, with positions added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, width, 2, 2)
        self.positions = nn.Parameter(0.3 * torch.randn(16, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2) + self.positions


class Attention(nn.Module):
    """Self-attention with separate projections."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Packed(nn.Module):
    """Self-attention by torch's own module, whose projections are one parameter."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=False)[0]


class Transforming(nn.Module):
    """Attention and a two-layer network, each added to its input; behind layer norms, or plain."""

    def __init__(self, width: int, attention: nn.Module, norm: bool, dropout: float) -> None:
        super().__init__()
        self.attention = attention
        self.norm1, self.norm2 = (nn.LayerNorm(width) if norm else nn.Identity() for _ in range(2))
        self.up, self.act, self.down = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.down(self.act(self.up(self.norm2(x)))))


class Pool(nn.Module):
    """A function without parameters, perhaps behind a norm: the mean over pixels or tokens, or the last step."""

    def __init__(self, function: Callable[[Tensor], Tensor], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.function = norm, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x if self.norm is None else self.norm(x))


def itself(x: Tensor) -> Tensor:
    return x


def over_pixels(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def over_tokens(x: Tensor) -> Tensor:
    return x.mean(1)


def last_step(x: Tensor) -> Tensor:
    return x[:, -1]
