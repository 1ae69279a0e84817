"""What layers are: the one table that blocks, optimizers, initialization, capture, compression and files ask.

Three kinds of rows. `LAYERS` is for a class of modules: how its parameters hold matrices and which operation applies
them. `OPERATIONS` says what follows from the operation: what the layer's gain means, how it is initialized and how it
is factored. `NAMED` is for a parameter that only its name, shape and the model's config tell: fused projections,
stacked experts, position tables. A checkpoint has names and shapes but no classes, so files rest on `NAMED` alone.

Classes of libraries that gramian does not depend on are matched by the name of the class, and never imported.
"""

from gramian.layers.classes import (
    LAYERS,
    OPERATIONS,
    Layer,
    Operation,
    is_affine,
    layer_of,
    layout_of,
    operation_of,
    runs_as_its_class,
)
from gramian.layers.configs import config_of, declared_family, families
from gramian.layers.names import KERNELS, NAMED, NamedWeight, NameMatch, find_named
from gramian.layers.roles import Role, find_head, role_by_name, weight_name

__all__ = [
    "KERNELS",
    "LAYERS",
    "NAMED",
    "OPERATIONS",
    "Layer",
    "NameMatch",
    "NamedWeight",
    "Operation",
    "Role",
    "config_of",
    "declared_family",
    "families",
    "find_head",
    "find_named",
    "is_affine",
    "layer_of",
    "layout_of",
    "operation_of",
    "role_by_name",
    "runs_as_its_class",
    "weight_name",
]
