"""What the table says of parameters that come as a list of names and shapes, without modules."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import Any

from gramian.layers.configs import families
from gramian.layers.kernels import TRANSPOSED, Kernels
from gramian.layers.lookup import Lookup
from gramian.layers.names import KERNELS, NAMED, NameMatch, find_named
from gramian.layers.roles import Role, acts_by_channel, find_head, role_by_name, weight_name
from gramian.layout import Layout

__all__ = ["depthwise_kernels", "look_up_listed", "look_up_name", "natural_order", "settle_roles"]

_DIGITS = re.compile(r"(\d+)")

# What the first kernel of a network is called, and what a depthwise one is.
_FIRST = re.compile(r"(^|[._])(stem|conv_?[01]|patch_embed\w*|input\w*|first\w*|conv_in)([._]|$)")
_DEPTHWISE = re.compile(r"(^|[._])(dw|depth_?wise|dw_?conv|conv_?dw)([._\d]|$)")


def look_up_listed(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Lookup]:
    """What names and shapes tell of each parameter, as they do in a file: its layout, role, and why.

    The last matrix is the head where no name says so and no table is in the list, as in a file; but not where the list
    has nothing but matrices: somebody has chosen those.

    Args:
        shapes: by name, in the order of the model, names without the prefixes of wrappers.

    Returns:
        A `Lookup` by name; its layout is `None` where the parameter holds no matrix.

    Cost: a look at each row of the table for each name.
    Source: the names that transformers, timm and torchvision use.

    >>> found = look_up_listed({"wte.weight": (9, 4), "h.0.attn.c_attn.weight": (4, 12), "lm_head.weight": (9, 4)})
    >>> [answer.role for answer in found.values()], found["h.0.attn.c_attn.weight"].layout.parts
    (['embedding', 'hidden', 'head'], ('q', 'k', 'v'))
    """
    family, kernels = families(shapes), Kernels(shapes)
    found = {name: look_up_name(name, shape, {"model_type": family(name)}, shapes) for name, shape in shapes.items()}
    for name, answer in found.items():
        if answer.is_kernel and answer.layout is not None:
            layout, kind, _ = kernels.describe(name, answer.layout, answer.kind)
            found[name] = answer._replace(layout=layout, kind=kind)
    held = {name: answer for name, answer in found.items() if answer.layout is not None}
    settled = settle_roles(
        {name: (answer.kind, shapes[name], answer.role or "hidden") for name, answer in held.items()},
        may_be_last=len(held) < len(found),
    )
    why = {"elementwise": ": a depthwise kernel, channel by channel", "head": "; the head"}
    return {
        name: Lookup(
            answer.layout, settled.get(name, answer.role or "hidden"),
            answer.reason + (why[settled[name]] if name in settled else ""),
        )
        for name, answer in found.items()
    }  # fmt: skip


def look_up_name(name: str, shape: tuple[int, ...], config: Mapping[str, Any], names: Container[str]) -> NameMatch:
    """What a parameter's name and shape tell of it: the table of names, or one matrix (out, in).

    Args:
        name, shape: of the parameter.
        config: of the model, `model_type` being its family.
        names: of all parameters; a bias beside a weight says that it is no table.

    Returns:
        A `NameMatch`. Its layout is `None` where the parameter holds no matrix, and its kind is `"unknown"` where
        nothing tells whether it does.

    Cost: a look at each row of the table.
    Source: the names that transformers, timm and torchvision use.

    >>> look_up_name("stem.weight", (8, 3, 3, 3), {}, ())[1:]
    ('conv2d', 'hidden', 'named weight', True)
    """
    module, _, local = name.rpartition(".")
    if len(shape) < 2:
        return NameMatch(None, "vector", "hidden", f"{_local(local)}: a {'vector' if shape else 'scalar'}")
    role = role_by_name(name, shape, local == "weight" and f"{module}.bias" in names)
    found = find_named(weight_name(name), shape, config, rows=(*NAMED, *KERNELS))
    if found is not None:
        return found._replace(role=found.role or ("hidden" if found.kind != "matrix" else role))
    if len(shape) == 2:
        if role == "hidden" and (coefficients := acts_by_channel(weight_name(name), (shape[0], shape[1]))):
            return NameMatch(None, "vector", "elementwise", coefficients)
        kind = "embedding" if role == "embedding" else "matrix"
        return NameMatch(
            Layout("o i -> o i", shape), kind, role, "its name tells no more: taken as one matrix (out, in)"
        )
    why = f"of {len(shape)} dimensions and an unknown name: pass the model, and layouts= if need be"
    return NameMatch(None, "unknown", "hidden", why)


def _local(name: str) -> str:
    return "bias" if "bias" in name else name


def settle_roles(
    held: Mapping[str, tuple[str, tuple[int, ...], Role]], *, may_be_last: bool, has_head: bool = True
) -> dict[str, Role]:
    """The roles that only all parameters together tell: which kernels are depthwise, and which matrix is the head.

    Args:
        held: kind, shape and role of each parameter that holds matrices, in the order of the model.
        may_be_last: whether the last may be the head where no name says so. It is not where there are embeddings, since
            a head may be tied to one of them.
        has_head: whether any of them can be the head.

    Returns:
        The roles that change, by name.

    Cost: a look at each name.
    Source: the names that transformers, timm and torchvision use.

    >>> settle_roles({"0.weight": ("matrix", (4, 4), "hidden"), "2.weight": ("matrix", (2, 4), "hidden")},
    ...              may_be_last=True)
    {'2.weight': 'head'}
    """
    tables = any(role == "embedding" for _, _, role in held.values())
    kernels = {
        name: shape
        for name, (kind, shape, _) in held.items()
        if kind.startswith("conv") and not kind.endswith(TRANSPOSED) and len(shape) > 2
    }
    settled: dict[str, Role] = dict.fromkeys(depthwise_kernels(kernels, tables), "elementwise")
    roles: list[Role] = [settled.get(name, role) for name, (_, _, role) in held.items()]
    at = find_head([[name] for name in held], roles, last=may_be_last and not tables) if has_head else None
    if at is not None:
        settled[list(held)[at]] = "head"
    return settled


def depthwise_kernels(kernels: Mapping[str, tuple[int, ...]], tables: bool) -> list[str]:
    """The kernels of one input channel, but for the first of a network that sees gray images.

    Such a network shows no kernel for the three channels of color, and looks up no tokens. Its first kernel is the one
    whose name says so, or else that of fewest parts, and of these the first by number: the order of the parameters does
    not matter, since a file's are sorted by name.

    Args:
        kernels: the shapes of convolution kernels by name.
        tables: whether the model has embeddings.

    Returns:
        Their names, in the order given.

    Cost: a look at each shape.

    >>> depthwise_kernels({"stem": (8, 1, 3, 3), "block": (8, 1, 3, 3)}, tables=False)
    ['block']
    """
    thin = [name for name, shape in kernels.items() if shape[1] == 1]
    gray = not tables and all(shape[1] != 3 for shape in kernels.values())
    first = min(thin, key=_place_of_kernel) if gray and thin else ""
    # A kernel that its name calls depthwise is no first one.
    return [name for name in thin if name != first or _DEPTHWISE.search(name)]


def _place_of_kernel(name: str) -> tuple[bool, bool, int, list[tuple[int, int | str]]]:
    return bool(_DEPTHWISE.search(name)), not _FIRST.search(name), name.count("."), natural_order(name)


def natural_order(name: str) -> list[tuple[int, int | str]]:
    """A key that sorts `layers.2` before `layers.10`.

    Args:
        name: of a parameter.

    Returns:
        The key.

    Cost: none to speak of.

    >>> sorted(["h.10", "h.2"], key=natural_order)
    ['h.2', 'h.10']
    """
    return [(0, int(word)) if word.isdigit() else (1, word) for word in _DIGITS.split(name) if word]
