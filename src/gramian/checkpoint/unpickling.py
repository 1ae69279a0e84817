"""What a pickle describes, as plain data: its instructions are followed, and nothing that it names is called.

A pickle is a program that pushes values and calls functions by their names. Here a call of a function that only puts a
tensor or a container together is carried out by this module's own code; every other call and every object is kept as a
`Record` of its name and contents. So tensors can be read beside objects of unknown classes, and without those: in a
Lightning checkpoint, a whole pickled model, a TorchScript archive, the metadata of torch.distributed.checkpoint.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import torch

from gramian.checkpoint.budgets import OverBudgetError, check_number

__all__ = ["Global", "Record", "Storage", "TensorPart", "read_pickle"]


# What a pickle may ask for, whatever its length: instructions, beside one for so many bytes of its file, since a tensor
# takes some fifty and hundreds of bytes; and values copied by calls, which may be the square of its length.
MOST_STEPS, BYTES_A_STEP, MOST_COPIED = 2_000_000, 16, 4_000_000


class Global(NamedTuple):
    """A function or class that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}" if self.module else self.name


class Storage(NamedTuple):
    """Numbers that lie outside the pickle, under a key; `dtype` is `None` where only the tensor tells it."""

    key: str
    dtype: torch.dtype | None
    numel: int


class TensorPart(NamedTuple):
    """A tensor as a view of a storage, and its full shape if it is one rank's shard of a larger one."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    full_shape: tuple[int, ...] = ()


@dataclass(eq=False)
class Record:
    """An object that was not built: what made it, whether by a call, and what was put into it."""

    of: Global
    args: tuple[Any, ...] = ()
    called: bool = False
    state: dict[Any, Any] = field(default_factory=dict)
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)

    @property
    def contents(self) -> dict[Any, Any]:
        """The values under their names: the attributes of an object, the items of a mapping."""
        return {**self.state, **self.items}

    @property
    def acts(self) -> bool:
        """Whether the pickle wants a function called that may do more than make a value."""
        if not self.called:
            return False
        if self.of == COMPUTED:
            return True
        if BENIGN.fullmatch(str(self.of)):
            return False
        is_class = self.of.name.rpartition(".")[2][:1].isupper()
        return not is_class or self.of.module.split(".")[0] in ACTING


# What is called where it is itself the result of a call.
COMPUTED = Global("", "a function that it looks up")

# Modules whose functions and classes act on the machine. A call of one of these makes a file suspect.
ACTING = frozenset((
    "os", "posix", "nt", "sys", "subprocess", "builtins", "__builtin__", "importlib", "runpy", "shutil", "socket",
    "ctypes", "pty", "code", "codeop", "commands", "webbrowser", "multiprocessing", "threading", "asyncio",
    "pickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "operator", "types", "inspect", "timeit",
    "pdb", "bdb", "profile", "cProfile", "signal", "tempfile", "glob", "linecache", "pip", "urllib", "http",
    "requests",
))  # fmt: skip

# Functions that only make a value; a name that begins with a capital letter is taken for a class.
BENIGN = re.compile(
    r"(torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_\w+|torch\.serialization\._get_layout|torch\.device"
    r"|torch\.jit\._pickle\.\w+|torch\.distributed\.\w+(\.\w+)*\._?[A-Z]\w*|numpy\.(_?core|random)\.\w*(\.\w+)*"
    r"|numpy\.(dtype|ndarray)|_codecs\.encode|datetime\.\w+|copyreg\._reconstructor|collections\.\w+|functools\.partial"
    r"|zoneinfo\.\w+(\.\w+)*|types\.SimpleNamespace|uuid\.UUID|(builtins|__builtin__)\.(set|frozenset|list|tuple|dict"
    r"|complex|slice|range|bytearray|bytes|object|int|float|str|bool|getattr))"
)

_STORAGES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip

_MARK = object()


def read_pickle(stream: IO[bytes], size: int = 0) -> Any:
    """Return the value of one pickle, with `Record` for objects and `TensorPart` for tensors.

    Raises `ValueError` for what is no pickle, or one that this reader does not know, and `OverBudgetError` for one that
    takes more instructions, copies or tensors than a file of `size` bytes with a model in it.
    """
    machine = _Machine(size)
    most = MOST_STEPS + size // BYTES_A_STEP
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if number > most:
                raise OverBudgetError(f"a pickle of more than {most:,} instructions")
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except (IndexError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a valid pickle ({type(error).__name__})") from error
    raise ValueError("not a whole pickle")


class _Machine:
    """The pickle machine's stack and memo."""

    def __init__(self, size: int) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.size, self.tensors, self.copied = size, 0, 0

    def step(self, name: str, argument: Any) -> None:
        """Follow one instruction."""
        if name in _PUSH:
            self.stack.append(argument)
        elif name in _FIXED:
            self.stack.append(_FIXED[name]())
        elif name in ("PROTO", "FRAME"):
            pass
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[int(argument)] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self.stack.append(self.memo[int(argument)])
        elif name in ("GLOBAL", "INST"):
            made = Global(*str(argument).split(" ", 1))
            self.stack.append(_create(made, tuple(self._to_mark()), False) if name == "INST" else made)
        else:
            getattr(self, f"_{name.lower()}", self._unknown(name))()

    def _unknown(self, name: str) -> Callable[[], None]:
        def refuse() -> None:
            raise ValueError(f"the instruction {name} is not known")

        return refuse

    def _to_mark(self) -> list[Any]:
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _mark(self) -> None:
        self.stack.append(_MARK)

    def _pop(self) -> None:
        self.stack.pop()

    def _pop_mark(self) -> None:
        self._to_mark()

    def _dup(self) -> None:
        self.stack.append(self.stack[-1])

    def _stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(Global(str(module), str(name)))

    def _tuple(self) -> None:
        self.stack.append(tuple(self._to_mark()))

    def _tuple1(self) -> None:
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def _tuple2(self) -> None:
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def _tuple3(self) -> None:
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def _list(self) -> None:
        self.stack.append(self._to_mark())

    def _dict(self) -> None:
        values = self._to_mark()
        self.stack.append(dict(zip(values[::2], values[1::2], strict=True)))

    def _frozenset(self) -> None:
        self.stack.append(self._to_mark())

    def _append(self) -> None:
        value = self.stack.pop()
        _elements(self.stack[-1]).append(value)

    def _appends(self) -> None:
        values = self._to_mark()
        _elements(self.stack[-1]).extend(values)

    _additems = _appends

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _items(self.stack[-1])[key] = value

    def _setitems(self) -> None:
        values = self._to_mark()
        _items(self.stack[-1]).update(zip(values[::2], values[1::2], strict=True))

    def _reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self._count(args)
        made = _create(function, tuple(args), True)
        if isinstance(made, TensorPart):
            self.tensors += 1
            check_number(self.tensors, self.size)
        self.stack.append(made)

    def _count(self, args: Any) -> None:
        """Add what a call of these arguments may copy: their values, and as many bytes as a number asks for."""
        first = args[0] if args else ()
        self.copied += len(args) + (first if type(first) is int else len(first) if hasattr(first, "__len__") else 0)
        if self.copied > MOST_COPIED:
            raise OverBudgetError(f"a pickle that copies more than {MOST_COPIED:,} values")

    def _newobj(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        self._count(args)
        self.stack.append(_create(cls, tuple(args), False))

    def _newobj_ex(self) -> None:
        self.stack.pop()
        self._newobj()

    def _obj(self) -> None:
        cls, *args = self._to_mark()
        self._count(args)
        self.stack.append(_create(cls, tuple(args), False))

    def _build(self) -> None:
        state, value = self.stack.pop(), self.stack[-1]
        if isinstance(value, Record):
            for part in state if isinstance(state, tuple) else (state,):  # attributes and slots come as a pair
                if isinstance(part, Mapping):
                    value.state.update(part)
                else:
                    value.elements.append(part)

    def _binpersid(self) -> None:
        kind, cls, *rest = self.stack.pop()
        if kind == "module":  # a class with its source, as the format before 1.6 keeps it
            self.stack.append(cls)
            return
        if kind != "storage":
            raise ValueError(f"a persistent {kind!r}, wanted a storage")
        key, _, numel = rest[:3]
        name = cls.name.removesuffix("Storage") if isinstance(cls, Global) else ""
        self.stack.append(Storage(str(key), _STORAGES.get(name), int(numel)))


_PUSH = frozenset((
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE",
    "BINUNICODE8", "FLOAT", "BINFLOAT",
))  # fmt: skip
_FIXED: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list,
}  # fmt: skip


def _elements(holder: Any) -> list[Any]:
    return holder.elements if isinstance(holder, Record) else holder


def _items(holder: Any) -> dict[Any, Any]:
    return holder.items if isinstance(holder, Record) else holder


def _create(function: Any, args: tuple[Any, ...], called: bool) -> Any:
    """The value of a call where this module knows it; otherwise a record of the call."""
    if not isinstance(function, Global):
        return Record(COMPUTED, (function, *args), called)
    name = str(function)
    name = name.replace("__builtin__.", "builtins.")  # as Python 2 and the older protocols have it
    if name in ("collections.OrderedDict", "builtins.dict", "collections.defaultdict"):
        pairs = args[0] if args and isinstance(args[0], (list, dict)) else {}
        return dict(pairs)
    if name in ("torch.Size", "builtins.list", "builtins.tuple", "builtins.set", "builtins.frozenset"):
        return tuple(args[0]) if name == "torch.Size" else list(args[0]) if args else []
    if name.startswith("torch.jit._pickle.build_"):
        return args[0]
    if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"):
        storage, offset, shape, stride = args[:4]
        dtype = args[6] if name.endswith("v3") else storage.dtype
        dtype = getattr(torch, dtype.name) if isinstance(dtype, Global) and dtype.module == "torch" else dtype
        if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
            return Record(function, args, called)
        return TensorPart(storage, dtype, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return args[0]
    if name == "torch._tensor._rebuild_from_type_v2":
        return _of_subclass(function, args)
    return Record(function, args, called)


def _of_subclass(function: Global, args: tuple[Any, ...]) -> Any:
    """A tensor of a subclass: a DTensor's local part, with its full shape."""
    rebuild, _, inner, state = args
    if str(rebuild) == "torch._utils._rebuild_wrapper_subclass" and isinstance(state, Mapping):
        local = state.get("_local_tensor")
        if isinstance(local, TensorPart):
            return local._replace(full_shape=tuple(map(int, inner[2])))
        return Record(function, args, True)
    return _create(rebuild, tuple(inner), True)
