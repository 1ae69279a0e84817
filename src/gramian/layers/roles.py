"""The role of a matrix in its network: a table, a hidden layer, the head; as far as names tell."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

__all__ = ["Role", "find_head", "role_by_name"]

Role = Literal["embedding", "hidden", "head", "elementwise"]
"""`"embedding"`: a table of rows that are looked up. `"head"`: the last matrix. `"elementwise"`: it multiplies entry by
entry or channel by channel (depthwise kernels). `"hidden"`: all other matrices."""

_EMBEDDINGS = re.compile(
    r"(^|[._])(\w*embed\w*|wte|wpe|tok_emb|pos_emb|positions?|shared|relative_attention_bias)(\.weight)?$",
    re.IGNORECASE,
)
_HEADS = re.compile(
    r"^(\w+\.)?(lm_head|heads?|classifier|score|embed_out|fc_out|proj_out)(\.head|\.fc|\.out_proj|\.\d+)?(\.weight)?$"
    r"|^(output|fc|logits|decoder)(\.weight)?$"
)
# A projection into a space of embeddings has no scores, even where it comes last.
_PROJECTIONS = re.compile(r"(^|[._])projection(\.weight)?$")


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
    named = [i for i in hidden if any(_HEADS.search(name) for name in names[i])]
    if named or not last or any(_PROJECTIONS.search(name) for name in names[hidden[-1]]):
        return named[-1] if named else None
    return hidden[-1]
