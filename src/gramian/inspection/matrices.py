"""Which matrices does each tensor of a checkpoint hold? From names, shapes and a `config.json`, without the model.

What cannot be known is not guessed: such a tensor is one plain matrix, rows × the rest, and its kind says so.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from gramian.block import Layout
from gramian.checkpoint import Checkpoint
from gramian.checkpoint.formats import Entry
from gramian.errors import InputError, ShapeError

__all__ = ["ARCHITECTURES", "Architecture", "Holding", "find_holdings", "read_config", "read_layouts"]

Role = Literal["embedding", "hidden", "head"]
QKV, GATES, GRU, GATE_UP = ("q", "k", "v"), ("i", "f", "g", "o"), ("r", "z", "n"), ("gate", "up")


@dataclass(frozen=True)
class Architecture:
    """What a tensor holds where its name ends in `name`, it has the pattern's axes, and `models` (if any) fit.

    `layout` is an einops pattern whose right side ends in rows and columns; `sizes` names the config's key for an axis;
    `parts` are the names along the first axis. `rows`, in place of a layout, names the config's products of keys by
    which the rows are cut into unequal parts: `"heads*dim"`.
    """

    name: str
    layout: str
    parts: tuple[str, ...] = ()
    kind: str = ""
    models: tuple[str, ...] = ()
    sizes: Mapping[str, str] = field(default_factory=dict)
    rows: tuple[str, ...] = ()


# Keys under which configs keep the same number. `heads` and the like are then used in `sizes` and `rows`.
CONFIG_KEYS: dict[str, tuple[str, ...]] = {
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
    "kv": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"),
    "width": ("hidden_size", "n_embd", "d_model", "dim"),
    "dim": ("head_dim", "kv_channels", "d_kv"),
}

# The one table of architectures. First match wins; a row whose numbers are missing or do not fit is passed over.
ARCHITECTURES: tuple[Architecture, ...] = (
    # GPT-2 keeps (in, out) and fuses q, k, v along the columns
    Architecture("attn.c_attn.weight", "i (three o) -> three o i", QKV, "attention", ("gpt2", "")),
    Architecture("attn.c_proj.weight", "i o -> o i", kind="attention", models=("gpt2",)),
    Architecture("mlp.c_fc.weight", "i o -> o i", kind="mlp", models=("gpt2",)),
    Architecture("mlp.c_proj.weight", "i o -> o i", kind="mlp", models=("gpt2",)),
    # GPT-NeoX and BLOOM interleave: for each head its q, k, v
    Architecture(
        "query_key_value.weight", "(h three d) i -> three (h d) i", QKV, "attention", ("gpt_neox", "bloom"),
        {"h": "heads"},
    ),
    # one after the other, with fewer key and value heads than queries: Phi-3, Qwen (1), ChatGLM, InternLM2 variants
    Architecture("qkv_proj.weight", "", QKV, "attention", rows=("heads*dim", "kv*dim", "kv*dim")),
    Architecture("query_key_value.weight", "", QKV, "attention", ("chatglm",), rows=("heads*dim", "kv*dim", "kv*dim")),
    Architecture("Wqkv.weight", "(three o) i -> three o i", QKV, "attention"),
    Architecture("attn.qkv.weight", "(three o) i -> three o i", QKV, "attention"),
    Architecture("in_proj_weight", "(three o) i -> three o i", QKV, "attention"),
    # gates
    Architecture("gate_up_proj.weight", "(two o) i -> two o i", GATE_UP, "mlp"),
    Architecture("weight_[ih]h_l*", "(four o) i -> four o i", GATES, "lstm", ("lstm",)),
    Architecture("weight_[ih]h_l*", "(three o) i -> three o i", GRU, "gru", ("gru",)),
    # stacked experts: Llama 4 and gpt-oss keep (expert, in, out)
    Architecture("experts.gate_up_proj", "e i (two o) -> (e two) o i", kind="experts"),
    Architecture("experts.down_proj", "e i o -> e o i", kind="experts"),
    Architecture("experts.*", "e o i -> e o i", kind="experts"),
    # convolutions, by their number of axes alone
    Architecture("weight", "o i w -> o (i w)", kind="conv1d"),
    Architecture("weight", "o i h w -> o (i h w)", kind="conv2d"),
    Architecture("weight", "o i d h w -> o (i d h w)", kind="conv3d"),
)  # fmt: skip

# Buffers that hold no weights.
NOT_WEIGHTS = ("*attn.bias", "*attention.bias", "*masked_bias", "*inv_freq", "*relative_position_index", "*causal_mask")

_EMBEDDINGS = re.compile(r"(embed|wte|wpe|embedding|tok_emb|pos_emb)", re.IGNORECASE)
_HEADS = re.compile(r"(^|\.)(lm_head|head|classifier|output|score|embed_out|fc_out)\.weight$")
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Holding:
    """The matrices of one tensor: names, shape of each, kind and role; `split` gives them one by one."""

    entry: Entry
    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    kind: str
    role: Role
    layout: Layout | None = None
    rows: tuple[int, ...] = ()

    def split(self, tensor: Tensor) -> Iterator[Tensor]:
        """Yield the matrices, in the order of `names`; views where strides allow."""
        if self.rows:
            yield from tensor.split(self.rows)
        elif self.layout is not None:
            matrices = self.layout.split(tensor)
            yield from matrices.flatten(0, -3) if matrices.ndim > 2 else matrices[None]
        else:
            yield _squeezed(tensor)

    @property
    def kernel(self) -> bool:
        """Whether the tensor is a two-dimensional convolution's kernel (o, i, h, w)."""
        return self.kind == "conv2d"


def find_holdings(
    checkpoint: Checkpoint, layouts: Mapping[str, Any] | None = None
) -> tuple[list[Holding], dict[str, list[str]]]:
    """Return the tensors that hold matrices, embedding to head, and the names of the others by the reason.

    Args:
        checkpoint: an open one; only its entries are read, and a `config.json` beside it.
        layouts: override by name pattern, `{"*.c_attn.weight": "i (three o) -> three o i"}`, or with sizes,
            `{"*.qkv.weight": ["(h o) i -> h o i", {"h": 12}]}`; `"skip"` leaves a tensor out.

    Raises:
        InputError: an override that matches nothing, or does not fit what it matches.
    """
    config, overrides, used = read_config(checkpoint.path), dict(layouts or {}), set()
    holdings: list[Holding] = []
    left_out: dict[str, list[str]] = {}
    family = _recurrent(checkpoint)
    for name, entry in checkpoint.entries.items():
        reason = _reason(entry)
        if not reason:
            pattern = next((p for p in overrides if fnmatch.fnmatchcase(name, p)), None)
            if pattern is None:
                holdings.append(_hold(entry, config, family.get(name.rpartition(".")[0], "")))
                continue
            used.add(pattern)
            if overrides[pattern] != "skip":
                holdings.append(_overridden(entry, pattern, overrides[pattern]))
                continue
            reason = "left out by --layouts"
        if reason != "vector":
            left_out.setdefault(reason, []).append(name)
    unused = [pattern for pattern in overrides if pattern not in used]
    if unused:
        some = next(iter(checkpoint.entries))
        raise InputError(f"layouts: {unused[0]!r} matches no matrix of {checkpoint.path}; names are like {some!r}")
    return sorted(holdings, key=lambda h: _place(h.entry.name, h.role)), left_out


def read_config(path: Path) -> dict[str, Any]:
    """Return the `config.json` in a checkpoint's folder, or nothing; text models nested in a config come to the top."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(config, dict):
        return {}
    inner = config.get("text_config")
    return config | (inner if isinstance(inner, dict) else {})


def read_layouts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the overrides of a JSON file: name pattern to layout, `[layout, sizes]`, or `"skip"`."""
    try:
        layouts = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Give a JSON file of layouts.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}). Expected {{'name pattern': 'layout'}}.") from None
    if not isinstance(layouts, dict):
        raise InputError(f"{path}: expected {{'name pattern': 'layout'}}, got a {type(layouts).__name__}.")
    return layouts


def _reason(entry: Entry) -> str:
    """Why a tensor holds no matrix to look at; empty where it does."""
    if entry.tied_to:
        return f"the same memory as {entry.tied_to}"
    if entry.kind == "empty":
        return "of size 0"
    if entry.kind != "float":
        return f"{entry.kind} ({entry.dtype})"
    if any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in NOT_WEIGHTS) and len(entry.shape) > 1:
        return "a buffer, not weights"
    return "vector" if sum(length > 1 for length in entry.shape) < 2 and len(entry.shape) < 2 else ""


def _recurrent(checkpoint: Checkpoint) -> dict[str, str]:
    """Tell LSTMs and GRUs from their hidden-to-hidden weights, (gates · h, h): by module name."""
    family = {}
    for name, entry in checkpoint.entries.items():
        module, _, local = name.rpartition(".")
        if local.startswith("weight_hh_l") and len(entry.shape) == 2 and entry.shape[1]:
            gates, rest = divmod(*entry.shape)
            family[module] = {4: "lstm", 3: "gru"}.get(gates, "") if not rest else ""
    return family


def _hold(entry: Entry, config: Mapping[str, Any], family: str) -> Holding:
    model = family or str(config.get("model_type", ""))
    for row in ARCHITECTURES:
        if not fnmatch.fnmatchcase(entry.name.rpartition(".")[2], row.name) and not fnmatch.fnmatchcase(
            f".{entry.name}", f"*.{row.name}"
        ):
            continue
        if row.models and model not in row.models:
            continue
        if row.rows:
            rows = [_product(key, config) for key in row.rows]
            if None not in rows and len(entry.shape) == 2 and sum(rows) == entry.shape[0]:  # type: ignore[arg-type]
                return _named(entry, row.parts, row.kind, rows=tuple(int(r or 0) for r in rows))
            continue
        sizes = {axis: _number(key, config) for axis, key in row.sizes.items()}
        if None in sizes.values() or len(_left(row.layout)) != len(entry.shape):
            continue
        try:
            layout = Layout(row.layout, entry.shape, {axis: int(size or 0) for axis, size in sizes.items()})
        except ShapeError:
            continue
        return _named(entry, row.parts, row.kind, layout)
    if len(entry.shape) == 2 or sum(length > 1 for length in entry.shape) <= 2:
        return _named(entry, (), "embedding" if _role(entry.name) == "embedding" else "matrix")
    return _named(entry, (), f"{len(entry.shape)}-D tensor, rows × the rest")


def _overridden(entry: Entry, pattern: str, value: Any) -> Holding:
    text, sizes = value if isinstance(value, list | tuple) and len(value) == 2 else (value, {})
    if not isinstance(text, str) or not isinstance(sizes, Mapping):
        raise InputError(f"layouts: {pattern!r} must map to a layout, [layout, sizes] or 'skip', got {value!r}")
    try:
        return _named(entry, (), "layouts", Layout(text, entry.shape, dict(sizes)))
    except (ShapeError, TypeError) as error:
        raise InputError(f"layouts: {pattern!r} on {entry.name}: {error}") from None


def _named(
    entry: Entry, parts: Sequence[str], kind: str, layout: Layout | None = None, rows: tuple[int, ...] = ()
) -> Holding:
    if rows:
        shapes = [(r, entry.shape[1]) for r in rows]
    elif layout is not None:
        *many, m, n = layout.matrices
        shapes = [(m, n)] * max(1, _count(many))
    else:
        shapes = [_matrix_shape(entry.shape)]
    labels = parts if len(parts) == len(shapes) else [str(k) for k in range(len(shapes))]
    names = [entry.name] if len(shapes) == 1 else [f"{entry.name}[{label}]" for label in labels]
    return Holding(entry, tuple(names), tuple(shapes), kind, _role(entry.name), layout, rows)


def _count(lengths: Sequence[int]) -> int:
    total = 1
    for length in lengths:
        total *= length
    return total


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    lengths = [length for length in shape if length > 1] if len(shape) > 2 else list(shape)
    lengths = lengths if len(lengths) >= 2 else [*lengths, *[1] * (2 - len(lengths))]
    return lengths[0], _count(lengths[1:])


def _squeezed(tensor: Tensor) -> Tensor:
    return tensor.reshape(_matrix_shape(tuple(tensor.shape)))


def _left(layout: str) -> list[str]:
    return re.findall(r"\([^)]*\)|\w+", layout.partition("->")[0])


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
    return None if None in numbers else _count([int(n or 0) for n in numbers])


def _role(name: str) -> Role:
    if _HEADS.search(name):
        return "head"
    return "embedding" if _EMBEDDINGS.search(name) else "hidden"


def _place(name: str, role: Role) -> tuple[int, list[tuple[int, int | str]]]:
    """Order embeddings, the body with `layers.2` before `layers.10`, then heads."""
    words = [(0, int(word)) if word.isdigit() else (1, word) for word in _DIGITS.split(name) if word]
    return {"embedding": 0, "hidden": 1, "head": 2}[role], words  # type: ignore[return-value]
