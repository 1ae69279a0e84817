"""The folder of a run: what is kept while it trains, so that it can be killed at any moment, and what it leaves."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gramian.checkpoint import load_tensors, load_tree, save_tensors, save_tree
from gramian.checkpoint.faults import plain
from gramian.errors import CheckpointError, InputError
from gramian.report import write_text
from gramian.training.lock import locked

__all__ = ["CHECKPOINT", "METRICS", "MODEL", "Folder", "read"]

CHECKPOINT, METRICS, MODEL = "checkpoint.safetensors", "metrics.jsonl", "model.safetensors"

# Metadata of a finished run's model: what `Folder.finish` was told, as JSON.
FINISHED = "gramian.run"

# What a killed process leaves beside these files: temporaries of ours, and safetensors' own.
HALF_WRITTEN = (*(f".{name}.*.tmp" for name in (CHECKPOINT, METRICS, MODEL)), ".tmp??????")

EVERY_SECONDS = 30.0

# Writing may take so much of the time since it was last done: a large model is then kept less often.
LARGEST_SHARE = 0.1


class Folder:
    """A run's folder holds `checkpoint.safetensors` exactly while the run is unfinished, and `metrics.jsonl`.

    A checkpoint is one file, put in place by a rename, and nothing in it is executed. When the run is finished,
    `model.safetensors` takes its place, with what is known of the run in its metadata. The lines of `metrics.jsonl`
    are written as they come; those beyond the checkpoint are dropped when the run goes on, which measures them again.

    Args:
        path: the folder, made where it is missing, and locked against other processes until `close`.
        identity: what makes the run this run, in words, by name.
    """

    def __init__(self, path: Path, identity: dict[str, str]) -> None:
        self.path, self.identity = path, identity
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / METRICS).touch()
        except OSError as error:
            raise InputError(f"train: cannot write to {path}: {error.strerror}. Choose another folder") from None
        self._lock = locked(path)
        self._kept_at, self._cost = time.perf_counter(), 0.0

    def close(self) -> None:
        """Lets other processes have the folder."""
        self._lock.close()

    def open(self, *, resume: bool) -> None:
        """Makes ready for a run: one to go on with, which `read` finds, or a new one.

        Raises `InputError` where an unfinished run would be overwritten.
        """
        for pattern in HALF_WRITTEN:
            for left in self.path.glob(pattern):
                left.unlink(missing_ok=True)
        if not resume and (self.path / CHECKPOINT).exists():
            raise InputError(
                f"train: {self.path} holds an unfinished run. Go on with it (resume=True, --resume), choose "
                f"another folder, or delete {CHECKPOINT} there"
            )
        if not resume or read(self.path, self.identity) is None:
            # The model of an earlier run goes first, so that it is never taken for the new run's.
            (self.path / MODEL).unlink(missing_ok=True)
            self.write([])

    def write(self, history: list[dict[str, float]]) -> None:
        """Writes `metrics.jsonl` anew."""
        write_text(self.path / METRICS, "".join(map(_line, history)))

    def append(self, row: dict[str, float]) -> None:
        """Adds an evaluation to `metrics.jsonl`."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(_line(row))

    def due(self, *, evaluated: bool) -> bool:
        """Whether to keep the run now: after an evaluation or half a minute, if writing is quick enough for that."""
        since = time.perf_counter() - self._kept_at
        return (evaluated or since >= EVERY_SECONDS) and since * LARGEST_SHARE >= self._cost

    def keep(self, state: dict[str, Any]) -> None:
        """Writes the checkpoint."""
        begin = time.perf_counter()
        save_tree(self.path / CHECKPOINT, {"identity": self.identity, **state})
        self._kept_at = time.perf_counter()
        self._cost = self._kept_at - begin

    def finish(self, model: nn.Module, summary: dict[str, Any]) -> None:
        """Writes the model and what is known of its run, and removes the checkpoint."""
        text = json.dumps({"identity": self.identity, **summary})
        tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        save_tensors(self.path / MODEL, tensors, {"gramian.task": self.identity["task"], FINISHED: text})
        (self.path / CHECKPOINT).unlink(missing_ok=True)


def read(path: Path, identity: dict[str, str]) -> dict[str, Any] | None:
    """What was kept of an unfinished run, or, with the key `finished`, what a finished one left; `None`: no run.

    Raises `InputError` where it is another run, and names what differs.
    """
    finished = not (path / CHECKPOINT).exists()
    if not finished:
        state = load_tree(path / CHECKPOINT)
    else:
        text = load_tensors(path / MODEL)[1].get(FINISHED) if (path / MODEL).exists() else None
        if text is None:
            return None
        try:
            state = json.loads(text)
        except (ValueError, RecursionError):
            state = None
    if not isinstance(state, dict) or not isinstance(known := state.get("identity"), dict):
        raise CheckpointError(f"{path}: its files are not those of a run of gm.train. Choose another folder")
    differing = [
        f"{name} {plain(known.get(name, 'unknown'))}, not {own}"
        for name, own in identity.items()
        if known.get(name) != own
    ]
    if differing:
        raise InputError(
            f"train: cannot resume, the run in {path} is of {'; '.join(differing)}. Give what it began with, or choose "
            "another folder"
        )
    return state | {"finished": finished}


def _line(row: dict[str, float]) -> str:
    return json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}) + "\n"
