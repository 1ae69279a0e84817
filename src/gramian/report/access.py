"""Where a tensor stands in nested data, as Python reads it: `batch[0]["image"]`, `kwargs["mask"]`.

Actions hold such a path as a word, and paste it into their code, so it can be nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from gramian.errors import InputError

_STEP = r"\[(\d+)\]|\[\"([^\"\\\x00-\x1f]*)\"\]"
_PATH = re.compile(rf"(batch|args|kwargs)((?:{_STEP})*)")


def steps_of(path: str) -> list[int | str]:
    """Return the places and keys of a path.

    >>> steps_of('batch[0]["x"]')
    [0, 'x']
    """
    found = _PATH.fullmatch(path)
    if found is None:
        raise InputError(f'path: expected the likes of batch[0]["x"], got {path!r}.')
    return [int(place) if place else key for place, key in re.findall(_STEP, found[2])]


def path_to(root: str, steps: list[int | str]) -> str:
    """Return the path with these steps.

    >>> path_to("batch", [0, "x"])
    'batch[0]["x"]'
    """
    return root + "".join(
        f"[{step if isinstance(step, int) else json.dumps(step, ensure_ascii=False)}]" for step in steps
    )


def get(value: Any, path: str) -> Any:
    """Return what stands at a path of nested sequences and mappings.

    >>> get(({"x": 5},), 'batch[0]["x"]')
    5
    """
    for step in steps_of(path):
        value = value[step]
    return value


def put(value: Any, path: str, new: Any) -> Any:
    """Return the value with something else at the path; what is around it becomes tuples and dicts.

    >>> put(({"x": 5, "y": 6}, 7), 'batch[0]["x"]', 0)
    ({'x': 0, 'y': 6}, 7)
    """
    return _put(value, steps_of(path), new)


def _put(value: Any, steps: list[int | str], new: Any) -> Any:
    if not steps:
        return new
    first, *rest = steps
    inside = _put(value[first], rest, new)
    if isinstance(value, Mapping):
        return {**value, first: inside}
    return (*value[:first], inside, *value[int(first) + 1 :])


def putting(path: str, new: str) -> str:
    """Return Python for the root of a path with something else there, as `put` makes it.

    >>> putting('args[1]["x"]', "0")
    '(*args[:1], {**args[1], "x": 0}, *args[2:])'
    """
    steps = steps_of(path)
    root = path[: path.index("[")] if steps else path
    for i, step in reversed(list(enumerate(steps))):
        around = path_to(root, steps[:i])
        if isinstance(step, str):
            new = f"{{**{around}, {json.dumps(step, ensure_ascii=False)}: {new}}}"
        else:
            before = f"*{around}[:{step}], " if step else ""
            new = f"({before}{new}, *{around}[{step + 1}:])"
    return new
