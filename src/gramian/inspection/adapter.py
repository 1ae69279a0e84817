"""Writes the difference of two checkpoints as a LoRA adapter in PEFT's format."""

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
from gramian.inspection.matrices import Holding, find_holdings
from gramian.inspection.quadrature import leading_vectors
from gramian.report.files import write_text

__all__ = ["Adapter", "extract_lora"]


@dataclass(frozen=True)
class Adapter:
    """An adapter that was written, and its error against the difference Δ of the checkpoints.

    Args:
        folder: where it is.
        rank: r of the factors.
        errors: ‖Δ − BA‖_F / ‖Δ‖_F of each module.
        error: the same of all modules together.
        left_out: tensors that changed but cannot be in an adapter of linear modules.
    """

    folder: Path
    rank: int
    errors: Mapping[str, float]
    error: float
    left_out: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """The adapter in sentences, for a report."""
        worst = max(self.errors, key=lambda name: self.errors[name])
        notes = [
            f"Adapter of rank {self.rank} for {len(self.errors)} modules in {self.folder}: relative error "
            f"{self.error:.2e} in all, {self.errors[worst]:.2e} at most ({worst})"
        ]
        if self.left_out:
            names = ", ".join(self.left_out[:5]) + (" …" if len(self.left_out) > 5 else "")
            notes.append(f"Changed, but not in the adapter ({len(self.left_out)}): {names}")
        return notes


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
    because PEFT wraps modules.

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
    progress = progress or (lambda what, done, total: None)
    one, two = open_checkpoint(model), open_checkpoint(base)
    matched(one, two)
    factors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    squares = [0.0, 0.0]
    targets: list[str] = []
    transposed = False  # PEFT's word for weights that are (in, out)
    left_out: list[str] = []
    holdings = {h.entry.name: h for h in find_holdings(one, layouts)[0]}
    names = [name for name in one.entries if name in two.entries and one.entries[name].kind == "float"]
    for done, name in enumerate(names):
        progress("adapter", done, len(names))
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
        if _is_in_out(holding):
            delta, transposed = delta.mT, True
        a, b = _factors(delta, rank)
        size, missed = float(delta.norm()), float((delta - b.double() @ a.double()).norm())
        errors[module] = missed / size if size else 0.0
        squares = [squares[0] + missed**2, squares[1] + size**2]
        targets.append(module)
        factors[f"base_model.model.{module}.lora_A.weight"] = a
        factors[f"base_model.model.{module}.lora_B.weight"] = b
    progress("adapter", len(names), len(names))
    if not targets:
        raise CheckpointError(f"{one.path} and {two.path}: no linear module differs, there is nothing to extract.")
    ranks = {module: len(factors[f"base_model.model.{module}.lora_A.weight"]) for module in targets}
    lower = {module: own for module, own in ranks.items() if own != rank}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": targets,
        "rank_pattern": lower,
        "alpha_pattern": lower,
        "inference_mode": True,
        "task_type": None,
    }
    path = Path(folder)
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}. Choose another folder.") from error
    save_tensors(path / "adapter_model.safetensors", factors, {"format": "pt"})
    write_text(path / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    return Adapter(path, rank, errors, math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0, tuple(left_out))


def _is_in_out(holding: Holding) -> bool:
    """Whether the tensor is (in, out), so that the columns of its matrices lie along its first dimension."""
    return bool(set(holding.layout.dims[0]) & set(holding.layout.sides[2]))


def _factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) of equal column norms with B A the best approximation of rank r."""
    v, s = leading_vectors(delta, min(rank, *delta.shape))
    root = s.sqrt()
    inverse = torch.where(root > 0, 1 / root.clamp_min(1e-150), 0.0)
    return (root[:, None] * v.mT).float().contiguous(), ((delta @ v) * inverse).float().contiguous()
