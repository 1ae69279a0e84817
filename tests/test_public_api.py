"""What others call does not change by accident: the public names and the command line are those of public_api.txt.

After a change on purpose, write the file again with `python tests/test_public_api.py --write`, and say in CHANGELOG.md
what changed.
"""

from __future__ import annotations

import difflib
import enum
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from gramian.cli import app
from public import modules

SNAPSHOT = Path(__file__).with_name("public_api.txt")
WIDTH = 100
"""A longer signature has a line for each parameter, so that a difference is easy to see."""


def annotation(value: Any) -> str:
    """A type as the source writes it. Modules postpone annotations, so most are strings already."""
    if isinstance(value, typing.ForwardRef):
        value = value.__forward_arg__
    if isinstance(value, type) and not typing.get_args(value):
        value = value.__qualname__
    return str(value).replace("typing.", "").replace("'", '"')


def default(value: Any) -> str:
    """A value without an address or a system's kind of path."""
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, Path):
        value = str(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return f"<{value.__qualname__.rpartition('.')[2].strip('<>')}>"
    text = re.sub(r" (object )?at 0x[0-9a-f]+", "", repr(value))
    return text if len(text) < WIDTH else f"<{type(value).__name__}>"  # a table, whose rows are no part of the API


def signature(function: Any, *, returns: bool = True) -> str:
    """Parameters in order, with types, defaults and the marks of positional-only and keyword-only."""
    found = inspect.signature(function)
    parts: list[str] = []
    kinds = [p.kind for p in found.parameters.values()]
    for i, p in enumerate(found.parameters.values()):
        if p.kind is p.KEYWORD_ONLY and p.VAR_POSITIONAL not in kinds and p.KEYWORD_ONLY not in kinds[:i]:
            parts.append("*")
        if p.kind is not p.POSITIONAL_ONLY and p.POSITIONAL_ONLY in kinds[:i] and "/" not in parts:
            parts.append("/")
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        part = stars + p.name
        if p.annotation is not p.empty:
            part += f": {annotation(p.annotation)}"
        if p.default is not p.empty:
            part += f" = {default(p.default)}"
        parts.append(part)
    if kinds and kinds[-1] is inspect.Parameter.POSITIONAL_ONLY:
        parts.append("/")
    answer = found.return_annotation
    back = f" -> {annotation(answer)}" if returns and answer is not inspect.Signature.empty else ""
    line = f"({', '.join(parts)}){back}"
    return line if len(line) < WIDTH else "(\n" + "".join(f"        {part},\n" for part in parts) + f"    ){back}"


def members(cls: type) -> Iterator[str]:
    """The public methods and properties that gramian defines, in the class or above it, by name."""
    found: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if base.__module__.startswith("gramian")]):
        for name, value in vars(base).items():
            if name.startswith("_"):
                continue
            if inspect.isfunction(value):
                found[name] = f"def {name}{signature(value)}"
            elif isinstance(value, (classmethod, staticmethod)):
                kind = type(value).__name__
                found[name] = f"@{kind} def {name}{signature(value.__func__)}"
            elif isinstance(value, property) or type(value).__name__ == "cached_property":
                found[name] = f"property {name}"
    yield from (found[name] for name in sorted(found))


def described(name: str, value: Any, seen: dict[int, str], home: str) -> Iterator[str]:
    """The lines of one public name."""
    if isinstance(value, type) or inspect.isroutine(value):
        if id(value) in seen:
            yield f"{name}: see {seen[id(value)]}"
            return
        seen[id(value)] = f"{home}.{name}"
    if isinstance(value, type):
        bases = ", ".join(base.__name__ for base in value.__bases__ if base not in (object, tuple))
        bare = issubclass(value, (enum.Enum, BaseException)) or getattr(value, "_is_protocol", False)
        arguments = "" if bare else signature(value, returns=False)
        yield f"class {name}{arguments}" + (f" of {bases}" if bases else "")
        if issubclass(value, enum.Enum):
            yield from (f"    {member.name} = {member.value!r}" for member in value)
        yield from (textwrap.indent(text, "    ") for text in members(value))
    elif inspect.isroutine(value):
        yield f"def {name}{signature(value)}"
    elif inspect.ismodule(value):
        yield f"module {name}"
    elif isinstance(value, dict):
        yield f"table {name}: {', '.join(map(str, value))}"
    elif typing.get_origin(value) is not None:
        yield f"type {name} = {annotation(value)}"
    else:
        yield f"{name} = {default(value)}"


def commands() -> Iterator[str]:
    """The commands, with arguments, flags, choices and defaults; nothing of the help, which is printed to fit."""
    program: Any = typer.main.get_command(app)
    assert app.registered_callback
    yield "gramian"
    own = typing.get_type_hints(app.registered_callback.callback)  # typer adds the flags of shell completion
    yield from (f"    {option(p, app.registered_callback.callback)}" for p in program.params if p.name in own)
    for registered in sorted(app.registered_commands, key=lambda command: str(command.name)):
        yield f"gramian {registered.name}"
        yield from (f"    {option(p, registered.callback)}" for p in program.commands[registered.name].params)


def option(param: Any, function: Any) -> str:
    """One argument or option. Its type is read from the function, since typer keeps it differently by version."""
    names = (
        param.name.upper() if param.param_type_name == "argument" else "/".join([*param.opts, *param.secondary_opts])
    )
    kind = typing.get_type_hints(function)[param.name]
    kinds = [one for one in typing.get_args(kind) if one is not type(None)] or [kind]
    if param.param_type_name == "option" and param.is_flag:
        words = [names, "flag"]
    elif issubclass(kinds[0], enum.Enum):
        words = [names, "|".join(str(choice.value) for choice in kinds[0])]
    else:
        words = [names, kinds[0].__name__]
    words += [f"{bound} {found}" for bound in ("min", "max") if (found := getattr(param, bound, None)) is not None]
    if not param.is_eager:
        words.append("required" if param.required else f"default {default(param.default)}")
    return ", ".join(words)


def snapshot() -> str:
    """The whole text."""
    seen: dict[int, str] = {}
    lines = ["# Written by `python tests/test_public_api.py --write`.", ""]
    for module in modules():
        lines.append(module.__name__)
        for name in sorted(module.__all__):
            for text in described(name, getattr(module, name), seen, module.__name__):
                lines += [f"    {line}" for line in text.splitlines()]
        lines.append("")
    return "\n".join([*lines, *commands(), ""])


def test_the_public_api_and_the_command_line_are_those_of_the_snapshot() -> None:
    then, now = SNAPSHOT.read_text(encoding="utf-8"), snapshot()
    diff = "\n".join(
        difflib.unified_diff(then.splitlines(), now.splitlines(), "public_api.txt", "now", n=1, lineterm="")
    )
    assert then == now, (
        f"the public API changed:\n{diff}\n\nIf that is meant: python tests/test_public_api.py --write, "
        "commit tests/public_api.txt, and say so in CHANGELOG.md. A public name goes only after a deprecation."
    )


def test_the_snapshot_is_the_same_everywhere() -> None:
    assert not re.search(r"0x[0-9a-f]{4}|PosixPath|ForwardRef|<function", snapshot())


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_public_api.py --write")
    SNAPSHOT.write_text(snapshot(), encoding="utf-8")
    print(f"wrote {SNAPSHOT}")
