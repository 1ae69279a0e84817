"""Codes of few bits in bytes, as `gm.compress` stores quantized weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["RANKS", "pack", "spread", "unpack"]

RANKS = "gramian.ranks"
"""The entry of a file's metadata that has, as JSON, the ranks of its layers, or their bits and groups."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of few bits in bytes: eight codes in `bits` bytes, the first in the lowest bits.

    Args:
        codes: (m, n), int8, from `-2^(bits-1)` to `2^(bits-1) - 1`.
        bits: 2 to 8.

    Returns:
        (m, bits · ⌈n / 8⌉), uint8.

    Cost: one pass, in 64-bit integers.
    Source: the definition. Of four bits, each byte has two codes, the first in its lower half, as is usual.

    >>> pack(torch.tensor([[-8, 7]], dtype=torch.int8), 4)
    tensor([[240, 136, 136, 136]], dtype=torch.uint8)
    """
    low = 2 ** (bits - 1)
    eights = functional.pad(codes.long() + low, (0, -codes.shape[1] % 8), value=low).unflatten(1, (-1, 8))
    # Of eight bits, the last code reaches the sign of the word, which is a bit like any other.
    words = (eights << torch.arange(0, 8 * bits, bits, device=codes.device)).sum(2)
    octets = words.unsqueeze(2) >> torch.arange(0, 8 * bits, 8, device=codes.device)
    return (octets & 255).to(torch.uint8).flatten(1)


def unpack(packed: Tensor, bits: int, num: int) -> Tensor:
    """The codes (m, num) that `pack` put into bytes.

    Args:
        packed: (m, bits · ⌈num / 8⌉), uint8.
        bits: of a code.
        num: codes of each row.

    Returns:
        (m, num), int8.

    Cost: one pass; of bits other than 4 and 8 in 64-bit integers.
    Source: the inverse of `pack`.

    >>> codes = torch.arange(-4, 4, dtype=torch.int8)[None, :7]
    >>> torch.equal(unpack(pack(codes, 3), 3, 7), codes)
    True
    """
    low = 2 ** (bits - 1)
    if bits == 8:
        return packed[:, :num].bitwise_xor(128).view(torch.int8)
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], 2).flatten(1)[:, :num].view(torch.int8) - low
    octets = packed.unflatten(1, (-1, bits)).long()
    words = (octets << torch.arange(0, 8 * bits, 8, device=packed.device)).sum(2, keepdim=True)
    eights = (words >> torch.arange(0, 8 * bits, bits, device=packed.device)) & (2**bits - 1)
    return (eights.flatten(1)[:, :num] - low).to(torch.int8)


def spread(scales: Tensor, group: int, num: int) -> Tensor:
    """The scale of each of `num` columns; (m, 1) where each row has one scale.

    Args:
        scales: (m, number of groups).
        group: columns that share a scale; the last group may have fewer.
        num: columns.
    """
    return scales if scales.shape[1] == 1 else scales.repeat_interleave(group, 1)[:, :num]
