"""Shards: a model that stays in its files, of which one part at a time is in memory.

The parts are the blocks of its longest list of blocks (a decoder's layers), and what is outside of them (embeddings,
the last norm, the head). The whole model is there without values, on the meta device, and a part gets its tensors from
the files while it is loaded.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gramian.checkpoint import Checkpoint, clean_name, open_checkpoint
from gramian.checkpoint.readers import forget
from gramian.errors import CheckpointError, UnsupportedError, some
from gramian.texts import read_text

__all__ = ["OUTSIDE", "Shards", "skeleton"]

OUTSIDE = ""
"""The name of the part that is in no block."""

Run = Callable[[int, tuple, dict], Any]


class Stub(nn.Module):
    """Stands in a block's place and answers for it; attributes that a model reads off its blocks are the block's."""

    def __init__(self, block: nn.Module, index: int, shards: Shards) -> None:
        super().__init__()
        self.__dict__.update(block=block, index=index, shards=shards)  # not as a child: it has no values

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What `shards.run` makes of the call."""
        run = self.shards.run
        assert run is not None
        return run(self.index, args, kwargs)


class Shards:
    """A model in a folder of transformers, of which a part at a time is in memory.

    Args:
        folder: with `config.json` and weights, in one file or in shards.

    Attributes:
        model: the whole, without values.
        blocks: the names of its blocks, in the order in which they run.
        run: what a call of a block does while `OUTSIDE` is loaded: `run(index, args, kwargs)`.

    Raises:
        CheckpointError: the folder has no config or weights, or they do not fit each other.
        UnsupportedError: the model has no list of blocks, or its parts share weights.
    Cost: the time to build the modules; headers are read, and no tensor.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.checkpoint: Checkpoint = open_checkpoint(self.folder, stored=True)
        floats = [e.dtype for e in self.checkpoint.entries.values() if e.kind == "float"]
        self.model = skeleton(self.folder, getattr(torch, floats[0], None) if floats else None)
        self.run: Run | None = None
        name, blocks = _longest(self.model)
        self.blocks = [f"{name}.{i}" for i in range(len(blocks))]
        self._list, self._modules = blocks, list(blocks)
        self._stored = self._names()

    def part_of(self, name: str) -> str:
        """The part in which a parameter or module is."""
        return next((block for block in self.blocks if f"{name}.".startswith(f"{block}.")), OUTSIDE)

    def block(self, name: str) -> nn.Module:
        """The module of a block."""
        return self._modules[self.blocks.index(name)]

    @contextmanager
    def loaded(self, part: str) -> Iterator[nn.Module]:
        """A context with a part's tensors in memory: a model that has no more than that part, under its own names.

        Args:
            part: a block's name, or `OUTSIDE`: then the model itself, whose blocks do what `run` says.
        """
        if part == OUTSIDE:
            for i, block in enumerate(self._modules):
                self._list[i] = Stub(block, i, self)
            model = self.model
        else:
            model = _nested(part, self.block(part), self.model)
        kept: list[tuple[dict, str, Any]] = []
        try:
            made: dict[int, nn.Parameter] = {}
            for prefix, module in model.named_modules(remove_duplicate=False):
                for local, parameter in module._parameters.items():
                    if parameter is None or not parameter.is_meta:
                        continue
                    if id(parameter) not in made:
                        value = self._load(clean_name(f"{prefix}.{local}".lstrip(".")), parameter)
                        made[id(parameter)] = nn.Parameter(value, parameter.is_floating_point())
                    kept.append((module._parameters, local, parameter))
                    module._parameters[local] = made[id(parameter)]
            forget()
            yield model
        finally:
            for held, local, parameter in reversed(kept):
                held[local] = parameter
            for i, block in enumerate(self._modules):
                self._list[i] = block
            self.run = None
            kept.clear()
            gc.collect()  # graphs and frames that hold each other hold the part's tensors too

    def bytes(self, part: str) -> int:
        """Of a part's tensors, once they are loaded."""
        return sum(p.numel() * p.element_size() for p in self.parameters(part))

    def parameters(self, part: str) -> list[nn.Parameter]:
        """A part's parameters, without values."""
        return [p for name, p in self.model.named_parameters() if self.part_of(clean_name(name)) == part]

    def _load(self, name: str, like: nn.Parameter) -> Tensor:
        tensor = self.checkpoint.load(self._stored[name])
        return tensor.to(like.dtype, copy=True)  # in memory of its own, not the file's

    def _names(self) -> dict[str, str]:
        """By parameter of the model the name under which the files have it: with or without the base model's prefix."""
        entries, base = self.checkpoint.entries, f"{getattr(self.model, 'base_model_prefix', '')}."
        found: dict[str, str] = {}
        parts: dict[int, set[str]] = {}
        by_parameter: dict[int, str] = {}
        missing = []
        pairs = [(clean_name(n), p) for n, p in self.model.named_parameters(remove_duplicate=False)]
        for name, parameter in pairs:
            parts.setdefault(id(parameter), set()).add(self.part_of(name))
            for stored in (name, name.removeprefix(base), base + name):
                if stored in entries:
                    shape = entries[stored].shape
                    if shape != tuple(parameter.shape):
                        raise CheckpointError(
                            f"{self.folder}: {stored} is {shape}, wanted {tuple(parameter.shape)} by its config.json"
                        )
                    by_parameter.setdefault(id(parameter), stored)
                    break
        for name, parameter in pairs:
            if id(parameter) in by_parameter:
                found[name] = by_parameter[id(parameter)]
            else:
                missing.append(name)
        if missing:
            raise CheckpointError(
                f"{self.folder}: its files hold no {some(missing)}. Load it with from_pretrained, and give the model"
            )
        for name, parameter in pairs:
            if len(parts[id(parameter)]) > 1:
                raise UnsupportedError(
                    f"compress: {name} is shared by several blocks, so that they cannot be loaded one by one. Load the "
                    "model with from_pretrained, and give that"
                )
        return found


def skeleton(folder: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The model that a folder's config describes, with its parameters on the meta device and its buffers in memory.

    Args:
        folder: with a `config.json`.
        dtype: of parameters, where the config does not tell.

    Raises:
        CheckpointError: there is none that transformers can read.
    """
    try:
        import transformers
    except ImportError:
        raise UnsupportedError("compress: a folder needs transformers: pip install gramian[hf]") from None
    try:
        names = json.loads(read_text(folder / "config.json")).get("architectures") or []
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        cls = getattr(transformers, names[0])
    except (OSError, ValueError, AttributeError, IndexError, TypeError, KeyError) as error:
        text = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: transformers cannot read its config.json: {text}") from None
    config.use_cache = False  # a block that runs twice must not see itself in a cache
    usual, told = torch.get_default_dtype(), getattr(config, "dtype", None) or dtype or torch.float32
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        bare = parameter is None or parameter.is_meta
        register(module, name, parameter if bare else nn.Parameter(parameter.to("meta"), parameter.requires_grad))  # type: ignore[union-attr]

    stored = getattr(config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else vars(stored)
    if stored and stored.get("quant_method") != "gramian":
        raise UnsupportedError(
            f"compress: {folder} is quantized ({stored.get('quant_method')}). Give the model as it was"
        )
    try:
        nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
        torch.set_default_dtype(told)
        model = cls(config).eval()
        if stored:
            from gramian.compression.storage.pretrained import put_ranks_

            put_ranks_(model, stored["ranks"])
        return model
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        torch.set_default_dtype(usual)


def _longest(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of blocks that holds most of the model's parameters."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    sizes = [sum(p.numel() for p in m.parameters()) for _, m in lists]
    if not any(sizes):
        raise UnsupportedError(
            f"compress: {type(model).__name__} has no list of blocks that could be loaded one by one. Load it with "
            "from_pretrained, and give the model"
        )
    return lists[sizes.index(max(sizes))]


def _nested(name: str, block: nn.Module, like: nn.Module) -> nn.Module:
    """A module that holds nothing but a block, under its name in the model, with the model's config."""
    root = nn.Module()
    root.config = getattr(like, "config", None)  # type: ignore[assignment]
    *outer, last = name.split(".")
    inner = root
    for local in outer:
        inner.add_module(local, nn.Module())
        inner = inner.get_submodule(local)
    inner.add_module(last, block)
    return root.eval()
