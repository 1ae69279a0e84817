"""Quantized weights: how the tensors of each scheme are named, and how the weight is computed from them.

Every scheme is dequantized in float32, one tensor at a time. What is packed in a way that no row knows stays as it is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gramian.checkpoint.packing import RANKS, spread, unpack
from gramian.checkpoint.schemes import Plan, Scheme, Setting

__all__ = ["QUANTIZED"]

# The values of the sixteen codes of e2m1, the four-bit floats of MXFP4 and NVFP4.
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

# Which of eight consecutive columns AWQ keeps in each four bits of an integer, lowest first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

BLOCK = 128  # side of the blocks that share a scale in DeepSeek's float8, where config.json does not say

_NUMBERS = {"float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "int8"}


def _scaled(setting: Setting) -> Plan | str | None:
    """(q − z) s: a scale for the whole tensor, for each row, or for each block of rows and columns."""
    q, s, z = (setting.parts.get(word) for word in ("q", "scale", "zero"))
    assert q is not None
    assert s is not None
    if len(q.shape) < 2 or s.kind == "empty" or not (q.dtype in _NUMBERS or (q.dtype == "uint8" and z is not None)):
        return None
    blocks = _blocks(q.shape, s.shape, _quantization(setting.config).get("weight_block_size"))
    if blocks is None:
        return f"scales of shape {s.shape} do not fit a weight {q.shape}: not dequantized"

    def compute(parts: Mapping[str, Tensor]) -> Tensor:
        w = parts["q"].float()
        if "zero" in parts:
            w = w - _spread(parts["zero"].float(), blocks, q.shape)
        return w * _spread(parts["scale"].float(), blocks, q.shape)

    per = "tensor" if math.prod(s.shape) == 1 else "row" if blocks == (1, *q.shape[1:]) else "block"
    return Plan(q.shape, "float32", f"dequantized from {q.dtype} (a scale per {per})", compute)


def _blocks(shape: tuple[int, ...], scales: tuple[int, ...], told: Any) -> tuple[int, ...] | None:
    """The lengths of the blocks of a tensor that share one scale; `None` where the shapes do not fit."""
    if math.prod(scales) == 1:
        return shape
    if len(scales) == 1 and scales[0] == shape[0]:
        scales = (*scales, *(1,) * (len(shape) - 1))
    if len(scales) != len(shape):
        return None
    is_pair = isinstance(told, list) and len(told) == 2 and all(isinstance(n, int) and n > 0 for n in told)
    for sizes in ([told] if is_pair else []) + [[BLOCK, BLOCK]]:  # the last block of rows or columns may be shorter
        blocks = (*(1,) * (len(shape) - 2), *sizes)
        if all(math.ceil(n / b) == k for n, b, k in zip(shape, blocks, scales, strict=True)):
            return blocks
    if any(n % k for n, k in zip(shape, scales, strict=True)):
        return None
    return tuple(n // k for n, k in zip(shape, scales, strict=True))


def _spread(scales: Tensor, blocks: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """A scale for every entry, or for every row where that is all that they are."""
    if scales.numel() == 1:
        return scales.reshape(())
    if scales.ndim == 1:
        scales = scales.reshape(-1, *(1,) * (len(shape) - 1))
    for axis, (length, block) in enumerate(zip(shape, blocks, strict=True)):
        if scales.shape[axis] > 1 and block > 1:
            scales = scales.repeat_interleave(block, axis).narrow(axis, 0, length)
    return scales


def _llm_int8(setting: Setting) -> Plan | None:
    """q s / 127, with the largest magnitude of each row in s (Dettmers et al. 2208.07339)."""
    q, s = setting.parts["q"], setting.parts["scale"]
    if q.dtype != "int8" or len(q.shape) != 2 or s.shape != q.shape[:1]:
        return None
    return Plan(
        q.shape, "float32", "dequantized from int8 (bitsandbytes LLM.int8)",
        lambda parts: parts["q"].float() * (parts["scale"].float() / 127)[:, None],
    )  # fmt: skip


def _bitsandbytes(setting: Setting) -> Plan | str:
    """code[q] absmax in blocks (Dettmers et al. 2305.14314); absmax may be quantized itself."""
    try:
        state = json.loads(bytes(setting.read(setting.parts["state"]).flatten().tolist()))
        shape, block = tuple(int(n) for n in state["shape"]), int(state["blocksize"])
        kind, nested = str(state["quant_type"]), int(state.get("nested_blocksize") or 0)
        offset = float(state.get("nested_offset") or 0.0)
    except (ValueError, KeyError, TypeError, RecursionError):
        return "the state of bitsandbytes cannot be read: not dequantized"
    count = math.prod(shape)
    short = math.prod(setting.parts["q"].shape) * 2 < count or math.prod(setting.parts["absmax"].shape) * block < count
    if min(shape, default=0) < 1 or block < 1 or short or (nested and "nested" not in setting.parts):
        return "the state of bitsandbytes does not fit its weight: not dequantized"

    def compute(parts: Mapping[str, Tensor]) -> Tensor:
        absmax = parts["absmax"].flatten()
        if nested:
            scales = parts["nested"].float().flatten().repeat_interleave(nested)[: len(absmax)]
            absmax = parts["nested code"].float()[absmax.long()] * scales + offset
        packed = parts["q"].flatten().view(torch.uint8)
        codes = torch.stack((packed >> 4, packed & 15), 1).flatten()[:count]
        return (parts["code"].float()[codes.long()] * absmax.float().repeat_interleave(block)[:count]).reshape(shape)

    return Plan(shape, "float32", f"dequantized from {kind} (bitsandbytes)", compute)


def _packed_int(setting: Setting) -> Plan | str:
    """(q − z) s of integers packed along the input, GPTQ (2210.17323), or along the output, AWQ (2306.00978)."""
    q, z, s = (setting.parts[word].shape for word in ("q", "zero", "scale"))
    if not len(q) == len(z) == len(s) == 2:
        return "packed integers of other shapes than those of GPTQ and AWQ: not dequantized"
    groups, rows = s
    bits = 32 * z[1] // rows if rows else 0
    if bits not in (2, 4, 8) or z != (groups, rows * bits // 32):
        return f"integers of {bits} bits packed in an unknown way: not dequantized"
    if q[1] == z[1] and bits == 4 and rows != z[1]:
        columns, how = q[0], "AWQ"
    elif q[1] == rows:
        columns, how = q[0] * 32 // bits, "GPTQ"
    else:
        return "packed integers of other shapes than those of GPTQ and AWQ: not dequantized"
    if columns % groups and "index" not in setting.parts:
        return f"{groups} groups do not divide {columns} inputs: not dequantized"
    # The first version of GPTQ's format keeps z − 1.
    one = 0 if how == "AWQ" or _quantization(setting.config).get("checkpoint_format") == "gptq_v2" else 1

    def compute(parts: Mapping[str, Tensor]) -> Tensor:
        order = AWQ_ORDER if how == "AWQ" else range(32 // bits)
        zeros = _unpack(parts["zero"], bits, 1, order) + one
        numbers = _unpack(parts["q"], bits, 1 if how == "AWQ" else 0, order)
        index = parts["index"].long() if "index" in parts else torch.arange(columns) // (columns // groups)
        return ((numbers - zeros[index]).float() * parts["scale"].float()[index]).mT

    return Plan((rows, columns), "float32", f"dequantized from int{bits} ({how})", compute)


def _unpack(packed: Tensor, bits: int, axis: int, order: Any) -> Tensor:
    """The integers in 32-bit words along an axis; the k-th lowest bits hold the `order[k]`-th of a word's numbers."""
    shifts = torch.empty(32 // bits, dtype=torch.int32)
    shifts[list(order)] = torch.arange(0, 32, bits, dtype=torch.int32)
    words = packed.to(torch.int32).unsqueeze(axis + 1)
    shape = [1] * words.ndim
    shape[axis + 1] = len(shifts)
    return ((words >> shifts.reshape(shape)) & (2**bits - 1)).flatten(axis, axis + 1)


def _packed_rows(setting: Setting) -> Plan | str:
    """(q − 2^(b−1)) s of compressed-tensors: integers packed along the rows, a scale per group of columns."""
    q, s, shape = setting.parts["q"], setting.parts["scale"], setting.parts["shape"]
    rows, columns = (int(n) for n in setting.read(shape).flatten().tolist()[:2])
    bits = next((b for b in (4, 8) if q.shape == (rows, math.ceil(columns * b / 32))), 0)
    groups = s.shape[-1] if len(s.shape) == 2 else 0
    fits = bits and q.dtype == "int32" and groups and columns % groups == 0 and s.shape[0] == rows
    if not fits or "other" in setting.parts:
        return "packed by compressed-tensors in an unknown way: not dequantized"

    def compute(parts: Mapping[str, Tensor]) -> Tensor:
        numbers = _unpack(parts["q"], bits, 1, range(32 // bits))[:, :columns] - 2 ** (bits - 1)
        return numbers.float() * parts["scale"].float().repeat_interleave(columns // groups, 1)

    return Plan((rows, columns), "float32", f"dequantized from int{bits} (compressed-tensors)", compute)


def _mxfp4(setting: Setting) -> Plan | str:
    """code[q] 2^(s − 127) in blocks of 32 along the input; transformers has the result as (expert, in, out)."""
    q, s = setting.parts["q"].shape, setting.parts["scale"].shape
    if q[:-1] != s or len(q) < 3:
        return "blocks and scales of MXFP4 that do not fit each other: not dequantized"
    shape = (*s[:-1], s[-1] * q[-1] * 2)

    def compute(parts: Mapping[str, Tensor]) -> Tensor:
        w = _fp4(parts["q"]) * torch.exp2(parts["scale"].float() - 127)[..., None]
        w = w.reshape(shape)
        return w.mT if w.ndim == 3 else w

    in_model = (shape[0], shape[2], shape[1]) if len(shape) == 3 else shape
    return Plan(in_model, "float32", "dequantized from MXFP4", compute)


def _nvfp4(setting: Setting) -> Plan | None:
    """code[q] s t: a float8 scale for each 16 columns, and one for the tensor, which compressed-tensors divides by."""
    q, s = setting.parts["q"], setting.parts["scale"]
    if (
        q.dtype != "uint8"
        or not s.dtype.startswith("float8")
        or len(q.shape) != 2
        or s.shape != (q.shape[0], q.shape[1] // 8)
    ):
        return None
    divides = setting.parts["global"].name.endswith("_global_scale")

    def compute(parts: Mapping[str, Tensor]) -> Tensor:
        whole = parts["global"].float().reshape(())
        scale = parts["scale"].float() / whole if divides else parts["scale"].float() * whole
        return _fp4(parts["q"]) * scale.repeat_interleave(16, 1)

    return Plan((q.shape[0], 2 * q.shape[1]), "float32", "dequantized from NVFP4", compute)


def _gramian(setting: Setting) -> Plan | str | None:
    """q s of `gm.compress`: codes of 2 to 8 bits in bytes, a scale per group of columns."""
    q, s, mark = setting.parts["q"], setting.parts["scale"], setting.parts.get("mark")
    ranks = setting.config.get(RANKS) or _quantization(setting.config).get("ranks")
    about = ranks.get(setting.name.removesuffix("weight").rstrip(".")) if isinstance(ranks, Mapping) else None
    if not isinstance(about, Mapping) or (mark is not None and mark.shape != (0,)):
        return None
    if "shape" not in about:
        return "integers of an earlier version of gramian, which does not say their shape: not dequantized"
    wrong = "integers of gramian that do not fit what the file says of them: not dequantized"
    try:
        bits, group, shape = int(about["bits"]), int(about["group"]), tuple(int(n) for n in about["shape"])
        rows = q.shape[0]
        columns = math.prod(shape) // rows
        fits = rows * columns == math.prod(shape) and 2 <= bits <= 8 and group > 0
        fits = fits and (q.shape, s.shape) == ((rows, bits * -(-columns // 8)), (rows, -(-columns // group)))
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError):
        return wrong
    if not fits or q.dtype != "uint8":
        return wrong
    transposed = bool(about.get("transposed"))

    def compute(parts: Mapping[str, Tensor]) -> Tensor:
        w = unpack(parts["q"], bits, columns) * spread(parts["scale"].float(), group, columns)
        return w.mT.reshape(shape) if transposed else w.reshape(shape)

    return Plan(shape, "float32", f"dequantized from int{bits} (gramian)", compute)


def _fp4(packed: Tensor) -> Tensor:
    """The four-bit floats in bytes, the low half first."""
    table = torch.tensor(FP4)
    return torch.stack((table[(packed & 15).long()], table[(packed >> 4).long()]), -1).flatten(-2)


def _quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder says of its quantization."""
    whole = config.get("config.json")
    inner = whole.get("quantization_config") if isinstance(whole, dict) else None
    own = config.get("quantize_config.json")
    return {**(own if isinstance(own, dict) else {}), **(inner if isinstance(inner, dict) else {})}


_STEM = r"(?P<stem>(?:.*\.)?)"

QUANTIZED: tuple[Scheme, ...] = (
    Scheme(
        "bitsandbytes nf4, fp4", re.compile(_STEM + r"(?P<w>\w+)\.quant_state\.bitsandbytes__(?P<kind>\w+)"), "state",
        {"q": ("{stem}{w}",), "absmax": ("{stem}{w}.absmax",), "code": ("{stem}{w}.quant_map",)}, "{stem}{w}",
        _bitsandbytes,
        {"nested": ("{stem}{w}.nested_absmax",), "nested code": ("{stem}{w}.nested_quant_map",)},
    ),
    Scheme(
        "bitsandbytes LLM.int8", re.compile(_STEM + "SCB"), "scale", {"q": ("{stem}weight",)}, "{stem}weight",
        _llm_int8, {"format": ("{stem}weight_format",)},
    ),
    Scheme(
        "GPTQ, AWQ", re.compile(_STEM + "qweight"), "q", {"zero": ("{stem}qzeros",), "scale": ("{stem}scales",)},
        "{stem}weight", _packed_int, {"index": ("{stem}g_idx",)},
    ),
    Scheme(
        "NVFP4", re.compile(_STEM + r"weight(_packed)?"), "q", {"scale": ("{stem}weight_scale",),
        "global": ("{stem}weight_scale_2", "{stem}weight_global_scale")}, "{stem}weight", _nvfp4,
    ),
    Scheme(
        "compressed-tensors", re.compile(_STEM + "weight_packed"), "q",
        {"scale": ("{stem}weight_scale",), "shape": ("{stem}weight_shape",)}, "{stem}weight", _packed_rows,
        {"other": ("{stem}weight_zero_point", "{stem}weight_g_idx")},
    ),
    Scheme(
        "MXFP4", re.compile(r"(?P<name>.+)_blocks"), "q", {"scale": ("{name}_scales",)}, "{name}", _mxfp4
    ),
    Scheme(
        "gramian", re.compile(_STEM + "codes"), "q", {"scale": ("{stem}scales",)}, "{stem}weight", _gramian,
        {"mark": ("{stem}weight",)},
    ),
    Scheme(
        "float8, int8", re.compile(r"(?P<name>(?P<stem>(?:.*\.)?)\w+)"), "q",
        {"scale": ("{name}_scale_inv", "{name}_scale", "{stem}scale_weight", "{stem}scales", "{stem}scale")}, "{name}",
        _scaled, {"zero": ("{name}_zero_point", "{stem}zero_point", "{stem}zeros")},
    ),
)  # fmt: skip
