"""Measuring weights: a file tensor by tensor, or a model block by block, alone or shared out over ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod

from gramian import layers, placement
from gramian.block import Block, blocks
from gramian.checkpoint import Checkpoint, open_checkpoint
from gramian.checkpoint.formats import dtype_name, is_plain
from gramian.errors import some
from gramian.inspection.auxiliary import AUXILIARY
from gramian.inspection.by_design import PRODUCT, untrained_adapter
from gramian.inspection.convolution import conv_norm, conv_norm_circular
from gramian.inspection.entries import Entries, count_non_finite
from gramian.inspection.matrices import Holding, find_holdings, read_config
from gramian.inspection.measured import Measured
from gramian.inspection.noise import Noise
from gramian.inspection.quick import describe_quickly
from gramian.inspection.spectra import Spectrum, describe
from gramian.inspection.tail import Tail
from gramian.inspection.vectors import image_directions, image_side, read_tokens, token_directions
from gramian.layers.lookup import is_lazy
from gramian.report import Layer

__all__ = ["applied", "measure_file", "measure_model", "report_row"]

Tell = Callable[[str, int, int], None]
Rows = list[tuple[Layer, Spectrum]]

# Below this side, a second thread waits at LAPACK's barriers longer than it works.
ONE_THREAD_SIDE = 1024


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
    _find_duplicates(measured, _tensors_of(checkpoint, holdings))
    held = {holding.entry.name for holding in holdings}
    for name, entry in checkpoint.entries.items():
        if name not in held and not entry.tied_to and not entry.made:
            _add_non_finite(measured, name, checkpoint.load(name))
    for name, load in checkpoint.beside.items():
        _add_non_finite(measured, name, load())
    for reason, names in left_out.items():
        measured.notes.append(f"Left out, {reason}: {some(names, 5)}")
    roles = {holding.role for holding in holdings}
    if roles >= {"embedding"} and "head" not in roles and read_config(checkpoint.path).get("tie_word_embeddings"):
        measured.notes.append("The head is the embedding: tie_word_embeddings in config.json, and none in the file")
    others = {name for reason, names in left_out.items() if reason in AUXILIARY for name in names}
    own = [e for e in checkpoint.entries.values() if not e.tied_to and not e.part_of and e.kind == "float"]
    measured.facts["parameters"] = sum(torch.Size(e.shape).numel() for e in own if e.name not in others)
    _add_facts(measured, quick)
    _add_directions(measured, checkpoint, holdings)
    return measured


def measure_model(
    model: nn.Module,
    tell: Tell,
    *,
    quick: bool = False,
    layouts: Mapping[str, Any] | None = None,
    input_size: tuple[int, int] = (32, 32),
    image_sizes: Mapping[str, tuple[int, int]] | None = None,
) -> Measured:
    """Measure the blocks of a model; convolutions at the sizes of their inputs where these are known and smaller."""
    image_sizes = image_sizes or {}
    found, rest = blocks(model, layouts)
    measured = Measured()
    if found:
        measured.dtype = found[0].parameter.dtype
    by_name: dict[str, Callable[[], Tensor]] = {}
    for i, block in enumerate(found):
        tell("spectra", i, len(found))
        height, width = image_sizes.get(block.name.rpartition(".")[0], input_size)
        weight, how = applied(block)
        for name, matrix in zip(block.names, block.layout.pieces(weight, block.role == "elementwise"), strict=True):
            spectrum = _describe(matrix, quick)
            norm = None
            if len(block.names) == 1:
                norm = _norm_of_module(block, (min(height, input_size[0]), min(width, input_size[1])), spectrum)
            layer = report_row(name, block.kind, block.role, spectrum, norm)
            note = "; ".join(text for text in (how, layer.note) if text)
            measured.layers.append(replace(layer, depth=len(measured.layers), note=note))
            measured.spectra.append(spectrum)
            by_name[name] = lambda matrix=matrix: matrix
    tell("spectra", len(found), len(found))
    _find_duplicates(measured, by_name)
    known = [r for r in rest if not is_lazy(r.parameter)]
    for r in known:
        _add_non_finite(measured, r.name, r.parameter.detach())
    for name, buffer in model.named_buffers():
        if is_plain(buffer):
            _add_non_finite(measured, name, buffer)
    for r in rest:
        if r not in known or (r.parameter.ndim > 1 and not r.elementwise):
            measured.notes.append(f"Left out: {r.name}, {r.reason}")
    measured.facts["parameters"] = sum(b.parameter.numel() for b in found) + sum(r.parameter.numel() for r in known)
    _add_facts(measured, quick)
    first = measured.layers[0] if measured.layers else None
    if first is not None and first.kind == "Linear":
        measured.directions = image_directions(first.name, by_name[first.name]())
    return measured


@torch.no_grad()
def applied(block: Block) -> tuple[Tensor, str]:
    """The weight that a block's module applies, of the parameter's shape, and what makes it of the parameter.

    That is the parameter itself, unless it is parametrized (weight norm, spectral norm) or pruned. In
    evaluation mode, in which making it changes no buffer.
    """
    module, parameter = block.module, block.parameter.detach()
    local = block.name.rpartition(".")[2]
    made: Tensor | None = None
    how = ""
    if isinstance(module, ParametrizationList):
        modes = [(part, part.training) for part in module.modules()]
        module.eval()
        try:
            made = module()
        finally:
            for part, mode in modes:
                part.training = mode
        how = " and ".join(type(part).__name__.strip("_") for part in module)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and local == f"{hook._tensor_name}_orig":
            made, how = hook.apply_mask(module), "pruning"
        # torch.nn.utils.weight_norm and spectral_norm, the older ones
        elif local in (f"{getattr(hook, 'name', '')}_v", f"{getattr(hook, 'name', '')}_orig"):
            power = {"do_power_iteration": False} if local.endswith("_orig") else {}
            made, how = hook.compute_weight(module, **power), type(hook).__name__  # type: ignore[attr-defined]
    if made is None:
        return parameter, ""
    if made.shape != parameter.shape:
        shape = tuple(made.shape)
        return parameter, f"shown as stored, not as applied: the weight that {how} makes of it has the shape {shape}"
    return made.detach(), f"the weight that {how} makes of it"


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
        spectrum = _describe(matrix, quick)
        row = report_row(name, PRODUCT if made and made.low_rank else holding.kind, holding.role, spectrum, norm)
        found.append((replace(row, note="; ".join([*about, *([row.note] if row.note else [])])), spectrum))
    return found


def _norm_of_module(block: Block, size: tuple[int, int], spectrum: Spectrum) -> tuple[float, float, str] | None:
    """Return the operator norm of a convolution that holds one matrix, its error, and how it was found."""
    module: Any = block.module
    kernel = block.parameter.detach()
    own = getattr(module, "weight", None) is block.parameter
    if not own or kernel.ndim != 4 or layers.layer_of(module).operation != "convolution":
        return None
    if not bool(kernel.isfinite().all()):
        return None
    where = f"operator norm at {size[0]}×{size[1]}"
    if module.kernel_size == (1, 1) and module.padding in ((0, 0), "same", "valid") and spectrum.spectral_norm:
        return spectrum.spectral_norm, spectrum.spectral_norm_error, "operator norm of a 1×1 kernel, that of its matrix"
    plain = module.stride == (1, 1) and module.dilation == (1, 1) and module.groups == 1
    if module.padding_mode == "circular" and plain and min(size) >= max(module.kernel_size):
        return conv_norm_circular(kernel, size), 0.0, f"{where}, circular padding (FFT)"
    value, error = conv_norm(
        kernel, size, stride=module.stride, padding=module.padding, dilation=module.dilation, groups=module.groups
    )
    padding = "zero padding" if module.padding_mode == "zeros" else f"zero padding in place of {module.padding_mode}"
    return value, error, f"{where}, stride {module.stride[0]}, {padding} {module.padding}"


def _describe(matrix: Tensor, quick: bool) -> Spectrum:
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


def _tensors_of(checkpoint: Checkpoint, holdings: list[Holding]) -> dict[str, Callable[[], Tensor]]:
    def loader(holding: Holding, k: int) -> Callable[[], Tensor]:
        return lambda: list(holding.split(checkpoint.load(holding.entry.name)))[k]

    return {name: loader(holding, k) for holding in holdings for k, name in enumerate(holding.names)}


def _find_duplicates(measured: Measured, tensors: Mapping[str, Callable[[], Tensor]]) -> None:
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


def _add_non_finite(measured: Measured, name: str, tensor: Tensor) -> None:
    """Add a row for a tensor without a spectrum that has NaN or infinity; the others are not listed."""
    bad = count_non_finite(tensor)
    if not bad:
        return
    shape = tuple(tensor.shape) or (1,)
    entries = replace(Spectrum((1, 1), "").entries, num_nonfinite=bad)
    measured.spectra.append(Spectrum((shape[0], 1), dtype_name(tensor), entries=entries))
    kind = "vector" if len(shape) < 2 else "tensor"
    measured.layers.append(Layer(name, kind, shape, len(measured.layers), dtype_name(tensor), tensor.numel()))


def _add_facts(measured: Measured, quick: bool) -> None:
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
