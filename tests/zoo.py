"""The zoo: one small model for each way in which matrices live in a network, with data on which it learns.

Images and rows are scikit-learn's handwritten digits; tokens come from a random walk over a vocabulary in which each
token has two successors, so that log 2 is the best loss. Everything follows from a seed, and the global generator is
left as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]

NUM_CLASSES = 10
VOCABULARY = 32
CONTEXT = 16
WIDTH = 32


# ---- plain, convolutional, recurrent -------------------------------------------------------------------------------


def mlp(num_inputs: int = 64, num_outputs: int = NUM_CLASSES) -> nn.Module:
    return nn.Sequential(nn.Linear(num_inputs, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, num_outputs))


def deep_tanh_mlp(depth: int = 20, width: int = WIDTH) -> nn.Module:
    """`depth` hidden layers at torch's default gain of 1/√3, at which the signal vanishes."""
    layers: list[nn.Module] = [nn.Linear(64, width), nn.Tanh()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, NUM_CLASSES))


def batchnorm_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, NUM_CLASSES),
    )


class ResidualBlock(nn.Module):
    def __init__(self, num_inputs: int, num_outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_inputs, num_outputs, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(num_outputs, num_outputs, 3, padding=1)
        same = num_inputs == num_outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(num_inputs, num_outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.conv2(F.relu(self.conv1(x))))


def residual_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        ResidualBlock(8, 8),
        ResidualBlock(8, 16, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, NUM_CLASSES),
    )


class Recurrent(nn.Module):
    """The last state of an LSTM or GRU that reads the rows of an image, classified."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU], num_layers: int) -> None:
        super().__init__()
        self.rnn = cell(8, WIDTH, num_layers=num_layers, batch_first=True)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


# ---- transformers --------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """torch's TransformerEncoder over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.position = nn.Parameter(0.1 * torch.randn(8, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x) + self.position).mean(1))


class EncoderLM(nn.Module):
    """torch's TransformerEncoder under a causal mask, norms first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        x = self.embed(tokens) + self.position.weight[:length]
        return self.head(self.encoder(x, mask=mask, is_causal=True))


class Conv1D(nn.Module):
    """GPT-2's linear layer, as transformers has it: the weight is (in, out)."""

    def __init__(self, num_outputs: int, num_inputs: int) -> None:
        super().__init__()
        self.nf = num_outputs
        self.weight = nn.Parameter(0.05 * torch.randn(num_inputs, num_outputs))
        self.bias = nn.Parameter(torch.zeros(num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class GPT2Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.c_attn = Conv1D(3 * width, width)
        self.c_proj = Conv1D(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_heads(part, self.num_heads) for part in self.c_attn(x).chunk(3, dim=-1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(out.transpose(1, 2).flatten(2))


class GPT2MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = Conv1D(4 * width, width)
        self.c_proj = Conv1D(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class GPT2Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = GPT2Attention(width, num_heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = GPT2MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """A decoder with GPT-2's names: fused (in, out) QKV, and a head tied to the embedding."""

    def __init__(self, width: int = WIDTH, depth: int = 2, num_heads: int = 4) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, width)
        self.wpe = nn.Embedding(CONTEXT, width)
        self.h = nn.ModuleList(GPT2Block(width, num_heads) for _ in range(depth))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.wte.weight, std=0.1)
        nn.init.normal_(self.wpe.weight, std=0.05)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class GroupedAttention(nn.Module):
    """Four query heads over two key and value heads, with rotary positions."""

    def __init__(self, width: int, num_heads: int = 4, num_kv_heads: int = 2) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        head = width // num_heads
        self.q_proj = nn.Linear(width, num_heads * head, bias=False)
        self.k_proj = nn.Linear(width, num_kv_heads * head, bias=False)
        self.v_proj = nn.Linear(width, num_kv_heads * head, bias=False)
        self.o_proj = nn.Linear(num_heads * head, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = _rotate(_heads(self.q_proj(x), self.num_heads))
        k = _rotate(_heads(self.k_proj(x), self.num_kv_heads))
        v = _heads(self.v_proj(x), self.num_kv_heads)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def _rotate(x: Tensor) -> Tensor:
    """Turn the pairs (xᵢ, xᵢ₊d/2) by angles that grow with the position."""
    half = x.shape[-1] // 2
    frequency = 100.0 ** -(torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * frequency
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1).to(x.dtype)


class GatedMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, 2 * width, bias=False)
        self.up_proj = nn.Linear(width, 2 * width, bias=False)
        self.down_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """Four experts as 3-D tensors (E, out, in); a router picks two for each token.

    Every expert sees every token, and the gates of those not picked are zero: wasteful, exact and free of branches.
    """

    def __init__(self, width: int, num_experts: int = 4, top: int = 2) -> None:
        super().__init__()
        self.top = top
        self.router = nn.Linear(width, num_experts, bias=False)
        self.up = nn.Parameter(torch.randn(num_experts, 2 * width, width) / width**0.5)
        self.down = nn.Parameter(torch.randn(num_experts, width, 2 * width) / (2 * width) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        score, picked = self.router(x).topk(self.top, dim=-1)
        share = score.softmax(-1)
        gate = torch.zeros(*x.shape[:-1], len(self.up), dtype=share.dtype, device=x.device).scatter(-1, picked, share)
        hidden = F.silu(torch.einsum("...i,eoi->...eo", x, self.up))
        return torch.einsum("...e,...ei,eoi->...o", gate.to(hidden.dtype), hidden, self.down)


class DecoderBlock(nn.Module):
    def __init__(self, width: int, mlp: nn.Module) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(width)
        self.self_attn = GroupedAttention(width)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Llama's shape: grouped-query attention, RMS norms, and a gated MLP or a mixture of experts."""

    def __init__(self, make_mlp: Callable[[int], nn.Module], width: int = WIDTH, depth: int = 2) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(DecoderBlock(width, make_mlp(width)) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


# ---- data ----------------------------------------------------------------------------------------------------------


@cache
def _digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32) / 8 - 1, torch.tensor(y)


def digits(seed: int, shape: tuple[int, ...] = (64,), size: int = 64, num_batches: int = 4) -> list[Batch]:
    """Real handwritten digits (B, *shape) in [-1, 1], and their labels (B,)."""
    x, y = _digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return [(x[part].unflatten(1, shape), y[part]) for part in order[: size * num_batches].split(size)]


def tokens(seed: int, size: int = 16, num_batches: int = 4) -> list[Batch]:
    """Tokens (B, T) and the next tokens (B, T). The language is the same for all seeds; the sentences differ."""
    successors = torch.randint(VOCABULARY, (VOCABULARY, 2), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    num = size * num_batches
    walk = [torch.randint(VOCABULARY, (num,), generator=generator)]
    for _ in range(CONTEXT):
        walk.append(successors[walk[-1], torch.randint(2, (num,), generator=generator)])
    text = torch.stack(walk, 1)
    return [(part[:, :-1], part[:, 1:]) for part in text.split(size)]


def curve(seed: int, size: int = 64, num_batches: int = 4) -> list[Batch]:
    """Points x (B, 4) and the smooth y (B, 2) = (sin 2x₁ + x₂x₃, cos x₄)."""
    x = torch.randn(size * num_batches, 4, generator=torch.Generator().manual_seed(seed))
    y = torch.stack(((2 * x[:, 0]).sin() + x[:, 1] * x[:, 2], x[:, 3].cos()), 1)
    return list(zip(x.split(size), y.split(size), strict=True))


# ---- the table -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ZooCase:
    """A model and its data, each made from a seed. `objective` names the `gramian.Objective` that fits."""

    name: str
    make_model: Callable[[int], nn.Module]
    make_batches: Callable[[int], list[Batch]]
    objective: Literal["classification", "next_token", "regression"]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss over the units of a batch, as a training loop would write it."""
        x, y = batch
        output = model(x)
        if self.objective == "regression":
            return 0.5 * (output - y).square().sum(-1).mean()
        return F.cross_entropy(output.flatten(0, -2), y.flatten())


def seeded(make: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    """`make` as a function of a seed, which fixes the weights and leaves the global generator as it was."""

    def make_model(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # torch's layers draw from the global generator, which is put back
            torch.manual_seed(seed)
            return make()

    return make_model


_images = partial(digits, shape=(1, 8, 8))
_rows = partial(digits, shape=(8, 8))

ZOO: dict[str, ZooCase] = {
    case.name: case
    for case in (
        ZooCase("mlp", seeded(mlp), digits, "classification"),
        ZooCase("mlp_regression", seeded(partial(mlp, 4, 2)), curve, "regression"),
        ZooCase("deep_tanh_mlp", seeded(deep_tanh_mlp), digits, "classification"),
        ZooCase("batchnorm_cnn", seeded(batchnorm_cnn), _images, "classification"),
        ZooCase("residual_cnn", seeded(residual_cnn), _images, "classification"),
        ZooCase("lstm", seeded(partial(Recurrent, nn.LSTM, 2)), _rows, "classification"),
        ZooCase("gru", seeded(partial(Recurrent, nn.GRU, 1)), _rows, "classification"),
        ZooCase("transformer_classifier", seeded(Classifier), _rows, "classification"),
        ZooCase("transformer_lm", seeded(EncoderLM), tokens, "next_token"),
        ZooCase("gpt2", seeded(GPT2), tokens, "next_token"),
        ZooCase("grouped_query", seeded(partial(Decoder, GatedMLP)), tokens, "next_token"),
        ZooCase("mixture_of_experts", seeded(partial(Decoder, Experts)), tokens, "next_token"),
    )
}
