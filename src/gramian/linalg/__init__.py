"""Functions of (..., m, n) tensors that certify their own answers.

Every function `f` returns its value and raises `ConvergenceError` where the certificate of any matrix fails; `f_ex`
returns `(value, Certificate)` and raises only for a wrong argument.
"""

from gramian.linalg.certificate import Certificate
from gramian.linalg.components import PCA, pca, pca_ex, svd_shrink, svd_shrink_ex
from gramian.linalg.condition import cond, cond_ex
from gramian.linalg.density import (
    SpectralDensity,
    spectral_density,
    spectral_density_ex,
    spectral_radius,
    spectral_radius_ex,
)
from gramian.linalg.extremes import spectral_norm, spectral_norm_ex
from gramian.linalg.inverses import inv, inv_ex, solve, solve_ex
from gramian.linalg.linear_map import LinearMap
from gramian.linalg.lowrank import svd_lowrank, svd_lowrank_ex
from gramian.linalg.polar_factor import polar, polar_ex
from gramian.linalg.products import matmul, matmul_ex, second_moment, syrk
from gramian.linalg.roots import inv_root, inv_root_ex, sqrtm, sqrtm_ex
from gramian.linalg.scaled import matrix_power_scaled, matrix_power_scaled_ex, product_scaled, product_scaled_ex
from gramian.linalg.singular import svdvals, svdvals_ex

__all__ = [
    "PCA",
    "Certificate",
    "LinearMap",
    "SpectralDensity",
    "cond",
    "cond_ex",
    "inv",
    "inv_ex",
    "inv_root",
    "inv_root_ex",
    "matmul",
    "matmul_ex",
    "matrix_power_scaled",
    "matrix_power_scaled_ex",
    "pca",
    "pca_ex",
    "polar",
    "polar_ex",
    "product_scaled",
    "product_scaled_ex",
    "second_moment",
    "solve",
    "solve_ex",
    "spectral_density",
    "spectral_density_ex",
    "spectral_norm",
    "spectral_norm_ex",
    "spectral_radius",
    "spectral_radius_ex",
    "sqrtm",
    "sqrtm_ex",
    "svd_lowrank",
    "svd_lowrank_ex",
    "svd_shrink",
    "svd_shrink_ex",
    "svdvals",
    "svdvals_ex",
    "syrk",
]
