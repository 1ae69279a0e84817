"""What PEFT's LoRA format can hold of each tensor, and the config of an adapter.

PEFT wraps modules. Their classes and their names in memory are asked of transformers where it knows the checkpoint
(`in_memory`), or else told by the names and shapes in the file. A weight goes into factors only where its module is
surely linear or a plain convolution: PEFT refuses the whole adapter for one module of a class that it does not know.
PEFT sees a weight's orientation by the class, whatever `fan_in_fan_out` says: the factors are A (r, in) and B (out, r)
for `nn.Linear` and for transformers' `Conv1D`, whose weight is (in, out).

What factors cannot hold is kept whole: as `modules_to_save` if it is all that its module has, or else over the base's
own tensor, as PEFT does with `save_embedding_layers` and `bias="all"`. The second is also right for tied weights, of
which `modules_to_save` would copy one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from gramian.inspection.comparing.matching import Pairs, is_in_out
from gramian.inspection.weights.in_memory import build_in_memory
from gramian.inspection.weights.matrices import Holding, read_config

__all__ = ["PREFIX", "Modules", "config_of_adapter"]

PREFIX = "base_model.model."  # of every name in PEFT's files

# Their kernels use out_proj and conv1d without calling them, so PEFT refuses these; as PEFT 0.21 lists them.
MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


class Modules:
    """The modules of a checkpoint, and which of them PEFT can adapt.

    Args:
        pairs: the checkpoint and its base.
    """

    def __init__(self, pairs: Pairs) -> None:
        self.pairs, self.holdings, self.entries = pairs, pairs.new, pairs.one.entries
        self.locals: dict[str, list[str]] = {}
        for name in self.entries:
            module, _, local = name.rpartition(".")
            self.locals.setdefault(module, []).append(local)
        self.paths = {path for name in self.entries for path in _parents(name)}
        self.parents = {path.rpartition(".")[0] for path in self.paths}
        self.tied = {entry.tied_to for entry in self.entries.values()} | {
            name for name, entry in self.entries.items() if entry.tied_to
        }
        own, bases = read_config(pairs.one.path), read_config(pairs.two.path)
        # the file that transformers wrote, with a config.json, has names that transformers knows
        self.as_base = bool(bases) and not own
        config = own or bases
        self.tables_are_tied = config.get("tie_word_embeddings") is not False or bool(config.get("is_encoder_decoder"))
        self.model_type = str(config.get("model_type", ""))
        written_by = pairs.two if self.as_base else pairs.one
        self.memory = build_in_memory(written_by.path, self.model_type)
        self.of_experts = {path.rpartition(".")[2] for path in self.paths if ".experts." in f".{path}"}
        self.turned = self._orientations()

    def named(self, name: str) -> str:
        """The name of a tensor or module in memory, in the model that the adapter is for; empty where it has none."""
        written = self.pairs.renamed(name) if self.as_base else name
        if self.memory is None:
            return written
        if name in self.entries:
            return self.memory.name(written)
        inside = next((local for local in self.locals.get(name, ())), "")
        found = self.memory.name(f"{written}.{inside}") if inside else ""
        return found.removesuffix(f".{inside}") if found.endswith(f".{inside}") else ""

    @cached_property
    def all_paths(self) -> list[str]:
        """The paths of all modules in memory, as far as they are known."""
        if self.memory is not None:
            return [path for path in self.memory.modules if path]
        return [self.named(path) for path in self.paths]

    def is_linear(self, name: str) -> bool:
        """Whether factors can hold the tensor: the weight of a linear module, or of a plain convolution of images.

        A file alone does not tell groups or a transposed convolution, so a kernel that may have them is not taken.
        """
        module, _, local = name.rpartition(".")
        holding = self.holdings.get(name)
        if holding is None or local != "weight" or not module or name in self.tied or not self.has_place(name):
            return False
        parent, _, last = module.rpartition(".")
        # torch's attention and its encoder layer use these modules' weights without calling them
        if "in_proj_weight" in self._locals(parent) or "in_proj_bias" in self._locals(parent):
            return False
        if last in ("linear1", "linear2") and "in_proj_weight" in self._locals(f"{parent}.self_attn".lstrip(".")):
            return False
        if self.model_type in MAMBA and last in ("out_proj", "conv1d"):
            return False
        if holding.role in ("embedding", "elementwise"):
            return False
        if self.memory is not None:
            return self.memory.is_linear(self.named(module))
        return len(holding.entry.shape) == 2 or (holding.kernel and _is_plain(holding))

    def is_in_out(self, name: str) -> bool:
        """Whether a weight is (in, out), as `Conv1D` has it: by its bias, by weights of the same name, by the table."""
        if len(self.entries[name].shape) != 2:
            return False
        known = self._by_bias(name)
        if known is None:
            known = self.turned.get(_last(name))
        return is_in_out(self.holdings[name]) if known is None else known

    def has_place(self, name: str) -> bool:
        """Whether an adapter has a place for the tensor.

        Not for the parameters of a parametrization, of which the checkpoint gives the weight that they make and which
        PEFT cannot copy. Not for stacked experts and their router, which libraries rename and fuse in memory, nor for
        modules with the name of an expert's, which PEFT would take for experts.
        """
        parts, holding, entry = name.split("."), self.holdings.get(name), self.entries[name]
        made_elsewhere = entry.made is not None and entry.made.name != name
        if "parametrizations" in parts or made_elsewhere or entry.part_of:
            return False
        named = self.named(name)
        if not named or (holding is not None and holding.kind == "experts"):
            return False
        if "experts" in (*parts, *named.split(".")) or f"{'.'.join(parts[:-2])}.experts" in self.paths:
            return False
        return len(parts) < 2 or parts[-2] not in self.of_experts

    def is_whole(self, name: str) -> bool:
        """Whether the tensor's module may be one of `modules_to_save`, of which PEFT makes copies.

        It has no modules inside, shares no tensor with another, and its path is not the end of another's, not even
        within a word, since PEFT would take the other too: `classifier` beside `pre_classifier`.
        """
        module, _, local = name.rpartition(".")
        if not module or module in self.parents or self.tied & set(self.tensors_of(module)) or not self.named(module):
            return False
        path, tensors = self.named(module), {self.named(own) for own in self.tensors_of(module)}
        if self.memory is not None and self.memory.tensors_of(path) != tensors:  # PEFT looks for all of them
            return False
        if any(other.endswith(path) for other in self.all_paths if other != path):
            return False
        if local == "bias" and "weight" not in self._locals(module):  # the weight is tied, and not in the file
            return False
        holding = self.holdings.get(name)
        return not (holding is not None and holding.role == "embedding" and self.tables_are_tied)

    def tensors_of(self, module: str) -> list[str]:
        """The names of a module's tensors."""
        return [f"{module}.{local}" for local in self._locals(module)]

    def _locals(self, module: str) -> list[str]:
        return self.locals.get(module, [])

    def _orientations(self) -> dict[str, bool]:
        """Whether weights are (in, out), by the last part of their module's name, where biases tell it of all alike."""
        seen: dict[str, set[bool]] = {}
        for name, entry in self.entries.items():
            if name.endswith(".weight") and len(entry.shape) == 2:
                known = self._by_bias(name)
                if known is not None:
                    seen.setdefault(_last(name), set()).add(known)
        return {last: found.pop() for last, found in seen.items() if len(found) == 1}

    def _by_bias(self, name: str) -> bool | None:
        """Whether a weight is (in, out), if the length of its bias tells."""
        bias = self.entries.get(f"{name.rpartition('.')[0]}.bias")
        rows, columns = self.entries[name].shape
        if bias is None or rows == columns or len(bias.shape) != 1 or bias.shape[0] not in (rows, columns):
            return None
        return bias.shape[0] == columns


def _is_plain(holding: Holding) -> bool:
    """Whether a kernel (o, i, h, w) is that of a convolution without groups, and not transposed.

    The file may say so (a class for its kind). Else, grouped kernels and most transposed ones have fewer channels in
    their second dimension, and the first is a multiple of it; so have some plain ones, which then stay whole.
    """
    o, i, *window = holding.entry.shape
    return holding.kind == "Conv2d" or (i > 1 and (i >= o or o % i != 0 or max(window) == 1))


def _last(name: str) -> str:
    return name.split(".")[-2]


def _parents(name: str) -> Iterable[str]:
    parts = name.split(".")[:-1]
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def config_of_adapter(
    base: str, rank: int, ranks: Mapping[str, int], paths: Iterable[str], saved: Iterable[str], **more: Any
) -> dict[str, Any]:
    """Return `adapter_config.json`.

    Args:
        base: the base's path.
        rank: r where `ranks` has no other.
        ranks: the rank of each adapted module.
        paths: of all modules. PEFT takes a module whose path ends in a target, so a target that is the end of another
            module's path makes all of them one pattern of whole paths.
        saved: paths of the modules to save.
        more: other keys.
    """
    paths = list(paths)
    lower = {f"^{re.escape(module)}": own for module, own in ranks.items() if own != rank}
    ends = tuple(f".{module}" for module in ranks)
    stray = [path for path in paths if path not in ranks and path.endswith(ends)]
    targets = "|".join(re.escape(module) for module in ranks) if stray else list(ranks)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "modules_to_save": list(saved) or None,
        "rank_pattern": lower,
        "alpha_pattern": lower,
        "inference_mode": True,
        "task_type": None,
        **more,
    }
