"""The matrix logarithm, with certificates."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Inexact
from torch import Tensor

from gramian.linalg import certificate as cert
from gramian.linalg import derivatives
from gramian.linalg.certificate import Certificate, require_converged
from gramian.linalg.engine import eigenbasis
from gramian.linalg.engine.derivative import differentiable
from gramian.linalg.engine.double_double import Pair, fine_product, minus, pair, plus, two_sum
from gramian.linalg.engine.eigenbasis import FINEST, by_eigenvectors, settled
from gramian.linalg.engine.escalation import Answer, Method
from gramian.linalg.engine.exponential import two_norm
from gramian.linalg.engine.function import MatrixFunction, evaluate, of_eigenvalues, register
from gramian.linalg.engine.real_form import takes_complex
from gramian.linalg.engine.rounding import U, gamma, norm
from gramian.linalg.engine.scaling import exponent_of, scale
from gramian.linalg.engine.similarity import similar
from gramian.linalg.engine.stable import (
    EXPLICIT,
    Stable,
    directions,
    frobenius,
    inverse,
    operator_norm,
    refined,
    transposed,
)
from gramian.linalg.principal_root import denman_beavers, on_cut, root_equation

__all__ = ["logm", "logm_ex"]

NEAR = 0.25
"""‖A^(1/2ᵏ) − I‖₂ up to which the Padé approximant of order `ORDER` is exact to `REMAINDER`."""

ORDER = 8
REMAINDER = 1e-18
"""‖log(I + Y) − r(Y)‖ / ‖Y‖ for ‖Y‖₂ ≤ `NEAR`, which is largest for the number −`NEAR`.

Kenney and Laub, SIAM J. Matrix Anal. Appl. 10 (1989), theorem 5."""

ROOTS = 40
CORRECTIONS = 4
LN2, LN2_LOW = math.log(2), 2.3190468138462996e-17
"""ln 2 to 106 bits."""


@lru_cache
def gauss_legendre(order: int = ORDER) -> list[tuple[float, float]]:
    """Nodes and weights on (0, 1), with which Σ w Y(I + xY)⁻¹ is the Padé approximant of log(I + Y)."""
    from numpy.polynomial.legendre import leggauss  # not by torch, whose transforms would take part in it

    x, w = leggauss(order)
    return list(zip(((x + 1) / 2).tolist(), (w / 2).tolist(), strict=True))


class Stage(NamedTuple):
    """One square root of the chain: what solves YZ + ZY = C, which matrices (B,) took it, and ‖Δ‖ for Δ = A − Y²."""

    equation: Stable
    taken: Tensor
    defect: Tensor


class Roots(NamedTuple):
    """The square roots A^(1/2), A^(1/4), … to double-double accuracy.

    Attributes:
        last: I + Y, the last of them.
        stages: its predecessors' equations.
        counts: `(B,)`, how many roots a matrix took.
        ok: where all roots are principal ones.
        steps: of the iterations.
        defect: the largest ‖Δ‖ / ‖A‖ of a root.
    """

    last: Pair
    stages: list[Stage]
    counts: Tensor
    ok: Tensor
    steps: int
    defect: Tensor


def _roots(a: Pair, certify: bool) -> Roots:
    """Square roots until they are near I, as in inverse scaling and squaring, without Schur forms."""
    eye = torch.eye(a.hi.shape[-1], dtype=a.hi.dtype, device=a.hi.device)
    ok = a.hi.isfinite().flatten(1).all(1)
    x, steps, counts = _kept(a, ok, eye), 0, torch.zeros_like(ok, dtype=torch.long)
    stages: list[Stage] = []
    worst = torch.zeros_like(a.error)
    while len(stages) < ROOTS:
        far = ok & (two_norm(x.hi - eye) > NEAR)
        if not bool(far.any()):
            break
        old = _kept(x, far, eye)
        root = denman_beavers(old.hi)
        s = root_equation(root, bounded=certify)
        close = pair(s.n)
        e, e_error = _fine_defect(old, close)
        for _ in range(CORRECTIONS):
            d = refined(s, e)
            close = plus(close, torch.where((norm(d) < 0.1 * norm(s.n))[:, None, None], d, 0.0))
            e, e_error = _fine_defect(old, close)
        ok = ok & (~far | (s.ok & root.converged))
        far = far & ok
        keep = far[:, None, None]
        x = Pair(torch.where(keep, close.hi, x.hi), torch.where(keep, close.lo, x.lo), torch.where(far, 0.0, x.error))
        x = _kept(x, ok, eye)
        steps, counts = steps + root.steps + len(s.steps.factors), counts + far
        stages.append(Stage(s, far, torch.where(far, norm(e) + e_error, 0.0)))
        worst = worst.maximum(torch.where(far, norm(e) / norm(old.hi), 0.0))
    return Roots(x, stages, counts, ok & (two_norm(x.hi - eye) <= NEAR), steps, worst)


def _kept(x: Pair, rows: Tensor, eye: Tensor) -> Pair:
    """These rows, and the identity elsewhere."""
    keep = rows[:, None, None]
    return Pair(torch.where(keep, x.hi, eye), torch.where(keep, x.lo, 0.0), torch.where(rows, x.error, 0.0))


def _fine_defect(a: Pair, y: Pair) -> tuple[Tensor, Tensor]:
    """A − Y², and a bound on its error, with what is not known of A."""
    return minus(a, fine_product(y, y))


def _distance(r: Roots) -> Tensor:
    """A bound on ‖Z − X‖_F for the exact root Z = A^(1/2ᵏ) and the X found, up to a side of `EXPLICIT`.

    With Yⱼ the j-th root found, Δⱼ = Yⱼ₋₁ − Yⱼ², and Dⱼ the exact one less Yⱼ, YⱼDⱼ + DⱼYⱼ + Dⱼ² = Δⱼ + Dⱼ₋₁. So, with
    Sⱼ the inverse of Lⱼ = Yⱼ(·) + (·)Yⱼ, Dⱼ = Σᵢ Sⱼ⋯Sᵢ(Δᵢ − Dᵢ²): the derivatives of whole chains count, and not the
    product of the norms of their parts, which far from normal is a power of κ. Where c bounds all terms but the last
    square, and 4‖Sⱼ‖c < 1, ‖Dⱼ‖ ≤ 2c (Kantorovich), and the exact root is the principal one as Yⱼ is.
    """
    n = r.last.hi.shape[-1]
    eye, one = (torch.eye(k, dtype=r.defect.dtype, device=r.defect.device) for k in (n, n * n))
    reach, chains = torch.zeros_like(r.defect), []
    for s, taken, defect in r.stages:
        y = s.n
        forward = (y[:, :, None, :, None] * eye[:, None, :] + eye[:, None, :, None] * y.mT[:, None, :, None]).flatten(3)
        forward = torch.where(taken[:, None, None], forward.flatten(1, 2), one)
        back, _ = inverse(forward)
        chains = [(up @ forward, back @ down, square) for up, down, square in chains] + [(forward, back, defect)]
        norms = [_norm_of_inverse(up, down, one) for up, down, _ in chains]
        parts = (
            torch.where(square > 0, size * square, 0.0) for size, (_, _, square) in zip(norms, chains, strict=True)
        )
        most = sum(parts, torch.zeros_like(defect))
        reach = torch.where(taken, torch.where(4 * norms[-1] * most < 1, 2 * most, math.inf), reach)
        chains[-1] = (forward, back, torch.where(taken, defect + reach**2, 0.0))
    return reach + r.last.error


def _norm_of_inverse(x: Tensor, y: Tensor, one: Tensor) -> Tensor:
    """A bound on ‖X⁻¹‖₂, as far as Y is that; the factor leaves room for the rounding of the products."""
    top = y.abs().amax((-2, -1)).clamp_min(2.0**-1000)
    return torch.where(norm(x @ y - one) < 0.25, 1.5 * top * two_norm(y / top[:, None, None]), math.inf)


def _estimated_distance(r: Roots) -> tuple[Tensor, float]:
    """The same of any side from the images of a few matrices, and the probability that it fails.

    The squares Dⱼ² are bounded by ‖Dⱼ‖ ≤ 2‖Sⱼ‖(‖Δⱼ‖ + ‖Dⱼ₋₁‖).
    """
    along = directions(r.last.hi)
    reach, squares = torch.zeros_like(r.defect), []
    for s, taken, defect in r.stages:
        inner = defect + reach
        reach = torch.where(taken, torch.where(4 * s.beta**2 * inner < 1, 2 * s.beta * inner, math.inf), reach)
        squares.append(torch.where(taken, defect + reach**2, 0.0))
    images = along.basis.expand(-1, len(reach), -1, -1)
    total = torch.zeros_like(reach)
    for j in range(len(r.stages) - 1, -1, -1):
        s, taken, _ = r.stages[j]
        # Of the adjoint of the chain, which ends with the last root.
        images = torch.where(taken[:, None, None], refined(transposed(s), images), images)
        back = images
        for stage in r.stages[j:]:
            y = stage.equation.n.mT
            back = torch.where(stage.taken[:, None, None], y @ back + back @ y, back)
        sizes = torch.where(frobenius(along.basis - back, along) < 0.25, 1.5 * operator_norm(images, along), math.inf)
        total = total + torch.where(squares[j] > 0, sizes * squares[j], 0.0)
    return reach.minimum(total) + r.last.error, 3 * len(r.stages) * along.failure


class Logarithm(NamedTuple):
    """The logarithm of a pair, a bound on its Frobenius error, the probability that it fails, and the roots."""

    value: Tensor
    error: Tensor
    failure: float
    roots: Roots


def _of_pair(a: Pair, certify: bool) -> Logarithm:
    """log(A) = 2ᵏ r(Y), A^(1/2ᵏ) = I + Y, with square roots in double-double arithmetic and Padé's approximant r.

    Its derivative at I + Y is at most 1/(1 − ‖Y‖), so that the error of the root enters as 2ᵏ‖Z − X‖/(1 − ‖Y‖); the
    rest is rounding.
    """
    n, r = a.hi.shape[-1], _roots(a, certify)
    eye = torch.eye(n, dtype=a.hi.dtype, device=a.hi.device)
    high, low = two_sum(r.last.hi, -eye)
    low = low + r.last.lo
    y = high + low
    parts = [(weight, node, inverse(eye + node * y)[0]) for node, weight in gauss_legendre()]
    whole = sum((weight * part for weight, _, part in parts), torch.zeros_like(y))
    value = scale(y @ whole, r.counts)
    if not certify:
        return Logarithm(value, torch.full_like(a.error, math.inf), 0.0, r)
    apart, failure = (_distance(r), 0.0) if n <= EXPLICIT else _estimated_distance(r)
    apart = apart + norm(low - (y - high)) + U * norm(low)
    size, near = norm(y), two_norm(y)
    slip = torch.zeros_like(size)
    for weight, node, part in parts:
        left = norm(eye - (part + node * (y @ part))) + 2 * gamma(n + 3) * (1 + near) * norm(part)
        slip = slip + 1.1 * weight * norm(part) * left
    slip = slip + 2 * gamma(n + ORDER + 3) * norm(whole) + REMAINDER
    error = scale(apart / (1 - near - apart) + slip * size, r.counts)
    # That of the identity is exact.
    error = torch.where((size == 0) & (apart == 0), 0.0, error)
    return Logarithm(value, torch.where(apart < 0.1, error, math.inf), failure, r)


def _lifted(value: Pair, error: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of 2^down A, and its error, from that of A."""
    n, shift = value.hi.shape[-1], down.double()
    eye = torch.eye(n, dtype=value.hi.dtype, device=value.hi.device)
    out = plus(plus(value, (shift * LN2_LOW)[:, None, None] * eye), (shift * LN2)[:, None, None] * eye).hi
    # The product with ln 2 is rounded, and so are the sums.
    lost = torch.where(down == 0, 0.0, U * math.sqrt(n) * LN2 * shift.abs() + 2 * U * norm(out))
    return out, (error + lost + norm(value.lo)) * (1 + 2.0**-20)


def _answer(value: Pair, error: Tensor, down: Tensor, found: Logarithm, certify: bool) -> Answer:
    """The answer for 2^down A from the logarithm of A."""
    r = found.roots
    out, error = _lifted(value, error, down)
    out = torch.where(r.ok[:, None, None], out, math.nan)
    if not certify:
        return Answer.bare(out, torch.where(r.ok, cert.NONE, cert.ON_CUT), r.steps)
    known = r.ok & error.isfinite()
    reason = torch.where(r.ok, torch.where(known, cert.NONE, cert.INACCURATE), cert.ON_CUT)
    return Answer(out, torch.where(known, error, math.inf), r.defect, reason, r.steps, found.failure)


def _by_eigenvectors(x: Tensor, *, rtol: float, certify: bool = True) -> Answer:
    """By the logarithms of the eigenvalues."""
    if not x[0:1].numel():
        return _empty(x)
    down = _middle(x)
    value, error, residual = by_eigenvectors(pair(scale(x, -down)), eigenbasis.LOGARITHM)
    return settled(*_lifted(value, error, down), residual, certify)


def _inverse_scaling(x: Tensor, *, rtol: float, certify: bool = True) -> Answer:
    """By square roots of the matrix as it is."""
    if not x[0:1].numel():
        return _empty(x)
    down = _middle(x)
    found = _of_pair(pair(scale(x, -down)), certify)
    return _answer(pair(found.value), found.error, down, found, certify)


def _diagonalized(x: Tensor, *, rtol: float, certify: bool = True) -> Answer:
    """By square roots of a similar matrix, which is near normal however far the matrix is from it."""
    if not x[0:1].numel():
        return _empty(x)
    down = _middle(x)
    s = similar(pair(scale(x, -down)))
    found = _of_pair(s.b, certify)
    value, error = s.restored(pair(found.value), found.error)
    return _answer(value, error, down, found, certify)


def _empty(x: Tensor) -> Answer:
    zero = torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)
    return Answer(x, zero, zero, torch.full(zero.shape, cert.NONE, device=x.device))


def _middle(x: Tensor) -> Tensor:
    """The power of two nearest to the geometric mean of |λ|; 0 where that is near 1 or not known."""
    x = torch.where(x.isfinite(), x, 0.0)
    top = exponent_of(x)  # the pivots of subnormal numbers would have no digit left
    size = torch.linalg.slogdet(scale(x, -top)).logabsdet / (LN2 * x.shape[-1]) + top
    size = torch.where(size.isfinite() & (size.abs() > 2), size, 0.0)
    return size.round().long()


def _plain(m: Tensor) -> Tensor:
    w, v = torch.linalg.eig(m)
    return ((v * w.log()[..., None, :]) @ torch.linalg.inv(v)).real


def _exact(mp: Any, m: Any) -> Any:
    size = mp.norm(m)
    return of_eigenvalues(mp, m, lambda w: None if on_cut(mp, w, size) else mp.log(w))


LOGM = register(
    MatrixFunction(
        "logm",
        {
            "eigenvectors": Method(
                _by_eigenvectors,
                torch.float64,
                FINEST,
                lambda m, n: {"eig64": 1, "inverse64": 1, "float64": 20},
                "matrices not far from normal, in float64",
            ),
            "inverse_scaling": Method(
                _inverse_scaling,
                torch.float64,
                0.0,
                lambda m, n: {"inverse64": 150, "float64": 600},
                "matrices with a principal logarithm",
            ),
            "diagonalized": Method(
                _diagonalized,
                torch.float64,
                0.0,
                lambda m, n: {"inverse64": 200, "svd64": 1, "float64": 800},
                "the same far from normal, in a basis of eigenvectors",
            ),
        },
        "square",
        "unscaled",
        plain=_plain,
        exact=_exact,
    )
)


@takes_complex("logm", square=True)
@differentiable(derivatives.LOGARITHM, shapes=lambda m, **_: torch.empty_like(m), methods=LOGM.methods, m=2)
def logm_ex(
    m: Inexact[Tensor, "*b n n"], *, method: str = "auto", rtol: float | None = None, certify: bool = True
) -> tuple[Inexact[Tensor, "*b n n"], Certificate]:
    """`logm` with its certificate, never raising for a matrix's values; NaN where there is no principal logarithm.

    Args:
        m, method, rtol, certify: as for `logm`.
    Returns: the logarithm and its `Certificate`.
    Raises: ShapeError, DtypeError, InputError: for wrong arguments.
    Cost: as for `logm`.
    Source: as for `logm`.

    >>> value, certificate = logm_ex(torch.diag(torch.tensor([1.0, -1.0])))
    >>> certificate.converged.item(), certificate.reasons[0][:28]
    (False, 'the answer does not exist: t')
    """
    return evaluate(LOGM, m, method=method, rtol=rtol, certify=certify)


def logm(
    m: Inexact[Tensor, "*b n n"], *, method: str = "auto", rtol: float | None = None, certify: bool = True
) -> Inexact[Tensor, "*b n n"]:
    """The principal logarithm of a square matrix.

    logm(M) = X with e^X = M and eigenvalues whose imaginary parts are between −π and π.

    Args:
        m: `(..., n, n)`, without eigenvalues on the negative real axis or at zero.
        method: the name of a method (see docs/linalg.md), or "auto".
        rtol: the relative Frobenius error asked for; `certificate.RTOL` of the dtype if None.
        certify: whether to bound the error; if False, the value of the same route, and only seen failures raise.
    Returns: `(..., n, n)`, the logarithm, in the dtype of `m`.
    Raises:
        ShapeError: where `m` is not square.
        DtypeError: where `m` is not floating point, real or complex.
        InputError: for an unknown method, or a negative rtol.
        ConvergenceError: where there is no principal logarithm, or the error bound is above rtol.
    Cost: an eigendecomposition and some 20 products in float64. Far from normal, for each of 5 to 16 square roots 15
    inverses, and 600 products in all; for the bound, to n = 12, three products of n² × n² matrices for each pair of
    roots. Accuracy: 1e-13, or one rounding of the dtype. The certificate's residual is ‖MW − WD‖_F / (‖M‖_F ‖W‖_F) of
    eigenvectors W, or that of the square roots, ‖M − X²‖_F / ‖M‖_F, whose bound is an estimate from n = 13.
    Source: Higham, Functions of Matrices (2008), chapter 11; Kenney and Laub, SIAM J. Matrix Anal. Appl. 10 (1989).

    >>> logm(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    tensor([[0., 1.],
            [0., 0.]])
    """
    value, certificate = logm_ex(m, method=method, rtol=rtol, certify=certify)
    require_converged("logm", certificate)
    return value
