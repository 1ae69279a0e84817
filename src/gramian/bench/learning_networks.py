"""The networks of the optimizers' race, one of each family, small enough for seconds of one core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.init import isometric_
from gramian.tasks import plain_tanh_network

__all__ = [
    "Experts",
    "Patches",
    "Recurrent",
    "Transformer",
    "Waves",
    "autoencoder",
    "convolutional",
    "deep_tanh",
    "depthwise",
    "mlp",
]


class _Block(nn.Module):
    """Attention and a two-layer network, each behind a layer norm."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = self.second(width)

    def second(self, width: int) -> nn.Module:
        """What acts on each position by itself."""
        return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A decoder: tokens `(B, T)` to scores `(B, T, vocabulary)`."""

    block: Callable[[int, int], nn.Module] = _Block

    def __init__(
        self, *, width: int = 128, depth: int = 4, heads: int = 4, vocabulary: int = 65, context: int = 128
    ) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        for table in (self.embed, self.position):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.Sequential(*(type(self).block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class _Mixture(nn.Module):
    """Eight experts in stacked tensors; each token gets the two that its router scores highest."""

    def __init__(self, width: int, num_experts: int = 8) -> None:
        super().__init__()
        self.router = nn.Linear(width, num_experts, bias=False)
        self.experts = _Stacked(width, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        top, which = weights.topk(2, -1)
        chosen = torch.zeros_like(weights).scatter(-1, which, top / top.sum(-1, keepdim=True))
        return self.experts(x.flatten(0, -2), chosen.flatten(0, -2)).view_as(x)


class _Stacked(nn.Module):
    """The experts' weights as transformers keeps them: `(experts, out, in)`."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 2 * width, width) / width**0.5)
        self.down_proj = nn.Parameter(torch.randn(num_experts, width, width) / width**0.5)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        gate, up = torch.einsum("ti,eoi->teo", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("teh,eoh,te->to", F.silu(gate) * up, self.down_proj, weights)


class _MixtureBlock(_Block):
    def second(self, width: int) -> nn.Module:
        return _Mixture(width)


class Experts(Transformer):
    """A decoder whose second half of each block is a mixture of experts."""

    block = _MixtureBlock


class _Scan(nn.Module):
    """A gated linear recurrence: a short depthwise convolution, then `hₜ = aₜ hₜ₋₁ + (1 − aₜ) bₜ` in each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.enter, self.decay = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.short = nn.Conv1d(width, width, 4, padding=3, groups=width)
        self.rate = nn.Parameter(torch.linspace(-1, 4, width))
        self.leave = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, gate = self.enter(self.norm(x)).chunk(2, -1)
        b = F.silu(self.short(b.mT)[..., : x.shape[1]].mT)
        log_a = F.logsigmoid(self.rate + self.decay(b))
        # In parallel over time: h = Σ exp(Sₜ − Sₛ) (1 − aₛ) bₛ, S the running sum of log a.
        total = log_a.cumsum(1)
        weight = (total[:, :, None] - total[:, None]).masked_fill_(_future(x.shape[1]), -torch.inf).exp()
        h = torch.einsum("btsd,bsd->btd", weight, -torch.expm1(log_a) * b)
        return x + self.leave(h * F.silu(gate))


def _future(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)[..., None]


class Recurrent(nn.Module):
    """Tokens or numbers through layers that run along a sequence: an LSTM's, or linear recurrences."""

    def __init__(self, width: int, depth: int, vocabulary: int, *, linear: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.linear = linear
        self.layers: nn.Module = (
            nn.Sequential(*(_Scan(width) for _ in range(depth)))
            if linear
            else nn.LSTM(width, width, depth, batch_first=True)
        )
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.layers(self.embed(tokens))
        return self.head(h if self.linear else h[0])


class Patches(nn.Module):
    """A small vision transformer: 28×28 pixels in patches of 7×7."""

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, width, 7, stride=7)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(_Block(width, 4, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x.unflatten(-1, (1, 28, 28))).flatten(2).mT + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


class Waves(nn.Module):
    """An image as a function of its coordinates: sines of the two coordinates, then a plain network."""

    waves: Tensor

    def __init__(self, width: int = 96, num_waves: int = 32) -> None:
        super().__init__()
        self.register_buffer("waves", 8 * torch.randn(2, num_waves))
        sizes = [2 * num_waves, width, width, width, 1]
        self.layers = nn.Sequential(*_chain(sizes, nn.ReLU))

    def forward(self, x: Tensor) -> Tensor:
        phases = x @ self.waves
        return self.layers(torch.cat([phases.sin(), phases.cos()], -1))


def _chain(sizes: Sequence[int], nonlinearity: Callable[[], nn.Module]) -> list[nn.Module]:
    layers = [layer for m, n in pairwise(sizes) for layer in (nn.Linear(m, n), nonlinearity())]
    return layers[:-1]


def mlp(inputs: int = 64, outputs: int = 10, width: int = 256, depth: int = 3) -> nn.Sequential:
    """A plain network with ReLU, in PyTorch's initialization."""
    return nn.Sequential(*_chain([inputs, *[width] * (depth - 1), outputs], nn.ReLU))


def autoencoder() -> nn.Sequential:
    """784-1000-500-250-30 and back, tanh between, a linear code: the deep autoencoder of Hinton & Salakhutdinov (2006).

    Xavier's initialization, which its signals need to cross eight layers.
    """
    sizes = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    layers: list[nn.Module] = []
    for m, n in pairwise(sizes):
        linear = nn.Linear(m, n)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Identity() if n in (30, sizes[-1]) else nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def convolutional(width: int = 32) -> nn.Sequential:
    """Four 3×3 convolutions with batch norms, the mean over pixels, and a linear head."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for inputs in (1, width, width, width):
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class _DepthwiseBlock(nn.Module):
    """A 5×5 kernel for each channel, a norm, and a two-layer network of the channels, beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.GroupNorm(1, width)
        self.up, self.down = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(4 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(self.spatial(x)))))


def depthwise(width: int = 32, depth: int = 4) -> nn.Sequential:
    """A residual network of depthwise convolutions, after ConvNeXt."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, width, 2, stride=2),
        *(_DepthwiseBlock(width) for _ in range(depth)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(width),
        nn.Linear(width, 10),
    )


def deep_tanh(depth: int = 30) -> nn.Module:
    """A plain tanh network, isometric at first, without which it does not learn."""
    seed = int(torch.randint(2**31, ()))
    net = plain_tanh_network(depth, outputs=10, seed=seed)
    return isometric_(net, generator=torch.Generator().manual_seed(seed))
