"""Rules for causes, one file for each origin: the data, the loss, the wiring, parameters, modules, the optimizer.

Each rule takes a `Context`, which holds a few watched training steps, and yields at most one finding for a code.
`ordered` puts causes before what follows from them.
"""

from gramian.inspection.causes.adapters import RULES as ADAPTING
from gramian.inspection.causes.arguments import RULES as ARGUMENTS
from gramian.inspection.causes.context import Context
from gramian.inspection.causes.data import RULES as DATA
from gramian.inspection.causes.derivatives import RULES as DERIVATIVES
from gramian.inspection.causes.folding import ordered
from gramian.inspection.causes.freezing import RULES as FREEZING
from gramian.inspection.causes.gates import RULES as GATES
from gramian.inspection.causes.heads import RULES as HEADS
from gramian.inspection.causes.inputs import RULES as INPUTS
from gramian.inspection.causes.labels import RULES as LABELS
from gramian.inspection.causes.leaks import RULES as LEAKS
from gramian.inspection.causes.likelihoods import RULES as LIKELIHOODS
from gramian.inspection.causes.loss import RULES as LOSS
from gramian.inspection.causes.loss_slopes import RULES as PROFILES
from gramian.inspection.causes.masks import RULES as MASKS
from gramian.inspection.causes.mismatched_rows import RULES as JOINED
from gramian.inspection.causes.modules import RULES as MODULES
from gramian.inspection.causes.norm_sizes import RULES as NORM_SIZES
from gramian.inspection.causes.norms import RULES as NORMS
from gramian.inspection.causes.optimizer import RULES as STEPPING
from gramian.inspection.causes.outputs import RULES as OUTPUTS
from gramian.inspection.causes.own_losses import RULES as SUPERVISED
from gramian.inspection.causes.pairs import RULES as PAIRS
from gramian.inspection.causes.parameters import RULES as PARAMETERS
from gramian.inspection.causes.precision import RULES as PRECISION
from gramian.inspection.causes.reshapes import RULES as RESHAPES
from gramian.inspection.causes.routers import RULES as ROUTERS
from gramian.inspection.causes.scale_free import RULES as SCALE_FREE
from gramian.inspection.causes.small_changes import RULES as PROBED
from gramian.inspection.causes.wiring import RULES as REACH
from gramian.inspection.causes.zero_products import RULES as ZEROED

__all__ = ["CAUSES", "Context", "ordered"]

CAUSES = (
    *INPUTS, *JOINED, *DATA, *LABELS, *LOSS, *LIKELIHOODS, *DERIVATIVES, *SUPERVISED, *PROFILES, *OUTPUTS, *PAIRS,
    *PROBED, *ARGUMENTS, *LEAKS, *RESHAPES, *HEADS, *ZEROED, *REACH, *FREEZING, *ADAPTING, *PARAMETERS, *SCALE_FREE,
    *MASKS, *MODULES, *GATES, *ROUTERS, *NORMS, *NORM_SIZES, *PRECISION, *STEPPING,
)  # fmt: skip
