"""Where `watch` writes: JSON lines, or a logger."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from gramian.errors import InputError
from gramian.report import Finding

__all__ = ["as_log"]


class _Jsonl:
    """Writes a line for each step that was looked at, and one for each finding."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, numbers: Mapping[str, float], found: Collection[Finding], step: int) -> None:
        lines: list[dict[str, Any]] = [{k: v if math.isfinite(v) else str(v) for k, v in numbers.items()}]
        for f in found:
            told = {"severity": f.severity, "title": f.title, "where": f.where, "evidence": f.evidence}
            lines.append({"finding": f.code, **told, "cause": f.cause, "remedy": f.remedy})
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **line}) + "\n" for line in lines)


def as_log(log: Any) -> Callable[[Mapping[str, float], Collection[Finding], int], None] | None:
    """What writes the numbers and findings of a step to a path or a logger; `None` for `None`."""
    if log is None or isinstance(log, (str, os.PathLike)):
        return None if log is None else _Jsonl(log)
    if not callable(getattr(log, "log", None)):
        raise InputError(f"watch: log is a {type(log).__name__}; wanted a path, or a logger with log(metrics, step)")

    def write(numbers: Mapping[str, float], found: Collection[Finding], step: int) -> None:
        counts = {f"watch/{one}s": float(sum(f.severity == one for f in found)) for one in ("error", "warning")}
        log.log({f"watch/{key}": value for key, value in numbers.items()} | counts, step)

    return write
