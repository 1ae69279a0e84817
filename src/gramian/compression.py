"""Compression by factorization: every layer's two-sided spectrum in one list, one global budget of parameters."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import skip_init

from gramian.block import Block, blocks
from gramian.checkpoint import clean_name, load_tensors, save_tensors
from gramian.errors import CheckpointError, InputError
from gramian.gram import Gram
from gramian.layers import layout_of, operation_of, runs_as_its_class
from gramian.objective import Objective
from gramian.recording import capture
from gramian.statistics import Site, Sites, Statistics

__all__ = ["LowRank", "Plan", "compress", "load_compressed", "save_compressed"]

# Relative damping of A and G, as a share of their mean eigenvalue. Both are singular as a rule (dead inputs, two
# classes): without it the inverse roots do not exist; with more, directions that matter little would weigh in.
DAMPING = 1e-6

RANKS = "gramian.ranks"


class LowRank(nn.Sequential):
    """A linear layer or a convolution as two of rank `rank`: `W ≈ L R`, the first without a bias.

    Args:
        layer: the dense layer, with a row in the table of layers whose operation has factors. Its options are kept;
            its values are not copied, see `set_`.
        rank: columns of L and rows of R.

    Raises: nothing of its own.
    Cost: memory for two uninitialized layers; nothing is drawn from a random generator.
    Source: the definition.

    >>> low = LowRank(nn.Linear(9, 6), 2)
    >>> low.rank, tuple(low.weight.shape)
    (2, (6, 9))
    """

    def __init__(self, layer: nn.Module, rank: int) -> None:
        layout = layout_of(layer)
        assert layout is not None
        super().__init__(*FACTORS[operation_of(layer).factors](layer, rank, layout.matrices))
        self._layout = layout
        weight = layer.get_parameter("weight")
        self.train(layer.training).requires_grad_(weight.requires_grad)

    @property
    def rank(self) -> int:
        """The number of columns of L and rows of R."""
        return self.get_parameter("1.weight").shape[1]

    @property
    def weight(self) -> Tensor:
        """`L R` in the shape of the layer's own weight, for code that reads a layer's weight (torch's encoder does)."""
        left, right = self.get_parameter("1.weight"), self.get_parameter("0.weight")
        return self._layout.join(left.flatten(1) @ right.flatten(1))

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias."""
        return dict(self.named_parameters()).get("1.bias")

    @torch.no_grad()
    def set_(self, left: Tensor, right: Tensor, bias: Tensor | None) -> None:
        """Copies the factors and the bias in.

        Args:
            left: L, `(m, rank)`.
            right: R, `(rank, n)`.
            bias: `(m,)`, or `None`.
        """
        values = {"0.weight": right, "1.weight": left} | ({} if bias is None else {"1.bias": bias})
        for name, value in values.items():
            parameter = self.get_parameter(name)
            parameter.copy_(value.reshape(parameter.shape))


def _linear(layer: nn.Module, rank: int, shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    (m, n), kind = shape, _kind_of(layer)
    # Uninitialized, so that nothing is drawn from the global generator.
    return skip_init(nn.Linear, n, rank, bias=False, **kind), skip_init(nn.Linear, rank, m, **_with_bias(layer, kind))


def _convolution(layer: Any, rank: int, shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """A convolution to `rank` channels with the layer's own kernel, and one by a kernel of size one."""
    conv, kind = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[layer.weight.ndim], _kind_of(layer)
    options = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    first = skip_init(conv, layer.in_channels, rank, layer.kernel_size, bias=False, **options, **kind)
    return first, skip_init(conv, rank, layer.out_channels, 1, **_with_bias(layer, kind))


def _kind_of(layer: nn.Module) -> dict[str, Any]:
    weight = layer.get_parameter("weight")
    return {"device": weight.device, "dtype": weight.dtype}


def _with_bias(layer: nn.Module, kind: dict[str, Any]) -> dict[str, Any]:
    return kind | {"bias": layer.bias is not None}


FACTORS: dict[str, Callable[[Any, int, tuple[int, ...]], tuple[nn.Module, nn.Module]]] = {
    "linear": _linear,
    "convolution": _convolution,
}
"""The two layers of a rank that replace a dense one of shape (m, n), by the `factors` of its operation."""


@dataclass(frozen=True, eq=False)
class WeightedSVD:
    """One layer's weighted SVD: `G^½ W A^½ = U S Vᵀ`, and the factors of W.

    W is the layer's whole matrix (m, n), its rows in the order of the outputs; fused projections are factored together.
    """

    block: Block
    values: Tensor  # S, descending; zero where the layer does not matter to the loss
    left: Tensor  # G^-½ U S, (m, k), its columns as long as the rows of `right`
    right: Tensor  # Vᵀ A^-½, (k, n)
    mean: Tensor | None  # of the inputs, where the layer's bias can take up the mean

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return len(self.left), self.right.shape[1]

    def cost(self, rank: int) -> int:
        """Parameters of the weight at this rank: factored, or dense where that is no more."""
        m, n = self.shape
        return min(rank * (m + n), m * n)

    @property
    def break_even(self) -> int:
        """The smallest rank at which two factors are no smaller than the matrix."""
        m, n = self.shape
        return -(-m * n // (m + n))


@dataclass(frozen=True, eq=False)
class Plan:
    """How many ranks each layer keeps at a share `keep` of the model's parameters.

    `plan.at(keep=…)` gives another share without new decompositions; `plan.apply()` gives the smaller model.

    Args:
        model: as it came, dense.
        spectra: the weighted singular value decomposition of each layer that can be factored.
        keep: share of all the model's parameters.
        ranks: by layer (the module's name), a rank, or `None` where the layer stays dense.
        reasons: by layer, why it is not factored at any share.
    """

    model: nn.Module
    spectra: tuple[WeightedSVD, ...]
    keep: float
    ranks: dict[str, int | None]
    reasons: dict[str, str]

    @property
    def parameters_dense(self) -> int:
        """Parameters of the model as it came."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def parameters(self) -> int:
        """Parameters of the model that `apply()` gives."""
        saved = 0
        for s in self.spectra:
            rank = self.ranks[_module_name(s.block)]
            saved += 0 if rank is None else s.block.parameter.numel() - s.cost(rank)
        return self.parameters_dense - saved

    @property
    def predicted_loss(self) -> float:
        """The increase of the mean loss that the dropped singular values stand for, to second order: `½ Σ σ²`."""
        lost = [s.values[self.ranks[_module_name(s.block)] or len(s.values) :].square().sum() for s in self.spectra]
        return 0.5 * float(sum(lost))

    def at(self, *, keep: float) -> Plan:
        """The plan at another share of the model's parameters, `0 < keep ≤ 1`.

        Singular values of all layers stand in one list, by `σ²` for each parameter that they cost, and are taken from
        the top until the budget is spent. Every layer keeps at least rank 1; a layer whose factors would be no smaller
        than itself stays dense.

        Raises:
            InputError: `keep` is out of range, or below what rank 1 everywhere needs.
        """
        if not 0 < keep <= 1:
            raise InputError(f"compress: keep must be a share in (0, 1], got {keep}")
        total = self.parameters_dense
        fixed = total - sum(s.block.parameter.numel() for s in self.spectra)
        spent = fixed + sum(s.cost(1) for s in self.spectra)
        if spent > keep * total:
            raise InputError(
                f"compress: keep={keep} of {total:,} parameters is {int(keep * total):,}, but rank 1 everywhere needs "
                f"{spent:,}; the smallest possible keep is {spent / total:.3f}"
            )
        # Beyond its break-even a layer is dense, its further singular values free, taken with the last paid one.
        steps = [range(1, s.break_even) for s in self.spectra]
        worth = torch.cat([
            s.values[1 : s.break_even].cpu().square() / sum(s.shape) for s in self.spectra
        ])  # fmt: skip
        cost = torch.tensor(
            [s.cost(r + 1) - s.cost(r) for s, r_s in zip(self.spectra, steps, strict=True) for r in r_s]
        )
        owner = torch.repeat_interleave(torch.tensor([len(r) for r in steps]))
        # Filled to the first that does not fit, and no further: so a larger budget never takes a rank from a layer.
        order = worth.argsort(descending=True, stable=True)
        taken = int((cost[order].cumsum(0) <= keep * total - spent).sum())
        extra = owner[order[:taken]].bincount(minlength=len(self.spectra)).tolist()
        ranks = {
            _module_name(s.block): 1 + r if 1 + r < s.break_even else None
            for s, r in zip(self.spectra, extra, strict=True)
        }
        return replace(self, keep=keep, ranks=ranks)

    def apply(self) -> nn.Module:
        """A copy of the model with the planned layers factored. The original is untouched."""
        model = copy.deepcopy(self.model)
        for s in self.spectra:
            name = _module_name(s.block)
            rank = self.ranks[name]
            if rank is None:
                continue
            layer = _submodule(model, name)
            low = LowRank(layer, rank)
            left, right = s.left[:, :rank], s.right[:rank]
            bias: Any = layer.bias
            if bias is not None and s.mean is not None:
                bias = bias + (_matrix(layer).double() - left @ right) @ s.mean
            low.set_(left, right, bias)
            model = _replaced(model, name, low)
        return model


def compress(
    model: nn.Module,
    stats: Statistics | None = None,
    *,
    batches: Iterable[Any] | None = None,
    objective: Objective | Callable | None = None,
    keep: float = 0.5,
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """Factors every linear layer and convolution so that the loss grows least for the parameters kept.

    Each layer is cut where its output error, weighted by the loss's curvature, is least: the SVD of `G^½ W A^½`, with A
    the covariance of the layer's inputs (its bias takes up what the mean input loses) and G the second moment of its
    output gradients. So weighted, the squared singular values of all layers are in one unit, the loss, and one budget
    is filled from one list.

    Args:
        model: left untouched.
        stats: from `gm.capture`, best with `fisher="gauss_newton"`; or give `batches` and `objective`.
        batches: any re-iterable of batches, in place of `stats`.
        objective: how they are turned into a loss, in place of `stats`.
        keep: share of all the model's parameters to keep.
        progress: called with the number of layers done.

    Returns:
        A plan; `plan.at(keep=0.3).apply()`. A wrapper around the whole model (`torch.compile`, `DataParallel`) is left
        out of it.

    Raises:
        InputError: there are no statistics, they are not finite, or no layer can be factored.

    Cost: two eigendecompositions and one singular value decomposition in float64 for each layer.
    Source: whitening by A: SVD-LLM (2403.07378), §3.1; by both sides: Fisher-weighted SVD (2207.00112) with Kronecker
    factors.

    >>> from torch import nn
    >>> net, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2)), torch.eye(16)
    >>> plan = compress(net, batches=[(x, x[:, :2])], objective=Objective.regression(), keep=0.6)
    >>> plan.ranks["0"] < 8, plan.parameters <= 0.6 * plan.parameters_dense
    (True, True)
    """
    if stats is None:
        if batches is None or objective is None:
            raise InputError("compress: give stats from gm.capture, or both batches= and objective=")
        stats = capture(model, batches, objective)
    model = _unwrapped(model)
    spectra: list[WeightedSVD] = []
    reasons: dict[str, str] = {}
    for block in blocks(model).blocks:
        sites = stats.get(block.name) or Sites([Site(reason="not in the statistics")])
        reason = _not_factored(block, sites)
        if reason:
            reasons[_module_name(block)] = reason
            continue
        spectra.append(_decompose(block, sites.only))
        if progress is not None:
            progress(len(spectra))
    if not spectra:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise InputError(
            f"compress: no layer of {type(model).__name__} can be factored ({why or 'it has no matrices'})"
        )
    empty: dict[str, int | None] = {_module_name(s.block): None for s in spectra}
    return Plan(model, tuple(spectra), 1.0, empty, reasons).at(keep=keep)


def _not_factored(block: Block, sites: Sites) -> str:
    """Why a block's layer is not factored; empty where it is."""
    if not operation_of(block.module).factors or not runs_as_its_class(block.module):
        return f"{block.kind} is not factored"
    if isinstance(block.module, NonDynamicallyQuantizableLinear):
        return "MultiheadAttention applies it by its weight"
    if block.aliases:
        return f"tied to {', '.join(block.aliases)}"
    groups = getattr(block.module, "groups", 1)
    if groups > 1:
        return f"{groups} groups are not factored"
    if len(sites) > 1:
        return f"used in {len(sites)} ways"
    if not isinstance(sites.A, Gram) or not isinstance(sites.G, Gram):
        return sites.reason or "only the diagonal of its second moments was captured: raise max_dim"
    return ""


def _matrix(layer: nn.Module) -> Tensor:
    """The layer's whole matrix (m, n), its rows in the order of the outputs."""
    layout = layout_of(layer)
    assert layout is not None
    return layout.split(layer.get_parameter("weight").detach())


def _decompose(block: Block, site: Site) -> WeightedSVD:
    assert isinstance(site.A, Gram)
    assert isinstance(site.G, Gram)
    w = _matrix(block.module).double()
    centered = block.module.bias is not None
    a, g = site.A.covariance if centered else site.A.matrix, site.G.matrix
    for label, moment, dim in (("A", a, w.shape[1]), ("G", g, block.shape[-2])):
        if moment.shape[-1] != dim:
            raise InputError(
                f"compress: {label} of {block.name!r} is for {moment.shape[-1]} features, not {dim}: another model's?"
            )
        if not torch.isfinite(moment).all():
            raise InputError(f"compress: {label} of {block.name!r} is not finite; gm.inspect finds where NaN begins")
    a_root, a_inverse = site.A.roots(DAMPING, centered=centered)
    g_root, g_inverse = _output_roots(block, site.G)
    u, s, vt = torch.linalg.svd(g_root @ w @ a_root, full_matrices=False)
    left, right = g_inverse @ u * s, vt @ a_inverse
    # The singular values are shared out so that neither factor is badly scaled.
    share = (right.norm(dim=1) / left.norm(dim=0)).sqrt()
    share = torch.where(share.isfinite() & (share > 0), share, 1.0)
    matters = bool(a.any() and g.any())
    return WeightedSVD(block, s * matters, left * share, right / share[:, None], site.A.mean if centered else None)


def _output_roots(block: Block, g: Gram) -> tuple[Tensor, Tensor]:
    """`G^½` and `G^-½` over the layer's outputs; of fused parts, which have a G each, along the diagonal."""
    roots = g.roots(DAMPING)
    if roots[0].ndim == 2:
        return roots
    layout = layout_of(block.module)
    assert layout is not None
    outputs = torch.arange(layout.matrices[0], device=roots[0].device)[:, None].expand(layout.matrices)
    order = block.split(layout.join(outputs))[..., 0].flatten()  # the output of each row of each part
    whole = []
    for parts in roots:
        root = torch.empty(len(order), len(order), dtype=parts.dtype, device=parts.device)
        root[order[:, None], order] = torch.block_diag(*parts.flatten(0, -3))
        whole.append(root)
    return whole[0], whole[1]


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what `torch.compile` and the data-parallel wrappers put around it."""
    while True:
        parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        inner = model.module if parallel else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _module_name(block: Block) -> str:
    return block.name.rpartition(".")[0]


def _clean(name: str) -> str:
    return clean_name(f"{name}.").rstrip(".")


def _submodule(model: nn.Module, name: str) -> nn.Module:
    """The module of a block by its clean name, which leaves out wrappers inside the model."""
    found = [m for raw, m in model.named_modules() if _clean(raw) == name]
    if not found:
        raise AttributeError(f"{type(model).__name__} has no layer {name!r}")
    return found[-1]


def _replaced(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """The model with another module in the place of `name`; where the model is that layer, the other module itself."""
    old = _submodule(model, name)
    for parent in model.modules():
        for child, value in parent.named_children():
            if value is old:
                setattr(parent, child, module)
                return model
    return module


def save_compressed(model: nn.Module, path: str | Path) -> None:
    """Writes a factored model as safetensors, at its small size, with the ranks of its layers in the metadata.

    Args:
        model: from `Plan.apply()`, trained further or not.
        path: the file to write or replace.

    Raises:
        InputError: the folder is missing, or a tensor is of a kind that safetensors lacks.
        CheckpointError: the file cannot be written.

    Cost: one write.
    Source: this library's own.

    >>> import tempfile
    >>> dense, path = nn.Sequential(nn.Linear(9, 9)), tempfile.mkdtemp() + "/small.safetensors"
    >>> save_compressed(nn.Sequential(LowRank(dense[0], 2)), path)
    >>> load_compressed(dense, path)[0].rank
    2
    """
    model = _unwrapped(model)
    ranks = {_clean(name): module.rank for name, module in model.named_modules() if isinstance(module, LowRank)}
    save_tensors(path, model.state_dict(), {RANKS: json.dumps(ranks)} | blocks(model).metadata())


def load_compressed(model: nn.Module, path: str | Path) -> nn.Module:
    """The factored model from a file of `save_compressed`.

    Args:
        model: dense, as it was before compression; its layers are replaced by factored ones in place.
        path: the file.

    Returns:
        The model, or the factored layer where the model is a single layer.

    Raises:
        CheckpointError: the file holds no ranks or does not fit the model, which is then as it was.

    Cost: one read.
    Source: this library's own.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/small.safetensors"
    >>> save_compressed(LowRank(nn.Linear(9, 9), 2), path)
    >>> load_compressed(nn.Linear(9, 9), path).rank
    2
    """
    tensors, metadata = load_tensors(path)
    try:
        ranks = json.loads(metadata[RANKS])
    except (KeyError, ValueError):
        raise CheckpointError(
            f"{path} was not written by save_compressed: it has no {RANKS!r} in its metadata"
        ) from None
    dense = {}
    try:
        for name, rank in ranks.items():
            layer = dense[name] = _submodule(model, name)
            fits = operation_of(layer).factors and getattr(layer, "groups", 1) == 1
            if not fits or not 0 < rank <= min(_matrix(layer).shape):
                raise ValueError(f"{name} cannot have rank {rank}")
            model = _replaced(model, name, LowRank(layer, rank))
        held, wanted = ({k: tuple(t.shape) for k, t in state.items()} for state in (tensors, model.state_dict()))
        wrong = sorted(k for k in held.keys() | wanted.keys() if held.get(k) != wanted.get(k))
        if wrong:
            was, want = held.get(wrong[0], "missing"), wanted.get(wrong[0], "not in the model")
            raise ValueError(f"{wrong[0]} is {was}, wanted {want}; {len(wrong)} tensors differ")
    except (AttributeError, TypeError, ValueError) as error:
        for name, layer in dense.items():
            model = _replaced(model, name, layer)
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {error}") from None
    model.load_state_dict(tensors)
    return model
