"""Parameters that only their name, shape and the model's config tell: fused projections, stacked experts, tables."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from gramian.errors import ShapeError
from gramian.layers.classes import GRU_GATES, LSTM_GATES, QKV
from gramian.layers.configs import number, product
from gramian.layers.roles import Role
from gramian.layout import Layout, num_axes

__all__ = ["KERNELS", "NAMED", "NameMatch", "NamedWeight", "find_named"]

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
        models: the config's `model_type`, or a family that `families` or `declared_family` found; empty for any.
        when: what else the config must say.
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
    when: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)
    rows: tuple[str, ...] = ()
    square: bool = False

    def matches(self, name: str, config: Mapping[str, Any]) -> bool:
        """Whether a tensor is meant.

        Args:
            name: of the tensor.
            config: of the model.
        """
        if not _ends_with(name, self.name):
            return False
        in_family = not self.models or str(config.get("model_type", "")) in self.models
        return in_family and all(config.get(key) == value for key, value in self.when.items())


_GQA = ("heads*dim", "kv*dim", "kv*dim")  # fewer key and value heads than queries
_MQA = ("heads*dim", "dim", "dim")  # one key and value head
_MAMBA, _LFM2 = ("mamba", "falcon_mamba"), ("lfm2", "lfm2_moe")
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # their linear layers are (in, out)
_IN_OUT = ("llama4", "llama4_text", "gpt_oss", "experts in out")  # their stacked experts are (expert, in, out)
_OUT_IN = ("experts out in", "experts out in interleaved", "nemotron_h")
_INTERLEAVED = ("gpt_oss", "experts in out interleaved")  # these too, gate and up in turn

# Learned vectors that are looked up, or are tokens themselves: positions, queries, registers.
_TOKENS = (
    "pos", "pe", "ape", "*_ape", "pos_emb*", "pos_enc*", "position", "positional", "pos_table", "position_table",
    "pos*_embed*", "position*_enc*", "*_positions", "positions", "rel_pos_*", "height_rel", "width_rel", "emb_rel_?",
    "*_tokens", "*register_token", "group_token", "latents*", "query", "*_query", "*_queries",
    "relative_position_bias_table", "relative_attention_bias", "codevectors",
)  # fmt: skip

# First match wins; a row whose numbers are missing or do not fit is passed over.
#
# Fused parts of unequal size stand in a stack of the largest equal parts, and `rows` tells which belong together: for
# four heads of queries to two of keys and values, the queries are two matrices.
NAMED: tuple[NamedWeight, ...] = (
    # fused one after the other: GPT-2 along the columns of (in, out), most others along the rows
    NamedWeight(
        "attn.c_attn.weight", "(h three d) i -> three (h d) i", QKV, "attention",
        models=("gpt_bigcode",), sizes={"h": "heads"}, square=True,
    ),
    NamedWeight(
        "attn.c_attn.weight", "(n d) i -> n d i", QKV, "attention",
        models=("gpt_bigcode",), when={"multi_query": True}, sizes={"d": "dim"}, rows=_MQA,
    ),
    NamedWeight("attn.c_attn.weight", "i (three o) -> three o i", QKV, "attention", square=True),
    NamedWeight("attn.c_attn.weight", "(three o) i -> three o i", QKV, "attention", square=True),
    NamedWeight("attn.c_proj.weight", "i o -> o i", kind="attention", models=_CONV1D),
    NamedWeight("mlp.c_fc.weight", "i o -> o i", kind="mlp", models=_CONV1D),
    NamedWeight("mlp.c_proj.weight", "i o -> o i", kind="mlp", models=_CONV1D),
    NamedWeight("Wqkv.weight", "(three o) i -> three o i", QKV, "attention", square=True),
    NamedWeight("att_proj.weight", "(three o) i -> three o i", QKV, "attention", models=("bark",), square=True),
    NamedWeight("attn.qkv.weight", "(three o) i -> three o i", QKV, "attention", square=True),
    NamedWeight("in_proj_weight", "(three o) i -> three o i", QKV, "attention", square=True),
    # GPT-NeoX and its kin interleave: for each head its q, k, v
    NamedWeight(
        "query_key_value.weight", "(h three d) i -> three (h d) i", QKV, "attention",
        models=("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon"), sizes={"h": "heads"},
    ),
    NamedWeight(
        "query_key_value.weight", "(h three d) i -> three (h d) i", QKV, "attention",
        models=("falcon",), when={"multi_query": False, "new_decoder_architecture": False}, sizes={"h": "heads"},
    ),
    NamedWeight(
        "attn.in_proj.weight", "(h three d) i -> three (h d) i", QKV, "attention",
        models=("deberta",), sizes={"h": "heads"}, square=True,
    ),
    NamedWeight(
        "qkv_proj.weight", "(h three d) i -> three (h d) i", QKV, "attention", models=("minimax",), sizes={"h": "heads"}
    ),
    # Falcon, for each head of keys and values: its queries, key and value; or all queries, one key, one value
    NamedWeight(
        "query_key_value.weight", "(kv n d) i -> n (kv d) i", QKV, "attention", models=("falcon",),
        when={"new_decoder_architecture": True}, sizes={"kv": "kv", "d": "dim"}, rows=_GQA,
    ),
    NamedWeight(
        "query_key_value.weight", "(n d) i -> n d i", QKV, "attention", models=("falcon",),
        when={"multi_query": True, "new_decoder_architecture": False}, sizes={"d": "dim"}, rows=_MQA,
    ),
    # one after the other, with fewer key and value heads than queries: Phi-3, ChatGLM
    NamedWeight(
        "qkv_proj.weight", "(n kv d) i -> n (kv d) i", QKV, "attention",
        models=("phi3", "phi4_multimodal", ""), sizes={"kv": "kv", "d": "dim"}, rows=_GQA,
    ),
    NamedWeight(
        "query_key_value.weight", "(n kv d) i -> n (kv d) i", QKV, "attention",
        models=("chatglm",), sizes={"kv": "kv", "d": "dim"}, rows=_GQA,
    ),
    # CodeGen: for each of four cores its q, v, k
    NamedWeight(
        "qkv_proj.weight", "(four three d) i -> three (four d) i", ("q", "v", "k"), "attention",
        models=("codegen",), square=True,
    ),
    # XLNet and Funnel keep heads as an axis
    NamedWeight("rel_attn.[qkvr]", "i h d -> (h d) i", kind="attention", models=("xlnet",)),
    NamedWeight("rel_attn.o", "o h d -> o (h d)", kind="attention", models=("xlnet",)),
    NamedWeight("r_kernel", "i h d -> (h d) i", kind="attention", models=("funnel",)),
    # gates
    NamedWeight("gate_up_proj.weight", "(two o) i -> two o i", GATE_UP, "mlp"),
    NamedWeight("mlp.Wi.weight", "(two o) i -> two o i", ("up", "gate"), "mlp", models=("modernbert",)),
    NamedWeight("mixer.in_proj.weight", "(two o) i -> two o i", ("x", "gate"), "mamba", models=_MAMBA),
    # the coefficients of a Mamba's recurrence, which are the axis c: steps, what enters the state, what is read from it
    *(NamedWeight(f"{mixer}.{name}_proj.weight", "c i -> c i", kind="mamba")
      for mixer in ("mixer", "mamba") for name in ("x", "dt")),
    NamedWeight("conv.in_proj.weight", "(three o) i -> three o i", ("b", "c", "x"), "conv", models=_LFM2),
    NamedWeight("weight_[ih]h*", "(four o) i -> four o i", LSTM_GATES, "lstm", models=("lstm",)),
    NamedWeight("weight_[ih]h*", "(three o) i -> three o i", GRU_GATES, "gru", models=("gru",)),
    # stacked experts: gpt-oss interleaves gate and up, Llama 4 has one after the other, both (expert, in, out);
    # elsewhere (expert, out, in)
    NamedWeight("experts.gate_up_proj", "e i (o two) -> e two o i", GATE_UP, "experts", models=_INTERLEAVED),
    NamedWeight("experts.gate_up_proj", "e i (two o) -> e two o i", GATE_UP, "experts", models=_IN_OUT),
    NamedWeight("experts.down_proj", "e i o -> e o i", kind="experts", models=(*_IN_OUT, *_INTERLEAVED)),
    NamedWeight("experts.gate_up_proj", "e (two o) i -> e two o i", GATE_UP, "experts", sizes={"i": "width"}),
    NamedWeight(
        "experts.gate_up_proj", "e (two o) i -> e two o i", GATE_UP, "experts", models=("experts out in",)
    ),
    NamedWeight(
        "experts.gate_up_proj", "e (o two) i -> e two o i", GATE_UP, "experts", models=_OUT_IN[1:2]
    ),
    NamedWeight("experts.up_proj", "e o i -> e o i", kind="experts", models=_OUT_IN),
    NamedWeight("experts.down_proj", "e o i -> e o i", kind="experts", sizes={"o": "width"}),
    NamedWeight("experts.down_proj", "e o i -> e o i", kind="experts", models=_OUT_IN),
    NamedWeight("experts.w[123]", "e o i -> e o i", kind="experts"),
    NamedWeight("input_linear.weight", "e (two o) i -> e two o i", GATE_UP, "experts", sizes={"i": "width"}),
    NamedWeight("output_linear.weight", "e o i -> e o i", kind="experts", sizes={"o": "width"}),
    # heads that are matrices of their own
    NamedWeight("*_gate_weight", "h i o -> h o i", kind="gate", models=("recurrent_gemma",)),
    NamedWeight("[dx]*_proj_weight", "h c i -> h c i", kind="mamba", models=("zamba",)),
    # plain parameters that stand at the right of a product
    NamedWeight("mm_input_projection_weight", "i o -> o i", kind="projection"),
    NamedWeight("prompts_visual_projection", "i o -> o i", kind="projection"),
    # tables of positions and tokens that are plain parameters
    *(NamedWeight(name, "v d -> v d", kind="embedding", role="embedding") for name in _TOKENS),
    *(NamedWeight(name, "1 v d -> v d", kind="embedding", role="embedding") for name in _TOKENS),
    NamedWeight("seg_embed", "v h d -> v (h d)", kind="embedding", role="embedding", models=("xlnet", "funnel")),
    # an adapter of an embedding: its table lies on its side
    NamedWeight("lora_embedding_A*", "d v -> v d", kind="embedding", role="embedding"),
    # entry by entry
    NamedWeight("A_log", role="elementwise"),
    NamedWeight("D", role="elementwise", models=("zamba",)),
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
        is_kernel: whether it was taken for the kernel of a plain convolution, by its number of axes.
    """

    layout: Layout | None
    kind: str
    role: Role | None
    reason: str
    is_kernel: bool = False


def find_named(
    name: str,
    shape: tuple[int, ...],
    config: Mapping[str, Any],
    *,
    like: str = "",
    rows: Sequence[NamedWeight] | None = None,
) -> NameMatch | None:
    """What the first row of the table of names that fits says of a tensor.

    Args:
        name, shape: of the tensor.
        config: of the model; see `config_of`. `model_type` is its family.
        like: a layout that is known from the class of the module, whose orientation must be kept.
        rows: of the table; by default `NAMED`.

    Returns:
        `NameMatch`, or `None` where no row fits.

    Raises: nothing of its own.
    Cost: a look at each row.
    Source: the table.

    >>> find_named("h.0.attn.c_attn.weight", (8, 24), {}).layout.labels
    ('q', 'k', 'v')
    """
    for row in _rows_named(name) if rows is None else rows:
        if not row.matches(name, config) or _is_bias(name):
            continue
        if not row.layout:
            return NameMatch(None, row.kind, row.role, f"named {row.name}: acts element by element")
        numbers = {axis: number(key, config) for axis, key in row.sizes.items()}
        counts = [product(keys, config) for keys in row.rows]
        if None in numbers.values() or None in counts or num_axes(row.layout) != len(shape):
            continue
        sizes = {axis: int(value or 0) for axis, value in numbers.items()}
        try:
            layout = Layout(row.layout, shape, sizes, row.parts, tuple(int(count or 0) for count in counts))
        except ShapeError:
            continue
        if row.square and layout.matrices[-2] != layout.matrices[-1]:
            continue
        if like and not _same_orientation(layout, like):
            continue
        parts = f": {', '.join(row.parts)}" if row.parts else ""
        return NameMatch(layout, row.kind, row.role, f"named {row.name}{parts}", row in KERNELS)
    if like:
        return None
    local = name.rpartition(".")[2]
    if _is_bias(name):
        return NameMatch(None, "bias", "elementwise", f"{local}: a bias, added entry by entry")
    if sum(length > 1 for length in shape) < 2 and (len(shape) != 2 or not local.endswith("weight")):
        return NameMatch(None, "vector", "elementwise", f"{local}: a vector, with axes of length 1")
    return None


@lru_cache(maxsize=4096)
def _rows_named(name: str) -> tuple[NamedWeight, ...]:
    """The rows of the table for a name, which is asked for at each look at a model."""
    return tuple(row for row in NAMED if _ends_with(name, row.name))


def _ends_with(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(f".{name}", f"*.{pattern}")


def _is_bias(name: str) -> bool:
    """Whether a tensor is added to a layer's outputs, by its name: not so the tables from which biases are read."""
    local = name.rpartition(".")[2]
    words = local.split("_")
    return (
        bool({"bias", "biases"} & set(words)) and words[-1] not in ("weight", "table") and not local.startswith("rel")
    )


def _same_orientation(layout: Layout, like: str) -> bool:
    """Whether the columns of both layouts lie along the same dimension of the tensor."""

    def column_dims(other: Layout) -> list[int]:
        return [i for i, names in enumerate(other.dims) if set(names) & set(other.sides[2])]

    try:
        return column_dims(layout) == column_dims(Layout(like, layout.shape))
    except ShapeError:
        return False
