"""The norms of many tensors at once: whether all are finite, in one number, and the size of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gramian.inspection.passes.nonfinite_origin import are_finite, values_of

__all__ = ["all_finite", "norms", "sampled"]

# Entries of a matrix whose change in a step is measured, if it has more than these: whole rows, evenly spaced.
SAMPLE = 2**16

# Vectors up to this length are put together, since a sum of each would be a call and nothing else.
SHORT = 2**12

# Up to so many entries the call counts, and above it the memory that is written too.
SMALL = 2**13

_ONE = torch.ones(())

_NARROW = (torch.float16, torch.bfloat16)
_WIDE = (torch.float32, torch.float64)


def all_finite(found: Iterable[Tensor], *, flag: Tensor | None = None) -> bool:
    """Whether all values are: from one number for each tensor, and one synchronization with the device.

    On a processor these are sums, elsewhere norms, which torch computes of many tensors at once. A number that is not
    finite may have overflown; the largest value then decides.

    Args:
        found: the tensors.
        flag: a zero of the processor, float32 and without dimensions, which is zero again afterwards. Where it is given
            the tensors may be written, with the values that they have: small ones of a processor are then looked at in
            one call, that of `torch.amp.GradScaler`, which multiplies by one, and refuses what it cannot read. A zero
            made for each look would take longer than the look.
    """
    found, total, short = list(found), 0.0, []
    if flag is not None and found and found[0].is_cpu:
        are_small = max(map(Tensor.numel, found)) <= SMALL
        small = found if are_small else [t for t in found if t.numel() <= SMALL]
        try:
            torch._amp_foreach_non_finite_check_and_unscale_(small, flag, _ONE)
            found = [] if are_small else [t for t in found if t.numel() > SMALL]
        except RuntimeError:  # one is sparse, or repeats its memory: all of them are looked at below
            pass
        if flag.item():
            flag.zero_()
            return False
        if not found:
            return True
    for t in found:
        if type(t) is not Tensor or not t.is_cpu or t.dtype not in _WIDE:
            break
        if t.ndim == 1 and len(t) <= SHORT:
            short.append(t)
        else:
            total += t.sum().item()
    else:
        total += torch.cat(short).sum().item() if short else 0.0
        return math.isfinite(total) or are_finite(map(values_of, found))
    total = 0.0
    values = [values_of(t) if t.requires_grad or not _is_plain(t) else t for t in found]
    if all(t.is_cpu for t in values):
        for t in values:
            total += (t.sum(dtype=torch.float32) if t.dtype in _NARROW else t.sum()).item()
        return math.isfinite(total) or are_finite(values)
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for norm in _norms(values):
        by_kind.setdefault((norm.device, norm.dtype), []).append(norm)
    sums = [float(torch.stack(of).sum()) for of in by_kind.values()]
    return all(map(math.isfinite, sums)) or are_finite(values)


def norms(found: Mapping[str, Tensor]) -> dict[str, float]:
    """The Frobenius norm of each tensor, by name; one synchronization with each device.

    It is summed in float32, and in float64 where squares are out of range.
    """
    read: dict[str, float] = {}
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, norm in zip(found, _norms(list(found.values())), strict=True):
        by_device.setdefault(norm.device, []).append((name, norm.double()))
    for of in by_device.values():
        read |= zip((name for name, _ in of), torch.stack([norm for _, norm in of]).tolist(), strict=True)
    lost = [name for name, norm in read.items() if norm == 0.0 or not math.isfinite(norm)]
    exact = {n: float(torch.linalg.vector_norm(values_of(found[n]), dtype=torch.float64)) for n in lost}
    return {name: exact.get(name, read[name]) for name in found}


def _is_plain(t: Tensor) -> bool:
    return type(t) is Tensor and not t.is_sparse and not t.is_complex() and t.dtype.itemsize > 1


def _norms(found: Sequence[Tensor]) -> list[Tensor]:
    """The norms, in their order; of narrow types in float32."""
    values = [t if _is_plain(t) else values_of(t) for t in found]
    result: list[Tensor | None] = [None] * len(values)
    with torch.no_grad():
        for is_narrow in (False, True):
            places = [i for i, t in enumerate(values) if (t.dtype in _NARROW) == is_narrow]
            if places:
                tensors = [values[i] for i in places]
                of = torch._foreach_norm(tensors, 2, dtype=torch.float32) if is_narrow else torch._foreach_norm(tensors)
                for i, norm in zip(places, of, strict=True):
                    result[i] = norm
    return [norm for norm in result if norm is not None]


def sampled(matrices: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Of each matrix the rows whose change in a step is measured: all, or evenly spaced ones of a large matrix."""
    values = ((name, values_of(t)) for name, t in matrices)
    return {name: t[:: max(1, min(len(t), t.numel() // SAMPLE))] for name, t in values if t.numel()}
