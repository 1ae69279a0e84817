"""Which tensor of one checkpoint is which of another: by name, and by a change of prefix that their names show."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from torch import Tensor

from gramian.checkpoint import Checkpoint, Entry
from gramian.errors import CheckpointError
from gramian.inspection.experiments.intended_zeros import is_factor
from gramian.inspection.weights.matrices import Holding, find_holdings
from gramian.layers.lookup import match_pattern
from gramian.report.model import plural

__all__ = ["Pairs", "is_in_out", "refuse_adapter"]

# A prefix is looked for among the first components of a name, before the number of a layer.
LONGEST_PREFIX = 4

# The modules that PEFT puts between a module's name and its weight.
_IN_PEFT = re.compile(r"\.(base_layer|modules_to_save\.default)(?=\.)")


class Pairs:
    """The tensors that two checkpoints of one architecture share, and the matrices that they hold.

    Equal names are a pair. Of the others, the change of prefix that makes the most names and shapes agree is applied,
    if no other does as well: `model.layers.0.…` for `layers.0.…`. That is repeated while it finds more. A prefix that
    is put in place of another must pair half of the smaller checkpoint, since two heads of one class have equal names
    behind their own.

    Attributes:
        one, two: the checkpoints.
        names: of each pair, the name in `two` by the name in `one`.
        order: the names in `one`, those with matrices from embedding to head, then the others, and parts last; without
            aliases.
        only_one, only_two: the names that have no partner.
        changes: of prefix, `(in one, in two, number of names)`.
        notes: the same in words.
        new, old: what each tensor of `one` and of `two` holds, as its own file says.

    Raises:
        CheckpointError: no pair was found.
        InputError: as `find_holdings`.
    """

    def __init__(self, one: Checkpoint, two: Checkpoint, layouts: Mapping[str, Any] | None = None) -> None:
        self.one, self.two = one, two
        self.names, self.changes = _match(one, two)
        self.notes = [
            f"{plural(count, 'name')} matched: {_prefix(new)} in {one.path} is {_prefix(old)} in {two.path}"
            for new, old, count in self.changes
        ]
        taken = set(self.names.values())
        # the parts of a weight that is in a pair are in it too
        self.only_one = [n for n, e in one.entries.items() if n not in self.names and e.part_of not in self.names]
        self.only_two = [n for n, e in two.entries.items() if n not in taken and e.part_of not in taken]
        self.new = {h.entry.name: h for h in find_holdings(one, layouts)[0]}
        known = {p: v for p, v in (layouts or {}).items() if any(match_pattern({p: v}, name) for name in two.entries)}
        self.old = {h.entry.name: h for h in find_holdings(two, known)[0]}
        self.order = [name for name in self.new if name in self.names]
        others = [name for name in self.names if name not in self.new and not self._is_alias(name)]
        self.order += sorted(others, key=lambda name: bool(self.whole_of(name)))

    def renamed(self, name: str) -> str:
        """The name that a tensor or module of `one` has, or would have, in `two`."""
        for new, old, _ in self.changes:
            if name.startswith(new):
                return old + name.removeprefix(new)
        return name

    def load(self, name: str) -> tuple[Tensor, Tensor]:
        """Both tensors of a pair, by the name in `one`."""
        return self.one.load(name), self.two.load(self.names[name])

    def whole_of(self, name: str) -> str:
        """The weight, a pair itself, of which both tensors of a pair are parts; or empty."""
        whole = self.one.entries[name].part_of
        return whole if whole and self.names.get(whole) == self.two.entries[self.names[name]].part_of else ""

    def made(self, name: str) -> list[str]:
        """How the tensors of a pair are computed, those that are not in their file as they are."""
        entries = ((self.one, self.one.entries[name]), (self.two, self.two.entries[self.names[name]]))
        return [f"{entry.made.how}, in {checkpoint.path}" for checkpoint, entry in entries if entry.made]

    def stored_otherwise(self, name: str) -> bool:
        """Whether the two files hold a weight in other parts."""
        entry, other = self.one.entries[name], self.two.entries[self.names[name]]
        is_same = bool(entry.made) == bool(other.made) and self.renamed(name) == other.name
        return not is_same and (entry.made is not None or other.made is not None)

    def turned(self, name: str) -> bool:
        """Whether the tensors hold matrices of the same shapes, whatever shapes they have themselves."""
        a, b = self.new.get(name), self.old.get(self.names[name])
        return a is not None and b is not None and a.shapes == b.shapes

    def common_rows(self, name: str, new: Tensor, old: Tensor) -> tuple[Tensor, Tensor] | None:
        """The first rows that both tensors have, if they differ in nothing else and hold one matrix or none.

        A vector is cut only where a matrix is, from the same length to the same: as the bias of a head's rows is.
        """
        holdings = (self.new.get(name), self.old.get(self.names[name]))
        whole = all(h is None or (len(h.shapes) == 1 and not is_in_out(h)) for h in holdings)
        if not whole or new.ndim != old.ndim or not new.ndim or new.shape[1:] != old.shape[1:]:
            return None
        if new.ndim == 1 and (len(new), len(old)) not in self._resized():
            return None
        rows = min(len(new), len(old))
        return (new[:rows], old[:rows]) if rows else None

    def pieces(self, name: str, new: Tensor, old: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The matrices of both tensors by name, each cut as its own file says; nothing where they hold none."""
        a, b = self.new.get(name), self.old.get(self.names[name])
        if (a is None and b is None) or not (new.is_floating_point() and old.is_floating_point()):
            return
        if (
            tuple(new.shape) != self.one.entries[name].shape
            or tuple(old.shape) != self.two.entries[self.names[name]].shape
        ):
            yield name, new.flatten(1), old.flatten(1)  # the rows that both have
            return
        if a is None or b is None or a.shapes != b.shapes:  # the file that tells more is asked for both
            a = b = max((h for h in (a, b) if h is not None), key=lambda h: len(h.shapes))
        labels = a.layout.names(name, a.role == "elementwise")
        yield from zip(labels, a.split(new), b.split(old), strict=True)

    def _resized(self) -> set[tuple[int, int]]:
        """The numbers of rows of matrices that differ in that alone."""
        shapes = ((self.one.entries[name].shape, self.two.entries[other].shape) for name, other in self.names.items())
        return {(a[0], b[0]) for a, b in shapes if len(a) > 1 and a[1:] == b[1:] and a != b}

    def _is_alias(self, name: str) -> bool:
        """Whether both names are aliases, of tensors that are a pair themselves."""
        first, second = self.one.entries[name].tied_to, self.two.entries[self.names[name]].tied_to
        return bool(first) and self.names.get(first) == second


def is_in_out(holding: Holding) -> bool:
    """Whether the tensor is (in, out), so that the columns of its matrices lie along its first dimension."""
    return bool(set(holding.layout.dims[0]) & set(holding.layout.sides[2]))


Change = tuple[tuple[str, str], dict[str, str]]


def _match(one: Checkpoint, two: Checkpoint) -> tuple[dict[str, str], list[tuple[str, str, int]]]:
    """The pairs, by the names in `one`, and the changes of prefix."""
    first, second = _weights(one), _weights(two)
    pairs = {name: name for name in first if name in second}
    changes: list[tuple[str, str, int]] = []
    while True:
        taken = set(pairs.values())
        best = _best_changes(
            {name: entry.shape for name, entry in first.items() if name not in pairs},
            {name: entry.shape for name, entry in second.items() if name not in taken},
            min(len(first), len(second)) / 2,
        )
        if len(best) != 1:
            break
        (new, old), renamed = best[0]
        pairs |= renamed
        changes.append((new, old, len(renamed)))
    for name, other in pairs.items():
        if _is_product(first[name]) != _is_product(second[other]):
            refuse_adapter(one if _is_product(first[name]) else two)
    if not pairs:
        raise _strangers(one, two, [f"{_prefix(new)} as {_prefix(old)}" for (new, old), _ in best])
    return {first[name].name: second[pairs[name]].name for name in first if name in pairs}, changes


def _weights(checkpoint: Checkpoint) -> dict[str, Entry]:
    """The entries by the names that their weights have in the model, however a file stores them."""
    entries = checkpoint.entries
    named: dict[str, Entry] = {}
    for entry in entries.values():
        name = _IN_PEFT.sub("", entry.weight)
        named[entry.name if name != entry.name and name in entries else name] = entry
    return named


def _is_product(entry: Entry) -> bool:
    return entry.made is not None and entry.made.low_rank


def refuse_adapter(checkpoint: Checkpoint) -> NoReturn:
    """Raise that an adapter is no whole model."""
    raise CheckpointError(
        f"{checkpoint.path}: holds an adapter's factors, wanted a whole model. Their products are the difference from "
        "its base: run gramian inspect on it alone. Or merge it first: "
        "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained('merged')."
    )


def _best_changes(one: Mapping[str, tuple[int, ...]], two: Mapping[str, tuple[int, ...]], least: float) -> list[Change]:
    """Return the changes of prefix that make the most names and shapes agree: several where they fit equally well."""
    behind: dict[str, list[str]] = {}
    for name in two:
        for old in _leading(name):
            behind.setdefault(name.removeprefix(old), []).append(old)
    changes: dict[tuple[str, str], dict[str, str]] = {}
    for name in one:
        for new in _leading(name):
            rest = name.removeprefix(new)
            for old in behind.get(rest, ()) if "." in rest else ():  # `weight` alone may be any module's
                changes.setdefault((new, old), {})[name] = old + rest
    best: list[Change] = []
    most = 0
    # the shortest first: `bert.` rather than `bert.encoder.`
    for (new, old), renamed in sorted(changes.items(), key=lambda item: (len(item[0][0] + item[0][1]), item[0])):
        agree = sum(one[name] == two[other] for name, other in renamed.items())
        swaps = bool(new) and bool(old) and not (new.endswith(f".{old}") or old.endswith(f".{new}"))
        if not agree or agree < most or (swaps and agree < least):
            continue
        if agree > most:
            most, best = agree, []
        if all(renamed.items() - known.items() for _, known in best):
            best.append(((new, old), renamed))
    return best


def _leading(name: str) -> Iterator[str]:
    """The empty prefix, and the first components of a name, each with its dot."""
    yield ""
    parts = name.split(".")[:-1]
    for count in range(1, min(len(parts), LONGEST_PREFIX) + 1):
        if parts[count - 1].isdigit():
            return
        yield ".".join(parts[:count]) + "."


def _prefix(prefix: str) -> str:
    return f"the prefix {prefix!r}" if prefix else "no prefix"


def _strangers(one: Checkpoint, two: Checkpoint, rivals: list[str]) -> CheckpointError:
    for checkpoint in (one, two):
        if any(_is_product(entry) or is_factor(name) for name, entry in checkpoint.entries.items()):
            refuse_adapter(checkpoint)
    first, second = next(iter(one.entries)), next(iter(two.entries))
    equally = f" (several prefixes fit equally well: {'; '.join(rivals)})" if rivals else ""
    return CheckpointError(
        f"{one.path} and {two.path} share no tensor: {first!r} against {second!r}{equally}. "
        "Give two checkpoints of one architecture."
    )
