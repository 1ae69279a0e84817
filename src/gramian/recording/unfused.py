"""Attention and recurrence as torch computes them, written in operations that a capture sees.

torch runs each in one kernel, which hides the products with the weights. Every function here takes the arguments of the
one that it replaces, and gives the same output and gradients to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["UNFUSED", "cells_hidden", "first_steps"]

_hides_cells: ContextVar[bool] = ContextVar("hides_cells", default=False)


@contextmanager
def cells_hidden() -> Iterator[None]:
    """A context in which function modes see a recurrence's products, and of what is between them the first step."""
    token = _hides_cells.set(True)
    try:
        yield
    finally:
        _hides_cells.reset(token)


# ---- attention -------------------------------------------------------------------------------------------------------


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`torch.nn.functional.multi_head_attention_forward`, with an `F.linear` for each product with a weight.

    Query (T, N, E), key and value (S, N, ·), or without N. Inside, samples come first: (N, T, E). The size of a head
    follows from the weights, so that there may be fewer heads than torch's function takes.
    """
    batched = query.ndim == 3
    same_kv, same = key is value, query is key and key is value
    if not batched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    query, key = query.transpose(0, 1), key.transpose(0, 1)
    value = key if same_kv else value.transpose(0, 1)
    if use_separate_proj_weight:
        assert q_proj_weight is not None
        assert k_proj_weight is not None
        assert v_proj_weight is not None
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b)
            for x, w, b in zip((query, key, value), (q_proj_weight, k_proj_weight, v_proj_weight), biases, strict=True)
        )
    else:
        assert in_proj_weight is not None
        q, k, v = _packed(query, key, value, in_proj_weight, in_proj_bias, same=same, same_kv=same_kv)
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.transpose(0, 1).expand(len(k), 1, -1)], 1)
        v = torch.cat([v, bias_v.transpose(0, 1).expand(len(v), 1, -1)], 1)
    head = q.shape[-1] // num_heads
    q = q.unflatten(-1, (num_heads, head)).transpose(1, 2)
    k = k.unflatten(-1, (num_heads, head)).transpose(1, 2) if static_k is None else _static(static_k, num_heads)
    v = v.unflatten(-1, (num_heads, head)).transpose(1, 2) if static_v is None else _static(static_v, num_heads)
    if add_zero_attn:
        k, v = (torch.cat([t, t.new_zeros(*t.shape[:2], 1, head)], 2) for t in (k, v))
    masked = not (is_causal and key_padding_mask is None and not need_weights)
    mask = _mask(attn_mask, key_padding_mask, len(q), num_heads, k.shape[2], q.dtype) if masked else None
    dropout = dropout_p if training else 0.0
    weights = None
    if need_weights:
        scores = (q * math.sqrt(1.0 / head)) @ k.mT
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        out = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if batched else weights.squeeze(0)
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=not masked)
    out = F.linear(out.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    out = out.transpose(0, 1).contiguous()  # torch's layout, in whose order a dropout that follows draws
    return (out if batched else out.squeeze(1)), weights


def _packed(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, *, same: bool, same_kv: bool
) -> Sequence[Tensor]:
    """Queries, keys and values by one packed weight (3D, E): in one product where they come from one tensor."""
    if same:
        return F.linear(query, weight, bias).chunk(3, -1)
    width = len(weight) // 3
    parts = [width, 2 * width] if same_kv else [width] * 3
    weights, biases = weight.split(parts), [None] * len(parts) if bias is None else bias.split(parts)
    found = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=False)]
    return (found[0], *found[1].chunk(2, -1)) if same_kv else found


def _static(t: Tensor, num_heads: int) -> Tensor:
    return t.unflatten(0, (-1, num_heads))


def _mask(
    mask: Tensor | None, padding: Tensor | None, num: int, num_heads: int, length: int, dtype: torch.dtype
) -> Tensor | None:
    """Both masks as one that is added to the scores (N, heads, T, S); keys that were appended are never masked."""
    if mask is not None and mask.ndim == 3:
        mask = mask.unflatten(0, (num, num_heads))
    both = None
    for part in (mask, None if padding is None else padding[:, None, None, :]):
        if part is None:
            continue
        if part.dtype == torch.bool:
            part = torch.zeros(part.shape, dtype=dtype, device=part.device).masked_fill(part, -torch.inf)
        part = F.pad(part, (0, length - part.shape[-1]))
        both = part if both is None else both + part
    return both


# ---- recurrence ------------------------------------------------------------------------------------------------------

_PADDED = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")
_PACKED = ("data", "batch_sizes", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional")

State = tuple[Tensor, ...]
# (projected input, projected state, state) -> new state, whose first element is the output
Cell = Callable[[Tensor, Tensor, State], State]


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    i, f, g, o = (x + h).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), h.chunk(3, -1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    return (n + z * (state[0] - n),)


def _tanh(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).tanh(),)


def _relu(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).relu(),)


def first_steps(func: Callable, args: tuple, named: Mapping[str, Any], num: int) -> tuple[Any, ...] | None:
    """The arguments of a recurrence over its first steps alone; `None` where it has no more, or `func` is none.

    Args:
        func: of `UNFUSED`.
        args, named: of its call.
        num: how many steps.
    """
    if func not in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu):
        return None
    args, packed = _in_order(args, named)
    if packed:
        data, sizes, *others = args
        return (data[: int(sizes[:num].sum())], sizes[:num], *others) if len(sizes) > num else None
    dim = 1 if args[-1] else 0
    return (args[0].narrow(dim, 0, num), *args[1:]) if args[0].shape[dim] > num else None


def _in_order(args: tuple, named: Mapping[str, Any]) -> tuple[tuple[Any, ...], bool]:
    """The arguments of a recurrence by position, and whether its sequences are packed."""
    packed = "data" in named or "batch_sizes" in named or (len(args) > 3 and isinstance(args[3], (list, tuple)))
    return (*args, *(named[name] for name in (_PACKED if packed else _PADDED)[len(args) :])), packed


def recurrent(cell: Cell, num_states: int) -> Callable[..., tuple[Tensor, ...]]:
    """`torch.lstm`, `gru`, `rnn_tanh` or `rnn_relu`: layers, directions, packed sequences, projections.

    The inputs of all steps are multiplied at once, the state at each step.
    """

    def run(*args: Any, **named: Any) -> tuple[Tensor, ...]:
        args, packed = _in_order(args, named)
        if packed:
            x, batch_sizes, states, weights, biases, num_layers, dropout, train, bidirectional = args
            sizes = batch_sizes.tolist()
        else:
            x, states, weights, biases, num_layers, dropout, train, bidirectional, batch_first = args
            x = x.transpose(0, 1) if batch_first else x
            sizes = [x.shape[1]] * len(x)
            x = x.flatten(0, 1)
        states = states if num_states > 1 else (states,)
        directions = 2 if bidirectional else 1
        each = len(weights) // (num_layers * directions)
        finals: list[list[Tensor]] = [[] for _ in range(num_states)]
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                k = layer * directions + direction
                own = weights[k * each : (k + 1) * each]
                y, final = _layer(cell, x, sizes, tuple(s[k] for s in states), own, biases, reverse=direction == 1)
                outputs.append(y)
                for kept, state in zip(finals, final, strict=True):
                    kept.append(state)
            x = torch.cat(outputs, -1) if directions > 1 else outputs[0]
            if dropout and train and layer + 1 < num_layers:
                x = F.dropout(x, dropout)
        if not packed:
            x = x.unflatten(0, (len(sizes), -1))
            x = x.transpose(0, 1) if args[-1] else x
        return (x, *(torch.stack(state) for state in finals))

    return run


def _layer(
    cell: Cell, x: Tensor, sizes: list[int], first: State, weights: Sequence[Tensor], biases: bool, *, reverse: bool
) -> tuple[Tensor, State]:
    """One layer in one direction on rows x (Σ sizes, I), of which `sizes[t]` belong to step t."""
    w_ih, w_hh = weights[:2]
    b_ih, b_hh = weights[2:4] if biases else (None, None)
    w_hr = weights[-1] if len(weights) in (3, 5) else None
    steps = F.linear(x, w_ih, b_ih).split(sizes)
    state, outputs = tuple(s[: sizes[-1] if reverse else sizes[0]] for s in first), []
    ended: list[State] = []
    hidden = _hides_cells.get()
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        alive = len(state[0])
        if sizes[t] < alive:  # forward: sequences that have ended keep their last state
            ended.append(tuple(s[sizes[t] :] for s in state))
            state = tuple(s[: sizes[t]] for s in state)
        elif sizes[t] > alive:  # backward: sequences whose last step this is start here
            state = tuple(torch.cat([s, f[alive : sizes[t]]]) for s, f in zip(state, first, strict=True))
        product = F.linear(state[0], w_hh, b_hh)
        with torch._C.DisableTorchFunction() if hidden and outputs else nullcontext():
            new = cell(steps[t], product, state)
        state = new if w_hr is None else (F.linear(new[0], w_hr), *new[1:])
        outputs.append(state[0])
    if reverse:
        outputs.reverse()
    return torch.cat(outputs), _joined(state, ended)


def _joined(state: State, ended: list[State]) -> State:
    """The last states of all sequences, longest first: those that ran to the end, then those that ended before."""
    return tuple(torch.cat([s, *(part[i] for part in reversed(ended))]) for i, s in enumerate(state))


def single(cell: Cell, num_states: int) -> Callable[..., Any]:
    """`torch.lstm_cell`, `torch.gru_cell`, `torch.rnn_tanh_cell` or `torch.rnn_relu_cell`: one step."""

    def run(
        input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
    ) -> Any:
        state = tuple(hx) if num_states > 1 else (hx,)
        new = cell(F.linear(input, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state)
        return new if num_states > 1 else new[0]

    return run


UNFUSED: dict[Callable, Callable] = {
    F.multi_head_attention_forward: attention,
    torch.lstm: recurrent(_lstm, 2),
    torch.gru: recurrent(_gru, 1),
    torch.rnn_tanh: recurrent(_tanh, 1),
    torch.rnn_relu: recurrent(_relu, 1),
    torch.lstm_cell: single(_lstm, 2),
    torch.gru_cell: single(_gru, 1),
    torch.rnn_tanh_cell: single(_tanh, 1),
    torch.rnn_relu_cell: single(_relu, 1),
}
"""For each fused function of torch, its unfused equivalent."""
