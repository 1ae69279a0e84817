"""A plan: what each layer becomes, at one budget for the whole model."""

from __future__ import annotations

import html
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from torch import nn

from gramian.compression.budget.filling import fill, uniform
from gramian.compression.budget.mixing import Choices, Form, choices, loss_of, mix, possible, size_of
from gramian.compression.budget.points import Point
from gramian.compression.budget.predicting import Predicted, Rises
from gramian.compression.budget.weighted import WeightedSVD
from gramian.compression.choosing.measuring import num_bytes
from gramian.compression.layers.building import built, tied
from gramian.compression.layers.lowrank import LowRank, matrix_of
from gramian.compression.layers.modules import copied, replaced, submodule
from gramian.compression.layers.opening import close_
from gramian.compression.layers.pruning import expected_cost, pattern_of, shares_of_zeros
from gramian.compression.layers.rounding import BITS, GROUP
from gramian.compression.storage.files import pretrained_support
from gramian.errors import InputError, some
from gramian.misuse import known_names
from gramian.report.figures import figures_by_layer
from gramian.rows import Rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SMALLEST", "Plan"]

SMALLEST = "is the smallest possible share"
"""Of a note that holds for one share alone."""


def check_budget(keep: float | None, size: float | None, bits: int | None, sparsity: float | str | None) -> None:
    """Raises `InputError` for a number that no plan can have; before a calibration, so that nobody waits for it."""
    for name, share in (("keep", keep), ("size", size)):
        if share is not None and (not isinstance(share, (int, float)) or not 0 < share <= 1):
            raise InputError(f"compress: {name} must be a share in (0, 1], got {share!r}")
    if bits is not None and bits not in BITS:
        raise InputError(f"compress: bits must be from {BITS[0]} to {BITS[-1]}, got {bits!r}")
    if isinstance(sparsity, str):
        pattern_of(sparsity)
    elif sparsity is not None and not 0 < sparsity < 1:
        raise InputError(f"compress: sparsity must be a share in (0, 1), or a pattern as '2:4', got {sparsity!r}")


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """What each layer becomes: two factors, integers of few bits, zeros among its weights, or what it was.

    `plan.at(…)` gives a plan for another budget without new decompositions; `plan.apply()` gives the smaller model. A
    plan has a copy of the model, so that training the model on does not change it.

    Args:
        model: a copy of the model as it came.
        spectra: the weighted singular value decomposition of each layer that can be factored.
        keep: share of the parameters counted by `of`, before rounding; where none was asked for, one half, or the
            smallest possible.
        forms: by layer (the module's name), what it becomes.
        reasons: by layer, why it stays as it is in any plan.
        of: what shares are of: "all" parameters or bytes, or those of the "factorable" layers' weights.
        notes: what a person has to know of the calibration and of the share, in sentences.
        ranked: whether the statistics tell which layers matter; if not, each loses the same share.
        rises: where the rise of the loss is measured.
    """

    model: nn.Module
    spectra: tuple[WeightedSVD, ...]
    keep: float
    forms: dict[str, Form]
    reasons: dict[str, str]
    of: Literal["all", "factorable"] = "all"
    notes: tuple[str, ...] = ()
    ranked: bool = True
    rises: Rises = field(default_factory=Rises)

    def __str__(self) -> str:
        forms = self.forms.values()
        if all(form == Form(form.rank) for form in forms):
            factored = sum(form.rank is not None for form in forms)
            what = f"{self.parameters:,} of {self.parameters_dense:,} parameters, {factored} layers factored"
            text = f"keep = {self.keep:.3f}{'' if self.of == 'all' else ' of the factorable ones'}: {what}"
        else:
            kinds = Counter(str(form._replace(rank=form.rank and 0)).replace("rank 0", "low rank") for form in forms)
            what = ", ".join(f"{num} × {kind}" for kind, num in kinds.most_common())
            text = f"{self.bytes:,} of {self.bytes_dense:,} bytes, layers: {what}"
        return f"{text} ({'; '.join(self.notes)})" if self.notes else text

    def __repr__(self) -> str:
        return f"Plan({self})"  # the matrices of all layers would fill pages

    @property
    def ranks(self) -> dict[str, int | None]:
        """By layer, a rank, or `None` where it is not factored."""
        return {name: form.rank for name, form in self.forms.items()}

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{self.explain()._repr_html_()}"

    def explain(self) -> Rows:
        """One row for each layer with a matrix: its name, shape, form, share of parameters kept, loss, and the reason.

        The loss is the second-order estimate of the layer's part of the rise. The reason says why a layer stays as it
        is, or that the diagonal alone of a wide side is known.
        """
        rows = []
        for s in self.spectra:
            form = self.forms[s.name]
            kept = 1.0 if form.rank is None else form.rank * sum(s.shape) / s.dense
            why = "worth its parameters" if form == Form() else ""
            remarks = [f"{side} weighted by their diagonal alone" for side in s.diagonal]
            remarks += [f"{s.unseen:,} of its {s.shape[0]:,} rows were never looked up"] if s.unseen else []
            remarks += [f"shared with {', '.join(s.tied)}, so factored or dense"] if s.tied else []
            why = "; ".join(filter(None, [why, *remarks]))
            told = {"name": s.name, "shape": s.shape, "rank": form.rank, "form": str(form), "kept": kept}
            rows.append({**told, "loss": self._loss(s), "reason": why})
        dense = {"shape": None, "rank": None, "form": str(Form()), "kept": 1.0, "loss": 0.0}
        return Rows(rows + [{"name": name, **dense, "reason": reason} for name, reason in self.reasons.items()])

    def figures(self) -> dict[str, Figure]:
        """Return pictures by layer as matplotlib's figures, by title, to change or to save (`figure.savefig`)."""
        rows = [row for row in self.explain() if row["shape"] is not None]
        return figures_by_layer(
            "Plan",
            str(self),
            [row["name"] for row in rows],
            Share_kept=[row["kept"] for row in rows],
            Part_of_the_estimated_rise_of_the_loss=[row["loss"] for row in rows],
        )

    @cached_property
    def parameters_dense(self) -> int:
        """Parameters of the model as it came."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def parameters_factorable(self) -> int:
        """Parameters of the weights that can be factored."""
        return sum(s.dense for s in self.spectra)

    @property
    def parameters(self) -> int:
        """Numbers that the model of `apply()` has in place of parameters, in floats or in few bits, zeros included."""
        saved = 0
        for s in self.spectra:
            rank = self.forms[s.name].rank
            saved += 0 if rank is None else s.dense - rank * sum(s.shape)
        return self.parameters_dense - saved

    @cached_property
    def bytes_dense(self) -> int:
        """Bytes of the model's parameters and buffers as it came."""
        return num_bytes(self.model)

    @property
    def bytes(self) -> int:
        """Bytes of the parameters and buffers of the model that `apply()` gives."""
        sizes = self._itemsizes
        saved = sum(sizes[s.name] * s.dense - size_of(s, self.forms[s.name], sizes[s.name]) for s in self.spectra)
        return self.bytes_dense - saved

    @cached_property
    def _itemsizes(self) -> dict[str, int]:
        """Bytes of a number of each layer's weight."""
        return {s.name: next(submodule(self.model, s.name).parameters()).element_size() for s in self.spectra}

    @property
    def predicted_loss(self) -> float:
        """The rise of the mean loss to second order: `½ Σ σ²` of what is cut, and what rounding is expected to cost.

        It leaves out how the errors of layers add up, and is often several times too low; see `predicted`.
        """
        return float(sum(map(self._loss, self.spectra)))

    def _loss(self, s: WeightedSVD) -> float:
        form = self.forms[s.name]
        if form.zeros is None:
            return loss_of(s, form)
        return expected_cost(matrix_of(submodule(self.model, s.name)), form.zeros, s.feedback)

    @property
    def predicted(self) -> Predicted:
        """The rise of the mean loss that is expected, with an interval, from the points where it is measured.

        The first time it takes some evaluations of smaller models, those of cut ranks or those of rounded weights; a
        plan that costs more than all of these, or has zeros, or factors of integers, takes one of its own.
        """
        cut = any(form.rank is not None for form in self.forms.values())
        # What cut ranks or rounded weights of the same estimate cost tells little of zeros: once a two-hundredth.
        is_own = any(f.zeros is not None or (f.rank is not None and f.bits is not None) for f in self.forms.values())
        return self.rises.at(self, cut, is_own=is_own)

    @property
    def points(self) -> tuple[Point, ...]:
        """Where the rise of the loss was measured: with ranks cut, and with weights rounded."""
        return self.rises.of(self, True) + self.rises.of(self, False)

    def settled(self) -> Plan:
        """The same with all measured that is measured only when it is asked for."""
        return replace(self, spectra=tuple(s.settled() for s in self.spectra), rises=self.rises.settled(self))

    @known_names("Plan.at", share="keep", budget="keep")
    def at(
        self,
        keep: float | None = None,
        *,
        size: float | None = None,
        bits: int | None = None,
        sparsity: float | str | None = None,
        group: int = GROUP,
        of: Literal["all", "factorable"] | None = None,
    ) -> Plan:
        """The plan at another budget: a share of the parameters or bytes, a number of bits, or a share of zeros.

        Args:
            keep: share of the parameters, `0 < keep ≤ 1`. The singular values of all layers stand in one list, by `σ²`
                for each parameter that they cost, and are taken from the top until the budget is spent. Every layer
                keeps at least rank 1, and goes from the rank where that is worth it straight to dense.
            size: share of the bytes, `0 < size ≤ 1`. Each layer takes what costs least loss for its bytes: a rank, in
                floats or in 8 bits, integers of 2 to 8 bits, or what it was.
            bits: alone, each layer has integers of so many bits, 2 to 8; with `keep`, the factors have them too. Eight
                bits have one scale for each row, fewer bits one for each `group` columns.
            sparsity: the share of weights that become zero, chosen over all layers at once, or a pattern that each row
                has, `"2:4"`. Zeros are stored like other numbers: they save nothing until a sparse kernel uses them.
            group: columns that share a scale.
            of: what the share is of, as in `compress`; by default as this plan has it.

        Raises:
            InputError: none of these is asked for, or two that exclude each other; a value is out of range, or below
                what is possible.
        """
        of = of or self.of
        if of not in ("all", "factorable"):
            raise InputError(f"compress: of must be 'all' or 'factorable', got {of!r}")
        asked = {"keep": keep, "size": size, "sparsity": sparsity, "bits": bits}
        names = [name for name, value in asked.items() if value is not None]
        if names not in (["keep"], ["size"], ["sparsity"], ["bits"], ["keep", "bits"]):
            raise InputError(
                "compress: give one of keep, size, bits and sparsity, or keep with bits; "
                f"got {' and '.join(names) or 'none'}"
            )
        check_budget(keep, size, bits, sparsity)
        if not isinstance(group, int) or group < 8:
            raise InputError(f"compress: group must be a number of columns, at least 8, got {group!r}")
        if size is not None:
            forms = self._by_size(size, of)
        elif sparsity is not None:
            forms = self._by_zeros(sparsity)
        else:
            ranks = self._by_keep(1.0 if keep is None else keep, of)
            forms = {name: Form(rank, bits, group if bits else GROUP) for name, rank in ranks.items()}
        forms = {s.name: possible(s, forms[s.name]) for s in self.spectra}
        notes = tuple(note for note in self.notes if SMALLEST not in note)
        return replace(self, keep=1.0 if keep is None else keep, of=of, forms=forms, notes=notes)

    def _by_keep(self, keep: float, of: str) -> dict[str, int | None]:
        if keep == 1 and of == "all":
            return {s.name: None for s in self.spectra}
        total, fixed = self._counted(of)
        least = sum(sum(s.shape) for s in self.spectra) + fixed
        if least > keep * total:
            raise InputError(
                f"compress: keep={keep} of {total:,} parameters is {int(keep * total):,}, but rank 1 everywhere needs "
                f"{least:,}{self.left_dense()}; the smallest possible keep is {least / total:.3f}"
            )
        layers = [s.candidates for s in self.spectra]
        budget = int(keep * total) - fixed
        ranks = fill(layers, budget) if self.ranked else uniform(layers, budget)
        return {s.name: rank for s, rank in zip(self.spectra, ranks, strict=True)}

    def _sizes(self, of: str) -> tuple[int, int, list[list[Form]]]:
        """The bytes that a share is of, those that stay in any case, and forms of all layers that use few bytes."""
        inside = sum(s.dense * self._itemsizes[s.name] for s in self.spectra)
        total, fixed = (inside, 0) if of == "factorable" else (self.bytes_dense, self.bytes_dense - inside)
        candidates = [[possible(s, form) for s in self.spectra] for form in (*(Form(bits=b) for b in BITS), Form())]
        if self.ranked:
            candidates.append([layer.forms[0] for layer in self._choices])
        return total, fixed, candidates

    @cached_property
    def _choices(self) -> list[Choices]:
        return [choices(s, self._itemsizes[s.name]) for s in self.spectra]

    def _by_size(self, size: float, of: str) -> dict[str, Form]:
        total, fixed, candidates = self._sizes(of)
        budget = int(size * total + 1e-6) - fixed
        candidates += [mix(self._choices, budget)] if self.ranked else []
        spent = [sum(map(self._size, self.spectra, forms)) for forms in candidates]
        fitting = [forms for forms, one in zip(candidates, spent, strict=True) if one <= budget]
        least = fixed + min(spent)
        if not fitting:
            raise InputError(
                f"compress: size={size} of {total:,} bytes is {int(size * total):,}, but the smallest possible is "
                f"{least:,}{self.left_dense()}; the smallest possible size is {least / total:.3f}"
            )
        best = min(reversed(fitting), key=lambda forms: sum(map(loss_of, self.spectra, forms)))
        return {s.name: form for s, form in zip(self.spectra, best, strict=True)}

    def _size(self, s: WeightedSVD, form: Form) -> int:
        return size_of(s, form, self._itemsizes[s.name])

    def _by_zeros(self, sparsity: float | str) -> dict[str, Form]:
        layers = {s.name: submodule(self.model, s.name) for s in self.spectra}
        whole = [s for s in self.spectra if not isinstance(layers[s.name], LowRank) and not s.tied]
        if not whole:
            raise InputError("compress: sparsity needs a dense layer that is not tied; give keep, size or bits")
        if isinstance(sparsity, str):
            shares: list[float | str] = [str(pattern_of(sparsity))] * len(whole)
        elif self.ranked:
            shares = [*shares_of_zeros([(matrix_of(layers[s.name]), s.feedback) for s in whole], sparsity)]
        else:
            shares = [sparsity] * len(whole)
        found = {s.name: Form(zeros=share) for s, share in zip(whole, shares, strict=True)}
        return {s.name: found.get(s.name, Form()) for s in self.spectra}

    @property
    def smallest(self) -> float:
        """The smallest possible share of the parameters: rank 1 everywhere."""
        total, fixed = self._counted(self.of)
        return _share(sum(sum(s.shape) for s in self.spectra) + fixed, total)

    @property
    def smallest_size(self) -> float:
        """The smallest possible share of the bytes."""
        total, fixed, candidates = self._sizes(self.of)
        return _share(min(sum(map(self._size, self.spectra, forms)) for forms in candidates) + fixed, total)

    def _counted(self, of: str) -> tuple[int, int]:
        """The parameters that a share is of, and how many of those stay in any case."""
        if of == "factorable":
            return self.parameters_factorable, 0
        return self.parameters_dense, self.parameters_dense - self.parameters_factorable

    def left_dense(self) -> str:
        """The layers that stay as they are, the first few, for an error."""
        shown = some((f"{name} ({why})" for name, why in self.reasons.items()), separator="; ")
        return f" (not factored: {shown})" if shown else ""

    def apply(self) -> nn.Module:
        """A copy of the model with the planned layers in their forms. The plan, and the model it was made of, stay."""
        model = copied(self.model)
        for s in self.spectra:
            if self.forms[s.name] != Form():
                layer = submodule(model, s.name)
                made = built(layer, s, self.forms[s.name])
                model = replaced(model, s.name, made)
                for name in s.tied:
                    model = replaced(model, name, tied(submodule(model, name), made))
        close_(model)
        support = pretrained_support()
        if support is not None:
            support.attach(model)
        return model


def _share(least: int, total: int) -> float:
    """A share whose budget is not below the least by rounding."""
    return min(1.0, math.nextafter(least / total, 1.0))
