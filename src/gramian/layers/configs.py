"""What surrounds a parameter: the numbers of its model's config, and the family that shapes or classes tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

__all__ = ["config_of", "declared_family", "families"]

# Keys under which configs keep the same number.
CONFIG_KEYS: dict[str, tuple[str, ...]] = {
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
    "kv": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"),
    "width": ("hidden_size", "n_embd", "d_model", "dim"),
    "dim": ("head_dim", "kv_channels", "d_kv"),
}


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


def declared_family(module: nn.Module) -> str:
    """The family that a module of stacked experts declares: how its tensors are oriented.

    The experts of transformers say so by attributes, for the kernels that apply them: `is_transposed` for
    (expert, in, out), `is_concatenated` for gate and up one after the other, and not interleaved.

    Args:
        module: of any class.

    Returns:
        The family; empty where the module declares nothing.

    Raises: nothing of its own.
    Cost: none.
    Source: transformers' `use_experts_implementation`.

    >>> experts = nn.Module()
    >>> experts.is_transposed, experts.is_concatenated = True, False
    >>> declared_family(experts)
    'experts in out interleaved'
    """
    transposed, concatenated = (getattr(module, name, None) for name in ("is_transposed", "is_concatenated"))
    if not isinstance(transposed, bool) or not isinstance(concatenated, bool):
        return ""
    return f"experts {'in out' if transposed else 'out in'}{'' if concatenated else ' interleaved'}"


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


def number(key: str, config: Mapping[str, Any]) -> int | None:
    """The config's number of that key of `CONFIG_KEYS`; `None` where it has none."""
    values = (config.get(name) for name in CONFIG_KEYS[key])
    value = next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)
    if value is None and key == "kv":
        return number("heads", config)
    if value is None and key == "dim":
        width, heads = number("width", config), number("heads", config)
        return width // heads if width and heads else None
    return value


def product(keys: str, config: Mapping[str, Any]) -> int | None:
    """The product of several such numbers: `"heads*dim"`."""
    numbers = [number(key, config) for key in keys.split("*")]
    return None if None in numbers else math.prod(int(n or 0) for n in numbers)
