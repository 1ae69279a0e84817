"""How `watch` tells: it calls back, raises, and writes JSON lines or to a logger."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gramian.errors import FindingError, InputError
from gramian.report import SEVERITIES, Finding

__all__ = ["Teller", "as_log"]


class Teller:
    """Keeps each finding once, by its code and place, and tells those that are new.

    Args:
        on_finding: called with each and its step.
        raise_on: severity, or codes, for which `FindingError` is raised.
        log: called with numbers, the new findings and the step, on rank 0.
    """

    def __init__(
        self, on_finding: Callable[[Finding, int], Any] | None, raise_on: str | Collection[str] | None, log: Any
    ) -> None:
        self.findings: list[Finding] = []
        self._on_finding, self._raise_on, self._log = on_finding, raise_on, log

    def __call__(self, found: Collection[Finding], numbers: Mapping[str, float], step: int) -> None:
        known = {(f.code, f.where) for f in self.findings}
        new = [f for f in found if (f.code, f.where) not in known]
        self.findings += new
        if self._log is not None and not (dist.is_initialized() and dist.get_rank()):
            self._log(numbers, new, step)
        for finding in new:
            if self._on_finding is not None:
                self._on_finding(finding, step)
        for finding in new:
            if self._raises(finding):
                raise FindingError(finding, step)

    def _raises(self, finding: Finding) -> bool:
        if isinstance(self._raise_on, str):
            return SEVERITIES.index(finding.severity) <= SEVERITIES.index(self._raise_on)  # type: ignore[arg-type]
        return self._raise_on is not None and finding.code in self._raise_on


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
