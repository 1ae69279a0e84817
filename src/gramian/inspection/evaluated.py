"""A batch in evaluation mode: its loss, dropout that still acts, and whether a sample's output depends on others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.batch import LABELS, first_samples, main_input, mapped, parts, tensors
from gramian.errors import InputError
from gramian.inspection.following import Follower
from gramian.inspection.moments import first_float
from gramian.objective import Objective
from gramian.recording.hooks import hooks
from gramian.recording.keeping import seed_torch
from gramian.recording.measuring import eager, evaluating

__all__ = ["Evaluated", "evaluate"]

# A row of an output counts as changed if it moves by this share of the rows' size. Products of the same shapes round
# each row alike, whatever the others hold.
MOVED = 1e-5
# Samples from which on a mixture is looked for, and how many are enough: what mixes more mixes these.
FEW, ENOUGH = 4, 8

# Functions that drop; whether they do where nobody says whether it is training.
_DROPOUT: dict[Callable, bool] = {
    F.dropout: True, F.dropout1d: True, F.dropout2d: True, F.dropout3d: True,
    F.alpha_dropout: False, F.feature_alpha_dropout: False,
}  # fmt: skip


@dataclass(frozen=True)
class Evaluated:
    """What a pass in evaluation mode gave.

    Attributes:
        loss: mean over the units of the batch.
        mixed_by: the first module whose output for a sample changes when another sample does; `None` where there is
            none, or the rows of the batch are no separate samples.
        before: the last module before it whose outputs do not.
        is_labeled: whether each row of the batch has one label, so that it surely is a sample.
        drops: the first module in which dropout acts, with the function that drops; `None` where none does.
    """

    loss: float
    mixed_by: str | None = None
    before: str = ""
    is_labeled: bool = True
    drops: tuple[str, str] | None = None


def evaluate(model: nn.Module, batch: Any, objective: Objective) -> Evaluated:
    """Run a batch in evaluation mode, and once more with another sample in the place of the first.

    The second pass is made where the batch is rows of inputs, and nothing in the model says that rows belong together,
    as a norm does that uses the batch's statistics in evaluation mode too. Rows with a label each are samples. Others
    may be the positions of sequences, so that there the model must also treat rows alike: its outputs are to come in
    another order where the inputs do, and no module that takes positions first may be the one that mixes.

    Args:
        model: left as it was.
        batch: as `objective` takes it.
        objective: gives the loss.

    Returns: an `Evaluated`.
    Raises: what the model raises.
    Cost: a forward pass, and two of 8 samples; four where samples seem to mix.
    Source: this library's own.
    """
    rows = _separate_rows(model, batch)
    with evaluating(model), eager(), torch.enable_grad():  # a loss may differentiate on its way
        with _Drops(model).installed() as drops:
            loss, _ = _run(model, batch, objective, 0)
        if not rows or not math.isfinite(loss) or drops.first:
            return Evaluated(loss, drops=drops.first)
        labeled = _are_labeled(batch, rows)
        try:
            changed = _mixture(model, first_samples(batch, ENOUGH), objective, min(rows, ENOUGH), labeled)
        except Exception:  # the model's batches have one size
            changed = _mixture(model, batch, objective, rows, labeled)
    by, not_yet = changed or (None, "")
    return Evaluated(loss, by, not_yet, labeled)


def _mixture(
    model: nn.Module, batch: Any, objective: Objective, rows: int, are_labeled: bool
) -> tuple[str, str] | None:
    """The first module that mixes samples, and the one before it; `None` too where no two passes agree."""
    before = _run(model, batch, objective, rows)[1]
    changed = _first_change(before, _run(model, _with_another_first(batch, rows), objective, rows)[1])
    if changed is None or _first_change(before, _run(model, batch, objective, rows)[1]) is not None:
        return None  # or the model draws numbers of its own
    if are_labeled:
        return changed
    turned = mapped(batch, lambda t: t.roll(1, 0) if t.ndim and len(t) == rows else t)  # labels too: it may take them
    turned = _run(model, turned, objective, rows)[1]
    alike = [not _differ(a.roll(1, 1), b) for (name, a), (_, b) in zip(before, turned, strict=True) if not name]
    return changed if all(alike) and not _takes_positions_first(model, changed[0]) else None


def _takes_positions_first(model: nn.Module, name: str) -> bool:
    """Whether a module, one in it, or one that holds it takes the positions of a sequence before the samples."""
    parts = name.split(".")
    holders = [model.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts))] if name else []
    return any(getattr(m, "batch_first", True) is False for m in (*holders, *model.get_submodule(name).modules()))


def _run(model: nn.Module, batch: Any, objective: Objective, rows: int) -> tuple[float, list[tuple[str, Tensor]]]:
    seed_torch(0)
    with _watched(model, rows) as seen:
        total, units = objective.loss(model, batch)
    return float(total.detach()) / float(units), seen


class _Drops(Follower):
    """Looks for dropout that acts, and in which module it is."""

    first: tuple[str, str] | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.first is None and self.stack and _acts(func, args, kwargs):
            self.first = (self.place, func.__name__)
        return func(*args, **kwargs)


def _acts(func: Callable, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call drops something; attention has no flag for training, and drops whatever the mode."""
    if func is F.scaled_dot_product_attention:
        return (args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)) > 0
    if func not in _DROPOUT:
        return False
    p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    return p > 0 and bool(args[2] if len(args) > 2 else kwargs.get("training", _DROPOUT[func]))


def _first_change(before: list[tuple[str, Tensor]], after: list[tuple[str, Tensor]]) -> tuple[str, str] | None:
    """The first module whose rows moved, where the model's did or are all the same, and the one before it."""
    whole = [i for i, (name, _) in enumerate(before) if not name]
    if not whole or [name for name, _ in before] != [name for name, _ in after]:
        return None
    pairs = [(a[:, 1:], b[:, 1:]) for (_, a), (_, b) in zip(before, after, strict=True)]
    moved = [i for i, (a, b) in enumerate(pairs) if _differ(a, b)]
    if not moved or not (whole[-1] in moved or _is_same_for_all(before[whole[-1]][1])):
        return None
    return before[moved[0]][0], before[moved[0] - 1][0] if moved[0] else ""


def _separate_rows(model: nn.Module, batch: Any) -> int:
    """The number of rows of the batch where each may be a sample; else 0."""
    if not isinstance(batch, (Tensor, Mapping, tuple, list)):
        return 0
    try:
        x, y = main_input(batch), parts(batch).labels
        given = list(tensors(parts(batch).inputs))
    except (InputError, TypeError):
        return 0
    rows = len(x)
    if rows < FEW or (isinstance(y, Tensor) and (not y.ndim or len(y) != rows)):
        return 0
    if any(t.is_nested or t.ndim == 0 or len(t) != rows or (t.ndim == 2 and t.shape[1] == rows) for t in given):
        return 0  # edges, an adjacency matrix, or another input for all samples
    if any(b.ndim == 2 and len(b) == b.shape[1] == rows for b in model.buffers()):
        return 0  # the adjacency matrix of a graph whose nodes are the rows
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return 0 if any(m.running_mean is None for m in norms) else rows


def _are_labeled(batch: Any, rows: int) -> bool:
    """Whether each row has one label."""
    y = parts(batch).labels
    return isinstance(y, Tensor) and y.shape in ((rows,), (rows, 1))


def _with_another_first(batch: Any, rows: int) -> Any:
    """The batch with the inputs of its last sample in the place of the first's; labels as they were."""
    return _changed(batch, rows, lambda t: torch.cat((t[-1:], t[1:])))


def _changed(batch: Any, rows: int, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with other rows of its inputs; labels as they were."""

    def changed(t: Tensor) -> Tensor:
        return change(t) if t.ndim and len(t) == rows else t

    if isinstance(batch, Tensor):
        return changed(batch)
    if isinstance(batch, Mapping):
        return {key: value if key in LABELS else mapped(value, changed) for key, value in batch.items()}
    return (mapped(batch[0], changed), *batch[1:])


@contextmanager
def _watched(model: nn.Module, rows: int) -> Iterator[list[tuple[str, Tensor]]]:
    """A context that lists each module's output as it returns: sums over each row, and over the absolute values."""
    found: list[tuple[str, Tensor]] = []

    def hook(name: str) -> Callable:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            made = first_float(output)
            if made is not None and len(made) == rows and made.shape != (rows, rows):  # scores of all pairs are meant
                flat = made.detach().reshape(rows, -1)
                sums = (t.sum(1, dtype=torch.float64) for t in (flat, flat.abs()))
                found.append((name, torch.stack(tuple(sums))))

        return keep

    with hooks([module.register_forward_hook(hook(name)) for name, module in model.named_modules()] if rows else []):
        yield found


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether a row moved."""
    size = float(torch.maximum(one[1], other[1]).mean())
    return size > 0 and bool(((one - other).abs() > MOVED * size).any())


def _is_same_for_all(made: Tensor) -> bool:
    """Whether all rows are equal, as far as their sums tell."""
    return bool(((made - made[:, :1]).abs() <= MOVED * made[1].mean()).all())
