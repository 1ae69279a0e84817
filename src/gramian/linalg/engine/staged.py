"""The functions on tensors without values (meta and fake ones), and as operators of a compiled graph."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gramian.linalg.certificate import Certificate
from gramian.linalg.engine.loading import check
from gramian.linalg.engine.transforms import has_no_values

Place = tuple[str, int | None]


@dataclass(frozen=True)
class Staged:
    """What the operators of a compiled graph call for one function.

    Attributes:
        name: of the public function.
        forward: from a call without its tensors and the operands to the values, the certificate's tensors, and, where
            `spectral`, a spectrum.
        backward: from the same, the values with the spectrum, and the gradients of the values to those of the operands.
        shapes: from the arguments to empty values.
        methods: the names of the methods, for certificates.
        spectral: whether there is a spectrum among the outputs.
        real: whether no operand may be complex.
    """

    name: str
    forward: Callable[[Mapping[str, Any], tuple[Place, ...], Sequence[Tensor]], Sequence[Tensor]]
    backward: Callable[..., Sequence[Tensor]]
    shapes: Callable[..., Any]
    methods: tuple[str, ...]
    spectral: bool
    real: bool


STAGED: dict[str, Staged] = {}
"""By the name of the function."""


def abstract(x: Any) -> bool:
    """Whether it is a tensor that has a shape but no values."""
    return isinstance(x, Tensor) and has_no_values(x)


def bound(static: Mapping[str, Any], places: Sequence[Place], operands: Sequence[Any]) -> dict[str, Any]:
    """The arguments of a call, with the operands in their places."""
    found: dict[str, Any] = dict(static)
    for (name, position), operand in zip(places, operands, strict=True):
        found[name] = operand if position is None else (*found.get(name, ()), operand)
    return found


def flat(value: Any) -> tuple[Tensor, ...]:
    """The tensors of a value."""
    return (value,) if isinstance(value, Tensor) else tuple(value)


def shaped(staged: Staged, arguments: Mapping[str, Any], operands: Sequence[Tensor]) -> tuple[Any, Certificate]:
    """Empty values and an empty certificate of the right shapes."""
    for name, x in arguments.items():
        if isinstance(x, Tensor) and name in ("a", "m", "x"):
            check(staged.name, x, square=name == "m", real=staged.real)
    value = staged.shapes(**arguments)
    batch = () if operands[0].ndim < 2 else operands[0].shape[:-2]
    kinds = {"converged": torch.bool, **dict.fromkeys(("kind", "steps", "method", "reason"), torch.long)}
    tensors = (operands[0].new_empty(batch, dtype=kinds.get(name, torch.float64)) for name in Certificate.fields())
    return value, Certificate(*tensors, methods=staged.methods)


def specialized(value: Any) -> Any:
    """A number that a graph with dynamic shapes takes for a symbol, as it is in this call; anything else unchanged.

    The graph then holds for this number alone.
    """
    if not isinstance(value, int | float):
        return value
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # loaded already where a graph is compiled

    return guard_scalar(value)


def encoded(name: str, static: Mapping[str, Any], places: Sequence[Place]) -> str:
    """A call without its tensors as text, which an operator of a graph can take."""
    plain = {k: ("dtype", str(v)) if isinstance(v, torch.dtype) else v for k, v in static.items()}
    return repr((name, plain, tuple(places))).replace("inf", "1e999")


# What torch._dynamo.assume_constant_result does, without the import, which takes seconds.
encoded._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _decoded(text: str) -> tuple[Staged, dict[str, Any], tuple[Place, ...]]:
    name, plain, places = ast.literal_eval(text)
    static = {k: getattr(torch, v[1].removeprefix("torch.")) if isinstance(v, tuple) else v for k, v in plain.items()}
    return STAGED[name], static, places


def encodable(static: Mapping[str, Any]) -> bool:
    """Whether `encoded` can write them: numbers, names and dtypes."""
    return all(v is None or isinstance(v, bool | int | float | str | torch.dtype) for v in static.values())


@torch.library.custom_op("gramian::linalg", mutates_args=(), schema="(str text, Tensor[] operands) -> Tensor[]")
def call(text: str, operands: Sequence[Tensor]) -> list[Tensor]:
    """A function of matrices in a compiled graph: its values, the certificate's tensors, and its spectrum if any."""
    staged, static, places = _decoded(text)
    return [x.clone() for x in staged.forward(static, places, operands)]


@call.register_fake
def _(text: str, operands: Sequence[Tensor]) -> list[Tensor]:
    staged, static, places = _decoded(text)
    value, proof = shaped(staged, bound(static, places, operands), operands)
    out = [*flat(value), *proof.tensors()]
    if staged.spectral:
        like, n = operands[0], min(operands[0].shape[-2:])
        wide = torch.promote_types(out[0].dtype, torch.float32)
        out += [like.new_empty(*like.shape[:-2], n, dtype=torch.float64)]
        out += [like.new_empty(*like.shape[:-2], n, n, dtype=wide)]
    return out


@torch.library.custom_op(
    "gramian::linalg_vjp",
    mutates_args=(),
    schema="(str text, Tensor[] operands, Tensor[] found, Tensor[] given) -> Tensor[]",
)
def call_vjp(text: str, operands: Sequence[Tensor], found: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """Its backward pass: gradients of the operands from those of the values."""
    staged, static, places = _decoded(text)
    with torch.no_grad():
        grads = staged.backward(static, places, operands, found, given)
    return [g.clone() for g in grads]


@call_vjp.register_fake
def _(text: str, operands: Sequence[Tensor], found: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x) for x in operands]


def _setup(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    text, operands = inputs
    staged, _, _ = _decoded(text)
    certificate, spectrum = len(Certificate.fields()), 2 if staged.spectral else 0
    ctx.text, ctx.count, ctx.values = text, len(operands), len(output) - certificate - spectrum
    rest = output[len(output) - spectrum :] if spectrum else []
    ctx.save_for_backward(*operands, *output[: ctx.values], *rest)


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[None, list[Tensor]]:
    operands, found = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    pairs = zip(grads[: ctx.values], found, strict=False)
    given = [torch.zeros_like(x) if g is None else g for g, x in pairs]
    return None, call_vjp(ctx.text, list(operands), list(found), given)


call.register_autograd(_backward, setup_context=_setup)
