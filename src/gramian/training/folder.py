"""The folder of a run: checkpoints and metrics while it trains, and the model when it is finished."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from gramian.checkpoint import load_tensors, load_tree, open_checkpoint, save_tensors, verify_file
from gramian.checkpoint.faults import plain
from gramian.checkpoint.folders import CHECKPOINT
from gramian.checkpoint.trees import TREE, pack_tree
from gramian.errors import CheckpointError, GramianWarning, InputError
from gramian.report import write_text
from gramian.training.checkpoint_memory import Room
from gramian.training.lock import locked
from gramian.training.own_files import Owned

__all__ = ["CHECKPOINT", "FORMAT", "METRICS", "MODEL", "PREVIOUS", "Folder", "holds_finished", "read"]

PREVIOUS = "checkpoint.previous.safetensors"
METRICS, MODEL = "metrics.jsonl", "model.safetensors"

# Of checkpoints and finished runs; to be raised when their content changes so that an older one cannot be resumed.
FORMAT = 3

# Key in the metadata of a finished run's model, with the summary of `Folder.finish` as JSON.
FINISHED = "gramian.run"

# Temporary files of ours that a killed process leaves behind: those of `save_tensors` and of `write_text`.
HALF_WRITTEN = re.compile(
    rf"\.({'|'.join(map(re.escape, (CHECKPOINT, PREVIOUS, MODEL)))})\.\d+-[0-9a-f]{{8}}\.tmp"
    rf"|\.{re.escape(METRICS)}\.[0-9a-f]{{12}}\.tmp"
)

# How each line of a run's metrics begins.
FIRST_LINE = '{"step": '

# What stands for an option of a run that is not among its settings.
UNSET = "the default"

# How a finished model is trained further (docs/train.md).
FURTHER = "To train its model further, load it in a task's model() (gramian.checkpoint.load_into)"

EVERY_SECONDS = 30.0

# Writing checkpoints may take up to this share of the time: a large model is then saved less often.
LARGEST_SHARE = 0.1


class Folder:
    """A run's folder: `checkpoint.safetensors` while the run is unfinished, then `model.safetensors`; `metrics.jsonl`.

    A checkpoint is one file, written atomically, and reading it executes nothing. The one before is kept as
    `checkpoint.previous.safetensors` until the next is written and verified. The run goes on while a checkpoint is
    written, from a copy, by a thread; what it raises is raised by the next call here. When the run is finished,
    `model.safetensors` replaces both, with a summary of the run in its metadata. Each evaluation adds a line to
    `metrics.jsonl` at once; a resumed run drops the lines after its checkpoint and measures them again.

    Nothing in the folder changes before the first evaluation or checkpoint, and no file that is not of a run ever does.
    Before each write the run looks whether the folder is still the one that it locked, and its files those that it
    wrote; where they are not, it ends and leaves them.

    Args:
        path: the folder, created if it is missing, and locked against other processes until `close`.
        identity: the settings that a run must share with a checkpoint to resume it, as text by name.
        shown: the path as the user gave it, for messages.
    """

    def __init__(self, path: Path, identity: dict[str, str], shown: Path | None = None) -> None:
        self.path, self.identity, self.shown = path, identity, shown or path
        self._made = [parent for parent in (path, *path.parents) if not os.path.exists(parent)]
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except (OSError, ValueError) as error:
            self._remove_made()
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(
                f"train: cannot write to {plain(self.shown, 500)}: {reason}. Choose another folder"
            ) from None
        self._lock = locked(path, self.shown)
        self._owned = Owned(path, self.shown)
        self._kept_at, self._cost = time.perf_counter(), 0.0
        self._writer = ThreadPoolExecutor(1, "gramian-checkpoint")
        self._writing: Future[None] | None = None
        self.room = Room(self._writer)
        self._begun = False
        self._torn = self._to_tell = ""  # why a line of metrics could not be written, and until that was told
        self.sound = True  # whether the checkpoint in the folder is whole, and worth keeping as the previous one

    def close(self) -> None:
        """Release the folder for other processes; it is removed if it was made for this run and nothing is in it."""
        self.room.leave()
        self._writer.shutdown()
        is_here = self._owned.is_here()
        self._lock.close()
        self._owned.close()
        if is_here:
            self._remove_made()

    def open(self, *, resume: bool) -> None:
        """Check what is in the folder, for the run in it, with `resume`, or a new one.

        Raises `InputError` where an unfinished run, or a file that is not of a run, would be overwritten.
        """
        for name in (MODEL, METRICS, CHECKPOINT, PREVIOUS):
            if (self.path / name).is_symlink() or (self.path / name).exists():
                _check_own(self.path / name, self.shown / name)
        self._owned.note(MODEL, METRICS, CHECKPOINT, PREVIOUS)
        for left in self.path.iterdir():
            if HALF_WRITTEN.fullmatch(left.name) and left.is_file():
                left.unlink(missing_ok=True)
        if not resume and any((self.path / name).exists() for name in (CHECKPOINT, PREVIOUS)):
            raise InputError(
                f"train: {self.shown} holds an unfinished run. Resume it (resume=True, --resume), choose another "
                f"folder, or delete {CHECKPOINT} there"
            )

    def _begin(self, history: list[dict[str, float]]) -> None:
        """Make the folder the run's own, when it has something to keep: an earlier run's model goes."""
        if self._begun:
            return
        try:
            # Deleted first, so that it is never mistaken for the new run's.
            self._owned.check([MODEL], lambda path: False)
            (self.path / MODEL).unlink(missing_ok=True)
            self._owned.note(MODEL)
            self.write(history)
        except OSError as error:
            raise CheckpointError(f"train: cannot write to {plain(self.shown, 500)} ({error.strerror})") from error
        self._begun = True

    def write(self, history: list[dict[str, float]]) -> None:
        """Rewrite `metrics.jsonl`, unless it is as it should be; without evaluations there is none."""
        text = "".join(map(_line, history))
        self._owned.check([METRICS], _is_metrics)
        if not text:
            (self.path / METRICS).unlink(missing_ok=True)
            return
        with suppress(OSError, ValueError):
            if (self.path / METRICS).read_text(encoding="utf-8") == text:
                return
        write_text(self.path / METRICS, text)
        self._owned.note(METRICS)

    def append(self, history: list[dict[str, float]]) -> None:
        """Append the last evaluation to `metrics.jsonl`. Where that fails, the next one writes all lines again."""
        self._begin(history[:-1])
        self._owned.check([MODEL], lambda path: False)
        self._owned.check([METRICS], _is_metrics)
        try:
            if self._torn:
                self.write(history)
            else:
                with (self.path / METRICS).open("a", encoding="utf-8") as file:
                    file.write(_line(history[-1]))
            self._owned.note(METRICS)
            self._torn = self._to_tell = ""
        except (OSError, InputError) as error:
            if self._torn:
                self.wait()
            else:
                self._torn = self._to_tell = getattr(error, "strerror", None) or str(error)

    def due(self) -> tuple[bool, bool]:
        """Whether to write a checkpoint now, and if an evaluation comes first: then, or after half a minute, unless
        that would cost too much time.

        Raises `CheckpointError` where the last one could not be written.
        """
        since = time.perf_counter() - self._kept_at
        if self._writing is not None and not self._writing.done():
            cost = since
        else:
            self.wait()
            cost = self._cost
        is_cheap = since * LARGEST_SHARE >= cost
        return is_cheap and since >= EVERY_SECONDS, is_cheap

    def keep(self, state: dict[str, Any]) -> None:
        """Copy the state and begin to write the checkpoint; the one before stays until this one is verified."""
        self._wait()
        self.room.leave()
        begin = self._kept_at = time.perf_counter()
        self._begin(state["history"])
        packed = pack_tree({"format": FORMAT, "identity": self.identity, **state}).copied()

        def write() -> None:
            self._owned.check([MODEL], lambda path: False)
            self._owned.check([CHECKPOINT, PREVIOUS], _is_checkpoint)
            packed.save(self.path / CHECKPOINT, self.path / PREVIOUS if self.sound else None)
            self._owned.note(CHECKPOINT, PREVIOUS)
            self.sound = True
            self._kept_at = time.perf_counter()
            self._cost = self._kept_at - begin

        self._writing = self._writer.submit(write)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written; raises what its thread raised.

        Where there was none to raise, warns of metrics that could not be written: a full disk is told in one line.
        """
        self._wait()
        if self._to_tell:
            told, self._to_tell = self._to_tell, ""
            warnings.warn(
                f"train: {METRICS} could not be written ({told}); it is tried again at the next evaluation",
                GramianWarning,
                stacklevel=4,
            )

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def finish(
        self,
        tensors: dict[str, Tensor],
        about: dict[str, str],
        summary: dict[str, Any],
        history: list[dict[str, float]],
    ) -> None:
        """Write the model, with the metadata `about` and the summary of its run, verify it; remove the checkpoints."""
        self._begin(history)
        if self._torn:
            self.write(history)
        text = json.dumps({"format": FORMAT, "identity": self.identity, **summary})
        self._owned.check([MODEL], lambda path: False)
        self._owned.check([CHECKPOINT, PREVIOUS], _is_checkpoint)
        save_tensors(self.path / MODEL, tensors, {"gramian.task": self.identity["task"], FINISHED: text} | about)
        verify_file(self.path / MODEL)
        for name in (CHECKPOINT, PREVIOUS):
            (self.path / name).unlink(missing_ok=True)

    def _remove_made(self) -> None:
        for made in self._made:
            with suppress(OSError, ValueError):  # it is not empty, or its name is none
                made.rmdir()


def _check_own(path: Path, shown: Path) -> None:
    """Raise `InputError` where a file has the name of one of a run's, and is not one."""
    own = path.is_file() and not path.is_symlink()
    if own and path.name == METRICS:
        own = _is_metrics(path)
    elif own and path.name == MODEL:
        try:
            own = FINISHED in load_tensors(path, verify=False)[1]
        except CheckpointError:
            own = False
    if not own:
        raise InputError(_not_ours(shown))


def _is_metrics(path: Path) -> bool:
    """Whether a file is a run's metrics; true for what is no file, whose writing fails by itself."""
    if not path.is_file():
        return True
    with path.open("rb") as file:
        start = file.read(len(FIRST_LINE))
    return FIRST_LINE.encode().startswith(start)


def _is_checkpoint(path: Path) -> bool:
    try:
        return TREE in open_checkpoint(path, stored=True).metadata
    except CheckpointError:
        return False


def _not_ours(shown: Path) -> str:
    return f"train: {shown} is not from a run of gramian, and would be overwritten. Move it, or choose another folder"


def holds_finished(place: str | Path) -> str:
    """The line that refuses a new run in the folder of a finished one, and says how its model is trained further."""
    return f"train: {place} holds a finished run. Choose another folder, or delete {MODEL} there. {FURTHER}"


def read(path: Path, identity: dict[str, str], shown: Path | None = None) -> dict[str, Any] | None:
    """Return the state of the run in a folder, whose key `finished` says whether it is done; `None` if there is no run.

    Where the last checkpoint is damaged, it is that of the one before, and the key `damage` says why.
    Raises `InputError`, which names what differs, where the run has other settings.
    """
    shown = shown or path
    state, damage = _last_checkpoint(path, shown)
    finished = state is None
    if finished:
        text = load_tensors(path / MODEL)[1].get(FINISHED) if (path / MODEL).exists() else None
        if text is None:
            return None
        try:
            state = json.loads(text)
        except (ValueError, RecursionError):
            state = None
    if not isinstance(state, dict) or not isinstance(saved := state.get("identity"), dict):
        raise CheckpointError(f"{shown}: these files are not from a run of gm.train. Choose another folder")
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{shown}: a run of format {plain(state.get('format', 1))}; this version of gramian reads {FORMAT}. Go on "
            "with the version that began it, or choose another folder"
        )
    differing = [
        f"{name} {plain(_setting(saved, name, state.get('rates')), 1000)}, not {_setting(identity, name)}"
        for name in (*identity, *(name for name in saved if name not in identity))  # options that are unset are in none
        if saved.get(name) != identity.get(name)
    ]
    if differing:
        raise InputError(
            f"train: cannot resume, the run in {shown} is of {'; '.join(differing)}. Give the settings that it began "
            f"with, or choose another folder{f'. {FURTHER}' if finished else ''}"
        )
    return state | {"finished": finished, "damage": damage}


def _setting(settings: dict[str, Any], name: str, rates: Any = None) -> Any:
    """What a run's setting is, in words; `rates` are those that a run in a folder had.

    >>> _setting({"learning rate": "usual"}, "learning rate", [0.1732]), _setting({"seed": "0"}, "seed")
    ('the usual one (0.173)', '0')
    """
    value = settings.get(name, UNSET)
    if value != "usual":
        return value
    match rates:
        case [float(rate), *_]:
            return f"the usual one ({rate:.3g})"
    return "the usual one"


def _last_checkpoint(path: Path, shown: Path) -> tuple[Any, str]:
    """The content of the last checkpoint that is whole, and what is wrong with a later one; `None` without any."""
    damage: CheckpointError | None = None
    for name in (CHECKPOINT, PREVIOUS):
        if (path / name).exists():
            try:
                if TREE not in open_checkpoint(path / name, stored=True).metadata:
                    raise InputError(_not_ours(Path(shown, name)))
                return load_tree(path / name), "" if damage is None else str(damage)
            except CheckpointError as error:
                if damage is not None:
                    raise CheckpointError(f"{damage} The one before is damaged too: {error}") from error
                damage = error
    if damage is not None:
        raise damage
    return None, ""


def _line(row: dict[str, float]) -> str:
    return json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}) + "\n"
