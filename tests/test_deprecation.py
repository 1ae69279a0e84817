"""What is deprecated works, warns once at the line that uses it, and is gone when its time has come."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path

import pytest

import gramian
from gramian.deprecation import GramianDeprecationWarning, deprecated, renamed
from gramian.errors import GramianWarning, InputError


def new(x: float, *, num_steps: int = 1) -> float:
    """The sum."""
    return x + num_steps


def line() -> int:
    """The line that calls this."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def test_a_deprecated_function_warns_at_the_callers_line() -> None:
    old = deprecated("gm.old", instead="gm.new", removed_in="0.3")(new)
    with pytest.warns(GramianDeprecationWarning, match=r"gm\.old .* in gramian 0\.3; write gm\.new") as caught:
        here, value = line(), old(1.0, num_steps=2)
    assert value == 3.0
    assert (caught[0].filename, caught[0].lineno) == (__file__, here)
    assert inspect.signature(old) == inspect.signature(new)
    assert old.__doc__ == new.__doc__


def test_once_for_each_line() -> None:
    old = deprecated("gm.old", instead="gm.new", removed_in="0.3")(new)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            old(1.0)
        old(1.0)
    assert len(caught) == 2


def test_a_renamed_argument_works_and_warns() -> None:
    function = renamed(removed_in="0.3", num_iterations="num_steps")(new)
    with pytest.warns(GramianDeprecationWarning, match=r"new\(num_iterations=\.\.\.\) .* write num_steps=") as caught:
        here, value = line(), function(1.0, num_iterations=2)  # pyright: ignore
    assert value == 3.0
    assert caught[0].lineno == here
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert function(1.0, num_steps=2) == 3.0
    with pytest.raises(InputError, match="num_iterations= and num_steps="):
        function(1.0, num_iterations=2, num_steps=3)  # pyright: ignore


def test_methods_and_classes() -> None:
    class Old:
        @deprecated("Old", instead="New", removed_in="0.3")
        def __init__(self) -> None:
            self.value = 1

        @renamed(removed_in="0.3", a="b")
        def method(self, b: int) -> int:
            return self.value + b

    with pytest.warns(GramianDeprecationWarning, match="Old is deprecated"):
        old = Old()
    with pytest.warns(GramianDeprecationWarning, match="method"):
        assert old.method(a=1) == 2  # pyright: ignore


def test_it_is_a_warning_of_gramian_and_of_python() -> None:
    assert issubclass(GramianDeprecationWarning, GramianWarning)
    assert issubclass(GramianDeprecationWarning, DeprecationWarning)


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def test_what_is_due_is_gone() -> None:
    """Fails when the version is raised to one that a deprecation names: remove that name and its test."""
    now = _version(gramian.__version__)
    found = [
        (path.name, version)
        for path in Path(gramian.__file__).parent.rglob("*.py")
        for version in re.findall(r'removed_in="([0-9.]+)"', path.read_text(encoding="utf-8"))
    ]
    assert found, "the examples of deprecation.py are found"
    assert [(name, version) for name, version in found if _version(version) <= now] == []
