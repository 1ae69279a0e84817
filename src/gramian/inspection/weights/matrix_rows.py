"""Rows of matrices: what a report shows of each, and what is found when all are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gramian.checkpoint.formats import dtype_name
from gramian.inspection.experiments.intended_zeros import untrained_adapter
from gramian.inspection.measurements import Measured
from gramian.inspection.weights.entries import count_non_finite
from gramian.inspection.weights.quick import describe_quickly
from gramian.inspection.weights.spectra import Spectrum, describe
from gramian.report import Layer

__all__ = ["Tell", "add_facts", "add_non_finite", "find_duplicates", "report_row", "spectrum_of"]

Tell = Callable[[str, int, int], None]

# Below this side, a second thread waits at LAPACK's barriers longer than it works.
ONE_THREAD_SIDE = 1024


def spectrum_of(matrix: Tensor, quick: bool) -> Spectrum:
    """The spectrum of a matrix, with all singular values or, where it is `quick`, from a few products."""
    with _threads(min(matrix.shape)):
        return describe_quickly(matrix) if quick else describe(matrix)


@contextmanager
def _threads(side: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if side >= ONE_THREAD_SIDE or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def report_row(
    name: str, kind: str, role: str, spectrum: Spectrum, norm: tuple[float, float, str] | None = None
) -> Layer:
    """Return the report's row for a spectrum; `norm` is a convolution's operator norm, its error bound, and a note."""
    m, n = spectrum.shape
    ranks = [*spectrum.energy_ranks, None, None][:2]
    noise, tail, entries = spectrum.noise, spectrum.tail, spectrum.entries
    notes = [*spectrum.notes, *([noise.note] if noise and noise.note else []), *([norm[2]] if norm else [])]
    return Layer(
        name=name,
        kind=kind,
        shape=(m, n),
        depth=0,
        dtype=spectrum.dtype,
        parameters=m * n,
        singular_values=spectrum.singular_values,
        frobenius_norm=spectrum.frobenius_norm,
        spectral_norm=spectrum.spectral_norm,
        condition=spectrum.condition,
        stable_rank=spectrum.stable_rank,
        effective_rank=spectrum.effective_rank,
        numerical_rank=spectrum.numerical_rank,
        note="; ".join(notes),
        role=role,
        spectral_norm_error=spectrum.spectral_norm_error or None,
        operator_norm=norm[0] if norm else None,
        operator_norm_error=norm[1] if norm else None,
        rank_90=ranks[0],
        rank_99=ranks[1],
        saving_99=max(0.0, 1 - ranks[1][1] * (m + n) / (m * n)) if ranks[1] and m * n else None,
        noise_edge=noise.edge if noise else None,
        above_noise=noise.above if noise else None,
        noise_p_value=noise.p_value if noise else None,
        bulk_distance=noise.bulk_distance if noise else None,
        tail_alpha=tail.alpha if tail else None,
        tail_interval=(tail.low, tail.high) if tail and tail.low is not None and tail.high is not None else None,
        tail_size=tail.size if tail else None,
        tail_note=tail.note if tail else "",
        zeros=entries.num_zeros,
        overflow_float16=entries.overflows.get("float16"),
        underflow_float16=entries.underflows.get("float16"),
        overflow_bfloat16=entries.overflows.get("bfloat16"),
        method=spectrum.method,
    )


def find_duplicates(measured: Measured, tensors: Mapping[str, Callable[[], Tensor]]) -> None:
    """Mark matrices equal to an earlier one: candidates have equal statistics, and are then compared bit by bit."""
    first: dict[tuple[Any, ...], list[str]] = {}
    for i, (layer, spectrum) in enumerate(zip(measured.layers, measured.spectra, strict=True)):
        entries = spectrum.entries
        if not entries.largest or entries.num_nonfinite or entries.num_zeros == layer.parameters:
            continue
        key = (layer.shape, layer.dtype, entries.square_sum, entries.largest, entries.num_zeros)
        for other in first.setdefault(key, []):
            if torch.equal(tensors[layer.name](), tensors[other]()):
                measured.layers[i] = replace(layer, duplicate_of=other)
                break
        else:
            first[key].append(layer.name)


def add_non_finite(measured: Measured, name: str, tensor: Tensor) -> None:
    """Add a row for a tensor without a spectrum that has NaN or infinity; the others are not listed."""
    bad = count_non_finite(tensor)
    if not bad:
        return
    shape = tuple(tensor.shape) or (1,)
    entries = replace(Spectrum((1, 1), "").entries, num_nonfinite=bad)
    measured.spectra.append(Spectrum((shape[0], 1), dtype_name(tensor), entries=entries))
    kind = "vector" if len(shape) < 2 else "tensor"
    measured.layers.append(Layer(name, kind, shape, len(measured.layers), dtype_name(tensor), tensor.numel()))


def add_facts(measured: Measured, quick: bool) -> None:
    """Add what the matrices show together."""
    if untrained := untrained_adapter(measured.layers):
        measured.notes.append(untrained)
    measured.facts["matrices"] = len(measured.layers)
    tested = [spectrum.noise for spectrum in measured.spectra if spectrum.noise is not None]
    if tested:
        above = sum(noise.above > 0 for noise in tested)
        measured.facts["matrices with structure above noise"] = f"{above} of {len(tested)}"
    if quick:
        measured.notes.append(
            "Quick: σ₁ has an error bound, and ranks are intervals; matrices of side 256 and less are exact. "
            "Condition, noise and tails need all singular values: run without --quick."
        )
