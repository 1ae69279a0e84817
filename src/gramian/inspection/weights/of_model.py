"""Measuring the weights of a model block by block, as they are applied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod

from gramian import layers
from gramian.block import Block, blocks
from gramian.checkpoint.formats import is_plain
from gramian.inspection.measurements import Measured
from gramian.inspection.weights.convolution import conv_norm_circular, conv_norms
from gramian.inspection.weights.matrix_rows import (
    Tell,
    add_facts,
    add_non_finite,
    find_duplicates,
    report_row,
    spectrum_of,
)
from gramian.inspection.weights.spectra import Spectrum
from gramian.inspection.weights.vectors import image_directions
from gramian.layers.lookup import is_lazy

__all__ = ["applied", "measure_model"]


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
    copying = (nn.TransformerEncoder, nn.TransformerDecoder)
    prefixes = [f"{name}.layers." for name, module in model.named_modules() if isinstance(module, copying)]
    measured = Measured(copied=tuple(prefix.removeprefix(".") for prefix in prefixes))
    if found:
        measured.dtype = found[0].parameter.dtype
    by_name: dict[str, Callable[[], Tensor]] = {}
    rows: list[tuple[str, Block, str, tuple[int, int], Spectrum]] = []
    for i, block in enumerate(found):
        tell("spectra", i, len(found))
        height, width = image_sizes.get(block.name.rpartition(".")[0], input_size)
        weight, how = applied(block)
        size = (min(height, input_size[0]), min(width, input_size[1]))
        for name, matrix in zip(block.names, block.layout.pieces(weight, block.role == "elementwise"), strict=True):
            rows.append((name, block, how, size, spectrum_of(matrix, quick)))
            by_name[name] = lambda matrix=matrix: matrix
    norms = _norms([(block, size, spectrum) for _, block, _, size, spectrum in rows if len(block.names) == 1])
    for name, block, how, _, spectrum in rows:
        layer = report_row(name, block.kind, block.role, spectrum, norms.get(block.name))
        note = "; ".join(text for text in (how, layer.note) if text)
        measured.layers.append(replace(layer, depth=len(measured.layers), note=note))
        measured.spectra.append(spectrum)
    tell("spectra", len(found), len(found))
    find_duplicates(measured, by_name)
    known = [r for r in rest if not is_lazy(r.parameter)]
    for r in known:
        add_non_finite(measured, r.name, r.parameter.detach())
    still = frozenset(n for n, p in model.named_parameters() if not p.requires_grad)
    measured.frozen = still if len(still) < sum(1 for _ in model.parameters()) else frozenset()
    measured.buffers = frozenset(n for n, _ in model.named_buffers() if "running_" not in n)
    for name, buffer in model.named_buffers():
        if is_plain(buffer):
            add_non_finite(measured, name, buffer)
    for r in rest:
        if r not in known or (r.parameter.ndim > 1 and not r.elementwise):
            measured.notes.append(f"Left out: {r.name}, {r.reason}")
    measured.facts["parameters"] = sum(b.parameter.numel() for b in found) + sum(r.parameter.numel() for r in known)
    add_facts(measured, quick)
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


def _norms(given: Iterable[tuple[Block, tuple[int, int], Spectrum]]) -> dict[str, tuple[float, float, str]]:
    """The operator norms of convolutions that hold one matrix, their errors, and how each was found, by block.

    Those of one shape and input size are found together.
    """
    found: dict[str, tuple[float, float, str]] = {}
    alike: dict[tuple[Any, ...], list[Block]] = {}
    for block, size, spectrum in given:
        module: Any = block.module
        kernel = block.parameter.detach()
        own = getattr(module, "weight", None) is block.parameter
        if not own or kernel.ndim != 4 or layers.layer_of(module).operation != "convolution" or spectrum.num_nonfinite:
            continue
        if module.kernel_size == (1, 1) and module.padding in ((0, 0), "same", "valid") and spectrum.spectral_norm:
            told = "operator norm of a 1×1 kernel, that of its matrix"
            found[block.name] = spectrum.spectral_norm, spectrum.spectral_norm_error, told
            continue
        plain = module.stride == (1, 1) and module.dilation == (1, 1) and module.groups == 1
        if module.padding_mode == "circular" and plain and min(size) >= max(module.kernel_size):
            told = f"operator norm at {size[0]}×{size[1]}, circular padding (FFT)"
            found[block.name] = conv_norm_circular(kernel, size), 0.0, told
            continue
        padding = (
            "zero padding" if module.padding_mode == "zeros" else f"zero padding in place of {module.padding_mode}"
        )
        told = f"operator norm at {size[0]}×{size[1]}, stride {module.stride[0]}, {padding} {module.padding}"
        options = module.stride, module.padding, module.dilation, module.groups
        alike.setdefault((kernel.shape, kernel.device, size, *options, told), []).append(block)
    for (_, _, size, stride, padding, dilation, groups, told), same in alike.items():
        kernels = [block.parameter.detach() for block in same]
        values = conv_norms(kernels, size, stride=stride, padding=padding, dilation=dilation, groups=groups)
        found |= {block.name: (*value, told) for block, value in zip(same, values, strict=True)}
    return found
