"""What a loss does with choices and numbers that came of them: a larger reward is to raise the score of its action."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from gramian.batch import mapped
from gramian.inspection.experiments.replay import Asked, Replay
from gramian.inspection.passes.batch_roles import Given, given_of

__all__ = ["LEAST", "MOST", "Choices", "along_choices", "chosen_and_numbers"]

# Scores of a row that are looked at, and samples.
MOST, LEAST = 512, 8
# Gradients that are zero up to rounding, as a share of the largest.
EQUAL = 1e-4
# Names of numbers of which less is better, or that do not tell how good a choice was.
_OTHERS = re.compile(
    r"cost|loss|penal|regret|pric|done|term|mask|prob|logp|val|base|weight|discount|time|step", re.IGNORECASE
)


@dataclass(frozen=True)
class Choices:
    """What is wrong between choices and scores.

    Attributes:
        choice, reward: the tensors, as Python reads them off a batch.
        shape: of the scores.
        columns: of a choice, and of the score that its reward moves, where that is another; `None` where the score is
            the choice's, and falls.
    """

    choice: str
    reward: str
    shape: tuple[int, ...]
    columns: tuple[int, int] | None = None


def along_choices(asked: Asked) -> Choices | None:
    """Whether scores fall where what came of their choice is larger, or other scores than the choices' are moved.

    Every other sample's number is set to a large and to a small one of the batch. In a policy's gradient, in Q-learning
    and in weighted likelihoods, the difference of the gradients has one sign at the score of the choice, and the
    other, or none, at all others.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: what is wrong, or `None`.
    Raises: what the model raises.
    Cost: two evaluations of the loss and its gradient for each tensor of one number for each sample.
    Source: this library's own; Williams 1992 for the policy gradient.
    """
    replay = asked.replay
    if not replay.is_known or not replay.outputs or asked.seen.strangers:
        return None
    chosen, numbers = chosen_and_numbers(asked)
    found: list[tuple[Choices | None, bool]] = []
    for number in numbers:
        of = next(g.values for g in given_of(asked.seen.batches, set(), set()) if g.name == number.name)
        values = torch.cat([v.flatten() for v in of])
        for i, out in enumerate(replay.outputs):
            if out.ndim != 2 or not 2 <= out.shape[1] <= MOST or len(out) < LEAST:
                continue
            moved = _moved_by(replay, i, number, values)
            if moved is None or len(moved) < LEAST // 2:
                continue
            rows = torch.arange(len(out))[::2]
            for choice in chosen:
                columns = choice.values[0].reshape(-1)
                if len(columns) == len(out) and int(columns.min()) >= 0 and int(columns.max()) < out.shape[1]:
                    told = _judged(moved, columns[rows].long())
                    if told is not None:
                        wrong = Choices(choice.name, number.name, tuple(out.shape), told if told != (-1, -1) else None)
                        is_flag = bool(((number.values[0] == 0) | (number.values[0] == 1)).all())
                        found.append((None if told == (0, 0) else wrong, is_flag))
    if not found or any(wrong is None for wrong, _ in found):
        return None  # one number at least draws the scores as it should
    others = [wrong for wrong, is_flag in found if not is_flag]
    return others[0] if others else found[0][0] if len(numbers) == 1 else None


def chosen_and_numbers(asked: Asked) -> tuple[list[Given], list[Given]]:
    """The tensors of a batch with a whole number for each sample, and those with a number that may be a reward.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: both.
    """
    given = [g for g in given_of([asked.batch], set(), set()) if _is_by_sample(g)]
    chosen = [g for g in given if g.values[0].dtype in (torch.int64, torch.int32)]
    return chosen, [g for g in given if g.values[0].is_floating_point() and not _OTHERS.search(g.name)]


def _is_by_sample(given: Given) -> bool:
    t = given.values[0]
    return t.numel() == len(t) and t.ndim <= 2


def _moved_by(replay: Replay, i: int, number: Given, values: Tensor) -> Tensor | None:
    """How gradients of every other row change from a small number to a large one; `None` where they do not."""
    t = number.values[0]
    values = values.sort().values
    low, high = float(values[len(values) // 10]), float(values[-1 - len(values) // 10])
    low, high = (low, high) if low < high else (float(values[0]), float(values[-1]))  # of rewards that are rare
    if not low < high:
        return None
    runs = []
    for value in (low, high):
        changed = t.clone()
        changed[::2] = value
        batch = mapped(replay.batch, lambda v, new=changed: new if v is t else v)
        runs.append(replay.gradients(replay.outputs, batch)[i].double()[::2])
    moved = runs[1] - runs[0]
    return moved if bool(moved.isfinite().all()) and bool(moved.any()) else None


def _judged(moved: Tensor, columns: Tensor) -> tuple[int, int] | None:
    """(0, 0) where rewards raise the score of their choice, (-1, -1) where they lower it, a choice and another score
    where they move that; `None` where rewards and choices do not meet so."""
    bound = EQUAL * float(moved.abs().amax())
    signs = torch.where(moved.abs() > bound, moved.sign(), 0.0)
    acts = signs.any(1)
    signs, columns = signs[acts], columns[acts]
    if len(signs) < 2:
        return None
    singles: list[tuple[int, float]] = []
    for row in signs:
        alone = [(k, float(row[k])) for k in row.nonzero().flatten().tolist() if int((row == row[k]).sum()) == 1]
        singles.append(alone[0] if len(alone) == 1 else (-1, 0.0))
    own = signs.gather(1, columns[:, None])[:, 0]
    if len({sign for _, sign in singles}) == 1 and singles[0][0] >= 0:
        places = torch.tensor([k for k, _ in singles])
        if bool((places == columns).all()):
            return (0, 0) if singles[0][1] < 0 else (-1, -1)
        pairs = {(int(c), int(p)) for c, p in zip(columns, places, strict=True)}
        is_map = len(pairs) == len({c for c, _ in pairs}) == len({p for _, p in pairs})
        wrong = [pair for pair in sorted(pairs) if pair[0] != pair[1]]
        return wrong[0] if is_map and len(pairs) > 1 and len(wrong) == len(pairs) else None
    if moved.shape[1] == 2 and bool((signs[:, 0] == -signs[:, 1]).all()):  # of two, the other moves as much
        return (0, 0) if bool((own < 0).all()) else (-1, -1) if bool((own > 0).all()) else None
    return None
