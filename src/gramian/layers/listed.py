"""What the table says of parameters that come as a list of names and shapes, without modules."""

from __future__ import annotations

from collections.abc import Mapping

from gramian.layers.configs import families
from gramian.layers.lookup import Lookup
from gramian.layers.names import KERNELS, NAMED, find_named
from gramian.layers.roles import Role, find_head, role_by_name, weight_name
from gramian.layout import Layout

__all__ = ["depthwise_kernels", "look_up_listed"]


def look_up_listed(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Lookup]:
    """What names and shapes tell of each parameter, as they do in a file: its layout, role, and why.

    The last matrix is the head where no name says so and no table is in the list, as in a file; but not where the list
    has nothing but matrices: somebody has chosen those.

    Args:
        shapes: by name, in the order of the model, names without the prefixes of wrappers.

    Returns:
        A `Lookup` by name; its layout is `None` where the parameter holds no matrix.

    Raises: nothing of its own.
    Cost: a look at each row of the table for each name.
    Source: the names that transformers, timm and torchvision use.

    >>> found = look_up_listed({"wte.weight": (9, 4), "h.0.attn.c_attn.weight": (4, 12), "lm_head.weight": (9, 4)})
    >>> [answer.role for answer in found.values()], found["h.0.attn.c_attn.weight"].layout.parts
    (['embedding', 'hidden', 'head'], ('q', 'k', 'v'))
    """
    family = families(shapes)
    found = {name: _look_up(name, shape, family(name), shapes) for name, shape in shapes.items()}
    patterns = {row.layout for row in KERNELS}
    kernels = {n: a.layout.shape for n, a in found.items() if a.layout is not None and a.layout.pattern in patterns}
    tables = any(answer.role == "embedding" for answer in found.values())
    found |= {name: _as_depthwise(found[name]) for name in depthwise_kernels(kernels, tables)}
    held = [name for name, answer in found.items() if answer.layout is not None]
    roles: list[Role] = [found[name].role for name in held]
    last = "embedding" not in roles and len(held) < len(found)
    at = find_head([[name] for name in held], roles, last=last)
    if at is not None:
        answer = found[held[at]]
        found[held[at]] = answer._replace(role="head", reason=f"{answer.reason}; the head")
    return found


def _look_up(name: str, shape: tuple[int, ...], family: str, shapes: Mapping[str, tuple[int, ...]]) -> Lookup:
    module, _, local = name.rpartition(".")
    if len(shape) < 2:
        what = "vector" if shape else "scalar"
        return Lookup(None, "hidden", f"{'bias' if 'bias' in local else local}: a {what}")
    role = role_by_name(name, shape, local == "weight" and f"{module}.bias" in shapes)
    named = find_named(weight_name(name), shape, {"model_type": family}, rows=(*NAMED, *KERNELS))
    if named is not None:
        return Lookup(named.layout, named.role or ("hidden" if named.kind != "matrix" else role), named.reason)
    if len(shape) == 2:
        return Lookup(Layout("o i -> o i", shape), role, "its name tells no more: taken as one matrix (out, in)")
    why = f"of {len(shape)} dimensions and an unknown name: pass the model, and layouts= where its class does not tell"
    return Lookup(None, "hidden", why)


def depthwise_kernels(kernels: Mapping[str, tuple[int, ...]], tables: bool) -> list[str]:
    """The kernels of one input channel, but for the first of a network that sees gray images.

    Such a network shows no kernel for the three channels of color, and looks up no tokens.

    Args:
        kernels: the shapes of convolution kernels by name, in the order of the model.
        tables: whether the model has embeddings.

    Returns:
        Their names.

    Raises: nothing of its own.
    Cost: a look at each shape.
    Source: this library's own.

    >>> depthwise_kernels({"stem": (8, 1, 3, 3), "block": (8, 1, 3, 3)}, tables=False)
    ['block']
    """
    gray = not tables and all(shape[1] != 3 for shape in kernels.values())
    return [name for name in list(kernels)[1 if gray else 0 :] if kernels[name][1] == 1]


def _as_depthwise(answer: Lookup) -> Lookup:
    return answer._replace(role="elementwise", reason=f"{answer.reason}: a depthwise kernel, channel by channel")
