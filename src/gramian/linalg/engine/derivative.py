"""Derivatives of the public functions: one decorator, and a rule for each function in `linalg/*derivatives.py`.

A certified value is computed without a graph, by whatever method. Its derivative follows from the value itself by an
implicit formula, so that it needs no method's steps, and is finite wherever the function has a derivative: repeated
eigenvalues are none of its business.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gramian.errors import UnsupportedError
from gramian.linalg.certificate import Certificate
from gramian.linalg.engine.precision import in_full_precision
from gramian.linalg.engine.spectrum import Spectrum, keeping, unknown
from gramian.linalg.engine.staged import (
    STAGED,
    Place,
    Staged,
    abstract,
    bound,
    call,
    encodable,
    encoded,
    flat,
    shaped,
    specialized,
)
from gramian.linalg.engine.symmetric_products import with_transpose
from gramian.linalg.engine.transforms import forward_levels, transforming, with_plain

Values = tuple[Tensor, ...]
Arguments = Mapping[str, Any]
Tangents = Mapping[str, Tensor | None]
Given = tuple[Tensor | None, ...]
"""Gradients of the values, or their tangents; `None` is zero."""
Gradients = Mapping[str, Any]


class Rule(NamedTuple):
    """The derivative of one function, made of differentiable operations, so that it has derivatives in turn.

    Attributes:
        vjp: `(arguments, values, gradients of the values) -> gradients by argument`. A gradient of `None` is zero.
        jvp: `(arguments, values, tangents by argument) -> tangents of the values`. A tangent of `None` is zero.

    The argument `spectrum` is that of the value, where the method had one.

    The gradients and tangents of an argument that is a tuple of tensors are tuples.
    """

    vjp: Callable[[Mapping[str, Any], Values, tuple[Tensor | None, ...]], Gradients]
    jvp: Callable[[Mapping[str, Any], Values, Mapping[str, Any]], tuple[Tensor | None, ...]]


@dataclass(frozen=True)
class _Call:
    """A call of a public function: `places` of the operands that are in the graph, and the dimensions of each."""

    function: Callable[..., tuple[Any, Certificate]]
    rule: Rule
    staged: Staged
    arguments: Mapping[str, Any]
    places: tuple[Place, ...]
    dims: Mapping[str, int]
    batched: bool
    spectral: bool
    found: list[Any]

    def run(self, operands: Values) -> Values:
        """The values, the certificate's tensors and the spectrum, if any; their structure is left in `found`."""
        with keeping() as kept:
            arguments = self.bind(operands)
            empty = any(abstract(x) for x in operands)
            value, proof = shaped(self.staged, arguments, operands) if empty else self.function(**arguments)
        self.found[:] = [value, proof]
        spectrum = ()
        if self.spectral:
            # The number of outputs must not depend on the method.
            like, first = operands[0], flat(value)[0]
            nothing = unknown(like.shape[:-2], min(like.shape[-2:]), first.dtype, first.device)
            spectrum = kept[-1] if kept else nothing
        # A view of something larger would make autograd take the value for a view of its input.
        whole = (
            x if x._base is None and x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)
            for x in flat(value)
        )
        return (*whole, *proof.tensors(), *spectrum)

    @in_full_precision
    def pull(
        self, operands: Values, values: Values, spectrum: Mapping[str, Spectrum], given: Given
    ) -> tuple[Tensor | None, ...]:
        """The gradients of the operands from those of the values."""
        if any(x.layout != torch.strided for x in operands):
            raise UnsupportedError(
                "linalg: a sparse matrix has no derivative here, since its gradient is dense. Use a.to_dense()."
            )
        if any(abstract(x) for x in operands):
            return tuple(torch.empty_like(x) for x in operands)
        found = self.rule.vjp({**self.bind(operands), **spectrum}, values, given)
        grads = (_at(found, place) for place in self.places)
        return tuple(g if g is None else g.to(x.dtype) for g, x in zip(grads, operands, strict=True))

    def bind(self, operands: Values) -> dict[str, Any]:
        """The arguments, with `operands` in the places of those that are in the graph."""
        return bound(self.arguments, self.places, operands)

    def named(self, operands: tuple) -> dict[str, Any]:
        """What belongs to the operands, by argument."""
        return bound({}, self.places, operands)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(call: _Call, *operands: Tensor) -> Values:  # pyright: ignore[reportIncompatibleMethodOverride]
        return call.run(operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Values) -> None:
        call, *operands = inputs
        ctx.call, ctx.num_values = call, len(flat(call.found[0]))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[ctx.num_values :])
        ctx.num_operands = len(operands)
        saved = (*operands, *output[: ctx.num_values], *output[ctx.num_values + len(Certificate.fields()) :])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        operands, values, spectrum = _split(ctx)
        if all(grad is None for grad in grads[: ctx.num_values]):
            return (None,) * (1 + len(operands))
        return (None, *ctx.call.pull(operands, values, spectrum, grads[: ctx.num_values]))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        operands, values, spectrum = _split(ctx)
        if any(abstract(x) for x in operands):
            found: Given = tuple(torch.empty_like(v) for v in values)
        else:
            arguments = {**ctx.call.bind(operands), **spectrum}
            found = in_full_precision(ctx.call.rule.jvp)(arguments, values, ctx.call.named(tangents[1:]))
        # Forward mode wants values and tangents of one layout.
        given = (t if t is None else t.to(v.dtype).contiguous() for t, v in zip(found, values, strict=True))
        return (*given, *(None for _ in range(len(Certificate.fields()) + (2 if spectrum else 0))))

    @staticmethod
    def vmap(info: Any, in_dims: tuple, call: _Call, *operands: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not call.batched:
            each = (
                _Node.apply(
                    call, *(x if d is None else x.select(d, i) for x, d in zip(operands, in_dims[1:], strict=True))
                )
                for i in range(info.batch_size)
            )
            out = tuple(torch.stack(column) for column in zip(*each, strict=True))
            return out, (0,) * len(out)
        first = [x if d is None else x.movedim(d, 0) for x, d in zip(operands, in_dims[1:], strict=True)]
        mapped = [d is not None for d in in_dims[1:]]
        batch = max(x.ndim - m - call.dims[n] for x, m, (n, _) in zip(first, mapped, call.places, strict=True))
        full = []
        for x, m, (name, _) in zip(first, mapped, call.places, strict=True):
            x = x if m else x.expand(info.batch_size, *x.shape)
            missing = batch - (x.ndim - 1 - call.dims[name])
            full.append(x.reshape(info.batch_size, *[1] * missing, *x.shape[1:]))
        out = _Node.apply(call, *full)
        return out, (0,) * len(out)


def _split(ctx: Any) -> tuple[Values, Values, dict[str, Spectrum]]:
    """Operands, values, and the spectrum by its name among the arguments of a rule, if it was kept."""
    saved, end = ctx.saved_tensors, ctx.num_operands + ctx.num_values
    rest = saved[end:]
    return saved[: ctx.num_operands], saved[ctx.num_operands : end], {"spectrum": Spectrum(*rest)} if rest else {}


def differentiable(
    rule: Rule,
    *,
    shapes: Callable[..., Any],
    methods: Iterable[str],
    batched: bool = True,
    spectral: bool = False,
    made: Callable[..., Any] | None = None,
    real: bool = True,
    **dims: int,
) -> Callable[[Callable], Callable]:
    """Make a certified function differentiable by `rule` in the arguments `dims`, each with its number of dimensions.

    `shapes` makes empty values from the arguments, `methods` are the names for the certificate, `made` puts several
    values together, `spectral` says that the value may come with a spectrum, and `real` that no operand is complex.

    A function that takes no batch is called for each matrix of one under vmap.

    The function itself runs without a graph. Works under `torch.autograd`, forward mode, and `torch.func`'s vjp, jvp
    and vmap, nested in any order but forward mode over forward mode, which raises.
    """

    def decorated(function: Callable[..., tuple[Any, Certificate]]) -> Callable[..., tuple[Any, Certificate]]:
        function = in_full_precision(function)
        signature = inspect.signature(function)

        def evaluated(*args: Any, **kwargs: Any) -> tuple[Any, Certificate]:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = bound.arguments
            places = tuple(place for name in dims for place in _places(name, arguments[name]))
            operands = [_at(arguments, place) for place in places]
            if not operands or not _followed(operands):
                with torch.no_grad():
                    if any(abstract(x) for x in operands):
                        return shaped(staged, arguments, operands)
                    return function(*args, **kwargs)
            if forward_levels() > 1:
                # torch takes the tangent that a custom function returns for a constant.
                raise UnsupportedError(
                    f"{public}: torch has no forward mode over forward mode for this. "
                    "Use torch.func.hessian, or jacrev or grad for one of the two."
                )
            found: list[Any] = []
            names = {name for name, _ in places}
            static = {name: value for name, value in arguments.items() if name not in names}
            out = _Node.apply(_Call(function, rule, staged, static, places, dims, batched, spectral, found), *operands)
            assert out is not None
            value, proof = found
            tensors = out[len(flat(value)) :][: len(Certificate.fields())]
            proof = Certificate(*tensors, methods=proof.methods)
            if isinstance(value, Tensor):
                return out[0], proof
            made = getattr(type(value), "_make", tuple)
            return made(out[: len(value)]), proof

        def forward(static: Mapping[str, Any], places: tuple[Place, ...], operands: Sequence[Tensor]) -> Values:
            return _Call(function, rule, staged, static, places, dims, batched, spectral, []).run(tuple(operands))

        def backward(
            static: Mapping[str, Any],
            places: tuple[Place, ...],
            operands: Sequence[Tensor],
            found: Sequence[Tensor],
            given: Given,
        ) -> list[Tensor]:
            call = _Call(function, rule, staged, static, places, dims, batched, spectral, [])
            values, rest = tuple(found[: len(given)]), found[len(given) :]
            spectrum = {"spectrum": Spectrum(*rest)} if rest else {}
            grads = call.pull(tuple(operands), values, spectrum, given)
            return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, operands, strict=True)]

        name = function.__name__
        public = name.removesuffix("_ex").lstrip("_")
        staged = STAGED[name] = Staged(public, forward, backward, shapes, tuple(methods), spectral, real)
        eager = torch._disable_dynamo(evaluated)
        parameters = tuple(signature.parameters)
        defaults = {p.name: p.default for p in signature.parameters.values() if p.default is not p.empty}

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> tuple[Any, Certificate]:
            if not torch.compiler.is_compiling():
                return evaluated(*args, **kwargs)
            # Compiled arithmetic is reordered, and a bound on rounding is then none: in the graph this is one operator.
            arguments = {**defaults, **dict(zip(parameters, args, strict=False)), **kwargs}
            places = tuple(place for name in dims for place in _places(name, arguments[name]))
            names = {name for name, _ in places}
            static = {key: specialized(value) for key, value in arguments.items() if key not in names}
            if not places or not encodable(static):
                return eager(*args, **kwargs)
            out = call(encoded(name, static, places), [_at(arguments, place) for place in places])
            count = len(out) - len(Certificate.fields()) - (2 if spectral else 0)
            proof = [x.detach() for x in out[count : count + len(Certificate.fields())]]
            value = tuple(out[:count]) if count > 1 else out[0]
            return (value if made is None else made(*value)), Certificate(*proof, methods=staged.methods)

        return wrapper

    return decorated


def _places(name: str, value: Any) -> list[Place]:
    if isinstance(value, Tensor):
        return [(name, None)] if value.is_floating_point() or value.is_complex() else []
    if isinstance(value, tuple) and value and all(isinstance(x, Tensor) for x in value):
        return [(name, i) for i in range(len(value))]
    return []


def _at(found: Mapping[str, Any], place: Place) -> Any:
    value = found.get(place[0])
    return value if value is None or place[1] is None else value[place[1]]


def _followed(operands: list[Tensor]) -> bool:
    """Whether autograd, forward mode or a transform of `torch.func` follows one of the operands."""
    if transforming() or torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in operands)


def refused(name: str, advice: str) -> Rule:
    """The rule of a function without a derivative: asking for one raises, with advice."""

    def refuse(*_: Any) -> Any:
        raise UnsupportedError(f"{name}: has no derivative. {advice}")

    return Rule(refuse, refuse)


def guarded(ok: Tensor, message: str) -> None:
    """Raise an `UnsupportedError` with that message where a flag in `ok` is false."""

    def look(ok: Tensor) -> None:
        if not bool(ok.all()):
            raise UnsupportedError(message)

    with_plain(look, ok)


def only(given: Given) -> Tensor:
    """The gradient of the one value that a function has."""
    assert given[0] is not None
    return given[0].double()


def symmetric(x: Tensor) -> Tensor:
    """The symmetric part."""
    return with_transpose(x).div_(2)
