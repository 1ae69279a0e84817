"""The difference of two checkpoints as a LoRA adapter in PEFT's format."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gramian.checkpoint import open_checkpoint, save_tensors
from gramian.errors import CheckpointError, InputError
from gramian.inspection.comparison import matched
from gramian.inspection.matrices import find_holdings, read_config
from gramian.inspection.quadrature import leading_vectors
from gramian.report.files import write_text

__all__ = ["Adapter", "extract_lora"]


@dataclass(frozen=True)
class Adapter:
    """What was written: the folder, the error of each module ‖Δ − BA‖_F / ‖Δ‖_F, and what the adapter cannot hold.

    `error` is that of all modules together.
    """

    folder: Path
    rank: int
    errors: Mapping[str, float]
    error: float
    left_out: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """The adapter in words."""
        worst = max(self.errors, key=lambda name: self.errors[name])
        said = [
            f"Adapter of rank {self.rank} for {len(self.errors)} modules in {self.folder}: relative error "
            f"{self.error:.2e} in all, {self.errors[worst]:.2e} at most ({worst})"
        ]
        if self.left_out:
            names = ", ".join(self.left_out[:5]) + (" …" if len(self.left_out) > 5 else "")
            said.append(f"Changed, but not in the adapter ({len(self.left_out)}): {names}")
        return said


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

    The folder gets `adapter_model.safetensors` and `adapter_config.json`; `PeftModel.from_pretrained(base, folder)`
    then gives the model back up to the errors returned. Fused tensors stay whole, as PEFT wraps modules.

    Args:
        model, base: two checkpoints of one architecture.
        rank: r, cut at each matrix's smaller side.
        folder: made if it does not exist; its parent must.
        layouts: as in `inspect`; a pattern mapped to `"skip"` is left out.
        progress: called as `progress(what, done, total)`.

    Raises:
        InputError: the folder cannot be made.
        CheckpointError: the two do not match, no linear module differs, or a weight is not finite.

    Cost: for each module the leading singular vectors. Accuracy: the error told is that of the float32 factors written.

    Source: Hu et al. 2106.09685; Eckart & Young 1936.
    """
    tell = progress or (lambda what, done, total: None)
    one, two = open_checkpoint(model), open_checkpoint(base)
    matched(one, two)
    transposed = read_config(one.path).get("model_type") == "gpt2"
    factors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    squares = [0.0, 0.0]
    targets: list[str] = []
    left_out: list[str] = []
    holdings = {h.entry.name: h for h in find_holdings(one, layouts)[0]}
    names = [name for name in one.entries if name in two.entries and one.entries[name].kind == "float"]
    for done, name in enumerate(names):
        tell("adapter", done, len(names))
        new, old = one.load(name), two.load(name)
        if new.dtype == old.dtype and torch.equal(new, old):
            continue
        holding = holdings.get(name)
        module, _, local = name.rpartition(".")
        if holding is None or new.ndim != 2 or local != "weight" or holding.role == "embedding" or not module:
            left_out.append(name)
            continue
        delta = new.double() - old.double()
        if not bool(delta.isfinite().all()):
            raise CheckpointError(f"{name}: not finite in one of the two, no adapter. Run gramian inspect on each.")
        delta = delta.mT if transposed else delta
        a, b = _factors(delta, rank)
        size, missed = float(delta.norm()), float((delta - b.double() @ a.double()).norm())
        errors[module] = missed / size if size else 0.0
        squares = [squares[0] + missed**2, squares[1] + size**2]
        targets.append(module)
        factors[f"base_model.model.{module}.lora_A.weight"] = a
        factors[f"base_model.model.{module}.lora_B.weight"] = b
    tell("adapter", len(names), len(names))
    if not targets:
        raise CheckpointError(f"{one.path} and {two.path}: no linear module differs, there is nothing to extract.")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": targets,
        "rank_pattern": {
            module: len(factors[f"base_model.model.{module}.lora_A.weight"])
            for module in targets
            if len(factors[f"base_model.model.{module}.lora_A.weight"]) != rank
        },
        "alpha_pattern": {
            module: len(factors[f"base_model.model.{module}.lora_A.weight"])
            for module in targets
            if len(factors[f"base_model.model.{module}.lora_A.weight"]) != rank
        },
        "inference_mode": True,
        "task_type": None,
    }
    place = Path(folder)
    try:
        place.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {place}: {error.strerror}. Choose another folder.") from error
    save_tensors(place / "adapter_model.safetensors", factors, {"format": "pt"})
    write_text(place / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    return Adapter(place, rank, errors, math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0, tuple(left_out))


def _factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) of equal column norms with B A the best approximation of rank r."""
    v, s = leading_vectors(delta, min(rank, *delta.shape))
    root = s.sqrt()
    inverse = torch.where(root > 0, 1 / root.clamp_min(1e-150), 0.0)
    return (root[:, None] * v.mT).float().contiguous(), ((delta @ v) * inverse).float().contiguous()
