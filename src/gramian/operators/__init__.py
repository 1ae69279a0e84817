"""A network's derivatives, measured without changing it: gains, Jacobians, and curvature as linear maps."""

from gramian.operators.curvature import Curvature, fisher, gauss_newton, hessian
from gramian.operators.cuts import leaves_of as leaves_of
from gramian.operators.gains import Gain, layer_gains
from gramian.operators.jacobians import NoJacobian as NoJacobian
from gramian.operators.jacobians import end_to_end_jacobian
from gramian.operators.jacobians import try_jacobian as try_jacobian
from gramian.operators.line import LineCurvature, line_curvature

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
