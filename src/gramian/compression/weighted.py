"""The singular values of a layer, weighted by what its outputs mean to the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from gramian.block import Block
from gramian.compression.lowrank import matrix_of
from gramian.errors import InputError
from gramian.gram import Gram
from gramian.layers import is_affine, layout_of, operation_of, runs_as_its_class
from gramian.statistics import Site, Sites

__all__ = ["DAMPING", "WeightedSVD", "decompose", "why_not"]

# Relative damping of A and G, as a share of their mean eigenvalue. Both are singular usually (dead inputs, two
# classes): without it the inverse roots do not exist; with more, directions that matter little would weigh in.
DAMPING = 1e-6


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


def why_not(block: Block, sites: Sites) -> str:
    """Why a block's layer is not factored; empty where it is."""
    if not operation_of(block.module).factors or not runs_as_its_class(block.module):
        return f"{block.kind} is not factored"
    if not is_affine(block.module):
        return f"{block.kind} has other parameters than a weight and a bias, or a weight that is made of others"
    if block.module._forward_hooks or block.module._forward_pre_hooks:
        return "it has forward hooks, which a factored layer would lose"
    if isinstance(block.module, NonDynamicallyQuantizableLinear):
        return "MultiheadAttention applies it by its weight"
    if any(module is not block.module for _, module in block.owners):
        return f"tied to {', '.join(block.aliases)}"
    groups = getattr(block.module, "groups", 1)
    if groups > 1:
        return f"{groups} groups are not factored"
    if len(sites) > 1:
        return f"used in {len(sites)} ways"
    if not isinstance(sites.A, Gram) or not isinstance(sites.G, Gram):
        return sites.reason or "only the diagonal of its second moments was captured: raise max_dim"
    return ""


def decompose(block: Block, site: Site) -> WeightedSVD:
    assert isinstance(site.A, Gram)
    assert isinstance(site.G, Gram)
    w = matrix_of(block.module).double()
    centered = getattr(block.module, "bias", None) is not None
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
