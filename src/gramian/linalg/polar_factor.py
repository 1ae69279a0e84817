"""The polar factor, by several routes and with one certificate."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError
from gramian.linalg import certificate as cert
from gramian.linalg.batch import Answer, Route, check, choose, climb, ladder, load
from gramian.linalg.certificate import Certificate, default_rtol, require_converged
from gramian.linalg.polar_direction import direction, reach
from gramian.linalg.polar_express import COEFFICIENTS, defect, newton_schulz
from gramian.linalg.polar_gram import gram_eigh32, gram_eigh64
from gramian.linalg.polar_qdwh import qdwh
from gramian.linalg.polar_svd import svd, svd_refined
from gramian.linalg.polar_zolotarev import fractions, zolotarev

ROUGH, TERMS = 5e-2, 4
"""The rtol and number of the fractions where they are certified: ‖XᵀX − I‖ is twice as large as the error."""


def _direction(x: Tensor, *, decline: float) -> Answer:
    """`newton_schulz` as a rung of the ladder, in float32 at least."""
    value, k = newton_schulz(x), min(x.shape[-2:])
    bound, residual = _estimate(value, _growth(len(COEFFICIENTS)), x.dtype)
    reason = torch.full_like(bound, cert.NONE, dtype=torch.long)
    size = torch.full_like(bound, math.sqrt(k))
    return Answer(value, bound * size, residual, reason, len(COEFFICIENTS), failure=math.nan, size=size)


def _fractions(x: Tensor, *, decline: float) -> Answer:
    """`zolotarev` as a rung of the ladder."""
    low, k = reach(min(x.shape[-2:]), ROUGH), min(x.shape[-2:])
    f = fractions(low, TERMS)
    value = zolotarev(x, low=low, terms=TERMS)
    bound, residual = _estimate(value, f.slope**2, torch.float32)
    # A singular value that is lost, or below the reach, is not near 1: there may be no polar factor.
    bound = torch.where(residual < 0.5, bound, math.inf)
    reason = torch.where(bound.isfinite(), cert.NONE, cert.INACCURATE)
    size = torch.full_like(bound, math.sqrt(k))
    return Answer(value, bound * size, residual, reason, TERMS, failure=math.nan, size=size)


POLAR: dict[str, Route] = {
    "zolotarev": Route(
        _fractions,
        None,
        ROUGH,
        lambda m, n: {"float32": 1 + 3 * m / n, "cholesky32": TERMS, "potri32": TERMS},
        narrow=True,
    ),
    "newton_schulz": Route(_direction, None, 1e-2, lambda m, n: {"float32": 7 * (1 + 2 * m / n) + 1}, narrow=True),
    "gram_eigh32": Route(
        gram_eigh32,
        torch.float32,
        3e-6,
        lambda m, n: {"eigh32": 1, "float32": 0.8 + 1.7 * m / n, "thin64": 4 + 5 * m / n},
        narrow=True,
    ),
    "qdwh": Route(
        qdwh,
        torch.float32,
        3e-3,
        lambda m, n: {
            "cholesky32": 4,
            "triangular32": 4 * m / n,
            "float32": 2 + 4.3 * m / n,
            "thin64": 16 + 5 * m / n,
        },
        narrow=True,
    ),
    "gram_eigh64": Route(
        gram_eigh64,
        None,
        1e-10,
        lambda m, n: {"eigh64": 1, "float64": 0.8 * m / n, "float32": 0.8 + m / n, "thin64": 4 + 5 * m / n},
    ),
    "svd": Route(svd, torch.float64, 1e-13, lambda m, n: {"svd64": 0.5 + 0.5 * m / n, "float64": 6 + 5 * m / n}),
    "svd_refined": Route(
        svd_refined, torch.float64, 0.0, lambda m, n: {"svd64": 0.5 + 0.5 * m / n, "float64": 50 + 40 * m / n}
    ),
}


@torch.no_grad()
def polar_ex(
    a: Float[Tensor, "*b m n"],
    *,
    method: str = "auto",
    rtol: float | None = None,
    steps: int | None = None,
    certify: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "*b m n"], Certificate]:
    """`polar` with its certificate, never raising for a matrix's values.

    `certify=False` is for the direction of an optimizer's step: nothing is converged, the bound is inf, and nothing
    waits for a GPU. With "auto" the cheapest of "newton_schulz" and "zolotarev" is taken, in steps, dtype and
    coefficients made for `rtol`: the root mean square of σ − 1 over the answer's singular values, those of A below
    `polar_direction.reach` of the largest apart. `rtol=0.1` is about half the error of torch.optim.Muon's five steps.

    `steps` and `dtype` concern `method="newton_schulz"`: the number of steps and the dtype of the products.

    >>> q, certificate = polar_ex(torch.zeros(2, 3, 2), method="newton_schulz")
    >>> certificate.converged.tolist(), q.abs().max().item()
    ([False, False], 0.0)
    """
    check("polar", a)
    choose("polar", method, POLAR)
    if steps is not None and steps < 1:
        raise InputError(f"polar: expected steps ≥ 1, got {steps}. Leave it out for {len(COEFFICIENTS)}.")
    tolerance = default_rtol(rtol, a.dtype)
    if method == "newton_schulz":
        return _newton_schulz_ex(a, tolerance, steps or len(COEFFICIENTS), certify, dtype)
    if not certify:
        if method != "auto":
            raise InputError(f"polar: certify=False is for 'auto' and 'newton_schulz', got {method!r}.")
        value, chosen = direction(a, tolerance)
        return value, _uncertified(a, chosen.method, chosen.steps)
    wide = a.shape[-2] < a.shape[-1]
    tall = a.mT if wide else a
    names = [method] if method != "auto" else ladder(POLAR, tall.shape, tolerance, a.device.type)
    value, certificate = climb(load(tall), POLAR, names, tolerance, torch.zeros_like)
    return (value.mT if wide else value), certificate


def _newton_schulz_ex(
    a: Tensor, rtol: float, steps: int, certify: bool, dtype: torch.dtype | None
) -> tuple[Tensor, Certificate]:
    """The products-only route by name: nothing here waits for the device."""
    x = newton_schulz(a, steps=steps, dtype=dtype)
    batch = a.shape[:-2]
    code = torch.zeros(batch, dtype=torch.long, device=a.device)
    if not certify:
        return x, _uncertified(a, "newton_schulz", steps)
    bound, residual = _estimate(x, _growth(steps), dtype or torch.promote_types(x.dtype, torch.float32))
    converged = bound <= rtol
    certificate = Certificate(
        converged=converged,
        residual=residual,
        error_bound=bound,
        kind=torch.ones_like(code),
        failure_probability=torch.full_like(bound, math.nan),
        steps=torch.full_like(code, steps),
        method=torch.full_like(code, list(POLAR).index("newton_schulz")),
        reason=torch.where(converged, cert.NONE, torch.where(residual.isfinite(), cert.INACCURATE, cert.NOT_FINITE)),
        methods=tuple(POLAR),
    )
    return x, certificate


def _uncertified(a: Tensor, method: str, steps: int) -> Certificate:
    """How an answer was found, and that nothing is known about its error."""
    code = torch.zeros(a.shape[:-2], dtype=torch.long, device=a.device)
    unknown = torch.full(a.shape[:-2], math.nan, dtype=torch.float64, device=a.device)
    return Certificate(
        converged=code.bool(),
        residual=unknown,
        error_bound=torch.full_like(unknown, math.inf),
        kind=torch.ones_like(code),
        failure_probability=unknown,
        steps=torch.full_like(code, steps),
        method=torch.full_like(code, list(POLAR).index(method)),
        reason=torch.full_like(code, cert.INACCURATE),
        methods=tuple(POLAR),
    )


def _growth(steps: int) -> float:
    """How much so many steps magnify the smallest singular values."""
    return math.prod(COEFFICIENTS[min(i, len(COEFFICIENTS) - 1)][0] for i in range(steps))


def _estimate(x: Tensor, growth: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An estimate of the relative error of a polynomial or rational function of A, and ‖XᵀX − I‖_F.

    |σ − 1| ≤ |σ² − 1|; a rounding in a small singular direction grows with it, by at most `growth`.
    """
    k = min(x.shape[-2:])
    residual = defect(x).to(torch.float64)
    unit = torch.finfo(dtype).eps / 2
    bound = (residual + growth * unit * math.sqrt(k)) / math.sqrt(max(k, 1))
    return bound.nan_to_num(nan=math.inf), residual


def polar(
    a: Float[Tensor, "*b m n"],
    *,
    method: str = "auto",
    rtol: float | None = None,
    steps: int = len(COEFFICIENTS),
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*b m n"]:
    """The nearest matrix with orthonormal columns (or rows): the polar factor U Vᵀ of A = U Σ Vᵀ.

    polar(A) = A (AᵀA)^(-1/2), the maximizer of tr(QᵀA) over orthonormal Q.

    Arguments: `a` (..., m, n); `method`, one of `POLAR` or "auto"; `rtol`, the relative Frobenius error asked for
    (`certificate.RTOL` of the dtype if None); `steps` and `dtype`, see `polar_ex`.
    Raises: `ShapeError`, `DtypeError`; `ConvergenceError` where a matrix is rank-deficient or the error bound is above
    rtol (`polar_ex` then has the partial isometry on the range).
    Cost in float32 products of the smaller side at 1024²: through the Gram matrix 11 in float32 (κ ≤ 100 at rtol 1e-3)
    or 21 in float64 (κ ≤ 1e6 at 1e-4), by the SVD about 60; "newton_schulz" 3 a step; "zolotarev", for a few per cent,
    7 (see `polar_ex` for the directions of optimizers). Accuracy: what `rtol` asks for,
    as the certificate says, until κ nears 1e13; with `method="svd_refined"` one rounding of the dtype.
    Source: Higham, Functions of Matrices (2008), chapter 8; "newton_schulz": arXiv:2505.16932, algorithm 1;
    "zolotarev": Nakatsukasa and Freund, SIAM Review 58 (2016), §3.

    >>> polar(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
    tensor([[1., 0.],
            [0., 1.]])
    """
    value, certificate = polar_ex(a, method=method, rtol=rtol, steps=steps, dtype=dtype)
    require_converged("polar", certificate)
    return value
