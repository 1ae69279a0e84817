"""An independent `gm.capture` in float64: sample by sample, product by product, without shared code.

Every module that holds a matrix gets a forward pass written out in loops. Where a matrix W meets vectors, the vectors
are noted, and a shift of zeros is added to what comes out: its gradient is the output gradient of that product.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import zoo
import zoo_modules
from gramian.layers import layer_of
from zoo import ZooCase

Key = tuple[str, bool]  # the parameter's name; whether its input vectors run along its matrices' rows
Index = int | None  # which of several matrices; None where there is one, or the side is common to all
Moments = dict[Index, tuple[Tensor, Tensor, float]]  # by matrix: the sum of xxᵀ, the sum of x, their number


class Tape:
    """For one sample, the input vectors of each use, and zero shifts that were added to its outputs.

    `keep` (T,) is false where the sample is padding: vectors that come one for each place are left out there.
    """

    def __init__(self, keep: Tensor | None = None) -> None:
        self.keep = keep
        self.inputs: dict[Key, dict[Index, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        self.shifts: dict[Key, dict[Index, list[Tensor]]] = defaultdict(lambda: defaultdict(list))

    def enter(self, key: Key, x: Tensor, index: Index = None) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        if self.keep is not None and len(rows) == len(self.keep):
            rows = rows[self.keep]
        self.inputs[key][index].append(rows)

    def leave(self, key: Key, z: Tensor, index: Index = None) -> Tensor:
        shift = torch.zeros_like(z, requires_grad=True)
        self.shifts[key][index].append(shift)
        return z + shift


def plus(z: Tensor, bias: Tensor | None) -> Tensor:
    return z if bias is None else z + bias


def linear(tape: Tape, name: str, m: nn.Linear, x: Tensor) -> Tensor:
    key = (f"{name}weight", False)
    tape.enter(key, x)
    return plus(tape.leave(key, x @ m.weight.T), m.bias)


def conv1d_of_gpt2(tape: Tape, name: str, m: zoo.Conv1D, x: Tensor) -> Tensor:
    """The weight is (in, out), and its layout says so; a fused one has a layout of its own."""
    if not name.endswith("c_attn."):
        key = (f"{name}weight", False)
        tape.enter(key, x)
        return tape.leave(key, x @ m.weight) + m.bias
    key = (f"{name}weight", False)
    tape.enter(key, x)
    parts = [tape.leave(key, x @ w, i) for i, w in enumerate(m.weight.chunk(3, 1))]
    return torch.cat(parts, -1) + m.bias


def embedding(tape: Tape, name: str, m: nn.Embedding, x: Tensor) -> Tensor:
    key = (f"{name}weight", True)
    z = m.weight[x]
    real = torch.ones_like(x, dtype=torch.bool) if m.padding_idx is None else x != m.padding_idx
    keep, tape.keep = tape.keep, None  # padding is left out here already
    tape.enter(key, F.one_hot(x[real], m.num_embeddings).double())
    tape.keep = keep
    return z.index_put((real,), tape.leave(key, z[real]))


def bag(
    tape: Tape, name: str, m: nn.EmbeddingBag, x: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One sample: one bag."""
    key = (f"{name}weight", True)
    weights = per_sample_weights if weights is None else weights
    x, weights = x.flatten(), None if weights is None else weights.flatten()
    real = [i for i, token in enumerate(x.tolist()) if token != m.padding_idx]
    out = torch.zeros(1, m.embedding_dim, dtype=torch.float64)
    for i in real:
        tape.enter(key, F.one_hot(x[i], m.num_embeddings).double())
        share = 1 / len(real) if m.mode == "mean" else 1.0 if weights is None else weights[i]
        out = out + share * tape.leave(key, m.weight[x[i]])
    return out


def bilinear(tape: Tape, name: str, m: nn.Bilinear, left: Tensor, right: Tensor) -> Tensor:
    key = (f"{name}weight", False)
    tape.enter(key, right)
    columns = [(left * tape.leave(key, right @ w.T, i)).sum(-1) for i, w in enumerate(m.weight)]
    return plus(torch.stack(columns, -1), m.bias)


# ---- convolutions ----------------------------------------------------------------------------------------------------


def sources(size: int, k: int, stride: int, before: int, after: int, dilation: int, mode: str) -> list[list[int]]:
    """For each position of the output, where in the input each tap of the kernel reads; `size` stands for a zero."""
    table = []
    for start in range(-before, size + after - dilation * (k - 1), stride):
        places = [start + dilation * tap for tap in range(k)]
        if mode == "circular":
            places = [place % size for place in places]
        table.append([place if 0 <= place < size else size for place in places])
    return table


def correlate(
    tape: Tape, key: Key, weight: Tensor, x: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, mode: str
) -> Tensor:
    """A convolution of one sample (1, i, *space), window by window."""
    num = weight.ndim - 2
    dilation, stride = ((v,) * num if isinstance(v, int) else v for v in (dilation, stride))
    if padding == "same":
        ends = [
            (d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2) for k, d in zip(weight.shape[2:], dilation, strict=True)
        ]
    else:
        ends = [(p, p) for p in ((padding,) * num if isinstance(padding, int) else padding)]
    tables = [
        sources(size, k, s, *end, d, mode)
        for size, k, s, end, d in zip(x.shape[2:], weight.shape[2:], stride, ends, dilation, strict=True)
    ]
    extended = F.pad(x[0], (0, 1) * num)  # a zero at the end of each dimension
    fields = []
    for places in product(*tables):
        field = extended
        for axis, place in enumerate(places):
            field = field.index_select(axis + 1, torch.tensor(place))
        fields.append(field)
    several, out = groups > 1, []
    for g, (w, part) in enumerate(zip(weight.chunk(groups), torch.stack(fields).chunk(groups, 1), strict=True)):
        rows, index = part.flatten(1), g if several else None
        tape.enter(key, rows, index)
        out.append(tape.leave(key, rows @ w.flatten(1).T, index))
    return torch.cat(out, -1).T.reshape(1, len(weight), *map(len, tables))


def convolution(tape: Tape, name: str, m: Any, x: Tensor) -> Tensor:
    key = (f"{name}weight", False)
    z = correlate(tape, key, m.weight, x, m.stride, m.padding, m.dilation, m.groups, m.padding_mode)
    return plus(z, None if m.bias is None else m.bias.reshape(-1, *[1] * (x.ndim - 2)))


def transposed_convolution(tape: Tape, name: str, m: Any, x: Tensor) -> Tensor:
    """Every pixel is multiplied by the matrix, and the result is added around its position, tap by tap."""
    key, space, kernel = (f"{name}weight", False), x.shape[2:], m.kernel_size
    sizes = [
        (n - 1) * s - 2 * p + d * (k - 1) + extra + 1
        for n, s, p, d, k, extra in zip(space, m.stride, m.padding, m.dilation, kernel, m.output_padding, strict=True)
    ]
    outs = []
    for g, (w, part) in enumerate(zip(m.weight.chunk(m.groups), x[0].chunk(m.groups), strict=True)):
        index = g if m.groups > 1 else None
        rows = part.flatten(1).T
        tape.enter(key, rows, index)
        z = tape.leave(key, rows @ w.flatten(1), index).reshape(*space, w.shape[1], *kernel)
        out = torch.zeros(w.shape[1], *(size + 2 * p for size, p in zip(sizes, m.padding, strict=True)), dtype=x.dtype)
        for tap in product(*map(range, kernel)):
            where = tuple(
                slice(d * t, d * t + s * (n - 1) + 1, s)
                for t, d, s, n in zip(tap, m.dilation, m.stride, space, strict=True)
            )
            out[(slice(None), *where)] += z[(..., *tap)].movedim(-1, 0)
        inner = tuple(slice(p, p + size) for p, size in zip(m.padding, sizes, strict=True))
        outs.append(out[(slice(None), *inner)])
    return plus(torch.cat(outs)[None], None if m.bias is None else m.bias.reshape(-1, *[1] * len(space)))


# ---- attention -------------------------------------------------------------------------------------------------------


def attention(
    tape: Tape, name: str, m: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor,
    key_padding_mask: Tensor | None = None, need_weights: bool = True, attn_mask: Tensor | None = None,
    average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Tensor, None]:  # fmt: skip
    """One sample, head by head."""
    same = query is key and key is value
    inputs = [t[0] if m.batch_first else t[:, 0] for t in (query, key, value)]
    if m.in_proj_weight is not None:
        fused = (f"{name}in_proj_weight", False)
        places = [(fused, w, i) for i, w in enumerate(m.in_proj_weight.chunk(3))]
    else:
        places = [((f"{name}{n}_proj_weight", False), getattr(m, f"{n}_proj_weight"), None) for n in "qkv"]
    biases = (None,) * 3 if m.in_proj_bias is None else m.in_proj_bias.chunk(3)
    projected = []
    for i, ((at, w, index), x, bias) in enumerate(zip(places, inputs, biases, strict=True)):
        if i == 0 or not same or index is None:
            tape.enter(at, x, None if same else index)
        projected.append(plus(tape.leave(at, x @ w.T, index), bias))
    q, k, v = projected
    if m.bias_k is not None:
        k, v = torch.cat([k, m.bias_k[0]]), torch.cat([v, m.bias_v[0]])
    if m.add_zero_attn:
        k, v = (torch.cat([t, torch.zeros_like(t[:1])]) for t in (k, v))
    bars = torch.zeros(len(q), len(k), dtype=q.dtype)
    for mask in (attn_mask, key_padding_mask):
        if mask is not None:
            mask = mask.expand(len(q), -1)
            real = (
                torch.zeros(mask.shape, dtype=q.dtype).masked_fill(mask, -math.inf)
                if mask.dtype == torch.bool
                else mask
            )
            bars = bars + F.pad(real, (0, len(k) - real.shape[1]))
    heads = []
    for a, b, c in zip(*(t.chunk(m.num_heads, -1) for t in (q, k, v)), strict=True):
        heads.append((a @ b.T / math.sqrt(a.shape[-1]) + bars).softmax(-1) @ c)
    mixed, out = torch.cat(heads, -1), (f"{name}out_proj.weight", False)
    tape.enter(out, mixed)
    mixed = plus(tape.leave(out, mixed @ m.out_proj.weight.T), m.out_proj.bias)
    return mixed.unsqueeze(0 if m.batch_first else 1), None


# ---- recurrence ------------------------------------------------------------------------------------------------------


def step(tape: Tape, name: str, m: nn.Module, suffix: str, x: Tensor, state: list[Tensor], gates: int) -> list[Tensor]:
    """One step of one layer on vectors, gate by gate: the new state [h, c] or [h]."""
    sides = []
    for side, vector in (("ih", x), ("hh", state[0])):
        key = (f"{name}weight_{side}{suffix}", False)
        tape.enter(key, vector)
        weights = getattr(m, f"weight_{side}{suffix}").chunk(gates)
        bias = getattr(m, f"bias_{side}{suffix}") if m.bias else None
        biases = (None,) * gates if bias is None else bias.chunk(gates)
        sides.append(
            [
                plus(tape.leave(key, w @ vector, i if gates > 1 else None), b)
                for i, (w, b) in enumerate(zip(weights, biases, strict=True))
            ]
        )
    ours, theirs = sides
    if gates == 4:
        i, f, g, o = (a + b for a, b in zip(ours, theirs, strict=True))
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        if getattr(m, "proj_size", 0):
            key = (f"{name}weight_hr{suffix}", False)
            tape.enter(key, h)
            h = tape.leave(key, getattr(m, f"weight_hr{suffix}") @ h)
        return [h, c]
    if gates == 3:
        r, z = (torch.sigmoid(a + b) for a, b in zip(ours[:2], theirs[:2], strict=True))
        n = torch.tanh(ours[2] + r * theirs[2])
        return [(1 - z) * n + z * state[0]]
    return [(torch.relu if m.nonlinearity == "relu" else torch.tanh)(ours[0] + theirs[0])]


def recurrent(gates: int, tape: Tape, name: str, m: nn.RNNBase, x: Any, start: Any = None) -> tuple[Any, Any]:
    """One sample, packed or not, step by step."""
    packed = isinstance(x, PackedSequence)
    rows = x.data if packed else x[0] if m.batch_first else x[:, 0]
    directions = 2 if m.bidirectional else 1
    finals = []
    for layer in range(m.num_layers):
        outputs = []
        for direction in range(directions):
            suffix, k = f"_l{layer}" + "_reverse" * direction, layer * directions + direction
            if start is None:
                widths = [m.proj_size or m.hidden_size, m.hidden_size][: 2 if gates == 4 else 1]
                state = [torch.zeros(width, dtype=rows.dtype) for width in widths]
            else:
                state = [s[k, 0] for s in (start if gates == 4 else (start,))]
            found = {}
            for t in reversed(range(len(rows))) if direction else range(len(rows)):
                state = step(tape, name, m, suffix, rows[t], state, gates)
                found[t] = state[0]
            outputs.append(torch.stack([found[t] for t in range(len(rows))]))
            finals.append(state)
        rows = torch.cat(outputs, -1)
    last = tuple(torch.stack(parts)[:, None] for parts in zip(*finals, strict=True))
    return rows.unsqueeze(0 if m.batch_first else 1), last if gates == 4 else last[0]


def cell(gates: int, tape: Tape, name: str, m: Any, x: Tensor, start: Any = None) -> Any:
    zeros = [torch.zeros(m.hidden_size, dtype=x.dtype)] * 2
    state = zeros if start is None else [s[0] for s in (start if gates == 4 else (start,))]
    new = [part[None] for part in step(tape, name, m, "", x[0], state, gates)]
    return tuple(new) if gates == 4 else new[0]


# ---- modules of the zoo that apply their parameters themselves -------------------------------------------------------


def experts(tape: Tape, name: str, m: zoo.Experts, x: Tensor) -> Tensor:
    """Expert by expert; the input of `up` and the output of `down` are common to all experts."""
    score, picked = m.router(x).topk(m.top, dim=-1)
    gate = torch.zeros(*x.shape[:-1], len(m.up), dtype=x.dtype).scatter(-1, picked, score.softmax(-1))
    up, down = (f"{name}up", False), (f"{name}down", False)
    tape.enter(up, x)
    out = torch.zeros_like(x)
    for e in range(len(m.up)):
        inner = gate[..., e : e + 1] * F.silu(tape.leave(up, x @ m.up[e].T, e))
        tape.enter(down, inner, e)
        out = out + inner @ m.down[e].T
    return tape.leave(down, out)


def functional(tape: Tape, name: str, m: zoo_modules.Functional, x: Tensor) -> Tensor:
    def use(local: str, x: Tensor, w: Tensor, transposed: bool) -> Tensor:
        key = (f"{name}{local}", transposed)
        tape.enter(key, x)
        return tape.leave(key, x @ w)

    x = torch.tanh(correlate(tape, (f"{name}kernel", False), m.kernel, x, 2, 1, 1, 1, "zeros")).flatten(1)
    x = torch.tanh(use("right", x, m.right, True))
    x = torch.tanh(use("left", x, m.left.T, False))
    x = torch.tanh(m.bias + use("added", x, m.added, True))
    return use("head", x, m.head.T, False)


def tied_functional(tape: Tape, name: str, m: zoo_modules.TiedFunctional, x: Tensor) -> Tensor:
    key, x = (f"{name}embed.weight", False), torch.tanh(m.mix(m.embed(x)))
    tape.enter(key, x)
    return tape.leave(key, x @ m.embed.weight.T)


def checkpointed(tape: Tape, name: str, m: zoo_modules.Checkpointed, x: Tensor) -> Tensor:
    x = m.embed(x)
    for layer in m.layers:
        x = x + layer(x)
    return m.head(x)


NAIVE: dict[type[nn.Module], Callable] = {
    nn.Linear: linear,
    nn.Embedding: embedding,
    nn.EmbeddingBag: bag,
    nn.Bilinear: bilinear,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    nn.ConvTranspose1d: transposed_convolution,
    nn.ConvTranspose2d: transposed_convolution,
    nn.ConvTranspose3d: transposed_convolution,
    nn.MultiheadAttention: attention,
    nn.RNN: partial(recurrent, 1),
    nn.GRU: partial(recurrent, 3),
    nn.LSTM: partial(recurrent, 4),
    nn.RNNCell: partial(cell, 1),
    nn.GRUCell: partial(cell, 3),
    nn.LSTMCell: partial(cell, 4),
    zoo.Conv1D: conv1d_of_gpt2,
    zoo.Experts: experts,
    zoo_modules.Functional: functional,
    zoo_modules.TiedFunctional: tied_functional,
    zoo_modules.Checkpointed: checkpointed,
}


# ---- one sample, and all of them -------------------------------------------------------------------------------------

Samples = list[dict[Key, tuple[dict[Index, Tensor], dict[Index, Tensor]]]]
"""For each sample and use: by matrix, the input rows (R, d), and the output gradients (R', d')."""


def losses(case: ZooCase, output: Tensor, y: Tensor, padding: int | None) -> tuple[Tensor, int]:
    """The sum of losses of one sample, and its units."""
    if case.objective == "regression":
        return 0.5 * (output - y).square().sum(), 1
    labels = y.flatten() if padding is None else y.flatten().masked_fill(y.flatten() == padding, zoo_modules.IGNORED)
    return F.cross_entropy(output.flatten(0, -2), labels, reduction="sum"), int((labels != zoo_modules.IGNORED).sum())


def samples(
    case: ZooCase, model: nn.Module, x: Tensor, y: Tensor, padding: int | None = None
) -> tuple[Samples, list[float], list[int]]:
    """Each sample's rows and gradients at every use, its loss and its units."""
    model = copy.deepcopy(model).double().eval()
    tape = Tape()
    for name, module in model.named_modules():
        kind = next((cls for cls in type(module).__mro__ if cls in NAIVE), None)
        known = kind is not None or layer_of(module).operation in ("unknown", "elementwise")
        assert known, f"no naive forward for {type(module).__name__}: add one to NAIVE in tests/naive_capture.py"
        if kind is not None:
            module.forward = partial(NAIVE[kind], tape, f"{name}." if name else "", module)
    found, totals, units = [], [], []
    for i in range(len(x)):
        tape.__init__(None if padding is None else x[i] != padding)
        sample = x[i : i + 1].double() if x.is_floating_point() else x[i : i + 1]
        total, num = losses(case, model(sample), y[i : i + 1], padding)
        places = [(key, index, s) for key, by in tape.shifts.items() for index, many in by.items() for s in many]
        grads = torch.autograd.grad(total, [s for *_, s in places], allow_unused=True, materialize_grads=True)
        gradients: dict[Key, dict[Index, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        for (key, index, _), grad in zip(places, grads, strict=True):
            gradients[key][index].append(grad.reshape(-1, grad.shape[-1]))
        found.append(
            {
                key: tuple(
                    {i: torch.cat(rows) for i, rows in side.items()} for side in (tape.inputs[key], gradients[key])
                )
                for key in gradients
            }
        )
        totals.append(total.item())
        units.append(num)
    return found, totals, units


def moments(rows: Iterable[Tensor]) -> tuple[Tensor, Tensor, float]:
    """The sums of xxᵀ and of x, and the number of rows."""
    x = torch.cat(list(rows)).double()
    return x.T @ x, x.sum(0), float(len(x))
