"""A task from a Hugging Face folder and a file of texts: what compression needs of a model that no task describes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gramian.errors import CheckpointError, InputError, UnsupportedError
from gramian.integrations.extras import load
from gramian.objective import Objective
from gramian.texts import read_text
from gramian.training import Task

__all__ = ["BETTER", "batches_of_texts", "copy_companions", "task_of_texts"]

BETTER = {"loss": "lower", "agreement": "higher", "cosine": "higher"}
"""Which direction of the measures is better."""

HELD_OUT = 5
"""Every fifth text is held out."""

TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json")
"""Files of which a tokenizer has one; transformers makes an empty one where there is none."""

FEWEST = 10
MOST_TOKENS = 128
BATCH_SIZE = 32

Batch = dict[str, Tensor]


def task_of_texts(folder: str | Path, texts: str | Path) -> Task:
    """A task for a model of transformers in a folder with its tokenizer: nothing is needed but texts, one a line.

    Every fifth text is held out. What the loss and the measure are follows from what the model returns:

    - a language model predicts the next token; the measure is `loss`, for each held-out token;
    - a model with class scores is to keep its own answers: labels are drawn from its own output, and the measure is
      `agreement`, the share of held-out answers that are those of the model as it came;
    - a model that returns vectors is to keep their mean over the tokens; the measure is `cosine`, to the mean before.

    Args:
        folder: with `config.json`, weights and tokenizer; nothing is downloaded, and no code in it is run.
        texts: a file of UTF-8 text; empty lines are left out, and what is beyond `MOST_TOKENS` of a text.

    Returns:
        The task. Its `model()` is one and the same model at every call.

    Raises:
        CheckpointError: the folder lacks a config, weights or a tokenizer that transformers can load.
        InputError: there are fewer than ten texts.
        UnsupportedError: transformers is not installed, or the model takes more than tokens, as one with a decoder.

    Cost: loading the model, and one pass over the texts.

    >>> task_of_texts("missing", "texts.txt")
    Traceback (most recent call last):
    gramian.errors.CheckpointError: missing: no config.json there. Give the folder of a model of transformers.
    """
    folder = Path(folder)
    lines = _lines(folder, texts)
    transformers = load("transformers", "hf")
    tokenizer = _tokenizer(transformers, folder)
    model = _opened(transformers, folder)
    batches, tests = _split(folder, type(model), model.config, lines, tokenizer)
    with torch.no_grad():
        try:
            output = model(**batches[0])
        except Exception as error:
            text = str(error).partition("\n")[0]
            raise UnsupportedError(f"{folder}: {type(model).__name__} does not take tokens alone ({text})") from None
    objective, batches, evaluate = _kind(model, output)(model, batches, tests)
    return Task(lambda: model, objective, lambda epoch, generator: batches, evaluate, name=folder.name)


def batches_of_texts(folder: str | Path, texts: str | Path, model: nn.Module) -> tuple[list[Batch], list[Batch]]:
    """The batches of `task_of_texts` for a model that predicts the next token: to calibrate with, and held out.

    Args:
        folder, texts: as there.
        model: that the folder describes; it may have no values.

    Raises: as `task_of_texts`; UnsupportedError where the model does not give scores of the next token.
    Cost: one pass over the texts.

    >>> batches_of_texts("missing", "texts.txt", nn.Linear(1, 1))
    Traceback (most recent call last):
    gramian.errors.CheckpointError: missing: no config.json there. Give the folder of a model of transformers.
    """
    folder = Path(folder)
    lines = _lines(folder, texts)
    if not getattr(model, "can_generate", bool)():
        raise UnsupportedError(
            f"{folder}: {type(model).__name__} does not predict the next token, which compressing from shards takes. "
            "Leave out --memory, or write gm.compress(folder, batches, objective)"
        )
    return _split(folder, type(model), model.config, lines, _tokenizer(load("transformers", "hf"), folder))


def copy_companions(folder: str | Path, out: str | Path) -> None:
    """Copies what lies beside a model's weights and says how to use it: tokenizer, vocabulary, settings.

    Args:
        folder: of the model as it came.
        out: of the compressed model; a file that is there is left.

    Raises: what the operating system raises.
    Cost: reading and writing these files.
    Source: the files that transformers and sentence-transformers write.

    >>> copy_companions("missing", "anywhere")
    """
    folder, out = Path(folder), Path(out)
    for file in sorted([*folder.glob("*"), *folder.glob("*/config.json")]):
        is_setting = file.suffix in (".json", ".model", ".jinja") and not file.name.endswith(".index.json")
        target = out / file.relative_to(folder)
        if file.is_file() and (is_setting or file.name in ("vocab.txt", "merges.txt")) and not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def _lines(folder: Path, texts: str | Path) -> list[str]:
    """The texts, once it is clear that the folder has a config."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json there. Give the folder of a model of transformers.")
    texts = Path(texts)
    try:
        lines = [line.strip() for line in read_text(texts).splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{texts}: cannot be read as text ({error}). Give a file with one text a line") from None
    if len(lines) < FEWEST:
        raise InputError(f"{texts}: holds {len(lines)} texts, wanted at least {FEWEST}, one a line")
    return lines


def _split(folder: Path, kind: type, config: Any, lines: list[str], tokenizer: Any) -> tuple[list[Batch], list[Batch]]:
    """The batches of a model's texts, and of those held out."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{folder}: {kind.__name__} has a decoder, which needs targets. Write a gm.Task")
    wanted = getattr(kind, "main_input_name", "input_ids")
    if wanted != "input_ids":
        raise UnsupportedError(f"{folder}: {kind.__name__} takes {wanted}, not tokens of texts. Write a gm.Task")
    kept = [line for place, line in enumerate(lines) if place % HELD_OUT]
    held = [line for place, line in enumerate(lines) if not place % HELD_OUT]
    limits = (MOST_TOKENS, tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
    most = min(filter(None, limits))
    return _batches(tokenizer, kept, most), _batches(tokenizer, held, most)


def _opened(transformers: Any, folder: Path) -> Any:
    """The model, of the class that its config names."""
    from gramian.compression.storage.pretrained import (
        without_bars,  # which registers the loading of factored models too
    )

    with _loading(folder), without_bars():
        config = json.loads(read_text(folder / "config.json"))
        names = config.get("architectures") or []
        cls = getattr(transformers, names[0], None) if names else None
        return (cls or transformers.AutoModel).from_pretrained(folder, local_files_only=True).eval()


def _tokenizer(transformers: Any, folder: Path) -> Any:
    """The tokenizer, with a token for padding."""
    if not any(file.name in TOKENIZERS or file.suffix == ".model" for file in folder.iterdir()):
        raise CheckpointError(f"{folder}: has no tokenizer ({', '.join(TOKENIZERS)} or a .model). Save it there too.")
    with _loading(folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise CheckpointError(f"{folder}: its tokenizer has no token for padding, none for an end and none for unknown")
    return tokenizer


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """A context in which what transformers and tokenizers raise, which is of every kind, becomes one line."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: transformers cannot load it: {text}") from None


def _batches(tokenizer: Any, texts: list[str], most: int) -> list[Batch]:
    """Texts of similar length together, so that little is padding."""
    ordered = sorted(texts, key=len, reverse=True)
    parts = [ordered[i : i + BATCH_SIZE] for i in range(0, len(ordered), BATCH_SIZE)]
    options = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": most}
    return [dict(tokenizer(part, **options)) for part in parts]


def _kind(model: Any, output: Any) -> Callable[..., tuple[Objective, list[Batch], Any]]:
    if not hasattr(output, "logits"):
        return _vectors
    return _language if model.can_generate() else _classes


def _language(model: Any, batches: list[Batch], tests: list[Batch]) -> tuple[Objective, list[Batch], Any]:
    objective = Objective.next_token()

    def evaluate(changed: nn.Module) -> dict[str, float]:
        sums = [objective.loss(changed, batch) for batch in tests]
        return {"loss": float(sum(float(s) for s, _ in sums) / sum(float(n) for _, n in sums))}

    return objective, batches, evaluate


def _classes(model: Any, batches: list[Batch], tests: list[Batch]) -> tuple[Objective, list[Batch], Any]:
    before = [_answers(model, batch) for batch in tests]
    labeled = [{**batch, "labels": _answers(model, batch)} for batch in batches]
    # The labels do not matter: of the curvature around the model's own output, they are drawn from it.
    objective = replace(Objective.classification(fisher="sampled", predict=_scores), gauss_newton=None)

    def evaluate(changed: nn.Module) -> dict[str, float]:
        same = count = 0
        for batch, answers in zip(tests, before, strict=True):
            counts = answers >= 0
            same += int((_answers(changed, batch) == answers)[counts].sum())
            count += int(counts.sum())
        return {"agreement": same / count}

    return objective, labeled, evaluate


def _vectors(model: Any, batches: list[Batch], tests: list[Batch]) -> tuple[Objective, list[Batch], Any]:
    with torch.no_grad():
        before = [_pooled(model, batch) for batch in tests]
        labeled = [{**batch, "labels": _pooled(model, batch)} for batch in batches]

    def evaluate(changed: nn.Module) -> dict[str, float]:
        pairs = zip(tests, before, strict=True)
        cosines = [nn.functional.cosine_similarity(_pooled(changed, batch), was) for batch, was in pairs]
        return {"cosine": float(torch.cat(cosines).mean())}

    # Gauss–Newton's curvature of a squared distance is the identity, also where the distance is zero, as it is here.
    return Objective.regression(fisher="gauss_newton", predict=_pooled), labeled, evaluate


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**_inputs(batch)).logits


@torch.no_grad()
def _answers(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The most likely class of each text, or of each token, −100 where that is padding."""
    answers = _scores(model, batch).argmax(-1)
    if answers.ndim == 1:
        return answers
    return answers.masked_fill(batch["attention_mask"] == 0, -100)


def _pooled(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean of a text's vectors over its tokens."""
    states = model(**_inputs(batch))[0]
    mask = batch["attention_mask"][..., None].to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1).clamp(min=1)
