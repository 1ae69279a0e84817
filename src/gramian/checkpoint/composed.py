"""Weights that are computed from other parameters: weight norm, spectral norm, pruning, and LoRA's factors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gramian.checkpoint.schemes import Plan, Scheme, Setting

__all__ = ["COMPOSED"]

ADAPTER_CONFIG = "adapter_config.json"

PRUNED = "W · mask of torch's pruning"

_MOST_REPEATS = 4


def _weight_norm(setting: Setting) -> Plan | None:
    """g v / ‖v‖, a norm for each entry of g, which has length 1 along the axes that the norm sums over."""
    v, g = setting.parts["v"], setting.parts["g"]
    shape = g.shape if len(g.shape) == len(v.shape) else (1,) * len(v.shape) if math.prod(g.shape) == 1 else ()
    if math.prod(g.shape) >= math.prod(v.shape):
        return None
    if len(shape) != len(v.shape) or any(a not in (1, b) for a, b in zip(shape, v.shape, strict=True)):
        return None
    axes = [axis for axis, length in enumerate(shape) if length == 1]

    def compute(parts: Mapping[str, Tensor]) -> Tensor:
        direction, length = parts["v"].double(), parts["g"].double().reshape(shape)
        norm = torch.linalg.vector_norm(direction, dim=axes, keepdim=True) if axes else direction.abs()
        return (length * direction / norm).to(parts["v"].dtype)

    return Plan(v.shape, v.dtype, "g v / ‖v‖ of a weight norm", compute)


def _spectral_norm(setting: Setting) -> Plan | None:
    """W / (uᵀ W v), where W is the matrix whose rows lie along the axis that has u's length."""
    w, u = setting.parts["w"], setting.parts["u"]
    rows = math.prod(u.shape)
    axis = next((axis for axis, length in enumerate(w.shape) if length == rows), None)
    if axis is None or len(w.shape) < 2:
        return None

    def compute(parts: Mapping[str, Tensor]) -> Tensor:
        whole = parts["w"].double()
        matrix, left = whole.movedim(axis, 0).flatten(1), parts["u"].double().flatten()
        right = parts["v"].double().flatten() if "v" in parts else torch.nn.functional.normalize(left @ matrix, dim=0)
        return (whole / (left @ matrix @ right)).to(parts["w"].dtype)

    return Plan(w.shape, w.dtype, "W / (uᵀ W v) of a spectral norm", compute)


def _pruned(setting: Setting) -> Plan | None:
    """W · mask, as `torch.nn.utils.prune` applies it."""
    w, mask = setting.parts["w"], setting.parts["mask"]
    if w.shape != mask.shape:
        return None
    return Plan(w.shape, w.dtype, PRUNED, lambda parts: parts["w"] * parts["mask"].to(parts["w"].dtype))


def _lora(setting: Setting) -> Plan | str | None:
    """B A α / r, or α / √r with rank-stabilized LoRA, as PEFT adds it to a weight."""
    a, b = setting.parts["A"], setting.parts["B"]
    if len(a.shape) < 2 or len(b.shape) != len(a.shape) or b.shape[1] != a.shape[0]:
        return None
    rank = a.shape[0]
    known: Any = setting.config.get(ADAPTER_CONFIG)
    known = known if isinstance(known, dict) else {}
    scale, told = _scale(setting.name.removesuffix(".weight"), rank, known)
    if "alpha" in setting.parts:
        told = "α stored beside it"
    base = setting.parts.get("base")
    if base is not None and "lora_alpha" not in known:
        return "beside its base, and no adapter_config.json gives α: factors and base are inspected apart"
    transposed = len(a.shape) == 2 and (
        bool(known.get("fan_in_fan_out")) or ".lora_embedding_A" in setting.parts["A"].name
    )
    shape = (b.shape[0], *a.shape[1:])
    dora = "; without DoRA's magnitudes, which need the base" if known.get("use_dora") else ""

    def compute(parts: Mapping[str, Tensor]) -> Tensor:
        factor = float(parts["alpha"]) / rank if "alpha" in parts else scale
        product = (parts["B"].float().flatten(1) @ parts["A"].float().flatten(1)) * factor
        product = product.mT if transposed else product.reshape(shape)
        return parts["base"].float() + product if "base" in parts else product

    shape_in_model = shape[::-1] if transposed else shape
    if base is not None and base.shape != shape_in_model:
        return "beside a base of another shape: factors and base are inspected apart"
    how = f"{'W + ' if base else ''}B A of a LoRA adapter, r = {rank}, {told}{dora}"
    return Plan(shape_in_model, "float32", how, compute, low_rank=base is None)


def _scale(module: str, rank: int, known: Mapping[str, Any]) -> tuple[float, str]:
    """The factor of a LoRA product by PEFT's config, and how it came about."""
    alpha = known.get("lora_alpha")
    patterns = known.get("alpha_pattern")
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if _matches(pattern, module):
            alpha = value
            break
    if not isinstance(alpha, (int, float)):
        return 1.0, "taken times 1, since no adapter_config.json gives α"
    if known.get("use_rslora"):
        return alpha / math.sqrt(rank), f"times α/√r = {alpha / math.sqrt(rank):.4g}"
    return alpha / rank, f"times α/r = {alpha / rank:.4g}"


def _matches(pattern: str, module: str) -> bool:
    """Whether a key of PEFT's alpha_pattern means a module: it ends its name, or is an expression that matches it.

    The expression comes from a file: one with groups or many repetitions could take forever, and is taken literally.
    """
    if re.fullmatch(r"[\w.^$\\*+|-]*", pattern) and len(re.findall(r"[*+]", pattern)) <= _MOST_REPEATS:
        try:
            return re.match(rf"(.*\.)?({pattern})$", module) is not None
        except re.error:
            pass
    return module == pattern or module.endswith(f".{pattern}")


_STEM = r"(?P<stem>(?:.*\.)?)"

COMPOSED: tuple[Scheme, ...] = (
    Scheme(
        "weight norm", re.compile(_STEM + r"(?P<w>\w+)_v"), "v", {"g": ("{stem}{w}_g",)}, "{stem}{w}_v", _weight_norm,
        weight="{stem}{w}",
    ),
    Scheme(
        "weight norm", re.compile(_STEM + r"parametrizations\.(?P<w>\w+)\.original1"), "v",
        {"g": ("{stem}parametrizations.{w}.original0",)}, "{stem}parametrizations.{w}.original1", _weight_norm,
        weight="{stem}{w}",
    ),
    Scheme(
        "pruning", re.compile(_STEM + r"(?P<w>\w+)_orig"), "w", {"mask": ("{stem}{w}_mask",)}, "{stem}{w}_orig",
        _pruned, weight="{stem}{w}",
    ),
    Scheme(
        "spectral norm", re.compile(_STEM + r"(?P<w>\w+)_orig"), "w", {"u": ("{stem}{w}_u",)}, "{stem}{w}_orig",
        _spectral_norm, {"v": ("{stem}{w}_v",)}, "{stem}{w}",
    ),
    Scheme(
        "spectral norm", re.compile(_STEM + r"parametrizations\.(?P<w>\w+)\.original"), "w",
        {"u": ("{stem}parametrizations.{w}.0._u",)}, "{stem}parametrizations.{w}.original", _spectral_norm,
        {"v": ("{stem}parametrizations.{w}.0._v",)}, "{stem}{w}",
    ),
    Scheme(
        "LoRA",
        re.compile(
            r"(?:base_model\.model\.)?(?P<stem>.+)\.lora_(?P<e>embedding_)?A(?P<a>\.[^.]+)??(?P<w>\.weight)?"
        ),
        "A", {"B": ("base_model.model.{stem}.lora_{e}B{a}{w}", "{stem}.lora_{e}B{a}{w}")}, "{stem}.weight", _lora,
        {"base": ("base_model.model.{stem}.base_layer.weight", "{stem}.base_layer.weight")},
    ),
    Scheme(
        "LoRA", re.compile(r"(?P<stem>.+)[._]lora[._]down\.weight"), "A",
        {"B": ("{stem}.lora_up.weight", "{stem}_lora.up.weight", "{stem}.lora.up.weight")}, "{stem}.weight", _lora,
        {"alpha": ("{stem}.alpha",)},
    ),
)  # fmt: skip
