"""Writes the difference of two checkpoints as a LoRA adapter in PEFT's format."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gramian.checkpoint import open_checkpoint, save_tensors
from gramian.errors import CheckpointError, InputError, some
from gramian.inspection.comparing.changes import change_between, rounding_floor
from gramian.inspection.comparing.matching import Pairs, is_in_out, refuse_adapter
from gramian.inspection.comparing.peft_format import PREFIX, Modules, config_of_adapter
from gramian.inspection.experiments.intended_zeros import is_factor, name_pattern
from gramian.inspection.weights.quadrature import leading_vectors
from gramian.layers.lookup import match_pattern
from gramian.report.files import write_text
from gramian.report.model import plural

__all__ = ["Adapter", "extract_lora"]

# How many kinds of tensors a note names.
MOST_KINDS = 20


@dataclass(frozen=True)
class Adapter:
    """An adapter that was written, and its error against the difference Δ of the checkpoints.

    Args:
        folder: where it is.
        rank: r of the factors.
        errors: ‖Δ − BA‖_F / ‖Δ‖_F of each module.
        error: the same of all modules together.
        left_out: tensors that changed and are not in the adapter.
        saved: modules that are in it whole, as PEFT's `modules_to_save`.
        overwritten: tensors that are in it whole and take the place of the base's own.
        rounding: tensors that differ, but by no more than rounding; they are not in it.
        remarks: what must be known to use it.
    """

    folder: Path
    rank: int
    errors: Mapping[str, float]
    error: float
    left_out: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    overwritten: tuple[str, ...] = ()
    rounding: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """The adapter in sentences, for a report."""
        worst = max(self.errors, key=lambda name: self.errors[name])
        notes = [
            f"Adapter of rank {self.rank} for {plural(len(self.errors), 'module')} in {self.folder}: relative error "
            f"{self.error:.2e} in all, {self.errors[worst]:.2e} at most ({worst})"
        ]
        for what, names in (
            ("Whole in the adapter, as modules_to_save", self.saved),
            ("Whole in the adapter, loaded over the base's own (which disabling the adapter does not undo)",
             self.overwritten),
            ("Differ by no more than rounding, and are not in the adapter", self.rounding),
            ("Changed, but not in the adapter", self.left_out),
        ):  # fmt: skip
            notes += [f"{what}: {_kinds(names)} ({plural(len(names), 'tensor')})"] if names else []
        return [*notes, *self.remarks]


def extract_lora(
    model: str | os.PathLike[str],
    base: str | os.PathLike[str],
    rank: int,
    folder: str | os.PathLike[str],
    *,
    layouts: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Adapter:
    """Write `model − base` as a LoRA adapter: for each linear module the best B A of rank r, with lora_alpha = r.

    The folder gets `adapter_model.safetensors` and `adapter_config.json`, so that
    `PeftModel.from_pretrained(base, folder)` reproduces the model up to the returned errors. Fused tensors stay whole,
    because PEFT wraps modules. Norms, biases, embeddings, new heads and whatever else changed are in it as they are;
    only experts, and what `layouts` skips, are left out and named.

    Args:
        model, base: two checkpoints of one architecture.
        rank: r, at most each matrix's smaller side.
        folder: where to write; created if it does not exist, in a folder that does.
        layouts: as in `inspect`; a pattern mapped to `"skip"` is left out.
        progress: called as `progress(what, done, total)`.
    Returns: the folder and the errors.
    Raises:
        InputError: the folder cannot be created.
        CheckpointError: the two do not match, no linear module differs, or a weight is not finite.
    Cost: the leading r singular vectors of each module. Accuracy: the errors are those of the float32 factors written.
    Source: Hu et al. (2106.09685); Eckart & Young 1936.

    >>> import tempfile
    >>> base = torch.zeros(4, 4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name, w in (("base", base), ("tuned", base + 1)):
    ...         save_tensors(Path(folder, f"{name}.safetensors"), {"layer.weight": w})
    ...     files = [f"{folder}/{name}.safetensors" for name in ("tuned", "base")]
    ...     adapter = extract_lora(*files, 1, f"{folder}/adapter")
    >>> adapter.rank, adapter.error < 1e-6
    (1, True)
    """
    tell = progress or (lambda what, done, total: None)
    pairs = Pairs(open_checkpoint(model), open_checkpoint(base), layouts)
    for checkpoint in (pairs.one, pairs.two):
        if any(is_factor(name) and not entry.part_of for name, entry in checkpoint.entries.items()):
            refuse_adapter(checkpoint)
    modules = Modules(pairs)
    found = _Found()
    for done, name in enumerate(pairs.order):
        tell("adapter", done, len(pairs.order))
        _look_at(name, pairs, modules, rank, found)
    tell("adapter", len(pairs.order), len(pairs.order))
    if not found.factors:
        raise _nothing(pairs, found)
    adapter, tensors, config = _assemble(found, pairs, modules, rank, str(base), layouts or {})
    path = Path(folder)
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}. Choose another folder.") from error
    save_tensors(path / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_text(path / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    return replace(adapter, folder=path)


@dataclass
class _Found:
    """What the pairs of tensors turned out to be."""

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # A, B by module
    errors: dict[str, float] = field(default_factory=dict)
    missed: float = 0.0  # ‖Δ − BA‖² of all
    size: float = 0.0  # ‖Δ‖² of all
    others: list[str] = field(default_factory=list)  # that changed, and cannot be factors
    rounding: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)  # others that the base has in another shape
    in_out: set[str] = field(default_factory=set)  # modules whose weights are (in, out)


def _look_at(name: str, pairs: Pairs, modules: Modules, rank: int, found: _Found) -> None:
    """Find how one tensor changed, and its factors if its module can have them."""
    new, old = pairs.load(name)
    holding, other = pairs.new.get(name), pairs.old.get(pairs.names[name])
    if holding and other and new.ndim == old.ndim == 2 and is_in_out(holding) != is_in_out(other):
        old = old.mT  # the base's file has it the other way round
    if new.shape != old.shape:
        found.others.append(name)
        found.shapes.append(f"{name} {tuple(new.shape)}, in the base {tuple(old.shape)}")
        return
    change = change_between(new, old)
    if change.kind == "equal":
        return
    if change.num_broken:
        raise CheckpointError(f"{name}: not finite in one of the two, no adapter. Run gramian inspect on each.")
    if change.kind == "cast":
        found.rounding.append(name)
        return
    linear = modules.is_linear(name) and new.is_floating_point() and old.is_floating_point()
    if not linear or change.num_nonfinite:
        found.others.append(name)
        return
    module = name.rpartition(".")[0]
    delta = (new.double() - old.double()).flatten(1)
    if turned := modules.is_in_out(name):
        delta = delta.mT
    a, b, top = _factors(delta, rank)
    eps = max(torch.finfo(new.dtype).eps, torch.finfo(old.dtype).eps)
    if top <= rounding_floor(tuple(delta.shape), eps, change.size):
        found.rounding.append(name)
        return
    size, missed = float(delta.norm()), float((delta - b.double() @ a.double()).norm())
    found.errors[module] = missed / size
    found.missed, found.size = found.missed + missed**2, found.size + size**2
    if turned:
        found.in_out.add(module)
    if new.ndim == 4:  # B of a convolution is one by one
        a, b = a.reshape(len(a), *new.shape[1:]), b[:, :, None, None]
    found.factors[module] = (a, b)


def _assemble(
    found: _Found, pairs: Pairs, modules: Modules, rank: int, base: str, layouts: Mapping[str, Any]
) -> tuple[Adapter, dict[str, Tensor], dict[str, Any]]:
    """Return the adapter, its tensors by PEFT's names, and its config."""
    one = pairs.one
    named = modules.named
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in found.factors.items():
        tensors[f"{PREFIX}{named(module)}.lora_A.weight"] = a
        tensors[f"{PREFIX}{named(module)}.lora_B.weight"] = b
    biases, saved, overwritten, left_out = [], [], [], []
    for name in [*found.others, *pairs.only_one]:
        module, _, local = name.rpartition(".")
        pattern = match_pattern(layouts, name)
        if (pattern and layouts[pattern] == "skip") or not modules.has_place(name):
            left_out.append(name)
        elif module in found.factors and local == "bias":
            biases.append(name)
        elif module not in found.factors and modules.is_whole(name) and not _is_lone_bias(name, found, pairs):
            saved += [module] * (module not in saved)
        elif not one.entries[name].tied_to:
            overwritten.append(name)
    for module in saved:
        for name in modules.tensors_of(module):
            tensors[PREFIX + named(name)] = one.load(name)
    with_bias = _has_bias_everywhere(biases, found, pairs)
    if with_bias:
        for module in found.factors:
            new, old = pairs.load(f"{module}.bias")
            tensors[f"{PREFIX}{named(module)}.lora_B.bias"] = (new.double() - old.double()).float()
    else:
        overwritten += biases
    for name in overwritten:
        module, _, local = name.rpartition(".")
        key = f"{named(module)}.base_layer.{local}" if module in found.factors else named(name)
        tensors[PREFIX + key] = one.load(name)
    linear = [module for module, (a, _) in found.factors.items() if a.ndim == 2]
    config = config_of_adapter(
        base,
        rank,
        {named(module): len(a) for module, (a, _) in found.factors.items()},
        modules.all_paths,
        [named(module) for module in saved],
        bias="all" if any(name.endswith("bias") for name in overwritten) else "none",
        lora_bias=with_bias,
        fan_in_fan_out=bool(linear) and found.in_out.issuperset(linear),
    )
    adapter = Adapter(
        Path(),
        rank,
        {named(module): error for module, error in found.errors.items()},
        math.sqrt(found.missed / found.size),
        tuple(left_out),
        tuple(map(named, saved)),
        tuple(map(named, overwritten)),
        tuple(found.rounding),
        tuple(_remarks(found, pairs, modules, len(linear) < len(found.factors))),
    )
    return adapter, tensors, config


def _is_lone_bias(name: str, found: _Found, pairs: Pairs) -> bool:
    """Whether only the bias of a matrix changed, so that to save the whole module would store the matrix for it."""
    weight = f"{name.rpartition('.')[0]}.weight"
    entry = pairs.one.entries.get(weight)
    changed = weight in found.others or weight in pairs.only_one
    return name.endswith(".bias") and entry is not None and len(entry.shape) > 1 and not changed


def _has_bias_everywhere(biases: list[str], found: _Found, pairs: Pairs) -> bool:
    """Whether B may have a bias, PEFT's `lora_bias`: all modules have it or none, and a merge needs the base's."""
    names = [f"{module}.bias" for module in found.factors]
    if not biases or any(name not in pairs.names for name in names):
        return False
    shapes = ((pairs.one.entries[name].shape, pairs.two.entries[pairs.names[name]].shape) for name in names)
    return all(new == old for new, old in shapes)


def _remarks(found: _Found, pairs: Pairs, modules: Modules, kernels: bool) -> list[str]:
    remarks = []
    if pairs.changes:
        which = "base" if modules.as_base else "model"
        remarks.append(f"The adapter's names are those of the {which}'s file; load it into a base with these names")
    if pairs.only_one:
        remarks.append(f"Only in the model, so build the base with them before loading: {some(pairs.only_one, 5)}")
    if pairs.only_two:
        remarks.append(f"Only in the base, so build it without them before loading: {some(pairs.only_two, 5)}")
    if found.shapes:
        remarks.append(f"Of another shape, so resize the base before loading: {some(found.shapes, 5)}")
    if modules.model_type and modules.memory is None:
        remarks.append(
            f"transformers did not build this {modules.model_type}, so the adapter has the names of the file, which "
            "may not be those in memory"
        )
    if kernels and modules.memory is None:
        remarks.append(
            "A file does not tell groups or transposed convolutions: if PEFT refuses a kernel of these, leave it out "
            "with --layouts"
        )
    return remarks


def _nothing(pairs: Pairs, found: _Found) -> CheckpointError:
    start = f"{pairs.one.path} and {pairs.two.path}: "
    for name in pairs.order:
        new, old = pairs.one.entries[name], pairs.two.entries[pairs.names[name]]
        if "quantized" in (new.kind, old.kind):
            return CheckpointError(
                f"{start}{name} is {new.dtype} against {old.dtype}, and factors need floating-point weights on both "
                "sides. Dequantize the model first."
            )
    changed = [*found.others, *pairs.only_one]
    if changed:
        return CheckpointError(
            f"{start}no linear module differs that an adapter can hold, so there is nothing to extract; changed: "
            f"{some(changed, 5)}. Copy these tensors instead."
        )
    if found.rounding:
        return CheckpointError(
            f"{start}they differ only by rounding, there is nothing to extract: {some(found.rounding, 5)}."
        )
    return CheckpointError(f"{start}no linear module differs, there is nothing to extract.")


def _kinds(names: Sequence[str]) -> str:
    """The names, those that differ in the numbers of layers or experts together, with how many they are."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name_pattern(name), []).append(name)
    return some([f"{kind} ({len(of)})" if len(of) > 1 else of[0] for kind, of in kinds.items()], MOST_KINDS)


def _factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return A (r, in) and B (out, r) of equal column norms with B A the best approximation of rank r, and σ₁."""
    v, s = leading_vectors(delta, min(rank, *delta.shape))
    root = s.sqrt()
    inverse = torch.where(root > 0, 1 / root.clamp_min(1e-150), 0.0)
    a, b = (root[:, None] * v.mT).float().contiguous(), ((delta @ v) * inverse).float().contiguous()
    return a, b, float(s[0])
