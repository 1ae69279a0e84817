"""A batch in evaluation mode: its loss, dropout that still acts, and whether a sample's output depends on others."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.batch import LABELS, main_input, mapped, parts, tensors
from gramian.errors import InputError
from gramian.inspection.experiments.input_order import run_along_rows
from gramian.inspection.passes.batch_roles import given_of, taken_of
from gramian.inspection.passes.current_module import Follower
from gramian.inspection.passes.dropout import DROPOUTS, share_dropped
from gramian.inspection.passes.moments import first_float
from gramian.objective import Objective
from gramian.recording.hooks import hooks
from gramian.recording.measuring import eager, evaluating
from gramian.samples import first_samples
from gramian.seeding import seed_torch

__all__ = ["Evaluated", "evaluate"]

# A row of an output counts as changed if it moves by this share of the rows' size. Products of the same shapes round
# each row alike, whatever the others hold.
MOVED = 1e-5
# The name of what the model is called with, among its modules.
GIVEN = "(given)"
# Samples from which on a mixture is looked for, and how many are enough: what mixes more mixes these.
FEW, ENOUGH = 4, 7


@dataclass(frozen=True)
class Evaluated:
    """What a pass in evaluation mode gave.

    Attributes:
        loss: mean over the units of the batch.
        mixed_by: the first module whose output for a sample changes when others do; `None` where there is none, or the
            rows of the batch are no separate samples.
        before: the last module before it whose outputs do not.
        is_labeled: whether each row of the batch has a label, a number or a vector, so that it surely is a sample.
        drops: the first module in which dropout acts, with the function that drops; `None` where none does.
    """

    loss: float
    mixed_by: str | None = None
    before: str = ""
    is_labeled: bool = True
    drops: tuple[str, str] | None = None


def evaluate(
    model: nn.Module, batches: Sequence[Any], objective: Objective, fed: Collection[tuple[int, int]] = ()
) -> Evaluated:
    """Run a batch in evaluation mode, and once more with another sample in the place of the first and the last.

    The second pass is made where the batch is rows of inputs, and nothing in the model says that rows belong together,
    as a norm does that uses the batch's statistics in evaluation mode too, or a matrix of all pairs of rows without
    which the model does not run on fewer. Rows with a label each, a number or a vector, are samples; so are those of
    tokens that mix along both dimensions, or that follow each other in rows and not in columns, or of which the model
    is given all but the last or first of a row. Others may be the positions of sequences, so that there the model must
    also treat rows alike: its outputs are to come in another order where the inputs do, and no module that takes
    positions first may be the one that mixes. Scores of all pairs of samples are to change for the pairs of what
    changed alone.

    Args:
        model: left as it was.
        batches: as `objective` takes them; the first is run, the others tell in what order tokens are.
        objective: gives the loss.
        fed: keys of the tensors with which the model is called, where they are known.

    Returns: an `Evaluated`.
    Raises: what the model raises.
    Cost: a forward pass, and two of 7 samples; up to six where samples seem to mix.
    """
    with evaluating(model), eager():
        try:
            with torch.no_grad():
                return _evaluated(model, batches, objective, fed)
        except Exception:  # a loss may differentiate on its way
            with torch.enable_grad():
                return _evaluated(model, batches, objective, fed)


def _evaluated(
    model: nn.Module, batches: Sequence[Any], objective: Objective, fed: Collection[tuple[int, int]]
) -> Evaluated:
    """The same, of a model in evaluation mode."""
    batch = batches[0]
    rows = _separate_rows(model, batch)
    with _Drops(model).installed() as drops:
        loss, _ = _run(model, batch, objective, 0)
    if not rows or not math.isfinite(loss) or drops.first:
        return Evaluated(loss, drops=drops.first)
    try:
        found = _mixture(model, batches, objective, min(rows - 1, ENOUGH), fed)
    except Exception:  # the model's batches have one size: that of a graph, or one that it was written for
        found = None if _holds_pairs(model, batch, objective, rows) else _mixture(model, batches, objective, rows, fed)
    return Evaluated(loss) if found is None else Evaluated(loss, *found)


def _mixture(
    model: nn.Module, batches: Sequence[Any], objective: Objective, rows: int, fed: Collection[tuple[int, int]]
) -> tuple[str, str, bool] | None:
    """The first module that mixes the first rows, the one before it, and whether the rows surely are samples.

    `None` too where no two passes agree.
    """
    batch = batches[0]
    runs_along = any(one.length < one.whole.shape[1] for one in taken_of(batch, fed) if one.whole.ndim > 1)
    labels = [g.values[0] for g in given_of([batch], set(fed), set()) if fed and not g.is_input]
    has_single = any(t.ndim == 1 or t.shape[1:] == (1,) for t in labels)
    batch = first_samples(batch, rows)
    before = _run(model, batch, objective, rows)[1]
    changed = _first_change(before, _run(model, _with_other_ends(batch, rows), objective, rows)[1])
    if changed is None or _first_change(before, _run(model, batch, objective, rows)[1]) is not None:
        return None  # or the model draws numbers of its own
    if runs_along or has_single or _are_labeled(model, batch, objective, rows) or run_along_rows(model, batches):
        return *changed, True
    turned = mapped(batch, lambda t: t.roll(1, 0) if t.ndim and len(t) == rows else t)  # labels too: it may take them
    turned = _run(model, turned, objective, rows)[1]
    alike = [not _differ(a.roll(1, 1)[2:], b[2:]) for (name, a), (_, b) in zip(before, turned, strict=True) if not name]
    if not all(alike) and not _draws_for_rows(model, batch, objective, rows):
        return None
    return None if _takes_positions_first(model, changed[0]) else (*changed, False)


def _draws_for_rows(model: nn.Module, batch: Any, objective: Objective, rows: int) -> bool:
    """Whether the model draws numbers, so that no row is treated like another, and rows of features are its samples."""
    x = main_input(batch)
    if x.ndim != 2 or not x.is_floating_point():
        return False
    one, other = (_run(model, batch, objective, rows, seed=seed)[1] for seed in (0, 1))
    return len(one) == len(other) and any(_differ(a, b) for (_, a), (_, b) in zip(one, other, strict=True))


def _takes_positions_first(model: nn.Module, name: str) -> bool:
    """Whether a module, one in it, or one that holds it takes the positions of a sequence before the samples."""
    parts = name.split(".")
    holders = [model.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts))] if name else []
    return any(getattr(m, "batch_first", True) is False for m in (*holders, *model.get_submodule(name).modules()))


def _run(
    model: nn.Module, batch: Any, objective: Objective, rows: int, dim: int = 0, *, seed: int = 0
) -> tuple[float, list[tuple[str, Tensor]]]:
    seed_torch(seed)
    with _watched(model, rows, dim) as seen:
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
    return func in DROPOUTS and share_dropped(func, args, kwargs) > 0


def _first_change(before: list[tuple[str, Tensor]], after: list[tuple[str, Tensor]]) -> tuple[str, str] | None:
    """The first module whose rows moved, where the model's did or are all the same, and the one before it."""
    whole = [i for i, (name, _) in enumerate(before) if not name]
    if not whole or [name for name, _ in before] != [name for name, _ in after]:
        return None
    inner = slice(1, max(2, before[0][1].shape[1] - 1))
    pairs = [(a[:2, inner], b[:2, inner]) for (_, a), (_, b) in zip(before, after, strict=True)]
    moved = [i for i, (a, b) in enumerate(pairs) if _differ(a, b)]
    if any(before[i][0] == GIVEN for i in moved):
        return None  # the loss has paired the rows with others
    if not moved or not (whole[-1] in moved or _is_same_for_all(before[whole[-1]][1])):
        return None
    names = [name for name, _ in before[: moved[0]] if name != GIVEN]
    return before[moved[0]][0], names[-1] if names else ""


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
    if any(t.is_nested or t.ndim == 0 or len(t) != rows for t in given):
        return 0  # edges, or another input for all samples
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return 0 if any(m.running_mean is None for m in norms) else rows


def _holds_pairs(model: nn.Module, batch: Any, objective: Objective, rows: int) -> bool:
    """Whether batch, model or its code has a matrix of all pairs of rows, as the adjacency of a graph's nodes."""
    held = (t for m in model.modules() for t in (*m.buffers(recurse=False), *vars(m).values()))
    given = (*tensors(parts(batch).inputs), *(t for t in held if isinstance(t, Tensor)))
    if any(t.shape == (rows, rows) for t in given):
        return True
    with _Constants(model, rows).installed() as constants:
        objective.loss(model, batch)
    return constants.found


class _Constants(Follower):
    """Looks for a matrix of all pairs of rows that a product takes, and no operation of this pass has made."""

    def __init__(self, model: nn.Module, rows: int) -> None:
        super().__init__(model)
        self.rows, self.found = rows, False
        self.made: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and args and isinstance(args[0], Tensor) and args[0].shape == (self.rows, self.rows):
            self.found |= not any(args[0] is t for t in self.made)
        if isinstance(output, Tensor) and output.shape == (self.rows, self.rows):
            self.made.append(output)
        return output


_PRODUCTS = (torch.matmul, torch.mm, torch.sparse.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm)


def _are_labeled(model: nn.Module, batch: Any, objective: Objective, rows: int) -> bool:
    """Whether each row has one label, a number or a vector, so that it surely is a sample.

    Were rows the positions of sequences, the second dimension would be the samples, of the inputs and of the labels;
    of tokens alone too.
    """
    x, y = main_input(batch), parts(batch).labels
    if x.ndim == 2 and not x.is_floating_point() and (not isinstance(y, Tensor) or y.shape == x.shape):
        return _columns_mix(model, batch, objective, x.shape[1])
    if not isinstance(y, Tensor) or y.ndim == 0 or len(y) != rows:
        return False
    if y.ndim == 1 or y.shape == (rows, 1):
        return True
    columns = y.shape[1]
    if x.ndim == 1 or x.shape[1] != columns:
        return True
    return x.ndim > y.ndim and _columns_mix(model, batch, objective, columns)


def _columns_mix(model: nn.Module, batch: Any, objective: Objective, columns: int) -> bool:
    """Whether columns of the outputs depend on other columns of the inputs, so that they are no samples."""
    try:
        moved = _with_other_ends(batch, columns, 1)
        before, after = (_run(model, b, objective, columns, 1)[1] for b in (batch, moved))
    except Exception:
        return False
    return _first_change(before, after) is not None


def _with_other_ends(batch: Any, rows: int, dim: int = 0) -> Any:
    """The batch with the middle one of its inputs' rows, or columns, as the first and last; labels as before.

    Of two, the first becomes the second.
    """

    def changed(t: Tensor) -> Tensor:
        if t.ndim <= dim or t.shape[dim] != rows:
            return t
        middle = t.narrow(dim, rows // 2, 1)
        return torch.cat((middle, t.narrow(dim, 1, max(1, rows - 2)), middle), dim).narrow(dim, 0, rows)

    if isinstance(batch, Tensor):
        return changed(batch)
    if isinstance(batch, Mapping):
        return {key: value if key in LABELS else mapped(value, changed) for key, value in batch.items()}
    return (mapped(batch[0], changed), *batch[1:])


@contextmanager
def _watched(model: nn.Module, rows: int, dim: int) -> Iterator[list[tuple[str, Tensor]]]:
    """A context that lists each module's output as it returns: sums over each row, and over the absolute values.

    With `dim` 1, over each column. Of scores of all pairs of rows, those of the first and last are left out, and the
    sums over all of them come behind.
    """
    found: list[tuple[str, Tensor]] = []

    def hook(name: str) -> Callable:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            made = first_float(output)
            if made is None or made.ndim <= dim or made.shape[dim] != rows:
                return
            flat = made.detach().movedim(dim, 0).reshape(rows, -1)
            sums = _sums(flat)
            inner = _sums(flat[:, 1:-1]) if not dim and made.shape == (rows, rows) else sums
            found.append((name, torch.stack((*inner, *sums))))

        return keep

    def keep_given(module: nn.Module, args: Any, kwargs: Any) -> None:
        for t in tensors((args, kwargs)):
            hook(GIVEN)(module, (), t)

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()] if rows else []
    handles += [model.register_forward_pre_hook(keep_given, with_kwargs=True)] if rows else []
    with hooks(handles):
        yield found


def _sums(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Over each row, of the values and of their sizes."""
    wide = flat.double()  # and not a sum with a dtype of its own, which takes ten times as long on a processor
    return wide.sum(1), wide.abs().sum(1)


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether a row moved."""
    size = float(torch.maximum(one[1], other[1]).mean())
    return size > 0 and bool(((one - other).abs() > MOVED * size).any())


def _is_same_for_all(made: Tensor) -> bool:
    """Whether all rows are equal, as far as their sums tell."""
    return bool(((made - made[:, :1]).abs() <= MOVED * made[1].mean()).all())
