"""Small models with one purpose each: a kind of module, or a way of using one, that the zoo's networks do not show.

`MODULES` is a table of the zoo's shape (`ZooCase`), so that what runs on the one runs on the other. A classifier of
digits reads an image as a vector, a picture, a volume or eight rows; a classifier of bags reads a set of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from zoo import CONTEXT, NUM_CLASSES, VOCABULARY, WIDTH, Batch, ZooCase, digits, seeded, tokens

PADDING = 0  # the token that fills short sentences up
IGNORED = -100  # the label of a padded place

# ---- convolutions --------------------------------------------------------------------------------------------------


# by number of dimensions, with the side that leaves about eight places
_POOLS = {1: (nn.AdaptiveAvgPool1d, 8), 2: (nn.AdaptiveAvgPool2d, 3), 3: (nn.AdaptiveAvgPool3d, 2)}


def _convolutional(num_dims: int) -> nn.Module:
    """Plain, strided and dilated, grouped, depth-wise with a multiplier and wrapped around: in 1, 2 or 3 dimensions."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[num_dims - 1]
    pool, side = _POOLS[num_dims]
    return nn.Sequential(
        conv(1, 8, 3, padding="same"),
        nn.Tanh(),
        conv(8, 16, 3, stride=2, padding=2, dilation=2, bias=False),
        nn.Tanh(),
        conv(16, 16, 3, padding=1, groups=4),
        nn.Tanh(),
        conv(16, 32, 2, groups=16, padding=1, padding_mode="circular"),
        nn.Tanh(),
        pool(side),
        nn.Flatten(),
        nn.Linear(32 * side**num_dims, NUM_CLASSES),
    )


def _transposed(num_dims: int) -> nn.Module:
    """Transposed convolutions, plain, grouped and depth-wise, with strides, dilation and padding of the output."""
    conv = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[num_dims - 1]
    pool, side = _POOLS[num_dims]
    return nn.Sequential(
        nn.Linear(64, 8 * side**num_dims),
        nn.Unflatten(-1, (8, *[side] * num_dims)),
        conv(8, 12, 3, stride=2, padding=1, output_padding=1),
        nn.Tanh(),
        conv(12, 8, 2, groups=4, dilation=2, bias=False),
        nn.Tanh(),
        conv(8, 16, 2, groups=8, stride=2, padding=1),
        nn.Tanh(),
        pool(side),
        nn.Flatten(),
        nn.Linear(16 * side**num_dims, NUM_CLASSES),
    )


# ---- tables of rows ------------------------------------------------------------------------------------------------


class Bags(nn.Module):
    """A bag of tokens is the sum or mean of their rows; with weights each token counts as much as its place says."""

    def __init__(self, mode: Literal["sum", "mean"], *, weighted: bool = False, offsets: bool = False) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(VOCABULARY, WIDTH, mode=mode, padding_idx=PADDING)
        self.weights = nn.Parameter(torch.linspace(0.5, 1.5, CONTEXT)) if weighted else None
        self.offsets = offsets
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        weights = None if self.weights is None else self.weights.expand_as(x)
        if self.offsets:
            starts = torch.arange(0, x.numel(), x.shape[1], device=x.device)
            return self.head(self.bag(x.flatten(), starts, None if weights is None else weights.flatten()))
        return self.head(self.bag(x, per_sample_weights=weights))


class TiedFunctional(nn.Module):
    """An embedding whose parameter is the head too, by a call of `functional.linear` on it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.mix(self.embed(x))), self.embed.weight)


class Padded(nn.Module):
    """A causal language model on sentences of many lengths: their padding is masked, and its labels are ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=PADDING)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        mixed, _ = self.attention(
            hidden, hidden, hidden, attn_mask=future, key_padding_mask=x == PADDING, need_weights=False
        )
        return self.head(self.norm(hidden + mixed))


# ---- attention -----------------------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """Learned queries read keys and values of other widths, with a learned extra key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(4, WIDTH))
        self.value = nn.Linear(8, 16)
        self.attention = nn.MultiheadAttention(WIDTH, 4, kdim=8, vdim=16, add_bias_kv=True, batch_first=True)
        self.head = nn.Linear(4 * WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query.expand(len(x), -1, -1)
        mixed, _ = self.attention(query, x, torch.tanh(self.value(x)))
        return self.head(mixed.flatten(1))


class SequenceFirstAttention(nn.Module):
    """Attention over (T, B, d) with an added key and value of zeros, a mask added to the scores, and no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, bias=False, add_zero_attn=True)
        self.head = nn.Linear(8 * WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embed(x).transpose(0, 1)
        place = torch.arange(8, device=x.device)
        nearness = -0.1 * (place[:, None] - place).abs().to(rows.dtype)
        mixed, _ = self.attention(rows, rows, rows, need_weights=False, attn_mask=nearness)
        return self.head(mixed.transpose(0, 1).flatten(1))


class EncoderDecoder(nn.Module):
    """torch's Transformer: its cross-attention feeds one part of the fused projection from elsewhere than the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.query = nn.Parameter(torch.randn(2, 16))
        self.transformer = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        decoded = self.transformer(self.embed(x), self.query.expand(len(x), -1, -1))
        return self.head(decoded.flatten(1))


# ---- recurrence ----------------------------------------------------------------------------------------------------


class Sequence(nn.Module):
    """All outputs of a recurrent module that reads the rows of an image, classified; the first states are learned."""

    def __init__(self, rnn: nn.RNNBase, num_outputs: int) -> None:
        super().__init__()
        self.rnn = rnn
        num_states = rnn.num_layers * (2 if rnn.bidirectional else 1)
        self.start = nn.Parameter(0.1 * torch.randn(num_states, 1, rnn.proj_size or rnn.hidden_size))
        self.head = nn.Linear(8 * num_outputs, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows = x if self.rnn.batch_first else x.transpose(0, 1)
        start = self.start.expand(-1, len(x), -1).contiguous()
        if isinstance(self.rnn, nn.LSTM):
            states, _ = self.rnn(rows, (start, start.new_zeros(*start.shape[:2], self.rnn.hidden_size)))
        else:
            states, _ = self.rnn(rows, start)
        return self.head((states if self.rnn.batch_first else states.transpose(0, 1)).flatten(1))


class Packed(nn.Module):
    """The last state of a recurrent module that reads packed sentences of many lengths."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=PADDING)
        self.rnn = cell(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x != PADDING).sum(1).cpu()
        packed = pack_padded_sequence(self.embed(x), lengths, batch_first=True, enforce_sorted=False)
        last = self.rnn(packed)[1]
        return self.head((last[0] if isinstance(last, tuple) else last)[-1])


class Cells(nn.Module):
    """A cell that is called once for each row of an image."""

    def __init__(self, cell: type[nn.RNNCell] | type[nn.LSTMCell] | type[nn.GRUCell]) -> None:
        super().__init__()
        self.cell = cell(8, WIDTH)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for row in x.unbind(1):
            state = self.cell(row, state)
        assert state is not None
        return self.head(state[0] if isinstance(state, tuple) else state)


# ---- products, parametrizations, adapters --------------------------------------------------------------------------


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Bilinear(32, 32, WIDTH)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.product(*x.chunk(2, -1)))


def _parametrized(parametrize: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(
        parametrize(nn.Linear(64, 48)),
        nn.ReLU(),
        nn.Unflatten(-1, (3, 4, 4)),
        parametrize(nn.Conv2d(3, 8, 3)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, NUM_CLASSES),
    )


class LoRALinear(nn.Module):
    """A frozen layer and a trained product of rank r beside it, with PEFT's names."""

    def __init__(self, base_layer: nn.Linear, rank: int = 3, alpha: float = 6.0) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_dropout = nn.ModuleDict({"default": nn.Identity()})
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base_layer.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)
        self.scaling = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        low = self.lora_A["default"](self.lora_dropout["default"](x))
        return self.base_layer(x) + self.scaling * self.lora_B["default"](low)


def _lora() -> nn.Module:
    return nn.Sequential(
        LoRALinear(nn.Linear(64, 48)), nn.ReLU(), LoRALinear(nn.Linear(48, 32)), nn.ReLU(), nn.Linear(32, NUM_CLASSES)
    )


# ---- uses ----------------------------------------------------------------------------------------------------------


class Repeated(nn.Module):
    """One layer applied three times, and one module registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.first = self.second = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(3):
            x = x + torch.tanh(self.mix(x))
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Checkpointed(nn.Module):
    """Residual branches whose activations are recomputed in the backward pass, one inside another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def _tail(self, x: Tensor) -> Tensor:
        x = x + checkpoint(self.layers[1], x, use_reentrant=False)
        return x + self.layers[2](x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + checkpoint(self.layers[0], x, use_reentrant=False)
        return self.head(checkpoint(self._tail, x, use_reentrant=False))


class Functional(nn.Module):
    """Parameters used by function calls: a convolution, `@` from either side, `addmm` and `functional.linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 1, 3, 3) / 3)
        self.bias = nn.Parameter(torch.zeros(WIDTH))
        self.right = nn.Parameter(torch.randn(8 * 16, WIDTH) / 128**0.5)
        self.left = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.added = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.head = nn.Parameter(torch.randn(NUM_CLASSES, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.conv2d(x, self.kernel, stride=2, padding=1)).flatten(1)
        x = torch.tanh(x @ self.right)
        x = torch.tanh((self.left @ x.T).T)
        x = torch.tanh(torch.addmm(self.bias, x, self.added))
        return F.linear(x, self.head)


class InPlace(nn.Module):
    """Activations that overwrite what the layer before them gave; odd widths, which ranks share unevenly."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 47), nn.ReLU(inplace=True), nn.Linear(47, 33), nn.SiLU(inplace=True), nn.Linear(33, 31)
        )
        self.head = nn.Linear(31, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).relu_())


# ---- data ----------------------------------------------------------------------------------------------------------


def bags(seed: int, size: int = 64, num_batches: int = 4) -> list[Batch]:
    """Tokens (B, T) of which half follow the label (B,); each bag ends in padding after 4 to T tokens."""
    generator = torch.Generator().manual_seed(seed)
    num = size * num_batches
    y = torch.randint(NUM_CLASSES, (num,), generator=generator)
    marked = 1 + y[:, None] + NUM_CLASSES * torch.randint(3, (num, CONTEXT), generator=generator)
    noise = torch.randint(1, VOCABULARY, (num, CONTEXT), generator=generator)
    x = torch.where(torch.rand(num, CONTEXT, generator=generator) < 0.5, marked, noise)
    lengths = torch.randint(4, CONTEXT + 1, (num, 1), generator=generator)
    x = torch.where(torch.arange(CONTEXT) < lengths, x, PADDING)
    return list(zip(x.split(size), y.split(size), strict=True))


def padded_tokens(seed: int) -> list[Batch]:
    """The zoo's sentences, without the token that means padding, cut after 4 to T tokens and filled up."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for x, y in tokens(seed):
        short = torch.arange(CONTEXT) < torch.randint(4, CONTEXT + 1, (len(x), 1), generator=generator)
        batches.append((torch.where(short, x.clamp_min(1), PADDING), torch.where(short, y, IGNORED)))
    return batches


_rows = partial(digits, shape=(8, 8))
_shapes = {1: (1, 64), 2: (1, 8, 8), 3: (1, 4, 4, 4)}


def _case(name: str, make: Callable[[], nn.Module], make_batches: Callable[[int], list[Batch]] = digits) -> ZooCase:
    return ZooCase(name, seeded(make), make_batches, "classification")


MODULES: dict[str, ZooCase] = {
    case.name: case
    for case in (
        *(_case(f"conv{d}d", partial(_convolutional, d), partial(digits, shape=_shapes[d])) for d in (1, 2, 3)),
        *(_case(f"conv_transpose{d}d", partial(_transposed, d)) for d in (1, 2, 3)),
        _case("bag_mean", partial(Bags, "mean"), bags),
        _case("bag_sum_weighted", partial(Bags, "sum", weighted=True), bags),
        _case("bag_offsets", partial(Bags, "sum", weighted=True, offsets=True), bags),
        _case("cross_attention", CrossAttention, _rows),
        _case("sequence_first_attention", SequenceFirstAttention, _rows),
        _case("encoder_decoder", EncoderDecoder, _rows),
        _case("rnn", lambda: Sequence(nn.RNN(8, 15, 2, nonlinearity="relu"), 15), _rows),
        _case("rnn_bidirectional", lambda: Sequence(nn.RNN(8, 16, batch_first=True, bidirectional=True), 32), _rows),
        _case(
            "lstm_projected",
            lambda: Sequence(nn.LSTM(8, 24, 2, batch_first=True, bidirectional=True, proj_size=8), 16),
            _rows,
        ),
        _case("gru_dropout", lambda: Sequence(nn.GRU(8, 15, 2, bias=False, batch_first=True, dropout=0.1), 15), _rows),
        _case("packed_lstm", partial(Packed, nn.LSTM), bags),
        _case("packed_gru", partial(Packed, nn.GRU), bags),
        _case("rnn_cell", partial(Cells, nn.RNNCell), _rows),
        _case("lstm_cell", partial(Cells, nn.LSTMCell), _rows),
        _case("gru_cell", partial(Cells, nn.GRUCell), _rows),
        _case("bilinear", Bilinear),
        _case("weight_norm", partial(_parametrized, parametrizations.weight_norm)),
        _case("spectral_norm", partial(_parametrized, parametrizations.spectral_norm)),
        _case("orthogonal", partial(_parametrized, parametrizations.orthogonal)),
        _case("lora", _lora),
        _case("repeated", Repeated),
        _case("checkpointed", Checkpointed),
        _case("functional", Functional, partial(digits, shape=(1, 8, 8))),
        _case("in_place", InPlace),
        ZooCase("tied_functional", seeded(TiedFunctional), tokens, "next_token"),
        ZooCase("padded", seeded(Padded), padded_tokens, "next_token"),
    )
}
