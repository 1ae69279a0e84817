"""Statistics: the second moments of every layer of a model, by use, merged over files and ranks."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gramian import placement
from gramian.checkpoint import load_tensors, save_tensors
from gramian.checkpoint.faults import damaged
from gramian.errors import CheckpointError, InputError, some
from gramian.gram import DiagonalGram, Gram
from gramian.rows import Rows
from gramian.site import Site, Sites

__all__ = ["Site", "Sites", "Statistics"]

_FORMAT = "gramian.statistics"


@dataclass
class Statistics(Mapping[str, Sites]):
    """The sites of a model's blocks by name, in the order of the forward pass: what `gm.capture` returns.

    `stats[name].A` and `.G` where the block has one site, `stats[name][0].A` where it has several. A tied parameter is
    one block: its first name gives all its sites, each other name those where it was used under that name.

    Args:
        blocks: a list of sites for each block.
        aliases: the block's name for each further name of a tied parameter.
        fisher: which second moment G is: "empirical", "sampled" or "gauss_newton".
        units: the number of units of the loss that were seen.
        loss: the mean loss per unit.
        objective: the objective that a live capture observes.
        other_uses: for each block, the functions that data and its weight entered and that are not captured.
        padded: for each block in whose A padded positions count, since the mask did not reach them, the operation.
        parameters: the number of entries of every parameter that holds matrices, or may.

    Raises:
        InputError: `stats[name]` for a name that is no block's.
    Cost: none.
    Source: A and G as in K-FAC (Martens & Grosse 1503.05671, eq. 1).

    >>> stats = Statistics({"0.weight": [Site(A=Gram(2).update(torch.eye(2)), name="0.weight", op="linear")]})
    >>> stats["0.weight"].A
    Gram(dim=2, count=2)
    """

    blocks: dict[str, list[Site]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    fisher: str = "empirical"
    units: float = 0.0
    loss: float = float("nan")
    objective: Any = field(default=None, repr=False, compare=False)
    other_uses: dict[str, list[str]] = field(default_factory=dict)
    padded: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        sites = sum(1 for _ in self.sites())
        return (
            f"<Statistics: {len(self)} block{'s' * (len(self) != 1)} at {sites} site{'s' * (sites != 1)}, "
            f"{self.units:g} units, loss {self.loss:.4g}, G {self.fisher!r}; see explain()>"
        )

    def _repr_html_(self) -> str:
        return self.explain()._repr_html_()

    def explain(self) -> Rows:
        """One row for each site: its name, the operation, the sides of A and G, the rows seen, and what is missing.

        >>> Statistics({"a": [Site(A=Gram(2), op="linear", name="a", calls=1, reason="frozen")]}).explain()
        name  op      A  G  rows  calls  reason
        a     linear  2        0      1  frozen
        """
        return Rows(
            {
                "name": site.name or name,
                "op": site.op,
                "A": None if site.A is None else site.A.dim,
                "G": None if site.G is None else site.G.dim,
                "rows": None if site.A is None else int(site.A.count.max()),
                "calls": site.calls,
                "reason": site.reason,
            }
            for name, sites in self.blocks.items()
            for site in sites
        )

    def __getitem__(self, name: str) -> Sites:
        if name in self.blocks:
            return Sites(self.blocks[name])
        if name in self.aliases:
            found = Sites(site for site in self.blocks[self.aliases[name]] if site.name == name)
            if found:
                return found
            return Sites([Site(name=name, reason=f"not used under this name; see {self.aliases[name]!r}")])
        known = ", ".join(list(self.blocks)[:5])
        raise InputError(f"statistics: no block is named {name!r}; the first are {known or 'none'}")

    def get(self, name: str, default: Any = None) -> Any:
        """The sites of a block, or the default.

        Args:
            name: the block's, or another of a tied parameter.
            default: what to return where no block has the name.
        """
        if name not in self:
            return default
        return self[name]

    def __contains__(self, name: object) -> bool:
        return name in self.blocks or name in self.aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def sites(self) -> Iterator[Site]:
        """Every site of every block."""
        return (site for sites in self.blocks.values() for site in sites)

    @property
    def coverage(self) -> float:
        """The share of the parameters that hold matrices, or may, of which A and G were captured; NaN if unknown."""
        known = sum(num for name, num in self.parameters.items() if not self._missing(name))
        return known / total if (total := sum(self.parameters.values())) else float("nan")

    def summary(self) -> list[str]:
        """In sentences: the coverage, and for each reason what is not captured; `[]` where everything is.

        >>> stats = Statistics({"a": [Site(A=Gram(2), G=Gram(3))]}, parameters={"a": 6, "experts": 18})
        >>> for line in stats.summary():
        ...     print(line)
        Second moments cover 25.0% of the parameters that hold matrices, or may.
        Not captured, which matrices it holds is not known (1; 75.0% of these parameters): experts
        """
        by_reason: dict[str, list[str]] = {}
        for name in self.parameters:
            if reason := self._missing(name):
                by_reason.setdefault(reason, []).append(name)
        total, lines = sum(self.parameters.values()) or 1, []
        if by_reason:
            lines = [f"Second moments cover {self.coverage:.1%} of the parameters that hold matrices, or may."]
        for reason, names in by_reason.items():
            share = sum(self.parameters[name] for name in names) / total
            lines.append(f"Not captured, {reason} ({len(names)}; {share:.1%} of these parameters): {some(names)}")
        also: dict[str, list[str]] = {}
        for name, used in self.other_uses.items():
            if not self._missing(name):
                also.setdefault(", ".join(used), []).append(name)
        for used, names in also.items():
            verb = "is" if len(names) == 1 else "are"
            lines.append(f"{some(names)} {verb} also used by {used}, which is not captured.")
        if self.padded:
            ops = ", ".join(dict.fromkeys(self.padded.values()))
            lines.append(f"Padded positions count in A, which the mask does not reach in {ops}: {some(self.padded)}")
        return lines

    def _missing(self, name: str) -> str:
        """Why A or G of a parameter is missing; empty where some site has both."""
        sites = self.blocks.get(name)
        if sites is None:
            return "which matrices it holds is not known"
        if any(site.A is not None and site.G is not None for site in sites):
            return ""
        return next((site.reason for site in sites if site.reason), "no gradient reached it")

    def settle(self) -> None:
        """Sets the count of every G to all units, less those of backward passes that overflowed.

        So a batch that did not use a layer counts as one with a gradient of zero.
        """
        for site in self.sites():
            if site.G is not None:
                site.G.count.fill_(self.units)
                if site.skipped is not None:
                    site.G.count -= site.skipped.to(site.G.count.device)

    def merge(self, other: Statistics) -> Statistics:
        """Adds the statistics of other batches of the same model, as if one pass had been over both.

        Raises `InputError` where G is another second moment (`fisher`), `ShapeError` where sizes differ.
        """
        if self.units and other.units and self.fisher != other.fisher:
            raise InputError(
                f"merge: G is {self.fisher!r} here and {other.fisher!r} there; capture both with the same fisher"
            )
        losses = [s.loss * s.units for s in (self, other) if s.units]
        self.fisher = self.fisher if self.units else other.fisher
        self.units += other.units
        self.loss = sum(losses) / self.units if self.units else float("nan")
        self.aliases |= other.aliases
        self.parameters |= other.parameters
        self.padded |= other.padded
        for block, used in other.other_uses.items():
            self.other_uses[block] = sorted({*self.other_uses.get(block, ()), *used})
        for block, sites in other.blocks.items():
            mine = self.blocks.setdefault(block, [])
            for site in sites:
                same = next((s for s in mine if s.key == site.key or not s.op or not site.op), None)
                if same is None:
                    mine.append(copy.deepcopy(site))
                else:
                    same.merge(site)
        self.settle()
        return self

    def all_reduce(self, group: Any = None) -> Statistics:
        """Merges the statistics of all ranks, so that each has those of all batches. Collective.

        Ranks may have reached different blocks; a rank that has not seen a block adds nothing to it. The sites are new
        objects afterwards. `capture` does this itself for a model under DDP or FSDP2.

        Raises `InputError` or `ShapeError`, on every rank, where two ranks' statistics do not match. Cost: one exchange
        of names and sizes, and one sum of all Grams in float64. Memory: all Grams once more.

        Args:
            group: the process group; all ranks by default. Without one, nothing happens.
        """
        rank, size = placement.world(group)
        if size == 1:
            return self
        sizes = [[None if m is None else (*m.batch, m.dim) for m in (site.A, site.G)] for site in self.sites()]
        skips = [site.skipped is not None for site in self.sites()]
        abouts = placement.exchange_json(self._about() | {"sizes": sizes, "skips": skips}, group)
        device = next((m.sum.device for site in self.sites() for m in (site.A, site.G) if m is not None), "cpu")
        whole, moments = Statistics(), []
        for r, about in enumerate(abouts):  # by rank, so that all ranks have the same sites in the same order
            whole.merge(self if r == rank else _zeros(about, device))
            moments = [m for site in whole.sites() for m in (site.A, site.G) if m is not None]
            for moment in moments:  # sums that were one zero, repeated, get memory of their own
                moment.total, moment.sum = moment.total.contiguous(), moment.sum.contiguous()
        skipped = [site.skipped for site in whole.sites() if site.skipped is not None]
        placement.all_reduce_sum([tensor for moment in moments for tensor in moment.tensors()] + skipped, group)
        whole.settle()
        self.blocks, self.aliases, self.fisher = whole.blocks, whole.aliases, whole.fisher
        self.units, self.loss = whole.units, whole.loss
        self.other_uses, self.padded, self.parameters = whole.other_uses, whole.padded, whole.parameters
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything to a safetensors file, whole or not at all; `Statistics.load` reads it back bitwise."""
        tensors: dict[str, Tensor] = {}
        for i, site in enumerate(self.sites()):
            for side, moment in (("A", site.A), ("G", site.G)):
                if moment is not None:
                    parts = zip(("total", "sum", "count"), moment.tensors(), strict=True)
                    tensors |= {f"{i}.{side}.{part}": tensor for part, tensor in parts}
            if site.skipped is not None:
                tensors[f"{i}.skipped"] = site.skipped
        save_tensors(path, tensors, {_FORMAT: json.dumps(self._about())})

    def _about(self) -> dict[str, Any]:
        """Everything but the tensors, for JSON; a second moment is named by its class."""
        rows = []
        for site in self.sites():
            row = {key: getattr(site, key) for key in ("reason", "calls", "name", "op", "transposed")}
            rows.append(row | {s: None if (m := getattr(site, s)) is None else type(m).__name__ for s in "AG"})
        return {
            "blocks": {name: len(sites) for name, sites in self.blocks.items()},
            "sites": rows,
            "aliases": self.aliases,
            "fisher": self.fisher,
            "units": self.units,
            "loss": self.loss,
            "other_uses": self.other_uses,
            "padded": self.padded,
            "parameters": self.parameters,
        }

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Statistics:
        """Reads a file that `save` wrote. Raises `CheckpointError` for any other.

        >>> import tempfile, pathlib, torch
        >>> stats = Statistics({"0.weight": [Site(A=Gram(2).update(torch.eye(2)), name="0.weight", op="linear")]})
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "stats.safetensors"
        >>> stats.save(path)
        >>> Statistics.load(path)["0.weight"].A
        Gram(dim=2, count=2)
        """
        tensors, metadata = load_tensors(path)
        if _FORMAT not in metadata:
            raise CheckpointError(f"{os.fspath(path)}: not statistics of gramian; pass a file that stats.save wrote")

        def parts(i: int, side: str) -> tuple[Tensor, ...]:
            return tuple(tensors[f"{i}.{side}.{part}"] for part in ("total", "sum", "count"))

        try:
            return _rebuilt(json.loads(metadata[_FORMAT]), parts, lambda i: tensors.get(f"{i}.skipped"))
        except Exception as error:  # what the metadata or the tensors say may be anything
            raise damaged(Path(path), error) from error


def _rebuilt(
    about: dict[str, Any], parts: Callable[[int, str], tuple[Tensor, ...]], skipped: Callable[[int], Tensor | None]
) -> Statistics:
    """Statistics from `_about()` of others and each site's tensors: those of each side, and `skipped`."""
    sites = []
    for i, row in enumerate(about["sites"]):
        for side in "AG":
            if row[side] is not None:
                total, first, count = parts(i, side)
                kind = {"Gram": Gram, "DiagonalGram": DiagonalGram}[row[side]]
                row[side] = kind.of(total, first, count)
        sites.append(Site(**row, skipped=skipped(i)))
    taken = iter(sites)
    blocks = {name: [next(taken) for _ in range(num)] for name, num in about["blocks"].items()}
    more = {key: about.get(key, {}) for key in ("other_uses", "padded", "parameters")}  # files of before have none
    return Statistics(blocks, about["aliases"], about["fisher"], about["units"], about["loss"], **more)


def _zeros(about: dict[str, Any], device: torch.device | str) -> Statistics:
    """Another rank's statistics with zeros for their sums: one number, expanded, which takes no memory."""
    zero = torch.zeros((), dtype=torch.float64, device=device)

    def parts(i: int, side: str) -> tuple[Tensor, ...]:
        *batch, dim = about["sizes"][i]["AG".index(side)]
        square = (dim, dim) if about["sites"][i][side] == "Gram" else (dim,)
        return zero.expand(*batch, *square), zero.expand(*batch, dim), zero.new_zeros(batch)

    return _rebuilt(about, parts, lambda i: zero.clone() if about["skips"][i] else None)
