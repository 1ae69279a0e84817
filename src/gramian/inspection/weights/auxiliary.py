"""Tensors of a file that are no weights: optimizers' states, running averages, tables, masks, scales.

A file does not say what its tensors are for. A name that ends in another tensor's name, a shape or values that only
such a tensor has decide where they can, and names that libraries agree on where they cannot.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from gramian.checkpoint import Checkpoint, Entry
from gramian.layers import role_by_name

__all__ = ["AUXILIARY", "find_auxiliary", "is_mask", "is_table_of_waves"]

_OPTIMIZER = "an optimizer's state"
_AVERAGE = "a running average of the weights"
_WAVES = "a fixed table of sines and cosines"
_MASK = "a mask"
_CACHE = "a cache or counter"
_STATISTICS = "running statistics of a norm"
_SCALES = "a part of a weight quantized in an unknown way"
_SCALE = "a part of a parametrized weight"

# Reasons for which a tensor is no parameter.
AUXILIARY = (_OPTIMIZER, _AVERAGE, _WAVES, _MASK, _CACHE, _STATISTICS, _SCALES, _SCALE)

_OPTIMIZERS = re.compile(r"(.+_)?optim(izer)?s?(_states?|_state_dicts?)?")
_AVERAGES = re.compile(
    r"(.+_)?(ema|swa|shadow)(_model|_params|_weights|_state|_state_dict)?|averaged_model|shadow_params|average_params"
)
_TABLES = re.compile(r"(.*_)?(inv_freq|freqs_(cis|cos|sin)|(cos|sin)_(cached|cache)|cos_sin_cache)(_.*)?")
_MASKS = re.compile(r"masked_bias|(.*_)?(causal|attention|attn)_mask|relative_position_index|relative_coords_table")
_CACHES = re.compile(r"((k|v|key|value|kv)_?cache|num_batches_tracked)(_.*)?")
_PART = re.compile(
    r"(.*[_.])?(scales?|scb|zeros?|zero_points?|q(weight|zeros)|absmax|quant_map|codebooks?|codes|scale_inv)(_\w+)?"
)
_PARAMETRIZED = re.compile(r"(.*\.)?parametrizations\.\w+\.(original0|\d+\.(base|_u|_v))")
_NAMED = ((_TABLES, _WAVES), (_MASKS, _MASK), (_CACHES, _CACHE))

_FEWEST = 3  # rows of a mask or table, below which its values do not tell


def find_auxiliary(checkpoint: Checkpoint) -> dict[str, str]:
    """Why tensors are no weights, by name. Reads a few rows of those whose names leave it open."""
    entries = checkpoint.entries
    averages = _averages(checkpoint)
    packed = _packed_modules(checkpoint)
    reasons = {}
    for name, entry in entries.items():
        reason = ""
        if entry.part_of:
            made = entries[entry.part_of].made
            reason = f"a part of a weight that is inspected as {made.how if made else 'a whole'}"
        elif entry.made is None and not entry.tied_to:
            reason = (
                _of_optimizer(entry, checkpoint)
                or (_AVERAGE if name in averages else "")
                or _by_name(entry, checkpoint)
                or (_SCALES if name.rpartition(".")[0] in packed and _PART.fullmatch(name.rpartition(".")[2]) else "")
                or _by_values(entry, checkpoint)
            )
        if reason:
            reasons[name] = reason
    return reasons


def _of_optimizer(entry: Entry, checkpoint: Checkpoint) -> str:
    """A tensor under an optimizer, or one whose name is a parameter's and a word, as in `a.weight.exp_avg`."""
    parent, _, word = entry.name.rpartition(".")
    if any(_OPTIMIZERS.fullmatch(part) for part in parent.split(".")):
        return _OPTIMIZER
    while parent:
        other = checkpoint.entries.get(parent)
        if other is not None and word and other.shape == entry.shape and other.made is None:
            return _OPTIMIZER
        parent = parent.partition(".")[2]
    return ""


def _averages(checkpoint: Checkpoint) -> set[str]:
    """The tensors under a running average, where the file has tensors of the same shapes elsewhere."""
    under, shapes = [], set()
    for name, entry in checkpoint.entries.items():
        if any(_AVERAGES.fullmatch(part) for part in name.split(".")[:-1]):
            under.append(entry)
        else:
            shapes.add(entry.shape)
    return {entry.name for entry in under} if all(entry.shape in shapes for entry in under if entry.shape) else set()


def _packed_modules(checkpoint: Checkpoint) -> set[str]:
    """The modules that hold a table of integers that no scheme dequantized."""
    return {
        name.rpartition(".")[0]
        for name, entry in checkpoint.entries.items()
        if len(entry.shape) > 1 and not entry.part_of and not entry.made and entry.kind in ("quantized", "integer")
        and entry.dtype != "bool"
    }  # fmt: skip


def _by_name(entry: Entry, checkpoint: Checkpoint) -> str:
    """What a name says on which libraries agree."""
    module, _, local = entry.name.rpartition(".")
    for pattern, reason in _NAMED:
        if pattern.fullmatch(local):
            return reason
    if local == "bias" and len(entry.shape) > 2 and module.rpartition(".")[2] in ("attn", "attention"):
        return _MASK
    if local in ("running_mean", "running_var") and len(entry.shape) == 1:
        return _STATISTICS
    if _PARAMETRIZED.fullmatch(entry.name) or (local == "weight_g" and f"{module}.weight_v" in checkpoint.entries):
        return _SCALE
    return ""


def _by_values(entry: Entry, checkpoint: Checkpoint) -> str:
    """What values say: of a tensor that is not called a weight, or may be a table of positions."""
    shape = tuple(length for length in entry.shape if length > 1)
    if entry.kind != "float" or len(shape) != 2 or min(shape) < _FEWEST:
        return ""
    if entry.name.endswith("weight") and role_by_name(entry.name, entry.shape, False) != "embedding":
        return ""
    table = checkpoint.load(entry.name).reshape(shape)
    if is_table_of_waves(table):
        return _WAVES
    return _MASK if is_mask(table) else ""


def is_table_of_waves(table: Tensor) -> bool:
    """Whether each column k of a table (position, k) is cos(θₖ position) or sin(θₖ position), by its first rows."""
    if min(table.shape) < _FEWEST:
        return False
    start = table[:_FEWEST].double()
    tolerance = 4 * torch.finfo(table.dtype).eps
    zero, one, two = start
    if not bool(((zero == 0) | (zero == 1)).all()) or float(one.abs().max()) > 1 or not bool(start.isfinite().all()):
        return False
    cosine = (two - (2 * one.square() - 1)).abs() <= tolerance
    sine = (two - 2 * one * (1 - one.square()).clamp_min(0).sqrt()).abs() <= tolerance
    moves = (one - zero).abs().max() > tolerance
    return bool(torch.where(zero == 1, cosine, sine).all() and moves)


def is_mask(table: Tensor) -> bool:
    """Whether a square table has one value on and below its diagonal and another one above it."""
    if table.shape[0] != table.shape[1] or len(table) < _FEWEST:
        return False
    low, high = table[1, 0], table[0, 1]
    if bool(low == high) or bool((table[0, 1:] != high).any()) or bool((table[-1] != low).any()):
        return False
    above = torch.ones_like(table, dtype=torch.bool).triu(1)
    return bool((table == torch.where(above, high, low)).all())
