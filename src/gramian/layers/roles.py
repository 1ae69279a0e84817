"""The role of a parameter in its network: a table, a hidden layer, the head, coefficients; as far as names tell."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

__all__ = ["Role", "acts_by_channel", "find_head", "role_by_name", "weight_name"]

Role = Literal["embedding", "hidden", "head", "elementwise"]
"""`"embedding"`: a table of rows that are looked up. `"head"`: the last matrix. `"elementwise"`: it multiplies entry by
entry or channel by channel (depthwise kernels). `"hidden"`: all other matrices."""

_EMBEDDINGS = re.compile(
    r"(^|[._])(\w*embed\w*|wte|wpe|tok_emb|pos_emb|positions?|shared|relative_attention_bias)(\.weight)?$",
    re.IGNORECASE,
)
_HEADS = re.compile(
    r"^(?!encoder\.)(\w+\.)?(lm_head|heads?|classifier|score|embed_out|fc_out|proj_out(_2)?|conv_out)"
    r"(\.head|\.fc|\.out_proj|\.\d+)?(\.weight)?$"
    r"|^(output|fc|logits|decoder)(\.weight)?$"
)
# What may come last and has no scores: a projection into a space of embeddings, an adapter of another layer.
_NO_HEADS = re.compile(r"(^|[._])(projection|lora_[AB](\.\w+)?)(\.weight)?$")

# Words in the names of parameters that stand in matrix products, and of those that act channel by channel.
_MATRIX = re.compile(
    r"weights?|kernels?|matrix|proj\w*|lora|fn|heads?|out|output|logits|classifier|linear|down|up|left|right|"
    r"factors?|w[a-z]?|[uv]"
)
_COEFFICIENTS = re.compile(
    r"mu|maa|faaaa|scales?|shifts?|gamma|beta|alpha|lambdas?|gains?|ls|decays?|modulat\w+|coeff?s?|"
    r"coefficients?|temperatures?|slopes?|sinks?|log|imag|real|std|means?|dt"
)
FEW = 8  # rows or columns: so few, and four times as long, are vectors in a stack rather than a matrix

# What torch's parametrizations and PEFT's adapters put into the names of weights.
_WRAPPERS = ((r"(^|\.)parametrizations\.(\w+)\.original\d?$", r"\1\2"), (r"\.base_layer\.", "."),
             (r"\.(modules_to_save\.\w+|original_module)\.", "."), (r"^base_model\.model\.", ""))  # fmt: skip


def role_by_name(name: str, shape: tuple[int, ...], has_bias: bool) -> Role:
    """The role that a tensor's name tells: `"embedding"` or `"hidden"`.

    A layer with a bias is no table, whatever its name.

    Args:
        name, shape: of the tensor.
        has_bias: whether its layer has a bias.

    Returns:
        The role.

    Raises: nothing of its own.
    Cost: none to speak of.
    Source: the names that transformers, timm and torchvision use.

    >>> role_by_name("model.embed_tokens.weight", (32, 8), has_bias=False)
    'embedding'
    """
    table = len(shape) == 2 and not has_bias and _EMBEDDINGS.search(name) and not _HEADS.search(name)
    return "embedding" if table else "hidden"


def acts_by_channel(name: str, shape: tuple[int, int]) -> str:
    """Why a parameter of two axes, of which no row of the table knows, is taken for coefficients and not for a matrix.

    Coefficients multiply or shift channel by channel: what mixes a token with the one before, the scale of a layer, the
    shifts and scales of a modulation. Their names say so; or else they are few vectors in a stack, and nothing in the
    name says that it is a matrix.

    Args:
        name, shape: of the parameter.

    Returns:
        The reason; empty for a matrix.

    Cost: none to speak of.
    Source: the parameters of transformers, timm and diffusers, beside what their forward passes do with them.

    >>> acts_by_channel("blocks.0.mu", (3, 64)), acts_by_channel("scale_shift_table", (6, 64))
    ('named mu: acts channel by channel', 'named scale_shift_table: acts channel by channel')
    >>> acts_by_channel("states", (3, 64)), acts_by_channel("mix", (64, 64)), acts_by_channel("inner", (32, 64))
    ('3 vectors in a stack', '', '')
    """
    parts = re.sub(r"(\.\d+)+$", "", name).split(".")
    words, beside = _words(parts[-1]), _words(".".join(parts[-2:-1]))
    if any(_MATRIX.fullmatch(word) for word in words):
        return ""
    if any(_COEFFICIENTS.fullmatch(word) for word in words):
        return f"named {parts[-1]}: acts channel by channel"
    if any(_MATRIX.fullmatch(word) for word in beside):  # as adapters' `hada_w1_a.default`
        return ""
    few, many = sorted(shape)
    return f"{few} vectors in a stack" if few <= FEW and many >= 4 * few else ""


def _words(name: str) -> list[str]:
    return [word.rstrip("0123456789").lower() for word in re.split(r"_|(?<=[a-z])(?=[A-Z])", name)]


def find_head(names: Sequence[Sequence[str]], roles: Sequence[Role], *, last: bool) -> int | None:
    """Which matrix is the head: the last whose name says so, or else the last of all; `None` where there is none.

    Args:
        names: of each matrix, all the names that a tied one has.
        roles: of each; an embedding or an element-wise kernel is no head.
        last: whether the last matrix is the head where no name says so: not if the head is tied to an embedding.

    Returns:
        Its place, or `None`.

    Raises: nothing of its own.
    Cost: a look at each name.
    Source: the names that transformers, timm and torchvision use.

    >>> find_head([["0.weight"], ["2.weight"]], ["hidden", "hidden"], last=True)
    1
    """
    hidden = [i for i, role in enumerate(roles) if role == "hidden"]
    if len(names) < 2 or not hidden:
        return None
    plain = [[weight_name(name) for name in of_one] for of_one in names]
    named = [i for i in hidden if any(_HEADS.search(name) for name in plain[i])]
    if named or not last or any(_NO_HEADS.search(name) for name in plain[hidden[-1]]):
        return named[-1] if named else None
    return hidden[-1]


def weight_name(name: str) -> str:
    """The name that a weight has without what wraps it: torch's parametrizations, or the adapters of PEFT.

    Args:
        name: of a parameter.

    Returns:
        The name; the same where nothing wraps it.

    Raises: nothing of its own.
    Cost: none to speak of.
    Source: torch's and PEFT's names.

    >>> weight_name("0.parametrizations.weight.original1")
    '0.weight'
    >>> weight_name("base_model.model.h.0.attn.c_attn.base_layer.weight")
    'h.0.attn.c_attn.weight'
    """
    for pattern, plain in _WRAPPERS:
        name = re.sub(pattern, plain, name)
    return name
