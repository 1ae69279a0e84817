"""Classes of modules: which matrices their parameters hold, and what follows from the operation that applies them."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from gramian.layout import Layout, num_axes

__all__ = [
    "LAYERS",
    "OPERATIONS",
    "Layer",
    "Operation",
    "is_affine",
    "layer_of",
    "layout_of",
    "operation_of",
    "runs_as_its_class",
]

QKV = ("q", "k", "v")
LSTM_GATES, GRU_GATES = ("i", "f", "g", "o"), ("r", "z", "n")


class Operation(NamedTuple):
    """What follows from the operation that applies a weight.

    Args:
        gain: where the gain χ is measured: from the layer's `"input"`; from its `"output"`, where the input holds
            indices; or nowhere (`""`), since the layer has several matrices or inputs.
        init: the isometry of `gm.init.isometric_`: `"orthogonal"`, `"delta"` (orthogonal at the kernel's center), or
            none.
        factors: the two layers that replace one of low rank, a row of compression's table of forms; or none.
    """

    gain: Literal["input", "output", ""] = ""
    init: Literal["orthogonal", "delta", ""] = ""
    factors: Literal["linear", "convolution", "table", ""] = ""


OPERATIONS: dict[str, Operation] = {
    "linear": Operation(gain="input", init="orthogonal", factors="linear"),
    "convolution": Operation(gain="input", init="delta", factors="convolution"),
    "transposed convolution": Operation(gain="input", init="delta"),
    "embedding": Operation(gain="output", factors="table"),
    "bag of embeddings": Operation(),
    "bilinear": Operation(),
    "attention": Operation(),
    "recurrence": Operation(),
    "elementwise": Operation(),
    "unknown": Operation(),
}


@dataclass(frozen=True)
class Layer:
    """A row of the table of classes: which matrices a module's own parameters hold, and how they are applied.

    An operation with `init` or `factors` promises `y = W x + b`, or for a table `y = Wᵀ x`: one parameter `weight`,
    which holds one matrix (or one for each of a convolution's groups), and perhaps a `bias`. Layers that have more are
    left out by what needs the promise (`is_affine`), with the reason.

    Args:
        cls: a class of torch, or the name of a class of another library. Subclasses count.
        operation: a key of `OPERATIONS`.
        weights: layout by the parameter's name in the module (a pattern). An axis `g` is the module's attribute
            `groups`; where there are several groups of one input channel (axis `i`), the kernel is depthwise.
        parts: names of the fused matrices, by the same pattern.
        has: an attribute that tells a class known by name from others of the same name.
    """

    cls: type[nn.Module] | str
    operation: str
    weights: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    has: str = ""

    def __post_init__(self) -> None:
        assert self.operation in OPERATIONS, f"{self.cls}: no operation {self.operation!r} in {', '.join(OPERATIONS)}"

    def fits(self, cls: type, module: nn.Module) -> bool:
        """Whether this row is for `cls`, one of the classes of `module`."""
        if isinstance(self.cls, str):
            return cls.__name__ == self.cls and (not self.has or hasattr(module, self.has))
        return cls is self.cls

    def weight(self, local: str, ndim: int) -> tuple[str, tuple[str, ...], str] | None:
        """Layout, parts and pattern of a parameter; `None` if it holds no matrix.

        Args:
            local: its name in the module.
            ndim: its number of dimensions.
        """
        for known, layout in self.weights.items():
            if fnmatch.fnmatchcase(local, known) and ndim == num_axes(layout):
                return layout, self.parts.get(known, ()), known
        return None


_LINEAR = {"weight": "o i -> o i"}
_TABLE = {"weight": "v d -> v d"}

# First match wins, along the module's classes from the most derived.
LAYERS: tuple[Layer, ...] = (
    Layer("FalconLinear", "linear", _LINEAR),  # its forward is a Linear's, in other words
    Layer(nn.Linear, "linear", _LINEAR),
    Layer("Conv1D", "linear", {"weight": "i o -> o i"}, has="nf"),  # GPT-2's linear layer in transformers: (in, out)
    Layer("Linear", "linear", _LINEAR, has="weight_initializer"),  # torch_geometric's
    Layer("TransposedLinear", "linear", {"weight": "i o -> o i"}, has="in_features"),  # behind a factored table
    Layer(nn.Bilinear, "bilinear", {"weight": "b o i -> b o i"}),
    Layer(nn.Embedding, "embedding", _TABLE),
    Layer(nn.EmbeddingBag, "bag of embeddings", _TABLE),
    Layer(nn.Conv1d, "convolution", {"weight": "(g o) i w -> g o (i w)"}),
    Layer(nn.Conv2d, "convolution", {"weight": "(g o) i h w -> g o (i h w)"}),
    Layer(nn.Conv3d, "convolution", {"weight": "(g o) i d h w -> g o (i d h w)"}),
    Layer(nn.ConvTranspose1d, "transposed convolution", {"weight": "(g i) o w -> g (o w) i"}),
    Layer(nn.ConvTranspose2d, "transposed convolution", {"weight": "(g i) o h w -> g (o h w) i"}),
    Layer(nn.ConvTranspose3d, "transposed convolution", {"weight": "(g i) o d h w -> g (o d h w) i"}),
    Layer(
        nn.MultiheadAttention,
        "attention",
        {"in_proj_weight": "(three o) i -> three o i"} | {f"{part}_proj_weight": "o i -> o i" for part in QKV},
        {"in_proj_weight": QKV},
    ),
    Layer(nn.RNN, "recurrence", {"weight_*": "o i -> o i"}),
    Layer(nn.RNNCell, "recurrence", {"weight_*": "o i -> o i"}),
    Layer(
        nn.LSTM,
        "recurrence",
        {"weight_hr_*": "o i -> o i", "weight_*": "(four o) i -> four o i"},
        {"weight_*": LSTM_GATES},
    ),
    Layer(nn.LSTMCell, "recurrence", {"weight_*": "(four o) i -> four o i"}, {"weight_*": LSTM_GATES}),
    Layer(nn.GRU, "recurrence", {"weight_*": "(three o) i -> three o i"}, {"weight_*": GRU_GATES}),
    Layer(nn.GRUCell, "recurrence", {"weight_*": "(three o) i -> three o i"}, {"weight_*": GRU_GATES}),
    # Their parameters multiply or shift element by element, whatever their number of dimensions.
    Layer(nn.LayerNorm, "elementwise"),
    Layer(nn.RMSNorm, "elementwise"),
    Layer("GATConv", "elementwise"),  # torch_geometric's: a vector for each head, beside its linear layers
    Layer("GATv2Conv", "elementwise"),
)

_UNKNOWN = Layer("", "unknown")


def layer_of(module: nn.Module) -> Layer:
    """The row of a module's class, or of the first of its base classes that has one.

    Args:
        module: any module.

    Returns:
        A row of `LAYERS`; one without weights, of the operation `"unknown"`, where the table has none.

    Raises: nothing of its own.
    Cost: a look at each row for each base class.
    Source: the table.

    >>> layer_of(nn.Conv2d(1, 2, 3)).operation, layer_of(nn.ReLU()).operation
    ('convolution', 'unknown')
    """
    return next((row for row in _rows_of(type(module)) if not row.has or hasattr(module, row.has)), _UNKNOWN)


_looked_up: WeakKeyDictionary[type[nn.Module], tuple[Any, tuple[Layer, ...]]] = WeakKeyDictionary()


def _rows_of(kind: type[nn.Module]) -> tuple[Layer, ...]:
    """The rows for a class and its base classes, the most derived first; looked up once for each class and table."""
    known = _looked_up.get(kind)
    if known is None or known[0] is not LAYERS:
        rows = tuple(row for cls in kind.__mro__ for row in LAYERS if row.cls is cls or row.cls == cls.__name__)
        known = _looked_up[kind] = LAYERS, rows
    return known[1]


def layout_of(module: nn.Module, local: str = "weight", parameter: Tensor | None = None) -> Layout | None:
    """The layout of a module's own parameter, as its class alone tells; `None` where it holds no matrix.

    Args:
        module: of a class with a row.
        local: the parameter's name there.
        parameter: the tensor, where the module does not have it under that name (a parametrized weight).

    Returns:
        The layout, or `None`.

    Raises:
        ShapeError: the tensor does not have the shape that its class promises.

    Cost: no arithmetic.
    Source: the table.

    >>> layout_of(nn.Conv2d(4, 6, 3, groups=2)).matrices
    (2, 3, 18)
    """
    parameter = module.get_parameter(local) if parameter is None else parameter
    found = layer_of(module).weight(local, parameter.ndim)
    if found is None:
        return None
    pattern, parts, _ = found
    groups = getattr(module, "groups", 1) if "g" in pattern else 1
    if groups == 1:
        pattern = pattern.replace("(g o)", "o").replace("(g i)", "i").replace("-> g ", "-> ")
    return Layout(pattern, tuple(parameter.shape), {"g": groups} if groups > 1 else {}, parts)


def runs_as_its_class(module: nn.Module) -> bool:
    """Whether a module computes what its row says.

    It does not where a class derived from that of the row, or the module itself, has a forward of its own.

    Args:
        module: any module.

    Returns:
        `False` also where the table has no row.

    Raises: nothing of its own.
    Cost: as `layer_of`.
    Source: this library's own.

    >>> class Doubled(nn.Linear):
    ...     def forward(self, input):
    ...         return 2 * super().forward(input)
    >>> runs_as_its_class(nn.Linear(2, 2)), runs_as_its_class(Doubled(2, 2))
    (True, False)
    """
    row = layer_of(module)
    base = next((cls for cls in type(module).__mro__ if row.fits(cls, module)), None)
    if base is None or "forward" in vars(module):
        return False
    return all(getattr(type(module), name, None) is getattr(base, name, None) for name in ("forward", "__call__"))


def is_affine(module: nn.Module) -> bool:
    """Whether a module has one weight and perhaps a bias, and no other parameter, and computes as its class does.

    What initializes or replaces a layer as a whole wants that: another parameter would be lost.

    Args:
        module: any module.

    Returns:
        `False` also for a stack of matrices, but for the groups of a convolution; and for a parametrized weight.

    Raises: nothing of its own.
    Cost: as `layer_of`.
    Source: this library's own.

    >>> is_affine(nn.Linear(2, 2)), is_affine(nn.LSTM(2, 2))
    (True, False)
    """
    own = {name for name, _ in module.named_parameters(recurse=False)}
    if "weight" not in own or not own <= {"weight", "bias"} or not runs_as_its_class(module):
        return False
    layout = layout_of(module)
    return layout is not None and (len(layout.matrices) == 2 or layout.sides[0] == ("g",))


def operation_of(module: nn.Module) -> Operation:
    """What follows from the operation of a module: its gain, its initialization, its factors.

    Args:
        module: any module.

    Returns:
        A row of `OPERATIONS`.

    Raises: nothing of its own.
    Cost: as `layer_of`.
    Source: the table.

    >>> operation_of(nn.Linear(2, 2)).init, operation_of(nn.Conv2d(1, 1, 3)).init
    ('orthogonal', 'delta')
    """
    return OPERATIONS[layer_of(module).operation]
