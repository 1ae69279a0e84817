"""The folder of a run: the checkpoint and metrics while it trains, and the model when it is finished."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gramian.block import blocks
from gramian.checkpoint import load_tensors, load_tree, save_tensors, save_tree
from gramian.checkpoint.faults import plain
from gramian.errors import CheckpointError, InputError
from gramian.report import write_text
from gramian.training.lock import locked

__all__ = ["CHECKPOINT", "METRICS", "MODEL", "Folder", "read"]

CHECKPOINT, METRICS, MODEL = "checkpoint.safetensors", "metrics.jsonl", "model.safetensors"

# Key in the metadata of a finished run's model, with the summary of `Folder.finish` as JSON.
FINISHED = "gramian.run"

# Temporary files, ours and safetensors' own, that a killed process leaves behind.
HALF_WRITTEN = (*(f".{name}.*.tmp" for name in (CHECKPOINT, METRICS, MODEL)), ".tmp??????")

EVERY_SECONDS = 30.0

# Writing checkpoints may take up to this share of the time: a large model is then saved less often.
LARGEST_SHARE = 0.1


class Folder:
    """A run's folder: `checkpoint.safetensors` while the run is unfinished, then `model.safetensors`; `metrics.jsonl`.

    A checkpoint is one file, written atomically, and reading it executes nothing. When the run is finished,
    `model.safetensors` replaces it, with a summary of the run in its metadata. Each evaluation adds a line to
    `metrics.jsonl` at once; a resumed run drops the lines after its checkpoint and measures them again.

    Args:
        path: the folder, created if it is missing, and locked against other processes until `close`.
        identity: the settings that a run must share with a checkpoint to resume it, as text by name.
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
        """Release the folder for other processes."""
        self._lock.close()

    def open(self, *, resume: bool) -> None:
        """Prepare the folder for a run: the one in it, with `resume`, or a new one.

        Raises `InputError` where an unfinished run would be overwritten.
        """
        for pattern in HALF_WRITTEN:
            for left in self.path.glob(pattern):
                left.unlink(missing_ok=True)
        if not resume and (self.path / CHECKPOINT).exists():
            raise InputError(
                f"train: {self.path} holds an unfinished run. Resume it (resume=True, --resume), choose another "
                f"folder, or delete {CHECKPOINT} there"
            )
        if not resume or read(self.path, self.identity) is None:
            # Delete an earlier run's model first, so that it is never mistaken for the new run's.
            (self.path / MODEL).unlink(missing_ok=True)
            self.write([])

    def write(self, history: list[dict[str, float]]) -> None:
        """Rewrite `metrics.jsonl`."""
        write_text(self.path / METRICS, "".join(map(_line, history)))

    def append(self, row: dict[str, float]) -> None:
        """Append an evaluation to `metrics.jsonl`."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(_line(row))

    def due(self, *, evaluated: bool) -> bool:
        """Whether to write a checkpoint: after an evaluation or half a minute, unless that would cost too much time."""
        since = time.perf_counter() - self._kept_at
        return (evaluated or since >= EVERY_SECONDS) and since * LARGEST_SHARE >= self._cost

    def keep(self, state: dict[str, Any]) -> None:
        """Write the checkpoint."""
        begin = time.perf_counter()
        save_tree(self.path / CHECKPOINT, {"identity": self.identity, **state})
        self._kept_at = time.perf_counter()
        self._cost = self._kept_at - begin

    def finish(self, model: nn.Module, summary: dict[str, Any]) -> None:
        """Write the model and the summary of its run, and remove the checkpoint."""
        text = json.dumps({"identity": self.identity, **summary})
        tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        about = {"gramian.task": self.identity["task"], FINISHED: text} | blocks(model).metadata()
        save_tensors(self.path / MODEL, tensors, about)
        (self.path / CHECKPOINT).unlink(missing_ok=True)


def read(path: Path, identity: dict[str, str]) -> dict[str, Any] | None:
    """Return the state of the run in a folder, whose key `finished` says whether it is done; `None` if there is no run.

    Raises `InputError`, which names what differs, where the run has other settings.
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
    if not isinstance(state, dict) or not isinstance(saved := state.get("identity"), dict):
        raise CheckpointError(f"{path}: these files are not from a run of gm.train. Choose another folder")
    differing = [
        f"{name} {plain(saved.get(name, 'unknown'))}, not {own}"
        for name, own in identity.items()
        if saved.get(name) != own
    ]
    if differing:
        raise InputError(
            f"train: cannot resume, the run in {path} is of {'; '.join(differing)}. Give the settings that it began "
            "with, or choose another folder"
        )
    return state | {"finished": finished}


def _line(row: dict[str, float]) -> str:
    return json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}) + "\n"
