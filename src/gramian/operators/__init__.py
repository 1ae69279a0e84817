"""A network's derivatives, measured without changing it: gains, Jacobians, and curvature as linear maps."""

from gramian.operators.curvature import Curvature, fisher, gauss_newton, hessian
from gramian.operators.jacobians import (
    Gain,
    LineCurvature,
    NoJacobian as NoJacobian,
    end_to_end_jacobian,
    layer_gains,
    leaves_of as leaves_of,
    line_curvature,
    try_jacobian as try_jacobian,
)

__all__ = [
    "Curvature",
    "Gain",
    "LineCurvature",
    "end_to_end_jacobian",
    "fisher",
    "gauss_newton",
    "hessian",
    "layer_gains",
    "line_curvature",
]
