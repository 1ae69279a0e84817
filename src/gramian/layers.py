"""What layers are: the one table that blocks, optimizers, initialization, capture, compression and files ask.

Three kinds of rows. `LAYERS` is for a class of modules: how its parameters hold matrices and which operation applies
them. `OPERATIONS` says what follows from the operation: what the layer's gain means, how it is initialized and how it
is factored. `NAMED` is for a parameter that only its name, shape and the model's config tell: fused projections,
stacked experts, position tables. A checkpoint has names and shapes but no classes, so files rest on `NAMED` alone.

Classes of libraries that gramian does not depend on are matched by the name of the class, and never imported.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from gramian.errors import ShapeError
from gramian.layout import Layout, axes_of

__all__ = [
    "LAYERS",
    "NAMED",
    "OPERATIONS",
    "Layer",
    "NamedWeight",
    "Operation",
    "Role",
    "config_of",
    "families",
    "find_head",
    "find_named",
    "layer_of",
    "layout_of",
    "operation_of",
    "role_by_name",
    "runs_as_its_class",
    "weight_name",
]

Role = Literal["embedding", "hidden", "head", "elementwise"]
"""`"embedding"`: a table of rows that are looked up. `"head"`: the last matrix. `"elementwise"`: it multiplies entry by
entry or channel by channel (depthwise kernels). `"hidden"`: all other matrices."""

QKV, GATE_UP = ("q", "k", "v"), ("gate", "up")
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
    factors: Literal["linear", "convolution", ""] = ""


OPERATIONS: dict[str, Operation] = {
    "linear": Operation(gain="input", init="orthogonal", factors="linear"),
    "convolution": Operation(gain="input", init="delta", factors="convolution"),
    "transposed convolution": Operation(gain="input"),
    "embedding": Operation(gain="output"),
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

    Args:
        cls: a class of torch, or the name of a class of another library. Subclasses count.
        operation: a key of `OPERATIONS`.
        weights: layout by the parameter's name in the module (a pattern). In a convolution's layout `g` is the module's
            number of groups.
        parts: names of the fused matrices, by the same pattern.
        has: an attribute that tells a class known by name from others of the same name.
    """

    cls: type[nn.Module] | str
    operation: str
    weights: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    has: str = ""

    def fits(self, cls: type, module: nn.Module) -> bool:
        """Whether this row is for `cls`, one of the classes of `module`."""
        if isinstance(self.cls, str):
            return cls.__name__ == self.cls and (not self.has or hasattr(module, self.has))
        return cls is self.cls

    def weight(self, local: str, ndim: int) -> tuple[str, tuple[str, ...], str] | None:
        """Layout, parts and pattern of the parameter that the module calls `local`; `None` if it holds no matrix."""
        for known, layout in self.weights.items():
            if fnmatch.fnmatchcase(local, known) and ndim == len(axes_of(layout.partition("->")[0])):
                return layout, self.parts.get(known, ()), known
        return None


_LINEAR = {"weight": "o i -> o i"}
_TABLE = {"weight": "v d -> v d"}

# First match wins, along the module's classes from the most derived.
LAYERS: tuple[Layer, ...] = (
    Layer(nn.Linear, "linear", _LINEAR),
    Layer("Conv1D", "linear", {"weight": "i o -> o i"}, has="nf"),  # GPT-2's linear layer in transformers: (in, out)
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
)

_UNKNOWN = Layer("", "unknown")


def layer_of(module: nn.Module) -> Layer:
    """The row of a module's class, or of the first of its base classes that has one.

    >>> layer_of(nn.Conv2d(1, 2, 3)).operation, layer_of(nn.ReLU()).operation
    ('convolution', 'unknown')
    """
    for cls in type(module).__mro__:
        for row in LAYERS:
            if row.fits(cls, module):
                return row
    return _UNKNOWN


def layout_of(module: nn.Module, local: str = "weight", parameter: Tensor | None = None) -> Layout | None:
    """The layout of a module's own parameter, as its class alone tells; `None` where it holds no matrix.

    Args:
        module: of a class with a row.
        local: the parameter's name there.
        parameter: the tensor, where the module does not have it under that name (a parametrized weight).

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
    """Whether the module computes what its row says: no class derived from that of the row has a forward of its own."""
    row = layer_of(module)
    base = next((cls for cls in type(module).__mro__ if row.fits(cls, module)), None)
    return base is not None and getattr(type(module), "forward", None) is getattr(base, "forward", None)


def operation_of(module: nn.Module) -> Operation:
    """What follows from the operation of a module: its gain, its initialization, its factors."""
    return OPERATIONS[layer_of(module).operation]


# ---- parameters known by name ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NamedWeight:
    """A row of the table of names: what a tensor holds whose name ends in `name`, where everything else fits too.

    Args:
        name: the end of the tensor's name, a pattern: `"attn.qkv.weight"`.
        layout: an einops pattern. With no layout, the tensor holds no matrix.
        parts: names of the fused matrices.
        kind: a word for the report.
        role: where the name tells it.
        models: the config's `model_type`, or a family that `families` found; empty for any.
        sizes: the config's number for an axis of the layout, by one of `CONFIG_KEYS`: `{"h": "heads"}`.
        rows: for fused matrices of unequal size, their rows as products of such numbers: `"heads*dim"`.
        square: whether every fused matrix must be square.
    """

    name: str
    layout: str = ""
    parts: tuple[str, ...] = ()
    kind: str = "matrix"
    role: Role | None = None
    models: tuple[str, ...] = ()
    sizes: Mapping[str, str] = field(default_factory=dict)
    rows: tuple[str, ...] = ()
    square: bool = False

    def matches(self, name: str) -> bool:
        """Whether a tensor of that name is meant."""
        return fnmatch.fnmatchcase(f".{name}", f"*.{self.name}")


# Keys under which configs keep the same number.
CONFIG_KEYS: dict[str, tuple[str, ...]] = {
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
    "kv": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"),
    "width": ("hidden_size", "n_embd", "d_model", "dim"),
    "dim": ("head_dim", "kv_channels", "d_kv"),
}

_GQA = ("heads*dim", "kv*dim", "kv*dim")
_IN_OUT = ("llama4", "llama4_text", "gpt_oss")  # their stacked experts are (expert, in, out)

# First match wins; a row whose numbers are missing or do not fit is passed over.
NAMED: tuple[NamedWeight, ...] = (
    # fused one after the other: GPT-2 along the columns of (in, out), most others along the rows
    NamedWeight("attn.c_attn.weight", "i (three o) -> three o i", QKV, "attention", square=True),
    NamedWeight("attn.c_attn.weight", "(three o) i -> three o i", QKV, "attention", square=True),
    NamedWeight("attn.c_proj.weight", "i o -> o i", kind="attention", models=("gpt2",)),
    NamedWeight("mlp.c_fc.weight", "i o -> o i", kind="mlp", models=("gpt2",)),
    NamedWeight("mlp.c_proj.weight", "i o -> o i", kind="mlp", models=("gpt2",)),
    NamedWeight("Wqkv.weight", "(three o) i -> three o i", QKV, "attention"),
    NamedWeight("attn.qkv.weight", "(three o) i -> three o i", QKV, "attention"),
    NamedWeight("in_proj_weight", "(three o) i -> three o i", QKV, "attention"),
    # GPT-NeoX and BLOOM interleave: for each head its q, k, v
    NamedWeight(
        "query_key_value.weight", "(h three d) i -> three (h d) i", QKV, "attention",
        models=("gpt_neox", "bloom"), sizes={"h": "heads"},
    ),
    # one after the other, with fewer key and value heads than queries: Phi-3, Qwen (1), ChatGLM
    NamedWeight("qkv_proj.weight", "o i -> o i", QKV, "attention", rows=_GQA),
    NamedWeight("query_key_value.weight", "o i -> o i", QKV, "attention", models=("chatglm",), rows=_GQA),
    # gates
    NamedWeight("gate_up_proj.weight", "(two o) i -> two o i", GATE_UP, "mlp"),
    NamedWeight("weight_[ih]h*", "(four o) i -> four o i", LSTM_GATES, "lstm", models=("lstm",)),
    NamedWeight("weight_[ih]h*", "(three o) i -> three o i", GRU_GATES, "gru", models=("gru",)),
    # stacked experts: gpt-oss interleaves gate and up, Llama 4 has one after the other, both (expert, in, out);
    # elsewhere (expert, out, in)
    NamedWeight("experts.gate_up_proj", "e i (o two) -> e two o i", GATE_UP, "experts", models=("gpt_oss",)),
    NamedWeight("experts.gate_up_proj", "e i (two o) -> e two o i", GATE_UP, "experts", models=(*_IN_OUT, "")),
    NamedWeight("experts.down_proj", "e i o -> e o i", kind="experts", models=(*_IN_OUT, "")),
    NamedWeight("experts.gate_up_proj", "e (two o) i -> e two o i", GATE_UP, "experts", sizes={"i": "width"}),
    NamedWeight("experts.*", "e o i -> e o i", kind="experts"),
    NamedWeight("input_linear.weight", "e (two o) i -> e two o i", GATE_UP, "experts", sizes={"i": "width"}),
    NamedWeight("output_linear.weight", "e o i -> e o i", kind="experts", sizes={"o": "width"}),
    # tables of positions and tokens that are plain parameters
    NamedWeight("pos*_embed*", "1 v d -> v d", kind="embedding", role="embedding"),
    NamedWeight("relative_position_bias_table", "v d -> v d", kind="embedding", role="embedding"),
    # entry by entry
    NamedWeight("A_log", role="elementwise"),
)  # fmt: skip

# For files alone, which have no classes: a kernel by its number of axes. Groups and transposition cannot be known.
KERNELS: tuple[NamedWeight, ...] = (
    NamedWeight("weight", "o i w -> o (i w)", kind="conv1d"),
    NamedWeight("weight", "o i h w -> o (i h w)", kind="conv2d"),
    NamedWeight("weight", "o i d h w -> o (i d h w)", kind="conv3d"),
)


class Found(NamedTuple):
    """What the table of names says of a tensor. `layout` is `None` where it holds no matrix."""

    layout: Layout | None
    kind: str
    role: Role | None
    reason: str


def find_named(
    name: str,
    shape: tuple[int, ...],
    config: Mapping[str, Any],
    *,
    like: str = "",
    rows: Sequence[NamedWeight] = NAMED,
) -> Found | None:
    """What the first row of the table of names that fits says of a tensor.

    Args:
        name, shape: of the tensor.
        config: of the model; see `config_of`. `model_type` is its family.
        like: a layout that is known from the class of the module, whose orientation must be kept.
        rows: of the table.

    >>> find_named("h.0.attn.c_attn.weight", (8, 24), {}).layout.labels
    ('q', 'k', 'v')
    """
    for row in rows:
        family = str(config.get("model_type", ""))
        if not row.matches(name) or (row.models and family not in row.models):
            continue
        if not row.layout:
            return Found(None, row.kind, row.role, f"named {row.name}: acts element by element")
        numbers = {axis: _number(key, config) for axis, key in row.sizes.items()}
        counts = [_product(keys, config) for keys in row.rows]
        if None in numbers.values() or None in counts or len(axes_of(row.layout.partition("->")[0])) != len(shape):
            continue
        sizes = {axis: int(number or 0) for axis, number in numbers.items()}
        try:
            layout = Layout(row.layout, shape, sizes, row.parts, tuple(int(count or 0) for count in counts))
        except ShapeError:
            continue
        if row.square and layout.matrices[-2] != layout.matrices[-1]:
            continue
        if like and not _same_orientation(layout, like):
            continue
        return Found(layout, row.kind, row.role, f"named {row.name}" + (f": {', '.join(row.parts)}" * bool(row.parts)))
    return None


def _same_orientation(layout: Layout, like: str) -> bool:
    """Whether the columns of both layouts lie along the same dimension of the tensor."""

    def column_dims(other: Layout) -> list[int]:
        return [i for i, names in enumerate(other.dims) if set(names) & set(other.sides[2])]

    try:
        return column_dims(layout) == column_dims(Layout(like, layout.shape))
    except ShapeError:
        return False


def families(shapes: Mapping[str, tuple[int, ...]]) -> Callable[[str], str]:
    """Which family a tensor belongs to, as far as shapes tell: `lstm`, `gru` or `gpt2`; empty where they do not.

    LSTMs and GRUs show in their hidden-to-hidden weights, (gates · h, h), or (gates · h, p) beside a projection (p, h);
    GPT-2's layers, which are (in, out), in its fused projection (n, 3 n). Returns a function of the tensor's name.
    """
    recurrent: dict[str, str] = {}
    in_out = False
    for name, shape in shapes.items():
        module, _, local = name.rpartition(".")
        if len(shape) != 2 or 0 in shape:
            continue
        if local.startswith("weight_hh"):
            projection = shapes.get(name.replace("weight_hh", "weight_hr"), ())
            gates, rest = divmod(shape[0], projection[1] if len(projection) == 2 else shape[1])
            recurrent[module] = {4: "lstm", 3: "gru"}.get(gates, "") if not rest else ""
        in_out |= name.endswith("attn.c_attn.weight") and shape[1] == 3 * shape[0]
    return lambda name: recurrent.get(name.rpartition(".")[0], "gpt2" if in_out else "")


def config_of(holder: Any) -> dict[str, Any]:
    """The numbers of a config, be it a dict or an object as transformers has it; text models nested in it come up.

    >>> config_of({"hidden_size": 8, "text_config": {"num_attention_heads": 2}})["num_attention_heads"]
    2
    """
    if not isinstance(holder, Mapping):
        known = vars(holder) if hasattr(holder, "__dict__") else {}
        kind = getattr(holder, "model_type", None)
        holder = known | ({"model_type": kind} if isinstance(kind, str) else {})
    config = dict(holder)
    inner = config.get("text_config")
    return config if inner is None or isinstance(inner, str) else config | config_of(inner)


def _number(key: str, config: Mapping[str, Any]) -> int | None:
    value = next((config[name] for name in CONFIG_KEYS[key] if isinstance(config.get(name), int)), None)
    if value is None and key == "kv":
        return _number("heads", config)
    if value is None and key == "dim":
        width, heads = _number("width", config), _number("heads", config)
        return width // heads if width and heads else None
    return value


def _product(keys: str, config: Mapping[str, Any]) -> int | None:
    numbers = [_number(key, config) for key in keys.split("*")]
    return None if None in numbers else math.prod(int(n or 0) for n in numbers)


# ---- roles -----------------------------------------------------------------------------------------------------------

_EMBEDDINGS = re.compile(
    r"(^|[._])(\w*embed\w*|wte|wpe|tok_emb|pos_emb|positions?|shared|relative_attention_bias)(\.weight)?$",
    re.IGNORECASE,
)
_HEADS = re.compile(
    r"^(\w+\.)?(lm_head|heads?|classifier|score|embed_out|fc_out|proj_out)(\.head|\.fc|\.\d+)?(\.weight)?$"
    r"|^(output|fc|logits)(\.weight)?$"
)


def role_by_name(name: str, shape: tuple[int, ...], has_bias: bool) -> Role:
    """`"embedding"` or `"hidden"`, from a tensor's name. A layer with a bias is no table, whatever its name.

    >>> role_by_name("model.embed_tokens.weight", (32, 8), has_bias=False)
    'embedding'
    """
    table = len(shape) == 2 and not has_bias and _EMBEDDINGS.search(name) and not _HEADS.search(name)
    return "embedding" if table else "hidden"


def weight_name(name: str) -> str:
    """The name that a weight has without its parametrization (`torch.nn.utils.parametrize`).

    >>> weight_name("0.parametrizations.weight.original1")
    '0.weight'
    """
    return re.sub(r"(^|\.)parametrizations\.(\w+)\.original\d?$", r"\1\2", name)


def find_head(names: Sequence[Sequence[str]], roles: Sequence[Role], *, last: bool) -> int | None:
    """Which matrix is the head: the last whose name says so, or else the last of all; `None` where there is none.

    Args:
        names: of each matrix, all the names that a tied one has.
        roles: of each; an embedding or an element-wise kernel is no head.
        last: whether the last matrix is the head where no name says so: not if the head is tied to an embedding.
    """
    hidden = [i for i, role in enumerate(roles) if role == "hidden"]
    if len(names) < 2 or not hidden:
        return None
    named = [i for i in hidden if any(_HEADS.search(name) for name in names[i])]
    return named[-1] if named else hidden[-1] if last else None
