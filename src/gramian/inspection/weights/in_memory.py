"""The modules that transformers builds for a checkpoint, whose names may differ from those in its file.

transformers renames and fuses tensors while it loads some architectures, such as ViT's queries and GPT-NeoX's head, and
PEFT needs the names in memory. The model is built from the `config.json` on torch's meta device: without weights, and
by a class of the library, never by code beside the checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["InMemory", "build_in_memory"]


class InMemory:
    """A model without weights.

    Args:
        model: on meta.
        rename: the name in memory of a name in the file, or empty where the tensor is fused with others.
    """

    def __init__(self, model: nn.Module, rename: Callable[[str], str]) -> None:
        self.modules = dict(model.named_modules())
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._rename = rename

    def name(self, name: str) -> str:
        """The name in memory of a tensor in the file; empty where the model has no such tensor."""
        renamed = self._rename(name)
        return renamed if renamed in self.shapes else ""

    def tensors_of(self, module: str) -> set[str]:
        """The names of a module's own tensors."""
        return {name for name in self.shapes if name.rpartition(".")[0] == module}

    def is_linear(self, module: str) -> bool:
        """Whether PEFT can adapt the module by two factors: linear, or a convolution without groups."""
        found: Any = self.modules.get(module)
        if isinstance(found, nn.Conv2d):
            return found.groups == 1
        return isinstance(found, nn.Linear) or type(found).__name__ == "Conv1D"


def build_in_memory(path: Path, model_type: str) -> InMemory | None:
    """Return the modules of a transformers checkpoint; `None` where it is none, or transformers is not installed.

    Args:
        path: of the file or folder.
        model_type: of its `config.json`; empty where it has none.
    """
    folder = path if path.is_dir() else path.parent
    if not model_type:
        return None
    try:
        import transformers  # pyright: ignore[reportMissingImports]

        with _quiet():
            config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
            model_class = getattr(transformers, (config.architectures or [""])[0])
            with torch.device("meta"):
                model = model_class(config)
        return InMemory(model, _renaming(model))
    except Exception:  # not installed, too old for this architecture, or a config that does not fit
        return None


def _renaming(model: Any) -> Callable[[str], str]:
    """What transformers 5 does to a name while loading; before it, only the prefix of the base model came or went."""
    try:
        from transformers.conversion_mapping import (  # pyright: ignore[reportMissingImports]
            get_model_conversion_mapping,
        )
        from transformers.core_model_loading import (  # pyright: ignore[reportMissingImports]
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )
    except ImportError:
        return lambda name: name
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    fusions = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    shapes = model.state_dict()

    def rename(name: str) -> str:
        renamed, fused = rename_source_key(name, renamings, fusions, model.base_model_prefix, shapes)
        return "" if fused is not None else str(renamed)

    return rename


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remarks on a config, which are not about what the user asked for."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
