"""Parameters that only their name, shape and the model's config tell: fused projections, stacked experts, tables."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gramian.errors import ShapeError
from gramian.layers.classes import GRU_GATES, LSTM_GATES, QKV
from gramian.layers.roles import Role
from gramian.layout import Layout, num_axes

__all__ = ["KERNELS", "NAMED", "NameMatch", "NamedWeight", "config_of", "families", "find_named", "weight_name"]

GATE_UP = ("gate", "up")


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
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # their linear layers are (in, out)
_IN_OUT = ("llama4", "llama4_text", "gpt_oss", "experts in out")  # their stacked experts are (expert, in, out)

# First match wins; a row whose numbers are missing or do not fit is passed over.
NAMED: tuple[NamedWeight, ...] = (
    # fused one after the other: GPT-2 along the columns of (in, out), most others along the rows
    NamedWeight(
        "attn.c_attn.weight", "(h three d) i -> three (h d) i", QKV, "attention",
        models=("gpt_bigcode",), sizes={"h": "heads"}, square=True,
    ),
    NamedWeight("attn.c_attn.weight", "i (three o) -> three o i", QKV, "attention", square=True),
    NamedWeight("attn.c_attn.weight", "(three o) i -> three o i", QKV, "attention", square=True),
    NamedWeight("attn.c_proj.weight", "i o -> o i", kind="attention", models=_CONV1D),
    NamedWeight("mlp.c_fc.weight", "i o -> o i", kind="mlp", models=_CONV1D),
    NamedWeight("mlp.c_proj.weight", "i o -> o i", kind="mlp", models=_CONV1D),
    NamedWeight("Wqkv.weight", "(three o) i -> three o i", QKV, "attention", square=True),
    NamedWeight("attn.qkv.weight", "(three o) i -> three o i", QKV, "attention", square=True),
    NamedWeight("in_proj_weight", "(three o) i -> three o i", QKV, "attention", square=True),
    # GPT-NeoX and BLOOM interleave: for each head its q, k, v
    NamedWeight(
        "query_key_value.weight", "(h three d) i -> three (h d) i", QKV, "attention",
        models=("gpt_neox", "bloom"), sizes={"h": "heads"},
    ),
    # one after the other, with fewer key and value heads than queries: Phi-3, Qwen (1), ChatGLM
    NamedWeight("qkv_proj.weight", "o i -> o i", QKV, "attention", models=("phi3", "phi4_multimodal", ""), rows=_GQA),
    # CodeGen: for each of four cores its q, v, k
    NamedWeight(
        "qkv_proj.weight", "(four three d) i -> three (four d) i", ("q", "v", "k"), "attention",
        models=("codegen",), square=True,
    ),
    NamedWeight("query_key_value.weight", "o i -> o i", QKV, "attention", models=("chatglm",), rows=_GQA),
    # gates
    NamedWeight("gate_up_proj.weight", "(two o) i -> two o i", GATE_UP, "mlp"),
    NamedWeight("weight_[ih]h*", "(four o) i -> four o i", LSTM_GATES, "lstm", models=("lstm",)),
    NamedWeight("weight_[ih]h*", "(three o) i -> three o i", GRU_GATES, "gru", models=("gru",)),
    # stacked experts: gpt-oss interleaves gate and up, Llama 4 has one after the other, both (expert, in, out);
    # elsewhere (expert, out, in)
    NamedWeight("experts.gate_up_proj", "e i (o two) -> e two o i", GATE_UP, "experts", models=("gpt_oss",)),
    NamedWeight("experts.gate_up_proj", "e i (two o) -> e two o i", GATE_UP, "experts", models=_IN_OUT),
    NamedWeight("experts.down_proj", "e i o -> e o i", kind="experts", models=_IN_OUT),
    NamedWeight("experts.gate_up_proj", "e (two o) i -> e two o i", GATE_UP, "experts", sizes={"i": "width"}),
    NamedWeight(
        "experts.gate_up_proj", "e (two o) i -> e two o i", GATE_UP, "experts", models=("experts out in",)
    ),
    NamedWeight("experts.down_proj", "e o i -> e o i", kind="experts", sizes={"o": "width"}),
    NamedWeight("experts.down_proj", "e o i -> e o i", kind="experts", models=("experts out in",)),
    NamedWeight("experts.w[123]", "e o i -> e o i", kind="experts"),
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


class NameMatch(NamedTuple):
    """What the table of names says of a tensor.

    Args:
        layout: which matrices it holds; `None` where it holds none.
        kind: a word for the report.
        role: where the name tells it.
        reason: which row said so.
    """

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
) -> NameMatch | None:
    """What the first row of the table of names that fits says of a tensor.

    Args:
        name, shape: of the tensor.
        config: of the model; see `config_of`. `model_type` is its family.
        like: a layout that is known from the class of the module, whose orientation must be kept.
        rows: of the table.

    Returns:
        `NameMatch`, or `None` where no row fits.

    Raises: nothing of its own.
    Cost: a look at each row.
    Source: the table.

    >>> find_named("h.0.attn.c_attn.weight", (8, 24), {}).layout.labels
    ('q', 'k', 'v')
    """
    for row in rows:
        family = str(config.get("model_type", ""))
        if not row.matches(name) or (row.models and family not in row.models) or name.endswith("bias"):
            continue
        if not row.layout:
            return NameMatch(None, row.kind, row.role, f"named {row.name}: acts element by element")
        numbers = {axis: _number(key, config) for axis, key in row.sizes.items()}
        counts = [_product(keys, config) for keys in row.rows]
        if None in numbers.values() or None in counts or num_axes(row.layout) != len(shape):
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
        return NameMatch(
            layout, row.kind, row.role, f"named {row.name}" + (f": {', '.join(row.parts)}" * bool(row.parts))
        )
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
    """Which family each tensor of a file belongs to, as far as shapes tell: `lstm`, `gru` or `gpt2`.

    LSTMs and GRUs show in their hidden-to-hidden weights, (gates · h, h), or (gates · h, p) beside a projection (p, h);
    GPT-2's layers, which are (in, out), in its fused projection (n, 3 n); whether stacked experts are (out, in) or
    (in, out), in the shapes of a gate_up_proj and its down_proj.

    Args:
        shapes: of the tensors, by name.

    Returns:
        A function from a tensor's name to its family, empty where shapes do not tell.

    Raises: nothing of its own.
    Cost: a look at each name.
    Source: torch's and transformers' shapes.

    >>> families({"rnn.weight_hh_l0": (20, 5)})("rnn.weight_ih_l0")
    'lstm'
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
    for name, up in shapes.items():
        module, _, local = name.rpartition(".")
        down = shapes.get(f"{module}.down_proj", ())
        if local == "gate_up_proj" and len(up) == len(down) == 3:
            fits = {"experts out in": (2 * down[2], down[1]), "experts in out": (down[2], 2 * down[1])}
            found = [family for family, wanted in fits.items() if up[1:] == wanted]
            if len(found) == 1:
                recurrent[module] = found[0]
    return lambda name: recurrent.get(name.rpartition(".")[0], "gpt2" if in_out else "")


def config_of(holder: Any) -> dict[str, Any]:
    """The numbers of a config as a dict; those of a text model that is nested in it come up.

    Args:
        holder: a mapping, as `config.json` has it, or an object with attributes, as transformers has it.

    Returns:
        A new dict; `model_type` is in it where the object's class has one.

    Raises: nothing of its own.
    Cost: one copy.
    Source: transformers' configs.

    >>> config_of({"hidden_size": 8, "text_config": {"num_attention_heads": 2}})["num_attention_heads"]
    2
    """
    config = _as_dict(holder)
    inner = config.get("text_config")
    return config if inner is None or isinstance(inner, str) else config | _as_dict(inner)


def _as_dict(holder: Any) -> dict[str, Any]:
    try:  # a config is the user's object, and may do anything
        if isinstance(holder, Mapping):
            return dict(holder)
        known = dict(vars(holder)) if hasattr(holder, "__dict__") else {}
        kind = getattr(holder, "model_type", None)
    except Exception:
        return {}
    return known | ({"model_type": kind} if isinstance(kind, str) else {})


def _number(key: str, config: Mapping[str, Any]) -> int | None:
    values = (config.get(name) for name in CONFIG_KEYS[key])
    value = next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)
    if value is None and key == "kv":
        return _number("heads", config)
    if value is None and key == "dim":
        width, heads = _number("width", config), _number("heads", config)
        return width // heads if width and heads else None
    return value


def _product(keys: str, config: Mapping[str, Any]) -> int | None:
    numbers = [_number(key, config) for key in keys.split("*")]
    return None if None in numbers else math.prod(int(n or 0) for n in numbers)


def weight_name(name: str) -> str:
    """The name that a weight has without its parametrization (`torch.nn.utils.parametrize`).

    Args:
        name: of a parameter.

    Returns:
        The name; the same where it is not parametrized.

    Raises: nothing of its own.
    Cost: none to speak of.
    Source: torch's names.

    >>> weight_name("0.parametrizations.weight.original1")
    '0.weight'
    """
    return re.sub(r"(^|\.)parametrizations\.(\w+)\.original\d?$", r"\1\2", name)
