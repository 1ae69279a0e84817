"""Signatures are checked at run time: shapes by jaxtyping with beartype, plain types by beartype alone.

jaxtyping's import hook would wrap every definition. Each call then binds its arguments first, which takes 20 µs, and a
definition inside of a function compiles two checkers whenever it is reached, which takes 2 ms: together, most of the
time of the tests. Only what has a shape in its signature needs jaxtyping; what is defined inside of a function has
none, and is left to pyright.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

import beartype
import jaxtyping

SHAPED = re.compile(r"\b(Bool|Complex|Float|Inexact|Int|Integer|Num|Real|Shaped|UInt)\d*\[")
_by_jaxtyping = jaxtyping.jaxtyped


def install(modules: Iterable[str]) -> None:
    """Checks the signatures in `modules`, and in those below them, from their import on."""
    jaxtyping.jaxtyped = checked  # the hook calls it by this name at every definition
    jaxtyping.install_import_hook([*modules], "beartype.beartype")


def checked(of: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    """`jaxtyping.jaxtyped`, for what needs it."""
    if of is None:
        return functools.partial(checked, typechecker=typechecker)
    if inspect.isclass(of):
        if dataclasses.is_dataclass(of) and "__init__" in vars(of):
            of.__init__ = checked(of.__init__, typechecker=typechecker)
        return of
    if SHAPED.search(str(of.__annotations__)):
        return _by_jaxtyping(of, typechecker=typechecker)
    return of if "<locals>" in of.__qualname__ else by_beartype(of)


def by_beartype(of: types.FunctionType) -> Callable[..., Any]:
    """`of` with its arguments and result checked, unless `jaxtyping_disable` is set (`cases.untyped`)."""
    twin = types.FunctionType(of.__code__, of.__globals__, of.__name__, of.__defaults__, of.__closure__)
    twin.__kwdefaults__, twin.__qualname__, twin.__module__ = of.__kwdefaults__, of.__qualname__, of.__module__
    twin.__annotations__ = {name: hint for name, text in of.__annotations__.items() if (hint := resolved(text, of))}
    strict = beartype.beartype(twin)

    @functools.wraps(of)
    def either(*args: Any, **kwargs: Any) -> Any:
        return of(*args, **kwargs) if jaxtyping.config.jaxtyping_disable else strict(*args, **kwargs)

    return either


def resolved(annotation: Any, of: types.FunctionType) -> Any:
    """The type that an annotation stands for; None where its names are imported for pyright alone."""
    holder = types.SimpleNamespace(__annotations__={"value": annotation})
    try:
        return typing.get_type_hints(holder, of.__globals__)["value"]
    except Exception:
        return None
