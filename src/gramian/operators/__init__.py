"""A network's derivatives, measured without changing it: gains, Jacobians, and curvature as linear maps."""

from gramian.operators.curvature import Curvature, fisher, gauss_newton, hessian
from gramian.operators.jacobians import (
    Gain,
    LineCurvature,
    end_to_end_jacobian,
    layer_gains,
    line_curvature,
)
from gramian.operators.jacobians import (
    NoJacobian as NoJacobian,
)
from gramian.operators.jacobians import (
    leaves_of as leaves_of,
)
from gramian.operators.jacobians import (
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
