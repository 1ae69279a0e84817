"""What the table says of parameters that come as a list of names and shapes, without modules: optimizers and files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from gramian.layers.configs import families
from gramian.layers.kernels import Kernels
from gramian.layers.names import KERNELS, NAMED, find_named
from gramian.layers.roles import Role, find_head, role_by_name, weight_name
from gramian.layout import Layout

__all__ = ["Listed", "look_up_listed"]


class Listed(NamedTuple):
    """What a name and a shape tell of a parameter.

    Args:
        layout: which matrices it holds; `None` where it holds none.
        role: of these.
        reason: which row of the table said so.
        kind: a word for the report; `"vector"`, or empty where the tensor is unknown.
        note: what the layout assumes.
        kernel: whether it is the kernel of a convolution.
    """

    layout: Layout | None
    role: Role
    reason: str
    kind: str = ""
    note: str = ""
    kernel: bool = False


def look_up_listed(
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any] | None = None,
    *,
    given: Mapping[str, Layout] | None = None,
    beside: Mapping[str, tuple[int, ...]] | None = None,
    last: bool | None = None,
) -> dict[str, Listed]:
    """What names and shapes tell of each parameter: its layout, role, and why. Files and lists get the same answer.

    The last matrix is the head where no name says so and no table is in the list; but not where the list has nothing
    but matrices: somebody has chosen those. Nothing else depends on the order.

    Args:
        shapes: by name, in the order of the model, names without the prefixes of wrappers.
        config: of the model; without a `model_type`, the shapes tell the family.
        given: layouts that are known, by name.
        beside: shapes of tensors that are not asked for, and tell something of the others: biases, norms.
        last: whether the last matrix may be the head where no name says so and no table is in the list; by default, not
            in a list of matrices alone.

    Returns:
        A `Listed` by name.

    Raises: nothing of its own.
    Cost: a look at each row of the table for each name.
    Source: the names that transformers, timm and torchvision use.

    >>> found = look_up_listed({"wte.weight": (9, 4), "h.0.attn.c_attn.weight": (4, 12), "lm_head.weight": (9, 4)})
    >>> [answer.role for answer in found.values()], found["h.0.attn.c_attn.weight"].layout.parts
    (['embedding', 'hidden', 'head'], ('q', 'k', 'v'))
    """
    around = {**(beside or {}), **shapes}
    config, family = config or {}, families(around)
    given, kernels = given or {}, Kernels(around)
    found: dict[str, Listed] = {}
    for name, shape in shapes.items():
        module, _, local = name.rpartition(".")
        role = role_by_name(name, shape, local == "weight" and f"{module}.bias" in around)
        if name in given:
            found[name] = Listed(given[name], role, "given", "layouts")
        else:
            here = config if config.get("model_type") else {**config, "model_type": family(name)}
            found[name] = _look_up(name, shape, role, here, kernels)
    roles = [answer.role for answer in found.values()]
    convolutions = {n: shapes[n] for n, a in found.items() if a.kernel}
    for name in kernels.depthwise(convolutions, tables="embedding" in roles):
        reason = f"{found[name].reason}: a depthwise kernel, channel by channel"
        found[name] = found[name]._replace(role="elementwise", reason=reason)
    held = [name for name, answer in found.items() if answer.layout is not None]
    roles = [found[name].role for name in held]
    last = len(held) < len(found) if last is None else last
    at = find_head([[name] for name in held], roles, last=last and "embedding" not in roles)
    if at is not None:
        answer = found[held[at]]
        found[held[at]] = answer._replace(role="head", reason=f"{answer.reason}; the head")
    return found


def _look_up(name: str, shape: tuple[int, ...], role: Role, config: Mapping[str, Any], kernels: Kernels) -> Listed:
    """What the table of names says of one tensor."""
    local = name.rpartition(".")[2]
    if len(shape) < 2:
        what = "vector" if shape else "scalar"
        return Listed(None, "hidden", f"{'bias' if 'bias' in local else local}: a {what}", "vector")
    named = find_named(weight_name(name), shape, config, rows=(*NAMED, *KERNELS))
    if named is not None:
        layout, kind, note = named.layout, named.kind, ""
        if named.kernel and layout is not None:
            layout, kind, note = kernels.describe(name, layout, kind)
        role = named.role or ("hidden" if named.kind != "matrix" else role)
        return Listed(layout, role, named.reason, kind, note, named.kernel)
    if len(shape) == 2:
        kind = "embedding" if role == "embedding" else "matrix"
        return Listed(Layout("o i -> o i", shape), role, "its name tells no more: taken as one matrix (out, in)", kind)
    return Listed(None, "hidden", f"of {len(shape)} dimensions and an unknown name: pass the model, or routes=")
