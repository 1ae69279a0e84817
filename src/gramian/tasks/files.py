"""Tasks by name, and from a user's file, which becomes a module that other processes can import."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from torch import nn

from gramian.checkpoint.faults import plain
from gramian.errors import GramianError, TaskError
from gramian.tasks.table import TASKS
from gramian.training import Task
from gramian.training.interrupts import is_interruption
from gramian.training.task import described

__all__ = ["load"]


def load(spec: str, *, write: str = "{}") -> Task:
    """Return a built-in task by name, or a task from a file: `path/file.py:function`, which returns a `gm.Task`.

    The file is imported as a module of its name, from its folder, so that it can import modules beside it, and worker
    processes that are spawned can import it too; where the name is that of another module (`random.py`), it gets one
    of its own, and its functions cannot be sent to spawned processes. A task without a name is named after its file and
    function. What tells it from other tasks when a run is resumed is the file's path and the function.

    Args:
        spec: a key of `TASKS`, or `path/file.py:function`.
        write: for errors: how a spec is written, as in "gramian train {}".
    Returns: the task.
    Raises:
        TaskError: there is no such task, or its function failed; the message has the line.
    Cost: that of running the file.
    Source: this library's own.

    >>> load("digits-10").name
    'digits-10'
    """
    if spec in TASKS:
        return TASKS[spec].make()
    path, colon, function = spec.rpartition(":")
    if spec.endswith(".py"):
        raise TaskError(_without_function(spec, write))
    if not colon or not path.endswith(".py"):
        raise TaskError(
            f"no task is named {plain(repr(spec))}; built in: {', '.join(TASKS)}; or give path/file.py:function"
        )
    if not os.path.isfile(path):  # unlike Path's, it takes names of any length
        raise TaskError(_no_file(path))
    file = Path(path).resolve()
    try:
        scope = vars(_imported(file))
        if not callable(scope.get(function)):
            own = {k: v for k, v in scope.items() if getattr(v, "__module__", None) == scope["__name__"]}
            names = [k for k, v in own.items() if callable(v) and not k.startswith("_") and not isinstance(v, type)]
            raise TaskError(f"{path} has no function {function!r}; it defines {', '.join(names) or 'none'}")
        task = scope[function]()
    except GramianError:
        raise
    except BaseException as error:
        if is_interruption(error):
            raise
        raise TaskError(f"task {spec} raised {described(error, str(file))}") from error
    if not isinstance(task, Task):
        model = ". Put the model into one: gm.Task(lambda: model, objective, train_loader, evaluate)"
        raise TaskError(
            f"task {spec} returned {type(task).__name__}; wanted a gm.Task{model * isinstance(task, nn.Module)}"
        )
    name = task.name if task.name != Task.name else f"{file.name}:{function}"
    return replace(task, name=name, source=task.source or f"{file}:{function}")


class _Fresh(SourceFileLoader):
    """Compiles the file as it is now, and leaves no compiled copy beside it."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _imported(file: Path) -> ModuleType:
    """Run a file as a module, which `sys.modules` then has; a new one each time, since the file may have changed."""
    name = _free_name(file)
    folder = str(file.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(name, file, loader=_Fresh(name, str(file)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        raise
    return module


def _free_name(file: Path) -> str:
    """The file's own name, unless another module has it."""
    name = file.stem
    loaded = sys.modules.get(name)
    place = getattr(loaded, "__file__", None)
    if loaded is None and name not in sys.stdlib_module_names:
        try:
            found = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):
            found = None
        place = found.origin if found is not None else str(file)
    if place is not None and os.path.realpath(place) == str(file):
        return name
    return f"{name}_{hashlib.sha256(str(file).encode(errors='surrogateescape')).hexdigest()[:8]}"


def _no_file(path: str) -> str:
    what = "is not a regular file" if os.path.lexists(path) else "does not exist"
    return f"task file {plain(path)} {what}"


def _without_function(path: str, write: str) -> str:
    """The error for a file whose function was not named: those that may return a task, read without running it."""
    if not os.path.isfile(path):
        return _no_file(path)
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"), path)
    except (OSError, SyntaxError, ValueError) as error:
        return f"task file {path} is not Python: {described(error, path)}"
    functions = {f.name: f for f in tree.body if isinstance(f, ast.FunctionDef)}
    tasks = _that_make_tasks(functions)
    free = [name for name, f in functions.items() if not name.startswith("_") and not _wants(f)]
    likely = [name for name in free if name in tasks] or free
    likely.sort(key=lambda name: (name != "task", bool(functions[name].args.defaults)))  # a helper has arguments
    if len(likely) == 1:
        return f"{path} is a file; name its function that returns the task: {write.format(f'{path}:{likely[0]}')}"
    known = f"one of {', '.join(likely)}, as in {write.format(f'{path}:{likely[0]}')}" if likely else "but it has none"
    return f"{path} is a file; name its function that returns the task: {known}"


def _wants(function: ast.FunctionDef) -> bool:
    """Whether an argument has no default."""
    args = function.args
    return None in args.kw_defaults or len(args.defaults) < len(args.posonlyargs + args.args)


def _that_make_tasks(functions: Mapping[str, ast.FunctionDef]) -> set[str]:
    """The functions that return a `Task` by their annotation, make one, or call a function of the file that does."""
    called = {name: _called(function) for name, function in functions.items()}
    made = {name for name, calls in called.items() if "Task" in calls}
    while more := {name for name, calls in called.items() if not made.isdisjoint(calls)} - made:
        made |= more
    return made


def _called(function: ast.FunctionDef) -> set[str]:
    """The last parts of the names that a function calls, and of its annotation."""
    makes = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
    found = [node for node in (function.returns, *makes) if node is not None]
    return {ast.unparse(node).strip("'").split(".")[-1] for node in found}
