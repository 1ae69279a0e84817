"""How far `plan.predicted` is from the rise of the loss on new data: plain, `trained_on`, `held_out`, and of new data.

`python benchmarks/predicted.py [lstm transformer convolutions gpt2 …]`: each model is trained for some hundred steps
and calibrated on its training data. Some of the batches that were held out are given to `gm.compress`, as `held_out`
and, in the last column, as the calibration itself; others tell the true rise. The first four were looked at while the
estimator was written; those of `predicted_cases.py`, `predicted_later.py` and `predicted_last.py` were not.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import gramian as gm
from gramian.bench.learning_data import ShiftedDigits, text
from gramian.bench.learning_networks import Recurrent, Transformer, convolutional
from predicted_cases import FRESH, Case, trained
from predicted_last import LAST, LAST_TRAINED_ON
from predicted_later import LATER

CONTEXT = 64
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6)
STEPS = {"lstm": 300, "transformer": 400, "convolutions": 120, "gpt2": 300}
FROZEN = FRESH | LATER | LAST
TRAINED_ON = {
    "lstm": 4800, "transformer": 6400, "convolutions": 7680, "gpt2": 4800, "llama of code": 4800, "GRU of code": 4800,
    "convolutions of letters": 3000, "ViT of letters": 3000, "table, classes": 4000, "table, numbers": 4000,
    "GPT-NeoX of packages": 3840, "BERT of words": 4000, "convolutions of tones": 12000, "arms, seen once": 16000,
    "arms, seen six times": 3000,
} | LAST_TRAINED_ON  # fmt: skip
"""How many samples each model was trained on."""


class GPT2(nn.Module):
    """A small GPT-2 of transformers, its scores alone."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        none: dict[str, Any] = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
        self.net = GPT2LMHeadModel(
            GPT2Config(vocab_size=65, n_positions=CONTEXT, n_embd=96, n_layer=3, n_head=4, **none)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens).logits


def windows(num: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    places = text()[1].unfold(0, CONTEXT + 1, 1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num):
        rows = places[torch.randint(len(places), (16,), generator=generator)]
        yield rows[:, :-1], rows[:, 1:]


def case(name: str) -> Case:
    """A trained model, its objective, batches of the training data, batches held out, and others that tell the rise."""
    steps = STEPS[name]
    if name == "convolutions":
        digits, objective = ShiftedDigits.load(size=8, most=1, batch_size=64), gm.Objective.classification()
        epochs = (digits.batches(e, torch.Generator().manual_seed(e)) for e in itertools.count())
        batches = list(itertools.islice(itertools.chain.from_iterable(epochs), steps + 60))
        train, given = batches[:steps], batches[steps:]
        x, y = digits.held_out(9)
        held_out = list(zip(x.split(64), y.split(64), strict=True))
    else:
        train, given, objective = list(windows(steps, 0)), list(windows(32, 1)), gm.Objective.next_token()
        rows = text()[2].unfold(0, CONTEXT + 1, CONTEXT)[: 106 * 16]
        held_out = [(part[:, :-1], part[:, 1:]) for part in rows.split(16)]
    torch.manual_seed(3)
    model = {
        "lstm": lambda: Recurrent(96, 2, 65, linear=False),
        "transformer": lambda: Transformer(width=96, depth=2, heads=4, context=CONTEXT),
        "convolutions": convolutional,
        "gpt2": GPT2,
    }[name]()
    return trained(model, objective, train), objective, given, held_out[::2], held_out[1::2]


def rises(model: nn.Module, small: nn.Module, objective: gm.Objective, batches: list) -> tuple[float, float]:
    """The plain mean over batches of one size, and half the interval of 90 %."""
    with torch.no_grad():
        pairs = [(objective.loss(small, b)[0], objective.loss(model, b)) for b in batches]
    each = torch.tensor([float((after - before) / units) for after, (before, units) in pairs], dtype=torch.float64)
    return float(each.mean()), 1.645 * float(each.std()) / math.sqrt(len(each))


WAYS = ("without", "with trained_on", "with held_out", "of new data")


def main(names: list[str]) -> None:
    within, covered, known, num = [0] * 4, [0] * 4, [0] * 4, 0
    print(f"text: {text()[0]}")
    for name in names or [*STEPS, *FROZEN]:
        model, objective, given, held_out, fresh = FROZEN[name]() if name in FROZEN else case(name)
        ways: list[tuple[Any, dict[str, Any]]] = [
            (given, {}), (given, {"trained_on": TRAINED_ON[name]}), (given, {"held_out": held_out}), (held_out, {})
        ]  # fmt: skip
        plans = [gm.compress(model, part, objective, of="factorable", keep=0.9, **way) for part, way in ways]
        print(f"{name}\n| removed | rise | {' | '.join(WAYS)} |\n|-|-|-|-|-|-|")
        for removed in SHARES:
            cells, first, num = [], "", num + 1
            for i, plan in enumerate(plans):
                part = plan.at(keep=1 - removed)
                if i != 1:  # the others' statistics are of other batches, and so they are other plans
                    rise, noise = rises(model, part.apply(), objective, fresh)
                first = first or f"{rise:.5f} ±{noise:.5f}"
                found = part.predicted
                covers, knows = found.low <= rise <= found.high, noise < 0.2 * abs(rise)
                covered[i], known[i] = covered[i] + covers, known[i] + knows
                within[i] += knows and abs(found.rise / rise - 1) <= 0.2
                cells.append(
                    f"{found.rise / rise - 1:+.0%} ({found.low / abs(rise):.2f} to {found.high / abs(rise):.2f})"
                    f"{'' if covers else ', not covered'}"
                )
            print(f"| {removed:.0%} | {first} | {' | '.join(cells)} |", flush=True)
    for i, what in enumerate(WAYS):
        print(f"{what}: {covered[i]} of {num} covered, {within[i]} of the {known[i]} known to 20 % within 20 %")


if __name__ == "__main__":
    main(sys.argv[1:])
