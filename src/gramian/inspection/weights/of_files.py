"""Measuring the weights in a file tensor by tensor, alone or shared out over ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from gramian import placement
from gramian.checkpoint import Checkpoint, open_checkpoint
from gramian.errors import some
from gramian.inspection.experiments.intended_zeros import PRODUCT
from gramian.inspection.measurements import Measured
from gramian.inspection.weights.auxiliary import AUXILIARY
from gramian.inspection.weights.convolution import conv_norm
from gramian.inspection.weights.entries import Entries
from gramian.inspection.weights.matrices import Holding, find_holdings, read_config
from gramian.inspection.weights.matrix_rows import (
    Tell,
    add_facts,
    add_non_finite,
    find_duplicates,
    report_row,
    spectrum_of,
)
from gramian.inspection.weights.noise import Noise
from gramian.inspection.weights.spectra import Spectrum
from gramian.inspection.weights.tail import Tail
from gramian.inspection.weights.vectors import image_directions, image_side, read_tokens, token_directions
from gramian.report import Layer

__all__ = ["measure_file"]

Rows = list[tuple[Layer, Spectrum]]


def measure_file(
    path: str | os.PathLike[str],
    tell: Tell,
    *,
    quick: bool = False,
    layouts: Mapping[str, Any] | None = None,
    input_size: tuple[int, int] = (32, 32),
) -> Measured:
    """Measure a checkpoint's matrices one tensor at a time; under torch.distributed, each rank its share by cost."""
    checkpoint = open_checkpoint(path)
    holdings, left_out = find_holdings(checkpoint, layouts)
    mine = placement.share_out([_cost(holding, quick) for holding in holdings])
    rows: dict[int, Rows] = {}
    for done, place in enumerate(mine):
        tell("spectra", done, len(mine))
        rows[place] = _measure_holding(checkpoint, holdings[place], quick, input_size)
    tell("spectra", len(mine), len(mine))
    measured = Measured(notes=list(checkpoint.notes))
    for _, found in sorted(_gather(rows).items()):
        for layer, spectrum in found:
            measured.layers.append(replace(layer, depth=len(measured.layers)))
            measured.spectra.append(spectrum)
    find_duplicates(measured, _tensors_of(checkpoint, holdings))
    held = {holding.entry.name for holding in holdings}
    for name, entry in checkpoint.entries.items():
        if name not in held and not entry.tied_to and not entry.made:
            add_non_finite(measured, name, checkpoint.load(name))
    for name, load in checkpoint.beside.items():
        add_non_finite(measured, name, load())
    for reason, names in left_out.items():
        measured.notes.append(f"Left out, {reason}: {some(names, 5)}")
    roles = {holding.role for holding in holdings}
    if roles >= {"embedding"} and "head" not in roles and read_config(checkpoint.path).get("tie_word_embeddings"):
        measured.notes.append("The head is the embedding: tie_word_embeddings in config.json, and none in the file")
    others = {name for reason, names in left_out.items() if reason in AUXILIARY for name in names}
    own = [e for e in checkpoint.entries.values() if not e.tied_to and not e.part_of and e.kind == "float"]
    measured.facts["parameters"] = sum(torch.Size(e.shape).numel() for e in own if e.name not in others)
    add_facts(measured, quick)
    _add_directions(measured, checkpoint, holdings)
    return measured


def _gather(rows: dict[int, Rows]) -> dict[int, Rows]:
    """The rows of all ranks, by the index of their holding."""
    if not placement.is_distributed():
        return rows
    own = [[index, [[asdict(layer), asdict(spectrum)] for layer, spectrum in found]] for index, found in rows.items()]
    return {
        index: [(Layer(**_tuples(layer)), _spectrum(_tuples(spectrum))) for layer, spectrum in found]
        for part in placement.exchange_json(own)
        for index, found in part
    }


def _spectrum(fields: dict[str, Any]) -> Spectrum:
    """A spectrum from its fields, of which some are records themselves."""
    fields["entries"] = Entries(**fields["entries"])
    fields["noise"] = None if fields["noise"] is None else Noise(**fields["noise"])
    fields["tail"] = None if fields["tail"] is None else Tail(**fields["tail"])
    return Spectrum(**fields)


def _tuples(value: Any) -> Any:
    """The value with tuples for lists: every sequence in a layer or spectrum is a tuple, which JSON has not."""
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value


def _cost(holding: Holding, quick: bool) -> float:
    """Return operations: products with a block, or a Gram matrix and its eigenvalues at a sixth of the rate."""
    total = 0.0
    for m, n in holding.shapes:
        small, large = min(m, n), max(m, n)
        total += 800.0 * m * n if quick else large * small**2 + 8.0 * small**3
    return total


def _measure_holding(checkpoint: Checkpoint, holding: Holding, quick: bool, input_size: tuple[int, int]) -> Rows:
    tensor = checkpoint.load(holding.entry.name)
    norm = None
    if holding.kernel and bool(tensor.isfinite().all()):
        size = (max(input_size[0], tensor.shape[2]), max(input_size[1], tensor.shape[3]))
        norm = (*conv_norm(tensor, size), f"operator norm at {size[0]}×{size[1]}, stride 1, zero padding 'same'")
    made = holding.entry.made
    about = [text for text in (made.how if made else "", holding.note) if text]
    found = []
    for name, matrix in zip(holding.names, holding.split(tensor), strict=True):
        spectrum = spectrum_of(matrix, quick)
        row = report_row(name, PRODUCT if made and made.low_rank else holding.kind, holding.role, spectrum, norm)
        found.append((replace(row, note="; ".join([*about, *([row.note] if row.note else [])])), spectrum))
    return found


def _tensors_of(checkpoint: Checkpoint, holdings: list[Holding]) -> dict[str, Callable[[], Tensor]]:
    def loader(holding: Holding, k: int) -> Callable[[], Tensor]:
        return lambda: list(holding.split(checkpoint.load(holding.entry.name)))[k]

    return {name: loader(holding, k) for holding in holdings for k, name in enumerate(holding.names)}


def _add_directions(measured: Measured, checkpoint: Checkpoint, holdings: list[Holding]) -> None:
    """Add the first matrix's leading singular vectors: as tokens for an embedding, as images for a first layer."""
    if not holdings or len(holdings[0].shapes) != 1 or holdings[0].kernel:
        return
    first = holdings[0]
    if first.role == "embedding":
        tokens = read_tokens(checkpoint.path)
        if tokens and first.shapes[0][0] >= first.shapes[0][1]:
            matrix = next(first.split(checkpoint.load(first.entry.name)))
            measured.directions = token_directions(first.names[0], matrix, tokens)
    elif image_side(first.shapes[0][1]) is not None:
        matrix = next(first.split(checkpoint.load(first.entry.name)))
        measured.directions = image_directions(first.names[0], matrix)
