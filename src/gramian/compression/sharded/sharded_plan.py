"""A plan for a model in shards: the factors wait on the disk, and the smaller model is written part by part."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gramian.checkpoint import clean_name, save_tensors
from gramian.checkpoint.faults import first_line
from gramian.checkpoint.packing import RANKS
from gramian.compression.budget.plan import Plan
from gramian.compression.budget.weighted import WeightedSVD
from gramian.compression.calibration.experts import dense_weight
from gramian.compression.layers.building import tied
from gramian.compression.layers.feedback import Feedback
from gramian.compression.layers.lowrank import LowRank, matrix_of
from gramian.compression.layers.modules import replaced, submodule
from gramian.compression.layers.rounding import GROUP
from gramian.compression.sharded.shards import OUTSIDE, Shards
from gramian.compression.sharded.spool import JOURNAL, PREFIX, Spool
from gramian.compression.storage.ranks import ranks_of, restore
from gramian.errors import CheckpointError, InputError
from gramian.misuse import known_names
from gramian.rows import Rows
from gramian.texts import read_text

__all__ = ["ShardedPlan", "spooled", "was_stopped"]

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, eq=False, repr=False)
class ShardedPlan(Plan):
    """A `Plan` for a model that stays in its files; `gm.save_compressed(plan, folder)` writes the smaller one.

    Its `model` has no values, and its decompositions no factors: these are in the spool, as far as break-even and in
    the dtype of the weights, so that they take less than the weights do. Only ranks can be planned.

    Args:
        shards: the model.
        spool: where the factors are, until the plan is garbage.
        told: what the calibration held in memory and on the disk.
    """

    shards: Shards = None  # type: ignore[assignment]
    spool: Spool = None  # type: ignore[assignment]
    told: Rows = None  # type: ignore[assignment]

    @known_names("Plan.at", share="keep", budget="keep")
    def at(
        self,
        keep: float | None = None,
        *,
        size: float | None = None,
        bits: int | None = None,
        sparsity: float | str | None = None,
        group: int = GROUP,
        of: Literal["all", "factorable"] | None = None,
    ) -> Plan:
        """The plan at another share of the parameters, as `Plan.at`.

        Raises:
            InputError: as there, or anything but `keep` is asked for.
        """
        if size is not None or bits is not None or sparsity is not None:
            raise InputError(
                "compress: a model in shards is factored alone: give keep. Rounding and pruning need the model in "
                "memory, as from_pretrained loads it"
            )
        return super().at(keep, of=of)

    def apply(self) -> nn.Module:
        """Refused, since the model may not fit into memory.

        Raises:
            InputError: always, with what to write.
        """
        raise InputError(
            "compress: the model is in shards, and may not fit into memory. Write gm.save_compressed(plan, folder), "
            "and load that with from_pretrained"
        )

    def write(self, folder: Path, progress: Callable[[str], None] | None = None) -> None:
        """Writes the smaller model as a folder of transformers, one shard for each part, its index and its config last.

        Args:
            folder: new, or empty but for what is to stay beside the model.
            progress: called with the name of each part that is written.

        Raises:
            CheckpointError: there are weights already, or the disk is full.
        """
        if any(folder.glob("*.safetensors*")) and not was_stopped(folder):
            raise CheckpointError(f"{folder}: holds weights already. Choose another folder")
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be made ({first_line(error)}). Choose another") from None
        ranks = self._all_ranks()
        parts = [OUTSIDE, *self.shards.blocks]
        places: dict[str, str] = {}
        total = 0
        about = {"format": "pt"} | ({RANKS: json.dumps(ranks)} if ranks else {})
        for i, part in enumerate(parts, 1):
            file = f"model-{i:05}-of-{len(parts):05}.safetensors"
            with self._factored(part) as tensors:
                save_tensors(folder / file, tensors, about)
                places |= dict.fromkeys(tensors, file)
                total += sum(t.numel() * t.element_size() for t in tensors.values())
            del tensors  # before the next part comes
            if progress is not None:
                progress(part)
        config = json.loads(read_text(self.shards.folder / "config.json"))
        if ranks:
            config["quantization_config"] = {"quant_method": "gramian", "ranks": ranks}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        for name, value in ((INDEX, index), ("config.json", config)):
            try:
                (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
            except OSError as error:
                raise CheckpointError(f"{folder / name}: could not be written ({first_line(error)})") from error

    def _all_ranks(self) -> dict[str, Any]:
        """The rank of each factored layer, by each of its names."""
        chosen = {name: self.forms[s.name].rank for s in self.spectra for name in (s.name, *s.tied)}
        return ranks_of(self.model) | {name: rank for name, rank in chosen.items() if rank is not None}

    @contextmanager
    def _factored(self, part: str) -> Iterator[dict[str, Tensor]]:
        """A context with the tensors of a part as they are written: its layers factored, each parameter once."""
        with self.shards.loaded(part) as model:
            dense: dict[str, nn.Module] = {}
            try:
                for s in self.spectra:
                    rank = self.forms[s.name].rank
                    if rank is None or self.shards.part_of(s.name) != part:
                        continue
                    dense[s.name] = layer = submodule(model, s.name)
                    low = _cut(layer, rank, self.spool.get(f"factors.{s.name}"))
                    replaced(model, s.name, low)
                    for name in s.tied:
                        dense[name] = submodule(model, name)
                        replaced(model, name, tied(dense[name], low))
                names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
                tensors = {name: p.detach() for name, p in model.named_parameters()}
                tensors |= {name: t for name, t in model.state_dict().items() if name not in names}
                marks = {dense_weight(name): torch.empty(0) for name in dense}
                yield {clean_name(name): tensor for name, tensor in (tensors | marks).items()}
            finally:
                restore(model, dense)


def was_stopped(folder: Path) -> bool:
    """Whether a folder has what a run left that was stopped before its model was whole.

    Args:
        folder: that may be missing.
    """
    return not (folder / INDEX).exists() and any(folder.glob(f"{PREFIX}*/{JOURNAL}.safetensors"))


def _cut(layer: nn.Module, rank: int, factors: Mapping[str, Tensor]) -> LowRank:
    """A layer's factors of a rank; its bias takes up what the mean input loses."""
    low, left, right = LowRank(layer, rank), factors["left"][:, :rank], factors["right"][:rank]
    bias: Any = getattr(layer, "bias", None)
    if bias is not None and "mean" in factors:
        lost = factors["product"] - left.double() @ (right.double() @ factors["mean"])
        bias = bias + lost.to(bias.dtype)
    low.set_(left, right, bias)
    return low


def spooled(s: WeightedSVD, layer: nn.Module, spool: Spool, name: str) -> WeightedSVD:
    """A decomposition whose factors are in a spool: with their shapes alone, and its singular values.

    Args:
        s: with factors.
        layer: that it is of.
        spool: where they go, as far as break-even, in the dtype of the weight.
        name: under which.

    Returns: the same without factors.
    """
    dtype, top = next(layer.parameters()).dtype, min(s.candidates.top, len(s.values))
    tensors = {"left": s.left[:, :top].to(dtype), "right": s.right[:top].to(dtype)}
    if s.mean is not None:
        tensors |= {"mean": s.mean, "product": matrix_of(layer).double() @ s.mean}
    spool.put(name, tensors)
    left, right = (torch.empty(side.shape, device="meta") for side in (s.left, s.right))
    moments = torch.empty(len(s.values), device="meta")
    return replace(s, left=left, right=right, mean=None, feedback=Feedback.unknown(), noises=(), moments=moments)
