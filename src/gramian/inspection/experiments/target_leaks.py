"""Whether an output sees the target that it is to predict: next positions, replaced by others, must not change it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gramian.batch import main_input, mapped
from gramian.errors import GramianError
from gramian.inspection.passes.batch_roles import given_of, taken_of
from gramian.inspection.passes.moments import first_float
from gramian.inspection.passes.step_records import Observed
from gramian.objective import Objective
from gramian.recording.hooks import hooks
from gramian.recording.measuring import eager, evaluating

__all__ = ["Leak", "find_leak"]

# Share of the targets that are the next inputs from which on they are a sequence's; fewer than half are the inputs.
SHIFTED, SAME = 0.95, 0.5
# Change at positions before the replaced ones, against that at the replaced ones, which rounding does not make.
MOVED, MOVED_NARROW = 1e-3, 3e-2
LEAST = 4
# Positions that count, and runs of them for each, from which on they were chosen at random: masked words, or spans.
FEW, ALONE = 16, 0.25
# Change that is rounding.
EQUAL = 1e-6


@dataclass(frozen=True)
class Leak:
    """An output that depends on inputs behind it, by `share` of what it depends on its own.

    Attributes:
        position: the last position that was left as it was.
        share: change of its output, over that of the outputs whose inputs were replaced.
        name: the first module whose output at the positions before changes.
        before: the module before it, whose output does not.
        is_copy: whether the targets are the inputs at the same positions.
        is_hidden: false where the tokens that are to be restored are given as they are.
        source: the input that is the target too, as Python reads it off a batch.
    """

    position: int
    share: float
    name: str
    before: str
    is_copy: bool = False
    is_hidden: bool = True
    source: str = ""


def find_leak(model: nn.Module, observed: Observed, objective: Objective) -> Leak | None:
    """Look for outputs that depend on the next input, in a model whose targets are its inputs, shifted by one.

    Args:
        model: left as it was.
        observed: of this model; has its batches and what its loss compared.
        objective: gives the loss.

    Returns: a `Leak`; `None` where there is none, or the targets are something else.
    Raises: what the model raises.
    Cost: two forward passes where the targets are the next inputs; else nothing.
    """
    for x in _sequences(observed):
        counted = _next_inputs(observed, x)
        if counted is not None:
            return _find_next(model, observed, objective, x, counted)
    return _find_copy(model, observed, objective)


def _sequences(observed: Observed) -> list[Tensor]:
    """The main input, and tokens that the model is given beside it, as a decoder is."""
    try:
        first = [main_input(observed.batches[0])]
    except (GramianError, IndexError):
        return []
    given = [one.whole for one in taken_of(observed.batches[0], observed.fed)]
    return first + [t for t in given if t is not first[0] and t.ndim == 2 and not t.is_floating_point()]


def _find_next(model: nn.Module, observed: Observed, objective: Objective, x: Tensor, counted: Tensor) -> Leak | None:
    """Look for outputs that depend on the next one of these inputs, which is the target where `counted` is true."""
    batch = observed.batches[0]
    places = counted.sum(0).nonzero().flatten()  # not in a prefix without targets, which may see all of itself
    position = int(places[len(places) // 2])
    rows = counted[:, position].nonzero().flatten()
    other = x.clone()
    other[:, position + 1 :] = (x.roll(1, 0) if len(x) > 1 else x.flip(1))[:, position + 1 :]
    changed = (other != x).flatten(2).any(-1) if x.ndim > 2 else other != x
    rows = rows[changed[rows, position + 1]]
    if not len(rows):
        return None
    with evaluating(model), eager(), torch.enable_grad():
        taken = (one.values for one in taken_of(batch, observed.fed) if one.whole is x)  # all, or all but the last
        shape = next(taken, x).shape[:2]
        runs = [_run(model, given, objective, shape) for given in (batch, _with(batch, x, other))]
    (names, before), (again, after) = runs
    if names != again or "" not in names:
        return None
    narrow = observed.is_narrow or any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    bound = MOVED_NARROW if narrow else MOVED
    shares = [_share(one, two, rows, position) for one, two in zip(before, after, strict=True)]
    whole = shares[len(names) - 1 - names[::-1].index("")]
    if not whole > bound:
        return None
    first = next(i for i, share in enumerate(shares) if share > bound)
    return Leak(position, whole, names[first], names[first - 1] if first else "")


def _find_copy(model: nn.Module, observed: Observed, objective: Objective) -> Leak | None:
    """Look for tokens that are given to the model and are its targets at the same positions.

    What a decoder is given beside other inputs must be shifted by one, and what is behind a position hidden. Where the
    tokens are all that is given (masks and the targets themselves aside, which a model may take for its loss), a model
    that sees both sides may be one that restores them; one that sees none behind has nothing to predict.
    """
    batch = observed.batches[0]
    given = taken_of(batch, observed.fed)
    for one in given:
        z = one.values
        if z.is_floating_point() or z.ndim != 2 or z.shape[1] < LEAST or len(z) < 2 or not _is_target(observed, z):
            continue
        others = any(not _is_mask(t) and not _is_target(observed, t) for t in (g.values for g in given))
        position = z.shape[1] // 2 - 1
        other = z.clone()
        other[:, position + 1 :] = z.roll(1, 0)[:, position + 1 :]
        rows = (other[:, position + 1] != z[:, position + 1]).nonzero().flatten()
        if not len(rows):
            continue
        with evaluating(model), eager(), torch.enable_grad():  # a loss may differentiate on its way
            runs = [
                _run(model, b, objective, z.shape) for b in (batch, _with(batch, one.whole, one.with_values(other)))
            ]
        (names, before), (again, after) = runs
        if names != again or "" not in names:
            continue
        whole = len(names) - 1 - names[::-1].index("")
        early = _share(before[whole], after[whole], rows, position)
        here = _share(before[whole], after[whole], rows, position + 1)
        if here > MOVED_NARROW and (others or early <= EQUAL):
            return Leak(position, here, "", "", is_copy=early <= EQUAL, source=one.name)
        if here > MOVED_NARROW and (_is_chosen(observed, z) or _hides_the_rest(observed, z)):
            return Leak(position, here, "", "", is_hidden=False, source=one.name)
    return None


def _hides_the_rest(observed: Observed, z: Tensor) -> bool:
    """Whether a token stands here and there, and never where the loss counts: what a mask hides is not asked for."""
    for found in observed.criteria:
        if found.target.numel() == z.numel() and not found.target.is_floating_point():
            counts = found.target.reshape(z.shape).to(z.device) >= 0
            for token in z[~counts].unique().tolist():
                stands = z == token
                if not bool((stands & counts).any()) and _are_scattered(stands) and not _are_at_an_end(stands):
                    return True
    return False


def _are_scattered(places: Tensor) -> bool:
    """Whether places (N, T) are enough, and alone or in short runs."""
    num = int(places.sum())
    runs = int(places[:, 0].sum()) + int((places[:, 1:] & ~places[:, :-1]).sum())
    return num >= FEW and runs > ALONE * num


def _are_at_an_end(places: Tensor) -> bool:
    """Whether places (N, T) are the last ones of each row, or the first, as those of padding are."""
    return bool((places[:, 1:] >= places[:, :-1]).all()) or bool((places[:, 1:] <= places[:, :-1]).all())


def _is_chosen(observed: Observed, z: Tensor) -> bool:
    """Whether positions here and there count, as those do that a masked language model is to restore."""
    for found in observed.criteria:
        if found.target.numel() == z.numel() and not found.target.is_floating_point():
            counts = found.target.reshape(z.shape) >= 0
            if int(counts.sum()) < SAME * z.numel() and _are_scattered(counts):
                return True
    return False


def _is_target(observed: Observed, z: Tensor) -> bool:
    """Whether a loss compares its outputs with these tokens at the same places, or at those that count."""
    for found in observed.criteria:
        if found.target.numel() == z.numel() and not z.is_floating_point() and not found.target.is_floating_point():
            target = found.target.reshape(z.shape).to(z.device)
            valid = target >= 0
            counts = float(valid.float().mean()) > SAME or _is_chosen(observed, z)
            if counts and bool(valid.any()) and float((target == z)[valid].float().mean()) >= SHIFTED:
                return True
    return False


def _is_mask(t: Tensor) -> bool:
    return bool(((t == 0) | (t == 1)).all())


def _next_inputs(observed: Observed, x: Tensor) -> Tensor | None:
    """Where (B, T) the target of the loss is the next input, and counts; `None` where the targets are others."""
    if x.ndim < 2 or x.shape[1] < LEAST:
        return None
    for found in _targets(observed, x):
        for length in (x.shape[1], x.shape[1] - 1):
            if found.numel() != x[:, :length].numel():
                continue
            target = found.reshape(x[:, :length].shape).to(x.device)
            here, following = x[:, :length], x[:, 1 : length + 1]
            counts = target[:, : following.shape[1]] >= 0 if not target.is_floating_point() else None
            same = [target[:, : t.shape[1]] == t for t in (here, following)]
            if x.ndim > 2:
                same = [t.flatten(2).all(-1) for t in same]
            valid = torch.ones_like(same[1]) if counts is None or x.ndim > 2 else counts
            share = [(t[:, : valid.shape[1]] & valid).sum() / valid.sum().clamp(min=1) for t in same]
            if bool(valid.any()) and share[1] >= SHIFTED and share[0] < SAME:
                return valid & same[1]
    return None


def _targets(observed: Observed, x: Tensor) -> list[Tensor]:
    """What the loss compares outputs with; of one's own loss, tokens that the model is not given, or those behind."""
    found = [one.target for one in observed.criteria]
    if any(not t.is_floating_point() for t in found) or x.is_floating_point():
        return found
    given = given_of(observed.batches[:1], observed.fed, set())
    found += [
        t for t in (g.values[0] for g in given if not g.is_input) if t.shape == x.shape and not t.is_floating_point()
    ]
    if (x.data_ptr(), len(x) * (x.shape[1] - 1)) in observed.fed and len(given) == 1:
        found.append(x[:, 1:])
    return found


def _with(batch: Any, x: Tensor, other: Tensor) -> Any:
    """The batch with other inputs; targets may be the same tensor, and do not matter here."""
    return mapped(batch, lambda t: other if t is x else t)


def _run(model: nn.Module, batch: Any, objective: Objective, shape: tuple[int, ...]) -> tuple[list[str], list[Tensor]]:
    with _watched(model, shape) as seen:
        objective.loss(model, batch)
    return [name for name, _ in seen], [t for _, t in seen]


@contextmanager
def _watched(model: nn.Module, shape: tuple[int, ...]) -> Iterator[list[tuple[str, Tensor]]]:
    """A context that lists each module's output with the samples and positions in front, as it returns.

    Convolutions give the channels before the positions.
    """
    found: list[tuple[str, Tensor]] = []
    of_channels: list[Tensor] = []

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            made = first_float(output)
            lengths = (shape[1], shape[1] - 1)
            if made is not None and made.ndim == 2 and made.shape[1] in lengths:  # a number for each position
                made = made[..., None]
            if made is None or made.ndim < 3 or len(made) != shape[0]:
                return
            if _is_of_channels(module):
                of_channels.append(made)
            if made.ndim == 3 and made.shape[2] in lengths:
                first, last = (made.shape[d] if made.shape[d] in lengths else 0 for d in (1, 2))
                if last > first or (last == first and any(made is t for t in of_channels)):
                    made = made.transpose(1, 2)
            if made.shape[1] in lengths:
                wide = made.detach().flatten(2)
                found.append(
                    (name, torch.stack((wide.float().mean(-1), wide[..., 0].float(), wide[..., -1].float()), -1))
                )

        return keep

    with hooks([m.register_forward_hook(hook(n)) for n, m in model.named_modules()]):
        yield found


def _is_of_channels(module: nn.Module) -> bool:
    """Whether a module gives (samples, channels, positions)."""
    return isinstance(module, (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d, nn.GroupNorm))


def _share(before: Tensor, after: Tensor, rows: Tensor, position: int) -> float:
    """The change up to a position over that behind it; 0 where nothing changes behind it."""
    moved = (after - before)[rows].square().nan_to_num()
    later = float(moved[:, position + 1 :].mean()) ** 0.5 if moved.shape[1] > position + 1 else 0.0
    return float(moved[:, : position + 1].mean()) ** 0.5 / later if later > 0 else 0.0
