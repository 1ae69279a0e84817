"""Nothing that is read or received is executed: the package's code has no call that unpickles or evaluates."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("src", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))

# Modules whose load functions execute what they read. `pickletools` is not one: it lists opcodes and runs none.
MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "multiprocessing"}
BUILTINS = {"eval", "exec"}
# torch.distributed's collectives for Python objects, which pickle: all_gather_object, broadcast_object_list, ...
OBJECTS = ("_object", "_objects", "_object_list")


def offenses(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            named = [alias.name for alias in node.names]
            modules = named if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{node.lineno}: import {m}" for m in modules if m.split(".")[0] in MODULES)
            if isinstance(node, ast.ImportFrom):
                yield from (f"{node.lineno}: {name}" for name in named if name.endswith(OBJECTS))
                if node.module == "torch":  # so that every call is seen below as torch.load
                    yield from (f"{node.lineno}: from torch import {name}" for name in named if name == "load")
        elif isinstance(node, ast.Attribute) and node.attr.endswith(OBJECTS):
            yield f"{node.lineno}: {node.attr}"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in BUILTINS:
                yield f"{node.lineno}: {name}()"
            if name in ("torch.load", "torch.serialization.load") and options.get("weights_only") != "True":
                yield f"{node.lineno}: {name} without weights_only=True"
            if options.get("allow_pickle", "False") != "False":
                yield f"{node.lineno}: {name} with allow_pickle"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_unpickles(path: Path) -> None:
    assert list(offenses(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import a, torch.multiprocessing, multiprocessing.pool",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "from torch import load",
        "dist.all_gather_object(parts, value)",
        "from torch.distributed import broadcast_object_list",
        "np.load(file, allow_pickle=True)",
        "eval(text)",
    ],
)
def test_each_kind_is_found(code: str) -> None:
    assert list(offenses(ast.parse(code)))


def test_what_is_safe_passes() -> None:
    code = (
        "import pickletools\ntorch.load(f, weights_only=True, mmap=True)\nmodel.eval()\nnp.load(f, allow_pickle=False)"
    )
    assert list(offenses(ast.parse(code))) == []
