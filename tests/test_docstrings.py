"""Every public function and class is documented by the one template of CONTRIBUTING.md.

There are no exceptions. `python tests/test_docstrings.py` lists what is missing, module by module.
"""

from __future__ import annotations

import builtins
import dataclasses
import doctest
import enum
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from gramian import errors
from public import modules

HEADINGS = ("Args", "Attributes", "Returns", "Raises", "Cost", "Source")
OTHERS = (
    "Arguments", "Parameters", "Params", "Keyword Args", "Return", "Yields", "Yield", "Example", "Examples", "Note",
    "Notes", "Reference", "References", "See Also", "Accuracy",
)  # fmt: skip
NOTHING = "nothing of its own."

ENTRY = re.compile(r"(\*{0,2}[A-Za-z]\w*(?:, \*{0,2}[A-Za-z]\w*)*): *\S")
"""A line of Args: one name, or several, and what they are."""


def public() -> dict[str, Any]:
    """Every public function and class, under the name of the module that defines it."""
    found = {}
    for module in modules():
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, type) or inspect.isroutine(value):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    return dict(sorted(found.items()))


class Docstring:
    """A docstring, cut at the headings of the template."""

    def __init__(self, text: str) -> None:
        self.lines = inspect.cleandoc(text).splitlines()
        self.sections: dict[str, list[str]] = {}
        self.order: list[str] = []
        self.unknown: list[str] = []
        self.opening: list[str] = []
        current = self.opening
        for line in self.lines:
            heading, colon, rest = line.partition(":")
            if line.startswith(">>> "):
                heading = ">>>"
            elif colon and heading in OTHERS and not (heading == "Accuracy" and self.order[-1:] == ["Cost"]):
                self.unknown.append(heading)
            if heading == ">>>" or (colon and heading in HEADINGS):
                if heading != ">>>" or ">>>" not in self.sections:
                    self.order.append(heading)
                current = self.sections.setdefault(heading, [])
                line = line if heading == ">>>" else rest.strip()
            current.append(line)

    def text(self, heading: str) -> str:
        """What stands under a heading, as one line."""
        return " ".join(" ".join(self.sections.get(heading, ())).split())

    def entries(self, heading: str) -> tuple[list[str], list[str]]:
        """The names that Args or Attributes explains, and the lines that are not as they must be."""
        first, *lines = self.sections.get(heading, [""])
        names: list[str] = []
        wrong = [first] if first else []
        for line in lines:
            indent = len(line) - len(line.lstrip())
            if indent == 4 and (match := ENTRY.match(line.strip())):
                names += match[1].replace("*", "").split(", ")
            elif line.strip() and not (names and indent >= 8):
                wrong.append(line)
        return names, wrong


def sentence(doc: Docstring, *, alone: bool = True) -> Iterator[str]:
    """The docstring begins with a sentence; that of a function or class is a paragraph `alone`."""
    first = " ".join("\n".join(doc.opening).split("\n\n")[0].split())
    if not first:
        yield "the sentence: begin with one sentence that says what it does"
    elif not first.endswith((".", ".)", "?")):
        yield f"the sentence: the first paragraph must end with a period, got {first[-40:]!r}"
    elif alone and re.search(r"[a-z0-9)`\]]\. +[A-Z`]", first):
        yield f"the sentence: the first paragraph must be one sentence; put a blank line after it, got {first!r}"


def named(doc: Docstring, heading: str, wanted: list[str], allowed: set[str]) -> Iterator[str]:
    """The names that a section explains are the wanted ones; others only where they are allowed."""
    names, wrong = doc.entries(heading)
    for line in wrong:
        yield (
            f"{heading}: every name on a line of its own, indented by 4, and its continuation by 8: "
            f"'    name: what it is'; got {line!r}"
        )
    if missing := [name for name in wanted if name not in names]:
        yield f"{heading}: write a line for {', '.join(missing)} ('    {missing[0]}: what it is, its shape and unit.')"
    if unknown := [name for name in names if name not in allowed]:
        yield f"{heading}: names {', '.join(unknown)}, which it does not have"
    if twice := sorted({name for name in names if names.count(name) > 1}):
        yield f"{heading}: explains {', '.join(twice)} twice"


def raises(doc: Docstring) -> Iterator[str]:
    """Raises names exceptions that exist, or says that there are none."""
    first, *lines = doc.sections.get("Raises", [""])
    text = doc.text("Raises")
    if not text:
        yield f"Raises: write '    InputError: when.' under it, or the one line 'Raises: {NOTHING}'"
        return
    if first.startswith(NOTHING.rstrip(".")):
        return
    told = re.findall(r"`(\w+(?:Error|Warning|Exception))`", text)
    if first and told:  # a sentence on one line: "Raises: `ShapeError`, `DtypeError` for wrong arguments."
        if unknown := [name for name in told if not exception(name)]:
            yield f"Raises: names {', '.join(unknown)}, which neither gramian.errors nor Python has"
        return
    starts = [first] if first else [line.strip() for line in lines if re.match(r" {4}\S", line)]
    for start in starts:
        head, colon, when = start.partition(":")
        unknown = [name for name in head.split(", ") if not exception(name)]
        if not colon or not when or unknown:
            yield (
                f"Raises: expected 'InputError: when.' of an exception of gramian.errors or Python, got {start!r}; "
                f"or the one line 'Raises: {NOTHING}'"
            )


def exception(name: str) -> bool:
    """Whether gramian or Python has an exception of this name."""
    found = getattr(errors, name, getattr(builtins, name, None))
    return isinstance(found, type) and issubclass(found, BaseException)


def example(doc: Docstring) -> Iterator[str]:
    """There is an example, it is run, and it stands last."""
    found = doctest.DocTestParser().get_examples("\n".join(doc.lines))
    if ">>>" not in doc.sections:
        yield "an example: end with a blank line and '>>> …', a doctest, at the docstring's margin"
    elif any(doctest.SKIP in one.options for one in found):
        yield "an example that runs: take out '+SKIP'"


def layout(doc: Docstring, headings: tuple[str, ...]) -> Iterator[str]:
    """The sections are the template's, in its order, each once."""
    for heading in doc.unknown:
        yield f"{heading}: is not a heading of the template ({', '.join(f'{h}:' for h in headings)} then >>>)"
    order = [heading for heading in (*headings, ">>>") if heading in doc.order]
    if doc.order != order:
        yield f"order of sections: {', '.join(order)}; got {', '.join(doc.order)}"


def parameters(function: Any) -> list[str]:
    """The names of a signature, without self and what is private."""
    names = list(inspect.signature(function).parameters)
    return [name for name in names if name not in ("self", "cls") and not name.startswith("_")]


def function_faults(function: Any) -> Iterator[str]:
    """What the docstring of a function lacks."""
    if not function.__doc__:
        yield "a docstring: see the template in CONTRIBUTING.md"
        return
    doc = Docstring(function.__doc__)
    yield from sentence(doc)
    names = parameters(function)
    yield from named(doc, "Args", names, set(names))
    answer = inspect.signature(function).return_annotation
    if answer is inspect.Signature.empty:
        yield "a return annotation: '-> None' where there is nothing to return"
    elif answer not in (None, "None", "NoReturn", "Never") and not doc.text("Returns"):
        yield "Returns: say what comes back, its shape and unit"
    yield from raises(doc)
    yield from template(doc)


def template(doc: Docstring) -> Iterator[str]:
    """Cost, source, example and order, which functions and classes share."""
    if not doc.text("Cost"):
        yield "Cost: products, passes over the data, memory"
    if not doc.text("Source"):
        yield "Source: the paper and equation, or 'the definition', or 'this library's own'"
    yield from example(doc)
    yield from layout(doc, ("Args", "Returns", "Raises", "Cost", "Source"))


def fields(cls: type) -> list[str]:
    """The public fields of a record or protocol."""
    if dataclasses.is_dataclass(cls):
        names = [field.name for field in dataclasses.fields(cls) if field.init]
    elif issubclass(cls, tuple):
        names = list(getattr(cls, "_fields", ()))
    else:
        names = list(inspect.get_annotations(cls))
    return [name for name in names if not name.startswith("_")]


def is_record(cls: type) -> bool:
    """Whether the sentence and the fields are enough."""
    generated = "__dataclass_params__" in vars(cls) and cls.__dataclass_params__.init  # pyright: ignore
    return generated or issubclass(cls, (tuple, enum.Enum, BaseException)) or getattr(cls, "_is_protocol", False)


def class_faults(cls: type) -> Iterator[str]:
    """What the docstrings of a class and of its public methods lack."""
    text = cls.__dict__.get("__doc__") or ""
    if not text or text.startswith(f"{cls.__name__}("):  # what dataclass and NamedTuple write by themselves
        yield "a docstring: see the template in CONTRIBUTING.md"
    elif is_record(cls):
        doc = Docstring(text)
        yield from sentence(doc)
        heading = "Attributes" if "Attributes" in doc.sections else "Args"
        yield from named(doc, heading, fields(cls), {*dir(cls), *fields(cls)})
        yield from layout(doc, HEADINGS)
    else:
        doc = Docstring(text)
        yield from sentence(doc)
        names = parameters(cls)
        yield from named(doc, "Args", names, set(names))
        yield from raises(doc)
        yield from template(doc)
    for name, method in methods(cls):
        for fault in method_faults(method):
            yield f".{name}: {fault}"


def methods(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that gramian defines, in the class or above it."""
    seen = set()
    for base in cls.__mro__:
        if not base.__module__.startswith("gramian"):
            continue
        for name, value in vars(base).items():
            kinds = (property, classmethod, staticmethod)
            method = isinstance(value, kinds) or inspect.isfunction(value) or type(value).__name__ == "cached_property"
            if method and not name.startswith("_") and name not in seen:
                seen.add(name)
                yield name, inspect.getattr_static(cls, name)


def method_faults(method: Any) -> Iterator[str]:
    """What the docstring of a method or property lacks: the sentence, and Args where there are two or more."""
    text = inspect.getdoc(method)
    if not text:
        yield "the sentence that says what it does"
        return
    doc = Docstring(text)
    yield from sentence(doc, alone=False)
    function = getattr(method, "__func__", method)
    names = parameters(function) if inspect.isfunction(function) else []
    if len(names) >= 2 or "Args" in doc.sections:
        yield from named(doc, "Args", names, set(names))
    yield from layout(doc, ("Args", "Returns", "Raises", "Cost", "Source"))


def faults(value: Any) -> list[str]:
    """What the documentation of a public name lacks, each with what to write."""
    return list(class_faults(value) if isinstance(value, type) else function_faults(value))


PUBLIC = public()


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented_by_the_template(name: str) -> None:
    missing = faults(PUBLIC[name])
    assert not missing, f"{name} lacks\n  " + "\n  ".join(missing)


def _well(a: int, b: int = 0, *rest: int) -> int:
    """Adds.

    The formula: a + b, which is
    not hard.

    Args:
        a, b: what is added, and
            what else.
        rest: more of it.
    Returns: the sum.
    Raises:
        InputError: never.
    Cost: nothing. Accuracy: exact.
    Source: the definition.

    >>> 1 + 1
    2
    """
    return a + b + sum(rest)


def test_a_docstring_by_the_template_passes() -> None:
    assert faults(_well) == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("Adds.", "Adds. Two.", "one sentence"),
        ("Adds.", "Adds", "period"),
        ("a, b: what", "a: what", "write a line for b"),
        ("rest: more", "other: more", "names other"),
        ("        rest: more of it.\n", "", "write a line for rest"),
        ("            what else.", "        what else.", "indented"),
        ("Returns: the sum.\n", "", "Returns: say"),
        ("InputError: never", "InptError: never", "expected 'InputError: when.'"),
        ("Raises:\n        InputError: never.", "Raises: `InptError` where it is wrong.", "names InptError"),
        ("Raises:\n        InputError: never.\n    ", "", "Raises: write"),
        ("Cost: nothing. Accuracy: exact.\n", "", "Cost: products"),
        ("Source: the definition.\n", "", "Source: the paper"),
        (">>> 1 + 1\n    2\n", "", "an example"),
        (">>> 1 + 1", ">>> 1 + 1  # doctest: +SKIP", "take out"),
        ("The formula:", "Note:", "not a heading"),
        ("Cost: nothing. Accuracy: exact.\n    Source: the definition.", "Source: here.\n    Cost: none.", "order"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(old: str, new: str, told: str) -> None:
    def changed(a: int, b: int = 0, *rest: int) -> int:
        return a + b + sum(rest)

    assert old in str(_well.__doc__)
    changed.__doc__ = str(_well.__doc__).replace(old, new)
    assert any(told in fault for fault in faults(changed)), faults(changed)


def main() -> int:
    """Prints what is missing, module by module."""
    by_module: dict[str, list[str]] = defaultdict(list)
    for value in PUBLIC.values():
        if missing := faults(value):
            by_module[value.__module__].append("\n".join([f"  {value.__qualname__}", *(f"    {m}" for m in missing)]))
    for module, texts in sorted(by_module.items()):
        print(f"{module}: {len(texts)}", *texts, sep="\n")
    print(f"{sum(map(len, by_module.values()))} of {len(PUBLIC)} public names are not documented by the template")
    return bool(by_module)


if __name__ == "__main__":
    sys.exit(main())
