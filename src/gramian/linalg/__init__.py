"""Functions of (..., m, n) tensors that certify their own answers.

Every function `f` returns its value and raises `ConvergenceError` where the certificate of any matrix fails; `f_ex`
returns `(value, Certificate)` and raises only for a wrong argument.
"""
# ruff: noqa: F403

from gramian.linalg.certificate import Certificate
from gramian.linalg.components import PCA, pca, pca_ex
from gramian.linalg.condition import cond, cond_ex
from gramian.linalg.density import (
    SpectralDensity,
    spectral_density,
    spectral_density_ex,
    spectral_radius,
    spectral_radius_ex,
)
from gramian.linalg.eigenvalues import eigvalsh_top, eigvalsh_top_ex
from gramian.linalg.engine.function import FUNCTIONS
from gramian.linalg.linear_map import LinearMap
from gramian.linalg.lowrank import svd_lowrank, svd_lowrank_ex
from gramian.linalg.norm import spectral_norm, spectral_norm_ex
from gramian.linalg.products import matmul, matmul_ex, second_moment, syrk
from gramian.linalg.scaled import matrix_power_scaled, matrix_power_scaled_ex, product_scaled, product_scaled_ex
from gramian.linalg.shrinkage import svd_shrink, svd_shrink_ex

# The table of matrix functions, one row for the file of each: the import registers what the file defines.
# isort: split
from gramian.linalg.exponential import *
from gramian.linalg.inverse import *
from gramian.linalg.inverse_root import *
from gramian.linalg.least_squares import lstsq, lstsq_ex
from gramian.linalg.linear_system import *
from gramian.linalg.logarithm import *
from gramian.linalg.polar_factor import *
from gramian.linalg.pseudoinverse import *
from gramian.linalg.pseudoinverse import RankedCertificate
from gramian.linalg.sign import *
from gramian.linalg.singular import *
from gramian.linalg.square_root import *

__all__ = [
    "PCA",
    "Certificate",
    "LinearMap",
    "RankedCertificate",
    "SpectralDensity",
    "cond",
    "cond_ex",
    "eigvalsh_top",
    "eigvalsh_top_ex",
    "lstsq",
    "lstsq_ex",
    "matmul",
    "matmul_ex",
    "matrix_power_scaled",
    "matrix_power_scaled_ex",
    "pca",
    "pca_ex",
    "product_scaled",
    "product_scaled_ex",
    "second_moment",
    "spectral_density",
    "spectral_density_ex",
    "spectral_norm",
    "spectral_norm_ex",
    "spectral_radius",
    "spectral_radius_ex",
    "svd_lowrank",
    "svd_lowrank_ex",
    "svd_shrink",
    "svd_shrink_ex",
    "syrk",
]
__all__ += [name for function in FUNCTIONS for name in (function, f"{function}_ex")]  # pyright: ignore[reportUnsupportedDunderAll]


def __dir__() -> list[str]:
    """The public names alone: files beside them have names, such as `norm`, that one would take for functions."""
    return __all__
