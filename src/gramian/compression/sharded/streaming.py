"""Compressing a model that does not fit into memory: calibrated and factored part by part from its files."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import nn

from gramian.compression.budget.mixing import Form
from gramian.compression.budget.planning import by_default, judged, nothing
from gramian.compression.budget.weighted import WeightedSVD, decompose
from gramian.compression.calibration.calibrating import (
    EVERY,
    MOST_DRAWS,
    ROWS,
    VANISHES,
    Calibration,
    around_output,
    draws_for,
    redrawn,
)
from gramian.compression.calibration.correcting import corrected_by, parts_of
from gramian.compression.calibration.reading import Reader, cuttable
from gramian.compression.calibration.samplewise import PART, draws_of, samples_of
from gramian.compression.calibration.targets import Target, targets
from gramian.compression.calibration.weighting import Uncaptured, weighting
from gramian.compression.layers.modules import module_name, submodule
from gramian.compression.sharded.holding import as_bytes, check_disk, shown, told
from gramian.compression.sharded.journal import Journal, Remaining
from gramian.compression.sharded.losses import cut, measured
from gramian.compression.sharded.passing import Item
from gramian.compression.sharded.sharded_plan import ShardedPlan, spooled
from gramian.compression.sharded.shards import OUTSIDE, Shards
from gramian.compression.sharded.spool import JOURNAL, Spool
from gramian.compression.sharded.sweeping import Sweep
from gramian.errors import GramianWarning
from gramian.layers import operation_of
from gramian.loader import Batches, no_batches
from gramian.objective import Objective, as_objective
from gramian.recording.recorder import MAX_DIM
from gramian.rows import Rows
from gramian.statistics import Statistics

__all__ = ["compress_shards"]

Tell = Callable[[str, float, str], None]


def compress_shards(
    folder: str | os.PathLike[str],
    batches: Batches,
    objective: Objective | Callable,
    *,
    held_out: Batches | None = None,
    keep: float | None = None,
    of: Literal["all", "factorable"] = "all",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    memory: int | float | str | None = None,
    scratch: str | os.PathLike[str] | None = None,
    progress: Callable[[int], None] | None = None,
    tell: Tell | None = None,
) -> ShardedPlan:
    """`compress` for a model in a folder, of which one part at a time is in memory.

    Args:
        folder: of a model of transformers.
        batches, objective, held_out, keep, of, include, exclude: as there.
        memory: that the process may have, as `"6GB"`: batches are cut into as few samples as that takes.
        scratch: a folder for what waits on the disk.
        progress: called with the number of layers done.
        tell: called as `tell(stage, share done, remark)`; the first remark says what is held.

    Returns: the plan, without predictions: no smaller model is measured.
    Raises: as `compress`; InputError where the memory or the disk is too small, before anything is computed.
    """
    objective = as_objective(objective)
    limit = None if memory is None else as_bytes(memory)
    shards = Shards(folder)
    found, reasons = targets(shards.model, include, exclude)
    for target in found:
        if target.block is None or target.name != module_name(target.block):  # factored already, or to be opened
            reasons[target.name] = "left dense where a model is read from shards"
    found = [target for target in found if target.name not in reasons]
    if not found:
        raise nothing(shards.model, reasons)
    reader = Reader(batches, held_out=held_out)
    given = list(reader)
    if not given:
        raise no_batches(batches, "compress")
    held, distinct, samples = reader.shared(given[0])
    calibration = Calibration(Statistics(), distinct, samples, objective=objective)
    run = _Run(
        shards,
        found,
        reader,
        Sweep(
            shards, Spool(scratch, hashlib.sha256(str(shards.folder.resolve()).encode()).hexdigest()[:12]), objective
        ),
        calibration,
        tell or (lambda *_: None),
        progress or (lambda _: None),
    )
    run.prepare(given, [batch for _, batch in held], limit)
    run.calibrate()
    spectra, uncaptured = run.decompose()
    reasons |= uncaptured
    if not spectra:
        raise nothing(shards.model, reasons)
    for note in run.notes:
        warnings.warn(f"compress: {note}", GramianWarning, stacklevel=3)
    forms = {s.name: Form() for s in spectra}
    options = {"shards": shards, "spool": run.sweep.spool, "told": run.told}
    plan = ShardedPlan(shards.model, tuple(spectra), 1.0, forms, reasons, of, tuple(run.notes), run.ranked, **options)
    made = by_default(plan) if keep is None else plan.at(keep=keep)
    assert isinstance(made, ShardedPlan)
    return made


@dataclass
class _Run:
    """A compression on its way."""

    shards: Shards
    found: Sequence[Target]
    reader: Reader
    sweep: Sweep
    calibration: Calibration
    tell: Tell
    progress: Callable[[int], None]
    told: Rows = field(default_factory=lambda: Rows([]))
    items: list[Item] = field(default_factory=list)
    samples: list[tuple[Item, int]] = field(default_factory=list)
    parts: list[tuple[Item, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ranked: bool = True
    seed: int = 1
    first: int = 1
    """Items that the first batch was cut into."""

    def prepare(self, given: Sequence[Any], held: Sequence[Any], limit: int | None) -> None:
        """Says what will be held, and cuts the batches to what fits."""
        parts, base, most = measured(self.sweep, self.found, given, limit)
        self.told = told(parts, base, most)
        self.items = [Item(f"{i}", batch) for i, batch in enumerate(chain.from_iterable(cut(b, most) for b in given))]
        self.first = len(list(cut(given[0], most)))
        if self.calibration.objective is not None and self.calibration.objective.sampled is not None:
            single = list(samples_of(held, min(most, PART)))
            draws = draws_of(single)
            self.samples = [(Item(f"s{i}", batch, draws=draws), num) for i, (batch, num) in enumerate(single)]
            if not all(map(_shows_samples, self.found)):
                self.parts = [(Item(f"p{i}", b, draws=num), num) for i, (b, num) in enumerate(parts_of(held))]
        everything = [*self.items, *(item for item, _ in (*self.samples, *self.parts))]
        num = sum(max(1, cuttable(item.batch)) for item in everything)
        weights = sum(map(self.shards.bytes, (OUTSIDE, *self.shards.blocks)))  # which their factors stay below
        disk = num * parts[0].hidden * (len(self.shards.blocks) + 1 + 2 * MOST_DRAWS) + weights
        check_disk(self.sweep.spool.folder, disk)
        peak = base + max(part.at(most) for part in parts)
        remark = f"{len(self.items)} batches of at most {most}, peak {shown(peak)} of memory, {shown(disk)} of disk"
        self.tell("Sweep", 0.0, remark)

    def calibrate(self) -> None:
        """The forward sweep, and the gradients at its end."""
        extra = [item for item, _ in (*self.samples, *self.parts)]
        total = 1 + len(self.shards.blocks)
        for i, name in enumerate(self.sweep.forward([*self.items, *extra]), 1):
            self.tell("Sweep", i / total, name)
        first = self.items[0]
        self.sweep.outputs([first], torch.Generator().manual_seed(0))
        used = self.sweep.objective
        if not bool(self.sweep.back(first, len(self.shards.blocks)).any()):
            used = around_output(used)
            self.notes.append(VANISHES)
        rows = [self._rows(item) for item in self.items]
        sides = [dim for target in self.found for dim in _sides(target) if dim <= MAX_DIM]
        whole = sum(rows[: self.first]) * self.reader.total  # about: the batches kept apart count too
        times = draws_for(used, max(sides, default=0), whole or math.inf)
        self.sweep.objective, self.sweep.once = redrawn(used, times), used
        self.seed = 0 if len(self.items) == times == 1 else 1
        seen = 0.0
        for i, item in enumerate(self.items):
            item.back = not i or not i % EVERY or seen < ROWS * max(sides, default=0)
            seen += rows[i]
        self.sweep.outputs(self.items, torch.Generator().manual_seed(self.seed))
        for items in (self.samples, self.parts):  # a generator of its own for each, as correcting has
            self.sweep.outputs([item for item, _ in items], torch.Generator().manual_seed(2))
        self.calibration.objective = used
        self.calibration.differentiated = sum(item.back for item in self.items) / len(self.items)

    def decompose(self) -> tuple[list[WeightedSVD], dict[str, str]]:
        """The backward sweep, in which each part is decomposed as soon as its second moments are there."""
        extra = [item for item, _ in (*self.samples, *self.parts)]
        spool, journal = self.sweep.spool, self._journal(extra)
        asked: dict[str, set[str]] = {}
        for target in self.found:
            asked.setdefault(self.shards.part_of(target.name), set()).add(target.inputs)
        todo = [target for target in self.found if self.shards.part_of(target.name) not in journal.parts]
        done = len(self.found) - len(todo)
        costs = {target.name: target.dense * min(_matrix(target)) for target in todo}
        remaining = Remaining(costs, len({self.shards.part_of(name) for name in costs}))
        if done:
            self.tell("Factor", 0.0, f"{done} of {len(self.found)} layers were done before")

        def after(part: str) -> None:
            journal.parts.append(part)
            journal.save(spool)
            spool.keep()

        for part, model, stats in self.sweep.backward(self.items, extra, self.seed, asked, journal.parts, after):
            remaining.begin()
            self.calibration.stats, self.calibration.latest = stats, {}
            if journal.judged is None:
                self.calibration.notes = self.notes
                journal.judged = judged(self.calibration)
            _, ranked, blind = journal.judged
            here: list[WeightedSVD] = []
            for target in self.found:
                if self.shards.part_of(target.name) == part:
                    try:
                        here.append(self._decomposed(target, blind))
                    except Uncaptured as error:
                        journal.reasons[target.name] = str(error)
                    done += 1
                    share, left = remaining.after(target.name)
                    self.progress(done)
                    self.tell("Factor", share, f"{target.name}, {left} left")
                    stats.blocks.pop(target.inputs, None)
            if ranked and (self.samples or self.parts):
                here = list(self._corrected(part, model, here))
            for s in here:
                layer, name = submodule(self.shards.model, s.name), f"factors.{s.name}"
                journal.spectra[s.name] = spooled(s, layer, spool, name)
            del here
        spool.free()
        if journal.judged is not None:
            self.notes, self.ranked, _ = journal.judged
        made = journal.spectra
        return [made[target.name] for target in self.found if target.name in made], journal.reasons

    def _journal(self, extra: Sequence[Item]) -> Journal:
        """What an earlier run has done; the losses of all batches show that it had the same model, data and loss."""
        items = [(item.loss, item.units, item.back, item.draws) for item in (*self.items, *extra)]
        layers = [(target.name, target.inputs) for target in self.found]
        of = {"losses": items, "layers": layers, "seed": self.seed, "fisher": self.sweep.objective.fisher}
        before = self.sweep.spool.path(JOURNAL).exists()
        found = Journal.found(self.sweep.spool, of)
        if before and not found.parts:
            self.tell("Factor", 0.0, "all over again: what was done before is of another model, data or loss")
        return found

    def _decomposed(self, target: Target, blind: bool) -> WeightedSVD:
        s = decompose(target, weighting(target, self.calibration, blind=blind), rounds=False)
        return replace(s, left=s.left.float(), right=s.right.float())

    def _corrected(self, part: str, model: nn.Module, spectra: Sequence[WeightedSVD]) -> tuple[WeightedSVD, ...]:
        samples = zip(self.sweep.calls([i for i, _ in self.samples], part), (n for _, n in self.samples), strict=True)
        parts = zip(self.sweep.calls([i for i, _ in self.parts], part), (n for _, n in self.parts), strict=True)
        draws = self.samples[0][0].draws if self.samples else 0
        return corrected_by(model, spectra, samples, draws or 0, parts, self.sweep.objective_of(part, by_turn=True))

    def _rows(self, item: Item) -> float:
        mask = self.sweep.objective.mask(item.batch)
        return float(self.sweep.hidden(item, 0).shape[:-1].numel() if mask is None else mask.sum())


def _shows_samples(target: Target) -> bool:
    return operation_of(target.module).factors == "linear" and not target.tied and not target.table


def _matrix(target: Target) -> tuple[int, int]:
    assert target.block is not None
    m, n = target.block.shape[-2:]
    return m, n


def _sides(target: Target) -> set[int]:
    """The sides of G of a layer."""
    m, n = _matrix(target)
    return {m, n} if target.table and target.tied else {n} if target.table else {m}
