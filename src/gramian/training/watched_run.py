"""A run whose steps `gm.watch` looks at: the run keeps what is found, also over an interruption."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.optim import Optimizer

from gramian.inspection import Watch, watch
from gramian.report import Finding
from gramian.training.task import Run

__all__ = ["told", "watched"]


@contextmanager
def watched(run: Run, optimizer: Optimizer) -> Iterator[Watch]:
    """A context in which findings become rows of `run.findings`, each code and place once in a run.

    On several ranks each watches its own share of the batches, and keeps what it found itself.
    """
    known = {(row["code"], row["where"]) for row in run.findings}
    begin = run.steps

    def found(finding: Finding, step: int) -> None:
        if (finding.code, finding.where) not in known:
            known.add((finding.code, finding.where))
            names = ("severity", "code", "where", "title", "evidence", "cause", "remedy")
            run.findings.append({"step": begin + step} | {name: str(getattr(finding, name)) for name in names})

    with watch(run.model, optimizer, on_finding=found) as watching:
        try:
            yield watching
        finally:
            run.looks = watching.looks


def told(row: dict) -> str:
    """A row of `Run.findings` in a line."""
    place = f" at {row['where']}" if row["where"] else ""
    return f"step {row['step']:,}: {row['title']} ({row['code']}{place}). {row['cause']} {row['remedy']}".rstrip()
