"""Whether weights look trained: entries that are not independent draws, norms that have moved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from gramian.block import Block, blocks
from gramian.checkpoint import clean_name
from gramian.inspection.weights.noise import LEAST_SIDE, tracy_widom_quantile
from gramian.layers import layer_of

__all__ = ["Sign", "signs_of", "signs_of_training"]

# A matrix is evidence below this probability under independent entries. A model has up to a thousand matrices and each
# is tested in five ways; a trained one is below it by tens of orders of magnitude.
LEVEL = 1e-7

SIDE = 512  # rows and columns that are looked at, evenly spaced: a part of a matrix of independent entries is one too
LEAST_ENTRIES = 64
IN_CACHE = 2**16  # entries of matrices of one shape that are tested together

# Entries beyond so many standard deviations are clipped: torch's trunc_normal_ gives one in some 10⁷ that is at the
# ends of its interval, a hundred deviations out.
EXTREME = 6.0
TYPICAL = 0.6745  # median of |x| of a standard normal variable

# Singular values within this ratio of each other: an orthogonal matrix, which is an initialization.
FLAT = 0.99
NULL = 1e-4  # `isometric_` sets [Q, −Q; −Q, Q], whose rank is half its side


class Sign(NamedTuple):
    """A sign that a weight is trained, or set on purpose.

    Args:
        name: the parameter's.
        why: what is improbable for a fresh one.
    """

    name: str
    why: str


def signs_of_training(model: nn.Module) -> list[Sign]:
    """The trainable weights of a model that look trained, with what shows it; empty for a model that was just built.

    A fresh matrix has independent entries of one size, symmetric around zero (normal, uniform, truncated), is
    orthogonal, or is constant. One that has learned something has singular values too large for independent entries, or
    rows or columns that differ in size, or whose means are not zero, by more than chance. A fresh norm has a constant
    weight or a constant bias.

    Measured rates of error are in docs/measured/init.md. What it misses are models after a few dozen steps, in which
    little would be lost.

    Args:
        model: any module. Frozen parameters, embeddings and biases are not looked at.

    Returns:
        `(name, why)` of each.

    Raises: nothing of its own.
    Cost: the singular values of each matrix, or of 512 of its rows and columns. Accuracy: a fresh model is misjudged
    with a probability of about 1e-7 for each test of each matrix.
    Source: Johnstone, Ann. Statist. 29 (2001), theorem 1.1, for the largest singular value; χ² for rows and columns.

    >>> signs_of_training(nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32)))
    []
    """
    return signs_of(model, trainable(model))


def trainable(model: nn.Module) -> list[Block]:
    """The weights that `signs_of_training` looks at."""
    return [b for b in blocks(model).blocks if b.role != "embedding" and b.parameter.requires_grad]


def signs_of(
    model: nn.Module, weights: Iterable[Block], known: Mapping[str, Sequence[float]] | None = None
) -> list[Sign]:
    """Those of `signs_of_training` that are in some weights, and in the model's trainable norms.

    Args:
        model: has the norms.
        weights: of it.
        known: singular values of matrices, largest first, by their name in `Block.names`, which need not be computed.
    """
    matrices: dict[tuple[int, ...], list[tuple[str, Tensor, float | None]]] = {}
    for block in weights:
        for name, piece in zip(block.names, block.pieces(), strict=True):
            sample = _sample(piece, (known or {}).get(name, ()))
            if sample is not None:
                matrices.setdefault(tuple(sample[0].shape), []).append((block.name, *sample))
    found: dict[str, str] = {}
    for shape, same in matrices.items():
        together = max(1, IN_CACHE // math.prod(shape))
        for first in range(0, len(same), together):
            names, samples, largest = zip(*same[first : first + together], strict=True)
            for name, why in zip(names, _judge(torch.stack(samples), largest), strict=True):
                if why:
                    found.setdefault(name, why)
    return [Sign(*item) for item in found.items()] + list(_moved_norms(model))


def _sample(w: Tensor, known: Sequence[float]) -> tuple[Tensor, float | None] | None:
    """Up to 512 × 512 entries in float64, clipped, and the largest singular value of these where it is known.

    `None` where they are constant, orthogonal or few.
    """
    (m, n), whole = w.shape, w.numel()
    w = w[:: -(-m // SIDE) or 1, :: -(-n // SIDE) or 1].double()
    if int(torch.count_nonzero(w)) < w.numel():
        w = w[(w != 0).any(1)][:, (w != 0).any(0)]  # kernels of one tap
    if w.numel() < LEAST_ENTRIES:
        return None
    low, high = (float(end) for end in torch.aminmax(w))
    if not (math.isfinite(low) and math.isfinite(high)) or low == high:
        return None
    unit = max(-low, high)
    w = w / unit
    sigma = torch.tensor(known, dtype=torch.float64) / unit
    # Those of a parametrized weight are not the parameter's.
    is_known = len(known) == min(m, n) and w.numel() == whole
    is_known &= math.isclose(float(sigma.norm()), float(w.norm()), rel_tol=1e-9)
    if _are_flat(sigma) if is_known else _is_flat(w):
        return None
    size = w.abs()
    if 2 * int((size < TYPICAL / EXTREME).sum()) < w.numel():  # the median is above: no entry is extreme
        return w, float(sigma[0]) if is_known else None
    level = float(EXTREME / TYPICAL * size.median())
    if level == 0:
        return w, float(sigma[0]) if is_known else None
    return w.clamp(-level, level), None


def _is_flat(w: Tensor) -> bool:
    """Whether the singular values that are not zero are equal."""
    gram = w @ w.mT if w.shape[0] < w.shape[1] else w.mT @ w
    squares = gram @ gram
    value = squares.trace() / gram.trace()  # a mean of the λ, with weights λ: all are within 1 − FLAT² of it
    if float((squares - value * gram).norm()) > 2 * (1 - FLAT**2) * float(value * gram.norm()):
        return False
    return _are_flat(torch.linalg.svdvals(w))


def _largest(w: Tensor) -> Tensor:
    """The square of the largest singular value."""
    return torch.linalg.eigvalsh(w @ w.mT if w.shape[0] < w.shape[1] else w.mT @ w)[-1]


def _are_flat(sigma: Tensor) -> bool:
    sigma = sigma[sigma > NULL * sigma[0]]
    return bool(sigma[-1] > FLAT * sigma[0])


def _judge(w: Tensor, known: Sequence[float | None]) -> list[str]:
    """What is improbable for independent entries in each matrix of (K, m, n); empty where nothing is.

    Args:
        w: the matrices.
        known: the largest singular value of each, where it is known.
    """
    m, n = w.shape[-2:]
    tests: dict[str, Tensor] = {}
    squares = w.square()
    variance = squares.mean((-2, -1))
    if min(m, n) >= LEAST_SIDE:
        a, b = math.sqrt(m - 0.5), math.sqrt(n - 0.5)
        edge = (a + b) ** 2 + (a + b) * (1 / a + 1 / b) ** (1 / 3) * tracy_widom_quantile(LEVEL)
        largest = torch.stack(
            [_largest(one) if top is None else w.new_tensor(top**2) for one, top in zip(w, known, strict=True)]
        )
        tests["a singular value too large for independent entries"] = largest > edge * variance
    # And not `var`, which takes ten times as long on a processor.
    spread = (squares - variance[:, None, None]).square_().sum((-2, -1)) / (m * n - 1)
    for dim, what in ((-1, "rows"), (-2, "columns")):
        count, size = m * n // w.shape[dim], w.shape[dim]
        if count < 8 or size < 2:
            continue
        sizes = (squares.mean(dim) - variance[:, None]).square().sum(-1) * size / spread
        tests[f"{what} that differ in size by more than chance"] = _tail(sizes, count - 1) < LEVEL
        means = w.mean(dim).square().sum(-1) * size / variance
        tests[f"{what} whose means are not zero but for chance"] = _tail(means, count) < LEVEL
    return [next((why for why, failed in tests.items() if bool(failed[k])), "") for k in range(len(w))]


def _tail(x: Tensor, degrees: int) -> Tensor:
    """The probability that χ² of so many degrees of freedom exceeds x."""
    return torch.special.gammaincc(torch.full_like(x, degrees / 2), x / 2)


def _moved_norms(model: nn.Module) -> Iterable[Sign]:
    """Norms none of whose trainable vectors is constant.

    One of them may be drawn at random (as the weights of batch norms in a GAN), but not both. A counter of batches says
    only that a batch has passed.
    """
    for prefix, module in model.named_modules():
        if layer_of(module).operation != "elementwise" and "norm" not in type(module).__name__.lower():
            continue
        vectors = {
            name: p
            for name, p in module.named_parameters(recurse=False)
            if p.requires_grad and p.ndim == 1 and not isinstance(p, UninitializedParameter) and len(p) > 1
        }
        if vectors and all(bool((p != p[0]).any()) for p in vectors.values()):
            name = next(iter(vectors))
            yield Sign(clean_name(f"{prefix}.{name}" if prefix else name), "a norm that is not constant any more")


def told(signs: Iterable[Sign], most: int = 3) -> str:
    """The first few signs in words."""
    listed: Mapping[str, str] = {s.name: s.why for s in signs}
    shown = [f"{name} ({why})" for name, why in list(listed.items())[:most]]
    return ", ".join(shown) + (f" and {len(listed) - most} more" if len(listed) > most else "")
