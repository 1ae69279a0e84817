"""The polar factor: its methods in one table, and its public functions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor

from gramian.errors import InputError
from gramian.linalg import certificate as cert
from gramian.linalg import derivatives
from gramian.linalg.certificate import Certificate, default_rtol, require_converged, uncertified, verdict
from gramian.linalg.engine.derivative import differentiable
from gramian.linalg.engine.escalation import Answer, Method
from gramian.linalg.engine.function import MatrixFunction, evaluate, register
from gramian.linalg.engine.loading import check, choose
from gramian.linalg.engine.real_form import takes_complex
from gramian.linalg.engine.rounding import unit_roundoff
from gramian.linalg.engine.scaling import largest_entry
from gramian.linalg.polar_factor.by_gram import gram_eigh32, gram_eigh64
from gramian.linalg.polar_factor.by_svd import svd, svd_refined
from gramian.linalg.polar_factor.direction import direction, least_ratio
from gramian.linalg.polar_factor.newton_schulz import COEFFICIENTS, defect, newton_schulz
from gramian.linalg.polar_factor.qdwh import qdwh
from gramian.linalg.polar_factor.zolotarev import fractions, zolotarev

ROUGH, TERMS = 5e-2, 4
"""The rtol and the number of fractions with which "zolotarev" is certified: ‖XᵀX − I‖ is twice the error."""

DIRECTION = 1e-2
"""The rtol from which an answer without a certificate is a direction."""


def _newton_schulz(x: Tensor, *, rtol: float, certify: bool = True) -> Answer:
    """Newton–Schulz steps, in float32 at least."""
    if not certify:
        return Answer.bare(newton_schulz(x), steps=len(COEFFICIENTS))
    return _estimated(x, newton_schulz(x), _growth(len(COEFFICIENTS)), x.dtype, math.inf, len(COEFFICIENTS))


def _zolotarev(x: Tensor, *, rtol: float, certify: bool = True) -> Answer:
    """Zolotarev's fractions."""
    low = least_ratio(min(x.shape[-2:]), ROUGH)
    value = zolotarev(x, low=low, terms=TERMS)
    if not certify:
        return Answer.bare(value, steps=TERMS)
    # Where a singular value is lost, or below `low`, it does not end near 1: there may be no polar factor.
    return _estimated(x, value, fractions(low, TERMS).slope ** 2, torch.float32, 0.5, TERMS)


def _estimated(x: Tensor, value: Tensor, growth: float, dtype: torch.dtype, most: float, steps: int) -> Answer:
    """The answer whose error is estimated from its residual; unknown where that is not below `most`."""
    bound, residual = _estimate(value, growth, dtype)
    bound = torch.where(residual < most, bound, math.inf)
    reason = torch.where(bound.isfinite(), cert.NONE, cert.INACCURATE)
    size = torch.full_like(bound, math.sqrt(min(x.shape[-2:])))
    return Answer(value, bound * size, residual, reason, steps, failure=math.nan, size=size)


def _growth(steps: int) -> float:
    """The factor by which so many steps magnify the smallest singular values."""
    return math.prod(COEFFICIENTS[min(i, len(COEFFICIENTS) - 1)][0] for i in range(steps))


def _estimate(x: Tensor, growth: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An estimate of the relative error of a polynomial or rational function of A, and ‖XᵀX − I‖_F.

    |σ − 1| ≤ |σ² − 1|; a rounding in a small singular direction is magnified with it, at most by `growth`.
    """
    k = min(x.shape[-2:])
    residual = defect(x).to(torch.float64)
    bound = (residual + growth * unit_roundoff(dtype) * math.sqrt(k)) / math.sqrt(max(k, 1))
    return bound.nan_to_num(nan=math.inf), residual


def _plain(a: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(a, full_matrices=False)
    return u @ vh


def _exact(mp: Any, a: Any) -> Any:
    x = a if a.rows >= a.cols else a.T
    w, v = mp.eigsy(x.T * x)
    if not len(w) or min(w) <= max(w) * mp.mpf(10) ** -45:
        return None
    q = x * v * mp.diag([1 / mp.sqrt(e) for e in w]) * v.T
    return q if a.rows >= a.cols else q.T


POLAR = register(
    MatrixFunction(
        "polar",
        {
            "zolotarev": Method(
                _zolotarev,
                None,
                ROUGH,
                lambda m, n: {"float32": 1 + 3 * m / n, "cholesky32": TERMS, "potri32": TERMS},
                "a direction, rtol ≥ 5e-2; the Gram matrix and Cholesky factors",
                narrow=True,
            ),
            "newton_schulz": Method(
                _newton_schulz,
                None,
                1e-2,
                lambda m, n: {"float32": 7 * (1 + 2 * m / n) + 1},
                "a direction, rtol ≥ 1e-2; products only; by name also in bfloat16",
                narrow=True,
            ),
            "gram_eigh32": Method(
                gram_eigh32,
                torch.float32,
                3e-6,
                lambda m, n: {"eigh32": 1, "float32": 0.8 + 1.7 * m / n, "thin64": 4 + 5 * m / n},
                "error εκ²: κ ≤ 100 at 1e-3, κ ≤ 20 at 1e-4",
                narrow=True,
                spectral=True,
            ),
            "qdwh": Method(
                qdwh,
                torch.float32,
                3e-3,
                lambda m, n: {
                    "cholesky32": 4,
                    "triangular32": 4 * m / n,
                    "float32": 2 + 4.3 * m / n,
                    "thin64": 16 + 5 * m / n,
                },
                "error εκ, rtol ≥ 3e-3; Cholesky and triangular solves, for devices where eigh is slow",
                narrow=True,
            ),
            "gram_eigh64": Method(
                gram_eigh64,
                None,
                1e-10,
                lambda m, n: {"eigh64": 1, "float64": 0.8 * m / n, "float32": 0.8 + m / n, "thin64": 4 + 5 * m / n},
                "error uκ²: κ ≤ 1e6 at 1e-4",
                spectral=True,
            ),
            "svd": Method(
                svd,
                torch.float64,
                1e-13,
                lambda m, n: {"svd64": 0.5 + 0.5 * m / n, "float64": 6 + 5 * m / n},
                "error uκ",
                spectral=True,
            ),
            "svd_refined": Method(
                svd_refined,
                torch.float64,
                0.0,
                lambda m, n: {"svd64": 0.5 + 0.5 * m / n, "float64": 50 + 40 * m / n},
                "κ to 1e13, refined; rank-deficient matrices get the isometry on their range, not converged",
            ),
        },
        "general",
        0,
        plain=_plain,
        exact=_exact,
    )
)


@takes_complex("polar")
@differentiable(derivatives.POLAR, shapes=lambda a, **_: torch.empty_like(a), methods=POLAR.methods, spectral=True, a=2)
def polar_ex(
    a: Inexact[Tensor, "*b m n"],
    *,
    method: str = "auto",
    rtol: float | None = None,
    steps: int | None = None,
    certify: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Inexact[Tensor, "*b m n"], Certificate]:
    """`polar` with its certificate, never raising for a matrix's values.

    From `rtol=1e-2` up, `certify=False` with "auto" is for the direction of an optimizer's step, and no GPU is
    synchronized. It takes the cheaper of "newton_schulz" and "zolotarev", with steps, dtype and coefficients
    made for `rtol`: the root mean square of σ − 1 over the answer's singular values. Those of A below
    `direction.least_ratio` times the largest are not counted. `rtol=0.1` is about half the error of torch.optim.Muon's
    five steps.

    Args:
        a, method, rtol: as for `polar`.
        steps: the number of steps of `method="newton_schulz"`; 7 if None.
        certify: as for `polar`.
        dtype: of the products of `method="newton_schulz"`; float32 (float64 for float64) if None.
    Returns: the polar factor and its `Certificate`.
    Raises: ShapeError, DtypeError, InputError: for wrong arguments.
    Cost: as for `polar`.
    Source: as for `polar`.

    >>> q, certificate = polar_ex(torch.zeros(2, 3, 2), method="newton_schulz")
    >>> certificate.converged.tolist(), q.abs().max().item()
    ([False, False], 0.0)
    """
    check("polar", a)
    choose("polar", method, POLAR.methods)
    if steps is not None and steps < 1:
        raise InputError(f"polar: expected steps ≥ 1, got {steps}. Leave it out for {len(COEFFICIENTS)}.")
    if method == "newton_schulz":
        return _newton_schulz_ex(a, default_rtol(rtol, a.dtype), steps or len(COEFFICIENTS), certify, dtype)
    if not certify and method == "auto" and default_rtol(rtol, a.dtype) >= DIRECTION:
        value, chosen = direction(a, default_rtol(rtol, a.dtype))
        return value, _uncertified(value, chosen.method, chosen.steps)
    return evaluate(POLAR, a, method=method, rtol=rtol, certify=certify)


def _newton_schulz_ex(
    a: Tensor, rtol: float, steps: int, certify: bool, dtype: torch.dtype | None
) -> tuple[Tensor, Certificate]:
    """Newton–Schulz steps by name; it does not synchronize the device."""
    x = newton_schulz(a, steps=steps, dtype=dtype)
    if not certify:
        return x, _uncertified(x, "newton_schulz", steps)
    bound, residual = _estimate(x, _growth(steps), dtype or torch.promote_types(x.dtype, torch.float32))
    return x, verdict(
        bound,
        rtol,
        torch.where(residual.isfinite(), cert.NONE, cert.NOT_FINITE),
        methods=tuple(POLAR.methods),
        code=list(POLAR.methods).index("newton_schulz"),
        residual=residual,
        steps=steps,
        failure_probability=math.nan,
    )


def _uncertified(value: Tensor, method: str, steps: int) -> Certificate:
    methods, code = tuple(POLAR.methods), list(POLAR.methods).index(method)
    proof = uncertified(value.shape[:-2], value.device, methods=methods, code=code, steps=steps)
    finite = (
        largest_entry(value.reshape(proof.reason.numel(), *value.shape[-2:])).isfinite().reshape(proof.reason.shape)
    )
    return replace(proof, reason=torch.where(finite, proof.reason, cert.NOT_FINITE))


def polar(
    a: Inexact[Tensor, "*b m n"],
    *,
    method: str = "auto",
    rtol: float | None = None,
    steps: int = len(COEFFICIENTS),
    certify: bool = True,
    dtype: torch.dtype | None = None,
) -> Inexact[Tensor, "*b m n"]:
    """The nearest matrix with orthonormal columns (or rows): the polar factor U Vᵀ of A = U Σ Vᵀ.

    polar(A) = A (AᵀA)^(-1/2), the maximizer of tr(QᵀA) over orthonormal Q.

    Args:
        a: `(..., m, n)`.
        method: the name of a method (see docs/linalg.md), or "auto".
        rtol: the relative Frobenius error asked for; `certificate.RTOL` of the dtype if None.
        certify: whether to bound the error; if False, the value of the same route, and only seen failures raise. See
            `polar_ex`.
        steps, dtype: see `polar_ex`.
    Returns: `(..., m, n)`, in the dtype of `a`.
    Raises:
        ShapeError: where `a` has fewer than two dimensions.
        DtypeError: where `a` is not floating point, real or complex.
        InputError: for an unknown method, fewer than one step, or a negative rtol.
        ConvergenceError: where a matrix is rank-deficient, or the error bound is above rtol (`polar_ex` then returns
            the partial isometry on the range).
    Cost: in float32 products of the smaller side at 1024²: through the Gram matrix 11 in float32 (κ ≤ 100 at rtol 1e-3)
    or 21 in float64 (κ ≤ 1e6 at 1e-4), by the SVD about 60; "newton_schulz" 3 a step; "zolotarev", for a few per cent,
    7 (see `polar_ex` for the directions of optimizers). Accuracy: what `rtol` asks for, until κ nears 1e13; with
    `method="svd_refined"` one rounding of the dtype.
    Source: Higham, Functions of Matrices (2008), chapter 8; "newton_schulz": arXiv:2505.16932, algorithm 1;
    "zolotarev": Nakatsukasa and Freund, SIAM Review 58 (2016), §3.

    >>> polar(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
    tensor([[1., 0.],
            [0., 1.]])
    """
    value, certificate = polar_ex(a, method=method, rtol=rtol, steps=steps, certify=certify, dtype=dtype)
    require_converged("polar", certificate)
    return value
