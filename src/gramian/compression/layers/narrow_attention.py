"""torch's attention with fewer heads: the same call, parameters and names, with fewer rows in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.recording.unfused import attention

__all__ = ["NarrowAttention", "attended_nested", "narrowed_"]


class NarrowAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with any number of heads: `num_heads · head_dim` need not be `embed_dim`.

    torch's own forward takes its heads from the width of the queries, so it cannot compute with fewer. `gm.narrow`
    gives this class to the modules whose heads it removes. What torch's class has is here under the same names; with h
    heads of d numbers, `in_proj_weight` is (3 h d, embed_dim), or `q_proj_weight`, `k_proj_weight` and `v_proj_weight`
    (h d, ·), and `out_proj.weight` (embed_dim, h d). In `nn.TransformerEncoderLayer` it runs outside of the fused
    kernel of inference, which takes whole attention alone.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: those
            of `nn.MultiheadAttention`; as constructed, it has all heads.

    Raises:
        InputError: in a call, a mask has a shape for another number of heads, or is neither boolean nor
            floating-point; `is_causal` without a mask; nested tensors that are not self-attention.

    Cost: that of the heads.
    Source: torch's `multi_head_attention_forward`.

    >>> whole, x = nn.MultiheadAttention(8, 2), torch.randn(5, 3, 8)
    >>> same = NarrowAttention(8, 2)
    >>> _ = same.load_state_dict(whole.state_dict())
    >>> bool((same(x, x, x)[0] - whole(x, x, x)[0]).abs().max() < 1e-6)
    True
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The outputs and the weights, as torch's class gives them.

        Args:
            query: (T, N, embed_dim), with `batch_first` (N, T, embed_dim), or of one sample (T, embed_dim).
            key, value: (S, N, kdim) and (S, N, vdim), or alike.
            key_padding_mask: (N, S) or (S,): `True` where a key is left out, or numbers that are added to its scores.
            need_weights: whether the weights are returned.
            attn_mask: (T, S), or (N · heads, T, S) for the heads that are left; as the other mask.
            average_attn_weights: whether the weights are the mean of those of the heads.
            is_causal: a hint that `attn_mask` is the causal one.
        """
        if query.is_nested:
            return attended_nested(self, query, key, value, key_padding_mask, need_weights, attn_mask)
        batched = query.ndim == 3
        turned = self.batch_first and batched
        if turned:  # one tensor stays one
            first = query.transpose(0, 1)
            second = first if key is query else key.transpose(0, 1)
            value = second if value is key else value.transpose(0, 1)
            query, key = first, second
        length, source = query.shape[0], key.shape[0]
        num = query.shape[1:-1]  # of samples
        every = (num[0] if batched else 1) * self.num_heads
        _check("attn_mask", attn_mask, (length, source), (every, length, source))
        _check("key_padding_mask", key_padding_mask, (*num, source))
        if is_causal and attn_mask is None:
            raise InputError("NarrowAttention: is_causal is a hint of what attn_mask is; give that too")
        out, weights = attention(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            self.training,
            key_padding_mask,
            need_weights,
            attn_mask,
            self.in_proj_weight is None,
            self.q_proj_weight,
            self.k_proj_weight,
            self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return (out.transpose(0, 1) if turned else out), weights

    def _reset_parameters(self) -> None:
        """Drawn again as torch's class draws them: transformers calls this of a model that it reads."""
        marked = self._qkv_same_embed_dim
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = marked


def _check(name: str, mask: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if mask is None:
        return
    if tuple(mask.shape) not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise InputError(f"NarrowAttention: {name} is {tuple(mask.shape)}, wanted {wanted}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise InputError(f"NarrowAttention: {name} is {mask.dtype}, wanted a boolean or floating-point mask")


def narrowed_(module: nn.MultiheadAttention) -> None:
    """Lets a module whose parameters have lost heads compute with those that are left, in place."""
    module.__class__ = NarrowAttention
    module._qkv_same_embed_dim = False  # by which nn.TransformerEncoderLayer keeps to modules instead of its kernel


def attended_nested(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    **named: Any,
) -> tuple[Tensor, Tensor | None]:
    """Self-attention of samples of unequal length, which `nn.TransformerEncoder` puts in place of padding at inference.

    Args:
        module: called with padded samples; the other arguments are those of its call.
    """
    if query is not key or key is not value or attn_mask is not None or key_padding_mask is not None:
        raise InputError("attention: nested tensors are taken as query, key and value in one, without masks")
    lengths = [len(sample) for sample in query.unbind()]
    x = query.to_padded_tensor(0.0)
    padding = torch.arange(x.shape[1], device=x.device) >= torch.tensor(lengths, device=x.device)[:, None]
    out, weights = module(x, x, x, key_padding_mask=padding, need_weights=need_weights, **named)
    rows = [sample[:length] for sample, length in zip(out, lengths, strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=query.layout), weights
